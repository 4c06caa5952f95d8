"""Keys of a real server: limited to some adapters, changed while it runs, and from pages of other origins."""

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.chromium import Page, chromium
from tests.e2e.running import RunningServer, start
from tests.nursery import Nursery

CHAT = {"messages": [{"role": "user", "content": "What is Motet?"}], "max_tokens": 8, "stream": True}
EXPOSED = ("x-adapter-id", "x-compute-time", "x-prompt-tokens", "x-model-id", "x-request-id")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# who\nsk-all\nsk-pirate name=pete adapters=pirate base=no\n")
    return path


@pytest.fixture(scope="module")
def guarded(nursery: Nursery, file: Path, server: RunningServer) -> Iterator[RunningServer]:
    """Asks for a key, and lets pages of `server` read its answers."""
    flags = ("--api-keys-file", str(file), "--allowed-origins", server.url)
    running = start(*flags, nursery=nursery)
    yield running
    assert running.stop() == 0
    assert "sk-" not in "\n".join(running.lines)


def ask(server: RunningServer, model: str, key: str) -> httpx.Response:
    body = {**CHAT, "model": model}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"x-api-key": key}, timeout=60)


def test_D12_K19_key_is_kept_to_its_adapters_and_told_nothing_of_others(guarded: RunningServer) -> None:
    allowed, forbidden, unknown, base = (
        ask(guarded, model, "sk-pirate") for model in ("pirate", "german", "nobody", "motet")
    )
    models = httpx.get(
        f"{guarded.url}/v1/models", headers={"authorization": "Bearer sk-pirate"}, timeout=60
    ).json()

    assert allowed.headers["x-adapter-id"] == "pirate"
    assert forbidden.status_code == unknown.status_code == base.status_code == 404
    assert forbidden.text == unknown.text.replace("nobody", "german")
    assert [card["id"] for card in models["data"]] == ["pirate"]
    assert ask(guarded, "german", "sk-all").headers["x-adapter-id"] == "german"
    assert ask(guarded, "german", "sk-other").status_code == 401


def test_keys_change_while_the_server_runs(guarded: RunningServer, file: Path) -> None:
    before = file.read_text()
    models = f"{guarded.url}/v1/models"

    def ask_until(is_so: Callable[[int], bool]) -> int:
        limit = time.monotonic() + 60
        while not is_so(status := httpx.get(f"{models}?api_key=sk-new", timeout=60).status_code):
            assert time.monotonic() < limit
        return status

    ask_until(lambda status: status == 401)
    file.write_text(before + "sk-new\n")
    ask_until(lambda status: status == 200)
    file.write_text(before + "sk-new no-option\n")
    status = ask_until(lambda _: any("the old keys stay: line 4" in line for line in guarded.lines))
    file.write_text(before)
    ask_until(lambda status: status == 401)

    assert status == 200


def test_file_that_cannot_be_used_ends_the_start_in_one_line(
    launch: Callable[..., RunningServer], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("sk-secret nonsense\n")
    process = launch("--port", "0", "--api-keys-file", str(tmp_path / "keys"), wait=False)
    line = process.wait_for("api-keys-file").string

    assert process.process.wait(30) == 1
    assert "line 1" in line
    assert "secret" not in line


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with chromium(tmp_path / "profile") as opened:
        yield opened


async def fetched(page: Page, url: str, headers: dict[str, str], body: object = CHAT) -> dict[str, Any]:
    """What a page sees of a request: status, headers and text, or the error that fetch ends with."""
    options = {
        "method": "POST",
        "headers": {"content-type": "application/json", **headers},
        "body": json.dumps(body),
    }
    return dict(
        await page.value(
            f"""fetch({json.dumps(url)}, {json.dumps(options)}).then(
              async (response) => ({{status: response.status, headers: Object.fromEntries(response.headers),
                                     text: await response.text()}}),
              (error) => ({{error: error.name}}))"""
        )
    )


async def test_U4_pages_of_allowed_origins_read_answers_and_refusals_with_their_headers(
    guarded: RunningServer, server: RunningServer, page: Page
) -> None:
    await page.open(f"{server.url}/version")
    url = f"{guarded.url}/v1/chat/completions"
    good = await fetched(page, url, {"authorization": "Bearer sk-all", "x-stainless-lang": "js"})
    in_query = await fetched(page, f"{url}?api_key=sk-all", {})
    without = await fetched(page, url, {})
    unknown = await fetched(page, url, {"x-api-key": "sk-all"}, {**CHAT, "model": "nobody"})
    nowhere = await fetched(page, f"{guarded.url}/v1/nowhere", {"x-api-key": "sk-all"})

    assert good["status"] == in_query["status"] == 200
    assert good["text"].endswith("data: [DONE]\n\n")
    assert set(EXPOSED) <= set(good["headers"])
    assert [without["status"], unknown["status"], nowhere["status"]] == [401, 404, 404]
    for refused in (without, unknown, nowhere):
        assert json.loads(refused["text"])["error"]["message"]
        assert refused["headers"]["x-request-id"]


async def test_pages_of_other_origins_read_nothing(
    guarded: RunningServer, server: RunningServer, page: Page
) -> None:
    await page.open(f"{server.url.replace('127.0.0.1', 'localhost')}/")

    for headers in ({"authorization": "Bearer sk-all"}, {}):
        assert await fetched(page, f"{guarded.url}/v1/chat/completions", headers) == {"error": "TypeError"}
