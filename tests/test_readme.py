"""Every Python example in the documentation runs."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from functools import cached_property
from pathlib import Path
from types import FunctionType

import pytest

import lmcache_mm

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    (document.name, code)
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for code in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
]
WITHOUT_VLLM = [example for example in EXAMPLES if "vllm" not in example[1]]  # those are in tests/vllm


@pytest.mark.parametrize("code", [code for _, code in WITHOUT_VLLM], ids=[name for name, _ in WITHOUT_VLLM])
def test_an_example_runs_and_prints_what_it_says(code, tmp_path):
    """The comment after print(...) is what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == re.findall(r"print\(.*\)  # (.*)", code)


def test_there_are_examples_of_both_kinds():
    assert {name for name, _ in WITHOUT_VLLM} == {"README.md", "chunks.md"}
    assert {name for name, _ in EXAMPLES} == {"README.md", "chunks.md", "vllm.md"}


def test_links_to_files_lead_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


REFERENCE = (ROOT / "docs" / "api.md").read_text()
PUBLIC = {f"lmcache_mm.{name}": getattr(lmcache_mm, name) for name in lmcache_mm.__all__ if not name.startswith("_")}
PUBLIC |= {f"lmcache_mm.stores.{name}": getattr(lmcache_mm.stores, name) for name in lmcache_mm.stores.__all__}
CLASSES = {name: one for name, one in PUBLIC.items() if inspect.isclass(one)}


def test_the_reference_names_what_is_public_and_nothing_else():
    assert sorted(re.findall(r"^::: (.*)$", REFERENCE, re.MULTILINE)) == sorted(PUBLIC)
    assert all(getattr(lmcache_mm.ops, name).__doc__ for name in lmcache_mm.ops.__all__)


@pytest.mark.parametrize("name", CLASSES)
def test_the_reference_shows_all_public_members_of_a_class_and_no_others(name):
    """Methods and properties are listed, those of another public class there. The signature shows the constructor's
    arguments. The class's docstring names other attributes."""
    kind = CLASSES[name]
    shown = re.search(rf"^::: {re.escape(name)}\n(?:    .*\n)*?      members: \[(.*)\]$", REFERENCE, re.MULTILINE)
    assert shown
    elsewhere = {member for base in kind.__mro__[1:] if base in CLASSES.values() for member in dir(base)}
    members = {member for member in dir(kind) if not member.startswith("_") and is_method(kind, member)} - elsewhere
    assert set(re.findall(r"\w+", shown[1])) == members
    assert all(inspect.getdoc(getattr(kind, member)) for member in members)
    attributes = {attribute for attribute in attributes_of(kind) if not attribute.startswith("_")}
    assert attributes <= {*inspect.signature(kind).parameters, *re.findall(r"attribute `(\w+)`", kind.__doc__)}


def is_method(kind: type, member: str) -> bool:
    kinds = (FunctionType, classmethod, staticmethod, property, cached_property)
    return isinstance(inspect.getattr_static(kind, member), kinds)


def attributes_of(kind: type) -> set[str]:
    """What the class annotates, and what its methods assign to self; its bases' too."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("lmcache_mm"):
            found |= set(vars(base).get("__annotations__", {}))
            assigned = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base))))
            found |= {ast.unparse(one)[5:] for one in assigned if is_of_self(one)}
    return found


def is_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
