"""Text completions: many prompts, echo, and what is asked about a prompt's own tokens."""

import json
from typing import Any

import httpx
import pytest

from server.types import FinishReason, GenerationRequest, TokenEvent
from tests.server.api.fake_service import BOS, FakeService, finish_of, scored, token_event, words

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


async def ask(client: httpx.AsyncClient, path: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def chunks(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    text = (await client.post(COMPLETIONS, json={**body, "stream": True})).text
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]


@pytest.mark.parametrize(
    "prompts", [["Hi", "Ho"], [[BOS, ord("H"), ord("i")], [BOS, ord("H"), ord("o")]]], ids=["texts", "ids"]
)
async def test_several_prompts_are_answered_in_their_order(
    client: httpx.AsyncClient, service: FakeService, prompts: list[object]
) -> None:
    service.script = words("a", "b")
    answer = await ask(client, prompt=prompts, n=2)

    assert service.last.prompts == ((BOS, ord("H"), ord("i")), (BOS, ord("H"), ord("o")))
    assert (service.last.n, service.last.num_choices) == (2, 4)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 6, "each prompt is counted once"
    assert answer["usage"]["completion_tokens"] == 8


async def test_several_prompts_are_streamed_side_by_side(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = words("a", "b")
    found = await chunks(
        client, prompt=["Hi", "Hello"], n=2, echo=True, stream_options={"include_usage": True}
    )
    texts: dict[int, str] = {}
    for chunk in found:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]

    assert texts == {0: "Hiab", 1: "Hiab", 2: "Helloab", 3: "Helloab"}
    assert found[-1]["usage"]["prompt_tokens"] == 3 + 6
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in found[:-1]) == 4


async def test_headers_count_all_prompts(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": ["Hi", "Hello"], "n": 3})

    assert response.headers["x-prompt-tokens"] == "9"
    assert response.headers["x-compute-characters"] == "7"
    assert response.headers["x-total-tokens"] == str(9 + 6 * 2)


async def test_max_tokens_has_to_fit_the_longest_prompt_and_else_follows_the_shortest(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    long = [70] * 990
    response = await client.post(COMPLETIONS, json={"prompt": [long, [70]], "max_tokens": 11})
    assert response.status_code == 400
    assert "1001 tokens (990 in the prompt, 11 in the completion)" in response.json()["error"]["message"]

    await ask(client, prompt=[long, [70]])
    assert service.last.stop.max_tokens == 16, "the engine ends the longer one where its context ends"


async def test_echo_shows_the_prompt_before_the_answer(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = scored
    answer = await ask(client, prompt="Hi", echo=True)

    assert answer["choices"][0]["text"] == "Hiab"
    assert answer["choices"][0]["logprobs"] is None
    assert service.last.sampling.num_prompt_logprobs is None, "nothing is scored that nobody asked for"


async def test_echo_with_logprobs_covers_the_prompt(client: httpx.AsyncClient, service: FakeService) -> None:
    service.script = scored
    answer = await ask(client, prompt="Hi", echo=True, logprobs=1)

    assert service.last.sampling.num_prompt_logprobs == 1
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 0, 1, 2, 3],
        "token_logprobs": [None, -0.5, -0.5, -0.25, -0.25],
        "tokens": ["<s>", "H", "i", "a", "b"],
        "top_logprobs": [
            None,
            {"i": -0.125, "H": -0.5},
            {"i": -0.5},
            {"a": -0.25},
            {"b": -0.25},
        ],
    }


async def test_offsets_count_special_tokens_that_the_echoed_text_spells_out(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """As where the prompt came as ids."""
    service.script = scored
    service.tokenizer.decode = lambda ids, **_: "<s>Hi"  # type: ignore[method-assign, assignment]
    answer = await ask(client, prompt=[BOS, ord("H"), ord("i")], echo=True, logprobs=0)

    assert answer["choices"][0]["text"] == "<s>Hiab"
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 3, 4, 5, 6]


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_max_tokens_0_with_echo_is_about_the_prompt_alone(
    client: httpx.AsyncClient, service: FakeService, logprobs: int | None
) -> None:
    service.script = scored
    answer = await ask(client, prompt="Hi", echo=True, max_tokens=0, logprobs=logprobs)
    choice = answer["choices"][0]

    assert service.last.stop.max_tokens == 0
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert answer["usage"]["completion_tokens"] == 0
    if logprobs is not None:
        assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]


async def test_a_prompt_may_fill_the_context_where_nothing_is_generated(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = scored
    await ask(client, prompt=[70] * 1000, echo=True, max_tokens=0)
    assert len(service.last.prompts[0]) == 1000

    refused = await client.post(COMPLETIONS, json={"prompt": [70] * 1001, "echo": True, "max_tokens": 0})
    assert refused.status_code == 400


async def test_streamed_echo_is_in_the_first_chunk(client: httpx.AsyncClient, service: FakeService) -> None:
    service.script = scored
    first, second, last = await chunks(client, prompt="Hi", echo=True, logprobs=2)

    assert [chunk["choices"][0]["text"] for chunk in (first, second, last)] == ["Hia", "b", ""]
    assert first["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 2]
    assert first["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.25]
    assert second["choices"][0]["logprobs"]["text_offset"] == [3]
    assert last["generated_text"] == "ab"


async def test_streamed_echo_of_a_prompt_alone_has_its_logprobs(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = scored
    first, last = await chunks(client, prompt="Hi", echo=True, logprobs=0, max_tokens=0)

    assert first["choices"][0]["text"] == "Hi"
    assert first["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert last["choices"][0]["finish_reason"] == "length"
    assert "logprobs" not in last["choices"][0]


async def test_echo_is_not_held_back_by_a_chunker(client: httpx.AsyncClient, service: FakeService) -> None:
    service.script = words("a", "b")
    found = await chunks(client, prompt="Hi ho", echo=True, stream_options={"chunk_by": "sentence"})

    assert [chunk["choices"][0]["text"] for chunk in found] == ["Hi ho", "ab", ""]


PROMPT_LOGPROBS = [
    None,
    {
        str(ord("H")): {"logprob": -0.5, "rank": None, "decoded_token": "H"},
        str(ord("i")): {"logprob": -0.125, "rank": 1, "decoded_token": "i"},
    },
    {str(ord("i")): {"logprob": -0.5, "rank": 1, "decoded_token": "i"}},
]


async def test_prompt_logprobs_are_written_as_vllm_does(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = scored
    answer = await ask(client, prompt="Hi", prompt_logprobs=1)

    assert service.last.sampling.num_prompt_logprobs == 1
    assert service.last.sampling.num_logprobs is None
    assert answer["choices"][0]["prompt_logprobs"] == PROMPT_LOGPROBS
    assert (answer["choices"][0]["text"], answer["choices"][0]["logprobs"]) == ("ab", None)


async def test_prompt_logprobs_and_echo_each_show_what_they_were_asked_for(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = scored
    answer = await ask(client, prompt="Hi", prompt_logprobs=1, echo=True, logprobs=2)

    assert service.last.sampling.num_prompt_logprobs == 2
    assert answer["choices"][0]["prompt_logprobs"] == PROMPT_LOGPROBS
    assert answer["choices"][0]["logprobs"]["top_logprobs"][1] == {"i": -0.125, "e": -2.0, "H": -0.5}


async def test_prompt_logprobs_do_not_make_logprobs_cover_the_prompt(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = scored
    answer = await ask(client, prompt="Hi", prompt_logprobs=1, logprobs=0)

    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 1]


async def test_prompt_logprobs_of_a_chat_are_beside_its_choices(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = scored
    service.tokenizer.render_chat = lambda *_, **__: "Hi"  # type: ignore[method-assign, assignment]
    answer = await ask(client, CHAT, messages=[{"role": "user", "content": "Hi"}], prompt_logprobs=1)

    assert answer["prompt_logprobs"][1:] == [
        {**PROMPT_LOGPROBS[2], str(ord("i")): PROMPT_LOGPROBS[2][str(ord("i"))]}  # type: ignore[dict-item, index]
    ]
    assert "prompt_logprobs" not in answer["choices"][0]


async def test_long_scored_prompts_are_written_in_the_pool(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = scored
    answer = await ask(client, prompt=[70] * 900, echo=True, logprobs=1)

    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 902


async def test_typical_p_reaches_the_sampler(client: httpx.AsyncClient, service: FakeService) -> None:
    await ask(client, prompt="Hi", typical_p=0.3)
    assert service.last.sampling.typical_p == 0.3

    await ask(client, CHAT, messages=[{"role": "user", "content": "Hi"}])
    assert service.last.sampling.typical_p == 1.0


async def test_a_failure_of_one_prompt_fails_the_request(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    def script(request: GenerationRequest) -> list[TokenEvent]:
        good = token_event("a", finish=finish_of(request, "a", 1))
        bad = finish_of(request, "", 0, reason=FinishReason.ERROR, error="no", index=1)
        return [good, TokenEvent(1, "", None, bad)]

    service.script = script
    assert (await client.post(COMPLETIONS, json={"prompt": ["Hi", "Ho"]})).status_code == 500
    assert service.is_idle
