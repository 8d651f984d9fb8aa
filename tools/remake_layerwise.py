"""Makes data/layerwise.json and .safetensors: residual MLPs taken apart jointly and layer by layer (chapter 21).

python tools/remake_layerwise.py [--only 20 | 10-10 | 50 | 25-25]     (about 45 minutes of one core)
python tools/remake_layerwise.py --costs                              (3 minutes; the machine must be idle)

Every target is decomposed in up to three ways: jointly, each block (a layer's two weights) alone, and each matrix
alone. All with the target's recipe; for parts, the active components at the end are chosen on seeds 100 and 101. The
large targets and their joint decompositions are those of chapters 8 and 9. Runs that are there with the settings of
today are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from remake_data import write_manifest
from safetensors.torch import load_file, save_file
from torch import Tensor

import apd_minimal as apd
from apd_minimal.layerwise import Member, cluster, decompose_groups, stitch
from apd_minimal.targets import ResidualMLP

DATA = Path(__file__).parent.parent / "data"
SIZES = {"20": (40, 400, (20,)), "10-10": (40, 400, (10, 10)), "50": (100, 1000, (50,)), "25-25": (100, 1000, (25, 25))}
LARGE = ("50", "25-25")
SEEDS = {"20": range(60, 65), "10-10": range(60, 65), "50": range(2), "25-25": range(2)}
SEARCH_SEEDS = (100, 101)  # of the two small ones, for `LAST_K`
STEPS = {"20": 1500, "10-10": 1500, "50": 4000, "25-25": 4000}
STORED = ("10-10", "matrices"), ("25-25", "matrices")  # ways of which the components are kept; of 25-25 one seed
LAST_K = (0.6, 1.0)  # active components for each active feature in the last half of a run; the recipe has 0.6
THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(1, 10))
TOP_K = 0.0128  # active components for each feature, for all comparisons: 1.28 of 100
VALUES = 32  # of each feature, where one at a time is on
SERVED, USES = 0.9, 0.1  # shares of squared errors, see `service`
Job = tuple[str, int, str, float]  # target, seed, way, last k


@cache
def target_of(name: str, seed: int) -> ResidualMLP:
    """The trained target of a seed; the large ones are stored."""
    n_features, d_resid, neurons = SIZES[name]
    target = ResidualMLP(n_features, d_resid, neurons, seed=seed)
    if name not in LARGE:
        return target.fit(seed=seed, steps=3000, batch_size=1024)
    tensors = load_file(DATA / "residual.safetensors")
    with torch.no_grad():
        for path in target.weights:
            target.get_parameter(path).copy_(tensors[f"{name}/{seed}/target.{path}"])
    return target


def groups_of(name: str, way: str) -> dict[str, list[str]]:
    """The groups of weights that a way takes apart alone."""
    layers = range(len(SIZES[name][2]))
    if way == "matrices":
        return {f"{part} {i + 1}": [f"{part}.{i}.weight"] for i in layers for part in ("read", "write")}
    if way == "blocks":
        return {f"block {i + 1}": [f"{part}.{i}.weight" for part in ("read", "write")] for i in layers}
    return {"all": [f"{part}.{i}.weight" for i in layers for part in ("read", "write")]}


def ways_of(name: str) -> list[str]:
    """With one layer, its block is everything."""
    return ["joint", "matrices"] + (["blocks"] if "-" in name else [])


def settings_of(job: Job) -> dict[str, Any]:
    """Arguments of `decompose`, without the inputs and weights."""
    name, _, _, last_k = job
    recipe = ResidualMLP(*SIZES[name]).recipe
    active = recipe["batches"].mean_active
    numbers = {k: v for k, v in recipe.items() if k not in ("batches", "weights", "attribution")}
    return {**numbers, "steps": STEPS[name], "top_k": ((0.0, active), (0.4, active), (0.5, last_k * active))}


def stored_settings(job: Job) -> dict[str, Any]:
    """The settings as they are stored, by which a run is known."""
    settings = {k: v for k, v in settings_of(job).items() if k != "hidden_modules"}
    facts = {"groups": groups_of(job[0], job[2]), "last_k": job[3]}
    return json.loads(json.dumps(facts | asdict(apd.Config.from_dict(settings | {"seed": job[1]}))))


def one_at_a_time(target: ResidualMLP) -> Tensor:
    """Inputs with one feature on, the same positive values for each: [n_features * VALUES, n_features]."""
    each = torch.arange(target.n_features)
    x = torch.zeros(target.n_features, VALUES, target.n_features)
    x[each, :, each] = torch.rand(VALUES, generator=torch.Generator().manual_seed(5))
    return x.flatten(0, 1)


@dataclass(frozen=True)
class Service:
    """Who serves which function, function by function [J]; see `service`."""

    part: Tensor
    share: Tensor
    uses: Tensor
    served: Tensor


@torch.no_grad()
def service(target: ResidualMLP, components: apd.Components, paths: list[str] | None = None) -> Service:
    """Which component does a function's work in some weights alone, all other weights being the target's.

    With one feature on, the most attributed component runs, and no other in these weights. A function is served if this
    takes away at least SERVED of the squared output error that there is without any component, and if no other function
    has the same component. A function uses the weights if without them the error is at least USES of that without all.

    Args:
        target: the network.
        components: of all weights or some; their attributions choose.
        paths: the weights in which they are run; None for all that they have.
    """
    x = one_at_a_time(target)
    everything = apd.Network(target, target.weights)
    scores = target.attributions(apd.Network(target, components.paths), components, x)
    best = scores.view(target.n_features, VALUES, -1).square().mean(1).argmax(1)  # one component for all values
    part = on_paths(components, paths or components.paths)
    network = apd.Network(target, part.paths)
    wanted, one = network(x), torch.nn.functional.one_hot(best, components.n_components).bool()

    def error(out: Tensor) -> Tensor:
        return (out - wanted).square().view(target.n_features, -1).mean(1)

    alone = error(network(x, part, one.repeat_interleave(VALUES, dim=0)))
    off = torch.zeros(len(x), components.n_components, dtype=torch.bool)
    without = error(network(x, part, off))
    nothing = apd.Components.random(everything.shapes, 1, rank=1, std=0.0)
    without_all = error(everything(x, nothing))
    share, uses = 1 - alone / without, without >= USES * without_all
    own = (best[:, None] == best).sum(1) == 1
    return Service(best, share, uses, (share >= SERVED) & own & uses)


def on_paths(components: apd.Components, paths: list[str]) -> apd.Components:
    """The components' parts in some weights."""
    return apd.Components({p: components.A[p] for p in paths}, {p: components.B[p] for p in paths})


def service_facts(serving: Service) -> dict[str, Any]:
    """In numbers: functions that use the weights and that are served there, and the mean share of the work."""
    return {
        "uses": int(serving.uses.sum()),
        "served": int(serving.served.sum()),
        "share": serving.share[serving.uses].mean().item(),
    }


def whole_facts(target: ResidualMLP, components: apd.Components, x: Tensor) -> dict[str, Any]:
    """Ownership over all weights, and errors."""
    own, serving = target.ownership(components), service(target, components)
    k = TOP_K * target.n_features
    errors = apd.metrics.scrubbing(target, components, x, k, attribution=target.attributions)
    return {
        "n_components": components.n_components,
        "owned": int(own.owned.sum()),
        "cosine": own.cosine.mean().item(),
        "length_ratio": own.length_ratio.mean().item(),
        "purity": own.purity.mean().item(),
        "served": int(serving.served.sum()),
        "share": serving.share.mean().item(),
        "top_k_error": errors.top_k.mean().item(),
        "scrubbed_error": errors.scrubbed.mean().item(),
        "anti_scrubbed_error": errors.anti_scrubbed.mean().item(),
    }


def joins(clusters: list[list[Member]], owners: Mapping[str, dict[int, int]]) -> dict[str, int]:
    """How the clusters treat the owners: owners is, by group, component -> function."""
    where = {member: i for i, members in enumerate(clusters) for member in members}
    function = {(name, c): f for name, own in owners.items() for c, f in own.items()}
    pairs = [(a, b) for a, b in combinations(function, 2) if function[a] == function[b]]
    together = [(a, b) for a, b in combinations(function, 2) if where[a] == where[b]]
    right = sum(function[a] == function[b] for a, b in together)
    return {"pairs": len(pairs), "joined": len(together), "right": right}


def measure(target: ResidualMLP, parts: dict[str, apd.Components], x: Tensor) -> dict[str, Any]:
    """Everything that is reported about one way of taking a target apart."""
    k, facts = TOP_K * target.n_features, {}
    by_group: dict[str, Any] = {}
    masks: dict[str, Tensor] = {}
    owners: dict[str, dict[int, int]] = {}
    with torch.no_grad():
        for name, components in parts.items():
            network = apd.Network(target, components.paths)
            masks[name] = apd.topk.batch_top_k(target.attributions(network, components, x), k)
            error = (network(x, components, masks[name].bool()) - network(x)).square().mean()
            serving = service(target, components)
            owners[name] = {int(serving.part[j]): j for j in serving.served.nonzero().flatten().tolist()}
            by_group[name] = {
                **service_facts(serving),
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
        names = {"matrices": groups_of_target(target, "matrices"), "blocks": groups_of_target(target, "blocks")}
        facts["seen_by_group"] = {way: seen_by_group(target, components, g, x) for way, g in names.items()}
    return facts


def groups_of_target(target: ResidualMLP, way: str) -> dict[str, list[str]]:
    """The groups of weights of a target."""
    return groups_of("-".join(str(len(read.weight)) for read, _ in target.layers), way)


@torch.no_grad()
def seen_by_group(
    target: ResidualMLP, components: apd.Components, groups: dict[str, list[str]], x: Tensor
) -> dict[str, Any]:
    """A joint decomposition through the eyes of the groups: ownership there, error with the other weights intact."""
    everything = apd.Network(target, target.weights)
    mask = apd.topk.batch_top_k(target.attributions(everything, components, x), TOP_K * target.n_features).bool()
    facts = {}
    for name, paths in groups.items():
        part = on_paths(components, paths)
        network = apd.Network(target, paths)
        facts[name] = {
            **service_facts(service(target, components, paths)),
            "alone_error": (network(x, part, mask) - network(x)).square().mean().item(),
        }
    return facts


def joint_of_chapters(name: str, seed: int) -> tuple[apd.Components, float]:
    """The stored joint decomposition of a large target, and its seconds."""
    tensors, start = load_file(DATA / "residual.safetensors"), f"{name}/{seed}/"
    factors = [{p: tensors[f"{start}{p}.{f}"].float() for p in groups_of(name, "joint")["all"]} for f in "AB"]
    runs = json.loads((DATA / "residual.json").read_text())["runs"]
    (seconds,) = [r["seconds"] for r in runs if (r["target"], r["seed"]) == (name, seed)]
    return apd.Components(*factors), seconds


def run(job: Job) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take one target apart in one way, and measure."""
    name, seed, way, last_k = job
    torch.set_num_threads(1)
    target = target_of(name, seed)
    seconds = {}
    parts = {}
    if way == "joint" and name in LARGE:
        parts["all"], seconds["all"] = joint_of_chapters(name, seed)
    else:
        for i, (group, weights) in enumerate(groups_of(name, way).items()):
            start = time.process_time()
            settings = {**settings_of(job), "attribution": target.attributions, "progress": False, "seed": seed + i}
            result = decompose_groups(target, target.recipe["batches"], {group: weights}, **settings)
            parts[group] = result[group].components.map(lambda t: t.half().float())
            seconds[group] = round(time.process_time() - start, 1)
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    facts = {"target": name, "seed": seed, "way": way, "last_k": last_k, "seconds": seconds}
    facts |= {**measure(target, parts, x), "settings": stored_settings(job)}
    shown = {k: v for k, v in facts.items() if k not in ("settings", "stitched")}
    print(json.dumps(shown), [s for s in facts.get("stitched", []) if s["threshold"] in (0.2, 0.5)], flush=True)
    tensors = {}
    if ((name, way) in STORED and seed == SEEDS[name][0]) or ((name, way) == STORED[0] and seed in SEEDS[name]):
        start_of_name = f"{name}/{seed}/"
        for components in parts.values():
            for path in components.paths:
                tensors[f"{start_of_name}{path}.A"] = components.A[path].half().contiguous()
                tensors[f"{start_of_name}{path}.B"] = components.B[path].half().contiguous()
                if name not in LARGE:
                    weight = target.get_parameter(path).detach()
                    tensors[f"{start_of_name}target.{path}"] = weight.clone().contiguous()
    return facts, tensors


def chosen(runs: list[dict[str, Any]], way: str) -> float:
    """The last k with the most functions served by parts on the search seeds."""
    if way == "joint":
        return LAST_K[0]  # the recipe's, which was found for joint runs

    def merit(last_k: float) -> int:
        some = [r for r in runs if r["way"] == way and r["last_k"] == last_k and r["seed"] in SEARCH_SEEDS]
        return sum(g["served"] for r in some for g in r["groups"].values())

    return max(LAST_K, key=merit)


def search_jobs() -> list[Job]:
    """The runs by which the last k of parts is chosen."""
    return [("10-10", seed, way, k) for seed in SEARCH_SEEDS for way in ("matrices", "blocks") for k in LAST_K]


def report_jobs(runs: list[dict[str, Any]]) -> list[Job]:
    """The runs that are reported."""
    return [(name, s, way, chosen(runs, way)) for name in SIZES for s in SEEDS[name] for way in ways_of(name)]


def job_of(r: dict[str, Any]) -> Job:
    """The job that a run is of."""
    return r["target"], r["seed"], r["way"], r["last_k"]


class Stored:
    """The two files. They are read again before each write, so that runs of two targets can go on side by side."""

    table, arrays = DATA / "layerwise.json", DATA / "layerwise.safetensors"

    def read(self) -> dict[str, Any]:
        """What is there, without runs that were made with other settings."""
        if not self.table.exists():
            return {"about": {"torch": torch.__version__, "threads": 1}, "costs": {}, "runs": []}
        table = json.loads(self.table.read_text())
        return {**table, "runs": [r for r in table["runs"] if r["settings"] == stored_settings(job_of(r))]}

    def runs(self) -> list[dict[str, Any]]:
        """The runs that are there."""
        return self.read()["runs"]

    def add(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """One more run."""
        table = self.read()
        table["runs"] = sorted([*table["runs"], facts], key=job_of)
        self.table.write_text(json.dumps(table, indent=1) + "\n")
        if tensors:
            save_file((load_file(self.arrays) if self.arrays.exists() else {}) | tensors, self.arrays)
        write_manifest()


def main() -> None:
    """Make what is missing, and write the files after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIZES, help="the runs on one target")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stored = Stored()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for searching in (True, False):
            runs = stored.runs()
            there = {job_of(r) for r in runs}
            jobs = search_jobs() if searching else report_jobs(runs)
            todo = [job for job in jobs if job not in there and (searching or arguments.only in (None, job[0]))]
            print(f"{len(runs)} runs kept, {len(todo)} to make", flush=True)
            for facts, tensors in pool.imap(run, todo):
                stored.add(facts, tensors)


if __name__ == "__main__":
    main()
