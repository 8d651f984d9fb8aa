"""Do the data determine a planted mechanism? What comes into each layer, and what a wrong piece of a block costs.

A mechanism can only be owned where the data say what it is. Two things are measured. How many directions of what a
layer reads ever come in: in the others, components may hold anything that cancels. And for every block of every weight
the piece whose loss is seen least, as long as it must be for the whole mechanism to fall to a cosine of 0.99: the error
that it makes where the mechanism is on alone. Below the judge's smallest error (chapter 33) nobody could tell.

One thing no data can tell: where a leaky rectifier bends, a neuron may be scaled up before and down after it. Such a
change of two weights at once costs ranks, since what is left over must be in another component.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import apd_minimal as apd
from apd_minimal.sites import Use
from experiments.planted import Planted

STEP = 1e-5  # of the differences by which outputs are differentiated, in double precision


@torch.no_grad()
def come_in(target: Planted, tolerance: float = 1e-3) -> dict[str, tuple[int, int]]:
    """Count the directions in which what a layer reads ever moves, and all of them.

    Args:
        target: the network.
        tolerance: least length that counts, as a share of the largest.

    Returns:
        dict[str, tuple[int, int]]: per parameter path.
    """
    exact = copy.deepcopy(target).double()
    x = target.data(2048)(0, torch.Generator().manual_seed(1)).double()
    record: list[Use] = []
    apd.Network(exact, target.weights)(x, record=record)
    found = {}
    for path in target.weights:
        rows = torch.cat([use.rows.flatten(0, -2) for use in record if use.site.path == path])
        energies = torch.linalg.eigvalsh(rows.T @ rows)
        found[path] = int((energies > tolerance**2 * energies[-1]).sum()), len(energies)
    return found


@torch.no_grad()
def least_error(target: Planted, j: int, path: str, cosine: float = 0.99, samples: int = 200) -> tuple[float, Tensor]:
    """Find the piece of a block that is seen least, of the length that takes the mechanism down to a cosine.

    The error is that of the second order in the piece: the mean square of how the outputs move.

    Args:
        target: the network.
        j: the mechanism, which is on alone.
        path: of the weight.
        cosine: of the whole mechanism, over all weights, with and without the piece.
        samples: that are looked at.

    Returns:
        float: the error that it makes, as a share of the mean square of the outputs.
        Tensor: the piece [d_in, d_out].
    """
    exact = copy.deepcopy(target).double()
    x = target.make(torch.eye(target.n)[j].expand(samples, -1), torch.Generator().manual_seed(j)).double()
    own = next(site.rule for site in apd.Network(exact, target.weights).sites if site.path == path)
    true = {p: mechanisms[j].double() for p, mechanisms in target.mechanisms().items()}
    read, write = (space[j].double() for space in target.spaces[path])
    pieces = torch.einsum("ai,bo->abio", read, write).flatten(0, 1)  # of unit length
    whole, y = target.mechanisms()[path].double().sum(0), exact(x)

    def outputs(piece: Tensor) -> Tensor:
        return functional_call(exact, {path: own.weight(whole + STEP * piece)}, (x,))

    moves = torch.stack([(outputs(piece) - outputs(-piece)).flatten() / (2 * STEP) for piece in pieces])
    energies, Q = torch.linalg.eigh(moves @ moves.T / y.square().sum())
    length = torch.stack([m.square().sum() for m in true.values()]).sum() * (1 / cosine**2 - 1)
    return float(length * energies[0].clamp(min=0)), length.sqrt() * torch.einsum("k,kio->io", Q[:, 0], pieces)


def measured(target: Planted) -> dict[str, dict[str, Any]]:
    """Measure both for every weight: directions that come in, all of them, each mechanism's least error, or None."""
    seen = come_in(target)
    return {
        path: {
            "come_in": seen[path][0],
            "of": seen[path][1],
            # An expert has no part of the mechanisms of the other.
            "errors": [
                least_error(target, j, path)[0] if part.abs().max() > 0 else None
                for j, part in enumerate(target.mechanisms()[path])
            ],
        }
        for path in target.weights
    }
