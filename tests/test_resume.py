"""Nothing is lost: kill -9 and go on, Ctrl-C, and checkpoints that do not fit."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from oracles import assert_same_state, state
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal import store
from apd_minimal.algorithm import begin
from apd_minimal.checkpoint import read_state, save
from apd_minimal.store import StoreError


def start(how: str, checkpoint: Path, at: int) -> subprocess.Popen[str]:
    command = [sys.executable, runs.__file__, how, str(checkpoint), str(at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_a_random_step_and_while_writing_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    step = random.SystemRandom().randrange(8, 36)
    for how, at in (("kill", step), ("kill while writing", 1)):
        process = start(how, checkpoint, at)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert checkpoint.exists()
    done = runs.decompose(checkpoint=checkpoint, checkpoint_every=7)
    assert runs.fingerprint(done) == runs.fingerprint(runs.decompose()), f"killed at {step}"
    assert done.history["step"] == list(range(runs.STEPS))
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name], "no part of a file is left"


@pytest.mark.parametrize(
    "changes",
    [
        {"unit_norm": True, "attribute_at": "components"},
        {"per_sample": True, "top_k": 1, "scrub": 0.0, "simplicity": ((0.0, 1.0), (0.5, 0.0))},
        {"top_k": ((0.0, 3.0), (1.0, 1.0)), "rank": 1, "restarts": 1, "tidy_every": 0.0},
    ],
)
def test_stopped_by_an_exception_at_a_random_step(tmp_path: Path, changes: dict[str, object]) -> None:
    step = random.SystemRandom().randrange(7, runs.STEPS)
    breaks = from_step(step, fails(RuntimeError))
    checkpoint = tmp_path / "run.safetensors"
    with pytest.warns(RuntimeWarning, match="could not be compared"), pytest.raises(RuntimeError, match="broken"):
        runs.decompose(breaks, checkpoint=checkpoint, checkpoint_every=3, **changes)
    resumed = runs.decompose(checkpoint=checkpoint, checkpoint_every=3, **changes)
    assert runs.fingerprint(resumed) == runs.fingerprint(runs.decompose(**changes)), f"stopped at {step}"


def interrupted_at(at: int) -> runs.Batches:
    """A source that is interrupted once, when it is asked for a step."""
    stopped: list[int] = []

    def source(step: int, generator: torch.Generator) -> Tensor:
        if step == at and not stopped:
            stopped.append(step)
            raise KeyboardInterrupt
        return runs.batches(step, generator)

    return source


def test_a_real_ctrl_c_gives_the_result_so_far(tmp_path: Path) -> None:
    process = start("interrupt", tmp_path / "run.safetensors", 30)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    finished, hooks, logged, _ = json.loads(out.splitlines()[-1])
    assert finished is False
    assert hooks == 0
    assert logged >= 1


@pytest.mark.parametrize(("how", "steps"), [("interrupt between a hook and its removal", 31), ("interrupt twice", 30)])
def test_ctrl_c_waits_for_the_end_of_the_step_and_a_second_one_does_not(how: str, steps: int, tmp_path: Path) -> None:
    process = start(how, tmp_path / "run.safetensors", 30)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors

    stopped = runs.decompose(interrupted_at(steps))
    assert json.loads(out.splitlines()[-1]) == [False, 0, steps, runs.fingerprint(stopped)]


def test_ctrl_c_at_a_known_step() -> None:
    seen: dict[int, apd.Components] = {}
    runs.decompose(callback=lambda step, losses, components: seen.update({step: components.map(Tensor.clone)}))
    result = runs.decompose(interrupted_at(12))
    assert result.finished is False
    assert result.history["step"] == list(range(12))
    assert result.restarts is not None
    for a, b in zip(result.restarts.parameters(), seen[11].parameters(), strict=True):
        assert torch.equal(a, b)


# An exception does not cost the result so far.


def from_step(first: int, bad: Callable[[Tensor], Tensor], only_once: bool = False) -> runs.Batches:
    """A source that gives something else from the first call for a step on: for good, or only once."""
    seen: list[int] = []

    def source(step: int, generator: torch.Generator) -> Tensor:
        x = runs.batches(step, generator)
        if (only_once and seen) or (step < first and not seen):
            return x
        seen.append(step)
        return bad(x)

    return source


def fails(kind: type[BaseException]) -> Callable[[Tensor], Tensor]:
    def bad(x: Tensor) -> Tensor:
        raise kind("broken")

    return bad


@pytest.fixture(scope="module")
def states() -> dict[int, apd.Components]:
    """The components after every step of the whole run."""
    seen: dict[int, apd.Components] = {}
    runs.decompose(callback=lambda step, losses, components: seen.update({step + 1: components.map(Tensor.clone)}))
    return seen


def assert_components(result: apd.Decomposition, expected: apd.Components) -> None:
    assert result.restarts is not None
    for a, b in zip(result.restarts.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(result.components.parameters(), expected.restart(result.chosen).parameters(), strict=True):
        assert torch.equal(a, b)


BROKEN = {
    "raises": (fails(RuntimeError), RuntimeError, "^broken"),
    "ends": (fails(StopIteration), StopIteration, "^broken"),
    "NaN": (lambda x: x * torch.nan, ValueError, "gave NaN or infinite inputs"),
    "infinite": (lambda x: x + torch.inf, ValueError, "gave NaN or infinite inputs"),
    "empty": (lambda x: x[:0], ValueError, r"with B at least 1, got one of shape \[0, 5\]"),
    "no tensor": (lambda x: None, ValueError, "with B at least 1, got a NoneType"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_batches_that_break_cost_nothing(states: dict[int, apd.Components], how: str) -> None:
    bad, error, message = BROKEN[how]
    target = runs.tms()
    before = state(target)
    # For good: then the held-out inputs fail as well.
    with (
        pytest.warns(RuntimeWarning, match="the restarts could not be compared"),
        pytest.raises(error, match=message) as caught,
    ):
        runs.decompose(from_step(12, bad), target)
    result = caught.value.result  # type: ignore[attr-defined]
    assert_components(result, states[12])
    assert all(map(math.isnan, result.scores))
    assert len(result.scores) == 2
    assert (result.chosen, result.finished, result.history["step"]) == (0, False, list(range(12)))
    assert_same_state(before, state(target))
    # Once: the result is the one that Ctrl-C gives.
    with pytest.raises(error, match=message) as caught:
        runs.decompose(from_step(12, bad, only_once=True))
    stopped = runs.decompose(from_step(12, fails(KeyboardInterrupt), only_once=True))
    assert runs.fingerprint(caught.value.result) == runs.fingerprint(stopped)  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", ["callback", "attribution", "divergence", "checkpoint"])
def test_whatever_breaks_costs_nothing(
    states: dict[int, apd.Components], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    done = 6

    def breaks(function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == done + {"attribution": 1, "divergence": 2}.get(what, 0):  # the last is asked once before
                raise OSError("no space left")
            return function(*args)

        return broken

    changes: dict[str, Any] = {
        "callback": {"callback": breaks(lambda *args: None)},
        "attribution": {"attribution": breaks(attribution)},
        "divergence": {"divergence": breaks(apd.losses.mse), "scrub": 0.0},
        "checkpoint": {"checkpoint": tmp_path / "run", "checkpoint_every": 1},
    }[what]
    if what == "checkpoint":
        monkeypatch.setattr(store, "write", breaks(store.write))
    if what == "divergence":
        states = {}  # of a run without the scrub loss, so that a step calls the divergence once
        runs.decompose(scrub=0.0, callback=lambda step, losses, c: states.update({step + 1: c.map(Tensor.clone)}))
    with pytest.raises(OSError, match="no space left") as caught:
        runs.decompose(**changes)
    result = caught.value.result  # type: ignore[attr-defined]
    assert_components(result, states[done])
    assert all(map(math.isfinite, result.scores))
    assert result.finished is False
    result.save(tmp_path / "saved")
    assert torch.equal(
        apd.Decomposition.load(tmp_path / "saved", runs.tms()).components.flat(), result.components.flat()
    )


def test_the_exception_says_where_the_result_is() -> None:
    with pytest.raises(RuntimeError, match="broken") as caught:
        runs.decompose(from_step(12, fails(RuntimeError), only_once=True))
    if sys.version_info >= (3, 11):
        notes = caught.value.__notes__
        assert notes == ["decompose: the result after 12 steps is in this exception's .result"]


def test_before_the_first_step_nothing_can_be_lost() -> None:
    with pytest.raises(RuntimeError, match="broken") as caught:
        runs.decompose(attribution=fails_at_once)
    assert not hasattr(caught.value, "result")
    assert not hasattr(caught.value, "__notes__")


def fails_at_once(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
    raise RuntimeError("broken")


def test_held_out_inputs_that_fail_after_the_last_step_cost_nothing(states: dict[int, apd.Components]) -> None:
    def source(step: int, generator: torch.Generator) -> Tensor:
        if generator.initial_seed() != 0:  # the run's own; held-out inputs have another
            raise RuntimeError("broken")
        return runs.batches(step, generator)

    with (
        pytest.warns(RuntimeWarning, match=r"the restarts could not be compared.*RuntimeError\('broken'\)"),
        pytest.raises(RuntimeError, match="broken") as caught,
    ):
        runs.decompose(source)
    result = caught.value.result  # type: ignore[attr-defined]
    assert result.finished, "all its steps were made"
    assert_components(result, states[runs.STEPS])
    assert all(map(math.isnan, result.scores))


def test_ctrl_c_again_while_the_restarts_are_compared(states: dict[int, apd.Components], tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="KeyboardInterrupt"):
        result = runs.decompose(from_step(12, fails(KeyboardInterrupt)))
    assert_components(result, states[12])
    assert all(map(math.isnan, result.scores))
    result.save(tmp_path)
    assert all(map(math.isnan, apd.Decomposition.load(tmp_path, runs.tms()).scores))


def test_an_exception_after_a_step_that_exploded_gives_finite_components() -> None:
    def watch(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:
        assert not torch.isfinite(components.flat()).all()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken") as caught:
        runs.decompose(lr=3e38, callback=watch)
    result = caught.value.result  # type: ignore[attr-defined]
    assert torch.isfinite(result.restarts.flat()).all()
    assert all(map(math.isfinite, result.scores))


def test_a_loss_that_is_not_finite_and_batches_that_end(states: dict[int, apd.Components]) -> None:
    calls: list[int] = []

    def divergence(outputs: Tensor, wanted: Tensor) -> Tensor:
        calls.append(1)
        return apd.losses.mse(outputs, wanted) * (torch.nan if len(calls) > 13 else 1.0)

    def source(step: int, generator: torch.Generator) -> Tensor:
        return fails(RuntimeError)(torch.ones(1)) if len(calls) > 13 else runs.batches(step, generator)

    with (
        pytest.warns(RuntimeWarning, match="the restarts could not be compared"),
        pytest.raises(apd.NonFiniteLoss, match="step 6: the minimality loss") as caught,
    ):
        runs.decompose(source, divergence=divergence)
    assert_components(caught.value.result, states[5])
    assert caught.value.result.finished is False


# Checkpoints.


def test_a_finished_checkpoint_gives_its_result_at_once(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    first = runs.decompose(checkpoint=checkpoint)
    steps: list[int] = []
    again = runs.decompose(checkpoint=checkpoint, callback=lambda step, losses, components: steps.append(step))
    assert steps == []
    assert runs.fingerprint(again) == runs.fingerprint(first)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_finished_run_goes_on_for_more_steps_if_asked_to(tmp_path: Path) -> None:
    """As if its state had been put into a run of so many steps by hand."""
    checkpoint = tmp_path / "run.safetensors"
    losses = {"faithfulness": 3.0, "scrub": 0.5, "tidy_every": 0.0}
    short = runs.decompose(checkpoint=checkpoint, steps=10, **losses)
    tensors, facts = store.read_tensors(checkpoint, "checkpoint")
    settings: dict[str, Any] = {"n_components": 6, "top_k": 1.2, **runs.SETTINGS, **losses, "steps": 25}
    settings.pop("progress")
    run = begin(apd.Network(runs.tms(), ["encode.weight"]), runs.batches, apd.Config.from_dict(settings))
    run.generator.set_state(tensors["generator"])
    for i, p in enumerate(run.parameters()):
        p.data.copy_(tensors[f"factor.{i}"])
        run.optimiser.state[p] = {
            name: tensors[f"adam.{i}.{name}"].clone() for name in ("step", "exp_avg", "exp_avg_sq")
        }
    run.step, run.history = 10, facts["history"]
    while run.step < 25:
        run.advance()
    longer = runs.decompose(checkpoint=checkpoint, steps=25, extend=True, **losses)
    assert longer.restarts is not None and longer.finished
    for mine, theirs in zip(longer.restarts.parameters(), run.components.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert longer.history["step"] == list(range(25))
    for name, rows in short.history.items():
        assert longer.history[name][:10] == rows
    assert store.read_tensors(checkpoint, "checkpoint")[1]["step"] == 25


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    result = runs.decompose(checkpoint=checkpoint, steps=3)
    good = checkpoint.read_bytes()
    for changes, message in (
        ({"steps": 4}, "steps was 3, given 4; extend=True goes on with it for more steps$"),
        ({"steps": 2}, "steps was 3, given 2$"),
        ({"steps": 2, "extend": True}, "steps was 3, given 2$"),
        ({"steps": 4, "lr": 0.04, "extend": True}, "steps was 3, given 4; lr was 0.05, given 0.04$"),
        ({"lr": 0.01, "seed": 1}, "lr was 0.05, given 0.01; seed was 0, given 1$"),
        ({"n_components": 7}, "n_components was 6, given 7$"),
    ):
        with pytest.raises(StoreError, match="belongs to a run with other settings: " + message):
            runs.decompose(checkpoint=checkpoint, **{"steps": 3, **changes})
    other = runs.tms()
    with torch.no_grad():
        other.encode.weight[0, 0] += 1e-3
    with pytest.raises(StoreError, match="belongs to a run on another target"):
        runs.decompose(target=other, checkpoint=checkpoint, steps=3)
    assert checkpoint.read_bytes() == good, "a refused checkpoint is left alone"
    for length in (0, 5, 200, len(good) // 2, len(good) - 1):
        checkpoint.write_bytes(good[:length])
        with pytest.raises(StoreError, match="truncated or not a safetensors file"):
            runs.decompose(checkpoint=checkpoint, steps=3)
    result.save(tmp_path)
    with pytest.raises(StoreError, match="holds a 'decomposition', expected a 'checkpoint'"):
        runs.decompose(checkpoint=tmp_path / "components.safetensors", steps=3)


def test_a_checkpoint_of_no_step_is_refused_and_one_of_the_first_is_not(tmp_path: Path) -> None:
    """Before the first step Adam has no moments, and a checkpoint without them holds less than a run begins with."""
    path = tmp_path / "run.safetensors"
    config = apd.Config.from_dict({"n_components": 6, "top_k": 1.2, "steps": 3})
    run = begin(apd.Network(runs.tms(), ["encode.weight"]), runs.batches, config)
    save(run, path)
    with pytest.raises(StoreError, match=r"step must be at least 1 .*, got 0"):
        read_state(path, run.identity)
    run.advance()
    save(run, path)
    assert read_state(path, run.identity).step == 1


def first_output(y: Tensor) -> Tensor:
    return y[:, :1]


class Picks:
    def __call__(self, y: Tensor) -> Tensor:
        return y


def attribution(network: apd.Network, components: apd.Components, x: Tensor, at: str = "target") -> Tensor:
    return apd.attributions.gradient(network, components, x, at=at)


NAMED = {
    "divergence": (partial(apd.losses.kl), r"divergence was 'apd_minimal.losses.mse', given 'apd_minimal.losses.kl'$"),
    "hidden_modules": (["decode"], r"hidden modules was \['encode'\], given \['decode'\]$"),
    "output": (first_output, r"output was None, given 'test_resume.first_output'$"),
    "attribution": (partial(attribution, at="target"), r"attribution was None, given 'test_resume.attribution'$"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_checkpoint_belongs_to_its_functions_and_hidden_modules(tmp_path: Path, name: str) -> None:
    value, message = NAMED[name]
    plain: dict[str, Any] = {"steps": 3}
    if name == "hidden_modules":  # which come with a weight, or not at all
        plain |= {"hidden_modules": ["encode"], "hidden": 1.0}
    runs.decompose(checkpoint=tmp_path / "plain", **plain)
    with pytest.raises(StoreError, match="plain belongs to a run with other settings: " + message):
        runs.decompose(checkpoint=tmp_path / "plain", **{**plain, name: value})
    made: dict[str, Any] = {"checkpoint": tmp_path / "made", **plain, name: value}
    first = runs.decompose(**made)
    assert runs.fingerprint(runs.decompose(**made)) == runs.fingerprint(first)
    with pytest.raises(StoreError, match=rf"made belongs to a run with other settings: {name.replace('_', ' ')}"):
        runs.decompose(checkpoint=tmp_path / "made", **plain)


def test_a_function_counts_by_its_name(tmp_path: Path) -> None:
    """Where a name is all that there is: a lambda, an object that can be called, a function of torch's own."""
    runs.decompose(checkpoint=tmp_path / "run", steps=3)
    for output, name in (
        (lambda y: y, "test_resume.test_a_function_counts_by_its_name.<locals>.<lambda>"),
        (Picks(), "test_resume.Picks"),
        (Tensor.sigmoid, r"\S*sigmoid"),
    ):
        with pytest.raises(StoreError, match=rf"output was None, given '{name}'$"):
            runs.decompose(checkpoint=tmp_path / "run", steps=3, output=output)
    runs.decompose(checkpoint=tmp_path / "run", steps=3, divergence=apd.losses.mse)  # "mse" is this function


def test_a_checkpoint_belongs_to_the_order_of_its_weights(tmp_path: Path) -> None:
    target = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))

    def run(*weights: str) -> apd.Decomposition:
        checkpoint = tmp_path / "run"
        return apd.decompose(target, runs.batches, weights, 3, 1, steps=2, checkpoint=checkpoint, progress=False)

    run("0.weight", "1.weight")
    with pytest.raises(StoreError, match=r"weights was \['0.weight', '1.weight'\], given \['1.weight', '0.weight'\]$"):
        run("1.weight", "0.weight")


def test_a_checkpoint_that_does_not_say_its_functions_is_taken(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run"
    first = runs.decompose(checkpoint=checkpoint, steps=3)
    tensors, facts = store.read_tensors(checkpoint, "checkpoint")
    facts = {name: facts[name] for name in ("config", "fingerprint", "step", "history")}
    store.write_tensors(checkpoint, "checkpoint", tensors, facts)
    assert runs.fingerprint(runs.decompose(checkpoint=checkpoint, steps=3)) == runs.fingerprint(first)
