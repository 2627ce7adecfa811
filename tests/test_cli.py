"""python -m lmcache_mm stat and clear."""

import uuid

import pytest

from lmcache_mm.cli import main
from lmcache_mm.stores import open_store
from test_stores import key, payload


@pytest.fixture(params=["shm", "file"])
def url(request, tmp_path):
    place = f"/test-{uuid.uuid4().hex}" if request.param == "shm" else f"{tmp_path}/store"
    url = f"{request.param}://{place}"
    yield url
    main(["clear", url])


def test_stat_prints_what_a_store_holds(url, capsys):
    store = open_store(f"{url}?capacity=1MiB")
    store.put([key(1)], [payload(1, 5000)])
    store.close()
    assert main(["stat", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "capacity_bytes   1048576  (1 MiB)" in lines
    assert "used_bytes       5000  (4.883 KiB)" in lines
    assert "records          1" in lines
    assert not any(line.startswith("hits") for line in lines)


def test_clear_removes_the_store_and_while_it_is_open_only_what_is_in_it(url, capsys):
    store = open_store(f"{url}?capacity=1MiB")
    store.put([key(1), key(2)], [payload(1), payload(2)])
    assert main(["clear", url]) == 0
    assert "2 records removed; " in capsys.readouterr().out
    assert store.contains([key(1)]) == [False]
    store.close()
    assert main(["clear", url]) == 0
    assert capsys.readouterr().out.startswith("removed ")
    assert main(["clear", url]) == 2
    assert "there is none in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["stat", "shm:///none-such"], "there is none in"),
        (["stat", "nix"], "expected a URL that begins with"),
        (["clear", "mem://?capacity=1MiB"], "expected shm:///NAME or file:///DIR, got 'mem:"),
        (["clear", "shm:///../x"], "expected a name of letters"),
    ],
)
def test_mistakes_are_status_2_and_a_sentence(arguments, text, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m lmcache_mm: store: ")
    assert text in error
