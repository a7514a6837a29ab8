r"""Data whose denoisers are known exactly: the witnesses of every claim, and toys to try a sampler on."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .gaussian import Gaussian
from .noise import Noise
from .process import VE, Level, Process

__all__ = ["FiniteData", "GaussianData", "MixtureData", "Oracle", "Rotation"]


class Rotation:
    """The basis of a covariance's eigenvectors, for examples of any shape.

    Arguments:
        vectors: Orthonormal columns (D, D).
    """

    def __init__(self, vectors: Tensor):
        self.vectors = vectors

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.vectors.to(x)).reshape(x.shape)

    def inverse(self, c: Tensor) -> Tensor:
        return (c.flatten(1) @ self.vectors.to(c).T).reshape(c.shape)


class Oracle(Denoiser):
    """A distribution of x0 as its own exact denoiser, in any process. Computes in the dtype of the state."""

    shape: tuple[int, ...]

    def __init__(self, shape: tuple[int, ...], process: Process):
        super().__init__()
        self.shape, self.process = tuple(shape), process

    @abstractmethod
    def sample(self, noise: Noise) -> Tensor:
        """Data (B, *shape), float64, one example per index of `noise`."""

    @abstractmethod
    def log_prob(self, x: Tensor, lam: Level = math.inf) -> Tensor:
        """log of the marginal density of x_t at log-SNR `lam`, (B,) nats; +inf is the data's own."""

    def score(self, x: Tensor, lam: Level) -> Tensor:
        """Gradient of `log_prob` in x (B, *), from E[x0 | x_t] by Tweedie's formula."""
        return self.predict(x, lam, "score")

    def _flat(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"`x` must have shape (B, {', '.join(map(str, self.shape))}) (got {tuple(x.shape)})")
        return x.flatten(1)


class GaussianData(Oracle):
    r"""x0 ~ N(mean, cov): posterior, score, flow, likelihood and every sampler's limit in closed form.

    Arguments:
        mean: Shape of one example.
        cov: Variances of the same shape (or a number), or the full covariance (D, D).
        process: Forward process of the states.

    Raises:
        ValueError: If `cov` fits neither shape, or is not positive semi-definite.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, mean: Tensor, cov: Tensor | float, process: Process = VE):
        super().__init__(tuple(mean.shape), process)
        mean = mean.double()
        cov = torch.as_tensor(cov, dtype=torch.float64, device=mean.device)
        self.basis: Rotation | None = None
        n = mean.numel()
        if cov.shape == mean.shape or cov.ndim == 0:
            var = cov.expand_as(mean).clone()
        elif cov.shape == (n, n):
            var, vectors = torch.linalg.eigh(cov)
            var, self.basis = var.reshape(mean.shape), Rotation(vectors)
        else:
            raise ValueError(
                f"`cov` must be a number, have the mean's shape {tuple(mean.shape)}, or be ({n}, {n}) (got {tuple(cov.shape)})"
            )
        if var.min() < -1e-12 * var.max().abs():
            raise ValueError(f"`cov` must be positive semi-definite (smallest eigenvalue {float(var.min()):.3g})")
        self.register_buffer("mean", mean)
        self.register_buffer("var", var.clamp_min(0.0))

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        self._flat(x)
        alpha, sigma = self.process.scales_over(lam, x)
        mean, var = self.mean.to(x), self.var.to(x)
        total = alpha * alpha * var + sigma * sigma
        residual = x - alpha * mean
        pull = alpha * var / total
        shift = pull * residual if self.basis is None else self.basis.inverse(pull * self.basis.forward(residual))
        return Gaussian(mean + shift, var * (sigma * sigma) / total, self.basis)

    def marginal(self, lam: Level, x: Tensor) -> Gaussian:
        """The distribution of x_t at `lam`, broadcasting to states like x."""
        alpha, sigma = self.process.scales_over(lam, x)
        var = alpha * alpha * self.var.to(x) + sigma * sigma
        return Gaussian(alpha * self.mean.to(x) * torch.ones_like(x[:1]), var.expand_as(x), self.basis)

    def log_prob(self, x: Tensor, lam: Level = math.inf) -> Tensor:
        return self.marginal(lam, x).log_prob(x)

    def flow(self, x: Tensor, lam_t: float, lam_s: float) -> Tensor:
        """The exact solution of the probability-flow ODE from (x, lam_t) to lam_s: whitening, then colouring."""
        start, end = self.marginal(lam_t, x), self.marginal(lam_s, x)
        z = x - start.mean
        ratio = (end.var / start.var).sqrt()
        return end.mean + (z * ratio if self.basis is None else self.basis.inverse(self.basis.forward(z) * ratio))

    def sample(self, noise: Noise) -> Tensor:
        z = noise.normal(torch.empty(len(noise), *self.shape, dtype=torch.float64, device=self.mean.device), 0, "oracle")
        return Gaussian(self.mean, self.var.expand(len(noise), *self.shape), self.basis).sample(z)


class MixtureData(Oracle):
    r"""x0 ~ sum_k weights_k N(means_k, vars_k): several modes, still exact. The reported variance is the posterior's diagonal.

    Arguments:
        means: (K, *shape).
        vars: Variances (K,), (K, *shape), or a number.
        weights: (K,), normalised here; None is uniform.
        process: Forward process of the states.
    """

    means: Tensor
    vars: Tensor
    log_weights: Tensor

    def __init__(self, means: Tensor, vars: Tensor | float, weights: Tensor | None = None, process: Process = VE):
        super().__init__(tuple(means.shape[1:]), process)
        means = means.double()
        vars = torch.as_tensor(vars, dtype=torch.float64, device=means.device)
        vars = vars.reshape(-1, *[1] * (means.ndim - 1)) if vars.ndim == 1 else vars
        weights = torch.ones(len(means), device=means.device) if weights is None else weights
        if weights.shape != (len(means),) or not (weights > 0).all() or not (vars > 0).all():
            raise ValueError(f"`weights` and `vars` must be positive, one weight for each of the {len(means)} means")
        self.register_buffer("means", means)
        self.register_buffer("vars", vars.expand_as(means).clone())
        self.register_buffer("log_weights", torch.log(weights.double() / weights.double().sum()))

    def _posterior(self, x: Tensor, lam: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Log of joint densities (B, K), and each component's posterior mean and variance (B, K, D)."""
        flat = self._flat(x)[:, None]
        alpha, sigma = self.process.scales_over(lam, flat)
        means, vars = self.means.to(x).flatten(1), self.vars.to(x).flatten(1)
        total = alpha * alpha * vars + sigma * sigma
        residual = flat - alpha * means
        log_joint = self.log_weights.to(x) - 0.5 * (residual.square() / total + total.log() + math.log(2 * math.pi)).sum(-1)
        return (
            log_joint,
            means + alpha * vars / total * residual,
            (vars * (sigma * sigma) / total).expand_as(residual),
        )

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        log_joint, means, vars = self._posterior(x, lam)
        r = log_joint.softmax(1)[..., None]
        mean = (r * means).sum(1)
        var = (r * (vars + (means - mean[:, None]).square())).sum(1)
        return Gaussian(mean.reshape(x.shape), var.reshape(x.shape))

    def log_prob(self, x: Tensor, lam: Level = math.inf) -> Tensor:
        return self._posterior(x, lam)[0].logsumexp(1)

    def sample(self, noise: Noise) -> Tensor:
        k = torch.searchsorted(self.log_weights.exp().cumsum(0).cpu(), noise.uniform(0, "component")).clamp(
            max=len(self.means) - 1
        )
        mean, var = self.means[k], self.vars[k]
        return Gaussian(mean, var).sample(noise.normal(mean, 0, "oracle"))


class FiniteData(Oracle):
    r"""x0 uniform over the given points: the exact denoiser of a data set, and what training can only approach.

    Arguments:
        points: (N, *shape).
        process: Forward process of the states.
        chunk: States whose (chunk, N) weights are held at once.
    """

    points: Tensor

    def __init__(self, points: Tensor, process: Process = VE, chunk: int = 256):
        super().__init__(tuple(points.shape[1:]), process)
        if len(points) < 1:
            raise ValueError("`points` must hold at least one example")
        self.chunk = chunk
        self.register_buffer("points", points if points.is_floating_point() else points.double())

    def _nearness(self, x: Tensor, lam: Level) -> tuple[Tensor, Any]:
        """-||x - alpha y||^2 / 2 for each point y, up to a term of the row: (B, N); and sigma^2.

        As a product of matrices, about the mean point so that large offsets do not cancel.
        """
        alpha, sigma = self.process.scales_over(lam, x.flatten(1))
        points = self.points.to(x).flatten(1)
        centre = points.mean(0)
        points = points - centre
        z = x.flatten(1) - alpha * centre
        return z @ points.T * alpha - 0.5 * alpha * alpha * points.square().sum(1), sigma * sigma

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        flat, points = self._flat(x), self.points.to(x).flatten(1)
        means, vars = [], []
        for i in range(0, max(len(x), 1), self.chunk):
            rows = slice(i, i + self.chunk)
            near, var = self._nearness(flat[rows], lam[rows] if isinstance(lam, Tensor) and lam.ndim else lam)
            near, least = near - near.amax(1, keepdim=True), torch.finfo(x.dtype).tiny  # without noise: the nearest point
            w = (near / (var.clamp_min(least) if isinstance(var, Tensor) else max(var, least))).softmax(1)
            mean = w @ points
            means.append(mean)
            vars.append((w @ (points - points.mean(0)).square() - (mean - points.mean(0)).square()).clamp_min(0.0))
        return Gaussian(torch.cat(means).reshape(x.shape), torch.cat(vars).reshape(x.shape))

    def log_prob(self, x: Tensor, lam: Level = math.inf) -> Tensor:
        """Exact at finite levels.

        Raises:
            ValueError: At lam = +inf, where a finite set has no density.
        """
        if isinstance(lam, float) and lam == math.inf:
            raise ValueError("`lam` must be finite: a finite set of points has no density")
        flat = self._flat(x)
        alpha, sigma = self.process.scales_over(lam, flat)
        centre = self.points.to(x).flatten(1).mean(0)
        row = -0.5 * (flat - alpha * centre).square().sum(1, keepdim=True) / (sigma * sigma)
        d = flat.shape[1]
        level = torch.as_tensor(sigma, dtype=flat.dtype).log().reshape(-1)
        near, var = self._nearness(flat, lam)
        return (near / var + row).logsumexp(1) - math.log(len(self.points)) - d * (level + 0.5 * math.log(2 * math.pi))

    def sample(self, noise: Noise) -> Tensor:
        k = (noise.uniform(0, "point") * len(self.points)).long().to(self.points.device)
        return self.points[k].double()
