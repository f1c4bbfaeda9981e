"""Networks of other toolkits as denoisers: `from_...` reads their files, and never runs code in them."""

from scoresde.interop import model
from scoresde.interop.model import *

__all__ = [*model.__all__]
