"""What is trained, as Flax NNX modules."""
