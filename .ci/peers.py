"""
Measures minigpt beside its peers, in one process and in turns, so that a change in the machine's
speed affects all of them: training and writing beside a checkout of nanoGPT and Hugging Face's
GPT-2, byte-pair encoding beside the Rust library tokenizers. Prints a table of medians.

    python .ci/peers.py --nanogpt FOLDER [--preset plain] [--seconds 60] [any flag of minigpt's]
    python .ci/peers.py --whole 3 [--nanogpt FOLDER] [--against COMMIT] [any flag of minigpt's]

The second form runs whole training commands in turn, three times each: ours, with the flags; an
earlier commit of ours, with its preset laptop; nanoGPT's recipe for CPUs, from its README (run its
data/shakespeare_char/prepare.py before). Prints seconds, losses, and how much of the others' time
ours took.

Needs transformers and tokenizers. On a CPU, the peers compute in float32, as they do by default. On
a GPU (--device cuda --training_only), nanoGPT computes in bfloat16. With --compile, both are
compiled.
"""

import argparse
import contextlib
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import minigpt

ROOT = Path(__file__).resolve().parent.parent
NANOGPT_ON_CPU = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0")


def take_turns(functions: dict, seconds: float) -> dict[str, float]:
    """The median seconds of a call of each; the first round warms up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {name: [] for name in functions}
    end = None
    while end is None or time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            wait()
            times[name].append(time.perf_counter() - begin)
        if end is None:
            end = time.perf_counter() + seconds
            times = {name: [] for name in functions}
    return {name: statistics.median(taken) for name, taken in times.items()}


def ours(flags: list[str]):
    """Our model, the settings of its training, and a function that takes one step."""
    typed = minigpt.parse(["--mode", "bench", "--dropout", "0", *flags])
    device = minigpt.find_device(typed.get("device", "auto"))
    preset = minigpt.choose_preset(typed, device)
    config = minigpt.training_settings(preset, {**typed, "grad_accum": 1})
    config = minigpt.replace(config, dtype=minigpt.find_dtype(config.dtype, device))
    model = minigpt.new_model(minigpt.model_settings(preset, typed, 65), config.seed).to(device)
    runner, optimizer = minigpt.wrap(model, config), minigpt.OPTIMIZERS[config.optimizer](
        model, config)
    x, y = torch.randint(65, (2, config.batch_size, model.config.block_size))
    return model, config, lambda: minigpt.train_step(runner, optimizer, [(x, y)], config)


def nanogpt(folder: str, c: minigpt.GPTConfig, batch_size: int, device: str, compiled: bool):
    """nanoGPT's model of the same shape, and a function that takes one of its training steps."""
    names = runpy.run_path(str(Path(folder) / "model.py"))
    with contextlib.redirect_stdout(sys.stderr):  # it prints
        model = names["GPT"](names["GPTConfig"](
            block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
            n_embd=c.n_embd, dropout=0.0, bias=c.bias))
        model.to(device)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.split(":")[0])
    x, y = torch.randint(c.vocab_size, (2, batch_size, c.block_size), device=device)
    runner = torch.compile(model) if compiled else model

    def step():
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device != "cpu"):
            _, loss = runner(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def huggingface(c: minigpt.GPTConfig):
    """A function that has Hugging Face's GPT-2 of the same shape write n tokens from idx."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, bos_token_id=None, eos_token_id=None)).eval()
    return lambda idx, n: model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                                         do_sample=True, top_k=0, pad_token_id=0)


def tokenizer_times(text: str, vocab_size: int, seconds: float) -> dict[str, float]:
    """Seconds to train and to encode for the first time, ours and the Rust library's."""
    import tokenizers

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = minigpt.BPETokenizer.train(text, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder)
        rust = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(
            f"{folder}/vocab.json", f"{folder}/merges.txt", cache_capacity=0))
    rust.pre_tokenizer = byte_level
    assert rust.encode(text).ids == ours.encode(text)

    def train_rust():
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, min_frequency=2, show_progress=False,
            initial_alphabet=byte_level.alphabet())
        new = tokenizers.Tokenizer(tokenizers.models.BPE())
        new.pre_tokenizer = byte_level
        new.train_from_iterator([text], trainer)
        assert len(json.loads(new.to_str())["model"]["merges"]) == len(ours.merges)

    def encode():
        ours.encode_word.cache_clear()
        ours.encode(text)

    name = f"BPE of {vocab_size:,}"
    return take_turns({
        f"{name}, training": lambda: minigpt.BPETokenizer.train(text, vocab_size),
        f"{name}, training, tokenizers": train_rust,
        f"{name}, encoding": encode,
        f"{name}, encoding, tokenizers": lambda: rust.encode(text)}, seconds)


def timed(command: list[str], folder) -> float:
    """Seconds of a command, which must succeed."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def train_ours(source: Path, out_dir: Path, flags: list[str]) -> tuple[float, float]:
    """Seconds of a whole training command, and its loss on the full validation split."""
    seconds = timed(["minigpt.py", "--mode", "train", "--no_wandb", "--out_dir", str(out_dir),
                     *flags], source)
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return seconds, json.loads(lines[-1])["full_val_loss"]


def compare_whole_runs(args, flags: list[str]) -> None:
    """Prints a table of whole commands, run in turn."""
    rows = {"ours": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.against:
            rows[args.against] = []
            subprocess.run(["git", "clone", "--quiet", ROOT, folder / "old"], check=True)
            subprocess.run(["git", "checkout", "--quiet", args.against], cwd=folder / "old",
                           check=True)
            corpus = (ROOT / "data" / "input.txt").read_bytes()
            (folder / "old" / "data" / "input.txt").write_bytes(corpus)
        if args.nanogpt:
            rows["nanoGPT"] = []
        for number in range(args.whole):
            seed = ["--seed", str(args.seed + number)]
            rows["ours"].append(train_ours(ROOT, folder / f"ours{number}", [*flags, *seed]))
            if args.against:
                rows[args.against].append(train_ours(
                    folder / "old", folder / f"old{number}", ["--preset", "laptop", *seed]))
            if args.nanogpt:
                rows["nanoGPT"].append((timed(NANOGPT_ON_CPU.split(), args.nanogpt), None))
    print(f"| {os.cpu_count()} cores, seeds from {args.seed} on | seconds | loss "
          "| time of ours, relative to it |\n|---|---|---|---|")
    for name, runs in rows.items():
        seconds = ", ".join(f"{taken:.0f}" for taken, _ in runs)
        losses = ", ".join(f"{loss:.4f}" for _, loss in runs if loss is not None)
        ratio = statistics.median(mine / taken for (mine, _), (taken, _) in zip(rows["ours"], runs))
        print(f"| {name} | {seconds} | {losses} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="the folder that has its model.py")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each group of figures")
    parser.add_argument("--tokenizers", action="store_true", help="only these")
    parser.add_argument("--training_only", action="store_true", help="of the models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--whole", type=int, metavar="ROUNDS", help="time whole training commands")
    parser.add_argument("--against", metavar="COMMIT", help="an earlier commit of ours")
    parser.add_argument("--seed", type=int, default=1337, help="of the first round")
    args, flags = parser.parse_known_args()
    if args.whole:
        compare_whole_runs(args, flags)
        return
    if args.tokenizers:
        text = minigpt.read_corpus("").text
        for size in (1024, 8192):
            for name, taken in tokenizer_times(text, size, args.seconds).items():
                print(f"| {name}, s | {taken:.3f} |")
        return
    model, config, step = ours([*flags, "--device", args.device])
    c, write = model.config, model.generate
    peer, peer_step = nanogpt(args.nanogpt, c, config.batch_size, args.device, config.compile)
    tokens = config.batch_size * c.block_size
    trained = take_turns({"minigpt": step, "nanoGPT": peer_step}, args.seconds)
    for name, taken in trained.items():
        print(f"| training, {name}, tokens/s | {tokens / taken:,.0f} |")
    if args.training_only:
        return
    idx, n, many = torch.zeros(1, 1, dtype=torch.long), c.block_size - 1, 512
    theirs = huggingface(c)
    peer.eval()
    written = take_turns({
        "writing a window": lambda: write(idx, n), "Hugging Face": lambda: theirs(idx, n),
        "writing 512": lambda: write(idx, many), "nanoGPT": lambda: peer.generate(idx, many),
        "8 samples": lambda: write(idx.expand(8, 1), many),
        "weights": lambda: [p.sum() for p in model.parameters()]}, args.seconds)
    print(f"| reading all weights, times/s | {1 / written.pop('weights'):,.0f} |")
    lengths = {"writing 512": many, "nanoGPT": many, "8 samples": 8 * many}
    for name, taken in written.items():
        print(f"| writing, {name}, tokens/s | {lengths.get(name, n) / taken:,.0f} |")


if __name__ == "__main__":
    main()
