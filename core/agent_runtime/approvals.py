"""Approvals: tool calls that wait for a person. Kept as documents of their session.

An approval has an id of its own. Nothing asks for `call_id` to be unique: models repeat the ids of calls, within a
session as well.

Guarantees: a request is shown only once it is stored, so nobody is asked to decide what a crash could take back. It is
decided once: approved as it was requested, approved with other arguments, or rejected; or it expires before anybody
decides. Of many who decide at once one does, and the others learn what was decided.

Whoever reads the documents themselves sees what every read sees: all that was accepted, stored or not.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal, TypeAlias, get_args

import msgspec

from .door import Door, Plan
from .errors import ApprovalDecided, ApprovalNotFound, InvalidInput
from .plans import Planner, Stale
from .reads import Reads
from .records import Document
from .residents import Resident
from .rows import DocumentRow

__all__ = [
    "APPROVALS",
    "Approval",
    "ApprovalStatus",
    "Approvals",
    "Deciding",
    "Decision",
    "approval_in",
    "check_decision",
    "check_status",
]

APPROVALS: Final = "agent_runtime.approvals"
"""The collection of their documents, each under its approval's id; nothing else stands there."""

Decision: TypeAlias = Literal["approve", "edit", "reject"]
ApprovalStatus: TypeAlias = Literal["pending", "approved", "edited", "rejected", "expired"]

_OUTCOMES: Final[dict[Decision, ApprovalStatus]] = {"approve": "approved", "edit": "edited", "reject": "rejected"}
_PAGE: Final = 1000


class Approval(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call that waits, or waited, for a person.

    `arguments` are those that the model asked for; `edited_arguments` are to be used in their place once the status is
    `edited`. `reason` says why a person is asked, `decision_reason` why it was decided so. From `expires_at` on nobody
    can decide any more.
    """

    approval_id: str
    call_id: str
    tool_name: str
    arguments: Any
    reason: str | None = None
    created_at: datetime
    expires_at: datetime | None = None
    status: ApprovalStatus = "pending"
    edited_arguments: Any = None
    decision_reason: str | None = None
    decided_at: datetime | None = None


_read: Final = msgspec.json.Decoder(Approval).decode


def approval_in(document: Document) -> Approval:
    """The approval that a document holds.

    Raises:
        InvalidInput: it holds none; `path` is a place in the document.
    """
    try:
        approval = msgspec.convert(document.value, Approval)
    except msgspec.ValidationError as error:
        raise InvalidInput("value", f"is no approval, as all in {APPROVALS} must be: {error}") from None
    if approval.approval_id != document.key:
        raise InvalidInput("value.approval_id", "must be the key of the document")
    return approval


def check_decision(decision: object) -> None:
    """What can be decided."""
    if decision not in get_args(Decision):
        raise InvalidInput("decision", f"must be one of {', '.join(map(repr, get_args(Decision)))}")


def check_status(status: object) -> None:
    """What an approval can be."""
    if status not in get_args(ApprovalStatus):
        raise InvalidInput("status", f"must be one of {', '.join(map(repr, get_args(ApprovalStatus)))}")


class Approvals:
    """The approvals of one session, for its handle."""

    def __init__(self, session_id: str, incarnation: str, door: Door, planner: Planner, reads: Reads) -> None:
        self._session_id = session_id
        self._incarnation = incarnation
        self._door = door
        self._planner = planner
        self._reads = reads

    def put(self, resident: Resident, approval: Approval) -> Plan[Approval]:
        """The approval written down."""
        text = msgspec.json.encode(approval).decode()
        document = Document(
            collection=APPROVALS, key=approval.approval_id, value=None, media_type=None, updated_at=approval.created_at
        )
        return Plan(self._planner.put_document(resident, document, text).change, approval)

    async def all(self) -> list[Approval]:
        """Those that are shown, as they stand now, oldest first by `created_at`."""
        documents: list[Document] = []
        cursor: str | None = None
        while True:
            page = await self._reads.documents(
                self._session_id, self._incarnation, APPROVALS, cursor=cursor, limit=_PAGE
            )
            documents += page.items
            cursor = page.next
            if cursor is None:
                break
        unstored = await self._unstored()
        now = self._door.now()
        approvals = [_as_of(approval_in(each), now) for each in documents if each.key not in unstored]
        return sorted(approvals, key=lambda each: (each.created_at, each.approval_id))

    async def one(self, approval_id: str) -> Approval:
        """One of them. Raises ApprovalNotFound."""
        row, _ = await self._reads.document_row(self._session_id, self._incarnation, APPROVALS, approval_id)
        if row is None or approval_id in await self._unstored():
            raise ApprovalNotFound(approval_id)
        return _as_of(_approval(row), self._door.now())

    async def row(self, approval_id: str) -> tuple[DocumentRow | None, int]:
        """What a decision stands on: the document's row, and the sequence up to which it holds."""
        return await self._reads.document_row(self._session_id, self._incarnation, APPROVALS, approval_id)

    async def _unstored(self) -> set[str]:
        """The ids of those whose request is not stored yet."""
        resident = await self._door.resident(self._session_id, self._incarnation)
        stored = self._door.log.stored  # a pending change may be stored already, and kept for another's read only
        unstored = [*resident.held, *(change for change in resident.pending if change.sequence > stored)]
        return {
            row.key
            for change in unstored
            for row in change.documents
            if row.collection == APPROVALS and _approval(row).status == "pending"
        }


class Deciding:
    """A decision under way: planned on what was read last; read again when that may have changed."""

    def __init__(
        self, approvals: Approvals, approval_id: str, decision: Decision, arguments: Any, reason: str | None
    ) -> None:
        self._approvals = approvals
        self._approval_id = approval_id
        self._decision: Decision = decision
        self._arguments = arguments
        self._reason = reason
        self._row: DocumentRow | None = None
        self._seen = -1  # nobody has looked yet

    def plan(self, resident: Resident, now: datetime) -> Plan[Approval]:
        """The decision written down. Raises Stale, ApprovalNotFound, ApprovalDecided."""
        if resident.documents_at != self._seen:
            raise Stale
        if self._row is None:
            raise ApprovalNotFound(self._approval_id)
        approval = _as_of(_approval(self._row), now)
        if approval.status != "pending":
            raise ApprovalDecided(approval)
        decided = msgspec.structs.replace(
            approval,
            status=_OUTCOMES[self._decision],
            edited_arguments=self._arguments,
            decision_reason=self._reason,
            decided_at=now,
        )
        return self._approvals.put(resident, decided)

    async def read(self) -> None:
        """Look at the approval as it is now."""
        self._row, self._seen = await self._approvals.row(self._approval_id)


def _approval(row: DocumentRow) -> Approval:
    return _read(row.value or "")


def _as_of(approval: Approval, now: datetime) -> Approval:
    """The approval as it stands now: one that nobody decided in time is expired."""
    if approval.status == "pending" and approval.expires_at is not None and approval.expires_at <= now:
        return msgspec.structs.replace(approval, status="expired")
    return approval
