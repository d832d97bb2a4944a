"""The trainer: data, Lightning module, command line and recipes; needs the extra `train`, the core never imports it.

`frskd-fast fit --config digits` is the command line; docs/training.md is the guide. For programs:

| name | what it is |
| --- | --- |
| `DistillationModule` | the Lightning module around a task |
| `RunCheckpoint`, `AtomicCheckpointIO` | checkpoints that survive kills, torn writes and full disks |
| `Records`, `ProgressBar`, `Panels` | what a run writes down, shows and draws |
| `TeacherCache`, `TeacherOutputs` | a frozen teacher's outputs, kept from epoch to epoch and from run to run |
| `RunGuard` | stops a run whose loss has a term that does nothing |
| `load_student` | the student out of a checkpoint |
"""

import importlib
from typing import Any

_HOMES = {
    "AtomicCheckpointIO": "checkpoints",
    "DistillationModule": "module",
    "Panels": "panels",
    "ProgressBar": "progress",
    "Records": "records",
    "RunCheckpoint": "checkpoints",
    "RunGuard": "guard",
    "TeacherCache": "teacher_cache",
    "TeacherOutputs": "teacher_outputs",
    "find_checkpoint": "checkpoints",
    "load_student": "export",
    "main": "cli",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; what does without it (the list of recipes, the export) does not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
