"""What a process may take that does what somebody else asks for: an end by the system, whatever it makes of it."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path


def take_memory(most: int) -> None:
    """Let this process take so many bytes more than it has now; what asks for more fails. Linux counts, others do not.

    What is mapped for writing counts, used or not, files of code do not.
    """
    if sys.platform != "linux":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with suppress(OSError, ValueError):
        limit = _taken() + most
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _taken() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
    return pages * os.sysconf("SC_PAGE_SIZE")


def of_the_machine() -> int | None:
    """Give the bytes of memory that the machine has; None where that is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def take_seconds(most: float) -> None:
    """Let this process end so many seconds from now, in the middle of whatever it is doing; 0: not any more."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, most)


def peak() -> int:
    """Give the most bytes that this process had in memory so far."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
