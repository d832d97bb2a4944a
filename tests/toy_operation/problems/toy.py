"""Problems of the toy operation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from toy import toy


@dataclass(frozen=True)
class ToyProblem:
    """`count` random numbers."""

    count: int

    @property
    def name(self) -> str:
        return f"{self.count} numbers"

    def run(self, implementation: str, device: str) -> None:
        student, teacher = torch.randn(2, self.count, dtype=torch.float64, device=device)
        student.requires_grad_()
        out = toy(student, teacher, 3.0, impl=implementation)
        upstream = torch.randn_like(out)
        out.backward(upstream)
        torch.testing.assert_close(out, 3.0 * (student - teacher))
        torch.testing.assert_close(student.grad, 3.0 * upstream)


PROBLEMS = [ToyProblem(count) for count in (1, 16, 37)]
