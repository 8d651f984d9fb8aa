"""Every sequence that asks at most one circuit of a planted network, with every mask of zeros and ones (chapter 36).

Sequences are those of `Induction.data`: letters that all differ, but for the one that induction repeats. A circuit's
own parts must be on in a sequence that asks it. All others may be off or on, in every combination, and no answer may
change. Where nothing is asked no part is needed. Gates between 0 and 1 are not bounded; `between` tries some.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.targets.induction import CIRCUITS, Induction
from experiments import induction
from experiments.experiment import Row

NONE = len(CIRCUITS)  # the question of sequences that ask nothing
AT_ONCE = 2048  # sequences
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the gates that `between` tries


def arranged(n: int, length: int) -> Tensor:
    """List all ways to put `length` of n letters in a row: [n! / (n - length)!, length]."""
    return torch.tensor(list(itertools.permutations(range(n), length)))


def sequences(n: int, T: int) -> Iterator[tuple[int, Tensor]]:
    """List every sequence that asks one circuit or none, by what is asked and where: the question, and x [N, T].

    Args:
        n: letters, at least T.
        T: positions.
    """
    whole, shorter = arranged(n, T), arranged(n, T - 1)
    for t in range(2, T):
        for s in range(t - 1):
            yield 0, torch.cat([shorter[:, :t], shorter[:, s : s + 1], shorter[:, t:]], 1)
    for t in range(1, T):
        yield 1, torch.cat([shorter[:, :t], torch.full((len(shorter), 1), 2 * n), shorter[:, t:]], 1)
    for t in range(1, T):
        yield 2, whole + n * (torch.arange(T) == t)
    yield NONE, whole


@torch.no_grad()
def answers(target: Induction, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Run a network with other weights, as its own `forward` does: [T, b, N], N last, which takes a third of the time.

    Args:
        target: whose heads and embedding are used.
        weights: per path [d_in, d_out].
        x: sequences [N, T].
    """
    stream = (target.embed[x] + target.places).permute(1, 2, 0)  # [T, d, N]
    for i, layer in enumerate(target.layers):
        q, k, v = (
            (weights[f"blocks.{i}.{part}.weight"].T @ stream).unflatten(1, (len(layer.nothing), -1)) for part in "qkv"
        )  # [T, H, e, N]
        nothing = layer.nothing[..., 0].expand(1, -1, len(x))
        mixed = []
        for t in range(len(stream)):
            scores = (q[t] * k[: t + 1]).sum(2)
            looks = torch.cat([scores, nothing]).softmax(0)[:-1]  # [t + 1, H, N]
            mixed.append((looks[:, :, None] * v[: t + 1]).sum(0))
        stream = stream + weights[f"blocks.{i}.o.weight"].T @ torch.stack(mixed).flatten(1, 2)
    return target.unembed.T @ stream


@torch.no_grad()
def verified(target: Induction, components: apd.Components, groups: list[list[int]]) -> Row:
    """Run every sequence with every mask of zeros and ones that leaves on what it needs.

    Args:
        target: with all circuits.
        components: C of them.
        groups: the components of each circuit.

    Returns:
        Row: by question (the circuits, and none) the numbers of sequences and of runs; squared errors as shares of an
        answer's size: with what is needed alone, the mean over masks, that of the worst mask of each sequence (each a
        mean over sequences), and the worst of all; and the share of sequences on which some mask puts a number off by
        1 or more, so that a bit of an answer may turn, or nothing become something.
    """
    masks = list(itertools.product((False, True), repeat=components.n_components))
    matrices = {path: components.matrices(path) for path in components.paths}
    sums_of = {on: {path: own[list(on)].sum(0) for path, own in matrices.items()} for on in masks}
    n, bits = target.corners.shape
    names = ("inputs", "runs", "alone", "scrubbed", "worst", "wrong")
    sums, most = torch.zeros(len(names), NONE + 1, dtype=torch.double), torch.zeros(NONE + 1)
    for question, some in sequences(n, target.positions):
        needed = groups[question] if question < NONE else []
        fits = [on for on in masks if all(on[c] for c in needed)]
        for x in some.split(AT_ONCE):
            wanted = target.answers(x).permute(1, 2, 0)
            gaps = torch.stack([answers(target, sums_of[on], x) for on in fits]) - wanted  # [masks, T, bits, N]
            errors = gaps.square().sum((1, 2)) / bits
            worst, least = errors.amax(0), min(range(len(fits)), key=lambda i: sum(fits[i]))
            off = (gaps.abs().amax((0, 1, 2)) >= 1).sum()
            values = (len(x), errors.numel(), errors[least].sum(), errors.mean(0).sum(), worst.sum(), off)
            sums[:, question] += torch.tensor(values, dtype=torch.double)
            most[question] = most[question].maximum(worst.max())
    counts, means = sums[:2], sums[2:] / sums[0]
    return {name: v.long().tolist() for name, v in zip(names[:2], counts, strict=True)} | {
        **{name: v.tolist() for name, v in zip(names[2:], means, strict=True)},
        "worst_input": most.tolist(),
    }


def chosen(target: Induction, components: apd.Components, groups: list[list[int]]) -> list[float]:
    """Compute on which share of the sequences that ask a circuit its component has the largest attribution: [3].

    Args:
        target: with all circuits.
        components: C of them.
        groups: the one component of each circuit.
    """
    network = apd.Network(target, target.weights)
    right, count = torch.zeros(NONE), torch.zeros(NONE)
    for question, some in sequences(len(target.corners), target.positions):
        if question < NONE:
            for x in some.split(512):
                best = induction.attribution(network, components, x).argmax(1)
                right[question] += (best == groups[question][0]).sum()
                count[question] += len(x)
    return (right / count).tolist()


@torch.no_grad()
def between(target: Induction, components: apd.Components, groups: list[list[int]], seed: int, n: int = 512) -> Row:
    """Try gates in between, on some of the sequences that ask one circuit: all combinations of `LEVELS`.

    Args:
        target: with all circuits.
        components: C of them.
        groups: the components of each circuit.
        seed: of the sequences.
        n: sequences.

    Returns:
        Row: the worst error of each sequence over all combinations, and over those of zeros and ones, as means; the
        worst of all; and the share of sequences on which some gate in between is worse than all zeros and ones.
    """
    network = apd.Network(target, target.weights)
    x = induction.OneAtATime(target, n)(0, torch.Generator().manual_seed(50_000 + seed))
    wanted, question = target.answers(x), target.says(x).any(-1).any(1).int().argmax(1)
    needed = torch.stack([torch.eye(components.n_components)[group].sum(0) for group in groups])[question]  # [N, C]
    worst, corner = torch.zeros(len(x)), torch.zeros(len(x))
    for levels in itertools.product(LEVELS, repeat=components.n_components):
        gap = network(x, components, torch.maximum(needed, torch.tensor(levels))) - wanted
        error = gap.square().sum((1, 2)) / wanted.square().sum((1, 2))
        worst = worst.maximum(error)
        if set(levels) <= {0.0, 1.0}:
            corner = corner.maximum(error)
    return {
        "worst": float(worst.mean()),
        "corner": float(corner.mean()),
        "worst_input": float(worst.max()),
        "worse": float((worst > corner * 1.001 + 1e-6).float().mean()),
    }
