r"""Transitions: pure functions from a denoiser and a state to the distribution of the next state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from .denoiser import Denoiser
from .gaussian import POINT, Gaussian, spread_over
from .process import Level, check_eta
from .wrap import Clip, clip

__all__ = ["Ancestral", "Churn", "Hushed", "Langevin", "Step", "Transition"]


@dataclass(frozen=True)
class Step:
    """What a transition returns.

    Attributes:
        p: The kernel p(x_s | x_t): a Gaussian, or anything with `mean` and `sample(noise)`.
        x0: The estimate of x0 given x_t that it used; None where no network was asked.
        memory: History for the next step of a multistep method, None to forget.
        then: A map applied to the drawn state, such as an imputation.
    """

    p: Gaussian | Any
    x0: Gaussian | None = None
    memory: Any = None
    then: Callable[[Tensor], Tensor] | None = None


class Transition(nn.Module, ABC):
    """From x_t to the distribution of x_s. Keeps no state: what a multistep method remembers travels in `memory`.

    Attributes:
        revisits: Whether it gives a meaning to levels that repeat or fall within a rising grid.
        eta: Share of the ancestral noise that its steps to higher log-SNR have, which says what their means make of a change
            of x0: 0 where they go by the ODE, 1 where by the whole reverse process, whatever variance is added to that. None,
            for deterministic steps, or where nobody knows. Wrappers have that of what they wrap. `Split` goes by it.
        own_noise: Whether the variance of its kernels is its own, as that of a policy is, and not that of `eta`.
    """

    revisits: bool = False
    eta: float | None = None
    own_noise: bool = False

    @abstractmethod
    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Level, lam_s: Level, memory: Any = None) -> Step:
        """One step.

        Arguments:
            denoiser: Conditions already bound.
            x_t: States (B, *).
            lam_t: Log-SNR of x_t.
            lam_s: Log-SNR of the next state. The transition decides what a step to lower, or to equal, log-SNR means.
            memory: `Step.memory` of the step before, None at the start.
        """


class Ancestral(Transition):
    r"""The reverse kernel itself: DDPM, DDIM and everything between, by two numbers.

    DDIM is `Ancestral(0, spread=False)`; DDPM with small variance is `Ancestral(1, spread=False)`; with `spread`, the
    variance of x0 that the denoiser reports widens the kernel (DDPM with large variance, learned covariances). A step to
    lower log-SNR adds noise by the forward process; a step between equal levels does nothing.

    Arguments:
        eta: Share of the ancestral noise, 0 to 1.
        spread: Whether the variance of x0 counts.
        clip: Bound on the estimate of x0: a number c for [-c, c], or a map such as `dynamic()`. Variances of pixels are held
            below c^2, the largest that data in [-c, c] can have; in another basis their source bounds them.
        keep_eps: Read the noise from the estimate before it was clipped: DDIM as released does, DDPM does not.
        range: The denoiser reports f sigma_t^2 with f in [0, 1] (a `learned_range` network), and the kernel's variance is
            the geometric mean (sigma_{t|s}^2)^f w^{1 - f} of the large and the small one. A number stands for w in the step
            to the data, where w is 0: the official code takes the small variance of the step before.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 7
        | https://arxiv.org/abs/2006.11239
        | Improved Denoising Diffusion Probabilistic Models (Nichol, Dhariwal, 2021), eq. 15, for `range`
        | https://arxiv.org/abs/2102.09672
    """

    eta: float

    def __init__(
        self,
        eta: float = 1.0,
        spread: bool = True,
        clip: Clip | None = None,
        keep_eps: bool = False,
        range: bool | float = False,
    ):
        super().__init__()
        check_eta(eta)
        if isinstance(clip, int | float) and not clip > 0:
            raise ValueError(f"`clip` must be positive (got {clip})")
        self.eta, self.spread, self.clip, self.keep_eps, self.range = eta, spread, clip, keep_eps, range

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Level, lam_s: Level, memory: Any = None) -> Step:
        if isinstance(lam_t, float) and isinstance(lam_s, float) and lam_s <= lam_t:
            return Step(Gaussian(x_t) if lam_s == lam_t else denoiser.process.noising(x_t, lam_t, lam_s))
        x0 = denoiser(x_t, lam_t)
        mean, var, keep = x0.mean, x0.var if self.spread and not self.range else POINT, None
        if self.clip is not None:
            mean = clip(x0.mean, self.clip)
            keep = x0.mean if self.keep_eps else None
            if var is not POINT and x0.basis is None and isinstance(self.clip, int | float):
                var = var.clamp_max(self.clip**2)
        same = mean is x0.mean and var is x0.var  # then itself: it may know more
        given = x0 if same else Gaussian(mean, var, None if var is POINT else x0.basis)
        p = denoiser.process.bridge(given, x_t, lam_t, lam_s, self.eta, keep)
        if self.range:
            p = Gaussian(p.mean, self._learned_range(denoiser, x0.var, x_t, lam_t, lam_s))
        return Step(p, x0 if mean is x0.mean else Gaussian(mean, x0.var, x0.basis))

    def _learned_range(self, denoiser: Denoiser, v: Tensor, x_t: Tensor, lam_t: Level, lam_s: Level) -> Tensor:
        _, _, w, _ = denoiser.process.coefficients(lam_t, lam_s, self.eta)
        if not isinstance(self.range, bool) and lam_s == math.inf:
            w = float(self.range)
        big = denoiser.process.noising(x_t, lam_s, lam_t).var.to(x_t)
        _, sigma_t = denoiser.process.scales(lam_t)
        f = v / spread_over(sigma_t * sigma_t, x_t)
        small = spread_over(w, x_t)
        return big**f * small ** (1.0 - f)

    def extra_repr(self) -> str:
        return f"eta={self.eta}, spread={self.spread}, clip={self.clip}, keep_eps={self.keep_eps}, range={self.range}"


class Hushed(Transition):
    r"""Bounds the noise of the last steps: their standard deviation is at most (grey / 127.5) sqrt(pi / 2).

    Then the expected size of what is added to a pixel of [-1, 1] is at most `grey` levels of 255. What a learned variance adds
    there is seen at once, and nothing after it takes it away again.

    Arguments:
        inner: What takes the steps.
        grid: The grid it is used on.
        grey: Grey levels; official evaluations have 1 or 2.
        last: How many steps before the one that ends at the data; 0 bounds nothing.

    References:
        | Analytic-DPM (Bao et al., 2022), appendix F.2; `clip_sigma_idx` = last in the code of Ou et al. (2025)
        | https://arxiv.org/abs/2201.06503
    """

    def __init__(self, inner: Transition, grid: Tensor, grey: float = 2.0, last: int = 1):
        super().__init__()
        if not grey > 0 or not 0 <= last < len(grid):
            raise ValueError(f"`grey` must be positive and `last` within the {len(grid) - 1} steps (got {grey}, {last})")
        self.inner, self.revisits, self.eta = inner, inner.revisits, inner.eta
        self.var, self.level = (grey / 127.5) ** 2 * math.pi / 2, float(grid[-1 - last]) if last else math.inf
        self.grey, self.last = grey, last

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Level, lam_s: Level, memory: Any = None) -> Step:
        step = self.inner(denoiser, x_t, lam_t, lam_s, memory)
        if not self.last or lam_s < self.level or not isinstance(step.p, Gaussian) or step.p.is_point:
            return step
        return replace(step, p=Gaussian(step.p.mean, step.p.var.clamp_max(self.var), step.p.basis))

    def extra_repr(self) -> str:
        return f"grey={self.grey}, last={self.last}"


class Churn(Transition):
    """Noises upward where the grid asks for it (see `churned`), forgets the history, then goes on with another transition.

    Arguments:
        inner: What takes the downward steps, such as `Heun()`.
        s_noise: Factor on the standard deviation of the added noise.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), algorithm 2
        | https://arxiv.org/abs/2206.00364
    """

    revisits = True

    def __init__(self, inner: Transition, s_noise: float = 1.0):
        super().__init__()
        if s_noise < 0:
            raise ValueError(f"`s_noise` must not be negative (got {s_noise})")
        self.inner, self.s_noise, self.eta = inner, s_noise, inner.eta

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Level, lam_s: Level, memory: Any = None) -> Step:
        if lam_s >= lam_t:
            return self.inner(denoiser, x_t, lam_t, lam_s, memory)
        p = denoiser.process.noising(x_t, lam_t, lam_s)
        return Step(Gaussian(p.mean, p.var * self.s_noise**2 if self.s_noise else POINT))


class Langevin(Transition):
    r"""Corrects by Langevin dynamics where the grid repeats a level (see `corrected`); another transition takes the steps.

    x + d s(x) + sqrt(2 d) z with d = 2 (snr sqrt(D) / ||s(x)||)^2 for each example on its own, so that the result does
    not depend on the batch; sqrt(D) is the norm of z to within 1 / (4 D). The official code takes the means of ||z|| and
    ||s|| over the batch instead, with the z that it adds; so does `compat="official"`.

    Arguments:
        inner: What takes the other steps; `Ancestral()` makes the predictor-corrector sampler.
        snr: Signal-to-noise ratio of a correction: 0.16 for CIFAR-10 in the paper.
        compat: "official" shares one step size in the batch; None, the default, gives each example its own.

    References:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), algorithm 4
        | https://arxiv.org/abs/2011.13456
    """

    revisits = True

    def __init__(self, inner: Transition | None = None, snr: float = 0.16, compat: Literal["official"] | None = None):
        super().__init__()
        if not snr > 0:
            raise ValueError(f"`snr` must be positive (got {snr})")
        if compat not in (None, "official"):
            raise ValueError(f"`compat` must be 'official' or None (got {compat!r})")
        self.inner, self.snr, self.compat = Ancestral() if inner is None else inner, snr, compat
        self.eta = self.inner.eta

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Level, lam_s: Level, memory: Any = None) -> Step:
        if lam_s != lam_t:
            return self.inner(denoiser, x_t, lam_t, lam_s, memory)
        if not getattr(denoiser.process, "knows_score", True):
            denoiser.process.check_mean()
        x0 = denoiser(x_t, lam_t)
        alpha, sigma = denoiser.process.scales_over(lam_t, x_t)
        score = (alpha * x0.mean - x_t) / (sigma * sigma)
        if self.compat == "official":
            return Step(_SharedStep(x_t, score, self.snr), x0)
        per_dim = score.square().flatten(1).mean(1)  # ||s||^2 / D, of shape (B,)
        size = spread_over(2.0 * self.snr**2 / per_dim.clamp_min(_TINY), x_t)
        return Step(Gaussian(x_t + size * score, 2.0 * size), x0)

    def extra_repr(self) -> str:
        return f"snr={self.snr}, compat={self.compat}"


@dataclass(frozen=True)
class _SharedStep:
    """The kernel of a Langevin step as released. Its step size depends on the noise of the whole batch: it is no Gaussian."""

    x: Tensor
    score: Tensor
    snr: float

    @property
    def mean(self) -> Tensor:
        """Of the kernel, to within 1 / (4 D)."""
        return self.x + self._size(math.sqrt(self.x[:1].numel())) * self.score

    def sample(self, noise: Tensor) -> Tensor:
        size = self._size(noise.flatten(1).norm(dim=1).mean())
        return self.x + size * self.score + (2.0 * size) ** 0.5 * noise

    def _size(self, length: Any) -> Tensor:
        return 2.0 * (self.snr * length / self.score.flatten(1).norm(dim=1).mean().clamp_min(_TINY)) ** 2


_TINY = math.ldexp(1.0, -100)  # a score of exactly 0 gives a finite, useless step instead of NaN
