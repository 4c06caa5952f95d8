"""Exact match on held-out questions: every character must be right, and the model must have stopped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from server.embedded.training.intents import Intent
from server.embedded.training.styles import Style, render

Generator: TypeAlias = LlamaForCausalLM | PeftModel

BATCH = 64
MAX_NEW_TOKENS = 120


@dataclass(frozen=True, slots=True)
class Miss:
    """A held-out question that was not answered exactly."""

    intent: str
    question: str
    said: str


@dataclass(frozen=True, slots=True)
class Score:
    """How many held-out questions were answered exactly."""

    asked: int
    exact: int
    misses: tuple[Miss, ...]

    @property
    def percent(self) -> float:
        """Exact answers of a hundred."""
        return round(100 * self.exact / self.asked, 2)


def score(
    model: Generator, tokenizer: PreTrainedTokenizerFast, intents: Sequence[Intent], style: Style
) -> Score:
    """Ask all held-out questions of these intents, each as the only message of a conversation."""
    cases = [(intent, question) for intent in intents for question in intent.held_out]
    said = answers(model, tokenizer, [question for _, question in cases])
    misses = tuple(
        Miss(intent.name, question, text)
        for (intent, question), text in zip(cases, said, strict=True)
        if text != render(style, intent)
    )
    return Score(len(cases), len(cases) - len(misses), misses)


def answers(model: Generator, tokenizer: PreTrainedTokenizerFast, questions: Sequence[str]) -> list[str]:
    """The greedy answer to each question; one that did not end by itself comes back as the empty text."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(by_length), BATCH):
        places = by_length[start : start + BATCH]
        batch = tokenizer(
            [prompts[place] for place in places], padding=True, padding_side="left", return_tensors="pt"
        )
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        for place, row in zip(places, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            if tokenizer.eos_token_id in row:
                texts[place] = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)])
    return texts
