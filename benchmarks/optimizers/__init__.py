"""What the benchmarks of the optimizers share: runs and their record, rates, seeds, intervals, text, models."""
