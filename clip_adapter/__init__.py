"""CLIP-Adapter: few-shot adapters on the cached features of a frozen CLIP."""

from pathlib import Path

# In a checkout the rooms lie beside this folder; an installed package has them inside it.
if (Path(__file__).parents[1] / "cache" / "FORMAT.md").is_file():
    __path__.append(str(Path(__file__).parents[1]))
