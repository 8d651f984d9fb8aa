"""Cases for the study of leaks: targets, components, inputs and masks of further stored decompositions.

Each case is what `leakage.leakage` needs, and how many bits there are to tell of an answer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.attributions import Attribution, inner_activation
from apd_minimal.config import at_progress
from apd_minimal.importance import Importance
from apd_minimal.selection import FinalSelection, Selection
from experiments import attention, failures, layerwise, merging, spd
from experiments.experiment import Row, of, prefix, stored
from experiments.layerwise_measures import groups_of

SAMPLES = 4096
FEW, FEWER = 2048, 1024  # where a run takes long


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        target: the network, plain or wrapped.
        x: inputs that no run has seen.
        k: mean number of active components, or the selection of the run.
        sets: components by name, measured in the same way; "found" is what is stored.
        settings: of `leakage`.
        answer: bits of the answer, where outputs are values: of which inputs are on, or which outputs there are.
            None for classes, whose entropy is counted.
        rules: other attributions for the components that were found, by name; on fewer samples.
    """

    target: Any
    x: Tensor
    k: float | Selection | FinalSelection
    sets: dict[str, apd.Components]
    settings: dict[str, Any] = field(default_factory=dict)
    answer: float | None = None
    rules: dict[str, Attribution] = field(default_factory=dict)


def h(p: float) -> float:
    """Compute the entropy of a coin, in bits."""
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)


def set_bits(n: int, probability: float) -> float:
    """Compute the entropy of which of n features are on, each with this probability, given that one is, in bits."""
    none = (1 - probability) ** n
    return (n * h(probability) - h(none)) / (1 - none)


class PartOf(apd.targets.ResidualMLP):
    """A residual MLP without what comes out if some of its weights are zero: no mask of these can take that away."""

    def without(self, weights: list[str]) -> PartOf:
        """Say which weights; all that are decomposed."""
        rest = apd.targets.ResidualMLP(
            self.n_features, self.d_resid, tuple(read.out_features for read, _ in self.layers), self.probability
        )
        rest.load_state_dict(self.state_dict())
        rest.requires_grad_(False)
        for path in weights:
            rest.get_parameter(path).zero_()
        self.__dict__["rest"] = rest  # no part of the network
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., n_features] to what the weights add to the outputs, [..., n_features]."""
        return super().forward(x) - self.__dict__["rest"](x)


def part(group: str, seed: int) -> Case:
    """Build the case of a residual MLP of two layers, of which some weights are decomposed alone (chapter 21)."""
    name = layerwise.STORED
    groups = {g: (way, own) for way in layerwise.ways_of(name) for g, own in groups_of(2, way).items()}
    way, weights = groups[group]
    tensors, start = stored("layerwise"), prefix((name, seed, way))
    A, B = ({p: tensors[f"{start}{p}.{f}"].float() for p in weights} for f in "AB")
    target = layerwise.target_of(name, seed)
    added = PartOf(*layerwise.SIZES[name], seed=seed)
    added.load_state_dict(target.state_dict())
    whole = apd.Network(target, weights)

    def attribution(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        return target.attributions(whole, components, x)

    x = apd.data.SparseFeatures(target.n_features, target.probability, -1.0, 1.0, FEW, nonempty=True)(
        0, torch.Generator().manual_seed(55_000 + seed)
    )
    k = at_progress(target.recipe["top_k"], 1.0)
    bits = set_bits(target.n_features, target.probability)
    return Case(
        added.without(weights), x, k, {"found": apd.Components(A, B)}, {"attribution": attribution}, answer=bits
    )


def failed(name: str, seed: int) -> Case:
    """Build the case of a TMS 5-2 that was decomposed with settings that spoil it (chapter 12), the chosen start."""
    target, settings = failures.stored_target("tms-5-2", seed), failures.settings_of((name, seed))
    tensors = stored("failures")
    (row,) = (r for r in failures.STUDY.stored()["runs"] if (r["name"], r["seed"]) == (name, seed))
    A, B = ({failures.PATH: tensors[f"{prefix((name, seed))}{f}"][row["chosen"]]} for f in "AB")
    x = target.data(SAMPLES, nonempty=True)(0, torch.Generator().manual_seed(55_000 + seed))
    k = min(at_progress(settings["top_k"], 1.0), float(settings["n_components"]))
    bits = set_bits(target.n_features, target.data(1).probability)
    return Case(target, x, k, {"found": apd.Components(A, B)}, answer=bits)


def merged(name: str, rule: str, alpha: float | None, seed: int) -> Case:
    """Build the case of a TMS that was decomposed with four times too many components (chapter 20)."""
    job = (name, rule, alpha, seed)
    own = {n.removeprefix(prefix(job)): t for n, t in stored("merging").items() if n.startswith(prefix(job))}
    target = apd.targets.TMS(*merging.SIZES[name])
    target.load_state_dict(
        {n.removeprefix("target."): t for n, t in own.items() if n.startswith("target.")}, strict=False
    )
    A, B = ({p: own[f"{f}.{p}"].float() for p in target.weights} for f in "AB")
    found = apd.Components(A, B)
    found = found.subset((found.norms() > 0).nonzero().flatten().tolist())
    settings = merging.settings_of(job)
    source = replace(settings["batches"], batch_size=SAMPLES)
    x = source(0, torch.Generator().manual_seed(55_000 + seed))
    paired = isinstance(source, merging.Paired)
    data = target.data(1)
    k = settings["top_k"][-1][1]
    if not paired and not source.nonempty:  # empty samples say nothing
        x, k = x[(x != 0).any(1)], k / data.share_nonempty
    bits = set_bits(target.n_features - paired, data.probability)
    return Case(target, x, min(k, float(found.n_components)), {"found": found}, answer=bits)


def stochastic(name: str, kind: str, setting: str, seed: int) -> Case:
    """Build the case of a TMS decomposed by SPD (chapter 26), with the importances that were learned."""
    tms, network, _ = spd.target_of(name, kind, seed, setting.endswith("rotated"))
    start = prefix((name, kind, setting, seed))
    found, _ = of("spd", start)
    learned = [stored("spd")[f"{start}importance.{i}"][None] for i in range(4)]
    selection = Importance(0.0, p=1.0, hidden=learned[0].shape[2])
    selection.start(1, found.n_components, learned[0])
    for p, value in zip(selection.parameters(), learned, strict=True):
        p.data.copy_(value)
        p.requires_grad_(False)
    x = tms.data(SAMPLES, nonempty=True)(0, torch.Generator().manual_seed(55_000 + seed))
    bits = set_bits(tms.n_features, tms.data(1).probability)
    settings = {"attribution": inner_activation}
    return Case(network, x, FinalSelection(selection), {"found": found}, settings, answer=bits)


def either(readers: int, seed: int) -> Case:
    """Build the case of the OR of chapter 26, by top k; the other runs are in `leaks_later`."""
    target, job = spd.Either(readers), ("or", readers, "top k", seed)
    found, _ = of("spd", prefix(job))
    data = apd.data.SparseFeatures(4 - readers, 0.3, 1.0, 1.0, SAMPLES, nonempty=True)
    x = data(0, torch.Generator().manual_seed(55_000 + seed))
    k = spd.either_settings(job)["top_k"] / data.share_nonempty
    with torch.no_grad():
        answer = target(x).unique(dim=0, return_inverse=True)[1]
    return Case(target, x, k, {"found": found}, answer=apd.study.information.entropy(answer))


def looked_up(start: str, estimator: str, k: float, index: int) -> Case:
    """Build the case of the head of attention (chapter 15): one of ten starts."""
    name = prefix((start, estimator, k, attention.REPORT_SEED))
    A, B = ({p: stored("attention")[f"{name}{p}.{f}"][index].float() for p in attention.PATHS} for f in "AB")
    x = attention.lookups(FEWER)(0, torch.Generator().manual_seed(55_000))

    def other_content(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, : attention.N], x[:, :, attention.N :].roll(1, 0)], dim=2)

    def other_wish(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1].roll(1, 0), x[:, 1:]], dim=1)

    settings = {
        "attribution": attention.estimator_of(estimator),
        "blank": {"content of another": other_content, "wish of another": other_wish},
    }
    bits = math.log2(2 * attention.N)  # in which channel the message is, and its sign
    return Case(attention.Lookup(), x, k, {"found": apd.Components(A, B)}, settings, answer=bits)


Kind = tuple[Any, Callable[[int], Case]]  # seeds, and the case of a seed


@cache
def further() -> dict[str, Kind]:
    """List the kinds of decompositions, by name."""
    kinds: dict[str, Kind] = {}
    for group in ["all", *groups_of(2, "blocks"), *groups_of(2, "matrices")]:
        kinds[f"parts, {group}"] = range(60, 65), partial(part, group)
    for name in failures.departures(apd.targets.TMS(5, 2).recipe):
        if name != "recipe":  # that of chapter 7
            kinds[f"failed, {name}"] = failures.SEEDS, partial(failed, name)
    every = [job for size in merging.SIZES for job in merging.jobs(size)]
    for name, rule, alpha in dict.fromkeys(job[:3] for job in every):
        seeds = [job[3] for job in every if job[:3] == (name, rule, alpha)]
        price = "" if alpha in (None, merging.ALPHA) else f", alpha {alpha:g}"
        kinds[f"merging, {name}, {rule}{price}"] = seeds, partial(merged, name, rule, alpha)
    for name, kind, setting in dict.fromkeys(job[:3] for job in spd.jobs()):
        seeds = [job[3] for job in spd.jobs() if job[:3] == (name, kind, setting)]
        kinds[f"spd, {name}, {kind}, {setting}"] = seeds, partial(stochastic, name, kind, setting)
    for readers in (1, 2):
        kinds[f"or, {readers}"] = range(3), partial(either, readers)
    for row in attention.STUDY.stored()["runs"]:
        start, estimator, k, seed = attention.RUNS.job_of(row)
        if seed == attention.REPORT_SEED:
            kinds[f"head, {start}, {estimator}, {k:g}"] = range(10), partial(looked_up, start, estimator, k)
    return kinds


def random_parts(weights: dict[str, Tensor], C: int, m: int, generator: torch.Generator) -> apd.Components:
    """Split weights [d_in, d_out] into C random parts of rank m; their sum is exact if C m is not below both sizes."""
    A, B = {}, {}
    for path, W in weights.items():
        if C * m >= len(W):
            left = torch.randn(len(W), C * m, generator=generator)
            right = torch.linalg.pinv(left) @ W
        else:
            right = torch.randn(C * m, W.shape[1], generator=generator)
            left = W @ torch.linalg.pinv(right)
        A[path], B[path] = left.unflatten(1, (C, m)).transpose(0, 1).contiguous(), right.unflatten(0, (C, m))
    return apd.Components(A, B)


def shuffled(case: Case, seed: int) -> Case:
    """Build a case of a network that learned nothing: the entries of each decomposed weight in a random order.

    Its components are random parts of it, as many and of as many factors as those that were found.
    """
    generator = torch.Generator().manual_seed(seed)
    found, target = case.sets["found"], copy.deepcopy(case.target)
    network = target if isinstance(target, apd.Network) else apd.Network(target, found.paths)
    for path in found.paths:
        weight = network.target.get_parameter(path).data
        weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))
    network = apd.Network(network.target, found.paths, network.output)
    m = max(found.A[path].shape[-1] for path in found.paths)
    parts = random_parts(network.weights, found.n_components, m, generator)
    return Case(network, case.x, case.k, {"found": parts}, {"outputs": case.settings.get("outputs", "values")})


def bits_of(case: Case) -> Row:
    """Count the components, and the bits of the answer."""
    found = case.sets["found"]
    bits = case.answer
    if bits is None:
        network = case.target if isinstance(case.target, apd.Network) else apd.Network(case.target, found.paths)
        with torch.no_grad():
            bits = apd.study.information.entropy(network(case.x).argmax(-1))
    return {"components": int((found.norms() > 0).sum()), "answer": bits}
