"""What each step of a chain costs in its bound, and the path of least cost.

The bound of a chain (`scoresde.likelihood.elbo`) is a sum over its steps t -> s, and with DDPM's mean a step's term is
a function of s, t and one number, C_t = E |x_0 - D(x_t)|^2 / d. In nats per dimension, with S = (alpha / sigma)^2,

    posterior   v = sigma_s^2 w                          F(s, t) = (S_s - S_t) C_t / 2
    beta        v = sigma_t^2 w                          F(s, t) = (r - 1 - log r + r (S_s - S_t) C_t) / 2
    optimal     v = sigma_s^2 w + (alpha_s w)^2 C_t      F(s, t) = log(1 + (S_s - S_t) C_t) / 2
    of any C    v = sigma_s^2 w + (alpha_s w)^2 C        F(s, t) = (log(1 + y) + (S_s - S_t) (C_t - C) / (1 + y)) / 2

where w = 1 - S_t / S_s, r = (sigma_s / sigma_t)^2 and y = (S_s - S_t) C. Analytic-DPM's is the optimal one where its
table is exact, and the last where the table's C is not the network's C_t. With C_t = (1 - E|eps|^2 / d) / S_t,
which is the error of the exact D, it is log(1 - beta_{t|s} Gamma_t) / 2, the authors' J / 2 (Gamma_t = E|score|^2 / d,
beta_{t|s} = sigma_t^2 w), plus lambda_s - lambda_t, whose sum is the same on every trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import check_count, check_option, check_range
from scoresde.denoiser import Denoiser, check_call
from scoresde.entries import entries_of
from scoresde.errors import NonFiniteError, not_finite, some
from scoresde.grid import Grid
from scoresde.likelihood.decoder import Decoder, decoder_std, square_norm
from scoresde.noise import derive_seed
from scoresde.sde import SDE
from scoresde.tensors import check_batch, told, widen
from scoresde.variance.table import VarianceTable

__all__ = ["Costs", "Errors", "Variance", "analytic_costs", "kl_costs", "least_cost_path", "measure_errors"]

Variance = Literal["posterior", "beta", "optimal"]
_PAIRS = 6  # stream of a seed, from which the data and the noise are drawn


def least_cost_path(cost: Tensor, steps: int) -> Tensor:
    """The path of least cost from node 0 to node N, with exactly `steps` edges, each from a node to a higher one.

    Args:
        cost: cost[s, t] of the edge between s < t, shape (N + 1, N + 1); infinity where there is none. What stands on
            and below the diagonal is not read.
        steps: K, the number of edges, from 1 to N.

    Returns:
        The nodes in increasing order, int64, shape (K + 1,). Memory is O(K N), time O(K N^2) in K vectorised steps.

    Raises:
        ValueError: if cost is not square or has a NaN above its diagonal, steps is out of range, or every path with so
            many edges has an infinite cost.

    >>> far = torch.tensor([[0.0, 1.0, 4.0, 9.0], [0.0, 0.0, 1.0, 4.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    >>> least_cost_path(far, 3)
    tensor([0, 1, 2, 3])
    """
    check_count(steps=steps)
    cost = torch.as_tensor(cost, dtype=torch.float64, device="cpu")
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or len(cost) < 2:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: expected (N + 1, N + 1), N >= 1")
    N = len(cost) - 1
    if steps > N:
        raise ValueError(f"steps={steps}, but there are only {N} nodes after the first")
    edges = torch.ones_like(cost, dtype=torch.bool).triu(1)
    if bool((cost.isnan() & edges).any()):
        s, t = (cost.isnan() & edges).nonzero()[0].tolist()
        raise ValueError(f"cost[{s}, {t}] is NaN")
    to = torch.where(edges, cost, math.inf).T.contiguous()  # to[t, s]: each minimum runs along the memory
    least = to[:, 0]
    came_from: list[Tensor] = []
    for _ in range(steps - 1):
        least, before = (to + least).min(dim=1)
        came_from.append(before)
    if not math.isfinite(float(least[N])):
        raise ValueError(f"no path with {steps} edges from node 0 to node {N} has a finite cost")
    path = [N]
    for before in reversed(came_from):
        path.append(int(before[path[-1]]))
    return torch.tensor([0, *reversed(path)], device="cpu")


@dataclass(frozen=True)
class Costs:
    """The term of the bound of every step between N times of an SDE, and of the decoder from each of them.

    Attributes:
        sde: the SDE.
        times: increasing, the data's t = 0 first, float64 on the CPU, shape (N + 1,).
        matrix: F(s, t) in nats per dimension at [s, t], s < t, shape (N + 1, N + 1); elsewhere infinity.
    """

    sde: SDE
    times: Tensor
    matrix: Tensor

    __repr__ = told

    def grid(self, steps: int) -> Grid:
        """The grid of least cost with that many steps, from the last time to 0.

        Raises:
            ValueError: as `least_cost_path`.
        """
        return Grid(self.sde, self.times[least_cost_path(self.matrix, steps)].flip(0))

    def total(self, grid: Grid) -> float:
        """The cost of a grid on these times, in nats per dimension: minus its bound, but for the prior's part, and for
        the decoder's where that is fixed (`analytic_costs`).

        Raises:
            ValueError: if it has another SDE, does not run from the last time to 0, or stands elsewhere between.
        """
        grid.check_sde(self.sde)
        wanted = grid.times.flip(0)
        i = torch.searchsorted(self.times, wanted).clamp(max=len(self.times) - 1)
        if not torch.equal(self.times[i], wanted) or wanted[0] != 0 or wanted[-1] != self.times[-1]:
            raise ValueError(f"{grid!r} is not made of these costs' times, from {float(self.times[-1]):.6g} to 0")
        return float(self.matrix[i[:-1], i[1:]].sum())


def analytic_costs(
    table: VarianceTable,
    times: Tensor | Grid | None = None,
    *,
    data_range: tuple[float, float] | None = None,
    consistent: bool = True,
) -> Costs:
    """The terms of the bound with the optimal variance, from a table alone, in closed form.

    The decoder is left out: it costs nothing from the smallest of the times and infinitely much from the others.

    Networks that err at large t have E|eps_hat|^2 / d near or above 1 there, so C_t near 0 and steps that seem to cost
    nothing, of which a least-cost path takes very long ones. But the true C_t never decreases, and by no less than
    dC/dSNR = -E|Cov(x_0 | x_t)|_F^2 / d <= -C^2 says (Guo et al., 2011): 1 / C_t - S_t does not increase
    with t. Raising C_t to that makes no difference to a table that is exact. For a network that errs so, `even_tail` of
    `optimal_grid` is better still, and best are the terms measured with the table's variance,
    `measure_errors(...).costs(table.covariance(t))`.

    Args:
        table, times, data_range: as in `optimal_grid`.
        consistent: raise C_t to what those at smaller t imply. False takes the table as it is.

    Raises:
        ValueError: if times do not fit, or C_t is not finite (alpha = 0).
    """
    t = _candidates(table.sde, times)
    C = table.covariance(t)
    if consistent:
        S = (2 * table.sde.half_log_snr(t)).exp()
        C = 1 / ((1 / C - S).cummin(0).values + S)
    if data_range is not None:
        C = C.clamp(max=check_range(data_range) ** 2)
    if not bool(C.isfinite().all()):
        raise ValueError(
            f"the table has no finite C_t at t = {float(t[~C.isfinite()][0]):.6g} of {table.sde!r}: start at a time "
            "where alpha > 0, or give the data_range"
        )
    decoder = torch.full_like(t, math.inf)
    decoder[0] = 0.0
    return _costs(table.sde, t, C, decoder, C)


def kl_costs(
    denoiser: Denoiser,
    data: Tensor,
    times: Tensor | Grid | None = None,
    *,
    variance: Variance | Tensor = "posterior",
    **options: Any,
) -> Costs:
    """The terms of the bound with a hand-crafted variance, measured (Watson et al., 2021): the network is evaluated on
    `samples` data at each time. For several variances, `measure_errors(...)` once and its `costs` for each.

    Args:
        denoiser, data, times: as in `measure_errors`, which has the further options.
        variance: "posterior" or "beta", as in `DDPM`; "optimal", the best scalar for this network and these data; or
            numbers C, as in `Errors.costs`.

    Raises:
        TypeError, ValueError, NonFiniteError: as `measure_errors`.
    """
    if not isinstance(variance, Tensor):
        check_option(("posterior", "beta", "optimal"), variance=variance)
    return measure_errors(denoiser, data, times, **options).costs(variance)


@dataclass(frozen=True)
class Errors:
    """What the bound of any trajectory needs to know of a network: made by `measure_errors`.

    Attributes:
        sde: the SDE.
        times: increasing, noisy, float64 on the CPU, shape (N,).
        mse: C_t = E |x_0 - D(x_t)|^2 / d, float64, shape (N,).
        decoder: -E log p(x_0 | x_t) / d in nats, float64, shape (N,).
        samples: how many pairs of data and noise.
    """

    sde: SDE
    times: Tensor
    mse: Tensor
    decoder: Tensor
    samples: int

    __repr__ = told

    def costs(self, variance: Variance | Tensor = "posterior") -> Costs:
        """The terms of the bound with that variance of a step.

        Args:
            variance: as in `kl_costs`; or numbers C, shape (N,): those of a table, table.covariance(errors.times, ...),
                make the exact terms of Analytic-DPM's bound for a network that errs.

        Raises:
            ValueError: on another variance, or C that are negative, not finite or of another shape.
        """
        if isinstance(variance, Tensor):
            C = variance.detach().double().cpu()
            if C.shape != self.times.shape or not bool((C.isfinite() & (C >= 0)).all()):
                raise ValueError(f"variance has shape {tuple(C.shape)}: expected {len(self.times)} finite numbers >= 0")
        else:
            check_option(("posterior", "beta", "optimal"), variance=variance)
            C = self.mse if variance == "optimal" else torch.zeros_like(self.mse)
        beta = isinstance(variance, str) and variance == "beta"
        return _costs(self.sde, self.times, self.mse, self.decoder, None if beta else C)


def measure_errors(
    denoiser: Denoiser,
    data: Tensor,
    times: Tensor | Grid | None = None,
    *,
    samples: int = 1000,
    batch_size: int = 256,
    seed: int = 0,
    levels: int | None = None,
    data_range: tuple[float, float] = (-1.0, 1.0),
    cond: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Errors:
    """The errors of a network at each time, on the same pairs of data and noise: they are smooth in t, and dynamic
    programming does not hunt for times at which the draw was lucky.

    Args:
        denoiser: the model. Where the network has dropout, call net.eval() first.
        data: x_0, shape (M, ...), floating point, z of a denoiser with a codec; not that on which a trajectory is to be
            judged.
        times: as in `optimal_grid`.
        samples: pairs of x_0 and noise; data are drawn without repetition, as far as they reach.
        batch_size: of the network's evaluations; the result depends on it by rounding only.
        seed: of the draws.
        levels, data_range: of the decoder, as in `scoresde.likelihood.elbo`, whose decoder this is: from node 1 of a
            chain the posterior standard deviation of 2 -> 1, from elsewhere sigma / alpha.
        cond: keyword arguments for the network; what has M entries goes with the data.
        progress: show a progress bar.

    Raises:
        TypeError: if denoiser is none.
        ValueError: before any evaluation, if data or times do not fit, or are not finite.
        NonFiniteError: if an output of the network is not finite, with its time and samples, indices into data.
    """
    check_batch(data, "data")
    check_count(samples=samples, batch_size=batch_size)
    check_call(denoiser, data, cond)
    sde, t = denoiser.sde, _candidates(denoiser.sde, times)
    denoiser.check_times(t)
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, _PAIRS))
    order = torch.randperm(len(data), generator=generator, device="cpu")
    index = order.repeat(math.ceil(samples / len(data)))[:samples]
    noise = torch.randn(samples, *data.shape[1:], generator=generator, dtype=torch.float32, device="cpu")
    r, s = denoiser.affine(t)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    k, m = (r * alpha - 1).tolist(), (r * sigma).tolist()  # D - x_0 = k x_0 + m eps + s N
    stds = [decoder_std(sde, u) for u in t.tolist()]
    output, squares, costs = denoiser.outputs(t), torch.zeros_like(t), torch.zeros_like(t)
    total = len(t) * math.ceil(samples / batch_size)
    with torch.no_grad(), tqdm(desc="costs", total=total, unit="nfe", disable=not progress, leave=False) as bar:
        for part in torch.arange(samples, device="cpu").split(batch_size):
            chosen = index[part].to(data.device)
            x0 = widen(data[chosen]).to(denoiser.device)
            eps = noise[part].to(x0)
            given = entries_of(cond, chosen, len(data))
            decode = Decoder.of(x0, 1.0, levels, data_range)
            for i in range(len(t)):
                N = output(i, float(alpha[i]) * x0 + float(sigma[i]) * eps, given)
                error = k[i] * x0 + m[i] * eps + float(s[i]) * N
                square = square_norm(error)
                if bad := not_finite(square):
                    items, time = chosen[bad].tolist(), float(t[i])
                    message = f"the network's error at t = {time:.6g} is not finite for data items {some(items)}"
                    raise NonFiniteError(message, None, time, items)
                squares[i] += square.sum().cpu()
                costs[i] -= replace(decode, std=stds[i])(error).sum().cpu()
                bar.update()
    count = samples * data[0].numel()
    return Errors(sde, t, squares / count, costs / count, samples)


def _costs(sde: SDE, t: Tensor, mse: Tensor, decoder: Tensor, C: Tensor | None) -> Costs:
    """The module's formulas for all pairs of the times t, shape (N,), with the data as node 0; C None is "beta"."""
    half_log_snr, sigma = sde.half_log_snr(t), sde.sigma(t)
    w = -torch.expm1((2 * (half_log_snr - half_log_snr[:, None])).clamp(max=0))  # w = 1 - S_t / S_s
    gain = (2 * half_log_snr).exp()[:, None] * w  # S_s - S_t
    if C is None:
        r = (sigma[:, None] / sigma) ** 2
        inner = (r - 1 - r.log() + r * gain * mse) / 2
    else:
        y = gain * C
        inner = (y.log1p() + gain * (mse - C) / (1 + y)) / 2
    matrix = torch.full((len(t) + 1, len(t) + 1), math.inf, dtype=torch.float64, device="cpu")
    matrix[1:, 1:] = inner
    matrix[0, 1:] = decoder
    edges = torch.ones_like(matrix, dtype=torch.bool).triu(1)
    return Costs(sde, torch.cat([t.new_zeros(1), t]), torch.where(edges, matrix, math.inf))


def _candidates(sde: SDE, times: Tensor | Grid | None) -> Tensor:
    """The noisy times to choose from, increasing, float64 on the host."""
    if isinstance(times, Grid):
        times.check_sde(sde)
        t = times.times.sort().values
        t = t[sde.sigma(t) > 0]
    elif times is not None:
        t = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    elif sde.nodes is not None:
        t = sde.nodes
    else:
        t = Grid.power(sde, 500).times[:-1].flip(0)
    if t.ndim != 1 or len(t) == 0 or not bool(t.isfinite().all() and (t.diff() > 0).all()):
        raise ValueError(f"times has shape {tuple(t.shape)}: expected (N,), strictly increasing, finite")
    if not 0 < float(t[0]) <= float(t[-1]) <= sde.t_max:
        raise ValueError(f"times run from {float(t[0])!r} to {float(t[-1])!r}: expected (0, {sde.t_max}] of {sde!r}")
    return t
