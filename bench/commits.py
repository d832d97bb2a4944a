"""Another commit of this repository, built beside this one: `build/base/<commit>-<kernels>/frskd_fast`."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from bench.results import ROOT

FOLDER = ROOT / "build" / "base"


def git(*arguments: str) -> bytes:
    """What git answers in this checkout."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise ValueError("comparing commits needs git, which was not found; install it or put it on PATH.") from None
    except subprocess.CalledProcessError as refusal:
        lines = refusal.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise ValueError(f"git {arguments[0]} failed: {lines[-1]}.") from None


def resolve(commit: str) -> str:
    """The full hash of a commit, given as git takes it: a hash, a branch, a tag, HEAD~2."""
    git("rev-parse", "--git-dir")
    try:
        return git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").decode().strip()
    except ValueError:
        raise ValueError(
            f"--base is {commit!r}, but this repository has no such commit; fetch it (a shallow clone lacks old ones: git "
            "fetch --unshallow) or name one of `git log`."
        ) from None


def kernels_of(library: Path) -> str:
    """What the package in the folder `library` was built with, as FRSKD_FAST_BUILD says it."""
    package = library / "frskd_fast"
    return "cuda" if any(package.glob("_C_cuda.*")) else "cpu" if any(package.glob("_C.*")) else "none"


def built(commit: str, kernels: str) -> Path:
    """The folder to put on PYTHONPATH for the package of `commit` (a full hash); built unless an earlier run has done so."""
    library = FOLDER / f"{commit[:12]}-{kernels}"
    if library.is_dir():
        return library
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole, so that an interrupted build is not taken for one.
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        source, target = Path(folder) / "source", Path(folder) / "library"
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit))) as archive:
            archive.extractall(source, filter="data")
        command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(Path(folder) / "objects")]
        environment = {**os.environ, "FRSKD_FAST_BUILD": kernels, "FRSKD_FAST_WERROR": "0"}
        done = subprocess.run(
            [*command, "--build-lib", str(target)], cwd=source, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
            raise ValueError(f"commit {commit[:12]} does not build with FRSKD_FAST_BUILD={kernels}:\n{last}")
        shutil.move(target, library)
    return library
