"""Laws of scale: the width that a run starts with follows from alpha and sigma, and with alpha = 1 nothing has a unit:
data and levels times s give samples times s, and log p minus dim log s.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from common import SDES
from torch import Tensor

from scoresde import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    DDPMChain,
    Denoiser,
    FlowSDE,
    Grid,
    NonFiniteError,
    SubVPSDE,
    X0Denoiser,
    bits_per_dim,
    elbo,
    log_prob,
    sample,
)
from scoresde.editing import edit, encode, sdedit, variations
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.guidance import DDNM, PiGDM
from scoresde.guidance.operators import Mask
from scoresde.processes import sde_from
from scoresde.solvers import DDIM, DDPM, AdaptiveSDE, DPMSolverPP, Heun, UniPC
from scoresde.solvers.catalogue import SOLVERS

UNITS = [1000.0, 0.01]


class Exploding(SDE):
    """An SDE of one's own, by what the documentation asks for."""

    t_min, t_max = 1e-5, 1.0

    def alpha(self, t: Any) -> Any:
        return 1

    def sigma(self, t: Any) -> Any:
        return 50 * t


class Shrinking(Exploding):
    """Neither variance preserving nor exploding: alpha = e^{-3 t}, sigma = 4 t."""

    def alpha(self, t: Any) -> Any:
        return (-3 * t).exp()

    def sigma(self, t: Any) -> Any:
        return 4 * t


OWN = [Exploding(), Shrinking()]


def normals(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_unit(kind: str, s: float) -> SDE:
    return {"edm": EDMSDE(0.002 * s, 80 * s), "ve": VESDE(0.01 * s, 50 * s)}[kind]


def modes(s: float, sde: SDE) -> Denoiser:
    means = s * torch.tensor([[1.0, 0.0], [-0.7, 0.5]], dtype=torch.float64)
    return GaussianMixture(means=means, weights=[0.3, 0.7], std=0.2 * s).denoiser(sde)


# --- the width that a run starts with --------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", OWN, ids=repr)
def test_the_scales_of_ones_own_are_asked_for_with_any_time(sde: SDE) -> None:
    """As the class of one's own writes them, whose t is a floating tensor and whose constant may be a number."""
    for t in (1, 0.5, torch.tensor(1), torch.rand(3), torch.rand(2, 3).half()):
        dtype = torch.float32 if isinstance(t, torch.Tensor) and t.is_floating_point() else torch.float64
        for asked in (sde.alpha, sde.sigma, sde.half_log_snr, sde.drift, sde.diffusion, sde.radius):
            assert asked(t).dtype == dtype
            assert asked(t).shape == torch.as_tensor(t).shape


@pytest.mark.parametrize("sde", [*OWN, *SDES.values()], ids=repr)
@pytest.mark.parametrize("std", [None, 0.3, 5.0])
def test_the_prior_is_as_wide_as_x_t_of_data_of_that_std(sde: SDE, std: float | None) -> None:
    told = sde if std is None else sde.for_data(std)
    for t in (sde.t_max, 0.5 * sde.t_max, sde.t_min):
        s = 1.0 if std is None else std
        expected = math.hypot(float(sde.alpha(t)) * s, float(sde.sigma(t)))
        if std is None and isinstance(sde, VESDE | EDMSDE):
            assert told.prior_std_at(t) == float(sde.sigma(t))  # to the last bit
        else:
            assert told.prior_std_at(t) == pytest.approx(expected, rel=1e-14)
    assert told.prior_std == told.prior_std_at(sde.t_max)


def test_on_vp_the_width_is_one_to_the_last_bit() -> None:
    assert all(sde.prior_std_at(f * sde.t_max) == 1 for sde in (VPSDE(), DDPMChain()) for f in (0.1, 0.77, 1.0))


@pytest.mark.parametrize("sde", OWN, ids=repr)
@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP(2), UniPC(3), Heun(), UniPC(4, view="v")], ids=repr)
def test_an_sde_of_ones_own_gives_the_width_of_the_data(sde: SDE, solver: object) -> None:
    """On Gaussian data the ODE is linear, x_0 = k x_T: its std is k times the prior's, that of the data but for what
    the prior, with s = 1 for 0.5, is too wide: (alpha 0.5 / sigma)^2 at t_max, 2 % at most here, and the steps' error.
    """
    x_T = torch.full((1, 1), sde.prior_std, dtype=torch.float64)
    std = float(sample(Gaussian(mean=[0.0], std=0.5).denoiser(sde), x_T, solver, steps=200).x)
    assert std == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("sde", OWN, ids=repr)
def test_an_sde_of_ones_own_has_the_right_likelihood_bound_and_code(sde: SDE) -> None:
    target, x = Gaussian(mean=[0.1, -0.2, 0.0], std=0.5), 0.5 * normals(4, 3)
    told = sde.for_data(0.5)
    denoiser, exact = target.denoiser(told), target.log_prob(x)
    # What is left of the mean at t_max is not in the prior: a shift of alpha m / sigma in x_T, 2 % at most.
    adaptive = log_prob(denoiser, x, divergence="exact", rtol=1e-5, atol=1e-5)
    table = log_prob(denoiser, x, divergence="exact", steps=100)
    assert float((adaptive.value - exact).abs().max()) < 0.05
    assert float((table.value - exact).abs().max()) < 0.05
    bound = elbo(denoiser, x, seed=0)
    assert bool(((bound.value - exact).abs() < 0.05 + 6 * bound.stderr).all())
    code = encode(denoiser, x)
    exact_code = target.flow(x, told, told.t_min, told.t_max)
    torch.testing.assert_close(code.latent, exact_code, rtol=1e-4, atol=1e-4 * told.prior_std)


@pytest.mark.parametrize("sde", [FlowSDE(), SubVPSDE(), Shrinking(), VPSDE()], ids=repr)
@pytest.mark.parametrize("start", [0.9, 0.5, 0.2])
def test_a_run_that_starts_below_t_max_has_the_width_of_the_data(sde: SDE, start: float) -> None:
    """Unit Gaussian data: the exact width of x_t at every start, so that the std of what comes out is 1."""
    denoiser = Gaussian(mean=[0.0], std=1.0).denoiser(sde)
    grid = Grid.uniform(sde, 60, start=start)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        drawn = sample(denoiser, (2000, 1), UniPC(2), grid=grid, generator=torch.Generator().manual_seed(0)).x
    x_T = torch.full((1, 1), sde.prior_std_at(start), dtype=torch.float64)
    assert float(sample(denoiser, x_T, UniPC(2), grid=grid).x) == pytest.approx(1.0, rel=0.01)
    assert float(drawn.std()) == pytest.approx(1.0, rel=0.01 + 5.5 / math.sqrt(2 * 2000))  # p < 4e-8
    guess = float(sde.alpha(start) / sde.sigma(start)) > 0.1
    assert [str(w.message).startswith("x_T is a guess") for w in told] == [True] * guess
    assert not told or told[0].filename == __file__


def test_for_data_tells_the_scale_and_nothing_else() -> None:
    for sde in [*OWN, *SDES.values()]:
        told = sde.for_data(0.25)
        assert told.data_scale == 0.25
        assert told == sde.for_data(0.25) != sde
        assert sde.data_std is None
        assert repr(told) == f"{sde!r}.for_data(0.25)"
        assert torch.equal(told.half_log_snr(sde.t_max), sde.half_log_snr(sde.t_max))

    class Told(Shrinking):
        data_std = 0.25

    assert Told().prior_std_at(0.3) == Shrinking().for_data(0.25).prior_std_at(0.3)
    for sde in SDES.values():
        assert sde_from(repr(sde.for_data(0.25)), sde.arrays()) == sde.for_data(0.25)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="data_std"):
            VPSDE().for_data(wrong)


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["edm", "ve"])
@pytest.mark.parametrize("name", SOLVERS)
def test_samples_are_in_the_unit_of_the_data(kind: str, name: str) -> None:
    """Every solver on its own grid, or by its own steps, from its own prior: times s, to rounding."""
    solver = SOLVERS[name].solver
    if isinstance(solver, AdaptiveSDE):
        solver = replace(solver, memory=False, rtol=0.1)  # with memory rounding grows along its bridges
    found = {}
    for s in (1.0, *UNITS):
        sde = in_unit(kind, s)
        x_T = sde.prior((3, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
        run = sample(modes(s, sde), x_T, solver, seed=1, steps=None if solver.adaptive else 7)
        found[s] = run.x / s, run.nfe
    for s in UNITS:
        assert found[s][1] == found[1.0][1]
        torch.testing.assert_close(found[s][0], found[1.0][0], rtol=1e-8, atol=1e-8)


Measure = Callable[[Denoiser, Tensor], Tensor]
DENSITIES: dict[str, Measure] = {
    "adaptive": lambda denoiser, x: log_prob(denoiser, x, seed=0).value,
    "exact": lambda denoiser, x: log_prob(denoiser, x, divergence="exact", rtol=1e-4, atol=1e-4).value,
    "table": lambda denoiser, x: log_prob(denoiser, x, steps=20, seed=0).value,
    "in x0": lambda denoiser, x: log_prob(denoiser, x, steps=20, seed=0, solver=UniPC(3)).value,
    "at t": lambda denoiser, x: log_prob(denoiser, x, steps=20, seed=0, t=denoiser.sde.t_max / 20).value,
    "corrected": lambda denoiser, x: log_prob(denoiser, x, steps=20, seed=0, correct=True).value,
    "bound": lambda denoiser, x: elbo(denoiser, x, seed=0, draws=16).value,
    "chain": lambda denoiser, x: elbo(denoiser, x, DDPM(), DDPM().grid(denoiser.sde, 20), seed=0).value,
    "sampled": lambda denoiser, x: (
        sample(denoiser, x * denoiser.sde.prior_std, UniPC(4, view="v"), steps=20, seed=0, log_prob=True).log_prob
    ),
}


@pytest.mark.parametrize("kind", ["edm", "ve"])
@pytest.mark.parametrize("name", DENSITIES)
def test_log_p_falls_by_dim_log_s(kind: str, name: str) -> None:
    x = normals(3, 2)
    # What log_prob(t=...) names is a time, which on VE is not a level: the same share of t_max is.
    one, *others = (
        DENSITIES[name](modes(s, in_unit(kind, s)), x if name == "sampled" else s * x) + 2 * math.log(s)
        for s in (1.0, *UNITS)
    )
    for other in others:
        torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["edm", "ve"])
def test_bits_per_dim_have_no_unit(kind: str) -> None:
    images = torch.tensor([[3, 12], [9, 0]])
    found = [
        bits_per_dim(
            modes(s, in_unit(kind, s)), images, 16, data_range=(-s, s), steps=20, seed=0, dtype=torch.float64,
            dequantize=how,
        ).per_image
        for s in (1.0, *UNITS)
        for how in ("uniform", "truncated-normal")
    ]  # fmt: skip
    for i, other in enumerate(found[2:]):
        torch.testing.assert_close(other, found[i % 2], rtol=1e-7, atol=1e-7)


EDITS: dict[str, Measure] = {
    "encode": lambda denoiser, x: encode(denoiser, x).latent,
    "encode in 20": lambda denoiser, x: encode(denoiser, x, UniPC(3), steps=20).latent,
    "edit": lambda denoiser, x: edit(denoiser, x, UniPC(3), steps=20, strength=0.6).x,
    "sdedit": lambda denoiser, x: sdedit(denoiser, x, DDPM(), strength=0.5, steps=20, seed=0).x,
    "variations": lambda denoiser, x: variations(denoiser, x, 2, UniPC(3), by="encoding", steps=20, seed=0).x,
}


@pytest.mark.parametrize("kind", ["edm", "ve"])
@pytest.mark.parametrize("name", EDITS)
def test_edits_are_in_the_unit_of_the_data(kind: str, name: str) -> None:
    x = 0.5 * normals(3, 2)
    one, *others = (EDITS[name](modes(s, in_unit(kind, s)), s * x) / s for s in (1.0, *UNITS))
    for other in others:
        torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("guide", [DDNM, PiGDM], ids=lambda guide: guide.__name__)
def test_restoration_is_in_the_unit_of_the_data(guide: Callable[..., Denoiser]) -> None:
    found = []
    for s in (1.0, *UNITS):
        sde = in_unit("edm", s)
        y = s * torch.tensor([[0.7, 0.0]], dtype=torch.float64).expand(3, 2)
        restored = guide(modes(s, sde), Mask(torch.tensor([True, False])), y, 0.1 * s)
        x_T = sde.prior((3, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
        found.append(sample(restored, x_T, DDIM(), steps=12).x / s)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [UniPC(4, view="v"), UniPC(3, view="flow"), DPMSolverPP(2)], ids=repr)
def test_for_data_is_a_unit_for_any_sde(solver: object) -> None:
    """An SDE of one's own, sigma and data_std both times s."""

    class Wider(Exploding):
        def sigma(self, t: Any) -> Any:
            return 1000 * super().sigma(t)

    one, other = (
        sample(modes(s, sde), x_T, solver, steps=12).x / s
        for s, sde in ((1.0, Exploding()), (1000.0, Wider().for_data(1000.0)))
        for x_T in [sde.prior((3, 2), torch.Generator().manual_seed(0), dtype=torch.float64)]
    )
    torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8)


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trajectory", [False, True])
def test_a_result_that_half_precision_cannot_hold_is_an_error(trajectory: bool) -> None:
    far = X0Denoiser(lambda x, t: torch.full_like(x, -1e5) * torch.tensor([[1.0], [0.0]]), VPSDE())
    x_T = torch.ones(2, 3, dtype=torch.float16)
    with pytest.raises(NonFiniteError, match=r"samples 0 reach 1e\+05, which torch.float16 does not hold") as caught:
        sample(far, x_T, DDIM(), steps=3, trajectory=trajectory)
    assert caught.value.samples == [0]
    with pytest.raises(NonFiniteError, match="float16 does not hold"):
        sdedit(far, x_T, DDIM(), strength=0.5, steps=3)
    assert bool(sample(far, x_T.bfloat16(), DDIM(), steps=3).x.isfinite().all())
