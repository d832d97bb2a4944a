"""What all data modules have in common: the contract with the trainer, loaders, preparation of batches on the device."""

from __future__ import annotations

import math
import os
import weakref
from abc import abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from .augmentation import crop_and_flip, crop_views, normalise
from .loader import ImageBatch, ImageLoader, Reader, distributed_share

Part = Literal["train", "validation", "test"]
MOST_WORKERS = 8  # that "as many as there are cores" starts


class ImageData(LightningDataModule):
    """x = (pixels / scale - mean) / std, cropped and flipped at random in training: batches for classification.

    The contract with a trainer:

    * `num_classes`, `image_size` (H, W), `channels`, `mean` and `std` are there after construction; the disk is read by
      `setup` (or the first loader).
    * Pixels travel to the device as bytes. `on_after_batch_transfer` crops, flips, normalises and mixes there, so that
      a training step receives `(images, targets)`: images float32 (N, C, H, W), with `crop_each_view` (4N, C, H, W), and
      targets int64 (N,), or
      `(targets, targets_b, lam)` with mixup or cutmix. Validation, test and prediction receive `(images, targets)`
      with targets int64 (N,).
    * After `hand_out_keys()` a training step receives `(images, targets, keys)`: one number for each image and each way in
      which it may look, on the host, under which something may be kept about these pixels.
    * Every random choice of training is a function of (seed, epoch, position of the batch, rank) and of nothing else:
      no global generator, no number of workers. The training loader has `set_epoch`, `state_dict` and
      `load_state_dict`, which Lightning calls, and continues an interrupted epoch with the next batch.
    * Several processes share each batch of one process that is as many times larger: rank r takes rows r :: world of
      it, with the same crops and flips. Mixup and cutmix pair images within a process, with numbers of its own.

    Args:
        batch_size: images of one process in a training step.
        evaluation_batch_size: the same in validation, test and prediction; None is `batch_size`.
        seed: of order, augmentation and mixing, 0 <= seed < 2^32.
        mixup: both parameters of the Beta distribution of mixup; 0 turns it off. The paper's value: 0.2.
        cutmix: the same for cutmix; 0 turns it off. The paper's value: 1.0.
        crop_each_view: hand out four rotations of each training image, (4N, C, H, W) in the order of
            `frskd_fast.mixing.rotate4`, each with a random crop of its own and a flip that the four share (`crop_views`), for
            a task whose `views` are "rotations". Without it such a task turns images that are cropped already.
        workers: processes that read and decode; 0 reads in the main process, -1 takes one for each core that a process
            of the training may use, at most 8.
        drop_last: leave out the last training batch of an epoch when it is smaller than the others.
        pin_memory: page-locked batches, for asynchronous copies to a GPU; None where there is a GPU.
        persistent_workers: keep the workers between epochs.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Source: the augmentations are those of FRSKD's released classification code.
    """

    num_classes: int
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # What subclasses may set besides: the pixel value of full brightness, and the padding (`padded`) of the crop on the device.
    pixel_scale: float = 255.0
    padding: int = 0
    padding_mode: str = "constant"

    def __init__(
        self,
        batch_size: int = 128,
        evaluation_batch_size: int | None = None,
        seed: int = 10,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        crop_each_view: bool = False,
        workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
    ) -> None:
        super().__init__()
        self.batch_size = whole_number(batch_size, "batch_size", 1)
        self.evaluation_batch_size = (
            self.batch_size
            if evaluation_batch_size is None
            else whole_number(evaluation_batch_size, "evaluation_batch_size", 1)
        )
        self.seed = whole_number(seed, "seed", 0, 2**32 - 1)
        self.mixup = _concentration(mixup, "mixup")
        self.cutmix = _concentration(cutmix, "cutmix")
        if self.mixup and self.cutmix:
            raise ValueError(
                f"mixup is {self.mixup} and cutmix is {self.cutmix}, but one batch takes one of them; set the other to 0."
            )
        self.crop_each_view = bool(crop_each_view)
        if self.crop_each_view and (self.mixup or self.cutmix):
            raise ValueError(
                f"crop_each_view is set with mixup {self.mixup} and cutmix {self.cutmix}, but views that are cropped apart "
                "do not match the mixed labels pixel by pixel; set both to 0, or crop_each_view to false."
            )
        self.workers = whole_number(workers, "workers", -1)
        self.drop_last = bool(drop_last)
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else bool(pin_memory)
        self.persistent_workers = bool(persistent_workers)
        self._readers: dict[Part, Reader | None] = {}
        self._loaders: weakref.WeakSet[ImageLoader] = weakref.WeakSet()  # only to end their workers
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.hands_out_keys = False

    @abstractmethod
    def make_reader(self, part: Part) -> Reader | None:
        """Read one part of the data set from disk; None where it has no such part."""

    def reader(self, part: Part) -> Reader | None:
        """The reader of one part, made once."""
        if part not in self._readers:
            self._readers[part] = self.make_reader(part)
        return self._readers[part]

    def setup(self, stage: str) -> None:
        """Read what `stage` needs: "fit", "validate", "test" or "predict"."""
        parts: dict[str, tuple[Part, ...]] = {"fit": ("train", "validation"), "validate": ("validation",)}
        for part in parts.get(stage, ("test",)):
            self.reader(part)

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        for loader in self._loaders:
            loader.close()

    def train_dataloader(self) -> ImageLoader:
        """The training images in the random order of the epoch, resumable."""
        reader = self.reader("train")
        assert reader is not None
        # overfit_batches wants the same batches in each epoch
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        loader = self._loader(reader, self.batch_size, training=True, shuffle=shuffle, drop_last=self.drop_last)
        if not len(loader):
            raise ValueError(
                f"batch_size is {self.batch_size} on {self.share()[1]} processes and drop_last is set, but there are only "
                f"{len(reader)} training images, not enough for one batch; take a smaller batch_size."
            )
        return loader

    def val_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """The validation images in a fixed order; an empty list where there are none, which Lightning skips."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """The test images in a fixed order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """The test images in a fixed order."""
        return self._evaluation_loader("test")

    def __getstate__(self) -> dict[str, Any]:
        """What travels to a spawned process: everything but the loaders of this one."""
        return {name: value for name, value in self.__dict__.items() if name != "_loaders"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _loaders=weakref.WeakSet())

    def share(self) -> tuple[int, int]:
        """(rank, world) among the processes that divide the data: the trainer's, else those of `torch.distributed`."""
        distributed = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        if distributed is None:
            return distributed_share()
        return distributed["rank"], distributed["num_replicas"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """(images, targets) as a step takes them, made on the device of `batch`; what is no `ImageBatch` stays as it is."""
        if not isinstance(batch, ImageBatch):
            return batch
        images, targets = batch.images, batch.targets
        if batch.crops is not None:
            crop = crop_views if batch.crops.dim() == 3 else crop_and_flip
            images = crop(images, batch.crops, self.padding, self.padding_mode)
        images = normalise(images, *self._statistics_on(images.device), self.pixel_scale)
        prepared: Any = images, targets
        if batch.mixing_seed is not None and (self.mixup or self.cutmix):
            from frskd_fast.mixing import cutmix, mixup

            generator = torch.Generator().manual_seed(batch.mixing_seed)
            if self.mixup:
                prepared = mixup(images, targets, self.mixup, generator)
            else:
                prepared = cutmix(images, targets, self.cutmix, generator)
        if self.trainer is not None:
            # Lightning converted the batch to the trainer's precision before it was normalised.
            prepared = self.trainer.precision_plugin.convert_input(prepared)
        if self.hands_out_keys and batch.mixing_seed is not None:  # in training
            if batch.keys is None:
                raise ValueError(
                    f"{type(self.reader('train')).__name__} was asked for keys, but its batch has none; let its read() give "
                    "the ImageBatch keys (keys_of), or its looks be 0."
                )
            return (*prepared, batch.keys)
        return prepared

    def hand_out_keys(self) -> tuple[int, dict[str, Any]]:
        """From now on training batches are `(images, targets, keys)`, keys int64 (N,) of NumPy, while `hands_out_keys` is true.

        Returns:
            The number of keys, and what decides the pixels that a key stands for, as values of JSON.

        Raises:
            ValueError: where training images are random beyond a flip, so that none comes a second time.
        """
        if type(self).on_after_batch_transfer is not ImageData.on_after_batch_transfer:
            raise ValueError(
                f"{type(self).__name__} prepares batches by an on_after_batch_transfer of its own, which may change images at "
                "random, so nothing can be kept about them; define hand_out_keys beside it if it does not."
            )
        reader = self.reader("train")
        assert reader is not None
        mixed = [name for name in ("mixup", "cutmix") if getattr(self, name)]
        if mixed or not reader.looks:
            what = f"mixes images ({mixed[0]})" if mixed else "crops training images at random"
            raise ValueError(
                f"{type(self).__name__} {what}, so no image comes a second time and nothing can be kept about it; set mixup "
                "and cutmix to 0 and turn the random crop off (data.padding, largest_shift or augmentation; a flip may stay)."
            )
        self.hands_out_keys = True
        decisive = ("image_size", "channels", "mean", "std", "pixel_scale")
        settings = {name: getattr(self, name) for name in decisive}
        return reader.looks * len(reader), {"images": reader.fingerprint(), "looks": reader.looks, **settings}

    def _statistics_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._statistics:
            mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device=device)
            self._statistics[device] = mean, std
        return self._statistics[device]

    def _evaluation_loader(self, part: Part) -> ImageLoader | list[ImageLoader]:
        reader = self.reader(part)
        return [] if reader is None else self._loader(reader, self.evaluation_batch_size)

    def _loader(self, reader: Reader, batch_size: int, **arguments: bool) -> ImageLoader:
        loader = ImageLoader(
            reader,
            batch_size=batch_size,
            seed=self.seed,
            workers=self._worker_count(),
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers,
            share=self.share,
            **arguments,
        )
        self._loaders.add(loader)
        return loader

    def _worker_count(self) -> int:
        if self.workers >= 0:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = 1 if self.trainer is None else self.trainer.num_devices
        return max(1, min(MOST_WORKERS, cores // processes))


def whole_number(value: Any, name: str, least: int, most: int | None = None) -> int:
    """The value as an int, or an error that says what was wanted."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, but a whole number was wanted.")
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} is {value}, but it must be {wanted}.")
    return value


def probability(value: Any, name: str) -> float:
    """The value as a float in [0, 1], or an error that says what was wanted."""
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} is {value!r}, but a probability in [0, 1] was wanted.")
    return float(value)


def colour_statistics(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation, one number for each channel, or an error that says what was wanted."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} is {values!r}, but {channels} finite numbers were wanted, one for each channel.")
    if min(std) <= 0:
        raise ValueError(f"std is {std!r}, but images are divided by it: positive numbers were wanted.")
    return tuple(map(float, mean)), tuple(map(float, std))


def _concentration(value: Any, name: str) -> float:
    if not 0.0 <= float(value) < math.inf:
        raise ValueError(f"{name} is {value!r}, but a finite number was wanted: 0 for none, else the Beta parameter.")
    return float(value)
