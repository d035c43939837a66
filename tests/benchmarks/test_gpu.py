"""`benchmarks/gpu.sh` runs on a CPU, small, and says what failed or was left out."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_steps import STEPS, Sizes, Taken, floor_us

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
# Flags for buffers are of a GPU alone.
ON_A_CPU = [step for step in STEPS if not step.startswith("buffers")]
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def lines_of(**variables: str) -> list[dict[str, Any]]:
    environment = os.environ | variables
    command = ["bash", str(SCRIPT), "--cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    else:
        yield value


def test_every_step_says_what_it_found() -> None:
    lines = lines_of(PYTHON=sys.executable, XLA_FLAGS=QUICK)
    assert [line["step"] for line in lines] == ON_A_CPU
    for line in lines:
        assert line["ok"], line
        assert not {"left_out", "errors"} & line.keys()
        found = [*numbers(line["figures"])]
        assert found
        assert all(math.isfinite(number) for number in found), line


def test_a_step_that_fails_is_a_line_and_the_others_go_on() -> None:
    lines = lines_of(PYTHON="false")
    assert [line["step"] for line in lines] == ON_A_CPU
    assert {(line["ok"], line["reason"]) for line in lines} == {(False, "exit code 1")}


def test_a_step_that_is_ended_says_what_it_has() -> None:
    """As `timeout` ends it; gpu.sh's own line is for those that cannot say anything."""
    command = [sys.executable, str(SCRIPT.with_name("gpu_steps.py")), "seeds", "90", "--cpu"]
    pipe = subprocess.PIPE
    environment = os.environ | {"XLA_FLAGS": QUICK}
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as step:
        assert step.stderr and step.stderr.readline().startswith("K 2")
        step.terminate()
        written, _ = step.communicate()
    line = json.loads(written)
    assert (line["step"], line["ok"], len(line["figures"])) == ("seeds", False, 1)
    assert line["errors"] == {"the rest": "not done in time"}


def test_an_error_is_noted_and_what_time_does_not_reach_left_out() -> None:
    taken = Taken(1e3)
    taken.take("broken", lambda: 1 / 0)
    taken.take("sound", lambda: 1.23456)
    line = json.loads(taken.line("step", "device"))
    assert (line["ok"], line["figures"]) == (False, {"sound": 1.235})
    assert line["errors"] == {"broken": "ZeroDivisionError: division by zero"}
    late = Taken(-1)
    late.take("late", lambda: 1.0)
    assert json.loads(late.line("step", "device"))["left_out"] == ["late"]


@pytest.mark.parametrize(
    ("batch", "together", "expected"),
    [(32, 1, 5.6), (32, 256, 3.8), (256, 1, 8.0), (256, 256, 6.1)],
)
def test_the_floor_is_that_of_the_arithmetic(batch: int, together: int, expected: float) -> None:
    """By hand, for an H200: 4.8 TB/s and 400 TFLOP/s."""
    rate = {"tf32_tflops": 400.0, "copy_tbs": 4.8}
    assert floor_us(Sizes(), batch, together, rate) == pytest.approx(expected, rel=0.04)
