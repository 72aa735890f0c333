"""Detect what blocks shutdown, then kill the process.

`flask dev` names the blockers with it. `guard` does what is possible under plain `flask
run --debug`, whose reloader starts a new process only after the old one has exited.

gevent replaces the functions of a module, but not those imported from it before. So
this module works with real threads.
"""

import ctypes
import os
import signal
import sys
import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Iterable
from functools import partial
from time import sleep
from types import FrameType
from typing import Any

from . import say

DEADLINE = 1.0  # seconds for the old process to exit
STANDARD_LIBRARY = os.path.dirname(os.__file__)
UNKNOWN = "an unknown place"
PR_SET_PDEATHSIG = 1
OLD = "The old process"


def guard() -> None:
    """Kill this process when it does not exit in time, or when its parent is gone.

    The timer starts with `threading._shutdown`, which Python calls first when the main
    thread has finished. There, Python waits for threads and for executors.
    """
    remember_thread_origins()
    shutdown = threading._shutdown  # type: ignore[attr-defined]
    running = allocate_lock()
    running.acquire()
    # When Python 3.12.1 calls `_shutdown`, it no longer starts a thread.
    start_new_thread(_kill_at_exit, (running,))

    def shutdown_in_time() -> None:
        running.release()
        threading.excepthook = partial(_silence_server, threading.excepthook)
        shutdown()

    threading._shutdown = shutdown_in_time  # type: ignore[attr-defined]
    exit_with_parent(os.getppid())


def _kill_at_exit(running: Any) -> None:
    running.acquire()
    _kill(DEADLINE, 3)  # Werkzeug starts a new child after code 3.


def kill_after(
    seconds: float, exit_code: int, requests: Iterable[str], name: str = OLD
) -> None:
    """Kill this process, which has that `name` in the message, after so many `seconds`.

    Name what blocks the exit, and the `requests` that have not finished by then.
    """
    start_new_thread(_kill, (seconds, exit_code, requests, name))


def _kill(
    seconds: float, exit_code: int, requests: Iterable[str] = (), name: str = OLD
) -> None:
    sleep(seconds)
    print(describe_blockers(seconds, name), file=sys.stderr, flush=True)
    name_aborted(requests)
    os._exit(exit_code)


def name_aborted(requests: Iterable[str]) -> None:
    """Name the requests, except for those without a name."""
    for request in filter(None, list(requests)):
        say(f" * {request} was aborted by the reload")


def exit_with_parent(parent: int) -> None:
    """Exit as soon as another process than `parent` is the parent of this one."""
    if sys.platform == "linux":
        # On a busy machine, a thread would add milliseconds to each reload.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            return
    start_new_thread(_await_orphanage, (parent,))


def _await_orphanage(parent: int) -> None:
    while os.getppid() == parent:
        sleep(0.2)
    os._exit(1)  # Otherwise the orphan keeps the port open.


def _silence_server(hook: Callable[..., Any], args: threading.ExceptHookArgs) -> None:
    # The socket is closed while the thread still selects on it, which is WinError 10038
    # on Windows. The error means nothing once the process is exiting.
    serving = args.thread and "serve_forever" in args.thread.name
    if not (serving and issubclass(args.exc_type, (OSError, ValueError))):
        hook(args)


def remember_thread_origins() -> None:
    """Remember where each thread that Python would wait for is started."""
    start = threading.Thread.start

    def remember_and_start(self: threading.Thread) -> None:
        caller = sys._getframe(1)
        if not self.daemon or caller.f_code.co_filename.endswith("futures/thread.py"):
            vars(self)["_origin"] = _place(caller)
        start(self)

    threading.Thread.start = remember_and_start  # type: ignore[method-assign]


def describe_blockers(deadline: float, name: str = OLD) -> str:
    """Name what blocked the exit for `deadline` seconds, and say how to cure it."""
    main = threading.main_thread()
    threads = [each for each in threading.enumerate() if each is not main]
    # Python waits for an executor even if a daemon thread, as of a request, uses it.
    lines = [_about_thread(t) for t in threads if not t.daemon or _is_executor(t)]
    # Only an application that has imported the module can have any.
    multiprocessing = sys.modules.get("multiprocessing.process")
    children = multiprocessing.active_children() if multiprocessing else []
    lines += [_about_process(each) for each in children if not each.daemon]
    if not lines:
        hook = f"An exit hook (atexit) is still running, at {position(main)}"
        lines.append(f"   {hook}. Let it wait with a deadline.")
    title = f" * {name} did not exit within {deadline:g} s and was killed."
    return "\n".join([title, *lines])


def _about_thread(thread: threading.Thread) -> str:
    if _is_executor(thread):
        kind = "works for an executor"
        cure = "Call shutdown(wait=False, cancel_futures=True), or keep its jobs short."
    else:
        kind, cure = "is not a daemon thread", "Start it with daemon=True."
    return (
        f"   Thread {thread.name!r} {kind}, so Python waits for it. It was started at"
        f" {vars(thread).get('_origin', UNKNOWN)} and is now at {position(thread)}."
        f" {cure}"
    )


def _is_executor(thread: threading.Thread) -> bool:
    executors = sys.modules.get("concurrent.futures.thread")
    return thread in getattr(executors, "_threads_queues", ())


def _about_process(process: Any) -> str:
    return (
        f"   Process {process.name!r} (pid {process.pid}) is not a daemon process, so"
        " Python waits for it. Start it with daemon=True."
    )


def position(thread: threading.Thread) -> str:
    """Return the line that the thread is at."""
    return _place(sys._current_frames().get(thread.ident or 0))


def _place(frame: FrameType | None) -> str:
    """Return the innermost line of the stack that is not Python's own.

    Below an exit hook in C or in the standard library is a line of this package.
    """
    if frame is None:
        return UNKNOWN
    found: FrameType | None = frame
    while found and found.f_code.co_filename.startswith((STANDARD_LIBRARY, "<frozen")):
        found = found.f_back
    if found is None or found.f_code.co_filename.startswith(os.path.dirname(__file__)):
        found = frame
    file = found.f_code.co_filename.removeprefix(os.path.join(os.getcwd(), ""))
    return f"{file}:{found.f_lineno} in {found.f_code.co_name}"
