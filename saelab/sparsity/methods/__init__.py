"""The pruning methods, one file each, and the table that recipes name them from."""

from typing import Annotated

from pydantic import Field

from saelab.sparsity.methods.base import Method, Pruned
from saelab.sparsity.methods.dsnot import DSnoT
from saelab.sparsity.methods.magnitude import Magnitude, Random
from saelab.sparsity.methods.net_trim import NetTrim
from saelab.sparsity.methods.sparsegpt import SparseGPT
from saelab.sparsity.methods.spqr import SpQR
from saelab.sparsity.methods.structured import Structured
from saelab.sparsity.methods.wanda import Wanda

AnyMethod = Annotated[
    Magnitude | Random | Wanda | DSnoT | SparseGPT | NetTrim | SpQR | Structured, Field(discriminator="name")
]
"""A method by its ``name``."""

__all__ = [
    "AnyMethod",
    "DSnoT",
    "Magnitude",
    "Method",
    "NetTrim",
    "Pruned",
    "Random",
    "SpQR",
    "SparseGPT",
    "Structured",
    "Wanda",
]
