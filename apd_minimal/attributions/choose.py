"""Which of the exact ways to gradients is least work, and how many samples to work on at a time.

What each way does is counted, in multiplications and in numbers moved, and weighed by what these take on one core; the
weights are rough and need not be those of your machine. Nothing is timed while running, so that a run gives the same
bits whenever it is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..components import Components
from ..network import Network
from ..sites import Use
from .capture import capture, forward_agrees, live

# Nanoseconds, measured on a core that takes 3e10 multiplications a second in large products.
MULTIPLIED = 1 / 30
MOVED = 1.5  # a number read, worked on and written, entry by entry
TANGENT = 4.0  # the same, of all tangents together, which leave the cache
MET = 2.0  # a component's derivative of one output, worked on entry by entry: by a use, or at the end
PASS = 4e4  # a backward pass takes at least so long for each use of a weight
FORWARD = 7e5  # and forward mode
PROBE = 2e6  # a look at some samples, to see which outputs are at rest and which gradients are shared
PROBED = 16  # so many samples
FEW = 16  # up to so many outputs all are captured, and those at rest left out afterwards
NUMBERS = 2**25  # of gradients or tangents that are held at a time

_shapes: WeakKeyDictionary[Network, dict[tuple[object, ...], _Shapes]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Shapes:
    """Of one sample: outputs; of every use of a weight its path, T, d and d'; and the uses' sites, by identity."""

    n_out: int
    uses: list[tuple[str, int, int, int]]
    sites: list[int]

    @property
    def through(self) -> int:
        """Multiplications by the decomposed weights."""
        return sum(T * d * e for _, T, d, e in self.uses)

    @property
    def outputs(self) -> int:
        """Numbers that the decomposed layers put out."""
        return sum(T * e for _, T, _, e in self.uses)


def shapes_of(network: Network, x: Tensor) -> _Shapes:
    """Count what one sample has; looked up once for inputs of one shape."""
    known = _shapes.setdefault(network, {})
    key = (x.shape[1:], x.dtype, x.device)
    if key not in known:
        record: list[Use] = []
        with torch.no_grad():
            n_out = network(x[:1], record=record).numel()
        uses = [
            (u.site.path, u.shift.numel() // u.shift.shape[-1], u.rows.shape[-1], u.shift.shape[-1]) for u in record
        ]
        known[key] = _Shapes(n_out, uses, [id(use.site) for use in record])
    return known[key]


def at_once(network: Network, components: Components, base: Components | None, x: Tensor, mode: str) -> int:
    """Choose how many samples to work on at a time where nothing is said: pieces of one size."""
    shapes = shapes_of(network, x)
    restarts, n_components = components.A[components.paths[0]].shape[:2]
    if mode == "forward":
        numbers = restarts * n_components * shapes.outputs
    else:
        numbers = (1 if base is None else restarts) * shapes.n_out * shapes.outputs
        if mode == "backward" and numbers * len(x) > NUMBERS:
            shared = _shared(network, base, x[:PROBED], shapes)
            once = sum(T * e for i, (_, T, _, e) in enumerate(shapes.uses) if i in shared)
            numbers -= numbers // shapes.outputs * once
    n_pieces = -(-numbers * len(x) // NUMBERS)
    return -(-len(x) // max(1, n_pieces))


def _shared(network: Network, base: Components | None, x: Tensor, shapes: _Shapes) -> list[int]:
    """At which uses all of some samples have the same gradients; two outputs stand for all."""
    captured = capture(network, base, x, outputs=range(min(2, shapes.n_out)))
    # By their sites, since a use that these outputs do not depend on is left out.
    alike = {id(use.site) for use in captured if use.shared}
    return [i for i, site in enumerate(shapes.sites) if site in alike]


def cheapest(
    network: Network, components: Components, base: Components | None, x: Tensor, seen: list[Tensor] | None = None
) -> str:
    """Choose the mode that takes least time by the count.

    Args:
        network: the target, wrapped.
        components: with an axis of restarts.
        base: components whose sum takes the place of the weights; None for the target's own.
        x: inputs [B, ...]; a few of them are looked at, if that can change the choice.
        seen: filled with what `live` finds on all of them, [B, n_out], where that takes hardly longer than on a few.

    Returns:
        str: one of `MODES`.
    """
    if not forward_agrees(network, x):
        return "backward"
    count = _Count(network, components, base, x)
    times = {"forward": count.forward(), "backward": count.backward(()), "sample_gradients": count.pairs(1.0)}
    n_out, some = count.shapes.n_out, x if seen is not None and count.look <= PROBE else x[:PROBED]
    on, worth = 1.0, min(times.values()) - PROBE  # what a look must promise
    if n_out > FEW and count.pairs(0.0) < worth:
        alive = live(network, base, some)
        if seen is not None and some is x:
            seen.append(alive)
        on = alive[:PROBED].double().mean().item()
        times["sample_gradients"] = count.pairs(on)
    if on > 0.5 and count.backward(range(len(count.shapes.uses))) < worth:
        times["backward"] = count.backward(_shared(network, base, some[:PROBED], count.shapes))
    return min(times, key=times.__getitem__)


def few_are_on(network: Network, components: Components, base: Components | None, x: Tensor, share: float) -> bool:
    """Once all gradients of few outputs are captured: is it less work to meet only the share of pairs that have one?"""
    count = _Count(network, components, base, x)
    return count.met_in_pairs(share * len(x) * count.n_out) < count.met(())


class _Count:
    """About how many nanoseconds each mode takes."""

    def __init__(self, network: Network, components: Components, base: Components | None, x: Tensor) -> None:
        self.shapes, self.batch = shapes_of(network, x), len(x)
        restarts, n_components = components.A[components.paths[0]].shape[:2]
        self.copies, self.tangents = 1 if base is None else restarts, restarts * n_components
        self.entries, self.n_out = components.n_entries, self.shapes.n_out
        self.ranks = [components.A[path].shape[-1] for path, _, _, _ in self.shapes.uses]
        self.run = self.shapes.through * MULTIPLIED + self.shapes.outputs * MOVED  # one sample, through the weights
        self.look = 2 * self.batch * self.run  # to find which outputs have a gradient, on all samples

    def forward(self) -> float:
        """Time the tangents."""
        inner = sum(T * m * (d + e) for m, (_, T, d, e) in zip(self.ranks, self.shapes.uses, strict=True))
        one = (self.shapes.through + inner) * MULTIPLIED + self.shapes.outputs * TANGENT
        return FORWARD * len(self.ranks) + self.batch * self.tangents * one

    def backward(self, shared: Sequence[int]) -> float:
        """Time a pass for each output; at the uses given, all samples share its gradients."""
        passes = sum(
            T * (d * e * MULTIPLIED + e * MOVED) for i, (_, T, d, e) in enumerate(self.shapes.uses) if i not in shared
        )
        every = self.n_out * (PASS * len(self.ranks) + self.batch * self.copies * passes)
        return every + self.met(shared)

    def met(self, shared: Sequence[int]) -> float:
        """Time the products with the components after that."""
        n, total = self.n_out, 0.0
        for i, (m, (_, T, d, e)) in enumerate(zip(self.ranks, self.shapes.uses, strict=True)):
            last = n if i in shared else e
            total += min(T * m * (d + last), T * d * last) + (0 if i in shared else n * T * e)
        return self.batch * self.tangents * (total * MULTIPLIED + (1 + len(self.ranks) - len(shared)) * n * MET)

    def pairs(self, on: float) -> float:
        """One pass over the pairs of a sample and an output of which a share is on."""
        n_pairs = on * self.batch * self.n_out
        run = 10 * PASS * len(self.ranks) + self.look + 3 * self.copies * n_pairs * self.run
        return run + self.met_in_pairs(n_pairs)

    def met_in_pairs(self, n_pairs: float) -> float:
        """Time the products with the components after that: half of it, since some gradients are shared most often."""
        one = self.entries * (self.tangents * MULTIPLIED + self.copies * MOVED) / 2
        return n_pairs * (one + 2 * self.tangents * MET)
