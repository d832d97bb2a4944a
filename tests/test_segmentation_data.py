"""Images with masks: windows against Pillow, digit scenes, VOC's folders, folders of masks, and what is wrong with them."""

from __future__ import annotations

import pickle
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

pytest.importorskip("lightning")

from frskd_fast.training.data import DigitScenesData, ImageBatch, ImageLoader, SegmentationData
from frskd_fast.training.data.mask_augmentation import (
    draw_pairs,
    resample_images,
    resample_masks,
    training_window,
    whole_window,
)

Pixels = numpy.typing.NDArray[numpy.uint8]


def noise(*shape: int, high: int = 256) -> Pixels:
    made = torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return made.to(torch.uint8).numpy()


def pillow(pixels: Pixels, mask: Pixels, window: list[int], size: tuple[int, int], pad: int) -> tuple[Pixels, Pixels]:
    """The steps of the original, one after the other."""
    _, _, height, width, top, left, flipped, radius = window
    image, labels = Image.fromarray(pixels), Image.fromarray(mask)
    if flipped:
        image, labels = (picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in (image, labels))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    labels = labels.resize((width, height), Image.Resampling.NEAREST)
    canvas = max(width, size[1]), max(height, size[0])
    padded, padded_labels = Image.new("RGB", canvas), Image.new("L", canvas, pad)
    padded.paste(image, (0, 0))
    padded_labels.paste(labels, (0, 0))
    box = left, top, left + size[1], top + size[0]
    image, labels = padded.crop(box), padded_labels.crop(box)
    if radius:
        image = image.filter(ImageFilter.GaussianBlur(radius / 1e6))
    return numpy.asarray(image), numpy.asarray(labels)


def epochs(data: SegmentationData, *numbers: int) -> list[tuple[Tensor, Tensor]]:
    """What the steps of these epochs receive."""
    loader = data.train_dataloader()
    batches = []
    for number in numbers:
        loader.set_epoch(number)
        batches += [data.on_after_batch_transfer(batch) for batch in loader]
    data.teardown("fit")
    return batches


def assert_same(ours: list[tuple[Tensor, Tensor]], wanted: list[tuple[Tensor, Tensor]]) -> None:
    assert len(ours) == len(wanted)
    for (images, masks), (wanted_images, wanted_masks) in zip(ours, wanted, strict=True):
        assert torch.equal(images, wanted_images) and torch.equal(masks, wanted_masks)


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_windows_are_those_of_pillow_step_by_step() -> None:
    generator = torch.Generator().manual_seed(7)
    size, pad = (40, 52), 255
    sides = [(37, 60), (60, 37), (48, 48), (80, 31), (29, 90), (64, 51)]
    canvas, canvas_masks = noise(24, 96, 96, 3), noise(24, 96, 96)  # what lies beside an image must not matter
    windows, wanted = [], []
    for number, row in enumerate(draw_pairs(24, generator).tolist()):
        height, width = sides[number % len(sides)]
        window = training_window(height, width, row, size, short_side=(24, 90))
        pixels, mask = canvas[number, :height, :width], canvas_masks[number, :height, :width]
        windows.append(window if number < 20 else whole_window(height, width, size))
        wanted.append(pillow(pixels, mask, windows[-1], size, pad))
    given = torch.tensor(windows)
    images = resample_images(torch.from_numpy(canvas).permute(0, 3, 1, 2), given, size)
    masks = resample_masks(torch.from_numpy(canvas_masks), given, size, pad)
    assert images.dtype == torch.float32 and images.is_contiguous() and masks.dtype == torch.int64
    compared = 0
    for number, (image, mask) in enumerate(wanted):
        difference = images[number].permute(1, 2, 0).numpy() - image
        # Pillow rounds after each direction of the scaling (halves up), and cuts off after each of the six boxes of the blur.
        blurred = windows[number][7] > 0
        assert abs(difference).max() < (4 if blurred else 1.01) and abs(difference.mean()) < (2 if blurred else 0.2)
        # Where a tie decides which pixel is the nearest, Pillow's rounding errors do.
        places = [
            (2 * (start + torch.arange(count)) + 1) * side % (2 * scaled) == 0
            for start, count, side, scaled in zip(
                *(windows[number][4:6], size), *(windows[number][:2], windows[number][2:4]), strict=True
            )
        ]
        tie = places[0][:, None] | places[1]
        assert torch.equal(masks[number][~tie], torch.from_numpy(mask.astype(numpy.int64))[~tie])
        compared += int((~tie).sum())
    assert compared > 0.8 * masks.numel()
    assert {0, 1} == set(given[:, 6].tolist()) and (masks == pad).any()
    # a window that changes nothing gives the same bits
    plain = torch.from_numpy(canvas).permute(0, 3, 1, 2)
    identity = torch.tensor([[96, 96, 96, 96, 0, 0, 0, 0]]).expand(24, 8)
    assert torch.equal(resample_images(plain, identity, (96, 96)), plain.float())
    assert torch.equal(
        resample_masks(torch.from_numpy(canvas_masks), identity, (96, 96)), torch.from_numpy(canvas_masks).long()
    )


def test_windows_have_the_distribution_of_the_original() -> None:
    rows = draw_pairs(20_000, torch.Generator().manual_seed(1)).tolist()
    windows = torch.tensor([training_window(375, 500, row, (512, 512)) for row in rows]).double()
    _, _, height, width, top, left, flipped, radius = windows.unbind(1)
    assert height.min() == 256 and height.max() == 1024 and abs(height.mean() - 640) < 7
    assert torch.equal(width, (500 * height / 375).floor())
    # four standard deviations of a share of 1/2
    assert abs(flipped.mean() - 0.5) < 0.015 and abs((radius > 0).double().mean() - 0.5) < 0.015
    assert radius.max() <= 1e6 and abs(radius[radius > 0].mean() - 5e5) < 1.2e4
    for start, side in ((top, height), (left, width)):
        room = (side - 512).clamp(min=0)
        assert (start <= room).all() and (start == room)[room == 0].all()
        share = (start + 0.5) / (room + 1)
        assert abs(share[room > 50].mean() - 0.5) < 0.011 and (start == room)[(room > 0) & (room < 9)].any()
    first = draw_pairs(3, torch.Generator().manual_seed(1)).tolist()
    assert first == rows[:3], "the numbers of an image do not depend on how many there are"
    assert training_window(7, 1, rows[0], (4, 4), short_side=(1, 1))[2:4] == [7, 1]


# --- digit scenes -----------------------------------------------------------------------------------------------------


def scenes(**arguments: Any) -> DigitScenesData:
    return DigitScenesData(**{"training_scenes": 10, "evaluation_scenes": 6, "batch_size": 4, **arguments})


def test_digit_scenes_are_a_function_of_the_seed() -> None:
    pytest.importorskip("sklearn")
    data = scenes(seed=3)
    assert data.num_classes == len(data.class_names or ()) == 11 and data.image_size == (96, 96)
    before = torch.random.get_rng_state()
    wanted = epochs(data, 0, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    images, masks = wanted[0]
    assert images.shape == (4, 3, 96, 96) and images.dtype == torch.float32
    assert masks.shape == (4, 96, 96) and masks.dtype == torch.int64
    assert_same(epochs(scenes(seed=3, workers=2), 0, 1), wanted)
    other = epochs(scenes(seed=4), 0)
    assert not torch.equal(other[0][0], images) and not torch.equal(wanted[3][0], images)
    train, validation, test = (data.reader(part) for part in ("train", "validation", "test"))  # type: ignore[arg-type]
    for reader in (train, validation, test):
        assert set(numpy.unique(reader.masks)) <= set(range(11)) and len(numpy.unique(reader.masks)) > 8  # type: ignore[union-attr]
    # fixed for all seeds, and shown as they are
    assert_same(
        [data.on_after_batch_transfer(batch) for batch in data.val_dataloader()],
        [data.on_after_batch_transfer(batch) for batch in scenes(seed=4).val_dataloader()],
    )
    (images, masks), _ = (data.on_after_batch_transfer(batch) for batch in data.test_dataloader())
    assert torch.equal(masks.byte(), torch.from_numpy(test.masks[:4]))  # type: ignore[union-attr]
    assert torch.equal(
        (images * 0.25 + 0.5).mul(255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(test.images[:4])
    )  # type: ignore[union-attr]
    assert not numpy.array_equal(validation.images, test.images)  # type: ignore[union-attr]
    tested = scenes(evaluate_on="test")
    assert numpy.array_equal(tested.reader("validation").images, test.images)  # type: ignore[union-attr]


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_epoch_of_pairs_goes_on(stop: int) -> None:
    pytest.importorskip("sklearn")
    wanted = epochs(scenes(), 2)
    data = scenes()
    loader = data.train_dataloader()
    loader.set_epoch(2)
    iterator = iter(loader)
    for _ in range(stop):
        next(iterator)
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    resumed = pickle.loads(pickle.dumps(scenes()))
    loader = resumed.train_dataloader()
    loader.load_state_dict(state)
    assert_same([resumed.on_after_batch_transfer(batch) for batch in loader], wanted[stop:])


def test_pairs_of_two_processes_make_the_joint_batch() -> None:
    pytest.importorskip("sklearn")
    reader = scenes(batch_size=8).reader("train")
    assert reader is not None

    def batches(size: int, rank: int, world: int) -> list[ImageBatch]:
        loader = ImageLoader(reader, batch_size=size, seed=10, training=True, shuffle=True, share=lambda: (rank, world))
        return list(loader)

    joint = batches(4, 0, 1)[:2]
    for rank in (0, 1):
        for own, both in zip(batches(2, rank, 2), joint, strict=False):
            assert own.crops is not None and both.crops is not None
            assert torch.equal(own.images, both.images[rank::2]) and torch.equal(own.targets, both.targets[rank::2])
            assert torch.equal(own.crops, both.crops[rank::2])
