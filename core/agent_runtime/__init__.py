"""agent-runtime keeps the state of AI agents: answered from memory, written behind, honest about what is stored.

    async with open_runtime("sqlite:///data/agent_runtime.db") as runtime:
        session = await runtime.create_session("s1", system_prompt="You are helpful.")
        await session.append("user", "hi")
        history = await session.history()

These are the public names; what is not here, nor in `agent_runtime.storage`, `rows`, `changes`, `hookspecs`, `bridge`,
`formats`, `keyed`, `process` and `testing` (for authors of plugins), may change without notice.
"""

from .approvals import Approval
from .blocking import BlockingRuntime, BlockingSessionHandle, open_runtime_blocking
from .config import Config
from .errors import (
    AgentRuntimeError,
    ApprovalDecided,
    ApprovalNotFound,
    ConfigError,
    DrainIncomplete,
    DurabilityNotReached,
    IdempotencyConflict,
    InvalidInput,
    JournalCorrupt,
    JournalError,
    JournalFull,
    JournalMismatch,
    LeaseHeld,
    LeaseLost,
    Overloaded,
    PluginError,
    Quarantined,
    RuntimeClosed,
    SessionExists,
    SessionHeld,
    SessionNotFound,
    StorageError,
    StorageFatal,
    StorageUnavailable,
)
from .hookspecs import hookimpl
from .quarantined import QuarantinedChange
from .records import AgentContext, AgentSwitch, Document, Message, NewMessage, Page, PurgedSession, Session, Watermarks
from .runtime import Runtime, open_runtime
from .session import SessionHandle
from .sources import load_config
from .status import Status

__all__ = [
    "AgentContext",
    "AgentRuntimeError",
    "AgentSwitch",
    "Approval",
    "ApprovalDecided",
    "ApprovalNotFound",
    "BlockingRuntime",
    "BlockingSessionHandle",
    "Config",
    "ConfigError",
    "Document",
    "DrainIncomplete",
    "DurabilityNotReached",
    "IdempotencyConflict",
    "InvalidInput",
    "JournalCorrupt",
    "JournalError",
    "JournalFull",
    "JournalMismatch",
    "LeaseHeld",
    "LeaseLost",
    "Message",
    "NewMessage",
    "Overloaded",
    "Page",
    "PluginError",
    "PurgedSession",
    "Quarantined",
    "QuarantinedChange",
    "Runtime",
    "RuntimeClosed",
    "Session",
    "SessionExists",
    "SessionHandle",
    "SessionHeld",
    "SessionNotFound",
    "Status",
    "StorageError",
    "StorageFatal",
    "StorageUnavailable",
    "Watermarks",
    "hookimpl",
    "load_config",
    "open_runtime",
    "open_runtime_blocking",
]
