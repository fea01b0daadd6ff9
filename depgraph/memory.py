"""How much memory this process has had at most, and how much is left to take."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def peak_bytes() -> int:
    """The most memory that this process has held at a time.

    Linux counts what the parent held to a child's `ru_maxrss`, so that its own count is read instead.
    """
    with suppress(OSError, StopIteration):
        return _kilobytes(Path("/proc/self/status"), "VmHWM:")
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def available_bytes() -> int | None:
    """What can be taken without swapping: of the machine, or of the container where that has less; None where it isn't known."""
    found = []
    with suppress(OSError, StopIteration):
        found.append(_kilobytes(Path("/proc/meminfo"), "MemAvailable:"))
    with suppress(OSError, ValueError):
        most, used = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        found.append(max(int(most) - int(used) + _reclaimable(), 0))
    with suppress(OSError, ValueError):
        found = found or [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min(found, default=None)


def _reclaimable() -> int:
    """Cached files that a container gives back when it needs to."""
    lines = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    return sum(int(size) for name, size in lines if name == "inactive_file")


def _kilobytes(file: Path, field: str) -> int:
    """A figure of a file of the system in bytes; raises StopIteration where it has none."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
