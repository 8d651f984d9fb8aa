"""The code that CONTRIBUTING.md and the page on data and logs show: every block is run as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from itertools import cycle
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from oracles import Case, attributed, gated, kept
from torch import Tensor, nn
from torch.utils.data import DataLoader

import apd_minimal as apd
from apd_minimal.attributions.gradients import MODES
from apd_minimal.batch import Batches
from apd_minimal.selection import batch_top_k

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> dict[str, list[str]]:
    """The blocks of Python code under each heading."""
    found = {}
    for section in re.split(r"^##+ ", (ROOT / page).read_text(), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if code := re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            found[heading] = code
    return found


CONTRIBUTING, PAGE = blocks("CONTRIBUTING.md"), blocks("chapters/own_network.md")


def run(code: str, **names: Any) -> dict[str, Any]:
    """Execute a block, given the names that it takes as known; all names afterwards."""
    exec(compile(code, "<block>", "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Save a recipe's first block under the name in its first line, and import it."""

    def load(heading: str) -> ModuleType:
        code = CONTRIBUTING[heading][0]
        named = re.match(r"# (\w+)\.py\n", code)
        assert named, f"{heading}: the first line of its file must be its name"
        path = tmp_path / f"{named[1]}.py"
        path.write_text(code)
        spec = spec_from_file_location(named[1], path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, named[1], module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever a block trains take a few steps only."""
    decompose = apd.decompose
    monkeypatch.setattr(
        apd, "decompose", lambda *args, **kwargs: decompose(*args, **kwargs | {"steps": 20, "progress": False})
    )
    monkeypatch.setattr(apd.targets.TMS, "fit", lambda self, seed: runs.tms())


def stops_and_goes_on(tmp_path: Path, source: Callable[[], Batches], **arguments: Any) -> bool:
    """Whether a run that was stopped ends, with a source made anew, where one ends that was not."""

    class Stopped(Exception):
        pass

    def stop(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:
        if step == 12:
            raise Stopped

    files = {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 5}
    settings = {"steps": 20, "restarts": 2, "progress": False, **arguments}
    selection = settings.pop("selection", lambda: None)
    whole = apd.decompose(batches=source(), selection=selection(), **settings)
    with pytest.raises(Stopped):
        apd.decompose(batches=source(), selection=selection(), callback=stop, **files, **settings)
    resumed = apd.decompose(batches=source(), selection=selection(), **files, **settings)
    return runs.fingerprint(whole) == runs.fingerprint(resumed)


def test_every_block_is_run_by_a_test() -> None:
    assert set(CONTRIBUTING) == {"A kind of layer", "An attribution", "A selection"}
    assert all(len(code) == 2 for code in CONTRIBUTING.values()), "a file, and how it is used"
    assert set(PAGE) == {*SOURCES, DICTS, "Inputs kept apart", "What came out", "TensorBoard", "Weights & Biases"}


# A kind of layer


@pytest.mark.parametrize("positions", [(), (2,)])
def test_the_layer_is_brute_force(load: Callable[[str], ModuleType], positions: tuple[int, ...]) -> None:
    Scaled = load("A kind of layer").Scaled
    torch.manual_seed(0)
    target = nn.Sequential(Scaled(3, 4), nn.Tanh(), Scaled(4, 2))
    for module in (target[0], target[2]):
        nn.init.uniform_(module.b, 0.5, 1.0)
    inputs = lambda b, g: torch.randn(b, *positions, 3, generator=g, dtype=torch.float64)  # noqa: E731
    one = Case(target, {"0.W": kept, "2.W": kept}, inputs)
    x, components = one.x(), one.components()
    one.network.check(x)
    gates = torch.rand(len(x), 3, dtype=torch.float64)
    for remainder in (False, True):
        expected = gated(one, components, dict.fromkeys(one.stored, gates), x, remainder)
        torch.testing.assert_close(one.network(x, components, gates, remainder), expected)
    truth = attributed(one, components, x).square().mean(-1).sqrt()
    for mode in MODES:
        torch.testing.assert_close(apd.attributions.gradient(one.network, components, x, mode=mode), truth)


@pytest.mark.usefixtures("short")
def test_the_layer_is_used_as_shown(load: Callable[[str], ModuleType]) -> None:
    load("A kind of layer")
    result = run(CONTRIBUTING["A kind of layer"][1])["result"]
    assert result.finished
    assert {path: tuple(P.shape[1:]) for path, P in result.components.A.items()}.keys() == {"0.W", "2.W"}


# An attribution


@pytest.mark.parametrize("size", [1e-3, 0.5])
@pytest.mark.parametrize("restarts", [None, 2])
def test_the_attribution_of_a_linear_network(
    load: Callable[[str], ModuleType], restarts: int | None, size: float
) -> None:
    """Two linear layers, where the derivative is x P_0 W_1 + h P_1, and central differences are exact."""
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    one = Case(target, {"0.weight": kept, "1.weight": kept}, lambda b, g: torch.randn(b, 4, generator=g).double())
    x, components = one.x(5), one.components(restarts=restarts)
    first, second = (components.A[path] @ components.B[path] for path in one.stored)  # [..., C, d_in, d_out]
    moved = x @ first @ target[1].weight.T + target[0](x) @ second  # [..., C, B, n_out]
    expected = moved.square().mean(-1).sqrt().transpose(-2, -1)
    torch.testing.assert_close(load("An attribution").slope(one.network, components, x, size=size), expected.detach())


@pytest.mark.usefixtures("short")
def test_the_attribution_is_used_as_shown(load: Callable[[str], ModuleType]) -> None:
    load("An attribution")
    result = run(CONTRIBUTING["An attribution"][1])["result"]
    assert result.finished
    assert "slope" in result.attribution


# A selection


def started(Selection: Any, *sizes: int, **options: Any) -> Any:
    selection = Selection(**options)
    selection.start(*sizes, like=torch.zeros((), dtype=torch.float64))
    return selection


@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_selection_is_the_top_k_with_a_soft_edge(
    load: Callable[[str], ModuleType], positions: tuple[int, ...], share: float
) -> None:
    SoftTopK = load("A selection").SoftTopK
    R, B, C, k = 2, 10, 4, 1.2
    scores = torch.rand(R, B, *positions, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hard = batch_top_k(scores.flatten(1, -2), k / share).reshape(scores.shape).bool()
    sharp = started(SoftTopK, R, C, top_k=k, width=1e-9).choose(scores, 0.0, share)
    assert sharp.shape == scores.shape
    assert torch.equal(sharp >= 0.5, hard)
    assert (sharp[~hard] == 0).all()
    soft = started(SoftTopK, R, C, top_k=k, width=0.5)
    gates = soft.choose(scores, 0.0, share)
    assert torch.equal(gates >= 0.5, hard)
    assert ((gates >= 0) & (gates <= 1)).all()
    assert ((gates > 0) & (gates < 1)).any()
    # What all components of a restart have in common does not matter; what one has alone moves its gates.
    soft.preference.data[0] += 0.7
    torch.testing.assert_close(soft.choose(scores, 0.0, share), gates)
    soft.preference.data[1, 2] += 0.7
    more = soft.choose(scores, 0.0, share) - gates
    assert more[0].abs().max() < 1e-9
    assert more[1, ..., 2].max() > 0.1
    assert more[1, ..., 2].min() >= 0
    assert more[1, ..., [0, 1, 3]].max() <= 0


def test_the_selection_follows_a_schedule_and_stands_scores_of_zero(load: Callable[[str], ModuleType]) -> None:
    selection = started(load("A selection").SoftTopK, 1, 4, top_k=((0.0, 1.0), (1.0, 3.0)), width=1e-9)
    scores = torch.rand(1, 10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert [(selection.choose(scores, t) >= 0.5).sum() for t in (0.0, 0.5, 1.0)] == [10, 20, 30]
    assert (selection.choose(torch.zeros_like(scores), 0.0) == 0).all()


def test_the_selection_trains_forgets_and_goes_on(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    SoftTopK = load("A selection").SoftTopK
    seen: list[Tensor] = []

    class Noted(SoftTopK):  # type: ignore[misc, valid-type]
        def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
            seen.append(super().choose(scores, t, share))
            return seen[-1]

    selection = Noted(1.2)
    runs.decompose(selection=selection, top_k=None, tidy_every=0.0)
    (moved,) = selection.parameters()
    assert moved.abs().amax(1).min() > 1e-3, "in every restart"
    assert all(((gates >= 0) & (gates <= 1)).all() for gates in seen)
    changed, before = torch.arange(moved.numel()).reshape(moved.shape) % 3 == 0, moved.detach().clone()
    selection.forget(changed)
    assert torch.equal(moved.detach(), before.masked_fill(changed, 0))
    settings = {"target": runs.tms(), "weights": ["encode.weight"], "n_components": 6, "tidy_every": 0.2}
    assert stops_and_goes_on(tmp_path, lambda: runs.batches, selection=lambda: SoftTopK(1.2), **settings)


@pytest.mark.usefixtures("short")
def test_the_selection_is_used_as_shown(load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    load("A selection")
    result = run(CONTRIBUTING["A selection"][1])["result"]
    assert result.finished
    printed = re.findall(r"-?\d+\.[\de+-]*", capsys.readouterr().out)
    assert len(printed) == result.components.n_components
    assert len(set(printed)) > 1, "they moved"


# Data and logs

SOURCES = ("A dataset of pairs", "A DataLoader", "A list of batches")
DICTS = "Dicts, and networks that take several tensors"
X = torch.rand(48, 6, generator=torch.Generator().manual_seed(0))
DATASET: Any = [(x, i % 3) for i, x in enumerate(X)]


def perceptron() -> dict[str, Any]:
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    return {"target": target, "weights": ["0.weight", "2.weight"], "n_components": 4, "top_k": 2.0}


def source(heading: str) -> Batches:
    loader = DataLoader(DATASET, batch_size=16, shuffle=heading == "A DataLoader")
    batches: Batches = run(PAGE[heading][0], dataset=DATASET, loader=loader, torch=torch)["batches"]
    return batches


@pytest.mark.parametrize("heading", SOURCES)
def test_batches_of_a_dataset_and_of_a_loader(heading: str, tmp_path: Path) -> None:
    batches, generator, before = source(heading), torch.Generator().manual_seed(1), torch.get_rng_state()
    x, next_x = batches(0, generator), batches(1, generator)
    assert (x[:, None] == X).all(-1).any(1).all(), "they are the dataset's inputs, without labels"
    assert not torch.equal(x, next_x)
    assert torch.equal(torch.get_rng_state(), before), "all randomness is the generator's"
    assert torch.equal(source(heading)(0, torch.Generator().manual_seed(1)), x)
    assert stops_and_goes_on(tmp_path, lambda: source(heading), **perceptron())


def test_an_iterator_does_not_go_on_where_it_was(tmp_path: Path) -> None:
    def iterating() -> Batches:
        iterator = cycle(DataLoader(DATASET, batch_size=7))
        return lambda step, generator: next(iterator)[0]

    assert not stops_and_goes_on(tmp_path, iterating, **perceptron())


class Words(nn.Module):
    """The mean over the tokens that count, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        counts = attention_mask[..., None].float()
        return self.head((self.embed(input_ids) * counts).sum(1) / counts.sum(1))


def test_batches_of_dicts() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (48, 5), generator=generator)
    masks = (torch.arange(5) < torch.randint(1, 6, (48, 1), generator=generator)).long()
    dataset: Any = [{"attention_mask": m, "input_ids": t} for t, m in zip(tokens, masks, strict=True)]
    names = run(PAGE[DICTS][0], loader=DataLoader(dataset, shuffle=True), model=Words(), torch=torch, nn=nn)
    x = names["batches"](0, torch.Generator().manual_seed(1))
    assert list(x.shape) == [64, 2, 5]
    assert (x[:, None] == torch.stack([tokens, masks], 1)).all(-1).all(-1).any(1).all()
    target, model = names["target"], names["model"]
    assert torch.equal(target(x), model(input_ids=x[:, 0], attention_mask=x[:, 1]))
    paths = ["model.embed.weight", "model.head.weight"]
    result = apd.decompose(target, names["batches"], paths, n_components=4, top_k=2.0, steps=5, progress=False)
    assert result.finished


def test_a_judge_by_inputs_kept_apart() -> None:
    held_out = torch.rand(40, 6, generator=torch.Generator().manual_seed(7))
    judge = run(PAGE["Inputs kept apart"][0], apd=apd, held_out=held_out)["judge"]
    result = apd.decompose(
        batches=source("A list of batches"), **perceptron(), judge=judge, restarts=3, steps=5, progress=False
    )
    network = apd.Network(perceptron()["target"], perceptron()["weights"])
    assert result.restarts is not None
    own = [apd.rate.Judge()(network, result.restarts.restart(i), held_out) for i in range(3)]
    assert result.scores == own and result.chosen == own.index(min(own))


def expected_logs(result: apd.Decomposition) -> set[tuple[str, float, int]]:
    steps = result.history.pop("step")
    return {
        (name, min(values), step)
        for name, rows in result.history.items()
        for step, values in zip(steps, rows, strict=True)
        if values[0] is not None
    }


def test_a_callback_for_tensorboard() -> None:
    seen: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            pass

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            seen.append((tag, scalar_value, global_step))

    callback = run(PAGE["TensorBoard"][0], SummaryWriter=Writer)["callback"]
    result = runs.decompose(callback=callback)
    assert len(seen) == len(set(seen)) > 0
    assert set(seen) == expected_logs(result)


def test_a_callback_for_weights_and_biases() -> None:
    seen: list[tuple[str, float, int]] = []

    def init(*, project: str) -> None:
        assert not seen

    def log(data: dict[str, float], step: int) -> None:
        seen.extend((name, value, step) for name, value in data.items())

    callback = run(PAGE["Weights & Biases"][0], wandb=SimpleNamespace(init=init, log=log))["callback"]
    result = runs.decompose(callback=callback)
    assert len(seen) == len(set(seen)) > 0
    assert set(seen) == expected_logs(result)


def test_what_a_result_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    target, x = runs.tms(), runs.batches(0, torch.Generator().manual_seed(5))
    result, other = runs.decompose(), runs.decompose(seed=8)
    first, second = PAGE["What came out"]
    names = run(first, apd=apd, target=target, x=x, result=result)
    active, network, without = names["active"], names["network"], names["without"]
    assert active.dtype == torch.bool
    assert active.shape == (len(x), 6)
    assert torch.equal(without[:, 1:], active[:, 1:].float())
    assert not without[:, 0].any()
    every = torch.ones_like(without)
    torch.testing.assert_close(network(x, result.components, every, remainder=True), target(x))
    torch.testing.assert_close(names["change"], network(x, result.components, without, remainder=True) - target(x))
    run(second, apd=apd, result=result, other=other)
    shown = capsys.readouterr().out
    assert "of the whole:" in shown
    assert "chance" in shown
