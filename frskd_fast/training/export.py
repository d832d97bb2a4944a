"""The student alone, taken out of a checkpoint: as safetensors, by torch.export or as ONNX, and verified."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frskd_fast.models import create_model
from frskd_fast.models.checkpoints import (
    STATE,
    CheckpointError,
    brief,
    checksum_of_export,
    damage_in_archive,
    load_file,
    load_weights,
)
from frskd_fast.models.registry import imported
from frskd_fast.models.teachers import described
from frskd_fast.tasks import Student

from .class_paths import build, class_path

FORMATS = (".safetensors", ".pt2", ".onnx")


class ExportError(Exception):
    """What kept the student from being exported, as a sentence."""


@dataclass(frozen=True)
class Export:
    """The student with what is known about its input; `predicts` as in `Task`."""

    student: Student
    backbone: str
    backbone_args: Mapping[str, Any]
    num_classes: int
    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    predicts: str = "classes"


def load_student(
    path: str | os.PathLike[str],
    *,
    backbone: str | None = None,
    num_classes: int | None = None,
    size: int | Sequence[int] | None = None,
    channels: int | None = None,
    trust: bool = False,
) -> Export:
    """student(images) = logits (N, K), or maps of them (N, K, H, W), in evaluation mode, out of a checkpoint of this library or
    of another program.

    Args:
        path: the checkpoint. Those of `frskd-fast fit` say themselves what network they hold; for others give
        backbone: its name, see `frskd_fast.models.create_model`.
        num_classes: number of logits; None reads it from the last linear layer of a foreign checkpoint.
        size: side, or height and width, of the images to export for; None takes the training's, else 32 (224 for the
            networks with an ImageNet stem).
        channels: of the images; None takes the training's, else 3.
        trust: call what the checkpoint names by import path: its network, and the task where that makes the student.

    Returns:
        The student and what is known about its images.

    Raises:
        ExportError: as a sentence.
    """
    try:
        content = load_file(path)
        found = described(content, path, backbone, num_classes, None, ("--backbone", "--num_classes"), trust)
        network = create_model(found.name, found.num_classes, **found.arguments)
        settings = content.get("hyper_parameters", {})
        state = content[STATE] if isinstance(content.get(STATE), Mapping) else {}
        about = state.get("images", {})
        name = found.name
        if state.get("own_student") and backbone is None:
            student = _own_student(content, network, trust)
            name = name if student.backbone is network else type(student.backbone).__name__
        else:
            load_weights(network, content, path)
            # Runs of earlier versions have it among their settings.
            channels_last = bool(state.get("channels_last", settings.get("channels_last", False)))
            student = _kind_of_student(state)(network, channels_last)
    except (ValueError, TypeError, ImportError) as error:
        raise ExportError(str(error)) from error
    if size is None:
        size = about.get("size") or (224 if name in ("resnet18", "resnet34", "resnet50") else 32)
    sides = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return Export(
        student.eval(),
        name,
        found.arguments,
        found.num_classes,
        int(channels or about.get("channels") or 3),
        sides,
        tuple(about.get("mean", ())),
        tuple(about.get("std", ())),
        str(state.get("predicts", "classes")),
    )


def _kind_of_student(state: Mapping[str, Any]) -> type[Student]:
    """The class of the package that a checkpoint names; code from elsewhere is not called here."""
    path = state.get("student", "")
    if not isinstance(path, str):
        raise ValueError(
            f"The checkpoint names its kind of student by {path!r}, but the import path of a class was wanted; it was not "
            "written by frskd-fast fit, or has been changed since."
        )
    kind = imported(path) if is_of_the_package(path) else Student
    return kind if isinstance(kind, type) and issubclass(kind, Student) else Student


def is_of_the_package(path: str) -> bool:
    """Whether an import path leads into this package."""
    return path.startswith(f"{__name__.partition('.')[0]}.")


def _own_student(content: Mapping[str, Any], network: nn.Module, trust: bool) -> Student:
    """What the task in a checkpoint's settings, built anew with its weights, gives as its student."""
    settings = content["hyper_parameters"]["task"]
    advice = "give --backbone the name of a network whose weights are to be exported without the task."
    if not trust:
        raise ExportError(
            f"The checkpoint's student is made by its task, {class_path(settings)}, so code that the file names would run; "
            f"give --trust if you trust the file, or {advice}"
        )
    try:
        task = build(settings, network)
        state = content["state_dict"]
        task.load_state_dict({name.removeprefix("task."): state[name] for name in state if name.startswith("task.")})
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise ExportError(
            f"The checkpoint's task cannot be built, to ask it for its student ({error}); {advice}"
        ) from error
    student: Student = task.student()
    return student


def bound(student: nn.Module, logits: Tensor) -> float:
    """Largest difference of logits that rounding explains: 4 * layers * eps * max(1, largest |logit|).

    Each layer (with weights of two or more dimensions) rounds once relative to its output, a few times over where sums are
    taken in another order; 4 stands for these few times.
    """
    layers = sum(1 for parameter in student.parameters() if parameter.dim() >= 2)
    return 4 * max(layers, 1) * torch.finfo(logits.dtype).eps * max(1.0, float(logits.detach().abs().max()))


class Written(NamedTuple):
    """Largest difference of logits between the student and what was read back, the bound it was held against, whether the
    file takes images of other heights and widths than the training's, and if it was to take them and does not, why."""

    difference: float
    limit: float
    any_size: bool
    fixed_because: str = ""


@torch.no_grad()
def write_student(exported: Export, out: str | os.PathLike[str]) -> Written:
    """Write the student in the format that the file's name ends in, read it back and compare logits.

    Args:
        exported: what `load_student` gave.
        out: a name ending in .safetensors (weights under the backbone's own names, and how to use them as metadata),
            .pt2 (torch.export, any batch size) or .onnx (any batch size; needs the extra `onnx`). A student that predicts maps
            is written for any height and width, with the upsampling to it, where the network can be traced so.

    Returns:
        What the comparison gave.

    Raises:
        ExportError: on an unknown format, a missing package, or a difference above the bound; then no file is left.
    """
    path = Path(out)
    if path.suffix not in FORMATS:
        raise ExportError(f"--out is {path}, but a name ending in {', '.join(FORMATS)} was wanted.")
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reload, any_size, reason = {".safetensors": _safetensors, ".pt2": _pt2, ".onnx": _onnx}[path.suffix](
            exported, partial
        )
        # Two sizes of batch, so that a size built into the file would be noticed.
        batches = [_images(exported, 2), _images(exported, 3, _another(exported.size) if any_size else exported.size)]
        difference = limit = 0.0
        for images in batches:
            wanted = exported.student(images)
            difference = max(difference, float((wanted - reload(images)).abs().max()))
            limit = max(limit, bound(exported.student, wanted))
        if not difference <= limit:
            raise ExportError(
                f"The exported student differs from the checkpoint's by up to {difference:.3g} in its logits, which is more "
                f"than rounding explains ({limit:.3g}); {path} was not written."
            )
        check_export(partial)
        os.replace(partial, path)
    except OSError as error:
        raise ExportError(f"--out is {path}, which could not be written ({brief(error)}).") from error
    finally:
        if os.path.lexists(partial):
            partial.unlink()
    return Written(difference, limit, any_size, reason)


def _images(exported: Export, count: int, size: tuple[int, int] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, exported.channels, *(size or exported.size), generator=generator)


def _another(size: tuple[int, int]) -> tuple[int, int]:
    """Larger, and with another ratio of its sides."""
    return size[0] + 32, size[1] + 96


class _Program(NamedTuple):
    """The student as a graph for any batch size, whether also for any height and width, and why not if that was tried."""

    graph: torch.export.ExportedProgram
    any_size: bool
    reason: str = ""


def _program(exported: Export) -> _Program:
    """Maps alone may be of any height and width."""
    batch, reason = torch.export.Dim("batch", min=1), ""
    if exported.predicts == "maps":
        # Sides with nothing in common: what is equal in the example would be equal in the graph.
        images = _images(exported, 2, (exported.size[0], exported.size[1] + 64))
        sides = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
        try:
            graph = torch.export.export(
                exported.student, (images,), dynamic_shapes=({0: batch, **sides},), strict=False
            )
            for size in (exported.size, _another(exported.size)):
                graph.module()(_images(exported, 3, size))
            return _Program(graph, True)
        except MemoryError:
            raise
        except Exception as error:  # a size that a layer builds in, which tracing and guards report in many ways
            lines = str(error).strip().splitlines()
            reason = ": ".join([type(error).__name__, *lines[:1]])
    images = _images(exported, 2)
    return _Program(
        torch.export.export(exported.student, (images,), dynamic_shapes=({0: batch},), strict=False), False, reason
    )


def _safetensors(exported: Export, path: Path) -> tuple[Any, bool, str]:
    from safetensors.torch import load_file as load_safetensors
    from safetensors.torch import save

    # Contiguous and unshared, as the format asks.
    tensors = {
        name: value.detach().clone().contiguous() for name, value in exported.student.backbone.state_dict().items()
    }
    metadata = {
        "format": "pt",
        "backbone": exported.backbone,
        "backbone_args": json.dumps(dict(exported.backbone_args)),
        "num_classes": str(exported.num_classes),
        "predicts": exported.predicts,
        "input": json.dumps(
            {"channels": exported.channels, "size": exported.size, "mean": exported.mean, "std": exported.std}
        ),
    }
    metadata["sha256"] = checksum_of_export(tensors, metadata)
    path.write_bytes(save(tensors, metadata))
    again = copy.deepcopy(exported.student)
    again.backbone.load_state_dict(load_safetensors(path))
    return again, False, ""


def _pt2(exported: Export, path: Path) -> tuple[Any, bool, str]:
    program = _program(exported)
    with open(path, "wb") as file:  # a stream: the partial file's name does not end in .pt2
        torch.export.save(program.graph, file)
    with open(path, "rb") as file:
        return torch.export.load(file).module(), program.any_size, program.reason


def _onnx(exported: Export, path: Path) -> tuple[Any, bool, str]:
    try:
        import onnx
        import onnx.reference
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"{error.name} cannot be imported, but is needed to write {path.suffix}; pip install 'frskd_fast[onnx]'."
        ) from error
    traced = _program(exported)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            traced.graph, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
        )
        assert program is not None
        program.save(path)
    content = path.read_bytes()
    path.write_bytes(content + _onnx_checksum(content))
    model = onnx.load(path)
    onnx.checker.check_model(model)
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    except ImportError:
        session = onnx.reference.ReferenceEvaluator(model)
    return (
        lambda values: torch.from_numpy(session.run(None, {"images": values.numpy()})[0]),
        traced.any_size,
        traced.reason,
    )


def _onnx_checksum(content: bytes) -> bytes:
    """SHA-256 of a file in ONNX's format as an entry of its metadata_props, which may stand behind all else in the file."""
    entry = b"\x0a\x06sha256\x12\x40" + hashlib.sha256(content).hexdigest().encode()
    return b"\x72" + bytes([len(entry)]) + entry


def check_export(path: str | os.PathLike[str]) -> None:
    """Compare a file that `write_student` wrote with the checksum that it carries.

    A `.safetensors` file has a SHA-256 in its metadata, which loading it with this library compares, too; a `.pt2` file has
    the CRC-32 of each entry of a zip archive; an `.onnx` file has the SHA-256 of what stands before it as its last entry.
    PyTorch and ONNX Runtime do not compare them.

    Raises:
        ExportError: when the file has changed, or carries no checksum.
    """
    path = Path(path)
    without = f"{path} carries no checksum: another program wrote it, or an earlier version, or its end is missing."
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            load_file(path)
            with safe_open(path, "pt") as file:
                if "sha256" not in (file.metadata() or {}):
                    raise ExportError(without)
            return
        content = path.read_bytes()
        if path.suffix == ".pt2":
            # Where the end is missing, zipfile would take an archive within the file for the whole.
            whole = content.rfind(b"PK\x05\x06") == len(content) - 22
            damage = damage_in_archive(path) if whole else "its end is missing"
        elif path.suffix == ".onnx":
            length = len(_onnx_checksum(b""))
            if content[-length:][:12] != _onnx_checksum(b"")[:12]:
                raise ExportError(without)
            same = content[-length:] == _onnx_checksum(content[:-length])
            damage = None if same else "its weights or its graph have changed since"
        else:
            raise ExportError(f"{path} is no export; a name ending in {', '.join(FORMATS)} was wanted.")
    except (CheckpointError, OSError) as error:
        raise ExportError(f"{path} is not as it was written: {error}") from error
    if damage is not None:
        raise ExportError(f"{path} is not as it was written: {damage}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """`frskd-fast export`: see --help."""
    parser = argparse.ArgumentParser(
        prog="frskd-fast export",
        description="Write the student alone, read it back and compare its logits with the checkpoint's.",
    )
    parser.add_argument("--checkpoint", help="a run's last.ckpt, or a state dict of another program")
    parser.add_argument("--out", help="student.safetensors, student.pt2 or student.onnx")
    parser.add_argument("--check", metavar="FILE", help="compare an exported file with its checksum, and nothing else")
    parser.add_argument("--backbone", help="name of the network, where the checkpoint does not say")
    parser.add_argument("--num_classes", type=int, help="where the checkpoint does not say")
    parser.add_argument("--size", type=int, nargs="+", help="side, or height and width, of the images")
    parser.add_argument("--channels", type=int, help="channels of the images")
    parser.add_argument("--trust", action="store_true", help="call classes that the checkpoint names by import path")
    options = parser.parse_args(arguments)
    if options.size is not None and len(options.size) > 2:
        parser.error(f"--size has {len(options.size)} numbers, but a side, or height and width, were wanted.")
    if options.check is None and None in (options.checkpoint, options.out):
        parser.error("--checkpoint and --out are wanted, or --check alone.")
    size = None if options.size is None else (options.size[0], options.size[-1])
    try:
        if options.check is not None:
            check_export(options.check)
            print(f"{options.check} is as it was written.")
            return 0
        loaded = load_student(
            options.checkpoint,
            backbone=options.backbone,
            num_classes=options.num_classes,
            size=size,
            channels=options.channels,
            trust=options.trust,
        )
        written = write_student(loaded, options.out)
    except ExportError as error:
        print(f"frskd-fast export: {error}", file=sys.stderr)
        return 1
    count = sum(parameter.numel() for parameter in loaded.student.parameters())
    height, width = ("H", "W") if written.any_size else loaded.size
    print(
        f"{options.out}: {loaded.backbone}, {count:,} parameters, images (N, {loaded.channels}, {height}, {width}), "
        f"{loaded.num_classes} classes."
    )
    if written.fixed_because:
        print(f"Height and width are fixed, because the network could not be traced without ({written.fixed_because}).")
    print(f"Read back and compared: largest difference of logits {written.difference:.3g} (bound {written.limit:.3g}).")
    return 0
