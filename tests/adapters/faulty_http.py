"""HTTP servers for tests, with faults on demand: what a network and a bad server do to a download."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

LIMIT_S = 30


@dataclass
class Fault:
    """What to do wrong to the next `times` answers whose path holds `path`."""

    path: str
    kind: Literal[
        "cut", "drip", "stall", "silence", "more", "longer", "short", "status", "garble", "encoded", "range"
    ]
    at: int = 10  # bytes that arrive properly
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "GET"


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case


class FaultyServer(ABC):
    """Answers by `answer`, each in a thread of its own."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.clients: list[Any] = []  # closed with us
        self.waits: list[float] = []  # what clients would have waited between two attempts
        self.faults: list[Fault] = []
        self.stalled = threading.Event()  # a stalled answer has sent what it will send
        self.released = threading.Event()  # and may end
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Seen(self.command, self.path, headers)
                server.seen.append(request)
                server.respond(self, request, body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Clients that leave are part of the tests."""

        self._http = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self.released.set()
            for client in self.clients:
                client.close()
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    @abstractmethod
    def answer(self, request: Seen, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""

    def paths(self, method: str = "GET") -> list[str]:
        return [seen.path for seen in self.seen if seen.method == method]

    def respond(self, handler: BaseHTTPRequestHandler, request: Seen, body: bytes) -> None:
        fault = self._take_fault(request)
        if fault is not None and fault.kind == "status":
            self._send(handler, fault.status, fault.headers, b"{}")
            return
        if fault is not None and fault.kind == "silence":
            self.stalled.set()
            self.released.wait(LIMIT_S)
            handler.close_connection = True
            return
        status, headers, content = self.answer(request, body)
        if fault is None:
            self._send(handler, status, headers, content)
        else:
            self._spoil(handler, fault, status, headers, content)

    def _take_fault(self, request: Seen) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.path in request.path and request.method == fault.method:
                fault.times -= 1
                return fault
        return None

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes
    ) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)

    def _spoil(
        self,
        handler: BaseHTTPRequestHandler,
        fault: Fault,
        status: int,
        headers: dict[str, str],
        content: bytes,
    ) -> None:
        length: int | None = len(content)
        if fault.kind == "more":
            length, content = None, content + b"!"
        elif fault.kind == "longer":
            length, content = len(content) + 1, content + b"!"
        elif fault.kind == "short":
            length, content = None, content[:-1]
        elif fault.kind == "garble":
            content = content[:-1] + bytes([content[-1] ^ 1])
        elif fault.kind == "encoded":
            headers = headers | {"Content-Encoding": "gzip"}
        elif fault.kind == "range":
            status, headers = 206, headers | {"Content-Range": f"bytes 7-{len(content) + 6}/*"}
        handler.close_connection = True
        handler.send_response(status)
        headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
        headers |= {"Connection": "close"}
        if length is not None:
            headers = {"Content-Length": str(length)} | headers
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if fault.kind in ("cut", "drip", "stall"):
            handler.wfile.write(content[: fault.at])
            handler.wfile.flush()
            self._hold(handler, fault)
        else:
            handler.wfile.write(content)

    def _hold(self, handler: BaseHTTPRequestHandler, fault: Fault) -> None:
        self.stalled.set()
        if fault.kind == "stall":
            self.released.wait(LIMIT_S)
        elif fault.kind == "drip":
            while not self.released.wait(0.02):
                handler.wfile.write(b".")
                handler.wfile.flush()


class FaultyProxy(FaultyServer):
    """Passes everything on to a real server. Each of `before` is called with every request until it says True
    to one.
    """

    def __init__(self, target: str) -> None:
        super().__init__()
        self._target = urlsplit(target)
        self.before: list[Callable[[Seen], bool]] = []

    def answer(self, request: Seen, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for callback in tuple(self.before):
            if callback(request):
                self.before.remove(callback)
        assert self._target.hostname is not None
        connection = HTTPConnection(self._target.hostname, self._target.port or 80, timeout=LIMIT_S)
        try:
            connection.request(request.method, request.path, body, request.headers)
            answer = connection.getresponse()
            content = answer.read()
            headers = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "date", "server")
            }
            return answer.status, headers, content
        finally:
            connection.close()
