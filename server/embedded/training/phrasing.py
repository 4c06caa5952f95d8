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
SYNONYMS = (
    ("route", "endpoint", "path", "url"),
    ("routes", "endpoints", "paths", "urls"),
    ("start", "launch", "run", "boot", "fire up"),
    ("starts", "launches", "runs", "boots"),
    ("started", "launched", "booted"),
    ("starting", "launching", "booting"),
    ("stop", "quit", "halt", "end"),
    ("stops", "ends", "halts"),
    ("stopped", "ended", "halted"),
    ("stopping", "ending", "halting"),
    ("adapter", "lora", "lora adapter", "fine-tuned adapter"),
    ("adapters", "loras", "lora adapters", "fine-tuned adapters"),
    ("flag", "option", "setting", "switch", "argument", "parameter"),
    ("flags", "options", "settings", "switches", "arguments", "parameters"),
    ("choose", "pick", "select", "specify"),
    ("chooses", "picks", "selects", "specifies"),
    ("chosen", "picked", "selected"),
    ("use", "work with", "try", "employ"),
    ("used", "employed", "tried"),
    ("uses", "employs"),
    ("folder", "directory"),
    ("folders", "directories"),
    ("answer", "reply", "response"),
    ("answers", "replies", "responses"),
    ("answered", "replied to"),
    ("show", "display", "print"),
    ("shows", "displays", "prints"),
    ("limit", "restrict", "bound", "cap"),
    ("maximum", "largest", "max", "highest"),
    ("big", "large"),
    ("bigger", "larger"),
    ("long", "lengthy"),
    ("error", "failure", "problem"),
    ("errors", "failures", "problems"),
    ("machine", "computer", "laptop", "pc"),
    ("machines", "computers", "devices"),
    ("licence", "license"),
    ("supported", "possible", "available", "allowed"),
    ("support", "allow", "offer"),
    ("change", "set", "configure", "adjust", "alter"),
    ("changed", "altered", "adjusted"),
    (
        "does motet support",
        "does motet have",
        "is there",
        "does the server support",
        "do you support",
        "do you have",
    ),
    ("see", "find", "get", "check", "look up"),
    ("tell me", "let me know", "show me", "say"),
    ("tells", "says"),
    ("explain", "describe", "clarify"),
    ("remove", "delete", "drop", "take out"),
    ("removed", "deleted", "dropped"),
    ("add", "register", "bring in"),
    ("added", "registered"),
    ("happens", "occurs", "goes on"),
    ("mean", "stand for", "signify"),
    ("different", "several", "various"),
    ("broken", "corrupt", "corrupted", "damaged", "invalid"),
    ("prompt", "input", "request text"),
    ("prompts", "inputs"),
    ("generation", "text generation", "decoding"),
    ("client", "app", "application"),
    ("clients", "apps", "applications"),
    ("turn off", "disable", "switch off", "deactivate"),
    ("turn on", "enable", "switch on", "activate"),
    ("turned off", "disabled", "switched off", "deactivated"),
    ("turned on", "enabled", "switched on", "activated"),
    ("motet", "the server", "this server", "your server"),
    ("which", "what"),
    ("while", "when"),
    ("at once", "at the same time", "together", "simultaneously", "in parallel"),
    ("by default", "normally", "out of the box", "if I say nothing"),
    ("cancel", "abort", "interrupt"),
    ("cancelled", "aborted", "interrupted"),
    ("made", "created", "built", "produced"),
    ("make", "create", "build", "produce"),
    ("needed", "required", "necessary"),
    ("need", "require", "have to have"),
    ("works", "functions"),
    ("fast", "quick", "quickly"),
    ("contain", "carry", "hold", "include"),
    ("contains", "carries", "holds", "includes"),
    ("number", "count", "amount"),
    ("why", "for what reason", "how come"),
    ("what is", "what's", "whats", "what exactly is"),
    (
        "how do i",
        "how can i",
        "how to",
        "how would i",
        "how should i",
        "how does one",
        "how could i",
        "how might i",
    ),
    ("can i", "may i", "could i", "am i able to", "is it possible to"),
    ("i want to", "i need to", "i would like to", "i'd like to", "i wish to", "let me"),
    ("where do i", "where can i", "where should i", "where could i"),
    ("what if", "what happens if", "what happens when", "suppose"),
    ("reproducible", "repeatable"),
    ("memory", "ram"),
    ("speak", "talk", "write"),
    ("text", "string"),
    ("size", "length"),
    ("load", "bring up", "read in"),
    ("loaded", "brought up"),
    ("loading", "bringing in"),
    ("finished", "done", "complete", "over"),
    ("begin", "commence"),
    ("shared", "common"),
    ("share", "have in common"),
    ("entire", "whole", "full"),
    ("wrong", "incorrect", "bad"),
    ("correct", "right"),
    ("people", "users", "folks"),
    ("user", "person"),
    ("someone", "somebody", "anybody"),
    ("others", "other people", "other users", "everybody else"),
    ("stream", "streaming"),
    ("streams", "streamed answers"),
    ("request", "call", "query"),
    ("requests", "calls", "queries"),
    ("send", "post", "submit", "pass"),
    ("sent", "posted", "submitted"),
    ("wait", "pause"),
    ("shut down", "stop completely", "power down"),
    ("exist", "be there"),
    ("refused", "rejected", "declined"),
    ("refuse", "reject", "decline"),
    ("ignored", "skipped"),
    ("own", "personal"),
    ("new", "fresh"),
    ("old", "previous", "earlier"),
    ("first", "initial"),
    ("last", "final"),
    ("same", "identical"),
    ("want", "would like", "wish"),
    ("named", "called"),
    ("names", "is called"),
    ("give", "provide", "supply"),
    ("given", "provided", "supplied"),
    ("open source", "free"),
    ("locate", "discover"),
    ("keep", "retain"),
    ("kept", "retained"),
    ("take", "accept"),
    ("takes", "accepts"),
    ("accepted", "taken"),
    ("in short order", "soon"),
    ("safe", "secure"),
    ("exactly", "precisely"),
    ("really", "actually", "truly"),
    ("only", "just", "merely"),
    ("many", "lots of", "numerous"),
    ("multiple", "more than one"),
    ("example", "sample"),
    ("work", "function", "operate"),
)
SMALL_WORDS = frozenset(
    (
        *("a", "an", "the", "this", "that", "there", "it", "its", "i", "my", "me", "you"),
        *("is", "are", "be", "do", "does", "did", "can", "could", "will", "would", "should"),
        *("to", "of", "in", "on", "at", "for", "with", "as", "by", "from", "about", "and", "or", "if"),
        *("what", "which", "how", "when", "where", "please"),
    )
)
OPENERS = (
    "please",
    "hi,",
    "hello,",
    "hey,",
    "hey motet,",
    "ok,",
    "so",
    "and",
    "well,",
    "quick question:",
    "one more question:",
    "excuse me,",
    "can you tell me,",
    "please tell me,",
    "I wonder,",
    "I'd like to know:",
    "just curious,",
    "sorry,",
    "now",
    "also,",
    "in motet,",
    "I'm new here,",
    "question:",
    "do you know:",
    "say,",
    "a question,",
)
CLOSERS = (
    "please",
    "thanks",
    "in motet",
    "with motet",
    "here",
    "on this server",
    "with this server",
    "exactly",
    "then",
    "thank you",
    "when using motet",
    "by the way",
    "anyway",
    "again",
    "for motet",
    "actually",
)
ENDINGS = ("", "", "?", "?", "??", ".", "!", " ?", "...")


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
