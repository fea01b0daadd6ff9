"""Whole architectures and hand-written modules on which everything has to work."""

from .architectures import ZOO
from .example import Example
from .modules import MODULES
from .randomise import randomise

__all__ = ["MODULES", "ZOO", "Example", "randomise"]
