"""A storage is what it declares to be."""

from __future__ import annotations

from pathlib import Path

from .contract import NewStorage, Opener, StorageContract, needs
from .dump import dump
from .writer import Writer, claim, writing


class AbilityContract(StorageContract):
    """It is what it declares."""

    async def test_what_it_declares_does_not_change(self, opener: Opener) -> None:
        async with opener() as storage:
            declared = storage.abilities
            assert declared.survives in {"nothing", "power", "machine"}
            await Writer(storage, await storage.leases.acquire(claim())).create("a")
            assert storage.abilities == declared
        async with opener() as storage:
            assert storage.abilities == declared

    async def test_what_keeps_nothing_says_so(self, opener: Opener) -> None:
        async with opener() as storage:
            assert storage.abilities.survives == "nothing" or "reopening" not in self.lacks

    @needs("openings")
    async def test_what_is_stored_is_there_for_all_at_once(self, opener: Opener) -> None:
        """Nothing waits in the process until it closes: that would survive no loss of power."""
        async with writing(opener) as writer, opener() as another:
            for incarnation in "abc":
                await writer.create(incarnation, messages=2)
                assert await dump(another) == await dump(writer.storage)
                async with opener() as late:
                    assert await dump(late) == await dump(writer.storage)

    async def test_the_journal_lies_beside_a_database_that_is_a_file(self, new_storage: NewStorage) -> None:
        places: list[Path] = []
        for opener in (new_storage(), new_storage()):
            async with opener() as storage:
                place = storage.abilities.journal_directory
            if place is not None:
                assert storage.abilities.survives != "nothing"
                places.append(Path(place))
        assert all(place.parent.is_dir() and not place.exists() for place in places), "the runtime makes it"
        assert len(set(places)) == len(places), "two databases must not have one journal"
