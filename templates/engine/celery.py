"""Celery's part of `flask worker`."""

import logging
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import click
from billiard.einfo import ExceptionInfo
from celery import beat, signals
from celery.app.trace import trace_task
from celery.concurrency import thread
from celery.concurrency.base import apply_target
from celery.exceptions import Reject, SecurityWarning
from celery.worker import state
from flask import Flask
from kombu.exceptions import KombuError
from kombu.transport import redis
from kombu.utils.json import loads
from redis.exceptions import (
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from .db import get_db
from .health import check_readiness
from .jobs import FlaskCelery, get_celery
from .serve import end_forks_at_signals

logger = logging.getLogger(__name__)

ENGINE_ERRORS = (KombuError, RedisError)
REPLY_TIMEOUT = 0.5  # seconds that workers have to respond
RECHECK_DELAY = 3.0  # seconds between two checks for pending migrations

# In a thread, `--beat` ends with its worker. A process would outlive a worker that is
# killed, and enqueue each job a second time.
beat._Process = None  # type: ignore[assignment, misc]

# A primary that was demoted, or a full server, may accept the next command, or another
# server may. So the worker connects again, and keeps its jobs.
redis.Transport.connection_errors += (ReadOnlyError, OutOfMemoryError)
# Also one whose replicas or disk are away, for which there are no classes.
UNABLE = re.compile("NOREPLICAS|MISCONF")

# Take a job and note that it is not acknowledged, in one step.
TAKE = """
local function reserve(job)
    local valid, found = pcall(cjson.decode, job)
    if not valid then  -- An argument may have half of an emoji.
        found = cjson.decode((job:gsub('\\\\(.)', {u = 'u'})))
    end
    local headers, properties = found.headers, found.properties
    assert(type(found.body) == 'string' and (headers.id or not headers.task))
    local tag, sent = properties.delivery_tag, properties.delivery_info
    sent = cjson.encode({sent.exchange, sent.routing_key})
    redis.call('HSET', KEYS[1], tag, '[' .. job .. ',' .. sent:sub(2))
    redis.call('ZADD', KEYS[2], ARGV[1], tag)
end
for i = 3, #KEYS do
    local job = redis.call('RPOP', KEYS[i])
    if job and pcall(reserve, job) then
        return {KEYS[i], job}
    elseif job then
        redis.call('LPUSH', KEYS[i] .. '.invalid', job)
        return redis.error_reply('INVALID ' .. KEYS[i])
    end
end
"""
FAILED = """
SELECT id, concat_ws(
    ' ', at::timestamptz(0), name, left(args #>> '{}', 200), left(kwargs #>> '{}', 200),
    error
) FROM failed_tasks ORDER BY at
"""
MAX_WAIT = 0.1  # seconds until a worker checks its other queues and priorities


def _is_stopping() -> bool:
    return state.should_stop is not None or state.should_terminate is not None


class QoS(redis.QoS):
    """Leave the record of unacknowledged jobs to the script."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ended: set[str] = set()  # jobs whose acknowledgement was rejected

    @property
    def restore_at_shutdown(self) -> bool:  # type: ignore[override]
        # If the connection is lost, Kombu would restore the jobs over the same one.
        # The error would stop the worker.
        return _is_stopping()

    def append(self, message: Any, delivery_tag: str) -> None:
        super(redis.QoS, self).append(message, delivery_tag)

    @contextmanager
    def pipe_or_acquire(self, pipe: Any = None, client: Any = None) -> Iterator[Any]:
        channel: Any = self.channel
        with channel.conn_or_acquire(client) as conn:
            # A full server rejects transactions.
            yield pipe or conn.pipeline(transaction=False)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        with suppress(ResponseError):  # Only jobs that end empty a full server.
            super().restore_visible(*args, **kwargs)


class Channel(redis.Channel):
    """A channel to Redis that loses no job when its worker is killed.

    Kombu takes a job with BRPOP and only then notes that it is not acknowledged. This
    channel does both in a script. If the last script found no job, it first waits with
    a BLMOVE that changes nothing.
    """

    QoS = QoS
    _waits = True
    _acknowledges = False  # Clients do not acknowledge the responses of workers.
    _takes = False  # whether the command that was sent is the script

    def _size(self: Any, queue: str) -> int:
        names = [self._q_for_pri(queue, priority) for priority in self.priority_steps]
        with self.conn_or_acquire() as client:
            return sum(map(client.llen, names))

    def _queue_bind(self, exchange: str, *args: Any) -> None:
        try:
            super()._queue_bind(exchange, *args)  # type: ignore[misc]
        except ResponseError as error:  # It is bound since the first start.
            logger.warning("The broker rejects a binding of %s: %s", exchange, error)

    def basic_consume(self, queue: Any, no_ack: Any, *args: Any, **kwargs: Any) -> Any:
        self._acknowledges |= not no_ack
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_ack(self: Any, delivery_tag: str, multiple: bool = False) -> None:
        self.qos.ended.add(delivery_tag)
        if self.connection is not None:  # Otherwise `_move_jobs` acknowledges it.
            with suppress(ResponseError):
                super().basic_ack(delivery_tag, multiple)
                self.qos.ended.discard(delivery_tag)

    def basic_reject(self: Any, delivery_tag: str, requeue: bool = False) -> None:
        if self.connection is not None:  # Otherwise `_move_jobs` requeues the job.
            try:
                super().basic_reject(delivery_tag, requeue)
            except ResponseError:
                if requeue:  # Without `_renew`, any worker requeues it in time.
                    self.qos._delivered.pop(delivery_tag, None)
                else:
                    self.qos.ended.add(delivery_tag)

    def _brpop_start(self: Any, timeout: float | None = None) -> None:
        self._takes = self._acknowledges
        if not self._takes:
            return super()._brpop_start(timeout)  # type: ignore[misc, no-any-return]
        queues = self._queue_cycle.consume(len(self.active_queues))
        keys = [self._q_for_pri(q, p) for p in self.priority_steps for q in queues]
        keys = [self.unacked_key, self.unacked_index_key, *keys]
        keys = [self.global_keyprefix + key for key in keys]
        conn = self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        wait = ("BLMOVE", keys[2], keys[2], "RIGHT", "RIGHT", MAX_WAIT)
        take = ("EVAL", TAKE, len(keys), *keys, time.time())
        commands = [wait, take] if self._waits else [take]
        conn.send_packed_command(conn.pack_commands(commands))

    def _brpop_read(self: Any, **options: Any) -> Any:
        if not self._takes:
            return super()._brpop_read(**options)  # type: ignore[misc]
        waited, self._waits = self._waits, True
        try:
            if waited:
                self.client.parse_response(self.client.connection, "BLMOVE")
        except self.ResponseError:
            time.sleep(MAX_WAIT)  # A full server rejects BLMOVE, but not the script.
        try:
            # The script responds as BRPOP does.
            found = super()._brpop_read(**options)  # type: ignore[misc]
        except self.ResponseError as error:
            if UNABLE.match(str(error)):
                raise ConnectionError(str(error)) from error
            if "INVALID" not in str(error):
                raise
            queue = str(error).split()[-1]
            logger.error("An entry that is not a job is now in %s.invalid", queue)
            return None
        self._waits = False
        return found


class SentinelChannel(Channel, redis.SentinelChannel):
    """The same channel, to the Redis that Sentinel names."""


def _apply(target: Any, args: Any, kwargs: Any, callback: Any, accept: Any) -> None:
    """Run a job, and let it fail if its result cannot be stored."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return target(*args, **kwargs)
        except Reject:
            raise
        except Exception as error:
            # Otherwise Celery never acknowledges the job, and runs one job less.
            request, found = callback.__self__, ExceptionInfo()
            signals.task_failure.send(
                sender=request.task,
                task_id=request.id,
                exception=error,
                args=request.args,
                kwargs=request.kwargs,
                traceback=found.traceback,
                einfo=found,
            )
            return 1, found, 0.0

    apply_target(run, args, kwargs, callback, accept)


thread.apply_target = _apply  # type: ignore[attr-defined]


class Worker:
    """Run the jobs, each in an application context of its own, and manage them.

    When the worker stops, running jobs have `WORKER_DEADLINE` seconds.
    """

    def __init__(self, app: Flask) -> None:
        self.app = app
        self._consumer: Any = None
        logging.getLogger("celery.worker.consumer.consumer").addFilter(_drop_message)

    def get_ready(self) -> FlaskCelery:
        """Return the Celery application, ready for workers and Celery's commands."""
        redis.Transport.Channel = Channel
        redis.SentinelTransport.Channel = SentinelChannel
        end_forks_at_signals()
        signals.worker_ready.connect(self._on_ready, weak=False)
        signals.worker_shutting_down.connect(self._on_signal, weak=False)
        celery = get_celery()
        _add_routed_queues(celery)
        return celery

    def run(self, arguments: tuple[str, ...] = ()) -> None:
        """Run jobs until SIGTERM or SIGINT; wait while the broker is away.

        `arguments` are those of `celery worker`.
        """
        celery = self.get_ready()
        with self.app.app_context():
            # It logs what is wrong. A job that fails is listed in a table.
            while check_readiness() == "migrations pending":
                time.sleep(RECHECK_DELAY)
        concurrency = self.app.config["WORKER_CONCURRENCY"]
        options = ["--pool=threads", f"--concurrency={concurrency}"]
        options += ["--loglevel=WARNING", "--without-gossip", "--without-mingle"]
        options += [f"--hostname={os.getpid()}@%h"]  # A machine may have several.
        if self.app.debug:  # Otherwise each reload would warn of the user root.
            warnings.simplefilter("ignore", SecurityWarning)
        celery.worker_main(["--quiet", "worker", *options, *arguments])
        if not _is_stopping():
            raise click.ClickException("No signal stopped the worker: see the log.")

    def run_waiting(self) -> None:
        """Run the waiting jobs and those that they enqueue, for tests."""
        celery = get_celery()
        with celery.connection_for_read() as conn:
            while message := _next_message(celery, conn.default_channel):
                args, kwargs, embed = message.payload
                request = message.headers | embed | {"is_eager": True}
                found, job = celery.tasks[request["task"]], request["id"]
                trace = trace_task(found, job, args, kwargs, request, app=celery)
                if trace.info and trace.info.state == "RETRY":
                    trace.info.retval.sig.apply_async()
                message.ack()

    def status(self) -> dict[str, int]:
        """Count the jobs that wait, run and have failed, and the workers.

        With Redis, `oldest_seconds` is the time since the oldest waiting job was sent.
        `unacknowledged` counts the jobs that workers have taken, even if they wait for
        their time or the worker was killed. Asking the workers takes `REPLY_TIMEOUT`
        seconds.
        """
        celery = get_celery()
        _add_routed_queues(celery)
        with celery.connection_for_read() as conn:
            status = _waiting(celery, conn)
            inspect = celery.control.inspect(connection=conn, timeout=REPLY_TIMEOUT)
            active = inspect.active() or {}
        status |= {"running": sum(map(len, active.values())), "workers": len(active)}
        return status | {"failed": len(self.failed())}

    def failed(self) -> dict[str, str]:
        """Return the time, the call and the error of each failed job by id."""
        with get_db().cursor() as cursor:
            cursor.execute(FAILED)
            return {job: call for job, call in cursor}

    def retry(self, job: str) -> None:
        """Send a failed job again."""
        with get_db() as db, db.cursor() as cursor:
            cursor.execute(
                "DELETE FROM failed_tasks WHERE id = %s"
                " RETURNING name, args #>> '{}', kwargs #>> '{}'",
                [job],
            )
            for name, args, kwargs in cursor:
                get_celery().send_task(name, loads(args), loads(kwargs), task_id=job)

    def _on_ready(self, sender: Any, **_: object) -> None:
        self._consumer = sender
        channel = sender.task_consumer.channel
        if isinstance(channel, redis.Channel):
            # Celery's own timers stop at SIGTERM, though its jobs still run.
            Thread(target=self._renew, args=[channel], daemon=True).start()

    def _renew(self, channel: Any) -> None:
        """Tell Redis that this worker still has its jobs, however long they take."""
        while True:
            time.sleep(min(channel.visibility_timeout / 4, 10.0))
            with suppress(Exception):  # The broker may be away.
                current = self._consumer.task_consumer.channel
                if current is not channel:
                    self._move_jobs(channel.qos, current)
                    channel = current
                for tag in list(channel.qos.ended):
                    channel.basic_ack(tag)
                if tags := list(channel.qos._delivered):
                    with channel.conn_or_acquire() as client:
                        now = dict.fromkeys(tags, time.time())
                        client.zadd(channel.unacked_index_key, now, xx=True)

    def _move_jobs(self, lost: Any, channel: Any) -> None:
        """Keep the running jobs of a lost connection, and requeue those that wait."""
        active = self._consumer.controller.state.active_requests
        running = {request.message.delivery_tag for request in active}
        for tag, message in lost._delivered.items():
            if tag in lost._dirty | lost.ended:
                channel.qos._quick_append(tag, message)
                channel.basic_ack(tag)
            elif tag in running:
                message.channel = channel
                channel.qos._quick_append(tag, message)
            else:
                channel.basic_reject(tag, requeue=True)

    def _on_signal(self, **_: object) -> None:
        Thread(target=self._force_exit, daemon=True).start()

    def _force_exit(self) -> None:
        time.sleep(self.app.config["WORKER_DEADLINE"])
        # Nothing else stops a thread. Its transaction is rolled back.
        message = "WORKER_DEADLINE has passed; jobs that still run will run again"
        self.app.logger.warning(message)
        with suppress(Exception):  # The broker may be away.
            # This acknowledges the jobs that have ended since the signal.
            self._consumer.hub.close()
            self._consumer.task_consumer.channel.qos.restore_unacked_once()
        os._exit(1)


def _drop_message(record: logging.LogRecord) -> bool:
    """Keep the arguments of a job that cannot be run out of Celery's log line."""
    if "message body" in str(record.msg):
        record.msg = re.split(r"\n| \[", record.msg)[0]
        args: Any = record.args
        record.args = args[: record.msg.count("%")]
    return True


def _add_routed_queues(celery: FlaskCelery) -> None:
    """Let a worker without `--queues` run the jobs of every queue."""
    celery.loader.import_default_modules()
    for name in list(celery.tasks):
        # A function may route by the arguments.
        with suppress(AttributeError, IndexError, TypeError):
            if queue := celery.amqp.router.route({}, name).get("queue"):
                celery.amqp.queues.select_add(queue)


def _next_message(celery: FlaskCelery, channel: Any) -> Any:
    """Return a message that waits, or None. A job may have sent it to any queue."""
    for queue in celery.amqp.queues.values():
        bound = queue(channel)
        bound.declare()
        if message := bound.get():
            return message
    return None


def _waiting(celery: FlaskCelery, conn: Any) -> dict[str, int]:
    channel = conn.default_channel
    queues: list[Any] = [queue(channel) for queue in celery.amqp.queues.values()]
    waiting = sum(queue.queue_declare().message_count for queue in queues)
    if conn.transport.driver_type != "redis":
        return {"waiting": waiting}
    steps = channel.priority_steps
    names = [channel._q_for_pri(queue.name, step) for queue in queues for step in steps]
    oldest = [channel.client.lindex(name, -1) for name in names]
    now = time.time()
    found = [re.search(rb'"sent_at": (\d+)', job or b"") for job in oldest]
    sent = min((int(match[1]) for match in found if match), default=now)
    status = {"waiting": waiting, "oldest_seconds": int(now - sent)}
    return status | {"unacknowledged": channel.client.hlen(channel.unacked_key)}
