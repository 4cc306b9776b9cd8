"""Faults that files come with: each function damages one file, or one thing in a folder, and says what.

What is damaged and how is drawn from ``chance``, so that a case is its seed and number.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
# Values that no key expects, and some that are nearly right.
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "0", "32", "x", "../../etc/passwd", "a\nb", "\x1b[31m", "\x00", "\ud800", "${oc.env:HOME}", "<b>",
    [], [1], [None], ["x", "y"], [[]], {}, {"a": 1}, {"": {}}, {"type": "x"}, "x" * 5000,
]  # fmt: skip
# JSON that is none, or no object, or more than a reader can take.
BROKEN_JSON = [
    b"", b"{", b"null", b"[]", b"1", b'"x"', b"{}", b"\xff\xfe{\x00}\x00", b"\x00" * 20, b'{"a": }',
    b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"a": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}",
]  # fmt: skip


def flip_bytes(file: Path, chance: Random) -> str:
    data = bytearray(file.read_bytes())
    # Half of them where the structure is.
    end = len(data) if chance.random() < 0.5 else min(len(data), 400)
    places = [chance.randrange(end) for _ in range(chance.choice([1, 1, 2, 8]))] if data else []
    for place in places:
        data[place] = chance.randrange(256)
    file.write_bytes(data)
    return f"bytes {places} of {file.name} changed"


def truncate(file: Path, chance: Random) -> str:
    data = file.read_bytes()
    kept = chance.choice(
        [0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, chance.randrange(len(data))]
    )
    file.write_bytes(data[:kept])
    return f"{file.name} cut to {kept} bytes"


def extend(file: Path, chance: Random) -> str:
    more = chance.choice([b"\x00", b"x" * 100, file.read_bytes()])
    file.write_bytes(file.read_bytes() + more)
    return f"{file.name} with {len(more)} bytes more"


def swap_for_something_else(file: Path, chance: Random) -> str:
    file.unlink()
    kind = chance.choice(["missing", "folder", "dangling link", "link to itself", "link to a text"])
    if kind == "folder":
        file.mkdir()
    elif kind == "dangling link":
        file.symlink_to("nowhere")
    elif kind == "link to itself":
        file.symlink_to(file.name)
    elif kind == "link to a text":
        file.symlink_to("/etc/hostname")
    return f"{file.name} is a {kind}"


def change_value(value: Any, chance: Random) -> tuple[Any, str]:
    """One entry of nested JSON removed, renamed or replaced. Returns the whole and what was done."""
    holders = list(_holders(value, ""))
    if not holders:
        return chance.choice(HOSTILE), "all replaced"
    holder, where = chance.choice(holders)
    if not holder:
        return chance.choice(HOSTILE), f"{where or 'all'} replaced"
    key = chance.choice(list(holder) if isinstance(holder, dict) else list(range(len(holder))))
    kind, other = chance.choice(["replace"] * 4 + ["remove", "rename"]), chance.choice(HOSTILE)
    if kind == "replace":
        holder[key] = other
        return value, f"{where}.{key} = {other!r:.40}"
    taken = holder.pop(key)
    if kind == "rename" and isinstance(holder, dict):
        holder[str(other)[:50]] = taken
    return value, f"{where}.{key} {kind}d"


def _holders(value: Any, where: str) -> Any:
    if isinstance(value, dict | list):
        yield value, where
        # Vocabularies are long and all alike.
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value))[:60]:
            yield from _holders(inner, f"{where}.{key}")


def change_json(file: Path, chance: Random) -> str:
    if chance.random() < 0.15:
        broken = chance.choice(BROKEN_JSON)
        file.write_bytes(broken)
        return f"{file.name} is {broken[:20]!r}"
    value, done = json.loads(file.read_text()), []
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        value, said = change_value(value, chance)
        done.append(said)
    file.write_text(json.dumps(value))
    return f"{file.name}: {'; '.join(done)}"


def change_header(file: Path, chance: Random) -> str:
    """The header of a safetensors file: its length, or what it says of a tensor."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if chance.random() < 0.3:
        said = chance.choice(
            [0, 1, length - 1, length + 1, 2**20, 99_999_999, 10**9, 2**63, 2**64 - 1]
        )
        file.write_bytes(struct.pack("<Q", said) + data[8:])
        return f"{file.name}: header of {said} bytes"
    name = chance.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    kind = chance.choice(["dtype", "shape", "offsets", "name", "whole", "any", "twice"])
    if kind == "dtype":
        entry["dtype"] = chance.choice(
            [
                "F64",
                "F32",
                "F16",
                "I64",
                "I32",
                "I16",
                "I8",
                "U8",
                "BOOL",
                "F8_E4M3",
                "F8_E8M0",
                "F4",
                "C64",
                "X",
                3,
            ]
        )
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = chance.choice(
            [
                shape[::-1],
                [*shape, 1],
                [],
                [0],
                [-1],
                [2**62, 2**62],
                [2**64 - 1],
                [*shape[:-1], 1],
                "x",
                [1.5],
            ]
        )
    elif kind == "offsets":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = chance.choice(
            [
                [end, start],
                [start + 1, end + 1],
                [0, end - start],
                [start, end + 2**40],
                [start],
                [-1, end],
                None,
            ]
        )
    elif kind == "name":
        header[str(chance.choice(HOSTILE))[:200]] = header.pop(name)
    elif kind == "whole":
        header[name] = chance.choice(HOSTILE)
    elif kind == "any":
        header, _ = change_value(header, chance)
    else:
        header["another"] = dict(entry)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return f"{file.name}: {kind} of {name} in the header"


def change_tensors(file: Path, chance: Random) -> str:
    """A valid safetensors file with other tensors in it."""
    tensors = load_file(file)
    name = chance.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = chance.choice(
        [
            "gone",
            "renamed",
            "transposed",
            "flat",
            "one more",
            "narrower",
            "type",
            "no number",
            "beside",
            "empty",
        ]
    )
    if kind == "renamed":
        tensors[f"{name}.{chance.choice(['x', 'weight', 'bias', 'codes', 'scale'])}"] = tensor
    elif kind == "transposed":
        tensors[name] = tensor.T if tensor.dim() == 2 else tensor.unsqueeze(0)
    elif kind == "flat":
        tensors[name] = tensor.reshape(-1)
    elif kind == "one more":
        tensors[name] = torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor.reshape(1, 1, 1)
    elif kind == "narrower":
        tensors[name] = tensor[..., : max(1, tensor.shape[-1] // 2)] if tensor.dim() else tensor
    elif kind == "type":
        other = [
            torch.int8,
            torch.uint8,
            torch.int64,
            torch.bool,
            torch.float64,
            torch.float8_e4m3fn,
        ]
        tensors[name] = tensor.float().to(chance.choice([*other, torch.float16, torch.float32]))
    elif kind == "no number":
        odd = chance.choice([float("nan"), float("inf"), 1e38, -(2.0**30)])
        whole = tensor.clone().reshape(-1)
        value = odd if whole.is_floating_point() else chance.choice([-1, 127, 0])
        whole[chance.randrange(len(whole))] = value
        tensors[name] = whole.reshape(tensor.shape)
    elif kind == "beside":
        tensors |= {
            name: tensor,
            str(chance.choice(HOSTILE))[:99].replace("\ud800", "?"): tensor.clone(),
        }
    elif kind == "empty":
        tensors[name] = tensor[:0] if tensor.dim() else tensor
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    return f"{file.name}: {name} {kind}"


def change_index(folder: Path, chance: Random) -> str:
    """An index, made where there is none, that says something else than the files."""
    file = folder / INDEX
    if not file.exists():
        names = list(load_file(folder / "model.safetensors"))
        file.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    weight_map = json.loads(file.read_text())["weight_map"]
    name = chance.choice(sorted(weight_map))
    kind = chance.choice(["file", "name", "any", "gone"])
    if kind == "file":
        weight_map[name] = chance.choice(
            ["../x.safetensors", "/etc/passwd", "config.json", "tokenizer.json", "missing.safetensors", ".",
             "..", "", "a/b", "x\x00y", "n" * 5000, 7, None, ["model.safetensors"], "model.safetensors\n"]
        )  # fmt: skip
    elif kind == "name":
        weight_map[str(chance.choice(HOSTILE))[:99]] = weight_map.pop(name)
    elif kind == "gone":
        del weight_map[name]
    else:
        return change_json(file, chance)
    file.write_text(json.dumps({"weight_map": weight_map}))
    return f"{file.name}: {kind} of {name}"


def change_text(file: Path, chance: Random) -> str:
    kinds = {
        "empty": b"",
        "blank": b" \n\n ",
        "a word": b"x",
        "zeros": b"\x00" * 5000,
        "latin": b"\xe9\xff\xfe" * 4000,
        "random": chance.randbytes(8000),
        "zip": b"PK\x03\x04" + bytes(40),
        "gzip": b"\x1f\x8b\x08" + bytes(40),
        "xz": b"\xfd7zXZ\x00" + bytes(40),
        "nested": b'{"text": ' + b"[" * 20000,
        "rows": b'{"text": 1}\n{"text": {"a": []}}\n',
        "mixed": b'{"text": "a"}\n{"text": 5}\n',
        "special": b"<|end|><|added|>" * 3000,
        "one line": b"a" * 100_000,
    }
    kind = chance.choice(sorted(kinds))
    file.write_bytes(kinds[kind])
    return f"{file.name} is {kind}"


Mutation = Callable[[Path, Random], str]
OF_ANY: tuple[Mutation, ...] = (truncate, flip_bytes, extend, swap_for_something_else)
OF_WEIGHTS: tuple[Mutation, ...] = (
    change_header,
    change_header,
    change_tensors,
    change_tensors,
    *OF_ANY,
)
OF_JSON: tuple[Mutation, ...] = (change_json, change_json, change_json, *OF_ANY)


def damage(folder: Path, chance: Random, only: str = "") -> str:
    """Damage a file of a model folder. only: the beginning of its name, if it must be one."""
    files = sorted(
        f for f in folder.iterdir() if f.name.startswith(only) and f.suffix in KINDS and f.is_file()
    )
    if not only and chance.random() < 0.1 and (folder / "model.safetensors").exists():
        return change_index(folder, chance)
    file = chance.choice(files)
    return chance.choice(KINDS[file.suffix])(file, chance)


KINDS: dict[str, tuple[Mutation, ...]] = {
    ".safetensors": OF_WEIGHTS,
    ".json": OF_JSON,
    ".gguf": (truncate, flip_bytes, flip_bytes, flip_bytes, extend, swap_for_something_else),
    ".jinja": OF_ANY,
}
