"""Gradients through a denoiser: of a log-density of x or of D(x, t), and products with J = dD/dx, in one call.

All of it is `pullback`: y = f(x) and v -> (dy/dx)^T v from one call of f. It differentiates under torch.no_grad and
inference_mode as well, where what comes out has no graph; in grad mode that can be differentiated again, by x, by
parameters and whatever else f reads; inside transforms of torch.func (jvp, vmap, ...) it is one itself. Parameters get
no gradients from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.entries import mapped
from scoresde.guidance.base import scaled
from scoresde.guidance.operators import LinearOperator
from scoresde.tensors import Time, shown
from scoresde.views import combine

__all__ = [
    "Forward",
    "Mean",
    "Product",
    "derivative",
    "differentiated",
    "gradient",
    "gradient_of_mean",
    "guided_by",
    "pullback",
    "usable",
    "usable_gradients",
]

Forward = Callable[[Tensor], Tensor]
Product = Callable[[Tensor], Tensor]


@contextmanager
def usable_gradients() -> Iterator[None]:
    """Leaves inference mode, in which nothing can be differentiated, with gradients recorded where they were before."""
    again = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(again):  # the first would turn gradients on
        yield


def usable(value: Any) -> Any:
    """A tensor that autograd may save: a copy of one that was made under inference_mode; anything else as it is."""
    if isinstance(value, Tensor) and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return value


def in_transform() -> bool:
    """Whether a transform of torch.func runs, in which requires_grad_ is not allowed. Torch tells only in private."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def pullback(
    function: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]], x: Tensor, name: str
) -> tuple[Tensor, tuple[Tensor, ...], Product]:
    """y and the rest of function(x) = (y, rest), and v -> (dy/dx)^T v, from one call; inside `usable_gradients`.

    Args:
        function: of x, shape (B, ...).
        x: where.
        name: what the function is to a reader of the error.

    Raises:
        ValueError: if y changes with x and cannot be differentiated by it, where the product would be silently zero.
    """

    def checked(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, rest = function(x)
        if not x.requires_grad or y.requires_grad:
            return y, rest
        y = y.clone()  # a network may reuse the memory of its output
        if not _equal(y, function(1.1 * x + 0.1)[0]):
            raise ValueError(
                f"{name} has no derivative by x: it, or a network in it, runs under no_grad or inference_mode, or "
                "detaches x; take that away"
            )
        return y, rest

    if in_transform():
        y, vjp, rest = cast(Any, torch.func.vjp(checked, x, has_aux=True))
        return y, rest, lambda v: vjp(v)[0]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        if not (again and x.requires_grad):
            x = usable(x).detach().requires_grad_()
        y, rest = checked(x)

    def transposed(v: Tensor) -> Tensor:
        if not y.requires_grad:  # a constant
            return torch.zeros_like(x)
        (product,) = torch.autograd.grad(y, x, v, retain_graph=True, create_graph=again, materialize_grads=True)
        return product

    return (y, rest, transposed) if again else (y.detach(), tuple(value.detach() for value in rest), transposed)


@usable_gradients()
def gradient(log_density: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B,) of a log-density, each of its own sample alone, and grad_x of their sum, shape of x.

    Raises:
        ValueError: if the values have another shape; as `pullback`.

    >>> with torch.no_grad():
    ...     gradient(lambda x: -x.square().sum(1) / 2, torch.tensor([[1.0, 2.0]]))
    (tensor([-2.5000]), tensor([[-1., -2.]]))
    """

    def checked(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        values = log_density(x)
        if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"the function to differentiate returned {found}: expected a value per sample, ({len(x)},)"
            )
        return values, ()

    values, _, transposed = pullback(checked, x, "the function to differentiate")
    return values, transposed(torch.ones_like(values))


@shown
class Mean(NamedTuple):
    """The denoiser at x.

    Attributes:
        mean: D.
        transposed: v -> J^T v.
        output: N.
        var: the variance, if asked for.
    """

    mean: Tensor
    transposed: Product
    output: Tensor
    var: Tensor | None = None


def differentiated(denoiser: Denoiser, x: Tensor, t: Time, cond: Mapping[str, Any], variance: bool = False) -> Mean:
    """The denoiser and products with dD/dx, from one call of it; inside `usable_gradients`.

    Raises:
        ValueError: if the network cannot be differentiated, or the variance is wanted and not known.
    """
    x, t, cond = usable(x), usable(t), mapped(usable, dict(cond))
    r, s = denoiser.affine(t)

    def posterior(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        D, var = denoiser.posterior(x, t, **cond)
        if var is None:
            raise ValueError(
                f"covariance='variance' needs Posterior.var, which {denoiser!r} does not know: wrap it in an "
                "AnalyticDenoiser, or take 'jacobian'"
            )
        return D, (var,)

    if variance:
        D, (var,), transposed = pullback(posterior, x, "the posterior mean")
        return Mean(D, transposed, combine(1 / s, D, -r / s, x), var)
    N, _, pulled = pullback(lambda x: (denoiser.output(x, t, **cond), ()), x, "the network's output")
    N = N.clone()  # for functions of D that call the network too, and may overwrite its output
    return Mean(combine(r, x, s, N), lambda v: scaled(v, r) + pulled(scaled(v, s)), N)


@usable_gradients()
def gradient_of_mean(
    denoiser: Denoiser, log_density: Callable[[Tensor], Tensor], x: Tensor, t: Time, cond: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_x log_density(D(x, t)), through the network, which is called once.

    Returns:
        The network's own output N; D = r x + s N; the values (B,); and the gradient, shape of x.
    """
    found = differentiated(denoiser, x, t, cond)
    values, by_mean = gradient(log_density, found.mean)
    return found.output, found.mean, values, found.transposed(by_mean)


def guided_by(
    denoiser: Denoiser,
    log_density: Callable[[Tensor], Tensor],
    x: Tensor,
    t: Time,
    cond: Mapping[str, Any],
    clean: bool,
) -> tuple[Tensor, Tensor]:
    """N, and the gradient by x of log_density(x), or if `clean` of log_density(D(x, t))."""
    if clean:
        N, _, _, g = gradient_of_mean(denoiser, log_density, x, t, cond)
        return N, g
    g = gradient(log_density, x)[1]  # first: it may call the network too, which may reuse the memory of its output
    return denoiser.output(x, t, **cond), g


def derivative(operator: Forward, x: Tensor) -> tuple[Tensor, Product, Product]:
    """A(x), and products with its derivative at x and with the transpose of that."""
    if isinstance(operator, LinearOperator):
        return operator(x), operator, operator.adjoint
    value, vjp = cast(Any, torch.func.vjp(operator, x))
    return value, lambda v: torch.func.jvp(operator, (x,), (v,))[1], lambda u: vjp(u)[0]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether they are; True under vmap, where one cannot look."""
    try:
        return torch.equal(a, b)
    except RuntimeError:
        return True
