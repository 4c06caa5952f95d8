"""Start and stop of the real process: the port comes first, a signal drains, mistakes are one clear line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import REPOSITORY, RunningServer
from tests.nursery import Nursery

Launch = Callable[..., RunningServer]
STREAM = {
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "ignore_eos": True,
    "temperature": 0,
}


def test_health_answers_while_the_model_loads(launch: Launch) -> None:
    """C1, C19."""
    server = launch(wait=False, nursery=None)

    health = httpx.get(f"{server.url}/health", timeout=30)
    ready = httpx.get(f"{server.url}/ready", timeout=30)
    chat = httpx.post(f"{server.url}/v1/chat/completions", json=STREAM, timeout=30)

    assert health.status_code == 200
    assert health.json()["status"]
    assert ready.status_code == 503
    assert int(ready.headers["retry-after"]) >= 1
    assert chat.status_code == 503
    assert chat.json()["error"]["message"]
    server.wait_for("ready")
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_start_ends_in_one_line_that_says_it_all(server: RunningServer) -> None:
    line = server.wait_for(r"^motet .*ready").string

    for part in (server.url, "motet", "float32", "cpu", "german, haiku, json, pirate", "KV"):
        assert part in line


def test_sigterm_lets_streams_end_and_refuses_new_ones(launch: Launch) -> None:
    """D10."""
    server = launch("--drain-timeout", "60")
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json={**STREAM, "max_tokens": 3000}, timeout=60
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.terminate()
        server.wait_for("draining")
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=STREAM, timeout=60)
        body = [line for line in lines if line]

    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert body[-1] == "data: [DONE]"
    assert json.loads(body[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(20) == 0


def test_streams_that_outlast_the_drain_end_with_an_error_event(launch: Launch) -> None:
    server = launch("--drain-timeout", "0")
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json={**STREAM, "max_tokens": 4000}, timeout=60
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.terminate()
        body = [line for line in lines if line]

    assert body[-1] == "data: [DONE]"
    assert json.loads(body[-2].removeprefix("data: "))["error"]["message"]
    assert server.process.wait(20) == 0


def test_version_is_printed() -> None:
    words = [sys.executable, "-m", "server", "version"]
    said = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=90, check=True)
    assert said.stdout.startswith("motet 0.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("serve", "--port", "99999"), "--port"),
        (("serve", "--dtype", "int3"), "--dtype"),
        (("serve", "--lora-modules", "nonsense"), "--lora-modules"),
        (("serve", "--frobnicate"), "--frobnicate"),
        (("serve", "no/such/folder", "--port", "0"), "no/such/folder"),
        (("serve", "--port", "0", "--kv-cache-memory-bytes", "1KiB"), "--kv-cache-memory-bytes"),
        (("serve", "--port", "0", "--max-model-len", "9999999"), "--max-model-len"),
        (("serve", "--port", "0", "--lora-modules", "x=no/such/adapter"), "no/such/adapter"),
        (("serve", "--port", "0", "--device", "abacus"), "--device"),
        (("serve", "--port", "0", "--adapters-dir", "no/such/dir"), "--adapters-dir"),
        (("serve", "--port", "0", "--adapter-sources", "ftp"), "--adapter-sources"),
        (("serve", "--port", "0", "--adapter-sources", "s3"), "--adapter-s3-buckets"),
        (("serve", "--host", "256.1.1.1", "--port", "0"), "256.1.1.1"),
        (("serve", "--port", "0", "--inferless-app", "no/such/app"), "no/such/app"),
        (("serve", "--port", "0", "--inferless-logs", "no/such/dir"), "no/such/dir"),
    ],
)
def test_mistakes_end_the_start_with_a_line_that_names_them(
    nursery: Nursery, words: tuple[str, ...], says: str
) -> None:
    started = RunningServer(nursery.fork(*words))

    assert started.end() != 0
    assert says in started.lines[-1]
    assert not [line for line in started.lines if "Traceback" in line]


def test_environment_variables_are_flags(launch: Launch) -> None:
    server = launch(environment={"MOTET_SERVED_MODEL_NAME": "voice,base", "MOTET_API_KEY": "secret"})

    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    models = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer secret"}).json()
    assert models["data"][0]["id"] == "voice"


def test_prompts_and_answers_stay_out_of_the_log(launch: Launch) -> None:
    server = launch("--log-level", "debug")
    body = {
        **STREAM,
        "messages": [{"role": "user", "content": "xyzzy-plugh"}],
        "max_tokens": 5,
        "stream": False,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions?api_key=hush", json=body, timeout=60).json()
    assert server.stop() == 0

    said = "\n".join(server.lines)
    assert "xyzzy" not in said
    assert "hush" not in said
    assert answer["choices"][0]["message"]["content"] not in said


def test_folder_of_adapters_is_scanned_at_start_and_on_a_miss(launch: Launch, tmp_path: Path) -> None:
    import shutil

    ours = REPOSITORY / "server" / "embedded" / "adapters"
    shutil.copytree(ours / "pirate", tmp_path / "first")
    (tmp_path / "broken").mkdir()
    server = launch("--adapters-dir", str(tmp_path))
    shutil.copytree(ours / "german", tmp_path / "later")

    wish = {"messages": STREAM["messages"], "max_tokens": 3}
    assert "first" in [card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]]
    later = httpx.post(f"{server.url}/v1/chat/completions", json={**wish, "model": "later"}, timeout=60)
    broken = httpx.post(f"{server.url}/v1/chat/completions", json={**wish, "model": "broken"}, timeout=60)
    assert later.status_code == 200
    assert later.headers["x-adapter-id"] == "later"
    assert 400 <= broken.status_code < 500
    assert broken.json()["error"]["message"]


def test_second_signal_ends_it_at_once(launch: Launch) -> None:
    server = launch("--drain-timeout", "600")
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json={**STREAM, "max_tokens": 4000}, timeout=60
    ) as response:
        next(response.iter_lines())
        server.process.terminate()
        server.wait_for("draining")
        server.process.terminate()

        assert server.process.wait(20) == 130


def test_seed_of_the_server_makes_answers_repeatable(launch: Launch) -> None:
    server = launch("--seed", "7")
    wish = {"messages": STREAM["messages"], "temperature": 2, "max_tokens": 12}

    asked = [httpx.post(f"{server.url}/v1/chat/completions", json=wish, timeout=60).json() for _ in range(3)]

    assert len({answer["choices"][0]["message"]["content"] for answer in asked}) == 1
