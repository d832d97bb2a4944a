"""The names on the command line and in the tables; without torch, so that --help and reports come at once."""

from __future__ import annotations

DEVICES = ("cpu", "cuda")
FLOAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LAYOUTS = ("nchw", "channels_last")
BASELINES = ("eager", "compile")
OURS = ("auto", "reference", "cpu", "triton", "cuda")
IMPLEMENTATIONS = (*BASELINES, *OURS)
FORCED = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
DEFAULT_IMPLEMENTATIONS = {device: (*BASELINES, "auto", *forced) for device, forced in FORCED.items()}


def is_ours(implementation: str) -> bool:
    """Whether a row of this name measures frskd_fast; a name may go on, as in "auto memory=low"."""
    return implementation.split()[0] in OURS


def is_compiled(implementation: str) -> bool:
    """Whether calling it runs the compiler first."""
    return implementation == "compile" or implementation.endswith(" compiled")
