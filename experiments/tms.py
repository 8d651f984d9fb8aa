"""Remake data/tms.json and data/tms.safetensors: TMS of both sizes taken apart over ten target seeds (chapter 7).

Two processes with one thread each; about an hour on two cores. Runs that the file holds already, made with the
same settings, are kept: an interrupted command goes on where it stopped. The seeds were not used when the recipe
was found. `--only tms-5-2` makes the runs of one target.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import apd_minimal as apd
from apd_minimal.config import at_progress, completed

DATA = Path(__file__).resolve().parent.parent / "data"
SIZES = {"tms-5-2": (5, 2), "tms-40-10": (40, 10)}
# Not used while the recipe was made. For 40-10, 10 to 19 were, in the end: one start each left one target
# incomplete, which is why there are two starts now.
SEEDS = {"tms-5-2": range(10, 20), "tms-40-10": range(20, 30)}


def plain_recipe(target: apd.targets.TMS) -> dict[str, Any]:
    """The paper's settings (braun2025, appendix). 5-2 at full length; 40-10 cut to 3,000 steps of 512 samples."""
    own: dict[str, Any]
    if target.n_features == 5:
        data = target.data(463, nonempty=True)  # the non-empty samples of a batch of 2,048
        share = data.share_nonempty
        own = {
            "batches": data,
            "n_components": 5,
            "top_k": 0.211 / share,
            "minimality": share,
            "simplicity": 0.7 * share,
            "p": 1.0,
            "lr": 3e-2,
            "steps": 20_000,
            "attribute_at": "components",
        }
    else:
        own = {
            "batches": target.data(512),
            "n_components": 50,
            "top_k": 1.0,
            "minimality": 10.0,
            "simplicity": 20.0,
            "p": 0.9,
            "lr": 1e-3,
            "steps": 3000,
        }
    return {"weights": target.weights, "scrub": 0.0, "tidy_every": 0.0, "warmup": 0.05, **own}


def variants(target: apd.targets.TMS) -> dict[str, dict[str, Any]]:
    """What chapters 6 and 7 try besides the recipe: names, and the settings that differ from it."""
    small, recipe = target.n_features == 5, target.recipe
    constant = 0.7 * recipe["minimality"] if small else 20.0  # the paper's weights

    def times(factor: float) -> dict[str, Any]:
        return {"top_k": tuple((t, factor * k) for t, k in recipe["top_k"])}

    departures: dict[str, dict[str, Any]] = {
        "without spare components": {"n_components": target.n_features},
        "without merging": {"min_cosine": 1.1},
        "without new starts": {"reseed_until": 0.0},
        "without merging, pruning, new starts": {"tidy_every": 0.0},
        "without scrub loss": {"scrub": 0.0},
        "without a last stage free of simplicity": {"simplicity": constant},
        "without a larger k in the last stage": {"top_k": recipe["top_k"][0][1]},
    }
    if not small:
        return departures
    none = {"faithfulness": 0.0, "minimality": 0.0, "scrub": 0.0, "simplicity": 0.0}
    match = {"minimality": recipe["minimality"], "scrub": recipe["scrub"]}  # scrubbing is a form of minimality
    losses: dict[str, dict[str, Any]] = {
        "no faithfulness": {"faithfulness": 0.0},
        "no minimality": {"minimality": 0.0, "scrub": 0.0},
        "no simplicity": {"simplicity": 0.0},
        "faithfulness alone": none | {"faithfulness": 1.0},
        "minimality alone": none | match,
        "simplicity alone": none | {"simplicity": recipe["simplicity"]},
    }
    choices: dict[str, dict[str, Any]] = {f"k times {f:g}": times(f) for f in (0.35, 0.5, 0.7, 1.4, 2.0, 3.0)}
    choices |= {f"C = {c}": {"n_components": c} for c in (6, 8, 20, 40)}
    return departures | losses | choices


def settings_of(target: apd.targets.TMS, recipe: str) -> dict[str, Any]:
    """The arguments of `decompose` for "ours", "plain" or a variant."""
    if recipe == "plain":
        return plain_recipe(target)
    return target.recipe if recipe == "ours" else {**target.recipe, **variants(target)[recipe]}


def kind_of(facts: dict[str, Any]) -> str:
    """Target, with or without identity layer and rotation, as it stands in the tensors' names."""
    return facts["target"] + ("-identity" if facts["identity"] else "") + ("-rotated" if facts["rotated"] else "")


def run(job: tuple[str, bool, bool, str, int]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train one target, take it apart, measure."""
    name, identity, rotated, recipe, seed = job
    torch.set_num_threads(1)
    target = apd.targets.TMS(*SIZES[name], identity=identity).fit(seed=seed)
    represented = int((target.encode.weight.norm(dim=0) > 0.5).sum())
    if rotated:
        target.rotate(seed=seed)
    settings = settings_of(target, recipe)
    start = time.process_time()
    result = apd.decompose(target, seed=seed, progress=False, **settings)
    seconds = time.process_time() - start
    truth, components, every = target.mechanisms(), result.components, result.restarts
    assert every is not None
    own = apd.metrics.ownership(components, truth)
    weights = apd.Network(target, target.weights).weights
    # Measured on ordinary samples, empty ones too: k is given for the samples that a run trains on.
    k = at_progress(result.config.top_k, 1.0)
    if settings["batches"].nonempty:
        k *= settings["batches"].share_nonempty
    x = target.data(8192)(0, torch.Generator().manual_seed(10_000 + seed))
    errors = apd.metrics.scrubbing(target, components, x, k, settings.get("attribute_at", "target"))
    facts: dict[str, Any] = {
        "target": name,
        "identity": identity,
        "rotated": rotated,
        "recipe": recipe,
        "seed": seed,
        "seconds": round(seconds, 1),
        "represented": represented,
        "owned": own.owned.tolist(),
        "cosine": own.cosine.tolist(),
        "length_ratio": own.length_ratio.tolist(),
        "purity": own.purity.tolist(),
        "mmcs": apd.metrics.mmcs(components, truth).item(),
        "ml2r": apd.metrics.ml2r(components, truth).item(),
        "faithfulness": apd.losses.faithfulness(components, weights).item(),
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, weights).item(),
        "top_k_error": errors.top_k.mean().item(),
        "scrubbed_error": errors.scrubbed.mean().item(),
        "anti_scrubbed_error": errors.anti_scrubbed.mean().item(),
        "scores": result.scores,
        "restarts_complete": [
            apd.metrics.ownership(every.restart(r), truth).complete for r in range(result.config.restarts)
        ],
        "settings": json.loads(json.dumps(asdict(result.config))),
    }
    print(
        kind_of(facts), recipe, seed, f"owned {sum(facts['owned'])}/{len(facts['owned'])}, {seconds:.0f} s", flush=True
    )
    if recipe not in ("ours", "plain"):
        return facts, {}
    start_of_name = f"{kind_of(facts)}/{recipe}/{seed}/"
    kept = components.subset((components.norms() > 0).nonzero().flatten().tolist())
    tensors = {f"{start_of_name}{path}.A": t.contiguous() for path, t in kept.A.items()}
    tensors |= {f"{start_of_name}{path}.B": t.contiguous() for path, t in kept.B.items()}
    own_state = {k: t for k, t in target.state_dict().items() if k != "decode.weight"}  # tied to encode.weight
    return facts, tensors | {f"{start_of_name}target.{k}": t.contiguous() for k, t in own_state.items()}


def jobs() -> list[tuple[str, bool, bool, str, int]]:
    """Every run: target, identity layer, rotated, recipe, seed."""
    small, large = SIZES
    all_jobs = [(name, False, False, "ours", seed) for name in SIZES for seed in SEEDS[name]]
    all_jobs += [(name, False, True, "ours", seed) for name in SIZES for seed in SEEDS[name]]
    all_jobs += [(small, False, False, "plain", seed) for seed in SEEDS[small][:5]]
    all_jobs += [(large, False, False, "plain", seed) for seed in SEEDS[large][:3]]
    for name in SIZES:
        for variant in variants(apd.targets.TMS(*SIZES[name])):
            n_seeds = 2 if name == large else 5
            all_jobs += [(name, False, False, variant, seed) for seed in SEEDS[name][:n_seeds]]
    all_jobs += [(small, True, False, "ours", seed) for seed in SEEDS[small]]
    return all_jobs + [(large, True, False, "ours", seed) for seed in SEEDS[large][:3]]


def is_kept(job: tuple[str, bool, bool, str, int], runs: list[dict[str, Any]]) -> bool:
    """Is this run there already, made with the settings of today? Batches have no name and are not compared."""
    name, identity, _, recipe, seed = job
    wanted = settings_of(apd.targets.TMS(*SIZES[name], identity=identity), recipe)
    config = apd.Config.from_dict({k: v for k, v in wanted.items() if k not in ("batches", "weights")} | {"seed": seed})
    settings = json.loads(json.dumps(asdict(config)))
    return any(
        (r["target"], r["identity"], r["rotated"], r["recipe"], r["seed"]) == job
        and completed(r["settings"]) == settings
        for r in runs
    )


def write_manifest() -> None:
    """Note every artefact's hash, by which a fetched copy is checked."""
    names = sorted(p.name for p in DATA.iterdir() if p.name not in ("manifest.json", "README.md"))
    hashes = {name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in names}
    (DATA / "manifest.json").write_text(json.dumps(hashes, indent=1) + "\n")


def main() -> None:
    """Make what is missing, two runs at a time, and write the files after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SIZES, help="the runs of one target")
    only = parser.parse_args().only
    table, arrays = DATA / "tms.json", DATA / "tms.safetensors"
    old = json.loads(table.read_text())["runs"] if table.exists() else []
    wanted = jobs()
    runs = [r for r in old if any(is_kept(job, [r]) for job in wanted)]
    tensors = load_file(arrays) if arrays.exists() else {}
    kept_names = {f"{kind_of(r)}/{r['recipe']}/{r['seed']}/" for r in runs}
    tensors = {name: t for name, t in tensors.items() if any(name.startswith(start) for start in kept_names)}
    todo = [job for job in wanted if not is_kept(job, runs) and only in (None, job[0])]
    print(f"{len(runs)} runs kept, {len(todo)} to make", flush=True)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for facts, own in pool.imap_unordered(run, todo):
            runs.append(facts)
            tensors.update(own)
            runs.sort(key=lambda r: (kind_of(r), r["recipe"], r["seed"]))
            about = {"torch": torch.__version__, "threads": 1, "processes": 2}
            table.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
            save_file(tensors, arrays)
            write_manifest()


if __name__ == "__main__":
    main()
