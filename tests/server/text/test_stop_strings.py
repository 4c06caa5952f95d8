"""A stop string is found wherever the text is cut, and only what may still become one is held back."""

import random

import pytest

from server.text.stop_strings import StopStrings


def feed(stop: list[str], pieces: list[str], *, keep_stop: bool = False) -> tuple[str, str | None]:
    """All text that comes out, and the match; what a stream does with a matcher."""
    matcher = StopStrings(stop, keep_stop)
    out = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        out += text
        if matched is not None:
            return out, matched
    return out + matcher.flush(), None


def expected(stop: list[str], text: str, *, keep_stop: bool) -> tuple[str, str | None]:
    """The definition: the first end of any stop string, and there the longest."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[:end] if keep_stop else text[: end - len(longest)], longest
    return text, None


CASES = [
    (["\n\n"], "one\ntwo\n\nthree"),
    (["STOP"], "go on, STOPPED"),
    (["abc", "b"], "xabc"),
    (["ab", "abc"], "xabc"),
    (["xab", "b"], "xxab"),
    (["aab"], "aaaab"),
    (["abab", "babb"], "ababb"),
    (["ababc"], "abababc"),
    (["."], "."),
    (["日本"], "これは日本語"),
    (["👍🏽"], "a👍b👍🏽c"),
    (["never"], "nev neve ever"),
    (["end"], "en"),
]


@pytest.mark.parametrize("keep_stop", [False, True])
@pytest.mark.parametrize(("stop", "text"), CASES)
def test_whole_and_one_character_at_a_time_are_equal(stop: list[str], text: str, keep_stop: bool) -> None:
    want = expected(stop, text, keep_stop=keep_stop)
    assert feed(stop, [text], keep_stop=keep_stop) == want
    assert feed(stop, list(text), keep_stop=keep_stop) == want


@pytest.mark.parametrize("seed", range(300))
def test_random_stops_and_cuts_follow_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    stop = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 4))]
    text = "".join(rng.choices("abc", weights=[4, 4, 1], k=rng.randint(0, 20)))
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    keep_stop = bool(seed % 2)
    assert feed(stop, pieces, keep_stop=keep_stop) == expected(stop, text, keep_stop=keep_stop)


def test_only_the_possible_beginning_is_held_back() -> None:
    matcher = StopStrings(["</end>"], keep_stop=False)
    assert matcher.push("hello </e") == ("hello ", None)
    assert matcher.push("m> <") == ("</em> ", None)
    assert matcher.flush() == "<"


def test_nothing_is_held_back_when_the_stop_string_is_kept() -> None:
    matcher = StopStrings(["</end>"], keep_stop=True)
    assert matcher.push("hello </e") == ("hello </e", None)
    assert matcher.push("nd> more") == ("nd>", "</end>")


def test_before_min_tokens_a_stop_string_is_ordinary_text() -> None:
    matcher = StopStrings(["ab"], keep_stop=False)
    assert matcher.push("xab", may_stop=False) == ("xab", None)
    assert matcher.push("yab") == ("y", "ab")


def test_a_stop_string_may_begin_before_min_tokens_and_end_after() -> None:
    matcher = StopStrings(["aba"], keep_stop=False)
    assert matcher.push("xaba", may_stop=False) == ("xab", None)
    assert matcher.push("ba") == ("", "aba")


def test_another_choice_starts_afresh() -> None:
    first = StopStrings(["ab"], keep_stop=False)
    first.push("a")
    second = first.again()
    assert second.push("b") == ("b", None)
    assert first.push("b") == ("", "ab")


def test_no_stop_strings_pass_everything() -> None:
    assert feed([], ["any", "thing"]) == ("anything", None)
