"""`python -m agent_runtime.cli`."""

from __future__ import annotations

from . import main

main()
