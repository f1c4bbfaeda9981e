"""Time grids: the strictly decreasing times t_0 > t_1 > ... > t_N at which a solver stands, in float64 on the host.

A grid belongs to an SDE and every coefficient of a solver is read from it, so the printed times are the times that are
stepped on. All constructors take `steps`, the number N of transitions, `start` (default t_max) and `end`, which is
t = 0 by default: the last step then lands on the data itself, where sigma = 0. Spacings that cannot reach t = 0
(log-SNR, Karras) put their N noisy times between `start` and `last` (default the SDE's t_min) and add t = 0 as the
final step. `Grid.power` does the same for every SDE.

Sampling goes down a grid, from noise to data; encoding goes up it, on `grid.reversed()`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.checks import check_count, check_positive
from scoresde.pictures import html_table
from scoresde.schedules import VPSDE, FlowSDE
from scoresde.sde import SDE, Forward
from scoresde.strides import Spacing, Toolkit, nodes_of

__all__ = ["SPACINGS", "Grid", "standard_time"]


class Grid:
    """Strictly decreasing times with the SDE they belong to.

    Args:
        sde: the SDE whose times they are, or another `scoresde.sde.Forward`, a `CategoricalProcess` say, which has
            `Grid.uniform`, `Grid.quadratic` and times of your own: the other spacings are in alpha and sigma.
        times: t_0 > ... > t_N, at least two, within [0, sde.t_max]; a tensor, array or sequence.

    Attributes:
        sde: the SDE.
        times: float64 tensor on the CPU, shape (N + 1,).
        steps: N.
        increasing: whether the times go up, from data to noise, as only `reversed` makes them.

    Raises:
        ValueError: if the times are fewer than two, not finite, not strictly decreasing, or outside the SDE.

    >>> from scoresde import VPSDE
    >>> Grid.uniform(VPSDE(), 4)
    Grid(VPSDE(beta_min=0.1, beta_max=20.0, t_min=1e-05, t_max=1.0), 4 steps: 1, 0.75, 0.5, 0.25, 0)
    """

    def __init__(self, sde: SDE | Forward, times: Tensor | Sequence[float]) -> None:
        if not isinstance(sde, Forward):
            raise TypeError(f"Grid(sde, times): the first argument is {type(sde).__name__}, expected an SDE")
        if isinstance(times, np.ndarray):
            times = np.ascontiguousarray(times)  # torch takes no negative stride
        t = torch.as_tensor(times, dtype=torch.float64, device="cpu").detach()
        if t.ndim != 1 or len(t) < 2:
            raise ValueError(f"times has shape {tuple(t.shape)}: a grid needs at least two times in one dimension")
        if not bool(t.isfinite().all()):
            raise ValueError(f"times are not finite: {t.tolist()}")
        stalls = (t.diff() >= 0).nonzero().flatten()
        if len(stalls):
            i = int(stalls[0])
            raise ValueError(
                f"times must strictly decrease, but t_{i} = {float(t[i])!r} is followed by t_{i + 1} = "
                f"{float(t[i + 1])!r}; use fewer steps, or unrounded times; a grid to encode on is grid.reversed()"
            )
        if float(t[0]) > sde.t_max or float(t[-1]) < 0:
            raise ValueError(f"times run from {float(t[0])!r} to {float(t[-1])!r}, outside [0, {sde.t_max}] of {sde!r}")
        self.sde = cast(SDE, sde)  # the solvers of others take no alpha and sigma of it
        self.times = t.clone()

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def increasing(self) -> bool:
        return bool(self.times[0] < self.times[-1])

    def reversed(self) -> Grid:
        """The same times the other way: up from data to noise, where a deterministic solver encodes. Twice is the grid.

        Raises:
            ValueError: if the grid ends at sigma = 0. The last step down is D, which cannot be undone.

        >>> from scoresde import VPSDE
        >>> Grid.uniform(VPSDE(), 2, end=1e-5).reversed()
        Grid(VPSDE(beta_min=0.1, beta_max=20.0, t_min=1e-05, t_max=1.0), 2 steps: 1e-05, 0.50001, 1)
        """
        end = float(self.times.min())
        if float(self.sde.sigma(end)) == 0:
            raise ValueError(
                f"the grid ends at t = {end}, where sigma = 0: a step to x_0 = D has no way back. End it at noise to "
                f"encode, end=sde.t_min ({self.sde.t_min:g}) say"
            )
        grid = copy.copy(self)
        grid.times = self.times.flip(0)
        return grid

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha_t, sigma_t, alpha_s, sigma_s) of the N steps t -> s, float64, each of shape (N,)."""
        alpha, sigma = self.sde.alpha(self.times), self.sde.sigma(self.times)
        return alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]

    def check_sde(self, sde: SDE | Forward) -> None:
        """Raises ValueError unless the grid was made for that SDE, a denoiser's."""
        if self.sde != sde:
            raise ValueError(f"the grid was made for {self.sde!r}, the denoiser for {sde!r}")

    def __len__(self) -> int:
        return len(self.times)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self.sde == other.sde and torch.equal(self.times, other.times)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [f"{t:.5g}" for t in self.times.tolist()]
        if len(shown) > 12:
            shown = [*shown[:6], "...", *shown[-5:]]
        return f"Grid({self.sde!r}, {self.steps} step{'s' * (self.steps > 1)}: {', '.join(shown)})"

    def _repr_html_(self) -> str:
        if not isinstance(self.sde, SDE):
            rows = [[i, f"{t:.5g}"] for i, t in enumerate(self.times.tolist())]
            return html_table(f"Grid({self.sde!r}, {self.steps} steps)", ["", "t"], rows)
        half_log_snr = self.sde.half_log_snr(self.times)
        columns = zip(self.times, self.sde.alpha(self.times), self.sde.sigma(self.times), half_log_snr, strict=True)
        rows = [[i, *(f"{float(number):.5g}" for number in numbers)] for i, numbers in enumerate(columns)]
        return html_table(f"Grid({self.sde!r}, {self.steps} steps)", ["", "t", "alpha", "sigma", "half log-SNR"], rows)

    @classmethod
    def customary(cls, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        """The spacing customary for the SDE: uniform in t, Karras for `EDMSDE`, strided nodes for `DDPMChain`. With
        another end than 0, a chain's are the nodes nearest to uniform times.
        """
        if end != 0 and sde.customary_grid == "strided":
            return cls(sde, sde.snapped(cls.uniform(sde, steps, end=end).times))
        grid: Grid = getattr(cls, sde.customary_grid)(sde, steps, **({} if end == 0 else {"end": end}))
        return grid

    @classmethod
    def uniform(cls, sde: SDE | Forward, steps: int, *, start: float | None = None, end: float = 0.0) -> Grid:
        """t uniform (Song et al., 2021; DDIM's "linear")."""
        return cls._spaced(sde, steps, start, end, None, forward=lambda t: t, inverse=lambda u: u)

    @classmethod
    def quadratic(cls, sde: SDE | Forward, steps: int, *, start: float | None = None, end: float = 0.0) -> Grid:
        """sqrt(t) uniform (Song, Meng and Ermon, 2021, "quadratic")."""
        return cls._spaced(sde, steps, start, end, None, forward=torch.sqrt, inverse=torch.square)

    @classmethod
    def log_snr(
        cls, sde: SDE, steps: int, *, start: float | None = None, end: float = 0.0, last: float | None = None
    ) -> Grid:
        """lambda = half log-SNR uniform (Lu et al., 2022, DPM-Solver)."""
        last = _last(sde, end, last)
        return cls._spaced(sde, steps, start, end, last, forward=sde.half_log_snr, inverse=sde.time_at)

    @classmethod
    def karras(
        cls,
        sde: SDE,
        steps: int,
        *,
        rho: float = 7.0,
        start: float | None = None,
        end: float = 0.0,
        last: float | None = None,
    ) -> Grid:
        """(sigma / alpha)^(1 / rho) uniform (Karras et al., 2022, eq. 5)."""
        if not rho > 0:
            raise ValueError(f"rho={rho}: expected a number > 0")
        last = _last(sde, end, last)
        return cls._spaced(
            sde,
            steps,
            start,
            end,
            last,
            forward=lambda t: (-sde.half_log_snr(t) / rho).exp(),
            inverse=lambda u: sde.time_at(-rho * u.log()),
        )

    @classmethod
    def power(
        cls,
        sde: SDE,
        steps: int,
        *,
        power: float = 4.0,
        start: float | None = None,
        end: float = 0.0,
        last: float | None = None,
    ) -> Grid:
        """tau^(1 / power) uniform, tau being the time at which the standard `VPSDE` has the same SNR: what VP calls
        quadratic (power 2) and beyond, at the same noise levels on every SDE. With exact denoisers measured to be the
        best of the spacings here, or near it, for most solvers on every SDE, with power 3 for first order and 4 to 5
        for high order; for few steps of a trained network see `sampling`. The SNR is that of x_0 / c, c the SDE's
        `data_scale`, so that data and levels in another unit have the same grid in that unit.

        Without `last` the last noisy time has tau = 0.01 / steps, or t_min if that is larger: with more steps there is
        more to gain from going closer to the data. On a `DDPMChain` the times are nodes, rounded and all different.

        Raises:
            ValueError: as for the others, unless power > 0, or if a chain has fewer nodes than steps.
        """
        if not power > 0:
            raise ValueError(f"power={power}: expected a number > 0")
        standard = VPSDE()
        floor = float(standard.half_log_snr(1.0))  # noise beyond the standard's, alpha = 0 say, is all the same
        scale = math.log(sde.data_scale)
        if end == 0 and last is None:
            high = sde.t_max if start is None else start
            last = standard_time(sde, 0.01 / _check_steps(steps), high if steps == 1 else high / 2)
        grid = cls._spaced(
            sde,
            steps,
            start,
            end,
            _last(sde, end, last),
            forward=lambda t: standard.time_at((sde.half_log_snr(t) + scale).clamp(min=floor)) ** (1 / power),
            inverse=lambda u: sde.time_at(standard.half_log_snr(u**power) - scale),
        )
        if sde.nodes is None:
            return grid
        nodes = sde.snapped(grid.times[:-1] if end == 0 else grid.times)
        return cls(sde, torch.cat([nodes, nodes.new_zeros(1)]) if end == 0 else nodes)

    @classmethod
    def sampling(cls, sde: SDE, steps: int, *, power: float = 4.0, end: float = 0.0) -> Grid:
        """With up to 10 steps tau^(1/2) uniform, at the noise levels that VP calls quadratic; with 50 or more
        `Grid.power`, closer to the data; in between, between them, the power of tau and, to t = 0, the last noisy time.

        On trained networks few steps are best spent where there is much noise and what an image shows is decided; once
        there are enough of them, what is left is the error near the data, which `Grid.power` makes smallest
        (measured: benchmarks/results/fashion_mnist, benchmarks/results/step_counts).

        Raises:
            ValueError: as for `power`.
        """
        N = _check_steps(steps)
        share = min(max(math.log(N / 10) / math.log(5), 0.0), 1.0)
        power = 2 ** (1 - share) * power**share
        if end != 0:
            return cls.power(sde, N, power=power, end=end)
        tau = N ** (-2 * (1 - share)) * (0.01 / N) ** share
        return cls.power(sde, N, power=power, last=standard_time(sde, tau, sde.t_max if N == 1 else 0.9 * sde.t_max))

    @classmethod
    def shifted(
        cls,
        sde: FlowSDE,
        steps: int,
        *,
        shift: float = 3.0,
        start: float | None = None,
        end: float = 0.0,
        last: float | None = None,
    ) -> Grid:
        """The time shift of flow models, uniform in u (Esser et al., 2024, section 5.3.2):

            t = S(u) = shift u / (1 + (shift - 1) u),    that is, each sigma / alpha of uniform times `shift` times over

        The larger an image, the more noise it takes to hide it: their shift is sqrt(pixels / pixels of training), 3 for
        1024 x 1024. Resolution-dependent shifts are given as mu, t = e^mu / (e^mu + 1 / u - 1), which is shift=exp(mu).

        Args:
            shift: > 0; 1 is `uniform`.
            last: the last noisy time, with a step to t = 0 from there, as of `karras`; by default the last step is one
                of the uniform ones, from S(1 / steps), as where a pipeline hands sigmas = linspace(1, 1 / K, K) on.
                Left to itself diffusers' FlowMatchEuler goes to last=S(S(1 / 1000)) of its 1000 training steps (it
                shifts its smallest time twice), or, where its shift is dynamic, to S(1 / 1000).

        Raises:
            ValueError: as for the others, unless shift > 0 and sde is a FlowSDE.
        """
        check_positive(shift=shift)
        if not isinstance(sde, FlowSDE):
            raise ValueError(f"a shifted grid is one of FlowSDE's times, not of {sde!r}: use Grid.uniform or log_snr")
        if last is not None:
            last = _last(sde, end, last)

        def shifted(u: Tensor, by: float) -> Tensor:
            return by * u / (1 + (by - 1) * u)

        return cls._spaced(
            sde,
            steps,
            start,
            end,
            last,
            forward=lambda t: shifted(t, 1 / shift),
            inverse=lambda u: shifted(u, shift),
        )

    @classmethod
    def strided(
        cls,
        chain: DDPMChain,
        steps: int | Sequence[int],
        spacing: Spacing = "trailing",
        *,
        like: Toolkit | None = None,
        offset: int = 0,
        end: float = 0.0,
    ) -> Grid:
        """A sub-sequence of a chain's nodes, then the end (Song, Meng and Ermon, 2021, section 4.2 and appendix D.2).

        Args:
            chain: the chain, of N nodes.
            steps: K, at most N; of guided-diffusion also a list of numbers, for sections of the chain.
            spacing: "trailing" (N, N - N/K, ..., rounded) and "linspace" (N..1, rounded; "even" in Analytic-DPM) start
                at N; "leading" (1, 1 + N//K, ...; DDIM's uniform) and "quadratic" (ends near 0.8 N) do not: the prior
                is then taken for a time at which the data is not quite noise.
            like: whose rounding, of the table in `scoresde.strides`, "diffusers" or "guided-diffusion" say. Where their
                sequence is longer than K, repeats a node or leaves the chain, a warning tells what is done instead:
                each node is evaluated once. Between nodes, where two of them stand, the noise levels are theirs, as the
                label is with `strides.label_between`.
            offset: of "leading", diffusers' steps_offset: how many nodes further up it is.
            end: where the last step goes: 0, the data, or 1, the first node: diffusers' set_alpha_to_one=False,
                final_sigmas_type="sigma_min", and its DEIS always.

        Raises:
            ValueError: if chain is not a DDPMChain, there is no such sub-sequence, steps exceeds the chain's length,
                or nodes of this library's own rounding collide.
        """
        if not isinstance(chain, DDPMChain):
            raise ValueError(f"strided grids are sub-sequences of a DDPMChain; for {chain!r} use Grid.uniform")
        times = nodes_of(chain, steps, spacing, like, offset, end, stacklevel=3)
        return cls(chain, torch.cat([times, times.new_tensor([end])]))

    @classmethod
    def _spaced(
        cls,
        sde: SDE | Forward,
        steps: int,
        start: float | None,
        end: float,
        last: float | None,
        *,
        forward: Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor],
    ) -> Grid:
        """Times uniform in forward(t). With `last`, the spacing reaches only that far and a final step goes to end = 0.

        The two ends are set exactly, not through forward and inverse.
        """
        steps = _check_steps(steps)
        start = sde.t_max if start is None else float(start)
        to_zero = last is not None and end == 0
        low, points = (last, steps) if to_zero else (end, steps + 1)
        assert low is not None
        if not (0 <= low <= start <= sde.t_max and (low < start or points == 1)):
            raise ValueError(f"a grid of {sde!r} from {start} to {low}: expected 0 <= end < start <= {sde.t_max}")
        bounds = forward(torch.tensor([start, low], dtype=torch.float64, device="cpu"))
        if not bool(bounds.isfinite().all()) or (to_zero and low == 0):
            raise ValueError(
                f"half_log_snr is infinite at t = {start} or t = {low} of {sde!r}: give start= where alpha > 0 and "
                "last= where sigma > 0, or use Grid.uniform"
            )
        times = inverse(
            torch.lerp(bounds[0], bounds[1], torch.linspace(0, 1, points, dtype=torch.float64, device="cpu"))
        )
        times[0] = start
        if points > 1:
            times[-1] = low
        return cls(sde, torch.cat([times, times.new_zeros(1)]) if to_zero else times)


SPACINGS: dict[str, Callable[[Any, int], Grid]] = {
    name: getattr(Grid, name) for name in ("uniform", "quadratic", "log_snr", "karras", "power", "strided")
}
"""Constructors of a grid by name: each takes an SDE and a number of steps."""


def standard_time(sde: SDE, tau: float, most: float) -> float:
    """The time at which x_0 / c has the SNR of the standard `VPSDE` at tau, from t_min to most."""
    near = VPSDE().half_log_snr(torch.tensor(tau, dtype=torch.float64, device="cpu"))
    return min(max(float(sde.time_at(near - math.log(sde.data_scale))), sde.t_min), most)


def _last(sde: SDE, end: float, last: float | None) -> float:
    """The last noisy time before a final step to t = 0."""
    if last is None:
        return sde.t_min
    if end != 0:
        raise ValueError(f"last={last} is the last noisy time before end=0, and end={end} is noisy itself: give one")
    return last


def _check_steps(steps: int) -> int:
    check_count(steps=steps)
    return int(steps)
