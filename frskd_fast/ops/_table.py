"""The table of operations: registering a raw function gives back the one callable that everybody uses.

In eager mode it calls the raw function directly, because crossing PyTorch's dispatcher costs more than a small kernel. While
``torch.compile`` traces, it goes through an operator ``torch.ops.frskd_fast.*``, whose schema is derived from annotations. The
implementation's name is the last argument, a string, and is thereby fixed in the graph.
"""

from __future__ import annotations

import functools
import typing
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from frskd_fast import _dispatch

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("frskd_fast", "FRAGMENT")

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


def _version(source: str, operation: str, implementation: str) -> str:
    """Changes with the file of a fake and with that of the raw functions, which says how much they keep."""
    files = (source, getattr(_dispatch.raw(operation, implementation), "__file__", None))
    contents = [Path(file).read_bytes() for file in files if file is not None and Path(file).is_file()]
    return f"{zlib.crc32(b''.join(contents)):08x}"


# As `_dispatch.choose`: a traced graph takes it as a constant, and calling torch.compiler here would import the compiler.
_version._dynamo_marked_constant = True  # type: ignore[attr-defined]


def register(operation: str, function: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a fake: the callable that takes its place runs the raw function ``function`` of ``operation``.

    The fake is the annotated signature, the docstring, and the results for tensors without data, with the strides that the
    results will have. Its arguments are those of the raw function (tensors, numbers, lists of them, and NamedTuples of all
    these), all positional, and behind them ``impl``, the name of the implementation. The operator is called
    ``frskd_fast::<operation>_<function>``, or by the function's name where that begins with the operation's.

    In a graph the operator has one more argument, ``version``. Inductor's cache on the disk knows a graph by its operators
    and their arguments alone: without it, code that an older version of this library left there would be run, with the
    sizes of older results.

    Args:
        operation: the operation it belongs to; ``last_impl`` reports on it by this name.
        function: name of the raw function in the modules of the implementations; "" is the fake's own.
    """

    def registered(fake: Callable[P, R]) -> Callable[P, R]:
        raw_name = function or fake.__name__
        name = raw_name if raw_name.startswith(operation) else f"{operation}_{raw_name}"
        hints = typing.get_type_hints(fake)
        returned = hints.pop("return")
        arguments = ", ".join(field for parameter, kind in hints.items() for field in _fields(parameter, kind))
        results = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
        gatherers = [_gatherer(kind) for kind in hints.values()]

        def gathered(flat: Sequence[Any]) -> list[Any]:
            rest = iter(flat)
            return [take(rest) for take in gatherers]

        def run(*given: Any) -> Any:
            *arguments, implementation = given
            _dispatch.record(operation, implementation)
            return getattr(_dispatch.raw(operation, implementation), raw_name)(*arguments)

        _library.define(
            f'{name}({arguments}, *, str version="") -> ({", ".join(map(_schema_type, results))})',
            tags=(torch.Tag.needs_exact_strides,),
        )
        _library.impl(name, lambda *flat, version="": run(*gathered(flat)), "CompositeExplicitAutograd")
        untyped: Callable[..., Any] = fake
        torch.library.register_fake(
            f"frskd_fast::{name}", lambda *flat, version="": untyped(*gathered(flat)), lib=_library
        )
        operator = getattr(torch.ops.frskd_fast, name).default
        source = fake.__code__.co_filename

        @functools.wraps(fake)
        def call(*given: P.args, **_: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                version = _version(source, operation, typing.cast(str, given[-1]))
                result: R = operator(*_flatten(given), version=version)
                return result
            return run(*given)  # type: ignore[no-any-return]

        return call

    return registered
