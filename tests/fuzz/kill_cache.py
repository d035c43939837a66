"""Kill the cache's writer and the joining of its parts at random points; nothing may be lost.

    python tests/fuzz/kill_cache.py [KILLS]

Each kind of process is killed KILLS times (100 unless said) with SIGKILL, at a random point of its
run, then started again until it ends. Its file must be, byte for byte, that of a run which nobody
killed (the clock stands still for both). Prints a line for each kind and ends with 1 where a file
differs.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import clip_adapter.cache.writer as writer
from tests.fuzz.kill_cache import join, parts, write
writer._now = lambda: "2024-01-01T00:00:00+00:00"
{"write": write, "join": join, "parts": parts}[sys.argv[2]](Path(sys.argv[3]))
"""
ROWS, BATCH, DIM = 400, 10, 64


def _append(writer, split: str, stop: int, first: int) -> None:
    """Batches as `extract` appends them, from where the writer stands."""
    import numpy as np

    for start in range(first + writer.consumed(split), stop, BATCH):
        rows = np.arange(start, min(start + BATCH, stop))
        rng = np.random.default_rng(int(rows[0]))
        features = rng.normal(size=(len(rows), 1, DIM)).astype(np.float32)
        ids = [f"{split}/{row}" for row in rows[:-1]]
        broken = [f"{split}/{rows[-1]}"]  # the last of each batch cannot be read
        writer.append_images(split, features[:-1], rows[:-1] % 3, ids, broken, skipped_labels=[0])


def write(path: Path, part=None) -> None:
    """The writer's whole run, or what is left of it."""
    import numpy as np

    from clip_adapter.cache.staging import StagingFolder
    from clip_adapter.cache.writer import CacheWriter
    from tests.cache.small_cache import BACKBONE, FINISH

    place = StagingFolder(path, {} if part is None else {"shard": part.index})
    with CacheWriter(place, {"a": 1}, views=1) as writer:
        if part is None or part.index == 1:
            for c in range(writer.text_rows(), 3):
                text = np.random.default_rng(c).normal(size=(1, 2, DIM)).astype(np.float32)
                writer.append_text(text, [f"class {c}"])
        rows = part.rows if part else {"train": (0, ROWS, ROWS), "test": (0, 50, 50)}
        for split, (first, stop, _) in rows.items():
            _append(writer, split, stop, first)
        writer.finish(**FINISH | {"backbone": BACKBONE | {"embed_dim": DIM}}, part=part)


def parts(path: Path) -> None:
    """The parts that `join` joins, beside `path`."""
    from clip_adapter.cache.metadata import Part

    half = ROWS // 2
    for index, (start, stop) in enumerate(((0, half), (half, ROWS)), start=1):
        test = (0, 50, 50) if index == 1 else (50, 50, 50)
        part = Part(index, 2, {"train": (start, stop, ROWS), "test": test})
        write(path.with_name(f"part-{index}.h5"), part)


def join(path: Path) -> None:
    from clip_adapter.cache.parts import merge_parts

    merge_parts([path.with_name(f"part-{index}.h5") for index in (1, 2)], path)


def start(kind: str, path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(ROOT), kind, str(path)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def finish(kind: str, path: Path) -> float:
    """Let it run to its end and return the seconds that it took."""
    begun = time.monotonic()
    with start(kind, path) as child:
        _, said = child.communicate()
    if child.returncode:
        raise SystemExit(f"{kind} failed after a kill: {said.decode()}")
    return time.monotonic() - begun


def kill_often(kind: str, kills: int, seed: int, folder: Path) -> bool:
    """Whether `kind`, killed this many times, ends with the bytes of an undisturbed run."""
    rng = random.Random(seed)
    finish("parts", folder / "out.h5")
    seconds = finish(kind, folder / "whole.h5")
    wanted = (folder / "whole.h5").read_bytes()
    path, killed, ended, same = folder / "out.h5", 0, 0, True
    while killed < kills:
        begun = time.monotonic()
        with start(kind, path) as child:
            try:
                child.wait(rng.uniform(0.2, 1.2) * seconds)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                killed += 1
            else:
                seconds = time.monotonic() - begun  # a busy machine may have become a quick one
        if child.returncode == 0 or rng.random() < 0.1:
            finish(kind, path)
            ended += 1
            same &= path.read_bytes() == wanted
            same &= not path.with_name("out.h5.partial").exists()
            path.unlink()
        elif path.exists():
            same &= path.read_bytes() == wanted  # whole, or not there
            path.unlink()
    finish(kind, path)
    same &= path.read_bytes() == wanted
    print(f"{kind}: {killed} kills, {ended + 1} ends, {'equal' if same else 'NOT EQUAL'}")
    return same


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for seed, kind in enumerate(("write", "join")):
            (Path(folder) / kind).mkdir()
            results.append(kill_often(kind, kills, seed, Path(folder) / kind))
    raise SystemExit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
