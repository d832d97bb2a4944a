"""The Lightning module: a task, its optimiser and schedule, its metrics and the state that a checkpoint needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from frskd_fast.mixing import rotate4
from frskd_fast.models import create_model
from frskd_fast.models.checkpoints import STATE, CheckpointError, classes_in, load_file, load_weights, without_heads
from frskd_fast.models.last_linear import last_linear
from frskd_fast.tasks import Student, Task

from .class_paths import Settings, build, unknown_names
from .evaluation import evaluation_for
from .export import is_of_the_package
from .metrics import MeanOfParts

SGD: dict[str, Any] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}}


class DistillationModule(LightningModule):
    """Trains task(images, targets)["loss"], whatever the task: it is built from settings, as optimiser and schedule are.

    The loss is computed inside the task's forward pass, so DDP, FSDP, autocast and torch.compile see one module. Nothing
    is read back from the device in a step. Settings are an import path, or a mapping with `class_path` and `init_args`.

    Args:
        num_classes: number of logits K. The command line takes it from the data.
        task: settings of a task, called with the student's network first.
        backbone: name of the student's network, see `frskd_fast.models.create_model`.
        backbone_args: further arguments of that network.
        optimizer: settings of the optimiser, called with the task's `parameter_groups()` first.
        lr_scheduler: settings of the schedule, called with the optimiser first; None leaves the learning rate as it is. A
            schedule that takes `max_epochs`, as those of `frskd_fast.training.schedules` do, is given the trainer's.
        lr_interval: whether the schedule takes a step after each "epoch" or each "step".
        lr_monitor: metric that a schedule with a plateau waits for.
        compile: compile the step with torch.compile.
        weights: file with weights of the backbone to start from, in any form that `frskd-fast export` accepts; the
            classifier is left out where its number of classes differs, and then the task has to train it. A task that
            freezes part of the backbone needs this file, unless the backbone brings trained weights of its own.

    Attributes:
        task: the task; its keys lead the checkpoint's `state_dict`.
        teacher_outputs: `teacher_outputs(images, keys)` gives what a frozen teacher makes of a batch, as `TeacherCache` sets
            it, where batches are `(images, targets, keys)`; None lets the task run its teacher.
        seed: from which, with the epoch and the position of the batch, the random numbers of each step follow.

    Raises:
        ImportError, TypeError, ValueError: as a sentence, from here or from what is built.

    Example:
        >>> from frskd_fast.training.recipe_files import recipe
        >>> module = DistillationModule(10, recipe("digits")["task"], "wrn16x2")
        >>> module(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        task: Settings,
        backbone: str = "cifarresnet18",
        backbone_args: dict[str, Any] | None = None,
        optimizer: Settings = SGD,
        lr_scheduler: Settings | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        lr_monitor: str = "validation/loss",
        compile: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        # A checkpoint holds the weights themselves; the file need not be there when it is loaded.
        self.save_hyperparameters(ignore=["weights"])
        network = create_model(backbone, num_classes, **(backbone_args or {}))
        random_classifier = weights is not None and _load_all_that_fits(network, weights, num_classes)
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.task: Task = build(task, network)
        headless = without_heads(network)
        if random_classifier and not headless.get_submodule(last_linear(headless)).weight.requires_grad:
            raise ValueError(
                f"weights ({weights}) are those of a network for other classes, so its classifier was left out, but "
                f"{type(self.task).__name__} does not train the classifier, which would stay random; give the weights of a "
                f"network for {num_classes} classes, or a task that trains the classifier."
            )
        # A network that a package of the user's or timm makes may come with trained weights.
        own_weights = bool((backbone_args or {}).get("pretrained")) or ("." in backbone and "timm:" not in backbone)
        unused = {id(parameter) for parameter in self.task.unused_parameters()}
        frozen = [p for p in trainable if not p.requires_grad and id(p) not in unused]
        self.needs_weights = weights is None and not own_weights and bool(frozen)
        student = self.task.student()
        # Then an export has to ask the task for it.
        kind = type(student)
        self.kind_of_student = f"{kind.__module__}.{kind.__qualname__}"
        as_any = is_of_the_package(self.kind_of_student) and kind.__init__ is Student.__init__
        self.has_own_student = student.backbone is not network or not as_any
        if compile:
            self.task.compile()
        self.teacher_outputs: Callable[[Tensor, Any], dict[str, Tensor]] | None = None
        self.seed = torch.initial_seed()
        self.training_means: MeanOfParts | None = None
        self.evaluation = evaluation_for(self.task, num_classes)
        # The loss, and what the task measures besides; the names are known after the first batch.
        self.evaluation_means: MeanOfParts | None = None
        # What goes into checkpoints, so that an export knows the student's input.
        self.images: dict[str, Any] = {}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, trust: bool = False, **keywords: Any) -> Self:
        """The module in a checkpoint; arguments as Lightning's method takes them, those of the constructor by name.

        Args:
            trust: import what the settings in the file name outside of this library and of `torch.optim`. Settings that are
                given here need no trust.

        Raises:
            CheckpointError: naming what would be imported.
        """
        if not trust:
            if not isinstance(checkpoint_path, str | os.PathLike) or "://" in str(checkpoint_path):
                raise CheckpointError(
                    f"The checkpoint is {checkpoint_path!r}, but what it names can be looked at in a file alone; give its "
                    "path, or trust=True."
                )
            content = load_file(checkpoint_path)
            # Lightning merges these with the settings.
            old = [key for key in ("hparams", "module_arguments", "hparams_type") if key in content]
            if old:
                raise CheckpointError(
                    f"The checkpoint {checkpoint_path} has settings under {old[0]!r}, where this library writes none; give "
                    "trust=True if you trust the file."
                )
            settings = content.get("hyper_parameters") or {}
            names = list(unknown_names({key: value for key, value in settings.items() if key not in keywords}))
            if names:
                raise CheckpointError(
                    f"The checkpoint {checkpoint_path} names {' and '.join(dict.fromkeys(names))}, which runs code or is "
                    "downloaded; give trust=True if you trust the file, or the settings that name it."
                )
        module: Self = super().load_from_checkpoint(checkpoint_path, *arguments, **{"weights_only": True, **keywords})
        return module

    @property
    def backbone(self) -> nn.Module:
        """The student's network, `backbone(images) -> (features, logits)`."""
        return self.task.student().backbone

    def forward(self, images: Tensor) -> Tensor:
        """The student's logits (N, K), or maps of them (N, K, H, W)."""
        logits: Tensor = self.task.student()(images)
        return logits

    def setup(self, stage: str) -> None:
        """Take the trainer's precision, and compare the images of the data with the student's stem."""
        # Before a checkpoint is loaded, which Lightning does ahead of the conversion: float64 weights would be rounded.
        self.trainer.precision_plugin.convert_module(self)
        # Where max_steps is given, Lightning resumes the epoch that a checkpoint has ended, and trains it on.
        # The method is private: a version of Lightning without it would take the assignment and ignore it.
        assert hasattr(self.trainer.fit_loop, "_iteration_based_training"), "Lightning's fit loop has changed"
        self.trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
        data = getattr(self.trainer, "datamodule", None)
        self.evaluation.name_classes(getattr(data, "class_names", None))
        size = getattr(data, "image_size", None)
        if data is None or size is None:
            return
        self.images = {
            "size": [int(side) for side in size],
            "channels": int(getattr(data, "channels", 3)),
            "mean": [float(value) for value in getattr(data, "mean", ())],
            "std": [float(value) for value in getattr(data, "std", ())],
        }
        if stage == "fit" and getattr(data, "crop_each_view", False) and self.task.views != "rotations":
            raise ValueError(
                f"data.crop_each_view is set, which hands out four rotations of each image, but {type(self.task).__name__} "
                f"takes {self.task.views} images; set it to false."
            )
        if stage == "fit" and self.trainer.is_global_zero and self.task.predicts == "classes":
            from .data import warn_if_stem_mismatch

            warn_if_stem_mismatch(self.backbone, (int(size[0]), int(size[1])), self.images["channels"])

    @property
    def turns_images(self) -> bool:
        """Whether the task wants rotated images and the data hands out upright ones."""
        data = getattr(self.trainer, "datamodule", None)
        return self.task.views == "rotations" and not getattr(data, "crop_each_view", False)

    def on_train_start(self) -> None:
        """Refuse frozen random weights; tell the task where it is.

        Lightning calls no hook for the epoch within which a resumed run goes on. A checkpoint has been loaded by now.
        """
        if self.needs_weights:
            raise ValueError(
                f"weights is None, but {type(self.task).__name__} freezes parameters of the backbone, which would stay random; "
                "give model.weights the file of a trained network."
            )
        if self.trainer.fit_loop.restarted_mid_epoch:
            self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Tell the task which epoch begins."""
        self.task.start_epoch(self.trainer.current_epoch, self.trainer.max_epochs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Random numbers of a step depend on the seed, the epoch, the batch and the process, not on what ran before."""
        torch.manual_seed(step_seed(self.seed, self.trainer.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: tuple[Any, ...], batch_idx: int) -> dict[str, Tensor]:
        """The loss with its graph, and its parts without."""
        images, targets, *keys = batch
        views = rotate4(images) if self.turns_images else images
        kept = {} if self.teacher_outputs is None else {"teacher_outputs": self.teacher_outputs(views, *keys)}
        outputs = self.task(views, targets, **kept)
        parts = {name: value for name, value in outputs.items() if value.dim() == 0}
        with torch.no_grad():
            measured = {
                **parts,
                **{
                    name.removesuffix("output") + self.evaluation.in_training: self.evaluation.correct(value, targets)
                    for name, value in outputs.items()
                    if name.endswith("output")  # "teacher_output", too
                },
            }
            if self.training_means is None:
                self.training_means = MeanOfParts(list(measured)).to(images.device)
            self.training_means.update(list(measured.values()), images.shape[0])
        return {name: value if name == "loss" else value.detach() for name, value in parts.items()}

    def on_train_epoch_end(self) -> None:
        """Log the means over the epoch, and begin new ones."""
        means = self.epoch_means()
        if means:
            self.log_dict({f"train/{name}": value for name, value in means.items()}, rank_zero_only=False)
        self._means = None
        if self.training_means is not None:
            self.training_means.reset()

    _means: dict[str, float] | None = None

    def epoch_means(self) -> dict[str, float]:
        """Means of the loss parts and accuracies over the epoch that is ending; all processes have to ask."""
        if self._means is None and self.training_means is not None:
            self._means = self.training_means.means()
        return self._means or {}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("validation")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """What the task says of each image: class and probability, or a mask of the size of the targets."""
        images, targets = batch
        return self.evaluation.prediction(self.task(images)["output"].float(), targets.shape[1:])

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> None:
        images, targets = batch
        measured = dict(self.task.evaluate(images, targets))
        measured = {"loss": self.evaluation.update(measured.pop("output").float(), targets), **measured}
        if self.evaluation_means is None:
            self.evaluation_means = MeanOfParts(list(measured)).to(images.device)
        self.evaluation_means.update(list(measured.values()), images.shape[0])

    def _log_evaluation(self, stage: str) -> None:
        values = self.evaluation.compute()
        if self.evaluation_means is not None:
            means = self.evaluation_means.compute().reshape(-1).unbind()
            values.update(zip(self.evaluation_means.names, means, strict=True))
            self.evaluation_means.reset()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})
        self.evaluation.reset()

    def configure_optimizers(self) -> Any:
        """The optimiser over the task's parameters, and the schedule."""
        optimizer = build(self.hparams["optimizer"], self.task.parameter_groups())
        if self.hparams["lr_scheduler"] is None:
            return optimizer
        schedule = {
            "scheduler": build(self.hparams["lr_scheduler"], optimizer, max_epochs=self.trainer.max_epochs),
            "interval": self.hparams["lr_interval"],
            "monitor": self.hparams["lr_monitor"],
        }
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def configure_model(self) -> None:
        """Under `ModelParallelStrategy` (FSDP2): shard `task.networks()`, each as a whole.

        Networks may read their layers' parameters themselves, so a unit cannot be smaller than one.
        """
        if self.device_mesh is None or getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import fully_shard

        # It takes contiguous parameters alone; images stay as they are, and the convolutions follow the images.
        self.task.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        mesh = self.device_mesh["data_parallel"]
        for network in self.task.networks():
            fully_shard(network, mesh=mesh)
        fully_shard(self.task, mesh=mesh)
        self._sharded = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the seed, the sums of the epoch that is under way, and what the student takes."""
        state: dict[str, Any] = {
            "seed": self.seed,
            "images": self.images,
            "channels_last": self.task.student().channels_last,
            "own_student": self.has_own_student,
            "student": self.kind_of_student,
            "predicts": self.task.predicts,
        }
        if self.training_means is not None:
            saved = self.training_means.saved()
            if self.trainer.world_size > 1:
                for name in ("sums", "images"):
                    # In place: `saved` holds copies.
                    saved[name] = self.trainer.strategy.reduce(saved[name].to(self.device), reduce_op="sum").cpu()
            state["training_means"] = saved
        checkpoint[STATE] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what `on_save_checkpoint` added."""
        self.needs_weights = False
        state = checkpoint.get(STATE, {})
        self.seed = state.get("seed", self.seed)
        if "training_means" in state:
            self.training_means = MeanOfParts.restored(state["training_means"]).to(self.device)
            if self.global_rank != 0:  # the file holds the sum over all processes
                self.training_means.reset()


def _load_all_that_fits(network: nn.Module, path: str, num_classes: int) -> bool:
    """Load the weights in a file; whether the classifier, being for other classes, was left as it is."""
    content = load_file(path)
    load_weights(network, content, path, skip_other_classifier=True)
    return classes_in(content, network) not in (None, num_classes)


def step_seed(seed: int, epoch: int, batch: int, rank: int = 0) -> int:
    """A seed of 63 bits, mixed from the four numbers: neighbours give unrelated streams.

    Example:
        >>> step_seed(10, 0, 0) == step_seed(10, 0, 0), step_seed(10, 0, 0) == step_seed(10, 0, 1)
        (True, False)

    Source: the mixing function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    mask = (1 << 64) - 1
    state = 0
    for value in (seed, epoch, batch, rank):
        state = (state ^ (value & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1
