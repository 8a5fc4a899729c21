"""What lies under a path: local disks keep locks and what was synced to them, network filesystems may not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["MOUNTS", "network_filesystem"]

MOUNTS: Final = Path("/proc/self/mountinfo")

# Locks, and the memory that SQLite's WAL shares, don't hold between machines.
_NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs"}
    | {"orangefs", "pvfs2", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.s3fs", "fuse.s3ql"}
    | {"fuse.gcsfuse", "fuse.goofys", "fuse.rclone", "fuse.blobfuse", "fuse.blobfuse2", "fuse.juicefs", "fuse.davfs"}
    | {"fuse.curlftpfs", "fuse.smbnetfs", "fuse.moosefs"}
)


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
