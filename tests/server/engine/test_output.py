"""What a choice shows its client for what the engine says."""

import random
from collections.abc import Sequence

import pytest

from server.engine.output import Choice
from server.engine.plan import SampledToken, ScoredToken, SequenceOutput
from server.engine.sequence import SequenceId
from server.text.stop_strings import StopStrings
from server.text.tokenizer import Tokenizer
from server.types import (
    Alternative,
    Finish,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StopCriteria,
    TokenEvent,
)
from tests import made_tokenizers

TOKENIZER = Tokenizer(made_tokenizers.byte_level())
EOS = TOKENIZER.encode(made_tokenizers.EOS)[0]
ID = SequenceId(1)


def make_choice(
    *,
    stop: Sequence[str] = (),
    keep_stop: bool = False,
    min_tokens: int = 0,
    tokenizer: Tokenizer = TOKENIZER,
    num_prompt_logprobs: int | None = None,
    prompt_text: str = "the cat",
) -> Choice:
    criteria = StopCriteria(max_tokens=100, min_tokens=min_tokens, stop=tuple(stop), keep_stop=keep_stop)
    sampling = SamplingParams(num_prompt_logprobs=num_prompt_logprobs)
    prompt = tuple(tokenizer.encode(prompt_text))
    request = GenerationRequest("r", (prompt,), sampling, criteria, received=1.0)
    stops = StopStrings(stop, keep_stop) if stop else None
    return Choice(ID, request, tokenizer, stops, index=0, seed=7, queued=2.0)


def says(
    token_id: int | None,
    finish: FinishReason | None = None,
    *,
    stop_token: int | None = None,
    error: str | None = None,
) -> SequenceOutput:
    token = None if token_id is None else SampledToken(ID, token_id, -0.5, (Alternative(token_id, -0.5),))
    return SequenceOutput(ID, token, finish, stop_token, started=3.0, num_cached=1, error=error)


def run(
    choice: Choice, ids: Sequence[int], last: FinishReason | None = FinishReason.LENGTH
) -> list[TokenEvent]:
    """Feed ids as the engine would, one per second, until the choice has its finish."""
    events = []
    for i, token_id in enumerate(ids):
        if choice.finish is None:
            finish = last if i == len(ids) - 1 else None
            event = choice.advance(says(token_id, finish), at=4.0 + i)
            assert event is not None, "a token is always news"
            events.append(event)
    return events


def text_of(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def finish_of(events: Sequence[TokenEvent]) -> Finish:
    """The one finish, which is the last event's."""
    [finish] = [event.finish for event in events if event.finish is not None]
    assert events[-1].finish is finish
    return finish


def test_a_plain_answer_has_text_usage_timing_and_seed() -> None:
    events = run(make_choice(), TOKENIZER.encode(" sat on the mat"))
    finish = finish_of(events)
    assert text_of(events) == finish.generated_text == " sat on the mat"
    assert finish.reason is FinishReason.LENGTH
    assert finish.usage.prompt_tokens == len(TOKENIZER.encode("the cat"))
    assert (finish.usage.generated_tokens, finish.usage.cached_tokens) == (len(events), 1)
    assert (finish.timing.received, finish.timing.queued, finish.timing.started) == (1.0, 2.0, 3.0)
    assert (finish.timing.first_token, finish.timing.last_token) == (4.0, 3.0 + len(events))
    assert finish.seed == 7
    assert finish.error is None


def test_end_of_sequence_is_a_special_token_and_not_text() -> None:
    events = run(make_choice(), [*TOKENIZER.encode("hi"), EOS], FinishReason.STOP)
    finish = finish_of(events)
    assert finish.generated_text == "hi"
    assert finish.stop is None
    assert events[-1].token is not None
    assert (events[-1].token.text, events[-1].token.is_special) == ("</s>", True)
    assert events[-1].text == ""


def test_special_tokens_in_the_middle_are_spelled_out_only_in_tokens() -> None:
    events = run(make_choice(), [EOS, *TOKENIZER.encode("a")])
    assert [event.text for event in events] == ["", "a"]
    assert [event.token.text for event in events if event.token] == ["</s>", "a"]


@pytest.mark.parametrize(("keep_stop", "text"), [(False, "ab"), (True, "abc")])
def test_a_stop_token_is_part_of_the_answer_only_if_stops_are_kept(keep_stop: bool, text: str) -> None:
    [a], [b], [c] = map(TOKENIZER.encode, "abc")
    choice = make_choice(keep_stop=keep_stop)
    events = run(choice, [a, b], last=None)
    events.append(choice.advance(says(c, FinishReason.STOP, stop_token=c), at=9.0))
    finish = finish_of(events)
    assert (finish.generated_text, finish.stop) == (text, c)
    assert events[-1].token is not None
    assert (events[-1].token.text, events[-1].token.is_special) == ("c", not keep_stop)


def test_a_stop_string_across_tokens_is_stripped_and_never_shown() -> None:
    ids = [token for character in "one END two" for token in TOKENIZER.encode(character)]
    events = run(make_choice(stop=["END"]), ids)
    finish = finish_of(events)
    assert text_of(events) == finish.generated_text == "one "
    assert (finish.reason, finish.stop) == (FinishReason.STOP, "END")
    assert finish.usage.generated_tokens == len("one END")


def test_a_kept_stop_string_cuts_the_last_token_right_after_it() -> None:
    tokenizer = Tokenizer(made_tokenizers.byte_fallback(drops_first_space=False))
    ids = tokenizer.encode("a the")  # "▁the" is one token
    events = run(make_choice(stop=["th"], keep_stop=True, tokenizer=tokenizer), ids)
    assert finish_of(events).generated_text == "a th"
    assert [event.token.text for event in events if event.token] == ["a", " th"]


def test_a_stripped_stop_string_inside_a_token_cuts_the_text_before_it() -> None:
    tokenizer = Tokenizer(made_tokenizers.byte_fallback(drops_first_space=False))
    events = run(make_choice(stop=["h"], tokenizer=tokenizer), tokenizer.encode("a the"))
    assert text_of(events) == "a t"
    assert [event.token.text for event in events if event.token] == ["a", " the"]


def test_held_back_text_is_shown_when_the_answer_ends_otherwise() -> None:
    ids = [token for character in "an EN" for token in TOKENIZER.encode(character)]
    events = run(make_choice(stop=["END"]), ids)
    assert [event.text for event in events] == ["a", "n", " ", "", "EN"]
    assert finish_of(events).generated_text == "an EN"


def test_a_stop_string_that_ends_with_the_last_allowed_token_is_a_stop() -> None:
    ids = [token for character in "xEND" for token in TOKENIZER.encode(character)]
    finish = finish_of(run(make_choice(stop=["END"]), ids, FinishReason.LENGTH))
    assert (finish.reason, finish.generated_text) == (FinishReason.STOP, "x")


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    ids = [token for character in "aEbEc" for token in TOKENIZER.encode(character)]
    finish = finish_of(run(make_choice(stop=["E"], min_tokens=3), ids))
    assert (finish.generated_text, finish.usage.generated_tokens) == ("aEb", 4)


def test_the_token_that_reaches_min_tokens_may_stop() -> None:
    ids = [token for character in "aEb" for token in TOKENIZER.encode(character)]
    finish = finish_of(run(make_choice(stop=["E"], min_tokens=2), ids))
    assert (finish.generated_text, finish.usage.generated_tokens) == ("a", 2)


def test_an_unfinished_character_at_the_end_is_replaced() -> None:
    first, *_ = TOKENIZER.encode("é")
    events = run(make_choice(), [first])
    assert text_of(events) == finish_of(events).generated_text == "\ufffd"
    assert events[0].token is not None
    assert events[0].token.text == "\ufffd"


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
def test_an_end_without_a_token_keeps_what_was_said(reason: FinishReason) -> None:
    choice = make_choice()
    events = run(choice, TOKENIZER.encode("hi"), last=None)
    events.append(choice.end(reason, at=9.0, error="the server is shutting down"))
    finish = finish_of(events)
    assert (finish.reason, finish.generated_text) == (reason, "hi")
    assert finish.error == "the server is shutting down"
    assert events[-1].token is None


def test_an_engine_error_before_the_first_token_has_a_message_and_times() -> None:
    event = make_choice().advance(says(None, FinishReason.ERROR, error="it does not fit"), at=5.0)
    assert event.finish is not None
    assert (event.finish.error, event.finish.usage.generated_tokens) == ("it does not fit", 0)
    assert event.finish.timing.first_token == 5.0


def test_an_error_without_words_gets_some() -> None:
    event = make_choice().advance(says(None, FinishReason.ERROR), at=5.0)
    assert event.finish is not None
    assert event.finish.error


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("keep_stop", [False, True])
def test_events_always_join_to_the_generated_text(seed: int, keep_stop: bool) -> None:
    """Any ids, any stop strings: deltas = generated_text, and with kept stops the tokens' texts too."""
    rng = random.Random(seed)
    ids = [rng.randrange(TOKENIZER.vocab_size) for _ in range(40)]
    stop = [TOKENIZER.decode(rng.sample(ids, 2)) or "x" for _ in range(3)]
    choice = make_choice(stop=stop, keep_stop=keep_stop)
    events = run(choice, ids)
    finish = finish_of(events)
    assert text_of(events) == finish.generated_text
    assert finish.usage.generated_tokens == len(events)
    tokens = "".join(event.token.text for event in events if event.token and not event.token.is_special)
    if keep_stop:
        assert tokens == finish.generated_text
    else:
        assert tokens.startswith(finish.generated_text)


# --- prompts ----------------------------------------------------------------------------------------------


def tells(
    ids: Sequence[int], token_id: int | None = None, finish: FinishReason | None = None
) -> SequenceOutput:
    """Scores of prompt tokens, and perhaps a token or an end."""
    scores = tuple(ScoredToken(i, -0.25, (Alternative(i + 1, -0.125),)) for i in ids)
    token = None if token_id is None else SampledToken(ID, token_id)
    return SequenceOutput(ID, token, finish, None, started=3.0, num_cached=0, scores=scores)


def test_scores_of_a_prompt_are_collected_and_leave_with_the_first_token() -> None:
    choice = make_choice(num_prompt_logprobs=1, prompt_text="the cät sat")
    prompt = TOKENIZER.encode("the cät sat")
    [token_id] = TOKENIZER.encode("x")
    assert choice.advance(tells(prompt[1:3]), at=4.0) is None
    assert choice.advance(tells(prompt[3:4]), at=5.0) is None
    first = choice.advance(tells(prompt[4:], token_id), at=6.0)
    second = choice.advance(tells([], token_id, FinishReason.LENGTH), at=7.0)
    assert first is not None
    assert second is not None
    assert [token.id for token in first.prompt] == prompt
    assert [token.logprob for token in first.prompt] == [None] + [-0.25] * (len(prompt) - 1)
    assert first.prompt[0].alternatives == ()
    assert first.prompt[1].alternatives == (Alternative(prompt[1] + 1, -0.125),)
    assert "".join(token.text for token in first.prompt) == "the cät sat"
    assert second.prompt == ()
    assert finish_of([first, second]).timing.first_token == 6.0


def test_special_tokens_of_a_scored_prompt_are_spelled_out() -> None:
    choice = make_choice(num_prompt_logprobs=0, prompt_text=f"hi{made_tokenizers.EOS}ho")
    prompt = TOKENIZER.encode(f"hi{made_tokenizers.EOS}ho")
    event = choice.advance(tells(prompt[1:], None, FinishReason.LENGTH), at=4.0)
    assert event is not None
    [special] = [token for token in event.prompt if token.is_special]
    assert special.text == made_tokenizers.EOS


def test_a_prompt_alone_ends_with_its_scores_or_its_vector_and_no_token() -> None:
    prompt = TOKENIZER.encode("the cat")
    scored = make_choice(num_prompt_logprobs=0).advance(tells(prompt[1:], None, FinishReason.LENGTH), at=4.0)
    pooled = make_choice().advance(
        SequenceOutput(ID, None, FinishReason.LENGTH, None, 3.0, 0, vector=(0.6, 0.8)), at=4.0
    )
    assert scored is not None
    assert pooled is not None
    assert [token.id for token in scored.prompt] == prompt
    assert (scored.vector, pooled.vector) == (None, (0.6, 0.8))
    for event in (scored, pooled):
        assert (event.text, event.token) == ("", None)
        assert finish_of([event]).reason is FinishReason.LENGTH
        assert finish_of([event]).usage.generated_tokens == 0
        assert finish_of([event]).timing.last_token == 4.0


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_half_a_prompt_is_not_shown(reason: FinishReason) -> None:
    choice = make_choice(num_prompt_logprobs=0)
    assert choice.advance(tells(TOKENIZER.encode("the cat")[1:2]), at=4.0) is None
    event = choice.advance(tells([], None, reason), at=5.0)
    assert event is not None
    assert event.prompt == ()
    assert finish_of([event]).reason is reason
