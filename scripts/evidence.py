"""The methods beside each other on the digits recipe, over several seeds; writes docs/evidence.md from the runs' own logs.

    python scripts/evidence.py                     train what is missing below runs/evidence, then write table and plot
    python scripts/evidence.py --only-report       write them from the runs that are there
    python scripts/evidence.py --check             fail where docs/evidence.md is not what the logs give

Every run is `frskd-fast fit --config digits` in a process of its own, with the overrides that the table names; a run that
was interrupted goes on. All methods share student, labelled images of a seed, batches, augmentation, optimiser, schedule
and number of steps. Accuracies are those of the student alone on the test images after the last epoch, never of the best.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- evidence:begin -->", "<!-- evidence:end -->"
BASELINE = "ce"
PLAIN = "ClassificationTask"


class Variant(NamedTuple):
    """One row of the table: its name and what it overrides in the recipe."""

    title: str
    overrides: tuple[str, ...]


VARIANTS = {
    "ce": Variant("cross-entropy", ("--task", PLAIN)),
    "ls": Variant("label smoothing 0.1", ("--task", PLAIN, "--task.label_smoothing", "0.1")),
    "ce_mixup": Variant("cross-entropy, mixup 0.2", ("--task", PLAIN, "--data.mixup", "0.2")),
    "att": Variant("FRSKD (att)", ()),
    "fit": Variant("FRSKD (fit)", ("--task.distill", "fit", "--task.beta", "1")),
    "od": Variant("FRSKD (od)", ("--task.distill", "od", "--task.beta", "1e-4")),
    "sla": Variant("FRSKD (att) + SLA", ("--task.auxiliary", "sla")),
    "mixup": Variant("FRSKD (att), mixup 0.2", ("--data.mixup", "0.2")),
}


class Run(NamedTuple):
    """What the logs of one run say."""

    accuracy: float  # percent
    curve: list[tuple[int, float]]  # (epochs done, percent)
    seconds: float  # of an epoch, median
    peak: int  # bytes of the process at its largest
    epochs: int


def folder_of(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant}-seed{seed}"


def train(out: Path, variant: str, seed: int, extra: Sequence[str]) -> None:
    """Run, or continue, one training; its peak memory goes into `process.json`."""
    folder = folder_of(out, variant, seed)
    command = [
        sys.executable, "-m", "frskd_fast.training", "fit", "--config", "digits", "--run_dir", str(folder),
        "--seed_everything", str(seed), "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
        "--panels.enabled", "false", "--tensorboard", "false", *VARIANTS[variant].overrides, *extra,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # Output to a file: a pipe nobody reads would fill, and wait4 is what gives the peak.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        sys.exit(f"{variant}, seed {seed}: the run ended with status {running.returncode}; see {log.name}.")
    # Kilobytes on Linux, bytes on macOS.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    file = folder / "process.json"
    before = json.loads(file.read_text())["peak"] if file.is_file() else 0
    about = {
        "peak": max(peak, before),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    file.write_text(json.dumps(about) + "\n", encoding="utf-8")


def read(folder: Path) -> Run | None:
    """The logs of a finished run; None for any other."""
    if not (folder / "epochs.csv").is_file() or not (folder / "process.json").is_file():
        return None
    with open(folder / "epochs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    curve = [
        (int(row["epoch"]) + 1, 100 * float(row["validation/accuracy"])) for row in rows if row["validation/accuracy"]
    ]
    if not curve or curve[-1][0] != len(rows):
        return None
    return Run(
        accuracy=curve[-1][1],
        curve=curve,
        seconds=statistics.median(float(row["seconds"]) for row in rows),
        peak=json.loads((folder / "process.json").read_text(encoding="utf-8"))["peak"],
        epochs=len(rows),
    )


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t."""
    import scipy.stats

    return float(scipy.stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval of paired differences."""
    spread = f" ± {half_width(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.2f}{spread}"


def verdict(name: str, differences: Sequence[float]) -> str:
    """Whether a method is ahead of the baseline by more than the spread of the paired differences."""
    text, mean = interval(differences), statistics.fmean(differences)
    if len(differences) < 2:
        return f"{name} differs from cross-entropy by {text} percentage points on one seed, which says nothing of the spread."
    half = half_width(differences)
    if mean - half > 0:
        return f"{name} is ahead of cross-entropy by {text} percentage points."
    if mean + half < 0:
        return f"{name} is behind cross-entropy by {-mean:.2f} ± {half:.2f} percentage points."
    return f"{name} does not differ from cross-entropy beyond the spread: {text} percentage points."


def collect(out: Path) -> dict[str, dict[int, Run]]:
    """All finished runs, by variant and seed."""
    found: dict[str, dict[int, Run]] = {}
    for variant in VARIANTS:
        for folder in sorted(out.glob(f"{variant}-seed*")):
            run = read(folder) if folder.is_dir() else None
            if run is not None:
                found.setdefault(variant, {})[int(folder.name.rsplit("seed", 1)[1])] = run
    return found


def length_of(runs: dict[str, dict[int, Run]], out: Path) -> int:
    """Epochs of the runs in one folder, which have to be the same."""
    if BASELINE not in runs:
        sys.exit(f"{out} holds no finished run of {BASELINE}, which the others are compared with.")
    lengths = {run.epochs for found in runs.values() for run in found.values()}
    if len(lengths) > 1:
        sys.exit(f"{out} holds runs of {sorted(lengths)} epochs, which do not compare; remove those of other lengths.")
    return lengths.pop()


def plot_of(epochs: int) -> Path:
    """The file of the plot of runs of this length."""
    return DOCUMENT.with_name(f"evidence-{epochs}.png")


def report(runs: dict[str, dict[int, Run]], out: Path) -> str:
    """The table as Markdown, a verdict for each method, and how it was made."""
    epochs = length_of(runs, out)
    baseline = runs[BASELINE]
    base_seconds = statistics.median(run.seconds for run in baseline.values())
    lines = [
        "| method | seeds | test accuracy, % (mean ± deviation) | minus cross-entropy (95 % interval, paired) | epoch, ms | "
        "of cross-entropy | peak memory, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    verdicts = []
    for variant, found in runs.items():
        values = [run.accuracy for run in found.values()]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        seconds = statistics.median(run.seconds for run in found.values())
        shared = sorted(set(found) & set(baseline))
        differences = [found[seed].accuracy - baseline[seed].accuracy for seed in shared]
        lines.append(
            f"| {VARIANTS[variant].title} | {len(values)} | {statistics.fmean(values):.2f}{deviation} | "
            f"{'-' if variant == BASELINE else interval(differences)} | {1000 * seconds:.0f} | "
            f"{seconds / base_seconds:.2f}x | {max(run.peak for run in found.values()) / 1e6:.0f} |"
        )
        if variant != BASELINE:
            verdicts.append(f"* {verdict(VARIANTS[variant].title, differences)}")
    about = json.loads((folder_of(out, BASELINE, next(iter(baseline))) / "process.json").read_text(encoding="utf-8"))
    return "\n".join(
        [
            f"### {epochs} epochs",
            "",
            *lines,
            "",
            *verdicts,
            "",
            f"The same steps for all methods; {about['machine']}, {about['cores']} cores. Memory "
            "is that of the whole process, Python and PyTorch included. Overrides: "
            + "; ".join(f"{VARIANTS[name].title}: `{' '.join(VARIANTS[name].overrides) or 'none'}`" for name in runs)
            + ".",
            "",
            f"![Test accuracy against epochs: mean over the seeds, and their range]({plot_of(epochs).name})",
        ]
    )


def plot(runs: dict[str, dict[int, Run]], path: Path) -> None:
    """Accuracy against epochs: mean over the seeds and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for variant, found in runs.items():
        curves = [run.curve for run in found.values()]
        epochs = [epoch for epoch, _ in curves[0]]
        columns = list(
            zip(*[[value for _, value in curve] for curve in curves if len(curve) == len(epochs)], strict=True)
        )
        (line,) = axes.plot(epochs, [statistics.fmean(column) for column in columns], label=VARIANTS[variant].title)
        lowest, highest = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(epochs, lowest, highest, color=line.get_color(), alpha=0.12)
    axes.set(xlabel="epoch", ylabel="test accuracy of the student, % (mean, range over seeds)")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def inserted(content: str, text: str) -> str:
    """The document with `text` between its markers."""
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        sys.exit(f"{DOCUMENT} must hold the lines {BEGIN} and {END} once each.")
    before, rest = content.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, report or check."""
    parser = argparse.ArgumentParser(description="The methods beside each other on the digits recipe.")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. seeds-1 (default %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        nargs="+",
        default=[Path("runs/evidence")],
        help="folders to report on, each with runs of one length; the first is also trained in (default runs/evidence)",
    )
    parser.add_argument("--only-report", action="store_true", help="train nothing")
    parser.add_argument("--check", action="store_true", help="train nothing, change nothing, compare the document")
    options, extra = parser.parse_known_args(arguments)
    variants = options.variants.split(",")
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants holds {unknown[0]!r}; known are {', '.join(VARIANTS)}.")
    if not (options.only_report or options.check):
        for seed in range(options.seeds):
            for variant in variants:
                if read(folder_of(options.out[0], variant, seed)) is None:
                    print(f"{variant}, seed {seed}", flush=True)
                    train(options.out[0], variant, seed, extra)
    found = {out: collect(out) for out in options.out}
    text = "\n\n".join(report(runs, out) for out, runs in found.items())
    content = DOCUMENT.read_text(encoding="utf-8")
    if options.check:
        if inserted(content, text) != content:
            folders = " and ".join(map(str, options.out))
            sys.exit(f"{DOCUMENT} is not what the logs in {folders} give; run scripts/evidence.py --only-report.")
        return
    for out, runs in found.items():
        plot(runs, plot_of(length_of(runs, out)))
    DOCUMENT.write_text(inserted(content, text), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
