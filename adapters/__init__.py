"""What is fitted: Flax NNX modules, pure functions, the training engine (never PyTorch)."""
