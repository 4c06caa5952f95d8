"""The S3 source against moto's real server, behind a proxy that does what networks and bad servers do."""

import logging
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.loaders import create_loader

from adapters.errors import AdapterError, AdapterInvalid, AdapterNotFound, AdapterTooLarge, AdapterUnavailable
from adapters.sources.cache import VersionCache
from adapters.sources.limits import FetchLimits
from adapters.sources.s3 import S3Source
from tests.adapters.faulty_http import LIMIT_S, Fault, FaultyProxy, Seen
from tests.adapters.fetching import (
    CONFIG,
    MIB,
    WEIGHTS,
    fetch_beside_a_stalled_one,
    let_time_begin_when_stalled,
    stored,
)
from tests.adapters.s3_server import running_s3

BUCKET = "adapters"
HERE = f"s3://{BUCKET}/team/one"
KEY_ID, SECRET, SESSION = "AKIAOFTHETESTS", "secret-key-of-the-tests", "session-token-of-the-tests"


@pytest.fixture(scope="module", autouse=True)
def _descriptions() -> Iterator[None]:
    """botocore's descriptions of services are read once here, and not by each client again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.session.create_loader", cache(create_loader))
        yield


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with running_s3() as url:
        yield url


@pytest.fixture(scope="module")
def owner(s3: str) -> Iterator[Any]:
    """A client of the one who owns the bucket."""
    session = botocore.session.Session()
    session.set_credentials(KEY_ID, SECRET, SESSION)
    made = session.create_client("s3", endpoint_url=s3, region_name="us-east-1")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))


@pytest.fixture
def proxy(s3: str, _credentials: None) -> Iterator[FaultyProxy]:
    server = FaultyProxy(s3)
    with server.running():
        yield server


@pytest.fixture
def client(owner: Any) -> Iterator[Any]:
    """Of the one who owns the bucket, which is empty before each test."""
    owner.create_bucket(Bucket=BUCKET)
    yield owner
    for entry in owner.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        owner.delete_object(Bucket=BUCKET, Key=entry["Key"])  # no XML could name all of them


@pytest.fixture
def adapter(client: Any, files: dict[str, bytes]) -> dict[str, bytes]:
    """s3://adapters/team/one, with things beside it that are not its own."""
    put(client, "team/one/", b"")
    put(client, "team/one/README.md", b"# hello")
    put(client, "team/one/checkpoint-1/optimizer.pt", b"\x80")
    put(client, "team/one-more/adapter_config.json", b"{}")
    for name, content in files.items():
        put(client, f"team/one/{name}", content)
    return files


def put(client: Any, key: str, content: bytes) -> None:
    client.put_object(Bucket=BUCKET, Key=key, Body=content)


def source_of(
    proxy: FaultyProxy,
    folder: Path,
    *,
    roots: tuple[str, ...] = (BUCKET,),
    max_bytes: int = MIB,
    max_files: int = 100,
    seconds: float = LIMIT_S,
    capacity: int = 16 * MIB,
    host: str = "127.0.0.1",
) -> S3Source:
    limits = FetchLimits(max_bytes=max_bytes, max_files=max_files, seconds=seconds)
    cache = VersionCache(folder / "cache", capacity)
    source = S3Source(
        cache, limits, roots, endpoint_url=f"http://{host}:{proxy.port}", wait=proxy.waits.append
    )
    proxy.clients.append(source)
    return source


def get(source: S3Source, location: str = HERE) -> Path:
    return source.fetch(location, source.resolve(location, None), None)


def is_file(seen: Seen) -> bool:
    """Whether this asks for an object's bytes."""
    return seen.method == "GET" and "X-Amz-Signature" in seen.path


# --- Locations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location", ["s3://bucket", "s3://a-b.c/x", "s3://bucket/a/b/", "s3://bucket/ä b+%2F"]
)
def test_locations_in_s3(proxy: FaultyProxy, tmp_path: Path, location: str) -> None:
    assert source_of(proxy, tmp_path).accepts(location)


@pytest.mark.parametrize(
    "location",
    [
        "",
        "s3://",
        "s3:///x",
        "s3:/adapters/x",
        "S3://adapters/x",
        "https://adapters/x",
        "org/name",
        "s3://Adapters/x",
        "s3://ad/x",
        "s3://adapters/../x",
        "s3://adapters/a/../../b",
        "s3://adapters/./x",
        "s3://adapters//x",
        "s3://adapters/a//b",
        "s3://adapters/a\\b",
        "s3://adapters/a\nb",
        "s3://adapters/a\0b",
        "s3://adapters/" + "x/" * 600,
        "s3://adapters:80/x",
        "s3://user@adapters/x",
    ],
)
def test_other_texts_are_refused_before_anybody_is_asked(
    proxy: FaultyProxy, tmp_path: Path, location: str
) -> None:
    source = source_of(proxy, tmp_path)

    assert not source.accepts(location)
    with pytest.raises(AdapterInvalid):
        source.resolve(location, None)
    with pytest.raises(AdapterInvalid):
        source.fetch(location, "0" * 32, None)
    assert not proxy.seen


def test_only_named_buckets_and_prefixes_are_read(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    source = source_of(proxy, tmp_path, roots=("other", f"{BUCKET}/team", "s3://third/a/b/"))
    answers = set()

    for location in (f"s3://{BUCKET}", f"s3://{BUCKET}/teamster/x", "s3://third/a", "s3://missing/x"):
        with pytest.raises(AdapterInvalid) as refusal:
            source.resolve(location, None)
        answers.add(refusal.value.message.replace(location, ""))
    assert not proxy.seen
    assert len(answers) == 1
    assert get(source)


@pytest.mark.parametrize("root", ["", "Bucket", "a", "bucket/..", "https://bucket"])
def test_roots_that_are_none_are_refused_at_once(proxy: FaultyProxy, tmp_path: Path, root: str) -> None:
    with pytest.raises(ValueError, match="bucket"):
        source_of(proxy, tmp_path, roots=(root,))


def test_no_bucket_is_open_by_default(proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="outside"):
        source_of(proxy, tmp_path, roots=()).resolve(HERE, None)


def test_tokens_of_requests_are_refused_by_name(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    source = source_of(proxy, tmp_path)

    with pytest.raises(AdapterInvalid, match="api_token") as refusal:
        source.resolve(HERE, "token-of-somebody")
    assert "token-of-somebody" not in refusal.value.message
    assert not proxy.seen


# --- Reading ------------------------------------------------------------------------------------------------


def test_an_adapter_is_fetched_with_its_files_and_no_others(
    proxy: FaultyProxy, adapter: dict[str, bytes], client: Any, tmp_path: Path
) -> None:
    put(client, "team/one/chat_template.jinja", b"{{ messages }}")

    folder = get(source_of(proxy, tmp_path))

    expected = adapter | {"chat_template.jinja": b"{{ messages }}"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    asked = [seen for seen in proxy.seen if is_file(seen)]
    assert len(asked) == 3
    assert all("SignedHeaders=host%3Bif-match&" in seen.path for seen in asked)


def test_an_adapter_may_fill_a_whole_bucket(
    proxy: FaultyProxy, client: Any, files: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in files.items():
        put(client, name, content)

    assert (get(source_of(proxy, tmp_path), f"s3://{BUCKET}") / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_odd_prefixes_are_read_like_others(
    proxy: FaultyProxy, client: Any, files: dict[str, bytes], tmp_path: Path
) -> None:
    prefix = "ä ö/100%2F+&=?#"
    for name, content in files.items():
        put(client, f"{prefix}/{name}", content)

    folder = get(source_of(proxy, tmp_path), f"s3://{BUCKET}/{prefix}")

    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_version_is_the_content_and_is_downloaded_once(
    proxy: FaultyProxy, adapter: dict[str, bytes], client: Any, tmp_path: Path
) -> None:
    source = source_of(proxy, tmp_path)
    version = source.resolve(HERE, None)
    first = source.fetch(HERE, version, None)
    downloads = len([seen for seen in proxy.seen if is_file(seen)])
    put(client, f"team/one/{CONFIG}", adapter[CONFIG])  # the same again
    put(client, "team/one/README.md", b"# other")

    assert source.resolve(HERE, None) == version
    assert get(source) == get(source_of(proxy, tmp_path)) == first
    assert len([seen for seen in proxy.seen if is_file(seen)]) == downloads == 2


def test_changed_objects_are_a_new_version_and_the_old_one_stays(
    proxy: FaultyProxy, adapter: dict[str, bytes], client: Any, tmp_path: Path
) -> None:
    source = source_of(proxy, tmp_path)
    old = get(source)
    put(client, "team/one/added_tokens.json", b"new")

    new = get(source)

    assert new != old
    assert (new / "added_tokens.json").read_bytes() == b"new"
    assert not (old / "added_tokens.json").exists()


def test_listings_of_several_pages_are_read_to_their_end(
    proxy: FaultyProxy,
    adapter: dict[str, bytes],
    client: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapters.sources.s3._PAGE", 2)
    for number in range(5):
        put(client, f"team/one/aaa-{number}.txt", b"first in the alphabet")

    assert (get(source_of(proxy, tmp_path)) / WEIGHTS).read_bytes() == adapter[WEIGHTS]
    assert any("continuation-token" in path for path in proxy.paths())


def test_missing_buckets_and_prefixes_are_no_adapters(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    source = source_of(proxy, tmp_path, roots=(BUCKET, "no-such-bucket"))

    for location in (f"s3://{BUCKET}/team/two", "s3://no-such-bucket/x"):
        with pytest.raises(AdapterNotFound, match="there is no adapter"):
            source.resolve(location, None)


def test_what_we_may_not_read_is_no_adapter_and_the_operator_hears_why(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults = [Fault("list-type", "status", status=403)]

    with pytest.raises(AdapterNotFound, match="there is no adapter"):
        source_of(proxy, tmp_path).resolve(HERE, None)
    assert "403" in caplog.text


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_folder_without_an_adapter_is_refused(
    proxy: FaultyProxy, adapter: dict[str, bytes], client: Any, tmp_path: Path, missing: str
) -> None:
    client.delete_object(Bucket=BUCKET, Key=f"team/one/{missing}")

    with pytest.raises(AdapterInvalid, match=missing):
        source_of(proxy, tmp_path).resolve(HERE, None)


def test_pickles_are_refused_by_name(
    proxy: FaultyProxy, adapter: dict[str, bytes], client: Any, tmp_path: Path
) -> None:
    client.delete_object(Bucket=BUCKET, Key=f"team/one/{WEIGHTS}")
    put(client, "team/one/adapter_model.bin", b"\x80\x04.")

    with pytest.raises(AdapterInvalid, match=r"adapter_model\.bin"):
        source_of(proxy, tmp_path).resolve(HERE, None)


@pytest.mark.parametrize("name", ["a\\b", "..", "a\x01b"])
def test_objects_with_odd_names_are_refused(
    proxy: FaultyProxy, adapter: dict[str, bytes], client: Any, tmp_path: Path, name: str
) -> None:
    put(client, f"team/one/{name}", b"")

    with pytest.raises(AdapterInvalid, match="not allowed"):
        source_of(proxy, tmp_path).resolve(HERE, None)


def test_a_server_that_lists_other_keys_than_asked_for_is_not_followed(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = proxy.answer

    def lying(request: Seen, body: bytes) -> tuple[int, dict[str, str], bytes]:
        status, headers, content = plain(request, body)
        content = content.replace(b"<Key>team/one/README.md", b"<Key>/etc/passwd")
        return status, headers | {"Content-Length": str(len(content))}, content

    monkeypatch.setattr(proxy, "answer", lying)

    with pytest.raises(AdapterInvalid, match="not allowed"):
        source_of(proxy, tmp_path).resolve(HERE, None)


# --- Limits -------------------------------------------------------------------------------------------------


def test_sizes_are_checked_before_a_byte_is_downloaded(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    total = sum(len(content) for content in adapter.values())

    with pytest.raises(AdapterTooLarge, match=str(total)):
        get(source_of(proxy, tmp_path, max_bytes=total - 1))
    assert not any(is_file(seen) for seen in proxy.seen)
    assert get(source_of(proxy, tmp_path, max_bytes=total))


def test_folders_of_too_many_objects_are_not_listed_to_their_end(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.sources.s3._PAGE", 1)

    with pytest.raises(AdapterTooLarge, match="2 files"):
        source_of(proxy, tmp_path, max_files=2).resolve(HERE, None)
    assert len(proxy.paths()) == 3
    assert source_of(proxy, tmp_path, max_files=5).resolve(HERE, None)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("more", "more bytes"),
        ("longer", "announced with another size"),
        ("encoded", "encoded"),
        ("range", "another range"),
        ("cut", "gave up after 3 attempts"),
    ],
)
def test_bytes_that_are_not_the_listed_ones_are_not_kept(
    proxy: FaultyProxy,
    adapter: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    said: str,
) -> None:
    proxy.faults = [Fault(f"{WEIGHTS}?", kind, times=3)]  # type: ignore[arg-type]
    source = source_of(proxy, tmp_path)

    with pytest.raises(AdapterUnavailable):
        get(source)
    assert said in caplog.text
    assert not stored(tmp_path)
    proxy.faults.clear()
    assert get(source)


# --- Changes under way --------------------------------------------------------------------------------------


def test_a_version_that_is_gone_is_not_fetched(
    proxy: FaultyProxy, adapter: dict[str, bytes], client: Any, tmp_path: Path
) -> None:
    source = source_of(proxy, tmp_path)
    version = source.resolve(HERE, None)
    put(client, f"team/one/{CONFIG}", b"{}")

    with pytest.raises(AdapterUnavailable, match="changed"):
        source.fetch(HERE, version, None)
    assert not any(is_file(seen) for seen in proxy.seen)


@pytest.mark.parametrize("is_deleted", [False, True], ids=["replaced", "deleted"])
def test_objects_that_change_between_listing_and_reading_are_an_error(
    proxy: FaultyProxy, adapter: dict[str, bytes], client: Any, tmp_path: Path, is_deleted: bool
) -> None:
    def change(seen: Seen) -> bool:
        """When the first file is asked for, the second one changes."""
        if not is_file(seen):
            return False
        if is_deleted:
            client.delete_object(Bucket=BUCKET, Key=f"team/one/{WEIGHTS}")
        else:
            put(client, f"team/one/{WEIGHTS}", bytes(len(adapter[WEIGHTS])))
        return True

    proxy.before = [change]

    with pytest.raises(AdapterUnavailable, match="changed"):
        get(source_of(proxy, tmp_path))
    assert not proxy.before
    assert not stored(tmp_path)


def test_an_object_that_changes_while_its_connection_is_broken_is_an_error(
    proxy: FaultyProxy, adapter: dict[str, bytes], client: Any, tmp_path: Path
) -> None:
    """Taking up again must not glue two versions together."""
    proxy.faults = [Fault(f"{WEIGHTS}?", "cut", at=100)]

    def change(seen: Seen) -> bool:
        if "range" not in seen.headers:
            return False
        put(client, f"team/one/{WEIGHTS}", bytes(len(adapter[WEIGHTS])))
        return True

    proxy.before = [change]

    with pytest.raises(AdapterUnavailable, match="changed"):
        get(source_of(proxy, tmp_path))
    assert not proxy.before
    assert not stored(tmp_path)


# --- Failures -----------------------------------------------------------------------------------------------


def test_a_broken_connection_is_taken_up_where_it_broke(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    proxy.faults = [Fault(f"{WEIGHTS}?", "cut", at=100), Fault(f"{WEIGHTS}?", "cut", at=50)]

    assert (get(source_of(proxy, tmp_path)) / WEIGHTS).read_bytes() == adapter[WEIGHTS]
    ranges = [seen.headers.get("range") for seen in proxy.seen if f"{WEIGHTS}?" in seen.path]
    assert ranges == [None, "bytes=100-", "bytes=150-"]


def test_busy_servers_are_asked_again_and_then_left(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    proxy.faults = [Fault(f"{WEIGHTS}?", "status", times=2)]
    source = source_of(proxy, tmp_path)
    assert get(source)
    assert proxy.waits == [0.25, 1.0]

    proxy.faults = [Fault(f"{WEIGHTS}?", "status", status=500, times=3)]
    with pytest.raises(AdapterUnavailable) as refusal:
        get(source_of(proxy, tmp_path / "other"))
    assert refusal.value.retry_after_s > 0


def test_a_refusal_in_the_middle_is_the_operators_matter(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults = [Fault(f"{WEIGHTS}?", "status", status=403)]

    with pytest.raises(AdapterUnavailable):
        get(source_of(proxy, tmp_path))
    assert "status 403" in caplog.text


@pytest.mark.parametrize("kind", ["drip", "stall"])
def test_a_slow_server_is_left_when_the_time_is_up(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    source = source_of(proxy, tmp_path, seconds=0.5)
    let_time_begin_when_stalled(source, proxy)
    version = source.resolve(HERE, None)
    proxy.faults = [Fault(f"{WEIGHTS}?", kind, times=3)]  # type: ignore[arg-type]

    with pytest.raises(AdapterUnavailable, match=r"longer than 0\.5 seconds"):
        source.fetch(HERE, version, None)
    assert proxy.stalled.is_set()
    assert not stored(tmp_path)


def test_a_listing_that_does_not_come_is_given_up(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.sources.s3._SILENCE_S", 0.3)
    proxy.faults = [Fault("list-type", "silence", times=3)]

    with pytest.raises(AdapterUnavailable):
        source_of(proxy, tmp_path).resolve(HERE, None)
    assert proxy.stalled.is_set()


def test_no_credentials_are_the_operators_matter(
    proxy: FaultyProxy,
    adapter: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)

    with pytest.raises(AdapterUnavailable):
        source_of(proxy, tmp_path).resolve(HERE, None)
    assert "NoCredentialsError" in caplog.text
    assert not proxy.seen


def test_credentials_come_from_the_usual_files(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    (tmp_path / "no-credentials").write_text(
        "[other]\naws_access_key_id = AKIAOFTHEFILE\naws_secret_access_key = s\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "other")

    assert get(source_of(proxy, tmp_path))
    assert "AKIAOFTHEFILE/" in proxy.seen[0].headers["authorization"]


def test_services_of_others_get_the_bucket_in_the_path(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    """An address of numbers would leave no choice, a name does."""
    get(source_of(proxy, tmp_path, host="localhost"))

    assert all(seen.path.startswith(f"/{BUCKET}") for seen in proxy.seen)
    assert {seen.headers["host"] for seen in proxy.seen} == {f"localhost:{proxy.port}"}


# --- Secrets ------------------------------------------------------------------------------------------------


def test_credentials_and_signatures_are_in_no_log_no_error_and_no_name(
    proxy: FaultyProxy,
    adapter: dict[str, bytes],
    client: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """At the level that the server lets libraries log at."""
    caplog.set_level(logging.WARNING)
    caplog.set_level(logging.DEBUG, "adapters")
    errors = []

    def fails(location: str = HERE, **options: float) -> None:
        source = source_of(proxy, tmp_path / str(len(errors)), **options)  # type: ignore[arg-type]
        with pytest.raises(AdapterError) as refusal:
            get(source, location)
        errors.append(refusal.value)

    fails(f"s3://{BUCKET}/nothing")
    fails(max_bytes=10)
    for kind in ("cut", "more", "longer", "encoded", "range", "status"):
        proxy.faults = [Fault(f"{WEIGHTS}?", kind, times=3)]  # type: ignore[arg-type]
        fails()
    proxy.faults = [Fault(f"{WEIGHTS}?", "status", status=403)]
    fails()
    proxy.faults = [Fault("list-type", "status", status=403)]
    fails()
    source = source_of(proxy, tmp_path)
    get(source)
    signatures = [seen.path.partition("X-Amz-Signature=")[2][:64] for seen in proxy.seen if is_file(seen)]

    said = [caplog.text, *capfd.readouterr(), repr(source), str(vars(source))]
    said += ["".join(traceback.format_exception(error)) + repr(vars(error)) for error in errors]
    said += [str(path) for path in tmp_path.rglob("*")]
    said += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    secrets = (SECRET, SESSION, KEY_ID, *signatures)
    assert all(len(signature) == 64 for signature in signatures)
    assert not [secret for secret in secrets for text in said if secret in text]


# --- Several at once ----------------------------------------------------------------------------------------


def test_two_servers_that_share_a_cache_download_once(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    proxy.faults = [Fault(f"{WEIGHTS}?", "stall")]
    first, second = source_of(proxy, tmp_path), source_of(proxy, tmp_path)
    version = first.resolve(HERE, None)

    found = fetch_beside_a_stalled_one(first, second, proxy, lambda one: one.fetch(HERE, version, None))

    assert len(found) == 2
    assert len(set(found)) == 1
    assert len([seen for seen in proxy.seen if f"{WEIGHTS}?" in seen.path]) == 2  # one was taken up again


def test_what_is_fetched_is_checked_like_a_local_folder(
    proxy: FaultyProxy, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    source = source_of(proxy, tmp_path)
    folder = get(source)
    (folder / "tokenizer.json").symlink_to("/etc/hostname")

    with pytest.raises(AdapterInvalid, match="link"):
        get(source)
