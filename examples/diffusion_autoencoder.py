"""An image as 32 numbers that mean something and the noise that is left: a diffusion autoencoder.

    python examples/diffusion_autoencoder.py        some five minutes on one quiet core, most of it training; --help

Preechakul et al. (2022, "Diffusion autoencoders: toward a meaningful and decodable representation") train an encoder
z = Enc(x_0) together with the diffusion model that is told z, by the loss of that model alone (section 3):

    E |v(x_t, t, Enc(x_0)) - (alpha eps - sigma x_0)|^2        x_t = alpha x_0 + sigma eps

(theirs is of eps; this one has more weight where x_t is all but noise, and only z can tell of x_0), so that z holds
what is worth knowing of x_0 beside x_t. The rest is in the **stochastic code** x_T, which the probability-flow ODE
under z finds (eq. 8); z and x_T together decode into x_0. Then, as there:

    a latent diffusion       another model, of z alone, whose samples decode into images (section 4)
    edits                    z moved along a linear classifier's direction, x_T kept (section 5.2)
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
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from guidance import tile
from palette import cell, mean_and_error, spent, trained
from torch import Tensor
from torch.nn import functional as F

from scoresde import Denoiser, sample
from scoresde.data import Itself, TrainingData, read_data
from scoresde.denoiser import NetworkDenoiser
from scoresde.editing import decode, encode, interpolate
from scoresde.info import environment
from scoresde.metrics import PCA, classifier_features, evaluate
from scoresde.metrics.classifier import WEIGHTS, Classifier, load_classifier
from scoresde.metrics.errors import psnr
from scoresde.noise import derive_seed
from scoresde.report import table, write_json
from scoresde.solvers import UniPC
from scoresde.training import ModelConfig, dsm_loss
from scoresde.training.loss import Draws
from scoresde.training.weights import uniform_in

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Z = 32
ENCODER = {"options": {"vector": Z, "channels": 8, "multipliers": (1, 2, 4, 8)}}
AUTOENCODER = ModelConfig(
    options={"channels": 32, "multipliers": (1, 2), "blocks": 1, "patch": 4, "vector": Z},
    encoders={"source": ENCODER},
    predicts="v",
    time_scale=999,
)
LATENT = ModelConfig(
    network="mlp", options={"event_shape": Z, "width": 256, "depth": 4}, predicts="v", time_scale=999
)  # fmt: skip
SOLVER = UniPC(3, view="v", variable="half_log_snr")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
MARGINS = (0.0, 5.0, 10.0)  # of an edit: log-odds of the new class over the old one, as the linear classifier sees it


Labelled = tuple[TrainingData, Tensor]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/diffusion_autoencoder"), help="results")
    parser.add_argument("--models", type=Path, default=Path("runs/diffusion_autoencoder"), help="of the two runs")
    parser.add_argument("--data", nargs=2, default=["fashion-mnist", "fashion-mnist-test"], metavar="NAME",
                        help="labelled images to train on, and held out, by name or path")  # fmt: skip
    parser.add_argument("--classifier", type=Path, default=WEIGHTS["fashion-mnist"],
                        help="that reads edits and has features, of examples/train_classifier.py")  # fmt: skip
    parser.add_argument("--train-steps", type=int, default=2000, help="of 32 images (2000)")
    parser.add_argument("--latent-steps", type=int, default=3000, help="of 64 latents (3000)")
    parser.add_argument("--known", type=int, default=20_000, help="training images whose latents are used (20000)")
    parser.add_argument("--images", type=int, default=200, help="held-out images to reconstruct and edit (200)")
    parser.add_argument("--samples", type=int, default=1000, help="for a Frechet distance (1000)")
    parser.add_argument("--nfe", type=int, default=20, help="evaluations of a sample, and of an encoding (20)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, training and samples (0)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    (training, labels), (held_out, truth) = (images_of(source) for source in args.data)
    options = {"image_channels": training.shape[0]}
    encoder = {"options": {**ENCODER["options"], **options, "size": training.shape[1:]}}
    model = replace(AUTOENCODER, options=AUTOENCODER.options | options, encoders={"source": encoder})
    autoencoder = trained(model, training, args.models / "autoencoder", args.train_steps, args.seed, error_of_v, 32)
    start = time.perf_counter()
    known = training.first(args.known), labels[: args.known]
    results, drawn = measured(autoencoder, known, (held_out, truth), args)
    results |= {
        "environment": environment(),
        "seconds": {
            **{name: spent(args.models / name) for name in ("autoencoder", "latent")},
            "measure": round(time.perf_counter() - start, 1),
        },
        "parameters": sum(p.numel() for p in autoencoder.net.parameters()),
        "model": model.to_dict(),
        "latent_model": LATENT.to_dict(),
        "solver": repr(SOLVER),
        **{name: getattr(args, name) for name in ("train_steps", "latent_steps", "known", "images", "nfe", "seed")},
    }
    write_json(args.out / "results.json", results)
    (args.out / "README.md").write_text(report(results))
    draw(drawn, args.out / "diffusion_autoencoder.png", CLASSES if args.data[0] == "fashion-mnist" else None)
    print("\n" + report(results) + f"\nwrote {args.out}/diffusion_autoencoder.png, results.json and README.md")


def images_of(source: str) -> Labelled:
    """Images, of which the network is told the image itself; and their labels, of which it is told nothing."""
    found = read_data(source, labels=True)
    assert found.labels is not None
    return TrainingData(found.x, levels=256, conditions=(Itself(),)), found.labels


def error_of_v(denoiser: NetworkDenoiser, x0: Tensor, draws: Draws, cond: Mapping[str, Any]) -> Tensor:
    """The mean square of the error of v; a `Loss`."""
    return dsm_loss(denoiser, x0, weighting=uniform_in("v"), generator=draws, cond=cond)


# --- codes -----------------------------------------------------------------------------------------------------------


def semantic(denoiser: NetworkDenoiser, images: Tensor) -> Tensor:
    """z of images, (B, Z)."""
    with torch.no_grad():
        return torch.cat([denoiser.prepared({"source": part})["vector"] for part in images.split(500)])


def decoded(denoiser: Denoiser, z: Tensor, event: tuple[int, ...], nfe: int, seed: int) -> Tensor:
    """Images of z and random x_T."""
    parts = [
        sample(denoiser, (len(part), *event), SOLVER, nfe=nfe, seed=derive_seed(seed, k), cond={"vector": part}).x
        for k, part in enumerate(z.split(250))
    ]
    return torch.cat(parts).clamp(-1, 1)


class Linear:
    """A linear classifier of features (N, d), by maximum likelihood: log p(k | f) = W_k f + b_k - ..., of features that
    are standardised first.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.mean, self.std = features.double().mean(0), features.double().std(0)
        f, K = self.standardised(features), int(labels.max()) + 1
        self.W = torch.zeros(K, f.shape[1], dtype=torch.float64, requires_grad=True)
        self.b = torch.zeros(K, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([self.W, self.b], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(f @ self.W.T + self.b, labels) + 1e-5 * self.W.square().sum()
            value.backward()
            return value

        solver.step(loss)
        self.W, self.b = self.W.detach(), self.b.detach()

    def standardised(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) / self.std

    def logits(self, features: Tensor) -> Tensor:
        return self.standardised(features) @ self.W.T + self.b

    def moved(self, features: Tensor, old: Tensor, new: Tensor, margin: float) -> Tensor:
        """The nearest features that the classifier finds exp(margin) times as likely of the new class as of the old."""
        f, d = self.standardised(features), self.W[new] - self.W[old]
        now = (f * d).sum(1) + self.b[new] - self.b[old]
        f = f + ((margin - now) / d.square().sum(1))[:, None] * d
        return (f * self.std + self.mean).to(features.dtype)


# --- what is measured ------------------------------------------------------------------------------------------------


def measured(
    denoiser: NetworkDenoiser, known: Labelled, held_out: Labelled, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The tables' rows, and the images of the picture."""
    (x_known, labels), (x_all, truth) = ((data.batch(torch.arange(len(data))).x, y) for data, y in (known, held_out))
    every = torch.arange(len(x_all))
    event = tuple(x_all.shape[1:])
    z_known, z_all = semantic(denoiser, x_known), semantic(denoiser, x_all)
    pca = PCA(x_known, min(Z, len(x_known) - 1))
    by_z, by_pca = Linear(z_known, labels), Linear(pca(x_known), labels)
    right = {"z": by_z.logits(z_all).argmax(1) == truth, "PCA": by_pca.logits(pca(x_all)).argmax(1) == truth}
    probe = {name: mean_and_error(value) for name, value in right.items()}
    probe["lead"] = mean_and_error(right["z"].double() - right["PCA"].double())  # image by image

    # Reconstructions.
    chosen = torch.randperm(len(x_all), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    x, z, classes = x_all[chosen], z_all[chosen], truth[chosen]
    code = encode(denoiser, x, SOLVER, nfe=args.nfe, cond={"source": x})
    back = partial(decode, denoiser, code.latent, SOLVER, grid=code.grid)
    components = pca(x)
    ways = {
        "z and its x_T": back(cond={"vector": z}).x,
        "z and another x_T": decoded(denoiser, z, event, args.nfe, args.seed),
        "another image's z and x_T": back(cond={"vector": z.roll(1, 0)}).x,
        "PCA": from_components(pca, components, event),
    }
    reconstruction = {
        name: {"rmse": mean_and_error((y - x).square().flatten(1).mean(1).sqrt()), "psnr": mean_and_error(psnr(y, x))}
        for name, y in ways.items()
    }
    few = x[: min(50, len(x))]
    trip = {nfe: relative(denoiser, few, nfe) for nfe in (args.nfe // 2, args.nfe, 2 * args.nfe)}

    # Edits, into another class at random, read by a classifier of the images.
    reader, _ = load_classifier(args.classifier)
    K = len(by_z.b)
    new = (classes + torch.randint(1, K, classes.shape, generator=torch.Generator().manual_seed(args.seed + 1))) % K
    edits: list[dict[str, Any]] = []
    shown = {}
    for margin in MARGINS:
        of_pca = from_components(pca, by_pca.moved(components, classes, new, margin), event)
        of_z = back(cond={"vector": by_z.moved(z, classes, new, margin)}).x
        shown[margin] = of_z
        for name, y in {"z": of_z, "PCA": of_pca}.items():
            edits.append({"margin": margin, "of": name, **read(reader, y, x, classes, new)})
    whole = {"z": ways["z and its x_T"], "PCA": ways["PCA"]}
    unedited = {name: read(reader, y, x, classes, new) for name, y in whole.items()}

    # Unconditional samples: z of a model of its own.
    latents = TrainingData(by_z.standardised(z_known).float())
    latent = trained(LATENT, latents, args.models / "latent", args.latent_steps, args.seed, error_of_v, 64)
    drawn = sample(latent, (args.samples, Z), SOLVER, nfe=args.nfe, seed=args.seed).x
    made = decoded(denoiser, (drawn * by_z.std + by_z.mean).float(), event, args.nfe, args.seed + 1)
    others = torch.cat([chosen, every[~torch.isin(every, chosen)]])[: args.samples]
    given = decoded(denoiser, z_all[others], event, args.nfe, args.seed + 2)
    reference = x_all[~torch.isin(every, others)]
    score = partial(evaluate, reference=reference[: len(reference) // 2], metrics=["frechet"],
                    features=classifier_features(args.classifier), floor=reference[len(reference) // 2 :])  # fmt: skip
    frechet = {}
    for name, y in {"latent diffusion": made, "z of held-out images": given}.items():
        found = score(y)["frechet"]
        frechet |= {name: [found.value, found.stderr], "real images": [found.floor, found.floor_std]}

    pairs = [(i, int((classes.roll(-i) != classes[i]).nonzero()[0] + i) % len(x)) for i in range(min(4, len(x)))]
    results = {
        "probe": probe,
        "explained": pca.explained,
        "reconstruction": reconstruction,
        "round_trip": trip,
        "edits": edits,
        "unedited": unedited,
        "frechet": frechet,
        "held_out": len(x_all),
        "samples": args.samples,
    }
    pictures = {
        "images": x,
        **ways,
        "again": decoded(denoiser, z[:8], event, args.nfe, args.seed + 3),
        **{f"edit {margin:g}": y for margin, y in shown.items()},
        "new": new,
        "between": between(denoiser, z, code.latent, code.grid, pairs),
        "samples": made[:40],
    }
    return results, pictures


def from_components(pca: PCA, components: Tensor, event: tuple[int, ...]) -> Tensor:
    """Images of principal components, in [-1, 1]."""
    return (pca.mean + components @ pca.axes.T).reshape(-1, *event).float().clamp(-1, 1)


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
    moved = (y - x).square().flatten(1).mean(1).sqrt()
    shares = {"new": found == new, "old": found == old}
    return {name: mean_and_error(value) for name, value in (shares | {"moved": moved}).items()}


def between(denoiser: Denoiser, z: Tensor, latent: Tensor, grid: Any, pairs: list[tuple[int, int]]) -> Tensor:
    """Paths of 8 between pairs of images: z along a line, x_T along a great circle."""
    w = torch.linspace(0, 1, 8)
    a, b = ([i for pair in pairs for i in [pair[end]] * 8] for end in (0, 1))
    weights = w.repeat(len(pairs))
    path = torch.lerp(z[a], z[b], weights[:, None])
    return decode(denoiser, interpolate(latent[a], latent[b], weights), SOLVER, grid=grid, cond={"vector": path}).x


# --- the page --------------------------------------------------------------------------------------------------------


def report(results: dict) -> str:
    """The tables, as Markdown."""
    about, seconds = results["environment"], results["seconds"]
    probe, made, frechet = results["probe"], results["reconstruction"], results["frechet"]
    names = {"z": "z", "PCA": "32 principal components"}
    titles = {"PCA": "32 principal components"}
    lines = [[titles.get(name, name), cell(row["rmse"], 3), cell(row["psnr"])] for name, row in made.items()]
    edits = [
        [names[row["of"]], "none" if row["margin"] is None else f"{row['margin']:g}",
         *(cell(row[key]) for key in ("new", "old")), cell(row["moved"], 3)]
        for name in names
        for row in [{"of": name, "margin": None, **results["unedited"][name]}, *results["edits"]]
        if row["of"] == name
    ]  # fmt: skip
    trips = ", ".join(f"{cell(error, 4)} at {nfe}" for nfe, error in results["round_trip"].items())
    return f"""# A diffusion autoencoder

`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), {about["dtype"]}; torch {about["torch"]};
scoresde {about["scoresde"]}, commit {about["commit"]}. Training, by its logs, {seconds["autoencoder"]:.0f} s
(autoencoder) and {seconds["latent"]:.0f} s (latent diffusion) of the wall clock, the rest {seconds["measure"]:.0f} s.

Fashion-MNIST at 28 x 28; a U-Net and an encoder of {results["parameters"]:,} parameters together, trained for
{results["train_steps"]} steps of 32 images by the loss of the U-Net alone (Preechakul et al., 2022). z has {Z} numbers.
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

Each of these images is to become one of another class, chosen at random: z goes to the nearest point at which its
linear classifier finds the new class exp(margin) times as likely as the old one, and x_T stays. Beside it the same with
principal components, and theirs. Read by a convolutional classifier of images that knows of neither: the share that it
takes for the new class, and for the old one; and the distance from the image, root mean square.

{chr(10).join(table(["of", "margin", "new class", "old class", "moved by"], edits))}

## Samples

Frechet distance in the features of that classifier, {results["samples"]:,} images:
{cell(frechet["latent diffusion"])} with z of a latent diffusion (an MLP, {results["latent_steps"]} steps),
{cell(frechet["z of held-out images"])} with z of held-out images, both with random x_T;
as many real images have {cell(frechet["real images"])} (in brackets there the standard deviation over choices of them).
"""


def draw(drawn: dict[str, Tensor], path: Path, classes: Sequence[str] | None = None, columns: int = 8) -> None:
    """Reconstructions, edits, interpolations and samples; classes as they are called, or by number."""
    n = min(columns, len(drawn["images"]))
    recon = ["images", "z and its x_T", "z and another x_T", "again", "PCA"]
    edits = ["images", *(name for name in drawn if name.startswith("edit "))]
    labels = {"again": "z and a third x_T", "images": "image"}
    panels = {
        "32 numbers, and what is left to x_T": (recon, [drawn[name][:n] for name in recon], n),
        "edits into the class below, by margin": (edits, [drawn[name][:n] for name in edits], n),
        "between two images": ([], [drawn["between"]], 8),
        "samples, z by a latent diffusion": ([], [drawn["samples"][: len(drawn["samples"]) // 8 * 8]], 8),
    }
    figure, axes = plt.subplots(2, 2, figsize=(14, 8), layout="constrained")
    for axis, (title, (rows, images, wide)) in zip(axes.flat, panels.items(), strict=True):
        shown = tile(torch.cat(images), wide)
        axis.imshow(shown)
        step = shown.shape[0] / max(1, len(rows))
        axis.set_yticks([(k + 0.5) * step for k in range(len(rows))], [labels.get(name, name) for name in rows])
        names = [classes[k] if classes else str(k) for k in drawn["new"][:n].tolist()] if rows == edits else []
        axis.set_xticks([shown.shape[1] * (k + 0.5) / n for k in range(len(names))], names)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(title, fontsize=12)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
