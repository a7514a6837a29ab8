r"""Averages over a set of references, weighted as x_t says: the exact posterior mean when the clean data are that set.

The weights are softmax_j(-||x - alpha y_j||^2 / (2 sigma^2)). Distances come from a product of matrices, so no
(B, n, D) tensor is ever made, and as differences from the distance to a base, one reference of each row, so that nothing
common to all cancels. Near the data a few nearest references share all the weight and the product has lost their digits:
the 16 nearest of each row are measured again, by direct differences in float64. Where more than those are near, all
products of the row are repeated in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["RESCORED", "Posterior", "full_precision", "posterior", "unpacked", "wide"]

RESCORED = 16
"""How many nearest references of each row are measured by direct differences."""

_WEIGHTS = 2**22  # held at once; 32 times as many on other devices than the CPU
_TOLERANCE = 4e-6  # of the data's scale: what the products of matrices may add to an average before float64 takes over


class Posterior(NamedTuple):
    """What the weights w_j of each row say; D is the number of elements of an example.

    Attributes:
        base: Where shifts are measured from (B, D), float64.
        shift: sum_j w_j y_j - base (B, D), float64: near the data it is small, and keeps its digits.
        log_z: log of the sum of the kernel over the references, such as log sum_j exp(-||x - alpha y_j||^2 / (2 sigma^2)) (B,).
        ess: Effective number of references, 1 / sum_j w_j^2 (B,).
        largest: Largest weight (B,).
        within: Variance within the set, sum_j w_j ||y_j - T||^2 (B,).
        spread: sum_j w_j (y_j - base)^2 (B, D), when asked for.
    """

    base: Tensor
    shift: Tensor
    log_z: Tensor
    ess: Tensor
    largest: Tensor
    within: Tensor
    spread: Tensor | None


def wide(device: torch.device) -> torch.dtype:
    """The widest floating type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def unpacked(refs: Tensor, dtype: torch.dtype) -> Tensor:
    """References as numbers: pixels stored as uint8 become k / 127.5 - 1, rounded as `Dataset.batch` rounds them."""
    if refs.dtype == torch.uint8:
        return refs.to(torch.float32).div_(127.5).sub_(1).to(dtype)
    return refs.to(dtype)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of matrices in the precision of their arguments: no autocast, no TF32, no bfloat16 inside float32."""
    with torch.autocast(device.type, enabled=False):
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        set_to = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, set_to, strict=True):
                backend.fp32_precision = value


@torch.no_grad()
def posterior(
    x: Tensor,
    refs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    tail: float | None = None,
    chunk: int | None = None,
    precise: bool | None = None,
    spread: bool = False,
) -> Posterior:
    """Weighs the references for each row.

    Arguments:
        x: Noisy rows (B, D), float32 or float64.
        refs: References (n, D), floats, or uint8 pixels (see `unpacked`), at least one if there are rows.
        alpha: Signal scale (B,).
        sigma: Noise scale (B,), above 0.
        base: Where shifts are measured from (B, D): best the clean row itself; None is the nearest reference.
        mask: Which references a row may use, bool (B, n), at least one in each row; None is all.
        tail: Extra dimensions D' of the heavy-tailed kernel of PFGM++; None is the Gaussian.
        chunk: References that are multiplied at once; None suits the device.
        precise: Whether the products are in float64; None decides for each row, which waits for the device.
        spread: Whether to return second moments too, at the price of one more product.
    """
    width, large = wide(x.device), x.device.type != "cpu"
    if not len(x) and not len(refs):  # an empty mini-batch that is its own pool: no row asks for any
        refs, mask = refs.new_zeros(1, refs.shape[1]), None
    chunk = chunk or max(64, (2**25 if large else 2**18) // max(1, x.shape[1]))  # on a CPU: what its cache holds
    rows = max(1, _WEIGHTS * (32 if large else 1) // len(refs))
    with full_precision(x.device):
        shared = _Shared(refs, unpacked(refs[:256], width).mean(0), tail, chunk, spread)
        parts = []
        for start in range(0, max(len(x), 1), rows):
            at = slice(start, start + rows)
            given = _Rows(
                x[at],
                alpha[at].to(width),
                sigma[at].to(width),
                None if base is None else base[at].to(width),
                None if mask is None else mask[at],
            )
            parts.append(_decided(given, shared, precise))
    return _joined(parts)


@dataclass(frozen=True)
class _Shared:
    """What all rows have in common; arguments as in `posterior`."""

    refs: Tensor
    centre: Tensor  # (D,), about the mean reference: any point will do, a near one keeps more digits
    tail: float | None
    chunk: int
    spread: bool

    def chunks(self, dtype: torch.dtype, centred: bool) -> Iterator[tuple[slice, Tensor]]:
        """References as numbers, some at a time, about their mean if asked; each is overwritten by the next."""
        size, given = min(self.chunk, len(self.refs)), self.refs.dtype
        centre, bytes_ = self.centre.to(dtype), given == torch.uint8 and dtype == torch.float32
        rows = size if centred or bytes_ else 0
        buffer = torch.empty(rows, self.refs.shape[1], dtype=dtype, device=self.refs.device)  # kept: fresh memory is slow
        for start in range(0, len(self.refs), size):
            y = self.refs[start : start + size]
            at = slice(start, start + len(y))
            if bytes_:
                y = buffer[: len(y)].copy_(y).div_(127.5).sub_(1)
            elif given != dtype:
                y = unpacked(y, dtype)
            yield at, torch.sub(y, centre, out=buffer[: len(y)]) if centred else y

    def logits(self, apart: Tensor, start: Tensor, sigma: Tensor) -> Tensor:
        """Log-weights relative to the base's; overwrites.

        Arguments:
            apart: ||x - alpha y||^2 - ||x - alpha base||^2 (B, m).
            start: ||x - alpha base||^2 (B,).
            sigma: (B,).
        """
        if self.tail is None:
            return apart.mul_((-0.5 / sigma.square()).to(apart)[:, None])
        begin = (start + self.tail * sigma.square()).to(apart)  # r^2 = sigma^2 D'
        return apart.div_(begin[:, None]).clamp_(min=-1.0 + 1e-7).log1p_().mul_(self.power)

    @property
    def power(self) -> float:
        """Exponent of the heavy-tailed kernel."""
        return -0.5 * (self.refs.shape[1] + (self.tail or 0.0))

    def at_base(self, start: Tensor, sigma: Tensor) -> Tensor:
        """The base's own logit (B,)."""
        if self.tail is None:
            return -0.5 * start / sigma.square()
        return self.power * torch.log(start + self.tail * sigma.square())


class _Rows(NamedTuple):
    """Rows few enough that (B, n) numbers fit the memory; arguments as in `posterior`."""

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    base: Tensor | None
    mask: Tensor | None


class _Top(NamedTuple):
    """Sums over the nearest references of each row, weights relative to exp(peak): all exact."""

    peak: Tensor
    total: Tensor
    squares: Tensor  # of the weights
    largest: Tensor
    far: Tensor  # sum of w ||y - base||^2
    shift: Tensor
    spread: Tensor | None


_P = TypeVar("_P", Posterior, _Top)


def _joined(parts: list[_P]) -> _P:
    """Blocks of rows, one after the other."""
    if len(parts) == 1:
        return parts[0]
    columns, make = zip(*parts, strict=True), cast(Any, type(parts[0]))
    return make(*(None if column[0] is None else torch.cat(column) for column in columns))


def _decided(rows: _Rows, shared: _Shared, precise: bool | None) -> Posterior:
    """The posterior, its products in the rows' own precision where that is enough."""
    width = rows.alpha.dtype
    if rows.x.dtype == width or precise:
        return _weighed(rows, shared, width)[0]
    result, doubtful = _weighed(rows, shared, rows.x.dtype)
    if precise is None and bool(doubtful.any()):
        again = doubtful.nonzero()[:, 0]
        chosen = _Rows(*(None if given is None else given[again] for given in rows))  # type: ignore[arg-type]
        for whole, part in zip(result, _weighed(chosen, shared, width)[0], strict=True):
            if whole is not None and part is not None:
                whole[again] = part
    return result


def _weighed(rows: _Rows, shared: _Shared, dtype: torch.dtype) -> tuple[Posterior, Tensor]:
    """The posterior with products in `dtype`, and the rows (B,) for which that may not be enough."""
    width = rows.alpha.dtype
    half, norms = _halves(rows, shared, dtype)
    nearest, index = half.topk(min(RESCORED, len(shared.refs)), dim=1, largest=False)
    base = unpacked(shared.refs[index[:, 0]], width) if rows.base is None else rows.base
    x, alpha = rows.x.to(width), rows.alpha[:, None]
    z, b = x - alpha * base, base - shared.centre
    start = z.square().sum(1)
    own = rows.alpha * (0.5 * rows.alpha * b.square().sum(1) - ((x - alpha * shared.centre) * b).sum(1))
    rest = half.scatter_(1, index, torch.inf).sub_(own.to(dtype)[:, None]).mul_(2)
    others = shared.logits(rest.amin(1, keepdim=True).to(width), start, rows.sigma)[:, 0]
    top = _nearest(shared, rows, base, z, index, nearest.isinf(), others)
    w = shared.logits(rest, start, rows.sigma).sub_(top.peak.to(dtype)[:, None]).exp_()
    sums = w.sum(1, dtype=width)
    z_total, own_squares = top.total + sums, torch.linalg.vector_norm(w, dim=1).to(width).square()
    doubtful = _doubt(shared, rows, start, norms.amax(), sums / z_total, own_squares.sqrt() / sums)
    mean, second = _sums(shared, w, dtype, width)
    shift = (top.shift + mean - sums[:, None] * base) / z_total[:, None]
    off = mean - sums[:, None] * shared.centre  # sum of w (y - centre)
    far = top.far + (w @ norms).to(width) - 2 * (off * b).sum(1) + sums * b.square().sum(1)
    squares = top.squares + own_squares
    spread = None
    if top.spread is not None and second is not None:
        spread = (top.spread + second - 2 * b * off + sums[:, None] * b.square()).div_(z_total[:, None]).clamp_(min=0.0)
    result = Posterior(
        base,
        shift,
        z_total.log() + top.peak + shared.at_base(start, rows.sigma),
        z_total.square() / squares,
        torch.maximum(top.largest, w.amax(1).to(width)) / z_total,
        (far / z_total - shift.square().sum(1)).clamp_(min=0.0),
        spread,
    )
    return result, doubtful


def _halves(rows: _Rows, shared: _Shared, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(||x - alpha y||^2 - ||x||^2) / 2 about the centre (B, n), +inf where masked; and ||y - centre||^2 (n,)."""
    x = (rows.x.to(rows.alpha.dtype) - rows.alpha[:, None] * shared.centre).mul_(-rows.alpha[:, None]).to(dtype)
    gain = (0.5 * rows.alpha.square()).to(dtype)
    half = torch.empty(len(x), len(shared.refs), dtype=dtype, device=x.device)
    norms = torch.empty(len(shared.refs), dtype=dtype, device=x.device)
    for at, y in shared.chunks(dtype, centred=True):
        norms[at] = torch.linalg.vector_norm(y, dim=1).square_()
        half[:, at] = torch.addmm(torch.outer(gain, norms[at]), x, y.T)
    if rows.mask is not None:
        half.masked_fill_(~rows.mask, torch.inf)
    return half, norms


def _nearest(shared: _Shared, rows: _Rows, base: Tensor, z: Tensor, index: Tensor, gone: Tensor, others: Tensor) -> _Top:
    """The nearest references measured by direct differences from the base.

    Arguments:
        shared: The references.
        rows: The rows.
        base: (B, D).
        z: x - alpha base (B, D).
        index: Numbers of the nearest (B, k).
        gone: Which of them are masked (B, k).
        others: Largest logit of all that are not among them (B,).
    """
    (count, k), width = index.shape, max(1, base.shape[1])
    block = max(1, (2**25 if base.device.type != "cpu" else 2**18) // (k * width))
    parts = []
    for begin in range(0, max(count, 1), block):
        at = slice(begin, begin + block)
        away = unpacked(shared.refs[index[at].flatten()], base.dtype).view(-1, k, base.shape[1]).sub_(base[at, None])
        squares = torch.linalg.vector_norm(away, dim=2).square_()
        alpha = rows.alpha[at, None]
        apart = alpha * (alpha * squares - 2 * torch.bmm(away, z[at, :, None])[:, :, 0])
        logits = shared.logits(apart, z[at].square().sum(1), rows.sigma[at]).masked_fill_(gone[at], -torch.inf)
        peak = torch.maximum(logits.amax(1), others[at])
        w = (logits - peak[:, None]).exp_()
        shift = torch.bmm(w[:, None], away)[:, 0]
        spread = torch.bmm(w[:, None], away.square_())[:, 0] if shared.spread else None
        parts.append(_Top(peak, w.sum(1), w.square().sum(1), w.amax(1), (w * squares).sum(1), shift, spread))
    return _joined(parts)


def _sums(shared: _Shared, w: Tensor, dtype: torch.dtype, width: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Of w y (B, D), and of w (y - centre)^2 when asked for."""
    mean = torch.zeros(len(w), shared.refs.shape[1], dtype=dtype, device=w.device)
    second = torch.zeros_like(mean) if shared.spread else None
    for at, y in shared.chunks(dtype, centred=False):
        mean.addmm_(w[:, at], y)
        if second is not None:
            second.addmm_(w[:, at], (y - shared.centre.to(dtype)).square_())
    return mean.to(width), None if second is None else second.to(width)


def _doubt(shared: _Shared, rows: _Rows, start: Tensor, reach: Tensor, share: Tensor, evenness: Tensor) -> Tensor:
    """Rows (B,) where rounding in float32 products could show in the average.

    The error of the other references' log-weights, times their share of the weight had all of them erred upwards, times how far
    apart references of similar weight can be; independent errors average out over references of similar weight.

    Arguments:
        shared: The references.
        rows: The rows.
        start: ||x - alpha base||^2 (B,).
        reach: Largest ||y - centre||^2.
        share: Of the weight, what the other references have together (B,).
        evenness: Root of the sum of squares of their own shares (B,): 1 if one has all, 1 / sqrt(n) if n have the same.
    """
    alpha, sigma, reach = rows.alpha, rows.sigma, reach.to(rows.alpha.dtype)
    scale = (reach / max(1, shared.refs.shape[1])).sqrt()
    steep = 1 / sigma.square() if shared.tail is None else -2 * shared.power / (start + shared.tail * sigma.square())
    error = 2.0**-24 * steep * (alpha.square() * reach + alpha * sigma * reach.sqrt())
    mass = (share.log() + 2 * error).clamp(max=0.0).exp()
    apart = torch.minimum(10 * sigma / alpha.clamp(min=1e-30), 4 * scale)
    return mass * (2 * error).clamp(max=1.0) * apart * evenness.nan_to_num(1.0) > _TOLERANCE * scale
