"""Every Python example in the documentation runs."""

import re
import subprocess
import sys
from pathlib import Path

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


def test_the_reference_names_what_is_public_and_nothing_else():
    public = {f"lmcache_mm.{name}" for name in lmcache_mm.__all__ if not name.startswith("_")}
    public |= {f"lmcache_mm.stores.{name}" for name in lmcache_mm.stores.__all__}
    reference = (ROOT / "docs" / "api.md").read_text()
    shown = re.findall(r"^::: (.*)$", reference, re.MULTILINE)
    assert sorted(shown) == sorted(public)
    for of, members in re.findall(r"^::: (.*)\n    options:\n      members: \[(.+)\]$", reference, re.MULTILINE):
        for member in members.split(", "):
            assert getattr(getattr(lmcache_mm, of.removeprefix("lmcache_mm.")), member).__doc__, f"{of}.{member}"
    assert all(getattr(lmcache_mm.ops, name).__doc__ for name in lmcache_mm.ops.__all__)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
