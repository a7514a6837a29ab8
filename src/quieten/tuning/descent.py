"""Steps on several losses, each with an optimiser of its own, and a look at whether they stay finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Average", "Descent"]

Average = Callable[[list[Tensor]], None]
"""Averages tensors in place over all processes."""


class Descent(nn.Module):
    """What a method of several losses descends with.

    Attributes:
        optimizers: By the name of what they train.
        iterations: How many have been made; set it when going on from a checkpoint.
    """

    optimizers: dict[str, torch.optim.Optimizer]

    def __init__(self) -> None:
        super().__init__()
        self.iterations = 0
        self._bad: dict[tuple[str, str], Tensor] = {}

    REMEDY: ClassVar[str] = "lower the learning rates, or gamma and tau"

    def check(self) -> None:
        """Raises ValueError if anything was not finite since it was last asked; waits for the device."""
        bad, self._bad = self._bad, {}
        for (what, remedy), flag in bad.items():
            if bool(flag):
                raise ValueError(f"{what} is not finite: {remedy}; the step was skipped")

    def _descend(
        self, name: str, loss: Tensor | Iterable[Tensor], clip: float | None, average: Average | None, where: str = ""
    ) -> Tensor:
        """A step of one optimiser on a loss, or on a sum whose terms come one by one; the norm of the gradient, unclipped.

        Raises:
            ValueError: For a loss that does not depend on any parameter.
        """
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        for part in [loss] if isinstance(loss, Tensor) else loss:
            if not part.requires_grad:
                raise ValueError(
                    f"`{name}` does not depend on its parameters through autograd: leave out detach() and no_grad()"
                )
            part.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if average is not None:
            for p in parameters:  # a process without examples has no gradient, the others wait for it
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            average([p.grad for p in parameters if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        self._look(norm, f"the gradient of the {name}{where}")
        if norm.device.type != "cpu" and optimizer.defaults.get("fused"):
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # skips it without the host
        if optimizer.defaults.get("fused") or bool(norm.isfinite()):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def _look(self, value: Tensor, what: str, average: Average | None = None, remedy: str = REMEDY) -> None:
        """Raises at once where looking is free and all processes see the same, else takes a note for `check`."""
        good, key = value.detach().isfinite().all(), (what, remedy)
        if good.device.type != "cpu" or average is not None:
            self._bad[key] = self._bad[key] | ~good if key in self._bad else ~good
        elif not bool(good):
            self._bad.clear()
            raise ValueError(f"{what} is not finite (iteration {self.iterations}): {remedy}")
