"""New starts of free components where the sparse network still fails (chapter 6).

The samples with the largest errors show what is missing: the negative gradients of their errors, propagated to the
target's weights. Power iteration finds directions in parameter space along which a few of these gradients are large,
and free components start there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..components import Components
from ..losses import Divergence
from ..network import Network
from ..sites import Use

POWER_STEPS = 20


def missing(network: Network, x: Tensor, lacking: Tensor) -> Tensor:
    """Compute each sample's gradient of <lacking_b, f(x_b)> with respect to the decomposed weights, at the target.

    Args:
        network: the target.
        x: inputs [B, ...].
        lacking: direction in which each sample's outputs should change [B, *rest], after the network's `output`.

    Returns:
        Tensor: gradients [B, N], in the order of `Components.flat`.
    """
    record: list[Use] = []
    with torch.enable_grad():
        out = network(x, record=record)
    deltas = torch.autograd.grad(out, [use.shift for use in record], lacking, allow_unused=True)
    gradients = {path: weight.new_zeros(len(x), *weight.shape) for path, weight in network.weights.items()}
    for use, delta in zip(record, deltas, strict=True):
        if delta is not None:
            rows, delta = (t.detach().reshape(len(x), -1, t.shape[-1]) for t in (use.rows, delta))
            gradient = rows.mT @ delta
            gradients[use.site.path] += gradient.mT if use.site.transposed else gradient
    return torch.cat([matrix.flatten(1) for matrix in gradients.values()], dim=1)


@torch.no_grad()
def reseed(
    network: Network,
    components: Components,
    mask: Tensor,
    x: Tensor,
    divergence: Divergence,
    n_worst: int = 1024,
    most: int = 6,
    max_cosine: float = 0.35,
    size: int | None = None,
) -> Tensor:
    """Start up to `most` free (all zero) components of every restart where the sparse outputs fail, in place.

    Args:
        network: the target.
        components: stacked components [R, C, ...].
        mask: which are active on x, [R, B, (positions,) C].
        x: inputs [B, ...].
        divergence: per sample, as in the minimality loss.
        n_worst: number of samples with the largest errors that are used.
        most: largest number of new starts of one restart in one call.
        max_cosine: a start with a larger cosine to a nonzero component is skipped.
        size: samples per forward pass, so that the memory does not grow with x; None for all at once.

    Returns:
        Tensor: which components were started [R, C].
    """
    gates, parts = mask.bool(), []
    for i in range(0, len(x), size or len(x)):
        part = slice(i, i + (size or len(x)))
        parts.append(_lacking(network, components, gates[:, part], x[part], divergence))
    errors, lacking = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))  # [R, B], [R, B, *rest]
    flat = components.flat()
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))  # torch cannot factorise half precision
    theta = torch.cat([weight.flatten() for weight in network.weights.values()]).to(flat)
    started = torch.zeros(flat.shape[:2], dtype=torch.bool, device=flat.device)
    for r in range(len(flat)):
        free = (flat[r].norm(dim=-1) == 0).nonzero().flatten().tolist()
        if not free:
            continue
        worst = errors[r].topk(min(n_worst, len(x))).indices
        gradients = missing(network, x[worst], lacking[r, worst]).to(flat)
        for c in free[:most]:
            v = _strong_direction(gradients, network)
            gradients = gradients - (gradients @ v)[:, None] * v
            length = theta @ v
            alive = flat[r][flat[r].norm(dim=-1) > 0]
            cosines = alive @ v / alive.norm(dim=-1)
            if length <= 0 or (cosines > max_cosine).any():
                continue
            flat[r, c] = length * v
            started[r, c] = True
            _put(components, r, c, flat[r, c], network)
    return started


def _lacking(
    network: Network, components: Components, gates: Tensor, x: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """Compute the errors [R, B] of the sparse outputs, and their negative gradients [R, B, *rest]."""
    outputs, target_outputs = network(x, components, gates), network(x)
    with torch.enable_grad():
        outputs = outputs.detach().requires_grad_()
        errors = divergence(outputs, target_outputs)
        return errors.detach(), -torch.autograd.grad(errors.sum(), outputs)[0]


def _strong_direction(gradients: Tensor, network: Network) -> Tensor:
    """Find a unit vector [N], of rank one in every weight, along which a few `gradients` [B, N] are large."""
    v = gradients[gradients.norm(dim=1).argmax()]
    for _ in range(POWER_STEPS):
        # The third power gives the samples that agree most with the direction the largest weights.
        v = (gradients @ v).clamp_min(0).pow(3) @ gradients
        parts = []
        for part, (d_in, d_out) in zip(_split(v, network), network.shapes.values(), strict=True):
            U, S, Vh = torch.linalg.svd(part.view(d_in, d_out), full_matrices=False)
            parts.append((S[0] * U[:, :1] @ Vh[:1]).flatten())
        v = torch.cat(parts)
        v = v / v.norm().clamp_min(1e-12)
    return v


def _split(v: Tensor, network: Network) -> tuple[Tensor, ...]:
    return v.split([weight.numel() for weight in network.weights.values()])


def _put(components: Components, r: int, c: int, vector: Tensor, network: Network) -> None:
    """Write a vector [N] into one component, as balanced factors."""
    for path, part in zip(components.paths, _split(vector, network), strict=True):
        matrix = part.view(network.shapes[path])[None]
        factors = Components.from_matrices({path: matrix}, rank=components.A[path].shape[-1])
        components.A[path][r, c] = factors.A[path][0]
        components.B[path][r, c] = factors.B[path][0]
