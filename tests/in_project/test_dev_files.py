"""`flask dev` reloads after each change that matters, and after no other."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import flask_devserver
import pytest
from flask_devserver.files import LOOP, LOOP_SAVES, Files

from .core.reload_server import _free_port, poll
from .dev_site import BOTH, Site

VALUE = """
import os
VALUE = os.environ.get("VALUE", "")

@app.get("/value")
def value():
    return str(VALUE)
"""
LIBRARY = VALUE + "from library import VALUE\n"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    site.write(VALUE)
    yield site
    site.kill()


@pytest.fixture
def library(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package beside the application."""
    folder = tmp_path_factory.mktemp("elsewhere") / "library"
    folder.mkdir()
    site.put_on_path(folder.parent)
    return folder


@pytest.fixture
def packages(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of a new environment, which serves the application."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site.prefix = [str(folder / "bin" / "python"), "-c", RUN_OTHER]
    [packages] = folder.glob("lib/python*/site-packages")
    return packages


# The first argument is the Python of another environment, which this one replaces.
RUN_OTHER = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"


def has_value(site: Site, value: str) -> Callable[[], bool]:
    return lambda: site.get("/value") == value


@BOTH
@pytest.mark.parametrize("name, option", [(".env", ()), ("a.env", ("-e", "../a.env"))])
def test_env_file_is_read_again_wherever_it_is(
    site: Site, options: tuple[str, ...], name: str, option: tuple[str, ...]
) -> None:
    file = site.folder / name
    site.folder = site.move_module("backend")
    file.write_text("VALUE=0\n")
    watch = ("--watch", "../a.env") if option else ()
    site.start(*options, *watch, command=(*option, "dev"))
    for value in "01":
        file.write_text(f"VALUE={value}\n")
        site.wait_for(has_value(site, value), f"value {value}")


@BOTH
def test_only_the_watched_path_counts(site: Site, options: tuple[str, ...]) -> None:
    (site.folder / "data").mkdir()
    site.start(*options, "--watch", "data")
    (site.folder / "data.db").write_text("a")
    (site.folder / "data" / "a").write_text("a")
    site.wait_for_line("data/a")
    assert "data.db" not in site.log


@BOTH
def test_port_in_an_env_file_is_read_again(
    site: Site, options: tuple[str, ...]
) -> None:
    site.port_option = ()
    for _ in range(2):
        site.port = _free_port()
        (site.folder / ".flaskenv").write_text(f"FLASK_RUN_PORT={site.port}\n")
        if not site.process:
            site.start(*options)
        site.wait_for(has_value(site, ""), f"response at port {site.port}")


@BOTH
def test_library_that_was_broken_at_the_start_is_noticed(
    site: Site, options: tuple[str, ...], library: Path
) -> None:
    (library / "__init__.py").write_text("def broken(:\n")
    site.write(LIBRARY)
    site.start(*options)
    assert "SyntaxError" in site.get("/value")
    (library / "__init__.py").write_text("from .part import VALUE\n")
    site.wait_for(lambda: "ModuleNotFoundError" in site.get("/value"), "next error")
    (library / "part.py").write_text("VALUE = 1\n")
    site.wait_for(has_value(site, "1"), "value")


@BOTH
def test_library_reloads_nothing_when_it_is_found(
    site: Site, options: tuple[str, ...], library: Path
) -> None:
    for name in ("__init__.py", "unused.py", "page.html"):
        (library / name).write_text("VALUE = 0\n")
    site.write(LIBRARY)
    time.sleep(0.1)  # Otherwise they would be as new as the server.
    site.start(*options)
    site.check_stays()
    assert site.reloads_after(str(library / "page.html"), "1")


@BOTH
def test_application_in_another_folder_is_watched(
    site: Site, options: tuple[str, ...]
) -> None:
    folder = site.move_module("backend")
    site.folder = site.folder / "frontend"
    site.folder.mkdir()
    site.app = "../backend/served.py"
    (folder / "part.py").write_text("def broken(:\n")
    site.write(VALUE + "from part import VALUE\n")
    site.start(*options)
    (folder / "part.py").write_text("VALUE = 1\n")
    site.wait_for(has_value(site, "1"), "value")
    site.reload()


def start_without_library(site: Site, options: tuple[str, ...], packages: Path) -> None:
    """Serve an application that imports a library which is not installed yet."""
    import click

    ours = [Path(click.__file__).parents[1], Path(flask_devserver.__file__).parents[1]]
    (packages / "others.pth").write_text("\n".join(map(str, ours)))
    site.write(LIBRARY)
    site.start(*options)
    assert "ModuleNotFoundError" in site.get("/value")


@BOTH
def test_package_that_is_installed_later_is_served(
    site: Site, options: tuple[str, ...], packages: Path
) -> None:
    start_without_library(site, options, packages)
    (packages / "library.py").write_text("VALUE = 1\n")
    (packages / "library-1.dist-info").mkdir()
    (packages / "library-1.dist-info" / "RECORD").touch()
    site.wait_for(has_value(site, "1"), "value")


@BOTH
def test_library_that_is_installed_as_editable_later_is_served(
    site: Site, options: tuple[str, ...], packages: Path, tmp_path: Path
) -> None:
    start_without_library(site, options, packages)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "library.py").write_text("VALUE = 1\n")
    (packages / "library.pth").write_text(str(tmp_path / "source"))
    (packages / "library-1.dist-info").mkdir()
    (packages / "library-1.dist-info" / "RECORD").touch()
    site.wait_for(has_value(site, "1"), "value")


@BOTH
def test_package_that_is_missing_for_a_moment_ends_nothing(
    site: Site, options: tuple[str, ...], packages: Path
) -> None:
    import click

    for path in Path(click.__file__).parents[1].iterdir():
        if path.name.partition("-")[0] in OURS:
            shutil.copytree(path, packages / path.name)
    shutil.copytree(Path(flask_devserver.__file__).parent, packages / "flask_devserver")
    (packages / "flask_devserver-1.dist-info").mkdir()
    entry = packages / "flask_devserver-1.dist-info" / "entry_points.txt"
    entry.write_text("[flask.commands]\ndev = flask_devserver.cli:dev\n")
    entry.with_name("METADATA").write_text("Name: flask-devserver\nVersion: 1\n")
    site.start(*options)
    (packages / "click").rename(packages / "~click")
    site.wait_for_line("No module named 'click'")
    (packages / "~click").rename(packages / "click")
    site.wait_for(has_value(site, ""), "response")
    site.reload()


OURS = "flask click werkzeug jinja2 markupsafe itsdangerous blinker dotenv".split()


CONFIGURED = """
import json
from flask import Flask
app = Flask(__name__, instance_relative_config=True)
VERSION = 0


@app.get("/version")
def version():
    return str(VERSION)


@app.get("/value")
def value():
    return str(app.config["A"] + app.config["B"])


app.config.from_file("../config.json", load=json.load)
app.config.from_pyfile("config.py")
"""


@BOTH
def test_configuration_that_the_application_reads_is_watched(
    site: Site, options: tuple[str, ...]
) -> None:
    (site.folder / "instance").mkdir()
    (site.folder / "config.json").write_text('{"A": 0}')
    (site.folder / "instance" / "config.py").write_text("B = 0\n")
    site.module.write_text(CONFIGURED)
    site.start(*options)
    (site.folder / "config.json").write_text('{"A": ')
    site.wait_for(lambda: "JSONDecodeError" in site.get("/value"), "error")
    (site.folder / "config.json").write_text('{"A": 1}')
    site.wait_for(has_value(site, "1"), "value")
    (site.folder / "instance" / "config.py").write_text("B = 2\n")
    site.wait_for(has_value(site, "3"), "value")


@BOTH
def test_configuration_may_change_during_the_start(
    site: Site, options: tuple[str, ...]
) -> None:
    config, started = site.folder / "config.json", site.folder / "instance" / "go"
    started.parent.mkdir()
    config.write_text('{"A": 0}')
    (started.parent / "config.py").write_text("B = 0\n")
    site.module.write_text(CONFIGURED + WAIT_FOR_FILE)
    site.start(*options, wait=False)
    site.wait_for_line("* configured")
    config.write_text('{"A": 1}')
    started.touch()
    site.wait_for(has_value(site, "1"), "value")


WAIT_FOR_FILE = """
import os, time
print("* configured", flush=True)
while not os.path.exists("instance/go"):
    time.sleep(0.01)
"""


# Flask has read .env before the supervisor looks at the files.
SLOW_FILES = """
import os, time
import flask_devserver.files as module

class SlowFiles(module.Files):
    def __init__(self, *args):
        print("* waiting", flush=True)
        while not os.path.exists("instance/go"):
            time.sleep(0.01)
        super().__init__(*args)

module.Files = SlowFiles
"""


def test_environment_that_is_saved_during_the_start_is_read(
    site: Site, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packages = tmp_path_factory.mktemp("packages")
    (packages / "sitecustomize.py").write_text(SLOW_FILES)
    site.put_on_path(packages)
    (site.folder / "instance").mkdir()
    site.start(wait=False)
    site.wait_for_line("* waiting")
    (site.folder / ".env").write_text("VALUE=1\n")
    (site.folder / "instance" / "go").touch()
    site.wait_for(has_value(site, "1"), "value")


def test_thousands_of_files_that_the_application_reads_are_data(site: Site) -> None:
    (site.folder / "data").mkdir()
    for number in range(5000):
        (site.folder / "data" / f"{number:04}.json").touch()
    site.write("for n in range(5000): open(f'data/{n:04}.json').close()\n")
    site.start()
    time.sleep(2)  # until the supervisor knows the files
    assert not site.reloads_after("data/4999.json", "1", seconds=4)
    site.reload()


@BOTH
def test_folder_named_packages_is_no_library(
    site: Site, options: tuple[str, ...]
) -> None:
    site.folder = folder = site.move_module("python-packages")
    (folder / "part.py").write_text("print('imported', flush=True)\n")
    site.write(VALUE + "import part\n")
    site.start(*options)
    time.sleep(1)  # until the supervisor has imported the packages
    site.reload()
    assert site.log.count("imported") == 2
    assert "starting again" not in site.log


# Packages, and modules that have the value 1 when they use these.
PACKAGES = {
    "needs_the_application": (
        "try:\n    from setting import VALUE\nexcept ImportError:\n    VALUE = 0\n",
        "import package, setting\nVALUE = package.VALUE\n",
    ),
    "is_another_one": (
        "VALUE = 0\n",
        "import sys\nsys.path.insert(0, 'site-packages')\nimport package\n"
        "VALUE = package.VALUE\n",
    ),
    "changes_the_path": (
        "import os, sys\nsys.path.append(os.path.dirname(__file__) + '/vendored')\n",
        "import package\nwith open('count', 'a') as file: file.write('1')\n"
        "if os.path.getsize('count') > 1: from late import VALUE\nelse: VALUE = 1\n",
    ),
    "has_a_temporary_folder": (
        "import tempfile\nFOLDER = tempfile.TemporaryDirectory()\n",
        "import package\nVALUE = int(os.path.exists(package.FOLDER.name))\n",
    ),
    "starts_a_thread": (
        "import _thread, time\nCOUNT = []\n"
        "def run():\n    while True:\n        COUNT.append(1); time.sleep(.01)\n"
        "_thread.start_new_thread(run, ())\n",
        "import package, time\ntime.sleep(.1)\nVALUE = int(len(package.COUNT) > 3)\n",
    ),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_package_is_the_same_after_a_reload(
    site: Site, packages: Path, name: str
) -> None:
    import click

    ours = [Path(click.__file__).parents[1], Path(flask_devserver.__file__).parents[1]]
    (packages / "others.pth").write_text("\n".join(map(str, ours)))
    package, module = PACKAGES[name]
    (packages / "package.py").write_text(package)
    (packages / "vendored").mkdir()
    (packages / "vendored" / "late.py").write_text("VALUE = 1\n")
    (packages / "marker.py").write_text("print('imported')\n")
    (site.folder / "setting.py").write_text("VALUE = 1\n")
    (site.folder / "site-packages").mkdir()
    (site.folder / "site-packages" / "package.py").write_text("VALUE = 1\n")
    # The last one that is imported is the first one that the parent imports.
    site.write(f"import os, marker\n{module}" + VALUE.replace("VALUE = os", "_ = os"))
    site.start()
    imports = re.compile("^imported$", re.M)  # The supervisor also uses the word.
    site.wait_for(lambda: len(imports.findall(site.log)) == 2, "import for a fork")
    for _ in range(2):
        site.reload()
        assert site.get("/value") == "1"
    if name == "needs_the_application":
        (site.folder / "setting.py").write_text("VALUE = 2\n")
        site.wait_for(has_value(site, "2"), "value")
        assert "starting again" not in site.log  # The parent has not imported it.


@BOTH
def test_program_that_writes_data_does_not_delay_a_save(
    site: Site, options: tuple[str, ...]
) -> None:
    (site.folder / "static").mkdir()
    append = "while :; do echo x >> static/live.ts; sleep 0.05; done"
    with subprocess.Popen(["sh", "-c", append], cwd=site.folder) as program:
        try:
            site.start(*options)
            site.reload()
        finally:
            program.kill()


@BOTH
def test_data_that_changed_often_counts_once_it_rests(
    site: Site, options: tuple[str, ...]
) -> None:
    (site.folder / "static").mkdir()
    data = site.folder / "static" / "a.bin"
    data.touch()
    site.start(*options)
    save = partial(site.reloads_after, "static/a.bin", seconds=3)
    for number in range(LOOP_SAVES):
        save(str(number))
    assert "a.bin changes again and again" in site.log
    time.sleep(LOOP)
    assert save("rested")


@BOTH
@pytest.mark.parametrize(
    "line", [b"A=caf\xe9", b"FLASK_RUN_CERT=none.pem", b"FLASK_DEV_DEADLINE=1s"]
)
def test_invalid_environment_is_named_until_it_is_mended(
    site: Site, options: tuple[str, ...], line: bytes
) -> None:
    site.write(VALUE)
    (site.folder / ".flaskenv").touch()
    site.start(*options)
    (site.folder / ".flaskenv").write_bytes(line)
    site.wait_for_line("cannot start again")
    site.reload()
    (site.folder / ".flaskenv").write_text("VALUE=1\n")
    site.wait_for(has_value(site, "1"), "value")


@BOTH
def test_host_may_change_while_the_port_stays(
    site: Site, options: tuple[str, ...]
) -> None:
    site.port_option = ()
    environ = site.folder / ".flaskenv"
    environ.write_text(f"FLASK_RUN_PORT={site.port}\n")
    site.start(*options)
    environ.write_text(f"FLASK_RUN_PORT={site.port}\nFLASK_RUN_HOST=0.0.0.0\n")
    site.wait_for_line(" * Others on the network can use")
    site.reload()


@BOTH
def test_command_beside_the_server_needs_no_valid_environment(
    site: Site, options: tuple[str, ...]
) -> None:
    site.write("import time\n@app.cli.command()\ndef rest(): time.sleep(60)\n")
    site.start(*options, "--with", "rest")
    (site.folder / ".env").write_bytes(b"A=caf\xe9")
    site.wait_for_line("cannot start again")
    site.reload()
    assert not poll(lambda: "flask rest exited" in site.log, 3)


@BOTH
def test_program_that_is_missing_for_a_moment_ends_nothing(
    site: Site, options: tuple[str, ...]
) -> None:
    program = site.folder / "flask"
    program.write_text("from flask.cli import main\nmain()\n")
    site.prefix = [sys.executable, "-c", RUN_PROGRAM, str(program)]
    (site.folder / ".flaskenv").touch()
    site.start(*options)
    program.rename(site.folder / "moved")
    (site.folder / ".flaskenv").write_text("VALUE=1\n")
    site.wait_for_line("can't open file")
    (site.folder / "moved").rename(program)
    site.wait_for(has_value(site, "1"), "value")


# The command after the name of a program, which takes the place of `python -m flask`.
RUN_PROGRAM = """
import os, sys
_, program, _, _, _, *arguments = sys.argv
os.execv(sys.executable, [sys.executable, program, *arguments])
"""


@BOTH
def test_module_in_an_archive_is_watched(
    site: Site, options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    archive = tmp_path_factory.mktemp("elsewhere") / "library.zip"
    site.put_on_path(archive)
    site.write(LIBRARY)
    for value in "01":
        with ZipFile(archive, "w") as file:
            file.writestr("other.py", "1" * 5000 * int(value))  # another layout
            file.writestr("library.py", f"VALUE = {value}\n")
        if not site.process:
            site.start(*options)
        site.wait_for(has_value(site, value), "value")


@BOTH
def test_folders_may_be_nested_deeply(site: Site, options: tuple[str, ...]) -> None:
    deep = "/".join("a" * 1100)
    subprocess.run(["mkdir", "-p", deep], cwd=site.folder, check=True)
    try:
        site.start(*options)
        site.reload()
    finally:
        site.kill()
        subprocess.run(["rm", "-r", "a"], cwd=site.folder, check=True)


@BOTH
def test_link_to_the_root_is_no_part_of_the_project(
    site: Site, options: tuple[str, ...]
) -> None:
    (site.folder / "root").symlink_to("/")
    site.start(*options)
    site.reload()
    assert "only loaded modules" not in site.log


@BOTH
def test_saved_tests_reload_nothing(site: Site, options: tuple[str, ...]) -> None:
    (site.folder / "tests").mkdir()
    site.start(*options)
    (site.folder / "tests" / "test_value.py").touch()
    site.check_stays()
    assert "starting again" not in site.log and site.reloads == 0


@BOTH
def test_time_in_the_future_reloads_nothing(
    site: Site, options: tuple[str, ...]
) -> None:
    tomorrow = time.time() + 86400
    for name in (".env", "other.py"):
        (site.folder / name).touch()
        os.utime(site.folder / name, (tomorrow, tomorrow))
    site.start(*options)
    site.check_stays()
    assert "starting again" not in site.log


@BOTH
def test_folder_that_was_removed_for_a_moment_is_served(
    site: Site, options: tuple[str, ...]
) -> None:
    log, folder = site.folder, site.move_module("backend")
    text = site.module.read_text()
    site.folder = folder
    site.start(*options)
    shutil.move(folder / "log", log / "log")
    site.folder = log
    shutil.rmtree(folder)
    site.wait_for(lambda: "Error" in site.get("/value"), "page of the error")
    folder.mkdir()
    site.module.write_text(text)
    site.wait_for(has_value(site, ""), "response")


# Vim, Emacs, Kate, GNOME and macOS write these beside a file.
DRAFTS = ".a.py.swo #a.py# .a.py.kate-swp .goutputstream-A .DS_Store a.py~".split()


@BOTH
def test_line_of_a_reload_names_a_few_files(
    site: Site, options: tuple[str, ...]
) -> None:
    parts = site.folder / ".parts"
    parts.mkdir()
    for number in range(9):
        (parts / f"{number}.py").touch()
    site.start(*options)
    parts.rename(site.folder / "parts")  # as `git stash` does, but in one step
    names = ", ".join(f"parts/{number}.py" for number in range(5))
    site.wait_for_line(f" s: {names}, 4 more\n")


def test_scans_after_events_take_a_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(str(tmp_path), time.time(), (), ())
    monkeypatch.setattr(files, "_sources", lambda: calculate(0.1) or ())
    files.scan()
    monkeypatch.setattr(files.events, "clear", lambda: None)
    files.on_event()
    assert files.scan_at > time.monotonic() + 0.15


def calculate(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_slow_file_system_is_scanned_every_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(str(tmp_path), time.time(), (), ())
    # Each stat takes a millisecond on a mounted folder of Windows or of Docker Desktop.
    monkeypatch.setattr(files, "_sources", lambda: time.sleep(0.5) or ())
    files.scan()
    assert files.scan_at < time.monotonic() + 2


def test_other_inode_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems such as sshfs give a file another one now and then."""
    (tmp_path / "module.py").touch()
    files = Files(str(tmp_path), time.time() + 1, (), ())
    stat = os.stat

    def stat_with_other_inode(path: str) -> SimpleNamespace:
        names = "st_mtime_ns", "st_ctime_ns", "st_size"
        found = stat(path)
        inode = 0 if path.endswith("module.py") else found.st_ino
        return SimpleNamespace(st_ino=inode, **{n: getattr(found, n) for n in names})

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat_with_other_inode)
        found = files.scan()
    assert found == set()


def test_folder_with_too_many_folders_is_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(9):
        (tmp_path / f"{number}" / "package").mkdir(parents=True)
        (tmp_path / f"{number}" / "package" / "__init__.py").touch()
    monkeypatch.setattr("flask_devserver.files.MAX_FOLDERS", 9)
    files = Files(str(tmp_path), time.time(), (), ())
    assert "only loaded modules are watched" in capsys.readouterr().out
    module = tmp_path / "8" / "package" / "__init__.py"
    files.add({str(module): ()}, time.time())
    files.scan()
    page = module.with_name("page.html")
    for path in (module, page, tmp_path / "other.py"):
        path.write_text("1")
    assert files.scan() == {str(module), str(page)}


# The first argument is Python. The script `flask` replaces it, because this folder is
# not on its path before it imports the application.
RUN_SCRIPT = """
import os, sys
from pathlib import Path
flask = Path(sys.argv[1]).with_name("flask")
os.execv(flask, [flask, *sys.argv[4:]])
"""


@BOTH
def test_modules_may_have_the_names_of_pythons_own(
    site: Site, options: tuple[str, ...]
) -> None:
    for name in ("calendar", "copy", "queue", "random", "secrets"):
        (site.folder / f"{name}.py").write_text("MINE = True\n")
    site.prefix = [sys.executable, "-c", RUN_SCRIPT]
    site.start(*options)
    site.reload()
    (site.folder / ".flaskenv").write_text("VALUE=1\n")
    site.wait_for(has_value(site, "1"), "new environment")


@BOTH
def test_drafts_of_editors_reload_nothing(site: Site, options: tuple[str, ...]) -> None:
    package = site.folder / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    site.start(*options)
    (package / ".#a.py").symlink_to("user@host.1:2")
    for text in ("", "a", "ab"):
        for name in DRAFTS:
            (package / name).write_text(text)
        site.check_stays(1.5)


def save_in_place(file: Path, text: str) -> None:
    file.write_text(text)


def save_like_jetbrains(file: Path, text: str) -> None:
    draft, old = file.with_suffix(".py___jb_tmp___"), file.with_suffix(".py___jb_old__")
    draft.write_text(text)
    file.rename(old)
    draft.rename(file)
    old.unlink()


def save_like_vim(file: Path, text: str) -> None:
    file.rename(file.with_suffix(".py~"))
    file.write_text(text)
    file.with_suffix(".py~").unlink()


def save_like_git(file: Path, text: str) -> None:
    file.unlink()
    time.sleep(0.1)
    file.write_text(text)


@BOTH
def test_each_way_to_save_is_noticed(site: Site, options: tuple[str, ...]) -> None:
    site.start(*options)
    text = site.module.read_text()
    saves = [save_in_place, save_like_jetbrains, save_like_vim, save_like_git]
    for number, save in enumerate(saves):
        save(site.module, f"{text}\nVALUE = {number}\n")
        site.wait_for(has_value(site, str(number)), save.__name__)


GENERATE = """
import generated  # by the line above

@app.get("/run")
def run():
    return str(os.write(os.open("parameters.py", os.O_CREAT | os.O_WRONLY), b"A = 1"))
"""


@BOTH
def test_module_that_the_application_writes_reloads_nothing(
    site: Site, options: tuple[str, ...]
) -> None:
    write = "open('generated.py', 'w').write('VALUE = 1\\n')"
    site.write(VALUE + write + GENERATE)
    site.start(*options)
    assert site.get("/run") == "5"
    site.check_stays()
    assert site.reloads_after("generated.py", "VALUE = 2\n")


# The supervisor looks for files when the application has written one, but has not read
# the message that says so.
LATE = """
import os, time
from flask_devserver.files import Files

def add(self, paths, since, original=Files.add):
    is_message = bool(self.modules)
    while is_message and not os.path.exists("parameters.py"):
        time.sleep(0.01)
    original(self, paths, since)

Files.add = add
"""


@BOTH
def test_module_that_the_application_writes_may_be_found_at_once(
    site: Site, options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    packages = tmp_path_factory.mktemp("packages")
    (packages / "sitecustomize.py").write_text(LATE)
    site.put_on_path(packages)
    site.write("import os, sys\nsys.modules['generated'] = os\n" + GENERATE)
    site.start(*options)
    assert site.get("/run") == "5"
    site.check_stays()
    site.reload()


@BOTH
def test_program_that_writes_the_same_file_at_each_start_ends_no_saves(
    site: Site, options: tuple[str, ...]
) -> None:
    (site.folder / "static").mkdir()
    command = "echo 'p {}' > static/page.css"
    site.write(f"import os\nos.system({command!r})\n")
    site.start(*options)
    (site.folder / "static" / "page.css").write_text("")
    site.wait_for(site.stays, "rest")
    assert site.reloads_after("static/page.css", "h1 {}")
    site.wait_for(site.stays, "rest")
    site.reload()


@BOTH
@pytest.mark.parametrize("folder", ["static", "package"])
def test_file_that_changes_with_each_reload_is_named_and_ignored(
    site: Site, options: tuple[str, ...], folder: str
) -> None:
    (site.folder / folder).mkdir()
    (site.folder / "package").mkdir(exist_ok=True)
    (site.folder / "package" / "__init__.py").touch()
    # A program that the application does not know, such as tee.
    site.write(
        "import subprocess\nsubprocess.run(['sh', '-c', COMMAND])\n".replace(
            "COMMAND", repr(f"date +%N > {folder}/data.bin")
        )
    )
    site.start(*options)
    # The first scan may only find the file, and the second one a change.
    change = partial(site.reloads_after, f"{folder}/data.bin", seconds=2)
    site.wait_for(lambda: change(text=str(time.monotonic())), "reload")
    site.wait_for_line("data.bin changes again and again")
    site.wait_for(site.stays, "rest")
    site.reload()


def test_file_that_returns_has_changed(tmp_path: Path) -> None:
    module, away = tmp_path / "a.py", tmp_path / "a.bak"
    module.write_text("VALUE = 1\n")
    files = Files(str(tmp_path), time.time(), (), ())
    for _ in range(LOOP_SAVES + 1):
        module.write_text("VALUE = 1\n")
        files.settle(files.scan())
    assert files.settle([str(module)]) == set()
    for old, new in ((module, away), (away, module)):
        old.rename(new)
        assert str(module) in files.settle(files.scan())
