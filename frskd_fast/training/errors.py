"""Why the command line does not do what was asked, as a sentence."""

from __future__ import annotations

import traceback
from pathlib import Path

# How errors begin that hold another one.
WRAPPED = ("Call to compute_fn of link", "Does not validate against any of the Union subtypes")


class Refusal(Exception):
    """Why a command does not do what was asked, as a sentence with what to do."""


def sentence_of(error: BaseException) -> str:
    """What an error says, without what wraps it; where code of others says it, with the file and the line."""
    while str(error).startswith(WRAPPED):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    text = str(error).strip() or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(__file__).resolve().parents[1]
    if frames and not isinstance(error, ImportError | FileNotFoundError):
        file = Path(frames[-1].filename)
        if ours not in file.resolve().parents and "lightning" not in file.parts:
            text += f" ({type(error).__name__} in {file}, line {frames[-1].lineno})"
    return text
