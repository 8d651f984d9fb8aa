"""The networks that the book decomposes, with their known mechanisms (chapter 2)."""

from .gated import GatedFunctions, GatedInputs
from .groups import Certificate, Group, GroupOperations
from .induction import Induction, Sequences
from .modular import ModularArithmetic, ModularTask, Pairs
from .residual_mlp import ResidualMLP
from .tms import TMS
from .transformer import Questions, Transformer

__all__ = [
    "TMS", "Certificate", "GatedFunctions", "GatedInputs", "Group", "GroupOperations", "Induction", "ModularArithmetic",
    "ModularTask", "Pairs", "Questions", "ResidualMLP", "Sequences", "Transformer",
]  # fmt: skip
