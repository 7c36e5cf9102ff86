"""Log-Normal Multiplicative Dynamics: an optimizer whose updates, noise and regularization are multiplicative
(lmd/README.md).

Importing this package loads neither numba nor triton.
"""

from lmd.optimizer import LMD
from lmd.priors import PRIORS, Prior

__all__ = ["LMD", "PRIORS", "Prior"]
