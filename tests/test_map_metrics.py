"""Metrics of maps: the original's numbers, whatever the batches and the processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("lightning")

from golden_utils import load_golden

from frskd_fast.tasks import Task
from frskd_fast.training.evaluation import EvaluationOfMaps, evaluation_for, fraction_of_pixels, resized

CLASSES = 21


def scores_of(predictions: torch.Tensor) -> torch.Tensor:
    """Maps (N, K, H, W) whose largest class is the given one."""
    return torch.nn.functional.one_hot(predictions.long(), CLASSES).permute(0, 3, 1, 2).double()


def test_numbers_of_the_original() -> None:
    """A class that is nowhere is left out, one that is only predicted counts as 0, pixels of no class do not count."""
    case = load_golden("seg_miou")
    evaluation = EvaluationOfMaps(CLASSES)
    evaluation.name_classes([f"class {number}" for number in range(CLASSES)])
    for maps, targets in zip(scores_of(case["predictions"]).split(2), case["targets"].long().split(2), strict=True):
        evaluation.update(maps, targets)
    found = evaluation.compute()
    torch.testing.assert_close(evaluation.confusion.compute().double(), case["confusion_matrix"])
    for name, wanted in (("miou", "mean_iou"), ("pixel_accuracy", "pixel_accuracy")):
        torch.testing.assert_close(found[name], case[wanted], rtol=1e-12, atol=0)
    iou = torch.stack([found[f"iou_class_{number}"] for number in range(CLASSES)])
    torch.testing.assert_close(iou, case["iou"], rtol=1e-12, atol=0, equal_nan=True)
    assert iou[5].isnan() and iou[9] == 0


def test_processes_together_count_every_pixel_once() -> None:
    case = load_golden("seg_miou")
    maps, targets = scores_of(case["predictions"]), case["targets"].long()
    whole, first, second = (EvaluationOfMaps(CLASSES) for _ in range(3))
    losses = [one.update(maps[part], targets[part]) for one, part in
              ((whole, slice(0, 3)), (first, slice(0, 1)), (second, slice(1, 3)))]  # fmt: skip
    # As torchmetrics reduces states over processes.
    reduce = first.confusion._reductions["counts"]
    first.confusion.counts = reduce(torch.stack([first.confusion.counts, second.confusion.counts]))
    assert {name: value.item() for name, value in first.compute().items() if not value.isnan()} == {
        name: value.item() for name, value in whole.compute().items() if not value.isnan()
    }
    torch.testing.assert_close(losses[0], (losses[1] + 2 * losses[2]) / 3)


class Watching(TorchDispatchMode):
    """Keeps the names of the operations that run and the size of the largest tensor that one returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.names.add(func.overloadpacket.__name__)
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_larger_than_an_image_s_maps_is_made_and_nothing_read(deterministic: bool) -> None:
    torch.manual_seed(0)
    maps, targets = torch.randn(2, CLASSES, 4, 4), torch.randint(CLASSES + 2, (2, 16, 16))
    evaluation = EvaluationOfMaps(CLASSES)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with Watching() as watching:
            evaluation.update(maps, targets)
    finally:
        torch.use_deterministic_algorithms(False)
    assert watching.largest == CLASSES * 16 * 16
    # What waits for a device: reading a number, and operations whose result has a size that depends on values.
    assert not watching.names & {"_local_scalar_dense", "bincount", "nonzero", "masked_select", "unique"}
    predicted = evaluation.prediction(maps, (16, 16))["mask"]
    wanted = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    for target, prediction in zip(targets.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if target < CLASSES:
            wanted[target, prediction] += 1
    assert torch.equal(evaluation.confusion.compute(), wanted)


def test_maps_are_compared_at_the_size_of_the_targets() -> None:
    torch.manual_seed(0)
    maps, targets = torch.randn(2, 5, 4, 6), torch.randint(7, (2, 9, 12))
    targets[1] = 255
    evaluation = EvaluationOfMaps(5)
    loss = evaluation.update(maps, targets)
    large = torch.nn.functional.interpolate(maps, size=(9, 12), mode="bilinear", align_corners=False)
    labels = torch.where(targets < 5, targets, -100)
    expected = torch.nn.functional.cross_entropy(large[:1], labels[:1])  # the second has no pixel that counts
    torch.testing.assert_close(loss, expected / 2)
    right = (large.argmax(1) == labels).sum() / (labels >= 0).sum()
    torch.testing.assert_close(evaluation.compute()["pixel_accuracy"], right.double())
    assert torch.equal(evaluation.prediction(maps, (9, 12))["mask"], resized(maps, (9, 12)).argmax(1))
    evaluation.reset()
    evaluation.update(maps[1:], targets[1:])
    assert evaluation.compute()["miou"].isnan(), "nothing was measured"


def test_accuracy_in_training_looks_at_the_pixels_in_the_middle() -> None:
    maps = scores_of(torch.tensor([[[1, 2], [3, 4]]]))
    targets = torch.full((1, 6, 6), 255)
    targets[0, 1::3, 1::3] = torch.tensor([[1, 2], [3, 9]])
    assert fraction_of_pixels(maps, targets).item() == 0.75
    targets[0, 1, 1] = 255
    assert fraction_of_pixels(maps, targets).item() == pytest.approx(2 / 3)
    assert fraction_of_pixels(maps, torch.full((1, 6, 6), 255)).item() == 0


def test_what_a_task_predicts_must_be_known() -> None:
    task = Task()
    task.predicts = "boxes"
    with pytest.raises(ValueError, match=r"Task\.predicts is 'boxes', but 'classes' or 'maps' was wanted"):
        evaluation_for(task, 3)
