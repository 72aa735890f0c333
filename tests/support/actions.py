"""Run the jobs of a workflow as GitHub Actions does, without its actions."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .commands import clean_environment


class Runner:
    """A run of a workflow, with the values of its expressions and its artifact."""

    def __init__(self, folder: Path, secrets: dict[str, str]):
        self.output, self.artifact = folder / "output", folder / "artifact"
        shutil.rmtree(self.artifact, ignore_errors=True)
        self.values = {f"secrets.{name}": value for name, value in secrets.items()}

    def is_due(self, part: dict[str, Any]) -> bool:
        """Return whether the condition of a job or a step holds."""
        return "if" not in part or bool(self.values.get(part["if"]))

    def run(
        self, name: str, job: dict[str, Any], clone: Path, environ: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run the steps in the clone, until one fails."""
        environ = self.expand(job.get("env", {})) | environ
        done = subprocess.CompletedProcess("", 0, "")
        for step in filter(self.is_due, job["steps"]):
            if "run" in step:
                done = self.take(step, clone, environ)
                if done.returncode:
                    return done
            elif "/upload-artifact@" in step["uses"]:
                self.artifact.mkdir()
                shutil.copy(clone / step["with"]["path"], self.artifact)
            elif "/download-artifact@" in step["uses"]:
                shutil.copytree(self.artifact, clone, dirs_exist_ok=True)
        outputs = self.expand(job.get("outputs", {}))
        self.values |= {f"needs.{name}.outputs.{k}": v for k, v in outputs.items()}
        return done

    def take(
        self, step: dict[str, Any], clone: Path, environ: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run the command of a step, and keep its outputs."""
        self.output.write_text("")
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", step["run"]],
            cwd=clone,
            env=clean_environment() | {"GITHUB_OUTPUT": str(self.output)} | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout)
        for line in self.output.read_text().splitlines():
            key, _, value = line.partition("=")
            self.values[f"steps.{step['id']}.outputs.{key}"] = value
        return done

    def expand(self, texts: dict[str, str]) -> dict[str, str]:
        """Return the texts with the values of their expressions."""
        return {
            key: re.sub(r"\$\{\{ (.*?) \}\}", lambda m: self.values.get(m[1], ""), text)
            for key, text in texts.items()
        }
