"""Ollama's routes of a real server over plain HTTP: rows C7 to C12, and what only a real engine shows."""

import json
from datetime import datetime
from typing import Any

import httpx
import pytest

from tests.e2e.running import RunningServer

QUESTION = "How do I stream tokens?"
GREEDY = {"temperature": 0, "num_predict": 20}


def post(server: RunningServer, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"model": "pirate", **body}, timeout=100)


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.split("\n")[:-1]]


def test_C7_C9_tokens_arrive_as_lines_and_together_are_the_answer(server: RunningServer) -> None:
    streamed = lines(post(server, "/api/generate", prompt=QUESTION, options=GREEDY))
    whole = post(server, "/api/generate", prompt=QUESTION, options=GREEDY, stream=False).json()

    assert "".join(line["response"] for line in streamed) == whole["response"]
    assert [line["done"] for line in streamed] == [False] * (len(streamed) - 1) + [True]
    assert len(streamed) > 10
    assert streamed[-1]["context"] == whole["context"]
    assert streamed[-1]["generated_text"] == whole["response"]
    times = [datetime.fromisoformat(line["created_at"]) for line in streamed]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_C10_chat_says_what_generate_says(server: RunningServer) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    chat = lines(post(server, "/api/chat", messages=messages, options=GREEDY))
    whole = post(server, "/api/generate", prompt=QUESTION, options=GREEDY, stream=False).json()

    assert "".join(line["message"]["content"] for line in chat) == whole["response"]


def test_C11_C12_every_listed_model_can_be_loaded_and_asked(server: RunningServer) -> None:
    for model in httpx.get(f"{server.url}/api/tags").json()["models"]:
        name = model["name"]
        assert post(server, "/api/generate", model=name).json()["done_reason"] == "load"
        said = post(server, "/api/generate", model=name, prompt=QUESTION, options=GREEDY, stream=False).json()
        assert said["response"]


def test_the_context_of_an_answer_comes_out_of_the_prefix_cache(server: RunningServer) -> None:
    long = {"temperature": 0, "num_predict": 40}
    first = lines(post(server, "/api/generate", prompt=QUESTION * 10, options=long))[-1]
    wish = {"prompt": "And then?", "context": first["context"], "options": GREEDY}
    again = lines(post(server, "/api/generate", **wish))[-1]

    assert again["prompt_eval_count"] > len(first["context"])
    assert again["details"]["cached_tokens"] >= len(first["context"]) - 20  # whole blocks of it


def test_a_conversation_beyond_the_context_goes_on(server: RunningServer) -> None:
    turns = [
        {"role": role, "content": f"{text} {i}. " * 8}
        for i in range(200)
        for role, text in (("user", "Tell me about tokens"), ("assistant", "They come one by one"))
    ]
    messages = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": QUESTION}]
    said = post(server, "/api/chat", messages=messages, options=GREEDY, stream=False).json()
    shown = post(server, "/api/show").json()
    context = shown["model_info"][f"{shown['details']['family']}.context_length"]

    assert said["eval_count"] > 0
    assert context // 4 < said["prompt_eval_count"] < context
    refused = post(server, "/api/chat", messages=messages, truncate=False)
    assert refused.status_code == 400


@pytest.mark.parametrize("last_n", [0, 8, -1])
def test_a_repeat_penalty_looks_as_far_back_as_it_is_told(server: RunningServer, last_n: int) -> None:
    options = {"temperature": 0, "num_predict": 40, "repeat_penalty": 50, "repeat_last_n": last_n}
    plain = post(server, "/api/generate", prompt=QUESTION, options=GREEDY, stream=False).json()
    penalised = post(server, "/api/generate", prompt=QUESTION, options=options, stream=False).json()

    assert penalised["response"].startswith(plain["response"]) == (last_n == 0)


def test_a_client_that_leaves_ends_its_request(server: RunningServer) -> None:
    body = {"model": "pirate", "prompt": QUESTION, "options": {"temperature": 1.5, "num_predict": -1}}
    with httpx.stream("POST", f"{server.url}/api/generate", json=body, timeout=60) as response:
        next(response.iter_lines())

    server.wait_until_idle()


def test_texts_that_mean_the_same_are_closer_than_others(server: RunningServer) -> None:
    texts = ["The cat sat on the mat.", "A cat sits on a mat.", "Invoices are due in March."]
    vectors = post(server, "/api/embed", model="motet", input=texts).json()["embeddings"]

    def alike(one: int, other: int) -> float:
        return sum(a * b for a, b in zip(vectors[one], vectors[other], strict=True))

    assert alike(0, 1) > alike(0, 2)
    assert alike(0, 0) == pytest.approx(1, abs=1e-5)
