"""The one primitive: a network whose weights are sums of gated components.

For inputs x [B, ...] and gates g [B, C], sample b is run with the weights

    sum_c g[b, c] P_c  +  r (theta* - sum_c P_c)          (biases as in the target; r, the remainder, is 0 or 1).

Chapter 3 (parameter space) builds it. The target is never changed: forward hooks add what is missing to the
outputs of the layers, and are removed before a call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .components import Components
from .kernels import grouped
from .sites import Site, Use, find_sites, lookup

Gates = Tensor | Mapping[str, Tensor]


class Network:
    """A target together with the weights that are decomposed and the outputs that count.

    Args:
        target: any network; it is left exactly as it is.
        weights: parameter paths such as "encode.weight"; tied weights count once, under the path given.
        output: picks the outputs that count from what the target returns, giving a tensor [B, ...];
            None takes the target's output as it is.
        hidden: paths of modules whose outputs are recorded for the hidden-activation loss.
        recompute: let autograd work out what the components do in a layer again instead of keeping it.

    Raises:
        KeyError: a path that is not a parameter or a module of the target.
        TypeError: a kind of module without a rule.
        ValueError: no weight, or the same weight under two names.
    """

    def __init__(
        self,
        target: nn.Module,
        weights: Sequence[str],
        output: Callable[[Any], Tensor] | None = None,
        hidden: Sequence[str] = (),
        recompute: bool = False,
    ) -> None:
        if isinstance(weights, str) or not weights:
            raise ValueError(f"weights must be a list of at least one parameter path, got {weights!r}")
        self.target = target
        self.output = output
        self.hidden = list(hidden)
        self.recompute = recompute
        self.sites: list[Site] = []
        self.weights: dict[str, Tensor] = {}
        parameters = dict(target.named_parameters(remove_duplicate=False))
        seen: dict[int, str] = {}
        for path in weights:
            parameter = lookup(parameters, path, "parameter")
            if id(parameter) in seen:
                raise ValueError(f"{path} and {seen[id(parameter)]} are the same tensor: name it once")
            seen[id(parameter)] = path
            sites = find_sites(target, path, parameter)
            self.sites += sites
            # The module named by the path fixes the matrix's orientation.
            own = next(site.rule for site in sites if not site.transposed)
            self.weights[path] = own.matrix(parameter.detach())
        modules = dict(target.named_modules())
        for name in hidden:
            lookup(modules, name, "module")

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Per parameter path, (d_in, d_out)."""
        return {path: (matrix.shape[0], matrix.shape[1]) for path, matrix in self.weights.items()}

    def __call__(
        self,
        x: Tensor,
        components: Components | None = None,
        gates: Gates | None = None,
        remainder: bool = False,
        *,
        shifts: Sequence[Tensor] | None = None,
        record: list[Use] | None = None,
        activations: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the target, the component model, or any gated mixture of components.

        Args:
            x: inputs [B, ...], the same for every restart.
            components: None runs the target itself.
            gates: per sample [B, C], per position [B, *positions, C], or one such tensor per parameter path,
                each with a leading axis of restarts if the components have one; None sets all gates to 1. Of
                boolean gates only the pairs that are on are worked out, if these are few (`grouped`).
            remainder: also add theta* - sum_c P_c.
            shifts: one tensor per use of a decomposed weight, in the order of use, added to that layer's
                output rows [B, T, d_out], positions flattened.
            record: filled with one `Use` for each use of a decomposed weight, in order.
            activations: filled with the outputs of the modules named in `hidden`.

        Returns:
            Tensor: the outputs that count, [B, ...], or [restarts, B, ...] if the components have restarts.

        Raises:
            ValueError: gates or components of the wrong shape.
        """
        stacked = None if components is None else self._fit(components).stacked()
        copies = 1 if stacked is None else stacked.A[stacked.paths[0]].shape[0]
        batch = len(x)
        full_gates = _stack_gates(gates, components, batch)
        calls = iter(shifts) if shifts is not None else None
        group = cache(_group)  # most often all weights share their gates

        def edit(site: Site, value: Tensor, out: Tensor) -> Tensor:
            # With every gate at 1 the remainder completes the sum to the target's own weight.
            whole = remainder and full_gates is None
            uses = stacked is not None and site.path in stacked.paths and not whole
            if not uses and record is None and calls is None:
                return out
            rows = site.rule.rows(value)
            new = None
            if uses:
                assert stacked is not None
                mix = partial(checkpoint, _mixture, use_reentrant=False) if self.recompute else _mixture
                new = self.leave(mix(site, self.enter(rows), stacked, full_gates, remainder, batch, group))
                bias = getattr(site.module, "bias", None)  # an embedding has no such attribute
                if not remainder and bias is not None:
                    new = new + bias
            if calls is not None:
                shift = next(calls).reshape(*rows.shape[:-1], -1)
                new = shift if new is None else new + shift
            if record is not None:
                width = self.shapes[site.path][0 if site.transposed else 1]
                zeros = rows.new_zeros(*rows.shape[:-1], width, requires_grad=torch.is_grad_enabled())
                record.append(Use(site, rows, zeros))
                new = zeros if new is None else new + zeros
            assert new is not None
            laid = site.rule.unrows(new, out)
            return laid if uses and not remainder else out + laid

        repeated = x if copies == 1 else x.expand(copies, *x.shape).flatten(0, 1)
        result = self._run(repeated, edit, activations)
        if components is None or components.restarts is None:
            return result
        if activations is not None:
            activations[:] = [a.unflatten(0, (copies, batch)) for a in activations]
        return result.unflatten(0, (copies, batch))

    def enter(self, rows: Tensor) -> Tensor:
        """What the components of a layer get, of its input rows; `parallel` has them on several processes."""
        return rows

    def leave(self, outputs: Tensor) -> Tensor:
        """What a layer gets from the components, of the output rows of those that are here."""
        return outputs

    def _fit(self, components: Components) -> Components:
        for path in components.paths:
            if path not in self.weights:
                raise ValueError(f"components of {path}, but the network decomposes {list(self.weights)}")
            shape = (components.A[path].shape[-2], components.B[path].shape[-1])
            if shape != self.shapes[path]:
                raise ValueError(f"{path}: components of shape {shape}, but the weight is {self.shapes[path]}")
        return components

    def _run(
        self, x: Tensor, edit: Callable[[Site, Tensor, Tensor], Tensor], activations: list[Tensor] | None = None
    ) -> Tensor:
        with ExitStack() as undo:
            for site in self.sites:
                hook = partial(_hook, partial(edit, site))
                undo.callback(site.module.register_forward_hook(hook, with_kwargs=True).remove)
            if activations is not None:
                for name in self.hidden:
                    module = self.target.get_submodule(name)
                    keep = module.register_forward_hook(lambda module, args, out: activations.append(out))
                    undo.callback(keep.remove)
            undo.enter_context(evaluating(self.target))
            out = self.target(x)
        if self.output is not None:
            out = self.output(out)
        if not isinstance(out, Tensor):
            raise TypeError(f"the target returns {type(out).__name__}, not a tensor: pick one with output=")
        if out.ndim == 0 or len(out) != len(x):
            raise ValueError(
                f"the outputs must keep the batch axis: {len(x)} inputs gave a tensor of shape {list(out.shape)}"
            )
        return out

    def check(self, x: Tensor, tolerance: float = 1e-3) -> None:
        """Make sure that the hooks reach everything that the network does with the decomposed weights.

        Every weight in turn is perturbed, once through the hooks and once for real (functional_call); the
        outputs must change alike.

        Args:
            x: a few inputs [B, ...].
            tolerance: largest accepted difference, relative to the change of the output.

        Raises:
            ValueError: an empty batch, inputs or outputs that are not finite, a target that is not
                deterministic, a weight whose module is never called or which is used in another way.
        """
        if len(x) == 0:
            raise ValueError("an empty batch: the first axis of x has size 0")
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise ValueError("x holds NaN or infinite values")
        used: list[Use] = []
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            before = self(x, record=used)
            if not torch.isfinite(before).all():
                raise ValueError("the target's outputs hold NaN or infinite values")
            if not torch.equal(before, self(x)):
                raise ValueError("the target gives other outputs when run again on the same inputs")
            called = {id(use.site.module) for use in used}
            for site in self.sites:
                if id(site.module) not in called:
                    raise ValueError(f"{site.path}: its module {site.name!r} is never called as a module")
            for path, matrix in self.weights.items():
                noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0)).to(matrix)
                noise *= 0.1 * matrix.square().mean().sqrt() + 1e-3
                owner = next(site.rule for site in self.sites if site.path == path and not site.transposed)
                weight = self.target.get_parameter(path).detach() + owner.weight(noise)
                delta = Components({path: noise[None]}, {path: torch.eye(noise.shape[1]).to(noise)[None]})
                twice = torch.full((len(x), 1), 2.0).to(noise)
                hooked = self(x, delta, twice, remainder=True)
                with evaluating(self.target):
                    # Every user by name: functional_call's own tying does not put back a module with two names.
                    users = {f"{site.name}.weight".lstrip("."): weight for site in self.sites if site.path == path}
                    out = functional_call(self.target, users, (x,), tie_weights=False)
                real = self.output(out) if self.output is not None else out
                error, change = (hooked - real).norm(), (real - before).norm()
                if error > tolerance * change + 8 * torch.finfo(before.dtype).eps * before.norm():
                    raise ValueError(
                        f"{path}: the network uses this weight in a way that its modules' calls do not show "
                        f"(changing it moves the output by {change:.3g}, of which the hooks miss {error:.3g})"
                    )


def _hook(edit: Callable[[Tensor, Tensor], Tensor], module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """A forward hook that edits the output, given the input in either way in which it may be passed."""
    return edit(args[0] if args else next(iter(kwargs.values())), out)


@contextmanager
def evaluating(target: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode back afterwards."""
    training = [module for module in target.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def as_network(target: nn.Module | Network, components: Components) -> Network:
    """A target, or a network that is already wrapped, as a `Network` over the components' weights.

    Raises:
        ValueError: the network decomposes other weights, or weights of other shapes.
    """
    network = target if isinstance(target, Network) else Network(target, components.paths)
    if set(components.paths) != set(network.weights):
        raise ValueError(f"components of {components.paths}, but the network decomposes {list(network.weights)}")
    network._fit(components)
    return network


def _mixture(
    site: Site,
    rows: Tensor,
    components: Components,
    gates: dict[str, Tensor] | None,
    remainder: bool,
    batch: int,
    group: Callable[[Tensor, int], grouped.Groups | None],
) -> Tensor:
    """Output rows of the gated sum of components, less the ungated one where the target's own stays."""
    restarts, n_components = components.A[site.path].shape[:2]
    positions = rows.shape[1:-1]
    flat = rows.reshape(restarts, -1, rows.shape[-1])  # [R, B P, d]
    if gates is None:
        y = flat @ site.sum(components)
        return y.reshape(*rows.shape[:-1], -1)
    g = gates[site.path].flatten(2, -2) if gates[site.path].ndim > 3 else gates[site.path][:, :, None]
    n_positions = flat.shape[1] // batch
    if g.shape[2] not in (1, n_positions):
        raise ValueError(
            f"gates per position for {site.path}: expected positions {list(positions)} at module {site.name!r}, got "
            f"gates of shape {list(gates[site.path].shape[1:])}"
        )
    first, second = site.factors(components)
    m = first.shape[-1]
    if g.dtype == torch.bool and not remainder:
        groups = group(gates[site.path], m)
        if groups is not None:
            y = grouped.apply(groups, flat.unflatten(1, (batch * g.shape[2], -1)), first, second)
            return y.reshape(*rows.shape[:-1], -1)
    g = g.to(rows.dtype)
    if remainder:
        g = g - 1
    u = flat @ first.transpose(1, 2).flatten(2)  # [R, B P, C m]
    u = u.view(restarts, batch, n_positions, n_components, m) * g[..., None]
    y = u.view(restarts, batch * n_positions, n_components * m) @ second.flatten(1, 2)
    return y.reshape(*rows.shape[:-1], -1)


def _group(gates: Tensor, rank: int) -> grouped.Groups | None:
    """The active pairs of gates [R, B, (positions,) C]."""
    return grouped.group(gates.flatten(1, -2), rank)


def _stack_gates(gates: Gates | None, components: Components | None, batch: int) -> dict[str, Tensor] | None:
    """Gates per path, with an axis of restarts: [R, B, (positions,) C]; checked."""
    if gates is None:
        return None
    if components is None:
        raise ValueError("gates need components")
    per_path = dict(gates) if isinstance(gates, Mapping) else {path: gates for path in components.paths}
    lead = () if components.restarts is None else (components.restarts,)
    expected = [*lead, batch, components.n_components]
    for path in components.paths:
        if path not in per_path:
            raise ValueError(f"no gates for {path}; got gates for {list(per_path)}")
        g = per_path[path]
        if [*g.shape[: len(lead) + 1], g.shape[-1]] != expected or g.ndim < len(expected):
            raise ValueError(
                f"gates for {path}: expected {expected} (or positions between the last two axes), got {list(g.shape)}"
            )
        per_path[path] = g if lead else g[None]
    return per_path
