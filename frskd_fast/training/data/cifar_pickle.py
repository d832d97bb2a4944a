"""The pickles of CIFAR's authors, without calling anything that they name."""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import numpy.typing


class _DType:
    """What a pickle says of a NumPy dtype. Its state is not looked at: with one, NumPy could be led to foreign memory."""

    def __init__(self, code: Any, *copy: Any) -> None:
        if not isinstance(code, bytes | str):
            raise pickle.UnpicklingError("it has an array without a dtype")
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        self.little_endian = state[1] in ("<", "|", b"<", b"|")

    little_endian = True

    def checked(self) -> numpy.dtype[Any]:
        """The dtype, of plain numbers alone."""
        if re.fullmatch("[biuf][1248]", self.code) is None or self.code == "f1":
            raise pickle.UnpicklingError(f"it has an array of dtype {self.code!r}, but numbers were wanted")
        return numpy.dtype(self.code).newbyteorder("<" if self.little_endian else ">")


class _Array:
    """What a pickle says of a NumPy array."""

    def __init__(self, content: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C") -> None:
        self.content, self.dtype, self.shape, self.fortran = content, dtype, shape, order in ("F", b"F")

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def made(self) -> numpy.typing.NDArray[Any]:
        """The array, once its size is that of the bytes in the file."""
        if not isinstance(self.dtype, _DType) or not isinstance(self.content, bytes | bytearray):
            raise pickle.UnpicklingError("it has an array without bytes or without a dtype")
        dtype = self.dtype.checked()
        # Of a text the product would be as long as the file says.
        if type(self.shape) is not tuple or not all(type(side) is int and side >= 0 for side in self.shape):
            raise pickle.UnpicklingError("it has an array whose shape is no tuple of whole numbers")
        if len(self.shape) > 2:
            raise pickle.UnpicklingError(f"it has an array of {len(self.shape)} dimensions")
        if dtype.itemsize * math.prod(self.shape) != len(self.content):
            raise pickle.UnpicklingError(f"it has an array of shape {self.shape} with {len(self.content)} bytes")
        flat = numpy.frombuffer(self.content, dtype)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError("it has a text in another encoding than latin1")
    return text.encode("latin1")


# What the files of CIFAR ask for, under its names of yesterday and today, and what they get in its place.
STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),
    ("numpy.core.numeric", "_frombuffer"): _Array,
    ("numpy._core.numeric", "_frombuffer"): _Array,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encoded,
    ("builtins", "bytes"): lambda: b"",
}


PythonUnpickler: Any = pickle._Unpickler  # the one in Python, whose opcodes can be given other methods


class _RestrictedUnpickler(PythonUnpickler):  # type: ignore[misc]
    """Plain values and arrays of numbers: no function or class outside of this file is ever called.

    The keys of dictionaries are texts: a tuple of tuples of tuples, which takes few bytes in a file, would be hashed for
    years.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        # Python 2's name of the module, where the translation of old names does not reach.
        wanted = (module.replace("__builtin__", "builtins"), name)
        if wanted not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR needs")
        return STAND_INS[wanted]

    def add_items(self, items: list[Any]) -> None:
        """Put keys and values, in turns, into the dictionary on the stack."""
        entries = self.stack[-1]
        if not isinstance(entries, dict) or not all(isinstance(key, bytes | str) for key in items[::2]):
            raise pickle.UnpicklingError("it has a dictionary whose keys are not texts")
        entries.update(zip(items[::2], items[1::2], strict=True))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.add_items(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.add_items([key, value])

    def load_setitems(self) -> None:
        self.add_items(self.pop_mark())

    def load_build(self) -> None:
        # Of any other object, a function above all, the state would be its attributes.
        if type(self.stack[-2]) not in (_DType, _Array):
            raise pickle.UnpicklingError("it sets the state of something else than an array or a dtype")
        super().load_build()

    def load_bytearray8(self) -> None:
        # As long as the file has bytes for it, not as it says.
        self.append(bytearray(self.read(*struct.unpack("<Q", self.read(8)))))

    def load_set(self) -> None:
        raise pickle.UnpicklingError("it has a set, which no file of CIFAR needs")

    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.EMPTY_SET[0]] = load_set
    dispatch[pickle.FROZENSET[0]] = load_set


def unpickled(content: bytes) -> Any:
    """What a pickle holds, of plain values and arrays of numbers.

    Raises:
        Exception: nearly any, on a damaged pickle or one that holds something else.
    """
    value = _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()
    if isinstance(value, dict):
        return {key: entry.made() if isinstance(entry, _Array) else entry for key, entry in value.items()}
    return value
