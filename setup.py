"""Build of the compiled kernels. Everything else about the package is in pyproject.toml.

The libraries use PyTorch's stable ABI and no Python symbol, so they are plain shared libraries next to the package: compiling
them needs PyTorch's headers but imports neither PyTorch nor its build helpers, and one binary serves later PyTorch and Python
versions. docs/environment.md lists the environment variables.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("FRSKD_FAST_BUILD", "auto")
RECORD = "_build.json"  # in the package, where it was built without kernels; frskd_fast/_extension.py reads it
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
# The oldest PyTorch whose stable ABI the sources use, in the form the headers compare with: 2.11.
OLDEST_TORCH = (2, 11)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
DEFAULT_ARCHITECTURES = "8.0 9.0 10.0+PTX"
# For further compilations of csrc/cpu/*_kernels.cpp; csrc/cpu/instruction_set.h says how one is chosen.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
X86_VARIANTS = {
    "_avx2": ["-DFRSKD_AVX2", *AVX2_FLAGS],
    "_avx512": ["-DFRSKD_AVX512", *AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


class CannotBuild(Exception):
    """Why there can be no kernels, and what to do before the next build, as two clauses."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason, self.advice = reason, advice


def say(text: str) -> None:
    print(f"frskd_fast: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Torch:
    """Where the headers and libraries of the PyTorch to build against lie."""

    root: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    """The PyTorch of this environment, without importing it.

    pip hides the environment's packages from an isolated build, but not where they are.
    """
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in folders:
        root = Path(folder or ".") / "torch"
        version_file = root / "version.py"
        if not version_file.is_file() or not (root / "include" / "torch" / "csrc" / "stable").is_dir():
            continue
        text = version_file.read_text()
        version = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
        cuda = re.search(r"^cuda[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
        if version is None:
            continue
        found = Torch(root, version[1], cuda[1] if cuda else None)
        if tuple(int(part) for part in re.findall(r"\d+", found.version)[:2]) < OLDEST_TORCH:
            raise CannotBuild(f"PyTorch {found.version} is older than 2.11", "upgrade it to get the compiled kernels")
        return found
    raise CannotBuild("the build found no PyTorch", "install PyTorch in this environment")


def find_compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    for candidate in (command, ["g++"], ["clang++"]):
        if shutil.which(candidate[0]):
            return candidate
    raise CannotBuild("no C++ compiler was found", "install g++ or set CXX to a compiler")


def find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CannotBuild("nvcc was not found", "install the CUDA toolkit, and set CUDA_HOME or put nvcc on PATH")


def architectures() -> list[str]:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX")."""
    flags = []
    for entry in re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST holds {entry!r}", "give it entries like '9.0' or '9.0+PTX'")
        number = f"{match[1]}{match[2]}{match[3]}"
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


@dataclass(frozen=True)
class Step:
    """One compilation: the command without its output, and the files it joins."""

    source: Path
    output: Path
    command: list[str]


def host_flags(torch: Torch) -> list[str]:
    # Nothing is called from outside, and PyTorch's stable classes are hidden, too.
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    flags += [STABLE_ABI, f"-isystem{torch.root / 'include'}"]
    flags += ["-O0", "-g"] if DEBUG else ["-O3", "-g0"]
    if os.environ.get("FRSKD_FAST_NATIVE", "0") not in ("", "0"):
        flags.append("-march=native")
    if os.environ.get("FRSKD_FAST_WERROR", "0") not in ("", "0"):
        flags.append("-Werror")
    return flags + shlex.split(os.environ.get("CXXFLAGS", ""))


def has_wide_kernels(source: Path) -> bool:
    call = source.with_name(source.name.replace("_kernels.cpp", "_call.h"))
    return "FRSKD_DECLARE_WIDE_KERNELS" in call.read_text()


def cpu_steps(torch: Torch, folder: Path) -> list[Step]:
    compiler = find_compiler()
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    command = [*compiler, *host_flags(torch), "-c"]
    target = output_of([*compiler, "-dumpmachine"])
    variants = {"": []} | (X86_VARIANTS if target.startswith(("x86_64", "amd64")) else {})
    kernels = [s for s in sources if s.stem.endswith("_kernels")]
    steps = [
        Step(s, folder / f"cpu_{s.stem}{name}.o", [*command, *flags, str(s)])
        for s in kernels
        for name, flags in variants.items()
        if name != "_avx512" or has_wide_kernels(s)
    ]
    return steps + [Step(s, folder / f"cpu_{s.stem}.o", [*command, str(s)]) for s in sources if s not in kernels]


def cuda_steps(torch: Torch, folder: Path) -> list[Step]:
    nvcc = find_nvcc()
    warnings = "-Wall,-Wextra,-Wno-psabi,-Wno-unused-parameter"
    flags = ["-std=c++17", STABLE_ABI, "-DUSE_CUDA", f"-isystem={torch.root / 'include'}", *architectures()]
    flags += ["--expt-relaxed-constexpr", f"-Xcompiler=-fPIC,-fvisibility=hidden,{warnings}"]
    flags += ["-O0", "-g", "-lineinfo"] if DEBUG else ["-O3", "-lineinfo"]
    if os.environ.get("FRSKD_FAST_WERROR", "0") not in ("", "0"):
        flags += ["-Werror=all-warnings", "-Xcompiler=-Werror"]
    flags += shlex.split(os.environ.get("NVCC_FLAGS", ""))
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return [Step(s, folder / f"cuda_{s.stem}.o", [str(nvcc), *flags, "-c", str(s)]) for s in sources]


def failed(what: str, output: str) -> CannotBuild:
    """The error of a command: all that it printed is shown, and its last errors are recorded."""
    print(output, file=sys.stderr, flush=True)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    said = " / ".join(line[-300:] for line in errors[-3:]) or "it printed nothing"
    return CannotBuild(f"{what} ({said})", "mend that or set CXX to another compiler")


def output_of(command: list[str]) -> str:
    """What the command prints; a failure is a reason to go on without kernels."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise failed(f"{shlex.join(command)} fails", done.stdout + done.stderr)
    return done.stdout


def run_step(step: Step) -> None:
    say(f"compiling {step.source.relative_to(ROOT)}")
    done = subprocess.run([*step.command, "-o", str(step.output)], capture_output=True, text=True)
    if done.returncode:
        raise failed(f"{step.source.name} does not compile", done.stdout + done.stderr)


def compile_all(steps: list[Step], folder: Path) -> None:
    """With ninja where it is found (it knows which headers changed), else with as many threads as MAX_JOBS allows."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    folder.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run_step, steps))
        return
    lines = ["rule compile", "  command = $line -MD -MF $out.d -o $out", "  depfile = $out.d", "  deps = gcc", ""]
    for step in steps:
        source, output = (str(path).replace(" ", "$ ").replace(":", "$:") for path in (step.source, step.output))
        lines += [f"build {output}: compile {source}", f"  line = {shlex.join(step.command).replace('$', '$$')}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    say(f"compiling {len(steps)} files with ninja, {jobs} at a time")
    command = [ninja, "-C", str(folder), "-j", str(jobs), "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise failed("the kernels do not compile", done.stdout)
    print(done.stdout, end="", file=sys.stderr, flush=True)  # warnings


def nvcc_link_flags(flags: list[str]) -> list[str]:
    """The same flags in the form nvcc passes on to the host's linker; the CUDA runtime is linked statically."""
    passed = [f"-Xlinker={flag[4:]}" if flag.startswith("-Wl,") else flag for flag in flags]
    return ["-cudart=static", *passed]


def link(objects: list[Path], output: Path, flags: list[str], nvcc: Path | None = None) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    compiler = find_compiler() if nvcc is None else [str(nvcc)]
    command = [*compiler, "-shared", *map(str, objects), "-o", str(output), *flags]
    done = subprocess.run([*command, *shlex.split(os.environ.get("LDFLAGS", ""))], capture_output=True, text=True)
    if done.returncode:
        raise failed(f"{output.name} does not link", done.stdout + done.stderr)


def torch_library_flags(torch: Torch, names: list[str], folder: Path) -> list[str]:
    """Link flags for PyTorch's libraries; one that this PyTorch lacks is replaced by an empty stand-in of the same name.

    The library then asks for it by name when it is loaded, which only happens where PyTorch has it.
    """
    flags = [f"-L{torch.root / 'lib'}", f"-L{folder}"]
    flags += [] if sys.platform == "darwin" else ["-Wl,--no-as-needed"]
    for name in names:
        if not any((torch.root / "lib").glob(f"lib{name}.*")):
            stand_in = folder / f"lib{name}.so"
            command = [*find_compiler(), "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,lib{name}.so"]
            output_of([*command, "-o", str(stand_in)])
        flags.append(f"-l{name}")
    return flags


class BuildKernels(build_ext):
    """Compiles csrc/ into frskd_fast/_C.so and, where asked for, frskd_fast/_C_cuda.so."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "frskd_fast"
        return [str(path) for path in sorted([*folder.glob("_C*.so"), *folder.glob(RECORD)])]

    def run(self) -> None:
        try:
            self.build()
        except CannotBuild as reason:
            if MODE != "auto":
                self.fail(str(reason))
            say(f"building without compiled kernels: {reason}.")
            self.record(reason)

    def target(self) -> Path:
        """The package's folder that the libraries go to."""
        return ROOT / "frskd_fast" if self.inplace else Path(self.build_lib).resolve() / "frskd_fast"

    def record(self, why: CannotBuild, asked: bool = False) -> None:
        """Leave in the package why it has no kernels: pip shows nobody what a build prints."""
        self.target().mkdir(parents=True, exist_ok=True)
        record = {"without_kernels": why.reason, "advice": why.advice, "asked": asked}
        (self.target() / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")

    def fail(self, reason: str) -> NoReturn:
        raise SystemExit(f"frskd_fast: FRSKD_FAST_BUILD={MODE} cannot be met: {reason}.")

    def build(self) -> None:
        if MODE not in MODES:
            self.fail(f"it is not one of {', '.join(MODES)}")
        target = self.target()
        # Kernels of an earlier build must not stand in for those that this one fails to build.
        for stale in [*target.glob("_C*.so"), *target.glob(RECORD)]:
            stale.unlink()
        if MODE == "none":
            say("building without compiled kernels, as FRSKD_FAST_BUILD=none asks.")
            self.record(CannotBuild("FRSKD_FAST_BUILD=none asked for that", "unset it"), asked=True)
            return
        if sys.platform == "win32":
            raise CannotBuild(
                "the kernels use GCC's and Clang's vector types, which the Windows compiler lacks",
                "build them under WSL",
            )
        torch = find_torch()
        with_cuda = self.decide_cuda(torch)
        # Beside the sources for an editable install, so that the next build compiles only what changed.
        folder = ((ROOT / "build" if self.inplace else Path(self.build_temp)) / "kernels").resolve()
        steps = cpu_steps(torch, folder)
        cpu_count = len(steps)
        if with_cuda:
            steps += cuda_steps(torch, folder)
        compile_all(steps, folder)
        cpu_flags = torch_library_flags(torch, ["torch_cpu"], folder)
        link([step.output for step in steps[:cpu_count]], target / "_C.so", cpu_flags)
        if with_cuda:
            # nvcc links, because it knows where its own runtime library is.
            flags = torch_library_flags(torch, ["torch_cpu", "torch_cuda", "c10_cuda"], folder)
            link(
                [step.output for step in steps[cpu_count:]], target / "_C_cuda.so", nvcc_link_flags(flags), find_nvcc()
            )

    def decide_cuda(self, torch: Torch) -> bool:
        about = f"PyTorch {torch.version}, {platform.machine()}, {find_compiler()[0]}"
        if MODE == "cpu":
            say(f"building the CPU kernels ({about}).")
            return False
        if MODE == "cuda":
            say(f"building the CPU and CUDA kernels ({about}, {find_nvcc()}).")
            return True
        if torch.cuda is None:
            say(f"building the CPU kernels ({about}); this PyTorch has no CUDA (FRSKD_FAST_BUILD=cuda builds anyway).")
            return False
        try:
            nvcc = find_nvcc()
        except CannotBuild as reason:
            say(f"building the CPU kernels ({about}) without CUDA: {reason}.")
            return False
        say(f"building the CPU and CUDA kernels ({about}, {nvcc}).")
        return True


class PlatformWheel(bdist_wheel):
    """No Python symbol is used, so the wheel belongs to the platform but to no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any((Path(self.bdist_dir) / "frskd_fast").glob("_C*.so"))
        return ("py3", "none", super().get_tag()[2] if built else "any")


setup(
    packages=[*find_packages(include=["frskd_fast", "frskd_fast.*"]), "frskd_fast.kernels"],
    package_dir={"frskd_fast": "frskd_fast", "frskd_fast.kernels": "kernels"},
    package_data={"frskd_fast": ["py.typed"], "frskd_fast.training": ["recipes/*/*.yaml"]},
    ext_modules=[Extension("frskd_fast._C", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
