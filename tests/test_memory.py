"""Tidying and scoring stay within the memory of a step, whatever the batch.

They look at thousands of samples, as many at a time as a step does. What may grow with all of these samples is their
inputs and a few numbers for each component, and no activations of the network. `benchmarks/memory.py` measures the
megabytes of the paper's residual MLP; here the bytes of all tensors that are alive at once are counted, which are the
same on every machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import apd_minimal as apd
from apd_minimal import outcome
from apd_minimal.algorithm import begin
from apd_minimal.tidy import reseed, tidy
from apd_minimal.train import Run

C, N, SAMPLES = 30, 10, 2048
JOBS: dict[str, Callable[[Run], Any]] = {
    "tidying": tidy.tidy,
    "scoring": lambda run: outcome.scores(run, run.components),
}


class Alive(TorchDispatchMode):
    """Count the bytes of the tensors made inside that are alive at once; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (memory := t.untyped_storage()) not in self.known:
                self.known[memory] = True
                self.add(memory.nbytes())
                weakref.finalize(memory, self.add, -memory.nbytes())
        return out

    def add(self, n: int) -> None:
        self.now += n
        self.peak = max(self.peak, self.now)


def peak(job: Callable[[], Any]) -> int:
    with Alive() as alive:
        job()
    return alive.peak


def test_bytes_are_counted_while_tensors_are_alive() -> None:
    def job() -> None:
        a = torch.ones(100)
        b = a[:50] + 1  # a view takes nothing
        del a
        torch.cat([b, b]).view(2, 50).mul_(2)

    assert peak(job) == 4 * (100 + 50)


@pytest.mark.parametrize(("batch", "micro_batch"), [(64, None), (256, None), (256, 64)])
@pytest.mark.parametrize("job", JOBS)
def test_within_the_memory_of_a_step(
    batch: int, micro_batch: int | None, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidy, "TIDY_SAMPLES", SAMPLES)
    monkeypatch.setattr(outcome, "HELD_OUT_SAMPLES", SAMPLES)
    # What gradients for new starts may take at most, small as the network is.
    monkeypatch.setattr(reseed, "_held", partial(reseed._held, most=20_000))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = apd.targets.ResidualMLP(N, 60, (12,))

    def batches(step: int, generator: torch.Generator) -> Tensor:
        """No sample is zero: a step works on all of them, too."""
        return torch.rand(batch, N, generator=generator) * (torch.rand(batch, N, generator=generator) < 0.2) + 0.01

    config = apd.Config(C, 1.3, steps=100, hidden=1.0)
    run = begin(apd.Network(target, target.weights, None, ["neurons.0"]), batches, config, micro_batch=micro_batch)
    for _ in range(2):
        run.advance()
    step = peak(run.advance)
    with torch.no_grad():
        for factors in run.components.parameters():
            factors[:, :5] = 0  # for new starts
    # Of each sample: its inputs, scores, gates and what the outputs lack, and copies where pieces are put together.
    kept = 4 * SAMPLES * 6 * (C + N)
    assert step > 4 * kept * (micro_batch or batch) / SAMPLES, "a test that tells"
    assert peak(lambda: JOBS[job](run)) <= 1.05 * step + kept
