r"""The steps of a policy as a transition: the means of another, and noise that is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..encoding.encoded import Moving
from ..gaussian import Gaussian
from ..process import Level, Process
from ..schedule import check_grid
from ..transition import Step, Transition

__all__ = ["FLOOR", "TRAINED", "Trained", "Tuned"]

Trained = Literal["none", "all", "fix_last", "fix_last3"]

TRAINED: dict[str, int | None] = {"none": None, "all": 0, "fix_last": 1, "fix_last3": 3}
"""Which standard deviations are trained -> how many of the last stay as they are (None: all of them)."""

FLOOR = 1e-4
"""The least standard deviation that an entropy is counted with."""


class Tuned(Transition):
    """The steps of a policy as a transition: the mean of another one, the standard deviation of a table.

    A pure function like every transition, for the levels of its own grid alone. Samplers, bounds, guidance and splits take it
    as they take `Ancestral`; draw the last step too (`last="draw"`), as the policy does.

    Arguments:
        inner: Whose mean is kept: any Gaussian transition without memory.
        process: Of the denoiser it will be used with.
        grid: Log-SNRs from noise to data, rising: T + 1 of them.
        std: Standard deviations, (T,) or (T, *shape), or one for all steps; None takes those of `inner` with x0 known, and
            "kernel" whatever the kernel has, step by step (learned variances), of which the table then holds a factor.
        trained: Which of them are trained: see `TRAINED`.
        last_std: Standard deviation of the last step where the kernel has none, as in a step to lam = +inf; with `std` as a
            tensor or a number, that holds there too.
        shape: Shape of one example, for transitions that want to know it.
        mean_map: Applied to the means, such as a projection to a sphere.
        adhoc_scale1: Factor on the share of the mean that is not alpha_s / alpha_t x_t: the noise term of the official code.
        adhoc_scale2: Factor on the initial standard deviations.
        dtype: Of the table, where `std` is no tensor; None is torch's default.

    Attributes:
        lams: Its levels, T + 1 floats.
        log_std: The trained table, logarithms of (T,) or (T, *shape); entries that are not trained have no effect.
        start: The same as it was at first, which entries that are not trained keep.
        T: Number of steps.
        kernel_std: Standard deviations of the kernel itself, T floats: those with x0 known, until somebody measures others.
        takes_rows: Whether `inner` takes a level for each row, so that `at` does too.

    Raises:
        ValueError: For a grid that does not rise, standard deviations that are not positive, a transition that is deterministic
            (unless `std` says how much noise it gets), that remembers steps, or whose kernel is no Gaussian.
    """

    start: Tensor

    own_noise = True

    def __init__(
        self,
        inner: Transition,
        process: Process,
        grid: Tensor,
        std: Tensor | float | Literal["kernel"] | None = None,
        trained: Trained = "fix_last",
        *,
        last_std: float = 1e-3,
        shape: tuple[int, ...] | None = None,
        mean_map: Callable[[Tensor], Tensor] | None = None,
        adhoc_scale1: float = 1.0,
        adhoc_scale2: float = 1.0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.lams, self.eta = check_grid(grid), inner.eta
        self.inner, self.process, self.mean_map, self.adhoc_scale1 = inner, process, mean_map, float(adhoc_scale1)
        self.shape, self.T, self.last_std = shape, len(self.lams) - 1, _positive("last_std", last_std)
        self.from_kernel = isinstance(std, str)
        if isinstance(std, str) and std != "kernel":
            raise ValueError(f"`std` must be a number, a tensor, 'kernel' or None (got {std!r})")
        noise = _probed(inner, process, self.lams, shape, needs_noise=std is None)
        self.kernel_std = [*noise[:-1], self.last_std if self.lams[-1] == math.inf else noise[-1]]
        table = self._table(std, noise, shape) * _positive("adhoc_scale2", adhoc_scale2)
        dtype = table.dtype if isinstance(std, Tensor) else torch.get_default_dtype() if dtype is None else dtype
        if trained not in TRAINED:
            raise ValueError(f"`trained` must be one of {', '.join(TRAINED)} (got {trained!r})")
        kept = TRAINED[trained]
        if kept is not None and kept >= self.T and kept > 1:
            raise ValueError(f"`trained`={trained!r} leaves none of {self.T} steps to train: use 'fix_last', or 'none'")
        self.trained: Trained = trained
        self.takes_rows = _takes_rows(inner, process, self.lams, shape)
        self._free = 0 if kept is None else self.T - kept
        self._exact = None if isinstance(std, Tensor) else table
        self.log_std = nn.Parameter(table.to(dtype).log(), requires_grad=self._free > 0)
        self.register_buffer("start", table.to(dtype).log())
        self._placed: dict[torch.device, Tensor] = {}

    def _table(self, std: Any, noise: list[float], shape: tuple[int, ...] | None) -> Tensor:
        """The initial standard deviations, checked: (T,) or (T, *shape)."""
        if isinstance(std, str):
            return torch.ones(self.T, dtype=torch.float64)
        if std is None:
            return torch.tensor([*noise[:-1], noise[-1] or self.last_std], dtype=torch.float64)
        table = std.detach().clone() if isinstance(std, Tensor) else torch.as_tensor(std, dtype=torch.float64)
        table = table if table.is_floating_point() else table.float()
        table = table.expand(self.T).clone() if table.ndim == 0 else table
        if len(table) != self.T or (table.ndim > 1 and shape is not None and tuple(table.shape[1:]) != tuple(shape)):
            wanted = f"({self.T},)" + (f" or {(self.T, *shape)}" if shape is not None else "")
            raise ValueError(f"`std` must be a number or have shape {wanted} (got {tuple(table.shape)}): one for each step")
        if not bool((table > 0).all() and table.isfinite().all()):
            raise ValueError(f"`std` must be positive and finite everywhere (its least is {float(table.min()):.3g}): "
                             f"{FLOOR:g} is as good as none")  # fmt: skip
        return table

    def _apply(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Tuned:
        """As every module, and `.double()` brings the digits back that a table in float32 has lost, where nobody changed it."""
        had = self.start.dtype
        super()._apply(fn, *args, **options)
        if self._exact is not None and torch.finfo(self.start.dtype).eps < torch.finfo(had).eps:
            built, exact = (table.log().to(self.start) for table in (self._exact.to(had), self._exact))
            with torch.no_grad():
                for table in (self.start, self.log_std):
                    table.copy_(torch.where(table == built, exact, table))
        return self

    # -- steps

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Level, lam_s: Level, memory: Any = None) -> Step:
        return self.at(denoiser, x_t, self.index(lam_t, lam_s))

    def at(self, denoiser: Denoiser, x: Tensor, k: int | Tensor) -> Step:
        """Step k from x_k (B, *): p is p(x_{k+1} | x_k).

        Arguments:
            denoiser: Conditions bound.
            x: States (B, *).
            k: The step, 0 to T - 1; or one for each row, int64 (B,).
        """
        lam_t, lam_s = self.levels(k, x.device)
        step = self.inner(denoiser, x, lam_t, lam_s)
        mean = step.p.mean
        if self.adhoc_scale1 != 1.0:
            (alpha_t, _), (alpha_s, _) = self.process.scales_over(lam_t, x), self.process.scales_over(lam_s, x)
            kept = x * (alpha_s / alpha_t)
            mean = kept + self.adhoc_scale1 * (mean - kept)
        if self.mean_map is not None:
            mean = self.mean_map(mean)
        var = (2.0 * self._rows(self.log_rhos, k, x)).exp()
        var = var.to(mean.dtype) if var.dtype == torch.float64 else var  # states keep their dtype
        if self.from_kernel:
            return Step(Gaussian(mean, var.to(x) * self._kernel_var(step.p, k, x), step.p.basis), step.x0)
        return Step(Gaussian(mean, var), step.x0)

    def index(self, lam_t: Level, lam_s: Level | None = None) -> int | Tensor:
        """The step that starts at a level: an int for a float, int64 (B,) for a tensor.

        Raises:
            ValueError: For levels that are no step of the grid.
        """
        if isinstance(lam_t, Tensor):
            grid = self._grid(lam_t.device)[:-1].to(lam_t)
            return (lam_t.reshape(-1, 1) - grid.masked_fill(grid.isinf(), -1e30)).abs().argmin(1)
        near = [k for k in range(self.T) if _same(self.lams[k], lam_t)]
        if not near or (isinstance(lam_s, float) and not _same(self.lams[near[0] + 1], lam_s)):
            levels = ", ".join(f"{lam:.4g}" for lam in self.lams)
            raise ValueError(f"`grid` must be the policy's own, {levels} (got a step from {lam_t} to {lam_s}): "
                             "a policy is trained for its steps alone")  # fmt: skip
        return near[0]

    def levels(self, k: int | Tensor, device: torch.device | None = None) -> tuple[Level, Level]:
        """(lam_t, lam_s) of step k: floats for an int, tensors (B,) for int64 (B,).

        Raises:
            ValueError: For a step that there is not; on other devices than the CPU torch says so.
        """
        if isinstance(k, int):
            if not 0 <= k < self.T:
                raise ValueError(f"`k` must lie in 0..{self.T - 1} (got {k})")
            return self.lams[k], self.lams[k + 1]
        if k.device.type == "cpu" and k.numel() and not 0 <= int(k.min()) <= int(k.max()) < self.T:
            raise ValueError(f"`k` must lie in 0..{self.T - 1} (got {k.tolist()})")
        grid = self._grid(k.device if device is None else device)
        return grid[k], grid[k + 1]

    def response(self, k: int) -> float:
        """By how much the mean of step k moves when the estimate of x0 moves by 1, in every dimension."""
        lam_t, lam_s = self.levels(k)
        x, small = torch.zeros(1, *(self.shape or (1,)), dtype=torch.float64), 2.0**-7  # within any bound on x0
        means = [self.inner(_Nothing(self.process, self.shape, c), x, lam_t, lam_s).p.mean for c in (0.0, small)]
        return self.adhoc_scale1 * float((means[1] - means[0]).mean()) / small

    # -- noise

    @property
    def log_rhos(self) -> Tensor:
        """Logarithms of the standard deviations in use, (T,) or (T, *shape); of factors, where the kernel has its own."""
        if self._free == self.T:
            return self.log_std
        return torch.cat([self.log_std[: self._free], self.start[self._free :]])

    def log_rho(self, k: int | Tensor, p: Gaussian) -> Tensor:
        """The mean over dimensions of log rho_k, held at log `FLOOR` from below, without gradient there: () or (B,).

        Arguments:
            k: The step, or one for each row.
            p: What `at` returned for it.
        """
        floor = math.log(FLOOR)
        if self.from_kernel:
            return (0.5 * p.var.log()).clamp_min(floor).expand_as(p.mean).flatten(1).mean(1)
        table = self.log_rhos.clamp_min(floor)
        table = table.flatten(1).mean(1) if table.ndim > 1 else table
        return table[k]

    @property
    def rhos(self) -> Tensor:
        """The standard deviation of each step, geometric mean over dimensions: (T,), without a graph.

        Where the kernel has its own, which depends on the state, that of `kernel_std`; `rho` has the one of a step.
        """
        logs = self.log_rhos.detach()
        rhos = (logs.flatten(1).mean(1) if logs.ndim > 1 else logs).exp()
        return rhos * rhos.new_tensor(self.kernel_std) if self.from_kernel else rhos

    def rho(self, k: int | Tensor, p: Gaussian) -> Tensor:
        """The standard deviation of step k, geometric mean over dimensions, without a graph: (), or (B,) of a kernel's own.

        Arguments:
            k: The step, or one for each row.
            p: What `at` returned for it.
        """
        if not self.from_kernel:
            return self.rhos[k]
        return (0.5 * p.var.detach().log()).expand_as(p.mean).flatten(1).mean(1).exp()

    def _rows(self, table: Tensor, k: int | Tensor, x: Tensor) -> Tensor:
        """The entries of a table for step k, shaped to multiply x."""
        rows = table[k]
        return rows.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(k, Tensor) and table.ndim == 1 else rows

    def _kernel_var(self, p: Gaussian, k: int | Tensor, x: Tensor) -> Tensor:
        """The kernel's own variance, and that of `last_std` in the step to the data."""
        last = self.last_std**2
        if self.lams[-1] < math.inf:
            return p.var.to(x)
        if isinstance(k, int):
            return x.new_full((), last) if k == self.T - 1 else p.var.to(x)
        return torch.where(self._rows(torch.arange(self.T, device=k.device) == self.T - 1, k, x), last, p.var.to(x))

    def _grid(self, device: torch.device) -> Tensor:
        if device not in self._placed:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._placed[device] = torch.tensor(self.lams, dtype=dtype, device=device)
        return self._placed[device]

    def extra_repr(self) -> str:
        return f"T={self.T}, trained={self.trained}"


# ---- what it is built from


class _Nothing(Denoiser):
    """A denoiser that answers 0, or another number, to see what noise a transition adds and what it makes of an answer."""

    def __init__(self, process: Process, shape: tuple[int, ...] | None, answer: float = 0.0):
        super().__init__()
        self.process, self.shape, self.answer = process, shape, answer

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        return Moving(torch.full_like(x, self.answer), rate=torch.zeros_like(x))


def _probed(
    inner: Transition, process: Process, lams: list[float], shape: tuple[int, ...] | None, needs_noise: bool
) -> list[float]:
    """The standard deviation of each step of a transition, x0 known; refuses transitions that make no policy."""
    x, stds = torch.zeros(1, *(shape or (1,)), dtype=torch.float64), []
    name = type(inner).__name__
    for k, (lam_t, lam_s) in enumerate(pairwise(lams)):
        step = inner(_Nothing(process, shape), x, lam_t, lam_s)
        if step.memory is not None or step.then is not None:
            raise ValueError(f"`transition` {name} remembers earlier steps or maps the drawn state, steps of a policy stand "
                             "alone: use Ancestral(spread=False)")  # fmt: skip
        if not isinstance(step.p, Gaussian):
            raise ValueError(f"`transition` {name} has kernels without a density: use a Gaussian one, such as Ancestral()")
        std = 0.0 if step.p.is_point else float(step.p.var.double().mean().sqrt())
        std = std if std > 1e-8 else 0.0  # levels that should be equal differ in their last digit
        if needs_noise and not std and k < len(lams) - 2:
            raise ValueError(f"`transition` {name} adds no noise in step {k}, so there is no policy to train: "
                             "use Ancestral(eta) with eta > 0, or inject noise by `std`")  # fmt: skip
        stds.append(std)
    return stds


def _takes_rows(inner: Transition, process: Process, lams: list[float], shape: tuple[int, ...] | None) -> bool:
    """Whether a transition gives rows of different levels what it gives each of them."""
    x = torch.ones(len(lams) - 1, *(shape or (1,)), dtype=torch.float64)
    levels, nothing = torch.tensor(lams, dtype=torch.float64), _Nothing(process, shape)
    try:
        mean = inner(nothing, x, levels[:-1], levels[1:]).p.mean
    except (RuntimeError, TypeError, ValueError):  # a test of a level as a truth, or math on it
        return False
    alone = [inner(nothing, x[k : k + 1], a, b).p.mean for k, (a, b) in enumerate(pairwise(lams))]
    return torch.allclose(mean, torch.cat(alone))  # and not where the step to +inf is a case of its own


def _same(a: float, b: Any) -> bool:
    return a == b or (isinstance(b, float) and abs(a - b) <= 1e-6 * max(1.0, abs(a)))


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be positive and finite (got {value})")
    return float(value)
