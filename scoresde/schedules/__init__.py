"""The forward SDEs of the field, by name, each a pair (alpha_t, sigma_t) with what is known of it in closed form.

A file a family, with the names that it gives in its own `__all__`; `catalogue.py` has every SDE by the name that a
command line and a run folder have for it, in a line of its own.
"""

from scoresde.schedules import exploding, flow, preserving
from scoresde.schedules.catalogue import SDES, sde_of
from scoresde.schedules.exploding import *
from scoresde.schedules.flow import *
from scoresde.schedules.preserving import *

__all__ = ["SDES", "sde_of"]
__all__ += exploding.__all__
__all__ += flow.__all__
__all__ += preserving.__all__
