"""Makes the stored runs on residual MLPs: compressed computation (chapter 8), two and three layers (chapter 9).

python tools/remake_residual.py [--only 50 | 25-25 | 17-17-16]     (about 5 minutes of one core for each run)

A run that is there and was made with the settings of today is kept. The components are stored in half precision.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from remake_data import write_manifest
from safetensors.torch import load_file, save_file

import apd_minimal as apd
from apd_minimal.targets import ResidualMLP

DATA = Path(__file__).parent.parent / "data"
SIZES = {"50": (50,), "25-25": (25, 25), "17-17-16": (17, 17, 16)}
SEEDS = {"50": range(5), "25-25": range(5), "17-17-16": range(3)}
TOP_K = 1.28  # the paper's, for all comparisons with it
SINGLE_FAILS = 2e-4


def settings_of(name: str, seed: int) -> dict[str, Any]:
    """The settings of a run, as they are stored."""
    recipe = ResidualMLP(neurons=SIZES[name]).recipe
    numbers = {k: v for k, v in recipe.items() if k not in ("batches", "weights", "attribution", "hidden_modules")}
    return json.loads(json.dumps(asdict(apd.Config.from_dict(numbers | {"seed": seed}))))


def single_errors(target: ResidualMLP, components: apd.Components, n_values: int = 200) -> torch.Tensor:
    """Mean squared error with one feature on and the most attributed component alone: [n_features]."""
    values = 2 * torch.rand(n_values, generator=torch.Generator().manual_seed(5)) - 1
    x = torch.zeros(target.n_features, n_values, target.n_features)
    x[torch.arange(target.n_features), :, torch.arange(target.n_features)] = values
    network, x = apd.Network(target, target.weights), x.flatten(0, 1)
    with torch.no_grad():
        mask = apd.topk.sample_top_k(target.attributions(network, components, x), 1)
        errors = (network(x, components, mask.bool()) - network(x)).square().mean(-1)
    return errors.view(target.n_features, n_values).mean(1)


def measure(target: ResidualMLP, components: apd.Components) -> dict[str, Any]:
    """Everything that is reported, on inputs that no run has seen."""
    own = target.ownership(components)
    strict = target.ownership(components, 0.99, (0.9, 1.1), 0.98)
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    errors = apd.metrics.scrubbing(target, components, x, TOP_K, attribution=target.attributions)
    single = single_errors(target, components)
    network = apd.Network(target, target.weights)
    return {
        "owned": int(own.owned.sum()),
        "owned_strictly": int(strict.owned.sum()),
        "cosine": own.cosine.mean().item(),
        "length_ratio": own.length_ratio.mean().item(),
        "purity": own.purity.mean().item(),
        "single_error": single.mean().item(),
        "single_fails": int((single > SINGLE_FAILS).sum()),
        "top_k_error": errors.top_k.mean().item(),
        "scrubbed_error": errors.scrubbed.mean().item(),
        "anti_scrubbed_error": errors.anti_scrubbed.mean().item(),
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, network.weights).item(),
        "in_use": int((components.norms() > 0).sum()),
    }


def run(job: tuple[str, int]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train one target, take it apart, measure."""
    name, seed = job
    torch.set_num_threads(1)
    start = time.process_time()
    target = ResidualMLP(neurons=SIZES[name], seed=seed).fit(seed=seed)
    fitted = time.process_time()
    result = apd.decompose(target, seed=seed, progress=False, **target.recipe)
    seconds = time.process_time() - fitted
    full = result.components
    components = full.map(lambda t: t.half().float())
    facts: dict[str, Any] = {
        "target": name,
        "seed": seed,
        "seconds": round(seconds, 1),
        "target_seconds": round(fitted - start, 1),
        **measure(target, components),
        "before_rounding": measure(target, full),
        "settings": settings_of(name, seed),
    }
    print(json.dumps({k: v for k, v in facts.items() if k not in ("settings", "before_rounding")}), flush=True)
    start_of_name = f"{name}/{seed}/"
    kept = full.subset((full.norms() > 0).nonzero().flatten().tolist())
    tensors = {f"{start_of_name}{path}.A": t.half().contiguous() for path, t in kept.A.items()}
    tensors |= {f"{start_of_name}{path}.B": t.half().contiguous() for path, t in kept.B.items()}
    return facts, tensors | {
        f"{start_of_name}target.{path}": target.get_parameter(path).detach().contiguous() for path in target.weights
    }


def main() -> None:
    """Make what is missing, and write the files after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SIZES, help="the runs of one size")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    table, arrays = DATA / "residual.json", DATA / "residual.safetensors"
    old = json.loads(table.read_text())["runs"] if table.exists() else []
    runs = [r for r in old if r["settings"] == settings_of(r["target"], r["seed"])]
    tensors = load_file(arrays) if arrays.exists() else {}
    there = {f"{r['target']}/{r['seed']}" for r in runs}
    tensors = {name: t for name, t in tensors.items() if name.rsplit("/", 1)[0] in there}
    todo = [(name, seed) for name in SIZES for seed in SEEDS[name] if f"{name}/{seed}" not in there]
    todo = [job for job in todo if arguments.only in (None, job[0])]
    print(f"{len(runs)} runs kept, {len(todo)} to make", flush=True)
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for facts, own in pool.imap_unordered(run, todo):
            runs.append(facts)
            tensors.update(own)
            runs.sort(key=lambda r: (r["target"], r["seed"]))
            about = {"torch": torch.__version__, "threads": 1, "processes": arguments.processes}
            table.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
            save_file(tensors, arrays)
            write_manifest()


if __name__ == "__main__":
    main()
