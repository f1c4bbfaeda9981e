"""Inverse problems by projection of the posterior mean: what the measurement says of x_0 replaces what the model says.

    D' = A^+ y + (I - A^+ A) D        DDNM (Wang, Yu and Zhang, 2023), for y = A x

A^+ A projects onto what A sees, so that A D' = y exactly and what A does not see is left to the model. Where y has
noise of standard deviation sigma_y, D' is weighted,

    D' = D + A^T (A A^T + (sigma_y^2 / r_t^2) I)^-1 (y - A D),    r_t^2 = sigma^2 s^2 / (alpha^2 s^2 + sigma^2)

which in a direction of singular value a moves D by the share a^2 r_t^2 / (a^2 r_t^2 + sigma_y^2) of the way to A^+ y:
all of it where the sample is noisier than the measurement, little where it is cleaner. It is E[x_0 | x_t, y] if x_0
given x_t is N(D, r_t^2 I), as for data N(m, s^2 I).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scoresde.checks import check_nonnegative, check_positive
from scoresde.denoiser import Denoiser, Posterior
from scoresde.guidance.operators import LinearOperator
from scoresde.guidance.operators.checks import check_adjoint, check_finite, check_linear, match_measurement
from scoresde.tensors import Time, precise
from scoresde.wrappers import Wrapper

__all__ = ["DDNM"]


class DDNM(Wrapper):
    """The denoising diffusion null-space model (Wang, Yu and Zhang, 2023), for y = A x + sigma_y n.

    It costs one evaluation and no gradient. What A does not see follows from D alone, as if the sample's own noise told
    of it all that y does. Without noise the result has A x = y. It samples p(x | y) where what A sees and what it does
    not are independent, and is an approximation elsewhere.

    The weight for a noisy y is of this wrapper: a denoiser cannot lower the solver's noise by that of y, as the paper's
    DDNM+ does with a weight of min(1, its noise / that of y), but it can trust y no more than Bayes' rule would.

    `Posterior.var` is None: that of D is not right where A sees.

    Args:
        denoiser: the denoiser to wrap.
        operator: A.
        y: the measurement, (1, *measurement) for all samples, or (B, *measurement).
        noise_std: sigma_y, of each entry of y.
        data_std: s, standard deviation of the data, the SDE's `data_scale` by default; it matters only for a noisy y.

    Raises:
        TypeError: if denoiser or operator is none.
        ValueError: unless noise_std >= 0 and data_std > 0; by the first call, before the network's, if the operator
            fails the dot-product test, or y does not fit or is not finite.

    >>> from scoresde import VPSDE, sample
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.guidance.operators import Mask
    >>> from scoresde.solvers import DDIM
    >>> denoiser = Gaussian(mean=[3.0, -1.0], std=0.5).denoiser(VPSDE())
    >>> restored = DDNM(denoiser, Mask(torch.tensor([True, False])), y=torch.tensor([[2.5, 0.0]]))
    >>> sample(restored, (100, 2), DDIM(), steps=20, seed=0).x[:, 0].unique()
    tensor([2.5000])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operator: LinearOperator,
        y: Tensor,
        noise_std: float = 0.0,
        *,
        data_std: float | None = None,
    ) -> None:
        super().__init__(denoiser)
        check_linear(operator, self)
        data_std = self.sde.data_scale if data_std is None else data_std
        check_nonnegative(noise_std=noise_std)
        check_positive(data_std=data_std)
        self.operator, self.y, self.noise_std, self.data_std = operator, y, float(noise_std), float(data_std)
        self._checked = False

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        A, y = self.operator, match_measurement(self.operator, self.y, x)
        if not self._checked:
            check_adjoint(A, x)
            check_finite(A.pseudo_inverse(y))
            self._checked = True
        D = self.denoiser.posterior(x, t, **cond).mean
        if self.noise_std == 0:
            # In this order, so that with a mask every number of D' is one of y or of D, to the last digit.
            return Posterior(A.pseudo_inverse(y) + (D - A.pseudo_inverse(A(D))))
        t = precise(t)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        rho = (self.noise_std * torch.hypot(alpha * self.data_std, sigma) / (sigma * self.data_std)) ** 2
        return Posterior(D + A.ridge(y - A(D), rho))

    def __repr__(self) -> str:
        return f"DDNM({self.denoiser!r}, {self.operator!r}, noise_std={self.noise_std:g})"
