"""An adapter reads and writes as transformers would with its folder, if that differs from the base's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from server.text.adapter_text import AdapterText, AdapterTexts
from server.text.detokenizer import make_detokenizer
from server.text.tokenizer import Tokenizer
from tests import made_tokenizers
from tests.server.text.conftest import MakeTexts
from tests.text_folders import CHATML, PLAIN, base_folder, edit_json, reference, save_beside

CLASSES = [
    ("byte_level", "PreTrainedTokenizerFast"),
    ("byte_level", "GPT2Tokenizer"),
    ("byte_level", "Qwen2Tokenizer"),
    ("byte_fallback", "PreTrainedTokenizerFast"),
    ("byte_fallback", "LlamaTokenizer"),
    ("byte_fallback_keeping_first_space", "GemmaTokenizer"),
    ("metaspace_unigram", "PreTrainedTokenizerFast"),
    ("word_suffix", "PreTrainedTokenizerFast"),
]
TEXTS = ["the cat sat", " the cat <|call|>the mat<plain> ", "日本<|call|>", "<s>hello</s>the", "<|call|>", ""]
HELLO: list[dict[str, object]] = [{"role": "user", "content": "the cat"}]
CHAT: list[dict[str, object]] = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "the <plain> cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on the mat"},
]


def extend(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|call|>"]})
    tokenizer.add_tokens(["<plain>"])


def read(texts: AdapterTexts, folder: Path) -> Tokenizer:
    text = texts.read(folder)
    assert isinstance(text, AdapterText)
    return text.tokenizer


# --- Nothing of its own -------------------------------------------------------------------------------------


def test_a_folder_without_such_files_has_no_text(texts: AdapterTexts, tmp_path: Path) -> None:
    assert texts.read(tmp_path) is None


@pytest.mark.parametrize(("kind", "tokenizer_class"), CLASSES)
def test_the_base_s_own_tokenizer_beside_an_adapter_is_nothing_of_its_own(
    make_texts: MakeTexts, tmp_path: Path, kind: str, tokenizer_class: str
) -> None:
    base = base_folder(tmp_path / "base", kind, tokenizer_class)

    def train(tokenizer: Any) -> None:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer(["the cat"], truncation=True, max_length=7, padding="max_length")

    adapter = save_beside(tmp_path / "adapter", base, train)
    assert (adapter / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()
    assert make_texts(base).read(adapter) is None


def test_how_a_file_is_written_does_not_matter(base: Path, texts: AdapterTexts, tmp_path: Path) -> None:
    adapter = save_beside(tmp_path / "adapter", base)

    def rewrite(tokenizer: dict[str, Any]) -> None:
        model = tokenizer["model"]
        model["merges"] = [
            " ".join(pair) if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]
        ]
        model["vocab"] = dict(sorted(model["vocab"].items()))
        del model["byte_fallback"]
        tokenizer["pre_tokenizer"]["trim_offsets"] = not tokenizer["pre_tokenizer"]["trim_offsets"]
        tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"]]}

    edit_json(adapter / "tokenizer.json", rewrite)
    template = adapter / "chat_template.jinja"
    template.write_bytes(template.read_bytes().replace(b"\n", b"\r\n") + b"\n")
    assert texts.read(adapter) is None


def test_the_old_files_of_the_base_s_tokenizer_are_nothing_of_its_own(
    base: Path, texts: AdapterTexts, tmp_path: Path
) -> None:
    """As `save_pretrained` of the time before tokenizer.json: added tokens and their names apart."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    names = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (adapter / "special_tokens_map.json").write_text(json.dumps(names))
    (adapter / "added_tokens.json").write_text(json.dumps({"<s>": 0, "</s>": 1}))
    (adapter / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NobodyKnowsIt"}))
    assert texts.read(adapter) is None


def test_what_was_compared_once_is_known_by_its_digest(
    base: Path, texts: AdapterTexts, tmp_path: Path
) -> None:
    folders = [save_beside(tmp_path / name, base, extend) for name in ("one", "two")]
    first = texts.read(folders[0])
    texts.close()  # nothing can be compared any more
    assert texts.read(folders[1]) is first is not None


def test_the_base_s_files_byte_for_byte_need_no_comparison(base: Path, texts: AdapterTexts) -> None:
    texts.close()
    assert texts.read(base) is None


def test_texts_are_kept_as_long_as_an_adapter_has_them(
    base: Path, texts: AdapterTexts, tmp_path: Path
) -> None:
    adapter = save_beside(tmp_path / "adapter", base, extend)
    first = texts.read(adapter)
    assert len(texts._texts) == 1
    del first
    assert len(texts._texts) == 0


# --- Tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tokenizer_class"), CLASSES)
def test_added_tokens_are_read_and_written_as_transformers_does(
    make_texts: MakeTexts, tmp_path: Path, kind: str, tokenizer_class: str
) -> None:
    base = base_folder(tmp_path / "base", kind, tokenizer_class)
    adapter = save_beside(tmp_path / "adapter", base, extend)
    own, expected = read(make_texts(base), adapter), reference(adapter)

    for text in TEXTS:
        for special in (True, False):
            ids = own.encode(text, add_special_tokens=special)
            assert ids == expected.encode(text, add_special_tokens=special)
            assert own.decode(ids) == expected.backend_tokenizer.decode(ids)
        detokenizer = make_detokenizer(own)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == own.decode(ids)
    call, plain = (expected.convert_tokens_to_ids(token) for token in ("<|call|>", "<plain>"))
    assert own.special_text(call) == own.token_text(call) == "<|call|>"
    assert own.special_text(plain) is None
    alone = Tokenizer.load(adapter)
    assert own.token_text(plain) == alone.token_text(plain)
    assert own.spell_token(plain) == alone.spell_token(plain)
    assert max(call, plain) < own.vocab_size


def test_the_base_stays_as_it_was(base: Path, texts: AdapterTexts, tmp_path: Path) -> None:
    before = Tokenizer.load(base)
    read(texts, save_beside(tmp_path / "adapter", base, extend))
    for text in TEXTS:
        assert texts._base.tokenizer.encode(text) == before.encode(text)
    assert texts._base.tokenizer.added_tokens == before.added_tokens


def test_tokens_of_the_old_files_are_added(base: Path, texts: AdapterTexts, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    next_id = texts._base.tokenizer.vocab_size
    added = {"<s>": 0, "</s>": 1, "<plain>": next_id, "<|call|>": next_id + 1}
    (adapter / "added_tokens.json").write_text(json.dumps(added))
    (adapter / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|call|>"]}))
    own = read(texts, adapter)
    assert own.encode("a<plain><|call|>")[-2:] == [next_id, next_id + 1]
    assert own.special_text(next_id) is None
    assert own.special_text(next_id + 1) == "<|call|>"


def test_a_row_of_the_table_may_get_another_name(make_texts: MakeTexts, tmp_path: Path) -> None:
    """Some trainers name a reserved token instead of adding one."""
    base = base_folder(tmp_path / "base")
    save_beside(
        base, base, lambda tokenizer: tokenizer.add_special_tokens({"extra_special_tokens": ["<r0>", "<r1>"]})
    )
    adapter = save_beside(tmp_path / "adapter", base)
    content = (adapter / "tokenizer.json").read_text()
    (adapter / "tokenizer.json").write_text(content.replace("<r0>", "<|call|>"))
    edit_json(adapter / "tokenizer_config.json", lambda config: config.pop("extra_special_tokens"))
    texts = make_texts(base)
    own = read(texts, adapter)

    [row] = texts._base.tokenizer.encode("<r0>")
    assert own.encode("<|call|>") == [row]
    assert own.token_text(row) == "<|call|>"
    assert row not in own.encode("<r0>")
    assert own.encode("<r1>") == texts._base.tokenizer.encode("<r1>")


def test_a_token_of_the_vocabulary_may_become_a_special_one(
    base: Path, texts: AdapterTexts, tmp_path: Path
) -> None:
    adapter = save_beside(
        tmp_path / "adapter", base, lambda tokenizer: tokenizer.add_special_tokens({"sep_token": "cat"})
    )
    own = read(texts, adapter)
    assert own.encode("a cat sat") == reference(adapter).encode("a cat sat")
    assert own.special_text(own.encode("cat")[0]) == "cat"
    assert texts._base.tokenizer.special_text(own.encode("cat")[0]) is None


@pytest.mark.parametrize("around", [("<s>", ""), ("<s> <s>", "</s>"), ("", "</s>")])
def test_what_stands_around_a_text_is_the_adapter_s(
    base: Path, texts: AdapterTexts, tmp_path: Path, around: tuple[str, str]
) -> None:
    def frame(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(),
                processors.TemplateProcessing(
                    single=" ".join((around[0], "$A", around[1])).strip(),
                    special_tokens=[("<s>", 0), ("</s>", 1)],
                ),
            ]
        )

    adapter = save_beside(tmp_path / "adapter", base, frame)
    own = read(texts, adapter)
    assert own.encode("the cat") == reference(adapter).encode("the cat")
    assert own.encode("the cat", add_special_tokens=False) == texts._base.tokenizer.encode("the cat")
    assert "".join(span.text for span in own.encode_with_offsets("the cat")) == "the cat"


def test_a_padding_token_beyond_the_table_is_left_out(
    base: Path, make_texts: MakeTexts, tmp_path: Path
) -> None:
    texts = make_texts(base, spare=0)
    adapter = save_beside(
        tmp_path / "adapter", base, lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    )
    assert texts.read(adapter) is None


# --- Templates and ends -------------------------------------------------------------------------------------


def in_config(adapter: Path, value: object) -> None:
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(adapter / "tokenizer_config.json", lambda config: config.update(chat_template=value))


def in_file(adapter: Path, value: str) -> None:
    (adapter / "chat_template.jinja").write_text(value)


@pytest.mark.parametrize(
    ("put", "base_template"),
    [
        (lambda adapter: in_file(adapter, PLAIN), None),
        (lambda adapter: in_file(adapter, PLAIN), CHATML),
        (lambda adapter: in_config(adapter, PLAIN), None),
        (
            lambda adapter: in_config(
                adapter, [{"name": "tools", "template": "no"}, {"name": "default", "template": PLAIN}]
            ),
            CHATML,
        ),
        (lambda adapter: (in_config(adapter, "not this one"), in_file(adapter, PLAIN)), CHATML),
    ],
    ids=["file", "another file", "config", "list in the config", "file and config"],
)
def test_an_own_template_is_found_wherever_it_stands(
    make_texts: MakeTexts, tmp_path: Path, put: Callable[[Path], None], base_template: str | None
) -> None:
    base = base_folder(tmp_path / "base", template=base_template)
    texts = make_texts(base)
    adapter = save_beside(tmp_path / "adapter", base)
    put(adapter)
    own = read(texts, adapter)
    assert own.has_chat_template
    assert own.chat_template == PLAIN
    assert own.chat_pool is not None
    text = own.render_chat(CHAT)
    expected = reference(adapter).apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert own.encode(text, add_special_tokens=False) == expected
    assert texts._base.tokenizer.has_chat_template is (base_template is not None)


def test_the_base_s_template_holds_for_an_adapter_that_brings_none(
    base: Path, texts: AdapterTexts, tmp_path: Path
) -> None:
    adapter = save_beside(tmp_path / "adapter", base, extend)
    (adapter / "chat_template.jinja").unlink()
    own = read(texts, adapter)
    assert own.render_chat(CHAT) == texts._base.tokenizer.render_chat(CHAT)
    assert own.chat_pool is None  # it is the operator's, and known to be well


def test_the_base_s_template_sees_the_adapter_s_names(
    base: Path, texts: AdapterTexts, tmp_path: Path
) -> None:
    adapter = save_beside(
        tmp_path / "adapter", base, lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    )
    own = read(texts, adapter)
    assert own.render_chat(HELLO) == reference(adapter).apply_chat_template(
        HELLO, tokenize=False, add_generation_prompt=True
    )
    assert "<|end|>" in own.render_chat(HELLO)
    assert own.eos_token_ids == {own.encode("<|end|>")[0]}


def test_the_last_message_can_be_continued(base: Path, texts: AdapterTexts, tmp_path: Path) -> None:
    adapter = save_beside(tmp_path / "adapter", base)
    in_file(adapter, PLAIN)
    messages = [*HELLO, {"role": "assistant", "content": "Once upon "}]
    rendered = read(texts, adapter).render_chat(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == reference(adapter).apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    assert rendered.endswith("Once upon ")


@pytest.mark.parametrize(("said", "own"), [(1, {1}), ([1, 5, 7], {1, 7}), (5, set())])
def test_ends_of_a_generation_config_are_the_adapter_s(
    base: Path, make_texts: MakeTexts, tmp_path: Path, said: object, own: set[int]
) -> None:
    texts = make_texts(base, eos_token_ids=frozenset({5}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    text = texts.read(adapter)
    assert (set() if text is None else text.tokenizer.eos_token_ids) == own


def test_an_end_that_the_base_s_files_name_too_is_not_the_adapter_s(
    base: Path, make_texts: MakeTexts, tmp_path: Path
) -> None:
    """The model's own generation_config says otherwise, and holds for its adapters as well."""
    texts = make_texts(base, eos_token_ids=frozenset({5}))
    assert texts.read(save_beside(tmp_path / "adapter", base)) is None


# --- Refusals -----------------------------------------------------------------------------------------------


def swap_two_ids(adapter: Path) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit_json(adapter / "tokenizer.json", swap)


def move_a_special_token(adapter: Path) -> None:
    edit_json(
        adapter / "tokenizer_config.json",
        lambda config: config.update(added_tokens_decoder={"7": {"content": "</s>", "special": True}}),
    )


def learn_a_word(adapter: Path) -> None:
    edit_json(adapter / "tokenizer.json", lambda t: t["model"]["vocab"].update(neologism=500))


def forget_a_word(adapter: Path) -> None:
    edit_json(adapter / "tokenizer.json", lambda t: t["model"]["vocab"].pop("a"))


def merge_otherwise(adapter: Path) -> None:
    edit_json(adapter / "tokenizer.json", lambda t: t["model"]["merges"].reverse())


def replace_section(name: str, section: object) -> Callable[[Path], None]:
    return lambda adapter: edit_json(adapter / "tokenizer.json", lambda t: t.update({name: section}))


def option(name: str, value: object) -> Callable[[Path], None]:
    return lambda adapter: edit_json(adapter / "tokenizer.json", lambda t: t["model"].update({name: value}))


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "other ids": (swap_two_ids, "token '[ab]' has the id .* was not trained on this model"),
    "other id of a special token": (move_a_special_token, "token '</s>' has the id 7"),
    "more words": (learn_a_word, "its vocabulary has 'neologism'"),
    "fewer words": (forget_a_word, "its vocabulary lacks 'a'"),
    "other merges": (merge_otherwise, "joins the pieces of words in another order"),
    "lower case": (replace_section("normalizer", {"type": "Lowercase"}), "its normalizer"),
    "other words": (replace_section("pre_tokenizer", {"type": "Whitespace"}), "its pre_tokenizer"),
    "other decoder": (replace_section("decoder", {"type": "Fuse"}), "its decoder"),
    "other model": (option("type", "WordPiece"), "it is a 'WordPiece' tokenizer"),
    "dropout": (option("dropout", 0.5), "options of its vocabulary"),
    "unknown section": (replace_section("normalizer", {"type": "Magic"}), "its normalizer cannot be read"),
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_a_tokenizer_of_another_model_is_refused_by_name(
    base: Path, texts: AdapterTexts, tmp_path: Path, what: str
) -> None:
    adapter = save_beside(tmp_path / "adapter", base)
    change, message = OTHERS[what]
    change(adapter)
    for _ in range(2):  # found out once, and remembered
        with pytest.raises(AdapterIncompatible, match=message):
            texts.read(adapter)


def test_a_token_beyond_the_table_is_refused_by_name(
    base: Path, make_texts: MakeTexts, tmp_path: Path
) -> None:
    texts = make_texts(base, spare=1)
    adapter = save_beside(tmp_path / "adapter", base, extend)  # two tokens, and one row for them
    with pytest.raises(
        AdapterIncompatible, match=r"token '<plain>' of the adapter has the id \d+"
    ) as refused:
        texts.read(adapter)
    assert f"embeddings for {texts._base.num_embeddings} tokens" in refused.value.message


def test_an_end_beyond_the_table_is_refused(base: Path, texts: AdapterTexts, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 99999}')
    with pytest.raises(AdapterIncompatible, match="end with token 99999"):
        texts.read(tmp_path)


def test_an_id_with_a_gap_before_it_is_refused(base: Path, texts: AdapterTexts, tmp_path: Path) -> None:
    """No tokenizer can be made that has it."""
    next_id = texts._base.tokenizer.vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<far>": next_id + 5}))
    with pytest.raises(AdapterIncompatible, match=f"cannot have the id {next_id + 5}"):
        texts.read(tmp_path)


def test_long_tokens_are_refused(base: Path, texts: AdapterTexts, tmp_path: Path) -> None:
    """One would let prompts of any length through the check of their characters."""
    adapter = save_beside(tmp_path / "adapter", base, lambda tokenizer: tokenizer.add_tokens(["x" * 65]))
    with pytest.raises(AdapterInvalid, match="more than 64 characters"):
        texts.read(adapter)


def test_a_template_that_is_no_program_is_refused_when_the_adapter_is_loaded(
    base: Path, texts: AdapterTexts, tmp_path: Path
) -> None:
    for name, put in (("chat_template.jinja", in_file), ("tokenizer_config.json", in_config)):
        adapter = save_beside(tmp_path / name, base)
        put(adapter, "{% if %}")
        with pytest.raises(AdapterInvalid, match=f"^{name} has no usable chat template: "):
            texts.read(adapter)


HOSTILE_TOKENIZERS: dict[str, bytes] = {
    "noise": bytes(range(256)),
    "empty": b"",
    "a list": b"[]",
    "no model": b"{}",
    "deep": b"[" * 100_000,
    "model is a word": b'{"model": "BPE"}',
    "vocabulary of lists": b'{"model": {"vocab": [[[], 1]]}}',
    "ids are words": b'{"model": {"vocab": {"a": "one"}}}',
    "numbers": b'{"model": {"vocab": {"a": 1e400}}}',
    "added tokens are words": b'{"model": {"vocab": {}}, "added_tokens": ["a"]}',
    "many added tokens": b'{"model": {"vocab": {}}, "added_tokens": [' + b"1," * 20_000 + b"1]}",
    "surrogates": b'{"model": {"vocab": {"\\ud800": 1}}}',
}


@pytest.mark.parametrize("what", list(HOSTILE_TOKENIZERS))
def test_a_hostile_tokenizer_is_an_error_that_names_the_file(
    texts: AdapterTexts, tmp_path: Path, what: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(HOSTILE_TOKENIZERS[what])
    with pytest.raises(AdapterError, match=r"^tokenizer\.json cannot be used: "):
        texts.read(tmp_path)


def test_a_regular_expression_that_explodes_costs_its_own_process(
    base: Path, texts: AdapterTexts, tmp_path: Path
) -> None:
    adapter = save_beside(tmp_path / "adapter", base)
    bomb = "(?:" * 6 + "a" + "{1,1000})" * 6
    split = {"type": "Split", "pattern": {"Regex": bomb}, "behavior": "Isolated", "invert": False}
    edit_json(adapter / "tokenizer.json", lambda t: t.update(pre_tokenizer=split))
    with pytest.raises(AdapterIncompatible, match=r"^tokenizer\.json cannot be used: "):
        texts.read(adapter)
    assert made_tokenizers.BOS in texts._base.tokenizer.named_tokens.values()


def test_nothing_is_read_after_the_end(base: Path, texts: AdapterTexts, tmp_path: Path) -> None:
    adapter = save_beside(tmp_path / "adapter", base, extend)
    texts.close()
    with pytest.raises(AdapterError, match="shutting down"):
        texts.read(adapter)
    texts.close()
