"""Random calls against the reference in float64: `python -m campaign.calls`, one process of the campaign.

It writes a line of JSON to stdout before each call and one after it, so that whoever started it knows the call that a crash
or a hang belongs to.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import resource
import threading
import time
from typing import Any

import numerics
import torch
from torch import Tensor, nn

import frskd_fast
from campaign.samples import CHANGES, Call, drawn, leaves, mapped, sources
from frskd_fast import _dispatch, functional
from frskd_fast.reference.dtypes import accumulate_dtype

ROUNDING = 1e-7  # by so much, relatively, inputs are changed to see how far rounding errors reach
LEAKING, LEAKING_S, LEAK = 1000, 10.0, 2**20  # calls of one kind, seconds for them, bytes that they may add
# Operations in which a pixel on the line between two cells may see the next cell with weight 0, whose NaN is one there.
INTERPOLATING = {"logit_maps"}
REFUSALS = (TypeError, ValueError, RuntimeError)

Results = dict[str, Tensor]


class Refused(Exception):
    """The call ended in an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        text = str(error).split("\nException raised from")[0].strip()
        self.sentence = text.endswith(".") and isinstance(error, REFUSALS)


class Finding(Exception):
    """What the call got wrong, in a sentence."""


class Inexact(Finding):
    """A number is further from float64 than the three-way rule allows."""


def evaluate(call: Call, implementation: str, dtype: torch.dtype | None = None, noise: int | None = None) -> Results:
    """Results and gradients of a call, by name; `dtype` is that of all tensors, `noise` the seed of small changes.

    Raises:
        Refused: where the call raises.
    """
    generator = None if noise is None else torch.Generator().manual_seed(noise)
    inputs: dict[str, Tensor] = {}

    def given(path: str, value: Any) -> Any:
        if isinstance(value, nn.Module):
            value = copy.deepcopy(value)
            return value if dtype is None else value.to(dtype)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.detach()
        value = value if dtype is None else value.to(dtype)
        if generator is not None:
            step = ROUNDING if dtype is not None else max(ROUNDING, torch.finfo(value.dtype).eps)
            value = value * (1 + step * (2 * torch.rand(value.shape, generator=generator, dtype=value.dtype) - 1))
        if path in call.learning:
            value = value.detach().requires_grad_()
            inputs[path] = value
        return value

    loss = copy.deepcopy(call.loss)
    if loss is not None and dtype is not None:
        loss.to(dtype)
    # The numbers that a layer draws do not depend on the implementation.
    torch.manual_seed(0)
    try:
        arguments = {name: mapped(value, name, given) for name, value in call.arguments.items()}
        with frskd_fast.use_impl(implementation):
            out = call.function(loss)(**arguments)
        named = [(path, value) for path, value in leaves(out, "result") if isinstance(value, Tensor)]
        results = {path: value.detach() for path, value in named}
        upstream = torch.Generator().manual_seed(1)
        pairs = [
            (value, torch.randn(value.shape, generator=upstream, dtype=torch.float64).to(value.dtype))
            for _, value in named
        ]
        pairs = [(value, grad) for value, grad in pairs if value.requires_grad]
        inputs |= {f"loss.{name}": p for name, p in (loss.named_parameters() if loss is not None else ())}
        wanted = {path: value for path, value in inputs.items() if value.requires_grad}
        if pairs and wanted:
            grads = torch.autograd.grad(
                [value for value, _ in pairs],
                list(wanted.values()),
                [grad for _, grad in pairs],
                allow_unused=True,
            )
            for (path, leaf), grad in zip(wanted.items(), grads, strict=True):
                results[f"gradient of {path}"] = torch.zeros_like(leaf) if grad is None else grad
    except Exception as error:
        raise Refused(error) from error
    for name, value in arguments.items():
        for path, module in leaves(value, name):
            if isinstance(module, nn.Module):
                results |= {f"{path}.{key}": buffer for key, buffer in module.named_buffers() if buffer.dim()}
    return results


def same_bits(one: Results, other: Results) -> bool:
    """Whether all results are equal bit for bit, NaN beside NaN."""
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def compare(name: str, ours: Tensor, plain: Tensor, truth: Tensor, scale: float, loud: bool, limit: bool) -> None:
    """The three-way rule where plain PyTorch stays in range, and loudness where the truth does not.

    Args:
        name: for the error.
        ours, plain, truth: by the implementation, by plain PyTorch in the same dtype and in float64.
        scale: of the terms of which the result is a difference.
        loud: whether a result of the call says already that something is not finite; which elements of a gradient are NaN
            is not promised then, only that there are some.
        limit: whether inputs are near the largest number, where more than plain PyTorch may overflow.

    Raises:
        Finding: saying what is wrong.
    """
    if ours.shape != truth.shape or ours.dtype != plain.dtype:
        raise Finding(
            f"{name} is {ours.dtype} {tuple(ours.shape)}, the reference's {plain.dtype} {tuple(truth.shape)}."
        )
    if not ours.is_floating_point():
        if not torch.equal(ours, truth.to(ours.dtype)):
            raise Finding(f"{name} is not what the reference has.")
        return
    if not loud and bool((ours.isfinite() & truth.isnan()).any()):
        raise Finding(f"{name} hides a NaN: it is finite where float64 has NaN.")
    usual = truth.isfinite() & plain.isfinite()
    if loud or limit:
        usual &= ours.isfinite()
    if bool((~ours.isfinite() & usual).any()):
        raise Finding(f"{name} is not finite where plain PyTorch and float64 are.")
    if not loud and bool((ours.isfinite() & truth.isinf() & ~plain.isfinite()).any()):
        raise Finding(f"{name} is finite where plain PyTorch and float64 are not.")
    try:
        # What plain PyTorch cannot represent either is left out.
        masked = (value.masked_fill(~usual, 0.0) for value in (ours, plain, truth))
        numerics.assert_close(*masked, name, scale)
    except AssertionError as error:
        raise Inexact(str(error)) from error


def terms(call: Call, name: str) -> float:
    """What cancels in a result though the inputs do not: T² times logarithms, T times probabilities in a gradient."""
    known = [getattr(module, "temperature", None) for module in (call.loss.modules() if call.loss is not None else ())]
    if call.loss is None:
        parameter = inspect.signature(getattr(functional, call.name)).parameters.get("temperature")
        known = [call.arguments.get("temperature", parameter.default)] if parameter is not None else []
    temperature = max((one for one in known if isinstance(one, float)), default=1.0)
    if not name.startswith("gradient"):
        return float(max(temperature, 1.0) ** 2) if known else 0.125
    path = name.removeprefix("gradient of ")
    inputs = dict(leaf for key, value in call.arguments.items() for leaf in leaves(value, key))
    values = inputs[path].double().nan_to_num(0.0, 0.0, 0.0) if path in inputs else torch.ones(1)
    lengths = torch.linalg.vector_norm(values.reshape(len(values), -1) if values.numel() else torch.ones(1, 1), dim=1)
    scale = temperature / min(max(float(lengths.min()), 0.01), 1.0)
    if known:  # differences of logits cancel in the gradient of the divergence's target
        finite = (value.double().nan_to_num(0.0, 0.0, 0.0) for value in inputs.values() if _is_floating(value))
        scale = max([scale, *(float(value.abs().max()) for value in finite)])
    return 4 * scale


def _scatter(call: Call, name: str, implementation: str, found: Results) -> float:
    """How far a result moves, as computed in the dtype of the call, where inputs move by a rounding step."""
    moved = (evaluate(call, implementation, None, noise) for noise in range(4))
    return max(numerics.largest_error(one.get(name, found[name]), found[name]) for one in moved)


def _ranks(call: Call) -> bool:
    """Whether a share of the rows is kept, those of best rank."""
    return any(
        name.endswith("ratio") for name in (*call.arguments, *(vars(call.loss) if call.loss is not None else ()))
    )


def silent_in(results: Results) -> bool:
    """Whether all results, gradients aside, are finite."""
    return all(bool(value.isfinite().all()) for name, value in results.items() if not name.startswith("gradient"))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def near_limit(call: Call) -> bool:
    """Whether a number of the call is so large that its square, or a sum of a few, overflows in the dtype of the arithmetic."""
    for _, value in leaves(call.arguments, ""):
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            largest = float(value.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max())
            if largest > torch.finfo(accumulate_dtype(value.dtype)).max ** 0.5 / 64:
                return True
    return False


def check(call: Call, implementation: str, more: int) -> str:
    """ "result" or "refused"; the threads are tried when `more` says so.

    Raises:
        Finding: saying what is wrong.
    """
    tensors = [(path, one) for path, one in leaves(call.arguments, "") if isinstance(one, Tensor)]
    copies = [one.clone() for _, one in tensors] if not call.freed else []
    _dispatch._last.clear()
    try:
        ours = evaluate(call, implementation)
    except Refused as refusal:
        if not refusal.sentence and not call.freed:
            raise Finding(f"The error is no sentence: {refusal}") from refusal
        if call.freed:
            return "refused"
        try:
            evaluate(call, "reference")
        except Refused:
            return "refused"
        raise Finding(f"It refuses what the reference computes: {refusal}") from refusal
    used = frskd_fast.last_impl()
    if call.freed:
        if call.loss is None and any(_dispatch.implements(operation, implementation) for operation in used):
            raise Finding("It computes with memory that was given back.")
        return "result"  # the tensor may be one that no kernel of ours reads, and PyTorch's own do not all look
    try:
        plain = evaluate(call, "reference")
    except Refused as refusal:
        raise Finding(f"It computes what the reference refuses: {refusal}") from refusal
    truth = evaluate(call, "reference", torch.float64)
    moved = [evaluate(call, "reference", torch.float64, noise) for noise in (1, 2)]
    for name in {*ours, *truth}:
        if not name.startswith("gradient") and not (name in ours and name in truth):
            raise Finding(f"It returns {sorted(ours)}, the reference {sorted(truth)}.")
        own = ours.get(name, plain.get(name))
        for results in (ours, plain, truth, *moved):  # no gradient is one of zeros
            if own is not None and name not in results:
                results[name] = torch.zeros_like(
                    own, dtype=own.dtype if results is ours or results is plain else torch.float64
                )
    limit = near_limit(call)
    if limit and any(one.dtype == torch.float64 for one in ours.values()):
        return "result"  # float64 is no truth there
    silent = silent_in(ours) and silent_in(truth)
    nan = [
        any(one.isnan().any() for name, one in results.items() if name.startswith("grad")) for results in (ours, truth)
    ]
    if INTERPOLATING & used.keys() and not all(bool(one.isfinite().all()) for _, one in tensors):
        if silent_in(truth) < silent_in(ours):
            raise Finding("It hides what is not finite.")
        return "result"
    if nan == [False, True]:
        raise Finding("No gradient is NaN, though some are in float64.")
    infinite = any(bool(one.isinf().any()) for _, one in tensors if _is_floating(one))
    for name, value in ours.items():
        loud = not silent and name.startswith("gradient")
        if loud and limit:
            continue
        reach = [(other[name] - truth[name]).double().nan_to_num(0.0, 0.0, 0.0).abs() for other in moved]
        scale = max((float(one.max()) for one in reach if one.numel()), default=0.0) / ROUNDING
        scale = max(scale, terms(call, name))
        try:
            compare(
                name, value, plain[name], truth[name], scale, loud, limit or (infinite and name.startswith("gradient"))
            )
        except Inexact:
            if _ranks(call) and any(_is_floating(one) and one.dim() == 2 and one.shape[1] == 1 for _, one in tensors):
                continue  # all cosines are 1 or -1, and ranks among them are rounding
            # Two moves of the inputs may have missed the worst one, and a rank among equal scores may fall either way.
            more_moved = (evaluate(call, "reference", torch.float64, noise) for noise in range(3, 11))
            reach = [
                (other.get(name, truth[name]) - truth[name]).nan_to_num(0.0, 0.0, 0.0).abs() for other in more_moved
            ]
            scale = max(scale, *(float(one.max()) / ROUNDING for one in reach))
            scatter = _scatter(call, name, "reference", plain)
            if _ranks(call):
                scatter = max(scatter, _scatter(call, name, implementation, ours))
            if numerics.largest_error(value, truth[name]) > 2 * scatter:
                compare(name, value, plain[name], truth[name], scale, loud, limit)
    for (path, one), before in zip(tensors, copies, strict=True):
        if not _same(one, before):
            raise Finding(f"{path} was written to.")
    if more % 5 == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(2 if threads == 1 else 1)
        try:
            again = evaluate(call, implementation)
        finally:
            torch.set_num_threads(threads)
        if not same_bits(ours, again) and _same_on_two_threads(call):
            raise Finding("One thread and two give other bits.")
    if more % 25 == 0:
        _in_four_threads(call, implementation, ours)
    return "result"


def _same_on_two_threads(call: Call) -> bool:
    """Whether plain PyTorch gives the same bits on one thread and on two; its sums and products need not."""
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(evaluate(call, "reference"))
    finally:
        torch.set_num_threads(threads)
    return same_bits(*results)


def _in_four_threads(call: Call, implementation: str, ours: Results) -> None:
    outcomes: list[str] = []

    def work() -> None:
        try:
            outcomes.append("same" if same_bits(ours, evaluate(call, implementation)) else "other bits")
        except Exception as error:
            outcomes.append(repr(error))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if outcomes != ["same"] * 4:
        raise Finding(f"Four Python threads at once: {', '.join(outcomes)}.")


def reduced(source: str, seed: int, implementation: str, more: int) -> tuple[tuple[str, ...], str]:
    """Which changes can be left out so that the call still fails, and the call that remains, described."""
    without: tuple[str, ...] = ()
    for change in CHANGES:
        candidate = drawn(source, seed, (*without, change))
        try:
            if candidate is not None:
                check(candidate, implementation, more)
        except Finding:
            without = (*without, change)
        except Exception:
            continue
    remaining = drawn(source, seed, without)
    return without, "" if remaining is None else remaining.describe()


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def campaign(seed: int, first: int, count: int, seconds: float, implementation: str) -> None:
    """Calls ``first`` to ``first + count - 1``, or as many as there is time for."""
    names = list(sources())
    deadline = time.monotonic() + seconds
    if count >= LEAKING:
        _watch_memory(names[first // count % len(names)], implementation, seed)
    for index in range(first, first + count):
        if time.monotonic() > deadline:
            break
        source, own = names[index % len(names)], seed * 10_000_000 + index
        print(json.dumps({"begin": index, "source": source, "seed": own}), flush=True)
        outcome: dict[str, Any] = {"name": source, "outcome": "no call"}
        call = None
        try:
            call = drawn(source, own)
            if call is not None:
                outcome = {"name": call.name, "outcome": check(call, implementation, index)}
        except Finding as finding:
            without, text = reduced(source, own, implementation, index)
            name = call.name if call is not None else source
            outcome = {"name": name, "outcome": "finding", "text": str(finding), "without": without, "call": text}
        print(json.dumps(outcome), flush=True)


def _watch_memory(source: str, implementation: str, seed: int) -> None:
    """One call many times: memory may not grow with their number."""
    call = drawn(source, seed, CHANGES)
    if call is None:
        return
    held, deadline, made = 0, time.monotonic() + LEAKING_S, 0
    while made < LEAKING and time.monotonic() < deadline:
        held = resident() if made == LEAKING // 10 else held
        evaluate(call, implementation)
        made += 1
    grown = resident() - held if held else 0
    outcome = "finding" if grown > LEAK else "result"
    text = f"Memory grows by {grown / 2**20:.1f} MB in {made} calls that are all the same."
    print(json.dumps({"name": call.name, "outcome": outcome, "text": text}), flush=True)


def repeat(source: str, seed: int, without: tuple[str, ...], implementation: str) -> int:
    """One call again, in words; the exit status says whether it fails."""
    call = drawn(source, seed, without)
    if call is None:
        print("There is no such call.")
        return 2
    print(f"{call.name}, changed: {', '.join(call.changes) or 'nothing'}\n{call.describe()}")
    try:
        print(check(call, implementation, 0))
    except Finding as finding:
        print(f"FINDING: {finding}")
        return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--impl", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    campaign(given.seed, given.first, given.count, given.seconds, given.impl)
