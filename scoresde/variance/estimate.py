"""Monte-Carlo estimates of E |eps_hat(x_t, t)|^2 / d, x_t = alpha x_0 + sigma z, on many times at once.

Where noise is nearly all there is, C_t = (sigma^2 / alpha^2) (1 - eps_square) magnifies any error of the mean (that of
M draws on VP, at t = 1, is 20,000 sqrt(2 / (d M))). So from each draw is taken what an affine eps_hat, right for
Gaussian data of mean m and elementwise variance v, would give there, and its expectation is put back:

    y = [ |eps_hat|^2 - |e|^2 + |e_0|^2 + sum sigma^2 / S ] / d
    e = e_0 + sigma (x_t - alpha m) / S,    S = alpha^2 v + sigma^2,    e_0 = eps_hat(alpha m, t)

With m and v those of the data set, and x_0 drawn from it, E |e|^2 = |e_0|^2 + sum sigma^2 / S exactly: the mean of y
has no bias, whatever the network is. On Gaussian data the error of C_t then stays bounded as alpha -> 0, and vanishes
where the data's directions are independent. e_0 costs one more sample in each evaluation.

Source: Bao, Li, Zhu and Zhang (2022), Analytic-DPM, whose estimate is the plain mean, `control=False`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import check_count, check_whole
from scoresde.denoiser import Denoiser, check_call
from scoresde.entries import entries_of
from scoresde.errors import NonFiniteError, not_finite, some
from scoresde.grid import Grid
from scoresde.noise import SeededNoise, derive_seed
from scoresde.sde import SDE
from scoresde.solvers.motion import legs
from scoresde.tensors import check_batch, widen
from scoresde.variance.table import Moments, VarianceTable, check_nodes, fingerprint

__all__ = ["estimate", "table_times"]

_NOISE, _INDEX = 5, 6  # streams of a sample's seed; `sample`, the likelihood and the bound have 0 to 4


def estimate(
    denoiser: Denoiser,
    data: Tensor,
    times: Grid | Tensor | Sequence[float] | None = None,
    *,
    samples: int = 100,
    seed: int = 0,
    batch_size: int = 256,
    cond: Mapping[str, Any] | None = None,
    progress: bool = False,
    shard: tuple[int, int] = (0, 1),
    control: bool = True,
) -> VarianceTable:
    """The `VarianceTable` of a model: once a model, whatever the solver and its steps. Costs samples * len(times)
    evaluations of one sample each.

    Args:
        denoiser: the model, bare: with x_0 clipped or guidance added, eps_hat would not be E[eps | x_t].
        data: what it was trained on, shape (N, ...), floating point: z = `denoiser.codec.encode(x)` where there is a
            codec, which is not used here. x_0 is drawn from it, afresh for each time and sample, with replacement.
        times: of the table, in any order, or a grid, whose noisy times are taken. By default all nodes of a
            `DDPMChain`; else 100 times, uniform in half log-SNR from t_max (or half log-SNR -9 where alpha(t_max) = 0)
            to t_min.
        samples: M, the draws at each time; more than N are fine.
        seed: one integer. A draw depends on it, on the sample's number and on the place of its time only: not on
            batch_size, nor on the shard.
        batch_size: samples in one evaluation.
        cond: keyword arguments for the network. What has N entries belongs to the data, and is drawn with them.
        progress: show a progress bar.
        shard: (rank, world): every world-th sample from rank on, for one of `world` processes. Put their tables
            together with `VarianceTable.merge`: that is the table of a single process, up to rounding.
        control: take off what an affine eps_hat would give, as in the module's docstring; False is the plain mean.

    Returns:
        The table. Its standard errors are from the spread of the draws: they are of the expectation over this data
        set, and do not say how far that is from another.

    Raises:
        TypeError, ValueError: before any evaluation, if arguments are not as said.
        NonFiniteError: if the network's output is not, with the time, and the samples' numbers.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> target = Gaussian(mean=[3.0, -1.0], std=0.5)
    >>> data = target.sample(1000, torch.Generator().manual_seed(0))
    >>> table = estimate(target.denoiser(VPSDE()), data, [0.1, 0.5, 1.0])
    >>> table.covariance(torch.tensor([0.1, 0.5, 1.0]))  # of the distribution: 0.0791, 0.2447, 0.2500
    tensor([0.0792, 0.2413, 0.2492], dtype=torch.float64)
    """
    check_batch(data, "data")
    check_call(denoiser, data, cond)
    check_count(samples=samples, batch_size=batch_size)
    rank, world = shard
    check_count(world=world)
    if not 0 <= rank < world or rank >= samples:
        raise ValueError(f"shard={shard!r} of {samples} samples: expected (rank, world), rank < world <= samples")
    check_whole(seed=seed)
    t = _times(denoiser.sde, times)
    check_nodes(denoiser.sde, t)
    denoiser.check_times(t)
    reference = _Gaussian.of(data, denoiser.device) if control else None
    mine, parts = range(samples)[rank::world], []
    calls = len(t) * len(range(0, len(mine), batch_size))
    with torch.no_grad(), tqdm(desc="estimate", total=calls, unit="nfe", disable=not progress, leave=False) as bar:
        for i in range(0, len(mine), batch_size):
            numbers = mine[i : i + batch_size]
            values = []
            for value in _draws(denoiser, data, t.tolist(), [derive_seed(seed, m) for m in numbers], cond, reference):
                values.append(value)
                bar.update()
            parts.append(Moments.of(_finite(torch.stack(values).cpu().double(), t, numbers)))
    pooled = Moments.pool(parts)
    return VarianceTable(denoiser.sde, t, pooled.mean, pooled.stderr, pooled.n, fingerprint(denoiser))


def _times(sde: SDE, times: Grid | Tensor | Sequence[float] | None) -> Tensor:
    """The table's times, increasing, float64 on the host."""
    if isinstance(times, Grid):
        times.check_sde(sde)
        times = times.times[sde.sigma(times.times) > 0]
    if times is not None:
        return torch.as_tensor(times, dtype=torch.float64).detach().cpu().sort().values
    return table_times(sde)


def table_times(sde: SDE, n: int | None = None) -> Tensor:
    """The times of a table, increasing, float64 on the host: all nodes of a chain; else, or where n says how many, that
    number (100) uniform in half log-SNR, as `estimate` says.
    """
    if n is None and sde.nodes is not None:
        return sde.nodes
    start = legs(Grid(sde, [sde.t_max, sde.t_min]), free=True)[-1].t
    return Grid.log_snr(sde, (n or 100) - 1, start=start, end=sde.t_min).times.flip(0)


def _draws(
    denoiser: Denoiser,
    data: Tensor,
    times: list[float],
    seeds: list[int],
    cond: Mapping[str, Any] | None,
    reference: _Gaussian | None,
) -> Iterator[Tensor]:
    """y of a batch, shape (B,), at each time in turn."""
    device, sde = denoiser.device, denoiser.sde
    noise = SeededNoise(seeds, device, stream=_NOISE)
    streams = (torch.Generator("cpu").manual_seed(derive_seed(s, _INDEX)) for s in seeds)
    index = torch.stack([torch.randint(len(data), (len(times),), generator=g, device="cpu") for g in streams])
    for r, t in enumerate(times):
        i = index[:, r]
        x_0 = widen(data[i.to(data.device)].to(device))
        x = sde.perturb(x_0, t, noise(r, x_0))
        if reference is not None:
            x, i = torch.cat([x, reference.centre(sde, t).to(x.dtype)]), torch.cat([i, i.new_zeros(1)])
        eps = _float64(denoiser.eps(x, t, **entries_of(cond, i, len(data))))
        square = eps**2 if reference is None else reference.corrected(sde, x, eps, t)
        yield square.reshape(len(square), -1).mean(1)


class _Gaussian:
    """Gaussian data of mean m and elementwise variance v, shape (...)."""

    def __init__(self, m: Tensor, v: Tensor) -> None:
        self.m, self.v = m, v

    @classmethod
    def of(cls, data: Tensor, device: torch.device) -> _Gaussian:
        """With the moments of the data set: its own, with N and not N - 1, as x_0 is drawn from it."""
        parts = data.split(4096)
        m = sum((_float64(part).sum(0) for part in parts), start=_float64(torch.zeros_like(data[0]))) / len(data)
        v = sum(((_float64(part) - m).square().sum(0) for part in parts), start=torch.zeros_like(m)) / len(data)
        return cls(m.to(device), v.to(device))

    def centre(self, sde: SDE, t: float) -> Tensor:
        """alpha m, shape (1, ...)."""
        return float(sde.alpha(t)) * self.m[None]

    def corrected(self, sde: SDE, x: Tensor, eps: Tensor, t: float) -> Tensor:
        """Elementwise d y of the draws, x and eps being those of the draws and, last, of the centre."""
        sigma = float(sde.sigma(t))
        S = float(sde.alpha(t)) ** 2 * self.v + sigma**2
        e_0 = eps[-1:]
        e = e_0 + sigma * (_float64(x[:-1]) - self.centre(sde, t)) / S
        return eps[:-1] ** 2 - e**2 + e_0**2 + sigma**2 / S


def _finite(values: Tensor, t: Tensor, numbers: range) -> Tensor:
    """The values, shape (R, B), checked: one look at the device for all times of a batch."""
    if bad_times := not_finite(values):
        r = bad_times[0]
        samples = [numbers[j] for j in not_finite(values[r])]
        which = f"sample{'s' * (len(samples) > 1)} {some(samples)}"
        message = f"the network's output is not finite at t = {float(t[r]):.6g}, {which}"
        raise NonFiniteError(message, r, float(t[r]), samples)
    return values


def _float64(x: Tensor) -> Tensor:
    """x in float64, in float32 on a device that has none."""
    return x.float() if x.device.type == "mps" else x.double()
