"""One run of a network on zeros, which finds the sizes and channels of its maps and leaves no trace."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

# Sides of the dry pass's square images where nothing says which to take: 64 leaves a pyramid to networks that divide by
# 32; networks with a fixed window or a fixed patch grid accept 32 or 224 only.
DRY_PASS_SIDES = (64, 32, 224)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each in the mode it had (frozen parts keep theirs)."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _image_shapes(
    model: nn.Module, image_shape: Sequence[int] | None, sides: Sequence[int]
) -> list[tuple[int, int, int]]:
    """The shapes (C, H, W) that a dry pass tries, in this order."""
    if image_shape is not None:
        if not isinstance(image_shape, list | tuple) or len(image_shape) != 3:
            raise ValueError(f"image_shape is {image_shape!r}, but (channels, height, width) was wanted.")
        for position, value in enumerate(image_shape):
            check_positive_integer(f"image_shape[{position}]", value)
        return [(image_shape[0], image_shape[1], image_shape[2])]
    for name in ("pretrained_cfg", "default_cfg"):  # what timm's models carry
        configuration = getattr(model, name, None)
        if isinstance(configuration, Mapping) and configuration.get("input_size"):
            channels, height, width = configuration["input_size"]
            # create_model(in_chans=...) and create_model(img_size=...) may have changed either.
            return [
                (_image_channels(model, channels), height, width),
                *((_image_channels(model, channels), side, side) for side in sides),
            ]
    return [(_image_channels(model, 3), side, side) for side in sides]


def _image_channels(model: nn.Module, otherwise: int) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return otherwise


def dry_pass(
    model: nn.Module,
    function: Callable[[Tensor], tuple[Sequence[Tensor], Tensor]],
    image_shape: Sequence[int] | None = None,
    sides: Sequence[int] = DRY_PASS_SIDES,
) -> tuple[list[Tensor], Tensor]:
    """maps, logits = function(two zero images), without a trace: no gradient, no statistics, no random numbers drawn.

    Args:
        model: the network that `function` calls; it runs in evaluation mode on its own device and in its own dtype.
        function: from images (2, C, H, W) to feature maps and logits.
        image_shape: (C, H, W); None takes what the model's timm configuration says, else `sides` with the channels of the
            first convolution, the first that the network accepts.
        sides: of square images, in pixels.

    Returns:
        The maps and the logits (2, K).

    Raises:
        RuntimeError: when the network accepts none of the images, with the network's own error as the cause.
        TypeError, LookupError: as `function` raises them.
    """
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    on_device = [] if reference.device.type in ("cpu", "meta") else [reference.device.index or 0]
    shapes = _image_shapes(model, image_shape, sides)
    failure: Exception | None = None
    with torch.no_grad(), torch.random.fork_rng(on_device, device_type=_random_device(reference)), _evaluating(model):
        for shape in shapes:
            images = torch.zeros(2, *shape, device=reference.device, dtype=reference.dtype)
            try:
                maps, logits = function(images)
                return list(maps), logits
            except (TypeError, LookupError):  # what the network returns does not depend on the size of the images
                raise
            except Exception as error:
                failure = error
    tried = ", ".join(f"{channels} x {height} x {width}" for channels, height, width in shapes)
    raise RuntimeError(
        f"model ({type(model).__name__}) failed on every image of the dry pass that finds its channels (tried {tried}): "
        f"{failure}; pass the shape of your images as image_shape=(channels, height, width)."
    ) from failure


def _random_device(reference: Tensor) -> str:
    return "cuda" if reference.device.type in ("cpu", "meta") else reference.device.type
