"""The selection without k, against choices made by hand and by sorting, and its k against the rule written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.bottleneck import FAITHFULNESS, GAINS, MEMORY, SIMPLICITY, Bottleneck, settings

SETTINGS: dict[str, Any] = {"top_k": None, "steps": 24, "tidy_every": 0.25, "simplicity": 0.1}


def begun(k: float | list[float], n_components: int = 4) -> Bottleneck:
    """A selection with this k, one for each restart."""
    ks = k if isinstance(k, list) else [k]
    selection = Bottleneck()
    selection.start(len(ks), n_components, torch.zeros(1))
    selection.state()[0].copy_(torch.tensor(ks).log())
    return selection


def test_a_choice_made_by_hand() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.2, 0.0], [0.3, 0.8, 0.0, 0.4]]])
    wanted = torch.tensor([[[0, 1, 0, 0], [0, 1, 0, 1]]], dtype=torch.bool)
    assert torch.equal(begun(1.5).choose(scores, 0.0), wanted)
    everything = begun(4.0).choose(scores, 0.0)
    assert torch.equal(everything, scores > 0), "what scores 0 is never active"


@pytest.mark.parametrize("shape", [(3, 20, 5), (3, 6, 4, 5)])
def test_the_choice_is_that_of_a_sort_in_every_restart(shape: tuple[int, ...]) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    ks, rows = [0.5, 1.25, 3.0], scores[0, ..., 0].numel()
    gates = begun(ks, 5).choose(scores, 0.3)
    for r, k in enumerate(ks):
        order = sorted(range(rows * 5), key=lambda i: -float(scores[r].flatten()[i]))
        wanted = torch.zeros(rows * 5, dtype=torch.bool)
        wanted[order[: int(k * rows + 1e-6)]] = True
        assert torch.equal(gates[r].flatten(), wanted)


def test_equal_scores_do_not_let_everything_through() -> None:
    gates = begun(1.0).choose(torch.ones(1, 10, 4), 0.0)
    assert int(gates.sum()) == 10


def test_a_batch_without_samples_and_one_without_scores() -> None:
    assert begun(1.0).choose(torch.zeros(1, 0, 4), 0.0).shape == (1, 0, 4)
    assert not begun(2.0).choose(torch.zeros(1, 6, 4), 0.0).any()


def test_k_is_for_all_samples_of_the_step() -> None:
    scores = torch.rand(1, 25, 4) + 0.1
    assert int(begun(0.5).choose(scores, 0.0, share=0.25).sum()) == 50  # of 100 samples, 25 are given


def test_the_first_k_is_a_share_of_the_samples_with_anything_on() -> None:
    selection = Bottleneck(first=0.5)
    selection.start(2, 4, torch.zeros(1))
    assert selection.k.isnan().all()
    gates = selection.choose(torch.rand(2, 24, 4) + 0.1, 0.0, share=0.25)
    assert gates.flatten(1).sum(1).tolist() == [12, 12]
    torch.testing.assert_close(selection.k, torch.full((2,), 0.125, dtype=torch.double))


def test_the_threshold_separates_who_is_active() -> None:
    scores, selection = torch.rand(2, 40, 4), begun([0.5, 1.5])
    at_end = selection.active(scores, selection.threshold(scores))
    assert torch.equal(at_end, selection.choose(scores, 1.0))


def test_k_follows_the_error_as_the_rule_says() -> None:
    """Three steps, written out for one restart that may err more than it does, and one that errs too much."""
    selection = Bottleneck(allowed=((0.0, 0.4), (1.0, 0.1)), gain=5.0)
    selection.start(2, 4, torch.zeros(1))
    scores = torch.rand(2, 100, 4) + 0.1
    log_k, errors, off = [math.log(0.5)] * 2, [0.0, 0.0], 0.0
    before = 0.0
    for t, now in ((0.0, (0.02, 0.2)), (0.1, (0.05, 0.3)), (0.3, (0.04, 0.9))):
        selection.choose(scores, t)
        selection.observe(torch.tensor(now), torch.full((2,), 0.5), t)
        off = MEMORY * off + (1 - MEMORY) * 0.5
        for r in range(2):
            errors[r] = MEMORY * errors[r] + (1 - MEMORY) * now[r]
            allowed = 0.4 + (0.1 - 0.4) * t
            log_k[r] += 5.0 * min(1.0, max(-1.0, math.log(errors[r] / off / allowed))) * (t - before)
        before = t
    torch.testing.assert_close(selection.k, torch.tensor(log_k, dtype=torch.double).exp(), rtol=1e-5, atol=0)
    assert selection.k[0] < 0.5 < selection.k[1], "fewer where the error is below what is allowed, else more"


def test_a_gain_for_each_restart() -> None:
    selection, scores = Bottleneck(gain=(2.0, 8.0)), torch.rand(2, 100, 4) + 0.1
    selection.start(2, 4, torch.zeros(1))
    selection.choose(scores, 0.1)
    selection.observe(torch.ones(2), torch.ones(2), 0.1)  # all is wrong: up as fast as may be
    torch.testing.assert_close(selection.k, 0.5 * torch.tensor([0.2, 0.8], dtype=torch.double).exp())
    with pytest.raises(ValueError, match="gain must be one number or 3, one for each restart"):
        selection.start(3, 4, torch.zeros(1))


def test_k_stays_between_one_pair_and_all() -> None:
    for n in (10, 1):
        scores = torch.rand(1, n, 4) + 0.1
        for error, end in ((1e-9, 1 / n), (2.0, 4.0)):
            selection = begun(1.0)
            for i in range(1, 100):
                selection.choose(scores, i / 10)
                selection.observe(torch.tensor([error]), torch.ones(1), i / 10)
            torch.testing.assert_close(selection.k, torch.tensor([end], dtype=torch.double))


def test_where_nothing_happens_k_stays() -> None:
    selection = begun(1.0)
    selection.choose(torch.zeros(1, 10, 4), 0.5)
    selection.observe(torch.zeros(1), torch.zeros(1), 0.5)
    assert float(selection.k) == pytest.approx(1.0)


class Noted(Bottleneck):
    """It notes the errors that it is told."""

    def observe(self, error: Tensor, nothing: Tensor, t: float) -> None:
        self.told = [*getattr(self, "told", []), (error.clone(), nothing.clone(), t)]
        super().observe(error, nothing, t)


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_the_run_tells_the_sparse_error_and_that_with_nothing_active(micro_batch: int | None) -> None:
    selection, batches = Noted(), []

    def source(step: int, generator: torch.Generator) -> Tensor:
        batches.append(runs.batches(step, generator))
        return batches[-1]

    result = runs.decompose(source, selection=selection, **SETTINGS | {"tidy_every": 0.0}, micro_batch=micro_batch)
    target = runs.tms()
    for i, (error, nothing, t) in enumerate(selection.told):
        x = batches[i + 1]  # the first batch is that of the checks
        off = (torch.relu(target.bias) - target(x)).square().mean().detach()
        torch.testing.assert_close(nothing, off.expand(2))
        assert error.tolist() == pytest.approx(result.history["minimality"][i])
        assert t == i / 24


def test_it_decomposes_and_says_who_is_active() -> None:
    selection, target = Bottleneck(), runs.tms()
    result = runs.decompose(selection=selection, **SETTINGS)
    x = runs.batches(0, torch.Generator().manual_seed(5))
    together = result.active(target, x)
    assert 0 < together.float().mean() < 1
    assert torch.equal(result.active(target, x[3:4])[0], together[3])
    k = selection.k.clone()
    result.final_selection.gates(result.attributions(target, x[:2]))
    assert torch.equal(selection.k, k), "a question changes nothing"


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, micro_batch: int | None) -> None:
    slow: dict[str, Any] = {"allowed": 0.9, "gain": 1.0}  # so that the errors of all steps count
    whole_selection, again_selection = Bottleneck(**slow), Bottleneck(**slow)
    whole = runs.decompose(selection=whole_selection, **SETTINGS, micro_batch=micro_batch)
    stopped = {"selection": Bottleneck(**slow), "micro_batch": micro_batch} | SETTINGS
    again = runs.killed_and_resumed(lambda **k: runs.decompose(**stopped | k), tmp_path / "run", again_selection)
    for a, b in zip(whole_selection.state(), again_selection.state(), strict=True):
        assert torch.equal(a, b)
    assert runs.fingerprint(whole) == runs.fingerprint(again)


def test_after_a_loss_that_is_not_finite_k_is_as_it_was_with_the_components() -> None:
    """Both are kept at the last finite step, before k is changed by its errors."""
    seen: list[Tensor] = []

    class Seen(Bottleneck):
        def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
            seen.append(self.k.clone())
            return super().choose(scores, t, share)

    def divergence(outputs: Tensor, wanted: Tensor) -> Tensor:
        return apd.losses.mse(outputs, wanted) * (float("nan") if len(seen) == 11 else 1.0)

    selection = Seen(gain=1.0)
    with pytest.raises(apd.NonFiniteLoss, match="step 10: the minimality loss"):
        runs.decompose(selection=selection, divergence=divergence, scrub=0.0, **SETTINGS | {"tidy_every": 0.0})
    assert not torch.equal(seen[10], seen[9]), "a test that tells"
    assert torch.equal(selection.k, seen[9])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"allowed": 0.0}, "allowed must be above 0"),
        ({"allowed": 1.0}, "allowed must be .*below 1"),
        ({"allowed": ((0.5, 0.1), (0.2, 0.1))}, "progress in allowed must increase"),
        ({"gain": 0.0}, "gain must be above 0"),
        ({"gain": (1.0, -1.0)}, "gain must be above 0"),
        ({"first": -1}, "first must be above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Bottleneck(**bad)


def test_the_settings_follow_the_error_with_nothing_active_and_the_number_of_components() -> None:
    target, x = runs.tms(), runs.batches(0, torch.Generator().manual_seed(1))
    with torch.no_grad():
        nothing = float((torch.relu(target.bias) - target(x)).square().mean())
    network = apd.Network(target, target.weights)
    found = settings(network, x, 15)
    assert found["faithfulness"] == pytest.approx(FAITHFULNESS * nothing)
    assert (found["steps"], found["restarts"], found["selection"].gain) == (1500, 6, GAINS)
    assert (found["rank"], found["lr"]) == (4, 1e-2), "as in the runs that were stored"
    assert settings(network, x, 120)["steps"] == 3000
    lump = torch.linalg.svdvals(target.encode.weight.detach()).sum() / 10  # the simplicity loss of the whole, 5 x 2
    (_, first), end = found["simplicity"]
    assert first == pytest.approx(float(SIMPLICITY * nothing / lump))
    assert end == (0.7, 0.0)
    twice = settings(network, x, 15, divergence=lambda outputs, wanted: 2 * apd.losses.mse(outputs, wanted))
    assert twice["faithfulness"] == pytest.approx(2 * found["faithfulness"])


def test_outputs_in_another_unit_give_the_same_components() -> None:
    """All losses are 64 times as large, which Adam hardly sees. That k follows a share has no unit anyway."""
    target, x = runs.tms(), runs.batches(0, torch.Generator().manual_seed(1))
    found = []
    for unit in (1.0, 8.0):

        def output(y: Tensor, unit: float = unit) -> Tensor:
            return unit * y

        rule = settings(apd.Network(target, target.weights, output), x, 6) | {"steps": 12}
        result = apd.decompose(target, runs.batches, target.weights, 6, output=output, progress=False, **rule)
        assert result.restarts is not None
        found.append((result.restarts, rule["selection"].k))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=0)
    for a, b in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-3)


def test_where_outputs_are_distributions_all_errors_are_divergences() -> None:
    """The share that k follows, and the weights of the rule, against the formula of the divergence."""
    selection, target = Noted(gain=1.0), runs.tms()
    x = runs.batches(0, torch.Generator().manual_seed(1))

    def nothing(x: Tensor) -> Tensor:
        with torch.no_grad():
            p, q = target(x).softmax(-1), torch.relu(target.bias).softmax(-1)
        return (p * (p / q).log()).sum(-1).mean()

    mse, kl = (settings(apd.Network(target, target.weights), x, 6, divergence) for divergence in ("mse", "kl"))
    assert kl["faithfulness"] == pytest.approx(FAITHFULNESS * float(nothing(x)), rel=1e-4)
    ratio = kl["faithfulness"] / mse["faithfulness"]
    assert kl["simplicity"][0][1] == pytest.approx(ratio * mse["simplicity"][0][1])
    batches = []

    def source(step: int, generator: torch.Generator) -> Tensor:
        batches.append(runs.batches(step, generator))
        return batches[-1]

    runs.decompose(source, selection=selection, divergence="kl", **SETTINGS | {"tidy_every": 0.0})
    assert len(selection.told) == 24
    for x, (_, told, _) in zip(batches[1:], selection.told, strict=False):
        torch.testing.assert_close(told, nothing(x).expand(2), rtol=1e-4, atol=1e-6)


def test_sparser_data_changes_the_weight_of_faithfulness_as_it_changes_the_other_losses() -> None:
    """Samples with nothing on halve every loss but faithfulness, whose weight must be halved by the rule."""
    target, x = runs.tms(), runs.batches(0, torch.Generator().manual_seed(1))
    network = apd.Network(target, target.weights)
    target.bias.data.fill_(0.0)  # so that an empty sample has no error
    full = settings(network, x, 15)["faithfulness"]
    half = settings(network, torch.cat([x, torch.zeros_like(x)]), 15)["faithfulness"]
    assert half == pytest.approx(full / 2)


def test_the_settings_do_for_decompose() -> None:
    target, x = runs.tms(), runs.batches(0, torch.Generator().manual_seed(1))
    found = settings(apd.Network(target, target.weights), x, 6) | {"steps": 3}
    result = apd.decompose(target, runs.batches, target.weights, 6, progress=False, **found)
    assert result.config.faithfulness == found["faithfulness"]
    assert isinstance(result.selection, Bottleneck)
    assert torch.equal(result.selection.k, found["selection"].k)


def test_a_network_that_needs_no_weights_has_no_settings() -> None:
    target = runs.tms()
    target.bias.data.fill_(-100.0)
    network = apd.Network(target, target.weights)
    with pytest.raises(ValueError, match="the same outputs with nothing active"):
        settings(network, runs.batches(0, torch.Generator().manual_seed(1)), 6)


def test_two_with_the_same_settings_are_two() -> None:
    """One object serves one run: what it has learned is in no setting."""
    assert len({Bottleneck(), Bottleneck()}) == 2 and Bottleneck() != Bottleneck()
