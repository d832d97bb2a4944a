"""Networks by name: the library's own, timm's, and any importable function or class."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import toy_method
from torch import nn

from frskd_fast import models
from frskd_fast.models import TimmBackbone, create_model, list_models

NAMES = ["cifarresnet18", "resnet18", "resnet34", "resnet50", "wrn16x2"]


def bare(num_classes: int, width: int = 4) -> nn.Module:
    """A network that says nothing of its channels."""
    network = toy_method.ToyNet(num_classes, width)
    del network.channels, network.num_classes
    return network


def test_every_network_of_the_library_is_listed_where_it_is_defined() -> None:
    assert set(NAMES) <= set(list_models())
    assert list_models("resnet*") == ["resnet18", "resnet34", "resnet50"] and list_models("no_such*") == []


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
            r"backbone is 'resnet', but one of .*cifarresnet18, .* was wanted, .*; did you mean 'resnet\d\d' or ",
        ),
        (lambda: create_model("vgg"), ValueError, r"backbone is 'vgg', but one of .* 'mypackage.networks.MyNet'\.$"),
        (lambda: create_model("no_such_package.Net"), ImportError, r"'no_such_package\.Net' cannot be imported"),
        (lambda: create_model("toy_method.NoNet"), ImportError, r"'toy_method\.NoNet' cannot be imported"),
        (lambda: create_model("builtins.dict"), TypeError, r"gave a dict, but a torch\.nn\.Module was wanted"),
    ],
)
def test_what_is_not_known_is_a_sentence(create: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        create()
