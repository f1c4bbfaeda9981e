"""Monotonic alignment against all alignments there are."""

import itertools
import math

import pytest
import torch

from scoresde.nn import aligned, monotonic_durations


def all_durations(tokens, frames):
    """Every way to give each of the tokens at least one of the frames."""
    for cuts in itertools.combinations(range(1, frames), tokens - 1):
        yield [b - a for a, b in itertools.pairwise([0, *cuts, frames])]


def score(scores, durations):
    A = aligned(torch.tensor([durations]), scores.shape[1])[0]
    return float((scores.double() * A.T).nan_to_num(0.0).sum()) if not scores.isinf().any() else float(
        scores.double()[A.T].sum()
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "frames"), [(1, 1), (1, 5), (3, 3), (3, 7), (4, 8), (2, 6)])
def test_it_is_the_best_of_all_alignments(tokens, frames):
    for seed in range(10):
        scores = torch.randn(1, tokens, frames, generator=torch.Generator().manual_seed(seed))
        found = monotonic_durations(scores)[0].tolist()
        best = max(all_durations(tokens, frames), key=lambda d: score(scores[0], d))
        assert found == best


def test_ties_begin_late_and_what_is_forbidden_is_not_taken():
    assert monotonic_durations(torch.zeros(1, 3, 6)).tolist() == [[4, 1, 1]]
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randn(1, 3, 6, generator=g)
        scores[torch.rand(1, 3, 6, generator=g) < 0.25] = -math.inf
        ways = {tuple(d): score(scores[0], d) for d in all_durations(3, 6)}
        if max(ways.values()) > -math.inf:
            assert tuple(monotonic_durations(scores)[0].tolist()) == max(ways, key=ways.get)
        else:
            with pytest.raises(ValueError, match="no alignment of items 0 has a finite score"):
                monotonic_durations(scores)


def test_an_item_is_the_same_in_any_batch_whatever_is_beyond_its_lengths():
    g = torch.Generator().manual_seed(0)
    sizes = [(2, 9), (5, 5), (1, 3), (4, 11)]
    batch = torch.full((4, 5, 11), math.nan)
    alone = [torch.randn(1, n, t, generator=g, dtype=torch.float32) for n, t in sizes]
    for row, own in zip(batch, alone, strict=True):
        row[: own.shape[1], : own.shape[2]] = own[0]
    tokens, frames = torch.tensor(sizes).T
    found = monotonic_durations(batch, tokens, frames)
    assert torch.equal(found.sum(1), frames)
    for (n, _), own, row in zip(sizes, alone, found, strict=True):
        assert torch.equal(row[:n], monotonic_durations(own)[0])
        assert not row[n:].any()


def test_the_alignment_repeats_each_token():
    durations, h = torch.tensor([[2, 1, 3], [1, 2, 0]]), torch.randn(2, 3, 4)
    A = aligned(durations, 7)
    assert A.shape == (2, 7, 3)
    spread = A.to(h) @ h
    for i in range(2):
        repeated = h[i].repeat_interleave(durations[i], 0)
        assert torch.equal(spread[i, : len(repeated)], repeated)
        assert not spread[i, len(repeated) :].any()
    assert torch.equal(A.sum(1), durations)


def test_it_is_a_constant_to_autograd():
    scores = torch.randn(1, 2, 4, requires_grad=True)
    assert not monotonic_durations(scores).requires_grad


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: monotonic_durations(torch.zeros(2, 3)), r"expected floats \(B, N, T\)"),
        (lambda: monotonic_durations(torch.zeros(2, 3, 2)), "items 0, 1 have fewer frames than tokens"),
        (lambda: monotonic_durations(torch.zeros(2, 3, 4), frames=torch.tensor([4, 2])), "items 1 have fewer frames"),
        (lambda: monotonic_durations(torch.zeros(2, 3, 4), torch.tensor([4, 0])), "expected 2 whole numbers in 1..3"),
        (lambda: monotonic_durations(torch.full((1, 2, 3), math.nan)), "items 0 has a finite score"),
        (lambda: aligned(torch.tensor([[2, 3]]), 4), "an item of 5 frames in 4"),
        (lambda: aligned(torch.tensor([[2.0, 3.0]])), "expected whole numbers"),
    ],
)
def test_what_fits_no_alignment_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
