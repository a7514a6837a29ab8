"""The page of a comparison: charts that say what they show, tables that sort, and how all of it looks in a browser."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from browser import browser
from helpers import refuses
from quieten.comparing.compare import Contender, Row
from quieten.denoiser import Denoiser
from quieten.metrics import Protocol, Result
from quieten.oracle import GaussianData
from quieten.report import Report
from quieten.reports.chart import Point, legend, scatter
from quieten.reports.compare_report import Facts, page, summary
from quieten.wrap import Counted
from test_report import Page

PROTOCOL = Protocol(200, "toys, train", 5000, "pixels", "ab" * 32, "images in [-1, 1], as they are", (0,), "ema")
NAMES = (
    "ddpm",
    "ddim",
    "dpm++",
    "ocm",
    "policy:fast",
    "diffusers:unipc",
    "heun",
    "churn",
    "ab",
    "a name <of> a sampler & more",
)


def row(name: str, steps: int, value: float, model: str = "toy", **changes: object) -> Row:
    denoiser: Denoiser = GaussianData(torch.zeros(1), 1.0)
    contender = Contender(
        model, name, steps, Counted(denoiser), lambda rows: torch.empty(0), {"name": name, "steps": steps}, steps,
        f"quieten sample {model} --transition {name!r}",
    )  # fmt: skip
    results = {
        "frechet": Result("Frechet distance", value, value / 30, PROTOCOL),
        "kid": Result("KID", value / 1000, value / 9000, PROTOCOL),
        "precision": Result("precision", 1 / (1 + value), 0.01, PROTOCOL),
        "recall": Result("recall", 1 / (2 + value), None, PROTOCOL),
    }
    images = torch.randint(0, 255, (16, 1, 28, 28), dtype=torch.uint8)
    bits = (3.0 + value / 9, 0.02) if name in ("ddpm", "ocm") else None
    made = Row(contender, 200, steps, 0.1 * steps + value / 50, 0.1 * steps, images, results, bits)
    return replace(made, **changes)


def rows() -> list[Row]:
    made = [row(name, steps, (3 + k) / steps**0.7) for k, name in enumerate(NAMES) for steps in (5, 10, 20, 50)]
    return [*made, row("pndm", 2, math.nan, results={}, failure="3 of 200 samples are <not> finite")]


def facts(**changes: object) -> Facts:
    real = {"frechet": Result("Frechet distance", 0.08, 0.01, PROTOCOL), "kid": Result("KID", 1e-4, 1e-5, PROTOCOL)}
    left_out = ["toy, pndm in 1 steps: too few"]
    command = "quieten compare toy toys --transitions " + ",".join(NAMES[:9]) + " --steps 5,10,20,50 -n 200"
    made = Facts(command, "toys", real, left_out, ["n is small"], {"bits/dim": "20 test examples"}, 0, rows()[0].images)
    return replace(made, **changes)


# ---- charts


def spots(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'class="spot" cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_charts_place_points_on_logarithmic_axes() -> None:
    svg = scatter({"a": [Point(5, 4.0), Point(10, 2.0), Point(20, 1.0)]}, xlabel="cost", ylabel="quality")
    (x0, y0), (x1, y1), (x2, y2) = spots(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)
    assert x0 < x1 < x2
    assert y0 < y1 < y2, "better is lower on the page"
    tick = re.search(r'<text x="([\d.]+)" y="\d+" text-anchor="middle">10</text>', svg)
    assert tick is not None
    assert float(tick[1]) == pytest.approx(x1, abs=0.1)


def test_charts_are_well_formed_and_say_what_they_show() -> None:
    evil = 'a <b> & "c"'
    series = {evil: [Point(3, 0.5, 0.6, evil, "r1")], "none": [], "other": [Point(9, 2.0), Point(30, 0.01)]}
    source = legend(list(series)) + scatter(series, xlabel=evil, ylabel="q", floor=0.3)
    tree = Page(source)
    assert [a["href"] for a in tree.all("a") if "href" in a] == ["#r1"]
    assert {a["data-tip"] for a in tree.all("a")} >= {evil}
    assert len(spots(source)) == 3
    assert [a["data-series"] for a in tree.all("button")] == ["0", "1", "2"]
    assert "real data" in tree.words
    assert [a["data-series"] for a in tree.all("g")] == ["0", "1", "2"], "colours are those of the legend"


def test_the_front_is_what_nothing_beats() -> None:
    points = [Point(5, 4.0), Point(6, 5.0), Point(10, 2.0), Point(20, 3.0), Point(40, 1.0)]
    svg = scatter({"a": points}, xlabel="x", ylabel="y")
    front = re.search(r'class="front" d="M([^"]+)"', svg)
    assert front is not None
    assert front[1].count("L") == 2


def test_charts_refuse_what_no_logarithm_has() -> None:
    for bad in ({}, {"a": []}, {"a": [Point(1, 0.0)]}, {"a": [Point(1, math.nan)]}, {"a": [Point(math.inf, 1.0)]}):
        with refuses("`series`", "positive"):
            scatter(bad, xlabel="x", ylabel="y")


# ---- the page


def test_the_page_stands_alone_and_runs_one_script_only() -> None:
    source = page(rows(), facts()).html()
    tree = Page(source)
    scripts = re.findall(r"<script>(.*?)</script>", source, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for a in tree.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    for _, attributes in tree.tags:
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/"))
        assert not any(name.startswith("on") for name in attributes)
    ids = {a["id"] for _, a in tree.tags if "id" in a}
    assert {a["href"][1:] for a in tree.all("a")} <= ids
    assert "<script" not in Report("x").table(["a"], [[1]]).html()


def test_the_page_holds_every_number_and_how_it_came_about() -> None:
    tree = Page(page(rows(), facts()).html())
    text = " ".join(tree.words)
    expected = [
        "0.972 ± 0.032", "ab" * 8, "toys, train", "3 of 200 samples are <not> finite", "pndm in 1 steps: too few", "n is small",
        "seed 0", "20 test examples", "quieten sample toy", torch.__version__,
    ]  # fmt: skip
    for words in expected:
        assert words in text, words
    assert len([a for a in tree.all("img") if a["alt"].startswith("the first samples of")]) == 41
    names = [a for a in tree.all("td") if "data-value" in a]
    assert len(names) > 40 * 5


def test_the_summary_names_the_best_and_the_cheapest_as_good() -> None:
    made = [row("slow", 50, 1.0), row("quick", 5, 1.02), row("bad", 2, 3.0)]
    text = summary(made)
    assert "slow in 50 steps" in text
    assert "quick in 5 steps" in text
    assert "Nothing cheaper" in summary([row("slow", 50, 1.0), row("quick", 5, 1.2)])


def test_pages_without_rows_or_pictures_are_pages() -> None:
    Page(page([], facts(unfinished=4)).html())
    vectors = [replace(one, images=torch.zeros(3, 2)) for one in rows()[:3]]
    assert not Page(page(vectors, facts(real={}, real_images=None)).html()).all("img")
    two = [row("ddim", 5, 2.0, "one"), row("ddim", 5, 1.0, "two")]
    text = " ".join(Page(page(two, facts()).html()).words)
    assert "one · ddim" in text
    assert "two · ddim" in text


# ---- in a browser


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return page(rows(), facts()).save(tmp_path_factory.mktemp("page") / "report.html")


def test_the_page_opens_well_light_and_dark_narrow_and_wide(saved: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as running:
        grounds = []
        for width, dark in ((400, False), (400, True), (1280, False), (1280, True)):
            tab = running.open(saved, width, dark=dark)
            assert tab.complaints == []
            assert tab.run("document.documentElement.scrollWidth") <= width, "no horizontal scroll"
            assert (
                tab.run(
                    "[...document.querySelectorAll('svg.chart')].filter(e => e.getBoundingClientRect().height > 150).length"
                )
                >= 2
            )
            assert tab.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            size = tab.run("Math.min(...[...document.querySelectorAll('.chart text')].filter(e => e.getClientRects().length)"
                           ".map(e => e.getBoundingClientRect().height))")  # fmt: skip
            assert size > 8, "text of charts can be read"
            with Image.open(tab.picture(tmp_path / f"{width}-{dark}.png")) as picture:
                assert picture.width == width
                grounds.append(picture.convert("L").getpixel((2, 2)))
        assert grounds[0] == grounds[2] > 240
        assert grounds[1] == grounds[3] < 40


def test_what_the_script_adds(saved: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as running:
        tab = running.open(saved, 1000)
        column = "[...document.querySelectorAll('table.sortable tbody tr')].map(r => Number(r.cells[3].dataset.value))"
        before = tab.run(column)
        tab.run("document.querySelectorAll('table.sortable th button')[3].click()")
        assert tab.run(column) == sorted(before) != before
        tab.run("document.querySelectorAll('table.sortable th button')[3].click()")
        assert tab.run(column) == sorted(before, reverse=True)
        tab.run("document.querySelectorAll('table.sortable th button')[0].click()")
        names = tab.run("[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[0].textContent)")
        assert names[:4] == ["a name <of> a sampler & more"] * 4
        shown = "getComputedStyle(document.querySelector('.series[data-series=\"1\"]')).display"
        assert tab.run(shown) != "none"
        tab.run("document.querySelectorAll('.legend button')[1].click()")
        assert tab.run(shown) == "none"
        tab.run("document.querySelector('.point').focus()")
        assert "ddpm in 5 steps: Frechet distance" in tab.run("document.querySelector('.tip').textContent")
        assert tab.complaints == []


def test_without_scripts_nothing_is_missing(saved: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as running:
        tab = running.open(saved, 400, script=False)
        assert tab.complaints == []
        with Image.open(tab.picture(tmp_path / "plain.png")) as picture:
            assert picture.width == 400
            assert picture.height > 3000
