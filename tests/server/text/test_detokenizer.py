"""Joined pieces are the whole text, for every kind of tokenizer, and no character is shown before it is
complete.
"""

import random

import pytest

from server.text.detokenizer import ByteDetokenizer, WindowDetokenizer, make_detokenizer
from server.text.tokenizer import Tokenizer
from tests import made_tokenizers

SAMPLES = [
    "the cat sat on the mat",
    "  two  spaces\n\tand tabs ",
    "日本語の文 mixed with latin",
    "👨‍👩‍👧‍👦 family 👍🏽 skin 🇩🇪 flag",
    "e\u0301 combining o\u0308\u0323 marks",
    "שלום عالم \u202eRTL\u202c",
    "naïve café — “quotes” … ½",
    "\x00\x01 control \u2028 \u0085",
    "x",
    "",
]
ALPHABET = "".join(SAMPLES)


@pytest.fixture(params=sorted(made_tokenizers.KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(made_tokenizers.KINDS[request.param]())


@pytest.fixture
def byte_level() -> Tokenizer:
    return Tokenizer(made_tokenizers.byte_level())


@pytest.fixture
def byte_fallback() -> Tokenizer:
    return Tokenizer(made_tokenizers.byte_fallback())


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", SAMPLES)
def test_joined_pieces_equal_the_decoded_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(40))
def test_joined_pieces_equal_the_decoded_whole_for_random_text(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 60)))
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "byte_fallback_keeping_first_space"])
@pytest.mark.parametrize("text", SAMPLES)
def test_valid_text_never_shows_a_replacement_character(kind: str, text: str) -> None:
    tokenizer = Tokenizer(made_tokenizers.KINDS[kind]())
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(40))
def test_random_byte_level_tokens_stream_like_their_whole(byte_level: Tokenizer, seed: int) -> None:
    """Any ids at all: cut characters, lone continuation bytes, special tokens in between."""
    rng = random.Random(seed)
    ids = [rng.randrange(byte_level.vocab_size) for _ in range(rng.randint(1, 80))]
    assert "".join(streamed(byte_level, ids)) == byte_level.decode(ids)


@pytest.mark.parametrize("seed", range(40))
def test_random_byte_tokens_stream_as_utf8_with_replacement(byte_fallback: Tokenizer, seed: int) -> None:
    """The whole-text decoder replaces every byte of a run that has one bad byte in it; a stream, which has
    already shown the good characters, replaces the bad ones only.
    """
    rng = random.Random(seed)
    run = bytes(rng.choice(["日".encode(), bytes([rng.randrange(128, 256)])])[0] for _ in range(30))
    run += "é".encode()
    ids = [byte_fallback.encode("a")[-1], *(3 + byte for byte in run)]
    assert "".join(streamed(byte_fallback, ids)) == "a" + run.decode(errors="replace")


def test_a_character_comes_whole_with_its_last_token(byte_fallback: Tokenizer) -> None:
    ids = [3 + byte for byte in "👍".encode()]
    assert streamed(byte_fallback, ids) == ["", "", "", "👍", ""]


def test_an_unfinished_character_is_replaced_at_the_end(byte_fallback: Tokenizer) -> None:
    ids = [3 + byte for byte in "👍".encode()[:3]]
    assert streamed(byte_fallback, ids) == ["", "", "", "\ufffd"]


def test_the_first_space_is_dropped_only_at_the_start_of_everything(byte_fallback: Tokenizer) -> None:
    [the] = byte_fallback.encode("the")
    bos = byte_fallback.encode(made_tokenizers.BOS)[0]
    assert "".join(streamed(byte_fallback, [the, the])) == "the the"
    assert "".join(streamed(byte_fallback, [the, the], prompt=[bos])) == "the the"
    assert "".join(streamed(byte_fallback, [the, the], prompt=[bos, the])) == " the the"


def test_answer_finishes_a_character_begun_in_the_prompt(byte_fallback: Tokenizer) -> None:
    emoji = [3 + byte for byte in "👍".encode()]
    assert "".join(streamed(byte_fallback, emoji[2:], prompt=emoji[:2])) == "👍"


def test_special_tokens_add_no_text_even_inside_a_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("é")
    eos = byte_level.encode(made_tokenizers.EOS)[0]
    assert streamed(byte_level, [ids[0], eos, ids[1], eos]) == ["", "", "é", "", ""]


def test_ids_without_a_token_add_no_text(tokenizer: Tokenizer) -> None:
    assert "".join(streamed(tokenizer, [tokenizer.vocab_size + 5])) == ""


def test_each_tokenizer_takes_the_exact_way_where_it_can() -> None:
    chosen = {
        kind: type(make_detokenizer(Tokenizer(build()))) for kind, build in made_tokenizers.KINDS.items()
    }
    assert chosen.pop("word_suffix") is WindowDetokenizer
    assert set(chosen.values()) == {ByteDetokenizer}


@pytest.mark.parametrize("seed", range(20))
def test_windows_give_the_same_text_as_bytes(byte_level: Tokenizer, seed: int) -> None:
    """The general way agrees with the exact one on text that holds no broken characters."""
    rng = random.Random(seed)
    ids = byte_level.encode("".join(rng.choice(ALPHABET) for _ in range(40)))
    windows = WindowDetokenizer(byte_level, [])
    assert "".join([*map(windows.push, ids), windows.flush()]) == byte_level.decode(ids)


def test_windows_do_not_wait_for_ever_on_broken_characters(byte_level: Tokenizer) -> None:
    half = byte_level.encode("é")[0]
    windows = WindowDetokenizer(byte_level, [])
    assert any(windows.push(half) for _ in range(8))
