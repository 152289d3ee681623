"""Linear layers of 4-bit codes and float32 scales: made from floats, or read from files that others quantised."""
