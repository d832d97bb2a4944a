"""Images and masks together on their device: flip, scale, padding, crop and blur of a whole batch as two products.

Each step is linear and acts along rows and columns alone, so the image that comes out is A X B^T, where A and B are small
matrices of one image. The random numbers are arguments, as in `augmentation`.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIFORMS_PER_PAIR = 6  # flip, length of the short side, top, left, whether to blur, radius
BLUR_UNIT = 1e-6  # pixels: a window holds whole numbers, which no precision of the trainer rounds
LARGEST_RADIUS = 1.0


def draw_pairs(count: int, generator: torch.Generator) -> Tensor:
    """float64 (count, 6) in [0, 1): the numbers of `training_window` for every image."""
    return torch.rand(count, UNIFORMS_PER_PAIR, dtype=torch.float64, generator=generator)


def training_window(
    height: int,
    width: int,
    uniforms: list[float],
    size: tuple[int, int],
    short_side: tuple[int, int] = (256, 1024),
    flip: float = 0.5,
    blur: float = 0.5,
) -> list[int]:
    """The random window of an image: mirrored, scaled to a short side of s pixels, cut out of it, blurred with radius r.

    s is uniform in the whole numbers of `short_side`, both ends included, and the long side floor(long * s / short). The
    corner is uniform among those whose window lies inside, after padding on the right and at the bottom where the scaled
    image is smaller than the window. r is U(0, 1) with probability `blur`, else 0.

    Args:
        height, width: of the image, in pixels.
        uniforms: a row of `draw_pairs`.
        size: (h, w) of the window.
        short_side, flip, blur: as above; `flip` is the probability of a mirror image.

    Returns:
        [height, width, scaled height, scaled width, top, left, mirrored, r / 1e-6]: a row of `windows` for
        `resample_images` and `resample_masks`.

    Example:
        >>> training_window(50, 100, [0.1, 0.0, 0.5, 0.5, 0.9, 0.5], size=(20, 20), short_side=(30, 40))
        [50, 100, 30, 60, 5, 20, 1, 0]

    Source: the data set of FRSKD's released segmentation code.
    """
    u_flip, u_side, u_top, u_left, u_blur, u_radius = uniforms
    short = short_side[0] + int(u_side * (short_side[1] - short_side[0] + 1))
    shorter = min(height, width)
    scaled = [max(1, side * short // shorter) for side in (height, width)]
    top, left = (
        int(u * (max(side - wanted, 0) + 1)) for u, side, wanted in zip((u_top, u_left), scaled, size, strict=True)
    )
    radius = round(u_radius * LARGEST_RADIUS / BLUR_UNIT) if u_blur < blur else 0
    return [height, width, *scaled, top, left, int(u_flip < flip), radius]


def whole_window(height: int, width: int, size: tuple[int, int]) -> list[int]:
    """The window that shows the whole image, stretched to `size` = (h, w), whatever its aspect ratio.

    Example:
        >>> whole_window(375, 500, (512, 512))
        [375, 500, 512, 512, 0, 0, 0, 0]
    """
    return [height, width, *size, 0, 0, 0, 0]


def resample_images(images: Tensor, windows: Tensor, size: tuple[int, int]) -> Tensor:
    """out_nc = A_n X_nc B_n^T: the windows of the images, black where a window leaves its image.

    The rows of A_n are the weights of Pillow's bilinear filter, which averages when it shrinks, then of Pillow's Gaussian
    blur: three boxes in a row, edges repeated. Pillow rounds to whole grey levels after every step, here nothing is
    rounded, so that the two differ by up to one level, with blur by up to four on white noise.

    Args:
        images: (N, C, H, W), of any dtype; the image n is in the upper left corner, as large as its window says.
        windows: int64 (N, 8), rows of `training_window` or `whole_window`, on the same device.
        size: (h, w) of the result.

    Returns:
        float32 (N, C, h, w), contiguous.

    Example:
        >>> image = torch.tensor([[10.0, 20.0], [30.0, 40.0]]).view(1, 1, 2, 2)
        >>> resample_images(image, torch.tensor([[2, 2, 2, 2, 0, 0, 1, 0]]), (2, 3)).tolist()  # flipped, padded
        [[[[20.0, 10.0, 0.0], [40.0, 30.0, 0.0]]]]
    """
    height, width, scaled_height, scaled_width, top, left, flipped, radius = windows.unbind(1)
    down = _weights(height, scaled_height, top, torch.zeros_like(flipped), radius, size[0], images.shape[2])
    across = _weights(width, scaled_width, left, flipped, radius, size[1], images.shape[3])
    with torch.autocast(images.device.type, enabled=False):
        return down.unsqueeze(1) @ (images.float() @ across.transpose(1, 2).unsqueeze(1))


def resample_masks(masks: Tensor, windows: Tensor, size: tuple[int, int], pad_label: int = 0) -> Tensor:
    """out_n[y, x] = mask_n[nearest row of y, nearest column of x], `pad_label` where a window leaves its mask.

    Nearest is Pillow's rule, floor((y + 1/2) * old / new). Where this is a whole number without rounding, Pillow, which adds
    up steps, may take the pixel before.

    Args:
        masks: (N, H, W), of any dtype; windows, size: as for `resample_images`.
        pad_label: of the padding.

    Returns:
        int64 (N, h, w).

    Example:
        >>> mask = torch.tensor([[[1, 2], [3, 4]]])
        >>> resample_masks(mask, torch.tensor([[2, 2, 2, 4, 0, 1, 0, 0]]), (2, 4), pad_label=9).tolist()
        [[[1, 2, 2, 9], [3, 4, 4, 9]]]
    """
    height, width, scaled_height, scaled_width, top, left, flipped, _ = windows.unbind(1)
    rows, inside_rows = _nearest(height, scaled_height, top, torch.zeros_like(flipped), size[0])
    columns, inside_columns = _nearest(width, scaled_width, left, flipped, size[1])
    image = torch.arange(len(masks), device=masks.device).view(-1, 1, 1)
    found = masks[image, rows.unsqueeze(2), columns.unsqueeze(1)].long()
    return found.masked_fill(~(inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1)), pad_label)


def _weights(
    side: Tensor, scaled: Tensor, start: Tensor, flipped: Tensor, radius: Tensor, count: int, length: int
) -> Tensor:
    """float32 (N, count, length): what each pixel of a window takes from each of a line of pixels; arguments (N,)."""
    side, scaled, start, flipped, radius = (value.view(-1, 1, 1) for value in (side, scaled, start, flipped, radius))
    place = start + torch.arange(count, device=side.device).view(1, -1, 1)  # in the scaled image
    pixel = torch.arange(length, device=side.device)
    seen = torch.where(flipped != 0, side - 1 - pixel, pixel)  # where the flip brings it
    # The filter's triangle is as wide as a pixel of the coarser of the two images. Whole numbers make its tip exact.
    distance = ((2 * seen + 1) * scaled - (2 * place + 1) * side).abs_().float() / (2 * torch.maximum(side, scaled))
    weights = (1 - distance).clamp(min=0) * ((pixel < side) & (place < scaled))
    weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-6)
    # A box of fractional radius a < 1 has the weights (a, 1, a) / (2 a + 1). Three of them have the variance radius^2.
    variance = (radius * BLUR_UNIT).float() ** 2 / 3
    edge = variance / (2 * (1 - variance))
    for _ in range(3):
        before = torch.cat([weights[:, :1], weights[:, :-1]], 1)
        after = torch.cat([weights[:, 1:], weights[:, -1:]], 1)
        weights = (weights + edge * (before + after)) / (1 + 2 * edge)
    return weights


def _nearest(side: Tensor, scaled: Tensor, start: Tensor, flipped: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which pixel of a line each one of a window shows, and whether it is inside; (N, count), arguments (N,)."""
    side, scaled, start, flipped = (value.view(-1, 1) for value in (side, scaled, start, flipped))
    place = start + torch.arange(count, device=side.device)
    pixel = torch.minimum((2 * place + 1) * side // (2 * scaled), side - 1)
    return torch.where(flipped != 0, side - 1 - pixel, pixel), place < scaled
