"""Figures as pure functions: `view(data) -> matplotlib Figure`."""
