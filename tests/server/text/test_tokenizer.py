"""What the tokenizer promises to the layers above."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from server.errors import BadRequest
from server.text.token_bytes import FirstSpace, byte_alphabet, spelling_of
from server.text.tokenizer import Tokenizer, TokenSpan, UnsupportedTokenizer
from tests import made_tokenizers


def byte_level() -> Tokenizer:
    return Tokenizer(made_tokenizers.byte_level())


def models_only() -> Backend:
    return Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))


def test_encoding_and_decoding_are_inverse() -> None:
    tokenizer = byte_level()
    text = "  the cat, 日本 👍\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_offsets_are_in_characters_of_the_text() -> None:
    tokenizer = Tokenizer(made_tokenizers.byte_fallback(drops_first_space=False))
    spans = tokenizer.encode_with_offsets("the 日")
    assert [(span.text, span.start, span.stop) for span in spans][-1] == ("日", 4, 5)
    assert isinstance(spans[0], TokenSpan)
    assert [span.id for span in spans] == tokenizer.encode("the 日")


def test_special_tokens_are_left_out_of_decoded_text_unless_asked_for() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer.encode("hi"), *tokenizer.encode(made_tokenizers.EOS)]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hi</s>"
    assert ids[-1] in tokenizer.special_ids


def test_a_single_token_keeps_its_space_and_special_tokens_are_spelled_out() -> None:
    tokenizer = Tokenizer(made_tokenizers.byte_fallback())
    [the] = tokenizer.encode("the")
    [eos] = tokenizer.special_ids & set(tokenizer.encode(made_tokenizers.EOS))
    assert tokenizer.token_text(the) == " the"
    assert tokenizer.token_text(eos) == "</s>"
    assert tokenizer.spell_token(eos) == b"</s>"
    assert tokenizer.spell_token(3 + 0xE6) == b"\xe6"
    assert tokenizer.token_text(3 + 0xE6) == "\ufffd"


def test_ids_without_a_token_are_empty() -> None:
    tokenizer = byte_level()
    assert tokenizer.token_text(tokenizer.vocab_size + 1) == ""
    assert tokenizer.decode([tokenizer.vocab_size + 1]) == ""


def test_no_text_of_n_tokens_is_longer_than_n_times_the_longest_token() -> None:
    tokenizer = byte_level()
    for text in ["hello world " * 50, "日本語" * 30, "zq" * 40]:
        assert len(text) <= len(tokenizer.encode(text)) * tokenizer.max_token_chars


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        byte_level().encode(text)


def test_truncation_in_the_file_is_switched_off() -> None:
    backend = made_tokenizers.byte_level()
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=100)
    assert len(Tokenizer(backend).encode("one two three four five six")) > 3
    assert len(Tokenizer(backend).encode("x")) < 100


def test_many_threads_may_encode_at_once() -> None:
    tokenizer = byte_level()
    texts = [f"the cat {i} sat" * 20 for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(tokenizer.encode, texts))
    assert together == [tokenizer.encode(text) for text in texts]


def test_a_tokenizer_folder_is_loaded_without_a_network(tmp_path: Path) -> None:
    made_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert not tokenizer.has_chat_template
    with pytest.raises(BadRequest, match="no chat template") as refused:
        tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert refused.value.param == "messages"


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        Tokenizer.load(tmp_path / "nothing")


def test_a_tokenizer_without_a_fast_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: object())
    with pytest.raises(UnsupportedTokenizer, match="no fast version"):
        Tokenizer.load("anywhere")


def test_a_tokenizer_without_a_decoder_goes_the_general_way() -> None:
    tokenizer = Tokenizer(models_only())
    assert tokenizer.token_bytes is None
    [one] = tokenizer.encode("a")
    assert (tokenizer.token_text(one), tokenizer.spell_token(one)) == ("a", b"a")


@pytest.mark.parametrize(
    ("name", "first_space"),
    [
        ("LlamaTokenizer", FirstSpace.ONE_DROPPED),
        ("GemmaTokenizer", FirstSpace.KEPT),
        ("Qwen2Tokenizer", FirstSpace.KEPT),
        ("GPT2Tokenizer", FirstSpace.KEPT),
        ("XGLMTokenizer", FirstSpace.TOKEN_DROPPED),
    ],
)
def test_the_tokenizers_of_transformers_are_read_exactly(name: str, first_space: FirstSpace) -> None:
    import transformers

    token_bytes = Tokenizer(getattr(transformers, name)().backend_tokenizer).token_bytes
    assert token_bytes is not None
    assert token_bytes.first_space is first_space


def test_an_added_token_outside_the_byte_alphabet_stands_for_itself() -> None:
    backend = made_tokenizers.byte_level()
    backend.add_tokens(["<a b>"])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("x<a b>y")
    assert [tokenizer.token_text(token_id) for token_id in ids] == ["x", "<a b>", "y"]


def test_the_byte_alphabet_names_every_byte_once() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["A"] == 0x41
    assert alphabet["Ġ"] == 0x20


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"},
        {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Strip"}]},
        {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"Regex": "x"}, "content": " "}, {"type": "Fuse"}],
        },
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 2, "stop": 0},
            ],
        },
    ],
)
def test_decoders_of_another_kind_have_no_byte_spelling(decoder: dict[str, object] | None) -> None:
    assert spelling_of(decoder) is None


def test_a_spelling_that_disagrees_with_the_decoder_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = spelling_of({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"})
    monkeypatch.setattr("server.text.tokenizer.spelling_of", lambda decoder: wrong)
    assert byte_level().token_bytes is None
