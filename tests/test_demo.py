"""The demonstration: it trains, samples, measures, and its page stands on its own."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import quieten.demo
from quieten.cli import main
from quieten.demo import NAMES, STEPS, demo
from quieten.fit import Summary

TINY = [
    "model.net={kind: unet, width: 8, detail: 4}", "train.images=256", "train.batch=32", "train.warmup=32", "train.ema=300",
    "train.log_every=1", "train.preview_every=64", "sample.steps=2",
]  # fmt: skip
FEW = (2, 3, 4, 5)


class Page(HTMLParser):
    """What a page holds: rows of its tables as text, sources of its pictures, its tags and what they point at."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.pictures: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text, self.in_cell = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.links += [str(value) for name, value in named.items() if name in ("src", "href", "xlink:href", "action", "srcset")]
        if tag == "img":
            self.pictures.append(str(named["src"]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demonstration with few steps of a small network, as the command line runs it."""
    out = tmp_path_factory.mktemp("demo") / "run"
    arguments = ["demo", "--out", str(out), "-n", "100", *(f"--set={change}" for change in TINY)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "__kwdefaults__", {**demo.__kwdefaults__, "steps": FEW})
        patch.setattr(quieten.demo, "BATCH", 60)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    assert not ended.value.code
    return out


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_it_compares_four_solvers_at_four_numbers_of_steps() -> None:
    assert NAMES == ("ddpm", "ddim", "heun", "dpm++")
    assert STEPS == (5, 10, 20, 50)


def test_the_page_needs_nothing_but_itself(out: Path, page: Page) -> None:
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    text = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert len(text) < 1_000_000


def test_every_row_holds_what_was_measured(page: Page) -> None:
    head, *rows = page.rows
    assert head == ["solver", "steps", "NFE", "Frechet distance", "sliced Wasserstein", "recognised, %", "seconds"]
    assert [(row[0], int(row[1])) for row in rows] == [(name, steps) for name in NAMES for steps in FEW]
    assert [int(row[2]) for row in rows] == [2 * n - 1 if name == "heun" else n for name in NAMES for n in FEW]
    for row in rows:
        assert re.search(r"^\d+\.\d+ ± \d+\.\d+", row[3])
        assert re.search(r"^\d+\.\d+ ± \d+\.\d+", row[4])
        assert 0 <= float(row[5]) <= 100
        assert float(row[6]) > 0
    values = [float(row[3].split()[0]) for row in rows]
    assert ["★" in row[3] for row in rows] == [value == min(values) for value in values]


def test_the_pictures_are_pictures(page: Page) -> None:
    sizes = []
    for source in page.pictures:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            image.load()
            sizes.append(image.size)
            assert image.getextrema()[0] < image.getextrema()[1], "something is on it"
    assert sizes[:17] == [(5 * 9 - 1, 4 * 9 - 1)] * 17, "sixteen grids of digits, and the real ones"
    assert len(sizes) == 17 + 3, "and the previews of training"


def test_the_curves_and_the_conditions_are_there(page: Page) -> None:
    assert page.tags.count("svg") == 2
    for piece in (
        "Frechet distance on pixels",
        "loss",
        "quieten demo --out",
        "-n 100",
        "train.images=256",
        "held-out",
        "1,498",
    ):
        assert piece in page.text, piece


def test_a_second_time_it_does_not_train_again_and_finds_the_same(out: Path, page: Page, capsys: pytest.CaptureFixture) -> None:
    weights = (out / "ema.safetensors").read_bytes()
    path = demo(out, n=100, names=["dpm++"], steps=FEW[:2], seed=0)
    assert path == out / "report.html"
    assert (out / "ema.safetensors").read_bytes() == weights
    assert f"report: {path}" in capsys.readouterr().out
    again = Page(path.read_text(encoding="utf-8")).rows[1:]
    first = [row for row in page.rows if row[0] == "dpm++"][:2]
    for row, other in zip(again, first, strict=True):
        assert row[2] == other[2]
        for ours, theirs in zip(row[3:5], other[3:5], strict=True):  # the decimals shown depend on the other rows
            assert float(ours.split()[0]) == pytest.approx(float(theirs.split()[0]), rel=0.02)


def test_the_judge_knows_digits_and_the_order_of_classes() -> None:
    data, test = quieten.demo.load("digits"), quieten.demo.load("digits", split="test")
    judge = quieten.demo._judge(data)
    assert quieten.demo._share(judge, test.all(), test.labels) > 0.95
    assert test.labels is not None
    assert quieten.demo._share(judge, test.all(), (test.labels + 1) % 10) < 0.05
    assert test.labels[quieten.demo._by_class(test)].tolist() == [*range(10), *range(10)]


def test_it_stops_where_training_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Summary(step=1, images=1, loss=1.0, seconds=1.0, done=False, message="stopped")
    monkeypatch.setattr(quieten.demo, "train", lambda *_: stopped)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--out", str(tmp_path / "run")])
    assert ended.value.code == 130
    assert not list(tmp_path.iterdir())


def test_pictures_of_training_end_with_the_last() -> None:
    files = [Path(str(k)) for k in range(7)]
    for most in (1, 3, 7, 9):
        chosen = quieten.demo._some(files, most)
        assert len(chosen) == len(set(chosen)) == min(most, 7)
        assert chosen[-1] == files[-1]
        assert chosen == sorted(chosen)
