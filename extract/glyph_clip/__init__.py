"""glyph-clip: a small open_clip CLIP trained on rendered glyphs, kept in this folder as data."""
