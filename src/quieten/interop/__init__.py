"""Other libraries' models as denoisers, and denoisers as theirs."""

from __future__ import annotations

from .diffusers import Pretrained, from_diffusers
from .export import to_diffusers

__all__ = ["Pretrained", "from_diffusers", "to_diffusers"]
