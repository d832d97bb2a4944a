"""Batches in an order, and with random numbers, that depend on the seed, the epoch and the position alone."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import numpy.typing
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .errors import DataFileError
from .streams import Purpose, stream, stream_seed

NAMED_FILES = 5  # of those that a warning about corrupt images counts


class ImageBatch(NamedTuple):
    """What travels from a loader to the device: raw pixels, and the random numbers with which they are augmented there.

    Attributes:
        images: (N, C, H, W), uint8 (digits: float32), not normalised.
        targets: int64 (N,), or masks uint8 (N, H, W).
        crops: int64 (N, 3) for `crop_and_flip`, (N, 4, 3) for `crop_views`, with masks (N, 8) for `resample_images`; None
            where the images are augmented already, or not at all.
        mixing_seed: seed of the generator of mixup and cutmix; None outside training.
        keys: int64 (N,), on the host: which training image this is, see `Reader.looks`; None where nobody knows.
    """

    images: Tensor
    targets: Tensor
    crops: Tensor | None
    mixing_seed: int | None
    keys: numpy.typing.NDArray[numpy.int64] | None = None


class Request(NamedTuple):
    """Everything that a process needs to make one batch.

    Attributes:
        rows: row numbers of the images in the data set, (n,).
        seed, epoch, batch: name the stream of random numbers.
        rank, world: which process this is and of how many; image i of this batch is image i * world + rank of the batch
            that all processes make together.
        training: whether to augment.
    """

    rows: numpy.typing.NDArray[numpy.int64]
    seed: int
    epoch: int
    batch: int
    rank: int
    world: int
    training: bool

    def draw(self, function: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """The rows of `function(count, generator)` that belong to this process, drawn for all processes' images."""
        generator = stream(self.seed, Purpose.AUGMENTATION, self.epoch, self.batch)
        return function(len(self.rows) * self.world, generator)[self.rank :: self.world]

    def mixing_seed(self) -> int | None:
        """The seed of this process's mixup or cutmix of this batch; None outside training."""
        if not self.training:
            return None
        return stream_seed(self.seed, Purpose.MIXING, self.epoch, self.batch, self.rank)


class Reader(Dataset[Any]):
    """A data set that makes whole batches: `reader[request] -> (ImageBatch, rows of corrupt images)`.

    It is copied into worker processes, keeps no state and draws every random number from the request, so it does not
    matter which process makes which batch. An error of a file is returned, not raised, for the main process to raise it
    without the trace of a worker.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, request: Request) -> tuple[ImageBatch, tuple[int, ...]]:
        """The batch that is asked for, and the rows of the images that could not be decoded."""

    @property
    def looks(self) -> int:
        """V, the number of ways in which training may show an image: 1, 2 with flips, 0 where there are endlessly many.

        Then the keys of a batch are V * row, + 1 where the image is flipped: each names one array of pixels.
        """
        return 0

    def fingerprint(self) -> str:
        """SHA-256 of what decides the pixels of each row, before augmentation."""
        raise NotImplementedError(f"{type(self).__name__} does not say which images it has; define fingerprint().")

    def name(self, row: int) -> str:
        """How a message calls the image of this row."""
        return f"image {row}"

    def __getitem__(self, request: Request) -> tuple[ImageBatch, tuple[int, ...]] | DataFileError:
        try:
            return self.read(request)
        except DataFileError as error:
            return error


class _Requests(Sampler[Request]):
    """The requests of the epoch that its loader is about to start."""

    def __init__(self, loader: ImageLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Request]:
        loader = self.loader
        # Bound here and not when the first request is made: the loader may have gone on to another epoch by then.
        return loader._requests(loader._epoch, loader._start)

    def __len__(self) -> int:
        return len(self.loader)


def _unchanged(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """Let a worker live on when its process group is told to end: the main process needs it until it has saved.

    Clusters and terminals signal the whole group. A SIGTERM of the main process ends a worker, and so does its end.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also in threads that are started later
        main = multiprocessing.parent_process()
        assert main is not None and main.pid is not None
        threading.Thread(target=_end_when_told_by, args=(main.pid, os.getppid()), daemon=True).start()


def _end_when_told_by(main: int, parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main and os.getppid() == parent:
        pass
    os._exit(0)


class ImageLoader:
    """Batch b of epoch e holds the rows order_e[rank :: world][b * B : (b + 1) * B] of the data set.

    order_e is a permutation drawn from the stream of (seed, e), or 0, 1, 2, ... without `shuffle`. So the processes share
    the images that one process would take with batches of B * world, and augment them alike. No random number
    depends on the global generators, on the number of workers or on earlier batches. That makes the loader resumable:
    `state_dict()` is a few numbers, and after `load_state_dict` the next batch is the one after the last that was
    *consumed*, whatever the workers had prefetched; skipped batches are not decoded.

    In training the last batch of the epoch is smaller on all processes alike (its images are completed with the first of
    the order until every process has as many), or dropped. In evaluation every image is seen exactly once, by one
    process; all processes see the same number of batches, whose last one may hold one image more than B.

    Args:
        reader: makes the batches.
        batch_size: B >= 1, images of one process.
        seed: 0 <= seed < 2^32.
        training: whether images are augmented.
        shuffle: whether the order is random.
        drop_last: leave out the last batch of an epoch when it is smaller than the others.
        workers: processes that make batches; 0 makes them in this process.
        pin_memory: copy batches into page-locked memory, which the way to a GPU needs to be asynchronous.
        persistent_workers: keep the workers between epochs.
        share: gives (rank, world) of this process when an epoch begins; None asks `torch.distributed`.

    Raises:
        DataFileError: while iterating, when a file cannot be read.

    Example:
        >>> import torch
        >>> from frskd_fast.training.data import ArrayReader, ImageLoader
        >>> reader = ArrayReader(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.arange(10))
        >>> loader = ImageLoader(reader, batch_size=4, seed=10, training=True, shuffle=True)
        >>> loader.set_epoch(3)
        >>> targets = []
        >>> for batch in loader:
        ...     targets.append(batch.targets)
        ...     if len(targets) == 1:
        ...         state = loader.state_dict()
        >>> resumed = ImageLoader(reader, batch_size=4, seed=10, training=True, shuffle=True)
        >>> resumed.load_state_dict(state)
        >>> all(torch.equal(batch.targets, wanted) for batch, wanted in zip(resumed, targets[1:], strict=True))
        True
    """

    def __init__(
        self,
        reader: Reader,
        *,
        batch_size: int,
        seed: int,
        training: bool = False,
        shuffle: bool = False,
        drop_last: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = True,
        share: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self.reader = reader
        self.batch_size = batch_size
        self.seed = seed
        self.training = training
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.workers = workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.share = share or distributed_share
        self._loader: DataLoader[Any] | None = None
        self._iterations = 0
        self._epoch = 0
        self.corrupt: set[int] = set()  # rows that the current iteration found not to be images
        self._start = 0  # the batch at which the next iteration begins
        self._position = 0  # batches of the current epoch that were consumed
        # Lightning calls `set_epoch` of `loader.sampler` at the start of each epoch.
        self.sampler = self
        self.batch_sampler = None  # which Lightning reads of loaders that have a sampler

    def __len__(self) -> int:
        """Batches of one process in a whole epoch, also after a resume."""
        count, world = len(self.reader), self.share()[1]
        if self.drop_last:
            return count // (self.batch_size * world)
        if self.training:
            return -(-count // (self.batch_size * world))
        if count < world:
            raise ValueError(
                f"The data set to evaluate has {count} images, fewer than the {world} processes; each needs at least "
                "one, so evaluate with fewer processes."
            )
        return -(-(count // world) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; another epoch than the current one begins with its first batch."""
        if epoch != self._epoch:
            self._epoch, self._start, self._position = int(epoch), 0, 0

    def state_dict(self) -> dict[str, int]:
        """Where training stands, in plain numbers: epoch, batches consumed, and what the order depends on."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self.seed,
            "images": len(self.reader),
            "images_per_step": self.batch_size * self.share()[1],
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last consumed batch of the state's epoch.

        With another batch size or number of processes the epoch continues after the images that were seen, rounded
        down to whole batches; a warning says so.

        Raises:
            ValueError: when the state belongs to another seed or another number of images.
        """
        for name, ours in (("seed", self.seed), ("images", len(self.reader))):
            if state[name] != ours:
                raise ValueError(
                    f"The saved state of the loader has {name} = {state[name]}, but this loader has {ours}, so its order "
                    "of images is another one; resume with the same data and seed, or start a new run."
                )
        position, together = state["position"], self.batch_size * self.share()[1]
        if state["images_per_step"] != together:
            seen = position * state["images_per_step"]
            position = seen // together
            warnings.warn(
                f"The saved state was made with {state['images_per_step']} images a step over all processes, this run has "
                f"{together}. The epoch continues at image {position * together} of its order ({seen} were seen); the "
                "steps from here on are not those of an uninterrupted run.",
                stacklevel=2,
            )
        self._epoch = state["epoch"]
        self._start = self._position = position

    def __iter__(self) -> Iterator[ImageBatch]:
        # A generator: nothing starts before the first batch is asked for, because Lightning makes iterators that it
        # does not use, and chooses the epoch after it has made the first.
        return self._batches()

    def close(self) -> None:
        """End the worker processes; another iteration starts new ones."""
        self._loader = None

    def _batches(self) -> Iterator[ImageBatch]:
        self._iterations += 1
        iteration = self._iterations
        corrupt = self.corrupt = set()
        try:
            # The iterator has no name: the traceback of an error keeps this frame, which must not keep the workers.
            for result in self._begin():
                if isinstance(result, DataFileError):
                    raise result
                batch, corrupt_rows = result
                corrupt.update(corrupt_rows)
                self._position += 1
                yield batch
                if iteration != self._iterations:
                    raise RuntimeError(
                        "This iterator of an ImageLoader was overtaken by a newer one of the same loader; use one "
                        "iterator at a time, or make a second loader."
                    )
        finally:
            if corrupt:
                self._warn_of_corrupt_images(corrupt)

    def _begin(self) -> Iterator[Any]:
        """Start the batches from where `set_epoch` or `load_state_dict` left off; the iteration after is a whole one."""
        if self._loader is None:
            self._loader = self._make_loader()
        results = iter(self._loader)  # takes the requests, more than once with workers
        self._position, self._start = self._start, 0
        return results

    def _make_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self.reader,
            batch_size=None,
            sampler=_Requests(self),
            num_workers=self.workers,
            collate_fn=_unchanged,
            worker_init_fn=_outlive_signals,
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers and self.workers > 0,
            # Without its own generator a DataLoader draws from the global one at the start of each epoch.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _requests(self, epoch: int, start: int) -> Iterator[Request]:
        rank, world = self.share()
        count, size = len(self.reader), self.batch_size
        if self.shuffle:
            order = torch.randperm(count, generator=stream(self.seed, Purpose.ORDER, epoch)).numpy()
        else:
            order = numpy.arange(count)
        if self.training and not self.drop_last and count % world:
            # resize repeats the order as often as it takes, should there be fewer images than processes
            order = numpy.resize(order, count + -count % world)
        own, batches = order[rank::world], len(self)
        for batch in range(start, batches):
            # In evaluation some processes have one image more than others, which the last batch takes in: a batch of
            # its own would leave the others waiting in a collective operation.
            end = (batch + 1) * size if self.training or batch + 1 < batches else len(own)
            yield Request(own[batch * size : end], self.seed, epoch, batch, rank, world, self.training)

    def _warn_of_corrupt_images(self, rows: set[int]) -> None:
        names = [self.reader.name(row) for row in sorted(rows)[:NAMED_FILES]]
        more = f" and {len(rows) - NAMED_FILES} more" if len(rows) > NAMED_FILES else ""
        instead = "replaced by the next readable ones" if self.training else "left out"
        warnings.warn(
            f"{len(rows)} of {len(self.reader)} images could not be decoded in this epoch and were {instead}: "
            f"{', '.join(names)}{more}. Repair or remove these files.",
            stacklevel=2,
        )


def distributed_share() -> tuple[int, int]:
    """(rank, world size) of the default process group, (0, 1) without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class ArrayReader(Reader):
    """Images that are in memory: batch = images[rows], with the numbers for a padded crop and a flip on the device.

    Args:
        images: (N, C, H, W), uint8 or float32.
        labels: int64 (N,).
        padding: pixels of the random crop, or 0 for none.
        flip: probability of a horizontal flip.
        crop_each_view: four rotations of each image, each cropped by itself.

    Example:
        >>> import torch
        >>> from frskd_fast.training.data import ArrayReader, ImageLoader
        >>> reader = ArrayReader(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([5, 6, 7]))
        >>> next(iter(ImageLoader(reader, batch_size=2, seed=0))).targets
        tensor([5, 6])
    """

    def __init__(
        self, images: Tensor, labels: Tensor, padding: int = 0, flip: float = 0.0, crop_each_view: bool = False
    ) -> None:
        self.images, self.labels = images, labels
        self.padding, self.flip, self.crop_each_view = padding, flip, crop_each_view

    def __len__(self) -> int:
        return len(self.images)

    @property
    def looks(self) -> int:
        return 0 if self.padding else 2 if self.flip else 1

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.images.dtype} {tuple(self.images.shape)}".encode())
        for chunk in self.images.split(1024):  # a view, perhaps, that is larger than its memory
            digest.update(chunk.contiguous().numpy().data)
        return digest.hexdigest()

    def read(self, request: Request) -> tuple[ImageBatch, tuple[int, ...]]:
        rows = torch.from_numpy(request.rows)
        crops = draw_crops_for(request, self.padding, self.flip, self.crop_each_view)
        keys = keys_of(self.looks, request.rows, crops)
        return ImageBatch(self.images[rows], self.labels[rows], crops, request.mixing_seed(), keys), ()


def keys_of(
    looks: int, rows: numpy.typing.NDArray[numpy.int64], crops: Tensor | None
) -> numpy.typing.NDArray[numpy.int64] | None:
    """The keys of `Reader.looks` of the images in these rows, None where they have none."""
    if not looks:
        return None
    keys = looks * numpy.asarray(rows)
    # The flip is the third number, of a row for each image or of one for each of its views, which share it.
    return keys if crops is None else keys + crops.flatten(1)[:, 2].numpy()


def draw_crops_for(request: Request, padding: int, flip: float, crop_each_view: bool = False) -> Tensor | None:
    """The crops and flips of a request, None where nothing is to be done."""
    from .augmentation import draw_crops, draw_view_crops

    if not request.training or not (padding or flip or crop_each_view):
        return None
    draw = draw_view_crops if crop_each_view else draw_crops
    return request.draw(lambda count, generator: draw(count, padding, flip, generator))
