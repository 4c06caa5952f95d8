"""The launchers of TGI and LoRAX: what each flag and variable becomes, row by row of their tables."""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import server.launchers
from server.__main__ import main
from server.embedded.location import adapters_dir, model_dir
from server.launchers.flags import Beside, Flag, Ignored, Launcher, Refused, Taken
from server.launchers.launch import launch
from server.launchers.lorax_flags import LORAX
from server.launchers.tgi_flags import TGI
from server.settings import Settings

MODEL = str(model_dir())
PIRATE = str(adapters_dir() / "pirate")
COMMIT = "0123456789abcdef0123456789abcdef01234567"

TAKEN: dict[str, tuple[str, dict[str, object]]] = {
    "model-id": (MODEL, {"model": MODEL}),
    "dtype": ("bfloat16", {"dtype": "bfloat16"}),
    "hostname": ("127.0.0.1", {"host": "127.0.0.1"}),
    "port": ("8080", {"port": 8080}),
    "cors-allow-origin": ("https://a.example", {"allowed_origins": ("https://a.example",)}),
    "max-total-tokens": ("2048", {"max_model_len": 2048}),
    "max-concurrent-requests": ("300", {"max_num_seqs": 256, "max_queued_requests": 44}),
    "cuda-memory-fraction": ("0.5", {"gpu_memory_utilization": 0.45}),
    "log-level": ("info,text_generation_router=debug", {"log_level": "info"}),
    "lora-adapters": (f"sailor={PIRATE}", {"lora_modules": (f"sailor={PIRATE}",)}),
    "api-key": ("sk-right", {"api_key": "sk-right"}),
    "max-batch-size": ("32", {"max_num_seqs": 32}),
    "prefix-caching": ("false", {"enable_prefix_caching": False}),
    "graceful-termination-timeout": ("90", {"drain_timeout": 90.0}),
    "adapter-source": ("local", {"adapter_sources": ("local",)}),
    "default-adapter-source": ("s3", {"adapter_sources": ("local", "s3")}),
    "preloaded-adapter-ids": (f"sailor={PIRATE}", {"lora_modules": (f"sailor={PIRATE}",)}),
    "lorax-use-global-hf-token": ("1", {"adapter_hub_own_token": True}),
    "memory-wiggle-room": ("0.8", {"gpu_memory_utilization": 0.8}),
}
REFUSED = {
    "weights-cache-override": "/repository",
    "tokenizer-config-path": "/data/tokenizer_config.json",
    "trust-remote-code": "true",
    "quantize": "gptq",
    "ngrok": "true",
    "sharded": "true",
    "num-shard": "2",
    "disable-grammar-support": "false",
    "speculate": "3",
    "kv-cache-dtype": "fp8_e5m2",
    "rope-scaling": "dynamic",
    "rope-factor": "2.0",
    "source": "s3",
    "download-only": "true",
    "adapter-id": "org/adapter",
    "speculative-tokens": "3",
    "cors-allow-credentials": "true",
    "embedding-model": "true",
    "embedding-dim": "384",
}

ROWS = [(launcher, flag) for launcher in (TGI, LORAX) for flag in launcher.flags]

Start = Callable[..., Settings]
Said = pytest.CaptureFixture[str]
Monkey = pytest.MonkeyPatch
both_launchers = pytest.mark.parametrize("launcher", [TGI, LORAX], ids=lambda launcher: launcher.name)


@pytest.fixture
def start(monkeypatch: Monkey) -> Iterator[Start]:
    """Launch with words and variables: the settings that would be served."""
    known = {flag.variable for _, flag in ROWS}
    for name in [name for name in os.environ if name in known or name.startswith("MOTET_")]:
        monkeypatch.delenv(name)
    served: list[Settings] = []

    def serve(settings: Settings) -> int:
        served.append(settings)
        return 0

    monkeypatch.setattr("server.process.serve_until_stopped", serve)
    monkeypatch.setattr("server.__main__.collect_nothing", lambda: None)

    def start_one(launcher: Launcher, *words: str, **variables: str) -> Settings:
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(name, value)
            assert launch(launcher, words) == 0
        return served.pop()

    yield start_one
    assert not served


def rows(kind: type[Flag]) -> list[object]:
    """All rows of a kind, of both tables."""
    those = [row for row in ROWS if isinstance(row[1], kind)]
    return [pytest.param(*row, id=f"{row[0].name}-{row[1].name}") for row in those]


def names(kind: type[Flag]) -> set[str]:
    return {flag.name for _, flag in ROWS if isinstance(flag, kind)}


def ways(flag: Flag, text: str) -> Iterator[tuple[list[str], dict[str, str], str]]:
    """How to say a flag: words, variables, and its name as it was said."""
    if flag.has_flag:
        yield [f"--{flag.name}", text], {}, f"--{flag.name}"
        yield [f"--{flag.name}={text}"], {}, f"--{flag.name}"
    if flag.has_variable:
        yield [], {flag.variable: text}, flag.variable


def refusal(capsys: Said, launcher: Launcher, *words: str, **variables: str) -> list[str]:
    """What is said of a start that comes to nothing, line by line."""
    with pytest.raises(SystemExit) as exit:
        launch(launcher, words, variables)
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_each_row_has_a_case_here() -> None:
    assert names(Taken) == set(TAKEN)
    assert names(Refused) == set(REFUSED)
    assert names(Beside) == {"revision", "huggingface-hub-cache"}  # see the hub's cache below


@both_launchers
def test_a_table_names_each_flag_once_and_settings_that_there_are(launcher: Launcher) -> None:
    known = [flag.name for flag in launcher.flags]
    assert len(known) == len(set(known))
    for flag in launcher.flags:
        assert flag.has_flag or flag.has_variable
        if isinstance(flag, Taken):
            assert set(flag.settings) <= set(Settings.model_fields)
            assert set(TAKEN[flag.name][1]) <= set(flag.settings)
        if isinstance(flag, Beside):
            assert flag.other in known


@pytest.mark.parametrize(("launcher", "flag"), rows(Taken))
def test_what_is_taken_becomes_our_setting(start: Start, launcher: Launcher, flag: Taken) -> None:
    text, expected = TAKEN[flag.name]
    for words, variables, _ in ways(flag, text):
        settings = start(launcher, *words, **{"MODEL_ID": MODEL, **variables})
        assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(("launcher", "flag"), rows(Ignored))
def test_what_is_ignored_is_said_and_changes_nothing(
    start: Start, capsys: Said, launcher: Launcher, flag: Ignored
) -> None:
    plain = start(launcher, "--model-id", MODEL)
    for words, variables, said_as in ways(flag, "true" if flag.is_switch else "7"):
        capsys.readouterr()
        assert start(launcher, "--model-id", MODEL, *words, **variables) == plain
        first = capsys.readouterr().err.splitlines()[0]
        assert first == f"{launcher.name}: {said_as}: ignored, because {flag.because}"


@pytest.mark.parametrize(("launcher", "flag"), rows(Refused))
def test_what_is_refused_is_said_with_the_next_step_and_what_asks_for_nothing_is_not(
    start: Start, capsys: Said, launcher: Launcher, flag: Refused
) -> None:
    for words, variables, said_as in ways(flag, REFUSED[flag.name]):
        last = refusal(capsys, launcher, "--model-id", MODEL, *words, **variables)[-1]
        assert re.match(f"{launcher.name}: error: {said_as}.{REFUSED[flag.name]}: refused", last)
        assert last.endswith(f", because {flag.because}: {flag.instead}")
    plain = start(launcher, "--model-id", MODEL)
    for value in flag.unless:
        for words, variables, said_as in ways(flag, value):
            capsys.readouterr()
            assert start(launcher, "--model-id", MODEL, *words, **variables) == plain
            first = capsys.readouterr().err.splitlines()[0]
            assert re.fullmatch(f"{launcher.name}: {said_as}.{value}: ignored, because .*", first)


@both_launchers
def test_help_says_what_becomes_of_each_flag(capsys: Said, launcher: Launcher, monkeypatch: Monkey) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as exit:
        launch(launcher, ["--help"], {})
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in launcher.flags:
        value = "[BOOL]" if flag.is_switch else "VALUE"
        assert (f"--{flag.name} {value} {flag.help}" if flag.has_flag else flag.variable) in text


# --- Who wins ---------------------------------------------------------------------------------------------


@both_launchers
def test_flags_win_over_variables_and_these_over_ours(start: Start, launcher: Launcher) -> None:
    everywhere = {"MODEL_ID": MODEL, "PORT": "81", "MOTET_PORT": "8000", "MOTET_HOST": "127.0.0.2"}
    assert start(launcher, "-p", "82", **everywhere).port == 82
    assert start(launcher, **everywhere).port == 81
    assert start(launcher, "--port", "81", "--port", "82", **everywhere).port == 82


@both_launchers
def test_without_a_word_it_listens_as_the_container_did(start: Start, launcher: Launcher) -> None:
    image = {"MOTET_PORT": "8000", "MOTET_HOST": "127.0.0.2"}  # of an image of ours
    settings = start(launcher, MODEL_ID=MODEL, **image)
    assert (settings.host, settings.port) == ("0.0.0.0", 80)


@both_launchers
def test_our_variables_say_everything_else(start: Start, launcher: Launcher) -> None:
    settings = start(launcher, MOTET_MODEL=MODEL, MOTET_FAIR_BY="key", MOTET_SEED="7")
    assert (settings.model, settings.fair_by, settings.seed) == (MODEL, "key", 7)


def test_a_containers_own_name_is_nothing_to_listen_on(start: Start) -> None:
    assert start(TGI, MODEL_ID=MODEL, HOSTNAME="3f2a91c07b5d").host == "0.0.0.0"
    assert start(TGI, MODEL_ID=MODEL, HOSTNAME="::1").host == "::1"
    assert start(TGI, "--hostname", "localhost", MODEL_ID=MODEL, HOSTNAME="::1").host == "localhost"


def test_an_empty_variable_says_nothing(start: Start, capsys: Said) -> None:
    empty = dict.fromkeys(("PORT", "QUANTIZE", "NUM_SHARD", "SHARDED", "API_KEY", "LORA_ADAPTERS"), "")
    assert start(TGI, MODEL_ID=MODEL, **empty) == start(TGI, MODEL_ID=MODEL)
    assert "ignored" not in capsys.readouterr().err


def test_a_repeated_flag_adds_and_its_variable_is_a_list(start: Start) -> None:
    both = ("https://a.example", "https://b.example")
    words = [word for origin in both for word in ("--cors-allow-origin", origin)]
    assert start(TGI, *words, MODEL_ID=MODEL).allowed_origins == both
    assert start(TGI, MODEL_ID=MODEL, CORS_ALLOW_ORIGIN=",".join(both)).allowed_origins == both


@pytest.mark.parametrize("text", ["true", "True", "1", "on", "yes"])
def test_a_switch_may_stand_alone_or_have_a_word(start: Start, text: str) -> None:
    assert start(LORAX, "--prefix-caching", "--model-id", MODEL).enable_prefix_caching
    assert start(LORAX, "--prefix-caching", text, "--model-id", MODEL).enable_prefix_caching
    assert not start(LORAX, MODEL_ID=MODEL, PREFIX_CACHING="0").enable_prefix_caching


@pytest.mark.parametrize(
    ("words", "variables", "says"),
    [
        (["--frobnicate"], {}, "--frobnicate"),
        (["--max-total", "7"], {}, "--max-total"),
        (["serve"], {}, "serve"),
        ([], {"SHARDED": "perhaps"}, "SHARDED takes true or false"),
        ([], {"MAX_CONCURRENT_REQUESTS": "many"}, "--max-concurrent-requests takes a whole number"),
        (["--max-batch-size", "0"], {}, "--max-batch-size takes a whole number"),
        (["--cuda-memory-fraction", "2"], {}, "--cuda-memory-fraction: a share"),
        (["--cuda-memory-fraction", "half"], {}, "--cuda-memory-fraction: a share"),
        (["--lora-adapters", "a=b=c"], {}, "'a=b=c' is not ID"),
        (["--lora-adapters", "org/none"], {}, "hf download org/none"),
        (["--lora-adapters", "a=/no/such/folder"], {}, "there is no folder /no/such/folder"),
        (["--lora-adapters", PIRATE], {}, f"write NAME={PIRATE}"),
    ],
)
def test_mistakes_end_with_a_line_that_names_them(
    capsys: Said, words: list[str], variables: dict[str, str], says: str, tmp_path: Path
) -> None:
    known = {"MODEL_ID": MODEL, "HUGGINGFACE_HUB_CACHE": str(tmp_path)}
    assert says in refusal(capsys, TGI, *words, **known, **variables)[-1]


def test_what_our_settings_refuse_is_refused_with_the_same_status(start: Start, capsys: Said) -> None:
    lines = refusal(capsys, TGI, "--port", "eighty", MODEL_ID=MODEL)
    assert lines[0].startswith("text-generation-launcher: this is motet serve ")
    assert "--port=eighty" in lines[0]
    assert "--port" in lines[-1]


@both_launchers
def test_a_model_must_be_named_and_be_here(capsys: Said, launcher: Launcher, tmp_path: Path) -> None:
    assert "--model-id or MODEL_ID" in refusal(capsys, launcher)[-1]
    cache = {"HUGGINGFACE_HUB_CACHE": str(tmp_path)}
    elsewhere = refusal(capsys, launcher, "--model-id", "org/small@main", **cache)[-1]
    assert "--model-id: org/small is neither a folder" in elsewhere
    assert "hf download org/small" in elsewhere
    assert "mount it" in refusal(capsys, launcher, MODEL_ID="/no/such/folder", **cache)[-1]


# --- What takes more than another name --------------------------------------------------------------------


def in_cache(cache: Path, name: str, file: str) -> Path:
    """A snapshot as the hub's tools keep it; the folder."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / file).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@both_launchers
@pytest.mark.parametrize("revision", [[], ["--revision", "main"], ["--revision", COMMIT]])
def test_a_model_of_the_hub_is_found_where_its_tools_keep_it(
    start: Start, tmp_path: Path, launcher: Launcher, revision: list[str]
) -> None:
    folder = in_cache(tmp_path, "org/small", "config.json")
    settings = start(launcher, *revision, "--huggingface-hub-cache", str(tmp_path), MODEL_ID="org/small")
    assert settings.model == str(folder)
    assert settings.served_model_name == ("org/small",)
    variables = {"HUGGINGFACE_HUB_CACHE": str(tmp_path), "MODEL_ID": f"org/small@{COMMIT}"}
    named = start(launcher, MOTET_SERVED_MODEL_NAME="voice", **variables)
    assert (named.model, named.served_model_name) == (str(folder), ("voice",))


def test_adapters_have_names_and_are_folders_or_in_the_hubs_cache(start: Start, tmp_path: Path) -> None:
    folder = in_cache(tmp_path, "org/adapter", "adapter_config.json")
    wanted = f"sailor={PIRATE}, org/adapter, other=org/adapter@{COMMIT}"
    expected = (f"sailor={PIRATE}", f"org/adapter={folder}", f"other={folder}")
    common = {"MODEL_ID": MODEL, "HUGGINGFACE_HUB_CACHE": str(tmp_path)}
    assert start(TGI, LORA_ADAPTERS=wanted, **common).lora_modules == expected
    assert start(LORAX, PRELOADED_ADAPTER_IDS=wanted, **common).lora_modules == expected
    words = [word for one in wanted.split(", ") for word in ("--preloaded-adapter-ids", one)]
    assert start(LORAX, *words, **common).lora_modules == expected


def test_clients_of_lorax_have_the_hub_unless_told_otherwise(start: Start, capsys: Said) -> None:
    common = {"MODEL_ID": MODEL}
    assert start(LORAX, **common).adapter_sources == ("local", "hub")
    assert start(LORAX, MOTET_ADAPTER_SOURCES="local", **common).adapter_sources == ("local",)
    assert start(LORAX, "--preloaded-adapter-ids", f"a={PIRATE}", **common).adapter_sources == ("local",)
    assert start(LORAX, "--adapter-source", "local", **common).adapter_sources == ("local",)
    both = ("--adapter-source", "local", "--default-adapter-source", "hub")
    assert start(LORAX, *both, **common).adapter_sources == ("local", "hub")
    assert start(TGI, **common).adapter_sources == ("local",)
    last = refusal(capsys, LORAX, DEFAULT_ADAPTER_SOURCE="pbase", **common)[-1]
    assert "DEFAULT_ADAPTER_SOURCE: there is no source 'pbase'" in last


@pytest.mark.parametrize(
    ("most", "batch", "expected"),
    [("128", None, (128, 1)), ("1024", None, (256, 768)), ("1", None, (1, 1)), ("100", "64", (64, 36))],
)
def test_requests_at_once_run_or_wait(
    start: Start, most: str, batch: str | None, expected: tuple[int, int]
) -> None:
    words = ["--max-concurrent-requests", most, *(["--max-batch-size", batch] if batch else [])]
    settings = start(TGI, *words, MODEL_ID=MODEL)
    assert (settings.max_num_seqs, settings.max_queued_requests) == expected


def test_the_share_of_a_gpu_leaves_what_the_launchers_left(start: Start) -> None:
    common = ("--model-id", MODEL, "--cuda-memory-fraction")
    assert start(LORAX, *common, "1.0").gpu_memory_utilization == 0.9
    assert start(LORAX, *common, "0.5", "--memory-wiggle-room", "0.8").gpu_memory_utilization == 0.4


@pytest.mark.parametrize(
    "levels", ["INFO info", "warn warning", "trace debug", "a=debug,error error", "x info"]
)
def test_levels_of_the_log_are_ours(start: Start, levels: str) -> None:
    theirs, ours = levels.split()
    assert start(TGI, MODEL_ID=MODEL, LOG_LEVEL=theirs).log_level == ours


def test_the_line_about_the_start_is_a_command_that_starts_the_same(
    start: Start, capsys: Said, monkeypatch: Monkey
) -> None:
    words = ("--model-id", MODEL, "--prefix-caching", "false", "--max-total-tokens", "512", "-e")
    settings = start(LORAX, *words, PRELOADED_ADAPTER_IDS=f"a={PIRATE},b={PIRATE}")
    line = capsys.readouterr().err.splitlines()[-1]
    served: list[Settings] = []
    monkeypatch.setattr("server.process.serve_until_stopped", served.append)
    program, *rest = shlex.split(line.removeprefix("lorax-launcher: this is "))
    assert program == "motet"
    main(rest)
    assert served == [settings]


def test_no_secret_is_said(start: Start, capsys: Said) -> None:
    secrets = {"API_KEY": "sk-hush", "NGROK_AUTHTOKEN": "sk-hush"}
    assert start(TGI, MODEL_ID=MODEL, **secrets).api_key == "sk-hush"
    said = capsys.readouterr().err
    assert "--api-key=..." in said
    assert "hush" not in said


@pytest.mark.parametrize("name", ["tgi", "lorax"])
def test_the_commands_take_the_words_of_the_command_line(
    start: Start, capsys: Said, monkeypatch: Monkey, name: str
) -> None:
    monkeypatch.setattr("sys.argv", [name, "--version"])
    with pytest.raises(SystemExit) as exit:
        getattr(server.launchers, name)()
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith("motet 0.")
