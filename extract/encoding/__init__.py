"""Images in, features out: decoding, preprocessing and the forward pass."""
