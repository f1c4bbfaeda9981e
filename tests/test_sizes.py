"""Items of various sizes: what an item does not have changes no bit of anything, dimensions are its own, and its seed
draws the same however far its batch is filled up."""

from __future__ import annotations

import math

import pytest
import torch
from common import generator, named, normal

from scoresde import (
    VPSDE,
    Clip,
    DynamicThreshold,
    EpsDenoiser,
    Grid,
    Latent,
    Masked,
    X0Denoiser,
    batch_of,
    bits_per_dim,
    decode,
    diagnose,
    elbo,
    encode,
    log_prob,
    sample,
)
from scoresde.compiled import SamplerModule
from scoresde.editing import interpolation
from scoresde.guidance import ClassifierFree, Energy, PiGDM
from scoresde.masks import Own
from scoresde.metrics import SetFeatures, energy_distance
from scoresde.nn import Encoding, SetTransformer
from scoresde.noise import CounterNoise
from scoresde.solvers import (
    DDIM,
    DDPM,
    AdaptiveODE,
    AdaptiveSDE,
    Captured,
    Parallel,
    PredictorCorrector,
    ReverseSDE,
    UniPC,
    catalogue,
    langevin,
)
from scoresde.training import Part, TrainConfig, Trainer, dsm_loss, masked_loss, two_term_loss
from scoresde.tuning import choose
from scoresde.variance import OptimalVariance, estimate
from scoresde.variance.losses import sn_loss

SDE, COUNTS, SEEDS = VPSDE(), [3, 1, 2], [5, 6, 7]
ALL, TIMES = slice(None), torch.tensor([0.2, 0.5, 0.8])
POINTS = 0.5 * normal(3, 3, 2)


def net(x, t, mask, label=None):
    """Each entry by itself and the mean of its item's; forward and backward as exact as sums by `Own` are."""
    pooled = Own(x.shape, mask).mean(x).index_select(0, torch.arange(len(x)).repeat_interleave(x[0].numel()))
    shift = 0.0 if label is None else 0.1 * label.to(x)[:, None, None]
    return torch.sin(0.8 * x + 0.3 * pooled.reshape(x.shape) + t[:, None, None]) + shift


def mean_of(x, t, mask):
    """E[x_0 | x_t] of independent entries N(0, 0.25)."""
    alpha, sigma = (c(t)[:, None, None] for c in (SDE.alpha, SDE.sigma))
    return 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * x


DENOISER, EXACT = Masked(X0Denoiser(net, SDE)), Masked(X0Denoiser(mean_of, SDE))


def mask_of(N: int, which: slice = ALL) -> torch.Tensor:
    return (torch.arange(N) < torch.tensor(COUNTS)[which, None])[..., None]


def filled(N: int, which: slice = ALL, *, x: torch.Tensor = POINTS, fill: float = math.nan) -> torch.Tensor:
    """The points in a batch of N each, with anything after them."""
    found = torch.full((3, N, 2), fill, dtype=x.dtype)
    found[:, : min(N, 3)] = x[:, :N]
    return torch.where(mask_of(N), found, torch.full_like(found, fill))[which]


def alone(i: int) -> tuple[int, slice]:
    return COUNTS[i], slice(i, i + 1)


def told(N: int, which: slice = ALL) -> dict[str, torch.Tensor]:
    return {"mask": mask_of(N, which)}


# The sums


def test_sums_are_the_same_however_far_and_with_what_a_batch_is_filled_up() -> None:
    x, here = normal(4, 37, dtype=torch.float32), normal(4, 37, seed=1) > 0
    own, values = Own(x.shape, here), [row[m] for row, m in zip(x, here, strict=True)]
    found = own.sum(torch.where(here, x, math.nan))
    for i, value in enumerate(values):
        assert torch.equal(
            Own((1, len(value)), torch.ones(1, len(value), dtype=torch.bool)).sum(value[None])[0], found[i]
        )
        assert abs(found[i] - value.double().sum()) < 1e-5
    filled, mask = batch_of(values, 64)
    for other in (Own(mask.shape, mask), Own((4, 1, 64), mask[:, None])):
        assert torch.equal(other.sum(filled), found)
        assert torch.equal(other.norm(filled), own.norm(x))
        assert torch.equal(other.mean(filled), own.mean(x))
    assert own.dims.tolist() == [len(value) for value in values]
    assert torch.equal(own.placed(own.rows(x)), own.only(x))
    assert torch.equal(own.rows(torch.stack([x, 2 * x]))[1], 2 * own.rows(x))
    assert own.rows(x)[2, : len(values[2])].equal(values[2])


def test_without_a_mask_all_entries_are_own() -> None:
    x, own = normal(3, 4, 5), Own((3, 4, 5))
    assert (own.dims, own.only(x) is x) == (20, True)
    assert torch.equal(own.sum(x), x.reshape(3, -1).sum(1))
    torch.testing.assert_close(own.norm(x), Own(x.shape, torch.ones(1, 1, 1, dtype=torch.bool)).norm(x))


def test_a_mask_of_sounds_has_the_place_of_their_length() -> None:
    x, mask = batch_of([normal(2, 3), normal(2, 5)], dim=-1)
    assert (x.shape, mask.shape) == ((2, 2, 5), (2, 1, 5))
    assert Own(x.shape, mask).dims.tolist() == [6.0, 10.0]
    assert torch.equal(Own(x.shape, mask).sum(x), Own(x.shape, mask.expand(x.shape)).sum(x))


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(2, 3, dtype=torch.bool), "with as many dimensions"),  # of a square batch it would be a guess
        (torch.ones(2, 3, 1), r"torch.float32 of shape \(2, 3, 1\) for a batch of shape \(2, 3, 3\): expected bool"),
        (torch.ones(2, 2, 1, dtype=torch.bool), r"\(B, N, 1\) for sets"),
        (
            torch.zeros(2, 3, 1, dtype=torch.bool).index_fill_(0, torch.tensor(0), True),
            r"items \[1\] without any entry",
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sample(DENOISER, (2, 3, 3), DDIM(), steps=2, seed=0, cond={"mask": mask})


# Sampling


def test_every_solver_is_exact_in_a_batch_that_is_filled_up() -> None:
    """To the last bit, as the item alone is; where the batch has one step, AdaptiveODE's, as in the same batch."""
    refused = {"ddim-raw-eps", "ode-rk45"}
    for entry in catalogue.available():
        solver = entry.solver

        def drawn(N: int, which: slice = ALL, solver=solver) -> torch.Tensor:
            steps = {} if solver.adaptive else {"steps": 3}
            x = filled(N, which, x=3 * POINTS.float())
            return sample(DENOISER, x, solver, **steps, seed=SEEDS[which], cond=told(N, which)).x

        with named(entry.name):
            if entry.name in refused:
                with pytest.raises(ValueError, match="masks"):
                    drawn(3)
                continue
            found, wide = drawn(3), drawn(6)
            assert torch.equal(found, wide[:, :3])
            assert bool((wide[:, 3:] == 0).all())
            assert bool((found != 0).equal(mask_of(3).expand(3, 3, 2)))
            if entry.name != "ode-dopri5":
                assert torch.equal(drawn(*alone(2))[0], found[2, :2])


OTHERS = {
    "parallel": Parallel(DDPM(), window=4),
    "captured": Captured(DDPM()),
    "milstein": ReverseSDE("srk"),
    "without memory": AdaptiveSDE(rtol=0.2, memory=False),
    "langevin batch": PredictorCorrector(corrector="langevin batch"),
}


@pytest.mark.parametrize("solver", OTHERS)
def test_solvers_around_solvers_are_exact_too(solver: str) -> None:
    """x_T is drawn as well."""

    def drawn(N: int) -> torch.Tensor:
        made = OTHERS[solver]
        steps = {} if made.adaptive else {"steps": 5}
        return sample(DENOISER, (3, N, 2), made, **steps, seed=SEEDS, cond=told(N)).x

    assert torch.equal(drawn(3), drawn(8)[:, :3])


SOURCES = {
    "seeds": lambda: {"seed": SEEDS},
    "one seed": lambda: {"seed": 3},
    "a generator": lambda: {"generator": generator()},
    "by counting": lambda: {"noise": CounterNoise(SEEDS)},
    "a path": lambda: {"seed": SEEDS, "path": True},
}


@pytest.mark.parametrize("source", SOURCES)
def test_noise_is_of_own_entries_in_their_order(source: str) -> None:
    """Wherever in the batch they stand."""
    drawn = [sample(DENOISER, (3, N, 2), DDPM(), steps=4, cond=told(N), **SOURCES[source]()).x for N in (3, 9)]
    assert torch.equal(drawn[0], drawn[1][:, :3])
    last = {"mask": mask_of(5).flip(1)}
    found = sample(DENOISER, (3, 5, 2), DDPM(), steps=4, cond=last, **SOURCES[source]()).x
    for i, n in enumerate(COUNTS):
        assert torch.equal(found[i, 5 - n :], drawn[0][i, :n])
    if source != "a generator":  # which draws for the batch as a whole
        bare = X0Denoiser(lambda x, t: net(x, t, torch.ones_like(x[:, :, :1], dtype=torch.bool)), SDE)
        options = {"seeds": {"seed": [7]}, "by counting": {"noise": CounterNoise([7])}}.get(source)
        if options is not None:  # without a mask, the same numbers
            one = sample(bare, (1, 2, 2), DDPM(), steps=4, **options).x
            assert torch.equal(one[0], drawn[0][2, :2])


def test_the_solution_has_the_mask_and_a_density() -> None:
    solver = UniPC(3, view="v", variable="half_log_snr")
    found = [sample(DENOISER, (3, N, 2), solver, steps=5, seed=SEEDS, cond=told(N), log_prob=True) for N in (3, 5)]
    assert torch.equal(found[0].log_prob, found[1].log_prob)
    assert torch.equal(found[0].log_prob_stderr, found[1].log_prob_stderr)
    assert torch.equal(found[1].mask, mask_of(5).expand(3, 5, 2))
    assert sample(X0Denoiser(lambda x, t: x, SDE), (1, 2), DDIM(), steps=2).mask is None


def test_there_and_back() -> None:
    there = [encode(EXACT, filled(N), UniPC(3), steps=30, cond=told(N), check=True) for N in (3, 5)]
    assert torch.equal(there[0].latent, there[1].latent[:, :3])
    assert torch.equal(there[0].error, there[1].error)
    back = decode(EXACT, there[1].latent, UniPC(3), grid=there[1].grid, cond=told(5)).x
    torch.testing.assert_close(back, filled(5, fill=0.0), rtol=0, atol=1e-2)


def test_langevin_dynamics_and_views_of_own_entries() -> None:
    chains = [langevin(DENOISER, filled(N), 0.5, step_size=0.1, steps=4, seed=SEEDS, cond=told(N)) for N in (3, 7)]
    assert torch.equal(chains[0], chains[1][:, :3])
    for view in (DENOISER.eps, DENOISER.score, DENOISER.velocity):
        assert torch.equal(view(filled(4), 0.5, **told(4))[:, 3], torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(DENOISER(filled(4), 0.0, **told(4)).mean, filled(4, fill=0.0))


# Wrappers


def test_thresholds_are_quantiles_of_own_entries() -> None:
    """And what a wrapper outside would add to what is not there is taken off again."""
    thin = X0Denoiser(lambda x, t, mask: 3 * x, SDE)
    for options in ({}, {"interpolate": True}):
        found = DynamicThreshold(Masked(thin), 0.6, **options)(filled(9), 0.5, **told(9)).mean
        for i in range(3):
            n, which = alone(i)
            one = DynamicThreshold(Masked(thin), 0.6, **options)(filled(n, which), 0.5, **told(n, which)).mean
            assert torch.equal(found[i, :n], one[0])
    away = Clip(DENOISER, 0.5, 1.0)
    assert bool((sample(away, (3, 6, 2), DDIM(), steps=2, seed=0, cond=told(6)).x[:, 3:] == 0).all())


def test_guidance_goes_around_a_masked_denoiser() -> None:
    label = torch.tensor([1, 2, 3])
    for guided in (
        ClassifierFree(DENOISER, 2.0, null={"label": 0}),
        ClassifierFree(DENOISER, 2.0),  # the network is told nothing but its mask
        Energy(DENOISER, lambda x, t: ((x - 1) ** 2).sum((1, 2)), 0.1),
    ):
        runs = [
            sample(guided, (3, N, 2), DDPM(), steps=4, seed=SEEDS, cond=told(N) | {"label": label}).x for N in (3, 6)
        ]
        assert torch.equal(runs[0], runs[1][:, :3])
        assert bool((runs[1][:, 3:] == 0).all())


def test_what_does_not_know_of_masks_refuses_them() -> None:
    cond, x = told(3), filled(3, fill=0.0)
    calls = []
    quiet = Masked(X0Denoiser(lambda x, t, mask: calls.append(0) or x, SDE))
    for refused in (
        lambda: Masked(PiGDM(quiet, lambda x: x, x, 0.1)),
        lambda: Masked(ClassifierFree(quiet, 2.0, rescale=0.5)),
        lambda: sample(ClassifierFree(quiet, 2.0, rule="apg"), x, DDIM(), steps=2, cond=cond),
        lambda: Masked(Latent(quiet, None)),
        lambda: estimate(quiet, x, cond=cond),
        lambda: diagnose(quiet, x, cond=cond),
        lambda: interpolation(quiet, x, x, cond=cond),
        lambda: choose(quiet, (8, 2), nfe=5),
        lambda: SamplerModule(quiet, DDIM(), (3, 3, 2), steps=2),
        lambda: sn_loss(quiet, torch.sin, x, cond=cond),
        lambda: sample(quiet, x, ReverseSDE(adaptive_steps=True), seed=0, cond=cond),
        lambda: sample(quiet, x, AdaptiveODE("LSODA"), cond=cond),
        lambda: log_prob(quiet, x, divergence="hutch++", probes=3, steps=2, cond=cond),
        lambda: Trainer(quiet, x, TrainConfig(steps=1)),
    ):
        with pytest.raises(ValueError, match="mask"):
            refused()
    with pytest.raises(ValueError, match=r"without its mask: pass cond=\{'mask': mask\}"):
        sample(quiet, x, DDIM(), steps=2)
    with pytest.raises(ValueError, match="masks by several conditions, mask, other"):
        sample(Masked(quiet, "other"), x, DDIM(), steps=2, cond=cond)
    assert not calls


def test_variances_of_own_entries() -> None:
    class Known(type(DENOISER)):
        def posterior(self, x, t, /, **cond):
            mean, _ = super().posterior(x, t, **cond)
            return mean, torch.full_like(mean, 0.1)

    known = Masked(Known(X0Denoiser(net, SDE)))
    drawn = [sample(known, (3, N, 2), OptimalVariance(DDPM()), steps=4, seed=SEEDS, cond=told(N)).x for N in (3, 5)]
    assert torch.equal(drawn[0], drawn[1][:, :3])
    assert bool((drawn[1][:, 3:] == 0).all())


# Likelihood

NUMBERS = ("value", "stderr", "dof", "prior", "log_det", "residual", "error")


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 6},
        {"steps": 4, "probes": 2, "mode": "jvp"},
        {"steps": 6, "distribution": "gaussian", "correct": True},
        {"steps": 6, "divergence": "exact"},
        {"divergence": "exact", "rtol": 1e-2, "atol": 1e-2},
        {"probes": 2, "rtol": 1e-2, "atol": 1e-2},
    ],
)
def test_densities_are_those_of_items_alone(options: dict) -> None:
    denoiser = DENOISER if "steps" in options else EXACT  # to take few steps

    def density(N: int, which: slice = ALL):
        return log_prob(denoiser, filled(N, which), cond=told(N, which), seed=SEEDS[which], **options)

    found, wide = density(3), density(8)
    assert found.dims.tolist() == wide.dims.tolist() == [6, 2, 4]
    assert found.nfe == wide.nfe
    for name in NUMBERS:
        torch.testing.assert_close(getattr(wide, name), getattr(found, name), rtol=0, atol=0, equal_nan=True)
    if "steps" in options:  # adaptive ones are of the batch
        one = density(*alone(2))
        for name in NUMBERS:
            torch.testing.assert_close(getattr(one, name), getattr(found, name)[2:], rtol=0, atol=0, equal_nan=True)


def test_densities_of_a_law_of_entries() -> None:
    """Independent entries N(0, 0.25): each item has the sum over its own."""
    each, x = -2 * POINTS**2 - 0.5 * math.log(math.pi / 2), filled(5)
    truth = torch.stack([each[i, :n].sum() for i, n in enumerate(COUNTS)])
    for options in ({"steps": 60}, {}):
        found = log_prob(EXACT, x, divergence="exact", cond=told(5), correct=True, **options)
        torch.testing.assert_close(found.value, truth, rtol=0, atol=2e-3)
    bound = elbo(EXACT, x, draws=512, seed=0, cond=told(5))
    assert bool(((bound.value - truth).abs() < 6 * bound.stderr + 1e-2).all())
    torch.testing.assert_close(bound.bits_per_dim, -bound.value / (found.dims * math.log(2)))


@pytest.mark.parametrize("chain", [False, True])
def test_bounds_are_those_of_items_alone(chain: bool) -> None:
    of = {"solver": DDPM(), "grid": Grid.power(SDE, 5), "draws": 2} if chain else {"draws": 8}

    def bound(N: int, which: slice = ALL, **options):
        return elbo(DENOISER, filled(N, which), cond=told(N, which), seed=SEEDS[which], **of, **options)

    for options in ({}, {"levels": 32, "data_range": (-4.0, 4.0)}):
        found, wide, one = bound(3, **options), bound(6, **options), bound(*alone(2), **options)
        for name in ("value", "stderr", "dof", "prior", "denoising", "reconstruction", "dim"):
            assert torch.equal(getattr(found, name), getattr(wide, name))
            torch.testing.assert_close(getattr(one, name), getattr(found, name)[2:])
        assert found.dim.tolist() == [6, 2, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "exact", "importance": 2},
        {"dequantize": "truncated-normal", "repeats": 2},
        {"dequantize": "none"},
    ],
)
def test_bits_are_per_own_dimension(options: dict) -> None:
    levels = torch.randint(0, 16, (3, 3, 2), generator=generator())

    def bits(N: int, which: slice = ALL, fill: int = -7):
        y = torch.full((3, N, 2), fill)
        y[:, : min(N, 3)] = levels[:, :N]
        y = torch.where(mask_of(N), y, fill)[which]
        return bits_per_dim(
            DENOISER, y, 16, steps=4, seed=SEEDS[which], cond=told(N, which), dtype=torch.float64, **options
        )

    found, wide, one = bits(3), bits(5, fill=99), bits(*alone(2))
    assert found.dims.tolist() == [6, 2, 4]
    for name in ("per_image", "per_image_stderr", "probe_stderr"):
        torch.testing.assert_close(getattr(wide, name), getattr(found, name), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(getattr(one, name), getattr(found, name)[2:], rtol=0, atol=0, equal_nan=True)
    assert found.value == float(found.per_image.mean())


# Training


def test_the_loss_of_an_item_is_that_of_it_alone() -> None:
    eps = normal(3, 3, 2, seed=4)
    for given in ({"t": TIMES, "noise": eps}, {}):

        def loss(N: int, which: slice = ALL, given=given):
            fixed = {} if not given else {"t": given["t"][which], "noise": filled(N, which, x=given["noise"])}
            draws = {} if given else {"generator": Part(generator(), which.start or 0, 3)}
            cond = told(N, which)
            return dsm_loss(DENOISER, filled(N, which), cond=cond, reduction="none", **fixed, **draws)

        found = loss(3)
        assert torch.equal(loss(8), found)
        for i in range(3):
            assert torch.equal(loss(*alone(i)), found[i : i + 1])
    x_0, x_t = POINTS[1, :1], SDE.alpha(TIMES[1]) * POINTS[1, :1] + SDE.sigma(TIMES[1]) * eps[1, :1]
    mean = net(x_t[None], TIMES[1:2].double(), torch.ones(1, 1, 1, dtype=torch.bool))[0]
    simple = (SDE.alpha(TIMES[1].double()) / SDE.sigma(TIMES[1].double())) ** 2 * ((mean - x_0) ** 2).mean()
    torch.testing.assert_close(dsm_loss(DENOISER, filled(3), t=TIMES, noise=filled(3, x=eps), cond=told(3),
                                        reduction="none")[1], simple, rtol=1e-5, atol=1e-6)  # fmt: skip


def test_nothing_told_keeps_the_mask() -> None:
    cond = told(3) | {"label": torch.tensor([1, 2, 3])}
    both = two_term_loss(DENOISER, filled(3), cond, unconditional=0.5, num_classes=4, generator=generator())
    parts = [
        dsm_loss(DENOISER, filled(3), cond=told(3) | {"label": label}, generator=generator())
        for label in (cond["label"], torch.full((3,), 4))
    ]
    torch.testing.assert_close(both, parts[0] + 0.5 * parts[1])
    with pytest.raises(ValueError, match="no condition to leave out"):
        two_term_loss(DENOISER, filled(3), told(3), unconditional=0.5)


def set_transformer() -> SetTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SetTransformer(2, width=16, depth=2, heads=2, num_classes=2)
        for parameter in network.parameters():  # the last layers start at zero
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def test_a_set_network_sees_sets() -> None:
    """Permuted as its points are; not what is not there, but for the order in which torch adds up."""
    network, x, time = set_transformer().double(), filled(3, fill=5.0), torch.tensor([1.0, 30.0, 500.0]).double()
    out = network(x, time, mask=mask_of(3))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(network(x[:, order], time, mask=mask_of(3)[:, order]), out[:, order])
    wide = network(filled(7, fill=-9.0), time, mask=mask_of(7))
    for i, n in enumerate(COUNTS):
        torch.testing.assert_close(wide[i, :n], out[i, :n])
        torch.testing.assert_close(network(x[i : i + 1, :n], time[i : i + 1])[0], out[i, :n])
    for wrong in (mask_of(3)[..., 0], mask_of(2), mask_of(3).double()):
        with pytest.raises(ValueError, match=r"expected bool \(3, 3, 1\), True where a point exists"):
            network(x, time, mask=wrong)
    masked = Masked(EpsDenoiser(network, SDE))
    drawn = [sample(masked, filled(5, fill=f), DDPM(), steps=4, seed=SEEDS, cond=told(5)).x for f in (0.0, math.nan)]
    assert torch.equal(*drawn)
    density = [log_prob(masked, filled(5, fill=f), steps=4, seed=SEEDS, cond=told(5)) for f in (0.0, math.inf)]
    assert torch.equal(density[0].value, density[1].value)


def test_conditions_of_sets_are_encoded_once() -> None:
    calls = []
    encoder = torch.nn.Linear(3, 4)
    encoder.register_forward_hook(lambda *_: calls.append(0))
    network = Encoding(SetTransformer(2, width=8, depth=1, heads=1, vector=4), {"source": encoder})
    cond = {"source": normal(3, 3, dtype=torch.float32)}
    masked = Masked(EpsDenoiser(network.eval(), SDE))
    for denoiser in (masked, Clip(masked)):
        calls.clear()
        runs = [sample(denoiser, (3, N, 2), DDPM(), steps=4, seed=SEEDS, cond=told(N) | cond).x for N in (3, 5)]
        assert len(calls) == 2
        torch.testing.assert_close(runs[0], runs[1][:, :3])


def test_a_trainer_of_sets() -> None:
    data, mask = filled(3, x=POINTS.float(), fill=0.0).repeat(4, 1, 1), mask_of(3).repeat(4, 1, 1)
    config = TrainConfig(steps=3, batch_size=6)
    losses = []
    for fill in (0.0, 7.0):
        filled_up = torch.where(mask, data, fill)
        model = EpsDenoiser(set_transformer(), SDE)
        trainer = Trainer(model, filled_up, config, cond={"mask": mask}, loss=masked_loss())
        trainer.fit(progress=False)
        losses.append([p.detach().clone() for p in model.net.parameters()])
    assert all(map(torch.equal, *losses))
    with pytest.raises(ValueError, match="for masks give that in it, with loss=masked_loss"):
        Trainer(Masked(model), data, config, cond={"mask": mask})


def test_sets_are_compared_by_features_of_their_points() -> None:
    """Not by what fills up their batch, nor their order; by their number too."""
    space = SetFeatures(2, width=32, features=16)
    found = space(filled(3), mask_of(3))
    torch.testing.assert_close(space(filled(6, fill=5.0).flip(1), mask_of(6).flip(1)), found)
    torch.testing.assert_close(space(POINTS[:1]), found[:1])
    draws, counts = normal(600, 4, 2), torch.randint(1, 5, (600,), generator=generator())
    mask = (torch.arange(4) < counts[:, None])[..., None]
    first, second = (space(draws[half], mask[half]) for half in (slice(300), slice(300, 600)))
    more = space(draws[:300])
    assert energy_distance(first, second) < 0.5 * energy_distance(first, more)
    with pytest.raises(ValueError, match=r"expected sets of points \(B, N, 2\)"):
        space(POINTS[0])
