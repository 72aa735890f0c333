"""Find the files that have changed, by comparing what `os.stat` says of them.

Events of the kernel only ask for an early scan. A lost event, an overflow, or a file
system without events delays a reload by a second at most, and no save is lost.
"""

import ctypes
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from errno import EACCES, ENOENT, ENOTDIR
from fnmatch import fnmatch
from sysconfig import get_paths

from . import say

Signature = tuple[int, ...]  # empty for a file that is not there

# Files of these kinds count when they appear and disappear, too. Others, such as the
# drafts of editors, count when they have changed.
SOURCES = tuple(
    ".py .sql .html .htm .jinja .jinja2 .j2 .css .js .svg .toml .yaml .yml".split()
)

# The packages and the environment depend on these.
SETTINGS = (".env", ".flaskenv", "pyproject.toml")

_STANDARD_LIBRARY = get_paths()["stdlib"]
_LIBRARIES = (get_paths()["purelib"], get_paths()["platlib"])

IGNORED = ("__pycache__", "node_modules")
IGNORED_IN_ROOT = (*IGNORED, "instance", "dist", "build")
IGNORED_KINDS = ("~", ".pyc", ".swp", ".tmp", ".log", ".pid", ".lock", "-journal")

SETTLE = 0.001  # seconds from an event to the scan, in which a file is written
SCAN_INTERVAL = 1.0  # seconds between two scans without an event
POLL_INTERVAL = 0.3  # where there are no events
SCAN_SHARE = 20  # A scan takes at most the 20th part of the time.

IN_NONBLOCK, IN_CLOEXEC = 0o4000, 0o2000000
IN_ATTRIB, IN_CLOSE_WRITE, IN_ONLYDIR = 0x4, 0x8, 0x1000000
IN_MOVED, IN_CREATE, IN_DELETE = 0xC0, 0x100, 0x200
EVENTS = IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED | IN_CREATE | IN_DELETE | IN_ONLYDIR


class Files:
    """The files of the application in the folder `root`.

    These are the folder without caches and data, the modules that a child process has
    loaded, and the paths in `extra`. Files that match a pattern in `exclude`, and those
    that the application itself writes, do not count. The first scan finds what has
    changed after the time `since`, in seconds. `scan_at` is the monotonic time of the
    next scan.
    """

    def __init__(
        self, root: str, since: float, extra: Iterable[str], exclude: Iterable[str]
    ) -> None:
        self.root = root
        self.extra = tuple(map(os.path.abspath, extra))
        self.exclude = tuple(exclude)
        self.events = Events()
        self.scan_at = 0.0
        self.written: set[str] = set()
        self.modules: set[str] = set()
        self.folders: set[str] = set()
        self.known: dict[str, Signature] = {}
        self.installed: dict[str, Signature] = {}
        self._differing(self.known, self._sources())
        self.missed = {p for p, s in self.known.items() if _is_newer(s, since)}

    def add_modules(self, paths: Iterable[str], since: float) -> None:
        """Watch the files of modules that were read after the time `since`."""
        for path in set(paths) - self.known.keys() - self.installed.keys():
            installed = path.startswith(_LIBRARIES)
            signatures = self.installed if installed else self.known
            signatures[path] = _signature(path)
            if not installed:
                self.modules.add(path)
            if _is_newer(signatures[path], since):
                self.missed.add(path)
        self.scan_at = time.monotonic()

    def on_event(self) -> None:
        """Scan soon, because something has happened."""
        self.events.clear()
        self.scan_at = min(self.scan_at, time.monotonic() + SETTLE)

    def scan(self) -> set[str]:
        """Return the files that have changed since the last scan."""
        began = time.monotonic()
        self.events.watch(self.folders)
        found = self.missed | self._differing(self.known, self._sources())
        self.missed = set()
        # A reload need not wait for these, which are many and seldom change.
        found = set(filter(self._counts, found)) or self._differing(self.installed)
        now = time.monotonic()
        self.scan_at = now + max(self.events.interval, SCAN_SHARE * (now - began))
        return set(filter(self._counts, found))

    def _differing(
        self, old: dict[str, Signature], found: Iterable[str] = ()
    ) -> set[str]:
        """Bring `old` and what was found up to date; return the files that differ."""
        new = {path: _signature(path) for path in {*old, *found}}
        differing = {path for path in new if new[path] != old.get(path, ())}
        both = {path for path in differing if new[path] and old.get(path)}
        # An editor may remove a file for a moment before it writes the new one.
        old |= {
            p: signature
            for p, signature in new.items()
            if self._is_source(p) or signature
        }
        return both | {path for path in differing if self._is_source(path)}

    def _is_source(self, path: str) -> bool:
        return path.endswith(SOURCES + SETTINGS) or path.startswith(self.extra)

    def _counts(self, path: str) -> bool:
        written = path in self.written or path.rpartition("-")[0] in self.written
        excluded = any(fnmatch(path, pattern) for pattern in self.exclude)
        return not excluded and (path.endswith(".py") or not written)

    def _sources(self) -> Iterator[str]:
        self.folders = {os.path.dirname(os.path.realpath(p)) for p in self.modules}
        yield from self._walk(self.root, False, {self.root})
        for path in self.extra:
            if os.path.isdir(path):
                yield from self._walk(path, True, {path})
            else:
                self.folders.add(os.path.dirname(path))
                yield path

    def _walk(self, folder: str, whole: bool, seen: set[str]) -> Iterator[str]:
        """Yield the sources in `folder`, and all files where a package keeps data."""
        try:
            entries = list(os.scandir(folder))
        except OSError:
            return
        names = {entry.name for entry in entries}
        if "pyvenv.cfg" in names:
            return
        self.folders.add(folder)
        data = os.path.basename(folder) in ("templates", "static")
        whole = whole or data or "__init__.py" in names
        ignored = IGNORED_IN_ROOT if folder == self.root else IGNORED
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir():
                    hidden = entry.name.startswith(".") or entry.name in ignored
                    if not (hidden or self._leads_back(entry, seen)):
                        yield from self._walk(entry.path, whole, seen)
                elif self._is_source(entry.path) or (
                    whole and not entry.name.endswith(IGNORED_KINDS)
                ):
                    yield entry.path

    def _leads_back(self, entry: "os.DirEntry[str]", seen: set[str]) -> bool:
        if not entry.is_symlink():
            return False
        target = os.path.realpath(entry.path)
        back = target in seen or f"{self.root}/".startswith(f"{target}/")
        seen.add(target)
        return back


class Events:
    """Ask the kernel of Linux for events in folders.

    `descriptor` is readable after any. `interval` is how many seconds to wait at most.
    """

    libc: ctypes.CDLL

    def __init__(self) -> None:
        self.descriptor = -1
        self.interval = POLL_INTERVAL
        if sys.platform == "linux":
            self.libc = ctypes.CDLL(None, use_errno=True)
            self.interval = SCAN_INTERVAL
            self.descriptor = self.libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC)
            self._check(self.descriptor)

    def watch(self, folders: Iterable[str]) -> None:
        """Watch the folders, as many as the kernel's limit allows."""
        for folder in folders if self.interval == SCAN_INTERVAL else ():
            path = os.fsencode(folder)
            self._check(self.libc.inotify_add_watch(self.descriptor, path, EVENTS))

    def clear(self) -> None:
        """Forget the events, of which one is as good as many."""
        with suppress(BlockingIOError):
            while os.read(self.descriptor, 65536):
                pass

    def _check(self, result: int) -> None:
        number = ctypes.get_errno() if result < 0 else 0
        if number not in (0, ENOENT, ENOTDIR, EACCES):
            reason = f"{os.strerror(number)}; see fs.inotify.max_user_watches"
            say(f" * Not all folders can be watched ({reason}): looking every 0.3 s.")
            self.interval = POLL_INTERVAL


def module_files() -> Iterator[tuple[str, str]]:
    """Yield name and file of each module of this process that has a file."""
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str):
            yield name, path if os.path.isabs(path) else os.path.abspath(path)


def is_library(path: str) -> bool:
    """Return whether the file belongs to Python or to an installed package."""
    return path.startswith((_STANDARD_LIBRARY, *_LIBRARIES))


def is_watched_module(path: str) -> bool:
    """Return whether the file of a module can change while one works on a project."""
    return path.startswith(_LIBRARIES) or not path.startswith(_STANDARD_LIBRARY)


def _signature(path: str) -> Signature:
    with suppress(OSError, ValueError):
        found = os.stat(path)
        # A hard link to a file of a package, as uv makes, changes the ctime.
        ctime = 0 if path.startswith(_LIBRARIES) else found.st_ctime_ns
        return found.st_mtime_ns, ctime, found.st_size, found.st_ino
    return ()


def _is_newer(signature: Signature, since: float) -> bool:
    # The ctime tells of a file that was moved here, too.
    return max(signature[:2], default=0) > since * 1e9
