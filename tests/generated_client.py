"""A conversation through the client that openapi-python-client made, for test_http_openapi.py, which makes it.

python tests/generated_client.py http://127.0.0.1:8001    # with `runtime_client` on the path
"""

from __future__ import annotations

import sys
from importlib import import_module
from io import BytesIO
from typing import Any

models: Any = import_module("runtime_client.models")
types: Any = import_module("runtime_client.types")


def call(client: Any, tag: str, name: str, *arguments: Any, status: int = 200, **options: Any) -> Any:
    """Call an operation; what it answers, decoded into its model."""
    operation = import_module(f"runtime_client.api.{tag}.{name}")
    response = operation.sync_detailed(*arguments, client=client, **options)
    assert int(response.status_code) == status, response
    return response.parsed


def conversation(client: Any) -> None:
    """Everything that a conversation needs, and that it is as it should be."""
    given = models.NewSessionWithId.from_dict({"session_id": "s 1", "user_id": "ada", "metadata": {"a": [1, 2.5]}})
    session = call(client, "sessions", "create_session", body=given, status=201)
    assert (session.session_id, session.user_id, session.metadata.to_dict()) == ("s 1", "ada", {"a": [1, 2.5]})
    refused = call(client, "sessions", "create_session", body=given, status=409)
    assert refused.type_ == "urn:agent-runtime:problem:session-exists"

    question = models.NewChatMessage(role=models.NewChatMessageRole.USER, content="A train to Porto?")
    level = models.Durability.STORED
    sent = [
        call(
            client,
            "messages",
            "append_message",
            "s 1",
            body=question,
            durability=level,
            idempotency_key="k1",
            status=201,
        )
        for _ in range(2)
    ]
    assert [message.seq for message in sent] == [1, 1]
    calls = [{"id": "c1", "type": "function", "function": {"name": "trains", "arguments": "{}"}}]
    batch = {"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]}
    call(client, "messages", "append_messages", "s 1", body=models.NewMessages.from_dict(batch), status=201)
    result = models.ToolResult(call_id="c1", tool_name="trains", result={"departs": "09:30"})
    assert (
        call(client, "messages", "append_tool_result", "s 1", body=result, status=201).content == '{"departs":"09:30"}'
    )
    for content in ("At 09:30.", "No, at 10:30."):
        answer = models.NewChatMessage(role=models.NewChatMessageRole.ASSISTANT, content=content)
        call(client, "messages", "append_message", "s 1", body=answer, status=201)
    assert call(client, "messages", "pop_message", "s 1").content == "No, at 10:30."
    history = call(client, "messages", "get_history", "s 1")
    sys.stdout.writelines(f"{message.role.value}\n" for message in history.messages)
    page = call(client, "messages", "list_messages", "s 1", limit=2, order=models.Order.DESC)
    assert [message.seq for message in page.items] == [4, 3]
    assert page.next_ == 3

    handed = call(client, "agents", "switch_agent", "s 1", body=models.AgentHandOver(agent="booking", reason="chosen"))
    assert (handed.current_agent, handed.switch_count) == ("booking", 1)
    assert [each.to for each in call(client, "agents", "get_context", "s 1").agent_history] == ["booking"]

    state = models.PutDocumentJsonBody.from_dict({"state": "approved"})
    assert call(client, "documents", "put_document", "s 1", "plans", "p1", body=state).key == "p1"
    assert call(client, "documents", "get_document", "s 1", "plans", "p1") == {"state": "approved"}
    ticket = types.File(payload=BytesIO(b"\x89PNG"), file_name="ticket.png", mime_type="image/png")
    assert (
        call(client, "documents", "put_document", "s 1", "plans", "p2", body=ticket).media_type
        == "application/octet-stream"
    )
    assert [each.key for each in call(client, "documents", "list_documents", "s 1", "plans").items] == ["p1", "p2"]
    call(client, "documents", "delete_document", "s 1", "plans", "p2", status=204)

    assert call(client, "health", "flush").watermarks.stored > 0
    assert call(client, "health", "get_status").pending.changes == 0
    call(client, "sessions", "delete_session", "s 1", status=204)
    assert call(client, "sessions", "get_session", "s 1", status=404).title == "There is no such session"


if __name__ == "__main__":
    with import_module("runtime_client").Client(base_url=sys.argv[1], raise_on_unexpected_status=True) as opened:
        conversation(opened)
