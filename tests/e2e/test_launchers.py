"""The launchers of TGI and LoRAX as a compose file starts them: by variables, or by words."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from server.embedded.location import adapters_dir, model_dir
from tests.e2e.running import REPOSITORY, RunningServer
from tests.nursery import Nursery

MODEL = str(model_dir())
PIRATE = str(adapters_dir() / "pirate")

StartLauncher = Callable[..., RunningServer]


@pytest.fixture
def start_launcher() -> Iterator[StartLauncher]:
    """Start `server.launchers:NAME` as its console script does; what still runs at the end is killed."""
    started: list[RunningServer] = []

    def start_one(name: str, *words: str, **variables: str) -> RunningServer:
        code = f"import sys; from server.launchers import {name}; sys.exit({name}())"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MOTET_THREADS": "1", **variables},
            stderr=subprocess.PIPE,
            text=True,
        )
        running = RunningServer(process)
        started.append(running)
        running.url = running.wait_for(r"listening on (http://[^\s,]+)").group(1)
        running.wait_for(r"^motet .*ready")
        return running

    yield start_one
    for running in started:
        running.kill()


def generate(server: RunningServer, **parameters: object) -> str:
    body = {"inputs": "What is an adapter?", "parameters": {"max_new_tokens": 12, **parameters}}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["generated_text"])


def check(server: RunningServer, *, model: str, adapter: str) -> None:
    """It is the model and the limit that were asked for, and the adapter has a voice of its own."""
    info = httpx.get(f"{server.url}/info").json()
    assert (info["model_id"], info["max_total_tokens"]) == (model, 512)
    assert generate(server, adapter_id=adapter) != generate(server)
    assert server.stop() == 0


def keep_as_the_hub_does(cache: Path, name: str, folder: str) -> None:
    """A snapshot in the cache of the hub's tools: links to files that lie elsewhere."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in Path(folder).iterdir():
        (snapshot / file.name).symlink_to(file)


def test_tgi_by_its_variables(start_launcher: StartLauncher) -> None:
    server = start_launcher(
        "tgi",
        MODEL_ID=MODEL,
        HOSTNAME="127.0.0.1",
        PORT="0",
        NUM_SHARD="1",
        MAX_TOTAL_TOKENS="512",
        LORA_ADAPTERS=f"sailor={PIRATE}",
    )
    server.wait_for(r"^text-generation-launcher: NUM_SHARD=1: ignored, because ")
    server.wait_for(r"^text-generation-launcher: this is motet serve .*--max-model-len=512")
    check(server, model=MODEL, adapter="sailor")


def test_lorax_by_its_flags_with_what_was_downloaded_before(
    start_launcher: StartLauncher, tmp_path: Path
) -> None:
    keep_as_the_hub_does(tmp_path, "org/small", MODEL)
    keep_as_the_hub_does(tmp_path, "org/sailor", PIRATE)
    words = ("--model-id", "org/small", "--preloaded-adapter-ids", "org/sailor", "--max-total-tokens", "512")
    where = ("--hostname", "127.0.0.1", "--port", "0", "--huggingface-hub-cache", str(tmp_path))
    server = start_launcher("lorax", *words, *where, "--max-active-adapters", "16")
    server.wait_for(r"^lorax-launcher: --max-active-adapters: ignored, because ")
    check(server, model="org/small", adapter="org/sailor")


@pytest.mark.parametrize("name", ["tgi", "lorax"])
def test_what_the_server_itself_refuses_ends_with_its_status(nursery: Nursery, name: str) -> None:
    words = ("--model-id", PIRATE, "--hostname", "127.0.0.1", "--port", "0")
    started = RunningServer(nursery.fork(*words, entry=f"server.launchers:{name}"))

    assert started.end() == 1
    assert "config.json" in started.lines[-1]
