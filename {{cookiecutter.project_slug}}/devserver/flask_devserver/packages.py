"""Import the packages of the application in the parent, for its forks."""

import os
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.machinery import PathFinder
from typing import Any

from .files import is_library


class Packages:
    """The packages that the application's process has imported.

    In the parent, a package must become what it is in that process. So it is not
    imported if it imports a module of the application, or one from another place.
    """

    def __init__(self) -> None:
        self.files: dict[str, str] = {}  # of all modules, by name
        self.waiting: deque[str] = deque()
        self.failed: set[str] = set()  # Each fork imports these itself.

    def add(self, modules: Mapping[str, str]) -> None:
        """Let packages wait for their import. `modules` are files by name."""
        self.files |= modules
        # A private one comes with its owner: asyncio would not work with an `_asyncio`
        # imported before it.
        new = [n for n in modules if "._" not in f".{n}" and n not in sys.modules]
        self.waiting.extend(name for name in new if self._is_package(name))

    def import_next(self) -> None:
        """Import one of them, if that succeeds."""
        name = self.waiting.popleft()
        parts = name.split(".")
        owners = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        if self.failed.intersection(owners):
            return
        before = set(sys.modules)
        sys.meta_path.insert(0, self)
        try:
            import_module(name)
        except BaseException:  # The application's own import shows the error.
            for other in sorted(sys.modules.keys() - before):
                owner = other.rpartition(".")[0]
                if owner and owner not in sys.modules:
                    del sys.modules[other]
            self.failed |= {n for n in owners if n not in sys.modules}
        finally:
            with suppress(ValueError):  # A package may replace the list.
                sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Stop the import of a module that is another one for the application."""
        if file := self.files.get(name):
            spec = PathFinder.find_spec(name, path)
            place = os.path.abspath(spec.origin) if spec and spec.origin else file
            # Some files have another name in their module, or are in an archive.
            same = place.startswith((file, os.path.join(os.path.dirname(file), "")))
            if not same or not self._is_package(name):
                raise KeyboardInterrupt  # Packages catch other errors.

    def _is_package(self, name: str) -> bool:
        return is_library(self.files[name]) or name.startswith("flask_devserver.")
