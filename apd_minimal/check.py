"""Check the outputs and gradients of a `Network` by brute force on a few samples (chapter 3).

Every sample is run alone, with per-sample weights in place of the target's (`functional_call`), and compared with the
gated network, which runs all samples at once. At last these few are compared with themselves among the whole batch.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.amp import autocast

from . import checks
from .attributions.capture import varied
from .network import Network
from .sites import Use
from .trial import Trial, differ


def check(network: Network, x: Tensor, tolerance: float = 1e-3) -> None:
    """Compare a network with its definition on a few samples; see `Network.check`.

    Args:
        network: the target, wrapped.
        x: inputs [B, ...].
        tolerance: share of its size by which an output or a gradient may be off.

    Raises:
        TypeError, ValueError: the target or the inputs do not fit; the message names the weight and what is wrong.
    """
    if not torch.is_grad_enabled():
        raise ValueError("gradients are switched off (torch.no_grad or torch.inference_mode), but learning needs them")
    checks.inputs(x)
    tolerance = checks.number("tolerance", tolerance, 0)
    # Rounding would hide what is wrong: autocast is off, the target's own as well. For this its class is changed while
    # the check runs: hooks see modules alone, and a mode of torch functions is not in force in the backward pass, where
    # checkpointing switches autocast on again. Leaving stays as it is, for the sake of other threads.
    enter, turn = autocast.__enter__, torch.set_autocast_enabled
    without = patch.object(autocast, "__enter__", lambda cast: (enter(cast), turn(cast.device, False))[0])
    weights = f"weights of {next(iter(network.weights.values())).dtype}"
    running = checks.running(x, weights, "runs by itself, but not with its layers' outputs edited, on x")
    with torch.autocast(x.device.type, enabled=False), without, running:
        samples = x[chosen := varied(x)]
        _check_target(network, x, samples, tolerance)
        if network.hidden:
            _check_hidden(network, samples, tolerance)
        # Twice, with different weights: rounding may flip a unit close to its threshold, but hardly in both trials.
        problem = Trial(network, x, chosen, tolerance, seed=0).problem()
        if problem and Trial(network, x, chosen, tolerance, seed=1).problem():
            raise ValueError(problem)


@torch.no_grad()
def _check_target(network: Network, x: Tensor, samples: Tensor, tolerance: float) -> None:
    """Check the target itself: finite, deterministic outputs, sample by sample, and every decomposed weight in use."""
    used: list[Use] = []
    original = x.clone()
    before = network(x, activations=[])
    if not torch.equal(x, original):
        raise ValueError("the target overwrites its inputs: let it begin with x = x.clone()")
    if not before.is_floating_point():
        raise TypeError(f"the outputs must be real numbers, got {before.dtype}: pick others with output=")
    checks.tensor("the target's outputs", before, *["size"] * before.ndim)
    if not torch.equal(before, network(x)):
        raise ValueError("the target is not deterministic: its outputs change when it runs again on the same inputs")
    _check_samples(network, samples, tolerance)  # before the hooks, which would fail with another reason
    network(x, record=used)
    called = {id(use.site) for use in used}
    for site in network.sites:
        if id(site) not in called:
            raise ValueError(f"{site.path}: its module {site.name!r} is never called as a module")


@torch.no_grad()
def _check_samples(network: Network, x: Tensor, tolerance: float) -> None:
    """Check that samples do not mix, and that decomposed modules get all of them in one call.

    Raises:
        ValueError: the message names the first module in which they mix, or that gets them one by one.
    """
    together, trace = _traced(network, x)
    for i in range(len(x)):
        try:
            alone, alone_trace = _traced(network, x[i : i + 1])
        except Exception as error:
            raise ValueError(f"samples mix: the target fails on one sample alone ({error})") from error
        one = together[i : i + 1]
        # A sample on which everything cancels has an output of rounding alone: that of the largest sample counts.
        mixed = one.shape != alone.shape or differ(one, alone, alone.norm(), tolerance, together.norm())
        name = ""
        for (name, a), (_, b) in zip(trace, alone_trace, strict=False):
            own = a if a.shape == b.shape else a[i : i + 1]
            if own.shape == b.shape and differ(own, b, b.norm(), tolerance, a.norm()):
                if mixed:
                    break
                if own is a and any(site.name == name for site in network.sites):  # it has no axis of samples
                    raise ValueError(
                        f"module {name!r} gets single samples, as from x.split(1), a loop or experts: call it once, on "
                        "all samples along the first axis, so that each can have gates of its own"
                    )
        if mixed:
            raise ValueError(
                f"samples mix: the output of one depends on the others, first seen in the output of module {name!r} "
                f"({type(network.target.get_submodule(name)).__name__}): a mean or a normalisation over the batch, or "
                "samples that are not along the first axis?"
            )


@torch.no_grad()
def _check_hidden(network: Network, x: Tensor, tolerance: float) -> None:
    """Raise a ValueError if a hidden module's outputs do not begin with the samples, each of them on its own."""
    together: list[Tensor] = []
    network(x, activations=together)
    for i in range(len(x)):
        alone: list[Tensor] = []
        with suppress(ValueError):
            network(x[i : i + 1], activations=alone)
        pairs = [(a[i : i + 1], b) for a, b in zip(together, alone, strict=False)]
        same = [a.shape == b.shape and not differ(a, b, b.norm(), tolerance) for a, b in pairs]
        if len(alone) != len(together) or not all(same):
            raise ValueError(
                f"hidden modules {network.hidden}: their outputs must begin with the samples, in the order of the "
                "inputs, and none may depend on another sample"
            )


def _traced(network: Network, x: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Return the outputs, and the outputs of every module in the order in which the calls end."""
    outputs: list[tuple[str, Tensor]] = []

    def record(name: str, out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim and out.is_floating_point():
            with suppress(RuntimeError):  # inside torch.func, where tensors have no memory and are not to be kept
                out.untyped_storage()
                outputs.append((name, out.clone()))

    with ExitStack() as undo:
        for name, module in network.target.named_modules():
            undo.enter_context(module.register_forward_hook(lambda _, args, out, name=name: record(name, out)))
        return network(x), outputs
