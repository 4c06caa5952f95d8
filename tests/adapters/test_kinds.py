"""DoRA, biases, embeddings, heads, token rows and aLoRA: what becomes of them when they are loaded, and all
that is refused.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterTooLarge
from adapters.placement import ALIGNMENT_BYTES
from adapters.run import AdapterViews, make_views
from adapters.types import ModelTargets, Outline, TargetId
from adapters.weights import LoraWeights, load_weights, read_outline
from tests.adapters.base_model import (
    EMBED,
    HEAD,
    INNER,
    SCALED,
    TARGETS,
    TIED,
    TOKENS,
    UP,
    WIDTH,
    DenseBase,
    Q,
    halves,
    key,
    load,
    made_folder,
    rows,
    vector,
    with_biases,
)
from tests.adapters.making import damage

SCALE = 2.0  # alpha / rank of every adapter here
MAGNITUDE, BIAS, DELTA = "lora_magnitude_vector", "lora_B.bias", "token_adapter.trainable_tokens_delta"
NAN, INF = torch.nan, torch.inf


def views(weights: LoraWeights) -> AdapterViews:
    return make_views(weights.run, weights.layout)


def dora(*paths: str) -> dict[str, Tensor]:
    return {name: t for path in paths for name, t in (halves(path) | vector(path, MAGNITUDE)).items()}


def merged(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's own definition: the direction of each row of W + s B A, at the trained length."""
    direction = weight + SCALE * b @ a
    return magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("target", "path"), list(enumerate((Q, UP, EMBED, HEAD))))
def test_dora_gives_every_row_the_trained_length(tmp_path: Path, target: int, path: str) -> None:
    base, tensors = DenseBase.random(biased=(0, 3)), dora(path)
    found = views(load(made_folder(tmp_path, tensors, use_dora=True), base=base))
    terms = {**found.linears, TargetId(2): found.embedding, TargetId(3): found.head}[TargetId(target)]
    assert terms is not None
    assert terms.gain is not None
    a, b, magnitude = tensors.values()
    x, weight, bias = torch.randn(TARGETS.targets[target].in_features), base.weights[target], base.biases
    offset = bias.get(target, torch.zeros(1))
    y = weight @ x + offset

    got = y + terms.gain * y + terms.b @ (terms.a @ x) + (0.0 if terms.bias is None else terms.bias)

    assert (terms.bias is None) == (target not in bias)
    torch.testing.assert_close(got, merged(weight, a, b, magnitude) @ x + offset, rtol=1e-4, atol=1e-4)


def test_dora_with_a_rank_above_the_width_is_worked_out_too(tmp_path: Path) -> None:
    a, b = torch.randn(3 * WIDTH, WIDTH), torch.randn(INNER, 3 * WIDTH)
    magnitude, base = torch.rand(INNER) + 0.5, DenseBase.random()
    tensors = {key(UP, "lora_A.weight"): a, key(UP, "lora_B.weight"): b, key(UP, MAGNITUDE): magnitude}
    loaded = load(made_folder(tmp_path, tensors, use_dora=True, r=24, lora_alpha=48), base=base)
    gain = views(loaded).linears[TargetId(1)].gain
    assert gain is not None

    expected = magnitude / (base.weights[1] + SCALE * b @ a).norm(dim=1)

    torch.testing.assert_close(gain + 1.0, expected, rtol=1e-5, atol=1e-5)


def test_lora_bias_is_scaled_as_b_is(tmp_path: Path) -> None:
    tensors = halves(Q) | vector(Q, BIAS) | halves(HEAD) | vector(HEAD, BIAS)
    found = views(load(made_folder(tmp_path, tensors, lora_bias=True)))
    assert found.head is not None
    for terms, path in ((found.linears[TargetId(0)], Q), (found.head, HEAD)):
        assert terms.gain is None
        assert terms.bias is not None
        torch.testing.assert_close(terms.bias, SCALE * tensors[key(path, BIAS)])


def test_embeddings_lie_token_by_token_and_have_the_factor_of_the_models_own(tmp_path: Path) -> None:
    tensors = halves(EMBED)
    folder = made_folder(tmp_path, tensors)
    for targets, factor in ((TARGETS, 1.0), (SCALED, 3.0)):
        terms = views(load(folder, targets)).embedding
        assert terms is not None
        assert terms.a.t().is_contiguous()
        assert torch.equal(terms.a, tensors[key(EMBED, "lora_embedding_A")])
        torch.testing.assert_close(terms.b, SCALE * factor * tensors[key(EMBED, "lora_embedding_B")])


def test_tied_head_takes_what_the_embedding_has_where_the_config_ties_them(tmp_path: Path) -> None:
    tensors = halves(EMBED)
    folder = made_folder(tmp_path, tensors, ensure_weight_tying=True)
    tied = views(load(folder, SCALED)).head
    assert tied is not None
    a, b = tensors.values()
    torch.testing.assert_close(tied.b @ tied.a, SCALE * (b @ a).t())

    assert views(load(folder, TARGETS)).head is None, "a head of its own"
    assert views(load(folder.set(ensure_weight_tying=False), SCALED)).head is None
    spelt = made_folder(
        tmp_path, tensors | halves(HEAD), ensure_weight_tying=True, target_modules=["embed_tokens"]
    )
    own = views(load(spelt, TIED)).head
    assert own is not None
    assert torch.equal(own.a, halves(HEAD)[key(HEAD, "lora_A.weight")])


def test_token_rows_are_sorted_and_those_of_an_embedding_scaled(tmp_path: Path) -> None:
    tensors = rows(EMBED, 3) | halves(Q)
    folder = made_folder(tmp_path, tensors, trainable_token_indices=[9, 3, 5])
    found = views(load(folder, SCALED))
    stored = tensors[key(EMBED, DELTA)]
    for trained, factor in ((found.embedding_rows, 3.0), (found.head_rows, 1.0)):
        assert trained is not None
        assert trained.ids.tolist() == [3, 5, 9]
        torch.testing.assert_close(trained.rows, factor * stored[[1, 2, 0]])

    assert views(load(folder, TARGETS)).head_rows is None, "a head of its own"
    one = load(folder, TIED)
    ours = views(one)
    assert ours.embedding_rows is not None
    assert ours.head_rows is not None
    assert ours.embedding_rows.rows.data_ptr() == ours.head_rows.rows.data_ptr(), "the same numbers, once"
    assert one.num_bytes < load(folder, SCALED).num_bytes


@pytest.mark.parametrize(
    ("indices", "embedding", "head"),
    [
        ({"embed_tokens": [3, 5]}, [3, 5], [3, 5]),
        ({"model.embed_tokens": [3, 5]}, [3, 5], [3, 5]),
        ({"embed_tokens": [3, 5], "lm_head": [3, 5]}, [3, 5], [3, 5]),
        ({"embed_tokens": [3, 5], "lm_head": [5, 3]}, [3, 5], [3, 5]),
        ({"embed_tokens": [3, 5], "lm_head": [7, 8]}, [3, 5], [7, 8]),
        ({"lm_head": [7, 8]}, None, [7, 8]),
        ({"embed_tokens": [3, 5], "lm_head": []}, [3, 5], [3, 5]),
    ],
    ids=str,
)
def test_tied_heads_share_the_rows_as_in_peft(
    tmp_path: Path, indices: dict[str, list[int]], embedding: list[int] | None, head: list[int] | None
) -> None:
    own_head = indices.get("lm_head", []) not in ([], [3, 5])
    tensors = halves(Q) | (rows(EMBED, 2) if embedding else {}) | (rows(HEAD, 2, seed=1) if own_head else {})
    found = views(load(made_folder(tmp_path, tensors, trainable_token_indices=indices), TIED))

    for trained, expected in ((found.embedding_rows, embedding), (found.head_rows, head)):
        assert (None if trained is None else trained.ids.tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_run_is_one_aligned_piece_that_knows_its_ids_in_every_dtype(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = dora(Q, UP) | rows(EMBED, 3) | rows(HEAD, 1)
    indices = {"embed_tokens": [17, 0, TOKENS - 1], "lm_head": [4]}
    loaded = load(made_folder(tmp_path, tensors, use_dora=True, trainable_token_indices=indices), dtype=dtype)
    found = views(loaded)

    assert loaded.run.is_contiguous()
    assert loaded.run.nbytes == loaded.num_bytes
    assert loaded.num_bytes % ALIGNMENT_BYTES == 0
    pieces = [*found.linears.values(), found.embedding_rows, found.head_rows]
    tensors_of = [t for piece in pieces for t in vars_of(piece)]
    assert all((t.data_ptr() - loaded.run.data_ptr()) % ALIGNMENT_BYTES == 0 for t in tensors_of)
    assert sum(-(-t.nbytes // ALIGNMENT_BYTES) for t in tensors_of) * ALIGNMENT_BYTES == loaded.num_bytes
    assert found.embedding_rows is not None
    assert found.embedding_rows.ids.tolist() == [0, 17, TOKENS - 1]


def vars_of(piece: object) -> list[Tensor]:
    names = type(piece).__slots__  # type: ignore[attr-defined]
    return [value for name in names if (value := getattr(piece, name)) is not None]


@pytest.mark.parametrize(
    ("tensors", "settings", "targets", "kinds"),
    [
        (halves(Q), {}, TARGETS, ()),
        (halves(Q), {"use_rslora": True}, TARGETS, ("rslora",)),
        (dora(Q), {"use_dora": True}, TARGETS, ("dora",)),
        (halves(Q), {"alora_invocation_tokens": [4, 5]}, TARGETS, ("alora",)),
        (halves(Q) | vector(Q, BIAS), {"lora_bias": True}, TARGETS, ("lora_bias",)),
        (halves(EMBED), {}, TARGETS, ("embedding",)),
        (halves(EMBED), {"ensure_weight_tying": True}, TIED, ("embedding", "head")),
        (dora(HEAD, Q), {"use_dora": True, "use_rslora": True}, TARGETS, ("dora", "head", "rslora")),
        (halves(Q) | rows(EMBED, 1), {"trainable_token_indices": [1]}, TARGETS, ("token_rows",)),
    ],
    ids=lambda value: "+".join(value) or "lora" if isinstance(value, tuple) else "",
)
def test_kinds_are_told(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    settings: dict[str, object],
    targets: ModelTargets,
    kinds: tuple[str, ...],
) -> None:
    loaded = load(made_folder(tmp_path, tensors, **settings), targets)

    assert loaded.kinds == kinds
    assert loaded.invocation_tokens == tuple(settings.get("alora_invocation_tokens", ()))  # type: ignore[arg-type]


def test_all_that_changes_the_arithmetic_is_in_the_revision(tmp_path: Path) -> None:
    def revision(tensors: dict[str, Tensor], **settings: object) -> str:
        return load(made_folder(tmp_path, tensors, **settings), TIED).revision

    plain, with_rows = halves(Q), halves(Q) | rows(EMBED, 2)
    biased, ends = plain | vector(Q, BIAS), halves(EMBED) | halves(HEAD)
    found = [
        revision(plain),
        revision(plain, alora_invocation_tokens=[1, 2]),
        revision(plain, alora_invocation_tokens=[2, 1]),
        revision(plain, alora_invocation_tokens=[1, 2, 3]),
        revision(dora(Q), use_dora=True),
        revision(dora(Q) | vector(Q, MAGNITUDE, seed=9), use_dora=True),
        revision(biased, lora_bias=True),
        revision(plain | vector(Q, BIAS, seed=9), lora_bias=True),
        revision(with_rows, trainable_token_indices=[4, 5]),
        revision(with_rows, trainable_token_indices=[5, 4]),
        revision(halves(Q) | rows(EMBED, 2, seed=9), trainable_token_indices=[4, 5]),
        revision(halves(Q) | rows(HEAD, 2), trainable_token_indices={"lm_head": [4, 5]}),
        revision(halves(EMBED)),
        revision(halves(EMBED), ensure_weight_tying=True),
        revision(ends),
        revision(halves(EMBED) | halves(HEAD, seed=9)),
    ]

    assert len(set(found)) == len(found)
    assert revision(plain, trainable_token_indices=[], use_dora=False, lora_bias=None) == found[0]
    renamed = {name.replace(MAGNITUDE, f"{MAGNITUDE}.default.weight"): t for name, t in dora(Q).items()}
    assert revision(renamed, use_dora=True) == found[4]


# --- The base's own weights, saved along ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("spelling", ["base_layer.weight", "weight", "token_adapter.base_layer.weight"])
def test_whole_embeddings_that_are_the_served_ones_are_left_aside(
    tmp_path: Path, spelling: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """Whichever was rounded: the checkpoint when it was trained on, or when it is served."""
    base = DenseBase.random()
    served = DenseBase(tuple(weight.to(dtype) for weight in base.weights), {})
    alone = halves(Q)
    tensors = {key(path, spelling): base.table(target).to(stored) for target, path in ((2, EMBED), (3, HEAD))}

    both = load(made_folder(tmp_path / "both", alone | tensors), base=served)

    assert both.revision == load(made_folder(tmp_path / "alone", alone)).revision
    assert both.num_bytes == load(made_folder(tmp_path / "alone", alone)).num_bytes


@pytest.mark.parametrize("place", [(0, 0), (TOKENS - 1, WIDTH - 1)])
@pytest.mark.parametrize("value", [0.5, NAN])
def test_whole_embedding_that_differs_anywhere_is_refused(
    tmp_path: Path, place: tuple[int, int], value: float
) -> None:
    base = DenseBase.random()
    table = base.table(2).contiguous()
    table[place] = value
    folder = made_folder(tmp_path, halves(EMBED) | {key(EMBED, "base_layer.weight"): table})

    with pytest.raises(AdapterIncompatible, match=r"embed_tokens\.base_layer.*own weight"):
        load(folder, base=base)


# --- Refusals ---------------------------------------------------------------------------------------------

DORA, BIASED, ROWS = {"use_dora": True}, {"lora_bias": True}, {"trainable_token_indices": [1, 2]}


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    assert name in tensors
    return {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize(
    ("tensors", "settings", "error", "words"),
    [
        # DoRA
        (halves(Q), DORA, AdapterInvalid, (MAGNITUDE, "missing", "use_dora")),
        (dora(Q), {}, AdapterInvalid, (MAGNITUDE, "does not ask")),
        (dora(Q) | {key(Q, MAGNITUDE): torch.ones(9)}, DORA, AdapterIncompatible, (MAGNITUDE, "[9]", "[8]")),
        (dora(Q) | {key(Q, MAGNITUDE): torch.ones(1, 8)}, DORA, AdapterIncompatible, ("[1, 8]",)),
        (dora(Q) | {key(Q, MAGNITUDE): torch.full((8,), NAN)}, DORA, AdapterInvalid, (MAGNITUDE, "NaN")),
        (dora(Q) | {key(Q, MAGNITUDE): torch.full((8,), 1e30)}, DORA, AdapterInvalid, (MAGNITUDE, "large")),
        (dora(Q) | {key(Q, "lora_A.weight"): torch.full((2, 8), NAN)}, DORA, AdapterInvalid, ("lora_A",)),
        (dora(Q) | {key(Q, "lora_B.weight"): torch.full((8, 2), INF)}, DORA, AdapterInvalid, ("lora_B",)),
        ({key(Q, MAGNITUDE): torch.ones(8)}, DORA, AdapterInvalid, ("lora_A", "missing")),
        (dora(Q), DORA | BIASED, AdapterInvalid, ("use_dora", "lora_bias")),
        (dora(Q), DORA | {"alora_invocation_tokens": [1]}, AdapterInvalid, ("use_dora", "alora")),
        (dora(Q), {"use_dora": "yes"}, AdapterInvalid, ("use_dora", "true or false")),
        # lora_bias
        (halves(Q), BIASED, AdapterInvalid, (BIAS, "missing", "lora_bias")),
        (halves(Q) | vector(Q, BIAS), {}, AdapterInvalid, (BIAS, "does not ask")),
        (halves(Q) | {key(Q, BIAS): torch.ones(7)}, BIASED, AdapterIncompatible, ("[7]", "[8]")),
        (halves(Q) | {key(Q, BIAS): torch.full((8,), -INF)}, BIASED, AdapterInvalid, (BIAS, "infinite")),
        (halves(EMBED), BIASED, AdapterInvalid, ("lora_bias",)),
        # embeddings and heads
        (
            without(halves(EMBED), key(EMBED, "lora_embedding_B")),
            {},
            AdapterInvalid,
            ("embedding_B", "missing"),
        ),
        (
            halves(EMBED) | {key(EMBED, "lora_embedding_A"): torch.ones(2, TOKENS + 1)},
            {},
            AdapterIncompatible,
            ("[2, 21]", "[2, 20]"),
        ),
        (
            halves(EMBED) | {key(EMBED, "lora_embedding_A"): torch.full((2, TOKENS), NAN)},
            {},
            AdapterInvalid,
            ("embedding_A", "NaN"),
        ),
        (
            {key(EMBED, "lora_A.weight"): torch.ones(2, 8), key(EMBED, "lora_B.weight"): torch.ones(8, 2)},
            {},
            AdapterInvalid,
            ("lora_embedding_A", "missing"),
        ),
        (
            {key(Q, "lora_embedding_A"): torch.ones(2, 8), key(Q, "lora_embedding_B"): torch.ones(8, 2)},
            {},
            AdapterInvalid,
            ("lora_A", "missing"),
        ),
        (halves(HEAD), {"target_modules": ["q_proj"]}, AdapterInvalid, ("lm_head", "does not target")),
        (halves(HEAD), {"target_modules": "all-linear"}, AdapterInvalid, ("lm_head", "does not target")),
        (halves(EMBED), {"target_modules": "all-linear"}, AdapterInvalid, ("embed_tokens",)),
        (
            {name.replace(EMBED, "model.embed_positions"): t for name, t in halves(EMBED).items()},
            {},
            AdapterIncompatible,
            ("embed_positions",),
        ),
        (
            halves(Q) | {key(Q, "base_layer.weight"): torch.ones(8, 8)},
            {},
            AdapterInvalid,
            ("q_proj.base_layer",),
        ),
        (
            halves(Q) | {key(HEAD, "weight"): torch.ones(21, 8)},
            {},
            AdapterIncompatible,
            ("[21, 8]", "[20, 8]"),
        ),
        (
            halves(Q) | {key(HEAD, "modules_to_save.default.weight"): torch.ones(20, 8)},
            {},
            AdapterInvalid,
            ("modules_to_save",),
        ),
        # token rows
        (halves(Q), ROWS, AdapterInvalid, (DELTA, "missing", "trainable_token_indices")),
        (halves(Q) | rows(EMBED, 2), {}, AdapterInvalid, (DELTA, "trainable_token_indices")),
        (halves(Q) | rows(EMBED, 3), ROWS, AdapterIncompatible, ("[3, 8]", "[2, 8]")),
        (halves(Q) | {key(EMBED, DELTA): torch.ones(2, 9)}, ROWS, AdapterIncompatible, ("[2, 9]",)),
        (halves(Q) | {key(EMBED, DELTA): torch.ones(16)}, ROWS, AdapterIncompatible, ("[16]",)),
        (halves(Q) | {key(EMBED, DELTA): torch.full((2, 8), NAN)}, ROWS, AdapterInvalid, (DELTA, "NaN")),
        (halves(Q) | rows(Q, 2), ROWS, AdapterInvalid, (DELTA, "missing")),
        (
            halves(Q) | rows(EMBED, 2),
            {"trainable_token_indices": {"q_proj": [1, 2]}},
            AdapterError,
            ("q_proj",),
        ),
        (halves(Q) | rows(EMBED, 2), {"trainable_token_indices": {"": [1, 2]}}, AdapterError, ("neither",)),
        (
            halves(Q) | rows(EMBED, 2),
            {"trainable_token_indices": {"embed_tokens": [1, 2], "model.embed_tokens": [3, 4]}},
            AdapterInvalid,
            ("twice",),
        ),
        (halves(EMBED) | rows(EMBED, 2), ROWS, AdapterInvalid, ("trainable_token_indices", "embedding")),
        (
            halves(HEAD) | rows(HEAD, 2),
            {"trainable_token_indices": {"lm_head": [1, 2]}},
            AdapterInvalid,
            ("trainable_token_indices", "head"),
        ),
        (
            halves(Q) | rows(EMBED, 2),
            ROWS | {"alora_invocation_tokens": [1]},
            AdapterInvalid,
            ("trainable_token_indices", "alora_invocation_tokens"),
        ),
        (halves(EMBED), {"alora_invocation_tokens": [1]}, AdapterInvalid, ("alora", "embedding")),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_tensors_that_contradict_the_config_or_the_model_are_refused_by_name(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    settings: dict[str, object],
    error: type[AdapterError],
    words: tuple[str, ...],
) -> None:
    with pytest.raises(error) as refusal:
        load(made_folder(tmp_path, tensors, **settings))
    for word in words:
        assert word in refusal.value.message
    assert len(refusal.value.message) < 600
    assert str(tmp_path) not in refusal.value.message


@pytest.mark.parametrize("setting", ["trainable_token_indices", "alora_invocation_tokens"])
@pytest.mark.parametrize(
    "ids",
    [
        [-1, 2],
        [True, 2],
        [1.0, 2],
        ["1", 2],
        [[1], 2],
        [2**31, 2],
        [1, None],
        "12",
        5,
        {"embed_tokens": 3},
        True,
    ],
    ids=str,
)
def test_what_is_no_list_of_tokens_is_refused(tmp_path: Path, setting: str, ids: object) -> None:
    folder = made_folder(tmp_path, halves(Q) | rows(EMBED, 2), **{setting: ids})

    with pytest.raises(AdapterInvalid, match=setting):
        load(folder)


@pytest.mark.parametrize("ids", [[5, 5], [1, 2, 1]])
def test_token_that_is_named_twice_is_refused(tmp_path: Path, ids: list[int]) -> None:
    """PEFT leaves open which of the rows counts."""
    folder = made_folder(tmp_path, halves(Q) | rows(EMBED, len(ids)), trainable_token_indices=ids)

    with pytest.raises(AdapterInvalid, match=r"trainable_token_indices.*twice"):
        load(folder)


@pytest.mark.parametrize("setting", ["trainable_token_indices", "alora_invocation_tokens"])
def test_tokens_that_the_model_does_not_have_are_refused_with_the_reason(
    tmp_path: Path, setting: str
) -> None:
    tensors = halves(Q) | (rows(EMBED, 2) if setting.startswith("train") else {})
    load(made_folder(tmp_path, tensors, **{setting: [0, TOKENS - 1]}))

    with pytest.raises(AdapterIncompatible, match=rf"{setting}.*token {TOKENS}; .* 0 to {TOKENS - 1}"):
        load(made_folder(tmp_path, tensors, **{setting: [0, TOKENS]}))


@pytest.mark.parametrize("setting", ["trainable_token_indices", "alora_invocation_tokens"])
def test_a_million_tokens_are_refused_at_once(tmp_path: Path, setting: str) -> None:
    folder = made_folder(tmp_path, halves(Q))
    config = json.loads(folder.config_path.read_text())
    folder.config_path.write_text(json.dumps(config | {setting: [1] * 600_000}))
    with pytest.raises(AdapterInvalid, match="more than"):
        load(folder)
    folder.config_path.write_text(json.dumps(config | {setting: [1] * 70_000}))
    with pytest.raises(AdapterInvalid, match=f"{setting}.*at most"):
        load(folder)
    folder.config_path.write_text(json.dumps(config | {setting: list(range(1_000_000))}))
    with pytest.raises(AdapterInvalid, match="larger than"):
        load(folder)
    folder.config_path.write_text(json.dumps(config | {"alora_invocation_tokens": [1] * 5000}))
    with pytest.raises(AdapterInvalid, match="1 to 4096"):
        load(folder)


def test_alora_without_invocation_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="alora_invocation_tokens"):
        load(made_folder(tmp_path, halves(Q), alora_invocation_tokens=[]))


def test_row_without_a_length_is_refused(tmp_path: Path) -> None:
    """W + s B A is zero somewhere, or so large that its length is infinite."""
    base = DenseBase.random()
    base.weights[0][3].zero_()
    tensors = dora(Q)
    tensors[key(Q, "lora_B.weight")][3].zero_()
    with pytest.raises(AdapterInvalid, match=f"{MAGNITUDE}.*infinite"):
        load(made_folder(tmp_path, tensors, use_dora=True), base=base)


def test_dora_cannot_be_loaded_without_the_models_weights(tmp_path: Path) -> None:
    folder = made_folder(tmp_path, dora(Q), use_dora=True)
    with pytest.raises(AdapterInvalid, match="use_dora"):
        load_weights(folder.path, TARGETS, torch.float32, 1 << 20)
    assert read_outline(folder.path, TARGETS, torch.float32, 1 << 20).kinds == ("dora",)


def test_token_rows_of_a_head_with_a_bias_are_refused(tmp_path: Path) -> None:
    """PEFT computes such a head without its bias."""
    folder = made_folder(tmp_path, halves(Q) | rows(HEAD, 1), trainable_token_indices={"lm_head": [1]})
    load(folder)
    with pytest.raises(AdapterInvalid, match=r"trainable_token_indices.*bias"):
        load(folder, base=DenseBase.random(biased=(3,)))


def test_tied_rows_and_tied_terms_are_refused_where_peft_cannot_compute_them(tmp_path: Path) -> None:
    both = dora(HEAD) | rows(EMBED, 1)
    folder = made_folder(tmp_path, both, use_dora=True, trainable_token_indices=[1])
    load(folder, TARGETS)
    with pytest.raises(AdapterInvalid, match=r"trainable_token_indices.*head"):
        load(folder, TIED)
    folder = made_folder(tmp_path, dora(EMBED), use_dora=True, ensure_weight_tying=True)
    with pytest.raises(AdapterInvalid, match=f"{HEAD}.*{MAGNITUDE}.*missing"):
        load(folder, TIED)
    indices = {"embed_tokens": [1], "lm_head": [2]}
    tensors = halves(Q) | rows(EMBED, 1) | rows(HEAD, 1)
    folder = made_folder(tmp_path, tensors, trainable_token_indices=indices)
    load(folder, TIED)
    with pytest.raises(AdapterInvalid, match="ensure_weight_tying"):
        load(folder.set(ensure_weight_tying=True), TIED)


def test_every_piece_counts_against_the_budget(tmp_path: Path) -> None:
    tensors = dora(Q, UP, EMBED) | rows(HEAD, 4)
    folder = made_folder(tmp_path, tensors, use_dora=True, trainable_token_indices={"lm_head": [1, 2, 3, 4]})
    size = load(folder).num_bytes
    assert size >= sum(t.nbytes for t in tensors.values())

    load(folder, max_bytes=size)
    with pytest.raises(AdapterTooLarge, match=str(size)):
        load(folder, max_bytes=size - 1)
    outline = read_outline(folder.path, with_biases(TARGETS, DenseBase.random()), torch.float32, size)
    assert outline == Outline(
        2, ("q_proj", "up_proj", "embed_tokens"), size, ("dora", "embedding", "token_rows")
    )


def test_adapter_of_token_rows_alone_has_no_rank(tmp_path: Path) -> None:
    loaded = load(made_folder(tmp_path, rows(EMBED, 1), trainable_token_indices=[1]))

    assert (loaded.rank, loaded.target_names, loaded.kinds) == (0, (), ("token_rows",))
    assert loaded.num_bytes == ALIGNMENT_BYTES * 2


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_is_never_anything_but_an_adapter_error(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    first = made_folder(
        tmp_path / "first",
        dora(Q, EMBED, HEAD) | {key(HEAD, "base_layer.weight"): DenseBase.random().table(3)},
        use_dora=True,
        ensure_weight_tying=True,
    )
    second = made_folder(
        tmp_path / "second",
        halves(Q) | vector(Q, BIAS) | rows(EMBED, 2) | rows(HEAD, 2),
        lora_bias=True,
        trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [3, 4]},
    )
    refusals: list[str] = []
    for folder in (first, second):
        load(folder, TIED)
        files = {path: path.read_bytes() for path in (folder.config_path, folder.weights_path)}
        for _ in range(60):
            path = chance.choice(list(files))
            damaged = bytearray(files[path])
            for _ in range(chance.choice([1, 1, 2, 8])):
                damage(damaged, chance, limit=1200 if path == folder.weights_path else len(damaged))
            path.write_bytes(damaged)
            try:
                pieces = views(load(folder, TIED))
            except AdapterError as error:
                refusals.append(error.message)
            else:
                found = [*pieces.linears.values(), pieces.embedding, pieces.head]
                found += [pieces.embedding_rows, pieces.head_rows]  # type: ignore[list-item]
                assert all(t.isfinite().all() for piece in found if piece is not None for t in vars_of(piece))
            path.write_bytes(files[path])
    assert len(refusals) > 20
    assert all(str(tmp_path) not in message and len(message) < 1500 for message in refusals)
