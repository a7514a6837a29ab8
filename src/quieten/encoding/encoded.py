r"""The process of a model that was trained with an encoder (DiffEnc): its kernel, its ODE, and what its denoiser returns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, Preconditioned, convert
from ..gaussian import POINT, Gaussian, spread_over
from ..process import VP, Level, Process
from ..transition import Step, Transition

__all__ = ["COUNTERTERMS", "Encoded", "EncodedFlow", "Moving", "Separated", "angular_slope", "check_flow"]

COUNTERTERMS = ("sigma2", "none", "split")
"""What stands for d x_t / d lam in the reverse process: sigma^2 x_hat (as released), nothing, or a prediction of its own."""


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
            return "sample it with Ancestral(), of any eta, or EncodedFlow(): 'ancestral' and 'encoded-flow' by name"
        return "sample it with Ancestral(), 'ancestral' by name, or train it with the counterterm 'split' for EncodedFlow()"

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
        process = check_flow(denoiser.process, "EncodedFlow")
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


def check_flow(process: Process, what: str) -> Encoded:
    """The process, whose ODE is known; raises ValueError, for `what` needs it, where it is not."""
    if not isinstance(process, Encoded) or not process.knows_score:
        raise ValueError(f"{what} needs a denoiser with the counterterm 'split', or an encoder that was not trained "
                         f"(got the process {process}): sample it with Ancestral(), measure its bound")  # fmt: skip
    return process


def angular_slope(denoiser: Denoiser, z: Tensor, lam: Level) -> Tensor:
    r"""dy/dphi of the ODE of `EncodedFlow`, (B, *), finite from pure noise on.

    With y = z / sqrt(alpha^2 + sigma^2) and phi = atan(sigma / alpha) it is
    :math:`\cos\phi\, \hat\epsilon - \sin\phi\, \hat x - (2 / \sin\phi)\, E[\dot x_t \mid z]`.

    Raises:
        ValueError: As `EncodedFlow`.
    """
    process = check_flow(denoiser.process, "an ODE")
    x0, eps, rate = _flow(denoiser, process, z, lam)
    alpha, sigma = process.scales_over(lam, z)
    norm = (alpha * alpha + sigma * sigma) ** 0.5
    slope: Tensor = (alpha * eps - sigma * x0.mean) / norm - (2.0 * norm / sigma) * rate
    return slope


def _flow(denoiser: Denoiser, process: Encoded, z: Tensor, lam: Level) -> tuple[Gaussian, Tensor, Tensor]:
    """The denoiser's answer, eps_hat and the rate of the encoded data."""
    p = denoiser(z, lam)
    alpha, sigma = process.scales_over(lam, z)
    return p, (z - alpha * p.mean) / sigma, process.rate(p, lam)
