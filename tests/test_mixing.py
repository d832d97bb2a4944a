"""mixup, cutmix, the four rotations and their joint labels, against slow statements of the rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from frskd_fast.mixing import cutmix, joint_labels, mixup, rotate4


def numbered(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Images of which every pixel is different, and no two images share one."""
    return torch.arange(batch * channels * height * width, dtype=torch.float64).view(batch, channels, height, width)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mixup_is_the_formula_and_leaves_the_batch_alone() -> None:
    images, targets = torch.randn(6, 3, 5, 7, dtype=torch.float64), torch.arange(6)
    before = images.clone(), targets.clone()
    shares = []
    for seed in range(40):
        mixed, (first, second, lam) = mixup(images, targets, 0.2, seeded(seed))
        assert isinstance(lam, float) and 0.0 <= lam <= 1.0
        assert torch.equal(first, targets) and torch.equal(second.sort().values, targets)
        # A label is also the position of its image.
        torch.testing.assert_close(mixed, lam * images + (1 - lam) * images[second])
        assert torch.equal(images, before[0]) and torch.equal(targets, before[1])
        shares.append(lam)
    assert len(set(shares)) == 40


def test_the_weight_is_of_the_beta_distribution() -> None:
    images, targets = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    generator = seeded(0)
    for concentration in (0.2, 1.0, 4.0):
        lams = torch.tensor([mixup(images, targets, concentration, generator)[1][2] for _ in range(3000)]).double()
        deviation = math.sqrt(1 / (4 * (2 * concentration + 1)))  # of Beta(a, a)
        assert lams.mean().item() == pytest.approx(0.5, abs=5 * deviation / math.sqrt(3000))
        assert lams.std().item() == pytest.approx(deviation, rel=0.06)


def test_cutmix_pastes_one_box_of_the_right_size() -> None:
    areas = set()
    for height, width in ((8, 8), (6, 11), (13, 4), (1, 1)):
        images, targets = numbered(5, height, width), torch.arange(5)
        before = images.clone()
        for seed in range(60):
            mixed, (first, second, lam) = cutmix(images, targets, 1.0, seeded(seed))
            assert torch.equal(images, before) and torch.equal(first, targets)
            # The draws in the documented order; lam itself is the first one of mixup with the same seed.
            generator = seeded(seed)
            drawn = mixup(images, targets, 1.0, seeded(seed))[1][2]
            torch.randint(2**63 - 1, (), generator=generator)
            assert torch.equal(second, torch.randperm(5, generator=generator))
            inside = []
            for side in (height, width):
                cut, centre = math.floor(side * math.sqrt(1 - drawn)), int(torch.randint(side, (), generator=generator))
                inside.append([centre - cut // 2 <= place < centre + cut // 2 for place in range(side)])
            for n in range(5):
                for y in range(height):
                    for x in range(width):
                        source = second[n] if inside[0][y] and inside[1][x] else n
                        assert torch.equal(mixed[n, :, y, x], images[source, :, y, x])
            area = sum(inside[0]) * sum(inside[1])
            assert lam == 1 - area / (height * width)
            areas.add(area)
    assert len(areas) > 20 and 0 in areas


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing_is_a_function_of_the_seed(mix: Callable[..., Any]) -> None:
    images, targets = torch.randn(4, 3, 8, 8), torch.arange(4)
    state = torch.get_rng_state()
    first, second = (mix(images, targets, 1.0, seeded(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0]) and first[1][2] == second[1][2]
    last = images.contiguous(memory_format=torch.channels_last)
    mixed, (_, _, lam) = mix(last, targets, 1.0, seeded(3))
    assert torch.equal(mixed, first[0]) and lam == first[1][2]
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(5)
    globally = mix(images, targets, 1.0)
    torch.manual_seed(5)
    assert torch.equal(mix(images, targets, 1.0)[0], globally[0])


def test_mixing_takes_other_dtypes_and_carries_gradients() -> None:
    targets = torch.arange(4)
    for dtype in (torch.float16, torch.bfloat16):
        images = (30000 * torch.ones(4, 1, 2, 2)).to(dtype)
        assert torch.equal(mixup(images, targets, 1.0)[0], images)
    integers = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
    assert cutmix(integers, targets, 1.0)[0].dtype == torch.uint8
    images = torch.randn(4, 3, 6, 6, requires_grad=True)
    for mix in (mixup, cutmix):
        (gradient,) = torch.autograd.grad(mix(images, targets, 1.0)[0].sum(), images)
        torch.testing.assert_close(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("batch", "channels", "side"), [(3, 3, 5), (2, 1, 4), (1, 3, 1), (0, 3, 4), (2, 4, 2)])
def test_rotations(batch: int, channels: int, side: int, layout: torch.memory_format) -> None:
    images = numbered(batch, side, side, channels).contiguous(memory_format=layout).requires_grad_()
    rotated = rotate4(images)
    assert rotated.shape == (4 * batch, channels, side, side)
    assert rotated.is_contiguous(memory_format=layout)
    for n in range(batch):
        for r in range(4):
            assert torch.equal(rotated[4 * n + r], torch.rot90(images[n], r, (1, 2)))
    upstream = torch.randn_like(rotated)
    (gradient,) = torch.autograd.grad(rotated, images, upstream)
    wanted = torch.stack([torch.rot90(upstream[r::4], -r, (2, 3)) for r in range(4)]).sum(0)
    torch.testing.assert_close(gradient, wanted)
    sliced = numbered(4, side, side + 2, channels)[::2, :, :, 1:-1].to(torch.uint8)
    turned = torch.stack([torch.rot90(sliced, r, (2, 3)) for r in range(4)], 1).flatten(0, 1)
    assert torch.equal(rotate4(sliced), turned)


def test_joint_labels() -> None:
    labels = torch.tensor([3, -100, 1], dtype=torch.int32)
    wanted = [12, 13, 14, 15, *[-100] * 4, 4, 5, 6, 7]
    assert joint_labels(labels).tolist() == wanted and joint_labels(labels).dtype == torch.int64
    assert joint_labels(torch.tensor([2, 0]), ignore_index=0).tolist() == [8, 9, 10, 11, *[-100] * 4]
    # 255 is also the joint label of class 63, turned by 270 degrees.
    assert joint_labels(torch.tensor([63, 255]), ignore_index=255).tolist() == [252, 253, 254, 255, *[-100] * 4]
    first, second, lam = joint_labels((labels, labels.flip(0), 0.3))
    assert first.tolist() == wanted and second.tolist() == wanted[8:] + wanted[4:8] + wanted[:4] and lam == 0.3
    probabilities = torch.rand(3, 5)
    joint = joint_labels(probabilities)
    for n in range(3):
        for r in range(4):
            row = torch.zeros(20)
            row[r::4] = probabilities[n]
            assert torch.equal(joint[4 * n + r], row)


IMAGES, TARGETS = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: mixup([1], TARGETS, 1.0), TypeError, "images is a list"),
        (lambda: mixup(IMAGES[0], TARGETS, 1.0), ValueError, r"images has shape \(3, 4, 4\), but \(N, C, H, W\)"),
        (lambda: mixup(IMAGES.byte(), TARGETS, 1.0), TypeError, "images has dtype torch.uint8"),
        (lambda: mixup(IMAGES, TARGETS.tolist(), 1.0), TypeError, "targets is a list"),
        (lambda: cutmix(IMAGES, TARGETS[:1], 1.0), ValueError, r"targets has shape \(1,\)"),
        (lambda: cutmix(IMAGES, torch.rand(2, 5), 1.0), ValueError, "mix before labels become probabilities"),
        (lambda: cutmix(IMAGES, TARGETS.to("meta"), 1.0), ValueError, "targets is on meta, but images is on cpu"),
        (lambda: mixup(IMAGES, TARGETS, 0.0), ValueError, "concentration is 0.0"),
        (lambda: mixup(IMAGES, TARGETS, 1.0, 3), TypeError, "generator is a int"),
        (lambda: rotate4(IMAGES[:, :, 1:]), ValueError, "images has maps of 3 x 4 pixels, but square"),
        (lambda: rotate4(None), TypeError, "images is a NoneType"),
        (lambda: joint_labels("cat"), TypeError, "targets is a str"),
        (lambda: joint_labels(torch.rand(3)), ValueError, r"targets has shape \(3,\) and dtype torch.float32"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()
