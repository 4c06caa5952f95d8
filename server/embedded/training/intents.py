"""What the built-in model knows: the records of `facts/*.toml`, `off_topic.toml` and `haikus.toml`.

An intent is one thing that a person may want to know, with its one answer in each language. Its questions
come in four kinds: `asks` are whole questions, `things` and `tasks` are phrases from which `phrasing`
composes more, and `held_out` are questions that training never sees and the score is measured on.
"""

import random
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

OFF_TOPIC_QUESTIONS = 4000
SMALL_TALK = "small talk"
OFF_TOPIC = "off topic"


@dataclass(frozen=True, slots=True)
class Intent:
    """One thing to know: its answer, and the ways to ask for it."""

    name: str
    topic: str
    answer: str
    german: str
    haiku: tuple[str, ...]  # three lines
    asks: tuple[str, ...]  # whole questions
    things: tuple[str, ...]  # noun phrases: "the port"
    tasks: tuple[str, ...]  # verb phrases: "change the port"
    held_out: tuple[str, ...]  # never trained on

    @property
    def is_fact(self) -> bool:
        """True for what concerns Motet, false for small talk and off-topic questions."""
        return self.topic not in (SMALL_TALK, OFF_TOPIC)


def load_intents() -> tuple[Intent, ...]:
    """All intents in a fixed order: facts and small talk by file, then the off-topic one."""
    folder = resources.files(__package__)
    haikus = _parse(folder / "haikus.toml")
    files = sorted((folder / "facts").iterdir(), key=lambda file: file.name)
    intents = [
        _intent(record, table["topic"], haikus)
        for table in (_parse(file) for file in files if file.name.endswith(".toml"))
        for record in table["fact"]
    ]
    return (*intents, _off_topic(_parse(folder / "off_topic.toml"), haikus))


def _parse(file: Traversable) -> dict[str, Any]:
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _intent(record: dict[str, Any], topic: str, haikus: dict[str, Any]) -> Intent:
    poem: str = haikus["intents"].get(record["name"]) or haikus["topics"][topic]
    return Intent(
        name=record["name"],
        topic=topic,
        answer=record["answer"],
        german=record["german"],
        haiku=tuple(poem.split(" / ")),
        asks=tuple(record["asks"]),
        things=tuple(record.get("things", ())),
        tasks=tuple(record.get("tasks", ())),
        held_out=tuple(record["held_out"]),
    )


def _off_topic(table: dict[str, Any], haikus: dict[str, Any]) -> Intent:
    """Fill the templates with words, always the same ones; held-out templates get held-out words too."""
    rng = random.Random(0)  # noqa: S311
    words = table["words"]
    all_words = {kind: words[kind] + table["held_out_words"][kind] for kind in words}
    asks = {_fill(rng.choice(table["templates"]), words, rng) for _ in range(OFF_TOPIC_QUESTIONS)}
    held_out = {_fill(template, all_words, rng) for template in table["held_out_templates"] * 2}
    record = {**table, "asks": sorted(asks), "held_out": sorted(held_out)}
    return _intent(record, table["topic"], haikus)


def _fill(template: str, words: dict[str, list[str]], rng: random.Random) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: rng.choice(words[match[1]]), template)
