"""FFL in one module: several networks, the module that fuses their maps, and the loss (Kim et al., ICPR 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frskd_fast.losses import FFLLoss
from frskd_fast.losses.base import channels_of
from frskd_fast.models import FusionModule
from frskd_fast.models.registry import created
from frskd_fast.ops import _checks

from .base import Student, Task, called, features_and_logits, laid_out, one_dtype, traceable_targets
from .networks import check_module, check_same_classes, like, with_channels, with_shuffled_weights

FUSED, SUBNETWORK = "fused", "subnetwork_"


class IndependentNetworks(nn.Module):
    """([z_1, ..., z_S], [f_1, ..., f_S]) of networks that share nothing, in the form of `frskd_fast.models.FFLResNet`.

    Args:
        networks: S >= 2 modules, `network(images) -> (features, logits)`. They are used, not copied.

    Attributes:
        networks: as given, in a `ModuleList`.
        channels: channels of the last map of each.
        num_classes: number of logits, K.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.channels = [channels_of(network)[-1] for network in networks]
        self.num_classes: Any = getattr(networks[0], "num_classes", None)

    def forward(self, images: Tensor, pyramids: bool = False) -> tuple[list[Tensor], list[Any]]:
        outputs = [features_and_logits(network, images) for network in self.networks]
        return [logits for _, logits in outputs], [maps if pyramids else maps[-1] for maps, _ in outputs]

    def subnetwork(self, index: int) -> nn.Module:
        """Network number `index`, counted from 0."""
        return self.networks[index]


class FusedNetwork(nn.Module):
    """logits = fusion(f_1, ..., f_S), (f_1, ..., f_S) the last maps of all sub-networks.

    Args:
        backbone: the sub-networks: an `FFLResNet`, `IndependentNetworks` or a module alike.
        fusion: the `FusionModule`.

    Attributes:
        backbone, fusion: as given.
        num_classes: number of logits, K.

    Calling `network(images)` returns the maps of the first sub-network, finest first, and the fused logits (N, K); with
    `all_logits=True` the list of the sub-networks' logits, and the fused ones.
    """

    def __init__(self, backbone: nn.Module, fusion: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.fusion = fusion
        self.num_classes: Any = backbone.num_classes

    def forward(self, images: Tensor, all_logits: bool = False) -> tuple[list[Tensor], Tensor]:
        logits, pyramids = self.backbone(images, pyramids=True)
        fused = self.fusion(one_dtype([maps[-1] for maps in pyramids]))
        return (logits if all_logits else pyramids[0]), fused


class FFLTask(Task):
    """loss = sum_s CE(z_s) + CE(z_f) + r(epoch) * [sum_s J(z_s, z_f) + J(z_f, mean_s z_s)], z_f the fused classifier's logits.

    Several networks and a classifier that sees the last maps of all of them learn from the labels and from each other, J as in
    `FFLLoss`. r(e) = exp(-5 (1 - min(e, ramp_epochs) / ramp_epochs)^2) grows from 0.0067 to 1. Afterwards one takes a
    sub-network away, or the whole, whose fused classifier is the most accurate.

    Args:
        backbone: `frskd_fast.models.FFLResNet`, whose two sub-networks share a trunk; or the first of independent networks,
            `backbone(images) -> (features, logits)`. It is used, not copied.
        peers: the other independent networks: a network, the name of one for `create_model`, or a list of these. None takes
            one copy of `backbone`, in which the initial values of each parameter are shuffled. An `FFLResNet` has none.
        temperature, target_offset: of J, as in `FFLLoss`.
        ramp_epochs: after how many epochs r is 1; 0 for r = 1 throughout. `start_epoch` sets r; before it is called, r is 1.
        fusion_weight_decay: the weight decay of the fusion module; None leaves it to the optimiser.
        which: "fused", "subnetwork_1", ..., "subnetwork_S": whose logits are `output`, and what `student()` gives unless asked
            for another.
        evaluate_all: measure all classifiers in `evaluate`, which takes a second pass through the networks.
        channels_last: keep parameters and images in `torch.channels_last`.

    Attributes:
        net: the `FusedNetwork`; checkpoints hold `net.backbone.*` and `net.fusion.*`, whose names below are the original's.
        backbone: the network of `which`, `backbone(images) -> (features, logits)`.
        names: "subnetwork_1", ..., "subnetwork_S", "fused".
        consistency_weight: r, a buffer.
        ramp_epochs, fusion_weight_decay, which, evaluate_all, channels_last: as given.

    Calling `task(images, targets=None)` with images (N, C, H, W) and targets as `FFLLoss` takes them returns in training mode
    a dict with `loss`, `output`, the logits (N, K) of all others under `subnetwork_1_output` and so on, and for every one the
    terms `subnetwork_1_ce`, `subnetwork_1_kd`, ..., `fused_ce`, `fused_kd` (scalars before their weights, detached). In
    evaluation mode, or without targets, the dict is `{"output": logits}`.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.models import resnet8
        >>> from frskd_fast.tasks import FFLTask
        >>> task = FFLTask(resnet8(num_classes=10), "resnet14", which="subnetwork_1")
        >>> parts = task(torch.randn(4, 3, 16, 16), torch.arange(4))
        >>> list(parts)[:4]
        ['loss', 'output', 'subnetwork_2_output', 'fused_output']
        >>> parts["loss"].backward()
        >>> task.start_epoch(0, 300)
        >>> round(task.consistency_weight.item(), 4), list(task.students())
        (0.0067, ['subnetwork_1', 'subnetwork_2', 'fused'])

    Source: Kim et al., ICPR 2020 (arXiv 1904.09058), as released. Independent networks and more than two are this library's
    reading: the released code has the shared trunk alone.
    """

    consistency_weight: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        peers: str | nn.Module | Sequence[str | nn.Module] | None = None,
        temperature: float = 3.0,
        target_offset: float = 1e-7,
        *,
        ramp_epochs: int = 80,
        fusion_weight_decay: float | None = 1e-5,
        which: str = FUSED,
        evaluate_all: bool = True,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.loss = FFLLoss(temperature, target_offset)
        self.ramp_epochs = _checks.whole_number(ramp_epochs, "ramp_epochs")
        if self.ramp_epochs < 0:
            raise ValueError(f"ramp_epochs is {self.ramp_epochs}, but at least 0 was wanted.")
        self.fusion_weight_decay = fusion_weight_decay
        if fusion_weight_decay is not None:
            self.fusion_weight_decay = _checks.finite_number(fusion_weight_decay, "fusion_weight_decay")
            if self.fusion_weight_decay < 0.0:
                raise ValueError(f"fusion_weight_decay is {fusion_weight_decay}, but None or at least 0 was wanted.")
        networks = _side_by_side(backbone, peers)
        fusion = like(backbone, FusionModule(networks.channels, networks.num_classes))  # type: ignore[arg-type]
        self.net = FusedNetwork(networks, fusion)
        self.names = (*(f"{SUBNETWORK}{number}" for number in range(1, 1 + len(fusion.channels))), FUSED)  # type: ignore[arg-type]
        self.which = self._checked(which)
        self.evaluate_all = bool(evaluate_all)
        self.register_buffer("consistency_weight", fusion.fc2.weight.new_ones(()))  # type: ignore[operator, union-attr]
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The network of `which`."""
        return self._network(self.which)

    def _network(self, which: str) -> nn.Module:
        index = self.names.index(self._checked(which))
        if which == FUSED:
            return self.net
        networks: Any = self.net.backbone
        network: nn.Module = networks.subnetwork(index)
        return network

    def _checked(self, which: str) -> str:
        if which not in self.names:
            raise ValueError(f"which is {which!r}, but one of {', '.join(map(repr, self.names))} was wanted.")
        return which

    def start_epoch(self, epoch: int, epochs: int | None = None) -> None:
        """Set r; from `ramp_epochs` on it is 1."""
        missing = 1.0 - min(max(epoch, 0), self.ramp_epochs) / self.ramp_epochs if self.ramp_epochs else 0.0
        self.consistency_weight.fill_(math.exp(-5.0 * missing**2))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The networks' parameters, and those of the fusion module with a weight decay of their own."""
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in module.parameters() if parameter.requires_grad]}
            for module in (self.net.backbone, self.net.fusion)
        ]
        if self.fusion_weight_decay is not None:
            groups[1]["weight_decay"] = self.fusion_weight_decay
        return groups

    def networks(self) -> list[nn.Module]:
        """As of every task, and before these what `student()` calls without the whole: networks, or layers that two share."""
        modules = set(self.modules())
        parts: list[nn.Module] = []
        for name in self.names[:-1]:
            network = self._network(name)
            parts += [network] if network in modules else network.children()
        return [*dict.fromkeys(parts), *super().networks()]

    def _logits(self, images: Tensor) -> dict[str, Tensor]:
        logits, fused = called(self.net, laid_out(images, self.channels_last), "backbone", all_logits=True)
        return dict(zip(self.names, one_dtype([*logits, fused]), strict=True))

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        """Return the dict described above."""
        outputs = self._logits(images)
        if targets is None or not self.training:
            return {"output": outputs[self.which]}
        *logits, fused = outputs.values()
        parts = self.loss(
            logits,
            fused,
            traceable_targets(targets, fused),
            consistency_weight=self.consistency_weight,
            return_parts=True,
        )
        ce, kd = [*parts.ce.unbind(), parts.ce_fused], [*parts.kd.unbind(), parts.kd_fused]
        others = {f"{name}_output": value for name, value in outputs.items() if name != self.which}
        terms: dict[str, Tensor] = {}
        for name, own_ce, own_kd in zip(self.names, ce, kd, strict=True):
            terms |= {f"{name}_ce": own_ce, f"{name}_kd": own_kd}
        return {"loss": parts.loss, "output": outputs[self.which], **others, **terms}

    def evaluate(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`output`; with `evaluate_all` the accuracy of all others, and of the mean of the sub-networks' logits."""
        measured = super().evaluate(images, targets)
        if not self.evaluate_all:
            return measured
        outputs = self._logits(images)
        *logits, _ = outputs.values()
        others = {name: value for name, value in outputs.items() if name != self.which}
        for name, value in {**others, "ensemble": torch.stack(logits).mean(0)}.items():
            measured[f"{name}_accuracy"] = (value.argmax(1) == targets).float().mean()
        return measured

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Feature maps of every sub-network."""
        _, pyramids = self.net.backbone(laid_out(images, self.channels_last), pyramids=True)
        return dict(zip(self.names, pyramids, strict=False))

    def student(self, which: str | None = None) -> Student:
        """A sub-network or the fused classifier alone, as `Task.student`; None for the one that the task was told."""
        return Student(self._network(which or self.which), self.channels_last)

    def students(self) -> dict[str, Student]:
        """All of them by name; take the one that is accurate enough for its cost."""
        return {name: self.student(name) for name in self.names}

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"which={self.which!r}, ramp_epochs={self.ramp_epochs}, channels_last={self.channels_last}"


def _side_by_side(backbone: Any, peers: Any) -> nn.Module:
    """The sub-networks in one module."""
    check_module(backbone, "backbone")
    if callable(getattr(backbone, "subnetwork", None)):
        if peers is not None:
            raise ValueError(
                f"peers were given, but backbone ({type(backbone).__name__}) has its sub-networks already; leave peers out."
            )
        shared: nn.Module = backbone
        return shared
    first = with_channels(backbone)
    classes = getattr(first, "num_classes", None)
    if not isinstance(classes, int):
        raise ValueError(
            f"backbone ({type(first).__name__}) does not say how many classes it scores; give it an attribute num_classes."
        )
    if peers is None:
        peers = [with_shuffled_weights(first)]
    elif not isinstance(peers, list | tuple):
        peers = [peers]
    if not peers:
        raise ValueError(
            "peers is empty, but at least one other network was wanted: one alone has no other to learn from."
        )
    others: list[nn.Module] = []
    for index, peer in enumerate(peers):
        name = f"peers[{index}]"
        other = like(first, created(peer, classes, {}, name)) if isinstance(peer, str) else peer
        check_module(other, name)
        other = with_channels(other)
        check_same_classes(first, other, name)
        if any(other is known for known in (first, *others)):
            raise ValueError(
                f"{name} is a network that was given before, but another one was wanted; copy.deepcopy it."
            )
        others.append(other)
    return IndependentNetworks([first, *others])
