"""`python -m apd_minimal`: train TMS 5-2, take it apart, say who owns what, and save the picture."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import losses, targets
from .network import Network
from .study import metrics, plots
from .study.tune import tune


def main() -> None:
    """Run the whole algorithm, with many k at once, on one thread, in well under a minute."""
    parser = argparse.ArgumentParser(prog="python -m apd_minimal", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the target and of the decomposition")
    parser.add_argument("--out", type=Path, default=Path("tms-5-2.png"), help="where the picture goes")
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"--out must be a file in a folder that is there, got {options.out}")
    torch.set_num_threads(1)
    print("Training a toy model of superposition: 5 features in 2 dimensions.")
    target = targets.TMS(n_features=5, d_hidden=2).fit(seed=options.seed)
    print("Taking its weights apart, with many k at a time; the fewest bits decide.")
    found = tune(
        target,
        target.data(512),
        target.weights,
        3 * target.n_features,
        rank=4,
        steps=1500,
        simplicity=((0.0, 20.0), (0.7, 0.0)),
        attribution=target.attributions,
        seed=options.seed,
    )
    result = found.best
    print(f"k: {found.k:.2f} components are active on an input, in the mean")
    print(metrics.ownership(result.components, target.mechanisms()))
    weights = Network(target, target.weights).weights
    print(f"faithfulness: mean squared weight error {losses.faithfulness(result.components, weights):.1e}")
    figure = plots.components(result, target.mechanisms())
    figure.savefig(options.out, dpi=150, bbox_inches="tight")
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
