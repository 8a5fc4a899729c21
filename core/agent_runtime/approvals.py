"""Approvals: tool calls that wait for a person. Kept as documents of their session; this says what they hold.

An approval has an id of its own. Nothing asks for `call_id` to be unique: models repeat the ids of calls, within a
session as well. It is decided once: approved as it was requested, approved with other arguments, or rejected; or nobody
decides before it expires. Whoever comes later learns what was decided.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

import msgspec

from .errors import InvalidInput
from .records import Document

__all__ = ["APPROVALS", "Approval", "ApprovalStatus", "Decision", "approval_of", "as_of", "decided", "listed", "value_of"]

APPROVALS: Final = "agent_runtime.approvals"
"""The collection of these documents: written by nothing else."""

Decision: TypeAlias = Literal["approve", "edit", "reject"]
ApprovalStatus: TypeAlias = Literal["pending", "approved", "edited", "rejected", "expired"]

_OUTCOMES: Final[dict[Decision, ApprovalStatus]] = {"approve": "approved", "edit": "edited", "reject": "rejected"}


class Approval(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call that waits, or waited, for a person.

    `arguments` are those that the model asked for; `edited_arguments` those to call with instead, once the status is
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


def value_of(approval: Approval) -> dict[str, Any]:
    """The approval as the value of its document."""
    value: dict[str, Any] = msgspec.to_builtins(approval)
    return value


def approval_of(document: Document) -> Approval:
    """The approval that a document holds.

    Raises:
        InvalidInput: it holds none; `path` is a place below the document's value.
    """
    try:
        approval = msgspec.convert(document.value, Approval)
    except msgspec.ValidationError as error:
        raise InvalidInput("value", f"is no approval, which is all that {APPROVALS} can hold: {error}") from None
    if approval.approval_id != document.key:
        raise InvalidInput("value.approval_id", "must be the key of the document")
    return approval


def as_of(approval: Approval, now: datetime) -> Approval:
    """The approval as it stands now: one that nobody decided in time is expired."""
    if approval.status == "pending" and approval.expires_at is not None and approval.expires_at <= now:
        return msgspec.structs.replace(approval, status="expired")
    return approval


def decided(approval: Approval, decision: Decision, arguments: Any, reason: str | None, now: datetime) -> Approval:
    """The approval, decided now."""
    return msgspec.structs.replace(
        approval,
        status=_OUTCOMES[decision],
        edited_arguments=arguments if decision == "edit" else None,
        decision_reason=reason,
        decided_at=now,
    )


def listed(approvals: Iterable[Approval], status: ApprovalStatus | None) -> list[Approval]:
    """Those of one status (None: all), in the order in which they were requested."""
    return sorted(
        (each for each in approvals if status in (None, each.status)), key=lambda each: (each.created_at, each.approval_id)
    )
