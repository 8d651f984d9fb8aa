"""Checks of arguments: each returns the argument, or raises an error naming what was given and what is expected."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .decomposition import Decomposition

CALLED_WITH = {
    "batches": ["step", "generator"],
    "output": ["outputs of the target"],
    "divergence": ["outputs", "target outputs"],
    "attribution": ["network", "components", "x"],
    "judge": ["network", "components", "x"],
    "callback": ["step", "losses", "components"],
}


class NotFinite(ValueError):
    """Computed numbers are NaN or infinite."""


class NonFiniteLoss(ArithmeticError):
    """A loss became NaN or infinite. Its `result` is the last finite state, marked unfinished."""

    def __init__(self, message: str, result: Decomposition) -> None:
        super().__init__(message)
        self.result = result


def given(value: Any) -> str:
    """Describe a value for an error message: shortened, tensors by shape and type."""
    return f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else reprlib.repr(value)


def plain(value: Any) -> Any:
    """Convert a numpy scalar or a tensor without axes to a Python value; return anything else unchanged."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    whole: bool = False,
) -> Any:
    """Check for a finite number in [low, high], excluding `low` if it must be above, and `high` if below.

    Numpy scalars and tensors without axes count as numbers, bools and text do not.

    Returns:
        Any: an int if it must be whole, else an int or a float, as it was given.

    Raises:
        TypeError: not a number.
        ValueError: NaN, infinite, out of range or not whole.
    """
    got = plain(value)
    lower = f"{'above' if above else 'at least'} {low}" if math.isfinite(low) else ""
    upper = f"{'below' if below else 'at most'} {high}" if math.isfinite(high) else ""
    limits = " and ".join(filter(None, (lower, upper)))
    kind = "a whole number" if whole else "a finite number"
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        raise TypeError(f"{name} must be {kind} {limits}".rstrip() + f", got {given(value)}")
    if isinstance(got, int) and got.bit_length() > 63:
        raise ValueError(f"{name} must be a number that fits 64 bits, got an int of {got.bit_length()} bits")
    if not -math.inf < got < math.inf:
        raise ValueError(f"{name} must be {limits + ' and ' if limits else ''}finite, got {got!r}")
    if not (low < got if above else low <= got) or not (got < high if below else got <= high):
        raise ValueError(f"{name} must be {limits}, got {got!r}")
    if whole and got != int(got):
        raise ValueError(f"{name} must be {kind} {limits}".rstrip() + f", got {got!r}")
    return int(got) if whole else got


def flag(name: str, value: Any) -> bool:
    """Check for a bool; numpy's and torch's count, the text "False" does not.

    Args:
        name: of the argument, for the message.
        value: what was given.

    Raises:
        TypeError: no bool.
    """
    got = plain(value)
    if not isinstance(got, bool):
        raise TypeError(f"{name} must be True or False, got {given(value)}")
    return got


def choice(name: str, value: Any, options: Sequence[str]) -> str:
    """Check for one of some names.

    Args:
        name: of the argument, for the message.
        value: what was given.
        options: the names.

    Raises:
        TypeError, ValueError: another value.
    """
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {list(options)}, got {given(value)}")
    return value


def kind(name: str, value: Any, expected: Any, what: str) -> Any:
    """Check for an instance of a class (None counts if NoneType is among the classes).

    Args:
        name: of the argument, for the message.
        value: what was given.
        expected: the class, or a tuple of classes.
        what: a name for them in the message.

    Raises:
        TypeError: an instance of another class.
    """
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be {what}, got {given(value)}")
    return value


def generator(value: Any) -> None:
    """Check for a torch.Generator, or None."""
    kind("generator", value, (torch.Generator, type(None)), "a torch.Generator or None")


def tensor(
    name: str, value: Any, *shape: Any, finite: bool = True, real: bool | None = None, like: Any = None
) -> Tensor:
    """Check for a tensor of a shape: sizes, names of sizes above 0, and at most one `...` for any number of axes.

    Args:
        name: of the argument, for the message.
        value: what was given.
        shape: what is expected.
        finite: refuse NaN and infinite numbers.
        real: True refuses all but floating-point types, None complex ones, False none.
        like: refuse all but the type of these weights, unless autocast makes them alike.

    Raises:
        TypeError: no tensor, a sparse or nested one, or one of a type that `real` or `like` refuses.
        ValueError: another shape.
        NotFinite: NaN or infinite numbers, where `finite` asks for none.
    """
    kind(name, value, Tensor, "a tensor")
    if value.is_nested or value.layout != torch.strided:
        got = "a nested one" if value.is_nested else f"one in {value.layout}: give its .to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {got}")
    sizes, expected = list(value.shape), list(shape)
    if ... in expected:
        at = expected.index(...)
        expected[at : at + 1] = [None] * (len(sizes) - len(expected) + 1)
    if len(expected) != len(sizes) or any(isinstance(w, int) and w != s for w, s in zip(expected, sizes, strict=True)):
        axes = ", ".join("..." if axis is ... else str(axis) for axis in shape)
        raise ValueError(f"{name} must be of shape [{axes}], got {given(value)}")
    if any(isinstance(w, str) and s == 0 for w, s in zip(expected, sizes, strict=True)):
        raise ValueError(f"{name} must hold at least one number, got {given(value)}")
    if value.is_complex() if real is None else real and not value.is_floating_point():
        instead = ".real" if value.is_complex() else ".float()"
        raise TypeError(f"{name} must hold real numbers in floating point, got {given(value)}: give its {instead}")
    if like is not None and value.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise TypeError(f"{name} must be of {like.dtype}, as the weights are, got {given(value)}")
    # Their sum is finite if all are, and taken in one pass; of large ones it may overflow.
    if finite and value.dtype != torch.bool and not value.sum().isfinite() and not value.isfinite().all():
        raise NotFinite(f"{name} must be finite, got NaN or infinite numbers in {given(value)}")
    return value


def gates(name: str, value: Any, *shape: Any) -> Tensor:
    """Check for gates of a shape: boolean, or numbers in [0, 1].

    Raises:
        TypeError: no tensor, or a complex one.
        ValueError: another shape, or numbers that are NaN or out of range.
    """
    plain = tensor(name, value, *shape, finite=False).detach()
    if plain.dtype != torch.bool and not ((plain >= 0) & (plain <= 1)).all():
        numbers = f"numbers from {float(plain.min()):.3g} to {float(plain.max()):.3g}"
        raise ValueError(f"{name} must be boolean or in [0, 1], got {given(value)}, {numbers}")
    return value


def leaves(name: str, value: Any) -> None:
    """Check for leaf tensors that are to be trained.

    Raises:
        TypeError: something else, or one that needs no gradient.
    """
    for p in kind(name, value, (list, tuple), "a list of leaf tensors"):
        if not kind(name, p, Tensor, "a list of leaf tensors").requires_grad or not p.is_leaf:
            raise TypeError(f"{name} must be leaf tensors that require gradients, got {given(p)}, which is none")


def matrices(name: str, value: Any, shapes: Mapping[str, Sequence[Any]], finite: bool = True, like: Any = None) -> None:
    """Check for a mapping from exactly these parameter paths to tensors of these shapes.

    Raises:
        TypeError, ValueError: other paths, or a tensor of another shape or of no floating point numbers.
    """
    kind(name, value, Mapping, "a mapping from parameter paths to tensors")
    if set(value) != set(shapes):
        raise ValueError(f"{name} must have the parameter paths {list(shapes)}, got {list(value)}")
    for path, shape in shapes.items():
        tensor(f"{name}: {path}", value[path], *shape, finite=finite, real=True, like=like)


def inputs(x: Any) -> Tensor:
    """Check inputs [B, ...] of a network: a tensor, not empty, finite.

    Raises:
        TypeError, ValueError: no tensor, an empty one, or one with NaN or infinite numbers.
    """
    kind("x", x, Tensor, "one tensor [B, ...] (wrap a network that takes more in a module that takes one)")
    return tensor("x", x, "B", ..., real=False)


@contextmanager
def running(x: Tensor, weights: str, what: str = "does not run on x") -> Iterator[None]:
    """Name the inputs and weights in the error, where torch reports that a network does not run on them.

    Args:
        x: the inputs.
        weights: what is said of them.
        what: the target does not do.

    Raises:
        ValueError: torch reports that the network does not run; the message repeats its words.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if type(error) not in (RuntimeError, IndexError):  # out of memory, or an operation without a derivative
            raise
        raise ValueError(f"the target {what}, {given(x)}, with {weights}: {error}") from error


def picked(output: Callable[[Any], Any], out: Any) -> Any:
    """Apply `output` to what a target returns.

    Raises:
        TypeError: it does not fit that.
    """
    try:
        return output(out)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise TypeError(f"output= does not fit what the target returns, {given(out)}: {error!r}") from error


def function(name: str, value: Any) -> Callable[..., Any] | None:
    """Check for a function that takes what it will be called with (`CALLED_WITH`), or None.

    Args:
        name: of the argument, for the message.
        value: what was given.

    Raises:
        TypeError: neither a function nor None, or a function of other arguments.
    """
    if value is not None:
        _takes(name, value, CALLED_WITH[name])
    return value


def methods(value: Any, protocol: type) -> Any:
    """Check that the methods of an object take what they will be called with: all that the protocol's take; or None.

    Args:
        value: an instance of a subclass of the protocol, or None.
        protocol: the class whose methods they stand for.

    Raises:
        TypeError: a method of other arguments, or something else of its name.
    """
    for name, own in vars(protocol).items():
        if value is not None and inspect.isfunction(own):
            expected = list(inspect.signature(own).parameters)[1:]  # without self
            _takes(f"{type(value).__name__}.{name}", getattr(value, name), expected)
    return value


def _takes(name: str, value: Any, arguments: Sequence[str]) -> None:
    """Raise a TypeError if this is no function, or one that cannot be called with so many arguments, by position."""
    expected = ", ".join(arguments)
    if not callable(value):
        raise TypeError(f"{name} must be a function of ({expected}), got {given(value)}")
    with suppress(ValueError):  # some built-in functions do not tell what they take
        takes = inspect.signature(value.forward if isinstance(value, torch.nn.Module) else value)
        try:
            takes.bind(*arguments)
        except TypeError as error:
            raise TypeError(f"{name} must take ({expected}), got a function of {takes}: {error}") from None


def joined(batches: list[Tensor]) -> Tensor:
    """Join batches to one.

    Raises:
        ValueError: their samples have different shapes.
    """
    shapes = {tuple(x.shape[1:]): None for x in batches}
    if len(shapes) > 1:
        first, other = (list(shape) for shape in [*shapes][:2])
        raise ValueError(
            f"batches must give inputs of one shape, got samples of {first} and of {other}: several batches are joined "
            "to tidy and to compare restarts; pad them"
        )
    return torch.cat(batches)


def batch(x: Any, step: int) -> Tensor:
    """Check what a source of batches gave for a step, and copy it, so that the source may use its memory again.

    Raises:
        TypeError: a sparse or a nested tensor.
        ValueError: no tensor, an empty one, or numbers that are NaN or infinite.
    """
    if isinstance(x, Tensor):
        tensor(f"what batches(step={step}) gives", x, ..., finite=False, real=False)
    if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == 0:
        from .hints import instead

        raise ValueError(f"batches(step={step}) must give a tensor [B, ...] with B at least 1, got {instead(x)}")
    if x.is_floating_point() and not torch.isfinite(x).all():
        raise ValueError(f"batches(step={step}) gave NaN or infinite inputs")
    return x.clone()
