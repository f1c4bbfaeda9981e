"""sample(): finite everywhere, its NFE, seeds, parameterisations, budgets, failures."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from common import SDES, SOLVERS, STOCHASTIC, Counting, Nonlinear, every_pair, generator, network_for, normal, start_of

import scoresde
from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    Clip,
    DDPMChain,
    Denoiser,
    EDMDenoiser,
    EpsDenoiser,
    FlowSDE,
    Grid,
    NonFiniteError,
    Posterior,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
    sample,
    sample_seeds,
)
from scoresde.editing import decode, edit, encode, interpolation, sdedit, variations
from scoresde.exact import Empirical, Gaussian, GaussianMixture
from scoresde.guidance import DDNM, DPS, MomentMatching, PiGDM, Product, RePaint, Replacement
from scoresde.guidance.operators import Mask
from scoresde.likelihood import elbo, log_prob
from scoresde.noise import SeededNoise
from scoresde.solvers import DDIM, DDPM, Euler, EulerMaruyama, Heun
from scoresde.solvers.langevin import langevin
from scoresde.variance import estimate

MIXTURE = GaussianMixture(means=[[1.0, -1.0, 0.5], [-2.0, 0.0, 1.0]], weights=[0.3, 0.7], std=0.2)


@every_pair(name=list(SOLVERS), sde=SDES, steps=[1, 2, 3, 4, 5, 7, 8, 13, 20, 97], end=["data", "t_min"])
def test_finite_and_counted_at_any_number_of_steps(name, sde, steps, end):
    """On the data and at t_min; the NFE is what a counting denoiser saw, at times of the grid, within the budget."""
    start = start_of(sde) if name == "euler-maruyama" else None
    grid = Grid.uniform(sde, steps, start=start, end={"data": 0.0, "t_min": sde.t_min}[end])
    counting = Counting(MIXTURE.denoiser(sde))
    solution = sample(counting, (2, 3), SOLVERS[name], grid=grid, seed=0)
    assert bool(solution.x.isfinite().all())
    assert solution.nfe == len(counting.times) == SOLVERS[name].tableau(grid).nfe
    assert set(counting.times) <= set(grid.times.tolist())
    stages = 2 if name.startswith("heun") else 1
    assert solution.nfe in (stages * steps, stages * steps - 1, stages * steps - 2)


@pytest.mark.parametrize("name", SOLVERS)
def test_as_many_steps_as_the_chain_has_nodes(name):
    chain = DDPMChain.linear(50, 1e-3, 0.2)
    solution = sample(MIXTURE.denoiser(chain), (2, 3), SOLVERS[name], steps=50, seed=0)
    assert bool(solution.x.isfinite().all())
    assert solution.grid.times.tolist() == list(range(50, -1, -1))


@every_pair(name=list(SOLVERS), sde=SDES, nfe=[1, 2, 3, 6, 9, 10])
def test_a_budget_is_kept_and_used(name, sde, nfe):
    counting = Counting(MIXTURE.denoiser(sde))
    solution = sample(counting, (1, 3), SOLVERS[name], nfe=nfe, seed=0)
    assert solution.nfe == len(counting.times) <= nfe
    more = SOLVERS[name].tableau(SOLVERS[name].grid(sde, solution.grid.steps + 1)).nfe
    assert more > nfe


# One model, however it is written.


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), EDMSDE(), FlowSDE(t_max=0.99), DDPMChain()], ids=repr)
def test_same_samples_in_every_parameterisation(name, sde):
    exact = MIXTURE.denoiser(sde)
    x = normal(4, 3) * sde.prior_std
    expected = sample(exact, x, SOLVERS[name], steps=9, seed=5).x
    for adapter, view in (
        (X0Denoiser, "x0"),
        (EpsDenoiser, "eps"),
        (ScoreDenoiser, "score"),
        (VDenoiser, "v"),
        (VelocityDenoiser, "velocity"),
    ):
        solution = sample(adapter(network_for(exact, view), sde), x, SOLVERS[name], steps=9, seed=5)
        torch.testing.assert_close(solution.x, expected, rtol=1e-8, atol=1e-8, msg=view)
    scale = float(sde.sigma(sde.t_max)) / float(sde.alpha(sde.t_max))

    def preconditioned(y, label):
        t = sde.time_at(-4 * label)
        s = (4 * label).exp()[:, None]
        total = (s**2 + 0.25).sqrt()
        D = exact(y * total * sde.alpha(t)[:, None], t.clamp(max=sde.t_max)).mean
        return (D - 0.25 / total**2 * y * total) / (0.5 * s / total)

    solution = sample(EDMDenoiser(preconditioned, sde), x, SOLVERS[name], steps=9, seed=5)
    torch.testing.assert_close(solution.x, expected, rtol=1e-7 * max(1, scale), atol=1e-7 * max(1, scale))


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_agrees_with_float64(name):
    """Coefficients are float64 whatever the state: 400 steps in float32 cost no more than rounding."""
    sde = VPSDE()
    x = normal(4, 3)
    noise = [normal(4, 3, seed=1 + i) for i in range(801)]
    grid = Grid.quadratic(sde, 400)
    wide = sample(MIXTURE.denoiser(sde), x, SOLVERS[name], grid=grid, noise=lambda i, x: noise[i].clone()).x
    narrow = sample(MIXTURE.denoiser(sde), x.float(), SOLVERS[name], grid=grid, noise=lambda i, x: noise[i].float()).x
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=2e-4)


# Seeds.


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_sample_i_is_the_same_in_any_batch(name):
    denoiser = Nonlinear(VPSDE())
    batch = sample(denoiser, (5, 2, 3), SOLVERS[name], steps=6, seed=11).x
    larger = sample(denoiser, (9, 2, 3), SOLVERS[name], steps=6, seed=11).x
    assert torch.equal(batch, larger[:5])
    for i, s in enumerate(sample_seeds(11, 5)):
        alone = sample(denoiser, (1, 2, 3), SOLVERS[name], steps=6, seed=[s]).x
        assert torch.equal(alone[0], batch[i])
    backwards = sample(denoiser, (5, 2, 3), SOLVERS[name], steps=6, seed=sample_seeds(11, 5)[::-1]).x
    assert torch.equal(backwards.flip(0), batch)


def test_events_larger_than_a_block_of_noise():
    denoiser = Nonlinear(VPSDE())
    a = sample(denoiser, (2, 20_000), DDPM(), steps=3, seed=1).x
    b = sample(denoiser, (3, 20_000), DDPM(), steps=3, seed=1).x
    assert torch.equal(a, b[:2])


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_seeds_differ_and_rows_differ(name):
    """Other seeds give other samples, and no two rows of a long run share their noise."""
    denoiser = Nonlinear(VPSDE())
    x = torch.zeros(1, 1)
    samples = torch.cat([sample(denoiser, x, SOLVERS[name], steps=4, seed=s).x for s in range(20)])
    assert len(samples.unique()) == 20
    noise = SeededNoise([3], torch.device("cpu"))
    drawn = torch.cat([noise(i, torch.zeros(1, 5000)).flatten() for i in range(10)])
    assert len(drawn.unique()) > 0.99 * 50_000  # float32 normals repeat now and then


def test_the_noise_of_a_seed_is_not_its_prior():
    """x_T drawn with a seed, passed back with the same seed, must not meet itself as noise."""
    seen = []

    class Spy(Denoiser):
        sde = VPSDE()

        def posterior(self, x, t, **cond):
            seen.append(x.clone())
            return Posterior(torch.zeros_like(x))

    first = sample(Spy(), (1, 1000), DDPM(), grid=Grid.uniform(VPSDE(), 2), seed=4)
    x_T = seen[0]
    seen.clear()
    table = DDPM().tableau(first.grid)
    sample(Spy(), x_T, DDPM(), grid=first.grid, seed=4)
    z = (seen[1] - table.a[0] * x_T) / table.c[0]
    correlation = float((z * x_T).mean())
    assert abs(correlation) < 6 / math.sqrt(1000)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_the_global_generator_is_not_touched(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for arguments in ({"seed": 0}, {"seed": [1, 2]}, {"generator": generator()}, {}):
        sample(Nonlinear(VPSDE()), (2, 3), SOLVERS[name], steps=3, **arguments)
    assert torch.equal(torch.get_rng_state(), before)


def test_whole_numbers_of_any_kind():
    """numpy's integers and a tensor of seeds are what they say."""
    denoiser = Nonlinear(VPSDE())
    a = sample(denoiser, (2, 3), DDPM(), steps=3, seed=7).x
    b = sample(denoiser, (np.int64(2), 3), DDPM(), steps=np.int32(3), seed=np.int64(7)).x
    c = sample(denoiser, (2, 3), DDPM(), nfe=np.int64(3), seed=torch.tensor(sample_seeds(7, 2))).x
    d = sample(denoiser, (2, 3), DDPM(), steps=3, seed=torch.tensor(7)).x
    assert torch.equal(a, b)
    assert torch.equal(a, c)
    assert torch.equal(a, d)


def test_a_generator_reproduces_and_no_seed_does_not():
    denoiser = Nonlinear(VPSDE())
    a, b = (sample(denoiser, (2, 3), DDPM(), steps=3, generator=generator(5)).x for _ in range(2))
    assert torch.equal(a, b)
    c, d = (sample(denoiser, (2, 3), DDPM(), steps=3).x for _ in range(2))
    assert not torch.equal(c, d)


def test_one_solver_object_in_two_threads():
    """Solvers hold no state: the same object, at once, on other batches and shapes."""
    solver = Heun()

    def job(k):
        return sample(Nonlinear(EDMSDE()), (1 + k % 3, 2 + k), solver, steps=4 + k % 5, seed=k).x

    expected = [job(k) for k in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(job, range(12)), expected, strict=True))


# Start, trajectory, gradients.


@pytest.mark.parametrize("sde", [VESDE(), EDMSDE(), VPSDE()], ids=repr)
def test_a_grid_that_starts_late_draws_the_prior_of_its_start(sde):
    """On VE and EDM the prior's width is sigma at the grid's own start. 20,000 numbers: standard error 0.5 %."""
    start = float(sde.time_at(-2.0))
    with pytest.warns(UserWarning, match="x_T is a guess"):  # u = e^2, of which data of scale 1 are 0.14
        drawn = sample(Nonlinear(sde), (200, 100), DDIM(), grid=Grid(sde, [start, 0.0]), seed=0, trajectory=True)
    assert float(drawn.trajectory[0].std()) == pytest.approx(sde.prior_std_at(start), rel=6 * 0.005)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_the_trajectory_stands_on_the_grid(name):
    """States at all grid times: the first is x_T, the last the sample, and each what a grid cut there ends on."""
    denoiser, x = Nonlinear(VPSDE()), normal(2, 3)
    grid = Grid.uniform(VPSDE(), 5, end=0.05)
    noise = [normal(2, 3, seed=1 + i) for i in range(10)]
    run = {"noise": lambda row, x: noise[row].clone()}
    solution = sample(denoiser, x, SOLVERS[name], grid=grid, trajectory=True, **run)
    assert len(solution.trajectory) == len(grid)
    assert torch.equal(solution.trajectory[0], x)
    assert torch.equal(solution.trajectory[-1], solution.x)
    for i in range(1, 5):
        cut = sample(denoiser, x, SOLVERS[name], grid=Grid(VPSDE(), grid.times[: i + 1]), **run).x
        torch.testing.assert_close(solution.trajectory[i], cut)


@pytest.mark.parametrize("name", ["ddim", "heun sigma", "heun t", "ddpm", "euler-maruyama"])
def test_differentiable_when_asked(name):
    """Gradients with respect to x_T, a condition and the network's parameter equal finite differences."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    denoiser = X0Denoiser(lambda x, t, shift: torch.tanh(weight * x + shift), VPSDE())
    noise = [normal(2, 3, seed=1 + i) for i in range(10)]

    def run(x, shift):
        return sample(
            denoiser,
            x,
            SOLVERS[name],
            steps=3,
            noise=lambda row, x: noise[row].clone(),
            cond={"shift": shift},
            differentiable=True,
        ).x

    x = normal(2, 3).requires_grad_()
    shift = normal(2, 3, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, shift))
    run(x, shift).sum().backward()
    gradient, h = float(weight.grad), 1e-6
    with torch.no_grad():
        weight += h
        up = float(run(x, shift).sum())
        weight -= 2 * h
        down = float(run(x, shift).sum())
    assert gradient == pytest.approx((up - down) / (2 * h), rel=1e-5)


def test_no_graph_unless_asked():
    x = normal(2, 3).requires_grad_()
    assert not sample(Nonlinear(VPSDE()), x, DDIM(), steps=3).x.requires_grad
    with torch.no_grad():
        assert sample(Nonlinear(VPSDE()), x, DDIM(), steps=3, differentiable=True).x.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_samples_have_the_dtype_of_x(dtype):
    """A half-precision x_T is solved in float32 and rounded once, at the end."""
    x = normal(2, 3).to(dtype)
    solution = sample(Nonlinear(VPSDE()), x, Heun(), steps=20, trajectory=True)
    assert solution.x.dtype == solution.trajectory.dtype == dtype
    exact = sample(Nonlinear(VPSDE()), x.double(), Heun(), steps=20).x
    assert float((solution.x.double() - exact).abs().max()) < 4 * torch.finfo(dtype).eps + 1e-5


def test_progress_goes_to_stderr(capsys):
    sample(Nonlinear(VPSDE()), (1, 2), DDIM(), steps=3, seed=0, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "DDIM" in err


# Failures.


class Breaks(Denoiser):
    """NaN for some samples at one evaluation."""

    def __init__(self, at, samples):
        self.sde, self.at, self.samples = VPSDE(), at, samples

    def posterior(self, x, t, **cond):
        mean = torch.zeros_like(x)
        if float(t) == self.at:
            mean[self.samples] = math.nan
        return Posterior(mean)


@pytest.mark.parametrize("noise", [{"seed": 0}, {"generator": generator()}, {}])
@pytest.mark.parametrize("solver", [DDPM(), DDIM(), Heun(), EulerMaruyama(), Euler("t")], ids=repr)
def test_nan_is_located(solver, noise):
    grid = Grid.uniform(VPSDE(), 8)
    step = 2 if solver == Heun() else 3  # Heun meets t_3 first at the end of step 2
    with pytest.raises(NonFiniteError, match=f"became non-finite in step {step}") as caught:
        sample(Breaks(float(grid.times[3]), [1, 4]), (6, 2, 2), solver, grid=grid, **noise)
    assert caught.value.step == step
    assert caught.value.samples == [1, 4]
    assert caught.value.time == float(grid.times[3])


def test_nan_of_a_network_that_differs_on_replay():
    calls = []

    class Once(Denoiser):
        sde = VPSDE()

        def posterior(self, x, t, **cond):
            calls.append(t)
            return Posterior(x * (math.nan if len(calls) == 2 else 0.5))

    with pytest.raises(NonFiniteError, match="the network is random") as caught:
        sample(Once(), (2, 3), DDIM(), steps=4, seed=0)
    assert caught.value.step is None
    assert caught.value.samples == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of steps=, nfe= and grid=; got none"),
        ({"steps": 3, "nfe": 3}, "got steps and nfe"),
        ({"steps": 3, "grid": Grid.uniform(VPSDE(), 3)}, "got steps and grid"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"nfe": 0}, "nfe=0"),
        ({"grid": Grid.uniform(VESDE(), 3)}, "the grid was made for VESDE"),
        ({"steps": 3, "seed": 0, "generator": generator()}, "got seed and generator"),
        ({"steps": 3, "seed": [1, 2, 3]}, "3 seeds for 2 samples"),
        ({"steps": 3, "seed": -1}, "seed=-1"),
        ({"steps": 3, "seed": [4, -2]}, r"seed=\[4, -2\]"),
        ({"steps": 3, "seed": [1.5, 2.0]}, r"seed=\[1.5, 2.0\]"),
        ({"steps": 3, "noise": lambda row, x: x}, "give x_T itself"),
        ({"steps": 3, "cond": {"y": torch.zeros(3)}}, r"cond\['y'\] has 3 entries for 2 samples"),
        ({"shape": (), "steps": 3}, "shape"),
        ({"shape": (0, 3), "steps": 3}, "shape"),
        ({"shape": torch.zeros(2, 3, dtype=torch.int64), "steps": 3}, "x_T is torch.int64"),
    ],
)
def test_bad_arguments_are_refused_before_any_evaluation(arguments, message):
    counting = Counting(Nonlinear(VPSDE()))
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=message):
        sample(counting, arguments.pop("shape", (2, 3)), DDPM(), **arguments)
    assert not counting.times


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: sample(lambda x, t: x, (2, 3), DDIM(), steps=3), "wrap the network"),
        (lambda d: sample(d, (2, 3), DDIM, steps=3), r"an instance of a solver \(DDIM\(\)\)"),
        (lambda d: sample(d, (2, 3), DDIM(), grid=[1.0, 0.0]), "expected a Grid"),
        (lambda d: sample(d, 4, DDIM(), steps=3), "shape_or_x is 4"),
        (lambda d: sample(d, (2, 3), DDIM(), steps=3, cond=torch.zeros(2)), "cond is Tensor"),
    ],
)
def test_bad_objects_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call(Nonlinear(VPSDE()))


def test_an_eps_network_on_a_flow_is_refused_before_any_evaluation():
    calls = []
    with pytest.raises(ValueError, match="stay below that time"):
        sample(EpsDenoiser(lambda x, t: calls.append(t), FlowSDE()), (2, 3), DDIM(), steps=3)
    assert not calls


def test_the_public_names_of_the_design():
    """Other programs are written against these."""
    names = """VPSDE SubVPSDE VESDE CosineVPSDE EDMSDE FlowSDE DDPMChain Grid Posterior Denoiser EpsDenoiser
        ScoreDenoiser X0Denoiser VDenoiser EDMDenoiser sample Solution"""
    for name in names.split():
        assert hasattr(scoresde, name)
    denoiser = Empirical(normal(5, 2)).denoiser(VPSDE())
    solution = scoresde.sample(denoiser, (3, 2), DDIM(eta=0.0), nfe=10, seed=[1, 2, 3], cond={}, progress=False)
    assert (solution.nfe, solution.trajectory, len(solution.grid)) == (10, None, 11)
    assert Gaussian(mean=torch.zeros(2), cov=torch.eye(2)).log_prob(torch.zeros(1, 2)).shape == (1,)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_loop_never_reads_the_device(name):
    """On the meta device any look at a value raises: so on a GPU the loop waits for nothing and can be captured."""

    class Net(torch.nn.Linear):
        def forward(self, x, time):
            return super().forward(x) + time[:, None]

    net = Net(3, 3, device="meta")
    for adapter in (EpsDenoiser, X0Denoiser, EDMDenoiser):
        for denoiser in (adapter(net, VPSDE()), Clip(adapter(net, VPSDE()))):
            table = SOLVERS[name].tableau(Grid.uniform(VPSDE(), 4))
            states = list(table.iterate(denoiser, torch.empty(2, 3, device="meta"), lambda row, x: torch.empty_like(x)))
            assert states[-1].x.device.type == "meta"
            assert len(states) == table.nfe


@pytest.mark.parametrize("noise", [{"seed": 3}, {"generator": generator(3)}, {}])
def test_the_replay_meets_the_same_noise(noise):
    """A network that breaks where a state is large is located where it broke: the first evaluation to see one."""
    seen = []

    class Fragile(Denoiser):
        sde = VPSDE()

        def posterior(self, x, t, /, **cond):
            broken = (x > 1.2).any(1) & (t < 0.8)  # after some noise was drawn
            seen.append((float(t), broken.nonzero().flatten().tolist()))
            return Posterior(torch.where(broken[:, None], math.nan, 0.3 * x))

    # Of the 40 samples' 80 numbers, each about normal, one is above 1.2 at two rows running but for a chance of 1e-7.
    with pytest.raises(NonFiniteError) as caught:
        sample(Fragile(), (40, 2), DDPM(), steps=12, **noise)
    t, samples = next((t, samples) for t, samples in seen[:12] if samples)
    assert (caught.value.time, caught.value.samples) == (t, samples)


@pytest.mark.parametrize("name", ["heun sigma", "heun t", "ddim"])
def test_a_network_may_reuse_the_memory_of_its_output(name):
    """A static output buffer, as captured graphs have, must not change an F that a later row reads."""
    buffer = torch.empty(2, 3, dtype=torch.float64)
    sde, x = VPSDE(), normal(2, 3)
    for adapter in (EpsDenoiser, VelocityDenoiser, X0Denoiser):
        fresh = adapter(lambda x, t: torch.sin(x + t[:, None]), sde)
        static = adapter(lambda x, t: torch.sin(x + t[:, None], out=buffer), sde)
        expected = sample(fresh, x, SOLVERS[name], steps=5).x
        torch.testing.assert_close(sample(static, x, SOLVERS[name], steps=5).x, expected, rtol=0, atol=0)


def test_a_network_in_training_mode_is_warned_of():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    denoiser = Clip(EpsDenoiser(lambda x, t: x, VPSDE()))
    denoiser.denoiser.net = net
    net.forward = lambda x, t: x
    several = Product([denoiser, Clip(denoiser)])
    for each in (denoiser, several):
        with pytest.warns(UserWarning, match="call net.eval"):
            sample(each, (1, 3), DDIM(), steps=2, seed=0)
    net.eval()
    for each in (denoiser, several):
        sample(each, (1, 3), DDIM(), steps=2, seed=0)


def test_tables_do_not_follow_the_default_device():
    """Coefficients are on the host wherever new tensors go by default."""
    for sde in SDES.values():
        for solver in SOLVERS.values():
            with torch.device("meta"):
                table = solver.tableau(Grid.uniform(sde, 4, start=start_of(sde)))
                grids = [Grid.log_snr(sde, 4, start=start_of(sde)), solver.grid(sde, 3)]
            assert {c.device.type for c in (table.t, table.a, table.b, table.c, table.p, table.step)} == {"cpu"}
            assert all(grid.times.device.type == "cpu" for grid in grids)


def test_a_negative_integer_label_is_refused_before_any_evaluation():
    """Between a chain's nodes 0 and 1 a rounded label would read the table's last row."""
    calls, chain = [], DDPMChain()
    denoiser = EpsDenoiser(lambda x, n: calls.append(n), chain, time=lambda t: t.round().long() - 1)
    with pytest.raises(ValueError, match="integer time label is negative"):
        sample(denoiser, normal(2, 3), DDIM(), grid=Grid(chain, [500.0, 0.3, 0.0]))
    assert not calls


def test_an_edm_label_of_infinity_is_refused_before_any_evaluation():
    calls = []
    with pytest.raises(ValueError, match="the time label is not finite at t = 1"):
        sample(EDMDenoiser(lambda x, t: calls.append(t), FlowSDE()), (2, 3), DDIM(), steps=3, seed=0)
    assert not calls


def test_many_small_samples_cost_little_memory():
    """A stream draws no more than 512 numbers ahead, and as many rows as it likes."""
    noise = SeededNoise([1, 2], torch.device("cpu"))
    for row in range(600):
        noise(row, torch.zeros(2, 3))
    assert noise._block.numel() <= 2 * 512


GIVEN = {
    "sample": lambda denoiser, x: sample(denoiser, x, DDIM(), steps=3),
    "log_prob": lambda denoiser, x: log_prob(denoiser, x, seed=0),
    "log_prob in steps": lambda denoiser, x: log_prob(denoiser, x, steps=3, seed=0),
    "elbo": lambda denoiser, x: elbo(denoiser, x, seed=0),
    "encode": lambda denoiser, x: encode(denoiser, x, DDIM(), steps=3),
    "decode": lambda denoiser, x: decode(denoiser, x, DDIM(), steps=3),
    "edit": lambda denoiser, x: edit(denoiser, x, DDIM(), steps=3),
    "sdedit": lambda denoiser, x: sdedit(denoiser, x, DDPM(), strength=0.5, steps=3, seed=0),
    "variations": lambda denoiser, x: variations(denoiser, x, 2, DDPM(), steps=3, seed=0),
    "interpolation": lambda denoiser, x: interpolation(denoiser, x, x.flip(0), DDIM(), steps=3),
    "langevin": lambda denoiser, x: langevin(denoiser, x, 0.1, step_size=1e-3, steps=2, seed=0),
    "estimate": lambda denoiser, x: estimate(denoiser, x, [0.2, 0.5], samples=2),
    "DPS": lambda denoiser, x: sample(DPS(denoiser, MASK, x), (3, 4), DDIM(), steps=3, seed=0),
    "PiGDM": lambda denoiser, x: sample(PiGDM(denoiser, MASK, x, 0.1), (3, 4), DDIM(), steps=3, seed=0),
    "moments": lambda denoiser, x: sample(MomentMatching(denoiser, MASK, x, 0.1), (3, 4), DDIM(), steps=3, seed=0),
    "DDNM": lambda denoiser, x: sample(DDNM(denoiser, TWICE, x, 0.1), (3, 4), DDIM(), steps=3, seed=0),
    "replacement": lambda denoiser, x: sample(denoiser, (3, 4), Replacement(DDPM(), TWICE, x), steps=3, seed=0),
    "repaint": lambda denoiser, x: sample(denoiser, (3, 4), RePaint(MASK, x, 0.0, DDPM(), jump=1), steps=3, seed=0),
}  # fmt: skip
MASK, TWICE = Mask(torch.ones(4)), Mask(torch.ones(4)) @ Mask(torch.ones(4))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_and_not_finite_is_refused_before_any_evaluation(name, value):
    """States, data and measurements, the sample being named; the composition goes through conjugate gradients."""
    calls, x = [], normal(3, 4)
    x[1, 2] = value
    denoiser = EpsDenoiser(lambda x, t: calls.append(t) or 0.9 * x, VPSDE())
    with pytest.raises(ValueError, match=r"not finite.* 1\b"):
        GIVEN[name](denoiser, x)
    assert not calls
