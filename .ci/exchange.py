"""
Runs exported models in the programs that the README names, and compares.

    python .ci/exchange.py [--work FOLDER] [--only llama.cpp] [--presets plain,laptop]

Trains each preset for a few steps, exports it, and installs each program into a folder of its own
below FOLDER (the first time takes minutes). Every program must give the same ids for some texts,
write the same 64 tokens greedily, and, if it shows them, have the same logits. Prints a table: in
each cell, whether the ids are equal, how many of the first 64 tokens are, and the largest
difference of a logit (of a log-probability for llama.cpp). Needs torch and requests here, and node
and npm for transformers.js.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

N = 64  # tokens to write
TEXTS = ["ROMEO:\nWhat lady is that?", "  to  be \n\n", "'Tis we'll", "\n", "QUEEN: O, my lord!"]
SHORT = "--max_steps 60 --batch_size 4 --grad_accum 1 --eval_batches 1 --warmup_steps 10".split()
PRESETS = {
    "plain": SHORT, "gpt": [*SHORT, "--learning_rate", "1e-3"], "laptop": ["--max_steps", "100"],
    "modern": SHORT, "bpe": [*SHORT, "--learning_rate", "3e-3"]}
PROGRAMS = {  # and what has to be installed for each
    "transformers 5": ["transformers>=5,<6", "safetensors"],
    "transformers 4.57": ["transformers==4.57.6", "safetensors"],
    "MLX": ["mlx[cpu]", "mlx-lm"],
    "CTranslate2": ["ctranslate2", "transformers==4.57.6", "safetensors"],
    "llama.cpp": ["xllamacpp"],
    "transformers.js": ["@huggingface/transformers"]}


# ---- The other programs: each of these runs in a process of its own ------------------------------
def ask_transformers(folder: Path) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    start = torch.tensor([ids[0]])
    with torch.no_grad():
        logits = model(start).logits[0, -1].tolist()
    written = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=N,
                             do_sample=False)
    return {"ids": ids, "written": written[0, len(ids[0]) :].tolist(), "logits": logits}


def ask_mlx(folder: Path) -> dict:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, tokenizer = load(str(folder))
    ids = [tokenizer.encode(text) for text in TEXTS]
    logits = model(mx.array([ids[0]]))[0, -1].tolist()
    steps = generate_step(mx.array(ids[0]), model, max_tokens=N)
    return {"ids": ids, "written": [int(token) for token, _ in steps], "logits": logits}


def ask_ctranslate2(folder: Path) -> dict:
    import ctranslate2
    import numpy
    from transformers import AutoTokenizer

    converted = folder.with_name("ctranslate2")
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted), force=True)
    # A vocabulary of characters has no special tokens, but the program wants strings here.
    settings = json.loads((converted / "config.json").read_text())
    changed = {name: "" if name.endswith("_token") and value is None else value
               for name, value in settings.items()}
    (converted / "config.json").write_text(json.dumps(changed))
    generator = ctranslate2.Generator(str(converted))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    logits = numpy.array(generator.forward_batch([tokens]))[0, -1].tolist()
    result = generator.generate_batch([tokens], max_length=N, min_length=N, sampling_topk=1,
                                      include_prompt_in_result=False)
    return {"ids": ids, "written": result[0].sequences_ids[0], "logits": logits}


def ask_llama_cpp(folder: Path) -> dict:
    import requests
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder.with_name("model.gguf"))
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 128, 1, 0, 0
    server = xllamacpp.Server(params)

    def post(what, **question):
        return requests.post(f"{server.listening_address}/{what}", json=question).json()

    ids = [post("tokenize", content=text)["tokens"] for text in TEXTS]
    answer = post("completion", prompt=ids[0], n_predict=N, temperature=0, return_tokens=True,
                  n_probs=10)
    first = answer["completion_probabilities"][0]["top_logprobs"]
    return {"ids": ids, "written": answer["tokens"],
            "logprobs": {guess["id"]: guess["logprob"] for guess in first}}


ASK = {"transformers 5": ask_transformers, "transformers 4.57": ask_transformers, "MLX": ask_mlx,
       "CTranslate2": ask_ctranslate2, "llama.cpp": ask_llama_cpp}
JAVASCRIPT = """
import { AutoTokenizer, env } from "@huggingface/transformers";
const [, , folder, texts] = process.argv;
env.allowRemoteModels = false;
env.localModelPath = folder + "/..";
const tokenizer = await AutoTokenizer.from_pretrained(folder.split("/").pop());
console.log(JSON.stringify({ ids: JSON.parse(texts).map((text) => tokenizer.encode(text)) }));
"""


# ---- Here ----------------------------------------------------------------------------------------
def install(program: str, work: Path) -> Path:
    """Installs a program into a folder of its own, once. Returns the folder."""
    folder = work / "programs" / program.replace(" ", "_")
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if program == "transformers.js":
            command = ["npm", "install", "--ignore-scripts", "--silent", "--prefix", str(folder)]
        else:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        subprocess.run([*command, *PROGRAMS[program]], check=True, stdout=sys.stderr)
        (folder / "complete").touch()
    return folder


def answer_of(program: str, installed: Path, folder: Path) -> dict:
    """What a program says of an exported model."""
    if program == "transformers.js":
        (installed / "ask.mjs").write_text(JAVASCRIPT)
        command = ["node", str(installed / "ask.mjs"), str(folder), json.dumps(TEXTS)]
        environment = os.environ
    else:
        command = [sys.executable, __file__, "--ask", program, str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def prepare(preset: str, work: Path) -> tuple[Path, dict]:
    """Trains and exports a preset, once. Returns the folder, and what minigpt says."""
    import torch

    import minigpt

    run = work / "runs" / preset
    program = [sys.executable, ROOT / "minigpt.py", "--out_dir", run, "--mode"]
    commands = {
        "latest.pt": ["train", "--preset", preset, "--no_wandb", "--sample_tokens", "0",
                      "--eval_interval", "1000", *PRESETS[preset]],
        "hf": ["export"], "model.gguf": ["export", "--format", "gguf"]}
    for made, command in commands.items():
        if not (run / made).exists():
            subprocess.run([*program, *command], check=True, stdout=sys.stderr)
    used = minigpt.load_for_use(minigpt.Options(checkpoint=str(run / "latest.pt"), device="cpu"))
    ids = [used.tokenizer.encode(text) for text in TEXTS]
    start = torch.tensor([ids[0]])
    with torch.no_grad():
        logits = used.model(start)[0][0, -1]
    written = used.model.generate(start, N, temperature=0)[0, len(ids[0]) :].tolist()
    return run / "hf", {"ids": ids, "written": written, "logits": logits.tolist()}


def compare(theirs: dict, ours: dict) -> str:
    """One cell of the table."""
    import torch

    if "error" in theirs:
        return f"error: {theirs['error']}"
    parts = ["equal" if theirs["ids"] == ours["ids"] else "DIFFERENT"]
    if "written" in theirs:
        pairs = list(zip(theirs["written"], ours["written"]))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        parts.append(f"{same} of {N}")
    ours_logits = torch.tensor(ours["logits"])
    if "logits" in theirs:
        error = (torch.tensor(theirs["logits"])[: len(ours_logits)] - ours_logits).abs().max()
        parts.append(f"{error:.0e}")
    if "logprobs" in theirs:
        logprobs = ours_logits.log_softmax(-1)
        error = max(abs(p - logprobs[int(i)].item()) for i, p in theirs["logprobs"].items())
        parts.append(f"{error:.0e}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("exchange"))
    parser.add_argument("--only", help="programs, separated by commas")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--ask", nargs=2, metavar=("PROGRAM", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ASK[args.ask[0]](Path(args.ask[1]))))
        return
    work = args.work.resolve()
    presets = args.presets.split(",")
    models = {preset: prepare(preset, work) for preset in presets}
    print(f"| program | {' | '.join(presets)} |\n|---|{'---|' * len(presets)}")
    for program in args.only.split(",") if args.only else PROGRAMS:
        installed = install(program, work)
        cells = [compare(answer_of(program, installed, folder), ours)
                 for folder, ours in models.values()]
        print(f"| {program} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
