"""Flags become sources; what cannot be had ends the start with one line that names the flag."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from adapters.errors import AdapterInvalid, AdapterNotFound
from adapters.sources.remote import RemoteSource
from server.model.errors import ModelError
from server.remotes import make_local, make_remotes
from server.settings import Settings, SettingsError, add_flags, read_settings
from tests.adapters.fake_hub import FakeCdn, FakeHub, Repository
from tests.adapters.making import small_folder

Make = Callable[..., Mapping[str, RemoteSource]]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "R2_ACCOUNT_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[RemoteSource] = []

    def make_them(**settings: object) -> Mapping[str, RemoteSource]:
        remotes = make_remotes(Settings(**({"adapter_cache_dir": tmp_path / "cache"} | settings)))  # type: ignore[arg-type]
        made.extend(remotes.values())
        return remotes

    yield make_them
    for source in made:
        source.close()


def flags(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return read_settings(parser.parse_args(words))


def test_by_default_nothing_is_fetched_and_no_folder_made(make: Make, tmp_path: Path) -> None:
    assert Settings().adapter_sources == ("local",)
    assert make() == {}
    assert not (tmp_path / "cache").exists()


def test_sources_are_named_in_one_word(make: Make) -> None:
    settings = flags("--adapter-sources", "local,hub,s3", "--adapter-s3-buckets", "one", "two/part")

    assert settings.adapter_sources == ("local", "hub", "s3")
    assert settings.adapter_s3_buckets == ("one", "two/part")
    assert set(make(adapter_sources="hub,s3", adapter_s3_buckets="one")) == {"hub", "s3"}


@pytest.mark.parametrize("sources", ["", "ftp", "local,ftp", "Hub"])
def test_unknown_sources_are_refused_by_the_flag(sources: str) -> None:
    with pytest.raises(SettingsError, match=r"--adapter-sources.*local,hub,s3"):
        flags("--adapter-sources", sources)


def test_sources_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTET_ADAPTER_SOURCES", "hub, s3")
    monkeypatch.setenv("MOTET_ADAPTER_S3_BUCKETS", "one,two/part")
    monkeypatch.setenv("MOTET_ADAPTER_MAX_BYTES", "1GiB")

    settings = Settings()

    assert settings.adapter_sources == ("hub", "s3")
    assert settings.adapter_s3_buckets == ("one", "two/part")
    assert settings.adapter_max_bytes == 2**30


def test_each_source_accepts_its_own_locations_only(make: Make) -> None:
    remotes = make(adapter_sources="hub,s3", adapter_s3_buckets="bucket")

    for location, expected in (("org/name", "hub"), ("s3://bucket/x", "s3")):
        assert [name for name, source in remotes.items() if source.accepts(location)] == [expected]
        assert remotes[expected].name == expected


def test_the_servers_own_token_is_lent_only_by_its_flag(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(FakeCdn())
    hub.repositories["org/private"] = repository = Repository(readers={"token-of-server"})
    commit = repository.commit({"adapter_config.json": b"{}"})
    monkeypatch.setenv("HF_TOKEN", "token-of-server")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    with hub.cdn.running(), hub.running():
        with pytest.raises(AdapterNotFound):
            make(adapter_sources="hub")["hub"].resolve("org/private", None)
        lending = make(adapter_sources="hub", adapter_hub_own_token=True)["hub"]
        assert lending.resolve("org/private", None) == commit
        with pytest.raises(AdapterNotFound):
            lending.resolve("org/private", "token-of-stranger")


def test_s3_without_buckets_does_not_start(make: Make) -> None:
    with pytest.raises(ModelError, match="--adapter-s3-buckets"):
        make(adapter_sources="s3")


def test_buckets_without_s3_do_not_start(make: Make) -> None:
    with pytest.raises(ModelError, match="--adapter-sources"):
        make(adapter_s3_buckets="bucket")


@pytest.mark.parametrize("bucket", ["Bucket", "https://bucket", "a/../b"])
def test_what_is_no_bucket_does_not_start(make: Make, bucket: str) -> None:
    with pytest.raises(ModelError, match="--adapter-s3-buckets"):
        make(adapter_sources="s3", adapter_s3_buckets=bucket)


def test_what_is_no_address_does_not_start(make: Make) -> None:
    with pytest.raises(ModelError, match="--adapter-s3-endpoint"):
        make(adapter_sources="s3", adapter_s3_buckets="bucket", adapter_s3_endpoint="minio")


def test_without_its_package_s3_says_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "botocore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "adapters.sources.s3", raising=False)
    monkeypatch.setitem(sys.modules, "botocore", None)

    with pytest.raises(ModelError, match=r"pip install 'motet\[s3\]'"):
        make(adapter_sources="s3", adapter_s3_buckets="bucket")


def test_a_cache_that_cannot_hold_one_adapter_does_not_start(make: Make) -> None:
    with pytest.raises(ModelError, match="--adapter-cache-bytes"):
        make(adapter_sources="hub", adapter_max_bytes="2GiB", adapter_cache_bytes="1GiB")


def test_a_cache_that_cannot_be_made_does_not_start(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ModelError, match="--adapter-cache-dir"):
        make(adapter_sources="hub", adapter_cache_dir=tmp_path / "file" / "cache")


def test_the_cache_is_the_users_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Settings().cache_folder() == tmp_path / "motet" / "adapters"
    assert Settings(adapter_cache_dir=tmp_path / "x").cache_folder() == tmp_path / "x"


def test_the_endpoint_of_s3_is_the_most_particular_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().s3_endpoint() is None
    monkeypatch.setenv("R2_ACCOUNT_ID", "abc")
    assert Settings().s3_endpoint() == "https://abc.r2.cloudflarestorage.com"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://a")
    assert Settings().s3_endpoint() == "http://a"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://b")
    assert Settings().s3_endpoint() == "http://b"
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://c")
    assert Settings().s3_endpoint() == "http://c"
    assert Settings(adapter_s3_endpoint="http://d").s3_endpoint() == "http://d"


def test_roots_are_open_by_path_and_not_by_name(tmp_path: Path) -> None:
    small_folder(tmp_path / "more" / "a")
    small_folder(tmp_path / "other" / "a")
    local = make_local(Settings(adapter_roots=(str(tmp_path / "more"),)))

    assert local.check_path(tmp_path / "more" / "a") == tmp_path / "more" / "a"
    assert local.find("a") is None
    with pytest.raises(AdapterInvalid, match="outside"):
        local.check_path(tmp_path / "other" / "a")


@pytest.mark.parametrize("flag", ["adapter_roots", "adapters_dir"])
def test_folders_that_are_not_there_do_not_start(tmp_path: Path, flag: str) -> None:
    folder = str(tmp_path / "missing")

    with pytest.raises(ModelError, match="--" + flag.replace("_", "-")):
        make_local(Settings(**{flag: folder}))  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", ["adapter_roots", "adapters_dir"])
def test_folders_of_a_source_that_is_not_allowed_do_not_start(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ModelError, match="does not have local"):
        make_local(Settings(**{flag: str(tmp_path)}, adapter_sources="hub"))  # type: ignore[arg-type]
