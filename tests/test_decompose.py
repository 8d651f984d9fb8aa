"""The loop: it learns, it chooses, it leaves everything else alone, and it stops with a reason."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_same_state, case, every_case, state
from torch import Tensor

import apd_minimal as apd
from apd_minimal.config import at_progress

QUICK = {"progress": False, "steps": 6, "n_components": 3, "top_k": 1.5, "tidy_every": 0.34, "restarts": 2}


def test_the_losses_go_down() -> None:
    result = runs.decompose(steps=300, simplicity=0.1, restarts=1)
    for name, share in (("faithfulness", 0.01), ("minimality", 0.3)):
        values = [row[0] for row in result.history[name]]
        assert sum(values[-10:]) / 10 < share * values[0], name
    assert result.finished
    network = apd.Network(runs.tms(), ["encode.weight"])
    now = float(apd.losses.faithfulness(result.components, network.weights))
    assert now < 0.01 * result.history["faithfulness"][0][0]


def test_simplicity_lowers_the_penalty_that_it_names() -> None:
    mask = torch.ones(1, 6)
    alone: dict[str, Any] = {"restarts": 1, "tidy_every": 0.0}
    strong, weak = (
        float(
            apd.losses.simplicity(runs.decompose(steps=200, simplicity=s, p=1.0, scrub=0.0, **alone).components, mask)
        )
        for s in (100.0, 0.0)
    )
    assert strong < 0.8 * weak


@every_case
def test_every_supported_network_is_decomposed_and_left_alone(name: str) -> None:
    one = case(name)
    one.target.train()
    before, rng = state(one.target), torch.get_rng_state()
    result = apd.decompose(one.target, lambda step, g: one.inputs(8, g), list(one.stored), **QUICK)
    assert_same_state(before, state(one.target))
    assert torch.equal(torch.get_rng_state(), rng), "nothing sets global state"
    assert torch.is_grad_enabled()
    assert result.finished
    assert result.components.paths == list(one.stored)
    assert all(torch.isfinite(t).all() for t in result.components.parameters())
    assert not any(t.requires_grad for t in result.components.parameters())
    one.network(one.x(), result.components)


@pytest.mark.parametrize(
    "changes",
    [
        {"per_position": True},
        {"per_sample": True, "top_k": 2},
        {"hidden_modules": ["norm", "block.up"], "hidden": 1.0},
        {"divergence": "kl", "attribute_at": "components"},
        {"divergence": lambda outputs, wanted: (outputs - wanted).abs().flatten(-2).mean(-1)},
        {"output": lambda y: y[:, -1], "rank": 1},
        {"attribution": lambda network, components, x: torch.rand(2, len(x), 3, dtype=torch.float64)},
        {"scrub": 0.0, "simplicity": 0.0, "tidy_every": 0.0},
    ],
)
def test_options_run(changes: dict[str, Any]) -> None:
    one = case("sequence")
    result = apd.decompose(one.target, lambda step, g: one.inputs(8, g), list(one.stored), **{**QUICK, **changes})
    assert all(torch.isfinite(t).all() for t in result.components.parameters())
    if "rank" in changes:
        assert result.components.A["mix.weight"].shape[-1] == 1


@pytest.mark.parametrize("changes", [{"hidden_modules": ["norm"]}, {"hidden": 1.0}])
def test_hidden_modules_and_their_weight_belong_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="hidden_modules and the weight hidden belong together, got "):
        runs.decompose(**changes)


def test_the_hidden_loss_by_hand() -> None:
    """What the encoder gives, sparse against full, at the components with which a run starts."""
    result = runs.decompose(hidden_modules=["encode"], hidden=2.0, steps=1, restarts=1, scrub=0.0, tidy_every=0.0)
    generator = torch.Generator().manual_seed(result.config.seed)
    network = apd.Network(runs.tms(), ["encode.weight"])
    start = apd.Components.random(network.shapes, 6, restarts=1, generator=generator).restart(0)
    x = runs.batches(0, generator)
    scores = apd.attributions.gradient(network, start, x)
    mask = apd.selection.batch_top_k(scores, result.config.top_k)
    W = runs.tms().encode.weight.T.detach()
    sparse = torch.stack([x[b] @ start.subset(mask[b].nonzero().flatten()).sum("encode.weight") for b in range(len(x))])
    assert result.history["hidden"] == [[pytest.approx((sparse - x @ W).square().mean().item(), rel=1e-4)]]


@pytest.mark.parametrize("silent", [0, 3])
def test_samples_that_say_nothing_are_left_out_of_the_work_and_not_of_the_losses(silent: int) -> None:
    """All-zero samples among the others: the losses are means over the whole batch, k counts for all of it."""
    seen: list[int] = []

    def batches(step: int, generator: torch.Generator) -> torch.Tensor:
        x = runs.batches(step, generator).clone()
        x[:] = x + 0.1
        x[::5][:silent] = 0
        return x

    def attribution(network: apd.Network, components: apd.Components, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return apd.attributions.gradient(network, components, x)

    settings: dict[str, Any] = {"steps": 1, "restarts": 1, "scrub": 0.0, "tidy_every": 0.0, "simplicity": 1.0}
    result = apd.decompose(
        runs.tms(), batches, ["encode.weight"], 6, 1.2, attribution=attribution, progress=False, **settings
    )
    generator = torch.Generator().manual_seed(result.config.seed)
    network = apd.Network(runs.tms(), ["encode.weight"])
    start = apd.Components.random(network.shapes, 6, restarts=1, generator=generator).restart(0)
    x = batches(0, generator)
    assert seen[0] == len(x) - silent
    mask = apd.selection.batch_top_k(apd.attributions.gradient(network, start, x), 1.2)
    error = (network(x, start, mask) - network(x)).square().mean().item()
    assert result.history["minimality"] == [[pytest.approx(error, rel=1e-5)]]
    penalty = apd.losses.simplicity(start, mask, result.config.p).item()
    assert result.history["simplicity"] == [[pytest.approx(penalty, rel=1e-5)]]


def test_the_columns_are_kept_at_unit_length() -> None:
    result = runs.decompose(unit_norm=True, tidy_every=0.0)
    lengths = result.components.A["encode.weight"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_the_best_restart_is_chosen_and_the_rest_is_kept() -> None:
    result = runs.decompose(restarts=4, steps=60)
    assert result.restarts is not None
    assert result.scores[result.chosen] == min(result.scores)
    assert len(set(result.scores)) == 4
    chosen = result.restarts.restart(result.chosen)
    assert torch.equal(chosen.flat(), result.components.flat())
    x = torch.cat([runs.batches(0, torch.Generator().manual_seed(s)) for s in range(200)])
    errors = []
    for r in range(4):
        alone = result.restarts.restart(r)
        mask = apd.selection.batch_top_k(apd.attributions.gradient(runs.tms(), alone, x), 1.2)
        network = apd.Network(runs.tms(), ["encode.weight"])
        errors.append(float((network(x, alone, mask) - network(x)).square().mean().detach()))
    for error, score in zip(errors, result.scores, strict=True):
        assert error == pytest.approx(score, rel=0.1)


def test_the_seed_decides() -> None:
    assert runs.fingerprint(runs.decompose(steps=5)) == runs.fingerprint(runs.decompose(steps=5))
    first, second = runs.decompose(steps=5, restarts=1), runs.decompose(steps=5, restarts=1, seed=1)
    assert not torch.equal(first.components.flat(), second.components.flat())


def test_the_history_has_a_row_for_every_logged_step() -> None:
    result = runs.decompose(steps=450, restarts=3, simplicity=((0.0, 1.0), (0.5, 0.0)))
    n = len(result.history["step"])
    assert result.history["step"][:3] == [0, 2, 4]
    assert result.history["step"][-1] == 449
    for name in ("faithfulness", "minimality", "simplicity", "scrub"):
        assert len(result.history[name]) == n
        assert all(len(row) == 3 for row in result.history[name])
    assert result.history["simplicity"][-1] == [None] * 3


def test_a_loss_that_sets_in_later_is_logged_beside_its_steps() -> None:
    result = runs.decompose(scrub=((0.0, 0.0), (0.5, 0.0), (1.0, 1.0)))
    scrub = result.history["scrub"]
    assert len(scrub) == len(result.history["step"])
    assert scrub[10] == [None, None]
    assert None not in scrub[-1]


# What stops a run, and with what words.


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state() -> None:
    seen: dict[int, apd.Components] = {}
    for bad in (float("nan"), float("inf")):
        calls: list[int] = []

        def divergence(outputs: Tensor, wanted: Tensor, bad: float = bad, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            error = apd.losses.mse(outputs, wanted)
            return error * (bad if len(calls) == 22 else 1.0)  # it is asked once before the first step

        with pytest.raises(apd.NonFiniteLoss, match=r"step 20: the minimality loss is \[.*(nan|inf)") as caught:
            runs.decompose(
                divergence=divergence,
                scrub=0.0,
                tidy_every=0.0,
                callback=lambda step, losses, components: seen.update({step: components.map(Tensor.clone)}),
            )
        result = caught.value.result
        assert result.finished is False
        assert result.restarts is not None
        # The good state is the one with which the last finite losses were computed: at the start of step 19.
        for a, b in zip(result.restarts.parameters(), seen[18].parameters(), strict=True):
            assert torch.equal(a, b)
        assert result.history["step"] == list(range(20))


def test_a_run_that_explodes_keeps_finite_components() -> None:
    with pytest.raises(apd.NonFiniteLoss, match=r"step \d+: the (\w+ loss is|attributions .* NaN)") as caught:
        runs.decompose(lr=1e15)
    assert all(torch.isfinite(t).all() for t in caught.value.result.components.parameters())


@pytest.mark.filterwarnings("ignore:the restarts could not be compared")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_inputs_are_named_with_their_step(bad: float) -> None:
    for at in (0, 5):

        def source(step: int, generator: torch.Generator, at: int = at) -> Tensor:
            x = runs.batches(step, generator)
            x[0, 0] = bad if step == at else x[0, 0]
            return x

        target = runs.tms()
        before = state(target)
        with pytest.raises(ValueError, match=rf"batches\(step={at}\) gave NaN or infinite inputs"):
            runs.decompose(source, target)
        assert_same_state(before, state(target))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(0, 5), r"with B at least 1, got one of shape \[0, 5\]"),
        (torch.tensor(1.0), r"got one of shape \[\]"),
        ([1.0], "got a list"),
    ],
)
def test_batches_must_be_batches(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs.decompose(lambda step, generator: given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k must be above 0 and at most n_components=6, got 0"),
        ({"top_k": 6.5}, "top_k must be above 0 and at most n_components=6, got 6.5"),
        ({"top_k": ((0.0, 7.0), (1.0, 1.0))}, "top_k must be above 0"),
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
        ({"p": 0}, "p must be above 0, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"warmup": 1.5}, "warmup must be at least 0 and below 1, got 1.5"),
        ({"per_weight": (5,), "reseed_until": 0.0}, r"add up to 6, got \(5,\)"),
        ({"per_weight": (6,), "reseed_until": 0.5, "tidy_every": 0.1}, "per_weight excludes new starts"),
        ({"per_weight": (2, 4), "reseed_until": 0.0}, r"a number for each of \['encode.weight'\]"),
        ({"per_sample": True, "top_k": 1.5}, "top_k per sample must be a whole number, got 1.5"),
        ({"divergence": "hinge"}, r"divergence must be one of \['mse', 'kl'\] or a function, got 'hinge'"),
        (
            {"attribution": lambda network, c, x: torch.zeros(3, 3)},
            r"attributions must be of shape \[2, 64, ..., 6\], got a tensor \[3, 3\]",
        ),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs.decompose(**changes)


@pytest.mark.parametrize(
    ("divergence", "given"),
    [
        (lambda outputs, wanted: (outputs - wanted).square().mean(), r"\[\]"),
        (lambda outputs, wanted: (outputs - wanted).square().mean((1, 2)), r"\[2\]"),
        (lambda outputs, wanted: (outputs - wanted).square(), r"\[2, 64, 5\]"),
        (lambda outputs, wanted: (outputs - wanted).square().mean(1), r"\[2, 5\]"),
        (lambda outputs, wanted: 0.0, "float"),
    ],
)
def test_a_divergence_must_give_one_value_per_sample(divergence: Any, given: str) -> None:
    steps: list[int] = []
    expected = r"\[2, 64\], got " + given + r" for outputs \[2, 64, 5\] and target_outputs \[64, 5\]"
    with pytest.raises(ValueError, match=f"^divergence must give one value per sample, {expected}$"):
        runs.decompose(divergence=divergence, callback=lambda step, losses, components: steps.append(step))
    assert steps == []


def test_unknown_settings_get_a_hint() -> None:
    with pytest.raises(TypeError, match="unknown setting 'simplicty'; did you mean 'simplicity'"):
        runs.decompose(simplicty=1.0)


def test_the_check_comes_before_the_first_step() -> None:
    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = torch.nn.Linear(5, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.encode(x) @ self.encode.weight

    with pytest.raises(ValueError, match=r"encode.weight: the network uses this weight in a way"):
        runs.decompose(target=Hidden())


@given(st.floats(0, 1))
def test_schedules_join_their_points_by_lines(t: float) -> None:
    assert at_progress(3, t) == 3.0
    points = ((0.2, 1.0), (0.6, 5.0), (0.8, 0.0))
    if t <= 0.2:
        expected = 1.0
    elif t <= 0.6:
        expected = 1 + 10 * (t - 0.2)
    elif t <= 0.8:
        expected = 5 - 25 * (t - 0.6)
    else:
        expected = 0.0
    assert at_progress(points, t) == pytest.approx(expected, abs=1e-9)


def test_the_learning_rate_warms_up_and_falls() -> None:
    config = apd.Config(n_components=1, top_k=1, steps=1000, lr=0.5, warmup=0.1)
    rates = [config.lr_at(step / 1000) for step in range(1000)]
    assert 0 < rates[0] <= 0.5 / 100
    assert max(rates) <= 0.5
    assert 80 <= rates.index(max(rates)) <= 105
    assert all(a > b for a, b in pairwise(rates[105:]))
    assert rates[-1] < 0.01 * 0.5


def test_components_live_in_one_weight_each() -> None:
    target = apd.targets.TMS(identity=True)
    settings: dict[str, Any] = {"n_components": 6, "top_k": 2.0, "steps": 40, "restarts": 2, "progress": False}
    confined: dict[str, Any] = {"per_weight": (4, 2), "reseed_until": 0.0}
    with pytest.raises(ValueError, match=r"per_weight must have a number for each .* got \(7, -1\)"):
        apd.decompose(target, target.data(64), target.weights, **settings, per_weight=(7, -1), reseed_until=0.0)
    free = apd.decompose(target, target.data(64), target.weights, **settings, reseed_until=0.0).restarts
    kept = apd.decompose(target, target.data(64), target.weights, **settings, **confined).restarts
    assert free is not None
    assert kept is not None
    for path, own in (("encode.weight", [True] * 4 + [False] * 2), ("middle.weight", [False] * 4 + [True] * 2)):
        lengths = kept.matrices(path).flatten(2).norm(dim=-1)  # [R, C]
        outside = torch.tensor([not o for o in own])
        assert (lengths[:, outside] == 0).all()
        assert (lengths[:, ~outside] > 0).any()
        assert (free.matrices(path).flatten(2).norm(dim=-1) > 0).sum() > (lengths > 0).sum()


def test_in_bfloat16_the_networks_follow_the_factors() -> None:
    """Under autocast: torch keeps rounded copies of leaves, which must not outlive a step."""
    settings: dict[str, Any] = {"faithfulness": 0.0, "simplicity": 0.0, "scrub": 0.0, "tidy_every": 0.0, "steps": 100}
    settings["top_k"] = 0.4  # few enough pairs for the grouped pass, which multiplies by the factors themselves
    with torch.autocast("cpu", torch.bfloat16):
        result = runs.decompose(**settings)
    first, last = (torch.tensor(result.history["minimality"][step]) for step in (0, -1))
    assert (last < first / 10).all()
    assert result.components.A["encode.weight"].dtype == torch.float32


def test_in_bfloat16_the_sum_of_components_keeps_its_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 30, 3, generator=generator), torch.randn(4, 3, 20, generator=generator)
    components = apd.Components({"w": A}, {"w": B})
    exact = torch.einsum("cim,cmj->ij", A.double(), B.double()).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert apd.losses.faithfulness(components, {"w": exact}) < 1e-9
        low = torch.nn.functional.linear(torch.ones(2, 4), torch.ones(3, 4))
        assert low.dtype == torch.bfloat16
        assert apd.losses.minimality(low * 1.0039, low).dtype == torch.float32


def test_a_seed_is_at_most_so_large_that_what_is_added_to_it_still_fits() -> None:
    assert runs.decompose(steps=1, seed=2**62).finished
    with pytest.raises(ValueError, match="seed must be"):
        apd.Config(n_components=3, top_k=1.0, seed=2**62 + 1)


@pytest.mark.parametrize("points", [((0.5, 1.0), (0.5, 2.0)), ((0.0, 1.0), (1.001, 2.0)), ((-0.001, 1.0), (1.0, 2.0))])
def test_points_of_a_schedule_go_on_from_one_to_the_next_within_the_run(points: Any) -> None:
    with pytest.raises(ValueError, match="progress in faithfulness must"):
        apd.Config(n_components=3, top_k=1.0, faithfulness=points)
    inside = tuple((min(max(t, 0.0), 1.0), value) for t, value in points)
    if inside[0][0] < inside[1][0]:
        assert apd.Config(n_components=3, top_k=1.0, faithfulness=inside).faithfulness == inside
