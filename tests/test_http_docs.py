"""The page at /docs: all of it comes from the package, and in a real browser it shows and sends what the document says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from starlette.applications import Starlette
from starlette.routing import Mount

from agent_runtime_http import create_app, lifespan
from agent_runtime_http.documentation import PAGES
from described import described
from http_rig import App, Server, opened, serving

TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
TOKEN = "correct-horse-battery-staple-" + "x" * 16


class Links(HTMLParser):
    """Where a page refers to, and whether it has script or style of its own, which its policy forbids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [value for name, value in attrs if name in ("src", "href", "action") and value is not None]
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)


@pytest.mark.anyio
@pytest.mark.parametrize("root", ["", "/agents"])
async def test_all_that_the_page_refers_to_is_served_here(root: str) -> None:
    inner = create_app("memory:")
    app = App(Starlette(routes=[Mount("/agents", inner)])) if root else App(inner)
    async with lifespan(inner):
        page = await app("GET", f"{root}/docs")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        links = Links(page.body.decode())
        assert links.inline == []
        assert len(links.found) == 4
        for link in links.found:
            assert not urlsplit(link).netloc
            part = await app("GET", urljoin(f"{root}/docs", link))
            assert part.status == 200
            assert part.headers["content-type"].startswith(TYPES.get(Path(link).suffix, "application/json"))


@pytest.mark.anyio
async def test_the_policy_lets_a_browser_load_nothing_else_and_nothing_asks_for_more() -> None:
    async with opened() as app:
        for path in PAGES:
            part = await app("GET", path)
            policy = dict(rule.split(" ", 1) for rule in part.headers["content-security-policy"].split("; "))
            assert policy.pop("default-src") == "'none'"
            assert set(policy.values()) == {"'self'", "'none'"}
            assert part.headers["x-content-type-options"] == "nosniff"
            named = set(re.findall(rb"\b(?:https?:)?//[\w.]+", part.body)) - {b"http://www.w3.org"}  # a name, in SVG
            assert not [each for each in named if b"." in each]
            assert b"innerHTML" not in part.body
            assert b"@import" not in part.body


def test_every_file_of_the_page_is_served() -> None:
    shipped = {each.name for each in (files("agent_runtime_http") / "pages").iterdir()}
    assert shipped == {"docs.html", *(path.rpartition("/")[2] for path in PAGES if path != "/docs")}


@pytest.mark.anyio
async def test_anybody_gets_the_page_at_any_time_but_not_what_it_shows() -> None:
    async with opened(http={"tokens": [TOKEN]}) as app:
        assert [(await app("GET", path)).status for path in PAGES] == [200] * len(PAGES)
        assert (await app("GET", "/openapi.json")).status == 401
    assert (await App(create_app("memory:"))("GET", "/docs")).status == 200


# --- in Chromium ------------------------------------------------------------------------------------------------------


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--window-size=1280,900"
)


class Browser:
    """Chromium, with what it asked for and what it complained of."""

    def __init__(self, chrome: Chrome) -> None:
        self.chrome = chrome
        self.wait = WebDriverWait(chrome, 10)

    def find(self, selector: str) -> Any:
        return self.wait.until(lambda chrome: chrome.find_element(By.CSS_SELECTOR, selector))

    def asked(self) -> list[str]:
        """The URLs of every request."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        sent = [each for each in messages if each["method"] == "Network.requestWillBeSent"]
        return [each["params"]["request"]["url"] for each in sent]

    def complaints(self) -> list[str]:
        """What was written to the console since the last time."""
        return [entry["message"] for entry in self._log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.chrome.get_log(kind)  # type: ignore[no-untyped-call]
        return entries


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium, "this test needs Debian's packages chromium and chromium-driver"
    assert driver, "this test needs Debian's packages chromium and chromium-driver"
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=ChromeService(driver))
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    environ = {"AGENT_RUNTIME__HTTP__TOKENS": json.dumps([TOKEN])}
    with serving("--storage", f"sqlite:///{tmp_path / 'sessions.db'}", environ=environ) as server:
        yield server


@pytest.mark.long
def test_in_a_browser_it_shows_the_document_and_sends_requests(browser: Browser, server: Server) -> None:
    chrome = browser.chrome
    chrome.get(f"{server.url}/docs")
    assert "asks for a token" in browser.find("#notice:not([hidden])").text
    browser.complaints()  # the 401 is one
    token = browser.find("#token input")
    token.send_keys(TOKEN)
    token.submit()
    browser.find("details.operation")
    ids = [each.get_attribute("id") for each in chrome.find_elements(By.CSS_SELECTOR, "details.operation")]
    wanted = [said["operationId"] for item in described()["paths"].values() for said in item.values()]
    assert set(wanted) <= set(ids)

    for name in ids:  # each can be unfolded, with its form and its answers
        chrome.execute_script("arguments[0].open = true", browser.find(f"#{name}"))
        browser.find(f"#{name} form button.send")
    for schema in chrome.find_elements(By.CSS_SELECTOR, "details.schema"):
        chrome.execute_script("arguments[0].open = true", schema)

    def send(name: str, **values: str) -> str:
        form = browser.find(f"#{name} form")
        for field, value in values.items():
            given = form.find_element(By.NAME, field)
            given.clear()
            given.send_keys(value)
        chrome.execute_script("arguments[0].requestSubmit()", form)
        text: str = browser.wait.until(lambda _: form.find_element(By.CSS_SELECTOR, ".status").text)
        return text

    assert send("create_session").startswith("201 ")
    assert send("append_message", session_id="porto").startswith("201 ")
    assert send("get_history", limit="5").startswith("200 ")  # the session was filled in above
    assert "Find me a train to Porto." in browser.find("#get_history pre").text
    assert send("put_document", collection="plans", key="p1").startswith("200 ")
    assert browser.complaints() == []
    assert send("get_message", seq="99").startswith("404 ")
    browser.complaints()  # and so is the 404

    search = browser.find("nav input")
    search.send_keys("tool")
    links = chrome.find_elements(By.CSS_SELECTOR, "#index a")
    shown = [each.text for each in links if each.is_displayed()]
    assert 0 < len(shown) < len(links)
    assert all("tool" in text.lower() for text in shown)
    chrome.set_window_size(420, 900)
    assert chrome.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    asked = [
        url for url in browser.asked() if not url.startswith(("chrome://", "data:"))
    ]  # and not its first, empty page
    assert len(asked) > 9
    assert [url for url in asked if not url.startswith(f"{server.url}/")] == []
    assert browser.complaints() == []
