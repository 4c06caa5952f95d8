"""Finds out whether a server is there, whether it is ready, and what it serves.

Every route asked here may be missing: servers without /health, /ready, /version or /v1/models are measured
all the same, as long as something answers and the model's name is known or not needed. What stops a run is
said in one line.
"""

import asyncio
import json
from dataclasses import dataclass
from time import monotonic

import aiohttp

from benchmarks.prompts import CountTokens
from benchmarks.records import Target

PROBE_TIMEOUT = aiohttp.ClientTimeout(total=10)
WAIT_PERIOD_S = 0.1


class NotReady(Exception):
    """There is nothing to measure; the message is the one line to print."""


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    body: object  # decoded JSON, or None
    server: str  # the header


async def find(session: aiohttp.ClientSession, url: str, model: str | None, wait_s: float) -> Target:
    """The server at `url`, waited for up to `wait_s` seconds. Raises NotReady."""
    url = url.rstrip("/").removesuffix("/v1").rstrip("/")
    deadline = monotonic() + wait_s
    while True:
        try:
            return await _look(session, url, model)
        except NotReady:
            if monotonic() >= deadline:
                raise
        await asyncio.sleep(WAIT_PERIOD_S)


async def _look(session: aiohttp.ClientSession, url: str, model: str | None) -> Target:
    health = await _get(session, url + "/health")
    ready = await _get(session, url + "/ready")
    if 503 in (health.status, ready.status):
        raise NotReady(f"The server at {url} is up but not ready yet (503). Try again, or add --wait 60.")
    models = await _get(session, url + "/v1/models")
    if models.status in (401, 403):
        raise NotReady(f"The server at {url} wants a key ({models.status}). Give it with --api-key.")
    entries = _entries(models.body)
    bases = [str(entry["id"]) for entry in entries if not entry.get("parent")]
    adapters = tuple(str(entry["id"]) for entry in entries if entry.get("parent"))
    if model is None:
        model = bases[0] if bases else await _name_from_info(session, url)
    version = await _get(session, url + "/version")
    number = version.body.get("version") if isinstance(version.body, dict) else None
    server = " ".join(str(part) for part in (health.server, number) if part)
    return Target(url=url, model=model, adapters=adapters, server=server)


async def _name_from_info(session: aiohttp.ClientSession, url: str) -> str:
    """LoRAX and TGI say their model at /info; "" is the base model for most servers that list nothing."""
    info = await _get(session, url + "/info")
    name = info.body.get("model_id") if isinstance(info.body, dict) else None
    return name if isinstance(name, str) else ""


async def token_counter(session: aiohttp.ClientSession, target: Target) -> CountTokens | None:
    """How the server counts a text's tokens (LoRAX's or vLLM's /tokenize), or None if it cannot be asked."""
    for key in ("inputs", "prompt"):

        async def count(text: str, key: str = key) -> int | None:
            body = {key: text} | ({"model": target.model} if key == "prompt" and target.model else {})
            return await _count(session, target.url, body)

        if await count("one two three") is not None:
            return count
    return None


async def _count(session: aiohttp.ClientSession, url: str, body: dict[str, str]) -> int | None:
    try:
        async with session.post(url + "/tokenize", json=body, timeout=PROBE_TIMEOUT) as response:
            answer = json.loads(await response.read()) if response.status == 200 else None
    except (aiohttp.ClientError, OSError, ValueError):  # OSError covers TimeoutError
        return None
    if isinstance(answer, list):
        return len(answer)
    if isinstance(answer, dict):
        tokens = answer.get("tokens")
        number = answer.get("count", len(tokens) if isinstance(tokens, list) else None)
        return number if isinstance(number, int) else None
    return None


async def _get(session: aiohttp.ClientSession, url: str) -> _Reply:
    try:
        async with session.get(url, timeout=PROBE_TIMEOUT) as response:
            raw = await response.read()
            status, server = response.status, response.headers.get("server", "")
    except TimeoutError:
        raise NotReady(f"Something listens at {url} but does not answer.") from None
    except aiohttp.InvalidURL:
        raise NotReady(f"{url!r} is not a URL such as http://127.0.0.1:8000.") from None
    except aiohttp.ClientConnectorError as error:
        raise NotReady(f"No server runs at {url} ({error.strerror}). Start one with: motet serve") from None
    except (aiohttp.ClientError, OSError) as error:
        raise NotReady(f"What runs at {url} does not speak HTTP ({type(error).__name__}).") from None
    try:
        body = json.loads(raw)
    except ValueError:
        body = None
    return _Reply(status, body, server)


def _entries(body: object) -> list[dict[str, object]]:
    listed = body.get("data") if isinstance(body, dict) else None
    if not isinstance(listed, list):
        return []
    return [entry for entry in listed if isinstance(entry, dict) and "id" in entry]
