r"""Guidance: gradients of a log-likelihood that steer any denoiser, and the denoiser that follows them."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Bound, Denoiser
from .gaussian import Gaussian, spread_over
from .process import Level, Process
from .wrap import paired

__all__ = ["ClassifierFree", "Gradient", "Guidance", "Guided", "Likelihood", "Scale"]

Scale = float | Callable[[Level], Any]
"""Weight of a guidance: a number, or a function of lam, for guidance in an interval of levels."""


class Guidance(nn.Module, ABC):
    r"""What steers a sampler: the gradient of w log p(y | x_t) in x_t.

    Everything is in the units of x_t: :math:`g = w \nabla_{x_t} \log p(y | x_t)`, what other libraries' `cond_fn` returns. It
    changes the estimate of x0 by sigma^2 / alpha g and the noise's by -sigma g. Samples never interact.

    Arguments:
        scale: The weight w, any finite number (0 asks nothing of anything; a tensor of shape () will do), or a function of
            lam.
        nonfinite: What a gradient that is not finite does: "raise"; "zero" replaces that sample's whole gradient by 0, and
            "warn" says so too.

    Raises:
        ValueError: If `scale` is not finite, or `nonfinite` is another word.

    References:
        | Diffusion Models Beat GANs on Image Synthesis (Dhariwal, Nichol, 2021), algorithm 2
        | https://arxiv.org/abs/2105.05233
    """

    def __init__(self, scale: Scale = 1.0, nonfinite: str = "raise"):
        super().__init__()
        if nonfinite not in ("raise", "zero", "warn"):
            raise ValueError(f"`nonfinite` must be 'raise', 'zero' or 'warn' (got {nonfinite!r})")
        self.scale: Scale = scale if callable(scale) else _finite(scale)
        self.nonfinite = nonfinite

    @abstractmethod
    def slope(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian | None, Tensor]:
        """The gradient at weight 1, as it comes, and the denoiser's Gaussian where it was computed on the way."""

    def gradient(self, denoiser: Denoiser, x: Tensor, lam: Level) -> Tensor:
        """w grad_x log p(y | x_t): (B, *) in the dtype of x, without a graph.

        Arguments:
            denoiser: The unguided denoiser, conditions bound.
            x: Noisy states (B, *), float32 or float64; never modified.
            lam: Their log-SNR, a float or a tensor of shape () or (B,).

        Raises:
            ValueError: If what was given to compute it returns another shape or dtype, or (unless `nonfinite` says otherwise)
                NaN or infinity.
        """
        return self.checked(self.unchecked(denoiser, x, lam), x, lam)

    def unchecked(self, denoiser: Denoiser, x: Tensor, lam: Level) -> Tensor:
        """`gradient` before anyone looked whether it is finite, for who looks at many at once: see `checked`."""
        w = self.weight(lam)
        if isinstance(w, float) and w == 0.0:
            return torch.zeros_like(x)
        return self._times(self.slope(denoiser, x, lam)[1], w, x)

    def both(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian, Tensor]:
        """The unguided denoiser's Gaussian and `gradient`, from one pass where one is enough."""
        w = self.weight(lam)
        if isinstance(w, float) and w == 0.0:
            return denoiser(x, lam), torch.zeros_like(x)
        p, g = self.slope(denoiser, x, lam)
        return denoiser(x, lam) if p is None else p, self._weighted(g, w, x, lam)

    def shift(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian, Tensor]:
        """The unguided denoiser's Gaussian and sigma^2 / alpha times the gradient: the change of E[x0 | x_t].

        In pure noise (lam = -inf in a process with alpha = 0) a gradient in x_t tells nothing: the change is 0 there.

        Raises:
            ValueError: As `gradient`, and at lam = -inf of a process whose noise is infinite there (VE).
        """
        alpha, sigma = denoiser.process.scales(lam)
        if isinstance(sigma, float) and sigma == math.inf:
            raise ValueError(f"`lam`={lam} has no states in {denoiser.process}, whose noise is infinite there: start from a "
                             "finite level")  # fmt: skip
        p, g = self.both(denoiser, x, lam)
        if isinstance(alpha, float) and alpha == 0.0:
            return p, torch.zeros_like(x)
        return p, g * spread_over(sigma * sigma / alpha, g)

    def weight(self, lam: Level) -> Any:
        """The weight w at a level: a float, or a tensor () or (B,) from a `scale` that returns one."""
        if not callable(self.scale):
            return float(self.scale)
        w = self.scale(lam)
        return w if isinstance(w, Tensor) else _finite(w)

    def checked(self, g: Tensor, x: Tensor, lam: Level) -> Tensor:
        """A gradient after a look at its numbers, which waits for the device; what `nonfinite` makes of it.

        Raises:
            ValueError: If it is not finite, unless `nonfinite` says otherwise.
        """
        if self.nonfinite == "raise" and bool(g.sum().isfinite()):
            return g  # one look at memory; a sum that is not finite may still be of finite numbers
        good = g.isfinite().flatten(1).all(1) if g.ndim > 1 else g.isfinite()
        kept = torch.where(good.reshape(-1, *[1] * (g.ndim - 1)), g, 0.0) if self.nonfinite != "raise" else g
        if self.nonfinite == "zero":
            return kept
        if not bool(good.all()):
            what = (
                f"the gradient of {self._name()} is not finite for {int((~good).sum())} of {len(x)} samples at "
                f"lam = {_show(lam)} with scale {_show(self.weight(lam))}"
            )
            if self.nonfinite == "raise":
                raise ValueError(f"{what}: lower the scale, take more steps, or pass nonfinite='zero'")
            warnings.warn(f"{what}: set to 0", stacklevel=3)
        return kept

    def _times(self, g: Any, w: Any, x: Tensor) -> Tensor:
        _check_like(g, x, f"the gradient of {self._name()}")
        weighted: Tensor = g if isinstance(w, float) and w == 1.0 else g * spread_over(w, g)
        return weighted

    def _weighted(self, g: Any, w: Any, x: Tensor, lam: Level) -> Tensor:
        return self.checked(self._times(g, w, x), x, lam)

    def _name(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class Likelihood(Guidance):
    r"""Guidance by any log-likelihood, differentiated by autograd.

    The gradient is taken in float32 or better on a detached copy of the state, whatever mode the sampler runs in (`no_grad`,
    `inference_mode`, autocast).

    Arguments:
        log_prob: (x, lam) -> (B,) in nats, up to a constant; lam as the sampler has it. Examples must not interact.
        scale: As in `Guidance`.
        on: "x_t" gives it the noisy state; "x0" gives it the denoiser's estimate E[x0 | x_t], and the gradient goes back
            through the denoiser, whose Gaussian comes from the same pass.
        nonfinite: As in `Guidance`.

    Example:
        >>> from quieten.oracle import GaussianData
        >>> nearer = Likelihood(lambda x, lam: -0.5 * (x - 1.0).square().sum(1), scale=2.0)
        >>> nearer.gradient(GaussianData(torch.zeros(1), 1.0), torch.zeros(1, 1), 0.0)
        tensor([[2.]])
    """

    def __init__(
        self, log_prob: Callable[[Tensor, Level], Tensor], scale: Scale = 1.0, on: str = "x_t", nonfinite: str = "raise"
    ):
        super().__init__(scale, nonfinite)
        if not callable(log_prob):
            raise ValueError(f"`log_prob` must be a function (x, lam) -> (B,) (got {type(log_prob).__name__})")
        if isinstance(log_prob, nn.Module):
            check_wide(log_prob)
        if on not in ("x_t", "x0"):
            raise ValueError(f"`on` must be 'x_t', the noisy state, or 'x0', the denoiser's estimate (got {on!r})")
        self.log_prob, self.on = log_prob, on

    def slope(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian | None, Tensor]:
        with differentiable(x) as leaf:
            p = denoiser(leaf, lam) if self.on == "x0" else None
            with torch.autocast(x.device.type, enabled=False):
                value = self.value(leaf if p is None else p.mean, lam, denoiser.process)
            g = _gradient(value, leaf, self._name())
        return (None if p is None else detached(p)), g

    def value(self, x: Tensor, lam: Level, process: Process) -> Tensor:
        """log p(y | x) (B,) of what `on` says, for states of the given process."""
        return self.log_prob(x, lam)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, on={self.on}"


class Gradient(Guidance):
    """Guidance by a gradient that is already there: another library's `cond_fn`, a score network.

    Arguments:
        fn: (x, lam) -> (B, *), the gradient of log p(y | x_t) in x_t, in the dtype of x. It is called with gradients enabled
            on a detached copy of the state. One that takes the index of a table is `lambda x, lam: fn(x, table.index(lam))`.
        scale: As in `Guidance`; 1 for a `cond_fn` that is weighted already.
        nonfinite: As in `Guidance`.
    """

    def __init__(self, fn: Callable[[Tensor, Level], Tensor], scale: Scale = 1.0, nonfinite: str = "raise"):
        super().__init__(scale, nonfinite)
        if not callable(fn):
            raise ValueError(f"`fn` must be a function (x, lam) -> (B, *) (got {type(fn).__name__})")
        self.fn = fn

    def slope(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian | None, Tensor]:
        with differentiable(x) as leaf:
            g = self.fn(leaf.detach(), lam)
        _check_like(g, x, "what `fn` returns")
        return None, g.detach()

    def both(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian, Tensor]:
        """As in `Guidance`; the denoiser is asked first, as in released code."""
        return denoiser(x, lam), self.gradient(denoiser, x, lam)


class ClassifierFree(Guidance):
    r"""Guidance without a classifier, or by a weaker model, as a gradient: (w - 1) alpha / sigma^2 (D - D_weak).

    The unguided denoiser is the conditional one, D; both predictions come from one pass over twice the batch when the weak one
    is the same network under other conditions. `Guided` with this is `wrap.Extrapolated`; a split keeps a history for each.

    Arguments:
        scale: w, 1 for none; a float, or a function of lam.
        null: The conditions that replace the bound ones, by name; a scalar fills the bound condition's shape.
        weak: The weaker denoiser, its conditions bound, in place of `null` (autoguidance).
        nonfinite: As in `Guidance`.

    Raises:
        ValueError: Unless exactly one of `null` and `weak` is given.

    References:
        | Classifier-Free Diffusion Guidance (Ho, Salimans, 2022), eq. 6, with scale = 1 + w
        | https://arxiv.org/abs/2207.12598
    """

    def __init__(
        self,
        scale: Scale,
        *,
        null: Mapping[str, Any] | None = None,
        weak: Denoiser | None = None,
        nonfinite: str = "raise",
    ):
        super().__init__(scale, nonfinite)
        if (null is None) == (weak is None):
            raise ValueError("give `null` (classifier-free guidance) or `weak` (autoguidance), one of them")
        self.null, self.weak = dict(null or {}), weak

    def weight(self, lam: Level) -> Any:
        return super().weight(lam) - 1.0

    def slope(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian | None, Tensor]:
        share = per_noise(denoiser.process, lam)
        p, difference = self._difference(denoiser, x, lam)
        return p, difference * spread_over(share, x)

    def shift(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian, Tensor]:
        """As in `Guidance`, and known in pure noise too."""
        w = self.weight(lam)
        if isinstance(w, float) and w == 0.0:
            return denoiser(x, lam), torch.zeros_like(x)
        p, difference = self._difference(denoiser, x, lam)
        return p, self._weighted(difference, w, x, lam)

    def _difference(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian, Tensor]:
        if self.weak is not None:
            p = denoiser(x, lam)
            return p, p.mean - self.weak(x, lam).mean
        cond: dict[str, Any] = {}
        while isinstance(denoiser, Bound):
            cond, denoiser = {**cond, **denoiser.cond}, denoiser.inner
        p, weak = paired(denoiser, x, lam, cond, self.null)
        return p, p.mean - weak


class Guided(Denoiser):
    """Joint guidance: E[x0 | x_t] + sigma^2 / alpha times the gradient, with the variance of the unguided denoiser.

    Every sampler then integrates denoiser and guidance as one function. `split` takes them apart, which stays stable where
    fast solvers at large scales do not.

    Arguments:
        inner: The unguided denoiser.
        guidance: What to steer it by.

    Raises:
        ValueError: For a denoiser whose mean is not E[x0 | x_t]: one that was trained with an encoder.

    References:
        | Diffusion Models Beat GANs on Image Synthesis (Dhariwal, Nichol, 2021), algorithm 2
        | https://arxiv.org/abs/2105.05233
    """

    def __init__(self, inner: Denoiser, guidance: Guidance):
        super().__init__()
        inner.process.check_mean()
        self.inner, self.guidance, self.process, self.shape = inner, guidance, inner.process, inner.shape

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        p, shift = self.guidance.shift(self.inner.bind(**cond), x, lam)
        return Gaussian(p.mean + shift, p.var, p.basis)


# ---- what they share


@contextmanager
def differentiable(x: Tensor) -> Iterator[Tensor]:
    """A copy of x that collects a gradient, in a scope where one is recorded whatever the caller's mode."""
    with torch.inference_mode(False), torch.enable_grad():
        # a tensor made in inference mode cannot take part in autograd, its clone made outside can
        yield (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def per_noise(process: Process, lam: Level) -> Any:
    """alpha / sigma^2, which makes a gradient in x_t of a change of E[x0 | x_t].

    Raises:
        ValueError: At the data themselves (lam = +inf), where no noise is left to share in.
    """
    alpha, sigma = process.scales(lam)
    if isinstance(sigma, float) and sigma == 0.0:
        raise ValueError(f"`lam`={lam} is the data themselves, where this guidance has no gradient in x_t: ask at a finite "
                         "level, or for its `shift`")  # fmt: skip
    return alpha / (sigma * sigma)


def detached(p: Gaussian) -> Gaussian:
    """The Gaussian without its graph."""
    return Gaussian(p.mean.detach(), p.var.detach() if p.var.requires_grad else p.var, p.basis)


def check_wide(module: nn.Module) -> None:
    """Raises ValueError if a module computes in half precision, where gradients of log-likelihoods underflow."""
    dtype = next((p.dtype for p in module.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if dtype is not None:
        raise ValueError(f"{type(module).__name__} has {dtype} weights, whose gradients underflow: pass it as .float()")


def _gradient(value: Any, leaf: Tensor, name: str) -> Tensor:
    """The gradient of each example's value in that example, from one backward pass: examples do not interact."""
    if not isinstance(value, Tensor) or value.shape != leaf.shape[:1] or not value.is_floating_point():
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the log-likelihood of {name} must be real of shape ({len(leaf)},), one number a sample (got {got})")
    if value.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"the log-likelihood of {name} is {value.dtype}, whose gradients underflow: compute it in float32")
    g = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
    if g is None:
        raise ValueError(
            f"the log-likelihood of {name} does not depend on x through autograd: leave out detach() and no_grad()"
        )
    # a value that is NaN may have a finite gradient, as the untaken branch of torch.where has
    return g.masked_fill(value.detach().isnan().reshape(-1, *[1] * (g.ndim - 1)), math.nan)


def _check_like(g: Any, x: Tensor, what: str) -> None:
    if not isinstance(g, Tensor) or g.shape != x.shape or g.dtype != x.dtype:
        got = f"{g.dtype} {tuple(g.shape)}" if isinstance(g, Tensor) else type(g).__name__
        raise ValueError(f"{what} must be {x.dtype} {tuple(x.shape)}, like the state (got {got}): return one like x")


def _finite(scale: Any) -> float:
    """A weight as a float: a number, or anything of shape () that is real."""
    if getattr(scale, "ndim", None) == 0:
        given = torch.as_tensor(scale)
        real = not given.is_complex() and given.dtype != torch.bool
    else:
        real = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not real or not math.isfinite(value := float(scale)):
        raise ValueError(f"`scale` must be a finite number, or a function of lam (got {scale!r})")
    return value


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value.detach().flatten()[:3].tolist())
