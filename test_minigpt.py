"""
The laws of minigpt, chapter by chapter, in the order of minigpt.py.

The name of a test states a law. Its docstring says why the law holds and which mistake would break
it.
References are computed in float64, by PyTorch or by hand.
"""

import ast
import collections
import contextlib
import doctest
import functools
import hashlib
import html as html_module
import http.server
import importlib.machinery
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F

import download_data
import minigpt
from minigpt import (
    GPT,
    Attention,
    BPETokenizer,
    CachedReader,
    CharTokenizer,
    Corpus,
    GPTConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UserError,
    get_lr,
    load_checkpoint,
    train_step,
)

torch.set_num_threads(1)  # models this small only lose time by sharing their work

HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = str(HERE)  # for the processes that these tests start
os.environ["WANDB_MODE"] = "disabled"  # no test may log to the account of the user who runs it
SAMPLE = HERE / "data" / "sample.txt"
SOURCE = (HERE / "minigpt.py").read_text(encoding="utf-8")
SMALL = dict(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, dropout=0.0)
TINY = dict(batch_size=4, grad_accum=2, max_steps=6, learning_rate=1e-2, min_lr=1e-3,
            warmup_steps=2, eval_interval=2, eval_batches=2, sample_tokens=5, checkpoint_interval=0)

def small_config(**changes):
    return ModelConfig(**{**SMALL, **changes})

def stir(module, seed=0):
    """The module in float64, with weights moved so far that gains and biases matter."""
    torch.manual_seed(seed)
    for p in module.double().parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return module

def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = small_config(**changes)
    return stir(minigpt.MODELS[config.model](config), seed)

def random_ids(*shape, seed=0, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))

def random_x(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)

def pair(idx):
    """Inputs and targets: idx without its last column, and without its first."""
    return idx[:, :-1], idx[:, 1:]

def assert_close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def assert_same(a, b):
    """Equal bit for bit, through dictionaries and lists."""
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

# Whole runs through the real entry point. These functions are used by the later chapters.
FOLDER = tempfile.TemporaryDirectory()
SHORT = Path(FOLDER.name, "short.txt")  # enough for models this small
SHORT.write_text(SAMPLE.read_text(encoding="utf-8")[:12_000], encoding="utf-8")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="this exists on POSIX systems only")
TRAIN = ["--mode", "train", "--preset", "laptop", "--data", str(SHORT), "--device", "cpu",
         "--dtype", "float32", "--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size",
         "16", "--batch_size", "4", "--grad_accum", "2", "--max_steps", "6", "--eval_interval", "3",
         "--eval_batches", "2", "--warmup_steps", "2", "--log_interval", "1", "--dropout", "0.1",
         "--sample_tokens", "12"]
RESUME = ["--mode", "train", "--resume", "--out_dir"]

def replaced(argv):
    """A command line in which a later value replaces an earlier one of the same flag."""
    argv = [str(word) for word in argv]
    for flag in ("--data", "--out_dir", "--preset", "--init_from"):
        while argv.count(flag) > 1:
            del argv[argv.index(flag) : argv.index(flag) + 2]
    if "--vary" in argv:  # it chooses this setting
        flag = "--" + argv[argv.index("--vary") + 1].split("=")[0]
        while flag in argv:
            del argv[argv.index(flag) : argv.index(flag) + 2]
    return argv

def run_main(*argv):
    """The command in this process, on the CPU: its exit code, and what it wrote to both streams."""
    if "--mode" in argv and "--device" not in argv:
        argv = [*argv, "--device", "cpu"]
    argv = replaced(argv)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = minigpt.main(argv)
    return code, out.getvalue(), err.getvalue()

def succeed(*argv):
    """The same, for a command that must succeed: what it wrote to stderr."""
    code, out, err = run_main(*argv)
    assert code == 0 and out == "", err
    return err

def train_tiny(out_dir, *argv):
    return succeed(*TRAIN, "--out_dir", out_dir, *argv)

def resume_tiny(out_dir, *argv):
    return succeed(*RESUME, out_dir, *argv)

def check_mistake(code, out, err, named):
    """A mistake ends in one line that holds all the words of named, with exit code 2. (Windows
    prints a path with other slashes than it may have been typed with.)"""
    lines = err.strip().replace("\\", "/").split("\n")
    named = [word.replace("\\", "/") for word in named]
    assert code == 2 and out == "" and "Traceback" not in err, err
    assert [line.startswith("error: ") for line in lines].count(True) == 1, err
    assert lines[-1].startswith("error: ") and all(word in lines[-1] for word in named), lines[-1]

def step_of(path):
    return load_checkpoint(path)["step"]

def model_of(path):
    """The model and the tokenizer of a checkpoint."""
    return minigpt.model_from_checkpoint(load_checkpoint(path), ModelConfig)

def assert_same_run(a, b, *parts):
    """Two checkpoints agree in the weights, the optimizer's state and the step."""
    a, b = load_checkpoint(a), load_checkpoint(b)
    for part in parts or ("model", "optimizer", "step"):
        assert_same(a[part], b[part])

def metrics_of(out_dir):
    """The records of a run. Of several of one kind and step, the later one counts."""
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return sorted({(*r, r["step"]): r for r in records}.values(), key=lambda r: r["step"])

def step_losses(out_dir):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in metrics_of(out_dir) if "loss" in r]

def evaluated(out_dir):
    return [r["step"] for r in metrics_of(out_dir) if "val_loss" in r]

def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def last_line(err):
    return err.strip().split("\n")[-1]

def score(err):
    """The line with the figures of the final evaluation."""
    return re.search("^full validation split.*", err, re.M)[0]

def importable(name):
    return __import__("importlib.util").util.find_spec(name) is not None

@pytest.fixture
def pictures():
    """For tests of the curves, which take longer to draw than a tiny model to train."""

@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(minigpt, "draw_curves", lambda *_: None)

@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """One small finished run that several tests look at: its folder and its log."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, train_tiny(folder, "--checkpoint_interval", "2")

@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(SAMPLE.read_text(encoding="utf-8"), 600)

def in_a_process(argv, out, err):
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(minigpt.main([str(a) for a in argv]))

@pytest.fixture(scope="session")
def start_main():
    """Starts the command in a process of its own without its seconds of importing: it is forked
    from a server that has imported what it needs."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minigpt", "matplotlib.figure", __name__])

    def start(argv, err, out=os.devnull):
        process = context.Process(target=in_a_process, args=(argv, str(out), str(err)))
        process.start()
        return process

    return start

def run_command(*argv, cwd=HERE, script="minigpt.py", **env):
    """The real command in a process of its own."""
    return subprocess.run([sys.executable, script, *map(str, argv)], cwd=cwd, capture_output=True,
                          env={**os.environ, **env}, text=True, encoding="utf-8", timeout=120)

def tiny_full_run(out_dir, model=None, **settings):
    """A FullRun of a small model, without a command line."""
    config = RunConfig(**{"batch_size": 3, "dtype": "float32", "wandb": False, **settings})
    corpus = Corpus(torch.arange(500) % 11, torch.arange(500) % 11, 500)
    model = minigpt.new_model(small_config(), 0) if model is None else model
    journal = minigpt.FullJournal(Path(out_dir), minigpt.SignalWatch())
    return minigpt.FullRun(model, CharTokenizer([*"abcdefghijk"]), corpus, config, out_dir,
                           torch.device("cpu"), {}, journal)

# ---- The book ------------------------------------------------------------------------------------
def run_examples(test):
    """Runs the examples of a doctest, which must all be true. Returns how many there are."""
    out = []
    failed, attempted = doctest.DocTestRunner().run(test, out=out.append)
    assert failed == 0, "".join(out)
    return attempted

DOCSTRINGS = {test.name: test for test in doctest.DocTestFinder().find(minigpt) if test.examples}

@pytest.mark.parametrize("name", DOCSTRINGS)
def test_worked_example_in_a_docstring_is_true(name):
    """The examples are run, so the book cannot say one thing and the program do another."""
    assert run_examples(DOCSTRINGS[name]) > 0

def examples_in_comments():
    """The examples between the chapters, in lines that begin with `# >>> `, as one doctest. An
    answer ends at the next empty comment or at the next line of code."""
    lines = []
    inside = False
    for line in SOURCE.split("\n"):
        inside = line.startswith("# >>> ") or (inside and line.startswith("# "))
        lines.append(line[2:] if inside else "")  # one line for each, so that line numbers are true
    return doctest.DocTestParser().get_doctest("\n".join(lines), dict(vars(minigpt)),
                                               "the comments", "minigpt.py", 0)

def test_worked_examples_in_comments_are_true():
    """They share one namespace, in the order of the book, as if a reader typed them one after
    another. Fails if an example is wrong, or if it uses a name that only a later one defines."""
    assert run_examples(examples_in_comments()) > 50

def test_every_worked_example_is_run():
    """Fails for an example with an indentation that keeps the two tests above from finding it."""
    written = len(re.findall(r"(?m)^ *(?:# *)?>>> ", SOURCE))
    run = [*DOCSTRINGS.values(), examples_in_comments()]
    assert sum(len(test.examples) for test in run) == written

def test_every_question_has_an_answer():
    """The title page promises the answers at the end. Both are numbered 1, 2, 3, ..., so that a
    reader finds them."""
    book, _, answers = SOURCE.partition("\n# ---- Answers to the questions ")
    numbers = [int(number) for number in re.findall(r"(?m)^# Question (\d+) ", book)]
    answered = [int(number) for number in re.findall(r"(?m)^# (\d+)\. ", answers)]
    assert numbers == answered == [*range(1, len(numbers) + 1)] != []

def test_no_place_is_left_to_be_filled():
    """A figure that is still to be measured stands between two marks. None may be published."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert "@@" not in SOURCE and "{{" not in readme

def test_the_title_page_promises_the_parts_that_follow():
    promised = re.findall(r"(?m)^    (Part [IV]+) +(\w.*?)  ", minigpt.__doc__)
    assert promised == re.findall(r"(?m)^# (Part [IV]+): (.*)", SOURCE) and len(promised) == 5
    listed = re.findall(r"(?m)^        (\w.*?)  +\S", minigpt.__doc__)
    assert listed == re.findall(r"(?m)^# ---- (.*?) -+$", SOURCE)

# ---- Part I stands alone -------------------------------------------------------------------------
PART_I = SOURCE[: SOURCE.index(f"# {'=' * 98}\n# Part II: ")]

@pytest.fixture
def part_one(monkeypatch):
    """A module that is made of the text of Part I and of nothing else."""
    module = types.ModuleType("part_one")
    monkeypatch.setitem(sys.modules, "part_one", module)
    exec(compile(PART_I, "part_one", "exec"), vars(module))
    return module

def test_part_one_uses_no_name_of_a_later_part():
    """Also in lines that no test reaches: every name that Part I reads is built into Python, or is
    defined or imported in Part I."""
    defined, read = set(vars(sys.modules["builtins"])), set()
    for node in ast.walk(ast.parse(PART_I)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.alias):
            defined.add(node.asname or node.name)
    assert read - defined == set()

def verse_run(book, folder, state=None):
    """A run on verse, by the names of `book`: a new run, or one that continues a checkpoint."""
    text = SAMPLE.read_text(encoding="utf-8")[:3000]
    config = book.TrainConfig(**TINY)
    if state is None:
        tokenizer = book.CharTokenizer.train(text)
        sizes = {**SMALL, "vocab_size": tokenizer.vocab_size, "dropout": 0.3}
        model = book.new_model(book.GPTConfig(**sizes), config.seed)
    else:
        model, tokenizer = book.model_from_checkpoint(state)
    folder.mkdir(exist_ok=True)
    corpus = book.Corpus.from_text(text, tokenizer)
    run = book.Run(model, tokenizer, corpus, config, folder)
    if state is not None:
        run.restore(state)
    return run

def finish(book, run):
    """Trains to the end. Returns the final score and the last checkpoint."""
    book.train(run)
    return run.score(), load_checkpoint(run.out_dir / "latest.pt")

def test_part_one_alone_encodes_trains_saves_resumes_and_writes(part_one, tmp_path):
    """A run that is interrupted after step 3 and resumed must end exactly as one that is not, and
    the whole program must compute exactly what Part I alone computes. Fails if Part I uses a name
    of a later part, or if a checkpoint lacks something that a run needs."""
    assert not hasattr(part_one, "RMSNorm") and list(part_one.NORMS) == ["layernorm"]
    score, state = finish(part_one, verse_run(part_one, tmp_path / "whole"))
    assert state["step"] == 6 and math.isfinite(score)

    def interrupt(run):
        if run.step == 3:
            run.save("latest.pt")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part_one.train(verse_run(part_one, tmp_path / "halves"), after_step=interrupt)
    half = load_checkpoint(tmp_path / "halves" / "latest.pt")
    assert half["step"] == 3 and half["best_step"] == 2
    resumed = finish(part_one, verse_run(part_one, tmp_path / "halves", half))
    assert_same(resumed, (score, state))
    assert_same(finish(minigpt, verse_run(minigpt, tmp_path / "file")), (score, state))

    model, tokenizer = part_one.model_from_checkpoint(state)
    assert type(model.h[0].attn) is part_one.CausalSelfAttention
    idx = torch.tensor([tokenizer.encode("Speak")])
    text = tokenizer.decode(model.generate(idx, 20, 0.8, top_k=9, top_p=0.9)[0].tolist())
    assert text.startswith("Speak") and len(text) == 25

def test_the_program_at_the_end_of_part_one_runs_as_printed(part_one, tmp_path, monkeypatch):
    """Only its text and its numbers are replaced here. It may use the names of Part I alone."""
    comment = PART_I.partition("\n# That is a complete GPT.")[2].partition("\n\n")[0]
    program = "\n".join(re.findall(r"(?m)^#     (.*)$", comment))
    for old, new in ((r"(?m)^text = .*$", ""), (r"\bn_embd=\d+", "n_embd=8"),
                     (r"\bbatch_size=\d+", "batch_size=2"), (r"\bmax_steps=\d+", "max_steps=2")):
        program, count = re.subn(old, new, program)
        assert count == 1, old
    monkeypatch.chdir(tmp_path)
    names = {**vars(part_one), "text": SAMPLE.read_text(encoding="utf-8")[:3000]}
    exec(program, names)
    assert names["run"].step == 2 and type(names["run"]) is part_one.Run
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "latest.pt"]

# ---- Part I is what runs -------------------------------------------------------------------------
def functions_of(text):
    """The functions and methods that a text defines: the line of each, by its qualified name."""
    found = {}
    for node in ast.parse(text).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for member in members:
            if isinstance(member, ast.FunctionDef):
                name = member.name if member is node else f"{node.name}.{member.name}"
                found[name] = min(line.lineno for line in (member, *member.decorator_list))
    return found

FUNCTIONS = functions_of(PART_I)

def function_named(name):
    """The function of minigpt with this qualified name, without its decorators."""
    owner, _, last = name.rpartition(".")
    thing = vars(getattr(minigpt, owner) if owner else minigpt)[last]
    if isinstance(thing, property):
        thing = thing.fget
    return inspect.unwrap(getattr(thing, "__func__", thing))

def remove_body(function, monkeypatch):
    """Replaces the body of a function by `raise`, wherever the function is known: in tables, in
    subclasses, and under other names. What it raises is not caught by any `except Exception`."""
    names = ", ".join(function.__code__.co_freevars)  # a new body must have the same ones
    lines = [f"def outer({names}):",
             "    def removed(*args, **kwargs):",
             f"        ({names})",
             "        raise BaseException('removed')",
             "        yield" if inspect.isgeneratorfunction(function) else "",  # of the same kind
             "    return removed"]
    scope = {}
    exec("\n".join(lines), scope)
    monkeypatch.setattr(function, "__code__", scope["outer"](*names.split()).__code__)

# All the sizes are cut down; everything else is what the title page tells the reader to type.
PLAIN = ["--mode", "train", "--preset", "plain", "--data", str(SHORT), "--n_layer", "1",
         "--n_head", "2", "--n_embd", "8", "--block_size", "8", "--batch_size", "2",
         "--max_steps", "2", "--sample_tokens", "2", "--warmup_steps", "1"]

def train_and_write(folder):
    """Trains a tiny `plain` model and writes with it. Returns the text."""
    succeed(*PLAIN, "--out_dir", folder)
    code, text, err = run_main("--mode", "generate", "--out_dir", folder, "--prompt", "the",
                               "--max_tokens", "3")
    assert code == 0, err
    return text

def train_bigram(folder):
    succeed(*PLAIN, "--out_dir", folder, "--preset", "bigram")

def resume(folder):
    succeed(*PLAIN, "--out_dir", folder, "--max_steps", "1")
    succeed(*RESUME, folder, "--max_steps", "2")

def bench(folder):
    run_main("--mode", "bench", *PLAIN[2:4], *PLAIN[6:16], "--bench_seconds", "0.001",
             "--max_tokens", "1")

# The functions of Part I that `--preset plain` does not need, and the command that needs each.
# Those without a command are for readers: the worked examples, and programs that import minigpt.
ELSEWHERE = {
    "Bigram.__init__": train_bigram,
    "Bigram.forward": train_bigram,
    "print_rows": None,
    "GPT.generate": bench,
    "Run.restore": resume,
}

@pytest.mark.parametrize("name", FUNCTIONS)
def test_plain_runs_this_function_of_part_one(name, monkeypatch, tmp_path):
    """The title page says that Part I is what runs. So training and writing with `plain` must fail
    when the body of any function of Part I is gone, except for those of ELSEWHERE, which must
    really be needed elsewhere only. Fails if a later part runs code of its own instead."""
    function = function_named(name)
    assert function.__code__.co_firstlineno == FUNCTIONS[name], "this is not Part I's function"
    remove_body(function, monkeypatch)
    if name in ELSEWHERE:
        assert train_and_write(tmp_path).startswith("the")
    else:
        with pytest.raises(BaseException, match="^removed$"):
            train_and_write(tmp_path)

@pytest.mark.parametrize("name", [name for name, command in ELSEWHERE.items() if command])
def test_another_command_runs_this_function_of_part_one(name, monkeypatch, tmp_path):
    """Otherwise it would be dead code, or a later part would have a copy of it."""
    remove_body(function_named(name), monkeypatch)
    with pytest.raises(BaseException, match="^removed$"):
        ELSEWHERE[name](tmp_path)

def outline(thing):
    """What a thing consists of, whichever module it was made in: the code of a function, and the
    fields, methods and bases of a class."""
    if isinstance(thing, property):
        thing = thing.fget
    thing = getattr(thing, "__func__", thing)  # of a classmethod
    if isinstance(thing, types.FunctionType):
        thing = inspect.unwrap(thing)
        return thing.__code__, [*map(outline, thing.__defaults__ or ())], thing.__kwdefaults__
    if isinstance(thing, type) and thing.__module__ in ("minigpt", "part_one"):
        members = {name: outline(member) for name, member in vars(thing).items()
                   if callable(member) or not name.startswith("__")}
        return (thing.__qualname__, [outline(base) for base in thing.__bases__], members,
                inspect.get_annotations(thing))
    return thing

def test_nothing_of_part_one_is_replaced_or_changed(part_one):
    """Later parts may add names, and entries to tables. Fails if one of them assigns to a name of
    Part I, to an attribute of its classes, or to an entry of its tables. Code objects are equal
    only if they come from the same lines."""
    tables = set()
    for name, alone in vars(part_one).items():
        if name.startswith("__"):
            continue
        whole = vars(minigpt)[name]
        if isinstance(alone, dict):
            tables.add(name)
            for key in alone:
                assert outline(whole[key]) == outline(alone[key]), f"{name}[{key!r}]"
        else:
            assert outline(whole) == outline(alone), name
    assert {"NORMS", "ATTENTION", "BLOCKS", "OPTIMIZERS"} < tables

# ---- The sizes, and numbers in the prose ---------------------------------------------------------
def rounded(numbers):
    return [round(number, 2) for number in numbers.tolist()]

def shakespeare_characters():
    """A tokenizer for the 65 characters of Tiny Shakespeare, of which the book speaks."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return CharTokenizer.train("\n !$&',-.3:;?" + letters + letters.lower())

def test_numbers_in_the_prose_of_part_one_are_true():
    """Those that are not part of a worked example."""
    tokenizer = shakespeare_characters()
    assert tokenizer.vocab_size == 65 and str(tokenizer.encode("to be")) in PART_I
    assert round(math.log(65), 2) == 4.17 and round(math.log(7), 2) == 1.95
    assert round(math.log(2), 3) == 0.693
    logits = torch.tensor([2.0, 1.0, 0.0])
    assert rounded(torch.softmax(logits, dim=0)) == [0.67, 0.24, 0.09]
    rows = re.findall(r"# +temperature (\d\.\d) (.*0\.\d\d.*)", PART_I)
    assert [row[0] for row in rows] == ["0.5", "1.0", "2.0"]
    for temperature, row in rows:
        shown = [float(number) for number in re.findall(r"0\.\d\d", row)]
        assert shown == rounded(torch.softmax(logits / float(temperature), dim=0))
    assert rounded(minigpt.LayerNorm(2)(torch.tensor([1.0, 3.0]))) == [-1.0, 1.0]
    q, k = random_x(2, 10_000, 64)
    assert (q * k).sum(dim=1).var().item() == pytest.approx(64, rel=0.05)

# ---- Characters ----------------------------------------------------------------------------------
def test_characters_come_back_unharmed():
    """Also characters that a text file could damage. The ids are 0 to V - 1, sorted."""
    for text in (SAMPLE.read_text(encoding="utf-8"), "\r\n\t\"\\é\u0000🎭z\u2028 "):
        tokenizer = CharTokenizer.train(text)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and set(ids) == set(range(tokenizer.vocab_size))
        assert tokenizer.itos == sorted(set(text))
        assert all(tokenizer.stoi[tokenizer.itos[i]] == i for i in ids)
        same = CharTokenizer(tokenizer.state)
        assert (same.itos, same.stoi) == (tokenizer.itos, tokenizer.stoi)
    assert CharTokenizer.train("ab").encode("") == []

# ---- Batches -------------------------------------------------------------------------------------
def test_a_batch_holds_random_windows_and_their_successors():
    """On the tokens 0, 1, 2, ... each target is one more than its input. The first window and the
    last one can both be drawn. Fails for a shift by two, or for an end that is off by one."""
    x, y = minigpt.get_batch(torch.arange(12, dtype=torch.int16), block_size=8, batch_size=500)
    assert x.shape == y.shape == (500, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(8))
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3}
    assert set(minigpt.get_batch(torch.arange(9), 8, 3)[0][:, 0].tolist()) == {0}

@pytest.mark.parametrize("V, size", [(2**16, 2), (2**16 + 1, 4)])
def test_ids_are_stored_in_as_few_bytes_as_they_need(V, size):
    """The largest id must survive. Fails for 2 bytes with a sign, or a limit that is off by one."""
    tokenizer = types.SimpleNamespace(vocab_size=V, encode=lambda text: [0, V - 1])
    ids = minigpt.PieceEncoder(tokenizer).encode("a")
    assert ids.tolist() == [0, V - 1] and ids.element_size() == size

# ---- The task, and the simplest model ------------------------------------------------------------
def test_the_loss_is_the_mean_negative_log_probability():
    """Compared with the definition, in float64. Fails for a sum in place of the mean, for a
    logarithm to the base 2, or for targets that are out of line with the logits."""
    model, (x, y) = small_model(), pair(random_ids(3, 9))
    logits, loss = model(x, y)
    p = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    by_hand = -sum(p[b, t, y[b, t]].log() for b in range(3) for t in range(8)) / 24
    assert abs(loss.item() - by_hand.item()) < 1e-6  # the loss itself is computed in float32
    assert loss.dtype == torch.float32
    assert model(x)[1] is None and logits.shape == (3, 8, 11)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_close(gradient * 24, p - F.one_hot(y, 11), 1e-6)  # p, minus 1 for the token that came

def fit(model, batch, steps, **settings):
    """Takes some steps on one batch. Returns the last loss."""
    config = RunConfig(**{"grad_accum": 1, "weight_decay": 0.0, "dtype": "float32", **settings})
    optimizer = minigpt.OPTIMIZERS[config.optimizer](model, config)
    for _ in range(steps):
        loss, _ = train_step(model, optimizer, [batch], config)
    return loss.item()

def test_the_bigram_model_learns_the_frequencies_of_pairs():
    """Its optimum is known: row i tends to the frequencies of what follows token i."""
    text = "abracadabra abracadabra"
    tokenizer = CharTokenizer.train(text)
    ids, V = torch.tensor(tokenizer.encode(text)), tokenizer.vocab_size
    counts = torch.zeros(V, V)
    for a, b in itertools.pairwise(ids.tolist()):
        counts[a, b] += 1
    p = counts / counts.sum(dim=1, keepdim=True)
    model = minigpt.Bigram(GPTConfig(V, block_size=len(ids) - 1))
    fit(model, pair(ids[None]), 200, learning_rate=0.3)
    assert_close(torch.softmax(model.wte.weight, dim=-1), p, 0.02)
    assert type(minigpt.MODELS["bigram"](GPTConfig(5))) is minigpt.Bigram

# ---- Attention -----------------------------------------------------------------------------------
KINDS = [minigpt.CausalSelfAttention, Attention, minigpt.FusedAttention]

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("T, n_head", [(1, 3), (2, 3), (8, 3), (8, 1), (8, 12)])
def test_attention_explicit_equals_extended_equals_fused_equals_torch_multihead(bias, T, n_head):
    """Four implementations of one function agree in their values and in every gradient. Fails for a
    missing 1 / sqrt(hs), a mask that is off by one, heads that are cut along the wrong dimension,
    or queries and keys that are exchanged."""
    reference = stir(nn.MultiheadAttention(12, n_head, bias=bias, batch_first=True))
    weight = random_x(2, T, 12, seed=1)
    z = random_x(2, T, 12).requires_grad_()
    theirs = {"c_attn.weight": reference.in_proj_weight, "c_attn.bias": reference.in_proj_bias,
              "c_proj.weight": reference.out_proj.weight, "c_proj.bias": reference.out_proj.bias}
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    expected = reference(z, z, z, attn_mask=future, need_weights=False)[0]
    (expected * weight).sum().backward()
    for kind in KINDS:
        ours = kind(small_config(n_embd=12, n_head=n_head, bias=bias)).double()
        ours.load_state_dict({name: theirs[name] for name in ours.state_dict()})
        x = z.detach().clone().requires_grad_()
        y = ours(x)
        (y * weight).sum().backward()
        assert_close(y, expected)
        assert_close(x.grad, z.grad)
        for name, p in ours.named_parameters():
            assert_close(p.grad, theirs[name].grad)

def check_dropped(dropped, whole, p):
    """Each number is zero or 1 / (1 - p) times what it was, and the share of zeros is about p."""
    dropped, whole = (t[whole.abs() > 1e-9] for t in (dropped, whole))
    zero = dropped.abs() < 1e-9
    assert_close(dropped[~zero], whole[~zero] / (1 - p), 1e-8)
    assert abs(zero.double().mean().item() - p) < 0.05

def test_dropout_of_part_ones_attention_is_that_of_the_extended_one():
    """With the same random numbers, the same weights and the same outputs are dropped."""
    layers = [kind(small_config(dropout=0.25)).double()
              for kind in (minigpt.CausalSelfAttention, Attention)]
    layers[1].load_state_dict(layers[0].state_dict())
    torch.manual_seed(1)
    ours = layers[0](random_x(2, 5, 8))
    torch.manual_seed(1)
    assert torch.equal(ours, layers[1](random_x(2, 5, 8)))

@pytest.mark.parametrize("kind", [Attention, minigpt.FusedAttention])
def test_dropout_drops_attention_weights_and_the_output_of_attention(kind):
    """It must drop weights, not scores, and not what is collected with them. Multiplying by the
    inverse of the matrix of values gives the weights back."""
    torch.manual_seed(0)
    q, k = random_x(90, 1, 8, 8), random_x(90, 1, 8, 8, seed=1)
    v = random_x(8, 8, seed=2).expand(90, 1, 8, 8)
    layer = kind(small_config(n_head=1, dropout=0.25)).double()
    dropped = layer.attend(q, k, v) @ v.inverse()
    check_dropped(dropped, layer.eval().attend(q, k, v) @ v.inverse(), 0.25)
    layer.train().attn_dropout.p = 0.0
    x = random_x(50, 8, 8)
    check_dropped(layer(x), layer.eval()(x), 0.25)

@pytest.mark.parametrize("kind", [minigpt.MLP, minigpt.SwiGLU])
def test_dropout_drops_the_output_of_the_mlp(kind):
    torch.manual_seed(0)
    layer, x = kind(small_config(dropout=0.25)).double(), random_x(50, 8, 8)
    check_dropped(layer(x), layer.eval()(x), 0.25)

def test_dropout_drops_what_enters_the_first_block():
    """It acts on the sum of the two vectors, not on one of them."""
    torch.manual_seed(0)
    model, idx = small_model(dropout=0.25, n_embd=16), random_ids(50, 8)
    dropped = model.embed(idx, torch.arange(8))
    whole = model.eval().embed(idx, torch.arange(8))
    check_dropped(dropped, whole, 0.25)
    assert_close(whole, model.wte.weight[idx] + model.wpe.weight)

# ---- Positions -----------------------------------------------------------------------------------
# ---- The MLP -------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation, function", [
    ("gelu", lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))),
    ("gelu_erf", lambda h: h * torch.distributions.Normal(0, 1).cdf(h)),
    ("relu", lambda h: h.clamp(min=0)),
    ("relu2", lambda h: h.clamp(min=0) ** 2),
    ("swiglu", lambda h: h[..., :10] * torch.sigmoid(h[..., :10]) * h[..., 10:]),
])
@pytest.mark.parametrize("bias", [True, False])
def test_each_mlp_is_its_equation(activation, function, bias):
    """Fails for the other form of GELU (by erf), exchanged halves of SwiGLU, a missing square, or a
    width that ignores mlp_ratio. All have as many weights: SwiGLU has three matrices instead of
    two, with two thirds of the width."""
    config = small_config(activation=activation, mlp_ratio=2.0, bias=bias)
    mlp = stir(minigpt.ACTIVATIONS[activation](config))
    x = random_x(2, 3, 8) * 3
    b, c = (mlp.c_fc.bias, mlp.c_proj.bias) if bias else (0.0, 0.0)
    h = x @ mlp.c_fc.weight.T + b
    assert h.shape[-1] == (20 if activation == "swiglu" else 16)
    assert_close(mlp(x), function(h) @ mlp.c_proj.weight.T + c)
    config = small_config(activation=activation, n_embd=96, bias=False)
    assert minigpt.count_parameters(minigpt.ACTIVATIONS[activation](config)) == 8 * 96 * 96

# ---- Normalization -------------------------------------------------------------------------------
@pytest.mark.parametrize("ours, theirs, tolerance", [
    *((kind(6, bias), nn.LayerNorm(6, bias=bias), 1e-9) for bias in (True, False)
      for kind in (minigpt.LayerNorm, minigpt.FusedLayerNorm)),
    (minigpt.RMSNorm(6), nn.RMSNorm(6, eps=1e-5), 1e-4)])  # it squares in float32
def test_norms_equal_those_of_torch_in_value_and_gradient(ours, theirs, tolerance):
    """For inputs that are small, large, and far from zero. Fails for a variance over C - 1, for a
    missing eps, gain or bias; for RMSNorm, for a sum instead of the mean, or a mean subtracted."""
    ours.double().load_state_dict(stir(theirs).state_dict())
    weight = random_x(2, 3, 6, seed=1)
    for scale, offset in ((1.0, 0.0), (1e-3, 0.0), (100.0, 1000.0)):
        x = (random_x(2, 3, 6) * scale + offset).requires_grad_()
        y, expected = ours(x), theirs(x)
        assert_close(y, expected, tolerance)
        for a, b in zip(torch.autograd.grad((y * weight).sum(), [x, *ours.parameters()]),
                        torch.autograd.grad((expected * weight).sum(), [x, *theirs.parameters()])):
            assert_close(a, b, 10 * tolerance)

# ---- The block -----------------------------------------------------------------------------------
def normalized(x, norm):
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias)

def test_a_block_has_its_norms_and_additions_in_their_places():
    """Pre-norm: x + attn(ln_1(x)), then x + mlp(ln_2(x)). Post-norm: a norm after each addition.
    If both parts give zero, a pre-norm block gives its input, as the book says."""
    block, x = stir(minigpt.Block(small_config())), random_x(2, 5, 8)
    middle = x + block.attn(normalized(x, block.ln_1))
    assert_close(block(x), middle + block.mlp(normalized(middle, block.ln_2)))
    post = minigpt.PostNormBlock(small_config()).double()
    post.load_state_dict(block.state_dict())
    middle = normalized(x + block.attn(x), block.ln_1)
    assert_close(post(x), normalized(middle + block.mlp(middle), block.ln_2))
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    assert torch.equal(block(x), x)

# ---- The model -----------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, dict(bias=False, n_head=1, mlp_ratio=2.0),
                                     dict(tie_weights=False, n_layer=3)])
def test_the_model_is_two_tables_its_blocks_a_norm_and_a_head(changes):
    """Fails if the final norm or the position table is left out, or if a block is left out or comes
    in another order."""
    model, idx = small_model(**changes), random_ids(2, 6)
    x = model.wte.weight[idx] + model.wpe.weight[:6]
    for i in range(model.config.n_layer):
        x = model.h[i](x)
    assert_close(model(idx)[0], normalized(x, model.ln_f) @ model.lm_head.weight.T)
    later = model.wte.weight[idx] + model.wpe.weight[2:8]
    assert_close(model.embed(idx, torch.arange(2, 8)), later)

def test_plain_has_818_048_parameters_in_the_parts_that_the_book_lists():
    """The preset `plain`, and the table under "Count", which must name the same numbers."""
    model = GPT(ModelConfig(65, **minigpt.PRESETS["plain"].model))
    block = model.h[0]
    parts = {"wte": model.wte, "wpe": model.wpe, "h": model.h, "ln_1": block.ln_1,
             "attn": block.attn, "ln_2": block.ln_2, "mlp": block.mlp, "ln_f": model.ln_f,
             "total": model}
    counts = {name: minigpt.count_parameters(part) for name, part in parts.items()}
    assert counts == {"wte": 8320, "wpe": 16384, "h": 793088, "ln_1": 256, "attn": 66048,
                      "ln_2": 256, "mlp": 131712, "ln_f": 256, "total": 818048}
    table = PART_I.partition("\n# Count ")[2].partition("\ndef ")[0]
    for name, count in counts.items():
        (row,) = re.findall(rf"(?m)^# +{name}  +\S.*$", table)
        assert f" {count:,}" in row, row
    assert f"{minigpt.count_parameters(block):,}" in table
    assert 0.65 < counts["mlp"] / minigpt.count_parameters(block) < 0.68  # two thirds of a block

@pytest.mark.parametrize("changes", [
    {}, dict(tie_weights=False), dict(model="bigram"),
    dict(pos="rope", activation="swiglu", qk_norm=True, attention="extended", norm="rmsnorm")])
def test_the_first_weights_are_those_of_gpt2(changes):
    """The standard deviation is 0.02, and less by sqrt(2 n_layer) for what is added to the residual
    stream. Gains are 1 and biases 0. So the first loss is near ln V."""
    sizes = dict(vocab_size=65, block_size=64, n_layer=8, n_head=4, n_embd=192)
    model = minigpt.new_model(ModelConfig(**sizes, **changes), 0).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name
        else:
            assert torch.all(p == (0.0 if name.endswith("bias") else 1.0)), name
    loss = model(*pair(random_ids(2, 65, vocab_size=65)))[1].item()
    assert abs(loss - math.log(65)) < 0.15

def test_the_head_and_the_token_table_are_one_matrix():
    """Also after a step, and the gradients of both uses are added. Untied, each has its own."""
    model, untied = small_model(), small_model(tie_weights=False)
    batch, before = pair(random_ids(2, 9)), model.wte.weight.detach().clone()
    assert minigpt.count_parameters(untied) == minigpt.count_parameters(model) + 11 * 8
    untied.load_state_dict(model.state_dict())
    for m in (model, untied):
        m(*batch)[1].backward()
    table, head = untied.wte.weight.grad, untied.lm_head.weight.grad
    assert_close(model.wte.weight.grad, table + head, 1e-6)
    assert (table - head).abs().max() > 1e-3
    for m in (model, untied):
        fit(m, batch, 1, learning_rate=0.1)
    assert model.lm_head.weight is model.wte.weight and not torch.equal(before, model.wte.weight)
    assert not torch.equal(untied.lm_head.weight, untied.wte.weight)

def test_more_tokens_than_block_size_are_refused():
    """There are no position vectors for them. Exactly block_size is allowed."""
    assert small_model()(random_ids(1, 8))[0].shape == (1, 8, 11)
    with pytest.raises(ValueError, match="9 tokens given, but block_size is 8"):
        small_model()(random_ids(1, 9))

# ---- Sampling ------------------------------------------------------------------------------------
def kept(*probabilities, **options):
    """Which tokens of a distribution may still be drawn, as a str of 0 and 1. What is kept must
    keep its logit. A second row, in the opposite order, must be filtered by itself."""
    logits = torch.tensor([probabilities, probabilities[::-1]], dtype=torch.float64).log()
    before = logits.clone()
    filtered = minigpt.filter_logits(logits, **options)
    assert torch.equal(logits, before)
    alive = filtered.isfinite()
    assert torch.equal(filtered[alive], logits[alive])
    if len(set(probabilities)) == len(probabilities):  # no two that are equal
        assert torch.equal(alive[1], alive[0].flip(0))
    return "".join(str(int(one)) for one in alive[0])

def test_top_p_keeps_the_smallest_set_that_reaches_p():
    """0.5 alone reaches 0.5, which is exact in binary. For 0.51, the token that crosses the line
    stays. The most likely token stays even for p = 0."""
    for p, expected in ((0.0, "0100"), (0.1, "0100"), (0.5, "0100"), (0.51, "0101"),
                        (0.75, "0101"), (0.76, "1101"), (0.875, "1101"), (0.88, "1111"),
                        (1.0, "1111")):
        assert kept(0.125, 0.5, 0.125, 0.25, top_p=p) == expected, p
    assert kept(0.1, 0.5, 0.15, 0.25, top_p=0.6) == "0101"

def test_top_k_keeps_k_tokens():
    """Also among equals, and all of them if k is larger than the vocabulary."""
    for k, expected in ((1, "0100"), (2, "0101"), (3, "1101"), (4, "1111"), (9, "1111")):
        assert kept(0.2, 0.4, 0.1, 0.3, top_k=k) == expected
    assert kept(0.25, 0.25, 0.25, 0.25, top_k=2) == "1100"

def test_top_p_counts_the_probabilities_that_top_k_has_left():
    """Top-k leaves 0.4 and 0.3, so the first one has 4/7 = 0.571."""
    assert kept(0.2, 0.4, 0.1, 0.3, top_k=2, top_p=0.57) == "0100"
    assert kept(0.2, 0.4, 0.1, 0.3, top_k=2, top_p=0.58) == "0101"

@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_each_temperature(temperature):
    """100,000 draws are compared with p^(1/T), divided by its sum. Fails if the logits are
    multiplied by the temperature."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    drawn = minigpt.draw_token(p.log().expand(100_000, 4), temperature,
                               generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (100_000, 1)
    expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    assert_close(drawn.flatten().bincount(minlength=4) / 100_000, expected, 0.01)

def test_the_filters_act_after_the_temperature():
    """At temperature 5, top_k = 1 and a tiny top_p still leave only the most likely token, and
    top_p counts the probabilities after the division."""
    model, idx = small_model(), random_ids(4, 3)
    greedy = model.generate(idx, 6, temperature=0)
    for options in (dict(top_k=1), dict(top_p=1e-9), dict(top_p=1e-46)):
        assert torch.equal(model.generate(idx, 6, temperature=5.0, **options), greedy)
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(200, 3)  # 0.87, 0.12, 0.02 at temperature 0.5
    assert minigpt.draw_token(logits, temperature=0.5, top_p=0.7).unique().tolist() == [0]
    assert minigpt.draw_token(logits, temperature=1.0, top_p=0.7).unique().tolist() == [0, 1]

def test_temperature_0_and_tiny_temperatures_take_the_most_likely_token():
    """They must not overflow, either."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [500.0, -500.0, 0.0]])
    for temperature, size in ((0, 1), (1e-30, 1), (1e-30, 1e30)):
        assert minigpt.draw_token(logits * size, temperature).tolist() == [[1], [0]]

@pytest.mark.parametrize("name, attention", [("gpt", "explicit"), ("bigram", "explicit"),
                                             ("bigram", "fused")])
@pytest.mark.parametrize("n", [1, 3, 8, 20])
def test_writing_reads_the_newest_block_size_tokens(name, attention, n):
    """Greedy text is checked step by step, far beyond block_size, for short and long prompts.
    The bigram model has no attention, so that setting does not matter. Fails for a window that
    drops the newest tokens, or that is one token too short."""
    model = small_model(model=name, attention=attention, dropout=0.5)
    idx = random_ids(6, n, seed=n)
    assert not isinstance(minigpt.new_reader(model), CachedReader)
    out = model.train().generate(idx, 14, temperature=0) if name == "gpt" else torch.cat(
        [idx, *minigpt.stream_tokens(model, idx, 14, temperature=0)], dim=1)
    assert out.shape == (6, n + 14) and torch.equal(out[:, :n], idx)
    for t in range(n, n + 14):
        logits, _ = model.eval()(out[:, max(0, t - 8) : t])
        assert torch.equal(out[:, t], logits[:, -1].argmax(dim=-1))

def test_tokens_come_one_after_the_other_and_none_if_none_are_asked_for():
    """A text can be shown while it is written. Fails if all tokens are made before the first one
    is given."""
    model, idx = small_model(), random_ids(2, 3)
    first = [*itertools.islice(minigpt.stream_tokens(model, idx, 10**9), 2)]
    assert [token.shape for token in first] == [(2, 1), (2, 1)]
    assert torch.equal(model.generate(idx, 0), idx)

# ---- The optimizer: AdamW ------------------------------------------------------------------------
def test_adamw_is_the_equation_in_the_text_and_decays_matrices_only():
    """Three steps by hand, with the corrections of the means, and with decay for matrices. Fails if
    biases or gains decay, if a setting is not used, or if the tied matrix is updated twice."""
    config = TrainConfig(learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9)
    model = small_model()
    optimizer = minigpt.make_adamw(model, config)
    expected = [p.detach().clone() for p in model.parameters()]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters()})
    m, s = [0.0] * len(expected), [0.0] * len(expected)
    for t in (1, 2, 3):
        for i, p in enumerate(model.parameters()):
            g = random_x(*p.shape, seed=t) * 1e-7  # so small that eps counts
            p.grad = g.clone()
            m[i] = 0.8 * m[i] + 0.2 * g
            s[i] = 0.9 * s[i] + 0.1 * g * g
            move = m[i] / (1 - 0.8**t) / ((s[i] / (1 - 0.9**t)).sqrt() + 1e-8)
            decay = 0.5 * expected[i] if p.dim() == 2 else 0.0
            expected[i] = expected[i] - 0.1 * (move + decay)
        optimizer.step()
    for p, w in zip(model.parameters(), expected, strict=True):
        assert_close(p.detach(), w)

@pytest.mark.parametrize("name", minigpt.OPTIMIZERS)
def test_every_optimizer_uses_the_fused_kernel_of_adamw(name):
    """One pass over all weights instead of a dozen; the equation is the same."""
    optimizer = minigpt.OPTIMIZERS[name](small_model(), RunConfig())
    assert all(group["fused"] is True for group in optimizer.param_groups)

# ---- The learning rate ---------------------------------------------------------------------------
def test_the_learning_rate_at_named_steps():
    """The first step, the peak, the middle, the end, and beyond. Fails for a warm-up that is off by
    one."""
    config = RunConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=4, max_steps=24)
    assert [get_lr(s, config) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [get_lr(s, config) for s in (9, 14, 24, 1000)] == pytest.approx(
        [0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 0.6, 0.2, 0.2])
    line = replace(config, schedule="linear")
    assert [get_lr(s, line) for s in (0, 4, 9, 23, 24)] == pytest.approx([0.2, 1.0, 0.8, 0.24, 0.2])
    assert get_lr(0, replace(config, warmup_steps=0)) == 1.0
    assert get_lr(9, replace(config, min_lr=1.0)) == 1.0
    assert get_lr(4, replace(config, warmup_steps=10, max_steps=5)) == pytest.approx(5 / 11)

# ---- Clipping ------------------------------------------------------------------------------------
@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clipping_equals_that_of_torch(max_norm):
    """One norm over all weights, of which one has no gradient here. Small gradients, and max_norm
    0, leave everything as it is."""
    ours, theirs = ([nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 5, 1)]
                    for _ in range(2))
    for p, q in zip(ours[:2], theirs):
        p.grad = random_x(*p.shape)
        q.grad = p.grad.clone()
    norm = minigpt.clip_gradients(iter(ours), max_norm)
    assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm or math.inf))
    for p, q in zip(ours[:2], theirs):
        assert_close(p.grad, q.grad)

# ---- One step ------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("accum", [1, 3, 12])
def test_accumulated_micro_steps_equal_one_large_batch(accum, clip):
    """The loss, the norm and the weights of two steps, by hand. Fails if the loss is not divided by
    grad_accum, or if gradients are clipped or cleared between micro-steps, or never cleared."""
    model, config = small_model(), TrainConfig(grad_accum=accum, grad_clip=clip)
    weights, vector = list(model.parameters()), nn.utils.parameters_to_vector
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for rows in random_ids(2, 12, 9):
        before, loss = vector(weights).detach(), model(*pair(rows))[1].double()
        gradient = vector(torch.autograd.grad(loss, weights))
        batches = map(pair, rows.split(12 // accum))
        returned = train_step(model, optimizer, batches, config)
        assert_close(torch.stack([x.double() for x in returned]),
                     torch.stack([loss.detach(), gradient.norm()]), 1e-6)
        if clip:
            gradient *= clip / gradient.norm()
        assert_close(vector(weights).detach(), before - 0.1 * gradient, 1e-6)

# ---- Evaluation ----------------------------------------------------------------------------------
def small_corpus():
    return Corpus(*random_ids(200).split([150, 50]), val_characters=100)

def test_an_estimate_of_the_loss_uses_the_same_batches_each_time():
    """No dropout, and no random numbers of the training run. It is the mean over eval_batches
    batches of each part."""
    model, config = small_model(dropout=0.5), TrainConfig(batch_size=3, eval_batches=4)
    before, corpus = torch.get_rng_state(), small_corpus()
    first = minigpt.estimate_loss(model, corpus, config)
    assert first == minigpt.estimate_loss(model.train(), corpus, config) and not model.training
    assert torch.equal(before, torch.get_rng_state())
    for name, tokens in (("train", corpus.train), ("val", corpus.val)):
        generator = torch.Generator().manual_seed(0)
        losses = [model(*minigpt.get_batch(tokens, 8, 3, generator))[1].item() for _ in range(4)]
        assert first[name] == pytest.approx(sum(losses) / 4)

def test_dropout_and_gradients_are_on_in_training_and_off_in_evaluation_and_writing():
    """The model is left in the wrong state before each, so each has to set it."""
    model, corpus = small_model(dropout=0.5), small_corpus()
    config = TrainConfig(batch_size=3, eval_batches=1)
    modes = []
    model.register_forward_pre_hook(
        lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    minigpt.estimate_loss(model, corpus, config)
    train_step(model, torch.optim.SGD(model.parameters()), [(random_ids(1, 8),) * 2], config)
    minigpt.evaluate(model, corpus.val[:9])
    model.train().generate(random_ids(1, 2), 1)
    assert modes == [(False, False)] * 2 + [(True, True)] + [(False, False)] * 2

@pytest.mark.parametrize("n", [2, 8, 9, 10, 17, 50])
def test_an_evaluation_counts_every_token_once(n):
    """Compared with each token by itself, in its window, in float64. Fails if the rest is left out,
    if windows overlap, or if a short last batch counts as much as a full one."""
    model, tokens, total = small_model(dropout=0.5).eval(), random_ids(n), 0.0
    for t in range(1, n):
        logits = model(tokens[None, (t - 1) // 8 * 8 : t])[0][0, -1]
        total -= torch.log_softmax(logits, dim=-1)[tokens[t]].item()
    for batch_size in (1, 4, 64):
        shares = []
        nats = minigpt.evaluate(model.train(), tokens.short(), batch_size, progress=shares.append)
        assert nats == pytest.approx(total / (n - 1), abs=1e-6)
        assert shares == sorted(shares) and shares[-1] == 1.0

def test_a_loss_is_described_in_three_units():
    """ln 8 nats are 3 bits per token. Here a token stands for two characters."""
    assert minigpt.describe_loss(math.log(8), small_corpus()).endswith(
        "49 tokens: 2.0794 nats per token, perplexity 8, 1.5000 bits per character")
    assert minigpt.bits_per_character(math.log(2), Corpus(None, [0] * 10, 40)) == 0.25
    assert math.isfinite(minigpt.perplexity(1e6)) and minigpt.perplexity(0.0) == 1.0

# ---- A checkpoint --------------------------------------------------------------------------------
def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """A system may rename a file before it has written what the file holds. If the power failed in
    between, the old checkpoint would be gone and the new one empty. Fails without os.fsync, and if
    it comes after the rename or before the content."""
    calls, rename = [], os.replace

    def replace_file(source, target):
        calls.append(("replace", os.path.getsize(source)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda file: calls.append(("fsync", os.fstat(file).st_size)))
    monkeypatch.setattr(os, "replace", replace_file)
    minigpt.save_checkpoint(tmp_path / "a.pt", {"step": 3})
    size = os.path.getsize(tmp_path / "a.pt")
    assert calls == [("fsync", size), ("replace", size)]

# ---- The training loop ---------------------------------------------------------------------------
class Notes(minigpt.Journal):
    """A journal that keeps what it is told, and prints nothing."""
    def __init__(self):
        self.lines = []
        self.training = []  # for each step, whether the model was in training mode

    def say(self, text):
        self.lines.append(text)

    def report_step(self, run, loss, norm, details=""):
        self.training.append(run.model.training)
        super().report_step(run, loss, norm, details)

def small_run(folder, **changes):
    config = RunConfig(**{**TINY, "dtype": "float32", **changes})
    model = minigpt.new_model(small_config(dropout=0.3), config.seed)
    tokenizer = CharTokenizer([*"\nabcdefghij"])
    return minigpt.Run(model, tokenizer, small_corpus(), config, folder, Notes())

def test_derived_seeds_depend_on_all_numbers_and_differ():
    """2^32 + 1 is not 1, as it would be in 32 bits, and (1, 11) is not (11, 1) or (111,)."""
    numbers = [*itertools.product(range(-9, 30), range(30)), (1,), (2**32 + 1,), (111,), (0,)]
    seeds = {minigpt.derived_seed(*some) for some in numbers}
    assert len(seeds) == len(numbers) and 0 <= min(seeds) <= max(seeds) < 2**32

def test_the_first_weights_depend_on_the_seed_alone_and_on_all_of_it():
    """They do not depend on what was drawn before."""
    first, again, *others = (minigpt.new_model(small_config(), seed).wte.weight
                             for seed in (1, 1, 2, 2**32 + 1))
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)

class Watched(nn.Module):
    """A model that notes the batches that it gets, and random numbers as dropout would draw."""
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.seen = []

    def forward(self, x, y):
        self.seen.append((x, y, torch.rand(9)))
        return self.model(x, y)

def seen_in_training(folder, **changes):
    """What the model sees in each micro-step of a run."""
    run = small_run(folder, **changes)
    run.runner = Watched(run.model)
    minigpt.train(run)
    return run.runner.seen

def test_what_a_step_draws_depends_on_the_seed_and_the_step_alone(tmp_path):
    """Batches and dropout are the same whatever else the run does, and new in every micro-step.
    Fails if the seed of a step is seed + step: step 1 of seed 1338 would repeat step 2 of 1337."""
    first = seen_in_training(tmp_path)
    assert len(first) == 12 and all(x.shape == y.shape == (4, 8) for x, y, _ in first)
    other = seen_in_training(tmp_path, eval_interval=5, sample_tokens=0, optimizer="muon",
                             checkpoint_interval=1, learning_rate=1e-3, max_steps=4)
    assert_same(other, first[:8])
    everything = first + seen_in_training(tmp_path, seed=1338)
    for part in (0, 2):  # the batches, and the numbers that dropout would draw
        assert len({tuple(seen[part].flatten().tolist()) for seen in everything}) == 24
    windows = small_corpus().train.unfold(0, 9, 1)  # of the training part, not of the other one
    for x, y, _ in first:
        for row in torch.cat([x, y[:, -1:]], dim=1):
            assert (windows == row).all(dim=1).any()

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_step_has_its_learning_rate_its_report_and_its_checkpoint(tmp_path, optimizer):
    """The rate is that of the step's number, in every group of weights. Losses are evaluated before
    the first step, at intervals, and at the end. latest.pt comes after the other files of its step:
    a run that was killed in between goes on from the older one, and writes what is missing.
    Fails for a step that is counted too early or too late."""
    run = small_run(tmp_path, optimizer=optimizer, max_steps=7, eval_interval=3, log_interval=2,
                    checkpoint_interval=2)
    script_losses(run, [5, 4, 3, 2])
    rates, saved = [], []
    run.save = lambda name: saved.append((run.step, name))

    def after_step(run):
        rates.append({group["lr"] for group in run.optimizer.param_groups})

    run.model.eval()
    minigpt.train(run, after_step)
    assert rates == [{get_lr(step, run.config)} for step in range(7)]
    assert run.journal.training == [True] * 7
    assert saved == [(0, "best.pt"), (0, "latest.pt"), (2, "step_000002.pt"), (2, "latest.pt"),
                     (3, "best.pt"), (3, "latest.pt"), (4, "step_000004.pt"), (4, "latest.pt"),
                     (6, "best.pt"), (6, "step_000006.pt"), (6, "latest.pt"), (7, "best.pt"),
                     (7, "latest.pt")]

    pattern = r"step (\d+)(/7 \| loss \d\.\d{4}|: training loss -\d\.\d{4}, validation loss \d\.\d)"
    reports = [re.match(pattern, line) for line in run.journal.lines]
    assert [(int(r[1]), r[2][0]) for r in reports if r] == [
        (0, ":"), (2, "/"), (3, ":"), (4, "/"), (6, "/"), (6, ":"), (7, "/"), (7, ":")]

def test_a_restored_run_has_its_steps_and_a_run_beyond_its_last_step_is_finished(tmp_path):
    """--resume may have lowered max_steps. Otherwise the run would never end."""
    run = small_run(tmp_path)
    run.restore({**run.state(), "step": 7, "best_val": 2.5, "best_step": 4})
    assert (run.step, run.best_val, run.best_step) == (7, 2.5, 4) and run.finished()

def test_an_evaluation_shows_a_sample_that_only_the_weights_change(tmp_path, capsys):
    """The sample is drawn with the same random numbers each time, so that two samples can be
    compared. sample_tokens 0 shows none. Without a journal of its own, a run prints to stderr."""
    run = small_run(tmp_path, sample_tokens=30)
    assert run.sample() == run.sample() != ""
    assert len(run.sample()) <= 30
    run.tokenizer.first_id, read = 3, []  # it need not be 0
    hook = run.model.wte.register_forward_hook(lambda _, args, out: read.append(args[0].tolist()))
    run.sample()
    hook.remove()
    assert read[0] == [[3]]
    minigpt.evaluate_and_save(run)
    shown = [line for line in run.journal.lines if line.startswith("    | ")]
    assert shown == [f"    | {line}" for line in run.sample().split("\n")]
    assert "best so far" in run.journal.lines[0]
    quiet = small_run(tmp_path, sample_tokens=0)
    minigpt.evaluate_and_save(quiet)
    assert len(quiet.journal.lines) == 1
    talking = minigpt.Run(run.model, run.tokenizer, run.corpus, quiet.config, tmp_path)
    minigpt.evaluate_and_save(talking)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("step 0: training loss")

def script_losses(run, losses):
    """The evaluations of a run give these validation losses. The training losses say the opposite,
    so that a test can see which of the two counts."""
    remaining = iter(losses)

    def estimate():
        loss = next(remaining)
        return {"train": -loss, "val": loss}

    run.estimate = estimate

@pytest.mark.parametrize("losses, best", [([5, 3, 2, 4], 4), ([1, 2, 3, 4], 0), ([5, 3, 3, 3], 2),
                                          ([5, 4, 3, 2], 6), ([9, 5, math.nan, 7], 2)])
def test_best_is_the_model_with_the_lowest_validation_loss(tmp_path, losses, best):
    """Not with the lowest training loss, and not the last one. Among equals it is the first. It is
    the one that is scored at the end, on the whole validation part."""
    run = small_run(tmp_path)
    script_losses(run, losses)
    weights = {0: run.model.wte.weight.detach().clone()}

    def keep_weights(run):
        weights[run.step] = run.model.wte.weight.detach().clone()

    minigpt.train(run, after_step=keep_weights)
    score = run.score()
    state = load_checkpoint(tmp_path / "best.pt")
    assert (state["step"], state["best_step"], state["best_val"]) == (best, best, losses[best // 2])
    assert torch.equal(state["model"]["wte.weight"], weights[best])
    assert_same(dict(run.model.state_dict()), dict(state["model"]))
    assert score == minigpt.evaluate(run.model, run.corpus.val) and run.step == 6
    assert run.journal.lines[-1] == minigpt.describe_loss(score, run.corpus)

@pytest.mark.parametrize("patience, losses, end", [
    (1, [5, 4, 4], 4), (2, [5, 4, 6, 5], 6), (2, [1, 2, 2], 4), (2, [5, 6, 4, 5, 3.9, 5, 5], 12),
    (0, [1, 2, 3, 4, 5, 6, 7, 8], 13), (3, [1, 2, 3, 4], 6)])
def test_patience_ends_a_run_when_it_promised(tmp_path, patience, losses, end):
    """After that many evaluations without a better one, not a step earlier or later. With 0 the run
    goes on to max_steps."""
    run = small_run(tmp_path, patience=patience, max_steps=13, sample_tokens=0)
    script_losses(run, losses)
    minigpt.train(run)
    assert run.step == end and step_of(tmp_path / "latest.pt") == end

def test_patience_counts_evaluations_and_not_steps(tmp_path):
    """The best model may be of a step that is not a multiple of eval_interval, such as the last
    step of a run that was lengthened. The next evaluation is then at 500. Fails if steps are
    counted, which would end the run between two evaluations."""
    config = TrainConfig(eval_interval=250, patience=1, max_steps=1000)
    run = minigpt.Run(GPT(small_config()), None, None, config, tmp_path)
    run.best_step = 300
    ends = []
    for step in (499, 500, 501):
        run.step = step
        ends.append(run.finished())
    assert ends == [False, True, True]

# ==================================================================================================
# Part II: Better
# ==================================================================================================

# ---- The settings of the variations --------------------------------------------------------------
def test_the_defaults_of_part_two_are_the_model_of_part_one():
    """Someone who sets no variation gets Part I. Fails if a default differs from Part I's name."""
    for part_one, part_two in ((GPTConfig, ModelConfig), (TrainConfig, RunConfig)):
        shared = [f for f in fields(part_two) if hasattr(part_one, f.name)]
        assert len(shared) >= len(fields(part_one)) + 2
        for f in shared:
            assert getattr(part_one, f.name) == f.default, f.name
    first = minigpt.new_model(GPTConfig(**SMALL), 3)
    second = minigpt.new_model(ModelConfig(**SMALL), 3)
    assert_same(dict(first.state_dict()), dict(second.state_dict()))
    idx = random_ids(2, 8)
    assert torch.equal(first(idx)[0], second(idx)[0])

@pytest.mark.parametrize("norm, kind", [
    ("layernorm", minigpt.LayerNorm), ("fused_layernorm", minigpt.FusedLayerNorm),
    ("rmsnorm", minigpt.RMSNorm), ("none", nn.Identity)])
def test_every_norm_of_a_model_is_of_the_kind_that_was_chosen(norm, kind):
    """Also those of queries and keys and the last one, and with a bias only if biases are wanted.
    Fails if one place has a norm of a fixed kind or size."""
    for bias in (True, False):
        model = GPT(small_config(norm=norm, qk_norm=True, attention="extended", bias=bias))
        for block in model.h:
            norms = [block.ln_1, block.ln_2, model.ln_f, block.attn.q_norm, block.attn.k_norm]
            assert [type(built) for built in norms] == [kind] * 5
            if norm != "none":
                assert [len(built.weight) for built in norms] == [8, 8, 8, 4, 4]
        biased = [m.bias is not None for m in model.modules() if hasattr(m, "bias")]
        assert biased[:-1] == [bias] * (len(biased) - 1) and biased[-1] is False  # the head
        with_bias = [name for name in model.state_dict() if name.endswith("bias")]
        assert bool(with_bias) == bias

@pytest.mark.parametrize("table, field", [
    (minigpt.BLOCKS, "block"), (minigpt.ATTENTION, "attention"),
    (minigpt.ACTIVATIONS, "activation"), (minigpt.POSITIONS, "pos")])
def test_every_entry_of_a_table_is_what_is_built(table, field):
    """Fails if a part is built under a fixed name, in any block, so that its flag has no effect."""
    def built(model, block):
        return {"block": block, "attention": block.attn, "activation": block.mlp,
                "pos": model.wpe}[field]

    for key in table:
        model = GPT(small_config(**{"attention": "extended", field: key}))
        kind = nn.Embedding if key == "learned" else table[key]
        assert {type(built(model, block)) for block in model.h} == {kind}, key

def test_the_names_of_blocks_and_of_kinds_of_attention_stand_for_their_classes():
    """Most tests take the classes themselves. Two kinds of attention compute the same function, so
    nothing else would show that one stands under the name of the other."""
    assert [minigpt.ATTENTION[name] for name in ("explicit", "extended", "fused")] == KINDS
    kinds = [minigpt.Block, minigpt.PostNormBlock, minigpt.ShiftBlock]
    assert [minigpt.BLOCKS[name] for name in ("pre", "post", "shift")] == kinds

# ---- Normalization -------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_without_scale_is_the_same_norm_with_a_gain_of_1(bias):
    """Its gain is no parameter, so it is not learned and does not decay. But it is saved, so that
    the model can be exported. Everything else is as before."""
    changes = dict(norm="rmsnorm", bias=bias, pos="rope", attention="fused", qk_norm=True)
    model = GPT(small_config(norm_scale=False, **changes))
    like = GPT(small_config(**changes))
    assert model.state_dict().keys() == like.state_dict().keys()
    learned = {name for name, _ in model.named_parameters()}
    gains = {name for name, _ in like.named_parameters()} - learned
    assert gains == {name for name in like.state_dict() if "norm.weight" in name or
                     re.search(r"ln_.\.weight", name)}
    assert all((model.state_dict()[name] == 1).all() for name in gains)
    model.load_state_dict(like.state_dict())
    idx = random_ids(2, 8)
    assert torch.equal(model(idx)[0], like(idx)[0])

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rmsnorm_of_16_bits_squares_in_32(dtype):
    """The square of 400 is above the largest number of float16, so squares in 16 bits would give
    zero. The result has the format of the input."""
    y = minigpt.RMSNorm(2)(torch.tensor([300.0, 400.0], dtype=dtype))
    assert y.dtype == dtype
    assert_close(y.float(), torch.tensor([0.8485, 1.1314]), 4e-3)

# ---- Positions -----------------------------------------------------------------------------------
def test_sinusoids_are_the_papers_divided_by_the_root_of_the_width():
    """Entry by entry: sine and cosine of t / 10000^(2 i / C), side by side. Fails for another
    order, another base, or a missing division."""
    model = GPT(small_config(pos="sinusoidal", n_embd=12, block_size=40))
    table = model.wpe(torch.arange(40))
    for t, i in itertools.product((0, 1, 7, 39), range(6)):
        angle = t * 10000 ** (-2 * i / 12)
        entries = table[t, 2 * i : 2 * i + 2] * math.sqrt(12)
        assert entries.tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)

def test_fixed_positions_are_not_learned():
    """Sinusoids are stored under the name of the learned table, but the optimizer does not get
    them. RoPE stores nothing, so its checkpoints do not depend on block_size."""
    names = list(GPT(small_config()).state_dict())
    sinusoidal = GPT(small_config(pos="sinusoidal"))
    assert list(sinusoidal.state_dict()) == names
    assert "wpe.weight" not in dict(sinusoidal.named_parameters())
    rope = GPT(small_config(pos="rope", attention="extended"))
    assert list(rope.state_dict()) == [name for name in names if "wpe" not in name]

def test_rope_scores_depend_on_distance_alone_and_do():
    """The reason for RoPE: a query and a key that are equally far apart have the same score
    anywhere in the window, and another score at another distance."""
    rotary = minigpt.Rotary(small_config(n_embd=16, n_head=2, block_size=30))
    q = rotary(random_x(1, 1, 1, 8).expand(1, 1, 30, 8), 0)[0, 0]
    k = rotary(random_x(1, 1, 1, 8, seed=1).expand(1, 1, 30, 8), 0)[0, 0]
    scores = q @ k.T
    for distance in (0, 1, 5):
        diagonal = scores.diagonal(-distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), 1e-5)
    assert abs(scores[5, 5] - scores[5, 4]) > 1e-2

# ---- The extended attention, and the fused one ---------------------------------------------------
EXTENDED_KINDS = [Attention, minigpt.FusedAttention]  # those that know RoPE, QK-norm and a memory

def rms(x, gain, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

def turn(x, theta):
    """RoPE of (B, nh, T, hs) in float64, in the form of the paper of Llama: halves make pairs."""
    T, hs = x.shape[2:]
    speeds = theta ** (-torch.arange(0, hs, 2, dtype=torch.float64) / hs)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), speeds)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin

def shares(q, k):
    """softmax(q k^T / sqrt(hs)), where no query sees a later key."""
    T = q.shape[2]
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)

def split_heads(x, n_head):
    B, T, C = x.shape
    return x.view(B, T, n_head, C // n_head).transpose(1, 2)

@pytest.mark.parametrize("kind", EXTENDED_KINDS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_queries_and_keys_are_normalized_then_turned_and_values_are_not(kind, norm):
    """The gains differ from channel to channel, so the order of the two steps matters, and they
    differ between queries and keys. Fails if v is turned, k is not, or one norm serves both."""
    def prepared(y, layer):
        y = normalized(y, layer) if norm == "layernorm" else rms(y, layer.weight, 1e-5)
        return turn(y, 10000.0)

    layer = stir(kind(small_config(pos="rope", qk_norm=True, norm=norm, attention="extended")))
    assert (layer.q_norm.weight - layer.k_norm.weight).abs().max() > 0.1
    x = random_x(3, 8, 8)
    q, k, v = (split_heads(y, 2) for y in layer.c_attn(x).chunk(3, dim=-1))
    y = shares(prepared(q, layer.q_norm), prepared(k, layer.k_norm)) @ v
    assert_close(layer(x), layer.c_proj(y.transpose(1, 2).flatten(2)), 1e-5)

def test_fused_attention_in_16_bits_is_attention_in_training_too():
    """On a CPU, training in bfloat16 takes another path than evaluation. Both must be the same
    function, up to the precision of the format."""
    layer = minigpt.FusedAttention(small_config())
    q, k, v = (random_x(2, 2, 8, 4, seed=seed) for seed in range(3))
    expected = minigpt.attention_weights(q, k, minigpt.causal_mask(8)) @ v
    coarse = [t.bfloat16() for t in (q, k, v)]
    assert minigpt.Rotary(small_config())(coarse[0], 0).dtype == torch.bfloat16
    for mode in (True, False):
        y = layer.train(mode).attend(*coarse)
        assert y.dtype == torch.bfloat16
        assert_close(y.double(), expected, 0.03)

@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize("kind", EXTENDED_KINDS)
def test_heads_that_share_keys_and_values_are_heads_with_equal_ones(kind, n_kv_head):
    """A model whose heads have keys and values of their own computes the same if those of a group
    have the same weights. Fails if heads are grouped in another order, if a group of values is not
    that of its keys, or if the cache keeps more than the shared ones."""
    changes = dict(n_head=4, n_embd=16, pos="rope", qk_norm=True, attention="extended")
    shared = kind(small_config(**changes, n_kv_head=n_kv_head)).double()
    whole = kind(small_config(**changes)).double()
    stir(shared)
    state = dict(shared.state_dict())
    for name in ("c_attn.weight", "c_attn.bias"):
        q, k, v = state[name].split([16, 4 * n_kv_head, 4 * n_kv_head])
        groups = [w.unflatten(0, (n_kv_head, 4)).repeat_interleave(4 // n_kv_head, dim=0)
                  for w in (k, v)]
        state[name] = torch.cat([q, *(group.flatten(0, 1) for group in groups)])
    whole.load_state_dict(state)
    x = random_x(2, 6, 16)
    assert_close(shared(x), whole(x))
    memory = minigpt.LayerMemory(8)
    pieces = [shared(piece, memory) for piece in x.split([1, 3, 2], dim=1)]
    assert_close(torch.cat(pieces, dim=1), whole(x))
    assert memory.keys.shape == memory.values.shape == (2, n_kv_head, 8, 4)

# ---- Token shift ---------------------------------------------------------------------------------
@pytest.mark.parametrize("n_embd, n_head", [(8, 2), (9, 3)])
def test_token_shift_shows_half_of_the_channels_of_the_previous_position(n_embd, n_head):
    """To attention and to the MLP, after the norm. Before the first position there are zeros.
    Fails if the shift goes the other way or takes the other half. An odd width works, too."""
    def shifted(x):
        half = (n_embd + 1) // 2
        previous = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return torch.cat([previous[..., :half], x[..., half:]], dim=-1)

    block = stir(minigpt.ShiftBlock(small_config(n_embd=n_embd, n_head=n_head)))
    x = random_x(2, 5, n_embd)
    middle = x + block.attn(shifted(block.ln_1(x)))
    assert_close(block(x), middle + block.mlp(shifted(block.ln_2(middle))))

# ---- Heads that read the previous position -------------------------------------------------------
@pytest.mark.parametrize("attention", ["extended", "fused"])
@pytest.mark.parametrize("prev_heads", [1, 3])
def test_a_previous_position_head_is_attention_with_all_weight_on_the_previous_position(attention,
                                                                                    prev_heads):
    """Its values, mixed by a matrix of weights whose only 1 in each row is left of the diagonal
    (at the first position, on it), stand beside the other heads before c_proj. Fails if the shift
    goes the other way, or if zeros come in at the first position."""
    config = small_config(attention=attention, prev_heads=prev_heads)
    module = stir(minigpt.ATTENTION[attention](config)).eval()
    x = random_x(2, 5, 8)
    weights = torch.eye(5, dtype=torch.float64).roll(1, dims=0)
    weights[0] = torch.tensor([1.0, 0, 0, 0, 0])
    q, k, v = module.heads(x)
    ordinary = (module.weights(q, k) @ v).transpose(1, 2).flatten(2)
    values = module.c_prev(x).view(2, 5, prev_heads, 4).transpose(1, 2)
    fixed = (weights @ values).transpose(1, 2).flatten(2)
    expected = torch.cat([ordinary, fixed], dim=-1) @ module.c_proj.weight.T + module.c_proj.bias
    assert_close(module(x), expected)

@pytest.mark.parametrize("hs, block_size", [(12, 16), (32, 256), (64, 512), (64, 2048)])
def test_the_fixed_gain_lets_nothing_else_through(hs, block_size):
    """By the softmax itself: what is left for all other positions together is below 1e-9. The last
    query has the most keys, and among them all distances. Fails if the gain is too small, which
    the small models that the tests of Part IV export would not show."""
    speeds = 10000.0 ** (-torch.arange(hs, dtype=torch.float64)[1 : min(16, hs) : 2] / hs)
    gain = minigpt.fixed_gain(speeds, block_size, hs)
    distances = torch.arange(-1, block_size - 1, dtype=torch.float64)  # of keys from position t - 1
    scores = sum(torch.cos(distances * speed) for speed in speeds)
    scores = scores * gain**2 * (2 * hs) / len(speeds) / math.sqrt(2 * hs)
    assert 1 - scores.softmax(0)[1] < 1e-9

# ---- Byte-pair encoding: the algorithm -----------------------------------------------------------
def test_the_example_of_the_chapter_by_the_naive_algorithm():
    """aaabdaaabac becomes XabdXabac, XYdXYac and ZdZac, and then no pair occurs twice, so that
    learning ends although more merges were allowed."""
    ids = list(b"aaabdaaabac")
    merges = minigpt.learn_merges_slowly([ids], 99)
    assert merges == [(97, 97), (97, 98), (256, 257)]
    assert minigpt.learn_merges_slowly([ids], 2) == merges[:2]
    spelled = []
    for number, two in enumerate(merges):
        ids = minigpt.merge_pair(ids, two, 256 + number)
        spelled.append("".join("XYZ"[i - 256] if i >= 256 else chr(i) for i in ids))
    assert spelled == ["XabdXabac", "XYdXYac", "ZdZac"]

def test_naive_ties_go_to_the_smaller_ids_and_pairs_stay_within_words():
    """Both pairs occur twice, and the later one has the smaller ids. No pair reaches from the end
    of a word to the beginning of the next."""
    assert minigpt.learn_merges_slowly([[7, 8], [7, 8], [3, 9], [3, 9]], 1) == [(3, 9)]
    assert minigpt.learn_merges_slowly([[7], [8], [7], [8]], 1) == []
    assert minigpt.learn_merges_slowly([], 5) == []

# ---- Byte-pair encoding: the tokenizer -----------------------------------------------------------
def merges_by_the_naive_trainer(text, vocab_size):
    """The merges, as bytes, that the algorithm of the book learns. Bytes are numbered in GPT-2's
    order, because ties go to the smaller ids."""
    number_of = {byte: i for i, byte in enumerate(minigpt.BYTE_ORDER)}
    words = [[number_of[byte] for byte in word.encode()]
             for word in minigpt.word_pattern().findall(text)]
    tokens = [bytes([byte]) for byte in minigpt.BYTE_ORDER]
    merges = []
    for a, b in minigpt.learn_merges_slowly(words, vocab_size - 257):
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
    return merges

def mixed_text(rng, n):
    """A text of n characters from an alphabet that makes one kind of mistake likely."""
    alphabets = ["ab", "abc ", " \n\t'sdt", "aé漢🎭٣Ⅷ\u0301\u00a0\x1c.,"]
    return "".join(rng.choices(rng.choice(alphabets), k=n))

@pytest.mark.parametrize("seed", range(7))
def test_fast_training_equals_the_naive_trainer_on_random_texts(seed):
    """The fast trainer updates counts where the naive one counts again. Fails if a count is missed
    where merges touch ("aaaa"), if a count in the heap is old, or if ties go to another pair."""
    rng = random.Random(seed)
    for _ in range(4):
        words = [mixed_text(rng, rng.randrange(1, 30)) for _ in range(rng.randrange(1, 40))]
        text = " ".join(words)
        vocab_size = 257 + rng.randrange(60)
        expected = merges_by_the_naive_trainer(text, vocab_size)
        assert BPETokenizer.train(text, vocab_size).merges == expected

def test_fast_training_equals_the_naive_trainer_on_the_sample():
    """On real text, where words repeat and most counts are small. It fills the vocabulary."""
    text = SAMPLE.read_text(encoding="utf-8")[:8_000]
    expected = merges_by_the_naive_trainer(text, 400)
    tokenizer = BPETokenizer.train(text, 400)
    assert tokenizer.merges == expected
    assert len(expected) == 400 - 257 and tokenizer.vocab_size == 400

def test_encoding_repeats_the_merges_of_training(bpe):
    """Encoding a word gives what merging the pairs one after another gives, for every word of the
    sample. A page without a space is one long word, which takes another way through the merges.
    Fails if merge_word prefers another pair than the one that was learned first."""
    letters = "".join(random.Random(4).choices("ACGT", k=3000))
    of_letters = BPETokenizer.train(letters, 320)
    assert len(of_letters.merges) == 320 - 257
    words = set(minigpt.word_pattern().findall(
        SAMPLE.read_text(encoding="utf-8")[:30_000]))
    long_words = [letters[i : i + n] for i in range(0, 1000, 100) for n in (900, 1800)]
    for tokenizer, some in ((bpe, words), (of_letters, long_words)):
        number_of = {token: i for i, token in enumerate(tokenizer.tokens)}
        for word in some:
            ids = [number_of[bytes([byte])] for byte in word.encode()]
            for number, (a, b) in enumerate(tokenizer.merges, start=256):
                if len(ids) > 1:
                    ids = minigpt.merge_pair(ids, (number_of[a], number_of[b]), number)
            assert tokenizer.encode(word) == ids, word

def test_bpe_loses_nothing_and_survives_everything(bpe):
    """Every text comes back, and one word of 100,000 characters does not take for ever. Samples
    begin with the line break. Every byte has a token, so nothing is unknown."""
    rng = random.Random(1)
    texts = ["", "\0", "a" * 100_000, "".join(rng.choices("abcdefgh", k=100_000)), " " * 1000,
             "".join(map(chr, range(0xD800)))]
    texts += [mixed_text(rng, 50) for _ in range(200)]
    for text in texts:
        assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode([bpe.first_id]) == "\n"
    assert sorted(bpe.tokens[:256]) == [bytes([byte]) for byte in range(256)]
    assert max(bpe.encode("".join(texts))) < bpe.vocab_size

def test_half_characters_become_the_replacement_character(bpe):
    """UTF-8 cannot write a lone surrogate, so it becomes U+FFFD, in training too. Two halves that
    belong together are one character. Bytes that are half of a character decode to U+FFFD."""
    assert bpe.decode(bpe.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert bpe.decode(bpe.encode("\ud83c\udfad")) == "🎭"
    assert bpe.decode(bpe.encode("é")[:1]) == "\ufffd"
    assert BPETokenizer.train("xx" * 1000 + " \ud83d", 300).vocab_size > 257

def test_a_known_word_keeps_its_ids_when_the_memory_of_words_is_emptied(bpe):
    """The memory has a limit, and it must not matter. Callers that change a returned list must not
    change later results."""
    tokenizer = BPETokenizer(bpe.merges)
    expected = tokenizer.encode("Who's there?")
    assert tokenizer.encode_word.cache_info().maxsize == 2**20
    tokenizer.encode_word.cache_clear()
    assert tokenizer.encode("Who's there?") == expected
    assert tokenizer.encode_word.cache_info().currsize < 10
    tokenizer.encode("there").clear()
    assert tokenizer.encode("Who's there?") == expected

def test_end_of_text_is_one_token_that_no_merge_touches():
    """It separates texts in a corpus. Fails if its characters are learned from, or if a merge
    reaches from one text into the next."""
    tokenizer = BPETokenizer.train("ab<|endoftext|>ab" * 9, 270)
    (ab,) = tokenizer.encode("ab")
    ids = tokenizer.encode("ab<|endoftext|>ab")
    assert ids == [ab, tokenizer.end_id, ab]
    assert tokenizer.decode(ids) == "ab<|endoftext|>ab"
    assert tokenizer.end_id == tokenizer.vocab_size - 1 == len(tokenizer.tokens) - 1
    assert not any(b"<" in a + b for a, b in tokenizer.merges)

def test_bpe_files_are_in_gpt2s_format(bpe, tmp_path):
    """vocab.json and merges.txt show a space as Ġ and a line break as Ċ, and the ids are those of
    GPT-2's own files. What is loaded encodes like what was saved, and so does a checkpoint."""
    bpe.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert vocab["!"] == 0 and vocab["a"] == 64 and vocab["Ā"] == 188
    assert vocab["Ċ"] == 198 and vocab["Ġ"] == 220
    assert vocab["<|endoftext|>"] == bpe.end_id and len(vocab) == bpe.vocab_size == 600
    lines = (tmp_path / "merges.txt").read_bytes().decode("utf-8").split("\n")
    assert lines[0] == "#version: 0.2" and lines[-1] == "" and len(lines) == 2 + 600 - 257
    text = "Speak, Marigold! é\r\n 12\t<|endoftext|>"
    for same in (BPETokenizer.load(tmp_path), BPETokenizer(bpe.state)):
        assert same.merges == bpe.merges
        assert same.encode(text) == bpe.encode(text)

def test_a_tokenizer_with_other_ids_is_refused(bpe, tmp_path):
    """Another program may number the same tokens differently. To read such files as if they were
    GPT-2's would give a model nonsense."""
    bpe.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    vocab["Ġ"], vocab["!"] = vocab["!"], vocab["Ġ"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(UserError, match="does not number its tokens as GPT-2 does"):
        BPETokenizer.load(tmp_path)

@pytest.mark.parametrize("text", [
    SHORT.read_text(encoding="utf-8"), "a" * 99, " \n" * 40, "ab  cd\n\n ef!?\x1c \u2028x 'll" * 9,
    "<|endoftext|> a<|endoftext|>" * 9])
@pytest.mark.parametrize("size", [1, 7, 50])
def test_a_text_in_pieces_has_the_same_words(text, size):
    """A large text is encoded piece by piece. A piece must not end within a word, nor between a
    space and the word that it belongs to, nor within white space."""
    pieces = list(minigpt.in_pieces(text, size=size))
    assert "".join(pieces) == text and all(pieces)
    words = [minigpt.word_pattern().findall(piece) for piece in pieces]
    assert sum(words, []) == minigpt.word_pattern().findall(text)
    if size == 1 and " a" in text[1:]:
        assert len(pieces) > 5

def test_learning_byte_pairs_reports_its_progress(monkeypatch):
    """Otherwise a large text shows nothing for minutes."""
    seen = []
    monkeypatch.setattr(minigpt, "progress_of", lambda what: lambda share: seen.append(what))
    minigpt.make_tokenizer(RunConfig(tokenizer="bpe", bpe_size=262), "low lower lowest " * 9)
    assert set(seen) == {"learning byte pairs"}
    shares = []
    tokenizer = BPETokenizer.train("low lower lowest " * 9, 262, shares.append)
    assert shares == [n / 261 for n in range(257, 257 + len(tokenizer.merges))]

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

def hide_package(monkeypatch, hidden):
    """As if a package were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == hidden else found(name, *rest))

def no_network(*_, **__):
    raise OSError("no network")

def to_tiktoken(tokenizer):
    """A tiktoken.Encoding with the same ids: it knows a token by its bytes and its rank."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: i for i, token in enumerate(tokenizer.tokens[: tokenizer.end_id])}
    return tiktoken.Encoding("minigpt", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={minigpt.END_OF_TEXT: tokenizer.end_id})

def test_gpt2s_tokenizer_is_taken_from_tiktoken(bpe, monkeypatch):
    """That library keeps what it has fetched, too, and stores ranks instead of merges. The merges
    that they stand for are those that were learned, in the same order."""
    tiktoken = pytest.importorskip("tiktoken")
    encoding = to_tiktoken(bpe)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": encoding}[name])
    tokenizer = minigpt.fetch_gpt2_tokens()
    assert tokenizer.merges == bpe.merges and tokenizer.vocab_size == bpe.vocab_size

def test_tiktoken_gives_the_same_ids(bpe):
    """For words, numbers, all kinds of white space, control characters, other scripts and the token
    that ends a text. It merges by the bytes of the result, not by pairs, which must not matter."""
    pytest.importorskip("tiktoken")
    encoding = to_tiktoken(bpe)
    rng = random.Random(5)
    pieces = [*"abeht ,.!\n\t\r\0\x1c\x7f\x85\xa0é中😀ſ²\u2028", "<|endoftext|>", "the", "'ll",
              " an", "12", "\u0301"]
    assert encoding.n_vocab == bpe.vocab_size and encoding.eot_token == bpe.end_id
    texts = ["".join(rng.choices(pieces, k=rng.randrange(40))) for _ in range(500)]
    for text in (SHORT.read_text(encoding="utf-8"), *texts):
        ids = bpe.encode(text)
        assert encoding.encode(text, allowed_special="all") == ids
        assert encoding.decode(ids) == text

def compare_with_gpt2s_pattern(characters):
    """Splits texts with these characters by our pattern, and by GPT-2's with the package regex."""
    reference = pytest.importorskip("regex").compile(GPT2_PATTERN)
    ascii_pairs = itertools.product(map(chr, range(128)), repeat=2)
    rng = random.Random(0)
    texts = ["".join(f"a{c}1{c}.{c} {c}\n" for c in characters),
             "".join(f"a{c}1{c}.{c} {c}\n'{c}{d}" for c, d in ascii_pairs)]
    texts += [mixed_text(rng, 30) + "".join(rng.choices(characters, k=9)) for _ in range(500)]
    for text in texts:
        words = minigpt.word_pattern().findall(text)
        assert words == reference.findall(text)
        assert "".join(words) == text

def assigned_characters():
    """Every character that Python's tables of Unicode know, except half ones."""
    return [c for c in map(chr, range(sys.maxunicode + 1))
            if minigpt.unicodedata.category(c) not in ("Cn", "Cs")]

def test_words_are_those_of_the_reference_pattern():
    """Before and after letters, digits, signs and spaces. Fails for a letter that is a number, too,
    for Python's wider \\s, or for a short cut that ends a word before an accent. This takes the
    first 10,000 characters and every 29th of the others; the next test takes all."""
    characters = assigned_characters()
    compare_with_gpt2s_pattern(characters[:10_000] + characters[10_000::29])

@pytest.mark.slow
def test_words_of_all_characters_are_those_of_the_reference_pattern():
    """The same for each character of Unicode."""
    characters = assigned_characters()
    assert len(characters) > 200_000
    compare_with_gpt2s_pattern(characters)

def test_the_rust_trainer_learns_the_same_merges(bpe, tmp_path):
    """The library tokenizers is an implementation by others. From the same text it learns the same
    merges in the same order, and encodes alike."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe.save(tmp_path)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    theirs.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=599, min_frequency=2, show_progress=False,
                                             initial_alphabet=byte_level.alphabet())
    theirs.train_from_iterator([SAMPLE.read_text(encoding="utf-8")], trainer)
    learned = [" ".join(two) for two in json.loads(theirs.to_str())["model"]["merges"]]
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert learned == lines[1:-1]
    for text in ("Speak, Marigold! What's this?", "é 漢字  12\n\n x"):
        shown = [minigpt.show_bytes(bpe.tokens[i]) for i in bpe.encode(text)]
        assert theirs.encode(text).tokens == shown

# ---- Muon ----------------------------------------------------------------------------------------
def test_orthogonalize_levels_the_singular_values_and_keeps_the_directions():
    """The singular values follow the polynomial of the book, for each matrix of a stack and
    whatever its size. Fails for a wrong constant, number of rounds or division, or if the matrices
    of a stack are divided by one common norm."""
    for shape in ((2, 6, 20), (2, 8, 8)):
        U, _, V = torch.linalg.svd(random_x(*shape), full_matrices=False)
        S = torch.logspace(-2, 0, U.shape[-1], dtype=torch.float64)
        sizes = torch.tensor([1e-3, 50.0], dtype=torch.float64)[:, None, None]
        G = U @ torch.diag(S) @ V * sizes
        S = S / S.norm()
        for _ in range(5):
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        assert_close(minigpt.orthogonalize(G), U @ torch.diag(S) @ V, 1e-3)
    assert torch.all(minigpt.orthogonalize(torch.zeros(1, 2, 3)) == 0)  # and not 0 / 0

def test_muon_equals_torchs_with_the_parts_of_c_attn_apart():
    """q, k and v are three matrices, which c_attn stacks. Fails for a wrong factor, momentum or
    decay, a missing look ahead, a tall matrix that is not turned, or matrices of a stack that
    change places."""
    config = RunConfig(optimizer="muon", learning_rate=1.0, momentum=0.8, weight_decay=0.1,
                       dtype="bfloat16")  # as torch's
    model = GPT(small_config(bias=False, n_embd=16, mlp_ratio=2.0))
    peers = []
    for number, (name, p) in enumerate(model.named_parameters()):
        p.data = 3 * random_x(*p.shape, seed=number).float()  # so large that the decay matters
        if name.startswith("h.") and p.dim() == 2:
            parts = p.detach().clone().chunk(3 if "c_attn" in name else 1)
            peers.append((p, [nn.Parameter(part) for part in parts]))
    theirs = torch.optim.Muon([part for _, parts in peers for part in parts], lr=1.0, momentum=0.8,
                              weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours = minigpt.make_muon(model, config)
    assert ours.dtype == torch.bfloat16
    of_torch = inspect.signature(torch.optim.Muon).parameters
    assert RunConfig().momentum == of_torch["momentum"].default
    for step in range(4):
        for number, (p, parts) in enumerate(peers):
            p.grad = random_x(*p.shape, seed=100 * (step + 1) + number).float()
            for part, gradient in zip(parts, p.grad.chunk(len(parts))):
                part.grad = gradient.clone()
        ours.step()
        theirs.step()
        for p, parts in peers:
            assert_close(p.detach(), torch.cat(parts).detach(), 0.02)

def test_muon_has_the_matrices_of_the_blocks_and_adamw_has_the_rest():
    """Each weight belongs to one of them, at the one learning rate. Tables, the head, gains and
    biases take exactly AdamW's step."""
    config = RunConfig(learning_rate=0.25, momentum=0.7, weight_decay=0.3, grad_accum=1)
    changes = dict(tie_weights=False, qk_norm=True, attention="extended")
    model, twin = small_model(**changes), small_model(**changes)
    muon, adamw = minigpt.make_muon(model, config), minigpt.make_adamw(twin, config)
    group = muon.param_groups[-1]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.25, 0.7, 0.3)
    assert muon.dtype == torch.float32
    everything = [id(p) for g in muon.param_groups for p in g["params"]]
    assert sorted(everything) == sorted(map(id, model.parameters()))
    batch = pair(random_ids(2, 9))
    for m, optimizer in ((model, muon), (twin, adamw)):
        train_step(m, optimizer, [batch], config)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        is_adamws = not name.startswith("h.") or p.dim() == 1
        assert torch.equal(p, q) == is_adamws, name
        assert p.grad is None

def test_muon_takes_the_two_matrices_of_swiglu_apart():
    """c_fc of SwiGLU stacks two matrices, as c_attn stacks three. Others are one matrix each."""
    for changes, parts in ((dict(activation="swiglu"), [[8, 8, 8], [8], [21, 21], [8]]),
                           (dict(activation="relu2"), [[8, 8, 8], [8], [32], [8]]),
                           (dict(n_kv_head=1, attention="fused"), [[8, 4, 4], [8], [32], [8]])):
        model = GPT(small_config(**changes))
        optimizer = minigpt.make_muon(model, RunConfig(optimizer="muon"))
        assert optimizer.param_groups[-1]["parts"] == parts * 2

def test_muon_trains_a_model_without_blocks():
    """The bigram model has no matrix for Muon, so all of it is AdamW's."""
    model = minigpt.Bigram(small_config())
    idx = pair(torch.tensor([[0, 1, 2, 3, 4]]))
    assert fit(model, idx, 50, optimizer="muon", learning_rate=1.0) < 0.01

# ---- Better batches ------------------------------------------------------------------------------
def run_at(step, tokens, block_size, config):
    """As much of a run as its batches depend on."""
    model = types.SimpleNamespace(config=small_config(block_size=block_size))
    return types.SimpleNamespace(corpus=Corpus(tokens, tokens, 1), model=model, config=config,
                                 step=step)

def even_starts(steps, tokens=500, block_size=8, **settings):
    """Where the even windows of some steps begin, in the order in which they are drawn."""
    settings = {"sampling": "even", "max_steps": 99, "batch_size": 3, "grad_accum": 2, **settings}
    config = RunConfig(**settings)
    text = torch.arange(tokens)
    batches = [batch for step in steps
               for batch in minigpt.SAMPLING["even"](run_at(step, text, block_size, config))]
    return [start for _, starts in batches for start in starts.tolist()]

def test_even_windows_advance_by_the_golden_ratio():
    """From each window to the next, within a batch, from batch to batch and from step to step, also
    after millions of windows, whose numbers times the ratio have no exact fraction in 32 bits. The
    whole windows begin at an offset of their own."""
    for first in (5, 1_000_000):
        starts = even_starts(range(first, first + 3))
        steps = [(b - a) % 492 / 492 for a, b in itertools.pairwise(starts)]
        assert steps == pytest.approx([0.618] * 17, abs=0.005)
    n, half = 1_000_000, dict(short_share=0.5, short_block=4, batch_size=1, grad_accum=1)
    offsets = [even_starts([step], tokens=n, max_steps=8, **half)[0] / n - step * 0.6180339887
               for step in (0, 4)]
    assert abs(offsets[0] - offsets[1] % 1) > 0.001

def test_even_windows_reach_both_ends_of_the_text():
    """A window needs one token more than it has, for its last target. In a text of that length
    there is one place, in a text of one more there are two. Fails for an end that is off by one."""
    assert set(even_starts(range(9), tokens=9)) == {0}
    assert set(even_starts(range(9), tokens=10)) == {0, 1}
    starts = even_starts(range(200))
    assert min(starts) == 0 and max(starts) == 491

def test_windows_are_short_at_first():
    """For that share of the steps, and so many more of them that a step has as many tokens. Then
    they are whole. A short window is never longer than a whole one."""
    def shapes(step, **settings):
        config = RunConfig(max_steps=8, sampling="even", batch_size=3, grad_accum=2, **settings)
        batches = minigpt.SAMPLING["even"](run_at(step, torch.arange(500), 8, config))
        return [(len(starts), T) for T, starts in batches]

    half = dict(short_share=0.5, short_block=2)
    for step, shape in ((0, (12, 2)), (3, (12, 2)), (4, (3, 8)), (7, (3, 8))):
        assert shapes(step, **half) == [shape] * 2
    assert shapes(0, short_share=0.0, short_block=2) == [(3, 8)] * 2
    assert shapes(7, short_share=1.0, short_block=2) == [(12, 2)] * 2
    assert shapes(0, short_share=1.0, short_block=128) == [(3, 8)] * 2
    assert shapes(0, short_share=1.0, short_block=5) == [(6, 4)] * 2  # two halves
    starts = even_starts(range(300), max_steps=300, short_share=1.0, short_block=2)
    assert min(starts) == 0 and max(starts) == 497

# ---- Training at a lower temperature -------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.5, 0.9, 1.0, 2.0])
def test_the_loss_of_a_step_is_that_of_the_divided_logits(temperature):
    """Value and gradient, written out in float64. Fails if the logits are multiplied, or if those
    that are returned are divided, too."""
    model = small_model()
    x, y = pair(random_ids(2, 9))
    logits, loss = minigpt.Tempered(model, temperature)(x, y)
    gradient, = torch.autograd.grad(loss, model.h[0].mlp.c_fc.weight)
    z, _ = model(x)
    assert torch.equal(logits, z)
    powers = (z / temperature).exp()
    p = powers.gather(-1, y[..., None])[..., 0] / powers.sum(dim=-1)
    expected = -p.log().mean()
    assert_close(loss, expected.float(), 1e-6)
    assert_close(gradient, torch.autograd.grad(expected, model.h[0].mlp.c_fc.weight)[0], 1e-6)

def test_logits_of_16_bits_are_divided_in_32():
    """The quotients of numbers in bfloat16 would be rounded to 8 bits once more. Compared with
    float64. Fails if the logits keep their format while they are divided."""
    logits = (10 * random_x(2, 3, 11)).bfloat16()
    y = random_ids(2, 3)
    _, loss = minigpt.Tempered(lambda x: (logits, None), 0.9)(None, y)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double().flatten(0, 1) / 0.9, y.flatten())
    assert_close(loss.double(), expected, 1e-6)

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_trains_at_the_temperature_and_is_evaluated_at_one(tmp_path, dtype):
    """The typed setting arrives in the loss of a step, and nowhere else."""
    run = tiny_full_run(tmp_path, dtype=dtype, train_temperature=0.5)
    stir(run.model).float()
    x, y = next(iter(run.batches()))
    z, plain = run.model(x, y)
    _, loss = run.runner(x, y)
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    assert_close(loss, torch.nn.functional.cross_entropy((2 * z).flatten(0, 1), y.flatten()),
                 tolerance)
    assert abs(loss - plain) > 0.1
    assert run.estimate() == minigpt.estimate_loss(run.model, run.corpus, run.config)
    assert type(tiny_full_run(tmp_path / "other").runner) is GPT

# ---- Learning from other models ------------------------------------------------------------------
def test_the_taught_loss_pulls_halfway_to_what_the_teachers_expect():
    """The gradient with respect to the logits is q minus the mean of the target, as 0 and 1, and of
    the teachers' probabilities. In float64. Fails if the two halves are weighted differently."""
    z = random_x(2, 5, 11).requires_grad_()
    p = random_x(2, 5, 11, seed=1).softmax(dim=-1)
    y = random_ids(2, 5)
    gradient, = torch.autograd.grad(minigpt.taught_loss(z, y, p), z)
    expected = z.softmax(dim=-1) - (F.one_hot(y, 11) + p) / 2
    assert_close(10 * gradient, expected, 1e-6)  # the loss is a mean over 10 positions

@pytest.mark.parametrize("n", [5, 9, 40, 51])
def test_the_table_holds_what_the_teachers_expect(n):
    """Row i is the mean of the teachers' probabilities for token i, each with the first of its
    windows, which overlap by half, that reaches so far. Would fail if a row were moved, taken from
    a window that shows too little, or counted twice."""
    models = [small_model().eval(), small_model(seed=1, block_size=5).eval()]
    tokens = random_ids(n, seed=3)
    teachers, shares = minigpt.Teachers(models, tokens), []
    teachers.read(shares.append)
    for i in range(1, n):
        expected = torch.zeros(11)
        for model in models:
            T = min(model.config.block_size, n - 1)
            start = min(T // 2 * max(0, math.ceil((i - T) / (T // 2))), n - 1 - T)
            assert start == 0 or i - start > T // 2
            expected += model(tokens[None, start:i])[0][0, -1].softmax(dim=-1).float() / 2
        assert_close(teachers.table[i].float(), expected, 1e-3)
    assert shares == sorted(shares) and shares[-1] == 1

@pytest.mark.parametrize("table_bytes", [0, 1e9])
def test_a_student_is_taught_by_position_with_and_without_the_table(monkeypatch, table_bytes):
    """Each position has its own row. A table of bigrams does not depend on the context, so both
    ways give the same. Fails if the rows are those of the inputs, or of other windows."""
    monkeypatch.setattr(minigpt, "TABLE_BYTES", table_bytes)
    tokens = random_ids(60, seed=3)
    teacher, student = stir(minigpt.Bigram(small_config())), small_model()
    teachers = minigpt.Teachers([teacher], tokens)
    teachers.read(lambda share: None)
    assert (teachers.table is None) == (table_bytes == 0)
    starts = torch.tensor([0, 17, 51])
    x, y = minigpt.cut_windows(tokens, 8, starts)
    places = minigpt.cut_windows(torch.arange(60), 8, starts)
    logits, loss = minigpt.Taught(student, teachers, temperature=0.5)(*places)
    assert_close(logits, student(x)[0])
    expected = minigpt.taught_loss(2 * logits.float(), y, teacher(x)[0].softmax(dim=-1))
    assert_close(loss.double(), expected, 1e-3)
    assert not any(name.startswith("teachers") for name, _ in student.named_parameters())

def test_a_teacher_with_a_shorter_window_reads_in_parts():
    """Without a table, a window of 8 is more than this teacher can read at once."""
    teacher, x = small_model(block_size=5).eval(), random_ids(2, 8)
    p = minigpt.Teachers([teacher], x[0]).probabilities(x, None)
    expected = torch.cat([teacher(x[:, :5])[0], teacher(x[:, 5:])[0]], dim=1).softmax(dim=-1)
    assert_close(p.double(), expected, 1e-6)

# ---- The key/value cache -------------------------------------------------------------------------
def read_in_chunks(reader, idx, sizes):
    """Reads idx (B, N) in pieces of these sizes; yields how much is read and the logits."""
    done = 0
    for size in sizes:
        done += size
        yield done, reader.read(idx[:, done - size : done])

def window_after(window, new, block_size):
    """The rule for the window, as the book states it: whole while it fits; an overlong prompt
    keeps block_size tokens, and a text that outgrows the window its newest half."""
    joined = torch.cat([window, new], dim=1)
    if joined.shape[1] <= block_size:
        return joined
    keep = block_size if window.shape[1] == 0 else max(block_size // 2, 1)
    return joined[:, -keep:]

def count_tokens_of(model):
    """A list that grows with each pass through the model: how many tokens went in."""
    counts = []
    model.wte.register_forward_hook(lambda layer, args, out: counts.append(args[0].shape[-1]))
    return counts

@pytest.mark.parametrize("attention", ["extended", "fused"])
@pytest.mark.parametrize("block", minigpt.BLOCKS)
@pytest.mark.parametrize("pos", minigpt.POSITIONS)
def test_texts_longer_than_several_windows_are_read_by_the_rule(attention, block, pos):
    """After each piece, the logits are those of the model for the window of the rule, whether the
    reader remembers or not. Pieces of several tokens may come when the window is nearly full, and
    one may be longer than it. Fails for a key turned for the wrong place, a mask aligned with the
    first key, or a shift that forgets the position before a piece; if the memory survives a move of
    the window, or if positions do not begin at 0 again."""
    for block_size, sizes in (
            (8, [5] + [1] * 18), (5, [20] + [1] * 18), (1, [3] + [1] * 18), (2, [1] * 19),
            (8, [2, 3, 2, 1]), (8, [6, 4, 3, 7, 2]), (8, [1, 20, 1, 8, 5]), (8, [8, 8, 8, 9])):
        model = small_model(attention=attention, block=block, pos=pos, block_size=block_size,
                            qk_norm=pos != "learned", dropout=0.5, prev_heads=len(sizes) % 2 * 2)
        idx = random_ids(2, sum(sizes))
        window = idx[:, :0]
        reader = CachedReader(model)
        remembered = read_in_chunks(reader, idx, sizes)
        repeated = read_in_chunks(CachedReader(model, remember=False), idx, sizes)
        for size, (done, logits), (_, same) in zip(sizes, remembered, repeated):
            window = window_after(window, idx[:, done - size : done], block_size)
            assert torch.equal(reader.window, window) and not logits.requires_grad
            with torch.no_grad():
                expected = model(window)[0][:, -1].float()
            assert_close(logits, expected, 1e-5)
            assert_close(same, expected, 1e-5)

def test_the_reader_suits_the_attention(monkeypatch):
    """A model whose attention has a memory is read with it, and Part I's model without. Both write
    through GPT.generate, and a reader that is given wins. An attention of one's own that extends
    another has its reader, without being registered."""
    class Mine(Attention):
        pass

    monkeypatch.setitem(minigpt.ATTENTION, "mine", Mine)
    for attention, counts in (("explicit", [5, 6, 7, 8, 8, 8]), ("extended", [5, 1, 1, 1, 4, 1]),
                              ("fused", [5, 1, 1, 1, 4, 1]), ("mine", [5, 1, 1, 1, 4, 1])):
        model = small_model(attention=attention)
        seen = count_tokens_of(model)
        model.generate(random_ids(1, 5), 6)
        assert seen == counts
        del seen[:]
        plain = functools.partial(minigpt.read_window, model)
        model.generate(random_ids(1, 5), 6, reader=plain)
        assert seen == [5, 6, 7, 8, 8, 8]

@pytest.mark.parametrize("attention", ["extended", "fused"])
def test_each_token_is_read_once_unless_the_window_moves(attention):
    """The prompt goes through the model as a whole, then one token for each that is written. When
    the window is full, its newest half is read again. Without the cache, all of it is read each
    time. The memory has room for one window and never more."""
    model = small_model(attention=attention)
    counts = count_tokens_of(model)
    reader = CachedReader(model)
    model.generate(random_ids(2, 5), 13, reader=reader)
    assert counts == [5, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1]
    for memory in reader.memory:
        assert memory.length == 7
        assert memory.keys.shape == memory.values.shape == (2, 2, 8, 4)
    counts.clear()
    model.generate(random_ids(2, 5), 6, reader=CachedReader(model, remember=False))
    assert counts == [5, 6, 7, 8, 4, 5]
    counts.clear()
    model.generate(random_ids(1, 30), 2)
    assert counts == [8, 4]  # an overlong prompt fills the window, so the next token moves it

@pytest.mark.parametrize("attention", minigpt.ATTENTION)
def test_two_interleaved_streams_of_one_model_do_not_disturb_each_other(attention):
    """What is remembered belongs to the reader. Fails if it is kept in the model, where a second
    stream would find the keys of the first."""
    model = small_model(attention=attention, block="shift")

    def stream(seed):
        return minigpt.stream_tokens(model, random_ids(1, 3 + seed, seed=seed), 40,
                                     generator=torch.Generator().manual_seed(seed))

    together = torch.tensor([*zip(stream(0), stream(1))])
    alone = torch.tensor([[*stream(0)], [*stream(1)]]).T
    assert torch.equal(together, alone) and not torch.equal(*alone.T)

# ---- All combinations ----------------------------------------------------------------------------
def check_causal(variant):
    """A change at position 5 moves the logits from position 5 on, and none before. Each weight has
    a gradient, so that no part is built without being used."""
    idx = random_ids(1, 8)
    changed = idx.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    model = small_model(**variant)
    logits, loss = model(idx, idx)
    loss.backward()
    moved = (model(changed)[0] - logits).abs().amax(dim=(0, 2))
    assert torch.all(moved[:5] == 0) and moved[5] > 0, variant
    for name, p in model.named_parameters():
        # A bias that is added to all keys alike moves all scores of a query alike, so the softmax
        # does not change, unless the keys are turned afterwards.
        if not name.endswith("k_norm.bias") or variant["pos"] in minigpt.ROTATIONS:
            assert p.grad.abs().sum() > 0, (name, variant)

def test_the_future_cannot_be_seen_in_any_combination():
    """All combinations, and for each one of the kinds of attention that can do it, one kind of
    head, a number of heads, and biases or none, in turn. Fails if two variations that work alone
    do not work together."""
    names = ("block", "norm", "pos", "activation", "qk_norm")
    tables = (minigpt.BLOCKS, minigpt.NORMS, minigpt.POSITIONS, minigpt.ACTIVATIONS, (False, True))
    variants = [dict(zip(names, values)) for values in itertools.product(*tables)]
    assert len(variants) >= 3 * 4 * 3 * 4 * 2
    for i, variant in enumerate(variants):
        needs_more = variant["pos"] in minigpt.ROTATIONS or variant["qk_norm"]
        kinds = [key for key in minigpt.ATTENTION if not (needs_more and key == "explicit")]
        attention = kinds[(i + i // 4) % len(kinds)]
        prev_heads = 0 if attention == "explicit" else i % 3
        check_causal({**variant, "attention": attention, "prev_heads": prev_heads,
                      "tie_weights": i % 3 > 0, "n_head": (2, 1, 4)[i % 5 % 3],
                      "mlp_ratio": (4.0, 2.0)[i % 7 % 2], "bias": i % 11 % 2 == 0, "n_layer": 1})

# ---- A new variation -----------------------------------------------------------------------------
class SineMLP(minigpt.MLP):
    """A new activation function, for the test below."""
    def activate(self, x):
        return torch.sin(x)

class ParityPositions(nn.Module):
    """A new position scheme: one learned vector for even positions, and one for odd ones."""
    def __init__(self, config):
        super().__init__()
        self.parity = nn.Embedding(2, config.n_embd)

    def forward(self, positions):
        return self.parity(positions % 2)

class BackwardRotary(minigpt.Rotary):
    """A new rotation: the clock hands turn the other way."""
    def __init__(self, config):
        super().__init__(config)
        self.sin = -self.sin

def test_a_new_variation_is_one_entry_of_a_table(tmp_path, monkeypatch):
    """A reader of the book adds a class and an entry, and can train, resume and write with it
    through the command line. Fails if a name is also listed elsewhere, such as in the flags."""
    drawn = []

    def line_windows(run):
        """Windows that begin where a line begins, as an exercise of the README asks for."""
        drawn.append(run.step)
        tokens, (line_break,) = run.corpus.train[:-17], run.tokenizer.encode("\n")
        starts = (tokens == line_break).nonzero()[: run.config.batch_size, 0] + 1
        return [(16, starts)] * run.config.grad_accum

    monkeypatch.setitem(minigpt.ACTIVATIONS, "sine", SineMLP)
    monkeypatch.setitem(minigpt.POSITIONS, "parity", ParityPositions)
    monkeypatch.setitem(minigpt.SAMPLING, "lines", line_windows)
    train_tiny(tmp_path, "--activation", "sine", "--pos", "parity", "--sampling", "lines",
               "--short_share", "0")
    assert drawn == list(range(6))
    model, _ = model_of(tmp_path / "latest.pt")
    assert type(model.h[0].mlp) is SineMLP and type(model.wpe) is ParityPositions
    assert step_losses(tmp_path)[-1][1] < step_losses(tmp_path)[0][1]
    resume_tiny(tmp_path, "--max_steps", "8")
    assert drawn == list(range(8))
    code, out, _ = run_main("--mode", "generate", "--out_dir", tmp_path, "--max_tokens", "40",
                            "--prompt", "A")
    assert code == 0 and out.startswith("A") and len(out) > 30

def test_a_new_rotation_is_an_entry_of_two_tables(tmp_path, monkeypatch):
    """One for what is added to the vectors and one for what turns queries and keys. What RoPE
    needs, it needs too: another attention than Part I's."""
    monkeypatch.setitem(minigpt.POSITIONS, "backward", minigpt.NoPositions)
    monkeypatch.setitem(minigpt.ROTATIONS, "backward", BackwardRotary)
    train_tiny(tmp_path / "run", "--pos", "backward")
    model, _ = model_of(tmp_path / "run" / "best.pt")
    assert type(model.h[0].attn.rotary) is BackwardRotary
    result = run_main(*TRAIN, "--out_dir", tmp_path / "other", "--pos", "backward",
                      "--attention", "explicit", "--no_qk_norm")
    check_mistake(*result, ["--pos backward", "--attention extended or fused"])

# ---- Part III: devices and number formats --------------------------------------------------------
def test_a_device_is_found_by_its_name():
    """auto takes the best device that is present. A name that is not present, or that PyTorch knows
    but cannot train on, is refused with a list of what there is."""
    assert minigpt.find_device("cpu").type == "cpu"
    assert minigpt.find_device("auto").type in ("cuda", "mps", "cpu")
    for name in ("nonsense", "cuda:99", "cpu:1", "meta", ""):
        with pytest.raises(UserError, match=f"--device {name}: not present.* auto, .*cpu"):
            minigpt.find_device(name)

@pytest.mark.parametrize("local_rank, expected", [(None, "cuda:0"), ("1", "cuda:1")])
def test_each_process_on_a_machine_takes_a_gpu_of_its_own(monkeypatch, local_rank, expected):
    """torchrun numbers the processes of a machine by LOCAL_RANK. If all took the first GPU, the
    others would be idle. A GPU that is named with its number is taken as it is."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert str(minigpt.find_device("auto")) == expected
    assert str(minigpt.find_device("cuda")) == expected
    assert str(minigpt.find_device("cuda:0")) == "cuda:0"
    assert chosen == [expected, expected, "cuda:0"]

@pytest.mark.parametrize("capabilities, expected", [
    ({}, "float32"), ({"avx512": True}, "float32"), ({"avx512_bf16": False}, "float32"),
    ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), (None, "float32")])
def test_auto_takes_bfloat16_only_where_the_cpu_has_it(monkeypatch, capabilities, expected):
    """Without hardware support, bfloat16 is slower than float32. An older PyTorch (None) cannot
    tell what the CPU has. A format that was typed is not questioned."""
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu = torch.device("cpu")
    assert minigpt.find_dtype("auto", cpu) == expected
    assert minigpt.find_dtype("bfloat16", cpu) == "bfloat16"
    assert minigpt.find_dtype("float32", cpu) == "float32"

@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bfloat16_only_where_the_gpu_has_it(monkeypatch, native):
    """PyTorch also says yes where it emulates bfloat16, which is slow: the question must be about
    the hardware. Older GPUs have float16 instead. On Apple's GPUs, training is in float32."""
    def supported(including_emulation=True):
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    found = minigpt.find_dtype("auto", torch.device("cuda"))
    assert found == ("bfloat16" if native else "float16")
    assert minigpt.find_dtype("auto", torch.device("mps")) == "float32"

@pytest.mark.parametrize("device, expected", [("cuda", "gpt"), ("cpu", "laptop"),
                                              ("mps", "laptop")])
def test_the_preset_follows_the_device_unless_one_is_named(capsys, device, expected):
    """A GPU gets the reference model, other devices the one that a CPU can train. The choice is
    said, with the names of the others."""
    device = torch.device(device)
    assert minigpt.choose_preset({}, device) == expected
    said = capsys.readouterr().err
    assert f"preset {expected} (chosen for {device.type})" in said
    assert all(name in said for name in minigpt.PRESETS)
    named = {"preset": "mini"}
    assert minigpt.choose_preset(named, device) == "mini"
    assert "preset mini (as asked)" in capsys.readouterr().err

@pytest.mark.parametrize("changes", [
    dict(model="bigram"), dict(), dict(attention="extended"),
    dict(attention="extended", pos="rope", qk_norm=True, norm="rmsnorm", activation="swiglu"),
    dict(attention="fused", pos="rope", qk_norm=True, norm="fused_layernorm", prev_heads=1),
    dict(attention="fused", pos="sinusoidal", block="shift"), dict(block="post")])
def test_a_model_makes_all_that_it_needs_on_its_own_device(changes):
    """Batches are on the CPU, wherever the model is. A tensor of the device "meta" has a shape but
    no numbers, and it cannot be combined with one of the CPU, just as one of a GPU cannot. So this
    needs no GPU. Fails if a mask, the positions, the ids or the targets stay on the CPU."""
    with torch.device("meta"):
        config = small_config(dropout=0.1, **changes)
        model = minigpt.MODELS[config.model](config)
    read = []  # what each layer reads, because a table takes ids of any device here
    for layer in [*model.modules()][1:]:
        layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    logits, loss = model(*pair(random_ids(2, 9)))
    loss.backward()
    norm = minigpt.clip_gradients(model.parameters(), 1.0)
    made = [logits, loss, norm, *read, *(p.grad for p in model.parameters())]
    assert {tensor.device.type for tensor in made} == {"meta"}
    if config.attention != "explicit":  # in two pieces, as the reader with a memory reads
        memory = [minigpt.LayerMemory(8) for _ in model.h]
        for start in (0, 3):
            x = model.embed(random_ids(2, 3), torch.arange(start, start + 3))
            for block, remembered in zip(model.h, memory):
                x = block(x, remembered)
            assert x.device.type == "meta" and memory[1].length == start + 3
    with pytest.raises(NotImplementedError, match="meta tensor"):  # tokens are drawn on the CPU
        minigpt.new_reader(model)(random_ids(1, 3))

def test_mixed_precision_computes_the_matrix_products_in_16_bits_and_nothing_else():
    """Weights, gradients, the residual stream and the loss stay in float32: bfloat16 has 8 bits of
    precision, and a sum of many small changes would lose them."""
    model = minigpt.new_model(small_config(), 0)
    x = torch.arange(16).view(2, 8) % 11
    formats = {}
    for name in ("h.0.mlp.c_fc", "h.0.attn.c_attn", "h.0", "lm_head"):
        def note(module, inputs, output, name=name):
            formats[name] = output.dtype

        model.get_submodule(name).register_forward_hook(note)
    _, loss = minigpt.MixedPrecision(model, "bfloat16")(x, x)
    loss.backward()
    assert formats == {"h.0.mlp.c_fc": torch.bfloat16, "h.0.attn.c_attn": torch.bfloat16,
                       "h.0": torch.float32, "lm_head": torch.bfloat16}
    assert loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}

def test_a_run_in_16_bits_is_nearly_the_run_in_float32(tiny_run, tmp_path):
    """The losses differ, so the typed format has arrived, but by less than a hundredth."""
    exact = [loss for _, loss, _ in step_losses(tiny_run[0])]
    assert "cpu, bfloat16" in train_tiny(tmp_path, "--dtype", "bfloat16")
    losses = [loss for _, loss, _ in step_losses(tmp_path)]
    assert losses != exact
    assert losses == pytest.approx(exact, rel=1e-2)

def test_the_format_auto_is_found_again_on_another_machine(tmp_path, monkeypatch):
    """A run that began on a CPU with bfloat16 continues in float32 on one without. If the
    checkpoint stored the format that was found, it would continue in a slow one."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    said = train_tiny(tmp_path, "--dtype", "auto", "--max_steps", "1")
    assert "cpu, bfloat16" in said
    assert load_checkpoint(tmp_path / "latest.pt")["train_config"]["dtype"] == "auto"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)
    assert "cpu, float32" in resume_tiny(tmp_path, "--max_steps", "2")

@pytest.mark.slow
def test_compilation_that_fails_is_one_error(tmp_path):
    """torch.compile needs a C++ compiler on a CPU. Where there is none, PyTorch's own error has
    hundreds of lines; ours is one, and names the flag that helps."""
    env = {"CXX": str(tmp_path / "no-such-compiler"), "PATH": "",
           "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = run_command(*TRAIN, "--max_steps", "2", "--out_dir", tmp_path / "a", "--compile", **env)
    check_mistake(done.returncode, done.stdout, done.stderr, ["--compile", "--no_compile"])

@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.gpu
def test_a_compiled_run_is_nearly_the_run_itself(tmp_path, monkeypatch):
    """It saves the weights under their own names, so that any run can continue with them. Fails if
    the checkpoint holds the wrapped model, whose names have a prefix."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    plain = [*TRAIN, *ON_DEVICE, "--max_steps", "3"]
    succeed(*plain, "--out_dir", tmp_path / "plain")
    succeed(*plain, "--out_dir", tmp_path / "compiled", "--compile")
    assert [loss for _, loss, _ in step_losses(tmp_path / "compiled")] == pytest.approx(
        [loss for _, loss, _ in step_losses(tmp_path / "plain")], rel=1e-3)
    resume_tiny(tmp_path / "compiled", "--no_compile", "--max_steps", "4", "--device", DEVICE)
    assert step_of(tmp_path / "compiled" / "latest.pt") == 4

@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_freed_memory_is_kept():
    """The script asks for six blocks of 40 MB and frees them, twenty times, as training steps do.
    With keep_memory, the last ten rounds need hardly any page from the system."""
    script = """
import resource, sys, torch, minigpt
if sys.argv[1] == "kept":
    minigpt.keep_memory()
for i in range(20):
    blocks = [torch.ones(10_000_000) for _ in range(6)]
    if i == 9:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for name in ("kept", "given back"):
        printed = subprocess.check_output([sys.executable, "-c", script, name], text=True)
        faults[name] = int(printed)
    assert faults["kept"] < 0.01 * faults["given back"]

# ---- The best device that is there ---------------------------------------------------------------
DEVICE = os.environ.get("MINIGPT_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
ON_DEVICE = ["--dropout", "0", "--learning_rate", "1e-3", "--device", DEVICE]

@pytest.mark.gpu
@pytest.mark.parametrize("dtype, near", [("float32", 1e-3), ("bfloat16", 2e-2), ("float16", 2e-2)])
def test_training_on_the_best_device_is_training_on_the_cpu(tmp_path, dtype, near):
    """Up to rounding, in each number format. The checkpoint of one device is used on the other."""
    train_tiny(tmp_path / "cpu", *ON_DEVICE, "--device", "cpu")
    train_tiny(tmp_path / "best", *ON_DEVICE, "--dtype", dtype)
    for a, b in zip(step_losses(tmp_path / "cpu"), step_losses(tmp_path / "best"), strict=True):
        assert a == pytest.approx(b, rel=near)
    results = [run_main("--mode", "eval", "--out_dir", tmp_path / "best", "--device", name)
               for name in ("cpu", DEVICE)]
    a, b = (float(re.search(r"([\d.]+) nats", out)[1]) for _, out, _ in results)
    assert a == pytest.approx(b, rel=1e-3)

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_on_the_best_device_is_resumed(tmp_path, dtype):
    """Half the steps, --resume and the rest are nearly one go. (GPUs add in no fixed order.)"""
    argv = [*ON_DEVICE, "--dtype", dtype, "--dropout", "0.1"]
    train_tiny(tmp_path / "whole", *argv)
    train_tiny(tmp_path / "parts", *argv, "--max_steps", "3")
    resume_tiny(tmp_path / "parts", "--max_steps", "6", "--device", DEVICE)
    whole, parts = (step_losses(tmp_path / name) for name in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-3)

@pytest.mark.gpu
def test_the_best_device_writes_the_same_with_and_without_the_cache(tmp_path):
    """And the same as the CPU, if the likeliest token is taken each time."""
    train_tiny(tmp_path, *ON_DEVICE, "--max_steps", "40")
    argv = ["--mode", "generate", "--out_dir", tmp_path, "--prompt", "THE", "--temperature", "0",
            "--max_tokens", "40"]
    texts = {run_main(*argv, "--device", name, *flags)[1]
             for name, flags in (("cpu", []), (DEVICE, []), (DEVICE, ["--no_cache"]))}
    assert len(texts) == 1 and len(texts.pop()) == 44

@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_nearly_one(tmp_path):
    """With nccl. The losses are the same, up to rounding."""
    argv = [*TRAIN, *ON_DEVICE[:-2], "--device", "auto"]
    code, _, err = run_torchrun(2, *argv, "--out_dir", tmp_path / "two")
    assert code == 0, err
    succeed(*argv, "--out_dir", tmp_path / "one", "--device", "cuda")
    one, two = (step_losses(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3)

# ---- Loss scaling --------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_in_float16_is_nearly_training_in_float32(tmp_path, optimizer):
    """Scaling and unscaling cancel, also with accumulation and clipping. Fails if gradients are
    clipped before they are divided, which would make every step far too small, or if they are not
    divided at all."""
    argv = ["--optimizer", optimizer, "--max_steps", "20", "--dropout", "0", "--grad_clip", "0.5",
            "--learning_rate", "1e-3"]
    train_tiny(tmp_path / "a", *argv)
    said = train_tiny(tmp_path / "b", *argv, "--dtype", "float16")
    assert "cpu, float16" in said and "skipped" not in said
    for a, b in zip(step_losses(tmp_path / "a"), step_losses(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=0.02)
    state = load_checkpoint(tmp_path / "b" / "latest.pt")
    assert state["scaler"]["scale"] == 2.0**16
    assert all(w.dtype == torch.float32 for w in state["model"].values())

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_with_infinite_gradients_changes_nothing_and_is_counted(tmp_path, optimizer):
    """The scale was too large: the step is left out, the scale is halved, and the next step counts.
    Neither weights nor running means may see an infinity."""
    run = tiny_full_run(tmp_path, dtype="float16", optimizer=optimizer, max_steps=9, log_interval=1,
                        sample_tokens=0)
    said = []
    run.journal.say = said.append

    def step():
        run.take_step()
        run.step += 1

    step()
    before = [p.clone() for p in run.model.parameters()]
    moments = json.dumps(run.optimizer.state_dict(), default=lambda t: t.tolist())
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 1e38})
    step()
    assert_same(before, list(run.model.parameters()))
    assert json.dumps(run.optimizer.state_dict(), default=lambda t: t.tolist()) == moments
    assert run.skipped == 1 and run.scaler.get_scale() == pytest.approx(0.5e38)
    run.journal.report_step(run, torch.tensor(2.0), torch.tensor(math.inf))
    assert said[-1].endswith("overflow): 1")
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 1024.0})
    step()
    assert run.skipped == 1
    assert not torch.equal(before[0], next(run.model.parameters()))

def test_a_float16_run_is_resumed_exactly_with_its_scale(tmp_path):
    """The factor is part of the state: with another one, other steps would be skipped, and
    gradients would be rounded elsewhere. It may also go on in another format."""
    argv = ["--dtype", "float16"]
    train_tiny(tmp_path / "whole", *argv)
    train_tiny(tmp_path / "parts", *argv, "--max_steps", "3")
    path = tmp_path / "parts" / "latest.pt"
    state = load_checkpoint(path)
    assert state["scaler"]["_growth_tracker"] == 3
    resume_tiny(tmp_path / "parts", *argv, "--max_steps", "6")
    assert_same_run(tmp_path / "whole" / "latest.pt", path)
    assert load_checkpoint(path)["scaler"]["_growth_tracker"] == 6
    resume_tiny(tmp_path / "parts", "--dtype", "float32", "--max_steps", "7")
    resume_tiny(tmp_path / "parts", "--dtype", "float16", "--max_steps", "8")
    assert load_checkpoint(path)["scaler"]["_growth_tracker"] == 1

@pytest.mark.parametrize("set_by_user, spins", [
    ({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_threads_that_wait_give_up_their_core_unless_the_user_says_otherwise(set_by_user, spins):
    """The variable is read when PyTorch is imported, so it must be set before. Would fail if it
    were set afterwards, or if it overruled what the user has set."""
    unset = {name: x for name, x in os.environ.items() if name not in ("GOMP_SPINCOUNT",
                                                                       "OMP_WAIT_POLICY")}
    begin = SOURCE[: SOURCE.index("\nimport torch\n")]
    program = f"{begin}\nprint('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", program], env={**unset, **set_by_user}, text=True,
                          capture_output=True, timeout=60)
    assert done.stdout.split() == ["False", spins], done.stderr

# ---- Several processes ---------------------------------------------------------------------------
def as_process(run, rank, processes):
    """The run as one of several processes would have it, without starting the others."""
    run.rank = rank
    run.processes = processes
    return run

def test_processes_share_the_rows_of_each_batch(tmp_path):
    """Together they have exactly the rows of the one process, so a run of two processes is the run
    of one. A row that two processes took would count twice, and one that none took not at all.
    The gradients are averaged once, in the last micro-step."""
    settings = {"batch_size": 6, "grad_accum": 3}
    whole = list(tiny_full_run(tmp_path, **settings).batches())
    shared = [list(as_process(tiny_full_run(tmp_path, **settings), rank, 2).batches())
              for rank in (0, 1)]
    for number, (x, y) in enumerate(whole):
        assert x.shape == (6, 8)
        for ours, *halves in ((x, shared[0][number][0], shared[1][number][0]),
                              (y, shared[0][number][1], shared[1][number][1])):
            assert [len(half) for half in halves] == [3, 3]
            assert sorted(ours.tolist()) == sorted(torch.cat(halves).tolist())
    run = as_process(tiny_full_run(tmp_path, **settings), 1, 2)
    synchronized = []
    run.runner.register_forward_hook(
        lambda *_: synchronized.append(run.runner.require_backward_grad_sync))
    run.take_step()
    assert synchronized == [False, False, True]

def test_each_process_draws_dropout_of_its_own(tmp_path):
    """It depends on the seed, the step and the process. With the same numbers in all processes,
    rows in the same place would lose the same channels. The first process draws what a run of one
    process draws."""
    drawn = {}
    for rank, step in itertools.product((0, 1, 2), (0, 1)):
        run = as_process(tiny_full_run(tmp_path), rank, 3)
        run.step = step
        torch.manual_seed(minigpt.derived_seed(run.config.seed, step))
        run.take_step()
        drawn[rank, step] = torch.initial_seed()
    assert len(set(drawn.values())) == 6
    assert drawn[0, 1] == minigpt.derived_seed(run.config.seed, 1)

def test_the_estimate_of_the_first_process_decides(tmp_path, monkeypatch):
    """The processes may compute losses that differ in the last digits. If each went by its own, one
    could see a better model where another does not, and their patience would end at different
    steps: they would wait for each other for ever."""
    others = {"train": 7.0, "val": 8.0}
    monkeypatch.setattr(minigpt, "gather", lambda value: [others, value])
    run = as_process(tiny_full_run(tmp_path, eval_batches=1), 1, 2)
    assert run.estimate() == others

def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path, monkeypatch):
    """With 3 rows and 2 processes, one would have more rows, and the mean of their gradients would
    not be the gradient of the mean."""
    monkeypatch.setattr(minigpt, "join_processes", lambda: 2)
    with pytest.raises(UserError, match="--batch_size 3: must be divisible .* processes, 2"):
        tiny_full_run(tmp_path, batch_size=3)
    assert tiny_full_run(tmp_path, batch_size=4).processes == 2

def test_only_the_first_process_prints_and_writes(tmp_path, monkeypatch, capsys):
    """Two processes that wrote the same files would damage them, and every line would be there
    twice."""
    monkeypatch.setattr(minigpt, "process_rank", lambda: 1)
    run = tiny_full_run(tmp_path)
    minigpt.say("hello")
    minigpt.write_config(run)
    run.journal.say("hello")
    run.journal.record(run, loss=1.0)
    run.save("latest.pt")
    assert capsys.readouterr().err == ""
    assert os.listdir(tmp_path) == []

def test_the_other_processes_wait_for_the_best_model_before_they_read_it(tmp_path, monkeypatch):
    """Only the first process writes best.pt. Here it does so at the moment at which the processes
    wait for each other. Fails if they do not wait, or read the file, or look for it, before."""
    first = tiny_full_run(tmp_path)
    other = as_process(tiny_full_run(tmp_path, model=minigpt.new_model(small_config(), 1)), 1, 2)
    calls = []

    def meet(value):
        calls.append(value)
        first.save("best.pt")
        return [value, value]

    monkeypatch.setattr(minigpt, "gather", meet)
    assert other.score() == minigpt.evaluate(first.model, first.corpus.val)
    assert len(calls) == 1

def run_torchrun(n, *argv, script=HERE / "minigpt.py", wait=True, options=()):
    """n processes on this machine, with one thread each, so that sums are added in one order."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", *options,
               script, *argv]
    process = subprocess.Popen([str(a) for a in command], stderr=subprocess.PIPE, text=True,
                               encoding="utf-8", stdout=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1",
                                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    watchdog = threading.Timer(100, process.terminate)  # in case they wait for each other for ever
    watchdog.daemon = True
    watchdog.start()
    if not wait:
        return process
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err

def workers_of(torchrun):
    """The ids of the processes that it started, in the order of their ranks."""
    workers = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process may have ended
            parent = path.read_text().rpartition(")")[2].split()[1]
            if int(parent) == torchrun.pid:
                workers.append(int(path.parent.name))
    return sorted(workers)

@pytest.mark.slow
def test_a_run_of_two_processes_is_the_run_of_one(tmp_path, no_wandb_account, monkeypatch):
    """The losses and gradients are the same, up to rounding, which grows from step to step. Only
    one process prints and writes. W&B's file is complete, although torchrun's processes do not exit
    as others do. Fails if rows are shared wrongly, or if sums are taken for means."""
    monkeypatch.setenv("WANDB_MODE", "offline" if importable("wandb") else "disabled")
    exact = [*TRAIN, "--dropout", "0", "--max_steps", "40"]
    code, out, err = run_torchrun(2, *exact, "--out_dir", tmp_path / "two")
    assert code == 0 and out == "", err
    assert err.count("full validation split") == 1
    assert "processes: 2" in err and "Traceback" not in err and "warning" not in err.lower()
    if importable("wandb"):
        check_wandb(tmp_path / "two", 0)
    train_tiny(tmp_path / "one", "--no_wandb", *exact)
    one, two = (set(os.listdir(tmp_path / name)) for name in ("one", "two"))
    assert one == two - {"loss.png", "wandb"}
    for a, b in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        for name in {"step", "loss", "grad_norm", "lr", "val_loss", "full_val_loss"} & a.keys():
            near = 1e-4 if a["step"] <= 3 else 1e-2
            assert a[name] == pytest.approx(b[name], rel=near)

@pytest.mark.slow
def test_a_mistake_under_torchrun_shows_a_message(tmp_path):
    """torchrun ends all processes as soon as the first one fails. The message must come out before
    that."""
    for argv, named in ((["--batch_size", "3"], "--batch_size 3: must be divisible"),
                        (["--n_embd", "17"], "--n_embd 17: must be divisible")):
        code, out, err = run_torchrun(2, *TRAIN, *argv, "--out_dir", tmp_path / "out")
        assert code != 0 and out == ""
        assert re.search(f"^error: .*{named}", err, re.M), err
        assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []
    code, out, err = run_torchrun(2, "--mode", "eval", "--out_dir", tmp_path / "out")
    assert code != 0 and out == ""
    assert re.search("^error: --mode eval: runs in one process only", err, re.M), err

@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_processes_that_are_stopped_continue_exactly(tmp_path):
    """With dropout, which differs between the processes. The first signal goes to the second
    process alone: both must agree on the step after which they stop. Later a process is killed,
    and torchrun --max_restarts starts both again, with the same command, which has --resume from
    the beginning. The weights and losses are those of a run that nothing disturbed."""
    argv = [*TRAIN, "--max_steps", "40", "--eval_interval", "5", "--dropout", "0.2", "--resume"]
    assert run_torchrun(2, *argv, "--out_dir", tmp_path / "whole")[0] == 0
    for step, number in ((5, signal.SIGTERM), (22, signal.SIGKILL)):
        options = ["--max_restarts=1"] if number == signal.SIGKILL else []
        process = run_torchrun(2, *argv, "--out_dir", tmp_path / "parts", wait=False,
                               options=options)
        lines = []
        sent = False
        for line in process.stderr:
            lines.append(line)
            if line.startswith(f"step {step}/") and not sent:
                os.kill(workers_of(process)[1], number)
                sent = True
        code = process.wait(60)
        text = "".join(lines)
        assert sent
        if number == signal.SIGTERM:
            assert code != 0 and "\nsaved; to continue, " in text, text
            assert step <= step_of(tmp_path / "parts" / "latest.pt") < 22
    assert code == 0 and len(re.findall("^resuming", text, re.M)) == 2, text
    assert_same_run(tmp_path / "whole" / "latest.pt", tmp_path / "parts" / "latest.pt")
    assert step_losses(tmp_path / "whole") == step_losses(tmp_path / "parts")

# ---- Signals and streams -------------------------------------------------------------------------
STOPPING = [(name, code) for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129))
            if hasattr(signal, name)]

SAVED = f"saved; to continue, {minigpt.AGAIN}"

def before_step(monkeypatch, number, action):
    """Calls action just before the step of that number is computed."""
    steps = itertools.count(1)
    original = minigpt.train_step

    def disturbed(*arguments):
        if next(steps) == number:
            action()
        return original(*arguments)

    monkeypatch.setattr(minigpt, "train_step", disturbed)

@pytest.fixture
def guarded():
    """Installs handlers that only count, so that a signal which the program does not catch does not
    end the tests. Returns their counter, and puts the old handlers back."""
    counter = collections.Counter()
    previous = {}

    def count(number, frame):
        counter[number] += 1

    for name, _ in STOPPING:
        number = getattr(signal, name)
        previous[number] = signal.signal(number, count)
    counter.handler = count
    yield counter
    for number, handler in previous.items():
        signal.signal(number, handler)

@pytest.mark.parametrize("name, expected", STOPPING)
def test_a_signal_ends_the_run_after_its_step(tmp_path, tiny_run, monkeypatch, guarded, capfd, name,
                                              expected):
    """The step is completed and saved, the exit code tells the signal, and the run that continues
    is the run that was never stopped. Fails if the step is lost, or saved and taken again. The
    handlers of the program that called main are back afterwards."""
    number = getattr(signal, name)
    before_step(monkeypatch, 4, lambda: signal.raise_signal(number))
    code, _, err = run_main(*TRAIN, "--out_dir", tmp_path)
    assert code == expected
    assert last_line(err) == SAVED
    assert "a second signal ends the process at once" in capfd.readouterr().err
    assert step_of(tmp_path / "latest.pt") == 4
    assert guarded[number] == 0
    assert signal.getsignal(number) is guarded.handler
    resume_tiny(tmp_path)
    assert_same_run(tmp_path / "latest.pt", tiny_run[0] / "latest.pt")
    assert step_losses(tmp_path) == step_losses(tiny_run[0])

@pytest.mark.parametrize("name, expected", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_during_the_final_evaluation_stops_it(tmp_path, tiny_run, monkeypatch, guarded,
                                                       name, expected):
    """On a large text, that evaluation takes minutes, and all is saved by then: it need not be
    waited for. It can be repeated, with the same result."""
    original = minigpt.evaluate

    def disturbed(*arguments, **named):
        signal.raise_signal(getattr(signal, name))
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(minigpt, "evaluate", disturbed)
        code, _, err = run_main(*TRAIN, "--out_dir", tmp_path)
    assert code == expected
    assert "full validation split" not in err and "stopped evaluating; to repeat" in last_line(err)
    assert step_of(tmp_path / "latest.pt") == 6
    assert score(resume_tiny(tmp_path)) == score(tiny_run[1])
    assert_same_run(tmp_path / "best.pt", tiny_run[0] / "best.pt")

def test_handlers_are_restored_when_a_run_fails(tmp_path, guarded):
    """A program that calls main goes on with its own handlers, whatever became of the run."""
    code, _, err = run_main(*TRAIN, "--out_dir", tmp_path, "--grad_clip", "0", "--learning_rate",
                            "1e30")
    assert code == 2 and "diverged" in err
    for name, _ in STOPPING:
        assert signal.getsignal(getattr(signal, name)) is guarded.handler

@POSIX
def test_after_a_signal_any_other_one_ends_the_process():
    """Ctrl-C and then SIGTERM are two signals as well. Fails if only the first kind is given back
    to the system, so that a run that hangs after Ctrl-C survives a shutdown."""
    # A job in the background of a script may ignore SIGINT from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with minigpt.SignalWatch() as watch:
            watch.handle(signal.SIGINT, None)
            assert watch.received == signal.SIGINT
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)

def test_main_trains_in_a_thread(tmp_path, tiny_run):
    """Python allows signal handlers in the main thread only. Elsewhere, as in a notebook's
    background thread, the run goes on without them instead of failing."""
    results = []
    arguments = [*TRAIN, "--out_dir", tmp_path]
    thread = threading.Thread(target=lambda: results.append(run_main(*arguments)))
    thread.start()
    thread.join(60)
    assert [code for code, _, _ in results] == [0], results
    assert_same_run(tmp_path / "latest.pt", tiny_run[0] / "latest.pt")

@POSIX
def test_a_signal_that_is_ignored_stays_ignored(tmp_path, monkeypatch):
    """nohup starts a program with SIGHUP ignored, so that it survives the end of the terminal. A
    handler of our own would end the run just then."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGHUP))
        train_tiny(tmp_path)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert step_of(tmp_path / "latest.pt") == 6

def last_step(log):
    """The latest step in a status line of a log."""
    steps = re.findall(r"^step (\d+)/", log.read_text() if log.exists() else "", re.M)
    return int(steps[-1]) if steps else 0

def wait_for_step(process, log, step):
    while last_step(log) < step:
        assert process.is_alive(), log.read_text(encoding="utf-8")
        time.sleep(0.01)

@pytest.mark.slow
@POSIX
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_process_at_once(tmp_path, start_main, number, code):
    """In a process of its own. The first signal, in the middle of the run, saves the last completed
    step. In a step that takes hours (here an evaluation of so many batches), a second one must
    not have to wait."""
    log = tmp_path / "log"
    out_dir = tmp_path / "out"
    process = start_main([*TRAIN, "--max_steps", "1000000", "--eval_interval", "1000000",
                          "--out_dir", out_dir], log)
    wait_for_step(process, log, 20)
    os.kill(process.pid, number)
    process.join(60)
    lines = log.read_text(encoding="utf-8").splitlines()
    assert process.exitcode == code
    assert lines[-1] == SAVED
    assert "a second signal ends the process at once" in "".join(lines)
    step = step_of(out_dir / "latest.pt")
    assert step == last_step(log) >= 20
    resume_tiny(out_dir, "--max_steps", step + 1)
    assert [n for n, *_ in step_losses(out_dir)] == [*range(1, step + 2)]
    log = tmp_path / "log_b"
    process = start_main([*TRAIN, "--eval_batches", "100000000", "--out_dir", tmp_path / "b"], log)
    for said in ("\nmodel: ", "stopping as soon"):
        while said not in (log.read_text(encoding="utf-8") if log.exists() else ""):
            assert process.is_alive()
            time.sleep(0.02)
        time.sleep(0.1)
        assert process.is_alive()
        os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == -number

OFTEN = [*TRAIN, "--eval_interval", "1", "--checkpoint_interval", "20", "--sample_tokens", "0",
         "--max_steps", "100000", "--eval_batches", "1", "--resume"]

@pytest.mark.slow
@POSIX
@pytest.mark.parametrize("number, rounds", [(signal.SIGKILL, 12), (signal.SIGTERM, 5)])
def test_a_signal_at_any_moment_costs_no_completed_save(tmp_path, start_main, number, rounds):
    """At random moments of a run that saves two files after each step. Whenever it is killed,
    latest.pt is whole and of the last step whose save was complete; SIGTERM even completes the
    step; and the run that continues is the run that was never stopped. Fails if a checkpoint is
    written in place, or if latest.pt is missing for a moment between its old and its new content.
    metrics.jsonl has each step once, and none is missing."""
    stopped, spared, log, log2 = (tmp_path / name for name in ("stopped", "spared", "log", "log2"))
    moments = random.Random(2)
    for _ in range(rounds):
        begun = last_step(log)
        process = start_main([*OFTEN, "--out_dir", stopped], log)
        wait_for_step(process, log, begun + 2)  # until it trains
        time.sleep(moments.uniform(0, 0.5))
        os.kill(process.pid, number)
        process.join(20)
        assert process.exitcode == (143 if number == signal.SIGTERM else -number)
        # A step is reported only after the save of the one before it.
        step = minigpt.read_checkpoint(stopped / "latest.pt")["step"]
        assert step >= last_step(log) - (number == signal.SIGKILL)
        minigpt.read_checkpoint(stopped / "best.pt")
    snapshot = sorted(stopped.glob("step_*.pt"))[-1].name
    upto = int(snapshot[5:-3])
    recorded = [r["step"] for r in raw_records(stopped) if "loss" in r and r["step"] <= upto]
    assert recorded == [*range(1, upto + 1)]
    process = start_main([*OFTEN, "--out_dir", spared], log2)
    wait_for_step(process, log2, upto + 1)
    process.kill()
    process.join()
    assert_same_run(stopped / snapshot, spared / snapshot)
    assert step_losses(stopped)[:upto] == step_losses(spared)[:upto]

@POSIX
def test_a_run_whose_reader_has_left_saves_and_ends(tmp_path, monkeypatch):
    """As in `train 2>&1 | head`. Nobody sees any more that it trains, so it stops as it does for a
    signal (exit code 128 + 13, for SIGPIPE), but not before the step is saved."""
    reader, writer = os.pipe()
    before_step(monkeypatch, 3, lambda: os.close(reader))
    stream = open(writer, "w", encoding="utf-8")
    try:
        with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(io.StringIO()):
            code = minigpt.main([*TRAIN, "--out_dir", str(tmp_path)])
    finally:
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    assert code == 141
    assert step_of(tmp_path / "latest.pt") == 3
    resume_tiny(tmp_path)
    assert step_of(tmp_path / "latest.pt") == 6

class FullLog(io.StringIO):
    """A log on a disk that fills up when the second step is reported."""
    full = False

    def write(self, text):
        self.full = self.full or text.startswith("step 2/")
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)

def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path):
    """The disk of the log may be full while that of the checkpoints is not. The work is worth more
    than the lines."""
    with contextlib.redirect_stderr(log := FullLog()):
        code = minigpt.main([*TRAIN, "--out_dir", str(tmp_path)])
    assert log.full and code == 0
    assert step_of(tmp_path / "latest.pt") == 6
    assert "full_val_loss" in metrics_of(tmp_path)[-1]

def test_closed_streams_are_no_error(tiny_run, tmp_path, monkeypatch):
    """A daemon may be started with stdout and stderr closed; Python then has None in their place.
    What is printed goes nowhere."""
    closed = io.StringIO()
    closed.close()
    for argv, stream in ((["--mode", "generate", "--max_tokens", "3", "--out_dir", str(tiny_run[0]),
                           "--device", "cpu", "--prompt", "THE"], None),
                         ([*TRAIN, "--max_steps", "1", "--out_dir", str(tmp_path)], None),
                         (["--mode", "eval", "--out_dir", str(tiny_run[0])], closed)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            code = minigpt.main(argv)
        assert code == 0
    assert step_of(tmp_path / "latest.pt") == 1

@pytest.mark.slow
@POSIX
def test_a_process_with_closed_streams_works(tiny_run):
    """The same for the real command, whose first files get the numbers of the closed streams."""
    command = (f"'{sys.executable}' '{HERE / 'minigpt.py'}' --mode generate --max_tokens 3 "
               f"--out_dir '{tiny_run[0]}' --device cpu --prompt THE ")
    for end, expected in ((">&- 2>&-", ""), ("2>&-", "THE")):
        done = subprocess.run(["sh", "-c", command + end], capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout[:3] == expected

def test_a_result_that_cannot_be_written_is_an_error_that_names_stdout(tiny_run, monkeypatch):
    """A full disk behind `generate > file`. The message must not send the user to --out_dir."""
    class Full(io.StringIO):
        def write(self, text=""):
            raise OSError(28, "No space left on device")

        flush = write

    for mode in ("generate", "eval"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Full())
            patch.setattr(sys, "stderr", err := io.StringIO())
            argv = ["--mode", mode, "--out_dir", str(tiny_run[0]), "--device", "cpu"]
            code = minigpt.main(argv)
            patch.setattr(sys, "stderr", Full())
            assert minigpt.main(argv) == 2  # even if nobody can be told
        assert code == 2 and last_line(err.getvalue()) == (
            "error: stdout: No space left on device; send the results to another place")

@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has this file")
def test_a_full_disk_behind_a_stream_is_told_once(tiny_run, tmp_path):
    """For the real command. Python would try to write again when it exits, and end with 120."""
    ready = f"'{sys.executable}' '{HERE / 'minigpt.py'}' --device cpu --out_dir "
    for command, code in ((f"'{tiny_run[0]}' --mode eval >/dev/full", 2),
                          (f"'{tiny_run[0]}' --mode generate --max_tokens 5 >/dev/full", 2),
                          (f"'{tiny_run[0]}' --mode eval 2>/dev/full", 0),
                          (f"'{tiny_run[0]}' --help >/dev/full", 2)):
        done = subprocess.run(["sh", "-c", ready + command], capture_output=True, text=True,
                              timeout=120, env={**os.environ, "PYTHONUNBUFFERED": ""})
        assert done.returncode == code and "Exception" not in done.stderr, done.stderr
        if code:
            assert last_line(done.stderr).startswith("error: stdout: No space left")

def test_a_stream_that_knows_no_terminal_is_none(tiny_run, tmp_path, monkeypatch):
    """Some notebooks and services put objects with `write` alone in the place of a stream."""
    for mode in ("eval", "inspect"):
        out, err = [], []
        with monkeypatch.context() as patch:
            for name, written in (("stdout", out), ("stderr", err)):
                stream = types.SimpleNamespace(write=written.append, flush=lambda: None)
                patch.setattr(sys, name, stream)
            prompt = ["--prompt", "THE"] if mode == "inspect" else []
            code = minigpt.main(["--mode", mode, "--checkpoint", str(tiny_run[0] / "best.pt"),
                                 "--out_dir", str(tmp_path), "--device", "cpu", *prompt])
        assert code == 0 and out and "\033" not in "".join(out + err)

# ---- Checkpoints that may be damaged -------------------------------------------------------------
def test_a_flipped_bit_in_the_content_is_found_wherever_it_is(tmp_path):
    """A bit of every fifth byte of the archive's members, one at a time. Each flip is refused, or
    it is in a place that is not read, such as a date, and changes nothing. Fails if a member is
    read without its checksum."""
    path = tmp_path / "a.pt"
    state = {"format": minigpt.FORMAT, "model_config": {}, "train_config": {"seed": 1},
             "w": random_x(20).float(), "step": 12345}
    minigpt.save_checkpoint(path, state)
    whole = path.read_bytes()
    content = whole.index(b"PK\x01\x02")  # here begins the archive's list of its members
    places = range(0, content, 5)
    bits = random.Random(1)
    refused = 0
    for i in places:
        flipped = bytes([whole[i] ^ (1 << bits.randrange(8))])
        path.write_bytes(whole[:i] + flipped + whole[i + 1 :])
        try:
            assert_same(minigpt.read_checkpoint(path), state)
        except UserError as problem:
            assert "a.pt: " in str(problem)
            refused += 1
    # Most of so small a file is padding, which nothing reads; the numbers of w are 80 bytes.
    assert refused > 60

class Evil:
    """Creates a file when it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")

def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    """The file notes for each tensor on which device it was, here on a GPU that no machine has."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
        minigpt.save_checkpoint(tmp_path / "a.pt", {"w": torch.ones(2)})
    assert_same(load_checkpoint(tmp_path / "a.pt"), {"w": torch.ones(2)})

def test_a_truncated_or_foreign_checkpoint_is_refused(tmp_path):
    """Cut short at any length, or written by another program or version: an error that names the
    file, never a crash. A pickle may hold calls, and weights_only=True refuses to make them."""
    path = tmp_path / "a.pt"
    evil = Evil(tmp_path / "was_here")
    minigpt.save_checkpoint(path, {"format": minigpt.FORMAT, "w": random_x(100).float()})
    whole = path.read_bytes()
    files = [whole[:length] for length in (*range(0, len(whole), 97), len(whole) - 1)]
    files += [b"not a checkpoint", b"\x80\x04.", pickle.dumps({"format": minigpt.FORMAT}),
              b"PK\x03\x04", b"\0" * 1000, pickle.dumps(evil)]
    for state in ({"format": "minigpt-1"}, [1, 2], {}, {"format": evil}, evil):
        file = io.BytesIO()
        torch.save(state, file)
        files.append(file.getvalue())
    for content in files:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pt: "):
            minigpt.read_checkpoint(path)
    assert not evil.path.exists()

def test_a_damaged_checkpoint_is_one_error_that_names_the_cure(tmp_path):
    """Nothing is changed, and the cure works: copy another checkpoint of the run over it. --resume
    also reads what best.pt holds. If it cannot, the records of later steps, which a run that
    continues would take again, are still there."""
    train_tiny(tmp_path, "--checkpoint_interval", "2")
    latest, best = tmp_path / "latest.pt", tmp_path / "best.pt"
    end = load_checkpoint(latest)
    for path in (latest, best):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = bytes([whole[middle] ^ 4])
        for damaged in (whole[:-1000], whole[:middle] + flipped + whole[middle + 1 :]):
            path.write_bytes(damaged)
            before = contents(tmp_path)
            code, out, err = run_main(*RESUME, tmp_path)
            check_mistake(code, out, err, [f"{path}: this file is damaged", "best.pt", "step_*.pt"])
            assert err.count("\n") == 1 or path == best
            assert contents(tmp_path) == before
        shutil.copy(tmp_path / "step_000002.pt", path)
    resume_tiny(tmp_path)
    assert_same(load_checkpoint(latest)["model"], end["model"])

@pytest.mark.parametrize("damage", ["half a file", "a flipped bit"])
def test_a_best_model_that_was_damaged_during_the_run_gets_no_score(tmp_path, monkeypatch, damage):
    """It is damaged after the last step, when nothing will write it again. Half a file could not be
    loaded, and a flipped bit would be worse: the score would be that of another model."""
    best = tmp_path / "best.pt"

    def damage_best(self, run):
        if run.step == 2:
            weights = load_checkpoint(best)["model"]["h.0.mlp.c_fc.weight"]
            whole = bytearray(best.read_bytes())
            if damage == "half a file":
                del whole[len(whole) // 2 :]
            else:
                whole[whole.index(bytes(weights.untyped_storage()))] ^= 4
            best.write_bytes(whole)

    monkeypatch.setattr(minigpt.FullRun, "stop_if_asked", damage_best)
    ended = run_main(*TRAIN, "--out_dir", tmp_path, "--max_steps", "2", "--warmup_steps", "1")
    check_mistake(*ended, [f"{best}: this file is damaged", "latest.pt"])
    assert "full validation split" not in ended[2]

@POSIX
def test_a_disk_that_fills_up_ends_a_run_and_leaves_what_was_saved(tmp_path):
    """A limit on the size of a file stands for the full disk. Not a byte of the checkpoints that
    were complete changes; one error line says why; and when there is space again, the run
    continues. Fails if a checkpoint is written in place, or if a partial file stays."""
    import resource

    train_tiny(tmp_path, "--tokenizer", "bpe", "--bpe_size", "300")
    checkpoints = [tmp_path / "best.pt", tmp_path / "latest.pt"]
    before = [path.read_bytes() for path in checkpoints]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (9_000, len(before[1]) // 2, len(before[1]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            code, _, err = run_main(*RESUME, tmp_path, "--max_steps", "9")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert code == 2 and err.count("error: ") == 1
        assert "too large; correct that" in last_line(err), err
        assert [path.read_bytes() for path in checkpoints] == before
        assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "latest.pt.partial").write_bytes(b"as a crash would leave it")
    resume_tiny(tmp_path, "--max_steps", 9)
    assert step_of(tmp_path / "latest.pt") == 9
    assert not list(tmp_path.glob("*.partial"))

@POSIX
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_disk_that_is_full_costs_no_records_and_no_settings(tmp_path, name):
    """--resume writes metrics.jsonl again, without the steps that it will repeat, and then
    config.json. If one cannot be written, the old file must still be there. Fails if it is written
    in place."""
    import resource

    train_tiny(tmp_path)
    if name == "config.json":
        (tmp_path / "metrics.jsonl").unlink()
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code, _, err = run_main(*RESUME, tmp_path, "--max_steps", "9")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "too large" in last_line(err), err
    assert contents(tmp_path) == before

# ---- What is recorded of a run -------------------------------------------------------------------
def raw_records(out_dir):
    """Every line of metrics.jsonl, in its order."""
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]

def kinds_and_steps(out_dir):
    """What each line of metrics.jsonl is about: the names in it, and the step."""
    return [(*record, record["step"]) for record in raw_records(out_dir)]

class Killed(BaseException):
    """Ends a run without giving it a chance to save, as a power cut would."""

def kill():
    raise Killed

def test_metrics_have_each_step_once_after_a_crash(tmp_path, tiny_run, monkeypatch):
    """The run is killed in step 6, after steps 4 (saved) and 5 (recorded, not saved). The one that
    continues takes step 5 again, and must not record it twice. What it records is what the run
    without a crash recorded."""
    with monkeypatch.context() as patch:
        before_step(patch, 6, kill)
        with pytest.raises(Killed):
            run_main(*TRAIN, "--checkpoint_interval", "2", "--out_dir", tmp_path)
    assert [r["step"] for r in raw_records(tmp_path) if "loss" in r] == [1, 2, 3, 4, 5]
    assert step_of(tmp_path / "latest.pt") == 4
    resume_tiny(tmp_path)
    assert kinds_and_steps(tmp_path) == kinds_and_steps(tiny_run[0])
    assert step_losses(tmp_path) == step_losses(tiny_run[0])

def test_metrics_have_each_step_once_when_the_first_save_failed(tmp_path, tiny_run, monkeypatch):
    """The run ends before it has saved anything, but its first evaluation is recorded. With
    --resume, a new run begins in that folder, and evaluates again."""
    with monkeypatch.context() as patch:
        patch.setattr(minigpt, "save_checkpoint", lambda path, state: kill())
        with pytest.raises(Killed):
            run_main(*TRAIN, "--out_dir", tmp_path)
    assert (tmp_path / "metrics.jsonl").exists()
    train_tiny(tmp_path, "--resume", "--checkpoint_interval", "2")
    assert kinds_and_steps(tmp_path) == kinds_and_steps(tiny_run[0])

@pytest.mark.parametrize("garbage", [
    b'{"step": 9, "lo\n', b'\xff\xfe\x80\n5\n{"a": 1}\n{"step": "x"}\n' + b"\0" * 99 + b"\n",
    b'{"step": 1, "loss": "high", "val_loss": {}}\n{"step": 2, "val_loss": NaN, "new": 1}\n'])
def test_damaged_or_unknown_metrics_stop_neither_a_resume_nor_the_plot(tmp_path, garbage, pictures):
    """A crash may leave half a line, and another version may have written other names. They are
    passed over. Of two records of a step, the later one counts."""
    train_tiny(tmp_path, "--max_steps", "3", "--checkpoint_interval", "2")
    shutil.copy(tmp_path / "step_000002.pt", tmp_path / "latest.pt")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(garbage)
    (tmp_path / "loss.png").unlink(missing_ok=True)
    resume_tiny(tmp_path, "--max_steps", 4)
    assert list(minigpt.read_curve(tmp_path, "grad_norm")) == [1, 2, 3, 4]
    if importable("matplotlib"):
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "grad_norm": 7.0}\n')
    assert minigpt.read_curve(tmp_path, "grad_norm")[2] == 7

def test_without_matplotlib_one_line_says_what_to_install(tmp_path, pictures, monkeypatch):
    """The curves are a convenience. A run must not fail at its end because of them."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = train_tiny(tmp_path, "--max_steps", "1")
    assert "no loss.png: pip install matplotlib" in said
    assert "trained to step 1" in last_line(said)

def test_metrics_are_strict_json(tmp_path):
    """JSON has no infinity and no NaN, and strict readers refuse a file that has them. An infinite
    gradient norm becomes null. A loss that is no number ends the run and is not recorded."""
    run = tiny_full_run(tmp_path)
    run.step = 1
    run.journal.record(run, grad_norm=math.inf)
    for bad in (math.nan, math.inf):
        with pytest.raises(minigpt.Diverged, match="diverged at step 1"):
            run.journal.report_evaluation(run, {"train": 1.0, "val": bad}, better=True)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "grad_norm": null}\n'

def test_a_picture_that_cannot_be_drawn_costs_no_result(tmp_path, tiny_run, pictures, monkeypatch):
    """Its file cannot be written, or the library refuses its own settings. The run has its result,
    and one line says what is missing."""
    pytest.importorskip("matplotlib")
    assert "no loss.png" not in train_tiny(tmp_path / "b", "--max_steps", "1")
    curves = {"loss": (tiny_run[0], "loss")}
    minigpt.draw_curves(tmp_path / "a.png", curves, "loss")
    assert (tmp_path / "a.png").exists()
    shutil.copytree(tiny_run[0], tmp_path / "c")
    (tmp_path / "c" / "loss.png").unlink()
    (tmp_path / "c" / "loss.png").mkdir()
    said = resume_tiny(tmp_path / "c")
    assert re.search(r"no loss.png \((IsADirectory|Permission)Error: ", said)
    assert "trained to step 6" in last_line(said)

    class Refused(types.ModuleType):
        def __getattr__(self, name):
            raise problem

    monkeypatch.setitem(sys.modules, "matplotlib.figure", Refused("matplotlib.figure"))
    for problem in (ValueError("backend: 'x' is not valid"), ImportError("no numpy", name="numpy")):
        said = train_tiny(tmp_path / type(problem).__name__, "--max_steps", "1")
        assert f"no loss.png ({type(problem).__name__}: " in said and "pip install" not in said
        assert "trained to step 1" in last_line(said)

@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    """A user who is not logged in to Weights & Biases, whatever this machine knows."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))

class FakeWandb(types.ModuleType):
    """Stands for the package: it notes what is called, and fails where it is told to."""
    Settings = dict
    id = "abc123"

    def __init__(self, failing="", account=False):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)  # it counts as installed
        self.failing = failing
        self.account = account
        self.calls = []

    def login(self, prompt, verify):
        assert not prompt and not verify  # it must not wait for an answer
        return self.account or "WANDB_API_KEY" in os.environ

    def note(self, name, value=None):
        self.calls.append((name, value))
        if name == self.failing:
            raise RuntimeError("no network")

    def init(self, **settings):
        self.note("init", settings)
        return self

    def log(self, numbers, step):
        assert numbers["step"] == step
        self.note("log", numbers)

    def finish(self, exit_code):
        self.note("finish", exit_code)

@pytest.mark.parametrize("variables, flags, account, wanted", [
    ({}, [], False, False), ({"WANDB_API_KEY": "x"}, ["--no_wandb"], True, False),
    ({"WANDB_API_KEY": "x"}, [], False, True), ({"WANDB_MODE": "offline"}, [], False, True),
    ({}, [], True, True)])
def test_wandb_gets_the_records_of_a_run_where_it_is_wanted(tmp_path, no_wandb_account, monkeypatch,
                                                            variables, flags, account, wanted):
    """With any login that the package knows. Without one, it would ask a question and wait, so one
    line says what to do. It gets the numbers of metrics.jsonl and all settings, and is told the
    end, which completes its log."""
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(account=account))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = train_tiny(tmp_path / "out", "--max_steps", "2", *flags)
    assert ("not logged in: run `wandb login`" in said) == (not wanted and not flags)
    if not wanted:
        assert fake.calls == []
        return
    name, settings = fake.calls[0]
    assert name == "init" and settings["reinit"] == "create_new"
    assert settings["config"]["max_steps"] == 2 and settings["config"]["n_embd"] == 16
    n_characters = len(set(SHORT.read_text(encoding="utf-8")))
    assert settings["config"]["vocab_size"] == n_characters  # of the model, and not --bpe_size
    logged = [value for name, value in fake.calls if name == "log"]
    assert logged == raw_records(tmp_path / "out")
    assert [name for name, _ in fake.calls].count("finish") == 1
    assert fake.calls[-1] == ("finish", 0)

def test_wandb_is_told_how_a_run_was_stopped_or_failed(tmp_path, no_wandb_account, monkeypatch,
                                                       guarded):
    """By the exit code, so that it is not taken for a complete run. Otherwise its process would
    stay, and its log would be incomplete."""
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(account=True))
    diverging = ["--grad_clip", "0", "--learning_rate", "1e30"]
    assert run_main(*TRAIN, "--out_dir", tmp_path / "failed", *diverging)[0] == 2
    assert fake.calls[-1] == ("finish", 1)
    before_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    assert run_main(*TRAIN, "--out_dir", tmp_path / "stopped")[0] == 143
    assert fake.calls[-1] == ("finish", 143)

def test_a_resumed_run_goes_on_with_its_run_at_wandb(tmp_path, no_wandb_account, monkeypatch):
    """Otherwise each --resume would begin a curve of its own."""
    monkeypatch.setenv("WANDB_API_KEY", "x")
    ids = []
    for argv in ([*TRAIN, "--max_steps", "2"], [*RESUME[:3], "--max_steps", "3"]):
        monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
        succeed(*argv, "--out_dir", tmp_path / "out")
        ids.append(fake.calls[0][1]["id"])
        assert fake.calls[0][1]["resume"] == "allow"
    assert ids == [None, "abc123"]

def test_without_the_package_nothing_is_said_of_wandb(tmp_path, no_wandb_account, monkeypatch):
    """Most readers do not know it. Who has set its variables is told that it is missing."""
    hide_package(monkeypatch, "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "Weights" not in train_tiny(tmp_path / "a", "--max_steps", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "no Weights & Biases (ModuleNotFoundError)" in train_tiny(tmp_path / "b", "--max_steps",
                                                                     "1")

@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failure_of_wandb_costs_no_training(tmp_path, tiny_run, no_wandb_account, monkeypatch,
                                              failing):
    """It depends on a network and on a server. The run goes on without it."""
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(failing))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    said = train_tiny(tmp_path / "out")
    assert failing in [name for name, _ in fake.calls]
    assert ("no Weights & Biases (RuntimeError)" in said) == (failing == "init")
    assert_same_run(tmp_path / "out" / "latest.pt", tiny_run[0] / "latest.pt")

def wandb_records(folder):
    """The records of the one file that the package has written: LevelDB's format of logs, in blocks
    of 32 KB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left_in_block = 32768 - at % 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):
            return  # the rest is still being written
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record

def check_wandb(folder, exit_code):
    """All steps that were recorded are in W&B's file, and so is the exit code. The process of W&B
    may write them a moment after the run has ended."""
    for _ in range(100):
        records = list(wandb_records(folder))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.2)
    logged = [json.loads(item.value_json) for record in records for item in record.history.item
              if "_step" in (item.key, *item.nested_key)]
    assert logged == sorted({r["step"] for r in metrics_of(folder)})
    exits = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    assert exits == [exit_code]

@pytest.mark.slow
def test_the_real_wandb_logs_offline(tmp_path, no_wandb_account, monkeypatch):
    """With the real package, offline, the records of a run are on disk when it ends, also if it is
    stopped. Without an account, or with --no_wandb, there is nothing. The training is the same."""
    pytest.importorskip("wandb")
    for name, flags in (("quiet", []), ("off", ["--no_wandb"]), ("on", [])):
        if name != "quiet":
            monkeypatch.setenv("WANDB_MODE", "offline")
        train_tiny(tmp_path / name, "--max_steps", "2", *flags)
        files = list((tmp_path / name).glob("wandb/offline-run-*/*.wandb"))
        assert len(files) == (1 if name == "on" else 0)
    assert b"tokens_per_second" in files[0].read_bytes()
    check_wandb(tmp_path / "on", 0)
    assert_same_run(tmp_path / "on" / "latest.pt", tmp_path / "off" / "latest.pt")
    before_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    assert run_main(*TRAIN, "--out_dir", tmp_path / "stopped")[0] == 143
    check_wandb(tmp_path / "stopped", 143)

# ---- The corpus ----------------------------------------------------------------------------------
def test_a_corpus_is_its_text(tmp_path):
    """Without the mark that Windows adds, and with line breaks of one kind, so that the same text
    has the same checksum everywhere. A file in another encoding is refused."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffà\r\nb".encode())
    source = minigpt.read_corpus(path)
    assert (source.path, source.text) == (path, "à\nb")
    assert source.sha256 == hashlib.sha256("à\nb".encode()).hexdigest()
    path.write_bytes("\ufeffé\n\n".encode() + b"caf\xe9\n")
    with pytest.raises(UserError, match="--data .*a.txt: line 3 is not UTF-8 text .byte 0xe9.;"):
        minigpt.read_corpus(path)

def source_text(text):
    return minigpt.SourceText(Path("a.txt"), text, "")

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_corpus_is_cut_at_nine_tenths_of_its_characters(kind):
    """For every tokenizer, so that their scores are on the same text. A token takes two bytes. BPE
    learns nothing from the last tenth, which would be cheating."""
    text = SHORT.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    config = RunConfig(tokenizer=kind, bpe_size=300)
    tokenizer = minigpt.make_tokenizer(config, text)
    corpus = minigpt.encode_corpus(source_text(text), tokenizer, 16)
    assert corpus.train.tolist() == tokenizer.encode(text[:cut])
    assert corpus.val.tolist() == tokenizer.encode(text[cut:])
    assert corpus.val_characters == len(text) - cut
    assert corpus.train.element_size() == (2 if kind == "bpe" else 1)
    if kind == "bpe":
        other_end = text[:cut] + "qxqx" * 300
        again = minigpt.make_tokenizer(config, text[:cut] + other_end[cut : len(text)])
        assert tokenizer.state == again.state == BPETokenizer.train(text[:cut], 300).state

def test_a_text_must_be_longer_than_a_window():
    """A window of 16 tokens needs 17, with the last target, in both parts. Of 170 characters, 17
    are for validation."""
    text = source_text("a" * 170)
    minigpt.encode_corpus(text, CharTokenizer("a"), 16)
    with pytest.raises(UserError, match="--data a.txt: .*--block_size 17, but has 17; use a"):
        minigpt.encode_corpus(text, CharTokenizer("a"), 17)

@pytest.mark.parametrize("text, doubt", [
    (SAMPLE.read_text(encoding="utf-8"), None), (SOURCE, None),
    ("01" * 30 + "0110" * 900, None), (SAMPLE.read_text(encoding="utf-8")[5000:5800], None),
    ("the same line\n" * 500, "blank or repeats"),
    (SHORT.read_text(encoding="utf-8") + " \n" * 5000, "blank or repeats"),
    (SHORT.read_text(encoding="utf-8").encode("utf-16-le").decode("utf-8", "replace"), "NUL")])
def test_what_is_odd_about_a_text_is_told(text, doubt):
    """One line again and again, a blank end, UTF-16: in each case, the loss on the validation part
    shows something else than expected. Verse, also a few lines of it, a program, and a text of two
    characters are nothing odd."""
    doubts = minigpt.doubts_about(text)
    assert len(doubts) == (doubt is not None) and all(doubt in found for found in doubts), doubts

def test_doubts_are_told_when_a_run_begins(tmp_path):
    """Once, and the run goes on."""
    text = tmp_path / "same.txt"
    text.write_text("the same line\n" * 100)
    said = train_tiny(tmp_path / "out", "--data", text, "--max_steps", "2")
    assert said.count("warning: about this text: ") == 1 and "repeats lines" in said
    assert "warning" not in resume_tiny(tmp_path / "out")

@pytest.mark.parametrize("content, why", [
    (b"", "0 of"), (b"<html>", "web page"), (SAMPLE.read_bytes(), "truncated or another file")])
def test_another_file_in_the_place_of_the_corpus_is_refused(tmp_path, monkeypatch, content, why):
    """An error page or half a download under the name of data/input.txt would be trained on for an
    hour before anyone looks at the samples."""
    monkeypatch.setattr(minigpt, "PROGRAM", tmp_path / "minigpt.py")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input.txt").write_bytes(content)
    argv = [word for word in TRAIN if word not in ("--data", str(SHORT))]
    named = ["input.txt", "not Tiny Shakespeare", why, "download_data.py", "--data"]
    check_mistake(*run_main(*argv, "--out_dir", tmp_path / "out"), named)

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_large_text_is_encoded_in_pieces_to_the_same_corpus(monkeypatch, kind):
    """Only its memory is another. Fails if a piece is lost, or cut within a word."""
    text = source_text(SAMPLE.read_text(encoding="utf-8")[:50_000] + "<|endoftext|>end")
    tokenizer = minigpt.make_tokenizer(RunConfig(tokenizer=kind, bpe_size=300), text.text)
    shares = []
    monkeypatch.setattr(minigpt, "in_pieces", functools.partial(minigpt.in_pieces, size=999))
    monkeypatch.setattr(minigpt, "progress_of", lambda what: shares.append)
    corpus = minigpt.encode_text(text, tokenizer)
    expected = Corpus.from_text(text.text, tokenizer)
    for name in ("train", "val"):
        ours, theirs = getattr(corpus, name), getattr(expected, name)
        assert ours.tolist() == theirs.tolist() and ours.element_size() <= 2
    assert corpus.val_characters == expected.val_characters
    assert len(shares) > 40 and shares.count(1) == 2  # each part to its end

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from Linux")
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_large_text_takes_little_memory(tmp_path, kind):
    """Reading and encoding 40 MB, and all that is asked about them before a run begins, takes at
    most 2.5 times their size, tokens included."""
    path = tmp_path / "large.txt"
    text = SAMPLE.read_text(encoding="ascii") * 160
    path.write_text(text)
    script = tmp_path / "encode.py"
    script.write_text(f"""\
import resource, minigpt
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
config = minigpt.RunConfig(tokenizer={kind!r}, bpe_size=300)
tokenizer = minigpt.make_tokenizer(config, {text[:250_000]!r})
minigpt.word_pattern()
before = peak()
text = minigpt.read_corpus({str(path)!r})
corpus = minigpt.encode_text(text, tokenizer)
minigpt.doubts_about(text.text)
print((peak() - before) / {len(text)}, len(corpus.train))
""")
    done = run_command(script=script)
    share, n = map(float, done.stdout.split())
    assert share < 2.5 and n > 7_000_000

# ---- The downloader, against a server on this machine --------------------------------------------
BODY = b"First Citizen:\n" + bytes(range(32, 127)) * 2000  # stands for the corpus: see `server`

class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path: good, truncated, altered, html, long, missing, slow or flaky."""

    hits = collections.Counter()

    def do_GET(self):
        kind = self.path.strip("/")
        self.hits[kind] += 1
        if kind == "missing":
            return self.send_error(404)
        if kind == "flaky" and self.hits[kind] == 1:
            return self.send_error(503)
        if kind == "slow":
            time.sleep(1)
        bodies = {"altered": BODY[:-1] + b"!", "html": b"<html>sign in</html>", "long": BODY * 2}
        body = bodies.get(kind, BODY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have left
            self.wfile.write(body[: len(body) // 2] if kind == "truncated" else body)

    def log_message(self, *args):
        pass

@pytest.fixture
def server(monkeypatch):
    """A real HTTP server on this machine. The checksum is replaced by that of the body it
    serves."""
    monkeypatch.setattr(download_data, "SIZE", len(BODY))
    monkeypatch.setattr(download_data, "SHA256", hashlib.sha256(BODY).hexdigest())
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    Handler.hits.clear()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()

@pytest.mark.parametrize("kind, why, hits", [
    ("truncated", "broke off", 2), ("altered", "altered", 1), ("html", "a web page", 1),
    ("long", "more than", 1), ("missing", "HTTP status 404", 1), ("slow", "no answer in time", 1)])
def test_a_bad_answer_leaves_the_file_alone(server, tmp_path, kind, why, hits):
    """Each ends in an error that says why. Only what may pass is tried again, and the old file
    stays byte for byte. Fails if the file is written before it is checked."""
    target = tmp_path / "input.txt"
    target.write_bytes(b"old")
    with pytest.raises(download_data.DownloadError, match=why):
        download_data.download(target, [f"{server}/{kind}"], 30, 0.01, (5.0, 0.3))
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["input.txt"]
    assert Handler.hits[kind] == hits

def test_a_download_ends_at_its_deadline(server, tmp_path):
    """A server that sends slowly, but never pauses, would otherwise hold the program for hours."""
    with pytest.raises(download_data.DownloadError, match="no answer in time"):
        download_data.download(tmp_path / "input.txt", [f"{server}/good"], seconds=0.0)
    assert os.listdir(tmp_path) == [] and Handler.hits["good"] == 1

def test_mirrors_are_tried_in_turn(server, tmp_path, capsys):
    """A dead one, a missing one, one that recovers: the corpus arrives from the third, also in a
    folder that does not exist yet. If none delivers, the error says why for each of them."""
    target = tmp_path / "data" / "input.txt"
    dead = "http://127.0.0.1:9/dead"
    download_data.download(target, [dead, f"{server}/missing", f"{server}/flaky"], pause=0.01)
    assert target.read_bytes() == BODY
    assert os.listdir(target.parent) == ["input.txt"]
    assert "no connection" in capsys.readouterr().err
    assert Handler.hits == {"missing": 1, "flaky": 2}
    with pytest.raises(download_data.DownloadError, match="no connection.*404"):
        download_data.download(target, [dead, f"{server}/missing"], pause=0.01)
    assert target.read_bytes() == BODY

def test_the_corpus_is_known_by_its_size_and_checksum():
    """Stated here a second time, so that a slip in either place shows."""
    assert download_data.SIZE == 1_115_394
    assert download_data.SHA256 == \
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    """A folder stands where the file should go, so it cannot be put there. No partial file
    stays."""
    (tmp_path / "input.txt" / "old").mkdir(parents=True)
    with pytest.raises(OSError):
        download_data.put_in_place(b"new", tmp_path / "input.txt")
    assert os.listdir(tmp_path) == ["input.txt"]

def test_a_corpus_that_is_there_is_not_downloaded_again(server, tmp_path, monkeypatch, capsys):
    """Otherwise the command would fail without a network, although nothing is missing."""
    monkeypatch.setattr(download_data, "DESTINATION", tmp_path / "input.txt")
    monkeypatch.setattr(download_data, "MIRRORS", [f"{server}/good"])
    assert download_data.main([]) == 0 and Handler.hits["good"] == 1
    assert download_data.main([]) == 0 and Handler.hits["good"] == 1
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "input.txt").write_bytes(b"half")
    assert download_data.main([]) == 0 and Handler.hits["good"] == 2

def test_the_import_of_a_copy_has_the_same_checks(server, tmp_path, monkeypatch):
    """From a file or an address. A wrong copy, a missing one, a folder, an address that is none and
    a file without an end are refused, and each error names its source."""
    monkeypatch.setattr(download_data.time, "sleep", lambda seconds: None)
    copy = tmp_path / "copy.txt"
    target = tmp_path / "input.txt"
    copy.write_bytes(BODY)
    for source in (str(copy), f"{server}/good"):
        download_data.import_copy(source, target)
        assert target.read_bytes() == BODY
        target.write_bytes(b"old")
    copy.write_bytes(BODY[:-1])
    wrong = [str(copy), str(tmp_path / "none.txt"), str(tmp_path), "http://[::1"]
    if os.path.exists("/dev/zero"):
        wrong.append("/dev/zero")
    for source in wrong:
        with pytest.raises(download_data.DownloadError, match=re.escape(source[-4:])):
            download_data.import_copy(source, target)
    assert target.read_bytes() == b"old"

def test_training_downloads_the_corpus_when_it_is_missing(server, tmp_path, monkeypatch):
    """If that fails, it takes the sample, with a warning that cannot be overlooked. If the corpus
    is there, it is used without asking again."""
    monkeypatch.setattr(minigpt, "PROGRAM", tmp_path / "minigpt.py")
    monkeypatch.setattr(download_data, "MIRRORS", [f"{server}/missing"])
    sample = tmp_path / "data" / "sample.txt"
    sample.parent.mkdir()
    sample.write_text("THE")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        source = minigpt.read_corpus("")
    assert (source.path, source.text) == (sample, "THE")
    assert "could not be downloaded" in said.getvalue() and "--data" in said.getvalue()
    monkeypatch.setattr(download_data, "MIRRORS", [f"{server}/good"])
    for _ in range(2):
        source = minigpt.read_corpus("")
        assert source.path == tmp_path / "data" / "input.txt"
        assert source.path.read_bytes() == BODY
    assert Handler.hits["good"] == 1

def test_a_corpus_that_cannot_be_written_is_no_fault_of_the_network(tmp_path, monkeypatch, server,
                                                                    capsys):
    """In a checkout on a read-only disk, the download succeeds and its file cannot be written. To
    connect to the network would not help; --data would."""
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system", "a temporary name")

    monkeypatch.setattr(download_data.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(download_data, "MIRRORS", [f"{server}/good"])
    monkeypatch.setattr(download_data, "DESTINATION", tmp_path / "input.txt")
    assert download_data.find(tmp_path / "input.txt") == tmp_path / "sample.txt"
    assert download_data.main([]) == 2
    for said in capsys.readouterr().err.split(f"downloading {server}/good")[1:]:
        assert f"{tmp_path / 'input.txt'}" in said and "Read-only file system" in said
        assert "connect" not in said and "not be downloaded" not in said

# ---- Whole runs, through the real entry point ----------------------------------------------------
@pytest.mark.parametrize("name", minigpt.PRESETS)
def test_every_preset_trains_and_writes(tmp_path, name):
    """One real step of each. Those that are too large for a test are made smaller; their other
    settings must arrive in the run. Fails if two settings of a preset do not fit together."""
    small = {"max_steps": 1, "eval_batches": 1, "batch_size": 2}
    if name in ("gpt", "gpt2", "modern"):
        small |= {"n_layer": 1, "n_embd": 96, "block_size": 64}
    if name == "gpt2":
        small["tokenizer"] = "char"  # its own would have to be fetched
    flags = [f"--{setting}={value}" for setting, value in small.items()]
    err = succeed("--mode", "train", "--preset", name, "--data", SHORT, "--out_dir", tmp_path,
                  "--sample_tokens", "3", *flags)
    assert f"preset {name} (as asked)" in err
    state = load_checkpoint(tmp_path / "latest.pt")
    preset = minigpt.PRESETS[name]
    for stored, wanted in ((state["model_config"], preset.model),
                           (state["train_config"], preset.training)):
        for setting, value in wanted.items():
            assert stored[setting] == small.get(setting, value)
    code, out, err = run_main("--mode", "generate", "--out_dir", tmp_path, "--max_tokens", "5",
                              "--prompt", "THE")
    assert code == 0 and out.startswith("THE"), err

SMALL_TEXT = ["--mode", "train", "--preset", "bigram", "--data", str(SHORT), "--batch_size", "4",
              "--eval_batches", "1", "--sample_tokens", "0", "--no_wandb"]

@pytest.mark.parametrize("typed, steps", [
    ([], 253), (["--max_steps", "254"], 254)])
def test_a_run_on_a_small_text_ends_with_its_schedule_complete(tmp_path, typed, steps):
    """After six passes over the text, so that the model does not memorize it: 6 * 10,800 // (4 *
    64) = 253 steps. The learning rate ends at its floor. Steps that were typed are not changed.
    Fails if the run is cut off in the middle of its schedule."""
    assert int(0.9 * len(SHORT.read_text(encoding="utf-8"))) == 10_800
    succeed(*SMALL_TEXT, "--out_dir", tmp_path, *typed)
    state = load_checkpoint(tmp_path / "latest.pt")
    assert state["train_config"]["max_steps"] == state["step"] == steps
    config = RunConfig(**state["train_config"])
    last = [r["lr"] for r in metrics_of(tmp_path) if "lr" in r][-1]
    assert last == get_lr(steps - 1, config) < 1.01 * config.min_lr

def limited(typed=None, dropout=0.0, **settings):
    """The settings of a run on 1,000 tokens, with 80 tokens in a step: 75 steps are six passes."""
    config = RunConfig(batch_size=2, grad_accum=5, **settings)
    corpus = Corpus(torch.zeros(1000), torch.zeros(100), 100)
    sizes = small_config(dropout=dropout)
    return minigpt.limit_steps(config, sizes, corpus, settings if typed is None else typed)

def test_a_warm_up_that_is_longer_than_a_small_text_allows_is_shortened():
    """100 steps of warm-up, as by default, would not end in 75 steps, and the rate would never
    reach its peak nor its floor. A warm-up that was typed is left alone, and so are the steps
    with dropout, which keeps a model from memorizing."""
    config = limited(typed={})
    assert (config.max_steps, config.warmup_steps) == (75, 18)
    rates = [get_lr(step, config) for step in range(76)]
    assert max(rates) == pytest.approx(config.learning_rate)
    assert rates[-1] == config.min_lr
    assert limited(typed={}, warmup_steps=7).warmup_steps == 7
    assert limited(warmup_steps=70).warmup_steps == 70
    assert limited(max_steps=2000).max_steps == 2000
    assert limited(typed={}, dropout=0.1).max_steps == RunConfig.max_steps
    assert limited(typed={}, max_steps=74, warmup_steps=60).warmup_steps == 60

def test_bpe_run_evaluates_and_writes(tmp_path):
    """The tokenizer travels in the checkpoint. Bits per character count characters, not tokens, and
    the prompt may hold characters that the corpus does not have."""
    train_tiny(tmp_path, "--tokenizer", "bpe", "--bpe_size", "300")
    _, out, _ = run_main("--mode", "eval", "--out_dir", tmp_path)
    tokens, nats, bits = (float(re.search(rf"([\d.,]+) {unit}", out)[1].replace(",", ""))
                          for unit in ("tokens", "nats", "bits"))
    text = SHORT.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    assert tokens < 0.8 * (len(text) - cut)
    assert bits == pytest.approx(nats / math.log(2) * (tokens + 1) / (len(text) - cut), rel=1e-3)
    code, out, _ = run_main("--mode", "generate", "--out_dir", tmp_path, "--prompt", "Ünïcødé")
    assert code == 0 and out.startswith("Ünïcødé")

def test_a_run_writes_what_it_promises(tiny_run):
    """Checkpoints that are named after completed steps, metrics, and the settings. Nothing else."""
    folder, err = tiny_run
    assert {path.name for path in folder.iterdir()} - {"loss.png"} == {
        "best.pt", "latest.pt", "step_000002.pt", "step_000004.pt", "step_000006.pt",
        "metrics.jsonl", "config.json"}
    for name, step in (("latest", 6), ("step_000002", 2), ("step_000004", 4)):
        assert step_of(folder / f"{name}.pt") == step
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["training"]["max_steps"] == 6 and config["model"]["n_embd"] == 16
    assert [step for step, *_ in step_losses(folder)] == [1, 2, 3, 4, 5, 6]
    assert evaluated(folder) == [0, 3, 6]
    assert "full_val_loss" in metrics_of(folder)[-1]
    assert err.count("    | ") >= 3  # a sample at each evaluation
    assert set(load_checkpoint(folder / "best.pt")) == {
        "format", "model", "optimizer", "step", "best_val", "best_step", "tokenizer",
        "model_config", "train_config", "seconds", "corpus", "teachers", "scaler", "wandb",
        "torch"}

def test_what_a_run_says_of_itself_is_right(tiny_run):
    """The number of tokens and of parameters, the best step, and the units of the score."""
    folder, err = tiny_run
    text = SHORT.read_text(encoding="utf-8")
    state = load_checkpoint(folder / "best.pt")
    cut = int(0.9 * len(text))
    assert f"{cut:,} training and {len(text) - cut:,} validation tokens" in err
    model, tokenizer = model_of(folder / "latest.pt")
    n = sum(p.numel() for p in model.parameters())
    assert f"model: {n:,} parameters; cpu, float32, 1 threads, processes: 1" in err
    assert f"vocabulary {tokenizer.vocab_size}\n" in err
    assert tokenizer.vocab_size == len(set(text))
    said = f"best model (step {state['step']}): {folder / 'best.pt'}"
    assert last_line(err).startswith("trained to step 6 in ") and said in last_line(err)
    assert metrics_of(folder)[-1]["best_step"] == state["step"] == state["best_step"]
    nats, perplexity, bits = map(float, re.search(
        r": ([\d.]+) nats per token, perplexity ([\d.]+), ([\d.]+) bits", score(err)).groups())
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
    assert bits == pytest.approx(nats / math.log(2), rel=1e-3)  # a token is a character here

def clock_of_steps(monkeypatch):
    """A clock that moves only half a second in each step, and 100 seconds in each evaluation."""
    now = [0.0]

    def taking(seconds, function):
        def slow(*arguments):
            result = function(*arguments)
            now[0] += seconds
            return result
        return slow

    monkeypatch.setattr(minigpt.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(minigpt, "train_step", taking(0.5, minigpt.train_step))
    monkeypatch.setattr(minigpt, "estimate_loss", taking(100.0, minigpt.estimate_loss))

def test_rates_and_times_are_those_of_the_clock(tmp_path, monkeypatch):
    """The rate is that of training alone, also where a report spans several steps or comes after an
    evaluation. The time is that of everything, also over a resume. The time that is left follows
    from what the run took so far."""
    clock_of_steps(monkeypatch)
    err = train_tiny(tmp_path, "--log_interval", "2", "--max_steps", "4", "--eval_interval", "1")
    rates = [r["tokens_per_second"] for r in metrics_of(tmp_path) if "loss" in r]
    assert rates == [4 * 2 * 16 * 2] * 2  # 4 * 2 windows of 16 tokens a step, two steps a second
    # After two steps and the evaluations of steps 0 and 1, half of the run is done.
    assert "step 2/4" in err and "| 256 tokens/s | 0:03:21 left" in err
    assert "to step 4 in 0:08:22;" in err
    assert metrics_of(tmp_path)[-1]["seconds"] == 502.0
    err = resume_tiny(tmp_path, "--max_steps", "6", "--eval_interval", "6")
    assert "to step 6 in 0:10:03;" in err and "| 256 tokens/s | 0:00:00 left" in err

def test_the_rate_counts_the_tokens_of_short_windows(tmp_path, monkeypatch):
    """In the first half of these steps, 3 windows of 5 tokens stand for one of 16, so a step has
    2 * 4 * 3 * 5 = 120 tokens and not 128."""
    clock_of_steps(monkeypatch)
    train_tiny(tmp_path, "--short_block", "6", "--short_share", "0.5")
    rates = [r["tokens_per_second"] for r in metrics_of(tmp_path) if "loss" in r]
    assert rates == [240, 240, 240, 256, 256, 256]

def test_the_score_is_that_of_the_best_model(tiny_run):
    """The same from the run, from --mode eval and from evaluate, and it is recorded."""
    folder, err = tiny_run
    code, out, _ = run_main("--mode", "eval", "--out_dir", folder)
    assert code == 0 and out.strip() == score(err)
    model, tokenizer = model_of(folder / "best.pt")
    corpus = Corpus.from_text(SHORT.read_text(encoding="utf-8"), tokenizer)
    nats = minigpt.evaluate(model, corpus.val)
    assert f"{nats:.4f} nats" in out
    assert metrics_of(folder)[-1]["full_val_loss"] == pytest.approx(nats, rel=1e-6)

def test_a_checkpoint_remembers_its_corpus(tmp_path, monkeypatch):
    """It was named by a relative path, and is found from another folder. Another text, which the
    model was not trained on, is scored whole, and the line says so. Would fail if nine tenths of it
    were left out."""
    text = SHORT.read_text(encoding="utf-8").upper()
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
    (tmp_path / "other.txt").write_text(text[::-1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    err = train_tiny("out", "--data", "mine.txt")
    monkeypatch.chdir(HERE)
    code, out, said = run_main("--mode", "eval", "--out_dir", tmp_path / "out")
    assert code == 0 and out.strip() == score(err) and "note" not in said
    code, out, _ = run_main("--mode", "eval", "--out_dir", tmp_path / "out", "--data",
                            tmp_path / "other.txt")
    model, tokenizer = model_of(tmp_path / "out" / "best.pt")
    nats = minigpt.evaluate(model, torch.tensor(tokenizer.encode(text[::-1])))
    assert code == 0 and out.startswith(
        f"whole text, which the model was not trained on, {len(text) - 1:,} tokens: {nats:.4f} ")

def test_logged_loss_is_the_mean_over_the_accumulated_step(tiny_run):
    """Computed again from the seeds alone, with dropout: the loss of the third step is the mean
    over both micro-batches, not that of the last one. Fails if the typed dropout does not reach the
    model, or if the seeds or the windows are others."""
    model, tokenizer = model_of(tiny_run[0] / "step_000002.pt")
    corpus = Corpus.from_text(SHORT.read_text(encoding="utf-8"), tokenizer)
    torch.manual_seed(random.Random("1337 2").getrandbits(32))
    offset = random.Random("1337 -1 True").getrandbits(32) / 2**32  # of the short windows
    numbers = torch.arange(16, 24).double()  # of the windows: each step has 8
    shares = (numbers * (5**0.5 - 1) / 2 + offset) % 1
    losses = []
    for starts in (shares * (len(corpus.train) - 16)).long().split(4):
        windows = torch.stack([corpus.train[i : i + 17].long() for i in starts.tolist()])
        x, y = pair(windows)
        logits = model.train()(x)[0] / 0.9  # at the temperature of training
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item())
    third = step_losses(tiny_run[0])[2][1]
    assert model.drop.p == 0.1
    assert third == pytest.approx(sum(losses) / 2, abs=1e-6)
    assert third != pytest.approx(losses[1], abs=1e-6)

def test_typed_settings_reach_the_optimizer_and_the_schedule(tmp_path):
    """What the optimizer used, as saved and logged: step n is taken with get_lr(n - 1). Fails if
    the rate is set late, early or never, or if a setting stops on its way."""
    train_tiny(tmp_path, "--optimizer", "muon", "--beta1", "0.71", "--beta2", "0.83", "--momentum",
               "0.6", "--weight_decay", "0.37", "--learning_rate", "0.01", "--min_lr", "0.002",
               "--schedule", "cosine", "--warmup_steps", "1", "--grad_clip", "1e-3")
    assert all(norm > 0.01 for *_, norm in step_losses(tmp_path))  # as it was before clipping
    state = load_checkpoint(tmp_path / "latest.pt")
    config = RunConfig(**state["train_config"])
    groups = state["optimizer"]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {(0.71, 0.83)}
    assert {group["momentum"] for group in groups if "parts" in group} == {0.6}
    assert {group["weight_decay"] for group in groups} == {0.37, 0.0}
    assert {group["lr"] for group in groups} == {get_lr(5, config)}
    used = [r["lr"] for r in metrics_of(tmp_path) if "lr" in r]
    assert used == [get_lr(step, config) for step in range(6)]
    assert used[0] == pytest.approx(0.005) and used[1] == 0.01  # one step of warm-up

def test_watching_changes_nothing(tiny_run, tmp_path):
    """Evaluating, sampling, logging and saving more or less often give the same weights. Fails if
    one of them draws from the random numbers of training, or leaves the model in another mode."""
    train_tiny(tmp_path, "--eval_interval", "1", "--eval_batches", "1", "--sample_tokens", "5",
               "--log_interval", "4", "--checkpoint_interval", "0")
    assert_same_run(tiny_run[0] / "latest.pt", tmp_path / "latest.pt")

@pytest.mark.parametrize("flag, value, at", [("--checkpoint_interval", 2, 2),
                                             ("--log_interval", 1, 2), ("--eval_interval", 1, 1)])
def test_a_run_that_diverges_ends_and_spares_its_checkpoints(tmp_path, flag, value, at):
    """A learning rate of 1e30 blows up at once, whether a save, a report or an evaluation meets it
    first. There is one error line, and the files are those of step 0, whose weights are numbers."""
    code, _, err = run_main(*TRAIN, "--out_dir", tmp_path, "--grad_clip", "0", "--log_interval",
                            "100", "--learning_rate", "1e30", flag, value)
    assert code == 2 and f"error: the run has diverged at step {at};" in last_line(err)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["best.pt", "latest.pt"]
    for name in ("best.pt", "latest.pt"):
        state = load_checkpoint(tmp_path / name)
        assert state["step"] == 0
        assert all(v.isfinite().all() for v in state["model"].values())

def test_a_signal_after_divergence_saves_no_useless_weights(tmp_path, monkeypatch, guarded):
    """The save that a signal asks for must not put weights that are no numbers in place of good
    ones."""
    before_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    code, _, err = run_main(*TRAIN, "--out_dir", tmp_path, "--grad_clip", "0", "--log_interval",
                            "100", "--learning_rate", "1e30", "--eval_interval", "100")
    assert code == 2 and "diverged at step 3" in last_line(err)
    assert step_of(tmp_path / "latest.pt") == 0

def test_a_model_whose_logits_are_not_finite_is_neither_saved_nor_used(tmp_path, tiny_run):
    """With a learning rate of 1e20, the weights are still finite after one step, but the scores of
    attention overflow."""
    code, _, err = run_main(*TRAIN, "--out_dir", tmp_path, "--learning_rate", "1e20",
                            "--eval_interval", "100", "--checkpoint_interval", "1",
                            "--warmup_steps", "0", "--log_interval", "100")
    assert code == 2 and "the run has diverged at step 1" in last_line(err)
    assert step_of(tmp_path / "latest.pt") == 0
    state = load_checkpoint(tiny_run[0] / "best.pt")
    for w in state["model"].values():
        w *= 1e25
    minigpt.save_checkpoint(tmp_path / "huge.pt", state)
    for mode in ("generate", "eval", "inspect", "export"):
        argv = ["--mode", mode, "--checkpoint", tmp_path / "huge.pt"]
        check_mistake(*run_main(*argv), ["huge.pt", "not finite"])
    for flag in ("--init_from", "--teacher"):
        argv = ["--mode", "train", "--data", SHORT, "--out_dir", tmp_path / "new", flag]
        check_mistake(*run_main(*argv, tmp_path / "huge.pt"), ["huge.pt", "not finite"])

def test_the_final_evaluation_shows_how_far_it_is(tiny_run, tmp_path, monkeypatch):
    """On a terminal, in training and in --mode eval. In a file, there would be heaps of it."""
    commands = (TRAIN + ["--out_dir", tmp_path], ["--mode", "eval", "--out_dir", tiny_run[0]])
    for command in commands:
        assert "evaluating" not in run_main(*command)[2]
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})
    monkeypatch.setattr(io, "StringIO", terminal)
    shutil.rmtree(tmp_path)
    monkeypatch.setattr(time, "perf_counter", map(float, itertools.count()).__next__)
    for command in commands:
        shares = re.findall(r"\revaluating: (\d+)%, [\d:]+ left *(\n?)", run_main(*command)[2])
        assert len(shares) > 3 and shares[-1] == ("100", "\n") and ("43", "") in shares

@pytest.mark.parametrize("on_terminal, expected", [
    (True, ["\rx: 25%, 0:00:30 left", "\rx: 75%, 0:00:10 left", "\rx: 100%, 0:00:00 left"]),
    (False, ["x: 75%, 0:00:10 left"])])
def test_progress_tells_the_time_that_is_left(monkeypatch, on_terminal, expected):
    """After 10 seconds for a quarter of the work, 30 seconds are left. A terminal shows that at
    once. Elsewhere, a line comes every 30 seconds, so that a log stays short."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    monkeypatch.setattr(out, "isatty", lambda: on_terminal)
    quick = minigpt.progress_of("y")
    clock[0] = 0.1
    quick(1)  # what is done at once shows nothing
    clock[0] = 0
    show = minigpt.progress_of("x")
    for now, share in ((0.1, 0.001), (10, 0.25), (10.1, 0.26), (30, 0.75), (40, 1)):
        clock[0] = now
        show(share)
    lines = out.getvalue().replace("\r", "\n\r" if on_terminal else "").split("\n")
    assert [line.rstrip(" ") for line in lines if line.strip()] == expected

@pytest.mark.slow
def test_a_real_run_learns(tmp_path):
    """2.33 to 2.35 nats with three seeds; with a tenth of the learning rate 2.56, and with ten
    times as much 2.78. Fails if anything on the way from the text to the weights is only nearly
    right."""
    err = succeed("--mode", "train", "--preset", "plain", "--max_steps", "150", "--warmup_steps",
                  "10", "--data", SAMPLE, "--dtype", "float32", "--eval_interval", "150",
                  "--eval_batches", "2", "--checkpoint_interval", "0", "--out_dir", tmp_path)
    assert 2.0 < float(re.search(r"([\d.]+) nats", score(err))[1]) < 2.4

def test_a_text_of_two_tokens_can_be_evaluated(tmp_path, tiny_run):
    """Also where block_size is larger."""
    text = tmp_path / "short.txt"
    model, tokenizer = model_of(tiny_run[0] / "best.pt")
    for content in ("TH", "THE TIDE: me"):
        text.write_text(content)
        code, out, err = run_main("--mode", "eval", "--out_dir", tiny_run[0], "--data", text)
        expected = model.eval()(*pair(torch.tensor([tokenizer.encode(content)])))[1].item()
        assert code == 0 and "whole text" in out
        assert float(re.search(r"([\d.]+) nats", out)[1]) == pytest.approx(expected, abs=1e-4)

def test_shorter_windows_can_be_evaluated_and_longer_ones_are_refused(tiny_run):
    """--block_size 5 cuts the validation part into windows of 5 tokens, so that a figure can be
    compared with that of a model that has shorter windows. Would fail if the flag were ignored."""
    model, tokenizer = model_of(tiny_run[0] / "best.pt")
    corpus = Corpus.from_text(SHORT.read_text(encoding="utf-8"), tokenizer)
    model.config = replace(model.config, block_size=5)
    expected = minigpt.evaluate(model, corpus.val)
    command = ["--mode", "eval", "--out_dir", tiny_run[0], "--block_size"]
    code, out, err = run_main(*command, "5")
    assert code == 0 and f" {expected:.4f} nats" in out, err
    check_mistake(*run_main(*command, "17"), ["--block_size 17", "more than 16"])

@POSIX
def test_a_text_from_a_pipe_is_read_once_and_then_named_again(tmp_path):
    """A pipe can be trained on. A later command must not wait for somebody to write to it again,
    which looks like a command that hangs. Several runs cannot share one."""
    fifo, out_dir = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(SHORT.read_bytes()), daemon=True)
    writer.start()
    train_tiny(out_dir, "--data", fifo, "--max_steps", "1")
    writer.join(60)
    for argv in (["--mode", "eval"], RESUME[:3]):
        check_mistake(*run_main(*argv, "--out_dir", out_dir), [f"--data {fifo}", "--data FILE"])
        fifo.rename(tmp_path / "gone")  # as /dev/fd/63 is, after a command with <(...)
        check_mistake(*run_main(*argv, "--out_dir", out_dir), [f"--data {fifo}", "--data FILE"])
        (tmp_path / "gone").rename(fifo)
    resume_tiny(out_dir, "--data", SHORT, "--max_steps", "2")
    ablate = ["--mode", "ablate", *TRAIN[2:], "--vary", "n_layer=1,2", "--data", fifo]
    check_mistake(*run_main(*ablate), [f"--data {fifo}", "pipe"])

def test_a_text_without_a_prompt_begins_with_a_line_break(tmp_path):
    """Also where the vocabulary has a tab, which comes before the line break and would be the first
    id. Without a line break in the vocabulary, it begins with the first character."""
    for content, first in (("a\tb\nab\n" * 200, "\n"), ("ab " * 200, " ")):
        text = tmp_path / "text.txt"
        text.write_text(content, encoding="utf-8")
        out_dir = tmp_path / str(len(content))
        train_tiny(out_dir, "--data", text, "--max_steps", "1")
        code, out, _ = run_main("--mode", "generate", "--out_dir", out_dir, "--max_tokens", "3")
        assert code == 0 and out[0] == first and len(out) == 5

def test_a_run_that_training_made_worse_says_so(tmp_path):
    """Its best model is the one from before the first step. Would fail if that were praised."""
    bad = ["--learning_rate", "10", "--warmup_steps", "1", "--grad_clip", "0"]
    line = last_line(train_tiny(tmp_path / "bad", *bad))
    assert "no evaluation was better" in line and "--learning_rate" in line
    assert step_of(tmp_path / "bad" / "best.pt") == 0
    good = last_line(train_tiny(tmp_path / "good"))
    assert "worse" not in good and "the best model (step 6)" in good
    rows, _ = ablate_tiny(tmp_path, "--vary", "learning_rate=10,0.01", "--seeds", "1", *bad[2:])
    assert [row[5] for row in rows] == ["0 (not trained)", "6"]

def test_a_run_that_is_shortened_between_two_evaluations_is_evaluated(tmp_path):
    """It was stopped at step 4, after the evaluation of step 0, and is resumed with --max_steps 2.
    Fails if the weights of step 4 are not compared with those of step 0."""
    rarely = ["--eval_interval", "100", "--checkpoint_interval", "4"]
    train_tiny(tmp_path / "still", *rarely, "--learning_rate", "0")  # best.pt stays that of step 0
    train_tiny(tmp_path / "run", *rarely)
    (tmp_path / "run" / "best.pt").write_bytes((tmp_path / "still" / "best.pt").read_bytes())
    stopped = (tmp_path / "run" / "step_000004.pt").read_bytes()
    (tmp_path / "run" / "latest.pt").write_bytes(stopped)
    line = last_line(train_tiny(tmp_path / "run", "--resume", *rarely, "--max_steps", "2"))
    assert "the best model (step 4)" in line and "worse" not in line
    assert step_of(tmp_path / "run" / "best.pt") == 4

def test_the_flags_of_the_tokenizer_may_be_repeated_with_init_from(tmp_path, bpe, monkeypatch):
    """A run with GPT-2's tokens, or with fewer byte pairs than were asked for (the text had no
    more), can be the beginning of another one with the same flags, and that one can be resumed with
    them. Other flags are refused."""
    monkeypatch.setattr(minigpt, "fetch_gpt2_tokens", lambda: bpe)
    for name, flags, other in (("gpt2", ["--tokenizer", "gpt2"], ["--tokenizer", "bpe"]),
                               ("bpe", ["--tokenizer", "bpe", "--bpe_size", "5000"],
                                ["--bpe_size", "300"])):
        train_tiny(tmp_path / name, "--max_steps", "1", *flags)
        more = ["--mode", "train", "--init_from", tmp_path / name / "best.pt", "--preset", "laptop",
                "--batch_size", "2", "--eval_batches", "1", "--max_steps", "1", "--sample_tokens",
                "0", "--data", SHORT, "--warmup_steps", "0"]
        succeed(*more, "--out_dir", tmp_path / f"{name}_more", *flags)
        succeed(*more, "--out_dir", tmp_path / f"{name}_more", *flags, "--resume", "--max_steps",
                "2")
        check_mistake(*run_main(*more, "--out_dir", tmp_path / "x", *other),
                      [*other, "--init_from has"])

# ---- Resuming a run ------------------------------------------------------------------------------
def test_the_rungs_of_the_ladder_lead_to_laptop():
    """All flags of the second ladder together are the settings of the preset, except for how long
    it trains and how often it is evaluated. Fails if one of the two is changed alone."""
    tree = ast.parse((HERE / ".ci" / "ladder.py").read_text(encoding="utf-8"))
    rungs, = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
              and ast.unparse(node.targets[0]) == "PART_2")
    request = minigpt.parse(["--mode", "train", *" ".join(rungs.values()).split()])
    plain, laptop = (minigpt.PRESETS[name] for name in ("plain", "laptop"))
    assert {**plain.model, **minigpt.pick(request, ModelConfig)} == laptop.model
    training = {**plain.training, **minigpt.pick(request, RunConfig), "preset": "laptop"}
    for name in ("max_steps", "eval_interval", "eval_batches"):
        training[name] = laptop.training[name]
    assert training == {**laptop.training, "preset": "laptop"}

README_MODELS = {row[0]: row for row in re.findall(
    r"(?m)^\| `(\w+)` \| [^|]* \| ([^|]*) \| ([\d,]+) \| ([\d,]+) \|$",
    (HERE / "README.md").read_text(encoding="utf-8"))}

def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text.replace(",", ""))]

@pytest.mark.parametrize("name", minigpt.PRESETS)
def test_each_preset_is_the_model_of_the_readmes_table(name):
    """Layers, heads, width, context and the number of parameters are what the README says. Fails if
    one of them is changed by mistake, in the program or in the README."""
    _, shape, context, parameters = README_MODELS[name]
    request = minigpt.parse(["--mode", "train"])
    config = minigpt.training_settings(name, request)
    vocab_size = {"char": 65, "bpe": 1024, "gpt2": 50257}[config.tokenizer]
    sizes = minigpt.model_settings(name, request, vocab_size)
    if name != "bigram":
        assert numbers(shape.replace(", ", " ")) == [sizes.n_layer, sizes.n_head, sizes.n_embd]
    assert numbers(context) == [sizes.block_size]
    with torch.device("meta"):
        model = minigpt.MODELS[sizes.model](sizes)
    assert numbers(parameters) == [minigpt.count_parameters(model)]
    assert sum(minigpt.parameters_by_part(model).values()) == minigpt.count_parameters(model)

def test_gpt2_small_without_its_tokens_says_what_to_do(tmp_path, monkeypatch):
    """The preset is GPT-2, tokens included. If they cannot be had, there is another way."""
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    check_mistake(*run_main("--mode", "train", "--preset", "gpt2", "--data", SHORT, "--out_dir",
                            tmp_path), ["--tokenizer gpt2", "could not be downloaded",
                                        "--tokenizer bpe"])

def test_the_size_and_the_work_of_a_model_by_hand():
    """For one layer of 4 channels with 2 heads, 3 tokens and 5 ids. Each weight of a product counts
    6 times per token, the tied head as well, and so do the 2 T C products of attention."""
    model = GPT(small_config(vocab_size=5, block_size=3, n_layer=1, n_head=2, n_embd=4))
    assert minigpt.parameters_by_part(model) == {
        "token table": 20, "position table": 12, "attention": 4 * 12 + 12 + 16 + 4,
        "MLP": 4 * 16 + 16 + 16 * 4 + 4, "norms": 3 * 8, "output head": 0}
    assert minigpt.flops_per_token(model) == 6 * (80 + 148 + 20 + 2 * 3 * 4)

def test_a_learning_rate_alone_takes_its_minimum_with_it(tmp_path):
    """--learning_rate 1e-5 is below the min_lr of most presets. What was meant is the same schedule
    at another height. A typed min_lr stays, and so does that of --vary."""
    for name, preset in minigpt.PRESETS.items():
        plain = RunConfig(**preset.training)
        request = minigpt.parse(["--mode", "train", "--learning_rate", "1e-5"])
        config = minigpt.training_settings(name, request)
        assert config.learning_rate == 1e-5
        assert config.min_lr == pytest.approx(1e-5 * plain.min_lr / plain.learning_rate)
    typed = minigpt.parse(["--mode", "train", "--learning_rate", "1e-3", "--min_lr", "1e-5"])
    assert minigpt.training_settings("plain", typed).min_lr == 1e-5
    argv = ["--preset", "plain", "--learning_rate", "1e-5"]
    train_tiny(tmp_path, *argv)
    succeed(*TRAIN, *argv, "--out_dir", tmp_path, "--resume", "--max_steps", "7")

def test_epochs_and_perplexity_stand_beside_steps_and_losses(tmp_path):
    """An epoch is one pass over the training text. Perplexity is exp(loss)."""
    said = train_tiny(tmp_path, "--grad_accum", "3", "--batch_size", "5", "--max_steps", "12")
    tokens = int(0.9 * len(SHORT.read_text(encoding="utf-8")))
    epochs = re.findall(r"^step (\d+)/.* \| epoch ([\d.]+) \|", said, re.M)
    assert len(epochs) == 12
    for step, epoch in epochs:
        assert float(epoch) == pytest.approx(int(step) * 3 * 5 * 16 / tokens, abs=0.006)
    lines = re.findall(r"validation loss ([\d.]+), perplexity ([\d.]+)", said)
    assert len(lines) == 5
    for loss, shown in lines:
        assert float(shown) == pytest.approx(math.exp(float(loss)), rel=1e-3)
    for record in metrics_of(tmp_path):
        for name in {"val_loss", "full_val_loss"} & record.keys():
            perplexity = record[name.replace("loss", "perplexity")]
            assert perplexity == pytest.approx(math.exp(record[name]))

@pytest.mark.skipif(not (HERE / "data" / "input.txt").exists(),
                    reason="needs data/input.txt: python download_data.py")
def test_the_real_corpus_has_the_figures_of_the_book():
    """65 characters, and the sizes of both parts that every log begins with."""
    text = minigpt.read_corpus("")
    tokenizer = CharTokenizer.train(text.text)
    corpus = minigpt.encode_corpus(text, tokenizer, 512)
    assert tokenizer.vocab_size == 65
    assert (len(corpus.train), len(corpus.val)) == (1_003_854, 111_540)
    assert minigpt.doubts_about(text.text) == []

@pytest.mark.parametrize("optimizer, tokenizer", [("adamw", "char"), ("muon", "bpe")])
def test_a_resumed_run_is_the_run_it_would_have_been(tmp_path, optimizer, tokenizer):
    """k steps, --resume and the rest give bit-identical weights, optimizer and losses, with dropout
    and accumulation. k = 3 is right after an evaluation. Fails if a random number depends on more
    than seed and step, if the optimizer, the step or the best is not restored, or if an evaluation
    is repeated. The folder has only what was there after k steps."""
    whole = tmp_path / "whole"
    size = ["--bpe_size", "300"] if tokenizer == "bpe" else []
    train_tiny(whole, "--checkpoint_interval", "1", "--optimizer", optimizer, "--tokenizer",
               tokenizer, *size)
    for k, best in ((2, None), (3, 3)):
        parts = tmp_path / f"parts{k}"
        parts.mkdir()
        shutil.copy(whole / "metrics.jsonl", parts / "metrics.jsonl")
        shutil.copy(whole / f"step_{k:06d}.pt", parts / "latest.pt")
        if best is None:  # the best model after two steps is that of step 0
            best_of_start(tmp_path, optimizer, tokenizer, size, parts / "best.pt")
        else:
            shutil.copy(whole / f"step_{best:06d}.pt", parts / "best.pt")
        assert re.search(rf"^resuming.* at step {k}$", resume_tiny(parts), re.M)
        assert step_losses(whole) == step_losses(parts) and len(step_losses(parts)) == 6
        assert_same_run(whole / "latest.pt", parts / "latest.pt",
                        "model", "optimizer", "step", "best_val", "best_step", "tokenizer")
        assert_same_run(whole / "best.pt", parts / "best.pt")
        assert evaluated(parts) == [0, 3, 6]
        assert kinds_and_steps(parts) == kinds_and_steps(whole)

def kill_in(phase, patch):
    """Kills a student's run in one of its phases, at the third call of what they call."""
    owner, name, first = {"teacher 1": (minigpt.FullRun, "take_step", 1),
                          "the table": (minigpt.Teachers, "read", 3),
                          "the student": (minigpt.Taught, "forward", 1)}[phase]
    calls, original = itertools.count(first), getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **options: (
        kill() if next(calls) == 3 else original(*arguments, **options)))

@pytest.mark.parametrize("table_bytes", [0, 2e9])
def test_a_student_ends_the_same_wherever_it_was_killed(tmp_path, monkeypatch, table_bytes):
    """In a teacher, while the table is made, and in the student. The same command with --resume
    goes on. Two ordinary teachers are trained with other seeds and the preset's steps, and the
    third is the file that --teacher names. The student takes the steps that were typed. Fails if
    the student learns from anything else after a resume, or if a teacher is trained again."""
    monkeypatch.setattr(minigpt, "TABLE_BYTES", table_bytes)
    monkeypatch.setitem(minigpt.PRESETS["laptop"].training, "max_steps", 4)
    train_tiny(tmp_path / "given", "--block", "shift", "--seed", "5", "--max_steps", "3")
    given = tmp_path / "given" / "best.pt"
    student = ["--teachers", "2", "--teacher", str(given), "--checkpoint_interval", "1"]
    err = train_tiny(tmp_path / "whole", *student)
    assert re.findall(r"^(.*): trained to step (\d+)", err, re.M) == [
        ("teacher 1 of 2", "4"), ("teacher 2 of 2", "4"), ("student", "6")]
    whole = tmp_path / "whole"
    seeds = [load_checkpoint(path)["train_config"]["seed"]
             for path in sorted(whole.rglob("latest.pt"))]
    assert seeds == [1337, *(minigpt.derived_seed(1337, -2, i) for i in (1, 2))]
    for phase in ("teacher 1", "the table", "the student"):
        folder = tmp_path / phase
        with monkeypatch.context() as patch:
            kill_in(phase, patch)
            with pytest.raises(Killed):
                run_main(*TRAIN, "--out_dir", folder, *student)
        if phase == "the student":  # records are for people; a run must not need them
            (folder / "teacher_1" / "metrics.jsonl").unlink()
        kept = contents(folder / "teacher_1") if phase != "teacher 1" else {}
        train_tiny(folder, *student, "--resume")
        assert kept.items() <= contents(folder).items()
        assert_same_run(folder / "latest.pt", whole / "latest.pt",
                        "model", "optimizer", "step", "best_val", "best_step")
        assert step_losses(folder) == step_losses(whole)
    shutil.rmtree(folder / "teacher_2")
    check_mistake(*run_main(*RESUME, folder, "--max_steps", "8"), ["teacher_2", "no such file"])

def test_a_student_takes_twice_the_steps_at_temperature_one():
    """Unless something else was typed. On 1,000 tokens, a step has 80, so 12 passes are 150."""
    for flags in ({"teachers": 1}, {"teacher": ["a.pt"]}):
        config = minigpt.training_settings("laptop", flags)
        assert config.max_steps == 4000 and config.train_temperature == 1
        small = replace(config, batch_size=5, grad_accum=2)
        corpus = Corpus(torch.zeros(1000), torch.zeros(100), 100)
        with contextlib.redirect_stderr(io.StringIO()):
            assert minigpt.limit_steps(small, small_config(), corpus, flags).max_steps == 150
        typed = minigpt.training_settings("laptop", {**flags, "max_steps": 7,
                                                     "train_temperature": 0.9})
        assert typed.max_steps == 7 and typed.train_temperature == 0.9
    assert minigpt.training_settings("laptop", {"teachers": 0}).max_steps == 2000

def test_the_time_of_a_student_includes_that_of_its_teachers(tmp_path, monkeypatch):
    """In the table of an ablation, a taught model would otherwise look as cheap as any other."""
    clock_of_steps(monkeypatch)
    monkeypatch.setitem(minigpt.PRESETS["laptop"].training, "max_steps", 2)
    with contextlib.redirect_stderr(io.StringIO()):
        outcome = minigpt.run_train(minigpt.parse(replaced([*TRAIN, "--out_dir", tmp_path,
                                                            "--teachers", "1"])))
    own = [metrics_of(folder)[-1]["seconds"] for folder in (tmp_path, tmp_path / "teacher_1")]
    assert outcome.seconds == sum(own) > own[0] > 300

def test_a_student_reads_the_windows_of_an_ordinary_run(tmp_path):
    """It gets their positions in the text. Fails if these are of other windows."""
    run = tiny_full_run(tmp_path)
    batches, tokens = run.batches(), run.corpus.train
    run.teachers = minigpt.Teachers([run.model], tokens)
    for (x, y), (places, target_places) in zip(batches, run.batches(), strict=True):
        assert torch.equal(tokens[places], x) and torch.equal(tokens[target_places], y)

def test_a_student_refuses_other_teachers(tmp_path):
    """Another vocabulary, a file that is not the one it began with, and a run whose teachers were
    begun but not the student, which needs the whole command again."""
    train_tiny(tmp_path / "given")
    given = tmp_path / "given" / "best.pt"
    other = tmp_path / "other.txt"
    other.write_text("abc\n" * 3000)
    refused = run_main(*TRAIN, "--data", other, "--teacher", given, "--out_dir", tmp_path / "a")
    check_mistake(*refused, [f"--teacher {given}", "another vocabulary"])
    assert not (tmp_path / "a").exists()
    train_tiny(tmp_path / "b", "--teacher", given, "--max_steps", "2")
    shutil.copy(tmp_path / "given" / "latest.pt", given)
    state = load_checkpoint(given)
    state["step"] += 1
    minigpt.save_checkpoint(given, state)
    check_mistake(*run_main(*RESUME, tmp_path / "b", "--max_steps", "3"), ["put them back"])
    check_mistake(*run_main(*RESUME, tmp_path / "b", "--teacher", SHORT), ["leave the flag out"])
    (tmp_path / "c" / "teacher_1").mkdir(parents=True)
    for flags in ([], ["--resume"], ["--teachers", "1"]):
        check_mistake(*run_main(*TRAIN, "--out_dir", tmp_path / "c", *flags),
                      ["has a teacher_1 already", "--teachers and --resume"])

def best_of_start(folder, optimizer, tokenizer, size, target):
    """Writes the best.pt that a run has after its evaluation of step 0."""
    start = folder / "start"
    code, _, err = run_main(*TRAIN, "--out_dir", start, "--optimizer", optimizer, "--tokenizer",
                            tokenizer, *size, "--grad_clip", "0", "--learning_rate", "1e30")
    assert code == 2 and "diverged" in err  # no later evaluation could replace it
    shutil.copy(start / "best.pt", target)

def test_best_is_only_replaced_by_a_better_model(tmp_path):
    """An older snapshot is copied to latest.pt, whose best model so far is that of step 0. Step 3
    is better than that, but worse than what best.pt holds, so best.pt stays as it is, and the final
    score is its. Fails if the snapshot's own record decides."""
    train_tiny(tmp_path, "--checkpoint_interval", "2")
    best = (tmp_path / "best.pt").read_bytes()
    first = {r["step"]: r["val_loss"] for r in metrics_of(tmp_path) if "val_loss" in r}
    assert load_checkpoint(tmp_path / "step_000002.pt")["best_step"] == 0
    assert first[6] < first[3] < first[0]
    shutil.copy(tmp_path / "step_000002.pt", tmp_path / "latest.pt")
    err = resume_tiny(tmp_path, "--max_steps", "3")
    assert (tmp_path / "best.pt").read_bytes() == best
    assert "(best so far)" not in err
    _, out, _ = run_main("--mode", "eval", "--out_dir", tmp_path)
    assert out.strip() == score(err)

def test_a_copy_in_place_of_best_is_replaced_by_the_next_model(tmp_path):
    """latest.pt was copied over a damaged best.pt. It is not the model of the lowest loss that it
    records, so that loss must not keep a later model from being saved."""
    train_tiny(tmp_path)
    state = load_checkpoint(tmp_path / "latest.pt")
    state.update(best_val=0.1, best_step=3)
    for name in ("best.pt", "latest.pt"):
        minigpt.save_checkpoint(tmp_path / name, state)
    err = resume_tiny(tmp_path, "--max_steps", "7")
    assert "the best model (step 7): " in last_line(err) and step_of(tmp_path / "best.pt") == 7

@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_crash_between_best_and_latest_costs_nothing(tmp_path, tiny_run, monkeypatch, step):
    """The evaluation of that step found the best model so far. best.pt was written, and the run was
    killed before latest.pt was. With --resume, the run takes the steps again and ends like one that
    was not killed. At step 0, it begins again."""
    original = minigpt.save_checkpoint

    def killed(path, state):
        if path.name == "latest.pt" and state["step"] == step:
            raise Killed
        original(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(minigpt, "save_checkpoint", killed)
        with pytest.raises(Killed):
            run_main(*TRAIN, "--out_dir", tmp_path)
    assert step_of(tmp_path / "best.pt") == step
    assert step == 0 or step_of(tmp_path / "latest.pt") == step - 3
    train_tiny(tmp_path, "--resume")
    assert_same_run(tmp_path / "latest.pt", tiny_run[0] / "latest.pt",
                    "model", "optimizer", "step", "best_val", "best_step")
    assert_same_run(tmp_path / "best.pt", tiny_run[0] / "best.pt")
    assert evaluated(tmp_path) == [0, 3, 6]

def test_a_copied_checkpoint_continues_in_another_folder(tmp_path, tiny_run):
    """A step_*.pt, copied to be the latest.pt of a folder that has no best.pt. If the snapshot is
    the best model itself, it becomes best.pt. Otherwise the search for the best begins anew, with
    the snapshot. The weights become what they would have been."""
    folder = tiny_run[0]
    end = load_checkpoint(folder / "latest.pt")
    for name, step in (("b", 6), ("c", 2)):
        (tmp_path / name).mkdir()
        shutil.copy(folder / f"step_{step:06d}.pt", tmp_path / name / "latest.pt")
        resume_tiny(tmp_path / name)
        assert_same(load_checkpoint(tmp_path / name / "latest.pt")["model"], end["model"])
        assert step_of(tmp_path / name / "best.pt") == end["best_step"]
    assert evaluated(tmp_path / "c") == [2, 3, 6]

def test_resume_where_nothing_was_saved_begins_a_new_run(tmp_path, tiny_run):
    """So that one command line serves for both, as under torchrun --max_restarts."""
    latest = tmp_path / "a" / "latest.pt"
    err = train_tiny(tmp_path / "a", "--resume")
    assert f"--resume: there is no {latest} yet, so a new run begins" in err
    assert_same_run(latest, tiny_run[0] / "latest.pt")
    assert "a new run" not in train_tiny(tmp_path / "a", "--resume", "--max_steps", "7")
    assert step_of(latest) == 7

def test_a_resumed_run_keeps_the_model_that_it_began_with(tmp_path, tiny_run):
    """A restart script types --init_from and --resume each time, and that works, also if that file
    is gone. Another file would be ignored, so it is refused, whether it exists or not."""
    shutil.copy(tiny_run[0] / "best.pt", tmp_path / "a.pt")
    shutil.copy(tiny_run[0] / "best.pt", tmp_path / "b.pt")
    train = ["--mode", "train", "--preset", "laptop", "--data", SHORT, "--batch_size", "2",
             "--eval_batches", "1", "--sample_tokens", "0", "--warmup_steps", "0", "--resume"]
    begun, other = tmp_path / "begun", tmp_path / "other"
    first = [*train, "--out_dir", begun, "--init_from", tmp_path / "a.pt", "--max_steps"]
    assert "a new run begins" in succeed(*first, "1")
    assert "resuming" in succeed(*first, "2")
    (tmp_path / "a.pt").unlink()
    assert "resuming" in succeed(*first, "3") and step_of(begun / "latest.pt") == 3
    assert "resuming" in succeed(*RESUME, begun, "--max_steps", "4")
    train_tiny(other, "--max_steps", "1")
    for folder, file, has in ((begun, "b.pt", f"has {tmp_path / 'a.pt'}"),
                              (begun, "nowhere.pt", f"has {tmp_path / 'a.pt'}"),
                              (other, "b.pt", "has none")):
        path = tmp_path / file
        refused = run_main(*RESUME, folder, "--init_from", path, "--max_steps", "9")
        check_mistake(*refused, [f"--init_from {path}", has, "leave the flag out"])

@pytest.mark.parametrize("name", ["best.pt", "step_000002.pt"])
def test_resume_without_latest_is_refused_where_another_checkpoint_is(tmp_path, tiny_run, name):
    """latest.pt was lost or renamed. A new run would overwrite what is left of the old one, so
    nothing is written. The cure in the message works."""
    shutil.copy(tiny_run[0] / name, tmp_path / name)
    shutil.copy(tiny_run[0] / "metrics.jsonl", tmp_path / "metrics.jsonl")
    before = contents(tmp_path)
    for argv in ([*TRAIN, "--resume", "--out_dir", tmp_path], [*RESUME, tmp_path]):
        code, _, err = run_main(*argv)
        assert code == 2 and f"has a {name} already; " in last_line(err)
        assert "copy it to latest.pt and use --resume" in last_line(err)
        assert contents(tmp_path) == before
    shutil.copy(tmp_path / name, tmp_path / "latest.pt")
    resume_tiny(tmp_path)
    assert_same(load_checkpoint(tmp_path / "latest.pt")["model"],
                load_checkpoint(tiny_run[0] / "latest.pt")["model"])

def test_resume_can_lengthen_a_run_but_not_reshape_it(tmp_path):
    """max_steps may change. What gives the earlier steps their meaning may not: the refusal names
    both values and leaves the files alone. A value that is typed again is no change."""
    train_tiny(tmp_path)
    before = contents(tmp_path)
    for flag, new, old in (("n_embd", 32, 16), ("batch_size", 8, 4), ("grad_accum", 4, 2),
                           ("preset", "mini", "laptop"), ("seed", 3, 1337), ("dropout", 0.2, 0.1),
                           ("sampling", "random", "even"), ("learning_rate", 0.5, 0.007)):
        code, _, err = run_main(*RESUME, tmp_path, f"--{flag}", new)
        assert code == 2 and last_line(err).startswith(f"error: --{flag} {new}: cannot change")
        assert f"the run has {old};" in last_line(err)
    assert contents(tmp_path) == before
    resume_tiny(tmp_path, "--max_steps", "8", "--preset", "auto", "--n_embd", "16")
    assert step_of(tmp_path / "latest.pt") == 8
    assert evaluated(tmp_path) == [0, 3, 6, 8]
    assert "full_val_loss" in metrics_of(tmp_path)[-1]

def test_another_corpus_is_refused_on_resume(tmp_path):
    """Typed, or changed in its place: the same characters in another order are another text. If the
    text is not there any more, --data names its new place, and the run goes on."""
    mine = tmp_path / "mine.txt"
    text = SHORT.read_text(encoding="utf-8")
    mine.write_text(text, encoding="utf-8")
    train_tiny(tmp_path / "out", "--data", mine, "--max_steps", "1")
    mine.write_text(text[::-1], encoding="utf-8")
    before = contents(tmp_path)
    for argv in ([], ["--data", mine], ["--data", SAMPLE]):
        code, _, err = run_main(*RESUME, tmp_path / "out", *argv)
        assert code == 2 and re.match("error: --data .*: this is not the text", last_line(err))
    assert contents(tmp_path) == before
    mine.rename(tmp_path / "moved.txt").write_text(text, encoding="utf-8")
    for argv in ([*RESUME, tmp_path / "out"], ["--mode", "eval", "--out_dir", tmp_path / "out"]):
        check_mistake(*run_main(*argv), [f"--data {mine}", "not there any more", "--data FILE"])
    resume_tiny(tmp_path / "out", "--data", tmp_path / "moved.txt", "--max_steps", "2")
    resume_tiny(tmp_path / "out", "--max_steps", "3")  # the new place is remembered
    assert step_of(tmp_path / "out" / "latest.pt") == 3

def test_what_may_change_on_resume_does(tmp_path):
    """The format, the reports and the patience are those that were typed last. The README lists
    all that may change."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"`--resume` may change\*\*(.*?), the device", readme, re.S)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == minigpt.MAY_CHANGE
    train_tiny(tmp_path, "--max_steps", "2")
    err = resume_tiny(tmp_path, "--dtype", "bfloat16", "--max_steps", "7", "--eval_interval", "1",
                      "--sample_tokens", "0", "--log_interval", "3", "--checkpoint_interval", "3",
                      "--patience", "4", "--no_wandb")
    assert "cpu, bfloat16" in err and "    | " not in err
    assert (tmp_path / "step_000003.pt").exists()
    assert [step for step, *_ in step_losses(tmp_path)] == [1, 2, 3, 6, 7]
    config = load_checkpoint(tmp_path / "latest.pt")["train_config"]
    assert (config["dtype"], config["patience"], config["wandb"]) == ("bfloat16", 4, False)

def test_a_resumed_run_removes_halves_of_files(tmp_path):
    """A kill in the middle of a save leaves one. A file of a similar name is not ours to remove."""
    train_tiny(tmp_path)
    ours = ("latest.pt.partial", "step_000054.pt.partial", "metrics.jsonl.partial")
    for name in (*ours, "mine.partial", "best.pt.partial.txt"):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.MonkeyPatch.context() as patch:  # another process leaves all to the first one
        patch.setattr(minigpt, "process_rank", lambda: 1)
        before = contents(tmp_path)
        minigpt.FullJournal(tmp_path, minigpt.SignalWatch()).forget_after(0)
        assert contents(tmp_path) == before
    resume_tiny(tmp_path)
    left = {path.name for path in tmp_path.iterdir()} - {"latest.pt", "best.pt", "metrics.jsonl",
                                                         "config.json", "loss.png"}
    assert left == {"mine.partial", "best.pt.partial.txt"}

def test_what_a_failed_start_left_is_no_obstacle(tmp_path, tiny_run, monkeypatch):
    """The disk was full at the first save: config.json and a record of step 0 are there, and no
    checkpoint. The same command must do when there is room again."""
    with monkeypatch.context() as patch:
        patch.setattr(minigpt.FullRun, "save", lambda *_: (_ for _ in ()).throw(
            OSError(28, "No space left on device", "latest.pt")))
        check_mistake(*run_main(*TRAIN, "--out_dir", tmp_path), ["latest.pt", "No space"])
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}
    train_tiny(tmp_path / "empty", "--max_steps", "1")
    for path in (tmp_path / "empty").glob("*.p*"):
        path.unlink()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    train_tiny(tmp_path / "empty", "--max_steps", "1")
    train_tiny(tmp_path)
    assert_same_run(tmp_path / "latest.pt", tiny_run[0] / "latest.pt")
    assert step_losses(tmp_path) == step_losses(tiny_run[0])
    for path in tmp_path.glob("*.p*"):
        path.unlink()
    code, _, err = run_main(*TRAIN, "--out_dir", tmp_path)  # now there are records of six steps
    assert code == 2 and "has a metrics.jsonl already" in last_line(err)

def test_a_run_that_has_nothing_left_to_do_says_so(tmp_path, tiny_run):
    """With a --max_steps that is passed already, or after the last step. Otherwise it would look as
    if it had been trained again."""
    assert "nothing is left" not in train_tiny(tmp_path)
    for steps in ("6", "4"):
        said = resume_tiny(tmp_path, "--max_steps", steps)
        assert f"nothing is left to train: the run is at step 6; --max_steps is {steps}" in said
    assert step_of(tmp_path / "latest.pt") == 6
    assert "nothing is left" not in resume_tiny(tmp_path, "--max_steps", "7")

def test_a_run_on_the_sample_goes_on_when_the_corpus_has_arrived(tmp_path, monkeypatch):
    """The first run had no network and took the sample. Later commands must find the sample again,
    although the corpus is there now."""
    sample = tmp_path / "data" / "sample.txt"
    sample.parent.mkdir()
    shutil.copy(SHORT, sample)
    monkeypatch.setattr(minigpt, "PROGRAM", tmp_path / "minigpt.py")
    monkeypatch.setattr(download_data, "MIRRORS", [])
    argv = [word for word in TRAIN if word not in ("--data", str(SHORT))]
    succeed(*argv, "--out_dir", tmp_path / "out", "--max_steps", "1")
    monkeypatch.setattr(download_data, "find", lambda path: pytest.fail("asked for the corpus"))
    resume_tiny(tmp_path / "out", "--max_steps", "2")
    assert run_main("--mode", "eval", "--out_dir", tmp_path / "out")[0] == 0

def test_a_checkpoint_with_a_variation_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    """It was trained with an activation that a reader had added, and is used by a program without
    it."""
    with monkeypatch.context() as patch:
        patch.setitem(minigpt.ACTIVATIONS, "sine", SineMLP)
        train_tiny(tmp_path, "--activation", "sine", "--max_steps", "1")
    for argv in (["--mode", "generate", "--out_dir", tmp_path], [*RESUME, tmp_path]):
        check_mistake(*run_main(*argv), [".pt", "--activation sine", "does not have"])

@pytest.mark.parametrize("change, named", [
    (lambda state: state["model_config"].update(alibi=True), "--alibi True"),
    (lambda state: state["model"].pop("h.0.ln_1.weight"), "h.0.ln_1.weight"),
    (lambda state: state["model"].update({"wte.weight": torch.zeros(2, 3)}), "wte.weight")])
def test_a_checkpoint_of_an_edited_program_is_one_line(tmp_path, change, named):
    """It has a setting that this program lacks, or weights with other names or shapes."""
    train_tiny(tmp_path, "--max_steps", "1")
    for name, argv in (("best.pt", ["--mode", "generate", "--out_dir", tmp_path]),
                       ("latest.pt", [*RESUME, tmp_path])):
        state = load_checkpoint(tmp_path / name)
        change(state)
        minigpt.save_checkpoint(tmp_path / name, state)
        check_mistake(*run_main(*argv), [name, named, "that it was trained with"])

@pytest.mark.parametrize("changes", [["--n_embd", "32"], ["--data", str(SAMPLE)]])
def test_the_best_model_of_another_run_is_refused_at_once(tmp_path, changes):
    """A best.pt of another size would be noticed only when the training is over, and one of another
    text not at all: its model would be taken for the result."""
    train_tiny(tmp_path / "a", "--max_steps", "3")
    train_tiny(tmp_path / "b", *changes, "--max_steps", "3")
    shutil.copy(tmp_path / "b" / "best.pt", tmp_path / "a" / "best.pt")
    check_mistake(*run_main(*RESUME, tmp_path / "a", "--max_steps", "6"),
                  ["best.pt: this is the model of another run"])
    assert step_of(tmp_path / "a" / "latest.pt") == 3

@pytest.mark.parametrize("name", ["best.pt", "latest.pt", "step_1000000.pt", "config.json",
                                  "metrics.jsonl"])
def test_a_new_run_overwrites_nothing(tmp_path, name):
    """A forgotten --resume must not cost a night's work, nor a file of that name that is not ours.
    --resume is only named where there is something to resume, and does no harm elsewhere."""
    (tmp_path / name).write_text("mine")
    for flags in ([], ["--resume"]):
        code, _, err = run_main(*TRAIN, "--out_dir", tmp_path, *flags)
        assert code == 2 and name in last_line(err)
        if not flags:
            assert ("add --resume" in err) == (name == "latest.pt")
        assert (tmp_path / name).read_text() == "mine"
        assert len(os.listdir(tmp_path)) == 1

def test_training_leaves_the_users_files_alone(tmp_path):
    """Files in out_dir that are not a run's are neither deleted nor moved nor changed, by a new run
    or one that continues: not the corpus, and not files with names like ours."""
    corpus = tmp_path / "corpus.txt"
    shutil.copy(SHORT, corpus)
    for name in ("tokens_train.bin", "tokens_val_0123456789ab.bin", "notes.txt", "best_000003.pt",
                 "my_best.pt", "step_2.pt", "latest.pt.bak", "x.partial", "sub/best.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    mine = {path: (data, path.stat().st_mtime_ns) for path, data in contents(tmp_path).items()}
    train_tiny(tmp_path, "--data", corpus, "--max_steps", "1")
    resume_tiny(tmp_path, "--max_steps", "2")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in mine} == mine

# ---- Part IV: comparing variations ---------------------------------------------------------------
def ablate_tiny(out_dir, *argv):
    """The cells of the table that an ablation prints, and what it wrote to stderr."""
    code, out, err = run_main("--mode", "ablate", *TRAIN[2:], "--out_dir", out_dir, *argv)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == ("| variant | nats/token | perplexity | bits/character | seconds | "
                        "best step | seeds |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return rows, err

def test_an_ablation_is_the_runs_that_it_stands_for(tmp_path):
    """Each figure of the table is the mean and the standard deviation of plain training runs with
    the same flags and seeds, in the unit of its column. Would fail if a variant lost a flag, if
    seeds were counted from another start, or if nats and bits changed places."""
    bpe = ["--tokenizer", "bpe", "--bpe_size", "300"]
    rows, err = ablate_tiny(tmp_path, "--vary", "pos=learned,rope", *bpe, "--seed", "5")
    assert "--resume" not in err  # nobody has typed it
    assert [row[0] for row in rows] == ["pos=learned", "pos=rope"]
    assert [row[6] for row in rows] == ["2 of 2", "2 of 2"]
    figures = []
    for seed in ("5", "6"):
        err = train_tiny(tmp_path / seed, "--pos", "rope", "--seed", seed, *bpe)
        folder = tmp_path / "ablate_pos" / f"pos=rope_seed={seed}"
        assert_same_run(folder / "latest.pt", tmp_path / seed / "latest.pt")
        found = re.search(r"([\d.]+) nats.*perplexity ([\d.]+), ([\d.]+) bits", score(err))
        figures.append([*map(float, found.groups()), metrics_of(folder)[-1]["seconds"]])
    for cell, a, b, near in zip(rows[1][1:5], *figures, (2e-4, 0.2, 2e-4, 0.05), strict=True):
        mean, deviation = (float(x) for x in cell.split(" ± "))
        assert mean == pytest.approx((a + b) / 2, abs=near)
        assert deviation == pytest.approx(abs(a - b) / math.sqrt(2), abs=near)

def test_an_ablation_draws_its_curves_and_does_not_count_the_time_for_it(tmp_path, pictures):
    """The seconds of the table are those that the run itself has recorded. Drawing a picture is no
    part of training, and it would make a short run look slow."""
    rows, _ = ablate_tiny(tmp_path, "--vary", "pos=learned", "--seeds", "1")
    folder = tmp_path / "ablate_pos"
    recorded = metrics_of(folder / "pos=learned_seed=1337")[-1]["seconds"]
    assert float(rows[0][4]) == pytest.approx(recorded, abs=0.05)
    if importable("matplotlib"):
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

def test_an_interrupted_ablation_continues_where_it_stopped(tmp_path):
    """A finished run is only evaluated again, an unfinished one is resumed, and the table is the
    same. Another setting is refused, so that an old run is never taken for the result of something
    else."""
    command = ["--vary", "n_layer=1,2", "--seeds", "1", "--checkpoint_interval", "2"]
    complete, _ = ablate_tiny(tmp_path, *command)
    finished = tmp_path / "ablate_n_layer" / "n_layer=1_seed=1337"
    unfinished = tmp_path / "ablate_n_layer" / "n_layer=2_seed=1337"
    end = load_checkpoint(unfinished / "latest.pt")
    before = (finished / "latest.pt").read_bytes()
    shutil.copy(unfinished / "step_000004.pt", unfinished / "latest.pt")
    rows, err = ablate_tiny(tmp_path, *command)
    assert [row[:4] for row in rows] == [row[:4] for row in complete]
    assert (finished / "latest.pt").read_bytes() == before
    assert "resuming" in err and "step 4 " not in err.split("at step 4")[1]
    assert_same(load_checkpoint(unfinished / "latest.pt")["model"], end["model"])
    other = run_main("--mode", "ablate", *TRAIN[2:], "--out_dir", tmp_path, *command,
                     "--batch_size", "2")
    check_mistake(*other, ["--batch_size 4", "needs 2", "--out_dir"])

def test_an_ablation_never_reports_the_run_of_another_command(tmp_path):
    """A folder that holds a run with another max_steps, learning rate, size, vocabulary or text is
    refused, in both directions, and nothing in it changes. Otherwise its loss would stand in the
    table as the result of this command. It is refused before anything is trained, also if only the
    last variant has a folder already."""
    other = tmp_path / "other.txt"
    other.write_text(SHORT.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    same = ["--seeds", "1", "--tokenizer", "bpe", "--bpe_size", "300"]
    ablate_tiny(tmp_path, "--vary", "activation=gelu", *same)
    before = contents(tmp_path)
    for typed in ([*same, "--max_steps", "3"], [*same, "--max_steps", "9"], [*same, "--n_embd", 32],
                  [*same, "--learning_rate", "0.01"], [*same, "--preset", "plain"],
                  [*same, "--bpe_size", "320"], same[:4], same[:2], [*same, "--data", other]):
        argv = ["--mode", "ablate", *TRAIN[2:], "--out_dir", tmp_path, *typed]
        needed = "this command needs" if other not in typed else "a run with another text"
        check_mistake(*run_main(*argv, "--vary", "activation=relu,gelu"), ["--out_dir", needed])
    assert contents(tmp_path) == before

@pytest.mark.parametrize("vary, named", [
    ("n_head=2,3", ["--n_head 3"]), ("block_size=16,100000", ["--block_size 100000"]),
    ("tokenizer=char,gpt2", ["--tokenizer gpt2"]),
    ("pos=learned,rope", ["--pos rope", "--attention"])])
def test_every_variant_is_built_before_the_first_one_is_trained(tmp_path, monkeypatch, vary, named):
    """A mistake in the last variant would otherwise come after hours, without a table."""
    def refuse():
        raise UserError("--tokenizer gpt2: no network")

    monkeypatch.setattr(minigpt, "fetch_gpt2_tokens", refuse)
    argv = ["--mode", "ablate", *TRAIN[2:], "--out_dir", tmp_path / "out", "--vary", vary]
    if vary.startswith("pos"):
        argv += ["--attention", "explicit", "--no_qk_norm", "--prev_heads", "0"]
    check_mistake(*run_main(*argv), named)
    assert not (tmp_path / "out").exists()

def test_an_ablation_that_is_stopped_shows_what_it_has_done(tmp_path, monkeypatch, guarded):
    """Ctrl-C ends all of it and not only one run, with the table of what is complete. The same
    command goes on, and then the table is complete."""
    argv = ["--mode", "ablate", *TRAIN[2:], "--out_dir", tmp_path, "--vary", "n_layer=1,2",
            "--seeds", "1"]
    with monkeypatch.context() as patch:
        before_step(patch, 8, lambda: signal.raise_signal(signal.SIGINT))
        code, out, err = run_main(*argv)
    assert code == 130
    assert "---- run 1 of 2: n_layer=1, seed 1337" in err and "---- run 2 of 2: " in err
    done, stopped = out.splitlines()[2:]
    assert done.startswith("| n_layer=1 | ") and done.endswith(" | 1 of 1 |")
    assert stopped == f"| n_layer=2 |{5 * ' not run |'} 0 of 1 |"
    rows, err = ablate_tiny(tmp_path, "--vary", "n_layer=1,2", "--seeds", "1")
    assert "resuming" in err and [row[6] for row in rows] == ["1 of 1", "1 of 1"]
    assert done.split(" | ")[1:4] == rows[0][1:4]

def test_tokenizers_can_be_compared_in_bits_per_character(tmp_path):
    """--vary tokenizer=char,bpe: a loss per token means something else for each, bits do not."""
    rows, _ = ablate_tiny(tmp_path, "--vary", "tokenizer=char,bpe", "--seeds", "1", "--max_steps",
                          "2", "--bpe_size", "300")
    folder = tmp_path / "ablate_tokenizer" / "tokenizer=bpe_seed=1337"
    assert model_of(folder / "best.pt")[1].vocab_size == 300  # the size is that of the byte pairs
    (_, char_nats, _, char_bits, *_), (_, bpe_nats, _, bpe_bits, *_) = rows
    assert float(char_bits) == pytest.approx(float(char_nats) / math.log(2), abs=1e-3)
    assert float(bpe_nats) > float(char_nats) and float(bpe_bits) < float(bpe_nats) / math.log(2)

def test_typed_settings_reach_the_runs_of_an_ablation(tmp_path):
    """Patience works as in training, and a switch is varied by true and false."""
    _, err = ablate_tiny(tmp_path, "--vary", "bias=true,false", "--seeds", "1", "--learning_rate",
                         "1e-30", "--weight_decay", "0", "--eval_interval", "1", "--patience", "2")
    assert err.count("trained to step 2 in ") == 2
    for value in (True, False):
        folder = tmp_path / "ablate_bias" / f"bias={str(value).lower()}_seed=1337"
        state = load_checkpoint(folder / "latest.pt")
        assert state["step"] == 2 and state["model_config"]["bias"] == value

def test_a_variant_that_diverges_is_a_row_of_the_table(tmp_path):
    """One bad learning rate must not end the comparison and lose the others."""
    rows, _ = ablate_tiny(tmp_path, "--vary", "learning_rate=1e30,1e-3", "--seeds", "1",
                          "--grad_clip", "0")
    bad, good = rows
    assert bad == ["learning_rate=1e30", *["diverged"] * 5, "0 of 1"]
    assert 2 < float(good[1]) < 5 and good[6] == "1 of 1"

def test_a_table_of_an_ablation_counts_what_has_ended_well(tmp_path, monkeypatch):
    """A diverged run is not counted, but its curve is drawn. If nothing has ended, there is no
    table."""
    outcome = minigpt.Outcome(1.0, 2.0, 3.0, 500)
    assert minigpt.table_row("a", [outcome, None], 2) == (
        "| a | 1.0000 | 2.7183 | 2.0000 | 3.0000 | 500 | 1 of 2 |")
    drawn = []
    monkeypatch.setattr(minigpt, "draw_curves", lambda *arguments: drawn.append(arguments))
    runs = {("a", 1): {"out_dir": "x"}, ("b", 1): {"out_dir": "x"}}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        minigpt.report_ablation(tmp_path, runs, {"a": [], "b": []}, 1)
        assert out.getvalue() == "" and not drawn
        minigpt.report_ablation(tmp_path, runs, {"a": [None], "b": []}, 1)
    assert [*drawn[0][1]] == ["a, seed 1"]

def test_all_variants_train_for_the_same_number_of_steps(tmp_path):
    """On a small text, a run without --max_steps is shortened by its size of batch. In a comparison
    this would make variants unequal, so the preset's number is used for all."""
    argv = ["--mode", "ablate", *TRAIN[2:], "--vary", "batch_size=4,16", "--seeds", "1"]
    argv = replaced(argv)
    at = argv.index("--max_steps")
    request = minigpt.parse(argv[:at] + argv[at + 2 :])
    seen = {}

    def run_train(typed):
        seen[typed["batch_size"]] = typed["max_steps"]
        return minigpt.Outcome(1.0, 1.0, 1.0, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minigpt, "run_train", run_train)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            minigpt.run_ablate(request)
    assert seen == dict.fromkeys((4, 16), minigpt.PRESETS["laptop"].training["max_steps"])

# ---- Benchmark -----------------------------------------------------------------------------------
BENCH = ["--mode", "bench", "--preset", "laptop", "--n_layer", "1", "--n_embd", "32",
         "--block_size", "16", "--batch_size", "2", "--max_tokens", "5", "--dtype", "float32",
         "--device", "cpu"]

def bench_rows(out):
    found = re.findall(r"^\| ([^|]*) \| ([\d,]+) \|$", out, re.M)
    return {name: float(value.replace(",", "")) for name, value in found}

def test_bench_prints_every_figure_and_writes_nothing(tmp_path, monkeypatch):
    """A measurement must not leave a run behind, which a later --mode train would refuse."""
    monkeypatch.chdir(tmp_path)
    code, out, err = run_main(*BENCH, "--bench_seconds=0.01")
    assert code == 0 and out.startswith("| laptop: cpu, float32, 1 threads, PyTorch 2"), err
    rows = bench_rows(out)
    sizes = {**minigpt.PRESETS["laptop"].model, "n_layer": 1, "n_embd": 32, "block_size": 16}
    model = GPT(ModelConfig(65, **sizes))
    parts = {f"- {part}": n for part, n in minigpt.parameters_by_part(model).items()}
    assert {name: rows.pop(name) for name in parts} == parts
    assert set(rows) == {"parameters", "training, tokens/s", "training, FLOPs per token",
                         "training, million FLOPs/s", "matrix products alone, million FLOPs/s",
                         "utilization, percent", "writing, tokens/s", "writing, without the cache"}
    assert rows.pop("parameters") == minigpt.count_parameters(model)
    flops = rows["training, FLOPs per token"]
    assert flops == minigpt.flops_per_token(model)
    used, possible = (rows[f"{name}, million FLOPs/s"] for name in ("training",
                                                                   "matrix products alone"))
    assert used == pytest.approx(flops * rows["training, tokens/s"] / 1e6, rel=0.01, abs=1)
    assert rows.pop("utilization, percent") == pytest.approx(100 * used / possible, abs=1)
    assert min(rows.values()) > 0
    assert os.listdir(tmp_path) == []

def test_a_rate_of_the_benchmark_is_work_per_second(monkeypatch):
    """If each call took half a second, 2 windows of 16 tokens would be 64 tokens per second, and 5
    written tokens would be 10 per second. An entry of a product of two matrices of 2048 rows takes
    2048 multiplications and as many additions. Would fail for a time that is not divided by, or if
    only the multiplications count, which would double the utilization."""
    timer = types.SimpleNamespace(blocked_autorange=lambda **_: types.SimpleNamespace(median=0.5))
    monkeypatch.setattr("torch.utils.benchmark.Timer", lambda *_, **__: timer)
    rows = bench_rows(run_main(*BENCH, "--n_layer", "4", "--n_embd", "512", "--bpe_size", "1024",
                               "--tokenizer", "bpe")[1])
    assert rows["training, tokens/s"] == 64
    assert rows["writing, tokens/s"] == rows["writing, without the cache"] == 10
    used, possible = 64 * rows["training, FLOPs per token"], 2 * 2048**3 * 2
    assert rows["training, million FLOPs/s"] == pytest.approx(used / 1e6, abs=1)
    assert rows["matrix products alone, million FLOPs/s"] == pytest.approx(possible / 1e6, abs=1)
    assert rows["utilization, percent"] == pytest.approx(100 * used / possible, abs=1) != 0

def test_the_benchmark_trains_on_whole_windows_and_writes_with_and_without_the_cache(monkeypatch):
    """`laptop` has short windows at first, which are faster: the figure would be too good. Explicit
    attention has no cache, so there is nothing to compare."""
    seen, read = [], []
    monkeypatch.setattr(minigpt, "rate_of", lambda work, seconds, function: function() and 1.0)
    monkeypatch.setattr(minigpt, "train_step", lambda *arguments: seen.append(arguments[2]) or [1])
    monkeypatch.setattr(minigpt, "flops_per_token", lambda model: 1)
    monkeypatch.setattr(minigpt, "read_window", lambda *arguments: read.append(1) or (
        torch.zeros(1, 65)))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: True)
    run_main(*BENCH)
    assert [x.shape for x, _ in seen[0]] == [(2, 16)] and len(read) == 5
    read.clear()
    out = run_main(*BENCH, "--attention", "explicit", "--pos", "learned", "--no_qk_norm",
                   "--prev_heads", "0")[1]
    assert len(read) == 5 and "without the cache" not in out

@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_written_text_can_be_trained_on(temperature):
    """The cached reader works in inference mode, whose tensors autograd refuses. What it writes
    must not be one of them."""
    model = small_model(attention="fused", pos="rope", prev_heads=1)
    text = model.generate(random_ids(1, 2), 5, temperature=temperature)
    assert not text.is_inference()
    model(*pair(text))[1].backward()
    assert model.wte.weight.grad.abs().sum() > 0

# ---- Exchange: the two forms ---------------------------------------------------------------------
ROPE = dict(pos="rope", qk_norm=True, bias=False, attention="extended")
QWEN3 = dict(ROPE, norm="rmsnorm", activation="swiglu")
LAPTOP = dict(ROPE, norm="fused_layernorm", activation="relu2", attention="fused")
EXPORTED = [
    ("GPT-2", {}),
    ("GPT-2", dict(bias=False, pos="sinusoidal", mlp_ratio=2.0, attention="extended")),
    ("GPT-2", dict(tie_weights=False, mlp_ratio=3.0, n_head=1, norm="fused_layernorm")),
    ("GPT-2", dict(mlp_ratio=5.0, n_head=4, attention="fused")),
    ("GPT-2", dict(bias=False, tie_weights=False, n_layer=1, mlp_ratio=2.3)),
    ("Qwen3", QWEN3),
    ("Qwen3", dict(QWEN3, n_head=4, tie_weights=False, mlp_ratio=2.0)),
    ("Qwen3", LAPTOP),
    ("Qwen3", dict(LAPTOP, n_head=1, tie_weights=False)),
    ("Qwen3", dict(QWEN3, activation="relu2", n_head=1, attention="fused")),
    ("Qwen3", dict(LAPTOP, prev_heads=1)),
    ("Qwen3", dict(QWEN3, prev_heads=2, tie_weights=False)),
    ("Qwen3", dict(QWEN3, prev_heads=1, n_head=1, norm_scale=False)),
    ("Qwen3", dict(LAPTOP, activation="swiglu", norm="layernorm", n_head=4, n_layer=3)),
    ("Qwen3", dict(QWEN3, n_head=4, n_kv_head=2)), ("Qwen3", dict(LAPTOP, n_kv_head=1)),
    ("Qwen3", dict(LAPTOP, n_head=4, n_kv_head=2, prev_heads=1))]
LETTERS = "to be, or not\né😀"
AWKWARD = ["", " ", "  to  be ", "\n\n o\n", "é😀é", "not to be, or", "be" * 200]

def largest_difference(a, b):
    """Relative to the largest number of b."""
    return ((a.double() - b.double()).abs().max() / b.abs().max()).item()

def save_model(folder, tokenizer, **changes):
    """Writes a best.pt whose weights are far from their start. Returns the model."""
    changes = {"vocab_size": tokenizer.vocab_size, "n_embd": 24, "block_size": 16, **changes}
    model = small_model(**changes).float().eval()
    minigpt.save_checkpoint(folder / "best.pt", {
        "format": minigpt.FORMAT, "step": 1, "tokenizer": (tokenizer.kind, tokenizer.state),
        "model": model.state_dict(), "model_config": minigpt.asdict(model.config),
        "train_config": {"tokenizer": tokenizer.kind, "bpe_size": tokenizer.vocab_size},
        "corpus": {"data": "", "sha256": ""}})
    return model

def export(folder, *argv):
    """Exports folder/best.pt. Returns the folder that was written."""
    pytest.importorskip("safetensors")
    code, out, err = run_main("--mode", "export", "--out_dir", folder, *argv)
    assert code == 0, err
    assert str(folder / "hf") in out
    return folder / "hf"

def qwen3_formula(config, tensors, idx):
    """The logits of a Qwen3 in float64, from config.json and its tensors."""
    w = {name.removeprefix("model."): tensor.double() for name, tensor in tensors.items()}
    n_head, eps = config["num_attention_heads"], config["rms_norm_eps"]
    n_kv = config["num_key_value_heads"]
    x = w["embed_tokens.weight"][idx]
    for i in range(config["num_hidden_layers"]):
        attn, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        y = rms(x, w[f"layers.{i}.input_layernorm.weight"], eps)
        q, k, v = (split_heads(y @ w[f"{attn}{n}_proj.weight"].T, heads)
                   for n, heads in (("q", n_head), ("k", n_kv), ("v", n_kv)))
        k, v = (y.repeat_interleave(n_head // n_kv, dim=1) for y in (k, v))
        q = turn(rms(q, w[f"{attn}q_norm.weight"], eps), config["rope_theta"])
        k = turn(rms(k, w[f"{attn}k_norm.weight"], eps), config["rope_theta"])
        y = (shares(q, k) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w[f"{attn}o_proj.weight"].T
        y = rms(x, w[f"layers.{i}.post_attention_layernorm.weight"], eps)
        gate, up = y @ w[f"{mlp}gate_proj.weight"].T, y @ w[f"{mlp}up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{mlp}down_proj.weight"].T
    head = "embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return rms(x, w["norm.weight"], eps) @ w[head].T

def gpt2_formula(config, tensors, idx):
    """The logits of a GPT-2 in float64, from config.json and its tensors."""
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}

    def norm(x, name):
        size = (config["n_embd"],)
        return F.layer_norm(x, size, w[f"{name}.weight"], w[f"{name}.bias"],
                            config["layer_norm_epsilon"])

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][idx] + w["wpe.weight"][: idx.shape[1]]
    for i in range(config["n_layer"]):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        q, k, v = (split_heads(y, config["n_head"]) for y in (q, k, v))
        y = (shares(q, k) @ v).transpose(1, 2).flatten(2)
        x = x + linear(y, f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        if config["activation_function"] == "gelu_new":
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        else:
            y = y * torch.distributions.Normal(0, 1).cdf(y)
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    head = "wte.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "ln_f") @ w[head].T

def test_a_setting_that_a_form_does_not_know_is_refused(tmp_path, monkeypatch):
    """The book invites readers to add attentions of their own, such as ALiBi. Other programs do not
    have it, so a model with it must not be exported as if it were a GPT-2. The same holds for a
    setting that is added to ModelConfig, unless it has its default."""
    class ALiBi(Attention):
        pass

    monkeypatch.setitem(minigpt.ATTENTION, "alibi", ALiBi)
    save_model(tmp_path, CharTokenizer.train("abc"), attention="alibi")
    refused = run_main("--mode", "export", "--out_dir", tmp_path)
    check_mistake(*refused, ["attention=alibi", "GPT-2's form"])

    @minigpt.dataclass
    class NewConfig(ModelConfig):
        memory_tokens: int = 0

    monkeypatch.setattr(minigpt, "ModelConfig", NewConfig)
    for form, settings in ((minigpt.GPT2_FORM, SMALL), (minigpt.QWEN3_FORM, {**SMALL, **QWEN3})):
        minigpt.refuse_settings(NewConfig(**settings), "a", form)
        with pytest.raises(UserError, match="memory_tokens=2: a's form needs 0"):
            minigpt.refuse_settings(NewConfig(**settings, memory_tokens=2), "a", form)

@pytest.mark.parametrize("form, changes", EXPORTED)
def test_the_converted_tensors_compute_the_same_by_the_formulas_of_the_form(form, changes):
    """GPT-2 and Qwen3 are written out above, in float64, and know nothing of LayerNorm without a
    bias or of squared ReLU. Would fail for a matrix that is not transposed, for heads that are
    mixed up, for a term of the residual stream that is not centred, for a head that is, and for
    gate and up in each other's place."""
    model = small_model(n_embd=24, block_size=16, **changes).float().double().eval()
    idx = random_ids(2, 16)
    convert = minigpt.to_gpt2 if form == "GPT-2" else minigpt.to_qwen3
    formula = gpt2_formula if form == "GPT-2" else qwen3_formula
    logits = formula(*convert(model), idx)
    assert largest_difference(logits, model(idx)[0]) < 1e-5  # the tensors are in float32

def test_the_epsilons_keep_their_weight_when_heads_are_added():
    """With a stream, queries and keys so small that the epsilons of all norms matter. The wider
    stream and the doubled heads have other means of squares, so the epsilons must follow."""
    model = small_model(n_embd=24, block_size=16, **dict(LAPTOP, prev_heads=1)).float().double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "lm_head" not in name:
                p.mul_(0.01)
    idx = random_ids(2, 16)
    logits = qwen3_formula(*minigpt.to_qwen3(model.eval()), idx)
    assert largest_difference(logits, model(idx)[0]) < 1e-5

@pytest.mark.parametrize("changes", [QWEN3, dict(LAPTOP, prev_heads=1)])
def test_an_mlp_of_qwen3s_form_is_filled_up_to_groups_of_32(tmp_path, changes):
    """q8_0 packs rows in groups of 32 numbers. 2.3 times 64 channels, or two thirds of that for
    SwiGLU, is no multiple of 32. The added units give zero, so the model is the same. Fails if they
    are left out or add something."""
    changes = dict(changes, n_embd=64, mlp_ratio=2.3)
    model = small_model(**changes).float().double().eval()
    width = model.h[0].mlp.c_proj.in_features
    config, tensors = minigpt.to_qwen3(model)
    assert width % 32 and config["intermediate_size"] == (width + 31) // 32 * 32
    idx = random_ids(2, 8)
    assert largest_difference(qwen3_formula(config, tensors, idx), model(idx)[0]) < 1e-5
    pytest.importorskip("gguf")
    save_model(tmp_path, CharTokenizer.train("abc"), **changes)
    assert export_gguf(tmp_path, "--gguf_type", "q8_0").exists()

def test_the_exported_settings_have_the_dropout_of_the_model():
    """Someone who trains the model on needs it, in all the places where it acts. Fails if one of
    them has another share."""
    config, _ = minigpt.to_gpt2(small_model(dropout=0.3))
    assert [config[f"{place}_pdrop"] for place in ("resid", "embd", "attn")] == [0.3] * 3
    for changes in (QWEN3, dict(LAPTOP, prev_heads=1)):
        config, _ = minigpt.to_qwen3(small_model(dropout=0.3, **changes))
        assert config["attention_dropout"] == 0.3

@pytest.mark.parametrize("name", minigpt.PRESETS)
def test_every_preset_but_the_bigram_has_a_form(tmp_path, name):
    """A preset that nothing else can run would have to be trained again for another program."""
    pytest.importorskip("safetensors")
    smaller = {"n_layer": 1, "n_head": 2, "n_embd": 24, "block_size": 16, "dropout": 0.0}
    model = {**minigpt.PRESETS[name].model, **smaller}
    save_model(tmp_path, CharTokenizer.train("abc"), **model)
    code, out, err = run_main("--mode", "export", "--out_dir", tmp_path)
    if name == "bigram":
        check_mistake(code, out, err, ["bigram"])
        assert not (tmp_path / "hf").exists()
        return
    form = {"laptop": "qwen3", "modern": "qwen3"}.get(name, "gpt2")
    assert code == 0, err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == form

@pytest.mark.parametrize("named, changes", [
    ("block=post", dict(block="post")), ("block=post", dict(QWEN3, block="post")),
    ("block=shift", dict(LAPTOP, block="shift")), ("block=shift", dict(block="shift")),
    ("norm=none", dict(norm="none")), ("norm=none", dict(QWEN3, norm="none")),
    ("norm=rmsnorm", dict(norm="rmsnorm")),
    ("qk_norm=True", dict(qk_norm=True, attention="extended")),
    ("activation=relu2", dict(activation="relu2")),
    ("activation=swiglu", dict(activation="swiglu", bias=False)),
    ("activation=gelu", dict(QWEN3, activation="gelu")), ("bias=True", dict(QWEN3, bias=True)),
    ("qk_norm=False", dict(QWEN3, qk_norm=False)),
    ("prev_heads=1", dict(prev_heads=1, attention="extended")),
    ("n_embd / n_head is 2", dict(LAPTOP, prev_heads=1, n_head=12))])
def test_a_setting_that_no_form_holds_is_refused(tmp_path, named, changes):
    """Otherwise another program would compute something else without a word. The line names the
    setting that stands in the way, and nothing is written."""
    pytest.importorskip("safetensors")
    save_model(tmp_path, CharTokenizer.train("abc"), **changes)
    form = "Qwen3" if changes.get("pos") == "rope" else "GPT-2"
    check_mistake(*run_main("--mode", "export", "--out_dir", tmp_path), [named, form])
    assert os.listdir(tmp_path) == ["best.pt"]

# ---- Exchange: against the library itself --------------------------------------------------------
@pytest.fixture(scope="module")
def transformers():
    """The library, without its bars of progress and without the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        library = pytest.importorskip("transformers")
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
        yield library

@pytest.mark.parametrize("form, changes", EXPORTED)
def test_transformers_computes_the_same_from_an_exported_folder(transformers, tmp_path, form,
                                                                changes):
    """The library loads the folder without any code of ours: every tensor finds its place, the
    logits and the greedy text are equal, and an end is only where there is one. Would fail for an
    angle or an activation of another model."""
    tokenizer = CharTokenizer.train(LETTERS)
    model = save_model(tmp_path, tokenizer, **changes)
    folder = export(tmp_path)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(theirs).__name__ == {"GPT-2": "GPT2LMHeadModel", "Qwen3": "Qwen3ForCausalLM"}[form]
    assert all(p.dtype == torch.float32 for p in theirs.parameters())
    idx = random_ids(2, 16, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        assert largest_difference(theirs(idx).logits, model(idx)[0]) < 1e-4
    text = theirs.generate(idx[:1, :5], max_new_tokens=9, do_sample=False)
    assert torch.equal(text, model.generate(idx[:1, :5], 9, temperature=0))
    settings = theirs.generation_config
    assert settings.eos_token_id is settings.bos_token_id is settings.pad_token_id is None
    assert settings.max_length == 16 and settings.do_sample
    assert settings.temperature == 0.8 and settings.top_k == 0

def test_characters_have_the_same_ids_in_transformers(transformers, tmp_path):
    """Would fail if the library added a token, split a text, or cleaned up spaces."""
    tokenizer = CharTokenizer.train(LETTERS)
    save_model(tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(export(tmp_path))
    assert set(theirs("to be")) == {"input_ids", "attention_mask"}
    for text in AWKWARD:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert len(theirs) == tokenizer.vocab_size and theirs.model_max_length == 16

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_transformers_writes_several_texts_side_by_side(transformers, tmp_path, bpe, kind):
    """Shorter prompts are filled up on the left with a token that the mask hides. Each text is the
    one that is written alone. With characters, the token that fills up is an ordinary one. Would
    fail if it were dropped from texts because it counts as special."""
    tokenizer = CharTokenizer.train(LETTERS) if kind == "char" else bpe
    save_model(tmp_path, tokenizer, block_size=64)
    folder = export(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    last = tokenizer.itos[-1] if kind == "char" else "z"
    text = f"{last}{last} to be\n, or {last}n"
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = dict(max_length=None, max_new_tokens=9, do_sample=False)
    write = transformers.pipeline("text-generation", model=model, tokenizer=theirs)
    prompts = [text, "be", f"to{last}"]
    alone = [write(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    together = [texts[0]["generated_text"] for texts in write(prompts, batch_size=3, **settings)]
    assert together == alone and all(map(str.startswith, alone, prompts))
    batch = theirs(prompts, padding=True, return_tensors="pt")
    ids = model.generate(**batch, **settings)
    assert theirs.batch_decode(ids[:, batch["input_ids"].shape[1] :]) == [
        written[len(prompt) :] for written, prompt in zip(alone, prompts)]

def test_byte_pairs_have_the_same_ids_in_transformers(transformers, tmp_path, bpe):
    """For every text, and with the token that ends one, which a pipeline then uses."""
    save_model(tmp_path, bpe)
    folder = export(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    characters = assigned_characters()
    mixtures = ["".join(rng.choices("ab \n\t'sdtelv3é,.", k=20)) +
                "".join(rng.choices(characters, k=10)) for _ in range(500)]
    texts = [*AWKWARD, "I'll  go<|endoftext|> now \n", "'tis we'RE\r\n 's", *mixtures,
             SAMPLE.read_text(encoding="utf-8")[:20_000]]
    for text in texts:
        assert theirs(text)["input_ids"] == bpe.encode(text)
    assert theirs.decode(bpe.encode("café , 'tis ")) == "café , 'tis "
    assert theirs.eos_token_id == theirs.bos_token_id == bpe.end_id
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == bpe.end_id
    write = transformers.pipeline("text-generation", str(folder))
    assert write("the", max_new_tokens=3)[0]["generated_text"].startswith("the")

def test_eight_bits_change_the_loss_of_an_exported_laptop_little(transformers, tmp_path):
    """PyTorch's dynamic quantization rounds the weights of a layer, and the vectors that it reads,
    by one scale each. A previous-position head reads a constant. Would fail if that, or the weights
    that read it, were much larger or smaller than the rest: one of the two would be rounded to 0,
    and the loss would rise by 0.5 and more."""
    train_tiny(tmp_path, "--data", SAMPLE, "--n_layer", "1", "--n_embd", "128", "--block_size",
               "64", "--max_steps", "60", "--batch_size", "8", "--grad_accum", "1",
               "--eval_interval", "60", "--dropout", "0", "--checkpoint_interval", "0")
    tokenizer = model_of(tmp_path / "best.pt")[1]
    corpus = Corpus.from_text(SAMPLE.read_text(encoding="utf-8"), tokenizer)
    x, y = minigpt.cut_windows(corpus.val, 64, torch.arange(0, 64 * 50, 64))
    model = transformers.AutoModelForCausalLM.from_pretrained(export(tmp_path))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # there is a newer way, in a package of its own
        rounded = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        loss, in_8_bits = (minigpt.cross_entropy(m(x).logits, y).item() for m in (model, rounded))
    assert loss < 2.3 and abs(in_8_bits - loss) < 0.01

# ---- Exchange: writing the folder ----------------------------------------------------------------
@pytest.mark.parametrize("problem", [OSError(28, "No space left on device", "x"),
                                     KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_export_leaves_nothing_behind(tmp_path, monkeypatch, problem, exists):
    """Another program would load half a folder, or stop at it. An empty folder stays empty."""
    pytest.importorskip("safetensors")
    save_model(tmp_path, CharTokenizer.train("abc"))
    if exists:
        (tmp_path / "hf").mkdir()

    def fail(self, data):
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        code, out, err = run_main("--mode", "export", "--out_dir", tmp_path)
    if isinstance(problem, OSError):
        check_mistake(code, out, err, ["No space left on device"])
    assert code == (2 if isinstance(problem, OSError) else 130) and out == ""
    assert sorted(os.listdir(tmp_path)) == (["best.pt", "hf"] if exists else ["best.pt"])
    assert not exists or os.listdir(tmp_path / "hf") == []
    assert len(os.listdir(export(tmp_path))) >= 5  # and the next try succeeds

def test_an_export_never_overwrites(tmp_path):
    """A folder with anything in it is refused and stays as it is; an empty one is used."""
    save_model(tmp_path, CharTokenizer.train("abc"))
    (tmp_path / "hf").mkdir()
    folder = export(tmp_path)
    (folder / "mine.txt").write_text("mine")
    before = contents(folder)
    refused = run_main("--mode", "export", "--out_dir", tmp_path)
    check_mistake(*refused, [f"--export_dir {folder}", "not empty"])
    assert contents(folder) == before
    code, out, err = run_main("--mode", "export", "--out_dir", tmp_path, "--export_dir",
                              tmp_path / "a" / "b")
    assert code == 0 and str(tmp_path / "a" / "b") in out, err
    assert "config.json" in os.listdir(tmp_path / "a" / "b")

@POSIX
def test_exported_files_follow_the_umask(tmp_path):
    """A group that may read the user's files may read these, too. Would fail for a folder made by
    tempfile, which is private."""
    save_model(tmp_path, CharTokenizer.train("abc"))
    old = os.umask(0o027)
    try:
        folder = export(tmp_path)
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}

@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names or links")
@pytest.mark.parametrize("name", [".", "../link", os.fsdecode(b"h\xe9")])
def test_folders_of_all_kinds_can_be_exported_to(tmp_path, monkeypatch, name):
    """`.` has no name of its own to add .partial to. Behind a link, the folder is filled, and the
    link stays. Linux allows any bytes in a name; the library that writes the weights does not."""
    pytest.importorskip("safetensors")
    save_model(tmp_path, CharTokenizer.train("abc"))
    (tmp_path / "here").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = run_main("--mode", "export", "--out_dir", tmp_path, "--export_dir", name)
    assert code == 0 and (tmp_path / "link").is_symlink(), err
    assert (tmp_path / "here" / name / "model.safetensors").stat().st_size > 0

@pytest.mark.parametrize("mode", ["export", "eval"])
def test_without_safetensors_there_is_one_line(tmp_path, monkeypatch, mode):
    """The package is needed for the exchange alone, so many users do not have it."""
    save_model(tmp_path, CharTokenizer.train("abc"))
    argv = ["--mode", mode, "--out_dir", tmp_path]
    if mode == "eval":
        argv += ["--checkpoint", export(tmp_path), "--data", SHORT]
    def find_spec(name, path=None, target=None):
        if name == "safetensors":
            raise ModuleNotFoundError("No module named 'safetensors'", name=name)

    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    finder = types.SimpleNamespace(find_spec=find_spec)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    line = "safetensors is not installed, but it is needed: pip install safetensors"
    check_mistake(*run_main(*argv), [line])
    assert mode == "eval" or not (tmp_path / "hf").exists()

# ---- Exchange: a GGUF file -----------------------------------------------------------------------
class LlamaCpp:
    """llama.cpp, which has loaded a GGUF file."""
    def __init__(self, path, n_ctx):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = n_ctx, 1, 0, 0
        params.warmup = False
        self.server = xllamacpp.Server(params)
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy must not be asked for a local address

    def ask(self, what, **question):
        url = f"{self.server.listening_address}/{what}"
        return self.session.post(url, json=question, timeout=60).json()

    def encode(self, text):
        return self.ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def write(self, ids, n):
        """The next n tokens, and for each of them the five most likely with their logarithms."""
        answer = self.ask("completion", prompt=ids, n_predict=n, temperature=0, n_probs=5,
                          return_tokens=True)
        likeliest = [{guess["id"]: guess["logprob"] for guess in place["top_logprobs"]}
                     for place in answer["completion_probabilities"]]
        return answer["tokens"], likeliest

def export_gguf(folder, *argv):
    """Exports folder/best.pt. Returns the file."""
    pytest.importorskip("gguf")
    code, out, err = run_main("--mode", "export", "--format", "gguf", "--out_dir", folder, *argv)
    assert code == 0, err
    assert str(folder / "model.gguf") in out
    return folder / "model.gguf"

@pytest.mark.parametrize("form, changes", EXPORTED)
def test_llama_cpp_computes_the_same_from_a_gguf_file(tmp_path, form, changes):
    """Greedy text and the largest log-probabilities are equal, up to llama.cpp's own rounding of
    some thousandths. Would fail for a tensor under another name or a matrix that is transposed. (An
    epsilon hardly changes what is written, so the fields have a test of their own.)"""
    tokenizer = CharTokenizer.train(LETTERS)
    model = save_model(tmp_path, tokenizer, **{"n_embd": 64, **changes})
    path = export_gguf(tmp_path)
    ids = [0, 1, 2, 3]
    expected = model.generate(torch.tensor([ids]), 8, temperature=0)
    tokens, likeliest = LlamaCpp(path, 16).write(ids, 8)
    assert tokens == expected[0, 4:].tolist()
    with torch.no_grad():
        logprobs = model(expected[:, :-1])[0][0, 3:].log_softmax(-1)
    for theirs, ours in zip(likeliest, logprobs):
        for i, logprob in theirs.items():
            assert logprob == pytest.approx(ours[i].item(), abs=0.05)

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_llama_cpp_has_the_same_tokens(tmp_path, bpe, kind):
    """For characters that its tokenizer treats as escapes, too; and only byte pairs have a token
    that ends a text. Would fail if a token were added in front."""
    odd = "\0\t\n\r\x1b \\ntx'\"é漢😀\u2028▁ĠĊabc"
    tokenizer = CharTokenizer.train(odd) if kind == "char" else bpe
    save_model(tmp_path, tokenizer, n_embd=32)
    path = export_gguf(tmp_path)
    llama = LlamaCpp(path, 16)
    texts = [odd, odd[::-1], "  a  ", "\\n", "abc" * 20]
    if kind == "bpe":
        texts += ["I'll  go<|endoftext|> now\n\n 's", SAMPLE.read_text(encoding="utf-8")[:5000]]
    for text in texts:
        assert llama.encode(text) == tokenizer.encode(text)

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_llama_cpp_chats_by_passing_the_text_on(tmp_path, bpe, kind):
    """Chat clients send messages. The template of the file joins their texts and adds nothing, so
    the answer is the continuation. Without a template, llama.cpp takes one whose marks consist of
    characters that the model does not know."""
    pytest.importorskip("gguf")
    tokenizer = CharTokenizer.train(LETTERS) if kind == "char" else bpe
    model = save_model(tmp_path, tokenizer, n_embd=64, block_size=32)
    llama = LlamaCpp(export_gguf(tmp_path), 32)
    messages = [("user", "to be"), ("assistant", ", or "), ("user", "not")]
    answer = llama.ask("v1/chat/completions", temperature=0, max_tokens=8,
                       messages=[{"role": role, "content": text} for role, text in messages])
    ids = torch.tensor([tokenizer.encode("to be, or not")])
    written = model.generate(ids, 8, temperature=0)[0, ids.shape[1] :]
    text = tokenizer.decode(written.tolist()).partition("<|endoftext|>")[0]
    assert answer["choices"][0]["message"]["content"] == text

@pytest.mark.parametrize("form, kind, number", [("GPT-2", "f32", 0), ("Qwen3", "f16", 1),
                                                ("GPT-2", "bf16", 32), ("Qwen3", "q8_0", 7)])
def test_the_fields_of_a_gguf_file_are_the_settings_of_the_folder(tmp_path, monkeypatch, form, kind,
                                                                 number):
    """llama.cpp builds the model from them, and a slip in a small one, such as an epsilon, would
    show in no text. (In Qwen3's form, a model with previous-position heads has another width, other
    heads and another epsilon than here.) The type of the file is a number of llama.cpp. Fails if a
    field is missing or has the value of another one."""
    gguf = pytest.importorskip("gguf")
    tokenizer = CharTokenizer.train("abc")
    changes = {} if form == "GPT-2" else dict(LAPTOP, prev_heads=1)
    model = save_model(tmp_path, tokenizer, n_embd=32, mlp_ratio=5.0, n_layer=3, **changes)
    path = export_gguf(tmp_path, "--gguf_type", kind)
    found = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    config, _ = minigpt.to_gpt2(model) if form == "GPT-2" else minigpt.to_qwen3(model)
    if form == "GPT-2":
        expected = {
            "context_length": config["n_positions"], "embedding_length": config["n_embd"],
            "block_count": config["n_layer"], "feed_forward_length": config["n_inner"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"]}
    else:
        expected = {
            "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"], "block_count": config["num_hidden_layers"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": config["num_attention_heads"],
            "attention.head_count_kv": config["num_key_value_heads"],
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
            "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
            "rope.freq_base": config["rope_theta"]}
    architecture = config["model_type"]
    settings = {name.removeprefix(f"{architecture}."): value for name, value in found.items()
                if name.startswith(f"{architecture}.")}
    assert settings == pytest.approx(expected)
    assert found["general.architecture"] == architecture
    assert found["general.file_type"] == number
    template = minigpt.tokenizer_files(tokenizer)["tokenizer_config.json"]["chat_template"]
    assert found["tokenizer.chat_template"] == template
    assert found["tokenizer.ggml.tokens"] == tokenizer.itos

@pytest.mark.parametrize("kind, worst", [("f32", 0.0), ("f16", 2**-11), ("bf16", 2**-8),
                                         ("q8_0", 1 / 127)])
def test_a_gguf_file_holds_the_tensors_of_the_folder(tmp_path, kind, worst):
    """Under the names that the package gguf knows, matrices in the type that was asked for, gains
    in float32."""
    gguf = pytest.importorskip("gguf")
    for form, changes in (("GPT-2", {}), ("Qwen3", dict(LAPTOP, prev_heads=1))):
        (tmp_path / form).mkdir()
        model = save_model(tmp_path / form, CharTokenizer.train("abc"), n_embd=32, **changes)
        path = export_gguf(tmp_path / form, "--gguf_type", kind)
        convert = minigpt.to_gpt2 if form == "GPT-2" else minigpt.to_qwen3
        config, tensors = convert(model)
        known = gguf.get_tensor_name_map(
            gguf.MODEL_ARCH.GPT2 if form == "GPT-2" else gguf.MODEL_ARCH.QWEN3, 8)
        written = {t.name: t for t in gguf.GGUFReader(path).tensors}
        for name, w in tensors.items():
            prefix = "transformer." if form == "GPT-2" else ""
            t = written.pop(known.get_name(prefix + name, (".weight", ".bias")))
            values = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
            if form == "GPT-2" and ".c_" in name and w.dim() == 2:
                w = w.t()
            is_packed = w.dim() == 2 and name != "wpe.weight"
            assert t.tensor_type.name.lower() == (kind if is_packed else "f32")
            limit = worst * w.abs().max().item() if is_packed else 0
            assert (values - w).abs().max().item() <= limit
        assert not written

def test_what_a_gguf_file_cannot_hold_is_refused_before_it_is_written(tmp_path):
    """Rows that q8_0 cannot pack, and byte pairs without merges, which llama.cpp does not load."""
    pytest.importorskip("gguf")
    command = ["--mode", "export", "--format", "gguf", "--out_dir", tmp_path, "--export_dir",
               tmp_path / "new"]
    save_model(tmp_path, CharTokenizer.train("abc"), n_embd=20)
    check_mistake(*run_main(*command, "--gguf_type", "q8_0"), ["--gguf_type q8_0", "20", "f16"])
    save_model(tmp_path, BPETokenizer([]), n_embd=20)
    check_mistake(*run_main(*command), ["--format gguf", "merges", "--bpe_size"])
    assert os.listdir(tmp_path) == ["best.pt"]

@pytest.mark.parametrize("block_size", [1, 2])
def test_a_very_short_window_can_be_exported_with_previous_position_heads(tmp_path, block_size):
    """With one position, there is no other one to be told apart from."""
    model = save_model(tmp_path, CharTokenizer.train("abc"), **LAPTOP, prev_heads=1,
                       block_size=block_size)
    idx = torch.ones(1, block_size, dtype=torch.long)
    with torch.no_grad():
        logits = model.double()(idx)[0]
    assert_close(qwen3_formula(*minigpt.to_qwen3(model), idx), logits, 1e-4)

def test_a_failed_gguf_export_leaves_nothing_behind(tmp_path, monkeypatch):
    """A file that exists is not overwritten; a disk that is full leaves no part of one."""
    gguf = pytest.importorskip("gguf")
    save_model(tmp_path, CharTokenizer.train("abc"), n_embd=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.gguf").write_text("mine")
    command = ["--mode", "export", "--format", "gguf", "--out_dir", tmp_path]
    check_mistake(*run_main(*command, "--export_dir", tmp_path / "mine"),
                  ["model.gguf", "exists", "--export_dir"])
    assert (tmp_path / "mine" / "model.gguf").read_text() == "mine"

    def fail(self, progress=False):
        raise OSError(28, "No space left on device", "x")

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
        check_mistake(*run_main(*command), ["No space left on device"])
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "mine"]
    export_gguf(tmp_path)  # and the next try succeeds

# ---- Exchange: reading a GPT-2 -------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("changes", [
    {}, dict(tie_weights=False, mlp_ratio=5.0, n_head=4), dict(pos="sinusoidal")])
def test_an_exported_folder_comes_back_bit_for_bit(tmp_path, bpe, kind, changes):
    """Where nothing had to be filled up, reading is the exact opposite of writing. Written once
    more, the files are the same."""
    tokenizer = bpe if kind == "bpe" else CharTokenizer.train(LETTERS)
    model = save_model(tmp_path, tokenizer, **changes)
    folder = export(tmp_path)
    loaded = minigpt.read_model(folder)
    again, back = loaded.model, loaded.tokenizer
    assert_same(again.state_dict(), model.state_dict())
    assert back.state == tokenizer.state and back.kind == kind
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_ratio", "dropout",
                 "tie_weights"):
        assert getattr(again.config, name) == getattr(model.config, name)
    second = tmp_path / "second"
    code, _, err = run_main("--mode", "export", "--checkpoint", folder, "--export_dir", second)
    assert code == 0, err
    files = {path.name: data for path, data in contents(folder).items()}
    assert {path.name: data for path, data in contents(second).items()} == files

def test_what_was_filled_up_comes_back_as_the_same_function(tmp_path):
    """Zeros for missing biases and hidden units change nothing: GELU(0) = 0."""
    model = save_model(tmp_path, CharTokenizer.train(LETTERS), bias=False, mlp_ratio=2.3)
    again = minigpt.read_model(export(tmp_path)).model
    idx = random_ids(2, 16)
    assert again.config.mlp_ratio == 4 and again.config.bias
    assert largest_difference(again.eval()(idx)[0], model(idx)[0]) < 1e-5

def test_byte_pairs_are_read_from_the_librarys_own_file_as_well(tmp_path, bpe):
    """Newer folders have tokenizer.json only, in which a merge is a str or a pair."""
    save_model(tmp_path, bpe)
    folder = export(tmp_path)
    (folder / "merges.txt").unlink()
    assert minigpt.read_tokenizer(folder).merges == bpe.merges
    theirs = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    theirs["model"]["merges"] = [merge.split(" ") for merge in theirs["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(theirs), encoding="utf-8")
    assert minigpt.read_tokenizer(folder).merges == bpe.merges

@pytest.mark.parametrize("changes", [
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    {"pre_tokenizer": {"type": "Whitespace"}}, {"pre_tokenizer": None},
    {"model": "another order"},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
    {"normalizer": {"type": "Lowercase"}},
    {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}])
def test_a_tokenizer_with_other_rules_is_refused(tmp_path, bpe, changes):
    """It would give other ids for the same text, and the model would read nonsense."""
    save_model(tmp_path, bpe)
    folder = export(tmp_path)
    (folder / "merges.txt").unlink()
    theirs = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if changes == {"model": "another order"}:
        vocab = theirs["model"]["vocab"]
        vocab["!"], vocab["#"] = vocab["#"], vocab["!"]
    else:
        theirs |= changes
    (folder / "tokenizer.json").write_text(json.dumps(theirs), encoding="utf-8")
    refused = run_main("--mode", "eval", "--checkpoint", folder, "--data", SHORT)
    check_mistake(*refused, [str(folder), "tokenizer.json", "as GPT-2 does"])

def save_gpt2(transformers, folder, base=False, shards="500KB", dtype=None, **changes):
    """A GPT-2 as the library writes it, with GPT-2's own two files for the tokenizer."""
    tokenizer = BPETokenizer.train(SHORT.read_text(encoding="utf-8"), 300)
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**dict(
        vocab_size=300, n_positions=32, n_embd=96, n_layer=3, n_head=3, initializer_range=0.2,
        bos_token_id=tokenizer.end_id, eos_token_id=tokenizer.end_id), **changes})
    model = transformers.GPT2LMHeadModel(config).eval()
    if dtype is not None:
        model.to(dtype)
    saved = model.transformer if base else model  # without the head, names have no prefix
    saved.save_pretrained(folder, max_shard_size=shards)
    tokenizer.save(folder)
    return model.float(), tokenizer

def check_same_gpt2(theirs, folder):
    """Our model from the folder, which must have the logits of the library's."""
    ours = minigpt.read_model(folder).model
    idx = random_ids(2, 32, vocab_size=300)
    with torch.no_grad():
        assert largest_difference(ours.eval()(idx)[0], theirs(idx).logits[..., :300]) < 1e-4
    return ours

@pytest.mark.parametrize("changes", [
    {}, dict(tie_word_embeddings=False, n_inner=60, resid_pdrop=0.3), dict(n_inner=500, n_head=1),
    dict(n_inner=29, n_embd=100, n_head=2),
    dict(n_inner=49, n_embd=98, n_head=1), dict(activation_function="gelu_pytorch_tanh"),
    dict(activation_function="gelu"),
    dict(n_inner=15, n_embd=44, n_head=2, n_positions=64), dict(base=True), dict(shards="5GB"),
    dict(dtype=torch.float16), dict(dtype=torch.bfloat16, base=True)])
def test_a_gpt2_of_the_library_computes_the_same_here(transformers, tmp_path, changes):
    """In several files or one, with the prefix of its names or without, in 16 bits, with a head of
    its own, with an MLP of any width. Would fail if a size or the tying were not read."""
    theirs, tokenizer = save_gpt2(transformers, tmp_path, **changes)
    if not changes:
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = check_same_gpt2(theirs, tmp_path)
    assert ours.config.dropout == theirs.config.resid_pdrop
    assert ours.config.block_size == theirs.config.n_positions
    assert ours.config.attention == "fused"
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert minigpt.read_tokenizer(tmp_path).merges == tokenizer.merges

def test_every_width_of_an_mlp_can_be_read():
    """The width is stored as a multiple of n_embd. int(29 / 1600 * 1600) is 28, one unit too few,
    because the quotient is rounded. Such a folder would be refused as damaged."""
    wrong = []
    for n_embd in (22, 26, 100):
        for hidden in range(2, 2 * n_embd):
            config = ModelConfig(3, n_head=1, n_embd=n_embd, mlp_ratio=hidden / n_embd)
            with torch.device("meta"):
                width = minigpt.MLP(config).c_fc.weight.shape[0]
            if width != hidden:
                wrong.append((hidden, n_embd))
    assert wrong == []

def test_rows_beyond_the_tokenizer_are_ignored_and_missing_ones_refused(transformers, tmp_path,
                                                                        capsys):
    """Tables are often made larger, to a multiple of 64. Such rows stand for no token, and a model
    that kept them could write them."""
    theirs, tokenizer = save_gpt2(transformers, tmp_path / "exact")
    theirs.resize_token_embeddings(320)
    theirs.save_pretrained(tmp_path / "more")
    tokenizer.save(tmp_path / "more")
    capsys.readouterr()
    ours = check_same_gpt2(theirs, tmp_path / "more")
    assert ours.config.vocab_size == 300
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "320" in said and "300" in said and "ignored" in said
    save_gpt2(transformers, tmp_path / "fewer", vocab_size=290)
    refused = run_main("--mode", "eval", "--checkpoint", tmp_path / "fewer", "--data", SHORT)
    check_mistake(*refused, ["300 tokens", "290"])

@pytest.fixture
def gpt2_folder(tmp_path, bpe):
    """A folder with a GPT-2, written without the library."""
    save_model(tmp_path, bpe, block_size=32)
    return export(tmp_path)

def change_config(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))

def change_tensors(folder, changes):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

def change_files(folder, changes):
    """Writes files, cuts off their ends, or deletes them."""
    for name, content in changes.items():
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, int):
            (folder / name).write_bytes((folder / name).read_bytes()[:content])
        else:
            (folder / name).write_text(content)

# What is wrong with a folder: what the line must name, and how the folder becomes like that.
WRONG_FOLDERS = [
    ("activation_function is relu,", change_config, dict(activation_function="relu")),
    ("layer_norm_epsilon is 0.001", change_config, dict(layer_norm_epsilon=1e-3)),
    ("scale_attn_by_inverse_layer_idx", change_config, dict(scale_attn_by_inverse_layer_idx=True)),
    ("scale_attn_weights", change_config, dict(scale_attn_weights=False)),
    ("add_cross_attention", change_config, dict(add_cross_attention=True)),
    ("model_type is llama", change_config, dict(model_type="llama")),
    ("model_type", change_config, dict(model_type=None)),
    ("config.json", change_config, dict(n_head=0)),
    ("config.json", change_config, dict(n_head=5)),
    ("config.json", change_config, dict(n_embd=0)),
    ("config.json", change_config, dict(n_embd=-4)),
    ("config.json", change_config, dict(n_layer=1.5)),
    ("config.json", change_config, dict(vocab_size=None)),
    ("config.json", change_config, dict(resid_pdrop=5)),
    ("ln_f.weight", change_tensors, {"ln_f.weight": None}),
    ("ln_f.weight", change_tensors, {"ln_f.weight": torch.ones(5)}),
    ("h.9.ln_1.weight", change_tensors, {"h.9.ln_1.weight": torch.ones(24)}),
    ("wte.weight", change_tensors, {"wte.weight": torch.ones(599, 24)}),
    ("damaged", change_files, {"model.safetensors": -100}),
    ("safetensors", change_files, {"model.safetensors": None, "pytorch_model.bin": "weights"}),
    ("model-00001-of-00002.safetensors", change_files, {
        "model.safetensors.index.json":
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'}),
    ("adapter", change_files, {"adapter_config.json": "{}"}),
    ("config.json", change_files, {"config.json": None}),
    ("config.json", change_files, {"config.json": '{"model_type":'}),
    ("config.json", change_files, {"config.json": '{"model_type": "gpt2"}'}),
    ("config.json", change_files, {"config.json": "[]"}),
    ("tokenizer.json", change_files, {"merges.txt": None, "tokenizer.json": None}),
    ("", change_files, {"merges.txt": None, "tokenizer.json": "{}"}),
    ("", change_files, {"merges.txt": "#version: 0.2\na b c\n"}),
    ("", change_files, {"vocab.json": '{"a":'})]

@pytest.mark.parametrize("named, change, changes", WRONG_FOLDERS)
def test_a_folder_that_is_damaged_or_computes_something_else_is_refused(gpt2_folder, named, change,
                                                                        changes):
    """Folders come from elsewhere and may be anything. A model with another setting would run here,
    with the same tensors and wrong results. The line names the folder and what is wrong with
    it."""
    change(gpt2_folder, changes)
    refused = run_main("--mode", "eval", "--checkpoint", gpt2_folder, "--data", SHORT)
    check_mistake(*refused, [str(gpt2_folder), named])

def test_our_own_qwen3_is_refused_in_words(tmp_path):
    """Reading is for GPT-2's form only; a Qwen3 of ours still has its best.pt."""
    save_model(tmp_path, CharTokenizer.train("abc"), **QWEN3)
    check_mistake(*run_main("--mode", "eval", "--checkpoint", export(tmp_path)), ["qwen3", "gpt2"])

def test_nothing_in_a_folder_is_executed(gpt2_folder, tmp_path, monkeypatch):
    """Neither code that config.json names nor a pickle, and not even if someone who is asked would
    say yes. The rest of the folder is used as ever."""
    was_here = tmp_path / "was_here"
    (gpt2_folder / "evil.py").write_text(f"open({str(was_here)!r}, 'w')")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (gpt2_folder / name).write_bytes(pickle.dumps(Evil(was_here)))
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    change_config(gpt2_folder, {"auto_map": classes})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    evaluate = ["--mode", "eval", "--checkpoint", gpt2_folder, "--data", SHORT]
    assert run_main(*evaluate)[0] == 0
    (gpt2_folder / "model.safetensors").unlink()
    check_mistake(*run_main(*evaluate), ["safetensors"])
    (tmp_path / "hf.pt").write_bytes(pickle.dumps(Evil(was_here)))
    check_mistake(*run_main("--mode", "eval", "--checkpoint", tmp_path / "hf.pt"), ["hf.pt"])
    assert not was_here.exists()

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_folder_is_used_as_a_checkpoint_is(tmp_path, bpe, kind, monkeypatch):
    """It writes, is scored and looked into with the results of the model that was exported, and a
    training run can begin with it. Its sizes and tokenizer cannot be changed; dropout may be."""
    monkeypatch.setattr(minigpt, "draw_curves", lambda *_: None)
    text = SHORT.read_text(encoding="utf-8")
    tokenizer = bpe if kind == "bpe" else CharTokenizer.train(text)
    save_model(tmp_path, tokenizer, block_size=32)
    folder = export(tmp_path)
    for argv in (["generate", "--prompt", "The", "--max_tokens", "9"], ["eval", "--data", SHORT],
                 ["inspect", "--prompt", "The tide"]):
        ours = run_main("--mode", *argv, "--out_dir", tmp_path)
        theirs = run_main("--mode", *argv, "--checkpoint", folder, "--out_dir", tmp_path)
        assert ours[0] == theirs[0] == 0, theirs[2]
        # The folder does not say which text its model was trained on.
        assert ours[1].replace("full validation split", "last tenth of the text") == theirs[1] != ""
    train = ["--mode", "train", "--init_from", folder, "--data", SHORT, "--learning_rate", "3e-3",
             "--max_steps", "6", "--sample_tokens", "0", "--preset", "laptop", "--batch_size", "2",
             "--eval_batches", "2", "--eval_interval", "3", "--dropout", "0.3", "--min_lr", "0"]
    succeed(*train, "--out_dir", tmp_path / "out")
    records = [r["val_loss"] for r in metrics_of(tmp_path / "out") if "val_loss" in r]
    assert records[-1] < records[0]
    state = load_checkpoint(tmp_path / "out" / "best.pt")
    assert state["model_config"]["dropout"] == 0.3 and state["train_config"]["tokenizer"] == kind
    for flag, value in (("--n_layer", "1"), ("--tokenizer", "gpt2"), ("--block_size", "16"),
                        ("--norm", "rmsnorm"), ("--no_bias", None)):
        typed = [flag] if value is None else [flag, value]
        check_mistake(*run_main(*train, "--out_dir", tmp_path / "x", *typed), ["--init_from has"])
    train[3] = tmp_path / "out" / "best.pt"  # a checkpoint of ours serves as well
    succeed(*train, "--out_dir", tmp_path / "more")
    first = metrics_of(tmp_path / "more")[0]
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(min(records), rel=1e-5)

# ---- A look inside -------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [
    {}, dict(attention="fused", tie_weights=False), dict(QWEN3, attention="fused"),
    dict(block="post"), dict(block="shift", norm="none")])
def test_a_look_inside_shows_the_models_own_predictions(changes):
    """Would fail if a layer were left out, or seen before its norm."""
    model = small_model(n_layer=3, **changes)
    idx = random_ids(1, 7)
    model.train()  # looking must switch it to eval
    probabilities, lens = minigpt.look_inside(model, idx)
    assert not model.training
    streams = []
    for block in model.h:
        block.register_forward_hook(lambda block, x, y: streams.append(y))
    with torch.no_grad():
        logits, _ = model(idx)
        assert_close(probabilities.double(), logits[0].softmax(-1), 1e-5)
        for p, x in zip(lens, [model.embed(idx, torch.arange(7)), *streams], strict=True):
            assert_close(p.double(), model.lm_head(model.ln_f(x[0, -1])).softmax(-1), 1e-5)
    assert_close(lens[-1], probabilities[-1], 1e-6)

def test_a_bigram_model_has_predictions_and_nothing_else_inside():
    """It has no layers. Would fail if a look inside relied on them."""
    model = small_model(model="bigram")
    idx = random_ids(1, 5)
    probabilities, lens = minigpt.look_inside(model, idx)
    assert lens == []
    assert_close(probabilities.double(), model.wte.weight[idx[0]].softmax(-1).detach(), 1e-6)

def test_inspect_prints_what_is_inside(tiny_run, tmp_path):
    """The logarithms of the probabilities that it prints sum to the loss, and the likeliest tokens
    come in order. Of a long prompt, the end is shown, and of none, the start of a text."""
    text = "THE TIDE: me\nO"
    shutil.copy(tiny_run[0] / "best.pt", tmp_path)
    argv = ["--mode", "inspect", "--out_dir", tmp_path, "--prompt", text]
    code, out, err = run_main(*argv)
    assert code == 0, err
    model, tokenizer = model_of(tmp_path / "best.pt")
    ids = tokenizer.encode(text)
    idx = torch.tensor([ids])
    loss = model.eval()(*pair(idx))[1].item()
    probabilities, lens = minigpt.look_inside(model, idx)
    given = [p[i].item() for p, i in zip(probabilities, ids[1:])]
    assert -sum(map(math.log, given)) / len(given) == pytest.approx(loss, abs=1e-4)
    starts = [f"{token!r:>10} {p:.3f} {'#' * round(10 * p):10}"
              for token, p in zip(text[1:], given)]
    starts += ["next, after embedding:", "next, after layer 0:"]
    expected = [*probabilities[:-1], *lens]
    for line, start, p in zip(out.splitlines(), starts, expected, strict=True):
        likeliest = [f"  {tokenizer.decode([i])!r} {p[i]:.2f}" for i in p.topk(5).indices.tolist()]
        assert line == start + "".join(likeliest) and len(line) <= 80
    for prompt, lines in (("", 2), ("T", 2), (100 * text, 15 + 2)):  # its window has 16 tokens
        code, out, err = run_main(*argv[:-1], prompt)
        assert code == 0 and out.count("\n") == lines, err
    check_mistake(*run_main(*argv[:-1], "ï"), ["--prompt", "'ï'"])

def test_tokens_that_are_half_a_character_are_told_apart(tmp_path):
    """With byte pairs, a token may be some of the bytes of a character. `decode` makes the same
    replacement sign of all of them. inspect prints the bytes."""
    tokenizer = BPETokenizer([(b"\xe4", b"\xb8")])
    ids = [tokenizer.tokens.index(token) for token in (b"a", b"\n", b"\xe4\xb8", b"\xb8")]
    shown = ["'a'", "'\\n'", r"'\xe4\xb8'", r"'\xb8'"]
    assert [minigpt.show_token(tokenizer, i) for i in ids] == shown
    save_model(tmp_path, tokenizer, block_size=16)
    code, out, err = run_main("--mode", "inspect", "--out_dir", tmp_path, "--prompt", "a中b")
    assert code == 0 and "\ufffd" not in out, err
    assert [line.split()[0] for line in out.splitlines()[:3]] == [r"'\xe4\xb8'", r"'\xad'", "'b'"]

# ---- A page that holds the model -----------------------------------------------------------------
NODE = shutil.which("node")
PAGE_SCRIPT = r"""
const fs = require("fs");
const parts = (file) => {
  const page = fs.readFileSync(file, "utf8");
  const code = page.match(/<script id="model">([^]*?)<\/script>/)[1];
  return [code, ...page.match(/id="data" data-check="(\d+)">([^]*?)<\/script>/).slice(1)];
};
const [code] = parts(process.argv[2]);
(0, eval)(code + "; globalThis.page = { open, Reader, distribution, draw, ranked, halfToNumber }");
const opened = (file) => { const [, check, text] = parts(file); return page.open(text, check); };
const plain = (_, value) => ArrayBuffer.isView(value) ? [...value] : value;
const print = (value) => console.log(JSON.stringify(value, plain));
"""

def in_node(script, *argv):
    """Runs a script that may use the functions of the page argv[0]. Returns what it prints."""
    if NODE is None:
        pytest.skip("node is not installed, so no page was computed")
    done = subprocess.run([NODE, "-e", PAGE_SCRIPT + script, "-", *map(str, argv)], text=True,
                          capture_output=True, timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

def page_of(path, model, tokenizer=None, prompt=""):
    """Writes the page of a model."""
    tokenizer = tokenizer or CharTokenizer(list("\n" + string.ascii_letters)[:11])
    used = minigpt.LoadedModel(model, tokenizer, 1, {}, tokenizer.kind, tokenizer.vocab_size)
    ids = tokenizer.encode(prompt) or [tokenizer.first_id]
    minigpt.write_page(path, minigpt.page_data(used, prompt, ids))
    return path

def inside_of(model, idx):
    """The residual streams (T, C), the attention weights (nh, T, T) of each layer and the parts of
    the stream (T, C), by name, of a model that reads idx (1, T)."""
    streams, parts, weights = [model.embed(idx, torch.arange(idx.shape[1]))[0]], {}, []
    parts["embedding"] = streams[0]
    seen = {}
    for block in model.h:
        for part in (block.attn, block.attn.c_proj, block.mlp):
            part.register_forward_hook(lambda part, x, y: seen.update({part: (x[0], y)}))
    for i, block in enumerate(model.h):
        streams.append(block(streams[-1][None])[0])
        attention = block.attn
        if type(attention) is minigpt.CausalSelfAttention:
            attention = minigpt.Attention(model.config).double()
            attention.load_state_dict(block.attn.state_dict())
        q, k, _ = attention.heads(seen[block.attn][0])
        weights.append(attention.weights(q, k)[0])
        heads = seen[block.attn.c_proj][0][0]  # (T, (nh + prev_heads) hs)
        matrix = block.attn.c_proj.weight
        for head, start in enumerate(range(0, heads.shape[1], block.attn.head_size)):
            columns = slice(start, start + block.attn.head_size)
            kind, number = "head", head
            if head >= model.config.n_head:
                kind, number = "previous-position head", head - model.config.n_head
            parts[f"layer {i}, {kind} {number}"] = heads[:, columns] @ matrix[:, columns].T
        if block.attn.c_proj.bias is not None:
            parts[f"layer {i}, attention's bias"] = block.attn.c_proj.bias.expand_as(streams[0])
        parts[f"layer {i}, MLP"] = seen[block.mlp][1][0]
    return streams, weights, parts

def expected_shares(model, stream, parts, target):
    """What each part (C,) adds to the logit of a token, relative to the mean of all logits."""
    norm, table = model.ln_f, model.lm_head.weight
    direction = table[target] - table.mean(0)
    centred = isinstance(norm, minigpt.LayerNorm)
    scale = 1
    if not isinstance(norm, torch.nn.Identity):
        spread = stream - stream.mean() if centred else stream
        scale = norm.weight / (spread.square().mean() + 1e-5).sqrt()
    found = {name: ((part - part.mean() if centred else part) * scale @ direction).item()
             for name, part in parts.items()}
    if centred and norm.bias is not None:
        found["last norm's bias"] = (norm.bias @ direction).item()
    return found

ON_PAGE = [
    {}, dict(bias=False, tie_weights=False, pos="sinusoidal", activation="gelu_erf"),
    dict(norm="fused_layernorm", activation="relu", attention="extended", n_kv_head=1),
    dict(LAPTOP, prev_heads=1, bias=False, qk_norm=True), dict(LAPTOP, prev_heads=2), QWEN3,
    dict(QWEN3, norm_scale=False, attention="fused", n_head=4, n_kv_head=2), dict(norm="none"),
    dict(block="post", norm="rmsnorm"), dict(LAPTOP, block="shift"),
    dict(block="shift", n_embd=6, activation="swiglu", mlp_ratio=2.0), dict(n_head=1, n_layer=3)]

@pytest.mark.parametrize("changes", ON_PAGE)
def test_the_page_computes_what_pytorch_computes(tmp_path, changes):
    """Logits, attention weights, the logit lens and contributions, at every position. Each setting
    that the page reads is in one of these models, so it would fail if the page ignored one."""
    model = small_model(**changes).eval()
    idx = random_ids(1, 8)
    page = page_of(tmp_path / "page.html", model)
    found = in_node("""
        const { model } = opened(process.argv[2]), ids = JSON.parse(process.argv[3]);
        ids.forEach((id) => model.read(id));
        print({ logits: model.rows.map((row) => row.logits), lens: ids.map((_, t) => model.lens(t)),
                weights: model.h.map((layer) => layer.rows.map((row) => row.weights)),
                shares: ids.map((id, t) => model.shares(t, id)) });""", page, idx[0].tolist())
    with torch.no_grad():
        logits = model(idx)[0][0]
        streams, weights, parts = inside_of(model, idx)
        lens = torch.stack([model.lm_head(model.ln_f(x)).softmax(-1) for x in streams], dim=1)
    def close(a, b):
        a, b = torch.tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())
    close(found["logits"], logits)
    close(found["lens"], lens)
    for layer, expected in zip(found["weights"], weights, strict=True):
        for t, row in enumerate(layer):
            close(row, expected[:, t, : t + 1])
    for t, shares in enumerate(found["shares"]):
        if changes.get("block") == "post":
            assert shares == {}
            continue
        at_t = {name: part[t] for name, part in parts.items()}
        expected = expected_shares(model, streams[-1][t], at_t, idx[0, t])
        assert shares.keys() == expected.keys()
        close([shares[name] for name in expected], list(expected.values()))
        close(sum(shares.values()), logits[t, idx[0, t]] - logits[t].mean())

@pytest.mark.parametrize("changes", [
    dict(block_size=16), dict(LAPTOP, prev_heads=1, block_size=16), dict(QWEN3, block_size=15),
    dict(model="bigram", block_size=1), dict(block="shift", attention="extended", block_size=1)])
@pytest.mark.parametrize("length", [0, 3, 40])
def test_the_page_writes_what_generate_writes(tmp_path, changes, length):
    """200 tokens at temperature 0, past the window, which moves as it does in Python. A token is
    right if its logit is the largest up to rounding. Then random tokens, because a text that
    repeats itself looks the same from any window. Would fail if the window of an attention without
    a cache moved like that of one with it, or if what is kept were not read again."""
    model = small_model(**changes).float().eval()
    tokenizer = CharTokenizer(list("\nabcdefghij"))
    prompt = tokenizer.decode(random_ids(length).tolist())
    page = page_of(tmp_path / "page.html", model, tokenizer, prompt)
    random = random_ids(60, seed=1).tolist()
    ids, found = in_node("""
        const { model, tokenizer, data } = opened(process.argv[2]);
        let reader = new page.Reader(model), ids = tokenizer.encode(data.prompt).ids;
        if (!ids.length) ids = [data.tokenizer.first_id];
        const start = ids.slice();
        for (let i = 0; i < 200; i++) ids.push(page.ranked(reader.read(ids))[0]);
        reader = new page.Reader(model);
        const random = JSON.parse(process.argv[3]);
        print([ids, random.map((_, n) => [...reader.read([...start, ...random.slice(0, n)])])]);""",
        page, random)
    start = tokenizer.encode(prompt) or [tokenizer.first_id]
    assert ids[: len(start)] == start and len(ids) == len(start) + 200
    reader = minigpt.new_reader(model)
    for n in range(len(start), len(ids)):
        logits = reader(torch.tensor([ids[:n]]))[0]
        assert logits[ids[n]] >= logits.max() - 1e-4 * logits.abs().max(), n
    reader = minigpt.new_reader(model)
    for n, logits in enumerate(found):
        expected = reader(torch.tensor([[*start, *random[:n]]]))[0]
        assert logits == pytest.approx(expected.tolist(), abs=1e-4 * expected.abs().max().item())

def test_an_edited_text_is_read_like_a_new_prompt(tmp_path):
    """What stands before the change is kept, which must make no difference, within the window and
    past it. Would fail if a row of the old text stayed behind."""
    model = small_model(**LAPTOP, prev_heads=1, block_size=16).eval()
    page = page_of(tmp_path / "page.html", model)
    texts = [random_ids(n, seed=seed).tolist() for n, seed in
             ((5, 0), (9, 0), (7, 0), (12, 1), (16, 1), (40, 1), (39, 1), (3, 2))]
    texts.insert(4, [*texts[3][:6], 9, *texts[3][7:]])
    kept, anew = in_node("""
        const { model } = opened(process.argv[2]), texts = JSON.parse(process.argv[3]);
        const reader = new page.Reader(model), other = opened(process.argv[2]).model;
        print([texts.map((ids) => [...reader.read(ids)]),
               texts.map((ids) => [...new page.Reader(other).read(ids)])]);""", page, texts)
    for ids, a, b in zip(texts, kept, anew, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids[-16:]]))[0][0, -1]
        assert a == pytest.approx(expected.tolist(), abs=1e-4), len(ids)
        assert b == pytest.approx(expected.tolist(), abs=1e-4), len(ids)

def test_the_page_draws_as_generate_does(tmp_path):
    """The same probabilities after temperature, top-k and top-p, in this order, also with ties."""
    page = page_of(tmp_path / "page.html", small_model())
    generator = torch.Generator().manual_seed(0)
    logits = [(5 * torch.randn(11, generator=generator)).tolist(), [1.0] * 4 + [0.0] * 7,
              [0.0] * 2 + [-200.0] * 9]  # one of these two alone reaches 0.5
    settings = [(t, k, p) for t in (0.3, 1, 2) for k in (1, 3, 11) for p in (0.2, 0.5, 0.7, 1)]
    found, greedy, drawn = in_node("""
        const [logits, settings] = JSON.parse(process.argv[3]);
        const draws = (z, s) => page.distribution(Float32Array.from(z), ...s);
        print([logits.map((z) => settings.map((s) => draws(z, s))),
               logits.map((z) => draws(z, [0, 3, 0.5])),
               [0, 0.24, 0.26, 0.99, 1].map((r) => page.draw([0.25, 0, 0.75, 0], r))]);""",
        page, json.dumps([logits, settings]))
    for z, of_z, best in zip(logits, found, greedy, strict=True):
        for (t, k, p), probabilities in zip(settings, of_z, strict=True):
            filtered = minigpt.filter_logits(torch.tensor([z]) / t, k, p)
            assert probabilities == pytest.approx(filtered.softmax(-1)[0].tolist(), abs=1e-5)
        assert best == [float(i == z.index(max(z))) for i in range(11)]
    assert drawn == [0, 0, 2, 2, 2]

def test_the_page_cuts_a_text_into_the_same_tokens(tmp_path):
    """Characters and byte pairs. Would fail with JavaScript's white space in place of Unicode's, if
    merges were applied from left to right, or if half a character were shown as U+FFFD."""
    tokenizer = BPETokenizer.train(SAMPLE.read_text(encoding="utf-8") + "中文 中文", 400)
    texts = ["", "The tide, she'll  come\n\n in 12345 days\t!",
             "é中文\u0085 a\ufeff b\u3000\u3000c 😀", "a<|endoftext|>b", "'Tis they've  ",
             SAMPLE.read_text(encoding="utf-8")[:2000]]
    model = small_model(vocab_size=tokenizer.vocab_size)
    page = page_of(tmp_path / "page.html", model, tokenizer)
    ids, back, shown = in_node("""
        const { tokenizer } = opened(process.argv[2]), texts = JSON.parse(process.argv[3]);
        const ids = texts.map((text) => tokenizer.encode(text).ids);
        print([ids, ids.map((some) => tokenizer.decode(some)),
               [228, 300].map((i) => tokenizer.show(i))]);""", page, json.dumps(texts))
    assert ids == [tokenizer.encode(text) for text in texts] and back == texts
    byte = tokenizer.tokens[228][0]
    assert shown == [f"\\x{byte:02x}", tokenizer.decode([300])] and byte > 127
    letters = CharTokenizer(list("\na😀é"))
    letters = page_of(tmp_path / "letters.html", small_model(vocab_size=4), letters)
    assert in_node("""
        const { tokenizer } = opened(process.argv[2]);
        print(["a😀\\né", "aBc", ""].map((text) => tokenizer.encode(text)));""", letters) == [
            {"ids": [1, 2, 0, 3]}, {"ids": [1], "unknown": "B"}, {"ids": []}]

def test_a_page_that_was_cut_or_edited_or_of_an_edited_program_says_so(tmp_path, monkeypatch):
    """It must not show numbers of another model, and must name a setting that it does not know."""
    page = page_of(tmp_path / "page.html", small_model())
    whole = page.read_text(encoding="utf-8")
    def refusal(text=whole):
        (tmp_path / "bad.html").write_text(text, encoding="utf-8")
        return in_node("""
            const [, check, text] = parts(process.argv[2]);
            let why = "";
            try { page.open(text, check); } catch (problem) { why = problem.message; }
            print(why);""", tmp_path / "bad.html")
    assert refusal() == ""
    numbers = whole.index('"numbers": "') + 30
    edited = "A" if whole[numbers] != "A" else "B"
    for text in (whole[:numbers] + whole[numbers + 8 :],
                 whole[:numbers] + edited + whole[numbers + 1 :]):
        assert refusal(text) == "its data were cut or edited"
    monkeypatch.setitem(minigpt.ACTIVATIONS, "mine", minigpt.MLP)
    mine = page_of(tmp_path / "mine.html", small_model(activation="mine"))
    assert refusal(mine.read_text()) == 'it cannot compute activation "mine"'
    original = minigpt.CausalSelfAttention.forward
    monkeypatch.setattr(minigpt.CausalSelfAttention, "forward",
                        lambda self, x: 2 * original(self, x))
    edited = page_of(tmp_path / "edited.html", small_model()).read_text()
    assert "something else than minigpt.py" in refusal(edited)

def test_any_text_may_stand_in_a_page(tmp_path):
    """A prompt cannot end the script, and the page names no address."""
    text = "</script><!-- <script>\n\"\\&é"
    tokenizer = CharTokenizer.train(text)
    save_model(tmp_path, tokenizer, **LAPTOP, prev_heads=1, block_size=32)
    code, _, err = run_main("--mode", "inspect", "--out_dir", tmp_path, "--prompt", text)
    assert code == 0 and "inspect.html" in err, err
    html = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert html.count("</script") == html.count("<script") == 3 and "http" not in html
    assert in_node("print(opened(process.argv[2]).data.prompt);", tmp_path / "inspect.html") == text

def test_large_models_have_pages_in_sixteen_bits_or_none(tiny_run, tmp_path, monkeypatch):
    """A page that is too large for a browser is refused, after the numbers have been printed."""
    shutil.copy(tiny_run[0] / "best.pt", tmp_path)
    argv = ["--mode", "inspect", "--out_dir", tmp_path, "--prompt", "THE"]
    succeed_with = run_main(*argv)
    size = (tmp_path / "inspect.html").stat().st_size
    monkeypatch.setattr(minigpt, "FLOAT32_NUMBERS", 10)
    assert run_main(*argv)[:2] == succeed_with[:2]
    assert (tmp_path / "inspect.html").stat().st_size < size
    in_node("print(opened(process.argv[2]).data.dtype);", tmp_path / "inspect.html")
    (tmp_path / "inspect.html").unlink()
    monkeypatch.setattr(minigpt, "PAGE_BYTES", 10)
    code, out, err = run_main(*argv)
    assert (code, out) == (2, succeed_with[1]) and not (tmp_path / "inspect.html").exists()
    assert last_line(err).startswith("error: --mode inspect: no page, because the ")

def test_sixteen_bit_numbers_are_read_by_the_page(tmp_path):
    """All 65,536 of them, as PyTorch reads them (but not those that are no numbers)."""
    page = page_of(tmp_path / "page.html", small_model())
    found = in_node("print(Array.from({ length: 65536 }, (_, i) => page.halfToNumber(i)));", page)
    expected = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.float16)
    finite = expected.isfinite()
    assert torch.equal(torch.tensor(found)[finite], expected[finite].float())

@pytest.mark.parametrize("fault", ["no template", "bad template", "the template", "no folder"])
def test_the_page_needs_its_template(tmp_path, monkeypatch, fault):
    """Without its template, one line says so, after the numbers. The template itself is never
    overwritten. A folder that does not exist is made."""
    program = tmp_path / "program"
    shutil.copytree(Path(minigpt.__file__).parent / "data", program / "data")
    monkeypatch.setattr(minigpt, "PROGRAM", program / "minigpt.py")
    template = program / "data" / "inspect.html"
    if fault == "no template":
        template.unlink()
    if fault == "bad template":
        template.write_text("mine")
    before = contents(program)
    save_model(tmp_path, CharTokenizer.train("abc"))
    out_dir = {"the template": program / "data", "no folder": tmp_path / "a" / "b"}.get(
        fault, tmp_path)
    code, out, err = run_main("--mode", "inspect", "--checkpoint", tmp_path / "best.pt",
                              "--prompt", "abc", "--out_dir", out_dir)
    assert out.count("\n") == 5 and contents(program) == before
    if fault == "no folder":
        assert code == 0 and (out_dir / "inspect.html").exists()
    else:
        assert code == 2 and last_line(err).startswith("error: "), err
        assert "template" in last_line(err) and not (tmp_path / "inspect.html").exists()

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# What a visitor does, and what is to be seen afterwards.
VISIT = r"""
<script>
const problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("DOMContentLoaded", async () => {
  const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  const seen = {}, box = element("text"), press = (key, on = "tokens") =>
    element(on).dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const shot = () => ({ text: box.value, n: ids.length, where: element("where").textContent,
    problem: element("problem").textContent, window: element("window").textContent,
    candidates: element("candidates").textContent, lens: element("lens").rows.length,
    shares: element("shares").rows.length, maps: element("maps").children.length,
    failure: element("failure").textContent });
  seen.start = shot();
  if (!document.querySelector("main").hidden) {
    box.value = "THE SEA\n";
    box.dispatchEvent(new Event("input"));
    seen.typed = shot();
    box.value = "THE 中 SEA";
    box.dispatchEvent(new Event("input"));
    press("1");
    seen.unknown = shot();
    seen.locked = element("write").disabled && element("one").disabled;
    box.value = "";
    box.dispatchEvent(new Event("input"));
    seen.empty = shot();
    press("2");
    element("candidates").querySelector("button").click();
    seen.appended = shot();
    press("ArrowLeft");
    seen.chosen = shot();
    element("temperature").value = 0;
    element("temperature").dispatchEvent(new Event("input"));
    seen.cold = shot();
    element("pace").value = "5";
    for (let i = 0; i < 3; i++) element("write").click();  // on, off, on: one writer, not two
    await wait(1100);
    seen.slow = ids.length - seen.cold.n;
    element("write").click();
    element("pace").value = "0";
    element("write").click();
    while (ids.length < 60) await wait(20);
    seen.button = element("write").textContent;
    element("write").click();
    await wait(300);
    seen.written = shot();
    await wait(300);
    seen.later = shot();
    seen.top_k = element("top_k").nextElementSibling.textContent;
    seen.wide = document.documentElement.scrollWidth - innerWidth;
    seen.requests = performance.getEntriesByType("resource").length;
  }
  const report = document.createElement("pre");
  report.id = "report";
  report.textContent = JSON.stringify({ ...seen, problems });
  document.body.append(report);
});
</script>
"""

@pytest.mark.slow
@pytest.mark.parametrize("size", ["1280,900", "500,844"])
def test_the_page_in_a_browser(tiny_run, tmp_path, size):
    """Types, chooses and writes in the real page, in a wide and in a narrow window."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt install chromium), so no page was opened")
    def visit(html):
        (tmp_path / "visit.html").write_text(html, encoding="utf-8")
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000", "--dump-dom",
             (tmp_path / "visit.html").as_uri()],
            capture_output=True, text=True, encoding="utf-8", timeout=240)
        report = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.DOTALL)
        return json.loads(html_module.unescape(report[1]))

    shutil.copy(tiny_run[0] / "best.pt", tmp_path)
    code, _, err = run_main("--mode", "inspect", "--out_dir", tmp_path, "--prompt", "THE TIDE")
    assert code == 0, err
    html = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    begin = html.index("<!-- The data")
    seen = visit(html[:begin] + VISIT + html[begin:])
    model, tokenizer = model_of(tmp_path / "best.pt")
    assert seen["problems"] == [] and seen["requests"] == 0 and seen["wide"] <= 0, seen
    assert seen["start"]["text"] == "THE TIDE" and seen["start"]["n"] == 8
    assert seen["typed"]["text"] == "THE SEA\n" and "next" in seen["typed"]["where"]
    assert seen["typed"]["maps"] == model.config.n_head
    assert seen["typed"]["lens"] == 1 + 1 + model.config.n_layer
    assert seen["unknown"]["text"] == "THE 中 SEA" and "中" in seen["unknown"]["problem"]
    assert seen["unknown"]["n"] == 4 and seen["locked"]
    assert seen["empty"]["n"] == 0 and seen["empty"]["problem"] == ""
    assert seen["appended"]["n"] == 2 == len(seen["appended"]["text"])
    assert "token 1" in seen["chosen"]["where"] and seen["chosen"]["shares"] > 4
    assert "100.0 %" in seen["cold"]["candidates"] != seen["chosen"]["candidates"]
    assert seen["button"] == "Stop" and seen["written"]["n"] == seen["later"]["n"] >= 60
    assert "are not seen any more" in seen["written"]["window"]
    assert 5 <= seen["slow"] <= 8 and seen["top_k"] == "all"
    # The text began empty, so it follows the id that a text without a prompt follows.
    expected = [tokenizer.first_id, *tokenizer.encode(seen["appended"]["text"])]
    more = model.eval().generate(torch.tensor([expected]), 58, temperature=0)[0].tolist()
    assert seen["written"]["text"].startswith(tokenizer.decode(more[1:]))
    cut = visit(html[:begin] + VISIT + html[begin : begin + (len(html) - begin) // 2])
    assert "cut or edited" in cut["start"]["failure"] and cut["problems"] == []

# ---- Part V: the command line, as a user types it ------------------------------------------------
MISTAKES = [line.split(" => ") for line in """\
 => --mode is missing & generate
--mode dance => --mode & dance & eval
--mode train --max_stepz 5 => --max_stepz: unknown; did you mean --max_steps?
--mode train --max 5 => --max: unknown & did you mean --max_steps?
--mode train --lr 1e-3 => --lr: unknown; see --help
--mode train --epochs=3 => --epochs: unknown; see --help
--mode train --start x => --start: unknown; see --help
--mode generate --temp 1 => --temp: unknown; did you mean --temperature?
--mode eval --tmperature 1 => --tmperature: unknown; see --help
train => train: type --mode train
train --n_layer 1 => train: type --mode train
--mode train --bias False => --bias False: takes no value; type --bias or --no_bias
--mode train --no_bias False => --bias False: takes no value; type --bias or --no_bias
--mode train --data a.txt b.txt => b.txt: belongs to no flag & one value & join several texts
--mode generate --prompt To be => be: belongs to no flag & quotes
--mode train --max_steps => --max_steps
--mode train --max_steps many => --max_steps & 'many' & whole number
--mode train --bias maybe => maybe
--mode train --prompt a => --prompt & --mode train & generate & inspect
--mode train --vary pos=rope => --vary & --mode train & ablate
--mode generate --max_steps 5 => --max_steps & --mode generate & train & ablate
--mode bench --grad_accum 4 => --grad_accum & --mode bench & train & ablate
--mode train --no_tie_weight => --no_tie_weight: unknown; did you mean --no_tie_weights?
--mode generate --no_bias => --bias & --mode generate & train
--mode eval --prompt a => --prompt & --mode eval & generate
--mode eval --resume => --resume & --mode eval & train
--mode ablate --vary n_layer=1 --resume => --resume & --mode ablate & train
--mode bench --out_dir x => --out_dir & --mode bench & train
--mode bench --prompt x => --prompt & --mode bench & generate
--mode inspect --temperature 1 => --temperature & --mode inspect & generate
--mode export --seed 1 => --seed & --mode export & train
--mode export --out_dir {run} --format gguf --gguf_type q4 => --gguf_type & q4 & q8_0
--mode export --out_dir {run} --gguf_type f16 => --gguf_type f16 & --format gguf
--mode bench --preset bigram => --preset bigram & GPT
--mode ablate => --vary is missing & norm=none,rmsnorm
--mode ablate --vary norm=none,rmsnorm --norm=none => --norm none & --vary norm=none,rmsnorm chooses
--mode ablate --vary n_layer=1,1 => --vary n_layer=1,1 & has 1 twice
--mode ablate --vary luck=1,2 => --vary luck=1,2
--mode ablate --vary seed=1,2 => --vary seed=1,2
--mode ablate --vary prompt=a,b => --vary prompt=a,b
--mode ablate --vary n_layer => --vary n_layer & FIELD
--mode ablate --vary n_layer=1,,2 => --n_layer & ''
--mode ablate --vary n-layer=a,b => --n_layer & 'a'
--mode ablate --vary bias=maybe => --vary bias=maybe & true or false
--mode ablate --vary norm=layernorm,rmsnrm => --norm & rmsnrm
--mode train --n_embd 2000000000 => memory & --n_embd
--mode train --data nowhere.txt => nowhere.txt & No such file
--mode train --data {tmp}/empty.txt => {tmp}/empty.txt & has 0; use a longer text
--mode train --data {tmp} => --data {tmp}: this is a folder & name a text & join them
--mode train --data {tmp}/latin.txt => latin.txt & line 1 is not UTF-8 & 0xe9
--mode train --data {tmp}/few.txt => {tmp}/few.txt & has 1; use a longer text
--mode train --data {tmp}/some.txt => some.txt & --block_size 512, but has 5; use
--mode train --bias=true => --bias & takes no value & --no_bias
--mode train --learning_rate inf => --learning_rate & of at least 0, and finite
--mode generate --temperature 1e39 => --temperature & from 0 to 1000
--mode train --init_from nowhere.pt => nowhere.pt: no such file & train first
--mode train --teacher nowhere.pt => nowhere.pt: no such file & train first
--mode train --teachers -1 => --teachers & -1
--mode bench --teachers 1 => --teachers & --mode bench & train
--mode train --init_from gpt2 => gpt2: no such file & hf download openai-community/gpt2 --local-dir
--mode generate --checkpoint openai-community/gpt2 => no such file & hf download
--mode train -d x => -d: unknown; see --help
--mode generate --checkpoint {run}/config.json => config.json & name the .pt file of a run
--mode generate --checkpoint {tmp}/run => {tmp}/run & name the file {tmp}/run/latest.pt
--mode generate --checkpoint {tmp}/lonely.json => lonely.json: this is not a checkpoint
--mode train --n_layer 0 => --n_layer & '0'
--mode train --mlp_ratio 1e300 => --mlp_ratio & 1e300 & 0.01 to 100
--mode train --mlp_ratio 0.01 => --mlp_ratio 0.01: the MLP needs at least 2 hidden units
--mode export --out_dir {run} --device tpu => --device tpu & cpu
--mode train --n_head 3 => --n_embd 128 & --n_head 3
--mode train --dropout 1.0 => --dropout & '1.0'
--mode train --learning_rate nan => --learning_rate & nan
--mode train --min_lr 9 => --min_lr 9 & --learning_rate
--mode train --preset huge => --preset & huge & laptop
--mode train --preset plain --pos rope => --pos rope & --attention & extended & fused
--mode train --preset plain --qk_norm => --qk_norm & --attention & extended & fused
--mode train --attention explicit => --pos rope & --attention
--mode train --preset plain --short_share 0.5 => --short_share 0.5 & --sampling even
--mode train --preset plain --n_kv_head 1 => --n_kv_head 1: needs --attention extended or fused
--mode train --n_kv_head 3 => --n_kv_head 3: must divide --n_head 2
--mode train --preset plain --prev_heads 1 => --prev_heads 1: needs --attention extended or fused
--mode train --preset plain --pos sinusoidal --n_embd 9 --n_head 3 => --pos: 9 channels
--mode train --train_temperature 0 => --train_temperature & '0' & 0.01
--mode train --device tpu => --device tpu & cpu
--mode train --tokenizer bpe --bpe_size 100 => --bpe_size & '100'
--mode train --tokenizer bpe --bpe_size 65537 => --bpe_size & 65536
--mode train --bpe_size 300 => --bpe_size 300 & --tokenizer bpe
--mode ablate --vary tokenizer=char,gpt2 --bpe_size 300 => --bpe_size 300 & --tokenizer bpe
--mode train --n_embd 12 --n_head 4 => --pos & --n_embd & --n_head
--mode train --out_dir {tmp}/empty.txt/out => {tmp}
--mode train --checkpoint {run}/best.pt => --checkpoint {run}/best.pt & --init_from & --resume
--mode train --init_from {run}/best.pt --n_layer 3 => --n_layer 3 & --init_from & 1
--mode train --init_from {tmp} => {tmp} & config.json
--mode generate --out_dir {tmp}/none => best.pt & train first
--mode eval --checkpoint {tmp} => {tmp} & config.json & GPT-2
--mode generate --checkpoint {tmp}/cut.pt => cut.pt & damaged
--mode eval --checkpoint {tmp}/latin.txt => latin.txt & not a checkpoint
--mode generate --checkpoint {run}/metrics.jsonl => metrics.jsonl & not a checkpoint
--mode generate --checkpoint {run} => {run} & name the file {run}/best.pt
--mode train --init_from {run} => {run} & name the file {run}/best.pt
--mode generate --checkpoint {tmp}/hf/model.safetensors => model.safetensors & its folder, {tmp}/hf
--mode train --init_from {tmp}/hf/config.json => config.json & its folder, {tmp}/hf
--mode train --data= => --data & '' is empty
--mode train --out_dir= => --out_dir & '' is empty
--mode train --init_from= => --init_from & '' is empty
--mode eval --checkpoint= => --checkpoint & '' is empty
--mode export --export_dir= => --export_dir & '' is empty
--mode generate --stop= => --stop & '' is empty
--mode generate --prompt -alpha => --prompt & type --prompt=VALUE
--mode train --max_steps -5 => --max_steps & -5
--mode generate --out_dir {run} --seed 99999999999999999999 => --seed & 9999
--mode train --out_dir {run} => --out_dir {run} & has a & --resume
--mode generate --out_dir {run} --top_p 1.1 => --top_p & 1.1
--mode generate --out_dir {run} --top_k 0 => --top_k & '0'
--mode generate --out_dir {run} --prompt naïve => 'naïve' & 'ï' (U+00EF) & that it has is 'i'
--mode generate --out_dir {run} --prompt “a => (U+201C) & leave it out
--mode generate --out_dir {run} --prompt cafe\u0301 => (U+00E9) & that it has is 'e'
--mode generate --out_dir {run} --prompt a漢 => --prompt 'a漢' & (U+6F22) & leave it out
--mode generate --out_dir {run} --prompt a\\nb => --prompt & $'\\n' in bash & PowerShell
--mode generate --out_dir {run} --stop \\n => --stop & $'\\n' in bash & PowerShell
--mode generate --out_dir {run} --stop Ö => --stop 'Ö' & the closest one that it has is 'O'
--mode generate --out_dir {run} --prompt don’t => --prompt & U+2019 & closest one that it has is "'"
--mode eval --out_dir {run} --data {tmp}/one.txt => --data {tmp}/one.txt & at least 2
--mode train --init_from {run}/best.pt --data {tmp}/few.txt => few.txt & has 1; use a longer text
--mode train --init_from {run}/best.pt --data {tmp}/some.txt => some.txt & size 16, but has 5;
--mode train --init_from {run}/best.pt --data {tmp}/greek.txt => --data {tmp}/greek.txt: & (U+03
--mode eval --out_dir {run} --data {tmp}/greek.txt => --data {tmp}/greek.txt: & (U+03
""".rstrip().split("\n")]

@pytest.fixture(scope="module")
def mistaken(tiny_run, tmp_path_factory):
    """The arguments of a mistake and what its message must hold, with real files behind them."""
    run, tmp = tiny_run[0], tmp_path_factory.mktemp("mistakes")
    for name, data in (("empty.txt", b""), ("latin.txt", b"caf\xe9 " * 500), ("few.txt", b"to be"),
                       ("greek.txt", "λόγος ".encode() * 500), ("one.txt", b"t"),
                       ("some.txt", b"to be or not to be, that is the question"[:-1] + b"oon"),
                       ("cut.pt", (run / "best.pt").read_bytes()[:5000])):
        (tmp / name).write_bytes(data)
    (tmp / "lonely.json").write_text("{}")
    (tmp / "run").mkdir()
    shutil.copy(run / "latest.pt", tmp / "run")
    (tmp / "hf").mkdir()
    (tmp / "hf" / "config.json").write_text("{}")
    (tmp / "hf" / "model.safetensors").write_bytes(b"x")

    def fill(command, named):
        argv = [word.format(tmp=tmp, run=run) for word in command.split()]
        extra = {}
        if argv:
            extra["--device"] = "cpu"
        if argv and "bench" not in argv:
            extra["--out_dir"] = str(tmp / "out")
        if "train" in argv or "ablate" in argv:
            extra |= {"--data": str(SHORT), "--preset": "laptop"}
        for flag, value in extra.items():
            if flag not in argv:
                argv += [flag, value]
        return argv, named.format(tmp=tmp, run=run).split(" & ")

    return fill

@pytest.mark.parametrize("command, named", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistaken, command, named):
    """The last line begins with `error: ` and names the flag or the file, and the value. There is
    no traceback, and nothing goes to stdout, where another program may be reading."""
    argv, named = mistaken(command, named)
    check_mistake(*run_main(*argv), named)

def all_flags():
    """Each setting of the four groups, with its kind."""
    return {name: minigpt.kind_of(config_class, name) for config_class in minigpt.GROUPS.values()
            for name in minigpt.field_names(config_class)}

def test_every_flag_belongs_to_some_mode_and_every_mode_has_its_flags():
    """A flag that no mode takes could never be typed; a name in `takes` that is no flag is a
    misspelling. The flags that a mode refuses are exactly the others, and the message sends the
    user to the modes that have them."""
    flags = set(all_flags())
    takes = {mode: minigpt.MODES[mode].takes for mode in minigpt.MODES}
    assert set().union(*takes.values()) == flags
    values = {str: "x", int: "300", float: "0.5", list: "x"}
    for mode in minigpt.MODES:
        for name, kind in all_flags().items():
            if name == "mode":
                continue
            argv = ["--mode", mode, f"--{name}"]
            if kind is not bool:
                argv.append(next(iter(minigpt.CHOICES.get(name, [values[kind]]))))
            if name in takes[mode]:
                minigpt.parse(argv)
                continue
            with pytest.raises(UserError) as refused:
                minigpt.parse(argv)
            message = str(refused.value)
            assert message.startswith(f"--{name}: ") and f"--mode {mode}" in message
            homes = message.split("a flag of --mode ")[1]
            assert homes.split(" and ") == [m for m in minigpt.MODES if name in takes[m]]

def test_a_setting_comes_from_the_default_then_the_preset_then_what_was_typed():
    """Would fail if a preset overruled the user, or if a default overruled a preset."""
    argv = ["--mode", "train", "--n_layer", "9", "--momentum", "0.5", "--no_qk_norm"]
    request = minigpt.parse(argv)
    assert request == {"mode": "train", "n_layer": 9, "qk_norm": False, "momentum": 0.5}
    model = minigpt.model_settings("laptop", request, 65)
    training = minigpt.training_settings("laptop", request)
    assert (model.n_layer, model.qk_norm, training.momentum) == (9, False, 0.5)  # typed
    assert (model.n_embd, model.pos, training.optimizer) == (128, "rope", "muon")  # the preset
    assert (model.mlp_ratio, training.beta2) == (4.0, 0.99)  # the defaults
    assert training.preset == "laptop" and model.vocab_size == 65
    assert minigpt.settings_of({"mode": "eval"}, minigpt.Options) == minigpt.Options(mode="eval")

def mode_of(name):
    """A mode that takes a flag."""
    return next(mode for mode in minigpt.MODES if name in minigpt.MODES[mode].takes)

def test_dashes_in_flags_and_in_values_are_kept_apart():
    """--max-steps is --max_steps, as in most programs; a prompt, a stop text and a path keep their
    dashes. Would fail if the whole command line were rewritten."""
    request = minigpt.parse(["--mode=train", "--warmup-steps=0", "--out-dir", "my-folder",
                             "--no-wandb", "--no-tie-weights", "--n_layer", "2"])
    assert request == {"mode": "train", "warmup_steps": 0, "wandb": False, "out_dir": "my-folder",
                       "tie_weights": False, "n_layer": 2}
    generate = ["--mode", "generate"]
    assert minigpt.parse([*generate, "--prompt=a--no_b"])["prompt"] == "a--no_b"
    assert minigpt.parse([*generate, "--prompt", ""])["prompt"] == ""
    for text in ("-- well-met", "-", "a--b-c", "--a-b c", "x=--"):
        writing = minigpt.parse([*generate, "--prompt", text, "--stop", text])
        assert writing["prompt"] == text and writing["stop"] == [text]
    for text in ("--x-y", "--max-steps", "-1", "--out-dir=a-b", "--no_cache"):
        request = minigpt.parse([*generate, f"--prompt={text}", f"--out_dir={text}"])
        assert request == {"mode": "generate", "prompt": text, "out_dir": text}

def test_the_home_folder_is_expanded_in_every_path(monkeypatch):
    """A shell expands ~ in `--out_dir ~/runs`, but not in `--out_dir=~/runs`."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    for name in minigpt.PATHS:
        value = minigpt.parse(["--mode", mode_of(name), f"--{name}=~/a"])[name]
        path, = value if name == "teacher" else [value]
        assert path.replace("\\", "/") == "/home/me/a"
    texts = {f.name for f in fields(minigpt.Options) if "str" in f.type}
    no_paths = {"mode", "device", "vary", "format", "gguf_type"}
    assert texts - no_paths | {"init_from"} == minigpt.PATHS

def test_a_flag_that_names_a_file_or_a_text_may_be_typed_once():
    """Would fail if only the last file were used, without a word. A number may be typed again, as
    in a script that overrides its own default, and so may --stop."""
    for name in ("data", "out_dir", "checkpoint", "init_from", "export_dir", "prompt", "vary"):
        argv = ["--mode", mode_of(name), f"--{name}", "a", f"--{name}", "b"]
        with pytest.raises(UserError, match=f"--{name} b: .* typed twice"):
            minigpt.parse(argv)
    request = minigpt.parse(["--mode", "train", "--n_layer", "1", "--n_layer", "2"])
    assert request == {"mode": "train", "n_layer": 2}
    writing = minigpt.parse(["--mode", "generate", "--stop", "a", "--stop", "b"])
    assert writing["stop"] == ["a", "b"]

@POSIX
def test_a_prompt_is_the_utf8_that_was_typed():
    """In a locale without UTF-8, Python hands over the bytes of a command line one by one. They are
    put together again; bytes that are no UTF-8 are an error and not another text."""
    typed = "é".encode().decode("ascii", "surrogateescape")
    argv = ["--mode", "generate", "--prompt", typed, "--stop", typed]
    writing = minigpt.parse(argv)
    assert (writing["prompt"], writing["stop"]) == ("é", ["é"])
    argv[3] = b"caf\xc3".decode("ascii", "surrogateescape")
    with pytest.raises(UserError, match="--prompt: .* is not UTF-8 text"):
        minigpt.parse(argv)

def test_two_dashes_as_a_value_are_a_mistake_and_no_crash(tmp_path, monkeypatch):
    """For argparse, a bare -- is no value but an empty list, which a setting must never become.
    This holds whichever flag it is."""
    monkeypatch.chdir(tmp_path)
    for name, kind in all_flags().items():
        if kind is bool:
            continue
        flag = f"--{name}"
        mode = [] if name == "mode" else ["--mode", mode_of(name)]
        for argv in ([f"{flag}=--"], [flag.replace("_", "-") + "=--"], [flag, "--"]):
            code, out, err = run_main(*mode, *argv)
            check_mistake(code, out, err.replace("-", "_"), [flag.replace("-", "_")])

@POSIX
@pytest.mark.parametrize("flag", ["--data", "--out_dir"])
def test_a_line_break_in_a_name_does_not_break_the_message(tmp_path, flag):
    """It is one line, whatever the name is, and names the file that was typed, not a temporary."""
    (tmp_path / "file").write_text("x")
    argv = [*TRAIN, "--out_dir", tmp_path / "out", flag, f"{tmp_path}/file/a\nb"]
    check_mistake(*run_main(*argv), ["file/a\\nb" if flag == "--data" else "/file/a"])

def test_a_message_names_the_file_that_was_typed_and_not_a_temporary_one(tmp_path):
    """An export writes to a folder with another name first."""
    pytest.importorskip("safetensors")
    (tmp_path / "file").write_text("x")
    export = ["--mode", "export", "--out_dir", tmp_path, "--export_dir", tmp_path / "file" / "x"]
    save_model(tmp_path, CharTokenizer.train("abc"))
    code, _, err = run_main(*export)
    assert code == 2 and last_line(err).startswith(f"error: {tmp_path / 'file' / 'x'}: ")

def test_a_folder_that_cannot_be_made_is_told_by_its_own_reason(tmp_path, monkeypatch):
    """Where several folders are missing, Python first fails to make the last one, because the one
    before it is missing, and then that one, because the disk is read-only. The second is the
    reason."""
    def mkdir(path, mode=0o777):
        missing = not Path(path).parent.exists()
        raise FileNotFoundError(2, "No such file", path) if missing else OSError(
            30, "Read-only file system", path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    refused = run_main(*TRAIN, "--out_dir", tmp_path / "a" / "b")
    check_mistake(*refused, [f"{tmp_path / 'a'}: Read-only file system"])

def test_help_without_the_source_has_no_comments(tmp_path, monkeypatch):
    """A compiled program (.pyc) has no text to read them from. It must not end in an error."""
    monkeypatch.setattr(minigpt, "PROGRAM", tmp_path / "minigpt.pyc")
    (tmp_path / "minigpt.pyc").write_bytes(b"\xa7\r\r\n\xff\x00")
    code, out, _ = run_main("--help")
    assert code == 0 and "--n_layer" in out and "stacked on top" not in out

def test_only_a_users_mistake_is_explained():
    """An error in the program must show its traceback, or nobody could find it."""
    assert "--batch_size" in minigpt.explain(MemoryError(), {"mode": "train"})
    assert "smaller model" in minigpt.explain(RuntimeError("can't allocate memory: 9 bytes"),
                                              {"mode": "eval"})
    assert minigpt.explain(NotImplementedError(), {}) is None
    assert minigpt.explain(ValueError("no number"), {}) is None
    assert "wandb" in minigpt.explain(ModuleNotFoundError(name="wandb"), {})
    assert "x.txt: gone" in minigpt.explain(FileNotFoundError(2, "gone", "x.txt"), {})
    full = OSError(28, "No space left on device")  # of a write: without a name
    assert minigpt.explain(full, {"out_dir": "a"}).startswith("a: No space left on device;")
    assert minigpt.explain(full, {"out_dir": "a", "export_dir": "b"}).startswith("b: No space")

def test_help_lists_every_flag_in_80_columns():
    """--help is the reference. Each flag has the comment beside its field, and its default."""
    code, out, err = run_main("--help")
    text, lines = re.sub(r"\s+", " ", out), out.splitlines()
    assert code == 0 and err == "" and max(map(len, lines)) <= 80
    for name, kind in all_flags().items():
        pattern = rf"  --{name}, --no-{name}\b" if kind is bool else rf"  --{name} \S"
        assert any(re.match(pattern, line) for line in lines), name
    for word in (*minigpt.PRESETS, *minigpt.MODES, "(0.9)", "(4.0)", "(out)", "(True)",
                 "0: never (0)", "with short windows (0.0)"):  # a default of 0 is one, too
        assert word in text
    for config_class in minigpt.GROUPS.values():
        beside = minigpt.comments(config_class)
        for name in minigpt.field_names(config_class):
            assert len(beside[name]) > 5
            # A word with a dash or a slash may be broken at the end of a line.
            assert beside[name].replace(" ", "") in text.replace(" ", ""), name

@pytest.mark.slow
def test_the_program_helps_when_its_source_cannot_be_read():
    """`python - --help < minigpt.py`: the comments are then out of reach, but the flags are not."""
    done = subprocess.run([sys.executable, "-", "--help"], input=SOURCE, capture_output=True,
                          text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for name in all_flags():
        assert f"--{name}" in done.stdout

@pytest.mark.slow
def test_random_command_lines_end_in_success_or_in_one_line(tiny_run, tmp_path, monkeypatch):
    """Flags of every kind, mostly those of the mode, with values of every kind: the exit code is 0,
    or 2 with a single line that begins with `error:`, the last one. There is never a traceback."""
    run = tiny_run[0]
    rng = random.Random(0)
    seen = collections.Counter()
    monkeypatch.chdir(tmp_path)  # some values name new folders
    odd = ["", " ", "-", "--", "é", "nan", "inf", "1e400", "1e300", "None", "1_0", "2.0", "-1",
           "9" * 30, "\udcff", ".", "a b"]
    files = [str(path) for path in (run / "best.pt", run / "latest.pt", SHORT, tmp_path / "new")]
    sound = {int: ["0", "1", "2", "3", "4", "8", "100"], str: ["a", "ROMEO:", *files],
             list: ["a", "\n", "\\n"], float: ["0", "1e-300", "1e-4", "0.5", "1", "2", "100"]}
    special = {"device": ["cpu", "cpu:9", "tpu", "meta"], "seeds": ["0", "1", "2"],
               "vary": ["pos=rope", "bias=true,false", "x=1", "="], "num_samples": ["1", "2"]}
    kinds = {name: kind for name, kind in all_flags().items()
             if name not in ("mode", "compile", "wandb", "bench_seconds")}
    kinds["nonsense"] = bool
    short = [*TRAIN[2:], "--max_steps", "2", "--no_wandb", "--out_dir", "out"]
    base = {"train": [*short, "--sample_tokens", "3"],
            "ablate": [*short, "--seeds", "1", "--vary", "tie_weights=true"],
            "bench": [*BENCH[2:], "--bench_seconds", "0"],
            "generate": ["--out_dir", run, "--max_tokens", "4"], "eval": ["--out_dir", run],
            "inspect": ["--out_dir", run, "--prompt", "ROMEO:"],
            "export": ["--out_dir", run, "--export_dir", "hf"]}
    before = contents(run)
    for _ in range(600):
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        mode = rng.choice(["train", *minigpt.MODES])
        argv = ["--mode", mode, *base[mode]]
        for _ in range(rng.randrange(5)):
            of_any_mode = rng.random() < 0.05
            name = rng.choice([name for name in kinds
                               if of_any_mode or name in minigpt.MODES[mode].takes])
            if kinds[name] is bool:
                argv.append(rng.choice([f"--{name}", f"--no_{name}",
                                        f"--no-{name.replace('_', '-')}"]))
                continue
            values = special.get(name) or [*minigpt.CHOICES.get(name, sound[kinds[name]])]
            argv += [f"--{name}", rng.choice(values if rng.random() < 0.9 else odd)]
        code, _, err = run_main(*argv)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code in (0, 2) and len(lines) == (code == 2) and "Traceback" not in err, (argv, err)
        assert code == 0 or err.splitlines()[-1] == lines[0] and len(lines[0]) > 20, (argv, err)
        seen[mode, code] += 1
    assert {path: data for path, data in contents(run).items() if path.suffix == ".pt"} == {
        path: data for path, data in before.items() if path.suffix == ".pt"}
    assert all(seen[mode, code] for mode in minigpt.MODES for code in (0, 2)), seen

@pytest.mark.slow
@POSIX
def test_a_reader_that_leaves_early_ends_the_program_quietly(tiny_run, tmp_path, start_main):
    """`generate | head -c 10` and `train 2>&1 | head -1` end without a traceback, and the exit code
    is the one that a shell expects, 128 + 13 (SIGPIPE)."""
    generate = ["--mode", "generate", "--out_dir", tiny_run[0], "--device", "cpu", "--max_tokens",
                "300000"]
    train = [*TRAIN, "--out_dir", tmp_path, "--max_steps", "5000"]
    for number, argv in enumerate((generate, train)):
        fifo, log = tmp_path / f"fifo{number}", tmp_path / f"log{number}"
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        err, out = (log, fifo) if argv is generate else (fifo, log)
        process = start_main(argv, err, out)
        got = b""
        while not got:
            with contextlib.suppress(BlockingIOError):
                got = os.read(reader, 10)
            assert process.is_alive()
            time.sleep(0.01)
        os.close(reader)
        process.join(60)
        assert process.exitcode == 141
        assert not re.search("Traceback|Exception", log.read_text())

# ---- Writing -------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [
    {}, dict(temperature=0.0), dict(temperature=2.5), dict(top_k=3), dict(top_p=0.2)])
def test_typed_settings_reach_the_writing(tiny_run, options):
    """The text is what the model's own generate draws from the same random numbers; the cache
    changes nothing. Only the text goes to stdout, with the prompt before it."""
    folder = tiny_run[0]
    model, tokenizer = model_of(folder / "best.pt")
    generator = torch.Generator().manual_seed(minigpt.derived_seed(7, 0))
    ids = model.generate(torch.tensor([tokenizer.encode("THE")]), 30,
                         **{"temperature": 0.8, **options}, generator=generator)
    typed = [f"--{name}={value}" for name, value in options.items()]
    for cache in ("--cache", "--no_cache"):
        code, out, err = run_main("--mode", "generate", "--out_dir", folder, "--max_tokens", "30",
                                  "--prompt", "THE", "--seed", "7", *typed, cache)
        assert code == 0 and out == tokenizer.decode(ids[0].tolist()) + "\n"
        assert re.fullmatch(r".*best.pt: step \d+, [\d,]+ parameters\n", err)

def test_without_the_cache_nothing_is_remembered(tiny_run, monkeypatch):
    """Would fail if --no_cache were ignored, since both give the same text."""
    seen = []
    append = minigpt.LayerMemory.append

    def counted(self, k, v):
        seen.append(k.shape[2])
        return append(self, k, v)

    monkeypatch.setattr(minigpt.LayerMemory, "append", counted)
    generate = ["--mode", "generate", "--out_dir", tiny_run[0], "--max_tokens", "4"]
    run_main(*generate, "--prompt", "THE")
    assert seen == [3, 1, 1, 1]
    seen.clear()
    run_main(*generate, "--prompt", "THE", "--no_cache")
    assert seen == [3, 4, 5, 6]

def test_a_prompt_takes_the_form_that_corpora_have(bpe):
    """An accent may be a character of its own (macOS), and lines may end in two characters
    (Windows). A prompt is changed only where the vocabulary lacks what was typed."""
    composed, decomposed = "caf\u00e9 ", "cafe\u0301 "
    tokenizer = CharTokenizer.train(composed + "\n")
    assert minigpt.adapt_text(tokenizer, "--prompt", decomposed) == composed
    assert minigpt.adapt_text(tokenizer, "--prompt", composed + "\r\n") == composed + "\n"
    both = CharTokenizer.train(composed + decomposed)
    assert minigpt.adapt_text(both, "--prompt", decomposed) == decomposed
    assert minigpt.adapt_text(both, "--prompt", composed) == composed
    apart = CharTokenizer.train(decomposed)
    assert minigpt.adapt_text(apart, "--prompt", composed) == decomposed
    assert minigpt.adapt_text(bpe, "--prompt", decomposed + "\r") == decomposed + "\n"

def test_several_samples_are_several_texts(tiny_run):
    """They are separated by a line, each continues the prompt, and --stop ends each at its own
    place. Would fail if all were drawn with the same random numbers."""
    generate = ["--mode", "generate", "--out_dir", tiny_run[0], "--prompt", "I", "--num_samples",
                "3", "--max_tokens", "60", "--temperature", "1.5"]
    code, out, _ = run_main(*generate)
    texts = out.split("---------------\n")
    assert code == 0 and len(set(texts)) == 3
    assert all(len(text) == 62 and text[0] == "I" for text in texts)
    stop = texts[1][20:22]
    out = run_main(*generate, "--stop", stop)[1]
    for whole, cut in zip(texts, out.split("---------------\n"), strict=True):
        before, found, _ = whole[1:].partition(stop)
        assert cut == (f"I{before}\n" if found else whole)

class CountingTokenizer(BPETokenizer):
    """Counts how many ids it was asked to decode."""
    decoded = 0

    def decode(self, ids):
        self.decoded += len(ids)
        return super().decode(ids)

def print_tokens(tokenizer, ids, stops, monkeypatch):
    """What is on the screen before each token that is taken, and what is there at the end."""
    seen, out = [], io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        printer = minigpt.TextPrinter(tokenizer, stops)
        for i in ids:
            seen.append(out.getvalue())
            if not printer.add(i):
                break
        else:
            seen.append(out.getvalue())
        printer.finish()
    return seen, out.getvalue()

def test_what_is_shown_of_a_text_comes_at_once_and_never_changes(monkeypatch):
    """For every way in which tokens and a stop text can meet: what was shown stays the beginning of
    what comes, half a character waits for its other half, what may be the beginning of the stop
    text is held back, and everything else is shown at once."""
    tokenizer, rng = BPETokenizer.train("aba " * 9, 260), random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab\né😀", k=rng.randrange(12)))
        lengths = rng.choices((1, 2, 3), k=rng.randrange(3))
        stops = ["".join(rng.choices("ab\né", k=length)) for length in lengths]
        ids, ready = [], [0]  # ready: how many characters are complete before each token
        for count, character in enumerate(text):
            new = tokenizer.encode(character)
            ids += new
            ready += [count] * (len(new) - 1) + [count + 1]
        seen, whole = print_tokens(tokenizer, ids, stops, monkeypatch)
        # The text ends where the first stop text is complete. Tokens are at most one character.
        ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
        end, length = min(ends, default=(len(text), 0))
        assert whole == text[: end + length] + "\n"
        for new, shown in zip([*seen[1:], whole], seen):
            assert new.startswith(shown) and "\ufffd" not in new
        for shown, count in zip(seen, ready):
            assert len(shown) >= count - max([len(stop) - 1 for stop in stops], default=0)
        assert (len(seen) <= len(ids)) == bool(ends)  # then no more is drawn
    ids = tokenizer.encode("abé ")
    assert print_tokens(tokenizer, ids, ["xy"], monkeypatch)[0][-1] == "abé"
    ids = tokenizer.encode("xab")  # ab is one token, which completes both stop texts
    assert len(ids) == 2
    assert print_tokens(tokenizer, ids, ["b", "ab"], monkeypatch)[1] == "x\n"

def test_nothing_is_shown_after_the_end_of_text(monkeypatch):
    """What a model writes after this token belongs to another text, and the token is no text."""
    tokenizer = BPETokenizer.train("aba " * 9, 260)
    ids = tokenizer.encode("abé")
    seen, whole = print_tokens(tokenizer, [*ids, tokenizer.end_id, *ids], [], monkeypatch)
    assert whole == "abé\n" and len(seen) == len(ids) + 1

def test_tokens_that_cross_characters_are_shown_whole(monkeypatch):
    """A token may hold the end of one character and the beginning of the next, many times in a row
    (this happens in Chinese). Bytes that are no text at all become U+FFFD, as in `decode`, and do
    not spoil what follows."""
    tokenizer = BPETokenizer([(b"\xad", b"\xe4"), (b"\xad\xe4", b"\xb8")])
    text = "中" * 9
    assert [len(tokenizer.tokens[i]) for i in tokenizer.encode(text)] == [1, 1, *[3] * 8, 1]
    whole = print_tokens(tokenizer, tokenizer.encode(text), [], monkeypatch)[1]
    assert whole == text + "\n"
    rng = random.Random(0)
    for _ in range(300):
        pieces = [bytes([rng.randrange(256)]), "é".encode(), "😀".encode(), b"a", "中".encode()]
        data = b"".join(rng.choices(pieces, k=5))
        ids = [minigpt.BYTE_ORDER.index(byte) for byte in data]
        seen, whole = print_tokens(tokenizer, ids, [], monkeypatch)
        assert whole == data.decode("utf-8", "replace") + "\n"
        assert all(whole.startswith(shown) for shown in seen)

def test_showing_a_text_takes_time_in_proportion_to_its_length(monkeypatch):
    """Decoding the whole text again for each token would take hours for a long one."""
    tokenizer = CountingTokenizer.train("aba " * 9, 260)
    ids = tokenizer.encode("ab é😀\n" * 100)
    assert len(ids) > 500
    print_tokens(tokenizer, ids, ["never"], monkeypatch)
    assert tokenizer.decoded <= 4 * len(ids)

def test_half_a_character_at_the_end_is_shown_as_such(monkeypatch):
    """The last token may be half a character. It is not lost without a sign."""
    tokenizer = BPETokenizer.train("aba " * 9, 260)
    ids = tokenizer.encode("aé")[:-1]
    assert print_tokens(tokenizer, ids, [], monkeypatch)[1] == "a\ufffd\n"
    assert print_tokens(tokenizer, ids, ["xyz"], monkeypatch)[1] == "a\ufffd\n"
