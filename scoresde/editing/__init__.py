"""Editing: a given x goes to noise, part of the way or all of it, and comes back as the model's.

latents.py   encode and decode by the probability-flow ODE, and what to do with a latent
sdedit.py    sdedit: to noise by perturbation
edits.py     edit, interpolation, interpolation_grid, variations: there and back
"""

from scoresde.editing.edits import Edit, edit, interpolation, interpolation_grid, variations
from scoresde.editing.latents import Inversion, decode, encode, interpolate, rescale
from scoresde.editing.sdedit import sdedit, strength_time

__all__ = [
    "Edit",
    "Inversion",
    "decode",
    "edit",
    "encode",
    "interpolate",
    "interpolation",
    "interpolation_grid",
    "rescale",
    "sdedit",
    "strength_time",
    "variations",
]
