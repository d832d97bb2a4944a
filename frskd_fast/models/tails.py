"""What a network does with one of its feature maps: the way from there to the logits, read off one run of the network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adapters import AdaptedBackbone, HookedBackbone, OutputBackbone
from .dry_pass import dry_pass

_REMEDY = "pass a module or function of your own that takes the map and returns the logits: tails=[...]"


def tail(network: nn.Module, stage: int, image_shape: Sequence[int] | None = None) -> nn.Module:
    """logits = tail(features[stage]), where features, logits = network(images): the rest of the network behind one map.

    The tail is made of the network's own modules, which it shares, and of the functions between them. It is found in a dry
    pass and compared there with the network on random images: a ReLU, a pooling or a reshape that stands in the network's
    forward pass is part of it. What the network computes of the map before it goes on, it computes of anything that takes the
    map's place: FRSKD's networks begin a stage with a ReLU, the other ResNets here do not.

    Args:
        network: `network(images) -> (features, logits)`: any network of this library, or what `adapt_backbone` makes of
            others. It is left as it was.
        stage: position of the map among the features, finest first, from 0.
        image_shape: (C, H, W) of the images. It is needed only where the way depends on their size (VGG), which is found out
            and said.

    Returns:
        A `torch.fx.GraphModule` from maps (N, C, H, W) of any batch to logits (N, K). It is in training or evaluation mode as
        the network's modules are, and moves with them.

    Raises:
        LookupError: a sentence, where the way cannot be found: the map is used in no other way than being handed out, more
            than the map leads to the logits, Python looks at its values, or the way depends on the size of the images.
        ValueError, TypeError: on a stage that is not there, or a network that hands out no feature maps.
        RuntimeError: when the network accepts none of the dry pass's images.

    Example:
        >>> from frskd_fast.models import resnet8
        >>> network = resnet8(num_classes=10).eval()
        >>> features, logits = network(torch.randn(2, 3, 16, 16))
        >>> torch.allclose(tail(network, 1)(features[1]), logits, atol=1e-5)
        True
    """
    return tails(network, [stage], image_shape)[0]


def tails(network: nn.Module, stages: Sequence[int], image_shape: Sequence[int] | None = None) -> list[nn.Module]:
    """`tail(network, stage)` for each of several stages, from one dry pass."""
    found: list[nn.Module] = []

    def look(images: Tensor) -> tuple[list[Tensor], Tensor]:
        images = torch.randn_like(images)
        calls = _Calls()
        with calls:
            features, logits = _features_and_logits(network, images)
        for stage in stages:
            if not isinstance(stage, int) or isinstance(stage, bool) or not 0 <= stage < len(features):
                raise StageError(
                    f"stages holds {stage!r}, but the network ({type(network).__name__}) hands out {len(features)} feature "
                    f"maps and positions from 0 to {len(features) - 1}, finest first, were wanted."
                )
        found[:] = [_traced(network, images, calls, features[stage], stage) for stage in stages]
        # Another batch of other images: what was taken from the first ones, a number of images even, shows.
        _compare(network, found, stages, torch.randn_like(torch.cat([images, images[:1]])), "")
        if image_shape is None:
            half = torch.randn_like(images[..., : images.shape[2] // 2, : images.shape[3] // 2])
            sizes = [f"{one.shape[2]} x {one.shape[3]}" for one in (half, images)]
            _compare(network, found, stages, half, " for images of {} pixels, only for those of {}".format(*sizes))
        return features, logits

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images too small, for example, which these are not
            dry_pass(network.model if isinstance(network, AdaptedBackbone) else network, look, image_shape)
    except StageError as error:
        raise ValueError(str(error)) from None
    return found


class StageError(LookupError):
    """A stage that is not there; a `LookupError` because a dry pass tries no other images after one."""


def _features_and_logits(network: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    output = network(images)
    if not (isinstance(output, tuple | list) and len(output) == 2 and isinstance(output[0], tuple | list)):
        raise TypeError(
            f"network ({type(network).__name__}) returned a {type(output).__name__}, but (list of feature maps, logits) was "
            "wanted; wrap it with frskd_fast.models.adapt_backbone."
        )
    return list(output[0]), output[1]


class _Calls(TorchFunctionMode):
    """All calls of torch functions in one run, in their order: the first tensor that went in, and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.made.append((next((value for value in args if isinstance(value, Tensor)), None), output))
        return output

    def that_made(self, tensor: Tensor, before: int | None = None) -> int | None:
        """The last call, of those `before` that number, that gave this very tensor; operations in place give what went in."""
        earlier = range(len(self.made) if before is None else before)
        return next((number for number in reversed(earlier) if self.made[number][1] is tensor), None)


class _Replayed(TorchFunctionMode):
    """The same run again: calls give what they gave, but the last one of these something else, and later ones are made."""

    def __init__(self, given: Sequence[Any], stand_in: Any) -> None:
        super().__init__()
        self.left = iter([*given, stand_in])

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for output in self.left:
            return output
        return function(*args, **(kwargs or {}))


class _UnusedError(Exception):
    """The logits do not depend on what was put in."""


class _FromMap(nn.Module):
    """forward(feature): a run of the network that has been made, with `feature` in place of what its call `number` gave."""

    def __init__(self, network: nn.Module, images: Tensor, calls: _Calls, number: int) -> None:
        super().__init__()
        self.network = network
        self.run: Callable[[], Any] = lambda: _output(network, images)
        self.given = [output for _, output in calls.made[:number]]

    def forward(self, feature):  # type: ignore[no-untyped-def]  # fx would write annotations into the graph's code
        with _Replayed(self.given, feature):
            output = self.run()
        # Logits may come before or after a list of maps, or alone.
        outputs = output if isinstance(output, tuple | list) else [output]
        logits = [one for one in outputs if isinstance(one, torch.fx.Proxy)]
        if len(logits) != 1:
            raise _UnusedError
        return logits[0]


def _output(network: nn.Module, images: Tensor) -> Any:
    """What the network returns, with no look at it by an adapter, to which a traced value is no tensor."""
    if isinstance(network, HookedBackbone):
        return network.model(images)
    if isinstance(network, OutputBackbone):
        return network.model(images, **network.keywords)
    return network.maps_and_logits(images) if isinstance(network, AdaptedBackbone) else network(images)


class _Tracer(torch.fx.Tracer):
    """Runs what no traced value goes into, and takes every module that one goes into as a whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # parameters too, so that layers before the map run

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not _holds_proxy((args, kwargs)):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _holds_proxy(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return any(map(_holds_proxy, value))
    return isinstance(value, torch.fx.Proxy)


def _traced(network: nn.Module, images: Tensor, calls: _Calls, feature: Tensor, stage: int) -> nn.Module:
    """The graph behind the map, or behind that of which it was made where the network goes on from there."""
    number = calls.that_made(feature)
    while number is not None:
        root = _FromMap(network, images, calls, number)
        try:
            graph = _Tracer().trace(root)
        except _UnusedError:
            origin = calls.made[number][0]
            number = None if origin is None or origin.shape != feature.shape else calls.that_made(origin, number)
            continue
        except Exception as error:
            raise LookupError(
                f"what the network ({type(network).__name__}) does with its feature map {stage} cannot be followed ({error}); "
                f"{_REMEDY}."
            ) from error
        found = torch.fx.GraphModule(root, graph, "Tail")
        found.graph.eliminate_dead_code()
        found.delete_all_unused_submodules()
        found.recompile()
        outside = [node.target for node in found.graph.nodes if node.op == "get_attr"]
        if outside:  # something that does not come from the map, or that would not move with the network
            raise LookupError(
                f"more than its feature map {stage} leads to the logits of the network ({type(network).__name__}): a tensor "
                f"that is computed before it, or that belongs to no layer ({outside[0]}); {_REMEDY}."
            )
        return found
    raise LookupError(
        f"the logits of the network ({type(network).__name__}) do not come from its feature map {stage}, as far as can be "
        f"seen; {_REMEDY}."
    )


def _compare(network: nn.Module, found: Sequence[nn.Module], stages: Sequence[int], images: Tensor, where: str) -> None:
    """Raise unless every tail gives the logits of the network, which may refuse images of another size (`where`)."""
    try:
        features, logits = _features_and_logits(network, images)
    except Exception:
        if where:
            return
        raise
    for stage, one in zip(stages, found, strict=True):
        try:
            difference = (one(features[stage].clone()) - logits).abs().max()
        except Exception as error:
            difference, reason = torch.inf, f" ({error})"
        else:
            reason = ""
        # Not exactly: another batch may be computed in another order.
        if not difference <= torch.finfo(logits.dtype).eps ** 0.5 * logits.abs().max():
            hint = "pass image_shape=(channels, height, width) of your images" if where else _REMEDY
            raise LookupError(
                f"the logits of the network ({type(network).__name__}) are not those of what follows its feature map {stage}"
                f"{where}{reason}; {hint}."
            )
