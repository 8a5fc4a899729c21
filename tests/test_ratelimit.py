"""A limit of requests a second: what it lets through, of whom, and what it holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_runtime import Config, ConfigError
from agent_runtime_ratelimit.buckets import Buckets
from agent_runtime_ratelimit.middleware import client_of
from agent_runtime_ratelimit.options import Options, read_options
from http_rig import App, Reply, opened

pytestmark = pytest.mark.anyio

SLOW = {"requests_per_s": 0.001, "burst": 3}


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


# --- buckets ----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@given(
    rate=st.floats(0.1, 1000),
    burst=st.integers(1, 20),
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 5)), max_size=200),
)
def test_in_any_time_no_client_has_more_than_its_burst_and_its_rate(
    rate: float, burst: int, steps: list[tuple[str, float]]
) -> None:
    """And none has less: a request is refused only when the bucket is empty, and served when it was told to come back."""
    clock = Clock()
    buckets = Buckets(rate=rate, burst=burst, clients_max=10, now=clock)
    served: dict[str, list[float]] = {}
    for client, step in steps:
        clock.now_s += step / rate
        missing_s = buckets.take(client)
        times = served.setdefault(client, [])
        if missing_s:
            before = clock.now_s
            clock.now_s += missing_s / 2
            assert buckets.take(client) > 0
            clock.now_s = before + missing_s
            assert buckets.take(client) == 0
        times.append(clock.now_s)
        for at, start in enumerate(times):
            assert len(times) - at <= burst + (clock.now_s - start) * rate + 1e-3
    assert len(buckets) <= 3


def test_clients_are_forgotten_when_their_bucket_is_full_or_there_are_too_many() -> None:
    clock = Clock()
    buckets = Buckets(rate=1, burst=2, clients_max=100, now=clock)
    for number in range(1000):
        assert buckets.take(str(number)) == 0
        assert len(buckets) <= 100
    assert buckets.take("999") == 0 < buckets.take("999")
    assert buckets.take("0") == 0  # it had been forgotten
    clock.now_s += 10
    for _ in range(120):
        clock.now_s += 1
        buckets.take("one")
    assert len(buckets) == 1


# --- the middleware ---------------------------------------------------------------------------------------------------


async def status(app: App, target: str = "/v1/sessions", **options: Any) -> int:
    return (await app("GET", target, **options)).status


def limited(options: object = SLOW, **http: Any) -> Config:
    return Config.of("memory:", plugins={"config": {"ratelimit": options}}, http=http)


async def test_it_is_off_unless_it_is_told_how_many() -> None:
    async with opened() as app:
        assert Counter([await status(app) for _ in range(300)]) == {200: 300}


async def test_one_too_many_is_told_when_to_come_back_and_health_checks_are_free() -> None:
    async with opened(limited()) as app:
        await app("PUT", "/v1/sessions/health")
        assert [await status(app, "/v1/sessions/health") for _ in range(2)] == [200, 200]
        for method, target in (("GET", "/v1/sessions/health"), ("POST", "/v1/sessions"), ("GET", "/nowhere")):
            refused: Reply = await app(method, target)
            assert (refused.status, refused.slug) == (429, "too-many-requests")
            assert 990 <= int(refused.headers["retry-after"]) <= 1000
        for target in ("/health", "/livez", "/readyz"):
            assert await status(app, target) == 200


async def test_who_has_a_token_is_one_client_and_who_makes_one_up_is_not_another() -> None:
    async with opened(limited(tokens=["ada", "bob"])) as app:
        for token in ("ada", "bob"):
            assert [await status(app, headers=bearer(token)) for _ in range(4)] == [200, 200, 200, 429]
        assert [await status(app, headers=bearer(f"x{number}")) for number in range(4)] == [401, 401, 401, 429]
        assert await status(app) == 429


def test_addresses_of_one_network_are_one_client() -> None:
    class Service:
        class tokens:
            @staticmethod
            def admit(_: object) -> None:
                return None

    class Application:
        class state:
            service = Service

    def client(host: str | None) -> str:
        return client_of({"app": Application, "client": None if host is None else (host, 1)})

    assert client("2001:db8:1:2:3::4") == client("2001:db8:1:2:ffff::1") != client("2001:db8:1:3::1")
    assert client("::ffff:10.0.0.1") == client("10.0.0.1") != client("10.0.0.2")
    assert (client(None), client("unix")) == ("", "unix")


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_options", "problem"),
    [
        ({}, ": object missing required field `requests_per_s`"),
        ({"requests_per_s": "many"}, ".requests_per_s: expected `float`, got `str`"),
        ({"requests_per_s": 0}, ".requests_per_s: expected `float` > 0.0"),
        ({"requests_per_s": 1, "burst": 0}, ".burst: expected `int` >= 1"),
        ({"requests_per_s": 1, "bursts": 5}, ".bursts: unknown key; did you mean burst?"),
        (5, ": expected `object`, got `int`"),
    ],
)
async def test_options_that_are_wrong_are_named(given_options: object, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with opened(limited(given_options)):
            raise AssertionError
    assert caught.value.problems == (f"plugins.config.ratelimit{problem}",)


def test_options_and_their_defaults() -> None:
    assert read_options({"requests_per_s": 2}) == Options(requests_per_s=2.0, burst=50, clients_max=10_000)
