"""Stores on other hosts are opened: passwords, TLS, URLs and packages; and commands and the demo use them."""

import json
import socket
import ssl
import sys
from importlib import import_module

import pytest
import trustme

import servers
from lmcache_mm.commands import cli
from lmcache_mm.stores import open_store
from test_stores import get, key, payload, remote_url, server, stats_of


def test_passwords_come_from_the_environment_or_a_private_file(environment, tmp_path):
    server = servers.valkey(tmp_path, "--requirepass", "the right one")
    url = f"valkey://127.0.0.1:{server.port}?timeout=20"
    for wrong in (None, "the wrong one"):
        if wrong:
            environment.setenv("LMCACHE_MM_VALKEY_PASSWORD", wrong)
        with pytest.raises(PermissionError, match="LMCACHE_MM_VALKEY_PASSWORD") as raised:
            open_store(url)
        assert "wrong" not in str(raised.value)
    environment.setenv("LMCACHE_MM_VALKEY_PASSWORD", "the right one")
    open_store(url).close()
    environment.delenv("LMCACHE_MM_VALKEY_PASSWORD")
    file = tmp_path / "password"
    file.write_text("the right one\n")
    file.chmod(0o600)
    environment.setenv("LMCACHE_MM_VALKEY_PASSWORD_FILE", str(file))
    store = open_store(url)
    store.put([key(1)], [payload(1)])
    assert get(store, 1) == payload(1)
    store.close()
    file.chmod(0o644)
    with pytest.raises(PermissionError, match=r"LMCACHE_MM_VALKEY_PASSWORD_FILE: .* must be readable only by"):
        open_store(url)
    server.stop()


def test_wrong_keys_of_s3_and_buckets_that_are_not_there_are_errors(environment):
    url = remote_url("s3")  # whose server has the right keys
    environment.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(PermissionError, match="refuses the credentials of AWS_ACCESS_KEY_ID") as raised:
        open_store(url)
    assert "another" not in str(raised.value)
    environment.setenv("AWS_SECRET_ACCESS_KEY", servers.AWS["AWS_SECRET_ACCESS_KEY"])
    with pytest.raises(ValueError, match="there is no bucket s3://none-such"):
        open_store(url.replace("bucket/", "none-such/"))


def test_tls_checks_the_servers_certificate(environment, tmp_path):
    authority = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    (tmp_path / "other.pem").write_bytes(trustme.CA().cert_pem.bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    proxy = servers.TlsProxy(server("valkey").port, context)
    url = f"valkey://127.0.0.1:{proxy.port}?timeout=5&tls=1&ca={tmp_path}"
    store = open_store(f"{url}/ca.pem")
    store.put([key(1)], [payload(1, 1_000_000)])
    assert get(store, 1, 1_000_000) == payload(1, 1_000_000)
    store.close()
    store = open_store(f"{url}/other.pem")
    assert store.stats()["down"] == 1
    store.close()
    with pytest.raises(ValueError, match=rf"valkey://127.0.0.1:{proxy.port} speaks TLS: add \?tls=1"):
        open_store(f"valkey://127.0.0.1:{proxy.port}?timeout=20")
    proxy.close()
    with pytest.raises(ValueError, match=r"does not speak TLS: leave out \?tls=1"):
        open_store(f"{server('valkey').url}&tls=1")


def test_a_valkey_that_nobody_runs_is_said_at_once(environment, caplog):
    store = open_store(f"valkey://127.0.0.1:{servers.free_port()}?timeout=4")
    assert store.stats()["down"] == 1
    assert "Connection refused" in caplog.text
    store.close()


def test_without_the_secret_no_store_beyond_this_host_opens(environment):
    environment.delenv("LMCACHE_MM_SECRET")
    for url in ("valkey://127.0.0.1:1", "s3://bucket", "mooncake://127.0.0.1:1"):
        with pytest.raises(ValueError, match=r"store: \w+: needs the deployment's secret"):
            open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "valkey://user:hunter2@host:6379",
        "valkey:user:hunter2@host:6379",
        "s3://bucket?endpoint=https://user:hunter2@host",
        "tiered:mem://?capacity=1MiB,valkey://:hunter2@host:6379",
        "tiered:mem://?capacity=1MiB,valkey:hunter2@host:6379",
        "valkey://host:6379?password=hunter2",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url, environment):
    for one in (url, [url]):
        with pytest.raises(ValueError) as raised:
            open_store(one)
        assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("host, warned", [("127.0.0.1", 0), ("localhost", 0), ("[::1]", 0), ("10.0.0.7", 1)])
def test_an_endpoint_without_tls_beyond_this_host_is_warned_of(host, warned, recwarn, environment):
    connecting = import_module("lmcache_mm.stores.remote.s3").connecting
    for scheme in ("http", "https"):
        connecting("bucket", "", f"{scheme}://{host}:1", "r", 1.0)
    said = [str(warning.message) for warning in recwarn if "not encrypted" in str(warning.message)]
    assert len(said) == warned


@pytest.mark.parametrize(
    "url, text",
    [
        ("valkey://", "expected valkey://HOST:PORT, got valkey://"),
        ("valkey://host", "expected valkey://HOST:PORT"),
        ("valkey://host:70000", "expected valkey://HOST:PORT"),
        ("valkey://host:1/2", "expected valkey://HOST:PORT"),
        ("valkey://host:1?capacity=1GiB", "unknown option 'capacity'"),
        ("valkey://host:1?tls=yes", "tls: expected 0 or 1, got 'yes'"),
        ("valkey://host:1?ca=/x", "ca: expected with tls=1 only"),
        ("valkey://host:1?timeout=0", "timeout: expected more than 0 seconds"),
        ("valkey://host:1?timeout=soon", "timeout: expected seconds, got 'soon'"),
        ("valkey://host:1?connections=0", "connections: expected 1 to 999, got '0'"),
        ("s3://", "expected s3://BUCKET/PREFIX"),
        ("s3://bucket?endpoint=host", "endpoint: expected a URL that begins with http"),
        ("mooncake://host", "expected mooncake://HOST:PORT"),
        ("mooncake://host:1?ttl=5", "unknown option 'ttl'"),
    ],
)
def test_urls_of_stores_beyond_this_host_that_open_none_say_why(url, text, environment):
    with pytest.raises(ValueError, match=text):
        open_store(url)


def test_a_bucket_that_cannot_be_reached_is_said_in_one_line(environment, caplog, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert cli.main(["stat", f"s3://bucket?endpoint=http://127.0.0.1:{free.getsockname()[1]}"]) == 2
    said = capsys.readouterr().err
    assert "since it failed: Generic S3 error: " in said
    assert said.count("\n") == 1
    assert [record.message.count("\n") for record in caplog.records] == [0]


def test_a_file_of_certificates_that_is_missing_is_named_with_its_option(tmp_path, environment):
    with pytest.raises(FileNotFoundError, match=r"store: ca: No such file or directory: '.*/ca\.pem'"):
        open_store(f"valkey://host:1?tls=1&ca={tmp_path}/ca.pem")


@pytest.mark.parametrize(
    "scheme, package", [("valkey", "glide_sync"), ("s3", "obstore"), ("mooncake", "mooncake.store")]
)
def test_a_client_that_is_not_installed_is_named_with_its_extra(scheme, package, environment):
    environment.setitem(sys.modules, package, None)
    environment.delitem(sys.modules, f"lmcache_mm.stores.remote.{scheme}", raising=False)
    with pytest.raises(RuntimeError, match=rf"store: {scheme}: .*pip install -e '\.\[{scheme}\]'"):
        open_store({"s3": "s3://bucket"}.get(scheme, f"{scheme}://host:1"))


def test_stat_and_clear_work_on_stores_beyond_this_host(environment, capsys):
    url = remote_url("valkey")
    store = open_store(url)
    store.put([key(1), key(2)], [payload(1), payload(2)])
    assert cli.main(["stat", url]) == 0
    assert "records          2" in capsys.readouterr().out.splitlines()
    assert cli.main(["clear", url]) == 0
    assert "2 records removed" in capsys.readouterr().out
    assert stats_of(store)["records"] == 0
    store.close()
    with servers.mute() as port:
        assert cli.main(["stat", f"valkey://127.0.0.1:{port}?timeout=0.2"]) == 2
    assert "python -m lmcache_mm: valkey://127.0.0.1" in capsys.readouterr().err


def test_the_demo_starts_warm_from_what_an_earlier_run_left_on_a_server(environment, tmp_path, capsys):
    pytest.importorskip("transformers", reason="the demo needs its packages: pip install -e '.[demo]'")
    import demo  # noqa: PLC0415

    hits = []
    for run in ("first", "second"):
        report = tmp_path / f"{run}.json"
        options = ["--image-size", "112", "--max-new-tokens", "2", "--store", remote_url("valkey")]
        assert demo.main([*options, "--json", str(report)]) == 0
        rows = json.loads(report.read_text())["rows"]
        assert all(row["equal"] for row in rows)
        hits.append([row["total_tokens"] - row["kv_hits"] for row in rows])
    assert "Keys from content" in capsys.readouterr().out
    assert hits[0][0] > 1
    assert hits[1] == [1] * 8
