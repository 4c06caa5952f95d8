"""Adapters that come as a form: streamed to disk, checked, named at once, and gone without a trace if not."""

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.errors import AdapterInvalid, AdapterUnavailable
from adapters.types import Revision
from adapters.uploads import UploadRoot
from server.api.adapters.form import FormReader
from server.api.adapters.uploads import Uploads
from server.api.app import build_app
from server.api.state import ServerState
from tests.server.api.conftest import connect, serve
from tests.server.api.fake_service import FakeService
from tests.server.api.raw_http import Connection, until

ADAPTERS = "/v1/adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_BYTES = 4 * 2**20


def revision_of(folder: str | Path) -> Revision:
    """Stands in for reading an adapter: weights that begin with "bad" cannot be served."""
    files = [(Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    if files[1].startswith(b"bad"):
        raise AdapterInvalid("adapter_model.safetensors is not a safetensors file")
    return Revision(hashlib.sha256(b"|".join(files)).hexdigest())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "uploads"
    folder.mkdir()
    return folder


@pytest.fixture
def uploading(state: ServerState, service: FakeService, root: Path) -> Iterator[Uploads]:
    with ThreadPoolExecutor(2) as pool:
        service.registry.revision_of = revision_of
        state.uploads = Uploads(UploadRoot(root), revision_of, loaders=pool, pool=pool, max_bytes=MAX_BYTES)
        yield state.uploads


@pytest.fixture
async def http(state: ServerState, uploading: Uploads) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(build_app(state)) as client:
        yield client


def files(weights: bytes = b"weights", **more: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    """Two files as `curl -F file=@...` sends them, and more by name, `_` for `.`."""
    named = {CONFIG: b"{}", WEIGHTS: weights}
    named |= {name.replace("__", "."): content for name, content in more.items()}
    return [("file", (name, content)) for name, content in named.items()]


async def upload(client: httpx.AsyncClient, weights: bytes = b"weights", **values: str) -> httpx.Response:
    return await client.post(ADAPTERS, data={"name": "pirate", **values}, files=files(weights))


def left_over(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


async def test_an_uploaded_adapter_is_registered_from_its_own_folder(
    http: httpx.AsyncClient, service: FakeService, root: Path
) -> None:
    response = await http.post(
        ADAPTERS,
        data={"name": "pirate", "pin": "true"},
        files=files(b"w" * 3_000_000, tokenizer__json=b"{}", chat_template__jinja=b"{{ messages }}"),
    )

    assert response.status_code == 201, response.text
    record = response.json()
    assert (record["source"], record["pinned"]) == ("upload", True)
    assert record["revision"] == revision_of(root / "pirate")
    assert left_over(root) == ["pirate"]
    assert (root / "pirate" / WEIGHTS).read_bytes() == b"w" * 3_000_000
    assert (root / "pirate" / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    assert service.registry.loads == [{"path": str(root / "pirate"), "source": "upload", "token": None}]


async def test_a_folder_among_those_that_are_served_anyway_is_adopted(
    http: httpx.AsyncClient, uploading: Uploads, service: FakeService, root: Path
) -> None:
    uploading._is_adapters_dir = True
    service.registry.folder = root
    response = await upload(http, pin="true")

    assert response.status_code == 201, response.text
    assert (response.json()["root"], response.json()["pinned"]) == (str(root / "pirate"), True)
    assert service.registry.adopted == ["pirate"]
    assert service.registry.loads == []


async def test_files_may_be_named_by_their_fields_or_with_their_folder(
    http: httpx.AsyncClient, root: Path
) -> None:
    form = [(CONFIG, ("blob", b"{}")), ("file", (f"pirate-lora\\sub/{WEIGHTS}", b"weights"))]
    response = await http.post(ADAPTERS, data={"name": "pirate"}, files=form)

    assert response.status_code == 201, response.text
    assert left_over(root / "pirate") == [".motet-upload", CONFIG, WEIGHTS]


async def test_the_same_content_again_changes_nothing(
    http: httpx.AsyncClient, service: FakeService, root: Path
) -> None:
    first = await upload(http)
    inode = (root / "pirate").stat().st_ino
    second = await upload(http, pin="true")

    assert (first.status_code, second.status_code) == (201, 200)
    assert second.json() == {**first.json(), "pinned": True}
    assert (root / "pirate").stat().st_ino == inode
    assert len(service.registry.loads) == 1
    assert left_over(root) == ["pirate"]


async def test_other_content_needs_replace_and_leaves_one_folder(http: httpx.AsyncClient, root: Path) -> None:
    await upload(http)
    refused = await upload(http, b"other")
    before = (root / "pirate" / WEIGHTS).read_bytes()
    replaced = await upload(http, b"other", replace="true")

    assert refused.status_code == 400
    assert "replace" in refused.json()["error"]["message"]
    assert before == b"weights"
    assert replaced.status_code == 201
    assert (root / "pirate" / WEIGHTS).read_bytes() == b"other"
    assert left_over(root) == ["pirate"]


async def test_a_folder_sent_before_a_restart_counts_as_other_content(
    http: httpx.AsyncClient, service: FakeService, root: Path
) -> None:
    await upload(http)
    service.registry.adapters.clear()
    refused = await upload(http, b"other")
    same = await upload(http)

    assert (refused.status_code, same.status_code) == (400, 201)
    assert (root / "pirate" / WEIGHTS).read_bytes() == b"weights"


async def test_a_folder_of_the_operator_is_not_replaced(http: httpx.AsyncClient, root: Path) -> None:
    (root / "pirate").mkdir()
    response = await upload(http, replace="true")

    assert response.status_code == 400
    assert left_over(root) == ["pirate"]
    assert left_over(root / "pirate") == []


async def test_what_cannot_be_served_leaves_nothing(
    http: httpx.AsyncClient, service: FakeService, root: Path
) -> None:
    response = await upload(http, b"bad bytes")

    assert response.status_code == 400
    assert response.json()["error"]["message"] == "adapter_model.safetensors is not a safetensors file"
    assert left_over(root) == []
    assert service.registry.adapters == {}


async def test_what_cannot_be_registered_leaves_what_was_there(
    http: httpx.AsyncClient, service: FakeService, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await upload(http)

    async def load(*_: object, **__: object) -> None:
        raise AdapterUnavailable("all memory for adapters is in use", retry_after_s=2)

    monkeypatch.setattr(service.registry, "register", load)
    response = await upload(http, b"other", replace="true")

    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert (root / "pirate" / WEIGHTS).read_bytes() == b"weights"
    assert left_over(root) == ["pirate"]


@pytest.mark.parametrize("name", ["../escape", "a/b", ".hidden", "..", "", "base", "a\\b", "x" * 300, "a\tb"])
async def test_names_that_lead_elsewhere_are_refused(
    http: httpx.AsyncClient, root: Path, tmp_path: Path, name: str
) -> None:
    response = await upload(http, name=name)

    assert response.status_code == 400
    assert left_over(root) == []
    assert left_over(tmp_path) == ["uploads"]


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
async def test_both_files_are_needed(http: httpx.AsyncClient, root: Path, missing: str) -> None:
    form = [one for one in files() if one[1][0] != missing]
    response = await http.post(ADAPTERS, data={"name": "pirate"}, files=form)

    assert (response.status_code, response.json()["error"]["param"]) == (400, missing)
    assert left_over(root) == []


@pytest.mark.parametrize(
    ("values", "param"),
    [({"pin": "maybe"}, "pin"), ({"replace": "2"}, "replace"), ({"name": "default"}, "name")],
)
async def test_bad_values_are_refused_by_name(
    http: httpx.AsyncClient, root: Path, values: dict[str, str], param: str
) -> None:
    response = await upload(http, **values)

    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert left_over(root) == []


async def test_other_files_are_read_over_and_pickles_refused(http: httpx.AsyncClient, root: Path) -> None:
    ignored = await http.post(
        ADAPTERS, data={"name": "pirate", "comment": "hi"}, files=[*files(), ("file", ("README.md", b"#"))]
    )
    refused = await http.post(
        ADAPTERS, data={"name": "sailor"}, files=[*files(), ("file", ("adapter_model.bin", b"\x80"))]
    )

    assert ignored.status_code == 201
    assert not (root / "pirate" / "README.md").exists()
    assert refused.status_code == 400
    assert "pickle" in refused.json()["error"]["message"]
    assert left_over(root) == ["pirate"]


async def test_a_file_or_field_that_comes_twice_is_refused(http: httpx.AsyncClient, root: Path) -> None:
    twice = await http.post(ADAPTERS, data={"name": "pirate"}, files=[*files(), *files()])
    names = await http.post(ADAPTERS, data={"name": ["pirate", "sailor"]}, files=files())

    assert (twice.status_code, twice.json()["error"]["param"]) == (400, CONFIG)
    assert (names.status_code, names.json()["error"]["param"]) == (400, "name")
    assert left_over(root) == []


async def test_too_large_is_413_whether_the_length_is_told_or_not(
    http: httpx.AsyncClient, root: Path
) -> None:
    told = await upload(http, b"w" * (MAX_BYTES + 1))
    body, content_type = form_of(b"w" * (MAX_BYTES + 1))

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    untold = await http.post(ADAPTERS, content=pieces(), headers={"content-type": content_type})

    assert (told.status_code, untold.status_code) == (413, 413)
    assert left_over(root) == []


def form_of(weights: bytes, name: str = "pirate") -> tuple[bytes, str]:
    """The body and the type of a form."""
    request = httpx.Request("POST", "http://x", data={"name": name}, files=files(weights))
    return request.read(), request.headers["content-type"]


@pytest.mark.parametrize("size", [1, 7, 1000, 2**20 + 3])
async def test_however_the_body_is_cut_the_files_are_the_same(
    http: httpx.AsyncClient, root: Path, size: int
) -> None:
    weights = b"\r\n--\r\n-" * (300 if size < 1000 else 200_000)
    body, content_type = form_of(weights)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    response = await http.post(ADAPTERS, content=pieces(), headers={"content-type": content_type})

    assert response.status_code == 201, response.text
    assert (root / "pirate" / WEIGHTS).read_bytes() == weights


async def test_a_long_body_is_never_collected(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    feed = FormReader.feed

    def note(self: FormReader, data: bytes) -> None:
        sizes.append(len(data))
        feed(self, data)

    monkeypatch.setattr(FormReader, "feed", note)
    body, content_type = form_of(b"w" * (MAX_BYTES - 10_000))

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    response = await http.post(ADAPTERS, content=pieces(), headers={"content-type": content_type})

    assert response.status_code == 201, response.text
    assert sum(sizes) == len(body)
    assert max(sizes) <= 2**20 + 65536


FORM = "multipart/form-data; boundary=b"
HEAD = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\npirate\r\n'


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", HEAD + b"--b--\r\n"),
        ("multipart/form-data; boundary=" + "b" * 5000, b""),
        (FORM, b""),
        (FORM, b"secret words that are no form"),
        (FORM, HEAD),
        (FORM, HEAD + b"--b--\r\n"),
        (FORM, b"--b\r\nsecret header: x\r\n\r\n\r\n--b--\r\n"),
        (FORM, b"--b\r\nContent-Disposition: form-data; name=" + b"x" * 20_000 + b"\r\n\r\n\r\n--b--\r\n"),
        (FORM, b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff\r\n--b--\r\n'),
        (FORM, b"".join([b"--b\r\nA: b\r\n\r\n\r\n"] * 1000) + b"--b--\r\n"),
        (
            FORM,
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n' + b"x" * 9000 + b"\r\n--b--\r\n",
        ),
    ],
)
async def test_broken_forms_are_refused_and_not_written_into_the_log(
    http: httpx.AsyncClient, root: Path, caplog: pytest.LogCaptureFixture, content_type: str, body: bytes
) -> None:
    with caplog.at_level(logging.INFO):
        response = await http.post(ADAPTERS, content=body, headers={"content-type": content_type})

    assert response.status_code in (400, 413), response.text
    assert response.json()["error"]["message"]
    assert "secret" not in caplog.text
    assert left_over(root) == []


async def test_a_server_without_a_place_for_uploads_says_so(client: httpx.AsyncClient) -> None:
    assert (await upload(client)).status_code == 503


async def test_a_disk_that_fails_is_503_and_leaves_nothing(
    http: httpx.AsyncClient, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device", "/secret/path")

    monkeypatch.setattr("server.api.adapters.form.FormReader._write", full)
    response = await upload(http)

    assert response.status_code == 503
    assert "secret" not in response.text
    assert left_over(root) == []


async def test_removing_an_uploaded_adapter_removes_its_files(http: httpx.AsyncClient, root: Path) -> None:
    await upload(http)
    removed = await http.delete(f"{ADAPTERS}/pirate")
    again = await http.delete(f"{ADAPTERS}/pirate")

    assert removed.json()["files_removed"] is True
    assert again.status_code == 404
    assert left_over(root) == []


async def test_what_was_sent_and_is_not_registered_can_be_removed(
    http: httpx.AsyncClient, service: FakeService, root: Path
) -> None:
    await upload(http)
    service.registry.adapters.clear()
    removed = await http.delete(f"{ADAPTERS}/pirate")

    assert (removed.json()["files_removed"], removed.json()["revision"]) == (True, None)
    assert left_over(root) == []


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(
    state: ServerState, uploading: Uploads, root: Path, service: FakeService
) -> None:
    body, content_type = form_of(b"w" * 2_000_000)
    head = f"POST {ADAPTERS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n"
    async with serve(build_app(state)) as port:
        connection = await Connection.open(port)
        await connection.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:1_500_000])
        await until(lambda: any((path / WEIGHTS).exists() for path in root.iterdir()))
        connection.drop()
        await until(lambda: left_over(root) == [])

    assert service.registry.adapters == {}


async def test_two_uploads_of_one_name_do_not_mix(http: httpx.AsyncClient, root: Path) -> None:
    contents = [f"weights {number}".encode() * 1000 for number in range(4)]
    answers = await asyncio.gather(*(upload(http, content) for content in contents))

    assert sorted(answer.status_code for answer in answers) == [201, 400, 400, 400]
    (winner,) = [content for content, answer in zip(contents, answers, strict=True) if answer.is_success]
    assert (root / "pirate" / WEIGHTS).read_bytes() == winner
    assert left_over(root) == ["pirate"]


async def test_only_so_many_uploads_run_at_once(
    state: ServerState, uploading: Uploads, root: Path, http: httpx.AsyncClient
) -> None:
    body, content_type = form_of(b"weights")
    is_open = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield body[:100]
        await is_open.wait()
        yield body[100:]

    def begin() -> asyncio.Task[httpx.Response]:
        request = http.post(ADAPTERS, content=slow(), headers={"content-type": content_type})
        return asyncio.create_task(request)

    running = [begin() for _ in range(4)]
    await until(lambda: uploading._num_running == 4)
    refused = await upload(http)
    is_open.set()
    statuses = [(await one).status_code for one in running]

    assert refused.status_code == 429
    assert "retry-after" in refused.headers
    assert sorted(statuses) == [200, 200, 200, 201]


async def test_the_form_is_documented_beside_the_json(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    content = document["paths"][ADAPTERS]["post"]["requestBody"]["content"]
    reference = content["multipart/form-data"]["schema"]["$ref"]
    form = document["components"]["schemas"][reference.rpartition("/")[2]]

    assert re.match("application/json", next(iter(content)))
    assert set(form["required"]) == {"name", CONFIG, WEIGHTS}
