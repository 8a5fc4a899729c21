"""The OpenAPI document is valid, whole and true: what it says is routed, and what is routed it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from agent_runtime import Runtime, hookimpl
from agent_runtime_http import create_app, lifespan
from agent_runtime_http.documentation import PAGES
from agent_runtime_http.problems import KINDS
from described import described, followed
from http_rig import App, opened, run, serving

IDS = {"session_id": "porto", "seq": "1", "collection": "c", "key": "k"}


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, said) for path, item in document["paths"].items() for method, said in item.items()]


def filled(path: str) -> str:
    return re.sub(r"{(\w+)}", lambda found: IDS[found[1]], path)


def test_it_is_a_valid_document() -> None:
    assert list(OpenAPIV31SpecValidator(described()).iter_errors()) == []


def test_its_schemas_are_as_generators_need_them() -> None:
    """Every array says of what, every enum of which type; both may be left out, and then clients lack them."""

    def check(schema: Any) -> None:
        if isinstance(schema, list):
            for each in schema:
                check(each)
        elif isinstance(schema, dict):
            assert schema.get("type") != "array" or "items" in schema
            assert not isinstance(schema.get("enum"), list) or "type" in schema
            for each in schema.values():
                check(each)

    check(described()["components"]["schemas"])


@pytest.mark.anyio
async def test_every_route_and_method_is_in_it_and_the_other_way_round() -> None:
    async with opened() as app:
        document = (await app("GET", "/openapi.json")).json
        assert isinstance(app.app, Starlette)
        routed = {route.path for route in app.app.routes if isinstance(route, Route)}
        assert routed == set(document["paths"]) | set(PAGES)
        for path, item in document["paths"].items():
            allowed = (await app("OPTIONS", filled(path))).headers["allow"].split(", ")
            assert {method.upper() for method in item} == set(allowed) - {"HEAD", "OPTIONS"}


def test_every_operation_tells_what_it_does_and_what_may_come_of_it() -> None:
    document = described()
    tags = {tag["name"] for tag in document["tags"]}
    assert all(tag["description"] for tag in document["tags"])
    for path, _, said in operations(document):
        assert set(said["tags"]) <= tags
        assert said["summary"]
        assert "`" not in said["summary"]
        assert said["operationId"].isidentifier()
        assert any(status.startswith("2") for status in said["responses"])
        parameters = [followed(each) for each in said.get("parameters", [])]
        assert [each["name"] for each in parameters if each["in"] == "path"] == re.findall(r"{(\w+)}", path)
        assert all(each["description"] for each in parameters)
        for content in said.get("requestBody", {}).get("content", {}).values():
            assert "example" in content or content["schema"].get("format") == "binary"


def test_every_problem_that_an_operation_can_have_is_in_it() -> None:
    told = {
        slug
        for _, _, said in operations(described())
        for response in map(followed, said["responses"].values())
        for slug in response.get("content", {}).get("application/problem+json", {}).get("examples", {})
    }
    of_no_operation = {"not-found", "method-not-allowed"}
    of_plugins = {"approval-not-found", "approval-decided"}
    assert told == set(KINDS) - of_no_operation - of_plugins


@pytest.mark.anyio
async def test_every_example_of_a_body_is_accepted() -> None:
    async with opened() as app:
        first = ["create_session", "append_messages"]
        with_body = [each for each in operations(described()) if "requestBody" in each[2]]
        with_body.sort(key=lambda each: ([*first, each[2]["operationId"]]).index(each[2]["operationId"]))
        assert len(with_body) >= 9
        for path, method, said in with_body:
            for media_type, content in said["requestBody"]["content"].items():
                body = json.dumps(content.get("example")).encode()
                reply = await app(method.upper(), filled(path), body, headers={"content-type": media_type})
                assert reply.status in (200, 201), (said["operationId"], reply.json)


@pytest.mark.anyio
@pytest.mark.parametrize("empty", [{}, [], 0, ""])
async def test_an_empty_value_is_no_false_for_what_would_purge(empty: object) -> None:
    async with opened() as app:
        await app("PUT", "/v1/sessions/porto")
        refused = await app("POST", "/v1/purge", {"session_ids": ["porto"], "dry_run": empty})
        assert (refused.status, refused.pointers) == (422, ["/dry_run"])
        assert (await app("GET", "/v1/sessions/porto")).status == 200


@pytest.mark.anyio
@pytest.mark.parametrize("length", [0, -1, True, "60", 1e300, []])
async def test_what_is_no_length_purges_nothing(length: object) -> None:
    async with opened() as app:
        await app("PUT", "/v1/sessions/porto")
        refused = await app("POST", "/v1/purge", {"session_ids": ["porto"], "idle_longer_than_s": length})
        assert (refused.status, refused.pointers) == (422, ["/idle_longer_than_s"])
        assert (await app("GET", "/v1/sessions/porto")).status == 200


@pytest.mark.anyio
async def test_the_least_length_counts_as_a_microsecond() -> None:
    async with opened() as app:
        await app("PUT", "/v1/sessions/porto")
        purged = await app("POST", "/v1/purge", {"session_ids": ["porto"], "idle_longer_than_s": 5e-324})
        assert [each["session_id"] for each in purged.json["items"]] == ["porto"]


@pytest.mark.anyio
async def test_it_is_made_once_and_says_where_it_is_mounted() -> None:
    inner = create_app("memory:")
    outer = App(Starlette(routes=[Mount("/agents", inner)]), root="/agents")
    before = await App(inner)("GET", "/openapi.json")
    assert (before.status, before.slug) == (503, "runtime-closed")
    async with lifespan(inner):
        assert (await App(inner)("GET", "/openapi.json")).json["servers"] == [{"url": "/"}]
        mounted = await outer("GET", "/openapi.json")
        assert mounted.json["servers"] == [{"url": "/agents"}]
        extensions = inner.state.service.extensions
        made = extensions.document[1]
        await outer("GET", "/openapi.json")
        assert extensions.document[1] is made


@pytest.mark.anyio
async def test_with_tokens_it_asks_for_one_and_is_behind_them() -> None:
    async with opened(http={"tokens": ["t" * 40]}) as app:
        assert (await app("GET", "/openapi.json")).status == 401
        document = (await app("GET", "/openapi.json", headers={"authorization": f"Bearer {'t' * 40}"})).json
        assert document["security"] == [{"bearer": []}]
        free = {path for path, _, said in operations(document) if said.get("security") == []}
        assert free == {"/health", "/livez", "/readyz"}
    async with opened() as app:
        assert (await app("GET", "/openapi.json")).json["security"] == []


# --- what plugins bring -----------------------------------------------------------------------------------------------


async def trains(_: Request) -> Response:
    """List trains.

    To where one wants.

    ---
    tags: [travel]
    responses:
      200: {description: Trains.}
    """
    return JSONResponse([])


async def plain(_: Request) -> Response:
    return JSONResponse([])


class Bringing:
    """A plugin with these routes."""

    def __init__(self, *routes: BaseRoute) -> None:
        self.routes = routes

    @hookimpl
    def agent_runtime_http_routes(self, runtime: Runtime) -> Sequence[BaseRoute]:
        return self.routes


@pytest.mark.anyio
async def test_routes_of_plugins_are_in_it_as_far_as_they_describe_themselves() -> None:
    plugin = Bringing(
        Route("/trains/{place}", trains),
        Mount("/more", routes=[Route("/{number:int}", plain, methods=["POST"]), Route("/again", plain)]),
        Route("/hidden", plain, include_in_schema=False),
        Route("/v1/status", plain),
    )
    async with opened(plugins=[plugin]) as app:
        document = (await app("GET", "/openapi.json")).json
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    said = document["paths"]["/trains/{place}"]["get"]
    assert said["summary"] == "List trains"
    assert said["description"] == "To where one wants."
    assert said["tags"] == ["travel"]
    assert said["responses"] == {"200": {"description": "Trains."}}
    assert [each["name"] for each in said["parameters"]] == ["place"]
    assert document["paths"]["/more/{number}"]["post"]["operationId"] == "plain"
    assert document["paths"]["/more/again"]["get"]["operationId"] == "plain_2"
    assert "/hidden" not in document["paths"]
    assert document["paths"]["/v1/status"] == described()["paths"]["/v1/status"]  # ours is what answers there


@pytest.mark.anyio
@pytest.mark.parametrize("text", ["Trains.\n\n---\n{", "Trains.\n\n---\n- trains"])
async def test_a_plugin_that_describes_in_a_wrong_way_is_named(text: str, caplog: pytest.LogCaptureFixture) -> None:
    async def wrong(_: Request) -> Response:
        return JSONResponse([])

    wrong.__doc__ = text
    async with opened(plugins=[Bringing(Route("/wrong", wrong))]) as app:
        assert (await app("GET", "/openapi.json")).status == 500
    assert "Bringing" in caplog.text
    assert "wrong: behind --- stands no" in caplog.text


def test_the_command_prints_it_without_a_server(tmp_path: Path) -> None:
    storage = tmp_path / "never.db"
    printed = run("openapi", environ={"AGENT_RUNTIME__STORAGE__URL": f"sqlite:///{storage}"})
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout)["paths"].keys() >= described()["paths"].keys()
    assert not storage.exists()


# --- by other people's tools ------------------------------------------------------------------------------------------


SETTINGS = """
hooks = "schemathesis_hooks"
[generation]
allow-x00 = false  # no text has NUL, which the document says once and not of each
[checks]
positive_data_acceptance.expected-statuses = ["2xx", 401, 403, 404, 409, 422]
ensure_resource_availability.enabled = false  # schemathesis_hooks.py has both, with what they don't know
use_after_free.enabled = false
[[operations]]
include-operation-id = "put_document"
checks.negative_data_rejection.enabled = false  # takes any JSON, where the document says objects
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """2,000 requests and more, of every kind and in sequences that follow one another, against a server."""
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    with serving("--storage", f"sqlite:///{tmp_path / 'sessions.db'}") as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
        told = subprocess.run(
            [*command, "--max-examples", "60", "--phases", "examples,coverage,fuzzing,stateful"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            timeout=1700,
        )
        assert "a request failed" not in server.errors()
    assert told.returncode == 0, told.stdout[-5000:]
    [cases] = re.findall(r"(\d+) generated", told.stdout)
    assert int(cases) >= 2000


MAKING = ["--meta", "none", "--fail-on-warning"]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_generated_client_has_a_conversation(tmp_path: Path) -> None:
    """openapi-python-client makes a client of all of it, without a warning; tests/generated_client.py talks through it."""
    (tmp_path / "plain.yaml").write_text("post_hooks: []\n")  # no formatter
    with serving("--storage", f"sqlite:///{tmp_path / 'sessions.db'}") as server:
        command = [sys.executable, "-m", "openapi_python_client", "generate", "--url", f"{server.url}/openapi.json"]
        made = subprocess.run(
            [
                *command,
                *MAKING,
                "--output-path",
                str(tmp_path / "runtime_client"),
                "--config",
                str(tmp_path / "plain.yaml"),
            ],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert (made.returncode, "warning" in (made.stdout + made.stderr).lower()) == (0, False), made.stdout
        said = subprocess.run(
            [sys.executable, "-W", "error", str(Path(__file__).parent / "generated_client.py"), server.url],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines() == ["user", "assistant", "tool", "assistant"]
