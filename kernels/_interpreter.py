"""Lets Triton's interpreter (TRITON_INTERPRET=1, for tests without a GPU) run loops beside numpy 2.4 and later."""

from __future__ import annotations

from typing import Any

import triton.runtime.interpreter as interpreter


def accept_one_element_bounds() -> None:
    """Make ``range(bound)`` work in interpreted kernels.

    The interpreter keeps scalars as arrays of one element and calls int() on them, which numpy refuses since 2.4.
    """
    original = getattr(interpreter, "_patch_lang_tensor", None)
    if original is None or getattr(original, "_frskd_fast", False):
        return

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch_lang_tensor._frskd_fast = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_lang_tensor
