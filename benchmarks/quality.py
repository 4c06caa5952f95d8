"""What fewer bits cost in quality: how far the probabilities are from those of the weights as they are.

    python -m benchmarks.quality                            the embedded model, on questions it never saw
    python -m benchmarks.quality DIR/model --text FILE      another model, on a text of its kind

Both models read the same text, and are compared at every token: the divergence of their distributions
(Kullback-Leibler, from the weights as they are to the others, in nats), how often both would say the same
next, and how much less likely the text has become.
"""

import argparse
import math
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.trial import median, publish
from server.embedded.location import model_dir
from server.engine.input_batch import build_input_batch
from server.engine.kv_cache import KVCache
from server.engine.plan import ScheduledChunk, StepPlan
from server.engine.sequence import Sequence as EngineSequence
from server.engine.sequence import SequenceId
from server.model.cpu_kernels import CacheChoice, Quantization
from server.model.halves import Halves, HeadRows
from server.model.loader import LoadedModel, load_model
from server.types import SamplingParams, StopCriteria

FACTS = Path(__file__).resolve().parents[1] / "server" / "embedded" / "training" / "facts"
PIECE_TOKENS = 256
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens to read, and from where on they count."""

    ids: list[int]
    start: int


class Reader:
    """A model that reads passages, one at a time."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._kv = KVCache(
            model.layers,
            model.attention,
            num_blocks=-(-4 * PIECE_TOKENS // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            dtype=model.dtype,
            device=model.device,
        )
        self._halves = Halves(model.module, model.body, model.lora, model.head)
        context = model.context
        context.keys, context.values, context.block_size = self._kv.keys, self._kv.values, BLOCK_SIZE

    @torch.inference_mode()
    def log_probabilities(self, passage: Passage) -> Tensor:
        """Of what follows each token that counts, float32 [n, V]. At most as much as four pieces."""
        model, count = self._model, len(passage.ids)
        sequence = EngineSequence(
            id=SequenceId(0),
            tokens=passage.ids,
            num_prompt=count,
            sampling=SamplingParams(),
            stop=StopCriteria(max_tokens=1),
            seed=0,
            adapter=None,
            arrival=0.0,
            block_table=list(range(-(-count // BLOCK_SIZE))),
        )
        batch = build_input_batch(
            StepPlan((ScheduledChunk(sequence, 0, count),)),
            model.attention,
            windows={layer.sliding_window for layer in model.layers},
            block_size=BLOCK_SIZE,
            dtype=model.dtype,
            device=model.device,
        )
        rows = list(range(passage.start - 1, count - 1))
        model.context.batch = batch.attention
        try:
            logits = self._halves.logits(batch.input_ids, batch.positions, HeadRows(torch.tensor(rows), rows))
        finally:
            model.context.batch = None
        return logits.float().log_softmax(-1)


@dataclass(frozen=True, slots=True)
class Distance:
    """At every token, in order."""

    divergence: list[float]  # nats
    agrees: list[bool]  # on the likeliest
    loss: list[float]  # of the text, by the weights as they are, nats
    loss_then: list[float]


def compare(base: Reader, other: Reader, passages: Sequence[Passage]) -> Distance:
    found = Distance([], [], [], [])
    for passage in passages:
        ours, theirs = base.log_probabilities(passage), other.log_probabilities(passage)
        said = torch.tensor(passage.ids[passage.start :])[:, None]
        found.divergence.extend((ours.exp() * (ours - theirs)).sum(-1).tolist())
        found.agrees.extend((ours.argmax(-1) == theirs.argmax(-1)).tolist())
        found.loss.extend((-ours.gather(1, said)[:, 0]).tolist())
        found.loss_then.extend((-theirs.gather(1, said)[:, 0]).tolist())
    return found


def conversations(folder: Path) -> Iterator[Passage]:
    """Questions that were held out of the embedded model's training, and the answers that it should give."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for file in sorted(FACTS.glob("*.toml")):
        for fact in tomllib.loads(file.read_text())["fact"]:
            for question in fact.get("held_out", ()):
                asked = [{"role": "user", "content": question}]
                prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
                start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
                ids = tokenizer(prompt + fact["answer"], add_special_tokens=False).input_ids
                yield Passage(ids, start)


def pieces(folder: Path, text: str) -> Iterator[Passage]:
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(text).input_ids
    for start in range(0, len(ids) - 1, PIECE_TOKENS):
        piece = ids[start : start + PIECE_TOKENS]
        if len(piece) > 1:
            yield Passage(piece, 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="What fewer bits cost in quality."
    )
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint (default: the embedded model)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what another model is to read")
    parser.add_argument("--dtype", default="auto", help="of the weights as they are")
    parser.add_argument("--quantization", default="int8", choices=get_args(Quantization))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=get_args(CacheChoice))
    parser.add_argument("--other-dtype", metavar="DTYPE", help="of the others (default: the same)")
    parser.add_argument("--passages", type=int, default=400, help="at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    args = parser.parse_args(argv)
    if args.model is not None and args.text is None:
        parser.error("--text: only the embedded model brings something to read")
    folder = args.model or model_dir()
    passages = list(conversations(folder) if args.text is None else pieces(folder, args.text.read_text()))
    passages = passages[:: max(1, len(passages) // args.passages)]
    base = Reader(load_model(folder, dtype=args.dtype, device="cpu", progress=_silent))
    dtype = args.other_dtype or args.dtype
    other = Reader(
        load_model(
            folder,
            dtype=dtype,
            device="cpu",
            progress=_silent,
            quantization=args.quantization,
            kv_cache_dtype=args.kv_cache_dtype,
        )
    )
    found = compare(base, other, passages)
    count = len(found.divergence)
    mean = math.fsum(found.divergence) / count
    ordered = sorted(found.divergence)
    loss, then = math.fsum(found.loss) / count, math.fsum(found.loss_then) / count
    rows = [
        ("tokens", [str(count)]),
        ("divergence, mean", [f"{mean:.5f}"]),
        ("divergence, median", [f"{median(ordered):.5f}"]),
        ("divergence, 99th percentile", [f"{ordered[int(0.99 * count)]:.5f}"]),
        ("same next token", [f"{sum(found.agrees) / count:.2%}"]),
        ("loss, as they are", [f"{loss:.4f}"]),
        ("loss, with fewer bits", [f"{then:.4f}"]),
    ]
    result = {
        "tokens": count,
        "mean_divergence": mean,
        "same_next_token": sum(found.agrees) / count,
        "loss": loss,
        "loss_then": then,
    }
    publish(args, rows, result)
    return 0


def _silent(stage: str, fraction: float) -> None:
    """Loading is not what is looked at."""


if __name__ == "__main__":
    sys.exit(main())
