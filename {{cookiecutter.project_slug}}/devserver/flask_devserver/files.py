"""Find the files that have changed, by comparing the results of `os.stat`.

Events of the kernel only ask for an early scan. A lost event, an overflow, or a file
system without events delays a reload by at most a second, and no save is lost.
"""

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from errno import EACCES, ENOENT, ENOTDIR
from fnmatch import fnmatch
from glob import escape, iglob
from pathlib import Path

from . import say

Signature = tuple[int, ...]  # empty for a file that does not exist
STALE: Signature = (0,)  # unlike that of any file

# The packages and the environment depend on these. Installers write RECORD last.
SETTINGS = (".env", ".flaskenv", "pyproject.toml", f"dist-info{os.sep}RECORD")

# Files of these kinds count even when they appear or disappear. Others, such as the
# temporary files of editors, only count when they have changed.
SOURCES = (
    *".py .sql .html .htm .jinja .jinja2 .j2 .css .js .svg .toml .yaml .yml".split(),
    *SETTINGS,
)

_STANDARD_LIBRARY = os.path.dirname(os.__file__)
is_installed = re.compile(r"[/\\](site|dist)-packages[/\\]").search

IGNORED = ("__pycache__", "node_modules", "site-packages")
IGNORED_IN_ROOT = (*IGNORED, "instance", "dist", "build", "tests")
IGNORED_KINDS = ("~", ".pyc", ".tmp", ".log", ".pid", ".lock", "-journal")

MAX_FOLDERS, MAX_DEPTH = 5000, 200  # to watch

SETTLE = 0.001  # seconds from an event to the scan, so that a file is complete
SCAN_INTERVAL = 1.0  # seconds between two scans without an event
POLL_INTERVAL = 0.3  # where there are no events
LOOP, LOOP_SAVES = 15.0, 5  # Five saves within 15 seconds come from a program.
SCAN_SHARE = 20  # Scans without an event take at most a 20th of the time.
EVENT_SHARE = 2  # Scans after events take at most a third of the time.

EVENTS = 0x10003CC  # something in a folder is written, moved, created or removed


class Files:
    """The files of the application in the folder `root`.

    These are the folder without caches and data, the modules that a child process has
    loaded, with their packages, and the paths in `extra`. Files that match a pattern in
    `exclude`, and those that the application itself writes, do not count. The first
    scan finds what has changed after the time `since`, in seconds. `scan_at` is the
    monotonic time of the next scan.
    """

    def __init__(
        self, root: str, since: float, extra: Iterable[str], exclude: Iterable[str]
    ) -> None:
        self.root = root
        self.walked: tuple[str, ...] = (root,)
        self.extra = tuple(map(os.path.abspath, extra))
        self.exclude = tuple(exclude)
        self.events = Events()
        self.scan_at = self.rested_at = 0.0
        self.written: dict[str, float] = {}  # by the application, at a monotonic time
        self.changes: dict[str, list[float]] = {}  # at these monotonic times
        self.contents: dict[str, bytes] = {}  # of files that change often
        self.named: set[str] = set()  # data that changes often
        self.modules: set[str] = set()
        self.folders: set[str] = set()
        self.known: dict[str, Signature] = {}
        self._learn(self._sources(), since)
        if len(self.folders) >= MAX_FOLDERS:  # as in / or in somebody's home
            say(f" * {root} has too many folders: only loaded modules are watched.")
            self.walked = ()
            self.known.clear()
        self._learn(_distributions(), since)

    def add(self, paths: Mapping[str, Signature], since: float) -> None:
        """Watch modules and other files that were read after the time `since`.

        With each comes its signature at that moment, or an empty one if it is unknown.
        """
        if new := set(filter(self._may_change, paths)) - self.known.keys():
            self.modules |= {p for p in new if not is_installed(p)}
            self.known |= {p: tuple(paths[p]) for p in new if paths[p]}
            self._learn({*new, *self._sources()}, since)
        self.scan_at = time.monotonic()

    def on_event(self) -> None:
        """Scan soon, because something has happened."""
        self.events.clear()
        due = max(time.monotonic() + SETTLE, self.rested_at)
        self.scan_at = min(self.scan_at, due)

    def scan(self) -> set[str]:
        """Return the files that have changed since the last scan."""
        began = time.process_time()  # A slow file system costs time, but no processor.
        self.events.watch(self.folders)
        installed = set(filter(is_installed, self.known))
        found = self._differing({*self.known, *self._sources()} - installed)
        # Installed packages are many and seldom change, so no reload waits for them.
        found = set(filter(self._counts, found))
        found = found or self._differing({*installed, *_distributions()})
        now, cost = time.monotonic(), time.process_time() - began
        self.scan_at = now + max(self.events.interval, SCAN_SHARE * cost)
        self.rested_at = now + EVENT_SHARE * cost
        return set(filter(self._counts, found))

    def forget_writes(self, before: float) -> None:
        """Let files count again that only former versions have written."""
        self.written = {p: t for p, t in self.written.items() if t >= before}

    def settle(self, changed: Iterable[str]) -> set[str]:
        """Return the files of `changed` that ask for a reload now."""
        now = time.monotonic()
        return {p for p in changed if self._counts(p) and not self._is_noise(p, now)}

    def _learn(self, paths: Iterable[str], since: float) -> None:
        """Add the files to `known`. The next scan finds those that are newer."""
        for path in {*paths} - self.known.keys():
            found = signature(path)
            # Moving a file here changes its ctime. A time may be in the future.
            new = any(since * 1e9 < t < time.time_ns() for t in found[:2])
            # A program may write data at each start, so only sources count.
            if found or self.is_source(path):
                self.known[path] = STALE if new and self.is_source(path) else found

    def _differing(self, paths: Iterable[str]) -> set[str]:
        """Update `known` with the files, and return those that differ."""
        new = {p: signature(p) for p in paths}
        # An editor may remove a file for a moment before it writes the new one.
        new = {p: s for p, s in new.items() if s or self.is_source(p)}
        differing = {p for p, s in new.items() if s != self.known.get(p, ())}
        differing = {p for p in differing if self.known.get(p) or self.is_source(p)}
        self.known |= new
        return differing

    def is_source(self, path: str) -> bool:
        """Return whether the file is code, or counts like code."""
        extra = any(path == e or path.startswith(e + os.sep) for e in self.extra)
        return extra or path.endswith(SOURCES)

    def _may_change(self, path: str) -> bool:
        """Return whether a file that was read may change during work on a project."""
        if path.endswith((".py", ".so", ".zip", ".egg")):
            return bool(is_installed(path)) or not is_library(path)
        data = path.startswith(self.root) and not path.endswith(IGNORED_KINDS)
        return data and not is_library(path)

    def _counts(self, path: str) -> bool:
        written = self.written.get(path) or self.written.get(path.rpartition("-")[0])
        if written and path.endswith(".py"):  # It may be edited later.
            written = time.monotonic() < written + SCAN_INTERVAL
        excluded = any(fnmatch(path, pattern) for pattern in self.exclude)
        return not (excluded or written)

    def _is_noise(self, path: str, now: float) -> bool:
        """Return whether a file changes so often that a program must be writing it."""
        times = [*self.changes.get(path, ()), now][-LOOP_SAVES:]
        self.changes[path] = times
        often = len(times) == LOOP_SAVES and now - times[0] < LOOP
        if self.is_source(path) or not often:
            # A program that the application starts may write the same file each time.
            return often and self._is_unchanged(path)
        if path not in self.named:
            say(f" * {path} changes again and again, so it reloads nothing for now.")
            self.named.add(path)
        return True

    def _is_unchanged(self, path: str) -> bool:
        before = self.contents.pop(path, None)
        with suppress(OSError):  # A file that returns has changed.
            self.contents[path] = Path(path).read_bytes()
        return before is not None and before == self.contents.get(path)

    def _sources(self) -> Iterator[str]:
        self.folders = set()
        modules = sorted(self.modules)
        packages = [os.path.dirname(p) for p in modules if p.endswith("__init__.py")]
        for path in (*self.extra, *self.walked, *packages):
            whole = path in self.extra or path != self.root
            yield from self._walk(path, whole, {path})
        files = [p for p in (*self.extra, *modules) if not os.path.isdir(p)]
        yield from files
        self.folders |= {os.path.dirname(os.path.realpath(p)) for p in files}

    def _walk(self, folder: str, whole: bool, seen: set[str]) -> Iterator[str]:
        """Yield the sources in `folder`, and all files where a package keeps data."""
        full = len(self.folders) >= MAX_FOLDERS or folder.count(os.sep) > MAX_DEPTH
        if folder in self.folders or full:
            return
        try:
            entries = list(os.scandir(folder))
        except OSError:
            return
        names = {entry.name for entry in entries}
        if names & {"pyvenv.cfg", "conda-meta"} and folder != self.root:
            return
        self.folders.add(folder)
        data = os.path.basename(folder) in ("templates", "static")
        whole = whole or data or "__init__.py" in names
        ignored = IGNORED_IN_ROOT if folder == self.root else IGNORED
        for entry in entries:
            hidden = entry.name.startswith((".", "#"))
            with suppress(OSError):
                if entry.is_dir():
                    ignore = hidden or entry.name in ignored
                    if not (ignore or self._leads_back(entry, seen)):
                        yield from self._walk(entry.path, whole, seen)
                elif self.is_source(entry.path) or (
                    whole and not (hidden or entry.name.endswith(IGNORED_KINDS))
                ):
                    yield entry.path

    def _leads_back(self, entry: "os.DirEntry[str]", seen: set[str]) -> bool:
        if not entry.is_symlink():
            return False
        target = os.path.realpath(entry.path)
        inside = os.path.join(target, "")
        back = target in seen or f"{self.root}/".startswith(inside)
        seen.add(target)
        return back


class Events:
    """Ask the kernel of Linux for events in folders.

    `descriptor` is readable after an event. Scan after `interval` seconds in any case.
    """

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = -1
        self.interval = POLL_INTERVAL
        if sys.platform == "linux":
            self.interval = SCAN_INTERVAL
            self.descriptor = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            self._check(self.descriptor)

    def watch(self, folders: Iterable[str]) -> None:
        """Watch the folders, as many as the kernel's limit allows."""
        for folder in folders if self.interval == SCAN_INTERVAL else ():
            path = os.fsencode(folder)
            self._check(self.libc.inotify_add_watch(self.descriptor, path, EVENTS))

    def clear(self) -> None:
        """Drop the events: one is enough to start a scan."""
        with suppress(BlockingIOError):
            while os.read(self.descriptor, 65536):
                pass

    def _check(self, result: int) -> None:
        number = ctypes.get_errno() if result < 0 else 0
        if number not in (0, ENOENT, ENOTDIR, EACCES):
            reason = f"{os.strerror(number)}; see `sysctl fs.inotify`"
            say(f" * Not all folders can be watched ({reason}): checking every 0.3 s.")
            self.interval = POLL_INTERVAL


def module_files() -> Iterator[tuple[str, str]]:
    """Yield name and file of each module of this process that has a file."""
    for name, module in list(sys.modules.items()):
        with suppress(Exception):  # A lazy module may fail.
            loader = getattr(module, "__loader__", None)
            path = getattr(loader, "archive", module.__file__)
            if isinstance(path, str):
                yield name, path if os.path.isabs(path) else os.path.abspath(path)


def is_library(path: str) -> bool:
    """Return whether the file belongs to Python or to an installed package."""
    return bool(is_installed(path)) or path.startswith(_STANDARD_LIBRARY)


def _distributions() -> Iterator[str]:
    """Yield what an installer adds or changes last for each package."""
    for folder in sys.path:
        if is_installed(f"{folder}{os.sep}"):
            yield from iglob(f"{escape(folder)}/*.dist-info/RECORD")


def signature(path: str) -> Signature:
    """Return times and size of a file, which differ once it has been saved."""
    with suppress(OSError, ValueError):
        found = os.stat(path)
        # A hard link to a file of a package, as uv makes, changes the ctime. Network
        # file systems such as sshfs give a file another inode now and then.
        changed = found.st_ino if is_installed(path) else found.st_ctime_ns
        return found.st_mtime_ns, changed, found.st_size
    return ()
