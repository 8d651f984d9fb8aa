"""A selection that is learned: it trains with the components, stops and goes on with them, and forgets with them."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.scale.layerwise import activity
from apd_minimal.selection import Selection
from apd_minimal.study.diagnose import diagnose


class Learned(Selection):
    """A gate for each component, soft in its score: sigmoid(sharpness (score - threshold))."""

    def start(self, n_restarts: int, n_components: int, like: Tensor) -> None:
        self.cut = like.new_full((n_restarts, n_components), 0.05).requires_grad_()
        self.forgotten = 0

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        return torch.sigmoid(20 * (scores - self.cut[:, None]))

    def parameters(self) -> list[Tensor]:
        return [self.cut]

    def forget(self, changed: Tensor) -> None:
        self.cut.data[changed] = 0.05
        self.forgotten += int(changed.sum())


SETTINGS: dict[str, Any] = {"top_k": None, "steps": 24, "simplicity": 0.5, "scrub": 0.5, "tidy_every": 0.25}


def decompose(selection: Selection, **changes: Any) -> apd.Decomposition:
    return runs.decompose(selection=selection, **SETTINGS | changes)


def factors(result: apd.Decomposition) -> list[Tensor]:
    assert result.restarts is not None
    return result.restarts.parameters()


def test_it_trains_and_forgets() -> None:
    learned = Learned()
    decompose(learned)
    assert (learned.cut - 0.05).abs().max() > 1e-3, "its parameters moved"
    assert learned.forgotten > 0, "what was merged, pruned or started anew was told to it"


class WarmsUp(Learned):
    """Hard gates at first, which have no gradient, and soft ones later."""

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        soft = super().choose(scores, t, share)
        return soft if t > 0.5 else (soft > 0.5).float()


def test_gates_may_be_hard_for_a_while(tmp_path: Path) -> None:
    for tidy_every in (0.25, 0.0):
        selection = WarmsUp()
        whole = decompose(selection, tidy_every=tidy_every)
        assert (selection.cut - 0.05).abs().max() > 1e-3, "its parameters moved"

        def begin(tidy_every: float = tidy_every, **changes: Any) -> apd.Decomposition:
            return decompose(**{"selection": WarmsUp(), "tidy_every": tidy_every, **changes})

        resumed = runs.killed_and_resumed(begin, tmp_path / f"run {tidy_every}", WarmsUp())
        assert runs.fingerprint(resumed) == runs.fingerprint(whole)


def test_its_gradient_is_that_of_the_losses() -> None:
    """One step of plain gradient descent, against the losses written out."""
    noted, seen = runs.noting(Learned())
    decompose(noted, steps=1, scrub=0.0, simplicity=0.0, tidy_every=0.0)
    target = runs.tms()
    run_config = apd.Config(n_components=6, top_k=6.0, steps=1, restarts=2)
    generator = torch.Generator().manual_seed(run_config.seed)
    components = apd.Components.random(
        apd.Network(target, ["encode.weight"]).shapes, 6, run_config.rank, run_config.restarts,
        run_config.init_std, generator,
    )  # fmt: skip
    x = runs.batches(0, generator)
    network = apd.Network(target, ["encode.weight"])
    scores = apd.attributions.gradient(network, components, x)
    gates = torch.sigmoid(20 * (scores - 0.05)).requires_grad_()
    loss = apd.losses.minimality(network(x, components, gates), network(x)).sum()
    assert isinstance(run_config.minimality, float)
    (expected,) = torch.autograd.grad(run_config.minimality * loss, gates)
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, micro_batch: int | None) -> None:
    whole_selection = Learned()
    whole = decompose(whole_selection, micro_batch=micro_batch)
    again_selection = Learned()

    def begin(selection: Selection | None = None, **files: Any) -> apd.Decomposition:
        return decompose(selection or Learned(), micro_batch=micro_batch, **files)

    again = runs.killed_and_resumed(begin, tmp_path / "run", again_selection)
    assert torch.equal(whole_selection.cut, again_selection.cut)
    for a, b in zip(factors(whole), factors(again), strict=True):
        assert torch.equal(a, b)


def test_after_a_loss_that_is_not_finite_the_selection_is_as_it_was_with_the_components() -> None:
    """Both are kept before the step is taken: what they were when the last finite loss was computed."""
    calls, seen = [], []

    class Noted(Learned):
        def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
            seen.append(self.cut.detach().clone())
            return super().choose(scores, t, share)

    def divergence(outputs: Tensor, wanted: Tensor) -> Tensor:
        calls.append(1)
        return apd.losses.mse(outputs, wanted) * (float("nan") if len(calls) == 12 else 1.0)  # once before the run

    selection = Noted()
    with pytest.raises(apd.NonFiniteLoss, match="step 10: the minimality loss"):
        decompose(selection, divergence=divergence, scrub=0.0, tidy_every=0.0)
    assert not torch.equal(seen[10], seen[9]), "a test that tells"
    assert torch.equal(selection.cut, seen[9])


def test_a_checkpoint_of_another_selection_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    decompose(Learned(), checkpoint=checkpoint)
    with pytest.raises(apd.store.StoreError, match=r"selection was .*Learned', given None"):
        runs.decompose(**SETTINGS | {"top_k": 6.0}, checkpoint=checkpoint)


def test_one_of_top_k_and_selection() -> None:
    with pytest.raises(ValueError, match=r"give top_k or a selection, got top_k=1\.2 and selection=<"):
        runs.decompose(selection=Learned())
    with pytest.raises(ValueError, match="give top_k or a selection, got top_k=None and selection=None"):
        runs.decompose(top_k=None)


def test_gates_of_another_shape_are_refused() -> None:
    class Flat(Learned):
        def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
            return super().choose(scores, t, share).flatten()

    with pytest.raises(ValueError, match=r"gates of Flat\.choose must be"):
        decompose(Flat())


def test_who_is_active_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    target = runs.tms()
    result = runs.decompose(steps=40)
    x = apd.data.SparseFeatures(5, 0.3, batch_size=500)(0, torch.Generator().manual_seed(3))
    together = result.active(target, x)
    assert together.dtype == torch.bool
    assert 0 < together.float().mean() < 1
    for i in range(0, 500, 50):
        assert torch.equal(result.active(target, x[i : i + 1])[0], together[i])
    result.save(tmp_path)
    assert torch.equal(apd.Decomposition.load(tmp_path, target).active(target, x), together)
    # On samples such as those of the run, k components are active on average.
    x = torch.cat([runs.batches(i, torch.Generator().manual_seed(i)) for i in range(200)])
    assert result.active(target, x).sum(1).float().mean() == pytest.approx(1.2, rel=0.15)


def test_who_is_active_needs_the_attribution_of_the_run(tmp_path: Path) -> None:
    target, own = runs.tms(), apd.attributions.activation
    result = runs.decompose(attribution=own)
    x = runs.batches(0, torch.Generator().manual_seed(3))
    result.save(tmp_path)
    for one in (result, apd.Decomposition.load(tmp_path, target)):
        with pytest.raises(ValueError, match=r"attribution must be that of the run, .*activation, got None"):
            one.active(target, x)
        assert one.threshold is not None
        assert torch.equal(one.active(target, x, attribution=own), own(target, one.components, x) > one.threshold)


@pytest.mark.parametrize("per_sample", [False, True])
def test_top_k_as_an_object_is_top_k_as_a_setting(per_sample: bool) -> None:
    k = 1.0 if per_sample else 1.2
    given = runs.decompose(top_k=None, selection=apd.selection.TopK(k, per_sample))
    plain = runs.decompose(top_k=k, per_sample=per_sample)
    assert given.config == plain.config
    assert runs.fingerprint(given) == runs.fingerprint(plain)


def test_a_log_goes_on_where_the_checkpoint_stands(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:
        if step == 25:
            raise Stopped

    files: dict[str, Any] = {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 10}
    for log in (tmp_path / "stopped.jsonl", tmp_path / "whole.jsonl"):
        log.write_text('{"step": 0}\n{"step')  # of an earlier run, which was killed
    with pytest.raises(Stopped):
        runs.decompose(**files, log=tmp_path / "stopped.jsonl", callback=stop)
    with open(tmp_path / "stopped.jsonl", "a") as log_file:
        log_file.write('{"step": 2')  # as a kill may leave it
    runs.decompose(**files, log=tmp_path / "stopped.jsonl")
    runs.decompose(log=tmp_path / "whole.jsonl")
    assert (tmp_path / "stopped.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_run_that_fails_before_its_first_line_leaves_the_log_of_another(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    runs.decompose(steps=2, log=log)
    before = log.read_text()

    def broken(step: int, generator: torch.Generator) -> Tensor:
        if step == 0:
            raise RuntimeError("no data")
        return runs.batches(step, generator)

    with pytest.raises(RuntimeError, match="no data"):
        runs.decompose(broken, steps=4, log=log)
    assert log.read_text() == before
    runs.decompose(steps=1, log=log)
    assert 0 < len(log.read_text()) < len(before)


def test_a_log_that_cannot_be_written_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(path: Path, mode: str = "r", *more: Any, **and_more: Any) -> Any:
        raise PermissionError(f"{path} is read-only")

    steps: list[int] = []
    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(PermissionError, match="log is read-only"):
        runs.decompose(log=tmp_path / "log", callback=lambda step, losses, components: steps.append(step))
    assert not steps


def test_a_log_is_not_mixed_with_another_file(tmp_path: Path) -> None:
    runs.decompose(steps=2, checkpoint=tmp_path / "run", log=tmp_path / "a folder to make" / "log")
    for text in ("my notes\n", "[1]\n", '{"loss": 1}\n'):
        (tmp_path / "mine").write_text(text)
        with pytest.raises(ValueError, match=r"log must be .*, got .*mine: give it another path"):
            runs.decompose(steps=4, checkpoint=tmp_path / "run", extend=True, log=tmp_path / "mine")
        if not text.startswith("{"):
            with pytest.raises(ValueError, match=r"log must be .*, got .*mine: give it another path"):
                runs.decompose(steps=4, log=tmp_path / "mine")
        assert (tmp_path / "mine").read_text() == text


def test_the_progress_bar_does_not_flood_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    runs.decompose(steps=60, progress=True, tidy_every=0.0)
    shown = written.getvalue()
    assert "60/60" in shown and "faithfulness=" in shown  # the end is there, with its losses
    assert shown.count("\r") < 5


def test_options_of_gradients_are_refused_with_another_attribution() -> None:
    for option in ({"attribute_at": "components"}, {"per_position": True}):
        with pytest.raises(ValueError, match="options of gradient attributions"):
            runs.decompose(attribution=apd.attributions.ablation, **option)


def test_a_line_of_json_for_every_logged_step(tmp_path: Path) -> None:
    log, seen = tmp_path / "run.jsonl", []
    result = runs.decompose(log=log, callback=lambda step, losses, components: seen.append((step, losses)))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line.pop("step") for line in lines] == result.history["step"] == [step for step, _ in seen]
    assert lines == [losses for _, losses in seen]
    assert lines[-1]["minimality"] == result.history["minimality"][-1]


class Judged(Learned):
    """It says who is active by what it has learned, restart by restart."""

    def active(self, scores: Tensor, threshold: Tensor | None) -> Tensor:
        return scores > self.cut[:, None]


class WithThreshold(Learned):
    """It has one threshold for each restart, found on held-out samples."""

    def threshold(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).quantile(0.8, dim=1)


def of_restart(result: apd.Decomposition, index: int) -> apd.Decomposition:
    assert result.restarts is not None
    return dataclasses.replace(result, chosen=index, components=result.restarts.restart(index))


def images(n: int = 500) -> Tensor:
    return apd.data.SparseFeatures(5, 0.3, batch_size=n)(0, torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def judged() -> tuple[Judged, apd.Decomposition]:
    selection = Judged()
    return selection, decompose(selection)


@pytest.mark.parametrize("restart", [0, 1])
def test_a_learned_selection_says_who_is_active_of_an_image_alone(
    judged: tuple[Judged, apd.Decomposition], restart: int, tmp_path: Path
) -> None:
    target, x, (selection, result) = runs.tms(), images(), judged
    result = of_restart(result, restart)
    together = result.active(target, x)
    scores = apd.attributions.gradient(target, result.components, x)
    assert torch.equal(together, scores > selection.cut[restart])
    assert not torch.equal(together, scores > selection.cut[1 - restart]), "a test that tells"
    for i in range(0, 500, 25):
        assert torch.equal(result.active(target, x[i : i + 1])[0], together[i])
    result.save(tmp_path)
    loaded = apd.Decomposition.load(tmp_path, target)
    with pytest.raises(ValueError, match=r"not stored: put it back with dataclasses\.replace"):
        loaded.active(target, x)
    assert torch.equal(dataclasses.replace(loaded, selection=selection).active(target, x), together)


def test_a_learned_selection_with_a_threshold(tmp_path: Path) -> None:
    target, x, result = runs.tms(), images(), decompose(WithThreshold())
    assert result.threshold is not None
    together = result.active(target, x)
    assert torch.equal(together, apd.attributions.gradient(target, result.components, x) > result.threshold)
    assert 0 < together.float().mean() < 1
    for i in range(0, 500, 50):
        assert torch.equal(result.active(target, x[i : i + 1])[0], together[i])
    result.save(tmp_path)
    loaded = apd.Decomposition.load(tmp_path, target)
    assert torch.equal(loaded.active(target, x), together)
    with pytest.raises(ValueError, match=r"the run's selection was .*\.WithThreshold, which is not stored"):
        activity(target, {"all": loaded}, x)  # not that every component is active


def test_a_threshold_that_the_selection_overrules_does_not_speak_for_it_after_load(tmp_path: Path) -> None:
    class Both(WithThreshold):
        """It has a threshold, and asks for more than that."""

        def active(self, scores: Tensor, threshold: Tensor | None) -> Tensor:
            return super().active(scores, threshold) & (scores == scores.amax(-1, keepdim=True))

    target, x, selection = runs.tms(), images(), Both()
    result = decompose(selection)
    together = result.active(target, x)
    assert result.threshold is not None
    assert not torch.equal(together, result.attributions(target, x) > result.threshold), "a test that tells"
    result.save(tmp_path / "first")
    apd.Decomposition.load(tmp_path / "first", target).save(tmp_path / "again")
    for folder in ("first", "again"):
        loaded = apd.Decomposition.load(tmp_path / folder, target)
        with pytest.raises(ValueError, match=r"\.Both, which is not stored: put it back with dataclasses\.replace"):
            loaded.active(target, x)
        assert torch.equal(dataclasses.replace(loaded, selection=selection).active(target, x), together)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_run_stored_before_selections_were_named_goes_by_its_threshold(per_sample: bool, tmp_path: Path) -> None:
    target, x = runs.tms(), images()
    result = runs.decompose(steps=2, top_k=1.0, per_sample=per_sample)
    result.save(tmp_path)
    file = tmp_path / "components.safetensors"
    tensors, facts = apd.store.read_tensors(file, "decomposition")
    del facts["selection"], facts["active"]
    facts["threshold"] = facts["threshold"] or 0.0  # there was one of a k per sample, too
    apd.store.write_tensors(file, "decomposition", tensors, facts)
    assert torch.equal(apd.Decomposition.load(tmp_path, target).active(target, x), result.active(target, x))


def test_a_loaded_run_says_which_selection_it_had(tmp_path: Path) -> None:
    """Where top_k is all components, the settings alone cannot tell; files of earlier versions have only these."""
    target, x = runs.tms(), images()
    own, every = decompose(WithThreshold(), steps=2), runs.decompose(**SETTINGS | {"top_k": 6, "steps": 2})
    assert own.config.top_k == every.config.top_k == 6
    own.save(tmp_path / "own")
    every.save(tmp_path / "every")
    loaded = apd.Decomposition.load(tmp_path / "every", target)
    assert loaded.selection_name == "apd_minimal.selection.TopK"
    scores = every.attributions(target, x)
    assert torch.equal(loaded.final_selection.gates(scores), every.final_selection.gates(scores))
    for name in ("own", "every"):
        file = tmp_path / name / "components.safetensors"
        tensors, facts = apd.store.read_tensors(file, "decomposition")
        del facts["selection"], facts["active"]
        apd.store.write_tensors(file, "decomposition", tensors, facts)
        old = apd.Decomposition.load(tmp_path / name, target)
        assert old.selection_name is None
        with pytest.raises(ValueError, match="top_k is 6, all components, as in runs with a selection of their own"):
            old.final_selection  # noqa: B018
        apd.store.write_tensors(file, "decomposition", tensors, facts | {"selection": 3})
        with pytest.raises(apd.store.StoreError, match="selection must be a name or None, got 3"):
            apd.Decomposition.load(tmp_path / name, target)
        apd.store.write_tensors(file, "decomposition", tensors, facts | {"active": 3})
        with pytest.raises(apd.store.StoreError, match="active must be a name or None, got 3"):
            apd.Decomposition.load(tmp_path / name, target)


def test_a_selection_that_does_not_say_who_is_active() -> None:
    target, x, result = runs.tms(), images(), decompose(Learned(), steps=2)
    with pytest.raises(ValueError, match=r"no threshold .* write Learned\.active\(scores, threshold\)"):
        result.active(target, x)
    with pytest.raises(ValueError, match=r"write Learned\.active"):
        diagnose(target, result.components, x, result.final_selection)
    apd.metrics.scrubbing(target, result.components, x, result.final_selection)  # needs the gates alone

    class Soft(Learned):
        def active(self, scores: Tensor, threshold: Tensor | None) -> Tensor:
            return self.choose(scores, 1.0)

    class Flat(Learned):
        def active(self, scores: Tensor, threshold: Tensor | None) -> Tensor:
            return scores[0] > 0.1

    with pytest.raises(
        TypeError, match=r"Soft\.active must give a boolean mask, got a tensor \[500, 6\] of torch.float"
    ):
        decompose(Soft(), steps=2).active(target, x)
    with pytest.raises(ValueError, match=r"Flat\.active must give a tensor \[2, 500, 6\], got a tensor \[500, 6\]"):
        decompose(Flat(), steps=2).active(target, x)


@pytest.mark.parametrize("restart", [0, 1])
def test_scrubbing_diagnosis_and_groups_go_by_the_run_s_own_selection(
    judged: tuple[Judged, apd.Decomposition], restart: int
) -> None:
    target, x, (selection, result) = runs.tms(), images(), judged
    result = of_restart(result, restart)
    components, network = result.components, apd.Network(target, result.components.paths)
    scores = apd.attributions.gradient(network, components, x)
    gates = torch.sigmoid(20 * (scores - selection.cut[restart])).detach()
    on = (scores > selection.cut[restart]) & (components.norms() > 0)

    def error(gates: Tensor) -> Tensor:
        return apd.losses.mse(network(x, components, gates), network(x)).detach()

    scrubbed = apd.metrics.scrubbing(target, components, x, result.final_selection, seed=4)
    torch.testing.assert_close(scrubbed.top_k, error(gates))
    coin, half = (torch.rand(gates.shape, generator=g) < 0.5 for g in [torch.Generator().manual_seed(4)] * 2)
    torch.testing.assert_close(scrubbed.scrubbed, error(torch.where(coin, torch.ones(()), gates)))
    removed = torch.where(half, gates, torch.zeros(())) + torch.where(coin, 1 - gates, torch.zeros(()))
    torch.testing.assert_close(scrubbed.anti_scrubbed, error(removed))

    found = diagnose(target, components, x, result.final_selection)
    torch.testing.assert_close(found.share, on.sum(0) / on.any(1).sum())
    all_off = error(torch.zeros_like(gates)).mean()
    live = gates * (components.norms() > 0)
    assert found.sparse == pytest.approx(float(error(live).mean() / all_off), rel=1e-4)
    assert torch.equal(activity(target, {"all": result}, x)["all"], (scores > selection.cut[restart]).float())


def test_diagnosis_by_the_attribution_of_the_run() -> None:
    target, x, own = runs.tms(), images(), apd.attributions.activation
    result = runs.decompose(attribution=own, tidy_every=0.0)
    found = diagnose(target, result.components, x, result.final_selection, attribution=own)
    on = apd.selection.batch_top_k(own(target, result.components, x), 1.2).bool() & (result.components.norms() > 0)
    torch.testing.assert_close(found.share, on.sum(0) / on.any(1).sum())
    other = diagnose(target, result.components, x, 1.2)
    assert not torch.equal(found.share, other.share), "a test that tells"


def test_a_selection_of_several_restarts_is_not_taken_for_one(judged: tuple[Judged, apd.Decomposition]) -> None:
    with pytest.raises(
        ValueError, match=r"Judged\.choose must give a tensor \[1, 500, 6\].*the result's final_selection"
    ):
        apd.metrics.scrubbing(runs.tms(), judged[1].components, images(), judged[0])


@pytest.mark.parametrize("per_sample", [False, True])
def test_top_k_as_an_object_in_scrubbing_and_diagnosis(per_sample: bool) -> None:
    target, x, k = runs.tms(), images(), 2.0
    components, top_k = decompose(Learned(), steps=2).components, apd.selection.TopK(k, per_sample)
    scores = apd.attributions.gradient(target, components, x)
    mask = (apd.selection.sample_top_k if per_sample else apd.selection.batch_top_k)(scores, k)
    network = apd.Network(target, components.paths)
    error = apd.losses.mse(network(x, components, mask), network(x))
    torch.testing.assert_close(apd.metrics.scrubbing(target, components, x, top_k).top_k, error)
    on = mask.bool()
    torch.testing.assert_close(diagnose(target, components, x, top_k).share, on.sum(0) / on.any(1).sum())


# What a result keeps to itself, and what it asks for.


def test_a_second_run_with_the_same_object_leaves_the_first_result_alone() -> None:
    target, x, selection = runs.tms(), images(), Learned()
    first = decompose(selection)
    scores = first.attributions(target, x)
    before = first.final_selection.gates(scores)
    second = decompose(selection, seed=7)
    assert torch.equal(first.final_selection.gates(scores), before)
    assert isinstance(first.selection, Learned)
    assert isinstance(second.selection, Learned)
    assert not torch.equal(first.selection.cut, second.selection.cut), "a test that tells"


@pytest.mark.parametrize(("gates", "says"), [((0.0, 3.0), "from 0 to 3"), ((-0.5, 1.0), "from -0.5 to 1")])
def test_gates_out_of_range_are_refused(gates: tuple[float, float], says: str) -> None:
    class Wide(Selection):
        def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
            return torch.linspace(*gates, scores.numel()).reshape(scores.shape)

    with pytest.raises(ValueError, match=rf"gates of Wide.choose must be .*in \[0, 1\], got a .*, numbers {says}$"):
        decompose(Wide())


TAKES = {  # what the methods of a selection are called with
    "start": "n_restarts, n_components, like",
    "choose": "scores, t, share",
    "draw": "gates, noise",
    "penalty": "gates, t",
    "threshold": "scores",
    "active": "scores, threshold",
    "parameters": "",
    "observe": "error, nothing, t",
    "state": "",
    "tensors": "",
    "forget": "changed",
}
OTHERS: list[tuple[Any, str]] = [
    (lambda self: None, ""),
    (lambda self, a: None, "a"),
    (lambda self, a, b: None, "a, b"),
    (lambda self, a, b, c: None, "a, b, c"),
    (lambda self, a, b, c, d: None, "a, b, c, d"),
]


def never(step: int, generator: torch.Generator) -> Tensor:
    raise AssertionError("the run began")


@pytest.mark.parametrize("name", TAKES)
def test_a_method_of_other_arguments_is_refused_before_the_run_begins(name: str) -> None:
    assert set(TAKES) == {own for own, thing in vars(Selection).items() if callable(thing)}
    right = len(TAKES[name].split(", ")) if TAKES[name] else 0
    for n, (function, got) in enumerate(OTHERS):
        if n != right:
            wrong = type("Wrong", (Learned,), {name: function})()
            says = re.escape(f"Wrong.{name} must take ({TAKES[name]}), got a function of ({got}): ")
            with pytest.raises(TypeError, match=f"^{says}(too many positional|missing a required)"):
                runs.decompose(never, selection=wrong, **SETTINGS)
            with pytest.raises(TypeError, match=says):
                apd.selection.final_selection(wrong, 6)
    with pytest.raises(TypeError, match=re.escape(f"Wrong.{name} must be a function of ({TAKES[name]}), got 0.5")):
        runs.decompose(never, selection=type("Wrong", (Learned,), {name: 0.5})(), **SETTINGS)


def test_methods_that_can_be_called_are_taken_however_they_are_written() -> None:
    class Free(Learned):
        def __init__(self) -> None:
            self.state = list  # which does not say what it takes

        def start(self, *sizes: Any) -> None:
            super().start(*sizes)

        def choose(self, scores: Tensor, progress: float, of: float, sharpness: float = 20.0) -> Tensor:  # type: ignore[override]
            return torch.sigmoid(sharpness * (scores - self.cut[:, None]))

        draw = staticmethod(lambda gates, noise, **more: Selection().draw(gates, noise))
        penalty = partialmethod(lambda self, weight, gates, t: weight * gates.mean((1, 2)), 0.0)  # type: ignore[assignment]
        threshold = torch.no_grad()(lambda self, scores, share=1.0: None)

    found, usual = decompose(Free()), decompose(Learned())
    assert all(map(torch.equal, factors(found), factors(usual)))
    scores = found.attributions(runs.tms(), images())
    assert torch.equal(found.final_selection.gates(scores), usual.final_selection.gates(scores))


def test_a_run_that_picked_outputs_asks_for_them(tmp_path: Path) -> None:
    target, x = runs.tms(), images()

    def output(y: Tensor) -> Tensor:
        return y[:, :2]

    result = runs.decompose(output=output)
    result.save(tmp_path)
    for each in (result, apd.Decomposition.load(tmp_path, target)):
        with pytest.raises(ValueError, match=r"picked by .*output: give Network\(target, weights, output\)"):
            each.active(target, x)
        network = apd.Network(target, each.components.paths, output)
        expected = apd.attributions.gradient(network, each.components, x)
        assert torch.equal(each.attributions(network, x), expected)
        assert not torch.equal(expected, apd.attributions.gradient(target, each.components, x)), "a test that tells"


def test_a_run_at_every_position_asks_for_scores_of_every_position() -> None:
    target = torch.nn.Linear(4, 4, bias=False)

    def batches(step: int, generator: torch.Generator) -> Tensor:
        return torch.randn(8, 3, 4, generator=generator)

    result = apd.decompose(target, batches, ["weight"], 3, 1.0, steps=2, per_position=True, progress=False)
    x = batches(0, torch.Generator().manual_seed(0))
    scores = result.attributions(target, x)
    assert result.final_selection.gates(scores).shape == (8, 3, 3)
    for ask in (apd.diagnose.diagnose, apd.metrics.scrubbing):
        with pytest.raises(ValueError, match=r"\[B, positions, C\] as in the run \(per_position\), got \[8, 3\]"):
            ask(target, result.components, x, result.final_selection)


@pytest.mark.parametrize(("size", "most"), [(1, 256), (16, 4096), (64, 8192)])
def test_small_batches_bound_the_held_out_samples(size: int, most: int) -> None:
    given = []

    def batches(step: int, generator: torch.Generator) -> Tensor:
        given.append(step)
        return torch.rand(size, 5, generator=generator)

    runs.decompose(batches, steps=2, tidy_every=0.0)
    assert len(given) == 1 + 2 + most // size  # of the check, the steps, and the scores


def test_a_result_is_shown_in_a_few_lines() -> None:
    assert len(repr(runs.decompose(steps=2))) < 1500
