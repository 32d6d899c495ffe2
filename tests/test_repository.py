"""The repository keeps its own rules: packages, borders, public names, and commands that the README promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qlora_compile

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCE_FOLDERS = ("qlora_compile", "passes", "runtime")
SOURCES = sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py"))
DOCUMENTS = [
    path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")) if path.exists()
]


def _package_of(folder: Path) -> str:
    """`runtime/kernels` -> `qlora_compile.runtime.kernels`."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "qlora_compile" else ("qlora_compile", *parts))


def _imported_modules(path: Path) -> set[str]:
    """Absolute names of every module that a file imports, inside functions too; relative imports resolved."""
    package = _package_of(path.parent).split(".")
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def test_packages_listed_are_the_folders() -> None:
    folders = {_package_of(path.parent) for path in SOURCES}
    assert sorted(folders) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_every_package_folder_has_an_init() -> None:
    assert [str(path.parent) for path in SOURCES if not (path.parent / "__init__.py").exists()] == []


def test_templates_and_other_data_are_packaged() -> None:
    """A file that is not Python needs a line in package-data, or the wheel lacks it."""
    declared = PROJECT["tool"]["setuptools"]["package-data"]
    for folder in SOURCE_FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                package = next(parent for parent in path.parents if (parent / "__init__.py").exists())
                patterns = declared.get(_package_of(package), [])
                assert any(path.match(pattern) for pattern in patterns), path


@pytest.mark.parametrize(("here", "there"), [("passes", "runtime"), ("runtime", "passes")])
def test_passes_and_runtime_do_not_import_each_other(here: str, there: str) -> None:
    for path in (ROOT / here).rglob("*.py"):
        crossing = [name for name in _imported_modules(path) if re.match(rf"(qlora_compile\.)?{there}\b", name)]
        assert not crossing, f"{path} imports {crossing}"


def test_runtime_never_sees_a_graph() -> None:
    for path in (ROOT / "runtime").rglob("*.py"):
        graphs = [name for name in _imported_modules(path) if re.match(r"torch\.fx\b", name)]
        assert not graphs, f"{path} imports {graphs}"


def test_nothing_imports_the_folders_by_their_top_level_names() -> None:
    """`import runtime` from the repository root would execute a second copy."""
    for path in (*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")):
        wrong = [name for name in _imported_modules(path) if name.split(".")[0] in ("passes", "runtime")]
        assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_importing_a_folder_by_its_top_level_name_says_what_to_do(name: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"import this package as 'qlora_compile.{name}'" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", sorted(qlora_compile.__all__))
def test_public_names_import(name: str) -> None:
    value = getattr(qlora_compile, name)
    assert name in dir(qlora_compile)
    assert callable(value) or isinstance(value, str)


def test_no_public_name_is_also_a_module() -> None:
    """Importing a submodule binds its name on the package, and would hide the function of that name."""
    modules = {path.stem for path in (ROOT / "qlora_compile").glob("*.py")} | {"passes", "runtime"}
    assert modules & set(qlora_compile.__all__) == set()


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qlora_compile.nothing  # noqa: B018


def test_importing_the_package_and_the_command_line_does_not_import_torch() -> None:
    code = "import sys, qlora_compile.cli_app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_version_is_the_same_in_both_places() -> None:
    assert PROJECT["project"]["version"] == qlora_compile.__version__


def test_make_targets_and_commands_in_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    from qlora_compile.cli_app import app

    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    groups = [group.typer_instance for group in app.registered_groups]
    commands |= {str(group.info.name) for group in groups if group}
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets, path
        assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= targets, path
        assert set(re.findall(r"qlora-compile ([a-z]+)\b", text)) <= commands, path


def test_files_that_documents_name_exist() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path} links to {target}"


def test_constraints_pin_each_version_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    assert "torch==2.13.0" in pins
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(names) == len(set(names))


def test_every_example_has_a_main() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert "main" in functions, path
