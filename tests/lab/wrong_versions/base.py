"""What a version of an exercise is: anything that can be handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Version = Callable[..., Any]
