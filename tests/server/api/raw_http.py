"""An HTTP client that hides nothing: bytes out, bytes in, one chunk at a time."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RawAnswer:
    status: int
    headers: list[tuple[str, str]]
    head: bytes
    chunks: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} is there {len(values)} times"
        return values[0] if values else None


def post(path: str, body: object, *headers: str, version: str = "1.1") -> bytes:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: 127.0.0.1", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(payload)}", "", ""]).encode() + payload


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]).encode()


class Connection:
    """One TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, **options: Any) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port, **options))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read_head(self) -> RawAnswer:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        status, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = [line.partition(": ")[::2] for line in lines]
        return RawAnswer(int(status.split()[1]), [(k.lower(), v) for k, v in headers], head)

    async def read_chunk(self) -> bytes:
        """One HTTP chunk; b"" is the last one."""
        size = int(await asyncio.wait_for(self.reader.readuntil(b"\r\n"), 10), 16)
        data = await asyncio.wait_for(self.reader.readexactly(size + 2), 10)
        return data[:-2]

    async def read_answer(self) -> RawAnswer:
        answer = await self.read_head()
        if answer.header("transfer-encoding") == "chunked":
            while chunk := await self.read_chunk():
                answer.chunks.append(chunk)
        else:
            length = int(answer.header("content-length") or 0)
            answer.chunks.append(await asyncio.wait_for(self.reader.readexactly(length), 10))
        return answer

    def drop(self) -> None:
        """Go away without a word."""
        self.writer.transport.abort()


async def until(condition: Callable[[], bool]) -> None:
    """Let everybody else run until something is so."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - whoever changes it knows nothing of this test
            await asyncio.sleep(0)


async def ask(port: int, request: bytes) -> RawAnswer:
    connection = await Connection.open(port)
    try:
        await connection.send(request)
        return await connection.read_answer()
    finally:
        connection.drop()
