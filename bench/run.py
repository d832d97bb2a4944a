"""Measure frskd_fast next to eager PyTorch and torch.compile: `python bench/run.py [suite ...]`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Last, so that an installed frskd_fast with its compiled libraries comes before the checkout.
    sys.path.append(str(ROOT))

from bench import machine, results  # noqa: E402
from bench.cases import SUITES, cases_of, in_order  # noqa: E402
from bench.names import DEFAULT_IMPLEMENTATIONS, DEVICES, FLOAT_BYTES, FORCED, IMPLEMENTATIONS, LAYOUTS, OURS, is_ours  # noqa: E402

CHOICES = {"device": DEVICES, "dtype": tuple(FLOAT_BYTES), "layout": LAYOUTS, "impl": IMPLEMENTATIONS}


def several(option: str) -> Any:
    """An argument type: names separated by commas, each one of CHOICES[option]."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        for name in names:
            if name not in CHOICES[option]:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(CHOICES[option])}")
        if not names:
            raise argparse.ArgumentTypeError(f"give at least one of {', '.join(CHOICES[option])}")
        return names

    return parse


def positive(kind: type) -> Any:
    """An argument type: a number of `kind` greater than 0."""

    def parse(text: str) -> Any:
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
        return number

    parse.__name__ = kind.__name__
    return parse


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = ", ".join(SUITES)
    result = argparse.ArgumentParser(
        prog="bench/run.py",
        description="Time distillation losses, the self-teacher and whole training steps: eager PyTorch (the "
        "original's operations), torch.compile of the same function, and the implementations of frskd_fast. A result "
        "that is wrong gets no time.",
    )
    result.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"which suites to run, of: {known} (default: all but data, trainer)"
    )
    result.add_argument("--suite", nargs="+", default=[], metavar="NAME", help="the same as an option")
    result.add_argument("--quick", action="store_true", help="float32, NCHW, small cases only: a few minutes")
    result.add_argument(
        "--full",
        action="store_true",
        help="also what takes long on a CPU: float16 of every suite, bfloat16 networks, each node in each dtype, and a "
        "compiled training step in every setting",
    )
    result.add_argument("--device", choices=CHOICES["device"], help="default: cuda where torch sees a GPU, else cpu")
    result.add_argument(
        "--dtype", type=several("dtype"), help="comma-separated: fp32,bf16,fp16 (default: all; on a CPU no fp16)"
    )
    result.add_argument("--layout", type=several("layout"), help="comma-separated: nchw,channels_last (default: both)")
    result.add_argument(
        "--batch",
        type=positive(int),
        help="batch size N of every case (default: 128; logits: by shape; fusion, self_teacher, step: 32)",
    )
    result.add_argument(
        "--input",
        choices=("features", "random"),
        default="features",
        help="features: of an untrained cifarresnet18 with BiFPNc on scikit-learn's digits; random: no network",
    )
    result.add_argument(
        "--impl",
        type=several("impl"),
        help=f"comma-separated, of: {', '.join(CHOICES['impl'])} (default: eager, compile, auto and those of the device; with "
        "--base: auto and those of the device)",
    )
    result.add_argument(
        "--base",
        metavar="COMMIT",
        help="build that commit beside this one and time both in turns, without baselines; 1 where this one is slower",
    )
    result.add_argument(
        "--check-auto", action="store_true", help="1 if auto is more than 5 %% slower than eager in a row"
    )
    result.add_argument("--json", type=Path, metavar="PATH", help="write the results to PATH")
    result.add_argument("--save", action="store_true", help="write them to bench/results/<date>-<device>.json")
    result.add_argument(
        "--plot",
        type=Path,
        metavar="PATH.png",
        help="write a bar plot; beside it, where the suite step runs, PATH-step.png: where a step's time goes (needs "
        "matplotlib)",
    )
    result.add_argument("--threads", type=positive(int), help="CPU threads (default: what torch takes)")
    result.add_argument(
        "--repeats", type=positive(int), help="runs of each implementation (default: by --target-seconds)"
    )
    result.add_argument(
        "--target-seconds", type=positive(float), help="timing per case, 3 to 200 runs (default: 1, with --quick 0.5)"
    )
    result.add_argument(
        "--cold-allocator", action="store_true", help="leave malloc as it is: every large result costs page faults"
    )
    result.add_argument(
        "--keep-compile-cache",
        action="store_true",
        help="let torch.compile use its cache on disk (default: a fresh one, so that compile seconds mean the same)",
    )
    return result


def slug(text: str) -> str:
    """Letters and digits of a device's name, for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def default_dtypes(arguments: argparse.Namespace, device: str) -> tuple[str, ...]:
    """All; float32 alone for a quick run, no float16 on a CPU, which is slow at it, except in a full run."""
    if arguments.quick:
        return ("fp32",)
    return CHOICES["dtype"] if arguments.full or device == "cuda" else ("fp32", "bf16")


def selection_of(arguments: argparse.Namespace, device: str) -> Any:
    """What the command line leaves of every suite."""
    from bench.case import Selection

    return Selection(
        device=device,
        dtypes=arguments.dtype or default_dtypes(arguments, device),
        layouts=arguments.layout or (("nchw",) if arguments.quick else LAYOUTS),
        batch=arguments.batch,
        input_kind=arguments.input,
        quick=arguments.quick,
        full=arguments.full,
        named=bool(arguments.suites or arguments.suite),
        dtypes_named=arguments.dtype is not None,
    )


def start_of_document(suites: list[str], device: str, host_allocator: dict[str, Any]) -> results.Document:
    """What every result file begins with."""
    return {
        "schema": results.SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "suites": suites,
        "command": ["bench/run.py", *sys.argv[1:]],
        "environment": machine.environment(device, ROOT),
        "allocator": host_allocator,
    }


def measure(
    arguments: argparse.Namespace, suites: list[str], device: str, host_allocator: dict[str, Any]
) -> results.Document:
    """Run the suites and return the document that --json writes."""
    from bench import inputs, tables, timing
    from bench.case import Case
    from bench.measure import Settings, run_case

    begin = time.perf_counter()
    selection = selection_of(arguments, device)
    settings = Settings(
        device=device,
        implementations=arguments.impl or DEFAULT_IMPLEMENTATIONS[device],
        target_seconds=arguments.target_seconds or (0.5 if arguments.quick else 1.0),
        repeats=arguments.repeats,
        host_time_of_compile=not arguments.quick,
        parts=arguments.plot is not None,
    )
    cases = [case for suite in suites for case in cases_of(suite, selection)]
    document = start_of_document(suites, device, host_allocator)
    print("\n".join(tables.header(document)))
    if any("features" in name for case in cases if isinstance(case, Case) for name in case.tiny()):
        print("Preparing the features ...", flush=True)
        document["inputs"] = inputs.distillation_inputs(2, selection.input_kind).source
        print(f"Inputs: {document['inputs']}.")
    print(f"{len(cases)} cases, each with {', '.join(settings.implementations)}:", flush=True)

    clock = timing.Clock(device)
    copy = timing.CopyMeter(device, clock)
    rows: list[results.Row] = []
    others: list[float | None] = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name} ... ", end="", flush=True)
        case_begin = time.perf_counter()
        others.append(machine.busy_cores())
        case_rows = run_case(case, settings, clock, copy)
        rows += [dataclasses.asdict(row) for row in case_rows]
        print(f"{', '.join(map(tables.brief, case_rows))}  ({time.perf_counter() - case_begin:.0f} s)", flush=True)
    document["copy_gigabytes_per_second"] = statistics.median(copy.samples) if copy.samples else None
    known = [busy for busy in others if busy is not None]
    document["others_busy_cores"] = statistics.median(known) if known else None
    document["seconds"] = time.perf_counter() - begin
    # A round trip, so that what is printed now and what is read from the file later cannot differ.
    document["rows"] = json.loads(json.dumps(results.jsonable(rows)))
    return document


def compare(
    arguments: argparse.Namespace, suites: list[str], device: str, host_allocator: dict[str, Any]
) -> results.Document:
    """Measure this commit beside --base and return the document that --json writes."""
    from bench import commits, compare

    base = commits.resolve(arguments.base)
    found = importlib.util.find_spec("frskd_fast")
    assert found is not None and found.origin is not None
    this = Path(found.origin).resolve().parents[1]
    print(f"Building commit {base[:12]} beside this one, unless that was done before ...", flush=True)
    libraries = {"base": commits.built(base, commits.kernels_of(this)), "this": this}
    document = start_of_document(suites, device, host_allocator) | {"schema": results.COMPARISON, "base": base}
    rows = compare.compare(
        libraries,
        selection_of(arguments, device),
        suites,
        [name for name in arguments.impl or ("auto", *FORCED[device]) if is_ours(name)],
        warm=bool(host_allocator["settings"]),
        threads=arguments.threads or 0,
        target_seconds=arguments.target_seconds or (0.5 if arguments.quick else 1.0),
        repeats=arguments.repeats,
    )
    return document | {"rows": json.loads(json.dumps(results.jsonable(rows)))}


def main(argv: list[str] | None = None) -> int:
    """Run the suites asked for; 1 if an implementation of ours is wrong or fails, or is slower than --base."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    suites = list(dict.fromkeys([*arguments.suites, *arguments.suite]))
    for suite in suites:
        if suite not in SUITES:
            command_line.error(f"suite {suite!r} is not one of {', '.join(SUITES)}")
    if arguments.quick and arguments.full:
        command_line.error("--quick and --full exclude each other")
    if arguments.base and (arguments.plot or arguments.check_auto):
        command_line.error("--base compares two commits; --plot and --check-auto look at one")
    if arguments.base and not any(map(is_ours, arguments.impl or ("auto",))):
        named = ",".join(arguments.impl)
        command_line.error(f"--base times frskd_fast alone, but --impl is {named}; add one of {', '.join(OURS)}")
    for path in (arguments.json, arguments.plot):
        if path is not None and not path.absolute().parent.is_dir():
            command_line.error(f"the folder of {path} does not exist; create it or name another path")

    host_allocator = machine.allocator(arguments.cold_allocator)
    with contextlib.ExitStack() as stack:
        if not arguments.keep_compile_cache and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_", ignore_cleanup_errors=True))
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        # The profiler, which counts allocations, reports each start and stop otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        import torch

        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            command_line.error("--device cuda was asked for, but torch sees no GPU; use --device cpu")
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        try:
            document = (compare if arguments.base else measure)(arguments, suites or in_order(), device, host_allocator)
        except ValueError as problem:
            if not arguments.base:
                raise
            print(f"bench/run.py: {problem}", file=sys.stderr)
            return 2

    return finish(arguments, document)


def finish(arguments: argparse.Namespace, document: results.Document) -> int:
    """Print, write and plot what was measured; the exit code."""
    from bench import compare, plots, tables

    show = compare if arguments.base else tables
    print(f"\n{show.text(document)}")
    path = arguments.json
    if path is None and arguments.save:
        against = f"-against-{document['base'][:7]}" if arguments.base else ""
        device_name = slug(document["environment"]["device_name"])
        name = f"{document['date']}-{document['environment']['device']}-{device_name}{against}.json"
        path = ROOT / "bench" / "results" / name
    if path is not None:
        results.save(document, path)
        tell = "" if arguments.base else f"; `python bench/report.py {path} --markdown` makes tables of it"
        print(f"Wrote {path}{tell}.")
    if arguments.plot is not None:
        for written in plots.plots(document, arguments.plot):
            print(f"Wrote {written}.")
    losses = results.auto_losses(document) if arguments.check_auto else []
    return 1 if results.failures(document) or losses else 0


if __name__ == "__main__":
    sys.exit(main())
