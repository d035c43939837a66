"""JAX as the commands use it."""

import subprocess
import sys

SCRIPT = """
import gc, signal, time
from clip_adapter.pipelines.jax_setup import set_up_jax

def _xla_gc_callback(phase, info):
    gc.callbacks.remove(_xla_gc_callback)
    signal.raise_signal(signal.SIGINT)

set_up_jax()
gc.callbacks.append(_xla_gc_callback)
try:
    gc.collect()
    time.sleep(20)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_during_garbage_collection_is_not_lost():
    """Python swallows what is raised there, and JAX has a callback there."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)
