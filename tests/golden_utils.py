"""Reads the originals' stored numbers (`tests/golden`) and fills networks by the formula stored with them."""

import json
import math
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"

NUMPY_TYPES = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


def load_golden(case: str) -> dict[str, Tensor]:
    """All tensors of one case, by name.

    A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte offsets)
    and the bytes: short enough to read here, so that the tests need no package for it.
    """
    content = (GOLDEN / f"{case}.safetensors").read_bytes()
    (header_length,) = struct.unpack_from("<Q", content)
    data_start = 8 + header_length
    header = json.loads(content[8:data_start])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        values = np.frombuffer(content[data_start + begin : data_start + end], dtype=NUMPY_TYPES[entry["dtype"]])
        tensors[name] = torch.from_numpy(values.reshape(entry["shape"]).copy())
    return tensors


@cache
def _read_json(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def golden_settings(case: str) -> dict[str, Any]:
    """The settings the case was computed with."""
    return _read_json("index.json")[case]


def state_dict_layout(network: str) -> dict[str, list[int]]:
    """Key -> shape, in the order of the original's state dict."""
    return _read_json("state_dict_layouts.json")[network]


@torch.no_grad()
def fill_parameters(module: nn.Module, offset: int = 0) -> None:
    """Fill every parameter by the formula the index calls "fill", in float64, then round to the parameter's dtype.

    u = sin(12.9898 i + 78.233 k) * 43758.5453 for i = 1..numel and k = offset + position in named_parameters();
    v = 2 (u - floor(u)) - 1; weights of two or more axes v sqrt(6 / fan_in), biases 0.1 v, all others 1 + 0.1 v.
    """
    for k, (name, parameter) in enumerate(module.named_parameters(), offset):
        i = torch.arange(1, parameter.numel() + 1, dtype=torch.float64)
        u = torch.sin(12.9898 * i + 78.233 * k) * 43758.5453
        v = 2.0 * (u - u.floor()) - 1.0
        if parameter.dim() > 1:
            v = v * math.sqrt(6.0 / parameter[0].numel())
        elif name.endswith("bias"):
            v = 0.1 * v
        else:
            v = 1.0 + 0.1 * v
        parameter.copy_(v.view(parameter.shape))
