"""What every group of tests stands on: the fixture of the author, both event loops, and nothing left out unsaid.

A test is left out in one way only: the class names in `lacks` an ability that is optional, and the tests that need it
are not collected. A test of the kit that is skipped, expected to fail or replaced by another one is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, Final, Literal, TypeAlias, TypeVar, get_args

import pytest
from hypothesis import HealthCheck

from agent_runtime.storage import Storage

__all__ = ["SHARED", "NewStorage", "Opener", "OptionalAbility", "StorageContract", "needs"]

Opener: TypeAlias = Callable[[], AbstractAsyncContextManager[Storage]]
"""Opens one database; called again it opens the same one, perhaps while it is open."""

NewStorage: TypeAlias = Callable[[], Opener]
"""Makes a new, empty database: what opens it."""

OptionalAbility: TypeAlias = Literal["openings", "reopening"]
"""What a storage may lack: to be open several times at once, as with a file that its engine locks; to keep anything
once it is closed, as with one whose `Abilities.survives` is "nothing"."""

SHARED: Final = (HealthCheck.function_scoped_fixture, HealthCheck.differing_executors)
"""What hypothesis finds odd: each example makes a database of its own, and several storages inherit one test."""

_NEEDS: Final = "agent_runtime_kit_needs"
_Test = TypeVar("_Test", bound=Callable[..., object])


def needs(ability: OptionalAbility) -> Callable[[_Test], _Test]:
    """Marks a test that is left out where the ability is lacking."""

    def mark(test: _Test) -> _Test:
        setattr(test, _NEEDS, ability)
        return test

    return mark


@pytest.mark.anyio
class StorageContract:
    """A group of tests. Each gets a new, empty database, and runs on asyncio and on trio."""

    lacks: ClassVar[Collection[OptionalAbility]] = ()
    """The optional abilities that the storage does not have."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for ability in cls.lacks:
            if ability not in get_args(OptionalAbility):
                optional = ", ".join(get_args(OptionalAbility))
                raise TypeError(f"{cls.__name__}.lacks: {ability!r} is not an optional ability; those are: {optional}")
        for name in vars(cls):
            if name.startswith("test_") and any(hasattr(base, name) for base in cls.__bases__):
                raise TypeError(f"{cls.__name__}.{name} replaces a test of the kit; name what is missing in `lacks`")
        for name, test in inspect.getmembers(cls, inspect.isfunction):
            if getattr(test, _NEEDS, None) in cls.lacks:
                setattr(cls, name, None)

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        """The event loop."""
        return str(request.param)

    @pytest.fixture
    def new_storage(self) -> NewStorage:
        """What the author gives."""
        raise NotImplementedError(f"{type(self).__name__} has no fixture `new_storage`, which gives a NewStorage")

    @pytest.fixture
    def untouched_storage(self, new_storage: NewStorage) -> NewStorage:
        """As `new_storage`, of databases that were never opened: for authors who speed the other one up with copies."""
        return new_storage

    @pytest.fixture
    def opener(self, new_storage: NewStorage) -> Opener:
        """Opens a new database."""
        return new_storage()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Called by pytest when it collects the class: from then on no test of the kit is skipped unseen."""
        plugins = metafunc.config.pluginmanager
        if not plugins.has_plugin(_NoSkips.__name__):
            plugins.register(_NoSkips(), _NoSkips.__name__)


class _NoSkips:
    """A plugin of pytest: a test of the kit that is skipped, or expected to fail, has failed."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        kit = isinstance(item, pytest.Function) and item.cls is not None and issubclass(item.cls, StorageContract)
        if kit and (report.skipped or hasattr(report, "wasxfail")):
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} was skipped or expected to fail: a storage passes all of the kit. What it may lack "
                f"is named in `lacks` of the class: {', '.join(get_args(OptionalAbility))}"
            )
            vars(report).pop("wasxfail", None)
        return report
