"""`lorax-client`, `text-generation` and `huggingface_hub` < 1.0: rows L2, L3, L4, L8, L10, L15."""

import json
import subprocess
from typing import Any

import httpx

from tests.e2e.running import REPOSITORY, RunningServer


def speak(client: str, url: str, script: str = "legacy_clients.py") -> dict[str, Any]:
    """What a client saw at this address."""
    python = REPOSITORY / ".venv-legacy" / "bin" / "python"
    assert python.exists(), "`make test` makes this environment"
    done = subprocess.run(
        [python, REPOSITORY / "tests" / "e2e" / script, client, url],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_L2_L3_L10_lorax_client_is_served(server: RunningServer) -> None:
    """It wants JSON in every line of data, `skipped` in every token, and asks for details by itself."""
    seen = speak("lorax", server.url)

    assert len(seen["frames"]) == 6
    assert "".join(seen["frames"]) == seen["whole"] == seen["last"]
    assert seen["early"] == [None] * 5
    assert seen["finish_reason"] == "length"
    assert seen["prompt_tokens"] >= 2
    assert len(seen["asynchronous"]) == 4
    assert "".join(seen["asynchronous"]) == seen["base"]
    assert seen["unknown_adapter"] == "NotFoundError"
    assert seen["too_long"] == "ValidationError"


def test_L8_lorax_client_merges_adapters(server: RunningServer) -> None:
    """Two adapters that share no target: their merge is what both do at once, which needs no merging."""
    seen = speak("lorax_merges", server.url)
    parameters = {"max_new_tokens": 12, "lora": [{"name": "pirate"}, {"name": "haiku"}]}
    unmerged = httpx.post(
        f"{server.url}/generate", json={"inputs": "Motet is", "parameters": parameters}, timeout=60
    )

    assert unmerged.headers["x-adapter-id"] == "haiku:1+pirate:1"
    assert seen["linear"] == seen["streamed"] == unmerged.json()["generated_text"]
    assert seen["linear"] not in (seen["pirate"], seen["base"])
    for first, second in seen["others"].values():
        assert first == second
        assert first
    assert seen["frequency"]
    assert seen["negative"] != seen["linear"]
    assert seen["ranks"][0] == "ValidationError"
    assert "'german' has 16, 'haiku' has 12" in seen["ranks"][1] or (
        "'haiku' has 12, 'german' has 16" in seen["ranks"][1]
    )
    assert seen["unknown"][0] == "NotFoundError"
    assert "`density` must be > 0.0 and <= 1.0 with ties" in seen["no_density"][1]
    assert "base model adapter cannot be merged" in seen["of_the_base"][1]
    assert not any("secret" in line for line in server.lines)


def test_text_generation_client_is_served(server: RunningServer) -> None:
    seen = speak("text_generation", server.url)

    assert "".join(seen["frames"]) == "".join(seen["asynchronous"]) == seen["whole"]
    assert len(seen["frames"]) == 6
    assert seen["finish_reason"] == "length"
    assert seen["chat"]


def test_hub_client_is_served(server: RunningServer) -> None:
    """L15: over the compatible route."""
    seen = speak("hub", server.url)

    assert "".join(seen["frames"]) == seen["whole"]
    assert seen["chat"] == seen["chunks"]
    assert seen["too_long"] == "ValidationError"
