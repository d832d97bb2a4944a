"""The Lightning module: a task, its optimiser and schedule, its metrics and the state that a checkpoint needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from frskd_fast import tasks

from .backbones import build_backbone
from .export import STATE
from .metrics import MeanOfParts


class DistillationModule(LightningModule):
    """Trains loss(task(images, targets)): FRSKD with any of its feature terms, or plain cross-entropy.

    The loss is computed inside the task's forward pass, so DDP, FSDP, autocast and torch.compile see one module. Nothing
    is read back from the device in a step.

    Args:
        num_classes: number of logits K. The command line takes it from the data.
        backbone: name of the student, see `frskd_fast.training.backbones.build_backbone`.
        method: "frskd", or "plain" for cross-entropy alone.
        distill: the feature term: "att" (attention maps), "fit" (FitNet) or "od" (overhaul).
        auxiliary: "sla" adds self-supervised label augmentation (four rotations, joint labels); None does not.
        alpha: multiplies the distillation of the logits, KD.
        beta: multiplies the feature term.
        temperature: softmax temperature T of KD.
        auxiliary_weight: multiplies the distillation from the aggregated rotations.
        self_teacher: "BiFPNc" (widths follow the backbone) or "BiFPN" (`num_channels` at every level).
        width, depth, repeat: of the self-teacher: widening factor, convolutions of a node, layers.
        num_channels: width of "BiFPN".
        label_smoothing: s of the plain method's cross-entropy, in [0, 1).
        memory: "normal", or "low" to compute the self-teacher's maps a second time instead of keeping them.
        channels_last: keep parameters and images in `torch.channels_last`.
        compile: compile the step with torch.compile.
        weights: file with weights of the backbone to start from, in any form that `frskd-fast export` accepts; the
            classifier is left out where its number of classes differs.
        learning_rate, momentum, weight_decay, nesterov: of SGD, over all parameters: student, self-teacher, adapters.
        schedule: "multistep" (times `gamma` at each of `milestones`), "cosine" (to 0 at the last epoch) or "constant".
        milestones: epochs, counted from 0, from which on the learning rate is multiplied by `gamma` once more.
        gamma: see `milestones`.
        warmup_epochs: epochs of linear warm-up before; 0 is none. `milestones` count from the beginning all the same.

    Attributes:
        task: `FRSKDTask` or `ClassificationTask`; its keys lead the checkpoint's `state_dict`.
        seed: from which, with the epoch and the position of the batch, the random numbers of each step follow.

    Raises:
        ValueError: on an unknown name or a number out of range, as a sentence.

    Example:
        >>> module = DistillationModule(num_classes=10, backbone="wrn16x2", method="plain", schedule="constant")
        >>> parts = module.training_step((torch.zeros(2, 3, 16, 16), torch.tensor([1, 2])), 0)
        >>> sorted(parts)
        ['ce_student', 'loss']

    Source: Ji et al., CVPR 2021, section 4; defaults are the released code's recipe for CIFAR-100.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "cifarresnet18",
        method: Literal["frskd", "plain"] = "frskd",
        distill: Literal["att", "fit", "od"] = "att",
        auxiliary: Literal["sla"] | None = None,
        alpha: float = 2.0,
        beta: float = 100.0,
        temperature: float = 4.0,
        auxiliary_weight: float = 1.0,
        self_teacher: Literal["BiFPNc", "BiFPN"] = "BiFPNc",
        width: int = 2,
        depth: int = 2,
        repeat: int = 1,
        num_channels: int = 256,
        label_smoothing: float = 0.0,
        memory: Literal["normal", "low"] = "normal",
        channels_last: bool = True,
        compile: bool = False,
        weights: str | None = None,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        schedule: Literal["multistep", "cosine", "constant"] = "multistep",
        milestones: Sequence[int] = (100, 150),
        gamma: float = 0.1,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__()
        if method not in ("frskd", "plain"):
            raise ValueError(f"method is {method!r}, but 'frskd' or 'plain' was wanted.")
        if schedule not in ("multistep", "cosine", "constant"):
            raise ValueError(f"schedule is {schedule!r}, but 'multistep', 'cosine' or 'constant' was wanted.")
        if method == "frskd" and label_smoothing:
            raise ValueError(
                f"label_smoothing is {label_smoothing}, but smooths the labels of method 'plain' alone; leave it at 0."
            )
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs is {warmup_epochs}, but 0 or more was wanted.")
        milestones = [int(milestone) for milestone in milestones]
        # A checkpoint holds the weights themselves; the file need not be there when it is loaded.
        self.save_hyperparameters(ignore=["weights"])
        network = build_backbone(backbone, num_classes)
        if weights is not None:
            from .export import load_backbone_weights

            load_backbone_weights(network, weights, skip_other_classifier=True)
        if method == "plain":
            self.task: nn.Module = tasks.ClassificationTask(
                network, label_smoothing=label_smoothing, channels_last=channels_last
            )
        else:
            self.task = tasks.build_frskd(
                network,
                distill=distill,
                auxiliary=auxiliary,
                alpha=alpha,
                beta=beta,
                temperature=temperature,
                auxiliary_weight=auxiliary_weight,
                self_teacher=self_teacher,
                width=width,
                depth=depth,
                repeat=repeat,
                num_channels=num_channels,
                memory=memory,
                channels_last=channels_last,
            )
        if compile:
            self.task.compile()
        self.seed = torch.initial_seed()
        self.training_means: MeanOfParts | None = None
        self.evaluation = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
                "accuracy_top5": MulticlassAccuracy(
                    num_classes, top_k=min(5, num_classes), average="micro", validate_args=False
                ),
                "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False),
            },
            compute_groups=False,
        )
        self.evaluation_loss = MeanOfParts(["loss"])
        # What goes into checkpoints, so that an export knows the student's input.
        self.images: dict[str, Any] = {}

    @property
    def backbone(self) -> nn.Module:
        """The student's network, `backbone(images) -> (features, logits)`."""
        backbone = self.task.backbone
        assert isinstance(backbone, nn.Module)
        return backbone

    def forward(self, images: Tensor) -> Tensor:
        """The student's logits (N, K)."""
        logits: Tensor = self.task.student()(images)  # type: ignore[operator]
        return logits

    def setup(self, stage: str) -> None:
        """Take the trainer's precision, and compare the images of the data with the student's stem."""
        # Before a checkpoint is loaded, which Lightning does ahead of the conversion: float64 weights would be rounded.
        self.trainer.precision_plugin.convert_module(self)
        data = getattr(self.trainer, "datamodule", None)
        size = getattr(data, "image_size", None)
        if data is None or size is None:
            return
        self.images = {
            "size": [int(side) for side in size],
            "channels": int(getattr(data, "channels", 3)),
            "mean": [float(value) for value in getattr(data, "mean", ())],
            "std": [float(value) for value in getattr(data, "std", ())],
        }
        if stage == "fit" and self.trainer.is_global_zero:
            from .data import warn_if_stem_mismatch

            warn_if_stem_mismatch(self.backbone, (int(size[0]), int(size[1])), self.images["channels"])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Random numbers of a step depend on the seed, the epoch, the batch and the process, not on what ran before."""
        torch.manual_seed(step_seed(self.seed, self.trainer.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss with its graph, and its parts without."""
        images, targets = batch
        outputs = self.task(images, targets)
        parts = {name: value for name, value in outputs.items() if value.dim() == 0}
        with torch.no_grad():
            accuracies = {"accuracy": fraction_correct(outputs["output"], targets)}
            if "teacher_output" in outputs:
                accuracies["teacher_accuracy"] = fraction_correct(outputs["teacher_output"], targets)
            measured = {**parts, **accuracies}
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
        """Class, and its probability, of each image."""
        logits = self.task(batch[0])["output"]
        probability, classes = logits.float().softmax(1).max(1)
        return {"class": classes, "probability": probability}

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> None:
        images, targets = batch
        logits = self.task(images)["output"].float()
        self.evaluation.update(logits, targets)
        self.evaluation_loss.update([nn.functional.cross_entropy(logits, targets)], images.shape[0])

    def _log_evaluation(self, stage: str) -> None:
        values = {**self.evaluation.compute(), "loss": self.evaluation_loss.compute().reshape(())}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})
        self.evaluation.reset()
        self.evaluation_loss.reset()

    def configure_optimizers(self) -> Any:
        """SGD over every parameter that requires gradients, and the schedule by epochs."""
        settings: Any = self.hparams
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(
            parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
        schedule = epoch_schedule(
            optimizer,
            settings.schedule,
            epochs=self.trainer.max_epochs,
            milestones=settings.milestones,
            gamma=settings.gamma,
            warmup_epochs=settings.warmup_epochs,
        )
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def configure_model(self) -> None:
        """Under `ModelParallelStrategy` (FSDP2): shard the networks, each as a whole.

        The self-teacher reads its layers' parameters itself, so a unit cannot be smaller than a network.
        """
        if self.device_mesh is None or getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import fully_shard

        # It takes contiguous parameters alone; images stay as they are, and the convolutions follow the images.
        self.task.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        mesh = self.device_mesh["data_parallel"]
        for name in ("backbone", "self_teacher"):
            network = getattr(self.task, name, None)
            if network is not None:
                fully_shard(network, mesh=mesh)
        fully_shard(self.task, mesh=mesh)
        self._sharded = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the seed, the sums of the epoch that is under way, and what the images are like."""
        state: dict[str, Any] = {"seed": self.seed, "images": self.images}
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
        state = checkpoint.get(STATE, {})
        self.seed = state.get("seed", self.seed)
        if "training_means" in state:
            self.training_means = MeanOfParts.restored(state["training_means"]).to(self.device)
            if self.global_rank != 0:  # the file holds the sum over all processes
                self.training_means.reset()


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


def fraction_correct(logits: Tensor, targets: Any) -> Tensor:
    """Mean over the images of [argmax_k logits = target], a scalar on the device.

    Args:
        logits: (N, K).
        targets: labels (N,); or (labels, labels_b, lam) of mixup and cutmix, whose two fractions are mixed by lam.

    Example:
        >>> fraction_correct(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])).item()
        0.5
    """
    predicted = logits.argmax(1)
    if isinstance(targets, tuple | list):
        first, second, mix = targets
        mixed: Tensor = mix * _agreement(predicted, first) + (1 - mix) * _agreement(predicted, second)
        return mixed
    return _agreement(predicted, targets)


def _agreement(predicted: Tensor, labels: Tensor) -> Tensor:
    return (predicted == labels).float().mean()


def epoch_schedule(
    optimizer: torch.optim.Optimizer,
    schedule: str,
    *,
    epochs: int | None,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    warmup_epochs: int = 0,
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The learning rate of each epoch e: lr * gamma^(milestones <= e), lr * (1 + cos(pi e / E)) / 2, or lr.

    During `warmup_epochs` W it is lr * (e + 1) / (W + 1) instead; the cosine then runs over the E - W epochs left.

    Args:
        optimizer: whose learning rate to change.
        schedule: "multistep", "cosine" or "constant".
        epochs: E, needed by "cosine".
        milestones, gamma, warmup_epochs: as for `DistillationModule`.

    Returns:
        A scheduler to step once an epoch; None for a constant rate without warm-up.

    Raises:
        ValueError: for a cosine without a number of epochs.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> steps = epoch_schedule(optimizer, "multistep", epochs=4, milestones=[2], warmup_epochs=1)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(round(steps.get_last_lr()[0], 6)); optimizer.step(); steps.step()
        >>> rates
        [0.5, 1.0, 0.1, 0.1]
    """
    from torch.optim import lr_scheduler

    main: lr_scheduler.LRScheduler
    if schedule == "cosine":
        if epochs is None or epochs < 1:
            raise ValueError(
                f"schedule is 'cosine', but the number of epochs is {epochs}; give trainer.max_epochs a number."
            )
        main = lr_scheduler.CosineAnnealingLR(optimizer, max(epochs - warmup_epochs, 1))
    elif schedule == "multistep":
        main = lr_scheduler.MultiStepLR(optimizer, [max(m - warmup_epochs, 0) for m in milestones], gamma)
    elif warmup_epochs:
        main = lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    else:
        return None
    if not warmup_epochs:
        return main
    warmup = lr_scheduler.LinearLR(optimizer, 1 / (warmup_epochs + 1), 1.0, warmup_epochs)
    return lr_scheduler.SequentialLR(optimizer, [warmup, main], [warmup_epochs])
