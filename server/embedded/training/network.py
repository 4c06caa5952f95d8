"""The network and its training loop, the same for the base model and for an adapter on it."""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.embedded.training.conversations import ConversationSource, Example, batches

CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to learn: linear warm-up, then a cosine down to a twentieth."""

    steps: int
    batch_tokens: int
    learning_rate: float
    warmup_steps: int = 40
    weight_decay: float = 0.05

    def rate(self, step: int) -> float:
        """The learning rate of this step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup_steps)
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * rise * max(0.05, fall)


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """What one run cost and where it ended."""

    seconds: float
    tokens: int
    final_loss: float


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A small untrained Llama; grouped-query attention and tied embeddings as in its bigger relatives."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def fit(
    model: LlamaForCausalLM,
    source: ConversationSource,
    schedule: Schedule,
    *,
    seed: int,
    report: Callable[[str], None],
) -> TrainingRun:
    """Train the parameters that ask for gradients, in bfloat16 arithmetic on float32 weights."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimisers = _optimisers(model, schedule)
    supply: Iterator[list[Example]] = batches(
        iter(source),
        batch_tokens=schedule.batch_tokens,
        rng=random.Random(seed),  # noqa: S311
    )
    model.train()
    started = time.perf_counter()
    tokens, mean_loss = 0, 0.0
    for step in range(schedule.steps):
        examples = next(supply)
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = schedule.rate(step)
        loss = answer_loss(model, examples)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        tokens += sum(len(example.tokens) for example in examples)
        mean_loss = loss.item() if step == 0 else 0.98 * mean_loss + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            report(f"  step {step + 1}/{schedule.steps}, {seconds:.0f} s, loss {mean_loss:.4f}")
    model.eval()
    return TrainingRun(time.perf_counter() - started, tokens, mean_loss)


def _optimisers(model: LlamaForCausalLM, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, which halves the steps needed here; AdamW for embeddings, norms, adapters."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = [weight for name, weight in weights.items() if name.endswith("_proj.weight")]
    others = [weight for name, weight in weights.items() if not name.endswith("_proj.weight")]
    decay = schedule.weight_decay
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            others, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=decay, fused=True
        )
    ]
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=schedule.learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
        optimisers.append(muon)
    return optimisers


def answer_loss(model: LlamaForCausalLM, examples: list[Example]) -> Tensor:
    """Mean cross entropy over the answers' tokens.

    Padding stands at the end and attention is causal, so no mask is needed; the logits, the largest tensor
    of so small a model, are computed only where a token counts.
    """
    width = max(len(example.tokens) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)  # [B, T]
    learned = torch.zeros(len(examples), width, dtype=torch.bool)  # [B, T]
    for row, example in enumerate(examples):
        ids[row, : len(example.tokens)] = torch.tensor(example.tokens)
        learned[row, : len(example.tokens)] = torch.tensor(example.learned)
    counts = learned[:, 1:]  # position t predicts token t + 1
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[counts])  # [N, V]
    return F.cross_entropy(logits.float(), ids[:, 1:][counts])


def make_readable(folder: Path) -> None:
    """Let everybody read the files: safetensors writes them for their owner alone, and a wheel keeps that."""
    for file in folder.iterdir():
        file.chmod(0o644)
