"""The runtime: puts storage, lease, log, scheduler and residents together, and takes them apart again.

`open_runtime` opens the storage (which migrates), takes the lease, brings held sessions into memory, starts the tasks,
and enters the plugins' lifespans. Nothing else is loaded: sessions come on first touch. At its end the lifespans are
left, what is unstored is drained within `drain_timeout_s`, the lease is given back, and the storage closed. Every task
lives in one task group; none outlives the runtime.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import msgspec

from .archives import Archives
from .budget import Budget
from .config import Config, redact_url
from .directories import Overtaken, Unfinished, journal_files, journal_place
from .door import CREATION_SCOPE, Door, Plan
from .durations import duration
from .errors import (
    DrainIncomplete,
    DurabilityNotReached,
    InvalidInput,
    LeaseLost,
    PluginError,
    RuntimeClosed,
    SessionNotFound,
    StorageUnavailable,
    again,
)
from .flushes import FlushLog
from .identifiers import Identifiers, utc_now
from .journal import Journal, JournalFiles
from .keeper import JournalKeeper
from .late import LateReplay
from .lease import LeaseKeeper
from .log import Log
from .opening import claimed, levels_of
from .plans import MESSAGE_BYTES_MAX, TITLE_CHARS_MAX, NewSession, Planner
from .plugins import PluginManager
from .purges import Purges
from .quarantine import Quarantine
from .reads import Reads
from .records import DEFAULT_AGENT, Durability, NewMessage, Order, Page, PurgedSession, Session, Watermarks
from .recovery import recover
from .residents import Resident, Residents
from .retention import Retention
from .scheduler import Scheduler, SchedulerOptions
from .session import DESCRIPTION_CHARS_MAX, PAGE_ITEMS_MAX, SessionHandle, check_order, request_for
from .status import Status, status_of
from .storage import Storage, StorageConfig
from .validation import (
    check_id,
    check_ids,
    check_length,
    check_limit,
    check_message,
    check_name,
    check_text,
    json_object,
)

__all__ = ["Runtime", "open_runtime"]

logger = logging.getLogger("agent_runtime")


class Runtime:
    """The sessions of one database. Made by `open_runtime`; used from the event loop that opened it."""

    def __init__(
        self,
        config: Config,
        storage: Storage,
        lease: LeaseKeeper,
        plugins: PluginManager,
        *,
        sequence: int,
        budget: Budget,
        journal: Journal | None,
        unfinished: Iterable[Unfinished] = (),
        generator: random.Random,
    ) -> None:
        write_behind = config.write_behind
        levels, durability = levels_of(config, storage.abilities, journaled=journal is not None)
        self.config = config
        self.plugins = plugins
        self._storage = storage
        power_safe = storage.abilities.survives != "nothing"
        self._log = Log(sequence, journal, power_safe=power_safe, timeout_s=write_behind.durability_timeout_s)
        self._budget = budget
        self._residents = Residents(bytes_max=config.residents.bytes_max, tail_messages=config.residents.tail_messages)
        self._flush_log = FlushLog(plugins)
        self._scheduler = Scheduler(
            storage,
            lease.grant.fence,
            log=self._log,
            budget=self._budget,
            residents=self._residents,
            observers=self._flush_log,
            options=_scheduler_options(config),
            now=utc_now,
            random=generator.random,
        )
        self._journal = None
        if journal is not None:
            self._journal = JournalKeeper(
                journal,
                self._log,
                sync_interval_s=config.journal.sync_interval_s,
                unstored=self._scheduler.unstored,
                cuts=power_safe,
            )
        identifiers = Identifiers(lambda: time.time_ns() // 1_000_000, generator.getrandbits)
        self._identifiers = identifiers
        self._door = Door(
            storage=storage,
            log=self._log,
            budget=self._budget,
            residents=self._residents,
            scheduler=self._scheduler,
            lease=lease,
            now=utc_now,
            levels=levels,
            durability=durability,
            read_timeout_s=config.storage.read_timeout_s,
            guard=self._check_lease if config.lease.unreachable == "refuse" else None,
        )
        self._planner = Planner(sequence=lambda: self._log.next, identifiers=identifiers, now=utc_now)
        self._reads = Reads(self._door, tail_messages=config.residents.tail_messages)
        self._quarantine = Quarantine(
            door=self._door,
            log=self._log,
            budget=self._budget,
            residents=self._residents,
            scheduler=self._scheduler,
        )
        self._purges = Purges(
            door=self._door,
            planner=self._planner,
            reads=self._reads,
            quarantine=self._quarantine,
            scheduler=self._scheduler,
            journal=self._journal,
        )
        self._archives = Archives(
            door=self._door,
            planner=self._planner,
            reads=self._reads,
            hooks=plugins,
            bytes_max=write_behind.pending_bytes_max,
        )
        self._lease = lease
        self._unfinished = tuple(unfinished)
        self._lease_scope = anyio.CancelScope(shield=True)
        self._waits_scope = anyio.CancelScope(shield=True)
        self._journal_scope = anyio.CancelScope()
        self._flush_log_scope = anyio.CancelScope()
        self._retention = Retention(door=self._door, planner=self._planner)
        self._retention_scope = anyio.CancelScope()
        self._fenced: LeaseLost | None = None
        self._fenced_off = anyio.Event()

    # Sessions

    async def create_session(
        self,
        session_id: str | None = None,
        *,
        user_id: str | None = None,
        system_prompt: str | None = None,
        title: str | None = None,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        agent: str = DEFAULT_AGENT,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> SessionHandle:
        """Create a session (without an id: under a new one). The system prompt becomes its first message.

        Raises:
            SessionExists: the id is taken.
        """
        if session_id is not None:
            check_id("session_id", session_id)
        fields = self._check_new(user_id, system_prompt, title, description, metadata, agent)
        return await self._create(session_id, fields, False, durability, idempotency_key)

    async def get_or_create_session(
        self,
        session_id: str,
        *,
        user_id: str | None = None,
        system_prompt: str | None = None,
        title: str | None = None,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        agent: str = DEFAULT_AGENT,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> SessionHandle:
        """The session with this id; created from the other arguments if there is none. One caller creates it."""
        check_id("session_id", session_id)
        fields = self._check_new(user_id, system_prompt, title, description, metadata, agent)
        return await self._create(session_id, fields, True, durability, idempotency_key)

    @staticmethod
    def _check_new(
        user_id: str | None,
        system_prompt: str | None,
        title: str | None,
        description: str | None,
        metadata: Mapping[str, Any] | None,
        agent: str,
    ) -> dict[str, Any]:
        if user_id is not None:
            check_id("user_id", user_id)
        if title is not None:
            check_text("title", title, TITLE_CHARS_MAX)
        if description is not None:
            check_text("description", description, DESCRIPTION_CHARS_MAX)
        check_name("agent", agent)
        messages: tuple[NewMessage, ...] = ()
        if system_prompt is not None:
            check_text("system_prompt", system_prompt, MESSAGE_BYTES_MAX)
            messages = (NewMessage(role="system", content=system_prompt),)
        return {
            "user_id": user_id,
            "title": title,
            "description": description,
            "metadata": msgspec.json.encode(json_object("metadata", metadata)).decode(),
            "agent": agent,
            "messages": messages,
        }

    async def _create(
        self,
        session_id: str | None,
        fields: dict[str, Any],
        exist_ok: bool,
        durability: Durability | None,
        idempotency_key: str | None,
    ) -> SessionHandle:
        fresh = session_id is None
        new = NewSession(session_id=session_id or self._identifiers.new(), **fields)
        route = "get_or_create_session" if exist_ok else "create_session"
        arguments = [
            session_id,
            {name: value for name, value in fields.items() if name != "messages"},
            list(new.messages),
        ]
        request = request_for(idempotency_key, route, arguments, msgspec.json.Decoder(Session).decode)
        if self.plugins.appending:
            messages = [self.plugins.before_append(new.session_id, message) for message in new.messages]
            for message in messages:
                check_message("system_prompt", message)
            new = msgspec.structs.replace(new, messages=messages)
        created = True  # a call that is answered from its outcome did create the session: else it would have none

        def plan(current: Resident | None) -> Plan[Session]:
            nonlocal created
            plan = self._planner.create(new, current, exist_ok=exist_ok)
            created = plan.change is not None
            return plan

        try:
            found = await self._door.write(
                new.session_id, CREATION_SCOPE, plan, durability=durability, request=request, fresh=fresh
            )
        except DurabilityNotReached as error:
            error.outcome = self._handle_of(error.outcome, created=created)
            raise
        return self._handle_of(found, created=created)

    async def get_session(self, session_id: str) -> SessionHandle:
        """The session with this id.

        Raises:
            SessionNotFound: there is none.
        """
        resident = await self._door.locate(check_id("session_id", session_id))
        if resident is None or resident.deleted:
            raise SessionNotFound(session_id)
        return self._handle(session_id, resident.incarnation)

    async def list_sessions(
        self, *, user_id: str | None = None, limit: int = 50, cursor: str | None = None, order: Order = "desc"
    ) -> Page[Session]:
        """A page of at most `limit` (1–1000) sessions (of one user), by default the newest first.

        `next` of the page is the `cursor` of the following one; None at the end. Order is by creation, which never
        changes: paging to the end gives every session that was there all the time exactly once.
        """
        if user_id is not None:
            check_id("user_id", user_id)
        check_limit("limit", limit, PAGE_ITEMS_MAX)
        self._door.check_open()
        return await self._reads.sessions(user_id=user_id, limit=limit, cursor=cursor, order=check_order(order))

    async def scan_sessions(self, *, user_id: str | None = None, order: Order = "asc") -> AsyncIterator[Session]:
        """All sessions (of one user), by default the oldest first."""
        cursor = None
        while True:
            page = await self.list_sessions(user_id=user_id, limit=PAGE_ITEMS_MAX, cursor=cursor, order=order)
            for record in page.items:
                yield record
            if page.next is None:
                return
            cursor = page.next

    async def purge_sessions(
        self,
        session_ids: Sequence[str],
        *,
        idle_longer_than: timedelta | None = None,
        dry_run: bool = False,
    ) -> list[PurgedSession]:
        """Delete sessions (at most 1000) so that nothing of them is left in the database's rows nor in the journal.

        Returns those that were there, each with what was taken of it. Given `idle_longer_than`, only those in which
        nothing has changed for so long, and that are not held; else changes in quarantine are given up too. With
        `dry_run` nothing is deleted. What the storage's own files keep of deleted rows, its documentation says.

        Raises:
            StorageUnavailable: they are deleted, as by `delete`, but what was deleted is still there after
                `durability_timeout_s`.
            Quarantined: the database refuses a deletion; it is kept in quarantine.
        """
        check_ids("session_ids", session_ids, PAGE_ITEMS_MAX)
        if idle_longer_than is not None:
            check_length("idle_longer_than", idle_longer_than)
        self._door.check_open()
        timeout_s = self.config.write_behind.durability_timeout_s
        with anyio.move_on_after(timeout_s):
            return await self._purges.purge(session_ids, idle_longer_than, dry_run=dry_run)
        error = self._scheduler.figures.last_error or "no error so far, it is slow"
        raise StorageUnavailable(f"what was to be purged is not gone after {timeout_s:g} s: {error}")

    def _handle(self, session_id: str, incarnation: str) -> SessionHandle:
        return SessionHandle(session_id, incarnation, self._door, self._planner, self._reads, self.plugins)

    def _handle_of(self, record: Session, *, created: bool) -> SessionHandle:
        handle = self._handle(record.session_id, record.incarnation)
        handle.created = created
        handle.first_record = record
        return handle

    # The log

    @property
    def watermarks(self) -> Watermarks:
        """How far the log has come."""
        return self._log.watermarks

    async def flush(self) -> None:
        """Wait until every change acknowledged so far is stored.

        Raises:
            Quarantined: some of them can't be stored, and are kept in quarantine.
            StorageUnavailable: they are not stored within `durability_timeout_s`; they stay, and go on being tried.
        """
        self._door.check_open()
        timeout_s = self.config.write_behind.durability_timeout_s
        with anyio.move_on_after(timeout_s):
            await self._log.wait_stored(self._log.accepted, first=self._log.stored + 1)
            return
        error = self._scheduler.figures.last_error or "no error so far, it is slow"
        raise StorageUnavailable(
            f"{self._scheduler.pending_changes} change(s) are still not stored after {timeout_s:g} s: {error}"
        )

    def status(self) -> Status:
        """Figures of this moment. Synchronous; asks no database."""
        return status_of(
            log=self._log,
            budget=self._budget,
            residents=self._residents,
            scheduler=self._scheduler,
            lease=self._lease,
            storage=self._storage,
            journal=None if self._journal is None else self._journal.journal,
            door=self._door,
            fenced=self._fenced,
            orphans=self._scheduler.orphans.total(),
            unfinished=self._unfinished,
        )

    async def wait_fenced(self) -> None:
        """Wait until another runtime has taken over the database. From then on every call raises LeaseLost."""
        await self._fenced_off.wait()

    @property
    def quarantine(self) -> Quarantine:
        """The changes that the database refused."""
        return self._quarantine

    # Start and stop

    def _check_lease(self) -> None:
        """With `lease.unreachable: refuse`: what is written while another may have taken over could come in late."""
        if self._lease.expired:
            raise StorageUnavailable(
                "the lease has expired and can't be renewed, as the database is away: nothing was changed (this is "
                "lease.unreachable: refuse)"
            )

    @asynccontextmanager
    async def _serve(self, overtaken: Sequence[Overtaken] = (), *, ours: bool = False) -> AsyncIterator[None]:
        """Serve until the block is left; then drain. The block's own error comes out as it is.

        Before anything is served, what these journals have comes in. With `ours` that is all.
        """
        restored = await self._quarantine.restore()
        if restored:
            logger.warning("%d change(s) are in quarantine; those of their sessions that are there are held", restored)
        body_error: BaseException | None = None
        async with anyio.create_task_group() as tasks:
            drained = anyio.Event()
            tasks.start_soon(self._run_scheduler, drained)
            tasks.start_soon(self._run_lease)
            tasks.start_soon(self._run_waits)
            tasks.start_soon(self._run_flush_log)
            if self._journal is not None:
                tasks.start_soon(self._run_journal, self._journal)
            if (max_idle := self.config.retention.max_idle) is not None:
                tasks.start_soon(self._run_retention, duration(max_idle))
            try:
                for each in overtaken:
                    await LateReplay(
                        each,
                        door=self._door,
                        log=self._log,
                        budget=self._budget,
                        reads=self._reads,
                        scheduler=self._scheduler,
                        flush=self.flush,
                        epoch=self._lease.grant.fence.epoch,
                    ).run(ours=ours)
                async with AsyncExitStack() as lifespans:
                    for plugin, lifespan in () if ours else self.plugins.lifespans(self):
                        try:
                            await lifespans.enter_async_context(lifespan)
                        except Exception as error:
                            problem = f"{type(error).__name__}: {error}"
                            raise PluginError(plugin, "agent_runtime_lifespan", problem) from error
                    yield
            except BaseException as error:  # noqa: BLE001 — kept out of the task group's exception group, raised below
                body_error = error
            self._retention_scope.cancel()
            self._door.close()
            tasks.start_soon(self._drain, drained)  # a task of its own: asyncio's `Task.cancel` passes all shields
        left = None
        if pending := self._scheduler.pending_changes:
            reason = self._scheduler.figures.last_error or "the drain took too long"
            place = None if self._journal is None else self._journal.journal.place
            left = DrainIncomplete(pending, reason, overtaken[0].files.place if ours else place)
        if body_error is not None:
            if left:
                body_error.add_note(f"agent-runtime: {left}")
            raise body_error
        if self._fenced is not None:
            raise again(self._fenced)
        if left:
            raise left

    async def _drain(self, drained: anyio.Event) -> None:
        """Store what is left, as far as the budget goes; then end the other tasks."""
        self._scheduler.stop()
        with anyio.CancelScope(shield=True):
            if self._fenced is None:
                with anyio.move_on_after(self.config.write_behind.drain_timeout_s):
                    await drained.wait()
            self._scheduler.abandon(self._fenced or RuntimeClosed())
            await drained.wait()
            self._lease_scope.cancel()
            self._waits_scope.cancel()
            self._journal_scope.cancel()
            self._flush_log_scope.cancel()
            self._flush_log.tell()

    async def _run_scheduler(self, drained: anyio.Event) -> None:
        try:
            with anyio.CancelScope(shield=True):  # whatever is cancelled around the runtime, it drains
                await self._scheduler.run()
        except LeaseLost as error:
            self._fence_off(error)
        finally:
            drained.set()

    async def _run_lease(self) -> None:
        try:
            with self._lease_scope:
                await self._lease.run()
        except LeaseLost as error:
            self._fence_off(error)

    async def _run_waits(self) -> None:
        with self._waits_scope:
            await self._log.expire()

    async def _run_flush_log(self) -> None:
        with self._flush_log_scope:
            await self._flush_log.run()

    async def _run_retention(self, max_idle: timedelta) -> None:
        with self._retention_scope:
            await self._retention.run(max_idle, self.config.retention.sweep_interval_s)

    async def _run_journal(self, keeper: JournalKeeper) -> None:
        with anyio.CancelScope(shield=True):
            with self._journal_scope:
                await keeper.run()
            await keeper.close()

    def _fence_off(self, error: LeaseLost) -> None:
        """Another runtime writes now: what is in memory may be wrong, so nothing is served any more."""
        self._fenced = error
        self._fenced_off.set()
        self._door.close(error)
        self._scheduler.abandon(error)


def _config_of(given: object) -> Config:
    if isinstance(given, Config):
        return given
    if isinstance(given, str):
        return Config.of(given)
    told = f"must be a URL or a Config, as load_config makes of a file, not {type(given).__name__}"
    raise InvalidInput("config", told)


@asynccontextmanager
async def open_runtime(
    config: Config | str,
    *,
    plugins: Iterable[object] = (),
    address: str | None = None,
    files: JournalFiles | None = None,
) -> AsyncIterator[Runtime]:
    """Open the sessions of a database: `async with open_runtime("sqlite:///data/agent_runtime.db") as runtime`.

    `config` is a URL or a whole configuration. `plugins` are registered besides the installed ones. `address` is the
    URL of the caller's server, if it has one: written into the lease, so that others find it. `files` take the place
    of the journal's directory, as a simulation does.

    Raises:
        ConfigError, PluginError: nothing was opened.
        LeaseHeld: another runtime has this database open.
        JournalError: the journal can't be opened, or is that of another database (JournalMismatch).
        StorageError: the database can't be opened, or does not take what the journal has for it.
        DrainIncomplete: at the end, when changes could not be stored within `drain_timeout_s`.
        LeaseLost: at the end, when another runtime took over.
    """
    config = _config_of(config)
    generator = random.Random(random.SystemRandom().getrandbits(256))  # noqa: S311 — names and jitter, no secrets
    manager = PluginManager(disabled=config.plugins.disabled)
    manager.load(plugins)
    async with _database(manager, config) as storage:
        given, beside = files, None
        if given is None and config.journal.directory is None:
            beside = journal_place(config, storage.abilities)

        def directory_of() -> JournalFiles | None:
            return given or journal_files(config, storage.abilities)

        levels_of(config, storage.abilities, journaled=directory_of() is not None and config.journal.enabled)

        async def replay(overtaken: Overtaken, lease: LeaseKeeper) -> None:
            """As a runtime without a journal, which nobody uses: the overtaken one keeps what is not stored."""
            stored = config.write_behind.model_copy(update={"durability": "stored"})
            runtime = Runtime(
                config.model_copy(update={"write_behind": stored}),
                storage,
                lease,
                manager,
                sequence=lease.grant.sequence,
                budget=_budget(config),
                journal=None,
                generator=generator,
            )
            async with runtime._serve([overtaken], ours=True):
                pass

        async with (
            claimed(config, storage, directory_of, address, beside=beside, replay=replay, random=generator.random) as (
                lease,
                taken,
                identity,
                unfinished,
            ),
            AsyncExitStack() as stack,
        ):
            budget = _budget(config)
            sequence = lease.grant.sequence
            journal = None
            files, directory = taken.files, taken.directory
            if files is not None and directory is not None and identity is not None:
                await directory.cut_torn_tails()
                # The new generation must stand in the journal before the first batch confirms it in the database.
                journal = await Journal.begin(
                    files,
                    directory,
                    journal_id=identity.journal_id,
                    generation=identity.generation,
                    database_id=lease.grant.database_id,
                    after=max(sequence, directory.end),
                    stored=sequence,
                    segment_bytes=config.journal.segment_bytes,
                    retain_s=config.journal.retain_s,
                    pending_bytes=lambda: budget.used,
                )
                stack.callback(journal.close)
                if directory.end > sequence:
                    sequence = await recover(
                        directory,
                        storage,
                        lease,
                        observers=manager,
                        options=_scheduler_options(config),
                        bytes_max=config.write_behind.pending_bytes_max,
                        timeout_s=config.write_behind.durability_timeout_s,
                        now=utc_now,
                        random=generator.random,
                    )
                if not config.journal.enabled:  # it was there from before: what it held is stored now
                    if storage.abilities.survives != "nothing":
                        await journal.finish(sequence)
                    journal = None
            runtime = Runtime(
                config,
                storage,
                lease,
                manager,
                sequence=sequence,
                budget=budget,
                journal=journal,
                unfinished=unfinished,
                generator=generator,
            )
            async with runtime._serve(taken.overtaken):
                yield runtime


@asynccontextmanager
async def _database(manager: PluginManager, config: Config) -> AsyncIterator[Storage]:
    """The storage, and the lines by which an operator sees that it is there, and that all went well to the end."""
    factory = manager.storage_for(config.storage.url)
    async with factory(StorageConfig(url=config.storage.url, options=dict(config.storage.options))) as storage:
        logger.info("database initialized: %s", redact_url(config.storage.url))
        yield storage
    logger.info("shutdown complete")


def _budget(config: Config) -> Budget:
    write_behind = config.write_behind
    return Budget(
        write_behind.pending_bytes_max,
        timeout_s=write_behind.append_timeout_s,
        retry_after_s=max(1.0, min(write_behind.interval_s, 30.0)),
    )


def _scheduler_options(config: Config) -> SchedulerOptions:
    write_behind = config.write_behind
    return SchedulerOptions(
        interval_s=write_behind.interval_s,
        batch_changes=write_behind.batch_changes,
        quarantine_max=write_behind.quarantine_max,
        quarantine_window_s=write_behind.quarantine_window_s,
    )
