from __future__ import annotations

import datetime
import http.server
import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import replace

import pytest

from llava_scale.errors import ConfigError, SampleError
from llava_scale.serving.fetch import Fetcher, is_public

HOST, PUBLIC = "pictures.example.org", "93.184.216.34"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "https://169.254.169.254/")
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x" * 1000)
        elif self.path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            while not self.server.done.wait(0.02):
                self.wfile.write(b"x")
        elif self.path == "/a.png?size=2":
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """Certificate and key of HOST, signed by itself."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def site(tls):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.done = threading.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.done.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetcher(site, tls):
    """Finds HOST at a public address, which is led to the local server."""

    def connect(address, timeout):
        assert address == (PUBLIC, 443)
        return socket.create_connection(("127.0.0.1", site.server_port), timeout)

    return Fetcher(
        hosts=frozenset({HOST}),
        max_bytes=50_000,
        timeout_s=20.0,
        resolve=lambda *_, **__: [(0, 0, 0, "", (PUBLIC, 443))],
        connect=connect,
        context=ssl.create_default_context(cafile=str(tls)),
    )


def test_a_file_of_an_allowed_host_is_read(fetcher):
    assert fetcher.fetch(f"https://{HOST}/a.png?size=2") == b"data"
    assert fetcher.fetch(f"https://{HOST.upper()}:443/a.png?size=2#part") == b"data"


@pytest.mark.parametrize(
    ("path", "message"),
    [("moved", "redirects, which is not followed"), ("endless", "longer than 50,000 bytes"), ("no", "status 404")],
)
def test_answers_that_are_no_file_are_refused(fetcher, path, message):
    with pytest.raises(SampleError, match=message):
        fetcher.fetch(f"https://{HOST}/{path}")


def test_a_slow_answer_ends_in_time_although_bytes_keep_coming(fetcher):
    start = time.monotonic()
    with pytest.raises(SampleError, match=r"within 0.5 s|cannot fetch"):
        replace(fetcher, timeout_s=0.5).fetch(f"https://{HOST}/slow")
    assert time.monotonic() - start < 15


def test_a_certificate_of_somebody_else_is_refused(fetcher):
    with pytest.raises(SampleError, match="cannot fetch"):
        replace(fetcher, context=ssl.create_default_context()).fetch(f"https://{HOST}/a.png?size=2")


@pytest.mark.parametrize("addresses", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::ffff:169.254.169.254"], []])
def test_a_name_that_leads_into_the_private_net_is_not_followed(addresses):
    def never(*_, **__):
        raise AssertionError("connected")

    fetcher = Fetcher(
        hosts=frozenset({HOST}), resolve=lambda *_, **__: [(0, 0, 0, "", (a, 443)) for a in addresses], connect=never
    )
    with pytest.raises(SampleError, match="not public"):
        fetcher.fetch(f"https://{HOST}/")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
     "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "ff02::1", "x"],
)  # fmt: skip
def test_addresses_that_are_not_public_are_known(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34"])
def test_public_addresses_are_known(address):
    assert is_public(address)


def test_hosts_are_taken_as_users_write_them():
    fetcher = Fetcher.for_hosts(["Example.org:443", "a.example:8443"], max_bytes=1)
    assert fetcher.hosts == {"example.org", "a.example:8443"}
    with pytest.raises(ConfigError, match="takes host names"):
        Fetcher.for_hosts(["https://example.org/"], max_bytes=1)
    with pytest.raises(SampleError, match=r"'a\.example' is not allowed"):
        fetcher.fetch("https://a.example/")
    assert ipaddress.ip_address(PUBLIC)
