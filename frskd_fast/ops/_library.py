"""Registration of the raw functions as ``torch.ops.frskd_fast.*`` for ``torch.compile``; eager mode calls them directly.

Crossing the dispatcher costs more than a small kernel, so an ``autograd.Function`` uses the registered operator only while it
is being traced. The implementation travels as a string argument and is thereby fixed in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("frskd_fast", "FRAGMENT")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``frskd_fast::<schema>`` with its implementation and its fake; returns the operator.

    Gradients are allocated like their inputs, so the strides the fake promised must be the ones that arrive.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.needs_exact_strides,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"frskd_fast::{name}", fake, lib=_library)
    return getattr(torch.ops.frskd_fast, name).default
