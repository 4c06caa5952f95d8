"""`anthropic`, `langchain-openai`, `litellm` and OpenAI's package for Node, each against a real server."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.running import REPOSITORY, RunningServer

_LIMIT_S = 240  # importing some of these takes a slow machine half a minute

pytestmark = [pytest.mark.clients, pytest.mark.timeout(_LIMIT_S + 30)]

E2E = REPOSITORY / "tests" / "e2e"
QUESTION = [{"role": "user", "content": "How do I stream tokens?"}]


def run(*command: str | Path) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def speak(client: str, server: RunningServer) -> dict[str, Any]:
    python = REPOSITORY / ".venv-sdk" / "bin" / "python"
    assert python.exists(), "`make test-clients` makes this environment"
    return run(python, E2E / "sdk_clients.py", client, server.url)


def answer(server: RunningServer, model: str = "pirate", **wish: object) -> str:
    """What the server says without any SDK: greedy, 20 tokens."""
    body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 20, **wish}
    text: str = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0][
        "message"
    ]["content"]
    return text


def test_anthropic_sdk_is_served(server: RunningServer) -> None:
    seen = speak("anthropic", server)

    assert seen["whole"] == answer(server) == "".join(seen["pieces"]) == seen["final"]
    assert seen["asynchronous"] == seen["beta"] == seen["whole"]
    assert len(seen["pieces"]) > 5
    assert seen["raw"][:2] == ["message_start", "content_block_start"]
    assert set(seen["raw"][2:-3]) == {"content_block_delta"}
    assert seen["raw"][-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert seen["stop_reason"] == "max_tokens"
    assert seen["output_tokens"] == [20, 20]
    assert seen["input_tokens"] == seen["counted"] > 5
    assert seen["continued"]
    assert seen["stopped"][0] == "stop_sequence"
    assert seen["base"] == answer(server, "motet") != seen["whole"]
    assert seen["models"][0] == "motet"
    assert seen["unknown_model"] == "NotFoundError not_found_error"
    assert seen["tools"] == "BadRequestError invalid_request_error"
    server.wait_until_idle()


def test_langchain_is_served(server: RunningServer) -> None:
    seen = speak("langchain", server)

    assert seen["plain"] == answer(server) == "".join(seen["pieces"]) == "".join(seen["asynchronous"])
    assert seen["batch"] == [seen["plain"]] * 2
    assert (seen["usage"], seen["total_usage"], seen["logprobs"]) == (20, 20, 20)
    assert seen["responses"] == "".join(seen["responses_pieces"]) == seen["plain"]
    assert seen["continued"]
    assert seen["completion"]
    server.wait_until_idle()


def test_litellm_is_served(server: RunningServer) -> None:
    seen = speak("litellm", server)

    assert seen["whole"] == answer(server) == "".join(seen["pieces"]) == seen["asynchronous"]
    assert seen["messages"] == seen["whole"] == "".join(seen["messages_pieces"])
    assert seen["responses"].startswith(seen["whole"])
    assert seen["completion"]
    assert seen["unknown_model"] == "NotFoundError"
    assert seen["bad_value"] == "BadRequestError"
    server.wait_until_idle()


def test_openai_for_node_is_served(server: RunningServer) -> None:
    node = shutil.which("node")
    assert node, "Node 20 or newer is needed"
    assert (E2E / "node" / "node_modules").exists(), "`make test-clients` installs its packages"
    seen = run(node, E2E / "node" / "openai.mjs", server.url)

    assert seen["models"] == ["motet", "german", "haiku", "json", "pirate"]
    assert seen["model"] == seen["adapter"] == "pirate"
    assert seen["whole"] == answer(server) == "".join(seen["pieces"]) == seen["helper"]
    assert len(seen["pieces"]) > 5
    assert seen["usage"] == 20
    assert seen["completion"] == "".join(seen["completion_pieces"])
    assert seen["read"] == 3
    assert seen["response"] == seen["final"] == seen["again"]
    assert seen["last"] == "".join(seen["deltas"])
    assert (seen["types"][0], seen["types"][-1]) == ("response.created", "response.completed")
    assert seen["items"] == ["user", "assistant", "user"]
    assert seen["gone"] == 404
    refused = {"request_id": True}
    assert seen["unknown_model"] == {**refused, "status": 404, "code": "model_not_found", "param": "model"}
    assert seen["bad_value"] == {**refused, "status": 400, "code": "invalid_value", "param": "temperature"}
    server.wait_until_idle()
