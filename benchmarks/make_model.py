"""A checkpoint of a real shape with random weights, and adapters for it, from nothing but this machine.

Speed does not depend on what the weights say, so anybody can reproduce a number without downloading a
model: the shape gives the sizes, a seeded generator the weights, Python's own sources the text that the
tokenizer learns from. Tensors are drawn and written one shard at a time, so that an 8B checkpoint needs the
memory of a shard and not of a model. The adapters are plain PEFT folders over every linear layer of the
decoder, with both halves non-zero, so that their arithmetic cannot be skipped.

    python -m benchmarks.make_model --shape qwen2.5-0.5b --out DIR --adapters 16 --rank 16
        DIR/model      the checkpoint          DIR/adapters/r16-00 ...   the adapters
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.bpe import SPECIAL_TOKENS, train_tokenizer
from benchmarks.shapes import SHAPES, Shape

CORPUS_CHARACTERS = 8_000_000  # more text does not make a better tokenizer for a model of noise
SHARD_BYTES = 2 * 2**30
WEIGHT_STD = 0.02
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def write_tokenizer(shape: Shape, folder: Path, characters: int) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(shape, characters),
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[0],
        model_max_length=shape.max_position,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def config_of(shape: Shape) -> object:
    """The shape as a transformers config. The special tokens are the last ids of the vocabulary."""
    from transformers import AutoConfig

    first_special = shape.vocab_size - len(SPECIAL_TOKENS)
    config = AutoConfig.for_model(
        shape.architecture,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_position,
        tie_word_embeddings=shape.ties_embeddings,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters=dict(shape.rope),
        bos_token_id=first_special,
        pad_token_id=first_special,
        eos_token_id=first_special + 2,
    )
    config.architectures = [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[shape.architecture]]
    config.dtype = torch.bfloat16
    return config


def skeleton(config: object) -> nn.Module:
    """The model's modules without any memory behind them: names and shapes only."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def random_weights(model: nn.Module, seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, in module order, in bf16: norms are ones, everything else N(0, 0.02)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():  # a tied head is one parameter and comes once
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if parameter.dim() == 1 and not name.endswith("bias"):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, WEIGHT_STD, generator=generator)
        yield name, weight.cpu()


def write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> int:
    """Write safetensors shards of about `shard_bytes` and their index; returns the number of parameters."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    num_parameters = 0

    def flush() -> None:
        save_file(pending, folder / f"part-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, weight in weights:
        pending[name] = weight
        num_parameters += weight.numel()
        if sum(tensor.nbytes for tensor in pending.values()) >= shard_bytes:
            flush()
    if pending:
        flush()
    if len(shards) == 1:
        (folder / "part-00000.safetensors").rename(folder / "model.safetensors")
        return num_parameters
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"part-{i:05d}.safetensors").rename(folder / name)
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": 2 * num_parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return num_parameters


def write_model(
    shape: Shape,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    characters: int = CORPUS_CHARACTERS,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Make the whole checkpoint in `folder`; returns the number of parameters."""
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(shape, folder, characters)
    config = config_of(shape)
    config.save_pretrained(folder)  # type: ignore[attr-defined]
    first_special = shape.vocab_size - len(SPECIAL_TOKENS)
    GenerationConfig(
        bos_token_id=first_special,
        pad_token_id=first_special,
        eos_token_id=[first_special + 2, first_special],
    ).save_pretrained(folder)
    return write_weights(random_weights(skeleton(config), seed, device), folder, shard_bytes)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer of the decoder; the head is not one that adapters change."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            yield path, module


def write_adapter(model: nn.Module, folder: Path, *, rank: int, seed: int, base: str) -> None:
    """A PEFT folder over every linear layer. Both halves are noise; a fresh LoRA's B would be zero."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    for path, linear in linear_layers(model):
        targets.add(path.rsplit(".", 1)[-1])
        for half, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
            noise = torch.randn(shape, generator=generator) * WEIGHT_STD
            tensors[f"base_model.model.{path}.lora_{half}.weight"] = noise.to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=sorted(targets),
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(folder)


def write_adapters(shape: Shape, folder: Path, *, count: int, ranks: Sequence[int], seed: int) -> list[Path]:
    """`count` adapters whose ranks take turns: r16-00, r16-01 ..., or r8-00, r32-01 ... when mixed."""
    model = skeleton(config_of(shape))
    made = []
    for number in range(count):
        rank = ranks[number % len(ranks)]
        path = folder / f"r{rank}-{number:02d}"
        write_adapter(model, path, rank=rank, seed=seed + 1000 + number, base=shape.name)
        made.append(path)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.make_model", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for model/ and adapters/")
    parser.add_argument("--adapters", type=int, default=0, metavar="N", help="how many adapters (default 0)")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="their rank; several take turns")
    parser.add_argument("--adapters-only", action="store_true", help="leave DIR/model as it is")
    parser.add_argument("--device", default="cpu", help="where the noise is drawn: cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    began = time.perf_counter()
    if not args.adapters_only:
        num_parameters = write_model(
            shape, args.out / "model", seed=args.seed, device=torch.device(args.device)
        )
        print(f"{args.out / 'model'}: {shape.name}, {num_parameters / 1e6:.1f} M parameters, bf16")
    made = write_adapters(shape, args.out / "adapters", count=args.adapters, ranks=args.rank, seed=args.seed)
    for path in made:
        size = (path / "adapter_model.safetensors").stat().st_size
        print(f"{path}: {size / 2**20:.1f} MiB")
    print(f"{time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
