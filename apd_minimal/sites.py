"""Where a network uses its decomposed weights (chapter 3).

A weight may be used by several modules: tied weights, or one module with two names. Each use is a site.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .components import Components
from .kernels.memory import overlap, places
from .rules import Rule, TransposedLinear, rule

# Modules of exactly these classes return the product plus a bias, so that the product need not be computed again.
PLAIN = (nn.Linear, TransposedLinear, nn.Embedding, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Site:
    """One module that uses a decomposed weight.

    Attributes:
        path: the parameter path under which the weight is decomposed.
        name: the module's own path in the target.
        module: the module.
        parameter: the module's own name for it.
        rule: how the module uses the parameter.
        transposed: whether the module multiplies by the transpose of the matrix at `path` (tied weights).
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
        """The bias that a plain module adds to the rows of the product, or None."""
        return None if self.rule.forward is not None else getattr(self.module, "bias", None)

    def factors(self, components: Components) -> tuple[Tensor, Tensor]:
        """Return the factors in the order of this module's product: [..., C, d, m] and [..., C, m, d']."""
        a, b = components.A[self.path], components.B[self.path]
        return (b.transpose(-2, -1), a.transpose(-2, -1)) if self.transposed else (a, b)

    def sum(self, components: Components) -> Tensor:
        """Sum the components, transposed if this module multiplies by the transpose: [..., d, d']."""
        total = components.sum(self.path)
        return total.transpose(-2, -1) if self.transposed else total


@dataclass(frozen=True)
class Use:
    """One use of a decomposed weight during a run.

    Attributes:
        site: the module.
        rows: its input rows [B, *positions, d].
        shift: zeros added to the output rows [B, *positions, d'], so that their gradient is that of the output rows.
        like: a tensor with the shape of the module's output, and no memory.
    """

    site: Site
    rows: Tensor
    shift: Tensor
    like: Tensor


def busy(uses: Sequence[Use], batch: int) -> Tensor:
    """Find the samples with a nonzero input to at least one decomposed weight: boolean [B].

    On the others no component has an effect: the outputs are those of the target, the attributions 0.
    """
    return torch.stack([use.rows.reshape(batch, -1).any(1) for use in uses]).any(0)


def by_sample(rows: Tensor, n: int, site: Site) -> Tensor:
    """View rows with the samples as their first axis: [n, *positions, d].

    Samples and positions may be one flattened axis, sample by sample; a leading axis of size 1 is broadcast.

    Raises:
        ValueError: the first axis cannot be the samples.
    """
    if rows.ndim > 1 and len(rows) == n:
        return rows
    if rows.ndim > 1 and len(rows) == 1:
        return rows.expand(n, *rows.shape[1:])
    if rows.ndim > 1 and len(rows) and len(rows) % n == 0:
        return rows.unflatten(0, (n, -1))
    raise ValueError(
        f"{site.path}: the first axis of the input of module {site.name!r} must be the {n} samples (or 1, broadcast to "
        f"all), got rows of shape {list(rows.shape)}: give one sample as x[None], and position ids [T] as [1, T]; what "
        "is transposed or stacked, goes to some modules only (experts) or uses torch.vmap cannot be gated per sample"
    )


def rules_of(module: nn.Module) -> dict[str, Rule]:
    """Return the rules of a module's parameters, by parameter name."""
    rules = rule(module)
    return {"weight": rules} if isinstance(rules, Rule) else dict(rules)


def find_parameter(parameters: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module], path: str) -> nn.Parameter:
    """Find the target's parameter at a path, and check that it can be decomposed.

    Raises:
        KeyError: no such parameter.
        ValueError: it is parametrised, lazy, not real, or made in inference mode; the message says what to do instead.
    """
    owner, _, name = path.partition(".parametrizations.") if ".parametrizations." in path else path.rpartition(".")
    name = name.partition(".")[0]
    module, plain = modules.get(owner), re.sub("_(orig|g|v)$", "", name)  # as pruning and the older weight norm call it
    if module is not None and (is_parametrized(module, name) or isinstance(vars(module).get(plain), Tensor)):
        from .hints import PARAMETRISED

        raise ValueError(f"{path}: {name} of {owner!r} {PARAMETRISED.format(plain)}")
    parameter: nn.Parameter = lookup(parameters, path, "parameter")
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{path} is lazy and has no shape yet: run the target on a batch first")
    if not parameter.is_floating_point() or parameter.is_inference():
        raise ValueError(
            f"{path} must hold real numbers and be made outside torch.inference_mode, got {parameter.dtype}"
        )
    return parameter


def find_sites(target: nn.Module, path: str, parameter: nn.Parameter) -> list[Site]:
    """Find every module that uses a parameter, or another tensor that is a view of the same memory.

    Args:
        target: any network.
        path: the parameter's path; the module named in it defines the orientation of the matrix.
        parameter: the parameter.

    Returns:
        list[Site]: one for each module, in the order of the target's modules.

    Raises:
        TypeError: a module or a parameter without a rule, or a rule that does not match the parameter.
    """
    owner_name, _, attribute = path.rpartition(".")
    shared, sites = "", []
    try:
        canonical = _matrix(target.get_submodule(owner_name), attribute, parameter)[1]
        for name, module in target.named_modules():
            for own, t in [*module._parameters.items(), *module._buffers.items()]:
                if t is not parameter:
                    if t is None or not overlap(t, parameter):
                        continue
                    shared = f" ({f'{name}.{own}'.lstrip('.')} is a view of the same memory: give it a .clone())"
                own_rule, matrix = _matrix(module, own, t)
                transposed = not torch.equal(matrix, canonical)
                if transposed and not torch.equal(matrix, canonical.T):
                    raise TypeError(f"module {name!r} uses it as a matrix of another layout")
                sites.append(Site(path, name, module, own, own_rule, transposed))
    except TypeError as error:
        raise TypeError(f"cannot decompose {path}{shared}: {error}") from None
    return sites


def _matrix(module: nn.Module, name: str, tensor: Tensor) -> tuple[Rule, Tensor]:
    """Look up the rule for a module's tensor, and lay out as a matrix where in memory each of its numbers is."""
    rules, cells = rules_of(module), places(tensor)
    if name not in rules:
        only = f"only `{'`, `'.join(rules)}` can be decomposed; biases stay as they are"
        raise TypeError(f"of {type(module).__name__}, {only}")
    matrix = rules[name].matrix(cells)
    if matrix.ndim != 2 or not torch.equal(rules[name].weight(matrix), cells):
        raise TypeError(
            f"the rule of {type(module).__name__} must turn {name} into a matrix [d_in, d_out] and back; it gives "
            f"{list(matrix.shape)} of {list(cells.shape)}"
        )
    return rules[name], matrix


def lookup(known: Mapping[str, Any], path: str, kind: str) -> Any:
    """Look up a path of the target, or raise a KeyError that suggests similar paths."""
    if path not in known:
        from .hints import similar

        raise KeyError(f"the target has no {kind} {path!r}; {similar(path, known)}")
    return known[path]


def replaced(modules: Iterable[nn.Module], sites: Sequence[Site]) -> list[tuple[nn.Module, dict[str, Rule]]]:
    """Find the modules whose rules define their forward pass, since their output is not the product plus a constant."""
    result = []
    for module in dict.fromkeys(modules):
        own = {id(p) for p in module.parameters()}
        # Attention uses the weight of its child without calling it.
        attends = isinstance(module, nn.MultiheadAttention) and any(
            id(getattr(site.module, site.parameter)) in own for site in sites
        )
        if attends or any(site.module is module and site.rule.forward for site in sites):
            result.append((module, rules_of(module)))
    return result
