r"""Anomalies by an energy: trained by DxMI on features of normal data alone, on the unit sphere.

    features (N, D) or maps (N, C, H, W) -> unit vectors, one data point for each position -> energy
    -> image score: the most of its positions; heat: the energies in their places, blown up to the picture

The energy is an autoencoder's error, the sampler a policy whose means are projected to the sphere and whose chains start from
perturbed data, and the value is a network of its own that never stands for the energy.

References:
    | Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models (Yoon et al., 2024)
    | section 5.3 and appendix C.3, https://arxiv.org/abs/2407.00626
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Order
from ..denoiser import edm
from ..imitation import MaxEntIRL
from ..networks.mlp import MLP
from ..noise import Draws
from ..process import VE
from ..schedule import karras
from .energies import PerceptronValue
from .policy import Policy
from .reconstruction import AutoencoderEnergy, autoencoder
from .settings import Settings

__all__ = ["Detector", "Plan", "exponential", "image_scores", "perturbed", "points", "unit", "upsampled", "walk"]


def unit(x: Tensor) -> Tensor:
    """Rows (B, *) of length 1, taken over all their dimensions; a row of zeros stays."""
    return F.normalize(x.flatten(1), dim=1).reshape(x.shape)


def points(features: Tensor) -> Tensor:
    """The data points of features: unit vectors (N, D), or (N H W, C) of maps (N, C, H, W), position by position.

    Raises:
        ValueError: If features are neither, or not finite.
    """
    if features.ndim not in (2, 4) or not features.is_floating_point():
        got = f"{features.dtype} {tuple(features.shape)}"
        raise ValueError(f"`features` must be floats (N, D), or maps (N, C, H, W) (got {got})")
    if not bool(features.isfinite().all()):
        raise ValueError(f"`features` of {int((~features.isfinite().flatten(1).all(1)).sum())} examples are not finite")
    rows = features if features.ndim == 2 else features.movedim(1, -1).flatten(0, 2)
    return unit(rows)


def image_scores(where: Tensor) -> Tensor:
    """One score per image (N,): the most of its positions (N, H, W), for an anomaly need not be everywhere."""
    return where.flatten(1).amax(1)


def upsampled(where: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Energies of positions (N, H, W) as maps of a picture's pixels (N, *size): bilinear, half-pixel centres."""
    return F.interpolate(where[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def exponential(x: Tensor, v: Tensor) -> Tensor:
    r"""The exponential map of the unit sphere: :math:`x \cos|v| + v/|v| \sin|v|` for unit rows x and tangent rows v, (B, D)."""
    length = v.norm(dim=1, keepdim=True)
    # sin(l)/l, whose limit is 1: no 0/0 for a move of nothing
    return x * length.cos() + v * torch.where(length > 0, length.sin() / length.clamp_min(1e-30), torch.ones_like(length))


def walk(z: Tensor, noise: list[Tensor], std: float) -> Tensor:
    """A walk on the unit sphere from rows z (B, D): a Gaussian move in the tangent plane for each noise (B, D).

    Arguments:
        z: Where it starts.
        noise: Standard normals, one tensor for each move.
        std: Standard deviation of a move in each tangent direction, in radians.
    """
    for eps in noise:
        v = std * (eps - (eps * z).sum(1, keepdim=True) * z)
        z = unit(exponential(z, v))  # unit() takes away what rounding adds
    return z


@torch.no_grad()
def perturbed(energy: AutoencoderEnergy, x: Tensor, noise: list[Tensor], std: float) -> Tensor:
    """Data (B, D) moved about in the latents of an autoencoder on the sphere, and decoded again: where chains start."""
    return energy.decode(walk(energy.encode(x), noise, std))


# ---- training


@dataclass(frozen=True)
class Plan:
    """How a detector is trained; lengths are in radians on the unit sphere of features.

    Attributes:
        T: Steps of the sampler.
        latent: Size of the autoencoder's latent.
        width: Units of a hidden layer of the autoencoder; it has three on each side.
        sampler_width: Of the sampler's network.
        value_width: Of the value's.
        far: Length of the noise of the first step.
        near: Of the last but one; the last step adds half of it.
        moves: Moves in the latent that make x_0 from data.
        std: Standard deviation of a move in each direction.
        pretrain: Steps that train the autoencoder alone, before.
        iterations: Iterations of DxMI.
        batch: Data points of each.
        tau: Weight of entropy and velocity, per dimension.
        gamma: Weight of squared energies; 0 is no such term, as in the released class.
        lr_pretrain: Learning rate of the autoencoder alone.
        lr_energy: Of the autoencoder in DxMI.
        lr_policy: Of the sampler.
        lr_std: Of its log standard deviations.
        lr_value: Of the value.
        scale: s of the energy s^2 |x - g(f(x))|^2 at the start.
    """

    T: int = 5
    latent: int = 32
    width: int = 256
    sampler_width: int = 256
    value_width: int = 256
    far: float = 0.3
    near: float = 0.05
    moves: int = 4
    std: float = 0.1
    pretrain: int = 2000
    iterations: int = 1000
    batch: int = 256
    tau: float = 0.01
    gamma: float = 1.0
    lr_pretrain: float = 1e-3
    lr_energy: float = 3e-4
    lr_policy: float = 1e-3
    lr_std: float = 1e-3
    lr_value: float = 1e-3
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.near < self.far:
            raise ValueError(f"`near` must lie in (0, far) (got {self.near}, far {self.far})")
        for name in ("T", "latent", "width", "sampler_width", "value_width", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 (got {getattr(self, name)})")
        for name in ("moves", "std", "pretrain", "iterations", "tau", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative (got {getattr(self, name)})")

    def settings(self) -> Settings:
        """What `MaxEntIRL` is told: the separate energy's mode, its gradient clipped, next states drawn anew."""
        return Settings(
            tau1=self.tau, tau2=self.tau, gamma=self.gamma, time_cost=None, entropy_in_value=0, velocity_in_value=0,
            value_resample=True, energy_clip=0.1, lr_policy=self.lr_policy, lr_std=self.lr_std, lr_value=self.lr_value,
            lr_energy=self.lr_energy, betas=(0.5, 0.99),
        )  # fmt: skip


class Detector(torch.nn.Module):
    """An energy of features, and the sampler that it was trained against.

    Arguments:
        energy: On the unit sphere, of vectors (D,).
        policy: Draws features.

    Example:
        >>> plan = Plan(latent=2, width=8, sampler_width=8, value_width=8, pretrain=2, iterations=2, batch=4)
        >>> detector = Detector.fit(torch.randn(20, 6), plan)
        >>> detector.score(torch.randn(3, 6)).shape
        torch.Size([3])
    """

    def __init__(self, energy: AutoencoderEnergy, policy: Policy):
        super().__init__()
        self.energy, self.policy = energy, policy

    @classmethod
    def fit(
        cls,
        features: Tensor,
        plan: Plan | None = None,
        *,
        seed: int = 0,
        progress: Callable[[int, dict[str, float]], None] | None = None,
    ) -> Detector:
        """Trains on features of normal data, (N, D) or (N, C, H, W), on their device.

        Arguments:
            features: Of normal examples only.
            plan: See `Plan`.
            seed: Of weights, order and noise.
            progress: Called after each step (pretraining first) with its number from 1 and what it told.

        Raises:
            ValueError: If features are of another shape, not finite, or there are none; or training becomes not finite.
        """
        plan, x = Plan() if plan is None else plan, points(features)
        if not len(x):
            raise ValueError("`features` must hold at least one example")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            energy = autoencoder(x.shape[1], plan.latent, plan.width, sphere=True, scale=plan.scale).to(x)
            policy = _sampler(x.shape[1], plan).to(x)
            value = PerceptronValue(x.shape[1], plan.T, plan.value_width, terminal=False, scale=math.sqrt(x.shape[1])).to(x)
        order = Order(len(x), plan.batch, seed)
        _pretrain(energy, x, order, plan, progress)
        irl = _FromData(policy, value, energy, plan)
        for i in range(plan.iterations):
            rows = x[order.indices(plan.pretrain + i).to(x.device)]
            told = irl.iterate(rows, None, Draws(seed, i, range(len(rows))))
            if progress is not None:
                numbers = {name: float(number) for name, number in told.items() if number.ndim == 0}
                progress(plan.pretrain + i + 1, numbers)
        irl.check()
        return cls(energy, policy).eval()

    @torch.no_grad()
    def where(self, features: Tensor, batch: int = 4096) -> Tensor:
        """Energies of the positions, (N, H, W); of vectors (N, 1, 1). On the CPU."""
        x = points(features)
        place = self.energy.scale
        parts = [self.energy(rows.to(place)).cpu() for rows in x.split(batch)]
        return torch.cat(parts).reshape(len(features), *(features.shape[2:] if features.ndim == 4 else (1, 1)))

    def score(self, features: Tensor) -> Tensor:
        """One number per example (N,), high where it is strange."""
        return image_scores(self.where(features))

    def heat(self, features: Tensor, size: int | tuple[int, int]) -> Tensor:
        """Maps (N, *size) of pixels, of features that are maps."""
        return upsampled(self.where(features), size)


class _FromData(MaxEntIRL):
    """Chains that start from the data of the iteration, perturbed in the latents of the autoencoder as it was pretrained."""

    def __init__(self, policy: Policy, value: PerceptronValue, energy: AutoencoderEnergy, plan: Plan):
        super().__init__(policy, value, energy, plan.settings())
        self.start, self.plan = copy.deepcopy(energy).requires_grad_(False), plan

    def _first(self, x0: Tensor, draws: Draws, turn: int) -> Tensor:
        like = x0.new_empty(len(x0), self.plan.latent)
        noise = [draws.normal(like, f"start {turn} {i}") for i in range(self.plan.moves)]
        return perturbed(self.start, x0, noise, self.plan.std)


def _sampler(dims: int, plan: Plan) -> Policy:
    """A policy whose means are on the sphere; before training it stays where it is and adds noise."""
    unit_length = 1.0 / math.sqrt(dims)  # of a vector of length 1, per dimension
    denoiser = edm(MLP(dims, plan.sampler_width, 2), VE, unit_length, shape=(dims,))
    grid = karras(plan.T, plan.near * unit_length, plan.far * unit_length, rho=3.0)
    return Policy(denoiser, grid, trained="fix_last", last_std=0.5 * plan.near * unit_length, mean_map=unit)


def _pretrain(
    energy: AutoencoderEnergy,
    x: Tensor,
    order: Order,
    plan: Plan,
    progress: Callable[[int, dict[str, float]], None] | None,
) -> None:
    """Trains an autoencoder to give normal data back, its scale left alone."""
    parameters = [p for p in energy.parameters() if p is not energy.scale]
    optimizer = torch.optim.Adam(parameters, plan.lr_pretrain, fused=True)
    cycle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, plan.pretrain))
    for step in range(plan.pretrain):
        loss = energy(x[order.indices(step).to(x.device)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        if progress is not None:
            progress(step + 1, {"loss": float(loss.detach())})
