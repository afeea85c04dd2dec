"""PyTorch weights to Flax."""
