"""Networks of other toolkits as denoisers: `from_...` reads their files, and never runs code in them."""

from scoresde.interop import model
from scoresde.interop.edm import from_edm
from scoresde.interop.model import *
from scoresde.interop.score_sde import SCORE_SDE, from_score_sde

__all__ = [*model.__all__]
__all__ += ["from_edm"]
__all__ += ["SCORE_SDE", "from_score_sde"]
from scoresde.interop import guided_diffusion, lucidrains, model
from scoresde.interop import recognise as recognition
from scoresde.interop.guided_diffusion import *
from scoresde.interop.lucidrains import *
from scoresde.interop.model import *
from scoresde.interop.recognise import *

__all__ = [
    *guided_diffusion.__all__,
    *lucidrains.__all__,
    *model.__all__,
    *recognition.__all__,
]
