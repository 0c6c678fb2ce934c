"""Frame of our HTML pages: one file, no script, nothing loaded from elsewhere, readable on a phone."""

from __future__ import annotations

import base64
import html
import math
import mimetypes
from typing import TYPE_CHECKING, Any

from llava_scale import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_CSS = """
:root{color-scheme:light;--ink:#1b1f24;--soft:#5b6472;--line:#e3e6eb;--paper:#fff;--ground:#f5f6f8;--accent:#2563eb;
--good:#127a4b;--goodbg:#e7f5ee;--bad:#b3261e;--badbg:#fdecea}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);line-height:1.5;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 64px}
header{margin-bottom:22px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.16rem;margin:38px 0 4px}
h3{font-size:1rem;margin:0 0 10px;overflow-wrap:anywhere}
p{margin:4px 0 14px;max-width:76ch}
.soft{color:var(--soft);font-size:.9rem}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:16px 18px;min-width:0}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--min,460px)),1fr))}
.dot{display:inline-block;width:.72em;height:.72em;border-radius:50%;margin-right:.45em;vertical-align:-.02em}
.tiles{display:grid;gap:14px 10px;grid-template-columns:repeat(auto-fill,minmax(128px,1fr));margin:0}
.tiles dt{font-size:.8rem;color:var(--soft);line-height:1.3}
.tiles dd{margin:0;font-size:1.42rem;font-weight:650;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.tiles small{display:block;font-size:.78rem;font-weight:400;color:var(--soft);letter-spacing:0;line-height:1.35}
figure{margin:0}
figure img{display:block;width:100%;height:auto}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;width:100%}
th,td{text-align:left;padding:7px 14px 7px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
th{font-weight:600;color:var(--soft);font-size:.8rem}
td code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;font-size:.82rem}
pre{margin:10px 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--accent);font-size:.9rem}
.score{display:grid;grid-template-columns:minmax(84px,190px) 1fr 112px;gap:2px 14px;align-items:center;padding:5px 0}
.group{padding:3px 0}
.group .score{padding:2px 0}
.score .label{font-size:.9rem;overflow-wrap:anywhere}
.score .label.all{font-weight:650}
.score .value{font-size:.9rem;font-variant-numeric:tabular-nums;text-align:right;white-space:nowrap}
.score .value small{color:var(--soft)}
.track{position:relative;height:16px;background:#eceef2;border-radius:4px}
.fill{position:absolute;inset:0 auto 0 0;border-radius:4px}
.range{position:absolute;top:7px;height:2px;background:var(--ink);opacity:.55}
.tick{position:absolute;top:-3px;bottom:-3px;width:3px;margin-left:-1.5px;background:var(--ink);border-radius:2px}
.tick.model{background:#fff;border:1px solid var(--ink);width:5px;margin-left:-2.5px}
.key{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:.82rem;color:var(--soft);margin:0 0 12px}
.key i{position:relative;display:inline-block;width:22px;height:12px;vertical-align:-2px;margin-right:6px;
background:#eceef2;border-radius:3px}
.answer{display:flex;flex-direction:column;gap:8px;padding:14px}
.answer .pictures{display:flex;flex-wrap:wrap;gap:6px}
.answer .pictures img{max-width:100%;height:112px;object-fit:contain;border:1px solid var(--line);border-radius:6px;
background:#fff}
.answer dl{margin:0;display:grid;grid-template-columns:58px 1fr;gap:3px 10px;font-size:.9rem}
.answer dt{color:var(--soft);font-size:.8rem;padding-top:2px}
.answer dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
.mark{display:inline-block;font-size:.76rem;font-weight:650;border-radius:99px;padding:1px 9px}
.mark.good{color:var(--good);background:var(--goodbg)}
.mark.bad{color:var(--bad);background:var(--badbg)}
.answer .about{display:flex;flex-wrap:wrap;gap:6px;align-items:center;font-size:.78rem;color:var(--soft);
overflow-wrap:anywhere}
@media(max-width:560px){main{padding:18px 12px 48px}.card{padding:13px 13px}h1{font-size:1.4rem}
.score{grid-template-columns:1fr auto}.score .track{grid-column:1/-1;grid-row:2}}
"""


def page(*, title: str, subtitle: str, body: Sequence[str], css: str = "") -> str:
    """Return a whole page; ``title`` and ``subtitle`` are plain text, ``body`` is HTML, ``css`` comes after ours."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_CSS}{css}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{text(title)}</h1>\n<div class="soft">{text(subtitle)}</div></header>\n'
        + "\n".join(body)
        + f'\n<p class="soft" style="margin-top:40px">llava-scale {text(__version__)}</p>\n</main>\n</body>\n</html>\n'
    )


def text(value: object) -> str:
    """Escape anything for HTML text and attributes."""
    return html.escape(str(value), quote=True)


def section(title: str, body: str, *, note: str = "") -> str:
    """Return a headed part of the page; ``body`` is HTML, the rest plain text."""
    about = f'<p class="soft">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{about}\n{body}</section>"


def picture(data: bytes, *, mime: str, alt: str) -> str:
    """Return an ``img`` with the picture inside the page."""
    return f'<img alt="{text(alt)}" src="data:{mime};base64,{base64.b64encode(data).decode()}">'


def picture_file(path: Path, *, alt: str) -> str:
    """Return an ``img`` with the file inside the page, or a remark where the file is gone."""
    mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    try:
        return picture(path.read_bytes(), mime=mime, alt=alt)
    except OSError:
        return f'<span class="soft">({text(path.name)} is missing)</span>'


def dot(colour: str) -> str:
    """Return the coloured mark of a run."""
    return f'<span class="dot" style="background:{colour}"></span>'


def number(value: Any, *, digits: int = 3) -> str:
    """Number for reading: large ones grouped, small ones to ``digits`` significant digits; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(share: float) -> str:
    """Share as a percentage with one decimal, ``100 %`` and ``0 %`` without; never broken over two lines."""
    shown = f"{100 * share:.1f}"
    return f"{shown.removesuffix('.0')}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``3 min 5 s`` or ``2 h 7 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
