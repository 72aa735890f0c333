"""Find the files that have changed, by comparing what `os.stat` says of them.

Events of the kernel only ask for an early scan. A lost event, an overflow, or a file
system without events delays a reload by a second at most, and no save is lost.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from sysconfig import get_paths

Signature = tuple[int, ...] | None  # None for a file that is not there

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

IN_NONBLOCK, IN_CLOEXEC = 0o4000, 0o2000000
IN_ATTRIB, IN_CLOSE_WRITE, IN_ONLYDIR = 0x4, 0x8, 0x1000000
IN_MOVED, IN_CREATE, IN_DELETE = 0xC0, 0x100, 0x200
EVENTS = IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED | IN_CREATE | IN_DELETE | IN_ONLYDIR


class Files:
    """The files of the application in the folder `root`.

    These are the folder without caches and data, the modules that a child process has
    loaded, and the paths in `extra`. Files that match a pattern in `exclude`, and those
    that the application itself writes, do not count. The first scan finds what has
    changed after the time `since`, in nanoseconds.
    """

    def __init__(
        self, root: str, since: int, extra: Iterable[str], exclude: Iterable[str]
    ) -> None:
        self.root = root
        self.extra = tuple(map(os.path.abspath, extra))
        self.exclude = tuple(exclude)
        self.folders: set[str] = set()
        self.written: set[str] = set()
        self.missed: set[str] = set()  # changed before they were known
        self.modules: dict[str, Signature] = {}
        self.installed: dict[str, Signature] = {}
        self.sources = {path: _signature(path) for path in self._sources()}
        self.missed.update(p for p, s in self.sources.items() if _is_newer(s, since))

    def add_modules(self, paths: Iterable[str], since: int) -> None:
        """Watch the files of modules that were read after the time `since`."""
        known = self.sources.keys() | self.modules.keys() | self.installed.keys()
        for path in set(paths) - known:
            installed = path.startswith(_LIBRARIES)
            signatures = self.installed if installed else self.modules
            signatures[path] = _signature(path, installed)
            if _is_newer(signatures[path], since):
                self.missed.add(path)

    def changed(self, with_installed: bool) -> set[str]:
        """Return the files that have changed since the last scan."""
        found, self.missed = self.missed, set()
        sources = {path: _signature(path) for path in self._sources()}
        found |= set(self._differing(self.sources, sources))
        # An editor may remove a file for a moment before it writes the new one.
        kept = {p: s for p, s in self.sources.items() if not self._is_source(p)}
        self.sources = kept | sources
        modules = {path: _signature(path) for path in self.modules}
        found |= set(self._differing(self.modules, modules))
        self.modules = modules
        if with_installed:
            installed = {path: _signature(path, True) for path in self.installed}
            found |= set(self._differing(self.installed, installed))
            self.installed = installed
        return {path for path in found if self._counts(path)}

    def _differing(
        self, old: dict[str, Signature], new: dict[str, Signature]
    ) -> Iterator[str]:
        for path in old.keys() | new.keys():
            before, now = old.get(path), new.get(path)
            if before != now and (self._is_source(path) or before and now):
                yield path

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
    """Ask the kernel for events in folders; `descriptor` is readable after any."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self._check(self.libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC))

    def watch(self, folders: Iterable[str]) -> None:
        """Watch the folders. Raises `OSError` when the kernel's limit is reached."""
        for folder in folders:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                path = os.fsencode(folder)
                self._check(self.libc.inotify_add_watch(self.descriptor, path, EVENTS))

    def clear(self) -> None:
        """Forget the events, of which one is as good as many."""
        with suppress(BlockingIOError):
            while os.read(self.descriptor, 65536):
                pass

    def _check(self, result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


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


def _signature(path: str, installed: bool = False) -> Signature:
    with suppress(OSError, ValueError):
        found = os.stat(path)
        # A hard link to a file of a package, as uv makes, changes the ctime.
        ctime = 0 if installed else found.st_ctime_ns
        return found.st_mtime_ns, ctime, found.st_size, found.st_ino
    return None


def _is_newer(signature: Signature, since: int) -> bool:
    # The ctime tells of a file that was moved here, too.
    return signature is not None and max(signature[:2]) > since
