"""Adapters by the hundred for any model folder: noise of the right shapes, different bytes in each.

They are written before anything is measured, because drawing noise takes the cores that are measured.
"""

from pathlib import Path

from adapters.safetensors_file import SafetensorsFile

WEIGHTS = "adapter_model.safetensors"


def write_adapters(model: Path, folder: Path, *, count: int, rank: int, seed: int = 0) -> list[Path]:
    """`count` PEFT folders over every linear layer of the decoder: a0000, a0001 ...; what is there stays."""
    from transformers import AutoConfig

    from benchmarks.make_model import skeleton, write_adapter

    paths = [folder / f"a{number:04d}" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not (path / "adapter_config.json").exists()]
    if missing:
        bones = skeleton(AutoConfig.from_pretrained(model))
        for number in missing:
            write_adapter(bones, paths[number], rank=rank, seed=seed + number, base=model.name)
    return paths


def num_parameters(adapter: Path) -> int:
    with SafetensorsFile(adapter / WEIGHTS) as file:
        return sum(tensor.num_elements for tensor in file.tensors)


def room_for(count: int, adapter: Path) -> int:
    """Bytes that hold `count` such adapters, whatever they are served in."""
    return count * num_parameters(adapter) * 4 + (1 << 16)
