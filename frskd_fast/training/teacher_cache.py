"""The callback that lets a frozen teacher run in the first epoch alone."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from .module import DistillationModule
from .teacher_outputs import TeacherOutputs


class TeacherCache(Callback):
    """Hands the task its frozen teacher's outputs: computed when an image is first seen, read from a file after that.

    Every task that has `teacher_outputs` and a `FrozenTeacher` can do with it, compiled or not, and so can several processes
    and several runs at once. A run that goes on, or another run with the same teacher, images and precision, begins with what
    is there. Images that are random beyond a flip are refused. On several nodes each node has a file of its own.

    Args:
        folder: where the files are, one for each teacher, kind of images and precision.
        features: keep feature maps, too, where the task wants them; they are large.
        half: keep the outputs as float16.

    Raises:
        ValueError: as a sentence, before training begins: random images, no frozen teacher, another program's file, a disk
            without room, networks that are sharded.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TeacherCache("cache")], logger=False, enable_checkpointing=False)
    """

    def __init__(self, folder: str, features: bool = False, half: bool = False) -> None:
        super().__init__()
        self.folder = str(folder)
        self.features = bool(features)
        self.half = bool(half)
        self.outputs: TeacherOutputs | None = None
        self._keys: tuple[int, dict[str, Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data say what its images are, or why they cannot be told apart."""
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "hand_out_keys"):
            raise ValueError(
                f"The teacher cache needs to know which image is which, but the data ({type(data).__name__}) has no method "
                "hand_out_keys; use a data module of frskd_fast.training.data, or leave the cache out."
            )
        self._keys = data.hand_out_keys()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file, or make it; the teacher sees one blank image, which shows what it hands out."""
        assert self._keys is not None and isinstance(pl_module, DistillationModule)
        if pl_module.device_mesh is not None:
            raise ValueError(
                "The teacher cache asks the teacher outside the step, which networks sharded by ModelParallelStrategy do not "
                "allow; use ddp, or leave the cache out."
            )
        keys, settings = self._keys
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        views = 4 if pl_module.task.views == "rotations" else 1
        images = torch.zeros(views, data.channels, *data.image_size, device=pl_module.device)
        images = trainer.precision_plugin.convert_input(images)
        settings = {**settings, "precision": str(trainer.precision)}
        if trainer.num_nodes > 1:
            settings["node"] = trainer.node_rank
        for turn in (True, False):
            problem: Exception | None = None
            # The first process of a node makes the file.
            if (trainer.local_rank == 0) == turn:
                try:
                    with trainer.precision_plugin.forward_context():
                        self.outputs = TeacherOutputs(
                            self.folder,
                            pl_module.task,
                            images,
                            samples=1,
                            keys=keys,
                            settings=settings,
                            features=self.features,
                            half=self.half,
                            create=turn,
                        )
                except Exception as error:
                    problem = error
            # All processes meet here, those with a problem, too: nobody waits for one that has ended.
            if not trainer.strategy.reduce_boolean_decision(problem is None):
                raise problem or ValueError("The teacher cache was refused by another process, which says why.")
        assert self.outputs is not None
        pl_module.teacher_outputs = self.outputs
        if trainer.is_global_zero:
            new = ", which is new" if self.outputs.is_new else ""
            print(f"Outputs of the teacher are kept in {self.outputs.path}{new}.", flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many records were damaged."""
        if self.outputs is not None and self.outputs.damaged:
            rank_zero_warn(
                f"{self.outputs.damaged} records of {self.outputs.path} were cut off or altered; the teacher's outputs for "
                "them were computed again.",
                stacklevel=2,
            )
            self.outputs.damaged = 0

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the file; the task runs its teacher again."""
        if isinstance(pl_module, DistillationModule) and self.outputs is not None:
            pl_module.teacher_outputs = None
            self.outputs = None
            trainer.datamodule.hands_out_keys = False  # type: ignore[attr-defined]
