"""Import the packages of the application in the parent, for its forks."""

import os
import sys
from collections import deque
from collections.abc import Mapping
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
        before = set(sys.modules)
        sys.meta_path.insert(0, self)
        try:
            import_module(name)
        except BaseException:  # The application's own import shows the error.
            for other in sys.modules.keys() - before:
                if _root(other) not in sys.modules:
                    del sys.modules[other]
            if _root(name) not in sys.modules:
                others = [n for n in self.waiting if _root(n) != _root(name)]
                self.waiting = deque(others)
        finally:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Stop the import of a module that is another one for the application."""
        if file := self.files.get(name):
            spec = PathFinder.find_spec(name, path)
            place = os.path.abspath(spec.origin) if spec and spec.origin else file
            if place != file or not self._is_package(name):
                raise KeyboardInterrupt  # A package may catch any other error.

    def _is_package(self, name: str) -> bool:
        return is_library(self.files[name]) or name.startswith("flask_devserver.")


def _root(name: str) -> str:
    return name.partition(".")[0]
