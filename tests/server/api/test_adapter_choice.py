"""Fields that choose adapters beside the name of the model: what becomes of them, in every protocol that has
them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.recipes import MajoritySign, MergeMethod, MergeRecipe
from adapters.types import AdapterPart, AdapterUse
from server.api.app import build_app
from server.api.state import ServerState
from server.types import GenerationRequest, TokenEvent
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService, finish_of

MakeState = Callable[..., ServerState]
Body = dict[str, Any]

USER = [{"role": "user", "content": "Hi"}]
TEXT = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hi"]}


def chat(fields: Body) -> tuple[str, Body]:
    return "/v1/chat/completions", {"messages": USER, **fields}


def completion(fields: Body) -> tuple[str, Body]:
    return "/v1/completions", {"prompt": "Hi", "stream": True, **fields}


def responses(fields: Body) -> tuple[str, Body]:
    return "/v1/responses", {"input": "Hi", **fields}


def embeddings(fields: Body) -> tuple[str, Body]:
    return "/v1/embeddings", {"input": "Hi", **fields}


def generate(fields: Body) -> tuple[str, Body]:
    return "/generate", {"inputs": "Hi", "parameters": fields}


def generate_stream(fields: Body) -> tuple[str, Body]:
    return "/generate_stream", {"inputs": "Hi", "parameters": fields}


def invocation(fields: Body) -> tuple[str, Body]:
    return "/invocations", {"inputs": "Hi", "parameters": fields}


def kserve_generate(fields: Body) -> tuple[str, Body]:
    return "/v2/models/base/generate", {"text_input": "Hi", "parameters": fields}


def kserve_infer(fields: Body) -> tuple[str, Body]:
    return "/v2/models/base/infer", {"inputs": [TEXT], "parameters": fields}


def ollama_chat(fields: Body) -> tuple[str, Body]:
    return "/api/chat", {"model": "base", "messages": USER, "options": fields}


def ollama_embed(fields: Body) -> tuple[str, Body]:
    return "/api/embed", {"model": "base:latest", "input": "Hi", "options": fields}


WITH_TOKENS = [
    chat,
    completion,
    responses,
    embeddings,
    generate,
    generate_stream,
    invocation,
    kserve_generate,
    kserve_infer,
]
LORAX = [generate, generate_stream, invocation]
PROTOCOLS = [*WITH_TOKENS, ollama_chat, ollama_embed]
Protocol = Callable[[Body], tuple[str, Body]]
TWO = [{"name": "pirate", "scale": 0.5}, {"name": "base:haiku"}]


def vector(request: GenerationRequest) -> list[TokenEvent]:
    return [TokenEvent(0, "", None, finish_of(request, "", 0), vector=(0.6, -0.8))]


@pytest.fixture(autouse=True)
def adapters(service: FakeService) -> None:
    for name in ("pirate", "haiku", "secret"):
        service.registry.add(name, f"/adapters/{name}")
    text = service.script
    service.script = lambda request: text(request) if request.pooling is None else vector(request)


def used(service: FakeService, **scales: float) -> AdapterUse:
    refs = {name: info.ref for name, info in service.registry.adapters.items()}
    return AdapterUse.sum_of(AdapterPart(refs[name], scale) for name, scale in scales.items())


async def post(client: httpx.AsyncClient, asked: tuple[str, Body], **headers: str) -> httpx.Response:
    path, body = asked
    return await client.post(path, json=body, headers=headers)


# --- weighted sets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_weighted_set_is_used_in_every_protocol(
    client: httpx.AsyncClient, service: FakeService, protocol: Protocol
) -> None:
    response = await post(client, protocol({"lora": TWO}))

    assert response.status_code == 200, response.text
    assert response.headers["x-adapter-id"] == "haiku:1+pirate:0.5"
    assert response.headers["x-adapter-source"] == "local"
    assert service.last.adapter == used(service, pirate=0.5, haiku=1.0)
    assert service.is_idle


@pytest.mark.parametrize("protocol", [chat, responses])
async def test_answer_calls_a_set_by_its_adapters(client: httpx.AsyncClient, protocol: Protocol) -> None:
    response = await post(client, protocol({"lora": TWO, "model": "base"}))

    assert response.json()["model"] == "haiku:1+pirate:0.5"


@pytest.mark.parametrize("lora", [[], [{"name": "pirate", "scale": 0}], [{"name": "pirate", "scale": -0.0}]])
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_nothing_of_any_adapter_is_the_base_model(
    client: httpx.AsyncClient, service: FakeService, protocol: Protocol, lora: list[Body]
) -> None:
    response = await post(client, protocol({"lora": lora}))

    assert response.headers["x-adapter-id"] == "__base_model__"
    assert service.last.adapter is None


async def test_one_adapter_as_it_is_is_that_adapter(client: httpx.AsyncClient, service: FakeService) -> None:
    response = await post(client, chat({"lora": [{"name": "pirate", "scale": 1}]}))
    await post(client, chat({"model": "pirate"}))

    assert response.headers["x-adapter-id"] == response.json()["model"] == "pirate"
    assert service.requests[0].adapter == service.requests[1].adapter == used(service, pirate=1.0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_unknown_adapter_of_a_set_is_a_404_that_says_which(
    client: httpx.AsyncClient, service: FakeService, protocol: Protocol
) -> None:
    response = await post(client, protocol({"lora": [*TWO, {"name": "nobody", "scale": 0.1}]}))

    assert response.status_code == 404
    if protocol in (chat, completion, responses, embeddings):
        assert response.json()["error"]["param"] == "lora[2].name"
        assert "nobody" in response.json()["error"]["message"]
    assert service.is_idle


# --- merges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", LORAX)
async def test_L8_merge_is_asked_for_as_lorax_clients_ask(
    client: httpx.AsyncClient, service: FakeService, protocol: Protocol
) -> None:
    merge = {
        "ids": ["pirate", "base:haiku"],
        "weights": [0.5, 2],
        "merge_strategy": "dare_ties",
        "density": 0.3,
        "majority_sign_method": "frequency",
    }
    response = await post(client, protocol({"merged_adapters": merge, "adapter_id": None}))

    assert response.status_code == 200
    assert response.headers["x-adapter-id"] == "merged"
    [wish] = service.wishes
    assert wish.merge is not None
    assert wish.merge.names == ("pirate", "haiku")
    assert wish.merge.recipe == MergeRecipe((0.5, 2.0), MergeMethod.DARE_TIES, 0.3, MajoritySign.FREQUENCY)


@pytest.mark.parametrize(
    "merge",
    [
        {"ids": ["pirate", "haiku"]},
        {"ids": ["pirate", "haiku"], "weights": None, "merge_strategy": None, "majority_sign_method": ""},
        {"ids": ["pirate", "haiku"], "weights": [1.0, 1.0], "density": None, "merge_strategy": "linear"},
    ],
)
async def test_what_a_merge_leaves_open_is_as_lorax_documents_it(
    client: httpx.AsyncClient, service: FakeService, merge: Body
) -> None:
    assert (await post(client, generate({"merged_adapters": merge}))).status_code == 200
    [wish] = service.wishes
    assert wish.merge is not None
    assert wish.merge.recipe == MergeRecipe((1.0, 1.0))


async def test_density_means_nothing_to_a_sum(client: httpx.AsyncClient, service: FakeService) -> None:
    """lorax-client has to send one."""
    merge = {"ids": ["pirate"], "weights": [1.0], "density": 0.0}

    assert (await post(client, generate({"merged_adapters": merge}))).status_code == 200


async def test_unknown_adapter_of_a_merge_is_a_404(client: httpx.AsyncClient, service: FakeService) -> None:
    merge = {"ids": ["pirate", "nobody"], "weights": [1, 1]}
    response = await post(client, generate({"merged_adapters": merge}))

    assert response.status_code == 404
    assert response.json()["error_type"] == "adapter_not_found"


# --- sources and tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", WITH_TOKENS)
async def test_L17_source_and_token_reach_whoever_fetches_adapters_and_nothing_else(
    client: httpx.AsyncClient,
    service: FakeService,
    protocol: Protocol,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    fields = {"lora": TWO, "adapter_source": "hub", "api_token": "token-of-mine"}
    response = await post(client, protocol(fields))

    assert response.status_code == 404, "there, a name with the base's before it is another one"
    response = await post(client, protocol({**fields, "lora": [{"name": "haiku"}]}))
    assert response.headers["x-adapter-source"] == "hub"
    assert service.tokens == ["token-of-mine"] * 2
    assert {wish.source for wish in service.wishes} == {"hub"}
    assert "token-of-mine" not in caplog.text + repr(service.wishes) + response.text


async def test_token_is_forgotten_as_soon_as_the_adapter_is_there(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.is_manual = True
    fields = {"model": "pirate", "adapter_source": "hub", "api_token": "t"}
    answering = asyncio.create_task(post(client, completion(fields)))
    stream = await asyncio.wait_for(service.streams.get(), 10)

    assert service.tokens == ["t"]
    [wish] = service.wishes
    assert wish.token is not None
    assert wish.token.reveal() is None
    stream.put(*service.script(stream.request))
    assert (await answering).status_code == 200


async def test_token_is_forgotten_when_there_is_no_adapter(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    response = await post(client, chat({"model": "nobody", "adapter_source": "hub", "api_token": "t"}))

    assert response.status_code == 404
    assert [wish.token and wish.token.reveal() for wish in service.wishes] == [None]


@pytest.mark.parametrize(
    ("fields", "bearer", "token"),
    [
        ({"adapter_source": "hub"}, "Bearer hf_mine", "hf_mine"),
        ({"adapter_source": "hub", "api_token": "own"}, "Bearer hf_mine", "own"),
        ({"adapter_source": "hub", "api_token": ""}, "bearer hf_mine", "hf_mine"),
        ({"adapter_source": "hub"}, "Bearer sk-mine", None),
        ({"adapter_source": "hub"}, "Basic hf_mine", None),
        ({"adapter_source": "s3"}, "Bearer hf_mine", None),
        ({}, "Bearer hf_mine", None),
    ],
)
async def test_L17_bearer_stands_for_a_token_of_the_hub_s(
    client: httpx.AsyncClient, service: FakeService, fields: Body, bearer: str, token: str | None
) -> None:
    await post(client, generate({"adapter_id": "pirate", **fields}), authorization=bearer)

    assert service.tokens == [token]


async def test_key_of_this_server_goes_nowhere(make_state: MakeState, service: FakeService) -> None:
    async with connect(build_app(make_state(api_key="hf_key"))) as client:
        asked = generate({"adapter_id": "pirate", "adapter_source": "hub"})
        response = await post(client, asked, authorization="Bearer hf_key")

    assert response.status_code == 200
    assert service.tokens == [None]


# --- keys -------------------------------------------------------------------------------------------------

KEYS = """
sk-all     name=all
sk-one     name=one      adapters=pirate,haiku
sk-sets    name=sets     adapters=pirate,haiku     base=no
sk-hub     name=hub      adapters=hub:team/*,pirate
"""


@pytest.fixture
async def keyed(make_state: MakeState, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    (tmp_path / "keys").write_text(KEYS)
    async with connect(build_app(make_state(api_keys_file=tmp_path / "keys"))) as http:
        yield http


def with_names(kind: str, *names: str) -> Body:
    if kind == "set":
        return {"lora": [{"name": name} for name in names]}
    if kind == "vanishing part":
        return {"lora": [{"name": name, "scale": int(i == 0)} for i, name in enumerate(names)]}
    return {"merged_adapters": {"ids": list(names), "weights": [1] * len(names)}}


@pytest.mark.parametrize("kind", ["set", "vanishing part", "merge"])
@pytest.mark.parametrize("written", ["{}", "base:{}"])
async def test_part_that_a_key_may_not_use_is_refused_exactly_like_an_unknown_one(
    keyed: httpx.AsyncClient, service: FakeService, kind: str, written: str
) -> None:
    async def answer(name: str, key: str) -> httpx.Response:
        asked = generate(with_names(kind, "pirate", written.format(name)))
        return await post(keyed, asked, authorization=f"Bearer sk-{key}")

    forbidden, other = await answer("secret", "one"), await answer("nobody", "one")
    assert forbidden.status_code == other.status_code == 404
    assert forbidden.text.replace("secret", "nobody") == other.text
    assert service.wishes == [], "nobody was asked"
    if kind != "vanishing part":
        assert (await answer("nobody", "all")).text == other.text
    assert (await answer("haiku", "one")).status_code == 200
    assert service.is_idle


async def test_refusal_of_a_part_says_where_it_stands(keyed: httpx.AsyncClient) -> None:
    asked = chat(with_names("set", "pirate", "secret"))
    response = await post(keyed, asked, authorization="Bearer sk-one")

    assert response.json()["error"]["param"] == "lora[1].name"


async def test_key_without_the_base_model_may_use_sets_but_not_empty_ones(keyed: httpx.AsyncClient) -> None:
    statuses = [
        (await post(keyed, chat({"lora": lora}), authorization="Bearer sk-sets")).status_code
        for lora in (TWO, [], [{"name": "pirate", "scale": 0}])
    ]

    assert statuses == [200, 404, 404]


@pytest.mark.parametrize(
    ("key", "source", "name", "status"),
    [
        ("one", "hub", "pirate", 404),  # on the Hub that is another adapter
        ("one", "local", "pirate", 200),
        ("hub", "hub", "team/a", 200),
        ("hub", "hub", "other/a", 404),
        ("hub", "s3", "team/a", 404),
        ("hub", "hub", "pirate", 404),
        ("hub", None, "pirate", 200),
        ("all", "hub", "other/a", 200),
    ],
)
async def test_key_is_limited_to_adapters_of_a_source(
    keyed: httpx.AsyncClient, service: FakeService, key: str, source: str | None, name: str, status: int
) -> None:
    service.registry.add("team/a")
    service.registry.add("other/a")
    for fields in ({"adapter_id": name}, with_names("set", name), with_names("merge", name)):
        asked = generate({**fields, "adapter_source": source})
        response = await post(keyed, asked, authorization=f"Bearer sk-{key}")
        assert response.status_code == status
    if status == 200 and source is None:
        assert {wish.source for wish in service.wishes} == {"local"}, "not what the name may mean elsewhere"


async def test_places_in_s3_say_their_source_themselves(
    make_state: MakeState, service: FakeService, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("sk-s3  adapters=s3://ours/*\n")
    for place in ("s3://ours/a", "s3://others/a"):
        service.registry.add(place)
    async with connect(build_app(make_state(api_keys_file=tmp_path / "keys"))) as client:
        answers = [
            (await post(client, chat({"model": place, "adapter_source": "s3"}), authorization="Bearer sk-s3"))
            for place in ("s3://ours/a", "s3://others/a")
        ]

    assert [answer.status_code for answer in answers] == [200, 404]
