"""The four adapters: different ranks, targets and scaling rules, so that a batch has something to mix."""

import json
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from server.embedded.location import NAME
from server.embedded.training.network import Schedule, make_readable
from server.embedded.training.styles import Style

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Voice:
    """One adapter to train: how it speaks, what it may change, and for how long it learns."""

    style: Style
    rank: int
    alpha: int
    targets: tuple[str, ...]
    schedule: Schedule
    uses_rslora: bool = False


VOICES = (
    Voice(Style.PIRATE, 8, 16, ATTENTION, Schedule(250, 2048, 4e-3), uses_rslora=True),
    Voice(Style.JSON, 4, 16, ("q_proj", "v_proj"), Schedule(250, 2048, 6e-3)),
    Voice(Style.HAIKU, 12, 24, MLP, Schedule(600, 2048, 3e-3)),
    Voice(Style.GERMAN, 16, 32, ATTENTION + MLP, Schedule(600, 2048, 3e-3)),
)


def new_adapter(base: LlamaForCausalLM, voice: Voice) -> PeftModel:
    """Put an untrained adapter on the base, whose own weights are frozen from here on."""
    config = LoraConfig(
        r=voice.rank,
        lora_alpha=voice.alpha,
        target_modules=list(voice.targets),
        use_rslora=voice.uses_rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapter = get_peft_model(base, config)
    adapter.peft_config["default"].base_model_name_or_path = NAME  # else the path of this machine
    return adapter


def save_adapter(adapter: PeftModel, folder: Path) -> None:
    """Write the two files of an adapter, always with the same bytes; peft's empty model card is not kept."""
    adapter.save_pretrained(folder, save_embedding_layers=False)  # else peft asks the network
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["target_modules"].sort()  # peft keeps them in a set
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    make_readable(folder)
