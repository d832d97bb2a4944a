"""Adapters: other people's networks as `model(images) -> (features, logits)`, finest feature map first.

Neither timm nor torchvision is imported here unless a function that needs it is called.
"""

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_positive_integer

# FRSKD's residual networks hand out four maps. A finer one costs the self-teacher more than all the others together.
MAX_LEVELS = 4
# Sides of the dry pass's square images where nothing says which to take: 64 leaves a pyramid to networks that divide by
# 32; networks with a fixed window or a fixed patch grid accept 32 or 224 only.
DRY_PASS_SIDES = (64, 32, 224)

Maps = Sequence[Tensor]


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


def _image_shapes(model: nn.Module, image_shape: Sequence[int] | None) -> list[tuple[int, int, int]]:
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
                *((_image_channels(model, channels), side, side) for side in DRY_PASS_SIDES),
            ]
    return [(_image_channels(model, 3), side, side) for side in DRY_PASS_SIDES]


def _image_channels(model: nn.Module, otherwise: int) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return otherwise


def dry_pass(
    model: nn.Module,
    function: Callable[[Tensor], tuple[Maps, Tensor]],
    image_shape: Sequence[int] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """maps, logits = function(two zero images), without a trace: no gradient, no statistics, no random numbers drawn.

    Args:
        model: the network that `function` calls; it runs in evaluation mode on its own device and in its own dtype.
        function: from images (2, C, H, W) to feature maps and logits.
        image_shape: (C, H, W); None takes what the model's timm configuration says, else 64, 32 and 224 pixels a side
            with the channels of the first convolution, the first that the network accepts.

    Returns:
        The maps and the logits (2, K).

    Raises:
        RuntimeError: when the network accepts none of the images, with the network's own error as the cause.
        TypeError, LookupError: as `function` raises them.
    """
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    on_device = [] if reference.device.type in ("cpu", "meta") else [reference.device.index or 0]
    shapes = _image_shapes(model, image_shape)
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


def describe_sizes(maps: Sequence[Any]) -> str:
    """The sizes of maps for an error, such as "56 x 56, 28 x 28, a vector of 512".

    Example:
        >>> describe_sizes([torch.zeros(2, 8, 4, 6), torch.zeros(2, 16)])
        '4 x 6, a tensor of shape (2, 16)'
    """

    def describe(feature: Any) -> str:
        if not isinstance(feature, Tensor):
            return f"a {type(feature).__name__}"
        if feature.dim() != 4:
            return f"a tensor of shape {tuple(feature.shape)}"
        return f"{feature.shape[2]} x {feature.shape[3]}"

    return ", ".join(describe(feature) for feature in maps)


def _size(feature: Any) -> tuple[int, int] | None:
    if not isinstance(feature, Tensor) or feature.dim() != 4:
        return None
    return feature.shape[2], feature.shape[3]


def _halves(finer: tuple[int, int], coarser: tuple[int, int]) -> bool:
    return coarser == ((finer[0] + 1) // 2, (finer[1] + 1) // 2)


def pyramid_levels(maps: Sequence[Any], max_levels: int = MAX_LEVELS) -> list[int]:
    """Positions of the longest run of maps in which each size is half of the one before, rounded up.

    Of maps of one size the last (deepest) is taken; pooled vectors and maps that do not fit are left out; of runs equally
    long the one that ends last is taken, and of a run longer than `max_levels` its coarsest levels.

    Args:
        maps: tensors in the network's order; those of shape (N, C, H, W) count.
        max_levels: at least 2.

    Returns:
        Increasing positions in `maps`, two or more.

    Raises:
        ValueError: when no two maps fit, naming the sizes.

    Example:
        >>> stem, first, second, third = (torch.zeros(1, 4, side, side) for side in (15, 15, 8, 4))
        >>> pyramid_levels([stem, first, second, third, torch.zeros(1, 4)])
        [1, 2, 3]
    """
    check_positive_integer("max_levels", max_levels)
    if max_levels < 2:
        raise ValueError("max_levels is 1, but at least 2 was wanted: a pyramid fuses levels.")
    sizes = [_size(feature) for feature in maps]
    longest: list[int] = []
    for end in range(len(maps) - 1, -1, -1):
        run: list[int] = []
        coarser = None
        for position in range(end, -1, -1):
            size = sizes[position]
            if size is not None and (coarser is None or (size != coarser and _halves(size, coarser))):
                run.insert(0, position)
                coarser = size
        if len(run) > len(longest):
            longest = run
    if len(longest) < 2:
        raise ValueError(
            f"the feature maps are {describe_sizes(maps)}, but two or more were wanted of which each is half the size "
            "of the one before, rounded up; name layers of different resolution, finest first."
        )
    return longest[-max_levels:]


def check_levels(maps: Sequence[Any], levels: Sequence[int]) -> list[int]:
    """`levels` as positions in `maps`, if they make a pyramid.

    Raises:
        TypeError, ValueError: on a position that is not there, and on sizes that do not halve (rounded up).
    """
    if not isinstance(levels, list | tuple) or not all(
        isinstance(level, int) and not isinstance(level, bool) for level in levels
    ):
        raise TypeError(f"levels is {levels!r}, but a list of positions among the feature maps was wanted.")
    if len(levels) < 2:
        raise ValueError(f"levels is {list(levels)}, but two positions or more were wanted: a pyramid fuses levels.")
    for level in levels:
        if not -len(maps) <= level < len(maps):
            raise ValueError(
                f"levels holds {level}, but there are {len(maps)} feature maps: {describe_sizes(maps)}; count from 0."
            )
    positions = [level % len(maps) for level in levels]
    sizes = [_size(maps[position]) for position in positions]
    for finer, coarser in itertools.pairwise(sizes):
        if finer is None or coarser is None or not _halves(finer, coarser):
            raise ValueError(
                f"levels={list(levels)} chooses feature maps of {describe_sizes([maps[p] for p in positions])}, but each "
                "was wanted to be half the size of the one before, rounded up; leave levels out to have them chosen."
            )
    return positions


class AdaptedBackbone(nn.Module):
    """features_l = maps[levels[l]], logits: what the four adapters share.

    Attributes:
        model: the network itself; checkpoints of the adapter hold it under `model.`.
        levels: positions of the handed-out maps among all that the network offers.
        channels: channels of each handed-out map, finest first, found by a dry pass; build the self-teacher with it.
        num_classes: number of logits, K.

    Calling `backbone(images)` returns `(features, logits)`: maps (N, channels[l], H_l, W_l) and logits (N, K).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, but a torch.nn.Module was wanted.")
        self.model: Any = model
        self.levels: list[int] = []
        self.channels: list[int] = []
        self.num_classes = 0

    def maps_and_logits(self, images: Tensor) -> tuple[Maps, Tensor]:
        """All feature maps that the network offers, in its order, and its logits."""
        raise NotImplementedError

    def find_levels(self, levels: Sequence[int] | None, max_levels: int, image_shape: Sequence[int] | None) -> None:
        """One dry pass for `levels`, `channels` and `num_classes`."""
        maps, logits = dry_pass(self.model, self._checked_maps_and_logits, image_shape)
        self.levels = pyramid_levels(maps, max_levels) if levels is None else check_levels(maps, levels)
        self.channels = [maps[level].shape[1] for level in self.levels]
        self.num_classes = logits.shape[1]

    def _checked_maps_and_logits(self, images: Tensor) -> tuple[Maps, Tensor]:
        maps, logits = self.maps_and_logits(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            came = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise TypeError(
                f"the logits of model ({type(self.model).__name__}) are {came}, but a tensor (N, K) was wanted; switch "
                "auxiliary outputs off and keep the classifier."
            )
        return maps, logits

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, logits = self._checked_maps_and_logits(images)
        return [maps[level] for level in self.levels], logits

    def extra_repr(self) -> str:
        """What was found, shown by ``print(module)``."""
        return f"levels={self.levels}, channels={self.channels}, num_classes={self.num_classes}"


class TimmBackbone(AdaptedBackbone):
    """features, logits = intermediates of a timm model and `forward_head` of its last map, from one pass.

    Args:
        model: a model of timm 1.0 or later (`timm.create_model(name, num_classes=...)`), or anything with its
            `forward_intermediates(images, indices=..., output_fmt="NCHW")` and `forward_head(map)`.
        levels: positions among the model's intermediates; None takes the last that halve, `max_levels` at most.
        max_levels: the most levels to take where `levels` is None.
        image_shape: (C, H, W) of the dry pass; None takes the model's own input size.

    Attributes and calling: as `AdaptedBackbone`. Only the chosen intermediates are computed and kept.

    Raises:
        TypeError: when the model lacks one of the two methods.
        ValueError: when the intermediates make no pyramid (plain vision transformers: one size throughout).

    Example:
        >>> class Network(nn.Module):  # timm's interface in small
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stages = nn.ModuleList([nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2)])
        ...         self.fc = nn.Linear(8, 5)
        ...     def forward_intermediates(self, x, indices=None, output_fmt="NCHW"):
        ...         maps = []
        ...         for stage in self.stages:
        ...             x = stage(x)
        ...             maps.append(x)
        ...         return x, [maps[i] for i in (range(2) if indices is None else indices)]
        ...     def forward_head(self, x):
        ...         return self.fc(x.mean((2, 3)))
        >>> TimmBackbone(Network()).channels
        [4, 8]

    Source: timm's documentation of feature extraction, `forward_intermediates`.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Sequence[int] | None = None,
        *,
        max_levels: int = MAX_LEVELS,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model)
        for method in ("forward_intermediates", "forward_head"):
            if not hasattr(model, method):
                raise TypeError(
                    f"model ({type(model).__name__}) has no method {method}, but a model of timm 1.0 or later was wanted; "
                    "name its layers instead: adapt_backbone(model, layers)."
                )
        self.find_levels(levels, max_levels, image_shape)

    @classmethod
    def create(cls, name: str, **arguments: Any) -> "TimmBackbone":
        """`TimmBackbone(timm.create_model(name, **arguments))`.

        Raises:
            ImportError: without timm, saying how to install it.
            ValueError: for a name that timm does not know, with those that are spelt alike.
        """
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f"timm cannot be imported ({error}), but was wanted to create the model {name!r}; install it with "
                "pip install 'frskd_fast[timm]'."
            ) from error
        # A source before the name ("hf-hub:") and a tag behind it (".a1_in1k") are timm's to look up.
        architecture = name.partition(".")[0]
        if ":" not in name and not timm.is_model(architecture):
            alike = difflib.get_close_matches(architecture, timm.list_models(), n=3)
            raise ValueError(
                f"name is {name!r}, but timm {timm.__version__} has no such model"
                + (f"; it has {', '.join(map(repr, alike))}" if alike else "")
                + "; timm.list_models() gives all names."
            )
        return cls(timm.create_model(name, **arguments))

    def maps_and_logits(self, images: Tensor) -> tuple[Maps, Tensor]:
        final, maps = self.model.forward_intermediates(images, indices=self.levels or None, output_fmt="NCHW")
        return maps, self.model.forward_head(final)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        # The model hands out the chosen levels only, in the order of their positions.
        maps, logits = self._checked_maps_and_logits(images)
        return list(maps), logits

    def find_levels(self, levels: Sequence[int] | None, max_levels: int, image_shape: Sequence[int] | None) -> None:
        """As in `AdaptedBackbone`, from all intermediates."""
        self.levels = []
        super().find_levels(levels, max_levels, image_shape)


class ExtractorBackbone(AdaptedBackbone):
    """features, logits = entries of the mapping that a torchvision feature extractor returns.

    Args:
        model: what `torchvision.models.feature_extraction.create_feature_extractor` returns, or any module that returns
            a mapping of tensors. `ExtractorBackbone.create` makes the extractor from a plain model.
        nodes: keys of the feature maps, finest first; None takes every key but `logits`, in the mapping's order.
        logits: key of the logits.
        levels, max_levels, image_shape: as for `adapt_backbone`; positions count in `nodes`.

    Attributes and calling: as `AdaptedBackbone`.

    Raises:
        TypeError: when the model returns no mapping.
        LookupError: when the mapping lacks a key.

    Example:
        >>> class Extractor(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.second, self.fc = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2), nn.Linear(8, 5)
        ...     def forward(self, x):
        ...         first = self.first(x)
        ...         second = self.second(first)
        ...         return {"first": first, "second": second, "fc": self.fc(second.mean((2, 3)))}
        >>> ExtractorBackbone(Extractor(), logits="fc").channels
        [4, 8]

    Source: torchvision's documentation, "Feature extraction for model inspection".
    """

    def __init__(
        self,
        model: nn.Module,
        nodes: Sequence[str] | None = None,
        logits: str = "fc",
        levels: Sequence[int] | None = None,
        *,
        max_levels: int = MAX_LEVELS,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model)
        self.nodes = None if nodes is None else check_names("nodes", nodes)
        self.logits = logits
        self.find_levels(levels, max_levels, image_shape)

    @classmethod
    def create(
        cls, model: nn.Module, nodes: Sequence[str], logits: str = "fc", **arguments: Any
    ) -> "ExtractorBackbone":
        """`ExtractorBackbone(create_feature_extractor(model, [*nodes, logits]), nodes, logits, **arguments)`.

        Raises:
            ImportError: without torchvision, saying how to install it and how to do without.
        """
        nodes = check_names("nodes", nodes)
        try:
            from torchvision.models.feature_extraction import create_feature_extractor
        except ImportError as error:
            raise ImportError(
                f"torchvision cannot be imported ({error}), but was wanted to trace {type(model).__name__}; install it "
                "with pip install 'frskd_fast[vision]', or leave logits out to read the layers by forward hooks."
            ) from error
        return cls(create_feature_extractor(model, return_nodes=[*nodes, logits]), nodes, logits, **arguments)

    def maps_and_logits(self, images: Tensor) -> tuple[Maps, Tensor]:
        outputs = self.model(images)
        if not isinstance(outputs, Mapping):
            raise TypeError(
                f"model ({type(self.model).__name__}) returned a {type(outputs).__name__}, but a mapping of names to "
                "tensors was wanted; make one with ExtractorBackbone.create(model, nodes, logits)."
            )
        nodes = [name for name in outputs if name != self.logits] if self.nodes is None else self.nodes
        for name in (*nodes, self.logits):
            if name not in outputs:
                raise LookupError(
                    f"{name!r} is not among what model ({type(self.model).__name__}) returned, {list(outputs)}; "
                    "name the extractor's return nodes."
                )
        return [outputs[name] for name in nodes], outputs[self.logits]


class OutputBackbone(AdaptedBackbone):
    """features, logits = the two parts of what `model(images, **keywords)` returns, in either order.

    It reads FRSKD's and RepDistiller's `(features, logits)` and mdistiller's `(logits, {"feats": [...], ...})`. Pooled
    vectors and maps that do not halve are left out.

    Args:
        model: the network. RepDistiller's need `keywords={"is_feat": True}`; `adapt_backbone` finds that out.
        levels, max_levels, image_shape: as for `adapt_backbone`.
        keywords: keyword arguments of every call.

    Attributes and calling: as `AdaptedBackbone`.

    Raises:
        TypeError: when the model returns something else, saying what.

    Example:
        >>> class Network(nn.Module):  # mdistiller's interface in small
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.second, self.fc = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2), nn.Linear(8, 5)
        ...     def forward(self, x):
        ...         first = self.first(x)
        ...         second = self.second(first)
        ...         pooled = second.mean((2, 3))
        ...         return self.fc(pooled), {"feats": [first, second], "pooled_feat": pooled}
        >>> OutputBackbone(Network()).channels
        [4, 8]
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Sequence[int] | None = None,
        *,
        max_levels: int = MAX_LEVELS,
        image_shape: Sequence[int] | None = None,
        keywords: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model)
        self.keywords = dict(keywords or {})
        self.find_levels(levels, max_levels, image_shape)

    def maps_and_logits(self, images: Tensor) -> tuple[Maps, Tensor]:
        outputs = self.model(images, **self.keywords)
        if isinstance(outputs, tuple | list) and len(outputs) == 2:
            features, logits = outputs
            if isinstance(features, Tensor):
                features, logits = logits, features
            if isinstance(features, Mapping):
                features = features["feats"] if "feats" in features else list(features.values())
            if isinstance(features, list | tuple) and isinstance(logits, Tensor):
                return features, logits
        children = ", ".join(name for name, _ in self.model.named_children())
        raise TypeError(
            f"model ({type(self.model).__name__}) returned a {type(outputs).__name__}, but (features, logits) or "
            '(logits, {"feats": [...]}) was wanted; name the submodules whose outputs are the feature maps, finest first: '
            f"adapt_backbone(model, layers). Its children are: {children}."
        )


class _Recording:
    """Where hooks put their maps while the adapter runs; None between its calls, so that nothing is kept alive."""

    def __init__(self) -> None:
        self.maps: dict[str, Any] | None = None


class _Recorder:
    """A forward hook that keeps the output of its module. An object, so that copies of the adapter get their own."""

    def __init__(self, recording: _Recording, name: str) -> None:
        self.recording = recording
        self.name = name

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self.recording.maps is not None:
            self.recording.maps[self.name] = output


class HookedBackbone(AdaptedBackbone):
    """features, logits = outputs of the named submodules and of the model itself, read by forward hooks.

    The hooks are registered here, before anything can be compiled; a compiled graph never sees a later one.

    Args:
        model: any network that returns logits (N, K).
        layers: names of submodules as in `model.named_modules()`, finest map first. The last call counts where a
            submodule is called more than once.
        levels, max_levels, image_shape: as for `adapt_backbone`; positions count in `layers`.

    Attributes:
        layers: the names.
        others: as `AdaptedBackbone`.

    Raises:
        ValueError: on a name that is not there; on maps that make no pyramid, naming their sizes.
        TypeError: when a submodule returns no tensor, or the model no logits.
        LookupError: when a submodule is not called by the model.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(8, 5))
        >>> backbone = HookedBackbone(model, ["0", "1"])
        >>> features, logits = backbone(torch.zeros(2, 3, 12, 12))
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 4, 6, 6), (2, 8, 3, 3)], (2, 5))
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        levels: Sequence[int] | None = None,
        *,
        max_levels: int = MAX_LEVELS,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model)
        self.layers: list[str] = []
        self.compiled = False
        self._recording = _Recording()
        self._handles: list[Any] = []
        self.set_layers(layers, levels, max_levels=max_levels, image_shape=image_shape)

    def set_layers(
        self,
        layers: Sequence[str],
        levels: Sequence[int] | None = None,
        *,
        max_levels: int = MAX_LEVELS,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        """Read other submodules from now on; arguments as in the constructor.

        Raises:
            RuntimeError: once this backbone has been compiled: the compiled graph would go on without the new hooks.
        """
        if self.compiled:
            raise RuntimeError(
                f"layers cannot change from {self.layers} to {list(layers)} because this backbone was compiled, and a "
                "compiled graph does not see hooks registered later; build a new HookedBackbone and compile that."
            )
        names = check_names("layers", layers)
        submodules = dict(self.model.named_modules())
        for name in names:
            if name not in submodules or name == "":
                children = ", ".join(child for child, _ in self.model.named_children())
                raise ValueError(
                    f"layers holds {name!r}, but model ({type(self.model).__name__}) has no such submodule; its children "
                    f"are: {children}; model.named_modules() lists all."
                )
        for handle in self._handles:
            handle.remove()
        self.layers = names
        self._handles = [submodules[name].register_forward_hook(_Recorder(self._recording, name)) for name in names]
        self.find_levels(levels, max_levels, image_shape)

    def maps_and_logits(self, images: Tensor) -> tuple[Maps, Tensor]:
        if torch.compiler.is_compiling():
            self.compiled = True
        recorded: dict[str, Any] = {}
        self._recording.maps = recorded
        try:
            logits = self.model(images)
        finally:
            self._recording.maps = None
        for name in self.layers:
            if name not in recorded:
                raise LookupError(
                    f"the submodule {name!r} of model ({type(self.model).__name__}) was not called in its forward pass, so "
                    "it has no output; name one that is."
                )
            if not isinstance(recorded[name], Tensor):
                raise TypeError(
                    f"the submodule {name!r} returned a {type(recorded[name]).__name__}, but a tensor (N, C, H, W) was "
                    "wanted; name a submodule that returns one."
                )
        return [recorded[name] for name in self.layers], logits


def check_names(argument: str, names: Sequence[str]) -> list[str]:
    """`names` as a list of two or more different strings; `argument` is what the errors call it."""
    if isinstance(names, str) or not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise TypeError(f'{argument} is {names!r}, but a list of names was wanted, such as ["layer1", "layer2"].')
    if len(names) < 2:
        raise ValueError(f"{argument} is {list(names)}, but two names or more were wanted: a pyramid fuses levels.")
    if len(set(names)) < len(names):
        raise ValueError(f"{argument} is {list(names)}, but each name was wanted once.")
    return list(names)


def adapt_backbone(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    *,
    logits: str | None = None,
    levels: Sequence[int] | None = None,
    max_levels: int = MAX_LEVELS,
    image_shape: Sequence[int] | None = None,
) -> AdaptedBackbone:
    """features, logits = the last maps of `model` whose sizes halve, and its class scores: any network as a backbone.

    | model | what reads it |
    | --- | --- |
    | has timm's `forward_intermediates` and `forward_head` | `TimmBackbone` |
    | returns `(features, logits)`, takes `is_feat=True` (RepDistiller), or returns `(logits, {"feats": ...})` (mdistiller) | `OutputBackbone` |
    | any, with `layers` | `HookedBackbone` |
    | torchvision's, with `layers` and `logits`, the names of graph nodes | `ExtractorBackbone` |

    Args:
        model: the network.
        layers: names of submodules (or with `logits` of graph nodes) whose outputs are the feature maps, finest first.
        logits: name of the graph node with the logits. A `torch.fx.GraphModule` is taken as an extractor, another model
            is traced by torchvision. None uses hooks.
        levels: positions among the feature maps, finest first; None takes the longest run that halves.
        max_levels: the most levels to take where `levels` is None (the coarsest are kept).
        image_shape: (C, H, W) of the dry pass that finds sizes and channels; None tries what the model says, then 64, 32
            and 224 pixels a side. The dry pass leaves the model as it was, its random numbers and statistics too.

    Returns:
        A module `(images) -> (features, logits)` with `.channels` and `.num_classes`, around `model` (not a copy).

    Raises:
        TypeError, ValueError: a sentence naming what the model returned, or the sizes that make no pyramid.
        RuntimeError: when the model accepts none of the dry pass's images.
        ImportError: when torchvision is needed and missing.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(8, 5))
        >>> backbone = adapt_backbone(model, ["0", "1"])
        >>> backbone.channels, backbone.num_classes
        ([4, 8], 5)
    """  # noqa: E501
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, but a torch.nn.Module was wanted; TimmBackbone.create(name) makes one "
            "from a timm name."
        )
    if logits is not None:
        if layers is None or isinstance(model, torch.fx.GraphModule):
            return ExtractorBackbone(model, layers, logits, levels, max_levels=max_levels, image_shape=image_shape)
        return ExtractorBackbone.create(
            model, layers, logits, levels=levels, max_levels=max_levels, image_shape=image_shape
        )
    if layers is not None:
        return HookedBackbone(model, layers, levels, max_levels=max_levels, image_shape=image_shape)
    if hasattr(model, "forward_intermediates") and hasattr(model, "forward_head"):
        return TimmBackbone(model, levels, max_levels=max_levels, image_shape=image_shape)
    takes_flag = "is_feat" in inspect.signature(model.forward).parameters
    keywords = {"is_feat": True} if takes_flag else None
    return OutputBackbone(model, levels, max_levels=max_levels, image_shape=image_shape, keywords=keywords)
