"""Fine-tuning: one loop, one registry of methods."""
