"""A file in a page cache over a platter: what was written, what was synced, and what a power loss leaves of it."""

from __future__ import annotations

from random import Random
from typing import Final

__all__ = ["PAGE_BYTES", "PagedFile"]

PAGE_BYTES: Final = 512


class PagedFile:
    """`written` is what processes see; `platter` what a power loss leaves for certain; `dirty` what a sync will bring:
    the numbers of pages.
    """

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.written = bytearray()
        self.platter = bytearray()
        self.dirty: set[int] = set()

    def append(self, data: bytes) -> None:
        """Write behind what is there."""
        start = len(self.written)
        self.written += data
        self._touch(start, len(self.written))

    def truncate(self, size: int) -> None:
        """Cut to this size."""
        del self.written[size:]
        self.dirty = {page for page in self.dirty if page * PAGE_BYTES < size}
        self._touch(max(0, size - 1), size)

    def _touch(self, start: int, end: int) -> None:
        if start < end:
            self.dirty.update(range(start // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1))

    def page(self, number: int) -> bytes:
        """A page as it is now."""
        return bytes(self.written[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])

    def bring(self, number: int, data: bytes) -> None:
        """Bring a page, as it was when a sync began, to the platter."""
        start = number * PAGE_BYTES
        self.platter.extend(bytes(max(0, start - len(self.platter))))
        self.platter[start : start + len(data)] = data

    def bring_size(self, size: int) -> None:
        """Bring the size to the platter. Pages that no sync has brought are holes there."""
        del self.platter[size:]
        self.platter.extend(bytes(size - len(self.platter)))

    def lose_power(self, random: Random) -> None:
        """Let chance decide on what was not synced."""
        old, new = bytes(self.platter), bytes(self.written)
        if random.random() < 0.5:
            place = random.choice((0, len(new), random.randint(0, len(new))))
            kept = new if place == len(new) else new[:place] + old[place:]
        else:
            kept = _by_pages(old, new, random)
        self.written, self.platter, self.dirty = bytearray(kept), bytearray(kept), set()


def _by_pages(old: bytes, new: bytes, random: Random) -> bytes:
    """What is left of a file when each page fares by itself, and the size too."""
    size = random.choice((len(old), len(new)))
    if len(new) > len(old):
        size = random.randint(size, len(new))
    new += old[len(new) :]  # where the file may be as long as it was
    pages = []
    for start in range(0, size, PAGE_BYTES):
        end = min(start + PAGE_BYTES, size)
        pages.append(_one_of(old[start:end].ljust(end - start, b"\0"), new[start:end], random))
    return b"".join(pages)


def _one_of(old: bytes, new: bytes, random: Random) -> bytes:
    """What is left of a page. Its beginning, as far as it is the same in both, was not written over."""
    same = next((place for place, (mine, theirs) in enumerate(zip(old, new, strict=True)) if mine != theirs), len(old))
    match random.randrange(4):
        case 0:
            return old
        case 1:
            return new
        case 2:
            torn = random.randint(same, len(new))
            return new[:torn] + old[torn:]
        case _:
            return new[:same] + random.randbytes(len(new) - same)
