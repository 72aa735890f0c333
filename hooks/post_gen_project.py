"""Print the next commands, except in the temporary folder of `cruft update`."""

import tempfile
from pathlib import Path

NEXT = """
Done. Now type:

    cd {{ cookiecutter.project_slug }}
    uv run flask dev

and open http://127.0.0.1:5000/. README.md has the details."""

# Cruft and Cookiecutter both have `_template`, and only Cookiecutter has `_output_dir`.
BY_COOKIECUTTER = "{{ cookiecutter._output_dir is defined }}" == "True"

if BY_COOKIECUTTER or not Path.cwd().is_relative_to(tempfile.gettempdir()):
    print(NEXT)
