"""Whether a tokenizer.json turns texts into the ids that the served model's tokenizer makes of them.

What is compared is what the file means, not how it is written: trainers write the whole tokenizer beside each
adapter, and its spelling changes with every release. Differences that only add tokens are told; all others
are a problem, and the answer is a sentence about the first one. Runs in the sandbox.
"""

import json
from collections.abc import Mapping
from typing import Any

from adapters.names import shown
from server.text.added_tokens import MAX_ADDED_TOKENS, AddedToken
from server.text.tokenizer import SECTIONS

_IGNORED = frozenset(("trim_offsets",))  # where a token lies in its text, not which one it is
_ONLY_OFFSETS = {"type": "ByteLevel"}
_MEANINGLESS: tuple[object, ...] = (None, False, "", [], {})
_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Json = dict[str, Any]


class _Problem(Exception):
    """They differ; the message says how."""


def compare(theirs: bytes, ours: bytes, base: Json) -> Json:
    """{"problem": why the file cannot be used, or null, "added": its added tokens with their ids,
    "frame": the ids that it puts around a text, or null where those are the base's}.

    `ours` is the base's own file; `base` what became of it in memory, which its class may have changed:
    {"sections", "model": options, "added": [token, id]}.
    """
    try:
        return {"problem": None, **_compare(_object(theirs), _object(ours), base)}
    except _Problem as problem:
        return {"problem": str(problem)}


def _compare(theirs: Json, ours: Json, base: Json) -> Json:
    added = _added_tokens(theirs)
    _compare_vocabularies(theirs, ours, added, dict(base["added"]))
    _compare_models(theirs["model"], ours["model"], base["model"])
    same = {name: _is_same(name, theirs, ours, base["sections"]) for name in SECTIONS}
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if not same[name]:
            raise _Problem(f"its {name} is not the one of the served model's tokenizer")
    frame = None if same["post_processor"] else _frame(theirs.get("post_processor"))
    return {"added": added, "frame": frame}


def _object(raw: bytes) -> Json:
    value = json.loads(raw)
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise _Problem("it is not a tokenizer")
    return value


# --- Vocabulary -----------------------------------------------------------------------------------------


def _added_tokens(tokenizer: Json) -> list[Json]:
    """As the file has them, complete. Raises _Problem."""
    entries = tokenizer.get("added_tokens") or []
    if not isinstance(entries, list) or len(entries) > MAX_ADDED_TOKENS:
        raise _Problem(f"it has more than {MAX_ADDED_TOKENS} added tokens")
    return [_added_token(entry) for entry in entries]


def _added_token(entry: object) -> Json:
    if not isinstance(entry, dict) or type(entry.get("id")) is not int or entry["id"] < 0:
        raise _Problem("its added tokens have no ids")
    token = AddedToken.parse(entry)
    if token is None:
        raise _Problem("its added tokens are not spelled out")
    return {"id": entry["id"], "content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}


def _compare_vocabularies(theirs: Json, ours: Json, added: list[Json], base_added: dict[str, int]) -> None:
    their_model, our_model = _vocabulary(theirs["model"]), _vocabulary(ours["model"])
    new = {token["content"]: token["id"] for token in added}
    their_ids, our_ids = {**their_model, **new}, {**our_model, **base_added}
    for token, token_id in their_ids.items():
        if our_ids.get(token, token_id) != token_id:
            raise _Problem(
                f"token {shown(token)} has the id {token_id}, and {our_ids[token]} in the served model's "
                f"tokenizer: the adapter was not trained on this model"
            )
    if unknown := next((token for token in their_model if token not in our_ids and token not in new), None):
        raise _Problem(f"its vocabulary has {shown(unknown)}, which the served model's has not")
    if missing := next((token for token in our_model if token not in their_ids), None):
        raise _Problem(f"its vocabulary lacks {shown(missing)} of the served model's")


def _vocabulary(model: Json) -> dict[str, int]:
    """Token to id: BPE and others have it so, Unigram lists its pieces with their scores. Raises _Problem."""
    vocab = model.get("vocab")
    if isinstance(vocab, list) and all(isinstance(piece, list) and len(piece) == 2 for piece in vocab):
        return {piece[0]: i for i, piece in enumerate(vocab)}
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise _Problem("its vocabulary is none")
    return vocab


def _compare_models(theirs: Json, ours: Json, in_memory: Json) -> None:
    """How the vocabulary is applied."""
    if theirs.get("type", ours.get("type")) != ours.get("type", theirs.get("type")):
        raise _Problem(f"it is a {shown(theirs.get('type'))} tokenizer, unlike the served model's")
    if _merges(theirs) != _merges(ours) or _scores(theirs) != _scores(ours):
        raise _Problem("it joins the pieces of words in another order than the served model's tokenizer")
    asked = _options(theirs)
    if asked not in (_options(ours), _options(in_memory)):
        raise _Problem("the options of its vocabulary are not those of the served model's")


def _merges(model: Json) -> list[tuple[str, ...]]:
    merges = model.get("merges") or []
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _scores(model: Json) -> list[object]:
    vocab = model["vocab"]
    return [piece[1] for piece in vocab] if isinstance(vocab, list) else []


def _options(model: Json) -> Json:
    """All that is neither the vocabulary nor as if it were not there."""
    return {
        key: value
        for key, value in model.items()
        if key not in ("type", "vocab", "merges") and value not in _MEANINGLESS
    }


# --- What happens before and after ----------------------------------------------------------------------


def _is_same(name: str, theirs: Json, ours: Json, in_memory: Json) -> bool:
    """Whether a section means what it means in our file, or in what became of that in memory."""
    asked, known = theirs.get(name), (ours.get(name), in_memory[name])
    if asked in known:
        return True
    meaning = _meaning(name, asked)
    return any(meaning == _meaning(name, one) for one in known)


def _meaning(name: str, section: object) -> object:
    """A section in the words of this release of the library, without what changes no id. Raises _Problem."""
    if section is None:
        return None
    return _essence(name, json.loads(_rewritten(name, section))[name])


def _rewritten(name: str, section: object) -> str:
    from tokenizers import Tokenizer

    empty: Json = {"type": "BPE", "vocab": {}, "merges": []}
    blank: Json = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "model": empty}
    try:
        text: str = Tokenizer.from_str(
            json.dumps({**blank, **dict.fromkeys(SECTIONS), name: section})
        ).to_str()
    except Exception as error:  # the library has no class of its own for what it cannot read
        raise _Problem(f"its {name} cannot be read") from error
    return text


def _essence(name: str, section: Any) -> object:
    if not isinstance(section, dict):
        return section
    for key in _PARTS:
        if section.get("type") == "Sequence" and isinstance(section.get(key), list):
            parts = [part for part in (_essence(name, one) for one in section[key]) if part is not None]
            return {"type": "Sequence", "parts": parts} if len(parts) > 1 else (parts or [None])[0]
    if section.get("type") == "ByteLevel" and name == "decoder":
        return _ONLY_OFFSETS  # its options are of use to the other two that have this name
    if section.get("type") == "ByteLevel" and name == "post_processor":
        return None
    return {key: value for key, value in section.items() if key not in _IGNORED}


def _frame(post_processor: object) -> dict[str, list[int]]:
    """The ids before and after a text. Raises _Problem for a post-processor of another kind."""
    essence = _meaning("post_processor", post_processor)
    if essence is None:
        return {"before": [], "after": []}
    assert isinstance(essence, dict)
    if essence.get("type") == "TemplateProcessing":
        return _frame_of_template(essence)
    if essence.get("type") in ("BertProcessing", "RobertaProcessing"):
        return {"before": [essence["cls"][1]], "after": [essence["sep"][1]]}
    raise _Problem("its post_processor is not the one of the served model's tokenizer")


def _frame_of_template(template: Mapping[str, Any]) -> dict[str, list[int]]:
    before: list[int] = []
    after: list[int] = []
    num_texts = 0
    for piece in template["single"]:
        if "Sequence" in piece:
            num_texts += 1
            continue
        (after if num_texts else before).extend(
            template["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        )
    if num_texts != 1:
        raise _Problem(f"its post_processor puts a text {num_texts} times")
    return {"before": before, "after": after}
