"""The benchmarks are scripts: they find one another beside themselves."""

import sys
from pathlib import Path

from clip_adapter.pipelines.console.jax_setup import set_up_jax

set_up_jax()
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
