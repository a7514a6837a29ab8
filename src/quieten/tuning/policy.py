r"""Policies: a few Gaussian steps from noise to data, whose means and noise are tuned.

States are numbered in generation order: x_0 is noise, x_T the sample, and

.. math:: \pi_k(x_{k+1} \mid x_k) = N(m_k(x_k), \rho_k^2)

has its mean from a transition of a denoiser and its standard deviation rho_k from a table that may be trained.

References:
    | Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models (Yoon et al., 2024), eq. 1
    | https://arxiv.org/abs/2407.00626
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, evaluating
from ..gaussian import Gaussian
from ..noise import INITIAL
from ..sampling import NoiseSource
from ..transition import Ancestral, Transition
from .tuned import TRAINED, Trained, Tuned

__all__ = ["TRAINED", "Policy", "Rollout"]

CLIPPED = "`transition` clips the estimate of x0: where it does, no gradient reaches the network; tune without clip"


@dataclass(frozen=True)
class Rollout:
    """Trajectories of a policy, without a graph.

    Attributes:
        states: x_0 to x_T: (T + 1, B, *). Nothing else of their size is kept.
        moves: Mean over dimensions of (x_{k+1} - x_k)^2, (T, B): what adaptive velocity regularisation and running costs need.
        cond: The conditions, each (B, ...).
    """

    states: Tensor
    moves: Tensor
    cond: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> Tensor:
        """The samples x_T (B, *)."""
        return self.states[-1]


class Policy(nn.Module):
    r"""A denoiser cut down to T Gaussian steps, means and noise to be tuned.

    Arguments:
        denoiser: Gives the means; trained in place, as far as its parameters want gradients.
        grid: Log-SNRs from noise to data, rising: T + 1 of them. A last level of +inf is the data itself.
        transition: Gives the mean of each step, and its noise unless `std` does; None is `Ancestral(spread=False)`.
        std: As in `Tuned`, or "kernel". See `policy_schedule.moment_std` for standard deviations from learned variances.
        trained: As in `Tuned`.
        last_std: As in `Tuned`.
        shape: Shape of one example; None asks the denoiser.
        **options: `mean_map`, `adhoc_scale1`, `adhoc_scale2` of `Tuned`.

    Attributes:
        T: Number of steps.
        s2: Variances of the auxiliary kernels that it was tuned with, where a file said so.
        facts: What else the file said.
        transition: The policy as a transition for the public samplers: `generate(policy.denoiser, n, grid=policy.grid,
            transition=policy.transition, last="draw")` draws from it.

    Raises:
        ValueError: As `Tuned`.

    Warns:
        For a transition that clips the estimate of x0: steps are as good as ever, but where it clips no gradient reaches the
        network. `load_policy` does not say so.

    Example:
        >>> from quieten.oracle import GaussianData
        >>> from quieten.schedule import karras
        >>> policy = Policy(GaussianData(torch.zeros(2), 1.0), karras(4))
        >>> policy.T, policy.step(torch.zeros(3, 2), 0).mean.shape
        (4, torch.Size([3, 2]))
    """

    def __init__(
        self,
        denoiser: Denoiser,
        grid: Tensor,
        transition: Transition | None = None,
        *,
        std: Tensor | float | Literal["kernel"] | None = None,
        trained: Trained = "fix_last",
        last_std: float = 1e-3,
        shape: tuple[int, ...] | None = None,
        **options: Any,
    ):
        super().__init__()
        self.denoiser, self.shape = denoiser, denoiser.shape if shape is None else tuple(shape)
        inner = Ancestral(spread=False) if transition is None else transition
        if getattr(inner, "clip", None) is not None:
            warnings.warn(CLIPPED, stacklevel=2)
        options = {"last_std": last_std, "shape": self.shape, "dtype": _dtype(denoiser), **options}
        self.transition = Tuned(inner, denoiser.process, grid, std, trained, **options)
        self.transition.to(denoiser.device)
        self.T = self.transition.T
        self.s2: Tensor | None = None
        self.facts: Mapping[str, Any] = {}
        if self.transition.from_kernel:
            self._measure()

    @property
    def grid(self) -> Tensor:
        """Log-SNRs of the states: CPU float64 (T + 1,)."""
        return torch.tensor(self.transition.lams, dtype=torch.float64)

    @property
    def log_std(self) -> nn.Parameter:
        """The trained table of log standard deviations, (T,) or (T, *shape)."""
        return self.transition.log_std

    @property
    def rhos(self) -> Tensor:
        """The standard deviation of each step, geometric mean over dimensions: (T,), without a graph.

        With `std`="kernel" it depends on the state: here it is the factor times what a few trajectories had at the start.
        """
        return self.transition.rhos

    def prior(self, noise: Tensor) -> Tensor:
        """The first states x_0 (B, *) from standard normals."""
        return self.denoiser.process.prior(self.transition.lams[0]).sample(noise)

    def step(self, x: Tensor, k: int | Tensor, **cond: Any) -> Gaussian:
        """p(x_{k+1} | x_k) for states x (B, *) of step k, or of one step for each row, int64 (B,).

        Raises:
            ValueError: For a step outside 0..T - 1.
        """
        if isinstance(k, Tensor) and not self.transition.takes_rows:
            self.transition.levels(k)  # refuses steps that there are not
            return self._step_by_step(x, k, cond)
        p: Gaussian = self.transition.at(self.denoiser.bind(**cond), x, k).p
        return p

    def _step_by_step(self, x: Tensor, k: Tensor, cond: Mapping[str, Any]) -> Gaussian:
        """`step` of rows of different steps for a transition that takes one level at a time."""
        order = k.argsort(stable=True)
        parts = [order[k[order] == step] for step in range(self.T)]
        ps = [
            self.step(x[rows], step, **{name: c[rows] if isinstance(c, Tensor) and c.ndim else c for name, c in cond.items()})
            for step, rows in enumerate(parts)
        ]
        back = order.argsort()
        var = torch.cat([p.var.expand_as(p.mean) for p in ps])
        return Gaussian(torch.cat([p.mean for p in ps])[back], var[back], ps[0].basis)

    def log_rho(self, k: int | Tensor, p: Gaussian) -> Tensor:
        """As `Tuned.log_rho`."""
        return self.transition.log_rho(k, p)

    def log_prob(
        self, x: Tensor, x_next: Tensor, k: int | Tensor, reduction: Literal["sum", "mean"] = "sum", **cond: Any
    ) -> Tensor:
        """log p(x_{k+1} | x_k) with the trained noise: (B,) nats, or nats per dimension with reduction="mean".

        The official `log_prob_step` uses the noise that the schedule began with, which is wrong once it was trained.
        """
        logs = self.step(x, k, **cond).log_prob(x_next)
        return logs / max(1, math.prod(x.shape[1:])) if reduction == "mean" else logs

    @torch.no_grad()
    def rollout(
        self,
        start: int | Tensor,
        noise: NoiseSource | None = None,
        cond: Mapping[str, Any] | None = None,
        *,
        then: Callable[[Tensor, int], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Rollout:
        """Trajectories in evaluation mode, without a graph, keeping the T + 1 states alone.

        Arguments:
            start: How many, from the prior; or the first states x_0 themselves (B, *).
            noise: (step, like) -> standard normals, `INITIAL` for x_0; `Noise` is one, None is torch's generator.
            cond: Conditions by name, each (B, ...).
            then: A map (x_{k+1}, k) -> x_{k+1} of each drawn state, such as guidance.
            dtype: Of the states, when `start` is a number.
        """
        if isinstance(start, int):
            if self.shape is None:
                raise ValueError("`shape` of one sample is unknown: give it to the policy, or pass the first states as `start`")
            like = torch.empty(start, *self.shape, dtype=dtype, device=self.denoiser.device)
            start = self.prior(torch.randn_like(like) if noise is None else noise(INITIAL, like))
        states = start.new_empty(self.T + 1, *start.shape)
        moves = start.new_empty(self.T, len(start))
        states[0] = start
        bound = self.denoiser.bind(**(cond or {}))
        with evaluating(self.denoiser):
            for k in range(self.T):
                p = self.transition.at(bound, states[k], k).p
                x = p.sample(torch.randn_like(start) if noise is None else noise(k, start))
                states[k + 1] = x if then is None else then(x, k)
                del p, x
                moves[k] = (states[k + 1] - states[k]).square_().flatten(1).mean(1)
        return Rollout(states, moves, dict(cond or {}))

    @torch.no_grad()
    def _measure(self, n: int = 8) -> None:
        """Takes the kernel's standard deviations along n trajectories; without conditions where a denoiser answers so."""
        if self.shape is None:
            return
        generator, stds = torch.Generator().manual_seed(0), []
        noise = torch.randn(self.T + 1, n, *self.shape, generator=generator, dtype=_dtype(self.denoiser))
        noise = noise.to(self.denoiser.device)
        with evaluating(self.denoiser):
            x = self.prior(noise[0])
            for k in range(self.T):
                try:
                    p = self.step(x, k)
                except (KeyError, RuntimeError, TypeError, ValueError):  # no conditions, no answer: those with x0 known stay
                    return
                stds.append(self.transition.rho(k, p).log().mean())
                x = p.sample(noise[k + 1])
        factors = self.transition.log_rhos.reshape(self.T, -1).mean(1)
        self.transition.kernel_std = (torch.stack(stds).double() - factors).exp().tolist()

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


def _dtype(denoiser: Denoiser) -> torch.dtype:
    """Of a denoiser's tensors, float32 at least; torch's default if it has none."""
    tensors = (t for t in (*denoiser.parameters(), *denoiser.buffers()) if t.is_floating_point())
    tensor = next(tensors, None)
    return torch.get_default_dtype() if tensor is None else torch.promote_types(tensor.dtype, torch.float32)
