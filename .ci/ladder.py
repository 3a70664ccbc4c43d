"""The ladder of Part II: from `plain` to `laptop`, one change at a time, each rung in equal time.

    python .ci/ladder.py --seconds 195 --seeds 3 --out_dir ladder

Each rung is `minigpt.py --mode train` with the flags of all rungs so far, and as many steps as
`--mode bench` says fit into the seconds. Its folder is kept: typed again, the command goes on where
it was. Prints a table of the losses on the full validation split.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "minigpt.py"
RUNGS = {
    "`plain`": "--preset plain",
    "fused kernels, no biases": "--attention fused --no_bias",
    "RoPE": "--pos rope",
    "squared ReLU, QK-norm, two heads": "--activation relu2 --qk_norm --n_head 2",
    "Muon": "--optimizer muon --momentum 0.85 --weight_decay 0.2 --learning_rate 7e-3",
    "a straight line to zero": "--schedule linear --min_lr 0 --warmup_steps 50",
    "even windows": "--sampling even",
    "windows of 128, then of 512 (`laptop`)": "--block_size 512 --batch_size 4 --short_share 0.85",
    "token shift": "--token_shift",
}


def run(*argv: str) -> str:
    done = subprocess.run([sys.executable, PROGRAM, *argv], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=195, help="of training, for each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each rung, from 1337 on")
    parser.add_argument("--out_dir", type=Path, default=Path("ladder"))
    args, flags = parser.parse_args(), []
    print("| what is added | steps | nats per character |\n|---|---|---|")
    for number, (name, added) in enumerate(RUNGS.items()):
        flags += added.split()
        folder = args.out_dir / str(number)
        steps_file = folder / "steps"
        if not steps_file.exists():
            bench = run("--mode", "bench", *flags, "--max_tokens", "1")
            rate = float(re.search(r"training, tokens/s \| ([\d,]+)", bench)[1].replace(",", ""))
            folder.mkdir(parents=True, exist_ok=True)
            steps_file.write_text(str(round(args.seconds * rate / 2048)))
        losses = []
        for seed in range(1337, 1337 + args.seeds):
            out_dir = folder / str(seed)
            run("--mode", "train", *flags, "--max_steps", steps_file.read_text(), "--seed",
                str(seed), "--out_dir", str(out_dir), "--sample_tokens", "0", "--resume")
            last = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
            losses.append(json.loads(last)["full_val_loss"])
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"| {name} | {steps_file.read_text()} | {statistics.fmean(losses):.4f}{spread} |",
              flush=True)


if __name__ == "__main__":
    main()
