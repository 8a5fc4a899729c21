"""Options that several commands have, and the configuration that they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from ..config import Config
from ..sources import load_config
from .logs import configure_logging

__all__ = ["AsJson", "ConfigFile", "ServerUrl", "StorageUrl", "load"]

ConfigFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Configuration file (YAML). Variables named AGENT_RUNTIME__SECTION__KEY go over it.",
        show_default=False,
    ),
]
StorageUrl: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="Database to open instead of the configured one, such as sqlite:///data/agent_runtime.db.",
        show_default=False,
    ),
]
ServerUrl: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="Server to ask, such as http://127.0.0.1:8001. Without it the database is opened; if a server has it "
        "open, that one is asked.",
        show_default=False,
    ),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]


def load(file: Path | None, storage: str | None = None) -> Config:
    """The configuration in force, with logging as it says.

    Raises:
        ConfigError: with a line for each fault.
    """
    config = load_config(file, overrides={} if storage is None else {"storage.url": storage})
    configure_logging(config)
    return config
