"""SPD under attack (experiments/spd.py): the ascent against Adam written out, and what each half of a batch runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apd_minimal as apd
from experiments.spd import Attacked, target_of

WEIGHTS = ["encode.weight", "decode.weight"]
C = 3  # of each weight


def started(n: int = 8, **changes: Any) -> tuple[Attacked, apd.Network, apd.Components, Tensor, Tensor, Tensor]:
    """A selection that has seen n samples of an untied TMS, and importances and noise of two starts."""
    generator = torch.Generator().manual_seed(3)
    untied = target_of("tms-5-2", "untied", 10)[1]
    untied.bias.data.fill_(0.3)  # type: ignore[operator, union-attr]  # so that the outputs are on, and errors have slopes
    network = apd.Network(untied, WEIGHTS)
    components = apd.Components.random(network.shapes, 2 * C, 1, 2, 0.5, generator)
    selection = Attacked(0.1, gamma=0.1, frequency=0.5, per_weight=(C, C), **{"sources": 5, **changes})
    selection.start(2, 2 * C, components.parameters()[0])
    x = torch.rand(n, 5, generator=generator)
    selection.scores(network, components, x)
    gates, noise = torch.rand(2, 2, n, 2 * C, generator=generator)
    return selection, network, components, x, gates, noise


def test_the_attack_is_adam_up_the_error_from_where_it_was() -> None:
    """Two batches, two steps each: the second goes on from the first, and the places that have no sample stay."""
    selection, network, components, x, gates, noise = started()
    r = selection.r.detach().clone()
    first, second = torch.zeros_like(r), torch.zeros_like(r)
    for step in range(1, 5):
        at = r[:, :4].clone().requires_grad_()
        g = gates[:, :4]
        errors = (network(x[:4], components, g + (1 - g) * at) - network(x[:4])).square().mean(-1)
        (slope,) = torch.autograd.grad(errors.mean(1).sum(), at)
        slope = torch.cat([slope, torch.zeros(2, 1, 2 * C)], 1)
        first, second = 0.01 * first + 0.99 * slope, 0.99 * second + 0.01 * slope.square()
        move = 0.01 * (first / (1 - 0.01**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        r = (r + move).clamp(0, 1)
    assert ((r - selection.r.detach()).abs() > 0.02)[:, :4].float().mean() > 0.5, "it goes somewhere"
    for _ in range(2):
        drawn = selection.draw(gates, noise)
    torch.testing.assert_close(selection.r.detach(), r, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(drawn[:, :4], gates[:, :4] + (1 - gates[:, :4]) * r[:, :4], atol=1e-5, rtol=1e-4)
    assert (selection.r == selection.r.clamp(0, 1)).all()


def test_the_other_half_is_drawn_as_without_an_attack() -> None:
    selection, *_, gates, noise = started()
    alone = apd.importance.Importance(0.1, gamma=0.1, per_weight=(C, C))
    drawn = selection.draw(gates, noise)
    assert torch.equal(drawn[:, 4:], alone.draw(gates[:, 4:], noise[:, 4:]))
    whole = (drawn.unflatten(-1, (2, C)) == 1).all(-1)  # a weight that runs whole
    assert whole[:, 4:].any() and not whole[:, :4].any(), "the attack is on both weights at once"


def test_more_ascents_do_more_harm() -> None:
    harm: list[float] = []
    for ascents in (0, 2, 40):
        selection, network, components, x, gates, noise = started(ascents=ascents)
        drawn = selection.draw(gates, noise)[:, :4].detach()
        harm.append(float((network(x[:4], components, drawn) - network(x[:4])).square().mean().detach()))
    assert harm[0] < harm[1] < harm[2]


def test_the_attack_leaves_no_slope_behind_but_that_of_the_gates() -> None:
    """Components are trained by the loss alone, and importances as if r were given: dm/dg = 1 - r."""
    selection, _, components, _, gates, noise = started()
    gates.requires_grad_()
    for p in components.parameters():
        p.requires_grad_()
    drawn = selection.draw(gates, noise)
    assert all(p.grad is None for p in components.parameters()) and gates.grad is None
    (slope,) = torch.autograd.grad(drawn[:, :4].sum(), gates)
    torch.testing.assert_close(slope[:, :4], 1 - selection.r[:, :4].detach())


def test_a_run_under_attack_trains() -> None:
    target = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        target.weight.copy_(torch.diag(torch.tensor([1.0, -1.5, 2.0])))
    source = apd.data.SparseFeatures(3, 0.2, low=-1.0, batch_size=64)
    given: dict[str, Any] = {
        "top_k": None, "rank": 1, "steps": 200, "scrub": 1.0, "minimality": 0.0, "simplicity": 0.0, "tidy_every": 0.0,
        "warmup": 0.0, "lr": 2e-2, "restarts": 2, "progress": False,
    }  # fmt: skip
    selection = Attacked(1e-2, gamma=0.1, frequency=0.5)
    result = apd.decompose(target, source, ["weight"], 4, selection=selection, attribution=selection.scores, **given)
    assert max(result.history["scrub"][-1]) < 0.5 * min(result.history["scrub"][0])
    again = Attacked(1e-2, gamma=0.1)
    with pytest.raises(ValueError, match=r"the attack needs the whole batch, got gates of 7 of \d+ samples"):
        apd.decompose(target, source, ["weight"], 4, selection=again, attribution=again.scores, micro_batch=7, **given)
