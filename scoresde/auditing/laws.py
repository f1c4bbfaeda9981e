"""The law of what comes out, against the exact one: by the table without sampling, and by samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from scoresde.analysis import Law, marginal, w2
from scoresde.auditing.bench import NEAR, Bench, images, marginal_of_mixture, mixture
from scoresde.auditing.convergence import curve_of
from scoresde.auditing.figure import NOT_DECIDED, RIGHT, WRONG, Figure, number
from scoresde.auditing.table import Responses, output_law
from scoresde.grid import Grid
from scoresde.solvers.rows import forgotten

__all__ = ["figures"]

CLEAR = 6.0
"""Standard errors from which on a difference is one: of some hundred tests, once in 10^6 audits."""


_POINT = Law(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


def figures(bench: Bench) -> Iterator[Figure]:
    """All figures of the law."""
    bench.tick("the law of the samples")
    if bench.why_no_table is None:
        yield from _exact(bench)
        if bench.noisy:
            yield from _point(bench)
            yield from _landing(bench)
    yield from _sampled(bench)
    if bench.noisy:
        yield from _plane(bench)
        yield from _images(bench)


def _exact(bench: Bench) -> Iterator[Figure]:
    """Bias and covariance at several step counts, without the noise of finite samples."""
    data, told = bench.data, []

    def measure(n: int) -> float | None:
        grid = bench.grid(n, start=NEAR)
        found = bench.table(grid)
        if isinstance(found, str):
            return None
        law, truth = output_law(found, data, float(grid.times[0])), marginal(data, grid.sde, grid.times[-1])
        bias = float(((law.mean - truth.mean) / truth.variances.sqrt()).square().mean().sqrt())
        ratio = law.variances / truth.variances
        told.append((n, bias, float(ratio.min()), float(ratio.max())))
        return w2(law, truth)

    steps, distances = bench.within((5, 10, 20, 50, 100, 200), measure)
    curve = curve_of(steps, distances, 1e-12)
    falls = curve.order > 0.5 or curve.last < 1e-6
    stuck = not falls and curve.last > 0.02
    text = "; ".join(
        f"{n} steps: bias {number(bias)} std, variance {low:.3g} to {high:.3g} of the true one"
        for n, bias, low, high in told
    )
    yield Figure(
        "law",
        "bias and covariance, exact",
        RIGHT if falls else WRONG if stuck else NOT_DECIDED,
        text,
        curve.last,
        data={"steps": steps, "w2": distances, "bias": [row[1] for row in told]},
    )


def _point(bench: Bench) -> Iterator[Figure]:
    """On data that are a point D is known: what is left is noise, whose variance then is sigma_s^2 in every row."""
    grid = bench.grid(10, start=NEAR)
    found = bench.table(grid)
    if isinstance(found, str):
        return
    law, truth = output_law(found, _POINT, float(grid.times[0])), marginal(_POINT, grid.sde, grid.times[-1])
    ratio = float(law.variances / truth.variances)
    bias = float((law.mean - truth.mean).abs())
    sde, (t, s) = grid.sde, (grid.times[:-1], grid.times[1:])
    exact = abs(ratio - 1) < 1e-6 and bias < 1e-6
    text = f"data that are one point: the noise left after 10 steps has {ratio:.4g} times its variance"
    signature = ""
    if not exact and len(found.t) == grid.steps:
        c = (found.C[1:] - (found.A[1:] / found.A[:-1])[:, None] * found.C[:-1]).norm(dim=1)
        if torch.allclose(c, sde.sigma(t) * forgotten(sde, t, s).sqrt(), rtol=1e-4):
            signature = "variance beta for beta-tilde"
            text += ": its noise has the variance beta, of the forward step, for beta-tilde, of the posterior"
    yield Figure("law", "point data", RIGHT if exact else NOT_DECIDED, text, ratio, signature=signature)


def _landing(bench: Bench) -> Iterator[Figure]:
    """On data that are a point, at sigma = 0: no noise may be left, least of all from the step that lands there."""
    grid = bench.grid(20, start=NEAR, to_zero=True)
    found = bench.table(grid)
    if isinstance(found, str):
        return
    left = float(output_law(found, _POINT, float(grid.times[0])).variances.sqrt()) / float(
        grid.sde.sigma(grid.times[-2])
    )
    much = left > 0.3
    text = f"data that are one point: at sigma = 0 noise of {number(left)} times the last level is left"
    yield Figure(
        "law", "point data at sigma = 0", RIGHT if left < 1e-4 else WRONG if much else NOT_DECIDED, text, left,
        signature="noise once too much" if much else "",
    )  # fmt: skip


def _scores(x: Tensor, law: Law) -> tuple[float, float]:
    """The largest deviations of mean and variance of independent directions, in their standard errors."""
    n = len(x)
    mean = (x.mean(0) - law.mean) / (law.variances / n).sqrt()
    variance = (x.var(0) / law.variances - 1) / math.sqrt(2 / (n - 1))
    return float(mean.abs().max()), float(variance.abs().max())


def _sampled(bench: Bench) -> Iterator[Figure]:
    """With the noise of finite samples: as the table says, or else as the data is."""
    n, steps = (2000 if bench.quick else 8000), 50
    grid = bench.grid(steps, start=NEAR)
    data = bench.data
    x, _ = bench.gaussian(grid, n, seed=11)
    flat = x.double().reshape(n, -1)
    found = bench.table(grid)
    known = isinstance(found, Responses)
    law = (
        output_law(found, data, float(grid.times[0]))
        if isinstance(found, Responses)
        else marginal(data, grid.sde, grid.times[-1])
    )
    mean, variance = _scores(flat, law)
    z = (flat - flat.mean(0)) / flat.std(0)
    between = float((z.T @ z / n - torch.eye(z.shape[1], dtype=z.dtype)).abs().max()) * math.sqrt(n)
    along = float((z[1:] * z[:-1]).mean(0).abs().max()) * math.sqrt(n)
    worst = max(mean, variance, between, along)
    against = "what its table says" if known else "the data's"
    text = (
        f"{n} samples at {steps} steps against {against}: mean off by {mean:.1f}, variance by {variance:.1f}, "
        f"correlation between dimensions by {between:.1f}, between samples by {along:.1f} standard errors"
    )
    clear = worst > CLEAR
    verdict = RIGHT if not clear else WRONG if known or max(between, along) > CLEAR else NOT_DECIDED
    yield Figure("law", "bias and covariance of samples", verdict, text, worst)


def _plane(bench: Bench) -> Iterator[Figure]:
    """A mixture in the plane: mean and covariance of its samples, at several step counts."""
    n, (mean, within) = (2000 if bench.quick else 6000), mixture(2).moments()
    told: list[str] = []
    clear: list[bool] = []

    def measure(steps: int) -> float:
        grid = bench.grid(steps)
        flat = _mixed(bench, 2, n, grid).reshape(n, 2)
        alpha, sigma = grid.sde.alpha(grid.times[-1]), grid.sde.sigma(grid.times[-1])
        true = (alpha**2 * within + sigma**2 * torch.eye(2, dtype=torch.float64)).diagonal()
        bias = float(((flat.mean(0) - alpha * mean) / true.sqrt()).abs().max())
        ratio = flat.var(0) / true
        stderr = (flat - flat.mean(0)).square().std(0) / math.sqrt(n) / true
        clear.append(max(bias * math.sqrt(n), float(((ratio - 1) / stderr).abs().max())) > CLEAR)
        told.append(
            f"{steps} steps: mean off by {number(bias)} std, variance {float(ratio.min()):.3g} to "
            f"{float(ratio.max()):.3g} of the true one"
        )
        return max(bias, float((ratio - 1).abs().max()))

    _, off = bench.within((20, 80) if bench.quick else (20, 80, 320), measure)
    fits = not clear[-1] or off[-1] < 0.03 or off[-1] < 0.6 * off[0]
    verdict = RIGHT if fits else WRONG if off[-1] > 0.15 else NOT_DECIDED
    yield Figure("law", "mixture in 2 dimensions", verdict, f"{n} samples; {'; '.join(told)}", off[-1])


def _mixed(bench: Bench, dimensions: int, n: int, grid: Grid) -> Tensor:
    """Samples of a mixture from x_T of the exact marginal."""
    x_T = marginal_of_mixture(dimensions, grid.sde, float(grid.times[0]), n, seed=7)
    return bench.run(mixture(dimensions).denoiser(grid.sde), x_T, grid.times, seed=12)[0].double()


def _images(bench: Bench) -> Iterator[Figure]:
    """A mixture in 3072 dimensions: the width of the samples about the mode that each is nearest to. Of 16 samples the
    mean width is known to 1 / sqrt(2 * 16 * 3072) = 0.3 %.
    """
    means, std = images()
    told: list[str] = []

    def measure(steps: int) -> float:
        grid = bench.grid(steps, start=NEAR)
        x = _mixed(bench, 3072, 16, grid).reshape(16, -1)
        alpha, sigma = float(grid.sde.alpha(grid.times[-1])), float(grid.sde.sigma(grid.times[-1]))
        k = torch.cdist(x, alpha * means.reshape(8, -1)).argmin(1)
        width = (x - alpha * means.reshape(8, -1)[k]).square().mean(1).sqrt()
        off = float((width / (alpha**2 * std[k] ** 2 + sigma**2).sqrt()).mean() - 1)
        told.append(f"{steps} steps: {1 + off:.4f}")
        return abs(off)

    _, off = bench.within((20, 80) if bench.quick else (20, 80, 240), measure)
    fits = off[-1] < 0.02 or off[-1] < 0.6 * off[0]
    verdict = RIGHT if fits else WRONG if off[-1] > 0.1 else NOT_DECIDED
    text = f"width about the modes, of the true one; {'; '.join(told)}"
    yield Figure("law", "mixture in 3072 dimensions", verdict, text, off[-1])
