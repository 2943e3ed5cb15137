"""Errors a caller can act on. Each says what was given, what is allowed and how to fix it."""

from __future__ import annotations


class InvalidRequestError(ValueError):
    """A request that can never be served as given; nothing has been allocated for it."""


class OutOfBlocks(ValueError):  # noqa: N818 - the field's own term, and the course's
    """The allocator has fewer free blocks than were asked for; nothing has been taken."""


class NonFiniteLogitsError(ValueError):
    """The model returned NaN or infinity for a sequence; it is ended, the others go on."""
