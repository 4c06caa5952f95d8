"""Chunkers lose nothing, wherever the text is cut. Row Z11."""

import pytest

from server.api.openai.chunking import ChunkBy, Chunker

TEXT = "He said: 3.14 is pi! “Really?” Yes…\nEnd。次の文！  Two  spaces. no end"  # noqa: RUF001 - an East Asian mark is meant


@pytest.mark.parametrize("by", ["token", "word", "sentence"])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 1000])
def test_joined_pieces_are_the_text(by: ChunkBy, size: int, width: int) -> None:
    chunker = Chunker(by, size)
    pieces = [chunker.take(TEXT[i : i + width]) for i in range(0, len(TEXT), width)]

    assert "".join(pieces) + chunker.flush() == TEXT
    assert chunker.flush() == ""


def test_words_come_out_when_the_next_one_begins() -> None:
    chunker = Chunker("word", 1)

    assert [chunker.take(text) for text in ("He", "llo", " wor", "ld", "\n", "x")] == [
        "",
        "",
        "Hello",
        "",
        " world",
        "",
    ]


def test_sentences_end_at_marks_and_lines() -> None:
    chunker = Chunker("sentence", 1)
    pieces = [chunker.take(character) for character in TEXT]

    assert [piece for piece in pieces if piece] == [
        "He said: 3.14 is pi!",
        " “Really?”",
        " Yes…\n",
        "End。",
        "次の文！",  # noqa: RUF001 - an East Asian mark is meant
        "  Two  spaces.",
    ]


def test_text_without_an_end_is_not_held_for_ever() -> None:
    chunker = Chunker("sentence", 1)
    pieces = [chunker.take("word ") for _ in range(2000)]

    assert sum(map(bool, pieces)) >= 2


def test_words_of_languages_without_spaces_are_their_characters() -> None:
    chunker = Chunker("word", 1)

    assert [chunker.take(text) for text in ("次", "の文", "。 Two", " words")] == [
        "次",
        "の文",
        "。",
        " Two",
    ]
    assert chunker.flush() == " words"


def test_characters_of_several_code_points_are_not_cut() -> None:
    text = "Family \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u0e44\u0e17\u0e22 end"
    chunker = Chunker("word", 1)
    pieces = [chunker.take(character) for character in text] + [chunker.flush()]

    assert [piece for piece in pieces if piece] == [
        "Family",
        " \U0001f468\u200d\U0001f469\u200d\U0001f467",
        " e\u0301",
        " \u0e44\u0e17\u0e22",
        " end",
    ]
