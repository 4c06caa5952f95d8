"""`lorax-client`, `text-generation` and `huggingface_hub` < 1.0: rows L2, L3, L4, L10, L15."""

import json
import subprocess
from typing import Any

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
