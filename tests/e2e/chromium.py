"""Real Chromium, driven over its DevTools socket: open a page, look at it, type, click."""

import asyncio
import contextlib
import itertools
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)
_LIMIT_S = 30


class Page:
    """One tab. `requested` holds the address of everything that it asked for, `complaints` what its console
    says of errors: exceptions, refused loads, violations of a policy.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._has_loaded = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            else:
                self._note(said["method"], said["params"])

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._has_loaded.set()
        elif event == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"])

    async def _ask(self, method: str, **params: object) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        said = await asyncio.wait_for(answer, _LIMIT_S)
        assert "error" not in said, said
        return dict(said["result"])

    async def prepare(self) -> None:
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self._ask(f"{domain}.enable")

    async def open(self, url: str) -> None:
        """Returns when the page and what it loads are there."""
        self._has_loaded.clear()
        await self._ask("Page.navigate", url=url)
        await asyncio.wait_for(self._has_loaded.wait(), _LIMIT_S)

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression is, once what it promises is there."""
        said = await self._ask(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait for an expression to become true; asked after every change of the page."""
        await self.value(
            f"""new Promise((resolve, reject) => {{
              const limit = setTimeout(() => reject(new Error("never became true")), {_LIMIT_S * 900});
              const look = () => {{
                if (!({expression})) return;
                clearTimeout(limit); changes.disconnect(); resolve();
              }};
              const changes = new MutationObserver(look);
              changes.observe(document, {{
                subtree: true, childList: true, characterData: true, attributes: true
              }});
              look();
            }})"""
        )

    async def press(self, key: str, modifiers: int = 0) -> None:
        """A key of the keyboard by its DOM name. `modifiers`: 2 is Ctrl."""
        text = key if len(key) == 1 else {"Enter": "\r"}.get(key, "")
        code = {"Enter": 13, "Tab": 9, "Escape": 27}.get(key, ord(key[0].upper()))
        common = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": code}
        await self._ask("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        await self._ask("Input.dispatchKeyEvent", type="keyUp", **common)

    async def prefer(self, scheme: str) -> None:
        """dark or light."""
        await self._ask(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


@contextlib.asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Page]:
    """A fresh browser with one empty tab; it is gone afterwards."""
    browser = await asyncio.create_subprocess_exec(
        "chromium",
        *_FLAGS,
        f"--user-data-dir={profile}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        port = await asyncio.wait_for(_port(browser), _LIMIT_S)
        async with aiohttp.ClientSession() as http:
            address = await asyncio.wait_for(_address(http, port), _LIMIT_S)
            async with http.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                await page.prepare()
                yield page
                await page.close()
    finally:
        browser.kill()
        await browser.communicate()


async def _address(http: aiohttp.ClientSession, port: int) -> str:
    """Of the tab, which may come later than the browser; asked until it is there."""
    while True:
        async with http.get(f"http://127.0.0.1:{port}/json/list") as response:
            targets = await response.json()
        for target in targets:
            if target["type"] == "page":
                return str(target["webSocketDebuggerUrl"])


async def _port(browser: asyncio.subprocess.Process) -> int:
    """Of its DevTools, which it says."""
    assert browser.stderr is not None
    async for line in browser.stderr:
        if found := re.search(rb"DevTools listening on ws://[^/]*:(\d+)/", line):
            return int(found[1])
    raise AssertionError("chromium ended before it listened")
