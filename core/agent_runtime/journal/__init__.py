"""The journal: a local, append-only log of the changes that the database does not have yet.

Owns the files of one directory and the order of bytes in them (README.md). A change that `Journal.append` took is there
after the process was killed, one that `Journal.sync` took also after a power loss; `Directory.frames` gives back every
whole change, once and in order, whatever happened to the bytes around it.

Knows nothing of sessions or databases: to it a change is a sequence and a JSON document.
"""

from __future__ import annotations

from .disk import LocalFiles
from .files import JournalFiles, SegmentFile
from .frames import Damage, Frame
from .headers import Header
from .segments import Directory, Gap, Segment, read_directory
from .writer import Figures, Journal

__all__ = [
    "Damage",
    "Directory",
    "Figures",
    "Frame",
    "Gap",
    "Header",
    "Journal",
    "JournalFiles",
    "LocalFiles",
    "Segment",
    "SegmentFile",
    "read_directory",
]
