"""What torchsde is given of the reverse SDE: f and g of `scoresde.solvers.reverse_sde` and the Brownian increments,
over one leg at a time, in time from 0 to the leg's length (so that a leg is a step exactly, whatever lambda rounds to).

In a module of its own because torchsde takes a while to import.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from typing import Any

import torch
import torchsde
from torch import Tensor

from scoresde.brownian import BrownianPath
from scoresde.solvers.motion import Leg, Motion

__all__ = ["Legs"]

_SHORTEST = 2**-10  # of adaptive steps; below, its halves would lie in one cell of the path


class Legs(torchsde.BaseBrownian):
    """The reverse SDE from leg to leg.

    Args:
        motion: what follows, tau = 1.
        path: of the samples, with its area.
        method: "euler", "milstein" or "srk".
        dt: the first step of adaptive ones; None for one step a leg.
        rtol, atol: of adaptive steps, each sample held to them.
    """

    noise_type, sde_type = "diagonal", "ito"
    levy_area_approximation = "space-time"
    # torchsde asks for them; BaseBrownian has them abstract.
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def __init__(
        self, motion: Motion, path: BrownianPath, method: str, dt: float | None, rtol: float, atol: float
    ) -> None:
        self.motion, self.path, self.method = motion, path, method
        self.dt, self.rtol, self.atol = dt, rtol, atol
        self.shape = (path.shape[0], math.prod(path.shape[1:]))
        self._queries, self._at_accepted = 0, False
        self._at_the_floor, self._warned = False, False
        # torchsde evaluates one point several times: to see f's shape, in every later stage, after a rejected step.
        self._known: deque[tuple[float, Tensor, Tensor]] = deque(maxlen=4)

    def follow(self, x: Tensor, leg: Leg) -> Tensor:
        """The state at the leg's end."""
        motion = self.motion
        self.event, self.dtype, self.device = x.shape, x.dtype, x.device
        ends = motion.sde.half_log_snr(torch.tensor([leg.t, leg.s], dtype=torch.float64, device="cpu"))
        self.start, self.end = ends.tolist()
        h = self.end - self.start
        motion.reached = leg.t, x
        w = (x / motion.radius(leg.t)).reshape(len(x), -1)
        self._queries, self._at_accepted = 0, False
        self._known.clear()
        share = math.sqrt(len(x))  # as for scipy in `AdaptiveODE`: torchsde's error, too, is the RMS over the batch
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Hitting minimum allowed step size")  # `_warn` says it once, and why
                path = torchsde.sdeint(
                    self,
                    w,
                    torch.tensor([0.0, h], dtype=torch.float64, device="cpu"),
                    bm=self,
                    # By another name: torchsde warns of adaptive Euler, not knowing that the noise is additive.
                    method="milstein" if self.method == "euler" else self.method,
                    dt=h if self.dt is None else min(self.dt, h),
                    adaptive=self.dt is not None,
                    rtol=self.rtol / share,
                    atol=self.atol / share,
                    dt_min=_SHORTEST,
                )
        finally:
            self._warn()
        return (path[-1] * motion.radius(leg.s)).reshape(x.shape)

    def _warn(self) -> None:
        if self._at_the_floor and not self._warned:
            self._warned = True
            warnings.warn(
                f"steps reached the shortest, 2^-10 in half log-SNR, and the tolerance rtol={self.rtol}, "
                f"atol={self.atol} is not met there: raise rtol and atol, or take method='srk'",
                stacklevel=6,  # the caller of `sample`
            )

    def f(self, time: Tensor, w: Tensor) -> Tensor:
        at = float(time)
        if self._at_accepted:
            self.motion.accept(self._half_log_snr(time), w.reshape(self.event))
            self._at_accepted = False
        for i, known in enumerate(self._known):
            # The last stage of srk is its first again, to which zeros were added.
            if known[0] == at and (known[1] is w or (self.method == "srk" and torch.equal(known[1], w))):
                del self._known[i]
                self._known.append(known)
                return known[2]
        F = self.motion.drift(self._half_log_snr(time), w.reshape(self.event)).reshape(w.shape)
        self._known.append((at, w, F))
        return F

    def g(self, time: Tensor, w: Tensor) -> Tensor:
        _, _, sigma, r = self.motion.scales(self._half_log_snr(time))
        return torch.full_like(w, math.sqrt(2) * sigma / r)

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        # Each attempt at an adaptive step asks for the increment of the whole step, and then of its halves.
        self._at_accepted = self.dt is not None and self._queries % 3 == 0
        self._queries += 1
        self._at_the_floor |= self._at_accepted and math.isclose(float(tb - ta), _SHORTEST, rel_tol=1e-6)
        scale = math.log(self.motion.sde.data_scale)  # in whatever unit the data are, the path is the same
        W, U = (
            None if part is None else part.flatten(1).to(dtype=self.dtype, device=self.device)
            for part in self.path.between(self._half_log_snr(ta) + scale, self._half_log_snr(tb) + scale)
        )
        return (W, U) if return_U else W

    def _half_log_snr(self, time: Tensor) -> float:
        return self.end if float(time) == self.end - self.start else self.start + float(time)

    def __repr__(self) -> str:
        return f"Legs({self.method!r}, dt={self.dt}, rtol={self.rtol}, atol={self.atol})"
