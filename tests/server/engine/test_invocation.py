"""Where an adapter with an invocation begins, against peft's own search."""

import random

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from server.engine.invocation import last_start


@pytest.mark.parametrize(
    ("prompt", "invocation", "start"),
    [
        ([1, 2, 3], [2, 3], 1),
        ([1, 2, 3], [1, 2, 3], 0),
        ([2, 3, 1, 2, 3, 9], [2, 3], 3),
        ([1, 2, 3], [3, 4], None),
        ([1, 2], [1, 2, 3], None),
        ([5, 5, 5, 5], [5, 5], 2),
        ([256, 1, 0], [1], 1),
        ([0, 256], [1], None),  # its bytes are there, between two tokens
        ([1, 0, 256], [1], 0),
        ([2**30, 64], [2**22], None),
    ],
)
def test_start_is_where_the_last_occurrence_begins(
    prompt: list[int], invocation: list[int], start: int | None
) -> None:
    assert last_start(prompt, invocation) == start


@pytest.mark.parametrize("seed", range(5))
def test_start_is_where_peft_finds_it(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(50):
        vocabulary = dice.choice([[0, 1], [0, 1, 256, 65536], list(range(50))])
        prompt = dice.choices(vocabulary, k=dice.randint(1, 40))
        invocation = dice.choices(vocabulary, k=dice.randint(1, 4))
        config = {"a": LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)}
        [offset] = calculate_alora_offsets(config, "a", torch.tensor([prompt]))
        assert last_start(prompt, invocation) == (None if offset is None else len(prompt) - offset)
