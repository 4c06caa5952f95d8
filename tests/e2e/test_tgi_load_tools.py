"""What load tools send to a real server, and how they read the answer: rows L4, L8, L18, U5 to U7."""

import json
from typing import Any

import httpx
import pytest

from tests.e2e.running import RunningServer

PROMPT = "How do I stream tokens?"
FIBONACCI = "# This is a fibonacci function written in the Python programming language.def fibonacci"


def read_as_vllms_benchmark(lines: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The tokens and the last frame: comments are passed over, and what follows `data:` is JSON, always."""
    frames = [json.loads(line.removeprefix("data:")) for line in lines if line and not line.startswith(":")]
    return [frame["token"]["text"] for frame in frames], frames[-1]


@pytest.mark.parametrize("has_ignore_eos", [False, True])
@pytest.mark.parametrize("best_of", [{}, {"best_of": 1}])
def test_U6_benchmark_of_vllm_reads_a_tgi_stream(
    server: RunningServer, has_ignore_eos: bool, best_of: dict[str, int]
) -> None:
    parameters: dict[str, object] = {
        **best_of,
        "max_new_tokens": 12,
        "do_sample": True,
        "temperature": 0.01,
        "top_p": 0.99,
        "truncate": 8,
    }
    if has_ignore_eos:
        parameters["ignore_eos_token"] = True
    body = {"inputs": PROMPT, "parameters": parameters}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as response:
        tokens, last = read_as_vllms_benchmark(list(response.iter_lines()))

    assert response.status_code == 200
    assert last["generated_text"]
    assert last["details"]["generated_tokens"] == len(tokens)
    if has_ignore_eos:
        assert len(tokens) == 12


def data_lines(server: RunningServer, path: str, body: dict[str, Any], **headers: str) -> list[str]:
    """What follows `data:` in each line that is not empty; comments are read as data, and would be found."""
    with httpx.stream("POST", f"{server.url}{path}", json=body, headers=headers, timeout=60) as response:
        assert response.status_code == 200
        return [line.removeprefix("data:").strip() for line in response.iter_lines() if line]


@pytest.mark.parametrize("has_ignore_eos", [False, True])
def test_U5_benchmark_of_vllm_reads_a_chat_stream(server: RunningServer, has_ignore_eos: bool) -> None:
    body: dict[str, Any] = {
        "model": "motet",
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "temperature": 0.0,
        "max_tokens": 12,
        "stream": True,
    }
    if has_ignore_eos:
        body["ignore_eos"] = True
    *chunks, done = data_lines(server, "/v1/chat/completions", body, authorization="Bearer None")
    pieces = [json.loads(chunk)["choices"][0]["delta"].get("content") for chunk in chunks]

    assert done == "[DONE]"
    assert "".join(piece or "" for piece in pieces) == json.loads(chunks[-1])["generated_text"] != ""
    assert pieces[0]  # the first chunk is the first token, whichever of them a tool takes the time of


def test_U7_benchmark_of_vllm_reads_a_triton_stream(server: RunningServer) -> None:
    body = {
        "accumulate_tokens": True,
        "text_input": PROMPT,
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 12,
        "stream": True,
    }
    frames = [json.loads(line) for line in data_lines(server, "/v2/models/motet/generate_stream", body)]
    whole = httpx.post(f"{server.url}/v2/models/motet/generate", json=body, timeout=60).json()

    assert len(frames) > 3
    assert "".join(frame["text_output"] for frame in frames) == whole["text_output"] != ""


def test_load_script_of_lorax_finds_its_tokens_and_its_times(server: RunningServer) -> None:
    """It wants exactly as many tokens as it asked for, and reads these headers as numbers."""
    parameters = {
        "details": True,
        "max_new_tokens": 60,
        "temperature": 0.2,
        "top_p": 0.95,
        "seed": 0,
        "ignore_eos_token": True,  # the script relies on a code model that goes on for so long by itself
    }
    body = {"inputs": FIBONACCI, "parameters": parameters}
    response = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    details = response.json()["details"]
    numbers = {
        name: int(response.headers[name])
        for name in (
            "x-total-time",
            "x-total-tokens",
            "x-validation-time",
            "x-queue-time",
            "x-inference-time",
            "x-time-per-token",
        )
    }

    assert details["generated_tokens"] == len(details["tokens"]) == 60
    assert numbers["x-total-tokens"] == details["prompt_tokens"] + 60
    assert numbers["x-inference-time"] <= numbers["x-total-time"] + 1
    again = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    assert [token["id"] for token in again["details"]["tokens"]] == [
        token["id"] for token in details["tokens"]
    ]


def test_L8_adapter_id_and_model_name_the_same_adapter(server: RunningServer) -> None:
    """Whose answers equal peft's (tests/server/engine/test_adapter_parity.py)."""

    def by_lorax(parameters: dict[str, object]) -> httpx.Response:
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 16, **parameters}}
        return httpx.post(f"{server.url}/generate", json=body, timeout=60)

    def by_openai(model: str) -> str:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
        return str(
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        )

    pirate = by_lorax({"adapter_id": "pirate", "adapter_source": "local"})
    base = by_lorax({})

    assert pirate.json()["generated_text"] == by_openai("pirate")
    assert base.json()["generated_text"] == by_openai("")
    assert pirate.json()["generated_text"] != base.json()["generated_text"]
    assert (pirate.headers["x-adapter-id"], pirate.headers["x-adapter-source"]) == ("pirate", "local")
    assert base.headers["x-adapter-id"] == "__base_model__"


def test_L4_reasons_to_stop_and_where_the_stop_string_stays(server: RunningServer) -> None:
    """LoRAX's routes keep it, and cut the text right after it, also inside a token; OpenAI's take it away."""

    def ask(**parameters: object) -> tuple[str, str]:
        body = {"inputs": PROMPT, "parameters": {"apply_chat_template": True, **parameters}}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
        return answer["generated_text"], answer["details"]["finish_reason"]

    def chat(**fields: object) -> tuple[str, str]:
        body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, **fields}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
        return answer["message"]["content"], answer["finish_reason"]

    whole, reason = ask()
    assert (reason, chat()) == ("eos_token", (whole, "stop"))
    short, reason = ask(max_new_tokens=3)
    assert (reason, chat(max_tokens=3)) == ("length", (short, "length"))
    for stop in (whole[5:8], whole[6:9], whole[7:9]):
        before = whole[: whole.index(stop)]
        assert ask(stop=[stop]) == (before + stop, "stop_sequence")
        assert chat(stop=stop) == (before, "stop")


@pytest.mark.parametrize("path", ["/health", "/info", "/metrics", "/ping", "/startup"])
def test_L18_other_routes_answer(server: RunningServer, path: str) -> None:
    assert httpx.get(f"{server.url}{path}", timeout=60).status_code == 200


def test_L18_info_counts_the_memory_that_there_is(server: RunningServer) -> None:
    info = httpx.get(f"{server.url}/info").json()

    said = server.wait_for(r"KV [^(]*\((\d+) tokens\)").group(1)
    assert info["max_batch_total_tokens"] == int(said) >= info["max_total_tokens"]
    assert info["max_concurrent_requests"] == 256 + 1024
    assert info["max_client_batch_size"] == 256 + 1024


def test_L18_tokens_of_a_chat_are_those_it_is_counted_by(server: RunningServer) -> None:
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
    tokens = httpx.post(f"{server.url}/chat_tokenize", json=chat).json()
    ids = [token["id"] for token in tokens["tokenize_response"]]
    usage = httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60).json()["usage"]

    assert usage["prompt_tokens"] == len(ids)
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": ids}).json() == {
        "prompt": tokens["templated_text"]
    }
