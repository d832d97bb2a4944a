"""Calls of every public function and loss: those of their examples and of the declared problems, changed at random.

Nothing is listed here. A function of `frskd_fast.functional` and a loss of `frskd_fast.losses` have an example in their
docstring, and an operation has tests/problems/<operation>.py: the call in there is caught before it runs.
"""

from __future__ import annotations

import contextlib
import copy
import doctest
import functools
import inspect
import io
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import problems
import torch
from problems._hostile import Hostile
from torch import Tensor, nn

from frskd_fast import functional, losses
from frskd_fast.reference.dtypes import accumulate_dtype

# What is changed; each has random numbers of its own, so that a finding can be repeated without some of them.
CHANGES = ("sizes", "dtypes", "options", "values", "layouts", "freed")

LARGEST = 2**18  # elements of a tensor whose size is drawn


class _Caught(BaseException):
    """Ends an example or a problem at the call that was looked for."""

    def __init__(self, call: Call) -> None:
        self.call = call


@dataclass(frozen=True)
class Call:
    """A call that can be repeated by any implementation.

    Attributes:
        name: of the function, or of the loss's class.
        arguments: by name.
        loss: None for a function.
        learning: paths of the tensors that a gradient is wanted of.
        freed: whether one tensor's memory was given back, so that the call has to be refused.
    """

    name: str
    arguments: dict[str, Any]
    loss: nn.Module | None = None
    learning: frozenset[str] = frozenset()
    freed: bool = False
    changes: tuple[str, ...] = field(default=(), compare=False)

    def function(self, loss: nn.Module | None) -> Callable[..., Any]:
        """What is called; `loss` stands for this call's own."""
        return loss if loss is not None else getattr(functional, self.name)

    def describe(self) -> str:
        """The arguments, one a line."""
        lines = [] if self.loss is None else [f"  loss: {type(self.loss).__name__}({self.loss.extra_repr()})"]
        for name, value in self.arguments.items():
            for path, leaf in leaves(value, name):
                lines.append(f"  {path}: {_described(leaf)}{' with gradient' if path in self.learning else ''}")
        return "\n".join(lines)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    text = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    text += "" if value.is_contiguous() else f" strides {value.stride()}"
    if value.numel() and value.is_floating_point() and value.untyped_storage().nbytes() > 0:
        with contextlib.suppress(RuntimeError):  # of one that was freed
            wide = value.double().nan_to_num(0.0, float("inf"), -float("inf"))
            text += f" in [{wide.min():.3g}, {wide.max():.3g}]"
            text += " with NaN" if value.isnan().any() else ""
    return text


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything inside nested lists, tuples and dicts, with its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def mapped(value: Any, path: str, function: Callable[[str, Any], Any]) -> Any:
    """`value` with everything inside replaced by ``function(path, it)``."""
    if isinstance(value, Mapping):
        return {key: mapped(inner, f"{path}[{key!r}]", function) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        inner = [mapped(one, f"{path}[{index}]", function) for index, one in enumerate(value)]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return function(path, value)


def functions() -> list[str]:
    """Names of the public functions."""
    return [name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))]


def loss_names() -> list[str]:
    """Names of the public losses, one for each class."""
    classes = {getattr(losses, name) for name in losses.__all__}
    return sorted(one.__name__ for one in classes if isinstance(one, type) and issubclass(one, nn.Module))


def sources() -> dict[str, Callable[[random.Random], Call | None]]:
    """Where calls are taken from, by name: each public function and loss, and each operation with problems."""
    found: dict[str, Callable[[random.Random], Call | None]] = {}
    for name in (*functions(), *loss_names()):
        found[name] = functools.partial(_of_example, name)
    for operation in problems.operations():
        if _of_problem(operation, random.Random(0)) is not None:  # some are reached through losses only
            found[f"problems of {operation}"] = functools.partial(_of_problem, operation)
    return found


@contextlib.contextmanager
def _catching(name: str) -> Iterator[None]:
    """The call of a function or loss raises `_Caught` instead."""
    holder, attribute = (functional, name) if hasattr(functional, name) else (getattr(losses, name), "forward")
    original = getattr(holder, attribute)
    signature = inspect.signature(original)

    def catch(*arguments: Any, **more: Any) -> Any:
        bound = dict(signature.bind(*arguments, **more).arguments)
        bound.pop("impl", None)
        raise _Caught(Call(name, bound, bound.pop("self", None)))

    own = attribute in vars(holder)
    setattr(holder, attribute, catch)
    try:
        yield
    finally:
        if own:
            setattr(holder, attribute, original)
        else:
            delattr(holder, attribute)


@functools.cache
def _example(name: str) -> Call:
    """The call in the example of a function or loss."""
    owner = getattr(functional, name, None) or getattr(losses, name)
    examples = [test for test in doctest.DocTestFinder(recurse=False).find(owner, name) if test.examples]
    if not examples:
        raise LookupError(f"The docstring of {name} has no example, from which the campaign takes its call.")
    source = "".join(example.source for example in examples[0].examples)
    # An example calls the function as its reader has imported it, which is after the catch was set.
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()), _catching(name):
        torch.manual_seed(0)
        try:
            exec(compile(source, name, "exec"), dict(vars(functional)))
        except _Caught as caught:
            return caught.call
    raise LookupError(f"The example of {name} does not call it.")


def _of_example(name: str, draw: random.Random) -> Call:
    call = _example(name)
    if call.loss is None:
        return call
    loss = copy.deepcopy(call.loss)
    for attribute, value in vars(loss).items():  # alpha, beta, temperature, ...
        if type(value) is float and draw.random() < 0.3:
            setattr(loss, attribute, value * draw.choice((1.25, 1.5, 2.0)))
    return replace(call, loss=loss, arguments={**call.arguments})


def _of_problem(operation: str, draw: random.Random) -> Call | None:
    problem = draw.choice(list(problems.problems(operation)))
    with contextlib.ExitStack() as stack:
        for name in functions():
            stack.enter_context(_catching(name))
        try:
            problem.run("reference", "cpu")
        except _Caught as caught:
            return caught.call
        except Exception:  # a problem without a public function may have failed for want of one
            return None
    return None


def _accumulated(dtype: torch.dtype, like: Tensor) -> torch.dtype:
    return accumulate_dtype(dtype) if like.dim() < 2 else dtype


def drawn(source: str, seed: int, without: tuple[str, ...] = ()) -> Call | None:
    """The call of `seed`, without some of `CHANGES`; None where the source has none."""
    hostile = {change: Hostile(f"{seed}/{change}") for change in CHANGES}
    torch.manual_seed(seed)
    call = _sources()[source](random.Random(f"{seed}/source"))
    if call is None:
        return None
    made: list[str] = []

    def wanted(change: str, share: float) -> bool:
        chosen = hostile[change].random.random() < share and change not in without
        made.extend([change] * chosen)
        return chosen

    arguments = call.arguments
    wide = [leaf for _, leaf in leaves(arguments, "") if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    sizes = _sizes(arguments, hostile["sizes"]) if wanted("sizes", 0.7) else {}
    largest = max((math.prod(_resized_shape(one, sizes)) for one in wide), default=0)
    sizes = sizes if largest <= LARGEST else {}
    change_dtype, change_values = wanted("dtypes", 0.5), wanted("values", 0.45)
    dtype = hostile["dtypes"].random.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    before = wide[0].dtype if wide else torch.float32

    def resized(path: str, value: Any) -> Any:
        if isinstance(value, nn.BatchNorm2d):
            count = value.num_features
            module = nn.BatchNorm2d(sizes[1, count]) if (1, count) in sizes else copy.deepcopy(value)
            return module.to(accumulate_dtype(dtype if change_dtype else before))
        if type(value) is int and path.startswith("size["):
            return sizes.get((2, value), value)
        if not isinstance(value, Tensor):
            return value
        shape = _resized_shape(value, sizes)
        if value.is_floating_point():
            kind = dtype if change_dtype and value.dtype in (before, accumulate_dtype(before)) else value.dtype
            kind = _accumulated(kind, value) if change_dtype else kind
            if list(value.shape) == shape and value.detach().ne(0).any() and "example" not in source:
                return value.detach().to(kind) if kind != value.dtype else value.detach()
            numbers = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
            numbers = numbers.softmax(1) if path.startswith("targets") and value.dim() > 1 else numbers
            return numbers.to(accumulate_dtype(kind) if path.startswith("targets") else kind)
        if value.dtype == torch.int64 and (list(value.shape) != shape or sizes):
            classes = min((size for (axis, _), size in sizes.items() if axis == 1), default=1)
            return torch.randint(max(classes, 1), shape, generator=generator)
        return value

    arguments = {name: mapped(value, name, resized) for name, value in arguments.items()}
    if wanted("options", 0.5):
        arguments = _options(call, arguments, hostile["options"].random)
    if change_values:
        arguments = _values(arguments, hostile["values"].random, generator)
    if wanted("layouts", 0.6):
        arguments = {
            name: mapped(value, name, lambda _, one: hostile["layouts"].layout(one) if _is_map(one) else one)
            for name, value in arguments.items()
        }
    tensors = [
        (path, leaf)
        for name, value in arguments.items()
        for path, leaf in leaves(value, name)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    learning = frozenset(path for path, _ in tensors if hostile["options"].random.random() < 0.85)
    victims = [path for path, leaf in tensors if leaf.numel() > 1]
    # PyTorch's own operations read what was given back, so this is for functions whose first step is a kernel of ours.
    freed = bool(victims) and source.startswith("problems of") and wanted("freed", 0.02)
    if freed:
        victim = hostile["freed"].random.choice(victims)
        arguments = {
            name: mapped(value, name, lambda path, one: _freed(one) if path == victim else one)
            for name, value in arguments.items()
        }
    return Call(call.name, arguments, call.loss, learning, freed, tuple(made))


@functools.cache
def _sources() -> dict[str, Callable[[random.Random], Call | None]]:
    return sources()


def _freed(tensor: Tensor) -> Tensor:
    """A copy whose memory was given back, as sharding does with what it does not need for the moment."""
    copied = tensor.clone()
    copied.untyped_storage().resize_(0)
    return copied


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


def _sizes(arguments: dict[str, Any], hostile: Hostile) -> dict[tuple[int, int], int]:
    """New sizes of (axis, size): axis 0 are images, 1 channels and classes, 2 pixels. Multiples stay multiples."""
    tensors = [leaf for _, leaf in leaves(arguments, "") if isinstance(leaf, Tensor)]
    old: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for tensor in tensors:
        for axis, size in _axes(tensor):
            old[axis].add(size)
    new: dict[tuple[int, int], int] = {}
    for axis, sizes in old.items():
        if axis and hostile.random.random() < 0.5:
            new.update({(axis, size): size for size in sizes})
            continue
        least = min((size for size in sizes if size), default=1)
        for size in sorted(sizes):
            quarter = size // 4 if size % 4 == 0 else None
            if axis == 0:
                new[axis, size] = size // least * new.get((0, least), hostile.size())
            elif axis == 1 and (axis, quarter) in new:
                new[axis, size] = 4 * new[axis, quarter]  # type: ignore[index]
            else:
                new[axis, size] = hostile.size() if hostile.random.random() < 0.95 else 130
    return new


def _axes(tensor: Tensor) -> list[tuple[int, int]]:
    """The kind and size of each axis; vectors of floating-point numbers are weights of something."""
    if tensor.dim() < 2 and tensor.is_floating_point():
        return [(1, size) for size in tensor.shape]
    second = 1 if tensor.is_floating_point() else 2
    return [(min(axis, 1) * (second if axis == 1 else 2), size) for axis, size in enumerate(tensor.shape)]


def _resized_shape(tensor: Tensor, sizes: dict[tuple[int, int], int]) -> list[int]:
    return [sizes.get(key, key[1]) for key in _axes(tensor)]


def _options(call: Call, arguments: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Other numbers and switches, by their defaults' types."""
    function = type(call.loss).forward if call.loss is not None else getattr(functional, call.name)
    changed = dict(arguments)
    for name, parameter in inspect.signature(function).parameters.items():
        value = arguments.get(name, parameter.default)
        if isinstance(value, bool) and draw.random() < 0.3:
            changed[name] = not value
        elif type(value) is float and draw.random() < 0.3:
            changed[name] = draw.choice([0.0, 0.3, 1.0, 1.5, 2.0, 10.0])
    return changed


def _values(arguments: dict[str, Any], draw: random.Random, generator: torch.Generator) -> dict[str, Any]:
    """Numbers at the edges, in one tensor or in all of them."""
    paths = [
        path
        for name, value in arguments.items()
        for path, leaf in leaves(value, name)
        if isinstance(leaf, Tensor) and leaf.numel() and path.split("[")[0] not in ("batch_norms",)
    ]
    if not paths:
        return arguments
    chosen = set(paths) if draw.random() < 0.5 else {draw.choice(paths)}
    kind = draw.choice(["huge", "largest", "tiny", "subnormal", "zero", "constant", "spread", "inf", "-inf", "nan"])

    def change(path: str, value: Any) -> Any:
        if path not in chosen or not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            if value.dtype == torch.int64 and draw.random() < 0.3:
                wrong = draw.choice([-100, -1, 10**6])
                return value.where(torch.rand(value.shape, generator=generator) < 0.7, wrong)
            return value
        limits = torch.finfo(value.dtype)
        wide = value.double()
        if kind == "huge":
            return (wide * limits.max**0.5).to(value.dtype)
        if kind == "largest":
            return (wide.sign() * limits.max).to(value.dtype)
        if kind == "tiny":
            return (wide * limits.smallest_normal**0.5).to(value.dtype)
        if kind == "subnormal":
            return (wide * limits.smallest_normal / 8).to(value.dtype)
        if kind == "zero":
            return torch.zeros_like(value)
        if kind == "constant":
            return torch.full_like(value, 1.7)
        if kind == "spread":
            scale = 10.0 ** torch.empty(value.shape, dtype=torch.float64).uniform_(-3, 3, generator=generator)
            return (wide * scale).to(value.dtype)
        place = int(torch.randint(value.numel(), (), generator=generator))
        flat = value.clone(memory_format=torch.contiguous_format).reshape(-1)
        flat[place] = float(kind)
        return flat.reshape(value.shape)

    return {name: mapped(value, name, change) for name, value in arguments.items()}
