"""Caddy in front of a server, with the configuration of `deploy/` but for the addresses."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.running import REPOSITORY, RunningServer


@contextmanager
def caddy_of_deploy(upstream: int) -> Iterator[int]:
    """Yields Caddy's port on the loopback address."""
    program = shutil.which("caddy")
    assert program is not None, "Debian's package: caddy"
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.close()
        text = (REPOSITORY / "deploy/Caddyfile").read_text()
        assert "motet:8000" in text
        assert "chat.example.org" in text
        site = text.replace("motet:8000", f"127.0.0.1:{upstream}")
        site = site.replace("chat.example.org", f"http://127.0.0.1:{port}")
        config = Path(folder) / "Caddyfile"
        config.write_text(f"{{\n\tadmin off\n}}\n{site}")
        process = subprocess.Popen(
            [program, "run", "--config", str(config), "--adapter", "caddyfile"],
            env={**os.environ, "HOME": folder, "XDG_DATA_HOME": folder, "XDG_CONFIG_HOME": folder},
            stderr=subprocess.PIPE,
            text=True,
        )
        caddy = RunningServer(process)
        try:
            caddy.wait_for("serving initial configuration")
            yield port
        finally:
            caddy.kill()
