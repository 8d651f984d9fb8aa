"""Sparse forward pass over the active (sample, component) pairs; its cost does not grow with the number of components.

With k active components per sample, most of the [B, C] pairs are off. Each component's samples are gathered, as in a
mixture of experts, so that a layer costs about k component products per sample instead of C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOVING = 22  # cost of gathering and scattering a number, in multiplications of a large product (measured)


@dataclass(frozen=True)
class Groups:
    """The samples of every component, padded to the longest list.

    Attributes:
        samples: [R, C, L], indices into the R * N rows of samples.
        on: [R, C, L], True for a sample and False for padding.
    """

    samples: Tensor
    on: Tensor


def group(mask: Tensor, rank: int) -> Groups | None:
    """List the samples of every component, if that saves work.

    Args:
        mask: boolean, [R, B, C], or [R, B, P, C] with positions; N is B, or B P.
        rank: m, of the components.

    Returns:
        Groups | None: None if the longest list is over half of all samples, or over m / (m + MOVING) of them.
    """
    n_restarts, n_samples, n_components = mask.flatten(1, -2).shape
    by_component = mask.flatten(1, -2).transpose(1, 2).reshape(-1, n_samples)  # [R C, N]
    counts = by_component.sum(1)
    longest = max(1, int(counts.max()))
    if longest * max(2.0, 1 + MOVING / rank) > n_samples:
        return None
    lists, samples = by_component.nonzero().unbind(1)
    place = torch.arange(len(lists), device=mask.device) - (counts.cumsum(0) - counts)[lists]
    restart = lists // n_components
    padded = torch.zeros(n_restarts * n_components, longest, dtype=torch.long, device=mask.device)
    padded[lists, place] = samples + restart * n_samples
    on = torch.arange(longest, device=mask.device) < counts[:, None]
    shape = (n_restarts, n_components, longest)
    return Groups(padded.view(shape), on.view(shape))


def apply(groups: Groups, rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Sum, for each sample, the outputs of its active components.

    Args:
        groups: the active pairs of R * N samples.
        rows: inputs [R, N, T, d]; T positions share a gate.
        first: [R, C, d, m].
        second: [R, C, m, d'].

    Returns:
        Tensor: [R, N, T, d'].
    """
    n_positions, longest = rows.shape[2], groups.on.shape[2]
    flat = rows.flatten(0, 1)
    gathered = flat.index_select(0, groups.samples.flatten()).view(*groups.on.shape, n_positions, -1)  # [R, C, L, T, d]
    u = gathered.flatten(2, 3) @ first * groups.on.to(rows).repeat_interleave(n_positions, 2)[..., None]
    y = (u @ second).unflatten(2, (longest, n_positions)).flatten(0, 2)  # [R C L, T, d']
    sums = y.new_zeros(flat.shape[0], *y.shape[1:]).index_add(0, groups.samples.flatten(), y)
    return sums.view(*rows.shape[:-1], -1)
