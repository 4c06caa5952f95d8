"""The tokenizer: byte-level BPE, so that every text can be written, with merges learned from our own text."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from server.embedded.training.chat_template import CHAT_TEMPLATE, PAD, SPECIAL_TOKENS, TURN_END
from server.embedded.training.intents import Intent
from server.embedded.training.phrasing import base_questions
from server.embedded.training.styles import Style, render
from server.embedded.training.system_messages import STYLE_REQUESTS, SYSTEM_MESSAGES
from server.embedded.training.wording import OPENERS, SYNONYMS

VOCABULARY_SIZE = 3072
ANSWER_WEIGHT = 20  # an answer is read in training far more often than one question


def build_tokenizer(intents: tuple[Intent, ...], *, context: int) -> PreTrainedTokenizerFast:
    """Learn the merges from our text in all styles; `context` is the model's longest sequence."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(intents), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer's files, with a class name that transformers 4 knows too."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _corpus(intents: Iterable[Intent]) -> Iterator[str]:
    yield from SYSTEM_MESSAGES
    yield from (request for _, request in STYLE_REQUESTS)
    yield from OPENERS
    for group in SYNONYMS:
        yield from group
        yield from (f" {word}" for word in group)
    for intent in intents:
        for question in base_questions(intent):
            yield question
            yield question.lower()
        for style in Style:
            yield from [render(style, intent)] * ANSWER_WEIGHT
    yield from ["user\n", "assistant\n", "system\n", "\n"] * 100
