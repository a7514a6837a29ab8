"""Progress of training and sampling: a bar with speed and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress"]

LINE_EVERY = 15.0
"""Seconds between lines where there is no terminal."""


class Progress:
    """Shows how far something has come, on standard error. A context manager.

    Arguments:
        total: Images in all.
        done: Images there were before.
        title: What is done.
        show: False says nothing at all.
        unit: What is counted, if not images.

    Attributes:
        total: May be changed while it runs, where it was a forecast.
    """

    def __init__(self, total: int, done: int, title: str, show: bool = True, unit: str = "images"):
        self.total, self.done, self.title, self.show, self.unit = total, done, title, show, unit
        self.console = Console(stderr=True)
        self.start, self.first, self.said, self.text, self.told = time.monotonic(), done, 0.0, "", False
        self.bar: Bar | None = None
        if show and self.console.is_terminal:
            title_column = TextColumn("{task.description}", markup=False)
            columns = (title_column, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task(title, total=total, completed=done, text="")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, images: int, words: str | None = None) -> None:
        """Images done so far, and what to say of them when there is something new; until then it is their rate."""
        self.done, now = min(images, self.total), time.monotonic()
        if words is not None:
            self.text, self.told = words, True
        elif not self.told:
            self.text = f"{(self.done - self.first) / max(now - self.start, 1e-9):.0f} {self.unit}/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, total=self.total, text=self.text)
        elif self._due(now, words is not None):
            self.say(f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, {self.text}, {self._left()} left")
            self.said = now

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if not self.show:
            return
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _due(self, now: float, told: bool) -> bool:
        """Whether a line is due: metrics at the start and at the end, and whatever there is when none came for long."""
        return now - max(self.said, self.start) > LINE_EVERY or (told and (not self.said or self.done == self.total))

    def _left(self) -> str:
        shown = self.done - self.first
        if not shown:
            return "unknown time"
        seconds = round((time.monotonic() - self.start) / shown * (self.total - self.done))
        minutes, hours = seconds // 60 % 60, seconds // 3600
        return f"{hours}:{minutes:02}:{seconds % 60:02}"
