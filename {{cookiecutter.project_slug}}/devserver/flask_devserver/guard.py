"""What keeps an old version from ending, and its end by force.

`install` does what can be done under plain `flask run --debug`, whose reloader starts
the new process once the old one has ended, and leaves that to the old one. `flask dev`
does better, and uses from here what names the culprit.
"""

import os
import sys
import threading
import time
from types import FrameType
from weakref import WeakKeyDictionary

DEADLINE = 1.0  # seconds for the old process to end
STARTS: WeakKeyDictionary[threading.Thread, str] = WeakKeyDictionary()


def install() -> None:
    """Guard this process, if it is the one that Werkzeug's reloader has started.

    It ends by force when it does not end by itself, and when its parent is gone.
    """
    reloaded = os.environ.get("WERKZEUG_RUN_MAIN") == "true"
    if reloaded and "FLASK_DEV" not in os.environ and not _is_installed():
        remember_starts()
        _quieten_server_thread()
        args = [threading.main_thread(), os.getppid()]
        threading.Thread(target=_guard, args=args, name="guard", daemon=True).start()


def _is_installed() -> bool:
    return "guard" in {thread.name for thread in threading.enumerate()}


def _guard(main: threading.Thread, parent: int) -> None:
    while main.is_alive():
        main.join(0.2)
        if os.getppid() != parent:
            os._exit(1)  # or it would keep the port for good
    time.sleep(DEADLINE)
    print(what_blocks(DEADLINE), file=sys.stderr, flush=True)
    os._exit(3)  # which tells the reloader to start the new version


def _quieten_server_thread() -> None:
    hook, main = threading.excepthook, threading.main_thread()

    def quiet_hook(args: threading.ExceptHookArgs) -> None:
        # The socket is closed under the thread that still selects on it: on Windows
        # that is WinError 10038. It means nothing once the process is ending.
        serving = args.thread and "serve_forever" in args.thread.name
        over = not main.is_alive() and issubclass(args.exc_type, (OSError, ValueError))
        if not (serving and over):
            hook(args)

    threading.excepthook = quiet_hook


def remember_starts() -> None:
    """Let each thread that Python would wait for remember where it was started."""
    start = threading.Thread.start

    def remember_and_start(self: threading.Thread) -> None:
        if not self.daemon:
            STARTS[self] = _place(sys._getframe(1))
        start(self)

    threading.Thread.start = remember_and_start  # type: ignore[method-assign]


def what_blocks(deadline: float) -> str:
    """Say what kept the process for `deadline` seconds, and what to do about it."""
    lines = [f" * The old version did not end in {deadline:g} s and is ended by force."]
    main = threading.main_thread()
    threads = [each for each in threading.enumerate() if not each.daemon]
    lines += [_about_thread(each) for each in threads if each is not main]
    if len(lines) == 1:
        lines.append(
            f"   An exit hook (atexit) takes so long, at {_stand(main)}. Let it wait"
            " with a deadline."
        )
    return "\n".join(lines)


def _about_thread(thread: threading.Thread) -> str:
    return (
        f"   Thread {thread.name!r} is no daemon, so Python waits for it. It was"
        f" started at {STARTS.get(thread, 'an unknown place')}, and stands at"
        f" {_stand(thread)}. Start it with daemon=True."
    )


def _stand(thread: threading.Thread) -> str:
    return _place(sys._current_frames().get(thread.ident or 0))


def _place(frame: FrameType | None) -> str:
    """Return the innermost line of the stack that is not Python's own."""
    if frame is None:
        return "an unknown place"
    found: FrameType | None = frame
    while found and found.f_code.co_filename.startswith(os.path.dirname(os.__file__)):
        found = found.f_back
    code = (found or frame).f_code
    file = code.co_filename.removeprefix(os.path.join(os.getcwd(), ""))
    return f"{file}:{(found or frame).f_lineno} in {code.co_name}"
