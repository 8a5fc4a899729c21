"""The contract of a storage as tests: everything that `agent_runtime.storage` promises, asked of any plugin.

    class TestMyStorage(StorageKit):
        @pytest.fixture
        def new_storage(self, tmp_path: Path) -> NewStorage:
            numbers = itertools.count()

            def new() -> Opener:
                config = StorageConfig(url=f"mine:{tmp_path}/{next(numbers)}")
                return lambda: open_mine(config)

            return new

`new_storage` gives a callable that makes a new, empty database each time, and returns what opens it. Every test runs on
asyncio and on trio. Nothing is skipped: what a storage may lack is named in `lacks` of the class, and what needs it is
not collected; a test of the kit that is skipped all the same has failed.

It needs the extra `agent-runtime[kit]`: pytest, hypothesis and trio.
"""

# ruff: noqa: E402 — pytest must know of the modules with asserts before they are imported

import pytest

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in (
            "abilities",
            "batches",
            "cancellation",
            "closing",
            "dump",
            "leases",
            "opening",
            "purging",
            "reads",
            "runtimes",
            "sequences",
            "snapshots",
            "speed",
            "values",
        )
    )
)

from .abilities import AbilityContract
from .batches import BatchContract
from .cancellation import CancellationContract
from .closing import ClosingContract
from .contract import NewStorage, Opener, OptionalAbility
from .leases import LeaseContract
from .opening import OpeningContract
from .purging import PurgeContract
from .reads import ReadContract
from .runtimes import RuntimeContract
from .sequences import SequenceContract
from .snapshots import SnapshotContract
from .speed import SpeedContract
from .values import ValueContract

__all__ = ["NewStorage", "Opener", "OptionalAbility", "StorageKit"]


class StorageKit(
    AbilityContract,
    BatchContract,
    CancellationContract,
    ClosingContract,
    LeaseContract,
    OpeningContract,
    PurgeContract,
    ReadContract,
    RuntimeContract,
    SequenceContract,
    SnapshotContract,
    SpeedContract,
    ValueContract,
):
    """All of it. Inherit, and give the fixture `new_storage`."""
