"""The engine of one worker: scheduler, loop, and the `LLM` that people call."""
