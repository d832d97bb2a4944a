"""PNG panels of a run: its curves, and where its networks look."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from frskd_fast.functional import attention_map
from frskd_fast.tasks import Task

from .checkpoints import write_atomically
from .errors import Refusal
from .evaluation import resized
from .masks import MOST_CLASSES, palette
from .records import EPOCHS
from .tables import read_table

CURVES, ATTENTION, MAPS = "curves.png", "attention.png", "maps.png"
# An empty file in a run's folder from the end of its training until its panels are drawn.
TO_DRAW = ".panels"
FEW = 20  # points of a curve up to which each is marked
# Columns of epochs.csv as the legends name them.
LABELS = {
    "train/loss": "loss, weighted sum",
    "train/ce_student": "student cross-entropy",
    "train/ce_teacher": "teacher cross-entropy",
    "train/kd": "KD of logits",
    "train/feature": "KD of feature maps",
    "train/accuracy": "student accuracy, training",
    "train/teacher_accuracy": "teacher accuracy, training",
    "validation/accuracy": "student accuracy, validation",
    "validation/accuracy_top5": "student top-5 accuracy, validation",
    "train/pixel_accuracy": "student pixel accuracy, training",
    "train/teacher_pixel_accuracy": "teacher pixel accuracy, training",
    "validation/miou": "student mIoU, validation",
    "validation/pixel_accuracy": "student pixel accuracy, validation",
    "validation/loss": "student cross-entropy, validation",
}
MISSING = (
    "No panels were drawn, because matplotlib cannot be imported; pip install 'frskd_fast[plot]', then "
    "frskd-fast panels --run_dir {folder} draws the curves."
)


def pyplot() -> Any | None:
    """matplotlib's pyplot, drawing into files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as module

    return module


def draw_curves(folder: str | os.PathLike[str]) -> Path | None:
    """Draw `curves.png` from a run's `epochs.csv`: loss parts, accuracies and learning rate against epochs.

    Returns the file; None without matplotlib or before the first epoch has ended.
    """
    plots = pyplot()
    source = Path(folder) / EPOCHS
    if plots is None or not source.is_file():
        return None
    _, rows = read_table(source, "epoch")
    if not rows:
        return None
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, text in row.items():
            if text not in ("", None) and name not in ("epoch", "step"):
                epochs, values = columns.setdefault(name, ([], []))
                epochs.append(int(row["epoch"]) + 1)
                try:
                    values.append(float(text))
                except ValueError as error:
                    raise Refusal(f"{source} is damaged: {name} is {text!r} in it, which is no number.") from error
    figure, (losses, scores, rate) = plots.subplots(1, 3, figsize=(16, 5), layout="constrained")
    figure.suptitle(Path(folder).resolve().name)
    for name, (epochs, values) in columns.items():
        label = LABELS.get(name, name.removeprefix("train/").replace("_", " "))
        marker = "o" if len(values) <= FEW else None  # a line of one point is none
        if "accuracy" in name or name.endswith("miou"):
            scores.plot(epochs, [100 * value for value in values], label=label, marker=marker)
        elif name.startswith("train/") or name == "validation/loss":
            losses.plot(epochs, values, label=label, linewidth=2 if name == "train/loss" else 1, marker=marker)
    rate.plot(*columns.get("learning_rate", ([], [])), marker="o" if len(rows) <= FEW else None)
    positive = all(value > 0 for name, (_, values) in columns.items() if name.startswith("train/") for value in values)
    losses.set(xlabel="epoch", ylabel="loss (parts before their weights)", yscale="log" if positive else "linear")
    miou = any(name.endswith("miou") for name in columns)
    scores.set(xlabel="epoch", ylabel="mIoU and accuracy, %" if miou else "accuracy, %")
    rate.set(xlabel="epoch", ylabel="learning rate")
    for axes in (losses, scores, rate):
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(rows) == 1:
            axes.set_xticks([int(rows[0]["epoch"]) + 1])
    for axes in (losses, scores):
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    path = Path(folder) / CURVES
    _write(figure, path)
    plots.close(figure)
    return path


@torch.no_grad()
def draw_attention(
    task: Task,
    images: Tensor,
    path: str | os.PathLike[str],
    mean: Any = (),
    std: Any = (),
    masks: Tensor | None = None,
) -> Path | None:
    """Draw the attention maps of the task's networks over images, one row for each image.

    Args:
        task: whose `maps(images)` are drawn; its mode (training or not) is as before afterwards.
        images: (N, C, H, W), normalised.
        path: the PNG file.
        mean, std: what the images were normalised with, one number a channel.
        masks: class indices (N, H, W), which are drawn beside the images, and after them what the task's networks predict:
            `predicted_maps(images)`.

    Returns:
        The file; None without matplotlib.
    """
    plots = pyplot()
    if plots is None:
        return None
    modes = [(module, module.training) for module in task.modules()]
    task.eval()
    try:
        features = task.maps(images)
        predicted = {} if masks is None else task.predicted_maps(images)
    finally:
        for module, training in modes:
            module.training = training
    pictures = shown_images(images, mean, std)
    flat = {"image": pictures}
    if masks is not None:
        flat["mask"] = coloured(masks)
        flat.update(
            {name: coloured(resized(maps.float(), masks.shape[1:]).argmax(1)) for name, maps in predicted.items()}
        )
    over = {
        f"{name} {level}": attention_map(feature.float()).reshape(len(images), *feature.shape[-2:]).cpu().numpy()
        for name, maps in features.items()
        for level, feature in enumerate(maps, start=1)
    }
    count = len(flat) + len(over)
    figure, axes = plots.subplots(
        len(images), count, figsize=(1.3 * count, 1.3 * len(images) + 0.4), squeeze=False, layout="constrained"
    )
    extent = (0, images.shape[-1], images.shape[-2], 0)
    for column, (title, shown) in enumerate({**flat, **over}.items()):
        for row, picture in enumerate(pictures):
            if title in over:
                axes[row, column].imshow(picture.mean(-1), cmap="gray", extent=extent)
                axes[row, column].imshow(shown[row], cmap="viridis", alpha=0.65, extent=extent)
            else:
                axes[row, column].imshow(shown[row], extent=extent, interpolation="nearest")
        axes[0, column].set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    path = Path(path)
    _write(figure, path)
    plots.close(figure)
    return path


def _write(figure: Any, path: Path) -> None:
    """Save a figure as a PNG file that is there as a whole or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    write_atomically(path, drawn.getbuffer())


def coloured(masks: Tensor) -> Any:
    """Colours (N, H, W, 3) of class indices, in [0, 1]."""
    return palette()[masks.clamp(0, MOST_CLASSES - 1).cpu().numpy()] / 255


def shown_images(images: Tensor, mean: Any, std: Any) -> Any:
    """Images as arrays (N, H, W, 3) in [0, 1]: the normalisation undone, or stretched to the range without one."""
    pictures = images.detach().float().cpu()
    if len(mean) == pictures.shape[1]:
        pictures = pictures * torch.tensor(std).reshape(-1, 1, 1) + torch.tensor(mean).reshape(-1, 1, 1)
        pictures = pictures.clamp(0, 1)
    else:
        low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
        pictures = (pictures - low) / (high - low).clamp(min=1e-12)
    return pictures[:, :3].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _largest_class(targets: Tensor) -> Tensor:
    """The label of each image; of a mask its class of most pixels besides 0, the background, and 255, which is none."""
    if targets.dim() == 1:
        return targets
    counts = torch.stack([torch.bincount(mask.flatten().clamp(0, 255), minlength=256) for mask in targets])
    counts[:, [0, 255]] = 0
    return counts.argmax(1)


class Panels(Callback):
    """Draws `curves.png` when training ends, and `attention.png`, or `maps.png` for a task that predicts maps.

    Args:
        enabled: whether to.
        images: rows of the second: images of the validation set, of different classes as far as they go.
    """

    def __init__(self, enabled: bool = True, images: int = 6) -> None:
        self.enabled = enabled
        self.images = images
        self.kept: tuple[Tensor, Tensor] | None = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.enabled and self.kept is None and trainer.is_global_zero:
            images, targets = batch
            # Of a mask, the largest of its classes.
            labels = _largest_class(targets).tolist()
            first = [labels.index(label) for label in sorted(set(labels))]
            rows = (first + [row for row in range(len(labels)) if row not in first])[: self.images]
            self.kept = images[rows].clone(), targets[rows].clone()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.draws(trainer) and pyplot() is not None:
            with contextlib.suppress(OSError):
                Path(trainer.default_root_dir, TO_DRAW).touch()

    def draws(self, trainer: Trainer) -> bool:
        """Whether this process draws at all."""
        return self.enabled and trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def missing(self, trainer: Trainer) -> bool:
        """Whether a finished run of one process was ended before its panels were drawn."""
        there = Path(trainer.default_root_dir, TO_DRAW).is_file()
        return there and self.draws(trainer) and trainer.world_size == 1 and pyplot() is not None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.draws(trainer):
            return
        folder = Path(trainer.default_root_dir)
        if pyplot() is None:
            print(MISSING.format(folder=folder))
            return
        drawn = [draw_curves(folder)]
        sharded = type(trainer.strategy).__name__ in ("FSDPStrategy", "ModelParallelStrategy")
        if self.kept is not None and not sharded:
            images, targets = (kept.to(next(pl_module.parameters()).device) for kept in self.kept)
            about = getattr(pl_module, "images", {})
            statistics = about.get("mean", ()), about.get("std", ())
            masks = targets if targets.dim() > 1 else None
            file = folder / (ATTENTION if masks is None else MAPS)
            drawn.append(draw_attention(pl_module.task, images, file, *statistics, masks))  # type: ignore[arg-type]
        for path in drawn:
            if path is not None:
                print(f"Panel: {path}")
        (folder / TO_DRAW).unlink(missing_ok=True)
