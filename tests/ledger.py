"""What was acknowledged, told by the log itself: the changes of every session in order, and which of them must be there.

After a process has died the sessions are found again as they are now. Each must stand at one of its own changes, whole;
all later ones of it are lost then, and that none of those was promised to survive is checked. What the session shows
must be what its changes say, up to that one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from agent_runtime import AgentContext, AgentSwitch, Message, Session, SessionHandle
from agent_runtime.changes import Change, decode_change
from agent_runtime.reads import document_record
from agent_runtime.rows import DocumentRow, SwitchRow

__all__ = ["Broken", "Ledger"]


class Broken(AssertionError):
    """A promise was not kept."""


class Ledger:
    """Everything that stands. `must_have`: each change up to this sequence has to survive what happened."""

    def __init__(self) -> None:
        self.must_have = math.inf
        self.accepted = 0
        self.lost = 0
        self._chains: dict[str, list[Change]] = {}
        self._sequences: set[int] = set()
        self._last = 0
        self._outcomes: dict[tuple[str, str], Change] = {}
        self._refused: dict[tuple[str, int], tuple[Change, bool]] = {}

    def accept(self, frames: Sequence[tuple[int, bytes]]) -> list[Change]:
        """The log has taken these changes."""
        changes = [decode_change(data) for _, data in frames]
        for (sequence, _), change in zip(frames, changes, strict=True):
            if change.sequence != sequence:
                raise Broken(f"change {change.sequence} was given the sequence {sequence}")
            if sequence <= self._last:
                raise Broken(f"the sequence {sequence} is used again, or out of order")
            self._last = sequence
            self._sequences.add(sequence)
            self.accepted += 1
            if not change.void:
                self._add(change)
        return changes

    def _add(self, change: Change) -> None:
        chain = self._chains.setdefault(change.incarnation, [])
        last = chain[-1].sequence if chain else 0
        if change.previous != last:
            raise Broken(f"change {change.sequence} follows {change.previous} of its session, the last was {last}")
        chain.append(change)
        if change.outcome is not None:
            key = change.outcome.scope, change.outcome.key
            if key in self._outcomes:
                raise Broken(f"changes {self._outcomes[key].sequence} and {change.sequence} are of one keyed call")
            self._outcomes[key] = change

    def refuse(self, frames: Sequence[tuple[int, bytes]], *, used_up: bool) -> None:
        """The log could not take these changes, and said so; their sequences may be `used_up` by that."""
        for sequence, data in frames:
            change = decode_change(data)
            self._refused[change.incarnation, sequence] = change, used_up

    def require(self, sequence: int) -> None:
        """Something happened that everything up to this sequence has to survive."""
        self.must_have = min(self.must_have, sequence)

    def settle(self, found: Mapping[str, int], end: int, *, power_lost: bool) -> None:
        """A process has opened everything again: incarnations, and the sequence of the change at which each stands.

        What lies behind `end` is lost: the log goes on from there. A refused change may be there after all, if nothing
        behind it had to survive: the disk took it and would not give it back, and what says that it is void is lost
        with the power, or could not be written any more.
        """
        for place in found.items():
            change, used_up = self._refused.get(place, (None, False))
            if change is not None and (used_up or power_lost) and change.sequence > self.must_have:
                self._revive(change)
        self._refused.clear()
        for incarnation in found.keys() - self._chains.keys():
            raise Broken(f"nobody created the session with the incarnation {incarnation}, or it was lost before")
        for incarnation, chain in list(self._chains.items()):
            sequence = found.get(incarnation)
            if sequence is None:
                sequence = end if chain[-1].deleted and chain[-1].sequence <= end else 0  # gone is gone
            elif sequence > end:
                raise Broken(f"a session stands at {sequence}, the log is to go on from {end}")
            elif all(change.sequence != sequence for change in chain):
                raise Broken(f"a session stands at {sequence}, its changes are {[each.sequence for each in chain]}")
            kept = [change for change in chain if change.sequence <= sequence]
            self._lose(chain[len(kept) :])
            if kept:
                self._chains[incarnation] = kept
            else:
                del self._chains[incarnation]
        self.must_have = math.inf
        self._sequences = {sequence for sequence in self._sequences if sequence <= end}
        self._last = max(self._sequences, default=0)

    def _revive(self, change: Change) -> None:
        if change.sequence in self._sequences:
            return
        chain = self._chains.setdefault(change.incarnation, [])
        kept = [each for each in chain if each.sequence <= change.previous]
        self._lose(chain[len(kept) :])
        self._chains[change.incarnation] = [*kept, change]
        self._sequences.add(change.sequence)
        if change.outcome is not None:
            self._outcomes[change.outcome.scope, change.outcome.key] = change

    def _lose(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if change.sequence <= self.must_have:
                raise Broken(
                    f"change {change.sequence} of session {change.session_id} is lost, "
                    f"everything up to {self.must_have} was to survive"
                )
            self.lost += 1
            self._sequences.discard(change.sequence)
            if change.outcome is not None:
                del self._outcomes[change.outcome.scope, change.outcome.key]

    def outcome(self, scope: str, key: str) -> Change | None:
        """The change of a keyed call; None: it has none that stands."""
        return self._outcomes.get((scope, key))

    @property
    def sessions(self) -> dict[str, str]:
        """The incarnation of each session that is not deleted."""
        return {
            chain[-1].session_id: incarnation for incarnation, chain in self._chains.items() if not chain[-1].deleted
        }

    async def compare(self, handle: SessionHandle, next_seq: int) -> None:
        """Whether a session shows what its changes say."""
        expected = _Expected(self._chains[handle.incarnation])
        got: dict[str, Any] = {
            "next_seq": next_seq,
            "record": await handle.record(),
            "context": await handle.context(),
            "switches": await handle.switches(),
            "messages": [message async for message in handle.scan_messages()],
        }
        documents = got["documents"] = {}
        for collection in {collection for collection, _ in expected.documents}:
            page = await handle.list_documents(collection, limit=1000)
            documents.update({(each.collection, each.key): each for each in page.items})
        for name, value in got.items():
            wanted = getattr(expected, name)
            if value != wanted:
                raise Broken(f"the {name} of session {handle.session_id}: {_difference(value, wanted)}")


def _difference(got: Any, wanted: Any) -> str:
    if isinstance(got, list):
        surplus, missing = [each for each in got if each not in wanted], [each for each in wanted if each not in got]
        return f"{str(surplus)[:500]} should not be there, {str(missing)[:500]} should"
    return f"it is {str(got)[:500]}, by its changes {str(wanted)[:500]}"


class _Expected:
    """A session, put together from its changes."""

    def __init__(self, chain: Sequence[Change]) -> None:
        messages: dict[int, Message] = {}
        documents: dict[tuple[str, str], DocumentRow] = {}
        switches: list[SwitchRow] = []
        birth, details, context = chain[0].birth, chain[0].details, chain[0].context
        for change in chain:
            details = change.details or details
            context = change.context or context
            floor = change.floor or 0
            messages = {seq: each for seq, each in messages.items() if seq > floor and seq not in change.removed}
            for raw in change.messages:
                message = msgspec.json.decode(raw, type=Message)
                messages[message.seq] = message
            switches += change.switches
            documents.update({(row.collection, row.key): row for row in change.documents})
            for key in change.discarded:
                documents.pop(key, None)
        if birth is None or details is None or context is None:
            raise Broken(f"the first change of session {chain[0].session_id} does not create it")
        last = chain[-1]
        self.next_seq = last.next_seq
        self.messages = [messages[seq] for seq in sorted(messages)]
        self.switches = [_switch(row) for row in switches]
        self.documents = {key: document_record(row) for key, row in documents.items()}
        self.record = Session(
            session_id=last.session_id,
            user_id=birth.user_id,
            title=details.title,
            description=details.description,
            metadata=msgspec.json.decode(details.metadata),
            created_at=birth.created_at,
            last_activity=last.last_activity,
            message_count=len(messages),
            incarnation=last.incarnation,
        )
        self.context = AgentContext(
            session_id=last.session_id,
            current_agent=context.current_agent,
            switch_count=context.switch_count,
            last_switch_at=context.last_switch_at,
            metadata=msgspec.json.decode(context.metadata),
            created_at=context.created_at,
            updated_at=context.updated_at,
        )


def _switch(row: SwitchRow) -> AgentSwitch:
    return AgentSwitch(
        from_agent=row.from_agent,
        to_agent=row.to_agent,
        reason=row.reason,
        switched_at=row.switched_at,
        metadata=None if row.metadata is None else msgspec.json.decode(row.metadata),
    )
