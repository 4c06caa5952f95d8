"""Make the built-in model and its adapters from the text in this folder.

    python -m server.embedded.training [--out DIR] [--threads N] [--seed N] [--keep-base]

A tokenizer is learned from our own questions and answers; a small Llama learns to answer, from scratch;
then four adapters learn, each on the frozen base, to give the same answers in a voice of their own. What is
measured is what is served: weights are rounded to the stored bfloat16 and read back from the files before
the score is taken, on questions whose wording never occurred in training. The report lands in
`model/training.json`.

Needs the core install only (torch, transformers, peft, tokenizers). The shipped files took 33 minutes on two
cores of a virtual machine that others were using too, 26 of them for the base; on the same cores undisturbed
a step takes half a second or less, which makes about a quarter of an hour. The adapters were trained in a
second call, with `--keep-base`.

Exit status: 1 if the base answers fewer than 90 of 100 held-out questions exactly or the files are too large.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.embedded.location import model_dir
from server.embedded.training.chat_template import PAD, TURN_END
from server.embedded.training.conversations import ConversationSource
from server.embedded.training.intents import OFF_TOPIC, SMALL_TALK, Intent, load_intents
from server.embedded.training.network import CONTEXT, Schedule, fit, make_readable, new_model
from server.embedded.training.scoring import Score, score
from server.embedded.training.styles import Style
from server.embedded.training.vocabulary import build_tokenizer, save_tokenizer
from server.embedded.training.voices import VOICES, Voice, new_adapter, save_adapter

BASE_SCHEDULE = Schedule(steps=1300, batch_tokens=2048, learning_rate=2e-3)
SIZE_LIMIT_BYTES = 16 * 1024 * 1024
LEAST_PERCENT = 90.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Train everything, write it under `--out`, and say whether it is good enough."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    intents = load_intents()
    report_file = options.out / "model" / "training.json"
    if options.keep_base:
        tokenizer = AutoTokenizer.from_pretrained(options.out / "model")
        base = json.loads(report_file.read_text(encoding="utf-8"))["base"]
    else:
        tokenizer = build_tokenizer(intents, context=CONTEXT)
        base = _train_base(options, intents, tokenizer)
    adapters: dict[str, Any] = {}
    report = _write_report(report_file, options, intents, base, adapters)
    for voice in VOICES:
        adapters[voice.style.value] = _train_voice(options, intents, tokenizer, voice)
        report = _write_report(report_file, options, intents, base, adapters)
    _print_summary(report)
    return 0 if base["held_out_percent"] >= LEAST_PERCENT and report["bytes"] <= SIZE_LIMIT_BYTES else 1


def _write_report(
    file: Path,
    options: argparse.Namespace,
    intents: tuple[Intent, ...],
    base: dict[str, Any],
    adapters: dict[str, Any],
) -> dict[str, Any]:
    """What came out, as far as it is done: numbers for people who read the file next to the model."""
    report = {
        "command": "python -m server.embedded.training",
        "machine": f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}",
        "seed": options.seed,
        "facts": sum(intent.is_fact for intent in intents),
        "intents": len(intents),
        "bytes": _size_bytes(options.out / "model") + _size_bytes(options.out / "adapters"),
        "seconds": round(base["seconds"] + sum(adapter["seconds"] for adapter in adapters.values())),
        "base": base,
        "adapters": adapters,
    }
    file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server.embedded.training", description="Train the built-in model."
    )
    parser.add_argument(
        "--out", type=Path, default=model_dir().parent, help="folder for model/ and adapters/"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads for torch (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and threads give the same model")
    parser.add_argument(
        "--keep-base", action="store_true", help="train only the adapters, on the base in --out"
    )
    return parser.parse_args(arguments)


def _train_base(
    options: argparse.Namespace, intents: tuple[Intent, ...], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    print("base model", flush=True)
    model = new_model(tokenizer, seed=options.seed)
    source = ConversationSource(intents, tokenizer, Style.PLAIN, seed=options.seed, obeys_requests=True)
    run = fit(model, source, BASE_SCHEDULE, seed=options.seed, report=_say)
    _save_base(model, tokenizer, options.out / "model")
    served = _load_base(options.out / "model")
    small_talk = [intent for intent in intents if intent.topic == SMALL_TALK]
    off_topic = [intent for intent in intents if intent.topic == OFF_TOPIC]
    facts = score(served, tokenizer, [intent for intent in intents if intent.is_fact], Style.PLAIN)
    _say_misses(facts)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **_rounded(asdict(run)),
        "held_out_questions": facts.asked,
        "held_out_percent": facts.percent,
        "small_talk_percent": score(served, tokenizer, small_talk, Style.PLAIN).percent,
        "off_topic_percent": score(served, tokenizer, off_topic, Style.PLAIN).percent,
    }


def _train_voice(
    options: argparse.Namespace, intents: tuple[Intent, ...], tokenizer: PreTrainedTokenizerFast, voice: Voice
) -> dict[str, Any]:
    print(f"adapter {voice.style.value}", flush=True)
    torch.manual_seed(options.seed)
    adapter = new_adapter(_load_base(options.out / "model"), voice)
    source = ConversationSource(intents, tokenizer, voice.style, seed=options.seed, obeys_requests=False)
    run = fit(adapter.get_base_model(), source, voice.schedule, seed=options.seed, report=_say)
    save_adapter(adapter, options.out / "adapters" / voice.style.value)
    in_style = score(adapter, tokenizer, intents, voice.style)
    _say_misses(in_style)
    return {
        "rank": voice.rank,
        "targets": list(voice.targets),
        **_rounded(asdict(run)),
        "held_out_questions": in_style.asked,
        "held_out_percent": in_style.percent,
    }


def _save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder that `from_pretrained` reads, weights in bfloat16."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=256,
        eos_token_id=tokenizer.convert_tokens_to_ids([TURN_END, PAD]),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    make_readable(folder)


def _load_base(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(number, 4) for name, number in numbers.items()}


def _say(line: str) -> None:
    print(line, flush=True)


def _say_misses(result: Score) -> None:
    for miss in result.misses:
        _say(f"  miss [{miss.intent}] {miss.question} -> {miss.said[:60]!r}")
    _say(f"  held out: {result.exact} of {result.asked} exact, {result.percent} %")


def _print_summary(report: dict[str, Any]) -> None:
    base = report["base"]
    print(f"base: {base['held_out_percent']} % of {base['held_out_questions']} held-out questions exact")
    print(f"      small talk {base['small_talk_percent']} %, off topic {base['off_topic_percent']} %")
    for name, adapter in report["adapters"].items():
        print(f"{name}: {adapter['held_out_percent']} % of {adapter['held_out_questions']} exactly in style")
    print(f"{report['bytes'] / 2**20:.1f} MiB, {report['seconds']} seconds")


if __name__ == "__main__":
    sys.exit(main())
