"""What training watches: numbers that a device counts, and signals that ask to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["HOPELESS", "Stop", "Tally", "signals"]

HOPELESS = 50
"""Steps in a row without a finite loss after which `on_nan: skip` gives up."""


class Tally:
    """What the device counts between readings: all numbers in one tensor, so that a reading waits once."""

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(5, dtype=dtype, device=device)
        self.names: tuple[str, ...] = ()

    def add(
        self, step: int, loss: Tensor, norm: Tensor, bad: Tensor, stop: Tensor, others: Mapping[str, Tensor] | None = None
    ) -> None:
        """Counts a step; a bad one only by its number. `others` are averaged under their names, the same in every step."""
        others = others or {}
        if not self.names:
            self.names = tuple(others)
            self.sums = torch.cat([self.sums, self.sums.new_zeros(len(others))])
        loss_sum, norm_sum, count, first_bad, stopping, *more = self.sums
        zero = torch.zeros_like(loss_sum)
        self.sums = torch.stack(
            [
                loss_sum + torch.where(bad, zero, loss.to(zero)),
                norm_sum + torch.where(bad, zero, norm.to(zero)),
                count + (~bad).to(zero),
                torch.where(bad & (first_bad == 0), zero + step, first_bad),
                stopping + stop.to(zero),
                *(s + torch.where(bad, zero, others[name].to(zero)) for s, name in zip(more, self.names, strict=True)),
            ]
        )

    def first_bad(self) -> int:
        """Number, from 1, of the first step since the last look whose loss was not finite; 0 if there is none."""
        step = int(self.sums[3])
        if step:
            self.sums[3] = 0
        return step

    def means(self, steps: int) -> dict[str, float]:
        """Mean loss and norm of the gradient of the last `steps` steps, the other means, and how many were skipped.

        Empty if all were.

        Raises:
            ValueError: If all were, and they are many: training goes nowhere.
        """
        loss, norm, count, _, _, *others = self.sums.tolist()
        if not count and steps >= HOPELESS:
            raise ValueError(f"none of the last {steps} steps had a finite loss: look at the saved batches, lower train.lr")
        if not count:
            return {}
        means = {"loss": loss, "grad_norm": norm} | dict(zip(self.names, others, strict=True))
        skipped = {"skipped": round(steps - count)} if count < steps else {}
        return {name: value / count for name, value in means.items()} | skipped

    def stopping(self) -> bool:
        """Whether any process was asked to stop."""
        return bool(self.sums[4] > 0)

    def clear(self) -> None:
        """Starts afresh."""
        self.sums = torch.zeros_like(self.sums)


class Stop(threading.Event):
    """Whether this process was asked to stop, and by what."""

    reason = ""


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """An event that the first SIGINT or SIGTERM sets; the second one interrupts at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.reason = f" by {signal.Signals(number).name}"
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
