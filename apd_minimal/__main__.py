"""`python -m apd_minimal`: train TMS 5-2, take it apart, say who owns what, and save the picture."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import decompose, losses, targets
from .network import Network
from .study import metrics, plots


def main() -> None:
    """Run the whole algorithm once, on one thread, in well under a minute."""
    parser = argparse.ArgumentParser(prog="python -m apd_minimal", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the target and of the decomposition")
    parser.add_argument("--out", type=Path, default=Path("tms-5-2.png"), help="where the picture goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("Training a toy model of superposition: 5 features in 2 dimensions.")
    target = targets.TMS(n_features=5, d_hidden=2).fit(seed=options.seed)
    print("Taking its weights apart.")
    result = decompose(target, seed=options.seed, **target.recipe)
    print(metrics.ownership(result.components, target.mechanisms()))
    weights = Network(target, target.weights).weights
    print(f"faithfulness: mean squared weight error {losses.faithfulness(result.components, weights):.1e}")
    figure = plots.components(result, target.mechanisms())
    figure.savefig(options.out, dpi=150, bbox_inches="tight")
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
