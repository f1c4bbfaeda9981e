"""Analytic-DPM on trained networks: quality and code length by number of steps, for every choice of the variance.

    python benchmarks/analytic_variance.py --experiment digits
    python benchmarks/analytic_variance.py --experiment fashion-mnist
    python benchmarks/analytic_variance.py --denoiser my_module:denoiser --data train.npy --held-out test.npy

One network (noise prediction, the linear chain of 1000 steps; of digits trained here, of Fashion-MNIST that of
benchmarks/networks.py, VP, told the times of the chain's noise levels), and two heads on it that stays frozen. Then, on
the evenly spaced sub-chain of K nodes ("even trajectory"),

    beta~           DDPM's smaller variance, the posterior's         c^2
    beta            its larger one
    A-DDPM          the analytic variance                            c^2 + b^2 C_t,  C_t from `estimate`
    SN-, NPR-DDPM   learned, elementwise                             c^2 + b^2 Var[x_0 | x_t]
    DDIM            no noise; A-, SN-, NPR-DDIM: the same rule       b^2 Var

    quality         Frechet distance of the samples to held-out data, in a fixed feature space: mean and standard
                    deviation over independent sets of samples
    code length     the variational bound of that very chain, in bits/dim of held-out data, with its standard error
                    over images ("OT": on the trajectory of the best bound). The DDIM family has none: where the network
                    errs so that C_t or Var is 0, its steps have no noise and the bound is infinite

Means are clipped to the data's range, in samples and bounds, and the last noisy step is all but quiet: E |noise| of an
entry is at most 2/255, the step of 256 grey levels, for all that add noise there (Bao et al., 2022, appendix F.2).

Written into --out: README.md, results.json, race.png, samples.png, and runs/ with the network, its table, its heads and
every finished number: a run that is killed goes on where it stopped.

--denoiser names an object or a function that makes it, in an importable module: a scoresde `Denoiser`. Arrays are .npy
or .npz files, or module:attribute. Heads are trained for networks that are a `scoresde.nn.UNet`, if --head-steps > 0.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from kept import Clock, Numbers, Scores, floor, made_on, published_table, score_table, verdict
from problems import user_data
from torch import Tensor
from tqdm import tqdm

from scoresde import DDPMChain, Denoiser, EpsDenoiser, Grid, NetworkDenoiser, elbo, sample
from scoresde.cli.measuring import features_of
from scoresde.cli.models import load_denoiser
from scoresde.data import digits, fashion_mnist
from scoresde.info import environment
from scoresde.likelihood import outer_edges
from scoresde.metrics import frechet_distance
from scoresde.nn import UNet
from scoresde.noise import derive_seed
from scoresde.report import log_ticks, table, write_json
from scoresde.solvers import DDIM, DDPM, Solver
from scoresde.tableau import Tableau
from scoresde.training import TrainConfig, Trainer, load
from scoresde.variance import (
    AnalyticDenoiser,
    NPRDenoiser,
    OptimalVariance,
    SNDenoiser,
    TrunkWithHead,
    VarianceTable,
    estimate,
    measure_errors,
    npr_loss,
    sn_loss,
    training_loss,
)
from scoresde.variance.solver import quiet_last
from scoresde.variance.table import fingerprint
from scoresde.wrappers import Clip

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LAST = 2 / 255  # E |noise| of the last noisy step at most
HEADS: dict[str, tuple[type, Callable[..., Tensor]]] = {"SN": (SNDenoiser, sn_loss), "NPR": (NPRDenoiser, npr_loss)}

# CIFAR-10, N = 1000, linear schedule, L_simple, even trajectory: FID and bits/dim of Bao et al. (2022), Analytic-DPM,
# tables 1 and 2; SN and NPR as reprinted by a later paper, whose table ends at K = 200.
PUBLISHED_K = (10, 25, 50, 100, 200, 1000)
PUBLISHED_FRECHET = {
    "beta~": (44.45, 21.83, 15.21, 10.94, 8.23, 5.11),
    "beta": (233.41, 125.05, 66.28, 31.36, 12.96, 3.04),
    "A-DDPM": (34.26, 11.60, 7.25, 5.40, 4.01, 4.03),
    "SN-DDPM": (24.06, 6.91, 4.63, 3.67, 3.11),
    "NPR-DDPM": (32.35, 10.55, 6.18, 4.52, 3.57),
    "DDIM": (21.31, 10.70, 7.74, 6.08, 5.07, 4.13),
    "A-DDIM": (14.00, 5.81, 4.04, 3.55, 3.39, 3.74),
    "SN-DDIM": (12.19, 4.28, 3.39, 3.23, 3.22),
    "NPR-DDIM": (13.34, 5.38, 3.95, 3.53, 3.42),
}
PUBLISHED_BITS = {
    "beta~": (74.95, 24.98, 12.01, 7.08, 5.03, 3.73),
    "beta": (6.99, 6.11, 5.44, 4.86, 4.39, 3.75),
    "A-DDPM": (5.47, 4.79, 4.38, 4.07, 3.84, 3.59),
    "SN-DDPM": (30.79, 11.83, 7.13, 5.24, 4.39),
    "NPR-DDPM": (5.40, 4.64, 4.25, 3.98, 3.79),
    "OT beta": (5.38, 4.34, 3.97, 3.82, 3.77, 3.75),
    "OT A-DDPM": (4.11, 3.68, 3.61, 3.59, 3.59, 3.59),
}
ORDERINGS = {
    "frechet": [
        ("A-DDPM", "beta~"),
        ("A-DDPM", "beta"),
        ("beta~", "beta"),
        ("SN-DDPM", "A-DDPM"),
        ("NPR-DDPM", "A-DDPM"),
        ("SN-DDPM", "NPR-DDPM"),
        ("DDIM", "beta~"),
        ("A-DDIM", "DDIM"),
        ("A-DDIM", "A-DDPM"),
        ("SN-DDIM", "A-DDIM"),
        ("NPR-DDIM", "A-DDIM"),
    ],
    "bits": [
        ("A-DDPM", "beta~"),
        ("A-DDPM", "beta"),
        ("beta", "beta~"),
        ("NPR-DDPM", "A-DDPM"),
        ("A-DDPM", "SN-DDPM"),
        ("OT beta", "beta"),
        ("OT A-DDPM", "A-DDPM"),
    ],
}


# --- experiments -----------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Data as the network takes them, float32, to learn from and held out."""

    training: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Experiment:
    """A network, its data, and how much is measured.

    Attributes:
        title: of the page.
        data: makes the split.
        data_range: of the data.
        levels: of grey, or None for densities.
        features: name of the space of the Frechet distance: of a classifier (`scoresde.metrics.classifier_features`),
            "module:attribute", or "random" for two fixed random layers.
        denoiser: makes the denoiser, untrained if there is `training`.
        about: whose network it is, if it is not trained here.
        training, heads: how network and heads are trained; None for as they are, and for no heads.
        steps: K.
        samples, sets: in a set, and how many sets of samples there are for each method and K.
        images, draws: held-out images of the bound, and evaluations of each at least, K > draws taking K.
        draws_of_table, draws_of_errors: Monte-Carlo samples at each time.
        clip: the means to the data's range.
    """

    title: str
    data: Callable[[], Split]
    data_range: tuple[float, float]
    levels: int | None
    features: str
    denoiser: Callable[[], Denoiser]
    training: TrainConfig | None
    heads: TrainConfig | None
    steps: tuple[int, ...]
    samples: int
    sets: int
    images: int
    draws: int = 100
    draws_of_table: int = 100
    draws_of_errors: int = 100
    clip: bool = True
    about: str = ""


def _network(**options: Any) -> Callable[[], NetworkDenoiser]:
    def make() -> NetworkDenoiser:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = UNet(1, 32, (1, 2), blocks=1, **options)
        return EpsDenoiser(net, DDPMChain.linear(1000))

    return make


def _vp() -> NetworkDenoiser:
    """The committed network, on a chain: at each node it is told the time of VP with the same SNR."""
    found, chain = load(Path(__file__).parent / "results/networks/VP"), DDPMChain.linear(1000)
    last = found.sde.t_max

    def time(n: Tensor) -> Tensor:
        return found.label(found.sde.time_at(chain.half_log_snr(n)).clamp(max=last))

    return EpsDenoiser(found.net, chain, time=time)


def _digits() -> Split:
    images, _ = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Split(images[order[500:]], images[order[:500]])


def _fashion_mnist() -> Split:
    return Split(*(fashion_mnist(split=split)[0] for split in ("train", "test")))


EXPERIMENTS = {
    "digits": Experiment(
        "digits: 8 x 8, 17 grey levels, 1,297 to learn from and 500 held out",
        _digits,
        (-1.0, 1.0),
        17,
        "digits",
        _network(),
        TrainConfig(steps=4000, batch_size=128, lr=2e-3, ema_decay=0.998),
        TrainConfig(steps=1500, batch_size=128, lr=1e-3, ema_decay=0.995),
        (5, 10, 25, 50, 100, 200, 1000),
        samples=200,
        sets=4,
        images=300,
        draws_of_table=200,
        draws_of_errors=200,
    ),
    "fashion-mnist": Experiment(
        "Fashion-MNIST: 28 x 28, 256 grey levels, 60,000 to learn from and 10,000 held out",
        _fashion_mnist,
        (-1.0, 1.0),
        256,
        "fashion-mnist",
        _vp,
        None,
        TrainConfig(steps=600, batch_size=64, lr=1e-3, ema_decay=0.99),
        (10, 25, 50),
        samples=100,
        sets=3,
        images=60,
        draws_of_table=40,
        draws_of_errors=40,
        about="the VP network of [networks](../../networks), told the times of the chain's noise levels",
    ),
}


# --- the model and its variances -------------------------------------------------------------------------------------


class Method(NamedTuple):
    """A variance, as a sampler and as a bound.

    Attributes:
        denoiser: its mean and, if it has one, its variance.
        sampler: on any grid; None where only the bound is of interest.
        chain: of the bound, and its `variance=`; None where it is infinite.
        variance: of `elbo`.
        trajectory: which grid of K steps.
    """

    denoiser: Denoiser
    sampler: Solver | None
    chain: Solver | None
    variance: str
    trajectory: Callable[[int], Grid]


@dataclass(frozen=True)
class QuietLast(Solver):
    """Another one-step solver with the noise of its last noisy step cut, as `OptimalVariance(last=)` does."""

    solver: Solver
    last: float

    def tableau(self, grid: Grid) -> Tableau:
        base = self.solver.tableau(grid)
        c = quiet_last(grid, base.c, self.last)
        return Tableau(grid, a=base.a, b=base.b, c=c, view=(base.p, base.q), t=base.t, step=base.step)


def even(sde: Any, steps: int) -> Grid:
    """The even trajectory of a chain; for other SDEs the customary grid."""
    return Grid.strided(sde, steps, "linspace") if isinstance(sde, DDPMChain) else Grid.customary(sde, steps)


class Model:
    """The trained network with all its variances, each made once and kept in a folder."""

    def __init__(self, experiment: Experiment, folder: Path, device: str, clock: Clock) -> None:
        self.experiment, self.folder, self.device, self.clock = experiment, folder, device, clock
        self.data = experiment.data()

    @cached_property
    def denoiser(self) -> Denoiser:
        made, config = self.experiment.denoiser(), self.experiment.training
        if config is None:
            if isinstance(made, NetworkDenoiser) and isinstance(made.net, torch.nn.Module):
                made.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return made
        assert isinstance(made, NetworkDenoiser)
        return self._trained(made, config, "network")

    def _trained(self, denoiser: NetworkDenoiser, config: TrainConfig, name: str, **options: Any) -> NetworkDenoiser:
        assert isinstance(denoiser.net, torch.nn.Module)
        denoiser.net.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        with self.clock(f"training of {name}"):
            trainer = Trainer(denoiser, self.data.training, config, folder=self.folder / name, **options)
            return trainer.fit().ema

    @cached_property
    def table(self) -> VarianceTable:
        path = self.folder / "table.npz"
        if path.exists() and (kept := VarianceTable.load(path, self.denoiser.sde)).model == fingerprint(self.denoiser):
            return kept
        with self.clock("table"):
            found = estimate(
                self.denoiser, self.data.training, samples=self.experiment.draws_of_table, progress=True, batch_size=100
            )
        found.save(path)
        return found

    @cached_property
    def analytic(self) -> Denoiser:
        return AnalyticDenoiser(self.denoiser, self.table, self.experiment.data_range)

    @cached_property
    def heads(self) -> dict[str, Denoiser]:
        config, base = self.experiment.heads, self.denoiser
        if config is None or not isinstance(base, NetworkDenoiser) or not isinstance(base.net, UNet):
            return {}
        found: dict[str, Denoiser] = {}
        for name, (kind, loss) in HEADS.items():
            trunk = base.with_net(TrunkWithHead(copy.deepcopy(base.net)))
            trained = self._trained(trunk, config, f"{name} head", loss=training_loss(loss))
            found[name] = kind(trained, data_range=self.experiment.data_range)
        return found

    def methods(self) -> dict[str, Method]:
        def on(K: int) -> Grid:
            return even(self.denoiser.sde, K)

        best = OptimalVariance(DDPM(), last=LAST), OptimalVariance(DDIM(), last=LAST)
        base, analytic = self._clipped(self.denoiser), self._clipped(self.analytic)
        found = {
            "beta~": Method(base, QuietLast(DDPM(), LAST), DDPM(), "solver", on),
            "beta": Method(base, QuietLast(DDPM("beta"), LAST), DDPM("beta"), "solver", on),
            "A-DDPM": Method(analytic, best[0], DDPM(), "posterior", on),
        }
        heads = {name: self._clipped(head) for name, head in self.heads.items()}
        found |= {f"{name}-DDPM": Method(head, best[0], DDPM(), "posterior", on) for name, head in heads.items()}
        found |= {
            "DDIM": Method(base, DDIM(), None, "solver", on),
            "A-DDIM": Method(analytic, best[1], None, "posterior", on),
        }
        found |= {f"{name}-DDIM": Method(head, best[1], None, "posterior", on) for name, head in heads.items()}
        found["OT beta"] = Method(base, None, DDPM("beta"), "solver", lambda K: self.costs["beta"].grid(K))
        found["OT A-DDPM"] = Method(analytic, None, DDPM(), "posterior", lambda K: self.costs["analytic"].grid(K))
        return found

    def _clipped(self, denoiser: Denoiser) -> Denoiser:
        return Clip(denoiser, *self.experiment.data_range) if self.experiment.clip else denoiser

    @cached_property
    def costs(self) -> dict[str, Any]:
        """Of every step, measured on the training data."""
        with self.clock("costs of trajectories"):
            errors = measure_errors(
                self._clipped(self.denoiser),
                self.data.training.to(self.device),
                samples=self.experiment.draws_of_errors,
                progress=True,
                **self.bins(),
            )
        C = self.table.covariance(errors.times, self.experiment.data_range)
        return {"beta": errors.costs("beta"), "analytic": errors.costs(C)}

    def bins(self) -> dict[str, Any]:
        """Options of the decoder."""
        levels = self.experiment.levels
        if levels is None:
            return {}
        return {"levels": levels, "data_range": outer_edges(*self.experiment.data_range, levels)}


# --- measuring -------------------------------------------------------------------------------------------------------


def samples_of(model: Model, method: Method, K: int, number: int) -> Tensor:
    """One set of samples, clipped to the data's range; the same x_T and noise for every method."""
    assert method.sampler is not None
    experiment = model.experiment
    shape = (experiment.samples, *model.data.training.shape[1:])
    found = sample(method.denoiser, shape, method.sampler, grid=method.trajectory(K), seed=derive_seed(number, K))
    return found.x.cpu().clamp(*experiment.data_range)


def bits_of(model: Model, method: Method, K: int) -> Tensor:
    """Bits/dim of each of the images, (n,); the same noise for every method."""
    experiment = model.experiment
    x, draws = model.data.held_out[: experiment.images].to(model.device), max(1, -(-experiment.draws // K))
    parts = [
        elbo(
            method.denoiser,
            part,
            method.chain,
            method.trajectory(K),
            draws=draws,
            seed=[derive_seed(100 * i + j, K) for j in range(len(part))],
            variance=method.variance,  # type: ignore[arg-type]
            **model.bins(),
        ).bits_per_dim
        for i, part in enumerate(x.split(100))
    ]
    return torch.cat(parts).double().cpu()


def measure(model: Model, features: Callable[[Tensor], Tensor], cells: Numbers) -> None:
    """Every cell that is not there yet."""
    experiment, methods = model.experiment, model.methods()
    reference = features(model.data.held_out)
    todo = [
        (kind, name, K)
        for K in experiment.steps
        for name, method in methods.items()
        for kind, wanted in (("frechet", method.sampler), ("bits", method.chain))
        if wanted is not None and cells.get(kind, name, K) is None
    ]
    bar = tqdm(todo, unit="cell", smoothing=0)
    for kind, name, K in bar:
        bar.set_postfix_str(f"{kind} {name} {K}")
        if kind == "frechet":
            with model.clock("samples"):
                sets = [samples_of(model, methods[name], K, s) for s in range(experiment.sets)]
            cells.put(kind, name, K, [frechet_distance(features(x), reference) for x in sets])
        else:
            with model.clock("bounds"):
                cells.put(kind, name, K, bits_of(model, methods[name], K).tolist())


# --- the page --------------------------------------------------------------------------------------------------------


def both_tables(scores: Scores, published: Mapping[str, Sequence[float]]) -> list[str]:
    """The scores, and those of the papers."""
    ours, theirs = score_table(scores, "K", apart=("OT",)), published_table(published, "K", PUBLISHED_K)
    return [*ours, "", "Published, CIFAR-10:", "", *theirs]


class Ordering(NamedTuple):
    """That one method is ahead of another: the K at which it was published to be, and what was found here."""

    first: str
    second: str
    published: list[int]
    here: dict[int, str]

    @property
    def reproduced(self) -> tuple[str, str]:
        """("yes" | "in part" | "tie" | "no", at which K of those that both tables have)."""
        at: dict[str, list[int]] = {"as published": [], "tie": [], "reversed": []}
        for K in PUBLISHED_K:
            if K in self.here:
                agrees = self.here[K] == ("yes" if K in self.published else "no")
                at["tie" if self.here[K] == "tie" else "as published" if agrees else "reversed"].append(K)
        words = "; ".join(f"{word} at {_listed(K)}" for word, K in at.items() if K)
        if not at["as published"]:
            return "no" if at["reversed"] else "tie", words
        return "in part" if at["tie"] or at["reversed"] else "yes", words


def _listed(K: Sequence[int]) -> str:
    return ", ".join(map(str, K)) or "none"


def orderings(kind: str, scores: Scores, steps: Sequence[int]) -> list[Ordering]:
    """Of the pairs that were measured."""
    published = PUBLISHED_FRECHET if kind == "frechet" else PUBLISHED_BITS
    found = []
    for first, second in ORDERINGS[kind]:
        if (first, steps[0]) not in scores or (second, steps[0]) not in scores:
            continue
        pairs = zip(PUBLISHED_K, published[first], published[second], strict=False)
        ahead = [K for K, a, b in pairs if a < b]
        last = min(len(published[first]), len(published[second]))
        here = {K: verdict(scores[first, K], scores[second, K]) for K in steps}
        here = {K: v for K, v in here.items() if K not in PUBLISHED_K[last:]}
        found.append(Ordering(first, second, ahead, here))
    return found


def orderings_table(found: Sequence[Ordering]) -> list[str]:
    rows = []
    for o in found:
        here, ties = ([K for K, v in o.here.items() if v == word] for word in ("yes", "tie"))
        rows.append([o.first, o.second, _listed(o.published), _listed(here), _listed(ties), o.reproduced[0]])
    return table(["ahead", "of", "published, at K", "here, at K", "ties", "reproduced"], rows)


def summary(found: Mapping[str, Sequence[Ordering]], steps: Sequence[int]) -> str:
    """The paragraph: which orderings reproduce and which do not."""
    texts = []
    for kind, title in (("bits", "In bits/dim"), ("frechet", "In Frechet distance")):
        words = f"{title}, of {len(found[kind])} published orderings,"
        for word, said in (("yes", "reproduced"), ("in part", "in part"), ("tie", "a tie"), ("no", "not")):
            these = [o for o in found[kind] if o.reproduced[0] == word]
            if these and word == "in part":
                listed = "; ".join(f"{o.first} before {o.second} ({o.reproduced[1]})" for o in these)
            else:
                listed = ", ".join(f"{o.first} before {o.second}" for o in these)
            words += f" {said}: {listed}." if these else ""
        texts.append(words)
    for other in ("beta~", "beta"):
        here = next((o.here for o in found["frechet"] if (o.first, o.second) == ("A-DDPM", other)), {})
        ahead, ties = ([K for K in steps if here.get(K) == v] for v in ("yes", "tie"))
        texts.append(f"A-DDPM is ahead of {other} in Frechet distance at K = {_listed(ahead)}; ties: {_listed(ties)}.")
    return "\n\n".join(texts)


def draw_race(frechet: Scores, bits: Scores, real: float, steps: Sequence[int], path: Path) -> None:
    """Quality and code length against K."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    names = list(dict.fromkeys(name for name, _ in [*frechet, *bits]))
    colours = {"beta~": "tab:blue", "beta": "tab:gray", "A-": "tab:red", "SN": "tab:purple", "NPR": "tab:green"}
    for name in names:
        colour = next((c for key, c in colours.items() if name.removeprefix("OT ").startswith(key)), "tab:blue")
        if name.removeprefix("OT ") == "beta":
            colour = "tab:gray"
        style = ":" if name.startswith("OT") else "--" if name.endswith("DDIM") else "-"
        for axis, scores in zip(axes, (frechet, bits), strict=True):
            if (name, steps[0]) not in scores:
                continue
            mean, error = ([getattr(scores[name, K], key) for K in steps] for key in ("mean", "stderr"))
            axis.errorbar(steps, mean, error, color=colour, linestyle=style, marker="o", markersize=3, label=name)
    ticks: list[int] = list(steps)
    axes[0].axhline(real, color="black", linewidth=0.8, linestyle="-.", label="real data")
    for axis, title in zip(
        axes, ("Frechet distance to held-out data", "bound, bits/dim of held-out data"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="K, evaluations of the network", title=title)
        axis.set_xticks(ticks, [str(K) for K in ticks])
        axis.minorticks_off()
        heights = log_ticks(*axis.get_ylim())
        axis.set_yticks(heights, [f"{tick:.3g}" for tick in heights])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2, handlelength=4)  # long enough to show the dashes
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(model: Model, path: Path, side: int = 5) -> None:
    """A few samples of each method at three K, from the same x_T, and real data. For images of one channel."""
    if model.data.training.ndim != 4 or model.data.training.shape[1] != 1:
        return
    methods = {name: m for name, m in model.methods().items() if m.sampler is not None}
    few: list[int] = [K for K in (5, 10, 50, 1000) if K in model.experiment.steps] or [model.experiment.steps[-1]]
    small = copy.copy(model)
    small.experiment = replace(model.experiment, samples=side**2)
    figure, axes = plt.subplots(
        len(few), len(methods) + 1, figsize=(1.7 * (len(methods) + 1), 1.85 * len(few)), layout="constrained"
    )
    for i, K in enumerate(few):
        pictures = {name: samples_of(small, method, K, 0) for name, method in methods.items()}
        pictures["real, held out"] = model.data.held_out[: side**2]
        for axis, (name, x) in zip(axes.reshape(len(few), -1)[i], pictures.items(), strict=True):
            padded = torch.nn.functional.pad(x[:, 0], (0, 1, 0, 1), value=0.0)
            rows = padded.reshape(side, side, *padded.shape[1:]).permute(0, 2, 1, 3)
            axis.imshow(rows.reshape(rows.shape[0] * rows.shape[1], -1), cmap="gray_r", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[], title=name if i == 0 else "")
        axes.reshape(len(few), -1)[i, 0].set_ylabel(f"K = {K}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def report(model: Model, cells: Numbers, features: Callable[[Tensor], Tensor], out: Path) -> str:
    """Everything that is written."""
    experiment, steps = model.experiment, model.experiment.steps
    frechet, bits = cells.scores("frechet", steps), cells.scores("bits", steps)
    reference = features(model.data.held_out)
    real, real_std = floor(model.data.training, reference, features, experiment.samples)
    found = {"bits": orderings("bits", bits, steps), "frechet": orderings("frechet", frechet, steps)}
    about = environment(model.device)
    whose = [f"`{model.denoiser!r}`", *([experiment.about] if experiment.about else [])]
    for what, config in (("", experiment.training), ("its heads ", experiment.heads if model.heads else None)):
        if config is not None:
            whose.append(f"{what}trained for {config.steps} steps of {config.batch_size}")
    what = "bits/dim of the image" if experiment.levels else "bits/dim, of a density"
    page = [
        f"# Analytic-DPM: {experiment.title}",
        "",
        f"{made_on(about)} {model.clock}",
        "",
        f"{', '.join(whose)}. "
        f"{experiment.sets} sets of {experiment.samples} samples for each entry of the first table, "
        f"{min(experiment.images, len(model.data.held_out))} held-out images for each of the second, "
        f"{experiment.draws_of_table} draws at each time for the table of the analytic variance.",
        "",
        summary(found, steps),
        "",
        "![Frechet distance and bound against steps](race.png)",
        "",
        "![samples](samples.png)",
        "",
        "## Frechet distance",
        "",
        f"To held-out data in the features `{cells.features}`: mean over the sets and, in brackets, its standard "
        f"error. Real data against real data: {real:.2f} (standard deviation {real_std:.2g}).",
        "",
        *both_tables(frechet, PUBLISHED_FRECHET),
        "",
        *orderings_table(found["frechet"]),
        "",
        "## Bound on the likelihood",
        "",
        f"The variational bound, {what}: mean over held-out images and, in brackets, its standard error. The noise is "
        "the same for all methods, so that differences are sharper than that: orderings are of paired differences. OT: "
        "optimal trajectory, of the measured costs on training data.",
        "",
        *both_tables(bits, PUBLISHED_BITS),
        "",
        *orderings_table(found["bits"]),
        "",
        'In both, "ahead" means that the 95 % interval (Student) of the paired differences does not hold 0, else it is '
        "a tie; reproduced is what agrees with the published table at every K that both have, in part at some.",
    ]
    record = {
        "environment": about,
        "seconds": model.clock.seconds,
        "denoiser": repr(model.denoiser),
        "model": cells.model,
        "experiment": {
            key: value if isinstance(value, int | float | str | tuple) or value is None else repr(value)
            for key, value in vars(experiment).items()
            if key not in ("data", "denoiser")
        },
        "eps_square": {"t": model.table.t.tolist(), "value": model.table.eps_square.tolist()},
        "real": {"mean": real, "std": real_std},
        "frechet": _nested(frechet),
        "bits": _nested(bits),
    }
    write_json(out / "results.json", record)
    text = "\n".join(page) + "\n"
    (out / "README.md").write_text(text)
    draw_race(frechet, bits, real, steps, out / "race.png")
    draw_samples(model, out / "samples.png")
    return text


def _nested(scores: Scores) -> dict[str, dict[int, list[float]]]:
    """method -> K -> [mean, standard error]."""
    tree: dict[str, dict[int, list[float]]] = {}
    for (name, K), score in scores.items():
        tree.setdefault(name, {})[K] = [score.mean, score.stderr]
    return tree


# --- the command -----------------------------------------------------------------------------------------------------


def of_user(args: argparse.Namespace) -> Experiment:
    """The experiment of a denoiser and data that a user names."""
    return Experiment(
        title=args.denoiser,
        data=lambda: Split(user_data(args.data), user_data(args.held_out)),
        data_range=(args.range[0], args.range[1]),
        levels=args.levels,
        features=args.features or "random",
        denoiser=lambda: load_denoiser(args.denoiser)[0],
        training=None,
        heads=TrainConfig(steps=args.head_steps, batch_size=64) if args.head_steps else None,
        steps=(5, 10, 25, 50, 100, 200),
        samples=512,
        sets=2,
        images=256,
        clip=not args.no_clip,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=[*EXPERIMENTS], help="one of those that are committed")
    parser.add_argument("--denoiser", help="your own instead: module:attribute")
    parser.add_argument("--data", help="what it was trained on, an array: .npy, .npz or module:attribute")
    parser.add_argument("--held-out", help="other data of the same law, likewise")
    parser.add_argument("--range", type=float, nargs=2, default=[-1.0, 1.0], help="of your data (-1 1)")
    parser.add_argument("--levels", type=int, help="of your data, for code lengths; without, densities")
    parser.add_argument("--no-clip", action="store_true", help="leave your means as they are: data without bounds")
    parser.add_argument("--head-steps", type=int, default=0, help="training steps of the heads on your UNet (0: none)")
    parser.add_argument("--features", help="digits, fashion-mnist, random, or module:attribute (yours: random)")
    parser.add_argument("--steps", type=int, nargs="+", help="K")
    parser.add_argument("--samples", type=int, help="in a set")
    parser.add_argument("--sets", type=int, help="of samples")
    parser.add_argument("--images", type=int, help="held-out data of the bound")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of results (runs/analytic_variance/...)")
    args = parser.parse_args(argv)
    if (args.experiment is None) == (args.denoiser is None):
        parser.error("give --experiment, or --denoiser with --data and --held-out")
    if args.denoiser and not (args.data and args.held_out):
        parser.error("--denoiser needs --data and --held-out")
    if args.steps and min(args.steps) < 2:
        parser.error("--steps are 2 at least")
    args.out = args.out or Path("runs/analytic_variance") / (args.experiment or args.denoiser.replace(":", "-"))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    chosen = {key: value for key in ("samples", "sets", "images") if (value := getattr(args, key)) is not None}
    if args.steps:
        chosen["steps"] = tuple(sorted(set(args.steps)))
    experiment = replace(of_user(args) if args.denoiser else EXPERIMENTS[args.experiment], **chosen)
    folder = args.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    if args.features:
        experiment = replace(experiment, features=args.features)
    model = Model(experiment, folder, args.device, Clock(folder / "seconds.json"))
    features = features_of(experiment.features, "", model.data.held_out, "cpu")
    fixed = (experiment.samples, experiment.sets, experiment.images, experiment.draws, experiment.clip)
    cells = Numbers(folder / "cells.jsonl", f"{fingerprint(model.denoiser)} {fixed}", experiment.features)
    measure(model, features, cells)
    print(report(model, cells, features, args.out))
    print(f"written into {args.out}: README.md, results.json, race.png, samples.png")


if __name__ == "__main__":
    main()
