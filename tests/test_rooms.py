"""The folders are those that docs/design.md names, and modules import each other as it says."""

from __future__ import annotations

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "lmcache_mm").rglob("*.py")
}


def imported(module: str, path: Path) -> set[str]:
    """The modules that it imports, also inside functions and for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return (found & MODULES.keys()) - {module, "lmcache_mm"}  # lmcache_mm/__init__.py imports the API for users


def test_no_modules_import_each_other_in_a_circle():
    order = list(TopologicalSorter({name: imported(name, path) for name, path in MODULES.items()}).static_order())
    assert len(order) == len(MODULES) > 40


def test_folders_import_each_other_as_the_design_says():
    imports = [(name, other) for name, path in MODULES.items() for other in imported(name, path)]
    folders = {(folder(name), folder(other)) for name, other in imports}
    apart = {(one, other) for one, other in folders if not one.startswith(other) and not other.startswith(one)}
    assert len(apart) > 5
    assert all(other.startswith("stores") for _, other in apart)  # so none imports commands or connectors
    assert {pair for pair in apart if pair[0].startswith("stores")} == {("stores/peers/", "stores/local/")}
    above = ("commands/", "vllm/", "sglang/")
    from_below = {pair for pair in imports if not folder(pair[0]) and folder(pair[1]).startswith(above)}
    assert from_below == {("lmcache_mm.__main__", "lmcache_mm.commands.cli")}


def folder(module: str) -> str:
    """Its path in the package, with a slash at the end; empty for the package itself."""
    return "".join(f"{part}/" for part in MODULES[module].relative_to(ROOT / "lmcache_mm").parent.parts)


def test_the_folders_are_those_of_the_design():
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a clone")
    plan = re.search(r"## Rooms\n\n```\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    assert plan
    folders, above = set(), []
    for line in plan[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split()[0].rstrip("/")]
        folders.add("/".join(above))
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    there = {str(Path(file).parent) for file in files if not file.startswith(".")} - {"."}
    assert folders <= there
    assert {one for one in there if one.split("/")[0] in ("lmcache_mm", "examples")} <= folders
    assert {one.split("/")[0] for one in there} == {one.split("/")[0] for one in folders}
