"""Adapters: other people's networks as backbones. Their interfaces in small, and the real packages where they import."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from frskd_fast.models import (
    ExtractorBackbone,
    HookedBackbone,
    OutputBackbone,
    TimmBackbone,
    adapt_backbone,
    wrn16x2,
)
from frskd_fast.models.adapters import AdaptedBackbone
from frskd_fast.models.pyramid import pyramid_levels
from frskd_fast.tasks import FRSKDTask

CHANNELS = [4, 6, 8]


class Trunk(nn.Module):
    """A stem and three stages, each but the first at half the size; dropout and BatchNorm, which leave traces if run."""

    def __init__(self, side: int | None = None) -> None:
        super().__init__()
        self.side = side
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = self.stage(4, 4, 1)
        self.layer2 = self.stage(4, 6, 2)
        self.layer3 = self.stage(6, 8, 2)
        self.unused = nn.Identity()
        self.fc = nn.Linear(8, 5)

    @staticmethod
    def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(0.5)
        )

    def maps(self, x: Tensor) -> list[Tensor]:
        if self.side is not None and x.shape[-1] != self.side:
            raise AssertionError(f"Input size {x.shape[-1]} doesn't match model ({self.side}).")
        maps = [self.stem(x)]
        for layer in (self.layer1, self.layer2, self.layer3):
            maps.append(layer(maps[-1]))
        return maps

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.maps(x)[-1])


class TimmLike(Trunk):
    def forward_intermediates(
        self, x: Tensor, indices: list[int] | None = None, norm: bool = False, output_fmt: str = "NCHW"
    ) -> tuple[Tensor, list[Tensor]]:
        assert output_fmt == "NCHW"
        maps = self.maps(x)
        return maps[-1], [maps[i] for i in (range(len(maps)) if indices is None else indices)]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x)


class RepDistillerLike(Trunk):
    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Any:
        maps = self.maps(x)
        logits = self.head(maps[-1])
        return ([*maps, maps[-1].mean((2, 3))], logits) if is_feat else logits


class MDistillerLike(Trunk):
    def forward(self, x: Tensor) -> Any:
        maps = self.maps(x)
        return self.head(maps[-1]), {"feats": maps, "preact_feats": maps[::-1], "pooled_feat": maps[-1].mean((2, 3))}


class PairLike(Trunk):
    def forward(self, x: Tensor) -> Any:
        maps = self.maps(x)
        return maps[1:], self.head(maps[-1])


class ExtractorLike(Trunk):
    def forward(self, x: Tensor) -> Any:
        maps = self.maps(x)
        return {"layer1": maps[1], "layer2": maps[2], "layer3": maps[3], "fc": self.head(maps[-1])}


ADAPTERS: dict[str, tuple[type[Trunk], Callable[[nn.Module], AdaptedBackbone], type[AdaptedBackbone]]] = {
    "timm": (TimmLike, adapt_backbone, TimmBackbone),
    "repdistiller": (RepDistillerLike, adapt_backbone, OutputBackbone),
    "mdistiller": (MDistillerLike, adapt_backbone, OutputBackbone),
    "pair": (PairLike, adapt_backbone, OutputBackbone),
    "extractor": (ExtractorLike, lambda model: ExtractorBackbone(model, logits="fc"), ExtractorBackbone),
    "hooks": (Trunk, lambda model: adapt_backbone(model, ["layer1", "layer2", "layer3"]), HookedBackbone),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_features_and_logits_are_the_models_own(kind: str) -> None:
    network, adapt, adapter = ADAPTERS[kind]
    model = network()
    backbone = adapt(model)
    assert type(backbone) is adapter and backbone.model is model
    assert backbone.channels == CHANNELS and backbone.num_classes == 5
    model.eval()
    images = torch.randn(3, 3, 12, 10)
    features, logits = backbone(images)
    wanted = model.maps(images)
    assert torch.equal(logits, model.head(wanted[-1]))
    for feature, other in zip(features, wanted[1:], strict=True):
        assert torch.equal(feature, other)
    assert [key.removeprefix("model.") for key in backbone.state_dict()] == list(model.state_dict())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_adapter_trains_in_a_task(kind: str) -> None:
    network, adapt, _ = ADAPTERS[kind]
    task = FRSKDTask(adapt(network()))
    task(torch.randn(3, 3, 12, 12), torch.tensor([0, 1, 4]))["loss"].backward()
    assert [name for name, parameter in task.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_dry_pass_leaves_no_trace(kind: str) -> None:
    network, adapt, _ = ADAPTERS[kind]
    model = network().train()
    model.layer2.eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    adapt(model)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def maps_of(*sizes: int | tuple[int, int] | None) -> list[Any]:
    """Maps of these sizes; None is a pooled vector."""
    shapes = [(size, size) if isinstance(size, int) else size for size in sizes]
    return [torch.zeros(1, 2) if shape is None else torch.zeros(1, 2, *shape) for shape in shapes]


@pytest.mark.parametrize(
    ("sizes", "levels"),
    [
        ((112, 56, 28, 14, 7), [1, 2, 3, 4]),
        ((57, 29, 15, 8), [0, 1, 2, 3]),
        ((32, 32, 16, 8, None), [1, 2, 3]),
        ((56, 28, 14, 7, 7), [0, 1, 2, 4]),
        ((64, 16, 8, 1), [1, 2]),
        (((15, 10), (8, 5), (4, 3)), [0, 1, 2]),
        ((4, 2, 1, 1), [0, 1, 3]),
        ((14, 7, 20, 10), [2, 3]),
    ],
)
def test_levels_that_halve_are_found(sizes: tuple[Any, ...], levels: list[int]) -> None:
    assert pyramid_levels(maps_of(*sizes)) == levels


@pytest.mark.parametrize("sizes", [(14, 14, 14), (7, 14, 28), (56, 14), (8, None), ()])
def test_maps_that_make_no_pyramid_are_refused_by_their_sizes(sizes: tuple[Any, ...]) -> None:
    named = "" if not sizes or sizes[0] is None else f"{sizes[0]} x {sizes[0]}"
    with pytest.raises(ValueError, match=rf"the feature maps are {named}.*each is half the size"):
        pyramid_levels(maps_of(*sizes))


def test_levels_can_be_named() -> None:
    assert adapt_backbone(TimmLike(), levels=[0, 2]).channels == [4, 6]
    assert adapt_backbone(TimmLike(), levels=[-2, -1]).channels == [6, 8]
    assert adapt_backbone(RepDistillerLike(), max_levels=2).channels == [6, 8]
    features, _ = adapt_backbone(TimmLike(), levels=[0, 2])(torch.zeros(1, 3, 8, 8))
    assert [tuple(feature.shape[1:]) for feature in features] == [(4, 8, 8), (6, 4, 4)]


def test_the_dry_pass_finds_an_image_size_or_takes_ours() -> None:
    assert adapt_backbone(TimmLike(side=32)).channels == CHANNELS
    assert adapt_backbone(TimmLike(side=12), image_shape=(3, 12, 12)).channels == CHANNELS
    model = TimmLike(side=12)
    model.pretrained_cfg = {"input_size": (3, 12, 12)}
    assert adapt_backbone(model).channels == CHANNELS
    with pytest.raises(RuntimeError, match=r"failed on every image .*3 x 64 x 64.*doesn't match model.*image_shape="):
        adapt_backbone(TimmLike(side=12))
    grey = TimmLike()
    grey.stem = nn.Conv2d(1, 4, 3, padding=1)
    assert adapt_backbone(grey.bfloat16()).channels == CHANNELS
    assert adapt_backbone(TimmLike().to("meta")).channels == CHANNELS


def test_hooks_hold_no_tensors_and_belong_to_their_copy() -> None:
    backbone = HookedBackbone(Trunk().eval(), ["layer1", "layer2"])
    images = torch.randn(2, 3, 8, 8)
    wanted = backbone(images)
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        for module in other.model.layer1:
            nn.init.zeros_(module.weight) if isinstance(module, nn.Conv2d) else None
        assert not torch.equal(other(images)[0][0], wanted[0][0])
        assert torch.equal(backbone(images)[0][0], wanted[0][0])
        assert backbone._recording.maps is None and other._recording.maps is None
    backbone.set_layers(["layer2", "layer3"])
    assert backbone.channels == [6, 8]
    assert len(backbone.model.layer1._forward_hooks) == 0


def test_hooks_are_compiled_and_later_ones_refused() -> None:
    torch.compiler.reset()
    backbone = HookedBackbone(Trunk().eval(), ["layer1", "layer2"])
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(backbone, backend=counter, fullgraph=True)
    for seed in range(3):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        for got, wanted in zip(compiled(images)[0], backbone.model.maps(images)[1:3], strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count == 1
    with pytest.raises(
        RuntimeError, match=r"layers cannot change from \['layer1', 'layer2'\] to \['layer2', 'layer3'\]"
    ):
        backbone.set_layers(["layer2", "layer3"])


class Strange(Trunk):
    """Returns what `make` makes of the maps and the logits."""

    def __init__(self, make: Callable[[list[Tensor], Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        maps = self.maps(x)
        return self.make(maps, self.head(maps[-1]))


class Headless(Trunk):
    def forward_intermediates(self, x: Tensor) -> None: ...


class Tupled(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Module()
        self.pair.forward = lambda x: (x, x)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.pair(self.maps(x)[-1])[0])


def test_auxiliary_outputs_of_training_are_refused() -> None:
    class Auxiliary(Trunk):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return (logits, logits) if self.training else logits

    backbone = adapt_backbone(Auxiliary(), ["layer1", "layer2"])
    with pytest.raises(TypeError, match=r"logits of model \(Auxiliary\) are a tuple.*switch auxiliary outputs off"):
        backbone(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: adapt_backbone("resnet18"), TypeError, r"model is a str, .*TimmBackbone.create"),
        (lambda: OutputBackbone(3), TypeError, "model is a int, but a torch.nn.Module"),
        (lambda: adapt_backbone(Trunk()), TypeError, r"\(Trunk\) returned a Tensor, but .*children are: stem, layer1"),
        (lambda: adapt_backbone(Strange(lambda maps, z: (maps, maps))), TypeError, "returned a tuple, but"),
        (
            lambda: adapt_backbone(Strange(lambda maps, z: (maps, maps[0]))),
            TypeError,
            r"logits .* are of shape \(2, 4, ",
        ),
        (lambda: adapt_backbone(Strange(lambda maps, z: (maps[:2], z))), ValueError, "maps are 64 x 64, 64 x 64, but"),
        (lambda: TimmBackbone(Headless()), TypeError, "has no method forward_head"),
        (lambda: ExtractorBackbone(Trunk()), TypeError, "returned a Tensor, but a mapping"),
        (
            lambda: ExtractorBackbone(ExtractorLike(), logits="head"),
            LookupError,
            "'head' is not among .*'layer3', 'fc'",
        ),
        (lambda: adapt_backbone(Trunk(), ["layer1", "layer9"]), ValueError, "layers holds 'layer9', .*stem, layer1"),
        (lambda: adapt_backbone(Trunk(), ["layer1", "unused"]), LookupError, "'unused' .* was not called"),
        (lambda: adapt_backbone(Tupled(), ["layer1", "pair"]), TypeError, "'pair' returned a tuple"),
        (lambda: adapt_backbone(Trunk(), "layer1"), TypeError, "layers is 'layer1', but a list of names"),
        (lambda: adapt_backbone(Trunk(), ["layer1"]), ValueError, r"layers is \['layer1'\], but two names"),
        (lambda: adapt_backbone(Trunk(), ["layer1", "layer1"]), ValueError, "each name was wanted once"),
        (lambda: adapt_backbone(Trunk(), ["layer3", "layer2"]), ValueError, "maps are 16 x 16, 32 x 32, but"),
        (lambda: adapt_backbone(Strange(lambda m, z: {"out": z}), ["stem", "layer2"]), TypeError, "are a dict, but"),
        (lambda: adapt_backbone(TimmLike(), levels=[1]), ValueError, "two positions or more"),
        (lambda: adapt_backbone(TimmLike(), levels=[1, 3]), ValueError, r"levels=\[1, 3\] chooses .*64 x 64, 16 x 16"),
        (lambda: adapt_backbone(TimmLike(), levels=[1, 4]), ValueError, "levels holds 4, but there are 4"),
        (lambda: adapt_backbone(TimmLike(), levels=["1", "2"]), TypeError, "levels is .*a list of positions"),
        (lambda: adapt_backbone(TimmLike(), max_levels=1), ValueError, "max_levels is 1"),
        (
            lambda: adapt_backbone(TimmLike(), image_shape=(32, 32)),
            ValueError,
            r"image_shape is \(32, 32\), but \(channels",
        ),
    ],
)
def test_wrong_arguments_are_refused(build: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build()


def test_missing_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "torchvision", "torchvision.models", "torchvision.models.feature_extraction"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'frskd_fast\[timm\]'"):
        TimmBackbone.create("resnet18")
    with pytest.raises(ImportError, match=r"pip install 'frskd_fast\[vision\]'.*leave logits out"):
        adapt_backbone(Trunk(), ["layer1", "layer2"], logits="fc")


def imported(name: str) -> ModuleType:
    """The optional package, or skip: an installed one may belong to another PyTorch and fail in its own ways."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} is installed, but does not import beside this PyTorch: {error}")


def test_a_name_that_timm_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ["resnet18", "resnet34"]
    created = []

    def create_model(name: str, **arguments: Any) -> nn.Module:
        created.append((name, arguments))
        return TimmLike()

    module = SimpleNamespace(
        __version__="1.0", is_model=known.__contains__, list_models=lambda: known, create_model=create_model
    )
    monkeypatch.setitem(sys.modules, "timm", module)
    with pytest.raises(
        ValueError, match=r"name is 'resnet81\.a1_in1k', but timm 1.0 has no such model; it has 'resnet18'"
    ):
        TimmBackbone.create("resnet81.a1_in1k")
    with pytest.raises(ValueError, match=r"'vgg', but timm 1.0 has no such model; timm.list_models\(\) gives"):
        TimmBackbone.create("vgg")
    for name in ("resnet18.a1_in1k", "hf-hub:somebody/model"):
        TimmBackbone.create(name, num_classes=5)
        assert created.pop() == (name, {"num_classes": 5})


@pytest.mark.parametrize(
    ("name", "channels", "side"),
    [
        ("resnet18", [64, 128, 256, 512], 64),
        ("convnext_atto", [40, 80, 160, 320], 64),
        ("mobilenetv3_small_050", [8, 16, 24, 288], 64),
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768], 224),
    ],
)
def test_models_of_timm(name: str, channels: list[int], side: int) -> None:
    imported("timm")
    backbone = TimmBackbone.create(name, num_classes=7)
    assert backbone.channels == channels and backbone.num_classes == 7
    images = torch.randn(2, 3, side, side)
    backbone.eval()
    features, logits = backbone(images)
    torch.testing.assert_close(logits, backbone.model(images))
    assert [feature.shape[1] for feature in features] == channels
    task = FRSKDTask(backbone)
    task.train()(images, torch.tensor([0, 6]))["loss"].backward()
    assert [name for name, parameter in task.named_parameters() if parameter.grad is None] == []


def test_a_vision_transformer_of_timm_is_refused_by_its_sizes() -> None:
    timm = imported("timm")
    with pytest.raises(ValueError, match=r"14 x 14, 14 x 14.*each is half"):
        adapt_backbone(timm.create_model("vit_tiny_patch16_224"))


@pytest.mark.parametrize("logits", ["fc", None])
def test_models_of_torchvision(logits: str | None) -> None:
    torchvision = imported("torchvision")
    model = torchvision.models.resnet18(num_classes=7)
    backbone = adapt_backbone(model, ["layer1", "layer2", "layer3", "layer4"], logits=logits)
    assert backbone.channels == [64, 128, 256, 512] and backbone.num_classes == 7
    images = torch.randn(2, 3, 64, 64)
    task = FRSKDTask(backbone)
    task(images, torch.tensor([0, 6]))["loss"].backward()
    assert [name for name, parameter in task.named_parameters() if parameter.grad is None] == []
    torch.testing.assert_close(task.student().eval()(images), model.eval()(images))


def test_a_backbone_of_ours_needs_no_adapter_but_takes_one() -> None:
    model = wrn16x2(num_classes=5)
    assert adapt_backbone(model).channels == model.channels
    assert adapt_backbone(model, max_levels=2).channels == model.channels[1:]
