"""Undo what a debugger's prompt has set in the terminal and left there."""

import os
import sys
import termios
from contextlib import suppress
from typing import Any

if sys.platform == "win32":
    raise ImportError("flask dev needs Linux or macOS.")


class Terminal:
    """Remember the settings of the terminal, if the standard input is one."""

    def __init__(self) -> None:
        self.settings: list[Any] = []
        with suppress(termios.error, OSError, ValueError):
            self.settings = termios.tcgetattr(0)

    def restore(self) -> None:
        """Set them again, but not from a job in the background."""
        with suppress(termios.error, OSError):
            if self.settings and os.tcgetpgrp(0) == os.getpgrp():
                if termios.tcgetattr(0) != self.settings:
                    termios.tcsetattr(0, termios.TCSADRAIN, self.settings)
