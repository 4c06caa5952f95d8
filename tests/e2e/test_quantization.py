"""A server whose weights have few bits: said where it is said, and answering well."""

import subprocess
import sys
from collections.abc import Callable

import httpx
import pytest
import torch

from server.model.native.bindings import KernelsMissing, load_kernels
from tests.e2e.running import RunningServer

Launch = Callable[..., RunningServer]


@pytest.mark.parametrize(("quantization", "level"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_it_answers_and_says_what_it_is(launch: Launch, quantization: str, level: str) -> None:
    try:
        load_kernels(torch.float32, beside_amx=True)
    except KernelsMissing as missing:
        pytest.skip(str(missing))
    server = launch("--quantization", quantization)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        question = {"messages": [{"role": "user", "content": "Which port does the server use?"}]}
        answer = client.post(
            "/v1/chat/completions", json={**question, "temperature": 0, "max_tokens": 40}
        ).json()
        shown = client.post(
            "/api/show", json={"model": client.get("/v1/models").json()["data"][0]["id"]}
        ).json()

    assert "8000" in answer["choices"][0]["message"]["content"]
    assert shown["details"]["quantization_level"] == level
    assert any(f"weights of {quantization[3:]} bits" in line for line in server.lines)


def test_what_cannot_be_had_is_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "server", "serve", "--port", "0"]
    flags = ["--quantization", "int8", "--cpu-kernels", "torch"]

    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode != 0
    assert "--quantization int8 needs our own kernels, not --cpu-kernels torch" in done.stderr
    assert "Traceback" not in done.stderr
