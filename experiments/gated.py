"""Remake data/gated.json and data/gated.safetensors: hand-coded gated functions taken apart, ten seeds (chapter 10).

Two processes with one thread each; about ten minutes on two cores. Runs that the file holds already, made with the
same settings, are kept. The seeds 0 to 9 were not used while the recipe was made: that was done on seeds from 100 up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import apd_minimal as apd
from apd_minimal.config import completed
from experiments.tms import DATA, write_manifest

SEEDS = {"ours": range(10), "plain": range(5)}


def settings_of(recipe: str, seed: int) -> tuple[apd.targets.GatedFunctions, dict[str, Any]]:
    """A target and the arguments of `decompose`; "plain" has the paper's settings (braun2025, appendix), but 3,000
    steps of 2,000 samples in place of 200,000 of 10,000, and without their empty samples.
    """
    target = apd.targets.GatedFunctions(seed=seed, show_neurons=recipe == "ours")
    if recipe == "ours":
        return target, target.recipe
    data = target.data(371, nonempty=True)  # the non-empty samples of a batch of 2,000
    share = data.share_nonempty
    return target, {
        "batches": data,
        "weights": target.weights,
        "n_components": 4,
        "top_k": 0.2217 / share,
        "faithfulness": 0.1,
        "minimality": 5 * share,
        "simplicity": 5 * share,
        "p": 1.0,
        "lr": 3e-3,
        "warmup": 0.004,
        "steps": 3_000,
        "scrub": 0.0,
        "tidy_every": 0.0,
    }


def run(job: tuple[str, int]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Take one target apart and measure."""
    recipe, seed = job
    torch.set_num_threads(1)
    target, settings = settings_of(recipe, seed)
    start = time.process_time()
    result = apd.decompose(target, seed=seed, progress=False, **settings)
    seconds = time.process_time() - start
    truth, components, every = target.mechanisms(), result.components, result.restarts
    assert every is not None
    owned = [apd.metrics.ownership(every.restart(r), truth) for r in range(result.config.restarts)]
    own = owned[result.chosen]
    facts: dict[str, Any] = {
        "recipe": recipe,
        "seed": seed,
        "seconds": round(seconds, 1),
        "owned": own.owned.tolist(),
        "cosine": own.cosine.tolist(),
        "length_ratio": own.length_ratio.tolist(),
        "purity": own.purity.tolist(),
        "relative_faithfulness": apd.metrics.relative_faithfulness(
            components, apd.Network(target, target.weights).weights
        ).item(),
        "scores": result.scores,
        "chosen": result.chosen,
        "restarts_owned": [int(o.owned.sum()) for o in owned],
        "restarts_least_cosine": [o.cosine.min().item() for o in owned],
        "settings": json.loads(json.dumps(asdict(result.config))),
    }
    print(recipe, seed, f"owned {sum(facts['owned'])}/4, {seconds:.0f} s", flush=True)
    kept = components.subset((components.norms() > 0).nonzero().flatten().tolist())
    tensors = {f"{recipe}/{seed}/{path}.A": t.contiguous() for path, t in kept.A.items()}
    return facts, tensors | {f"{recipe}/{seed}/{path}.B": t.contiguous() for path, t in kept.B.items()}


def is_kept(job: tuple[str, int], runs: list[dict[str, Any]]) -> bool:
    """Is this run there already, made with the settings of today? Batches and functions are not compared."""
    recipe, seed = job
    own = {k: v for k, v in settings_of(recipe, seed)[1].items() if k not in ("batches", "weights", "attribution")}
    settings = json.loads(json.dumps(asdict(apd.Config.from_dict(own | {"seed": seed}))))
    return any((r["recipe"], r["seed"]) == job and completed(r["settings"]) == settings for r in runs)


def main() -> None:
    """Make what is missing and write the files after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2), help="runs at a time")
    processes = parser.parse_args().processes
    table, arrays = DATA / "gated.json", DATA / "gated.safetensors"
    old = json.loads(table.read_text())["runs"] if table.exists() else []
    jobs = [(recipe, seed) for recipe, seeds in SEEDS.items() for seed in seeds]
    runs = [r for r in old if any(is_kept(job, [r]) for job in jobs)]
    names = {f"{r['recipe']}/{r['seed']}/" for r in runs}
    tensors = load_file(arrays) if arrays.exists() else {}
    tensors = {name: t for name, t in tensors.items() if any(name.startswith(start) for start in names)}
    todo = [job for job in jobs if not is_kept(job, runs)]
    print(f"{len(runs)} runs kept, {len(todo)} to make", flush=True)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for facts, own in pool.imap_unordered(run, todo):
            runs.append(facts)
            tensors.update(own)
            runs.sort(key=lambda r: (r["recipe"], r["seed"]))
            about = {"torch": torch.__version__, "threads": 1, "processes": processes}
            table.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
            save_file(tensors, arrays)
            write_manifest()


if __name__ == "__main__":
    main()
