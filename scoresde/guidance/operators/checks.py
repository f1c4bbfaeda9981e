"""What a method asks of an operator and a measurement before it begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scoresde.guidance.operators.base import LinearOperator, Operator, check_finite, described

__all__ = ["check_adjoint", "check_finite", "check_linear", "match_measurement"]


def check_adjoint(operator: LinearOperator, event: Tensor | Sequence[int], *, rtol: float = 1e-7) -> None:
    """The dot-product test, in float64 on one fixed pair: <A x, y> = <x, A^T y>. Cheap: every method that takes a
    linear operator makes it once.

    Args:
        event: shape of an event, or a batch of them, (B, *event), on the device to be tested on.
        rtol: largest |<A x, y> - <x, A^T y>| allowed, in units of |A x| |y| + |x| |A^T y|.

    Raises:
        TypeError: if the operator is no `LinearOperator`.
        ValueError: with the mismatch, if the test fails, or the adjoint has another shape than x.
    """
    check_linear(operator, check_adjoint.__name__)
    shape, device = (event.shape[1:], event.device) if isinstance(event, Tensor) else (event, torch.device("cpu"))
    rng = np.random.default_rng(0)  # no torch generator: it may be called under vmap

    def probe(shape: Sequence[int]) -> Tensor:
        wide = torch.float32 if device.type == "mps" else torch.float64
        return torch.from_numpy(rng.standard_normal(tuple(shape))).to(device, wide)

    with torch.no_grad():
        x = probe((operator.samples or 1, *shape))
        Ax = operator(x)
        y = probe(Ax.shape)
        back = operator.adjoint(y)
        if back.shape != x.shape:
            raise ValueError(f"{operator!r}: the adjoint returns {tuple(back.shape)} for x of shape {tuple(x.shape)}")
        left, right = (Ax * y).sum(), (x * back).sum()
        scale = Ax.norm() * y.norm() + x.norm() * back.norm()
        mismatch = float((left - right).abs() / scale) if float(scale) else 0.0
    if not mismatch <= (rtol if x.dtype == torch.float64 else max(rtol, 1e-4)):
        raise ValueError(
            f"{operator!r} fails the dot-product test: <A x, y> = {float(left):.6g}, <x, A^T y> = {float(right):.6g}, "
            f"{mismatch:.2g} apart relative to the vectors: its adjoint is not that of the operator"
        )


def check_linear(operator: object, method: object) -> None:
    """Raises TypeError unless it is a linear operator, as the method needs."""
    if not isinstance(operator, LinearOperator):
        name = method if isinstance(method, str) else type(method).__name__
        found = repr(operator) if isinstance(operator, Operator) else type(operator).__name__
        raise TypeError(f"{name} needs a LinearOperator, for its adjoint, not {found}: Mask, Blur, Matrix, ...")


def match_measurement(operator: Operator, y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype and on the device of x, (B, *event): checked to be one measurement, or one per sample; one per
    sample where the operator is.

    Raises:
        ValueError: if y has another shape than measurements of x, or neither one entry nor one per sample, or the
            operator is not for that batch.
    """
    own = False
    if isinstance(operator, Operator):
        operator.check_batch(x)
        own = operator.samples is not None
    with torch.no_grad():
        expected = operator(x[:1]).shape[1:]
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim == 0 or y.shape[1:] != expected:
        raise ValueError(
            f"y is {described(y)}, but {operator!r} of events of shape {tuple(x.shape[1:])} gives (B, "
            f"{', '.join(map(str, expected))}): give y with a batch dimension, of one entry or one per sample"
        )
    if len(y) not in (1, len(x)):
        raise ValueError(f"y has {len(y)} entries for {len(x)} samples: expected 1 or as many")
    return y.to(x).expand(len(x), *expected) if own else y.to(x)
