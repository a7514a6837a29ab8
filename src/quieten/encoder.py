r"""Encoders of DiffEnc: data that change with the level, before noise is added: z_t ~ N(alpha x_t, sigma^2 I).

They belong to training and to the bound. A sampler never sees them: `encoded` has what they leave behind. Here alpha^2 and
sigma^2 are sigmoid(lam) and sigmoid(-lam), whatever the scaling of the process.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .gaussian import spread_over

__all__ = ["Contraction", "Encoder", "LearnedEncoder", "finite_rate", "forward_rate"]

BY_TIME: dict[str, Callable[[Tensor], Tensor]] = {
    "rising": lambda tau: tau,
    "falling": lambda tau: 1.0 - tau,
    "early": lambda tau: (0.5 * tau - tau * tau).clamp_min(0.0),
}
"""Factors by which normalised time tau may temper an encoder's network; as released, "early" is one number for a batch."""


class Encoder(nn.Module, ABC):
    """From clean data and a level to encoded data.

    References:
        | DiffEnc: Variational Diffusion with a Learned Encoder (Nielsen et al., 2024)
        | https://arxiv.org/abs/2310.19789
    """

    @abstractmethod
    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        """Encoded data x_t (B, *) of clean data x (B, *) at log-SNRs lam (B,)."""

    @abstractmethod
    def with_rate(self, x: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and d x_t / d lam, both (B, *), from one call of what is learned, hence with one dropout mask."""


class Contraction(Encoder):
    """x_t = alpha^2 x: nothing is learned, and its rate sigma^2 x_t is what the counterterm "sigma2" says, exactly."""

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        return spread_over(torch.sigmoid(lam), x) * x

    def with_rate(self, x: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        x_t = self(x, lam)
        return x_t, spread_over(torch.sigmoid(-lam), x) * x_t


class LearnedEncoder(Encoder):
    r"""x_t = alpha^2 x + sigma^2 y(x, lam), with y from a network.

    The rate is :math:`\dot x_t = \sigma^2 (x_t - y + \dot y)`; the derivative of y comes from forward-mode differentiation of
    the same call, or from central differences where the network has an operation without one (a warning says so).

    Arguments:
        net: (x, lam (B,)) -> (B, *); an output that starts at zero makes the encoder start as `Contraction`.
        bounded: Whether y passes through tanh, as in every released run.
        scale: Factor k on y, after tanh.
        by_time: Multiplies the network's output, before tanh, by a function of the normalised time tau = (lam_max - lam) /
            (lam_max - lam_min): tau if "rising", 1 - tau if "falling", max(tau / 2 - tau^2, 0) if "early", 1 if None.
        max_var: Bounds the variance of y over each example: a number, or "data" for that of x.
        min_var: Raises it to this from 1e-3 up, and from below by the factor that 1e-3 needs; at most `max_var`.
        id_at_zero: y = x + that, divided by max(1, max |y|) per example if `bounded`: starts as no encoder at all, so that it
            can join a pretrained denoiser; with the counterterm "none".
        lam_max: Log-SNR of tau = 0.
        lam_min: Log-SNR of tau = 1.
        step: Distance in lam of the central differences.

    Raises:
        ValueError: For an unknown `by_time`, bounds on the variance that contradict each other, or if the network returns
            another shape than that of x.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        bounded: bool = True,
        scale: float = 1.0,
        by_time: str | None = None,
        max_var: float | str | None = None,
        min_var: float | None = None,
        id_at_zero: bool = False,
        lam_max: float = 13.3,
        lam_min: float = -5.0,
        step: float = 1e-2,
    ):
        super().__init__()
        if by_time is not None and by_time not in BY_TIME:
            raise ValueError(f"`by_time` must be {', '.join(map(repr, BY_TIME))} or None (got {by_time!r})")
        if max_var is not None and (max_var != "data" if isinstance(max_var, str) else not max_var > 0):
            raise ValueError(f"`max_var` must be positive, 'data' for that of each example, or None (got {max_var!r})")
        if min_var is not None and (not isinstance(max_var, int | float) or not 0 < min_var <= max_var):
            raise ValueError(f"`min_var` must be positive and at most a number `max_var` (got {min_var!r}, {max_var!r})")
        if any(isinstance(m, nn.GroupNorm) and m.num_groups == m.num_channels for m in net.modules()):
            warnings.warn("the encoder's `net` normalises every channel by itself (GroupNorm with a group per channel), which "
                          "removes the level from it: use fewer groups", stacklevel=2)  # fmt: skip
        self.net, self.bounded, self.scale, self.by_time, self.id_at_zero = net, bounded, scale, by_time, id_at_zero
        self.max_var, self.min_var = max_var, min_var
        self.lam_max, self.lam_min, self.step = lam_max, lam_min, step
        self._forward_mode = True

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        a2, s2 = _squares(lam, x)
        return a2 * x + s2 * self.y(x, lam)

    def with_rate(self, x: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        y, y_rate = self.y_with_rate(x, lam)
        a2, s2 = _squares(lam, x)
        x_t = a2 * x + s2 * y
        return x_t, s2 * (x_t - y + y_rate)

    def y(self, x: Tensor, lam: Tensor) -> Tensor:
        """What the network makes of the data, with its bounds: (B, *)."""
        y = self.net(x, lam)
        if y.shape != x.shape:
            raise ValueError(f"the encoder's `net` returned shape {tuple(y.shape)} for data {tuple(x.shape)}: they must agree")
        if self.by_time is not None:
            tau = (self.lam_max - lam) / (self.lam_max - self.lam_min)
            y = y * spread_over(BY_TIME[self.by_time](tau), y)
        if self.bounded:
            y = y.tanh()
        if self.scale != 1.0:
            y = self.scale * y
        if self.max_var is not None and y.numel():
            y = self._of_bounded_variance(y, x)
        if self.id_at_zero:
            y = x + y
            if self.bounded and y.numel():
                y = y / y.abs().flatten(1).amax(1).clamp_min(1.0).reshape(-1, *[1] * (y.ndim - 1))
        return y

    def _of_bounded_variance(self, y: Tensor, x: Tensor) -> Tensor:
        """y, each example scaled so that its variance (over its numbers) keeps the bounds."""
        var = _variance(y)
        top = _variance(x).clamp_min(1e-12) if self.max_var == "data" else torch.full_like(var, float(self.max_var or 0.0))
        y = y * spread_over((top / torch.maximum(var, top)).sqrt(), y)
        if self.min_var is None:
            return y
        low = _variance(y).clamp(min(1e-3, self.min_var), self.min_var)
        return y * spread_over((self.min_var / low).sqrt(), y)

    def y_with_rate(self, x: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """y and d y / d lam, both (B, *)."""
        lam = lam.expand(len(x)).contiguous()  # forward mode writes to it
        if self._forward_mode:
            try:
                return forward_rate(lambda level: self.y(x, level), lam)
            except (NotImplementedError, RuntimeError) as error:
                self.y(x, lam[: len(x)])  # an error that has nothing to do with forward mode is raised here
                self._forward_mode = False
                warnings.warn(f"the encoder's `net` has no forward-mode derivative ({str(error).splitlines()[0]}): central "
                              f"differences of step {self.step:g} in lam stand in for it", stacklevel=3)  # fmt: skip
        return finite_rate(lambda level: self.y(x, level), lam, self.step)

    def extra_repr(self) -> str:
        bounds = f"max_var={self.max_var}, min_var={self.min_var}"
        return f"bounded={self.bounded}, scale={self.scale}, by_time={self.by_time}, {bounds}, id_at_zero={self.id_at_zero}"


def _variance(y: Tensor) -> Tensor:
    """Of the numbers of each example: (B,)."""
    return y.flatten(1).var(1, correction=0)


def forward_rate(f: Callable[[Tensor], Tensor], lam: Tensor) -> tuple[Tensor, Tensor]:
    """f(lam) and its derivative, by one forward-mode call; gradients flow through both."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward mode
        result = torch.func.jvp(f, (lam,), (torch.ones_like(lam),))
    return result[0], result[1]


def finite_rate(f: Callable[[Tensor], Tensor], lam: Tensor, step: float = 1e-2) -> tuple[Tensor, Tensor]:
    """f(lam) and its central difference, of error step^2; the three calls see the same random numbers."""
    results = []
    for shift in (0.0, step, -step):
        with _replayed(lam.device, again=shift != -step):
            results.append(f(lam + shift))
    y, above, below = results
    return y, (above - below) / (2.0 * step)


@contextlib.contextmanager
def _replayed(device: torch.device, again: bool) -> Iterator[None]:
    """Restores the random state afterwards, so that the next call draws the same numbers, unless this is the last."""
    if not again:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _squares(lam: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha^2 and sigma^2 of the VP scaling, shaped as x."""
    return spread_over(torch.sigmoid(lam), x), spread_over(torch.sigmoid(-lam), x)
