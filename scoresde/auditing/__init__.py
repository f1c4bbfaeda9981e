"""Anyone's sampler against the truth.

model.py         what a sampler is given, and what is watched of it
forms.py         the samplers of other libraries, each in one form; schedulers.py those of diffusers
table.py         a sampler's table, found from the outside, and the law that follows from it
bench.py         the problems
convergence.py   order, limit, where convergence stops; laws.py bias and covariance; conduct.py all else
signatures.py    names for what is wrong
audit.py         `audit`, which asks all of them; figure.py what it returns; picture.py its picture
"""

from scoresde.auditing.audit import audit
from scoresde.auditing.figure import Audit, Figure
from scoresde.auditing.forms import form_of, load
from scoresde.auditing.model import Form, Model

__all__ = ["Audit", "Figure", "Form", "Model", "audit", "form_of", "load"]
