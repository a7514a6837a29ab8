r"""A forward process whose data change with the level: z_t ~ N(alpha x_t, sigma^2 I), with x_t an encoding of x (DiffEnc).

The encoder belongs to training and to the bound. A sampler never sees it: `Encoded` is the kernel of what it leaves behind.
In the encoder's formulas alpha^2 and sigma^2 are sigmoid(lam) and sigmoid(-lam), whatever the scaling of the process.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .denoiser import Denoiser, Preconditioned, convert
from .gaussian import POINT, Gaussian, spread_over
from .process import VP, Level, Process
from .transition import Step, Transition

__all__ = [
    "COUNTERTERMS",
    "Contraction",
    "Encoded",
    "EncodedFlow",
    "Encoder",
    "LearnedEncoder",
    "Moving",
    "Separated",
    "finite_rate",
    "forward_rate",
]

COUNTERTERMS = ("sigma2", "none", "split")
"""What stands for d x_t / d lam in the reverse process: sigma^2 x_hat (as released), nothing, or a prediction of its own."""

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
        lam = lam.expand(len(x))
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


# ---- what is left of the encoder after training


class Moving(Gaussian):
    """A Gaussian over the encoded data x_t, with an estimate of their rate d x_t / d lam.

    Attributes:
        rate: E[d x_t / d lam | z_t], of the mean's shape.
    """

    def __init__(self, mean: Tensor, var: Tensor = POINT, basis: Any = None, *, rate: Tensor):
        super().__init__(mean, var, basis)
        object.__setattr__(self, "rate", rate)

    rate: Tensor


class Separated(Preconditioned):
    """A denoiser of encoded data that predicts their rate too: what the counterterm "split" needs.

    Its network has twice the channels; the second half, times sigma^2, is E[d x_t / d lam | z_t]. Arguments as in
    `Preconditioned`, with a process `Encoded(..., "split")`.
    """

    def __init__(self, net: nn.Module, process: Process, *args: Any, **kwargs: Any):
        super().__init__(net, process, *args, learned_range=True, **kwargs)

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        out, r = self._call(x, lam, cond)
        assert r is not None
        alpha, sigma = self.process.scales_over(lam, x)
        noise = VP.scales(lam)[1] ** 2
        return Moving(convert(out, x, self.form, "x0", alpha, sigma), rate=spread_over(noise, x) * r)


class Encoded(Process):
    r"""The reverse process of a model that was trained with an encoder: it needs only the denoiser.

    The kernel is that of the base process plus :math:`\alpha_s h\, \hat d`, with :math:`h = \lambda_s - \lambda_t` and
    :math:`\hat d` the counterterm's estimate of the rate of the encoded data. A denoiser with this process returns x_hat, the
    estimate that the bound trains, as its mean: not E[x0 | x_t], whence what is refused here. A step to +inf returns
    z_t / alpha_t, which is what the decoder of the bound reads. Where x_hat is E[x_t | z_t] every eta has the same marginals
    in small steps, and eta = 0 is the ODE of `EncodedFlow` at first order; elsewhere eta must be 1.

    Arguments:
        base: The process of the scales.
        counterterm: One of `COUNTERTERMS`; "split" needs a denoiser that returns `Moving`.
        trained: Whether the encoder was; with "sigma2", x_hat of a `Contraction` is E[x_t | z_t], of a trained one it is not.

    Raises:
        ValueError: For an unknown counterterm, or a base that is itself encoded.
    """

    def __init__(self, base: Process = VP, counterterm: str = "sigma2", trained: bool = True):
        if counterterm not in COUNTERTERMS:
            raise ValueError(f"`counterterm` must be one of {', '.join(COUNTERTERMS)} (got {counterterm!r})")
        if isinstance(base, Encoded):
            raise ValueError("`base` is an encoded process already: give the process of its scales")
        self.base, self.counterterm, self.trained = base, counterterm, trained

    @property
    def knows_score(self) -> bool:
        """Whether x_hat is E[x_t | z_t], from which the score of z_t follows."""
        return self.counterterm == "split" or (self.counterterm == "sigma2" and not self.trained)

    def scales(self, lam: Any) -> tuple[Any, Any]:
        return self.base.scales(lam)

    def drift(self, lam: Any) -> Any:
        return self.base.drift(lam)

    def check_mean(self) -> None:
        raise ValueError("the estimate of a denoiser that was trained with an encoder is not E[x0 | x_t], which this "
                         f"needs: {self._remedy}")  # fmt: skip

    @property
    def _remedy(self) -> str:
        if self.knows_score:
            return "sample it with Ancestral(), of any eta, or EncodedFlow()"
        return "sample it with Ancestral(), or train it with the counterterm 'split' for EncodedFlow()"

    def prior(self, lam: Level) -> Gaussian:
        return self.base.prior(lam)

    def rate(self, x0: Gaussian | Tensor, lam: Level) -> Tensor:
        r"""The counterterm's estimate of d x_t / d lam, (B, *): :math:`\sigma^2 \hat x`, zero, or the denoiser's own."""
        mean = x0.mean if isinstance(x0, Gaussian) else x0
        if self.counterterm == "none":
            return torch.zeros_like(mean)
        if self.counterterm == "sigma2":
            return mean * spread_over(VP.scales(lam)[1] ** 2, mean)
        if not isinstance(x0, Moving):
            raise ValueError("the counterterm 'split' needs a denoiser that predicts the rate too: one that returns `Moving`")
        return x0.rate

    def bridge(
        self,
        x0: Tensor | Gaussian,
        x_t: Tensor,
        lam_t: Level,
        lam_s: Level,
        eta: float = 1.0,
        keep: Tensor | None = None,
    ) -> Gaussian:
        """The kernel p(z_s | z_t); see `Process.bridge` for the arguments.

        Raises:
            ValueError: If eta is not 1 and x_hat is not E[x_t | z_t], for a clipped or uncertain x0, without the rate that
                "split" needs, or for a step from lam = -inf (but one of the counterterm "none" to below +inf).
        """
        if eta != 1.0 and not self.knows_score:
            raise ValueError(f"`eta` must be 1 for a denoiser that was trained with an encoder (got {eta}): DDIM and ODE "
                             f"solvers need E[x_t | z_t], which it does not know; {self._remedy}")  # fmt: skip
        if keep is not None or (isinstance(x0, Gaussian) and x0.var is not POINT):
            raise ValueError("clipping with `keep_eps`, and variances of x0, have no meaning for a denoiser that was trained "
                             "with an encoder: leave them out")  # fmt: skip
        self.check_start(lam_t, lam_s)
        if isinstance(lam_t, float) and isinstance(lam_s, float):
            if lam_s == math.inf or lam_s == lam_t:
                return Gaussian(x_t / (self.scales(lam_t)[0] if lam_s == math.inf else 1.0))
            return self._moved(x0, x_t, lam_t, lam_s, eta)
        like = lam_t if isinstance(lam_t, Tensor) else torch.as_tensor(lam_s)
        lam_t, lam_s = (torch.as_tensor(lam).to(like) for lam in (lam_t, lam_s))
        # rows that stay, or that end at the data, stay at any finite level: at an infinite one nothing times inf is NaN
        ends = lam_s == math.inf
        start, stop = (torch.where(ends | (lam_s == lam_t), 0.0, lam) for lam in (lam_t, lam_s))
        p = self._moved(x0, x_t, start, stop, eta)
        return Gaussian(p.mean / spread_over(torch.where(ends, self.scales(lam_t)[0], 1.0), x_t), p.var)

    def _moved(self, x0: Tensor | Gaussian, x_t: Tensor, lam_t: Level, lam_s: Level, eta: float) -> Gaussian:
        """The kernel of steps to below +inf."""
        p = self.base.bridge(x0, x_t, lam_t, lam_s, eta)
        if self.counterterm == "none":  # whose steps may start at -inf
            return p
        alpha_s, _ = self.scales(lam_s)
        return Gaussian(p.mean + spread_over(alpha_s * (lam_s - lam_t), x_t) * self.rate(x0, lam_t), p.var)

    def check_start(self, lam_t: Level, lam_s: Level) -> None:
        """Raises ValueError for a step from lam = -inf that encoded data do not have; levels on a device are not looked at.

        Their counterterm is infinite there, and so is z_t / alpha_t.
        """
        if any(isinstance(lam, Tensor) and (type(lam) is not Tensor or lam.device.type != "cpu") for lam in (lam_t, lam_s)):
            return
        wrong = (lam_t == -math.inf) & (lam_s == math.inf if self.counterterm == "none" else lam_s != lam_t)
        if wrong if isinstance(wrong, bool) else bool(wrong.any()):
            raise ValueError(f"`lam_t` is -inf, from where {self} has no step: start from a finite log-SNR, such as the last "
                             "of Linear(13.3, -5.0)")  # fmt: skip

    def __repr__(self) -> str:
        return f"Encoded({self.base}, {self.counterterm!r})"


class EncodedFlow(Transition):
    r"""The probability-flow ODE of an encoded process, by Heun's method; 2 evaluations a step.

    .. math:: d(z / \alpha) = \hat\epsilon\, d(\sigma / \alpha) + E[\dot x_t \mid z]\, d\lambda

    Exists where E[x_t | z_t] and its rate are known apart: with the counterterm "split", or without a trained encoder.

    Raises:
        ValueError: For a denoiser of another kind, or a step from lam = -inf.
    """

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Level, lam_s: Level, memory: Any = None) -> Step:
        process = denoiser.process
        if not isinstance(process, Encoded) or not process.knows_score:
            raise ValueError(f"EncodedFlow needs a denoiser with the counterterm 'split', or an encoder that was not trained "
                             f"(got the process {process}): sample it with Ancestral()")  # fmt: skip
        process.check_start(lam_t, lam_s)
        if lam_s == math.inf:
            return Step(process.bridge(x_t, x_t, lam_t, lam_s))  # rescales the state, whatever the network says
        x0, eps, rate = _flow(denoiser, process, x_t, lam_t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.scales(lam_t), process.scales(lam_s)
        span, h = sigma_s / alpha_s - sigma_t / alpha_t, lam_s - lam_t
        y = x_t / spread_over(alpha_t, x_t)
        alpha, span, h = (spread_over(value, x_t) for value in (alpha_s, span, h))
        _, eps_s, rate_s = _flow(denoiser, process, alpha * (y + span * eps + h * rate), lam_s)
        return Step(Gaussian(alpha * (y + 0.5 * span * (eps + eps_s) + 0.5 * h * (rate + rate_s))), x0)


def _flow(denoiser: Denoiser, process: Encoded, z: Tensor, lam: Level) -> tuple[Gaussian, Tensor, Tensor]:
    """The denoiser's answer, eps_hat and the rate of the encoded data."""
    p = denoiser(z, lam)
    alpha, sigma = process.scales_over(lam, z)
    return p, (z - alpha * p.mean) / sigma, process.rate(p, lam)
