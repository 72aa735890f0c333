"""Coroutines and tasks with a retry strategy, which only procrastinate has."""

import asyncio
import os
import time

from app.core.db import get_db
from app.core.jobs import task
from procrastinate import RetryStrategy

from .working import create_app


@task(retry=RetryStrategy(max_attempts=50))
def fail_slowly(number: int, failures: int) -> None:
    """Fail so many times, each after a second, and then never end."""
    with get_db().cursor() as cursor:
        insert = "INSERT INTO runs (number, process) VALUES (%s, %s)"
        cursor.execute(insert, [number, os.getpid()])
        cursor.execute("SELECT count(*) FROM runs WHERE number = %s", [number])
        [[runs]] = cursor.fetchall()
    if runs <= failures:
        time.sleep(1)
        raise RuntimeError("on purpose")
    time.sleep(600)


@task
async def cancel(number: int, seconds: float) -> None:
    """Record the run, wait and raise what a coroutine that is aborted raises."""
    with get_db().cursor() as cursor:
        cursor.execute("INSERT INTO runs (number) VALUES (%s)", [number])
    await asyncio.sleep(seconds)
    raise asyncio.CancelledError


__all__ = ["cancel", "create_app", "fail_slowly"]
