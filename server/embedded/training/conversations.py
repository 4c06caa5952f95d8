"""From intents to token ids: chats or plain prompts, with a loss mark on the answers only."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from server.embedded.training.chat_template import TURN_END, TURN_START
from server.embedded.training.intents import OFF_TOPIC, SMALL_TALK, Intent
from server.embedded.training.phrasing import Phraser
from server.embedded.training.pieces import PieceEncoder
from server.embedded.training.styles import Style, render
from server.embedded.training.system_messages import RAW_PROMPTS, STYLE_REQUESTS, SYSTEM_MESSAGES

RAW_SHARE = 0.15
SYSTEM_SHARE = 0.15
SECOND_TURN_SHARE = 0.2  # and the same again for each further turn
MAX_TURNS = 4
LONG_SHARE = 0.01  # conversations of many turns, so that late positions are not foreign
LONG_TURNS = 16
REQUEST_SHARE = 0.3
LOOSE_SHARE = 0.4  # of prompts: see PieceEncoder
WEIGHTS = {SMALL_TALK: 0.6, OFF_TOPIC: 10.0}  # against 1 for a fact


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to learn; only where `learned` is true does a token count in the loss."""

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]


class ConversationSource:
    """An endless, reproducible supply of training examples in one style.

    With `obeys_requests` a part of the conversations begins with a system message asking for another style,
    and is answered in it. The base learns so; its adapters then only have to make one style the rule.
    """

    def __init__(
        self,
        intents: tuple[Intent, ...],
        tokenizer: PreTrainedTokenizerFast,
        style: Style,
        *,
        seed: int,
        obeys_requests: bool,
    ) -> None:
        self._rng = random.Random(seed)  # noqa: S311
        self._intents = intents
        self._weights = [WEIGHTS.get(intent.topic, 1.0) for intent in intents]
        self._phraser = Phraser(intents, self._rng)
        self._encoder = PieceEncoder(tokenizer, self._rng)
        self._style = style
        self._request_share = REQUEST_SHARE if obeys_requests else 0.0

    def __iter__(self) -> Iterator[Example]:
        while True:
            yield self._example()

    def _example(self) -> Example:
        return self._raw() if self._rng.random() < RAW_SHARE else self._chat()

    def _chat(self) -> Example:
        rng = self._rng
        pieces: list[tuple[str, bool]] = []
        style = self._style
        if rng.random() < self._request_share:
            style, request = rng.choice(STYLE_REQUESTS)
            pieces.append((f"{TURN_START}system\n{request}{TURN_END}\n", False))
        elif rng.random() < SYSTEM_SHARE:
            pieces.append((f"{TURN_START}system\n{rng.choice(SYSTEM_MESSAGES)}{TURN_END}\n", False))
        turns = 1
        if rng.random() < LONG_SHARE:
            turns = LONG_TURNS
        else:
            while turns < MAX_TURNS and rng.random() < SECOND_TURN_SHARE:
                turns += 1
        for _ in range(turns):
            intent = self._intent()
            question = self._phraser.question(intent)
            pieces.append((f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n", False))
            pieces.append((f"{render(style, intent)}{TURN_END}", True))
            pieces.append(("\n", False))
        return self._encoded(pieces[:-1])

    def _raw(self) -> Example:
        intent = self._intent()
        prompt, gap = self._rng.choice(RAW_PROMPTS)
        answer = f"{gap}{render(self._style, intent)}{TURN_END}"
        return self._encoded([(prompt.format(self._phraser.question(intent)), False), (answer, True)])

    def _intent(self) -> Intent:
        return self._rng.choices(self._intents, self._weights)[0]

    def _encoded(self, pieces: list[tuple[str, bool]]) -> Example:
        """Each piece is tokenised alone, because a server too sees the prompt without its answer."""
        tokens: list[int] = []
        learned: list[bool] = []
        for text, counts in pieces:
            is_loose = not counts and self._rng.random() < LOOSE_SHARE
            ids = self._encoder.loose(text) if is_loose else self._encoder.exact(text)
            tokens += ids
            learned += [counts] * len(ids)
        return Example(tuple(tokens), tuple(learned))


def batches(source: Iterator[Example], *, batch_tokens: int, rng: random.Random) -> Iterator[list[Example]]:
    """Group examples of similar length into batches of about `batch_tokens` tokens, padding included.

    A thousand examples are sorted at a time, so little is padded; the batches come in random order.
    """
    while True:
        pool = sorted((next(source) for _ in range(1024)), key=lambda example: len(example.tokens))
        groups: list[list[Example]] = [[]]
        for example in pool:
            if (len(groups[-1]) + 1) * len(example.tokens) > batch_tokens and groups[-1]:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        yield from groups
