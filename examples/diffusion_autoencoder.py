"""An image as 32 numbers that mean something and the noise that is left: a diffusion autoencoder.

    python examples/diffusion_autoencoder.py        some twelve minutes on one quiet core, most of it training; --help

Preechakul et al. (2022, "Diffusion autoencoders: toward a meaningful and decodable representation") train an encoder
z = Enc(x_0) together with the diffusion model that is told z, by the loss of that model alone (section 3):

    E |v(x_t, t, Enc(x_0)) - (alpha eps - sigma x_0)|^2        x_t = alpha x_0 + sigma eps

(theirs is of eps; this one has more weight where x_t is all but noise, and only z can tell of x_0), so that z holds
what is worth knowing of x_0 beside x_t. The rest is in the **stochastic code** x_T, which the probability-flow ODE
under z finds (eq. 8); z and x_T together decode into x_0. Then, as there:

    a latent diffusion       another model, of z alone, whose samples decode into images (section 4)
    edits                    z moved along the line from one class's mean to another's, x_T kept (as in section 5.2)
    interpolations           z along a line, x_T along a great circle (section 5.1)

Measured on held-out images of Fashion-MNIST, beside 32 principal components: what a linear classifier reads in z; the
error of a reconstruction with the encoded x_T, and with another; the share of edits that another classifier, of the
images themselves, takes for what they were to become; and Frechet distances.

Writes diffusion_autoencoder.png, results.json and README.md into --out. A run that is killed goes on from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shared import arguments, cell, drawn, frechet, grid, mean_and_error, picture, place, publish, ran, trained
from torch import Tensor
from torch.nn import functional as F

from scoresde import Denoiser, sample
from scoresde.data import Itself, TrainingData, read_data
from scoresde.denoiser import NetworkDenoiser
from scoresde.editing import decode, encode, interpolate
from scoresde.metrics import PCA, classifier_features
from scoresde.metrics.classifier import WEIGHTS, Classifier, load_classifier
from scoresde.metrics.errors import psnr, rms
from scoresde.report import table
from scoresde.solvers import UniPC
from scoresde.training import ModelConfig, dsm_loss
from scoresde.training.loss import Draws
from scoresde.training.weights import uniform_in

Z = 32
ENCODER = {"options": {"vector": Z, "channels": 16, "multipliers": (1, 2, 4, 8)}}
AUTOENCODER = ModelConfig(
    options={"channels": 32, "multipliers": (1, 2), "blocks": 1, "patch": 4, "vector": Z},
    encoders={"source": ENCODER},
    predicts="v",
    time_scale=999,
)
WIDE = {"event_shape": Z, "width": 256, "depth": 4}
LATENT = ModelConfig(network="mlp", options=WIDE, predicts="v", time_scale=999)
SOLVER = UniPC(3, view="v", variable="half_log_snr")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
MOVES = (0.5, 1.0, 1.5)  # of an edit: how far along the way from the old class's mean to the new one's


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "diffusion_autoencoder",
        models=(Path("runs/diffusion_autoencoder"), "folder of the two runs"),
        data=(("fashion-mnist", "fashion-mnist-test"), "labelled images to train on, and held out, by name or path"),
        classifier=(WEIGHTS["fashion-mnist"], "that reads edits and has features, of examples/train_classifier.py"),
        train_steps=(6000, "of 64 images"),
        latent_steps=(3000, "of 64 latents"),
        known=(20_000, "training images whose latents are used"),
        images=(200, "held-out images to reconstruct and edit"),
        samples=(1000, "for a Frechet distance"),
        nfe=(20, "evaluations of a sample, and of an encoding"),
    )
    args = parser.parse_args(argv)
    (training, labels), (held_out, truth) = (images_of(source) for source in args.data)
    model = model_of(training.shape)
    folder = args.models / "autoencoder"
    autoencoder = trained(model, training, folder, args.train_steps, args.seed, loss=error_of_v)
    known, labels = every(training.first(args.known)), labels[: args.known]
    z = semantic(autoencoder, known)
    by_z = Linear(z, labels)
    latents = TrainingData(by_z.standardised(z).float())
    latent = trained(LATENT, latents, args.models / "latent", args.latent_steps, args.seed, loss=error_of_v)
    start = time.perf_counter()
    found, shown = measured(autoencoder, latent, by_z, (known, labels), (every(held_out), truth), args)
    nets = {"autoencoder": autoencoder, "latent": latent}
    models = {"autoencoder": model.to_dict(), "latent": LATENT.to_dict()}
    results = ran(args.models, nets, start) | {"models": models, "solver": repr(SOLVER)} | found
    names = CLASSES if args.data[0] == "fashion-mnist" else range(1000)
    publish(args, "diffusion_autoencoder", results, report, lambda path: draw(shown, names, path))


def images_of(source: str) -> tuple[TrainingData, Tensor]:
    """Images, of which the network is told the image itself; and their labels, of which it is told nothing."""
    found = read_data(source, labels=True)
    assert found.labels is not None
    return TrainingData(found.x, levels=256, conditions=(Itself(),)), found.labels


def every(data: TrainingData) -> Tensor:
    """All images, (N, C, H, W) in [-1, 1]."""
    return data.batch(torch.arange(len(data))).x


def model_of(event: Sequence[int]) -> ModelConfig:
    """The autoencoder of images (C, H, W)."""
    told = {"image_channels": event[0]}
    encoder = {"options": ENCODER["options"] | told | {"size": tuple(event[1:])}}
    return replace(AUTOENCODER, options=AUTOENCODER.options | told, encoders={"source": encoder})


def error_of_v(denoiser: NetworkDenoiser, x0: Tensor, draws: Draws, cond: Mapping[str, Any]) -> Tensor:
    """The mean square of the error of v; a `Loss`."""
    return dsm_loss(denoiser, x0, weighting=uniform_in("v"), generator=draws, cond=cond)


# --- codes -----------------------------------------------------------------------------------------------------------


def semantic(denoiser: NetworkDenoiser, images: Tensor) -> Tensor:
    """z of images, (B, Z)."""
    with torch.no_grad():
        return torch.cat([denoiser.prepared({"source": part})["vector"] for part in images.split(500)])


class Linear:
    """A linear classifier of features (N, d), by maximum likelihood: log p(k | f) = W_k f + b_k - ..., of features that
    are standardised first.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.mean, self.std = features.double().mean(0), features.double().std(0)
        f, K = self.standardised(features), int(labels.max()) + 1
        W, b = (torch.zeros(K, *d, dtype=torch.float64, requires_grad=True) for d in (f.shape[1:], ()))
        solver = torch.optim.LBFGS([W, b], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(f @ W.T + b, labels) + 1e-5 * W.square().sum()
            value.backward()
            return value

        solver.step(loss)
        self.W, self.b = W.detach(), b.detach()

    def standardised(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) / self.std

    def logits(self, features: Tensor) -> Tensor:
        return self.standardised(features) @ self.W.T + self.b


def moved(features: Tensor, old: Tensor, new: Tensor, by: float, known: Tensor, labels: Tensor) -> Tensor:
    """Features, moved so far along the way from the mean of known ones of their class to that of the new class."""
    means = torch.stack([known[labels == k].mean(0) for k in range(int(labels.max()) + 1)])
    return features + by * (means[new] - means[old])


def between(denoiser: Denoiser, z: Tensor, latent: Tensor, grid: Any, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Paths of 8 between pairs of images, (pairs, 8, C, H, W): z along a line, x_T along a great circle."""
    a, b = ([pair[end] for pair in pairs for _ in range(8)] for end in (0, 1))
    w = torch.linspace(0, 1, 8).repeat(len(pairs))
    path, x_T = torch.lerp(z[a], z[b], w[:, None]), interpolate(latent[a], latent[b], w)
    return decode(denoiser, x_T, SOLVER, grid=grid, cond={"vector": path}).x.unflatten(0, (-1, 8))


def from_components(pca: PCA, components: Tensor, event: Sequence[int]) -> Tensor:
    """Images of principal components, in [-1, 1]."""
    return (pca.mean + components @ pca.axes.T).reshape(-1, *event).float().clamp(-1, 1)


# --- what is measured ------------------------------------------------------------------------------------------------


def measured(
    denoiser: NetworkDenoiser, latent: NetworkDenoiser, by_z: Linear, known: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor], args: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """The tables' rows, and the images of the picture."""
    (x_known, labels), (x_all, truth), event = known, held_out, tuple(held_out[0].shape[1:])
    z_known, z_all, pca = semantic(denoiser, x_known), semantic(denoiser, x_all), PCA(x_known, min(Z, len(x_known) - 1))
    by_pca = Linear(pca(x_known), labels)
    right = {"z": by_z.logits(z_all).argmax(1) == truth, "PCA": by_pca.logits(pca(x_all)).argmax(1) == truth}
    right["lead"] = right["z"].double() - right["PCA"].double()  # image by image

    # Reconstructions.
    chosen = torch.randperm(len(x_all), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    x, z, old, components = x_all[chosen], z_all[chosen], truth[chosen], pca(x_all[chosen])
    code = encode(denoiser, x, SOLVER, nfe=args.nfe, cond={"source": x})

    def back(z: Tensor) -> Tensor:
        return decode(denoiser, code.latent, SOLVER, grid=code.grid, cond={"vector": z}).x

    def made(z: Tensor, seed: int) -> Tensor:
        return drawn(denoiser, event, SOLVER, nfe=args.nfe, seed=args.seed + seed, cond={"vector": z})

    ways = {
        "z and its x_T": back(z),
        "z and another x_T": made(z, 0),
        "another image's z and x_T": back(z.roll(1, 0)),
        "PCA": from_components(pca, components, event),
    }
    errors = lambda y: {"rmse": mean_and_error(rms(y - x)), "psnr": mean_and_error(psnr(y, x))}  # noqa: E731

    # Edits, into another class at random, read by a classifier of the images.
    reader, K = load_classifier(args.classifier)[0], len(by_z.b)
    new = (old + torch.randint(1, K, old.shape, generator=torch.Generator().manual_seed(args.seed + 1))) % K
    edited = {(None, "z"): ways["z and its x_T"]}
    edited |= {(by, "z"): back(moved(z, old, new, by, z_known, labels)) for by in MOVES}
    edited |= {(None, "PCA"): ways["PCA"]}
    of_pca = {by: moved(components, old, new, by, pca(x_known), labels) for by in MOVES}
    edited |= {(by, "PCA"): from_components(pca, found, event) for by, found in of_pca.items()}

    # Unconditional samples: z of a model of its own.
    z_drawn = sample(latent, (args.samples, Z), SOLVER, nfe=args.nfe, seed=args.seed).x * by_z.std + by_z.mean
    items = torch.arange(len(x_all))
    others = torch.cat([chosen, items[~torch.isin(items, chosen)]])[: args.samples]
    reference, real = x_all[~torch.isin(items, others)].chunk(2)
    samples = {"latent diffusion": made(z_drawn.float(), 1), "z of held-out images": made(z_all[others], 2)}

    pairs = [(i, int((old.roll(-i) != old[i]).nonzero()[0] + i) % len(x)) for i in range(min(4, len(x)))]
    results = {
        "probe": {name: mean_and_error(value) for name, value in right.items()},
        "explained": pca.explained,
        "reconstruction": {name: errors(y) for name, y in ways.items()},
        "round_trip": {nfe: relative(denoiser, x[:50], nfe) for nfe in (args.nfe // 2, args.nfe, 2 * args.nfe)},
        "edits": [{"by": by, "of": of, **read(reader, y, x, old, new)} for (by, of), y in edited.items()],
        "frechet": frechet(samples, reference, real, classifier_features(args.classifier)),
        "held_out": len(x_all),
    }
    return results, {
        "image": x,
        **ways,
        "z and a third x_T": made(z[:8], 3),
        **{f"edit {by:g}": edited[by, "z"] for by in MOVES},
        "new": new,
        "between": between(denoiser, z, code.latent, code.grid, pairs),
        "samples": samples["latent diffusion"][:40],
    }


def relative(denoiser: Denoiser, x: Tensor, nfe: int) -> list[float]:
    """|x' - x| / |x| of encoding and decoding, its mean and standard error: 0 for the ODE itself."""
    error = encode(denoiser, x, SOLVER, nfe=nfe, cond={"source": x}, check=True).error
    assert error is not None
    return mean_and_error(error)


def read(reader: Classifier, y: Tensor, x: Tensor, old: Tensor, new: Tensor) -> dict[str, list[float]]:
    """Of images y, which are to be of class new and were x of class old: the shares that are read as either, and how
    far they went."""
    with torch.no_grad():
        found = reader(y.clamp(-1, 1)).argmax(1)
    return {
        "new": mean_and_error(found == new),
        "old": mean_and_error(found == old),
        "moved": mean_and_error(rms(y - x)),
    }


# --- what is written -------------------------------------------------------------------------------------------------


def report(results: dict) -> str:
    """The tables, as Markdown."""
    probe, distances, titles = results["probe"], results["frechet"], {"PCA": f"{Z} principal components"}
    lines = [[titles.get(name, name), cell(row["rmse"], 3), cell(row["psnr"])]
             for name, row in results["reconstruction"].items()]  # fmt: skip
    edits = [[titles.get(row["of"], "z"), "none" if row["by"] is None else f"{row['by']:g}", cell(row["new"]),
              cell(row["old"]), cell(row["moved"], 3)] for row in results["edits"]]  # fmt: skip
    trips = ", ".join(f"{cell(error, 4)} at {nfe}" for nfe, error in results["round_trip"].items())
    return f"""# A diffusion autoencoder

{place(results)}

Fashion-MNIST at 28 x 28; a U-Net and an encoder of {results["parameters"]["autoencoder"]:,} parameters together,
trained for {results["train_steps"]} steps of 64 images by the loss of the U-Net alone (Preechakul et al., 2022). z has
{Z} numbers.
Every sample, and every encoding, takes {results["nfe"]} evaluations of `{results["solver"]}`.
In brackets the standard error over held-out images; each network was trained once.

![Reconstructions, edits, interpolations and samples](diffusion_autoencoder.png)

## What a linear classifier reads

Trained on {results["known"]:,} training images, accuracy on {results["held_out"]:,} held-out ones:
{cell(probe["z"], 4)} of z, {cell(probe["PCA"], 4)} of {Z} principal components, which hold {results["explained"]:.1%}
of the variance. Image by image z leads by {cell(probe["lead"], 4, "+")}.

## Reconstructions

Of {results["images"]} held-out images in [-1, 1]: root mean square error, and PSNR in dB.

{chr(10).join(table(["from", "RMSE", "PSNR"], lines))}

There and back, |x' - x| / |x| is {trips} evaluations each way: the ODE itself would lose nothing.

## Edits

Each of these images is to become one of another class, chosen at random: z goes along the way from the mean of its
class to that of the new one, so many times as far, and x_T stays. Beside it the same with principal components, and
theirs. Read by a convolutional classifier of images that knows of neither: the share that it
takes for the new class, and for the old one; and the distance from the image, root mean square.

{chr(10).join(table(["of", "by", "new class", "old class", "moved by"], edits))}

## Samples

Frechet distance in the features of that classifier, {results["samples"]:,} images:
{cell(distances["latent diffusion"])} with z of a latent diffusion (an MLP, {results["latent_steps"]} steps),
{cell(distances["z of held-out images"])} with z of held-out images, both with random x_T; as many real images have
{cell(distances["real images"])} (in brackets there the standard deviation over choices of them).
"""


def draw(shown: Mapping[str, Tensor], classes: Sequence[object], path: Path, columns: int = 8) -> None:
    """Reconstructions, edits, interpolations and samples; classes as they are called."""
    made = ["image", "z and its x_T", "z and another x_T", "z and a third x_T", "PCA"]
    edits = ["image", *(name for name in shown if name.startswith("edit "))]
    rows = lambda names: [shown[name][:columns] for name in names]  # noqa: E731
    with picture(path, 14, 8, dpi=90) as figure:
        (a, b), (c, d) = figure.subplots(2, 2)
        names = [name.replace(" x_T", "\nx_T") for name in made]
        grid(a, rows(made), names, title=f"{Z} numbers, and what is left to x_T")
        new = [classes[k] for k in shown["new"][:columns].tolist()]
        grid(b, rows(edits), edits, new, "edits into the class below")
        grid(c, shown["between"], title="between two images")
        grid(d, shown["samples"].split(columns), title="samples, z by a latent diffusion")


if __name__ == "__main__":
    main()
