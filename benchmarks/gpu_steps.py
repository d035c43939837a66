"""The steps of gpu.sh, each a process: python benchmarks/gpu_steps.py STEP SECONDS [--cpu]

A step takes figures until four fifths of its seconds are gone, and prints one JSON line; so it does
with those that it has where it is told to end before (SIGTERM, as `timeout` sends it). Figures in
µs are of one step of one setting: settings of CLIP-Adapter (image, reduction 4) that run side by
side, the difference of a long and a short run, so that starting and validating are left out; the
smaller of two. Beside them stands the floor: what its products take at the product rate, or what
its bytes take at the copy rate, whichever is longer, both rates measured on the device in the same
process. Bytes are the parameters, moments and gradients read and written (eight times 4 bytes), the
activations and, for all settings together, the class weights twice. bf16 activations and moments
are no options of `fit`: they are tried here.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a GPU, or small on a CPU."""

    dim: int = 1024
    classes: int = 1000
    batches: tuple[int, ...] = (256, 32)
    together: tuple[int, ...] = (64, 1, 256, 8, 128, 32)
    epochs: int = 20
    product: int = 8192
    copied: int = 1 << 28
    grid: tuple[int, int] = (6, 10)  # values of α and rates
    accuracy_epochs: int = 50
    shapes: tuple[tuple[str, int], ...] = (
        ("imagenet", 1000),
        ("caltech101", 100),
        ("eurosat", 10),
        ("sun397", 397),
        ("stanford_cars", 196),
        ("oxford_flowers", 102),
        ("food101", 101),
        ("ucf101", 101),
        ("fgvc_aircraft", 100),
        ("dtd", 47),
        ("oxford_pets", 37),
    )
    closed: tuple[str, ...] = ("gda", "tip-adapter", "proker")
    eager_steps: int = 200
    backbones: tuple[str, ...] = ("ViT-B-32", "RN50", "ViT-B-16", "ViT-L-14")
    images: int = 4096
    extract_batch: int = 256


SMALL = Sizes(
    dim=64,
    classes=8,
    batches=(32,),
    together=(2,),
    epochs=2,
    product=128,
    copied=1 << 16,
    grid=(1, 2),
    accuracy_epochs=200,
    shapes=(("small", 8),),
    closed=("gda",),
    eager_steps=4,
    backbones=("glyph-clip",),
    images=32,
    extract_batch=16,
)


class Taken:
    """The figures of a step, as long as its time lasts."""

    def __init__(self, seconds: float) -> None:
        self.figures: Figures = {}
        self.left_out: list[str] = []
        self.errors: dict[str, str] = {}
        self._started = time.monotonic()
        self._stop = self._started + seconds * 4 / 5

    def take(self, name: str, measure: Callable[[], Any]) -> None:
        """One figure, or several by name; an error is noted, and the others go on."""
        if time.monotonic() > self._stop:
            self.left_out.append(name)
            return
        try:
            self.figures[name] = rounded(measure())
        except Exception as error:
            self.errors[name] = f"{type(error).__name__}: {error}"[:300]
        print(name, self.figures.get(name, self.errors.get(name)), file=sys.stderr, flush=True)

    def line(self, step: str, device: str) -> str:
        more = {"left_out": self.left_out, "errors": self.errors}
        whole = {
            "step": step,
            "ok": bool(self.figures) and not self.errors,
            "seconds": round(time.monotonic() - self._started, 1),
            "device": device,
            "figures": self.figures,
            **{name: value for name, value in more.items() if value},
        }
        return json.dumps(whole)


def rounded(value: Any) -> Any:
    """Numbers to four digits."""
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    taken = Taken(arguments.seconds)

    def end(*_: object) -> None:
        taken.errors["the rest"] = "not done in time"
        print(taken.line(arguments.step, "ended"), flush=True)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    device = STEPS[arguments.step](taken, SMALL if arguments.cpu else Sizes(), arguments.cpu)
    print(taken.line(arguments.step, device), flush=True)


def jax_device(on_cpu: bool) -> str:
    import jax

    from clip_adapter.pipelines.console.jax_setup import set_up_jax

    set_up_jax()
    if jax.default_backend() == "cpu" and not on_cpu:
        raise SystemExit("JAX sees no GPU here; --cpu tries the steps out on a CPU")
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def best(run: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of some runs; a first one, which compiles, is left out."""
    run()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


# Steps 1 to 3: floors, settings side by side, command buffers, an unrolled scan.


def rates(sizes: Sizes) -> Figures:
    """Of the device: products in TF32 and bf16 (TFLOP/s), and bytes read and written (TB/s)."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    side, repeats = sizes.product, 10
    key = jax.random.key(0)

    def product(dtype: Any) -> float:
        a, b = jax.random.normal(key, (2, side, side)).astype(dtype) / math.sqrt(side)
        with jax.default_matmul_precision("tensorfloat32"):
            again = jax.jit(lambda a, b: lax.fori_loop(0, repeats, lambda _, x: x @ b, a))
            seconds = best(lambda: again(a, b).block_until_ready())
        return 2 * side**3 * repeats / seconds / 1e12

    def copy() -> float:
        again = jax.jit(lambda x: lax.fori_loop(0, repeats, lambda i, x: x + i, x))
        x = jnp.zeros(sizes.copied, jnp.float32)
        return 8 * sizes.copied * repeats / best(lambda: again(x).block_until_ready()) / 1e12

    return {
        "tf32_tflops": product(jnp.float32),
        "bf16_tflops": product(jnp.bfloat16),
        "copy_tbs": copy(),
    }


def floor_us(sizes: Sizes, batch: int, together: int, rate: Figures, *, classes: int = 0) -> float:
    """µs of one step of one of so many settings side by side, see above."""
    dim, classes = sizes.dim, classes or sizes.classes
    parameters = 2 * dim * (dim // 4)
    flop = batch * (5 * parameters + 4 * classes * dim)
    own = 32 * parameters + 4 * batch * (8 * dim + 4 * classes)
    shared = 8 * classes * dim / together
    return max(flop / rate["tf32_tflops"], (own + shared) / rate["copy_tbs"]) / 1e6


def task_of_shape(dim: int, classes: int, shots: int, validation_shots: int = 1) -> Any:
    from ours import task_of
    from synthetic import LOGIT_SCALE, synthetic_task

    data = synthetic_task(dim, classes, shots, validation_shots)
    validation = data.validation_features, data.validation_labels
    return task_of((data.features, data.labels), validation, data.weights, LOGIT_SCALE)


def values_of(alphas: int, learning_rates: int, **given: Any) -> Any:
    """A product of so many α and rates, for `search`."""
    from clip_adapter.adapters.methods.clip_adapter import CLIP_ADAPTER

    spread = [10 ** (-5 + 3 * n / max(1, learning_rates - 1)) for n in range(learning_rates)]
    ratios = [round(0.1 + 0.8 * n / max(1, alphas - 1), 4) for n in range(alphas)]
    stated = {"alpha": tuple(ratios), "learning_rate": tuple(spread)}
    return CLIP_ADAPTER.values(stated | {name: (value,) for name, value in given.items()})


def settings_of(count: int, **given: Any) -> Any:
    from clip_adapter.adapters.methods.clip_adapter import CLIP_ADAPTER

    return CLIP_ADAPTER.settings(values_of(1, count, **given))


def setting_step_us(task: Any, settings: Sequence[Any], epochs: int, method: Any = None) -> Figures:
    """µs of a step of one of these settings side by side, and seconds until the first run ended."""
    import jax

    from clip_adapter.adapters.engine.runner import Engine
    from clip_adapter.adapters.methods.clip_adapter import CLIP_ADAPTER
    from clip_adapter.adapters.optimisation import steps_and_batch

    engine = Engine("vectorised")

    def run(stop: int) -> float:
        started = time.perf_counter()
        chunks = engine.run(method or CLIP_ADAPTER, settings, task, stop=stop)
        jax.block_until_ready([chunk.state for chunk in chunks])
        return time.perf_counter() - started

    first = run(1)
    steps, _ = steps_and_batch(task.features.shape[1], settings[0])
    both = [(run(1 + epochs), run(1)) for _ in range(2)]
    seconds = min(long for long, _ in both) - min(short for _, short in both)
    return {"us": 1e6 * seconds / (epochs * steps * len(settings)), "first_s": first}


def floors(taken: Taken, sizes: Sizes, on_cpu: bool) -> str:
    device = jax_device(on_cpu)
    taken.take("rates", lambda: rates(sizes))
    return device


def settings(taken: Taken, sizes: Sizes, on_cpu: bool) -> str:
    device = jax_device(on_cpu)
    rate = rates(sizes)
    task = task_of_shape(sizes.dim, sizes.classes, 4)
    for together in sizes.together:
        for batch in sizes.batches:

            def measure(batch: int = batch, together: int = together) -> Figures:
                alike = settings_of(together, batch_size=batch)
                found = setting_step_us(task, alike, sizes.epochs)
                return found | {"floor_us": floor_us(sizes, batch, together, rate)}

            taken.take(f"batch {batch}, K {together}", measure)
    if not on_cpu:
        taken.take("kernels, ms", lambda: kernels(task, settings_of(64, batch_size=256)))
    return device


def kernels(task: Any, alike: Sequence[Any]) -> Figures:
    """The twelve kernels of the device that take longest in a run of these settings."""
    import gzip

    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            setting_step_us(task, alike, 2)
        (trace,) = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "GPU" in event["args"].get("name", "")
    }
    taken: dict[str, float] = {}
    for event in events:
        if event.get("ph") == "X" and event["pid"] in devices:
            taken[event["name"]] = taken.get(event["name"], 0.0) + event["dur"] / 1000
    return dict(sorted(taken.items(), key=lambda item: -item[1])[:12])


def buffers(taken: Taken, sizes: Sizes, on_cpu: bool) -> str:
    """With the XLA flags that gpu.sh has set."""
    device = jax_device(on_cpu)
    task = task_of_shape(sizes.dim, sizes.classes, 4)
    batch, together = sizes.batches[0], sizes.together[0]
    alike = settings_of(together, batch_size=batch)
    name = f"batch {batch}, K {together}"
    taken.take(name, lambda: setting_step_us(task, alike, sizes.epochs))
    return device


def unrolled(taken: Taken, sizes: Sizes, on_cpu: bool) -> str:
    """The same where four steps make one turn of the loop."""
    import jax

    jax.lax.scan = partial(jax.lax.scan, unroll=4)  # as the engine calls it
    return buffers(taken, sizes, on_cpu)


# Step 4: seeds, and numbers of 16 bits.


def seeds(taken: Taken, sizes: Sizes, on_cpu: bool) -> str:
    import numpy as np

    from clip_adapter.adapters.engine.runner import Engine
    from clip_adapter.adapters.methods.clip_adapter import CLIP_ADAPTER

    device = jax_device(on_cpu)
    rate = rates(sizes)
    task = task_of_shape(sizes.dim, sizes.classes, 4)
    batch, given = sizes.batches[0], {"batch_size": sizes.batches[0]}
    grid = CLIP_ADAPTER.settings(values_of(*sizes.grid, **given, epochs=sizes.accuracy_epochs))
    alone = setting_step_us(task, grid, sizes.epochs)
    name = f"K {len(grid)}, 3 seeds one after another"
    taken.take(name, lambda: alone | {"floor_us": floor_us(sizes, batch, len(grid), rate)})
    taken.take(f"K {len(grid)}, 3 seeds at once", lambda: seeds_us(task, grid, sizes.epochs))

    def accuracies(method: Any) -> Any:
        runs = Engine("vectorised").run(method, grid, task)
        return np.concatenate([np.asarray(chunk.state.history)[:, 0, 0] for chunk in runs])

    expected = accuracies(CLIP_ADAPTER)
    taken.take("fp32, best accuracy", lambda: float(expected.max()))
    for name, method in list(narrow_methods().items())[:: 2 if on_cpu else 1]:

        def measure(method: Any = method) -> Figures:
            found = accuracies(method)
            return setting_step_us(task, grid, sizes.epochs, method) | {
                "accuracy": float(found.max()),
                "largest_difference": float(np.abs(found - expected).max()),
            }

        taken.take(name, measure)
    return device


def seeds_us(task: Any, settings: Sequence[Any], epochs: int, count: int = 3) -> Figures:
    """µs of a step of one setting of one seed, of so many seeds begun in one launch."""
    from clip_adapter.adapters.engine.runner import Engine
    from clip_adapter.adapters.methods.clip_adapter import CLIP_ADAPTER
    from clip_adapter.adapters.optimisation import steps_and_batch

    tasks = [task._replace(seed=task.seed + number) for number in range(count)]

    def run(stop: int) -> float:
        started = time.perf_counter()
        Engine("vectorised").begin(CLIP_ADAPTER, settings, tasks, stop)
        return time.perf_counter() - started

    first = run(1)
    seconds = min(run(1 + epochs) for _ in range(2)) - min(run(1) for _ in range(2))
    steps, _ = steps_and_batch(task.features.shape[1], settings[0])
    return {"us": 1e6 * seconds / (epochs * steps * len(settings) * count), "first_s": first}


def narrow_methods() -> dict[str, Any]:
    """CLIP-Adapter with numbers of 16 bits in some places; parameters stay in 32."""
    import jax
    import jax.numpy as jnp
    import optax

    from clip_adapter.adapters.methods.clip_adapter import CLIP_ADAPTER

    narrow = jnp.bfloat16

    def logits(xp: Any, arrays: Any, setting: Any, features: Any, head: Any) -> Any:
        """As the method's, products accumulated and rows normalised in float32."""
        down, up = (arrays[f"image/bottleneck/{n}/kernel"].astype(narrow) for n in ("down", "up"))
        alpha, rows = jnp.asarray(setting["alpha"], narrow), features.astype(narrow)
        adapted = jax.nn.relu(jax.nn.relu(rows @ down) @ up)
        blended = alpha * adapted + (1 - alpha) * rows
        length = jnp.sqrt(jnp.square(blended.astype(jnp.float32)).sum(-1, keepdims=True))
        weights = head.weights.astype(narrow)
        cosines = jnp.matmul(blended, weights.T, preferred_element_type=jnp.float32) / length
        return head.logit_scale * cosines + head.logit_bias

    def optimizer(setting: Any, task: Any, steps: int, kept: Callable[[Any], bool]) -> Any:
        """Adam's moments in 16 bits between steps, those whose path is `kept`."""
        inner = cast(Any, CLIP_ADAPTER.optimizer)(setting, task, steps)

        def cast_to(state: Any, wide: bool) -> Any:
            def leaf(path: Any, x: Any) -> Any:
                is_moment = x.ndim == 2 and kept(jax.tree_util.keystr(path))
                return x.astype(jnp.float32 if wide else narrow) if is_moment else x

            return jax.tree_util.tree_map_with_path(leaf, state)

        def update(gradient: Any, state: Any, parameters: Any) -> Any:
            moved, state = inner.update(gradient, cast_to(state, True), parameters)
            return moved, cast_to(state, False)

        return optax.GradientTransformation(lambda p: cast_to(inner.init(p), False), update)

    def moments(kept: Callable[[str], bool]) -> Any:
        return replace(CLIP_ADAPTER, optimizer=partial(optimizer, kept=kept))

    return {
        "bf16 activations": replace(CLIP_ADAPTER, logits=logits),
        "bf16 first moment": moments(lambda path: ".mu" in path),
        "bf16 both moments": moments(lambda path: True),
    }


# Step 5: the paper's eleven shapes beside eager PyTorch, halving, closed forms.


def shapes(taken: Taken, sizes: Sizes, on_cpu: bool) -> str:
    import torch
    from ours import KeepsNothing
    from synthetic import synthetic_task
    from torch_opponents import Setting, Tensors, Work, train_eager

    from clip_adapter.adapters.engine.runner import Engine
    from clip_adapter.adapters.engine.search import search
    from clip_adapter.adapters.methods.clip_adapter import CLIP_ADAPTER
    from clip_adapter.adapters.registry import METHODS

    device = jax_device(on_cpu)
    rate = rates(sizes)
    batch, shots = sizes.batches[0], 2 if on_cpu else 16
    torch_device = "cpu" if on_cpu else "cuda"

    def beside_eager(classes: int) -> Figures:
        task = task_of_shape(sizes.dim, classes, shots, 4)
        grid = CLIP_ADAPTER.settings(values_of(*sizes.grid, batch_size=batch))
        found = setting_step_us(task, grid, sizes.epochs)
        tensors = Tensors(synthetic_task(sizes.dim, classes, shots, 4), torch_device)
        steps = -(-len(tensors.labels) // batch)
        work = Work(max(1, sizes.eager_steps // steps), batch)

        def eager() -> None:
            train_eager(tensors, Setting(0.5, 1e-4, 1e-2), work)

        own = 1e6 * best(eager, 1) / (work.epochs * steps)
        floor = floor_us(sizes, batch, len(grid), rate, classes=classes)
        return found | {"floor_us": floor, "eager_us": own, "ratio": own / found["us"]}

    def searched(name: str, halving: bool) -> float:
        """Seconds of a whole search, without compiling."""
        task = task_of_shape(sizes.dim, sizes.classes, shots, 4)
        method = METHODS[name]
        own = values_of(*sizes.grid, batch_size=batch)
        values = own if method is CLIP_ADAPTER else method.values({})
        engine = Engine("vectorised")

        def run() -> None:
            list(search(method, values, [task], engine, KeepsNothing(), halving=halving))

        return best(run, 1)

    for name, classes in sizes.shapes[:3]:
        taken.take(name, partial(beside_eager, classes))
    whole = f"K {math.prod(sizes.grid)}, {sizes.classes} classes, a whole search, s"
    taken.take(f"{whole}, full", partial(searched, "clip-adapter", False))
    taken.take(f"{whole}, halving", partial(searched, "clip-adapter", True))
    for name in sizes.closed:
        taken.take(f"{name}, {sizes.classes} classes, s", partial(searched, name, False))
    for name, classes in sizes.shapes[3:]:
        taken.take(name, partial(beside_eager, classes))
    torch.cuda.synchronize() if not on_cpu else None
    return device


# Step 6: extraction.


def extract(taken: Taken, sizes: Sizes, on_cpu: bool) -> str:
    """Images a second of each backbone: the forward pass alone, whole, compiled (forward)."""
    import numpy as np
    import torch

    from clip_adapter.cores import available_cores
    from clip_adapter.extract.datasets.source import Split
    from clip_adapter.extract.encoding.device import find_device
    from clip_adapter.extract.encoding.encoder import Encoder
    from extract import Case, decode_alone, forward_alone, ours, photographs

    if not on_cpu and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU here; --cpu tries the steps out on a CPU")
    device = find_device("cpu" if on_cpu else "cuda")
    count = sizes.images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = photographs(folder, min(count, 64 if not on_cpu else 4))
        kept = len(files.ids)
        ids = [f"{row:06}" for row in range(count)]
        split = Split(ids, np.zeros(count, np.int32), lambda row: files.read(row % kept), "made up")
        encoders: dict[str, Encoder] = {}

        def case_of(backbone: Any) -> Case:
            return Case(backbone, split, device, sizes.extract_batch, available_cores(), folder)

        def measure(name: str, compiled: bool) -> Figures:
            backbone = random_backbone(name, on_cpu)
            encoder = Encoder(backbone, device, sizes.extract_batch, compiled=compiled)
            case = case_of(backbone)
            forward = count / best(lambda: forward_alone(case, encoder), 2)
            if compiled:
                return {"forward": forward, "compile_s": encoder.compile_seconds}
            encoders[name] = encoder
            with busy(on_cpu) as share:
                whole = count / best(lambda: ours(case, encoder), 1)
            return {"forward": forward, "whole": whole, **share}

        for backbone in sizes.backbones:
            taken.take(backbone, partial(measure, backbone, False))
        if encoders:
            first = next(iter(encoders.values()))
            some = case_of(None)
            taken.take("decode alone", lambda: count / best(lambda: decode_alone(some, first), 1))
        for backbone in () if on_cpu else sizes.backbones:
            taken.take(f"{backbone}, compiled", partial(measure, backbone, True))
    kind = "CPU" if on_cpu else torch.cuda.get_device_name(device)
    return f"{kind}, torch {torch.__version__}, {available_cores()} cores"


def random_backbone(name: str, on_cpu: bool) -> Any:
    """With random weights but for the embedded one; in bf16 on a GPU."""
    import open_clip
    import torch

    from clip_adapter.extract.backbones.loading import Backbone, load_backbone

    if name == "glyph-clip":
        return load_backbone(name)
    precision, dtype = ("fp32", torch.float32) if on_cpu else ("bf16", torch.bfloat16)
    model = open_clip.create_model(name, precision=precision, device="cpu" if on_cpu else "cuda")
    model.eval().requires_grad_(False)
    stated = dict(model.visual.preprocess_cfg)
    embed_dim = open_clip.get_model_config(name)["embed_dim"]
    nothing: Any = None
    identity = {"name": name, "embed_dim": embed_dim}
    return Backbone(model, nothing, nothing, identity, stated, 100.0, 0.0, dtype)


@contextmanager
def busy(on_cpu: bool) -> Iterator[Figures]:
    """The mean share of the time within it that the GPU has been busy, by nvidia-smi."""
    share: Figures = {}
    if on_cpu:
        yield share
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    seen: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            answer = subprocess.run([*query, "-i", "0"], capture_output=True, text=True)
            seen.extend(float(line) for line in answer.stdout.split() if line.isdigit())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield share
    finally:
        done.set()
        thread.join()
        if seen:
            share["gpu_busy_percent"] = sum(seen) / len(seen)


STEPS: dict[str, Callable[[Taken, Sizes, bool], str]] = {
    "floors": floors,
    "settings": settings,
    "buffers-none": buffers,
    "buffers-default": buffers,
    "buffers-while": buffers,
    "unrolled": unrolled,
    "seeds": seeds,
    "shapes": shapes,
    "extract": extract,
}

if __name__ == "__main__":
    main()
