"""The database's file: where it lies, whether it may lie there, and that only its owner can read it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path
from typing import Final

from agent_runtime.errors import StorageFatal, StorageUnavailable

__all__ = ["MOUNTS", "network_filesystem", "prepare_file"]

MOUNTS: Final = Path("/proc/self/mountinfo")

# SQLite's locks and the shared memory of its WAL don't hold between machines.
_NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs"}
    | {"orangefs", "pvfs2", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.s3fs", "fuse.s3ql"}
    | {"fuse.gcsfuse", "fuse.goofys", "fuse.rclone", "fuse.blobfuse", "fuse.blobfuse2", "fuse.juicefs", "fuse.davfs"}
    | {"fuse.curlftpfs", "fuse.smbnetfs", "fuse.moosefs"}
)
_MAY_PASS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM})


def network_filesystem(path: Path, mounts: Path = MOUNTS) -> str | None:
    """The type of the network filesystem that `path` (absolute, without links) lies on; None when it is a local one.

    `mounts` is a file in the format of proc_pid_mountinfo(5). Where there is none, every filesystem passes for local.
    """
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    found, found_length = "", -1
    for line in lines:
        mounted, _, described = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mounted.split()[4]))
        # A later mount on the same point hides the earlier one.
        if len(point.parts) >= found_length and path.is_relative_to(point):
            found, found_length = described.split()[0], len(point.parts)
    return found if found in _NETWORK else None


def prepare_file(path: Path, mounts: Path = MOUNTS) -> None:
    """See that the file is there and can be written; make it, and the directories above, if need be.

    A new file is for its owner only (mode 0600), as it will hold conversations; SQLite gives its companions (-wal,
    -shm) the same mode. Raises StorageFatal, or StorageUnavailable when waiting may help.
    """
    if filesystem := network_filesystem(path, mounts):
        raise StorageFatal(
            f"the database {path} would lie on a network filesystem ({filesystem}), where SQLite's locks don't hold: "
            "choose a path on a local disk"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise StorageFatal(f"the database {path} is a directory: name a file, as in {path / 'agent_runtime.db'}")
        # Never open and close a file that is there: closing any descriptor of a file drops the locks that this
        # process's SQLite connections hold on it (fcntl(2)).
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as exc:
        problem = f"the database {path} can't be made ({exc.strerror}: {exc.filename})"
        if exc.errno in _MAY_PASS:
            raise StorageUnavailable(problem) from exc
        raise StorageFatal(f"{problem}: choose a path that this user may write to") from exc
    for place in (path, path.parent):
        if not os.access(place, os.W_OK):
            raise StorageFatal(f"the database {path} can't be written: this user may not write to {place}")
