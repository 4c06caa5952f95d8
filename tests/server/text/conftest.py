"""An AdapterTexts that is closed at the end of its test, and the tokenizer that it is about."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.text.adapter_text import AdapterTexts
from server.text.tokenizer import Tokenizer
from tests.text_folders import base_folder

MakeTexts = Callable[..., AdapterTexts]


@pytest.fixture
def make_texts() -> Iterator[MakeTexts]:
    """`make_texts(base folder, spare=rows of the table beyond the vocabulary)`."""
    made: list[AdapterTexts] = []

    def make(folder: Path, *, spare: int = 16, eos_token_ids: frozenset[int] = frozenset()) -> AdapterTexts:
        base = Tokenizer.load(folder)
        num_embeddings = base.vocab_size + spare
        made.append(AdapterTexts(base, folder, num_embeddings=num_embeddings, eos_token_ids=eos_token_ids))
        return made[-1]

    yield make
    for texts in made:
        texts.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A byte-level tokenizer with a chat template."""
    return base_folder(tmp_path / "base")


@pytest.fixture
def texts(base: Path, make_texts: MakeTexts) -> AdapterTexts:
    return make_texts(base)
