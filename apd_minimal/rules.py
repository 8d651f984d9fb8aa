"""One rule for each kind of module: how it uses its weight as `rows @ matrix` (chapter 3).

Everything that APD does with a layer follows from one view: the input is reshaped to rows [B, positions, d_in], the
weight to a matrix [d_in, d_out], and their product to the output. Whatever else a module adds to its output (a bias,
an adapter, a user's hook) is left unchanged. A kind of module that is not listed here can be added like this:

    @apd.rules.rule.register
    def _(module: MyLinear) -> Rule:
        return Rule(matrix=lambda w: w, weight=lambda m: m)

That is a rule for the parameter `weight`; a dictionary gives rules for parameters of other names, or for several. An
elementwise parameter [d], for example, is a matrix [1, d], and every number of the input is a row of its own:

    @apd.rules.rule.register
    def _(module: Scale) -> dict[str, Rule]:
        unrows = lambda y, like: y.diagonal(dim1=-2, dim2=-1)
        return {"scale": Rule(lambda w: w[None], lambda m: m[0], lambda x: x[..., None], unrows)}

If a module's output is not the product plus a constant, the rule defines the module's forward pass. `product(name, x)`
is the input x times that parameter. Three matrices [heads, d, d_head] of an attention layer, used as
`einsum("btd,hde->bthe", x, W)`, become:

    @apd.rules.rule.register
    def _(module: MyAttention) -> dict[str, Rule]:
        h = len(module.W_q)

        def forward(product, x):
            return module.attend(product("W_q", x), product("W_k", x), product("W_v", x))

        heads = Rule(
            matrix=lambda w: rearrange(w, "h d e -> d (h e)"),
            weight=lambda m: rearrange(m, "d (h e) -> h d e", h=h),
            unrows=lambda y, like: rearrange(y, "... (h e) -> ... h e", h=h),
            forward=forward,
        )
        return {"W_q": heads, "W_k": heads, "W_v": heads}

`Network.check` compares every rule with the network itself. The rarer kinds are in `kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import checks


def _same(t: Tensor) -> Tensor:
    return t


def _keep(rows: Tensor, like: Tensor) -> Tensor:
    return rows


@dataclass(frozen=True)
class Rule:
    """How a module uses a parameter.

    Attributes:
        matrix: maps the parameter, as the module stores it, to a matrix [d_in, d_out].
        weight: the inverse of `matrix`.
        rows: maps the module's input to rows [B, *positions, d_in].
        unrows: maps rows [B, *positions, d_out] and an output of the module (for its shape) to the output's layout;
            linear in the rows. With `forward`, it gets the product's input in place of the output.
        forward: the module's forward pass, as forward(product, *args, **kwargs) with product(name, x) for every use
            of a parameter that has a rule; None if the output is the product plus terms without the weight.
    """

    matrix: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor] = _same
    unrows: Callable[[Tensor, Tensor], Tensor] = _keep
    forward: Callable[..., Any] | None = None


class TransposedLinear(nn.Module):
    """A tied decoder: y = x @ weight, sharing the weight [d_hidden, d] of an `nn.Linear(d, d_hidden)`.

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
        checks.tensor("x", x, ..., len(self.weight), finite=False, like=self.weight)
        return x @ self.weight


@singledispatch
def rule(module: nn.Module) -> Rule | Mapping[str, Rule]:
    """Look up the rule for a kind of module by its class: for `weight`, or by parameter name.

    Raises:
        TypeError: no rule for this kind.
    """
    from .kinds import rarer  # importing it registers them

    return rarer(module)


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
    shape, groups = module.weight.shape, module.groups
    flat = len(shape) == 3  # one-dimensional: a convolution over an image of height one
    pads, mode = module._reversed_padding_repeated_twice, module.padding_mode.replace("zeros", "constant")
    pad_first = isinstance(module.padding, str) or mode != "constant"  # then the image is padded before it is unfolded
    dims = len(module.kernel_size)
    kernel, stride, padding, dilation = (
        (start, *map(int, size)) if flat else tuple(map(int, size))
        for start, size in (
            (1, module.kernel_size),
            (1, module.stride),
            (0, (0,) * dims if pad_first else module.padding),
            (1, module.dilation),
        )
    )

    def rows(x: Tensor) -> Tensor:
        checks.tensor(f"the input of {type(module).__name__}", x, "B", "channels", *["size"] * dims, finite=False)
        x = F.pad(x, pads, mode) if pad_first else x
        image = x.unsqueeze(-2) if flat else x
        patches = F.unfold(image, kernel, dilation=dilation, padding=padding, stride=stride)
        # Each group's part of a patch is a row of its own; it is multiplied by the weights of all groups.
        return (
            rearrange(patches, "b (g i) l -> b l g i", g=groups) if groups > 1 else rearrange(patches, "b i l -> b l i")
        )

    def unrows(y: Tensor, like: Tensor) -> Tensor:
        if groups > 1:  # keep each group's rows times its own weights
            own = rearrange(y, "b l g (h o) -> b l g h o", h=groups).diagonal(dim1=2, dim2=3)  # [B, L, o, groups]
            y = rearrange(own, "b l o g -> b l (g o)")
        return rearrange(y, "b l o -> b o l").contiguous().reshape(like.shape)  # in the layout that a view expects

    return Rule(matrix=lambda w: w.flatten(1).T, weight=lambda m: m.T.reshape(shape), rows=rows, unrows=unrows)
