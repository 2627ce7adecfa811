"""Who may read from a peer, and from whom: certificates and the deployment's secret."""

import socket
import ssl

import pytest

from lending import LARGE, SEAL, answering, ends, half_open, large, opened, serving
from lmcache_mm.commands import certificates, cli
from lmcache_mm.secret import Seal
from lmcache_mm.stores import open_store
from lmcache_mm.stores.peers import channel, peer
from lmcache_mm.stores.peers.channel import Tls
from lmcache_mm.stores.peers.server import Server
from servers import PATIENCE_S, until
from test_stores import get, key, payload


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A directory of certificates: good ones, some of another CA, and an expired one."""
    folder = tmp_path_factory.mktemp("certificates")
    for name, hosts in (("ours", ["127.0.0.1", "localhost"]), ("theirs", ["127.0.0.1"])):
        certificates.make(folder / name, hosts, 30)
    (folder / "expired").mkdir()
    certificates._make_host(folder / "expired", "127.0.0.1", *certificates._read_ca(folder / "ours"), days=-1)
    return folder


def test_certificates_are_private_and_one_command_makes_them(tmp_path, capsys):
    place = tmp_path / "tls"
    assert cli.main(["certificates", str(place), "one.example", "10.0.0.7"]) == 0
    assert cli.main(["certificates", str(place), "::1"]) == 0
    assert f"{place}/one.example: copy it to that host" in capsys.readouterr().out
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) == 2 + 3 * 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert len({(place / host / "ca.pem").read_bytes() for host in ("one.example", "10.0.0.7", "::1")}) == 1
    assert cli.main(["certificates", str(place), "one.example"]) == 2
    assert "remove it to make a new one" in capsys.readouterr().err
    (place / "one.example" / "key.pem").chmod(0o640)
    with pytest.raises(PermissionError, match=r"key\.pem must be readable only by its owner \(chmod 600\)"):
        Tls(place / "one.example")
    with pytest.raises(ValueError, match=r"there is no .*ca\.pem"):
        Tls(tmp_path)


NO_HOSTS = ["", "../x", "..", "a/b", "a..b", "h.", "*.example", "Host", "-h", "é", "ca.key", 64 * "a", 127 * "x." + "y"]
NO_ADDRESSES = ["[::1]", "::0", "10.0.0.256", "fe80::1%lo"]


@pytest.mark.parametrize(
    "hosts, days, text",
    [
        *(([host], 30, "expected a DNS name in lower case or an address") for host in NO_HOSTS + NO_ADDRESSES),
        (["one", "two", "one"], 30, "host: one is named twice"),
        *((["one"], days, "days: expected 1 to 3650, ") for days in (0, -1, 3651, 999_999_999)),
        (["one", "there"], 30, "remove it to make a new one"),
    ],
)
def test_certificates_that_cannot_be_made_are_said_before_anything_is_written(tmp_path, capsys, hosts, days, text):
    (tmp_path / "there").symlink_to("nowhere")
    assert cli.main(["certificates", f"--days={days}", "--", str(tmp_path), *hosts]) == 2
    assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_directory_of_certificates_that_cannot_be_made_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    for place, text in (
        (tmp_path / "no" / "such", f"certificates: there is no {tmp_path}/no to make such in"),
        (tmp_path / "file", f"certificates: expected a directory, got {tmp_path}/file"),
    ):
        assert cli.main(["certificates", str(place), "one"]) == 2
        assert capsys.readouterr().err == f"python -m lmcache_mm: {text}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_ca_that_is_none_signs_nothing(tmp_path):
    certificates.make(tmp_path / "a", ["one"], 30)
    certificates.make(tmp_path / "b", ["one"], 30)
    for broken, content, text in (
        ("ca.key", (tmp_path / "b" / "ca.key").read_bytes(), r"ca\.key is not the key of .*ca\.pem"),
        ("ca.key", b"", r"ca\.key is not a key made by this command"),
        ("ca.pem", b"", r"ca\.pem is not a certificate"),
        ("ca.key", None, r"ca\.pem has no ca\.key beside it"),
    ):
        place = tmp_path / "a" / broken
        before = place.read_bytes()
        place.unlink() if content is None else place.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            certificates.make(tmp_path / "a", ["two"], 30)
        assert not (tmp_path / "a" / "two").exists()
        place.write_bytes(before)
    with pytest.raises(ValueError, match="days: expected 1 to 3649"):
        certificates.make(tmp_path / "a", ["two"], 3650)


def test_making_certificates_that_was_interrupted_can_be_done_again(tmp_path, monkeypatch):
    """Interrupted after any number of files."""
    write = certificates._write
    for done in range(5):
        left = [None] * done

        def interrupted(path, content, left=left):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(certificates, "_write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                certificates.make(tmp_path / str(done), ["one"], 30)
        assert not (tmp_path / str(done) / "one").exists()
        (place,) = certificates.make(tmp_path / str(done), ["one"], 30)
        assert {path.name for path in place.parent.iterdir()} == {"ca.key", "ca.pem", "one"}
        Tls(place)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_hosts_with_certificates_of_one_ca_read_each_other(lent, tls, host):
    lent.put([key(1)], [large(1, 3 * LARGE)])
    with (
        serving(lent, tls=Tls(tls / "ours" / host)) as server,
        opened(server.address[1], f"timeout=20&tls={tls}/ours/localhost", host) as reader,
    ):
        assert get(reader, 1, 3 * LARGE) == large(1, 3 * LARGE)
        assert reader._idle[0]._sock.version() == "TLSv1.3"


@pytest.mark.parametrize(
    "servers, clients, why",
    [
        ("ours/127.0.0.1", "theirs/127.0.0.1", "certificate verify failed"),
        ("theirs/127.0.0.1", "ours/127.0.0.1", "certificate verify failed"),
        ("expired/127.0.0.1", "ours/127.0.0.1", "certificate has expired"),
        ("ours/127.0.0.1", "expired/127.0.0.1", ""),  # the server says so in an alert
        ("ours/localhost", "ours/127.0.0.1", "IP address mismatch"),
        ("ours/127.0.0.1", None, "the server hung up: if it expects TLS, the URL needs ?tls=DIR"),
        ("ours/127.0.0.1", None, "is disconnected: the client does not speak TLS: its URL needs ?tls=DIR"),
        (None, "ours/127.0.0.1", "the server does not speak TLS: start `serve` with --tls, or leave out ?tls="),
        (None, "ours/127.0.0.1", "the client speaks TLS, and this server was started without --tls"),
    ],
)
def test_other_certificates_are_misses_and_said(lent, tls, caplog, servers, clients, why):
    lent.put([key(1)], [payload(1)])
    with (
        serving(lent, tls=Tls(tls / servers) if servers else None) as server,
        opened(server.address[1], "timeout=20" + (f"&tls={tls}/{clients}" if clients else "")) as reader,
    ):
        assert reader.contains([key(1)]) == [False]
        assert get(reader, 1) is None
        assert reader.stats()["errors"] == 1  # once: then it is left alone
    assert f"{reader._name} failed and is left alone for 10 s" in caplog.text
    assert why in caplog.text


def test_tls_before_1_3_is_refused_by_both_sides(lent, tls):
    ours = Tls(tls / "ours" / "127.0.0.1")
    for context in (ours.client, ours.server):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    spoken = []

    def script(sock):
        with ours.server.wrap_socket(sock.dup(), server_side=True) as over_tls:
            spoken.append(over_tls.version())

    with (
        answering(script, handshake=False) as port,
        opened(port, f"timeout=20&tls={tls}/ours/127.0.0.1") as reader,
        serving(lent, tls=Tls(tls / "ours" / "127.0.0.1")) as server,
        socket.create_connection(server.address, PATIENCE_S) as sock,
    ):
        assert reader.contains([key(1)]) == [False]
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            ours.client.wrap_socket(sock, server_hostname="127.0.0.1")
    assert spoken == []


def test_a_client_without_certificate_is_refused_in_the_handshake(lent, tls):
    context = ssl.create_default_context(cafile=tls / "ours" / "ca.pem")
    with (
        serving(lent, tls=Tls(tls / "ours" / "127.0.0.1")) as server,
        socket.create_connection(server.address, PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
        pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
    ):
        sock.recv(1000)


def test_without_certificates_only_loopback_is_served_and_read(lent, monkeypatch):
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 is not a loopback address: both sides need certificates"):
        Server(lent, ("0.0.0.0", 0), SEAL, None)
    for host in ("10.0.0.1", "other.example", "0.0.0.0"):
        with pytest.raises(ValueError, match="both sides need certificates"):
            open_store(f"peer://{host}:7700")
    with opened(7700, host="localhost") as reader:
        addresses = [(0, 0, 0, "", (address, 7700)) for address in ("127.0.0.1", "10.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        connected_to = []
        monkeypatch.setattr(peer, "connect", lambda *arguments: connected_to.append(arguments))
        assert reader.contains([key(1)]) == [False]
        assert reader.stats()["errors"] == 1
        assert not connected_to


@pytest.mark.parametrize("over_tls", [False, True])
def test_another_secret_is_a_miss_and_the_server_tells_nothing(lent, tls, caplog, over_tls):
    lent.put([key(1)], [payload(1)])
    ours = Tls(tls / "ours" / "127.0.0.1") if over_tls else None
    with (
        serving(lent, Seal(b"another secret, of another deployment"), ours) as server,
        opened(server.address[1], "timeout=20" + (f"&tls={tls}/ours/127.0.0.1" if over_tls else "")) as reader,
    ):
        assert get(reader, 1) is None
        assert "does not prove the deployment's secret" in caplog.text


def test_without_a_secret_nothing_is_opened_or_served(url, monkeypatch, capsys):
    monkeypatch.delenv("LMCACHE_MM_SECRET")
    with pytest.raises(ValueError, match=r"peer://127\.0\.0\.1:7700: needs the deployment's secret"):
        open_store("peer://127.0.0.1:7700")
    assert cli.main(["serve", "--store", url, "--listen", "127.0.0.1:0"]) == 2
    assert "serve: needs the deployment's secret, also on loopback" in capsys.readouterr().err


def test_who_sends_the_servers_proof_back_or_one_of_another_connection_is_disconnected(server):
    sock, said = half_open(server.address[1])
    sock.sendall(said[-32:])
    assert ends(sock)
    other, _ = half_open(server.address[1])
    theirs = channel._HELLO.pack(channel._MAGIC, channel.VERSION, bytes(32))
    recorded = channel._proof(SEAL.connection_key(theirs + said[:-32]), b"client")  # correct for the first connection
    other.sendall(recorded)
    assert ends(other)
    sock.close()
    other.close()


def test_a_certificate_of_the_deployment_is_not_enough_to_stand_between_two_others(lent, tls, caplog):
    lent.put([key(1)], [payload(1)])
    between = Tls(tls / "ours" / "localhost")

    def relay(sock):
        with (
            between.server.wrap_socket(sock.dup(), server_side=True) as client,
            socket.create_connection(server.address) as plain,
            between.client.wrap_socket(plain, server_hostname="127.0.0.1") as behind,
        ):
            behind.sendall(client.recv(1000))  # the hellos
            relayed.append(behind.recv(1000))
            client.sendall(relayed[0])
            relayed.append(client.recv(1000))

    relayed = []
    with (
        serving(lent, tls=Tls(tls / "ours" / "127.0.0.1")) as server,
        answering(relay, handshake=False) as port,
        opened(port, f"timeout=20&tls={tls}/ours/127.0.0.1", "localhost") as reader,
    ):
        assert get(reader, 1) is None
        assert "does not prove the deployment's secret" in caplog.text
        until(lambda: len(relayed) == 2, "nothing was relayed")
        assert relayed[1] == b""


def test_another_version_is_named_on_both_sides(server, caplog):
    with socket.create_connection(server.address, PATIENCE_S) as sock:
        sock.sendall(channel._HELLO.pack(channel._MAGIC, 2, bytes(32)))
        magic, version, _ = channel._HELLO.unpack(sock.recv(1000, socket.MSG_WAITALL)[:42])
        assert (magic, version) == (channel._MAGIC, 1)

    def newer(sock):
        sock.recv(1000)
        sock.sendall(channel._HELLO.pack(channel._MAGIC, 2, bytes(32)))

    with answering(newer, handshake=False) as port, opened(port) as reader:
        assert reader.contains([key(1)]) == [False]
    assert "the other side speaks version 2 of this protocol, this side 1" in caplog.text
