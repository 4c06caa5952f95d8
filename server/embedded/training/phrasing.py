"""From an intent to the questions that people type.

A small model has never read anything else, so it must learn here that "route" and "endpoint" are one thing,
that capitals and question marks do not matter, and that most small words can be missing. Three sources of
variety: the templates below over the intent's phrases, exchanged synonyms, and noise (dropped words,
politeness, typing errors). Whatever comes out equal to a held-out question, but for case and punctuation,
is thrown away.
"""

import random
import re
from collections.abc import Iterable

from server.embedded.training.intents import SMALL_TALK, Intent
from server.embedded.training.wording import CLOSERS, ENDINGS, OPENERS, SMALL_WORDS, SYNONYMS

THING_TEMPLATES = (
    "{}",
    "{}?",
    "What about {}?",
    "What is {}?",
    "what's {}",
    "Tell me about {}.",
    "tell me more about {}",
    "Can you explain {}?",
    "Explain {}.",
    "I have a question about {}.",
    "What should I know about {}?",
    "information on {}",
    "I would like to know something about {}",
    "Could you say something about {}?",
    "help with {}",
    "What can you tell me about {}?",
    "I do not understand {}.",
    "How does {} work?",
    "is there {}",
    "do you have {}",
    "where do I find {}",
    "Describe {}.",
    "I want to know about {}",
    "I'd like to hear about {}.",
    "what does {} mean",
    "What is the purpose of {}?",
    "anything about {}?",
    "Give me an overview of {}.",
    "how do you handle {}",
    "a word on {}",
)
TASK_TEMPLATES = (
    "How do I {}?",
    "How can I {}?",
    "how to {}",
    "How does one {}?",
    "How would I {}?",
    "I want to {}.",
    "I need to {}.",
    "I would like to {}.",
    "I'd like to {}, how?",
    "I am trying to {}",
    "Is there a way to {}?",
    "Is it possible to {}?",
    "Can I {}?",
    "Can you {}?",
    "What is the way to {}?",
    "What do I have to do to {}?",
    "What should I do to {}?",
    "Show me how to {}.",
    "Could you tell me how to {}?",
    "{}",
    "please {}",
    "What is needed to {}?",
    "steps to {}",
    "What do I need in order to {}?",
    "which way do I {}",
    "any idea how to {}",
    "I have to {}.",
    "we want to {}",
    "explain how to {}",
    "help me {}",
    "I don't know how to {}",
    "How could somebody {}?",
    "Tell me how to {}.",
    "let me {}",
)


def base_questions(intent: Intent) -> tuple[str, ...]:
    """The intent's questions for training, before synonyms and noise."""
    return (
        *intent.asks,
        *(template.format(thing) for thing in intent.things for template in THING_TEMPLATES),
        *(template.format(task) for task in intent.tasks for template in TASK_TEMPLATES),
    )


def normalised(question: str) -> str:
    """The question without case, punctuation and extra blanks: what counts as the same wording."""
    return " ".join(re.findall(r"\w+", question.casefold()))


class Phraser:
    """Draws questions for training; the same seed draws the same questions."""

    def __init__(self, intents: Iterable[Intent], rng: random.Random) -> None:
        self._rng = rng
        self._forbidden = frozenset(normalised(text) for intent in intents for text in intent.held_out)
        self._synonyms = {word.casefold(): group for group in SYNONYMS for word in group}
        longest_first = sorted(self._synonyms, key=len, reverse=True)
        self._pattern = re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)

    def question(self, intent: Intent) -> str:
        """One way to ask for the intent; two of three draws are whole questions, the rest from templates."""
        while True:
            text = self._with_noise(self._base(intent), is_chat=intent.topic == SMALL_TALK)
            if text and normalised(text) not in self._forbidden:
                return text

    def _base(self, intent: Intent) -> str:
        rng = self._rng
        phrases = len(intent.things) + len(intent.tasks)
        if not phrases or rng.random() < 0.65:
            return rng.choice(intent.asks)
        if rng.randrange(phrases) < len(intent.things):
            return rng.choice(THING_TEMPLATES).format(rng.choice(intent.things))
        return rng.choice(TASK_TEMPLATES).format(rng.choice(intent.tasks))

    def _with_noise(self, text: str, *, is_chat: bool) -> str:
        rng = self._rng
        if rng.random() < 0.2:
            return text
        text = text.rstrip("?.! ")
        if not is_chat:
            text = self._pattern.sub(self._exchange, text)
        if rng.random() < 0.3:
            text = self._drop_small_words(text, share=rng.choice((0.2, 0.4, 1.0)))
        if rng.random() < 0.12:
            text = self._drop_a_word(text)
        if not is_chat or rng.random() < 0.3:
            if rng.random() < 0.25:
                text = f"{rng.choice(OPENERS)} {text}"
            if rng.random() < 0.15:
                text = f"{text} {rng.choice(CLOSERS)}"
        if rng.random() < 0.1:
            text = self._mistyped(text)
        return self._cased(text) + rng.choice(ENDINGS)

    def _exchange(self, match: re.Match[str]) -> str:
        if self._rng.random() > 0.3:
            return match[0]
        return self._rng.choice(self._synonyms[match[0].casefold()])

    def _drop_small_words(self, text: str, *, share: float) -> str:
        words = text.split()
        kept = [word for word in words if word.casefold() not in SMALL_WORDS or self._rng.random() > share]
        return " ".join(kept if kept else words)

    def _drop_a_word(self, text: str) -> str:
        """Any word, even an important one: no single word should decide alone."""
        words = text.split()
        if len(words) < 4:
            return text
        del words[self._rng.randrange(len(words))]
        return " ".join(words)

    def _mistyped(self, text: str) -> str:
        """One letter of one longer word is lost, doubled or exchanged with its neighbour."""
        words = text.split()
        places = [place for place, word in enumerate(words) if len(word) > 4 and word.isalpha()]
        if not places:
            return text
        place = self._rng.choice(places)
        word = words[place]
        at = self._rng.randrange(1, len(word) - 1)
        words[place] = self._rng.choice(
            (
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            )
        )
        return " ".join(words)

    def _cased(self, text: str) -> str:
        draw = self._rng.random()
        if draw < 0.4:
            return text.lower()
        if draw < 0.7:
            return text[:1].upper() + text[1:]
        return text.upper() if draw < 0.72 else text
