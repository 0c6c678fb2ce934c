"""Shards behind a URL: byte ranges with retries, read-ahead, and optionally whole local copies."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from typing_extensions import override

from llava_scale.data.read_ahead import ReadAhead, join_ranges
from llava_scale.data.retry import ShortReadError, with_retries
from llava_scale.data.shard_cache import ShardCache
from llava_scale.data.store import LocalStore, Range, RetryPolicy, Store, missing_file
from llava_scale.errors import MissingExtraError, ShardError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

T = TypeVar("T")

_log = logging.getLogger(__name__)

_PIECE = 8 << 20
"""Bytes of one request when a whole shard is fetched."""
_PIECES_AT_A_TIME = 4
_COPY_ATTEMPTS = 3
_TOUCH_S = 30.0
"""How often a copy in use is marked as such."""
_THREADS = 8
_READ_AHEAD_BYTES = 256 << 20
_CONNECT_TIMEOUT_S = 30
_READ_TIMEOUT_S = 60
_EXTRAS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}


class RemoteStore(Store):
    """Files below an fsspec URL.

    With ``cache_bytes`` a shard that is touched is copied to ``cache`` whole, once per machine; without, only the
    bytes asked for travel, neighbours in one request.

    Attributes:
        num_retries: Requests that had to be repeated so far.
    """

    def __init__(self, url: str, *, cache: Path, cache_bytes: int = 0, retry: RetryPolicy | None = None) -> None:
        self.root = url
        self.num_retries = 0
        self._retry = retry or RetryPolicy()
        self._cache_folder, self._cache_bytes = cache, cache_bytes
        self._cache = ShardCache(cache, cache_bytes) if cache_bytes else None
        self._copies = LocalStore(cache / "shards")
        self._expected: dict[str, tuple[int, str]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._copied: dict[str, tuple[str, float]] = {}
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        kept = {"cache": self._cache_folder, "cache_bytes": self._cache_bytes, "retry": self._retry}
        return {"url": self.root, **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    @override
    def is_local(self) -> bool:
        return False

    @override
    def expect(self, names: Sequence[str], num_bytes: Sequence[int], sha256: Sequence[str]) -> None:
        if self._cache is not None:
            self._expected = dict(zip(names, zip(num_bytes, sha256, strict=True), strict=True))

    @override
    def read(self, name: str, offset: int, size: int) -> bytes:
        self._stay_in_process()
        if not size:
            return b""
        data = self._ahead.take(name, offset, size)
        if data is None and self._cache is not None:
            data = self._read_copy(name, offset, size)
        return self._request(name, offset, size) if data is None else data

    @override
    def read_many(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        self._stay_in_process()
        if self._cache is not None or all(self._ahead.covers(name, *item) for item in ranges):
            return [self.read(name, *item) for item in ranges]
        spans = join_ranges(ranges)
        run = self._pool().map if len(spans) > 1 else map
        found = [b""] * len(ranges)
        for span, data in zip(
            spans, run(lambda span: self._request(name, span.start, span.end - span.start), spans), strict=True
        ):
            for place in span.places:
                offset, size = ranges[place]
                found[place] = data[offset - span.start : offset - span.start + size]
        return found

    @override
    def prefetch(self, name: str, ranges: Iterable[Range]) -> None:
        self._stay_in_process()
        pool = self._pool()
        if self._cache is None:
            self._ahead.add(name, list(ranges), lambda offset, size: pool.submit(self._request, name, offset, size))
            return
        with self._lock:
            wanted = name not in self._fetching
            self._fetching.add(name)
        if wanted:
            pool.submit(self._fetch_copy, name)

    @override
    def read_file(self, name: str) -> bytes:
        data = self._attempt(name, lambda: self._filesystem.cat_file(self._path(name)))
        return bytes(data)

    @override
    def size(self, name: str) -> int:
        size = self._info(name).get("size")
        if size is None:
            raise ShardError(f"{self.describe(name)}: the server does not tell its size; add dataset.json")
        return int(size)

    @override
    def version(self, name: str) -> str:
        info = self._info(name)
        return str(next((info[field] for field in ("ETag", "etag", "LastModified", "mtime") if info.get(field)), ""))

    @override
    def list_tars(self) -> list[str]:
        try:
            found = self._attempt("", lambda: self._filesystem.ls(self._base, detail=False))
        except FileNotFoundError:
            raise ShardError(f"{self.root}: no such folder, and no dataset.json in it") from None
        names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted({name for name in names if name.endswith(".tar")})

    @override
    def close(self) -> None:
        self._ahead.clear()
        with self._lock:
            pool, self._threads = self._threads, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        self._copies.close()

    # -- the connection, made anew in a forked process -----------------------------------------------------------

    def _connect(self) -> None:
        import fsspec

        protocol = self.root.partition("://")[0]
        options: dict[str, Any] = {}
        try:
            if protocol in ("http", "https"):
                import aiohttp

                timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S)
                options = {"client_kwargs": {"timeout": timeout}}
            self._filesystem, self._base = fsspec.core.url_to_fs(self.root.rstrip("/"), **options)
        except ImportError as error:
            raise MissingExtraError(_EXTRAS.get(protocol, str(error)), "remote") from None
        except ValueError as error:
            raise ShardError(f"{self.root}: {error}") from None
        self._lock = threading.Lock()
        self._ahead = ReadAhead(_READ_AHEAD_BYTES)
        self._threads = None
        self._fetching: set[str] = set()
        self._process = os.getpid()

    def _stay_in_process(self) -> None:
        """Connect anew after a fork: neither sockets, threads nor locks survive it."""
        if self._process != os.getpid():
            self._connect()

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
            return self._threads

    # -- requests --------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        is_web = self.root.startswith(("http://", "https://"))
        return f"{self._base}/{quote(name)}" if is_web else f"{self._base}/{name}"

    def _attempt(self, name: str, function: Callable[[], T]) -> T:
        where = self.describe(name) if name else self.root
        return with_retries(function, where=where, policy=self._retry, on_retry=self._count_retry)

    def _count_retry(self) -> None:
        with self._lock:
            self.num_retries += 1

    def _info(self, name: str) -> dict[str, Any]:
        try:
            info: dict[str, Any] = self._attempt(name, lambda: self._filesystem.info(self._path(name)))
        except FileNotFoundError as error:
            raise missing_file(self.describe(name), error) from None
        return info

    def _request(self, name: str, offset: int, size: int) -> bytes:
        """Return a byte range, straight from the server."""

        def ask() -> bytes:
            data: bytes = self._filesystem.cat_file(self._path(name), start=offset, end=offset + size)
            if len(data) < size:
                raise ShortReadError(
                    f"{len(data):,} of {size:,} bytes from {offset:,}; cut off, or changed since indexing"
                )
            return data

        try:
            data: bytes = self._attempt(name, ask)
        except FileNotFoundError as error:
            raise missing_file(self.describe(name), error) from None
        if len(data) > size:
            raise ShardError(
                f"{self.describe(name)}: the server sent {len(data):,} bytes where {size:,} were asked for, so it "
                "ignores byte ranges; use a server that knows them (nginx, S3), or copy the shards here"
            )
        return data

    # -- whole copies ----------------------------------------------------------------------------------------------

    def _read_copy(self, name: str, offset: int, size: int) -> bytes | None:
        """Return a byte range of the local copy; None where there cannot be one."""
        for _ in range(_COPY_ATTEMPTS):
            copy, looked_at = self._copied.get(name, ("", 0.0))
            if not copy or time.monotonic() - looked_at > _TOUCH_S:
                copy = self._copy_of(name) or ""
                if not copy:
                    return None
                self._copied[name] = copy, time.monotonic()
            try:
                return self._copies.read(copy, offset, size)
            except ShardError:  # another process made room between finding and opening it
                self._copied.pop(name, None)
        return None

    def _fetch_copy(self, name: str) -> None:
        """Copy a shard in the background; what fails here fails again, and is reported, when it is read."""
        try:
            self._copy_of(name)
        except ShardError as error:
            _log.warning("read-ahead: %s", error)
        finally:
            with self._lock:
                self._fetching.discard(name)

    def _copy_of(self, name: str) -> str | None:
        """Return the file name of the local copy of a shard, made if need be."""
        assert self._cache is not None
        size, sha256 = self._expected.get(name) or (self.size(name), "")
        path = self._cache.fetch(self.describe(name), size, sha256, lambda: self._pieces(name, size))
        return None if path is None else path.name

    def _pieces(self, name: str, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield a whole shard in order, several requests at a time."""
        with ThreadPoolExecutor(_PIECES_AT_A_TIME, thread_name_prefix="pieces") as pool:
            waiting: deque[tuple[int, Future[bytes]]] = deque()
            for offset in range(0, size, _PIECE):
                length = min(_PIECE, size - offset)
                waiting.append((offset, pool.submit(self._request, name, offset, length)))
                if len(waiting) > _PIECES_AT_A_TIME:
                    begin, future = waiting.popleft()
                    yield begin, future.result()
            for begin, future in waiting:
                yield begin, future.result()
