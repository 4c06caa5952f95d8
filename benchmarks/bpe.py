"""A byte-level BPE tokenizer from text that every machine has: the sources of Python's own library.

It is trained in seconds and always gives the same result on the same Python, which is all that a benchmark
needs of a tokenizer: real merges, real word lengths, every byte covered. Imports no torch.
"""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.shapes import Shape

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Words with the space before them, digits in threes at most, runs of signs, line ends, other space.
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def stdlib_sources(limit: int) -> Iterator[str]:
    """The standard library's Python files in a fixed order, up to `limit` characters."""
    left = limit
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # test data in other encodings
            continue
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def train_tokenizer(shape: Shape, characters: int) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` whose every id below `shape.vocab_size` decodes to some text.

    The ids beyond what training gives are fillers that no text can produce but a random model will: without
    them half of its output would be empty and no stream could be measured.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    room = shape.vocab_size - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=min(shape.trained_vocab, room),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_sources(characters), trainer)
    state = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = state["model"]["vocab"]
    number = 0
    while len(vocab) < room:
        number += 1
        vocab.setdefault(f"\u0120x{number:x}", len(vocab))  # U+0120 is the byte-level spelling of a space
    filled = Tokenizer.from_str(json.dumps(state))
    filled.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return filled
