"""Shapley values: what a component adds to the coalition that it joins, averaged over orders of joining.

Per signed output they sum over components to f(all) - f(none) (efficiency); components that do the same get the same,
and one that does nothing gets nothing (castro2009, lundberg2017).
"""

from __future__ import annotations

from math import comb
from typing import Literal, overload

import torch
from torch import Tensor, nn

from .. import checks
from ..components import Components
from ..network import Network
from .arguments import checked
from .coalitions import ROWS, Game
from .meet import finished

MOST_EXACT = 12  # components whose 2^C coalitions are all run
N_SAMPLES = 24  # orders, where there are more components and nothing is said


@overload
def shapley(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    n_samples: int | None = ...,
    remainder: bool = ...,
    per_output: bool = ...,
    return_std_error: Literal[False] = ...,
    internal_batch_size: int | None = ...,
    generator: torch.Generator | None = ...,
) -> Tensor: ...
@overload
def shapley(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    n_samples: int | None = ...,
    remainder: bool = ...,
    per_output: bool = ...,
    return_std_error: Literal[True],
    internal_batch_size: int | None = ...,
    generator: torch.Generator | None = ...,
) -> tuple[Tensor, Tensor]: ...
@checked
def shapley(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    n_samples: int | None = None,
    remainder: bool = True,
    per_output: bool = False,
    return_std_error: bool = False,
    internal_batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Shapley values of every component on every sample, from orders in which the components join.

    Orders are drawn in pairs, one and its reverse, and all samples share them. Whatever the orders, the signed values
    sum over components to f(all) - f(none). They have no bias; their root mean square over outputs has one, upwards,
    by the variance.

    Args:
        target: the network, plain or wrapped.
        components: C components, with or without restarts.
        x: inputs [B, ...].
        n_samples: orders, an even number; each takes C - 1 runs of the network. None runs all 2^C coalitions, which
            is exact, for up to 12 components, and takes 24 orders for more.
        remainder: theta* - sum_c P_c is in all coalitions.
        per_output: give the signed values [B, C, n_out] instead of their root mean square over outputs.
        return_std_error: also give the standard errors of the signed values, from the spread over pairs of orders;
            0 where all coalitions are run. Needs per_output, and at least four orders.
        internal_batch_size: samples run at a time, each counted once for every coalition; the result does not
            depend on it.
        generator: draws the orders; its device must be the CPU.

    Returns:
        Tensor | tuple[Tensor, Tensor]: [B, C], or [B, C, n_out] per output; and standard errors [B, C, n_out] if asked
        for. Each with a leading axis of restarts if the components have one. Detached.

    Raises:
        ValueError: an empty batch, an odd number of orders, or too few; components that do not fit.
    """
    C = components.n_components
    if n_samples is None and C > MOST_EXACT:
        n_samples = N_SAMPLES
    if n_samples is not None:
        n_samples = checks.number("n_samples", n_samples, whole=True)
    if n_samples is not None and (n_samples < 2 or n_samples % 2):
        raise ValueError(f"n_samples must be even, an order and its reverse at a time, got {n_samples}")
    if return_std_error and not per_output:
        raise ValueError("return_std_error needs per_output=True: the errors are those of the signed values")
    if return_std_error and n_samples == 2:
        raise ValueError("return_std_error needs n_samples of at least 4: one pair of orders has no spread")
    game = Game(target, components, remainder, internal_batch_size)
    # Drawn before the samples are split: all parts get the same orders.
    n_pairs = 0 if n_samples is None or C == 1 else n_samples // 2
    orders = [torch.randperm(C, generator=generator) for _ in range(n_pairs)]

    def scores(part: Tensor) -> tuple[Tensor, ...]:
        signed, error = _sampled(game, part, orders) if orders else _exact(game, part)
        return (finished(signed, per_output), error) if return_std_error else (finished(signed, per_output),)

    found = game.over_samples(scores, x)
    return (found[0], found[1]) if return_std_error else found[0]


def _sampled(game: Game, x: Tensor, orders: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean over pairs of orders, [R, B, C, n_out], and its standard error."""
    C = len(orders[0])
    first = torch.ones(C, C).tril(-1)[1:]  # the coalitions on the way, by place in the order: [C - 1, C]
    nobody, everybody = game.values(x, torch.tensor([[0.0], [1.0]]).expand(-1, C)).split(1, dim=1)
    mean, spread = torch.zeros_like(nobody), torch.zeros_like(nobody)  # [R, C, B, n_out] from the first pair on
    for n, order in enumerate(orders, start=1):
        both = []
        for way in (order, order.flip(0)):
            place = way.argsort()
            worth = torch.cat([nobody, game.values(x, first[:, place]), everybody], dim=1)
            both.append(worth.diff(dim=1)[:, place])
        pair = (both[0] + both[1]) / 2
        off = pair - mean
        mean = mean + off / n
        spread = spread + off * (pair - mean)  # Welford's update: no difference of large sums
    error = (spread / max(1, len(orders) - 1) / len(orders)).sqrt()
    return mean.transpose(1, 2), error.transpose(1, 2)


def _exact(game: Game, x: Tensor) -> tuple[Tensor, Tensor]:
    """All coalitions, each with the share of the orders in which it comes about."""
    C = game.components.n_components
    coalitions = (torch.arange(2**C)[:, None] >> torch.arange(C) & 1).double()  # [2^C, C]
    size = coalitions.sum(1).long()
    # The share of orders in which c has just joined a coalition of s, itself counted; 0 where there is no such one.
    joined = torch.tensor([0.0, *(1 / (C * comb(C - 1, s - 1)) for s in range(1, C + 1)), 0.0], dtype=torch.float64)
    shares = torch.where(coalitions.bool(), joined[size][:, None], -joined[size + 1][:, None])
    total: Tensor | None = None
    step = max(1, ROWS // len(x))
    for some, share in zip(coalitions.split(step), shares.split(step), strict=True):
        worth = game.values(x, some)  # [R, k, B, n_out]
        part = torch.einsum("kc,rkbo->rbco", share.to(worth), worth)
        total = part if total is None else total + part
    assert total is not None
    return total, torch.zeros_like(total)


@checked
def path_shapley(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    n_samples: int = 16,
    remainder: bool = True,
    per_output: bool = False,
    internal_batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Shapley values from gradients, for all components at once: an estimate of first order.

    Draw q from U[0, 1], let every component into the coalition with probability q, and take the derivatives of the
    outputs with respect to all gates there. Through the multilinear extension, in which q is what the path goes along,
    the mean of these derivatives is the Shapley value wherever outputs are linear in each gate by itself. Elsewhere
    there is a **bias** that more samples do not remove: a tangent stands for the step from gate 0 to gate 1, so that
    what saturates is got wrong, as with `gradient`, only less so. Every second coalition is the complement of the one
    before; with an even number of samples, outputs of the second degree in the gates are exact.

    Args:
        target: the network, plain or wrapped.
        components: C components, with or without restarts.
        x: inputs [B, ...].
        n_samples: coalitions, shared by all samples of the batch.
        remainder: theta* - sum_c P_c is in all coalitions.
        per_output: give the signed values [B, C, n_out] instead of their root mean square over outputs.
        internal_batch_size: samples run at a time, each counted once for every coalition; the result does not
            depend on it.
        generator: draws the coalitions; its device must be the CPU.

    Returns:
        Tensor: [B, C], or [B, C, n_out] per output, each with a leading axis of restarts if the components have
        one. Detached.

    Raises:
        ValueError: an empty batch, no samples, components that do not fit.
    """
    n_samples = checks.number("n_samples", n_samples, 1, whole=True)
    game = Game(target, components, remainder, internal_batch_size)
    q = torch.rand((n_samples + 1) // 2, 1, generator=generator)
    coalitions = (torch.rand(len(q), components.n_components, generator=generator) < q).double()
    gates = torch.stack([coalitions, 1 - coalitions], dim=1).flatten(0, 1)[:n_samples]
    shares = torch.full((n_samples,), 1 / n_samples)
    scores = game.over_samples(lambda part: (finished(game.slopes(part, gates, shares), per_output),), x)
    return scores[0]
