"""Rules for rarer kinds of modules; `rules` imports them when a rule is looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import checks
from .rules import Rule, rule

REFUSED = (nn.RNNBase, nn.RNNCellBase)
Product = Callable[[str, Tensor], Tensor]  # (parameter name, input) -> input times parameter


def rarer(module: nn.Module) -> Rule | Mapping[str, Rule]:
    """Find the rule for a module of a kind that is registered here, or whose library need not be installed.

    Args:
        module: of a class that had no rule before this file was imported.

    Raises:
        TypeError: no rule for this kind.
    """
    names = {cls.__name__ for cls in type(module).__mro__}
    if "Conv1D" in names and hasattr(module, "nf"):  # Hugging Face's linear layer, with its weight [d_in, d_out]
        return Rule(matrix=lambda w: w, weight=lambda m: m)
    if rule.dispatch(type(module)) is not rule.dispatch(object):
        return rule(module)
    known = ", ".join(sorted({"Conv1D", *(cls.__name__ for cls in rule.registry if cls not in (object, *REFUSED))}))
    kind = type(module).__name__
    raise TypeError(f"{kind} has no rule; known kinds: {known} (apd_minimal.rules shows how to add one)")


@rule.register(nn.ConvTranspose1d)
@rule.register(nn.ConvTranspose2d)
def _(module: nn.ConvTranspose1d | nn.ConvTranspose2d) -> Rule:
    shape, dims = module.weight.shape, range(len(module.kernel_size))
    kernel, stride, dilation, padding, added = (
        [int(size[i]) for i in dims]
        for size in (module.kernel_size, module.stride, module.dilation, module.padding, module.output_padding)
    )
    if module.groups != 1 or any(add >= step for add, step in zip(added, stride, strict=True)):
        raise TypeError(
            f"{type(module).__name__} is supported with groups=1 and output_padding below stride, got "
            f"groups={module.groups}, output_padding={module.output_padding}, stride={module.stride}"
        )
    flat = len(shape) == 3  # one-dimensional: an image of height one
    one = (1,) if flat else ()

    def rows(x: Tensor) -> Tensor:
        checks.tensor(
            f"the input of {type(module).__name__}", x, "B", "channels", *["size" for _ in dims], finite=False
        )
        return rearrange(x, "b c ... -> b (...) c")

    def unrows(y: Tensor, like: Tensor) -> Tensor:
        """Add up the overlapping patches [B, L, C k k], and crop the padding."""
        sizes: list[int] = [*one]
        crops: list[int] = []
        for i in dims:
            whole = like.shape[2 + i] + 2 * padding[i]  # includes what `output_size` may have added in the call
            more = (whole - dilation[i] * (kernel[i] - 1) - 1) % stride[i]
            sizes.append(whole - more)
            crops = [-padding[i], more - padding[i], *crops]
        folded = F.fold(
            rearrange(y, "b l d -> b d l"), tuple(sizes), (*one, *kernel), (*one, *dilation), 0, (*one, *stride)
        )
        return F.pad(folded.squeeze(-2) if flat else folded, crops)

    return Rule(
        matrix=lambda w: w.flatten(1),
        weight=lambda m: m.reshape(shape),
        rows=rows,
        unrows=unrows,
    )


@rule.register
def _(module: nn.MultiheadAttention) -> dict[str, Rule]:
    if module.bias_k is not None or module.add_zero_attn:
        raise TypeError("MultiheadAttention is supported without add_bias_kv and add_zero_attn")
    names = ["in_proj_weight"] if module._qkv_same_embed_dim else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]

    def project(product: Product, inputs: list[Tensor]) -> list[Tensor]:
        if len(names) == 3:
            outputs = [product(name, x) for name, x in zip(names, inputs, strict=True)]
        else:
            once = {id(x): product("in_proj_weight", x).chunk(3, -1) for x in inputs}
            outputs = [once[id(x)][i] for i, x in enumerate(inputs)]
        biases = (0, 0, 0) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        return [y + bias for y, bias in zip(outputs, biases, strict=True)]

    def forward(
        product: Product,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # only a hint: attn_mask is passed as well
    ) -> tuple[Tensor, Tensor | None]:
        if query.ndim != 3:
            raise ValueError(f"MultiheadAttention needs inputs with a batch axis, got shape {list(query.shape)}")
        inputs = [query, key, value]
        if not module.batch_first:
            turned = {id(x): x.transpose(0, 1) for x in inputs}
            inputs = [turned[id(x)] for x in inputs]
        q, k, v = (rearrange(y, "b t (h e) -> b h t e", h=module.num_heads) for y in project(product, inputs))
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [B, heads, T, S]
        if attn_mask is not None:
            mask = (
                rearrange(attn_mask, "(b h) t s -> b h t s", h=module.num_heads) if attn_mask.ndim == 3 else attn_mask
            )
            scores = scores + _added(mask, scores)
        if key_padding_mask is not None:
            scores = scores + _added(key_padding_mask, scores)[:, None, None]
        empty = scores.isneginf().all(-1, keepdim=True) & (not need_weights)  # torch then attends to nothing
        pattern = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
        out = module.out_proj(rearrange(pattern @ v, "b h t e -> b t (h e)"))
        if not module.batch_first:
            out = out.transpose(0, 1).contiguous()
        if not need_weights:
            return out, None
        return out, pattern.mean(1) if average_attn_weights else pattern

    return {name: Rule(matrix=lambda w: w.T, weight=lambda m: m.T, forward=forward) for name in names}


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """Convert a boolean mask (True: do not attend) to the number that is added to the scores."""
    return (
        torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
    )


@rule.register(nn.RNNBase)
@rule.register(nn.RNNCellBase)
def _(module: Any) -> Rule:
    raise TypeError(
        f"{type(module).__name__} is a fused kernel and has no rule: write its step with nn.Linear layers of the same "
        "weights, called at every position"
    )
