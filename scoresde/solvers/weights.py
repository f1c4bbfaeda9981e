"""The weights of every exponential method, by one formula.

An exact step of a linear SDE or ODE is a known factor of the state plus an integral of F, over the half log-SNR lambda,
with a known kernel. A method replaces F by the polynomial through the values it has, so that the weights are

    w_j = int_{lambda_t}^{lambda_s} kernel(lambda) l_j(chi(lambda)) dlambda,    l_j the Lagrange basis on nodes chi_j

in an interpolation variable chi: lambda itself (DPM-Solver++, UniPC, SA-Solver), sigma / alpha (rhoAB, ER-SDE), t (tAB)
or the angle atan(sigma / alpha) (v). With the kernel k e^{k (lambda - lambda_s)}, whose integral is 1 - e^{-k h},

    k = 1 + tau^2
        x_s = (sigma_s / sigma_t) e^{-tau^2 h} x_t + alpha_s sum_j w_j D_j + sigma_s sqrt(1 - e^{-2 tau^2 h}) z
    k = -1
        x_s = (alpha_s / alpha_t) x_t + (1 + tau^2) sigma_s sum_j w_j eps_j + tau sigma_s sqrt(e^{2h} - 1) z

(Lu et al., 2022b; Xue et al., 2023). The integral is taken by Gauss-Legendre quadrature, exact to rounding for these
kernels over any step: no phi-function cancels at small h, and no Vandermonde system is solved.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["exponential_kernel", "interpolation_weights", "lagrange_basis"]

_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(64))


def interpolation_weights(
    nodes: Tensor,
    start: Tensor,
    end: Tensor,
    kernel: Callable[[Tensor], Tensor],
    chi: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """w_j of the module's docstring for M steps at once, shape (M, J).

    Args:
        nodes: chi_j of the F values, shape (M, J), distinct in each line.
        start, end: the integration variable (lambda) at the two ends of each step, finite, shape (M,).
        kernel: of the integration variable, shape (M, Q).
        chi: the interpolation variable as a function of the integration variable, shape (M, Q); by default itself.
    """
    half = ((end - start) / 2)[:, None]
    points = start[:, None] + half * (1 + _NODES)
    values = half * _WEIGHTS * kernel(points)
    return torch.einsum("mq,mqj->mj", values, lagrange_basis(nodes, points if chi is None else chi(points)))


def lagrange_basis(nodes: Tensor, at: Tensor) -> Tensor:
    """l_j(at), shape (M, Q, J), for nodes (M, J) and points (M, Q)."""
    others = ~torch.eye(nodes.shape[1], dtype=torch.bool, device="cpu")
    gap = torch.where(others, nodes[:, :, None] - nodes[:, None, :], 1.0)
    factor = (at[:, None, None, :] - nodes[:, None, :, None]) / gap[..., None]
    return torch.where(others[..., None], factor, 1.0).prod(2).mT  # the points last: several times as fast


def exponential_kernel(k: Tensor | float, lambda_s: Tensor) -> Callable[[Tensor], Tensor]:
    """k e^{k (lambda - lambda_s)}, k a number or shape (M,)."""
    rate = torch.as_tensor(k, dtype=torch.float64, device="cpu").expand(lambda_s.shape)[:, None]
    return lambda points: rate * (rate * (points - lambda_s[:, None])).exp()
