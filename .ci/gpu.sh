#!/usr/bin/env bash
# Everything that should be seen once on a GPU, in one command of about six minutes: the tests that
# use the device, the presets gpt and modern to their end, and the benchmark. It prints as it goes
# and leaves the figures in OUT/figures.md.
#
#     .ci/gpu.sh [--device cuda] [--short] [--nanogpt FOLDER] [--out OUT]
#
# --short takes a few steps of everything, so that the script itself can be tried on a CPU:
#     .ci/gpu.sh --device cpu --short
# With nanoGPT's folder, its model of the same shape trains beside ours, eager and compiled.
set -euo pipefail
cd "$(dirname "$0")/.."
device=cuda short= nanogpt= out=
while [ $# -gt 0 ]; do
    case $1 in
        --short) short=yes; shift ;;
        --device) device=$2; shift 2 ;;
        --nanogpt) nanogpt=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        *) echo "error: $1: unknown; see the top of this script" >&2; exit 2 ;;
    esac
done
out=${out:-$(mktemp -d)}
mkdir -p "$out"
figures=$out/figures.md
steps= seconds=4
if [ -n "$short" ]; then
    steps="--max_steps 2 --batch_size 2 --grad_accum 1 --eval_batches 1 --n_layer 1 --n_embd 96"
    seconds=0.1
fi
figure() { echo "$*" | tee -a "$figures"; }

figure "commit $(git rev-parse --short HEAD), $(python -c '
import torch, sys
on_gpu = sys.argv[1].startswith("cuda")
name = torch.cuda.get_device_name(sys.argv[1]) if on_gpu else f"{torch.get_num_threads()} threads"
print(f"PyTorch {torch.__version__}, {sys.argv[1]}: {name}")' "$device")"

tests=gpu
[ -n "$short" ] && tests="gpu and not slow" # compiling takes a minute on a CPU
MINIGPT_DEVICE=$device python -m pytest -q -m "$tests" test_minigpt.py | tee "$out/tests.log"
figure "tests: $(tail -1 "$out/tests.log")"

figure "| preset | steps | loss | seconds | tokens/s | peak memory, MB |"
figure "|---|---|---|---|---|---|"
for preset in gpt modern; do
    # shellcheck disable=SC2086
    python minigpt.py --mode train --preset $preset --device "$device" --out_dir "$out/$preset" \
        --no_wandb $steps
    figure "$(python - "$preset" "$out/$preset/metrics.jsonl" <<'PYTHON'
import json, statistics, sys
preset, path = sys.argv[1:]
records = [json.loads(line) for line in open(path, encoding="utf-8")]
end = records[-1]
rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
memory = end.get("peak_memory", 0) / 1e6
print(f"| {preset} | {end['step']} | {end['full_val_loss']:.4f} | {end['seconds']:.0f} | "
      f"{statistics.median(rates):,.0f} | {memory:,.0f} |")
PYTHON
)"
done

small=
[ -n "$short" ] && small="--batch_size 2 --n_layer 1 --n_embd 96 --max_tokens 10"
for preset in gpt modern; do
    for compile in --no_compile --compile; do
        [ -n "$short" ] && [ $compile = --compile ] && continue
        figure "bench $preset $compile"
        # shellcheck disable=SC2086
        python minigpt.py --mode bench --preset $preset --device "$device" $compile \
            --bench_seconds "$seconds" $small | tee -a "$figures"
        [ -n "$nanogpt" ] || continue
        # shellcheck disable=SC2086
        python .ci/peers.py --nanogpt "$nanogpt" --training_only --seconds "$seconds" \
            --device "$device" --preset $preset $compile $small | tee -a "$figures"
    done
done
echo "the figures are in $figures"
