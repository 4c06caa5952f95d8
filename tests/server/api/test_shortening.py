"""Prompts that are made shorter: what goes, and that no more goes than has to."""

import random

import pytest

from server.api.records import Shortening, TokenisedPrompt
from server.api.shortening import Messages, clipped, fit_turns, shortened


def chars(messages: Messages) -> TokenisedPrompt:
    """One character, one token."""
    text = "".join(str(message["content"]) for message in messages)
    return TokenisedPrompt(tuple(map(ord, text)), text)


def talk(*turns: tuple[str, str]) -> Messages:
    return tuple({"role": role, "content": content} for role, content in turns)


def test_what_is_short_enough_stays() -> None:
    messages = talk(("user", "12345"), ("assistant", "678"), ("user", "90"))

    assert fit_turns(messages, chars, Shortening(beyond=10, to=2, first=1)).text == "1234567890"
    assert fit_turns(messages, chars, None).text == "1234567890"


def test_the_oldest_turns_go_and_the_systems_words_stay() -> None:
    messages = talk(
        ("system", "S"),
        ("user", "aaa"),
        ("assistant", "bbb"),
        ("user", "cc"),
        ("assistant", "d"),
        ("user", "e"),
    )

    assert fit_turns(messages, chars, Shortening(beyond=9, to=5, first=0)).text == "Sccde"
    assert fit_turns(messages, chars, Shortening(beyond=9, to=4, first=0)).text == "Se"


def test_the_last_turn_stays_even_if_it_is_too_long() -> None:
    messages = talk(("user", "aaa"), ("assistant", "b"), ("user", "0123456789"))

    assert fit_turns(messages, chars, Shortening(beyond=5, to=3, first=0)).text == "0123456789"


def test_a_single_message_is_left_to_be_cut() -> None:
    messages = talk(("system", "S"), ("user", "0123456789"))

    assert fit_turns(messages, chars, Shortening(beyond=5, to=3, first=0)).text == "S0123456789"


@pytest.mark.parametrize("seed", range(20))
def test_no_turn_more_goes_than_has_to(seed: int) -> None:
    dice = random.Random(seed)
    messages = talk(
        *((("user", "assistant")[i % 2], "x" * dice.randint(1, 20)) for i in range(dice.randrange(1, 60)))
    )
    whole = len(chars(messages).ids)
    limit = Shortening(beyond=whole - 1, to=dice.randint(1, whole), first=0)
    calls = 0

    def counted(some: Messages) -> TokenisedPrompt:
        nonlocal calls
        calls += 1
        return chars(some)

    kept = len(fit_turns(messages, counted, limit).ids)

    starts = [i for i, message in enumerate(messages) if message["role"] == "user"][1:]
    fitting = [n for i in starts if (n := len(chars(messages[i:]).ids)) <= limit.to]
    last = len(chars(messages[starts[-1] :]).ids) if starts else whole
    assert kept == (max(fitting) if fitting else last)
    assert calls <= 9


def test_tokens_are_cut_out_of_the_middle() -> None:
    ids = range(10)

    assert shortened(ids, Shortening(beyond=9, to=5, first=2)) == [0, 1, 7, 8, 9]
    assert shortened(ids, Shortening(beyond=9, to=5, first=0)) == [5, 6, 7, 8, 9]
    assert shortened(ids, Shortening(beyond=9, to=5, first=5)) == [0, 1, 2, 3, 4]
    assert shortened(ids, Shortening(beyond=10, to=5, first=2)) is ids
    assert shortened(ids, None) is ids


@pytest.mark.parametrize("size", [10, 100, 1000])
def test_a_clipped_text_is_cut_to_the_same_tokens(size: int) -> None:
    """With tokens of up to four characters, here of exactly one and of exactly four."""
    text = "".join(random.Random(size).choices("abcd", k=4 * size))
    limit = Shortening(beyond=20, to=11, first=3)
    short = clipped(text, limit, 4)

    assert shortened(short, limit) == shortened(text, limit)
    fours = [text[i : i + 4] for i in range(0, len(text), 4)]
    short_fours = [short[i : i + 4] for i in range(0, len(short), 4)]
    assert list(shortened(short_fours, limit)) == list(shortened(fours, limit))
    assert len(short) <= 4 * (3 + 21)


def test_a_text_is_clipped_only_if_it_must_be_too_long() -> None:
    assert clipped("x" * 96, Shortening(beyond=20, to=11, first=3), 4) == "x" * 96
    assert clipped("x" * 1000, None, 4) == "x" * 1000
