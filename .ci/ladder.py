"""The ladder of Part II: from `plain` to `laptop`, one change at a time, in equal time.

    python .ci/ladder.py --out_dir ladder

Each rung is `minigpt.py --mode train` with the flags of all rungs so far. First each trains for a
moment, several times in turn, which tells how many of its steps take the time of the last one's.
Then all are trained, --jobs at once; what was trained before is not trained again. Prints a table
of the losses on the full validation split.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "minigpt.py"
TOKENS = 2048  # in a step of any rung
RUNGS = {
    "`plain`": "--preset plain --eval_interval 500",
    "fused kernels, no biases": "--attention fused --no_bias",
    "RoPE": "--pos rope",
    "squared ReLU, QK-norm, two heads": "--activation relu2 --qk_norm --n_head 2",
    "Muon, a straight line to zero": "--optimizer muon --momentum 0.85 --weight_decay 0.2 "
    "--learning_rate 7e-3 --schedule linear --min_lr 0 --warmup_steps 50",
    "even windows": "--sampling even",
    "windows of 128, then of 512": "--block_size 512 --batch_size 4 --short_share 0.85",
}
LAPTOP = "windows of 128, then of 512"
FREE = "even windows"  # which cost no time: as many steps as the rung before


def run(flags: list[str], out_dir: Path, threads: int) -> list[dict]:
    """Trains, or goes on. Returns the records of the run."""
    command = [sys.executable, PROGRAM, "--mode", "train", *flags, "--out_dir", out_dir, "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, "--sample_tokens", "0"], env=environment, check=True)
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rate(flags: list[str], out_dir: Path) -> float:
    """Tokens per second in training, on all cores."""
    short = ["--max_steps", "100", "--log_interval", "100", "--eval_batches", "1"]
    records = run([*flags, *short, "--eval_interval", "1000"], out_dir, os.cpu_count())
    return next(r["tokens_per_second"] for r in records if "tokens_per_second" in r)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2500, help="of the last rung")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each rung, from 1337 on")
    parser.add_argument("--rounds", type=int, default=3, help="of measuring the rates, in turn")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--out_dir", type=Path, default=Path("ladder"))
    args, flags, rungs = parser.parse_args(), [], {}
    for name, added in RUNGS.items():
        flags = [*flags, *added.split()]
        rungs[name] = flags
    steps_file = args.out_dir / "steps.json"
    if not steps_file.exists():
        rates = {name: [] for name in rungs}
        for turn in range(args.rounds):
            for number, (name, flags) in enumerate(rungs.items()):
                rates[name].append(rate(flags, args.out_dir / f"rate_{number}_{turn}"))
        medians = {name: statistics.median(measured) for name, measured in rates.items()}
        medians[FREE] = medians["Muon, a straight line to zero"]
        seconds = args.steps * TOKENS / medians[LAPTOP]
        steps = {name: round(seconds * median / TOKENS) for name, median in medians.items()}
        steps_file.write_text(json.dumps({"seconds": seconds, "rates": rates, "steps": steps}))
    measured = json.loads(steps_file.read_text())

    def loss(job) -> float:
        name, seed = job
        flags = [*rungs[name], "--max_steps", str(measured["steps"][name]), "--seed", str(seed)]
        out_dir = args.out_dir / f"{list(rungs).index(name)}_seed={seed}"
        return run(flags, out_dir, max(os.cpu_count() // args.jobs, 1))[-1]["full_val_loss"]

    jobs = [(name, seed) for seed in range(1337, 1337 + args.seeds) for name in rungs]
    with ThreadPoolExecutor(args.jobs) as pool:
        losses = dict(zip(jobs, pool.map(loss, jobs)))
    print(f"Each rung {measured['seconds']:.0f} s of training.\n\n| what is added | steps | "
          "nats per character |\n|---|---|---|")
    for name in rungs:
        mine = [loss for (other, _), loss in losses.items() if other == name]
        spread = f" ± {statistics.stdev(mine):.3f}" if len(mine) > 1 else ""
        print(f"| {name} | {measured['steps'][name]:,} | {statistics.fmean(mine):.3f}{spread} |")


if __name__ == "__main__":
    main()
