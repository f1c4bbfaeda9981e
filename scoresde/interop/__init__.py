"""Networks of other toolkits as denoisers: `from_...` reads their files, and never runs code in them."""

from scoresde.interop.diffusers import from_diffusers
from scoresde.interop.diffusers_back import scheduler_config, to_diffusers
from scoresde.interop.edm import from_edm
from scoresde.interop.flows import from_flow
from scoresde.interop.formats import FORMATS, Format, recognise
from scoresde.interop.guided_diffusion import from_consistency_edm, from_guided_diffusion, respaced
from scoresde.interop.lucidrains import from_lucidrains
from scoresde.interop.model import Published
from scoresde.interop.score_sde import SCORE_SDE, from_score_sde
from scoresde.interop.source import READERS, from_source, source_of

__all__ = [
    "FORMATS",
    "READERS",
    "SCORE_SDE",
    "Format",
    "Published",
    "from_consistency_edm",
    "from_diffusers",
    "from_edm",
    "from_flow",
    "from_guided_diffusion",
    "from_lucidrains",
    "from_score_sde",
    "from_source",
    "recognise",
    "respaced",
    "scheduler_config",
    "source_of",
    "to_diffusers",
]
