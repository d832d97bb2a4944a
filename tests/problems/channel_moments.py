"""Problems of the operation ``channel_moments``: the moments of one map, and another one that takes them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from numerics import assert_close
from torch import Tensor

from frskd_fast.functional import adain, channel_moments
from problems._channel_moments_entry_points import ENTRY_POINTS as ENTRY_POINTS

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "slice of channels_last": lambda x: x.repeat(2, 2, 1, 1).contiguous(memory_format=torch.channels_last)[
        : len(x), : x.shape[1]
    ],
    "expanded": lambda x: x[:1].expand(x.shape),
    "one pixel expanded": lambda x: x[..., :1, :1].contiguous().expand(x.shape),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "rows apart": lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
}


@dataclass(frozen=True)
class Transfer:
    """Moments of a style, a content with these moments, and the gradients of all that."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str = "contiguous"
    mean: float = 0.0
    content_learns: bool = True

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        learns = "" if self.content_learns else ", content without gradient"
        return f"{self.shape}, {self.layout}, {dtype}, mean {self.mean}{learns}"

    def run(self, implementation: str, device: str) -> None:
        generator = torch.Generator().manual_seed(1)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        batch, channels, height, width = self.shape
        lay = LAYOUTS[self.layout]
        style = lay((self.mean + 2.0 * drawn(batch, channels, width, height)).to(self.dtype))
        content = lay((self.mean + drawn(*self.shape)).to(self.dtype))
        upstream, grad_mean, grad_std = (
            drawn(*self.shape).to(self.dtype),
            drawn(batch, channels),
            drawn(batch, channels),
        )

        def run(dtype: torch.dtype, implementation: str) -> list[Tensor]:
            x, y = style.detach().to(dtype).requires_grad_(), content.detach().to(dtype)
            y.requires_grad_(self.content_learns)
            mean, std = channel_moments(x, impl=implementation)
            out = adain(y, mean, std, impl=implementation)
            scalar = (out * upstream).sum() + (mean * grad_mean).sum() + (std * grad_std).sum()
            inputs = (x, y) if self.content_learns else (x,)
            gradients = torch.autograd.grad(scalar, inputs)
            if dtype == self.dtype and self.layout in ("contiguous", "channels_last", "transposed"):
                assert out.stride() == y.stride() and gradients[0].stride() == x.stride()
            return [mean, std, out, *gradients]

        results = run(self.dtype, implementation), run(self.dtype, "reference"), run(torch.float64, "reference")
        names = ("mean", "std", "out", "gradient of style", "gradient of content")
        for name, mine, theirs, true in zip(names, *results, strict=False):
            assert mine.dtype == theirs.dtype
            assert_close(mine, theirs, true, f"{self.name}: {name}", scale=5.0)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRID = [Transfer((5, 6, 5, 4), dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
PROBLEMS = [
    *GRID,
    # Tails of vectors, groups of channels, long sums.
    *(
        Transfer(shape, dtype, layout, content_learns=False)
        for dtype in DTYPES
        for layout in ("contiguous", "channels_last")
        for shape in ((2, 131, 3, 3), (1, 3, 67, 65), (2, 16, 2, 1), (1, 1, 1, 9))
    ),
    *(
        Transfer((2, 33, 16, 16), torch.float32, layout, mean=1e3, content_learns=learns)
        for layout in ("contiguous", "channels_last")
        for learns in (True, False)
    ),
]
