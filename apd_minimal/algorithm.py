"""The algorithm: `decompose` learns components by gradient descent on APD's losses (chapter 6)."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checks
from .advice import advice
from .attributions.gradients import Attribution
from .batch import Batches
from .config import Config, Schedule
from .decomposition import Decomposition
from .local import Local
from .loop import Callback, follow
from .losses import DIVERGENCES, Divergence
from .network import Network
from .outcome import Judge, outcome
from .selection import Selection, TopK
from .train import Run

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@torch.inference_mode(False)
@torch.enable_grad()
def decompose(
    target: nn.Module,
    batches: Batches,
    weights: Sequence[str],
    n_components: int,
    top_k: Schedule | None = None,
    *,
    output: Callable[[Any], Tensor] | None = None,
    divergence: str | Divergence = "mse",
    hidden_modules: Sequence[str] = (),
    attribution: Attribution | None = None,
    selection: Selection | None = None,
    judge: Judge | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    extend: bool = False,
    mesh: DeviceMesh | None = None,
    micro_batch: int | None = None,
    recompute: bool = False,
    callback: Callback | None = None,
    log: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Decomposition:
    """Decompose a network's weights into components that sum to them, few and simple on every input.

    Args:
        target: any network with weights of known kinds; it is left exactly as it is.
        batches: batches(step, generator) gives the inputs [B, ...] of a step, 0 <= step < steps; all randomness from
            the generator. For merging, and with a generator of their own for the held-out inputs, batches of the steps
            done so far are asked for again, from step 0 on: a list `lambda step, generator: items[step]` gives the
            same inputs again, and a source that draws gives new ones.
        weights: parameter paths such as "encode.weight".
        n_components: C; more than the mechanisms you expect.
        top_k: mean number of active components per sample, or per position with `per_position`; a number, or points
            (progress, value) of a schedule. None where a `selection` decides.
        output: picks the outputs that count, [B, ...], from what the target returns.
        divergence: "mse", "kl" (of softmax over the last axis) or (outputs, target_outputs) -> [..., B].
        hidden_modules: paths of modules whose outputs the sparse forward pass must match too, weighted by the
            setting `hidden`.
        attribution: (network, components, x) -> [..., B, C]; None takes exact gradient attributions.
        selection: who is active, in place of the top k (`apd_minimal.selection`). The result has a copy of it, so that
            a second run with the same object, which starts it anew, does not change the first one's result.
        judge: (network, components, inputs) -> a number, by which restarts are compared: the smallest is chosen.
            None for the sparse reconstruction error; `apd.rate.Judge` counts bits (chapter 25).
        checkpoint: a file from which an interrupted run of the same settings resumes, bit for bit. It knows
            functions by their names alone, and the batches not at all (`checkpoint.identity`); a generator that
            an attribution draws from is not in it.
        checkpoint_every: steps between checkpoints.
        extend: the checkpoint may be of a run of fewer steps, which goes on, even if it was finished. Progress counts
            anew: after 1,000 of 2,000 steps schedules and learning rate are where they are half-way.
        mesh: the processes that share the run (`scale.processes.mesh`, chapter 22). Each calls this with the same
            arguments and gets the same result, up to rounding that of one process. The checkpoint and the log are
            written by the first and must be on a disk that all see; another mesh, or one process, can go on from the
            checkpoint. micro_batch is for each process, and a callback gets the components that the process has.
            What is left after Ctrl-C, or an exception without a result, is the checkpoint.
        micro_batch: samples worked on at a time, which bounds the memory of a step; the mask is still chosen over
            the whole batch, so that the result is the same, up to rounding (and the draws of an attribution that
            draws). None for all at once.
        recompute: work out what the components do in every layer once more on the way back, instead of keeping it
            (gradient checkpointing): the same result with less memory and more time.
        callback: called as callback(step, losses, components) at every logged step; losses maps names to lists over
            restarts. The page "Your data and your logs" has it for TensorBoard and W&B.
        log: a file that gets one line of JSON for every logged step: "step", and each loss as a list over restarts.
            One that is there is replaced, or, by a run that goes on from a checkpoint, kept up to where that stands;
            another file is not.
        progress: show a progress bar with the losses.
        **settings: any field of `Config`.

    Under torch.autocast the networks and attributions run in the lower precision; the sum of the components, the
    losses, merging and the choice among restarts stay in the precision of the weights.

    Returns:
        Decomposition: the restart with the smallest held-out sparse reconstruction error, or by `judge`. After
        Ctrl-C, the state so far, marked unfinished.

    Raises:
        KeyError, TypeError, ValueError: input that does not fit; the message names what was given and expected.
        NonFiniteLoss: a loss became NaN or infinite.
        StoreError: the checkpoint is damaged, or belongs to another run; the message says what differs.
        RankLost: another process of the mesh died, or did not answer in time.
        Exception: whatever a function given here raises. After the first step, it carries the state so far as its
            attribute `result`; if the restarts cannot be scored then, there is a warning, and the scores are NaN.
    """
    if (top_k is None) == (selection is None):
        raise ValueError(f"give top_k or a selection, got top_k={top_k!r} and selection={selection!r}")
    checks.kind("selection", selection, (Selection, type(None)), "an apd_minimal.selection.Selection or None")
    checks.methods(selection, Selection)
    if attribution is None and (needed := getattr(selection, "needs_attribution", "")):
        raise ValueError(f"{type(selection).__name__} needs attribution={needed}, got None")
    copy.deepcopy(selection)  # the result will have a copy: what cannot be copied fails now, not at the end
    if type(selection) is TopK:  # the same as its settings, so that whatever reads these knows k
        top_k, settings, selection = selection.top_k, settings | {"per_sample": selection.per_sample}, None
    k = n_components if top_k is None else top_k
    config = Config.from_dict({"n_components": n_components, "top_k": k, **settings})
    functions = {"batches": batches, "output": output, "attribution": attribution, "callback": callback, "judge": judge}
    check(config, divergence, hidden_modules, functions)
    micro_batch = None if micro_batch is None else checks.number("micro_batch", micro_batch, 1, whole=True)
    checks.kind("checkpoint", checkpoint, (str, os.PathLike, type(None)), "a path or None")
    checks.number("checkpoint_every", checkpoint_every, 1, whole=True)
    if judge is not None and mesh is not None:
        raise ValueError("a judge needs all components on one process: give judge or mesh, got both")
    checks.kind("log", log, (str, os.PathLike, type(None)), "a path or None")
    progress = checks.flag("progress", progress)
    if checks.flag("extend", extend) and checkpoint is None:
        raise ValueError(f"extend={extend} goes on from a checkpoint, and checkpoint is None")
    if mesh is not None:
        from .scale.processes import Shared
    network = Network(target, weights, output, hidden_modules, recompute)
    local = None if mesh is None else Shared(mesh, checkpoint)
    with nullcontext() if local is None else local.answering():  # else a rank that is gone is named
        run = begin(network, batches, config, divergence, attribution, micro_batch, selection, local)
        run.judge = judge
        if checkpoint is not None:
            from .checkpoint import begin as resume

            resume(run, checkpoint, extend)
        run.local.agree_on("checkpoints", [checkpoint is not None, checkpoint_every, extend, run.step])
        result = finish(run, checkpoint, checkpoint_every, callback, progress, log)
    if result.finished and (says := advice(network, result.components, config)):
        warnings.warn(says, UserWarning, stacklevel=4)  # two decorators
    return result


def finish(run: Run, checkpoint: Any, checkpoint_every: int, callback: Any, progress: bool, log: Any) -> Decomposition:
    """Take the steps that are left and choose among the restarts; an exception carries the result so far.

    Raises:
        NonFiniteLoss: a loss, or the attributions, are NaN or infinite.
    """
    try:
        follow(run, checkpoint, checkpoint_every, callback, progress, log)
        return outcome(run)
    except KeyboardInterrupt:
        if not run.local.single:  # the others may be anywhere, and no result is to be had without them
            raise
        return run.so_far()
    except checks.NonFiniteLoss:
        raise
    except checks.NotFinite as error:
        message = f"step {run.step}: {error}; the last finite state is in .result"
        raise checks.NonFiniteLoss(message, run.so_far(run.last_finite)) from error
    except Exception as error:
        if run.step and run.local.single:  # before the first step there is nothing to lose
            error.result = run.so_far()  # type: ignore[attr-defined]
            if hasattr(error, "add_note"):  # from Python 3.11
                error.add_note(f"decompose: the result after {run.step} steps is in this exception's .result")
        raise


def check(config: Config, divergence: Any, hidden_modules: Sequence[str], functions: dict[str, Any]) -> None:
    """Check that settings and functions fit each other, and that functions take what they will be called with.

    Raises:
        TypeError: what should be a function is none, or takes other arguments.
        ValueError: settings that do not fit each other, or an unknown divergence.
    """
    if functions["attribution"] is not None and (config.attribute_at != "target" or config.per_position):
        raise ValueError(
            "attribute_at and per_position are options of gradient attributions, and attribution takes their place: "
            f"got attribute_at={config.attribute_at!r}, per_position={config.per_position}"
        )
    named = isinstance(divergence, str) and divergence in DIVERGENCES
    if not named and not (callable(divergence) and checks.function("divergence", divergence)):
        raise ValueError(f"divergence must be one of {list(DIVERGENCES)} or a function, got {checks.given(divergence)}")
    if bool(hidden_modules) != bool(config.hidden):
        raise ValueError(
            f"hidden_modules and the weight hidden belong together, got {list(hidden_modules)} and {config.hidden}"
        )
    if not callable(batches := functions["batches"]):
        from .hints import NO_SOURCE

        raise TypeError(NO_SOURCE.format(checks.given(batches)))
    for name, value in functions.items():
        checks.function(name, value)


def begin(
    network: Network,
    batches: Batches,
    config: Config,
    divergence: str | Divergence = "mse",
    attribution: Attribution | None = None,
    micro_batch: int | None = None,
    selection: Selection | None = None,
    local: Local | None = None,
) -> Run:
    """Prepare a run, and check the network on inputs of the first step.

    Raises:
        TypeError: weights made in inference mode, or of a type in which training would stall.
        ValueError: a network that is not reproduced, or a divergence without a slope.
    """
    function = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
    dtype = next(iter(network.weights.values())).dtype
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        from .hints import TOO_SMALL

        raise TypeError(TOO_SMALL.format(dtype))
    if any(p.is_inference() for p in network.target.parameters()):
        raise TypeError("the target was made in torch.inference_mode, where nothing can be trained: make it outside")
    run = Run(network, batches, config, function, attribution, micro_batch, selection, local)
    x = run.local.samples(run.next_batch(0, torch.Generator().manual_seed(config.seed)))
    network.check(x)
    if not isinstance(divergence, str):
        from .slope import check_divergence

        check_divergence(run, x[:micro_batch])
    return run
