r"""Training a head to predict the posterior variance of a frozen denoiser."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..covariance import HessianDiagonal, Learned, Residual, SecondMoment, noise_of
from ..denoiser import Denoiser
from ..gaussian import Gaussian, spread_over
from ..noise import Draws
from ..objective import Batch, Noised, Objective, dropped, level_dtype, noised_by
from ..schedule import Schedule, Table
from .heads import Seen
from .jacobian import check_derivative, difference_step, product, relative

__all__ = ["MODES", "CovarianceMatching"]

Look = Callable[[Tensor], tuple[Gaussian, Any]]

MODES = ("ocm", "sn", "npr", "mixed", "moment")
"""What a head regresses on. With random signs v and J the Jacobian of E[x0 | x_t]: "ocm" alpha v * (J^T v), "sn" eps^2, "npr"
(eps - eps_hat)^2, "mixed" the average of ocm and npr with the least variance at each level, "moment" eps^2 - eps_hat^2."""

_KINDS: dict[str, tuple[type[Learned], ...]] = {
    "ocm": (HessianDiagonal,),
    "sn": (SecondMoment,),
    "npr": (Residual,),
    "mixed": (HessianDiagonal, Residual),
    "moment": (HessianDiagonal, Residual),
}
_INSTEAD = {"jvp": "vjp", "auto": "fd"}
"""What is used for a derivative that the network turns out not to have."""


class CovarianceMatching(Objective):
    r"""Regression of a head on targets whose mean is the posterior variance, the denoiser itself frozen.

    The loss of an example is the sum over its coordinates of (prediction - target)^2, in the unit of rho ("linear" heads, as
    official code) or relative to rho of N(0, 1) data (link "unit"). A step takes one pass of the network with features and
    mean, one backward pass or one more forward pass for "ocm" and "mixed", and what the head itself costs; no graph through
    the network outlives the product.

    Arguments:
        source: What is trained.
        schedule: Levels are schedule(u) for u uniform in (0, 1), of low discrepancy; a `Table` is visited at its entries.
        mode: One of `MODES`; None is that of the source: ocm for `HessianDiagonal`, sn, npr.
        derivative: How the product with the Jacobian is computed, see `jacobian.DERIVATIVES`. A network that turns out to
            have no forward mode is differentiated backward ("jvp"), one without any derivatives by differences ("auto").
        probes: Sign vectors averaged in a target; the minimiser is the same for any number.
        step: Of finite differences; None chooses it, see `jacobian.difference_step`.
        balance: Weigh each level by the inverse of its running mean squared error, so that levels with noisy targets do not
            drown the others; the loss is then a mean over coordinates, and about 1 when there is nothing left to learn.
        drop: Conditions to drop at random, as in `Denoising`.

    Raises:
        ValueError: For an unknown mode or derivative, a mode that does not fit the source, or fewer probes than one.

    References:
        | Improving Probabilistic Diffusion Models With Optimal Diagonal Covariance Matching (Ou et al., 2025), eq. 14
        | https://arxiv.org/abs/2406.10808
        | Estimating the Optimal Covariance with Imperfect Mean in DPMs (Bao et al., 2022), for sn and npr
        | https://arxiv.org/abs/2206.07309
        | Official code leaves dropout on in the frozen network, and goes backward through it twice; neither is done here.
    """

    error: Tensor
    weight: Tensor

    def __init__(
        self,
        source: Learned,
        schedule: Schedule,
        mode: str | None = None,
        *,
        derivative: str = "auto",
        probes: int = 1,
        step: float | None = None,
        balance: bool = False,
        drop: Mapping[str, tuple[float, int | float]] | None = None,
    ):
        super().__init__()
        if mode is None:
            mode = next(name for name, kinds in _KINDS.items() if isinstance(source, kinds))
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)} (got {mode!r})")
        if not isinstance(source, _KINDS[mode]):
            fits = " or ".join(kind.__name__ for kind in _KINDS[mode])
            raise ValueError(f"`mode` {mode!r} trains {fits} (got {type(source).__name__}): their heads mean different things")
        if probes < 1:
            raise ValueError(f"`probes` must be at least 1 (got {probes})")
        check_derivative(derivative)
        self.source, self.schedule, self.mode, self.derivative = source, schedule, mode, derivative
        self.probes, self.step, self.balance, self.drop = probes, step, balance, dict(drop or {})
        # running mean squared errors of the two targets, relative to N(0, 1) data, by level; what was counted decays
        self.register_buffer("error", torch.zeros(2, _BINS, dtype=torch.float32))
        self.register_buffer("weight", torch.zeros(2, _BINS, dtype=torch.float32))
        self._warned = False

    def forward(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Tensor:
        self._look_at(denoiser)
        lam = self._levels(batch.x0, draws)
        noised = noised_by(denoiser.process, batch.x0, lam, draws)
        bound = denoiser.bind(**dropped(batch.cond, self.drop, draws))
        return self.loss(bound, noised, draws)

    def loss(self, denoiser: Denoiser, noised: Noised, draws: Draws) -> Tensor:
        """Losses (B,) of given examples.

        Arguments:
            denoiser: Conditions bound.
            noised: The examples.
            draws: Where the probes come from.
        """
        source, x, lam = self.source, noised.x_t, noised.lam
        p, seen, targets = self._targets(denoiser, noised, draws)
        q = source.quantity(source.output(seen, denoiser, x, lam, p), lam, x)
        unit = spread_over(torch.sigmoid(lam), x) if self.mode != "sn" else 1.0
        errors = [((q.detach() - target) / unit).square().flatten(1).mean(1) for target in targets]
        bins = (lam.clamp(-_REACH, _REACH - 1e-3) + _REACH).long()
        precision = self._precision(bins, errors)
        share = precision / precision.sum(0)
        target = targets[0] if len(targets) == 1 else sum(spread_over(s, x) * t for s, t in zip(share, targets, strict=True))
        out = ((q - target) / source.scale(lam, x)).square().flatten(1)
        return out.mean(1) * precision.sum(0).to(out) if self.balance else out.sum(1)

    # -- targets

    def _targets(self, denoiser: Denoiser, noised: Noised, draws: Draws) -> tuple[Gaussian, Seen | None, list[Tensor]]:
        """What the denoiser says, and the targets of the mode, without gradients."""
        x, lam, source, targets = noised.x_t, noised.lam, self.source, []
        if self.mode in ("ocm", "mixed"):
            p, seen, target = self._probe(denoiser, noised, draws)
            targets.append(target)
        else:
            with torch.no_grad():
                p, seen = source.look(denoiser, x, lam)
        with torch.no_grad():
            if self.mode == "sn":
                targets.append(source.coordinates(noised.eps).square())
            elif self.mode in ("npr", "mixed"):
                targets.append(source.coordinates(noised.eps - noise_of(p, x, lam, denoiser)).square())
            elif self.mode == "moment":
                eps_hat = noise_of(p, x, lam, denoiser)
                targets.append(source.coordinates(noised.eps).square() - source.coordinates(eps_hat).square())
        return p, seen, targets

    def _probe(self, denoiser: Denoiser, noised: Noised, draws: Draws) -> tuple[Gaussian, Seen | None, Tensor]:
        """alpha v * (J^T v), or with J v: unbiased for the diagonal of alpha J, as E[v v^T] is the identity."""
        x, lam, source = noised.x_t, noised.lam, self.source
        step = self.step or difference_step(denoiser, x, lam)
        total = torch.zeros_like(x)
        for i in range(self.probes):
            v = draws.normal(x, "probe" if i == 0 else f"probe {i}").sign()
            p, seen, u = self._product(lambda z: source.look(denoiser, z, lam), x, source.pixels(v), step)
            total += v * source.coordinates(u)
        return p, seen, relative(total / self.probes, lam, denoiser, x)

    def _product(self, look: Look, x: Tensor, v: Tensor, step: Tensor | float) -> tuple[Gaussian, Any, Tensor]:
        """`product`, by another derivative from now on if the network does not have this one."""
        try:
            return product(look, x, v, self.derivative, step)
        except (RuntimeError, NotImplementedError) as error:
            instead = _INSTEAD.get(self.derivative)
            if instead is None or "memory" in str(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0][:100]
            warnings.warn(f"the network cannot do {self.derivative!r} ({reason}): using {instead!r}", stacklevel=3)
            self.derivative = instead
            return product(look, x, v, instead, step)

    # -- levels

    def _levels(self, x0: Tensor, draws: Draws) -> Tensor:
        u = self.schedule.draw(draws).to(level_dtype(x0)).to(x0.device)
        curve = self.schedule
        with torch.no_grad():
            lam = curve.at((u * len(curve)).floor()) if isinstance(curve, Table) else curve(u)
        return lam.clamp(-_REACH, _REACH)  # in pure noise and in the data there is nothing to learn

    @torch.no_grad()
    def _precision(self, bins: Tensor, errors: list[Tensor]) -> Tensor:
        """Inverse mean squared errors (targets, B) of the levels so far; counts the errors of this step, while training."""
        out = []
        for k, error in enumerate(errors):
            mean = torch.where(
                self.weight[k] > 0, self.error[k] / self.weight[k].clamp_min(1e-12), torch.ones_like(self.error[k])
            )
            out.append(1.0 / mean[bins].clamp_min(1e-6))
            if self.training:
                count = torch.zeros_like(self.weight[k]).index_add_(0, bins, torch.ones_like(error, dtype=torch.float32))
                sums = torch.zeros_like(self.error[k]).index_add_(0, bins, torch.where(error.isfinite(), error, 0.0).float())
                count, sums = _of_all_processes(torch.stack([count, sums]))
                decay = torch.where(count > 0, _DECAY, 1.0)
                self.error[k] = decay * self.error[k] + sums
                self.weight[k] = decay * self.weight[k] + count
        return torch.stack(out)

    def _look_at(self, denoiser: Denoiser) -> None:
        """Puts the network into evaluation mode: with dropout the variance would be that of a thinned network."""
        if any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in denoiser.modules()) and not self._warned:
            warnings.warn("the denoiser had dropout switched on: it is put into evaluation mode, since the variance is to be "
                          "that of the network that samples", stacklevel=3)  # fmt: skip
            self._warned = True
        if denoiser.training:
            denoiser.eval()
        if not self._warned and any(p.requires_grad for p in denoiser.parameters()):
            warnings.warn("the denoiser's parameters require gradients, which costs memory and time for nothing: call "
                          "denoiser.requires_grad_(False)", stacklevel=3)  # fmt: skip
            self._warned = True

    def extra_repr(self) -> str:
        return f"mode={self.mode}, derivative={self.derivative}, probes={self.probes}, balance={self.balance}"


def _of_all_processes(counts: Tensor) -> Tensor:
    """Sums over the processes that train together: their batches are parts of one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return counts


_REACH = 30.0  # levels beyond +-30 count as 30
_BINS = 60
_DECAY = 0.99
