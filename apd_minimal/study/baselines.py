"""Other ways to take a network apart, scored as components are: dictionaries, singular vectors, neurons (chapter 30).

Dictionaries of activations (`fit`) are chosen by bits at a fixed error (`choose`), compared by their directions
(`match_directions`), and become components where a decomposition of weights follows from them (`transcoded`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..batch import Batches
from ..components import Components, single, usable
from ..losses import mse
from .dictionaries import Dictionary as Dictionary
from .dictionaries import Places, _places
from .dictionaries import activations as activations
from .dictionaries import fit as fit
from .dictionaries import replaced as replaced
from .matching import Matching, _match
from .rate import ALPHA, EPSILONS, SAMPLES, Cost, _checked, _Costs, _search, _variance

GRIDS: dict[str, tuple[float, ...]] = {
    "relu": (0.01, 0.03, 0.1, 0.3),
    "topk": (1, 2, 3, 4),
    "batch_topk": (0.7, 1.0, 1.5, 2.5),
}
"""Sparsities that `choose` tries, unless others are given: L1 weights, or k."""


def costs(
    target: nn.Module,
    dictionary: Dictionary,
    x: Tensor,
    reads: Places,
    writes: Places | None = None,
    epsilons: Sequence[float] = EPSILONS,
) -> list[Cost]:
    """Find what of a dictionary must be active for the network's error to be at most each epsilon, as `rate.costs`.

    Its reconstruction, with the largest (sample, feature) codes and all others 0, stands in for what the network has
    at the places that are written. A feature is of rank one, as a component of one direction. The biases are free; a
    skip path is one more component, active on every sample, of its matrix's rank. The codes' values are free too, as
    are the numbers that a component multiplies its direction by.

    Args:
        target: the network.
        dictionary: trained on it.
        x: held-out inputs [B, ...].
        reads: the places it reads, as in `fit`.
        writes: those it writes; None for the same.
        epsilons: errors, as shares of the variance of the target's outputs.

    Returns:
        list[Cost]: one for each epsilon; `rate.NEVER` where even all codes leave a larger error.

    Raises:
        TypeError, ValueError: arguments that do not fit, or outputs that are the same on all inputs.
    """
    epsilons = _checked(epsilons)
    checks.kind("dictionary", dictionary, Dictionary, "a Dictionary")
    _places(target, "reads", reads)
    _places(target, "writes", reads if writes is None else writes)
    spliced = _Spliced(target, dictionary, x, reads, reads if writes is None else writes)
    return _each(spliced, epsilons)


def _each(spliced: _Spliced, epsilons: Sequence[float]) -> list[Cost]:
    alone = spliced(0)  # biases and the skip path
    return [alone if alone.error <= epsilon else _search(spliced, epsilon) for epsilon in epsilons]


class _Spliced(_Costs):
    """Called with a number of pairs, the cost with the largest codes so many."""

    @torch.no_grad()
    def __init__(self, target: nn.Module, dictionary: Dictionary, x: Tensor, reads: Places, writes: Places) -> None:
        self.target, self.dictionary, self.places = target, dictionary, writes
        self.parts = checks.inputs(x).split(SAMPLES)
        self.inputs = [torch.cat(activations(target, part, reads), 1) for part in self.parts]
        self.wanted = [target(part) for part in self.parts]
        self.variance = _variance(torch.cat(self.wanted))
        self.codes = torch.cat([dictionary.encode(part) for part in self.inputs])
        sizes = (self.codes * (dictionary.decoder / dictionary.scale_out).norm(dim=1)).flatten()
        order = sizes.argsort(descending=True, stable=True)
        self.order = order[sizes[order] > 0]
        self.pairs, self.found = len(self.order), dict[int, Cost]()
        self.first = max(1, min(len(x) // 64, self.pairs))
        self.always = 0
        if dictionary.skip is not None:
            s = torch.linalg.svdvals(dictionary.skip)
            self.always = int((s > 0.1 * s.max()).sum())

    @torch.no_grad()
    def __call__(self, n_pairs: int) -> Cost:
        if n_pairs not in self.found:
            on = torch.zeros(self.codes.numel(), dtype=torch.bool, device=self.codes.device)
            on[self.order[:n_pairs]] = True
            on = on.view_as(self.codes)
            parts = (self.codes * on).split([len(part) for part in self.inputs])
            errors = []
            for x, read, codes, wanted in zip(self.parts, self.inputs, parts, self.wanted, strict=True):
                values = self.dictionary.decode(codes, read).split(self.dictionary.writes, 1)
                errors.append(mse(replaced(self.target, x, self.places, values), wanted))
            samples, skip = len(torch.cat(errors)), int(self.always > 0)
            self.found[n_pairs] = Cost(
                error=float(torch.cat(errors).mean()) / self.variance,
                active=n_pairs / samples + skip,
                ranks=n_pairs / samples + self.always,
                in_use=int(on.any(0).sum()) + skip,
            )
        return self.found[n_pairs]


@dataclass(frozen=True)
class Chosen:
    """What `choose` found.

    Attributes:
        best: the dictionary that needs the fewest bits.
        sparsity: its L1 weight or k.
        tried: a row for each training: "sparsity", "seed", "bits" at each epsilon.
        seconds: that all took.
    """

    best: Dictionary
    sparsity: float
    tried: list[dict[str, Any]]
    seconds: float


def choose(
    target: nn.Module,
    batches: Batches,
    reads: Places,
    n_features: int,
    kind: str = "relu",
    grid: Sequence[float] | None = None,
    *,
    writes: Places | None = None,
    epsilons: Sequence[float] = EPSILONS,
    alpha: float = ALPHA,
    seed: int = 0,
    **settings: Any,
) -> Chosen:
    """Train a dictionary for each sparsity, and keep the one with the fewest bits on held-out inputs, without a truth.

    Losses with other L1 weights or k cannot be compared, so that no dictionary's own objective can choose. Of two, the
    one that reaches more of the errors is better, then the one with fewer bits on average over those errors, and where
    none is reached, the one with the smallest error. It costs as many trainings as the grid has values, and for each
    about 60 forward passes over eight batches.

    Args:
        target: the network.
        batches: as for `fit`.
        reads: places that are read.
        n_features: F.
        kind: "relu", "topk" or "batch_topk".
        grid: sparsities to try; None for `GRIDS`, without those above F.
        writes: places that are written; None for those that are read.
        epsilons: errors at which bits are counted.
        alpha: bits for each unit of rank.
        seed: of every training; the held-out inputs have another.
        **settings: further arguments of `fit`.

    Returns:
        Chosen: the best, and all that was tried.

    Raises:
        TypeError, ValueError: as `fit` and `costs`, or an empty grid.
    """
    checks.choice("kind", kind, list(GRIDS))
    F = checks.number("n_features", n_features, 1, whole=True)
    checks.kind("grid", grid, (list, tuple, type(None)), "a list of sparsities")
    values = [s for s in GRIDS[kind] if kind == "relu" or s <= F] if grid is None else grid
    values = [checks.number("grid", s, 0) for s in values]
    if not callable(batches):
        raise TypeError(f"batches must be a function of (step, generator), got {checks.given(batches)}")
    checks.function("batches", batches)
    if not values:
        raise ValueError(f"grid must hold at least one sparsity, got {checks.given(grid)}")
    generator = torch.Generator().manual_seed(checks.number("seed", seed, 0, 2**62, whole=True) + 5_000_000_029)
    start, tried, best = (
        time.process_time(),
        list[dict[str, Any]](),
        list[tuple[tuple[int, float, float], int, Dictionary]](),
    )
    steps = checks.number("steps", settings.get("steps", 8), 1, whole=True)  # a list of batches has no more
    held = torch.cat([checks.batch(batches(step % steps, generator), step % steps) for step in range(8)])
    for i, sparsity in enumerate(values):
        own = fit(target, batches, reads, n_features, kind, sparsity, writes=writes, seed=seed, **settings)
        spliced = _Spliced(target, own, held, reads, reads if writes is None else writes)
        bits = [cost.bits(alpha) for cost in _each(spliced, _checked(epsilons))]
        reached = [b for b in bits if math.isfinite(b)]
        best.append(((len(bits) - len(reached), sum(reached), spliced(spliced.pairs).error), i, own))
        tried.append({"sparsity": sparsity, "bits": bits})
    _, i, own = min(best, key=lambda row: row[:2])
    return Chosen(own, values[i], tried, time.process_time() - start)


def transcoded(dictionary: Dictionary, paths: str | Sequence[str]) -> Components:
    """Turn a transcoder of linear layers into components of their weights: decoder row times encoder column.

    While a feature is on, it adds code x direction, the code being linear in the input: that is a matrix of rank one,
    [d_in, d_out]. A skip path is one more component. The features' biases have no place in components.

    Args:
        dictionary: it reads the inputs of the layers and writes their outputs, in the order of `paths`.
        paths: of the layers' weights, such as "encode.weight"; one, or one for each place.

    Returns:
        Components: F of them, or F + 1 with a skip path.

    Raises:
        TypeError, ValueError: as many places as paths are needed, read and written.
    """
    checks.kind("dictionary", dictionary, Dictionary, "a Dictionary")
    names = [paths] if isinstance(paths, str) else paths
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"paths must be a parameter path, or a list of such, got {checks.given(paths)}")
    if not len(names) == len(dictionary.reads) == len(dictionary.writes) == len(set(names)):
        raise ValueError(
            f"paths must be one for each place, got {names} for {len(dictionary.reads)} places that are read and "
            f"{len(dictionary.writes)} that are written"
        )
    E = (dictionary.encoder.detach().T * dictionary.scale_in).split(dictionary.reads, 1)
    D = (dictionary.decoder.detach() / dictionary.scale_out).split(dictionary.writes, 1)
    whole = Components(
        {path: e[:, :, None] for path, e in zip(names, E, strict=True)},
        {path: d[:, None, :] for path, d in zip(names, D, strict=True)},
    )
    if dictionary.skip is None:
        return whole
    skip = dictionary.scale_in[:, None] * dictionary.skip.detach() / dictionary.scale_out
    blocks = [
        part.split(dictionary.writes, 1)[i][None] for i, part in enumerate(skip.split(dictionary.reads, 0))
    ]  # what a layer makes of its own input
    return beside([whole, Components.from_matrices(dict(zip(names, blocks, strict=True)))])


def beside(parts: Sequence[Components]) -> Components:
    """Put decompositions side by side: all their components, each zero in the weights that it says nothing about.

    Args:
        parts: decompositions without restarts, of the same or of different weights.

    Returns:
        Components: as many as all have together.

    Raises:
        TypeError, ValueError: no decomposition, restarts, or weights of one name and several shapes.
    """
    if not len(checks.kind("parts", parts, (list, tuple), "a list of Components")):
        raise ValueError("parts must hold at least one decomposition, got none")
    parts = [usable(part, alone=True) for part in parts]
    paths = list(dict.fromkeys(path for part in parts for path in part.paths))
    A, B = {}, {}
    for path in paths:
        having = [part for part in parts if path in part.paths]
        shapes = {(part.A[path].shape[1], part.B[path].shape[2]) for part in having}
        if len(shapes) > 1:
            raise ValueError(f"{path}: the parts must have one shape, got {sorted(shapes)}")
        ((d_in, d_out),) = shapes
        m = max(part.A[path].shape[2] for part in having)
        like, C = having[0].A[path], sum(part.n_components for part in parts)
        A[path], B[path], first = like.new_zeros(C, d_in, m), like.new_zeros(C, m, d_out), 0
        for part in parts:
            if path in part.paths:
                here, own = slice(first, first + part.n_components), part.A[path].shape[2]
                A[path][here, :, :own], B[path][here, :own] = part.A[path], part.B[path]
            first += part.n_components
    return Components(A, B)


def singular(weights: Mapping[str, Tensor]) -> Components:
    """Split every weight into its singular vectors: one component of rank one for each, in one weight alone.

    Args:
        weights: per parameter path, a matrix [d_in, d_out].

    Returns:
        Components: as many as the ranks of all weights add up to at most, largest singular value first.

    Raises:
        TypeError, ValueError: no matrices.
    """
    parts = []
    for path, w in _matrices(weights).items():
        U, S, Vh = torch.linalg.svd(single(w.detach()), full_matrices=False)
        parts.append(Components({path: (U * S).T[:, :, None].to(w)}, {path: Vh[:, None, :].to(w)}))
    return beside(parts)


def neurons(weights: Mapping[str, Tensor], layers: Sequence[Mapping[str, str]]) -> Components:
    """Split the weights by neurons: a component is all that goes into one neuron and all that comes out of it.

    Args:
        weights: per parameter path, a matrix [d_in, d_out].
        layers: for each layer of neurons, on which side of which weight they stand, such as
            {"read.0.weight": "output", "write.0.weight": "input"}; every weight once.

    Returns:
        Components: one for each neuron, of rank one in each weight.

    Raises:
        TypeError, ValueError: no matrices; weights left out, or named twice; layers that do not fit them.
    """
    _matrices(weights)
    checks.kind("layers", layers, (list, tuple), "a list of mappings from parameter paths to 'input' or 'output'")
    named = [path for layer in layers for path in checks.kind("layers", layer, Mapping, "a list of mappings")]
    if sorted(named) != sorted(weights):
        raise ValueError(f"layers must name every weight once: {sorted(weights)}, got {sorted(named)}")
    parts = []
    for layer in layers:
        sizes = {
            weights[p].shape[checks.choice(f"layers: {p}", side, ("input", "output")) == "output"]
            for p, side in layer.items()
        }
        if len(sizes) != 1:
            raise ValueError(f"layers: {dict(layer)} must have one number of neurons, got {sorted(sizes)}")
        A, B = {}, {}
        for path, side in layer.items():
            w = weights[path].detach()
            one = torch.eye(w.shape[side == "output"]).to(w)
            A[path] = one[:, :, None] if side == "input" else w.T[:, :, None].contiguous()
            B[path] = w[:, None, :].contiguous() if side == "input" else one[:, None, :]
        parts.append(Components(A, B))
    return beside(parts)


def _matrices(weights: Any) -> Mapping[str, Tensor]:
    if not checks.kind("weights", weights, Mapping, "a mapping from parameter paths to matrices [d_in, d_out]"):
        raise ValueError("weights must have at least one parameter path, got none")
    for path, w in weights.items():
        checks.tensor(f"weights: {path}", w, "d_in", "d_out", real=True)
    return weights


def match_directions(true: Tensor, found: Tensor, n_draws: int = 20, seed: int = 0) -> Matching:
    """Match found directions with true ones, one to one, by the largest sum of cosines (Hungarian algorithm).

    The chance baseline draws as many random mixtures of the found directions, so that it lies where they lie: in few
    dimensions any directions are close to the true ones.

    Args:
        true: [J, d], such as a network's embedding of each feature.
        found: [F, d], such as `Dictionary.directions`; signs count.
        n_draws: number of draws of the chance baseline, at least 1.
        seed: of these draws.

    Returns:
        Matching: `first` are the true ones; those without a partner are missing where F < J.

    Raises:
        TypeError, ValueError: other shapes, numbers that are not finite, n_draws below 1.
    """
    checks.tensor("true", true, "J", "d", real=True)
    checks.tensor("found", found, "F", true.shape[1], real=True)
    true, found = single(true), single(found).to(single(true))
    n_draws, seed = checks.number("n_draws", n_draws, 1, whole=True), checks.number("seed", seed, 0, 2**62, whole=True)
    true, found = (t.detach() / t.detach().norm(dim=1, keepdim=True).clamp_min(1e-12) for t in (true, found))
    generator = torch.Generator().manual_seed(seed)

    def scrambled() -> Tensor:
        mixed = torch.randn(len(found), len(found), generator=generator).to(found) @ found
        return true @ (mixed / mixed.norm(dim=1, keepdim=True).clamp_min(1e-12)).T

    return _match(true @ found.T, torch.arange(len(true)), torch.arange(len(found)), scrambled, n_draws)


def copies(true: Tensor, found: Tensor, least: float = 0.9) -> Tensor:
    """Count the found directions that point along each true one: [J]; above 1, the feature is split.

    Args:
        true: [J, d].
        found: [F, d]; those of length 0 count for none.
        least: smallest cosine.

    Raises:
        TypeError, ValueError: other shapes, or a cosine out of range.
    """
    checks.tensor("true", true, "J", "d", real=True)
    found = checks.tensor("found", found, "F", true.shape[1], real=True).to(true)
    least = checks.number("least", least, -1, 1)
    alike = torch.nn.functional.cosine_similarity(true[:, None], found[None], dim=2) >= least
    return (alike & found.any(1)).sum(1)


def owners(components: Components, truth: Mapping[str, Tensor], least: float = 0.1) -> Tensor:
    """Count the components that hold a share of each mechanism: [J]; above 1, the mechanism is split.

    A component's share of a mechanism Z is <P_c, Z> / |Z|^2; over all components, shares sum to 1 if the mechanisms
    are orthogonal and the components sum to the weights.

    Args:
        components: C components, without restarts.
        truth: per path, the J mechanisms [J, d_in, d_out].
        least: smallest share.

    Raises:
        TypeError, ValueError: components with restarts, or a truth of other paths or shapes.
    """
    usable(components, alone=True)
    least = checks.number("least", least, -1, 1)
    shapes = {path: ("J", *components.matrices(path).shape[1:]) for path in components.paths}
    checks.matrices("truth", truth, shapes)
    Z = torch.cat([truth[path].flatten(1) for path in components.paths], 1)
    return (components.flat().detach().to(Z) @ Z.T / Z.square().sum(1) >= least).sum(0)
