"""The algorithm: `decompose` learns components by gradient descent on APD's losses (chapter 6)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .advice import advice
from .attributions import Attribution
from .components import Components
from .config import Config, Schedule
from .data import Batches
from .decomposition import Decomposition
from .losses import DIVERGENCES, Divergence
from .network import Network
from .train import NonFiniteLoss, Run


def decompose(
    target: nn.Module,
    batches: Batches,
    weights: Sequence[str],
    n_components: int,
    top_k: Schedule,
    *,
    output: Callable[[Any], Tensor] | None = None,
    divergence: str | Divergence = "mse",
    hidden_modules: Sequence[str] = (),
    attribution: Attribution | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    micro_batch: int | None = None,
    recompute: bool = False,
    watch: Callable[[int, Components], None] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Decomposition:
    """Decompose a network's weights into components that sum to them, few and simple on every input.

    Args:
        target: any network with weights of known kinds; it is left exactly as it is.
        batches: batches(step, generator) gives the inputs [B, ...] of a step; all randomness from the generator.
        weights: parameter paths such as "encode.weight".
        n_components: C; more than the mechanisms you expect.
        top_k: mean number of active components per sample; a number, or points (progress, value) of a schedule.
        output: picks the outputs that count, [B, ...], from what the target returns.
        divergence: "mse", "kl" (of softmax over the last axis) or (outputs, wanted) -> [..., B].
        hidden_modules: paths of modules whose outputs the sparse forward pass must match too, weighted by the
            setting `hidden`.
        attribution: (network, components, x) -> [..., B, C]; None takes exact gradient attributions.
        checkpoint: a file from which an interrupted run of the same settings resumes, bit for bit. It knows
            functions by their names alone, and the batches not at all (`checkpoint.identity`); a generator that
            an attribution draws from is not in it.
        checkpoint_every: steps between checkpoints.
        micro_batch: samples worked on at a time, which bounds the memory of a step; the mask is still chosen over
            the whole batch, so that the result is the same, up to rounding (and the draws of an attribution that
            draws). None for all at once.
        recompute: work out what the components do in every layer once more on the way back, instead of keeping it
            (gradient checkpointing): the same result with less memory and more time.
        watch: called as watch(step, components) at every logged step.
        progress: show a progress bar with the losses.
        **settings: any field of `Config`.

    Under torch.autocast the networks and attributions run in the lower precision; the sum of the components, the
    losses, merging and the choice among restarts stay in the precision of the weights.

    Returns:
        Decomposition: the restart with the smallest held-out sparse reconstruction error. After Ctrl-C, the
        state so far, marked unfinished.

    Raises:
        KeyError, TypeError, ValueError: input that does not fit; the message names what was given and expected.
        NonFiniteLoss: a loss became NaN or infinite.
        StoreError: the checkpoint is damaged, or belongs to another run; the message says what differs.
        Exception: whatever a function given here raises. After the first step, it carries the state so far as its
            attribute `result`; if the restarts cannot be scored then, there is a warning, and the scores are NaN.
    """
    config = Config.from_dict({"n_components": n_components, "top_k": top_k, **settings})
    check(config, divergence, hidden_modules, micro_batch)
    network = Network(target, weights, output, hidden_modules, recompute)
    run = begin(Run, network, batches, config, divergence, attribution, micro_batch)
    if checkpoint is not None and Path(checkpoint).exists():
        run.resume(checkpoint)
    try:
        follow(run, checkpoint, checkpoint_every, watch, progress)
        result = run.result()
    except KeyboardInterrupt:
        return run.so_far()
    except NonFiniteLoss:
        raise
    except Exception as error:
        if run.step:  # before the first step there is nothing to lose
            error.result = run.so_far()  # type: ignore[attr-defined]
            if hasattr(error, "add_note"):  # from Python 3.11
                error.add_note(f"decompose: the result after {run.step} steps is in this exception's .result")
        raise
    if says := advice(network, result.components, config):
        warnings.warn(says, UserWarning, stacklevel=2)
    return result


def check(config: Config, divergence: str | Divergence, hidden_modules: Sequence[str], micro_batch: int | None) -> None:
    """Raise a ValueError that names what does not fit."""
    config.check()
    if isinstance(divergence, str) and divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {list(DIVERGENCES)} or a function, got {divergence!r}")
    if bool(hidden_modules) != bool(config.hidden):
        raise ValueError(
            f"hidden_modules and the weight hidden belong together, got {list(hidden_modules)} and {config.hidden}"
        )
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, or None for the whole batch, got {micro_batch}")


def begin(
    make: Callable[..., Run],
    network: Network,
    batches: Batches,
    config: Config,
    divergence: str | Divergence,
    attribution: Attribution | None,
    micro_batch: int | None,
) -> Run:
    """A run before its first step; the network is checked on inputs of that step."""
    function = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
    run = make(network, batches, config, function, attribution, micro_batch)
    network.check(run.inputs(0, torch.Generator().manual_seed(config.seed)))
    return run


def follow(
    run: Run,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int,
    watch: Callable[[int, Components], None] | None,
    progress: bool,
) -> None:
    """All steps that are left of a run."""
    with tqdm(total=run.config.steps, initial=run.step, disable=not progress, unit="step") as bar:
        while run.step < run.config.steps:
            losses = run.advance()
            bar.update()
            if run.config.logs(run.step - 1):
                bar.set_postfix({name: f"{min(values):.1e}" for name, values in losses.items()})
                if watch is not None:
                    watch(run.step - 1, run.components.map(Tensor.detach))
            if checkpoint is not None and (run.step % checkpoint_every == 0 or run.step == run.config.steps):
                run.save(checkpoint)
