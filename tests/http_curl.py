"""As much of curl as the README asks for, for machines without it: one URL, with -X, -H and -d."""

from __future__ import annotations

import argparse
import sys

import httpx


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-d", dest="data")
    for flag in ("--silent", "--show-error", "--fail"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    reply = httpx.request(
        given.method or ("GET" if given.data is None else "POST"),
        given.url,
        headers=[header.split(": ", 1) for header in given.headers],
        content=given.data,
    )
    sys.stdout.write(reply.raise_for_status().text)


if __name__ == "__main__":
    main()
