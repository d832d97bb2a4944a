"""The teacher cache: it serves what the teacher says, and nothing else, whatever happens to its file."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from lightning.pytorch.plugins import Precision
from small_tasks import SMALL_TASKS
from toy_method import ToyNet
from training_utils import PLAIN, process, same_weights, small_run, steps, weights

from frskd_fast import functional
from frskd_fast.mixing import rotate4
from frskd_fast.tasks import ClassificationTask, FrozenTeacher, Task
from frskd_fast.training.cli import main
from frskd_fast.training.data import ArrayReader, CIFARData, DigitsData
from frskd_fast.training.data.errors import MissingDataError
from frskd_fast.training.data.folder import FileReader
from frskd_fast.training.data.loader import Request
from frskd_fast.training.module import DistillationModule
from frskd_fast.training.teacher_cache import TeacherCache
from frskd_fast.training.teacher_outputs import MAGIC, TeacherOutputs

assert ClassificationTask  # by the name of this module
FLIPPED = "test_teacher_cache.FlippedDigits"


class KeptTask(Task):
    """CE + KD from a frozen `ToyNet`, whose weights follow from `seed`.

    Attributes:
        seen: images over which any teacher of this class ran.
    """

    seen = 0

    def __init__(self, backbone: nn.Module, *, seed: int = 0, maps: bool = False, channels_last: bool = False) -> None:
        super().__init__()
        self.backbone, self.channels_last, self.maps_too = backbone, channels_last, maps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.teacher = FrozenTeacher(ToyNet())

    def teacher_outputs(self, images: Tensor) -> dict[str, Tensor]:
        if not torch.compiler.is_compiling():
            KeptTask.seen += len(images)
        features, logits = self.teacher(images)
        outputs = {
            "logits": logits,
            "pooled": features[1].mean((2, 3))[::4] if self.views == "rotations" else logits[:, :3],
        }
        return {**outputs, "features_1": features[0]} if self.maps_too else outputs

    def forward(
        self, images: Tensor, targets: Any = None, teacher_outputs: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        logits = self.backbone(images)[1]
        if targets is None or not self.training:
            return {"output": logits}
        given = self.teacher_outputs(images) if teacher_outputs is None else teacher_outputs
        if self.views == "rotations":
            targets = targets.repeat_interleave(4)
        ce, _, kd = functional.cross_entropy_kd(logits, given["logits"], targets)
        loss = ce + kd + given["pooled"].float().mean() * logits.mean()
        return {"loss": loss, "ce": ce.detach(), "kd": kd.detach(), "output": logits[:: len(images) // len(logits)]}


class TurnedTask(KeptTask):
    views = "rotations"

    def forward(self, images: Tensor, targets: Any = None, teacher_outputs: Any = None) -> dict[str, Tensor]:
        outputs = super().forward(images, targets, teacher_outputs)
        return {**outputs, "output": outputs["output"][:: 4 if self.training and targets is not None else 1]}


class FlippedDigits(DigitsData):
    """The digits, flipped at random: two looks of each image."""

    def make_reader(self, part: Any) -> ArrayReader | None:
        reader = super().make_reader(part)
        if reader is not None:
            reader.flip = 0.5
        return reader


class Killed(KeptTask):
    """Ends the first of two processes at once while its second batch's outputs are computed."""

    calls = 0

    def teacher_outputs(self, images: Tensor) -> dict[str, Tensor]:
        if len(images) > 1:
            Killed.calls += 1
            if Killed.calls == 2 and os.environ.get("RANK") == "0":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().teacher_outputs(images)


def words(folder: Path, task: str = "KeptTask", *more: str, **overrides: Any) -> list[str]:
    """A short `fit`: 4 batches of 25 in each of 2 epochs."""
    settings = {"task": f"test_teacher_cache.{task}", "model__backbone": "ToyNet", **overrides}
    settings = {**settings, "data__mixup": 0, "data__largest_shift": 0, "trainer__max_epochs": 2} | overrides
    return [*small_run(folder, **settings), *more]


def ran(arguments: list[str]) -> int:
    """Train; the number of images over which the teacher ran."""
    before = KeptTask.seen
    assert main(arguments) == 0
    return KeptTask.seen - before


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `KeptTask` whose teacher runs in each epoch."""
    folder = tmp_path_factory.mktemp("teacher") / "without"
    assert ran(words(folder)) == 2 * 100
    return folder


@pytest.mark.parametrize("task", ["KeptTask", "TurnedTask"])
def test_the_teacher_runs_in_the_first_epoch_alone_and_the_losses_are_the_same(
    task: str, without: Path, tmp_path: Path
) -> None:
    cache, views = str(tmp_path / "cache"), 4 if task == "TurnedTask" else 1
    if views == 4:
        without = tmp_path / "without"
        assert ran(words(without, task)) == views * 2 * 100
    # One blank image shows what the teacher hands out.
    assert ran(words(tmp_path / "cold", task, teacher_cache=cache)) == views * (100 + 1)
    assert ran(words(tmp_path / "warm", task, teacher_cache=cache)) == views
    (file,) = Path(cache).iterdir()
    # The teacher sees the images in the same batches in the first epoch, where the bits are the same, and in other ones later.
    for name in ("cold", "warm"):
        for expected, row in zip(steps(without), steps(tmp_path / name), strict=True):
            for key, value in row.items():
                assert float(value) == pytest.approx(float(expected[key]), rel=1e-4), (name, key)
    assert steps(tmp_path / "warm") == steps(tmp_path / "cold")
    if views == 1:
        another = {"teacher_cache": cache, "trainer__max_epochs": 1}
        assert ran(words(tmp_path / "another", task, task__seed=1, **another)) == 101, "another teacher"
        assert ran(words(tmp_path / "seed", task, seed_everything=3, **another)) == 101, "other labelled images"
        assert len(list(Path(cache).iterdir())) == 3 and file.is_file()


def test_both_looks_of_a_flipped_image_are_kept(tmp_path: Path) -> None:
    arguments = {"data": FLIPPED, "teacher_cache": str(tmp_path / "cache")}
    first = ran(words(tmp_path / "first", trainer__max_epochs=5, **arguments))
    assert 180 < first <= 201
    assert ran(words(tmp_path / "second", trainer__max_epochs=5, **arguments)) == 1
    assert steps(tmp_path / "first") == steps(tmp_path / "second")
    without = {name: value for name, value in arguments.items() if name != "teacher_cache"}
    assert main(words(tmp_path / "without", trainer__max_epochs=5, **without)) == 0
    last, expected = steps(tmp_path / "first")[-1], steps(tmp_path / "without")[-1]
    assert float(last["kd"]) == pytest.approx(float(expected["kd"]), rel=1e-3)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Within the first epoch, while the cache is filled."""
    arguments = {"checkpoint__every_n_steps": 1}
    assert main(words(tmp_path / "whole", teacher_cache=str(tmp_path / "one"), **arguments)) == 0
    stopped = words(tmp_path / "stopped", teacher_cache=str(tmp_path / "two"), **arguments)
    assert ran([*stopped, "--trainer.max_steps", "2"]) == 1 + 50
    assert ran(stopped) == 1 + 50
    assert steps(tmp_path / "stopped") == steps(tmp_path / "whole")
    assert same_weights(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data__largest_shift": 2}, "DigitsData crops training images at random, so no image comes a second time"),
        ({"data__mixup": 0.2}, "DigitsData mixes images (mixup), so no image comes a second time"),
        ({"data__cutmix": 1.0}, "DigitsData mixes images (cutmix)"),
        (
            {"task": "ClassificationTask"},
            "The task ClassificationTask has no frozen teacher whose outputs could be kept",
        ),
        ({"task__maps": True}, "reads the teacher's feature maps, 1.02 kB of each image; they are kept on request"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_a_sentence(
    settings: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert main(words(tmp_path / "run", teacher_cache=str(cache), **settings)) == 1
    assert sentence in capsys.readouterr().err
    assert not cache.exists() and not (tmp_path / "run").exists()


def test_random_resized_crops_have_no_keys() -> None:
    data = CIFARData(flip=0.5)
    data._readers["train"] = ArrayReader(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long(), 4, 0.5)
    with pytest.raises(ValueError, match=r"turn the random crop off \(data.padding"):
        data.hand_out_keys()


def test_augmentation_that_nobody_knows_of_is_refused() -> None:
    class Noisy(DigitsData):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
            images, *more = super().on_after_batch_transfer(batch, dataloader_idx)
            return images + torch.randn_like(images), *more

    class Unkeyed(ArrayReader):
        def read(self, request: Request) -> Any:
            batch, corrupt = super().read(request)
            return batch._replace(keys=None), corrupt

    with pytest.raises(ValueError, match="Noisy prepares batches by an on_after_batch_transfer of its own"):
        Noisy(largest_shift=0).hand_out_keys()
    data = DigitsData(largest_shift=0)
    data._readers["train"] = Unkeyed(torch.zeros(4, 1, 2, 2), torch.arange(4))
    data.hand_out_keys()
    with pytest.raises(ValueError, match="Unkeyed was asked for keys, but its batch has none"):
        data.on_after_batch_transfer(next(iter(data.train_dataloader())))


def test_keys_name_rows_and_flips() -> None:
    reader = ArrayReader(torch.arange(12.0).view(4, 1, 1, 3), torch.arange(4), flip=0.5)
    data = DigitsData()
    data._readers["train"] = reader
    assert data.hand_out_keys()[0] == 8
    seen = {}
    for epoch in range(6):
        batch, _ = reader.read(Request(torch.tensor([2, 0, 3]).numpy(), 1, epoch, 0, 0, 1, True))
        images, _, keys = data.on_after_batch_transfer(batch)
        for key, row in zip(keys.tolist(), images.flatten(1), strict=True):
            assert torch.equal(seen.setdefault(key, row), row)
    assert {key // 2 for key in seen} == {0, 2, 3} and len(seen) == 6
    assert ArrayReader(reader.images, reader.labels).fingerprint() == reader.fingerprint()
    assert ArrayReader(reader.images.roll(1, 0), reader.labels).fingerprint() != reader.fingerprint()


def task_and_images(**arguments: Any) -> tuple[KeptTask, Tensor]:
    return KeptTask(ToyNet(), **arguments), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))


KEYS = torch.tensor([3, 9, 0, 1, 8, 5])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("views", [1, 4])
def test_rows_come_back_for_every_key(half: bool, views: int, tmp_path: Path) -> None:
    """Logits for each view, another output for each image, and maps; the first time, in parts, and from the file."""
    kind = TurnedTask if views == 4 else KeptTask
    task, images = kind(ToyNet(), maps=True), task_and_images()[1]
    images = rotate4(images) if views == 4 else images
    expected = task.teacher_outputs(images)
    settings: dict[str, Any] = {"samples": 6, "keys": 10, "features": True, "half": half}
    outputs = TeacherOutputs(tmp_path, task, images, **settings)
    tolerance: dict[str, float] = {"rtol": 2**-11, "atol": 1e-7} if half else {"rtol": 1e-5, "atol": 1e-6}
    subset = images.unflatten(0, (6, views))[[4, 1]].flatten(0, 1)
    part = outputs(subset, KEYS[[4, 1]])
    assert outputs.computed == 2
    for again in (outputs, TeacherOutputs(tmp_path, task, images, **settings)):
        found = again(images, KEYS)
        assert found.keys() == expected.keys() == {"logits", "pooled", "features_1"}
        for name, value in expected.items():
            assert found[name].dtype == value.dtype and found[name].is_contiguous()
            torch.testing.assert_close(found[name], value.detach(), **tolerance)
            each = found[name].unflatten(0, (6, -1))[[4, 1]].flatten(0, 1)
            assert torch.equal(each, part[name]), "rounded alike, whether or not it has been on the disk"
    assert (outputs.computed, again.computed, again.damaged) == (6, 0, 0)
    assert (outputs.is_new, again.is_new) == (True, False)
    with pytest.raises(
        ValueError, match=f"images has {6 * views} rows for 5 keys, but {views} for each key were wanted"
    ):
        again(images, KEYS[:5])


def test_every_setting_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Another teacher, other layers with the same weights, another size, other pixels, another precision."""
    task, images = task_and_images()
    strided = KeptTask(ToyNet())
    strided.teacher.network.first[0].stride = (1, 1)
    settings: list[tuple[Task, Tensor, dict[str, Any]]] = [
        (task, images, {}),
        (KeptTask(ToyNet(), seed=1), images, {}),
        (strided, images, {}),
        (task, images[..., :6], {}),
        (task, images, {"settings": {"mean": (0.5, 0.5, 0.5)}}),
        (task, images, {"half": True}),
        (TurnedTask(ToyNet()), rotate4(images), {"samples": 6}),
    ]
    paths = {TeacherOutputs(tmp_path, kind, batch, keys=10, **more).path for kind, batch, more in settings}
    assert len(paths) == len(settings)
    assert TeacherOutputs(tmp_path, KeptTask(ToyNet()), torch.zeros(2, 3, 8, 8), keys=10).path in paths, (
        "only the shape"
    )


def test_weights_that_were_loaded_after_the_teacher_was_frozen_begin_another_file(tmp_path: Path) -> None:
    task, images = task_and_images()
    first = TeacherOutputs(tmp_path, task, images, keys=10)
    first(images, KEYS)
    with torch.no_grad():
        task.teacher.network.fc.bias.add_(1.0)
    second = TeacherOutputs(tmp_path, task, images, keys=10)
    assert second.path != first.path
    torch.testing.assert_close(second(images, KEYS)["logits"], task.teacher_outputs(images)["logits"])


def test_another_version_of_the_library_begins_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, images = task_and_images()
    first = TeacherOutputs(tmp_path, task, images, keys=10)
    monkeypatch.setattr("frskd_fast.__version__", "99.0")
    assert TeacherOutputs(tmp_path, task, images, keys=10).path != first.path


def test_image_files_are_told_apart_by_folder_size_and_time(tmp_path: Path) -> None:
    def fingerprint(root: Path) -> str:
        return FileReader(str(root), [("one.png", 0)], (8, 8), 8, decoder="pil").fingerprint()

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.png").write_bytes(b"pixels")
        os.utime(tmp_path / name / "one.png", (1, 1))
    first = fingerprint(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert fingerprint(tmp_path / "link") == first != fingerprint(tmp_path / "b")
    os.utime(tmp_path / "a" / "one.png", (2, 2))
    assert fingerprint(tmp_path / "a") != first
    (tmp_path / "a" / "one.png").write_bytes(b"more pixels")
    os.utime(tmp_path / "a" / "one.png", (1, 1))
    assert fingerprint(tmp_path / "a") != first
    reader = FileReader(str(tmp_path / "a"), [("one.png", 0), ("two.png", 0)], (8, 8), 8, decoder="pil")
    with pytest.raises(MissingDataError, match=r"two\.png is in the list of images but could not be found"):
        reader.fingerprint()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 4}, "samples is 4, but images has 6 rows and a whole number of them for each was wanted"),
        ({"keys": 0}, "keys must be at least 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    task, images = task_and_images()
    with pytest.raises(ValueError, match=sentence):
        TeacherOutputs(tmp_path, task, images, **{"keys": 10, **settings})


def test_a_refusal_in_one_process_reaches_the_others(tmp_path: Path) -> None:
    """Both raise, where one alone would leave the other waiting for it."""
    both, problems = threading.Barrier(2), [False, False]

    class Strategy:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def reduce_boolean_decision(self, decision: bool) -> bool:
            problems[self.rank] = not decision
            both.wait(10)
            result = not any(problems)
            both.wait(10)
            return result

    def start(rank: int) -> Any:
        cache = TeacherCache(str(tmp_path))
        cache._keys = 10, {}
        trainer: Any = types.SimpleNamespace(
            datamodule=types.SimpleNamespace(channels=3, image_size=(8, 8)),
            precision_plugin=Precision(),
            precision="32-true",
            num_nodes=1,
            local_rank=rank,
            strategy=Strategy(rank),
        )
        module = DistillationModule(10, PLAIN, "ToyNet")
        cache.on_fit_start(trainer, module)

    with ThreadPoolExecutor(2) as pool:
        errors = [future.exception(60) for future in [pool.submit(start, rank) for rank in (0, 1)]]
    assert "has no frozen teacher" in str(errors[0])
    assert str(errors[1]) == "The teacher cache was refused by another process, which says why."


def test_bfloat16_outputs_are_kept_as_they_are(tmp_path: Path) -> None:
    task, images = task_and_images()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = TeacherOutputs(tmp_path, task, images, keys=10)
        first, second = outputs(images, KEYS), outputs(images, KEYS)
        expected = task.teacher_outputs(images)
    assert expected["logits"].dtype == torch.bfloat16
    assert torch.equal(first["logits"], expected["logits"]) and torch.equal(second["logits"], expected["logits"])


def test_numbers_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    task, images = task_and_images()
    with torch.no_grad():
        task.teacher.network.fc.bias.add_(1e6)
    with pytest.raises(ValueError, match="The teacher's logits has numbers beyond 65504"):
        TeacherOutputs(tmp_path, task, images, keys=10, half=True)(images, KEYS)


def test_a_record_that_was_cut_off_or_altered_is_computed_again(tmp_path: Path) -> None:
    """Every byte of every record counts, and so does the place of the record."""
    task, images = task_and_images()
    outputs = TeacherOutputs(tmp_path, task, images, keys=10)
    expected = outputs(images, KEYS)
    whole = outputs.path.read_bytes()
    start, size = len(whole) - 10 * 8 * outputs.words, 8 * outputs.words
    places = range(0, size, 5)
    for place in places:
        torn = bytearray(whole)
        torn[start + 9 * size + place] ^= 0x40
        outputs.path.write_bytes(torn)
        again = TeacherOutputs(tmp_path, task, images, keys=10)
        found = again(images, KEYS)
        assert again.computed == 1 and again.damaged == 1
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])
    # The disk has the end of a record and not its beginning; a record lies in another's place.
    for changed in (
        bytes(size // 2) + whole[start + size // 2 :][: size - size // 2],
        whole[start + 3 * size :][:size],
    ):
        outputs.path.write_bytes(whole[:start] + changed + whole[start + size :])
        again = TeacherOutputs(tmp_path, task, images, keys=10)
        torch.testing.assert_close(again(images, KEYS), expected)
        assert again.computed == 1
        assert TeacherOutputs(tmp_path, task, images, keys=10)(images, KEYS).keys() == expected.keys()


def test_a_damaged_record_is_said_after_the_epoch(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ran(words(tmp_path / "one", teacher_cache=str(cache), trainer__max_epochs=1))
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"1 records of .*\.outputs were cut off or altered"):
        assert ran(words(tmp_path / "two", teacher_cache=str(cache), trainer__max_epochs=1)) == 2


def test_a_torn_file_is_built_anew_and_a_foreign_one_is_left_alone(tmp_path: Path) -> None:
    task, images = task_and_images()
    outputs = TeacherOutputs(tmp_path, task, images, keys=10)
    expected, path = outputs(images, KEYS), outputs.path
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[100] ^= 1  # in its header
    for content, sentence in (
        (whole[:-8], f"has {len(whole) - 8} bytes, where {len(whole)} were written"),
        (whole[:50], "was cut off in its header"),
        (b"", "was cut off in its header"),
        (bytes(damaged), "is damaged in its header"),
        (whole[:40] + b"\n" + whole[41:], "is damaged in its header"),
        (
            b"%s 1 %s 2\n[]" % (MAGIC, hashlib.sha256(b"[]").hexdigest().encode()) + bytes(5000),
            "is damaged in its header",
        ),
        (
            b"%s 1 %s 2\n{]" % (MAGIC, hashlib.sha256(b"{]").hexdigest().encode()) + bytes(5000),
            "is damaged in its header",
        ),
    ):
        path.unlink()  # mapped by `outputs`
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{sentence}; start again"):
            TeacherOutputs(tmp_path, task, images, keys=10, create=False)
        with pytest.warns(UserWarning, match=f"{sentence}; the teacher's outputs are computed again"):
            again = TeacherOutputs(tmp_path, task, images, keys=10)
        torch.testing.assert_close(again(images, KEYS), expected)
        assert again.computed == 6 and path.stat().st_size == len(whole)
    other = TeacherOutputs(tmp_path, KeptTask(ToyNet(), seed=1), images, keys=10).path.read_bytes()
    for content, sentence in (
        (b"PK" + bytes(10_000), "was not written by this library"),
        (whole.replace(b"outputs 1 ", b"outputs 2 ", 1), "has version 2 of its form, but 1 was wanted"),
        (other, r"holds outputs of another teacher or other images \(teachers differ\)"),
    ):
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            TeacherOutputs(tmp_path, task, images, keys=10)
        assert path.read_bytes() == content
    assert not list(tmp_path.glob(".*"))


def test_a_disk_without_room_is_a_sentence(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    task, images = task_and_images()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(
            ValueError, match=r"outputs take 0.064 GB, which could not be made room for in .*File too large"
        ):
            TeacherOutputs(tmp_path / "cache", task, images, keys=10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_may_not_be_written_is_read(tmp_path: Path) -> None:
    task, images = task_and_images()
    outputs = TeacherOutputs(tmp_path, task, images, keys=10)
    outputs(images[:3], KEYS[:3])
    before = outputs.path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        private = TeacherOutputs(tmp_path, task, images, keys=10)
    private(images, KEYS)
    private(images, KEYS)
    assert private.computed == 3 and outputs.path.read_bytes() == before


def test_a_compiled_step_takes_the_outputs_as_inputs_of_one_graph(tmp_path: Path) -> None:
    task, images = TurnedTask(ToyNet()).train(), task_and_images()[1]
    images, targets = rotate4(images), torch.arange(6)
    outputs = TeacherOutputs(tmp_path, task, images, samples=6, keys=10)
    expected = [task(images[: 4 * n], targets[:n])["loss"] for n in (6, 5, 3)]
    task.compile(backend="aot_eager")  # the same graphs, without code of their own
    before = KeptTask.seen
    for n, loss in zip((6, 5, 3), expected, strict=True):
        given = outputs(images[: 4 * n], KEYS[:n])
        with torch.compiler.set_stance("default" if n == 6 else "fail_on_recompile"):
            torch.testing.assert_close(task(images[: 4 * n], targets[:n], given)["loss"], loss)
    assert KeptTask.seen == before + 24, "the first time, and not within the graph"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_warm_cache_does_not_wait_for_the_device(tmp_path: Path) -> None:
    task, images = task_and_images()
    task, images = task.cuda(), images.cuda()
    outputs = TeacherOutputs(tmp_path, task, images, keys=10)
    expected = outputs(images, KEYS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = outputs(images, KEYS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found["logits"].is_cuda and torch.equal(found["logits"], expected["logits"])


def keeps(task: Task) -> bool:
    return type(task).teacher_outputs is not Task.teacher_outputs


@pytest.mark.parametrize("name", [name for name, build in SMALL_TASKS.items() if keeps(build(ToyNet()))])
def test_tasks_with_a_frozen_teacher_lose_the_same_by_what_was_kept(name: str, tmp_path: Path) -> None:
    task, images = SMALL_TASKS[name](ToyNet()).train(), task_and_images()[1]
    images = rotate4(images) if task.views == "rotations" else images
    targets = torch.arange(6)
    outputs = TeacherOutputs(tmp_path, task, images, samples=6, keys=10, features=True)
    outputs(images, KEYS)
    (teacher,) = (module for module in task.modules() if isinstance(module, FrozenTeacher))
    teacher.network.forward = None  # type: ignore[method-assign]
    found = task(images, targets, outputs(images, KEYS))
    del teacher.network.forward
    for name, value in task(images, targets).items():
        torch.testing.assert_close(found[name], value)


def test_two_processes_that_are_killed_leave_a_file_that_can_be_used(without: Path, tmp_path: Path) -> None:
    """Each has written its images of the first batch, and one those of the second."""
    cache = str(tmp_path / "cache")
    two = {"trainer__strategy": "ddp", "trainer__devices": 2, "trainer__max_epochs": 1, "data__batch_size": 10}
    running = process(words(tmp_path / "two", "Killed", teacher_cache=cache, **two), processes=2)
    assert running.wait(timeout=100) != 0
    (file,) = Path(cache).iterdir()
    assert 1 + 100 - 40 <= ran(words(tmp_path / "one", teacher_cache=cache)) <= 1 + 100 - 20
    assert list(Path(cache).iterdir()) == [file], "the same file"
    for expected, row in zip(steps(without), steps(tmp_path / "one"), strict=True):
        assert float(row["kd"]) == pytest.approx(float(expected["kd"]), rel=1e-4)
