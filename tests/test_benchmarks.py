"""The benchmark compares two ways to the same numbers, and its cost model counts what is really multiplied."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import apd_minimal as apd
from apd_minimal.attributions import gradient
from apd_minimal.losses import faithfulness
from apd_minimal.selection import batch_top_k
from benchmarks import cases, cost, ours, run, table
from benchmarks.cases import CASES, INIT_STD, ONE_LAYER, TMS_40_10, TWO_LAYERS, Case
from benchmarks.paper import Paper

TINY_TMS = replace(TMS_40_10, name="tiny", n_features=7, width=3, instances=2, batch=64, n_components=6, top_k=0.5)
TINY_MLP = replace(ONE_LAYER, name="tiny", n_features=9, width=20, neurons=(4,), batch=300, n_components=6, top_k=0.1)
TINY_DEEP = replace(TWO_LAYERS, name="tiny", n_features=9, width=20, neurons=(4, 3), batch=300, top_k=0.1)
TINY = [TINY_TMS, TINY_MLP, replace(TINY_DEEP, n_components=6)]


@pytest.fixture
def _double() -> Iterator[None]:
    cases._target.cache_clear()  # the targets are made anew, in double precision
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    cases._target.cache_clear()


def pair(case: Case) -> tuple[apd.Network, apd.Components, list[Tensor], Paper]:
    """Both ways from the same factors: the network, its components, two batches [B, n], the paper's formulation."""
    target = case.target()
    network = apd.Network(target, target.weights, hidden=[f"neurons.{i}" for i in range(len(case.neurons))])
    components = apd.Components.random(
        network.shapes,
        case.n_components,
        restarts=case.instances,
        std=INIT_STD,
        generator=torch.Generator().manual_seed(0),
    )
    batches = [x[:, 0] for x in case.inputs(2)]
    shared = [x[:, None].expand(-1, case.instances, -1) for x in batches]  # the restarts share their samples
    paper = Paper(case, shared, list(components.A.values()), list(components.B.values()))
    return network, components, batches, paper


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("case", TINY)
def test_attributions_and_masks_are_equal(case: Case) -> None:
    network, components, (x, _), paper = pair(case)
    scores, outputs, _ = paper.attributions(paper.batches[0])
    torch.testing.assert_close(outputs[:, 0], network(x).detach())
    wanted = (scores / case.n_features).sqrt().transpose(0, 1)  # the root mean square, [I, B, C]
    assert wanted.max() > 0
    found = {"generic": gradient(network, components, x)}
    if hasattr(network.target, "attributions"):
        found["special"] = network.target.attributions(network, components, x)
    for name, values in found.items():
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5 * float(wanted.max()), msg=name)
        mask = batch_top_k(values, case.top_k)
        assert torch.equal(mask, paper.mask(scores).transpose(0, 1)), name


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("case", TINY)
def test_steps_are_equal(case: Case) -> None:
    network, _, batches, paper = pair(case)
    seen: list[apd.Components] = []
    result = apd.decompose(
        network.target,
        lambda step, generator: batches[step % 2],
        network.target.weights,
        steps=2,
        callback=lambda step, losses, components: seen.append(components.map(Tensor.clone)),
        progress=False,
        **case.settings(),
    )
    first, after_first = paper.step(), [t.detach().clone() for ab in zip(paper.A, paper.B, strict=True) for t in ab]
    for step, losses in enumerate([first, paper.step()]):
        assert set(losses) == set(result.history) - {"step"}
        for name, values in losses.items():
            wanted = torch.tensor(result.history[name][step])
            torch.testing.assert_close(values, wanted, rtol=1e-9, atol=0)
    # Adam's first step is of one size wherever there is a gradient: this is a test of signs, and of what has none.
    for found, wanted in zip(seen[0].parameters(), after_first, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", TINY)
def test_multiplications_of_the_papers_formulation(case: Case) -> None:
    paper = Paper(case, case.inputs(1))
    assert counted(paper.step) == sum(work.flops for work in cost.paper(case).values())


@pytest.mark.parametrize("case", TINY)
def test_multiplications_of_ours(case: Case) -> None:
    network, components, _, _ = pair(case)
    # Of both signs: a layer whose neurons are on for all samples shares its gradients, which saves work.
    x = 2 * torch.rand(case.batch, case.n_features, generator=torch.Generator().manual_seed(0)) - 1
    pairs = int((network(x) != 0).sum())
    for mode, work in cost.generic(case, case.batch, pairs).items():
        gradient(network, components, x[:1], mode=mode)  # a look at the shapes, once and for all
        assert counted(lambda mode=mode: gradient(network, components, x, mode=mode)) == work.flops, mode
    if hasattr(network.target, "attributions"):
        none = [0.0] * len(case.neurons)  # the sums of few rows are no matrix products
        composed, linear = cost.composed(case, case.batch, none), cost.linear_where_on(case, case.batch, pairs)
        special = composed if case.neurons else linear
        assert counted(lambda: network.target.attributions(network, components, x)) == special.flops
    components.map(Tensor.requires_grad_)
    done = counted(lambda: faithfulness(components, network.weights).sum().backward())
    assert done == cost.faithfulness(case).flops


def counted(function: Callable[[], object]) -> int:
    """Operations of matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_a_floor_is_the_slower_of_the_two() -> None:
    work = cost.matmul(2, 3, 5, 7) + cost.moved(10)
    assert work == cost.Work(2 * 2 * 3 * 5 * 7, 4 * (2 * (15 + 35 + 21) + 10))
    assert work.seconds(420.0, 1e9) == pytest.approx(1.0)
    assert work.seconds(1e12, 608.0) == pytest.approx(1.0)
    assert cost.floor({"x": work, "y": work}, 420.0, 1e9)["all"] == pytest.approx(2.0)


@pytest.mark.parametrize("case", CASES)
def test_ours_multiplies_less_than_the_paper(case: Case) -> None:
    paper, generic = (sum(work.flops for work in parts.values()) for parts in (cost.paper(case), cost.ours(case)))
    special = sum(work.flops for work in cost.ours(case, special=True).values())
    assert special <= generic < paper


def test_every_kind_of_step_is_timed() -> None:
    found = run.timed(TINY_MLP, rounds=2, seconds=0.01)
    assert list(found) == ["plain", "loaded", "paper", "ours", "special"]
    for times in found.values():
        assert 0 < times["min"] <= times["median"] <= times["max"]


@pytest.mark.parametrize("special", [False, True])
def test_ours_is_timed_step_by_step(monkeypatch: pytest.MonkeyPatch, special: bool) -> None:
    target, calls = TINY_MLP.target(), []

    def attributions(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        calls.append(x[x.any(1)])  # samples without a feature may have been left out before
        return type(target).attributions(target, network, components, x)

    monkeypatch.setattr(target, "attributions", attributions)
    batches = TINY_MLP.inputs(3)
    found = ours.times(TINY_MLP, batches, n_steps=4, special=special, warmup=1)
    assert len(found) == 4
    assert all(wall > 0 for wall, _ in found)
    # The special way is taken in (d) only; a step a call, the warm-up's included, each with a batch of its own.
    wanted = [x[x.any(1)] for x in (batches[i % 3][:, 0] for i in range(5))] if special else []
    assert len(calls) == len(wanted)
    assert all(map(torch.equal, calls, wanted))


def test_tables_of_the_stored_run() -> None:
    stored = json.loads(table.STORED.read_text())
    assert [case["name"] for case in stored["cases"]] == [case.name for case in CASES]
    for make in (table.steps, table.against_reference, table.ratios, table.memory, table.floors, table.growth):
        header, rows = make(stored)
        assert rows
        assert {len(row) for row in rows} == {len(header)}
        assert table.html(header, rows).count("<td>") == len(rows) * (len(header) - 1)
        assert table.markdown(header, rows).count("\n") == len(rows) + 1
    assert stored["machine"]["threads"] == 1
    assert all(part in table.text(stored) for part in ("TMS 5-2", "n_out = 128", "GB/s"))


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0000123, "0.0123 ms"), (0.0301, "30.1 ms"), (2.744, "2.74 s"), (20.84, "20.8 s")]
)
def test_seconds(value: float, shown: str) -> None:
    assert table.seconds(value) == shown
