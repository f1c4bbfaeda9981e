"""Gradients through a denoiser: of a log-density of x or of D(x, t), and products with J = dD/dx, in one call.

They are taken under torch.no_grad and inference_mode as well, where what comes out has no graph, and inside transforms
of torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.guidance.operators import LinearOperator
from scoresde.tensors import Time
from scoresde.views import combine

__all__ = [
    "Forward",
    "Product",
    "check_derivative",
    "gradient",
    "gradient_of_mean",
    "guided_by",
    "usable",
    "value_and_gradient",
]


def value_and_gradient(function: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Values, what else the function returns, and the gradient by x of the values' sum, from one call.

    It differentiates under torch.no_grad and inference_mode too, and then detaches; in grad mode the results can be
    differentiated again, by x, parameters and whatever else the function reads. Parameters get no gradients from it,
    and inside transforms of torch.func (jvp, vmap, ...) it is one itself.

    Args:
        function: of x, to values of shape (B,), each of its own sample alone, and a tensor (or tuple of them) more.
        x: shape (B, ...).

    Returns:
        values (B,), the rest, and the gradient, shape of x.

    Raises:
        ValueError: if the values have another shape, or change with x but cannot be differentiated by it.
    """

    def checked(x: Tensor) -> tuple[Tensor, Any]:
        values, rest = function(x)
        if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"the function to differentiate returned {found}: expected a value per sample, ({len(x)},)"
            )
        return values, rest

    if torch._C._functorch.peek_interpreter_stack() is not None:  # where requires_grad_ is not allowed

        def total(x: Tensor) -> tuple[Tensor, tuple[Tensor, Any]]:
            values, rest = checked(x)
            return values.sum(), (values, rest)

        g, (_, (values, rest)) = torch.func.grad_and_value(total, has_aux=True)(x)
        return values, rest, g

    again = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        if not (again and x.requires_grad):
            x = (x.clone() if x.is_inference() else x).detach().requires_grad_()
        values, rest = checked(x)
        if values.requires_grad:
            (g,) = torch.autograd.grad(values.sum(), x, create_graph=again, materialize_grads=True)
        elif torch.equal(values, checked(1.1 * x + 0.1)[0]):  # a constant
            g = torch.zeros_like(x)
        else:
            raise ValueError(
                "the function to differentiate has no derivative by x: it, or a network in it, runs under no_grad or "
                "inference_mode, or detaches x; take that away"
            )
    return (values, rest, g) if again else (values.detach(), _detached(rest), g.detach())


def gradient(log_density: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B,) of a log-density, and grad_x of their sum, shape of x: `value_and_gradient` of values alone.

    >>> with torch.no_grad():
    ...     gradient(lambda x: -x.square().sum(1) / 2, torch.tensor([[1.0, 2.0]]))
    (tensor([-2.5000]), tensor([[-1., -2.]]))
    """
    values, _, g = value_and_gradient(lambda x: (log_density(x), ()), x)
    return values, g


def check_derivative(N: Tensor, x: Tensor, output: Callable[[Tensor], Tensor]) -> None:
    """Raises ValueError if N = output(x), for an x that requires gradients, changes with x and cannot be differentiated
    by it: D = r x + s N can, and its gradient would be silently wrong."""
    if x.requires_grad and not N.requires_grad and not torch.equal(N, output(1.1 * x + 0.1)):
        raise ValueError(
            "the network's output has no derivative by x: it runs under no_grad or inference_mode, or detaches x; take "
            "that away"
        )


def gradient_of_mean(
    denoiser: Denoiser, log_density: Callable[[Tensor], Tensor], x: Tensor, t: Time, cond: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_x log_density(D(x, t)), through the network, which is called once.

    Returns:
        The network's own output N; D = r x + s N; the values (B,); and the gradient, shape of x.
    """
    t, cond = usable(t), {name: usable(value) for name, value in cond.items()}

    def of_mean(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        N = denoiser.output(x, t, **cond)
        check_derivative(N, x, lambda x: denoiser.output(x, t, **cond))
        r, s = denoiser.affine(t)
        D = combine(r, x, s, N)
        return log_density(D), (N, D)

    values, (N, D), g = value_and_gradient(of_mean, x)
    return N, D, values, g


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
    return denoiser.output(x, t, **cond), gradient(log_density, x)[1]


def usable(value: Any) -> Any:
    """A tensor that autograd may save: a copy of one that was made under inference_mode; anything else as it is."""
    if isinstance(value, Tensor) and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return value


def _detached(rest: Any) -> Any:
    if isinstance(rest, tuple):
        return tuple(map(_detached, rest))
    return rest.detach() if isinstance(rest, Tensor) else rest


Forward = Callable[[Tensor], Tensor]
Product = Callable[[Tensor], Tensor]


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


@contextmanager
def usable_gradients() -> Iterator[None]:
    """Leaves inference mode, in which nothing can be differentiated, with gradients recorded where they were before."""
    again = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(again):  # the first would turn gradients on
        yield


def differentiated(denoiser: Denoiser, x: Tensor, t: Time, cond: Mapping[str, Any], variance: bool = False) -> Mean:
    """The denoiser and products with dD/dx, from one call of it. It differentiates under no_grad too; in grad mode the
    results can be differentiated again.

    Raises:
        ValueError: if the network cannot be differentiated, or the variance is wanted and not known.
    """
    r, s = denoiser.affine(t)

    def called(x: Tensor) -> tuple[Tensor, ...]:
        """N; or D and the variance."""
        if not variance:
            return (denoiser.output(x, t, **cond),)
        D, var = denoiser.posterior(x, t, **cond)
        if var is None:
            raise ValueError(
                f"covariance='variance' needs Posterior.var, which {denoiser!r} does not know: wrap it in an "
                "AnalyticDenoiser, or take 'jacobian'"
            )
        return D, var

    def whole(x: Tensor, first: Tensor, *var: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """D, and N and the variance."""
        return (first, (combine(1 / s, first, -r / s, x), *var)) if variance else (combine(r, x, s, first), (first,))

    if torch._C._functorch.peek_interpreter_stack() is not None:  # where requires_grad_ is not allowed
        D, vjp, rest = cast(Any, torch.func.vjp(lambda x: whole(x, *called(x)), x, has_aux=True))
        return Mean(D, lambda v: vjp(v)[0], *rest)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        if not (again and x.requires_grad):
            x = x.detach().requires_grad_()
        found = called(x)
        check_derivative(found[0], x, lambda x: called(x)[0])
        D, rest = whole(x, *found)

    def transposed(v: Tensor) -> Tensor:
        if not D.requires_grad:  # a constant
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(D, x, v, retain_graph=True, create_graph=again, materialize_grads=True)
        return product

    if again:
        return Mean(D, transposed, *rest)
    return Mean(D.detach(), transposed, *(value.detach() for value in rest))


def derivative(operator: Forward, x: Tensor) -> tuple[Tensor, Product, Product]:
    """A(x), and products with its derivative at x and with the transpose of that."""
    if isinstance(operator, LinearOperator):
        return operator(x), operator, operator.adjoint
    value, vjp = cast(Any, torch.func.vjp(operator, x))
    return value, lambda v: torch.func.jvp(operator, (x,), (v,))[1], lambda u: vjp(u)[0]
