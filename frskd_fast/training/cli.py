"""`frskd-fast`: fit, validate, test, predict, export, panels and recipes."""

from __future__ import annotations

import collections
import inspect
import itertools
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import recipe_files
from .class_paths import PARTS
from .errors import Refusal
from .recipe_files import RecipeError

if TYPE_CHECKING:
    from .command_line import CommandLine

STAGES = ("fit", "validate", "test", "predict")
USAGE = """\
usage: frskd-fast COMMAND [options]

  fit --config RECIPE       train; a run that was interrupted goes on where its last checkpoint is, and one that a recipe
                            needs (a teacher) comes first unless it is there; with --no-prerequisites it is only named
  validate --config RECIPE  accuracy of the run's student on the validation images
  test --config RECIPE      the same on the test images
  predict --config RECIPE   class of each test image, into predictions.csv, or masks, into predictions/
  predict --checkpoint FILE --images FOLDER --out FOLDER
                            masks of the images in a folder: PNGs of class indices, of the images' own sizes
  export --checkpoint FILE --out FILE
                            the student alone: .safetensors, .pt2 (torch.export) or .onnx, verified
  panels --run_dir FOLDER   draw the curves of a run again
  recipes [METHOD | RECIPE] count the recipes of the package, list those of a method, or print one with its base filled in

RECIPE is a name from `frskd-fast recipes` or a YAML file; without --config it is digits. Every setting can be overridden:

  frskd-fast fit --config cifar100_resnet18_frskd --data.root DATA --trainer.max_epochs 100 --task.beta 50
  frskd-fast fit --config digits --print_config      the settings, resolved
  frskd-fast fit --help                              all of them
"""
DEFAULT_RECIPE = "digits"
# What a class looks like on the command line.
CLASS = re.compile(r"(?!null$)[A-Za-z_][\w.]*")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, of the words after `frskd-fast` (None: those of the process); returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    command, rest = words[0], words[1:]
    try:
        if command == "recipes":
            try:
                status = _recipes(rest)
                sys.stdout.flush()
            except BrokenPipeError:
                # The reader has left, as `head` does; what it did not read goes nowhere.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            return status
        if command == "export":
            from . import export

            return export.main(rest)
        if command == "panels":
            return _panels(rest)
        if command == "predict" and any(word.partition("=")[0] == "--images" for word in rest):
            from . import predict_folder

            return predict_folder.main(rest)
        if command in STAGES:
            run(command, rest)
            return 0
    except (Refusal, RecipeError) as error:
        print(f"frskd-fast {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"frskd-fast {command}: stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"frskd-fast: {command!r} is no command.\n\n{USAGE}", end="", file=sys.stderr)
    return 2


def _recipes(words: Sequence[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print("usage: frskd-fast recipes [METHOD | RECIPE]")
        return 0
    methods: dict[str, list[str]] = {}
    for name, method in recipe_files.recipe_names().items():
        methods.setdefault(method, []).append(name)
    if not words:
        for method, names in methods.items():
            counts = collections.Counter(name.partition("_")[0] for name in names)
            parts = ", ".join(f"{data} ({count})" for data, count in counts.items())
            print(f"{method.ljust(max(map(len, methods)))}  {len(names):3}  {parts}")
        print("\nfrskd-fast recipes METHOD lists those of one method, frskd-fast recipes RECIPE prints one.")
    elif words[0] in methods:
        names = methods[words[0]]
        for name in names:
            print(f"{name.ljust(max(map(len, names)))}  {recipe_files.summary(name)}")
    else:
        yaml = recipe_files.yaml_module()
        print(yaml.safe_dump(recipe_files.recipe(words[0]), sort_keys=False), end="")
    return 0


def _panels(words: Sequence[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="frskd-fast panels", description="Draw the curves of a run again.")
    parser.add_argument("--run_dir", required=True, help="the run's folder")
    folder = parser.parse_args(words).run_dir
    from . import panels

    if panels.pyplot() is None:
        raise Refusal("matplotlib cannot be imported; pip install 'frskd_fast[plot]'.")
    path = panels.draw_curves(folder)
    if path is None:
        raise Refusal(f"{folder} holds no epochs.csv with an epoch in it; give the folder of a run.")
    print(f"Panel: {path}")
    return 0


def expanded(words: Sequence[str]) -> tuple[list[str], str]:
    """The words with recipes (`--config NAME`, `-c NAME`) replaced by their settings, and the name for the run's folder.

    Without one the default recipe is put first. Where the words choose another class for a part of the training, the
    recipe's arguments of the old one are left out, as in recipes.

    Example:
        >>> words, name = expanded(["--config", "cifar100_resnet18_plain", "--optimizer.momentum", "0.8"])
        >>> name, words[0], words[2:]
        ('cifar100_resnet18_plain', '--config', ['--optimizer.momentum', '0.8'])
    """
    others: list[str] = []
    recipes: list[str] = []
    chosen: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        part = flag.removeprefix("--")
        if flag not in ("--config", "-c") and part not in PARTS:
            others.append(word)
            continue
        if not equals:
            value = next(rest, "")
        if part in PARTS:
            others += [flag, value]
            chosen[part] = value
        elif value:
            recipes.append(value)
        else:
            raise Refusal("--config needs the name of a recipe or a YAML file; `frskd-fast recipes` lists the names.")
    recipes = recipes or [DEFAULT_RECIPE]
    result: list[str] = []
    for settings in map(recipe_files.recipe, recipes):
        for part, path in chosen.items():
            before = (settings.get(part) or {}).get("class_path", "")
            if CLASS.fullmatch(path) and path not in (before, before.rpartition(".")[2]):
                settings[part] = {"class_path": path}
                if part == "task":
                    for needed in recipe_files.HANDED_TO_TASK:
                        settings.pop(needed, None)
        result += ["--config", json.dumps(settings)]
    return result + others, Path(recipes[0]).name.removesuffix(".yaml")


def run(stage: str, words: Sequence[str]) -> CommandLine:
    """Run "fit", "validate", "test" or "predict"; the words are what follows on the command line."""
    arguments, name = expanded(words)
    try:
        from .command_line import CommandLine
        from .data import DataFileError
        from .module import DistillationModule
        from .prerequisites import provide, split_off
    except ImportError as error:
        raise Refusal(f"{error.name} cannot be imported; pip install 'frskd_fast[train]'.") from error
    _quieten()
    _check_model_keys(arguments, inspect.signature(DistillationModule).parameters)
    arguments, needed, allowed = split_off(arguments, name)

    def before(command_line: CommandLine) -> None:
        if stage != "fit":
            provide(needed, None, f"frskd-fast {stage} trains nothing")
        elif command_line.only_tried:
            provide(needed, None, "A fast_dev_run does not train it")
        else:
            provide(needed, (lambda words: run("fit", words)) if allowed else None, "With --no-prerequisites")

    try:
        return CommandLine(name, [stage, *arguments], before)
    except DataFileError as error:
        raise Refusal(str(error)) from error


def _check_model_keys(words: Sequence[str], known: Container[str]) -> None:
    """Refuse settings of the model that it does not have, naming where those of earlier versions are now."""
    keys = [word.removeprefix("--model.").partition("=")[0] for word in words if word.startswith("--model.")]
    for word, following in itertools.pairwise(words):
        keys += (json.loads(following).get("model") or {}) if word == "--config" else []
    for key in keys:
        if key.partition(".")[0] not in known:
            raise Refusal(
                f"model.{key} is no setting of the model. The method is --task, and its arguments are --task.{key} and the "
                "like (in a YAML file task.class_path and task.init_args); learning rate, momentum and weight decay are "
                "--optimizer.lr, --optimizer.momentum and --optimizer.weight_decay, the schedule is --lr_scheduler. "
                f"`frskd-fast recipes {DEFAULT_RECIPE}` shows the form."
            )


def _quieten() -> None:
    """Leave out Lightning's hints about itself; its warnings stay, but for those that do not apply here."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's calls, not ours
    for message in (
        r".*isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning's own
        r".*Couldn't infer the batch indices.*",  # predictions come in the order of the data
        r".*recommended to use `self.log.*sync_dist=True.*",  # what is logged has been reduced
        # Of 1 x 1 kernels, whose two layouts are one and the same memory.
        r"Grad strides do not match bucket view strides[\s\S]*grad\.sizes\(\) = \[\d+, \d+, 1, 1\]",
        r".*does not have many workers.*",  # our readers say themselves where workers help
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*WeightAveraging callback with a model that overrides the configure_model.*",  # ours shards only where asked
        r".*module\(s\) in eval mode at the start of training.*",  # frozen networks
        r".*lr_scheduler\.step\(\)` before `optimizer\.step\(\)`.*",  # a resumed schedule
    ):
        warnings.filterwarnings("ignore", message=message)
