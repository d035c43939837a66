"""Frozen CLIP backbones, data sets, prompts and the encode loop (PyTorch, never JAX)."""
