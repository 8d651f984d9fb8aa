"""Arithmetic with a remainder against closed forms: scores, what each frequency does alone, switches, the split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apd_minimal as apd
from apd_minimal.targets import ModularArithmetic, ModularTask
from apd_minimal.targets.modular import GRID
from experiments import modular

signs = st.sampled_from([1, -1])
seeds = st.integers(0, 2**31)
odd = st.integers(1, 8).map(lambda k: 2 * k + 1)


@st.composite
def tasks(draw: st.DrawFn) -> ModularTask:
    multiply = draw(st.booleans())
    p = draw(st.sampled_from([5, 7, 11, 13]) if multiply else st.integers(3, 14))
    some = draw(st.sets(st.integers(1, (p - 1 - multiply) // 2), min_size=1))
    return ModularTask(p, draw(signs), tuple(some), multiply)


def places(task: ModularTask) -> dict[int, int]:
    """Where each token stands on the circle. Of a number that multiplies: how often it takes a root to reach it."""
    if not task.multiply:
        return {token: token for token in range(task.p)}
    for root in range(2, task.p):
        found: dict[int, int] = {}
        product = 1
        while product not in found:
            found[product] = len(found)
            product = product * root % task.p
        if len(found) == task.p - 1:
            return found
    raise AssertionError("a prime has a root")


def scores(task: ModularTask, n: int) -> Tensor:
    """The closed form, pair by pair: 2 / p times the sum of cos(w (a +- b - q)) over the frequencies; [p^2, n].

    For a task that multiplies with places in a, b and q's stead, and p - 1 in p's.
    """
    rows, place = [], places(task)
    period = len(place)
    for a in sorted(place):
        for b in sorted(place):
            row = torch.zeros(n, dtype=torch.double)
            for q in place:
                steps = place[a] + task.sign * place[b] - place[q]
                angles = [2 * math.pi * f / period * steps for f in task.frequencies or ()]
                row[q] = 2 / period * sum(map(math.cos, angles))
            rows.append(row)
    return torch.stack(rows)


@given(p=odd, sign=signs)
def test_all_frequencies_give_one_at_the_answer(p: int, sign: int) -> None:
    target = ModularArithmetic([ModularTask(p, sign)])
    x = target.inputs()
    a, b = x[:, :p].argmax(1), x[:, p:].argmax(1)
    wanted = torch.eye(p)[(a + sign * b) % p] - 1 / p
    torch.testing.assert_close(target(x), wanted, atol=1e-5, rtol=0)
    assert torch.equal(target.answers(x), (a + sign * b) % p)


@pytest.mark.parametrize("p", [5, 7, 11, 13, 23])
def test_a_task_that_multiplies_scores_the_product_and_the_quotient_highest(p: int) -> None:
    pairs = [(a, b) for a in range(1, p) for b in range(1, p)]
    target = ModularArithmetic([ModularTask(p, 1, None, True), ModularTask(p, -1, None, True)], switches="task")
    x = target.inputs()
    assert x.shape == (2 * len(pairs), 2 * p + 2)
    assert [tuple(v) for v in x[:, : 2 * p].unflatten(1, (2, p)).argmax(2).tolist()] == 2 * pairs
    quotients = [next(q for q in range(p) if q * b % p == a) for a, b in pairs]
    wanted = torch.tensor([a * b % p for a, b in pairs] + quotients)
    assert torch.equal(target.answers(x), wanted)
    top, where = target(x).topk(2, dim=1)
    assert torch.equal(where[:, 0], wanted)
    assert (top[:, 0] - top[:, 1] > 1 / p).all()


@given(one=tasks(), other=tasks(), embedding=st.booleans(), seed=seeds)
def test_each_task_and_each_frequency_alone_is_its_sum_of_waves(
    one: ModularTask, other: ModularTask, embedding: bool, seed: int
) -> None:
    target = ModularArithmetic([one, other], switches="task", embedding=embedding, seed=seed)
    x, wanted = target.inputs(), torch.cat([scores(task, target.n) for task in (one, other)]).float()
    torch.testing.assert_close(target(x), wanted, atol=1e-5, rtol=0)
    assert torch.equal(wanted[torch.arange(len(x)), target.answers(x)], wanted.amax(1))
    network = apd.Network(target, target.weights)
    parts = apd.Components.from_matrices(target.mechanisms(), 4)
    for j, t in enumerate(target.owner.tolist()):
        alone = network(x, parts, torch.eye(len(target.owner))[j].expand(len(x), -1))
        task = (one, other)[t]
        f = (task.frequencies or ())[int((target.owner[:j] == t).sum())]
        of_task = x[:, 2 * target.n + t] > 0
        single = scores(ModularTask(task.p, task.sign, (f,), task.multiply), target.n).float()
        torch.testing.assert_close(alone[of_task], single, atol=1e-5, rtol=0)
        assert alone[~of_task].abs().max() < 1e-10  # factors have rounding


@given(task=tasks(), seed=seeds)
def test_mechanisms_sum_to_the_weights_with_the_ranks_of_waves(task: ModularTask, seed: int) -> None:
    target = ModularArithmetic([task], switches="frequency", embedding=True, seed=seed)
    frequencies = target.mechanisms()
    for path, whole in apd.Network(target, target.weights).weights.items():
        assert torch.equal(frequencies[path].sum(0), whole)
        assert torch.equal(target.mechanisms("task")[path][0], whole)
    for reads, writes in zip(*frequencies.values(), strict=True):
        assert int(torch.linalg.matrix_rank(reads, atol=1e-4)) == 4
        assert int(torch.linalg.matrix_rank(writes, atol=1e-4)) == 2


@given(task=tasks(), seed=seeds)
def test_a_closed_frequency_neither_acts_nor_is_attributed_anything(task: ModularTask, seed: int) -> None:
    target = ModularArithmetic([task], switches="frequency", embedding=True, seed=seed)
    x = target.data(64)(0, torch.Generator().manual_seed(seed))
    x[:, 2 * target.n] = 0
    x[:, 2 * target.n + 1 :] = 1
    rest = (task.frequencies or ())[1:]
    others = ModularTask(task.p, task.sign, rest, task.multiply) if rest else None
    a, b = (
        x[:, : 2 * target.n].unflatten(1, (2, target.n)).argmax(2) - int(task.multiply)
    ).T  # its tokens begin with 1
    pair = a * task.period + b
    wanted = scores(others, target.n).float()[pair] if others else torch.zeros(64, target.n)
    torch.testing.assert_close(target(x), wanted, atol=1e-5, rtol=0)
    parts = apd.Components.from_matrices(target.mechanisms(), 4)
    attributed = apd.attributions.gradient(apd.Network(target, target.weights), parts, x)
    assert attributed[:, 0].abs().max() < 1e-10
    assert (attributed[:, 1:] > 0).all()


@given(task=tasks(), probability=st.floats(0.1, 0.9), seed=seeds)
def test_batches_are_rows_of_the_table_with_switches_closed_at_random(
    task: ModularTask, probability: float, seed: int
) -> None:
    target = ModularArithmetic([task], switches="frequency", probability=probability)
    source = target.data(4000)
    before = source.table.clone()
    x = source(0, torch.Generator().manual_seed(seed))
    assert torch.equal(source.table, before)
    for tokens in x[:, : 2 * target.n].split(target.n, 1):
        assert torch.equal(tokens.sum(1), torch.ones(4000))
        # Each token with its share; six standard deviations.
        own = tokens.mean(0)[int(task.multiply) :]
        assert (own - 1 / task.period).abs().max() < 6 * math.sqrt(1 / task.period / 4000)
    switches = x[:, 2 * target.n :]
    assert switches.unique().tolist() == [0.0, 1.0]
    assert (switches.mean(0) - probability).abs().max() < 6 * math.sqrt(probability * (1 - probability) / 4000)


@given(p=st.integers(3, 9), seed=seeds)
def test_the_split_by_tokens_is_exact_under_every_mask_of_tokens_that_are_not_there(p: int, seed: int) -> None:
    target = ModularArithmetic([ModularTask(p)])
    network = apd.Network(target, ["hidden.weight"])
    split = apd.Components.from_matrices(
        {"hidden.weight": torch.eye(2 * p)[:, :, None] * network.weights["hidden.weight"]}, 1
    )
    x = target.inputs()
    generator = torch.Generator().manual_seed(seed)
    gates = torch.maximum(x, torch.rand(x.shape, generator=generator))
    torch.testing.assert_close(network(x, split, gates), target(x), atol=1e-6, rtol=0)
    waves = apd.Components.from_matrices({"hidden.weight": target.mechanisms()["hidden.weight"]}, 4)
    dropped = torch.ones(len(x), len(target.owner))
    dropped[:, 0] = 0  # a frequency is missed on every input
    assert (network(x, waves, dropped) - target(x)).square().sum(1).min() > 0.01


def test_the_embedding_hides_tokens_and_frequencies_from_the_axes() -> None:
    target = ModularArithmetic([ModularTask(13, 1, (1, 4))], switches="frequency", embedding=True)
    assert target.embed.shape == (26, 8)
    own = target.mechanisms()["hidden.weight"].square().sum(2)  # [J, d_in]
    assert ((own / own.sum(0)) < 0.99).all()  # no axis belongs to one frequency
    again = ModularArithmetic([ModularTask(13, 1, (1, 4))], switches="frequency", embedding=True, seed=1)
    assert not torch.allclose(target.embed, again.embed, atol=0.1)
    torch.testing.assert_close(target(target.inputs()), again(target.inputs()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "several tasks need"),
        ({"tasks": [ModularTask(5), ModularTask(7)]}, "several tasks need"),
        ({"tasks": [ModularTask(5), ModularTask(7)], "switches": "frequency"}, "several tasks need"),
        ({"tasks": [ModularTask(5)], "switches": "both"}, "switches must be"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModularArithmetic(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("frequencies", [(), (0,), (3,), (1, 1), (1.5,)])
def test_frequencies_that_a_modulus_does_not_have_are_refused(frequencies: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frequencies must be"):
        ModularTask(5, 1, frequencies)


@pytest.mark.parametrize(("p", "multiply", "half"), [(6, False, 3), (7, True, 3)])
def test_half_of_an_even_circle_is_no_frequency(p: int, multiply: bool, half: int) -> None:
    with pytest.raises(ValueError, match="frequencies must be"):
        ModularTask(p, 1, (half,), multiply)


@pytest.mark.parametrize("p", [3, 4, 9, 15])
def test_only_modulo_a_prime_above_three_can_be_multiplied(p: int) -> None:
    with pytest.raises(ValueError, match="p must be a prime"):
        ModularTask(p, 1, None, True)


def test_nine_neurons_a_frequency() -> None:
    assert [len(ModularArithmetic([ModularTask(p)]).hidden.weight) for p in (23, 59, 113)] == [
        GRID * 11,
        GRID * 29,
        GRID * 56,
    ]


def test_drawn_frequencies_are_other_ones_for_each_task_and_each_seed() -> None:
    """Tasks with the same modulus share none, and every network answers rightly with all of a task's."""
    every = [modular.drawn(seed) for seed in range(30)]
    for add, subtract, other in every:
        assert len({*add, *subtract}) == 4
        assert len(set(other)) == 2
        assert {*add, *subtract} <= set(range(1, 12))
        assert set(other) <= set(range(1, 10))
    assert len(set(every)) > 25
    target = modular.target_of("task, drawn", 3)
    assert tuple(task.frequencies for task in target.tasks) == modular.drawn(3)
    assert [(task.p, task.sign) for task in target.tasks] == [(23, 1), (23, -1), (19, 1)]
    x = target.inputs()
    assert (target(x).argmax(1) == target.answers(x)).all()


def test_an_addition_without_switches_needs_all_its_frequencies_on_every_sample() -> None:
    target, switched = (modular.target_of(kind, 5) for kind in ("frequency, always on", "frequency"))
    x = target.inputs()
    torch.testing.assert_close(target(x), scores(switched.tasks[0], 23).float(), atol=1e-5, rtol=0)
    assert target.embed.shape == (46, 20) and x.shape[1] == 46  # hidden from the axes, and no switch
    truth = modular.truth_of("frequency, always on", target)
    parts = apd.Components.from_matrices(truth, 4)
    assert (apd.attributions.gradient(apd.Network(target, target.weights), parts, x) > 0).all()
    own = modular.settings_of(("frequency, always on", 5, 5, "gentle"))
    assert own["top_k"] == own["n_components"] == len(truth["hidden.weight"])
    assert own | {"top_k": 1.0} == modular.settings_of(("frequency", 5, 5, "gentle"))


@pytest.mark.parametrize("kind", ["task", "frequency"])
def test_without_waves_switches_and_sizes_stay_and_nothing_is_added(kind: str) -> None:
    before, after = modular.target_of(kind, 5), modular.target_of(f"{kind}, no waves", 5)
    job = (modular.MECHANISMS[kind], 5, "strong")
    assert modular.settings_of((f"{kind}, no waves", *job)) == modular.settings_of((kind, *job))
    assert torch.equal(before.opens, after.opens) and torch.equal(before.embed, after.embed)
    for path, old in before.mechanisms().items():
        new = after.mechanisms()[path]
        sizes = [torch.linalg.svdvals(m) for m in (old, new)]
        torch.testing.assert_close(*sizes, atol=1e-4, rtol=1e-4)
        cosines = torch.nn.functional.cosine_similarity(old.flatten(1), new.flatten(1))
        assert cosines.abs().max() < 0.4
    x = after.inputs()
    assert float((after(x).argmax(1) == after.answers(x)).double().mean()) < 0.2
    truth = modular.truth_of(f"{kind}, no waves", after)
    parts = apd.Components.from_matrices(truth, 20)
    x = after.data(512)(0, torch.Generator().manual_seed(0))
    attributed = apd.attributions.gradient(apd.Network(after, after.weights), parts, x)
    assert torch.equal(attributed > 1e-5, x[:, 2 * after.n :] > 0)  # on where its switch is, and nowhere else


def test_parts_in_use_are_counted_by_both_matrices_together() -> None:
    sizes = {"hidden.weight": [3.0, 0.0, 0.2, 0.0], "out.weight": [1.0, 2.0, 0.2, 0.0]}
    parts = {path: torch.tensor(s)[:, None, None] * torch.ones(1, 1, 1) for path, s in sizes.items()}
    assert modular.used(apd.Components.from_matrices(parts, 1)) == 2  # squares are 10, 4, 0.08 and 0
