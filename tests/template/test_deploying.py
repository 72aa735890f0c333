"""systemd and nginx accept the files that docs/deploying.md shows."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ..support.commands import TEMPLATE, run

DEPLOYING = (TEMPLATE / "docs" / "deploying.md").read_text()


def block(language: str) -> str:
    """Return the first block in the language."""
    found = re.search(rf"```{language}\n(.*?)```", DEPLOYING, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_rates_the_unit_ok(tmp_path: Path) -> None:
    unit = tmp_path / "my_flask_app.service"
    unit.write_text(block("ini"))
    rate = ["security", "--offline=true", "--threshold=20", str(unit)]
    assert "OK" in run("systemd-analyze", *rate, cwd=tmp_path)


def test_systemd_leaves_no_unreadable_home() -> None:
    # With one, libpq looks for no certificates and connects without TLS if it may.
    assert "\nProtectHome=tmpfs\n" in block("ini")


def test_systemd_lets_each_process_keep_its_connections_open() -> None:
    # With the default of 1,024 open files, as many idle clients block a process.
    assert "\nLimitNOFILE=65536\n" in block("ini")


def test_nginx_has_room_for_a_session_cookie() -> None:
    # Browsers accept cookies of 4,096 bytes. With its default of 4 KB for all headers,
    # nginx responds with a 502: upstream sent too big header.
    assert "proxy_buffer_size 8k;" in block("nginx")


@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")
def test_nginx_accepts_the_configuration(tmp_path: Path) -> None:
    key, certificate = tmp_path / "notes.key", tmp_path / "notes.pem"
    subject = ["-subj", "/CN=notes.example.com", "-nodes", "-days", "1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", *subject, *files])
    server = block("nginx")
    server = server.replace("/etc/ssl/private/notes.key", str(key))
    server = server.replace("/etc/ssl/notes.pem", str(certificate))
    server = server.replace("listen 80 ", "listen 8080 ").replace("443", "8443")
    configuration = tmp_path / "nginx.conf"
    pid = f"pid {tmp_path}/pid;"
    configuration.write_text(f"{pid} events {{}} http {{ access_log off; {server} }}")
    test = ["-t", "-p", str(tmp_path), "-e", "stderr", "-c", str(configuration)]
    assert "test is successful" in run("nginx", *test, cwd=tmp_path)
