"""Compress language models after training, prove the cost, hand over checkpoints that engines serve."""

__version__ = "0.1.0"
