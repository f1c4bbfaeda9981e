"""Models over time: roll-outs of an exact conditional have their law, paths depend on their own seed alone, scaling is
equivariant, states in pieces are those of the whole, training resumes, and scores are those of closed forms.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scoresde import VPSDE, Latent, VDenoiser, log_prob
from scoresde.codecs import Shift
from scoresde.data import context_scale, step_inputs, windows
from scoresde.exact import Gaussian
from scoresde.forecasting import rollout, step_log_prob
from scoresde.guidance import Conditioned
from scoresde.nn import MLP, CausalTransformer, Recurrent, Stepwise
from scoresde.solvers import DDIM, DDPM, UniPC
from scoresde.training import TrainConfig, Trainer, step_loss

SDE = VPSDE()
A = torch.tensor([[0.7, 0.2], [-0.3, 0.5]], dtype=torch.float64)
Q = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)
EXACT = Latent(
    Conditioned(Gaussian(mean=[0.0, 0.0], cov=Q.tolist()).denoiser(SDE), drop="vector"), Shift(lambda vector: vector)
)


def var_state(inputs: Tensor, memory: None = None) -> tuple[Tensor, None]:
    """The mean of the next x, A x."""
    return inputs @ A.to(inputs).T, None


def stepwise(seed: int = 0, covariates: int = 0, state: str = "gru", scaled: bool = True) -> VDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        kind = {"gru": Recurrent, "transformer": lambda c, w: CausalTransformer(c, w, depth=2, heads=2, reach=3)}[state]
        net = Stepwise(MLP(2, width=8, depth=1, vector=6), kind(2 + covariates, 6), scaled=scaled)
        for parameter in net.parameters():  # the last layer starts at zero, where nothing would be seen
            torch.nn.init.normal_(parameter, std=0.4)
    return VDenoiser(net, SDE, time=lambda t: 999 * t)


def series(B: int, L: int, d: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(B, L, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- roll-outs ----


def test_rollouts_of_the_exact_conditional_have_its_law():
    """x_{L+h-1} ~ N(A^h x, sum_{j<h} A^j Q A^j'): at 4.5 standard errors of 3000 paths, beside what is left of the
    solver's error at 8 steps (2 %)."""
    past, n, H = series(1, 3), 3000, 3
    found = rollout(EXACT, past, H, UniPC(3), paths=n, steps=8, seed=5, state=var_state).x[0]
    mean, cov = past[0, -1], torch.zeros(2, 2, dtype=torch.float64)
    for h in range(H):
        mean, cov = A @ mean, A @ cov @ A.T + Q
        at = 4.5 / math.sqrt(n)
        std = cov.diagonal().sqrt()
        assert ((found[:, h].mean(0) - mean).abs() < (at + 0.02) * std).all()
        error = (found[:, h].T.cov() - cov).abs()
        assert (error < (math.sqrt(2) * at + 0.02) * std[:, None] * std).all()
    before, after = found[:, 0] - found[:, 0].mean(0), found[:, 1] - found[:, 1].mean(0)
    torch.testing.assert_close(after.T @ before / n, A @ Q, atol=4.5 * 1.5 / math.sqrt(n) + 0.03, rtol=0)


@pytest.mark.parametrize("state", ["gru", "transformer"])
def test_a_path_is_its_seeds_alone(state):
    """Whatever the batch, the number of paths and the horizon: to rounding."""
    denoiser, past, c = stepwise(covariates=1, state=state), series(3, 9), series(3, 14, 1, seed=1)

    def paths(which, seeds, paths, horizon):
        known = c[which, : 9 + horizon]
        return rollout(denoiser, past[which], horizon, DDPM(), paths=paths, steps=3, seed=seeds, covariates=known).x

    whole = paths(slice(None), [7, 8, 9], 5, 5)
    torch.testing.assert_close(paths(slice(1, 3), [8, 9], 2, 3), whole[1:, :2, :3], atol=1e-5, rtol=1e-5)
    assert torch.equal(paths(slice(None), [7, 8, 9], 5, 5), whole)
    assert (whole[0, 0] - whole[0, 1]).abs().min() > 1e-3  # paths of a series differ
    twice = rollout(denoiser, past[:1].repeat(2, 1, 1), 2, DDIM(), paths=2, steps=2, seed=3, state=lambda u, m: (
        torch.zeros(*u.shape[:2], 6, dtype=u.dtype), None)).x  # fmt: skip
    assert (twice[0] - twice[1]).abs().min() > 1e-4  # and so do series under one seed


def test_a_step_has_noise_of_its_own():
    """The same numbers at each step would raise no error: x_1 - A x_0 and x_2 - A x_1 are independent."""
    x = rollout(EXACT, series(1, 2), 2, DDIM(), paths=1000, steps=8, seed=0, state=var_state).x[0]
    first, second = x[:, 0] - x[:, 0].mean(0), x[:, 1] - x[:, 0] @ A.T
    assert (torch.corrcoef(torch.cat([first, second], 1).T)[:2, 2:].abs() < 4.5 / math.sqrt(1000)).all()


@pytest.mark.parametrize("factor", [2.0**-7, 2.0**20])
def test_scaling_is_equivariant(factor):
    """Of a power of two to the last bit; densities by the volume."""
    denoiser, x = stepwise(), series(2, 8)
    made = rollout(denoiser, x, 3, DDPM(), paths=3, steps=4, seed=1).x
    assert torch.equal(rollout(denoiser, factor * x, 3, DDPM(), paths=3, steps=4, seed=1).x, factor * made)
    options = {"steps": 8, "divergence": "exact"}
    value = step_log_prob(denoiser, x, 5, **options).value
    other = step_log_prob(denoiser, factor * x, 5, **options).value
    torch.testing.assert_close(other, value - 2 * math.log(factor), atol=1e-8, rtol=0)
    loss = step_loss(5)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(loss(denoiser, (factor * x).float(), draws[0], {}), loss(denoiser, x.float(), draws[1], {}))


def test_the_scale_is_of_the_context_alone():
    x = series(1, 6)
    later = x.clone()
    later[:, 5:] *= 100
    assert torch.equal(context_scale(x[:, :5]), context_scale(later[:, :5]))
    options = {"steps": 4, "divergence": "exact"}
    denoiser = stepwise()
    torch.testing.assert_close(
        step_log_prob(denoiser, later, 4, **options).value[:, 0], step_log_prob(denoiser, x, 4, **options).value[:, 0]
    )
    zeros = torch.zeros(1, 4, 2, dtype=torch.float64)
    assert rollout(denoiser, zeros, 2, DDIM(), paths=2, steps=2, seed=0).x.isfinite().all()


def test_step_log_prob_is_that_of_the_conditional():
    """Of the exact VAR's normal law, and, scaled, of the law of z with its volume."""
    x = series(3, 6, seed=2)
    found = step_log_prob(EXACT, x, 2, state=var_state, steps=60, divergence="exact")
    law = torch.distributions.MultivariateNormal(x[:, 1:-1] @ A.T, Q)
    torch.testing.assert_close(found.value, law.log_prob(x[:, 2:]), atol=2e-3, rtol=0)
    assert found.stderr.shape == (3, 4)
    denoiser, s = stepwise(), context_scale(x[:, :4])
    net = denoiser.net
    vector = net.encode(past=(x / s)[:, :-1])["vector"]
    z = log_prob(denoiser, (x / s)[:, -1], steps=6, divergence="exact", cond={"vector": vector})
    last = step_log_prob(denoiser, x, 4, steps=6, divergence="exact").value[:, -1]
    torch.testing.assert_close(last, z.value - s.log().sum((1, 2)), atol=1e-4, rtol=0)


def test_step_log_prob_has_an_error_bar():
    """With one probe in three dimensions; and a step's probes are its series' seed and its place alone."""
    net = Stepwise(MLP(3, width=8, depth=1, vector=6), Recurrent(3, 6))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(0))
    denoiser, x = VDenoiser(net, SDE), series(2, 6, 3)
    both = step_log_prob(denoiser, x, 4, steps=6, seed=[1, 2])
    assert (both.stderr > 0).all()
    torch.testing.assert_close(
        step_log_prob(denoiser, x[1:], 4, steps=6, seed=[2]).value, both.value[1:], atol=1e-5, rtol=0
    )


# ---- networks of states ----


@pytest.mark.parametrize("kind", [Recurrent(3, 8, 2), CausalTransformer(3, 8, depth=3, heads=2, reach=4)])
def test_states_in_pieces_are_those_of_the_whole_and_see_no_future(kind):
    inputs = series(2, 20, 3).float()
    with torch.no_grad():
        whole, _ = kind(inputs)
        memory, pieces = None, []
        for part in inputs.split([7, 1, 1, 4, 7], 1):
            states, memory = kind(part, memory)
            pieces.append(states)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-6, rtol=1e-5)
        changed = inputs.clone()
        changed[:, 12:] += 10
        assert torch.equal(kind(changed)[0][:, :12], whole[:, :12]) or torch.allclose(
            kind(changed)[0][:, :12], whole[:, :12], atol=1e-6
        )
        assert not torch.allclose(kind(changed)[0][:, 12], whole[:, 12], atol=1e-3)


def test_a_transformer_reaches_as_far_as_it_says():
    kind, inputs = CausalTransformer(1, 8, depth=2, heads=2, reach=4), series(1, 12, 1).float().requires_grad_()
    (gradient,) = torch.autograd.grad(kind(inputs)[0][0, -1, 0], inputs)
    assert (gradient[0, : 11 - 6] == 0).all()
    assert (gradient[0, 11 - 6 :] != 0).all()


def test_a_past_of_zeros_is_a_past():
    """Encoding takes zeros for nothing, and would replace the state."""
    net = stepwise().net
    zeros = torch.zeros(1, 4, 2)
    assert torch.equal(net.encode(past=zeros)["vector"], net.state(zeros)[0][:, -1])
    assert net.encode(past=zeros)["vector"].abs().min() > 0


# ---- training ----


def test_the_loss_is_that_of_each_step_given_those_before_it():
    denoiser, x, c = stepwise(covariates=1), series(3, 7).float(), series(3, 7, 1, seed=4).float()
    got = step_loss(4)(denoiser, x, torch.Generator().manual_seed(0), {"covariates": c})
    from scoresde.training import dsm_loss

    z = x / context_scale(x[:, :4])
    states = [denoiser.net.encode(past=step_inputs(z[:, :k], c[:, : k + 1]))["vector"] for k in range(4, 7)]
    flat = torch.stack(states, 1).flatten(0, 1)
    options = {"generator": torch.Generator().manual_seed(0), "cond": {"vector": flat}}
    torch.testing.assert_close(got, dsm_loss(denoiser, z[:, 4:].flatten(0, 1), **options))


def test_covariates_are_of_the_step_to_come():
    values, c = series(1, 3), torch.arange(4.0)[None, :, None]
    assert step_inputs(values, c)[0, :, -1].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="one for the step to come"):
        step_inputs(values, c[:, :3])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_that_was_killed_goes_on(tmp_path, accumulate):
    """To the last bit; and a batch in parts has the losses of the whole."""
    pytest.importorskip("safetensors")
    x, c = series(12, 8).float(), series(12, 8, 1, seed=1).float()

    def run(folder, steps):
        config = TrainConfig(
            steps=steps, batch_size=4, lr=1e-2, warmup=0, schedule="constant", checkpoint_every=2, threads=1,
            log_every=1, accumulate=accumulate,
        )  # fmt: skip
        trainer = Trainer(stepwise(covariates=1), x, config, cond={"covariates": c}, loss=step_loss(5), folder=folder)
        return trainer.fit(progress=False)

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "killed", 3)
    again = run(tmp_path / "killed", 6)
    for a, b in zip(whole.denoiser.net.parameters(), again.denoiser.net.parameters(), strict=True):
        assert torch.equal(a, b)
    start = stepwise(covariates=1).net.state.gru.weight_ih_l0
    assert not torch.equal(whole.ema.net.state.gru.weight_ih_l0, start)  # the state's network is trained along
    losses = [loss for _, loss in whole.losses]
    if accumulate == 2:
        single = Trainer(stepwise(covariates=1), x, TrainConfig(steps=1, batch_size=4, threads=1, log_every=1),
                         cond={"covariates": c}, loss=step_loss(5)).fit(progress=False)  # fmt: skip
        assert single.losses[0][1] == pytest.approx(losses[0], rel=1e-5)


def test_training_under_autocast_has_states():
    config = TrainConfig(steps=1, batch_size=4, precision="bfloat16", threads=1, log_every=1)
    x = 50 * series(4, 8).float()
    for scaled in (True, False):
        half = Trainer(stepwise(scaled=scaled), x, config, loss=step_loss(5)).fit(progress=False)
        whole = Trainer(stepwise(scaled=scaled), x, replace(config, precision="float32"), loss=step_loss(5))
        assert half.losses[0][1] == pytest.approx(whole.fit(progress=False).losses[0][1], rel=0.02)


def test_weights_bring_their_scaling():
    """Rolled out otherwise than trained, a model would raise no error."""
    unscaled = stepwise(scaled=False)
    other = stepwise()
    other.net.load_state_dict(unscaled.net.state_dict())
    past = series(2, 6)
    made = [rollout(d, past, 2, DDIM(), paths=2, steps=2, seed=0).x for d in (unscaled, other, stepwise())]
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2])
    losses = []
    for denoiser in (unscaled, other, stepwise()):
        losses.append(step_loss(4)(denoiser, past.float(), torch.Generator().manual_seed(0), {}).item())
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(ValueError, match="was made with scaled=False"):
        rollout(other, past, 2, DDIM(), steps=2, scaled=True)


def test_other_conditions_are_of_the_series():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = Stepwise(MLP(2, width=8, depth=1, vector=6, num_classes=3), Recurrent(2, 6))
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    denoiser, past, label = VDenoiser(net, SDE), series(3, 6), torch.tensor([0, 1, 2])
    whole = rollout(denoiser, past, 2, DDIM(), paths=2, steps=2, seed=[1, 2, 3], cond={"label": label}).x
    alone = rollout(denoiser, past[2:], 2, DDIM(), paths=2, steps=2, seed=[3], cond={"label": 2}).x
    torch.testing.assert_close(alone[0], whole[2], atol=1e-5, rtol=1e-5)
    options = {"steps": 4, "divergence": "exact"}
    both = step_log_prob(denoiser, past, 4, cond={"label": label}, **options).value
    torch.testing.assert_close(
        step_log_prob(denoiser, past[2:], 4, cond={"label": 2}, **options).value, both[2:], atol=1e-5, rtol=0
    )
    step_loss(4)(denoiser, past.float(), torch.Generator(), {"label": label}).backward()


# ---- mistakes ----


def test_mistakes_are_named():
    denoiser, x = stepwise(), series(2, 6)
    with pytest.raises(ValueError, match=r"of one, x\[None\]"):
        rollout(denoiser, x[0], 2, DDIM(), steps=2)
    with pytest.raises(ValueError, match="series 1 are not finite"):
        rollout(denoiser, torch.cat([x[:1], x[1:] * math.nan]), 2, DDIM(), steps=2)
    with pytest.raises(ValueError, match="no network of states"):
        rollout(VDenoiser(MLP(2, width=8), SDE), x, 2, DDIM(), steps=2)
    with pytest.raises(ValueError, match="no states: its network"):
        step_loss(3)(VDenoiser(MLP(2, width=8), SDE), x.float(), torch.Generator(), {})
    with pytest.raises(ValueError, match=r"past and horizon, 6 \+ 2"):
        rollout(stepwise(covariates=1), x, 2, DDIM(), steps=2, covariates=series(2, 6, 1))
    with pytest.raises(ValueError, match="more than context=6"):
        step_log_prob(denoiser, x, 6)
    with pytest.raises(ValueError, match=r"L > context=6"):
        step_loss(6)(denoiser, x.float(), torch.Generator(), {})
    with pytest.raises(ValueError, match="each says the state"):
        denoiser.net.encode(past=x, vector=x)
    with pytest.raises(ValueError, match=r"expected \(L, d\)"):
        windows(torch.zeros(5), 3)


# ---- scores ----


def normal_crps(mean: Tensor, std: Tensor, y: Tensor) -> Tensor:
    """Of N(mean, std^2): std (w (2 Phi(w) - 1) + 2 phi(w) - 1 / sqrt(pi)) (Gneiting et al., 2005)."""
    w, law = (y - mean) / std, torch.distributions.Normal(0.0, 1.0)
    return std * (w * (2 * law.cdf(w) - 1) + 2 * law.log_prob(w).exp() - 1 / math.sqrt(math.pi))


def test_crps_is_the_closed_form_of_a_gaussian():
    """4 standard errors of the mean of 2000 scores of few paths; the unfair one is above it by E|X - X'| / (2 M)."""
    pytest.importorskip("scoringrules", reason="scores are those of scoringrules")
    from scoresde.metrics import crps, crps_sum

    n, M = 2000, 10
    z = series(n, M, 1, seed=3)
    y, std = series(n, 1, 1, seed=4)[:, 0], torch.tensor(2.0, dtype=torch.float64)
    truth, paths = 1 + 3 * y, 1 + std * z
    gap = crps(paths, truth) - normal_crps(torch.ones_like(truth), std, truth)
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(n)
    bias = crps(paths, truth, fair=False) - crps(paths, truth)
    expected = float(2 * std / math.sqrt(math.pi)) / (2 * M)
    assert abs(bias.mean() - expected) < 4 * bias.std() / math.sqrt(n)
    two = torch.stack([paths, z], -1), torch.stack([truth, y], -1)
    torch.testing.assert_close(crps_sum(*two), crps(two[0].sum(-1), two[1].sum(-1)))


def test_scores_are_their_definitions():
    """Over all pairs, by hand."""
    pytest.importorskip("scoringrules", reason="scores are those of scoringrules")
    from scoresde.metrics import crps, energy_score

    paths, truth = series(3, 5, 4), series(3, 4, 1)[..., 0]
    for fair in (True, False):
        pairs = 5 * 4 if fair else 5 * 5
        apart = (paths[:, :, None] - paths[:, None]).abs().sum((1, 2)) / pairs
        expected = (paths - truth[:, None]).abs().mean(1) - apart / 2
        torch.testing.assert_close(crps(paths, truth, fair=fair), expected)
        apart = (paths[:, :, None] - paths[:, None]).norm(dim=-1).sum((1, 2)) / pairs
        expected = (paths - truth[:, None]).norm(dim=-1).mean(1) - apart / 2
        torch.testing.assert_close(energy_score(paths, truth, fair=fair), expected)
    one = energy_score(paths[..., :1], truth[:, :1])
    torch.testing.assert_close(one, crps(paths, truth)[:, 0])


@pytest.mark.parametrize(("M", "level"), [(9, 0.8), (12, 0.75), (100, 0.9), (3, 0.0)])
def test_intervals_cover_their_level(M, level):
    """Of any law, here the exponential one; 4.5 standard errors of 8000 intervals. Between neighbours, where k is no
    whole number, within 2 % more."""
    from scoresde.metrics import coverage

    x = torch.rand(8000, M + 1, generator=torch.Generator().manual_seed(M), dtype=torch.float64).log().neg()
    found = coverage(x[:, 1:], x[:, 0], level).double().mean()
    whole = abs((1 - level) * (M + 1) / 2 % 1 - 0.5) > 0.499
    assert abs(found - level) < 4.5 * math.sqrt(max(level * (1 - level), 1e-12) / 8000) + (0 if whole else 0.02)


def test_mistakes_in_scores_are_named():
    from scoresde.metrics import coverage

    with pytest.raises(ValueError, match=r"level 0\.9 of 10 paths"):
        coverage(torch.zeros(2, 10), torch.zeros(2))
    for paths, truth in itertools.product([torch.zeros(2, 1), torch.zeros(2, 30, 3)], [torch.zeros(2)]):
        with pytest.raises(ValueError, match=r"expected \(B, M"):
            coverage(paths, truth)
    with pytest.raises(ValueError, match="paths 1 are not finite"):
        coverage(torch.tensor([[0.0] * 30, [math.nan] * 30]), torch.zeros(2))
