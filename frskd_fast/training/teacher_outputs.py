"""The file in which a frozen teacher's outputs are kept: made whole or not at all, mapped, checked record by record."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing
import torch
from torch import Tensor

import frskd_fast
from frskd_fast.ops._checks import check_positive_integer
from frskd_fast.tasks import FrozenTeacher, Task
from frskd_fast.tasks.base import checksum

from .checkpoints import flush_folder

MAGIC = b"frskd_fast teacher outputs"
VERSION = 1
PAGE = 4096  # the records begin at a multiple of it
LARGEST_HEADER = 1 << 20


class Field(NamedTuple):
    """One named output in a record.

    Attributes:
        name: as `Task.teacher_outputs` calls it.
        shape: of the rows of one image, (rows, ...).
        dtype: as the teacher computes it, and as it is given back.
        stored: as it is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype

    @property
    def elements(self) -> int:
        """Of one image."""
        return math.prod(self.shape)

    @property
    def words(self) -> int:
        """64-bit words of one image."""
        return -(-self.elements * self.stored.itemsize // 8)


class TeacherOutputs:
    """outputs(images, keys) = task.teacher_outputs(images), computed once for each key and read from a file after that.

    The file is mapped into memory: to read a batch is one gather of its records, and the teacher does not run. A record
    begins with a checksum of its key and its content, which is compared when a process first reads it. So a record that was
    cut off when a process or the machine ended counts as missing and is computed again; processes may share a file.
    Records are written rounded, and what is given back on the way is rounded alike, so all epochs see the same numbers.

    What decides the content is the weights and layers of the teacher, as they are now, the images and this library's version.
    Where the code of a teacher's class changes and none of these does, remove the file.

    Args:
        folder: where the file lies, under a name that follows from everything that decides its content.
        task: its `teacher_outputs` computes what is missing, and its `FrozenTeacher`s give the checksum.
        images: a batch as the task takes it in training; only shape, dtype and device matter.
        samples: how many images those are: `images` may hold several views of each; None: one each.
        keys: number of keys; a key is an image under one augmentation, such as flipped or not.
        settings: what decides the pixels that a key stands for, as values of JSON.
        features: keep feature maps, too, which are large.
        half: store float32 and float64 as float16.
        create: make the file where it is missing; False expects it there.

    Attributes:
        path: of the file.
        fields: what a record holds.
        is_new: whether the file was not there.
        computed: number of images over which this object has run the teacher.
        damaged: number of records that it found cut off or altered, and computed again.

    Raises:
        ValueError: a sentence: no frozen teacher, feature maps without `features`, another program's file, a full disk,
            `samples` that do not divide the rows of `images`.

    Example:
        >>> import tempfile
        >>> from frskd_fast.models import wrn16x2
        >>> class Distilled(Task):
        ...     def __init__(self, teacher):
        ...         super().__init__()
        ...         self.teacher = FrozenTeacher(teacher)
        ...     def teacher_outputs(self, images):
        ...         return {"logits": self.teacher(images)[1]}
        >>> task, images = Distilled(wrn16x2(num_classes=10)), torch.randn(2, 3, 8, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     outputs = TeacherOutputs(folder, task, images, keys=50)
        ...     first, second = (outputs(images, torch.tensor([7, 3]))["logits"] for _ in range(2))
        >>> torch.equal(first, second), outputs.computed
        (True, 2)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        task: Task,
        images: Tensor,
        *,
        samples: int | None = None,
        keys: int,
        settings: Mapping[str, Any] | None = None,
        features: bool = False,
        half: bool = False,
        create: bool = True,
    ) -> None:
        self.task = task
        samples = images.shape[0] if samples is None else samples
        check_positive_integer("samples", samples)
        check_positive_integer("keys", keys)
        if images.shape[0] % samples:
            raise ValueError(
                f"samples is {samples}, but images has {images.shape[0]} rows and a whole number of them for each was wanted."
            )
        self.views = images.shape[0] // samples
        self.fields = fields_of(task, images, samples, features, half)
        self.keys = keys
        self.computed = self.damaged = 0
        teachers = {
            # Of what will run: weights may have been loaded since the teacher was frozen. The layers, too, without addresses
            # in memory: a stride or a slope is in no state.
            name: [checksum(module.network), _digest(re.sub("0x[0-9a-f]+", "", str(module.network)))]
            for name, module in task.named_modules()
            if isinstance(module, FrozenTeacher)
        }
        # Through JSON, as the header's come back.
        header = json.loads(
            json.dumps(
                {
                    "library": frskd_fast.__version__,
                    "teachers": teachers,
                    "views": task.views,
                    "images": [self.views, *images.shape[1:], str(images.dtype)],
                    "keys": keys,
                    "settings": dict(settings or {}),
                    "fields": [(name, shape, str(dtype), str(stored)) for name, shape, dtype, stored in self.fields],
                },
                sort_keys=True,
            )
        )
        first = next(iter(teachers.values()))[0]
        name = f"teacher-{first[:12]}-{_digest(json.dumps(header, sort_keys=True))[:16]}.outputs"
        self.path = Path(folder) / name
        self.words = 1 + sum(field.words for field in self.fields)
        self.is_new = not self.path.exists()
        self._records = _mapped(self.path, header, keys, self.words, create)
        self._trusted = torch.zeros(keys, dtype=torch.bool)
        # Odd factors: an altered word alters the sum.
        self._factors = torch.randint(-(2**62), 2**62, (self.words - 1,), generator=_generator()) * 2 + 1

    @torch.no_grad()
    def __call__(self, images: Tensor, keys: Tensor | numpy.typing.NDArray[Any]) -> dict[str, Tensor]:
        """The teacher's outputs for a batch, on the device of the images.

        Args:
            images: as `Task.forward` takes them: as many rows for each key as at first, those of one key beside each other.
            keys: int64 (N,) on the host, in 0 .. number of keys - 1; that they belong to these images is not checked.
        """
        keys = torch.as_tensor(keys)
        if images.shape[0] != self.views * len(keys):
            raise ValueError(
                f"images has {images.shape[0]} rows for {len(keys)} keys, but {self.views} for each key were wanted."
            )
        on_gpu = images.device.type == "cuda"
        records = torch.empty(len(keys), self.words, dtype=torch.int64, pin_memory=on_gpu)
        torch.index_select(self._records, 0, keys, out=records)
        trusted = self._trusted[keys]
        if not trusted.all():
            self._complete(records, trusted, images, keys)
        records = records.to(images.device, non_blocking=True)
        outputs, start = {}, 1
        for field in self.fields:
            name, shape, dtype, stored = field
            values = records[:, start : start + field.words].view(stored)[:, : field.elements]
            outputs[name] = values.reshape(-1, *shape[1:]).to(dtype).contiguous()
            start += field.words
        return outputs

    def _complete(self, records: Tensor, trusted: Tensor, images: Tensor, keys: Tensor) -> None:
        """Check the records that were not read before; compute and write those that are missing."""
        rows = (~trusted).nonzero().flatten()
        found, checks = records[rows, 0], self._checks(records[rows], keys[rows])
        good = found == checks
        self._trusted[keys[rows[good]]] = True
        self.damaged += int(((found != 0) & ~good).sum())
        rows = rows[~good]
        if not len(rows):
            return
        if len(rows) < len(keys):
            views = images.unflatten(0, (len(keys), self.views))
            images = views[rows.to(images.device)].flatten(0, 1)
        computed = self._packed(_outputs(self.task, images), len(rows))
        computed[:, 0] = self._checks(computed, keys[rows])
        records[rows] = computed
        self._records[keys[rows]] = computed
        self._trusted[keys[rows]] = True
        self.computed += len(rows)

    def _checks(self, records: Tensor, keys: Tensor) -> Tensor:
        """A number for each record that is not zero, as a record is that was never written."""
        return ((records[:, 1:] * self._factors).sum(1) + (keys + 1) * 0x9E3779B97F4A7C1) | 1

    def _packed(self, outputs: dict[str, Tensor], count: int) -> Tensor:
        """Records of the teacher's outputs for `count` keys, without their checksums."""
        records = torch.zeros(count, self.words, dtype=torch.int64)
        start = 1
        for field in self.fields:
            values = outputs[field.name].detach()
            stored = values.to(field.stored)
            if field.stored != values.dtype and not bool((stored.isfinite() | ~values.isfinite()).all()):
                raise ValueError(
                    f"The teacher's {field.name} has numbers beyond 65504, the largest of float16; keep its outputs in full "
                    "(half=False)."
                )
            place = records[:, start : start + field.words].view(field.stored)
            place[:, : field.elements] = stored.reshape(count, -1).cpu()
            start += field.words
        return records


def fields_of(task: Task, images: Tensor, samples: int, features: bool, half: bool) -> tuple[Field, ...]:
    """What a record of `task.teacher_outputs(images)` holds, where the images show `samples` ones."""
    name = type(task).__name__
    teachers = [module for module in task.modules() if isinstance(module, FrozenTeacher)]
    outputs = _outputs(task, images) if teachers else None
    if not outputs:
        raise ValueError(
            f"The task {name} has no frozen teacher whose outputs could be kept (FrozenTeacher and teacher_outputs); leave "
            "the teacher cache out."
        )
    fields = []
    for key, value in outputs.items():
        if value.shape[0] % samples:
            raise ValueError(
                f"{name}.teacher_outputs returned {key!r} with {value.shape[0]} rows for {samples} images, but a whole "
                "number for each image was wanted."
            )
        shape = (value.shape[0] // samples, *value.shape[1:])
        stored = torch.float16 if half and value.dtype in (torch.float32, torch.float64) else value.dtype
        fields.append(Field(key, shape, value.dtype, stored))
    maps = [field for field in fields if "features" in field.name]
    if maps and not features:
        size = sum(8 * field.words for field in maps)
        raise ValueError(
            f"The task {name} reads the teacher's feature maps, {size / 1e3:.3g} kB of each image; they are kept on request "
            "(teacher_cache_features in the settings, features=True in a program), or leave the teacher cache out."
        )
    return tuple(fields)


@torch.no_grad()
def _outputs(task: Task, images: Tensor) -> dict[str, Tensor]:
    return task.teacher_outputs(images) or {}


def _mapped(path: Path, header: dict[str, Any], keys: int, words: int, create: bool) -> Tensor:
    """The records int64 (keys, words) of the file, which is made where it is missing or torn."""
    content = json.dumps(header, sort_keys=True).encode()
    first_line = b"%s %d %s %d\n" % (MAGIC, VERSION, hashlib.sha256(content).hexdigest().encode(), len(content))
    start = -(-(len(first_line) + len(content)) // PAGE) * PAGE
    size = start + 8 * keys * words
    try:
        problem = _problem_with(path, first_line + content, size)
        if problem is not None:
            if not create:
                raise ValueError(f"{path}, in which the teacher's outputs are kept, {problem}; start again.")
            if path.exists():
                warnings.warn(f"{path} {problem}; the teacher's outputs are computed again.", stacklevel=4)
            _create(path, first_line + content, size)
        # Without the right to write, what is computed stays in memory.
        shared = os.access(path, os.W_OK)
        flat = torch.from_file(str(path), shared=shared, size=size // 8, dtype=torch.int64)
    except OSError as error:
        raise ValueError(
            f"The teacher's outputs take {size / 1e9:.3g} GB, which could not be made room for in {path.parent} ({error}); "
            "free the disk, or give another folder, or keep them in half precision."
        ) from error
    return flat[start // 8 :].view(keys, words)


def _problem_with(path: Path, beginning: bytes, size: int) -> str | None:
    """Why the file cannot be used and may be replaced, as half a sentence; None for a good one.

    Raises:
        ValueError: when it is another program's, or another cache's.
    """
    if not path.exists():
        return "is not there"
    with open(path, "rb") as file:
        found = file.read(LARGEST_HEADER)
    if found.startswith(beginning):
        there = path.stat().st_size
        return None if there == size else f"has {there} bytes, where {size} were written"
    if not found or (MAGIC.startswith(found[: len(MAGIC)]) and len(found) < len(beginning)):
        return "was cut off in its header"
    if not found.startswith(MAGIC + b" "):
        raise ValueError(
            f"{path} was not written by this library; move it away, or give the teacher cache another folder."
        )
    line, _, content = found.partition(b"\n")
    words = line[len(MAGIC) + 1 :].split(b" ")
    if words[0].isdigit() and int(words[0]) != VERSION:
        raise ValueError(
            f"{path} has version {int(words[0])} of its form, but {VERSION} was wanted; move it away, or give the teacher "
            "cache another folder."
        )
    content = content[: int(words[2])] if len(words) == 3 and words[2].isdigit() else b""
    theirs = _header(content) if hashlib.sha256(content).hexdigest().encode() in words else None
    if theirs is None:
        return "is damaged in its header"
    ours = json.loads(beginning.partition(b"\n")[2])
    others = ", ".join(name for name in ours if ours[name] != theirs.get(name))
    raise ValueError(
        f"{path} holds outputs of another teacher or other images ({others} differ); it was renamed. Move it away, or give "
        "the teacher cache another folder."
    )


def _header(content: bytes) -> dict[str, Any] | None:
    """What stands in a header, where it is one."""
    try:
        header = json.loads(content)
    except ValueError:
        return None
    return header if isinstance(header, dict) else None


def _create(path: Path, beginning: bytes, size: int) -> None:
    """Write an empty file of its full size beside `path` and rename it; an OSError where there is no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            # A hole would be filled when a page goes to the disk, where a full one ends the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                for _ in range(0, size, PAGE):
                    file.write(bytes(PAGE))
                file.truncate(size)
                file.seek(0)
            file.write(beginning)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(VERSION)
