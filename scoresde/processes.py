"""Every forward process by name, a line each."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch

from scoresde import schedules
from scoresde.chain import DDPMChain
from scoresde.checks import check_keys, check_option, made_of
from scoresde.files import parsed
from scoresde.sde import SDE

__all__ = ["SDES", "sde_from", "sde_name", "sde_of"]

SDES: dict[str, Callable[..., SDE]] = {
    "vp": schedules.VPSDE,
    "subvp": schedules.SubVPSDE,
    "cosine": schedules.CosineVPSDE,
    "ve": schedules.VESDE,
    "edm": schedules.EDMSDE,
    "flow": schedules.FlowSDE,
    "chain": DDPMChain.linear,
    "cosine-chain": DDPMChain.cosine,
}
"""Every SDE by the name that a command line and a run folder have for it."""

_OTHER_NAMES = {"ddpm": "chain", "ddpm-cosine": "cosine-chain"}


def sde_name(name: str) -> str:
    """The name in `SDES` that a word means, "chain" for "ddpm".

    Raises:
        ValueError: if there is none.
    """
    name = _OTHER_NAMES.get(name, name)
    check_option(SDES, sde=name)
    return name


def sde_of(name: str, options: Mapping[str, Any] | None = None) -> SDE:
    """The SDE of a name in `SDES`, with these arguments of its constructor.

    Raises:
        ValueError: if there is none of that name, an argument is not known, or out of its range.

    >>> sde_of("vp", {"beta_max": 10.0}), sde_of("ddpm").t_max
    (VPSDE(beta_min=0.1, beta_max=10.0, t_min=1e-05, t_max=1.0), 1000.0)
    """
    name, options = sde_name(name), dict(options or {})
    check_keys(f"sde {name!r}", options, signature(SDES[name]).parameters)
    return made_of(f"sde {name!r}", SDES[name], options)


def sde_from(text: str, arrays: Mapping[str, Any]) -> SDE | None:
    """The SDE of that repr, with what its `arrays` were, or None; nothing in the text is executed.

    >>> sde_from(repr(schedules.FlowSDE(t_max=0.9).for_data(0.5)), {})
    FlowSDE(t_min=1e-05, t_max=0.9).for_data(0.5)
    """
    made: SDE
    call_text, _, told = text.partition(".for_data(")
    try:
        if "betas" in arrays:
            made = DDPMChain(torch.as_tensor(arrays["betas"]))
        else:
            call = parsed(lambda text: ast.parse(text, mode="eval").body, call_text)
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
                return None
            kinds = {kind.__name__: kind for kind in SDES.values() if isinstance(kind, type)}
            made = kinds[call.func.id](**{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})
        if told:
            made = made.for_data(float(told.removesuffix(")")))
    except (SyntaxError, KeyError, TypeError, ValueError):
        return None
    return made if repr(made) == text else None
