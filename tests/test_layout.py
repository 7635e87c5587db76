"""Rules that no other tool checks: where files may lie, and what no source may do."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOTS = ("protos", "sdk", "kernels", "registry_service", "gateway", "inference_service")
BENCHMARKS = ROOT / "benchmarks"
# Each of them can run code that comes with data.
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}


def sources() -> list[Path]:
    """Every committed or new Python file that is ours."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [path for name in listed.stdout.splitlines() if (path := ROOT / name).exists()]
    folders = [*ROOTS, "tests", "tools", "examples", "benchmarks"]
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_the_kernels_root_is_no_importable_package() -> None:
    # transformers imports a top-level `kernels` if it finds one with Python files in it.
    assert list((ROOT / "kernels").glob("*.py")) == []


def test_no_source_imports_a_top_level_kernels() -> None:
    imports = re.compile(r"^\s*(import kernels\b|from kernels\b)", re.MULTILINE)
    assert [path for path in sources() if imports.search(path.read_text(encoding="utf-8"))] == []


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("root", ROOTS)
def test_a_root_holds_one_package_and_nothing_else_to_import(root: str) -> None:
    packages = [path.parent.name for path in (ROOT / root).glob("*/__init__.py")]
    assert len(packages) == 1
    assert packages[0].startswith("softprompt")
    assert list((ROOT / root).glob("*.py")) == []


def forbidden_uses(source: str) -> list[str]:
    """Imports and calls that no source may hold, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                imported = {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module=str(module)):
                imported = {module.partition(".")[0]}
            case ast.Call(func=ast.Name() | ast.Attribute() as function):
                if (name := ast.unparse(function)) in FORBIDDEN_CALLS:
                    found.append(f"{node.lineno}: {name}(")
                continue
            case _:
                continue
        found += [f"{node.lineno}: import {name}" for name in imported & FORBIDDEN_IMPORTS]
    return found


def test_no_source_can_run_code_that_comes_with_data() -> None:
    # Tests make the bad files that the services must refuse.
    shipped = [path for path in sources() if not path.is_relative_to(ROOT / "tests")]
    uses = {path: forbidden_uses(path.read_text(encoding="utf-8")) for path in shipped}
    assert {path: found for path, found in uses.items() if found} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "eval(text)",
        "yaml.load(text)",
    ],
)
def test_the_search_for_forbidden_uses_finds_them(source: str) -> None:
    assert len(forbidden_uses(source)) == 1


def test_every_package_says_that_it_is_typed() -> None:
    missing = [root for root in ROOTS if not next((ROOT / root).glob("*/py.typed"), None)]
    assert missing == []


@pytest.mark.parametrize("root", [*ROOTS, BENCHMARKS.name])
def test_the_architecture_page_has_a_line_for_every_module(root: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    [package] = [path.parent for path in (ROOT / root).glob("*/py.typed")] or [BENCHMARKS]
    _, _, section = page.partition(f"### `{package.name}`")
    modules = [path for path in package.rglob("*.py") if path.stem != "__init__" and "_pb2" not in path.stem]
    section = section.partition("\n### ")[0]
    names = [path.relative_to(package).as_posix() for path in modules]
    assert [name for name in names if f"| `{name}` |" not in section] == []
