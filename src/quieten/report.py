"""Reports: one HTML file that holds its pictures and styles, for light and dark, for phones and wide screens.

    report = Report("Samplers on digits")
    report.text("What was run, and why.").command("quieten demo")
    report.table(["sampler", "NFE", "distance"], rows, best={"distance": "min"})
    report.figure(pareto(points), "Quality against cost").save("report.html")

Nothing is fetched when the page opens; a content policy in the file forbids it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .files import write_atomic
from .reports.plots import INK, curve, curve_png, grid_image, pareto, save_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["Report", "curve", "curve_png", "grid_image", "pareto", "save_grid"]


class Report:
    """A page built from top to bottom; every method adds to it and returns the report. All text is escaped.

    Arguments:
        title: Title of the page.
        summary: What was found, in a sentence or two; stands below the title.
    """

    def __init__(self, title: str, summary: str = "") -> None:
        self.title, self.summary = title, summary
        self._blocks: list[str] = []
        self._sections: list[str] = []
        self._figures = 0
        self._script = False

    def section(self, title: str) -> Report:
        """A heading; three or more of them get a table of contents."""
        self._sections.append(title)
        self._blocks.append(f'<h2 id="s{len(self._sections)}">{escape(title)}</h2>')
        return self

    def text(self, text: str) -> Report:
        """Paragraphs parted by blank lines; `code`, **bold**, and lists whose lines all begin with "- "."""
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            lines = [line.strip() for line in paragraph.splitlines()]
            if all(line.startswith("- ") for line in lines):
                items = "".join(f"<li>{_inline(line[2:])}</li>" for line in lines)
                self._blocks.append(f"<ul>{items}</ul>")
            else:
                self._blocks.append(f"<p>{_inline(' '.join(lines))}</p>")
        return self

    def command(self, command: str) -> Report:
        """A command as typed, in a box of its own."""
        self._blocks.append(f'<pre tabindex="0"><code>{escape(command)}</code></pre>')
        return self

    def add(self, fragment: str, script: bool = False) -> Report:
        """A piece of HTML as it is: what stands in it must have been escaped.

        Arguments:
            fragment: Well-formed, without scripts of its own, which the page's content policy would stop.
            script: Whether it wants `report.js`, which acts on legends, points with `data-tip` and sortable tables.
        """
        self._blocks.append(fragment)
        self._script |= script
        return self

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[Any]],
        caption: str = "",
        *,
        best: Mapping[str, Literal["min", "max"]] | None = None,
        digits: int = 3,
        ids: Sequence[str] | None = None,
    ) -> Report:
        """A table; columns of numbers stand flush right, with the same decimals down the column.

        Arguments:
            headers: One per column.
            rows: Cells: numbers, a metric's Result (shown with its uncertainty), None for nothing, or text.
            caption: Says what the table shows.
            best: Columns in which to mark the smallest or the greatest number.
            digits: Significant digits of a column's middle value.
            ids: One per row, to link to; the table can then be sorted by a click on a header, where scripts run.
        """
        best = dict(best or {})
        for k, row in enumerate(rows):
            if len(row) != len(headers):
                raise ValueError(f"rows[{k}] has {len(row)} cells for {len(headers)} headers: make them agree")
        if unknown := best.keys() - set(headers):
            raise ValueError(f"best names {sorted(unknown)}, not among the headers {list(headers)}: rename")
        columns = [_column([row[k] for row in rows], best.get(h), digits) for k, h in enumerate(headers)]
        aligned = [' class="num"' if numeric else "" for _, numeric in columns]
        head = "".join(f'<th scope="col"{c}>{escape(h)}</th>' for h, c in zip(headers, aligned, strict=True))
        body = []
        for k, row in enumerate(rows):
            plain = ids is None
            values = ["" if plain or not c else _data(cell) for cell, (_, c) in zip(row, columns, strict=True)]
            first = f'<th scope="row"{aligned[0]}{values[0]}>{columns[0][0][k]}</th>' if columns else ""
            cells = zip(columns[1:], aligned[1:], values[1:], strict=True)
            rest = (f"<td{c}{value}>{shown[k]}</td>" for (shown, _), c, value in cells)
            name = "" if ids is None else f' id="{escape(ids[k])}"'
            body.append(f"<tr{name}>{first}{''.join(rest)}</tr>")
        note = '<p class="note">★ best in its column</p>' if best else ""
        self._script |= ids is not None
        kind = "" if ids is None else ' class="sortable"'
        self._blocks.append(
            f'<figure class="table">{_caption(caption)}<div class="scroll" role="region" tabindex="0" '
            f'aria-label="{escape(caption or "table")}"><table{kind}><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>{note}</figure>"
        )
        return self

    def image(self, image: Image | str | Path, caption: str = "", alt: str | None = None) -> Report:
        """A picture, or the file of one (PNG, JPEG, GIF, WebP); alt describes it where it cannot be seen."""
        self._blocks.append(_picture(image, caption, alt))
        return self

    def grid(self, items: Sequence[tuple[Image | str | Path, str]], caption: str = "") -> Report:
        """Pictures side by side, each with its caption; they wrap where the screen is narrow."""
        cells = "".join(_picture(image, text, None) for image, text in items)
        title = f'<p class="note">{_inline(caption)}</p>' if caption else ""
        self._blocks.append(f'<div class="grid">{cells}</div>{title}')
        return self

    def figure(self, figure: Figure, caption: str = "", alt: str | None = None) -> Report:
        """A matplotlib figure as inline SVG; drawn in `INK` it takes the page's colours, else a plate."""
        self._figures += 1
        svg = _svg(figure, f"f{self._figures}", alt or caption or "figure")
        plate = "" if INK in svg else ' class="plate"'
        svg = svg.replace(INK, "currentColor")
        self._blocks.append(f'<figure class="plot"><div{plate}>{svg}</div>{_caption(caption)}</figure>')
        return self

    def environment(self, **extra: object) -> Report:
        """What the report was made with: versions, processor, threads, date, and any further name=value."""
        facts = {**_environment(), **{k.replace("_", " "): str(v) for k, v in extra.items()}}
        pairs = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
        self._blocks.append(f"<dl>{pairs}</dl>")
        return self

    def html(self) -> str:
        """The whole page."""
        toc = ""
        if len(self._sections) > 2:
            items = (f'<li><a href="#s{k}">{escape(s)}</a></li>' for k, s in enumerate(self._sections, 1))
            toc = f'<nav aria-label="Contents"><ul>{"".join(items)}</ul></nav>'
        lead = f'<p class="lead">{_inline(self.summary)}</p>' if self.summary else ""
        style = (resources.files(__package__) / "report.css").read_text("utf-8")
        body, policy = "\n".join(self._blocks), ""
        if self._script:  # the content policy knows it by its hash, so that no other script can run
            script = (resources.files(__package__) / "report.js").read_text("utf-8")
            policy = f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
            body += f"\n<script>{script}</script>"
        return _PAGE.format(title=escape(self.title), style=style, policy=policy, lead=lead, toc=toc, body=body)

    def save(self, path: str | Path) -> Path:
        """Writes the page, whole or not at all, and returns the path."""
        return write_atomic(path, self.html().encode())


def _inline(text: str) -> str:
    parts = re.split(r"(`[^`]+`)", text)  # code is taken out first, so that stars inside it stay stars
    for k, part in enumerate(parts):
        if k % 2:
            parts[k] = f"<code>{escape(part[1:-1])}</code>"
        else:
            parts[k] = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(part))
    return "".join(parts)


def _column(cells: Sequence[Any], best: str | None, digits: int) -> tuple[list[str], bool]:
    """The cells of a column as HTML, and whether it is one of numbers."""
    values = [_number(cell) for cell in cells]
    numeric = any(v is not None for v in values)
    numeric = numeric and all(v is not None or c is None for v, c in zip(values, cells, strict=True))
    finite = sorted(abs(v) for v in values if v is not None and math.isfinite(v) and v)
    whole = all(c is None or isinstance(c, int) for c in cells)
    decimals = 0
    if finite and not whole:
        decimals = min(max(digits - 1 - math.floor(math.log10(finite[len(finite) // 2])), 0), 8)
    ranked = [v for v in values if v is not None and math.isfinite(v)]
    top = (min if best == "min" else max)(ranked) if best and ranked else None
    shown = []
    for cell, value in zip(cells, values, strict=True):
        if cell is None:
            text = '<span title="not measured">&ndash;</span>'
        elif value is None:
            text = _inline(str(cell))
        elif hasattr(cell, "figure"):
            text = escape(cell.figure())
        elif not math.isfinite(value) or (finite and value and not 1e-4 <= abs(value) < 1e7):
            text = f"{value:.{digits}g}"
        else:
            text = f"{value:,d}" if isinstance(cell, int) else f"{value:,.{decimals}f}"
        if top is not None and value == top:
            text = f'<strong class="best">{text}<span aria-label="best">&nbsp;★</span></strong>'
        shown.append(text)
    return shown, numeric


def _number(cell: Any) -> float | int | None:
    if isinstance(cell, bool):
        return None
    if isinstance(cell, int | float):
        return cell
    value = getattr(cell, "value", None)  # a metric's Result
    return float(value) if isinstance(value, int | float) else None


def _data(cell: Any) -> str:
    value = _number(cell)
    return "" if value is None or not math.isfinite(value) else f' data-value="{value!r}"'


def _picture(image: Image | str | Path, caption: str, alt: str | None) -> str:
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    if isinstance(image, str | Path):
        data = Path(image).read_bytes()
        try:
            with Pillow.open(io.BytesIO(data)) as opened:
                (width, height), kind = opened.size, opened.format
        except UnidentifiedImageError:
            kind = None
        if kind not in ("PNG", "JPEG", "GIF", "WEBP"):
            raise ValueError(f"image {image} is not a PNG, JPEG, GIF or WebP: convert it")
    else:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        data, (width, height), kind = buffer.getvalue(), image.size, "PNG"
    factor = max(1, 320 // max(width, height))  # enlarged by the browser, so that the file keeps the true pixels
    small = ' class="pixels"' if factor > 1 else ""
    encoded = base64.b64encode(data).decode()
    return (
        f'<figure><img{small} src="data:image/{str(kind).lower()};base64,{encoded}" width="{width * factor}" '
        f'height="{height * factor}" alt="{escape(alt or caption or "picture")}">{_caption(caption)}</figure>'
    )


def _caption(text: str) -> str:
    return f"<figcaption>{_inline(text)}</figcaption>" if text else ""


def _svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an inline SVG element whose ids are its own, with text as text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.S)
    svg = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)  # figures number their parts alike
    points = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    width = round(float(points[1]) * 4 / 3) if points else 500  # points to CSS pixels
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    style = f"width:{width * 1.2:.0f}px"
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}" style="{style}"', 1)


def _environment() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("quieten")
    except PackageNotFoundError:
        own = "from source"
    facts = {"quieten": own, "torch": torch.__version__, "python": platform.python_version()}
    facts |= {"system": f"{platform.system()} {platform.machine()}", "processor": _processor()}
    facts["cores"] = str(os.cpu_count() or "unknown")
    facts["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts | {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1>{lead}</header>
{toc}
{body}
</main>
</body>
</html>
"""
