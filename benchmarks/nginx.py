"""nginx in front of a server, with nothing configured but where that server is: everything else is default.

Buffering is on, upstreams are spoken to in the default version of HTTP (1.0 before nginx 1.29.7), and reads
time out after 60 seconds: what most people have who never read about streaming.
"""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_CONFIG = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {sites}
}}
"""
_DEFAULT_SITE = """
server {{
    listen 127.0.0.1:{port};
    location / {{
        proxy_pass http://127.0.0.1:{upstream};
    }}
}}
"""
_START_S = 10.0


class NoNginx(Exception):
    """nginx is not installed, or does not start; the message says which."""


@contextlib.contextmanager
def nginx_in_front_of(upstream: int) -> Iterator[int]:
    """With everything as it is by default. Yields nginx's port on the loopback address. Raises: NoNginx."""
    with nginx_running(lambda port: _DEFAULT_SITE.format(port=port, upstream=upstream)) as port:
        yield port


@contextlib.contextmanager
def nginx_running(sites: Callable[[int], str]) -> Iterator[int]:
    """`sites`: what stands inside `http`, for the port to listen on, which is yielded. Raises: NoNginx."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/sbin:/bin")
    if program is None:
        raise NoNginx("nginx is not installed (Debian's package: nginx)")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.close()
        config = Path(folder) / "nginx.conf"
        config.write_text(_CONFIG.format(folder=folder, sites=sites(port)))
        log = Path(folder) / "error.log"
        process = subprocess.Popen(
            [program, "-p", folder, "-c", config, "-e", log],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_until_it_listens(process, port, log)
            yield port
        finally:
            process.terminate()
            process.wait(10)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    limit = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > limit:
                raise NoNginx(f"nginx does not start: {log.read_text() if log.exists() else ''}") from None
