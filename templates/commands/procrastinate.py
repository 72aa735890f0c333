"""The queue, for procrastinate's own commands."""

from flask.cli import load_dotenv
from flask.helpers import get_debug_flag, get_load_dotenv

from . import create_app
from .core.engine import WorkerQueue

if get_load_dotenv():  # unless FLASK_SKIP_DOTENV=1, as for `flask`
    load_dotenv()
queue = WorkerQueue(create_app({"DEBUG": get_debug_flag()}))
