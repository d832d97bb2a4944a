"""The task protocol: what a trainer asks of a method, compilation with a dynamic batch, the student to take away."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from frskd_fast.models.checkpoints import checksum_of
from frskd_fast.ops import _checks
from frskd_fast.ops.labels import is_mix, mixed_probabilities


class Task(nn.Module):
    """Networks and loss of one method in one module: `task(images, targets)` returns a dict with the loss.

    This is all that a trainer asks of a method; it is the protocol of timm's `TrainingTask`, and more. A subclass sets
    `backbone` and `channels_last`, defines `forward(images, targets=None)` and changes what does not suit it. It is built
    as `SomeTask(backbone, **arguments)` from plain, typed keyword arguments, so that a recipe can name it.

    Attributes:
        backbone: the student's network.
        channels_last: whether images are brought to `torch.channels_last`.
        views: "plain" for images (N, C, H, W); "rotations" for their four rotations (4N, C, H, W), in the order of
            `frskd_fast.mixing.rotate4`. Targets are those of the N images. In evaluation images are plain.
        predicts: "classes" for logits (N, K) of images; "maps" for class scores (N, K, h, w) of pixels. There targets are
            class indices (N, H, W), and `output`, of `forward` and `evaluate` alike, may be smaller than they: whoever
            measures it brings it to their size by `F.interpolate(output, size=targets.shape[-2:], mode="bilinear")`.
            `student()` gives scores at the size of the images.
        may_be_zero: names of the scalars of `forward` that may be exactly zero in the first steps and mean no harm: terms
            that grow over the epochs, or whose weight is 0. The trainer's guard stops a run for any other. A property
            where settings decide.
    """

    backbone: nn.Module
    channels_last: bool
    views: str = "plain"
    predicts: str = "classes"
    may_be_zero: Collection[str] = ()

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        """The loss and what to log.

        Args:
            images: (N, C, H, W), or (4N, C, H, W) where `views` says so.
            targets: as the method's loss takes them; None in evaluation.

        Returns:
            In training mode `loss` (scalar, with its graph), `output` (the student's logits) and the method's own terms
            (scalars, detached); in evaluation mode, or without targets, `output` alone.
        """
        raise NotImplementedError

    def teacher_outputs(self, images: Tensor) -> dict[str, Tensor] | None:
        """What a frozen teacher makes of `images`, by name, for a task whose teacher can be cached; None for all others.

        Such a task defines `forward(images, targets=None, teacher_outputs=None)`, which begins with
        `teacher_outputs = self.teacher_outputs(images) if teacher_outputs is None else teacher_outputs` and asks the teacher
        nothing else. A trainer may then hand in what it has kept from an earlier epoch, and the teacher need not run.

        The outputs are a function of the images and of the task's `FrozenTeacher`s alone: not of targets, of what trains or
        of random numbers. Nothing here needs gradients; callers switch them off.

        Args:
            images: as `forward` takes them.

        Returns:
            Tensors whose rows are in the order of the images: one row, or a fixed number of rows, for each image (4 of each
            where views are rotations). A name says what a tensor is, as files outlive a run: "logits", "auxiliary_1" (finest
            first), ..., "projections"; "features_1", ... for the feature maps, "preact_features_1", ... for those of
            `preact=True`. Names with "features" in them are kept only on request, because they are large.
        """
        return None

    def evaluate(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What validation and test measure of one batch, in evaluation mode and without gradients.

        A method with more to measure than its student's accuracy overrides this, with a switch where it costs more passes
        through a network. `rotation_accuracies` in `frskd_fast.tasks.rotation_metrics` names what learns from rotations.

        Args:
            images: (N, C, H, W), plain ones, whatever `views` is.
            targets: class indices (N,), or (N, H, W) where `predicts` says so.

        Returns:
            `output`, the student's logits, of which the trainer measures `accuracy` and more; besides, scalars under
            the names of further metrics: means over the batch, which the trainer averages by images.
        """
        # Called, not `forward`: that reaches what was compiled or sharded. Do it once first where networks are called apart.
        outputs: dict[str, Tensor] = self(images)
        return {"output": outputs["output"]}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups: one of all that trains, unless the method has settings of its own for some."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters of the networks that no term of the loss reaches: they are frozen, and may well stay random."""
        return []

    def networks(self) -> list[nn.Module]:
        """The modules with parameters that are called as wholes, inner ones first: the units in which FSDP shards.

        These are the task's children and, before them, what a child has under `backbone`, which may be called without it.
        """
        children = [child for child in self.children() if any(True for _ in child.parameters())]
        inner = (getattr(child, "backbone", None) for child in children)
        return [*(module for module in inner if isinstance(module, nn.Module)), *children]

    def start_epoch(self, epoch: int, epochs: int | None) -> None:
        """Called before each epoch, `epoch` = 0, ..., `epochs` - 1 (None: not known), for weights that change with it.

        Hold such a weight in a buffer and write it in place (`self.ramp.fill_(...)`): a compiled step does not compile anew.
        """

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Feature maps (N, C, H, W) by the network that they are of, finest first, for pictures of where it looks."""
        return {"student": features_and_logits(self.backbone, laid_out(images, self.channels_last))[0]}

    def predicted_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Class scores (N, K, h, w) by the network that they are of, where `predicts` is "maps"; for pictures of them."""
        return {"student": self(images)["output"]}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile this module's calls: one graph for forward, loss and backward, and one for every batch size.

        `fullgraph=True` is the default here, so that a graph break is an error, and only the batch dimension of images and
        targets is dynamic (a batch of a single image, and each of training and evaluation mode, has a graph of its own).
        Inductor's CPU code generator adds one condition of its own: where the batch decides whether a sum has more than
        4096 terms, which takes tiny batches of tiny maps, it compiles once more.
        With `(targets_a, targets_b, lam)` the mixing weight is an input of the graph, not a constant. Register hooks and
        build adapters before; copies and pickles of the task are not compiled.

        Args:
            args, kwargs: as for `torch.compile`.

        Example:
            >>> from frskd_fast.models import wrn16x2
            >>> from frskd_fast.tasks import FRSKDTask
            >>> task = FRSKDTask(wrn16x2(num_classes=10))
            >>> task.compile()  # the first call will compile
        """
        kwargs.setdefault("fullgraph", True)
        super().compile(*args, **kwargs)
        compiled = self._compiled_call_impl
        assert compiled is not None
        self._compiled_call_impl = functools.partial(self._call_with_dynamic_batch, compiled)

    def _call_with_dynamic_batch(
        self,
        compiled: Callable[..., dict[str, Tensor]],
        images: Tensor,
        targets: Any = None,
        teacher_outputs: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Call the compiled task; the batch dimension is marked dynamic, other sizes stay constants of the graph."""
        if not self.training:
            targets = teacher_outputs = None  # unused there, and one graph will do
        if is_mix(targets):
            first, second, mix = targets
            if not isinstance(mix, Tensor):
                # Written on the device by a kernel: a copy from the host would wait for the device.
                mix = torch.full((), _checks.unit_interval(mix, "targets[2] (lam)"), device=images.device)
            targets = (first, second, mix)
        given = (teacher_outputs,) if teacher_outputs else ()  # inputs of the graph
        labels = targets if isinstance(targets, tuple) else (targets,)
        for tensor in (images, *labels, *(value for outputs in given for value in outputs.values())):
            if isinstance(tensor, Tensor) and tensor.dim() > 0:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(images, targets, *given)

    def student(self) -> Student:
        """The student alone, `student(images) -> logits`; it shares the task's modules.

        Its `.eval()` reaches the backbone of the task: call `task.train()` before training on, or `copy.deepcopy` it.

        Example:
            >>> from frskd_fast.models import wrn16x2
            >>> from frskd_fast.tasks import FRSKDTask
            >>> student = FRSKDTask(wrn16x2(num_classes=10)).student().eval()
            >>> student(torch.zeros(2, 3, 16, 16)).shape
            torch.Size([2, 10])
        """
        return Student(self.backbone, self.channels_last)

    def get_eval_model(self) -> Student:
        """`student()` under the name that timm's training tasks give it."""
        return self.student()

    def state_dict_for_inference(self) -> dict[str, Tensor]:
        """The state of the student's network, as timm's training tasks hand it out."""
        return self.backbone.state_dict()


class FrozenTeacher(nn.Module):
    """teacher(images) = network(images), which never learns: a checkpoint holds where it came from, not its weights.

    It runs in evaluation mode: `train()` of a task leaves it alone, and a forward pass puts a network that was woken by a
    `train()` of its own back to sleep. Its parameters require no gradients and so reach no optimiser. `state_dict()` has one
    entry, `source`: path and checksum as text in bytes. A state is loaded only into a task whose teacher has the same
    checksum.

    Args:
        network: the trained network. It is used, not copied.
        path: where its weights were read, for the record.

    Attributes:
        network, path: as given.
        checksum: SHA-256 over names, dtypes, shapes and values of the network's state, as it is given here.

    Raises:
        RuntimeError: by `load_state_dict` of a state that another teacher left.

    Example:
        >>> from frskd_fast.models import wrn16x2
        >>> teacher = FrozenTeacher(wrn16x2(num_classes=10), "teacher.safetensors")
        >>> list(teacher.state_dict()), teacher.train().network.training
        (['source'], False)
    """

    source: Tensor

    def __init__(self, network: nn.Module, path: str = "") -> None:
        super().__init__()
        # Its BatchNorms are not folded into convolutions: that saves a few percent of its forward pass, and the folded weights
        # would follow neither a state that is loaded later nor a wider dtype.
        self.network = network.requires_grad_(False)
        self.path = str(path)
        self.checksum = checksum(network)
        text = f"{self.checksum} {self.path}".encode()
        self.register_buffer("source", torch.tensor(list(text), dtype=torch.uint8))
        self.train(False)

    def forward(self, *arguments: Any, **more: Any) -> Any:
        """What the network returns, in evaluation mode. Gradients pass through to what is not frozen."""
        if self.network.training:  # by a `train()` of the network itself, as of every module of a task one by one
            self.network.train(False)
        return self.network(*arguments, **more)

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode, whatever `mode` is."""
        return super().train(False)

    def state_dict(self, *arguments: Any, **more: Any) -> Any:
        """`source` alone."""
        prefix = more.get("prefix", "")
        state = super().state_dict(*arguments, **more)
        for name in [name for name in state if name.startswith(f"{prefix}network.")]:
            del state[name]
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        name = f"{prefix}source"
        if name in state_dict:
            checksum, _, path = bytes(state_dict[name].tolist()).decode().partition(" ")
            if checksum != self.checksum:
                raise RuntimeError(
                    f"{name} is that of a teacher from {path!r} with checksum {checksum[:12]}..., but this task's teacher "
                    f"({self.path!r}) has {self.checksum[:12]}...; build the task with the teacher that it was trained with."
                )
            state_dict[name] = self.source
        # The weights are not in the checkpoint: those that are here stay.
        state_dict.update(self.network.state_dict(prefix=f"{prefix}network."))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def checksum(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of the module's state, on any device the same."""
    return checksum_of(module.state_dict())


class Student(nn.Module):
    """logits = backbone(images)[1]: what is left of a task at test time.

    Args:
        backbone: `backbone(images) -> (features, logits)`, or `-> logits`; checkpoints hold it under `backbone.`, as the
            task's do.
        channels_last: whether to bring images to `torch.channels_last`.

    Calling `student(images)` with images (N, C, H, W) returns logits (N, K).

    Example:
        >>> from frskd_fast.models import wrn16x2
        >>> Student(wrn16x2(num_classes=10)).eval()(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, backbone: nn.Module, channels_last: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels_last = channels_last
        self.training = backbone.training  # not train(), which would wake frozen parts

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return logits_of(self.backbone, laid_out(images, self.channels_last))


def laid_out(images: Tensor, channels_last: bool) -> Tensor:
    """`images`, in `torch.channels_last` where that is wanted."""
    if channels_last and isinstance(images, Tensor) and images.dim() == 4:
        return images.contiguous(memory_format=torch.channels_last)
    return images


def features_and_logits(
    backbone: nn.Module, images: Tensor, preact: bool = False, name: str = "backbone"
) -> tuple[list[Tensor], Tensor]:
    """The backbone's feature maps, before their last ReLU where `preact` says so, and its logits; errors call it `name`."""
    output = called(backbone, images, name, **({"preact": True} if preact else {}))
    if (
        isinstance(output, tuple | list)
        and len(output) == 2
        and isinstance(output[0], tuple | list)
        and isinstance(output[1], Tensor)
    ):
        return list(output[0]), output[1]
    raise TypeError(
        f"{name} ({_kind(backbone)}) returned a {type(output).__name__}, but (list of feature maps, logits) was "
        "wanted; wrap it with frskd_fast.models.adapt_backbone."
    )


def logits_of(backbone: nn.Module, images: Tensor, name: str = "backbone") -> Tensor:
    """The backbone's logits, whether or not feature maps come with them; errors call it `name`."""
    output = called(backbone, images, name)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and len(output) == 2 and isinstance(output[1], Tensor):
        return output[1]
    raise TypeError(
        f"{name} ({_kind(backbone)}) returned a {type(output).__name__}, but logits or (list of feature maps, "
        "logits) was wanted; wrap it with frskd_fast.models.adapt_backbone."
    )


def called(network: Callable[..., Any], images: Tensor, name: str, **more: Any) -> Any:
    """`network(images, **more)`; where one image leaves a BatchNorm one value per channel, the error says so of `images`.

    `network` may be a method of a network.
    """
    if torch.compiler.is_compiling():
        return network(images, **more)
    try:
        return network(images, **more)
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"images has shape {tuple(images.shape)}, of which a BatchNorm of {name} ({_kind(network)}) gets one value per "
            "channel and can take no statistics in training mode; pass two images or more, or larger ones."
        ) from error


def _kind(network: Callable[..., Any]) -> str:
    """The name of the network's class, of a frozen one's own."""
    network = getattr(network, "__self__", network)
    return type(network.network if isinstance(network, FrozenTeacher) else network).__name__


def traceable_targets(targets: Any, logits: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0) -> Any:
    """`targets`, while `torch.compile` traces with the two labels of mixup and cutmix as probabilities (N, K).

    As a Python number the mixing weight would be a constant of the graph, which each batch would have to compile anew.
    """
    if torch.compiler.is_compiling() and is_mix(targets):
        return mixed_probabilities(targets, logits, ignore_index, label_smoothing)
    return targets


def one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the widest of their dtypes: under autocast a LayerNorm leaves float32 among half-precision maps."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
