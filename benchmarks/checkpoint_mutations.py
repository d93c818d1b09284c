"""Ways in which a file of weights or settings is not what it should be."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SETTINGS = (".json", ".yaml")
READ = (*SETTINGS, ".safetensors", ".pth", ".bin", ".ckpt")
NESTED: Any = {"a": {"b": [None, {"c": "d"}]}}
EVIL: tuple[Any, ...] = (
    *(None, True, False, "", "12", "nan", "\u00fc\u2028\U0001f986", "x" * 100_000),
    *(-1, 0, 1, 7, 100_000, 10**9, 10**30, -(10**9)),
    *(0.5, 1e9, -1e-9, 1e308, math.nan, math.inf, -math.inf),
    *([], [1], [16, 16], [10**9, 1], [math.nan] * 3, [[[[]]]], {}, NESTED),
)
Change = Callable[[Path, random.Random], str]


def flip_bytes(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    count = rng.choice((1, 1, 8, 100))
    # Headers lie at the start of safetensors and at the end of zip files.
    end = min(len(data), 2000)
    spans = [(0, end), (len(data) - end, len(data)), (0, len(data))]
    low, high = rng.choice(spans)
    for _ in range(count):
        data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{count} bits"


def cut(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    length = rng.choice((0, 1, 8, 100, len(data) - 1, rng.randrange(len(data))))
    path.write_bytes(data[:length])
    return f"to {length} of {len(data)} bytes"


def insert_bytes(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    place, count = rng.randrange(len(data)), rng.choice((1, 8, 4096))
    path.write_bytes(data[:place] + rng.randbytes(count) + data[place:])
    return f"{count} bytes at {place}"


def replace_bytes(path: Path, rng: random.Random) -> str:
    kind = rng.choice(("text", "random", "length", "zeros", "deep"))
    data = path.read_bytes()
    made = {
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "random": rng.randbytes(1000),
        "length": rng.randbytes(8) + data[8:],
        "zeros": bytes(len(data)),
        "deep": b"[" * 200_000,
    }
    path.write_bytes(made[kind])
    return kind


def delete(path: Path, rng: random.Random) -> str:
    path.unlink()
    return ""


BYTES = (flip_bytes, flip_bytes, cut, insert_bytes, replace_bytes, delete)


def read(path: Path) -> tuple[Any, dict[str, str] | None]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        return load_file(path), metadata
    return torch.load(path, weights_only=False), None  # a file of ours


def tensors_in(content: Any) -> dict[Any, Any]:
    """The dictionary with most tensors, the content itself or inside of it."""
    inner = [tensors_in(v) for v in content.values() if isinstance(v, Mapping)]
    return max([content, *inner], key=lambda d: sum(map(torch.is_tensor, d.values())))


def write(path: Path, content: Any, metadata: dict[str, str] | None) -> None:
    if path.suffix == ".safetensors":
        state = {k: v.detach().clone().contiguous() for k, v in content.items()}
        save_file(state, path, metadata)
    else:
        zipped = "legacy" not in path.name
        torch.save(content, path, _use_new_zipfile_serialization=zipped)


def _reshaped(x: Tensor, rng: random.Random) -> Tensor:
    ways: list[Callable[[], Tensor]] = [
        lambda: x.flatten(),
        lambda: x[None],
        lambda: x.mT if x.ndim > 1 else x[:, None],
        lambda: x.flatten()[0],
        lambda: x[:0],
        lambda: x.new_zeros(0),
        lambda: torch.cat([x, x]),
        lambda: x[..., :-1],
        lambda: x.repeat_interleave(2, dim=-1),
        lambda: x.new_zeros((1,) * 8),
    ]
    return rng.choice(ways)()


TYPES = [
    *(torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn),
    *(torch.float64, torch.float16, torch.bfloat16, torch.int8),
]


def _spoiled(x: Tensor, rng: random.Random) -> Tensor:
    value = rng.choice((math.nan, math.inf, -math.inf))
    if rng.random() < 0.3 or x.ndim == 0:
        return torch.full_like(x, value)
    x = x.clone()
    x.view(-1)[rng.randrange(x.numel())] = value
    return x


def _odd(x: Tensor, rng: random.Random) -> Any:
    """Values that only a pickle holds."""
    values = [
        *("text", None, 3, [1.0, 2.0], {"x": x}, x.to_sparse(), nn.Parameter(x)),
        *(x.to("meta"), x.detach().requires_grad_(), NESTED, x.flatten().tolist()),
        *(x.mT.contiguous().mT if x.ndim > 1 else x, x[:1].expand_as(x)),
    ]
    return rng.choice(values)


def _new_name(name: str, names: list[str], rng: random.Random) -> str:
    return rng.choice(
        [
            *(f"{name}_x", f"module.{name}", name.upper(), "", ".", f"{name}."),
            *(rng.choice(names), name.replace(".0.", ".99999999999."), "blocks"),
            *(name.replace(".0.", ".x."), name.replace(".0.", "..")),
            *("blocks.x.y", "encoder.vit.blocks.-1.z", "\u00fc\u2028\x00"),
        ]
    )


def change_tensors(path: Path, rng: random.Random) -> str:
    content, metadata = read(path)
    state = tensors_in(content)
    names = [name for name, value in state.items() if torch.is_tensor(value)]
    name = rng.choice(names)
    tensor = state[name]
    pickled = path.suffix != ".safetensors"
    kinds = ["remove", "remove all", "rename", "reshape", "type", "not finite", "twice"]
    kind = rng.choice(kinds + ["odd", "odd", "key", "nest", "alias", "cycle"] * pickled)
    if kind == "remove":
        del state[name]
    elif kind == "remove all":
        start = name.split(".")[0]
        for other in [n for n in names if n.startswith(start)]:
            del state[other]
    elif kind == "rename":
        new = _new_name(name, names, rng)
        state[new] = state.pop(name)
        kind += f" to {new!r}"
    elif kind == "reshape":
        state[name] = _reshaped(tensor, rng)
        kind += f" {tuple(tensor.shape)} to {tuple(state[name].shape)}"
    elif kind == "type":
        state[name] = tensor.to(rng.choice(TYPES))
        kind += f" {state[name].dtype}"
    elif kind == "not finite":
        state[name] = _spoiled(tensor, rng)
    elif kind == "twice":
        prefix = rng.choice(("module.", "model.", "encoder.", "teacher.", "a.b."))
        chosen = [name] if rng.random() < 0.5 else names
        state.update({prefix + n: state[n] for n in chosen})
        kind += f" under {prefix}"
    elif kind == "odd":
        state[name] = _odd(tensor, rng)
        kind += f" {type(state[name]).__name__}"
    elif kind == "key":
        state[rng.choice((3, None, 2.5, ("a", 1), b"x"))] = tensor
    elif kind == "nest":
        for wrapper in rng.choices(("model", "state_dict", "teacher", "x"), k=3):
            content = {wrapper: content}
    elif kind == "alias":
        same = [n for n in names if state[n].shape == tensor.shape]
        state[rng.choice(same)] = tensor
    elif kind == "cycle":
        content["model"] = content
    write(path, content, metadata)
    return f"{kind}: {name}"


def change_settings(path: Path, rng: random.Random) -> str:
    is_json = path.suffix == ".json"
    content = json.loads(path.read_text()) if is_json else yaml.safe_load(path.open())
    changes = [_change_value(content, rng) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.03:
        content = rng.choice(EVIL)
        changes = [f"the whole is {str(content)[:20]}"]
    if is_json:
        text = json.dumps(content)
    else:
        text = yaml.safe_dump(content, allow_unicode=True)
    path.write_text(text)
    return "; ".join(changes)


def _change_value(content: dict[str, Any], rng: random.Random) -> str:
    key = rng.choice(list(content))
    value = content[key]
    if isinstance(value, dict) and value and rng.random() < 0.95:
        return f"{key}.{_change_value(value, rng)}"
    kind = rng.random()
    if kind < 0.06 and len(content) > 1:
        del content[key]
        return f"{key} removed"
    if kind < 0.1:
        content["pretrained" if kind < 0.08 else f"{key}s"] = value
        return f"{key}s added"
    if kind < 0.15 and isinstance(value, list) and value:
        value[rng.randrange(len(value))] = new = rng.choice(EVIL)
    else:
        content[key] = new = rng.choice(EVIL)
    return f"{key}={str(new)[:30]!r}"


def mutate(folder: Path, others: list[Path], rng: random.Random) -> tuple[str, str]:
    """Changes one file of a folder; returns the kind of the change and what it did."""
    files = sorted(p for p in folder.iterdir() if p.suffix in READ)
    # As many changes of a setting as of the tensors beside it.
    path = rng.choices(files, [2 if p.suffix in SETTINGS else 1 for p in files])[0]
    kind = rng.random()
    if kind < 0.05:
        other = rng.choice(others)
        path.write_bytes(other.read_bytes())
        return "swapped", f"{path.name} is {other.parent.name}/{other.name}"
    if kind < 0.3:
        change: Change = rng.choice(BYTES)
    elif path.suffix in SETTINGS:
        change = change_settings
    else:
        change = change_tensors
    return change.__name__, f"{path.name}, {change(path, rng)}"
