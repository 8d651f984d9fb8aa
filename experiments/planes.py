"""A cut without training: samples whose inputs lie in one plane show one mechanism, and what moves on them is its part.

It looks at the inputs for groups of samples that lie in one plane (of as many dimensions as a mechanism has inputs).
On each group it looks at what goes into every layer and comes out, and keeps of every weight what these span. Nothing
is learnt and no truth is seen. It asks for much: inputs without noise (chapters 10, 31 and 32 have a tolerance that the
samples set), samples on which one mechanism is on alone, the number of a mechanism's inputs, and a look at every layer.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.sites import Use
from experiments.planted import Planted

TOLERANCE = 1e-5  # of lengths, as a share of the whole
LEAST = 20  # samples of a group: two samples with several mechanisms on span a plane as well, but no others lie in it


def planes(x: Tensor, n: int, width: int, seed: int = 0, tolerance: float = TOLERANCE, tries: int = 8000) -> Tensor:
    """Find groups of samples whose inputs lie in one plane: spanned by a few samples at random, and others lie in it.

    Args:
        x: inputs [B, positions, d].
        n: groups wanted at most.
        width: dimensions of a plane.
        seed: of the samples that are tried.
        tolerance: largest distance from the plane, as a share of an input's length.
        tries: planes that are tried.

    Returns:
        Tensor: which samples are in each group, boolean [groups, B]; no sample is in two.
    """
    generator = torch.Generator().manual_seed(seed)
    free, lengths = torch.ones(len(x), dtype=torch.bool), x.norm(dim=2)
    groups: list[Tensor] = []

    def near(Q: Tensor) -> Tensor:
        return ((x - x @ Q @ Q.T).norm(dim=2) <= tolerance * lengths).all(1) & free

    for _ in range(tries):
        rest = free.nonzero().flatten()
        if len(groups) == n or len(rest) < LEAST:
            break
        some = rest[torch.randint(len(rest), (width,), generator=generator)]
        Q = torch.linalg.qr(x[some, 0].T).Q
        inside = near(Q)
        if inside.sum() >= LEAST:
            # The first samples may be almost on one line, and their plane off by rounding: fit it to all.
            inside = near(torch.linalg.svd(x[inside].flatten(0, 1), full_matrices=False).Vh[:width].T)
            groups.append(inside)
            free &= ~inside
    return torch.stack(groups) if groups else free.new_zeros(0, len(x))


def spanned(rows: Tensor, largest: Tensor, tolerance: float) -> Tensor:
    """Give the projection [d, d] on what rows [N, d] span, without what is smaller than a share of `largest`."""
    energies, Q = torch.linalg.eigh(rows.T @ rows / len(rows))
    Q = Q[:, energies > tolerance**2 * largest]
    return Q @ Q.T


@torch.no_grad()
def cut(target: Planted, x: Tensor, groups: Tensor, tolerance: float = TOLERANCE) -> dict[str, Tensor]:
    """Keep of every weight what its inputs and outputs span on each group of samples.

    Args:
        target: the network.
        x: inputs [B, ...].
        groups: boolean [groups, B].
        tolerance: least length that counts, as a share of the largest.

    Returns:
        dict[str, Tensor]: per parameter path, a part for each group [groups, d_in, d_out].
    """
    exact = copy.deepcopy(target).double()  # so that rounding does not look like a direction
    network, x = apd.Network(exact, target.weights), x.double()

    def seen(x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Collect the rows that go into each weight's layer, and the numbers that come out, channels last."""
        into: dict[str, list[Tensor]] = {path: [] for path in target.weights}
        out: dict[str, list[Tensor]] = {path: [] for path in target.weights}

        def keep(path: str, module: nn.Module, y: Tensor) -> None:
            y = y.movedim(1, -1) if isinstance(module, (nn.Conv1d, nn.Conv2d)) else y
            out[path].append(y.reshape(-1, y.shape[-1]))

        hooks = [
            site.module.register_forward_hook(lambda module, _, y, path=site.path: keep(path, module, y))
            for site in network.sites
        ]
        record: list[Use] = []
        network(x, record=record)
        for hook in hooks:
            hook.remove()
        for use in record:
            into[use.site.path].append(use.rows.reshape(-1, use.rows.shape[-1]))
        return tuple({path: torch.cat(rows) for path, rows in side.items()} for side in (into, out))  # type: ignore[return-value]

    largest = [
        {path: torch.linalg.eigvalsh(rows.T @ rows / len(rows))[-1] for path, rows in side.items()} for side in seen(x)
    ]
    parts: dict[str, list[Tensor]] = {path: [] for path in target.weights}
    for group in groups:
        both = [
            {path: spanned(rows, top[path], tolerance) for path, rows in side.items()}
            for side, top in zip(seen(x[group]), largest, strict=True)
        ]
        for path, W in network.weights.items():
            parts[path].append(both[0][path] @ W @ both[1][path])
    return {path: torch.stack(own).float() for path, own in parts.items()}


def owned(target: Planted, noise: float = 0.0, tolerance: float = TOLERANCE, tries: int = 8000) -> int:
    """Count the mechanisms that the cut owns.

    Args:
        target: the network.
        noise: in the inputs, as in `Planted.data`.
        tolerance: of planes and spans.
        tries: planes that are tried.
    """
    x = target.data(2048, noise)(0, torch.Generator().manual_seed(1))
    groups = planes(target.rows(x), target.n, target.inputs, tolerance=tolerance, tries=tries)
    if not len(groups):
        return 0
    return int(target.ownership(apd.Components.from_matrices(cut(target, x, groups, tolerance))).owned.sum())
