"""deepinv's variance-preserving sampler as a function of (denoise, x_T, times, nfe), to be audited:

    cd benchmarks
    scoresde audit deepinv_vp:variance_preserving --takes times --out page.md

In deepinv 0.4.2 its g^2 is twice that of the process; 0.5.0 has it right.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

# Where torchvision's operators do not load beside torch, its Python parts are enough.
with mock.patch.object(torch.library, "register_fake", return_value=lambda function: function):
    import torchvision  # noqa: F401
from deepinv.sampling.diffusion_sde import VariancePreservingDiffusion
from deepinv.sampling.sde_solver import EulerSolver


class Asked(torch.nn.Module):
    """The model as deepinv asks it: E[x_0] at y = x / alpha and u = sigma / alpha."""

    def __init__(self, denoise: Any) -> None:
        super().__init__()
        self.denoise = denoise

    def forward(self, y: Tensor, u: Tensor, *args: Any, **options: Any) -> Tensor:
        sde = self.denoise.sde
        t = sde.time_at(-u.double().reshape(-1)[0].log()).clamp(max=sde.t_max)
        return self.denoise(y.double() * sde.alpha(t), t).to(y.dtype)


def variance_preserving(denoise: Any, x_T: Tensor, times: Tensor, nfe: int, alpha: float = 1.0) -> tuple[Tensor, int]:
    """Euler-Maruyama on its reverse SDE (alpha = 1), or Euler on its ODE (alpha = 0)."""
    sde = denoise.sde
    process = VariancePreservingDiffusion(
        beta_min=sde.beta_min, beta_max=sde.beta_max, alpha=alpha, denoiser=Asked(denoise), minus_one_one=False,
        solver=EulerSolver(timesteps=times),
    )  # fmt: skip
    out = process.solver.sample(process, x_T)
    return out.sample, out.nfe
