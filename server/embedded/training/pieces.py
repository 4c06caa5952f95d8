"""Text to token ids for training, sometimes in smaller pieces than the tokenizer would take."""

import json
import random
import re
from functools import lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

MERGES_KEPT = (300, 700, 1200)
WORD_SHARE = 0.3


class PieceEncoder:
    """Encodes exactly as a server will, or loosely: some words fall into smaller tokens of the vocabulary.

    Loosely read prompts give the parts of words a meaning: who knows "launch" and "es" understands
    "launches". The idea is BPE dropout (arXiv:1910.13267), but by leaving out the late merges, because the
    library's own dropout cannot be seeded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self._rng = rng
        self._exact = tokenizer.backend_tokenizer
        self._coarse = [_with_merges(self._exact, kept) for kept in MERGES_KEPT]
        self._word = lru_cache(maxsize=50_000)(self._encode_word)

    def exact(self, text: str) -> list[int]:
        """The ids that the shipped tokenizer gives."""
        ids: list[int] = self._exact.encode(text, add_special_tokens=False).ids
        return ids

    def loose(self, text: str) -> list[int]:
        """Ids of the same text, drawn anew at each call; special tokens stay whole."""
        ids: list[int] = []
        for word in re.findall(r" ?\S+|\s", text):
            is_cut = "<|" not in word and self._rng.random() < WORD_SHARE
            ids += self._word(word, self._rng.randrange(len(MERGES_KEPT)) if is_cut else None)
        return ids

    def _encode_word(self, word: str, coarse: int | None) -> tuple[int, ...]:
        tokenizer = self._exact if coarse is None else self._coarse[coarse]
        return tuple(tokenizer.encode(word, add_special_tokens=False).ids)


def _with_merges(tokenizer: Tokenizer, kept: int) -> Tokenizer:
    """A copy that knows only the first merges; ids are unchanged."""
    description = json.loads(tokenizer.to_str())
    description["model"]["merges"] = description["model"]["merges"][:kept]
    return Tokenizer.from_str(json.dumps(description))
