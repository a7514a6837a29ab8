"""What each step of the bound costs a model that was trained with an encoder: for least-cost paths, as `grids.edge_costs`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..encoder import Encoder
from ..likelihoods.decoders import Decoder, summed
from ..noise import Draws
from ..transition import Ancestral
from .encoded import Encoded

__all__ = ["encoded_costs", "widened_costs"]


@torch.no_grad()
def encoded_costs(
    denoiser: Denoiser,
    x0: Tensor,
    levels: Tensor,
    decoder: Decoder,
    encoder: Encoder,
    *,
    draws: Draws,
    transition: Ancestral | None = None,
    fit: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    r"""The cost F[s, t] of each step of the bound, for `grids.dp_vb`: mean nats per example, float64 (N + 1, N + 1) on the CPU.

    A step's means are as far apart as the denoiser's error and the counterterm's together, so that, unlike without an encoder,
    each pair of levels asks for a pass over the images: with :math:`h = \lambda_s - \lambda_t`, :math:`c = 1 - e^{-h}`,

    .. math:: F[s, t] = \tfrac12\, \mathrm{expm1}(h)\, e^{\lambda_t} \left\|x_t - \hat x + \frac{x_s - x_t - h \hat d}{c}
        \right\|^2.

    The networks are evaluated once per level. Holds the encoded images of all levels, N B D numbers of the encoder's dtype.

    Arguments:
        denoiser: Conditions bound, with the process `Encoded(...)`.
        x0: Data (B, *).
        levels: Log-SNRs of the chain (N,), cleanest first.
        decoder: For F[0, t].
        encoder: That of the training.
        draws: As in `likelihood.elbo`.
        transition: The kernels; None is `Ancestral()`.
        fit: Give the decoder the variance that suits the error at each level.
        progress: Called with the number of levels done.

    Raises:
        ValueError: For a denoiser that was trained without an encoder, or costs that are not finite.

    References:
        | DiffEnc (Nielsen et al., 2024), eq. 17: the loss of a step
        | https://arxiv.org/abs/2310.19789
    """
    process, transition = denoiser.process, Ancestral() if transition is None else transition
    if not isinstance(process, Encoded):
        raise ValueError(f"`denoiser` was trained without an encoder (its process is {process}): use grids.edge_costs")
    chain = levels.detach().cpu().double()
    x0 = decoder.prepare(x0 if x0.device.type == "mps" else x0.double(), draws)
    dtype = next((p.dtype for p in encoder.parameters()), x0.dtype)
    encoded = torch.stack([encoder(x0.to(dtype), x0.new_full((len(x0),), lam, dtype=dtype)) for lam in chain.tolist()])
    F = torch.full((len(chain) + 1, len(chain) + 1), math.inf, dtype=torch.float64)
    for t, lam_t in enumerate(chain.tolist()):
        alpha, sigma = process.scales(lam_t)
        x_t = encoded[t].to(x0)
        z = alpha * x_t + sigma * draws.normal(x0, f"edge {t + 1}")
        last = transition(denoiser, z, lam_t, math.inf)
        own = decoder.fitted(float((x0 - last.p.mean).square().mean())) if fit else decoder
        F[0, t + 1] = own(last, x0, z, lam_t).mean()
        if t:
            estimate = transition(denoiser, z, lam_t, float(chain[t - 1])).x0
            d_hat, error = process.rate(estimate, lam_t), x_t - estimate.mean
            F[1 : t + 1, t + 1] = torch.stack(
                [_step_cost(error, encoded[s].to(x0) - x_t, d_hat, lam_t, float(chain[s])) for s in range(t)]
            ).cpu()
        if progress is not None:
            progress(t + 1)
    if not F[torch.ones_like(F, dtype=torch.bool).triu(1)].isfinite().all():
        raise ValueError("`x0` has costs that are not finite: look at the denoiser at the ends of the chain")
    return F


def _step_cost(error: Tensor, moved: Tensor, d_hat: Tensor, lam_t: float, lam_s: float) -> Tensor:
    """Mean KL of a step, ()."""
    h = lam_s - lam_t
    apart = torch.add(error, moved - h * d_hat, alpha=-1.0 / math.expm1(-h))
    return (0.5 * math.expm1(h) * math.exp(lam_t)) * summed(apart.square()).mean().double()


def widened_costs(F: Tensor, dims: int) -> Tensor:
    """Costs with the best single variance for each step, from those with the posterior's: D / 2 log(1 + 2 F / D).

    Arguments:
        F: As `encoded_costs` or `grids.edge_costs` of `Ancestral(spread=False)` returns it.
        dims: Numbers in an example, D.
    """
    out = F.clone()
    out[1:] = 0.5 * dims * torch.log1p(F[1:] * (2.0 / dims))
    return out
