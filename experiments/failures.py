"""Remake data/failures.*: TMS 5-2 taken apart with settings that spoil it (chapter 12).

One process, one thread, about ten minutes. The targets are those of data/tms.safetensors, seeds 10 to 14; which
settings spoil what was found on seeds 100 to 103. All four starts of every run are kept.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import apd_minimal as apd
from experiments.tms import DATA, write_manifest

SEEDS = range(10, 15)
PATH = "encode.weight"


def departures(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Names, and the settings that differ from the recipe."""
    early, weight = recipe["top_k"][0][1], recipe["simplicity"][0][1]

    def times(factor: float) -> dict[str, Any]:
        return {"top_k": tuple((t, factor * k) for t, k in recipe["top_k"])}

    return {
        "recipe": {},
        "C = 4": {"n_components": 4},
        "C = 5": {"n_components": 5},
        "k times 3": times(3.0),
        "k times 1.5": times(1.5),
        "k times 0.35": times(0.35),
        "no merging, no pruning": {"tidy_every": 0.0},
        "no last stage": {"simplicity": weight, "top_k": early},
        "no simplicity": {"simplicity": 0.0},
        "no minimality": {"minimality": 0.0, "scrub": 0.0},
        "large start": {"init_std": 1.0, "tidy_every": 0.0, "scrub": 0.0},
        "too few steps": {"steps": 150},
    }


def main() -> None:
    """Make all runs."""
    torch.set_num_threads(1)
    stored = load_file(DATA / "tms.safetensors")
    runs: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for seed in SEEDS:
        target = apd.targets.TMS(5, 2)
        start = f"tms-5-2/ours/{seed}/target."
        state = {name.removeprefix(start): t for name, t in stored.items() if name.startswith(start)}
        target.load_state_dict(state, strict=False)  # the decoder is tied
        for name, other in departures(target.recipe).items():
            begun = time.process_time()
            result = apd.decompose(
                target, **{**target.recipe, **other}, seed=seed, attribution=target.attributions, progress=False
            )
            seconds = round(time.process_time() - begun, 1)
            runs.append({"name": name, "seed": seed, "chosen": result.chosen, "scores": result.scores})
            runs[-1] |= {"seconds": seconds, "settings": json.loads(json.dumps(asdict(result.config)))}
            assert result.restarts is not None
            for letter in "AB":
                tensors[f"{name}/{seed}/{letter}"] = getattr(result.restarts, letter)[PATH].contiguous()
            print(name, seed, seconds, flush=True)
    about = {"torch": torch.__version__, "threads": 1}
    (DATA / "failures.json").write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
    save_file(tensors, DATA / "failures.safetensors")
    write_manifest()


if __name__ == "__main__":
    main()
