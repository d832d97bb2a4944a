"""The table of operations: registering a raw function gives back the one callable that everybody uses.

In eager mode it calls the raw function directly, because crossing PyTorch's dispatcher costs more than a small kernel. While
``torch.compile`` traces, it goes through an operator ``torch.ops.frskd_fast.*``, whose schema is derived from the raw
function's annotations. The implementation's name is the last argument, a string, and is thereby fixed in the graph.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Any

import torch
from torch import Tensor

from frskd_fast import _dispatch

_library = torch.library.Library("frskd_fast", "FRAGMENT")

# Registered operators by operation, for instance {"combine": ["combine"], "logits": ["logits_forward", "logits_backward"]}.
OPERATORS: dict[str, list[str]] = {}

# Whole numbers may depend on a dynamic batch.
_SCALARS = {Tensor: "Tensor", float: "float", int: "SymInt", bool: "bool", str: "str"}


def _is_group(annotation: Any) -> bool:
    """Whether an argument is a NamedTuple, which travels as its fields."""
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def _schema_type(annotation: Any) -> str:
    """``Sequence[Tensor]`` -> "Tensor[]", ``Tensor | None`` -> "Tensor?", ``float`` -> "float"."""
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Sequence, list, tuple) and (origin is not tuple or arguments[1:] == (...,)):
        return f"{_schema_type(arguments[0])}[]"
    if origin in (UnionType, typing.Union) and NoneType in arguments and len(arguments) == 2:
        return f"{_schema_type(next(part for part in arguments if part is not NoneType))}?"
    raise TypeError(
        f"{annotation!r} has no counterpart in an operator's schema; use tensors, numbers, lists, NamedTuples."
    )


def _fields(name: str, annotation: Any) -> Iterator[str]:
    """The schema of one argument, or of the fields of a NamedTuple."""
    if not _is_group(annotation):
        yield f"{_schema_type(annotation)} {name}"
        return
    for field, field_annotation in typing.get_type_hints(annotation).items():
        yield from _fields(field, field_annotation)


def _flatten(arguments: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for argument in arguments:
        if isinstance(argument, tuple) and hasattr(argument, "_fields"):
            flat += _flatten(argument)
        else:
            flat.append(argument)
    return flat


def _gatherer(annotation: Any) -> Callable[[Iterator[Any]], Any]:
    """What takes one argument from the flat arguments that stand for it. Made once: looking up annotations is slow."""
    if not _is_group(annotation):
        return next
    fields = [_gatherer(field) for field in typing.get_type_hints(annotation).values()]
    make = annotation._make
    return lambda flat: make([take(flat) for take in fields])


def register(operation: str, raw: Callable[..., Any], fake: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """Register ``raw`` as the operator ``frskd_fast::<name>`` and return the callable to use in its place.

    Args:
        operation: the operation it belongs to; ``last_impl`` reports on it by this name.
        raw: the annotated function. Its arguments are tensors, numbers, lists of them, and NamedTuples of all these; the
            last one is ``impl``, the name of the implementation. It returns tensors or lists of tensors.
        fake: the same for tensors without data, with the same strides: gradients are allocated like their inputs.
        name: of the operator; "" takes ``raw``'s without a leading underscore or "raw\\_", after the operation's.

    Returns:
        A callable with ``raw``'s arguments, all of them positional.
    """
    name = name or f"{operation}_{raw.__name__.removeprefix('_').removeprefix('raw_')}"
    hints = typing.get_type_hints(raw)
    kinds = [hints[parameter] for parameter in inspect.signature(raw).parameters]
    arguments = [field for parameter, kind in zip(inspect.signature(raw).parameters, kinds, strict=True)
                 for field in _fields(parameter, kind)]  # fmt: skip
    returned = hints["return"]
    results = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
    outputs = ", ".join(map(_schema_type, results))
    schema = f"{name}({', '.join(arguments)}) -> ({outputs})"

    gatherers = [_gatherer(kind) for kind in kinds]

    def gathered(flat: Sequence[Any]) -> list[Any]:
        rest = iter(flat)
        return [take(rest) for take in gatherers]

    def run(*given: Any) -> Any:
        _dispatch.record(operation, given[-1])
        return raw(*given)

    _library.define(schema, tags=(torch.Tag.needs_exact_strides,))
    _library.impl(name, lambda *flat: run(*gathered(flat)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"frskd_fast::{name}", lambda *flat: fake(*gathered(flat)), lib=_library)
    operator = getattr(torch.ops.frskd_fast, name).default
    OPERATORS.setdefault(operation, []).append(name)

    def call(*given: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*_flatten(given))
        return run(*given)

    call.__doc__ = raw.__doc__
    return call
