r"""The one sampling loop, and the one place where a state is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser, evaluating
from .gaussian import Gaussian
from .noise import INITIAL, Noise
from .schedule import check_grid
from .transition import Ancestral, Step, Transition

__all__ = ["State", "draw", "generate", "sample", "trajectory"]

NoiseSource = Callable[[int, Tensor], Tensor]
"""(position in the grid, state) -> standard normals of its shape; `Noise` is one."""


class State(NamedTuple):
    """A state of the loop.

    Attributes:
        x: (B, *).
        lam: Its log-SNR.
        step: The step that led here; None for the initial state.
    """

    x: Tensor
    lam: float
    step: Step | None


def draw(step: Step, index: int, noise: NoiseSource | None, mean: bool = False) -> Tensor:
    """The next state of a step: its mean, or a sample of its kernel; then what the step asks for after the draw."""
    p = step.p
    if mean or (isinstance(p, Gaussian) and p.is_point):
        x = p.mean
    else:
        x = p.sample(torch.randn_like(p.mean) if noise is None else noise(index, p.mean))
    return x if step.then is None else step.then(x)


def trajectory(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    transition: Transition | None = None,
    *,
    noise: NoiseSource | None = None,
    last: str = "mean",
) -> Iterator[State]:
    """The sampling loop, yielding every state, the initial one included. Gradients flow if they are enabled.

    Arguments:
        denoiser: Conditions bound.
        x: Initial state (B, *) at log-SNR grid[0], float32 or float64.
        grid: Log-SNRs from noise to data, rising; for transitions that revisit levels (`Churn`, `Langevin`) they may also
            repeat or fall; falling throughout is inversion by an ODE solver, and noising by `Ancestral`.
        transition: What takes the steps; None is `Ancestral()`.
        noise: Where the noise comes from; None is torch's global generator.
        last: "mean" returns the mean of a final kernel at lam = +inf, "draw" draws from it.

    Raises:
        ValueError: For a grid, state or `last` that makes no sense.
    """
    if last not in ("mean", "draw"):
        raise ValueError(f"`last` must be 'mean' or 'draw' (got {last!r})")
    _check_dtype("x", x.dtype)
    transition = Ancestral() if transition is None else transition
    lams = check_grid(grid, revisits=transition.revisits, falling=True)
    memory = None
    yield State(x, lams[0], None)
    for index, (lam_t, lam_s) in enumerate(pairwise(lams)):
        step = transition(denoiser, x, lam_t, lam_s, memory)
        memory = step.memory
        x = draw(step, index, noise, mean=lam_s == math.inf and last == "mean")
        yield State(x, lam_s, step)
        del step  # so that the next step can be computed in its memory


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    transition: Transition | None = None,
    *,
    noise: NoiseSource | None = None,
    last: str = "mean",
) -> Tensor:
    """Samples x_0 (B, *) from an initial state: the end of `trajectory`, without gradients.

    Example:
        >>> from quieten.oracle import GaussianData
        >>> from quieten.schedule import karras
        >>> data = GaussianData(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.1]))
        >>> x = data.process.prior(karras(10)[0].item()).sample(torch.randn(4, 2))
        >>> sample(data, x, karras(10)).shape
        torch.Size([4, 2])
    """
    for state in trajectory(denoiser, x, grid, transition, noise=noise, last=last):
        x = state.x
        del state  # its step's memory is free for the next
    return x


def generate(
    denoiser: Denoiser,
    n: int,
    *,
    grid: Tensor,
    transition: Transition | None = None,
    cond: Mapping[str, Any] | None = None,
    batch: int = 64,
    seed: int = 0,
    first: int = 0,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    last: str = "mean",
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draws n samples (n, *) in chunks: the same for a seed, whatever the chunks, to the rounding of the network.

    Arguments:
        denoiser: Conditions free or bound; switched to evaluation while it samples.
        n: Number of samples.
        grid: Log-SNRs from noise to data.
        transition: None is `Ancestral()`.
        cond: Conditions by name, each of shape (n, ...) or a number that all samples share.
        batch: Samples at once.
        seed: Key of the noise.
        first: Index of the first sample; sample i of a seed is the same in every call that covers it.
        shape: Shape of one sample; None asks the denoiser.
        dtype: Of the state.
        device: None is that of the denoiser.
        last: As in `trajectory`.
        progress: Called with the number of samples finished, after each chunk.

    Raises:
        ValueError: If the shape is unknown, a condition has another length than n, or the result is not finite.
    """
    shape = denoiser.shape if shape is None else tuple(shape)
    if shape is None:
        raise ValueError("`shape` of one sample is needed: this denoiser does not say it")
    _check_dtype("dtype", dtype)
    if n < 0 or batch < 1:
        raise ValueError(f"`n` must not be negative and `batch` at least 1 (got {n}, {batch})")
    device = denoiser.device if device is None else device
    transition = Ancestral() if transition is None else transition
    start = denoiser.process.prior(check_grid(grid, revisits=transition.revisits)[0])
    full = {name: _rows(name, value, n, device) for name, value in (cond or {}).items()}
    out = torch.empty(n, *shape, dtype=dtype, device=device)
    with evaluating(denoiser):
        for i in range(0, n, batch):
            rows = slice(i, min(i + batch, n))
            noise = Noise(seed, range(first + i, first + rows.stop))
            bound = denoiser.bind(**{name: value[rows] for name, value in full.items()})
            x = start.sample(noise(INITIAL, out[rows]))
            out[rows] = sample(bound, x, grid, transition, noise=noise, last=last)
            if progress is not None:
                progress(rows.stop)
    bad = int((~out.isfinite()).flatten(1).any(1).sum()) if n else 0
    if bad:
        raise ValueError(f"{bad} of {n} samples are not finite: take more steps, a solver of lower order, or less guidance")
    return out


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`{name}` must be float32 or float64 (got {dtype}): only the network runs in less")


def _rows(name: str, value: Any, n: int, device: torch.device | str) -> Tensor:
    value = torch.as_tensor(value, device=device)
    if value.ndim == 0:
        return value.expand(n)
    if len(value) != n:
        raise ValueError(f"condition `{name}` has {len(value)} rows for {n} samples: give one for each, or a single number")
    return value
