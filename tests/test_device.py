"""Everything that the package makes follows the device of the components.

The device is a fake one, called "meta": its tensors hold their values on the CPU, and whatever mixes them with a
tensor of the CPU raises, as it would on a GPU. Forward mode has no fake; with a GPU at hand the same is run on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import apd_minimal as apd

MAY_MIX = ("aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_")


class Elsewhere(Tensor):
    """A tensor of the fake device."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Elsewhere:
        wrap: Any = Tensor._make_wrapper_subclass
        device, place = torch.device("meta"), raw.storage_offset()
        made: Elsewhere = wrap(
            cls, raw.shape, strides=raw.stride(), storage_offset=place, dtype=raw.dtype, device=device
        )
        made.raw = raw
        return made

    def tolist(self) -> list[Any]:
        return self.raw.tolist()  # which torch does for no subclass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, refuse two devices, and put the results where they belong."""
    name = func._schema.name
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.ndim]
    if there and here and name not in MAY_MIX:
        raise RuntimeError(f"{name}: tensors of two devices")
    if name == "aten::index" and not isinstance(args[0], Elsewhere) and there:
        raise RuntimeError(f"{name}: indices of another device")
    device = kwargs.get("device")
    args, own = pytree.tree_map_only(Elsewhere, lambda t: t.raw, (args, kwargs))
    out = func(*args, **(own | ({"device": torch.device("cpu")} if "device" in own else {})))
    if name.endswith("_") and not name.endswith("__") and tensors:  # in place
        return tensors[0]
    goes = bool(there) if device is None else torch.device(device).type == "meta"
    return pytree.tree_map_only(Tensor, Elsewhere, out) if goes else out


class FakeDevice(TorchDispatchMode):
    """Tensors made on "meta" are of the fake device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@pytest.fixture(params=["meta", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        yield "cuda"
        return
    # What torch itself refuses on "meta" and would not on a GPU.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    adam, tensor = torch.optim.Adam, torch.tensor
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, fused: adam(p, lr=lr, foreach=False))
    monkeypatch.setattr(torch, "tensor", lambda data, device="cpu", **kwargs: tensor(data, **kwargs).to(device))
    with FakeDevice():
        yield "meta"


def pieces(device: str, rotated: bool = False, restarts: int | None = None) -> tuple[Any, apd.Network, Any, Tensor]:
    target = apd.targets.TMS(5, 2, identity=rotated)
    if rotated:
        target.rotate(0)
    moved = [*target.named_parameters(), *target.named_buffers()]
    target.to(device)
    assert all(target.state_dict()[name].device.type == device for name, _ in moved)
    network = apd.Network(target, target.weights)
    generator = torch.Generator().manual_seed(0)
    components = apd.Components.random(network.shapes, 4, restarts=restarts, generator=generator, device=device)
    return target, network, components, target.data(16, nonempty=True)(0, generator).to(device)


def test_the_fake_device_refuses_to_mix(device: str) -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3).to(device) + torch.ones(3)


ATTRIBUTIONS: dict[str, Callable[..., Any]] = {
    "backward": lambda *a: apd.attributions.gradient(*a, mode="backward"),
    "components": lambda *a: apd.attributions.gradient(*a, mode="backward", at="components"),
    "sample gradients": lambda *a: apd.attributions.gradient(*a, mode="sample_gradients"),
    "probes": lambda *a: apd.attributions.gradient(*a, n_probes=2, generator=torch.Generator().manual_seed(0)),
    "ablation": apd.attributions.ablation,
    "shapley": apd.attributions.shapley,
    "activation": apd.attributions.activation,
}


@pytest.mark.parametrize("restarts", [None, 2])
@pytest.mark.parametrize("name", ATTRIBUTIONS)
def test_attributions(device: str, name: str, restarts: int | None) -> None:
    if device == "meta" and name == "sample gradients":
        pytest.skip("the fake device has no forward mode, in which the live outputs are found")
    _, network, components, x = pieces(device, restarts=restarts)
    assert ATTRIBUTIONS[name](network, components, x).device.type == device


@pytest.mark.parametrize("rotated", [False, True])
def test_checks_metrics_and_own_attributions(device: str, rotated: bool) -> None:
    target, network, components, x = pieces(device, rotated)
    network.check(x)
    assert target.attributions(network, components, x).device.type == device
    truth = target.mechanisms()
    assert {z.device.type for z in truth.values()} == {device}
    assert target.ownership(components).owned.device.type == device
    for measure in (apd.metrics.mmcs, apd.metrics.ml2r):
        assert torch.isfinite(measure(components, truth).cpu())
    if device == "meta":
        return  # random numbers of the fake device differ from call to call
    assert apd.metrics.match_weights(components, components, n_draws=2).mean > 0.99
    scores = apd.attributions.activation(network, components, x)
    assert apd.metrics.match_use(scores, scores, n_draws=2).mean > 0.99


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 8}, {"unit_norm": True}, {"alpha": 4.0}])
def test_a_run(device: str, settings: dict[str, Any]) -> None:
    if device == "meta" and "alpha" in settings:
        pytest.skip("merging indexes by lists, which the fake device gets wrong")
    target, _, _, _ = pieces(device)
    result = apd.decompose(
        target, target.data(16, nonempty=True), target.weights, 4, 1.0, attribution=target.attributions,
        restarts=2, steps=8, tidy_every=0.25, progress=False, **settings,
    )  # fmt: skip
    assert {p.device.type for p in result.components.parameters()} == {device}


TRAINED: dict[str, Callable[[], Any]] = {
    "tms": lambda: apd.targets.TMS(5, 2),
    "residual": lambda: apd.targets.ResidualMLP(4, 6, (3, 2)),
    "transformer": lambda: apd.targets.Transformer(7, 8, 2, 8, 1),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_target_trains_where_it_is(device: str, name: str) -> None:
    """From the same start and on the same batches as on the CPU."""
    if device == "meta" and name == "tms":
        pytest.skip("a move to the fake device unties the two weights")
    here, there = TRAINED[name](), TRAINED[name]().to(device)
    here.fit(seed=3, steps=3, batch_size=16)
    there.fit(seed=3, steps=3, batch_size=16)
    for (path, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        assert q.device.type == device
        values = q.detach().raw if device == "meta" else q.detach().cpu()
        torch.testing.assert_close(values, p.detach(), rtol=1e-4, atol=1e-5, msg=path)


def test_ten_steps_are_those_of_the_cpu(device: str) -> None:
    if device == "meta":
        pytest.skip("the fake device draws other random numbers")
    found = []
    for place in ("cpu", device):
        target = apd.targets.TMS(5, 2).fit(seed=0, steps=200).to(place)
        settings = {**target.recipe, "steps": 10, "restarts": 2, "tidy_every": 0.0, "progress": False}
        found.append(apd.decompose(target, **settings).components.map(lambda t: t.cpu()))
    for p, q in zip(*(components.parameters() for components in found), strict=True):
        assert (p - q).norm() < 1e-4 * p.norm()


def test_a_selection_that_follows_the_error(device: str) -> None:
    selection, error = apd.bottleneck.Bottleneck(), torch.tensor([0.1, 0.2], dtype=torch.double).to(device)
    selection.start(2, 4, like=torch.ones(1).to(device))
    scores = torch.rand(2, 16, 4).to(device)
    for t in (0.0, 0.5):
        assert selection.choose(scores, t).device.type == device
        selection.observe(error, 10 * error, t)
    assert selection.k.device.type == device


def test_costs_of_a_dictionary(device: str) -> None:
    target, _, _, x = pieces(device)
    own = apd.baselines.Dictionary([2], [2], 3).to(device)
    (cost,) = apd.baselines.costs(target, own, x, "output of encode", epsilons=[1e-9])
    assert cost.in_use == 0 or cost.error <= 1e-9
