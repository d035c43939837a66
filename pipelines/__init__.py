"""The commands a person runs on a cache, and what they are made of."""
