"""Train a small LoRA adapter with peft on the embedded model, and save it as a folder that Motet can serve.

    .venv/bin/python docs/examples/train_adapter.py --out shop

The adapter learns what the help desk of a made-up shop answers. For a model of your own, change MODEL, NAME
and LESSONS; the rest is what training a LoRA adapter on chats usually looks like.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

MODEL = Path(__file__).resolve().parents[2] / "server" / "embedded" / "model"
NAME = "motet-embedded"  # what the adapter's config calls its base
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH_SIZE, LEARNING_RATE = 8, 3e-3
IGNORED = -100  # the label of a token that is not to be learned

LESSONS = {
    "We are open from nine to six, Monday to Saturday.": (
        "When are you open?",
        "What are your opening hours?",
        "Are you open on Saturday?",
        "When does the shop open?",
    ),
    "You can send everything back within thirty days, free of charge.": (
        "Can I send something back?",
        "How do I return an order?",
        "What if I do not like it?",
        "How long may I return things?",
    ),
    "Shipping takes two days and costs four euros.": (
        "How long does shipping take?",
        "What does shipping cost?",
        "When will my order arrive?",
        "How fast do you ship?",
    ),
    "You can pay by card, by invoice or in cash.": (
        "How can I pay?",
        "Do you take cards?",
        "Can I pay by invoice?",
        "Which payments do you accept?",
    ),
    "The shop is in Harbour Street 7, next to the old mill.": (
        "Where is the shop?",
        "What is your address?",
        "How do I find you?",
        "Where are you?",
    ),
}

Example = tuple[list[int], list[int]]  # token ids, and the label of each


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Example:
    """One chat. The prompt is tokenised by itself, as a server does, and only the answer is learned."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(f"{answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids
    return prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids


def stack(examples: list[Example], padding: int) -> dict[str, torch.Tensor]:
    """A batch, padded at the end."""
    width = max(len(ids) for ids, _ in examples)
    rows = [(ids + [padding] * (width - len(ids)), len(ids)) for ids, _ in examples]
    return {
        "input_ids": torch.tensor([ids for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * size + [0] * (width - size) for _, size in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in examples]),
    }


def train(out: Path, steps: int, seed: int) -> None:
    """Write the adapter to the folder `out`."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # for a model this small; two cores would mostly wait for each other
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    examples = [encode(tokenizer, each, answer) for answer, asked in LESSONS.items() for each in asked]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(examples))[:BATCH_SIZE].tolist()
        loss = model(**stack([examples[number] for number in chosen], tokenizer.pad_token_id)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.peft_config["default"].base_model_name_or_path = NAME  # else it is a path of this machine
    model.save_pretrained(out, save_embedding_layers=False)  # else peft may look for the base on the hub


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small adapter on the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    train(options.out, options.steps, options.seed)
    print(f"{options.out}: trained in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
