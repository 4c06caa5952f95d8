"""Inferless apps in a real server, beside the embedded model: rows K1, K2, K5, K14, K17, K18, K19, K21."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.running import REPOSITORY, RunningServer, start
from tests.nursery import Nursery

APPS = Path(__file__).parent / "apps"
PYTHON = REPOSITORY / ".venv-inferless" / "bin" / "python"
KEY = "workspace-key"
BEARER = {"Authorization": f"Bearer {KEY}"}
STREAM = "/v2/models/streaming-template/generate_stream"


@pytest.fixture(scope="module")
def hosting(nursery: Nursery) -> Iterator[RunningServer]:
    """A server with all apps and a key. They are ready when the fixture is."""
    running = start(
        *("--inferless-app", str(APPS / "streaming-template"), str(APPS / "multi-lora")),
        *("--inferless-app", str(APPS / "pydantic-style")),
        *("--api-key", KEY, "--log-level", "debug"),
        nursery=nursery,
    )
    for app in ("streaming-template", "multi-lora", "pydantic-style"):
        running.wait_for(f"app {app} is ready")
    yield running
    assert running.stop() == 0, "\n".join(running.lines)
    said = "\n".join(running.lines)
    assert "What is Motet" not in said
    assert KEY not in said


def pieces(server: RunningServer, text: str) -> list[dict[str, Any]]:
    with httpx.stream(
        "POST", f"{server.url}{STREAM}", json={"parameters": {"TEXT": text}}, headers=BEARER, timeout=60
    ) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]


def chat(server: RunningServer, model: str, text: str, max_tokens: int) -> str:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
        },
        headers=BEARER,
        timeout=60,
    )
    return str(answer.json()["choices"][0]["message"]["content"])


def test_K1_K2_streaming_template_runs_as_it_stands(hosting: RunningServer) -> None:
    frames = pieces(hosting, "What is Motet?")

    assert all(set(frame) == {"OUT", "model_name", "model_version"} for frame in frames)
    assert "".join(frame["OUT"] for frame in frames) == chat(hosting, "motet", "What is Motet?", 24)
    assert len(frames) > 3
    assert {entry.name for entry in (APPS / "streaming-template").iterdir()} == {"app.py", "input_schema.py"}


def test_K14_reader_that_leaves_a_stream_leaves_nothing_to_the_next(hosting: RunningServer) -> None:
    """The template's streamer is shared by all requests: leftovers would be read by the next one."""
    alone = pieces(hosting, "How do I stream tokens?")
    with httpx.stream(
        "POST", f"{hosting.url}{STREAM}", json={"TEXT": "What is Motet?"}, headers=BEARER, timeout=60
    ) as response:
        next(response.iter_lines())

    assert pieces(hosting, "How do I stream tokens?") == alone


def test_K21_app_uses_our_adapters_by_name(hosting: RunningServer) -> None:
    for adapter in ("pirate", "german"):
        inputs = [
            {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["What is Motet?"]},
            {"name": "adapter_name", "shape": [1], "datatype": "BYTES", "data": [adapter]},
            {"name": "max_new_tokens", "optional": True, "shape": [1], "datatype": "INT16", "data": [8]},
        ]
        answer = httpx.post(
            f"{hosting.url}/v2/models/multi-lora/infer", json={"inputs": inputs}, headers=BEARER, timeout=60
        ).json()

        (output,) = answer["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("generated_result", "BYTES", [1])
        assert output["data"] == [chat(hosting, adapter, "What is Motet?", 8)]


def test_K17_app_of_classes_gets_an_object_and_may_leave_out_what_has_a_default(
    hosting: RunningServer,
) -> None:
    answer = httpx.post(
        f"{hosting.url}/v2/models/pydantic-style/infer", json={"inputs": []}, headers=BEARER, timeout=60
    ).json()

    assert answer["outputs"][0]["data"] == ["a horse near a beach a horse near a beach"]


def test_K19_every_route_but_the_probes_asks_for_the_key(hosting: RunningServer) -> None:
    for method, path in (("POST", STREAM), ("GET", "/v2/models/multi-lora")):
        assert (
            httpx.request(method, f"{hosting.url}{path}", json={"TEXT": "x"}, timeout=60).status_code == 401
        )
        assert httpx.request(
            method, f"{hosting.url}{path}", json={"TEXT": "x"}, headers=BEARER, timeout=60
        ).is_success
    assert httpx.get(f"{hosting.url}/v2/health/ready").json() == {"ready": True}


def client(*words: str) -> Any:
    assert PYTHON.exists(), "`make test` makes this environment"
    done = subprocess.run(
        [PYTHON, REPOSITORY / "tests" / "e2e" / "inferless_client.py", *words],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_K18_inferless_call_is_served(hosting: RunningServer) -> None:
    seen = client("call", f"{hosting.url}/v2/models/multi-lora/infer", KEY)

    text = chat(hosting, "pirate", "What is Motet?", 8)
    assert seen["answer"]["outputs"][0]["data"] == [text]
    assert seen["heard"] == [seen["answer"]]
    assert seen["batch"] == seen["answer"]
    assert "status code 400" in seen["refusal"]
    assert "adapter_name" in seen["refusal"]


def test_K17_decorators_of_the_real_package_are_heard() -> None:
    seen = client("load", str(REPOSITORY), str(APPS / "pydantic-style"))

    assert seen["version"] == "0.2.15"
    assert seen["request"] == "RequestObjects"
    assert seen["json_schema"] == ["prompt", "times"]
    assert [(each["name"], each["datatype"]) for each in seen["schema"]["inputs"]] == [
        ("prompt", "BYTES"),
        ("times", "INT64"),
    ]


SLOW = """
from pathlib import Path

class InferlessPythonModel:
    def initialize(self):
        {initialize}

    def infer(self, inputs, handler):
        handler.send_streamed_output({{"OUT": "started"}})
        Path("gate").read_text()
        handler.send_streamed_output({{"OUT": "ended"}})

    def finalize(self, args):
        Path("finalized").touch()
"""


def slow_app(folder: Path, initialize: str = "pass") -> Path:
    import os

    folder.mkdir()
    (folder / "app.py").write_text(SLOW.format(initialize=initialize))
    (folder / "input_schema.py").write_text("INPUT_SCHEMA = {}\nIS_STREAMING_OUTPUT = True\n")
    os.mkfifo(folder / "gate")
    return folder


def test_server_that_goes_down_lets_apps_end_and_finalizes_them(
    launch: Callable[..., RunningServer], tmp_path: Path
) -> None:
    folder = slow_app(tmp_path / "slow")
    server = launch("--inferless-app", str(folder), "--drain-timeout", "60")
    server.wait_for("app slow is ready")
    with httpx.stream(
        "POST", f"{server.url}/v2/models/slow/generate_stream", json={}, timeout=60
    ) as response:
        lines = response.iter_lines()
        first = next(lines)
        server.process.terminate()
        server.wait_for("draining")
        refused = httpx.post(f"{server.url}/v2/models/slow/generate_stream", json={}, timeout=60)
        (folder / "gate").write_text("")
        rest = [line for line in lines if line]

    assert "started" in first
    assert ["ended" in line for line in rest] == [True]
    assert refused.status_code == 503
    assert server.process.wait(20) == 0
    assert (folder / "finalized").exists()


def test_app_that_never_becomes_ready_holds_up_nobody(
    launch: Callable[..., RunningServer], tmp_path: Path
) -> None:
    """Nor does it keep the server from going down: it is ended with it."""
    folder = slow_app(tmp_path / "slow", initialize='Path("gate").read_text()')
    server = launch("--inferless-app", str(folder))

    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
    assert httpx.get(f"{server.url}/ready", timeout=30).status_code == 200
    assert httpx.get(f"{server.url}/v2/health/ready", timeout=30).status_code == 503
    answer = httpx.post(f"{server.url}/v2/models/motet/generate", json={"text_input": "Motet is"}, timeout=60)
    assert answer.json()["text_output"]
    assert server.stop() == 0
