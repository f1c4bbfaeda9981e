"""A solver whose table was learned: never worse than its start, exact where it can be, and good for its own steps,
budget and model alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from common import normal

from scoresde import EDMSDE, VPSDE, DDPMChain, EpsDenoiser, Grid, sample
from scoresde.cli import main
from scoresde.errors import CheckpointError
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.guidance import ClassifierFree
from scoresde.likelihood import log_prob
from scoresde.solvers import DDIM, DDPM, AdaptiveODE, Heun, RawEps, UniPC
from scoresde.tableau import responses
from scoresde.tuning import Corrections, TunedSolver, tune
from scoresde.tuning.chosen import excess, ratio
from scoresde.tuning.learning import Clock, Columns, Numbers, Pairs, learn

SDE = VPSDE()
STD = torch.tensor([0.05, 0.2, 0.5, 1.0], dtype=torch.float64)
GAUSSIAN = Gaussian(torch.zeros(4, dtype=torch.float64), std=STD).denoiser(SDE)
MODES = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
MIXTURE = GaussianMixture(MODES, std=0.2).denoiser(SDE)
FEW = {"starts": 1, "rounds": 6, "reference_nfe": 40}


def noise(n, d=4, seed=0):
    return SDE.prior((n, d), torch.Generator().manual_seed(seed), torch.float64)


def pairs(denoiser, x, truth, **options):
    given = {"features": lambda x: x, "cond": {}, "batch": 64, "clock": Clock(5), **options}
    return Pairs(denoiser, x, truth, **given)


def shaken(solver, grid, size=0.02, seed=3):
    """Numbers near those of a solver: labels, a and b moved at random."""
    start = Numbers.of(solver, grid)
    R = len(start.l)
    P = len(start.w) + 2 * R + R * (R + 1) // 2
    return start.moved(size * torch.randn(P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@pytest.fixture(scope="module")
def tuned():
    return tune(MIXTURE, [UniPC(2), DDIM()], noise(64, 2), nfe=4, end=1e-3, **FEW)


# --- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [DDIM(), UniPC(2, "v"), Heun()], ids=repr)
def test_numbers_at_zero_are_the_solver_and_their_run_is_the_tables(solver):
    grid = Grid.power(SDE, 3)
    x = noise(5)
    numbers = Numbers.of(solver, grid)
    assert torch.equal(numbers.times, grid.times)
    assert numbers.corrections() is None
    moved = shaken(solver, grid)
    kept = TunedSolver(solver, tuple(moved.times.tolist()), SDE, 3, corrections=moved.corrections())
    for found, other in ((numbers, solver), (moved, kept)):
        table = other.tableau(Grid(SDE, found.times))
        end = pairs(GAUSSIAN, x, x).run(found.columns(), table.evaluates.tolist()).x[-1]
        *_, last = table.iterate(GAUSSIAN, x)
        torch.testing.assert_close(end, last.x, rtol=1e-12, atol=1e-12)


def test_derivatives_are_the_exact_ones_of_gaussian_data():
    """There a run is linear, and the weights of each state and F in its end are the responses of the table. By the
    labels and times: against central differences of the whole run.
    """
    numbers, x = shaken(UniPC(2, "eps"), Grid.power(SDE, 4, end=1e-3)), noise(3)
    model = pairs(GAUSSIAN, x, torch.zeros_like(x))
    J, r = model.jacobian(numbers)
    N, R = len(numbers.w), len(numbers.l)
    tuned = TunedSolver(numbers.solver, tuple(numbers.times.tolist()), SDE, R, corrections=numbers.corrections())
    table = tuned.tableau(Grid(SDE, tuned.times))
    run = model.run(Columns.of(table), [True] * R)
    torch.testing.assert_close(run.x[-1], r)
    unit = torch.ones(1, 4, dtype=torch.float64)
    f = torch.stack([table.p[i] * unit[0] + table.q[i] * _slope(float(table.t[i])) for i in range(R)])
    xi = responses(table, f)[0]
    by_a = torch.stack([xi[i + 1] * run.x[i] for i in range(R)])
    by_b = torch.stack([xi[i + 1] * run.F[j] for i in range(R) for j in range(i, -1, -1)])
    torch.testing.assert_close(J[N + R : N + 2 * R], by_a, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(J[N + 2 * R :], by_b, rtol=1e-5, atol=1e-7)
    for k in range(N + R):
        dv = torch.zeros(len(J), dtype=torch.float64)
        dv[k] = 1e-5
        ends = [model.run(moved.columns(), [True] * R).x[-1] for moved in (numbers.moved(dv), numbers.moved(-dv))]
        torch.testing.assert_close(J[k], (ends[0] - ends[1]) / 2e-5, rtol=1e-3, atol=1e-6)


def _slope(t):
    """dD/dx of the Gaussian."""
    alpha, sigma = float(SDE.alpha(t)), float(SDE.sigma(t))
    return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)


def test_times_decrease_whatever_is_learned():
    grid = Grid.power(SDE, 6, end=1e-3)
    start = Numbers.of(DDIM(), grid)
    for seed in range(20):
        dv = torch.zeros(6 + 6 + 6 + 21, dtype=torch.float64)
        dv[:6] = 4 * torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        times = start.moved(dv).times
        assert bool((times.diff() < 0).all())
        assert times[0] == grid.times[0]
        assert times[-1] == grid.times[-1]


def test_labels_stay_within_the_process():
    up = torch.zeros(4 + 4 + 4 + 10, dtype=torch.float64)
    up[4:8] = 9.0
    assert float(Numbers.of(DDIM(), Grid.power(SDE, 4)).moved(up).columns().t.max()) <= SDE.t_limit


def test_a_gaussian_is_learned_beyond_its_start():
    """Four numbers a dimension of a linear map, and some twenty to learn: two orders."""
    found = tune(GAUSSIAN, DDIM(), noise(32), nfe=5, end=1e-3, starts=1, rounds=20, reference_nfe=100)
    assert found.error < 0.01 * found.default


def test_a_mixture_is_learned_beyond_its_start(tuned):
    """On noise that neither trained nor chose; 256 samples tell a ratio of 1/2 from 1 by far."""
    assert tuned.error < 0.5 * tuned.default
    assert tuned.corrections is not None
    x = noise(256, 2, seed=9)
    fine = sample(MIXTURE, x, UniPC(3), grid=Grid.sampling(SDE, 100, power=4, end=1e-3)).x
    errors = {}
    for corrections in (tuned.corrections, None):
        one = TunedSolver(tuned.solver, tuned.times, SDE, 4, corrections=corrections)
        errors[corrections is None] = float((sample(MIXTURE, x, one, nfe=4).x - fine).square().mean())
    assert errors[False] < 0.7 * errors[True]


def test_samples_lost_to_another_mode_do_not_hide_what_is_gained():
    """Far modes in 16 dimensions, four evaluations: of the start and of the result up to one sample in ten ends in
    another mode, which is most of the plain mean square of both. The median gains by far: a factor of 16 was seen.
    """
    modes = torch.randn(6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    far = GaussianMixture(modes, std=0.1).denoiser(SDE)
    found = tune(far, UniPC(2), noise(256, 16), nfe=4, end=1e-3, **FEW)
    assert found.corrections is not None
    x = noise(512, 16, seed=9)
    fine = sample(far, x, UniPC(3), grid=Grid.sampling(SDE, 60, power=4, end=1e-3)).x
    bare = TunedSolver(found.solver, tuple(UniPC(2).within(SDE, 4)[1].times.tolist()), SDE, 4)
    mine, theirs = ((sample(far, x, one, nfe=4).x - fine).square().mean(1) for one in (found, bare))
    for squares in (mine, theirs):
        lost = squares[squares > 0.1]
        assert 0.01 < len(lost) / len(squares) < 0.15
        assert float(lost.sum()) > 0.5 * float(squares.sum())
    assert float(mine.median()) < 0.2 * float(theirs.median())


def test_one_lost_sample_proves_nothing_and_a_cap_of_the_start_hides_nothing():
    """Of k samples lost in one of two alone the excess is sqrt(k) standard errors, exactly sqrt(k (n - 1) / (n - k));
    and what comes a thousand times nearer is nearer, to the ratio of the rest, where both lose as many.
    """
    n, square = 64, torch.full((64,), 1e-8, dtype=torch.float64)
    for k in (1, 2, 9):
        worse = square.clone()
        worse[:k] += 0.5
        assert excess(worse, square) == pytest.approx(math.sqrt(k * (n - 1) / (n - k)))
        assert excess(square, worse) < 0
    far, near = square * 1e6, square.clone()
    far[0] = near[1] = 0.5
    assert ratio(near, far) == pytest.approx((63 + 1000) / 64 / 1000, rel=0.01)  # all of far's are beyond the cap, 1e-5
    assert ratio(far * math.nan, near) == math.inf


def test_the_same_seed_learns_the_same():
    first, second = (tune(MIXTURE, DDIM(), (16, 2), nfe=3, seed=5, **FEW) for _ in range(2))
    assert first == second


def test_in_features_the_distance_is_theirs():
    """Of the first coordinate alone the second may be anything: its error is the feature's."""
    seen = []

    def features(x):
        seen.append(x.shape)
        return x[:, :1]

    found = tune(GAUSSIAN, DDIM(), noise(16), nfe=3, end=1e-3, features=features, **FEW)
    assert seen
    grid = Grid(SDE, found.times)
    x = noise(16)[12:]
    fine = tune.__globals__["Trial"](GAUSSIAN, noise(16), 3, 1e-3, 0, None, 40, False).truth[12:]
    off = (sample(GAUSSIAN, x, found, grid=grid).x - fine)[:, :1]
    assert found.error == pytest.approx(float(off.square().mean().sqrt()), rel=1e-6)


def test_a_network_that_knows_whole_steps_keeps_its_times_and_labels():
    """A chain's labels are whole numbers: coefficients alone are learned."""
    chain = DDPMChain()
    exact = Gaussian(torch.zeros(2), std=0.3).denoiser(chain)

    def net(x, label):
        assert not label.is_floating_point()
        return exact.eps(x, (label + 1).double())

    found = tune(EpsDenoiser(net, chain, time=lambda t: t.round().long() - 1), DDIM(), (16, 2), nfe=3, **FEW)
    assert set(found.times) <= {0.0, *chain.nodes.tolist()}
    assert found.corrections is None or found.corrections.t == found.times[:-1]


# --- never worse -----------------------------------------------------------------------------------------------------


def test_bad_training_gives_the_start_and_says_so(monkeypatch):
    """Training that returns nonsense, and says that it is perfect."""

    def bad(numbers, train, held, rounds, told):
        dv = torch.full((train.jacobian(numbers)[0].shape[0],), 0.3, dtype=torch.float64)
        return numbers.moved(dv), torch.zeros(len(held.x), dtype=torch.float64)

    monkeypatch.setattr("scoresde.tuning.tuned.learn", bad)
    found = tune(MIXTURE, DDIM(), noise(32, 2), nfe=4, **FEW)
    assert found.corrections is None
    assert found.error == found.default
    assert "nothing better was found" in found.story


def test_training_keeps_what_was_best_of_what_did_not_train():
    """Truths that are noise, for training alone: what fits them is further off on the others."""
    x = noise(24, 2)
    truth = sample(MIXTURE, x, UniPC(3), grid=Grid.sampling(SDE, 60, power=4, end=1e-3)).x
    start = Numbers.of(UniPC(2), Grid.power(SDE, 4, end=1e-3))
    held = pairs(MIXTURE, x, truth)
    best, squares = learn(start, pairs(MIXTURE, x, truth + normal(24, 2)), held, 6, lambda squares: None)
    assert ratio(squares, held.squares(start)) <= 1
    assert torch.equal(held.squares(best), squares)


def test_no_time_gives_the_start(monkeypatch):
    """None at all, and none after the first look."""
    looks = iter([None] * 3)

    def check(self):
        if next(looks, "over") is not None:
            raise TimeoutError

    with monkeypatch.context() as few:
        few.setattr(Clock, "check", check)
        found = tune(MIXTURE, DDIM(), noise(16, 2), nfe=3, **FEW)
        assert found.corrections is None
    found = tune(MIXTURE, DDIM(), noise(16, 2), nfe=3, minutes=1e-9, **FEW)
    assert found.corrections is None
    assert found.error == found.default


def test_it_begins_where_another_has_ended(tuned):
    again = tune(MIXTURE, tuned, noise(64, 2), nfe=4, end=1e-3, **FEW)
    assert again.default == pytest.approx(tuned.error, rel=1e-6)  # the same noise
    assert again.error <= again.default
    with pytest.raises(ValueError, match="was made for 4"):
        tune(MIXTURE, tuned, noise(16, 2), nfe=5, end=1e-3)
    with pytest.raises(ValueError, match="steps of its own"):
        tune(MIXTURE, tuned, noise(16, 2), nfe=4)


# --- what it is good for ---------------------------------------------------------------------------------------------


def test_a_file_holds_it(tuned, tmp_path):
    path = tmp_path / "four.json"
    tuned.save(path)
    found = TunedSolver.load(path)
    assert found == tuned
    x = noise(3, 2)
    assert torch.equal(sample(MIXTURE, x, found, nfe=4).x, sample(MIXTURE, x, tuned, nfe=4).x)
    text = path.read_text()
    assert json.loads(text)["format"] == "scoresde tuned solver 2"
    for damaged in (text.replace('"a": [', '"a": [1.0, ', 1), text.replace('solver 2"', 'solver 1"')):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            TunedSolver.load(path)


def test_a_file_without_corrections_is_as_it_was(tmp_path):
    path = tmp_path / "four.json"
    plain = TunedSolver(DDIM(), (1.0, 0.5, 0.0), SDE, 2)
    plain.save(path)
    assert json.loads(path.read_text())["format"] == "scoresde tuned solver 1"
    assert "corrections" not in json.loads(path.read_text())
    assert TunedSolver.load(path) == plain


@pytest.mark.parametrize(
    "wrong", [{"a": (0.0,)}, {"b": ((0.0, 0.0),)}, {"t": (math.nan, 0.5)}, {"a": ("x", 0.0)}], ids=repr
)
def test_corrections_that_are_none_are_refused(wrong):
    good = Corrections((1.0, 0.5), (0.0, 0.0), ((0.0, 0.0), (0.0, 0.0)))
    assert good.checked() == good
    with pytest.raises((ValueError, TypeError)):
        good._replace(**wrong).checked()


def test_corrections_are_of_one_table():
    good = Corrections((1.0, 0.5), (0.0, 0.0), ((0.0, 0.0), (0.0, 0.0)))
    with pytest.raises(ValueError, match="2 rows to a table of 3"):
        good.onto(DDIM().tableau(Grid.uniform(SDE, 3)))


def test_it_takes_its_own_steps_budget_process_and_model(tuned):
    for wrong in (
        {"nfe": 5},
        {"steps": 5},
        {"grid": Grid.uniform(SDE, 4)},
        {"grid": Grid(SDE, tuned.times).reversed()},
    ):
        with pytest.raises(ValueError, match="TunedSolver"):
            sample(MIXTURE, noise(2, 2), tuned, **wrong)
    with pytest.raises(ValueError, match="was made for VPSDE"):
        sample(GaussianMixture(MODES, std=0.2).denoiser(EDMSDE()), (2, 2), tuned, nfe=4, seed=0)
    tuned.check_model(MIXTURE)
    with pytest.raises(ValueError, match="was made for the model"):
        tuned.check_model(GAUSSIAN)


def test_it_has_a_density_where_it_ends_with_noise():
    """Of its samples, by its own method on the volume: that of Gaussian data is known. The learned table is exact to
    1e-3 of the state there, and its density to 0.1 nats of four dimensions.
    """
    end = SDE.t_min
    found = tune(GAUSSIAN, UniPC(3, "v", variable="half_log_snr"), noise(32), nfe=8, end=end, **{**FEW, "rounds": 2})
    solution = sample(GAUSSIAN, noise(6, seed=2), found, nfe=8, log_prob="exact")
    std = (float(SDE.alpha(end)) ** 2 * STD**2 + float(SDE.sigma(end)) ** 2).sqrt()
    exact = torch.distributions.Normal(0.0, std).log_prob(solution.x).sum(1)
    torch.testing.assert_close(solution.log_prob, exact, rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="TunedSolver"):
        log_prob(GAUSSIAN, noise(2), solver=found, steps=10)


def test_a_method_of_single_steps_refuses_it_by_name(tuned):
    grid = Grid(SDE, tuned.times)
    with pytest.raises(ValueError, match="TunedSolver"):
        sample(MIXTURE, noise(2, 2), RawEps(tuned), grid=grid)


def test_it_is_made_for_a_guided_model():
    def net(x, t, label=None):
        told = torch.zeros_like(x) if label is None else label[:, None] * torch.ones_like(x)
        return x - told * SDE.alpha(t.double())[:, None].to(x.dtype)

    guided = ClassifierFree(EpsDenoiser(net, SDE), 2.0, null=("label",))
    cond = {"label": torch.arange(16).float() / 16}
    found = tune(guided, DDIM(), (16, 2), nfe=3, cond=cond, **FEW)
    assert found.error <= found.default
    assert sample(guided, (16, 2), found, nfe=3, cond=cond, seed=0).nfe == 3
    found.check_model(guided)
    with pytest.raises(ValueError, match="was made for the model"):
        found.check_model(ClassifierFree(EpsDenoiser(net, SDE), 3.0, null=("label",)))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"solver": DDPM()}, "draws noise"),
        ({"solver": AdaptiveODE()}, "no table"),
        ({"solver": "ddim"}, "solver must be"),
        ({"shape_or_x": (15, 2)}, "16 or more"),
        ({"end": 2.0}, "expected 0 <= end < 1.0"),
        ({"minutes": 0.0}, "minutes"),
        ({"nfe": 0}, "nfe"),
    ],
)
def test_what_cannot_be_tuned_is_refused(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        tune(MIXTURE, **{"solver": DDIM(), "shape_or_x": (16, 2), "nfe": 3, **wrong})


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_writes_what_sample_takes(tmp_path, capsys):
    run, file = tmp_path / "moons", tmp_path / "three.json"
    made = ["--data", "two-moons:200", "--batch-size", "8", "--device", "cpu", "--quiet", "--steps", "3"]
    assert main(["train", *made, "--set", "model.options={width = 16, depth = 1}", "--out", str(run)]) == 0
    words = ["tune", str(run), "--nfe", "3", "--n", "16", "--solver", "ddim", "--quiet", "--device", "cpu"]
    assert main([*words, "--minutes", "0.05", "--out", str(file)]) == 0
    assert "from the model's fine solution" in capsys.readouterr().out
    assert TunedSolver.load(file).nfe == 3
    out = ["--n", "4", "--out", str(tmp_path / "s.npz"), "--device", "cpu"]
    assert main(["sample", str(run), "--solver", str(file), *out]) == 0
    assert "TunedSolver(" in capsys.readouterr().out
    assert main([*words, "--minutes", "0", "--out", str(file)]) == 2
    assert "--minutes" in capsys.readouterr().err
