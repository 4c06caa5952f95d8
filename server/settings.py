"""The only reader of a server's flags and environment.

`Settings` is the one table: each field is a flag of `motet serve` (underscores become dashes) and an
environment variable (`MOTET_` in front, upper case; an empty one counts as none), its description is the
flag's help. A flag wins over the environment, the environment over the default. Flags that mean what they
mean in vLLM carry its names. Sizes take units: `--kv-cache-memory-bytes 2GiB`.
"""

import argparse
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ADAPTER_SOURCES = ("local", "hub", "s3")
_S3_ENDPOINTS = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def _split_words(value: object) -> object:
    """One environment variable holds several words, separated by commas or spaces."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_words)]
"""A flag that takes several words."""


class SettingsError(Exception):
    """A flag or variable has a value that cannot be used; the message names it."""


class Settings(BaseSettings):
    """Everything an operator can choose. Frozen: nothing changes after the start."""

    model_config = SettingsConfigDict(env_prefix="MOTET_", env_ignore_empty=True, frozen=True, extra="forbid")

    model: str | None = Field(None, description="folder of the base model (default: the embedded model)")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: float32 for the embedded model, else bfloat16 where the device, or our own "
        "kernels, compute in it",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    served_model_name: Words = Field(
        (), description="names of the base model; the first one is shown in answers"
    )
    max_model_len: int | None = Field(None, ge=1, description="longest prompt plus answer, in tokens")
    max_num_seqs: int = Field(256, ge=1, description="sequences in one batch at most")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="tokens computed in one step at most (default: 512 on cpu, 8192 on cuda)"
    )
    max_queued_requests: int = Field(1024, ge=1, description="requests waiting at most; beyond: 429")
    block_size: int = Field(16, ge=1, description="tokens in one KV block")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of the GPU's memory to use")
    kv_cache_memory_bytes: ByteSize | None = Field(None, description="memory of the KV cache")
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="auto: what the model computes in; int8: a byte a number, on cpu, with our own kernels",
    )
    enable_prefix_caching: bool = Field(True, description="reuse the KV of equal prompt beginnings")
    threads: int | None = Field(
        None, ge=1, description="compute threads on cpu (default: the affinity mask; 1 for a small model)"
    )
    cpu_kernels: Literal["auto", "native", "avx2", "onednn", "torch"] = Field(
        "auto",
        description="what computes on cpu; native: our own kernels, for AVX-512 with bfloat16, or AVX2",
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none",
        description="bits of weights, products in 8 bits; on cpu, with our own kernels",
    )
    seed: int | None = Field(None, ge=0, description="seed of requests that bring none (default: random)")
    lora_modules: Words = Field((), description="adapters to load at start, NAME=PATH each")
    adapters_dir: Path | None = Field(
        None,
        description="folder whose sub-folders are adapters, by name; also the root for loads by path",
    )
    adapter_roots: Words = Field((), description="more folders that clients may load adapters from, by path")
    adapter_sources: Words = Field(
        ("local",),
        description="where clients may take adapters from: any of local,hub,s3",
    )
    adapter_cache_dir: Path | None = Field(
        None,
        description="folder for adapters that were fetched (default: motet/adapters in the user's cache)",
    )
    adapter_cache_bytes: ByteSize = Field(
        ByteSize(16 * 2**30), description="disk for all adapters that were fetched (default: 16GiB)"
    )
    adapter_max_bytes: ByteSize = Field(
        ByteSize(4 * 2**30), description="largest adapter that is fetched, its files together (default: 4GiB)"
    )
    adapter_max_files: int = Field(
        1000, ge=2, description="files beside each other that a fetched adapter may lie among"
    )
    adapter_fetch_timeout: float = Field(
        300.0, gt=0, description="seconds that fetching one adapter may take"
    )
    adapter_hub_own_token: bool = Field(
        False,
        description="ask the hub with the server's HF_TOKEN for requests that bring no token: whoever reaches"
        " the server then reads what that token reads",
    )
    adapter_s3_buckets: Words = Field(
        (),
        description="buckets, or BUCKET/PREFIX, that clients may load adapters from; s3 needs at least one",
    )
    adapter_s3_endpoint: str | None = Field(
        None,
        description="address of an S3 service that is not AWS (default: S3_ENDPOINT_URL, AWS_ENDPOINT_URL_S3,"
        " AWS_ENDPOINT_URL, or the one that belongs to R2_ACCOUNT_ID)",
    )
    adapter_memory_bytes: ByteSize | None = Field(None, description="device memory of all adapters together")
    adapter_host_memory_bytes: ByteSize | None = Field(
        None, description="host memory of all adapters together"
    )
    adapter_text: Literal["own", "base"] = Field(
        "own",
        description="own: an adapter's own chat template and tokens are used, where its folder has some; "
        "base: always the base model's",
    )
    adapter_upload_bytes: ByteSize = Field(
        ByteSize(2 * 2**30), description="largest upload of an adapter; 0 takes none (default: 2GiB)"
    )
    fair_by: Literal["adapter", "key", "off"] = Field(
        "adapter", description="whose shares are equal: those of adapters, of API keys, or first come first"
    )
    fair_weights: Words = Field(
        (), description="shares other than 1, NAME=NUMBER each: of adapters (or the model), or of named keys"
    )
    fair_prefill_price: float = Field(
        1.0, gt=0, description="what a token of a prompt counts in a share; cached ones count nothing"
    )
    fair_decode_price: float = Field(2.0, gt=0, description="what a generated token counts in a share")
    max_adapter_requests: int | None = Field(
        None, ge=1, description="requests with one adapter at once at most; beyond: 429"
    )
    max_adapter_tokens_per_minute: int | None = Field(
        None, ge=1, description="tokens with one adapter in a minute at most; beyond: 429"
    )
    max_key_requests: int | None = Field(
        None, ge=1, description="requests with one API key at once at most; beyond: 429"
    )
    max_key_tokens_per_minute: int | None = Field(
        None, ge=1, description="tokens with one API key in a minute at most; beyond: 429"
    )
    api_key: str | None = Field(
        None, min_length=1, description="key that every request must bring (default: any is accepted)"
    )
    api_keys_file: Path | None = Field(
        None,
        description="file of keys, one a line, read again when it changes; may limit each to some adapters",
    )
    open_metrics: bool = Field(False, description="let /metrics be read without the key")
    allowed_origins: Words = Field(("*",), description="origins whose web pages may read answers")
    default_max_tokens: int | None = Field(
        None, ge=1, description="max_tokens of requests that bring none (default: what the context leaves)"
    )
    response_store_bytes: ByteSize = Field(
        ByteSize(64 * 2**20),
        description="memory for what /v1/responses keeps for its clients; 0 keeps nothing (default: 64MiB)",
    )
    header_deadline: float = Field(
        10.0, gt=0, description="seconds to hold a response head for its first token"
    )
    keep_alive: float = Field(15.0, gt=0, description="seconds of silence after which a comment is sent")
    send_timeout: float = Field(
        30.0, gt=0, description="seconds a client may not read before its stream is closed"
    )
    resume_window: float = Field(
        30.0, ge=0, description="seconds that a dropped job stream waits for its client; 0: not at all"
    )
    inferless_app: Words = Field(
        (), description="folders with Inferless apps to serve, each in its own process"
    )
    inferless_logs: Path | None = Field(
        None,
        description="folder that gets what Inferless apps print, NAME.log each (default: nobody gets it)",
    )
    inferless_start_timeout: float = Field(
        600.0, gt=0, description="seconds that an Inferless app may take to initialize"
    )
    inferless_timeout: float = Field(
        600.0, gt=0, description="seconds that an Inferless app may take for one request"
    )
    inferless_queue: int = Field(
        128, ge=1, description="requests waiting for one Inferless app at most; beyond: 429"
    )
    drain_timeout: float = Field(30.0, ge=0, description="seconds that streams may go on after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="how much to log")

    @field_validator("port", mode="before")
    @classmethod
    def _ignore_service_link(cls, value: object) -> object:
        """Kubernetes sets MOTET_PORT=tcp://address:port for a service called motet: that is not our port."""
        return 8000 if isinstance(value, str) and value.startswith("tcp://") else value

    @field_validator("lora_modules")
    @classmethod
    def _check_lora_modules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for module in value:
            name, equals, path = module.partition("=")
            if not (name and equals and path):
                raise ValueError(f"expected NAME=PATH, got {module!r}")
        return value

    @field_validator("adapter_sources")
    @classmethod
    def _check_adapter_sources(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = ",".join(value).split(",")  # the flag takes them either way: local,hub or local hub
        if not set(names) <= set(ADAPTER_SOURCES):
            raise ValueError(f"expected some of {','.join(ADAPTER_SOURCES)}, got {','.join(value)!r}")
        return tuple(dict.fromkeys(names))

    @field_validator("fair_weights")
    @classmethod
    def _check_fair_weights(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            name, equals, number = word.rpartition("=")
            if not (name and equals and re.fullmatch(r"[0-9]+(\.[0-9]+)?", number) and float(number)):
                raise ValueError(f"expected NAME=NUMBER with a number above 0, got {word!r}")
        return value

    def weights(self) -> dict[str, float]:
        """`fair_weights` by name."""
        pairs = (word.rpartition("=") for word in self.fair_weights)
        return {name: float(number) for name, _, number in pairs}

    def named_adapters(self) -> tuple[tuple[str, Path], ...]:
        """`lora_modules` as (name, folder) pairs."""
        pairs = (module.partition("=") for module in self.lora_modules)
        return tuple((name, Path(path)) for name, _, path in pairs)

    def cache_folder(self) -> Path:
        """For fetched adapters."""
        if self.adapter_cache_dir is not None:
            return self.adapter_cache_dir
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(home).expanduser() / "motet" / "adapters"

    def s3_endpoint(self) -> str | None:
        """Of a service that is not AWS; the names are LoRAX's and AWS's own."""
        account = os.environ.get("R2_ACCOUNT_ID")
        named = (self.adapter_s3_endpoint, *(os.environ.get(name) for name in _S3_ENDPOINTS))
        by_account = f"https://{account}.r2.cloudflarestorage.com" if account else None
        return next((address for address in (*named, by_account) if address), None)


# An empty variable counts as none, but a secret that did not arrive must not open the server.
_NEVER_EMPTY = frozenset(("api_key", "api_keys_file"))

_GROUPS = {  # by the first field of each
    "host": "where to listen",
    "dtype": "the model, its memory and its steps",
    "lora_modules": "adapters",
    "adapter_sources": "adapters from elsewhere",
    "adapter_memory_bytes": "adapters in memory",
    "fair_by": "fair shares and limits",
    "api_key": "who may ask",
    "default_max_tokens": "answers",
    "inferless_app": "Inferless apps",
    "drain_timeout": "the process",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give the parser one flag per field; a flag that is not given leaves no attribute behind."""
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=_help("model"))
    group: argparse._ActionsContainer = parser
    for name, field in Settings.model_fields.items():
        if name == "model":
            continue
        if name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[name])
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(name)}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(name)
            if get_origin(field.annotation) is tuple:
                options["nargs"] = "+"
            if name == "inferless_app":
                options["action"] = "extend"  # the flag may be repeated
        group.add_argument(f"--{name.replace('_', '-')}", **options)


def read_settings(flags: argparse.Namespace) -> Settings:
    """Flags over environment over defaults. Raises: SettingsError that names the flag."""
    given = {name: value for name, value in vars(flags).items() if name in Settings.model_fields}
    for name in _NEVER_EMPTY.difference(given):
        variable = f"MOTET_{name.upper()}"
        if os.environ.get(variable) == "":
            raise SettingsError(f"{variable} is empty: fill it, or remove it to let everybody in")
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        raise SettingsError(f"--{name.replace('_', '-')}: {first['msg']}") from None


def size_of(text: str) -> int:
    """Bytes, as flags take sizes: 512MiB. Raises: SettingsError."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise SettingsError(f"{text!r} is not a size") from None


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    text = (field.description or "").replace("%", "%%")
    shows_default = field.default not in (None, (), True, False) and "default" not in text
    default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
    return f"{text} (default: {default})" if shows_default else text


def _metavar(name: str) -> str:
    annotation = Settings.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    known = {
        "lora_modules": "NAME=PATH",
        "fair_weights": "NAME=NUMBER",
        "adapters_dir": "DIR",
        "adapter_roots": "DIR",
        "adapter_sources": "NAME,...",
        "adapter_s3_buckets": "BUCKET",
        "adapter_s3_endpoint": "URL",
        "served_model_name": "NAME",
        "inferless_app": "DIR",
        "inferless_logs": "DIR",
    }
    return known.get(name, name.rpartition("_")[2].upper())
