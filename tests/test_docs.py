"""What the documents say is executed and compared with the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from frskd_fast.models import create_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *PAGES]
# Behind the name of a file stands what the file holds; tests/test_walkthroughs.py runs these blocks.
PYTHON_BLOCK = re.compile(r"^(`[\w/]+\.py`:\n\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# `csrc/cpu/<op>_*.h`, `tests/numerics.py`, `bench/results/`
SOURCE_PATH = re.compile(r"`((?:frskd_fast|kernels|csrc|bench|tests|scripts|examples)/[\w/.<>*-]*)`")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


def name_of(document: Path) -> str:
    """The path from the root of the repository."""
    return document.relative_to(ROOT).as_posix()


def python_blocks() -> list[Any]:
    """Every Python block, with the newlines before it so that an error shows the document's own line number."""
    cases = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in PYTHON_BLOCK.finditer(text):
            if match[1] is None:
                line = text.count("\n", 0, match.start(2))
                cases.append(pytest.param(str(document), "\n" * line + match[2], id=f"{name_of(document)}:{line + 1}"))
    return cases


@pytest.mark.parametrize(("document", "code"), python_blocks())
def test_python_block_runs_on_its_own(
    document: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, document, "exec"), {"__name__": "document"})


def test_pages_that_show_code_have_blocks_to_run() -> None:
    found = {case.id.rpartition(":")[0] for case in python_blocks()}
    wanted = {
        "README.md",
        *(f"docs/{name}.md" for name in ("migrate", "numerics", "data", "training", "methods/frskd")),
    }
    assert wanted <= found


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files(document: Path) -> None:
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", [page for page in PAGES if page.name != "add_an_operation.md"], ids=name_of)
def test_sources_named_in_the_documents_exist(document: Path) -> None:
    named = {path for path in SOURCE_PATH.findall(document.read_text(encoding="utf-8")) if not path.endswith(".so")}
    missing = [path for path in named if not any(ROOT.glob(re.sub(r"<\w+>", "*", path)))]
    assert not missing


def test_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_leads_to_every_guide() -> None:
    targets = {Path(target).name for target in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {"migrate.md", "training.md", "data.md", "scaling.md", "benchmarks.md", "architecture.md"} <= targets


def test_recipes_named_in_the_documents_exist() -> None:
    recipes = {path.stem for path in (ROOT / "frskd_fast" / "training" / "recipes").rglob("*.yaml")}
    named = set()
    for document in DOCUMENTS:
        named.update(re.findall(r"--config ([\w/]+)(?![\w.])", document.read_text(encoding="utf-8")))
    named -= {"RECIPE"}
    assert "digits" in named
    assert named <= recipes, f"no such recipes: {sorted(named - recipes)}"


def test_every_environment_variable_is_documented() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "frskd_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    used = set()
    for source in sources:
        used.update(re.findall(r"environ(?:\.get)?[(\[]\s*\"(\w+)\"", source.read_text(encoding="utf-8")))
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "environment.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    for source in (ROOT / "csrc").rglob("*.cpp"):
        used.update(re.findall(r"getenv\(\"(\w+)\"", source.read_text(encoding="utf-8")))
    assert {"FRSKD_FAST_IMPL", "FRSKD_FAST_BUILD"} <= used
    assert used <= documented, f"used but not documented: {sorted(used - documented)}"
    assert documented <= used, f"documented but not used: {sorted(documented - used)}"


def test_documented_default_architectures_are_those_of_the_build() -> None:
    default = re.search(r'^DEFAULT_ARCHITECTURES = "(.+)"$', (ROOT / "setup.py").read_text("utf-8"), re.MULTILINE)
    row = re.search(
        r"^\| `TORCH_CUDA_ARCH_LIST` \| `(.+?)` \|", (ROOT / "docs" / "environment.md").read_text("utf-8"), re.M
    )
    assert default is not None and row is not None
    assert row[1] == default[1]


def test_make_targets_named_in_the_documents_exist() -> None:
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", document.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= defined, name_of(document)
        assert named or document not in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"), name_of(document)


def test_documented_networks_have_the_documented_parameters() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| (.*?)\|$", (ROOT / "docs" / "models.md").read_text("utf-8"), re.M
    )
    assert {"resnet8x4", "wrn_40_2", "vgg13", "mobilenetv2", "cifar_resnet50"} <= {name for name, *_ in rows}
    for name, *documented, aliases in rows:
        with torch.device("meta"):
            network = create_model(f"{name}_aux", 100)
            for alias in re.findall(r"`(\w+)`", aliases):
                assert type(create_model(alias, 100)) is type(network.backbone)
        parts = (network.backbone, network.auxiliary_classifier)
        assert documented == [f"{sum(p.numel() for p in part.parameters()):,}" for part in parts], name


def test_evidence_is_that_of_its_result_files() -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "evidence.py"), "--check"], check=True, timeout=60)


def test_each_generated_table_has_one_place() -> None:
    places = {name: "bench" for name in ("README.md", "docs/benchmarks.md", "docs/methods/index.md")}
    places["docs/evidence.md"] = "evidence"
    for document, name in [*places.items(), *(("docs/evidence.md", name) for name in ("evidence-teachers", "demo"))]:
        text = (ROOT / document).read_text(encoding="utf-8")
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        assert text.count(begin) == text.count(end) == 1, document
        assert text.index(begin) < text.index(end), document
