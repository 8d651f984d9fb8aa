"""Cost model: operations and bytes moved in every part of a step, in terms of B, C, m, d and n_out (chapter 13).

    B samples, I instances (or restarts), C components, k of them active, n features and outputs;
    a weight is [d, e] and has factors [d, m] and [m, e], with m = min(d, e).

Operations are those of matrix products, two for each multiplication, as `torch.utils.flop_counter` counts them.
Elementwise operations are counted by the bytes that they must move: operands read once, results written once, float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from apd_minimal.attributions.capture import LARGE
from apd_minimal.kernels.narrow import SPARE
from apd_minimal.network import Network
from benchmarks.cases import Case

FLOAT = 4  # bytes
FUSED_ADAM = 7  # reads p, g, m, v; writes p, m, v
UNFUSED_ADAM = 18  # seven passes over the same, one operation each


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, and bytes moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(times * self.flops, times * self.bytes)

    def seconds(self, flop_rate: float, bandwidth: float) -> float:
        """Return the lower bound on the time, on a machine of these rates."""
        return max(self.flops / flop_rate, self.bytes / bandwidth)


def matmul(copies: float, rows: float, d: float, e: float) -> Work:
    """Count `copies` products [rows, d] @ [d, e]."""
    return Work(2 * copies * rows * d * e, FLOAT * copies * (rows * d + d * e + rows * e))


def moved(numbers: float) -> Work:
    """Count this many floats read or written."""
    return Work(0.0, FLOAT * numbers)


def used(case: Case) -> list[tuple[int, int, int]]:
    """List (d, m, d') of every use of a weight, in order; a TMS uses its weight twice, once transposed."""
    shapes = [case.shapes[which][:: -1 if transposed else 1] for which, transposed in case.uses]
    return [(d, min(d, e), e) for d, e in shapes]


def factors(case: Case) -> list[tuple[int, int, int]]:
    """List (d, m, e) of every weight."""
    return [(d, min(d, e), e) for d, e in case.shapes]


def _embed(case: Case, copies: float) -> Work:
    return matmul(copies, case.batch, case.n_features, case.width) if case.neurons else Work()


def _through_target(case: Case, copies: float) -> Work:
    """Count one forward pass of the target, of `copies` batches."""
    layers = [matmul(copies, case.batch, d, e) for d, _, e in used(case)]
    return sum(layers, _embed(case, 2 * copies))


def _back_to_layers(case: Case, copies: float) -> Work:
    """Count from the outputs back to the first layer's outputs: every weight but the first, and the unembedding."""
    return sum((matmul(copies, case.batch, e, d) for d, _, e in used(case)[1:]), _embed(case, copies))


def _activations(case: Case, batch: float) -> Work:
    """Count component activations of all layers, [B, I, C, m] and [B, I, C, d']."""
    copies = case.instances * case.n_components
    parts = [matmul(copies, batch, d, m) + matmul(copies, batch, m, e) for d, m, e in used(case)]
    return sum(parts, Work())


def faithfulness(case: Case) -> Work:
    """Count the sum A_c B_c for each weight, and the backward pass to both factors."""
    inner = case.n_components
    return sum((matmul(case.instances, d, inner * m, e) for d, m, e in factors(case)), Work()) * 3


def _sparse_backward(case: Case, pairs: float) -> Work:
    """Count gradients of both factors and of the inputs; the first layer's inputs need none."""
    total = Work()
    for i, (d, m, e) in enumerate(used(case)):
        total += matmul(pairs, 1, m, e) * 2 + matmul(pairs, 1, d, m) * (2 if i else 1)
    return total


def paper(case: Case) -> dict[str, Work]:
    """Count (b), the paper's formulation, part by part."""
    B, I, C, n = case.batch, case.instances, case.n_components, case.n_features
    everything = _activations(case, B)
    contraction = sum((matmul(B * I, C, e, 1) for _, _, e in used(case)), Work()) * n
    sums = sum((moved(B * I * (C + 1) * e) for _, _, e in used(case)), Work())
    forward = everything + sums + _embed(case, 2)
    masked = moved(sum(2 * B * I * C * m for _, m, _ in used(case)))
    lengths = sum(B * I * C * m for _, m, _ in factors(case))
    return {
        "attribution": _through_target(case, I) + everything + _back_to_layers(case, I) * n + contraction,
        "unused forward": forward,
        "sparse forward": forward + masked + _sparse_backward(case, B * I * C) + _embed(case, 1),
        "faithfulness": faithfulness(case),
        "simplicity": moved(3 * lengths),  # masked, summed; and back
        "optimiser": moved(UNFUSED_ADAM * case.parameters),
    }


def backward(case: Case, batch: float) -> Work:
    """Count exact attributions at the target: a backward pass for each output, and one contraction a layer."""
    copies, n, uses = case.instances * case.n_components, case.n_features, used(case)
    total = _captured(case, batch)
    for i, (d, m, e) in enumerate(uses):
        k = case.n_features + 1 + SPARE  # an embedding's rows span few directions
        if case.neurons and 4 * k <= min(batch, d) and _pays(case, batch, d, copies * m):
            total += matmul(1, d, batch, k) + matmul(1, batch, d, k) + matmul(1, batch, k, d)
            total += matmul(copies, k, d, m)
            d = k
        linear = bool(case.neurons) and i == len(uses) - 1  # the same gradients for all samples
        last = n if linear else e
        if linear:
            total += matmul(copies, m, e, n)
        if m * d * last + batch * d * last <= batch * m * (d + last):
            total += matmul(copies, d, m, last) + matmul(1, batch, d, copies * last)
        else:
            total += matmul(copies, batch, d, m) + matmul(copies, batch, m, last)
        if not linear:
            total += matmul(batch, copies, e, n)
    return total


def _pays(case: Case, batch: float, d: int, width: int) -> bool:
    k = case.n_features + 1
    return 2 * (k * (d + batch) * width + 3 * batch * d * k) <= batch * d * width


def _captured(case: Case, batch: float) -> Work:
    """Count one forward pass, and a backward pass for each output; what samples share is multiplied once."""
    share, passes, weights = batch / case.batch, case.n_features, sum(d * e for d, _, e in used(case))
    total = _through_target(case, 1) * share
    if not case.neurons or batch * weights < LARGE:
        return total + _back_to_layers(case, 1) * (passes * share)
    d, _, e = used(case)[-1]
    linear = _embed(case, 1) + matmul(1, case.batch, e, d)
    rest = sum((matmul(1, case.batch, e, d) for d, _, e in used(case)[1:-1]), Work())
    return total + linear * share + linear * ((passes - 1) / case.batch) + rest * (passes * share)


def sample_gradients(case: Case, batch: float, pairs: float) -> Work:
    """Count exact attributions from the gradient of every output that is not off, for each sample.

    Args:
        case: which experiment.
        batch: samples.
        pairs: number of (sample, output) pairs with a gradient.

    Returns:
        Work: in total.
    """
    copies, n, share = case.instances * case.n_components, case.n_features, 1 / case.batch
    # Finding the outputs that are off; torch runs operations with tangents once more, for their values.
    total = (_through_target(case, 2) + _back_to_layers(case, 2)) * (batch * share)
    total += (_through_target(case, 1) + _back_to_layers(case, 1)) * (pairs * share)
    uses = used(case)
    for i, (d, m, e) in enumerate(uses):
        if not case.neurons or i == len(uses) - 1:  # an output's gradients are the same on all samples where it is on
            total += matmul(copies, m, e, n) + matmul(copies, d, m, n) + matmul(1, pairs, d, copies)
        else:
            total += matmul(copies, d, m, e) + matmul(pairs, d, 1, e) + matmul(1, pairs, d * e, copies)
    return total


def forward(case: Case, batch: float) -> Work:
    """Count exact attributions at the target, all components as tangents of one forward pass."""
    # Torch runs operations with tangents once more, for their values.
    tangents = _back_to_layers(case, case.instances * case.n_components + 1)
    return (_through_target(case, 2) + tangents) * (batch / case.batch) + _activations(case, batch)


def composed(case: Case, batch: float, entries: Sequence[float]) -> Work:
    """Count exact attributions of a residual MLP, each component multiplied once by the weights before and after it.

    Args:
        case: which experiment.
        batch: number of samples, those of one direction counted once.
        entries: for each layer, the number of nonzero entries in the stream over these samples.

    Returns:
        Work: in total.
    """
    copies, d, total = case.instances * case.n_components, case.width, Work()
    for i, neurons in enumerate(case.neurons):
        before = case.n_features + sum(case.neurons[:i])
        behind = case.n_features + sum(case.neurons[i + 1 :])
        m = min(d, neurons)
        total += matmul(copies, before, d, m) + matmul(copies, m, d, behind)
        total += matmul(copies, before, m, neurons) + matmul(copies, neurons, m, behind)
        total += matmul(1, before, d, neurons) + matmul(1, neurons, d, behind)
        total += matmul(1, batch, before, neurons) + matmul(1, batch * copies, neurons, behind)
        total += matmul(1, batch, neurons, copies * behind)
        # Rows are added up, which is not a matrix product.
        total += Work(2 * entries[i] * copies * neurons, FLOAT * (before + batch) * copies * neurons)
    return total


def standing(case: Case, x: Tensor) -> tuple[int, list[int]]:
    """Count the distinct directions of inputs [B, n], and for each layer the nonzero numbers in the stream."""
    directions = (x / x.abs().amax(1, keepdim=True)).unique(dim=0)
    hidden: list[Tensor] = []
    target = case.target()
    modules = [f"neurons.{i}" for i in range(len(case.neurons))]
    Network(target, target.weights, hidden=modules)(directions, activations=hidden)
    stands = [directions, *hidden[:-1]]
    return len(directions), [sum(int(t.count_nonzero()) for t in stands[: i + 1]) for i in range(len(stands))]


def linear_where_on(case: Case, batch: float, pairs: float) -> Work:
    """Count exact attributions of a TMS: an output that is on is linear in the components."""
    copies, n, d = case.instances * case.n_components, case.n_features, case.width
    once = matmul(copies, n, min(n, d), d) + matmul(copies, n, d, n) + matmul(1, batch, n, d) * 3
    return once + matmul(1, pairs, n + d, copies)


def generic(case: Case, batch: float, pairs: float) -> dict[str, Work]:
    """Count the three exact ways to attributions that work for any target."""
    return {
        "backward": backward(case, batch),
        "forward": forward(case, batch),
        "sample_gradients": sample_gradients(case, batch, pairs),
    }


def ours(case: Case, special: bool = False) -> dict[str, Work]:
    """Count the least that our step (c), (d) needs, part by part.

    Samples without a feature have no attributions, outputs that are off no gradient, inactive pairs no forward pass.
    """
    x = case.inputs(1)[0][:, 0]
    on = x.any(1)
    pairs = int((case.target()(x[on]) != 0).sum())
    if special:
        rows = int(on.sum())
        attribution = composed(case, *standing(case, x[on])) if case.neurons else linear_where_on(case, rows, pairs)
    else:
        ways = generic(case, int(on.sum()), pairs)
        attribution = min(ways.values(), key=lambda work: work.flops)
    active = case.instances * int(case.top_k * case.batch)
    forward_flops = sum(2 * active * (d * m + m * e) for d, m, e in used(case))
    flops = forward_flops + _sparse_backward(case, active).flops
    # A component's factors are read once for all its samples in the forward pass, and twice in the backward pass.
    rows = sum(active * (d + m + e) for d, m, e in used(case))
    sparse = Work(flops, 3 * FLOAT * (rows + case.parameters * len(case.uses) / len(case.shapes)))
    return {
        "attribution": attribution,
        "sparse forward": sparse + _embed(case, 3 * case.instances),
        "target": _through_target(case, 1),
        "faithfulness": faithfulness(case),
        "simplicity": moved(4 * case.parameters),  # column lengths; and back, added to the gradient
        "optimiser": moved(FUSED_ADAM * case.parameters),
    }


def floor(parts: dict[str, Work], flop_rate: float, bandwidth: float) -> dict[str, float]:
    """Compute lower bounds in seconds, of every part and of their sum.

    Args:
        parts: operations and bytes of each part.
        flop_rate: of the machine's best matrix product, operations a second.
        bandwidth: of memory, bytes a second.

    Returns:
        dict[str, float]: seconds by name of the part, and "all".
    """
    seconds = {name: work.seconds(flop_rate, bandwidth) for name, work in parts.items()}
    return seconds | {"all": sum(seconds.values())}
