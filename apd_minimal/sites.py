"""Where a network uses its decomposed weights (chapter 3).

A weight may be used by several modules: tied weights, or one module under two names. Each of them is a site.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .components import Components
from .rules import Rule, rule


@dataclass(frozen=True)
class Site:
    """One module that uses a decomposed weight.

    Attributes:
        path: the parameter path under which the weight is decomposed.
        name: the module's own path in the target.
        module: the module.
        rule: how it uses its weight.
        transposed: it multiplies by the transpose of the matrix named by `path` (tied weights).
    """

    path: str
    name: str
    module: nn.Module
    rule: Rule
    transposed: bool

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


def find_sites(target: nn.Module, path: str, parameter: nn.Parameter) -> list[Site]:
    """Find every module that uses a parameter.

    Args:
        target: any network.
        path: the parameter's path; the module that it names fixes the orientation, and is never transposed.
        parameter: the parameter.

    Returns:
        list[Site]: one for each module, in the order of the target's.

    Raises:
        TypeError: a kind of module without a rule, or a parameter that is not a module's weight.
    """
    owner_name, _, attribute = path.rpartition(".")
    owner = target.get_submodule(owner_name)
    users = {
        name: module
        for name, module in target.named_modules()
        if any(p is parameter for p in module.parameters(recurse=False))
    }
    rules: dict[str, Rule] = {}
    for name, module in users.items():
        try:
            rules[name] = rule(module)
        except TypeError as error:
            raise TypeError(f"cannot decompose {path}: {error}") from None
        if attribute != "weight" or module._parameters.get("weight") is not parameter:
            raise TypeError(
                f"cannot decompose {path}: only the `weight` of a module is decomposed; biases stay as they are"
            )
    labels = torch.arange(parameter.numel()).reshape(parameter.shape)
    # Looked up by the module: one that has two names is listed under the first of them only.
    canonical = next(rules[name] for name, module in users.items() if module is owner).matrix(labels)
    return [
        Site(path, name, module, rules[name], not torch.equal(rules[name].matrix(labels), canonical))
        for name, module in users.items()
    ]


def lookup(known: Mapping[str, Any], path: str, kind: str) -> Any:
    """What the target has under a path, or a KeyError with the paths that come close."""
    if path not in known:
        close = difflib.get_close_matches(path, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(list(known)[:12])}"
        raise KeyError(f"the target has no {kind} {path!r}; {hint}")
    return known[path]
