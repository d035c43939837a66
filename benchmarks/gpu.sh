#!/usr/bin/env bash
# What one GPU does, in ten minutes: bash benchmarks/gpu.sh > gpu.jsonl
#
# Six steps, each under its own time limit, one JSON line each as it ends (gpu_steps.py says what the
# figures are); figures appear on standard error as they are taken. A step that fails or takes too
# long is a line that says so (exit code 137: it had to be killed), and the next one goes on. Within a
# step what its time did not reach stands under "left_out". --cpu runs all of it small, to try it out: its figures mean nothing.
# PYTHON names the interpreter.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
small=()
[ "${1:-}" = --cpu ] && small=(--cpu)

step() { # NAME SECONDS [XLA flags]
  local line status
  line=$(XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }${3:-}" timeout -k 5 "$2" \
    "$python" benchmarks/gpu_steps.py "$1" "$2" "${small[@]}")
  status=$?
  echo "${line:-{\"step\": \"$1\", \"ok\": false, \"reason\": \"exit code $status\"\}}"
}

buffers=--xla_gpu_enable_command_buffer=
step floors 20
step settings 90
if [ ${#small[@]} = 0 ]; then # on a CPU these flags change nothing
  step buffers-none 15 "$buffers"
  step buffers-default 15
  step buffers-while 15 "$buffers+WHILE"
fi
step unrolled 15
step seeds 90
step shapes 150
step extract 120
