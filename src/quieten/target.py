r"""Stable targets: the average of the clean data that a noisy example may come from, in place of the one it came from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .denoiser import Form, form_coefficients
from .objective import Batch, Noised, Regression
from .targets.pools import PoolName, ReferencePool, References, make_pool
from .targets.posterior import posterior, wide

if TYPE_CHECKING:
    from .data import Dataset
    from .training.schema import Recipe

__all__ = ["StableTarget", "TargetStats", "from_recipe", "stable_target"]


class TargetStats(NamedTuple):
    """What the weights of a stable target say, for free.

    Attributes:
        ess: Effective number of references, 1 / sum_j w_j^2, float64 (B,).
        largest: Largest weight (B,).
        variance: sum_j w_j ||y_j - T||^2 over all elements (B,), in the squared unit of the data: what the average took away.
        square: sum_j w_j y_j^2 (B, *), an unbiased target for E[x0^2 | x_t]; None unless asked for with `moments`.
    """

    ess: Tensor
    largest: Tensor
    variance: Tensor
    square: Tensor | None = None


@overload
def stable_target(
    x: Tensor,
    refs: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    *,
    source: Tensor | None = ...,
    mask: Tensor | None = ...,
    out: Form = ...,
    chunk: int | None = ...,
    stats: Literal[False] = ...,
    moments: bool = ...,
    tail: float | None = ...,
    precise: bool | None = ...,
) -> Tensor: ...
@overload
def stable_target(
    x: Tensor,
    refs: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    *,
    source: Tensor | None = ...,
    mask: Tensor | None = ...,
    out: Form = ...,
    chunk: int | None = ...,
    stats: Literal[True],
    moments: bool = ...,
    tail: float | None = ...,
    precise: bool | None = ...,
) -> tuple[Tensor, TargetStats]: ...
@torch.no_grad()
def stable_target(
    x: Tensor,
    refs: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    *,
    source: Tensor | None = None,
    mask: Tensor | None = None,
    out: Form = "x0",
    chunk: int | None = None,
    stats: bool = False,
    moments: bool = False,
    tail: float | None = None,
    precise: bool | None = None,
) -> Tensor | tuple[Tensor, TargetStats]:
    r"""The average of the references, weighted by how likely each is the clean version of x.

    .. math:: T = \sum_j w_j y_j, \quad w = \mathrm{softmax}_j\left(-\|x - \alpha y_j\|^2 / (2 \sigma^2)\right)

    When x comes from one of the references, all of which were equally likely, T is the exact mean of that clean example given x
    and the set: regressing on it has the same optimum as regressing on the example itself, E[T | x] = E[x0 | x] for every n,
    and less variance. (The paper's abstract speaks of a bias; the algorithm has none.)

    Arguments:
        x: Noisy data (B, *), float32 or float64.
        refs: References (n, *), floats, the clean versions of x among them, exactly as they were noised.
        alpha: Signal scale, a float or a tensor of shape () or (B,).
        sigma: Noise scale above 0, likewise, in the unit of the data.
        source: Which reference each row comes from, int64 (B,): keeps more digits of "eps", and is checked against x.
        mask: Which references a row may use, bool (B, n), such as those of the same label. Unbiased if it says nothing about
            the source but what the network is told.
        out: What to return: "x0" is T, and "eps", "v", "score", "flow", "edm" or any other form follow from it.
        chunk: References that are multiplied at once; None suits the device. Never changes the result beyond rounding.
        stats: Whether to return `TargetStats` too.
        moments: Whether the statistics hold the second moment.
        tail: Extra dimensions of PFGM++'s heavy-tailed kernel, log-weights -(D + tail)/2 log(||x - alpha y||^2 + sigma^2 tail),
            for noise of that kind; None is the Gaussian.
        precise: Whether distances are computed in float64 throughout; None does so for the rows that need it (more than 15
            near-duplicates of the nearest reference), which waits for the device.

    Returns:
        The target (B, *), in the dtype of x, without gradient; with `stats` a pair.

    Raises:
        ValueError: For sigma <= 0 or not finite, no references, references of integers, another shape or device, a row without
            any reference, or a source from which x cannot come.

    References:
        | Stable Target Field for Reduced Variance Score Estimation in Diffusion Models (Xu et al., 2023), eq. 4 to 6
        | https://arxiv.org/abs/2302.00670
        | PFGM++: Unlocking the Potential of Physics-Inspired Generative Models (Xu et al., 2023), for `tail`
        | https://arxiv.org/abs/2302.04265

    Example:
        >>> refs = torch.tensor([[-1.0], [1.0]])
        >>> stable_target(torch.tensor([[0.1]]), refs, 1.0, 0.5)  # tanh(x / sigma^2)
        tensor([[0.3799]])
    """
    _check_shapes(x, refs, source, mask, tail)
    flat, y = _flat(x), _flat(refs)
    a, s = (_per_row(value, x, name) for name, value in (("alpha", alpha), ("sigma", sigma)))
    _check_values(flat, y, source, a, s, mask, gaussian=tail is None)
    base = None if source is None else y[source]
    p = posterior(flat, y, a, s, base=base, mask=mask, tail=tail, chunk=chunk, precise=precise, spread=moments)
    alpha_, sigma_ = a[:, None], s[:, None]
    coefficient_eps, coefficient_x0 = form_coefficients(out, alpha_, sigma_)
    eps = (flat - alpha_ * p.base - alpha_ * p.shift) / sigma_
    target = (coefficient_eps * eps + coefficient_x0 * (p.base + p.shift)).to(x.dtype).reshape(x.shape)
    if not stats:
        return target
    square = None if p.spread is None else (p.base.square() + 2 * p.base * p.shift + p.spread).to(x.dtype).reshape(x.shape)
    return target, TargetStats(p.ess, p.largest, p.within, square)


def _flat(x: Tensor) -> Tensor:
    """Examples as rows (B, D), of any shape, no rows or scalars too."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _per_row(value: float | Tensor, x: Tensor, name: str) -> Tensor:
    """A level's number for each row (B,), in the widest type of the device."""
    value = torch.as_tensor(value, dtype=wide(x.device), device=x.device)
    if value.ndim > 1 or (value.ndim == 1 and value.shape != (len(x),)):
        raise ValueError(f"`{name}` must be a float or have shape () or ({len(x)},) (got {tuple(value.shape)})")
    return value.expand(len(x))


def _check_shapes(x: Tensor, refs: Tensor, source: Tensor | None, mask: Tensor | None, tail: float | None) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`x` must be float32 or float64 (got {x.dtype}): keep states wide")
    if not refs.is_floating_point():
        raise ValueError(f"`refs` must be floats in the unit of x (got {refs.dtype}): pixels become x / 127.5 - 1")
    if refs.ndim != x.ndim or x.ndim < 1 or refs.shape[1:] != x.shape[1:]:
        raise ValueError(f"`refs` must have shape (n, {', '.join(map(str, x.shape[1:]))}) as x has (got {tuple(refs.shape)})")
    if len(refs) < 1:
        raise ValueError("`refs` is empty: give at least one reference, the clean version of x among them")
    if refs.device != x.device:
        raise ValueError(f"`refs` is on {refs.device}, x on {x.device}: move one of them")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (len(x), len(refs))):
        raise ValueError(f"`mask` must be bool of shape ({len(x)}, {len(refs)}) (got {mask.dtype} {tuple(mask.shape)})")
    if source is not None and (source.shape != (len(x),) or source.is_floating_point() or source.dtype == torch.bool):
        raise ValueError(
            f"`source` must hold one integer for each of the {len(x)} rows (got {source.dtype} {tuple(source.shape)})"
        )
    if tail is not None and tail <= 0:
        raise ValueError(f"`tail` must be above 0 (got {tail}): None is the Gaussian kernel")


def _check_values(
    x: Tensor, refs: Tensor, source: Tensor | None, alpha: Tensor, sigma: Tensor, mask: Tensor | None, gaussian: bool
) -> None:
    """Refuses numbers that make no sense, with one look at the device."""
    zero = torch.zeros((), dtype=torch.bool, device=x.device)
    wrong = outside = zero
    if source is not None:
        outside = ((source < 0) | (source >= len(refs))).any()
    if source is not None and gaussian:  # a heavy tail reaches everywhere
        base = refs[source.clamp(0, len(refs) - 1)]
        rounding = 4 * torch.finfo(x.dtype).eps * (x.norm(dim=1) + alpha * base.norm(dim=1))
        far = (x - alpha[:, None] * base).norm(dim=1)  # a chi-distributed number of sigmas: 12 beyond the mean is out of reach
        wrong = (far > sigma * (x.shape[1] ** 0.5 + 12) + rounding).any()
    checks = [
        (~(sigma > 0) | ~sigma.isfinite()).any(),
        (~alpha.isfinite()).any(),
        zero if mask is None else (~mask.any(1)).any(),
        zero if mask is None or mask.shape[1] < 2 else (mask.sum(1) < 2).any(),
        wrong,
        outside,
    ]
    bad_sigma, bad_alpha, empty, alone, elsewhere, missing = torch.stack(checks).tolist()
    if bad_sigma:
        raise ValueError(
            f"`sigma` must be positive and finite (got {_least(sigma)}): there is nothing to average without noise"
        )
    if bad_alpha:
        raise ValueError("`alpha` must be finite: check the schedule")
    if empty:
        raise ValueError("`mask` leaves a row without any reference: let each row use at least its own source")
    if missing:
        raise ValueError(f"`source` must name references by their places, 0 to {len(refs) - 1}: it holds others")
    if elsewhere:
        raise ValueError("`source` names a reference from which x cannot come at its sigma: put the clean examples among "
                         "`refs` exactly as they were noised, and say where")  # fmt: skip
    if alone:
        warnings.warn("`mask` leaves a row with one reference: its target is the plain one", UserWarning, stacklevel=3)


def _least(sigma: Tensor) -> str:
    bad = sigma[~(sigma > 0) | ~sigma.isfinite()]
    return f"{float(bad[0]):g}"


class StableTarget:
    r"""Regresses on stable targets: what `objective.Denoising` takes as its `target`.

    The references of a step are the clean examples of the batch and more of them from a pool. What the network is told, it
    compares: an example uses the references that share its conditions, those whose condition was dropped use all. So the
    target stays unbiased given the conditions, which the official code's is not. An augmentation that the network is told of
    (condition "augment", see `augment.EDMAugment`) is undone where it is a mirror, and done again to the target; examples that
    were moved otherwise keep the plain target.

    Arguments:
        pool: Where references come from; None is the batch itself.
        references: How many of them in all, the batch included; None is the whole pool.
        null: Values of conditions that mean "none", such as {"label": 10}.
        match: Conditions that references must share; None is all that the batch has. Leaving one out that the network sees
            biases what it learns about it: `()` is the official code's behaviour.
        flip: Whether examples were mirrored at random without the network being told: each reference then counts mirrored too.
        source_in_set: False leaves each example out of its own references: biased, to see by how much.
        precise: As in `stable_target`.

    References:
        | Stable Target Field for Reduced Variance Score Estimation in Diffusion Models (Xu et al., 2023), algorithm 1
        | https://arxiv.org/abs/2302.00670
    """

    def __init__(
        self,
        pool: ReferencePool | None = None,
        references: int | None = 1024,
        *,
        null: Mapping[str, float] | None = None,
        match: Collection[str] | None = None,
        flip: bool = False,
        source_in_set: bool = True,
        precise: bool | None = None,
    ):
        if references is not None and references < 1:
            raise ValueError(f"`references` must be at least 1 (got {references}), or None for the whole pool")
        self.pool, self.references = ReferencePool() if pool is None else pool, references
        self.null, self.match, self.flip = dict(null or {}), match, flip
        self.source_in_set, self.precise = source_in_set, precise
        self._warned = False

    @property
    def ahead(self) -> bool:
        """Whether references can be drawn in the thread that reads batches."""
        return self.pool.ahead

    def prepare(
        self, batch: Batch, seed: int, step: int, taken: Tensor | None = None, device: torch.device | None = None
    ) -> References:
        """The references of a step.

        Arguments:
            batch: All examples of the step that this process has.
            seed: Of the training.
            step: Of the training.
            taken: Numbers of the examples that all processes have in this step, int64; None is those of the batch.
            device: Where the references are needed; None is where the batch is.
        """
        x0, index, cond = batch.x0, batch.index, dict(batch.cond)
        if (label := cond.pop("augment", None)) is not None:
            from .training.augment import isometric, mirrored

            kept = isometric(label)
            x0, index = mirrored(x0, label)[kept], index[kept.to(index.device)]
            cond = {name: value[kept] for name, value in cond.items()}
        taken = batch.index if taken is None else taken
        return self.pool.draw(index, self.references, cond, x0=x0, taken=taken, seed=seed, step=step, device=device)

    @torch.no_grad()
    def __call__(self, noised: Noised, batch: Batch) -> Regression:
        """Targets for (x0, eps), and what the average took away from the loss."""
        refs = batch.refs
        if refs is None:
            seed, step = (0, 0) if noised.draws is None else (noised.draws.noise.seed, noised.draws.step)
            refs = self.prepare(batch, seed, step)
        told = dict(noised.cond or batch.cond)
        label = told.pop("augment", None)
        x_t, x0, plain = noised.x_t, noised.x0, ~torch.isin(batch.index, refs.index.to(batch.index.device))
        plain = plain.to(x0.device)
        if label is not None:
            from .training.augment import isometric, mirrored

            x_t, x0, plain = mirrored(x_t, label), mirrored(x0, label), plain | ~isometric(label)
        mask, unknown = self._mask(told, refs)
        plain = plain if unknown is None else plain | unknown
        if not self.source_in_set:
            others = (batch.index[:, None].cpu() != refs.index[None]).to(x0.device)
            mask = others if mask is None else mask & others
            plain = plain | ~mask.any(1)
        if mask is not None:
            mask |= plain[:, None]  # their averages are not used, but must exist
        shift, within = self._posterior(x_t, x0, refs, noised, mask)
        shift = shift.masked_fill(plain.view(-1, *[1] * (x0.ndim - 1)), 0.0).to(x0.dtype)
        if label is not None:
            shift = mirrored(shift, label)
        eps = noised.eps - noised.alpha / noised.sigma * shift
        return Regression(noised.x0 + shift, eps, within.masked_fill(plain, 0.0))

    def _mask(self, told: Mapping[str, Tensor], refs: References) -> tuple[Tensor | None, Tensor | None]:
        """Which references each row may use (B, n), and the rows that none can serve (B,); None is all, and none."""
        mask: Tensor | None = None
        unknown: Tensor | None = None
        for name, value in told.items():
            if self.match is not None and name not in self.match:
                continue
            free = torch.zeros(len(value), dtype=torch.bool, device=value.device)
            if name in self.null:
                free = _flat(value == self.null[name]).all(1)
            if name not in refs.cond:
                self._warn(name)
                unknown = ~free if unknown is None else unknown | ~free
                continue
            own = refs.cond[name].to(value.device)
            same = (value[:, None] == own[None]).flatten(2).all(2) if value.ndim > 1 else value[:, None] == own[None]
            open_to_all = free[:, None] if refs.mixed is None else free[:, None] & refs.mixed.to(value.device)
            mask = same | open_to_all if mask is None else mask & (same | open_to_all)
        return mask, unknown

    def _warn(self, name: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the references do not know the condition {name!r}: examples that have it keep the plain target; take the "
                "pool 'batch', or leave the condition out of `match`",
                UserWarning,
                stacklevel=4,
            )

    def _posterior(
        self, x_t: Tensor, x0: Tensor, refs: References, noised: Noised, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Shift from x0 to the target (B, *), float64, and the variance within the references (B,)."""
        y, alpha, sigma = _flat(refs.x0), noised.alpha.flatten(), noised.sigma.flatten()
        if not self.flip:
            p = posterior(_flat(x_t), y, alpha, sigma, base=_flat(x0), mask=mask, precise=self.precise)
            return p.shift.view(x0.shape), p.within
        # the weight of a mirrored reference is the reference's own, seen from the mirrored state
        both, clean = (_flat(torch.cat([value, value.flip(-1)])) for value in (x_t, x0))
        alpha, sigma, mask = alpha.repeat(2), sigma.repeat(2), None if mask is None else mask.repeat(2, 1)
        p = posterior(both, y, alpha, sigma, base=clean, mask=mask, precise=self.precise)
        (near, far), (log_near, log_far) = p.shift.chunk(2), p.log_z.chunk(2)
        far = _flat(far.view(x0.shape).flip(-1))
        share = torch.sigmoid(log_far - log_near)[:, None]
        shift = torch.lerp(near, far, share)
        within_near, within_far = p.within.chunk(2)
        within = torch.lerp(within_near, within_far, share[:, 0]) + (share * (1 - share) * (near - far).square()).sum(1)
        return shift.view(x0.shape), within


def from_recipe(
    recipe: Recipe,
    data: Dataset | None,
    classes: int,
    references: int | Literal["all"] = 1024,
    pool: PoolName = "bank",
    cluster: int = 16,
    match: tuple[str, ...] | None = None,
    precise: bool | None = None,
) -> StableTarget:
    """The section `target: {kind: stable}` of a recipe.

    Arguments:
        recipe: Whose section it is.
        data: What is trained on.
        classes: How many labels there are.
        references: How many, the batch included, or "all".
        pool: A name in `pools.POOLS`.
        cluster: Size of the groups of the pool "cluster".
        match: As in `StableTarget`.
        precise: As in `StableTarget`.
    """
    null = {"label": classes} if classes else {}
    kind = make_pool(pool, data, cluster=cluster)
    count = None if references == "all" else references
    return StableTarget(kind, count, null=null, match=match, flip=recipe.data.flip, precise=precise)
