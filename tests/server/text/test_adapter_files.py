"""Whatever is in a folder: what it says about text, or an error that names the file."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import AdapterInvalid
from server.text.adapter_files import TextFiles, parse, read_raw
from server.text.added_tokens import AddedToken


def read_text_files(folder: Path) -> TextFiles:
    return parse(read_raw(folder))


def put(name: str, content: object) -> Callable[[Path], None]:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(raw) and None


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


def test_an_empty_folder_says_nothing(tmp_path: Path) -> None:
    assert read_text_files(tmp_path) == TextFiles(template_file="tokenizer_config.json")


def test_all_files_are_read(tmp_path: Path) -> None:
    config = {
        "eos_token": {"__type": "AddedToken", "content": "<e>", "lstrip": True, "special": True},
        "bos_token": None,
        "image_token": "<i>",
        "model_max_length": 7,
        "extra_special_tokens": ["<x>", {"content": "<y>", "rstrip": True}],
        "added_tokens_decoder": {"9": {"content": "<b>"}, "8": {"content": "<a>", "special": True}},
    }
    put("tokenizer_config.json", config)(tmp_path)
    put("chat_template.jinja", b"{{ messages }}")(tmp_path)
    put("generation_config.json", {"eos_token_id": [3, 4]})(tmp_path)
    put("tokenizer.json", b"not looked at")(tmp_path)
    put("added_tokens.json", b"not looked at, for the config says it")(tmp_path)

    files = read_text_files(tmp_path)

    assert files.template == "{{ messages }}"
    assert files.named["eos_token"] == AddedToken("<e>", lstrip=True, normalized=False, special=True)
    assert files.named["bos_token"] is None
    assert files.named["image_token"] == AddedToken("<i>", normalized=False, special=True)
    assert [token.content for token in files.special] == ["<x>", "<y>"]
    assert list(files.added) == ["<a>", "<b>"]
    assert files.added["<a>"] == (8, AddedToken("<a>", normalized=False, special=True))
    assert files.added["<b>"] == (9, AddedToken("<b>", normalized=True, special=False))
    assert files.eos_token_ids == (3, 4)


def test_folders_with_equal_files_have_one_key(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders:
        folder.mkdir()
        put("tokenizer.json", b"a")(folder)
        put("tokenizer_config.json", {})(folder)
    put("tokenizer.json", b"b")(folders[2])
    keys = [read_raw(folder).key for folder in folders]
    assert keys[0] == keys[1] != keys[2]
    put("tokenizer_config.json", [])(folders[1])
    assert read_raw(folders[1]).key != keys[0]


MANY = {str(i): i for i in range(20_000)}
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "template too long": (put("chat_template.jinja", b"x" * 200_000), "chat_template.jinja is larger than"),
    "template of noise": (put("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja is not UTF-8"),
    "template in the config too long": (
        put("tokenizer_config.json", {"chat_template": "x" * 200_000}),
        "no text",
    ),
    "template is a number": (put("tokenizer_config.json", {"chat_template": 7}), "chat_template is no text"),
    "template has surrogates": (put("tokenizer_config.json", {"chat_template": "\ud800"}), "is no text"),
    "no default template": (
        put("tokenizer_config.json", {"chat_template": [{"name": "tools", "template": "x"}]}),
        "none of its chat templates is called default",
    ),
    "templates of numbers": (put("tokenizer_config.json", {"chat_template": [1, 2]}), "is called default"),
    "config is a list": (put("tokenizer_config.json", []), "tokenizer_config.json is not a JSON object"),
    "config is noise": (put("tokenizer_config.json", b"{"), "tokenizer_config.json is not valid JSON"),
    "config is deep": (put("tokenizer_config.json", b"[" * 100_000), "tokenizer_config.json is not valid"),
    "config is long": (
        put("tokenizer_config.json", b" " * (3 * 2**20)),
        "tokenizer_config.json is larger than",
    ),
    "own code": (
        put("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}),
        "code of its own, which is never run",
    ),
    "own code, as it was written once": (
        put("tokenizer_config.json", {"auto_map": ["evil.E", None]}),
        "code of",
    ),
    "eos is a number": (put("tokenizer_config.json", {"eos_token": 7}), "'eos_token' is no token"),
    "eos is empty": (put("tokenizer_config.json", {"eos_token": ""}), "'eos_token' is no token"),
    "flags are words": (
        put("tokenizer_config.json", {"eos_token": {"content": "a", "lstrip": "yes"}}),
        "'eos_token' is no token",
    ),
    "special tokens are a word": (put("tokenizer_config.json", {"extra_special_tokens": "abc"}), "no list"),
    "added tokens are a list": (put("tokenizer_config.json", {"added_tokens_decoder": [1]}), "no list"),
    "ids are words": (
        put("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "a"}}}),
        "'one' in added_tokens_decoder is no token's id",
    ),
    "ids are huge": (
        put("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}),
        "is no token's id",
    ),
    "many added tokens": (put("added_tokens.json", MANY), "added_tokens.json has more than"),
    "added tokens without ids": (
        put("added_tokens.json", {"a": "b"}),
        "added_tokens.json: 'a' has no proper id",
    ),
    "ends are words": (put("generation_config.json", {"eos_token_id": "x"}), "generation_config.json"),
    "ends are true": (put("generation_config.json", {"eos_token_id": [True]}), "generation_config.json"),
    "ends are negative": (put("generation_config.json", {"eos_token_id": -1}), "generation_config.json"),
    "a folder": (lambda folder: (folder / "tokenizer.json").mkdir(), "tokenizer.json is not a file"),
    "a pipe": (lambda folder: os.mkfifo(folder / "chat_template.jinja"), "chat_template.jinja is not a file"),
    "a link outside": (link("chat_template.jinja", "/etc/hostname"), "leads out of the adapter's folder"),
    "a link above": (link("tokenizer_config.json", "../secret.json"), "leads out of the adapter's folder"),
    "a link in circles": (link("tokenizer.json", "tokenizer.json"), "tokenizer.json "),
}


@pytest.mark.parametrize("what", list(HOSTILE))
def test_a_hostile_file_is_an_error_that_names_it(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (tmp_path / "secret.json").write_text("{}")
    prepare, message = HOSTILE[what]
    prepare(folder)
    with pytest.raises(AdapterInvalid, match=message) as refused:
        read_text_files(folder)
    assert len(refused.value.message) < 500
    assert str(tmp_path) not in refused.value.message


def test_a_sparse_file_of_any_size_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(AdapterInvalid, match=r"tokenizer\.json is larger than \d+ bytes"):
        read_text_files(tmp_path)


def test_links_of_a_hub_s_cache_are_followed(tmp_path: Path) -> None:
    """Its folders hold nothing but links into the store of their repository."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1f").write_text("{{ messages }}")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/1f")
    (snapshot / "beside").write_text("{}")
    (snapshot / "tokenizer_config.json").symlink_to("beside")
    assert read_text_files(snapshot).template == "{{ messages }}"
