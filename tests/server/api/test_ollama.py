"""What Ollama's bodies mean, and the parts of its answers that golden files do not show. Rows C7 to C10, C12.

Golden bytes are in test_ollama_golden.py, the lists of models in test_ollama_models.py.
"""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.api.app import build_app
from server.api.state import ServerState
from server.errors import Overloaded
from server.types import FinishReason, GenerationRequest, SamplingDefaults, SamplingParams, TokenEvent
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService, finish_of, sentence_with_eos, token_event, words
from tests.server.api.raw_http import Connection, ask, post

GENERATE, CHAT = "/api/generate", "/api/chat"
HI = {"model": "base", "prompt": "Hi"}
MESSAGES = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
OLLAMA_SAMPLING = SamplingParams(temperature=0.8, top_k=40, top_p=0.9)


async def lines_of(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    *lines, nothing = response.text.split("\n")
    assert nothing == ""
    return [json.loads(line) for line in lines]


async def error_of(client: httpx.AsyncClient, path: str, body: Any, status: int = 400) -> str:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    return str(response.json()["error"])


async def prompt_of(client: httpx.AsyncClient, service: FakeService, path: str, body: dict[str, Any]) -> str:
    assert (await client.post(path, json=body)).status_code == 200
    return service.tokenizer.decode(service.last.prompts[0])


async def test_C7_generate_streams_lines_until_done(client: httpx.AsyncClient, service: FakeService) -> None:
    options = {"temperature": 0.7, "num_predict": 512, "stop": ["END", "\n\n"]}
    lines = await lines_of(client, GENERATE, {**HI, "stream": True, "options": options})

    assert [(line["response"], line["done"]) for line in lines] == [
        ("Once", False),
        (" upon", False),
        ("", True),
    ]
    assert all(line["model"] == "base" and line["created_at"].endswith("Z") for line in lines)
    assert service.last.sampling.temperature == 0.7
    assert service.last.stop.max_tokens == 512
    assert service.last.stop.stop == ("END", "\n\n")


@pytest.mark.parametrize(("path", "body"), [(GENERATE, HI), (CHAT, MESSAGES)])
async def test_C8_streaming_is_what_nothing_said_means(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    """T21."""
    response = await client.post(path, json=body)

    assert response.headers["content-type"] == "application/x-ndjson"
    assert len(response.text.splitlines()) == 3


async def test_C9_an_answer_that_is_not_streamed_is_one_object(client: httpx.AsyncClient) -> None:
    response = await client.post(GENERATE, json={**HI, "stream": False})
    answer = response.json()

    assert response.headers["content-type"] == "application/json"
    assert (answer["response"], answer["done"], answer["done_reason"]) == ("Once upon", True, "length")
    assert answer["eval_count"] == 2
    assert "generated_text" not in answer


async def test_C10_chat_has_messages_instead_of_responses(client: httpx.AsyncClient) -> None:
    lines = await lines_of(client, CHAT, MESSAGES)
    whole = (await client.post(CHAT, json={**MESSAGES, "stream": False})).json()

    assert [line["message"] for line in lines] == [
        {"role": "assistant", "content": "Once"},
        {"role": "assistant", "content": " upon"},
        {"role": "assistant", "content": ""},
    ]
    assert lines[-1]["done"]
    assert whole["message"] == {"role": "assistant", "content": "Once upon"}
    assert "response" not in whole


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": None, "stream": True}, {"raw": True}])
async def test_C12_generate_without_a_prompt_loads_the_model(
    client: httpx.AsyncClient, service: FakeService, body: dict[str, Any]
) -> None:
    service.registry.add("pirate")
    response = await client.post(GENERATE, json={"model": "pirate", **body})
    answer = response.json()

    assert response.headers["content-type"] == "application/json"
    assert (answer["model"], answer["response"]) == ("pirate", "")
    assert (answer["done"], answer["done_reason"]) == (True, "load")
    assert [lease.ref.name for lease in service.leases] == ["pirate"]
    assert service.requests == []
    assert service.is_idle


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": None}])
async def test_C12_chat_without_messages_loads_the_model(
    client: httpx.AsyncClient, service: FakeService, body: dict[str, Any]
) -> None:
    answer = (await client.post(CHAT, json={"model": "base", **body})).json()

    assert answer["message"] == {"role": "assistant", "content": ""}
    assert (answer["done"], answer["done_reason"]) == (True, "load")
    assert service.requests == []


@pytest.mark.parametrize(
    ("keep_alive", "reason"),
    [(0, "unload"), ("0", "unload"), ("0s", "unload"), ("5m", "load"), (-1, "load"), ("1h30m", "load")],
)
async def test_keep_alive_zero_without_a_prompt_is_an_unload_call(
    client: httpx.AsyncClient, keep_alive: object, reason: str
) -> None:
    for path in (GENERATE, CHAT):
        answer = (await client.post(path, json={"model": "base", "keep_alive": keep_alive})).json()
        assert answer["done_reason"] == reason


@pytest.mark.parametrize("keep_alive", ["soon", True, [], "5 m"])
async def test_keep_alive_that_is_no_duration_is_refused(
    client: httpx.AsyncClient, keep_alive: object
) -> None:
    for body in ({"model": "base"}, HI):
        assert "keep_alive" in await error_of(client, GENERATE, {**body, "keep_alive": keep_alive})


@pytest.mark.parametrize("path", [GENERATE, CHAT])
@pytest.mark.parametrize("body", [{"prompt": "Hi"}, {"model": None, "prompt": "Hi"}, {}])
async def test_a_request_without_a_model_is_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    assert await error_of(client, path, body) == "model is required"


@pytest.mark.parametrize(("path", "body"), [(GENERATE, HI), (CHAT, MESSAGES), (GENERATE, {})])
@pytest.mark.parametrize("name", ["nobody", "nobody:latest", ":latest"])
async def test_an_unknown_model_is_not_found_in_ollamas_words(
    client: httpx.AsyncClient, service: FakeService, path: str, body: dict[str, Any], name: str
) -> None:
    error = await error_of(client, path, {**body, "model": name}, status=404)

    assert error == f"model '{name}' not found"
    assert service.is_idle


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("base", None),
        ("base:latest", None),
        ("other-name", None),
        ("", None),
        ("pirate", "pirate"),
        ("pirate:latest", "pirate"),
        ("base:pirate", "pirate"),
        ("org/one:latest", "org/one"),
        ("odd:latest", "odd:latest"),
    ],
)
async def test_models_are_bare_ids_or_ids_with_a_tag(
    client: httpx.AsyncClient, service: FakeService, name: str, adapter: str | None
) -> None:
    for known in ("pirate", "org/one", "odd:latest"):
        service.registry.add(known)
    response = await client.post(GENERATE, json={**HI, "model": name, "stream": False})

    assert response.json()["model"] == name  # as the client wrote it
    assert (service.last.adapter.name if service.last.adapter else None) == adapter
    assert response.headers["x-adapter-id"] == (adapter or "__base_model__")


async def test_nothing_given_is_ollamas_defaults(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post(GENERATE, json=HI)

    assert service.last.sampling == OLLAMA_SAMPLING
    assert service.last.stop.max_tokens == 1000 - len(service.last.prompts[0])


async def test_the_models_own_defaults_come_before_ollamas(make_state: Any, service: FakeService) -> None:
    usual = SamplingDefaults(temperature=0.3, top_p=0.5, top_k=7, min_p=0.1, repetition_penalty=1.3)
    service.card = replace(service.card, generation_defaults=usual)
    async with connect(build_app(make_state())) as client:
        await client.post(CHAT, json={**MESSAGES, "options": {"top_k": 9}})

    assert service.last.sampling == SamplingParams(
        temperature=0.3, top_k=9, top_p=0.5, min_p=0.1, repetition_penalty=1.3, penalty_window=64
    )


async def test_every_option_reaches_the_engine(client: httpx.AsyncClient, service: FakeService) -> None:
    """The example of Ollama's own documentation: all options at once."""
    options = {
        "num_keep": 5,
        "seed": 42,
        "num_predict": 100,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
        "typical_p": 0.7,
        "repeat_last_n": 33,
        "temperature": 0.8,
        "repeat_penalty": 1.2,
        "presence_penalty": 1.5,
        "frequency_penalty": 1.0,
        "penalize_newline": True,
        "stop": ["\n", "user:"],
        "numa": False,
        "num_ctx": 1024,
        "num_batch": 2,
        "num_gpu": 1,
        "main_gpu": 0,
        "use_mmap": True,
        "num_thread": 8,
    }
    await lines_of(client, GENERATE, {**HI, "options": options})

    assert service.last.sampling == SamplingParams(
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        min_p=0.05,
        typical_p=0.7,
        repetition_penalty=1.2,
        frequency_penalty=1.0,
        presence_penalty=1.5,
        penalty_window=33,
        seed=42,
    )
    assert (service.last.stop.max_tokens, service.last.stop.stop) == (100, ("\n", "user:"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 40.0}, {"top_k": 40}),
        ({"top_p": 0.0}, {"top_p": 1e-6}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": 0}, {"seed": 0}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1, "penalty_window": 64}),
        ({"repeat_penalty": 1.1, "repeat_last_n": 0}, {"repetition_penalty": 1.0, "penalty_window": None}),
        ({"repeat_penalty": 1.1, "repeat_last_n": -1}, {"penalty_window": 1000}),
        ({"repeat_penalty": 1.0, "repeat_last_n": 5}, {"penalty_window": None}),
        ({"presence_penalty": 0.5, "repeat_last_n": 5}, {"presence_penalty": 0.5, "penalty_window": 5}),
        ({"temperature": None, "top_k": None}, {"temperature": 0.8, "top_k": 40}),
    ],
    ids=str,
)
async def test_options_mean_what_they_mean_in_ollama(
    client: httpx.AsyncClient, service: FakeService, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    await lines_of(client, GENERATE, {**HI, "options": options})

    assert {name: getattr(service.last.sampling, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("num_predict", "max_tokens"),
    [(10, 10), (10.0, 10), (-1, None), (-2, None), (0, None), (5000, None), (None, None)],
)
async def test_num_predict_is_cut_to_what_the_context_leaves(
    make_state: Any, service: FakeService, num_predict: object, max_tokens: int | None
) -> None:
    async with connect(build_app(make_state(default_max_tokens=None))) as client:
        await lines_of(client, CHAT, {**MESSAGES, "options": {"num_predict": num_predict}})

    room = 1000 - len(service.last.prompts[0])
    assert service.last.stop.max_tokens == (room if max_tokens is None else max_tokens)


async def test_the_operators_usual_length_is_for_those_who_do_not_say(
    make_state: Any, service: FakeService
) -> None:
    async with connect(build_app(make_state(default_max_tokens=7))) as client:
        await lines_of(client, GENERATE, HI)
        assert service.last.stop.max_tokens == 7
        await lines_of(client, GENERATE, {**HI, "options": {"num_predict": 9}})
        assert service.last.stop.max_tokens == 9


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "options.temperature"),
        ({"temperature": "hot"}, "options.temperature"),
        ({"temperature": True}, "options.temperature"),
        ({"top_k": 1.5}, "options.top_k"),
        ({"top_p": 1.1}, "options.top_p"),
        ({"typical_p": 0}, "options.typical_p"),
        ({"repeat_penalty": 0}, "options.repeat_penalty"),
        ({"repeat_last_n": -2}, "options.repeat_last_n"),
        ({"num_ctx": 0}, "options.num_ctx"),
        ({"num_predict": "all"}, "options.num_predict"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": [""]}, "stop string"),
        ({"mirostat": 1}, "mirostat"),
        ({"tfs_z": 0.5}, "tfs_z"),
        ([], "options"),
    ],
    ids=str,
)
async def test_a_wrong_option_is_refused_by_name(
    client: httpx.AsyncClient, service: FakeService, options: object, param: str
) -> None:
    assert param in await error_of(client, GENERATE, {**HI, "options": options})
    assert service.is_idle


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (GENERATE, "suffix", "end"),
        (GENERATE, "template", "{{ .Prompt }}"),
        (GENERATE, "images", ["aGk="]),
        (GENERATE, "format", "json"),
        (GENERATE, "format", {"type": "object"}),
        (GENERATE, "think", True),
        (GENERATE, "think", "high"),
        (CHAT, "tools", [{"type": "function"}]),
        (CHAT, "format", "json"),
        (CHAT, "think", True),
    ],
)
async def test_what_is_not_served_is_refused_by_name(
    client: httpx.AsyncClient, path: str, field: str, value: object
) -> None:
    body = HI if path == GENERATE else MESSAGES
    assert await error_of(client, path, {**body, field: value}) == f"{field} is not supported by this server"


@pytest.mark.parametrize(("path", "body"), [(GENERATE, HI), (CHAT, MESSAGES)])
async def test_neutral_values_and_unknown_fields_are_accepted(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    neutral: dict[str, Any] = {
        "suffix": "",
        "template": None,
        "images": [],
        "format": "",
        "think": False,
        "tools": [],
        "options": {"mirostat": 0, "tfs_z": 1.0, "something": "else"},
        "keep_alive": "5m",
        "shift": True,
        "truncate": True,
        "something": 1,
    }
    assert (await client.post(path, json={**neutral, **body})).status_code == 200


async def test_bodies_without_a_json_type_are_taken(client: httpx.AsyncClient) -> None:
    """curl -d says it is a form."""
    for content_type in ("application/x-www-form-urlencoded", "text/plain", "application/json"):
        response = await client.post(GENERATE, content=json.dumps(HI), headers={"content-type": content_type})
        assert response.status_code == 200


async def test_prompts_go_through_the_chat_template(client: httpx.AsyncClient, service: FakeService) -> None:
    assert await prompt_of(client, service, GENERATE, HI) == "<user>Hi<assistant>"
    with_system = {**HI, "system": "Be brief."}
    assert await prompt_of(client, service, GENERATE, with_system) == "<system>Be brief.<user>Hi<assistant>"


async def test_a_raw_prompt_stays_as_it_is(client: httpx.AsyncClient, service: FakeService) -> None:
    lines = await lines_of(client, GENERATE, {**HI, "raw": True})

    assert service.last.prompts[0] == (1, ord("H"), ord("i"))
    assert "context" not in lines[-1]


@pytest.mark.parametrize("more", [{"system": "x"}, {"context": [65]}])
async def test_raw_prompts_have_neither_system_nor_context(
    client: httpx.AsyncClient, more: dict[str, Any]
) -> None:
    error = await error_of(client, GENERATE, {**HI, "raw": True, **more})
    assert error == "raw mode does not support template, system, or context"


async def test_context_carries_the_conversation_on(client: httpx.AsyncClient, service: FakeService) -> None:
    service.script = sentence_with_eos("A", "h")
    first = (await lines_of(client, GENERATE, HI))[-1]
    assert first["context"] == [*map(ord, "<user>Hi<assistant>Ah"), 2]

    whole = (await client.post(GENERATE, json={**HI, "stream": False})).json()
    assert whole["context"] == first["context"]

    again = (await lines_of(client, GENERATE, {**HI, "context": first["context"]}))[-1]
    assert service.last.prompts[0] == (*first["context"], *map(ord, "<user>Hi<assistant>"))
    assert again["context"] == [*service.last.prompts[0], ord("A"), ord("h"), 2]


@pytest.mark.parametrize("context", [[-1], [0x110000], [1] * 1001, ["a"], [True]])
async def test_a_context_of_what_are_no_tokens_is_refused(
    client: httpx.AsyncClient, service: FakeService, context: list[object]
) -> None:
    assert "context" in await error_of(client, GENERATE, {**HI, "context": context})
    assert service.is_idle


async def test_chat_messages_reach_the_template(client: httpx.AsyncClient, service: FakeService) -> None:
    call = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "images": []},
        {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "hm"},
        {"role": "tool", "content": "noon", "tool_name": "clock", "tool_call_id": "1"},
    ]
    await lines_of(client, CHAT, {"model": "base", "messages": messages})

    assert service.tokenizer.rendered == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [call], "thinking": "hm"},
        {"role": "tool", "content": "noon", "name": "clock", "tool_call_id": "1"},
    ]


async def test_a_last_message_of_the_assistant_is_continued(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]

    body = {"model": "base", "messages": messages}
    assert await prompt_of(client, service, CHAT, body) == "<user>Hi<assistant>So"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "Hi", "images": ["aGk="]}, "messages[0].images"),
        ({"role": "wizard", "content": "Hi"}, "messages[0].role"),
        ({"content": "Hi"}, "messages[0].role"),
        ({"role": "user", "content": 1}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, "messages[0].content"),
    ],
)
async def test_a_wrong_message_is_refused_by_name(
    client: httpx.AsyncClient, message: dict[str, Any], param: str
) -> None:
    assert param in await error_of(client, CHAT, {"model": "base", "messages": [message]})


async def test_an_old_conversation_loses_its_oldest_turns(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    turns = [
        message
        for i in range(100)
        for message in (
            {"role": "user", "content": f"question {i:02} "},
            {"role": "assistant", "content": f"answer {i:02} "},
        )
    ]
    messages = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "last"}]
    prompt = await prompt_of(client, service, CHAT, {"model": "base", "messages": messages})

    assert prompt.startswith("<system>Be brief.<user>question 89")
    assert prompt.endswith("answer 99 <user>last<assistant>")
    assert 400 < len(prompt) <= 500  # half of the context is free, and no turn more is gone than must be
    assert service.last.stop.max_tokens == 1000 - len(prompt)


async def test_a_prompt_beyond_the_context_loses_its_middle(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body = {**HI, "prompt": "x" * 5000 + "end", "options": {"num_predict": 100, "num_keep": 6}}
    prompt = await prompt_of(client, service, GENERATE, body)

    assert prompt.startswith("<user>x")
    assert prompt.endswith("xend<assistant>")
    assert len(prompt) == 900
    assert service.last.stop.max_tokens == 100


async def test_a_smaller_num_ctx_shortens_prompts(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {**HI, "prompt": "x" * 300, "raw": True, "options": {"num_ctx": 100}}
    await lines_of(client, GENERATE, body)
    assert len(service.last.prompts[0]) == 50

    await lines_of(client, GENERATE, {**body, "options": {"num_ctx": 5000}})
    assert len(service.last.prompts[0]) == 301


async def test_texts_of_any_length_are_shortened_and_little_of_them_tokenised(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    longest: list[int] = []
    encode = service.tokenizer.encode

    def watched(text: str, *, add_special_tokens: bool = True) -> list[int]:
        longest.append(len(text))
        return encode(text, add_special_tokens=add_special_tokens)

    service.tokenizer.encode = watched  # type: ignore[method-assign]
    for raw in (True, False):
        await lines_of(client, GENERATE, {**HI, "prompt": "x" * 1_000_000, "raw": raw})
        assert len(service.last.prompts[0]) == 500
    assert max(longest) < 5000


@pytest.mark.parametrize(("path", "body"), [(GENERATE, HI), (CHAT, MESSAGES)])
async def test_without_truncation_a_prompt_beyond_the_context_is_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    long = {"prompt": "x" * 1000, "messages": [{"role": "user", "content": "x" * 1000}]}
    error = await error_of(client, path, {**body, **long, "truncate": False})

    assert error.startswith("the input length exceeds the context length")


@pytest.mark.parametrize(
    ("reason", "stop", "word"),
    [
        (FinishReason.LENGTH, None, "length"),
        (FinishReason.STOP, None, "stop"),
        (FinishReason.STOP, "END", "stop"),
    ],
)
async def test_done_reasons(
    client: httpx.AsyncClient, service: FakeService, reason: FinishReason, stop: str | None, word: str
) -> None:
    """T16."""
    service.script = words("a", "b", reason=reason, stop=stop)

    assert (await lines_of(client, GENERATE, HI))[-1]["done_reason"] == word
    assert (await client.post(CHAT, json={**MESSAGES, "stream": False})).json()["done_reason"] == word


async def test_durations_are_nanoseconds_and_add_up(client: httpx.AsyncClient) -> None:
    last = (await lines_of(client, GENERATE, HI))[-1]
    whole = (await client.post(CHAT, json={**MESSAGES, "stream": False})).json()

    for answer in (last, whole):
        assert answer["total_duration"] == 50_000_000
        assert answer["load_duration"] == 5_000_000
        assert answer["prompt_eval_duration"] == 25_000_000
        assert answer["eval_duration"] == 20_000_000
        assert (answer["prompt_eval_count"], answer["eval_count"]) == (19, 2)


async def test_speeds_can_be_computed_of_a_single_token(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    def at_once(request: GenerationRequest) -> list[TokenEvent]:
        finish = finish_of(request, "a", 1)
        timing = replace(finish.timing, started=100.03, last_token=finish.timing.first_token)
        return [token_event("a", finish=replace(finish, timing=timing))]

    service.script = at_once
    last = (await lines_of(client, GENERATE, HI))[-1]

    assert last["eval_count"] / last["eval_duration"] > 0
    assert last["prompt_eval_count"] / last["prompt_eval_duration"] > 0


async def test_a_model_without_a_template_reads_the_prompt_alone(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.tokenizer.has_chat_template = False
    last = (await lines_of(client, GENERATE, HI))[-1]
    assert service.last.prompts[0] == (1, ord("H"), ord("i"))

    await lines_of(client, GENERATE, {**HI, "context": last["context"]})
    assert service.last.prompts[0] == (*last["context"], ord("H"), ord("i"))

    assert "system" in await error_of(client, GENERATE, {**HI, "system": "Be brief."})
    assert "no chat template" in await error_of(client, CHAT, MESSAGES)


async def test_the_last_line_says_what_other_routes_say_at_the_end(client: httpx.AsyncClient) -> None:
    last = (await lines_of(client, GENERATE, HI))[-1]

    assert last["generated_text"] == "Once upon"
    assert last["details"]["finish_reason"] == "length"
    assert last["details"]["seed"] == 7


async def test_logprobs_come_with_the_text_they_belong_to(client: httpx.AsyncClient) -> None:
    lines = await lines_of(client, GENERATE, {**HI, "logprobs": True})
    whole = (await client.post(CHAT, json={**MESSAGES, "stream": False, "logprobs": True})).json()

    entry = {"token": "O", "logprob": -0.25, "bytes": [79]}
    assert lines[0]["logprobs"] == [entry]
    assert "logprobs" not in lines[-1]
    assert whole["logprobs"][0] == entry
    assert len(whole["logprobs"]) == 2


async def test_logprobs_are_for_those_who_ask(client: httpx.AsyncClient, service: FakeService) -> None:
    lines = await lines_of(client, GENERATE, {**HI, "top_logprobs": 3})
    assert service.last.sampling.num_logprobs is None
    assert all("logprobs" not in line for line in lines)

    await lines_of(client, GENERATE, {**HI, "logprobs": True, "top_logprobs": 3})
    assert service.last.sampling.num_logprobs == 3


@pytest.mark.parametrize("count", [-1, 21])
async def test_top_logprobs_have_a_limit(client: httpx.AsyncClient, count: int) -> None:
    error = await error_of(client, GENERATE, {**HI, "top_logprobs": count})
    assert error == "top_logprobs must be between 0 and 20"


async def test_headers_are_those_of_every_generation(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("pirate")
    streamed = await client.post(CHAT, json={**MESSAGES, "model": "pirate"})
    whole = await client.post(CHAT, json={**MESSAGES, "model": "pirate", "stream": False})

    for response in (streamed, whole):
        assert response.headers["x-adapter-id"] == "pirate"
        assert response.headers["x-prompt-tokens"] == "19"
    assert streamed.headers["x-accel-buffering"] == "no"
    assert whole.headers["x-generated-tokens"] == "2"


async def test_a_full_queue_is_429_in_ollamas_shape(client: httpx.AsyncClient, service: FakeService) -> None:
    service.refusal = Overloaded("busy", retry_after_s=3)
    response = await client.post(GENERATE, json=HI)

    assert (response.status_code, response.json()) == (429, {"error": "busy"})
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("path", [GENERATE, CHAT])
async def test_every_route_says_503_while_the_model_loads(state: ServerState, path: str) -> None:
    state.service = None
    async with connect(build_app(state)) as client:
        response = await client.post(path, json=HI)

    assert response.status_code == 503
    assert "loading" in response.json()["error"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_other_methods_are_not_allowed(client: httpx.AsyncClient, method: str) -> None:
    response = await client.request(method, GENERATE)

    assert response.status_code == 405
    assert response.headers["allow"] == "POST, OPTIONS"
    assert set(response.json()) == {"error"}


async def test_an_adapter_that_takes_too_long_to_load_is_503(make_state: Any, service: FakeService) -> None:
    service.resolving = asyncio.Event()
    service.registry.add("slow")
    async with connect(build_app(make_state(header_deadline_s=0.01))) as client:
        for body in ({"model": "slow"}, {**HI, "model": "slow"}):
            response = await client.post(GENERATE, json=body)
            assert response.status_code == 503
            assert "still being loaded" in response.json()["error"]
    assert service.is_idle


async def test_a_client_that_leaves_ends_its_request(port: int, service: FakeService) -> None:
    service.is_manual = True
    connection = await Connection.open(port)
    await connection.send(post(GENERATE, HI))
    stream = await service.streams.get()
    connection.drop()

    await stream.closed.wait()
    assert service.is_idle


async def test_a_failure_before_the_first_line_has_a_status_of_its_own(
    port: int, service: FakeService
) -> None:
    service.script = words("x")
    answer = await ask(port, post(GENERATE, b"{not json"))

    assert answer.status == 400
    assert set(json.loads(answer.body)) == {"error"}
