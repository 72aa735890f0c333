"""The Celery application, for Celery's own commands."""

from flask.cli import load_dotenv
from flask.helpers import get_debug_flag, get_load_dotenv

from . import create_app
from .core.worker import get_worker

if get_load_dotenv():  # unless FLASK_SKIP_DOTENV=1, as for `flask`
    load_dotenv()
with create_app({"DEBUG": get_debug_flag()}).app_context():
    celery = get_worker().get_ready()
