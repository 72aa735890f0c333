"""A development server for any Flask application, and a PostgreSQL for it."""

from contextlib import suppress


def say(text: str) -> None:
    """Print a line, unless the terminal is closed."""
    with suppress(OSError, ValueError):
        print(text, flush=True)
