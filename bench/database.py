"""Measure the cost of a query: prepared statements, pipelines, transactions, `SET`.

    python bench/database.py FOLDER

Each driver uses one connection, in autocommit, from one thread to a server on this
machine. In each round, the ways take turns in random order. FOLDER keeps the
environments, and bench/pools.py uses them, too. Prints a table in Markdown.
"""

import os
import subprocess

from serving import APPS, database, environment, install, prepare

ROUNDS = int(os.environ.get("ROUNDS", "40"))
CALLS = 100  # of each way in each round


def main() -> None:
    """Measure, and print a table of the medians."""
    project = prepare()
    programs = project / ".venv" / "bin"
    install(programs, "psycopg[binary]", cwd=project)
    with database(project) as dsn:
        print("| | round trips | µs | of these, µs of the client's CPU |")
        print("|---|---|---|---|", flush=True)
        command = [programs / "python", APPS / "queries.py", str(ROUNDS), str(CALLS)]
        subprocess.run(command, env=environment(dsn), check=True)


if __name__ == "__main__":
    main()
