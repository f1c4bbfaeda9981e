"""Latent diffusion on Fashion-MNIST: the same network, diffusing 7 x 7 latents instead of 28 x 28 pixels.

    python examples/latent_diffusion.py             some ten minutes on two cores, nearly all of it training; --help

Latent diffusion (Rombach et al., 2022) trains an autoencoder first, x -> m -> x at a quarter of the size (f = 4), by an
absolute error, a perceptual distance, and a divergence from N(0, I) of very small weight (`KLAutoencoder`); and then a
diffusion of its latent z = scale (m - shift), of unit variance. It draws z and decodes it, once for all the network's
evaluations, each of which is of a quarter of the places.

Beside it stands a **pixel model**: the same U-Net, which takes an image as 14 x 14 patches of 2 x 2 pixels, and so has
as many channels, and parameters, as that of the latents, which are four numbers each. Both are trained for as long, by
the clock (the latent one takes more steps), and drawn from by the same solver with as many evaluations. The
autoencoder's own training is counted apart: it is made once, for any number of diffusions.

Measured: seconds an image, drawn in turn by both; the Frechet distance to held-out images in the features of the
library's classifier (the perceptual distance is that of another one, trained on digits); and the bound on log p(x) of
dequantised held-out images, for the latent model in its named terms,

    log p(x) >= E_q[log p(x | z)] + E_q[bound of z] + H[q(z | x)]           (Vahdat et al., 2021, eq. 5)

Writes latent_diffusion.png, results.json and README.md into --out. A run that is killed goes on from its last
checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from shared import (
    arguments,
    cell,
    fitted,
    folders_by,
    frechet,
    grid,
    mean_and_error,
    picture,
    place,
    publish,
    size,
    spent,
    trained,
)
from torch import Tensor

from scoresde import Denoiser, Latent, elbo, sample
from scoresde.data import TrainingData, training_data
from scoresde.likelihood import dequantized
from scoresde.metrics import RandomFeatures, classifier_features
from scoresde.report import table
from scoresde.solvers import Adams
from scoresde.training import (
    AutoencoderConfig,
    AutoencoderLoss,
    AutoencoderTrainer,
    LatentData,
    ModelConfig,
    TrainConfig,
    dsm_loss,
    load_codec,
    min_snr,
)
from scoresde.training.perceptual import perceptual_distance

CHANNELS = 4  # of the latent, and of a patch of 2 x 2 grey pixels
AUTOENCODER = {"latent_channels": CHANNELS, "channels": 24, "multipliers": (1, 2), "blocks": 1, "patch": 2}
LOSS = AutoencoderLoss(features="digits", perceptual=0.1)
QUICK = {"items": 4000, "autoencoder_steps": 60, "pixel_steps": 40, "latent_steps": 120, "images": 200, "bounds": 8}
QUICK |= {"nfe": 10}
SOLVER = Adams()
# At a constant rate and with averages, so that a run that is given more steps goes on as if it had had them.
TRAINING: dict[str, Any] = {"schedule": "constant", "warmup": 20, "ema_decay": 0.99, "checkpoint_every": 100, "keep": 1}
TERMS = ("decoding", "prior", "denoising", "reconstruction", "entropy")  # of the latent model's bound


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "latent_diffusion",
        data=(("fashion-mnist", "fashion-mnist-test"),
              "images to train on, and held out, by name or path; sizes are multiples of 4"),
        items=(10_000, "the first N images to train on"),
        autoencoder_steps=(400, "of 64 images"),
        pixel_steps=(1000, "of 64 images"),
        latent_steps=(3050, "of 64 images, as long in time"),
        images=(1000, "drawn of each model"),
        bounds=(64, "held-out images whose bound is taken"),
        nfe=(20, "evaluations of a sample"),
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a minute: far too few steps, to see that it runs")
    args = parser.parse_args(argv)
    for name, value in QUICK.items() if args.quick else ():
        setattr(args, name, min(value, getattr(args, name)))
    data, held_out = (training_data(name, lazy=False, seed=args.seed) for name in args.data)
    data = data.first(args.items)
    args.items = len(data)

    compressor = AutoencoderConfig("kl", AUTOENCODER | {"image_channels": data.shape[0]})
    train_autoencoder(compressor, data, args.out / "autoencoder", args.autoencoder_steps, args.seed)
    with folders_by("--out"):
        codec = load_codec(args.out / "autoencoder", batch=500)
        latents = LatentData.of(data, codec, args.out / "latents", batch_size=500, progress=True)
    models = {"pixel": words(data.shape[0], patch=2), "latent": words(latents.shape[0], patch=1)}
    sets: dict[str, Any] = {"pixel": data, "latent": latents}
    how: dict[str, Any] = {"flag": "--out", **TRAINING}
    nets = {
        name: trained(model, sets[name], args.out / name, getattr(args, f"{name}_steps"), args.seed, **how)
        for name, model in models.items()
    }
    denoisers: dict[str, Denoiser] = {"pixel": nets["pixel"], "latent": Latent(nets["latent"], codec)}
    shapes = {name: tuple(source.shape) for name, source in sets.items()}
    images, seconds = drawn(denoisers, shapes, args.images, args.nfe, args.seed)
    results = {
        "models": {"autoencoder": AUTOENCODER} | {name: model.to_dict() for name, model in models.items()},
        "solver": repr(SOLVER),
        "shapes": shapes,
        "parameters": {name: size(net) for name, net in nets.items()}
        | {"autoencoder": size(codec.encoder) + size(codec.decoder)},
        "seconds": {name: spent(args.out / name) for name in ("autoencoder", *nets)},
        "step_seconds": step_seconds(compressor, models, sets),
        "seconds_an_image": seconds,
        **scores(images, held_out, codec, args.data[0]),
        "bounds_of": bounds(denoisers, held_out, args.bounds, args.seed),
        "codec": {"scale": float(codec.scale), "std": float(codec.std)},  # type: ignore[arg-type]
    }
    publish(args, "latent_diffusion", results, report, lambda path: draw(images, path))


# --- the networks ----------------------------------------------------------------------------------------------------


def words(channels: int, patch: int, features: int = 32) -> ModelConfig:
    """The U-Net of either model."""
    options = {"image_channels": channels, "patch": patch, "channels": features}
    return ModelConfig(preset=8, options=options, predicts="v", time_scale=999)


def train_autoencoder(model: AutoencoderConfig, data: TrainingData, folder: Path, steps: int, seed: int) -> None:
    """The autoencoder, trained or continued; with a perceptual distance, of images in grey."""
    loss = LOSS if data.shape[0] == 1 else AutoencoderLoss()
    net = model.build(seed).to(memory_format=torch.channels_last)
    config = TrainConfig(steps=steps, batch_size=64, lr=2e-3, seed=seed, workers=0, **TRAINING)
    fitted(AutoencoderTrainer, net, data, config, folder, "--out", loss=loss, model=model)


# --- what is measured ------------------------------------------------------------------------------------------------


def step_seconds(
    autoencoder: AutoencoderConfig, models: Mapping[str, ModelConfig], sets: Mapping[str, Any], times: int = 5
) -> dict[str, float]:
    """The processor's seconds for the loss of 64 images and its gradient, of each model in turn, so that what else the
    machine does falls on all; the first time is not counted."""
    denoisers = {name: model.build(0) for name, model in models.items()}
    net, distance = autoencoder.build(0), perceptual_distance("digits")

    def loss(name: str, x: Tensor) -> Tensor:
        if name in denoisers:
            return dsm_loss(denoisers[name], x, weighting=min_snr(5.0))
        y = net(x, torch.randn(len(x), *net.latent_shape(x.shape[1:]))).x
        return (y - x).abs().mean() + (distance(x, y).mean() if x.shape[1] == 1 else 0)

    found = dict.fromkeys(("autoencoder", *denoisers), 0.0)
    for i in range(times + 1):
        for name in found:
            source = sets.get(name, sets["pixel"])
            x = source.batch(torch.arange(64 * i, 64 * (i + 1)) % len(source)).x
            start = time.process_time()
            loss(name, x).backward()
            found[name] += (time.process_time() - start) / times * (i > 0)
    return found


def drawn(
    denoisers: dict[str, Denoiser], shapes: dict[str, tuple[int, ...]], n: int, nfe: int, seed: int, batch: int = 100
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Samples of each model, and the processor's seconds for an image, decoding included: a batch of the one after a
    batch of the other, so that what else the machine does falls on both."""
    images: dict[str, list[Tensor]] = {name: [] for name in denoisers}
    seconds = dict.fromkeys(denoisers, 0.0)
    for first in range(0, n, batch):
        items = range(first, min(first + batch, n))
        for name, denoiser in denoisers.items():
            start = time.process_time()
            found = sample(denoiser, (len(items), *shapes[name]), SOLVER, nfe=nfe, seed=[seed + i for i in items])
            seconds[name] += time.process_time() - start
            images[name].append(found.x.clamp(-1, 1))
    return {name: torch.cat(parts) for name, parts in images.items()}, {k: s / n for k, s in seconds.items()}


def scores(images: dict[str, Tensor], held_out: TrainingData, codec: Any, name: str) -> dict[str, Any]:
    """Frechet distances to one half of the held-out images: of samples, and of the other half as the autoencoder gives
    it back. To `images` are added held-out ones and what becomes of them."""
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    real, reference = (held_out.batch(part).x for part in order.tensor_split(2))
    given = real[: len(images["pixel"])]
    with torch.no_grad():
        back = codec.decode(codec.encode(given)).clamp(-1, 1)
    fashion = name.startswith("fashion-mnist")
    features = classifier_features("fashion-mnist") if fashion else RandomFeatures(held_out.shape)
    distances = frechet(images | {"reconstructions": back}, reference, real, features)
    images |= {"held out": given, "given back": back}
    return {
        "features": repr(features),
        "floor": distances.pop("real images"),
        "frechet": distances,
        "reference": len(reference),
        "psnr": float(10 * torch.log10(4 / (back - given).square().mean())),
    }


def bounds(denoisers: dict[str, Denoiser], held_out: TrainingData, n: int, seed: int) -> dict[str, Any]:
    """The bound in bits/dim of held-out images: its mean and standard error, over the images and the draws; and for
    the latent model its terms, in nats an image."""
    levels, edges = held_out.levels, held_out.data_range
    assert isinstance(held_out.x, Tensor) and levels is not None and edges is not None  # noqa: PT018
    x = dequantized(held_out.x[:n], levels, data_range=edges, seed=seed)
    found = {}
    for name, denoiser in denoisers.items():
        bound = elbo(denoiser, x, seed=seed)
        terms = () if bound.decoding is None else TERMS
        found[name] = {"bits_per_dim": mean_and_error(bound.of_levels(levels, edges)[0])}
        found[name] |= {term: mean_and_error(getattr(bound, term)) for term in terms}
    return found


# --- what is written -------------------------------------------------------------------------------------------------


def report(r: dict) -> str:
    """The page."""
    seconds, distance, bound = r["seconds_an_image"], r["frechet"], r["bounds_of"]["latent"]
    cost = {name: value * r[f"{name}_steps"] for name, value in r["step_seconds"].items()}
    rows = [
        [name, f"{r['parameters'][name]:,}", "x".join(map(str, r["shapes"][name])), str(r[f"{name}_steps"]),
         f"{cost[name]:.0f}", f"{1e3 * seconds[name]:.1f}", cell(distance[name]),
         cell(r["bounds_of"][name]["bits_per_dim"], 3)]
        for name in ("pixel", "latent")
    ]  # fmt: skip
    head = [
        "model",
        "parameters",
        "state",
        "steps",
        "training, s",
        "ms an image",
        "Frechet distance",
        "bits/dim, bound",
    ]
    apart = (distance["latent"][1] ** 2 + distance["pixel"][1] ** 2) ** 0.5
    return f"""# Latent diffusion

{place(r)}

One U-Net on the first {r["items"]:,} images of Fashion-MNIST, of pixels and of an autoencoder's latent
(`examples/latent_diffusion.py`), trained for as long, {r["images"]} images drawn of each by {r["nfe"]} evaluations of
`{r["solver"].partition("(")[0]}`. The autoencoder ({r["parameters"]["autoencoder"]:,} parameters,
{r["autoencoder_steps"]} steps, **{cost["autoencoder"]:.0f} s** of training, counted apart) gives held-out images back
with a PSNR of {r["psnr"]:.1f} dB and a Frechet distance of {cell(distance["reconstructions"])}: no diffusion of its
latent comes below that.

{chr(10).join(table(head, rows))}

- Steps are of 64 images. Training: steps times the processor's seconds for the loss and gradient of one, measured of
  each model in turn; the wall clock has whatever else the machine did, too.
- Milliseconds an image: of the processor, decoding included, a batch of either in turn. The latent model takes
  **{seconds["latent"] / seconds["pixel"]:.3f}** of the pixel model's.
- Frechet distance: {r["features"]}, to {r["reference"]:,} held-out images; {r["images"]} others have
  {r["floor"][0]:.2f} (standard deviation {r["floor"][1]:.2f}). The latent model's is
  **{distance["latent"][0] - distance["pixel"][0]:+.2f}** from the pixel model's, whose standard errors together are
  {apart:.2f}.
- The bound is of {r["bounds"]} dequantised held-out images, by `elbo`; the latent model's terms in nats an image:
  {", ".join(f"{term} {cell(bound[term], 1)}" for term in TERMS)}.
  The decoder is N(decode(z), {r["codec"]["std"]:.3f}^2), one width for all pixels, the most likely one: an autoencoder
  that is made for its pictures has no better law of x given z, and the bound says more of that than of the diffusion.

In brackets standard errors, of Frechet distances over random halves, of bounds over images; each network was trained
once.

![Held-out images, the same given back, and samples of both models](latent_diffusion.png)
"""


def draw(images: Mapping[str, Tensor], path: Path, columns: int = 12) -> None:
    """Two rows of each kind of image."""
    titles = {"held out": "held out", "given back": "given back", "pixel": "pixel model", "latent": "latent model"}
    with picture(path, 9, 6.2, dpi=110) as figure:
        for axis, (name, title) in zip(figure.subplots(len(titles), 1), titles.items(), strict=True):
            grid(axis, images[name][: 2 * columns].split(columns), [title])


if __name__ == "__main__":
    main()
