"""Adapters: other people's networks as `model(images) -> (features, logits)`, finest feature map first.

Neither timm nor torchvision is imported here unless a function that needs it is called.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .dry_pass import dry_pass
from .pyramid import MAX_LEVELS, check_levels, pyramid_levels

Maps = Sequence[Tensor]


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
            ValueError: for a name that timm does not know, with those of a similar spelling.
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
    if hasattr(model, "student_maps"):
        raise TypeError(
            f"model ({type(model).__name__}) is a segmentation network, but one with logits (N, K) was wanted; "
            "FRSKDSegmentationTask trains segmentation networks."
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
