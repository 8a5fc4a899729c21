"""Calls on sessions in plain dicts: the model that storages, and the coalescing of changes, are compared with.

A world performs random calls, states each as the `Change` that the runtime would make of it, and tells what a storage
that was given all changes so far must show. It knows nothing of batches.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from agent_runtime.changes import Birth, Change, Details
from agent_runtime.records import Message
from agent_runtime.rows import ContextRow, DocumentRow, MessageRow, OutcomeRow, SwitchRow

from .dump import COLLECTIONS, Dump, SessionDump
from .writer import DAY, NOON, session_row

KINDS = ("append", "append", "append", "pop", "clear", "switch", "put", "put", "discard", "edit", "delete")


class Call(NamedTuple):
    """A call on the session with the number `session`, which is created if it is not there."""

    kind: str
    session: int
    text: str
    size: int
    document: tuple[str, str]
    keyed: bool


def calls() -> st.SearchStrategy[list[Call]]:
    """Random calls, on few sessions and few documents, so that they meet."""
    call = st.builds(
        Call,
        kind=st.sampled_from(KINDS),
        session=st.sampled_from([0, 0, 0, 1, 2]),
        text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4),
        size=st.integers(1, 4),
        document=st.tuples(st.sampled_from(COLLECTIONS), st.sampled_from(["1", "2", "é"])),
        keyed=st.booleans(),
    )
    return st.lists(call, min_size=1, max_size=8) | st.lists(call, min_size=8, max_size=30)


class _Session:
    def __init__(self, session_id: str, incarnation: str, now: datetime) -> None:
        self.session_id = session_id
        self.incarnation = incarnation
        self.created_at = now
        self.last_activity = now
        self.details = Details(None, None, "{}")
        self.context = ContextRow(
            incarnation=incarnation,
            current_agent="orchestrator",
            switch_count=0,
            last_switch_at=None,
            metadata="{}",
            created_at=now,
            updated_at=now,
        )
        self.messages: dict[int, MessageRow] = {}
        self.next_seq = 1
        self.floor = 0
        self.sequence = 0
        self.switches: list[SwitchRow] = []
        self.documents: dict[tuple[str, str], DocumentRow] = {}
        self.outcomes: dict[str, OutcomeRow] = {}


class World:
    """What was called so far."""

    def __init__(self) -> None:
        self.sequence = 0
        self._sessions: dict[int, _Session] = {}

    def perform(self, call: Call) -> Change:
        """Perform a call and state its effect."""
        self.sequence += 1
        now = NOON + timedelta(seconds=self.sequence // 3)
        session = self._sessions.get(call.session)
        parts: dict[str, Any] = {}
        if session is None:
            incarnation = f"{self.sequence * 7919 % 10007:05}"  # unique, in no order
            session = self._sessions[call.session] = _Session(f"session {call.session}", incarnation, now)
            parts = {"birth": Birth(now), "details": session.details, "context": session.context}
        parts |= getattr(self, f"_{call.kind}")(session, call, now)
        if call.keyed:
            parts["outcome"] = outcome = OutcomeRow(
                scope=session.incarnation,
                key=call.document[1],
                route=call.kind,
                body_hash="0" * 64,
                outcome=msgspec.json.encode(call.text).decode(),
                sequence=self.sequence,
                expires_at=datetime.now(UTC) + DAY,
            )
            session.outcomes[outcome.key] = outcome
        previous, session.sequence = session.sequence, self.sequence
        session.last_activity = now
        if call.kind == "delete":
            del self._sessions[call.session]
        return Change(
            sequence=self.sequence,
            previous=previous,
            session_id=session.session_id,
            incarnation=session.incarnation,
            last_activity=now,
            message_count=len(session.messages),
            next_seq=session.next_seq,
            **parts,
        )

    def dump(self) -> Dump:
        """What a storage must show."""
        ordered = sorted(self._sessions.values(), key=lambda session: (session.created_at, session.incarnation))
        return Dump(
            watermark=self.sequence,
            sessions=[
                SessionDump(
                    session=session_row(
                        session.incarnation,
                        session_id=session.session_id,
                        title=session.details.title,
                        description=session.details.description,
                        metadata=session.details.metadata,
                        created_at=session.created_at,
                        last_activity=session.last_activity,
                        message_count=len(session.messages),
                        next_seq=session.next_seq,
                        floor=session.floor,
                        sequence=session.sequence,
                    ),
                    context=session.context,
                    outcomes=sorted(session.outcomes.values(), key=lambda outcome: -outcome.sequence),
                    messages=[session.messages[seq] for seq in sorted(session.messages)],
                    switches=session.switches,
                    documents=[session.documents[place] for place in sorted(session.documents)],
                )
                for session in ordered
            ],
            quarantine=[],
        )

    def _append(self, session: _Session, call: Call, now: datetime) -> dict[str, Any]:
        encoded: list[Raw] = []
        for _ in range(call.size):
            seq = session.next_seq
            message = Message(seq=seq, id=f"m{seq}", role="user", content=call.text, created_at=now)
            encoded.append(Raw(msgspec.json.encode(message)))
            unset = dict.fromkeys(("parts", "name", "tool_calls", "tool_call_id", "token_count", "metadata", "extra"))
            session.messages[seq] = MessageRow(
                incarnation=session.incarnation,
                seq=seq,
                id=message.id,
                role="user",
                content=call.text,
                created_at=now,
                **unset,
            )
            session.next_seq += 1
        return {"messages": tuple(encoded)}

    def _pop(self, session: _Session, _call: Call, _now: datetime) -> dict[str, Any]:
        removed = sorted(session.messages)[-1:]
        for seq in removed:
            del session.messages[seq]
        return {"removed": tuple(removed)}

    def _clear(self, session: _Session, _call: Call, _now: datetime) -> dict[str, Any]:
        session.messages.clear()
        session.floor = session.next_seq - 1
        return {"floor": session.floor}

    def _switch(self, session: _Session, call: Call, now: datetime) -> dict[str, Any]:
        switch = SwitchRow(
            incarnation=session.incarnation,
            number=len(session.switches) + 1,
            from_agent=session.context.current_agent,
            to_agent=f"agent {call.text}",
            reason=call.text,
            switched_at=now,
            metadata=None,
        )
        session.switches.append(switch)
        session.context = replace(
            session.context,
            current_agent=switch.to_agent,
            switch_count=switch.number,
            last_switch_at=now,
            updated_at=now,
        )
        return {"context": session.context, "switches": (switch,)}

    def _put(self, session: _Session, call: Call, now: datetime) -> dict[str, Any]:
        collection, key = call.document
        document = DocumentRow(
            incarnation=session.incarnation,
            collection=collection,
            key=key,
            value=None,
            data=call.text.encode(),
            media_type="text/plain",
            updated_at=now,
        )
        session.documents[call.document] = document
        return {"documents": (document,)}

    def _discard(self, session: _Session, call: Call, _now: datetime) -> dict[str, Any]:
        session.documents.pop(call.document, None)
        return {"discarded": (call.document,)}

    def _edit(self, session: _Session, call: Call, _now: datetime) -> dict[str, Any]:
        session.details = Details(call.text, None, '{"edited": 1e2}')
        return {"details": session.details}

    def _delete(self, _session: _Session, _call: Call, _now: datetime) -> dict[str, Any]:
        return {"deleted": True}
