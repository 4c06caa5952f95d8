"""The serving process: bind the port, load in the background, stop without losing a word.

The port is bound before anything heavy is imported, so that `/health` answers while the model loads. uvicorn
on its own closes its listener at the first SIGTERM and lets streams run or cuts them; here the signal first
makes the server refuse new requests (503 with Retry-After), lets the running ones end, ends the rest with an
error event after `--drain-timeout`, and only then tells uvicorn to exit. A second signal exits at once.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Generator

import uvicorn

from server import __version__
from server.app import Application, StartError
from server.http_server import make_config
from server.log import configure_logging
from server.settings import Settings

_BACKLOG = 2048
_IDLE_CONNECTION_S = (
    75  # longer than the pools of common clients, so that they never reuse a closing connection
)
_IMPATIENT = 130  # exit status after a second signal
_LAST_BYTES_S = 5  # after the drain every response is complete: what is left is a client that does not read

log = logging.getLogger("motet")


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: this module's decide when it exits."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def serve_until_stopped(settings: Settings) -> int:
    """Serve until a signal or a failure; returns the process's exit status."""
    configure_logging(settings.log_level)
    try:
        listener = _bind(settings.host, settings.port)
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"motet: cannot listen on {settings.host}:{settings.port}: {reason}", file=sys.stderr)
        return 1
    address = f"http://{_address(listener)}"
    what = settings.model or "the embedded model"
    print(f"motet {__version__} listening on {address}, loading {what}", file=sys.stderr, flush=True)
    with listener:
        return asyncio.run(_serve(settings, listener, address))


async def _serve(settings: Settings, listener: socket.socket, address: str) -> int:
    try:
        application = Application(settings, address)
    except StartError as error:
        print(f"motet: {error}", file=sys.stderr)
        return 1
    server = _Server(
        make_config(
            application.asgi,
            backlog=_BACKLOG,
            timeout_keep_alive=_IDLE_CONNECTION_S,
            timeout_graceful_shutdown=_LAST_BYTES_S,
        )
    )
    stop = asyncio.Event()
    _on_signals(stop)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    serving.add_done_callback(lambda _: stop.set())  # without HTTP there is nothing to live for
    try:
        return await _live(application, stop, address)
    finally:
        server.should_exit = True
        await serving
        await application.close()


async def _live(application: Application, stop: asyncio.Event, address: str) -> int:
    """Load, serve until `stop` or until the engine dies, drain. Returns the exit status."""
    stopping = asyncio.create_task(stop.wait())
    loading = asyncio.create_task(application.load())
    await asyncio.wait({stopping, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        # The load runs in a thread that cannot be cancelled; close() waits for it.
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading
        return 0
    try:
        loading.result()
    except StartError as error:
        print(f"motet: {error}", file=sys.stderr)
        stopping.cancel()
        return 1
    application.announce(address)
    died = asyncio.create_task(application.engine_died())
    await asyncio.wait({stopping, died}, return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        log.error("the engine has died; every stream was ended with an error")
        stopping.cancel()
        return 1
    died.cancel()
    log.info("draining: no new requests, up to %g s for the running ones", application.settings.drain_timeout)
    await application.drain()
    return 0


def _bind(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(
            _BACKLOG
        )  # at once: a client that comes before uvicorn is up waits instead of failing
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def handle() -> None:
        if stop.is_set():
            os._exit(_IMPATIENT)  # no clean-up: a step, a load or a client may take long
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle)
