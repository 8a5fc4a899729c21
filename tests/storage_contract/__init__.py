"""The contract of a storage, as tests: what `agent_runtime.storage` promises, asked of any plugin.

To use it, import the classes into a test module, register this package for assertion rewriting, and give one fixture:

- `new_opener`: makes an empty database and returns what opens it: a callable that gives a new async context manager of
  a `Storage` each time, on that same database.

Every test runs on the event loops that the fixture `anyio_backend` names.
"""

from .batches import BatchContract
from .cancellation import CancellationContract
from .closing import ClosingContract
from .leases import LeaseContract
from .purging import PurgeContract
from .reads import ReadContract
from .sequences import SequenceContract
from .snapshots import SnapshotContract
from .values import ValueContract

__all__ = [
    "BatchContract",
    "CancellationContract",
    "ClosingContract",
    "LeaseContract",
    "PurgeContract",
    "ReadContract",
    "SequenceContract",
    "SnapshotContract",
    "ValueContract",
]
