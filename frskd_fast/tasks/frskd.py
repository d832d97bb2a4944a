"""FRSKD in one module: student, self-teacher and loss (Ji et al., CVPR 2021, arXiv 2103.08273)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from frskd_fast import _dispatch
from frskd_fast.losses import FRSKDLoss
from frskd_fast.models import BiFPN, BiFPNc, adapt_backbone
from frskd_fast.models.adapters import dry_pass
from frskd_fast.ops import _checks

MEMORY = ("normal", "low")
# These take cumulative averages without a counter for a momentum of 0.
COUNTERLESS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FRSKDTask(nn.Module):
    """loss = CE(student) + CE(self-teacher) + alpha * KD + beta * sum_l AT_l, all three modules in one forward pass.

    Everything that trains is a submodule, so that DistributedDataParallel, FSDP, autocast and torch.compile see one module
    whose forward ends in the loss; features are never cast or copied between the networks and the loss.

    Args:
        backbone: the student, `backbone(images) -> (features, logits)`, finest map first: a network of
            `frskd_fast.models`, an adapted one (`adapt_backbone`), or your own. It is used, not copied.
        self_teacher: `self_teacher(features) -> (features, logits)`. None builds `BiFPNc` for the backbone's `.channels`;
            a backbone without them goes through `adapt_backbone` first.
        loss: called as `FRSKDLoss` with `return_parts=True`. None is `FRSKDLoss()`, the paper's CIFAR-100 recipe:
            alpha 2, beta 100, temperature 4.
        num_classes: number of logits K of the self-teacher built here; None takes the backbone's own.
        memory: "normal", or "low" to keep none of the self-teacher's intermediate maps for backward and compute them a
            second time there. Losses, gradients and statistics are the same. The price is one more forward of the
            self-teacher in each step: its three passes (one forward, two backward) become four.
        channels_last: keep parameters and images in `torch.channels_last`, the layout in which convolutions and this
            library's attention read whole pixels. Parameters are converted here, once; images at each call. False leaves
            every layout as it is.

    Attributes:
        backbone, self_teacher, loss: the three modules; their names lead the keys of `state_dict()`.
        memory, channels_last: as given.

    Calling `task(images, targets=None)` with images (N, C, H, W) and targets as `FRSKDLoss` takes them (class indices (N,);
    `(targets_a, targets_b, lam)` of mixup or cutmix; probabilities (N, K)) returns in training mode a dict:

    | key | value |
    | --- | --- |
    | `loss` | scalar, float32 (float64); call `.backward()` on it |
    | `output`, `teacher_output` | logits (N, K) of student and self-teacher, attached to the graph |
    | `ce_student`, `ce_teacher`, `kd`, `feature` | scalars before their weights, detached, for logging |

    In evaluation mode, or without targets, the student works alone and the dict is `{"output": logits}`.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.models import wrn16x2
        >>> from frskd_fast.tasks import FRSKDTask
        >>> task = FRSKDTask(wrn16x2(num_classes=10))
        >>> parts = task(torch.randn(4, 3, 16, 16), torch.arange(4))
        >>> list(parts)
        ['loss', 'output', 'ce_student', 'ce_teacher', 'kd', 'feature', 'teacher_output']
        >>> parts["loss"].backward()
        >>> task.student().eval()(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 10])

    Source: Ji et al., CVPR 2021, section 3; the dict is that of timm's training tasks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        self_teacher: nn.Module | None = None,
        loss: nn.Module | None = None,
        *,
        num_classes: int | None = None,
        memory: str = "normal",
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        for name, module in (("backbone", backbone), ("self_teacher", self_teacher), ("loss", loss)):
            if not isinstance(module, nn.Module) and (module is not None or name == "backbone"):
                raise TypeError(f"{name} is a {type(module).__name__}, but a torch.nn.Module was wanted.")
        if memory not in MEMORY:
            raise ValueError(f"memory is {memory!r}, but 'normal' or 'low' was wanted.")
        if self_teacher is None:
            if not isinstance(getattr(backbone, "channels", None), list | tuple):
                backbone = adapt_backbone(backbone)
            self_teacher = _built_self_teacher(backbone, num_classes)
        elif num_classes is not None:
            raise ValueError(
                f"num_classes is {num_classes}, but self_teacher came with a classifier of its own; leave one of them out."
            )
        self.backbone = backbone
        self.self_teacher = self_teacher
        self.loss = FRSKDLoss() if loss is None else loss
        self.memory = memory
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        """Return the dict described above."""
        features, logits = _features_and_logits(self.backbone, _laid_out(images, self.channels_last))
        if targets is None or not self.training:
            return {"output": logits}
        teacher_features, teacher_logits = self._taught(features)
        if torch.compiler.is_compiling() and _is_mix(targets):
            # As a Python number lam would be a constant of the graph, which each batch would have to compile anew.
            targets = _mixed_probabilities(targets, logits, self.loss)
        loss_features, loss_logits = _one_dtype([*features, *teacher_features]), _one_dtype([logits, teacher_logits])
        parts = self.loss(
            loss_logits[0],
            loss_logits[1],
            loss_features[: len(features)],
            loss_features[len(features) :],
            targets,
            return_parts=True,
        )
        return {
            "loss": parts.loss,
            "output": logits,
            "ce_student": parts.ce_student,
            "ce_teacher": parts.ce_teacher,
            "kd": parts.kd,
            "feature": parts.feature,
            "teacher_output": teacher_logits,
        }

    def _taught(self, features: list[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        if self.memory == "normal" or not torch.is_grad_enabled():
            return _self_teacher_outputs(self.self_teacher, features)
        # Saving the random state reads it from the device, which a CUDA graph does not allow. These two draw none.
        preserve_rng_state = type(self.self_teacher) not in (BiFPN, BiFPNc)
        function = functools.partial(_self_teacher_outputs, self.self_teacher)
        if torch.compiler.is_compiling():
            # A traced graph writes the running statistics once, after the forward pass, and repeats in backward only what
            # the gradients need.
            outputs = checkpoint(function, features, use_reentrant=False, preserve_rng_state=preserve_rng_state)
        else:
            outputs = checkpoint(
                function,
                features,
                use_reentrant=False,
                preserve_rng_state=preserve_rng_state,
                context_fn=functools.partial(_contexts, self.self_teacher),
            )
        teacher_features, teacher_logits = outputs
        return teacher_features, teacher_logits

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
            >>> task = FRSKDTask(wrn16x2(num_classes=10))
            >>> task.compile()  # the first call will compile
        """
        kwargs.setdefault("fullgraph", True)
        super().compile(*args, **kwargs)
        compiled = self._compiled_call_impl
        assert compiled is not None
        self._compiled_call_impl = functools.partial(self._call_with_dynamic_batch, compiled)

    def _call_with_dynamic_batch(
        self, compiled: Callable[..., dict[str, Tensor]], images: Tensor, targets: Any = None
    ) -> dict[str, Tensor]:
        """Call the compiled task; the batch dimension is marked dynamic, other sizes stay constants of the graph."""
        if not self.training:
            targets = None  # unused there, and one graph will do
        if _is_mix(targets):
            first, second, mix = targets
            if not isinstance(mix, Tensor):
                # Written on the device by a kernel: a copy from the host would wait for the device.
                mix = torch.full((), _checks.unit_interval(mix, "targets[2] (lam)"), device=images.device)
            targets = (first, second, mix)
        for tensor in (images, *(targets if isinstance(targets, tuple) else (targets,))):
            if isinstance(tensor, Tensor) and tensor.dim() > 0:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(images, targets)

    def student(self) -> Student:
        """The student alone, `student(images) -> logits`; it shares the task's modules.

        Its `.eval()` reaches the backbone of the task: call `task.train()` before training on, or `copy.deepcopy` it.

        Example:
            >>> from frskd_fast.models import wrn16x2
            >>> student = FRSKDTask(wrn16x2(num_classes=10)).student().eval()
            >>> student(torch.zeros(2, 3, 16, 16)).shape
            torch.Size([2, 10])
        """
        return Student(self.backbone, self.channels_last)

    def get_eval_model(self) -> Student:
        """`student()` under the name that timm's training tasks give it."""
        return self.student()

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"memory={self.memory!r}, channels_last={self.channels_last}"


class Student(nn.Module):
    """logits = backbone(images)[1]: what is left of a task at test time.

    Args:
        backbone: `backbone(images) -> (features, logits)`; checkpoints hold it under `backbone.`, as the task's do.
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
        return _features_and_logits(self.backbone, _laid_out(images, self.channels_last))[1]


def _built_self_teacher(backbone: nn.Module, num_classes: int | None) -> BiFPNc:
    """`BiFPNc` for the backbone's channels, on its device and in its dtype."""
    if num_classes is None:
        num_classes = getattr(backbone, "num_classes", None)
    if num_classes is None:
        num_classes = dry_pass(backbone, functools.partial(_features_and_logits, backbone))[1].shape[1]
    self_teacher = BiFPNc(list(backbone.channels), num_classes)  # type: ignore[arg-type]
    for parameter in backbone.parameters():
        if parameter.is_floating_point():
            return self_teacher.to(parameter.device, parameter.dtype)
    return self_teacher


def _laid_out(images: Tensor, channels_last: bool) -> Tensor:
    if channels_last and isinstance(images, Tensor) and images.dim() == 4:
        return images.contiguous(memory_format=torch.channels_last)
    return images


def _features_and_logits(backbone: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    output = backbone(images)
    if (
        isinstance(output, tuple | list)
        and len(output) == 2
        and isinstance(output[0], tuple | list)
        and isinstance(output[1], Tensor)
    ):
        return list(output[0]), output[1]
    raise TypeError(
        f"backbone ({type(backbone).__name__}) returned a {type(output).__name__}, but (list of feature maps, logits) was "
        "wanted; wrap it with frskd_fast.models.adapt_backbone."
    )


def _self_teacher_outputs(self_teacher: nn.Module, features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    teacher_features, teacher_logits = self_teacher(features)
    return list(teacher_features), teacher_logits


def _one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the widest of their dtypes: under autocast a LayerNorm leaves float32 among half-precision maps."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _is_mix(targets: Any) -> bool:
    return isinstance(targets, tuple | list) and len(targets) == 3


def _mixed_probabilities(targets: Sequence[Any], logits: Tensor, loss: nn.Module) -> Tensor:
    """Probabilities t (N, K) whose cross-entropy is that of the two-label targets, ignored labels and smoothing included.

    With w_n = sum_k t_nk the weight of row n (below 1 where a label is ignored), the two-label mean divides by sum_n w_n
    and the mean over probabilities by N; the difference goes into t.
    """
    classes = logits.shape[1]
    ignore_index, smoothing = getattr(loss, "ignore_index", -100), getattr(loss, "label_smoothing", 0.0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    positions = torch.arange(classes, device=logits.device)

    def one_hot(labels: Tensor) -> Tensor:
        # As everywhere on a device, where reading them would synchronise, labels that are no class give NaN.
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        return (labels.unsqueeze(1) == positions).to(dtype).masked_fill(wrong.unsqueeze(1), float("nan"))

    first, second, mix = targets
    probabilities: Tensor = mix * one_hot(first) + (1 - mix) * one_hot(second)
    weight = probabilities.sum(1, keepdim=True)
    total = weight.sum()
    scale = torch.where(total == 0, 0.0, logits.shape[0] / total)
    if smoothing < 1:
        probabilities = scale * probabilities + (scale * weight - 1) * (smoothing / (classes * (1 - smoothing)))
    return probabilities.to(dtype)


def _contexts(
    self_teacher: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    # The backward pass may run outside of the `use_impl` block that the forward pass stood in.
    return contextlib.nullcontext(), _repeated(self_teacher, _dispatch.forced())


@contextlib.contextmanager
def _repeated(self_teacher: nn.Module, impl: str) -> Iterator[None]:
    """A forward pass inside computes what the first one did and changes nothing."""
    with _dispatch.use_impl(impl), _unchanged_buffers(self_teacher):
        yield


@contextlib.contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """A forward pass inside leaves every buffer of `module` as it was, the statistics of its BatchNorms among them.

    A BatchNorm with momentum 0 and without a counter writes its running statistics back unchanged, which costs nothing;
    it must still have them, since the second pass has to save the same tensors for backward as the first. Buffers of
    other modules (InstanceNorm averages its statistics anew) are replaced by copies meanwhile.
    """
    momenta: list[tuple[_BatchNorm, float | None]] = []
    buffers: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    try:
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                momenta.append((part, part.momentum))
                part.momentum = 0.0
                names = ["num_batches_tracked"]
            else:
                names = list(part._buffers)
            for name in names:
                buffer = part._buffers.get(name)
                if buffer is not None:
                    buffers.append((part._buffers, name, buffer))
                    # SyncBatchNorm insists on its counter.
                    part._buffers[name] = None if type(part) in COUNTERLESS else buffer.clone()
        yield
    finally:
        for batch_norm, momentum in momenta:
            batch_norm.momentum = momentum
        for owner, name, buffer in buffers:
            owner[name] = buffer
