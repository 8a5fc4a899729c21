"""Every hook of the core. A plugin is a module or an object with functions marked `@hookimpl`, registered under an
entry point of the group `agent_runtime`, or handed to `open_runtime(plugins=[…])`.

Hooks are synchronous and may not block: where something must be awaited, the hook returns an object that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Final

import pluggy

from .changes import Batch, Change, Receipt
from .client import ClientFactory
from .formats import ImportFormat
from .records import Durability, NewMessage
from .storage import StorageFactory

if TYPE_CHECKING:
    import typer

    from .runtime import Runtime

__all__ = ["PROJECT", "HookSpecs", "hookimpl", "hookspec"]

PROJECT: Final = "agent_runtime"
hookspec: Final = pluggy.HookspecMarker(PROJECT)
hookimpl: Final = pluggy.HookimplMarker(PROJECT)


class HookSpecs:
    """The signatures. An implementation may leave out arguments that it does not use."""

    @hookspec
    def agent_runtime_hookspecs(self) -> Sequence[type]:  # type: ignore[empty-body]
        """Classes as this one, whose functions marked `@hookspec` are hooks of this plugin, for others to implement.

        Called first, while plugins are loaded. Who implements a hook of a plugin that may be missing marks it with
        `@hookimpl(optionalhook=True)`.
        """

    @hookspec
    def agent_runtime_storages(self) -> Mapping[str, StorageFactory]:  # type: ignore[empty-body]
        """The URL schemes this plugin stores under, each with its factory. A scheme has one plugin."""

    @hookspec
    def agent_runtime_commands(self, app: typer.Typer) -> None:
        """Add commands to the command line."""

    @hookspec
    def agent_runtime_clients(self) -> Mapping[str, ClientFactory]:  # type: ignore[empty-body]
        """The URL schemes of servers that this plugin can talk to: how commands reach sessions that a server has."""

    @hookspec
    def agent_runtime_import_formats(self) -> Mapping[str, ImportFormat]:  # type: ignore[empty-body]
        """What `agent-runtime import --format NAME` can read besides `chat`, which is ours. A name has one plugin."""

    @hookspec
    def agent_runtime_lifespan(self, runtime: Runtime) -> AbstractAsyncContextManager[object] | None:
        """Entered once the runtime serves (after recovery), left before it drains. One that raises stops the start."""

    @hookspec
    def agent_runtime_before_append(self, session_id: str, message: NewMessage) -> NewMessage | None:
        """Transform a message that is about to be appended (return it), leave it (None), or refuse it (raise
        InvalidInput).

        Called in the order of the plugins, each with the previous one's result; what comes out is then validated.
        """

    @hookspec
    def agent_runtime_batch_stored(self, receipt: Receipt) -> None:
        """A batch is stored. An observer that raises is named, logged, and not called again."""

    @hookspec
    def agent_runtime_flush_failed(self, batch: Batch, error: Exception, attempt: int) -> None:
        """The `attempt`-th try to store a batch failed; it will be tried again. An observer."""

    @hookspec
    def agent_runtime_change_quarantined(self, change: Change, error: Exception) -> None:
        """A change can't be stored and goes to quarantine; its session is held. An observer."""

    @hookspec
    def agent_runtime_appended(self, session_id: str, messages: int, durability: Durability, duration_s: float) -> None:
        """A call that appended so many messages is about to return, at the level it waited for. An observer."""
