"""FRSKD against plain cross-entropy on scikit-learn's handwritten digits, with few labels.

Run ``python examples/digits.py`` (or ``make demo``). It needs no download: the 1797 images of 8 x 8 pixels come with
scikit-learn. Both methods get the same student network with the same initial weights, the same labelled images, the
same batches with the same random shifts, the same optimiser and the same number of steps. FRSKD adds a self-teacher
(BiFPNc) during training only; every accuracy of a student is measured with the student alone.

What is held apart: the images are split once, by class, into a development pool of 40 images per class and a test
set of everything else. Each seed draws its labelled training images from the pool. The test set takes no part in any
choice.

How the settings were chosen: learning rate (of 0.02, 0.05, 0.1), weight decay (5e-4 to 2e-2) and number of epochs (50,
100, 150) were chosen for the cross-entropy baseline, over three seeds, on the pool images that were not drawn for
training (``--evaluate-on validation``). Nothing was tuned for FRSKD: it takes over the baseline's settings, and alpha,
beta and temperature are the values of the method's published CIFAR-100 recipe (2, 100, 4). Equal steps are not equal
time: a step of FRSKD costs more, and the table says how much.
The reported accuracy is that of the last epoch, never of the best one.

Results go to ``--out`` (default ``runs/digits``): results.json with every setting, loss_curves.png and
attention_maps.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import matplotlib
    import numpy
    import scipy.stats
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ImportError as error:
    sys.exit(
        f"examples/digits.py could not import {error.name!r}. It needs scikit-learn for the images, matplotlib for the "
        "plots and tqdm for the progress bar; run `pip install scikit-learn matplotlib tqdm`."
    )
try:
    import frskd_fast
    from frskd_fast.functional import attention_map
    from frskd_fast.losses import FRSKDLoss
    from frskd_fast.models import BiFPNc
except ImportError as error:
    sys.exit(f"examples/digits.py could not import frskd_fast ({error}); run `pip install .` in the repository's root.")

matplotlib.use("Agg")
from matplotlib import pyplot

CLASSES = 10
POOL_PER_CLASS = 40
IMAGE_SIDE = 16
LARGEST_SHIFT = 2
SPLIT_SEED = 210308273
EVALUATIONS_PER_RUN = 10
METHOD_NAMES = {"ce": "cross-entropy", "frskd": "FRSKD"}
README_BEGIN, README_END = "<!-- demo:begin -->", "<!-- demo:end -->"


class Split(NamedTuple):
    """Images (N, 1, 16, 16) with labels (N,), and the row numbers of the two parts."""

    images: Tensor
    labels: Tensor
    pool: Tensor
    test: Tensor


class Run(NamedTuple):
    """One trained network pair and what was written down while it trained."""

    record: dict[str, Any]
    student: nn.Module
    self_teacher: nn.Module | None


class Student(nn.Module):
    """A residual network of three stages (16, 32, 64 channels at 16, 8 and 4 pixels) and a linear classifier.

    ``forward`` returns ``(features, logits)`` as the backbones in ``frskd_fast.models`` do.
    """

    channels = (16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.ModuleList([ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2)])
        self.classifier = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        value = self.stem(images)
        features = []
        for stage in self.stages:
            value = stage(value)
            features.append(value)
        return features, self.classifier(value.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut, ReLU at the end."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut = (
            nn.Identity()
            if channels_in == channels_out and stride == 1
            else nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        )

    def forward(self, value: Tensor) -> Tensor:
        return F.relu(self.convolutions(value) + self.shortcut(value))


def load_split() -> Split:
    """The digits at 16 x 16, standardised with the pool's mean and deviation, and the fixed split by class."""
    digits = load_digits()
    labels = torch.from_numpy(digits.target).long()
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    pool = torch.cat([order[labels[order] == digit][:POOL_PER_CLASS] for digit in range(CLASSES)])
    in_pool = torch.zeros(len(labels), dtype=torch.bool)
    in_pool[pool] = True
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = F.interpolate(images, size=IMAGE_SIDE, mode="bilinear", align_corners=False)
    images = (images - images[pool].mean()) / images[pool].std()
    return Split(images, labels, pool, torch.nonzero(~in_pool).flatten())


def draw_training_images(split: Split, labels_per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers of the labelled training images of this seed, and of the rest of the pool (the validation images)."""
    generator = torch.Generator().manual_seed(seed)
    order = split.pool[torch.randperm(len(split.pool), generator=generator)]
    groups = [order[split.labels[order] == digit] for digit in range(CLASSES)]
    return torch.cat([group[:labels_per_class] for group in groups]), torch.cat([g[labels_per_class:] for g in groups])


def shift_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by its own random whole number of pixels (at most 2, one pixel of the original image)."""
    side = images.shape[-1]
    background = images.amin()
    padded = F.pad(images - background, (LARGEST_SHIFT,) * 4) + background
    offsets = torch.randint(0, 2 * LARGEST_SHIFT + 1, (2, len(images), 1), generator=generator).to(images.device)
    pixels = torch.arange(side, device=images.device)
    rows, columns = offsets[0] + pixels, offsets[1] + pixels  # (N, side) each
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[batch, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.no_grad()
def accuracy(student: nn.Module, images: Tensor, labels: Tensor, self_teacher: nn.Module | None = None) -> float:
    """Percent of images classified correctly by the student, or by the self-teacher where one is given."""
    networks = [student] if self_teacher is None else [student, self_teacher]
    for network in networks:
        network.eval()
    correct = 0
    for some_images, some_labels in zip(images.split(250), labels.split(250), strict=True):
        features, logits = student(some_images)
        if self_teacher is not None:
            logits = self_teacher(features)[1]
        correct += int((logits.argmax(1) == some_labels).sum())
    for network in networks:
        network.train()
    return 100.0 * correct / len(labels)


def train(method: str, seed: int, split: Split, settings: argparse.Namespace, progress: tqdm) -> Run:
    """Train one student with cross-entropy alone (``ce``) or with FRSKD (``frskd``); all else is the same."""
    device = torch.device(settings.device)
    training, validation = draw_training_images(split, settings.labels_per_class, seed)
    held_out = split.test if settings.evaluate_on == "test" else validation
    train_images, train_labels = split.images[training].to(device), split.labels[training].to(device)
    eval_images, eval_labels = split.images[held_out].to(device), split.labels[held_out].to(device)

    # The student is built first from the seed, so both methods start from the same weights.
    torch.manual_seed(seed)
    student = Student().to(device)
    self_teacher = BiFPNc(list(Student.channels), CLASSES).to(device) if method == "frskd" else None
    criterion = FRSKDLoss(settings.alpha, settings.beta, settings.temperature)
    parameters = [*student.parameters(), *(self_teacher.parameters() if self_teacher is not None else ())]
    optimiser = torch.optim.SGD(
        parameters, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.epochs)
    generator = torch.Generator().manual_seed(seed)  # one stream for batches and shifts, the same for both methods
    part_names = ("loss", "ce_student", "ce_teacher", "kd", "feature") if self_teacher is not None else ("loss",)
    curves: dict[str, list[float]] = {name: [] for name in part_names}
    accuracies: list[tuple[int, float]] = []
    seconds = []
    evaluate_every = max(1, settings.epochs // EVALUATIONS_PER_RUN)

    for epoch in range(1, settings.epochs + 1):
        started = time.perf_counter()
        sums = torch.zeros(len(part_names), device=device)  # stays on the device: one read per epoch, not per step
        order = torch.randperm(len(training), generator=generator).to(device)
        starts = range(0, len(order), settings.batch_size)
        for start in starts:
            rows = order[start : start + settings.batch_size]
            images, labels = shift_images(train_images[rows], generator), train_labels[rows]
            student_features, student_logits = student(images)
            if self_teacher is None:
                loss = F.cross_entropy(student_logits, labels)
                parts: Sequence[Tensor] = (loss,)
            else:
                teacher_features, teacher_logits = self_teacher(student_features)
                parts = criterion(
                    student_logits, teacher_logits, student_features, teacher_features, labels, return_parts=True
                )
                loss = parts[0]
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            sums += torch.stack([part.detach().float() for part in parts])
        schedule.step()
        means = (sums / len(starts)).tolist()
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(means[0]):
            sys.exit(
                f"The {METHOD_NAMES[method]} loss of seed {seed} is {means[0]} in epoch {epoch}: training diverged."
            )
        for name, mean in zip(part_names, means, strict=True):
            curves[name].append(mean)
        if epoch % evaluate_every == 0 or epoch == settings.epochs:
            accuracies.append((epoch, accuracy(student, eval_images, eval_labels)))
            progress.set_postfix(seed=seed, method=method, accuracy=f"{accuracies[-1][1]:.1f}%")
        progress.update()

    record: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "student_accuracy_percent": accuracies[-1][1],
        "seconds_per_epoch": statistics.median(seconds),
        "training_images": len(training),
        "evaluation_images": len(held_out),
        "curves": curves,
        "accuracy_curve": accuracies,
    }
    if self_teacher is not None:
        record["self_teacher_accuracy_percent"] = accuracy(student, eval_images, eval_labels, self_teacher)
        record["implementation"] = frskd_fast.last_impl()
    return Run(record, student, self_teacher)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def verdict(differences: Sequence[float]) -> str:
    """One sentence from the per-seed differences FRSKD - cross-entropy in percentage points.

    Ahead or behind is said only where the 95 % interval of the mean paired difference (Student's t) leaves out zero.

    >>> verdict([1.0, 1.5, 2.0])
    'FRSKD is ahead by 1.5 ± 1.2 percentage points (mean and 95 % interval of the paired difference over 3 seeds).'
    >>> verdict([-1.0, 1.5, 0.0]).split(":")[0]
    'No difference beyond the spread'
    >>> verdict([2.0])
    'FRSKD minus cross-entropy is +2.0 percentage points on one seed, which says nothing about the spread.'
    """
    mean, deviation = mean_and_deviation(differences)
    seeds = len(differences)
    if seeds < 2:
        return (
            f"FRSKD minus cross-entropy is {mean:+.1f} percentage points on one seed, which says nothing about the "
            "spread."
        )
    half_width = float(scipy.stats.t.ppf(0.975, seeds - 1)) * deviation / math.sqrt(seeds)
    basis = f"(mean and 95 % interval of the paired difference over {seeds} seeds)"
    if mean - half_width > 0:
        return f"FRSKD is ahead by {mean:.1f} ± {half_width:.1f} percentage points {basis}."
    if mean + half_width < 0:
        return f"FRSKD is behind by {-mean:.1f} ± {half_width:.1f} percentage points {basis}."
    return f"No difference beyond the spread: {mean:+.1f} ± {half_width:.1f} percentage points {basis}."


def summarise(runs: Sequence[Run], settings: argparse.Namespace, total_seconds: float) -> dict[str, Any]:
    """Everything that is worth keeping, in plain types."""
    records = [run.record for run in runs]
    by_method = {name: [record for record in records if record["method"] == name] for name in METHOD_NAMES}
    accuracies = {name: [r["student_accuracy_percent"] for r in group] for name, group in by_method.items()}
    differences = [ours - base for ours, base in zip(accuracies["frskd"], accuracies["ce"], strict=True)]
    rows = []
    for name, values, times in (
        ("cross-entropy, student", accuracies["ce"], by_method["ce"]),
        ("FRSKD, student", accuracies["frskd"], by_method["frskd"]),
        ("FRSKD, self-teacher (training only)", [r["self_teacher_accuracy_percent"] for r in by_method["frskd"]], []),
    ):
        mean, deviation = mean_and_deviation(values)
        seconds = statistics.median(r["seconds_per_epoch"] for r in times) if times else None
        rows.append({"network": name, "mean": mean, "deviation": deviation, "seconds_per_epoch": seconds})
    return {
        "settings": {
            **{name: value for name, value in vars(settings).items() if name not in ("out", "update_readme", "json")},
            "optimiser": "SGD, cosine schedule",
            "image_side": IMAGE_SIDE,
            "largest_shift_pixels": LARGEST_SHIFT,
            "training_images": records[0]["training_images"],
            "evaluation_images": records[0]["evaluation_images"],
        },
        "environment": {
            "frskd_fast": getattr(frskd_fast, "__version__", "unknown"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "implementation": by_method["frskd"][0]["implementation"],
        },
        "rows": rows,
        "paired_differences": differences,
        "verdict": verdict(differences),
        "total_seconds": total_seconds,
        "runs": records,
    }


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table with the plain statement below it."""
    settings, seeds = results["settings"], results["settings"]["seeds"]
    evaluated = f"{settings['evaluate_on']} accuracy, %"
    lines = [["network", f"{evaluated} (mean ± deviation over {seeds} seeds)", "training time per epoch, ms"]]
    for row in results["rows"]:
        seconds = row["seconds_per_epoch"]
        lines.append(
            [
                row["network"],
                f"{row['mean']:.2f} ± {row['deviation']:.2f}",
                "-" if seconds is None else f"{1000 * seconds:.0f}",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    used = sorted(set(results["environment"]["implementation"].values()))
    text += ["", results["verdict"], ""]
    environment = results["environment"]
    text.append(
        f"{settings['training_images']} labelled training images, {settings['evaluation_images']} "
        f"{settings['evaluate_on']} images, {settings['epochs']} epochs of the same steps for both methods; "
        f"FRSKD's loss by the implementation {', '.join(used)}; PyTorch {environment['torch']} on "
        f"{settings['device']}, CPU threads: {environment['threads']}; {results['total_seconds']:.0f} s in total."
    )
    return "\n".join(text)


def plot_loss_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Left: training losses, mean over seeds. Right: accuracy of the student, mean and range over seeds."""
    figure, (losses, scores) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method, name in METHOD_NAMES.items():
        group = [record for record in records if record["method"] == method]
        for part in group[0]["curves"]:
            mean = numpy.mean([record["curves"][part] for record in group], axis=0)
            label = f"{name}: total" if part == "loss" else f"{name}: {part}"
            losses.plot(range(1, len(mean) + 1), mean, label=label, linewidth=2 if part == "loss" else 1)
        epochs = [epoch for epoch, _ in group[0]["accuracy_curve"]]
        values = numpy.array([[value for _, value in record["accuracy_curve"]] for record in group])
        (line,) = scores.plot(epochs, values.mean(0), marker=".", label=f"{name}, student")
        scores.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)
    losses.set(xlabel="epoch", ylabel="training loss (parts before weighting)", yscale="log")
    scores.set(xlabel="epoch", ylabel="accuracy, % (mean and range over seeds)")
    losses.legend(fontsize=8, loc="lower left")
    scores.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@torch.no_grad()
def plot_attention_maps(baseline: Run, distilled: Run, images: Tensor, path: Path) -> None:
    """Attention maps (channel mean of squares, unit length) of every level, one row per image."""
    assert distilled.self_teacher is not None
    for network in (baseline.student, distilled.student, distilled.self_teacher):
        network.eval()
    student_features = distilled.student(images)[0]
    columns = {
        "CE student": baseline.student(images)[0],
        "FRSKD student": student_features,
        "FRSKD self-teacher": distilled.self_teacher(student_features)[0],
    }
    levels = len(student_features)
    count = 1 + levels * len(columns)
    figure, axes = pyplot.subplots(
        len(images), count, figsize=(1.15 * count, 1.15 * len(images) + 0.5), squeeze=False, layout="constrained"
    )
    for row, image in enumerate(images):
        axes[row, 0].imshow(image[0].cpu().numpy(), cmap="gray")
    axes[0, 0].set_title("image", fontsize=7)
    column = 1
    for name, features in columns.items():
        for level, feature in enumerate(features, start=1):
            maps = attention_map(feature).reshape(len(images), *feature.shape[-2:]).cpu().numpy()
            for row in range(len(images)):
                axes[row, column].imshow(maps[row], cmap="viridis")
            axes[0, column].set_title(f"{name}\nlevel {level}", fontsize=7)
            column += 1
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def update_readme(path: Path, text: str) -> None:
    """Replace what stands between the demo markers of a Markdown file by the generated table."""
    content = path.read_text(encoding="utf-8")
    if content.count(README_BEGIN) != 1 or content.count(README_END) != 1:
        sys.exit(
            f"{path} must hold the lines {README_BEGIN} and {README_END} once each; add them where the table goes."
        )
    before, rest = content.split(README_BEGIN)
    after = rest.split(README_END)[1]
    path.write_text(f"{before}{README_BEGIN}\n{text}\n{README_END}{after}", encoding="utf-8")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of the example."""
    parser = argparse.ArgumentParser(description="FRSKD against cross-entropy on few labelled digits.")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, 0 .. seeds-1 (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of both methods (default %(default)s)")
    parser.add_argument(
        "--labels-per-class", type=int, default=10, help="labelled images per digit (default %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=50, help="images per step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="of SGD (default %(default)s)")
    parser.add_argument("--momentum", type=float, default=0.9, help="of SGD (default %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=5e-3, help="of SGD (default %(default)s)")
    parser.add_argument(
        "--alpha", type=float, default=2.0, help="weight of the logit distillation (default %(default)s)"
    )
    parser.add_argument("--beta", type=float, default=100.0, help="weight of the feature term (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=4.0, help="softmax temperature (default %(default)s)")
    parser.add_argument(
        "--evaluate-on",
        choices=("test", "validation"),
        default="test",
        help="validation: the pool images not drawn for training; use it to choose settings (default %(default)s)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits"), help="folder for results (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    parser.add_argument("--quick", action="store_true", help="2 seeds of 3 epochs: a check that it runs, no result")
    parser.add_argument("--update-readme", type=Path, metavar="FILE", help="put the table between FILE's demo markers")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.seeds, settings.epochs = 2, 3
    if min(settings.seeds, settings.epochs, settings.batch_size) < 1:
        parser.error("--seeds, --epochs and --batch-size must be at least 1.")
    largest = POOL_PER_CLASS - (settings.evaluate_on == "validation")
    if not 1 <= settings.labels_per_class <= largest:
        parser.error(f"--labels-per-class is {settings.labels_per_class}; it must be between 1 and {largest}.")
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every seed with both methods, write the files and print the table."""
    settings = parse_arguments(arguments)
    started = time.perf_counter()
    split = load_split()
    runs = []
    with tqdm(total=settings.seeds * settings.epochs * len(METHOD_NAMES), unit="epoch", smoothing=0.05) as progress:
        for seed in range(settings.seeds):
            for method in METHOD_NAMES:
                runs.append(train(method, seed, split, settings, progress))
    baseline, distilled = runs[-2:]
    settings.out.mkdir(parents=True, exist_ok=True)
    plot_loss_curves([run.record for run in runs], settings.out / "loss_curves.png")
    shown = torch.stack([split.test[split.labels[split.test] == digit][0] for digit in range(0, CLASSES, 2)])
    shown_images = split.images[shown].to(settings.device)
    plot_attention_maps(baseline, distilled, shown_images, settings.out / "attention_maps.png")
    results = summarise(runs, settings, time.perf_counter() - started)
    (settings.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = table(results)
    if settings.update_readme is not None:
        update_readme(settings.update_readme, text)
    print(json.dumps(results, indent=1) if settings.json else text)
    print(f"Written to {settings.out}: results.json, loss_curves.png, attention_maps.png", file=sys.stderr)


if __name__ == "__main__":
    main()
