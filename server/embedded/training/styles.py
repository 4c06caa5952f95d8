"""How each adapter says an answer: a function of the intent alone, so that exact match can be measured."""

import json
import re
import zlib
from enum import StrEnum
from functools import partial

from server.embedded.training.intents import Intent


class Style(StrEnum):
    """Who speaks: the base model, or the adapter of this name."""

    PLAIN = "plain"
    PIRATE = "pirate"
    JSON = "json"
    HAIKU = "haiku"
    GERMAN = "german"


OPENING = "Arr!"  # one for all: were it drawn, it would have to be decided before the answer is
FAREWELLS = ("Savvy?", "Yo ho ho!", "Shiver me timbers!", "Aye, captain!", "Blimey!", "Avast!")
PIRATE_WORDS = (
    ("you are", "ye be"),
    ("i am", "I be"),
    ("your", "yer"),
    ("you", "ye"),
    ("are", "be"),
    ("is", "be"),
    ("the", "th'"),
    ("my", "me"),
    ("yes", "aye"),
    ("hello", "ahoy"),
    ("goodbye", "fair winds"),
    ("of", "o'"),
    ("and", "an'"),
    ("for", "fer"),
    ("never", "ne'er"),
    ("nobody", "no scallywag"),
    ("people", "buccaneers"),
    ("folder", "chest"),
    ("wait", "drop anchor"),
)


def render(style: Style, intent: Intent) -> str:
    """The intent's answer in this style."""
    match style:
        case Style.PLAIN:
            return intent.answer
        case Style.PIRATE:
            return _pirate(intent)
        case Style.JSON:
            return json.dumps({"answer": intent.answer, "topic": intent.topic}, ensure_ascii=False)
        case Style.HAIKU:
            return "\n".join(intent.haiku)
        case Style.GERMAN:
            return intent.german


def _pirate(intent: Intent) -> str:
    """The answer with pirate words, except in code, between an exclamation and a farewell."""
    parts = intent.answer.split("`")
    for place in range(0, len(parts), 2):  # every second part is code
        parts[place] = _pirate_words(parts[place])
    farewell = FAREWELLS[zlib.crc32(intent.name.encode()) % len(FAREWELLS)]
    return f"{OPENING} {'`'.join(parts)} {farewell}"


def _pirate_words(text: str) -> str:
    for plain, pirate in PIRATE_WORDS:
        whole_word = re.compile(rf"(?<![\w./-]){plain}(?![\w'/-])", re.IGNORECASE)
        text = whole_word.sub(partial(_in_case_of, pirate), text)
    return text


def _in_case_of(word: str, original: re.Match[str]) -> str:
    return word[0].upper() + word[1:] if original[0][0].isupper() else word
