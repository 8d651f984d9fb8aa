"""Integrated gradients: slopes averaged on the way from no gate to all (sundararajan2017; part III).

The path sets all gates to alpha, and alpha goes from 0 to 1. Per signed output, the values sum over components to
what the outputs gain on the way (completeness).
"""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from .. import checks
from ..components import Components
from ..network import Network
from .arguments import checked
from .coalitions import Game
from .meet import finished

METHODS = ("gausslegendre", "riemann_left", "riemann_middle", "riemann_right", "riemann_trapezoid")


@overload
def integrated_gradients(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    n_steps: int = ...,
    method: str = ...,
    remainder: bool = ...,
    per_output: bool = ...,
    return_convergence_delta: Literal[False] = ...,
    internal_batch_size: int | None = ...,
) -> Tensor: ...
@overload
def integrated_gradients(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    n_steps: int = ...,
    method: str = ...,
    remainder: bool = ...,
    per_output: bool = ...,
    return_convergence_delta: Literal[True],
    internal_batch_size: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
@checked
def integrated_gradients(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    n_steps: int = 50,
    method: str = "gausslegendre",
    remainder: bool = True,
    per_output: bool = False,
    return_convergence_delta: bool = False,
    internal_batch_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Integrated gradients of every component on every sample, along the straight path from no gate to all.

    Args:
        target: the network, plain or wrapped.
        components: C components, with or without restarts.
        x: inputs [B, ...].
        n_steps: points on the path.
        method: the quadrature, one of `METHODS`; names as in captum, whose trapezoid has weights that sum to
            (n_steps - 1) / n_steps, while all of these sum to 1.
        remainder: the path goes from theta* - sum_c P_c to the target; without, from zero to the component model.
        per_output: give the signed values [B, C, n_out] instead of their root mean square over outputs.
        return_convergence_delta: also give the error of completeness: the signed values summed over components,
            less what the outputs gain from the path's start to its end.
        internal_batch_size: samples run at a time, each counted once for every step; the result does not depend
            on it.

    Returns:
        Tensor | tuple[Tensor, Tensor]: [B, C], or [B, C, n_out] per output; and the errors [B, n_out] if asked
        for. Each with a leading axis of restarts if the components have one. Detached.

    Raises:
        ValueError: an empty batch, an unknown method, too few steps, components that do not fit.
    """
    alphas, weights = quadrature(method, n_steps)
    game = Game(target, components, remainder, internal_batch_size)
    gates = alphas[:, None].expand(-1, components.n_components)
    ends = torch.tensor([[0.0], [1.0]]).expand(-1, components.n_components)

    def scores(part: Tensor) -> tuple[Tensor, ...]:
        signed = game.slopes(part, gates, weights)
        if not return_convergence_delta:
            return (finished(signed, per_output),)
        start, end = game.values(part, ends).unbind(1)
        return finished(signed, per_output), signed.sum(2) - (end - start)

    found = game.over_samples(scores, x)
    return (found[0], found[1]) if return_convergence_delta else found[0]


def quadrature(method: str, n_steps: int) -> tuple[Tensor, Tensor]:
    """Points [n_steps] in [0, 1] and their weights [n_steps], which sum to 1, of one of `METHODS`.

    Raises:
        ValueError: an unknown method, too few steps.
    """
    checks.choice("method", method, METHODS)
    fewest = 2 if method == "riemann_trapezoid" else 1
    n_steps = checks.number("n_steps", n_steps, fewest, whole=True)
    if method == "gausslegendre":
        nodes, halves = np.polynomial.legendre.leggauss(n_steps)
        return torch.from_numpy((1 + nodes) / 2), torch.from_numpy(halves / 2)
    if method == "riemann_trapezoid":
        weights = torch.full((n_steps,), 1 / (n_steps - 1), dtype=torch.float64)
        weights[[0, -1]] /= 2
        return torch.linspace(0, 1, n_steps, dtype=torch.float64), weights
    offset = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}[method]
    alphas = (torch.arange(n_steps, dtype=torch.float64) + offset) / n_steps
    return alphas, torch.full_like(alphas, 1 / n_steps)
