"""A server whose weights or whose cache have few bits: said where it is said, and answering well."""

import re
from collections.abc import Callable, Sequence

import httpx
import pytest
import torch

from server.model.native.bindings import KernelsMissing, load_kernels
from tests.e2e.running import RunningServer
from tests.nursery import Nursery

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


def test_a_cache_of_eight_bits_holds_more_tokens_and_answers_the_same(launch: Launch) -> None:
    try:
        load_kernels(torch.float32, beside_amx=True)
    except KernelsMissing as missing:
        pytest.skip(str(missing))
    memory = "--kv-cache-memory-bytes", "4MiB"
    question = {"messages": [{"role": "user", "content": "Which port does the server use?"}]}

    def answer_and_room(*flags: str) -> tuple[str, int]:
        server = launch(*memory, "--cpu-kernels", "native", *flags)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answer = client.post(
                "/v1/chat/completions", json={**question, "temperature": 0, "max_tokens": 40}
            )
        ready = next(line for line in server.lines if "motet ready" in line)
        (tokens,) = re.findall(r"KV \S+ \S+ \((\d+) tokens", ready)
        assert ("tokens, int8)" in ready) == bool(flags)
        return answer.json()["choices"][0]["message"]["content"], int(tokens)

    answer, room = answer_and_room()
    same, more = answer_and_room("--kv-cache-dtype", "int8")

    assert "8000" in answer
    assert same == answer
    assert more > 3 * room, "of float32"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--quantization", "int8"), "--quantization int8 needs our own kernels, not --cpu-kernels torch"),
        (("--kv-cache-dtype", "int8"), "--kv-cache-dtype int8 needs our own kernels"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(nursery: Nursery, flags: Sequence[str], why: str) -> None:
    started = RunningServer(nursery.fork("serve", "--port", "0", "--cpu-kernels", "torch", *flags))

    assert started.end() != 0
    assert why in started.lines[-1]
    assert not [line for line in started.lines if "Traceback" in line]
