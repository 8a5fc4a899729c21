"""The contract of a storage, as tests: what `agent_runtime.storage` promises, asked of any plugin.

To use it, subclass the classes in a test module under names that begin with `Test`, and give them one fixture:

- `new_opener`: makes an empty database and returns what opens it: a callable that gives a new async context manager of
  a `Storage` each time, on that same database.

Every test runs on the event loops that the fixture `anyio_backend` names.
"""

# ruff: noqa: E402 — pytest must know of the modules with asserts before they are imported

import pytest

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in (
            "batches",
            "cancellation",
            "closing",
            "dump",
            "leases",
            "purging",
            "reads",
            "sequences",
            "snapshots",
            "values",
        )
    )
)

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
