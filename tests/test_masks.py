"""Masks per sample: sample i is restored by its own mask as it is alone, by every method; and what a tensor's first
dimension is, is never guessed."""

import pytest
import torch
from common import every_pair, normal

from scoresde import VPSDE, EpsDenoiser, sample
from scoresde.editing import sdedit
from scoresde.guidance import DDNM, DPS, MomentMatching, PiGDM, RePaint, Replacement, TwistedSMC
from scoresde.guidance.operators import Blur, FourierSampling, Grey, Mask
from scoresde.solvers import DDIM, DDPM, UniPC

B, SDE = 2, VPSDE()
EVENT = (B, 4, 4)  # as many channels as samples
WHOLE = torch.rand(B, *EVENT, generator=torch.Generator().manual_seed(0)) < 0.5
PLANE, LINES = WHOLE[:, 0], torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0]])
DENOISER = EpsDenoiser(lambda x, t: torch.sin(x + 0.3 * x.roll(1, -1) + t.to(x)[:, None, None, None]), SDE)
X, SEEDS = normal(B, *EVENT), [3, 8]

OPERATORS = {
    "events": lambda i: Mask(WHOLE[i], per_sample=True),
    "planes": lambda i: Mask(PLANE[i], per_sample=True),
    "planes with a channel": lambda i: Mask(PLANE[i, None], per_sample=True),
    "columns": lambda i: FourierSampling(LINES[i], per_sample=True),
    "of grey": lambda i: Mask(PLANE[i], per_sample=True) @ Grey((1.0, 2.0)),
    "of a blur": lambda i: Mask(PLANE[i], per_sample=True) @ Blur(0.5),
}
METHODS = {
    "ddnm": lambda A, y, i: (DDNM(DENOISER, A, y), UniPC(3)),
    "ddnm noisy": lambda A, y, i: (DDNM(DENOISER, A, y, 0.2), UniPC(3)),
    "replacement": lambda A, y, i: (DENOISER, Replacement(DDPM(), A, y)),
    "repaint": lambda A, y, i: (DENOISER, RePaint(A, y, jump=2, resamplings=2)),
    "dps": lambda A, y, i: (DPS(DENOISER, A, y, 0.1), DDIM()),
    "pigdm": lambda A, y, i: (PiGDM(DENOISER, A, y, 0.3), DDIM()),
    "mmps": lambda A, y, i: (MomentMatching(DENOISER, A, y, 0.3), DDIM()),
}


@every_pair(method=list(METHODS), operator=list(OPERATORS), of_one=[False, True])
def test_each_sample_has_its_own_mask_by_every_method(method: str, operator: str, of_one: bool) -> None:
    """Of one: a measurement of one entry is that of all samples."""

    def restored(which):
        A = OPERATORS[operator](which)
        y = OPERATORS[operator](slice(B))(X[:1].expand_as(X) if of_one else X)
        y = y[:1] if of_one else y[which]
        denoiser, solver = METHODS[method](A, y, which)
        return sample(denoiser, 0.5 * X[which], solver, steps=4, seed=SEEDS[which]).x

    both = restored(slice(B))
    assert bool(both.isfinite().all())
    for i in range(B):
        torch.testing.assert_close(both[i : i + 1], restored(slice(i, i + 1)), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(both[0], both[1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_per_sample_is_those_of_its_samples(operator: str) -> None:
    A, y = OPERATORS[operator](slice(B)), OPERATORS[operator](slice(B))(X)
    says, inverse, residual = A.informative(y), A.pseudo_inverse(y), A.residual(X + 1, y)
    assert (A.samples, says.shape) == (B, (B,))
    for i in range(B):
        one, x = A.of(torch.tensor([i])), X[i : i + 1]
        torch.testing.assert_close(one(x)[0], y[i])
        torch.testing.assert_close(one.pseudo_inverse(y[i : i + 1])[0], inverse[i])
        torch.testing.assert_close(one.residual(x + 1, y[i : i + 1])[0], residual[i])
        assert int(one.informative(y[i : i + 1])) == int(says[i])
    with pytest.raises(ValueError, match="is of 2 samples, and the batch has 3"):
        A(normal(3, *EVENT))


def test_what_may_be_per_sample_or_per_channel_is_to_be_said() -> None:
    calls = []
    denoiser = EpsDenoiser(lambda x, t: calls.append(0) or x, SDE)
    for refused in (
        lambda: Mask(PLANE)(X),
        lambda: FourierSampling(PLANE)(X),
        lambda: DDNM(denoiser, Mask(PLANE), X)(X, 0.5),
        lambda: PiGDM(denoiser, Mask(PLANE), X, 0.1)(X, 0.5),
        lambda: DPS(denoiser, Mask(PLANE), X)(X, 0.5),
        lambda: sample(denoiser, X, Replacement(DDPM(), PLANE, X), steps=2, seed=0),
        lambda: sample(denoiser, X, RePaint(PLANE, X[:1]), steps=2, seed=0),
        lambda: sdedit(denoiser, X, DDPM(), strength=0.5, steps=2, seed=0, mask=PLANE),
        lambda: DDNM(denoiser, Mask(PLANE) @ Blur(0.5), X)(X, 0.5),
    ):
        with pytest.raises(ValueError, match="may be one per sample or one for all: say which"):
            refused()
    assert not calls
    assert torch.equal(Mask(PLANE, per_sample=False)(X), torch.where(PLANE, X, 0.0))
    assert torch.equal(Mask(PLANE)(X[:1]), torch.where(PLANE, X[:1], 0.0))
    same = PLANE[:1].expand(B, 4, 4)  # where it makes no difference
    assert torch.equal(Mask(same)(X), Mask(same, per_sample=True)(X))
    with pytest.raises(ValueError, match="one per sample is said by"):
        Mask(normal(3, 4, 4) > 0)(normal(3, *EVENT))


def test_a_tensor_with_a_batch_dimension_is_a_mask_per_sample() -> None:
    found = sample(DENOISER, X, Replacement(DDPM(), PLANE[:, None], X), steps=3, seed=0).x
    expected = sample(DENOISER, X, Replacement(DDPM(), Mask(PLANE, per_sample=True), X), steps=3, seed=0).x
    assert torch.equal(found, expected)
    known = PLANE[:, None].expand_as(X)
    assert torch.equal(found[known], X[known])
    edits = [
        sdedit(DENOISER, X, DDPM(), strength=0.5, steps=4, seed=0, mask=mask).x
        for mask in (PLANE[:, None], Mask(PLANE, per_sample=True))
    ]
    assert torch.equal(*edits)
    assert torch.equal(edits[0][known], X[known])


def test_particles_of_a_group_have_one_mask() -> None:
    guided = PiGDM(DENOISER, Mask(PLANE, per_sample=True), 0 * X[:1], 0.3)
    with pytest.raises(ValueError, match="mask differs within a group of 2"):
        sample(guided, X, TwistedSMC(particles=2), steps=2, seed=0)
    twice = PiGDM(DENOISER, Mask(PLANE.repeat_interleave(2, 0), per_sample=True), 0 * X[:1], 0.3)
    assert sample(twice, torch.cat([X, X]), TwistedSMC(particles=2), steps=2, seed=0).x.isfinite().all()
