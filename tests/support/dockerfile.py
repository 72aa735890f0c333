"""Execute a Dockerfile without a container engine, in a folder that stands for `/`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .commands import run


class Image:
    """The image that the Dockerfile of `project` builds, with `python` as its base.

    Instructions that these Dockerfiles do not use raise `AttributeError`. The folder
    /app of the image is `root/app` in `folder`.
    """

    def __init__(self, project: Path, folder: Path, python: str) -> None:
        self.project = project
        self.root = folder / "root"
        self.stages = folder / "stages"
        self.python = python
        self.stage = ""
        self.secrets: dict[str, str] = {}

    def build(self) -> None:
        """Execute all instructions. A program that fails, fails the test."""
        text = (self.project / "Dockerfile").read_text()
        for line in text.replace("/app", f"{self.root}/app").splitlines():
            instruction, _, rest = line.partition(" ")
            if instruction not in ("", "#"):
                getattr(self, f"take_{instruction.lower()}")(rest)

    def command(self, *words: str, **environ: str) -> dict[str, Any]:
        """Return arguments for `subprocess` that start a program in a container."""
        user = {"user": self.user, "group": self.user, "extra_groups": []}
        return {
            "args": words or self.cmd,
            "cwd": self.workdir,
            "env": self.env | {"HOME": "/nonexistent"} | environ,
            **(user if os.geteuid() == 0 else {}),
        }

    def take_from(self, rest: str) -> None:
        base, _, name = rest.partition(" AS ")
        if self.root.exists():
            self.root.rename(self.stages / self.stage)
        if (self.stages / base).exists():
            shutil.copytree(self.stages / base, self.root, symlinks=True)
        else:
            self.stages.mkdir(parents=True)
            run(self.python, "-m", "venv", self.root / "usr/local", cwd=self.stages)
        self.stage = name
        self.workdir = self.root
        self.env = {"PATH": f"{self.root}/usr/local/bin:/usr/bin:/bin"}
        self.user = 0

    def take_run(self, rest: str) -> None:
        environ = dict(self.env)
        while rest.startswith("--mount=type=secret,"):
            mount, _, rest = rest.partition(" ")
            options = dict(each.split("=") for each in mount.split(",")[1:])
            environ[options["env"]] = self.secrets[options["id"]]
        run("sh", "-c", rest, cwd=self.workdir, **environ)

    def take_workdir(self, rest: str) -> None:
        self.workdir = Path(rest)
        self.workdir.mkdir(exist_ok=True)

    def take_env(self, rest: str) -> None:
        for pair in rest.split():
            name, _, value = pair.partition("=")
            self.env[name] = value.replace("$PATH", self.env["PATH"])

    def take_copy(self, rest: str) -> None:
        origin, words = self.project, rest.split()
        mode = None
        if words[0].startswith("--from="):
            origin = self.stages / words.pop(0).partition("=")[2]
        if words[0].startswith("--chmod="):
            mode = int(words.pop(0).partition("=")[2], 8)
        *sources, target = words
        if target.endswith("/"):
            (self.workdir / target).mkdir(exist_ok=True)
        for source in sources:
            found = list(origin.glob(source.removeprefix(f"{self.root}/")))
            assert found or "[" in source, f"nothing to copy: {source}"
            for path in found:
                copy(path, self.workdir / target, mode)

    def take_user(self, rest: str) -> None:
        self.user = int(rest)

    def take_expose(self, rest: str) -> None:
        self.port = int(rest)

    def take_healthcheck(self, rest: str) -> None:
        self.healthcheck = json.loads(rest.removeprefix("CMD"))

    def take_cmd(self, rest: str) -> None:
        self.cmd = json.loads(rest)


def copy(path: Path, target: Path, mode: int | None) -> None:
    """Copy a file into a folder, or the contents of a folder into another."""
    if path.is_dir():
        shutil.copytree(path, target, symlinks=True)
        copied = [target, *target.rglob("*")]
    else:
        copied = [Path(shutil.copy(path, target))]
    if mode is not None:
        for each in copied:
            each.chmod(mode)
