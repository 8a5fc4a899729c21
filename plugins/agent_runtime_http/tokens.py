"""Bearer tokens (RFC 6750): who sends one of those that are configured is let in, and may do everything.

Only SHA-256 hashes of tokens are held. Whatever is sent is hashed and compared with each of them, to the last, so that
the time this takes tells nothing. No message and no log line repeats a token, or a line of the file.
"""

from __future__ import annotations

import logging
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Final

from starlette.types import Scope

from agent_runtime import ConfigError
from agent_runtime.config import HttpSection, token_digest

from .problems import Unauthenticated

__all__ = ["Tokens", "refusal"]

logger: Final = logging.getLogger("agent_runtime.http")


class Tokens:
    """The tokens of a configuration: its own, and those of its file.

    Raises:
        ConfigError: the file can't be read, has a line that is no token, or no token at all.
    """

    def __init__(self, http: HttpSection) -> None:
        self._own = http.tokens
        self._file: Final = None if http.tokens_file is None else Path(http.tokens_file)
        self._digests = (*self._own, *self._read())

    def __bool__(self) -> bool:
        """Whether a token is asked for."""
        return bool(self._digests)

    def reload(self) -> None:
        """Read the file again. One that can't be used leaves the tokens as they are, and a line in the log."""
        try:
            read = self._read()
        except ConfigError as error:
            logger.error("%s; the tokens stay as they were", error)
            return
        self._digests = (*self._own, *read)
        logger.info("read %d token(s) from %s again", len(read), self._file)

    def admit(self, scope: Scope) -> str | None:
        """Who has sent a request, by its token: as `token:` and the beginning of its hash; None if it has none of ours.

        What it has is in the header `Authorization`, once.
        """
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer":
            return None
        digest = f"sha256:{sha256(token.strip(b' ')).hexdigest()}"
        is_known = False
        for each in self._digests:
            is_known |= compare_digest(each, digest)
        return f"token:{digest[7:19]}" if is_known else None

    def _read(self) -> tuple[str, ...]:
        if self._file is None:
            return ()
        found = []
        try:
            lines = self._file.read_bytes().split(b"\n")
        except OSError as error:
            raise ConfigError([f"http.tokens_file: {self._file} can't be read: {error.strerror}"]) from None
        for number, line in enumerate(lines, 1):
            text = line.partition(b"#")[0].strip()
            if text:
                try:
                    found.append(token_digest(text.decode("ascii", "replace")))
                except ValueError as error:
                    raise ConfigError([f"http.tokens_file: {self._file}:{number}: {error}"]) from None
        if not found:
            raise ConfigError([f"http.tokens_file: {self._file} holds no token; put one a line, or unset the key"])
        return tuple(found)


def refusal(scope: Scope) -> Unauthenticated:
    """The refusal of a request that nobody knows, with what it lacks (RFC 6750, section 3)."""
    if any(name == b"authorization" for name, _ in scope["headers"]):
        return Unauthenticated("the token is not known here", challenge='Bearer error="invalid_token"')
    return Unauthenticated("send a token, with the header Authorization: Bearer …")
