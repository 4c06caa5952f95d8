"""The parts of OpenAI answers that golden files do not show.

Rows Z1, Z4, Z5, Z11, Z12, C17, L4, U5.
"""

import json
from typing import Any

import httpx
import pytest

from server.types import FinishReason
from tests.server.api.fake_service import FakeService, finish_of, sentence_with_eos, token_event, words

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


async def frames_of(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    """The JSON of all frames but the last, which must be the sentinel."""
    response = await client.post(path, json={"stream": True, **body})
    assert response.status_code == 200, response.text
    *frames, last, nothing = response.text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


@pytest.mark.parametrize("query", ["true", "1", "True"])
async def test_C17_stream_may_be_asked_for_in_the_query(client: httpx.AsyncClient, query: str) -> None:
    streamed = await client.post(f"{CHAT}?stream={query}", json=HELLO)
    body_wins = await client.post(f"{CHAT}?stream={query}", json={**HELLO, "stream": False})

    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert body_wins.headers["content-type"] == "application/json"


async def test_Z1_Z4_Z5_streams_have_openais_shape(client: httpx.AsyncClient, service: FakeService) -> None:
    """T13, T25: the role comes once and with the first text, so that the first chunk is the first token."""
    service.script = sentence_with_eos("Once", " upon")
    frames = await frames_of(client, CHAT, HELLO)

    assert (
        len({(f["id"], f["created"], f["model"], f["object"], f["system_fingerprint"]) for f in frames}) == 1
    )
    deltas = [frame["choices"][0]["delta"] for frame in frames]
    assert deltas == [{"role": "assistant", "content": "Once"}, {"content": " upon"}, {}]
    assert [frame["choices"][0]["finish_reason"] for frame in frames] == [None, None, "stop"]
    assert frames[-1]["generated_text"] == "Once upon"
    assert "usage" not in frames[-1]


@pytest.mark.parametrize(
    ("reason", "stop", "word", "detail"),
    [
        (FinishReason.LENGTH, None, "length", "length"),
        (FinishReason.STOP, None, "stop", "eos_token"),
        (FinishReason.STOP, "END", "stop", "stop_sequence"),
        (FinishReason.STOP, 7, "stop", "stop_sequence"),
    ],
)
async def test_L4_finish_reasons_in_both_vocabularies(
    client: httpx.AsyncClient,
    service: FakeService,
    reason: FinishReason,
    stop: str | int | None,
    word: str,
    detail: str,
) -> None:
    """T16."""
    service.script = words("Once", reason=reason, stop=stop)
    last = (await frames_of(client, CHAT, HELLO))[-1]
    whole = (await client.post(CHAT, json=HELLO)).json()

    assert (last["choices"][0]["finish_reason"], last["choices"][0]["stop_reason"]) == (word, stop)
    assert last["details"]["finish_reason"] == detail
    assert (whole["choices"][0]["finish_reason"], whole["choices"][0]["stop_reason"]) == (word, stop)


async def test_seed_is_shown_only_where_it_mattered(client: httpx.AsyncClient) -> None:
    sampled = (await frames_of(client, CHAT, HELLO))[-1]
    greedy = (await frames_of(client, CHAT, {**HELLO, "temperature": 0}))[-1]

    assert (sampled["details"]["seed"], greedy["details"]["seed"]) == (7, None)


async def test_Z12_usage_of_several_choices_counts_the_prompt_once(client: httpx.AsyncClient) -> None:
    frames = await frames_of(client, CHAT, {**HELLO, "n": 3, "stream_options": {"include_usage": True}})

    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["completion_tokens"] == 6
    assert all(frame["usage"] is None for frame in frames[:-1])


async def test_running_usage_is_on_every_chunk(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    frames = await frames_of(client, CHAT, {**HELLO, "stream_options": options})

    assert [frame["usage"]["completion_tokens"] for frame in frames] == [1, 2, 2, 2]
    assert len({frame["usage"]["prompt_tokens"] for frame in frames}) == 1


TEXT = ("One", " two", ". Th", "ree", " 3.1", "4 four", "! Five", "\nsix")


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        ({"chunk_by": "token"}, list(TEXT)),
        ({"chunk_size": 5}, ["One two. Three 3.1", "4 four! Five\nsix"]),
        ({"chunk_by": "word"}, ["One", " two.", " Three", " 3.14", " four!", " Five", "\nsix"]),
        ({"chunk_by": "word", "chunk_size": 3}, ["One two. Three", " 3.14 four! Five", "\nsix"]),
        ({"chunk_by": "sentence"}, ["One two.", " Three 3.14 four!", " Five\n", "six"]),
    ],
    ids=str,
)
async def test_Z11_deltas_end_where_they_are_asked_to(
    client: httpx.AsyncClient, service: FakeService, options: dict[str, Any], pieces: list[str]
) -> None:
    service.script = words(*TEXT)
    frames = await frames_of(client, CHAT, {**HELLO, "stream_options": options})
    seen = [frame["choices"][0]["delta"].get("content") for frame in frames[:-1]]

    # A sentence or word that is complete with the last token comes out with the rest.
    assert "".join(seen) == "".join(TEXT)
    assert seen == pieces or seen == [*pieces[:-2], "".join(pieces[-2:])]


async def test_U5_bench_client_finds_a_choice_in_every_frame(client: httpx.AsyncClient) -> None:
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "temperature": 0.0,
        "max_tokens": 5,
        "stream": True,
    }
    response = await client.post(CHAT, json=body, headers={"authorization": "Bearer None"})
    lines = [line for line in response.text.split("\n") if line]

    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, HELLO),
        (COMPLETIONS, {"prompt": "Hi"}),
        ("/generate_stream", {"inputs": "Hi"}),
        ("/v2/models/base/generate_stream", {"text_input": "Hi"}),
    ],
)
async def test_T8_long_generated_text_stays_a_line_and_is_utf8(
    client: httpx.AsyncClient, service: FakeService, path: str, body: dict[str, Any]
) -> None:
    """40 000 CJK characters would be 240 kB of escapes."""
    text = "語" * 40_000 + "\u2028\u2029\x85"

    def script(request: Any) -> list[Any]:
        return [token_event("語", finish=finish_of(request, text, 1))]

    service.script = script
    response = await client.post(path, json={**body, "stream": True})
    line = max(response.content.split(b"\n"), key=len).decode().removeprefix("data: ")

    assert json.loads(line)["generated_text"] == text
    assert len(line.encode()) < 128 * 1024
    assert len(line.splitlines()) == 1


async def test_completion_logprobs_carry_on_from_chunk_to_chunk(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = words("ab", "cde", "f")
    frames = await frames_of(client, COMPLETIONS, {"prompt": "Hi", "logprobs": 0})
    offsets = [frame["choices"][0]["logprobs"]["text_offset"] for frame in frames[:-1]]

    assert offsets == [[0], [2], [5]]
    assert "logprobs" not in frames[-1]["choices"][0]
