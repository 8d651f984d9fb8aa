"""Parts of a two-layer network: take one away, keep it alone, move it to another input (chapter 32).

The networks add relu(r W_read) W_write to a stream r [B, d], twice. A method says, for each layer and stream, which
part of what the layer writes belongs to a group of its parts; all else follows, and is the same for all methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study.baselines import Dictionary

Group = tuple[tuple[int, ...], tuple[int, ...]]  # the features of the first layer, and of the second


@dataclass(frozen=True)
class Model:
    """A residual network of two layers: what goes in, the layers, what comes out.

    Attributes:
        embed: [n, d], inputs to stream.
        reads: per layer, [d, neurons].
        writes: per layer, [neurons, d].
        unembed: [d, n_out].
    """

    embed: Tensor
    reads: list[Tensor]
    writes: list[Tensor]
    unembed: Tensor

    @classmethod
    def of(cls, target: Any) -> Model:
        """Read the matrices of a `Circuit` or a `ResidualMLP`."""
        embed = target.embed if hasattr(target, "embed") else target.embedding
        unembed = target.unembed if hasattr(target, "unembed") else target.embedding
        both = [[layer.weight.detach().T for layer in getattr(target, part)] for part in ("read", "write")]
        return cls(embed, both[0], both[1], unembed.T)

    @property
    def short(self) -> Model:
        """The same function with a stream of the inputs and all neurons, side by side: [n + neurons] for d.

        Everything that a network or its features write lies along these; parts of weights may write elsewhere.
        """
        spans = torch.cat([self.embed, *self.writes])  # [n + neurons, d]
        eye = torch.eye(len(spans)).to(spans).split([len(part) for part in (self.embed, *self.writes)])
        return Model(eye[0], [spans @ read for read in self.reads], list(eye[1:]), spans @ self.unembed)

    def layer(self, i: int, r: Tensor) -> Tensor:
        """Compute what layer i adds to a stream r."""
        return torch.relu(r @ self.reads[i]) @ self.writes[i]

    def run(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Give the outputs, and for each layer the stream that it reads and what it writes."""
        r, streams, written = x @ self.embed, [], []
        for i in range(len(self.reads)):
            streams.append(r)
            written.append(self.layer(i, r))
            r = r + written[-1]
        return r @ self.unembed, streams, written


class Parts:
    """A method's account of the layers; `rest` and `own` say what a group is.

    Args:
        model: the network.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def rest(self, i: int, r: Tensor, group: Any) -> Tensor:
        """Give what layer i writes without the group."""
        raise NotImplementedError

    def alone(self, i: int, r: Tensor, group: Any) -> Tensor:
        """Give what the group writes in layer i if nothing else is there."""
        raise NotImplementedError

    def own(self, x: Tensor, group: Any) -> list[Tensor]:
        """Give, for each layer, what the group writes in the run of the whole network."""
        _, streams, written = self.model.run(x)
        return [w - self.rest(i, r, group) for i, (r, w) in enumerate(zip(streams, written, strict=True))]

    def without(self, x: Tensor, group: Any) -> Tensor:
        """Run the network without the group: the second layer sees that it is gone in the first."""
        r = x @ self.model.embed
        for i in range(len(self.model.reads)):
            r = r + self.rest(i, r, group)
        return r @ self.model.unembed

    def moved(self, x: Tensor, group: Any, base: Tensor) -> Tensor:
        """Put what the group writes on inputs x into the runs of others, in place of what it writes there.

        The layers do not see the change, so that the group must bring along what it does in each.
        """
        _, streams, _ = self.model.run(base)
        rests = [self.rest(i, r, group) for i, r in enumerate(streams)]
        return (streams[0] + sum(rests) + sum(self.own(x, group))) @ self.model.unembed

    def kept(self, x: Tensor, group: Any) -> Tensor:
        """Run the group alone."""
        r = x @ self.model.embed
        for i in range(len(self.model.reads)):
            r = r + self.alone(i, r, group)
        return r @ self.model.unembed


class Weights(Parts):
    """Components of all weights; a group is the number of one.

    Args:
        model: the network.
        components: of "read.0.weight" and so on.
    """

    def __init__(self, model: Model, components: apd.Components) -> None:
        super().__init__(model)
        self.P = [[components.matrices(f"{part}.{i}.weight") for part in ("read", "write")] for i in range(2)]

    def rest(self, i: int, r: Tensor, group: int) -> Tensor:
        """Run the layer with the weights less the component."""
        read, write = self.model.reads[i] - self.P[i][0][group], self.model.writes[i] - self.P[i][1][group]
        return torch.relu(r @ read) @ write

    def alone(self, i: int, r: Tensor, group: int) -> Tensor:
        """Run the layer with the component's weights."""
        return torch.relu(r @ self.P[i][0][group]) @ self.P[i][1][group]


class Features(Parts):
    """Features of each layer: codes of what the layer holds, and directions that they scale.

    Args:
        model: the network.
        dictionaries: one for each layer, or one crosscoder for both; of the neurons' activations or of what the layers
            write to the stream, which their sizes tell. None for the neurons themselves.
        before: the dictionaries are transcoders, and read the neurons' inputs.
    """

    def __init__(self, model: Model, dictionaries: Sequence[Dictionary] | None = None, before: bool = False) -> None:
        super().__init__(model)
        self.dictionaries, self.before, self.directions = dictionaries, before, list(model.writes)
        if dictionaries is not None:
            parts = [part for d in dictionaries for part in (d.decoder / d.scale_out).detach().split(d.writes, 1)]
            self.directions = [
                part if self.wide(part) else part @ w for part, w in zip(parts, model.writes, strict=True)
            ]

    def wide(self, values: Tensor) -> bool:
        """Whether these are values in the stream."""
        return values.shape[1] == self.model.embed.shape[1]

    def seen(self, i: int, r: Tensor, width: int) -> Tensor:
        """Give what a dictionary of layer i reads: [B, width]."""
        held = torch.relu(r @ self.model.reads[i])
        return held if held.shape[1] == width else held @ self.model.writes[i]

    @torch.no_grad()
    def codes(self, i: int, r: Tensor) -> Tensor:
        """Compute the codes of layer i on a stream r, [B, F]."""
        if self.dictionaries is None:
            return torch.relu(r @ self.model.reads[i])
        own = self.dictionaries[i]
        return own.encode(r @ self.model.reads[i] if self.before else self.seen(i, r, own.reads[0]))

    def written(self, i: int, codes: Tensor, group: Group) -> Tensor:
        """Add up the group's directions in layer i."""
        index = list(group[i])
        return codes[:, index] @ self.directions[i][index]

    def rest(self, i: int, r: Tensor, group: Group) -> Tensor:
        """Subtract the group's directions from what the layer writes."""
        return self.model.layer(i, r) - self.written(i, self.codes(i, r), group)

    def alone(self, i: int, r: Tensor, group: Group) -> Tensor:
        """Give the group's directions alone."""
        return self.written(i, self.codes(i, r), group)


class Crossed(Features):
    """A crosscoder: one code for both layers, of the neurons of both in the run of the whole network."""

    @torch.no_grad()
    def all_codes(self, x: Tensor) -> Tensor:
        """Compute the codes of inputs, [B, F]."""
        assert self.dictionaries is not None
        (own,), streams = self.dictionaries, self.model.run(x)[1]
        return own.encode(torch.cat([self.seen(i, r, own.reads[i]) for i, r in enumerate(streams)], 1))

    def own(self, x: Tensor, group: Group) -> list[Tensor]:
        """Give the group's writes."""
        codes = self.all_codes(x)
        return [self.written(i, codes, group) for i in range(2)]

    def without(self, x: Tensor, group: Group) -> Tensor:
        """Subtract the group's writes from the whole run's, at both layers at once."""
        _, streams, written = self.model.run(x)
        return (streams[0] + sum(written) - sum(self.own(x, group))) @ self.model.unembed

    def moved(self, x: Tensor, group: Group, base: Tensor) -> Tensor:
        """Put the group's writes on inputs x into the runs of others."""
        _, streams, written = self.model.run(base)
        change = sum(self.own(x, group)) - sum(self.own(base, group))
        return (streams[0] + sum(written) + change) @ self.model.unembed

    def kept(self, x: Tensor, group: Group) -> Tensor:
        """Add the group's writes to the embedded inputs."""
        return (x @ self.model.embed + sum(self.own(x, group))) @ self.model.unembed


@torch.no_grad()
def scores(parts: Parts, groups: Sequence[Any], inputs: Tensor) -> Tensor:
    """Score every group for every mechanism: [J, G, 3], for ablating, keeping and swapping, each 1 at best.

    Errors are shares of what the layers add to the output of an input, at most 1. Ablating: the own mechanism's error
    less the others' mean. Keeping: 1 less the own error, less what of the others still works. Swapping: 1 less the
    error of an input of the next mechanism into which the group's writes of an own input were put, where the outputs of
    both are wanted.

    Args:
        parts: a method's account of the network.
        groups: of its parts.
        inputs: [J, N, n], of one mechanism each.
    """
    J, N, _ = inputs.shape
    x, model = inputs.flatten(0, 1), parts.model
    y = model.run(x)[0]
    nothing = x @ model.embed @ model.unembed
    size = (y - nothing).square().sum(1).view(J, N).sum(1)

    def error(out: Tensor, wanted: Tensor) -> Tensor:
        return ((out - wanted).square().sum(1).view(J, N).sum(1) / size).clamp(max=1)

    last = torch.arange(J).roll(-1)
    base = inputs[last].flatten(0, 1)
    both = model.run(base)[0] + y - nothing
    found = []
    for group in groups:
        gone = error(parts.without(x, group), y)
        works = 1 - error(parts.kept(x, group), y)
        moved = 1 - error(parts.moved(x, group, base), both)
        others = [(v.sum() - v) / (J - 1) for v in (gone, works)]
        found.append(torch.stack([gone - others[0], works - others[1], moved], 1))
    return torch.stack(found, 1)


def plainest(x: Tensor, least: int = 4) -> list[Tensor]:
    """Group samples by which inputs are on, and keep the groups of which no other is a part.

    Args:
        x: inputs [B, n]; an input is on if it is not 0.
        least: samples of a group; smaller ones are left out.

    Returns:
        list: the samples of each group, [B_g, n].
    """
    patterns, which, counts = (x != 0).unique(dim=0, return_inverse=True, return_counts=True)
    there = [i for i in range(len(patterns)) if counts[i] >= least and patterns[i].any()]
    smaller = {i: [k for k in there if k != i and not bool((patterns[k] & ~patterns[i]).any())] for i in there}
    return [x[which == i] for i in there if not smaller[i]]


@torch.no_grad()
def cut(model: Model, groups: Sequence[Tensor], tolerance: float = 1e-3) -> apd.Components:
    """Cut the weights without training: of each, what moves in the stream on a group; one part more, the rest.

    A reading weight keeps what the stream spans that it reads on the group, a writing weight what it writes there.

    Args:
        model: the network.
        groups: inputs [B_g, n] of each.
        tolerance: least singular value that counts, as a share of the group's largest.

    Returns:
        Components: one for each group and one for what is left, which sum to the weights.
    """
    found: dict[str, list[Tensor]] = {}
    for x in groups:
        _, streams, written = model.run(x)
        for i, (r, w) in enumerate(zip(streams, written, strict=True)):
            R, W = _spanned(r, tolerance), _spanned(w, tolerance)
            found.setdefault(f"read.{i}.weight", []).append(R.T @ (R @ model.reads[i]))
            found.setdefault(f"write.{i}.weight", []).append((model.writes[i] @ W.T) @ W)
    whole = {f"{part}.{i}.weight": w for part in ("read", "write") for i, w in enumerate(getattr(model, part + "s"))}
    parts = {path: torch.stack([*own, whole[path] - sum(own)]) for path, own in found.items()}
    return apd.Components.from_matrices(parts)


def _spanned(rows: Tensor, tolerance: float) -> Tensor:
    """Give orthonormal rows that span the given ones."""
    _, S, Vh = torch.linalg.svd(rows.double(), full_matrices=False)
    return Vh[S > max(tolerance * float(S[0]), 1e-6)].to(rows)


def best(table: Tensor) -> tuple[list[int], Tensor]:
    """Match mechanisms to groups one to one, by the mean of the three: the groups, and the scores [J, 3].

    Mechanisms without a group score 0.
    """
    rows, columns = linear_sum_assignment(table.mean(-1).numpy(), maximize=True)
    owner, own = [-1] * len(table), torch.zeros(len(table), 3)
    for j, g in zip(rows.tolist(), columns.tolist(), strict=True):
        owner[j], own[j] = g, table[j, g]
    return owner, own


def stitched(similar: Tensor, active: Sequence[Tensor], least: float = 0.3, onto: int = 1) -> list[Group]:
    """Stitch the features of two layers: each joins the most similar feature of the other layer, if it is similar.

    Args:
        similar: [F1, F2], such as correlations.
        active: which features of each layer are ever active, bool [F1] and [F2].
        least: least similarity to be joined.
        onto: the layer whose features make the groups, 0 or 1; several of the other layer may join one.

    Returns:
        list: one group for each active feature of that layer, and one for each that found no partner.
    """
    similar = similar.clone()
    similar[~active[0]], similar[:, ~active[1]] = -1, -1
    table = similar.T if onto == 1 else similar  # [onto, joining]
    joined: dict[int, list[int]] = {int(f): [] for f in active[onto].nonzero()}
    single = []
    for f in active[1 - onto].nonzero().flatten().tolist():
        value, to = table[:, f].max(0) if len(table) else (torch.tensor(-1.0), torch.tensor(-1))
        if value >= least:
            joined[int(to)].append(f)
        else:
            single.append(f)
    groups = [(tuple(fs), (k,)) if onto == 1 else ((k,), tuple(fs)) for k, fs in joined.items()]
    return groups + [((f,), ()) if onto == 1 else ((), (f,)) for f in single]


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """Correlate codes [N, F1] with codes [N, F2]; a code that never changes correlates with nothing."""
    a, b = (t - t.mean(0) for t in (a, b))
    return (a / a.norm(dim=0).clamp_min(1e-9)).T @ (b / b.norm(dim=0).clamp_min(1e-9))


@torch.no_grad()
def effects(parts: Features, x: Tensor) -> Tensor:
    """How much taking away a feature of the first layer changes each code of the second, as a share of its size."""
    r = x @ parts.model.embed
    codes = parts.codes(0, r)
    full = parts.codes(1, r + parts.model.layer(0, r))
    size = full.square().sum(0).clamp_min(1e-9)
    found = []
    for f in range(codes.shape[1]):
        less = r + parts.rest(0, r, ((f,), ()))
        found.append(((parts.codes(1, less) - full).square().sum(0) / size).sqrt())
    return torch.stack(found)
