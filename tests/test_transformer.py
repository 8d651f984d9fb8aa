"""The transformer and its questions: answers by hand, causality, another implementation, the hooks' check."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apd_minimal as apd
from apd_minimal.targets import Questions, Transformer
from apd_minimal.targets.transformer import TASKS, answer_shares, last_position

seeds = st.integers(0, 2**31)


def small(**sizes: int) -> Transformer:
    """An untrained one, with noise in all weights."""
    target = Transformer(**{"n_letters": 9, "d": 8, "n_heads": 2, "neurons": 12, **sizes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in target.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return target


def test_answers_by_hand() -> None:
    target = Transformer(n_letters=10)
    letters = [3, 8, 5, 0, 9, 1, 7, 0]  # the last one stood before the 9 already
    x = torch.tensor([[10 + task, *letters] for task in range(len(TASKS))])
    facts = [int(target.facts[i, 0]) for i in range(2)]
    assert target.answers(x).tolist() == [3, 7, 9, *facts, 9]


@given(seed=seeds)
def test_questions_repeat_one_letter_and_leave_the_task_open(seed: int) -> None:
    x = Questions(8, 50)(0, torch.Generator().manual_seed(seed))
    assert x.shape == (50, 9)
    assert ((x[:, 0] >= 8) & (x[:, 0] < 8 + len(TASKS))).all()
    for row in x[:, 1:].tolist():
        assert len(set(row[:7])) == 7 and set(row) <= set(range(8))
        assert row[7] in row[1:6], "so that a letter stands before and after it"


def test_all_tasks_and_places_come_up_alike_and_chosen_ones_alone() -> None:
    x = Questions(8, 12_000)(0, torch.Generator().manual_seed(0))
    tasks = (x[:, 0] - 8).bincount(minlength=len(TASKS)).float()
    assert (tasks - 2000).abs().max() < 250
    places = (x[:, 1:8] == x[:, 8:]).float().mean(0)
    torch.testing.assert_close(places[1:6], torch.full((5,), 0.2), atol=0.02, rtol=0)
    assert places[0] == places[6] == 0
    only = Questions(8, 100, tasks=(2, 5))(0, torch.Generator().manual_seed(0))[:, 0] - 8
    assert set(only.tolist()) == {2, 5}


def test_questions_are_for_the_transformer_unless_one_says_otherwise() -> None:
    assert Questions() == Transformer().data()


def by_hand(target: Transformer, x: Tensor) -> Tensor:
    """The same logits position by position and head by head, for one row of tokens [T]."""
    stream = target.embed.weight[x] + target.position
    for block in target.blocks:
        q, k, v = (stream @ layer.weight.T for layer in (block.q, block.k, block.v))
        width = q.shape[1] // block.n_heads
        mixed = torch.zeros_like(q)
        for t in range(len(x)):
            for h in range(0, q.shape[1], width):
                scores = k[: t + 1, h : h + width] @ q[t, h : h + width] / width**0.5
                mixed[t, h : h + width] = scores.softmax(0) @ v[: t + 1, h : h + width]
        stream = stream + mixed @ block.o.weight.T
        stream = stream + F.relu(stream @ block.up.weight.T) @ block.down.weight.T
    return stream @ target.unembed.weight.T


def test_against_loops_over_positions_and_heads() -> None:
    target = small()
    x = target.data(5)(0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(target(x), torch.stack([by_hand(target, row) for row in x]), atol=1e-4, rtol=1e-4)


def test_no_position_sees_a_later_one() -> None:
    target = small()
    x = target.data(40)(0, torch.Generator().manual_seed(1))
    before = target(x)
    for place in range(1, 9):
        other = x.clone()
        other[:, place] = (x[:, place] + 1) % 9
        moved = (target(other) - before).abs().amax((0, 2)) > 1e-5
        assert not moved[:place].any() and moved[place:].all()


def test_parameters_counted() -> None:
    target = Transformer()
    decomposed = sum(target.get_parameter(path).numel() for path in target.weights)
    assert decomposed == 2 * (4 * 128 * 128 + 2 * 128 * 256) == 262_144
    rest = 30 * 128 + 9 * 128 + 30 * 128  # tokens, positions, logits
    assert sum(p.numel() for p in target.parameters()) == decomposed + rest


def test_hooks_reach_every_weight_and_gated_runs_are_right() -> None:
    target = small()
    network = apd.Network(target, target.weights, output=last_position)
    x = target.data(6)(0, torch.Generator().manual_seed(0))
    network.check(x)
    halves = {path: torch.stack([0.5 * w, 0.5 * w]) for path, w in network.weights.items()}
    components = apd.Components.from_matrices(halves)
    gates = torch.tensor([[1.0, 1.0]] * 3 + [[1.0, 0.0]] * 3)
    with torch.no_grad():
        out = network(x, components, gates)
        weaker = {path: 0.5 * target.get_parameter(path) for path in target.weights}
        half = torch.func.functional_call(target, weaker, (x,))[:, -1]
        torch.testing.assert_close(out[:3], target(x)[:3, -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out[3:], half[3:], atol=1e-4, rtol=1e-4)


def test_a_seed_gives_a_target_and_training_helps() -> None:
    one, again, other = (Transformer(8, 16, 2, 16, seed=s).fit(seed=s, steps=20, batch_size=32) for s in (1, 1, 2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(one.facts, other.facts)
    assert not torch.equal(one.embed.weight, other.embed.weight)
    target = Transformer(8, 32, 2, 32).fit(steps=400, batch_size=64)
    x = target.data(500)(0, torch.Generator().manual_seed(5))
    assert F.cross_entropy(target(x)[:, -1], target.answers(x)) < 1.8  # log(7) = 1.95 for a letter of the row
    assert all(p.grad is None for p in target.parameters())


def test_the_first_fifth_of_the_training_asks_for_the_task_of_two_layers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[set[str]] = []
    answers = Transformer.answers

    def noted(self: Transformer, x: Tensor) -> Tensor:
        asked.append({TASKS[i] for i in (x[:, 0] - self.n_letters).tolist()})
        return answers(self, x)

    monkeypatch.setattr(Transformer, "answers", noted)
    Transformer(8, 8, 2, 8).fit(steps=20, batch_size=100)
    assert asked == [{"after"}] * 4 + [set(TASKS)] * 16


def test_the_rate_of_the_training_rises_from_a_25th_to_its_peak_of_two_thousandths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Adam's first step moves whatever has a gradient by the rate itself, beside the decay."""
    seen: list[Tensor] = []
    answers = Transformer.answers

    def noted(self: Transformer, x: Tensor) -> Tensor:
        seen.append(self.unembed.weight.detach().clone())
        return answers(self, x)

    monkeypatch.setattr(Transformer, "answers", noted)
    Transformer(8, 8, 2, 8).fit(steps=20, batch_size=100)
    rate = 2e-3 / 25
    moved = (seen[1] - seen[0] * (1 - rate * 0.3)).abs()
    assert moved.median().item() == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Questions(6), "n_letters must be at least 7"),
        (lambda: Questions(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: Questions(tasks=()), "tasks must be some of 0 to 5"),
        (lambda: Questions(tasks=(6,)), r"got \(6,\)"),
        (lambda: Questions(tasks=(1.5,)), r"a task must be a whole number.*got 1\.5"),  # type: ignore[arg-type]
        (lambda: Transformer(d=10, n_heads=3), "n_heads must be a divisor of d=10, got 3"),
        *[
            (lambda name=name: Transformer(**{name: 0}), f"{name} must be at least 1, got 0")
            for name in ("d", "n_heads", "neurons", "n_blocks")
        ],
        (lambda: Transformer(n_letters=6), "n_letters must be at least 7, got 6"),
        (lambda: Transformer(n_letters=3), "n_letters must be at least 7"),
    ],
)
def test_errors_name_what_was_given(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_the_smallest_one_that_may_be_made_runs() -> None:
    target = Transformer(n_letters=7, d=1, n_heads=1, neurons=1, n_blocks=1)
    assert target(target.data(3)(0, torch.Generator().manual_seed(0))).shape == (3, 9, 13)


def test_training_starts_from_weights_that_keep_lengths() -> None:
    """Rows drawn with variance 1 / d_in make an output as long as its input; decomposed ones are 0.4 of that."""
    target = Transformer(d=64, neurons=256).fit(seed=1, steps=1, batch_size=4)
    torch.testing.assert_close(target.unembed.weight.norm(dim=1).mean(), torch.tensor(1.0), atol=0.05, rtol=0)
    for path in target.weights:
        norm = target.get_parameter(path).norm(dim=1).mean()
        torch.testing.assert_close(norm, torch.tensor(0.4), atol=0.02, rtol=0, msg=f"{path}: {norm}")


def test_answer_shares_against_differences_of_gates() -> None:
    target = small().double()
    network = apd.Network(target, target.weights, output=last_position)
    components = apd.Components.random(network.shapes, 3, 2, None, 0.5, torch.Generator().manual_seed(3))
    components = components.map(Tensor.double)
    x = target.data(5)(0, torch.Generator().manual_seed(1))
    answers = network(x).argmax(-1, keepdim=True)

    def number(c: int, step: float) -> Tensor:
        gates = torch.ones(5, 3, dtype=torch.float64)
        gates[:, c] += step
        logits = network(x, components, gates, remainder=True)
        return logits.gather(1, answers)[:, 0] - logits.mean(1)

    with torch.no_grad():
        slopes = torch.stack([(number(c, 1e-5) - number(c, -1e-5)) / 2e-5 for c in range(3)], dim=1).abs()
    shares = slopes / slopes.sum(1, keepdim=True)
    torch.testing.assert_close(answer_shares(network, components, x), shares, atol=1e-6, rtol=1e-5)


def test_recipe_runs() -> None:
    target = small()
    settings = target.recipe | {"n_components": 4, "rank": 2, "steps": 3}
    assert apd.decompose(target, **settings, progress=False).finished
