"""Measuring: workloads, peers, results with their provenance."""
