"""The one primitive: a network whose weights are sums of gated components.

For inputs x [B, ...] and gates g [B, C], sample b is run with the weights

    sum_c g[b, c] P_c  +  r (theta* - sum_c P_c)          (biases as in the target; r, the remainder, is 0 or 1).

Chapter 3 (parameter space) builds it. The target is never changed: forward hooks edit the outputs of the layers, and
are removed before a call returns. A layer's new output is its own output, less the product of its input and its
weight, plus what the gated components make of that input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import checks
from .components import Components
from .kernels import grouped
from .mixture import mixture
from .rules import Rule
from .sites import Site, Use, by_sample, find_parameter, find_sites, lookup, replaced

Gates = Tensor | Mapping[str, Tensor]
Edit = Callable[[Site, Tensor, Tensor], Tensor]  # (site, input, output) -> the output to go on with


class Network:
    """A target together with the weights that are decomposed and the outputs that count.

    Args:
        target: any network; it is left exactly as it is.
        weights: parameter paths such as "encode.weight"; tied weights count once, under the path given.
        output: picks the outputs that count from what the target returns, giving a tensor [B, ...];
            None takes the target's output as it is.
        hidden: paths of modules whose outputs [B, ...] are recorded for the hidden-activation loss.
        recompute: let autograd work out what the components do in a layer again instead of keeping it.

    Raises:
        KeyError: a path that is not a parameter or a module of the target.
        TypeError: a target that is no module, or compiled; a kind of module without a rule.
        ValueError: no weight, the same weight under two names, a weight that cannot be decomposed as it is.
    """

    def __init__(
        self,
        target: nn.Module,
        weights: Sequence[str],
        output: Callable[[Any], Tensor] | None = None,
        hidden: Sequence[str] = (),
        recompute: bool = False,
    ) -> None:
        if not isinstance(target, nn.Module):
            raise TypeError(f"the target must be a torch.nn.Module, got {type(target).__name__}")
        weights = list(weights) if isinstance(weights, Mapping) else weights  # such as another network's
        if not _paths(weights) or not weights:
            raise ValueError(f"weights must be a list of at least one parameter path, got {weights!r}")
        if not _paths(hidden) or len(set(hidden)) < len(hidden):
            raise ValueError(f"hidden must be a list of module paths, each of them once, got {hidden!r}")
        self.target = target
        self.output = checks.function("output", output)
        self.hidden = list(hidden)
        self.recompute = checks.flag("recompute", recompute)
        self.sites: list[Site] = []
        self.weights: dict[str, Tensor] = {}
        parameters = dict(target.named_parameters(remove_duplicate=False))
        modules = dict(target.named_modules(remove_duplicate=False))
        for name, module in modules.items():
            kinds = {cls.__name__ for cls in type(module).mro()}
            if kinds & {"OptimizedModule", "ScriptModule"} or module._compiled_call_impl is not None:
                raise TypeError(f"module {name!r} is compiled, and hooks do not reach into it: give it uncompiled")
            if isinstance(module, nn.DataParallel):
                raise TypeError(f"module {name!r} is a DataParallel, which splits the samples: give its .module")
        for path in weights:
            parameter = find_parameter(parameters, modules, path)
            for site in self.sites:
                if getattr(site.module, site.parameter) is parameter:
                    raise ValueError(f"{path} and {site.path} are the same tensor: name it once")
            sites = find_sites(target, path, parameter)
            self.sites += sites
            # The module named by the path fixes the matrix's orientation.
            own = next(site.rule for site in sites if not site.transposed)
            self.weights[path] = own.matrix(parameter.detach())
        places = {path: (matrix.dtype, matrix.device) for path, matrix in self.weights.items()}
        if len(set(places.values())) > 1:
            raise ValueError(f"the weights must have one type and one device, got {places}")
        self.replaced = replaced(modules.values(), self.sites)
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
            TypeError: sparse inputs, complex gates.
            ValueError: inputs on which the target does not run, gates or components of the wrong shape, gates that are
                NaN or infinite, a layer whose input does not begin with the samples, a module of `hidden` that gives no
                tensor [B, ...].
        """
        stacked = None if components is None else self._fit(components).stacked()
        copies = 1 if stacked is None else stacked.A[stacked.paths[0]].shape[0]
        batch = len(checks.tensor("x", x, "B", ..., finite=False))
        checks.flag("remainder", remainder)
        full_gates = _stack_gates(gates, components, batch)
        calls = iter(shifts) if shifts is not None else None
        group = cache(grouped.group)  # most often all weights share their gates
        plain = {id(site) for site in self.sites if site.plain}

        def edit(site: Site, value: Tensor, out: Tensor) -> Tensor:
            # With every gate at 1 the remainder completes the sum to the target's own weight.
            whole = remainder and full_gates is None
            used = None if stacked is None or whole or site.path not in stacked.paths else stacked
            if used is None and record is None and calls is None:
                return out
            checks.kind(
                f"what module {site.name!r} gives", out, Tensor, "one tensor: write a rule for its forward pass"
            )
            # Of a copy, since the target may overwrite what the layer has read.
            own = site.rule.rows(value.clone() if used or record is not None else value)
            rows = by_sample(own, copies * batch, site)
            if len(own) == 1:
                out = out.expand(copies * batch, *out.shape[1:])
            new = None
            if used is not None:
                mix = partial(checkpoint, mixture, use_reentrant=False) if self.recompute else mixture
                new = self.leave(mix(site, self.enter(rows), used, full_gates, remainder, batch, group))
                if not remainder and id(site) not in plain:
                    weight = self.weights[site.path]
                    new = new - rows @ (weight.T if site.transposed else weight)
                elif not remainder and site.bias is not None:
                    new = new + site.bias
            if calls is not None:
                shift = next(calls).reshape(*rows.shape[:-1], -1)
                new = shift if new is None else new + shift
            if record is not None:
                width = self.shapes[site.path][0 if site.transposed else 1]
                zeros = rows.new_zeros(*rows.shape[:-1], width, requires_grad=True)
                record.append(Use(site, rows, zeros, out.new_empty(()).expand(out.shape)))
                new = zeros if new is None else new + zeros
            assert new is not None
            laid = site.rule.unrows(new if rows.ndim == own.ndim else new.flatten(0, 1), out).to(out.dtype)
            return laid if used and not remainder and id(site) in plain else out + laid

        repeated = x if copies == 1 else x.expand(copies, *x.shape).flatten(0, 1)
        # What goes wrong with components or inside of torch.func is not for the inputs to blame.
        plain_run = components is None and record is None and shifts is None
        weights = f"weights of {next(iter(self.weights.values())).dtype}"
        with checks.running(x, weights) if plain_run else nullcontext():
            result = self._run(repeated, edit, activations)
        if components is None or components.restarts is None:
            return result
        if activations is not None:
            activations[:] = [a.unflatten(0, (copies, batch)) for a in activations]
        return result.unflatten(0, (copies, batch))

    def enter(self, rows: Tensor) -> Tensor:
        """Pass a layer's input rows to the components; `scale.processes` spreads the gradient over processes."""
        return rows

    def leave(self, outputs: Tensor) -> Tensor:
        """Pass the components' output rows to the layer; `scale.processes` sums them over processes."""
        return outputs

    def _fit(self, components: Components) -> Components:
        checks.kind("components", components, Components, "Components (a result has .components)")
        for path in components.paths:
            if path not in self.weights:
                raise ValueError(f"components of {path}, but the network decomposes {list(self.weights)}")
            a, w = components.A[path], self.weights[path]
            shape = (a.shape[-2], components.B[path].shape[-1])
            if shape != self.shapes[path]:
                raise ValueError(f"{path}: components of shape {shape}, but the weight is {self.shapes[path]}")
            if a.dtype != w.dtype and not torch.is_autocast_enabled(w.device.type):
                raise TypeError(f"{path}: components of {a.dtype}, but the weight is {w.dtype}")
        return components

    def _run(self, x: Tensor, edit: Edit, activations: list[Tensor] | None = None) -> Tensor:
        found: list[str] = []

        def keep(name: str, module: nn.Module, args: Any, out: Any) -> None:
            if not isinstance(out, Tensor) or out.ndim == 0 or len(out) != len(x):
                what = f"a tensor {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(f"hidden module {name!r} must give a tensor of {len(x)} samples, it gives {what}")
            found.append(name)
            activations.append(out.clone())  # type: ignore[union-attr]  # what comes next may overwrite it

        with ExitStack() as undo:
            for site in self.sites:
                if site.rule.forward is None:
                    hook = partial(_hook, partial(edit, site))
                    undo.callback(site.module.register_forward_hook(hook, with_kwargs=True).remove)
            for module, rules in self.replaced:
                forward = next(rule.forward for rule in rules.values() if rule.forward)
                product = partial(self._product, edit, module, rules)
                undo.enter_context(patch.object(module, "forward", partial(forward, product)))
            for name in self.hidden if activations is not None else ():
                undo.callback(self.target.get_submodule(name).register_forward_hook(partial(keep, name)).remove)
            undo.enter_context(evaluating(self.target))
            out = self.target(x)
        if activations is not None and set(found) != set(self.hidden):
            raise ValueError(f"hidden modules {sorted(set(self.hidden) - set(found))} were never called")
        if self.output is not None:
            out = checks.picked(self.output, out)
        if not isinstance(out, Tensor):
            raise TypeError(f"the target returns {type(out).__name__}, not a tensor: pick one with output=")
        if out.ndim == 0 or len(out) != len(x):
            raise ValueError(
                f"the outputs must keep the batch axis: {len(x)} inputs gave a tensor of shape {list(out.shape)}"
            )
        return out

    def _product(self, edit: Edit, module: nn.Module, rules: Mapping[str, Rule], name: str, value: Tensor) -> Tensor:
        """Multiply an input by a parameter, for the forward pass that a rule gives."""
        rule = rules[name]
        out = rule.unrows(rule.rows(value) @ rule.matrix(getattr(module, name)), value)
        site = next((site for site in self.sites if site.module is module and site.parameter == name), None)
        return out if site is None else edit(site, value, out)

    def check(self, x: Tensor, tolerance: float = 1e-3) -> None:
        """Make sure that this network does what its definition says, on a few inputs; see `check`.

        Args:
            x: inputs [B, ...].
            tolerance: largest accepted difference, relative to the change of the outputs and to the gradients.

        Raises:
            ValueError: what is not reproduced, with the parameter path and the module; inputs or outputs that are
                empty or not finite; a target that is not deterministic or in which samples mix.
        """
        from .check import check

        check(self, x, tolerance)


def _paths(names: object) -> bool:
    return isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)


def _hook(edit: Callable[[Tensor, Tensor], Tensor], module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """Edit a layer's output, as a forward hook; the input may come by position or by name."""
    if not isinstance(value := args[0] if args else next(iter(kwargs.values()), None), Tensor):
        raise TypeError(f"{type(module).__name__}: its first argument must be its input, got {type(value).__name__}")
    return edit(value, out)


@contextmanager
def evaluating(target: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside, and restore every module's own mode afterwards.

    Torch's fused encoder layers are off, too: they are taken without gradients alone, where padding gets other outputs.
    """
    training = [module for module in target.modules() if module.training]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in training:
            module.training = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in training:
            module.training = True


def as_network(target: nn.Module | Network, components: Components) -> Network:
    """Wrap a target as a `Network` over the components' weights; one that is wrapped already is checked.

    Raises:
        ValueError: the network decomposes other weights, or weights of other shapes.
    """
    network = target if isinstance(target, Network) else Network(target, components.paths)
    if set(components.paths) != set(network.weights):
        raise ValueError(f"components of {components.paths}, but the network decomposes {list(network.weights)}")
    network._fit(components)
    return network


def _stack_gates(gates: Gates | None, components: Components | None, batch: int) -> dict[str, Tensor] | None:
    """Give the gates per path, with an axis of restarts: [R, B, (positions,) C]; checked."""
    if gates is None:
        return None
    if components is None:
        raise ValueError("gates need components")
    per_path = dict(gates) if isinstance(gates, Mapping) else {path: gates for path in components.paths}
    lead = () if components.restarts is None else (components.restarts,)
    g = None
    for path in components.paths:
        if path not in per_path:
            raise ValueError(f"no gates for {path}; got gates for {list(per_path)}")
        checked, g = g, per_path[path]
        with suppress(RuntimeError):  # inside torch.vmap, tensors do not tell what they hold
            shape = *lead, batch, ..., components.n_components
            checks.tensor(f"gates for {path}", g, *shape, finite=g is not checked)
        per_path[path] = g if lead else g[None]
    return per_path
