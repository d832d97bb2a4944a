"""What is in the wheel and the source distribution, and what happens where a toolchain is missing."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=merged, capture_output=True, text=True, timeout=300)


def _wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """A wheel built from a copy of the sources, and the build's log."""
    done = _run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--verbose", "--wheel-dir", str(folder),
        str(_source(folder)), **environment,
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    (wheel,) = folder.glob("*.whl")
    return wheel, log


def _source(folder: Path) -> Path:
    """A copy of what a build needs, so that nothing is written into the checkout."""
    source = folder / "source"
    if not source.exists():
        source.mkdir(parents=True)
        names = ["frskd_fast", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
        archive = subprocess.run(
            ["tar", "--exclude=*.so", "--exclude=__pycache__", "-c", *names],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
        )
        subprocess.run(["tar", "-x"], cwd=source, input=archive.stdout, check=True)
    return source


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel built by FRSKD_FAST_BUILD=auto where no compiler can be found."""
    folder = tmp_path_factory.mktemp("pure")
    bare = folder / "bin"
    bare.mkdir()
    return _wheel(folder, FRSKD_FAST_BUILD="auto", PATH=str(bare), CXX="", CUDA_HOME="")


def test_without_a_compiler_the_wheel_is_pure_and_says_why(pure_wheel: tuple[Path, str]) -> None:
    wheel, log = pure_wheel
    assert wheel.name.endswith("-py3-none-any.whl")
    sentences = [line for line in log.splitlines() if line.strip().startswith("frskd_fast: ")]
    assert len(sentences) == 1 and "building without compiled kernels: no C++ compiler was found" in sentences[0]


def test_wheel_contents(pure_wheel: tuple[Path, str]) -> None:
    names = zipfile.ZipFile(pure_wheel[0]).namelist()
    tops = {name.split("/", 1)[0] for name in names}
    assert tops == {"frskd_fast", f"{pure_wheel[0].name.split('-py3')[0]}.dist-info"}
    for wanted in ("kernels/__init__.py", "kernels/attention.py", "ops/logits.py", "native/combine.py", "py.typed"):
        assert f"frskd_fast/{wanted}" in names


def test_installed_wheel_works_without_compiled_kernels(pure_wheel: tuple[Path, str], tmp_path: Path) -> None:
    zipfile.ZipFile(pure_wheel[0]).extractall(tmp_path)
    program = (
        "import torch, frskd_fast, frskd_fast.kernels\n"
        f"assert frskd_fast.__file__.startswith({str(tmp_path)!r})\n"
        f"assert frskd_fast.kernels.__file__.startswith({str(tmp_path)!r})\n"
        "loss = frskd_fast.losses.FRSKDLoss()\n"
        "z, f = torch.zeros(2, 3), [torch.ones(2, 3, 4, 4)]\n"
        "loss(z, z, f, f, torch.tensor([0, 1]))\n"
        "print(frskd_fast.last_impl())\n"
        "try:\n    frskd_fast.functional.kd_loss(z, z, impl='cpu')\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = _run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "'logits': 'reference'" in done.stdout
    assert (
        "impl='cpu' was asked for, but the compiled library _C was not built: no C++ compiler was found" in done.stdout
    )
    (warning,) = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert "its kernels were not built: no C++ compiler was found" in warning
    told = _run(sys.executable, "-m", "frskd_fast.env_report", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "implementation cpu: not available: the compiled library _C was not built: no C++ compiler" in told.stdout


def test_a_build_that_was_asked_for_no_kernels_says_so_and_gives_no_warning(tmp_path: Path) -> None:
    source = _source(tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    assert _run(*command, cwd=source, FRSKD_FAST_BUILD="none").returncode == 0
    program = "import torch, frskd_fast.env_report as e; print(e.report()); z = torch.zeros(2, 3)\n"
    program += "frskd_fast = e.frskd_fast; frskd_fast.functional.kd_loss(z, z)"
    done = _run(sys.executable, "-W", "error", "-c", program, cwd=tmp_path, PYTHONPATH=str(source))
    assert done.returncode == 0, done.stderr
    assert (
        "library _C was not built: FRSKD_FAST_BUILD=none asked for that; unset it, then run `pip install" in done.stdout
    )


def test_kernels_that_do_not_compile_are_explained_by_the_compiler(tmp_path: Path) -> None:
    source = _source(tmp_path)
    shutil.rmtree(source / "csrc" / "cpu")
    (source / "csrc" / "cpu").mkdir()
    (source / "csrc" / "cpu" / "broken.cpp").write_text("#error no such luck\n")
    done = _run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=source, FRSKD_FAST_BUILD="auto")
    if "no C++ compiler was found" in done.stderr:
        pytest.skip("no C++ compiler")
    assert done.returncode == 0 and "not compile (" in done.stderr
    told = _run(sys.executable, "-m", "frskd_fast.env_report", cwd=tmp_path, PYTHONPATH=str(source))
    (said,) = [line for line in told.stdout.splitlines() if line.strip().startswith("implementation cpu: ")]
    assert "no such luck" in said and "; mend that or set CXX to another compiler, then run `pip install" in said


def test_a_library_that_does_not_load_is_warned_of(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "frskd_fast" / "_C.so").write_bytes(b"no library")
    program = "import torch, frskd_fast; frskd_fast.functional.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))"
    done = _run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(source))
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert "the compiled library _C.so does not load (" in warning and "again, with this PyTorch" in warning


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("cpu", "FRSKD_FAST_BUILD=cpu cannot be met: no C++ compiler was found"),
        ("cuda", "FRSKD_FAST_BUILD=cuda cannot be met"),
        ("fast", "it is not one of auto, cpu, cuda, none"),
    ],
)
def test_an_explicit_choice_that_cannot_be_met_fails_with_the_reason(mode: str, message: str, tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    done = _run(
        sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), cwd=_source(tmp_path),
        FRSKD_FAST_BUILD=mode, PATH=str(bare), CXX="", CUDA_HOME="",
    )  # fmt: skip
    assert done.returncode != 0 and message in done.stderr, done.stderr


def test_source_distribution_holds_everything_a_build_needs(tmp_path: Path) -> None:
    source = _source(tmp_path)
    done = _run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist"), cwd=source)
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    held = {name.split("/", 1)[1] for name in tarfile.open(archive).getnames() if "/" in name}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "kernels", "frskd_fast")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
    }
    assert wanted <= held, sorted(wanted - held)
    assert "pyproject.toml" in held and "setup.py" in held


def test_everything_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[^\w.-]", entry)[0].lower().replace("_", "-") for entry in listed}
    imported: dict[str, str] = {}
    for file in [*(ROOT / "frskd_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.split(".")[0]: file.name for name in names}
    distributions = importlib.metadata.packages_distributions()
    for name, file in imported.items():
        candidates = {one.lower().replace("_", "-") for one in distributions.get(name, ())}
        if candidates and name != "frskd_fast":
            assert candidates & declared, f"{file} imports {name}, which no list of pyproject.toml has"
    assert {"yaml", "torch", "numpy"} <= imported.keys()


def test_kernels_is_never_a_top_level_package(tmp_path: Path) -> None:
    done = _run(sys.executable, "-c", "import kernels", PYTHONPATH=str(ROOT))
    assert done.returncode != 0 and "ImportError" in done.stderr and "frskd_fast.kernels" in done.stderr


def test_uninstalled_checkout_finds_its_kernels(tmp_path: Path) -> None:
    source = _source(tmp_path)
    program = "import frskd_fast.kernels as kernels; print(kernels.__name__, kernels.__file__)"
    done = _run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(source))
    assert done.stdout.split() == ["frskd_fast.kernels", str(source / "kernels" / "__init__.py")], done.stderr


def test_import_is_light() -> None:
    program = (
        "import sys, torch\nbefore = set(sys.modules)\nimport frskd_fast\n"
        "heavy = {'triton', 'lightning', 'matplotlib', 'sklearn', 'torchvision', 'timm', 'tqdm'}\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} & heavy))"
    )
    done = _run(sys.executable, "-c", program)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_env_report_runs() -> None:
    done = _run(sys.executable, "-m", "frskd_fast.env_report")
    assert done.returncode == 0
    for name in ("reference", "cpu", "triton", "cuda"):
        assert f"implementation {name}: " in done.stdout


def test_forced_implementation_by_environment() -> None:
    program = "import torch, frskd_fast as f; z = torch.zeros(2, 3); f.functional.kd_loss(z, z); print(f.last_impl()['logits'])"
    assert _run(sys.executable, "-c", program, FRSKD_FAST_IMPL="reference").stdout.strip() == "reference"
    done = _run(sys.executable, "-c", program, FRSKD_FAST_IMPL="quick")
    assert "the environment variable FRSKD_FAST_IMPL is 'quick'" in done.stderr


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_older_instruction_sets_agree(instruction_set: str) -> None:
    """The kernels for processors that lack AVX2 or AVX-512, chosen by FRSKD_FAST_CPU, pass the small sizes."""
    done = _run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_frskd_loss.py", "tests/test_logits.py",
        "-k", "golden or three_way or (test_problem and cpu)", FRSKD_FAST_CPU=instruction_set,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
