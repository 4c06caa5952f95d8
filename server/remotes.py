"""Where this server takes adapters from, made of its settings.

What a flag asks for and cannot have (a folder that is not there, a package that is not installed) ends the
start with one line that names the flag, before the model is loaded.
"""

import logging
from pathlib import Path

from adapters.sources.cache import VersionCache
from adapters.sources.limits import FetchLimits
from adapters.sources.local import LocalSource
from adapters.sources.remote import RemoteSource
from server.model.errors import ModelError
from server.settings import Settings

log = logging.getLogger(__name__)


def make_local(settings: Settings) -> LocalSource:
    """Raises ModelError."""
    for flag, folders in (
        ("--adapters-dir", (settings.adapters_dir,) if settings.adapters_dir is not None else ()),
        ("--adapter-roots", tuple(Path(root) for root in settings.adapter_roots)),
    ):
        for folder in folders:
            if "local" not in settings.adapter_sources:
                raise ModelError(f"{flag} {folder}: --adapter-sources does not have local")
            if not folder.is_dir():
                raise ModelError(f"{flag} {folder}: there is no such folder")
    return LocalSource(tuple(Path(root) for root in settings.adapter_roots), settings.adapters_dir)


def make_remotes(settings: Settings) -> dict[str, RemoteSource]:
    """The sources on other machines that `--adapter-sources` has, by name. Raises ModelError."""
    names = [name for name in settings.adapter_sources if name != "local"]
    if "s3" in names and not settings.adapter_s3_buckets:
        raise ModelError(
            "--adapter-sources s3: name the buckets that clients may read with --adapter-s3-buckets"
        )
    if "s3" not in names and settings.adapter_s3_buckets:
        raise ModelError("--adapter-s3-buckets: --adapter-sources does not have s3")
    if not names:
        return {}
    if settings.adapter_max_bytes > settings.adapter_cache_bytes:
        raise ModelError("--adapter-max-bytes: is more than --adapter-cache-bytes")
    folder = settings.cache_folder()
    try:
        cache = VersionCache(folder, settings.adapter_cache_bytes)
    except OSError as error:
        raise ModelError(f"--adapter-cache-dir {folder}: {error.strerror}") from error
    limits = FetchLimits(
        max_bytes=settings.adapter_max_bytes,
        max_files=settings.adapter_max_files,
        seconds=settings.adapter_fetch_timeout,
    )
    makers = {"hub": _make_hub, "s3": _make_s3}
    return {name: makers[name](settings, cache, limits) for name in names}


def _make_hub(settings: Settings, cache: VersionCache, limits: FetchLimits) -> RemoteSource:
    """As the hub's own tools: HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_CACHE count."""
    from huggingface_hub import constants, is_offline_mode

    from adapters.sources.hub import HubSource

    return HubSource(
        cache,
        limits,
        endpoint=constants.ENDPOINT,
        own_token=_own_token if settings.adapter_hub_own_token else None,
        is_offline=is_offline_mode(),
        library_cache=Path(constants.HF_HUB_CACHE),
    )


def _own_token() -> str | None:
    """HF_TOKEN, or what `hf auth login` left; some ways to get one ask the network."""
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception as error:
        log.warning("the hub's token of this server cannot be had: %s", type(error).__name__)
        return None


def _make_s3(settings: Settings, cache: VersionCache, limits: FetchLimits) -> RemoteSource:
    try:
        from adapters.sources.s3 import S3Source
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("botocore"):
            raise
        raise ModelError("--adapter-sources s3: needs a package: pip install 'motet[s3]'") from error
    try:
        return S3Source(cache, limits, settings.adapter_s3_buckets, endpoint_url=settings.s3_endpoint())
    except ValueError as error:
        raise ModelError(f"--adapter-s3-buckets or --adapter-s3-endpoint: {error}") from error
