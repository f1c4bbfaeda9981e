"""The files of a folder of diffusers: JSON, and weights whose names and precision are read before anything is made.

What is read is what is hashed: shards are those that the index names, which are files of the same folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.errors import CheckpointError, some
from scoresde.files import parsed
from scoresde.interop.reading import read_torch, state_of

__all__ = ["json_object", "names_of", "weights_of"]

_MOST = 100_000_000
"""Bytes of a header, as safetensors has it."""


def json_object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        CheckpointError: if it is none.
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        found = parsed(json.loads, path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return found


def weights_of(folder: Path, variant: str | None) -> tuple[str | None, list[Path]]:
    """The variant, and the files of weights that the loader will read.

    Raises:
        FileNotFoundError: if there are none.
        CheckpointError: if the index of shards names others than those of the folder.
    """
    for suffix in (".safetensors", ".bin"):
        found: dict[str | None, list[Path]] = {}
        for path in sorted(folder.glob(f"diffusion_pytorch_model*{suffix}")):
            named = re.fullmatch(
                r"diffusion_pytorch_model(\.\w+)?(?:-\d+-of-\d+)?(\.\w+)?", path.name.removesuffix(suffix)
            )
            if named:
                found.setdefault((named[1] or named[2] or "").strip(".") or None, []).append(path)
        wanted = variant if variant in found else next(iter(found)) if len(found) == 1 and variant is None else variant
        if wanted in found:
            return wanted, _indexed(folder, suffix, wanted, found[wanted])
    raise FileNotFoundError(
        f"{folder}: there are no weights, diffusion_pytorch_model{'' if variant is None else f'.{variant}'}.safetensors"
    )


def _indexed(folder: Path, suffix: str, variant: str | None, paths: list[Path]) -> list[Path]:
    """Of these files those that the index names, where there is one."""
    for index in sorted(folder.glob(f"diffusion_pytorch_model*{suffix}.index*.json")):
        named = re.fullmatch(rf"diffusion_pytorch_model(\.\w+)?{re.escape(suffix)}\.index(\.\w+)?\.json", index.name)
        if named is None or ((named[1] or named[2] or "").strip(".") or None) != variant:
            continue
        weights = json_object(index).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
            raise CheckpointError(f"{index} has no weight_map, the name of each tensor's file")
        if other := sorted(set(weights.values()) - {path.name for path in paths}):
            raise CheckpointError(f"{index} names {some(other)}: expected files of its folder, {some(_named(paths))}")
        return [path for path in paths if path.name in weights.values()]
    if len(paths) > 1:
        raise CheckpointError(
            f"{folder} has {some(_named(paths))} and no index, diffusion_pytorch_model{suffix}.index.json"
        )
    return paths


def _named(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def names_of(paths: list[Path]) -> tuple[list[str], torch.dtype | None]:
    """The tensors' names, and the first one's precision if it is half; of safetensors from their headers.

    Raises:
        CheckpointError: if a file is damaged, holds more than tensors, or adapters.
    """
    held: dict[str, Any] = {}
    for path in paths:
        held |= _header(path) if path.suffix == ".safetensors" else state_of(read_torch(path), path)
    if lora := [name for name in held if "lora" in name.lower()]:
        raise CheckpointError(f"{paths[0]} holds LoRA weights, {some(lora)}, which are not supported: fuse them first")
    first = next(iter(held.values()), None)
    dtype = first.dtype if isinstance(first, Tensor) else _HALF.get(str(first))
    return list(held), dtype if dtype in _HALF.values() else None


_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}


def _header(path: Path) -> dict[str, str]:
    """Names and dtypes of a file of safetensors: a length of 8 bytes, and so many of JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 2 <= length <= min(_MOST, path.stat().st_size) else b""
    try:
        found = parsed(json.loads, text.decode())
        return {name: entry["dtype"] for name, entry in found.items() if name != "__metadata__"}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no file of safetensors, or damaged") from error
