"""Tables of rows in plain dicts, consistent views of them, and transactions over them.

Views and transactions are the same thing: an overlay of rows, over the tables as they are now. A transaction's overlay
holds what it will write. A view's overlay holds what was there before: whoever commits first hands each row that it
replaces to the views that are open. So a view costs nothing to open, however much is stored, and only the rows that
change while it is open; and nothing of a transaction shows, in the tables or in a view, until it is committed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any, Generic, TypeAlias, TypeVar

__all__ = ["Key", "Table", "Transaction", "View"]

Key: TypeAlias = tuple[Any, ...]
"""The identity of a row. Keys with the same first part form a group."""

Row = TypeVar("Row")


class Table(Generic[Row]):
    """Rows by key; the keys of each group are kept in order."""

    def __init__(self) -> None:
        self._rows: dict[Key, Row] = {}
        self._groups: dict[Any, list[Key]] = {}

    def get(self, key: Key) -> Row | None:
        """The row; None when there is none."""
        return self._rows.get(key)

    def set(self, key: Key, row: Row | None) -> None:
        """Insert or replace a row; None deletes it."""
        if row is not None:
            if key not in self._rows:
                insort(self._groups.setdefault(key[0], []), key)
            self._rows[key] = row
        elif key in self._rows:
            del self._rows[key]
            keys = self._groups[key[0]]
            del keys[bisect_left(keys, key)]
            if not keys:
                del self._groups[key[0]]

    def keys(self, group: Any, after: Key | None, before: Key | None, backwards: bool) -> Iterator[Key]:
        """The keys of a group between two keys, both excluded, in order."""
        keys = self._groups.get(group, [])
        first = 0 if after is None else bisect_right(keys, after)
        end = len(keys) if before is None else bisect_left(keys, before)
        places = range(end - 1, first - 1, -1) if backwards else range(first, end)
        return (keys[place] for place in places)


class View:
    """The tables as they were when the view was made, as long as every commit is told of it."""

    def __init__(self) -> None:
        self._overlay: defaultdict[Table[Any], dict[Key, Any]] = defaultdict(dict)

    def get(self, table: Table[Row], key: Key) -> Row | None:
        """The row; None when there is none."""
        overlay = self._overlay.get(table)
        if overlay is not None and key in overlay:
            row: Row | None = overlay[key]
            return row
        return table.get(key)

    def scan(
        self,
        table: Table[Row],
        group: Any,
        *,
        after: Key | None = None,
        before: Key | None = None,
        backwards: bool = False,
    ) -> Iterator[tuple[Key, Row]]:
        """The rows of a group between two keys, both excluded, in order.

        To be used up before anything is committed.
        """
        keys = table.keys(group, after, before, backwards)
        overlaid = sorted(
            (
                key
                for key, row in self._overlay.get(table, {}).items()
                if row is not None
                and table.get(key) is None
                and key[0] == group
                and (after is None or key > after)
                and (before is None or key < before)
            ),
            reverse=backwards,
        )
        for key in heapq.merge(keys, overlaid, reverse=backwards) if overlaid else keys:
            row = self.get(table, key)
            if row is not None:
                yield key, row

    def keep(self, table: Table[Any], key: Key) -> None:
        """The row is about to change: keep it as it is, unless it was kept before."""
        self._overlay[table].setdefault(key, table.get(key))


class Transaction(View):
    """Rows to be written, all at once or not at all. It reads what it has written."""

    def put(self, table: Table[Row], key: Key, row: Row) -> None:
        """Insert or replace a row."""
        self._overlay[table][key] = row

    def delete(self, table: Table[Any], key: Key) -> None:
        """Delete a row, if it is there."""
        self._overlay[table][key] = None

    def commit(self, views: Collection[View]) -> None:
        """Write everything; the open `views` keep what is replaced."""
        for table, rows in self._overlay.items():
            for key, row in rows.items():
                for view in views:
                    view.keep(table, key)
                table.set(key, row)
