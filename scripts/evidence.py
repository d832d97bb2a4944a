"""Methods beside each other on the digits, over several seeds; writes docs/evidence.md from the runs' own logs.

    python scripts/evidence.py                     train what is missing below runs/evidence, then write table and plot
    python scripts/evidence.py --study teachers    the same for the methods with a trained teacher, below runs/evidence-teachers
    python scripts/evidence.py --study segmentation   FRSKD beside cross-entropy on the digit scenes
    python scripts/evidence.py --only-report       write them from the runs that are there
    python scripts/evidence.py --check             fail where docs/evidence.md is not what its result files give

Every run is `frskd-fast fit --config RECIPE` in a process of its own, with the overrides that the table names; a run that
was interrupted goes on. All methods of a study share student, labelled images of a seed, optimiser and form of schedule;
batches, augmentation and number of epochs are those of each recipe. A run that a recipe needs, such as a teacher, is
trained once, for all seeds, before and in a process of its own. Accuracies and mIoU are those of the student alone on the test
images after the last epoch, never of the best. What the logs say is kept in bench/results.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "evidence.md"
RESULTS = ROOT / "bench" / "results"
SOURCE = re.compile(r"<!-- evidence:source (\S+) -->")
SCHEMA = "evidence, 1"
BASELINE = "ce"
UNMEASURED = "Not measured yet."
PLAIN = "ClassificationTask"

Document = dict[str, Any]


class Variant(NamedTuple):
    """One row of a table: its name, and the recipe with what is overridden in it."""

    title: str
    overrides: tuple[str, ...] = ()
    recipe: str = "digits"


STUDIES = {
    "frskd": {
        "ce": Variant("cross-entropy", ("--task", PLAIN)),
        "ls": Variant("label smoothing 0.1", ("--task", PLAIN, "--task.label_smoothing", "0.1")),
        "ce_mixup": Variant("cross-entropy, mixup 0.2", ("--task", PLAIN, "--data.mixup", "0.2")),
        "att": Variant("FRSKD (att)"),
        "fit": Variant("FRSKD (fit)", ("--task.distill", "fit", "--task.beta", "1")),
        "od": Variant("FRSKD (od)", ("--task.distill", "od", "--task.beta", "1e-4")),
        "sla": Variant("FRSKD (att) + SLA", ("--task.auxiliary", "sla")),
        "mixup": Variant("FRSKD (att), mixup 0.2", ("--data.mixup", "0.2")),
    },
    "teachers": {
        "ce": Variant("cross-entropy", recipe="digits_resnet8_plain"),
        "kd": Variant("KD", recipe="digits_kd"),
        "hsakd": Variant("HSAKD", recipe="digits_hsakd"),
        "hsakd_frozen": Variant("HSAKD, frozen backbone", recipe="digits_hsakd_frozen"),
        "sskd": Variant("SSKD", recipe="digits_sskd"),
        "online": Variant("HSAKD, online pair", recipe="digits_hsakd_online"),
        "ffl": Variant("FFL", recipe="digits_ffl"),
        "collaborative": Variant("CollaborativeTeaching", recipe="digits_collaborative"),
        "adain": Variant("AdaIN-KD", recipe="digits_adain"),
    },
    "segmentation": {
        "ce": Variant("cross-entropy", recipe="digit_scenes_plain"),
        "frskd": Variant("FRSKD", recipe="digit_scenes_frskd"),
    },
}
# What is compared, by its name in the logs and in words.
SCORES = {"segmentation": ("miou", "mIoU")}
ACCURACY = "accuracy", "accuracy"


class Run(NamedTuple):
    """What the logs of one run say."""

    accuracy: float  # percent; of the study's score, mIoU for example
    curve: list[tuple[int, float]]  # (epochs done, percent)
    seconds: float  # of training, all epochs together
    peak: int  # bytes of the process at its largest
    epochs: int


def markers(study: str) -> tuple[str, str]:
    """The lines between which the document holds the tables of a study."""
    name = "evidence" if study == "frskd" else f"evidence-{study}"
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def folder_of(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant}-seed{seed}"


def train(out: Path, name: str, variant: Variant, seed: int, extra: Sequence[str]) -> None:
    """Run, or continue, one training; its peak memory goes into `process.json`."""
    folder = folder_of(out, name, seed)
    words = [
        "--config", variant.recipe, "--run_dir", str(folder),
        "--seed_everything", str(seed), "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
        "--panels.enabled", "false", "--tensorboard", "false", *variant.overrides, *extra,
    ]  # fmt: skip
    train_needed(words)
    peak = fit(words, folder)
    file = folder / "process.json"
    before = json.loads(file.read_text())["peak"] if file.is_file() else 0
    about = {
        "peak": max(peak, before),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    file.write_text(json.dumps(about) + "\n", encoding="utf-8")


def train_needed(words: Sequence[str]) -> None:
    """Train the runs that `--config RECIPE ...` needs and that are not there, each in a process of its own."""
    from frskd_fast.training.prerequisites import split_off
    from frskd_fast.training.recipe_files import recipe
    from frskd_fast.training.run_folder import finished

    _, needed, _ = split_off(["--config", json.dumps(recipe(words[1])), *words[2:]], words[1])
    for run in needed:
        if finished(run.folder) is None:
            train_needed(run.arguments())
            print(run.recipe, flush=True)
            fit(run.arguments(), run.folder)


def fit(words: Sequence[str], folder: Path) -> int:
    """`frskd-fast fit WORDS` in a process of its own; its peak memory in bytes."""
    command = [sys.executable, "-m", "frskd_fast.training", "fit", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # Output to a file: a pipe nobody reads would fill, and wait4 is what gives the peak.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        sys.exit(f"{folder.name}: the run ended with status {running.returncode}; see {log.name}.")
    # Kilobytes on Linux, bytes on macOS.
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read(folder: Path) -> Run | None:
    """The logs of a finished run; None for any other."""
    if not (folder / "epochs.csv").is_file() or not (folder / "process.json").is_file():
        return None
    curve, seconds = read_epochs(folder / "epochs.csv")
    if not curve or curve[-1][0] != len(seconds):
        return None
    return Run(
        accuracy=curve[-1][1],
        curve=curve,
        seconds=sum(seconds),
        peak=json.loads((folder / "process.json").read_text(encoding="utf-8"))["peak"],
        epochs=len(seconds),
    )


def read_epochs(file: Path) -> tuple[list[tuple[int, float]], list[float]]:
    """(epochs done, score in percent) where it was measured, and the seconds of every epoch."""
    with open(file, encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    names = [f"validation/{name}" for name, _ in (*SCORES.values(), ACCURACY)]
    scores = [(int(row["epoch"]) + 1, row[name]) for row in rows for name in names if row.get(name)]
    curve = [(epochs, 100 * float(score)) for epochs, score in scores]
    return curve, [float(row["seconds"]) for row in rows]


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
    return f"{name}: no difference from cross-entropy could be shown, {text} percentage points."


def teacher_of(variant: Variant) -> str | None:
    """The run that a recipe learns from and, where that one's weights come from another run, the other one, as Markdown."""
    from frskd_fast.training.recipe_files import HANDED_TO_TASK, recipe

    settings = recipe(variant.recipe)
    teacher = next((settings[name] for name in HANDED_TO_TASK if settings.get(name)), None)
    if teacher is None:
        return None
    weights = recipe(teacher).get("weights")
    return f"`{teacher}`" + (f" on `{weights}`" if weights else "")


def collect(study: str, out: Path) -> Document:
    """What the logs of all finished runs say, as it is kept in bench/results."""
    found: dict[str, dict[str, Any]] = {}
    for variant in STUDIES[study]:
        for folder in sorted(out.glob(f"{variant}-seed*")):
            run = read(folder) if folder.is_dir() else None
            if run is not None:
                found.setdefault(variant, {})[folder.name.rsplit("seed", 1)[1]] = run._asdict()
    if BASELINE not in found:
        sys.exit(f"{out} holds no finished run of {BASELINE}, which the others are compared with.")
    lengths: dict[str, set[int]] = {}
    for variant, runs in found.items():
        lengths.setdefault(STUDIES[study][variant].recipe, set()).update(run["epochs"] for run in runs.values())
    for recipe, epochs in lengths.items():
        if len(epochs) > 1:
            sys.exit(
                f"{out} holds runs of {recipe} of {sorted(epochs)} epochs, which do not compare; remove those of other lengths."
            )
    about = json.loads((folder_of(out, BASELINE, int(next(iter(found[BASELINE])))) / "process.json").read_text("utf-8"))
    curves = {file.parent.name: read_epochs(file)[0] for file in sorted(out.glob("*/epochs.csv"))}
    teachers = {name: curve[-1][1] for name, curve in curves.items() if "-seed" not in name and curve}
    return {
        "schema": SCHEMA,
        "study": study,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **{name: about[name] for name in ("python", "machine", "cores")},
        "teachers": teachers,
        "teacher_of": {variant: teacher_of(STUDIES[study][variant]) for variant in found},
        "runs": found,
    }


def load(study: str, source: Path) -> Document:
    """A result file, or what the logs in a folder say."""
    if source.is_dir():
        return collect(study, source)
    document: Document = json.loads(source.read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA or document.get("study") != study:
        sys.exit(f"{source} is no result of scripts/evidence.py --study {study}.")
    return document


def name_of(document: Document) -> str:
    """The study, unless it is the first, and the length of its runs, where all have one."""
    study = "" if document["study"] == "frskd" else f"-{document['study']}"
    lengths = lengths_of(document)
    return f"evidence{study}-{lengths[0]}" if len(lengths) == 1 else f"evidence{study}"


def lengths_of(document: Document) -> list[int]:
    """The different numbers of epochs."""
    return sorted({run["epochs"] for runs in document["runs"].values() for run in runs.values()})


def score_of(document: Document) -> str:
    """What the study compares, in words."""
    return SCORES.get(document["study"], ACCURACY)[1]


def plot_of(document: Document) -> Path:
    """The file of the plot."""
    return DOCUMENT.with_name(f"{name_of(document)}.png")


def by_seed(document: Document, variant: str) -> dict[int, Run]:
    """The runs of one variant, by seed."""
    return {int(seed): Run(**run) for seed, run in document["runs"][variant].items()}


def report(document: Document) -> str:
    """The table as Markdown, a verdict for each method, and how it was made."""
    variants, score = STUDIES[document["study"]], score_of(document)
    baseline = by_seed(document, BASELINE)
    lines = [
        f"| method | seeds | test {score}, % (mean ± deviation) | minus cross-entropy (95 % interval, paired) | epochs | "
        "training, s | peak memory, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    verdicts = []
    for variant in document["runs"]:
        found = by_seed(document, variant)
        values = [run.accuracy for run in found.values()]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        seconds = statistics.median(run.seconds for run in found.values())
        shared = sorted(set(found) & set(baseline))
        differences = [found[seed].accuracy - baseline[seed].accuracy for seed in shared]
        teacher = document["teacher_of"][variant]
        lines.append(
            f"| {variants[variant].title}{f', from {teacher}' if teacher else ''} | {len(values)} | "
            f"{statistics.fmean(values):.2f}{deviation} | "
            f"{'-' if variant == BASELINE else interval(differences)} | {next(iter(found.values())).epochs} | "
            f"{seconds:.0f} | {min(run.peak for run in found.values()) / 1e6:.0f} |"
        )
        if variant != BASELINE:
            verdicts.append(f"* {verdict(variants[variant].title, differences)}")
    teachers = "; ".join(f"`{name}` {accuracy:.2f} %" for name, accuracy in document["teachers"].items())
    commands = (f"{variants[name].title}: `{command_of(variants[name])}`" for name in document["runs"])
    lengths = lengths_of(document)
    steps = "The same steps for all methods; " if len(lengths) == 1 else ""
    return "\n".join(
        [
            *([f"### {lengths[0]} epochs", ""] if len(lengths) == 1 else []),
            *lines,
            "",
            *verdicts,
            "",
            "Each interval holds for its own comparison; there is no correction for several comparisons.",
            "",
            *([f"Runs that others need, each trained once: {teachers}.", ""] if teachers else []),
            f"{steps}{document['machine']}, {document['cores']} cores. Training time is that of all epochs, the median over "
            "the seeds, without that of runs that others need. Memory is that of the whole process, Python and PyTorch "
            "included: the smallest peak over the seeds, because the process of a first seed may have trained a teacher "
            f"before. {'; '.join(commands)}.",
            "",
            f"![Test {score} against epochs: mean over the seeds, and their range]({plot_of(document).name})",
        ]
    )


def command_of(variant: Variant) -> str:
    """The recipe and its overrides, as they stand on a command line."""
    return " ".join(["--config", variant.recipe, *variant.overrides])


def plot(document: Document) -> None:
    """Accuracy against epochs: mean over the seeds and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for variant in document["runs"]:
        curves = [run.curve for run in by_seed(document, variant).values()]
        epochs = [epoch for epoch, _ in curves[0]]
        columns = list(
            zip(*[[value for _, value in curve] for curve in curves if len(curve) == len(epochs)], strict=True)
        )
        (line,) = axes.plot(
            epochs, [statistics.fmean(column) for column in columns], label=STUDIES[document["study"]][variant].title
        )
        lowest, highest = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(epochs, lowest, highest, color=line.get_color(), alpha=0.12)
    axes.set(xlabel="epoch", ylabel=f"test {score_of(document)} of the student, % (mean, range over seeds)")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(plot_of(document), dpi=110)
    pyplot.close(figure)


def split(study: str, content: str) -> tuple[str, str, str]:
    """The document before the tables of a study, the tables, and what follows."""
    begin, end = markers(study)
    if content.count(begin) != 1 or content.count(end) != 1:
        sys.exit(f"{DOCUMENT} must hold the lines {begin} and {end} once each.")
    before, rest = content.split(begin)
    between, after = rest.split(end)
    return f"{before}{begin}\n", between, f"{end}{after}"


def block(documents: dict[Path, Document]) -> str:
    """The tables of result files, each after a line that names the file."""

    def line(file: Path) -> str:
        return f"<!-- evidence:source {Path(os.path.relpath(file.absolute(), DOCUMENT.parent)).as_posix()} -->"

    return "\n\n".join(f"{line(file)}\n\n{report(document)}" for file, document in documents.items())


def kept(document: Document) -> Path:
    """Write a document to its file in bench/results."""
    file = RESULTS / f"{document['date']}-{name_of(document)}.json"
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return file


def check(study: str, content: str) -> None:
    """Fail unless the tables of a study are those of the files that they name, or it says that there are none yet."""
    _, between, _ = split(study, content)
    files = [DOCUMENT.parent / name for name in SOURCE.findall(between)]
    if not files and between.strip() != UNMEASURED:
        sys.exit(
            f"{DOCUMENT}: the study {study} names no result file; it must hold its tables, or {UNMEASURED!r} alone."
        )
    if files and between.strip() != block({file: load(study, file) for file in files}).strip():
        sys.exit(
            f"{DOCUMENT}: the tables of the study {study} are not those of {', '.join(file.name for file in files)}."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, report or check."""
    parser = argparse.ArgumentParser(description="Methods beside each other on the digits.")
    parser.add_argument("--study", choices=tuple(STUDIES), default="frskd", help="which table (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. seeds-1 (default %(default)s)")
    parser.add_argument("--variants", help="comma-separated (default: all of the study)")
    parser.add_argument(
        "--out",
        type=Path,
        nargs="+",
        help="folders or result files to report on, each with runs of one length; the first is also trained in (default "
        "runs/evidence, or runs/evidence-STUDY)",
    )
    parser.add_argument("--only-report", action="store_true", help="train nothing")
    parser.add_argument("--check", action="store_true", help="train nothing, change nothing, compare the document")
    options, extra = parser.parse_known_args(arguments)
    content = DOCUMENT.read_text(encoding="utf-8")
    if options.check:
        for study in STUDIES:
            check(study, content)
        return
    known = STUDIES[options.study]
    chosen = options.variants.split(",") if options.variants else list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"--variants holds {unknown[0]!r}; known are {', '.join(known)}.")
    folder = "evidence" if options.study == "frskd" else f"evidence-{options.study}"
    sources = options.out or [Path("runs", folder)]
    if not (options.only_report or sources[0].is_file()):
        for seed in range(options.seeds):
            for name in chosen:
                if read(folder_of(sources[0], name, seed)) is None:
                    print(f"{name}, seed {seed}", flush=True)
                    train(sources[0], name, known[name], seed, extra)
    documents: dict[Path, Document] = {}
    for source in sources:
        document = load(options.study, source)
        documents[kept(document) if source.is_dir() else source] = document
        plot(document)
    before, _, after = split(options.study, content)
    DOCUMENT.write_text(f"{before}{block(documents)}\n{after}", encoding="utf-8")
    print(block(documents))


if __name__ == "__main__":
    main()
