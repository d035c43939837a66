"""Checkpoints of CLIP, by name or from a file, as modules that can be trusted."""
