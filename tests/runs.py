"""A tiny run, the same in every process; as a script it is stopped from outside or from within."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd

STEPS = 40
SETTINGS = {"steps": STEPS, "restarts": 2, "tidy_every": 0.2, "lr": 0.05, "progress": False}
Batches = Callable[[int, torch.Generator], Tensor]


def tms() -> apd.targets.TMS:
    """TMS 5-2 with weights drawn, not trained."""
    target = apd.targets.TMS()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        target.encode.weight.copy_(torch.randn(2, 5, generator=generator))
        target.bias.fill_(0.2)
    return target


def batches(step: int, generator: torch.Generator) -> Tensor:
    """Sparse features, 64 samples."""
    return apd.data.SparseFeatures(5, 0.1, batch_size=64, nonempty=True)(step, generator)


def decompose(source: Batches = batches, target: torch.nn.Module | None = None, **changes: Any) -> apd.Decomposition:
    """The tiny run with other settings."""
    settings: dict[str, Any] = {"n_components": 6, "top_k": 1.2, **SETTINGS, **changes}
    return apd.decompose(target or tms(), source, ["encode.weight"], **settings)


def killed_and_resumed(begin: Callable[..., apd.Decomposition], checkpoint: Path, again: Any) -> apd.Decomposition:
    """Stop a run with an exception at step 14, and let another with the selection `again` go on from its checkpoint."""

    class Killed(Exception):
        pass

    def kill(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:
        if step == 14:
            raise Killed

    with suppress(Killed):
        begin(checkpoint=checkpoint, checkpoint_every=5, callback=kill)
        raise AssertionError("the run was not stopped")
    return begin(selection=again, checkpoint=checkpoint, checkpoint_every=5)


def noting(selection: apd.selection.Selection) -> tuple[apd.selection.Selection, list[Tensor]]:
    """Let a selection note the losses' gradients with respect to its gates, in the list."""
    seen: list[Tensor] = []
    choose = selection.choose

    def noted(scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        gates = choose(scores, t, share)
        if gates.requires_grad:
            gates.register_hook(lambda g: seen.append(g.clone()))
        return gates

    selection.choose = noted  # type: ignore[method-assign]
    return selection, seen


def fingerprint(result: apd.Decomposition) -> str:
    """Hash of everything in a result, all restarts included."""
    assert result.restarts is not None
    digest = hashlib.sha256()
    for t in (*result.restarts.parameters(), *result.components.parameters()):
        digest.update(t.contiguous().numpy().tobytes())
    digest.update(json.dumps([result.history, result.scores, result.chosen, result.finished]).encode())
    return digest.hexdigest()


def main(how: str, checkpoint: str, at: int) -> None:
    """Run until something happens at step `at`."""
    torch.set_num_threads(int(os.environ.get("APD_THREADS", "1")))  # as in the test's own process
    if "interrupt" in how:
        # Even where the shell has set it to be ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    reached: list[int] = []

    def source(step: int, generator: torch.Generator) -> Tensor:
        if step == at and not reached:
            reached.append(step)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "interrupt":
                print("ready", flush=True)
            if how == "interrupt twice":
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.1)
            if how == "interrupt between a hook and its removal":
                torch.nn.Module.register_forward_hook = registered  # type: ignore[method-assign]
        return batches(step, generator)

    register = torch.nn.Module.register_forward_hook

    def registered(*args: Any, **kwargs: Any) -> Any:
        torch.nn.Module.register_forward_hook = register  # type: ignore[method-assign]
        handle = register(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return handle

    if how == "kill while writing":
        real, seen = os.replace, []

        def replace(*args: Any) -> None:
            seen.append(args)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        os.replace = replace  # type: ignore[assignment]
    target = tms()
    result = decompose(
        source, target, checkpoint=checkpoint, checkpoint_every=7, steps=10**6 if how == "interrupt" else STEPS
    )
    hooks = sum(len(module._forward_hooks) for module in target.modules())
    print(json.dumps([result.finished, hooks, len(result.history["step"]), fingerprint(result)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
