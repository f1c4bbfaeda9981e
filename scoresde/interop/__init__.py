"""Networks of other toolkits as denoisers: `from_...` reads their files, and never runs code in them."""

from scoresde.interop import model
from scoresde.interop.edm import from_edm
from scoresde.interop.model import *
from scoresde.interop.score_sde import SCORE_SDE, from_score_sde

__all__ = [*model.__all__]
__all__ += ["from_edm"]
__all__ += ["SCORE_SDE", "from_score_sde"]
