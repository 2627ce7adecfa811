"""Stores of shm: and file:, and the simulation of their index."""

import shutil

import pytest

from lmcache_mm.stores.local import slab
from lmcache_mm.stores.local.file import FileStore
from lmcache_mm.stores.local.shm import ShmStore
from programs import CXX, REPO, must_run
from slabs import MIB

KINDS = [ShmStore, FileStore]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.scheme)
def kind(request):
    return request.param


@pytest.fixture
def directory(tmp_path):
    """A store's directory; closes what is still open there at the end."""
    yield tmp_path / "store"
    for store in list(slab._open.values()):
        while store._opened:
            store.close()


@pytest.fixture
def store(kind, directory):
    return kind.open(directory, MIB)


@pytest.fixture(scope="session")
def simulation(tmp_path_factory):
    """Builds simulation.cpp on request: with another slab_index.cpp, or other flags."""
    if shutil.which(CXX) is None:
        pytest.skip(f"no {CXX}")
    folder = tmp_path_factory.mktemp("simulation")

    def build(index=REPO / "csrc" / "slab_index.cpp", *flags):
        objects = []
        for source in (REPO / "tests" / "slab" / "simulation.cpp", index):
            name = "".join(c if c.isalnum() else "_" for c in f"{source}{flags}")
            objects.append(folder / f"{name}.o")
            if not objects[-1].exists():
                command = [CXX, "-std=c++17", "-O1", "-DLMC_SLAB_HOOK", f"-I{REPO / 'csrc'}", *flags]
                must_run([*command, "-c", source, "-o", objects[-1]])
        program = objects[-1].with_suffix("")
        if not program.exists():
            must_run([CXX, *flags, *objects, "-o", program])
        return program

    return build
