"""The old codelab agent-runtime service's users: its data, its HTTP API and its calls, on the new runtime.

Importing it is cheap, since whoever opens a runtime does: what it stands on comes with the first use.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent_runtime import hookimpl
from agent_runtime.formats import ImportFormat


@hookimpl
def agent_runtime_import_formats() -> Mapping[str, ImportFormat]:
    """`agent-runtime import --format codelab URL`: the databases of the old service."""
    from .source import open_source

    return {"codelab": open_source}
