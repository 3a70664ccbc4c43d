"""
The laws of minigpt, chapter by chapter in the order of minigpt.py.

A test's name states a law; its docstring says why it holds and what slip would break it. References
are computed in float64, by torch or by hand.
"""

import ast
import collections
import contextlib
import doctest
import functools
import hashlib
import http.server
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
import subprocess
import sys
import tempfile
import threading
import time
import types
from dataclasses import fields, replace
from pathlib import Path

import pytest
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
    TrainConfig,
    UserError,
    get_lr,
    load_checkpoint,
    train_step,
)

torch.set_num_threads(1)  # models this small only lose time by sharing their work
minigpt.comments = functools.cache(minigpt.comments)  # which reads the whole program each time

HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = str(HERE)  # for the processes that these tests start
SAMPLE = HERE / "data" / "sample.txt"
SOURCE = (HERE / "minigpt.py").read_text(encoding="utf-8")
SMALL = dict(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, dropout=0.0)
TINY = dict(batch_size=4, grad_accum=2, max_steps=6, learning_rate=1e-2, min_lr=1e-3,
            warmup_steps=2, eval_interval=2, eval_batches=2, sample_tokens=5, checkpoint_interval=0)

def small_config(**changes):
    return GPTConfig(**{**SMALL, **changes})

def stir(module, seed=0):
    """The module in float64, its weights moved so far that gains and biases matter."""
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
    return idx[:, :-1], idx[:, 1:]

def assert_close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def assert_same(a, b):
    """Bit for bit, through dictionaries and lists."""
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

# ---- The book ------------------------------------------------------------------------------------
def true_examples(test):
    """How many examples of a doctest there are; all must be true."""
    out = []
    failed, attempted = doctest.DocTestRunner().run(test, out=out.append)
    assert failed == 0, "".join(out)
    return attempted

@pytest.mark.parametrize("name", [t.name for t in doctest.DocTestFinder().find(minigpt)
                                  if t.examples])
def test_worked_example_in_a_docstring_is_true(name):
    """The numbers in the text are run, so prose and code cannot drift apart."""
    tests = {t.name: t for t in doctest.DocTestFinder().find(minigpt)}
    assert true_examples(tests[name]) > 0

def test_worked_examples_in_comments_are_true():
    """Those that stand between the chapters: lines `# >>> ...` and the answers below them."""
    text = "\n".join(re.findall(r"(?m)^# (>>> .*(?:\n# [^>\s].*)?)", SOURCE)).replace("\n# ", "\n")
    test = doctest.DocTestParser().get_doctest(text, dict(vars(minigpt)), "comments", None, 0)
    assert true_examples(test) >= 5

def test_numbers_in_the_comments_of_the_chapters_are_true():
    """The examples that are prose."""
    def rounded(numbers):
        return [round(number, 2) for number in numbers.tolist()]

    logits, unit = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 0.0])
    assert rounded(torch.softmax(logits, -1)) == [0.67, 0.24, 0.09]
    assert rounded(torch.softmax(logits / 0.5, -1)) == [0.87, 0.12, 0.02]
    assert round(math.log(65), 2) == 4.17
    assert rounded(minigpt.LayerNorm(2)(torch.tensor([1.0, 3.0]))) == [-1.0, 1.0]
    assert rounded(minigpt.RMSNorm(2)(torch.tensor([3.0, 4.0]))) == [0.85, 1.13]
    assert rounded(minigpt.gelu(torch.tensor([2.0, 0.0, -2.0]))) == [1.95, 0.0, -0.05]
    q, k, v = (torch.tensor(xs).view(1, 1, 2, 1) for xs in ((0.0, 2.0), (1.0, 3.0), (10.0, 20.0)))
    attention = minigpt.CausalSelfAttention(small_config(n_head=1))
    assert round(attention.attend(q, k, v)[0, 0, 1].item(), 1) == 19.8
    turned = minigpt.Rotary(20, 2)(unit.expand(1, 1, 20, 2), 0)[0, 0]
    assert rounded((turned[1:] * turned[:-1]).sum(-1)) == [0.54] * 19
    w = nn.Parameter(torch.zeros(2))
    w.grad = torch.tensor([3.0, 4.0])
    assert minigpt.clip_gradients([w], 1.0) == 5.0 and rounded(w.grad) == [0.6, 0.8]

def test_the_title_page_promises_the_parts_of_the_book():
    promised = re.findall(r"(?m)^    (Part [IV]+) +(\w.*?)  ", minigpt.__doc__)
    assert promised == re.findall(r"(?m)^# (Part [IV]+): (.*)", SOURCE) and len(promised) == 5

# ---- Part I stands alone -------------------------------------------------------------------------
PART_I = SOURCE[: SOURCE.index(f"# {'=' * 98}\n# Part II: ")]

@pytest.fixture
def part_one(monkeypatch):
    """A module made of the text of Part I and of nothing else."""
    module = types.ModuleType("part_one")
    monkeypatch.setitem(sys.modules, "part_one", module)
    exec(compile(PART_I, "part_one", "exec"), vars(module))
    return module

def verse_run(book, folder, state=None, **changes):
    """A run on verse by the names of `book`: a new one, or one that goes on from a checkpoint."""
    text = SAMPLE.read_text(encoding="utf-8")[:3000]
    tokenizer, config = book.CharTokenizer.train(text), book.TrainConfig(**{**TINY, **changes})
    sizes = {**SMALL, "vocab_size": tokenizer.vocab_size, "dropout": 0.3}
    model = book.new_model(book.GPTConfig(**sizes), config.seed)
    if state:
        model, tokenizer = book.model_from_checkpoint(state)
    folder.mkdir(exist_ok=True)
    run = book.Run(model, tokenizer, book.Corpus.from_text(text, tokenizer), config, folder)
    if state is not None:
        run.restore(state)
    return run

def trained(run, stop_at=None):
    """The score of a run and its last checkpoint; it may be interrupted when a step is complete."""
    over, score = run.over, None

    def over_or_stopped():
        if run.step == stop_at:
            run.save("latest.pt")
            raise KeyboardInterrupt
        return over()

    run.over = over_or_stopped
    with contextlib.suppress(KeyboardInterrupt):
        score = sys.modules[type(run).__module__].train(run)
    return score, load_checkpoint(run.out_dir / "latest.pt")

def test_part_one_alone_trains_saves_goes_on_and_writes(part_one, tmp_path):
    """Fails if Part I uses a later name, if a checkpoint lacks anything that a run needs (what was
    interrupted must end as what was not, bit for bit), or if the whole file does not run Part I."""
    assert not hasattr(part_one, "RMSNorm") and list(part_one.NORMS) == ["layernorm"]
    score, state = trained(verse_run(part_one, tmp_path / "whole"))
    _, half = trained(verse_run(part_one, tmp_path / "halves"), stop_at=3)
    assert half["step"] == 3 and state["step"] == 6 and half["best_step"] == 2
    assert_same(trained(verse_run(part_one, tmp_path / "halves", half)), (score, state))
    assert_same(trained(verse_run(minigpt, tmp_path / "file")), (score, state))
    assert state["model_config"]["attention"] == "explicit"
    model, tokenizer = part_one.model_from_checkpoint(state)
    idx = torch.tensor([tokenizer.encode("Speak")])
    text = tokenizer.decode(model.generate(idx, 20, 0.8, top_k=9, top_p=0.9)[0].tolist())
    assert text.startswith("Speak") and len(text) == 25

def test_the_program_at_the_end_of_part_one_runs(part_one, tmp_path, monkeypatch):
    """As printed, with the names of Part I alone, but for the sizes, which are cut down here."""
    lines = PART_I.partition("# And that is a GPT.")[2].partition("\n#\n# What")[0].split("\n")
    program = "\n".join(line[6:] for line in lines if line.startswith("#     "))
    program = re.sub(r"(n_layer|n_head|n_embd|max_steps)=\d+", r"\1=2", program)
    config = part_one.TrainConfig
    monkeypatch.setattr(part_one, "TrainConfig", lambda **given: config(**{**TINY, **given}))
    monkeypatch.setattr(part_one.GPTConfig, "block_size", 8)
    monkeypatch.chdir(tmp_path)
    exec(program, vars(part_one) | {"text": SAMPLE.read_text(encoding="utf-8")[:3000]})
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "latest.pt"]

def test_the_loop_is_about_learning_and_the_book_is_short_enough_to_be_read():
    """Devices, processes and signals are kept out of the loop by Part III's subclass of Run."""
    strange = "rank|process|signal|scaler|cache|compile|dice|autocast|device"
    for function in (minigpt.train, train_step):
        assert not re.findall(strange, inspect.getsource(function), re.I)
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(SOURCE))
               if isinstance(node, ast.FunctionDef)}
    assert max(lengths.values()) <= 50 and {"train", "train_step", "main"} <= set(lengths)
    assert PART_I.count("\n") <= 1000 and SOURCE.count("\n") <= 2500

# ---- Characters ----------------------------------------------------------------------------------
def test_characters_come_back_unharmed(tmp_path):
    """Also those that JSON or a text file could mangle; ids are 0 .. V-1, in sorted order."""
    for text in (SAMPLE.read_text(encoding="utf-8"), "\r\n\t\"\\é\u0000🎭z\u2028 "):
        tokenizer = CharTokenizer.train(text)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and set(ids) == set(range(tokenizer.vocab_size))
        assert tokenizer.itos == sorted(set(text))
        assert all(tokenizer.stoi[tokenizer.itos[i]] == i for i in ids)
        tokenizer.save(tmp_path)
        for same in (CharTokenizer.load(tmp_path), CharTokenizer(tokenizer.state)):
            assert (same.itos, same.stoi) == (tokenizer.itos, tokenizer.stoi)
    assert CharTokenizer.train("ab").encode("") == []

def test_unknown_character_is_named():
    """The user must learn which character it was."""
    with pytest.raises(UserError, match=r"'ü' \(U\+00FC\) is not .* of 4\b"):
        CharTokenizer.train("abcd").encode("abüd")

# ---- Batches -------------------------------------------------------------------------------------
def test_batches_are_random_windows_and_their_successors():
    """On tokens 0, 1, 2, ... a successor is one more. The first and the last window can be drawn;
    the generator alone decides. Fails for a shift of two, an end off by one."""
    x, y = minigpt.get_batch(torch.arange(12, dtype=torch.int16), block_size=8, batch_size=500)
    assert x.shape == y.shape == (500, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(8))
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3}
    assert set(minigpt.get_batch(torch.arange(9), 8, 3)[0][:, 0].tolist()) == {0}
    before = torch.get_rng_state()
    draws = [minigpt.get_batch(torch.arange(999), 8, 4, torch.Generator().manual_seed(s))[0]
             for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.get_rng_state())

def test_split_is_by_position_and_loses_nothing():
    """Nine tenths, then the rest. Fails if the parts are swapped or overlap."""
    text = SAMPLE.read_text(encoding="utf-8")
    tokenizer = CharTokenizer.train(text)
    corpus = Corpus.from_text(text, tokenizer)
    assert len(corpus.train) == int(0.9 * len(text)) and corpus.val_characters == len(corpus.val)
    assert tokenizer.decode(corpus.train.tolist() + corpus.val.tolist()) == text
    corpus = Corpus.from_text(text[:5000], BPETokenizer.train(text, 300))
    assert corpus.val_characters == 500 > len(corpus.val)

# ---- The task, and the simplest model ------------------------------------------------------------
def test_loss_is_the_mean_negative_log_probability():
    """By hand, in float64. Fails for a sum, a base-2 logarithm, or targets out of line."""
    model, (x, y) = small_model(), pair(random_ids(3, 9))
    logits, loss = model(x, y)
    p = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    by_hand = -sum(p[b, t, y[b, t]].log() for b in range(3) for t in range(8)) / 24
    assert abs(loss.item() - by_hand.item()) < 1e-6  # the loss itself is computed in float32
    assert loss.dtype == torch.float32
    assert model(x)[1] is None and logits.shape == (3, 8, 11)
    (gradient,) = torch.autograd.grad(loss, logits)  # p_i, minus 1 for what came; of a mean of 24
    assert_close(gradient * 24, p - F.one_hot(y, 11), 1e-6)

def fit(model, batch, steps, **settings):
    """The loss after some steps on one batch."""
    c = TrainConfig(**{**dict(grad_accum=1, weight_decay=0.0), **settings})
    optimizer = minigpt.OPTIMIZERS[c.optimizer](model, c)
    for _ in range(steps):
        loss, _ = train_step(model, optimizer, [batch], c)
    return loss.item()

def test_bigram_learns_the_frequencies_of_pairs():
    """Its optimum is known: row i tends to the frequencies of what follows i in the data."""
    text = "abracadabra abracadabra"
    tokenizer = CharTokenizer.train(text)
    ids, V = torch.tensor(tokenizer.encode(text)), tokenizer.vocab_size
    counts = torch.zeros(V, V)
    for a, b in itertools.pairwise(ids.tolist()):
        counts[a, b] += 1
    p = counts / counts.sum(dim=1, keepdim=True)
    model = minigpt.Bigram(GPTConfig(vocab_size=V, block_size=len(ids) - 1, model="bigram"))
    fit(model, pair(ids[None]), 200, learning_rate=0.3, min_lr=0.1)
    assert_close(torch.softmax(model.wte.weight, dim=-1), p, 0.02)

# ---- Attention -----------------------------------------------------------------------------------
KINDS = [minigpt.CausalSelfAttention, Attention, minigpt.FusedAttention]

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("T, n_head", [(1, 3), (2, 3), (8, 3), (8, 1), (8, 12)])
def test_attention_explicit_equals_fused_equals_torch_multihead(bias, T, n_head):
    """Four implementations, one function, in value and in every gradient. Fails for a missing
    1/sqrt(hs), a mask off by one, heads split along the wrong axis, q and k exchanged."""
    reference = stir(nn.MultiheadAttention(12, n_head, bias=bias, batch_first=True))
    weight, z = random_x(2, T, 12, seed=1), random_x(2, T, 12).requires_grad_()
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

@pytest.mark.parametrize("kind", KINDS)
def test_the_future_cannot_be_seen_by_gradient(kind):
    """d output[t] / d input[s] is zero exactly for s > t: training cannot use the future either."""
    layer, x = stir(kind(small_config())), random_x(1, 6, 8).requires_grad_()
    for t in range(6):
        (gradient,) = torch.autograd.grad(layer(x)[0, t].sum(), x)
        seen = gradient.abs().sum(dim=-1)[0] > 1e-12
        assert seen.tolist() == [s <= t for s in range(6)]

def check_dropped(dropped, whole, p):
    """Each entry is zero or 1 / (1 - p) times what it was, and the share of zeros is about p."""
    dropped, whole = (t[whole.abs() > 1e-9] for t in (dropped, whole))
    zero = dropped.abs() < 1e-9
    assert_close(dropped[~zero], whole[~zero] / (1 - p), 1e-8)
    assert abs(zero.double().mean().item() - p) < 0.05

def test_dropout_drops_attention_weights_and_what_leaves_a_part():
    """Not scores, not what comes of the weights: division by the values shows them. Then the output
    of attention and of the MLP, and the sum of two vectors before the first block."""
    torch.manual_seed(0)
    q, k, x = random_x(90, 1, 8, 8), random_x(90, 1, 8, 8, seed=1), random_x(50, 8, 8)
    v = random_x(8, 8, seed=2).expand(90, 1, 8, 8)
    for kind in (*KINDS, minigpt.MLP, minigpt.GatedMLP):
        layer, twin = (kind(small_config(n_head=1, dropout=0.25)).double() for _ in range(2))
        if kind in KINDS:
            dropped, whole = (m.attend(q, k, v) @ v.inverse() for m in (layer, twin.eval()))
            check_dropped(dropped, whole, 0.25)
            layer.attn_dropout.p = 0.0
        check_dropped(layer(x), layer.eval()(x), 0.25)
    model, idx = small_model(dropout=0.25, n_embd=16), random_ids(50, 8)
    model.h, model.ln_f, model.lm_head = nn.ModuleList(), nn.Identity(), nn.Identity()
    check_dropped(model(idx)[0], model.eval()(idx)[0], 0.25)
    assert_close(model(idx)[0], model.wte.weight[idx] + model.wpe.weight)

# ---- MLP, norms, block ---------------------------------------------------------------------------
@pytest.mark.parametrize("activation, bend", [
    ("gelu", lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))),
    ("relu", lambda h: h.clamp(min=0)), ("relu2", lambda h: h.clamp(min=0) ** 2),
    ("swiglu", lambda h: h[..., :10] * torch.sigmoid(h[..., :10]) * h[..., 10:]),
])
@pytest.mark.parametrize("bias", [True, False])
def test_mlps_are_their_equations(activation, bend, bias):
    """Fails for GELU's erf form, exchanged halves in SwiGLU, a missing square, a fixed width. All
    have as many weights: SwiGLU has three matrices in place of two, and two thirds of the width."""
    config = small_config(activation=activation, mlp_ratio=2.0, bias=bias)
    mlp, x = stir(minigpt.MLPS[activation](config)), random_x(2, 3, 8) * 3
    b, c = (mlp.c_fc.bias, mlp.c_proj.bias) if bias else (0.0, 0.0)
    h = x @ mlp.c_fc.weight.T + b
    assert h.shape[-1] == (20 if activation == "swiglu" else 16)
    assert_close(mlp(x), bend(h) @ mlp.c_proj.weight.T + c)
    config = small_config(activation=activation, n_embd=96, bias=False)
    assert minigpt.count_parameters(minigpt.MLPS[activation](config)) == 8 * 96 * 96

@pytest.mark.parametrize("ours, theirs, tolerance", [
    *((kind(6, bias), nn.LayerNorm(6, bias=bias), 1e-9) for bias in (True, False)
      for kind in (minigpt.LayerNorm, minigpt.FusedLayerNorm)),
    (minigpt.RMSNorm(6), nn.RMSNorm(6, eps=1e-5), 1e-4)])  # it squares in float32
def test_norms_equal_torchs_in_value_and_gradient(ours, theirs, tolerance):
    """For inputs small, large and far from zero. Fails for a variance over C - 1, a missing eps,
    gain or bias; for RMSNorm: a sum in place of the mean, a mean subtracted, squares in 16 bits."""
    ours.double().load_state_dict(stir(theirs).state_dict())
    weight = random_x(2, 3, 6, seed=1)
    for scale, offset in ((1.0, 0.0), (1e-3, 0.0), (100.0, 1000.0)):
        x = (random_x(2, 3, 6) * scale + offset).requires_grad_()
        y, expected = ours(x), theirs(x)
        assert_close(y, expected, tolerance)
        for a, b in zip(*(torch.autograd.grad((out * weight).sum(), [x, *norm.parameters()])
                          for out, norm in ((y, ours), (expected, theirs)))):
            assert_close(a, b, 10 * tolerance)
    for dtype in (torch.float16, torch.bfloat16):
        y = minigpt.RMSNorm(2)(torch.tensor([300.0, 400.0], dtype=dtype))
        assert y.dtype == dtype
        assert_close(y.float(), torch.tensor([0.8485, 1.1314]), 4e-3)

def test_the_parts_that_are_asked_for_are_the_parts_that_are_built():
    """Everywhere in the model, with and without bias."""
    kinds = {"layernorm": minigpt.LayerNorm, "rmsnorm": minigpt.RMSNorm, "none": nn.Identity}
    for norm, kind in kinds.items():
        model = GPT(small_config(norm=norm, qk_norm=True))
        for block in model.h:
            for built in (block.ln_1, block.ln_2, block.attn.qk_norm, model.ln_f):
                assert type(built) is kind
    for attention, kind, norm in (("explicit", Attention, minigpt.LayerNorm),
                                  ("fused", minigpt.FusedAttention, minigpt.FusedLayerNorm)):
        model = GPT(small_config(attention=attention))
        assert type(model.h[0].attn) is kind and type(model.h[0].ln_1) is type(model.ln_f) is norm
    for bias in (True, False):
        biased = [m.bias is not None for m in GPT(small_config(bias=bias)).modules()
                  if isinstance(m, (nn.Linear, minigpt.LayerNorm))]
        assert biased == [bias] * 13 + [False]  # the head has none

def layer_norm(x, norm):
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias)

def test_block_has_its_norms_and_residuals_in_their_places():
    """pre: x + attn(ln_1(x)), x + mlp(ln_2(x)). post: the norm follows each addition."""
    block, x = stir(minigpt.Block(small_config())), random_x(2, 5, 8)
    middle = x + block.attn(layer_norm(x, block.ln_1))
    assert_close(block(x), middle + block.mlp(layer_norm(middle, block.ln_2)))
    post = minigpt.PostNormBlock(small_config()).double()
    post.load_state_dict(block.state_dict())
    middle = layer_norm(x + block.attn(x), block.ln_1)
    assert_close(post(x), layer_norm(middle + block.mlp(middle), block.ln_2))
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    assert torch.equal(block(x), x)
    assert type(GPT(small_config(norm_position="post")).h[1]) is minigpt.PostNormBlock

# ---- The model -----------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, dict(bias=False, n_head=1, mlp_ratio=2.0),
                                     dict(tie_weights=False, n_layer=3)])
def test_forward_is_tables_blocks_norm_and_head(changes):
    """Fails if the final norm, the position table or the order of the blocks is lost."""
    model, idx = small_model(**changes), random_ids(2, 6)
    for start in (0, 2):
        x = model.wte.weight[idx] + model.wpe.weight[start : start + 6]
        for i in range(model.config.n_layer):
            x = model.h[i](x)
        assert_close(model(idx, start=start)[0], layer_norm(x, model.ln_f) @ model.lm_head.weight.T)

@pytest.mark.parametrize("changes", [dict(tie_weights=False), dict(model="bigram"),
                                     dict(pos="rope", activation="swiglu", qk_norm=True)])
def test_initialization_is_gpt2s(changes):
    """0.02; projections onto the stream less by sqrt(2 n_layer). So the first loss is near ln V."""
    sizes = dict(vocab_size=65, block_size=64, n_layer=8, n_head=4, n_embd=192)
    model = minigpt.new_model(GPTConfig(**sizes, **changes), 0).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name
        else:
            assert torch.all(p == (0.0 if name.endswith("bias") else 1.0)), name
    loss = model(*pair(random_ids(2, 65, vocab_size=65)))[1].item()
    assert abs(loss - math.log(65)) < 0.15

def test_first_weights_depend_on_the_seed_alone_and_on_all_of_it():
    """Not on what was drawn before; and 2^32 + 1 is not 1, as it would be in 32 bits."""
    seeds = (1, 1, 2, 2**32 + 1)
    a, b, *others = (minigpt.new_model(small_config(), seed).wte.weight for seed in seeds)
    assert torch.equal(a, b) and not any(torch.equal(a, other) for other in others)
    numbers = [*itertools.product(range(-9, 30), range(30)), (1,), (2**32 + 1,), (11,), (0,)]
    derived = {minigpt.derived_seed(*some) for some in numbers}
    assert len(derived) == len(numbers) and 0 <= min(derived) <= max(derived) < 2**32

def test_head_and_token_table_are_one_matrix():
    """Also after a step; gradients from both uses add up. Untied, each has its own."""
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

def test_what_does_not_fit_is_refused():
    """There are no positions beyond block_size; heads share the channels; pairs need two."""
    for start, n in ((0, 9), (3, 6)):
        with pytest.raises(ValueError, match="9 tokens given, but block_size is 8"):
            small_model()(random_ids(1, n), start=start)
    with pytest.raises(UserError, match="--n_embd 8: must be divisible by --n_head 3"):
        small_config(n_head=3)
    for changes in (dict(pos="rope", n_embd=6), dict(pos="sinusoidal", n_embd=9, n_head=3)):
        with pytest.raises(UserError, match="--pos: [39] channels make no pairs"):
            GPT(small_config(**changes))

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_descends_and_one_batch_can_be_memorized(optimizer):
    """Targets of pure noise can only be memorized, for which every part has to work."""
    idx, model = random_ids(4, 9), minigpt.new_model(small_config(n_embd=32), 0)
    idx[:, 0] = torch.arange(4)  # nothing could tell apart the successors of a shared beginning
    before = model(*pair(idx))[1].item()
    fit(model, pair(idx), 1, optimizer=optimizer, learning_rate=1e-3)
    assert model(*pair(idx))[1].item() < before and all(p.grad is None for p in model.parameters())
    assert fit(model, pair(idx), 150, optimizer=optimizer, learning_rate=1e-2) < 0.02

# ---- Writing -------------------------------------------------------------------------------------
def kept(*probabilities, **options):
    """Which tokens of one distribution may still be drawn; their logits are as they were."""
    logits = torch.tensor([probabilities, probabilities[::-1]], dtype=torch.float64).log()
    filtered = minigpt.filter_logits(logits, **options)
    alive = filtered.isfinite()
    assert torch.equal(filtered[alive], logits[alive])
    return "".join(str(int(one)) for one in alive[0])

def test_filters_keep_the_smallest_set_that_reaches_p_and_the_k_likeliest():
    """0.5 alone reaches 0.5 (exact in binary); for 0.51 the token that crosses the line stays; k is
    k, also among equals; and top-p counts what top-k left, 4/7 and 3/7."""
    for p, expected in ((0.1, "0100"), (0.5, "0100"), (0.51, "0101"), (0.75, "0101"),
                        (0.76, "1101"), (0.875, "1101"), (0.88, "1111"), (1.0, "1111")):
        assert kept(0.125, 0.5, 0.125, 0.25, top_p=p) == expected
    for k, expected in ((1, "0100"), (2, "0101"), (3, "1101"), (4, "1111"), (9, "1111")):
        assert kept(0.2, 0.4, 0.1, 0.3, top_k=k) == expected
    assert kept(0.25, 0.25, 0.25, 0.25, top_k=2) == "1100"
    assert kept(0.2, 0.4, 0.1, 0.3, top_k=2, top_p=0.57) == "0100"
    assert kept(0.2, 0.4, 0.1, 0.3, top_k=2, top_p=0.58) == "0101"

@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    """100,000 draws against p^(1/T). Fails if logits are multiplied by the temperature."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    drawn = minigpt.draw_token(p.log().expand(100_000, 4), temperature,
                       generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (100_000, 1)
    expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    assert_close(drawn.flatten().bincount(minlength=4) / 100_000, expected, 0.01)

def test_filters_reach_the_draw_and_act_after_the_temperature():
    """At temperature 5, top_k 1 or a tiny top_p still leave only the likeliest token; and top_p
    counts the tempered probabilities. Tiny temperatures are greedy, too, and never overflow."""
    model, idx = small_model(), random_ids(4, 3)
    greedy = model.generate(idx, 6, temperature=0)
    for options in (dict(top_k=1), dict(top_p=1e-9), dict(top_p=1e-46)):
        assert torch.equal(model.generate(idx, 6, temperature=5.0, **options), greedy)
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(200, 3)  # 0.87, 0.12, 0.02 at 0.5
    assert minigpt.draw_token(logits, temperature=0.5, top_p=0.7).unique().tolist() == [0]
    assert minigpt.draw_token(logits, temperature=1.0, top_p=0.7).unique().tolist() == [0, 1]
    logits = torch.tensor([[1.0, 3.0, 2.0], [500.0, -500.0, 0.0]])
    for temperature, size in ((0, 1), (1e-30, 1), (1e-30, 1e30)):
        assert minigpt.draw_token(logits * size, temperature).tolist() == [[1], [0]]

def test_the_same_random_numbers_write_the_same_text():
    """Without dropout."""
    model, idx = small_model(dropout=0.5), random_ids(1, 1)
    texts = [model.generate(idx, 30, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])

def test_the_window_moves_by_halves_and_only_when_it_is_full():
    """Against a text that grows token by token. Fails for a start off by one."""
    for block_size in range(1, 10):
        start = 0
        for length in range(1, 40):
            start += (block_size + 1) // 2 if length - start > block_size else 0
            assert minigpt.window_start(length, block_size) == start

@pytest.mark.parametrize("options", [dict, lambda: dict(read=CachedReader())])
def test_generation_continues_and_halves_a_full_window(options):
    """Greedy text, step by step, far beyond block_size, for short and long prompts."""
    model, before = small_model(dropout=0.5), torch.get_rng_state()
    for n in (1, 3, 8, 20):
        idx = random_ids(6, n, seed=n)
        out = model.train().generate(idx, 14, temperature=0, **options())
        assert out.shape == (6, n + 14) and torch.equal(out[:, :n], idx)
        for t in range(n, n + 14):
            logits, _ = model.eval()(out[:, max(0, math.ceil((t - 8) / 4) * 4) : t])
            assert torch.equal(out[:, t], logits[:, -1].argmax(dim=-1))
        assert torch.equal(model.generate(idx, 0), idx)
    assert torch.equal(before, torch.get_rng_state())

# ---- Learning ------------------------------------------------------------------------------------
def test_adamw_is_the_equation_in_the_text_and_decays_matrices_only():
    """Three steps by hand, with the bias correction, and the decoupled decay for matrices. Fails if
    biases or gains are decayed, if a setting is lost, or if the tied matrix is updated twice."""
    c = TrainConfig(learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9)
    model = small_model()
    optimizer = minigpt.make_adamw(model, c)
    before = [p.detach().clone() for p in model.parameters()]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters()})
    m, v = [0.0] * len(before), [0.0] * len(before)
    for t in (1, 2, 3):
        for i, p in enumerate(model.parameters()):
            g = random_x(*p.shape, seed=t) * 1e-7  # so small that eps counts
            p.grad = g.clone()
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.9 * v[i] + 0.1 * g * g
            move = m[i] / (1 - 0.8**t) / ((v[i] / (1 - 0.9**t)).sqrt() + 1e-8)
            before[i] = before[i] - 0.1 * (move + (0.5 * before[i] if p.dim() == 2 else 0.0))
        optimizer.step()
    for p, w in zip(model.parameters(), before, strict=True):
        assert_close(p.detach(), w)

def test_schedule_at_named_points():
    """First step, peak, middle, floor, beyond. Fails for a warm-up off by one."""
    c = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=4, max_steps=24)
    assert [get_lr(s, c) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [get_lr(s, c) for s in (9, 14, 24, 1000)] == pytest.approx(
        [0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 0.6, 0.2, 0.2])
    line = replace(c, schedule="linear")
    assert [get_lr(s, line) for s in (0, 4, 9, 24)] == pytest.approx([0.2, 1.0, 0.8, 0.2])
    assert get_lr(0, replace(c, warmup_steps=0)) == 1.0
    assert get_lr(4, replace(c, warmup_steps=10, max_steps=5)) == pytest.approx(5 / 11)
    with pytest.raises(UserError, match="--min_lr 0.2: above --learning_rate 0.1"):
        replace(c, learning_rate=0.1)

@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clipping_equals_torch_and_keeps_the_direction(max_norm):
    """One norm over all tensors; small gradients and max_norm 0 leave everything as it is."""
    ours, theirs = ([nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 5, 1)]
                    for _ in range(2))
    for p, q in zip(ours[:2], theirs):  # the third one has no gradient
        p.grad = random_x(*p.shape)
        q.grad = p.grad.clone()
    norm = minigpt.clip_gradients(iter(ours), max_norm)
    assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm or math.inf))
    for p, q in zip(ours[:2], theirs):
        assert_close(p.grad, q.grad)

@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_accumulated_micro_batches_equal_the_large_batch(clip):
    """Loss, norm and weights of two steps by hand. Fails if the loss is not divided by grad_accum,
    or if gradients are clipped or cleared between micro-steps, or never."""
    idx = random_ids(2, 12, 9)
    for accum in (1, 3, 12):
        model, c = small_model(), TrainConfig(grad_accum=accum, grad_clip=clip)
        weights, vector = list(model.parameters()), nn.utils.parameters_to_vector
        optimizer = torch.optim.SGD(weights, lr=0.1)
        for part in idx:
            before, loss = vector(weights).detach(), model(*pair(part))[1].double()
            gradient = vector(torch.autograd.grad(loss, weights))
            logged = train_step(model, optimizer, map(pair, part.split(12 // accum)), c)
            assert_close(torch.stack([x.double() for x in logged]),
                         torch.stack([loss.detach(), gradient.norm()]), 1e-6)
            if clip:
                gradient *= clip / gradient.norm()
            assert_close(vector(weights).detach(), before - 0.1 * gradient, 1e-6)

# ---- Evaluation and checkpoints ------------------------------------------------------------------
def small_corpus():
    return Corpus(*random_ids(200).split([150, 50]), val_characters=100)

def test_estimating_the_loss_leaves_no_trace():
    """No dropout, no gradients, no random numbers used; the same batches each time."""
    model, c = small_model(dropout=0.5), TrainConfig(batch_size=3, eval_batches=4)
    before, corpus = torch.get_rng_state(), small_corpus()
    first = minigpt.estimate_loss(model, corpus, c)
    assert first == minigpt.estimate_loss(model.train(), corpus, c) and not model.training
    assert torch.equal(before, torch.get_rng_state())
    for name, tokens in (("train", corpus.train), ("val", corpus.val)):
        generator = torch.Generator().manual_seed(0)
        losses = [model(*minigpt.get_batch(tokens, 8, 3, generator))[1].item() for _ in range(4)]
        assert first[name] == pytest.approx(sum(losses) / 4)
    model.register_forward_pre_hook(lambda module, _: modes.append(
        (module.training, torch.is_grad_enabled())))
    modes = []
    minigpt.estimate_loss(model, corpus, replace(c, eval_batches=1))
    train_step(model, torch.optim.SGD(model.parameters()), [(random_ids(1, 8),) * 2], c)
    minigpt.evaluate(model, corpus.val[:9])
    assert modes == [(False, False)] * 2 + [(True, True), (False, False)]

@pytest.mark.parametrize("n", [2, 8, 9, 10, 17, 50])
def test_evaluation_counts_every_token_once(n):
    """Token by token with its own window, in float64. Fails if the rest is dropped, if windows
    overlap, or if a mean of batch means gives a short last batch too much weight."""
    model, tokens, total = small_model(dropout=0.5).eval(), random_ids(n), 0.0
    for t in range(1, n):
        logits = model(tokens[None, (t - 1) // 8 * 8 : t])[0][0, -1]
        total -= torch.log_softmax(logits, dim=-1)[tokens[t]].item()
    for batch_size in (1, 4, 64):
        shares = []
        nats = minigpt.evaluate(model.train(), tokens.short(), batch_size, progress=shares.append)
        assert nats == pytest.approx(total / (n - 1), abs=1e-6)
        assert shares == sorted(shares) and shares[-1] == 1.0
    assert minigpt.describe_loss(math.log(8), small_corpus()).endswith(
        "49 tokens: 2.0794 nats per token, perplexity 8, 1.5000 bits per character")  # 2 to a token

def test_checkpoint_is_tensors_and_plain_values_whole_or_not_there(tmp_path, monkeypatch):
    """What else could be in a file is refused unrun. A disk that fills up in the middle of a write
    leaves the old file, and no half of a new one."""
    path, code = tmp_path / "a.pt", tmp_path / "b.pt"
    state = {"model": small_model().state_dict(), "step": 3, "best": math.inf, "names": ["é"],
             "tokenizer": ("bpe", [(b"a", b"\xff")])}
    minigpt.save_checkpoint(path, state)
    torch.save({"code": os.system}, code)
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(code)
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        minigpt.save_checkpoint(path, {"step": 4})
    assert_same(load_checkpoint(path), state)
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]

# ---- The training loop ---------------------------------------------------------------------------
def small_run(folder, model=None, **changes):
    config = TrainConfig(**{**TINY, **changes})
    model = model or minigpt.new_model(small_config(dropout=0.3), config.seed)
    return minigpt.Run(model, CharTokenizer(list("\nabcdefghij")), small_corpus(), config, folder)

def test_batches_are_a_function_of_the_seed_and_the_step(tmp_path):
    """grad_accum of them, all different; the same in every run that comes to this step; and dropout
    is seeded with them. Fails if seed + step takes the place of both."""
    def batches(step, others=0, **changes):
        run = small_run(tmp_path, minigpt.Bigram(small_config()), grad_accum=3, **changes)
        run.step, drawn = step, []
        for batch in run.batches():
            drawn.append(batch)
            torch.rand(others)  # as dropout may draw in between
        next(run.batches())
        return [*drawn, torch.rand(9)]

    first = batches(4)
    assert len(first) == 4 and all(x.shape == y.shape == (4, 8) for x, y in first[:3])
    assert_same(batches(4, others=7, max_steps=99, optimizer="muon"), first)
    drawn = [first, batches(5), batches(4, seed=1338), batches(3, seed=1338)]
    assert len({tuple(x.flatten().tolist()) for some in drawn for x, _ in some[:3]}) == 12
    assert len({tuple(some[3].tolist()) for some in drawn}) == 4
    windows = small_corpus().train.unfold(0, 9, 1)  # of the training part, not of the other
    for row in torch.cat(first[0], dim=1):
        assert (windows == torch.cat([row[:8], row[15:]])).all(dim=1).any()

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_step_has_its_rate_and_comes_in_its_order(tmp_path, monkeypatch, optimizer):
    """The rate is that of the step's number, in every group; dropout acts; evaluation at step 0, at
    intervals and in the end; snapshots in between. Fails for a step counted early or late."""
    run = small_run(tmp_path, optimizer=optimizer, max_steps=7, eval_interval=3, log_interval=2,
                    checkpoint_interval=2)
    steps, said, saved, report, save = [], [], [], run.report, run.save
    monkeypatch.setattr(run, "report", lambda loss, norm: report(loss, norm) or steps.append(
        (run.model.training, *{group["lr"] for group in run.optimizer.param_groups})))
    monkeypatch.setattr(run, "say", said.append)
    monkeypatch.setattr(run, "save", lambda name: save(name) or saved.append((run.step, name)))
    run.model.eval()
    minigpt.train(run)
    assert steps == [(True, get_lr(step, run.config)) for step in range(7)]
    assert [(step, name[:4]) for step, name in saved if name != "best.pt"] == [
        (0, "late"), (2, "step"), (2, "late"), (3, "late"), (4, "step"), (4, "late"), (6, "late"),
        (6, "step"), (6, "late"), (7, "late")]
    assert load_checkpoint(tmp_path / "step_000004.pt")["step"] == 4
    lines = [line.split(" | ")[0].split(": training")[0] for line in said if line[:4] == "step"]
    assert lines == ["step 0", "step 2/7", "step 3", "step 4/7", "step 6/7", "step 6", "step 7"]
    for _ in range(2):
        run.show_sample()
    assert said[-1] == said[-2] != ""

def scripted(monkeypatch, run, losses):
    """Evaluations give these validation losses, with training losses that say the opposite."""
    script = iter(losses)
    monkeypatch.setattr(minigpt, "estimate_loss", lambda model, corpus, config: {
        "val": (loss := next(script)), "train": -loss})

@pytest.mark.parametrize("losses, best", [([5, 3, 2, 4], 4), ([1, 2, 3, 4], 0), ([5, 3, 3, 3], 2),
                                          ([5, 4, 3, 2], 6), ([9, 5, math.nan, 7], 2)])
def test_the_best_model_has_the_lowest_validation_loss(tmp_path, monkeypatch, losses, best):
    """Not the lowest training loss, not the last; among equals the first. Its score counts."""
    run = small_run(tmp_path)
    weights = {0: run.model.wte.weight.detach().clone()}
    scripted(monkeypatch, run, losses)
    monkeypatch.setattr(run, "report", lambda loss, norm: weights.update(
        {run.step: run.model.wte.weight.detach().clone()}))
    score, _ = trained(run)
    state = load_checkpoint(tmp_path / "best.pt")
    assert (state["step"], state["best_step"], state["best_val"]) == (best, best, losses[best // 2])
    assert torch.equal(state["model"]["wte.weight"], weights[best])
    assert_same(dict(run.model.state_dict()), dict(state["model"]))
    assert score == minigpt.evaluate(run.model, run.corpus.val) and run.step == 6

@pytest.mark.parametrize("patience, losses, end", [
    (1, [5, 4, 4], 4), (2, [5, 4, 6, 5], 6), (2, [1, 2, 2], 4), (2, [5, 6, 4, 5, 3.9, 5, 5], 12),
    (0, [1, 2, 3, 4, 5, 6, 7, 8], 13), (3, [1, 2, 3, 4], 6)])
def test_patience_ends_a_run_when_it_promised(tmp_path, monkeypatch, patience, losses, end):
    """After so many evaluations without a better one, not a step more or less; 0 waits for ever."""
    run = small_run(tmp_path, patience=patience, max_steps=13, sample_tokens=0)
    scripted(monkeypatch, run, losses)
    trained(run)
    assert run.step == end

# ---- Part II: variations of the model ------------------------------------------------------------
def test_rope_turns_channel_i_with_i_plus_half_by_the_position():
    """(1, 0) becomes (cos t w_i, sin t w_i), t from 0. Fails for another pairing or direction."""
    rotary = minigpt.Rotary(20, 4)
    for i, w in ((0, 1.0), (1, 0.01)):
        unit = torch.eye(4, dtype=torch.float64)[[i, i + 2]].view(1, 2, 1, 4).expand(1, 2, 9, 4)
        t = w * torch.arange(9, dtype=torch.float64)
        for start in (0, 7):
            turned, a = rotary(unit, start)[0], t + w * start
            expected = torch.zeros(2, 9, 4, dtype=torch.float64)
            expected[0, :, i], expected[0, :, i + 2] = a.cos(), a.sin()
            expected[1, :, i], expected[1, :, i + 2] = -a.sin(), a.cos()
            assert_close(turned, expected, 1e-5)  # the tables are float32

@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("kind", [Attention, minigpt.FusedAttention])
def test_queries_and_keys_are_normalized_then_turned_and_values_are_not(norm, kind):
    """With gains that are not 1, for which the order matters. Fails if v is turned, if k is not."""
    layer = stir(kind(small_config(pos="rope", qk_norm=True, norm=norm)))
    x = random_x(3, 8, 8)
    q, k, v = minigpt.CausalSelfAttention.heads(layer, x)
    q, k = (layer.rotary(layer.qk_norm(t), 0) for t in (q, k))
    y = minigpt.CausalSelfAttention.attend(layer, q, k, v).transpose(1, 2).flatten(2)
    assert_close(layer(x), layer.c_proj(y), 1e-6)
    layer = kind(small_config(qk_norm=True, norm=norm, bias=False)).double()
    before = layer(x)
    layer.c_attn.weight.data[:16] *= 10  # the rows that make q and k: their size is normalized away
    assert_close(layer(x), before, 1e-3)

def test_sinusoids_are_the_papers_over_the_root_of_the_width():
    """Entry by entry, sine and cosine side by side; saved, but not learned."""
    table = GPT(small_config(pos="sinusoidal", n_embd=12, block_size=40)).wpe(torch.arange(40))
    for t, i in itertools.product((0, 1, 7, 39), range(6)):
        a, entries = t * 10000 ** (-2 * i / 12), table[t, 2 * i : 2 * i + 2] * math.sqrt(12)
        assert entries.tolist() == pytest.approx([math.sin(a), math.cos(a)], abs=1e-5)
    model, names = GPT(small_config(pos="sinusoidal")), list(GPT(small_config()).state_dict())
    assert list(model.state_dict()) == names and "wpe.weight" not in dict(model.named_parameters())
    assert list(GPT(small_config(pos="rope")).state_dict()) == [n for n in names if "wpe" not in n]

VARIANTS = [dict(zip(("norm", "norm_position", "pos", "activation", "qk_norm", "bias"), values))
            for values in itertools.product(minigpt.NORMS, minigpt.BLOCKS, minigpt.POSITIONS,
                                            minigpt.ACTIVATIONS, (False, True), (True, False))]

def test_token_shift_shows_half_of_the_channels_of_the_position_before():
    """To attention and MLP, after the norm if that comes first; at first there are zeros."""
    def shifted(x):
        return torch.cat([F.pad(x, (0, 0, 1, 0))[:, :-1, :4], x[..., 4:]], dim=-1)

    x, b = random_x(2, 5, 8), small_model().h[0]
    y = x + b.attn(shifted(b.ln_1(x)))
    assert_close(small_model(token_shift=True).h[0](x), y + b.mlp(shifted(b.ln_2(y))))
    y, post = b.ln_1(x + b.attn(shifted(x))), small_model(token_shift=True, norm_position="post")
    assert_close(post.h[0](x), b.ln_2(y + b.mlp(shifted(y))))

def test_windows_are_short_at_first(tmp_path):
    """And so many more of them, for that share of the steps; then whole."""
    run = tiny_full_run(tmp_path, max_steps=8, short_share=0.5, short_block=2, batch_size=3,
                        grad_accum=2)
    for step, shape in ((0, (12, 2)), (3, (12, 2)), (4, (3, 8)), (7, (3, 8))):
        run.step = step
        assert [tuple(x.shape) for x, _ in run.batches()] == [shape] * 2

def test_even_windows_leave_no_gap_and_follow_from_the_step(tmp_path):
    """Successors of one another, of the training part, to its end; in every stretch of steps no gap
    is wider than twice the mean; where only one window fits, it is that one."""
    def run_at(step, **changes):
        run = tiny_full_run(tmp_path, max_steps=99, sampling="even", batch_size=3, grad_accum=2,
                            **changes)
        run.corpus, run.step = Corpus(torch.arange(500), torch.arange(9), 9), step
        return run

    for first in (0, 40):
        pairs = [pair for step in range(first, first + 20) for pair in run_at(step).batches()]
        assert all(torch.equal(x + 1, y) and x.shape == (3, 8) for x, y in pairs)
        starts = sorted(int(row[0]) for x, _ in pairs for row in x)
        gaps = [b - a for a, b in itertools.pairwise([*starts, 492 + starts[0]])]
        assert len(starts) == 120 and max(gaps) <= 2 * 492 / 120 + 1 and starts[-1] < 492
    golden = [int(row[0]) for x, _ in run_at(0).batches() for row in x]
    steps = [(b - a) % 492 / 492 for a, b in itertools.pairwise(golden)]
    assert steps == pytest.approx([0.618] * 5, abs=0.005)
    for text, ends in ((9, {8}), (10, {8, 9})):
        run = run_at(0)
        run.corpus = Corpus(torch.arange(text), torch.arange(9), 9)
        assert {int(y[-1]) for _, ys in run.batches() for y in ys} == ends
    assert not torch.equal(next(run_at(7).batches())[0], next(run_at(7, seed=2).batches())[0])

def test_the_future_cannot_be_seen_in_any_combination():
    """All of them, and the rest in turn; and each weight has a gradient."""
    idx = random_ids(1, 8)
    changed = idx.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    for i, variant in enumerate(VARIANTS):
        model = small_model(attention=("explicit", "fused")[i % 2], tie_weights=i % 3 > 0,
                            token_shift=i % 4 == 3,
                            n_head=(2, 1, 4)[i % 5 % 3], mlp_ratio=(4.0, 2.0)[i % 7 % 2], **variant)
        logits, loss = model(idx, idx)
        loss.backward()
        moved = (model(changed)[0] - logits).abs().amax(dim=(0, 2))
        assert torch.all(moved[:5] == 0) and moved[5] > 0, variant
        assert all(p.grad.abs().sum() > 0 for p in model.parameters()), variant

# ---- The cache -----------------------------------------------------------------------------------
@pytest.mark.parametrize("pos", minigpt.POSITIONS)
@pytest.mark.parametrize("changes", [
    dict(attention="explicit"), dict(attention="fused"), dict(norm_position="post", qk_norm=True),
    dict(norm="rmsnorm", activation="swiglu", qk_norm=True, block_size=1),
    dict(attention="fused", block_size=3, token_shift=True), dict(model="bigram")])
def test_the_cache_changes_nothing_but_the_time(pos, changes):
    """Logits, past the window too, of two texts read in turn. Fails for a key turned for the wrong
    place, a place off by one, a cache that stays when the window moves or is another reader's."""
    model = small_model(pos=pos, dropout=0.5, **changes)
    for first in (1, 4, 11):
        texts = [(random_ids(3, 25), CachedReader()), (random_ids(1, 25, seed=1), CachedReader())]
        for n, (idx, reader) in itertools.product(range(first, first + 13), texts):
            logits = reader(model, idx[:, :n])
            assert_close(logits, minigpt.next_logits(model, idx[:, :n]), 1e-5)
            assert not logits.requires_grad
    assert all(layer.cache is None for layer in model.modules() if isinstance(layer, Attention))

@pytest.mark.parametrize("attention", ["explicit", "fused"])
def test_the_cache_reads_each_token_once(attention):
    """But for windows that moved; and what is kept are the keys and values in the window."""
    model, reader, read = small_model(attention=attention), CachedReader(), []
    forward = model.forward
    model.forward = lambda idx, **o: read.append((idx.shape[1], o["start"])) or forward(idx, **o)
    model.generate(random_ids(2, 5), 12, read=reader)
    moved = [(5, 0), (1, 5), (1, 6), (1, 7)]
    assert read == moved * 3
    for cache in reader.caches.values():
        assert cache["length"] == 8 and cache["k"].shape == cache["v"].shape == (2, 2, 8, 4)

def test_a_large_layer_computes_the_same_in_halves():
    """One row, with and without a bias; an odd number of rows, or more texts, in one."""
    for rows, bias, n in itertools.product((400, 401), (True, False), (1, 3)):
        layer, x = torch.nn.Linear(300, rows, bias=bias).double(), random_x(n, 1, 300).double()
        assert_close(minigpt.linear_in_halves(layer, x), layer(x))
        assert minigpt.linear_in_halves(layer, x).shape == (n, 1, rows)

# ---- Muon ----------------------------------------------------------------------------------------
def test_orthogonalize_levels_the_singular_values_and_keeps_the_vectors():
    """Of the matrices in a stack. Fails for a wrong constant, round or division."""
    for shape in ((2, 6, 20), (2, 8, 8)):
        U, _, V = torch.linalg.svd(random_x(*shape), full_matrices=False)
        S = torch.logspace(-2, 0, U.shape[-1], dtype=torch.float64)
        G = U @ torch.diag(S) @ V * torch.tensor([1e-3, 50.0], dtype=torch.float64)[:, None, None]
        S = S / S.norm()
        for _ in range(5):
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        assert_close(minigpt.orthogonalize(G), U @ torch.diag(S) @ V, 1e-3)
        assert 0.67 < S.min() and S.max() < 1.15

def test_muon_is_torchs_but_for_the_parts_of_c_attn():
    """Fails for a wrong factor, momentum, decay, or stacked matrices that change places."""
    c = TrainConfig(optimizer="muon", learning_rate=1.0, momentum=0.8, weight_decay=0.1,
                    dtype="bfloat16")
    model, peers = GPT(small_config(bias=False, n_embd=16, mlp_ratio=2.0)), []
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * 3  # large enough for the decay to matter
        if name.startswith("h.") and p.dim() == 2:
            n = 3 if "c_attn" in name else 1
            peers.append((p, [nn.Parameter(part) for part in p.detach().clone().chunk(n)]))
    theirs = torch.optim.Muon([part for _, parts in peers for part in parts], lr=1.0, momentum=0.8,
                              weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours = minigpt.make_muon(model, c)
    assert ours.dtype == torch.bfloat16
    for _ in range(4):
        for p, parts in peers:
            p.grad = torch.randn_like(p)
            for part, gradient in zip(parts, p.grad.chunk(len(parts))):
                part.grad = gradient.clone()
        ours.step()
        theirs.step()
        for p, parts in peers:
            assert_close(p.detach(), torch.cat(parts).detach(), 0.02)

def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    """Each weight in one of them, at the one learning rate; tables and gains take AdamW's step."""
    c = TrainConfig(learning_rate=0.25, momentum=0.7, weight_decay=0.3, grad_accum=1)
    model, twin = small_model(), small_model()
    optimizer, adamw = minigpt.make_muon(model, c), minigpt.make_adamw(twin, c)
    muon = optimizer.param_groups[-1]
    assert muon["parts"] == [3, 1, 1, 1] * 2
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.25, 0.7, 0.3)
    assert optimizer.dtype == torch.float32
    everything = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(everything) == sorted(map(id, model.parameters()))
    for m, o in ((model, optimizer), (twin, adamw)):
        train_step(m, o, [pair(random_ids(2, 9))], c)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(p, q) == (not name.startswith("h.") or p.dim() == 1) and p.grad is None
    assert fit(minigpt.Bigram(small_config()), pair(random_ids(2, 9)), 9, optimizer="muon",
               learning_rate=1.0) < 2  # there are no blocks

# ---- Part II: byte-pair encoding -----------------------------------------------------------------
def naive_bpe(text, vocab_size):
    """The oracle: count all pairs anew for every merge; ties go to the older tokens."""
    words = ["".join(chr(minigpt.BYTES.index(b)) for b in piece.encode())
             for piece in minigpt.piece_pattern().findall(text)]
    tokens, merges = [bytes([b]) for b in minigpt.BYTES], []
    while len(tokens) < vocab_size - 1:
        counts = collections.Counter(two for word in words for two in itertools.pairwise(word))
        if max(counts.values(), default=0) < 2:
            break
        a, b = min(counts, key=lambda two: (-counts[two], two))
        words = [word.replace(a + b, chr(len(tokens))) for word in words]
        merges.append((tokens[ord(a)], tokens[ord(b)]))
        tokens.append(b"".join(merges[-1]))
    return merges

def random_text(rng, n, alphabets=("ab", "abc ", " \n\t'sdt", "aé漢🎭٣Ⅷ\u0301\u00a0\x1c.,")):
    return "".join(rng.choices(rng.choice(alphabets), k=n))

def test_bpe_training_equals_the_naive_trainer():
    """Fails if a count is missed where merges touch ("aaaa"), or for other ties."""
    for seed in range(30):
        rng = random.Random(seed)
        texts = [random_text(rng, rng.randrange(1, 30)) + " " for _ in range(rng.randrange(1, 40))]
        vocab_size = 257 + rng.randrange(60)
        merges = naive_bpe("".join(texts), vocab_size)
        assert BPETokenizer.train("".join(texts), vocab_size).merges == merges
    text = SAMPLE.read_text(encoding="utf-8")[:10_000]
    merges = naive_bpe(text, 400)
    assert BPETokenizer.train(text, 400).merges == merges and len(merges) == 400 - 257
    merges = BPETokenizer.train("aaabdaaabac", 999).merges  # the example of the chapter
    assert merges == [(b"a", b"a"), (b"a", b"b"), (b"aa", b"ab")]
    assert [len(BPETokenizer(merges[:n]).encode("aaabdaaabac")) for n in range(4)] == [11, 9, 7, 5]

@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(SAMPLE.read_text(encoding="utf-8"), 600)

def test_bpe_loses_nothing_and_survives_everything(bpe):
    """Half characters become U+FFFD; one word of 100,000 characters does not hang."""
    rng = random.Random(1)
    texts = ["", "\0", "a" * 100_000, "".join(rng.choices("abcdefgh", k=100_000)), " " * 1000,
             "".join(map(chr, range(0xD800))), *(random_text(rng, 50) for _ in range(200))]
    assert all(bpe.decode(bpe.encode(text)) == text for text in texts)
    assert bpe.decode(bpe.encode("a\ud800b\udfff") + bpe.encode("é")[:1]) == "a\ufffdb\ufffd\ufffd"
    assert BPETokenizer.train("x" * 100_000 + " \ud83d", 300).vocab_size > 257
    assert bpe.decode([bpe.start]) == "\n"
    assert sorted(bpe.tokens[:256]) == [bytes([b]) for b in range(256)]

def test_end_of_text_is_one_token_that_no_merge_touches():
    """In the corpus it separates texts; in generation it ends them."""
    tokenizer = BPETokenizer.train("ab<|endoftext|>ab" * 9, 270)
    ids, (ab,) = tokenizer.encode("ab<|endoftext|>ab"), tokenizer.encode("ab")
    assert ids == [ab, tokenizer.end, ab] and tokenizer.decode(ids) == "ab<|endoftext|>ab"
    assert tokenizer.end == tokenizer.vocab_size - 1 == len(tokenizer.tokens) - 1
    assert not any(b"<" in a + b for a, b in tokenizer.merges)

def test_bpe_files_are_gpt2s(bpe, tmp_path, monkeypatch):
    """vocab.json and merges.txt, with a space as Ġ; what is loaded is what was saved. Files whose
    ids are others are refused, not misread."""
    bpe.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert vocab["!"] == 0 and vocab["Ġ"] == 220 and vocab["Ċ"] == 198  # as in GPT-2's own file
    assert vocab["<|endoftext|>"] == bpe.end and len(vocab) == bpe.vocab_size == 600
    for same in (BPETokenizer.load(tmp_path), BPETokenizer(bpe.state)):
        text = "Speak, Marigold! é\r\n 12\t<|endoftext|>"
        assert same.merges == bpe.merges and same.encode(text) == bpe.encode(text)
    if importable("huggingface_hub"):
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
        assert minigpt.make_tokenizer("gpt2", "", 0).merges == bpe.merges
    vocab["Ġ"], vocab["!"] = 0, 220
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(UserError, match="not in GPT-2's order"):
        BPETokenizer.load(tmp_path)

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

def assigned_characters():
    """Every character that this Python's Unicode tables know, but the surrogates."""
    return [c for c in map(chr, range(sys.maxunicode + 1))
            if minigpt.unicodedata.category(c) not in ("Cn", "Cs")]

def test_pieces_are_those_of_the_reference_pattern():
    """GPT-2's own expression, run by the package regex, on every assigned character and on random
    mixtures. Fails for a letter that is a number too (ideographs), or for Python's wider \\s."""
    pattern, characters = pytest.importorskip("regex").compile(GPT2_PATTERN), assigned_characters()
    pairs = itertools.product(characters[:128], characters[:128])
    rng = random.Random(0)
    texts = [random_text(rng, 30) + "".join(rng.choices(characters, k=9)) for _ in range(2000)]
    for text in ("".join(f"a{c}1{c}.{c} {c}\n" for c in characters), *texts,
                 "".join(f"a{c}1{c}.{c} {c}\n'{c}{d}" for c, d in pairs)):
        assert minigpt.piece_pattern().findall(text) == pattern.findall(text)

def test_the_rust_trainer_learns_the_same_merges(bpe, tmp_path):
    """That of the library tokenizers, from the same text."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe.save(tmp_path)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=599, min_frequency=2, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator([SAMPLE.read_text(encoding="utf-8")], trainer)
    learned = [" ".join(two) for two in json.loads(trained.to_str())["model"]["merges"]]
    assert learned == (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]

# ---- Whole runs, through the real entry point --------------------------------------------------
FOLDER = tempfile.TemporaryDirectory()
SHORT = Path(FOLDER.name, "short.txt")  # enough for models this small
SHORT.write_text(SAMPLE.read_text(encoding="utf-8")[:12_000], encoding="utf-8")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX has it, Windows has not")
TRAIN = ["--mode", "train", "--preset", "laptop", "--data", str(SHORT), "--device", "cpu",
         "--dtype", "float32", "--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size",
         "16", "--batch_size", "4", "--grad_accum", "2", "--max_steps", "6", "--eval_interval", "3",
         "--eval_batches", "2", "--warmup_steps", "2", "--log_interval", "1", "--dropout", "0.1",
         "--sample_tokens", "12"]
RESUME = ["--mode", "train", "--resume", "--out_dir"]

def run_main(*argv):
    """The command in this process, on the CPU: its exit code, and what it wrote to both streams."""
    argv = [*argv, *([] if "--device" in argv or "--mode" not in argv else ["--device", "cpu"])]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = minigpt.main([str(a) for a in argv])
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

def step_of(path):
    return load_checkpoint(path)["step"]

def assert_same_run(a, b, *parts):
    """Two checkpoints: the weights, the optimizer's state and the step."""
    a, b = load_checkpoint(a), load_checkpoint(b)
    for part in parts or ("model", "optimizer", "step"):
        assert_same(a[part], b[part])

def metrics_of(out_dir):
    """Of several records of a step, as after a --resume, the later one of a kind counts."""
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
        monkeypatch.setattr(minigpt, "draw_curves", lambda *_, **__: None)

@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """One small finished run that several tests look at."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, train_tiny(folder, "--checkpoint_interval", "2")

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
    """A FullRun of a small model, as nobody needs to type it."""
    config = TrainConfig(**{"batch_size": 3, "dtype": "float32", "wandb": False, **settings})
    corpus = Corpus(torch.arange(500) % 11, torch.arange(500) % 11, 500)
    model = minigpt.new_model(small_config(), 0) if model is None else model
    return minigpt.FullRun(model, CharTokenizer([*"abcdefghijk"]), corpus, config, out_dir,
                           torch.device("cpu"), {})

@pytest.mark.parametrize("name", minigpt.PRESETS)
def test_every_preset_trains_and_writes(tmp_path, name):
    """One real step of each, smaller where the size is beyond a test; its other settings arrive."""
    small = {"--max_steps": 1, "--eval_batches": 1, "--batch_size": 2}
    if name in ("gpt", "gpt2", "modern"):
        small |= {"--n_layer": 1, "--n_embd": 96, "--block_size": 64}
    err = succeed("--mode", "train", "--preset", name, "--data", SHORT, "--out_dir", tmp_path,
                  "--sample_tokens", "3", *itertools.chain.from_iterable(small.items()))
    assert f"preset {name} (as asked)" in err
    state = load_checkpoint(tmp_path / "latest.pt")
    stored = {**state["model_config"], **state["train_config"]}
    for setting, value in minigpt.PRESETS[name].settings.items():
        assert f"--{setting}" in small or setting == "vocab_size" or stored[setting] == value
    code, out, err = run_main("--mode", "generate", "--out_dir", tmp_path, "--max_tokens", "5",
                              "--prompt", "THE")
    assert code == 0 and out.startswith("THE"), err

def test_a_run_on_a_small_text_ends_with_its_schedule_complete(tmp_path):
    """At the floor of the learning rate, after six passes; not so with dropout, nor if --max_steps
    is typed, and in an ablation every variant takes the preset's steps."""
    argv = ["--mode", "train", "--preset", "bigram", "--data", SHORT, "--batch_size", "4",
            "--eval_batches", "1", "--sample_tokens", "0"]
    six = 6 * int(0.9 * len(SHORT.read_text(encoding="utf-8"))) // (4 * 64)
    for typed, steps in (([], six), (["--max_steps", six + 1], six + 1), (["--dropout=0.1"], 1000)):
        succeed(*argv, "--out_dir", tmp_path / str(steps), *typed)
        state = load_checkpoint(tmp_path / str(steps) / "latest.pt")
        assert state["train_config"]["max_steps"] == state["step"] == steps
        config = minigpt.pick(TrainConfig, state["train_config"])
        rate = metrics_of(tmp_path / str(steps))[-3]["lr"]
        assert rate == get_lr(steps - 1, config) < 1.01 * config.min_lr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minigpt, "run_train", lambda typed: [typed["max_steps"]] * 3)
        code, out, _ = run_main("--mode", "ablate", *argv[2:], "--out_dir", tmp_path, "--vary",
                                "block_size=8,16")
    assert code == 0 and out.count("1000.0000") == 6

def test_bpe_run_evaluates_and_writes(tmp_path):
    """The tokenizer travels in the checkpoint, and was learned from the training part alone; bits
    per character count characters, not tokens."""
    train_tiny(tmp_path, "--tokenizer", "bpe", "--vocab_size", "300")
    _, out, _ = run_main("--mode", "eval", "--out_dir", tmp_path)
    tokens, nats, bits = (float(re.search(rf"([\d.,]+) {unit}", out)[1].replace(",", ""))
                          for unit in ("tokens", "nats", "bits"))
    text = SHORT.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    assert tokens < 0.8 * (len(text) - cut)
    assert bits == pytest.approx(nats / math.log(2) * (tokens + 1) / (len(text) - cut), rel=1e-3)
    code, out, _ = run_main("--mode", "generate", "--out_dir", tmp_path, "--prompt", "Ünïcødé")
    assert code == 0 and out.startswith("Ünïcødé")
    _, tokenizer = minigpt.model_from_checkpoint(load_checkpoint(tmp_path / "best.pt"))
    assert tokenizer.state == BPETokenizer.train(text[:cut], 300).state

def test_a_run_writes_what_it_promises(tiny_run):
    """Checkpoints named after completed steps, metrics, config, the score. Nothing else."""
    folder, err = tiny_run
    assert {p.name for p in folder.iterdir()} - {"loss.png"} == {
        "best.pt", "latest.pt", "step_000002.pt", "step_000004.pt", "step_000006.pt",
        "metrics.jsonl", "config.json"}
    for name, step in (("latest", 6), ("step_000002", 2), ("step_000004", 4)):
        assert step_of(folder / f"{name}.pt") == step
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["max_steps"] == 6 and config["n_embd"] == 16
    assert [step for step, *_ in step_losses(folder)] == [1, 2, 3, 4, 5, 6]
    assert evaluated(folder) == [0, 3, 6] and "full_val_loss" in metrics_of(folder)[-1]
    assert err.count("    | ") >= 3  # a sample at each evaluation
    assert set(load_checkpoint(folder / "best.pt")) == {
        "format", "model", "optimizer", "step", "best_val", "best_step", "tokenizer",
        "model_config", "train_config", "seconds", "corpus"}

def test_what_a_run_says_of_itself_is_right(tiny_run):
    """The parameters, the tokens, the units of the score."""
    folder, err = tiny_run
    text, state = SHORT.read_text(encoding="utf-8"), load_checkpoint(folder / "latest.pt")
    cut = int(0.9 * len(text))
    assert f"{cut:,} training and {len(text) - cut:,} validation tokens" in err
    model, tokenizer = minigpt.model_from_checkpoint(state)
    n = sum(p.numel() for p in model.parameters())
    assert f"model gpt: {n:,} parameters; cpu, float32, 1 threads, processes: 1" in err
    assert f"vocabulary {tokenizer.vocab_size}\n" in err and tokenizer.vocab_size == len(set(text))
    assert re.search(rf"best model.* of step {state['best_step']}: {folder / 'best.pt'}", err)
    nats, perplexity, bits = map(float, re.search(
        r": ([\d.]+) nats per token, perplexity ([\d.]+), ([\d.]+) bits", score(err)).groups())
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
    assert bits == pytest.approx(nats / math.log(2), rel=1e-3)  # a token is a character here

def test_rates_and_times_are_those_of_the_clock(tmp_path, monkeypatch):
    """Half a second a step and 100 s an evaluation, by a clock that only those move: the rate is
    that of training alone, also where a report spans several steps or an evaluation; the time is
    that of all, also after a resume; what is left follows from what it took so far."""
    clock, step, estimate = [0.0], minigpt.train_step, minigpt.estimate_loss

    def taking(seconds, function):
        def slow(*args):
            result = function(*args)
            clock[0] += seconds
            return result
        return slow

    monkeypatch.setattr(minigpt.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(minigpt, "train_step", taking(0.5, step))
    monkeypatch.setattr(minigpt, "estimate_loss", taking(100.0, estimate))
    err = train_tiny(tmp_path, "--log_interval", "2", "--max_steps", "4",
                     "--eval_interval", "2")
    rates = [r["tokens_per_second"] for r in metrics_of(tmp_path) if "loss" in r]
    assert rates == [4 * 2 * 16 * 2] * 2  # 4 x 2 windows of 16 tokens a step, two steps a second
    assert "step 2/4" in err and "0:01:41 left" in err and "to step 4 in 0:05:02;" in err
    assert metrics_of(tmp_path)[-1]["seconds"] == 302.0
    err = resume_tiny(tmp_path, "--max_steps", "6")
    assert "to step 6 in 0:06:43;" in err and "0:00:00 left" in err and "| 256 tokens/s" in err

def test_the_score_is_that_of_the_best_model(tiny_run):
    """As minigpt.evaluate gives it, and --mode eval."""
    folder, err = tiny_run
    state = load_checkpoint(folder / "best.pt")
    code, out, _ = run_main("--mode", "eval", "--out_dir", folder)
    assert code == 0 and out.strip() == score(err)
    model, tokenizer = minigpt.model_from_checkpoint(state)
    corpus = Corpus.from_text(SHORT.read_text(encoding="utf-8"), tokenizer)
    nats = minigpt.evaluate(model, corpus.val)
    assert f"{nats:.4f} nats" in out
    assert metrics_of(folder)[-1]["full_val_loss"] == pytest.approx(nats, rel=1e-6)

def test_a_checkpoint_remembers_its_corpus(tmp_path, monkeypatch):
    """Named by a relative path, and scored from elsewhere; another text is scored with a note."""
    text = SHORT.read_text(encoding="utf-8").upper()
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
    (tmp_path / "other.txt").write_text(text[::-1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    err = train_tiny("out", "--data", "mine.txt")
    monkeypatch.chdir(HERE)
    code, out, said = run_main("--mode", "eval", "--out_dir", tmp_path / "out")
    assert code == 0 and out.strip() == score(err) and "note" not in said
    code, out, said = run_main("--mode", "eval", "--out_dir", tmp_path / "out", "--data",
                               tmp_path / "other.txt")
    assert code == 0 and "note: " in said and "other.txt is not the text" in said

def test_logged_loss_is_the_mean_over_the_accumulated_step(tiny_run):
    """Recomputed from the seeds, with dropout: both micro-batches of the third step, not the last
    one alone; fails if the typed dropout does not reach the model, or the seeds are others."""
    state = load_checkpoint(tiny_run[0] / "step_000002.pt")
    model, tokenizer = minigpt.model_from_checkpoint(state)
    corpus = Corpus.from_text(SHORT.read_text(encoding="utf-8"), tokenizer)
    torch.manual_seed(minigpt.derived_seed(1337, 2))
    losses, numbers = [], torch.arange(16, 24).double()  # of the windows: 8 in each step
    shares = (numbers * (5**0.5 - 1) / 2 + random.Random(1338).random()) % 1  # short ones: 1337 + 1
    for starts in (shares * (len(corpus.train) - 16)).long().split(4):
        losses.append(model.train()(*minigpt.cut_windows(corpus.train, 16, starts))[1].item())
    third = step_losses(tiny_run[0])[2][1]
    assert model.drop.p == 0.1 and third == pytest.approx(sum(losses) / 2, abs=1e-6)
    assert third != pytest.approx(losses[1], abs=1e-6)

@pytest.mark.parametrize("optimizer, tokenizer", [("adamw", "char"), ("muon", "bpe")])
def test_resumed_run_is_the_run_it_would_have_been(tmp_path, optimizer, tokenizer):
    """k steps, resume, the rest: bit-identical weights, optimizer, and logged losses, with dropout
    and accumulation on; 3 is right after an evaluation. Fails if a random number depends on more
    than seed and step, if the optimizer, the step or the best are not restored, or if an evaluation
    is repeated."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    size = ["--vocab_size", "300"] if tokenizer == "bpe" else []
    train_tiny(whole, "--checkpoint_interval", "1", "--optimizer", optimizer, "--tokenizer",
               tokenizer, *size)
    for k in (2, 3):
        shutil.copytree(whole, parts)
        shutil.copy(whole / f"step_00000{k}.pt", parts / "latest.pt")
        assert re.search(rf"^resuming.* at step {k}$", resume_tiny(parts), re.M)
        assert step_losses(whole) == step_losses(parts) and len(step_losses(parts)) == 6
        assert_same_run(whole / "latest.pt", parts / "latest.pt",
                        "model", "optimizer", "step", "best_val", "best_step", "tokenizer")
        assert evaluated(parts) == [0, 3, 6]
        shutil.rmtree(parts)

def test_a_copied_checkpoint_goes_on_in_another_folder(tmp_path):
    """A step_*.pt, copied to be the latest.pt of a folder: the search for the best begins anew, the
    weights become what they would have been."""
    folder = tmp_path / "a"
    train_tiny(folder, "--checkpoint_interval", "2")
    end = load_checkpoint(folder / "latest.pt")
    for name, step in (("b", 6), ("c", 2)):
        (tmp_path / name).mkdir()
        shutil.copy(folder / f"step_{step:06d}.pt", tmp_path / name / "latest.pt")
        resume_tiny(tmp_path / name)
    assert step_of(tmp_path / "b" / "best.pt") == 6 and evaluated(tmp_path / "b") == [6]
    assert_same(load_checkpoint(tmp_path / "c" / "latest.pt")["model"], end["model"])
    assert evaluated(tmp_path / "c") == [2, 3, 6]

def test_resume_where_nothing_was_saved_begins_a_new_run(tmp_path):
    """So that one command line serves for both, as under torchrun --max_restarts."""
    err = train_tiny(tmp_path / "a", "--resume")
    assert f"--resume: there is no {tmp_path / 'a' / 'latest.pt'} yet, so a new run begins" in err
    train_tiny(tmp_path / "b")
    assert_same_run(tmp_path / "a" / "latest.pt", tmp_path / "b" / "latest.pt")
    assert "a new run" not in train_tiny(tmp_path / "a", "--resume", "--max_steps", "7")
    assert step_of(tmp_path / "a" / "latest.pt") == 7

def test_typed_settings_reach_the_optimizer_and_the_schedule(tmp_path):
    """What the optimizer used, as saved and logged: step n is taken with get_lr(n - 1). Fails if
    the rate is set late, early or never, or a setting stops on its way."""
    train_tiny(tmp_path, "--optimizer", "muon", "--beta1", "0.71", "--beta2", "0.83", "--momentum",
               "0.6", "--weight_decay", "0.37", "--learning_rate", "0.01", "--min_lr", "0.002",
               "--schedule", "cosine", "--warmup_steps", "1", "--grad_clip", "1e-3")
    assert all(norm > 0.01 for *_, norm in step_losses(tmp_path))  # as it was before clipping
    config = TrainConfig(**load_checkpoint(tmp_path / "latest.pt")["train_config"])
    groups = load_checkpoint(tmp_path / "latest.pt")["optimizer"]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {(0.71, 0.83)}
    assert {group["momentum"] for group in groups if "parts" in group} == {0.6}
    assert {group["weight_decay"] for group in groups} == {0.37, 0.0}
    assert {group["lr"] for group in groups} == {get_lr(5, config)}
    used = [r["lr"] for r in metrics_of(tmp_path) if "lr" in r]
    assert used == [get_lr(step, config) for step in range(6)]
    assert used[0] == pytest.approx(0.005) and used[1] == 0.01  # one step of warm-up

def test_watching_changes_nothing(tiny_run, tmp_path):
    """Evaluating, sampling, logging and saving more or less often: the same weights. Fails if any
    of them draws from the training's random numbers, or leaves the model in another mode."""
    train_tiny(tmp_path, "--eval_interval", "1", "--eval_batches", "1", "--sample_tokens", "5",
               "--log_interval", "4", "--checkpoint_interval", "0")
    assert_same_run(tiny_run[0] / "latest.pt", tmp_path / "latest.pt")

def test_resume_can_lengthen_a_run_but_not_reshape_it(tmp_path):
    """max_steps may change; what gives the earlier steps their meaning may not: the refusal names
    both values and leaves the files alone."""
    train_tiny(tmp_path)
    before = contents(tmp_path)
    for flag, new, old in (("n_embd", 32, 16), ("batch_size", 8, 4), ("grad_accum", 4, 2),
                           ("preset", "mini", "laptop"), ("seed", 3, 1337), ("dropout", 0.2, 0.1)):
        code, _, err = run_main(*RESUME, tmp_path, f"--{flag}", new)
        assert code == 2 and last_line(err).startswith(f"error: --{flag} {new}: cannot change")
        assert f"the run has {old};" in last_line(err)
    assert contents(tmp_path) == before
    resume_tiny(tmp_path, "--max_steps", "8", "--preset", "auto", "--n_embd", "16")
    assert step_of(tmp_path / "latest.pt") == 8 and evaluated(tmp_path) == [0, 3, 6, 8]
    assert "full_val_loss" in metrics_of(tmp_path)[-1]

def test_another_corpus_is_refused_on_resume(tmp_path):
    """Typed, or changed in its place: the same characters in another order are another text."""
    mine, text = tmp_path / "mine.txt", SHORT.read_text(encoding="utf-8")
    mine.write_text(text, encoding="utf-8")
    train_tiny(tmp_path / "out", "--data", mine, "--max_steps", "1")
    mine.write_text(text[::-1], encoding="utf-8")
    for argv in ([], ["--data", mine], ["--data", SAMPLE]):
        code, _, err = run_main(*RESUME, tmp_path / "out", *argv)
        assert code == 2 and re.match("error: --data .*: not the text of", last_line(err))

def test_what_may_change_on_resume_does(tmp_path):
    """The format, the reports and the patience are those now typed; the README lists them."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"`--resume` may change\*\*(.*?), the device", readme, re.S)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == minigpt.MAY_CHANGE
    train_tiny(tmp_path, "--max_steps", "2")
    err = resume_tiny(tmp_path, "--dtype", "bfloat16", "--max_steps", "7", "--eval_interval", "1",
                      "--sample_tokens", "0", "--log_interval", "3", "--checkpoint_interval", "3",
                      "--patience", "4", "--no_wandb")
    assert "cpu, bfloat16" in err and "    | " not in err and (tmp_path / "step_000003.pt").exists()
    assert [step for step, *_ in step_losses(tmp_path)] == [1, 2, 3, 6, 7]
    config = load_checkpoint(tmp_path / "latest.pt")["train_config"]
    assert (config["dtype"], config["patience"], config["wandb"]) == ("bfloat16", 4, False)

@pytest.mark.parametrize("name", ["best.pt", "step_1000000.pt", "config.json", "metrics.jsonl"])
def test_a_new_run_overwrites_nothing(tmp_path, name):
    """A forgotten --resume must not cost a night's work; nor a file of that name not ours."""
    (tmp_path / name).write_text("mine")
    code, _, err = run_main(*TRAIN, "--out_dir", tmp_path)
    assert code == 2 and f"has a {name}; --resume" in last_line(err)
    assert (tmp_path / name).read_text() == "mine" and len(os.listdir(tmp_path)) == 1

def test_training_leaves_the_users_files_alone(tmp_path):
    """Files in out_dir that are not a run's: neither deleted nor moved nor changed, by a new run or
    one that goes on; not even the corpus, or files with names that earlier versions gave."""
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

@pytest.mark.parametrize("flag, value, at", [("--checkpoint_interval", 2, 2),
                                             ("--log_interval", 1, 2), ("--eval_interval", 1, 1)])
def test_a_run_that_diverges_ends_and_spares_its_checkpoints(tmp_path, flag, value, at):
    """A rate of 1e30 blows up at once, whether a save, a report or an evaluation meets it first:
    one error line, and the files are those of step 0, whose weights are numbers."""
    code, _, err = run_main(*TRAIN, "--out_dir", tmp_path, "--grad_clip", "0", "--log_interval",
                            "100", "--learning_rate", "1e30", flag, value)
    assert code == 2 and f"error: the run has diverged at step {at};" in last_line(err)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["best.pt", "latest.pt"]
    for name in ("best.pt", "latest.pt"):
        state = load_checkpoint(tmp_path / name)
        assert state["step"] == 0 and all(v.isfinite().all() for v in state["model"].values())

@pytest.mark.parametrize("garbage", [
    b'{"step": 9, "lo\n', b'\xff\xfe\x80\n5\n{"a": 1}\n{"step": "x"}\n' + b"\0" * 99 + b"\n",
    b'{"step": 1, "loss": "high", "val_loss": {}}\n{"step": 2, "val_loss": NaN, "new": 1}\n'])
def test_damaged_or_unknown_metrics_do_not_stop_a_resume_nor_the_plot(tmp_path, garbage, pictures):
    """What a crash may leave behind, or another version. The later record of a step counts."""
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
        file.write('{"step": 2, "grad_norm": 7}\n')
    assert minigpt.read_curve(tmp_path, "grad_norm")[2] == 7

def test_without_matplotlib_one_line_says_what_to_install(tmp_path, pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "no loss.png: pip install matplotlib" in train_tiny(tmp_path, "--max_steps", "1")

def test_metrics_are_strict_json(tmp_path):
    """An infinite gradient norm becomes null; a loss that is no number ends the run."""
    run = tiny_full_run(tmp_path)
    run.log(step=1, grad_norm=math.inf)
    with pytest.raises(minigpt.Diverged, match="diverged at step 0"):
        run.log(step=1, val_loss=math.nan)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "grad_norm": null}\n'

def test_the_final_evaluation_shows_how_far_it_is(tiny_run, tmp_path, monkeypatch):
    """On a terminal, in training and in --mode eval; in a file there would be heaps of it."""
    commands = (TRAIN + ["--out_dir", tmp_path], ["--mode", "eval", "--out_dir", tiny_run[0]])
    for command in commands:
        assert "evaluating" not in run_main(*command)[2]
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})
    monkeypatch.setattr(io, "StringIO", terminal)
    shutil.rmtree(tmp_path)
    for command in commands:
        shares = re.findall(r"\revaluating: (\d+)%(\n?)", run_main(*command)[2])
        assert len(shares) > 3 and shares[-1] == ("100", "\n") and ("43", "") in shares

@pytest.mark.slow
def test_a_real_run_learns(tmp_path):
    """2.33 to 2.35 nats with three seeds; with a learning rate of a tenth 2.56, with ten times as
    much 2.78. Fails if anything on the way from the text to the weights is only nearly right."""
    err = succeed("--mode", "train", "--preset", "plain", "--max_steps", "150", "--warmup_steps",
                  "10", "--data", SAMPLE, "--dtype", "float32", "--eval_interval", "150",
                  "--eval_batches", "2", "--checkpoint_interval", "0", "--out_dir", tmp_path)
    assert 2.0 < float(re.search(r"([\d.]+) nats", score(err))[1]) < 2.4

# ---- Signals and terminals -----------------------------------------------------------------------
def last_step(log):
    """The latest step in a status line of a log."""
    steps = re.findall(r"^step (\d+)/", log.read_text() if log.exists() else "", re.M)
    return int(steps[-1]) if steps else 0

def wait_for_step(process, log, step):
    while last_step(log) < step:
        assert process.is_alive(), log.read_text(encoding="utf-8")
        time.sleep(0.01)

@POSIX
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves(tmp_path, start_main, number, code):
    """Ctrl-C or SIGTERM in mid-run: latest.pt is of the last completed step, and resumes. In the
    midst of an evaluation that goes on for hours, the second one ends the process at once."""
    log, out_dir = tmp_path / "log", tmp_path / "out"
    process = start_main([*TRAIN, "--max_steps", "1000000", "--eval_interval", "1000000",
                          "--out_dir", out_dir], log)
    wait_for_step(process, log, 20)
    os.kill(process.pid, number)
    process.join(60)
    lines = log.read_text(encoding="utf-8").splitlines()
    assert process.exitcode == code and lines[-1] == "saved; go on with --resume"
    assert "stopping after this step; once more to stop at once" in lines
    step = step_of(out_dir / "latest.pt")
    assert step == last_step(log) >= 20
    resume_tiny(out_dir, "--max_steps", step + 1)
    assert [n for n, *_ in step_losses(out_dir)] == [*range(1, step + 2)]
    process = start_main([*TRAIN, "--eval_batches", "100000000", "--out_dir", tmp_path / "b"], log)
    for said in ("\nmodel ", "stopping after"):
        while not (tmp_path / "b" / "config.json").exists() or log.read_text().count(said) < 2:
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
    step; and the run that goes on is the run that was never stopped. Fails if a checkpoint is
    written in place, or latest.pt is absent for a moment between its old and its new content."""
    stopped, spared, log, log2 = (tmp_path / name for name in ("stopped", "spared", "log", "log2"))
    dice = random.Random(2)
    for _ in range(rounds):
        begun = last_step(log)
        process = start_main([*OFTEN, "--out_dir", stopped], log)
        wait_for_step(process, log, begun + 2)  # until it trains
        time.sleep(dice.uniform(0, 0.5))
        os.kill(process.pid, number)
        process.join(20)
        assert process.exitcode == (143 if number == signal.SIGTERM else -number)
        # A step is reported only after the save of the one before it.
        step = minigpt.read_checkpoint(stopped / "latest.pt")["step"]
        assert step >= last_step(log) - (number == signal.SIGKILL)
        minigpt.read_checkpoint(stopped / "best.pt")
    snapshot = sorted(stopped.glob("step_*.pt"))[-1].name
    process = start_main([*OFTEN, "--out_dir", spared], log2)
    wait_for_step(process, log2, (upto := int(snapshot[5:-3])) + 1)
    process.kill(), process.join()
    assert_same_run(stopped / snapshot, spared / snapshot)
    assert step_losses(stopped)[:upto] == step_losses(spared)[:upto]

@POSIX
def test_closed_streams_are_no_error(tiny_run):
    """As a daemon may start it. What is printed goes nowhere."""
    command = (f"'{sys.executable}' '{HERE / 'minigpt.py'}' --mode generate --max_tokens 3 "
               f"--out_dir '{tiny_run[0]}' --device cpu --prompt THE ")
    started = {end: subprocess.Popen(["sh", "-c", command + end], stdout=subprocess.PIPE, text=True,
                                     stderr=subprocess.PIPE) for end in (">&- 2>&-", "2>&-")}
    for end, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == "" and out.startswith("THE") == (end == "2>&-")

# ---- Checkpoints that are not what they should be ------------------------------------------------
def test_a_flipped_bit_in_the_content_is_found_wherever_it_is(tmp_path):
    """A bit of every fourth byte, and that which says in the zip's directory that a member is a
    folder (no checksum covers it): a flip is refused, or changes nothing of what is read."""
    path, refused = tmp_path / "a.pt", 0
    state = {"format": minigpt.FORMAT, "w": torch.randn(20), "step": 12345}
    minigpt.save_checkpoint(path, state)
    whole = path.read_bytes()
    folders = [(found.start() + 38, 16) for found in re.finditer(b"PK\x01\x02", whole)]
    for i, bit in [*folders, *((i, 1 << i % 8) for i in range(0, len(whole), 4))]:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])
        try:
            assert_same(minigpt.read_checkpoint(path), state)
        except UserError as problem:
            assert "a.pt: " in str(problem)
            refused += 1
    assert refused > len(whole) / 8

def test_a_truncated_or_foreign_checkpoint_is_refused(tmp_path):
    """Cut short at any length, or of another program or version: an error that names the file,
    never a crash. A pickle may hold calls; weights_only=True refuses to make them."""
    path, marker = tmp_path / "a.pt", tmp_path / "was_here"

    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    minigpt.save_checkpoint(path, {"format": minigpt.FORMAT, "w": torch.randn(100)})
    whole = path.read_bytes()
    files = [whole[:length] for length in (*range(0, len(whole), 97), len(whole) - 1)]
    files += [b"not a checkpoint", b"\x80\x04.", pickle.dumps({"format": minigpt.FORMAT}),
              b"PK\x03\x04", b"\0" * 1000, pickle.dumps(Malice())]
    for state in ({"format": "minigpt-1"}, [1, 2], {}, {"format": Malice()}, Malice()):
        torch.save(state, file := io.BytesIO())
        files.append(file.getvalue())
    for content in files:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pt: "):
            minigpt.read_checkpoint(path)
    assert not marker.exists()

def test_a_damaged_checkpoint_is_one_error_that_names_the_cure(tmp_path):
    """And the cure works: another checkpoint of the run, copied over it. That includes best.pt at
    the end of a run that found no better one."""
    train_tiny(tmp_path, "--checkpoint_interval", "2")
    latest, best = tmp_path / "latest.pt", tmp_path / "best.pt"
    end, whole = load_checkpoint(latest), latest.read_bytes()
    middle = len(whole) // 2
    flipped = bytes([whole[middle] ^ 4])
    for damaged in (whole[:-1000], whole[:middle] + flipped + whole[middle + 1 :]):
        latest.write_bytes(damaged)
        before = contents(tmp_path)
        code, _, err = run_main(*RESUME, tmp_path)
        assert code == 2 and err.count("\n") == 1 and f"{latest}: damaged" in err
        assert "best.pt" in err and "step_*.pt" in err and contents(tmp_path) == before
    shutil.copy(tmp_path / "step_000002.pt", latest)
    resume_tiny(tmp_path)
    assert_same(load_checkpoint(latest)["model"], end["model"])
    best.write_bytes(best.read_bytes()[:-1000])
    code, _, err = run_main(*RESUME, tmp_path)
    assert code == 2 and f"{best}: damaged" in last_line(err)

@POSIX
def test_a_disk_that_fills_up_ends_a_run_and_leaves_what_was_saved(tmp_path):
    """Here: a limit on the size of a file. Not even a byte of the checkpoints that were complete
    changes; one error line, which says why; and when there is some again, the run
    goes on. Fails if a checkpoint is written in place, or if a partial file stays."""
    import resource

    train_tiny(tmp_path, "--tokenizer", "bpe", "--vocab_size", "600")
    checkpoints = [tmp_path / "best.pt", tmp_path / "latest.pt"]
    before = [path.read_bytes() for path in checkpoints]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (9_000, len(before[1]) // 2, len(before[1]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            code, _, err = run_main(*RESUME, tmp_path, "--max_steps", "9")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert code == 2 and err.count("error: ") == 1 and "too large; mend" in last_line(err), err
        assert [path.read_bytes() for path in checkpoints] == before
        assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "latest.pt.partial").write_bytes(b"as a crash would leave it")
    resume_tiny(tmp_path, "--max_steps", 9)
    assert step_of(tmp_path / "latest.pt") == 9 and not list(tmp_path.glob("*.partial"))

# ---- The machine room ----------------------------------------------------------------------------
def test_device_format_and_preset_are_found(capsys, monkeypatch):
    """auto takes what is there; the CPU is always there. A GPU gets the reference model, a CPU the
    one that it can train; and auto becomes a format, so that another machine goes on with it."""
    cpu = minigpt.find_device("cpu")
    assert cpu.type == "cpu" and minigpt.find_device("auto").type in ("cuda", "mps", "cpu")
    assert minigpt.find_dtype("bfloat16", cpu) == "bfloat16"
    for name in ("nonsense", "cuda:99", "cpu:1", "meta", ""):
        with pytest.raises(UserError, match=f"--device {name}: not here.* auto, .*cpu"):
            minigpt.find_device(name)
    for device, preset in (("cuda", "gpt"), ("cpu", "laptop")):
        config = minigpt.find_settings({"dtype": "float32"}, torch.device(device))[1]
        assert config.preset == preset
        assert f"preset {preset} (chosen for {device})" in capsys.readouterr().err
    for able, name in (({"avx512": True}, "float32"), ({"avx512_bf16": True}, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert minigpt.find_settings({}, cpu)[1].dtype == name

def test_the_typed_number_format_is_used_for_the_matrix_products(tiny_run, tmp_path):
    """Which lose digits; weights, loss and gradients are float32. A run in 16 bits is another one
    than in float32, and nearly the same."""
    model, x, kinds = minigpt.new_model(small_config(), 0), torch.arange(16).view(2, 8) % 11, []
    model.h[0].mlp.c_fc.register_forward_hook(lambda *args: kinds.append(args[2].dtype))
    loss = minigpt.MixedPrecision(model)(x, x)[1]
    loss.backward()
    assert kinds == [torch.bfloat16] and loss.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    exact = [loss for _, loss, _ in step_losses(tiny_run[0])]
    train_tiny(tmp_path, "--dtype", "bfloat16")
    losses = [loss for _, loss, _ in step_losses(tmp_path)]
    assert losses != exact and losses == pytest.approx(exact, rel=1e-2)

@pytest.mark.slow
def test_compilation_that_fails_is_one_error(tmp_path):
    """Without a C++ compiler torch.compile cannot work on a CPU."""
    env = {"CXX": str(tmp_path / "no-such-compiler"), "PATH": "",
           "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = run_command(*TRAIN, "--max_steps", "2", "--out_dir", tmp_path / "a", "--compile", **env)
    check_mistake(done.returncode, done.stdout, done.stderr, ["--compile", "--no_compile"])

def test_a_corpus_is_its_text(tmp_path):
    """Without the mark of Windows and its line ends; cut at nine tenths of the characters; two
    bytes a token; BPE learns nothing from the last tenth."""
    (tmp_path / "a.txt").write_bytes("\ufeffà\r\nb".encode())
    assert minigpt.read_corpus(tmp_path / "a.txt")[1] == "à\nb"
    _, text, sha256 = minigpt.read_corpus(SHORT)
    assert sha256 == hashlib.sha256(text.encode()).hexdigest()
    cut = int(0.9 * len(text))
    for kind in ("char", "bpe"):
        tokenizer = minigpt.make_tokenizer(kind, text, 300)
        corpus = minigpt.encode_corpus(text, tokenizer, 16)
        assert corpus.train.tolist() == tokenizer.encode(text[:cut])
        assert corpus.val.tolist() == tokenizer.encode(text[cut:])
        assert corpus.val_characters == len(text) - cut and corpus.train.element_size() == 2
    minigpt.encode_corpus("a" * 170, CharTokenizer("a"), 16)  # a window is 16 and a target
    with pytest.raises(UserError, match="--block_size 17: must be below .* 17;"):
        minigpt.encode_corpus("a" * 170, CharTokenizer("a"), 17)
    assert tokenizer.merges == BPETokenizer.train(text[:cut], 300).merges

@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_freed_memory_is_kept():
    """240 MB in six blocks, asked for again and again, as a training step does: mapped once."""
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
    faults = {name: int(subprocess.check_output([sys.executable, "-c", script, name], text=True))
              for name in ("kept", "given back")}
    assert faults["kept"] < 0.01 * faults["given back"]

# ---- The downloader, against a local server ------------------------------------------------------
BODY = b"First Citizen:\n" + bytes(range(32, 127)) * 2000  # stands for the corpus: see `server`

class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path: good, truncated, altered, html, long, missing, slow, flaky or drip."""

    hits = collections.Counter()

    def do_GET(self):
        kind = self.path.strip("/")
        self.hits[kind] += 1
        if kind == "missing" or (kind == "flaky" and self.hits[kind] == 1):
            return self.send_error(404 if kind == "missing" else 503)
        time.sleep(2 * (kind == "slow"))
        body = {"altered": BODY[:-1] + b"!", "html": b"<html>sign in</html>", "long": BODY * 2}
        body = body.get(kind, BODY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have left
            for i in range(60 * (kind == "drip")):
                self.wfile.write(body[i : i + 1])
                time.sleep(0.1)
            self.wfile.write(body[: len(body) // 2] if kind == "truncated" else body)

    def log_message(self, *args):
        pass

@pytest.fixture
def server(monkeypatch):
    """A real HTTP server on this machine; the checksum is that of the body it serves."""
    monkeypatch.setattr(download_data, "SIZE", len(BODY))
    monkeypatch.setattr(download_data, "SHA256", hashlib.sha256(BODY).hexdigest())
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    Handler.hits.clear()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown(), httpd.server_close()

@pytest.mark.parametrize("kind, why, hits", [
    ("truncated", "broke off", 2), ("altered", "altered", 1), ("html", "a web page", 1),
    ("long", "more than", 1), ("missing", "HTTP status 404", 1), ("slow", "no answer in time", 1),
    ("drip", "no answer in time", 1)])
def test_a_bad_answer_leaves_the_file_alone(server, tmp_path, kind, why, hits):
    """Each ends in an error that says why, tries again only what may pass and has not timed out,
    and leaves the old file byte for byte. Fails if the file is written before a check."""
    target = tmp_path / "input.txt"
    target.write_bytes(b"old")
    with pytest.raises(download_data.DownloadError, match=why):
        download_data.download(target, [f"{server}/{kind}"], 1.0 if kind == "drip" else 30, 0.01,
                               (5.0, 0.7))
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["input.txt"]
    assert Handler.hits[kind] == hits

def test_mirrors_are_tried_in_turn_within_one_deadline(server, tmp_path, capsys):
    """A dead one, a missing one, one that recovers: the corpus arrives from the third, also into a
    folder that does not exist yet."""
    target, dead = tmp_path / "data" / "input.txt", "http://127.0.0.1:9/dead"
    download_data.download(target, [dead, f"{server}/missing", f"{server}/flaky"], pause=0.01)
    assert target.read_bytes() == BODY and os.listdir(target.parent) == ["input.txt"]
    assert "no connection" in capsys.readouterr().err
    assert Handler.hits == {"missing": 1, "flaky": 2}
    with pytest.raises(download_data.DownloadError, match="no connection.*404"):
        download_data.download(target, [dead, f"{server}/missing"], pause=0.01)

def test_the_corpus_is_known_by_its_checksum_and_a_failed_write_leaves_nothing(tmp_path):
    """The first stated here a second time, so that a slip in either place shows. The destination
    cannot be replaced, since a folder stands there: no partial file stays."""
    assert download_data.SIZE == 1_115_394
    assert download_data.SHA256 == \
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    (tmp_path / "input.txt" / "old").mkdir(parents=True)
    with pytest.raises(OSError):
        download_data.put_in_place(b"new", tmp_path / "input.txt")
    assert os.listdir(tmp_path) == ["input.txt"]

def test_import_of_a_copy_has_the_same_checks(server, tmp_path):
    """From a file or an address; a wrong one, or one without an end, is refused."""
    copy, target = tmp_path / "copy.txt", tmp_path / "input.txt"
    copy.write_bytes(BODY)
    for source in (str(copy), f"{server}/good"):
        download_data.import_copy(source, target)
        assert target.read_bytes() == BODY
    copy.write_bytes(BODY[:-1])
    endless = ["/dev/zero"] if os.path.exists("/dev/zero") else []
    for source in (str(copy), str(tmp_path / "none.txt"), str(tmp_path), "http://[::1", *endless):
        with pytest.raises(download_data.DownloadError, match=re.escape(source[-4:])):
            download_data.import_copy(source, target)
    assert target.read_bytes() == BODY

def test_training_downloads_the_corpus_when_it_is_missing(server, tmp_path, monkeypatch):
    """The same function, the same place; the second time the file is simply used."""
    monkeypatch.setattr(minigpt, "__file__", str(tmp_path / "minigpt.py"))
    monkeypatch.setattr(download_data, "MIRRORS", [f"{server}/missing"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample.txt").write_text("THE")
    assert minigpt.read_corpus("")[:2] == (tmp_path / "data" / "sample.txt", "THE")
    monkeypatch.setattr(download_data, "MIRRORS", [f"{server}/good"])
    for _ in range(2):
        path, _, _ = minigpt.read_corpus("")
        assert path == tmp_path / "data" / "input.txt" and path.read_bytes() == BODY
    assert Handler.hits["good"] == 1

# ---- Weights & Biases ----------------------------------------------------------------------------
@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    """A user who is not logged in, whatever this machine knows."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))

@pytest.mark.slow
def test_wandb_logs_offline_and_not_without_an_account(tmp_path, no_wandb_account, monkeypatch):
    """The real package, offline: a run's records are on disk. Without an account, or with
    --no_wandb, it is not even started; and there is never a question."""
    wandb = pytest.importorskip("wandb")
    for name, flags in (("quiet", []), ("off", ["--no_wandb"]), ("on", [])):
        if name != "quiet":
            monkeypatch.setenv("WANDB_MODE", "offline")
        train_tiny(tmp_path / name, "--max_steps", "2", *flags)
        files = list((tmp_path / name).glob("wandb/offline-run-*/*.wandb"))
        assert len(files) == (name == "on")
    wandb.teardown()  # and its process, so that all is on disk
    assert b"tokens_per_second" in files[0].read_bytes()
    assert_same_run(tmp_path / "on" / "latest.pt", tmp_path / "off" / "latest.pt")

# ---- Several processes ---------------------------------------------------------------------------
def run_torchrun(n, *argv, script=HERE / "minigpt.py", wait=True, options=()):
    """n processes on this machine; one thread each, so that sums are added up in one order."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", *options,
               script, *argv]
    process = subprocess.Popen([str(a) for a in command], stderr=subprocess.PIPE, text=True,
                               encoding="utf-8", stdout=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1",
                                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    watchdog = threading.Timer(100, process.terminate)  # should they wait for each other for ever
    watchdog.daemon = True
    watchdog.start()
    if not wait:
        return process
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err

def workers_of(torchrun):
    """The process ids of the processes that it started, in the order of their ranks."""
    listed = subprocess.run(["pgrep", "-P", str(torchrun.pid)], text=True, capture_output=True)
    return sorted(map(int, listed.stdout.split()))

TWO_STEPS = """
import itertools
import sys
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from minigpt import *
config = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, dropout=0.0)
model, tokens = new_model(config, 0).double(), torch.arange(500) % 11
settings = TrainConfig(batch_size=4, grad_accum=3, grad_clip=0.0, dtype="float32")
run = FullRun(model, None, Corpus(tokens, tokens, 500), settings, ".", torch.device("cpu"), {})
calls, grads, dice, losses = [], [], [], []
if run.processes > 1:
    run.runner.register_comm_hook(None, lambda state, bucket: (calls.append(1), allreduce_hook(
        torch.distributed.group.WORLD, bucket))[1])
run.optimizer.register_step_pre_hook(lambda *_: grads.extend(p.grad.clone()
                                                             for p in model.parameters()))
for run.step in range(2):
    batches = run.batches()
    first = next(batches)
    dice.append(torch.initial_seed())
    loss, norm = train_step(run.runner, run.optimizer, itertools.chain([first], batches), settings)
    losses += [sum(gather(loss.item())) / run.processes, norm.item()]
torch.save({"grads": grads, "losses": losses, "calls": len(calls), "dice": dice,
            "weights": model.state_dict()}, f"{sys.argv[1]}.{run.rank}")
os._exit(0)  # PyTorch's own threads may abort a plain exit
"""

@pytest.mark.slow
def test_two_processes_compute_the_gradients_of_one(tmp_path):
    """In float64 (but for the loss), over two steps of three micro-steps: the second step shows
    that the weights stayed alike. Gradients travel once in a step, not once in each micro-step.
    Fails if rows are shared wrongly, or sums are taken for means. The dice of dropout are others in
    each process and step."""
    (script := tmp_path / "two_steps.py").write_text(TWO_STEPS, encoding="utf-8")
    done = run_command(tmp_path / "1", script=script, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    code, _, err = run_torchrun(2, tmp_path / "2", script=script)
    assert code == 0, err
    one, *two = (torch.load(tmp_path / name) for name in ("1.0", "2.0", "2.1"))
    for of_rank in two:
        for name, tolerance in (("grads", 1e-7), ("losses", 1e-6), ("weights", 1e-7)):
            torch.testing.assert_close(of_rank[name], one[name], rtol=tolerance, atol=tolerance)
        assert of_rank["calls"] == 2
    assert two[0]["dice"] == one["dice"] and len({*two[0]["dice"], *two[1]["dice"]}) == 4

@pytest.mark.slow
def test_a_run_of_two_processes_is_the_run_of_one(tmp_path):
    """The same losses, up to rounding; one of them prints and writes."""
    exact = [*TRAIN, "--dropout", "0", "--max_steps", "40"]
    code, out, err = run_torchrun(2, *exact, "--out_dir", tmp_path / "two")
    assert code == 0 and out == "" and err.count("full validation split") == 1, err
    assert "processes: 2" in err and "Traceback" not in err and "warning" not in err.lower()
    train_tiny(tmp_path / "one", *exact)
    one, two = (set(os.listdir(tmp_path / name)) for name in ("one", "two"))
    assert one == two - {"loss.png"}
    for a, b in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        for name in {"step", "loss", "grad_norm", "lr", "val_loss", "full_val_loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-2)

@pytest.mark.slow
def test_a_mistake_under_torchrun_shows_a_message(tmp_path):
    """Of all processes, which torchrun ends as soon as the first one fails: at least one line says
    what it is."""
    for argv, named in ((["--batch_size", "3"], "--batch_size 3: not for 2 processes"),
                        (["--mode", "eval"], "--mode eval: runs in one process")):
        code, out, err = run_torchrun(2, *TRAIN, *argv, "--out_dir", tmp_path / "out")
        assert code != 0 and re.search(f"^error: .*{named}", err, re.M) and out == "", err
        assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")

@pytest.mark.slow
@POSIX
def test_processes_that_are_stopped_go_on_exactly(tmp_path):
    """With dropout, whose dice differ between the processes. The signal goes to the second process
    alone: they agree on the step after which they stop. And a killed one is started again by
    torchrun --max_restarts, with --resume from the beginning. The result is that of peace."""
    argv = [*TRAIN, "--max_steps", "40", "--eval_interval", "5", "--dropout", "0.2", "--resume"]
    assert run_torchrun(2, *argv, "--out_dir", tmp_path / "whole")[0] == 0
    for step, number in ((5, signal.SIGTERM), (22, signal.SIGKILL)):
        process = run_torchrun(2, *argv, "--out_dir", tmp_path / "parts", wait=False,
                               options=["--max_restarts=1"] * (number == signal.SIGKILL))
        lines, sent = [], False
        for line in process.stderr:
            lines.append(line)
            if line.startswith(f"step {step}/") and not sent:
                os.kill(workers_of(process)[1], number)
                sent = True
        code, text = process.wait(60), "".join(lines)
        if number == signal.SIGTERM:
            assert code != 0 and "saved; go on with --resume\n" in lines, text
            assert step <= step_of(tmp_path / "parts" / "latest.pt") < 22
    assert sent and code == 0 and len(re.findall("^resuming", text, re.M)) == 2, text
    assert_same_run(tmp_path / "whole" / "latest.pt", tmp_path / "parts" / "latest.pt")
    assert step_losses(tmp_path / "whole") == step_losses(tmp_path / "parts")

# ---- The laboratory ------------------------------------------------------------------------------
def ablate_tiny(out_dir, *argv):
    """The table's cells, and what was printed beside."""
    code, out, err = run_main("--mode", "ablate", *TRAIN[2:], "--out_dir", out_dir, *argv)
    assert code == 0, err
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in out.splitlines()[2:]], err

def test_an_ablation_is_the_runs_it_stands_for(tmp_path, pictures):
    """The table's figures are those of plain training runs with the same flags and seeds, in the
    units that it names; the curves are drawn."""
    bpe = ["--tokenizer", "bpe", "--vocab_size", "300"]
    (first, second), _ = ablate_tiny(tmp_path, "--vary", "pos=learned,rope", *bpe, "--seed", "5")
    assert first[0] == "pos=learned" and second[0] == "pos=rope" and first[4] == "2 of 2"
    figures = []
    for seed in ("5", "6"):
        err, folder = train_tiny(tmp_path / seed, "--pos", "rope", "--seed", seed, *bpe), \
            tmp_path / "ablate_pos" / f"pos=rope_seed={seed}"
        assert_same_run(folder / "latest.pt", tmp_path / seed / "latest.pt")
        figures.append([*map(float, re.search(r"([\d.]+) nats.* ([\d.]+) bits", err).groups()),
                        metrics_of(folder)[-1]["seconds"]])
    for cell, a, b in zip(second[1:4], *figures):
        mean, deviation = (float(x) for x in cell.split(" ± "))
        assert mean == pytest.approx((a + b) / 2, abs=2e-4)
        assert deviation == pytest.approx(abs(a - b) / math.sqrt(2), abs=2e-4)
    if importable("matplotlib"):
        assert (tmp_path / "ablate_pos" / "curves.png").read_bytes().startswith(b"\x89PNG")

def test_an_interrupted_ablation_goes_on_where_it_stopped(tmp_path, pictures):
    """A finished run is only evaluated again, an unfinished one is resumed, and the table is the
    same. Other settings are refused: nothing old is taken for the result of something else."""
    command = ["--vary", "n_layer=1,2", "--seeds", "1", "--checkpoint_interval", "2"]
    complete, _ = ablate_tiny(tmp_path, *command)
    finished, unfinished = (tmp_path / "ablate_n_layer" / f"n_layer={n}_seed=1337" for n in (1, 2))
    end, before = load_checkpoint(unfinished / "latest.pt"), (finished / "latest.pt").read_bytes()
    shutil.copy(unfinished / "step_000004.pt", unfinished / "latest.pt")
    rows, err = ablate_tiny(tmp_path, *command)
    assert [row[:3] for row in rows] == [row[:3] for row in complete]
    assert (finished / "latest.pt").read_bytes() == before
    assert "step 5/6" not in err.split("----")[1] and "step 4/6" not in err
    assert_same(load_checkpoint(unfinished / "latest.pt")["model"], end["model"])
    code, _, err = run_main("--mode", "ablate", *TRAIN[2:], "--out_dir", tmp_path, *command,
                            "--batch_size", "2")
    assert code == 2 and "--batch_size 2: cannot change on --resume" in last_line(err)

def test_typed_settings_reach_the_runs_of_an_ablation(tmp_path):
    """Patience, as in training; a switch is varied by true and false. And a learning rate of 1e30
    has no score and is a row, not the end."""
    frozen = ["--learning_rate", "1e-30", "--weight_decay", "0", "--eval_interval", "1"]
    _, err = ablate_tiny(tmp_path, "--vary", "bias=true,false", "--seeds", "1", *frozen,
                         "--patience", "2")
    assert err.count("trained to step 2 in ") == 2
    for value in (True, False):
        folder = tmp_path / "ablate_bias" / f"bias={str(value).lower()}_seed=1337"
        state = load_checkpoint(folder / "latest.pt")
        assert state["step"] == 2 and state["model_config"]["bias"] == value
    (bad, good), _ = ablate_tiny(tmp_path, "--vary", "learning_rate=1e30,1e-3", "--seeds", "1",
                                 "--grad_clip", "0")
    assert bad == ["learning_rate=1e30", "diverged", "diverged", "diverged", "0 of 1"]
    assert 2 < float(good[1]) < 5 and good[4] == "1 of 1"

def test_bench_measures_what_it_prints(tmp_path, monkeypatch):
    """Parameters and rates are what they say. And nothing is written."""
    monkeypatch.chdir(tmp_path)
    bench = ["--mode", "bench", "--preset", "laptop", "--n_layer", "1", "--n_embd", "32",
             "--block_size", "16", "--batch_size", "2", "--max_tokens", "5", "--dtype", "float32"]
    code, out, err = run_main(*bench, "--bench_seconds=0.01")
    assert code == 0 and out.startswith("| laptop: cpu, float32, 1 threads, PyTorch 2"), err
    rows = {name: float(value.replace(",", "")) for name, value in
            re.findall(r"^\| ([^|]*) \| ([\d,.e+-]+) \|$", out, re.M)}
    faults = rows.pop("page faults per step")
    assert len(rows) == out.count("\n") - 3 == 4 and min(rows.values()) > 0 <= faults < 1000
    sizes, _ = minigpt.find_settings({"preset": "laptop", "n_layer": 1, "n_embd": 32,
                                      "block_size": 16, "dtype": "float32"}, torch.device("cpu"))
    model = GPT(GPTConfig(**{**sizes, "vocab_size": 65}))
    assert rows["parameters"] == minigpt.count_parameters(model)
    timer = types.SimpleNamespace(blocked_autorange=lambda **_: types.SimpleNamespace(median=0.5))
    monkeypatch.setattr("torch.utils.benchmark.Timer", lambda *_, **__: timer)
    _, out, _ = run_main(*bench)  # were each call half a second: two calls a second
    assert "training, tokens/s | 64 |" in out and "writing, tokens/s | 10 |" in out
    assert not os.listdir(tmp_path)

# ---- Out, and in: against the library itself -----------------------------------------------------
ROPE = dict(pos="rope", qk_norm=True, bias=False)
EXPORTED = [
    ("gpt2", {}), ("gpt2", dict(pos="sinusoidal", activation="relu2", bias=False)),
    ("gpt2", dict(tie_weights=False, activation="relu", mlp_ratio=3.0)),
    ("persimmon", dict(pos="rope", tie_weights=False)),
    ("persimmon", dict(ROPE, activation="relu2", attention="fused")),
    ("qwen3", dict(ROPE, norm="rmsnorm", activation="swiglu", n_head=4)),
    ("apertus", dict(ROPE, norm="rmsnorm", activation="relu", tie_weights=False))]

@pytest.fixture(scope="module")
def transformers():
    """The library, without its bars of progress."""
    library = pytest.importorskip("transformers")
    library.utils.logging.disable_progress_bar()
    return library

def save_model(folder, tokenizer, **changes):
    """A best.pt whose weights are far from their start."""
    changes = dict(vocab_size=tokenizer.vocab_size, n_embd=24, block_size=16) | changes
    model = small_model(**changes).float()
    minigpt.save_checkpoint(folder / "best.pt", {
        "format": minigpt.FORMAT, "step": 1, "tokenizer": (tokenizer.kind, tokenizer.state),
        "model": model.state_dict(), "model_config": minigpt.asdict(model.config)})
    return model.eval()

@pytest.mark.parametrize("kind, changes", EXPORTED)
def test_what_goes_out_computes_the_same_and_comes_back(transformers, tmp_path, kind, changes):
    """In transformers, which needs no code of ours: the logits to 1e-4, the greedy text, the ids,
    an error for a character that is not there. Back here: the same bits; out again: the same file.
    Fails for a matrix that is not transposed, heads that are mixed up, an eps, theta or activation
    of another model, an id for the end where there is none."""
    tokenizer, hf = CharTokenizer.train("to be, or not\né😀"), tmp_path / "hf"
    model = save_model(tmp_path, tokenizer, **changes)
    code, out, err = run_main("--mode", "export", "--out_dir", tmp_path)
    assert code == 0 and out.startswith(f"{hf}: {kind};") and float(out.split()[-1]) < 1e-5, err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf)
    idx = random_ids(2, 16, vocab_size=tokenizer.vocab_size)
    assert_close(theirs(idx).logits, model(idx)[0], 1e-4)
    assert torch.equal(theirs.generate(idx[:1, :5], max_new_tokens=9, do_sample=False),
                       model.generate(idx[:1, :5], 9, temperature=0))
    assert theirs.config.eos_token_id is theirs.config.bos_token_id is None
    assert theirs.generation_config.max_length == 16
    characters, text = transformers.AutoTokenizer.from_pretrained(hf), "be not é\n😀, "
    assert dict(characters(text)).keys() == {"input_ids", "attention_mask"}
    assert characters(text)["input_ids"] == tokenizer.encode(text)
    assert characters.decode(tokenizer.encode(text)) == text
    with pytest.raises(Exception, match="WordLevel"):
        characters("x")
    again, back = minigpt.model_from_checkpoint(minigpt.read_checkpoint(hf))
    assert_same(again.state_dict(), model.state_dict())
    assert again.config == model.config and back.itos == tokenizer.itos
    code, _, err = run_main("--mode", "export", "--checkpoint", hf, "--export_dir", tmp_path / "b")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (hf, tmp_path / "b")]
    assert code == 0 and weights[0] == weights[1], err
    check_mistake(*run_main("--mode", "export", "--out_dir", tmp_path), ["--export_dir", "empty"])

def test_byte_pairs_go_out_and_come_back(transformers, tmp_path, bpe):
    """Every text has the same ids there, with the end of text; and a pipeline writes."""
    save_model(tmp_path, bpe)
    code, _, err = run_main("--mode", "export", "--out_dir", tmp_path)
    assert code == 0, err
    theirs, rng = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), random.Random(0)
    characters = assigned_characters()
    for text in ("I'll  go<|endoftext|> now \n", SAMPLE.read_text(encoding="utf-8"), *(
            random_text(rng, 40) + "".join(rng.choices(characters, k=10)) for _ in range(1000))):
        assert theirs(text)["input_ids"] == bpe.encode(text)
    assert theirs.decode(bpe.encode("café , 'tis ")) == "café , 'tis "
    assert theirs.eos_token_id == bpe.end
    (tmp_path / "hf" / "merges.txt").unlink()  # the library's own file has them, too
    assert minigpt.read_tokenizer(tmp_path / "hf").merges == bpe.merges
    whole = (file := tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8")
    file.write_text(whole.replace('prefix_space": false', 'prefix_space": true'), encoding="utf-8")
    with pytest.raises(UserError, match="as GPT-2 does"):
        minigpt.read_tokenizer(tmp_path / "hf")
    write = transformers.pipeline("text-generation", str(tmp_path / "hf"))
    assert write("the", max_new_tokens=3)[0]["generated_text"].startswith("the")

@pytest.mark.parametrize("named, changes", [
    ("norm_position=post", dict(ROPE, norm="rmsnorm", activation="swiglu", norm_position="post")),
    ("qk_norm=True", dict(qk_norm=True)), ("token_shift=True", dict(ROPE, token_shift=True)),
    ("norm=none", dict(norm="none")),
    ("bias=True", dict(ROPE, norm="rmsnorm", activation="swiglu", bias=True)),
    ("model=bigram", dict(model="bigram"))])
def test_what_no_architecture_holds_is_refused(tmp_path, named, changes):
    """In one line, with the setting that stands in the way; nothing is written."""
    save_model(tmp_path, CharTokenizer.train("abc"), **changes)
    check_mistake(*run_main("--mode", "export", "--out_dir", tmp_path), [named])
    assert not (tmp_path / "hf").exists()

def test_every_preset_but_the_bigram_has_an_architecture():
    sizes = {name: {"vocab_size": 9, **preset.settings} for name, preset in minigpt.PRESETS.items()}
    kinds = {name: minigpt.find_architecture(minigpt.pick(GPTConfig, settings))
             for name, settings in sizes.items() if name != "bigram"}
    assert kinds == {**dict.fromkeys(kinds, "gpt2"), "laptop": "persimmon", "modern": "qwen3"}

def save_gpt2(transformers, folder, **changes):
    """As the library writes it, in several files, with GPT-2's own two files for the tokenizer."""
    tokenizer = BPETokenizer.train(SHORT.read_text(encoding="utf-8"), 300)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**dict(
        vocab_size=300, n_positions=32, n_embd=96, n_layer=3, n_head=3, initializer_range=0.2,
        bos_token_id=tokenizer.end, eos_token_id=tokenizer.end), **changes})).eval()
    model.save_pretrained(folder, max_shard_size="500KB")
    tokenizer.save(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model, tokenizer

@pytest.mark.parametrize("runs, changes", [
    (True, {}), (True, dict(tie_word_embeddings=False, n_inner=60, resid_pdrop=0.3)),
    (False, dict(vocab_size=310)), (False, dict(layer_norm_epsilon=1e-3)),
    (False, dict(activation_function="gelu")), (False, dict(scale_attn_by_inverse_layer_idx=True))])
def test_a_gpt2_runs_here_if_it_computes_what_ours_do(transformers, tmp_path, runs, changes):
    """Fails if a size, or the tying, is not read, or if logits and vocabulary are not compared."""
    theirs, tokenizer = save_gpt2(transformers, tmp_path, **changes)
    if not runs:
        return check_mistake(*run_main("--mode", "eval", "--checkpoint", tmp_path), ["can run"])
    model, ours = minigpt.model_from_checkpoint(minigpt.read_checkpoint(tmp_path))
    idx = random_ids(2, 32, vocab_size=300)
    assert_close(model.eval()(idx)[0], theirs(idx).logits, 1e-4)
    assert ours.merges == tokenizer.merges and model.config.attention == "fused"
    assert model.config.dropout == theirs.config.resid_pdrop

def test_a_model_of_the_library_is_used_as_ours_are(transformers, tmp_path):
    """It writes, is scored, looked into, and trained on, with its tokenizer and its sizes, which
    are not to be changed; dropout may be."""
    folder, out_dir = tmp_path / "gpt2", tmp_path / "out"
    save_gpt2(transformers, folder)
    for mode in ("generate", "eval", "inspect"):
        code, out, err = run_main("--mode", mode, "--checkpoint", folder, "--prompt", "The tide",
                                  "--data", SHORT, "--out_dir", tmp_path, "--max_tokens", "5")
        assert code == 0 and out and "note" not in err, err
    argv = ["--mode", "train", "--init_from", folder, "--data", SHORT, "--learning_rate", "3e-3",
            "--max_steps", "12", "--sample_tokens", "0", "--dropout", "0.3", "--out_dir", out_dir]
    succeed(*argv)
    losses = [r["val_loss"] for r in metrics_of(out_dir) if "val_loss" in r]
    assert losses[-1] < losses[0] - 0.3 and losses[0] > 6
    state = load_checkpoint(out_dir / "best.pt")
    assert state["model_config"]["dropout"] == 0.3 and state["train_config"]["tokenizer"] == "bpe"
    argv[2:4] = ["--init_from", out_dir / "best.pt"]  # ours serves as well
    first = metrics_of(succeed(*argv[:-1], tmp_path / "more") and tmp_path / "more")[0]
    assert first["val_loss"] == pytest.approx(min(losses), rel=1e-6) and first["step"] == 0
    argv[-1] = tmp_path / "other"
    for flag, value in (("--n_layer", "2"), ("--tokenizer", "char"), ("--vocab_size", "400")):
        check_mistake(*run_main(*argv, flag, value), [f"{flag} {value}", "--init_from has"])

@pytest.mark.parametrize("why, damage", [
    ("LlamaConfig", "architecture"), ("(ValueError: ['transformer.ln_f.weight']", "tensor"),
    ("SafetensorError", "cut"), ("config.json", "config"), ("tokenizer.json", "tokenizer"),
    ("(ValueError: [('transformer.ln_f.weight'", "shape")])
def test_a_folder_that_is_not_ours_is_one_line(transformers, tmp_path, why, damage):
    """Another architecture, a missing or misshapen tensor, half a file, no config or tokenizer."""
    safetensors, hf = pytest.importorskip("safetensors.torch"), tmp_path / "hf"
    save_model(tmp_path, CharTokenizer.train("abc"), bias=False)
    assert run_main("--mode", "export", "--out_dir", tmp_path)[0] == 0
    weights, name = hf / "model.safetensors", "transformer.ln_f.weight"
    tensors = safetensors.load_file(weights)
    if damage == "architecture":
        (hf / "config.json").write_text(json.dumps({
            "model_type": "llama", "vocab_size": 3, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1}))
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage in ("config", "tokenizer"):
        (hf / f"{damage}.json").unlink()
        (hf / "chars.json").unlink()
    else:
        tensors.pop(name)
        tensors |= {"shape": {name: torch.ones(5)}, "tensor": {}}[damage]
        safetensors.save_file(tensors, weights, metadata={"format": "pt"})
    check_mistake(*run_main("--mode", "eval", "--checkpoint", hf), [str(hf), why])

def test_nothing_of_a_folder_is_executed(transformers, tmp_path, monkeypatch):
    """Not even if someone who is asked would say yes."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w')")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {
        "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    check_mistake(*run_main("--mode", "eval", "--checkpoint", tmp_path), ["can run here"])
    assert not (tmp_path / "was_here").exists()

# ---- A look inside -------------------------------------------------------------------------------
def test_inspect_shows_the_models_own_probabilities_and_attention(tiny_run, tmp_path, pictures):
    """The logs of what it prints sum to the loss; the likeliest come in order; the shares are those
    of the equation, whatever kernel the model has: rows sum to 1, nothing above the diagonal."""
    text = "THE TIDE: me\nO"
    shutil.copy(tiny_run[0] / "best.pt", tmp_path)
    argv = ["--mode", "inspect", "--out_dir", tmp_path, "--prompt", text]
    code, out, err = run_main(*argv, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    model, tokenizer = minigpt.model_from_checkpoint(load_checkpoint(tmp_path / "best.pt"))
    idx = torch.tensor([tokenizer.encode(text)])
    loss, T = model.eval()(*pair(idx))[1].item(), idx.shape[1]
    assert -sum(math.log(r["p"]) for r in records) / len(records) == pytest.approx(loss, abs=1e-4)
    assert "".join(r["token"] for r in records) == text[1:]
    p, maps = minigpt.look_inside(model, idx)
    lines = run_main(*argv)[1].splitlines()
    for line, r, row in zip(lines, records, p[:-1], strict=True):
        likeliest = [[tokenizer.decode([i]), row[i].item()] for i in row.topk(5).indices.tolist()]
        assert r["likeliest"] == likeliest and len(line) <= 80
        others = "".join(f"  {token!r} {q:.2f}" for token, q in likeliest)
        assert line == f"{r['token']!r:>10} {r['p']:.3f} {'#' * round(10 * r['p']):10}{others}"
    q, k, _ = model.h[0].attn.heads(model.h[0].ln_1(model.wte(idx)))
    scores = (q @ k.mT / q.shape[-1] ** 0.5)[0]
    scores[:, torch.ones(T, T).triu(1).bool()] = -math.inf
    assert_close(maps[0], scores.softmax(-1).detach(), 1e-5)
    assert all(m.shape == (2, T, T) and m.triu(1).abs().sum() == 0 for m in maps)
    assert (tmp_path / "attention.png").stat().st_size > 10_000 or not importable("matplotlib")
    for prompt, why in (("ï", "'ï'"), ("T", "1 tokens")):
        check_mistake(*run_main(*argv[:-1], prompt), ["--prompt", why])

def test_each_head_is_drawn_in_its_place(tmp_path, monkeypatch):
    """A column for each layer. Fails if layers and heads, or queries and keys, change places."""
    figure, seen = pytest.importorskip("matplotlib.figure").Figure, []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: seen.append(self))
    weights, labels = [torch.rand(3, 4, 4) for _ in range(2)], ["'a'", "'b'", "'c'", "'d'"]
    minigpt.draw_attention(tmp_path / "a.png", weights, labels)
    for axes in seen[0].axes:
        place, image = axes.get_subplotspec(), axes.get_images()[0]
        layer, head = place.colspan.start, place.rowspan.start
        assert axes.get_title() == f"layer {layer}, head {head}" and image.get_clim() == (0, 1)
        assert_close(torch.tensor(image.get_array().tolist()), weights[layer][head], 1e-6)
        assert [tick.get_text() for tick in axes.get_yticklabels()] == labels
    assert len(seen[0].axes) == 6 and seen[0].get_figwidth() < seen[0].get_figheight()

# ---- The command line, as a user types it --------------------------------------------------------
MISTAKES = [line.split(" => ") for line in """\
 => --mode is missing & generate
--mode dance => --mode & dance & eval
--mode train --max_stepz 5 => --max_stepz
--mode train --max 5 => --max
--mode train --max_steps => --max_steps
--mode train --max_steps many => --max_steps & 'many' & whole number
--mode train --bias maybe => maybe
--mode bench --preset bigram => --preset bigram & GPT
--mode ablate => --vary
--mode ablate --vary luck=1,2 => --vary luck=1,2
--mode ablate --vary seed=1,2 => --vary seed=1,2
--mode ablate --vary n_layer => --n_layer
--mode ablate --vary n_layer=a,b => --n_layer & 'a'
--mode ablate --vary norm=layernorm,rmsnrm => --norm & rmsnrm
--mode train --n_embd 2000000000 => memory & --n_embd
--mode train --data nowhere.txt => nowhere.txt: No such file
--mode train --data {tmp}/empty.txt => --block_size 512 & a longer --data
--mode train --data {tmp} => {tmp}: Is a directory & name another
--mode train --data {tmp}/latin.txt => latin.txt: not UTF-8
--mode train --data {tmp}/few.txt => --block_size 512 & tenth, 1; & --data
--mode train --n_layer 0 => --n_layer & '0'
--mode train --mlp_ratio 1e300 => --mlp_ratio & 1e300 & 0.01 to 100
--mode train --n_head 3 => --n_embd 128 & --n_head 3
--mode train --dropout 1.0 => --dropout & '1.0'
--mode train --learning_rate nan => --learning_rate & nan
--mode train --min_lr 9 => --min_lr 9 & --learning_rate
--mode train --preset huge => --preset & huge & laptop
--mode train --device tpu => --device tpu & cpu
--mode train --tokenizer bpe --vocab_size 100 => --vocab_size & '100'
--mode train --tokenizer bpe --vocab_size 65537 => --vocab_size & 65536
--mode train --vocab_size 300 => --tokenizer bpe
--mode train --n_embd 12 --n_head 4 => --pos
--mode train --out_dir {tmp}/empty.txt/out => {tmp}/empty.txt
--mode train --checkpoint {run}/best.pt => --checkpoint {run}/best.pt & --init_from & --resume
--mode generate --out_dir {tmp}/none => best.pt & train first
--mode eval --checkpoint {tmp} => {tmp}: not a model that can run here & GPT-2
--mode generate --checkpoint {tmp}/cut.pt => cut.pt: damaged
--mode eval --checkpoint {tmp}/latin.txt => latin.txt: damaged
--mode generate --out_dir {run} --seed 99999999999999999999 => --seed & 9999
--mode train --out_dir {run} => --out_dir {run} & has a & --resume
--mode generate --out_dir {run} --top_p 1.1 => --top_p & 1.1
--mode generate --out_dir {run} --prompt naïve => --prompt 'naïve' & 'ï' (U+00EF)
--mode eval --out_dir {run} --data {tmp}/greek.txt => (U+03""".split("\n")]

@pytest.fixture(scope="module")
def mistaken(tiny_run, tmp_path_factory):
    """The arguments of a mistake and what its message must hold, with real files behind them."""
    run, tmp = tiny_run[0], tmp_path_factory.mktemp("mistakes")
    for name, data in (("empty.txt", b""), ("latin.txt", b"caf\xe9 " * 500), ("few.txt", b"to be"),
                       ("greek.txt", "λόγος ".encode() * 500),
                       ("cut.pt", (run / "best.pt").read_bytes()[:5000])):
        (tmp / name).write_bytes(data)

    def fill(command, named):
        argv = [word.format(tmp=tmp, run=run) for word in command.split()]
        extra = {"--device": "cpu", "--out_dir": tmp / "out"} if argv else {}
        if "train" in argv or "ablate" in argv:
            extra |= {"--data": SHORT, "--preset": "laptop"}
        argv += [str(x) for flag in extra if flag not in argv for x in (flag, extra[flag])]
        return argv, named.format(tmp=tmp, run=run).split(" & ")

    return fill

def check_mistake(code, out, err, named):
    lines = err.strip().split("\n")
    assert code == 2 and out == "" and "Traceback" not in err, err
    assert [line.startswith("error: ") for line in lines].count(True) == 1, err
    assert lines[-1].startswith("error: ") and all(word in lines[-1] for word in named), lines[-1]

@pytest.mark.parametrize("command, named", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistaken, command, named):
    """The last line begins with `error: ` and names the flag or file and the value; there is no
    traceback, and nothing on stdout."""
    argv, named = mistaken(command, named)
    check_mistake(*run_main(*argv), named)

def flags_with_values():
    return [action.option_strings[0] for action in minigpt.build_parser()._actions
            if action.nargs is None]

@pytest.mark.slow
def test_random_command_lines_end_in_success_or_in_one_line(tiny_run, tmp_path):
    """Flags of every kind with values of every kind: exit code 0, or 2 with a single `error:` line,
    the last one; never a traceback. What is huge here is too huge for any memory."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    run, seen = tiny_run[0], collections.Counter()
    odd = ["", " ", "-", "--", "é", "nan", "inf", "1e400", "1e300", "None", "1_0", "2.0", "-1",
           "9" * 30, "\udcff"]
    files = [str(path) for path in (tmp_path, run / "best.pt", run / "latest.pt", SHORT)]
    values = {int: ["0", "1", "2", "3", "4", "8", "400"], str: ["a", "ROMEO:", *files],
              float: ["0", "1e-300", "1e-4", "0.5", "1", "2", "100"]}

    def value(kind, choices=None):
        sound = st.sampled_from([*(choices or values[kind])])
        return st.one_of(*[sound] * 9, st.sampled_from(odd)).map(lambda value: [value])

    flags = {"resume": st.just([]), "nonsense": st.just([]), "checkpoint": value(str),
             "data": value(str), "device": value(str, ["cpu", "cpu:9", "tpu", "cuda:9", "meta"])}
    for f in itertools.chain(*map(fields, (GPTConfig, TrainConfig, minigpt.GenerateConfig))):
        kind = f.type if isinstance(f.type, type) else f.type.__args__[0]
        if kind is bool and f.name not in ("compile", "wandb"):
            flags |= {f.name: st.just([]), f"no_{f.name}": st.just([])}
        elif kind is not bool:
            flags[f.name] = value(kind, minigpt.CHOICES.get(f.name))
    typed = st.lists(st.sampled_from(sorted(flags)).flatmap(
        lambda name: flags[name].map(lambda value: [f"--{name}", *value])), max_size=4)

    @hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.sampled_from(["train", "train", "generate", "eval", "ablate"]), typed)
    def law(mode, typed):
        folder = run if mode in ("generate", "eval") else tmp_path / "out"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        argv = ["--mode", mode, *TRAIN[2:], "--max_steps", "2", "--sample_tokens", "3",
                "--max_tokens", "4", "--no_wandb", "--out_dir", folder]
        argv += ["--vary", "tie_weights=true", "--seeds", "1"] if mode == "ablate" else []
        code, _, err = run_main(*argv, *itertools.chain.from_iterable(typed))
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code in (0, 2) and len(lines) == (code == 2) and "Traceback" not in err, err
        assert code == 0 or err.splitlines()[-1] == lines[0] and len(lines[0]) > 20, err
        seen[mode, code] += 1

    law()
    assert all(seen[mode, code] for mode in ("train", "generate", "eval") for code in (0, 2)), seen

def test_dashes_in_flags_and_in_values_are_kept_apart():
    """--max-steps is --max_steps; a prompt, a stop text and a path keep their dashes."""
    assert minigpt.parse(["--warmup-steps=0", "--out-dir", "my-folder", "--no-wandb"]) == {
        "warmup_steps": 0, "out_dir": "my-folder", "wandb": False}
    assert minigpt.parse(["--prompt=a--no_b"]) == {"prompt": "a--no_b"}
    for text in ("-- well-met", "-", "a--b-c", "--a-b c", "x=--"):
        assert minigpt.parse(["--prompt", text, "--stop", text]) == {"prompt": text, "stop": text}
    for text in ("--x-y", "--max-steps", "-1", "--out-dir=a-b"):
        assert minigpt.parse([f"--prompt={text}", f"--out_dir={text}"]) == {
            "prompt": text, "out_dir": text}

def test_two_dashes_as_a_value_are_a_mistake_and_no_crash():
    """argparse itself ends in a traceback here; whichever flag it is."""
    for flag in flags_with_values():
        for argv in ([f"{flag}=--"], [flag.replace("_", "-") + "=--"], [flag, "--"]):
            check_mistake(*run_main(*argv), [flag])
    assert "out of memory" in minigpt.explain(MemoryError())
    with pytest.raises(NotImplementedError):  # nobody's mistake
        minigpt.explain(NotImplementedError())

def test_help_lists_every_flag_in_80_columns():
    """--help is the reference; it exits with 0; each flag with its meaning and its default."""
    done = run_command("--help", COLUMNS="300")
    text, lines = re.sub(r"\s+", " ", done.stdout), done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and max(map(len, lines)) <= 80
    for flag in flags_with_values():
        assert any(re.match(rf"  {flag} \S", line) for line in lines), flag
    for word in (*minigpt.PRESETS, *minigpt.MODES, "(0.9)", "--resume", "--bias"):
        assert word in text
    for name, help in {**minigpt.comments(GPTConfig), **minigpt.comments(TrainConfig)}.items():
        assert help in text, name

@POSIX
def test_a_reader_that_leaves_early(tiny_run, tmp_path, start_main):
    """`generate | head -c 10` and `train 2>&1 | head -1` end without a traceback, and the exit code
    is what a shell expects (128 + 13)."""
    generate = ["--mode", "generate", "--out_dir", tiny_run[0], "--device", "cpu", "--max_tokens",
                "300000"]
    train = [*TRAIN, "--out_dir", tmp_path, "--max_steps", "5000"]
    for argv in (generate, train):
        os.mkfifo(fifo := tmp_path / f"fifo{len(argv)}")
        reader, log = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), tmp_path / f"log{len(argv)}"
        process, got = start_main(argv, *((log, fifo) if argv is generate else (fifo, log))), b""
        while not got:
            with contextlib.suppress(BlockingIOError):
                got = os.read(reader, 10)
            assert process.is_alive()
            time.sleep(0.01)
        os.close(reader)
        process.join(60)
        assert process.exitcode == 141 and not re.search("Traceback|Exception", log.read_text())

# ---- Writing -------------------------------------------------------------------------------------
def test_typed_settings_reach_the_writing(tiny_run):
    """Each as the model's own generate has it, drawn with the same dice; and each of them matters.
    Only the text goes to stdout, and the prompt leads it; the cache changes nothing."""
    folder, texts = tiny_run[0], []
    model, tokenizer = minigpt.model_from_checkpoint(load_checkpoint(folder / "best.pt"))
    generate = ["--mode", "generate", "--out_dir", folder, "--max_tokens", "30"]
    for options in (dict(), dict(temperature=0.0), dict(temperature=2.5), dict(top_k=3),
                    dict(top_p=0.2)):
        for flags in ([], ["--no_cache"]):
            flags += [f"--{name}={value}" for name, value in options.items()]
            _, out, err = run_main(*generate, "--prompt", "THE", "--seed", "7", *flags)
            dice = torch.Generator().manual_seed(minigpt.derived_seed(7, 0))
            ids = model.generate(torch.tensor([tokenizer.encode("THE")]), 30,
                                 **{"temperature": 0.8, **options}, generator=dice)
            assert out == tokenizer.decode(ids[0].tolist()) + "\n"
            assert re.fullmatch(r".*best.pt: step \d+, [\d,]+ parameters\n", err)
        texts.append(out)
    assert len(set(texts)) == 5 and run_main(*generate)[1][0] == "\n"  # without a prompt
    assert run_main(*generate, "--prompt", "THE", "--max_tokens", "0")[1] == "THE\n"
    assert run_main(*generate, "--seed", "2")[1] != run_main(*generate)[1] == run_main(*generate)[1]

def test_several_samples_are_several_texts(tiny_run):
    """Separated by a line; each continues the prompt; --stop ends each at its own place."""
    generate = ["--mode", "generate", "--out_dir", tiny_run[0], "--prompt", "I", "--num_samples",
                "3", "--max_tokens", "60", "--temperature", "1.5"]
    code, out, _ = run_main(*generate)
    texts = out.split("---------------\n")
    assert code == 0 and len(set(texts)) == 3 and all(len(t) == 62 and t[0] == "I" for t in texts)
    stop = texts[1][20:22]
    _, out, _ = run_main(*generate, "--stop", stop)
    for whole, cut in zip(texts, out.split("---------------\n"), strict=True):
        assert cut == whole.split(stop)[0] + "\n" or cut == whole and stop not in whole

def test_what_is_shown_of_a_text_comes_at_once_and_never_changes(tiny_run, monkeypatch):
    """What was shown stays the beginning of what comes, for every way in which tokens and a stop
    text can meet; half a character waits for its other half, and after the end-of-text token there
    is nothing."""
    tokenizer, dice, out = BPETokenizer.train("aba " * 9, 260), random.Random(0), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)

    def show(ids, stop):
        """What is on the screen after each token, and in the end."""
        seen = []

        def tokens():
            for i in ids:
                seen.append(out.getvalue())
                yield torch.tensor([[i]])
            seen.append(out.getvalue())

        out.seek(0), out.truncate()
        minigpt.show_text(tokenizer, tokens(), stop)
        return seen, out.getvalue()

    for _ in range(500):
        text = "".join(dice.choices("ab\né", k=dice.randrange(12)))
        stop = "".join(dice.choices("ab\né", k=dice.randrange(3)))
        ids = [i for c in text for i in tokenizer.encode(c)]
        seen, whole = show(ids, stop)
        assert whole == (text.split(stop)[0] if stop else text) + "\n"
        for new, shown in zip([*seen[1:], whole], seen):
            assert new.startswith(shown) and "\ufffd" not in new
        assert (len(seen) <= len(ids)) == bool(stop and stop in text)  # then no more is drawn
        seen, whole = show([*ids, tokenizer.end, *ids], "")
        assert whole == text + "\n" and len(seen) == len(ids) + 1
    ids = tokenizer.encode("abé ")
    assert show(ids, "xy")[0][-1] == "abé" and show(tokenizer.encode("é")[:1], "")[1] == "\ufffd\n"
