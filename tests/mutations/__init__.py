"""Common mistakes in such projects, each with the test that notices it."""

from dataclasses import dataclass
from pathlib import Path

PROJECT = "{{cookiecutter.project_slug}}"
PACKAGE = f"{PROJECT}/{PROJECT}"
TEMPLATE = "template"  # instead of answers: a test of the template notices the defect


@dataclass(frozen=True, kw_only=True)
class Defect:
    """A mistake: in a file of the template, or in its name, `old` became `new`.

    `words` describes it. `test` must fail in a project with the answers `pool-worker`,
    with an error that matches the regular expression `sign`.
    """

    words: str
    file: str
    old: str
    new: str
    test: str
    sign: str
    answers: str = "psycopg2-none"

    @property
    def function(self) -> str:
        """The name of the test without its module and parameters."""
        return self.test.partition("::")[2].partition("[")[0]

    def put_into(self, template: Path) -> None:
        """Break a copy of the template. Raise `ValueError` unless `old` occurs once."""
        path = template / self.file
        text = path.read_text()
        if self.old == path.name:
            path.rename(path.with_name(self.new))
        elif text.count(self.old) != 1:
            raise ValueError(f"{self.words}: {self.old!r} is not once in {self.file}.")
        else:
            path.write_text(text.replace(self.old, self.new))


DEFECTS = [
    Defect(
        words="No teardown: a connection is not returned",
        file=f"{PACKAGE}/core/db.py",
        old="    app.do_teardown_appcontext = partial(_tear_down, "
        "app.do_teardown_appcontext)  # type: ignore[method-assign]\n",
        new="",
        test="tests/core/test_db.py::test_connection_returns_at_the_end_of_the_context",
        sign=r"assert \d+ == \d+",
    ),
    Defect(
        words="No `putconn` after an error",
        file=f"{PACKAGE}/core/db.py",
        old="    finally:\n        close_db()\n",
        new="    finally:\n        pass\n    close_db()\n",
        test="tests/core/test_db.py"
        "::test_connection_returns_when_a_teardown_function_fails",
        sign="assert 1 == 0",
    ),
    Defect(
        words="A transaction in which a query failed counts as committed",
        file=f"{PACKAGE}/core/db.py",
        old="        if state == IN_ERROR:\n",
        new="        if state is None:\n",
        test="tests/core/test_db.py::test_swallowed_error_is_not_taken_for_a_commit",
        sign="DID NOT RAISE",
    ),
    Defect(
        words="Connections are not in autocommit",
        file=f"{PACKAGE}/core/db.py",
        old="        self.autocommit = True\n",
        new="",
        test="tests/core/test_db.py::test_statement_takes_effect_at_once",
        sign="assert 0 == 1|transaction is aborted",
    ),
    Defect(
        words="No `client_connection_check_interval`",
        file=f"{PACKAGE}/core/db.py",
        old="-c client_connection_check_interval=500 ",
        new="",
        test="tests/core/test_reload.py"
        "::test_query_of_a_slow_request_does_not_outlive_the_reload[dev]",
        sign="no end of the query",
    ),
    Defect(
        words="`on_commit` calls the function at once",
        file=f"{PACKAGE}/core/db.py",
        old="        callbacks.append(function)",
        new="        function()",
        test="tests/core/test_db.py::test_callback_follows_the_commit",
        sign=r"assert \[0\] == \[\]",
    ),
    Defect(
        words="An error message contains the password",
        file=f"{PACKAGE}/core/db.py",
        old='Unavailable(f"DATABASE_URL: {reason}',
        new='Unavailable(f"DATABASE_URL: {connection_parameters()}: {reason}',
        test="tests/test_production.py::test_password_is_in_no_response_or_log_line",
        sign="assert .* not in",
    ),
    Defect(
        words="The pool is opened in `create_app`",
        file="templates/pool/psycopg2.py",
        old="= Pool(app.config)\n",
        new="= Pool(app.config)\n"
        "    with app.app_context():\n"
        '        pool = app.extensions["pool"]\n'
        "        pool.putconn(pool.getconn())\n",
        test="tests/core/test_pool.py::test_creating_the_app_opens_no_connection",
        sign=r"assert \{\d+\} == set\(\)",
    ),
    Defect(
        words="Idle connections are not checked",
        file="templates/pool/psycopg2.py",
        old=" and is_usable(conn)",
        new="",
        test="tests/core/test_pool.py::test_connection_that_died_idle_is_replaced_unseen",
        sign="AdminShutdown|server closed the connection",
    ),
    Defect(
        words="A forked process uses its parent's connections",
        file="templates/parts/pool.py",
        old="    os.register_at_fork(after_in_child=_reset_all)",
        new="    pass",
        test="tests/core/test_pool.py"
        "::test_forked_process_leaves_its_parents_connections_alone",
        sign="assert 256 == 0",
    ),
    Defect(
        words="The last waiter gets the first connection",
        file="templates/parts/pool.py",
        old="self.waiting[0] is waiter",
        new="self.waiting[-1] is waiter",
        test="tests/core/test_pool.py::test_longest_waiter_is_first",
        sign=r"assert \[4, .* == \[0, 1, 2, 3, 4\]",
    ),
    Defect(
        words="`POOL_TIMEOUT` is ignored",
        file="templates/parts/pool.py",
        old=" is waiter, timeout\n",
        new=" is waiter\n",
        test="tests/test_faults.py::test_requests_beyond_pool_size_wait_then_get_503",
        sign=r"assert Counter\(\{200: 8\}\) == ",
    ),
    Defect(
        words="`POOL_RESET` resets nothing",
        file="templates/pool/psycopg2.py",
        old=' and (not reset or responds(conn, "DISCARD ALL"))',
        new="",
        test="tests/core/test_pool.py::test_session_is_as_new_where_that_is_asked_for",
        sign="assert .*elsewhere",
    ),
    Defect(
        words="The pool hands out SQLAlchemy's proxy",
        file="templates/pool/sqlalchemy.py",
        old="cast(Connection, proxy.driver_connection)",
        new="cast(Connection, proxy)",
        test="tests/core/test_db.py::test_transaction_is_committed_at_the_end",
        sign="assert 1 == 0|context manager",
        answers="sqlalchemy-thread",
    ),
    Defect(
        words="The worker's thread is not a daemon thread",
        file="templates/jobs/thread.py",
        old='name="worker", daemon=True',
        new='name="worker"',
        test="tests/core/test_jobs.py"
        "::test_thread_starts_with_the_first_task_and_is_a_daemon",
        sign="assert False",
        answers="sqlalchemy-thread",
    ),
    Defect(
        words="The worker starts only if `WERKZEUG_RUN_MAIN`",
        file="templates/jobs/thread.py",
        old="            if not (self.thread and self.thread.is_alive()):",
        new='            if "WERKZEUG_RUN_MAIN" in os.environ:',
        test="tests/core/test_jobs.py::test_enqueued_task_runs",
        sign="Empty",
        answers="sqlalchemy-thread",
    ),
    Defect(
        words="A job is not part of the transaction around it",
        file="templates/jobs/procrastinate.py",
        old="from .db import DatabaseUnavailable, get_db",
        new="from .db import DatabaseUnavailable\nfrom .db import connect as get_db",
        test="tests/core/test_jobs.py::test_job_is_rolled_back_with_the_transaction",
        sign="assert 1 == 0",
        answers="psycopg2-procrastinate",
    ),
    Defect(
        words="The jobs of a killed worker are not requeued",
        file="templates/engine/procrastinate.py",
        old="                    await self._requeue(job)",
        new="                    pass",
        test="tests/test_jobs.py::test_endless_job_is_interrupted_and_restarted",
        sign="assert False",
        answers="psycopg2-procrastinate",
    ),
    Defect(
        words="A new worker starts while the old one still runs",
        file=f"{PROJECT}/devserver/flask_devserver/supervisor.py",
        old="            if due and not runner.pid and not self.ending:\n",
        new="            busy = runner is self.web and runner.pid\n"
        "            if due and not busy and not self.ending:\n",
        test="tests/core/test_reload_tasks.py"
        "::test_next_worker_waits_for_the_end_of_the_previous_one",
        sign=r"assert \['task 2'\] == \['task 1', 'task 2'\]",
        answers="psycopg2-procrastinate",
    ),
    Defect(
        words="Celery acknowledges a task before it has run",
        file="templates/jobs/celery.py",
        old="        task_acks_late=True,\n",
        new="",
        test="tests/test_jobs.py::test_endless_job_is_interrupted_and_restarted",
        sign="assert False",
        answers="psycopg2-celery",
    ),
    Defect(
        words="Two machines may migrate at once",
        file=f"{PACKAGE}/core/migrate.py",
        old="cursor.fetchone() == (True,)",
        new="cursor.fetchone()",
        test="tests/core/test_migrate.py"
        "::test_runners_that_start_together_apply_each_file_once",
        sign="MigrationError|UniqueViolation|DuplicateObject",
    ),
    Defect(
        words="A migration that rolls itself back counts as applied",
        file=f"{PACKAGE}/core/migrate.py",
        old="BLOCK.format(sql=sql, mark=checksum)",
        new='f"{sql};"',
        test="tests/core/test_migrate.py"
        "::test_file_that_ends_its_transaction_is_rejected",
        sign="DID NOT RAISE",
    ),
    Defect(
        words="An edited migration counts as applied",
        file=f"{PACKAGE}/core/migrate.py",
        old="applied.get(p.name) not in (None, _read(p)[1])",
        new="applied.get(p.name) == _read(p)[0]",
        test="tests/core/test_migrate.py::test_edited_file_is_rejected",
        sign="DID NOT RAISE",
    ),
    Defect(
        words="`/readyz` returns 200 although a migration is pending",
        file=f"{PACKAGE}/core/health.py",
        old="migrate.find_problem(get_db())",
        new='get_db().cursor().execute("SELECT 1")',
        test="tests/core/test_migrate.py::test_not_ready_while_some_are_pending",
        sign="assert 200 == 503",
    ),
    Defect(
        words="Any site may post in a visitor's name",
        file=f"{PACKAGE}/core/security.py",
        old="if _is_cross_site():",
        new="if False:",
        test="tests/core/test_app.py::test_post_from_another_site_is_rejected",
        sign="assert 201 == 403",
    ),
    Defect(
        words="`X-Request-ID` is not returned",
        file=f"{PACKAGE}/core/log.py",
        old='            headers = [*headers, ("X-Request-ID", request_id.get())]\n',
        new="",
        test="tests/core/test_app.py::test_invalid_request_id_is_replaced",
        sign="KeyError",
    ),
    Defect(
        words="SQL contains unescaped input of a visitor",
        file="templates/notes/plain.py",
        old="        cursor.execute(insert, [body])",
        new='        cursor.execute(insert.replace("%s", f"\'{body}\'"))',
        test="tests/test_notes.py::test_note_is_escaped_on_the_page",
        sign="SyntaxError",
    ),
    Defect(
        words="HTML contains unescaped input of a visitor",
        file=f"{PACKAGE}/templates/notes.html",
        old="{{ note.body }}",
        new="{{ note.body|safe }}",
        test="tests/test_notes.py::test_note_is_escaped_on_the_page",
        sign="assert '<script>' not in",
    ),
    Defect(
        words="A save is lost while a version starts",
        file=f"{PROJECT}/devserver/flask_devserver/supervisor.py",
        old="                    self.reload_at = min(now + delay, self.burst_ends)\n",
        new="                    self.reload_at = min(now + delay, self.burst_ends)\n"
        "                    if not self.web.ready:\n"
        '                        self.reload_at = float("inf")\n',
        test="tests/test_dev.py"
        "::test_save_while_the_previous_version_starts_is_not_lost[dev]",
        sign="no answer of the last version",
    ),
    Defect(
        words="A save during the start is lost",
        file=f"{PROJECT}/devserver/flask_devserver/files.py",
        old="STALE if new and self.is_source(path) else found",
        new="found",
        test="tests/test_dev_files.py"
        "::test_environment_that_is_saved_during_the_start_is_read",
        sign="no value in",
    ),
    Defect(
        words="Old bytecode is served after two saves within a second",
        file=f"{PROJECT}/devserver/flask_devserver/supervisor.py",
        old="                _forget_bytecode(self.reloaded)\n",
        new="                pass\n",
        test="tests/test_dev.py::test_bytecode_of_the_previous_version_is_not_used[dev]",
        sign="no answer of the last version",
    ),
    Defect(
        words="SIGHUP leaves an orphan that keeps the port",
        file=f"{PROJECT}/devserver/flask_devserver/shutdown.py",
        old="    exit_with_parent(os.getppid())\n",
        new="",
        test="tests/test_dev.py"
        "::test_nothing_outlives_flasks_own_server[1-run --debug]",
        sign="assert False",
    ),
    Defect(
        words="The embedded PostgreSQL is never stopped",
        file=f"{PROJECT}/devserver/flask_devserver/embedded.py",
        old="                    self._stop(server)\n",
        new="",
        test="tests/test_postgres.py"
        "::test_clients_share_one_server_that_stops_with_the_last",
        sign="assert False",
    ),
    Defect(
        words="A quote in an answer ends a string of pyproject.toml",
        file="cookiecutter.json",
        old="{{ cookiecutter.description | replace('\\\\\\\\', '\\\\\\\\\\\\\\\\') | "
        "replace('\\\"', '\\\\\\\\\\\"') }}",
        new="{{ cookiecutter.description }}",
        test="tests/template/test_answers.py::test_odd_text_arrives_unchanged",
        sign="TOMLDecodeError",
        answers=TEMPLATE,
    ),
    Defect(
        words="A config for a read-only service, which Compose rejects",
        file=f"{PROJECT}/{{% if cookiecutter.docker %}}compose.yaml{{% endif %}}",
        old="    read_only: false  # Compose cannot write a config into a read-only "
        "container.\n",
        new="",
        test="tests/template/test_docker.py::test_services_have_minimal_privileges",
        sign=r"assert True == \('configs' not in",
        answers=TEMPLATE,
    ),
    Defect(
        words="A combination has a file of another one",
        file=f"{PROJECT}/{{% if cookiecutter.docker %}}compose.yaml{{% endif %}}",
        old="{% if cookiecutter.docker %}compose.yaml{% endif %}",
        new="compose.yaml",
        test="tests/template/test_combinations.py"
        "::test_combination[psycopg2-none-github-False]",
        sign="Extra items in the left set",
        answers=TEMPLATE,
    ),
]
