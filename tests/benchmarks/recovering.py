"""Opens a database as a process, and tells what that took: `python recovering.py URL LOOP`.

Prints the seconds until it served, how many changes are stored then, and the most memory the process had, in bytes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from time import perf_counter

import anyio

from agent_runtime import open_runtime


def peak_bytes() -> int:
    """The most physical memory that the process has had; getrusage would count what it was forked from as well."""
    found = re.search(r"VmHWM:\s*([0-9]+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


async def main(url: str) -> None:
    started = perf_counter()
    async with open_runtime(url) as runtime:
        took = perf_counter() - started
        sys.stdout.write(f"{took} {runtime.watermarks.stored} {peak_bytes()}\n")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], backend=sys.argv[2])
