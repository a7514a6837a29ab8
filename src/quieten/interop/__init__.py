"""Other libraries' models as denoisers, denoisers as theirs, and splitting inside their pipelines."""

from __future__ import annotations

from typing import Any

from .diffusers import Pretrained, from_diffusers
from .export import to_diffusers
from .kicks import check_keeps_kicks, kick_callback
from .policies import scheduled_policy

__all__ = [
    "Pretrained", "SplittingScheduler", "check_keeps_kicks", "from_diffusers", "kick_callback", "scheduled_policy",
    "to_diffusers",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "SplittingScheduler":  # its base classes are those of diffusers
        from .splitting import SplittingScheduler

        return SplittingScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
