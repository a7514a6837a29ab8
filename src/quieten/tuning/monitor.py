r"""What goes wrong while a policy is tuned, seen early and said in words.

A `Reading` holds the figures of some iterations, `diagnose` turns it into checks: pass, warn or fail, each with its figure and
with what to do. Every check is a function on its own; a figure that is absent (None) is not checked.

References:
    | Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models (Yoon et al., 2024)
    | https://arxiv.org/abs/2407.00626
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Literal

import torch
from torch import Tensor

__all__ = ["CHECKS", "Check", "Reading", "Spread", "diagnose", "drift", "le_cam", "spread"]

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        name: What was looked at.
        status: "pass", "warn" (go on, but look), or "fail" (going on makes it worse).
        value: The figure that decided, the worst of several.
        text: One sentence: what it is and, unless it passed, what to do.
    """

    name: str
    status: Status
    value: float
    text: str

    def __str__(self) -> str:
        return f"{self.status}: {self.name}: {self.text}"


@dataclass(frozen=True)
class Spread:
    """How spread out a set of examples is.

    Attributes:
        std: Root of the mean variance of a dimension.
        distance: Mean distance of two different examples, per root of the dimension.
    """

    std: float
    distance: float


@dataclass(frozen=True)
class Reading:
    """Figures of a policy and its value, averaged over some iterations; None is unknown.

    Attributes:
        cost: Mean running cost of each step per dimension, moves^2 / (2 s^2): (T,).
        adaptive: Whether s^2 follows the moves, which holds the cost at 1/2.
        std: Standard deviations of the steps (T,), in generation order.
        std_start: The same before tuning (T,).
        explained: Share of the variance of the temporal-difference target that the value explains, of each step (T,).
        data_energy: Mean energy of data.
        sample_energy: Mean energy of samples.
        energy_loss: Loss of the energy, with its gamma term.
        gamma: Weight of the squares in that loss.
        largest: Largest absolute value that the value network gave.
        clipped: Share of the policy's steps whose gradient was clipped.
        spread: Of samples.
        data_spread: Of as many data.
        drift: Root mean square change of samples from fixed noise since tuning began, over that of two unrelated ones.
        distance: Of samples to held-out data, lower is better.
        best: The least such distance so far.
        floor: The same distance of data to held-out data.
    """

    cost: Sequence[float] | None = None
    adaptive: bool = True
    std: Sequence[float] | None = None
    std_start: Sequence[float] | None = None
    explained: Sequence[float] | None = None
    data_energy: float | None = None
    sample_energy: float | None = None
    energy_loss: float | None = None
    gamma: float | None = None
    largest: float | None = None
    clipped: float | None = None
    spread: Spread | None = None
    data_spread: Spread | None = None
    drift: float | None = None
    distance: float | None = None
    best: float | None = None
    floor: float | None = None


def diagnose(reading: Reading) -> list[Check]:
    """All checks whose figures are known, in the order of `CHECKS`."""
    checks = (check(reading) for check in CHECKS.values())
    return [check for check in checks if check is not None]


# ---- figures


def le_cam(energy_loss: float, gamma: float) -> float:
    r"""Estimate of the Le Cam distance of policy and data, from the loss of a well trained energy.

    .. math:: \hat\Lambda = -2 \gamma L, \quad \Lambda = \tfrac12 \int (\pi - p)^2 / (\pi + p) \in [0, 1]

    0 is matched, 1 is told apart with certainty. An energy that is not at its optimum gives less.
    """
    return -2.0 * gamma * energy_loss


def spread(x: Tensor) -> Spread:
    """How spread out examples x (N, *) are, N at least 2. Collapse shows here: samples that are alike, or pixels that fade.

    Raises:
        ValueError: For fewer than 2 examples.
    """
    if len(x) < 2:
        raise ValueError(f"`x` must have at least 2 examples (got {len(x)})")
    rows = x.detach().flatten(1)
    wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    variance = wide.var(0).mean()
    # a random pairing, the same for every N: examples that stand at equal distances may be of one class
    order = torch.randperm(len(wide), generator=torch.Generator().manual_seed(0)).to(wide.device)
    first, second = order[: len(wide) // 2 * 2].chunk(2)
    pairs = (wide[first] - wide[second]).square().mean(1).sqrt().mean()
    std, distance = torch.stack([variance.sqrt(), pairs]).tolist()
    return Spread(std, distance)


def drift(x: Tensor, start: Tensor) -> float:
    """How far samples of the same noise have moved: 0 for not at all, 1 for samples that have nothing to do with each other.

    The root mean square of x - start (N, *), over that of pairs of `start` that belong to different noise.
    """
    unrelated = (start - start.roll(1, 0)).square().mean()
    return float(((x - start).square().mean() / unrelated.clamp_min(1e-30)).sqrt())


# ---- checks


def check_finite(r: Reading) -> Check | None:
    """Energies, losses, noise and all else that was read are numbers."""
    known = [r.data_energy, r.sample_energy, r.energy_loss, r.largest, r.distance, r.drift, r.clipped]
    known += [value for each in (r.cost, r.std, r.explained) for value in each or ()]
    known += [value for each in (r.spread, r.data_spread) if each is not None for value in (each.std, each.distance)]
    values = [value for value in known if value is not None]
    if not values:
        return None
    bad = [value for value in values if not math.isfinite(value)]
    if bad:
        return Check("finite", "fail", bad[0], "a figure is NaN or infinite: go back, and on with smaller learning rates")
    return Check("finite", "pass", 0.0, "all figures are finite")


def check_cost(r: Reading) -> Check | None:
    """Where s^2 follows the moves, each step costs 1/2: anything else says that s^2 cannot follow."""
    if r.cost is None or not r.adaptive:
        return None
    k, value = _worst(r.cost, lambda cost: abs(math.log(max(cost, 1e-9) / 0.5)))
    status: Status = "pass" if 0.35 <= value <= 0.7 else "warn" if 0.1 <= value <= 2.5 else "fail"
    text = f"the running cost of step {k} is {value:.2f}, at rest it is 0.5"
    remedy = "" if status == "pass" else ": the policy changes faster than s2 follows, lower lr, or avr"
    return Check("running cost", status, value, text + remedy)


def check_noise(r: Reading) -> Check | None:
    """The noise of no step runs away: beyond 3 times, or below a tenth of, what it was."""
    if r.std is None or r.std_start is None:
        return None
    k, ratio = _worst([a / b for a, b in zip(r.std, r.std_start, strict=True)], lambda q: abs(math.log(max(q, 1e-9))))
    status: Status = "fail" if ratio > 3.0 or ratio < 0.1 else "warn" if ratio > 2.0 or ratio < 0.2 else "pass"
    text = f"the noise of step {k} is {ratio:.2f} times what it was"
    remedy = "lower tau1, or raise tau2" if ratio > 1 else "raise tau1, or lower std_lr"
    return Check("noise", status, ratio, text if status == "pass" else f"{text}: {remedy}")


def check_explained(r: Reading) -> Check | None:
    """The value predicts what it is trained to: of the last step, whose target is the energy itself, at least."""
    if r.explained is None:
        return None
    last = r.explained[-1]
    k, least = _worst(r.explained, lambda share: -share)
    if last < 0.1:
        text = f"the value explains {last:.0%} of the energy after the last step: raise the value's lr, or lower the policy's"
        return Check("explained variance", "fail" if last < -1.0 else "warn", last, text)
    if not least >= -1.0:
        text = f"the value of step {k} explains {least:.0%} of its target, worse than a constant: lower the value's lr"
        return Check("explained variance", "warn", least, text)
    return Check("explained variance", "pass", last, f"the value explains {last:.0%} of the energy after the last step")


def check_gap(r: Reading) -> Check | None:
    """Data have the lower energy: where samples have, the policy has outrun the energy."""
    if r.data_energy is None or r.sample_energy is None:
        return None
    gap = r.sample_energy - r.data_energy
    text = f"samples have {abs(gap):.3g} {'more' if gap >= 0 else 'less'} energy than data"
    if gap >= -0.02 * _bound(r):
        return Check("energy gap", "pass", gap, text)
    status: Status = "fail" if gap < -0.5 * _bound(r) else "warn"
    return Check("energy gap", status, gap, f"{text}, the policy outruns it: raise the energy's lr, or lower the policy's")


def check_le_cam(r: Reading) -> Check | None:
    """The energy cannot tell samples from data with certainty; then its gradient would vanish."""
    if r.energy_loss is None or not r.gamma:
        return None
    value = le_cam(r.energy_loss, r.gamma)
    text = f"the Le Cam distance of samples and data is about {value:.2f} (0 matched, 1 lost)"
    if value > 0.9:
        return Check(
            "Le Cam", "fail", value, f"{text}, the energy is saturated: lower its lr, or give more data, it knows these"
        )
    if value > 0.7:
        return Check(
            "Le Cam", "warn", value, f"{text}, the policy falls behind: take more policy steps (n_generator), or raise lr"
        )
    if value < -0.2:
        return Check("Le Cam", "warn", value, f"{text}, so the energy is far from its optimum: lower its lr")
    return Check("Le Cam", "pass", value, text)


def check_range(r: Reading) -> Check | None:
    """Values stay in the order of 1 / (2 gamma), where the energy's optimum is."""
    if r.largest is None or not r.gamma:
        return None
    ratio = r.largest / _bound(r)
    text = f"the value reaches {ratio:.1f} times 1 / (2 gamma)"
    status: Status = "pass" if ratio <= 5.0 else "warn" if ratio <= 20.0 else "fail"
    return Check("value range", status, ratio, text if status == "pass" else f"{text}, it runs away: lower the value's lr")


def check_clipped(r: Reading) -> Check | None:
    """Clipping is the exception: where it is the rule, the learning rate is not what it says."""
    if r.clipped is None:
        return None
    status: Status = "warn" if r.clipped > 0.9 else "pass"
    text = f"{r.clipped:.0%} of the policy's steps were clipped"
    return Check("clipping", status, r.clipped, text if status == "pass" else f"{text}: raise policy_clip")


def check_collapse(r: Reading) -> Check | None:
    """Samples are as spread out as data, in every pixel and between each other."""
    if r.spread is None or r.data_spread is None:
        return None
    ratios = (r.spread.std / max(r.data_spread.std, 1e-12), r.spread.distance / max(r.data_spread.distance, 1e-12))
    _, value = _worst(ratios, lambda q: abs(math.log(max(q, 1e-9))))
    text = f"samples are spread {ratios[0]:.2f} times as far as data in a dimension, and {ratios[1]:.2f} times in pairs"
    status: Status = "pass" if 0.85 <= value <= 1.18 else "warn" if 0.6 <= value <= 1.6 else "fail"
    remedy = ", they grow alike: raise tau1, lower lr" if value < 1 else ", they burst: lower tau1 or lr"
    return Check("collapse", status, value, text if status == "pass" else text + remedy)


def check_drift(r: Reading) -> Check | None:
    """Samples of the same noise are still about what they were: tuning sharpens, it does not start again."""
    if r.drift is None:
        return None
    status: Status = "warn" if r.drift > 0.9 else "pass"
    text = f"samples of the same noise have moved by {r.drift:.2f} of the distance of unrelated ones"
    return Check("drift", status, r.drift, text if status == "pass" else f"{text}: what the model knew is being lost, lower lr")


def check_distance(r: Reading) -> Check | None:
    """The distance to held-out data has not left its best far behind."""
    if r.distance is None or r.best is None:
        return None
    floor = r.floor or 0.0
    ratio = max(r.distance - floor, 0.0) / max(r.best - floor, 0.1 * floor, 1e-12)
    known = f", floor {floor:.3g}" if r.floor is not None else ""
    text = f"the held-out distance is {r.distance:.3g}, its best {r.best:.3g}{known}"
    status: Status = "pass" if ratio <= 1.5 else "warn" if ratio <= 3.0 else "fail"
    return Check("held-out distance", status, ratio, text if status == "pass" else f"{text}: it grows, lower lr")


def _strict(check: Callable[[Reading], Check | None]) -> Callable[[Reading], Check | None]:
    """A check that fails where its figure is no number: a comparison with NaN says nothing."""

    @wraps(check)
    def strict(r: Reading) -> Check | None:
        found = check(r)
        if found is None or math.isfinite(found.value):
            return found
        return Check(
            found.name, "fail", found.value, f"its figure is {found.value}: go back, and on with smaller learning rates"
        )

    return strict


CHECKS: dict[str, Callable[[Reading], Check | None]] = {
    "finite": check_finite,
    "running cost": _strict(check_cost),
    "noise": _strict(check_noise),
    "explained variance": _strict(check_explained),
    "energy gap": _strict(check_gap),
    "Le Cam": _strict(check_le_cam),
    "value range": _strict(check_range),
    "clipping": _strict(check_clipped),
    "collapse": _strict(check_collapse),
    "drift": _strict(check_drift),
    "held-out distance": _strict(check_distance),
}
"""Every check by name; each fails where its figure is not finite."""


def _bound(r: Reading) -> float:
    """1 / (2 gamma): the largest energy at the optimum; 1 where there is no gamma."""
    return 1.0 / (2.0 * r.gamma) if r.gamma else 1.0


def _worst(values: Sequence[float], badness: Callable[[float], float]) -> tuple[int, float]:
    """Place and value of the worst: one that is no number, if there is one."""
    k = max(range(len(values)), key=lambda i: math.inf if math.isnan(values[i]) else badness(values[i]))
    return k, values[k]
