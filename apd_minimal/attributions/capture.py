"""What the outputs' gradients are at every use of a decomposed weight, and what goes in there.

`capture` takes a backward pass for each output. `capture_pairs` takes one for all, over the pairs of sample and
output that have a gradient at all (`live`); where most outputs are at rest this is far less work.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..components import Components
from ..kernels.rows import SharedRows, repeated
from ..network import Network
from ..sites import Site, Use

# From so many multiplications in a backward pass on, those of repeated rows are worth looking for (measured).
LARGE = 2**22
_agreeing: WeakKeyDictionary[Network, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Captured:
    """One use of a weight.

    Attributes:
        site: the module.
        rows: its input rows [R or 1, B, T, d]; T positions, flattened.
        deltas: the outputs' gradients at its output rows, [R or 1, B, n, T, d'].
    """

    site: Site
    rows: Tensor
    deltas: Tensor

    @property
    def shared(self) -> bool:
        """Do all samples have the same gradients? Then these are held once, with a stride of 0."""
        return self.deltas.stride(1) == 0

    def part(self, samples: slice) -> Captured:
        """Select some of the samples."""
        return Captured(self.site, self.rows[:, samples], self.deltas[:, samples])


def by_sample(rows: Tensor, batch: int) -> Tensor:
    """Rows of one use of a weight, [copies * B, *positions, d], as [copies, B, T, d]."""
    return rows.detach().reshape(-1, batch, rows[0].numel() // rows.shape[-1], rows.shape[-1])


def _run(network: Network, base: Components | None, x: Tensor, record: list[Use]) -> Tensor:
    """Run forward, keeping the graph: outputs [R or 1, B, n_out]."""
    with torch.enable_grad():
        out = network(x, base, record=record)
        return out.reshape(-1, len(x), out[(0,) * (1 if base is None else 2)].numel())


def capture(
    network: Network,
    base: Components | None,
    x: Tensor,
    n_probes: int | None = None,
    generator: torch.Generator | None = None,
    outputs: Sequence[int] | None = None,
) -> list[Captured]:
    """Run once forward, and once backward for each output, or for each of `n_probes` random signs of all outputs.

    Args:
        network: the target, wrapped.
        base: components whose sum takes the place of the weights, with restarts; None for the target's own weights.
        x: inputs [B, ...].
        n_probes: random sign vectors, scaled so that the mean of squares over outputs is estimated.
        generator: for the probes.
        outputs: only these of the flattened outputs; None for all.

    Returns:
        list[Captured]: one for each use of a weight that the outputs depend on, in the order of use.

    Raises:
        ValueError: outputs that depend on no decomposed weight.
    """
    record: list[Use] = []
    out = _run(network, base, x, record)
    n_out, batch = out.shape[-1], len(x)
    if n_probes is None:
        seeds = torch.eye(n_out)[:, None] if outputs is None else torch.eye(n_out)[list(outputs), None]  # [n, 1, n_out]
    else:
        # Drawn sample by sample, so that the pieces of a batch get the probes that the whole would.
        signs = torch.randint(0, 2, (batch, n_probes, n_out), generator=generator).transpose(0, 1)
        seeds = (2 * signs - 1) * n_out**-0.5  # [n, B, n_out]
    seeds = seeds.to(out)
    found: list[_Deltas | None] = [_Deltas(len(seeds)) for _ in record]
    work = batch * sum(network.weights[use.site.path].numel() for use in record)
    # Output by output: in the cache, one pass after the other is faster than all of them in one batch.
    for i, seed in enumerate(seeds):
        linear = i > 0 and work >= LARGE and any(deltas is not None and deltas.every is None for deltas in found)
        with SharedRows() if linear else nullcontext():
            passed = _gradients(out, record, seed.expand_as(out))
        for j, delta in enumerate(passed):
            deltas = found[j]
            if delta is None or deltas is None:
                found[j] = None
            else:
                deltas.add(i, by_sample(delta, batch))
    captured = [
        Captured(use.site, by_sample(use.rows, batch), deltas.joined())
        for use, deltas in zip(record, found, strict=True)
        if deltas is not None
    ]
    if not captured:
        raise ValueError("no output depends on a decomposed weight")
    return captured


def _gradients(out: Tensor, record: Sequence[Use], seed: Tensor, keep: bool = True) -> tuple[Tensor | None, ...]:
    shifts = [use.shift for use in record]
    return torch.autograd.grad(out, shifts, seed, retain_graph=keep, allow_unused=True)


class _Deltas:
    """Gradients of n outputs at one use, pass by pass; as long as all samples have the same, one is kept."""

    def __init__(self, n: int) -> None:
        self.n, self.batch = n, 0
        self.ones: list[Tensor] = []  # [R or 1, 1, T, d'], while they are shared
        self.every: Tensor | None = None  # [R or 1, B, n, T, d'], from where they are not

    def add(self, i: int, delta: Tensor) -> None:
        """Take in those of output i, [R or 1, B, T, d']."""
        self.batch = delta.shape[1]
        if self.every is None:
            one = delta[:, :1]
            if repeated(delta, 1) or torch.equal(delta, one.expand_as(delta)):
                self.ones.append(one.clone())
                return
            self.every = delta.new_empty(*delta.shape[:2], self.n, *delta.shape[2:])
            for j, earlier in enumerate(self.ones):
                self.every[:, :, j] = earlier
        self.every[:, :, i] = delta

    def joined(self) -> Tensor:
        """All of them: [R or 1, B, n, T, d'], with a stride of 0 over samples that share theirs."""
        if self.every is not None:
            return self.every
        return torch.stack(self.ones, dim=2).expand(-1, self.batch, -1, -1, -1)


def capture_pairs(
    network: Network, base: Components | None, x: Tensor, samples: Tensor, outputs: Tensor
) -> list[Captured]:
    """Find each output's gradients on its sample, for some pairs of both, in a single backward pass.

    Args:
        network: the target, wrapped.
        base: as for `capture`.
        x: inputs [B, ...].
        samples: of each pair, an index into the inputs, [pairs].
        outputs: of each pair, which of the flattened outputs, [pairs].

    Returns:
        list[Captured]: as from `capture`, but each pair counts as a sample that has one output.
    """
    record: list[Use] = []
    out = _run(network, base, x[samples], record)
    seed = torch.zeros_like(out)
    seed[:, torch.arange(len(outputs), device=out.device), outputs] = 1
    n = len(samples)
    return [
        Captured(use.site, by_sample(use.rows, n), by_sample(delta, n)[:, :, None])
        for use, delta in zip(record, _gradients(out, record, seed, keep=False), strict=True)
        if delta is not None
    ]


def live(network: Network, base: Components | None, x: Tensor) -> Tensor:
    """Find which outputs have a gradient at all, on which samples: [B, n_out].

    All layers' outputs are shifted at once in a random direction. An output that does not move has no gradient there:
    that a gradient other than 0 is at right angles to the direction does not happen.

    Raises:
        RuntimeError: what the target does has no forward mode.
    """
    record: list[Use] = []
    with torch.no_grad():
        network(x, base, record=record)
    generator = torch.Generator().manual_seed(0)
    zeros = tuple(torch.zeros_like(use.shift) for use in record)
    moves = tuple(torch.randn(t.shape[1:], generator=generator).to(t).expand_as(t) for t in zeros)
    with torch.no_grad(), plain_attention():
        moved = jvp(lambda *shifts: network(x, base, shifts=shifts), zeros, moves)[1].detach()
    return (moved.reshape(-1, len(x), moved[(0,) * (1 if base is None else 2)].numel()) != 0).any(0)


def varied(x: Tensor) -> Tensor:
    """Choose five: the two with most nonzero inputs, and three of all other densities; not those that are zero.

    In sparse data many samples are zero. In padded data they differ in length, which a target may sort by or pack: so
    they do not come in falling order.
    """
    density = x.reshape(len(x), -1).count_nonzero(1)
    order = density.argsort(descending=True, stable=True)
    last = density.count_nonzero().clamp_min(1) - 1
    return order[torch.stack([(last + 1) // 2, last, 0 * last, last.clamp_max(1), last - last // 4])]


def forward_agrees(network: Network, x: Tensor) -> bool:
    """Tell whether forward mode has the gradients that backward has; looked up once for a network.

    It has none for some operations. And it passes through `torch.no_grad` and past hooks on gradients in the target,
    which backward heeds.
    """
    if network not in _agreeing:
        try:
            agrees = _compared(network, x[varied(x)[: len(x)]])  # in memory for a piece of one sample, too
        except RuntimeError:  # no forward mode
            agrees = False
        if agrees is None:
            return True
        _agreeing[network] = agrees
    return _agreeing[network]


def _compared(network: Network, x: Tensor) -> bool | None:
    """Move all layers' outputs in one random direction, and compare how far the outputs move, both ways.

    Nothing is known, None, where nothing moves either way: all outputs may be at rest on these samples.
    """
    record: list[Use] = []
    out = _run(network, None, x, record)
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(out.shape, generator=generator).to(out)
    shifts = [use.shift for use in record]
    moves = tuple(torch.randn(t.shape, generator=generator).to(t) for t in shifts)
    back = [
        torch.zeros_like(move) if g is None else g * move
        for g, move in zip(_gradients(out, record, seed, keep=False), moves, strict=True)
    ]
    zeros = tuple(torch.zeros_like(t) for t in shifts)
    with torch.no_grad(), plain_attention():
        moved = jvp(lambda *t: network(x, shifts=t), zeros, moves)[1].reshape(out.shape)
        forward = (moved * seed).sum((0, 2))
        backward = torch.stack([b.reshape(len(x), -1).sum(1) for b in back]).sum(0)
        size = torch.stack([b.norm() for b in back]).sum()
        if size == 0 and forward.norm() == 0:
            return None
        return bool((forward - backward).norm() <= (1e-3 + 32 * torch.finfo(out.dtype).eps) * size)


def plain_attention() -> AbstractContextManager[None]:
    """In forward mode attention's fused kernels are many times slower than the plain one, or fail."""
    chosen: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return chosen


@dataclass(frozen=True)
class Pairs:
    """Keep of what was captured the pairs of a sample and an output that have a gradient.

    Attributes:
        captured: each pair as a sample that has one output.
        samples: of each pair, which sample [pairs].
        outputs: of each pair, which output [pairs]; they come output by output.
        n_samples: B.
        n_outputs: n_out.
    """

    captured: list[Captured]
    samples: Tensor
    outputs: Tensor
    n_samples: int
    n_outputs: int

    @property
    def share(self) -> float:
        """Divide the pairs that have a gradient by all pairs."""
        return len(self.samples) / (self.n_samples * self.n_outputs)


def pairs_of(captured: list[Captured]) -> Pairs:
    """Pick the pairs that have a gradient from what `capture` found."""
    alive = torch.stack([use.deltas.flatten(3).any(-1).any(0) for use in captured]).any(0)  # [B, n]
    outputs, samples = alive.T.nonzero().unbind(1)
    picked = [Captured(u.site, u.rows[:, samples], u.deltas[:, samples, outputs, None]) for u in captured]
    return Pairs(picked, samples, outputs, *alive.shape)


def live_pairs(network: Network, base: Components | None, x: Tensor, alive: Tensor | None = None) -> Pairs:
    """Find the pairs that have a gradient, and capture them; all pairs, where forward mode cannot tell them.

    Args:
        network: the target, wrapped.
        base: as for `capture`.
        x: inputs [B, ...].
        alive: what `live` finds on them [B, n_out], if that is known.
    """
    if alive is None:
        if not forward_agrees(network, x):
            return pairs_of(capture(network, base, x))
        alive = live(network, base, x)
    outputs, samples = alive.T.nonzero().unbind(1)
    captured = capture_pairs(network, base, x, samples, outputs) if len(samples) else []
    return Pairs(captured, samples, outputs, *alive.shape)
