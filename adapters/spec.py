"""`adapter_config.json` as PEFT understands it: which modules, which rank, which scale, and what is not
served.

The tensors are the truth about an adapter; the config adds the scale, and must not contradict them. A
setting that would change the arithmetic and is not served is refused by its name, because ignoring it
would answer with another model than the one that was trained. Settings that only mattered while training
are ignored.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterInvalid
from adapters.names import shown
from adapters.patterns import MatchBudget, ModulePattern, is_plain
from adapters.values import (
    CONFIG_FILE,
    MAX_LISTED,
    boolean,
    integer,
    number,
    read_config,
    strings,
    table,
    token_ids,
)

__all__ = ["CONFIG_FILE", "LoraSpec", "TokenIndices"]

_MAX_INVOCATION_TOKENS = 4096
_MAX_LAYER_PATTERNS = 16  # models have one list of layers, or a few

_NOT_SERVED: Mapping[str, tuple[object, ...]] = {
    # setting -> values that leave the arithmetic as it is; anything else is refused
    "modules_to_save": (None, []),
    "bias": (None, "none"),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
}
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal")
"""The other ones (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, ...) train against changed base weights. PEFT writes
`true` when it has converted such an adapter back to the original base."""


@dataclass(frozen=True, slots=True)
class TokenIndices:
    """The tokens whose rows were trained (`trainable_token_indices`)."""

    module: str | None  # name of the embedding or the head, or an end of its path; None: the embedding
    ids: tuple[int, ...]  # distinct, in the order of the rows


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A validated config. Modules are named by their path in the model, without PEFT's prefix."""

    rank: int
    alpha: float
    uses_rslora: bool
    targets: (
        tuple[str, ...] | ModulePattern | None
    )  # names or suffixes; a pattern; None: whatever the tensors say
    is_all_linear: bool
    excluded: tuple[str, ...] | ModulePattern
    layers: frozenset[int] | None  # None: all
    layer_patterns: tuple[str, ...]  # names of the list of layers; empty: any
    rank_patterns: tuple[tuple[ModulePattern, int], ...]  # the first that matches counts
    alpha_patterns: tuple[tuple[ModulePattern, float], ...]
    uses_dora: bool
    has_lora_bias: bool
    invocation_tokens: tuple[int, ...]  # aLoRA is active from the last place where they stand; (): always
    token_indices: tuple[TokenIndices, ...]
    ensures_tying: bool  # what was trained for the embedding also holds for a head that is tied to it
    base_model: str | None  # what the author trained on; for messages only

    @classmethod
    def from_folder(cls, folder: Path) -> "LoraSpec":
        """Read and check the folder's adapter_config.json. Raises AdapterInvalid."""
        return cls.parse(read_config(folder))

    @classmethod
    def parse(cls, config: Mapping[str, object]) -> "LoraSpec":
        """Raises AdapterInvalid, naming the setting."""
        _refuse_unserved(config)
        uses_dora, has_lora_bias = _switch(config, "use_dora"), _switch(config, "lora_bias")
        invocation_tokens, token_indices = _invocation_tokens(config), _token_indices(config)
        _refuse_together("use_dora", uses_dora, "lora_bias", has_lora_bias)
        _refuse_together("use_dora", uses_dora, "alora_invocation_tokens", bool(invocation_tokens))
        _refuse_together(
            "trainable_token_indices",
            bool(token_indices),
            "alora_invocation_tokens",
            bool(invocation_tokens),
        )
        budget = MatchBudget()
        targets, is_all_linear = _targets(config, budget)
        layers, layer_patterns = _layers(config, isinstance(config.get("target_modules"), str))
        excluded = _names_or_pattern(config, "exclude_modules", budget)
        return cls(
            rank=integer("r", config.get("r", 8)),
            alpha=number("lora_alpha", config.get("lora_alpha", 8)),
            uses_rslora=_switch(config, "use_rslora"),
            targets=targets,
            is_all_linear=is_all_linear,
            excluded=() if excluded is None else excluded,
            layers=layers,
            layer_patterns=layer_patterns,
            rank_patterns=tuple(
                (ModulePattern(key, budget, is_suffix=True), integer(f"rank_pattern[{shown(key)}]", value))
                for key, value in table(config, "rank_pattern").items()
            ),
            alpha_patterns=tuple(
                (ModulePattern(key, budget, is_suffix=True), number(f"alpha_pattern[{shown(key)}]", value))
                for key, value in table(config, "alpha_pattern").items()
            ),
            uses_dora=uses_dora,
            has_lora_bias=has_lora_bias,
            invocation_tokens=invocation_tokens,
            token_indices=token_indices,
            ensures_tying=_switch(config, "ensure_weight_tying"),
            base_model=_base_model(config),
        )

    def rank_of(self, module_path: str) -> int:
        """The rank that the config gives this module."""
        return next((rank for pattern, rank in self.rank_patterns if pattern.matches(module_path)), self.rank)

    def alpha_of(self, module_path: str) -> float:
        return next(
            (alpha for pattern, alpha in self.alpha_patterns if pattern.matches(module_path)), self.alpha
        )

    def scaling(self, module_path: str, rank: int) -> float:
        """Factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        return self.alpha_of(module_path) / (math.sqrt(rank) if self.uses_rslora else rank)

    def matches(self, module_path: str) -> bool:
        """Whether PEFT would put an adapter on this linear module of the model."""
        if isinstance(self.excluded, ModulePattern):
            if self.excluded.matches(module_path):
                return False
        elif _is_named(module_path, self.excluded):
            return False
        if self.is_all_linear or self.targets is None:
            return True
        if isinstance(self.targets, ModulePattern):
            return self.targets.matches(module_path)
        if module_path in self.targets:
            return True  # spelled out in full: PEFT does not ask for the layer then
        return _is_named(module_path, self.targets) and self._is_in_layers(module_path)

    def _is_in_layers(self, module_path: str) -> bool:
        if self.layers is None:
            return True
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in self.layer_patterns]
        for expression in expressions or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
            match = re.match(expression, module_path)
            if match is not None:
                return int(match["index"]) in self.layers
        return False


def _is_named(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _refuse_unserved(config: Mapping[str, object]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        said = "has no peft_type" if kind is None else f"has peft_type {shown(kind)}"
        raise AdapterInvalid(f"{CONFIG_FILE} {said}; only LORA is served")
    for setting, neutral in _NOT_SERVED.items():
        value = config.get(setting)
        if not any(type(value) is type(one) and value == one for one in neutral):
            raise AdapterInvalid(f"{setting}={shown(value)} in {CONFIG_FILE} is not served yet")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and init is not None:
        if not isinstance(init, str):
            raise AdapterInvalid(f"init_lora_weights in {CONFIG_FILE} must be a boolean or a string")
        if init.lower() not in _HARMLESS_INITS:
            raise AdapterInvalid(
                f"init_lora_weights={shown(init)} in {CONFIG_FILE} means that the adapter was trained against"
                " changed base weights; convert it when saving (path_initial_model_for_weight_conversion)"
            )


def _refuse_together(one: str, has_one: bool, other: str, has_other: bool) -> None:
    """PEFT cannot compute both in one adapter, or only in a way that no server can share."""
    if has_one and has_other:
        raise AdapterInvalid(f"{one} together with {other} in {CONFIG_FILE} is not served")


def _switch(config: Mapping[str, object], setting: str) -> bool:
    return boolean(setting, config.get(setting))


def _invocation_tokens(config: Mapping[str, object]) -> tuple[int, ...]:
    value = config.get("alora_invocation_tokens")
    if value is None:
        return ()
    ids = token_ids("alora_invocation_tokens", value)
    if not 1 <= len(ids) <= _MAX_INVOCATION_TOKENS:
        raise AdapterInvalid(
            f"alora_invocation_tokens in {CONFIG_FILE} must be 1 to {_MAX_INVOCATION_TOKENS} token ids"
        )
    return ids


def _token_indices(config: Mapping[str, object]) -> tuple[TokenIndices, ...]:
    setting = "trainable_token_indices"
    value = config.get(setting)
    if value is None:
        return ()
    if isinstance(value, list):
        found = [TokenIndices(None, token_ids(setting, value))]
    else:
        found = [
            TokenIndices(name, token_ids(f"{setting}[{shown(name)}]", ids))
            for name, ids in table(config, setting).items()
        ]
    for indices in found:
        if len(set(indices.ids)) < len(indices.ids):
            raise AdapterInvalid(f"{setting} in {CONFIG_FILE} names a token twice")
    return tuple(indices for indices in found if indices.ids)


def _targets(
    config: Mapping[str, object], budget: MatchBudget
) -> tuple[tuple[str, ...] | ModulePattern | None, bool]:
    value = config.get("target_modules")
    if isinstance(value, str) and value.lower() == "all-linear":
        return None, True
    targets = _names_or_pattern(config, "target_modules", budget)
    if targets == ():
        raise AdapterInvalid(f"target_modules in {CONFIG_FILE} is empty")
    return targets, False


def _names_or_pattern(
    config: Mapping[str, object], setting: str, budget: MatchBudget
) -> tuple[str, ...] | ModulePattern | None:
    value = config.get(setting)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return ModulePattern(value, budget)
    return strings(setting, value)


def _layers(config: Mapping[str, object], is_pattern: bool) -> tuple[frozenset[int] | None, tuple[str, ...]]:
    value, names = config.get("layers_to_transform"), config.get("layers_pattern")
    if is_pattern and (value is not None or names is not None):
        raise AdapterInvalid(
            f"layers_to_transform and layers_pattern need target_modules to be a list in {CONFIG_FILE}"
        )
    patterns = (
        () if names is None else (names,) if isinstance(names, str) else strings("layers_pattern", names)
    )
    patterns = tuple(pattern for pattern in patterns if pattern)
    if len(patterns) > _MAX_LAYER_PATTERNS:
        raise AdapterInvalid(f"layers_pattern in {CONFIG_FILE} has more than {_MAX_LAYER_PATTERNS} names")
    for pattern in patterns:
        if not is_plain(pattern):
            raise AdapterInvalid(f"layers_pattern {shown(pattern)} in {CONFIG_FILE} is not a plain name")
    if value is None:
        if patterns:
            raise AdapterInvalid(f"layers_pattern in {CONFIG_FILE} needs layers_to_transform")
        return None, ()
    indices = value if isinstance(value, list) else [value]
    if len(indices) > MAX_LISTED or any(type(index) is not int or index < 0 for index in indices):
        raise AdapterInvalid(f"layers_to_transform in {CONFIG_FILE} must be layer numbers")
    return (frozenset(indices) if indices else None), patterns


def _base_model(config: Mapping[str, object]) -> str | None:
    value = config.get("base_model_name_or_path")
    return value if type(value) is str else None
