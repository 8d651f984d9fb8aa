"""Learned importances (bushnaq2025), a selection's own penalty, and the inner activations that importances look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from oracles import case
from test_learned_selection import Learned
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.importance import Importance, leaky_clamp
from apd_minimal.selection import Selection

SETTINGS: dict[str, Any] = {
    "top_k": None, "steps": 24, "rank": 1, "attribution": apd.attributions.inner_activation, "scrub": 1.0,
    "minimality": 0.0, "simplicity": 0.0, "tidy_every": 0.0,
}  # fmt: skip


class Penalised(Learned):
    """A learned threshold with a loss of its own: the mean square of its gates, summed over components."""

    def penalty(self, gates: Tensor, t: float) -> Tensor:
        return 0.3 * gates.square().sum(-1).flatten(1).mean(1)


def factors(result: apd.Decomposition) -> list[Tensor]:
    assert result.restarts is not None
    return result.restarts.parameters()


def penalised(selection: Selection, **changes: Any) -> apd.Decomposition:
    return runs.decompose(selection=selection, **{"top_k": None, "steps": 24, "scrub": 0.5, **changes})


# A selection's own penalty.


def test_the_penalty_is_one_of_the_step_s_losses() -> None:
    """The first step's gradient with respect to the gates, against the losses written out."""
    noted, seen = runs.noting(Penalised())

    def half_empty(step: int, generator: torch.Generator) -> Tensor:
        x = runs.batches(step, generator)
        return torch.cat([x, torch.zeros_like(x)])

    result = runs.decompose(
        half_empty, selection=noted, top_k=None, steps=1, scrub=0.0, simplicity=0.0, tidy_every=0.0, minimality=2.0
    )
    target, config = runs.tms(), apd.Config(n_components=6, top_k=6.0, restarts=2)
    generator, network = torch.Generator().manual_seed(config.seed), apd.Network(target, ["encode.weight"])
    components = apd.Components.random(network.shapes, 6, None, 2, config.init_std, generator)
    x = half_empty(0, generator)[:64]  # on the others nothing is active
    gates = torch.sigmoid(20 * (apd.attributions.gradient(network, components, x) - 0.05)).requires_grad_()
    error = apd.losses.minimality(network(x, components, gates), network(x))
    own = 0.3 * gates.square().sum(-1).mean(1)
    (expected,) = torch.autograd.grad((2 * error + own).sum() / 2, gates)
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-8)
    assert result.history["penalty"][0] == pytest.approx((own / 2).tolist())


@pytest.mark.parametrize("micro_batch", [7, 64])
def test_the_penalty_in_pieces(micro_batch: int) -> None:
    whole, pieces = Penalised(), Penalised()
    a, b = penalised(whole), penalised(pieces, micro_batch=micro_batch)
    torch.testing.assert_close(whole.cut, pieces.cut, rtol=1e-3, atol=1e-5)
    assert a.history["penalty"][-1] == pytest.approx(b.history["penalty"][-1], rel=1e-3)


def test_a_killed_run_with_importances_goes_on_bit_for_bit(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:
        if step == 14:
            raise Killed

    given: dict[str, Any] = {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 5}
    whole, again = Importance(0.1, p=1.0), Importance(0.1, p=1.0)
    expected = runs.decompose(selection=whole, **SETTINGS)
    with pytest.raises(Killed):
        runs.decompose(selection=Importance(0.1, p=1.0), callback=kill, **SETTINGS, **given)
    result = runs.decompose(selection=again, **SETTINGS, **given)
    pairs = zip(factors(expected) + whole.parameters(), factors(result) + again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert expected.history == result.history


def test_a_penalty_that_is_not_finite_is_named() -> None:
    class Broken(Penalised):
        def penalty(self, gates: Tensor, t: float) -> Tensor:
            return super().penalty(gates, t) * (float("nan") if t > 0.4 else 1.0)

    with pytest.raises(apd.NonFiniteLoss, match="step 10: the penalty loss is"):
        penalised(Broken())


def test_a_penalty_of_another_shape_is_refused() -> None:
    class Summed(Penalised):
        def penalty(self, gates: Tensor, t: float) -> Tensor:
            return super().penalty(gates, t).sum()

    with pytest.raises(ValueError, match=r"Summed\.penalty must be of shape \[2\], got"):
        penalised(Summed())


def test_without_a_penalty_there_is_none() -> None:
    assert "penalty" not in penalised(Learned()).history
    assert "penalty" not in runs.decompose(steps=2).history


# The importances.


def test_the_clamp_leaks_towards_the_inside_alone() -> None:
    values = torch.tensor([-2.0, -0.5, 0.0, 0.3, 0.9, 1.0, 1.2, 5.0], requires_grad=True)
    for sign in (1.0, -1.0):
        (gradient,) = torch.autograd.grad((sign * 3 * leaky_clamp(values, 0.01)).sum(), values)
        expected = [
            3 * sign if 0 < v < 1 else 0.03 * sign if (v <= 0 and sign < 0) or (v >= 1 and sign > 0) else 0.0
            for v in values.tolist()
        ]
        torch.testing.assert_close(gradient, torch.tensor(expected))
    assert torch.equal(leaky_clamp(values), values.clamp(0, 1))


@pytest.mark.parametrize("shape", [(2, 7, 3), (1, 4, 5, 3)])
def test_importances_are_those_of_each_component_s_own_network(shape: tuple[int, ...]) -> None:
    selection, generator = Importance(1.0, p=1.0, hidden=4), torch.Generator().manual_seed(1)
    selection.start(shape[0], 3, torch.zeros((), dtype=torch.float64))
    for p in selection.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)  # biases, too
    scores = torch.randn(shape, generator=generator, dtype=torch.float64)
    gates = selection.choose(scores, 0.5)
    first, bias, second, last = selection.parameters()
    for r in range(shape[0]):
        for c in range(3):
            network = nn.Sequential(nn.Linear(1, 4), nn.GELU(), nn.Linear(4, 1)).double()
            state = [first[r, c, :, None], bias[r, c], second[r, c, None], last[r, c, None]]
            for p, value in zip(network.parameters(), state, strict=True):
                p.data.copy_(value)
            expected = network(scores[r, ..., c, None])[..., 0].clamp(0, 1)
            torch.testing.assert_close(gates[r, ..., c], expected)
    assert torch.equal(selection.active(scores, None), gates > 0.1)
    assert 0 < selection.active(scores, None).float().mean() < 1


def test_gates_are_drawn_between_the_importance_and_one() -> None:
    selection = Importance(1.0, p=1.0)
    gates, noise = torch.tensor([0.0, 0.25, 1.0]), torch.tensor([0.0, 0.5, 1.0 - 2**-20])
    drawn = selection.draw(gates[:, None], noise[None])
    torch.testing.assert_close(drawn, torch.lerp(gates[:, None].expand(3, 3), torch.ones(3, 3), noise.expand(3, 3)))
    assert torch.equal(drawn[2], torch.ones(3))


def test_one_weight_alone_is_drawn_as_often_as_all() -> None:
    selection, n = Importance(1.0, p=1.0, per_weight=(2, 1, 3)), 40_000
    noise = torch.rand(1, n, 6, generator=torch.Generator().manual_seed(0))
    gates = torch.full((1, n, 6), 0.25)
    drawn = selection.draw(gates, noise)[0]
    free = drawn == 0.25 + 0.75 * noise[0]  # the others are whole
    assert ((drawn == 1) | free).all()
    by_weight = torch.stack([part.float().mean(1) for part in free.split([2, 1, 3], dim=1)], 1)
    assert ((by_weight < 1e-6) | (by_weight == 1)).all(), "the components of a weight go together"
    kinds = {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)}
    patterns, counts = by_weight.unique(dim=0, return_counts=True)
    assert {tuple(p) for p in patterns.tolist()} == kinds
    assert counts.tolist() == pytest.approx([n / 4] * 4, rel=0.03)
    all_drawn = by_weight.min(1).values == 1
    assert noise[0, all_drawn].mean(0).tolist() == pytest.approx([0.5] * 6, abs=0.02), "whichever that is"


def test_the_slopes_of_one_draw_by_hand() -> None:
    """Three components a, b, d of one weight w = 2 on the input 1, gates halfway between importance and 1.

    With importances 0.4, 0 and 1 (values before the clamp 0.4, -0.2 and 1.3) the gates are 0.7, 0.5 and 1, the output
    0.7 * 0.5 + 0.5 * 0.8 + 1 * 1 = 1.75, and its error 1/16. The error's slope along a gate is 2 * (1.75 - 2) times the
    component, half of that along an importance: -0.125, -0.2 and -0.25. The price of 0.3 is paid for each.
    """
    values, parts = torch.tensor([0.4, -0.2, 1.3], requires_grad=True), torch.tensor([0.5, 0.8, 1.0])
    selection = Importance(0.3, p=1.0)
    importances = leaky_clamp(values)
    gates = selection.draw(importances[None, None], torch.full((1, 1, 3), 0.5))
    error = apd.losses.minimality((gates * parts).sum(-1, keepdim=True), torch.tensor([[2.0]]))
    loss = error.sum() + selection.penalty(importances[None, None], 0.5).sum()
    assert loss.item() == pytest.approx(1 / 16 + 0.3 * 1.4)
    (slopes,) = torch.autograd.grad(loss, values)
    # Inside, the sum passes. Below 0 it pushes further out, and nothing passes; above 1 a hundredth passes.
    assert slopes.tolist() == pytest.approx([0.3 - 0.125, 0.0, 0.01 * (0.3 - 0.25)], abs=1e-7)


@pytest.mark.parametrize("positions", [False, True])
def test_the_penalty_counts_importances(positions: bool) -> None:
    gates = torch.rand(2, 5, *([4] if positions else []), 3, generator=torch.Generator().manual_seed(0))
    t, halfway = 0.25, ((0.0, 2.0), (1.0, 0.4))
    power, smooth = Importance(0.7, p=halfway), Importance(((0.0, 0.0), (1.0, 1.0)), gamma=((0.0, 1.0), (1.0, 0.01)))
    pairs = gates.numel() // 2 // 3
    for r in range(2):
        every = gates[r].flatten().tolist()
        assert float(power.penalty(gates, t)[r]) == pytest.approx(0.7 * sum(g**1.6 for g in every) / pairs, rel=1e-5)
        gamma = 0.75 + 0.0025
        counted = sum(g**2 / (g**2 + gamma**2) for g in every) / pairs
        assert float(smooth.penalty(gates, t)[r]) == pytest.approx(0.25 * counted, rel=1e-5)


def test_the_charge_on_frequency_by_hand() -> None:
    """Two components, important (1) on 8 and 2 of 16 samples; gamma is so small that they count as 1.

    32768 / 2 = 2^14 and 32768 / 8 = 2^12, beside which the 1 hardly counts: the charge is 0.5 (14 / 2 + 12 / 8) = 4.25.
    """
    gates = torch.zeros(1, 16, 2)
    gates[0, :8, 0] = gates[0, 3:5, 1] = 1.0
    penalty = Importance(0.1, gamma=1e-4, frequency=0.5).penalty(gates, 0.5)
    assert float(penalty) == pytest.approx(0.1 * (0.5 + 0.125 + 4.25), rel=1e-4)
    positions = Importance(0.1, gamma=1e-4, frequency=0.5).penalty(gates.reshape(1, 4, 4, 2), 0.5)
    assert torch.equal(positions, penalty), "a position counts as a sample does"


def test_a_rare_component_costs_little_more_and_two_in_one_cost_more() -> None:
    """What the charge is for: with as many importances in all, one component for two features is the dearer way."""
    one, two = torch.zeros(1, 64, 2), torch.zeros(1, 64, 2)
    one[0, :16, 0] = 1.0  # does what the two do
    two[0, :8, 0] = two[0, 8:16, 1] = 1.0
    plain, charged = Importance(1.0, gamma=1e-4), Importance(1.0, gamma=1e-4, frequency=0.5)
    assert float(plain.penalty(one, 0.5)) == pytest.approx(float(plain.penalty(two, 0.5)))
    dearer = float(charged.penalty(one, 0.5) - charged.penalty(two, 0.5))
    assert dearer == pytest.approx(0.5 * 0.25, rel=1e-3)  # one bit more, for a quarter of the samples
    assert float(charged.penalty(torch.zeros(1, 64, 2), 0.5)) == 0.0
    once = torch.full((1, 64, 1), 32767**-0.5)  # with gamma 1 it counts as once in 32768
    rare = float(Importance(1.0, gamma=1.0, frequency=0.5).penalty(once, 0.5))
    assert rare == pytest.approx(1.5 / 32768, rel=1e-4)


def test_the_slope_of_the_charge_is_that_of_its_formula() -> None:
    """f = mean g^2 / (g^2 + gamma^2) and f (1 + b log2(1 + N f)), differentiated by hand."""
    gates = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(Importance(0.3, gamma=0.2, frequency=0.7).penalty(gates, 0.5).sum(), gates)
    g, N = gates.detach(), 32768
    f = (g**2 / (g**2 + 0.04)).mean(1, keepdim=True)
    along = 2 * g * 0.04 / (g**2 + 0.04) ** 2 / 7
    torch.testing.assert_close(
        slope, 0.3 * along * (1 + 0.7 * (torch.log1p(N * f) + N * f / (1 + N * f)) / torch.log(torch.tensor(2.0)))
    )


def test_processes_that_count_their_own_samples_pay_no_less() -> None:
    gates = torch.rand(1, 12, 4, generator=torch.Generator().manual_seed(0)) ** 4
    selection = Importance(1.0, gamma=0.1, frequency=0.5)
    whole = float(selection.penalty(gates, 0.5))
    parts = [float(selection.penalty(part, 0.5)) for part in gates.split(4, dim=1)]
    assert whole < sum(parts) / 3 < 1.2 * whole


def test_forgetting_gives_a_component_its_first_network() -> None:
    selection = Importance(1.0, p=1.0)
    selection.start(2, 3, torch.zeros(()))
    before = [p.detach().clone() for p in selection.parameters()]
    for p in selection.parameters():
        p.data += 1
    changed = torch.zeros(2, 3, dtype=torch.bool)
    changed[1, 2] = True
    selection.forget(changed)
    for p, first in zip(selection.parameters(), before, strict=True):
        assert torch.equal(p[1, 2], first[1, 2])
        assert torch.equal(p[~changed], first[~changed] + 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give p or gamma, got p=None and gamma=None"),
        ({"p": 1.0, "gamma": 1.0}, r"give p or gamma, got p=1\.0 and gamma=1\.0"),
        ({"p": 0.0}, "p must be .*above 0.*got 0"),
        ({"gamma": ((0.0, 1.0), (1.0, 0.0))}, "gamma must be .*above 0.*got 0"),
        ({"p": 1.0, "coefficient": -1}, "coefficient must be .*at least 0.*got -1"),
        ({"p": 1.0, "per_weight": (2, 0)}, "per_weight must be .*at least 1.*got 0"),
        ({"p": 1.0, "frequency": 0.5}, r"frequency is for gamma, not for p: got frequency=0\.5 and p=1\.0"),
        ({"gamma": 1.0, "frequency": -1.0}, "frequency must be .*at least 0.*got -1"),
        ({"p": 1.0, "hidden": 0}, "hidden must be .*got 0"),
        ({"p": 1.0, "alive": 1.0}, r"alive must be .*got 1\.0"),
        ({"p": ((0.5, 1.0), (0.0, 2.0))}, "progress in p must increase"),
    ],
)
def test_settings_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Importance(**{"coefficient": 1.0, **given})


def test_three_numbers_are_taken_apart() -> None:
    """A linear network of three separate numbers, with spare components and no k."""
    target = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        target.weight.copy_(torch.diag(torch.tensor([1.0, -1.5, 2.0])))
    source = apd.data.SparseFeatures(3, 0.2, low=-1.0, batch_size=64, nonempty=True)
    warm = ((0.0, 0.0), (0.1, 0.0), (0.101, 1.0))
    given = SETTINGS | {"steps": 800, "lr": 2e-2, "warmup": 0.0, "init_std": 0.5, "scrub": warm, "restarts": 4}
    selection = Importance(((0.0, 0.0), (0.1, 0.0), (0.101, 1e-2)), p=1.0)
    result = apd.decompose(target, source, ["weight"], 5, selection=selection, progress=False, **given | {"seed": 4})
    truth = {"weight": torch.diag_embed(torch.diag(target.weight.detach().T).diag())}
    assert apd.metrics.ownership(result.components, truth).complete
    x = source(0, torch.Generator().manual_seed(9))
    on = result.active(target, x, attribution=apd.attributions.inner_activation)
    assert on.sum(1).float().mean() < 1.5 * (x != 0).sum(1).float().mean()


# Inner activations.


@pytest.mark.parametrize("restarts", [None, 2])
def test_inner_activation_is_the_input_times_a(restarts: int | None) -> None:
    target, x = runs.tms(), runs.batches(0, torch.Generator().manual_seed(0))
    components = apd.Components.random({"encode.weight": (5, 2)}, 4, 1, restarts, 0.5, torch.Generator())
    scores = apd.attributions.inner_activation(target, components, x)
    stacked = components.stacked().A["encode.weight"]
    for r, own in enumerate(scores if restarts else scores[None]):
        for c in range(4):
            torch.testing.assert_close(own[:, c], x @ stacked[r, c, :, 0])
    assert not scores.requires_grad


def test_inner_activation_of_several_weights_and_positions() -> None:
    one = case("sequence")
    x = one.inputs(3, torch.Generator().manual_seed(0))
    network = apd.Network(one.target, list(one.stored))
    components = apd.Components.random(network.shapes, 4, 1, None, 0.5, torch.Generator()).map(lambda t: t.to(x.dtype))
    uses: list[Any] = []
    network(x, record=uses)
    expected = {}
    for use in uses:
        factor = (components.B if use.site.transposed else components.A)[use.site.path]
        own = factor[:, 0, :] if use.site.transposed else factor[..., 0]
        expected.setdefault(use.site.path, torch.stack([use.rows @ a for a in own], -1))
    scores = apd.attributions.inner_activation(network, components, x)
    torch.testing.assert_close(scores, sum(expected.values()))
    assert scores.shape == (3, *uses[0].rows.shape[1:-1], 4)


def test_inner_activation_is_of_rank_one() -> None:
    components = apd.Components.random({"encode.weight": (5, 2)}, 4, 2)
    with pytest.raises(
        ValueError, match=r"components of rank one: rank=1 for decompose; got factors of \{'encode.weight': 2\}"
    ):
        apd.attributions.inner_activation(runs.tms(), components, torch.ones(2, 5))


def test_inner_activation_wants_the_same_positions() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each, self.all = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.all(self.each(x).mean(1))
            return out

    components = apd.Components.random({"each.weight": (3, 3), "all.weight": (3, 2)}, 4, 1)
    with pytest.raises(ValueError, match=r"different positions, .*\[4, 5\], 'all.weight': \[4\]"):
        apd.attributions.inner_activation(Pooled(), components, torch.ones(4, 5, 3))


def test_who_is_no_more_important_than_alive_is_not_active() -> None:
    scores = torch.linspace(-3, 3, 40)[None, :, None].expand(1, 40, 3)
    for alive in (0.0, 0.5):
        selection = Importance(0.1, p=1.0, alive=alive)
        selection.start(1, 3, torch.zeros(1))
        with torch.no_grad():
            selection.parameters()[-1].fill_(alive)  # the last bias; with no weights, the importance is just that
            selection.parameters()[2].zero_()
            assert not selection.active(scores, None).any()
