"""An operation is one row of files and one entry in the table: a toy one, outside the package, works without touching it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import emulation
import problems
import pytest
import torch

from frskd_fast import _dispatch, _extension, last_impl
from frskd_fast.ops import _table

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent / "toy_operation"


@pytest.fixture(scope="module")
def toy() -> Iterator[ModuleType]:
    """The toy operation, registered, with its problems beside those of the others."""
    sys.path.insert(0, str(HERE))
    problems.__path__.append(str(HERE / "problems"))
    import toy

    yield toy
    problems.__path__.remove(str(HERE / "problems"))
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def compiled(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The C++ file compiled into a library of its own, which registers itself in the namespace of the others."""
    compiler = shutil.which("g++")
    if compiler is None or _extension.cpu_library_problem() is not None:
        pytest.skip("needs g++ and the compiled library")
    library = tmp_path_factory.mktemp("toy") / "libtoy.so"
    torch_root = Path(torch.__file__).parent
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", "-Wall", "-Werror"]
    command += [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{ROOT / 'csrc'}",
        "-isystem",
        str(torch_root / "include"),
    ]
    command += [str(HERE / "toy.cpp"), f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(str(library))
    toy.provide()


def test_its_cuda_kernel_solves_the_problems(compiled: None) -> None:
    reason = emulation.problem()
    if reason is not None:
        pytest.skip(reason)
    torch.ops.load_library(str(emulation.library([HERE / "toy.cu"], [ROOT / "csrc", HERE])))
    _dispatch.provide("toy", emulation.NAME, emulation.copy_of("toy_native"))
    with emulation.known():
        found = [problem for operation, problem in problems.of_implementation(emulation.NAME) if operation == "toy"]
        assert len(found) == 3
        for problem in found:
            problem.run(emulation.NAME, "cpu")
    assert last_impl()["toy"] == emulation.NAME


def test_its_suite_of_the_benchmark_is_found(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import correctness
    from bench.case import Selection

    # The package of suites once more, with a second folder from the start: it looks for its files when it is imported.
    spec = importlib.util.find_spec("bench.cases")
    assert spec is not None and spec.loader is not None and spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(HERE / "cases"))
    cases = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench.cases", cases)
    spec.loader.exec_module(cases)
    assert "toy" in cases.SUITES
    (case,) = cases.cases_of("toy", Selection())
    assert case.name == "toy 1000 forward+backward fp32 rows"
    for implementation in ("reference", "cpu"):
        assert correctness.agrees_in_float64(case, case.ours(implementation), "cpu")


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton", "auto"])
def test_every_implementation_solves_the_problems(compiled: None, implementation: str) -> None:
    if implementation == "triton":
        pytest.importorskip("triton")
    assert "toy" in problems.operations()
    for problem in problems.problems("toy"):
        problem.run(implementation, "cpu")
    assert last_impl()["toy"] == ("cpu" if implementation == "auto" else implementation)


def test_schemas_come_from_annotations_and_fields(compiled: None) -> None:
    arguments = "Tensor student, Tensor teacher, float scale"
    schema = str(torch.ops.frskd_fast.toy_forward.default._schema)
    assert schema == f'frskd_fast::toy_forward({arguments}, str impl, *, str version="") -> Tensor'
    native = str(torch.ops.frskd_fast_native.toy.default._schema)
    assert native == f"frskd_fast_native::toy({arguments}, Tensor(a!) out) -> ()"


def test_traced_and_checked(compiled: None, toy: ModuleType) -> None:
    student, teacher = torch.randn(2, 5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.frskd_fast.toy_forward.default, (student, teacher, 2.0, "cpu"))
    traced = torch.compile(toy.toy, fullgraph=True, dynamic=True)
    for count in (5, 8):
        student, teacher = torch.randn(2, count, dtype=torch.float64)
        leaf = student.clone().requires_grad_()
        traced(leaf, teacher).sum().backward()
        torch.testing.assert_close(traced(student, teacher), toy.toy(student, teacher))
        torch.testing.assert_close(leaf.grad, torch.full_like(leaf, 2.0))


def test_policy_is_one_line_of_the_table(compiled: None, toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    line = _dispatch.Line((), layouts=("rows",), least_size=4, evidence="nothing: a test")
    monkeypatch.setitem(_dispatch.TABLE, ("toy", "cpu"), (line, _dispatch.Line(("cpu",))))
    small, large = torch.zeros(3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    assert _dispatch.choose_for("toy", "auto", small) == "cpu"
    assert _dispatch.choose_for("toy", "auto", large) == "reference"
    assert _dispatch.choose_for("toy", "cpu", large) == "cpu"


def test_what_has_no_counterpart_in_a_schema_is_refused() -> None:
    def fake(pair: dict[str, float], impl: str) -> torch.Tensor:
        raise NotImplementedError

    with pytest.raises(TypeError, match="has no counterpart in an operator's schema"):
        _table.register("unknown")(fake)


def test_what_an_operation_lacks_is_a_sentence(
    compiled: None, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(_dispatch._modules, ("toy", "cpu"))
    numbers = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match="impl='cpu' was asked for, but toy has no such kernels; use 'triton' or 'reference'"
    ):
        toy.toy(numbers, numbers, impl="cpu")
    assert _dispatch.choose_for("toy", "auto", numbers) == "reference"
