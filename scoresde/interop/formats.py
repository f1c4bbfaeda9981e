"""What format a file or folder of elsewhere is of, by the names in it. Nothing is executed, and no tensor is read.

A file of torch.save is a pickle of containers beside the tensors' numbers. Its words, the names of entries among them,
stand in the pickle's text, which `pickletools` lists without running it; a file of safetensors begins with its names.
"""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from scoresde.errors import CheckpointError
from scoresde.files import parsed
from scoresde.interop.pickles import Reader

__all__ = ["FORMATS", "Format", "recognise", "refuse"]


LARGEST = 10**8
"""Bytes of a header: beyond, a file is none of those that are known."""


class Format(NamedTuple):
    """A format of published networks.

    Attributes:
        name: here, for `scoresde.interop.from_<name>` where `read` names one.
        what: what a file of it is.
        read: how it is read here, or what is needed.
    """

    name: str
    what: str
    read: str


FORMATS: dict[str, Format] = {
    name: Format(name, what, read)
    for name, what, read in (
        (
            "scoresde",
            "a run's folder or checkpoint of scoresde",
            "scoresde.training.load_ema(path, denoiser) reads it",
        ),
        ("diffusers", "a pipeline, network or scheduler of diffusers", "read it by from_diffusers"),
        (
            "guided_diffusion",
            "a network of guided-diffusion, improved-diffusion or consistency models",
            "read it by from_guided_diffusion with its flags, or by from_consistency_edm if it is an EDM of "
            "consistency models",
        ),
        (
            "guided_classifier",
            "a classifier of noisy images of guided-diffusion, no denoiser",
            "build it by its own library and guide by it: Classifier(model, classifier, time=model.sde.label, "
            "label='label')",
        ),
        ("edm", "a pickle of EDM or EDM2", "read it by from_edm"),
        ("score_sde", "a checkpoint of score_sde", "read it by from_score_sde"),
        (
            "lucidrains",
            "a file of denoising-diffusion-pytorch's Trainer",
            "read it by from_lucidrains(path, net), net a Unet built by that library",
        ),
        (
            "compvis",
            "a checkpoint of CompVis' latent diffusion or Stable Diffusion",
            "its network has no counterpart here: convert it by diffusers (StableDiffusionPipeline.from_single_file, "
            "then save_pretrained) and read the folder by from_diffusers",
        ),
        (
            "k_diffusion",
            "a network of k-diffusion",
            "its networks have no counterpart here: build it by that library, denoiser = "
            "K.config.make_denoiser_wrapper(config)(K.config.make_model(config)), load the weights, and wrap it, "
            "X0Denoiser(denoiser, EDMSDE())",
        ),
    )
}
"""The formats that are known, by name."""


def recognise(path: str | Path) -> Format | None:
    """The format of a file or folder, by its names; None where it is none of `FORMATS`.

    Raises:
        FileNotFoundError: if there is no such file or folder.
    """
    path = Path(path)
    if path.is_dir():
        name = _of_folder(path)
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    else:
        name = _of_file(path)
    return None if name is None else FORMATS[name]


def refuse(path: str | Path, expected: str) -> None:
    """Nothing where a file is of the expected format, a key of `FORMATS`, or of none that is known.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        CheckpointError: if it is of another, saying how that is read.
    """
    found = recognise(path)
    if found is not None and found.name != expected:
        raise CheckpointError(f"{path} is {found.what}: {found.read}")


def _of_folder(path: Path) -> str | None:
    files = {file.name for file in path.iterdir()}
    if "model_index.json" in files or "scheduler_config.json" in files:
        return "diffusers"
    if "config.json" in files and "_class_name" in _json(path / "config.json"):
        return "diffusers"
    return "scoresde" if "manifest.json" in files or "checkpoints" in files else None


def _of_file(path: Path) -> str | None:
    if path.suffix == ".json":
        found = _json(path)
        return "diffusers" if "_class_name" in found else "k_diffusion" if "model" in found else None
    try:
        with path.open("rb") as file:
            start = file.read(1 << 20)
            if start[8:9] == b"{":
                return _by_names(set(_safetensors(start, file)))
            if b"torch_utils" in start and b"persistence" in start:
                return "edm"
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    inside = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
                    if inside.compress_type != zipfile.ZIP_STORED:  # it may unfold to any size
                        return None
                    with archive.open(inside) as pickled:
                        return _by_names(set(_words(pickled, inside.file_size)))
            end = file.seek(0, io.SEEK_END)
            file.seek(0)
            # Before torch 1.6 a file was four pickles: a number, a version, the machine, and what was saved.
            return _by_names({word for _ in range(4) for word in _words(file, end)})
    except Exception:  # whatever a damaged file does
        return None


def _by_names(names: set[str]) -> str | None:
    """By the names of entries and tensors."""

    def begins(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if begins("model.diffusion_model."):
        return "compvis"
    if "shadow_params" in names:
        return "score_sde"
    if "ema_model.betas" in names or ("betas" in names and begins("model.")):
        return "lucidrains"
    if begins("inner_model.") or {"model_ema", "ema_sched"} <= names:
        return "k_diffusion"
    if {"input_blocks.0.0.weight", "time_embed.0.weight"} <= names:
        return "guided_diffusion" if begins("output_blocks.") else "guided_classifier"
    if {"conv_in.weight", "conv_out.weight"} <= names and begins("down_blocks.0."):
        return "diffusers"
    return None


def _words(file: Any, end: int) -> Iterator[str]:
    """The strings of one pickle, in order; the file then stands behind it."""
    for opcode, argument, _ in pickletools.genops(Reader(file, end)):  # type: ignore[arg-type]
        if isinstance(argument, str) and "UNICODE" in opcode.name:
            yield argument


def _safetensors(start: bytes, file: BinaryIO) -> list[str]:
    length = int.from_bytes(start[:8], "little")
    if length > LARGEST:
        raise ValueError("no header of safetensors")
    file.seek(8)
    return list(parsed(json.loads, file.read(length).decode()))


def _json(path: Path) -> dict[str, object]:
    try:
        found = parsed(json.loads, path.read_text("utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
