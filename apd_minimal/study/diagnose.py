"""What may be wrong with a decomposition when nobody knows the truth (chapter 12).

Every sign is a number that the target, the components and inputs give; a threshold on it names a suspect. A suspect
is a place to look, not a verdict, and a decomposition without one may still be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import checks
from ..attributions import Attribution, gradient
from ..attributions.choose import shapes_of
from ..components import Components, usable
from ..losses import DIVERGENCES, Divergence, mse, sample_errors
from ..network import Network, as_network
from ..selection import FinalSelection, Selection, final_selection
from ..tidy.merge import cosines
from .leakage import SAME, nearer
from .metrics import relative_faithfulness

SIGNS = {
    "empty_length": (0.01, "empty, a free place and no suspect: not longer than this share of the longest"),
    "dead_share": (0.1, "dead: active on less than this share of the mean number of samples"),
    "cancelling_cosine": (-0.8, "cancelling: it is not dead, and its cosine with another is at most this, ..."),
    "stray": (0.1, "... or switched on where it is inactive it adds at least this error"),
    "other_effects": (0.15, "doubled: at least this share of its effects on the outputs is not along the main one"),
    "lump_share": (0.75, "lump: the same, and it is active on at least this share of the samples"),
    "split_cosine": (0.8, "split: its cosine with another is at least this, ..."),
    "split_overlap": (0.6, "... or their samples are the same, up to this share of those of either"),
    "factor_off": (0.08, "shrunken, stretched: the outputs fit best at a length off by at least this share"),
    "remainder": (0.01, "unfaithful: the remainder's squared length is at least this share of the weights'"),
    "sparse": (0.1, "not minimal: the error of the active components alone is at least this"),
    "scrubbed": (0.1, "not independent: random inactive components add at least this error"),
    "leak": (0.75, "leaking: another's active components bring outputs nearer to the other's, at least so often"),
}
"""Thresholds by which `diagnose` names suspects, and what each means. They were set on toy models (chapter 12)."""
NUMBERS = 2**21  # of derivatives, and of what a layer's components are, that are worked on at a time
COARSE, FINE = torch.arange(0.5, 2.01, 0.1), torch.arange(-0.08, 0.09, 0.02)  # factors tried, and around the best


@dataclass(frozen=True)
class Diagnosis:
    """Signs of each component, each [C], and of the whole; see `diagnose`.

    Errors are shares of the error of a network without any component.

    Attributes:
        length: over all weights together.
        share: of the samples on which any component is active, the share on which this one is.
        second_singular: second over first singular value, in the weight where the second is largest; the first of
            that weight's longest component counts. 0 for a component of rank one.
        other_effects: share of the squared effects on the outputs that is not along their main direction.
        cosine: with the component that points most along the same or the opposite direction; its sign tells.
        partner: index of that component, -1 if there is no other.
        overlap: samples shared with its most frequent companion, over the samples of either.
        companion: index of that companion, -1 if there is none.
        stray: error that it adds where it is inactive, switched on alone.
        factor: the multiple of it at which the sparse network fits best on its samples.
        remainder: squared length of what no component accounts for, over that of the weights.
        sparse: error of the active components alone.
        scrubbed: error with a random half of the inactive ones added.
        anti_scrubbed: error with half of the active ones removed as well.
        leak: share of samples whose outputs with the active components of another, at random, are nearer to the
            other's: 0 where the input decides, 1 where the mask does, one half where both are needed
            (`study.leakage`, chapter 27); 0 if all outputs are the same.
        thresholds: by which suspects are named; the table prints them and what they mean.
    """

    length: Tensor
    share: Tensor
    second_singular: Tensor
    other_effects: Tensor
    cosine: Tensor
    partner: Tensor
    overlap: Tensor
    companion: Tensor
    stray: Tensor
    factor: Tensor
    remainder: float
    sparse: float
    scrubbed: float
    anti_scrubbed: float
    leak: float
    thresholds: dict[str, float]

    @property
    def n_components(self) -> int:
        """C, the empty ones included."""
        return len(self.length)

    @property
    def empty(self) -> Tensor:
        """Which components are empty [C], since they were pruned or never grew."""
        return self.length <= self.thresholds["empty_length"] * self.length.max()

    @property
    def suspects(self) -> dict[str, list[int]]:
        """Name of a symptom to the components that show it; symptoms of the whole have an empty list.

        A component has at most one name, the first that fits of cancelling, dead, lump, split, doubled, shrunken,
        stretched: what its length should be means little before the rest is right.
        """
        at, live = self.thresholds, ~self.empty
        mixed = self.other_effects >= at["other_effects"]
        dead = self.share < at["dead_share"] * self.share[live].mean()
        shown = {
            # What no input uses may point anywhere; it is harmless as long as it does nothing.
            "cancelling": (self.cosine <= at["cancelling_cosine"]) & ~dead | (self.stray >= at["stray"]),
            "dead": dead,
            "lump": mixed & (self.share >= at["lump_share"]),
            "split": (self.cosine >= at["split_cosine"]) | (self.overlap >= at["split_overlap"]),
            "doubled": mixed,
            "shrunken": self.factor >= 1 + at["factor_off"],
            "stretched": self.factor <= 1 - at["factor_off"],
        }
        found: dict[str, list[int]] = {}
        for c in live.nonzero().flatten().tolist():
            name = next((symptom for symptom, members in shown.items() if members[c]), None)
            if name is not None:
                found.setdefault(name, []).append(c)
        whole = {
            "unfaithful": self.remainder >= at["remainder"],
            "not minimal": self.sparse >= at["sparse"],
            "not independent": self.scrubbed - self.sparse >= at["scrubbed"],
            "leaking": self.leak >= at["leak"],
        }
        return found | {symptom: [] for symptom, there in whole.items() if there}

    def __str__(self) -> str:
        lines = [" comp  length  share  other   2nd  cosine       overlap      stray  factor  suspect"]
        named = {c: symptom for symptom, members in self.suspects.items() for c in members}
        for c in (~self.empty).nonzero().flatten().tolist():
            lines.append(
                f"{c:5d}  {self.length[c]:6.2f}  {self.share[c]:5.2f}  {self.other_effects[c]:5.2f}  "
                f"{self.second_singular[c]:4.2f}  {self.cosine[c]:5.2f} ({self.partner[c]:3d})  "
                f"{self.overlap[c]:4.2f} ({self.companion[c]:3d})  {self.stray[c]:6.3f}  {self.factor[c]:6.2f}  "
                f"{named.get(c, '')}".rstrip()
            )
        lines.append(f"{int(self.empty.sum())} of {self.n_components} empty; remainder {self.remainder:.1e}")
        lines.append(
            f"errors: sparse {self.sparse:.1e}, scrubbed {self.scrubbed:.1e}, anti-scrubbed {self.anti_scrubbed:.1e}"
        )
        lines.append(f"another's active components: {self.leak:.2f} of the outputs nearer to the other's")
        whole = [symptom for symptom, members in self.suspects.items() if not members]
        lines.append("of the whole: " + (", ".join(whole) or "no suspect"))
        lines += ["thresholds:", *(f"{self.thresholds[sign]:6g}  {meaning}" for sign, (_, meaning) in SIGNS.items())]
        return "\n".join(lines)


@torch.no_grad()
def diagnose(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    top_k: float | Selection | FinalSelection,
    *,
    divergence: str | Divergence = mse,
    at: str = "target",
    seed: int = 0,
    attribution: Attribution | None = None,
    **thresholds: float,
) -> Diagnosis:
    """Look for the usual faults of a decomposition, without a truth.

    Args:
        target: the network, plain or wrapped (wrap it if only some outputs count).
        components: C components, without restarts.
        x: inputs [B, ...]; a few thousand, of the kind that the decomposition was made for.
        top_k: mean number of active components per sample, 0 < k <= C; or a selection, such as that of a run
            (`Decomposition.final_selection`).
        divergence: "mse", "kl", or (outputs, target_outputs) to one error per sample [B], as in `decompose`.
        at: where the gradient attributions are taken, "target" or "components".
        seed: of the random halves of scrubbing.
        attribution: (network, components, x) -> [B, C], by which the active ones are chosen, as in `decompose`; None
            for gradients. Effects on the outputs are judged by gradients in any case.
        **thresholds: any of `SIGNS`, to name suspects by other thresholds.

    Returns:
        Diagnosis: the signs, and by them the suspects.

    Raises:
        TypeError: a threshold that does not exist.
        ValueError: components with restarts or all zero, an empty batch, top_k out of range, a network that does
            the same with no component at all.
    """
    unknown = sorted(set(thresholds) - set(SIGNS))
    if unknown:
        raise TypeError(f"unknown thresholds {unknown}; known: {list(SIGNS)}")
    thresholds = {name: checks.number(name, value) for name, value in thresholds.items()}
    usable(components, alone=True)
    selection = final_selection(top_k, components.n_components)
    checks.function("attribution", attribution)
    seed = checks.number("seed", seed, 0, 2**62, whole=True)
    checks.choice("at", at, ("target", "components"))
    if isinstance(divergence, str):
        checks.choice("divergence", divergence, list(DIVERGENCES))
        divergence = DIVERGENCES[divergence]
    if not callable(divergence):
        raise TypeError(f"divergence must be one of {list(DIVERGENCES)} or a function, got {checks.given(divergence)}")
    components = components.map(Tensor.detach)
    length = components.norms()
    if not length.any():
        raise ValueError("all components are zero: there is nothing to look at")
    network = as_network(target, components)
    x = checks.inputs(x)
    C = components.n_components
    with checks.running(x, f"components of {components.parameters()[0].dtype}"):
        shapes = shapes_of(network, x)

    def derivatives(part: Tensor) -> Tensor:
        return gradient(network, components, part, at=at, per_output=True)  # [B, C, n_out]

    def score(part: Tensor) -> Tensor:
        if attribution is None:
            return derivatives(part).square().mean(-1).sqrt()
        return checks.tensor("attributions", attribution(network, components, part), len(part), C)

    size = max(1, NUMBERS // (C * shapes.n_out))  # all derivatives at once would be many times what a step takes
    scores = torch.cat([score(part) for part in x.split(size)])
    gates = selection.gates(scores).to(scores)
    # A zero component can be kept when there are too few attributions above zero; it does nothing.
    on = selection.mask(scores) & (length > 0)
    # Only those of the active pairs are kept: [pairs, n_out], sample by sample.
    signed = torch.cat([derivatives(part)[here] for part, here in zip(x.split(size), on.split(size), strict=True)])
    active = on.nonzero()[:, 1]
    inner = max(T * (d + e + C * components.A[path].shape[-1]) for path, T, d, e in shapes.uses)
    n = max(1, NUMBERS // inner)
    wanted = torch.cat([network(part) for part in x.split(n)])

    def errors(gates: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        parts = zip(x[rows].split(n), gates.split(n), wanted[rows].split(n), strict=True)
        return torch.cat([sample_errors(network(part, components, g), right, divergence) for part, g, right in parts])

    def mean_error(rows: Tensor, gates: Tensor) -> Tensor:
        return errors(gates, rows).mean()

    all_off = float(errors(torch.zeros_like(gates)).mean())
    if not all_off > 0:
        raise ValueError("with every component off the outputs are the target's already: nothing to explain")
    sparse = errors(gates)
    generator = torch.Generator().manual_seed(seed)
    coin, half = ((torch.rand(gates.shape, generator=generator) < 0.5).to(gates) for _ in range(2))
    # The inputs of some with the active components of others, among those whose outputs differ.
    partner = torch.randperm(len(x), generator=generator).to(x.device)
    rows = (divergence(wanted, wanted[partner]) > SAME * all_off).nonzero().flatten()
    leak, partner = 0.0, partner[rows]
    if len(rows):
        exchanged = zip(x[rows].split(n), gates[partner].split(n), strict=True)
        outputs = torch.cat([network(part, components, g) for part, g in exchanged])
        leak = nearer(*(divergence(outputs, wanted[whose]) for whose in (rows, partner)))
    cosine, partner = _largest(cosines(components)[1])
    overlap, companion = _together(on)
    stray, factor, mixed = length.new_zeros(C), length.new_ones(C), length.new_zeros(C)
    for c in length.nonzero().flatten().tolist():
        rows = ~on[:, c]
        if rows.any():
            switched_on = gates[rows]  # a copy
            switched_on[:, c] = 1
            stray[c] = (errors(switched_on, rows) - sparse[rows]).mean() / all_off
        rows = on[:, c]
        if rows.any():
            factor[c] = _best_factor(partial(mean_error, rows), gates[rows], c)
            s = torch.linalg.svdvals(signed[active == c]).square()
            mixed[c] = 1 - s[0] / s.sum().clamp_min(1e-30)
    return Diagnosis(
        length=length,
        share=on.sum(0) / on.any(1).sum().clamp_min(1),
        second_singular=_second_singular(components),
        other_effects=mixed,
        cosine=cosine,
        partner=partner,
        overlap=overlap,
        companion=companion,
        stray=stray,
        factor=factor,
        remainder=float(relative_faithfulness(components, network.weights)),
        sparse=float(sparse.mean()) / all_off,
        scrubbed=float(errors(torch.maximum(gates, coin)).mean()) / all_off,
        anti_scrubbed=float(errors(gates * half + (1 - gates) * coin).mean()) / all_off,
        leak=leak,
        thresholds={sign: value for sign, (value, _) in SIGNS.items()} | thresholds,
    )


def _together(on: Tensor) -> tuple[Tensor, Tensor]:
    """Find, for each column of [B, C], the largest Jaccard index with another column, and that one's index."""
    both = on.float().T @ on.float()
    counts = both.diagonal()
    return _largest(both / (counts[:, None] + counts - both).clamp_min(1))


def _largest(table: Tensor) -> tuple[Tensor, Tensor]:
    """Find the entry of largest size off the diagonal of each row, and its index; 0 and -1 if all are zero."""
    table = table - torch.diag(table.diagonal())
    index = table.abs().argmax(1)
    value = table.gather(1, index[:, None])[:, 0]
    return value, torch.where(value == 0, -1, index)


def _second_singular(components: Components) -> Tensor:
    parts = []
    for path in components.paths:
        s = components.singular_values(path)
        s = s if s.shape[1] > 1 else torch.cat([s, torch.zeros_like(s)], dim=1)
        parts.append(s[:, 1] / s[:, 0].clamp_min(1e-3 * float(s.max()) + 1e-12))
    return torch.stack(parts).amax(0)


def _best_factor(error: Callable[[Tensor], Tensor], gates: Tensor, c: int) -> float:
    """Find the multiple of component c at which `error` of the gates is smallest, to within 0.02."""

    def error_at(factor: float) -> float:
        scaled = gates.clone()
        scaled[:, c] *= factor
        return float(error(scaled))

    best = min(COARSE.tolist(), key=error_at)
    return min((best + FINE).tolist(), key=error_at)
