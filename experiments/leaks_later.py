"""Cases for the study of leaks: decompositions of chapters 26 and 28 to 38 that are stored, or made again in seconds.

Of the planted networks, the modular tasks and the groups the parts are not stored. Four of these are taken apart again
here, by the call of their own study, each the first seed of its kind. For modular tasks it is the set of weights that
needs fewer bits on that seed. Of the OR by SPD and VPD the importances are not stored; these twelve are made again,
too.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.attributions import Attribution, inner_activation
from apd_minimal.config import at_progress
from apd_minimal.losses import minimality
from apd_minimal.selection import batch_top_k
from apd_minimal.study.information import entropy
from experiments import architectures, basis, groups, induction, modular, pieces, spd, together, whole
from experiments import whole_computations as circuits
from experiments.experiment import Row, of, prefix, stored
from experiments.leaks_cases import FEW, FEWER, SAMPLES, Case, Kind, h, set_bits

ALLOWED = 0.0125  # error at the end of the rule without k, over that with nothing active (chapter 28)
PLANTED, TASKS = ("MLP, all three", 8470), ("task", 3, 7700, "strong")
GROUPS = {"group, irreps": ("irrep, S3", 2, 8710), "group, three": ("shared", 3, 8700)}


def drawn(seed: int) -> torch.Generator:
    """Give the stream of a case's inputs, which no run has seen."""
    return torch.Generator().manual_seed(55_000 + seed)


def patterns(on: Tensor) -> float:
    """Compute the entropy of which [B, n] are on, in bits."""
    return float(entropy(on.unique(dim=0, return_inverse=True)[1]))


def of_toy(tms: apd.targets.TMS, network: Any, found: apd.Components, seed: int) -> Case:
    """Build the case of a network with the function of a TMS, decomposed by its recipe."""
    recipe, data = tms.recipe, tms.data(SAMPLES, nonempty=True)
    k = at_progress(recipe["top_k"], 1.0)
    k = k if recipe["batches"].nonempty else k / data.share_nonempty
    how = {"at": recipe.get("attribute_at", "target"), "attribution": recipe.get("attribution")}
    bits = set_bits(tms.n_features, data.probability)
    return Case(network, data(0, drawn(seed)), k, {"found": found}, how, answer=bits)


def untied(rotated: bool, seed: int) -> Case:
    """Build the case of a TMS whose decoder is a weight of its own (chapter 29)."""
    tms, network, _ = spd.target_of("tms-5-2", "untied", seed, rotated)
    return of_toy(tms, network, of("whole", prefix((seed, rotated)))[0], seed)


def in_basis(name: str, seed: int) -> Case:
    """Build the case of a TMS in another basis (chapter 31)."""
    tms, network, _ = basis.basis_of(name, seed)
    return of_toy(tms, network, of("basis", prefix((name, seed)))[0], seed)


def either(readers: int, method: str, seed: int) -> Case:
    """Build the case of the OR of chapter 26, by top k and other attributions than gradients."""
    target, job = spd.Either(readers), ("or", readers, method, seed)
    data = apd.data.SparseFeatures(4 - readers, 0.3, 1.0, 1.0, SAMPLES, nonempty=True)
    x, k = data(0, drawn(seed)), spd.either_settings(job)["top_k"] / data.share_nonempty
    how = {"attribution": spd.BY_TOP_K[method]}
    with torch.no_grad():
        bits = patterns(target(x))
    return Case(target, x, k, {"found": of("spd", prefix(job))[0]}, how, answer=bits)


def two_steps(seed: int) -> Case:
    """Build the case of a circuit of two layers (chapter 32); a second thing is on beside some."""
    target = circuits.Circuit(seed)
    x, bits = target.batch(0, drawn(seed), SAMPLES), math.log2(target.J) + h(target.beside)
    found = of("whole_computations", prefix((seed,)))[0]
    return Case(target, x, circuits.SETTINGS["top_k"], {"found": found}, answer=bits)


@cache
def again(readers: int, method: str, seed: int) -> apd.Decomposition:
    """Take the OR of chapter 26 apart by SPD or VPD once more: the stored parts, with the importances that go by."""
    return spd.take_either_apart(("or", readers, method, seed))[0]


def either_learned(readers: int, method: str, seed: int) -> Case:
    """Build the case of the OR of chapter 26 by SPD, by VPD, without a k, or by `tune`.

    SPD and VPD have the importances that were learned. For the others k is the mean number of active components, by
    what is stored of each input: inputs are 0 or 1, and so there are no others.
    """
    target, job = spd.Either(readers), ("or", readers, method, seed)
    x = apd.data.SparseFeatures(4 - readers, 0.3, 1.0, 1.0, SAMPLES, nonempty=True)(0, drawn(seed))
    with torch.no_grad():
        bits = patterns(target(x))
    if method in spd.BY_IMPORTANCE:
        result = again(readers, method, seed)
        by: Row = {"attribution": inner_activation}
        return Case(target, x, result.final_selection, {"found": result.components}, by, answer=bits)
    (row,) = (row for row in spd.STUDY.stored()["either"] if spd.EITHER.job_of(row) == job)
    which = (x[:, None] == torch.tensor(row["inputs"])).all(-1).float().argmax(1)
    k = float(torch.tensor(row["gates"])[which].sum(1).mean())
    how = {"attribution": spd.WITHOUT_K[method]}
    return Case(target, x, k, {"found": of("spd", prefix(job))[0]}, how, answer=bits)


@torch.no_grad()
def k_within(network: apd.Network, components: apd.Components, x: Tensor, attribution: Attribution) -> float:
    """Find the smallest of some k with which the error is as small as the rule without k wants it at the end."""
    scores, wanted, C = attribution(network, components, x), network(x), components.n_components
    nothing = minimality(network(x, components, torch.zeros_like(scores)), wanted)
    ks = [C * 2 ** (i / 8 - 5) for i in range(41)]  # from C / 32 to C
    good = (k for k in ks if minimality(network(x, components, batch_top_k(scores, k)), wanted) <= ALLOWED * nothing)
    return next(good, float(C))


def in_pairs(way: str, both: float, seed: int) -> Case:
    """Build the case of a TMS 10-4 on data in which features come in pairs (chapter 38), with and without a k."""
    own = {n.removeprefix(start): t for n, t in stored("together").items() for start in [prefix((way, both, seed))]}
    target = apd.targets.TMS(together.N, together.D, probability=together.PROBABILITY)
    with torch.no_grad():
        target.encode.weight.copy_(own["weight"])
        target.bias.copy_(own["bias"])
    found = apd.Components.from_matrices({"encode.weight": own["matrices"]})
    x = together.Together(both, SAMPLES)(0, drawn(seed))
    if way == "no k":
        k = k_within(apd.Network(target, target.weights), found, x, target.attributions)
    else:
        k = at_progress(together.settings_of((way, both, seed))["top_k"], 1.0)
    how = {"attribution": target.attributions}
    return Case(target, x, min(k, float(found.n_components)), {"found": found}, how, answer=patterns(x > 0))


def written(seed: int) -> Case:
    """Build the case of written circuits of induction (chapter 36), with gates for whole sequences."""
    target = pieces.target_of(("as it is", seed))
    x = induction.OneAtATime(target, FEWER)(0, drawn(seed))
    how = {"attribution": induction.scores_of("sequence")}
    bits = patterns(target.says(x).any(-1).any(1))  # which circuit is asked
    return Case(target, x, induction.ACTIVE["sequence"], {"found": of("finds", f"again/{seed}/")[0]}, how, answer=bits)


def operation(name: str) -> tuple[Any, Row]:
    """Give the target and the settings of modular tasks or of a group."""
    if name == "modular":
        return modular.target_of(TASKS[0], TASKS[2]), modular.settings_of(TASKS)
    return groups.target_of(GROUPS[name][0], GROUPS[name][2]), groups.settings_of(GROUPS[name])


@cache
def apart(name: str) -> apd.Components:
    """Take a network apart whose parts are not stored, by the call of its own study."""
    if name == "planted":
        target = architectures.MADE[PLANTED[0]](seed=PLANTED[1])
        data = target.data(architectures.BATCH)
        x = target.data(2048)(0, torch.Generator().manual_seed(20_000 + PLANTED[1]))
        more = architectures.settings(target, target.weights, x, target.n, data.mean_active, PLANTED[1] + 1000)
    else:
        target, settings = operation(name)
        data, more = target.data(256), {"judge": apd.rate.Judge(), **settings}
    return apd.decompose(target, data, target.weights, progress=False, **more).components


def planted(seed: int) -> Case:
    """Build the case of a planted network (chapter 33)."""
    target = architectures.MADE[PLANTED[0]](seed=seed)
    data = target.data(FEW)
    k = architectures.K[-1][1] * data.mean_active
    bits = set_bits(target.n, target.probability)
    return Case(target, data(0, drawn(seed)), k, {"found": apart("planted")}, answer=bits)


def operations(name: str, seed: int) -> Case:
    """Build the case of modular tasks (chapter 35) or of groups (chapter 37); the answer is the token."""
    target, settings = operation(name)
    x = target.data(FEW)(0, drawn(seed))
    n = 2 * (target.n if name == "modular" else target.n_tokens)  # the columns of both tokens; then come the switches
    blank = {
        "tokens of another": lambda x: torch.cat([x[:, :n].roll(1, 0), x[:, n:]], dim=1),
        "switches of another": lambda x: torch.cat([x[:, :n], x[:, n:].roll(1, 0)], dim=1),
    }
    with torch.no_grad():
        bits = float(entropy(target(x).argmax(-1)))
    return Case(target, x, settings["top_k"], {"found": apart(name)}, {"blank": blank}, answer=bits)


def later() -> dict[str, Kind]:
    """List the kinds of decompositions, by name."""
    kinds: dict[str, Kind] = {}
    for readers in (1, 2):
        for method in spd.BY_TOP_K:
            if method != "top k":  # that of `leaks_cases`
                kinds[f"or by {method}, {readers}"] = range(3), partial(either, readers, method)
        for method in (*spd.BY_IMPORTANCE, *spd.WITHOUT_K):
            kinds[f"or with {method}, {readers}"] = range(3), partial(either_learned, readers, method)
    for rotated in (False, True):
        kinds[f"untied{', rotated' if rotated else ''}"] = whole.SEEDS, partial(untied, rotated)
    for name in basis.BASES:
        kinds[f"basis, {name}"] = basis.SEEDS, partial(in_basis, name)
    kinds["circuits"] = circuits.SEEDS, two_steps
    kinds["planted"] = [PLANTED[1]], planted
    kinds["modular"] = [TASKS[2]], partial(operations, "modular")
    kinds["induction"] = [pieces.FIRST + i for i in range(5)], written
    for name, (_, _, seed) in GROUPS.items():
        kinds[name] = [seed], partial(operations, name)
    for way in together.WAYS:
        for both in together.BOTH:
            kinds[f"together, {way}, {both:g}"] = together.SEEDS, partial(in_pairs, way, both)
    return kinds
