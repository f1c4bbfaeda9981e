"""The harness of the benchmarks measures what it says: references, distances, budgets, bare loops, resumption."""

from __future__ import annotations

import itertools
import json
import math
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import analytic_variance
import correctors
import fashion_mnist
import likelihood
import networks
import noise
import overhead
import peers
import problems
import step_counts
import tuned_network
import users_view
from common import SDES, Nonlinear, generator, normal
from kept import Score, verdict

from scoresde import EDMSDE, VESDE, VPSDE, DDPMChain, EpsDenoiser, FlowSDE, Grid, SubVPSDE, sample
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.likelihood.interval import student_interval
from scoresde.solvers import DDIM, DDPM, DPMSolverPP, Heun, UniPC, available
from scoresde.training import averaged, load
from scoresde.tuning import TunedSolver
from scoresde.wrappers import Clip

QUICK = ["--jobs", "1", "--nfe", "5", "8", "--grids", "log-SNR", "uniform"]


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(), EDMSDE()], ids=repr)
def test_the_fine_flow_is_the_exact_one(sde):
    target = Gaussian(mean=[0.5, -1.0, 0.0], std=torch.tensor([0.05, 0.5, 2.0]))
    x = sde.prior((4, 3), generator(), torch.float64)
    end = float(sde.time_at(3.0))
    flow, error = problems.fine_flow(target.denoiser(sde), x, sde.t_max, end, rtol=1e-10)
    assert error < 1e-7
    assert problems.rms(flow - target.flow(x, sde, sde.t_max, end)) < 1e-7


def test_the_fast_mixture_is_the_exact_one():
    means = normal(5, 2, 3, seed=1)
    sde = VPSDE()
    fast, exact = problems.IsotropicMixture(means, 0.1, sde), GaussianMixture(means, std=0.1).denoiser(sde)
    x = normal(7, 2, 3)
    for t in (1e-4, 1e-2, 0.3, 1.0):
        torch.testing.assert_close(fast(x, t).mean, exact(x, t).mean, rtol=1e-9, atol=1e-9)


def test_impulses_give_the_exact_law():
    problem = problems.GaussianProblem(samples=2)
    grid = Grid.log_snr(problem.sde, 6, last=1e-3)

    def run(x, draws):
        return sample(problem.denoiser, x, DDPM(), grid=grid, noise=draws).x

    table, variance = DDPM().tableau(grid), torch.ones(64, dtype=torch.float64)
    for t, a, b, c in zip(table.t, table.a, table.b[:, 0], table.c, strict=True):
        alpha, sigma = problem.sde.alpha(t), problem.sde.sigma(t)
        gain = alpha * problem.std**2 / ((alpha * problem.std) ** 2 + sigma**2)  # D = gain x
        variance = (a + b * gain) ** 2 * variance + c**2
    expected = (variance.sqrt() - problem.std).square().mean().sqrt()
    assert problem.law_distance(run, 6) == pytest.approx(float(expected), rel=1e-9)
    assert problem.law_distance(lambda x, draws: x * problem.std, 6) < 1e-15

    def not_affine(x, draws):
        return x * problem.std * (x.norm(dim=1, keepdim=True) / 8)  # a step size of the sample's own, say

    assert problem.law_distance(not_affine, 6) < 5 * (1 / problem.draws) ** 0.5  # of the means and deviations together


@pytest.mark.parametrize("name", problems.EXACT)
def test_noise_is_independent_of_the_data_and_of_other_noise(name):
    """x_T of both races, the noise of the law race and that of the choice, their standard deviation divided out: along
    a mean each is a standard normal number, and so is, nearly, a sum of products of two over its root of squares. There
    are 1e5 at most.
    """
    problem, seen = problems.EXACT[name](), []
    vars(problem)["_to_truth"] = lambda x: 0.0

    def run(x, draws):
        seen[:] = x, draws(0, x)
        return x.square()  # not affine, or the law race of the Gaussian draws nothing

    problem.law_distance(run, 5)
    scale = problem.sde.prior_std
    parts = [problem.x / scale, seen[0] / scale, seen[1], users_view.noise_of_choice(problem) / scale]
    if isinstance(problem, problems.MixtureProblem):
        means = problem.means[problem.means.norm(dim=1) > 0]
        for part in parts:
            along = part.flatten(1) @ (means / means.norm(dim=1, keepdim=True)).T
            assert float(along.abs().max()) < 6  # 43 where x_T had the seed of the images
    for one, other in itertools.combinations(parts, 2):
        product = one[:64] * other[:64]
        assert abs(float(product.sum() / product.square().sum().sqrt())) < 6


def test_sliced_w2_of_two_laws():
    x = normal(500, 2)
    there = problems.sorted_projections(x, 8)
    turn = torch.tensor([[0.5, -0.5], [0.5, 0.5]], dtype=torch.float64) * math.sqrt(2)
    for same in (x.flip(0), x @ turn, x * torch.tensor([1.0, -1.0])):  # symmetries of the ring
        torch.testing.assert_close(problems.sorted_projections(same, 8), there, rtol=0, atol=1e-12)
    # Projections of N(0, s^2 I) are N(0, s^2): W2 is the difference of the s, and projections scale with x.
    expected = 0.1 * float(there.square().mean().sqrt())
    assert problems.rms(problems.sorted_projections(1.1 * x, 8) - there) == pytest.approx(expected, rel=1e-9)


def test_the_spacing_of_a_grid_is_found_again():
    sde = VPSDE()
    for name in problems.GRIDS:
        assert problems.spacing_of(problems.make_grid(name, sde, 7, 0.0, sde.t_min)) == name
        assert float(problems.make_grid(name, sde, 7, 1e-3, 1e-3).times[-1]) == 1e-3
        assert float(problems.make_grid(name, sde, 7, 0.0, 1e-3).times[-1]) == 0
    assert problems.spacing_of(Grid(sde, [1.0, 0.77, 0.0])) is None


def test_a_budget_buys_as_many_steps_as_fit():
    problem = problems.GaussianProblem(samples=2)
    one_of_each = {type(contestant.solver): contestant for contestant in step_counts.ours()}
    for contestant in one_of_each.values():
        if contestant.solver.adaptive:
            continue
        cell = step_counts.Cell("gaussian", "endpoint", "scoresde", contestant.name, "log-SNR", 20)
        fitted, grid = step_counts.fitted(contestant, problem, cell)
        assert fitted.evaluations(grid) <= 20, contestant
        if fitted.steps is None:
            more = problems.make_grid("log-SNR", problem.sde, grid.steps + 1, problem.end, problem.last)
            assert fitted.evaluations(more) > 20, contestant


def test_names_are_those_of_the_options():
    assert step_counts.Ours(UniPC(2, "eps"), True).name == "UniPC(order=2, view=eps)"
    assert step_counts.Ours(Heun(), True).name == "Heun()"
    names = [contestant.name for contestant in step_counts.ours()]
    assert len(names) == len(set(names))


def test_a_race_is_measured_once_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_counts, "fingerprints", lambda args: {"scoresde": "the same code"})
    argv = ["--problem", "gaussian", "--solvers", "DDIM()", "Heun()", "DDPM()", "--out", str(tmp_path), *QUICK]
    step_counts.main(argv)
    cells = tmp_path / "runs" / "cells.jsonl"
    lines = cells.read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 * 2 + 2 * 2  # what they are; two of the solvers on their own spacing besides
    cells.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:20])  # killed in the middle of a line
    step_counts.main(argv)
    again = cells.read_text().splitlines()
    assert again[: len(lines) - 2] == lines[:-2]
    assert len(again) == len(lines)  # the torn line dropped, and two cells anew
    step_counts.main(argv)
    assert cells.read_text().splitlines() == again

    record = json.loads((tmp_path / "results.json").read_text())
    found = record["problems"]["gaussian"]["endpoint"]["scores"]["scoresde"]["DDIM()"]["log-SNR"]
    problem = problems.GaussianProblem()
    for nfe, value in zip((5, 8), found, strict=True):
        x = sample(problem.denoiser, problem.x, DDIM(), grid=Grid.log_snr(problem.sde, nfe, end=1e-3)).x
        assert value == pytest.approx(problems.rms(x - problem.endpoint()[0]), rel=1e-3)
    assert set(record["environment"]) >= {"device", "dtype", "torch", "commit", "command"}
    page = (tmp_path / "README.md").read_text()
    assert "| 5 | **" in page
    assert "DDPM()" in page
    assert "DDIM()" in capsys.readouterr().out


def test_cells_of_other_code_are_measured_anew(tmp_path):
    cell = step_counts.Cell("gaussian", "endpoint", "scoresde", "DDIM()", "uniform", 5)
    store = step_counts.Store(tmp_path / "cells.jsonl", {"scoresde": "a"})
    store.write(cell, step_counts.Score(0.5, 5))
    assert store.read() == {cell: step_counts.Score(0.5, 5)}
    assert step_counts.Store(tmp_path / "cells.jsonl", {"scoresde": "b"}).read() == {}


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A module with a denoiser, data and features, as a user has them."""
    (tmp_path / "own_model.py").write_text(
        textwrap.dedent(
            """
            import torch
            from scoresde import VPSDE
            from scoresde.exact import Gaussian

            target = Gaussian(mean=[1.0, -1.0], std=0.3)

            def denoiser():
                return target.denoiser(VPSDE())

            data = target.sample(400, torch.Generator().manual_seed(0))

            def features(x):
                return torch.cat([x, x**2], 1)
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_model", None)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def test_your_own_denoiser_with_data(own_model):
    argv = ["--denoiser", "own_model:denoiser", "--shape", "2", "--data", "own_model:data", "--solvers", "DDIM()"]
    argv += ["UniPC()", "DDPM()", "--features", "own_model:features", "--samples", "100", "--batch", "50"]
    step_counts.main([*argv, "--out", "results", *QUICK])
    law = json.loads(Path("results/results.json").read_text())["problems"]["user"]["law"]
    assert 0 < law["floor"] < 0.2
    assert law["scores"]["scoresde"]["UniPC()"]["log-SNR"][1] < 10 * law["floor"]
    assert set(law["scores"]["scoresde"]) == {"DDIM()", "UniPC()", "DDPM()"}


def test_your_own_denoiser_without_data(own_model):
    argv = ["--denoiser", "own_model:denoiser", "--shape", "2", "--solvers", "DDIM()", "UniPC()", "DDPM()"]
    step_counts.main([*argv, "--out", "results", *QUICK])
    found = json.loads(Path("results/results.json").read_text())["problems"]["user"]
    assert set(found) == {"title", "endpoint"}
    assert set(found["endpoint"]["scores"]["scoresde"]) == {"DDIM()", "UniPC()"}
    assert found["endpoint"]["scores"]["scoresde"]["UniPC()"]["log-SNR"][1] < 0.05


def test_your_own_chain_with_integer_labels(own_model, capsys):
    """The race's truth is then UniPC on all nodes, which the exact flow of the float label is near."""
    Path("own_chain.py").write_text(
        textwrap.dedent(
            """
            from scoresde import DDPMChain, EpsDenoiser
            from scoresde.exact import Gaussian

            chain = DDPMChain.linear(200, 5e-4, 0.1)
            exact = Gaussian(mean=[1.0, -1.0], std=0.3).denoiser(chain)

            def net(x, n):
                return exact.eps(x, n.double() + 1)

            whole = EpsDenoiser(net, chain, time=lambda t: t.round().long() - 1)
            labelled = EpsDenoiser(net, chain, time=chain.label)
            """
        )
    )
    argv = ["--shape", "2", "--solvers", "DDIM()", "UniPC()"]
    scores = {}
    for name in ("whole", "labelled"):
        step_counts.main(["--denoiser", f"own_chain:{name}", *argv, "--out", name, *QUICK])
        scores[name] = json.loads(Path(name, "results.json").read_text())["problems"]["user"]["endpoint"]
        assert f"t = {problems.end_of(DDPMChain.linear(200, 5e-4, 0.1)):g}" in scores[name]["measure"]
    assert "in steps" in capsys.readouterr().err
    assert scores["whole"]["floor"] < 1e-4
    ours = [found["scores"]["scoresde"]["DDIM()"]["log-SNR"][1] for found in scores.values()]
    assert ours[0] == pytest.approx(ours[1], rel=0.3)
    with pytest.raises(SystemExit, match=r"took 30 evaluations.*--reference-nfe"):
        step_counts.main(["--denoiser", "own_chain:labelled", *argv, "--reference-nfe", "30", "--out", "no", *QUICK])


def test_the_end_of_the_race_is_the_same_noise_on_every_sde():
    for sde in SDES.values():
        lam = float(sde.half_log_snr(problems.end_of(sde)))
        assert abs(lam - float(VPSDE().half_log_snr(1e-3))) < (1e-6 if sde.nodes is None else 0.5)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--denoiser", "own_model:denoiser"], "needs --shape"),
        (["--data", "x.npy"], "go with --denoiser"),
    ],
    ids=["shape", "data"],
)
def test_contradictory_arguments(argv, words, capsys):
    with pytest.raises(SystemExit):
        step_counts.main(argv)
    assert words in capsys.readouterr().err


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="matches none"):
        step_counts.entered(["NoSuchSolver*"], with_peers=False)


needs_peers = pytest.mark.skipif(
    not any(peers.installed(name) for name in peers.PACKAGES), reason="no peer is installed (extra: bench)"
)


@needs_peers
def test_peers_make_the_evaluations_that_were_planned():
    problem = problems.GaussianProblem(samples=2)
    for peer in peers.peers():
        cell = step_counts.Cell("gaussian", "endpoint" if peer.deterministic else "law", "", "", "log-SNR", 5)
        _, grid = step_counts.fitted(peer, problem, cell)
        x, used = peer.run(problem.denoiser, problem.x, grid, problems.Normals(0))
        assert used == peer.evaluations(grid) <= 5, peer.name
        assert bool(x.isfinite().all()), peer.name
        assert x.dtype == problem.x.dtype


@needs_peers
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), FlowSDE()], ids=repr)
def test_peers_agree_on_any_sde(sde):
    denoiser, start = Nonlinear(sde), min(sde.t_max, float(sde.time_at(-4.0)))
    grid = Grid.log_snr(sde, 8, start=start, end=float(sde.time_at(3.0)))
    x = normal(3, 4)
    same = {"diffusers DDIM": DDIM(), "k-diffusion euler": DDIM(), "azula Euler": DDIM(), "azula Heun": Heun()}
    same |= {"diffusers Heun": Heun(), "k-diffusion heun": Heun(), "k-diffusion dpmpp_2m": DPMSolverPP(2)}
    same |= {"diffusers UniPC-3 bh2": UniPC(3), "azula xEAB2": DPMSolverPP(2, rule="exact")}
    for peer in peers.peers():
        if solver := same.get(peer.name):
            theirs, _ = peer.run(denoiser, x, grid, problems.Normals(0))
            torch.testing.assert_close(theirs, sample(denoiser, x, solver, grid=grid).x, rtol=1e-9, atol=1e-9)


def test_bare_loops_are_the_tables(monkeypatch):
    monkeypatch.setattr(overhead.Constant, "forward", lambda self, x, t: torch.tanh(x + t[:, None, None, None]))
    x = normal(2, 1, 2, 2).float()
    for method in overhead.methods(6, with_peers=False):
        here, bare = (method.runners[name].make(x)() for name in ("here", "bare"))
        torch.testing.assert_close(here, bare, rtol=1e-4, atol=1e-4, msg=method.name)


def test_no_table_stalls_a_device_and_the_counter_sees_one_that_would():
    for method in overhead.methods(4, with_peers=False):
        assert overhead.syncs(method.runners["here"], (2, 1, 2, 2)) == (0, 0), method.name

    def make(x):
        def loop():
            for _ in range(4):
                if float(x.sum()) > 0:
                    x.add_(torch.ones(x.shape).to("meta"))

        return loop

    assert overhead.syncs(overhead.Runner(make, 4), (2, 2)) == (1, 1)


def test_the_overhead_page(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "available", lambda: available()[:2])
    argv = ["--shape", "2", "1", "2", "2", "--steps", "4", "--seconds", "0", "--no-peers", "--out", str(tmp_path)]
    overhead.main(argv)
    record = json.loads((tmp_path / "results.json").read_text())
    assert set(record["microseconds"]["DDIM, fed eps"]) == {"here", "bare"}
    assert "here / bare" in (tmp_path / "README.md").read_text()


def test_the_page_of_starting_costs(tmp_path):
    argv = ["--starts", "--shape", "2", "1", "2", "2", "--seconds", "0", "--no-peers", "--out", str(tmp_path)]
    overhead.main(argv)
    record = json.loads((tmp_path / "starts.json").read_text())
    assert set(record["milliseconds"]) == {"(1, 3, 8, 8)", "(2, 1, 2, 2)"}
    assert all(
        set(row) == {"again", "first", "table", "rows"}
        for case in record["milliseconds"].values()
        for row in case.values()
    )
    assert "again / it" in (tmp_path / "starts.md").read_text()


def test_the_page_of_noise(tmp_path):
    noise.main(["--turns", "1", "--shapes", "2,3", "3,1,2,2", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "results.json").read_text())
    assert all(set(row) == set(noise.KINDS) for part in record["milliseconds"].values() for row in part.values())
    assert "counting / streams" in (tmp_path / "README.md").read_text()


def test_the_constant_network_returns_one_tensor():
    net = overhead.Constant()
    x = normal(2, 3)
    assert net(x, x) is net(x + 1, x)
    assert bool(EpsDenoiser(net, VPSDE())(x, 0.5).mean.isfinite().all())


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_the_exact_trace_is_found_by_one_probe(kind):
    sde = VPSDE()
    target = likelihood.case("gaussian", 1).target if kind == "gaussian" else GaussianMixture(normal(5, 2, 3), std=0.3)
    exact = target.denoiser(sde)
    found = likelihood.ExactTrace(target, exact)
    x, t = normal(2, *target.event_shape, seed=3), 0.2
    jacobian = torch.autograd.functional.jacobian(lambda y: exact(y, t).mean.sum(0).flatten(), x)
    trace = torch.einsum("iji->j", jacobian.reshape(x[0].numel(), 2, -1))
    mean, said = found.mean_and_trace(x, t)
    torch.testing.assert_close(mean, exact(x, t).mean)
    torch.testing.assert_close(said, trace, rtol=1e-9, atol=1e-9)
    y, v = x.clone().requires_grad_(), normal(2, *target.event_shape, seed=4).sign()
    (product,) = torch.autograd.grad((found(y, t).mean * v).sum(), y)
    torch.testing.assert_close((product * v).flatten(1).sum(1), trace, rtol=1e-9, atol=1e-9)


def test_fine_and_classical_log_densities_are_exact_but_for_the_prior_and_the_probe():
    case = likelihood.case("gaussian", 3)
    fine, own = case.fine
    # The prior's gap, in closed form: of the latent under N(0, I) and under its own law.
    sde, target = case.denoiser.sde, case.target
    x, _, t_min = likelihood.start_of(case.denoiser, case.x)
    x_T = target.flow(x, sde, t_min, sde.t_max)
    gap = sde.prior_log_prob(x_T) - target.log_prob(x_T, sde=sde, t=sde.t_max)
    assert own < 1e-7
    torch.testing.assert_close(fine - case.truth, gap, rtol=0, atol=1e-7)
    counted = problems.Counted(case.noise_free)
    found = likelihood.classical(counted, case.x, seed=0)
    assert found.nfe == counted.calls
    torch.testing.assert_close(found.value, fine, rtol=0, atol=5e-3)  # the tolerance of 1e-5, over 3 x 64 numbers


def test_calls_are_those_that_a_network_gets():
    case = likelihood.case("ring", 2)
    for options in ({"steps": 16}, {"rtol": 1e-3, "atol": 1e-3}):
        for probes in (1, 4, 0):
            counted = problems.Counted(case.denoiser)
            assert likelihood.Method("", probes, likelihood.ours, options)(counted, case.x, 0).nfe == counted.calls


def test_coverage_of_a_known_law():
    """A stand-in whose values are normal around the fine run's, with the standard error it states or half of it."""
    case = likelihood.case("ring", 8)

    def covered(stated):
        def run(denoiser, x, seed, **options):
            fine = case.fine[0].repeat(len(x) // 8)
            noise = 0.0 if isinstance(denoiser, likelihood.ExactTrace) else normal(len(x), seed=seed[0] % 1000)
            stderr = torch.full_like(fine, stated)
            interval = student_interval(fine + noise, stderr, torch.full_like(fine, math.inf))
            return likelihood.Found(fine + noise, 1, stderr, None, interval)

        return likelihood.coverage(case, likelihood.Method("", 1, run), 8, 500)

    found = covered(1.0)
    five = 5 * (0.95 * 0.05 / 4000) ** 0.5
    assert found.own == found.fine == pytest.approx(0.95, abs=five)
    assert found.plain == pytest.approx(found.own, abs=1e-3)  # 1.96 and 1.95996
    assert found.width == pytest.approx(1, abs=5 / 8000**0.5)
    assert found.ratio == pytest.approx(1, abs=5 / 8000**0.5)
    assert covered(0.5).own == pytest.approx(math.erf(0.98 / 2**0.5), abs=5 * (0.67 * 0.33 / 4000) ** 0.5)


def test_the_likelihood_page(tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "STEPS", [8, 12, 16, 20])
    monkeypatch.setattr(likelihood, "tight", lambda case: [])  # thousands of calls
    monkeypatch.setattr(likelihood, "COVERED", likelihood.COVERED[:1])
    monkeypatch.setattr(likelihood, "CANDIDATES", dict(list(likelihood.CANDIDATES.items())[:2]))
    every = likelihood.methods
    monkeypatch.setattr(likelihood, "methods", lambda *a: [m for m in every(*a) if m.name != "adaptive"])
    likelihood.main(["--problems", "ring", "--fast", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "results.json").read_text())
    assert list(record["problems"]) == ["ring"]
    rows = {(row["method"], row["probes"]): row for row in record["problems"]["ring"]}
    assert rows["classical", 1]["ratio"] == 1
    assert rows["16 steps", 0]["calls"] == 16
    for row in rows.values():
        if row["probes"] == 0:
            assert row["probe"]["max"] == 0
            assert row["total"]["max"] == pytest.approx(row["discretisation"]["max"], abs=1e-4)  # the prior's gap
    coupled = {row["method"]: row for row in record["coupling"] if row["added"] == "near the centre"}
    assert coupled["48 steps"]["change"] < 1e-9 < coupled["classical"]["change"]
    assert {row["repetitions"] for row in record["coverage"]["ring"]} == {2}
    assert set(record["environment"]) >= {"device", "dtype", "torch", "commit", "command"}
    page = (tmp_path / "README.md").read_text()
    assert "## Targets" in page
    assert "discretisation: median" in page


@pytest.fixture
def small_mixture(tmp_path, monkeypatch):
    """A user's module: an exact denoiser, whose bounds are those of a perfect network, and data of its law."""
    (tmp_path / "small_mixture.py").write_text(
        "import torch\n"
        "from scoresde import DDPMChain\n"
        "from scoresde.exact import GaussianMixture\n"
        "law = GaussianMixture(torch.tensor([[-0.5, 0.3], [0.6, -0.2], [0.1, 0.7]]), std=0.1)\n"
        "model = law.denoiser(DDPMChain.linear(100, 1e-3, 0.2))\n"
        "def draw(seed):\n"
        "    return law.sample(400, torch.Generator().manual_seed(seed))\n"
        "def training():\n"
        "    return draw(0)\n"
        "def held_out():\n"
        "    return draw(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield ["--denoiser", "small_mixture:model", "--data", "small_mixture:training", "--held-out"]
    sys.modules.pop("small_mixture", None)


def test_the_analytic_variance_page(small_mixture, tmp_path, monkeypatch):
    """With an exact network the optimal variance has the better bound at every K, by far more than its error."""
    argv = [*small_mixture, "small_mixture:held_out", "--no-clip", "--steps", "5", "25"]
    argv += ["--samples", "200", "--sets", "2", "--images", "100", "--out", str(tmp_path / "out")]
    analytic_variance.main(argv)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for K in ("5", "25"):
        best = found["bits"]["A-DDPM"][K][0]
        assert best < min(found["bits"][name][K][0] for name in ("beta~", "beta")) - 0.01
        assert found["bits"]["OT A-DDPM"][K][0] < best + 3 * found["bits"]["A-DDPM"][K][1]
    assert found["frechet"]["A-DDIM"]["5"][0] < found["frechet"]["DDIM"]["5"][0]
    assert "SN-DDPM" not in found["bits"]  # no heads without a network
    assert (tmp_path / "out" / "race.png").stat().st_size > 10_000
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| A-DDPM | beta~ | 10, 25, 50, 100, 200, 1000 | 5, 25 | none | yes |" in page
    # A second run finds every cell.
    monkeypatch.setattr(analytic_variance, "sample", None)
    monkeypatch.setattr(analytic_variance, "elbo", None)
    for name in ("draw_race", "draw_samples"):
        monkeypatch.setattr(analytic_variance, name, lambda *_: None)
    analytic_variance.main(argv)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["bits"] == found["bits"]


def test_a_quiet_last_step_is_that_of_the_optimal_variance():
    """QuietLast cuts the very step that OptimalVariance(last=) cuts, to the same noise."""
    chain = DDPMChain.linear(1000)
    grid = analytic_variance.even(chain, 10)
    cut = analytic_variance.QuietLast(DDPM("beta"), analytic_variance.LAST).tableau(grid)
    plain = DDPM("beta").tableau(grid)
    assert torch.equal(cut.c[:-2], plain.c[:-2])
    assert float(cut.c[-2]) * (2 / math.pi) ** 0.5 == pytest.approx(2 / 255)
    assert float(cut.c[-1]) == 0
    assert float(plain.c[-2]) > float(cut.c[-2])


def test_what_an_ordering_says():
    lower, higher, noisy = map(Score.of, ([1.0, 2.0, 3.0], [1.5, 2.6, 3.5], [3.0, 1.0, 2.0]))
    verdicts = [verdict(*pair) for pair in ((lower, higher), (higher, lower), (lower, noisy))]
    assert verdicts == ["yes", "no", "tie"]
    ordering = analytic_variance.Ordering("a", "b", [10, 25], {5: "no", 10: "yes", 25: "no", 50: "no", 100: "tie"})
    assert ordering.reproduced == ("in part", "as published at 10, 50; tie at 100; reversed at 25")


def test_what_the_predictor_corrector_table_says():
    """The paper's own numbers, as runs around their means, are as published wherever its table decides."""
    for published in correctors.PUBLISHED.values():
        scores = {
            correctors.key_of(cell): Score.of([mean + std * z for z in (-0.1, 0.0, 0.1)])
            for cell, (mean, std) in published.items()
        }
        found = correctors.orderings(scores, published)
        assert all(o.here == o.published for o in found if o.published != "tie")
        assert sum(o.published == "yes" for o in found) > len(found) / 2


def test_networks_are_trained_chosen_and_written(tmp_path, monkeypatch):
    """A few steps of each; the same command goes on, and what is written is what was chosen."""
    levels = torch.randint(0, 256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(networks, "fashion_mnist_levels", lambda split: (levels, None))
    small = {name: replace(n, train=replace(n.train, compile=False, batch_size=2, snapshot_every=2))
             for name, n in networks.NETWORKS.items()}  # fmt: skip
    monkeypatch.setattr(networks, "NETWORKS", small)
    words = ["--runs", str(tmp_path)]
    networks.main(["train", "EDM", *words, "--steps", "3"])
    with pytest.warns(UserWarning, match="learning rate"):
        networks.main(["train", "EDM", *words, "--steps", "4"])
    out = tmp_path / "out"
    networks.main(["choose", "EDM", *words, "--out", str(out), "--few", "4", "--many", "6", "--nfe", "2",
                   "--lengths", "0.05", "0.07"])  # fmt: skip
    found = json.loads((out / "results.json").read_text())["networks"]["EDM"]
    assert found["step"] == 4
    scores = dict(found["by length"])
    assert scores[found["length"]] == min(scores.values())
    expected = averaged(tmp_path / "EDM", found["length"]).net.state_dict()
    for name, value in load(out / "EDM").net.state_dict().items():
        torch.testing.assert_close(value, expected[name].half().float(), rtol=0, atol=0)
    assert 0 < found["moved by float16"] < 1e-2


def test_tuned_solvers_of_a_network_are_kept_and_judged(tmp_path, monkeypatch):
    """A tiny setting; the same command draws and learns nothing again, and the solvers are the network's own."""
    levels = torch.randint(0, 256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(fashion_mnist, "fashion_mnist_levels", lambda split: (levels, None))
    monkeypatch.setattr(tuned_network, "NETWORKS", ("EDM",))
    monkeypatch.setattr(fashion_mnist, "SAMPLES", 8)
    few = {"solvers": (DDIM(),), "spacings": {}, "reference_nfe": 6}
    monkeypatch.setattr(fashion_mnist, "choose", partial(fashion_mnist.choose, **few))
    monkeypatch.setattr(tuned_network, "STARTS", ())
    words = ["--out", str(tmp_path), "--nfe", "2", "--features", "2", "--noises", "16", "--work", "2", "--teacher", "6"]
    words += ["--fine", "4", "--shown", "2", "--set-size", "3", "--sets", "2"]
    tuned_network.main(words)
    page, found = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    lines = ["2, default", "2, choose", "2, tuned", "2, features", "4, fine"]
    assert {line: len(values) for line, values in found["networks"]["EDM"].items()} == dict.fromkeys(lines, 2)
    monkeypatch.setattr(tuned_network, "tune", None)
    tuned_network.main(words)
    again = json.loads((tmp_path / "results.json").read_text())
    for line in lines:
        assert again["networks"]["EDM"][line] == pytest.approx(found["networks"]["EDM"][line], rel=1e-6)
    tuned_network.main([*words, "--kept", "--sets", "3"])
    assert json.loads((tmp_path / "results.json").read_text())["networks"]["EDM"] == {}, "they have two sets"
    kept = TunedSolver.load(tmp_path / "EDM-2.json")
    kept.check_model(Clip(load(tuned_network.FOLDER / "EDM")))
    few, many = (Score.of(found["networks"]["EDM"][line]).values for line in ("2, tuned", "2, default"))
    assert f"| 2, tuned | 2, default | {float((few - many).mean()):+.2f} |" in page


@pytest.mark.parametrize("spacing", sorted({spacing for _, spacing in peers.USUAL}))
@pytest.mark.parametrize("sde", [VPSDE(), DDPMChain()], ids=["vp", "chain"])
def test_usual_grids_of_peers(spacing, sde):
    """As many steps as asked for, to the end asked for; of DDIM's "leading" from below t_max."""
    first = users_view.FIRST["chain" if sde.nodes is not None else "VP"]
    for steps in (2, 5, 25, 100):
        for end in (0.0, first):
            grid = peers.usual_grid(spacing, sde, steps, end, first)
            assert grid.steps == steps or (spacing == "leading" and end == first and grid.steps == steps - 1)
            assert float(grid.times[-1]) == pytest.approx(end)
            assert float(grid.times[0]) == pytest.approx(sde.t_max) or spacing == "leading"


def test_the_users_view_takes_what_a_user_gets():
    problem = users_view.problem_at("gaussian", "chain", 0.0)
    solver = users_view.solver_at(8)
    theirs = sample(problem.denoiser, problem.x, solver, nfe=8)
    assert theirs.grid.steps == 8
    assert problems.rms(theirs.x - problem.endpoint()[0]) < 0.01  # measured 6.5e-3; of the best peer 3.8e-2


def test_the_users_view_chooses_on_other_noise(tmp_path, monkeypatch):
    """For each place, here one of each process and end; nearer than the default on the noise of the race too, in the
    mean over the places."""
    places = users_view.places()
    monkeypatch.setattr(users_view, "places", lambda: [places[0], places[-1]])
    store = users_view.Store(tmp_path / "cells.jsonl", dict.fromkeys([users_view.HERE, *peers.PACKAGES], "this"))
    found = users_view.race(store, ["gaussian"], [5])
    at = {(cell.problem, cell.solver): score.value for cell, score in found.items() if cell.package == users_view.HERE}
    wheres = [f"gaussian, {users_view.title(*place)}" for place in users_view.places()]
    assert users_view.mean([at[where, "chosen"] / at[where, ""] for where in wheres]) < 0.5  # measured 0.2
    assert users_view.race(store, ["gaussian"], [5]) == found  # kept
