"""Adapters in files, and what uses them: PyTorch, scikit-learn, the commands."""
