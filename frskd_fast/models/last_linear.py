"""A network's classifier: its last linear layer."""

from __future__ import annotations

from torch import nn


def last_linear(network: nn.Module, name: str | None = None) -> str:
    """The name of the linear layer that makes the logits.

    Args:
        network: any module.
        name: the layer's name; None takes the network's attribute `classifier_name` where it has one, else the
            `torch.nn.Linear` that was registered last.

    Raises:
        ValueError: when there is no such layer, saying which linear layers there are.

    Example:
        >>> last_linear(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.Softmax(1)))
        '2'
    """
    linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    wanted = name or getattr(network, "classifier_name", None) or (linear[-1] if linear else None)
    if wanted in linear:
        return str(wanted)
    found = f"its linear layers are {', '.join(linear[-5:])}" if linear else "it has no linear layer at all"
    raise ValueError(
        f"the classifier of {type(network).__name__} was looked for "
        + ("among its torch.nn.Linear layers" if wanted is None else f"under the name {wanted!r}")
        + f", but {found}; name the layer whose output is the logits."
    )
