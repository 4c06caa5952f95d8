"""What the scripted engine says where LoRAX's and TGI's routes ask for more than text."""

from collections.abc import Sequence
from dataclasses import replace

from server.types import Alternative, GeneratedToken, GenerationRequest, TokenEvent
from tests.server.api.fake_service import BOS, Script, finish_of, token_event


def alternatives(*texts: str) -> tuple[Alternative, ...]:
    """One character each, less likely one after the other; "" is the end-of-sequence token."""
    return tuple(Alternative(ord(text) if text else 2, -0.25 - i) for i, text in enumerate(texts))


def choices_of(*logprobs: Sequence[float]) -> Script:
    """One choice for each list of log-probabilities, whose tokens are "a0", "a1", … of the first, "b0", … of
    the second; seeds count from 7.
    """

    def script(request: GenerationRequest) -> list[TokenEvent]:
        events = []
        for index, of_choice in enumerate(logprobs):
            texts = [f"{'abcdefgh'[index]}{i}" for i in range(len(of_choice))]
            end = replace(finish_of(request, "".join(texts), len(texts)), seed=7 + index)
            for i, logprob in enumerate(of_choice):
                event = token_event(
                    texts[i],
                    index=index,
                    alternatives=alternatives("x", ""),
                    finish=end if i == len(texts) - 1 else None,
                )
                assert event.token is not None
                events.append(event._replace(token=event.token._replace(logprob=logprob)))
        return events

    return script


def with_prompt(script: Script) -> Script:
    """The same, and the first event of each choice lists the prompt's tokens; the last one cannot be."""

    def longer(request: GenerationRequest) -> list[TokenEvent]:
        begun: set[int] = set()
        events = []
        for event in script(request):
            if event.index not in begun:
                begun.add(event.index)
                event = event._replace(prompt=prompt_tokens(request))
            events.append(event)
        return events

    return longer


def prompt_tokens(request: GenerationRequest) -> tuple[GeneratedToken, ...]:
    """The first without a log-probability, the last with none that JSON could hold."""
    (ids,) = request.prompts
    tokens = [GeneratedToken(i, "<s>" if i == BOS else chr(i), i == BOS, -1.5) for i in ids]
    tokens[0] = tokens[0]._replace(logprob=None)
    tokens[-1] = tokens[-1]._replace(logprob=float("-inf"))
    return tuple(tokens)
