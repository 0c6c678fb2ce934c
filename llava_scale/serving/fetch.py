"""Media by URL, from hosts that were allowed by name and nowhere else."""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from llava_scale.errors import ConfigError, SampleError

_PIECE = 65_536
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, kw_only=True)
class Fetcher:
    """Reads files over https.

    A host must be allowed by name, all its addresses must be public ones, and the connection goes to the address that
    was checked. Redirects are not followed. No proxy, no cookie, no password is used.

    Attributes:
        hosts: Allowed hosts, as ``name`` (port 443) or ``name:port``.
        max_bytes: Longest file.
        timeout_s: For everything together.
        resolve: Names to addresses, as ``socket.getaddrinfo``.
        connect: Address and port to a connection, as ``socket.create_connection``.
        context: Settings of TLS; certificates are checked by default.
    """

    hosts: frozenset[str] = frozenset()
    max_bytes: int = 32_000_000
    timeout_s: float = 10.0
    resolve: Callable[..., list[Any]] = socket.getaddrinfo
    connect: Callable[..., socket.socket] = socket.create_connection
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    @classmethod
    def for_hosts(cls, hosts: Iterable[str], *, max_bytes: int) -> Fetcher:
        """A fetcher for hosts as users write them.

        Raises:
            ConfigError: something that is no host name.
        """
        names = [host.lower().rstrip(".") for host in hosts]
        for name in names:
            if not re.fullmatch(r"[a-z0-9.-]+(:[0-9]{1,5})?", name):
                raise ConfigError(f"--allow-url takes host names such as images.example.org, got {name!r}")
        return cls(hosts=frozenset(name.removesuffix(":443") for name in names), max_bytes=max_bytes)

    def fetch(self, url: str) -> bytes:
        """Return the content of ``url``.

        Raises:
            SampleError: it is not allowed, too long, too slow, or not there.
        """
        parts = self._allowed(url)
        assert parts.hostname is not None
        port = parts.port or 443
        try:
            address = self._public_address(parts.hostname, port)
            return self._read(parts, address, port)
        except (OSError, http.client.HTTPException) as error:
            raise SampleError(f"cannot fetch from {parts.hostname}: {error or type(error).__name__}") from None

    def _allowed(self, url: str) -> SplitResult:
        """Parts of a URL that may be fetched."""
        if not url.isascii() or any(ord(char) <= 32 or char in '\\"<>^`{|}\x7f' for char in url):
            raise SampleError("the URL holds characters that must be percent-encoded")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            raise SampleError(f"the URL cannot be read: {error}") from None
        if parts.scheme != "https":
            raise SampleError("only data: URLs (base64) and https URLs of allowed hosts are read; files are not")
        if parts.username is not None or parts.password is not None:
            raise SampleError("the URL must hold no user name and no password")
        name = host if port in (None, 443) else f"{host}:{port}"
        if not host or name not in self.hosts:
            raise SampleError(f"the host {name!r} is not allowed; send the file as a base64 data: URL")
        return parts

    def _public_address(self, host: str, port: int) -> str:
        """An address of ``host``, all of whose addresses are public."""
        found = [str(item[4][0]) for item in self.resolve(host, port, type=socket.SOCK_STREAM)]
        if not found or not all(map(is_public, found)):
            raise SampleError(f"the host {host!r} has an address that is not public; nothing is fetched from it")
        return found[0]

    def _read(self, parts: SplitResult, address: str, port: int) -> bytes:
        raw = self.connect((address, port), timeout=self.timeout_s)
        with self.context.wrap_socket(raw, server_hostname=parts.hostname, do_handshake_on_connect=False) as sock:
            # a timeout of the socket begins anew with every byte: the timer ends it whatever happens
            timer = threading.Timer(self.timeout_s, _hang_up, [sock])
            timer.daemon = True
            timer.start()
            try:
                sock.do_handshake()
                connection = http.client.HTTPSConnection(parts.netloc, timeout=self.timeout_s)
                connection.sock = sock
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"Accept-Encoding": "identity", "Connection": "close"})
                return self._content(connection.getresponse(), timer)
            finally:
                timer.cancel()

    def _content(self, response: http.client.HTTPResponse, timer: threading.Timer) -> bytes:
        if 300 <= response.status < 400:
            raise SampleError("the URL redirects, which is not followed; give the address it leads to")
        if response.status != 200:
            raise SampleError(f"the URL answers with status {response.status}")
        content = bytearray()
        while piece := response.read1(_PIECE):
            content += piece
            if len(content) > self.max_bytes:
                raise SampleError(f"the file behind the URL is longer than {self.max_bytes:,} bytes")
        if response.length or not timer.is_alive():
            raise SampleError(f"the file behind the URL did not come whole within {self.timeout_s:g} s")
        return bytes(content)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, and leads nowhere else in disguise."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.sixtofour is not None or ip.teredo is not None or ip in _NAT64:
            return False
    return ip.is_global and not ip.is_multicast


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
