"""Large requests: refused before they cost anything, or worked on where nobody waits for it."""

import json
import threading
from dataclasses import replace

import httpx
import pytest

from server.api import json_body
from server.api.json_body import INLINE_BYTES, parse_object
from server.api.messages import count_chars
from tests.server.api.fake_service import FakeService

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = "x" * 5_000_000
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "message",
    [
        {"name": LONG},
        {"tool_call_id": LONG},
        {"tool_calls": [{**CALL, "id": LONG}]},
        {"tool_calls": [{**CALL, LONG: 1}]},
        {"tool_calls": [{**CALL, "function": {"name": LONG, "arguments": "{}"}}]},
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": json.dumps({"a": [LONG]})}}]},
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": json.dumps([1] * 1_000_000)}}]},
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": json.dumps([[]] * 1_000_000)}}]},
    ],
    ids=["name", "tool_call_id", "id", "key", "function", "argument", "numbers", "lists"],
)
async def test_all_that_a_template_may_print_is_counted_before_it_is_rendered(
    client: httpx.AsyncClient, service: FakeService, message: dict[str, object]
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, **message}]
    response = await client.post(CHAT, json={"messages": messages})

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert service.tokenizer.rendered == []
    assert service.is_idle


def test_characters_of_messages_are_those_of_all_their_values() -> None:
    assert count_chars([{"role": "user", "content": "abc"}]) == 7
    assert count_chars([{"tool_calls": [{"a": ["b", 10, None, True]}]}]) == 2 + 2 + 1 + 2 + 1 + 2 + 4 + 4


async def test_what_a_template_makes_too_long_is_refused_before_it_is_tokenised(
    client: httpx.AsyncClient, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.tokenizer, "render_chat", lambda messages, **options: "x" * 4001)
    response = await client.post(CHAT, json={"messages": [{"role": "user", "content": "Hi"}]})

    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert service.tokenizer.num_encoded == 0
    assert service.is_idle


async def test_text_beyond_the_context_is_not_tokenised_for_show(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """As generation would refuse it, with the words and the status of the route's family."""
    response = await client.post("/tokenize", json={"inputs": "x" * 4001})

    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    assert "4001 characters" in response.json()["error"]


@pytest.mark.parametrize(
    "body", [{"prompt": "x" * 4001}, {"prompt": [65] * 1000}], ids=["characters", "tokens"]
)
async def test_prompt_that_cannot_fit_is_refused_before_an_adapter_is_held(
    client: httpx.AsyncClient, service: FakeService, body: dict[str, object]
) -> None:
    service.registry.add("pirate")
    response = await client.post(COMPLETIONS, json={"model": "pirate", **body})

    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert service.leases == []


async def test_ids_of_a_long_prompt_are_checked_in_the_pool(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    threads: list[threading.Thread] = []

    class Size(int):
        def __le__(self, other: int) -> bool:
            threads.append(threading.current_thread())
            return int(self) <= other

    service.card = replace(service.card, max_model_len=5000, vocab_size=Size(0x110000))
    response = await client.post(COMPLETIONS, json={"prompt": "x" * 4000})

    assert response.status_code == 200
    assert len(threads) == 1
    assert threading.main_thread() not in threads


def test_long_lists_of_numbers_are_read_by_a_function_that_lets_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = list(range(INLINE_BYTES // 4))
    seen: list[str] = []

    def integer(digits: str) -> int:
        seen.append(digits)
        return int(digits)

    monkeypatch.setattr(json_body, "_integer", integer)

    assert parse_object(json.dumps({"prompt": numbers}).encode()) == {"prompt": numbers}
    assert len(seen) == len(numbers)
    assert parse_object(b'{"prompt": [1]}') == {"prompt": [1]}
    assert len(seen) == len(numbers)
