"""The hub's source against a hub of our own; the real client of the hub is held against the same server.

The real hub cannot be reached from the tests. What keeps our server honest is `huggingface_hub` itself: its
functions download from it, and our requests are compared with the ones that it sends.
"""

import hashlib
import logging
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

from adapters.errors import AdapterError, AdapterInvalid, AdapterNotFound, AdapterTooLarge, AdapterUnavailable
from adapters.sources.cache import VersionCache
from adapters.sources.hub import HubSource
from adapters.sources.limits import FetchLimits
from tests.adapters.fake_hub import SIGNATURE, FakeCdn, FakeHub, Repository, sha_of
from tests.adapters.faulty_http import LIMIT_S, Fault
from tests.adapters.fetching import (
    CONFIG,
    MIB,
    WEIGHTS,
    fetch_beside_a_stalled_one,
    let_time_begin_when_stalled,
    stored,
)

NAME = "org/adapter"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    cdn = FakeCdn()
    server = FakeHub(cdn)
    with cdn.running(), server.running():
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def repository(hub: FakeHub, files: dict[str, bytes]) -> Repository:
    """org/adapter, open to all."""
    made = hub.repositories[NAME] = Repository()
    made.commit({"README.md": b"# hello", "checkpoint-1/optimizer.pt": b"\x80", **files})
    return made


def source_of(
    hub: FakeHub,
    folder: Path,
    *,
    max_bytes: int = MIB,
    max_files: int = 100,
    seconds: float = LIMIT_S,
    capacity: int = 16 * MIB,
    **options: object,
) -> HubSource:
    limits = FetchLimits(max_bytes=max_bytes, max_files=max_files, seconds=seconds)
    cache = VersionCache(folder / "cache", capacity)
    source = HubSource(cache, limits, endpoint=hub.url, wait=hub.waits.append, **options)  # type: ignore[arg-type]
    hub.clients.append(source)
    return source


def get(source: HubSource, location: str = NAME, token: str | None = None) -> Path:
    return source.fetch(location, source.resolve(location, token), token)


# --- Locations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["org/name", "org/name@v1.2", "a-b.c/d_e@refs/pr/7", f"o/n@{'a' * 40}"])
def test_locations_of_a_hub(hub: FakeHub, tmp_path: Path, location: str) -> None:
    assert source_of(hub, tmp_path).accepts(location)


@pytest.mark.parametrize(
    "location",
    [
        "",
        "name",
        "a/b/c",
        "/b",
        "a/",
        "../b",
        "a/..",
        "a/b@",
        "a/b@../x",
        "a/b@x/../y",
        "a/b@-x",
        "a/b@x y",
        "a/b@x\n",
        "a/b?x",
        "a/b#x",
        "a/b%2f",
        "a--b/c",
        "a/b.git",
        "é/b",
        "s3://bucket/x",
        "a\\b/c",
        "a/" + "b" * 100,
    ],
)
def test_other_texts_are_no_locations(hub: FakeHub, tmp_path: Path, location: str) -> None:
    source = source_of(hub, tmp_path)

    assert not source.accepts(location)
    with pytest.raises(AdapterNotFound):
        source.resolve(location, None)
    with pytest.raises(AdapterNotFound):
        source.fetch(location, sha_of("any"), None)
    assert not hub.seen


# --- Reading ------------------------------------------------------------------------------------------------


def test_an_adapter_is_fetched_with_its_files_and_no_others(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path
) -> None:
    folder = get(source_of(hub, tmp_path))

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert not any("README" in path or "optimizer" in path for path in hub.paths())


def test_tokenizer_and_template_come_along(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path
) -> None:
    repository.commit({**files, "chat_template.jinja": b"{{ messages }}", "tokenizer_config.json": b"{}"})

    folder = get(source_of(hub, tmp_path))

    assert (folder / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    assert (folder / "tokenizer_config.json").read_bytes() == b"{}"


def test_branch_tag_and_commit_mean_their_commit(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path
) -> None:
    first = repository.refs["main"]
    second = repository.commit({**files, "added_tokens.json": b"v2"}, ref="v2")
    third = repository.commit({**files, "added_tokens.json": b"pr"}, ref="refs/pr/1")
    source = source_of(hub, tmp_path)

    assert source.resolve(NAME, None) == source.resolve(f"{NAME}@main", None) == first
    assert source.resolve(f"{NAME}@v2", None) == source.resolve(f"{NAME}@{second}", None) == second
    assert source.resolve(f"{NAME}@refs/pr/1", None) == third
    assert (get(source, f"{NAME}@v2") / "added_tokens.json").read_bytes() == b"v2"
    assert (get(source, f"{NAME}@refs/pr/1") / "added_tokens.json").read_bytes() == b"pr"


def test_a_moved_branch_is_a_new_version_and_the_old_one_stays(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path
) -> None:
    source = source_of(hub, tmp_path)
    old = get(source)
    repository.commit({**files, "added_tokens.json": b"new"})

    new = get(source)

    assert (new / "added_tokens.json").read_bytes() == b"new"
    assert old != new
    assert not (old / "added_tokens.json").exists()


def test_a_version_is_downloaded_once(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    source = source_of(hub, tmp_path)
    first = get(source)
    downloads = len(hub.cdn.seen)

    assert get(source) == get(source_of(hub, tmp_path)) == first
    assert len(hub.cdn.seen) == downloads == 1


def test_a_renamed_repository_is_followed(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    hub.moved["old/name"] = NAME
    repository.readers = {"token-of-reader"}

    folder = get(source_of(hub, tmp_path), "old/name", "token-of-reader")

    assert (folder / WEIGHTS).exists()


# --- The real client ----------------------------------------------------------------------------------------


def test_our_hub_serves_the_real_client(
    hub: FakeHub,
    repository: Repository,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the library downloads from it, its own cache and checks included, is what we download."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    repository.readers = {"token-of-reader"}
    theirs = {
        name: Path(
            huggingface_hub.hf_hub_download(
                NAME, name, endpoint=hub.url, token="token-of-reader", cache_dir=tmp_path / "hf"
            )
        ).read_bytes()
        for name in files
    }

    ours = get(source_of(hub, tmp_path), NAME, "token-of-reader")

    assert theirs == files == {path.name: path.read_bytes() for path in ours.iterdir()}


def test_we_ask_what_the_real_client_asks(
    hub: FakeHub, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    commit = repository.refs["main"]
    url = hf_hub_url(NAME, CONFIG, revision="refs/pr/1", endpoint=hub.url)
    repository.refs["refs/pr/1"] = commit
    metadata = get_hf_file_metadata(url, token="token-of-reader")
    api = HfApi(endpoint=hub.url, token="token-of-reader")
    info = api.model_info(NAME, revision=commit, files_metadata=True)
    theirs = [(seen.method, seen.path.lower(), seen.headers["authorization"]) for seen in hub.seen]
    hub.seen.clear()

    get(source_of(hub, tmp_path), f"{NAME}@refs/pr/1", "token-of-reader")

    ours = [(seen.method, seen.path.lower(), seen.headers["authorization"]) for seen in hub.seen]
    assert metadata.commit_hash == info.sha == commit
    assert ours[:2] == theirs


# --- Tokens -------------------------------------------------------------------------------------------------


def test_the_token_of_each_request_is_asked(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    """Also for what is in the cache: whoever fetched it first opens it for nobody else."""
    repository.readers = {"token-of-reader"}
    source = source_of(hub, tmp_path)
    get(source, NAME, "token-of-reader")

    for token in (None, "", "token-of-stranger", "token-nobody-has"):
        with pytest.raises(AdapterNotFound):
            source.resolve(NAME, token)
    assert source.resolve(NAME, "token-of-reader") == repository.refs["main"]


def test_a_gated_repository_opens_for_its_readers_only(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    """The hub describes it to everybody, which must not count as access."""
    repository.readers, repository.is_gated = {"token-of-reader"}, True
    source = source_of(hub, tmp_path)
    assert HfApi(endpoint=hub.url, token="token-of-stranger").model_info(NAME).sha

    for token in (None, "token-of-stranger"):
        with pytest.raises(AdapterNotFound):
            source.resolve(NAME, token)
    assert (get(source, NAME, "token-of-reader") / WEIGHTS).exists()


def test_missing_private_and_gated_get_the_same_words(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories["org/private"] = Repository(readers={"token-of-reader"})
    hub.repositories["org/gated"] = Repository(readers={"token-of-reader"}, is_gated=True)
    for repository in hub.repositories.values():
        repository.commit(files)
    source = source_of(hub, tmp_path)
    answers = set()

    for name in ("private", "gated", "missing", "private@no", "gated@no"):
        for token in (None, "token-of-stranger", "token-nobody-has"):
            with pytest.raises(AdapterNotFound) as refusal:
                source.resolve(f"org/{name}", token)
            answers.add(refusal.value.message.replace(f"org/{name}", "NAME"))

    assert answers == {"there is no adapter 'NAME'"}


def test_a_token_that_was_revoked_meanwhile_stops_the_download(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    repository.readers = {"token-of-reader"}
    source = source_of(hub, tmp_path)
    version = source.resolve(NAME, "token-of-reader")
    repository.readers = set()

    with pytest.raises(AdapterNotFound):
        source.fetch(NAME, version, "token-of-reader")
    assert not stored(tmp_path)


def test_the_servers_own_token_is_not_used_unless_allowed(
    hub: FakeHub, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "token-of-server")
    repository.readers = {"token-of-server"}

    with pytest.raises(AdapterNotFound):
        source_of(hub, tmp_path).resolve(NAME, None)
    assert all("authorization" not in seen.headers for seen in hub.seen)

    source = source_of(hub, tmp_path, own_token=huggingface_hub.get_token)
    assert (get(source) / WEIGHTS).exists()


def test_a_requests_token_wins_over_the_servers(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    repository.readers = {"token-of-server"}
    source = source_of(hub, tmp_path, own_token=lambda: "token-of-server")

    with pytest.raises(AdapterNotFound):
        source.resolve(NAME, "token-of-stranger")
    assert [seen.headers["authorization"] for seen in hub.seen] == ["Bearer token-of-stranger"]


def test_tokens_go_to_the_hub_and_nowhere_else(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    repository.readers = {"token-of-reader"}

    get(source_of(hub, tmp_path), NAME, "token-of-reader")

    assert hub.cdn.seen
    assert all("authorization" not in seen.headers for seen in hub.cdn.seen)
    assert all(seen.headers["authorization"] == "Bearer token-of-reader" for seen in hub.seen)


@pytest.mark.parametrize("token", ["a\r\nX-Evil: 1", "a b", "é", "x" * 2000, "\0"])
def test_what_can_be_no_token_is_refused_without_being_repeated(
    hub: FakeHub, repository: Repository, tmp_path: Path, token: str
) -> None:
    with pytest.raises(AdapterInvalid) as refusal:
        source_of(hub, tmp_path).resolve(NAME, token)

    assert token not in refusal.value.message
    assert not hub.seen


SECRETS = ("token-of-reader", "token-of-stranger", SIGNATURE)


def test_tokens_are_in_no_log_no_error_no_name_and_no_repr(
    hub: FakeHub,
    repository: Repository,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With every logger as talkative as it can be, but for the HTTP client's line with each address."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.WARNING, "httpx2")
    repository.readers = {"token-of-reader"}
    errors = []

    def fails(location: str, token: str, **options: float) -> None:
        source = source_of(hub, tmp_path / str(len(errors)), **options)  # type: ignore[arg-type]
        with pytest.raises(AdapterError) as refusal:
            get(source, location, token)
        errors.append(refusal.value)

    fails(NAME, "token-of-stranger")
    fails("org/missing", "token-of-reader")
    fails(NAME, "token-of-reader", max_bytes=10)
    for kind in ("cut", "more", "longer", "short", "garble", "encoded", "range", "status"):
        hub.cdn.faults = [Fault("/repos/", kind, times=3)]  # type: ignore[arg-type]
        fails(NAME, "token-of-reader")
    hub.faults = [Fault("/api/", "cut", times=3)]
    fails(NAME, "token-of-reader")
    hub.cdn.faults = [Fault("/repos/", "drip")]
    fails(NAME, "token-of-reader", seconds=0.3)
    hub.cdn.faults.clear()  # on a busy machine the time was up before it got there
    source = source_of(hub, tmp_path)
    get(source, NAME, "token-of-reader")

    said = [caplog.text, *capfd.readouterr(), repr(source), str(vars(source))]
    for error in errors:
        said += ["".join(traceback.format_exception(error)), repr(error), repr(vars(error))]
        chained: BaseException | None = error
        while chained is not None:
            assert not hasattr(chained, "request"), "an error that holds the request holds its headers"
            chained = chained.__cause__ or chained.__context__
    said += [str(path) for path in tmp_path.rglob("*")]
    said += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [secret for secret in SECRETS for text in said if secret in text]


def test_nothing_is_printed_and_nobody_else_is_asked(
    hub: FakeHub,
    repository: Repository,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    get(source_of(hub, tmp_path), NAME, "token-of-reader")

    assert capfd.readouterr() == ("", "")
    assert {seen.headers["user-agent"] for seen in hub.seen + hub.cdn.seen} == {"motet"}
    allowed = ("/org/adapter/resolve/", "/api/models/org/adapter/")
    assert all(seen.path.startswith(allowed) for seen in hub.seen)


def test_cookies_are_not_carried_from_one_client_to_the_next(
    hub: FakeHub, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = hub.answer
    monkeypatch.setattr(
        hub,
        "answer",
        lambda request, body: (lambda s, h, b: (s, h | {"Set-Cookie": "session=1"}, b))(
            *plain(request, body)
        ),
    )
    source = source_of(hub, tmp_path)

    get(source)
    source.resolve(NAME, None)

    assert len(hub.seen) > 2
    assert all("cookie" not in seen.headers for seen in hub.seen)


# --- Limits -------------------------------------------------------------------------------------------------


def test_sizes_are_checked_before_a_byte_is_downloaded(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path
) -> None:
    total = len(files[CONFIG]) + len(files[WEIGHTS])

    with pytest.raises(AdapterTooLarge, match=str(total)):
        get(source_of(hub, tmp_path, max_bytes=total - 1))
    assert not hub.cdn.seen
    assert not any("/resolve/" in path for path in hub.paths())

    assert get(source_of(hub, tmp_path, max_bytes=total))


def test_repositories_of_too_many_files_are_refused(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    with pytest.raises(AdapterTooLarge, match="3 files"):
        get(source_of(hub, tmp_path, max_files=3))
    assert get(source_of(hub, tmp_path, max_files=4))


def test_pickles_are_refused_by_name_before_a_byte_is_downloaded(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path
) -> None:
    repository.commit({CONFIG: files[CONFIG], "adapter_model.bin": b"\x80\x04."})

    with pytest.raises(AdapterInvalid, match=r"adapter_model\.bin"):
        get(source_of(hub, tmp_path))
    assert not any("/resolve/" in path for path in hub.paths())


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_repository_without_an_adapter_is_refused(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path, missing: str
) -> None:
    repository.commit({name: content for name, content in files.items() if name != missing})

    with pytest.raises(AdapterInvalid, match=missing):
        get(source_of(hub, tmp_path))


@pytest.mark.parametrize("lie", [-1, 1])
def test_a_hub_that_lies_about_a_size_is_not_believed(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path, lie: int
) -> None:
    repository.sizes[WEIGHTS] = len(files[WEIGHTS]) + lie

    with pytest.raises(AdapterUnavailable):
        get(source_of(hub, tmp_path))
    assert not stored(tmp_path)


@pytest.mark.parametrize("kind", ["more", "longer", "short", "garble", "encoded", "range"])
def test_bytes_that_are_not_the_announced_ones_are_not_kept(
    hub: FakeHub, repository: Repository, tmp_path: Path, kind: str
) -> None:
    hub.cdn.faults = [Fault("/repos/", kind, times=3)]  # type: ignore[arg-type]
    hub.cdn.knows_ranges = False
    source = source_of(hub, tmp_path)

    with pytest.raises(AdapterUnavailable):
        get(source)
    assert not stored(tmp_path)
    hub.cdn.faults.clear()
    assert get(source)


def test_small_files_are_checked_by_their_name_in_git(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    hub.faults = [Fault(f"/{CONFIG}", "garble")]

    with pytest.raises(AdapterUnavailable):
        get(source_of(hub, tmp_path))


def test_a_server_that_never_stops_sending_is_cut_off(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path
) -> None:
    """The body that describes the repository has no size in advance."""
    repository.commit({**files, "x" * 2**24: b""})

    with pytest.raises(AdapterUnavailable):
        get(source_of(hub, tmp_path))


# --- Failures -----------------------------------------------------------------------------------------------


def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.cdn.faults = [Fault("/repos/", "cut", at=100), Fault("/repos/", "cut", at=50)]

    folder = get(source_of(hub, tmp_path))

    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert [seen.headers.get("range") for seen in hub.cdn.seen] == [None, "bytes=100-", "bytes=150-"]


def test_a_server_without_ranges_sends_all_of_it_again(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.cdn.knows_ranges = False
    hub.cdn.faults = [Fault("/repos/", "cut", at=100)]

    assert (get(source_of(hub, tmp_path)) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_hiccups_are_ridden_out_and_no_more(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    hub.faults = [Fault("/api/", "status", times=2)]
    source = source_of(hub, tmp_path)
    assert get(source)
    assert hub.waits == [0.25, 1.0]

    hub.faults = [Fault("/api/", "status", times=3, status=500)]
    with pytest.raises(AdapterUnavailable) as refusal:
        get(source_of(hub, tmp_path / "other"))
    assert refusal.value.retry_after_s > 0


def test_a_busy_hub_says_when_to_come_back(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    source = source_of(hub, tmp_path)
    version = source.resolve(NAME, None)
    for said, told in (("7", 7), ("86400", 60), ("soon", 10)):
        hub.faults = [Fault("/api/", "status", status=429, headers={"Retry-After": said})]
        with pytest.raises(AdapterUnavailable) as refusal:
            source.fetch(NAME, version, None)
        assert refusal.value.retry_after_s == told


def test_a_hub_that_is_not_there_is_unavailable(hub: FakeHub, tmp_path: Path) -> None:
    gone = FakeHub(hub.cdn)
    with gone.running():
        pass
    source = source_of(gone, tmp_path)

    with pytest.raises(AdapterUnavailable):
        source.resolve(NAME, None)
    source.close()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"siblings": 1}', b'{"siblings": [{}]}', b"[" * 100_000]
)
def test_answers_that_make_no_sense_are_the_hubs_fault(
    hub: FakeHub, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    source = source_of(hub, tmp_path)
    version = source.resolve(NAME, None)
    monkeypatch.setattr(hub, "answer", lambda request, _: (200, {}, body))

    with pytest.raises(AdapterUnavailable):
        source.fetch(NAME, version, None)
    with pytest.raises(AdapterUnavailable):
        source.resolve(NAME, None)


@pytest.mark.parametrize("commit", ["", "main", "../../x", "A" * 40, "a" * 41])
def test_what_is_no_commit_is_no_version(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    monkeypatch.setattr(hub, "answer", lambda request, _: (200, {"X-Repo-Commit": commit}, b""))

    with pytest.raises(AdapterUnavailable):
        source_of(hub, tmp_path).resolve(NAME, None)


@pytest.mark.parametrize("kind", ["drip", "stall"])
def test_a_slow_server_is_left_when_the_time_is_up(
    hub: FakeHub, repository: Repository, tmp_path: Path, kind: str
) -> None:
    hub.cdn.faults = [Fault("/repos/", kind, times=3)]  # type: ignore[arg-type]
    source = source_of(hub, tmp_path, seconds=0.5)
    let_time_begin_when_stalled(source, hub.cdn)

    with pytest.raises(AdapterUnavailable, match=r"longer than 0\.5 seconds"):
        get(source)
    assert hub.cdn.stalled.is_set()
    assert not stored(tmp_path)


def test_a_question_that_is_not_answered_is_given_up(
    hub: FakeHub, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.sources.hub._ANSWER_S", 0.3)
    hub.faults = [Fault("/resolve/", "silence", method="HEAD", times=3)]
    source = source_of(hub, tmp_path)
    let_time_begin_when_stalled(source, hub)

    with pytest.raises(AdapterUnavailable, match=r"longer than 0\.3 seconds"):
        source.resolve(NAME, None)
    assert hub.stalled.is_set()


def test_closing_ends_a_download(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    """Which would otherwise hold up the end of the server for minutes."""
    hub.cdn.faults = [Fault("/repos/", "drip", times=3)]
    source = source_of(hub, tmp_path)
    errors: list[AdapterUnavailable] = []

    def ask() -> None:
        try:
            get(source)
        except AdapterUnavailable as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert hub.cdn.stalled.wait(LIMIT_S)
    source.close()
    asking.join()

    assert [error.message for error in errors] == ["the server is shutting down"]
    assert not stored(tmp_path)


def test_an_endless_chain_of_redirects_ends(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    hub.moved["org/ring"] = "org/ring"

    with pytest.raises(AdapterUnavailable):
        source_of(hub, tmp_path).resolve("org/ring", None)
    assert len(hub.seen) < 30


# --- Several at once, and crashes ---------------------------------------------------------------------------


def test_two_servers_that_share_a_cache_download_once(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    hub.cdn.faults = [Fault("/repos/", "stall")]
    first, second = source_of(hub, tmp_path), source_of(hub, tmp_path)
    version = first.resolve(NAME, None)

    found = fetch_beside_a_stalled_one(first, second, hub.cdn, lambda one: one.fetch(NAME, version, None))

    assert len(set(found)) == 1
    assert len(found) == 2
    # the stalled answer ended early and was taken up again; the second server asked for nothing
    assert len(hub.cdn.seen) == 2


CRASHING = """
import sys
from pathlib import Path
from adapters.sources.cache import VersionCache
from adapters.sources.hub import HubSource
from adapters.sources.limits import FetchLimits

url, folder, version = sys.argv[1:]
source = HubSource(VersionCache(Path(folder), 10**9), FetchLimits(10**9, 100, 60), endpoint=url)
source.fetch("org/adapter", version, None)
"""


def test_a_server_that_is_killed_while_it_downloads_leaves_nothing_that_counts(
    hub: FakeHub, repository: Repository, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.cdn.faults = [Fault("/repos/", "stall", at=500)]
    source = source_of(hub, tmp_path)
    version = source.resolve(NAME, None)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", CRASHING, hub.url, str(tmp_path / "cache"), version], cwd=root
    )
    try:
        assert hub.cdn.stalled.wait(LIMIT_S)
    finally:
        process.kill()
        process.wait()
    assert any(path.parent.parent.name == "partial" for path in stored(tmp_path))
    assert not any((tmp_path / "cache" / "versions").iterdir())

    folder = source.fetch(NAME, version, None)

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert {path.parent for path in stored(tmp_path)} == {folder}


# --- Offline ------------------------------------------------------------------------------------------------


def test_offline_serves_what_was_fetched_and_asks_nobody(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    """To whoever names it: without the hub nobody can tell who may read."""
    repository.readers = {"token-of-reader"}
    repository.refs["v1"] = repository.refs["main"]
    known = get(source_of(hub, tmp_path), f"{NAME}@v1", "token-of-reader")
    hub.seen.clear()
    source = source_of(hub, tmp_path, is_offline=True)

    assert get(source, f"{NAME}@v1") == known
    assert get(source, f"{NAME}@{repository.refs['v1']}", "token-of-stranger") == known
    for other in (NAME, f"{NAME}@v2", "org/other"):
        with pytest.raises(AdapterNotFound):
            get(source, other)
    with pytest.raises(AdapterNotFound):
        get(source, f"{NAME}@{sha_of('other')}")
    assert not hub.seen


def test_offline_serves_what_the_hubs_own_tools_downloaded(
    hub: FakeHub,
    repository: Repository,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real files in a folder of our own, where the library keeps links."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    huggingface_hub.snapshot_download(NAME, endpoint=hub.url, token=False, cache_dir=tmp_path / "hf")
    hub.seen.clear()
    source = source_of(hub, tmp_path, is_offline=True, library_cache=tmp_path / "hf")

    folder = get(source)

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert not hub.seen
    with pytest.raises(AdapterTooLarge):
        get(source_of(hub, tmp_path / "b", is_offline=True, library_cache=tmp_path / "hf", max_bytes=10))


def test_offline_follows_no_link_out_of_the_librarys_cache(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    snapshot = tmp_path / "hf" / "models--org--adapter" / "snapshots" / sha_of("x")
    snapshot.mkdir(parents=True)
    (snapshot / CONFIG).write_bytes(files[CONFIG])
    (tmp_path / "secret").write_bytes(files[WEIGHTS])
    (snapshot / WEIGHTS).symlink_to(tmp_path / "secret")
    source = source_of(hub, tmp_path, is_offline=True, library_cache=tmp_path / "hf")

    with pytest.raises(AdapterInvalid):
        get(source, f"{NAME}@{sha_of('x')}")


# --- The folder ---------------------------------------------------------------------------------------------


def test_what_is_fetched_is_checked_like_a_local_folder(
    hub: FakeHub, repository: Repository, tmp_path: Path
) -> None:
    source = source_of(hub, tmp_path)
    folder = get(source)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/etc/hostname")

    with pytest.raises(AdapterInvalid, match="link"):
        get(source)


def test_the_digest_of_the_hub_is_that_of_the_bytes(files: dict[str, bytes], hub: FakeHub) -> None:
    """A check of the fake: git and LFS name things so."""
    blob = subprocess.run(
        ["git", "hash-object", "--stdin"], input=files[CONFIG], capture_output=True, check=True
    ).stdout.decode()
    repository = hub.repositories[NAME] = Repository()
    sha = repository.commit(files)

    info = HfApi(endpoint=hub.url, token=False).model_info(NAME, revision=sha, files_metadata=True)

    siblings = {one.rfilename: one for one in info.siblings or []}
    assert siblings[CONFIG].blob_id == blob.strip()
    large = siblings[WEIGHTS].lfs
    assert large is not None
    assert large.sha256 == hashlib.sha256(files[WEIGHTS]).hexdigest()
