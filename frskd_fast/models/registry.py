"""Networks by name: those of this library, of timm, or any importable function or class."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

from torch import nn

from .adapters import TimmBackbone, adapt_backbone
from .auxiliary import with_auxiliary_heads

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}
_aliases: dict[str, str] = {}


@overload
def register_model(builder: Builder) -> Builder: ...
@overload
def register_model(*, aliases: Sequence[str]) -> Callable[[Builder], Builder]: ...


def register_model(
    builder: Builder | None = None, *, aliases: Sequence[str] = ()
) -> Builder | Callable[[Builder], Builder]:
    """Decorate a function or class that `create_model` calls with `num_classes` when its name is asked for.

    Args:
        builder: the function or class.
        aliases: other names that `create_model` accepts and `list_models` does not show.

    Raises:
        ValueError: when another one has the name.

    Example:
        >>> from frskd_fast.models import list_models, register_model, wrn16x2
        >>> @register_model
        ... def wrn16x2_for_a_docstring(num_classes=100):
        ...     return wrn16x2(num_classes)
        >>> list_models("*docstring")
        ['wrn16x2_for_a_docstring']
    """

    def register(builder: Builder) -> Builder:
        name = builder.__name__
        known = _builders.get(name, builder)
        if (known.__module__, known.__qualname__) != (builder.__module__, builder.__qualname__) or name in _aliases:
            owner = known.__module__ if name in _builders else _builders[_aliases[name]].__module__
            raise ValueError(f"a model called {name!r} is registered by {owner}, but each name was wanted once.")
        for alias in aliases:
            if alias in _builders or _aliases.get(alias, name) != name:
                raise ValueError(f"{alias!r} is an alias of {name!r}, but another model has that name.")
        _builders[name] = builder
        _aliases.update(dict.fromkeys(aliases, name))
        return builder

    return register if builder is None else register(builder)


def list_models(pattern: str = "*") -> list[str]:
    """The names of the registered networks that match `pattern`, sorted. Each may get the suffix `_aux` in `create_model`.

    Example:
        >>> from frskd_fast.models import list_models
        >>> list_models("resnet8*")
        ['resnet8', 'resnet8x4']
    """
    return sorted(fnmatch.filter(_builders, pattern))


def create_model(name: str, num_classes: int = 100, **arguments: Any) -> nn.Module:
    """model = the network called `name`, with `num_classes` logits: `model(images) -> (features, logits)`.

    Args:
        name: one of `list_models()`, or its spelling in the original code (`ResNet50` is `cifar_resnet50`); or "timm:NAME" for
            a network of timm (installed by the extra `timm`); or the import path of a function or class,
            "package.module.name". A registered name with the suffix `_aux` gives that network with HSAKD's auxiliary heads.
        num_classes: number of logits K.
        arguments: further keyword arguments of the network.

    Returns:
        A module `(images) -> (features, logits)`. What an import path gives is adapted where it has no `channels` and is no
        segmentation network (`student_maps`). With
        `_aux` an `AuxiliaryNetwork`, `(images) -> (logits, auxiliary logits)`.

    Raises:
        ValueError: when no such network is known, naming those with a similar spelling.
        ImportError: when the import path or timm cannot be imported.

    Example:
        >>> from frskd_fast.models import create_model
        >>> create_model("wrn16x2", 10).channels
        [32, 64, 128]
    """
    return created(name, num_classes, arguments, "backbone")


def created(name: str, num_classes: int, arguments: Mapping[str, Any], argument: str) -> nn.Module:
    """`create_model`, whose errors call the name `argument`."""
    for wanted in (name, name.removesuffix("_aux")):
        builder = _builders.get(_aliases.get(wanted, wanted))
        if builder is not None:
            network = builder(num_classes=num_classes, **arguments)
            return network if wanted == name else with_auxiliary_heads(network, num_classes)
    if name.startswith("timm:"):
        return TimmBackbone.create(name.removeprefix("timm:"), num_classes=num_classes, **arguments)
    if "." in name:
        imported_builder = imported(name, f"{argument} ", "a function or class that is called with num_classes,")
        network = imported_builder(num_classes=num_classes, **arguments)
        if not isinstance(network, nn.Module):
            raise TypeError(f"{argument} gave a {type(network).__name__}, but a torch.nn.Module was wanted.")
        own = any(hasattr(network, attribute) for attribute in ("channels", "student_maps"))
        return network if own else adapt_backbone(network)
    alike = difflib.get_close_matches(name, [*_builders, *_aliases], n=3)
    raise ValueError(
        f"{argument} is {name!r}, but one of {', '.join(list_models())} was wanted, or 'timm:NAME' for a network of timm, or "
        "an import path such as 'mypackage.networks.MyNet'"
        + (f"; did you mean {' or '.join(map(repr, alike))}?" if alike else ".")
    )


def imported(path: str, argument: str = "", wanted: str = "a function or class") -> Callable[..., Any]:
    """The class or function with the import path `package.module.name`.

    Args:
        path: the import path.
        argument, wanted: what the message of a failure calls the path, and what was to be found there.

    Raises:
        ImportError: as a sentence.
    """
    module_name, _, attribute = path.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(
            f"{argument}{path!r} cannot be imported ({error}); give the path of {wanted} in a package that Python finds "
            "(its folder may have to be in PYTHONPATH)."
        ) from error


def is_own_network(path: str) -> bool:
    """Whether this is the import path of a network of this package, which takes plain values and downloads nothing.

    Example:
        >>> is_own_network("frskd_fast.models.FFLResNet"), is_own_network("frskd_fast.models.load_teacher")
        (True, False)
    """
    if not path.startswith(f"{__package__}."):
        return False
    try:
        found: Any = imported(path)
    except ImportError:
        return False
    # Not what its module has imported from elsewhere.
    return isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(f"{__package__}.")
