"""A trained autoencoder as a codec: its description in words, its run folder, and what is measured of its latent.

    F/codec.json    beside the checkpoints of a run of `AutoencoderTrainer`: scale and shift of the latent, the standard
                    deviation of the decoder, and the hash of the (first) averaged weights that they were measured with

z = scale (m - shift), shift the mean of each channel over the training data and scale one number, 1 / (the standard
deviation of m - shift), the encoder's noise in it: z has variance 1 over all its entries, as in Rombach et al. (2022,
appendix G). The decoder's standard deviation is the most likely one, the root mean square of x - decode(m): with it the
bound of `scoresde.elbo` is one on log p(x).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count, check_keys, check_option, made_of
from scoresde.codecs import AutoencoderCodec, Codec, Encoded
from scoresde.errors import CheckpointError
from scoresde.files import sealed, unsealed, write_whole
from scoresde.networks import contents, seeded_global_generators
from scoresde.nn import Autoencoder, KLAutoencoder, VQAutoencoder
from scoresde.tensors import evenly
from scoresde.training.feed import DataSource, digest
from scoresde.training.folder import WHOLE, Checkpoint, folder_of, seal
from scoresde.training.identity import weights_digest
from scoresde.training.model import loaded, opened
from scoresde.training.whole_files import weights_file, write_weights
from scoresde.wrappers import Latent

__all__ = ["CODEC", "CODEC_FOLDER", "AutoencoderConfig", "Measured", "codec_in_words", "export_codec", "latent_codec"]
__all__ += ["load_autoencoder", "load_codec", "load_latent", "measured"]

CODEC, CODEC_FOLDER = "codec.json", "codec"
KINDS: dict[str, type[Autoencoder]] = {"kl": KLAutoencoder, "vq": VQAutoencoder}


@dataclass(frozen=True)
class AutoencoderConfig:
    """An autoencoder in words.

    Args:
        autoencoder: "kl" or "vq": `KLAutoencoder`, `VQAutoencoder`.
        options: keyword arguments of that class.

    Raises:
        ValueError: on another kind, or an option that JSON cannot hold.

    >>> AutoencoderConfig("kl", {"image_channels": 1, "channels": 8}).build(seed=0).factor
    4
    """

    autoencoder: str = "kl"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_option(KINDS, autoencoder=self.autoencoder)
        try:
            object.__setattr__(self, "options", json.loads(json.dumps(dict(self.options))))
        except TypeError as error:
            raise ValueError(f"options={self.options!r}: JSON cannot hold it ({error})") from error

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> AutoencoderConfig:
        """From a mapping, what TOML or JSON gives.

        Raises:
            ValueError: on a key that is none of the arguments, naming it, and as the class does.
        """
        check_keys(cls.__name__, settings, (f.name for f in fields(cls)))
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """What `of` takes, of JSON's types."""
        return asdict(self)

    def build(self, seed: int | None = None) -> Autoencoder:
        """The network, with initial weights.

        Args:
            seed: of the weights; drawn by the operating system if None. The global generator stays as it is.

        Raises:
            ValueError: if it cannot be made of the options.
        """
        with seeded_global_generators(seed):
            return made_of(f"autoencoder {self.autoencoder!r}", KINDS[self.autoencoder], self.options)


def load_autoencoder(
    path: str | Path | Checkpoint, average: int | None = 0, device: torch.device | str = "cpu"
) -> Autoencoder:
    """A trained autoencoder, built anew from what its run's manifest says, in eval mode.

    Args:
        path: the run folder of an `AutoencoderTrainer(..., model=AutoencoderConfig(...))`, one of its checkpoints, what
            `export_codec` wrote, or what `opened` gave.
        average: which of the averaged weights, where there are several.
        device: where to.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if these weights are whole in none, or they are not an autoencoder's, or its description is
            missing or of another version.
    """
    found = opened(path, name := weights_file(average or 0))
    words = found.manifest["model"]
    if not isinstance(words, dict) or "autoencoder" not in words:
        what = "does not say what the model is" if words is None else "is of a denoiser"
        raise CheckpointError(f"{found.path} {what}: expected the run of an AutoencoderTrainer with model=")
    try:
        net = AutoencoderConfig.of(words).build()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{found.path} describes what this version cannot build: {error}") from error
    found.weights(name, net)
    return net.to(device).eval().requires_grad_(False)


# --- what is measured of the latent ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What is known of a trained autoencoder's latent and decoder.

    Attributes:
        weights: a hash of those that it was measured with.
        shape, latent: of an item of the data and of the latent.
        shift: of each channel.
        scale: 1 / (standard deviation of m - shift).
        std: of the decoder, the root mean square of x - decode(m).
        items: that it was measured on.
    """

    weights: str
    shape: tuple[int, ...]
    latent: tuple[int, ...]
    shift: tuple[float, ...]
    scale: float
    std: float
    items: int

    def codec(self, net: Autoencoder, batch: int | None = None) -> AutoencoderCodec:
        """The network as a codec."""
        shift = torch.tensor(self.shift, dtype=torch.float64, device="cpu").reshape(-1, *net.dims * [1])
        return AutoencoderCodec(net.encoder, net.decoder, scale=self.scale, shift=shift, std=self.std, batch=batch)

    def write(self, folder: Path) -> None:
        """Write `codec.json` into a folder, whole or not at all."""
        text = sealed({"format": "scoresde-codec-1", **asdict(self)}, indent=1) + "\n"
        write_whole(folder / CODEC, lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, folder: Path) -> Measured:
        """
        Raises:
            FileNotFoundError: if there is none.
            CheckpointError: if it is damaged, or something else.
        """
        path = folder / CODEC
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, which says how the latent is scaled: AutoencoderTrainer.fit writes it at its end, "
                "also of a run that is done already"
            )
        try:
            found, whole = unsealed(path.read_text("utf-8"))
            if not whole or found.pop("format") != "scoresde-codec-1":
                raise ValueError("it is no codec's file, or has no hash of itself")
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


@torch.no_grad()
def measured(net: Autoencoder, data: DataSource, items: int = 2048, batch: int = 64) -> Measured:
    """Measure scale, shift and the decoder's standard deviation.

    Args:
        net: in eval mode.
        data: on which: that of the training.
        items: how many of them, evenly chosen.
        batch: how many at a time.

    Raises:
        ValueError: if the latent is constant, or the reconstruction exact: there is no such scale.
    """
    check_count(items=items, batch=batch)
    which = evenly(len(data), items)
    generator = torch.Generator("cpu").manual_seed(0)
    count, entries, error = 0, 0, 0.0
    shape: tuple[int, ...] = ()
    total, square = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for part in which.split(batch):
        x = data.batch(part, torch.zeros_like(part))[0].to(net.last_layer)
        found = net.encode(x)
        law = found if isinstance(found, Encoded) else Encoded(found, torch.zeros_like(found))
        m = law.draw(torch.randn(law.mean.shape, generator=generator, device="cpu").to(law.mean))
        error += float((net.decode(m).double() - x.double()).square().sum())
        mean, std = (one.double().transpose(0, 1).flatten(1).cpu() for one in law)
        total, square = total + mean.sum(1), square + (mean**2 + std**2).sum(1)
        count, entries, shape = count + mean.shape[1], entries + x.numel(), tuple(x.shape[1:])
    shift = total / count
    variance, off = float((square / count - shift**2).mean()), math.sqrt(error / entries)
    if not (0 < variance < math.inf and 0 < off < math.inf):
        raise ArgumentError(
            f"the latent has variance {variance:.3g}, and reconstructions are off by {off:.3g}: neither may be 0"
        )
    numbers = tuple(shift.tolist()), variance**-0.5, off
    return Measured(weights_digest([net]), shape, net.latent_shape(shape), *numbers, len(which))


def load_codec(path: str | Path, device: torch.device | str = "cpu", batch: int | None = None) -> AutoencoderCodec:
    """A trained autoencoder as a codec, with its scale, shift and decoder's standard deviation.

    Args:
        path: the run folder of an `AutoencoderTrainer`, or what `export_codec` wrote.
        device: where to.
        batch: items that go through the networks at a time; all by default.

    Raises:
        FileNotFoundError: if there is no checkpoint, or nothing was measured.
        CheckpointError: as `load_autoencoder`; if what was measured is of other weights: of a run that went on since.
    """
    net, found = _opened(Path(path), device)
    return found.codec(net, batch)


def _opened(path: Path, device: torch.device | str) -> tuple[Autoencoder, Measured]:
    net = load_autoencoder(path, device=device)
    found = Measured.read(path)
    if found.weights != (own := weights_digest([net])):
        raise CheckpointError(
            f"{path / CODEC} was measured with weights {found.weights}, and the newest are {own}: "
            "AutoencoderTrainer.fit measures them at its end"
        )
    return net, found


def load_latent(
    path: str | Path | Checkpoint,
    codec: str | Path | None = None,
    average: int | None = 0,
    device: torch.device | str = "cpu",
    batch: int | None = None,
) -> Latent:
    """A denoiser that was trained on latents, with their codec: its samples are data.

    Args:
        path: the run folder of a `Trainer(..., LatentData.of(...))`, as `scoresde.training.load` takes it.
        codec: of the codec, as `load_codec` takes it; by default RUN/codec, where `scoresde train --codec` has it.
        average, device: as there.
        batch: as for `load_codec`.

    Raises:
        FileNotFoundError, CheckpointError: as `scoresde.training.load` and `load_codec`; if the run was none on
            latents, or had another codec.
    """
    found = opened(path, weights_file(average))
    held = latent_codec(found, codec, device, batch)
    if held is None:
        raise CheckpointError(f"{found.path} was not trained on latents: scoresde.load loads it")
    return Latent(loaded(found, average, device), held)


def latent_codec(
    found: Checkpoint,
    codec: str | Path | None = None,
    device: torch.device | str = "cpu",
    batch: int | None = None,
) -> AutoencoderCodec | None:
    """The codec of a run on latents, as for `load_latent`; None where it was trained on data.

    Raises:
        FileNotFoundError, CheckpointError: as there.
    """
    data = str(found.manifest["made_for"].get("data", ""))
    if not data.startswith("LatentData"):
        return None
    where = folder_of(found) / CODEC_FOLDER if codec is None else Path(codec)
    if not where.exists():
        raise FileNotFoundError(f"{where}: the codec of {found.path} is not there; load_latent(path, codec=) names it")
    held = load_codec(where, device, batch)
    if codec_in_words(held) not in data:
        raise CheckpointError(f"{where} is another codec than that of {found.path}, {data}")
    return held


def export_codec(path: str | Path, out: str | Path) -> Path:
    """Copy what a codec needs of a run folder: the averaged weights, and what was measured with them.

    Args:
        path: as `load_codec` takes it.
        out: the folder, which must not exist.

    Returns:
        the folder, for `load_codec`.

    Raises:
        FileExistsError: if `out` exists.
        FileNotFoundError, CheckpointError: as `load_codec`.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: give another folder, or remove it")
    net, found = _opened(Path(path), "cpu")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        write_weights(partial / weights_file(0), net)
        found.write(partial)
        seal(partial, [weights_file(0)], {**opened(path, weights_file(0)).manifest, "format": WHOLE})
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def codec_in_words(codec: Codec) -> str:
    """What tells a codec from others: what it is, with a hash of all tensors in it. Of functions only their names are
    known."""
    held = [codec, *contents(codec)]
    numbers = [
        (name, value) for one in held if isinstance(one, Codec) for name, value in vars(one).items()
        if isinstance(value, Tensor)
    ]  # fmt: skip
    networks = weights_digest(one for one in held if isinstance(one, torch.nn.Module))
    return f"{codec!r}, weights {networks}, {', '.join(f'{name} {digest(value)}' for name, value in numbers)}"
