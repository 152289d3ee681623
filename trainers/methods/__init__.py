"""One file per training method: its settings and how it attaches to a model."""
