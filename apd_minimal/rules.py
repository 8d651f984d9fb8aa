"""One rule for each kind of module: how it uses its weight as `rows @ matrix`.

Everything that APD does with a layer follows from that view: an input becomes rows [B, positions, d_in],
the weight a matrix [d_in, d_out], the rows of the product become the output again. A kind of module that
is not listed here can be added in a few lines:

    @apd.rules.rule.register
    def _(module: MyLinear) -> Rule:
        return Rule(matrix=lambda w: w, weight=lambda m: m)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch.nn.functional as F
from torch import Tensor, nn

from . import checks


def _same(t: Tensor) -> Tensor:
    return t


def _keep(rows: Tensor, like: Tensor) -> Tensor:
    return rows


@dataclass(frozen=True)
class Rule:
    """How a module uses its weight.

    Attributes:
        matrix: weight, as the module stores it, to matrix [d_in, d_out].
        weight: the inverse of `matrix`.
        rows: the module's input to rows [B, *positions, d_in].
        unrows: rows [B, *positions, d_out] and an output of the module (for its shape) to the module's layout.
    """

    matrix: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor] = _same
    unrows: Callable[[Tensor, Tensor], Tensor] = _keep


class TransposedLinear(nn.Module):
    """A tied decoder: y = x @ weight, with the very weight [d_hidden, d] of an `nn.Linear(d, d_hidden)`.

    Args:
        encoder: the linear layer whose weight is shared.
    """

    def __init__(self, encoder: nn.Linear) -> None:
        super().__init__()
        checks.kind("encoder", encoder, nn.Linear, "an nn.Linear")
        self.weight = encoder.weight
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., d_hidden] to [..., d]."""
        checks.tensor("x", x, ..., len(self.weight), finite=False)
        return x @ self.weight


@singledispatch
def rule(module: nn.Module) -> Rule:
    """The rule for a kind of module, found by its class.

    Raises:
        TypeError: if there is none for this kind.
    """
    known = ", ".join(sorted(cls.__name__ for cls in rule.registry if cls is not object))
    kind = type(module).__name__
    raise TypeError(f"{kind} has no rule; known kinds: {known} (apd_minimal.rules shows how to add one)")


@rule.register
def _(module: nn.Linear) -> Rule:
    return Rule(matrix=lambda w: w.T, weight=lambda m: m.T)


@rule.register
def _(module: TransposedLinear) -> Rule:
    return Rule(matrix=_same, weight=_same)


@rule.register
def _(module: nn.Embedding) -> Rule:
    if module.max_norm is not None:
        raise TypeError("Embedding with max_norm changes its weight while running; max_norm must be None")
    n = module.num_embeddings
    return Rule(matrix=_same, weight=_same, rows=lambda i: F.one_hot(i.long(), n).to(module.weight.dtype))


@rule.register(nn.Conv1d)
@rule.register(nn.Conv2d)
def _(module: nn.Conv1d | nn.Conv2d) -> Rule:
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise TypeError(
            f"{type(module).__name__} is supported with groups=1, padding_mode='zeros' and numeric padding; got "
            f"groups={module.groups}, padding_mode={module.padding_mode!r}, padding={module.padding!r}"
        )
    shape = module.weight.shape
    # A one-dimensional convolution is a two-dimensional one over a picture of height one.
    flat = len(shape) == 3
    kernel, stride, padding, dilation = (
        ((first, *size) if flat else size)
        for first, size in (
            (1, module.kernel_size),
            (1, module.stride),
            (0, module.padding),
            (1, module.dilation),
        )
    )

    def rows(x: Tensor) -> Tensor:
        picture = x.unsqueeze(-2) if flat else x
        return F.unfold(picture, kernel, dilation=dilation, padding=padding, stride=stride).transpose(1, 2)

    return Rule(
        matrix=lambda w: w.flatten(1).T,
        weight=lambda m: m.T.reshape(shape),
        rows=rows,
        unrows=lambda y, like: y.transpose(1, 2).reshape(like.shape),
    )
