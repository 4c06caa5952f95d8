"""Adapters that come and go over `/v1/adapters`, on a real server: uploads, restarts, pins, removals."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.running import REPOSITORY, RunningServer

OURS = REPOSITORY / "server" / "embedded" / "adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHAT = {"messages": [{"role": "user", "content": "What is Motet?"}], "temperature": 0, "max_tokens": 20}

Launch = Callable[..., RunningServer]


def upload(server: RunningServer, name: str, of: str = "pirate", **values: str) -> httpx.Response:
    files = [("file", (file, (OURS / of / file).read_bytes())) for file in (CONFIG, WEIGHTS)]
    return httpx.post(f"{server.url}/v1/adapters", data={"name": name, **values}, files=files, timeout=60)


def say(server: RunningServer, model: str) -> str:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "model": model}, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def record(server: RunningServer, name: str) -> dict[str, Any] | None:
    answer = httpx.get(f"{server.url}/v1/adapters/{name}")
    return answer.json() if answer.status_code == 200 else None


def test_an_upload_speaks_survives_a_restart_and_goes_with_its_files(launch: Launch, tmp_path: Path) -> None:
    first = launch("--adapters-dir", str(tmp_path))
    uploaded = upload(first, "sailor", pin="true")
    spoken = say(first, "sailor")
    assert uploaded.status_code == 201, uploaded.text
    assert (uploaded.json()["source"], uploaded.json()["pinned"]) == ("upload", True)
    assert spoken == say(first, "pirate") != say(first, "motet")
    assert upload(first, "sailor").status_code == 200
    assert upload(first, "sailor", of="german").status_code == 400
    assert first.stop() == 0

    second = launch("--adapters-dir", str(tmp_path))
    assert say(second, "sailor") == spoken
    again = record(second, "sailor")
    assert again is not None
    assert (again["source"], again["tier"]) == ("upload", "device")
    assert upload(second, "sailor", of="german", replace="true").status_code == 201
    assert say(second, "sailor") == say(second, "german") != spoken
    removed = httpx.delete(f"{second.url}/v1/adapters/sailor", params={"force": "true"}, timeout=60).json()
    assert removed["files_removed"] is True
    assert record(second, "sailor") is None
    assert list(tmp_path.iterdir()) == []
    second.wait_until_idle()
    assert second.stop() == 0


def test_without_a_folder_uploads_last_as_long_as_the_server(launch: Launch, tmp_path: Path) -> None:
    server = launch(environment={"TMPDIR": str(tmp_path)}, nursery=None)
    assert upload(server, "sailor").status_code == 201
    assert say(server, "sailor") == say(server, "pirate")
    (folder,) = tmp_path.glob("motet-uploads-*")
    assert (folder / "sailor" / WEIGHTS).exists()
    assert server.stop() == 0
    assert list(tmp_path.glob("motet-uploads-*")) == []


def test_files_that_cannot_be_served_are_never_seen(launch: Launch, tmp_path: Path) -> None:
    server = launch("--adapters-dir", str(tmp_path))
    config = json.loads((OURS / "pirate" / CONFIG).read_text())
    weights = (OURS / "pirate" / WEIGHTS).read_bytes()
    for broken_config, broken_weights in (
        ({**config, "r": 3}, weights),
        (config, weights[:-100]),
        ({**config, "peft_type": "PREFIX_TUNING"}, weights),
        (config, b""),
    ):
        files = [("f", (CONFIG, json.dumps(broken_config).encode())), ("f", (WEIGHTS, broken_weights))]
        refused = httpx.post(f"{server.url}/v1/adapters", data={"name": "broken"}, files=files, timeout=60)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["message"]
        assert record(server, "broken") is None
        assert list(tmp_path.iterdir()) == []
    assert server.metric("motet_adapters") == 4 + 4  # registered, and in host memory; none on the device
    assert server.stop() == 0


def test_removing_by_force_ends_a_stream_and_frees_its_memory(launch: Launch, tmp_path: Path) -> None:
    server = launch("--adapters-dir", str(tmp_path))
    weights = (OURS / "pirate" / WEIGHTS).read_bytes()
    config = {**json.loads((OURS / "pirate" / CONFIG).read_text()), "lora_alpha": 17}  # a revision of its own
    files = [("f", (CONFIG, json.dumps(config).encode())), ("f", (WEIGHTS, weights))]
    added = httpx.post(f"{server.url}/v1/adapters", data={"name": "org"}, files=files, timeout=60)
    assert added.status_code == 201, added.text
    body = {**CHAT, "model": "org", "stream": True, "max_tokens": 3000, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        removed = httpx.delete(f"{server.url}/v1/adapters/org", params={"force": "true"}, timeout=60).json()
        rest = [line for line in lines if line]
    assert (removed["ended"], removed["users"]) == (1, 0)
    assert removed["freed_bytes"] == added.json()["bytes"]
    assert "was removed from the server" in rest[-2]
    assert rest[-1] == "data: [DONE]"
    server.wait_until_idle()
    assert server.stop() == 0


def test_check_tells_before_the_start_what_the_server_says_after_it(server: RunningServer) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "adapters", "check", "--json", str(OURS / "pirate")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    (verdict,) = json.loads(done.stdout)
    said = record(server, "pirate")

    assert said is not None
    for field in ("kind", "rank", "targets", "bytes", "revision"):
        assert verdict[field] == said[field]
