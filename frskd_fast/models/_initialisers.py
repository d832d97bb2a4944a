"""How the networks' layers start where it is not PyTorch's own way."""

from torch import nn


def initialise_convolutions(module: nn.Module) -> None:
    """Every convolution of `module`: weights N(0, 2 / (kernel area * output channels)), biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def initialise_linears(module: nn.Module, std: float | None = None) -> None:
    """Every linear layer of `module`: bias 0, weights N(0, std^2), or as they are where `std` is None."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
            if std is not None:
                nn.init.normal_(layer.weight, 0.0, std)
