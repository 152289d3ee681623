"""What training, steering and the service share: models, data, checkpoints, events. No HTTP, no training."""
