"""An adapter with a tokenizer of its own: every route reads and writes with it, and with no other's."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.types import GenerationRequest, TokenEvent
from tests.server.api.fake_service import FakeService, FakeSpan, FakeTokenizer, finish_of, token_event

FIRST = 5000
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
USER = "«user»Hi«assistant»"


class OwnTokenizer(FakeTokenizer):
    """Other ids for the same characters, and a template of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.chat_template = "own"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [FIRST] * add_special_tokens + [FIRST + ord(character) for character in text]

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> list[FakeSpan]:
        return [FakeSpan(FIRST + ord(c), c, i, i + 1) for i, c in enumerate(text)]

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(i - FIRST) for i in ids if not (skip_special_tokens and i == FIRST))

    def render_chat(self, messages: Any, **options: bool) -> str:
        text = "".join(f"«{m['role']}»{m['content']}" for m in messages)
        return text + "«assistant»" * (
            options["add_generation_prompt"] and not options["continue_final_message"]
        )

    def token_text(self, token_id: int) -> str:
        return chr(token_id - FIRST)

    def special_text(self, token_id: int) -> str | None:
        return None

    def spell_token(self, token_id: int) -> bytes:
        return self.token_text(token_id).encode()


@pytest.fixture
def own(service: FakeService) -> OwnTokenizer:
    """The tokenizer of the adapter "own"; "plain" has none."""
    service.registry.add("own")
    service.registry.add("plain")
    tokenizer = service.registry.tokenizers["own"] = OwnTokenizer()
    return tokenizer


CHATS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": ("/v1/chat/completions", {**CHAT, "model": "own"}),
    "openai, base:name": ("/v1/chat/completions", {**CHAT, "model": "base:own"}),
    "openai, lora_id": ("/v1/chat/completions", {**CHAT, "lora_id": "own"}),
    "responses": ("/v1/responses", {"model": "own", "input": "Hi"}),
    "anthropic": ("/v1/messages", {**CHAT, "model": "own", "max_tokens": 5}),
    "ollama chat": ("/api/chat", {**CHAT, "model": "own:latest", "stream": False}),
    "ollama generate": ("/api/generate", {"model": "own", "prompt": "Hi", "stream": False}),
    "lorax chat": (
        "/generate",
        {"inputs": "Hi", "parameters": {"adapter_id": "own", "apply_chat_template": True}},
    ),
    "invocations": ("/invocations", {**CHAT, "model": "own"}),
}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"model": "own", "prompt": "Hi"}),
    "ollama raw": ("/api/generate", {"model": "own", "prompt": "Hi", "raw": True, "stream": False}),
    "lorax": ("/generate", {"inputs": "Hi", "parameters": {"adapter_id": "own"}}),
    "jobs": ("/api/jobs/own/infer", {"prompt": "Hi"}),
    "jobs stream": ("/api/jobs/own/infer/stream", {"prompt": "Hi"}),
    "kserve": ("/v2/models/own/generate", {"text_input": "Hi"}),
    "kserve infer": (
        "/v2/models/own/infer",
        {"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["Hi"]}]},
    ),
}


@pytest.mark.parametrize("base_has_template", [True, False])
@pytest.mark.parametrize("route", list(CHATS))
async def test_every_chat_goes_through_the_adapter_s_template(
    client: httpx.AsyncClient,
    service: FakeService,
    own: OwnTokenizer,
    route: str,
    base_has_template: bool,
) -> None:
    service.tokenizer.has_chat_template = base_has_template
    path, body = CHATS[route]
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert service.last.prompts[0] == tuple(own.encode(USER, add_special_tokens=False))
    assert service.is_idle


@pytest.mark.parametrize("route", list(TEXTS))
async def test_every_text_is_read_with_the_adapter_s_tokens(
    client: httpx.AsyncClient, service: FakeService, own: OwnTokenizer, route: str
) -> None:
    path, body = TEXTS[route]
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert service.last.prompts[0] == tuple(own.encode("Hi"))


@pytest.mark.parametrize("model", ["plain", "base"])
async def test_all_others_are_read_as_the_base_is(
    client: httpx.AsyncClient, service: FakeService, own: OwnTokenizer, model: str
) -> None:
    await client.post("/v1/chat/completions", json={**CHAT, "model": model})
    assert service.tokenizer.decode(service.last.prompts[0]) == "<user>Hi<assistant>"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat_tokenize"])
@pytest.mark.parametrize(("names", "is_own"), [(("own", "plain"), True), (("plain", "own"), False)])
async def test_of_several_adapters_the_one_that_is_named_first_says_how_to_read(
    client: httpx.AsyncClient,
    service: FakeService,
    own: OwnTokenizer,
    path: str,
    names: tuple[str, str],
    is_own: bool,
) -> None:
    body = {**CHAT, "lora": [{"name": name, "scale": 0.5} for name in names]}
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    expected = own.encode(USER, add_special_tokens=False) if is_own else [ord("<")]
    if path == "/chat_tokenize":
        assert response.json()["tokenize_response"][0]["id"] == expected[0]
    else:
        assert service.last.prompts[0][: len(expected)] == tuple(expected)
    assert service.is_idle


async def test_a_merge_is_read_as_the_first_of_its_adapters_is(
    client: httpx.AsyncClient, service: FakeService, own: OwnTokenizer
) -> None:
    merged = {"ids": ["own", "plain"], "weights": [1, 1], "merge_strategy": "linear"}
    body = {"inputs": "Hi", "parameters": {"merged_adapters": merged}}
    assert (await client.post("/generate", json=body)).status_code == 200
    assert service.last.prompts[0] == tuple(own.encode("Hi"))


async def test_an_adapter_without_a_template_over_a_base_without_one_is_refused(
    client: httpx.AsyncClient, service: FakeService, own: OwnTokenizer
) -> None:
    service.tokenizer.has_chat_template = own.has_chat_template = False
    for model in ("own", "plain"):
        response = await client.post("/v1/chat/completions", json={**CHAT, "model": model})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    generated = await client.post("/api/generate", json={"model": "own", "prompt": "Hi", "stream": False})
    assert generated.status_code == 200
    assert service.last.prompts[0] == tuple(own.encode("Hi"))
    assert service.is_idle


async def test_a_template_that_waits_is_rendered_in_its_own_pool(
    client: httpx.AsyncClient, service: FakeService, own: OwnTokenizer
) -> None:
    threads: list[str] = []
    render = own.render_chat

    def note(messages: Any, **options: bool) -> str:
        threads.append(threading.current_thread().name)
        return render(messages, **options)

    own.render_chat = note  # type: ignore[method-assign]
    with ThreadPoolExecutor(1, thread_name_prefix="waiting") as pool:
        own.chat_pool = pool
        await client.post("/v1/chat/completions", json={**CHAT, "model": "own"})
        await client.post("/chat_tokenize", json={**CHAT, "model": "own"})
        await client.post("/v1/messages/count_tokens", json={**CHAT, "model": "own"})
    assert len(threads) == 3
    assert all(name.startswith("waiting") for name in threads)


def said_by_the_adapter(request: GenerationRequest) -> list[TokenEvent]:
    """One token of the adapter's own."""
    return [token_event("a", id=FIRST + ord("a"), finish=finish_of(request, "a", 1))]


async def test_answers_spell_tokens_as_the_adapter_does(
    client: httpx.AsyncClient, service: FakeService, own: OwnTokenizer
) -> None:
    service.script = said_by_the_adapter
    asked = {"model": "own", "logprobs": True, "top_logprobs": 0}
    chat = (await client.post("/v1/chat/completions", json={**CHAT, **asked})).json()
    completion = (
        await client.post("/v1/completions", json={"model": "own", "prompt": "Hi", "logprobs": 0})
    ).json()
    ollama = await client.post("/api/chat", json={**CHAT, **asked, "stream": False})

    [entry] = chat["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("a", [ord("a")])
    assert completion["choices"][0]["logprobs"]["tokens"] == ["a"]
    assert ollama.json()["logprobs"][0]["token"] == "a"


@pytest.mark.parametrize(
    "name", [{"model": "own"}, {"adapter_id": "own"}, {"model": "base", "adapter_id": "own"}]
)
async def test_tokens_can_be_asked_for_in_an_adapter_s_name(
    client: httpx.AsyncClient, service: FakeService, own: OwnTokenizer, name: dict[str, str]
) -> None:
    spans = (await client.post("/tokenize", json={"inputs": "Hi", **name})).json()
    ids = [span["id"] for span in spans]
    text = (await client.post("/detokenize", json={"tokens": ids, **name})).json()
    assert ids == [FIRST + ord(character) for character in "Hi"]
    assert text == {"prompt": "Hi"}
    assert service.is_idle


async def test_a_chat_can_be_tokenised_in_an_adapter_s_name(
    client: httpx.AsyncClient, service: FakeService, own: OwnTokenizer
) -> None:
    told = (await client.post("/chat_tokenize", json={**CHAT, "model": "own"})).json()
    assert told["templated_text"] == USER
    assert [span["id"] for span in told["tokenize_response"]] == own.encode(USER, add_special_tokens=False)
    assert service.is_idle


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/chat_tokenize"])
async def test_tokens_of_a_model_that_is_not_there_are_refused(
    client: httpx.AsyncClient, service: FakeService, path: str
) -> None:
    body = {**CHAT, "inputs": "Hi", "tokens": [1], "model": "nobody"}
    response = await client.post(path, json=body)
    assert response.status_code == 404
    assert set(response.json()) == {"error", "error_type"}


async def test_count_tokens_counts_with_the_adapter_s_template(
    client: httpx.AsyncClient, own: OwnTokenizer
) -> None:
    counted = await client.post("/v1/messages/count_tokens", json={**CHAT, "model": "own"})
    assert counted.json() == {"input_tokens": len(USER)}


async def test_show_tells_the_adapter_s_template(
    client: httpx.AsyncClient, service: FakeService, own: OwnTokenizer
) -> None:
    shown = {
        name: (await client.post("/api/show", json={"model": name})).json()["template"]
        for name in ("own", "plain", "base")
    }
    assert shown == {"own": "own", "plain": "{{ messages }}", "base": "{{ messages }}"}
    assert service.is_idle


async def test_a_stream_of_lorax_lists_the_prompt_as_the_adapter_reads_it(
    client: httpx.AsyncClient, service: FakeService, own: OwnTokenizer
) -> None:
    body = {"inputs": "Hi", "parameters": {"adapter_id": "own", "return_full_text": True}}
    response = await client.post("/generate", json=body)
    assert response.json()["generated_text"].startswith("Hi")
    kept = await client.post(
        "/api/generate", json={"model": "own", "prompt": "Hi", "context": own.encode("So "), "stream": False}
    )
    assert json.loads(kept.text)["context"][:4] == own.encode("So ")
