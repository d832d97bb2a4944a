"""The data modules: formats, damaged files, augmentation against slow loops, order, resume and division among processes."""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import math
import multiprocessing
import os
import pickle
import shutil
import socket
import sys
import tarfile
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import data_files
import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from frskd_fast.mixing import rotate4
from frskd_fast.models import cifarresnet18, resnet18, wrn16x2
from frskd_fast.training.data import (
    ArrayReader,
    CIFARData,
    CorruptImageError,
    DataFileError,
    DigitsData,
    ImageBatch,
    ImageData,
    ImageFolderData,
    ImageLoader,
    MissingDataError,
    Request,
    STL10Data,
    cifar,
    stem_stride,
    warn_if_stem_mismatch,
)
from frskd_fast.training.data.augmentation import (
    PADDING_MODES,
    UNIFORMS_PER_IMAGE,
    crop_and_flip,
    crop_views,
    draw_crops,
    draw_resized_crops,
    draw_view_crops,
    normalise,
    padded,
    random_resized_crop,
    resize_and_centre_crop,
    resized_crop_window,
)
from frskd_fast.training.data.cifar_pickle import STAND_INS

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # for bench

few_images = pytest.mark.filterwarnings("ignore:.*intact but hold", "ignore:.*no image belongs to")


def prepared(data: ImageData, loader: ImageLoader, epoch: int = 0) -> list[tuple[Tensor, Any]]:
    """What the steps of one epoch receive."""
    loader.set_epoch(epoch)
    return [data.on_after_batch_transfer(batch) for batch in loader]


def assert_same_batches(ours: list[tuple[Tensor, Any]], wanted: list[tuple[Tensor, Any]]) -> None:
    assert len(ours) == len(wanted)
    for (images, targets), (wanted_images, wanted_targets) in zip(ours, wanted, strict=True):
        assert torch.equal(images, wanted_images)
        if isinstance(targets, Tensor):
            assert torch.equal(targets, wanted_targets)
        else:
            assert torch.equal(targets[0], wanted_targets[0]) and torch.equal(targets[1], wanted_targets[1])
            assert targets[2] == wanted_targets[2]


def numbered_reader(count: int, **arguments: Any) -> ArrayReader:
    """Images whose label is their row number."""
    images = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return ArrayReader(images, torch.arange(count), **arguments)


def loader_of(count: int, share: tuple[int, int] = (0, 1), **arguments: Any) -> ImageLoader:
    reader = numbered_reader(count, padding=1, flip=0.5)
    return ImageLoader(reader, seed=10, share=lambda: share, **{"training": True, "shuffle": True, **arguments})


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("height", "width", "padding"), [(5, 7, 2), (4, 4, 0), (1, 3, 4)])
def test_crop_and_flip_is_the_slow_loop(dtype: torch.dtype, height: int, width: int, padding: int) -> None:
    images = torch.randint(1, 256, (20, 3, height, width)).to(dtype)
    images[1::2] = images[1::2].to(memory_format=torch.channels_last)
    crops = draw_crops(20, padding, 0.5, torch.Generator().manual_seed(1))
    wanted = torch.zeros_like(images)
    for n, (top, left, flipped) in enumerate(crops.tolist()):
        for y in range(height):
            for x in range(width):
                row = top + y - padding
                column = left + (width - 1 - x if flipped else x) - padding
                if 0 <= row < height and 0 <= column < width:
                    wanted[n, :, y, x] = images[n, :, row, column]
    before = images.clone()
    for given in (images, images.to(memory_format=torch.channels_last)):
        got = crop_and_flip(given, crops, padding)
        assert got.dtype == dtype and got.is_contiguous() and torch.equal(got, wanted)
    assert torch.equal(images, before)
    assert {0, 1} == set(crops[:, 2].tolist())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("side", "padding"), [(5, 2), (4, 0), (1, 3)])
def test_views_are_flipped_turned_and_cropped_apart(dtype: torch.dtype, side: int, padding: int) -> None:
    """One after the other, as SSKD's data set does it."""
    images = torch.randint(1, 256, (20, 3, side, side)).to(dtype)
    crops = draw_view_crops(20, padding, 0.5, torch.Generator().manual_seed(1))
    wanted = []
    for image, rows in zip(images, crops.tolist(), strict=True):
        image = image.flip(2) if rows[0][2] else image
        for turns, (top, left, _) in enumerate(rows):
            padded = F.pad(image.rot90(turns, (1, 2)), (padding,) * 4)
            wanted.append(padded[:, top : top + side, left : left + side])
    for given in (images, images.to(memory_format=torch.channels_last)):
        got = crop_views(given, crops, padding)
        assert got.dtype == dtype and got.is_contiguous() and torch.equal(got, torch.stack(wanted))
    assert {0, 1} == set(crops[:, 0, 2].tolist()) and (crops[:, :, 2] == crops[:, :1, 2]).all()
    assert torch.equal(draw_view_crops(3, padding, 0.5, torch.Generator().manual_seed(1)), crops[:3])
    if padding:
        assert (crops[:, 1:, :2] != crops[:, :1, :2]).any(), "each view has a crop of its own"
    with pytest.raises(ValueError, match=r"square images were wanted.*set crop_each_view to false"):
        crop_views(images.new_zeros(20, 3, side, side + 1), crops, padding)


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_padding_is_that_of_numpy(dtype: torch.dtype, mode: str) -> None:
    for size, padding in (((5, 7), 2), ((3, 1), 4), ((4, 4), 0)):
        images = torch.randint(1, 256, (4, 3, *size)).to(dtype)
        wanted = numpy.pad(images.numpy(), [(0, 0), (0, 0), *[(padding, padding)] * 2], mode)  # type: ignore[call-overload]
        got = padded(images.to(memory_format=torch.channels_last), padding, mode)
        assert got.dtype == dtype and got.is_contiguous() and numpy.array_equal(got.numpy(), wanted)
    images, corner = torch.randint(1, 256, (1, 3, 4, 4)).to(dtype), torch.tensor([[0, 1, 0]])
    wide = padded(images, 2, mode)
    assert torch.equal(crop_and_flip(images, corner, 2, mode), wide[:, :, :4, 1:5])
    views = crop_views(images, corner.expand(4, 3).unsqueeze(0), 2, mode)
    assert torch.equal(views[:1], wide[:, :, :4, 1:5]) and torch.equal(views[1:2], wide.rot90(1, (2, 3))[:, :, :4, 1:5])


def test_cifar_pads_as_it_is_told() -> None:
    images, crops = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(8, 3, dtype=torch.int64)
    white = ImageBatch(images, torch.arange(8), crops, None)
    for mode in PADDING_MODES:
        images, _ = CIFARData(padding_mode=mode, mean=(0.0,) * 3, std=(1.0,) * 3).on_after_batch_transfer(white)
        assert (images[:, :, 4:, 4:] == 1).all() and (images == 1).all() == (mode != "constant")
    with pytest.raises(ValueError, match="padding_mode is 'zeros', but 'constant', 'reflect', 'symmetric' was wanted"):
        CIFARData(padding_mode="zeros")


def test_data_hands_out_views_that_are_cropped_apart() -> None:
    upright = DigitsData(batch_size=40, largest_shift=0, as_rgb=True)
    wanted = prepared(upright, upright.train_dataloader())
    centred = DigitsData(batch_size=40, largest_shift=0, as_rgb=True, crop_each_view=True)
    got = prepared(centred, centred.train_dataloader())
    assert_same_batches(got, [(rotate4(images), targets) for images, targets in wanted])
    joint = DigitsData(batch_size=40, crop_each_view=True)
    batches = prepared(joint, joint.train_dataloader(), epoch=2)
    assert_same_batches(prepared(joint, joint.train_dataloader(), epoch=2), batches)
    for rank in (0, 1):
        data = DigitsData(batch_size=20, crop_each_view=True)
        data.trainer = _stub_trainer(rank, 2)
        for (images, targets), (all_images, all_targets) in zip(
            prepared(data, data.train_dataloader(), epoch=2), batches, strict=True
        ):
            assert torch.equal(images.unflatten(0, (-1, 4)), all_images.unflatten(0, (-1, 4))[rank::2])
            assert torch.equal(targets, all_targets[rank::2])
    (images, targets), *_ = prepared(joint, joint.val_dataloader())  # type: ignore[arg-type]
    assert len(images) == len(targets) == 40, "evaluation is upright"


def test_crops_are_uniform_and_do_not_depend_on_how_many_are_drawn() -> None:
    crops = draw_crops(90_000, 4, 0.25, torch.Generator().manual_seed(2))
    for axis in (0, 1):
        shares = torch.bincount(crops[:, axis], minlength=9) / len(crops)
        assert len(shares) == 9
        # four standard deviations of a share of 1/9
        assert (shares - 1 / 9).abs().max() < 4 * math.sqrt(8 / 81 / len(crops))
    assert abs(crops[:, 2].float().mean() - 0.25) < 4 * math.sqrt(0.1875 / len(crops))
    few = draw_crops(5, 4, 0.25, torch.Generator().manual_seed(2))
    assert torch.equal(few, crops[:5])
    resized = draw_resized_crops(50, torch.Generator().manual_seed(2))
    assert torch.equal(resized[:3], draw_resized_crops(3, torch.Generator().manual_seed(2)))


def test_normalise_has_the_bits_of_the_two_steps_apart() -> None:
    images = torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    wanted = images.to(torch.float32).div(255).sub(mean[:, None, None]).div(std[:, None, None])
    for given in (images, images.to(memory_format=torch.channels_last), images.float()):
        before = given.clone()
        got = normalise(given, mean, std)
        assert got.dtype == torch.float32 and got.is_contiguous() and torch.equal(got, wanted)
        assert torch.equal(given, before)


def test_windows_of_resized_crops_keep_their_bounds_and_their_distribution() -> None:
    width, height = 75, 50
    uniforms = draw_resized_crops(4000, torch.Generator().manual_seed(4)).tolist()
    windows = [resized_crop_window(width, height, row) for row in uniforms]
    areas, aspects = [], []
    for left, top, right, bottom in windows:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        aspects.append((right - left) / (bottom - top))
    # Rounding moves a side by half a pixel at most, of 14 or more. The widest window of full height is 4/3 as wide as high.
    assert 0.07 < min(areas) < 0.1 and 0.85 < max(areas) <= 67 * 50 / (width * height)
    assert 0.7 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.45
    assert min(window[0] for window in windows) == min(window[1] for window in windows) == 0
    assert max(window[2] for window in windows) == width and max(window[3] for window in windows) == height


@pytest.mark.parametrize(("width", "height"), [(300, 10), (10, 300), (40, 40)])
def test_window_falls_back_to_the_centre(width: int, height: int) -> None:
    ratio = (3 / 4, 4 / 3)
    # An area of more than the whole image never fits.
    left, top, right, bottom = resized_crop_window(width, height, [1.0] * UNIFORMS_PER_IMAGE, (4.0, 4.0), ratio)
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1
    if width == height:
        assert (right - left, bottom - top) == (width, height)
    elif width > height:
        assert (right - left, bottom - top) == (round(height * ratio[1]), height)
    else:
        assert (right - left, bottom - top) == (width, round(width / ratio[0]))


def test_resized_crop_of_a_known_window() -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=numpy.uint8)
    image = Image.fromarray(pixels)
    uniforms = [0.5] * UNIFORMS_PER_IMAGE
    # Area 0.5 * 2400, square: 35 x 35 (34.64 rounded); top int(.5 * 6), left int(.5 * 26).
    window = numpy.array(image.crop((13, 3, 48, 38)).resize((16, 8), Image.Resampling.BILINEAR))
    square = {"scale": (0.5, 0.5), "ratio": (1.0, 1.0)}
    got = random_resized_crop(image, (8, 16), uniforms, **square, flip=0.5)  # type: ignore[arg-type]
    assert numpy.array_equal(numpy.array(got), window)
    got = random_resized_crop(image, (8, 16), uniforms, **square, flip=0.6)  # type: ignore[arg-type]
    assert numpy.array_equal(numpy.array(got), window[:, ::-1])


@pytest.mark.parametrize(
    ("width", "height", "resize", "side"), [(500, 375, 256, 224), (33, 47, 32, 32), (40, 40, 40, 36)]
)
def test_resize_and_centre_crop(width: int, height: int, resize: int, side: int) -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    image = Image.fromarray(pixels)
    new_width, new_height = (
        (resize, int(resize * height / width)) if width <= height else (int(resize * width / height), resize)
    )
    whole = numpy.array(image.resize((new_width, new_height), Image.Resampling.BILINEAR))
    top, left = round((new_height - side) / 2.0), round((new_width - side) / 2.0)
    got = numpy.array(resize_and_centre_crop(image, resize, (side, side)))
    assert numpy.array_equal(got, whole[top : top + side, left : left + side])


# --- order, resume, division ------------------------------------------------------------------------------------------


def flat(batches: Iterable[Iterable[Any]]) -> list[Any]:
    return [each for batch in batches for each in batch]


def rows_of(loader: ImageLoader, epoch: int = 0) -> list[list[int]]:
    loader.set_epoch(epoch)
    return [batch.targets.tolist() for batch in loader]


def test_an_epoch_holds_every_image_once_and_another_epoch_another_order() -> None:
    loader = loader_of(23, batch_size=5)
    first, second = rows_of(loader, 0), rows_of(loader, 1)
    assert [len(batch) for batch in first] == [5, 5, 5, 5, 3] and len(loader) == 5
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(23)) != flat(first)
    assert first != second and first == rows_of(loader_of(23, batch_size=5), 0)
    assert rows_of(loader, 0) == first
    other = ImageLoader(numbered_reader(23), batch_size=5, seed=11, training=True, shuffle=True)
    assert rows_of(other) != first
    dropped = loader_of(23, batch_size=5, drop_last=True)
    assert rows_of(dropped) == first[:4] and len(dropped) == 4
    plain = loader_of(7, batch_size=4, training=False, shuffle=False)
    assert rows_of(plain) == [[0, 1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("workers", [0, 2])
@few_images
def test_batches_depend_on_seed_epoch_and_position_alone(tmp_path: Path, workers: int) -> None:
    data_files.write_cifar100(tmp_path)

    def epochs(**arguments: Any) -> list[list[tuple[Tensor, Any]]]:
        data = CIFARData(str(tmp_path), batch_size=16, cutmix=1.0, **arguments)
        loader = data.train_dataloader()
        result = [prepared(data, loader, epoch) for epoch in (0, 1)]
        data.teardown("fit")
        return result

    wanted = epochs(seed=4)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = epochs(seed=4, workers=workers)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_batches(flat(again), flat(wanted))
    other = epochs(seed=5)
    assert not torch.equal(other[0][0][0], wanted[0][0][0]) and not torch.equal(wanted[1][0][0], wanted[0][0][0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_an_interrupted_epoch_goes_on_with_the_next_batch(workers: int, stop: int) -> None:
    whole = loader_of(41, batch_size=7)
    whole.set_epoch(2)
    wanted = list(whole)
    interrupted = loader_of(41, batch_size=7, workers=workers)
    interrupted.set_epoch(2)
    iterator = iter(interrupted)
    for _ in range(stop):
        next(iterator)
    state = pickle.loads(pickle.dumps(interrupted.state_dict()))
    assert state["position"] == stop and state["epoch"] == 2  # and not what the workers had made by then
    interrupted.close()
    resumed = loader_of(41, batch_size=7, workers=workers)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    got = list(resumed)
    assert len(resumed) == 6 and len(got) == 6 - stop
    for ours, theirs in zip(got, wanted[stop:], strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.targets, theirs.targets)
        assert torch.equal(ours.crops, theirs.crops) and ours.mixing_seed == theirs.mixing_seed
    assert resumed.state_dict()["position"] == 6
    assert len(list(resumed)) == 6  # and the next iteration is a whole one
    resumed.close()


def test_skipped_batches_are_not_read() -> None:
    asked: list[Request] = []

    class Watched(ArrayReader):
        def read(self, request: Request) -> tuple[ImageBatch, tuple[int, ...]]:
            asked.append(request)
            return super().read(request)

    loader = ImageLoader(Watched(torch.zeros(20, 1, 2, 2), torch.arange(20)), batch_size=2, seed=0, training=True)
    loader.load_state_dict({"epoch": 1, "position": 8, "seed": 0, "images": 20, "images_per_step": 2})
    list(loader)
    assert [(request.epoch, request.batch) for request in asked] == [(1, 8), (1, 9)]


def test_state_of_another_epoch_begins_at_the_first_batch() -> None:
    loader = loader_of(10, batch_size=5)
    loader.load_state_dict({"epoch": 0, "position": 1, "seed": 10, "images": 10, "images_per_step": 5})
    assert len(rows_of(loader, epoch=1)) == 2


def test_state_of_another_run_is_refused_or_warned_of() -> None:
    state = loader_of(40, batch_size=5).state_dict()
    for name in ("seed", "images"):
        with pytest.raises(ValueError, match=rf"{name} = 7, but this loader has"):
            loader_of(40, batch_size=5).load_state_dict({**state, name: 7})
    loader = loader_of(40, batch_size=4)
    with pytest.warns(UserWarning, match=r"continues at image 12 of its order \(15 were seen\)"):
        loader.load_state_dict({**state, "position": 3})
    assert flat(rows_of(loader)) == flat(rows_of(loader_of(40, batch_size=4)))[12:]


def test_an_older_iterator_says_that_it_was_overtaken() -> None:
    loader = loader_of(10, batch_size=2)
    old = iter(loader)
    next(old)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="overtaken by a newer one"):
        next(old)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [24, 25, 29])
def test_processes_share_the_batches_of_one_process(world: int, count: int) -> None:
    size = 4
    alone = loader_of(count, batch_size=size * world)
    alone.set_epoch(1)
    together = list(alone)
    shares = []
    for rank in range(world):
        loader = loader_of(count, share=(rank, world), batch_size=size)
        assert len(loader) == len(alone)
        loader.set_epoch(1)
        shares.append(list(loader))
    for position, whole in enumerate(together):
        parts = [share[position] for share in shares]
        assert len({len(part.targets) for part in parts}) == 1  # all processes have equally many
        for rank, part in enumerate(parts):
            own = whole.targets[rank::world]
            # The last batch is completed with images from the beginning of the order.
            assert torch.equal(part.targets[: len(own)], own)
            assert torch.equal(part.images[: len(own)], whole.images[rank::world])
            assert torch.equal(part.crops[: len(own)], whole.crops[rank::world])
            extra = part.targets[len(own) :]
            assert len(extra) <= 1 and all(row in together[0].targets for row in extra)
        assert len({part.mixing_seed for part in parts}) == world


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [3, 7, 8, 9, 12, 13])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_evaluation_sees_each_image_once_in_equally_many_batches(world: int, count: int, size: int) -> None:
    loaders = [
        loader_of(count, share=(rank, world), batch_size=size, training=False, shuffle=False) for rank in range(world)
    ]
    shares = [rows_of(loader) for loader in loaders]
    assert {len(share) for share in shares} == {len(loader) for loader in loaders} and len(loaders) == world
    assert sorted(flat(flat(shares))) == list(range(count))
    assert all(1 <= len(batch) <= size + 1 for share in shares for batch in share)


def test_evaluation_with_more_processes_than_images_is_refused() -> None:
    loader = loader_of(2, share=(0, 3), batch_size=1, training=False)
    with pytest.raises(ValueError, match="2 images, fewer than the 3 processes"):
        len(loader)


# --- the batch on the device ------------------------------------------------------------------------------------------


@few_images
def test_a_training_batch_is_cropped_flipped_and_normalised(tmp_path: Path) -> None:
    data_files.write_cifar100(tmp_path, train=30)
    data = CIFARData(str(tmp_path), batch_size=30)
    (batch,) = list(data.train_dataloader())
    assert batch.images.dtype == torch.uint8
    images, targets = data.on_after_batch_transfer(batch)
    assert images.dtype == torch.float32 and images.shape == (30, 3, 32, 32)
    assert targets.dtype == torch.int64 and torch.equal(targets, batch.targets)
    mean, std = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    for n, (top, left, flipped) in enumerate(batch.crops.tolist()):
        window = F.pad(batch.images[n], (4,) * 4)[:, top : top + 32, left : left + 32]
        wanted = (window.flip(2) if flipped else window).float().div(255).sub(mean).div(std)
        assert torch.equal(images[n], wanted)
    validation = data.val_dataloader()
    assert isinstance(validation, ImageLoader)
    (raw,) = list(validation)
    assert raw.crops is None and raw.mixing_seed is None
    images, targets = data.on_after_batch_transfer(raw)
    assert torch.equal(images, raw.images.float().div(255).sub(mean).div(std)) and torch.equal(targets, raw.targets)
    assert data.on_after_batch_transfer((images, targets)) == (images, targets)


@few_images
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets(tmp_path: Path, kind: str) -> None:
    data_files.write_cifar10(tmp_path)
    data = CIFARData(str(tmp_path), classes=10, batch_size=8, **{kind: 1.0})
    plain = CIFARData(str(tmp_path), classes=10, batch_size=8)
    batches = prepared(data, data.train_dataloader())
    weights = set()
    for (images, (targets, targets_b, lam)), (unmixed, labels) in zip(
        batches, prepared(plain, plain.train_dataloader()), strict=True
    ):
        assert torch.equal(targets, labels) and targets_b.dtype == torch.int64 and 0 <= lam <= 1
        assert sorted(targets_b.tolist()) == sorted(labels.tolist())
        assert images.shape == unmixed.shape and images.dtype == torch.float32
        weights.add(lam)
    assert len(weights) == len(batches)
    assert not torch.equal(batches[0][0], prepared(plain, plain.train_dataloader())[0][0])
    evaluation = data.test_dataloader()
    assert isinstance(evaluation, ImageLoader)
    assert all(isinstance(targets, Tensor) for _, targets in prepared(data, evaluation))


def _stub_trainer(rank: int, world: int) -> Any:
    return types.SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": world, "rank": rank},
        num_devices=world,
        precision_plugin=types.SimpleNamespace(convert_input=lambda batch: batch),
    )


def test_prepared_batches_of_two_processes_make_the_joint_one() -> None:
    joint = DigitsData(batch_size=40)
    wanted = prepared(joint, joint.train_dataloader(), epoch=1)
    shares = []
    for rank in (0, 1):
        data = DigitsData(batch_size=20)
        data.trainer = _stub_trainer(rank, 2)
        shares.append(prepared(data, data.train_dataloader(), epoch=1))
    assert len(wanted) == len(shares[0]) == len(shares[1]) == 3
    for position, (images, targets) in enumerate(wanted):
        for rank, share in enumerate(shares):
            assert torch.equal(share[position][0], images[rank::2]) and torch.equal(
                share[position][1], targets[rank::2]
            )


@pytest.mark.usefixtures("_quiet")
def test_modules_and_errors_travel_to_a_spawned_process(tmp_path: Path) -> None:
    data_files.write_image_folder(tmp_path)
    for data in (DigitsData(), ImageFolderData(str(tmp_path), image_size=16, workers=0)):
        wanted = prepared(data, data.train_dataloader())
        for other in (pickle.loads(pickle.dumps(data)), copy.deepcopy(data)):
            assert_same_batches(prepared(other, other.train_dataloader()), wanted)
            other.teardown("fit")
    error = pickle.loads(pickle.dumps(MissingDataError("a sentence")))
    assert type(error) is MissingDataError and str(error) == "a sentence" and isinstance(error, FileNotFoundError)


def test_as_many_workers_as_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes, wanted in ((1, 1, 1), (6, 1, 6), (6, 2, 3), (64, 2, 8), (2, 4, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        data = DigitsData(workers=-1)
        data.trainer = _stub_trainer(0, processes)
        assert data.train_dataloader().workers == wanted


@pytest.mark.gpu
def test_the_device_gives_the_bits_of_the_cpu() -> None:
    data = DigitsData(mixup=0.2)
    batch = next(iter(data.train_dataloader()))
    images, (targets, targets_b, lam) = data.on_after_batch_transfer(batch)
    moved = ImageBatch(batch.images.cuda(), batch.targets.cuda(), batch.crops.cuda(), batch.mixing_seed)
    on_device, (device_targets, device_targets_b, device_lam) = data.on_after_batch_transfer(moved)
    assert torch.allclose(on_device.cpu(), images, rtol=0, atol=1e-6) and lam == device_lam
    assert torch.equal(device_targets.cpu(), targets) and torch.equal(device_targets_b.cpu(), targets_b)
    images, crops = (
        torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8),
        draw_view_crops(5, 2, 0.5, torch.Generator()),
    )
    assert torch.equal(crop_views(images.cuda(), crops.cuda(), 2).cpu(), crop_views(images, crops, 2))


# --- CIFAR ------------------------------------------------------------------------------------------------------------


@few_images
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_reads_the_pickles_of_its_authors(tmp_path: Path, classes: int) -> None:
    write = data_files.write_cifar100 if classes == 100 else data_files.write_cifar10
    folder = "cifar-100-python" if classes == 100 else "cifar-10-batches-py"
    write(tmp_path)
    data = CIFARData(str(tmp_path), classes=classes)
    assert (data.num_classes, data.image_size, data.channels) == (classes, (32, 32), 3)
    images, labels = [], []
    for name in ["train"] if classes == 100 else [f"data_batch_{number}" for number in range(1, 6)]:
        with open(tmp_path / folder / name, "rb") as file:
            content = pickle.load(file, encoding="bytes")
        images.append(content[b"data"])
        labels += content[b"fine_labels" if classes == 100 else b"labels"]
    reader = data.make_reader("train")
    assert torch.equal(reader.images, torch.from_numpy(numpy.concatenate(images)).reshape(-1, 3, 32, 32))
    assert reader.labels.tolist() == labels
    assert len(data.make_reader("test")) == 20
    for root in (tmp_path / folder, tmp_path):
        assert torch.equal(CIFARData(str(root), classes=classes).make_reader("train").images, reader.images)


@few_images
def test_cifar_reads_the_archive_itself(tmp_path: Path) -> None:
    data_files.write_cifar100(tmp_path / "unpacked")
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "unpacked" / "cifar-100-python", "cifar-100-python")
    wanted = CIFARData(str(tmp_path / "unpacked")).make_reader("train").images
    for root in (archive, tmp_path):
        assert torch.equal(CIFARData(str(root)).make_reader("train").images, wanted)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 3])
    with pytest.raises(DataFileError, match=r"cifar-100-python\.tar\.gz"):
        CIFARData(str(archive)).make_reader("train")
    with gzip.open(archive, "wb") as file:
        file.write(b"no archive")
    with pytest.raises(DataFileError, match=r"could not be read as an archive"):
        CIFARData(str(archive)).make_reader("train")


@few_images
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_reads_what_today_s_pickle_writes(tmp_path: Path, protocol: int) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    data = numpy.arange(2 * 3072).reshape(2, 3072).astype("uint8")
    content = {"data": data, "fine_labels": [3, 99], "filenames": [b"a", b""]}
    (folder / "train").write_bytes(pickle.dumps(content, protocol=protocol))
    reader = CIFARData(str(tmp_path)).make_reader("train")
    assert reader.labels.tolist() == [3, 99] and torch.equal(reader.images.flatten(1), torch.from_numpy(data))
    reader.images.add_(0)  # memory of its own, that may be written


class _Attack:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("echo harm > harm.txt",)


def _cifar_with(tmp_path: Path, content: Any) -> CIFARData:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir(exist_ok=True)
    (folder / "train").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
    return CIFARData(str(tmp_path))


def test_cifar_runs_nothing_that_a_pickle_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataFileError, match=r"asks for posix\.system, which no file of CIFAR needs"):
        _cifar_with(tmp_path, {b"data": _Attack()}).make_reader("train")
    assert not (tmp_path / "harm.txt").exists()
    for forbidden in (
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\nexec\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__base__\x93.",  # an attribute of what is allowed
    ):
        with pytest.raises(DataFileError, match="which no file of CIFAR needs"):
            _cifar_with(tmp_path, forbidden).make_reader("train")


def _numpy(name: str, *arguments: bytes, state: bytes = b"") -> bytes:
    """Opcodes of a call of a function of NumPy, and of setting the state of what it returns."""
    module, _, function = name.rpartition(".")
    return b"c%b\n%b\n(%btR" % (module.encode(), function.encode(), b"".join(arguments)) + (state and state + b"b")


def test_cifar_does_not_let_a_pickle_lead_numpy_to_foreign_memory(tmp_path: Path) -> None:
    """A dtype of objects that its state declares to be numbers: the bytes of the file would be taken for pointers."""
    objects = _numpy("numpy.dtype", b"U\x02O8I0\nI1\n")
    state = b"(I3\nU\x01|N(U\x01at}U\x01a(" + objects + b"I0\ntsI8\nI1\nI0\nt"
    forged = _numpy("numpy.dtype", b"U\x02V8I0\nI1\n", state=state)
    array = _numpy("numpy.core.numeric._frombuffer", b"U\x08AAAAAAAA", forged, b"(I1\nt", b"U\x01C")
    with pytest.raises(DataFileError, match="an array of dtype 'V8', but numbers were wanted"):
        _cifar_with(tmp_path, b"\x80\x02}U\x04data" + array + b"s.").make_reader("train")


@pytest.mark.parametrize("name", ["numpy.core.multiarray._reconstruct", "numpy.dtype"])
def test_cifar_lets_no_pickle_set_attributes_of_what_it_names(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    content = b"\x80\x02c%b\n%b\n(N}\x8c\x07harmfulK\x01stb." % (module.encode(), function.encode())
    with pytest.raises(DataFileError, match="sets the state of something else than an array or a dtype"):
        _cifar_with(tmp_path, content).make_reader("train")
    assert not hasattr(STAND_INS[module, function], "harmful")


def test_cifar_makes_no_array_that_the_file_does_not_hold(tmp_path: Path) -> None:
    number = _numpy("numpy.dtype", b"U\x02u1I0\nI1\n")
    shape = b"(I1000000000\nI3072\nt"
    claimed = _numpy("numpy.core.numeric._frombuffer", b"U\x08AAAAAAAA", number, shape, b"U\x01C")
    with pytest.raises(DataFileError, match=r"an array of shape \(1000000000, 3072\) with 8 bytes"):
        _cifar_with(tmp_path, b"\x80\x02}U\x04data" + claimed + b"s.").make_reader("train")
    text = b"(T\x01\x00\x00\x00xI1000000000\nt"  # whose product would be a text of so many letters
    for shape, said in (
        (text, "no tuple of whole numbers"),
        (b"(I-2\nI-4\nt", "no tuple of"),
        (b"(I1\nI2\nI4\nt", "3 dim"),
    ):
        claimed = _numpy("numpy.core.numeric._frombuffer", b"U\x08AAAAAAAA", number, shape, b"U\x01C")
        with pytest.raises(DataFileError, match=f"an array .*{said}"):
            _cifar_with(tmp_path, b"\x80\x02}U\x04data" + claimed + b"s.").make_reader("train")
    for bomb in (b"c__builtin__\nbytes\n(I1000000000000\ntR.", b"cnumpy\nndarray\n((I1000000000000\nttR."):
        with pytest.raises(DataFileError, match="could not be read as a pickle of CIFAR"):
            _cifar_with(tmp_path, bomb).make_reader("train")


@pytest.mark.parametrize("what", ["key", "key by ones", "dtype", "encoding", "set", "shape"])
def test_cifar_is_not_kept_busy_by_tuples_in_tuples(tmp_path: Path, what: str) -> None:
    """Each level doubles the work of hashing the key, or of writing it down, and takes a byte or two."""
    deep = b")" + 60 * b"2\x86"
    number = _numpy("numpy.dtype", b"U\x02u1I0\nI1\n")
    content = {
        "key": b"}" + deep + b"Ns.",
        "key by ones": b"(" + deep + b"Nd.",
        "dtype": _numpy("numpy.dtype", deep) + b".",
        "encoding": _numpy("_codecs.encode", b"U\x01a", deep) + b".",
        "set": b"\x8f(" + deep + b"\x90.",
        "shape": b"}U\x04data" + _numpy("numpy.core.numeric._frombuffer", b"U\x01A", number, deep, b"U\x01C") + b"s.",
    }[what]
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"\x80\x02" + content)
    reading = multiprocessing.get_context("fork").Process(target=_must_be_refused, args=(tmp_path,))
    reading.start()
    reading.join(30)
    busy = reading.is_alive()
    reading.kill()
    reading.join()
    assert not busy and reading.exitcode == 0


def _must_be_refused(root: Path) -> None:
    with pytest.raises(DataFileError, match="could not be read as a pickle of CIFAR"):
        CIFARData(str(root)).make_reader("train")


def test_cifar_is_compared_with_what_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with the number of images of the original and another content; one's own may be read."""
    data_files.write_cifar100(tmp_path)
    monkeypatch.setitem(cifar.IMAGES, "train", 40)
    path = tmp_path / "cifar-100-python" / "train"
    published = cifar.SOURCES[100].parts["train"]
    with pytest.raises(DataFileError, match=f"MD5 is .* and not {published['train']}.*--data.verify false"):
        CIFARData(str(tmp_path)).make_reader("train")
    assert len(CIFARData(str(tmp_path), verify=False).make_reader("train")) == 40
    monkeypatch.setitem(published, "train", hashlib.md5(path.read_bytes()).hexdigest())
    assert len(CIFARData(str(tmp_path)).make_reader("train")) == 40
    content = bytearray(path.read_bytes())
    content[content.index(b"image_3.png") - 5000] ^= 1  # a pixel
    path.write_bytes(content)
    with pytest.raises(DataFileError, match="damaged or was changed"):
        CIFARData(str(tmp_path)).make_reader("train")


def _content(**changes: Any) -> dict[bytes, Any]:
    content = {"data": numpy.zeros((3, 3072), "uint8"), "fine_labels": [0, 1, 2], **changes}
    return {key.encode(): value for key, value in content.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "could not be read as a pickle of CIFAR"),
        (pickle.dumps(_content())[:500], "truncated, damaged or something else"),
        (b"GIF89a and so on", "could not be read as a pickle of CIFAR"),
        ([1, 2], "holds a list, but a dictionary"),
        ({b"labels": [1]}, r"has the entries \['labels'\]"),
        (_content(fine_labels=None), r"has the entries \['data'\]"),
        (_content(data=numpy.zeros((3, 784), "uint8")), r"'data' that is uint8 of shape \(3, 784\)"),
        (_content(data=numpy.zeros((3, 3072), "float32")), "'data' that is float32"),
        (_content(data=[1]), "'data' that is list"),
        (_content(fine_labels=[0, 1]), "3 images and 2 labels"),
        (_content(data=numpy.zeros((0, 3072), "uint8"), fine_labels=[]), "0 images and 0 labels"),
        (_content(fine_labels=[0, 1, 100]), "labels from 0 to 100, but 0 to 99"),
        (_content(fine_labels=[0, -1, 1]), "labels from -1 to 1"),
        (_content(fine_labels=[0.5, 1, 1]), "no list of numbers"),
        (_content(fine_labels=[0, 1, 2**70]), f"labels from 0 to {2**70}"),
        (_content(fine_labels=[0, 1, 10**5000]), "labels from 0 to a number of 16610 bits"),
        (_content(fine_labels=numpy.array(3)), "no list of numbers"),
        (_content(data=numpy.array([[None] * 3072])), "an array without bytes"),
    ],
)
def test_cifar_says_what_is_wrong_with_a_file(tmp_path: Path, content: Any, sentence: str) -> None:
    with pytest.raises(DataFileError, match=sentence) as caught:
        _cifar_with(tmp_path, content).make_reader("train")
    message = str(caught.value)
    assert str(tmp_path / "cifar-100-python" / "train") in message and "cifar-100-python.tar.gz" in message


def test_cifar_says_what_is_missing_and_when_files_are_small(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"train was not found, nor the archive cifar-100-python\.tar\.gz"):
        CIFARData(str(tmp_path)).setup("fit")
    with pytest.raises(FileNotFoundError):
        CIFARData(str(tmp_path / "nothing"), classes=10).setup("test")
    data_files.write_cifar100(tmp_path, train=12)
    with pytest.warns(UserWarning, match="hold 12 images, where the original has 50000"):
        CIFARData(str(tmp_path)).make_reader("train")


@few_images
def test_cifar_reflects_images_at_their_edges(tmp_path: Path) -> None:
    data_files.write_cifar100(tmp_path, train=40)
    data = CIFARData(str(tmp_path), batch_size=40, padding_mode="reflect")
    (batch,) = list(data.train_dataloader())
    images, _ = data.on_after_batch_transfer(batch)
    cropped = crop_and_flip(batch.images, batch.crops, 4, "reflect")
    assert torch.equal(images, normalise(cropped, torch.tensor(data.mean), torch.tensor(data.std)))
    assert not torch.equal(cropped, crop_and_flip(batch.images, batch.crops, 4))


@few_images
def test_cifar_can_hold_out_validation_images(tmp_path: Path) -> None:
    data_files.write_cifar100(tmp_path, train=40)
    parts = [CIFARData(str(tmp_path), validation_images=15, seed=seed) for seed in (0, 1)]
    readers = [(data.make_reader("train"), data.make_reader("validation")) for data in parts]
    for (train, validation), (other_train, other_validation) in [readers]:  # the same for both seeds
        assert torch.equal(train.images, other_train.images) and torch.equal(validation.images, other_validation.images)
    train, validation = readers[0]
    assert (len(train), len(validation)) == (25, 15)
    whole = CIFARData(str(tmp_path)).make_reader("train")
    assert sorted(train.labels.tolist() + validation.labels.tolist()) == sorted(whole.labels.tolist())
    everything = torch.cat([train.images, validation.images]).flatten(1)
    assert len(everything.unique(dim=0)) == len(whole)
    assert torch.equal(parts[0].make_reader("test").images, CIFARData(str(tmp_path)).make_reader("validation").images)
    with pytest.raises(ValueError, match="validation_images is 40, but there are only 40"):
        CIFARData(str(tmp_path), validation_images=40).make_reader("train")


@few_images
def test_cifar_keeps_the_fraction_that_scikit_learn_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    data_files.write_cifar100(tmp_path, train=800)
    whole = CIFARData(str(tmp_path)).make_reader("train")
    data = CIFARData(str(tmp_path), label_fraction=0.25, seed=3)
    split = selection.StratifiedShuffleSplit(n_splits=1, test_size=0.75, random_state=0)
    kept, _ = next(split.split(numpy.zeros(800), whole.labels.numpy()))
    train = data.make_reader("train")
    assert torch.equal(train.images, whole.images[sorted(kept)]) and torch.equal(
        train.labels, whole.labels[sorted(kept)]
    )
    assert torch.equal(train.labels.bincount(minlength=100), torch.full((100,), 2))
    assert len(data.make_reader("test")) == len(CIFARData(str(tmp_path)).make_reader("test"))
    with pytest.raises(ValueError, match=r"label_fraction is 0.1, but 800 images cannot be divided so"):
        CIFARData(str(tmp_path), label_fraction=0.1).make_reader("train")
    with pytest.raises(ValueError, match="label_fraction is 0, but a share"):
        CIFARData(str(tmp_path), label_fraction=0)
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        data.make_reader("train")


# --- STL-10 -----------------------------------------------------------------------------------------------------------


def test_stl10_reads_the_files_of_its_authors(tmp_path: Path) -> None:
    data_files.write_stl10(tmp_path)
    data = STL10Data(str(tmp_path), batch_size=6, workers=0)
    for part in ("train", "validation", "test"):
        reader = data.make_reader(part)  # type: ignore[arg-type]
        assert reader.labels.tolist() == [number % 10 for number in range(12)]  # type: ignore[attr-defined]
    ((images, targets),) = prepared(data, STL10Data(str(tmp_path), batch_size=12, workers=0).test_dataloader())  # type: ignore[arg-type]
    assert images.shape == (12, 3, 32, 32)
    brightness = (images[:, 1].mean((1, 2)) * 0.5 + 0.5) * 255
    assert (brightness - (9.5 + 20 * targets)).abs().max() < 1
    assert (images[:, 0, :15].mean() - images[:, 0, 17:].mean()) * 127.5 == pytest.approx(20, abs=0.5)
    batches = prepared(data, data.train_dataloader(), epoch=1)
    assert_same_batches(prepared(data, data.train_dataloader(), epoch=1), batches)
    assert batches[0][0].shape == (6, 3, 32, 32) and not torch.equal(
        batches[0][0], prepared(data, data.train_dataloader())[0][0]
    )
    (tmp_path / "stl10_binary" / "train_y.bin").write_bytes(b"\x01")
    with pytest.raises(
        DataFileError, match=r"331776 bytes of pixels and 1 labels for 'train', but 27648 bytes for each"
    ):
        data.make_reader("train")
    with pytest.raises(MissingDataError, match=r"stl10_binary/train_X.bin was not found. Download the binary files"):
        STL10Data(str(tmp_path / "elsewhere")).make_reader("train")


# --- image files ------------------------------------------------------------------------------------------------------


@few_images
@pytest.mark.parametrize(
    ("layout", "classes", "size"),
    [
        ("folders", None, 224),
        ("imagenet", 1000, 224),
        ("tiny_imagenet", 200, 32),
        ("cub200", 200, 224),
        ("mit67", 67, 224),
        ("stanford40", 40, 224),
        ("dogs", 120, 224),
    ],
)
def test_every_layout_gives_images_of_the_right_class(
    tmp_path: Path, layout: Any, classes: int | None, size: int
) -> None:
    name = {"folders": "image_folder", "imagenet": "image_folder"}.get(layout, layout)
    getattr(data_files, f"write_{name}")(tmp_path)
    data = ImageFolderData(str(tmp_path), layout=layout, workers=0, batch_size=4)
    assert data.num_classes == (classes or 3) and data.image_size == (size, size)
    for part in ("train", "validation", "test"):
        reader = data.make_reader(part)  # type: ignore[arg-type]
        assert set(reader.labels.tolist()) == {0, 1, 2}
        order = {}
        for row, label in enumerate(reader.labels.tolist()):
            # The writers give a class its brightness; TinyImageNet's classes are listed in falling order.
            written = 2 - label if layout == "tiny_imagenet" else label
            pixels = numpy.asarray(Image.open(reader.name(row)).convert("RGB"))
            order[label] = abs(pixels.mean() - (40 + 170 * written / 9))
        assert max(order.values()) < 4
    train, test = data.make_reader("train"), data.make_reader("test")
    assert not {train.name(row) for row in range(len(train))} & {test.name(row) for row in range(len(test))}
    (images, targets), *_ = prepared(data, data.train_dataloader())
    assert images.shape == (4, 3, size, size) and images.dtype == torch.float32 and targets.dtype == torch.int64
    assert 0.1 < images.std() and images.abs().max() < 4


@few_images
def test_tiny_imagenet_s_own_numbers(tmp_path: Path) -> None:
    data_files.write_tiny_imagenet(tmp_path)
    data = ImageFolderData(str(tmp_path), layout="tiny_imagenet", workers=0)
    assert (data.mean, data.std, data.resize) == ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821), 32)
    loader = data.val_dataloader()
    assert isinstance(loader, ImageLoader)
    (batch,) = list(loader)
    for row, image in enumerate(batch.images):
        with Image.open(data.make_reader("validation").name(row)) as file:
            wanted = numpy.asarray(file.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
        assert numpy.array_equal(image.permute(1, 2, 0).numpy(), wanted)


def test_files_give_the_same_batches_in_workers_and_after_a_resume(tmp_path: Path) -> None:
    data_files.write_image_folder(tmp_path, images=6)

    def loader(workers: int) -> tuple[ImageData, ImageLoader]:
        data = ImageFolderData(str(tmp_path), image_size=16, workers=workers, batch_size=4, mixup=0.2)
        return data, data.train_dataloader()

    wanted = prepared(*loader(0), epoch=3)
    data, workers = loader(2)
    got = prepared(data, workers, epoch=3)
    assert_same_batches(got, wanted)
    resumed_data, resumed = loader(2)
    resumed.load_state_dict({**workers.state_dict(), "position": 2})
    assert_same_batches(prepared(resumed_data, resumed, epoch=3), wanted[2:])
    for each in (data, resumed_data):
        each.teardown("fit")
    assert not torch.equal(prepared(*loader(0), epoch=4)[0][0], wanted[0][0])


@pytest.mark.parametrize("augmentation", ["padded_crop", "none"])
def test_other_augmentations_of_files(tmp_path: Path, augmentation: Any) -> None:
    data_files.write_image_folder(tmp_path, size=(32, 32), suffix=".png")
    data = ImageFolderData(
        str(tmp_path), image_size=32, resize=32, augmentation=augmentation, workers=0, batch_size=12, flip=1.0
    )
    (batch,) = list(data.train_dataloader())
    images, targets = data.on_after_batch_transfer(batch)
    reader = data.make_reader("train")
    rows = torch.randperm(12).tolist()
    stored = {label: [] for label in range(3)}  # type: ignore[var-annotated]
    for row in rows:
        stored[int(reader.labels[row])].append(numpy.asarray(Image.open(reader.name(row))))
    for image, label in zip(batch.images, targets.tolist(), strict=True):
        assert any(numpy.array_equal(image.permute(1, 2, 0).numpy(), each) for each in stored[label])
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    if augmentation == "none":
        assert batch.crops is None and torch.equal(images, normalise(batch.images, mean, std))
    else:
        assert batch.crops[:, 2].all() and batch.crops[:, :2].unique().numel() > 4
        assert torch.equal(images, normalise(crop_and_flip(batch.images, batch.crops, 4), mean, std))


def _damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"<html>not found</html>"}[how])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["cut", "empty", "text"])
def test_a_corrupt_image_is_named(tmp_path: Path, how: str, workers: int) -> None:
    data_files.write_image_folder(tmp_path)
    damaged = tmp_path / "train" / "class_1" / "2.jpg"
    _damage(damaged, how)
    data = ImageFolderData(str(tmp_path), image_size=16, workers=workers, batch_size=4)
    with pytest.raises(CorruptImageError, match="could not be decoded as an image") as caught:
        prepared(data, data.train_dataloader())
    assert str(damaged) in str(caught.value) and "Traceback" not in str(caught.value)
    data.teardown("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_can_be_skipped_and_are_counted_once_an_epoch(tmp_path: Path, workers: int) -> None:
    data_files.write_image_folder(tmp_path)
    for part in ("train", "val"):
        _damage(tmp_path / part / "class_1" / "3.jpg", "cut")
        _damage(tmp_path / part / "class_2" / "0.jpg", "empty")
    data = ImageFolderData(str(tmp_path), image_size=16, workers=workers, batch_size=4, on_corrupt="skip")
    loader = data.train_dataloader()
    for epoch in (0, 1):
        with pytest.warns(UserWarning, match=r"2 of 12 images could not be decoded .* replaced by") as caught:
            batches = prepared(data, loader, epoch)
        (warning,) = [each for each in caught if "decoded" in str(each.message)]
        assert str(Path("class_1") / "3.jpg") in str(warning.message)
        # Both are replaced by the first readable one after them, with its own class.
        labels = sorted(flat(targets.tolist() for _, targets in batches))
        assert labels == [0] * 4 + [1] * 3 + [2] * 5 and len(batches) == 3
    with pytest.warns(UserWarning, match="left out"):
        evaluated = prepared(data, data.val_dataloader())  # type: ignore[arg-type]
    assert sorted(flat(targets.tolist() for _, targets in evaluated)) == [0] * 4 + [1] * 3 + [2] * 3
    data.teardown("fit")


def test_a_machine_without_memory_is_not_a_corrupt_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_files.write_image_folder(tmp_path)
    data = ImageFolderData(str(tmp_path), image_size=16, workers=0, on_corrupt="skip", decoder="pil")
    loader = data.train_dataloader()

    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    with pytest.raises(MemoryError):
        next(iter(loader))


def test_when_no_image_is_readable(tmp_path: Path) -> None:
    data_files.write_image_folder(tmp_path, classes=1, images=2)
    for path in tmp_path.rglob("*.jpg"):
        _damage(path, "text")
    data = ImageFolderData(str(tmp_path), image_size=16, workers=0, on_corrupt="skip")
    with pytest.raises(CorruptImageError, match="None of the 2 images below"):
        prepared(data, data.train_dataloader())
    with pytest.raises(CorruptImageError, match="None of the 2 images of a batch"):
        prepared(data, data.val_dataloader())  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_image_is_an_error_even_when_corrupt_ones_are_skipped(tmp_path: Path, workers: int) -> None:
    data_files.write_image_folder(tmp_path)
    data = ImageFolderData(str(tmp_path), image_size=16, workers=workers, on_corrupt="skip")
    loader = data.train_dataloader()
    (tmp_path / "train" / "class_1" / "2.jpg").unlink()
    with pytest.raises(MissingDataError, match=r"2\.jpg is in the list of images but was not found"):
        list(loader)
    data.teardown("fit")


def _remove(*names: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _append(name: str, text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        with (root / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return change


@few_images
@pytest.mark.parametrize(
    ("layout", "change", "sentence"),
    [
        ("folders", _remove("train"), r"train is not a folder"),
        ("folders", _remove("val"), "neither a folder val nor test"),
        ("folders", _write("train/empty/readme.txt", b""), "empty has no image"),
        ("folders", _write("val/unknown/a.jpg", b""), "'unknown', which train has not"),
        ("folders", _remove("val/class_0", "val/class_1", "val/class_2"), "has no images in class folders"),
        ("tiny_imagenet", _remove("train"), "train is not a folder"),
        ("tiny_imagenet", _remove("val/val_annotations.txt"), r"val_annotations\.txt was not found"),
        ("tiny_imagenet", _append("val/val_annotations.txt", "a.JPEG n1\n"), "line 7, is 'a.JPEG n1', but 2 values"),
        ("tiny_imagenet", _append("val/val_annotations.txt", "a.JPEG\tn1\n"), "line 7, names the class 'n1'"),
        ("tiny_imagenet", _remove("val/images"), "the first image of the list, was not found"),
        ("cub200", _remove("train_test_split.txt"), r"train_test_split\.txt was not found"),
        ("cub200", _append("train_test_split.txt", "99 1\n"), "says 99 1"),
        ("cub200", _append("image_class_labels.txt", "99 zero\n"), "line 13, has the class 'zero'"),
        ("cub200", _write("images.txt", b"\xff\xfe\x00"), "is no text file"),
        ("mit67", _remove("TestImages.txt"), r"TestImages\.txt was not found"),
        ("mit67", _append("TestImages.txt", "\nother/a.jpg"), "line 7, names the class 'other'"),
        ("mit67", _write("TestImages.txt", b"\n"), "lists no images"),
        ("stanford40", _remove("ImageSplits"), "ImageSplits is not a folder"),
        ("stanford40", _remove("ImageSplits/doing_1_test.txt"), r"doing_1_test\.txt was not found"),
        ("dogs", _remove("test_list.mat"), r"test_list\.mat was not found"),
        ("dogs", _write("train_list.mat", b"nothing"), "could not be read as a list of Stanford Dogs"),
    ],
)
def test_what_is_wrong_with_a_tree_is_said(tmp_path: Path, layout: Any, change: Any, sentence: str) -> None:
    getattr(data_files, "write_image_folder" if layout == "folders" else f"write_{layout}")(tmp_path)
    change(tmp_path)
    data = ImageFolderData(str(tmp_path), layout=layout, workers=0)
    with pytest.raises(DataFileError, match=sentence) as caught:
        data.setup("fit")
    assert str(tmp_path) in str(caught.value)


def test_the_number_of_classes_is_checked(tmp_path: Path) -> None:
    data_files.write_image_folder(tmp_path)
    with pytest.raises(DataFileError, match="has 3 classes, but 2 were wanted; pass classes=3"):
        ImageFolderData(str(tmp_path), classes=2).setup("fit")
    with pytest.warns(UserWarning, match="has 3 classes, but 4 were wanted"):
        ImageFolderData(str(tmp_path), classes=4).setup("fit")
    assert ImageFolderData("no/such/folder", classes=4).num_classes == 4
    with pytest.raises(MissingDataError):
        _ = ImageFolderData("no/such/folder").num_classes


def test_folders_have_a_test_part_of_their_own_or_share_one(tmp_path: Path) -> None:
    data_files.write_image_folder(tmp_path, parts=("train", "val", "test"))

    def folder(part: Any) -> str:
        return Path(ImageFolderData(str(tmp_path)).make_reader(part).name(0)).relative_to(tmp_path).parts[0]

    assert folder("test") == "test" and folder("validation") == "val"
    shutil.rmtree(tmp_path / "val")
    assert folder("validation") == "test"


def test_grey_palette_and_four_channel_images_become_rgb(tmp_path: Path) -> None:
    data_files.write_image_folder(tmp_path, classes=1, images=1, parts=("train", "val"))
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.new(mode, (20, 20)).save(tmp_path / "val" / "class_0" / f"{mode.replace(';', '')}.{suffix}")
    data = ImageFolderData(str(tmp_path), image_size=16, workers=0)
    (batch,) = list(data.val_dataloader())  # type: ignore[arg-type]
    assert batch.images.shape == (7, 3, 16, 16)


# --- what lies in folders besides images ------------------------------------------------------------------------------


def _train_images(root: Path) -> list[str]:
    reader = ImageFolderData(str(root), workers=0).make_reader("train")
    return [str(Path(reader.name(row)).relative_to(root)) for row in range(len(reader))]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../val", "../../val/class_1/..", "../class_1", "../../.."])
def test_links_back_into_the_data_set_are_left_out(tmp_path: Path, target: str) -> None:
    """Neither an image twice nor one of another part."""
    root = data_files.write_image_folder(tmp_path / "data" / "set", images=1)
    wanted = _train_images(root)
    (root / "train" / "class_0" / "again").symlink_to(target)
    with pytest.warns(
        UserWarning, match=r"class_0/again is a link to .*, back into the data set, and is left out \(1 such"
    ):
        assert _train_images(root) == wanted
    assert len(wanted) == 3


def test_links_out_of_the_data_set_are_followed_once(tmp_path: Path) -> None:
    root = data_files.write_image_folder(tmp_path / "set", images=1)
    more = tmp_path / "more"
    data_files.write_image(more / "deep" / "b.jpg", 0, 5)
    (more / "deep" / "around").symlink_to("..")
    (more / "deep" / "back").symlink_to(root / "val")
    for name in ("x", "y"):
        (root / "train" / "class_0" / name).symlink_to(more)
    shutil.move(root / "train" / "class_1", tmp_path / "elsewhere")
    (root / "train" / "class_1").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"deep/back is a link .*\(1 such links"):
        found = _train_images(root)
    images = ["train/class_0/0.jpg", "train/class_0/x/deep/b.jpg", "train/class_1/0.jpg", "train/class_2/0.jpg"]
    assert found == images
    (root / "train" / "class_00").symlink_to("..")
    shutil.rmtree(root / "train" / "class_0")
    with pytest.raises(DataFileError, match=r"class_00 leads to .*set, which holds the images of all classes"):
        _train_images(root)


@pytest.mark.parametrize("folder", ["train", "train/class_1", "train/class_1/sub"])
def test_a_folder_that_cannot_be_read_is_a_sentence(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = data_files.write_image_folder(tmp_path)
    (root / "train" / "class_1" / "sub").mkdir()
    listed = os.scandir

    def scandir(path: Any) -> Any:  # permissions do not hold back the superuser, who may run this
        if str(path) == str(root / folder):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataFileError, match=rf"{folder} could not be listed \(Permission denied\)"):
        _train_images(root)


def _special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to({"device": "/dev/zero", "broken link": "nowhere", "itself": path.name}[kind])


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "broken link", "itself"])
def test_what_is_no_file_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where folders are listed and where a list names it, which must not wait for a pipe's other end."""
    root = data_files.write_image_folder(tmp_path / "set")
    monkeypatch.chdir(root / "train" / "class_1")  # the name of a socket is short
    _special(Path("a.jpg"), kind)
    with pytest.raises(DataFileError, match=r"class_1/a\.jpg has the name of an image but is no regular file"):
        _train_images(root)
    listed = data_files.write_tiny_imagenet(tmp_path / "listed")
    monkeypatch.chdir(listed / "val" / "images")
    Path("val_1.JPEG").unlink()
    _special(Path("val_1.JPEG"), kind)
    data = ImageFolderData(str(listed), layout="tiny_imagenet", workers=0, classes=3, on_corrupt="skip")
    with pytest.raises(DataFileError, match=r"val_1\.JPEG (is no regular file|is in the list|could not be read)"):
        list(data.val_dataloader())  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(tmp_path: Path, mode: str) -> None:
    """Pillow turns all values above 255 into white."""
    root = data_files.write_image_folder(tmp_path, classes=1, images=1)
    Image.new(mode, (20, 20)).save(tmp_path / "val" / "class_0" / f"a.{'png' if mode == 'I;16' else 'tif'}")
    data = ImageFolderData(str(root), image_size=16, workers=0, on_corrupt="skip")
    with pytest.raises(
        DataFileError, match=r"a\.(png|tif) is an image of mode (I|I;16|F), but one byte for each colour"
    ):
        list(data.val_dataloader())  # type: ignore[arg-type]


def test_torchvision_decodes_where_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_files.write_image_folder(tmp_path, size=(32, 32))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)  # found without its parent where it was imported before
    with pytest.raises(ImportError, match="decoder is 'torchvision', but it could not decode"):
        ImageFolderData(str(tmp_path), decoder="torchvision").setup("fit")

    decoded: list[int] = []

    def decode_image(data: Tensor, mode: str) -> Tensor:
        if len(data) == 3:
            raise RuntimeError("unsupported")
        image = Image.open(io.BytesIO(data.numpy().tobytes())).convert(mode)
        decoded.append(len(data))
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)

    module = types.ModuleType("torchvision.io")
    module.decode_image = decode_image  # type: ignore[attr-defined]
    module.read_file = lambda path: torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)  # type: ignore[attr-defined]
    module.ImageReadMode = types.SimpleNamespace(RGB="RGB")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.io", module)
    batches = {}
    for decoder in ("auto", "torchvision", "pil"):
        decoded.clear()
        data = ImageFolderData(str(tmp_path), image_size=16, workers=0, decoder=decoder)
        batches[decoder] = prepared(data, data.train_dataloader())
        assert len(decoded) == (0 if decoder == "pil" else 13)  # and one to see whether it works
    assert_same_batches(batches["auto"], batches["pil"])
    with monkeypatch.context() as patch:  # as pictures of 16 bits come; PIL makes them bytes
        patch.setattr(module, "decode_image", lambda data, mode: torch.zeros(3, 32, 32, dtype=torch.uint16))
        data = ImageFolderData(str(tmp_path), image_size=16, workers=0, decoder="auto")
        assert_same_batches(prepared(data, data.train_dataloader()), batches["pil"])
    (tmp_path / "train" / "class_0" / "0.jpg").write_bytes(b"abc")
    with pytest.raises(CorruptImageError):  # by PIL, which is asked where torchvision cannot
        prepared(data, data.train_dataloader())


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_the_example() -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import digits as example
    finally:
        sys.path.pop(0)
    split = example.load_split()
    for seed in (0, 3):
        data = DigitsData(labels_per_class=7, seed=seed)
        training, validation = example.draw_training_images(split, 7, seed)
        for part, rows in (("train", training), ("validation", validation), ("test", split.test)):
            reader = data.make_reader(part)  # type: ignore[arg-type]
            assert reader is not None and torch.equal(reader.labels, split.labels[rows])
            images = normalise(reader.images, torch.tensor(data.mean), torch.tensor(data.std), 16.0)
            assert torch.allclose(images, split.images[rows], rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(1)
    shifted = example.shift_images(split.images[:30], generator)
    offsets = torch.randint(0, 5, (2, 30, 1), generator=torch.Generator().manual_seed(1))
    crops = torch.cat([offsets[0], offsets[1], torch.zeros(30, 1, dtype=torch.int64)], 1)
    background = split.images.amin()
    assert torch.equal(crop_and_flip(split.images[:30] - background, crops, 2) + background, shifted)


def test_digits_options() -> None:
    data = DigitsData(labels_per_class=40, as_rgb=True, largest_shift=0, batch_size=64)
    assert data.val_dataloader() == [] and data.channels == 3 and len(data.mean) == 3
    batches = prepared(data, data.train_dataloader())
    assert [len(targets) for _, targets in batches] == [64] * 6 + [16] and batches[0][0].shape == (64, 3, 16, 16)
    assert torch.equal(batches[0][0][:, 0], batches[0][0][:, 2])
    pixels = torch.cat([images for images, _ in batches])[:, 0]
    assert abs(pixels.mean()) < 1e-4 and abs(pixels.std() - 1) < 1e-4
    held = DigitsData(evaluate_on="test")
    assert len(held.make_reader("validation") or ()) == len(held.make_reader("test") or ()) == 1397
    assert DigitsData(image_side=24).image_size == (24, 24)
    assert len(DigitsData(labels_per_class=10).make_reader("validation") or ()) == 300


# --- arguments, Lightning, configuration files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0, but it must be at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size is 2.5 of type float"),
        ({"evaluation_batch_size": 0}, ValueError, "evaluation_batch_size is 0"),
        ({"seed": -1}, ValueError, "seed is -1, but it must be between 0 and 4294967295"),
        ({"seed": 2**32}, ValueError, "seed is 4294967296"),
        ({"mixup": -0.1}, ValueError, "mixup is -0.1"),
        ({"cutmix": math.nan}, ValueError, "cutmix is nan"),
        ({"mixup": 0.2, "cutmix": 1.0}, ValueError, "one batch takes one of them"),
        (
            {"mixup": 0.2, "crop_each_view": True},
            ValueError,
            "crop_each_view is set with mixup 0.2 and cutmix 0.0, but",
        ),
        ({"workers": -2}, ValueError, "workers is -2"),
        ({"padding": -1}, ValueError, "padding is -1"),
        ({"flip": 1.5}, ValueError, "flip is 1.5"),
        ({"mean": (0.5, 0.5)}, ValueError, "mean is .*3 finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "positive numbers"),
    ],
)
def test_bad_arguments_are_sentences(arguments: dict[str, Any], error: type[Exception], sentence: str) -> None:
    for module in (CIFARData, ImageFolderData):
        with pytest.raises(error, match=sentence):
            module(**arguments)


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (CIFARData, {"classes": 20}, "classes is 20, but CIFAR has 10 or 100"),
        (ImageFolderData, {"layout": "voc"}, "layout is 'voc', but one of 'folders'"),
        (ImageFolderData, {"image_size": 64, "resize": 32}, "resize is 32, but it must be at least 64"),
        (ImageFolderData, {"scale": (0.5, 1.5)}, "scale is .* at most 1.0"),
        (ImageFolderData, {"ratio": (2.0, 1.0)}, "ratio is"),
        (ImageFolderData, {"on_corrupt": "ignore"}, "on_corrupt is 'ignore'"),
        (ImageFolderData, {"augmentation": "crop"}, "augmentation is 'crop'"),
        (ImageFolderData, {"decoder": "turbo"}, "decoder is 'turbo'"),
        (
            ImageFolderData,
            {"crop_each_view": True},
            "augmentation is 'resized_crop', but views are cropped apart on the",
        ),
        (DigitsData, {"labels_per_class": 41}, "labels_per_class is 41, but it must be between 1 and 40"),
        (DigitsData, {"image_side": 4}, "image_side is 4"),
        (DigitsData, {"evaluate_on": "train"}, "evaluate_on is 'train'"),
    ],
)
def test_bad_arguments_of_one_module(module: type[ImageData], arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        module(**arguments)


def test_too_few_images_for_a_whole_batch() -> None:
    with pytest.raises(ValueError, match="not enough for one batch"):
        DigitsData(batch_size=128, drop_last=True).train_dataloader()


def test_a_configuration_file_reaches_every_argument() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    for module, extra in (
        (CIFARData, {"root": "x", "classes": 10, "mean": [0.5, 0.5, 0.5]}),
        (ImageFolderData, {"root": "x", "layout": "dogs", "scale": [0.5, 1.0], "workers": 3}),
        (DigitsData, {"labels_per_class": 3, "as_rgb": True}),
    ):
        init = {**extra, "batch_size": 7, "seed": 3, "mixup": 0.5, "drop_last": True, "evaluation_batch_size": 9}
        config = parser.parse_object(
            {"data": {"class_path": f"{module.__module__}.{module.__name__}", "init_args": init}}
        )
        data = parser.instantiate(config).data
        assert type(data) is module and (data.batch_size, data.seed, data.mixup, data.drop_last) == (7, 3, 0.5, True)
        assert data.evaluation_batch_size == 9
    with pytest.raises(jsonargparse.ArgumentError):
        wrong = {"class_path": "frskd_fast.training.data.CIFARData", "init_args": {"no_such_argument": 1}}
        parser.parse_object({"data": wrong})


class _Net(LightningModule):
    """Writes down what each step received, and fails in the step after `stop_after` of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after
        torch.manual_seed(0)
        self.layer = nn.Linear(256, 10)
        self.received: list[tuple[int, Tensor, Any]] = []
        self.evaluated: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(self.received) == self.stop_after:
            raise RuntimeError("power is gone")
        images, targets = batch
        self.received.append((self.current_epoch, images.clone(), targets))
        return F.cross_entropy(self.layer(images.flatten(1)), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def _trainer(folder: Path, **arguments: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "max_epochs": 3, **arguments},
    )


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize(("workers", "steps"), [(0, 3), (2, 3), (0, 4), (0, 5)])
def test_lightning_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, workers: int, steps: int) -> None:
    def data() -> DigitsData:
        return DigitsData(batch_size=26, workers=workers)  # 4 steps an epoch

    whole = _Net()
    _trainer(tmp_path).fit(whole, datamodule=data())
    assert len(whole.received) == 12
    rest_of_pool = torch.cat(whole.evaluated[-12:])
    assert len(rest_of_pool) == 300

    first = _Net(stop_after=steps)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(RuntimeError, match="power is gone"):
        _trainer(tmp_path, callbacks=[saving], enable_checkpointing=True).fit(first, datamodule=data())
    second = _Net()
    _trainer(tmp_path).fit(second, datamodule=data(), ckpt_path=tmp_path / f"step={steps}.ckpt", weights_only=True)
    got = first.received + second.received
    assert len(first.received) == steps and len(got) == 12
    for ours, wanted in zip(got, whole.received, strict=True):
        assert ours[0] == wanted[0] and torch.equal(ours[1], wanted[1]) and torch.equal(ours[2], wanted[2])
    assert torch.equal(second.layer.weight, whole.layer.weight)


@pytest.mark.usefixtures("_quiet")
def test_lightning_limits_overfits_and_converts(tmp_path: Path) -> None:
    net = _Net()
    _trainer(tmp_path, limit_train_batches=2, limit_val_batches=1).fit(net, datamodule=DigitsData(batch_size=30))
    assert [epoch for epoch, _, _ in net.received] == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(net.received[0][1], net.received[2][1])
    net = _Net()
    _trainer(tmp_path, overfit_batches=1, max_epochs=2).fit(net, datamodule=DigitsData(batch_size=30))
    assert torch.equal(net.received[0][2], net.received[1][2]) and len(net.received) == 2
    net = _Net()
    _trainer(tmp_path, max_steps=1, precision="64-true").fit(net, datamodule=DigitsData(batch_size=30))
    assert net.received[0][1].dtype == torch.float64 and net.received[0][2].dtype == torch.int64


def _new_children(before: set[Any]) -> list[Any]:
    return [process for process in set(multiprocessing.active_children()) - before if process.is_alive()]


@pytest.mark.usefixtures("_quiet")
def test_workers_end_with_the_training(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    _trainer(tmp_path, max_epochs=1).fit(_Net(), datamodule=DigitsData(workers=1))
    assert not _new_children(before)


def test_workers_end_though_the_traceback_of_an_error_is_kept(tmp_path: Path) -> None:
    data_files.write_image_folder(tmp_path)
    _damage(tmp_path / "train" / "class_1" / "2.jpg", "empty")
    data = ImageFolderData(str(tmp_path), image_size=16, workers=1, batch_size=4)
    before = set(multiprocessing.active_children())
    with pytest.raises(CorruptImageError) as caught:
        prepared(data, data.train_dataloader())
    assert caught.tb is not None and len(_new_children(before)) == 1
    data.teardown("fit")
    assert not _new_children(before)


# --- stem -------------------------------------------------------------------------------------------------------------


def test_small_images_and_an_imagenet_stem_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="leaves 8 x 8 of them for the first stage") as caught:
        assert warn_if_stem_mismatch(resnet18(num_classes=5), (32, 32))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_if_stem_mismatch(resnet18(num_classes=5), (224, 224))
        assert not warn_if_stem_mismatch(wrn16x2(num_classes=5), (32, 32))
        assert not warn_if_stem_mismatch(cifarresnet18(num_classes=5), (32, 32))
        network = wrn16x2(num_classes=5).train()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        assert stem_stride(network, (16, 16)) == 1 and network.training
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        with torch.device("meta"):
            network = cifarresnet18(num_classes=5)
        assert stem_stride(network, (32, 32)) == 1


def test_images_too_small_for_the_network_are_a_sentence() -> None:
    class Deep(nn.Module):
        def forward(self, images: Tensor) -> Any:
            maps = nn.functional.avg_pool2d(images, 16)
            return [maps, nn.functional.avg_pool2d(maps, 2)], images.flatten(1)

    assert stem_stride(Deep(), (32, 32)) == 16
    with pytest.raises(ValueError, match=r"backbone \(Deep\) does not accept images of 3 x 16 x 16 \(.*; take larger"):
        warn_if_stem_mismatch(Deep(), (16, 16))
