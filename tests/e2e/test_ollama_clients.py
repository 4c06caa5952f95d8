"""Ollama's own packages for Python and Node against a real server: rows C7 to C12."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import __version__
from tests.e2e.running import REPOSITORY, RunningServer

pytestmark = pytest.mark.clients

E2E = REPOSITORY / "tests" / "e2e"
QUESTION = [{"role": "user", "content": "How do I stream tokens?"}]
TAGS = [["motet", ""], ["german", "motet"], ["haiku", "motet"], ["json", "motet"], ["pirate", "motet"]]
NOT_FOUND = [404, "model 'nobody' not found"]


def run(*command: str | Path) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def answer(server: RunningServer, model: str = "pirate") -> str:
    """What the OpenAI route says: greedy, 20 tokens."""
    body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    whole = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    text: str = whole["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def seen(server: RunningServer) -> dict[str, Any]:
    """What the package for Python saw."""
    python = REPOSITORY / ".venv-ollama" / "bin" / "python"
    assert python.exists(), "`make test-clients` makes this environment"
    return run(python, E2E / "ollama_client.py", server.url)


def test_C7_C9_generate(server: RunningServer, seen: dict[str, Any]) -> None:
    generate = seen["generate"]

    assert generate["whole"] == answer(server) == "".join(generate["pieces"])
    assert len(generate["pieces"]) > 5
    assert generate["done"] == [False] * (len(generate["pieces"]) - 1) + [True]
    assert generate["raw"]
    assert generate["whole"].startswith(generate["stopped"])
    assert " " not in generate["stopped"]
    last = generate["last"]
    assert (last["done_reason"], last["eval_count"]) == ("length", 20)
    parts = [last[name] for name in ("load_duration", "prompt_eval_duration", "eval_duration")]
    assert all(part > 0 for part in parts)
    assert abs(last["total_duration"] - sum(parts)) < 10  # nanoseconds that rounding makes


def test_the_context_of_an_answer_is_read_again(seen: dict[str, Any]) -> None:
    generate = seen["generate"]

    assert generate["context"]
    assert generate["longer_by"] > 20
    assert generate["prompt_with_context"] > generate["last"]["prompt_eval_count"] + 20


def test_C10_chat(server: RunningServer, seen: dict[str, Any]) -> None:
    chat = seen["chat"]

    assert chat["whole"] == answer(server) == "".join(chat["pieces"])
    assert chat["roles"] == ["assistant"]
    assert chat["reason"] == ["length", "stop"]
    assert chat["seeded"][0] == chat["seeded"][1]
    assert chat["logprobs"] == [2] * 20
    assert chat["models"]["pirate"] == chat["models"]["pirate:latest"]
    assert len(set(chat["models"].values())) == 3
    assert chat["models"]["motet"] == answer(server, "motet")


def test_C11_adapters_are_models(seen: dict[str, Any]) -> None:
    models = seen["models"]

    assert models["tags"] == TAGS
    assert all(length == 64 for length in models["digests"])
    assert [name for name, _ in models["ps"]] == [name for name, _ in TAGS]
    assert models["family"] == "llama"
    assert models["parent"] == "motet"
    assert models["context_length"] == models["ps"][0][1] > 1000
    assert models["capabilities"] == ["completion"]
    assert models["has_template"]
    assert (models["pull"], models["pull_steps"][-1]) == ("success", "success")


def test_C12_calls_without_a_prompt(seen: dict[str, Any]) -> None:
    assert seen["generate"]["load"] == ["", True, "load"]
    assert seen["generate"]["unload"] == "unload"
    assert seen["chat"]["load"] == "load"


def test_embeddings(seen: dict[str, Any]) -> None:
    embeddings = seen["embeddings"]

    assert (embeddings["count"], embeddings["short"], embeddings["nothing"]) == (2, 8, 0)
    assert embeddings["lengths"] == pytest.approx([1, 1])
    assert embeddings["far_from_alone"] < 1e-4
    assert embeddings["old"] < 1e-4
    assert embeddings["apart"] > 0.01
    assert embeddings["far_from_base"] > 0.001
    assert embeddings["prompt_tokens"] > 8


def test_refusals_reach_the_client(seen: dict[str, Any]) -> None:
    errors = seen["errors"]

    assert all(errors[name] == NOT_FOUND for name in ("unknown", "unknown_stream", "show", "embed"))
    assert errors["pull"][0] == 404
    for name in ("format", "tools", "images"):
        assert errors[name] == [400, f"{name} is not supported by this server"]
    assert errors["option"][0] == 400
    assert "temperature" in errors["option"][1]
    for name in ("create", "copy", "delete", "push"):
        assert errors[name][0] == 400
        assert errors[name][1].startswith(f"/api/{name} is not supported")


def test_the_asynchronous_client_sees_the_same(seen: dict[str, Any]) -> None:
    asynchronous = seen["asynchronous"]

    assert "".join(asynchronous["pieces"]) == asynchronous["whole"] == seen["generate"]["whole"]
    assert asynchronous["at_once"] == [seen["chat"]["whole"]]


def test_the_package_for_node_is_served(server: RunningServer) -> None:
    node = shutil.which("node")
    assert node is not None, "Node 20 or newer has to be installed"
    assert (E2E / "node" / "node_modules").is_dir(), "`make test-clients` makes this folder"
    seen = run(node, E2E / "node" / "ollama.mjs", server.url)

    assert seen["generated"] == "".join(seen["pieces"]) == answer(server)
    assert seen["chat"] == "".join(seen["chatPieces"]) == seen["generated"]
    assert len(seen["pieces"]) > 5
    assert seen["last"]["done"]
    assert seen["last"]["generated_text"] == seen["generated"]
    assert seen["reason"] == "length"
    assert seen["left"] == "AbortError"
    assert seen["tags"] == TAGS
    assert seen["ps"] == [name for name, _ in TAGS]
    assert (seen["family"], seen["capabilities"]) == ("llama", ["completion"])
    assert seen["version"] != __version__  # Ollama's own: clients compare it with what they need
    assert (seen["pull"], seen["load"]) == ("success", "load")
    assert seen["vectors"] == pytest.approx([1, 1])
    assert seen["unknown"] == seen["unknownStream"] == NOT_FOUND
    assert seen["format"][0] == seen["delete"][0] == 400
    server.wait_until_idle()
