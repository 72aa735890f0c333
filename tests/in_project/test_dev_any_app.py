"""`flask dev` on applications that do to a server whatever an application may do."""

import json
import os
import pty
import re
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from errno import EAGAIN
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import flask_devserver
import psutil
import pytest

from .dev_site import BOTH, Site, linux


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    site.write()
    yield site
    site.kill()


POOL = """
import multiprocessing

@app.get("/pool")
def pool():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return str(pool.map(abs, [-1, -2]))
"""
FORK = """
import os, signal

@app.get("/fork")
def fork():
    reading, writing = os.pipe()
    if os.fork() == 0:
        found = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        sockets = [fd for fd in os.listdir("/proc/self/fd") if is_listener(int(fd))]
        os.write(writing, repr((found, signal.set_wakeup_fd(-1), sockets)).encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    return os.read(reading, 1000).decode()

def is_listener(fd):
    import socket
    try:
        found = socket.socket(fileno=os.dup(fd))
    except OSError:
        return False
    return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
"""
FORK_IN_FORK = """
import os

@app.get("/fork")
def fork():
    if os.fork() == 0:
        file = os.open("data.txt", os.O_CREAT | os.O_RDWR)  # the listener's number
        if os.fork() == 0:
            os.write(file, b"written")
            os._exit(0)
        os.wait()
        os._exit(0)
    os.wait()
    return open("data.txt").read()
"""


@BOTH
def test_pool_of_processes_works_in_a_view(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(POOL)
    site.start(*options)
    for _ in range(3):
        assert site.get("/pool", 30) == "[1, 2]"
        site.reload()
    assert "exited (" not in site.log


# A process of a pool may get SIGTERM at any moment of its fork.
EARLY = """
import os, signal, time

@app.get("/early")
def early():
    codes = set()
    for _ in range(200):
        if child := os.fork():
            os.kill(child, signal.SIGTERM)
            codes.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:
            time.sleep(1)
            os._exit(0)
    return str(codes)
"""


@BOTH
def test_signal_to_a_new_fork_ends_it(site: Site, options: tuple[str, ...]) -> None:
    site.write(EARLY)
    site.start(*options)
    assert site.get("/early", 60) == "{-15}"
    assert "exited (" not in site.log


@linux
@BOTH
def test_fork_of_the_application_inherits_nothing(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(FORK)
    site.start(*options)
    default = "<Handlers.SIG_DFL: 0>, <built-in function default_int_handler>"
    assert site.get("/fork") == f"(({default}), -1, [])"
    site.reload()


@BOTH
def test_fork_in_a_fork_keeps_its_files(site: Site, options: tuple[str, ...]) -> None:
    site.write(FORK_IN_FORK)
    site.start(*options)
    assert site.get("/fork") == "written"


def limited(watches: int) -> tuple[str, ...]:
    """Return what runs a command with so many inotify watches."""
    script = f'echo {watches} > /proc/sys/user/max_inotify_watches; exec "$@"'
    return ("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh")


@linux
def test_folders_that_do_not_matter_are_not_watched(site: Site) -> None:
    for number in range(100):
        (site.folder / "node_modules" / str(number)).mkdir(parents=True)
    (site.folder / "templates").mkdir()
    site.prefix = limited(50)
    site.start()
    assert site.reloads_after("templates/page.html", "1")
    site.reload()
    assert "can be watched" not in site.log


@linux
@BOTH
def test_without_watches_each_save_is_found(
    site: Site, options: tuple[str, ...]
) -> None:
    site.prefix = limited(0)
    site.start(*options)
    site.wait_for_line("Not all folders can be watched (No space left on device")
    for _ in range(3):  # The second save of a second, with an older time, too.
        site.reload()
        site.save()
        os.utime(site.module, (1, 1))
        site.wait_for(site.is_new, "response of the second save")


def test_output_reaches_a_file_however_a_version_ends(site: Site) -> None:
    for number in range(4):
        end = "; import os, signal" * (number == 2)
        site.write(f"print('line of {number}'){end}\n")
        if number == 0:
            site.start()
        site.reload()
        site.wait_for_line(f"line of {number}")
    site.write("import ctypes\nctypes.CDLL(None).puts(b'line of C')\n")
    site.reload()
    site.write("print('partial', end='')\n")
    site.reload()
    site.wait_for_line("line of C")
    site.interrupt()
    assert "partial" in site.log


SUBPROCESS = """
import subprocess
started = subprocess.Popen(["sleep", "1234"], start_new_session=SESSION)

@app.get("/started")
def pid():
    return str(started.pid)
"""


@linux
@BOTH
@pytest.mark.parametrize("end", ["reload", "interrupt"])
def test_program_that_the_application_started_ends_with_it(
    site: Site, options: tuple[str, ...], end: str
) -> None:
    site.write(SUBPROCESS.replace("SESSION", "False"))
    site.start(*options)
    program = psutil.Process(int(site.get("/started")))
    getattr(site, end)()
    site.wait_for(lambda: not program.is_running(), "end of the program")


# A server that needs its port, such as that of Vite, here with a folder as a lock.
HELPER = """
import subprocess
subprocess.Popen(["sh", "-c", '''
mkdir lock || exit 1
trap "rmdir lock; exit" TERM
while :; do sleep 0.05; done
'''])
"""


@linux
@BOTH
def test_program_finds_the_port_of_the_previous_one_free(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(HELPER)
    site.start(*options)
    for _ in range(3):
        site.reload()
    site.wait_for((site.folder / "lock").exists, "program")
    assert "File exists" not in site.log


@linux
def test_program_in_a_session_of_its_own_is_named(site: Site) -> None:
    site.write(SUBPROCESS.replace("SESSION", "True"))
    site.start()
    program = psutil.Process(int(site.get("/started")))
    site.reload()
    site.wait_for_line(
        f"Left running in its own session: sleep 1234 (pid {program.pid})"
    )
    program.kill()
    site.wait_for(lambda: not program.is_running(), "end of the program")


@linux
@BOTH
def test_name_that_is_not_text_does_no_harm(
    site: Site, options: tuple[str, ...]
) -> None:
    site.environ["PYTHONIOENCODING"] = "ascii"
    site.start(*options)
    Path(os.fsdecode(os.fsencode(site.folder) + b"/caf\xe9.pdf")).touch()
    site.reload()
    Path(os.fsdecode(os.fsencode(site.folder) + b"/caf\xe9.py")).touch()
    site.wait_for_line("udce9.py")
    (site.folder / "café.py").touch()
    site.wait_for_line("xe9.py")
    site.reload()


EXECUTOR = """
import time
from concurrent.futures import ThreadPoolExecutor
executor = ThreadPoolExecutor(1)
executor.submit(time.sleep, 40)
"""
PROCESS = """
import multiprocessing, time
multiprocessing.get_context("fork").Process(target=time.sleep, args=[40]).start()
"""


@pytest.mark.parametrize("command", [("run", "--debug"), ("dev",)], ids=" ".join)
def test_executor_that_blocks_the_reload_is_named(
    site: Site, command: tuple[str, ...]
) -> None:
    site.write(EXECUTOR)
    site.start(command=command)
    site.write()
    site.save()
    site.wait_for(site.is_new, "response")
    assert "Thread 'ThreadPoolExecutor-0_0' works for an executor" in site.log
    assert "It was started at served.py:14" in site.log


def test_process_that_blocks_the_reload_is_named(site: Site) -> None:
    site.write(PROCESS)
    site.start()
    site.reload()
    assert "Process 'ForkProcess-1' (pid" in site.log


@BOTH
def test_every_loaded_file_is_watched(
    site: Site, options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "library.py").write_text("VALUE = 0\n")
    (elsewhere / "target.py").write_text("VALUE = 0\n")
    (site.folder / "linked.py").symlink_to(elsewhere / "target.py")
    for name in ("instance", "templates", "static"):
        (site.folder / name).mkdir()
    (site.folder / "instance" / "__init__.py").touch()
    (site.folder / "instance" / "data.json").write_text("0")
    (site.folder / "templates" / "page.htm").touch()
    (site.folder / "static" / "image.png").touch()
    (site.folder / "notes.txt").touch()
    site.put_on_path(elsewhere)
    site.write("import instance, library, linked\n")
    site.start(*options, "--watch", "notes.txt")
    assert site.reloads_after(str(elsewhere / "library.py"), "VALUE = 1\n")
    assert site.reloads_after("instance/__init__.py", "VALUE = 1\n")
    assert site.reloads_after("templates/page.htm", "1")
    assert site.reloads_after("templates/new.svg", "1")
    assert site.reloads_after("static/image.png", "1")
    assert site.reloads_after("notes.txt", "1")
    before = site.log.count("linked.py")
    (elsewhere / "target.py").write_text("VALUE = 1\n")
    site.wait_for(lambda: site.log.count("linked.py") > before, "reload of the link")


def test_file_of_an_installed_package_is_served_as_it_is(
    site: Site, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import click

    environment = tmp_path_factory.mktemp("environment")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True
    )
    [packages] = environment.glob("lib/python*/site-packages")
    ours = [Path(click.__file__).parents[1], Path(flask_devserver.__file__).parents[1]]
    (packages / "others.pth").write_text("\n".join(map(str, ours)))
    (packages / "library.py").write_text("VALUE = 0\nprint('imported')\n")
    site.write("import library\n@app.get('/value')\ndef v(): return str(library.VALUE)")
    site.prefix = [str(environment / "bin" / "python"), "-c", RUN_OTHER]
    site.start()
    site.wait_for(lambda: site.log.count("imported") == 2, "import for the next fork")
    (packages / "library.py").write_text("VALUE = 1\n")
    site.wait_for(lambda: site.get("/value") == "1", "new value")
    site.reload()
    assert site.get("/value") == "1"


# The first argument is the Python of another environment, which this one replaces.
RUN_OTHER = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"


WRITES = """
import pathlib, sqlite3
pathlib.Path("static").mkdir(exist_ok=True)

@app.get("/upload")
def upload():
    with open("static/upload.svg", "a") as file:
        file.write("1")
    for path in ("static/data.db", "file:static/more.db?mode=rwc"):
        with sqlite3.connect(path, uri=True) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("CREATE TABLE IF NOT EXISTS t (i)")
            db.execute("INSERT INTO t VALUES (1)")
        db.close()
    return "done"
"""


@BOTH
def test_files_written_by_the_application_reload_nothing(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(WRITES)
    site.start(*options)
    for _ in range(3):
        assert site.get("/upload") == "done"
        time.sleep(1.5)  # longer than from one scan to the next
    assert "Reloaded" not in site.log
    site.reload()


def test_excluded_files_reload_nothing(site: Site) -> None:
    site.start("--exclude-patterns", "*/other.py", "--extra-files", "extra")
    assert not site.reloads_after("other.py", "", seconds=3)
    assert site.reloads_after("extra", "")


@BOTH
def test_save_while_the_server_is_stopped_is_not_lost(
    site: Site, options: tuple[str, ...]
) -> None:
    site.start(*options)
    assert site.process
    for each in [site.process, *site.process.children()]:
        each.suspend()
    site.save()
    for each in [site.process, *site.process.children()]:
        each.resume()
    site.wait_for(site.is_new, "response")


SLOW_IN_SUPERVISOR = """
import os, time
if "_FLASK_DEV" not in os.environ:
    print("importing")
    time.sleep(9)
"""


def test_interrupt_while_packages_are_imported_ends_at_once(
    site: Site, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packages = tmp_path_factory.mktemp("environment") / "site-packages"
    packages.mkdir()
    (packages / "slow.py").write_text(SLOW_IN_SUPERVISOR)
    site.put_on_path(packages)
    site.write("import slow\n")
    site.start()
    site.wait_for_line("importing")
    start = time.monotonic()
    site.interrupt()
    assert time.monotonic() - start < 7
    assert "Traceback" not in site.log


# A user may have too many processes. Forking fails as long as a file exists.
NO_FORK = """
import os
from errno import EAGAIN
for name in ("fork", "posix_spawn"):
    def start(*args, original=getattr(os, name), **options):
        if os.path.exists("instance/full"):
            raise OSError(EAGAIN, os.strerror(EAGAIN))
        return original(*args, **options)
    setattr(os, name, start)
"""


@BOTH
def test_version_that_cannot_be_started_is_started_later(
    site: Site, options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    packages = tmp_path_factory.mktemp("packages")
    (packages / "sitecustomize.py").write_text(NO_FORK)
    site.put_on_path(packages)
    site.start(*options)
    full = site.folder / "instance" / "full"
    full.parent.mkdir()
    full.touch()
    site.save()
    site.wait_for_line(
        f"The application cannot start, and tries again: [Errno {EAGAIN}"
    )
    full.unlink()
    site.wait_for(site.is_new, "response of the new version")
    site.interrupt()
    assert "Traceback" not in site.log


NEW_NAME = """
RequestHandler.version_string = lambda self: "New"
"""


def test_saved_development_server_is_used(site: Site) -> None:
    copy = site.folder / "flask_devserver"
    subprocess.run(["cp", "-r", str(Path(flask_devserver.__file__).parent), copy])
    site.start()
    server = copy / "server.py"
    server.write_text(
        server.read_text() + "\nWSGIRequestHandler.server_version = 'New'"
    )
    site.wait_for_line("starting again")

    def version() -> str | None:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{site.port}/version") as it:
            return str(it.headers["Server"])
        return None

    site.wait_for(lambda: "New" in (version() or ""), "new server")


BREAKPOINT = """
@app.get("/debug")
def debug():
    breakpoint()
    return "done"
"""


@pytest.mark.parametrize("end", ["reload", "interrupt"])
def test_terminal_is_as_before_after_a_breakpoint(site: Site, end: str) -> None:
    terminal, inside = pty.openpty()
    before = termios.tcgetattr(inside)
    site.write(BREAKPOINT)
    site.stdin = inside
    site.prefix = [sys.executable, "-c", TAKE_TERMINAL]
    site.start()
    Thread(target=site.get, args=["/debug"], daemon=True).start()
    site.wait_for_line("(Pdb)")
    changed = termios.tcgetattr(inside)
    changed[3] &= ~(termios.ECHO | termios.ICANON)  # as readline does at its prompt
    termios.tcsetattr(inside, termios.TCSANOW, changed)
    getattr(site, end)()
    site.wait_for(lambda: termios.tcgetattr(inside) == before, "terminal as before")
    os.close(inside)
    os.close(terminal)


TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_server_outlives_its_shell_under_nohup(site: Site) -> None:
    site.prefix = ["nohup", "sh", "-c", '"$@" & wait', "sh"]
    site.start()
    assert site.process
    [server] = site.process.children()
    site.process.kill()
    site.process.wait()
    time.sleep(1)  # It looks for its parent twice a second.
    site.reload()
    server.terminate()
    site.wait_for(lambda: not site.get("/version"), "end")


def test_end_with_the_shell_is_explained(site: Site) -> None:
    site.prefix = ["sh", "-c", '"$@" & wait', "sh"]
    site.start()
    assert site.process
    site.process.kill()
    site.wait_for_line("The parent of flask dev has exited")
    site.wait_for(lambda: not site.get("/version"), "end")


@BOTH
def test_options_of_the_interpreter_stay(site: Site, options: tuple[str, ...]) -> None:
    site.write(
        "import sys\n@app.get('/flags')\n"
        "def flags(): return f'{sys.flags.optimize} {sys._xoptions} {sys.warnoptions}'"
    )
    site.prefix = [sys.executable, "-c", RUN_WITH_OPTIONS]
    site.start(*options)
    for _ in range(2):
        assert site.get("/flags") == "1 {'utf8': True} ['ignore']"
        site.reload()


RUN_WITH_OPTIONS = """
import os, sys
options = ["-O", "-X", "utf8", "-W", "ignore"]
os.execv(sys.executable, [sys.executable, *options, *sys.argv[2:]])
"""


INTERRUPTED = """
import glob, signal
numbers = iter(range(10**9))

def interrupt(*_):
    open(f"log.{next(numbers)}", "w").close()
    signal.setitimer(signal.ITIMER_REAL, .0005)  # later than a slow file

signal.signal(signal.SIGALRM, interrupt)
interrupt()
for name in glob.glob("data/*"):
    open(name).close()
"""


@BOTH
def test_signals_may_interrupt_a_long_message(
    site: Site, options: tuple[str, ...]
) -> None:
    (site.folder / "data").mkdir()
    for number in range(1500):
        (site.folder / "data" / f"{number:0100}.cfg").touch()
    site.write(INTERRUPTED)
    site.start(*options)
    site.reload()


LAZY = """
import sys
from types import ModuleType

class Lazy(ModuleType):
    def __getattr__(self, name):
        raise ImportError(name)

sys.modules["lazy"] = Lazy("lazy")
"""


@BOTH
def test_module_may_fail_when_it_is_inspected(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(LAZY)
    site.start(*options)
    site.check_stays(1)  # Meanwhile it inspects all modules.
    (site.folder / "part.py").write_text("")
    assert site.reloads_after("part.py", "1")
    assert "Traceback" not in site.log


def test_options_are_those_of_flask_run(site: Site) -> None:
    flask = [sys.executable, "-m", "flask", "--app", "served"]
    options = {"cwd": site.folder, "capture_output": True, "text": True}
    texts = []
    for command in ("run", "dev"):
        done = subprocess.run([*flask, command, "--help"], **options)
        texts.append(set(re.findall(r"--[a-z-]+", done.stdout)))
        assert "[default: 5000" in done.stdout or command == "run"
    assert texts[0] <= texts[1]
    done = subprocess.run([*flask, "dev", "--port", "70000"], **options)
    assert done.returncode == 2
    assert "70000 is not in the range" in done.stderr


@pytest.mark.parametrize(
    "host, reached, url",
    [
        ("::", ["127.0.0.1", "::1"], "http://[::1]"),
        ("::1", ["::1"], "http://[::1]"),
        ("0.0.0.0", ["127.0.0.1"], "http://127.0.0.1"),
        ("localhost", ["127.0.0.1"], "http://localhost"),
    ],
)
def test_host_is_read_as_in_flask_run(
    site: Site, host: str, reached: list[str], url: str
) -> None:
    site.environ |= {"FLASK_RUN_HOST": host}
    site.start() if "127.0.0.1" in reached else start_elsewhere(site)
    for address in reached:
        socket.create_connection((address, site.port), timeout=5).close()
    site.wait_for_line(f"Serving {url}:{site.port};")


def start_elsewhere(site: Site) -> None:
    """Start the server where this test's requests do not reach it."""
    site.wait_for = lambda condition, what: None  # type: ignore[method-assign]
    site.start()
    del site.wait_for
    site.wait_for_line("Serving")


@BOTH
def test_arguments_are_those_of_the_command(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write("import sys\n@app.get('/argv')\ndef argv(): return sys.argv[1:]\n")
    site.start(*options)
    assert json.loads(site.get("/argv"))[:3] == ["--app", "served", "dev"]


def test_debugger_takes_requests_for_the_host(site: Site) -> None:
    site.write("@app.get('/error')\ndef error(): 1 / 0\n")
    site.environ |= {"FLASK_RUN_HOST": "0.0.0.0"}
    site.start()
    [secret] = re.findall('SECRET = "(.*?)"', site.get("/error"))
    connection = HTTPConnection("127.0.0.1", site.port, timeout=5)
    path = f"/error?__debugger__=yes&cmd=printpin&s={secret}"
    connection.request("GET", path, headers={"Host": "0.0.0.0"})
    assert connection.getresponse().status == 200


@BOTH
def test_exit_at_import_shows_a_page(site: Site, options: tuple[str, ...]) -> None:
    site.start(*options)
    site.write("import sys; sys.exit('no settings')\n")
    site.wait_for(lambda: "SystemExit" in site.get("/version"), "page with the exit")
    assert "no settings" in site.get("/version")
    connection = HTTPConnection("127.0.0.1", site.port, timeout=5)
    connection.request("GET", "/version", headers={"Host": "other.example"})
    page = connection.getresponse().read()
    assert b"SecurityError" in page and b"no settings" not in page
    site.write()
    site.reload()


@BOTH
def test_page_of_a_syntax_error_begins_in_the_application(
    site: Site, options: tuple[str, ...]
) -> None:
    site.start(*options)
    site.module.write_text("def broken(:\n")
    site.wait_for(lambda: "SyntaxError" in site.get("/version"), "page of the error")
    files = re.findall('<cite class="filename">"(.*?)"', site.get("/version"))
    assert [path for path in files if "flask_devserver" in path] == []
    assert "flask_devserver" not in site.log
    assert site.log.count("SyntaxError") == 1
    site.write()
    site.reload()


SLOW = """
import time

@app.get("/slow/<float:seconds>")
def slow(seconds):
    print("started", flush=True)
    time.sleep(seconds)
    return f"version {VERSION}"
"""


@BOTH
def test_request_in_flight_is_finished(site: Site, options: tuple[str, ...]) -> None:
    site.write(SLOW)
    site.start(*options, "--deadline", "20")
    found: list[str] = []
    thread = Thread(target=lambda: found.append(site.get("/slow/6.0", seconds=20)))
    thread.start()
    site.wait_for_line("started")
    site.reload()
    assert found == []  # The new version does not wait for the request.
    thread.join()
    assert found == ["version 0"]
    assert "aborted" not in site.log


LOCK = """
import fcntl
lock = open("lock.tmp", "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


@BOTH
def test_application_may_need_what_the_previous_version_still_has(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(SLOW + LOCK)
    site.start(*options)
    for number in range(1, 4):
        thread = Thread(target=site.get, args=["/slow/0.6"])
        thread.start()
        site.wait_for(lambda n=number: site.log.count("started") == n, "request")
        site.reload()
        thread.join()


@BOTH
def test_request_beyond_the_deadline_is_named(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(SLOW)
    site.start(*options)
    Thread(target=site.get, args=["/slow/30.0"], daemon=True).start()
    site.wait_for_line("started")
    site.reload()
    site.wait_for_line(" * GET /slow/30.0 was aborted by the reload")


CONVERT = """
import subprocess

@app.get("/convert/<name>")
def convert(name):
    print("started", flush=True)
    command = f"for i in 1 2 3 4 5 6 7; do echo >> static/{name}; sleep 0.4; done"
    subprocess.run(["sh", "-c", command])
    return "done"
"""


@BOTH
def test_request_whose_program_writes_data_is_finished(
    site: Site, options: tuple[str, ...]
) -> None:
    (site.folder / "static").mkdir()
    (site.folder / "static" / "old.mp4").touch()
    site.write(CONVERT)
    site.start(*options)
    for name in ("new.mp4", "old.mp4"):
        assert site.get(f"/convert/{name}", 20) == "done"
    assert "aborted" not in site.log
    site.reload()


ASYNCHRONOUS = """
from concurrent.futures import ThreadPoolExecutor

@app.get("/async/<float:seconds>")
def run(seconds):  # as Flask runs a view with `async`
    return ThreadPoolExecutor(1).submit(slow, seconds).result()
"""


@BOTH
def test_request_that_finishes_after_the_deadline_is_not_named(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(SLOW + ASYNCHRONOUS)
    site.start(*options)
    with ThreadPoolExecutor(2) as threads:
        for number, seconds in enumerate([1.5, 30.0]):
            request = threads.submit(site.get, f"/async/{seconds}", 30)
            site.wait_for(lambda n=number: site.log.count("started") > n, "request")
            site.reload()
            assert request.result() == ("version 0" if seconds < 2 else "")
    site.wait_for_line(" * GET /async/30.0 was aborted by the reload")
    assert site.log.count("aborted") == 1
    assert "works for an executor, so Python waits for it." in site.log


@linux
@BOTH
def test_connection_made_before_the_reload_works_after_it(
    site: Site, options: tuple[str, ...]
) -> None:
    site.start(*options)
    connection = HTTPConnection("127.0.0.1", site.port, timeout=5)
    connection.connect()
    time.sleep(0.3)  # long enough for a server that would accept it
    site.reload()
    connection.request("GET", "/version")
    assert connection.getresponse().read() == b"1"


@linux
def test_orphans_leave_no_zombies(site: Site) -> None:
    site.write("import os\nos.system('sleep 0.5 & sleep 0.6 &')\n")
    site.start()
    assert site.process
    process = site.process
    site.wait_for(lambda: len(process.children()) == 3, "orphans")
    site.wait_for(lambda: len(process.children()) == 1, "end of the orphans")


COMMAND = """
import signal, time

@app.cli.command("work")
def work():
    def end(number, frame):
        print("signal", signal.Signals(number).name, flush=True)
        ends.append(number)
    ends = []
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    print("working", flush=True)
    while not ends:
        time.sleep(0.1)
    time.sleep(1.5)
    print("finished", flush=True)
"""


@BOTH
def test_command_gets_one_signal_and_its_time(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(COMMAND)
    site.start(*options, "--with", "work")
    site.wait_for_line("working")
    site.interrupt()
    assert re.findall("signal .*|finished", site.log) == ["signal SIGTERM", "finished"]


PAUSE = """
import time

@app.cli.command("pause")
def pause():
    breakpoint()
    print("resumed", flush=True)
    time.sleep(60)
"""


@BOTH
def test_breakpoint_in_a_command_takes_input(
    site: Site, options: tuple[str, ...]
) -> None:
    terminal, inside = pty.openpty()
    site.write(PAUSE)
    site.stdin = inside
    site.prefix = [sys.executable, "-c", TAKE_TERMINAL]
    site.start(*options, "--with", "pause")
    site.wait_for_line("(Pdb)")
    os.write(terminal, b"continue\n")
    site.wait_for_line("resumed")
    os.close(inside)
    os.close(terminal)


CRASH = """
import ctypes

@app.get("/crash")
def crash():
    ctypes.string_at(0)
"""


@linux
@BOTH
def test_application_that_crashed_is_started_again(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(CRASH)
    site.start(*options)
    site.get("/crash")
    site.wait_for(lambda: site.get("/version"), "response after the crash")
    assert "The application exited (SIGSEGV): it starts again" in site.log
    site.reload()


ENDLESS = "while True:\n    pass\n"


HANDLER = """
import signal

def write(*_):
    open("written.py", "w").close()

signal.signal(signal.SIGALRM, write)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for _ in range(3000):
    write()
signal.setitimer(signal.ITIMER_REAL, 0)
"""


@BOTH
def test_signal_handler_may_write_files(site: Site, options: tuple[str, ...]) -> None:
    site.write(HANDLER)
    site.start(*options)
    site.reload()


@BOTH
def test_import_without_an_end_is_named(site: Site, options: tuple[str, ...]) -> None:
    site.start(*options)
    site.module.write_text(ENDLESS)
    site.wait_for_line(" * The application is still being imported, at served.py:")
    site.write()
    site.reload()


@BOTH
@pytest.mark.parametrize("streams", [">&-", "0<&- >&- 2>&-", "2>&1 | head -1"])
def test_streams_may_be_closed(
    site: Site, options: tuple[str, ...], streams: str
) -> None:
    site.prefix = ["sh", "-c", f'"$@" {streams}', "sh"]
    site.start(*options)
    site.reload()
    site.reload()


HANDLERS = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
"""


@BOTH
def test_package_with_signal_handlers_changes_nothing(
    site: Site, options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    packages = tmp_path_factory.mktemp("environment") / "site-packages"
    packages.mkdir()
    (packages / "library.py").write_text(f"{HANDLERS}\nprint('imported')\n")
    site.put_on_path(packages)
    site.write("import library\n")
    site.start(*options)
    # Without a fork, the supervisor imports no package.
    imports = 1 if options else 2
    site.wait_for(lambda: site.log.count("imported") == imports, "import")
    site.reload()
    site.reload()
    site.interrupt()


ACCELERATED = """
import library, {name}

@app.get("/first")
def first():
    return {name}.first
"""


@pytest.mark.parametrize("name", ["_library", "accelerator"])
def test_packages_are_imported_in_the_order_of_the_application(
    site: Site, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """In another order, asyncio does not work on Python 3.12 and later."""
    packages = tmp_path_factory.mktemp("environment") / "site-packages"
    packages.mkdir()
    (packages / "library.py").write_text(f"import {name}\nprint('imported')\n")
    text = "import sys\nfirst = str('library' not in sys.modules)\n"
    (packages / f"{name}.py").write_text(text)
    site.put_on_path(packages)
    site.write(ACCELERATED.format(name=name))
    site.start()
    site.wait_for(lambda: site.log.count("imported") == 2, "import for the next fork")
    site.reload()
    assert site.get("/first") == "False"


LOOP = """
import asyncio, signal

@app.get("/handler")
def handler():
    async def add():
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)
    asyncio.run(add())
    return "added"
"""


@BOTH
def test_signal_handler_of_asyncio_lets_it_reload(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write(LOOP)
    site.start(*options, "--without-threads")
    assert site.get("/handler") == "added"
    site.reload()
    assert "did not exit in time" not in site.log


MANAGE = """
import click
from flask.cli import FlaskGroup
from served import app
FlaskGroup(create_app=lambda: app)()
"""


def test_group_without_the_name_of_the_application_is_rejected(site: Site) -> None:
    (site.folder / "manage.py").write_text(MANAGE)
    command = [sys.executable, "manage.py", "dev"]
    done = subprocess.run(command, cwd=site.folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert "flask dev needs the name of the application" in done.stderr


PATCHED = """
import os
original = os.waitpid
def waitpid(*args): return original(*args)
os.waitpid = waitpid
"""


@pytest.fixture
def package(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed package, of one module, which prints a line when it is imported."""
    packages = tmp_path_factory.mktemp("environment") / "site-packages"
    packages.mkdir()
    site.put_on_path(packages)
    return packages / "package.py"


def write_package(site: Site, package: Path, text: str, use: str = "''") -> None:
    package.write_text(f"{text}\nprint('imported')\n")
    site.write(f"import package\n@app.get('/use')\ndef use(): return str({use})\n")


def start_with_package(site: Site) -> None:
    """Start the server, and wait until it has the package for the next fork."""
    site.start()
    site.wait_for(lambda: site.log.count("imported") == 2, "import for the next fork")


def test_package_of_an_application_that_replaces_functions_is_a_new_one(
    site: Site, package: Path
) -> None:
    write_package(site, package, "import os\nFOUND = os.waitpid", "package.FOUND")
    site.module.write_text(PATCHED + site.module.read_text())
    site.start()
    site.wait_for_line("The application replaces functions of Python")
    for _ in range(3):
        assert "<function waitpid" in site.get("/use")
        site.reload()


@pytest.mark.parametrize(
    "text",
    [
        "threading.Thread(target=time.sleep, args=[99]).start()",
        "atexit.register(time.sleep, 99)",
    ],
    ids=["thread", "exit hook"],
)
def test_package_cannot_delay_the_end(site: Site, package: Path, text: str) -> None:
    write_package(site, package, f"import atexit, threading, time\n{text}")
    start_with_package(site)
    site.interrupt()


def test_save_is_served_though_a_package_cannot_be_imported_twice(
    site: Site, package: Path
) -> None:
    file = package.with_name("lock")
    lock = f"import fcntl\nFILE = open({str(file)!r}, 'w')\nfcntl.flock(FILE, 2)"
    write_package(site, package, lock)
    site.start()
    site.wait_for_line("The import of package hangs here: no more forks")
    site.reload()


def test_program_of_a_package_serves_each_version(site: Site, package: Path) -> None:
    cat = "subprocess.Popen(['cat'], stdin=-1, stdout=-1, text=True, bufsize=1)"
    talk = "package.CAT.stdin.write('a\\n') and package.CAT.stdout.readline()"
    write_package(site, package, f"import subprocess\nCAT = {cat}", talk)
    start_with_package(site)
    for _ in range(3):
        assert site.get("/use") == "a\n"
        site.reload()


PROGRAM = """
import os, subprocess
if "_FLASK_DEV" not in os.environ:
    subprocess.Popen(["sleep", "1002"])
"""


@linux
def test_program_of_a_package_ends_with_the_server(site: Site, package: Path) -> None:
    write_package(site, package, PROGRAM)
    start_with_package(site)
    (site.folder / ".env").write_text("A=1\n")
    site.wait_for(lambda: site.log.count("imported") == 4, "import after the start")
    assert len(sleeping("1002")) == 1
    site.interrupt()
    assert sleeping("1002") == []


def sleeping(seconds: str) -> list[psutil.Process]:
    """Return the processes that sleep for so many seconds."""
    found = psutil.process_iter(["cmdline"])
    return [each for each in found if each.info["cmdline"] == ["sleep", seconds]]


@linux
def test_program_of_the_shell_is_left_alone(site: Site) -> None:
    site.prefix = ["sh", "-c", 'sleep 1001 & exec "$@"', "sh"]
    site.start()
    for _ in range(3):
        site.reload()
    assert site.process
    assert "sleep" in [each.name() for each in site.process.children()]


@BOTH
def test_local_copy_of_a_package_is_served(
    site: Site, package: Path, options: tuple[str, ...]
) -> None:
    write_package(site, package, "VALUE = 0", "package.VALUE")
    site.start(*options)
    if not options:
        site.wait_for(lambda: site.log.count("imported") == 2, "import for a fork")
    (site.folder / "package.py").write_text("VALUE = 1\n")
    site.wait_for(lambda: site.get("/use") == "1", "local copy")


@linux
def test_template_of_the_name_of_a_package_only_reloads(
    site: Site, package: Path
) -> None:
    write_package(site, package, "")
    (site.folder / "package").mkdir()
    start_with_package(site)
    assert site.reloads_after("package/page.html", "1")
    assert "starting again" not in site.log


def test_package_may_change_the_folder(site: Site, package: Path) -> None:
    write_package(site, package, "import os\nos.chdir('/')")
    start_with_package(site)
    (site.folder / ".env").write_text("A=1\n")
    site.wait_for_line("starting again")
    site.wait_for(lambda: site.get("/version"), "response")
    site.reload()


def test_package_may_replace_functions(site: Site, package: Path) -> None:
    write_package(site, package, PATCHED)
    site.start()
    site.wait_for_line("The application replaces functions of Python")
    for _ in range(3):
        site.reload()
    assert "starting again" not in site.log


def test_file_that_a_former_version_has_written_is_watched(site: Site) -> None:
    site.write(
        "import os\nif not os.path.exists('static/a.json'):\n"
        "    os.mkdir('static')\n    open('static/a.json', 'w').close()\n"
    )
    site.start()
    site.reload()
    assert site.reloads_after("static/a.json", "1")


@BOTH
def test_project_may_be_an_environment(site: Site, options: tuple[str, ...]) -> None:
    (site.folder / "pyvenv.cfg").touch()
    site.start(*options)
    site.write("import other\n")
    site.wait_for_line("No module named 'other'")
    (site.folder / "other.py").touch()
    site.wait_for(lambda: site.get("/version") == "0", "response")
