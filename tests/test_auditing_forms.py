"""A form is the sampler itself: it ends where the exact flow ends, on the times given, whatever its model predicts."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import textwrap
from functools import partial

import pytest
import torch
from common import generator

from scoresde import EDMSDE, VPSDE, Grid, sample
from scoresde.auditing.forms import claimed_order, form_of, load
from scoresde.auditing.model import PREDICTIONS, Draws, Model, run_form
from scoresde.checks import ArgumentError
from scoresde.exact import Gaussian
from scoresde.solvers import DDIM, DDPM, Heun, UniPC

TARGET = Gaussian(mean=[0.5, -1.0], std=torch.tensor([0.3, 1.0]))
EDM = EDMSDE()


def start(sde, dtype=torch.float64):
    return (torch.randn(5, 2, generator=generator(), dtype=torch.float64) * sde.prior_std).to(dtype)


def error(form, steps, end=EDM.t_min, sde=EDM, dtype=torch.float64, predicts=None):
    """rms distance to the exact flow, the model, and the evaluations claimed."""
    grid, x_T = Grid.log_snr(sde, steps, end=end), start(sde)
    model = Model(TARGET.denoiser(sde), predicts or form.predicts[0])
    x, claimed = run_form(form, model, x_T.to(dtype), grid.times.to(dtype))
    assert x.dtype == dtype
    exact = TARGET.flow(x_T, sde, float(grid.times[0]), end)
    return float((x.double() - exact).square().mean().sqrt()), model, claimed


def converges(form, order, predicts=None, steps=40):
    """Twice the steps, an error some 2^order times less; and to sigma = 0 too."""
    coarse, fine = (error(form, n, predicts=predicts)[0] for n in (steps, 2 * steps))
    assert math.log2(coarse / fine) > order - 0.5, (form.name, coarse, fine)
    assert error(form, steps, 0.0, predicts=predicts)[0] < 1.3 * coarse + 1e-4


# --- ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["heun", "UniPC(2)", DDIM(), UniPC], ids=str)
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_ours_converge_whatever_the_model_predicts(solver, predicts):
    form = form_of(solver)
    assert (form.takes, form.predicts) == ("times", PREDICTIONS)
    assert form.about.startswith("scoresde ")
    converges(form, form.order, predicts, steps=80)


def test_ours_are_sample_itself_and_claim_its_evaluations():
    for sde in (EDM, VPSDE()):
        found, model, claimed = error(form_of(Heun()), 8, 0.0, sde)
        grid = Grid.log_snr(sde, 8)
        solution = sample(TARGET.denoiser(sde), start(sde), Heun(), grid=grid)
        exact = TARGET.flow(start(sde), sde, sde.t_max, 0.0)
        assert found == pytest.approx(float((solution.x - exact).square().mean().sqrt()), rel=1e-9)
        assert claimed == model.nfe == solution.nfe
        torch.testing.assert_close(torch.tensor(model.asked[::2], dtype=torch.float64), grid.times[:-1])


def test_noise_of_ours_is_seen_and_can_be_replaced():
    form, times = form_of("ddpm", "sigmas"), Grid.karras(EDM, 6).times
    x_T = start(EDM)
    with Draws(lambda k, z: torch.zeros_like(z)) as draws:
        x, _ = run_form(form, Model(TARGET.denoiser(EDM)), x_T, times)
    assert len(draws.shapes) == 5
    quiet = partial(sample, TARGET.denoiser(EDM), x_T, DDPM(), noise=lambda row, x: torch.zeros_like(x))
    torch.testing.assert_close(x, quiet(grid=Grid(EDM, times)).x)
    for name in ("adaptive-sde", "reverse-sde", "restart", "pc"):  # loops, whose noise is a source
        runs = [run_form(form_of(name), Model(TARGET.denoiser(EDM)), start(EDM), times, seed)[0] for seed in (0, 0, 1)]
        assert torch.equal(runs[0], runs[1]), name
        assert not torch.equal(runs[0], runs[2]), name


def test_times_that_float32_rounds_out_of_the_sde_are_its_ends():
    sde = VPSDE(t_max=0.1)
    assert float(torch.tensor(sde.t_max).float()) > sde.t_max
    assert error(form_of("heun"), 20, sde.t_min, sde, torch.float32)[0] < 0.1


def test_options_of_ours():
    assert form_of(DDIM, options={"eta": 0.5}).name == form_of(DDIM(), options={"eta": 0.5}).name == "DDIM(eta=0.5)"
    assert form_of(UniPC(3)).order == 4  # measured, of the catalogue
    form = form_of("ddim", order=7, name="mine")
    assert (form.order, form.name) == (7, "mine")
    assert form_of(form) is form


# --- functions and modules --------------------------------------------------------------------------------------------


def sample_euler(model, x, sigmas, extra_args=None, disable=None, power=1.0):
    """As k-diffusion's functions are called."""
    assert disable
    for t, s in itertools.pairwise(sigmas):
        x = x + (x - model(x, t * x.new_ones(len(x)), **(extra_args or {}))) / t * (s - t) * power
    return x


def plain(denoise, x_T, times, nfe, power=1.0):
    assert nfe == len(times) - 1
    return sample_euler(denoise, x_T, times, disable=True, power=power), nfe


def on_range(model, x, sigma_min, sigma_max, n, disable=None):
    """On a grid of its own, that cannot reach 0."""
    levels = torch.linspace(float(sigma_max.log()), float(sigma_min.log()), n + 1, dtype=torch.float64).exp()
    return sample_euler(model, x, levels.to(x.dtype), disable=disable)


class Euler(torch.nn.Module):
    def __init__(self, network, sigmas, power=1.0):
        super().__init__()
        assert isinstance(network, torch.nn.Module)
        self.network, self.sigmas, self.power = network, sigmas, power

    def forward(self, x):
        return sample_euler(self.network, x, self.sigmas, disable=True, power=self.power)


class Whole(torch.nn.Module):
    def forward(self, denoise, x_T, sigmas, nfe):
        return sample_euler(denoise, x_T, sigmas, disable=True)


FUNCTIONS = {
    "on sigmas": form_of(sample_euler),
    "plain": form_of(plain, takes="sigmas"),
    "bound": form_of(partial(plain, power=1.0), takes="sigmas"),
    "lambda": form_of(lambda d, x, sigmas, n: sample_euler(d, x, sigmas, disable=True)),
    "in its words": form_of(lambda *args: plain(*args), takes="sigmas"),
    "range": form_of(on_range),
    "class": form_of(Euler),
    "factory": form_of(lambda network, sigmas: Euler(network, sigmas)),
    "instance": form_of(Whole()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_modules_are_called_as_they_are(name):
    form = FUNCTIONS[name]
    assert form.takes == "sigmas"
    converges(form, 1)
    found, model, claimed = error(form, 10)
    assert found == pytest.approx(error(FUNCTIONS["on sigmas"], 10)[0], rel=1e-6)
    assert model.nfe == 10
    assert claimed == (10 if "plain" in name or name in ("bound", "in its words") else None)


def test_options_reach_the_function():
    for sampler in (sample_euler, Euler):
        broken = form_of(sampler, options={"power": 0.5})
        assert error(broken, 80)[0] > 1
        assert "(power=0.5)" in broken.name


def test_what_a_third_argument_is():
    assert form_of(lambda denoise, x, times, nfe: x).takes == "times"
    assert form_of(plain).takes == "times"
    assert form_of(plain, takes="sigmas").takes == "sigmas"


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("sample_dpmpp_3m_sde", {"eta": 0.0}, 3),
        ("sample_dpmpp_3m_sde", {"eta": 1.0}, None),
        ("sample_dpm_2", {"s_churn": 0.0}, 2),
        ("sample_dpm_2", {"s_churn": 4.0}, None),
        ("sample_dpm_2_ancestral", {}, None),
        ("sample_lms", {"order": 4}, 4),
        ("sample_heun", {}, 2),
        ("sample_euler", {}, 1),
        ("sample_dpm_adaptive", {"order": 3}, None),
        ("mine", {}, None),
    ],
)
def test_the_order_that_a_name_claims(name, options, order):
    assert claimed_order(name, options) == order


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: form_of(3), r"sampler=int: expected a solver of scoresde, a scheduler"),
        (lambda: form_of(Gaussian), "sampler=Gaussian: expected"),
        (lambda: form_of("heunn"), "expected 'heun'"),
        (lambda: form_of("heun", options={"rho": 7}), "rho"),
        (lambda: form_of(sample_euler, options={"eta": 0.0}), "sample_euler has no 'eta'"),
        (lambda: form_of(sample_euler, takes="times"), "takes='times': sample_euler takes sigmas"),
        (lambda: form_of(plain, takes="sigma"), "takes='sigma': expected 'sigmas'"),
        (lambda: form_of(lambda a, b, c, d: b), "give takes='sigmas' or takes='times'"),
        (lambda: form_of(lambda a: a), r"expected a function \(denoise, x_T, times or sigmas, nfe\)"),
        (lambda: form_of(Euler, options={"eta": 0.0}), "Euler has no 'eta'"),
    ],
)
def test_what_is_no_sampler_is_told_in_a_sentence(call, words):
    with pytest.raises(ArgumentError, match=words):
        call()


def test_load(tmp_path, monkeypatch):
    (tmp_path / "own_sampler.py").write_text(
        textwrap.dedent(
            """
            def mine(denoise, x_T, sigmas, nfe):
                return x_T
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert form_of(load("own_sampler:mine")).name == "mine"
    with pytest.raises(ValueError, match="has no 'mien': 'mine' say"):
        load("own_sampler:mien")
    with pytest.raises(ImportError, match="no_such_module"):
        load("no_such_module:mine")
    sys.modules.pop("own_sampler")


# --- peers, where they are installed (extra: bench) -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("heun", {}, 2),
        ("dpm_2", {}, 2),
        ("dpmpp_2m", {}, 2),
        ("dpmpp_2m_sde", {"eta": 0.0}, 2),
        ("lms", {"order": 3}, 3),
        ("dpm_fast", {}, None),
        ("euler_ancestral", {}, None),
    ],
)
def test_functions_of_k_diffusion(name, options, order):

    if importlib.util.find_spec("k_diffusion") is None:
        pytest.skip("k-diffusion is not installed (extra: bench)")
    form = form_of(load(f"k_diffusion.sampling:sample_{name}"), options=options)
    assert form.order == order
    assert form.about.startswith("k_diffusion ")
    if name != "euler_ancestral":
        converges(form, order or 2)
    else:
        with Draws() as draws:
            error(form, 10, 0.0)
        assert len(draws.shapes) == 9


@pytest.mark.parametrize("name", ["DDIM", "Heun", "zAB", "xEAB"])
@pytest.mark.filterwarnings("ignore")
def test_samplers_of_azula(name):
    azula = pytest.importorskip("azula.sample", reason="azula is not installed (extra: bench)")
    form = form_of(getattr(azula, f"{name}Sampler"))
    assert form.order == (1 if name == "DDIM" else 2)
    converges(form, form.order)
    with pytest.raises(ArgumentError, match=f"{name}Sampler"):
        form_of(getattr(azula, f"{name}Sampler"), options={"rho": 7})


SCHEDULERS = {
    "DDIM": (1, "x0 eps v"),
    "Euler Discrete": (1, "x0 eps v"),
    "Heun Discrete": (2, "x0 eps v"),
    "KDPM2 Discrete": (2, "eps v"),
    "LMS Discrete": (4, "x0 eps v"),
    "DEIS Multistep": (2, "x0 eps v"),
    "DPMSolver Multistep": (2, "x0 eps v"),
    "DPMSolver Singlestep": (2, "x0 eps v"),
    "UniPC Multistep": (2, "x0 eps v"),
    "EDMDPMSolver Multistep": (2, "eps v"),
    "IPNDM": (None, "v"),
    "Euler Ancestral Discrete": (None, "eps v"),
    "KDPM2 Ancestral Discrete": (None, "eps v"),
    "DDPM": (None, "x0 eps v"),
    "SASolver": (None, "x0 eps v"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore")
def test_schedulers_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: bench)")
    cls = getattr(diffusers, f"{name.replace(' ', '')}Scheduler")
    form, (order, predicts) = form_of(cls), SCHEDULERS[name]
    assert (form.order, " ".join(form.predicts)) == (order, predicts)
    assert bool(form.leaves) is (name == "DPMSolver Singlestep")  # set_timesteps turns lower_order_final on for good
    ends = {end: [error(form, 40, end, predicts=kind) for kind in form.predicts] for end in (EDM.t_min, 0.0)}
    for (first, asked, _), *others in ends.values():  # what is asked makes no difference, nor do the runs before
        for found, model, _ in others:
            assert found == pytest.approx(first, rel=1e-5)  # Euler's state is float32
            assert model.nfe == asked.nfe
    if order or name == "IPNDM":
        converges(form, min(order or 2, 3))
        assert error(form, 40, dtype=torch.float32)[0] == pytest.approx(ends[EDM.t_min][0][0], rel=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_object_keeps_its_config_and_is_left_alone():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: bench)")
    mine = diffusers.DPMSolverMultistepScheduler(solver_order=3, use_karras_sigmas=True)
    before = dict(mine.config), mine.sigmas.clone()
    form = form_of(mine)
    assert form.order == 3
    error(form, 10)
    assert dict(mine.config) == before[0]
    assert torch.equal(mine.sigmas, before[1])
    labels = form.as_used(Model(TARGET.denoiser(EDM)), start(EDM), 20)[1:]
    told, stood = torch.tensor(labels[1]), torch.tensor(labels[2])
    assert all(label == int(label) for label in labels[0])
    assert 1e-4 < float((told / stood - 1).abs().max()) < 0.1  # Karras' levels between whole labels


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_as_it_is_used_knows_its_own_levels():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: bench)")
    for name in ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "DPMSolverMultistep"):
        form = form_of(getattr(diffusers, f"{name}Scheduler"))
        model = Model(TARGET.denoiser(EDM))
        x, labels, told, stood = form.as_used(model, torch.randn(2000, 2, generator=generator()), 37)
        assert len(labels) == len(told) == len(stood) == model.nfe
        torch.testing.assert_close(torch.tensor(told), torch.tensor(stood), rtol=0.05, atol=0)
        torch.testing.assert_close(x.mean(0).double(), TARGET.moments()[0].double(), rtol=0.1, atol=0.1)
    x, labels, told, stood = form_of(diffusers.DDIMScheduler).as_used(Model(TARGET.denoiser(EDM)), start(EDM), 10)
    assert stood is None
    assert labels[0] == 900


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("LCM", {}, "distilled"),
        ("DDIMInverse", {}, "from data to noise"),
        ("PNDM", {}, "skip_prk_steps=True"),
        ("FlowMatchEulerDiscrete", {}, "expected one that reads sigmas"),
        ("DDIM", {"rho": 7}, "DDIMScheduler has no 'rho'"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_schedulers_that_are_not_driven(name, options, words):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: bench)")
    with pytest.raises(ArgumentError, match=words):
        form_of(getattr(diffusers, f"{name}Scheduler"), options=options)
