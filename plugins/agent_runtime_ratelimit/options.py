"""What the rate limit is told in `plugins.config.ratelimit`."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from agent_runtime import ConfigError
from agent_runtime.config import did_you_mean

__all__ = ["Options", "read_options"]

_PLACE: Final = "plugins.config.ratelimit"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`requests_per_s` of each client in the long run, `burst` of them at once; `clients_max` are known at a time."""

    requests_per_s: Annotated[float, Meta(gt=0, le=1e6)]
    burst: Annotated[int, Meta(ge=1, le=1_000_000)] = 50
    clients_max: Annotated[int, Meta(ge=1)] = 10_000


def read_options(given: object) -> Options:
    """The options, out of the configuration.

    Raises:
        ConfigError: with the key that is wrong.
    """
    if isinstance(given, dict):
        known = Options.__struct_fields__
        if unknown := [name for name in given if name not in known]:
            raise ConfigError([f"{_PLACE}.{name}: unknown key{did_you_mean(str(name), known)}" for name in unknown])
    try:
        return msgspec.convert(given, Options)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        raise ConfigError([f"{_PLACE}{place.rstrip('`')}: {problem[:1].lower()}{problem[1:]}"]) from None
