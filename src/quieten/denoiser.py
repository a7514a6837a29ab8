r"""Denoisers: (x, log-SNR) to a Gaussian over x0, in any parameterisation."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .gaussian import POINT, Gaussian, spread_over
from .process import VE, VP, Level, Process
from .schedule import LinearBeta, Table

__all__ = [
    "FORMS",
    "Bound",
    "Denoiser",
    "Form",
    "Preconditioned",
    "convert",
    "cosine_table",
    "edm",
    "edm_form",
    "evaluating",
    "form_coefficients",
    "iddpm",
    "levels",
    "ve",
    "vp",
]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode for a while; afterwards every part is in the mode that it had itself.

    A wrapper that was just made says that it trains, whatever is inside: its word must not switch dropout on there.
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


Form = str | Callable[[Any, Any], tuple[Any, Any]]
"""A parameterisation: a name in `FORMS`, or (alpha, sigma) -> (p, q), meaning the quantity f = p eps + q x0."""


def edm_form(sigma_data: float = 0.5) -> Form:
    r"""The unit-variance target of EDM for data of standard deviation `sigma_data`.

    .. math:: F = (-\sigma_d \alpha\, \epsilon + (\sigma / \sigma_d)\, x_0) / \sqrt{\sigma^2 + \sigma_d^2 \alpha^2}

    which is (D - c_skip x) / c_out of Karras et al. (2022), table 1, written without a division by sigma or alpha.
    """

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any, Any]:
        norm = (sigma * sigma + sigma_data**2 * alpha * alpha) ** 0.5
        return -sigma_data * alpha / norm, sigma / (sigma_data * norm)

    return coefficients


def _score_form(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    if _is_zero(sigma):
        raise ValueError("'score' is undefined at sigma=0: ask for it at a finite log-SNR")
    return -1.0 / sigma, 0.0


FORMS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "eps": lambda alpha, sigma: (1.0, 0.0),
    "x0": lambda alpha, sigma: (0.0, 1.0),
    "v": lambda alpha, sigma: (alpha, -sigma),
    "flow": lambda alpha, sigma: (1.0, -1.0),
    "score": _score_form,
    "edm": edm_form(0.5),  # type: ignore[dict-item]
}
"""Every parameterisation as (p, q) in f = p eps + q x0."""


def form_coefficients(form: Form, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """(p, q) of a form at a level.

    Raises:
        ValueError: For an unknown name.
    """
    if callable(form):
        return form(alpha, sigma)
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(FORMS)} or a callable (got {form!r})")
    return FORMS[form](alpha, sigma)


def convert(f: Tensor, x: Tensor, source: Form, form: Form, alpha: Any, sigma: Any) -> Tensor:
    r"""Rewrites a prediction from one parameterisation into another.

    With f = p eps + q x0 and x = sigma eps + alpha x0, any g = P eps + Q x0 is
    :math:`((P \alpha - Q \sigma) f + (Q p - P q) x) / (p \alpha - q \sigma)`.

    Arguments:
        f: The prediction (B, *) in form `source`.
        x: The noisy state (B, *).
        source: Form of `f`.
        form: Form wanted.
        alpha: Signal scale, a float or a tensor that broadcasts to x.
        sigma: Noise scale, likewise.

    Raises:
        ValueError: If the wanted quantity does not follow at this level (x0 from eps at alpha = 0, eps from x0 at sigma = 0).
    """
    if source == form:
        return f
    p, q = form_coefficients(source, alpha, sigma)
    wanted_p, wanted_q = form_coefficients(form, alpha, sigma)
    det = p * alpha - q * sigma
    if _is_zero(det):
        raise ValueError(
            f"{form!r} does not follow from a {source!r} prediction at alpha={_show(alpha)}, sigma={_show(sigma)}: "
            "use a 'v', 'flow' or 'x0' model, or start from a finite log-SNR"
        )
    a, b = (wanted_p * alpha - wanted_q * sigma) / det, (wanted_q * p - wanted_p * q) / det
    if isinstance(a, float) and isinstance(b, float):
        return torch.mul(x, b).add_(f, alpha=a)
    return a * f + b * x


def _is_zero(value: Any) -> bool:
    """Whether a number vanishes somewhere; tensors on a device are not looked at, since that would make the host wait."""
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.device.type == "cpu" and bool((value == 0).any())
    return bool(value == 0)


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value.detach().flatten()[:3].tolist())


def c_noise(lam: Tensor) -> Tensor:
    """EDM's time of a network, ln(sigma / alpha) / 4 = -lam / 8."""
    return -lam / 8


def levels(lam: Level, x: Tensor) -> Tensor:
    """lam as a vector (B,) on the device of x: float64 from a float, so that an embedding sees all its digits."""
    if isinstance(lam, Tensor):
        return lam.to(x.device).expand(len(x))
    if x.device.type == "mps":  # has no float64
        return torch.full((len(x),), lam, device=x.device)
    return torch.full((len(x),), lam, dtype=torch.float64, device=x.device)


class Denoiser(nn.Module, ABC):
    r"""Maps a noisy state and its log-SNR to a Gaussian over the clean data, p(x0 | x_t).

    Attributes:
        process: The forward process that the states come from.
        shape: Shape of one example, without the batch; None when any will do.
    """

    process: Process
    shape: tuple[int, ...] | None = None

    @property
    def device(self) -> torch.device:
        """Where its tensors are: the CPU if it has none."""
        tensor = next((t for t in (*self.parameters(), *self.buffers())), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @abstractmethod
    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        """E[x0 | x_t], and the variance if it knows one.

        Arguments:
            x: Noisy states (B, *), float32 or float64.
            lam: Log-SNR, a float or a tensor of shape () or (B,).
            **cond: Conditions, each with a first axis of B.
        """

    def predict(self, x: Tensor, lam: Level, form: Form = "x0", **cond: Any) -> Tensor:
        """The prediction (B, *) in any parameterisation: "eps", "x0", "v", "score", "flow", "edm"."""
        alpha, sigma = self.process.scales_over(lam, x)
        return convert(self(x, lam, **cond).mean, x, "x0", form, alpha, sigma)

    def bind(self, **cond: Any) -> Denoiser:
        """This denoiser with its conditions fixed: what samplers receive."""
        return Bound(self, cond) if cond else self


class Bound(Denoiser):
    """A denoiser whose conditions are bound.

    Arguments:
        inner: The conditional denoiser.
        cond: Its conditions, by name.
    """

    def __init__(self, inner: Denoiser, cond: dict[str, Any]):
        super().__init__()
        self.inner, self.cond, self.process, self.shape = inner, dict(cond), inner.process, inner.shape

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        return self.inner(x, lam, **self.cond, **cond)

    def predict(self, x: Tensor, lam: Level, form: Form = "x0", **cond: Any) -> Tensor:
        return self.inner.predict(x, lam, form, **self.cond, **cond)


class Preconditioned(Denoiser):
    r"""A network with its parameterisation: the only place where a network is called.

    The network sees x / sqrt(sigma^2 + sigma_data^2 alpha^2), in its own dtype (autocast, when asked for, opens here, around
    the network alone), and `embed(lam)`; its output is cast to the dtype of the state at once.

    Arguments:
        net: Called as net(x, t, **cond); returns the shape of x, or twice the channels with `learned_range`.
        process: Forward process of the states.
        form: What the network predicts.
        embed: lam (B,) to the network's own time (B,); a `Table` stands for its `index`, without tensors in the loop.
        sigma_data: Standard deviation of the data in the input scaling; None leaves the input alone.
        learned_range: The network emits a second half of channels, r in [-1, 1]; the variance is then (r + 1) / 2 sigma^2,
            of which `Ancestral(range=True)` makes the kernel's.
        autocast: Lower precision for the network, such as torch.bfloat16; None runs it in the dtype of its parameters.
        shape: Shape of one example, if known.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. 7
        | https://arxiv.org/abs/2206.00364
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process = VP,
        form: Form = "v",
        embed: Callable[[Tensor], Tensor] | Table = c_noise,
        *,
        sigma_data: float | None = None,
        learned_range: bool = False,
        autocast: torch.dtype | None = None,
        shape: tuple[int, ...] | None = None,
    ):
        super().__init__()
        form_coefficients(form, 0.6, 0.8)  # refuses unknown names at once
        self.net, self.process, self.form = net, process, form
        # not the table itself: as a submodule it would lose its digits in denoiser.half()
        self.embed: Callable[[Any], Any] = embed.index if isinstance(embed, Table) else embed
        self._takes_floats = isinstance(embed, Table)
        self.sigma_data, self.learned_range, self.autocast = sigma_data, learned_range, autocast
        self.shape = tuple(shape) if shape is not None else None

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        return self.both(x, lam, **cond)[1]

    def both(self, x: Tensor, lam: Level, **cond: Any) -> tuple[Tensor, Gaussian]:
        """The prediction (B, *) in the network's own form, and the Gaussian over x0, from one call of the network."""
        out, r = self._call(x, lam, cond)
        alpha, sigma = self.process.scales_over(lam, x)
        var = POINT if r is None else _share(r) * (sigma * sigma)
        return out, Gaussian(convert(out, x, self.form, "x0", alpha, sigma), var)

    def predict(self, x: Tensor, lam: Level, form: Form = "x0", **cond: Any) -> Tensor:
        """The prediction, straight from the network's own form: exact at alpha = 0 where that form is."""
        out, _ = self._call(x, lam, cond)
        alpha, sigma = self.process.scales_over(lam, x)
        return convert(out, x, self.form, form, alpha, sigma)

    def _call(self, x: Tensor, lam: Level, cond: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The network's output and, with `learned_range`, the second half of its channels, both in the dtype of x."""
        self._check(x, lam)
        x_in = x
        if self.sigma_data is not None:
            alpha, sigma = self.process.scales(lam)
            x_in = x * spread_over((sigma * sigma + self.sigma_data**2 * alpha * alpha) ** -0.5, x)
        net = self.net
        dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), x.dtype)
        t = self._time(lam, x, torch.promote_types(dtype, torch.float32))  # in bfloat16 the index 999 would be 1000
        x_in = x_in if dtype == x.dtype else x_in.to(dtype)
        if self.autocast is None and not torch.is_autocast_enabled(x.device.type):
            out = net(x_in, t, **cond)  # entering a disabled autocast would cost as much as a pass over a small state
        else:
            with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
                out = net(x_in, t, **cond)
        if out.dtype != x.dtype:
            out = out.to(x.dtype)
        if out.shape != ((len(x), 2 * x.shape[1], *x.shape[2:]) if self.learned_range else x.shape):
            raise ValueError(f"`net` returned shape {tuple(out.shape)} for states {tuple(x.shape)}: "
                             "learned_range=True is for networks with twice the channels, and only for them")  # fmt: skip
        if not self.learned_range:
            return out, None
        out, r = out.chunk(2, dim=1)
        return out, r

    def _time(self, lam: Level, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The network's time (B,), in the given dtype unless it is a whole number."""
        if self._takes_floats and isinstance(lam, float):
            return torch.full((len(x),), self.embed(lam), dtype=dtype, device=x.device)
        t = self.embed(levels(lam, x))
        return t.to(dtype) if t.is_floating_point() else t

    def _check(self, x: Tensor, lam: Level) -> None:
        if not x.is_floating_point() or x.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"`x` must be float32 or float64 (got {x.dtype}): keep the state wide, pass autocast= for the network"
            )
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"`x` must have shape (B, {', '.join(map(str, self.shape))}) (got {tuple(x.shape)})")
        if isinstance(lam, Tensor) and lam.ndim and lam.shape != (len(x),):
            raise ValueError(f"`lam` must be a float or have shape () or ({len(x)},) (got {tuple(lam.shape)})")

    def extra_repr(self) -> str:
        form = self.form if isinstance(self.form, str) else "callable"
        return f"process={self.process}, form={form}, sigma_data={self.sigma_data}"


def _share(r: Tensor) -> Tensor:
    """(r + 1) / 2, at least 0. Its slope is 1/2 everywhere: else a range below -1 could never be trained again."""
    f = 0.5 * r + 0.5
    held = f.clamp_min(0.0)
    return f + (held - f).detach() if f.requires_grad else held


def edm(net: nn.Module, process: Process = VE, sigma_data: float = 0.5, **kwargs: Any) -> Preconditioned:
    """EDM preconditioning in any process: the network sees unit variance and ln(sigma) / 4."""
    return Preconditioned(net, process, edm_form(sigma_data), c_noise, sigma_data=sigma_data, **kwargs)


def ve(net: nn.Module, **kwargs: Any) -> Preconditioned:
    """The VE score network of score_sde: D = x + sigma F(x, ln(sigma / 2))."""
    return Preconditioned(net, VE, lambda alpha, sigma: (-1.0, 0.0), lambda lam: -0.5 * lam - math.log(2), **kwargs)


def vp(
    net: nn.Module, process: Process = VE, beta_min: float = 0.1, beta_max: float = 20.0, steps: int = 1000, **kwargs: Any
) -> Preconditioned:
    """The VP noise network of score_sde, D = x - sigma F(x / sqrt(1 + sigma^2), (steps - 1) t(sigma)), in VE or VP."""
    curve = LinearBeta(beta_min, beta_max, start=0.0)
    return Preconditioned(net, process, "eps", lambda lam: (steps - 1) * curve.inverse(lam), sigma_data=1.0, **kwargs)


def iddpm(net: nn.Module, table: Table | None = None, process: Process = VE, **kwargs: Any) -> Preconditioned:
    """The noise network of Improved DDPM: D = x - sigma F(x / sqrt(1 + sigma^2), index of the nearest sigma in its table).

    Arguments:
        net: Receives the index 0 (cleanest) to N - 1.
        table: Its levels; None is the cosine table of 1,000 that EDM rebuilds (C_1 = 0.001, C_2 = 0.008).
        process: VE or VP.
        **kwargs: As in `Preconditioned`.
    """
    entries = cosine_table() if table is None else table

    def embed(lam: Tensor) -> Tensor:
        index = entries.nearest(lam)
        clean = -0.5 * lam < -0.5 * entries.lam[0].to(lam) - math.log(2)  # nearer to no noise at all: EDM's index -1
        return torch.where(clean, torch.full_like(index, -1.0), index)

    return Preconditioned(net, process, "eps", embed, sigma_data=1.0, **kwargs)


def cosine_table(steps: int = 1000, max_beta: float = 0.999, offset: float = 0.008) -> Table:
    """The capped cosine schedule of EDM: sigma_{j-1}^2 = (sigma_j^2 + 1) / max(abar_{j-1} / abar_j, 1 - max_beta) - 1.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 1, iDDPM column
        | https://arxiv.org/abs/2206.00364
    """
    j = torch.arange(steps + 1, dtype=torch.float64)
    alpha_bar = torch.sin(0.5 * math.pi * j / (steps * (offset + 1))).square()
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clamp_min(1.0 - max_beta)
    log_alpha2 = torch.log(ratios.flip(0)).cumsum(0)  # of 1 / (1 + sigma^2), cleanest first
    return Table.from_log_alpha2(log_alpha2)
