"""Print the outputs of the job `projects` as JSON: every pool with every worker."""

import itertools
import json
from pathlib import Path

TEMPLATE = Path(__file__).parents[1]
QUESTIONS = json.loads((TEMPLATE / "cookiecutter.json").read_text("utf-8"))

pairs = itertools.product(QUESTIONS["pool"], QUESTIONS["worker"])
projects = ["-".join(pair) for pair in pairs]
windows = [{"os": "windows-latest", "project": p} for p in projects if "celery" in p]

print("projects=" + json.dumps(projects))
print("exclude=" + json.dumps(windows))  # Celery does not support Windows.
