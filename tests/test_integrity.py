"""Stored files that were changed by a bit or by hand, runs that end in NaN, and where a run may be called."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import safetensors.torch
import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal import checks, store, stored
from apd_minimal.components import normalise_columns
from apd_minimal.store import StoreError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a decomposition of `runs.tms`."""
    folder = tmp_path_factory.mktemp("made")
    runs.decompose(steps=3, checkpoint=folder / "run").save(folder)
    return folder


def test_every_flipped_bit_is_noticed(made: Path, tmp_path: Path) -> None:
    data = (made / "run").read_bytes()
    header = 8 * (8 + int.from_bytes(data[:8], "little"))
    draw = random.Random(0)
    bits = [draw.randrange(8 * len(data)) for _ in range(60)] + [draw.randrange(header) for _ in range(60)]
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "run").write_bytes(flipped)
        with pytest.raises(StoreError, match=str(tmp_path / "run")):
            store.read_tensors(tmp_path / "run", "checkpoint")


def rewritten(source: Path, file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any], kind: str) -> None:
    """A file as the first version wrote it, without a checksum, with something changed."""
    tensors, facts = store.read_tensors(source, kind)
    change(tensors, facts)
    header = {"format": store.FORMAT, "kind": kind, "facts": json.dumps(facts)}
    file.write_bytes(safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()}, metadata=header))


EDITS: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]] = {
    "steps": lambda t, f: f.update(step=2),
    "steps to come": lambda t, f: f.update(step=99),
    "a factor of one row": lambda t, f: t.update({"factor.0": t["factor.0"][:1]}),
    "a factor that is NaN": lambda t, f: t["factor.0"].view(-1)[:1].fill_(torch.nan),
    "no factor": lambda t, f: t.pop("factor.1"),
    "a factor of another type": lambda t, f: t.update({"factor.0": t["factor.0"].double()}),
    "moments of another type": lambda t, f: t.update({"adam.0.exp_avg": t["adam.0.exp_avg"].double()}),
    "negative squares": lambda t, f: t["adam.0.exp_avg_sq"].sub_(1),
    "one more tensor": lambda t, f: t.update(more=torch.ones(1)),
    "no steps in the history": lambda t, f: f["history"].pop("step"),
    "a history of other steps": lambda t, f: f["history"].update(step=[2, 1, 0]),
    "no moments": lambda t, f: t.pop("adam.0.exp_avg"),
    "moments of another shape": lambda t, f: t.update({"adam.0.exp_avg": t["adam.0.exp_avg"][..., :1]}),
    "no generator": lambda t, f: t.pop("generator"),
    "half a generator": lambda t, f: t.update(generator=t["generator"][:9]),
    "no history": lambda t, f: f.pop("history"),
    "a history of text": lambda t, f: f.update(history="none"),
    "a history of words": lambda t, f: f["history"].update(minimality=[["small"]] * len(f["history"]["step"])),
    "no fingerprint": lambda t, f: f.pop("fingerprint"),
    "a setting that nobody knows": lambda t, f: f["config"].update(later=1),
    "a setting out of range": lambda t, f: f["config"].update(p=-1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_checkpoints_are_refused(made: Path, tmp_path: Path, edit: str) -> None:
    file = tmp_path / "run"
    rewritten(made / "run", file, EDITS[edit], "checkpoint")
    with pytest.raises(StoreError, match=str(file)):
        runs.decompose(steps=3, checkpoint=file)


def test_a_checkpoint_without_a_checksum_is_read(made: Path, tmp_path: Path) -> None:
    rewritten(made / "run", tmp_path / "run", lambda t, f: None, "checkpoint")
    again = runs.decompose(steps=3, checkpoint=tmp_path / "run")
    assert runs.fingerprint(again) == runs.fingerprint(runs.decompose(steps=3))


LOADS: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]] = {
    "another C": lambda t, f: f["config"].update(n_components=5),
    "one row": lambda t, f: t.update({"encode.weight.A": t["encode.weight.A"][:, :1]}),
    "restarts": lambda t, f: t.update({n: x[None] for n, x in t.items()}),
    "more restarts than scores": lambda t, f: t.update({f"{n}.restarts": x.expand(9, *x.shape) for n, x in t.items()}),
    "a history of words": lambda t, f: f["history"].update(minimality=[["small"]] * len(f["history"]["step"])),
    "no factor": lambda t, f: t.pop("encode.weight.B"),
    "one more": lambda t, f: t.update(more=torch.ones(1)),
    "a factor that is NaN": lambda t, f: t["encode.weight.A"].fill_(torch.nan),
    "a history of numbers": lambda t, f: f.update(history={"step": 5}),
    "a history of other lengths": lambda t, f: f["history"].update(step=[0]),
    "an attribution of no name": lambda t, f: f.update(attribution=5),
    "no scores": lambda t, f: f.pop("scores"),
    "chosen": lambda t, f: f.update(chosen=7),
    "half of a restart": lambda t, f: f.update(chosen=0.5),
    "finished": lambda t, f: f.update(finished="no"),
    "weights": lambda t, f: f.update(weights=3),
    "an unknown setting": lambda t, f: f["config"].update(later=1),
}


@pytest.mark.parametrize("edit", LOADS)
def test_edited_decompositions_are_refused(made: Path, tmp_path: Path, edit: str) -> None:
    file = tmp_path / "components.safetensors"
    rewritten(made / "components.safetensors", file, LOADS[edit], "decomposition")
    with pytest.raises(StoreError, match=str(file)):
        apd.Decomposition.load(tmp_path, runs.tms())


def test_what_is_missing_is_named(made: Path, tmp_path: Path) -> None:
    rewritten(made / "run", tmp_path / "run", lambda t, f: f.pop("step"), "checkpoint")
    with pytest.raises(StoreError, match="not a valid checkpoint: 'step' is missing"):
        runs.decompose(steps=3, checkpoint=tmp_path / "run")


def test_deep_nesting_and_later_formats_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x"
    for header, message in (
        ({"format": store.FORMAT, "kind": "k", "facts": "[" * 100_000}, "is not a valid k"),
        (
            {"format": "apd_minimal/2", "kind": "k", "facts": "{}"},
            "read it with the version of apd_minimal that wrote it",
        ),
    ):
        file.write_bytes(safetensors.torch.save({"a": torch.ones(1)}, metadata=header))
        with pytest.raises(StoreError, match=message):
            store.read_tensors(file, "k")


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "x"
    victim.write_text("mine")
    (tmp_path / "x.part").symlink_to(victim)
    (tmp_path / f"x.{'0' * 16}.part").symlink_to(victim)
    file.symlink_to(victim)
    store.write(file, b"new")
    assert victim.read_text() == "mine"
    assert file.read_bytes() == b"new"
    assert not os.path.islink(file)


def test_what_differs_between_targets_is_named(tmp_path: Path) -> None:
    def target() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval()

    apd.decompose(target(), runs.batches, ["0.weight"], 3, 1, steps=2, progress=False).save(tmp_path)
    other = target()
    other[1].num_batches_tracked += 1  # type: ignore[index, operator]
    with pytest.raises(StoreError, match=r"\(1.num_batches_tracked was \[\] torch.int64, is .*, other values\)"):
        apd.Decomposition.load(tmp_path, other)
    with pytest.raises(StoreError, match=r"0.bias was \[4\] torch.float32, is \[4\] torch.float64"):
        apd.Decomposition.load(tmp_path, target().double())


def test_attributions_on_another_target_come_with_a_warning() -> None:
    result, target = runs.decompose(steps=2), runs.tms()
    x = runs.batches(0, torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = result.attributions(target, x)
    with torch.no_grad():
        target.bias += 0.1
    for ask in (result.attributions, result.active):
        with pytest.warns(
            UserWarning, match=r"not the target that was decomposed: .*\(bias was \[5\] .*other values\)"
        ):
            assert ask(target, x).shape == same.shape
    other = runs.tms()
    other.load_state_dict(runs.tms().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.attributions(other, x)
    other.encode.weight = nn.Parameter(other.encode.weight.detach() * 2)
    with pytest.warns(UserWarning, match="encode.weight was"):
        result.attributions(other, x)


def test_a_target_is_hashed_again_only_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    result, target, calls = runs.decompose(steps=2), runs.tms(), []
    x = runs.batches(0, torch.Generator().manual_seed(0))
    monkeypatch.setattr(stored, "fingerprint", lambda state: calls.append(state) or result.fingerprint)
    for _ in range(3):
        result.attributions(target, x)
    assert len(calls) == 1
    with torch.no_grad():
        target.bias += 0.1
    result.attributions(target, x)
    assert len(calls) == 2


def test_scores_that_are_not_finite_come_back(tmp_path: Path) -> None:
    result = runs.decompose(steps=2)
    for scores in ([math.inf, 0.5], [-math.inf, math.inf], [math.nan, 1.0]):
        dataclasses.replace(result, scores=scores).save(tmp_path)
        loaded = apd.Decomposition.load(tmp_path, runs.tms()).scores
        np.testing.assert_array_equal(loaded, scores)


def test_cfg_is_strict_json(tmp_path: Path) -> None:
    result = runs.decompose(steps=2)
    apd.Decomposition(**{**vars(result), "scores": [float("nan")] * 2}).save(tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads((tmp_path / "cfg.json").read_text(), parse_constant=refuse)["scores"] == [None, None]


# Runs.


def test_numbers_of_numpy_and_torch_work_and_can_be_saved(tmp_path: Path) -> None:
    settings = {"steps": np.int64(2), "lr": torch.tensor(0.05), "top_k": np.float64(1.2), "p": np.float32(0.5)}
    runs.decompose(**settings, checkpoint=tmp_path / "run", micro_batch=np.int64(16)).save(tmp_path)
    config = apd.Decomposition.load(tmp_path, runs.tms()).config
    assert {type(value) for name, value in asdict(config).items() if name in settings} == {int, float}


def steep(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Finite values whose derivatives are not."""
    errors = (outputs - wanted).square().mean(-1)
    return errors + (0 * errors.detach() + 0 * errors).sqrt()


def test_a_last_step_that_ends_in_nan_is_no_result() -> None:
    with pytest.raises(apd.NonFiniteLoss, match="step 1: the components or their scores") as caught:
        runs.decompose(steps=1, divergence=steep)
    assert all(t.isfinite().all() for t in caught.value.result.components.parameters())
    assert not caught.value.result.finished


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_attributions_that_are_not_finite_are_no_choice(value: float) -> None:
    def same(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        return torch.full((2, len(x), components.n_components), value)

    with (
        pytest.warns(RuntimeWarning, match="could not be compared"),
        pytest.raises(apd.NonFiniteLoss, match=r"attributions.* NaN or infinite"),
    ):
        runs.decompose(attribution=same)


def test_a_run_whose_end_cannot_be_judged_gives_its_last_finite_state() -> None:
    with pytest.raises(apd.NonFiniteLoss, match=r"step 1: the attributions.* NaN") as caught:
        runs.decompose(steps=1, lr=1e30, warmup=0.0)
    assert all(t.isfinite().all() for t in caught.value.result.components.parameters())


@pytest.mark.parametrize("value", [None, "1", [1.0]])
def test_a_judge_that_gives_no_number_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="judge must be a function that gives a number, got"):
        runs.decompose(steps=2, judge=lambda network, components, x: value)


def test_a_later_batch_on_which_the_target_does_not_run_is_named() -> None:
    def source(step: int, generator: torch.Generator) -> Tensor:
        return torch.rand(8, 5 + step, generator=generator)

    with pytest.raises(ValueError, match=r"does not run on x, a tensor \[8, 6\] .*, at step 1"):
        apd.decompose(nn.Sequential(nn.Linear(5, 3)), source, ["0.weight"], 3, 1, steps=2, progress=False)


@pytest.mark.parametrize(("k", "per_sample"), [(None, False), ("1", False), (0, False), ((), False), (1, "False")])
def test_a_top_k_that_is_none_is_refused_when_it_is_made(k: Any, per_sample: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="top_k" if per_sample is False else "per_sample"):
        apd.selection.TopK(k, per_sample)


def test_a_top_k_above_all_components_is_refused_as_the_number_is() -> None:
    for k in (9.0, apd.selection.TopK(9.0)):
        with pytest.raises(ValueError, match=r"top_k must be .*at most 3"):
            apd.selection.final_selection(k, 3)


def test_tidying_that_would_end_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tidy_from must be at most tidy_until=0\.85, got 0\.9"):
        apd.Config(3, 1, tidy_from=0.9)
    apd.Config(3, 1, tidy_from=0.9, tidy_every=0)


def test_float16_is_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"weights are torch.float16.*target\.float\(\)"):
        runs.decompose(lambda step, generator: runs.batches(step, generator).half(), runs.tms().half())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd_the_result_is_the_same(mode: Any) -> None:
    plain, target = runs.decompose(steps=3), runs.tms()
    x = runs.batches(0, torch.Generator().manual_seed(0))
    expected = apd.attributions.gradient(target, plain.components, x)
    with mode():
        again = runs.decompose(steps=3, target=target)
        torch.testing.assert_close(apd.attributions.gradient(target, plain.components, x.clone()), expected)
    assert runs.fingerprint(again) == runs.fingerprint(plain)


def test_a_target_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"made outside torch\.inference_mode"):
        runs.decompose(steps=3)


def test_a_source_that_uses_its_memory_again() -> None:
    buffer = torch.empty(64, 5)

    def source(step: int, generator: torch.Generator) -> Tensor:
        return buffer.copy_(runs.batches(step, generator))

    assert runs.fingerprint(runs.decompose(source)) == runs.fingerprint(runs.decompose())


def test_what_a_callback_gets_is_its_own() -> None:
    """It may keep the components, or change them, and the losses."""
    seen: list[apd.Components] = []

    def callback(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:
        seen.append(components.map(torch.clone))
        kept.append(components)
        losses["minimality"][0] = -1.0

    kept: list[apd.Components] = []
    result = runs.decompose(callback=callback)
    assert runs.fingerprint(result) == runs.fingerprint(runs.decompose())
    assert len(kept) > 2
    for then, now in zip(seen, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(then.parameters(), now.parameters(), strict=True))
    for components in kept:
        components.map(torch.zero_)
    assert result.components.norms().max() > 0


def test_batches_of_several_lengths_are_told_to_be_padded() -> None:
    target = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))

    def batches(step: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, 7, (64, 3 + step % 3), generator=generator)

    with pytest.raises(ValueError, match=r"inputs of one shape, got samples of \[3\] and of \[4\]: .*pad them"):
        with pytest.warns(RuntimeWarning, match="could not be compared"):
            apd.decompose(target, batches, ["1.weight"], 3, 1, steps=6, tidy_every=0.0, progress=False)


def test_indices_of_32_bits() -> None:
    target = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2))
    components = apd.Components.random({"0.weight": (6, 3)}, 4, generator=torch.Generator().manual_seed(0))
    i = torch.tensor([0, 3, 5])
    found = [apd.attributions.gradient(target, components, index) for index in (i, i.int())]
    assert torch.equal(*found)


def test_other_types_are_named() -> None:
    target = runs.tms()
    components = apd.Components.random({"encode.weight": (5, 2)}, 3)
    with pytest.raises(
        TypeError, match=r"x must be of torch.float32, as the weights are, got .* \[4, 5\] of torch.float64"
    ):
        apd.attributions.gradient(target, components, torch.rand(4, 5).double())
    # Others than the book's own do not say so themselves.
    plain = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 5))
    components = apd.Components.random({"0.weight": (5, 2)}, 3)
    with pytest.raises(ValueError, match=r"does not run on x, a tensor \[4, 5\] of torch.float64, with components of"):
        apd.attributions.gradient(plain, components, torch.rand(4, 5).double())
    with pytest.raises(ValueError, match=r"does not run on x, a tensor \[4, 5\] of torch.float64, with weights of"):
        apd.Network(plain, ["0.weight"]).check(torch.rand(4, 5).double())


# What mutations have shown to be untested.


@pytest.mark.parametrize("restarts", [None, 2])
def test_columns_of_unit_length_leave_the_components_as_they_are(restarts: int | None) -> None:
    components = apd.Components.random({"w": (4, 3), "v": (2, 5)}, 3, 2, restarts, 2.0)
    before = components.flat()
    normalise_columns(components)
    for a in components.A.values():
        torch.testing.assert_close(a.norm(dim=-2), torch.ones(a.shape[:-2] + a.shape[-1:]))
    torch.testing.assert_close(components.flat(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gated_functions_keep_their_type_and_values(dtype: torch.dtype) -> None:
    target = apd.targets.GatedFunctions(2, 4).to(dtype)
    knots = target.knots.to(dtype)
    for i in range(2):
        bits = torch.zeros(4, 2, dtype=dtype)
        bits[:, i] = 1
        y = target(torch.cat([knots[:, None], bits], 1))
        assert y.dtype == dtype
        torch.testing.assert_close(y[:, 0], target.functions(knots)[:, i].to(dtype), atol=1e-4, rtol=1e-4)
    assert target.functions(torch.ones(3, dtype=torch.float32)).dtype == target.coefficients.dtype


WRONG: dict[str, tuple[Any, str]] = {
    "batches": (lambda step: torch.rand(4, 5), r"\(step, generator\), got a function of \(step\)"),
    "output": (lambda: None, r"\(outputs of the target\), got a function of \(\)"),
    "divergence": (lambda y: y, r"\(outputs, target outputs\), got a function of \(y\)"),
    "attribution": (lambda network, x: x, r"\(network, components, x\), got a function of \(network, x\)"),
    "judge": (lambda network, components, x, y: 1.0, r"\(network, components, x\), got .*: missing .*'y'"),
    "callback": (lambda step, losses: None, r"\(step, losses, components\), got a function of \(step, losses\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_function_of_other_arguments_is_refused_before_the_first_step(name: str) -> None:
    function, says = WRONG[name]
    with pytest.raises(TypeError, match=f"{name} must take {says}"):
        runs.decompose(**({"source": function} if name == "batches" else {name: function}))


def test_a_module_is_asked_what_its_forward_takes() -> None:
    class Count(nn.Module):
        def forward(self, network: apd.Network, components: apd.Components) -> float:
            return 0.0

    with pytest.raises(TypeError, match=r"judge must take \(network, components, x\), got a function of \(network: "):
        runs.decompose(judge=Count())
    loss = nn.MSELoss()
    assert checks.function("divergence", loss) is loss


def test_functions_whose_arguments_cannot_be_read_or_are_any_are_taken() -> None:
    assert all(checks.function("callback", f) is f for f in (max, print, lambda *a: None, lambda a, b, c, d=1: None))
    assert checks.function("judge", None) is None


def test_one_sample_without_its_axis_is_told_what_to_do() -> None:
    result = runs.decompose(steps=2)
    with pytest.raises(ValueError, match=r"give one sample as x\[None\]"):
        result.active(runs.tms(), torch.rand(5))


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a folder, and no file, at"):
        runs.decompose(checkpoint=tmp_path)
