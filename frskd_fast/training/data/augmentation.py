"""The paper's augmentations: crops and flips of whole batches on their device, random resized crops of PIL images.

Each one does what torchvision's transform of the same parameters does; where the numbers come from differs: they are
arguments here, so that a batch looks the same whoever prepares it, in whatever process, before and after a restart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

ATTEMPTS = 10  # of a random resized crop to find a window inside the image
PADDING_MODES = ("constant", "reflect", "symmetric")
UNIFORMS_PER_IMAGE = 4 * ATTEMPTS + 1  # area, aspect ratio, top and left of every attempt, and the flip


def draw_crops(count: int, padding: int, flip: float, generator: torch.Generator) -> Tensor:
    """Rows (top, left, flipped) with top and left uniform in 0 .. 2 * padding, flipped = [u < flip].

    The result is int64 (count, 3) on the CPU; the rows of the first n images do not depend on `count`.

    Example:
        >>> draw_crops(2, padding=0, flip=1.0, generator=torch.Generator().manual_seed(0)).tolist()
        [[0, 0, 1], [0, 0, 1]]
    """
    uniforms = torch.rand(count, 3, dtype=torch.float64, generator=generator)
    crops = (uniforms * (2 * padding + 1)).long()
    crops[:, 2] = uniforms[:, 2] < flip
    return crops


def padded(images: Tensor, padding: int, mode: str = "constant") -> Tensor:
    """Contiguous images with `padding` pixels more on each side: zeros, or the image mirrored.

    `mode` is one of `PADDING_MODES`, called as in torchvision and NumPy: "constant" (0 0 0 | a b c), "reflect" (d c b | a b c
    d), or "symmetric", which repeats the edge (c b a | a b c).

    Images are (N, C, H, W) of any dtype.

    Example:
        >>> row = torch.tensor([1, 2, 3]).view(1, 1, 1, 3)
        >>> [padded(row, 2, mode)[0, 0, 2].tolist() for mode in PADDING_MODES]
        [[0, 0, 1, 2, 3, 0, 0], [3, 2, 1, 2, 3, 2, 1], [2, 1, 1, 2, 3, 3, 2]]
    """
    if not padding:
        return images.contiguous()
    if mode == "constant":
        return F.pad(images, (padding,) * 4).contiguous()
    places = []
    for size in images.shape[2:]:
        steps = torch.arange(-padding, size + padding, device=images.device)
        # There and back again, with each edge twice or once.
        period, last = (2 * size, 2 * size - 1) if mode == "symmetric" else (max(2 * size - 2, 1), 2 * size - 2)
        steps = steps % period
        places.append(torch.minimum(steps, last - steps))
    rows, columns = places
    return images[:, :, rows[:, None], columns].contiguous()


def crop_and_flip(images: Tensor, crops: Tensor, padding: int, padding_mode: str = "constant") -> Tensor:
    """out[n, c, y, x] = padded[n, c, top_n + y, left_n + x'] with x' = W - 1 - x where flipped, else x.

    `padded` is what the function of that name makes of the images, so this is torchvision's `RandomCrop((H, W), padding)`
    followed by `RandomHorizontalFlip`, for the whole batch at once and with given random numbers.

    Images are (N, C, H, W) of any dtype, crops those of `draw_crops` on the same device; the result is contiguous.

    Example:
        >>> images = torch.arange(1, 5).reshape(1, 1, 2, 2)
        >>> crop_and_flip(images, torch.tensor([[1, 0, 0]]), padding=1).tolist()  # the window one pixel to the left
        [[[[0, 1], [0, 3]]]]
        >>> crop_and_flip(images, torch.tensor([[1, 1, 1]]), padding=1).tolist()  # the centre, flipped
        [[[[2, 1], [4, 3]]]]
    """
    count, channels, height, width = images.shape
    source = padded(images, padding, padding_mode)
    top, left, flipped = crops.unbind(1)
    across = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flipped[:, None] != 0, width - 1 - across, across)  # (N, W)
    rows = top[:, None] + torch.arange(height, device=images.device)  # (N, H)
    pixels = (rows * (width + 2 * padding))[:, :, None] + columns[:, None, :]  # (N, H, W), the same for each channel
    pixels = pixels.reshape(count, 1, height * width).expand(-1, channels, -1)
    return source.flatten(2).gather(2, pixels).reshape(images.shape)


def draw_view_crops(count: int, padding: int, flip: float, generator: torch.Generator) -> Tensor:
    """Rows (top, left, flipped) as `draw_crops` draws them for each of four views, with one flip for the four.

    The result is int64 (count, 4, 3) on the CPU; the rows of the first n images do not depend on `count`.

    Example:
        >>> draw_view_crops(1, padding=0, flip=1.0, generator=torch.Generator().manual_seed(0)).tolist()
        [[[0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]]]
    """
    crops = draw_crops(4 * count, padding, flip, generator).view(count, 4, 3)
    crops[:, :, 2] = crops[:, :1, 2]
    return crops


def crop_views(images: Tensor, crops: Tensor, padding: int, padding_mode: str = "constant") -> Tensor:
    """out[4n + r] = crop_{n,r}(rot90(flip_n(image_n), r)): four rotations of each image, each with a crop of its own.

    The image is mirrored where its first row says flipped, turned counter-clockwise r times and padded as by `padded`; view r
    is the window at (top, left) of its own row. One gather writes each pixel once.

    Images are (N, C, H, H) of any dtype, crops (N, 4, 3) those of `draw_view_crops` on the same device; the result is
    contiguous (4N, C, H, H), in the order of `frskd_fast.mixing.rotate4`.

    Example:
        >>> images = torch.arange(1, 5).reshape(1, 1, 2, 2)
        >>> centre, shifted = [1, 1, 0], [1, 0, 0]
        >>> crop_views(images, torch.tensor([[centre, shifted, centre, centre]]), padding=1).flatten(1).tolist()
        [[1, 2, 3, 4], [0, 2, 0, 1], [4, 3, 2, 1], [3, 1, 4, 2]]

    Source: Xu et al., ECCV 2020 (arXiv 2006.07114), in the order of its released code.
    """
    count, channels, side, width = images.shape
    if side != width:
        raise ValueError(
            f"images has maps of {side} x {width} pixels, but square images were wanted: turned by 90 degrees, others do not "
            "fit into one batch; set crop_each_view to false, or crop or resize them."
        )
    source = padded(images, padding, padding_mode)
    last = side + 2 * padding - 1
    top, left, flipped = crops[..., None, None].unbind(2)  # each (N, 4, 1, 1)
    steps = torch.arange(side, device=images.device)
    rows = (top + steps[:, None]).expand(-1, -1, -1, side)  # (N, 4, H, H), of the turned image
    columns = (left + steps).expand(-1, -1, side, -1)
    # Where a pixel of each view lay before it was turned, as in `rotate4`.
    down = torch.stack([rows[:, 0], columns[:, 1], last - rows[:, 2], last - columns[:, 3]], 1)
    across = torch.stack([columns[:, 0], last - rows[:, 1], last - columns[:, 2], rows[:, 3]], 1)
    across = torch.where(flipped != 0, last - across, across)
    pixels = (down * (last + 1) + across).view(count, 4, 1, side * side).expand(-1, -1, channels, -1)
    planes = source.flatten(2).unsqueeze(1).expand(-1, 4, -1, -1)
    return planes.gather(3, pixels).view(4 * count, channels, side, side)


def normalise(images: Tensor, mean: Tensor, std: Tensor, scale: float = 255.0) -> Tensor:
    """out = (images / scale - mean_c) / std_c in float32: torchvision's `ToTensor` and `Normalize`, the same bits.

    Images are uint8 or float32 (N, C, H, W), mean and std float32 (C,); the result is a new contiguous tensor.

    Example:
        >>> white = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
        >>> normalise(white, torch.tensor([0.5]), torch.tensor([0.25])).item()
        2.0
    """
    values = images.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return values.div_(scale).sub_(mean[:, None, None]).div_(std[:, None, None])


def draw_resized_crops(count: int, generator: torch.Generator) -> Tensor:
    """float64 (count, 41) in [0, 1): for every image four numbers of each attempt to find a window, and one of the flip."""
    return torch.rand(count, UNIFORMS_PER_IMAGE, dtype=torch.float64, generator=generator)


def resized_crop_window(
    width: int,
    height: int,
    uniforms: list[float],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """w = round(sqrt(A * r)), h = round(sqrt(A / r)), A = W * H * U(scale), log r = U(log ratio): a window w x h inside.

    Up to ten attempts draw (A, r) until the window fits, then its place uniformly; if none fits, the largest centred
    window whose aspect ratio is in `ratio` is taken. These are the rules of torchvision's `RandomResizedCrop`.

    `uniforms` are area, ratio, top and left of the first attempt, of the second, ...; the result is (left, top, right,
    bottom) in pixels.

    Example:
        >>> resized_crop_window(100, 50, [0.5, 0.5, 0.0, 0.0], scale=(0.5, 0.5), ratio=(1.0, 1.0))
        (0, 0, 50, 50)
        >>> resized_crop_window(100, 10, [], ratio=(1.0, 2.0))  # no attempt fits: centred, twice as wide as high
        (40, 0, 60, 10)
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for start in range(0, min(len(uniforms), 4 * ATTEMPTS) - 3, 4):
        u_area, u_ratio, u_top, u_left = uniforms[start : start + 4]
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(low + (high - low) * u_ratio)
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            top, left = int(u_top * (height - down + 1)), int(u_left * (width - across + 1))
            return left, top, left + across, top + down
    across, down = width, height
    if width / height < ratio[0]:
        down = round(width / ratio[0])
    elif width / height > ratio[1]:
        across = round(height * ratio[1])
    top, left = (height - down) // 2, (width - across) // 2
    return left, top, left + across, top + down


def random_resized_crop(
    image: Image,
    size: tuple[int, int],
    uniforms: list[float],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Image:
    """resize(image[window], size), mirrored where the last uniform number is below `flip`; window: `resized_crop_window`.

    `size` is (H, W), `uniforms` a row of `draw_resized_crops`. PIL's bilinear filter averages when it shrinks.
    """
    from PIL import Image as PILImage

    window = resized_crop_window(*image.size, uniforms, scale, ratio)
    result = image.crop(window).resize((size[1], size[0]), PILImage.Resampling.BILINEAR)
    return result.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) if uniforms[-1] < flip else result


def resize_and_centre_crop(image: Image, resize: int, size: tuple[int, int]) -> Image:
    """The middle (H, W) of the image after its shorter side was made `resize` pixels: `Resize` and `CenterCrop`.

    The longer side becomes floor(resize * longer / shorter); the window starts at round((side - wanted) / 2), half to
    even. Both are torchvision's rules.

    Example:
        >>> from PIL import Image
        >>> resize_and_centre_crop(Image.new("RGB", (500, 375)), 256, (224, 224)).size
        (224, 224)
    """
    from PIL import Image as PILImage

    width, height = image.size
    if min(width, height) != resize:
        shorter = min(width, height)
        width, height = resize * width // shorter, resize * height // shorter
        image = image.resize((width, height), PILImage.Resampling.BILINEAR)
    if (height, width) == size:
        return image
    top, left = round((height - size[0]) / 2.0), round((width - size[1]) / 2.0)
    return image.crop((left, top, left + size[1], top + size[0]))
