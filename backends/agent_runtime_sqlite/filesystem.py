"""The database's file: where it lies, whether it may lie there, and that only its owner can read it."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

from agent_runtime.errors import StorageFatal, StorageUnavailable
from agent_runtime.filesystems import MOUNTS, network_filesystem

__all__ = ["find_file", "prepare_file"]

_MAY_PASS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM})


def prepare_file(path: Path, mounts: Path = MOUNTS) -> None:
    """See that the file is there and can be written; make it, and the directories above, if need be.

    A new file is for its owner only (mode 0600), as it will hold conversations; SQLite gives its companions (-wal,
    -shm) the same mode. Raises StorageFatal, or StorageUnavailable when waiting may help.
    """
    _check_place(path, mounts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never open and close a file that is there: closing any descriptor of a file drops the locks that this
        # process's SQLite connections hold on it (fcntl(2)).
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as exc:
        problem = f"the database {path} can't be made ({exc.strerror}: {exc.filename})"
        if exc.errno in _MAY_PASS:
            raise StorageUnavailable(problem) from exc
        raise StorageFatal(f"{problem}: choose a path that this user may write to") from exc
    _check_rights(path)


def find_file(path: Path, mounts: Path = MOUNTS) -> None:
    """As `prepare_file`, but nothing is made: StorageFatal, if there is no file."""
    _check_place(path, mounts)
    if not path.exists():
        raise StorageFatal(f"there is no database {path}: is storage.url right? agent-runtime serve makes a new one")
    _check_rights(path)


def _check_place(path: Path, mounts: Path) -> None:
    if filesystem := network_filesystem(path, mounts):
        raise StorageFatal(
            f"the database {path} would lie on a network filesystem ({filesystem}), where SQLite's locks don't hold: "
            "choose a path on a local disk"
        )
    if path.is_dir():
        raise StorageFatal(f"the database {path} is a directory: name a file, as in {path / 'agent_runtime.db'}")


def _check_rights(path: Path) -> None:
    for place in (path, path.parent):
        if not os.access(place, os.W_OK):
            raise StorageFatal(f"the database {path} can't be written: this user may not write to {place}")
