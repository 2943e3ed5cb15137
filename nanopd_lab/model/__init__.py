"""Loading a model, running it over pages, sampling from its logits."""
