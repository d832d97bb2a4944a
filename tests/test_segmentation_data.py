"""Images with masks: windows against Pillow, digit scenes, VOC's folders, folders of masks, and what is wrong with them."""

from __future__ import annotations

import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

pytest.importorskip("lightning")

from frskd_fast.training.data import (
    CorruptImageError,
    DataFileError,
    DigitScenesData,
    ImageBatch,
    ImageData,
    ImageLoader,
    MaskFolderData,
    MissingDataError,
    SegmentationData,
    VOCData,
)
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


def test_transforms_of_torchvision_take_the_place_of_the_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")

    class TVImage(Tensor):
        """Stands in for torchvision's class."""

    class TVMask(Tensor):
        """Stands in for torchvision's class."""

    tensors = types.SimpleNamespace(
        Image=lambda image: image.as_subclass(TVImage), Mask=lambda mask: mask.as_subclass(TVMask)
    )
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(tv_tensors=tensors))

    def crop(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(image, TVImage) and isinstance(mask, TVMask) and mask.shape == image.shape[1:] == (96, 96)
        top, left = torch.randint(65, (2,)).tolist()
        return image[:, top : top + 32, left : left + 32], mask[top : top + 32, left : left + 32]

    def data(**arguments: Any) -> DigitScenesData:
        return scenes(crop_size=32, mean=(0.0,) * 3, std=(1.0,) * 3, transforms=crop, **arguments)

    before = torch.random.get_rng_state()
    wanted = epochs(data(), 0, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same(epochs(data(workers=1), 0, 1), wanted)
    images, masks = wanted[0]
    assert type(images) is type(masks) is Tensor and masks.dtype == torch.int64 and masks.shape == (4, 32, 32)
    whole = data().reader("train").images  # type: ignore[union-attr]
    views = torch.from_numpy(whole).unfold(1, 32, 1).unfold(2, 32, 1)  # every window of every scene
    first = (255 * images[0]).round().byte()
    assert (views == first).flatten(3).all(3).any()
    (images, masks), *_ = (data().on_after_batch_transfer(batch) for batch in data().val_dataloader())
    assert images.shape == (4, 3, 32, 32), "evaluation stretches whole images"
    for wrong in (lambda image, mask: (image, mask), lambda image, mask: (image[:, :32, :32] / 255, mask[:32, :32])):
        with pytest.raises(ValueError, match=r"transforms made of image \d a torch.* but uint8 of shape \(3, 32, 32\)"):
            epochs(scenes(crop_size=32, transforms=wrong), 0)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    plain = scenes(crop_size=96, transforms=lambda image, mask: (image.flip(2), mask.flip(1)))
    assert epochs(plain, 0)[0][0].shape == (4, 3, 96, 96)


# --- files ------------------------------------------------------------------------------------------------------------


def write_pair(image: Path, mask: Path, number: int, classes: int = 21) -> None:
    """Grey of the image's number, whose size depends on it, and a mask with a palette and a border of 255."""
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    size = 30 + number % 5, 24 + number % 3
    Image.new("RGB", size, (number, number, number)).save(image, quality=100)
    picture = Image.new("P", size, number % classes)
    picture.putpalette([value % 256 for value in range(3, 3 * 257)])
    picture.paste(255, (0, 0, size[0], 1))
    picture.save(mask)


def write_voc(folder: Path, year: str, lists: dict[str, list[str]]) -> None:
    root = folder / f"VOC{year}"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    for name, images in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(images) + "\n")
        for image in images:
            number = int(image[-6:])
            write_pair(root / "JPEGImages" / f"{image}.jpg", root / "SegmentationClass" / f"{image}.png", number)


LISTS_2007 = {"trainval": ["000032", "000033", "000039"]}
LISTS_2012 = {"trainval": ["2007_000032", "2007_000068", "2008_000002"]}
TEST_2007 = {"test": ["000068"]}
few_images = pytest.mark.filterwarnings("ignore:.*intact but holds")


@pytest.mark.parametrize("layout", ["one", "devkit", "side by side"])
@few_images
def test_voc_reads_the_folders_of_its_archives(tmp_path: Path, layout: str) -> None:
    side_by_side = layout == "side by side"
    write_voc(tmp_path / ("a/VOCdevkit" if side_by_side else "VOCdevkit"), "2007", LISTS_2007)
    write_voc(tmp_path / ("b/VOCdevkit" if side_by_side else "VOCdevkit"), "2007", TEST_2007)
    write_voc(tmp_path / ("c/VOCdevkit" if side_by_side else "VOCdevkit"), "2012", LISTS_2012)
    root = str(tmp_path / "VOCdevkit" if layout == "devkit" else tmp_path)
    small = {"crop_size": 20, "short_side": (16, 28), "workers": 0, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    data = VOCData(root, batch_size=4, **small)
    assert data.num_classes == len(data.class_names or ()) == 21
    names = [Path(data.reader("train").name(row)).stem for row in range(6)]  # type: ignore[union-attr]
    assert names == LISTS_2007["trainval"] + LISTS_2012["trainval"]
    ((images, masks),) = epochs(data, 0)  # the incomplete batch is dropped
    assert images.shape == (4, 3, 20, 20) and masks.shape == (4, 20, 20)
    assert_same(epochs(VOCData(root, batch_size=4, **{**small, "workers": 1}), 0), [(images, masks)])
    for image, mask in zip(images, masks, strict=True):
        inside = (mask != 0) & (mask != 255)
        (number,) = mask[inside].unique().tolist()
        # the image belongs to its mask, but for the blurred edge of the padding
        grey = (255 * image[:, inside]).quantile(0.9).round().item()
        assert grey % 21 == number
    assert (data.val_dataloader().reader is data.test_dataloader().reader) and len(data.test_dataloader().reader) == 1  # type: ignore[union-attr]
    ((images, masks),) = (data.on_after_batch_transfer(batch) for batch in data.test_dataloader())
    assert masks.unique().tolist() == [68 % 21, 255] and (images * 255).round().unique().tolist() == [68]
    held_out = VOCData(root, leave_out_test_images=True, **small).reader("train")
    assert [Path(held_out.name(row)).stem for row in range(len(held_out))] == [*names[:4], names[5]]  # type: ignore[union-attr, arg-type]


def test_voc_says_what_is_missing_and_when_lists_are_short(tmp_path: Path) -> None:
    with pytest.raises(
        MissingDataError, match=r"VOC2007/ImageSets/Segmentation/trainval.txt .* Download VOCtrainval_06-Nov"
    ):
        VOCData(str(tmp_path)).reader("train")
    write_voc(tmp_path, "2007", {**LISTS_2007, "test": []})
    with (
        pytest.raises(MissingDataError, match=r"Download VOCtrainval_11-May-2012.tar from http"),
        pytest.warns(UserWarning),
    ):
        VOCData(str(tmp_path)).reader("train")
    with pytest.raises(DataFileError, match=r"lists no images; unpack VOCtest_06-Nov-2007.tar again"):
        VOCData(str(tmp_path)).reader("test")
    write_voc(tmp_path, "2012", LISTS_2012)
    with pytest.warns(UserWarning, match=r"holds 3 images, where the original has (422|2913)"):
        VOCData(str(tmp_path)).reader("train")
    (tmp_path / "VOC2007" / "SegmentationClass" / "000032.png").unlink()
    with pytest.raises(MissingDataError, match=r"000032.png, of the first pair"), pytest.warns(UserWarning):
        VOCData(str(tmp_path)).reader("train")


def write_folder(root: Path) -> Path:
    for part, count in (("train", 5), ("val", 2)):
        for number in range(count):
            write_pair(root / part / "images" / f"{number}.jpg", root / part / "masks" / f"{number}.png", number, 3)
    return root


def folder_data(root: Path, **arguments: Any) -> MaskFolderData:
    return MaskFolderData(
        str(root), **{"classes": 3, "crop_size": 16, "short_side": (12, 20), "workers": 0, **arguments}
    )


def test_a_folder_of_masks(tmp_path: Path) -> None:
    data = folder_data(write_folder(tmp_path), classes=["field", "road", "house"], batch_size=3)
    assert data.num_classes == 3 and data.class_names == ("field", "road", "house")
    assert [len(masks) for _, masks in epochs(data, 0)] == [3, 2]
    grey = tmp_path / "val" / "masks" / "1.png"
    Image.fromarray(numpy.asarray(Image.open(grey))).save(grey)  # the same indices without a palette
    for loader in (data.val_dataloader(), data.test_dataloader()):
        ((_, masks),) = (data.on_after_batch_transfer(batch) for batch in loader)
        assert [sorted(mask.unique().tolist()) for mask in masks] == [[0, 255], [1, 255]]
    padded = folder_data(tmp_path, pad_label=255, short_side=(8, 8), batch_size=5)
    ((_, masks),) = epochs(padded, 0)
    assert (masks[:, 8:] == 255).all()
    empty = numpy.full((24, 30), 255, dtype=numpy.uint8)
    Image.fromarray(empty).save(tmp_path / "val" / "masks" / "0.png")  # a mask without a label is one
    assert len(list(data.val_dataloader())) == 1


def rewrite(root: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    path = root / "train" / "masks" / "2.png"
    change(Image.open(path)).save(path)


def deep(root: Path, kind: str) -> None:
    for path in (root / "train" / kind).glob("2.*"):
        path.unlink()
    Image.fromarray(noise(26, 32).astype(numpy.uint16)).save(root / "train" / kind / "2.png")


def torn(root: Path) -> None:
    path = root / "train" / "masks" / "2.png"
    path.write_bytes(path.read_bytes()[:-40])


def jpeg(root: Path) -> None:
    path = root / "train" / "masks" / "2.png"
    Image.open(path).convert("L").save(path.with_suffix(".jpg"))
    path.unlink()


def again(root: Path) -> None:
    Image.new("RGB", (9, 9)).save(root / "train" / "images" / "2.png")


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "colours": (lambda root: rewrite(root, lambda mask: mask.convert("RGB")), DataFileError, r"2.png has the mode RGB, but a"),
    "16 bits": (lambda root: deep(root, "masks"), DataFileError, r"masks/2.png has the mode I;16, but a mask with one byte"),
    "size": (lambda root: rewrite(root, lambda mask: mask.resize((9, 8))), DataFileError, r"9 x 8 pixels .*2.jpg 32 x 26; a"),
    "labels": (lambda root: rewrite(root, lambda mask: mask.point(lambda label: label + 5)), DataFileError, r"labels 7, but"),
    "greys": (lambda root: rewrite(root, lambda mask: mask.convert("L")), DataFileError, r"labels .* and not colours or grey"),
    "torn": (torn, CorruptImageError, r"masks/2.png could not be decoded as an image"),
    "jpeg": (jpeg, DataFileError, r"masks/2.jpg is a JPEG file, which changes the labels"),
    "deep image": (lambda root: deep(root, "images"), DataFileError, r"images/2.png is an image of mode I;16, but one byte"),
    "no mask": (lambda root: (root / "train/masks/2.png").unlink(), MissingDataError, r"2.jpg has no mask: .*masks/2\.\*"),
    "no image": (lambda root: (root / "train/images/2.jpg").unlink(), MissingDataError, r"masks/2.png has no image"),
    "no masks": (lambda root: (root / "train/masks").rename(root / "labels"), MissingDataError, r"masks is not a folder"),
    "no part": (lambda root: (root / "train").rename(root / "a"), MissingDataError, r"train is not a folder. train/images/N"),
    "twice": (again, DataFileError, r"2.png have the same name"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_wrong_with_a_pair_is_said(tmp_path: Path, what: str) -> None:
    damage, error, sentence = DAMAGE[what]
    damage(write_folder(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=sentence):
        epochs(folder_data(tmp_path, batch_size=2), 0)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_pipe_among_images_or_masks_is_refused(tmp_path: Path, kind: str) -> None:
    """It is not waited for, whether the folder is listed or a list names it."""
    pipe = write_folder(tmp_path) / "train" / kind / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(DataFileError, match=rf"{kind}/pipe\.png has the name of an image but is no regular file"):
        folder_data(tmp_path).reader("train")
    pipe.unlink()
    write_voc(tmp_path / "VOCdevkit", "2007", {"test": ["000001", "000002"]})
    (pipe,) = (tmp_path / "VOCdevkit" / "VOC2007").glob(
        f"{dict(images='JPEGImages', masks='SegmentationClass')[kind]}/000002.*"
    )
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.warns(UserWarning), pytest.raises(DataFileError, match=r"000002\.(jpg|png) is no regular file"):
        list(VOCData(str(tmp_path), workers=0).test_dataloader())


def test_a_folder_of_masks_that_cannot_be_read_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)

    def scandir(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataFileError, match=r"train/images could not be listed \(Permission denied\)"):
        folder_data(tmp_path).reader("train")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mixup": 0.2}, "mixup is 0.2, but MaskFolderData has a mask"),
        ({"crop_each_view": True}, "crop_each_view is True"),
        ({"crop_size": (1, 2, 3)}, "crop_size is .* but a whole number or two"),
        ({"short_side": (20, 10)}, "short_side is 10, but it must be at least 20"),
        ({"pad_label": 7}, r"pad_label is 7, but one of the 3 classes or ignore_index \(255\)"),
        ({"ignore_index": 0}, "ignore_index is 0, which is one of the 3 classes"),
        ({"classes": 0}, "classes is 0, but it must be between 1 and 255"),
    ],
)
def test_bad_arguments_of_masks_are_sentences(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        folder_data(Path("x"), **arguments)
    with pytest.raises(ValueError, match="at random, so no image comes a second time"):
        folder_data(Path("x")).hand_out_keys()
    with pytest.raises(ValueError, match="evaluate_on is 'train'"):
        scenes(evaluate_on="train")


def test_a_configuration_file_reaches_the_arguments_of_masks() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    common = {"crop_size": [32, 64], "short_side": [10, 20], "batch_size": 7, "seed": 3, "pad_label": 255, "workers": 2}
    for module, extra in (
        (VOCData, {"root": "x", "drop_last": False}),
        (MaskFolderData, {"root": "x", "classes": ["a", "b"]}),
        (DigitScenesData, {"training_scenes": 9, "mean": [0.0, 0.0, 0.0]}),
    ):
        path = f"{module.__module__}.{module.__name__}"
        config = parser.parse_object({"data": {"class_path": path, "init_args": {**common, **extra}}})
        data = parser.instantiate(config).data
        assert type(data) is module and data.image_size == (32, 64) and data.short_side == (10, 20)
        assert (data.batch_size, data.seed, data.pad_label, data.workers) == (7, 3, 255, 2)


@pytest.mark.gpu
def test_windows_are_the_same_on_a_device() -> None:
    rows = draw_pairs(8, torch.Generator().manual_seed(1)).tolist()
    windows = torch.tensor([training_window(50, 60, row, (40, 40), short_side=(20, 80)) for row in rows])
    images, masks = torch.from_numpy(noise(8, 3, 50, 60)), torch.from_numpy(noise(8, 50, 60))
    wanted = resample_images(images, windows, (40, 40)), resample_masks(masks, windows, (40, 40))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = resample_images(images.cuda(), windows.cuda(), (40, 40))
    torch.testing.assert_close(got.cpu(), wanted[0], rtol=0, atol=1e-3)
    assert torch.equal(resample_masks(masks.cuda(), windows.cuda(), (40, 40)).cpu(), wanted[1])
