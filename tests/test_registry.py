"""Networks by name: the library's own, timm's, and any importable function or class."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toy_method
from torch import nn

from frskd_fast import models
from frskd_fast.models import TimmBackbone, create_model, list_models, register_model, registry

NAMES = ["cifarresnet18", "resnet18", "resnet34", "resnet50", "wrn16x2"]


def bare(num_classes: int, width: int = 4) -> nn.Module:
    """A network that says nothing of its channels."""
    network = toy_method.ToyNet(num_classes, width)
    del network.channels, network.num_classes
    return network


def test_every_network_of_the_library_is_listed_where_it_is_defined() -> None:
    assert set(NAMES) <= set(list_models())
    assert list_models("resnet?x4") == ["resnet8x4"] and list_models("no_such*") == []
    assert all(name == name.lower() for name in list_models() if "resnet" in name or "wrn" in name)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_what_its_function_gives(name: str) -> None:
    model, wanted = create_model(name, 7), getattr(models, name)(num_classes=7)
    assert type(model) is type(wanted) and model.fc.out_features == 7
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in wanted.state_dict().items()
    }


def test_the_default_is_one_for_all_and_arguments_are_passed_on() -> None:
    assert create_model("resnet18").fc.out_features == 100
    assert create_model("wrn16x2", 5, original_preact=True).original_preact


def test_an_alias_is_another_name_of_the_same_network() -> None:
    with torch.device("meta"):
        network = create_model("ResNet50", 7)
        assert network.state_dict().keys() == create_model("cifar_resnet50", 7).state_dict().keys()
        assert network.state_dict().keys() != create_model("resnet50", 7).state_dict().keys()
    assert "ResNet50" not in list_models()


def test_a_name_is_taken_once() -> None:
    def resnet8(num_classes: int) -> nn.Module:
        raise AssertionError

    def ResNet50(num_classes: int) -> nn.Module:
        raise AssertionError

    for builder, owner in (
        (resnet8, r"frskd_fast\.models\.cifar_resnet"),
        (ResNet50, r"frskd_fast\.models\.cifar_resnet"),
    ):
        with pytest.raises(ValueError, match=f"called '{builder.__name__}' is registered by {owner}, but each name"):
            register_model(builder)
    with pytest.raises(ValueError, match="'resnet20' is an alias of 'another', but another model has that name"):
        register_model(aliases=["resnet20"])(types.FunctionType(resnet8.__code__, {}, "another"))
    assert "another" not in list_models()


def test_a_network_registered_with_the_suffix_comes_before_heads_added_to_one_without() -> None:
    assert type(create_model("resnet8_aux", 3)) is models.AuxiliaryNetwork
    builders = registry._builders
    builders["resnet8_aux"] = lambda num_classes: nn.Identity()
    try:
        assert type(create_model("resnet8_aux", 3)) is nn.Identity
    finally:
        del builders["resnet8_aux"]
    with pytest.raises(ValueError, match="backbone is 'no_such_aux'"):
        create_model("no_such_aux")


def test_a_name_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network(toy_method.ToyNet):
        def forward_intermediates(self, images: Any, indices: Any = None, output_fmt: str = "NCHW") -> Any:
            maps, _ = self.forward(images)
            return maps[-1], [maps[index] for index in (range(2) if indices is None else indices)]

        def forward_head(self, last: Any) -> Any:
            return self.fc(last.mean((2, 3)))

    module: Any = types.ModuleType("timm")
    module.is_model, module.__version__ = lambda name: name == "toy", "1.0"
    module.create_model = lambda name, num_classes, **arguments: Network(num_classes, **arguments)
    monkeypatch.setitem(sys.modules, "timm", module)
    model = create_model("timm:toy", 9, width=5)
    assert type(model) is TimmBackbone and (model.channels, model.num_classes) == ([5, 10], 9)


def test_an_import_path() -> None:
    assert type(create_model("toy_method.ToyNet", 4)) is toy_method.ToyNet
    adapted = create_model(f"{__name__}.bare", 4, width=3)
    assert type(adapted) is models.OutputBackbone and (adapted.channels, adapted.num_classes) == ([3, 6], 4)


@pytest.mark.parametrize(
    ("create", "error", "sentence"),
    [
        (
            lambda: create_model("resnet"),
            ValueError,
            r"backbone is 'resnet', but one of .*cifarresnet18, .* was wanted, .*; did you mean 'resnet\d+' or ",
        ),
        (
            lambda: create_model("alexnet_"),
            ValueError,
            r"backbone is 'alexnet_', but one of .* 'mypackage.networks.MyNet'\.$",
        ),
        (lambda: create_model("no_such_package.Net"), ImportError, r"'no_such_package\.Net' cannot be imported"),
        (lambda: create_model("toy_method.NoNet"), ImportError, r"'toy_method\.NoNet' cannot be imported"),
        (lambda: create_model("builtins.dict"), TypeError, r"gave a dict, but a torch\.nn\.Module was wanted"),
    ],
)
def test_what_is_not_known_is_a_sentence(create: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        create()
