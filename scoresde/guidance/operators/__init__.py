"""Measurements y = A(x) + noise: what an inverse problem knows of x.

An operator takes a batch of events, (B, *event), to a batch of measurements, (B, *measurement), in the dtype and on the
device of its argument. A linear one has its adjoint, <A x, y> = <x, A^T y>, and the inverses

    A^+ y                          the pseudo-inverse: least squares, and of these the shortest
    A^T (A A^T + rho I)^-1 y       `ridge`: argmin_x |A x - y|^2 + rho |x|^2, which is A^+ y at rho = 0

in closed form where there is one, else by conjugate gradients. Where every non-zero singular value of A is the same s
(`singular_value`), A A^T is s^2 on the range of A, and both are A^T y / (s^2 + rho).

Complex measurements are real pairs, in a last dimension of size 2.

base.py       Operator, LinearOperator, their compositions A @ B
known.py      masks of x and of its Fourier transform
matrix.py     a dense matrix
imaging.py    grey, blur, down-sampling
nonlinear.py  quantisation, phase
words.py      operator_of: any of them by a word, "box:8,8,12,12"
checks.py     what a method asks of an operator and a measurement
"""

from scoresde.guidance.operators.base import LinearOperator, Operator
from scoresde.guidance.operators.checks import check_adjoint
from scoresde.guidance.operators.imaging import Blur, Downsample, Grey
from scoresde.guidance.operators.known import FourierSampling, Mask, box_mask, random_mask
from scoresde.guidance.operators.matrix import Matrix
from scoresde.guidance.operators.nonlinear import PhaseMagnitude, Quantise
from scoresde.guidance.operators.words import operator_of

__all__ = [
    "Blur",
    "Downsample",
    "FourierSampling",
    "Grey",
    "LinearOperator",
    "Mask",
    "Matrix",
    "Operator",
    "PhaseMagnitude",
    "Quantise",
    "box_mask",
    "check_adjoint",
    "operator_of",
    "random_mask",
]
