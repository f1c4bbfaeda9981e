"""Editing: a given x goes to noise, part of the way or all of it, and comes back as the model's; or it goes on.

latents.py   encode and decode by the probability-flow ODE, and what to do with a latent
sdedit.py    sdedit: to noise by perturbation
edits.py     edit, interpolation, interpolation_grid, variations: there and back
extension.py extend: windows one after the other, each given the end of the last
"""

from scoresde.editing.edits import Edit, edit, interpolation, interpolation_grid, variations
from scoresde.editing.extension import extend
from scoresde.editing.latents import Inversion, decode, encode, interpolate, rescale
from scoresde.editing.sdedit import sdedit, strength_time

__all__ = [
    "Edit",
    "Inversion",
    "decode",
    "edit",
    "encode",
    "extend",
    "interpolate",
    "interpolation",
    "interpolation_grid",
    "rescale",
    "sdedit",
    "strength_time",
    "variations",
]
