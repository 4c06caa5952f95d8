"""The OpenAPI document: valid, complete, and true of what the running app answers.

Each example that is documented is sent, and each answer and frame that comes back must match the documented
schema with nothing left over. Each documented refusal is brought about and must have the documented shape.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from server.api import shapes
from server.api.app import CHAPTERS, build_app, table
from server.api.docs.document import document, undescribed
from server.api.docs.operations import EVENTS, JSON, LINES
from server.api.headers import EXPOSED_HEADERS, HEADER_NOTES
from server.api.state import Phase, ServerState
from server.errors import ModelNotFound, Overloaded
from server.types import FinishReason, GenerationRequest, TokenEvent
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService, finish_of, scored, token_event

MakeState = Callable[..., ServerState]
Document = dict[str, Any]

DOCUMENT = document(table(ServerState()), CHAPTERS, version="1.2.3", asks_for_key=False)
METHODS = ("get", "post", "put", "patch", "delete")


@dataclass(frozen=True)
class Documented:
    """One operation of the document."""

    method: str
    path: str
    operation: Document

    @property
    def body(self) -> Document | None:
        content = self.operation.get("requestBody", {}).get("content")
        return None if content is None else content[JSON]

    def url(self, in_path: str | None = None) -> str:
        """With the examples of its parameters, or something else in the path."""
        url, query = self.path, {}
        for parameter in self.operation.get("parameters", ()):
            value = parameter.get("example", "default")
            if parameter["in"] == "path":
                url = url.replace(f"{{{parameter['name']}}}", in_path or value)
            elif parameter["in"] == "query" and parameter["required"]:
                query[parameter["name"]] = str(value)
        return str(httpx.URL(url, params=query)) if query else url

    @property
    def is_served(self) -> bool:
        """Whether there is a way to ask that is not refused."""
        return any(int(status) < 400 for status in self.operation["responses"])

    @property
    def examples(self) -> list[Any]:
        if self.body is None:
            return [None]
        return [example["value"] for example in self.body["examples"].values()]


OPERATIONS = [
    Documented(method, path, operations[method])
    for path, operations in DOCUMENT["paths"].items()
    for method in METHODS
    if method in operations
]
EXAMPLES = [
    pytest.param(documented, example, id=f"{documented.operation['operationId']}-{number}")
    for documented in OPERATIONS
    if documented.is_served
    for number, example in enumerate(documented.examples)
]
REFUSALS = [
    pytest.param(documented, status, id=f"{documented.operation['operationId']}-{status}")
    for documented in OPERATIONS
    for status in documented.operation["responses"]
    if int(status) >= 400
]


def closed(value: Any) -> Any:
    """A schema that allows no member that it does not name."""
    if isinstance(value, list):
        return [closed(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {name: closed(item) for name, item in value.items()}
    if isinstance(value.get("properties"), dict) and "type" in value:
        result.setdefault("additionalProperties", False)
    return result


CLOSED = closed(DOCUMENT["components"])


def check(value: object, schema: Document) -> None:
    """Fails unless the value matches the schema with nothing left over."""
    validator = jsonschema.Draft202012Validator({**closed(schema), "components": CLOSED})
    worst = jsonschema.exceptions.best_match(validator.iter_errors(value))
    assert worst is None, f"{worst.json_path}: {worst.message}"


def check_answer(response: httpx.Response, documented: Documented) -> None:
    """Fails unless the document describes such an answer, head and body."""
    described = documented.operation["responses"][str(response.status_code)]
    media_type = response.headers["content-type"].partition(";")[0]
    content = described["content"][media_type]
    if media_type in (EVENTS, LINES):
        end = content.get("x-possible-end")
        if end is None or not response.text.endswith(f"data: {end}\n\n"):
            end = content.get("x-end")
        for frame in frames(response.text, end):
            check(frame, content["x-itemSchema"])
    elif media_type == JSON:
        check(response.json(), content["schema"])
    if response.status_code < 400:
        known = {*described.get("headers", {}), "x-accel-buffering", "x-content-type-options"}
        assert {name for name in response.headers if name.startswith("x-")} <= known


def frames(text: str, end: str | None) -> Iterator[Any]:
    """The JSON of each frame of a stream, which must be whole and end as it should."""
    lines = [
        line for line in text.split("\n") if line and not line.startswith((":", "event:", "id:", "retry:"))
    ]
    written = [line.removeprefix("data: ") for line in lines]
    if end is not None:
        assert written.pop() == end
    assert written
    yield from map(json.loads, written)


def test_document_is_valid() -> None:
    assert [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []
    assert DOCUMENT["openapi"] == "3.1.0"


def test_every_route_is_described_and_every_description_has_its_route() -> None:
    """Give an `Operation` in the protocol's chapter.py to what is
    named here.
    """
    assert undescribed(table(ServerState()), CHAPTERS) == set()


def test_references_lead_somewhere_and_nothing_is_left_over() -> None:
    text = json.dumps(DOCUMENT)
    referenced = set(re.findall(r"#/components/(\w+)/([\w.-]+)", text))
    there = {(kind, name) for kind in ("schemas", "headers") for name in DOCUMENT["components"][kind]}

    assert referenced == there


def test_names_are_short_and_ours() -> None:
    for name in DOCUMENT["components"]["schemas"]:
        assert re.fullmatch(r"[A-Za-z]\w+", name)
        assert "__" not in name, "two types have one name"
    for shape in (value for value in vars(shapes).values() if isinstance(value, shapes.ErrorShape)):
        assert shape.name


def test_operations_have_ids_summaries_and_tags() -> None:
    ids = [documented.operation["operationId"] for documented in OPERATIONS]
    tags = {tag["name"] for tag in DOCUMENT["tags"]}

    assert len(set(ids)) == len(ids)
    for documented in OPERATIONS:
        assert documented.operation["summary"]
        assert set(documented.operation["tags"]) <= tags


def test_parameters_of_paths_are_those_in_the_path() -> None:
    for documented in OPERATIONS:
        named = [p["name"] for p in documented.operation.get("parameters", ()) if p["in"] == "path"]
        assert named == re.findall(r"\{(\w+)\}", documented.path)


def test_every_body_has_an_example_that_it_allows() -> None:
    for documented in OPERATIONS:
        if documented.body is not None:
            assert documented.examples, documented.path
            for example in documented.examples:
                check(example, documented.body["schema"])


def test_examples_of_answers_are_what_they_are_examples_of() -> None:
    for documented in OPERATIONS:
        for described in documented.operation["responses"].values():
            for media_type, content in described["content"].items():
                if "example" not in content:
                    continue
                if media_type in (EVENTS, LINES):
                    for frame in frames(content["example"], content.get("x-end")):
                        check(frame, content["x-itemSchema"])
                else:
                    check(content["example"], content["schema"])


def test_every_exposed_header_is_explained() -> None:
    assert set(HEADER_NOTES) == set(EXPOSED_HEADERS)


def test_fields_that_are_not_served_are_listed_with_what_they_may_hold() -> None:
    properties = DOCUMENT["components"]["schemas"]["OpenaiChatBody"]["properties"]

    assert properties["tool_choice"]["enum"] == [None, "none", "auto"]
    assert properties["length_penalty"]["enum"] == [None, 1]


@pytest.mark.parametrize("asks_for_key", [False, True])
def test_security_says_whether_a_key_is_needed(asks_for_key: bool) -> None:
    written = document(table(ServerState()), CHAPTERS, version="1", asks_for_key=asks_for_key)

    assert ({} in written["security"]) is not asks_for_key
    assert {name for each in written["security"] for name in each} == {"bearer", "header", "query"}
    assert written["paths"]["/health"]["get"]["security"] == []
    assert "401" not in written["paths"]["/health"]["get"]["responses"]
    assert "401" in written["paths"]["/v1/models"]["get"]["responses"]


async def keep_response(client: httpx.AsyncClient, state: ServerState) -> None:
    """Make the response that the examples read."""
    state.new_id = lambda: "1"
    assert (await client.post("/v1/responses", json={"input": "Hi"})).json()["id"] == "resp_1"


def with_everything(request: GenerationRequest) -> list[TokenEvent]:
    """What was asked for; tokens of every kind: with text, without, special, the last one with the end."""
    events: list[TokenEvent] = []
    if request.sampling.num_prompt_logprobs is not None:
        return scored(request)
    for index in range(request.num_choices):
        if request.pooling is not None:
            finish = finish_of(request, "", 0, index=index)
            events.append(TokenEvent(index, "", None, finish, vector=(0.6, -0.8)))
            continue
        finish = finish_of(request, "Once upon", 3, reason=FinishReason.STOP, stop=None)
        events += [
            token_event("Once", index=index),
            token_event(" upon", index=index),
            token_event("", index=index, id=2, shown="</s>", is_special=True, finish=finish),
        ]
    return events


@pytest.mark.parametrize(("documented", "example"), EXAMPLES)
async def test_examples_are_answered_as_documented(
    client: httpx.AsyncClient,
    state: ServerState,
    service: FakeService,
    documented: Documented,
    example: object,
) -> None:
    service.registry.add("pirate", "/adapters/pirate")
    service.registry.add("json", "/adapters/json")
    service.registry.add("haiku", "/adapters/haiku")
    service.script = with_everything
    await keep_response(client, state)
    response = await client.request(documented.method, documented.url(), json=example)

    assert response.is_success, response.text
    check_answer(response, documented)


@pytest.mark.parametrize(("documented", "example"), EXAMPLES)
async def test_streams_that_break_end_as_documented(
    client: httpx.AsyncClient,
    state: ServerState,
    service: FakeService,
    documented: Documented,
    example: object,
) -> None:
    def broken(request: GenerationRequest) -> list[TokenEvent]:
        begun = with_everything(request)[: 0 if request.pooling else 1]
        return [*begun, *failing(request)]

    service.registry.add("pirate", "/adapters/pirate")
    service.registry.add("haiku", "/adapters/haiku")
    await keep_response(client, state)
    service.script = broken
    check_answer(await client.request(documented.method, documented.url(), json=example), documented)


BAD_QUERY = {
    "get_v1_responses_id": "?stream=true",
    "get_v1_responses_id_input_items": "?limit=0",
    "get_api_jobs_id_infer_stream": "&temperature=9",
    "get_v1_adapters": "?limit=0",
    "delete_v1_adapters_id": "?wait=-1",
}
"""What operations without a body refuse."""


@pytest.mark.parametrize(("documented", "status"), REFUSALS)
async def test_refusals_are_as_documented(
    make_state: MakeState, service: FakeService, tmp_path: Path, documented: Documented, status: str
) -> None:
    """Whatever the operation, the same is done to it to be refused with a status."""
    query = ""
    options: dict[str, object] = {}
    request: dict[str, Any] = {"json": documented.examples[0]}
    match status:
        case "400" | "422":
            request = {"content": b"[]"}
            query = BAD_QUERY.get(documented.operation["operationId"], "")
        case "401":
            options = {"api_key": "sk-1"}
        case "403":
            (tmp_path / "keys").write_text("sk-1 adapters=one\n")
            options = {"api_keys_file": tmp_path / "keys"}
            request["headers"] = {"x-api-key": "sk-1"}
        case "404":
            service.resolve = refusing(ModelNotFound("there is no adapter", param="model"))  # type: ignore[method-assign]
            request["json"] = json.loads(json.dumps(request["json"]).replace('"default"', '"nobody"'))
        case "413":
            options = {"max_body_bytes": 2}
        case "415":
            request["headers"] = {"content-type": "application/xml"}
        case "424" | "500":
            service.script = failing
        case "429":
            service.refusal = Overloaded("too many", retry_after_s=1)
    state = make_state(**options)
    if status == "503":
        state.phase = Phase.DRAINING
    url = documented.url("nobody" if status == "404" else None)
    async with connect(build_app(state)) as client:
        if status == "400":
            await keep_response(client, state)
        response = await client.request(documented.method, url + query, **request)

    assert response.status_code == int(status), response.text
    check_answer(response, documented)
    for name in documented.operation["responses"][status]["headers"]:
        assert name in response.headers


def refusing(error: Exception) -> Callable[..., Any]:
    async def refuse(*_: object) -> None:
        raise error

    return refuse


def failing(request: GenerationRequest) -> list[TokenEvent]:
    finish = finish_of(request, "", 0, reason=FinishReason.ERROR, error="logits were not finite")
    return [TokenEvent(index, "", None, finish) for index in range(request.num_choices)]


async def test_document_is_served_in_every_phase() -> None:
    async with connect(build_app(ServerState(version="1.2.3"))) as client:
        response = await client.get("/openapi.json")

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == DOCUMENT


async def test_page_runs_and_loads_nothing_but_itself() -> None:
    """What a browser makes of it is tested in tests/e2e."""
    async with connect(build_app(ServerState())) as client:
        response = await client.get("/docs")
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))

    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for element, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(rf"<{element}[^>]*>(.*?)</{element}>", response.text, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert not re.search(r"(src|href)=.?(https?:)?//", response.text)
    assert "style=" not in response.text


async def test_the_document_asks_for_the_key_and_pages_do_not(make_state: MakeState) -> None:
    async with connect(build_app(make_state(api_key="secret"))) as client:
        assert (await client.get("/openapi.json")).status_code == 401
        assert (await client.get("/openapi.json?api_key=secret")).status_code == 200
        for path in ("/docs", "/playground", "/"):
            page = await client.get(path, headers={"accept": "text/html"})
            assert (page.status_code, page.text[:15]) == (200, "<!doctype html>")
        for path in ("/docs/", "/playground/x"):
            assert (await client.get(path)).status_code == 401
        assert (await client.post("/", json={"inputs": "Hi"})).status_code == 401
