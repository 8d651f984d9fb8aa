"""Steps on plain networks of any size, to measure what a step costs and what makes it cheaper (chapters 18 and 19).

`Plain` trains the network, `ours` begins a run of `decompose`, `Paper` is the paper's formulation. All of them use one
batch of dense inputs, so that no sample is skipped; the outputs are linear, so that none of them is off.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn

import apd_minimal as apd
from apd_minimal.algorithm import begin
from apd_minimal.attributions import Attribution
from apd_minimal.train import Run

Step = Callable[[], Any]
PAPER = {"simplicity": 10.0, "scrub": 0.0, "tidy_every": 0.0, "warmup": 0.0, "init_std": 0.02}
STEPS = 10_000  # of a run: so many that logging, every fiftieth step, is negligible


@dataclass(frozen=True)
class Size:
    """A multi-layer perceptron and its decomposition.

    Attributes:
        width: inputs, and units of each hidden layer.
        depth: number of weights, all of them decomposed.
        n_out: number of outputs.
        batch: B.
        n_components: C.
        rank: m; None for full rank.
        top_k: mean number of active components per sample.
    """

    width: int = 256
    depth: int = 3
    n_out: int = 16
    batch: int = 256
    n_components: int = 32
    rank: int | None = 4
    top_k: float = 2.0

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of every weight."""
        widths = [self.width] * self.depth + [self.n_out]
        return list(pairwise(widths))

    def target(self) -> nn.Sequential:
        """Create the network, its weights drawn."""
        layers: list[nn.Module] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for d, e in self.shapes:
                layers += [nn.Linear(d, e), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def inputs(self) -> Tensor:
        """Draw one batch [B, width]."""
        return torch.randn(self.batch, self.width, generator=torch.Generator().manual_seed(1))

    def asdict(self) -> dict[str, Any]:
        """Return its fields, its shapes and the number of entries in its weights, for a table."""
        return asdict(self) | {"shapes": self.shapes, "entries": sum(d * e for d, e in self.shapes)}


class Plain:
    """One step of training the network: forward, squared error, backward, fused Adam."""

    def __init__(self, size: Size) -> None:
        self.target, self.x = size.target(), size.inputs()
        self.labels = torch.randn(size.batch, size.n_out, generator=torch.Generator().manual_seed(2))
        self.optimiser = torch.optim.Adam(self.target.parameters(), lr=1e-3, fused=True)

    def step(self) -> None:
        """Take one training step."""
        self.optimiser.zero_grad()
        F.mse_loss(self.target(self.x), self.labels).backward()
        self.optimiser.step()


def ours(
    size: Size,
    attribution: Attribution | None = None,
    micro_batch: int | None = None,
    recompute: bool = False,
    **settings: Any,
) -> Run:
    """Begin a run of `decompose` with the paper's losses, before its first step; `advance` takes one."""
    target, x = size.target(), size.inputs()
    weights = [name for name, parameter in target.named_parameters() if parameter.ndim == 2]
    numbers = {"n_components": size.n_components, "top_k": size.top_k, "rank": size.rank, "steps": STEPS}
    config = apd.Config.from_dict({**numbers, **PAPER, **settings})
    network = apd.Network(target, weights, None, (), recompute)
    return begin(network, lambda step, generator: x, config, "mse", attribution, micro_batch)


class Paper:
    """A step in the paper's formulation: one pass per output over [B, C, d_out], everything dense, Adam not fused."""

    def __init__(self, size: Size) -> None:
        self.size, self.target, self.x = size, size.target(), size.inputs()
        self.layers = [layer for layer in self.target if isinstance(layer, nn.Linear)]
        generator, C = torch.Generator().manual_seed(0), size.n_components
        sizes = [(d, size.rank or min(d, e), e) for d, e in size.shapes]
        self.A = [0.02 * torch.randn(C, d, m, generator=generator) for d, m, _ in sizes]
        self.B = [0.02 * torch.randn(C, m, e, generator=generator) for _, m, e in sizes]
        self.factors = [t.requires_grad_() for t in (*self.A, *self.B)]
        self.optimiser = torch.optim.Adam(self.factors, lr=1e-3, fused=False, foreach=False)

    def activations(self, i: int, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute every component's activations for a layer's inputs: [B, C, d_out]."""
        inner = einsum("bd,cdm->bcm", rows, self.A[i])
        if mask is not None:
            inner = inner * mask[..., None]
        return einsum("bcm,cme->bce", inner, self.B[i])

    def attributions(self) -> tuple[Tensor, Tensor]:
        """Compute root mean squares over outputs [B, C], and the target's outputs."""
        rows, before, after = self.x, [], []
        for i, layer in enumerate(self.layers):
            before.append(torch.relu(rows) if i else rows)
            after.append(layer(before[-1]))
            rows = after[-1]
        with torch.no_grad():
            components = [self.activations(i, rows) for i, rows in enumerate(before)]
        scores = torch.zeros_like(components[0][..., 0])
        for o in range(self.size.n_out):
            gradients = torch.autograd.grad(rows[:, o].sum(), after, retain_graph=True)
            along = [einsum("bce,be->bc", y, g) for y, g in zip(components, gradients, strict=True)]
            scores += torch.stack(along).sum(0) ** 2
        return (scores / self.size.n_out).sqrt(), rows.detach()

    def sparse(self, mask: Tensor) -> Tensor:
        """Compute the outputs of the active components [B, n_out]."""
        rows = self.x
        for i, layer in enumerate(self.layers):
            rows = self.activations(i, torch.relu(rows) if i else rows, mask).sum(1) + layer.bias.detach()
        return rows

    def losses(self) -> dict[str, Tensor]:
        """Compute each loss, a scalar."""
        scores, target_outputs = self.attributions()
        kept = scores.flatten().topk(int(self.size.top_k * self.size.batch)).indices
        mask = torch.zeros_like(scores).flatten().scatter_(0, kept, 1.0).view_as(scores)
        faithful, simple = torch.zeros(()), torch.zeros(())
        for a, b, layer in zip(self.A, self.B, self.layers, strict=True):
            faithful = faithful + (einsum("cdm,cme->de", a, b) - layer.weight.detach().T).square().sum()
            lengths = (a.square().sum(1) * b.square().sum(2) + 1e-16).pow(0.45)  # p = 0.9
            simple = simple + einsum("cm,bc->bcm", lengths, mask).sum()
        n_entries = sum(d * e for d, e in self.size.shapes)
        return {
            "faithfulness": faithful / n_entries,
            "minimality": (self.sparse(mask) - target_outputs).square().mean(),
            "simplicity": simple / (n_entries * self.size.batch),
        }

    def step(self) -> None:
        """Take one training step."""
        losses = self.losses()
        self.optimiser.zero_grad()
        (losses["faithfulness"] + 10 * losses["minimality"] + 10 * losses["simplicity"]).backward()
        self.optimiser.step()


def timed(makers: Mapping[str, Callable[[], Step]], rounds: int = 3, seconds: float = 0.15) -> dict[str, float]:
    """Measure median CPU seconds of each kind of step, in rounds, so that a disturbance hits all alike.

    Args:
        makers: per kind, a function that returns a step.
        rounds: number of rounds; a step of over three seconds is timed only once.
        seconds: spent on each kind in a round, unless one step takes longer.

    Returns:
        dict[str, float]: CPU seconds by kind.
    """
    steps = {kind: make() for kind, make in makers.items()}
    samples: dict[str, list[float]] = {kind: [] for kind in steps}
    for kind, step in steps.items():
        step()  # to warm up
        samples[kind] = [_clocked(step)]
    times = {kind: samples[kind][0] for kind in steps}
    for _ in range(rounds):
        for kind, step in steps.items():
            if times[kind] < 3:
                samples[kind] += [_clocked(step) for _ in range(min(50, max(1, int(seconds / times[kind]))))]
    return {kind: median(values) for kind, values in samples.items()}


def _clocked(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def high_water() -> float:
    """Read the peak memory of this process so far, in megabytes."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def peak(make: Callable[[], Step], n_steps: int = 2) -> float:
    """Measure the megabytes that two steps add, at their peak, to a process that has taken a few tiny ones.

    The process is forked from this one, which should not have allocated much before.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_peak, args=(make, n_steps, send))
    child.start()
    send.close()
    megabytes: float = receive.recv()
    child.join()
    return megabytes


def _peak(make: Callable[[], Step], n_steps: int, send: Any) -> None:
    tiny = Size(8, 2, 2, 8, 4, 1, 1.0)
    Plain(tiny).step()
    ours(tiny).advance()
    before = high_water()
    step = make()
    for _ in range(n_steps):
        step()
    send.send(high_water() - before)
