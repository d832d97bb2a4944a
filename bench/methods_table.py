"""The table of docs/methods/index.md: what each method needs, what a step costs, what was published and what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from bench.results import Document, Row
from bench.tables import MISSING, markdown_table, megabytes, ratio, significant
from scripts import evidence

SETTING = {"dtype": "fp32", "layout": "channels_last", "direction": "forward+backward"}
CACHED = "auto teacher cached"
# In the header of a recipe: accuracy with the method, where the figure is from, and without a teacher.
REACHED = re.compile(r"^# Should reach: (\d+\.\d+) % test accuracy \((.*?)\)(?:, from (\d+\.\d+) %)?", re.MULTILINE)


class Method(NamedTuple):
    """One row: the method's page, the suite and shape of its step, its variant in a study of the evidence, a recipe."""

    name: str
    page: str
    suite: str
    shape: str
    study: str
    variant: str
    recipe: str  # of a run whose accuracy the authors published, if they published any


METHODS = (
    Method("FRSKD", "frskd.md", "step", "", "frskd", "att", "cifar100_resnet18_frskd"),
    Method("HSAKD", "hsakd.md", "methods", "HSAKD step", "teachers", "hsakd", "cifar100_resnet32x4_resnet8x4_hsakd"),
    Method("SSKD", "sskd.md", "methods", "SSKD step", "teachers", "sskd", "cifar100_resnet32x4_resnet8x4_sskd"),
    Method("FFL", "ffl.md", "methods", "FFL step", "teachers", "ffl", "cifar100_resnet32_ffl"),
    Method(
        "CollaborativeTeaching",
        "collaborative.md",
        "methods",
        "CollaborativeTeaching step",
        "teachers",
        "collaborative",
        "cifar100_wrn_40_1_wrn_16_1_collaborative",
    ),
    Method("AdaIN-KD", "adain.md", "methods", "AdaIN step", "teachers", "adain", "cifar100_resnet32x4_resnet8x4_adain"),
)
TITLES = (
    "method",
    "trained before",
    "time of a step",
    "with kept outputs",
    "memory of a step",
    "published, CIFAR-100",
    "measured, digits",
)
LEGEND = """\
Trained before: the runs that the recipe for the digits needs. A step is forward, loss and backward; its time and its memory
(the highest allocation) stand beside those of the student alone on the same images, which HSAKD and SSKD see in four
rotations. Compare ratios, because the networks differ from row to row; [the benchmarks](../benchmarks.md) name them. With
kept outputs: the time where [a teacher's outputs are kept](../training.md#keep-a-teachers-outputs) and that was measured.
Published: top-1 accuracy in per cent of the student alone and with the method, for one recipe. Measured: percentage points
that the student gained over cross-entropy, mean over the seeds and 95 % interval, from [Evidence](../evidence.md)."""


def steps(method: Method, rows: Sequence[Row]) -> dict[str, Row]:
    """The rows of the method's step, by implementation."""
    wanted = {"suite": method.suite, **SETTING}
    found = {
        row["implementation"]: row
        for row in rows
        if row["shape"].startswith(method.shape) and all(row[key] == value for key, value in wanted.items())
    }
    for name in ("auto", "plain"):
        if name not in found:
            raise ValueError(
                f"no result file has a row of {name} for the step of {method.name} ({', '.join(wanted.values())}); name one "
                "that has, as bench/run.py --save writes it."
            )
    return found


def trained_before(recipe: str) -> str:
    """The runs that a recipe needs, the nearest first."""
    from frskd_fast.training.recipe_files import NEEDED
    from frskd_fast.training.recipe_files import recipe as settings_of

    names: list[str] = []
    while recipe:
        settings = settings_of(recipe)
        recipe = next((settings[name] for name in NEEDED if settings.get(name)), "")
        names += [f"`{recipe}`"] if recipe else []
    return ", from ".join(names) or "nothing"


def published(recipe: str) -> str:
    """The accuracies in a recipe's line "Should reach"; that of the student alone may be in the recipe it builds on."""
    from frskd_fast.training.recipe_files import recipe_text

    text, _ = recipe_text(recipe)
    reached = REACHED.search(text)
    if reached is None:
        return "no figure found"
    accuracy, source, alone = reached.groups()
    if alone is None:
        base = re.search(r"^base: (\w+)$", text, re.MULTILINE)
        plain = REACHED.search(recipe_text(base[1])[0]) if base else None
        alone = plain[1] if plain else MISSING
    return f"{alone} → {accuracy}, `{recipe}` ({source})"


def measured(method: Method, studies: Sequence[Document]) -> str:
    """The gain over cross-entropy on the digits."""
    for study in studies:
        if study["study"] == method.study and method.variant in study["runs"]:
            ours, baseline = (evidence.by_seed(study, name) for name in (method.variant, evidence.BASELINE))
            return evidence.interval(
                [ours[seed].accuracy - baseline[seed].accuracy for seed in sorted({*ours} & {*baseline})]
            )
    return "not measured"


def line(method: Method, rows: Sequence[Row], studies: Sequence[Document]) -> list[str]:
    """The cells of one method."""
    found = steps(method, rows)
    ours, plain = found["auto"], found["plain"]
    cached = found.get(CACHED)
    return [
        f"[{method.name}]({method.page})",
        trained_before(evidence.STUDIES[method.study][method.variant].recipe),
        f"{significant(ours['ms'])} ms, {ratio(ours['of_plain'])}",
        ratio(cached["of_plain"]) if cached else MISSING,
        f"{megabytes(ours['extra_bytes'])} MB, {ratio(ours['extra_bytes'] / plain['extra_bytes'])}",
        published(method.recipe),
        measured(method, studies),
    ]


def table(benchmarks: Sequence[Document], studies: Sequence[Document]) -> list[str]:
    """The table, what its columns mean, and where its times were measured."""
    rows = [row for document in benchmarks for row in document["rows"]]
    cells = [line(method, rows, studies) for method in METHODS]
    machines = [
        f"Times and memory: {document['environment']['device_name']}, {document['environment']['threads']} threads, "
        f"{SETTING['dtype']}, {SETTING['layout']}, commit {document['environment']['commit'][:12]}, {document['date']}."
        for document in benchmarks
    ]
    return [*markdown_table(TITLES, cells, numbers_from=len(TITLES)), "", LEGEND, "", *machines]
