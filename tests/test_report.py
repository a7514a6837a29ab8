"""Grids, plots and the report: pictures come back pixel for pixel, pages stand alone, text cannot break out."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from quieten.files import write_atomic
from quieten.metrics import Extractor, frechet
from quieten.report import Report, curve, curve_png, grid_image, pareto, save_grid
from quieten.reports.plots import COLOURS, INK

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in its order; keeps tags with their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def pixels(image) -> torch.Tensor:
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, -1).permute(2, 0, 1)


def bytes_images(n, c, h, w):
    return torch.randint(0, 256, (n, c, h, w), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def full_report() -> Report:
    torch.manual_seed(0)
    x, y = torch.randn(60, 1, 2, 2), torch.randn(70, 1, 2, 2)
    result = frechet(x, y, Extractor.pixels())
    loss = [1 / (1 + k) + 0.1 for k in range(700)]
    picture = grid_image(bytes_images(4, 1, 8, 8), scale=1)
    points = {"DDIM": [(5, result), (10, 0.3)], "Heun": [(9, 0.5)]}
    return (
        Report("Trial", "A **summary**.")
        .section("One")
        .text("First `a < b` line\n\n- one\n- two")
        .command("quieten demo --set a.b=c")
        .section("Two")
        .table(["sampler", "NFE", "distance"], [["DDIM", 5, result], ["Heun", 9, None]], "Numbers", best={"distance": "min"})
        .image(picture, "Four digits", alt="grid of four")
        .grid([(picture, "left"), (picture, "right")], "Side by side")
        .section("Three")
        .figure(curve(range(700), loss), "Loss")
        .figure(pareto(points, floor=0.2), "Cost")
        .environment(seed=0)
    )


# Grids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, columns, pad, scale", [(6, 3, 2, 1), (5, 3, 0, 2), (1, None, 2, 3), (7, 100, 1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_stands_in_its_cell(n, columns, pad, scale, channels):
    images = bytes_images(n, channels, 5, 4)
    got = pixels(grid_image(images, columns, pad, scale))
    across = min(columns or 1, n)
    assert got.shape[2] == across * (4 * scale + pad) - pad
    for k in range(n):
        top, left = k // across * (5 * scale + pad), k % across * (4 * scale + pad)
        cell = got[:, top : top + 5 * scale, left : left + 4 * scale]
        assert torch.equal(cell[:, ::scale, ::scale], images[k])
        assert torch.equal(cell[:, scale - 1 :: scale, scale - 1 :: scale], images[k])


def test_floats_are_clipped_and_bytes_return():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(pixels(grid_image(every / 127.5 - 1, scale=1)), every[0])
    outside = torch.tensor([-3.0, -1.0, 1.0, 9.0]).view(1, 1, 2, 2)
    assert pixels(grid_image(outside, scale=1)).flatten().tolist() == [0, 0, 255, 255]


def test_columns_prefer_full_rows_and_small_images_grow():
    widths = {n: (grid_image(bytes_images(n, 1, 8, 8), pad=0, scale=1).width // 8) for n in (1, 10, 12, 50, 64, 7)}
    assert widths == {1: 1, 10: 5, 12: 4, 50: 10, 64: 8, 7: 3}
    assert grid_image(bytes_images(1, 1, 8, 8)).size == (64, 64)
    assert grid_image(bytes_images(1, 3, 100, 100)).size == (100, 100)


def test_save_grid_is_the_grid(tmp_path):
    images = bytes_images(4, 3, 6, 6)
    path = save_grid(images, tmp_path / "new" / "grid.png", columns=2)
    with Image.open(path) as back:
        assert torch.equal(pixels(back), pixels(grid_image(images, columns=2)))


def test_bad_images_are_named():
    for bad in (torch.zeros(8, 8), torch.zeros(2, 2, 4, 4), torch.zeros(0, 1, 4, 4)):
        with pytest.raises(ValueError, match="images must be"):
            grid_image(bad)
    with pytest.raises(ValueError, match="int64"):
        grid_image(torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN"):
        grid_image(torch.full((1, 1, 2, 2), torch.nan))
    with pytest.raises(ValueError, match="columns 0"):
        grid_image(torch.zeros(1, 1, 2, 2), columns=0)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "report.html", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        Report("new").save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# Plots --------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_in_light_and_dark():
    style = re.search(r"<style>(.*?)</style>", Report("x").html(), re.S)[1]
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media (prefers", 1))
    for scheme in (light, dark):
        assert min(contrast(c, scheme["paper"]) for c in COLOURS) >= 3
        for ground in ("paper", "card", "best"):
            assert contrast(scheme["ink"], scheme[ground]) >= 7
        for text in ("soft", "accent"):
            assert min(contrast(scheme[text], scheme[ground]) for ground in ("paper", "card")) >= 4.5


def test_curve_smooths_to_the_mean_and_leaves_nan_out():
    x = torch.arange(2000.0)
    y = 2 + (-1.0) ** x
    y[7] = torch.nan
    axes = curve(x, y, smooth=0.1).axes[0]
    mean = torch.tensor(axes.lines[-1].get_ydata())
    assert (mean - 2).abs().max() < 0.05
    assert axes.get_yscale() == "linear"
    assert curve([1, 2, 3], [100.0, 1.0, 1.0], smooth=0).axes[0].get_yscale() == "log"
    with pytest.raises(ValueError, match="finite"):
        curve([1, 2], [torch.nan, torch.inf])
    with pytest.raises(ValueError, match="one length"):
        curve([1, 2], [1.0])


def test_curve_png_is_a_png():
    with Image.open(io.BytesIO(curve_png([1, 2, 3], [3.0, 2.0, 1.0]))) as image:
        assert image.format == "PNG"
        assert image.getpixel((0, 0))[:3] == (255, 255, 255)


def test_pareto_draws_every_sampler_and_the_front():
    points = {"a": [(10, 2.0), (5, 4.0)], "b": [(5, 3.0), (20, 5.0)]}
    axes = pareto(points).axes[0]
    data = {line.get_label(): [tuple(map(float, p)) for p in line.get_xydata()] for line in axes.lines}
    assert data["a"] == [(5, 4), (10, 2)]
    assert data["b"] == [(5, 3), (20, 5)]
    assert [(5, 3), (10, 2)] in data.values()  # what no other point beats
    for bad in ({}, {"a": []}, {"a": [(5, 0.0)]}, {"a": [(5, torch.nan)]}):
        with pytest.raises(ValueError, match="points"):
            pareto(bad)


# Report -------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_fetches_nothing():
    source = full_report().html()
    page = Page(source)
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attributes.get(key, "#").startswith(("#", "data:image/"))
    assert not page.all("script")
    assert not page.all("link")
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"', source) + re.findall(r"url\(#([^)]+)\)", source)
    assert used
    assert set(used) <= set(ids)


def test_page_can_be_read_without_seeing_it():
    page = Page(full_report().html())
    assert [a["alt"] for a in page.all("img")] == ["grid of four", "left", "right"]
    labelled = [a for a in page.all("svg") if a.get("role") == "img"]
    assert [a["aria-label"] for a in labelled] == ["Loss", "Cost"]
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    assert any("width=device-width" in a.get("content", "") for a in page.all("meta"))
    assert "images seen" in page.words  # text of plots is text


def test_figures_follow_the_page_or_stand_on_a_plate():
    from matplotlib.figure import Figure

    ours = Report("x").figure(curve([1, 2], [1.0, 2.0])).html()
    assert INK not in ours
    assert 'class="plate"' not in ours
    assert "currentColor" in ours
    foreign = Figure()
    foreign.add_subplot().plot([1, 2])
    assert 'class="plate"' in Report("x").figure(foreign).html()


def test_images_decode_back(tmp_path):
    picture = grid_image(bytes_images(6, 3, 9, 9), scale=1)
    picture.save(tmp_path / "file.png")
    page = Page(Report("x").image(picture).image(tmp_path / "file.png").html())
    for attributes in page.all("img"):
        data = base64.b64decode(attributes["src"].split(",")[1])
        with Image.open(io.BytesIO(data)) as back:
            assert torch.equal(pixels(back), pixels(picture))
        assert int(attributes["width"]) % picture.width == 0
        assert attributes["class"] == "pixels"
    (tmp_path / "not.png").write_text("<svg/>")
    with pytest.raises(ValueError, match="not.png"):
        Report("x").image(tmp_path / "not.png")


def test_text_cannot_break_out():
    evil = "<script>alert(1)</script>\"'&{x}"
    picture = grid_image(bytes_images(1, 1, 2, 2))
    report = Report(evil, evil).section(evil).section(evil).section(evil).text(evil).text(f"`{evil}`").command(evil)
    report.table([evil, "b"], [[evil, 1]], evil, best={"b": "min"}).image(picture, evil, evil).grid([(picture, evil)], evil)
    report.figure(curve([1, 2], [1.0, 2.0], ylabel=evil), evil).environment(note=evil)
    page = Page(report.html())
    assert not page.all("script")
    assert page.all("img")[0]["alt"] == evil
    assert sum(evil in word for word in page.words) >= 12


def test_markdown_marks():
    source = Report("x").text("a **b** `**c**` d\nsame\n\n- **e**\n- f").html()
    assert "<p>a <strong>b</strong> <code>**c**</code> d same</p>" in source
    assert "<ul><li><strong>e</strong></li><li>f</li></ul>" in source


def test_table_aligns_numbers_and_marks_the_best():
    rows = [["a", 1.5, 12, "text"], ["b", 0.25, 1200, 3], ["c", float("nan"), None, ""]]
    source = Report("x").table(["name", "loss", "count", "mixed"], rows, best={"loss": "min", "count": "max"}).html()
    assert re.findall(r'<th scope="col"( class="num")?>', source) == ["", ' class="num"', ' class="num"', ""]
    assert re.findall(r'<strong class="best">([\d.,]+)<', source) == ["0.25", "1,200"]
    assert '<td class="num">1.50</td>' in source
    assert "nan" in source
    with pytest.raises(ValueError, match=r"rows\[0\]"):
        Report("x").table(["a"], [[1, 2]])
    with pytest.raises(ValueError, match="best"):
        Report("x").table(["a"], [[1]], best={"b": "min"})


def test_same_content_same_bytes_and_saved_whole(tmp_path):
    plain = Report("x").figure(curve([1, 2], [1.0, 2.0])).figure(curve([1, 2], [1.0, 2.0]))
    again = Report("x").figure(curve([1, 2], [1.0, 2.0])).figure(curve([1, 2], [1.0, 2.0]))
    path = plain.save(tmp_path / "deep" / "report.html")
    assert path.read_text("utf-8") == again.html()
    words = Page(full_report().html()).words
    assert torch.__version__ in words
