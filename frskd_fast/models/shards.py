"""The tensors in a folder of shards of torch.distributed.checkpoint, without running what its files name."""

from __future__ import annotations

import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.state_dict_loader import load

METADATA = ".metadata"
_OF_METADATA = (
    "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata "
    "_MEM_FORMAT_ENCODING"
).split()
# All that torch.distributed.checkpoint writes, besides dtypes.
KNOWN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _OF_METADATA),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # of Python 3.13
    ("pathlib._local", "WindowsPath"),
}


# Instances that are given a state.
WITH_STATE = (
    *(getattr(kinds, name) for name in _OF_METADATA if dataclasses.is_dataclass(getattr(kinds, name))),
    _StorageInfo,
)
PythonUnpickler: Any = pickle._Unpickler  # the one in Python, whose opcodes can be given other methods


class _Unpickler(PythonUnpickler):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(PythonUnpickler.dispatch)

    def load_build(self) -> None:
        # The state of a class or function would be the attributes of what this process works with.
        if type(self.stack[-2]) not in WITH_STATE:
            raise pickle.UnpicklingError(f"its {METADATA} sets attributes of what is no part of the list of shards")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return Path if name.endswith("Path") else super().find_class(module, name)
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"its {METADATA} asks for {module}.{name}, which the list of shards does not need")


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, metadata: kinds.Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> kinds.Metadata:
        return self._metadata


def load_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of all shards, whole, in mappings as they were saved. Other values, which would be unpickled, are left out.

    Raises:
        Exception: nearly any, when the folder is damaged or holds something else.
    """
    metadata = _Unpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
    if not isinstance(metadata, kinds.Metadata):
        raise pickle.UnpicklingError(f"its {METADATA} holds a {type(metadata).__name__}")
    metadata.storage_meta = None
    tensors: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, kinds.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process reads
        load(dict(tensors), storage_reader=_Reader(folder, metadata), no_dist=True)
    places = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    content: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *above, last = places.get(name, (name,))
        inner = content
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = tensor
    return content
