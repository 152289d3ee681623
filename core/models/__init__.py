"""The one door to weights."""
