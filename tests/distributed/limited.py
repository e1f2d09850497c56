"""`maskft` in a process whose memory is bounded: `limited.py BYTES PEAKS ...`, where ... are the command's arguments.

The bound is the kernel's, on all memory that is the process's own (RLIMIT_DATA). Each process leaves its peak of
resident memory in the folder PEAKS, in bytes. `limited.py BYTES PEAKS whole BASE` loads a base as one process does.
"""

from __future__ import annotations

import atexit
import os
import re
import resource
import sys
from pathlib import Path


def peak() -> int:
    """The most resident memory this process has had, in bytes (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def bound(limit: int, peaks: Path) -> None:
    """Bound this process's memory; 0 leaves it free. Its peak is written when it ends.

    Arrow's own allocator would set aside a GiB that it does not use, and that counts for the kernel.
    """
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    rank = os.environ.get("RANK", "0")
    atexit.register(lambda: (peaks / rank).write_text(str(peak())))


def main() -> None:
    limit, peaks, *arguments = sys.argv[1:]
    bound(int(limit), Path(peaks))
    if arguments[0] == "whole":
        from maskft.vlm.load import load_model

        load_model(arguments[1], dtype="float32")
        return
    from tests.distributed.cpu import is_sharding, prepare

    if is_sharding():
        prepare()
    from maskft.cli import main as command

    sys.argv[1:] = arguments
    command()


if __name__ == "__main__":
    main()
