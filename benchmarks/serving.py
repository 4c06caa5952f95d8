"""Servers of a benchmark's own: this project's code in a process each, on a free port, stopped at the end.

A `Site` is such a server with a client that speaks to it. What it holds in memory is read from the system,
not from the server: that is what an operator sees.
"""

import asyncio
import os
import re
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import probe
from benchmarks.client import Client, open_session
from benchmarks.records import Api, Shot, Target, Wire, Wish

ROOT = Path(__file__).resolve().parents[1]
START_S = 600.0
STOP_S = 60.0
WIRE = Wire(
    api=Api.COMPLETIONS,
    extra={"ignore_eos": True},
    api_key=None,
    asks_usage=True,
    timeout_s=900.0,
    keeps_alive=False,
)


class ServerFailed(Exception):
    """The server did not start, or did not live; the message ends with its last words."""


@dataclass(slots=True)
class Site:
    """A running server and a client for it."""

    process: asyncio.subprocess.Process
    session: aiohttp.ClientSession
    target: Target
    client: Client

    @property
    def url(self) -> str:
        return self.target.url

    async def send(self, adapter: str, prompt: str, max_tokens: int) -> Shot:
        return await self.client.send(Wish(adapter, prompt, max_tokens))

    async def get(self, path: str) -> Any:
        """The JSON of a GET, or None where there is no such route."""
        async with self.session.get(self.url + path) as response:
            return await response.json() if response.status == 200 else None

    async def post(self, path: str, body: object) -> int:
        """The status of a POST."""
        async with self.session.post(self.url + path, json=body) as response:
            await response.read()
            status: int = response.status
            return status

    async def metric(self, name: str) -> float:
        """Sum of a metric's samples; 0 if there are none."""
        async with self.session.get(self.url + "/metrics") as response:
            text = await response.text()
        return sum_of(name, text)

    def resident_bytes(self) -> int:
        """What the process holds in memory now; 0 where the system does not say."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.M)
        return int(found[1]) * 1024 if found else 0


def sum_of(name: str, text: str) -> float:
    """Of all samples of a metric in the text format of Prometheus."""
    samples = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.M)
    return sum(float(value) for value in samples)


@asynccontextmanager
async def serving(
    *flags: str, wire: Wire = WIRE, environment: dict[str, str] | None = None
) -> AsyncIterator[Site]:
    """`motet serve FLAGS`, ready. Raises ServerFailed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "serve", "--port", "0", *flags),
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stderr=asyncio.subprocess.PIPE,
    )
    words: deque[str] = deque(maxlen=40)
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    listening = asyncio.create_task(_listen(process, words, address))
    try:
        url = await asyncio.wait_for(address, START_S)
        async with open_session(wire) as session:
            target = await _ready(session, url, process, words)
            yield Site(process, session, target, Client(session, target, wire))
    finally:
        await _stop(process)
        await listening


async def _listen(
    process: asyncio.subprocess.Process, words: deque[str], address: "asyncio.Future[str]"
) -> None:
    """Keep the server's last words, and find its address in the first ones."""
    assert process.stderr is not None
    async for line in process.stderr:
        words.append(line.decode(errors="replace").rstrip())
        found = re.search(r"listening on (http://[^\s,]+)", words[-1])
        if found and not address.done():
            address.set_result(found[1])
    if not address.done():
        address.set_exception(ServerFailed("the server did not start:\n" + "\n".join(words)))


async def _ready(
    session: aiohttp.ClientSession, url: str, process: asyncio.subprocess.Process, words: Sequence[str]
) -> Target:
    finding = asyncio.create_task(probe.find(session, url, None, START_S))
    ending = asyncio.create_task(process.wait())
    try:
        await asyncio.wait({finding, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not finding.done():
            raise ServerFailed("the server ended while it started:\n" + "\n".join(words))
        return finding.result()
    finally:
        finding.cancel()
        ending.cancel()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()
