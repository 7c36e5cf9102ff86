"""The ops of the simulated machine: the table WRAPPED, and the functions that replace torch's matrix products.

`table` says how each op is simulated; `contraction`, `convolution`, `attention` and `recurrent` bring all kinds of
products to one form; `product` computes that form with its three GEMMs, fprop, dgrad and wgrad; `site` says where in
the model an op runs. In: a torch function's arguments. Out: its result, rounded as the recipe says. It imports recipes;
simulate, audit and telemetry import it.
"""

from lpsim.machine.ops.product import Product, Role, StraightThrough
from lpsim.machine.ops.site import Call, Composite, Observer, Site, site_name
from lpsim.machine.ops.table import HIDES_PRODUCTS, WRAPPED, Kind, Op, body, inplace_argument, op_name

__all__ = [
    "HIDES_PRODUCTS",
    "WRAPPED",
    "Call",
    "Composite",
    "Kind",
    "Observer",
    "Op",
    "Product",
    "Role",
    "Site",
    "StraightThrough",
    "body",
    "inplace_argument",
    "op_name",
    "site_name",
]
