"""What a batch costs, side by side: a few calls a batch, whatever is in it and whatever is there already.

Each figure is the best of several tries, and the bounds are far from what a sound storage shows: it is a call a row, or
a history that is read to be written, that does not pass.
"""

from __future__ import annotations

from time import perf_counter

from .contract import Opener, StorageContract
from .writer import Writer, message_row, writing

TRIES = 5
ROWS = 1000


async def best_s(writer: Writer, incarnation: str, after: int, rows: int) -> float:
    """The shortest time of a batch of messages, in seconds."""
    times = []
    for number in range(TRIES):
        first = after + 1 + number * rows
        batch = writer.batch(
            touched=(writer.touch(incarnation, message_count=first + rows - 1, next_seq=first + rows),),
            messages=tuple(message_row(incarnation, seq) for seq in range(first, first + rows)),
        )
        start = perf_counter()
        await writer.storage.apply(batch, writer.fence)
        times.append(perf_counter() - start)
        writer.sequence = batch.last
    return min(times)


class SpeedContract(StorageContract):
    """No call a row."""

    async def test_a_row_more_is_not_a_batch_more(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a")
            one = await best_s(writer, "a", 0, 1)
            many = await best_s(writer, "a", TRIES, ROWS)
            assert many < one * ROWS / 2, f"{ROWS} rows take {many / one:.0f} times as long as one"

    async def test_what_is_there_already_costs_nothing(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a")
            early = await best_s(writer, "a", 0, 1)
            await best_s(writer, "a", TRIES, ROWS)
            late = await best_s(writer, "a", TRIES * (1 + ROWS), 1)
            assert late < early * 50, f"behind {TRIES * ROWS} messages a batch takes {late / early:.0f} times as long"
