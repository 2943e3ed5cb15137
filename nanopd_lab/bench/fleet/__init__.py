"""Fleets of thousands of workers: how many requests a controller takes, and what dividing it does. No torch."""
