r"""Values and energies: networks of (x, k) that give one number per example, low where the data are.

All of them are called as `net(x, k, **cond)` and answer (B,). `k` counts the states of a policy of T steps in the order of
generation, 0 for noise and T for samples; V(., T) is the energy. A network without time (`T=None`) takes any `k` and ignores
it: it is value and energy at once, as for images in the paper. Conditions that a network was not built for do not change what
it says: it is then a value of the marginal.

`per_position` says where in an example the energy is, for the networks that can tell: the map sums to the energy.

References:
    | Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models (Yoon et al., 2024)
    | https://arxiv.org/abs/2407.00626
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nets import Embedding, zeroed
from .critics import column

__all__ = [
    "PerceptronValue",
    "ResidualValue",
    "ValueNet",
    "default_value",
    "perceptron",
    "read",
]

FREQUENCIES = 16
SPAN = 10.0
"""The times of a network run from 0 to this, whatever T: the range that its sines are made for."""


def read(net: Callable[..., Any], x: Tensor, k: int | Tensor | None = None, **cond: Any) -> Tensor:
    """What any value or energy says of x, as (B,).

    Arguments:
        net: Called as net(x, k, **cond); answers (B,) or (B, 1).
        x: States (B, *).
        k: Which state of the chain: a number for all, int64 (B,), or None for an energy.
        **cond: Conditions, each with a first axis of B.

    Raises:
        ValueError: If the answer has another shape.
    """
    return column(net(x, k, **cond), x, "value or energy")


class ValueNet(nn.Module, ABC):
    """What the networks here share: the shape of an example, the time and the label.

    Attributes:
        shape: Shape of one example.
        T: Steps of the policy it is a value of; None for a network without time.
        classes: Number of classes it tells apart, 0 for none.
        terminal: Whether it is the energy too, so that k = T may be asked for.
    """

    def __init__(self, shape: int | Sequence[int], T: int | None = None, classes: int = 0, terminal: bool = True) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if T is not None and T < 1:
            raise ValueError(f"`T` must be at least 1 (got {T}), or None for a network without time")
        if classes < 0:
            raise ValueError(f"`classes` must be at least 0 (got {classes})")
        self.T, self.classes, self.terminal = T, classes, terminal

    def forward(self, x: Tensor, k: int | Tensor | None = None, *, label: Tensor | None = None, **cond: Any) -> Tensor:
        """The value (B,).

        Arguments:
            x: States (B, *shape).
            k: Which state of the chain, 0..T: a number for all rows, or int64 (B,). Without time, anything.
            label: Classes (B,) or (), int64, for a network with classes.
            **cond: Other conditions, which do not matter to it.

        Raises:
            ValueError: If a shape does not fit, k is outside the chain, or a label is missing or wrong.
        """
        self._check_shape(x)
        return self._value(x, self._embedded(x, k), self._labels(x, label))

    @abstractmethod
    def _value(self, x: Tensor, embedded: Tensor | None, label: Tensor | None) -> Tensor:
        """The value (B,), of the embedded time (1 or B, channels) and of the labels (B,), each None where there is none."""

    def _check_shape(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"`x` must have shape {('B', *self.shape)} (got {tuple(x.shape)}): build the network for it")

    def _embedded(self, x: Tensor, k: int | Tensor | None) -> Tensor | None:
        if self.T is None:
            return None
        last = self.T if self.terminal else self.T - 1
        if isinstance(k, Tensor):
            if k.shape not in ((), (len(x),)) or k.is_floating_point():
                raise ValueError(f"`k` must be whole numbers of shape ({len(x)},) (got {k.dtype}, {tuple(k.shape)})")
            if k.device.type == "cpu" and k.numel() and not 0 <= int(k.min()) <= int(k.max()) <= last:
                raise ValueError(f"`k` must be in 0..{last} (got {int(k.min())}..{int(k.max())})")
            t = k.to(x).reshape(-1)
        elif k is None or not 0 <= k <= last:
            raise ValueError(f"`k` must be in 0..{last} (got {k}): this network tells the states of a chain apart")
        else:
            t = x.new_full((1,), float(k))  # one row for all: it broadcasts
        embed: Embedding = self.embed  # type: ignore[assignment]
        return embed(t)

    def _labels(self, x: Tensor, label: Tensor | None) -> Tensor | None:
        if not self.classes:
            return None
        if label is None or label.dtype != torch.long or label.shape not in ((), (len(x),)):
            got = None if label is None else (label.dtype, tuple(label.shape))
            raise ValueError(f"`label` must be int64 of shape ({len(x)},) (got {got}): this network has {self.classes} classes")
        if label.device.type == "cpu" and label.numel() and not 0 <= int(label.min()) <= int(label.max()) < self.classes:
            raise ValueError(f"`label` must be in 0..{self.classes - 1} (got {int(label.min())}..{int(label.max())})")
        return label.to(x.device).expand(len(x))

    def extra_repr(self) -> str:
        return f"shape={self.shape}, T={self.T}, classes={self.classes}, terminal={self.terminal}"


def _time(T: int, channels: int) -> Embedding:
    return Embedding(channels, t_scale=SPAN / T, frequencies=FREQUENCIES)


class PerceptronValue(ValueNet):
    """Perceptron with SiLU, for vectors or small images, flattened inside; the time and the class enter the first layer.

    Arguments:
        shape: Shape of one example: a number or a tuple.
        T: Steps of the policy; None for a network without time.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        classes: Number of classes; 0 ignores labels.
        terminal: Whether it is the energy too; False where a separate energy is.
        scale: Factor on the input that brings it to unit size, such as sqrt(D) on the unit sphere.

    Example:
        >>> V = PerceptronValue(2, T=5)
        >>> V(torch.zeros(7, 2), 3).shape, V(torch.zeros(7, 2), torch.arange(7) % 6).shape
        (torch.Size([7]), torch.Size([7]))
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        T: int | None = None,
        width: int = 128,
        depth: int = 3,
        classes: int = 0,
        terminal: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(shape, T, classes, terminal)
        self.scale = scale
        if width < 1 or depth < 1:
            raise ValueError(f"`width` and `depth` must be at least 1 (got {width}, {depth})")
        self.stem = nn.Linear(math.prod(self.shape), width)
        self.embed = _time(T, width) if T is not None else None
        self.label = nn.Embedding(classes, width) if classes else None
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.out = nn.Linear(width, 1)

    def _value(self, x: Tensor, embedded: Tensor | None, label: Tensor | None) -> Tensor:
        x = x.flatten(1)
        h = self.stem(x if self.scale == 1.0 else self.scale * x)
        if embedded is not None:
            h = h + embedded
        if self.label is not None:
            h = h + self.label(label)
        h = F.silu(h)
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.out(h)[:, 0]


class ResidualValue(ValueNet):
    r"""The paper's residual network of images, without any normalisation: positive and negative examples must not meet in it.

    A 3x3 convolution, six residual blocks of widths (1, 1, 2, 2, 2, 2) `width` of which the first, third and fifth halve the
    picture, ReLU, the sum over positions, a linear layer, and a learned scale and shift of the result. With width 128 and
    three channels it has 5,134,595 parameters. The output is linear: nothing but gamma bounds the energy.

    Arguments:
        shape: (C, H, W), sides of 8 or more.
        T: Steps of the policy: the time then scales and shifts what each convolution of a block returns, at first by 1 and
            0. None for a network without time, the paper's.
        width: Channels of the first blocks.
        classes: Number of classes: each then has its own scales and shifts, and the convolutions of blocks no bias.
        terminal: Whether it is the energy too; False where a separate energy is.

    References:
        | `models/modules.py` of swyoon/Diffusion-by-MaxEntIRL, after Du and Mordatch (2019), https://arxiv.org/abs/1903.08689
    """

    def __init__(
        self, shape: Sequence[int], T: int | None = None, width: int = 128, classes: int = 0, terminal: bool = True
    ) -> None:
        super().__init__(shape, T, classes, terminal)
        if len(self.shape) != 3 or min(self.shape[1:]) < 8:
            raise ValueError(f"`shape` must be (C, H, W) with sides of 8 or more (got {self.shape}): take PerceptronValue")
        if width < 1:
            raise ValueError(f"`width` must be at least 1 (got {width})")
        widths = [width, width, width, 2 * width, 2 * width, 2 * width, 2 * width]
        time = 4 * width if T is not None else 0
        self.embed = _time(T, time) if T is not None else None
        self.stem = nn.Conv2d(self.shape[0], width, 3, padding=1)
        self.blocks = nn.ModuleList(
            _ResidualBlock(widths[i], widths[i + 1], halve=i % 2 == 0, classes=classes, time=time) for i in range(6)
        )
        self.out = nn.Linear(2 * width, 1)
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def _value(self, x: Tensor, embedded: Tensor | None, label: Tensor | None) -> Tensor:
        h = self._map(x, embedded, label).sum((2, 3))
        return self.out(h)[:, 0] * self.scale + self.shift

    def per_position(self, x: Tensor, k: int | Tensor | None = None, *, label: Tensor | None = None, **cond: Any) -> Tensor:
        """The share of each position of the last map in the value, (B, H // 8, W // 8); what has no place is spread evenly."""
        self._check_shape(x)
        h = self._map(x, self._embedded(x, k), self._labels(x, label))
        per = torch.einsum("bchw,c->bhw", h, self.out.weight[0])
        return per * self.scale + (self.out.bias * self.scale + self.shift) / (h.shape[2] * h.shape[3])

    def _map(self, x: Tensor, embedded: Tensor | None, label: Tensor | None) -> Tensor:
        h = F.leaky_relu(self.stem(x), 0.2)
        for block in self.blocks:
            h = block(h, embedded, label)
        return F.relu(h)


class _ResidualBlock(nn.Module):
    """conv, leaky ReLU, conv, plus the input; then the picture is halved, if it is, and leaky ReLU."""

    def __init__(self, inside: int, outside: int, halve: bool, classes: int, time: int) -> None:
        super().__init__()
        self.halve = halve
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=not classes)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=not classes)
        self.skip = nn.Conv2d(inside, outside, 1, bias=False) if halve or inside != outside else None
        self.label = nn.Embedding(classes, 4 * outside) if classes else None  # scale1, scale2, shift1, shift2
        self.time = zeroed(nn.Linear(time, 4 * outside)) if time else None
        if self.label is not None:
            with torch.no_grad():
                self.label.weight[:, : 2 * outside] = 1.0
                self.label.weight[:, 2 * outside :] = 0.0

    def forward(self, x: Tensor, embedded: Tensor | None, label: Tensor | None) -> Tensor:
        scale1, scale2, shift1, shift2 = self._modulation(embedded, label)
        h = F.leaky_relu(_affine(self.conv1(x), scale1, shift1), 0.2)
        h = _affine(self.conv2(h), scale2, shift2)
        h = h + (x if self.skip is None else self.skip(x))
        if self.halve:
            h = F.avg_pool2d(h, 2)
        return F.leaky_relu(h, 0.2)

    def _modulation(self, embedded: Tensor | None, label: Tensor | None) -> Sequence[Tensor | None]:
        m = None if self.label is None else self.label(label)
        if self.time is not None:
            t = self.time(embedded)
            ones = torch.arange(t.shape[1], device=t.device) < t.shape[1] // 2  # labels bring the 1 of the scales with them
            m = t + (ones if m is None else m)
        return (None,) * 4 if m is None else m[:, :, None, None].chunk(4, dim=1)


def _affine(h: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return h if scale is None or shift is None else torch.addcmul(shift, h, scale)


def perceptron(inside: int, outside: int, width: int, depth: int) -> nn.Sequential:
    """A perceptron (B, inside) to (B, outside) with `depth` hidden layers of SiLU."""
    sizes = [inside, *[width] * depth]
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outside))


def default_value(
    shape: int | Sequence[int],
    T: int | None = None,
    *,
    time: bool = True,
    width: int = 128,
    classes: int = 0,
    terminal: bool = True,
) -> ValueNet:
    """The value network that suits a shape: residual for images with sides of 8 or more, else a perceptron.

    Arguments:
        shape: Shape of one example.
        T: Steps of the policy.
        time: Whether the network tells the states of the chain apart; images in the paper do without.
        width: Units or channels.
        classes: Number of classes; 0 ignores labels.
        terminal: Whether it is the energy too; False where a separate energy is.

    Raises:
        ValueError: If `time` is wanted and T is None.
    """
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    if time and T is None:
        raise ValueError("`T` is needed for a value with time: give the steps of the policy, or time=False")
    steps = T if time else None
    if len(dims) == 3 and min(dims[1:]) >= 8:
        return ResidualValue(dims, steps, width, classes, terminal)
    return PerceptronValue(dims, steps, width, classes=classes, terminal=terminal)
