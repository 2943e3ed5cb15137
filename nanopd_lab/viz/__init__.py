"""Figures as pure functions `view(values) -> Figure`; `viz.explorer` wraps them in widgets.

Nothing here is imported by the engine. The figures need matplotlib, the explorer ipywidgets; both come with
`pip install nanopd-lab[lab]`.
"""
