"""What `quieten sample --guide` follows: a class, or a measurement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..guidance import Guidance
from ..guiding.classify import NoisyClassifier
from ..guiding.guides import Classified
from ..guiding.measurements import Downsample, Grey, Mask, Measured, Operator
from ..training.source import Source

__all__ = ["Guide", "chosen", "open_guide"]

TASKS = ("inpaint", "colour", "superres:K")
STD = 0.02
"""Noise of a measured picture unless told otherwise: a little more than one grey level in 255."""


@dataclass
class Guide:
    """A guidance for every chunk of samples.

    Attributes:
        make: Rows of the samples to their guidance.
        measured: Whether it is a measurement, which one evaluation of the network a step pays for.
        classes: The class of each sample (n,), if classes guide.
        names: Names of those classes.
        columns: Columns of the picture when they take turns.
        words: What it is, for file names.
        seen: What was measured, to be looked at beside the samples; None for classes.
        gradients: Gradients asked for, counted in samples.
    """

    make: Callable[[slice], Guidance]
    measured: bool
    words: str
    classes: Tensor | None = None
    names: tuple[str, ...] = ()
    columns: int | None = None
    seen: Tensor | None = None
    gradients: list[int] = field(default_factory=lambda: [0])


def open_guide(
    source: Source,
    what: str,
    n: int,
    *,
    scale: float | None,
    classifier: str | None,
    measurement: Path | None,
    mask: Path | None,
    std: float | None,
) -> Guide:
    """The guide that was asked for; the arguments are the command's options.

    Raises:
        ValueError: For a task, class, file or option that does not fit.
    """
    word, colon, factor = what.partition(":")
    task = {"color": "colour"}.get(word.strip().lower(), word.strip().lower())
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"`--scale {scale}` must be a finite number")
    if task in ("inpaint", "colour") and colon:
        raise ValueError(f"`--guide {what}` takes no number: leave out {colon}{factor}")
    if task not in ("inpaint", "colour", "superres"):
        for option, value in (("measurement", measurement), ("mask", mask), ("std", std)):
            if value is not None:
                raise ValueError(f"`--{option} {value}` goes with --guide {', '.join(TASKS)}: leave it out, "
                                 f"--guide {what} is a class")  # fmt: skip
        return _class_guide(source, what, n, 1.0 if scale is None else scale, classifier)
    if classifier is not None:
        raise ValueError(f"`--classifier {classifier}` goes with --guide CLASS: leave it out, --guide {what} measures")
    return _measured_guide(
        source, task, factor, 1.0 if scale is None else scale, measurement, mask, STD if std is None else std
    )


def chosen(classes: tuple[str, ...], words: str | None, n: int, option: str) -> tuple[Tensor, int | None]:
    """Classes of n samples that take turns, and the columns of their picture: names or numbers by comma, None or "all"."""
    names = [] if words in (None, "all") else str(words).split(",")
    picked = [_class(classes, name.strip(), option) for name in names] or list(range(len(classes)))
    columns = len(picked) if 2 <= len(picked) <= min(16, n) else None
    return torch.tensor(picked, dtype=torch.int64).repeat(-(-n // len(picked)))[:n], columns


def _class(classes: tuple[str, ...], word: str, option: str) -> int:
    from ..training.parts import nearest

    names = [name.lower() for name in classes]
    if word.lower() in names:
        return names.index(word.lower())
    if word.isdecimal() and int(word) < len(classes):
        return int(word)
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    known = [*names, *(TASKS if option == "guide" else ())]
    whose, also = ("classifier", f", or measure with {', '.join(TASKS)}") if option == "guide" else ("model", "")
    raise ValueError(f"`--{option} {word}` is no class of this {whose}{nearest(word.lower(), known)}: give a number below "
                     f"{len(classes)}, or a name ({shown}){also}")  # fmt: skip


# ---- classes


def _class_guide(source: Source, what: str, n: int, scale: float, classifier: str | None) -> Guide:
    judge = NoisyClassifier.load(classifier) if classifier is not None else _own_classifier(source, what)
    shape = source.denoiser.shape
    if None not in (shape, judge.shape) and shape != judge.shape:
        raise ValueError(f"`--classifier {classifier}` judges examples of shape {judge.shape}, this model draws {shape}: train "
                         "one on the model's data")  # fmt: skip
    count = len(judge.classes) or int(judge.net.classes)  # type: ignore[arg-type]
    label, columns = chosen(judge.classes or tuple(map(str, range(count))), what, n, "guide")
    device = source.denoiser.device
    judge, words = judge.to(device), [] if what == "all" else ["".join(c if c.isalnum() else "-" for c in what)]
    guide = Guide(
        lambda rows: Classified(judge, label[rows], scale), False, "-".join(["guide", *words, f"{scale:g}"]),
        label, judge.classes, columns,
    )  # fmt: skip
    _count(judge, guide)
    return guide


def _count(judge: nn.Module, guide: Guide) -> None:
    def add(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        guide.gradients[0] += len(arguments[0])

    judge.register_forward_hook(add)


def _own_classifier(source: Source, what: str) -> NoisyClassifier:
    """The classifier of the library that knows the model's classes."""
    folder = Path(__file__).parents[1] / "zoo" / "classifiers"
    for path in sorted(folder.glob("*-noisy.safetensors")) if source.classes else ():
        judge = NoisyClassifier.load(path)
        if (judge.classes, judge.shape) == (source.classes, source.denoiser.shape):
            return judge
    raise ValueError(f"`--guide {what}` needs a classifier of noisy pictures: give --classifier FILE, written by "
                     f"`quieten train-classifier DATA`; or measure with --guide {', '.join(TASKS)}")  # fmt: skip


# ---- measurements


def _measured_guide(
    source: Source, task: str, factor: str, scale: float, measurement: Path | None, mask: Path | None, std: float
) -> Guide:
    shape = source.denoiser.shape
    if source.decode is not None or shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"`--guide {task}` needs a model that draws pictures pixel by pixel: this one does not")
    if measurement is None:
        raise ValueError(f"`--measurement` is missing: name the picture that --guide {task} starts from")
    if mask is not None and task != "inpaint":
        raise ValueError(f"`--mask {mask}` goes with --guide inpaint: leave it out")
    if not 0.0 <= std < math.inf:
        raise ValueError(f"`--std {std:g}` must be finite and not negative: it is the picture's noise, on the scale [-1, 1]")
    operator: Operator
    if task == "inpaint":
        operator = Mask(_known(measurement, mask, shape))
    elif task == "colour":
        if shape[0] != 3:
            raise ValueError("`--guide colour` needs a model of colour pictures: this one draws grey ones")
        operator = Grey()
    else:
        operator = Downsample(_factor(factor, shape))
    whole = torch.zeros(1, *shape)
    y = _picture(measurement, shape, operator, tuple(operator(whole).shape[2:]))
    device = source.denoiser.device
    # back through the network: what is measured then tells of its surroundings too, which a variance by pixels cannot; and with
    # the variance of unit data, since a smaller one makes the gradient too stiff for few steps
    guidance = Measured(operator, y, std, scale, variance=1.0, jacobian="backward").to(device)
    return Guide(lambda rows: guidance, True, f"{task}{factor}-{measurement.stem}", seen=operator.pinv(y, whole))


def _factor(text: str, shape: tuple[int, ...]) -> int:
    if not text.isdecimal() or int(text) < 2 or any(side % int(text) for side in shape[1:]):
        divisors = [str(k) for k in range(2, min(shape[1:]) + 1) if all(side % k == 0 for side in shape[1:])]
        raise ValueError(f"`--guide superres:{text}` must say how many times smaller the picture is, as in superres:4: for "
                         f"this model, which draws {shape[2]}x{shape[1]}, one of {', '.join(divisors)}")  # fmt: skip
    return int(text)


def _open(path: Path, option: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path.expanduser()) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError) as error:
        reason = "no picture" if isinstance(error, UnidentifiedImageError) else error.strerror or str(error)
        raise ValueError(f"`--{option} {path}` cannot be read ({reason}): name a picture") from None


def _picture(path: Path, shape: tuple[int, ...], operator: Operator, measured: tuple[int, ...]) -> Tensor:
    """What was measured, (1, *m) in [-1, 1]: the file, or the measurement of a file that shows the whole picture."""
    from ..datasets.pictures import pixels

    image = _open(path, "measurement")
    size = image.size[::-1]
    if size not in (measured, shape[1:]):
        sizes = " or ".join(f"{width}x{height}" for height, width in dict.fromkeys((measured, shape[1:])))
        raise ValueError(f"`--measurement {path}` is {size[1]}x{size[0]} pixels: give {sizes}")
    levels = torch.from_numpy(pixels(image, shape[0], None, "center").copy())
    x = levels.reshape(1, shape[0], *size).float() / 127.5 - 1.0
    return operator(x) if size == shape[1:] else x


def _known(measurement: Path, mask: Path | None, shape: tuple[int, ...]) -> Tensor:
    """Where the picture is known, bool (1, 1, H, W): black in the mask, or opaque in the picture itself."""
    if mask is not None:
        image = _open(mask, "mask").convert("L")
        known = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, 1, *image.size[::-1]) < 128
    else:
        image = _open(measurement, "measurement")
        if "A" not in image.getbands() and "transparency" not in image.info:
            raise ValueError("`--mask` is missing: name a picture, white where --guide inpaint is to draw; or make those "
                             f"pixels of {measurement} transparent")  # fmt: skip
        alpha = image.convert("RGBA").getchannel("A")
        known = torch.frombuffer(bytearray(alpha.tobytes()), dtype=torch.uint8).reshape(1, 1, *alpha.size[::-1]) >= 128
    if tuple(known.shape[2:]) != shape[1:]:
        raise ValueError(f"`--mask {mask or measurement}` is {known.shape[3]}x{known.shape[2]} pixels: give "
                         f"{shape[2]}x{shape[1]}, the size that this model draws")  # fmt: skip
    return known
