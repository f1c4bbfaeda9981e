"""A run on latents: its codec, of which the run folder has a copy, and its data, encoded once into the same."""

from __future__ import annotations

from pathlib import Path

import torch

from scoresde.cli.config import DataConfig
from scoresde.codecs import AutoencoderCodec
from scoresde.data import TrainingData
from scoresde.training import CheckpointError, LatentData, export_codec, load_codec, parallel
from scoresde.training.autoencoders import CODEC_FOLDER, Measured

__all__ = ["FOLDER", "items_of"]

FOLDER = "latents"


def items_of(
    config: DataConfig, data: TrainingData, out: Path, device: torch.device, progress: bool
) -> TrainingData | LatentData:
    """What a run is trained on: its data; or, with data.codec, their latents, encoded by the first process.

    Args:
        config: of the data.
        data: that it opened.
        out: the run folder.
        device: where they are encoded.
        progress: show a bar.

    Raises:
        FileNotFoundError, CheckpointError: as `load_codec`; if the folder has another codec, or other latents.
        ValueError: if the items are none that the codec takes, or the network is told what is made of pixels.
    """
    if config.codec is None:
        return data
    where, own = out / CODEC_FOLDER, Path(config.codec)

    def kept() -> None:
        if not where.exists():
            if Measured.read(own).shape != data.shape:
                raise ValueError(f"--codec {own} is of items {Measured.read(own).shape}, the data's are {data.shape}")
            export_codec(own, where)
        elif own.exists() and Measured.read(own).weights != Measured.read(where).weights:
            raise CheckpointError(f"{where} is another codec than --codec {own} (another --out begins another run)")

    parallel.by_first(kept)
    codec: AutoencoderCodec = load_codec(where, device)
    if parallel.world() > 1:
        parallel.by_first(lambda: len(LatentData.of(data, codec, out / FOLDER, progress=progress)))
    return LatentData.of(data, codec, out / FOLDER, progress=progress)
