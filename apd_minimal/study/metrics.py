"""How good a decomposition is: against a known truth, and without one (chapter 7).

A truth is what `target.mechanisms()` gives: per parameter path, matrices [J, d_in, d_out], one for each of J
mechanisms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .. import checks
from ..attributions import Attribution, gradient
from ..components import Components, usable
from ..losses import faithfulness, mse
from ..network import Network, as_network
from ..selection import FinalSelection, Selection, final_selection
from .matching import Matching as Matching
from .matching import cosines as cosines
from .matching import match_use as match_use
from .matching import match_weights as match_weights

Truth = Mapping[str, Tensor]


def _flat(matrices: Mapping[str, Tensor], paths: list[str]) -> Tensor:
    return torch.cat([matrices[path].flatten(1) for path in paths], dim=1)


def _in_one_type(components: Components, truth: Truth) -> tuple[Components, Truth]:
    """Check that a truth is about these components, and convert both to the larger type, single precision at least."""
    usable(components, alone=True)
    checks.kind("truth", truth, Mapping, "a mapping from parameter paths to mechanisms [J, d_in, d_out]")
    if set(truth) != set(components.paths):
        raise ValueError(f"the truth is about {sorted(truth)}, the components about {sorted(components.paths)}")
    for path in components.paths:
        shape = components.matrices(path).shape[1:]
        checks.tensor(f"truth: {path}", truth[path], ..., real=True)
        if truth[path].ndim != 3 or truth[path].shape[1:] != shape:
            raise ValueError(f"{path}: the truth must be [J, {shape[0]}, {shape[1]}], got {list(truth[path].shape)}")
    sizes = {len(truth[path]) for path in components.paths}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"the truth must have the same J mechanisms for every path, at least one; got {sorted(sizes)}")
    if not _flat(truth, components.paths).any(1).all():
        raise ValueError("the truth holds a mechanism that is zero: nothing can point along it")
    types = [torch.float32, *(t.dtype for t in (*components.parameters(), *truth.values()))]
    dtype = reduce(torch.promote_types, types)
    return components.map(lambda t: t.to(dtype)), {path: truth[path].detach().to(dtype) for path in components.paths}


def _column_spaces(matrices: Tensor) -> Tensor:
    """Give orthonormal bases of the column spaces of matrices [J, d_in, d_out]: [J, d_in, r], padded with zeros.

    A mechanism's inputs are the column space of its matrix; for a TMS feature that is one input direction, so that
    what a component does on them is its column of that feature, in whatever basis the inputs come.
    """
    U, S, _ = torch.linalg.svd(matrices, full_matrices=False)
    return U * (S > 1e-4 * S.amax().clamp_min(1e-12))[:, None, :]


def _restricted(components: Components, truth: Truth) -> Tensor:
    """Project every component onto the inputs of each mechanism: [J, C, N]."""
    parts = []
    for path in components.paths:
        U = _column_spaces(truth[path])[:, None]
        parts.append((U @ (U.mT @ components.matrices(path)[None])).flatten(2))
    return torch.cat(parts, dim=2)


def _interval(name: str, value: Any) -> tuple[float, float]:
    """Check for a pair (least, largest)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be (least, largest), got {checks.given(value)}")
    low, high = (checks.number(name, v) for v in value)
    if low > high:
        raise ValueError(f"{name} must be (least, largest), got {checks.given(value)}")
    return low, high


def mmcs(components: Components, truth: Truth) -> Tensor:
    """Compute the mean max cosine similarity: per mechanism, the best cosine of a component's part on its inputs.

    Ignores length and sharing: even a dead component can score high. See `ownership`.

    Args:
        components: C components, without restarts.
        truth: the true mechanisms, per path [J, d_in, d_out].

    Returns:
        Tensor: a scalar in [-1, 1] (braun2025).
    """
    return _best_columns(components, truth)[0].mean()


def ml2r(components: Components, truth: Truth) -> Tensor:
    """Compute the mean L2 ratio: the length of that part over the length of the mechanism; 1 is right.

    Args:
        components: C components, without restarts.
        truth: the true mechanisms, per path [J, d_in, d_out].

    Returns:
        Tensor: a scalar, 0 or above (braun2025).
    """
    return _best_columns(components, truth)[1].mean()


def _best_columns(components: Components, truth: Truth) -> tuple[Tensor, Tensor]:
    components, truth = _in_one_type(components, truth)
    parts, mechanisms = _restricted(components, truth), _flat(truth, components.paths)
    cosines = torch.nn.functional.cosine_similarity(parts, mechanisms[:, None], dim=2)
    best = cosines.argmax(1)
    chosen = parts[torch.arange(len(parts)), best]
    return cosines.amax(1), chosen.norm(dim=1) / mechanisms.norm(dim=1)


@dataclass(frozen=True)
class Ownership:
    """Who owns what, mechanism by mechanism; see `ownership`.

    Attributes:
        owner: index of the component matched to each mechanism [J]; -1 where there are fewer components.
        cosine: between the whole component, all layers together, and the mechanism [J].
        length_ratio: the component's length over the mechanism's [J].
        purity: share of the component's squared length on its mechanism's inputs [J].
        owned: all three within the thresholds [J].
    """

    owner: Tensor
    cosine: Tensor
    length_ratio: Tensor
    purity: Tensor
    owned: Tensor

    @property
    def complete(self) -> bool:
        """Every mechanism is owned."""
        return bool(self.owned.all())

    def __str__(self) -> str:
        lines = ["mechanism  component  cosine  length ratio  purity  owned"]
        for j, c in enumerate(self.owner.tolist()):
            lines.append(
                f"{j:9d}  {c:9d}  {self.cosine[j]:6.3f}  {self.length_ratio[j]:12.3f}  "
                f"{self.purity[j]:6.3f}  {'yes' if self.owned[j] else 'no'}"
            )
        return "\n".join(lines)


def ownership(
    components: Components,
    truth: Truth,
    min_cosine: float = 0.99,
    length_range: tuple[float, float] = (0.9, 1.1),
    min_purity: float = 0.98,
) -> Ownership:
    """Match components to mechanisms one to one, and say which mechanisms have a component of their own.

    The match is the one with the largest sum of cosines (Hungarian algorithm).

    Args:
        components: C components, without restarts.
        truth: per path, the J mechanisms [J, d_in, d_out].
        min_cosine: least cosine of an owner with its mechanism.
        length_range: least and largest ratio of lengths.
        min_purity: least share of the owner's squared length on the mechanism's inputs.

    Returns:
        Ownership: one entry for each mechanism.

    Raises:
        ValueError: components with restarts, or a truth of other paths or shapes, or products that overflow.
    """
    components, truth = _in_one_type(components, truth)
    min_cosine, min_purity = (
        checks.number(name, value, -1, 1) for name, value in (("min_cosine", min_cosine), ("min_purity", min_purity))
    )
    shortest, longest = _interval("length_range", length_range)
    P, Z = checks.tensor("components' matrices", components.flat().detach(), ...), _flat(truth, components.paths)
    cosines = (Z / Z.norm(dim=1, keepdim=True)) @ (P / P.norm(dim=1, keepdim=True).clamp_min(1e-12)).T  # [J, C]
    rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    owner = torch.full((len(Z),), -1, device=Z.device)
    owner[torch.as_tensor(rows)] = torch.as_tensor(columns).to(owner)
    j, held = torch.arange(len(Z), device=Z.device), owner >= 0
    # A mechanism without a component scores 0 everywhere.
    cosine = cosines[j, owner] * held
    ratio = P[owner].norm(dim=1) / Z.norm(dim=1) * held
    inside = torch.zeros_like(ratio)
    for path in components.paths:
        inside += (_column_spaces(truth[path]).mT @ components.matrices(path).detach()[owner]).square().sum((1, 2))
    purity = inside / P[owner].square().sum(1).clamp_min(1e-24) * held
    owned = (cosine >= min_cosine) & (ratio >= shortest) & (ratio <= longest) & (purity >= min_purity)
    return Ownership(owner, cosine, ratio, purity, owned)


def relative_faithfulness(components: Components, weights: Mapping[str, Tensor]) -> Tensor:
    """Give `losses.faithfulness` as a share: the sum's squared error over the squared length of the weights.

    Args:
        components: C components, with or without restarts.
        weights: per parameter path, the target's matrix [d_in, d_out].

    Raises:
        ValueError: weights that are all zero or NaN.
    """
    error = faithfulness(components, weights)
    total = torch.stack([weights[path].square().sum() for path in components.paths]).sum()
    if not total > 0:
        raise ValueError("weights must not be all zero or NaN: the error is given as a share of their squared length")
    return error * components.n_entries / total


def output_error(target: nn.Module | Network, components: Components, x: Tensor) -> Tensor:
    """Compute the squared output error of the component model sum_c P_c on each sample of x: [B].

    Args:
        target: the network that was decomposed.
        components: C components, without restarts.
        x: inputs [B, ...].
    """
    usable(components)
    network, x = as_network(target, components), checks.inputs(x)
    with torch.no_grad(), checks.running(x, f"components of {components.parameters()[0].dtype}"):
        return mse(network(x, components), network(x))


@dataclass(frozen=True)
class Scrubbing:
    """Squared output errors against the target, each [B]; see `scrubbing`.

    Attributes:
        top_k: with the active components alone [B].
        scrubbed: with the active ones, and a random half of the others [B].
        anti_scrubbed: with a random half of the others, and few or none of the active ones [B].
        nonempty: samples with an input other than 0 [B]; the others have no error where there are no biases.
    """

    top_k: Tensor
    scrubbed: Tensor
    anti_scrubbed: Tensor
    nonempty: Tensor

    def means(self, samples: str = "all") -> dict[str, float]:
        """Average the three errors over a set of samples, which must be named where means are compared.

        Args:
            samples: "all", or "nonempty", whose means are larger by one over the share of these samples.

        Returns:
            dict[str, float]: by the names of the errors.

        Raises:
            ValueError: no sample is left.
        """
        checks.choice("samples", samples, ("all", "nonempty"))
        kept = self.nonempty if samples == "nonempty" else torch.ones_like(self.nonempty)
        if not kept.any():
            raise ValueError("no sample has an input other than 0: there is nothing to average over")
        errors = {"top_k": self.top_k, "scrubbed": self.scrubbed, "anti_scrubbed": self.anti_scrubbed}
        return {name: error[kept].mean().item() for name, error in errors.items()}


def responsible(
    target: nn.Module | Network, components: Components, x: Tensor, attribution: Attribution | None = None
) -> Tensor:
    """Say which components answer for the inputs of each sample, one for each feature that is on (braun2025).

    A feature's component is the one with the largest attribution when this feature alone is on, at 1. It does not
    depend on the other features of a sample, or of a batch.

    Args:
        target: a network of sparse features.
        components: C components, without restarts.
        x: inputs [B, n_features].
        attribution: (network, components, x) -> [B, C] in place of `attributions.gradient`.

    Returns:
        Tensor: bool [B, C], for `scrubbing`.
    """
    usable(components, alone=True)
    checks.function("attribution", attribution)
    network, x = as_network(target, components), checks.tensor("x", checks.inputs(x), "B", "n_features")
    alone = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    scores = (attribution or gradient)(network, components, alone)
    checks.tensor("attributions", scores, x.shape[1], components.n_components)
    first = torch.nn.functional.one_hot(scores.argmax(1), components.n_components)  # [n_features, C]
    return ((x != 0).to(x) @ first.to(x)) > 0


def scrubbing(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    top_k: float | Selection | FinalSelection,
    at: str = "target",
    seed: int = 0,
    attribution: Attribution | None = None,
    anti: str = "half",
    spared: Tensor | None = None,
) -> Scrubbing:
    """Scrub parameters causally (braun2025): what changes when inactive components come and go?

    The published numbers are means over all samples of the training distribution with `anti="all"` and
    `spared=responsible(target, components, x)`.

    Args:
        target: the network.
        components: C components, without restarts.
        x: inputs [B, ...].
        top_k: mean number of active components per sample; or a selection, such as that of a run
            (`Decomposition.final_selection`).
        at: where the gradient attributions are taken, as in `attributions.gradient`.
        seed: for the random halves.
        attribution: (network, components, x) -> [B, C] in their place, as in `decompose`.
        anti: what the anti-scrubbed run takes away of the active components: "half", each with probability one half,
            or "all", as in the paper.
        spared: components [B, C] that count as active in the two scrubbed runs, in place of those of `top_k`.

    Returns:
        Scrubbing: errors with the active components alone; with a random half of the inactive ones added,
        which should change little; and with active ones taken away as well, which should break things.
    """
    usable(components, alone=True)
    checks.function("attribution", attribution)
    seed = checks.number("seed", seed, 0, 2**62, whole=True)
    selection = final_selection(top_k, components.n_components)
    checks.choice("at", at, ("target", "components"))
    checks.choice("anti", anti, ("half", "all"))
    network, x = as_network(target, components), checks.inputs(x)
    if spared is not None:
        checks.gates("spared", spared, len(x), components.n_components)
    generator = torch.Generator().manual_seed(seed)
    scores = gradient(network, components, x, at=at) if attribution is None else attribution(network, components, x)
    checks.tensor("attributions", scores, len(x), components.n_components)
    active = selection.gates(scores).to(scores)
    coin = (torch.rand(active.shape, generator=generator) < 0.5).to(active)
    half = (torch.rand(active.shape, generator=generator) < 0.5).to(active)
    own = active if spared is None else (spared != 0).to(active)
    left = own * half if anti == "half" else torch.zeros_like(own)
    with torch.no_grad():
        wanted = network(x)

        def error(gates: Tensor) -> Tensor:
            return mse(network(x, components, gates), wanted)

        return Scrubbing(
            top_k=error(active),
            scrubbed=error(torch.maximum(own, coin)),
            anti_scrubbed=error(left + (1 - own) * coin),
            nonempty=(x != 0).flatten(1).any(1),
        )


def description_length(components: Components, mask: Tensor, alpha: float = 1.0, threshold: float = 0.1) -> Tensor:
    """Compute the mean bits that say which components run on a sample: sum_c |A_c|_0 (alpha * ranks + log2 C).

    Args:
        components: C components, without restarts.
        mask: which are active on each sample [B, C].
        alpha: bits for each unit of rank; fix it before looking.
        threshold: a singular value counts above this share of its path's largest one.

    Returns:
        Tensor: a scalar, bits per sample. It has no term for errors (braun2025).
    """
    usable(components, alone=True)
    checks.gates("mask", mask, "B", components.n_components)
    alpha = checks.number("alpha", alpha, 0)
    ranks = torch.stack(list(components.ranks(threshold).values())).sum(0)
    return (mask * (alpha * ranks + math.log2(components.n_components))).sum(-1).mean()
