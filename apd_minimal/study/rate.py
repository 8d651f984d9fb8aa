"""Bits at a fixed error: what a decomposition costs, judged without a truth (chapter 25).

On held-out inputs, one threshold on the attributions of the whole batch is lowered until the sparse network is as good
as asked. What is then active on a sample must be named, log2 of the number of components in use for each, and costs a
fixed number of bits for each unit of its rank. A decomposition is judged by these bits: at an equal error, fewer are
better. Where the error is in bits itself, as the Kullback-Leibler divergence is, both can be added, and no error needs
to be fixed (`shortest`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..attributions import Attribution, gradient
from ..components import Components, usable
from ..losses import DIVERGENCES, Divergence, kl, mse, sample_errors
from ..network import Network, as_network

SAMPLES = 512  # that are worked on at a time
EPSILONS = (0.01, 0.03, 0.1)
"""Errors at which bits are counted, unless others are given; chapter 25 says what smaller and larger ones favour."""
ALPHA = 8.0
"""Bits for each unit of rank, unless others are given; chapter 25 says for which the verdict changes."""


@dataclass(frozen=True)
class Cost:
    """What is active on a sample at one error.

    Attributes:
        error: of the sparse network; for the squared error as a share of the variance of the target's outputs, for
            the Kullback-Leibler divergence in bits.
        active: mean number of active components of a sample.
        ranks: the mean sum of their ranks.
        in_use: components that are active on some sample.
    """

    error: float
    active: float
    ranks: float
    in_use: int

    def bits(self, alpha: float = ALPHA) -> float:
        """Compute the mean bits of a sample: its ranks, and the names of its components.

        Args:
            alpha: bits for each unit of rank, 0 or above.
        """
        alpha = checks.number("alpha", alpha, 0)
        names = self.active * math.log2(self.in_use) if self.in_use > 1 else 0.0
        return alpha * self.ranks + names if self.ranks < math.inf else math.inf  # an error out of reach has no price

    def message(self, alpha: float = ALPHA) -> float:
        """Compute the mean bits of a sample and its answer: what is active, and the error, which must be in bits.

        Whoever has the components, the input and what is active can work out the sparse network's distribution, and by
        that code an answer drawn from the target's takes the divergence more bits than by the target's own code.

        Args:
            alpha: bits for each unit of rank, 0 or above.
        """
        return self.bits(alpha) + self.error


@dataclass(frozen=True)
class Judge:
    """Mean bits over a few errors, for `decompose(judge=...)`: the restart that needs the fewest is chosen.

    One error would not do: where it is small, the whole network as one lump can be the cheapest, and where it is large,
    two mechanisms in one component cost nothing (chapter 25).

    Attributes:
        epsilons: the errors, in the units of `Cost.error`.
        alpha: bits for each unit of rank.
        divergence: that of the run.
        attribution: that of the run; None for gradients at the target.
    """

    epsilons: tuple[float, ...] = EPSILONS
    alpha: float = ALPHA
    divergence: str | Divergence = "mse"
    attribution: Attribution | None = None

    def __post_init__(self) -> None:
        """Check errors and price before a run begins.

        Raises:
            TypeError, ValueError: epsilons or alpha out of range.
        """
        _checked(self.epsilons)
        checks.number("alpha", self.alpha, 0)
        _check_options(self.divergence, self.attribution)

    def __call__(self, network: Network, components: Components, x: Tensor) -> float:
        """Compute the mean bits of a sample, infinite if one of the errors is not reached."""
        found = costs(
            network,
            components,
            x,
            self.epsilons,
            divergence=self.divergence,
            attribution=self.attribution,
        )
        return sum(cost.bits(self.alpha) for cost in found) / len(found)


NEVER = Cost(math.nan, math.inf, math.inf, 0)
"""The cost where no number of active components reaches the error: its bits are infinite."""


def costs(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    epsilons: Sequence[float] = EPSILONS,
    *,
    divergence: str | Divergence = "mse",
    attribution: Attribution | None = None,
    rank_threshold: float = 0.1,
) -> list[Cost]:
    """Find the costs at which the sparse network's error is at most each epsilon.

    The number of active (sample, component) pairs is doubled until the error is that small, and the last step is then
    halved, until it is known to within 0.2%.

    Args:
        target: the network, plain or wrapped (wrap it if only some outputs count).
        components: C components, without restarts.
        x: held-out inputs [B, ...], a thousand or more; the same ones for whatever is compared.
        epsilons: errors, each above 0, in the units of `Cost.error`.
        divergence: "mse", "kl", or a function (outputs, target outputs) -> [B], whose error is taken as it is.
        attribution: (network, components, x) -> [B, (positions,) C]; None for gradients at the target. Others are, for
            instance, `partial(apd.attributions.gradient, per_position=True)`.
        rank_threshold: a singular value counts above this share of its weight's largest in any component.

    Returns:
        list[Cost]: one for each epsilon; `NEVER` where the error is larger with all components active.

    Raises:
        TypeError, ValueError: arguments that do not fit, outputs that are the same on all inputs, or errors that are
            NaN.
    """
    epsilons = _checked(epsilons)
    cost = _Costs(target, components, x, divergence, attribution, rank_threshold)
    return [_search(cost, epsilon) for epsilon in epsilons]


def _checked(epsilons: Any) -> list[float]:
    if not checks.kind("epsilons", epsilons, (list, tuple), "errors above 0, at least one"):
        raise ValueError(f"epsilons must hold at least one error, got {checks.given(epsilons)}")
    return [checks.number("epsilons", e, 0, above=True) for e in epsilons]


def _check_options(divergence: Any, attribution: Any) -> None:
    if not callable(divergence):
        checks.choice("divergence", divergence, list(DIVERGENCES))
    checks.function("attribution", attribution)


def _search(cost: _Costs, epsilon: float) -> Cost:
    if not cost.pairs or cost(cost.pairs).error > epsilon:
        return NEVER
    low, high = 0, cost.first
    while cost(high).error > epsilon:
        low, high = high, min(2 * high, cost.pairs)
    while high - low > max(1, high // 500):
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle).error <= epsilon else (middle, high)
    return cost(high)


def curve(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    divergence: str | Divergence = "mse",
    attribution: Attribution | None = None,
    rank_threshold: float = 0.1,
    points: int = 48,
) -> list[Cost]:
    """Compute the cost for numbers of active pairs from one in 64 samples to all, in equal ratios.

    Args:
        target: as for `costs`, like all others.
        components: C components.
        x: held-out inputs [B, ...].
        divergence: "mse", "kl" or a function.
        attribution: None for gradients at the target.
        rank_threshold: of `Components.ranks`.
        points: at most so many, 2 or more.

    Returns:
        list[Cost]: from few active components to all.

    Raises:
        TypeError, ValueError: as `costs`, or components that are all zero.
    """
    points = checks.number("points", points, 2, whole=True)
    cost = _Costs(target, components, x, divergence, attribution, rank_threshold)
    if not cost.pairs:
        raise ValueError("all components are zero: there is nothing to draw a curve of")
    return [cost(n) for n in _spread(cost.first, cost.pairs, points)]


def shortest(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    alpha: float = ALPHA,
    *,
    divergence: str | Divergence = "kl",
    attribution: Attribution | None = None,
    rank_threshold: float = 0.1,
) -> Cost:
    """Find the cost with the shortest message, `Cost.message`: no error is given, the sum decides how large it is.

    Numbers of active pairs as in `curve` and none at all are tried, and then those around the best, ever closer. A sum
    that has several valleys may have its best one missed, if that is narrower than a step of the curve, about 15%.

    Args:
        target: as for `costs`, like all others.
        components: C components.
        x: held-out inputs [B, ...].
        alpha: bits for each unit of rank, 0 or above: what is left to choose.
        divergence: "kl", or a function (outputs, target outputs) -> [B] in bits.
        attribution: None for gradients at the target.
        rank_threshold: of `Components.ranks`.

    Returns:
        Cost: with nothing active, if no mask is worth its bits.

    Raises:
        TypeError, ValueError: as `costs`; "mse" or `losses.mse`, which is a share and no number of bits.
    """
    alpha = checks.number("alpha", alpha, 0)
    if not callable(divergence) or divergence is mse:
        checks.choice("divergence", divergence, ["kl"])
    cost = _Costs(target, components, x, divergence, attribution, rank_threshold)
    tried = {0, *_spread(cost.first, cost.pairs, 48)} if cost.pairs else {0}
    while True:
        numbers = sorted(tried)
        best = min(range(len(numbers)), key=lambda i: cost(numbers[i]).message(alpha))
        around = numbers[max(0, best - 1) : best + 2]
        closer = {n for low, high in pairwise(around) for n in torch.linspace(low, high, 9).long().tolist()}
        if closer <= tried:
            return cost(numbers[best])
        tried |= closer


def _spread(low: int, high: int, points: int) -> list[int]:
    """Give whole numbers from low to high in about equal ratios."""
    numbers = torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.double).round().long()
    return [int(n) for n in numbers.unique()]


def _variance(outputs: Tensor) -> float:
    """Compute the mean squared distance of outputs [B, ...] from their mean.

    Args:
        outputs: of the target.

    Raises:
        ValueError: it is zero, or as small as rounding.
    """
    mean = outputs.mean(0).expand_as(outputs)
    found, rounding = float(mse(mean, outputs).mean()), torch.finfo(outputs.dtype).eps * float(mean.abs().max())
    if not found > (8 * rounding) ** 2:
        raise ValueError("the target's outputs are the same on all inputs x: no error can be given as a share")
    return found


class _Costs:
    """Called with a number of pairs, the cost with so many of them active, those of the largest attributions."""

    @torch.no_grad()
    def __init__(
        self,
        target: nn.Module | Network,
        components: Components,
        x: Tensor,
        divergence: str | Divergence,
        attribution: Attribution | None,
        rank_threshold: float,
    ) -> None:
        usable(components, alone=True)
        _check_options(divergence, attribution)
        rank_threshold = checks.number("rank_threshold", rank_threshold, 0, 1, below=True)
        self.divergence = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
        self.components = components.map(Tensor.detach)
        self.network, x = as_network(target, components), checks.inputs(x)
        self.parts = x.split(SAMPLES)
        score = attribution or gradient
        with checks.running(x, f"components of {components.parameters()[0].dtype}"):
            self.wanted = [self.network(part) for part in self.parts]
            parts = [score(self.network, self.components, part) for part in self.parts]
        for part, own in zip(self.parts, parts, strict=True):
            checks.tensor("attributions", own, len(part), ..., components.n_components, real=True)
        scores = torch.cat(parts)
        self.unit = self._unit(torch.cat(self.wanted))
        self.ranks = torch.stack(list(self.components.ranks(rank_threshold).values())).sum(0).to(scores)
        self.shape, self.found = scores.shape, dict[int, Cost]()
        live = (self.components.norms() > 0).expand(scores.shape).flatten()  # one that is zero does nothing
        order = scores.flatten().argsort(descending=True, stable=True)
        self.order = order[live[order]]
        self.pairs = len(self.order)
        self.first = max(1, min(len(x) // 64, self.pairs))

    def _unit(self, outputs: Tensor) -> float:
        if self.divergence is kl:
            return math.log(2)  # from nats to bits
        if self.divergence is not mse:
            return 1.0
        return _variance(outputs)

    @torch.no_grad()
    def __call__(self, n_pairs: int) -> Cost:
        if n_pairs not in self.found:
            gates = self.ranks.new_zeros(self.shape.numel())
            gates[self.order[:n_pairs]] = 1
            gates = gates.reshape(self.shape)
            errors = [
                sample_errors(self.network(part, self.components, on), wanted, self.divergence)
                for part, on, wanted in zip(self.parts, gates.split(SAMPLES), self.wanted, strict=True)
            ]
            counts = gates.flatten(0, -2).sum(0)  # [C]
            error = float(torch.cat(errors).mean()) / self.unit
            if math.isnan(error):  # no comparison would notice
                raise checks.NotFinite(f"divergence must give numbers, got NaN with {n_pairs} pairs active on x")
            self.found[n_pairs] = Cost(
                error=error,
                active=float(counts.sum()) / self.shape[0],
                ranks=float(counts @ self.ranks) / self.shape[0],
                in_use=int((counts > 0).sum()),
            )
        return self.found[n_pairs]
