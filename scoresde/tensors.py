"""Small things about tensors that every module needs: times, coefficients, and the checks of both."""

from __future__ import annotations

from collections.abc import Hashable
from types import MethodType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Time",
    "as_time",
    "brief",
    "check_batch",
    "check_device",
    "dot",
    "drawn_from",
    "dtype_of_label",
    "evenly",
    "expand_like",
    "frozen",
    "known_any",
    "placed",
    "precise",
    "same",
    "shown",
    "told",
    "widen",
]

T = TypeVar("T")

Time = Tensor | float
"""One time for the batch, shape (), or one for each item, shape (B,)."""


def as_time(t: Time) -> Tensor:
    """A time as a floating tensor: numbers and integer tensors in float64, half precision raised to float32."""
    if not isinstance(t, Tensor):
        return torch.as_tensor(t, dtype=torch.float64, device="cpu")
    if not t.is_floating_point():
        return t.to(torch.float64)
    return t.to(torch.float32) if t.dtype in (torch.bfloat16, torch.float16) else t


def expand_like(c: Tensor, x: Tensor) -> Tensor:
    """The coefficient c, of shape () or (B,), shaped and cast to multiply x of shape (B, ...).

    Raises:
        ValueError: if c has neither no dimension nor one of the batch's size.
    """
    if c.ndim == 0:
        # A number on the host stays there: it multiplies a tensor on a GPU as it is, and copying it would stall.
        return c.to(dtype=x.dtype, device="cpu" if c.device.type == "cpu" else x.device)
    if c.ndim != 1 or x.ndim == 0 or c.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"a time or coefficient has shape {tuple(c.shape)} for a batch of shape {tuple(x.shape)}: "
            "give one number, or one per sample"
        )
    return c.to(dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


def brief(value: Any) -> str:
    """A value in a few words: of a tensor its shape, dtype and range, of a few numbers the numbers; else its repr, with
    the same for tensors in tuples, lists and dicts.

    >>> brief(torch.tensor([1.0, 2.0])), brief({"x": torch.arange(60).reshape(2, 30)})
    ('[1, 2]', "{'x': int64 (2, 30) from 0 to 59}")
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {brief(one)}" for key, one in value.items()) + "}"
    if type(value) in (list, tuple):
        return ("[{}]" if isinstance(value, list) else "({})").format(", ".join(map(brief, value)))
    if not isinstance(value, Tensor):
        return repr(value)
    if value.numel() <= 6 and value.ndim < 2 and not value.is_complex():
        numbers = [f"{x:.5g}" for x in value.detach().double().reshape(-1).tolist()]
        return f"[{', '.join(numbers)}]" if value.ndim else numbers[0]
    text = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    text += "" if value.device.type == "cpu" else f" on {value.device}"
    if not value.numel() or value.is_complex() or value.device.type == "meta":
        return text
    finite = (x := value.detach().double()).isfinite()
    if bool(finite.any()):
        text += f" from {float(x[finite].min()):.4g} to {float(x[finite].max()):.4g}"
    return text if bool(finite.all()) else f"{text}, {int((~finite).sum())} not finite"


def told(self: Any) -> str:
    """The `__repr__` of results, dataclasses or named tuples: a line, with their tensors as `brief` has them, and
    without what is None.
    """
    names = getattr(self, "_fields", None) or [name for name, own in self.__dataclass_fields__.items() if own.repr]
    values = {name: getattr(self, name) for name in names}
    given = (f"{name}={brief(value)}" for name, value in values.items() if value is not None)
    return f"{type(self).__name__}({', '.join(given)})"


def shown(kind: type[T]) -> type[T]:
    """A named tuple with `told` for its `__repr__`, which the class itself may not name."""
    kind.__repr__ = told  # type: ignore[method-assign]
    return kind


def check_batch(x: Tensor, name: str) -> None:
    """Raises ValueError unless x is a floating-point tensor with a batch dimension."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
        found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is {found}: expected a floating-point tensor (B, ...), images in [-1, 1] say")


def check_device(device: torch.device | str) -> None:
    """Raises ValueError if this build of torch, or this machine, has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"device={str(device)!r} is not to be had here, torch {torch.__version__}: {why}") from error


def placed(numbers: Tensor) -> Tensor:
    """Known numbers of the CPU on torch's default device; the meta device would lose them, there they stay."""
    default = torch.get_default_device()
    return numbers if default.type == "meta" else numbers.to(default)


def drawn_from(generator: torch.Generator | None, device: torch.device | str) -> torch.Generator:
    """The generator; a freshly seeded one on `device` if there is none.

    Raises:
        TypeError: if it is no torch.Generator.
        ValueError: if there is no such device.
    """
    if generator is None:
        check_device(device)
        generator = torch.Generator(device)
        generator.seed()
    if not isinstance(generator, torch.Generator):
        kind = f"{type(generator).__module__}.{type(generator).__name__}"
        raise TypeError(f"generator is {kind}: expected a torch.Generator, torch.Generator().manual_seed(0) say")
    return generator


def evenly(n: int, most: int) -> Tensor:
    """Of the numbers 0 to n - 1 at most so many, evenly spaced, the ends among them: int64, on the host.

    >>> evenly(10, 4)
    tensor([0, 3, 6, 9])
    """
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64, device="cpu").round().long()


def known_any(condition: Tensor) -> bool:
    """Whether it holds anywhere; False where looking would stall a device, or cannot be done (under vmap, or where the
    code is traced).
    """
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        return False
    try:
        return bool(condition.any())
    except RuntimeError:
        return False


def precise(t: Time) -> Tensor:
    """Time in float64, so that coefficients are; float32 on a device that has no float64."""
    t = as_time(t)
    return t if t.device.type == "mps" else t.double()


def same(a: Any, b: Any) -> bool:
    """a == b as one answer, where tensors, arrays or containers of them are in it too."""
    if isinstance(a, Tensor | np.ndarray) or isinstance(b, Tensor | np.ndarray):
        if type(a) is not type(b) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return bool((torch.as_tensor(a).cpu() == torch.as_tensor(b).cpu()).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def frozen(value: Any) -> Hashable | None:
    """A key that tells a value from every other, to the last bit, or None where there is none to be had.

    Numbers, words, tuples, lists and dicts have one, small tensors on the host, and objects of this package that hold
    nothing else: what their classes do with it is known not to change. Functions, modules and objects of other classes,
    subclasses of the package's among them, may read what they do not hold, so they have none. An object that holds more
    than what it does depends on says so in `frozen_state`.

    >>> frozen(0.5) == frozen(0.5), frozen(0.0) == frozen(-0.0), frozen(len)
    (True, False, None)
    """
    try:
        return _frozen(value)
    except (_Unknown, RuntimeError, TypeError):  # there are tensors whose numbers are not to be had
        return None


class _Unknown(Exception):
    pass


def _own(thing: Any) -> bool:
    """Whether a class or function is of this package."""
    return str(getattr(thing, "__module__", "")).startswith(_PACKAGE)


_PACKAGE = __name__.partition(".")[0] + "."
_PLAIN = (int, bool, str, type(None), torch.dtype, torch.device)


def _frozen(value: Any) -> Hashable:
    kind = type(value)
    if kind is float:
        return value.hex()  # 0.0 and -0.0 are two
    if kind in _PLAIN:
        return kind, value
    if kind is tuple or kind is list:
        return kind, tuple(map(_frozen, value))
    if kind is dict:
        return kind, tuple((_frozen(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, np.number):
        return kind, value.tobytes()
    if kind is Tensor:
        if value.device.type != "cpu" or value.requires_grad or value.nbytes > 2**16:
            raise _Unknown
        return value.dtype, value.shape, value.numpy().tobytes()
    if kind is MethodType and _own(value.__func__):
        return value.__func__, _frozen(value.__self__)
    if not _own(kind) or not hasattr(value, "__dict__"):
        raise _Unknown
    state = value.frozen_state() if hasattr(kind, "frozen_state") else vars(value)
    return kind, tuple(state), tuple(map(_frozen, state.values()))


def widen(x: Tensor) -> Tensor:
    """x in float32 where it is in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dtype_of_label(label: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Floating-point labels reach the network in float32 at least."""
    return torch.promote_types(dtype, torch.float32) if label.is_floating_point() else label.dtype


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample, for a and b of shape (B, ...): shape (B,)."""
    return (a * b).reshape(len(a), -1).sum(1)
