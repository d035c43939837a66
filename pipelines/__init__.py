"""The commands a person runs on a cache: fit, predict, report, inspect."""
