"""What an archive must be to be restored, but for its messages, which have a check of their own (validation.py)."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from .approvals import APPROVALS, approval_in
from .archive import Archive
from .errors import InvalidInput
from .plans import TITLE_CHARS_MAX
from .records import AgentContext, AgentSwitch, Document
from .session import DESCRIPTION_CHARS_MAX, MEDIA_TYPE_CHARS_MAX, REASON_CHARS_MAX
from .validation import check_id, check_json, check_name, check_seq, check_text, check_time, json_object

__all__ = ["check_archive"]


def check_archive(archive: Archive) -> Archive:
    """The archive, with its times in UTC.

    Raises:
        InvalidInput: `path` is the place in the archive's line.
    """
    if archive.user_id is not None:
        check_id("user_id", archive.user_id)
    if isinstance(archive.title, str):
        check_text("title", archive.title, TITLE_CHARS_MAX)
    if archive.description is not None:
        check_text("description", archive.description, DESCRIPTION_CHARS_MAX)
    json_object("metadata", archive.metadata)
    _check_seqs(archive)
    switches = [_checked_switch(f"switches[{index}]", switch) for index, switch in enumerate(archive.switches)]
    documents = [_checked_document(f"documents[{index}]", each) for index, each in enumerate(archive.documents)]
    _refuse_doubles(documents)
    if archive.context.switch_count != len(switches):
        raise InvalidInput("context.switch_count", f"must be the number of switches, which is {len(switches)}")
    return msgspec.structs.replace(
        archive,
        created_at=check_time("created_at", archive.created_at),
        last_activity=check_time("last_activity", archive.last_activity),
        context=_checked_context(archive.context),
        switches=switches,
        documents=documents,
    )


def _check_seqs(archive: Archive) -> None:
    if archive.seqs is not None and len(archive.seqs) != len(archive.messages):
        raise InvalidInput("message_details", f"has {len(archive.seqs)} seqs for {len(archive.messages)} messages")
    last = 0
    for index, seq in enumerate(archive.seqs or ()):
        if check_seq(f"message_details[{index}].seq", seq) <= last:
            raise InvalidInput(f"message_details[{index}].seq", f"must be above {last}, the one before it")
        last = seq
    if archive.next_seq is not None and check_seq("next_seq", archive.next_seq) <= last:
        raise InvalidInput("next_seq", f"must be above {last}, the seq of the last message")


def _checked_context(context: AgentContext) -> AgentContext:
    check_name("context.current_agent", context.current_agent)
    json_object("context.metadata", context.metadata)
    return msgspec.structs.replace(
        context,
        last_switch_at=None
        if context.last_switch_at is None
        else check_time("context.last_switch_at", context.last_switch_at),
        created_at=check_time("context.created_at", context.created_at),
        updated_at=check_time("context.updated_at", context.updated_at),
    )


def _checked_switch(path: str, switch: AgentSwitch) -> AgentSwitch:
    check_name(f"{path}.from_agent", switch.from_agent)
    check_name(f"{path}.to_agent", switch.to_agent)
    if switch.reason is not None:
        check_text(f"{path}.reason", switch.reason, REASON_CHARS_MAX)
    if switch.metadata is not None:
        json_object(f"{path}.metadata", switch.metadata)
    return msgspec.structs.replace(switch, switched_at=check_time(f"{path}.switched_at", switch.switched_at))


def _checked_document(path: str, document: Document) -> Document:
    check_id(f"{path}.collection", document.collection)
    check_id(f"{path}.key", document.key)
    if document.media_type is None:
        check_json(f"{path}.value", document.value)
    else:
        check_text(f"{path}.media_type", document.media_type, MEDIA_TYPE_CHARS_MAX)
        if not isinstance(document.value, bytes):
            raise InvalidInput(f"{path}.data", f"must be bytes, not {type(document.value).__name__}")
    if document.collection == APPROVALS:
        try:
            approval_in(document)
        except InvalidInput as error:
            raise error.below(path) from None
    return msgspec.structs.replace(document, updated_at=check_time(f"{path}.updated_at", document.updated_at))


def _refuse_doubles(documents: Iterable[Document]) -> None:
    places: set[tuple[str, str]] = set()
    for index, document in enumerate(documents):
        place = document.collection, document.key
        if place in places:
            raise InvalidInput(f"documents[{index}].key", "stands in its collection already")
        places.add(place)
