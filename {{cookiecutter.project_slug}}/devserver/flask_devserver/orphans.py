"""Find what an ended process has left running, on Linux."""

import ctypes
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

if sys.platform == "win32":
    raise ImportError("flask dev needs Linux or macOS.")

PR_SET_CHILD_SUBREAPER = 36

# The embedded servers outlive a version on purpose, and end with the supervisor.
SERVICES = ("postgres", "valkey-server", "redis-server")


def adopt() -> None:
    """Become the parent of all orphans among the descendants of this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def orphans(known: Iterable[int], successor: int) -> list[int]:
    """Return the children of this process that are not known.

    One that started after the process `successor` was started by that.
    """
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    with suppress(OSError):
        found = {int(pid) for pid in children.read_text().split()} - set(known)
        limit = _start_time(successor) if found and successor else float("inf")
        return [pid for pid in found if _start_time(pid) < limit]
    return []


def is_detached(pid: int) -> bool:
    """Return whether a process has left the session, as daemons do."""
    with suppress(OSError):
        return os.getsid(pid) != os.getsid(0)
    return True


def is_service(pid: int) -> bool:
    """Return whether a process belongs to an embedded server."""
    command = command_line(pid)
    program = os.path.basename(command.partition(" ")[0]).rstrip(":")
    return program in SERVICES or "flask_devserver" in command


def command_line(pid: int) -> str:
    """Return the command line of a process."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return os.fsdecode(b" ".join(words)).strip()
    return ""


def _start_time(pid: int) -> float:
    """Return when a process has started, or infinity when it is gone."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return float("inf") if fields[0] == b"Z" else float(fields[19])
    return float("inf")
