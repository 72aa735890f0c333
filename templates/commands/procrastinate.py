"""The queue, for procrastinate's own commands."""

from . import create_app
from .core.engine import WorkerQueue

queue = WorkerQueue(create_app())
