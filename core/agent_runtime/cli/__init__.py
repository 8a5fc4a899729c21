"""The command `agent-runtime`, also as `python -m agent_runtime.cli`. Plugins add commands to it."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
