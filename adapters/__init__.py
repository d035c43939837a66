"""What is fitted: Flax NNX modules, pure functions on arrays, the training engine (never PyTorch)."""
