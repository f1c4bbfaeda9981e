"""Exact analysis of tables: equal to running them, by impulses, by samples and by differences."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from common import SDES, SOLVERS, STOCHASTIC, end_of, generator, normal, start_of

from scoresde import EDMSDE, VPSDE, Grid, Tableau, sample
from scoresde.analysis import Law, amplification, flow_error, gaussian_law, kl, marginal, order, stable_from, w2
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.noise import GeneratorNoise
from scoresde.solvers import DDIM, DDPM, Ancestral, EulerMaruyama, Heun, ReverseDiffusion, RungeKutta
from scoresde.solvers.rows import forward_rows
from scoresde.views import view_of_mean

MEAN = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
STD = torch.tensor([0.0, 0.1, 1.0, 3.0], dtype=torch.float64)
TARGET = Law(MEAN, STD**2)
GAUSSIAN = Gaussian(MEAN, std=STD)


def random_table(view="mixed", rows=12, noisy=True, seed=0):
    """A window of 4 in any view; row 3 evaluates nothing, and rows 5 and 6 are read only later."""
    sde = VPSDE()
    grid = Grid.uniform(sde, rows, start=0.9, end=0.1)
    b = 0.2 * normal(rows, 4, seed=seed)
    b[torch.arange(4) > torch.arange(rows)[:, None]] = 0.0
    for k in range(4):
        b[3 + k, k] = 0.0
    b[5, 0] = b[6, 0] = 0.0
    if view == "mixed":
        views = [view_of_mean(name, sde, grid.times[:-1]) for name in ("eps", "v", "x0")]
        row = torch.arange(rows)
        view = tuple(torch.stack(column)[row % 3, row] for column in zip(*views, strict=True))
    c = normal(rows, seed=seed + 2).clamp(min=0) if noisy else 0.0
    table = Tableau(grid, a=1 + 0.2 * normal(rows, seed=seed + 1), b=b, c=c, view=view)
    assert not table.evaluates[3]
    assert table.evaluates[[5, 6]].all()
    return table


def restart_table():
    """Down by Heun, up again by the forward process, and down: rows that evaluate nothing, times that rise."""
    sde = EDMSDE()
    t, s = (torch.tensor([x], dtype=torch.float64) for x in (10.0, 1.0))
    down, up = Heun().rows(sde, t, s), forward_rows(sde, s, t)
    one = torch.ones(1, dtype=torch.int64)
    rows = type(down).merge([down, up.numbered(one), down.numbered(2 * one)])
    return rows.tableau(Grid(sde, [10.0, 1.0]), step=torch.zeros(3, dtype=torch.int64))


def impulses(table, target):
    """(factor of x_T, constant, variance from the noise) by running the table on unit impulses, each (D,)."""
    event, rows = target.event_shape, len(table)
    n = rows + 2  # nothing, x_T, and each row's noise
    one = torch.zeros(n, rows + 1, dtype=torch.float64)
    one[torch.arange(1, n), torch.arange(rows + 1)] = 1.0

    def noise(row, x):
        return one[:, row + 1].reshape(-1, *[1] * len(event)).expand(x.shape)

    *_, last = table.iterate(target.denoiser(table.grid.sde), noise(-1, torch.zeros(n, *event)), noise)
    constant, *responses = last.x.reshape(n, -1)
    responses = torch.stack(responses) - constant
    return responses[0], constant, (responses[1:] ** 2).sum(0)


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


TABLES = {f"{name} {sde}": SOLVERS[name].tableau(Grid.uniform(SDES[sde], 9, start=start_of(SDES[sde]), end=end))
          for name in SOLVERS for sde, end in (("vp", 0.0), ("edm", 1.0), ("subvp", 0.01))} | {
    "random mixed": random_table(),
    "random x0": random_table("x0", seed=3),
    "random eps": random_table("eps", seed=4),
    "random v": random_table("v", seed=5),
    "rk4": RungeKutta("rk4", "angle").tableau(Grid.uniform(VPSDE(), 3)),
    "restart": restart_table(),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_law_equals_impulses(name):
    table = TABLES[name]
    factor, constant, variance = impulses(table, GAUSSIAN)
    # Rounding is that of the numbers on the way: of x_T and the largest coefficient, not of the output.
    scale = table.grid.sde.prior_std_at(float(table.grid.times[0])) * max(1.0, float(table.a.abs().max()))
    for x_T in ("prior", "exact"):
        start = marginal(TARGET, table.grid.sde, table.grid.times[0])
        if x_T == "prior":
            std = table.grid.sde.prior_std_at(float(table.grid.times[0]))
            start = Law(torch.zeros(4).double(), torch.full((4,), std**2, dtype=torch.float64))
        law = gaussian_law(table, GAUSSIAN, x_T=x_T)
        close(law.mean, factor * start.mean + constant, 1e-12 * scale)
        close(law.variances, factor**2 * start.variances + variance, 1e-12 * scale)


@pytest.mark.parametrize("name", ["ddpm vp", "euler-maruyama vp", "ddim 0.5 vp", "random mixed", "restart"])
def test_law_equals_monte_carlo(name):
    """Mean and variance of 40,000 samples, within five standard errors of each."""
    table, n = TABLES[name], 40_000
    g, denoiser = generator(1), GAUSSIAN.denoiser(table.grid.sde)
    x_T = table.grid.sde.prior((n, 4), g, torch.float64, t=float(table.grid.times[0]))
    *_, last = table.iterate(denoiser, x_T, GeneratorNoise(g))
    law = gaussian_law(table, TARGET)
    error = last.x.var(0) - law.variances
    assert bool(((last.x.mean(0) - law.mean).abs() <= 5 * (law.variances / n).sqrt() + 1e-12).all())
    assert bool((error.abs() <= 5 * law.variances * math.sqrt(2 / n) + 1e-12).all()), error / law.variances


def test_images_and_correlated_directions():
    """An image-shaped Gaussian has the law of the flat one, and one with a covariance that of its eigenvalues."""
    table = DDIM(eta=0.5).tableau(Grid.uniform(VPSDE(), 7))
    mean, std = normal(2, 3, 4), normal(2, 3, 4, seed=1).exp()
    flat = gaussian_law(table, (mean.flatten(), std.flatten() ** 2))
    for target in (Gaussian(mean, std=std), (mean, std**2)):
        close(gaussian_law(table, target).mean, flat.mean)
        close(gaussian_law(table, target).variances, flat.variances)
    basis, _ = torch.linalg.qr(normal(24, 24, seed=2))
    turned = Gaussian((basis @ mean.flatten()).reshape(2, 3, 4), cov=basis @ (std.flatten() ** 2).diag() @ basis.T)
    law = gaussian_law(table, turned)
    rank = std.flatten().argsort()
    close(law.variances, flat.variances[rank], 1e-11)
    close(law.mean.abs(), flat.mean[rank].abs(), 1e-11)  # an eigenvector's sign is its own
    truth, flat_truth = marginal(turned, VPSDE(), 0.0), marginal((mean, std**2), VPSDE(), 0.0)
    assert w2(law, truth) == pytest.approx(w2(flat, flat_truth), rel=1e-10)
    assert kl(law, truth) == pytest.approx(kl(flat, flat_truth), rel=1e-9)


def test_lists_are_read_in_float64():
    assert marginal((0.1, [1e-4, 0.3]), VPSDE(), 0.0).variances.tolist() == [1e-4, 0.3]


def test_distances():
    law, other = marginal(TARGET, VPSDE(), 0.3), Law(MEAN + 0.1, (STD + 0.2) ** 2)
    assert w2(law, law) == kl(law, law) == 0.0
    assert kl(TARGET, TARGET) == 0.0  # a direction of zero width, the same in both
    assert kl(TARGET, other) == kl(other, TARGET) == math.inf
    assert w2(TARGET, other) == pytest.approx(math.sqrt(0.1**2 + 0.2**2), rel=1e-12)
    # By the densities: KL is the mean of log p - log q over p.
    p, q = Gaussian(law.mean, std=law.variances.sqrt()), Gaussian(other.mean, std=other.variances.sqrt())
    x = p.sample(100_000, generator(0), torch.float64)
    nats = (p.log_prob(x) - q.log_prob(x)) / 4
    assert float(nats.mean()) == pytest.approx(kl(law, other), abs=5 * float(nats.std()) / math.sqrt(len(x)))


def test_nothing_is_lost_by_an_exact_sampler():
    """DDPM's two variances and DDIM are exact for the data they are made for, at any number of steps."""
    for solver, target in [(DDPM(), (MEAN, 0.0)), (DDPM("beta"), (MEAN, 1.0)), (DDIM(), (MEAN, 0.0))]:
        grid = Grid.uniform(VPSDE(), 3, end=0.2)
        law, truth = gaussian_law(solver.tableau(grid), target, x_T="exact"), marginal(target, VPSDE(), 0.2)
        assert w2(law, truth) < 1e-14
        assert kl(law, truth) < 1e-14
    assert flow_error(DDIM().tableau(grid), (MEAN, 0.0)) < 1e-14


@pytest.mark.parametrize("name", [n for n in TABLES if n.split(" vp")[0] not in STOCHASTIC and " vp" in n] + ["rk4"])
@pytest.mark.parametrize("x_T", ["prior", "exact"])
def test_flow_error_equals_the_direct_run(name, x_T):
    """The error is affine in x_T, so its mean square over any law with x_T's two moments is that over x_T."""
    table, target = TABLES[name], Gaussian(MEAN, std=STD)
    sde, t, s = table.grid.sde, table.grid.times[0], table.grid.times[-1]
    start = marginal(TARGET, sde, t) if x_T == "exact" else Law(torch.zeros(4).double(), torch.ones(4).double())
    x = start.mean + start.variances.sqrt() * torch.tensor([[-1.0], [1.0]]).double()
    solver = RungeKutta("rk4", "angle") if name == "rk4" else SOLVERS[name.removesuffix(" vp")]
    end = sample(target.denoiser(sde), x, solver, grid=table.grid).x
    direct = float((end - target.flow(x, sde, t, s)).square().mean().sqrt())
    assert flow_error(table, target, x_T=x_T) == pytest.approx(direct, rel=1e-10)


@pytest.mark.parametrize(
    ("solver", "expected", "steps"),
    [
        (DDIM(), 1, (80, 160, 320, 640)),
        (Heun(), 2, (80, 160, 320, 640)),
        (RungeKutta("kutta3"), 3, (80, 160, 320, 640)),
        (RungeKutta("rk4"), 4, (80, 160, 320, 640)),
        (DDPM(), 1, (80, 160, 320, 640)),
        (Ancestral(), 1, (80, 160, 320, 640)),
        (ReverseDiffusion(), 1, (80, 160, 320, 640)),
        (EulerMaruyama(), 1, (320, 640, 1280)),
    ],
    ids=["ddim", "heun", "kutta3", "rk4", "ddpm", "ancestral", "reverse diffusion", "euler-maruyama"],
)
@pytest.mark.parametrize("sde", ["vp", "ve", "flow"])
def test_measured_orders(solver, expected, steps, sde):
    measured = order(solver, SDES[sde], steps=steps)
    assert measured.order == pytest.approx(expected, abs=0.1), measured
    assert measured.slopes == pytest.approx([expected] * (len(steps) - 1), abs=0.15), measured
    assert measured.steps == steps


def test_a_gaussian_can_flatter():
    """The midpoint rule for x' = g x, g = u / (v + u^2), has the leading error g'' / 24 + g g' / 4 + g^3 / 6 = 0."""
    mixture = GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], std=0.3)
    assert order(RungeKutta("midpoint"), EDMSDE()).order == pytest.approx(3, abs=0.05)
    for solver, expected in [(RungeKutta("midpoint"), 2), (Heun(), 2), (DDIM(), 1), (RungeKutta("kutta3", "angle"), 3)]:
        measured = order(solver, EDMSDE(), target=mixture, start=-2.0, steps=(20, 40, 80))
        assert measured.order == pytest.approx(expected, abs=0.15), measured
    with pytest.raises(TypeError, match="stochastic"):
        order(DDPM(), EDMSDE(), target=mixture)


def test_order_on_other_grids_and_at_rounding():
    assert order(Heun("t"), VPSDE(), spacing=Grid.uniform, start=-1.0, end=2.0).order == pytest.approx(2, abs=0.05)
    whole = order(RungeKutta("rk4"), VPSDE(), start=-1.0, steps=(20, 40, 80, 5000))
    assert whole.steps == (20, 40, 80)  # the last is rounding
    with pytest.raises(ValueError, match="exact to rounding"):
        order(DDIM(), VPSDE(), target=(1.0, 0.0))


@pytest.mark.parametrize("name", ["heun sigma vp", "euler-maruyama edm", "random mixed", "restart"])
def test_amplification_equals_differences(name):
    """A perturbation of the state that enters row i is one of the noise of row i - 1, were it drawn."""
    table = TABLES[name]
    sde = table.grid.sde
    noisy = Tableau(table.grid, a=table.a, b=table.b, c=1.0, view=(table.p, table.q), t=table.t, step=table.step)
    target = Gaussian(MEAN[1:], std=STD[1:])

    def run(perturbed):
        x = torch.full((1, 3), 1.0 if perturbed == 0 else 0.0, dtype=torch.float64)
        z = [torch.full_like(x, 1.0 if perturbed == row + 1 else 0.0) for row in range(len(table))]
        *_, last = noisy.iterate(target.denoiser(sde), x, lambda row, _: z[row])
        return last.x[0]

    def std(t):
        return (sde.alpha(t) ** 2 * STD[1:] ** 2 + sde.sigma(t) ** 2).sqrt()

    base = run(None)
    factors = [(run(i) - base).abs() * std(t) / std(table.grid.times[-1]) for i, t in enumerate(table.t)]
    assert amplification(table, target) == pytest.approx(float(torch.stack(factors).max()), rel=1e-10)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_amplification_tends_to_that_of_the_flow(sde):
    """1 for the flow; the reverse SDE forgets, so its largest factor is that of the last row, at most 1."""
    grid = Grid.log_snr(sde, 400, start=start_of(sde), end=end_of(sde))
    assert amplification(RungeKutta("rk4").tableau(grid), (0.0, [0.01, 1.0])) == pytest.approx(1.0, abs=1e-3)
    assert amplification(DDPM().tableau(grid), (0.0, [0.01, 1.0])) <= 1.0
    assert amplification(DDIM().tableau(Grid.uniform(sde, 5, start=start_of(sde))), (0.0, 0.0)) == 0.0


def test_amplification_sees_an_unstable_table():
    """Euler-Maruyama multiplies by 1 - h g^2 / sigma^2 at most: unstable for long steps near the data."""
    few, many = (Grid.uniform(VPSDE(), n, end=1e-3) for n in (10, 1000))
    assert amplification(EulerMaruyama().tableau(few), (0.0, 1e-4)) > 5
    assert amplification(EulerMaruyama().tableau(many), (0.0, 1e-4)) < 1.5


def test_stable_from():
    sde, target = VPSDE(), (0.0, [1e-4, 1.0])

    def fits(solver, n):
        law = gaussian_law(solver.tableau(Grid.uniform(sde, n)), target)
        ratio = law.variances.sqrt() / torch.tensor([1e-2, 1.0])
        return bool(((ratio <= 2) & (ratio >= 0.5)).all())

    for solver in (DDIM(), DDPM(), EulerMaruyama()):
        least = stable_from(solver, sde, target, most=60, grid=lambda n: Grid.uniform(sde, n))
        known = [n for n in range(1, 61) if not fits(solver, n)]
        assert least == (None if 60 in known else max(known, default=0) + 1)
    assert stable_from(DDIM(), sde, (0.0, 1.0), most=1) is None
    chain = SDES["chain"]
    assert stable_from(DDIM(), chain, (0.0, 1.0), most=10) == stable_from(DDIM(), chain, (0.0, 1.0), most=20)


def test_the_example_runs(tmp_path):
    convergence = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "convergence.py"))
    convergence["main"](["--out", str(tmp_path), "--nfe", "4", "9"])
    rows = json.loads((tmp_path / "convergence.json").read_text())["rows"]
    assert len(rows) == len({row["name"] for row in rows}) > 10
    assert all(row["nfe"][-1] <= 9 and 0 < row["error"][-1] < math.inf for row in rows)
    assert (tmp_path / "convergence.png").stat().st_size > 10_000
    apart = convergence["_apart"]([0.0, 0.5, 0.51, 0.52, 1.0, 1.0], 0.1)
    assert apart == pytest.approx([0.0, 0.41, 0.51, 0.61, 0.9, 1.0])


def test_bad_input_gets_its_error():
    table, grid = DDIM().tableau(Grid.uniform(VPSDE(), 3)), Grid.uniform(VPSDE(), 3)
    with pytest.raises(ValueError, match="draws noise"):
        flow_error(DDPM().tableau(grid), TARGET)
    with pytest.raises(ValueError, match="expected 'prior' or 'exact'"):
        gaussian_law(table, TARGET, x_T="marginal")
    with pytest.raises(TypeError, match="GaussianMixture: expected an exact"):
        gaussian_law(table, GaussianMixture([[0.0], [1.0]], std=1.0))
    for target in [([1.0, 2.0], [1.0, 2.0, 3.0]), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf), ([], [])]:
        with pytest.raises(ValueError, match="mean"):
            gaussian_law(table, target)
    for steps in [(80,), (160, 80), (80, 80)]:
        with pytest.raises(ValueError, match="at least two increasing"):
            order(DDIM(), VPSDE(), steps=steps)
    with pytest.raises(ValueError, match=r"steps\[0\]"):
        order(DDIM(), VPSDE(), steps=(0, 80))
    with pytest.raises(ValueError, match="factor"):
        stable_from(DDIM(), VPSDE(), factor=1.0)
    with pytest.raises(ValueError, match="most"):
        stable_from(DDIM(), VPSDE(), most=0)
