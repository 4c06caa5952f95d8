"""Adapter folders made by an enemy. Each of `BOMBS` turns a good PEFT folder into one that must be refused.

They are cheap to make and meant to be dear to read: files of a terabyte that take no room, a million tensors,
patterns that never end. Tests of the loader and of the whole server share them.
"""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MIB, TIB = 1 << 20, 1 << 40
LONGEST_HEADER = 4 * MIB

Break = Callable[[Path], None]


def config(text: bytes) -> Break:
    def break_it(folder: Path) -> None:
        (folder / CONFIG).write_bytes(text)

    return break_it


def settings(**changes: object) -> Break:
    def break_it(folder: Path) -> None:
        known = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(known | changes))

    return break_it


def setting_as_text(name: str, text: str) -> Break:
    """For values that `json.dumps` would not write."""

    def break_it(folder: Path) -> None:
        known = json.loads((folder / CONFIG).read_text())
        known.pop(name, None)
        (folder / CONFIG).write_text(json.dumps(known)[:-1] + f', "{name}": {text}}}')

    return break_it


def header(text: bytes, *, body_bytes: int = 0) -> Break:
    """The body takes no room on the disk."""

    def break_it(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / WEIGHTS, 8 + len(text) + body_bytes)

    return break_it


def sparse(name: str, num_bytes: int = TIB) -> Break:
    return lambda folder: os.truncate(folder / name, num_bytes)


def tensors(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Break:
    def break_it(folder: Path) -> None:
        changed = {name: change(name, old) for name, old in load_file(folder / WEIGHTS).items()}
        save_file(changed, folder / WEIGHTS)

    return break_it


def replaced(name: str, make: Callable[[Path], object]) -> Break:
    def break_it(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return break_it


def header_of_a_terabyte(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(TIB.to_bytes(8, "little") + b"{")
    os.truncate(folder / WEIGHTS, 2 * TIB)


def bind_socket(path: Path) -> None:
    """Its name may be too long for the system's address, so it is bound from inside the folder."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def huge_rank(folder: Path) -> None:
    """Two gigabytes of zeros of which none is on the disk; config and shapes agree."""
    settings(r=1_000_000, rank_pattern={})(folder)
    name, width = next(
        (name, old.shape[1]) for name, old in load_file(folder / WEIGHTS).items() if ".lora_A." in name
    )
    other = name.replace(".lora_A.", ".lora_B.")
    height = load_file(folder / WEIGHTS)[other].shape[0]
    middle, end = 4_000_000 * width, 4_000_000 * (width + height)
    text = {
        name: {"dtype": "F32", "shape": [1_000_000, width], "data_offsets": [0, middle]},
        other: {"dtype": "F32", "shape": [height, 1_000_000], "data_offsets": [middle, end]},
    }
    header(json.dumps(text).encode(), body_bytes=end)(folder)


def many(count: int, entry: bytes, limit: int | None = None) -> bytes:
    """An object of that many entries, in which %d is the number of each; or as many as the limit allows."""
    entries = [entry % number for number in range(count)]
    if limit is not None:
        entries = entries[: limit // (len(entries[-1]) + 1)]
    return b"{" + b",".join(entries) + b"}"


EMPTY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
ONE = b'{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
ENDLESS = "(.|.)+[x-z]"  # modules end in "proj" and the like: two ways for each character, and none fits

BOMBS: dict[str, Break] = {
    # sizes
    "terabyte behind the tensors": sparse(WEIGHTS),
    "terabyte of config": sparse(CONFIG),
    "terabyte of header": header_of_a_terabyte,
    "tensor of a terabyte": header(
        b'{"x":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (TIB // 4, TIB), body_bytes=TIB
    ),
    "tensor of more bytes than there are": header(
        b'{"x":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,16]}}',
        body_bytes=16,
    ),
    "rank of a million": huge_rank,
    "rank beyond all": settings(r=10**30),
    # numbers of things
    "million tensors": header(many(1_000_000, b'"t%d":' + EMPTY)),
    "header full of tensors": header(many(200_000, b'"t%d":' + EMPTY, LONGEST_HEADER)),
    "header full of lists": header(b'{"x":[' + b"[]," * (LONGEST_HEADER // 3 - 10) + b"[]]}"),
    "header full of numbers": header(b'{"x":[' + b"1e5," * (LONGEST_HEADER // 4 - 10) + b"1]}"),
    "header full of keys": header(many(700_000, b'"%06x":1', LONGEST_HEADER)),
    "header as full of keys as may be": header(many(99_000, b'"%06x":1')),
    "header as full of tensors as may be": header(many(12_000, b'"t%d":' + EMPTY)),
    "header full of notes": header(
        b'{"__metadata__":' + many(700_000, b'"%06x":"x"', LONGEST_HEADER - 100) + b"}"
    ),
    "header of one long name": header(
        b'{"' + b"x" * (LONGEST_HEADER - 100) + b'":' + ONE + b"}", body_bytes=16
    ),
    "config full of lists": config(b'{"peft_type":"LORA","x":[' + b"[]," * 600_000 + b"[]]}"),
    "config full of keys": config(many(150_000, b'"%06x":1')),
    "hundred thousand patterns": settings(rank_pattern={f"m{number}": 2 for number in range(100_000)}),
    "thousands of other patterns": settings(
        alpha_pattern={f"m{number:05d}" + "(a|b|c)+" * 12: 2 for number in range(16_000)}
    ),
    "thousands of layer names": settings(
        layers_pattern=[f"x{number}" for number in range(16_000)], layers_to_transform=[0]
    ),
    # patterns that never end
    "endless pattern of targets": settings(target_modules=ENDLESS),
    "endless patterns of ranks": settings(
        rank_pattern={f"{ENDLESS}{{1,{number}}}": 2 for number in range(1, 100)}
    ),
    "pattern of nested repeats": settings(target_modules="((((a{1,999}){1,999}){1,999}){1,999})+.*"),
    "pattern of nested groups": settings(target_modules="(" * 4000 + ")" * 4000),
    # JSON
    "deep config": config(b'{"peft_type":' * 150_000),
    "deep header": header(b"[" * 1_000_000),
    "number of a million digits": setting_as_text("r", "9" * 1_000_000),
    "number beyond all": setting_as_text("lora_alpha", "1e999"),
    "not a number": setting_as_text("lora_alpha", "NaN"),
    "key twice in the config": setting_as_text("lora_alpha", '1, "lora_alpha": 2'),
    "key twice in the header": header(b'{"a":' + ONE + b',"a":' + ONE + b"}", body_bytes=16),
    "key twice in an entry": header(
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[2,2],"data_offsets":[0,16]}}', body_bytes=16
    ),
    "header of broken text": header(b'{"\xff\xfe":' + ONE + b"}", body_bytes=16),
    "names that are no text": header(b'{"\\ud800":' + ONE + b"}", body_bytes=16),
    "config with a mark": config(b"\xef\xbb\xbf{}"),
    # numbers
    "infinite": tensors(lambda name, old: old.fill_(torch.inf)),
    "one of all is not a number": tensors(
        lambda name, old: old.index_fill_(0, torch.tensor([0]), torch.nan) if "lora_B" in name else old
    ),
    "enormous": tensors(lambda name, old: torch.full_like(old, 1e30, dtype=torch.float32)),
    "whole numbers": tensors(lambda name, old: old.to(torch.int64)),
    "eight bits": tensors(lambda name, old: old.to(torch.float8_e4m3fn)),
    "truth values": tensors(lambda name, old: old > 0),
    "unknown dtype": header(b'{"a":{"dtype":"X7","shape":[2,2],"data_offsets":[0,16]}}', body_bytes=16),
    "no rank": tensors(lambda name, old: old[:0] if "lora_A" in name else old[:, :0]),
    # what is not a file
    "pipe for weights": replaced(WEIGHTS, os.mkfifo),
    "pipe for config": replaced(CONFIG, os.mkfifo),
    "folder for weights": replaced(WEIGHTS, os.mkdir),
    "socket for weights": replaced(WEIGHTS, bind_socket),
    "link to itself": replaced(WEIGHTS, lambda path: path.symlink_to(path)),
    "link to nowhere": replaced(CONFIG, lambda path: path.symlink_to("nowhere")),
}

LINKS: dict[str, Break] = {
    # refused where roots are kept, and not by the loader, which is given what was checked
    "link to a device": replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
    "link to a file of the system": replaced(CONFIG, lambda path: path.symlink_to("/etc/passwd")),
    "link that climbs": replaced(CONFIG, lambda path: path.symlink_to("../" * 40 + "etc/passwd")),
}
