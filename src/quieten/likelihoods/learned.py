r"""Schedules that are learned with the denoiser: the polynomial and the monotone network of VDM, with ends that stay put."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..schedule import Linear, Schedule

__all__ = ["Monotone", "Polynomial", "Shaped"]


class Shaped(Schedule):
    r"""lam = lam_max + (lam_min - lam_max) f(u), where the shape f rises from f(0) = 0 to f(1) = 1.

    The variational bound in continuous time depends on the schedule only through its ends. The shape decides how much the
    bound's estimate varies: see `VariationalBound(shape_by="variance")`.

    Arguments:
        lam_max: Log-SNR at u = 0.
        lam_min: Log-SNR at u = 1.
        learned: Whether the ends are parameters.
    """

    def __init__(self, lam_max: float = 13.3, lam_min: float = -5.0, learned: bool = False):
        super().__init__()
        self.line = Linear(lam_max, lam_min, learned)

    def shape(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(f, df/du) at u, elementwise."""
        raise NotImplementedError

    def along(self, f: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """(lam, -d lam / du) where the shape has the value f and the slope df/du."""
        top, bottom = self.line.ends.to(f)
        return top + (bottom - top) * f, (top - bottom) * slope

    def forward(self, u: Tensor) -> Tensor:
        return self.line(self.shape(u)[0])

    def rate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.along(*self.shape(u))

    def inverse(self, lam: Tensor) -> Tensor:
        """By bisection, to the precision of float64."""
        wanted = self.line.inverse(lam).detach()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        with torch.no_grad():
            for _ in range(54 if wanted.dtype == torch.float64 else 25):
                middle = 0.5 * (low + high)
                below = self.shape(middle)[0] < wanted
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)


class Polynomial(Shaped):
    r"""gamma = -lam = (gamma_1 / 2) u^n + (gamma_1 / 2 - gamma_0) u + gamma_0: more time at high SNR.

    References:
        | DiffEnc (Nielsen et al., 2024), the released noise schedules: n = 10
        | https://arxiv.org/abs/2310.19789
    """

    def __init__(self, lam_max: float = 13.3, lam_min: float = -5.0, degree: int = 10):
        super().__init__(lam_max, lam_min)
        if degree < 1 or lam_min >= 0 or lam_max <= 0.5 * lam_min:
            raise ValueError(f"`degree` must be at least 1 and `lam_min` below 0, so that the polynomial falls throughout "
                             f"(got {degree}, lam_min={lam_min}, lam_max={lam_max})")  # fmt: skip
        self.degree, self.share = degree, -0.5 * lam_min / (lam_max - lam_min)

    def shape(self, u: Tensor) -> tuple[Tensor, Tensor]:
        power = u ** (self.degree - 1)
        return self.share * power * u + (1.0 - self.share) * u, self.degree * self.share * power + (1.0 - self.share)


class Monotone(Shaped):
    r"""The monotone network of VDM: its weights enter by their absolute values.

    .. math:: g(u) = |w_1| u + b_1 + \tfrac1n \sum_j |w_{3j}| \left(2\,\sigma(|w_{2j}| (2u - 1) + b_{2j}) - 1\right)

    Pinned, the shape is (g(u) - g(0)) / (g(1) - g(0)) and the ends are those given, whatever the inner weights do; not
    pinned, -lam is g itself, as released, and the ends move with the weights.

    Arguments:
        lam_max: Log-SNR at u = 0 at the start.
        lam_min: Log-SNR at u = 1 at the start.
        hidden: Number of sigmoids, n.
        pinned: Whether the ends are separate.
        learned: Whether the pinned ends are parameters.

    References:
        | Variational Diffusion Models (Kingma et al., 2021), appendix H and I.2
        | https://arxiv.org/abs/2107.00630
    """

    def __init__(
        self, lam_max: float = 13.3, lam_min: float = -5.0, hidden: int = 1024, pinned: bool = True, learned: bool = True
    ):
        super().__init__(lam_max, lam_min, learned=learned and pinned)
        if hidden < 1:
            raise ValueError(f"`hidden` must be at least 1 (got {hidden})")
        self.pinned = pinned
        self.w1, self.b1 = nn.Parameter(torch.tensor([lam_max - lam_min])), nn.Parameter(torch.tensor([-lam_max]))
        self.w2, self.b2, self.w3 = (nn.Parameter(0.01 * torch.randn(hidden)) for _ in range(3))
        if pinned:
            self.b1.requires_grad_(False)  # cancels

    def gamma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(g, dg/du) at u, elementwise."""
        w1, b1, w2, b2, w3 = (p.to(u) for p in (self.w1, self.b1, self.w2, self.b2, self.w3))
        bent = torch.tanh(0.5 * (w2.abs() * (2.0 * u - 1.0)[..., None] + b2))  # = 2 sigmoid - 1
        g = w1.abs() * u + b1 + (w3.abs() * bent).mean(-1)
        return g, w1.abs() + (w3.abs() * w2.abs() * (1.0 - bent.square())).mean(-1)

    def shape(self, u: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.gamma(torch.tensor([0.0, 1.0], dtype=u.dtype, device=u.device))[0]
        g, slope = self.gamma(u)
        return (g - start) / (end - start), slope / (end - start)

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u) if self.pinned else -self.gamma(u)[0]

    def rate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        if self.pinned:
            return super().rate(u)
        g, slope = self.gamma(u)
        return -g, slope

    def inverse(self, lam: Tensor) -> Tensor:
        if self.pinned:
            return super().inverse(lam)
        start, end = self.gamma(torch.tensor([0.0, 1.0], dtype=lam.dtype, device=lam.device))[0]
        return super().inverse(self.line(((-lam - start) / (end - start)).detach()))
