"""Steering vectors: fit them, store them, apply them while a model generates."""
