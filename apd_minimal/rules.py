"""How a module uses its weight, and where a network does (chapter 3).

Everything that APD does with a layer follows from one view: an input becomes rows [B, positions, d_in], the weight a
matrix [d_in, d_out], and the rows of the product become the output again. Whatever else a module adds to its output
(a bias, an adapter, a user's hook) stays as it is. A kind of module that is not listed here can be added like this:

    @apd.rules.rule.register
    def _(module: MyLinear) -> Rule:
        return Rule(matrix=lambda w: w, weight=lambda m: m)

That is a rule for the parameter `weight`; a dictionary gives rules for parameters of other names, or for several. An
elementwise parameter [d], say, is a matrix [1, d] that every number of the input meets as a row of its own:

    @apd.rules.rule.register
    def _(module: Scale) -> dict[str, Rule]:
        unrows = lambda y, like: y.diagonal(dim1=-2, dim2=-1)
        return {"scale": Rule(lambda w: w[None], lambda m: m[0], lambda x: x[..., None], unrows)}

Where a module's output is not the product plus something, the rule says what the module computes. `product(name, x)`
is the input x times that parameter. Three matrices [heads, d, d_head] of an attention layer, used as
`einsum("btd,hde->bthe", x, W)`, become

    @apd.rules.rule.register
    def _(module: MyAttention) -> dict[str, Rule]:
        h, d, e = module.W_q.shape

        def forward(product, x):
            return module.attend(product("W_q", x), product("W_k", x), product("W_v", x))

        heads = Rule(
            matrix=lambda w: w.transpose(0, 1).flatten(1),
            weight=lambda m: m.unflatten(1, (h, e)).transpose(0, 1),
            unrows=lambda y, like: y.unflatten(-1, (h, e)),
            forward=forward,
        )
        return {"W_q": heads, "W_k": heads, "W_v": heads}

`Network.check` compares every rule with the network itself. The rarer kinds are in `kinds`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import checks
from .components import Components


def _same(t: Tensor) -> Tensor:
    return t


def _keep(rows: Tensor, like: Tensor) -> Tensor:
    return rows


@dataclass(frozen=True)
class Rule:
    """How a module uses a parameter.

    Attributes:
        matrix: parameter, as the module stores it, to matrix [d_in, d_out].
        weight: the inverse of `matrix`.
        rows: the module's input to rows [B, *positions, d_in].
        unrows: rows [B, *positions, d_out] and an output of the module (for its shape) to the module's layout; linear
            in the rows. Where there is `forward`, the input of the product stands in for the output.
        forward: what the module computes, as forward(product, *args, **kwargs) with product(name, x) for every use
            of a parameter that has a rule; None where the output is the product plus what the weight has no part in.
    """

    matrix: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor] = _same
    unrows: Callable[[Tensor, Tensor], Tensor] = _keep
    forward: Callable[..., Any] | None = None


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
def rule(module: nn.Module) -> Rule | Mapping[str, Rule]:
    """The rule for a kind of module, found by its class: for `weight`, or by name of parameter.

    Raises:
        TypeError: if there is none for this kind.
    """
    from . import kinds  # the rarer kinds register themselves

    if (found := kinds.named(module)) is not None:
        return found
    if rule.dispatch(type(module)) is not rule.dispatch(object):
        return rule(module)
    known = ", ".join(sorted(cls.__name__ for cls in rule.registry if cls is not object))
    kind = type(module).__name__
    raise TypeError(f"{kind} has no rule; known kinds: {known} (apd_minimal.rules shows how to add one)")


def rules_of(module: nn.Module) -> dict[str, Rule]:
    """The rules of a module's parameters, by name."""
    found = rule(module)
    return {"weight": found} if isinstance(found, Rule) else dict(found)


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
    flat = len(shape) == 3  # then it is a two-dimensional convolution over a picture of height one
    pads, mode = module._reversed_padding_repeated_twice, module.padding_mode.replace("zeros", "constant")
    first = isinstance(module.padding, str) or mode != "constant"  # then the picture is padded before it is unfolded
    dims = len(module.kernel_size)
    kernel, stride, padding, dilation = (
        (start, *map(int, size)) if flat else tuple(map(int, size))
        for start, size in (
            (1, module.kernel_size),
            (1, module.stride),
            (0, (0,) * dims if first else module.padding),
            (1, module.dilation),
        )
    )

    def rows(x: Tensor) -> Tensor:
        x = F.pad(x, pads, mode) if first else x
        picture = x.unsqueeze(-2) if flat else x
        found = F.unfold(picture, kernel, dilation=dilation, padding=padding, stride=stride).transpose(1, 2)
        # Each group's part of a patch is a row of its own, [B, L, groups, d_in]: it meets the outputs of all groups,
        return found if groups == 1 else found.unflatten(-1, (groups, -1))

    def unrows(y: Tensor, like: Tensor) -> Tensor:
        if groups > 1:  # and those of its own are kept.
            y = y.unflatten(-1, (groups, -1)).diagonal(dim1=2, dim2=3).transpose(2, 3).flatten(2)
        return y.transpose(1, 2).reshape(like.shape)

    return Rule(matrix=lambda w: w.flatten(1).T, weight=lambda m: m.T.reshape(shape), rows=rows, unrows=unrows)


# The output of exactly these is known to be the product plus a bias, which saves computing the product.
PLAIN = (nn.Linear, TransposedLinear, nn.Embedding, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Site:
    """One module that uses a decomposed weight: tied weights, and modules with two names, have several.

    Attributes:
        path: the parameter path under which the weight is decomposed.
        name: the module's own path in the target.
        module: the module.
        parameter: what the module calls it.
        rule: how it uses it.
        transposed: it multiplies by the transpose of the matrix named by `path` (tied weights).
    """

    path: str
    name: str
    module: nn.Module
    parameter: str
    rule: Rule
    transposed: bool

    @property
    def plain(self) -> bool:
        """Whether the output is the product plus `bias` and nothing else."""
        module = self.module
        exact = type(module) in PLAIN and "forward" not in vars(module) and not module._forward_hooks
        return exact or self.rule.forward is not None

    @property
    def bias(self) -> Tensor | None:
        """What a plain module adds to the rows of the product."""
        return None if self.rule.forward is not None else getattr(self.module, "bias", None)

    def factors(self, components: Components) -> tuple[Tensor, Tensor]:
        """The factors in the order in which this module's rows meet them: [..., C, d, m] and [..., C, m, d']."""
        a, b = components.A[self.path], components.B[self.path]
        return (b.transpose(-2, -1), a.transpose(-2, -1)) if self.transposed else (a, b)

    def sum(self, components: Components) -> Tensor:
        """Sum of the components as this module multiplies by it: [..., d, d']."""
        total = components.sum(self.path)
        return total.transpose(-2, -1) if self.transposed else total


@dataclass(frozen=True)
class Use:
    """One use of a decomposed weight during a run.

    Attributes:
        site: the module.
        rows: its input rows [B, *positions, d].
        shift: zeros that were added to its output rows [B, *positions, d']; their gradient is the output's.
    """

    site: Site
    rows: Tensor
    shift: Tensor


def busy(uses: Sequence[Use], batch: int) -> Tensor:
    """Which samples put anything at all into a decomposed weight: [B].

    For the others every component does nothing: their outputs stay those of the target, their attributions are 0.
    """
    return torch.stack([use.rows.reshape(batch, -1).any(1) for use in uses]).any(0)


def by_sample(rows: Tensor, n: int, site: Site) -> Tensor:
    """Rows with the samples as their first axis [n, *positions, d], a view.

    Samples and positions may come as one axis, sample by sample; what has a leading 1 serves all samples.

    Raises:
        ValueError: a first axis that cannot be the samples.
    """
    if rows.ndim > 1 and len(rows) == n:
        return rows
    if rows.ndim > 1 and len(rows) == 1:
        return rows.expand(n, *rows.shape[1:])
    if rows.ndim > 1 and len(rows) and len(rows) % n == 0:
        return rows.unflatten(0, (n, -1))
    raise ValueError(
        f"{site.path}: the first axis of what module {site.name!r} gets must be the {n} samples (or 1, the same for "
        f"all), got rows of shape {list(rows.shape)}: transposed or stacked inputs, and modules that see a part of the "
        "samples (experts), cannot be gated by sample"
    )


def find_parameter(parameters: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module], path: str) -> nn.Parameter:
    """The parameter under a path of the target's, if it can be decomposed as it is.

    Raises:
        KeyError: there is none.
        ValueError: it is parametrised, lazy, not real, or made in inference mode; the message says what to do.
    """
    owner, _, name = path.partition(".parametrizations.") if ".parametrizations." in path else path.rpartition(".")
    name = name.partition(".")[0]
    if owner in modules and is_parametrized(modules[owner], name):
        raise ValueError(
            f"{path}: {name} of {owner!r} is parametrised (weight norm and the like); decompose what it comes to, with "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) on a copy of the target"
        )
    parameter: nn.Parameter = lookup(parameters, path, "parameter")
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{path} is lazy, it has no shape yet: run the target on a batch first")
    if not parameter.is_floating_point() or parameter.is_inference():
        raise ValueError(
            f"{path} must hold real numbers and be made outside torch.inference_mode, got {parameter.dtype}"
        )
    return parameter


def find_sites(target: nn.Module, path: str, parameter: nn.Parameter) -> list[Site]:
    """Find every module that uses a parameter.

    Args:
        target: any network.
        path: the parameter's path; the module that it names fixes the orientation, and is never transposed.
        parameter: the parameter.

    Returns:
        list[Site]: one for each module, in the order of the target's.

    Raises:
        TypeError: a kind of module without a rule, a parameter without one, or a rule that does not fit.
    """
    owner_name, _, attribute = path.rpartition(".")
    owner = target.get_submodule(owner_name)
    labels = torch.arange(parameter.numel()).reshape(parameter.shape)
    found: list[tuple[str, nn.Module, str, Rule, Tensor]] = []
    for name, module in target.named_modules():
        for own in [key for key, p in module._parameters.items() if p is parameter]:
            try:
                rules = rules_of(module)
            except TypeError as error:
                raise TypeError(f"cannot decompose {path}: {error}") from None
            if own not in rules:
                raise TypeError(
                    f"cannot decompose {path}: of {type(module).__name__}, only `{'`, `'.join(rules)}` can be "
                    "decomposed; biases stay as they are"
                )
            matrix = rules[own].matrix(labels)
            if matrix.ndim != 2 or not torch.equal(rules[own].weight(matrix), labels):
                raise TypeError(
                    f"cannot decompose {path}: the rule of {type(module).__name__} must turn {own} into a matrix "
                    f"[d_in, d_out] and back; it gives {list(matrix.shape)} of {list(labels.shape)}"
                )
            found.append((name, module, own, rules[own], matrix))
    # Looked up by the module: one that has two names is listed under the first of them only.
    canonical = next(matrix for _, module, own, _, matrix in found if module is owner and own == attribute)
    sites = []
    for name, module, own, how, matrix in found:
        transposed = not torch.equal(matrix, canonical)
        if transposed and not torch.equal(matrix, canonical.T):
            raise TypeError(f"cannot decompose {path}: module {name!r} uses it as a matrix of another layout")
        sites.append(Site(path, name, module, own, how, transposed))
    return sites


def lookup(known: Mapping[str, Any], path: str, kind: str) -> Any:
    """What the target has under a path, or a KeyError with the paths that come close."""
    if path not in known:
        close = difflib.get_close_matches(path, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(list(known)[:12])}"
        raise KeyError(f"the target has no {kind} {path!r}; {hint}")
    return known[path]
