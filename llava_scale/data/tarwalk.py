"""Where the files of a tar lie, found by reading its headers only.

Understands ustar, old V7, GNU long names and large sizes, and POSIX pax headers. Members are never extracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llava_scale.errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 512
_ZERO = bytes(BLOCK)
_REGULAR = frozenset((b"0", b"\0", b"7"))
_HARD_LINK, _SYMBOLIC_LINK, _SPARSE = b"1", b"2", b"S"
_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class TarMember(NamedTuple):
    """A file inside a tar: its name and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class _Pending:
    """What the extended headers said about the next member."""

    name: str = ""
    link: str = ""
    size: int = -1


def walk_tar(read: Callable[[int, int], bytes], size: int, *, shard: str) -> Iterator[TarMember]:
    """Yield the regular files of a tar in order; hard links are yielded as the file that they point to.

    Args:
        read: ``read(offset, size)`` returns exactly those bytes.
        size: Bytes of the whole tar.
        shard: Name for messages.

    Raises:
        ShardError: if the tar is empty, compressed, truncated or damaged, or holds links that cannot be followed.
    """
    if size == 0:
        raise ShardError(f"{shard}: the shard is empty (0 bytes); copy or pack it again, or delete it")
    seen: dict[str, TarMember] = {}
    pending = _Pending()
    position = 0
    while True:
        header = _header(read, position, size, shard)
        if header is None:
            return
        kind, length = header[156:157], _number(header[124:136])
        if pending.size >= 0 and kind not in (_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL):
            length = pending.size
        if kind in (_HARD_LINK, _SYMBOLIC_LINK) or b"3" <= kind <= b"6":
            length = 0
        start, position = position + BLOCK, position + BLOCK + -(-length // BLOCK) * BLOCK
        if start + length > size:
            raise _truncated(shard, size)
        if kind in (_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL):
            _extend(pending, kind, read(start, length), shard)
            continue
        member = _member(header, kind, start, length, pending, seen, shard)
        pending = _Pending()
        if member is not None:
            seen[member.name] = member
            yield member


def _header(read: Callable[[int, int], bytes], position: int, size: int, shard: str) -> bytes | None:
    """Return the header block at ``position``, or None at the end-of-archive mark."""
    if position + BLOCK > size:
        raise _truncated(shard, size)
    header = read(position, BLOCK)
    if header == _ZERO:
        rest = read(position, min(size - position, 1 << 20))
        if rest.count(0) != len(rest):
            raise ShardError(
                f"{shard}: more data follows the end mark at byte {position:,} (tars glued together with cat?); "
                "unpack and pack it again, readers would stop there"
            )
        return None
    try:
        checksum, _ = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        raise _damaged(header, shard, position) from None
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _damaged(header, shard, position)
    return header


def _member(
    header: bytes, kind: bytes, start: int, length: int, pending: _Pending, seen: dict[str, TarMember], shard: str
) -> TarMember | None:
    name = pending.name or _header_name(header)
    if kind in _REGULAR:
        return None if name.endswith("/") else TarMember(name, start, length)
    if kind in (_HARD_LINK, _SYMBOLIC_LINK, _SPARSE):
        link = pending.link or _text(header[157:257])
        target = seen.get(link) if kind == _HARD_LINK else None
        if target is None:
            what = "sparse file" if kind == _SPARSE else f"link to {link!r}"
            raise ShardError(
                f"{shard}: {name!r} is a {what}; store the file itself (tar --dereference --hard-dereference)"
            )
        return TarMember(name, target.offset, target.size)
    return None


def _extend(pending: _Pending, kind: bytes, data: bytes, shard: str) -> None:
    if kind == _GNU_NAME:
        pending.name = _text(data)
    elif kind == _GNU_LINK:
        pending.link = _text(data)
    elif kind == _PAX:
        for key, value in _pax_records(data, shard):
            if key == b"path":
                pending.name = _text(value)
            elif key == b"linkpath":
                pending.link = _text(value)
            elif key == b"size":
                pending.size = int(value)
            elif key.startswith(b"GNU.sparse."):
                raise ShardError(f"{shard}: {pending.name!r} is a sparse file; store the file itself (tar without -S)")


def _pax_records(data: bytes, shard: str) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position)
        digits = data[position:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[space + 1 : position + length - 1].partition(b"=")
        if not length or not equals:
            raise ShardError(f"{shard}: broken pax header; the shard is damaged, copy or pack it again")
        yield key, value
        position += length


def _header_name(header: bytes) -> str:
    name = _text(header[:100])
    # Only POSIX ustar has a name prefix here; GNU tar (magic "ustar  ") keeps times in these bytes.
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Return an octal or (GNU) binary number."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.strip(b" \0") or b"0", 8)


def _truncated(shard: str, size: int) -> ShardError:
    return ShardError(
        f"{shard}: the tar is truncated: it ends after {size:,} bytes without an end mark; copy or pack it again"
    )


def _damaged(header: bytes, shard: str, position: int) -> ShardError:
    compression = _COMPRESSED.get(header[:2]) if position == 0 else None
    if compression:
        return ShardError(
            f"{shard}: the tar is compressed ({compression}); samples inside cannot be reached, unpack it"
        )
    return ShardError(
        f"{shard}: no tar header at byte {position:,}; the shard is damaged or no tar, copy or pack it again"
    )
