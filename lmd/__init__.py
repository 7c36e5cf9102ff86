"""Log-Normal Multiplicative Dynamics: an optimizer whose updates, noise and regularization are multiplicative.

What it is and its derivation: lmd/README.md. Importing this package loads neither numba nor triton.
"""

from lmd.combined import Combined
from lmd.division import Division, Place, divide, for_model
from lmd.optimizer import LMD
from lmd.priors import PRIORS, Prior

__all__ = ["LMD", "PRIORS", "Combined", "Division", "Place", "Prior", "divide", "for_model"]
