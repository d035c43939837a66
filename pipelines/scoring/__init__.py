"""Images with labels, and how well an adapter classifies them."""
