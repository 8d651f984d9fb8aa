"""Makes data/grid.json: TMS 40-10 taken apart with one setting after the other moved away from the recipe (chapter 11).

python tools/remake_grid.py [--processes N]     (about an hour of one core)

Each of the three weights and the learning rate is scaled by 1/4, 1/2, 2, 4, k by 1/2 to 2, one at a time and jointly at
random; then p, C, m, the batch and the number of steps. Runs that are there with the settings of today are kept. The
seeds are of targets that no recipe was made on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from remake_data import write_manifest

import apd_minimal as apd
from apd_minimal.config import Schedule, at_progress

TABLE = Path(__file__).parent.parent / "data" / "grid.json"
SEEDS = range(40, 43)
N_RANDOM = 16
WEIGHTS = ("faithfulness", "minimality", "simplicity")
FACTORS = (0.25, 0.5, 2.0, 4.0)


def scaled(schedule: Schedule, factor: float) -> Schedule:
    """A number or a schedule, times a factor."""
    if isinstance(schedule, tuple):
        return tuple((t, value * factor) for t, value in schedule)
    return schedule * factor


def variants() -> dict[str, dict[str, Any]]:
    """Name of a variant to the settings that it changes; `batch` is the batch size."""
    recipe = apd.targets.TMS(40, 10).recipe
    base = {**asdict(apd.Config(1, 1)), **recipe}

    def times(name: str, factor: float) -> dict[str, Any]:
        return {name: scaled(base[name], factor)}

    table: dict[str, dict[str, Any]] = {"recipe": {}}
    for name in (*WEIGHTS, "lr"):
        table |= {f"{name} x {factor:g}": times(name, factor) for factor in FACTORS}
    table |= {f"top_k x {factor:g}": times("top_k", factor) for factor in (0.5, 0.71, 1.41, 2.0)}
    generator = torch.Generator().manual_seed(0)
    for i in range(N_RANDOM):
        draws = (2 * torch.rand(5, generator=generator) - 1).tolist()
        change: dict[str, Any] = {}
        for name, draw in zip((*WEIGHTS, "lr", "top_k"), draws, strict=True):
            change |= times(name, 2.0 ** (draw if name == "top_k" else 2 * draw))
        table[f"random {i}"] = change
    table |= {f"p = {p:g}": {"p": p} for p in (0.5, 0.7, 0.8, 1.0)}
    table |= {f"C = {c}": {"n_components": c} for c in (40, 50, 80, 120)}
    table |= {f"m = {m}": {"rank": m} for m in (1, 2, 10)}
    table |= {f"batch = {size}": {"batch": size} for size in (128, 256, 1024, 2048)}
    table |= {f"steps = {steps}": {"steps": steps} for steps in (375, 750, 3000)}
    return table


@cache
def target_of(seed: int) -> apd.targets.TMS:
    """The trained target of a seed."""
    return apd.targets.TMS(40, 10).fit(seed=seed)


def settings_of(variant: str, seed: int) -> tuple[int, dict[str, Any]]:
    """Batch size, and the settings of a run without its inputs."""
    recipe = apd.targets.TMS(40, 10).recipe
    change = dict(variants()[variant])
    batch = change.pop("batch", recipe["batches"].batch_size)
    own = {k: v for k, v in recipe.items() if k not in ("batches", "weights")}
    return batch, {**own, **change, "seed": seed}


def stored_settings(variant: str, seed: int) -> dict[str, Any]:
    """The settings as they are stored, by which a run is known."""
    batch, settings = settings_of(variant, seed)
    return json.loads(json.dumps({"batch": batch, **asdict(apd.Config.from_dict(settings))}))


def true_positives(target: apd.targets.TMS, components: apd.Components, k: int) -> tuple[float, float]:
    """Recall and precision of the owners among each sample's k most attributed components.

    The true positives of a sample are its active features whose owner is among them; owners are matched one to one by
    weights, whether they are good or not.
    """
    owner = apd.metrics.ownership(components, target.mechanisms()).owner
    x = target.data(8192)(0, torch.Generator().manual_seed(777))
    active = x != 0
    chosen = apd.topk.sample_top_k(target.attributions(apd.Network(target, target.weights), components, x), k)
    has_owner = owner >= 0
    hits = (chosen[:, owner.clamp_min(0)].bool() & has_owner & active).sum().item()
    return hits / active.sum().item(), hits / (k * len(x))


def run(job: tuple[str, int]) -> dict[str, Any]:
    """Take one target apart with one setting changed."""
    variant, seed = job
    torch.set_num_threads(1)
    target = target_of(seed)
    batch, settings = settings_of(variant, seed)
    start = time.process_time()
    result = apd.decompose(
        target, target.data(batch), target.weights, attribution=target.attributions, progress=False, **settings
    )
    seconds = time.process_time() - start
    components = result.components
    own = apd.metrics.ownership(components, target.mechanisms())
    x = target.data(4096)(0, torch.Generator().manual_seed(10_000 + seed))
    k = at_progress(result.config.top_k, 1.0)
    errors = apd.metrics.scrubbing(target, components, x, k, attribution=target.attributions)
    tp = {str(k): true_positives(target, components, k) for k in (1, 2, 5)}
    facts = {
        "variant": variant,
        "seed": seed,
        "seconds": round(seconds, 1),
        "owned": int(own.owned.sum()),
        "cosine": own.cosine.mean().item(),
        "length_ratio": own.length_ratio.mean().item(),
        "recall": {k: recall for k, (recall, _) in tp.items()},
        "precision": {k: precision for k, (_, precision) in tp.items()},
        "score": min(result.scores),
        "top_k_error": errors.top_k.mean().item(),
        "scrubbed_error": errors.scrubbed.mean().item(),
        "settings": stored_settings(variant, seed),
    }
    print(variant, seed, f"owned {facts['owned']}/40, {seconds:.0f} s", flush=True)
    return facts


def main() -> None:
    """Make what is missing, and write the table after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    processes = parser.parse_args().processes
    wanted = [(variant, seed) for seed in SEEDS for variant in variants()]
    old = json.loads(TABLE.read_text())["runs"] if TABLE.exists() else []
    by_job = {(r["variant"], r["seed"]): r for r in old}
    runs = [r for job, r in by_job.items() if job in wanted and r["settings"] == stored_settings(*job)]
    there = {(r["variant"], r["seed"]) for r in runs}
    todo = [job for job in wanted if job not in there]
    print(f"{len(runs)} runs kept, {len(todo)} to make", flush=True)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for facts in pool.imap_unordered(run, todo):
            runs.append(facts)
            runs.sort(key=lambda r: wanted.index((r["variant"], r["seed"])))
            about = {"torch": torch.__version__, "threads": 1, "processes": processes, "random draws": N_RANDOM}
            TABLE.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
            write_manifest()


if __name__ == "__main__":
    main()
