"""APD's losses (braun2025), each one function; they keep the axis of restarts.

faithfulness: the components sum to the target's weights (chapter 3).
minimality: on every input, few components do the target's work (chapter 4).
simplicity: the components that are used are of low rank (chapter 5).
hidden: the sparse network's hidden activations are the target's (chapter 8).
scrub: so it stays when some of the others join, drawn by `Selection.draw` (chapter 6); it is `minimality` of these
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .components import Components

Divergence = Callable[[Tensor, Tensor], Tensor]


def faithfulness(components: Components, weights: Mapping[str, Tensor]) -> Tensor:
    """Compute the mean squared error between the sum of components and the target's weights.

    Args:
        components: C components over the paths of `weights`.
        weights: per parameter path, the target's matrix [d_in, d_out].

    Returns:
        Tensor: sum of squared differences over the number of entries; a scalar, or [restarts].

    Raises:
        ValueError: weights of other paths or shapes.
    """
    checks.kind("components", components, Components, "Components")
    shapes = {path: (components.A[path].shape[-2], components.B[path].shape[-1]) for path in components.paths}
    checks.kind("weights", weights, Mapping, "a mapping from parameter paths to tensors")
    if not weights.keys() >= shapes.keys():
        raise ValueError(f"weights must be about {list(shapes)}, got {list(weights)}")
    checks.matrices("weights", {path: weights[path] for path in shapes}, shapes, finite=False)
    device = weights[components.paths[0]].device.type
    with torch.autocast(device, enabled=False):  # what is to vanish in a sum needs all of its digits
        squares = [(components.sum(path) - weights[path]).square().sum((-2, -1)) for path in components.paths]
        return torch.stack(squares).sum(0) / components.n_entries


def mse(outputs: Tensor, target_outputs: Tensor) -> Tensor:
    """Compute the squared error of each sample, averaged over everything else: [..., B, *rest] to [..., B].

    Args:
        outputs: of the gated network, [..., B, *rest].
        target_outputs: [B, *rest].
    """
    _same(outputs, target_outputs)
    return _per_sample((outputs - target_outputs).square(), outputs.ndim - target_outputs.ndim + 1)


def kl(outputs: Tensor, target_outputs: Tensor) -> Tensor:
    """Compute KL(target || outputs), softmax over the last axis, mean over positions: [..., B, (T,) V] to [..., B].

    Args:
        outputs: logits of the gated network, [..., B, (T,) V].
        target_outputs: the target's, [B, (T,) V].

    Raises:
        ValueError: no axis of classes, or one class alone, of which every divergence is 0.
    """
    _same(outputs, target_outputs)
    if target_outputs.ndim < 2 or target_outputs.shape[-1] < 2:
        raise ValueError(f"target_outputs must be [B, ..., 2 classes or more], got {checks.given(target_outputs)}")
    p = F.log_softmax(target_outputs, dim=-1)
    q = F.log_softmax(outputs, dim=-1)
    return _per_sample((p.exp() * (p - q)).sum(-1), outputs.ndim - target_outputs.ndim + 1)


def _same(outputs: Any, target_outputs: Any) -> None:
    """Check outputs, which may have more axes in front than the target's; nothing is broadcast."""
    checks.tensor("target_outputs", target_outputs, "B", ..., finite=False, real=True)
    checks.tensor("outputs", outputs, ..., *target_outputs.shape, finite=False, real=True)


def _per_sample(values: Tensor, lead: int) -> Tensor:
    """Average over every axis after the first `lead`."""
    return values.flatten(lead).mean(-1) if values.ndim > lead else values


DIVERGENCES: dict[str, Divergence] = {"mse": mse, "kl": kl}


def minimality(outputs: Tensor, target_outputs: Tensor, divergence: Divergence = mse) -> Tensor:
    """Measure how far the sparse outputs are from the target's.

    Args:
        outputs: of the active components alone, [..., B, *rest]; a leading axis of restarts is kept.
        target_outputs: the target's outputs [B, *rest].
        divergence: per sample, (outputs, target_outputs) to [..., B].

    Returns:
        Tensor: mean over the batch; a scalar, or [restarts].

    Raises:
        ValueError: a divergence that does not give one value for each sample.
    """
    return sample_errors(outputs, target_outputs, divergence).mean(-1)


def sample_errors(outputs: Tensor, target_outputs: Tensor, divergence: Divergence) -> Tensor:
    """Compute the divergence of every sample, and check that it gives these.

    Args:
        outputs: [..., B, *rest].
        target_outputs: [B, *rest].
        divergence: per sample, (outputs, target_outputs) to [..., B].

    Returns:
        Tensor: [..., B].

    Raises:
        TypeError, ValueError: outputs of other shapes, or a divergence that does not give one value for each sample.
    """
    _same(outputs, target_outputs)
    if not callable(divergence):
        raise TypeError(
            f"divergence must be a function (outputs, target_outputs) -> [..., B], got {checks.given(divergence)}"
        )
    if outputs.dtype in (torch.bfloat16, torch.float16):  # under autocast
        outputs, target_outputs = outputs.float(), target_outputs.float()
    errors = divergence(outputs, target_outputs)
    expected = list(outputs.shape[: outputs.ndim - target_outputs.ndim + 1])
    given = list(errors.shape) if isinstance(errors, Tensor) else type(errors).__name__
    if given != expected:
        raise ValueError(
            f"divergence must give one value per sample, {expected}, got {given} for outputs {list(outputs.shape)} "
            f"and target_outputs {list(target_outputs.shape)}"
        )
    checks.tensor("what divergence gives", errors, ..., finite=False, real=True)
    if outputs.requires_grad and not errors.requires_grad:
        raise TypeError("divergence must have a derivative by the outputs, got numbers without: nothing would train")
    return errors


def hidden(activations: Sequence[Tensor], target_activations: Sequence[Tensor]) -> Tensor:
    """Measure how far the sparse network's hidden activations are from the target's (braun2025, their hidden loss).

    The released code takes one mean over all modules: of m modules of one width, it is 1/m of this.

    Args:
        activations: of each module that counts, [..., B, *rest]; a leading axis of restarts is kept.
        target_activations: the target's, each [B, *rest].

    Returns:
        Tensor: mean squared error, summed over the modules; a scalar, or [restarts].

    Raises:
        ValueError: no module, or not the same number of them, or of restarts.
    """
    for name, given in (("activations", activations), ("target_activations", target_activations)):
        checks.kind(name, given, (list, tuple), "a list of tensors")
        for value in given:
            checks.tensor(name, value, "B", ..., finite=False)
    restarts = [a.shape[: a.ndim - t.ndim] for a, t in zip(activations, target_activations, strict=False)]
    if len({*restarts}) != 1 or len(activations) != len(target_activations):
        raise ValueError(
            "activations and target_activations must be of the same modules, at least one, with the same restarts: got "
            f"{len(activations)} and {len(target_activations)}, restarts {[*map(list, restarts)]}"
        )
    pairs = zip(activations, target_activations, strict=True)
    return torch.stack([minimality(sparse, full) for sparse, full in pairs]).sum(0)


def simplicity(components: Components, mask: Tensor, p: float = 1.0, epsilon: float = 1e-16) -> Tensor:
    """Compute the Schatten-p penalty of the active components, by the factors' column lengths.

    In place of the singular values stand the lengths (|A_:,r|^2 |B_r,:|^2)^(1/2): an upper bound on
    the sum of their p-th powers, which is met when A and B are aligned with the singular vectors (giampouras2020).

    Args:
        components: C components.
        mask: which are active, [..., B, C] or [..., B, positions, C].
        p: exponent, 0 < p; the paper uses 0.9 to 1.
        epsilon: added inside the power, so that its derivative stays finite at 0.

    Returns:
        Tensor: sum over active (sample, component) pairs, over entries and batch; a scalar, or [restarts].

    Raises:
        ValueError: p is not above 0.
    """
    p, epsilon = _checked(components, mask, p), checks.number("epsilon", epsilon, 0)
    powers = [components.squared_lengths(path).add(epsilon).pow(p / 2).sum(-1) for path in components.paths]
    return _weigh(components, mask, powers)


def simplicity_exact(components: Components, mask: Tensor, p: float = 1.0) -> Tensor:
    """Compute the same penalty with the true singular values of every component (slow; the surrogate's oracle).

    Args:
        components: C components, with or without restarts.
        mask: who is active, [..., B, C].
        p: exponent of the Schatten norm, above 0.
    """
    p = _checked(components, mask, p)
    powers = [components.singular_values(path).pow(p).sum(-1) for path in components.paths]
    return _weigh(components, mask, powers)


def _checked(components: Any, mask: Any, p: Any) -> float:
    checks.kind("components", components, Components, "Components")
    lead = () if components.restarts is None else (components.restarts,)
    checks.gates("mask", mask, *lead, "B", ..., components.n_components)
    return checks.number("p", p, 0, above=True)


def _weigh(components: Components, mask: Tensor, powers: list[Tensor]) -> Tensor:
    """Weigh each component by the number of samples that use it: no [B, C, m] is formed."""
    mask = mask.flatten(powers[0].ndim - 1, -2)  # [..., samples, C]
    return (mask.sum(-2) * torch.stack(powers).sum(0)).sum(-1) / (components.n_entries * mask.shape[-2])
