"""Measurements of chapter 21 on a residual MLP that was decomposed jointly or in groups of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.scale.layerwise import Member, cluster, stitch
from apd_minimal.targets import ResidualMLP
from experiments.experiment import ownership_means, scrubbing_means

THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(1, 10))
TOP_K = 0.006  # active components for each feature, as at the end of the runs
VALUES = 32  # of each feature, where one at a time is on
SERVED, USES = 0.9, 0.1  # shares of squared errors, see `service`


def groups_of(n_layers: int, way: str) -> dict[str, list[str]]:
    """List the groups of weights that a way decomposes separately."""
    layers = range(n_layers)
    if way == "matrices":
        return {f"{part} {i + 1}": [f"{part}.{i}.weight"] for i in layers for part in ("read", "write")}
    if way == "blocks":
        return {f"block {i + 1}": [f"{part}.{i}.weight" for part in ("read", "write")] for i in layers}
    return {"all": [f"{part}.{i}.weight" for i in layers for part in ("read", "write")]}


def one_at_a_time(target: ResidualMLP) -> Tensor:
    """Build inputs with one feature on, the same positive values for each: [n_features * VALUES, n_features]."""
    each = torch.arange(target.n_features)
    x = torch.zeros(target.n_features, VALUES, target.n_features)
    x[each, :, each] = torch.rand(VALUES, generator=torch.Generator().manual_seed(5))
    return x.flatten(0, 1)


@dataclass(frozen=True)
class Service:
    """Which component serves each function, all fields [J]; see `service`."""

    part: Tensor
    share: Tensor
    uses: Tensor
    served: Tensor


@torch.no_grad()
def service(target: ResidualMLP, components: apd.Components, paths: list[str] | None = None) -> Service:
    """Find the component that computes each function in some weights alone, the other weights being the target's.

    With one feature on, only the most attributed component runs in these weights. A function is served if this removes
    at least SERVED of the squared output error without any component, and if no other function has the same component.
    A function uses the weights if without them the error is at least USES of the error without all weights.

    Args:
        target: the network.
        components: of all weights or some; their attributions select the component.
        paths: the weights in which they are run; None for all that they have.
    """
    x = one_at_a_time(target)
    everything = apd.Network(target, target.weights)
    scores = target.attributions(apd.Network(target, components.paths), components, x)
    best = scores.view(target.n_features, VALUES, -1).square().mean(1).argmax(1)  # one component for all values
    part = on_paths(components, paths or components.paths)
    network = apd.Network(target, part.paths)
    target_outputs, one = network(x), torch.nn.functional.one_hot(best, components.n_components).bool()

    def error(out: Tensor) -> Tensor:
        return (out - target_outputs).square().view(target.n_features, -1).mean(1)

    alone = error(network(x, part, one.repeat_interleave(VALUES, dim=0)))
    off = torch.zeros(len(x), components.n_components, dtype=torch.bool)
    without = error(network(x, part, off))
    nothing = apd.Components.random(everything.shapes, 1, rank=1, std=0.0)
    without_all = error(everything(x, nothing))
    share, uses = 1 - alone / without, without >= USES * without_all
    own = (best[:, None] == best).sum(1) == 1
    return Service(best, share, uses, (share >= SERVED) & own & uses)


def on_paths(components: apd.Components, paths: list[str]) -> apd.Components:
    """Restrict components to some weights."""
    return apd.Components({p: components.A[p] for p in paths}, {p: components.B[p] for p in paths})


def service_facts(serving: Service) -> dict[str, Any]:
    """Count the functions that use the weights and those served there, and average the share of the work."""
    return {
        "uses": int(serving.uses.sum()),
        "served": int(serving.served.sum()),
        "share": serving.share[serving.uses].mean().item(),
    }


def look(target: ResidualMLP, components: apd.Components, mask: Tensor) -> dict[str, Any]:
    """Count the components in use; for a single matrix, measure the share that lies in a component's largest input.

    The inputs are the features for a matrix that reads the stream, and the neurons for one that writes to it.
    """
    used = mask.any(0)
    facts: dict[str, Any] = {"used": int(used.sum())}
    if len(components.paths) == 1:
        (path,) = components.paths
        matrices = components.matrices(path)[used]
        rows = (target.embedding @ matrices if path.startswith("read") else matrices).square().sum(2)
        facts["in_one_input"] = (rows.amax(1) / rows.sum(1).clamp_min(1e-24)).mean().item()
    return facts


def whole_facts(target: ResidualMLP, components: apd.Components, x: Tensor) -> dict[str, Any]:
    """Measure ownership over all weights, and errors."""
    serving = service(target, components)
    k = TOP_K * target.n_features
    errors = apd.metrics.scrubbing(target, components, x, k, attribution=target.attributions)
    return {
        "n_components": components.n_components,
        **ownership_means(target.ownership(components)),
        "served": int(serving.served.sum()),
        "share": serving.share.mean().item(),
        **scrubbing_means(errors),
    }


def joins(clusters: list[list[Member]], owners: Mapping[str, dict[int, int]]) -> dict[str, int]:
    """Compare clusters with owners (by group, component -> function): pairs to join, joined, joined rightly."""
    where = {member: i for i, members in enumerate(clusters) for member in members}
    function = {(name, c): f for name, own in owners.items() for c, f in own.items()}
    pairs = [(a, b) for a, b in combinations(function, 2) if function[a] == function[b]]
    together = [(a, b) for a, b in combinations(function, 2) if where[a] == where[b]]
    right = sum(function[a] == function[b] for a, b in together)
    return {"pairs": len(pairs), "joined": len(together), "right": right}


@torch.no_grad()
def part_facts(target: ResidualMLP, components: apd.Components, x: Tensor) -> dict[str, Any]:
    """Measure one part in its weights: functions served, and the sparse error with TOP_K active for each feature."""
    network = apd.Network(target, components.paths)
    mask = apd.selection.batch_top_k(target.attributions(network, components, x), TOP_K * target.n_features).bool()
    error = (network(x, components, mask) - network(x)).square().mean()
    return {**service_facts(service(target, components)), "alone_error": error.item()}


def measure(
    target: ResidualMLP, parts: dict[str, apd.Components], x: Tensor, active: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Measure everything that is reported about one way of decomposing a target.

    Args:
        target: the network.
        parts: components by group.
        x: inputs [B, n_features].
        active: factors by group, by which more than TOP_K for each feature are active when parts are stitched.
    """
    facts: dict[str, Any] = {}
    by_group: dict[str, Any] = {}
    masks: dict[str, Tensor] = {}
    owners: dict[str, dict[int, int]] = {}
    with torch.no_grad():
        for name, components in parts.items():
            network = apd.Network(target, components.paths)
            k = TOP_K * target.n_features * (active or {}).get(name, 1.0)
            masks[name] = apd.selection.batch_top_k(target.attributions(network, components, x), k)
            error = (network(x, components, masks[name].bool()) - network(x)).square().mean()
            serving = service(target, components)
            owners[name] = {int(serving.part[j]): j for j in serving.served.nonzero().flatten().tolist()}
            by_group[name] = {
                **service_facts(serving),
                **look(target, components, masks[name]),
                "alone_error": error.item(),
                "relative_faithfulness": apd.metrics.relative_faithfulness(components, network.weights).item(),
            }
        network = apd.Network(target, target.weights)
        everything = stitch(parts, [[(name, c)] for name, p in parts.items() for c in range(p.n_components)])
        gates = torch.cat(list(masks.values()), dim=1).bool()
        facts["all_sparse_error"] = (network(x, everything, gates) - network(x)).square().mean().item()
        facts["without_any"] = (network(x, everything, torch.zeros_like(gates)) - network(x)).square().mean().item()
    facts["groups"] = by_group
    if len(parts) > 1:
        facts["unstitched"] = whole_facts(target, everything, x)
        facts["stitched"] = []
        for threshold in THRESHOLDS:
            clusters = cluster(masks, threshold)
            facts["stitched"].append({
                "threshold": threshold,
                "used_clusters": sum(any(masks[g][:, c].any() for g, c in m) for m in clusters),
                **joins(clusters, owners),
                **whole_facts(target, stitch(parts, clusters), x),
            })  # fmt: skip
    else:
        (components,) = parts.values()
        facts["whole"] = whole_facts(target, components, x)
        facts["seen_by_group"] = {
            way: seen_by_group(target, components, groups_of(len(target.layers), way), x)
            for way in ("matrices", "blocks")
        }
    return facts


@torch.no_grad()
def seen_by_group(
    target: ResidualMLP, components: apd.Components, groups: dict[str, list[str]], x: Tensor
) -> dict[str, Any]:
    """Measure a joint decomposition group by group: ownership there, error with the other weights intact."""
    everything = apd.Network(target, target.weights)
    mask = apd.selection.batch_top_k(target.attributions(everything, components, x), TOP_K * target.n_features).bool()
    facts = {}
    for name, paths in groups.items():
        part = on_paths(components, paths)
        network = apd.Network(target, paths)
        facts[name] = {
            **service_facts(service(target, components, paths)),
            **look(target, part, mask),
            "alone_error": (network(x, part, mask) - network(x)).square().mean().item(),
        }
    return facts
