"""Prompts that are too long, made shorter for protocols whose clients expect that instead of a refusal.

A conversation loses its oldest turns first: what the system says stays, and so does all from some message of
the user on, so that the template sees a conversation as it likes them. Only what is too long then, and plain
text, is cut between tokens.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from server.api.records import Shortening, TokenisedPrompt

T = TypeVar("T")
Messages = tuple[dict[str, object], ...]


def fit_turns(
    messages: Messages,
    tokenise: Callable[[Messages], TokenisedPrompt],
    shortening: Shortening | None,
) -> TokenisedPrompt:
    """The conversation, without as few of its oldest turns as makes it short enough. If even its last turn is
    too long, that turn. Tokenises it a few times, not once for each turn.
    """
    whole = tokenise(messages)
    if shortening is None or len(whole.ids) <= shortening.beyond:
        return whole
    starts = [i for i, message in enumerate(messages) if i and message["role"] == "user"]
    low, high = 0, len(starts)  # starts[:low] leave too much, starts[high:] do not
    shortest = whole
    while low < high:
        middle = (low + high) // 2
        rest = tokenise(_from(messages, starts[middle]))
        if len(rest.ids) <= shortening.to:
            shortest, high = rest, middle
        else:
            low = middle + 1
    if starts and low == len(starts):
        return tokenise(_from(messages, starts[-1]))
    return shortest


def shortened(ids: Sequence[T], shortening: Shortening | None) -> Sequence[T]:
    """The first tokens and the last ones, if there are too many."""
    if shortening is None or len(ids) <= shortening.beyond:
        return ids
    rest = shortening.to - shortening.first
    return [*ids[: shortening.first], *ids[len(ids) - rest :]]


def clipped(text: str, shortening: Shortening | None, max_token_chars: int) -> str:
    """A text without what is cut out of it in any case. Still too long, but not longer than that takes to
    see, so that nothing is tokenised for nothing.
    """
    if shortening is None:
        return text
    first, last = shortening.first * max_token_chars, (shortening.beyond + 1) * max_token_chars
    return text if len(text) <= first + last else text[:first] + text[-last:]


def _from(messages: Messages, start: int) -> Messages:
    """What the system says before `start`, and everything from there on."""
    return (*(message for message in messages[:start] if message["role"] == "system"), *messages[start:])
