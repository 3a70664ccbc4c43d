"""
The two ladders of the book: what each part of a GPT brings, one change at a time.

    python .ci/ladder.py --part 1 --out_dir ladder1    # from the bigram model to `plain`
    python .ci/ladder.py --part 2 --out_dir ladder2    # from `plain` to `laptop`

Each rung is `minigpt.py --mode train` with the flags of the rung. In part 1, all rungs have equal
steps. In part 2, they have equal time, and a rung has the flags of all rungs before it; but the
last one, which learns from three models, takes its own time. To find equal times, each rung is
first trained for a moment, several times in turn. The fastest of these counts, because a
disturbance only makes a run slower. Runs that are complete are not repeated. Prints a table of the
losses on the full validation split.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import minigpt

TOKENS = 2048  # in a step of any rung


class AttentionOnly(minigpt.Block):
    """A block that is nothing but attention."""
    def forward(self, x, *memory):
        return self.attn(x, *memory)


class NoAdditions(minigpt.Block):
    """A block without the additions that form the residual stream."""
    def forward(self, x, *memory):
        return self.mlp(self.attn(x, *memory))


minigpt.BLOCKS["attention_only"] = AttentionOnly
minigpt.BLOCKS["no_additions"] = NoAdditions

ONE_LAYER = "--preset plain --n_layer 1 --norm none"
PART_1 = {
    "the bigram model": "--preset bigram --batch_size 16 --block_size 128",
    "one layer of attention, one head": f"{ONE_LAYER} --n_head 1 --block attention_only",
    "four heads": f"{ONE_LAYER} --block attention_only",
    "an MLP": f"{ONE_LAYER} --block no_additions",
    "the additions (residual stream)": ONE_LAYER,
    "LayerNorm": "--preset plain --n_layer 1",
    "four layers: `plain`": "--preset plain",
}
PART_2 = {
    "`plain`": "--preset plain --eval_interval 500",
    "fused kernels, no biases": "--attention fused --norm fused_layernorm --no_bias",
    "RoPE": "--pos rope",
    "squared ReLU, QK-norm, two heads": "--activation relu2 --qk_norm --n_head 2",
    "Muon, learning rate linear to 0": "--optimizer muon --momentum 0.85 --weight_decay 0.2 "
    "--learning_rate 7e-3 --schedule linear --min_lr 0 --warmup_steps 50",
    "even windows": "--sampling even",
    "windows of 128, then of 512": "--block_size 512 --batch_size 4 --short_share 0.7",
    "a previous-position head": "--prev_heads 1",
    "training at temperature 0.9: `laptop`": "--train_temperature 0.9",
}
# These cost no time, so they get as many steps as the rung before them.
FREE = {"even windows": "Muon, learning rate linear to 0",
        "training at temperature 0.9: `laptop`": "a previous-position head"}
LAST = "a previous-position head"  # the time of its steps is the time of every rung
TAUGHT = "three teachers, twice the steps"  # after the last rung, and in its own time


def run(job: tuple) -> list[dict]:
    """Trains one model in this process, or continues. Returns the records of the run."""
    flags, out_dir, threads = job
    torch.set_num_threads(threads)
    code = minigpt.main(["--mode", "train", *flags, "--out_dir", str(out_dir), "--resume",
                         "--sample_tokens", "0", "--checkpoint_interval", "0", "--no_wandb"])
    assert code == 0, flags
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def final_loss(job: tuple) -> float:
    """The loss of a run on the full validation split."""
    return run(job)[-1]["full_val_loss"]


def rate(flags: list[str], out_dir: Path) -> float:
    """Tokens per second in training, on all cores."""
    short = ["--max_steps", "100", "--log_interval", "100", "--eval_batches", "1",
             "--eval_interval", "1000"]
    records = run(([*flags, *short], out_dir, os.cpu_count()))
    return next(r["tokens_per_second"] for r in records if "tokens_per_second" in r)


def steps_in_equal_time(rungs: dict, args) -> dict[str, int]:
    """How many steps each rung of part 2 may take. Measured once and stored."""
    path = args.out_dir / "steps.json"
    if not path.exists():
        rates = {name: [] for name in rungs}
        for turn in range(args.rounds):
            for number, (name, flags) in enumerate(rungs.items()):
                rates[name].append(rate(flags, args.out_dir / f"rate_{number}_{turn}"))
        fastest = {name: max(measured) for name, measured in rates.items()}
        for free, before in FREE.items():
            fastest[free] = fastest[before]
        seconds = args.steps * TOKENS / fastest[LAST]
        steps = {name: round(seconds * rate / TOKENS) for name, rate in fastest.items()}
        path.write_text(json.dumps({"seconds": seconds, "rates": rates, "steps": steps}))
    measured = json.loads(path.read_text())
    print(f"Each rung has {measured['seconds']:.0f} s of training.\n")
    return measured["steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=[1, 2], default=2)
    parser.add_argument("--steps", type=int, help="of each rung (part 1) or of the last (part 2)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each rung, from 1337 on")
    parser.add_argument("--rounds", type=int, default=3, help="of measuring the rates")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--out_dir", type=Path, default=Path("ladder"))
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    rungs = {}
    flags = []
    for name, added in (PART_1 if args.part == 1 else PART_2).items():
        flags = added.split() if args.part == 1 else [*flags, *added.split()]
        rungs[name] = flags
    args.steps = args.steps or (1500 if args.part == 1 else 1920)
    steps = dict.fromkeys(rungs, args.steps)
    if args.part == 2:
        steps = steps_in_equal_time(rungs, args)
        rungs[TAUGHT], steps[TAUGHT] = [*flags, "--teachers", "3"], 2 * args.steps

    jobs = {}
    threads = max(os.cpu_count() // args.jobs, 1)
    for seed in range(1337, 1337 + args.seeds):
        for number, (name, flags) in enumerate(rungs.items()):
            typed = [*flags, "--max_steps", str(steps[name]), "--seed", str(seed)]
            jobs[name, seed] = (typed, args.out_dir / f"{number}_seed={seed}", threads)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        losses = dict(zip(jobs, pool.map(final_loss, jobs.values())))
    print("| what is added | steps | nats per character |\n|---|---|---|")
    for name in rungs:
        of_rung = [loss for (other, _), loss in losses.items() if other == name]
        spread = f" ± {statistics.stdev(of_rung):.3f}" if len(of_rung) > 1 else ""
        print(f"| {name} | {steps[name]:,} | {statistics.fmean(of_rung):.3f}{spread} |")


if __name__ == "__main__":
    main()
