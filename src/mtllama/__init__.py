"""mtllama: multi-task instruction tuning for LLaMA-family models, end to end."""

__version__ = "0.1.0"
