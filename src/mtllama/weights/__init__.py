"""Weights as bytes: checkpoints read and written tensor by tensor, and exact differences of two. Never builds a model."""
