"""What health checks tell: each thing that can be wrong, since when, and nothing of where."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from agent_runtime import LeaseLost, StorageUnavailable
from agent_runtime.journal import LocalFiles
from agent_runtime.testing import writes_message
from http_rig import App, Outage, Reply, checks, opened, runtime_of

pytestmark = pytest.mark.anyio

S1 = "/v1/sessions/s1"
SECRET = "hunter2"


async def ready(app: App) -> Reply:
    """What `/readyz` answers; the other two are well."""
    assert (await app("GET", "/livez")).status == (await app("GET", "/health")).status == 200
    reply = await app("GET", "/readyz")
    assert (reply.status, reply.json["status"]) in [(200, "ready"), (503, "not ready")]
    assert (reply.status == 503) == ("fail" in checks(reply).values())
    assert SECRET not in reply.body.decode()
    assert (await app("HEAD", "/readyz")).status == reply.status
    return reply


def check(reply: Reply, name: str) -> Any:
    [found] = [each for each in reply.json["checks"] if each["name"] == name]
    return found


def age(entry: Any) -> timedelta:
    return datetime.now(UTC) - datetime.fromisoformat(entry["since"])


async def test_all_is_well_and_then_it_stops(tmp_path: Path) -> None:
    async with opened(f"sqlite:///{tmp_path / 'sessions.db'}") as app:
        well = await ready(app)
        names = ["runtime", "storage", "lease", "quarantine", "journal"]
        assert (well.status, checks(well)) == (200, dict.fromkeys(names, "ok"))
        assert timedelta() <= age(check(well, "runtime")) < timedelta(seconds=20)
        app.app.state.service.stop()  # type: ignore[attr-defined]
        stopping = await ready(app)
        assert checks(stopping) == dict.fromkeys(names, "ok") | {"runtime": "fail"}
        assert check(stopping, "runtime")["detail"].startswith("stopping")
        assert check(stopping, "runtime")["since"] > check(well, "runtime")["since"]
        assert (await app("GET", "/v1/sessions")).status == 200


async def test_without_a_journal_there_is_no_check_of_it() -> None:
    async with opened() as app:
        assert "journal" not in checks(await ready(app))


async def test_batches_that_fail() -> None:
    outage = Outage()
    async with outage.opened(write_behind={"drain_timeout_s": 5.0, "interval_s": 0.01}) as app:
        before = datetime.now(UTC)
        fault = outage.faults.fail("apply", error=StorageUnavailable(f"{SECRET} is away"))
        assert (await app("PUT", f"{S1}?durability=stored")).status == 504
        failing = await ready(app)
        assert (failing.status, checks(failing)["storage"]) == (503, "fail")
        assert "1 change(s)" in check(failing, "storage")["detail"]
        since = datetime.fromisoformat(check(failing, "storage")["since"])
        assert before - timedelta(seconds=1) < since <= datetime.now(UTC)
        await anyio.sleep(0.05)
        again = datetime.fromisoformat(check(await ready(app), "storage")["since"])
        assert abs(again - since) < timedelta(seconds=0.02)  # it is when it began, not when it was asked for
        fault.stop()
        with anyio.fail_after(5):
            while (await ready(app)).status == 503:
                await anyio.sleep(0.02)


async def test_a_database_that_is_away_while_there_is_nothing_to_store() -> None:
    outage = Outage()
    async with outage.opened(lease={"duration_s": 1.0}) as app:
        fault = outage.faults.fail("renew", error=StorageUnavailable(f"{SECRET} is away"))
        with anyio.fail_after(5):
            while (await ready(app)).status == 200:
                await anyio.sleep(0.02)
        assert checks(await ready(app)) == {"runtime": "ok", "storage": "fail", "lease": "ok", "quarantine": "ok"}
        fault.stop()
        with anyio.fail_after(5):
            while (await ready(app)).status == 503:
                await anyio.sleep(0.02)


async def test_a_lease_that_is_lost() -> None:
    outage = Outage()
    with pytest.raises(LeaseLost):
        async with outage.opened(lease={"duration_s": 1.0}) as app:
            outage.faults.fail("renew", error=LeaseLost(f"taken over by {SECRET}"))
            with anyio.fail_after(5):
                await runtime_of(app).wait_fenced()
            lost = await ready(app)
            assert (lost.status, checks(lost)["lease"]) == (503, "fail")


async def test_sessions_that_are_held_are_a_warning() -> None:
    outage = Outage()
    async with outage.opened(write_behind={"durability_timeout_s": 5.0}) as app:
        await app("PUT", S1)
        outage.faults.reject(writes_message("poison"))
        poison = {"role": "user", "content": SECRET, "id": "poison"}
        assert (await app("POST", f"{S1}/messages?durability=stored", poison)).slug == "quarantined"
        held = await ready(app)
        assert (held.status, checks(held)["quarantine"]) == (200, "warn")
        assert check(held, "quarantine")["detail"].startswith("1 session(s) are held by 1 change(s)")


async def test_a_disk_that_is_low_is_a_warning_and_goes_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(f"sqlite:///{tmp_path / 'sessions.db'}") as app:
        await app("PUT", S1)
        message = {"role": "user", "content": "hi"}
        with monkeypatch.context() as patched:
            patched.setattr(LocalFiles, "free_bytes", lambda _: 10)
            runtime_of(app)._journal.journal._slow_size = 0  # type: ignore[union-attr]
            assert (await app("POST", f"{S1}/messages", message)).slug == "journal-full"
            low = await ready(app)
            assert (low.status, checks(low)["journal"]) == (200, "warn")
            assert (await app("GET", S1)).status == 200
        assert (await app("POST", f"{S1}/messages", message)).status == 201
        assert checks(await ready(app))["journal"] == "ok"
