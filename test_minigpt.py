"""
The laws of minigpt, chapter by chapter in the order of minigpt.py.

    pytest -v                       offline; a minute and a half on two cores
    pytest -v -m slow               the rest: what trains, waits, kills or compiles for longer
    pytest -v -k attention          one topic

A test's name states a law; its docstring says why it holds and what change would break it. The
references are computed in float64, by torch or by hand. What a user types is tested by running the
real command; nothing is replaced by a stand-in, except the mirrors' addresses by a local server's.
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import csv
import doctest
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import download_data
import minigpt
from minigpt import (
    GPT,
    MLP,
    PRESETS,
    Block,
    BPETokenizer,
    CausalSelfAttention,
    CharTokenizer,
    Engine,
    GenerateConfig,
    GPTConfig,
    LayerNorm,
    TrainConfig,
    UserError,
    clip_gradients,
    draw_token,
    encode_corpus,
    estimate_loss,
    evaluate,
    filter_logits,
    get_batch,
    get_lr,
    load_checkpoint,
    main,
    make_optimizer,
    save_checkpoint,
    train_step,
    until_stop,
)

torch.set_num_threads(1)  # models this small only lose time by sharing their work

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "data" / "sample.txt"
CPU = Engine(torch.device("cpu"), torch.float32)
SMALL = dict(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, dropout=0.0)


def small_config(**changes):
    return GPTConfig(**{**SMALL, **changes})


def small_model(seed=0, **changes):
    """A tiny GPT in float64 with weights large enough for every part to matter."""
    torch.manual_seed(seed)
    model = minigpt.build_model(small_config(**changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def random_ids(*shape, seed=0, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ==================================================================================================
# The book
# ==================================================================================================


@pytest.mark.parametrize("name", [
    name for name, test in ((t.name, t) for t in doctest.DocTestFinder().find(minigpt))
    if test.examples
])
def test_worked_example_in_a_docstring_is_true(name):
    """The numbers in the text are run, so prose and code cannot drift apart."""
    test = {t.name: t for t in doctest.DocTestFinder().find(minigpt)}[name]
    out = io.StringIO()
    failed, attempted = doctest.DocTestRunner().run(test, out=out.write)
    assert attempted > 0 and failed == 0, out.getvalue()


def test_the_map_of_chapters_is_the_order_of_the_chapters():
    """The title page promises chapters in an order; the banners keep the promise."""
    promised = re.findall(r"^    ([A-Z][a-z]+(?: [a-z]+)*)  +[a-z]", minigpt.__doc__, re.M)
    source = (HERE / "minigpt.py").read_text(encoding="utf-8")
    kept = re.findall(r"^# ={60,}\n# ([A-Z].*?)(?: \[optional reading\])?\n#", source, re.M)
    assert promised == kept and len(kept) >= 10


def test_numbers_in_the_comments_of_the_parts_are_true():
    """The examples that stand in comments, where doctest does not look."""
    assert_close(LayerNorm(2)(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]), 1e-4)
    q, k, v = (torch.tensor([[[x]] for x in xs]).view(1, 1, 2, 1)
               for xs in ((0.0, 2.0), (1.0, 3.0), (10.0, 20.0)))
    attention = CausalSelfAttention(small_config(n_head=1))
    assert round(attention.attend(q, k, v)[0, 0, 1].item(), 1) == 19.8
    gelu = F.gelu(torch.tensor([2.0, 0.0, -2.0]), approximate="tanh")
    assert [round(x, 2) for x in gelu.tolist()] == [1.95, 0.0, -0.05]
    p = torch.softmax(torch.tensor([2.0, 1.0, 0.0]), -1)
    assert [round(x, 2) for x in p.tolist()] == [0.67, 0.24, 0.09]
    p = torch.softmax(torch.tensor([2.0, 1.0, 0.0]) / 0.5, -1)
    assert [round(x, 2) for x in p.tolist()] == [0.87, 0.12, 0.02]
    assert round(math.log(65), 2) == 4.17


def test_readme_names_only_flags_that_exist():
    """A flag that was renamed must not live on in the README."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    others = {"--source", "--nnodes", "--nproc_per_node", "--max_restarts", "--rdzv_backend",
              "--rdzv_endpoint", "--rdzv_id"}  # download_data.py's and torchrun's
    known = set(minigpt.build_parser()._option_string_actions) | others
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", readme))
    assert named and named <= known


def test_sample_text_has_the_form_of_the_corpus_and_repeats_no_line():
    """Speaker in capitals, verse lines, a blank line; long enough; nothing twice."""
    text = SAMPLE.read_text(encoding="utf-8")
    assert len(text.encode()) >= 50 * 1024
    lines = [line for line in text.split("\n") if line]
    assert len(lines) == len(set(lines))
    for speech in text.strip("\n").split("\n\n"):
        speaker, *verse = speech.split("\n")
        assert re.fullmatch(r"[A-Z' -]+:", speaker) and len(verse) >= 4
        assert all(len(line) <= 60 and line == line.strip() for line in verse)


# ==================================================================================================
# Configuration
# ==================================================================================================


def test_every_config_field_is_a_flag_with_its_help_and_default():
    """A setting exists once: the command line is made from the dataclasses."""
    help_text = " ".join(minigpt.build_parser().format_help().split())
    for config in (GPTConfig, TrainConfig, GenerateConfig):
        for f in fields(config):
            assert f"--{f.name} " in help_text, f.name
            assert f.metadata["help"] in help_text, f.name
            if f.default is not None:
                assert f.metadata["help"] + f" ({f.default!r})" in help_text, f.name


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid_and_sets_only_known_fields(name):
    """A misspelt field in a preset would be silently ignored, or crash at the user's."""
    args = minigpt.build_parser().parse_args(["--mode", "train", "--preset", name])
    model, train_config = minigpt.fresh_configs(args, torch.device("cpu"))
    config = GPTConfig(**{"vocab_size": 65, **model})
    chosen = {**asdict(config), **asdict(train_config)}
    assert {k: chosen[k] for k in PRESETS[name].settings} == PRESETS[name].settings
    assert train_config.preset == name


def test_defaults_are_those_of_the_reference():
    """The design's reference model: others build on these values."""
    c = GPTConfig(vocab_size=65)
    assert (c.block_size, c.n_layer, c.n_head, c.n_embd, c.dropout) == (256, 6, 6, 384, 0.2)
    t = TrainConfig()
    assert (t.batch_size, t.grad_accum, t.learning_rate) == (64, 4, 3e-4)


@pytest.mark.parametrize("name, millions", [("gpt", "10.7"), ("laptop", "0.8"), ("gpt2", "85.9")])
def test_parameter_count_of_preset(name, millions):
    """With Shakespeare's 65 characters; GPT-2's 124M includes a vocabulary of 50,257."""
    names = {f.name for f in fields(GPTConfig)}
    settings = {k: v for k, v in PRESETS[name].settings.items() if k in names}
    with torch.device("meta"):
        assert f"{GPT(GPTConfig(vocab_size=65, **settings)).num_parameters() / 1e6:.1f}" == millions


def test_flags_override_the_preset_and_the_preset_overrides_the_defaults():
    """Three layers, in this order; a lower peak takes the floor of the schedule with it."""
    def chosen(*argv):
        args = minigpt.build_parser().parse_args(["--mode", "train", *argv])
        return minigpt.fresh_configs(args, torch.device("cpu"))

    model, config = chosen("--preset", "mini", "--n_layer", "3")
    assert model["n_layer"] == 3 and model["n_embd"] == PRESETS["mini"].settings["n_embd"]
    assert config.grad_clip == TrainConfig.grad_clip
    _, config = chosen("--preset", "mini", "--learning_rate", "1e-6")
    assert config.min_lr == 1e-6
    assert chosen()[1].preset == "laptop"  # auto, on a CPU
    assert chosen("--no_bias")[0]["bias"] is False
    assert chosen("--bias")[0]["bias"] is True


# ==================================================================================================
# Text to integers
# ==================================================================================================


def test_characters_come_back_unharmed():
    """decode(encode(text)) == text; ids are 0 .. V-1 in the order of the sorted characters."""
    for text in (SAMPLE.read_text(encoding="utf-8"), "é\u0000\r\n\t🎭z\u2028"):
        tokenizer = CharTokenizer.train(text)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert set(ids) == set(range(tokenizer.vocab_size))
        assert tokenizer.itos == sorted(set(text))
        assert all(tokenizer.stoi[tokenizer.itos[i]] == i for i in ids)
    assert CharTokenizer.train("ab").encode("") == []


def test_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    """Also for characters that JSON or a text file could mangle."""
    tokenizer = CharTokenizer.train("\r\n\t\"\\é🎭\u2028 ")
    tokenizer.save(tmp_path)
    assert CharTokenizer.load(tmp_path).itos == tokenizer.itos
    assert CharTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))).stoi == \
        tokenizer.stoi


def test_unknown_character_is_named():
    """The user must learn which character it was."""
    with pytest.raises(UserError, match=r"'ü' \(U\+00FC\) is not .* 4 characters"):
        CharTokenizer.train("abcd").encode("abüd")


# ---- Byte-pair encoding --------------------------------------------------------------------------


def naive_bpe(text, vocab_size):
    """The oracle: count all pairs anew for every merge; ties go to the older tokens."""
    words = collections.Counter(minigpt.piece_pattern().findall(text))
    words = {tuple(minigpt.BYTES.index(b) for b in w.encode()): n for w, n in words.items()}
    tokens = [bytes([b]) for b in minigpt.BYTES]
    merges = []
    while len(tokens) < vocab_size - 1:
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        if not pairs or max(pairs.values()) < 2:
            break
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((tokens[a], tokens[b]))
        new, merged = len(tokens), {}
        tokens.append(tokens[a] + tokens[b])
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                hit = word[i : i + 2] == (a, b)
                out.append(new if hit else word[i])
                i += 2 if hit else 1
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        words = merged
    return merges


def random_text(rng, n, alphabets=("ab", "abc ", " \n\t'sdt", "aé漢🎭٣Ⅷ\u0301\u00a0\x1c.,")):
    return "".join(rng.choices(rng.choice(alphabets), k=n))


@pytest.mark.parametrize("seed", range(30))
def test_bpe_training_equals_the_naive_trainer(seed):
    """Incremental counts, the heap and lazy updates give exactly the merges of counting anew. Fails
    if a count is missed where merges touch ("aaaa"), or if a tie is broken another way."""
    rng = random.Random(seed)
    text = " ".join(random_text(rng, rng.randrange(1, 30)) for _ in range(rng.randrange(1, 40)))
    vocab_size = 257 + rng.randrange(60)
    assert BPETokenizer.train(text, vocab_size).merges == naive_bpe(text, vocab_size)


def test_bpe_training_on_verse_equals_the_naive_trainer_and_the_book():
    """On real text, and the example of the chapter."""
    text = SAMPLE.read_text(encoding="utf-8")[:20_000]
    assert BPETokenizer.train(text, 400).merges == naive_bpe(text, 400)
    merges = BPETokenizer.train("aaabdaaabac", 999).merges
    assert merges == [(b"a", b"a"), (b"a", b"b"), (b"aa", b"ab")]
    assert [len(BPETokenizer(merges[:n]).encode("aaabdaaabac")) for n in range(4)] == [11, 9, 7, 5]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(SAMPLE.read_text(encoding="utf-8"), 600)


def test_bpe_encodes_by_merge_rank(bpe):
    """Against the definition: again and again, the earliest learned pair that is there, from the
    left. Fails for longest-match, or for an order other than that of learning."""
    ranks = {pair: i for i, pair in enumerate(bpe.merges)}
    rng = random.Random(0)
    words = SAMPLE.read_text(encoding="utf-8").split()[:300]
    words += [random_text(rng, 9) for _ in range(99)]
    for piece in itertools.chain.from_iterable(map(minigpt.piece_pattern().findall, words)):
        parts = [bytes([b]) for b in piece.encode()]
        while True:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda p: ranks.get(p, 1e9), default=None)
            if best not in ranks:
                break
            i = pairs.index(best)
            parts[i : i + 2] = [best[0] + best[1]]
        assert [bpe.tokens[i] for i in bpe.encode(piece)] == parts


def test_bpe_loses_nothing_and_survives_everything(bpe):
    """Every byte, NUL, half characters, no letters at all, one word of 100,000 characters: text in
    UTF-8 comes back, lone surrogates become U+FFFD, and nothing hangs."""
    rng = random.Random(1)
    texts = ["", "\0", "a" * 100_000, "".join(rng.choices("abcdefgh", k=100_000)), " " * 1000,
             "".join(map(chr, range(0xD800))), "🎭" * 1000,
             *(random_text(rng, 50) for _ in range(200))]
    for text in texts:
        assert bpe.decode(bpe.encode(text)) == text
        assert "".join(bpe.stream(bpe.encode(text))) == text
    assert bpe.decode(bpe.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert BPETokenizer.train("x" * 100_000 + " \ud83d", 300).vocab_size > 257
    assert bpe.decode(bpe.encode("é")[:1]) == "\ufffd"
    assert sorted(set(bpe.tokens[:256])) == [bytes([b]) for b in range(256)]
    assert len(set(minigpt.SHOWN)) == 256 and not any(c.isspace() for c in minigpt.SHOWN)


def test_bpe_stream_waits_for_the_last_byte_of_a_character():
    """A character of four bytes comes out whole, with its last token."""
    assert list(BPETokenizer([]).stream(BPETokenizer([]).encode("a🎭"))) == [
        "a", "", "", "", "🎭", ""]


def test_end_of_text_is_one_token_that_no_merge_touches():
    """In the corpus it separates texts; in generation it ends them."""
    tokenizer = BPETokenizer.train("ab<|endoftext|>ab" * 9, 270)
    ids = tokenizer.encode("ab<|endoftext|>ab")
    assert ids == [tokenizer.encode("ab")[0], tokenizer.end, tokenizer.encode("ab")[0]]
    assert tokenizer.end == tokenizer.vocab_size - 1 == len(tokenizer.tokens) - 1
    assert tokenizer.decode(ids) == "ab<|endoftext|>ab"
    assert not any(b"<" in a + b for a, b in tokenizer.merges)


def test_bpe_files_are_gpt2s(bpe, tmp_path):
    """vocab.json and merges.txt, with a space as Ġ; what is loaded is what was saved."""
    bpe.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert vocab["!"] == 0 and vocab["Ġ"] == 220 and vocab["Ċ"] == 198  # as in GPT-2's own file
    assert vocab["<|endoftext|>"] == bpe.end and len(vocab) == bpe.vocab_size
    loaded = BPETokenizer.load(tmp_path)
    copied = BPETokenizer.from_dict(json.loads(json.dumps(bpe.to_dict())))
    text = "Speak, Marigold! é\r\n 12\t<|endoftext|>"
    assert loaded.merges == copied.merges == bpe.merges
    assert loaded.encode(text) == copied.encode(text) == bpe.encode(text)


GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?!\S)|\s+")


def assigned_characters():
    """Every character that this Python's Unicode tables know, but the surrogates."""
    return [c for c in map(chr, range(sys.maxunicode + 1))
            if minigpt.unicodedata.category(c) not in ("Cn", "Cs")]


def test_pieces_are_those_of_the_reference_pattern():
    """GPT-2's own expression, run by the package regex, on every assigned character and on random
    mixtures. Fails for a letter that is a number too (ideographs), or for Python's wider \\s."""
    regex = pytest.importorskip("regex")
    pattern = regex.compile(GPT2_PATTERN)
    ours, characters = minigpt.piece_pattern(), assigned_characters()
    text = "".join(f"a{c}1{c}.{c} {c}\n" for c in characters)
    assert ours.findall(text) == pattern.findall(text)
    text = "".join(f"a{c}1{c}.{c} {c}\n'{c}{d}" for c in characters[:128] for d in characters[:128])
    assert minigpt.piece_pattern(ascii=True).findall(text) == pattern.findall(text)
    rng = random.Random(0)
    for _ in range(2000):
        text = random_text(rng, 30) + "".join(rng.choices(characters, k=9)) + random_text(rng, 5)
        assert ours.findall(text) == pattern.findall(text)


def test_ids_are_those_of_tokenizers_and_tiktoken(bpe, tmp_path):
    """The same merges give the same ids in both libraries, on random Unicode; and the Rust trainer
    learns the same merges from the same text."""
    tokenizers = pytest.importorskip("tokenizers")
    tiktoken = pytest.importorskip("tiktoken")
    bpe.save(tmp_path)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    theirs.pre_tokenizer = byte_level
    open_ai = tiktoken.Encoding(
        "ours", pat_str=GPT2_PATTERN, special_tokens={},
        mergeable_ranks={t: i for i, t in enumerate(bpe.tokens[:-1])})
    rng, characters = random.Random(0), assigned_characters()
    texts = [random_text(rng, 40) + "".join(rng.choices(characters, k=10)) for _ in range(1000)]
    for text in [SAMPLE.read_text(encoding="utf-8"), *texts]:
        assert bpe.encode(text) == theirs.encode(text).ids == open_ai.encode(text)

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = byte_level
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=599, min_frequency=2, show_progress=False,
                                             initial_alphabet=byte_level.alphabet())
    trained.train_from_iterator([SAMPLE.read_text(encoding="utf-8")], trainer)
    learned = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    assert learned == [tuple(line.split(" ")) for line in bpe.to_dict()["merges"]]


def test_merges_that_make_one_token_twice_share_its_id():
    """Our trainer never learns such merges, but a file may hold them: the ids must not shift."""
    a, b, c = b"a", b"b", b"c"
    tokenizer = BPETokenizer([(a, b), (b, c), (a + b, c), (a, b + c), (c, c)])
    assert tokenizer.vocab_size == 256 + 4 + 1
    assert tokenizer.encode("abc") == [258] and tokenizer.encode("cc") == [259]
    assert tokenizer.decode([258, 259, 260]) == "abccc<|endoftext|>"


def text_file(folder, text):
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return minigpt.Text.survey(folder / "text.txt")


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    """A pair that is frequent in the last tenth only is not merged; characters come from all."""
    text = text_file(tmp_path, "ab" * 450 + "xy" * 50)
    merged = [a + b for a, b in minigpt.make_tokenizer("bpe", text, 300).merges]
    assert b"ab" in merged and b"xy" not in merged
    assert minigpt.make_tokenizer("char", text, None).itos == ["a", "b", "x", "y"]


def test_gpt2_vocabulary_comes_from_tiktoken_or_ends_in_one_line(monkeypatch):
    """Where tiktoken and its file are there, its ids; else an error that says what to do."""
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # no test uses the network
    try:
        tokenizer = minigpt.GPT2Tokenizer()
    except UserError as problem:
        assert "--tokenizer gpt2: " in str(problem) and "--tokenizer bpe" in str(problem)
    else:
        assert tokenizer.encode("Hello world<|endoftext|>") == [15496, 995, tokenizer.end]
        assert "".join(tokenizer.stream(tokenizer.encode("né🎭"))) == "né🎭"


@pytest.mark.slow
def test_any_unicode_comes_back_unharmed():
    """Random texts of every kind through both tokenizers, whole and token by token; the fast
    encoder and the plain one agree on each. Only halves of characters (surrogates), which UTF-8
    cannot write, become U+FFFD in BPE."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    learned = BPETokenizer.train(SAMPLE.read_text(encoding="utf-8"), 600)
    words = st.sampled_from(["the ", " 's", "\r\n", "\x1c", "ﬁ", "İ", "\U0001f469\u200d\U0001f467",
                             "\ud800", "\udc67", "<|endoftext|>", "<|endof"])
    anything = st.characters(codec=None)
    texts = st.lists(st.one_of(st.text(anything), words), max_size=8).map("".join)

    @hypothesis.settings(max_examples=400, deadline=None, database=None, derandomize=True)
    @hypothesis.given(texts)
    def law(text):
        char = CharTokenizer.train(text)
        assert char.decode(char.encode(text)) == text == "".join(char.stream(char.encode(text)))
        for bpe in (learned, BPETokenizer.train(text, 300)):
            ids = bpe.encode(text)
            pairs = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            assert bpe.decode(ids) == pairs == "".join(bpe.stream(ids))
            assert all(0 <= i < bpe.vocab_size for i in ids)
            again = BPETokenizer.from_dict(json.loads(json.dumps(bpe.to_dict())))
            assert again.encode(text) == ids

    law()


# ==================================================================================================
# Batches
# ==================================================================================================


def test_targets_are_the_inputs_shifted_by_one():
    """On tokens 0, 1, 2, ... a token's successor is itself plus one. Fails for a shift of two."""
    x, y = get_batch(torch.arange(100), block_size=8, batch_size=64)
    assert x.shape == y.shape == (64, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(8))


def test_every_window_of_the_corpus_can_be_drawn():
    """The first and the last included: an end off by one would lose a token, or crash."""
    x, y = get_batch(torch.arange(12), block_size=8, batch_size=500)
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3}
    assert y.max() == 11
    x, _ = get_batch(torch.arange(9), block_size=8, batch_size=3)
    assert set(x[:, 0].tolist()) == {0}


def test_batches_come_from_their_generator_alone():
    """The same state gives the same batches, and the global random state does not move."""
    before = torch.get_rng_state()
    draws = [get_batch(torch.arange(999), 8, 4, torch.Generator().manual_seed(s))[0] for s in
             (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.get_rng_state())


def test_split_is_by_position_and_loses_nothing(tmp_path):
    """Nine tenths, then the rest. Fails if the parts are swapped or overlap."""
    text = SAMPLE.read_text(encoding="utf-8")
    tokenizer = CharTokenizer.train(text)
    corpus = encode_corpus(minigpt.Text.survey(SAMPLE), tokenizer, 64, tmp_path)
    assert len(corpus.train) == int(0.9 * len(text))
    assert tokenizer.decode(corpus.train[:].tolist() + corpus.val[:].tolist()) == text
    assert corpus.val_characters == len(corpus.val) - 1
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_corpus_must_hold_one_window_in_each_part(tmp_path):
    """100 characters leave 10 for validation: enough for windows of 9 + 1 tokens and no more."""
    text = text_file(tmp_path, "ab" * 50)
    tokenizer = CharTokenizer(text.alphabet)
    assert len(encode_corpus(text, tokenizer, 9, tmp_path).val) == 10
    with pytest.raises(UserError, match="validation part has 10 tokens, and --block_size 10"):
        encode_corpus(text, tokenizer, 10, tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_corpus_read_in_chunks_has_the_tokens_of_the_whole(tmp_path, monkeypatch, size):
    """However it is cut, in chunks and in two parts: no piece of BPE is torn, no character of
    several bytes, no special token. Fails for a cut inside a run of spaces or before any space."""
    rng = random.Random(size)
    raw = "".join(random_text(rng, 40) + "<|endoftext|> a  b\n\n\t é" for _ in range(20))
    raw = raw.replace("\r", "")
    monkeypatch.setattr(minigpt.read_chunks, "__defaults__", (size,))
    text = text_file(tmp_path, raw)
    assert (text.length, text.alphabet) == (len(raw), sorted(set(raw)))
    parts = ["".join(text.chunks(part)) for part in ("train", "val")]
    assert parts == [raw[: int(0.9 * len(raw))], raw[int(0.9 * len(raw)) :]]
    tokenizer = minigpt.make_tokenizer("bpe", text, 300)
    assert tokenizer.merges == BPETokenizer.train(parts[0], 300).merges
    assert len(tokenizer.merges) > 20
    corpus = encode_corpus(text, tokenizer, 4, tmp_path)
    assert [corpus.train[:].tolist(), corpus.val[:].tolist()] == list(map(tokenizer.encode, parts))
    characters = encode_corpus(text, CharTokenizer(text.alphabet), 4, tmp_path)
    assert [len(characters.train), len(characters.val)] == list(map(len, parts))  # and not those
    assert characters.val_characters == len(parts[1]) - 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ru_maxrss")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Batches from all over a file of 64 MB, in a process of its own. Fails if the file is read as
    a whole, or if the pages that were touched stay mapped."""
    script = """
import resource, sys, torch, minigpt
from pathlib import Path
tokens = minigpt.MappedTokens(Path(sys.argv[1]), 65)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
minigpt.get_batch(tokens, 64, 16)
before = peak()
for _ in range(4000):
    minigpt.get_batch(tokens, 64, 4)
print(len(tokens), (peak() - before) * (1 if sys.platform == "darwin" else 1024))
"""
    with open(tmp_path / "t.bin", "wb") as file:
        for _ in range(64):
            file.write(bytes(2**20))
        file.write(bytes(32))  # in place of the checksum
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "t.bin"], cwd=HERE, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    n, grown = map(int, done.stdout.split())
    assert n == 2**26 and grown < 2**24


@pytest.mark.parametrize("vocab_size, width", [(256, 1), (257, 2), (32768, 2), (32769, 4)])
def test_tokens_in_a_file_are_those_that_were_written(tmp_path, vocab_size, width):
    """In as few bytes as the vocabulary allows. Fails for a limit that is off by one."""
    ids = [0, vocab_size - 1, 1, vocab_size - 2]
    tokens = minigpt.MappedTokens(tmp_path / "t.bin", vocab_size)
    tokens.write([ids, ids[:1]])
    assert tokens.path.stat().st_size == 5 * width + 32 and len(tokens) == 5  # and a checksum
    assert tokens[:].tolist() == [*ids, 0] and tokens[torch.tensor([[3, 1]])].tolist() == [
        [vocab_size - 2, vocab_size - 1]]
    x, y = get_batch(tokens, 4, 1)
    assert x.dtype == torch.int64 and y.tolist() == [[*ids[1:], 0]]


# ==================================================================================================
# The parts
# ==================================================================================================


@pytest.mark.parametrize("bias, fused", [(True, False), (False, False), (True, True)])
def test_layernorm_equals_torch_in_value_and_gradient(bias, fused):
    """Fails for a variance over C - 1, a missing eps, a forgotten gain or bias; in both its forms,
    written out and as one kernel."""
    torch.manual_seed(0)
    ours, theirs = LayerNorm(6, bias, fused=fused).double(), nn.LayerNorm(6, bias=bias).double()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        nn.init.normal_(p)
        q.data.copy_(p.data)
    for scale, offset in ((1.0, 0.0), (1e-3, 0.0), (100.0, 1000.0)):
        x = (torch.randn(2, 3, 6, dtype=torch.float64) * scale + offset).requires_grad_()
        z = x.detach().clone().requires_grad_()
        weight = torch.randn(2, 3, 6, dtype=torch.float64)
        assert_close(ours(x), theirs(z))
        (ours(x) * weight).sum().backward()
        (theirs(z) * weight).sum().backward()
        assert_close(x.grad, z.grad)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(p.grad, q.grad, 1e-9)
            p.grad = q.grad = None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("T", [1, 2, 8])
def test_attention_explicit_equals_fused_equals_torch_multihead(bias, T):
    """Three implementations, one function, in value and in every gradient. Fails for a missing
    1/sqrt(hs), a mask off by one, heads split along the wrong axis, q and k exchanged."""
    torch.manual_seed(0)
    config = small_config(n_embd=12, n_head=3, bias=bias)
    ours = CausalSelfAttention(config).double()
    reference = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True).double()
    reference.in_proj_weight.data.copy_(ours.c_attn.weight)
    reference.out_proj.weight.data.copy_(ours.c_proj.weight)
    if bias:
        reference.in_proj_bias.data.copy_(ours.c_attn.bias)
        reference.out_proj.bias.data.copy_(ours.c_proj.bias)
    x = torch.randn(2, T, 12, dtype=torch.float64)
    weight = torch.randn(2, T, 12, dtype=torch.float64)
    results = []
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for explicit in (True, False, None):
        z = x.clone().requires_grad_()
        if explicit is None:
            module, y = reference, reference(z, z, z, attn_mask=future, need_weights=False)[0]
            first, last = reference.in_proj_weight, reference.out_proj.weight
        else:
            ours.explicit = explicit
            ours.zero_grad()
            module, y = ours, ours(z)
            first, last = ours.c_attn.weight, ours.c_proj.weight
        (y * weight).sum().backward()
        results.append([t.clone() for t in (y, z.grad, first.grad, last.grad)])
        assert all(p.grad is not None for p in module.parameters())
    for a, b, c in zip(*results):
        assert_close(a, c)
        assert_close(b, c)


@pytest.mark.parametrize("attention", ["explicit", "fused"])
def test_the_future_cannot_be_seen_by_perturbation(attention):
    """Changing token t changes the logits at t and later, and nothing before. Fails for a mask off
    by one in either direction: one too far lets t be seen early, one too short hides it from t."""
    model = small_model(attention=attention)
    idx = random_ids(1, 8)
    before = model(idx)[0]
    for t in range(8):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        moved = (model(changed)[0] - before).abs().amax(dim=(0, 2))
        assert torch.all(moved[:t] == 0)
        assert torch.all(moved[t:] > 1e-6)


@pytest.mark.parametrize("attention", ["explicit", "fused"])
def test_the_future_cannot_be_seen_by_gradient(attention):
    """d output[t] / d input[s] is zero exactly for s > t: training cannot use the future either."""
    torch.manual_seed(0)
    layer = CausalSelfAttention(small_config(attention=attention)).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    for t in range(6):
        (gradient,) = torch.autograd.grad(layer(x)[0, t].sum(), x)
        seen = gradient.abs().sum(dim=-1)[0] > 1e-12
        assert seen.tolist() == [s <= t for s in range(6)]


@pytest.mark.parametrize("attention", ["explicit", "fused"])
def test_attention_drops_weights_in_training_only(attention):
    """Dropout acts on the attention weights in both implementations, and never in evaluation."""
    torch.manual_seed(0)
    layer = CausalSelfAttention(small_config(attention=attention, dropout=0.5)).double()
    layer.resid_dropout.p = 0.0  # leaves only the dropout on the weights
    x = torch.randn(1, 8, 8, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_mlp_is_its_equation():
    """GELU in the tanh form, four times as wide inside. Fails for the erf form or a plain ReLU."""
    torch.manual_seed(0)
    mlp = MLP(small_config()).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64) * 3
    h = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    assert h.shape[-1] == 4 * 8
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    assert_close(mlp(x), h @ mlp.c_proj.weight.T + mlp.c_proj.bias)


def test_positions_tell_equal_tokens_apart():
    """The same token everywhere: without position vectors all outputs would be the same."""
    model = small_model()
    logits = model(torch.zeros(1, 8, dtype=torch.long))[0][0]
    assert (logits[0] - logits[1:]).abs().amax(dim=-1).min() > 1e-3
    nn.init.zeros_(model.wpe.weight)
    logits = model(torch.zeros(1, 8, dtype=torch.long))[0][0]
    assert_close(logits, logits[:1].expand_as(logits))


# ---- Variations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [True, False])
def test_rmsnorm_equals_torch_in_value_and_gradient(scale):
    """Fails for a forgotten mean (a sum), a missing eps or gain, or a mean subtracted."""
    torch.manual_seed(0)
    ours = minigpt.RMSNorm(6, scale).double()
    theirs = nn.RMSNorm(6, eps=ours.eps, elementwise_affine=scale).double()
    if scale:
        nn.init.normal_(ours.weight)
        theirs.weight.data.copy_(ours.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    assert_close(ours(x), theirs(z), 1e-6)  # the mean of squares is taken in float32
    (ours(x) ** 3).sum().backward()
    (theirs(z) ** 3).sum().backward()
    assert_close(x.grad, z.grad, 1e-5)
    if scale:
        assert_close(ours.weight.grad, theirs.weight.grad, 1e-5)
    assert_close(minigpt.RMSNorm(2)(torch.tensor([3.0, 4.0])), torch.tensor([0.8485, 1.1314]), 1e-4)


def test_the_norm_that_is_asked_for_is_the_norm_that_is_built():
    """Everywhere in the model, with and without gain and bias."""
    kinds = {"layernorm": LayerNorm, "rmsnorm": minigpt.RMSNorm, "none": nn.Identity}
    for norm, kind in kinds.items():
        model = GPT(small_config(norm=norm))
        for built in (model.h[0].ln_1, model.h[1].ln_2, model.ln_f):
            assert type(built) is kind
    assert not list(GPT(small_config(norm="rmsnorm", norm_scale=False)).ln_f.parameters())
    assert [n for n, _ in GPT(small_config(norm_scale=False)).ln_f.named_parameters()] == ["bias"]
    assert [n for n, _ in GPT(small_config(bias=False)).ln_f.named_parameters()] == ["weight"]
    for attention in ("fused", "explicit"):
        assert GPT(small_config(attention=attention)).ln_f.fused == (attention == "fused")


def test_rope_scores_depend_only_on_distance():
    """q at t and k at s: the same score wherever t - s is the same; and lengths are kept. Fails if
    queries and keys turn by different angles, or if v, not k, is turned."""
    torch.manual_seed(0)
    rotate = minigpt.Rotary(50, 8).double()
    rotate.cos, rotate.sin = (f(minigpt.angles(50, 8).double()) for f in (torch.cos, torch.sin))
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned_q, turned_k = (rotate(v.expand(1, 50, 1, 8))[0, :, 0] for v in (q, k))
    assert torch.equal(rotate(q.expand(1, 5, 1, 8), start=7)[0, :, 0], turned_q[7:12])
    scores = turned_q @ turned_k.T  # (50, 50)
    for distance in range(-49, 50):
        diagonal = scores.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), 1e-5)
    assert_close(turned_q.norm(dim=-1), q.norm().expand(50), 1e-6)
    assert (scores[0] - scores[0, 0]).abs()[1:].min() > 1e-4  # and it does depend on distance
    turn = minigpt.Rotary(20, 2)
    one = turn(torch.tensor([1.0, 0.0]).expand(1, 20, 1, 2))[0, :, 0]
    assert round((one[2] @ one[1]).item(), 2) == round((one[12] @ one[11]).item(), 2) == 0.54


def test_rope_turns_queries_and_keys_and_nothing_else():
    """The first position is not turned at all, and a value passes as it is: with one key only, the
    output does not depend on rotation. Fails if v is rotated or if places start at 1."""
    torch.manual_seed(0)
    layer = CausalSelfAttention(small_config(pos="rope", n_head=1, attention="explicit")).double()
    x = torch.randn(1, 8, 8, dtype=torch.float64)
    q, k, v = (t.view(1, 8, 1, 8) for t in layer.c_attn(x).split(8, dim=2))
    turned = layer.rotate(q), layer.rotate(k), v
    expected = layer.c_proj(layer.attend(*(t.transpose(1, 2) for t in turned))[:, 0])
    assert_close(layer(x), expected, 1e-6)
    assert_close(turned[0][:, 0], q[:, 0], 1e-6)
    assert (turned[0][:, 1] - q[:, 1]).abs().max() > 1e-2


def test_sinusoids_shift_by_a_rotation():
    """Moving by s places turns each (sine, cosine) pair by s w_i, whatever the place: one matrix
    serves all places. Fails for frequencies that do not match, or for a table that is learned."""
    table = minigpt.sinusoids(40, 12).double() * math.sqrt(12)
    w = 10000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    for s in (1, 7):
        sin, cos = table[:, 0::2], table[:, 1::2]
        c, n = torch.cos(s * w), torch.sin(s * w)
        assert_close(table[s:, 0::2], (sin * c + cos * n)[:-s], 1e-5)
        assert_close(table[s:, 1::2], (cos * c - sin * n)[:-s], 1e-5)
    model = GPT(small_config(pos="sinusoidal"))
    assert not model.wpe.weight.requires_grad
    assert torch.equal(model.wpe.weight, minigpt.sinusoids(8, 8))
    held = [p for g in make_optimizer(model, TrainConfig(), CPU.device).param_groups
            for p in g["params"]]
    assert not any(p is model.wpe.weight for p in held)
    learned = GPT(small_config()).num_parameters()
    assert model.num_parameters() == GPT(small_config(pos="rope")).num_parameters() == learned - 64


@pytest.mark.parametrize("activation, bend", [
    ("relu", lambda h: h.clamp(min=0)), ("relu2", lambda h: h.clamp(min=0) ** 2),
    ("swiglu", lambda h: h[..., :10] * torch.sigmoid(h[..., :10]) * h[..., 10:]),
])
def test_activations_are_their_equations(activation, bend):
    """Fails for exchanged halves in SwiGLU, or a missing square."""
    torch.manual_seed(0)
    mlp = MLP(small_config(activation=activation, mlp_ratio=2.0)).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64) * 3
    h = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    assert h.shape[-1] == (20 if activation == "swiglu" else 16)
    assert_close(mlp(x), bend(h) @ mlp.c_proj.weight.T + mlp.c_proj.bias)


def test_swiglu_has_as_many_weights_as_the_others():
    """Two thirds of the width, three matrices in place of two."""
    count = {a: sum(p.numel() for p in MLP(GPTConfig(65, n_embd=96, bias=False, activation=a,
                                                     n_head=2)).parameters())
             for a in ("gelu", "swiglu")}
    assert count["gelu"] == count["swiglu"] == 8 * 96 * 96


def test_post_norm_output_is_normalized():
    """Mean 0, variance 1 for each token, and no ln_f after the last block."""
    torch.manual_seed(0)
    block = Block(small_config(norm_position="post")).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = block(x)
    assert y.mean(dim=-1).abs().max() < 1e-10
    assert_close(y.var(dim=-1, correction=0), torch.ones(2, 5, dtype=torch.float64), 1e-3)
    middle = F.layer_norm(x + block.attn(x), (8,))
    assert_close(y, F.layer_norm(middle + block.mlp(middle), (8,)))
    assert "ln_f.weight" not in GPT(small_config(norm_position="post")).state_dict()


def test_qk_norm_makes_scores_blind_to_the_size_of_the_input():
    """Ten times the queries and keys, the same attention."""
    torch.manual_seed(0)
    layer = CausalSelfAttention(small_config(qk_norm=True, bias=False)).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    before = layer(x)
    layer.c_attn.weight.data[:16] *= 10  # the rows that make q and k
    assert_close(layer(x), before, 1e-4)
    plain = CausalSelfAttention(small_config(bias=False)).double()
    before = plain(x)
    plain.c_attn.weight.data[:16] *= 10
    assert (plain(x) - before).abs().max() > 1e-2


def test_untied_head_is_a_matrix_of_its_own():
    tied, untied = GPT(small_config()), GPT(small_config(tie_weights=False))
    assert untied.lm_head.weight is not untied.wte.weight
    assert untied.num_parameters() == tied.num_parameters() + 11 * 8
    assert list(untied.state_dict()) == list(tied.state_dict())


VARIANTS = [dict(zip(("norm", "norm_position", "pos", "activation", "qk_norm", "bias"), values))
            for values in itertools.product(
                ("layernorm", "rmsnorm", "none"), ("pre", "post"),
                ("learned", "sinusoidal", "rope"), ("gelu", "relu", "relu2", "swiglu"),
                (False, True), (True, False))
            if values[:2] != ("none", "post")]


def test_the_future_cannot_be_seen_in_any_combination():
    """All of them, with both kinds of attention: changing the last token leaves all but the last
    output as they were, and each variation has a working gradient."""
    idx = random_ids(1, 8)
    changed = idx.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    for i, variant in enumerate(VARIANTS):
        model = small_model(attention=("explicit", "fused")[i % 2], **variant)
        logits, loss = model(idx, idx)
        loss.backward()
        moved = (model(changed)[0] - logits).abs().amax(dim=(0, 2))
        assert torch.all(moved[:5] == 0) and moved[5] > 0, variant
        assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters()
                   if p.requires_grad and "c_attn.bias" not in n), variant
    assert len(VARIANTS) == 240


@pytest.mark.parametrize("changes, why", [
    (dict(pos="rope", n_embd=6, n_head=2), "even head size"),
    (dict(pos="sinusoidal", n_embd=9, n_head=3), "even --n_embd"),
    (dict(norm="none", norm_position="post"), "means nothing"),
    (dict(mlp_ratio=0.01), "fewer than 2 channels"),
])
def test_combinations_that_make_no_sense_are_refused_with_the_reason(changes, why):
    with pytest.raises(UserError, match=why):
        small_config(**changes)


# ==================================================================================================
# The model
# ==================================================================================================


def test_block_is_pre_norm_with_residuals():
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)); a block whose parts are silent passes x on."""
    torch.manual_seed(0)
    block = Block(small_config()).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    middle = x + block.attn(F.layer_norm(x, (8,)))
    assert_close(block(x), middle + block.mlp(F.layer_norm(middle, (8,))))
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    assert torch.equal(block(x), x)


def test_forward_is_tables_blocks_norm_and_head():
    """Fails if the final norm, the position table or the order of the blocks is lost."""
    model = small_model()
    idx = random_ids(2, 6)
    x = model.wte.weight[idx] + model.wpe.weight[:6]
    for i in range(2):
        x = model.h[i](x)
    x = F.layer_norm(x, (8,), model.ln_f.weight, model.ln_f.bias)
    assert_close(model(idx)[0], x @ model.wte.weight.T)


@pytest.mark.parametrize("place", ["drop", "h.0.attn.resid_dropout", "h.0.mlp.dropout"])
def test_every_dropout_acts_in_training_and_rests_in_evaluation(place):
    """Each by itself, the others switched off. (That on the attention weights: see above.)"""
    model = small_model(dropout=0.0)
    model.get_submodule(place).p = 0.5
    idx = random_ids(1, 8)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_state_dict_has_the_names_of_gpt2():
    """Other tools find the weights by these names."""
    block = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
             "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias",
             "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"]
    expected = ["wte.weight", "wpe.weight"] + [f"h.{i}.{k}" for i in range(2) for k in block] + \
        ["ln_f.weight", "ln_f.bias", "lm_head.weight"]
    assert list(GPT(small_config()).state_dict()) == expected
    assert not any("bias" in k for k in GPT(small_config(bias=False)).state_dict())


@pytest.mark.parametrize("name", ["gpt", "laptop", "bigram"])
def test_initial_loss_is_that_of_knowing_nothing(name):
    """Near ln V. Fails for weights drawn too large, or logits that start out opinionated."""
    names = {f.name for f in fields(GPTConfig)}
    settings = {k: v for k, v in PRESETS[name].settings.items() if k in names}
    torch.manual_seed(0)
    model = minigpt.build_model(GPTConfig(vocab_size=65, **settings)).eval()
    idx = random_ids(2, 65, vocab_size=65)[:, : model.config.block_size + 1]
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert abs(loss - math.log(65)) < 0.15


def test_initialization_is_gpt2s():
    """0.02 everywhere, the projections onto the residual stream smaller by sqrt(2 n_layer)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, n_layer=8, n_embd=192))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name
            assert abs(p.mean().item()) < expected / 10, name
        else:
            assert torch.all(p == (0.0 if name.endswith("bias") else 1.0)), name


def test_head_and_token_table_are_one_matrix():
    """Tied before and after a step, counted once, and gradients from both uses add up."""
    model = small_model()
    assert model.lm_head.weight is model.wte.weight
    total = sum(p.numel() for p in set(model.state_dict(keep_vars=True).values()))
    assert model.num_parameters() == total
    c = TrainConfig(batch_size=2, grad_accum=1, learning_rate=0.1)
    x = random_ids(2, 9)
    before = model.wte.weight.detach().clone()
    train_step(model, make_optimizer(model, c, CPU.device), lambda: (x[:, :-1], x[:, 1:]), c, CPU)
    assert model.lm_head.weight is model.wte.weight
    assert not torch.equal(before, model.wte.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_count_formula(bias):
    """12 C^2 a layer and the two tables, as the chapter says, plus the vectors."""
    V, T, L, C = 65, 32, 3, 24
    config = GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=2, n_embd=C, bias=bias)
    vectors = (2 * L + 1) * C + ((2 * L + 1) * C + 9 * L * C if bias else 0)
    assert GPT(config).num_parameters() == 12 * L * C * C + V * C + T * C + vectors


def test_loss_is_the_mean_negative_log_probability():
    """By hand, in float64. Fails for a sum, a base-2 logarithm, or targets out of line."""
    model = small_model()
    idx = random_ids(3, 9)
    x, y = idx[:, :-1], idx[:, 1:]
    logits, loss = model(x, y)
    p = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    by_hand = -sum(p[b, t, y[b, t]].log() for b in range(3) for t in range(8)) / 24
    assert abs(loss.item() - by_hand.item()) < 1e-6  # the loss itself is computed in float32
    assert model(x)[1] is None and logits.shape == (3, 8, 11)


def test_too_long_an_input_is_refused():
    """There are no position vectors beyond block_size."""
    with pytest.raises(ValueError, match="9 tokens given, but block_size is 8"):
        small_model()(random_ids(1, 9))


def test_one_batch_can_be_memorized():
    """The first check of any training code: with dropout off, the loss on one batch goes to zero.
    Targets of pure noise cannot be predicted, only memorized, so every part has to work."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=32, dropout=0.0))
    c = TrainConfig(batch_size=4, grad_accum=1, learning_rate=1e-2, min_lr=1e-3, weight_decay=0.0)
    optimizer = make_optimizer(model, c, CPU.device)
    idx = random_ids(4, 9)
    idx[:, 0] = torch.arange(4)  # nothing could tell apart the successors of a shared beginning
    for _ in range(150):
        loss, _ = train_step(model, optimizer, lambda: (idx[:, :-1], idx[:, 1:]), c, CPU)
    assert loss.item() < 0.02


def test_bigram_learns_the_frequencies_of_pairs():
    """Its optimum is known: row i tends to the frequencies of what follows i in the data, and the
    loss to the conditional entropy."""
    text = "abracadabra abracadabra"
    tokenizer = CharTokenizer.train(text)
    ids = torch.tensor(tokenizer.encode(text))
    V = tokenizer.vocab_size
    counts = torch.zeros(V, V)
    for a, b in itertools.pairwise(ids.tolist()):
        counts[a, b] += 1
    frequencies = counts / counts.sum(dim=1, keepdim=True)
    entropy = -(counts[counts > 0] * frequencies[counts > 0].log()).sum() / counts.sum()
    model = minigpt.build_model(GPTConfig(vocab_size=V, block_size=len(ids) - 1, model="bigram"))
    c = TrainConfig(batch_size=1, grad_accum=1, learning_rate=0.3, min_lr=0.1, weight_decay=0.0)
    optimizer = make_optimizer(model, c, CPU.device)
    for _ in range(200):
        loss, _ = train_step(model, optimizer, lambda: (ids[None, :-1], ids[None, 1:]), c, CPU)
    assert abs(loss.item() - entropy.item()) < 0.01
    assert_close(torch.softmax(model.wte.weight, dim=-1), frequencies, 0.02)


# ==================================================================================================
# Learning
# ==================================================================================================


def test_optimizer_decays_matrices_only_and_holds_every_parameter_once():
    """Fails if biases or norm gains are decayed, or if the tied matrix is updated twice."""
    model = GPT(small_config())
    decayed, spared = make_optimizer(model, TrainConfig(), CPU.device).param_groups
    assert decayed["weight_decay"] == TrainConfig.weight_decay and spared["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in spared["params"])
    held = [id(p) for p in decayed["params"] + spared["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters()})
    assert decayed["betas"] == (TrainConfig.beta1, TrainConfig.beta2)


def test_adamw_is_the_equation_in_the_text():
    """Three steps by hand, with the bias correction and the decoupled decay."""
    torch.manual_seed(0)
    c = TrainConfig(learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9)
    layer = nn.Linear(3, 2, bias=False).double()
    w, m, v = layer.weight.detach().clone(), 0.0, 0.0
    optimizer = make_optimizer(layer, c, CPU.device)
    for t in (1, 2, 3):
        g = torch.randn(2, 3, dtype=torch.float64)
        layer.weight.grad = g.clone()
        optimizer.step()
        m, v = c.beta1 * m + (1 - c.beta1) * g, c.beta2 * v + (1 - c.beta2) * g * g
        m_hat, v_hat = m / (1 - c.beta1**t), v / (1 - c.beta2**t)
        w = w - c.learning_rate * (m_hat / (v_hat.sqrt() + 1e-8) + c.weight_decay * w)
        assert_close(layer.weight.detach(), w)


def test_orthogonalize_levels_the_singular_values_and_keeps_the_vectors():
    """Of tall and wide matrices in a stack: U and V as they were, S near 1. Fails for a wrong
    constant, a missing round or division, or if X X^T is taken where X^T X is meant."""
    torch.manual_seed(0)
    for shape in ((2, 6, 20), (2, 20, 6), (2, 8, 8)):
        U, _, V = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        S = torch.logspace(-2.4, 0, U.shape[-1], dtype=torch.float64)
        G = U @ torch.diag(S) @ V * torch.tensor([1e-3, 50.0], dtype=torch.float64)[:, None, None]
        core = U.mT @ minigpt.orthogonalize(G) @ V.mT
        levelled = core.diagonal(dim1=1, dim2=2)
        assert 0.67 < levelled.min() and levelled.max() < 1.21
        assert_close(core, torch.diag_embed(levelled))


def test_muon_is_torchs_but_for_the_parts_of_c_attn():
    """Three steps beside torch.optim.Muon with the same settings, on matrices of equal and of other
    shapes; the q, k and v rows of c_attn are matrices of their own. Fails for a wrong factor or
    momentum, for a decay that is not decoupled, or if stacked matrices change places."""
    torch.manual_seed(0)
    c = TrainConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.5, dtype="bfloat16")
    model = GPT(small_config(bias=False, n_embd=16))
    for p in model.parameters():
        p.data.mul_(50)  # large enough for the decay to matter
    peers = []
    for name, p in model.named_parameters():
        if name.startswith("h.") and p.dim() == 2:
            parts = p.detach().clone().split(16) if "c_attn" in name else [p.detach().clone()]
            peers.append((p, [nn.Parameter(part) for part in parts]))
    assert len(peers) == 8
    theirs = torch.optim.Muon([part for _, parts in peers for part in parts], lr=0.1, momentum=0.95,
                              weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    ours = make_optimizer(model, c, CPU.device)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for p, parts in peers:
            for part, gradient in zip(parts, p.grad.split(16) if len(parts) == 3 else [p.grad]):
                part.grad = gradient.clone()
        ours.step()
        theirs.step()
        for p, parts in peers:
            assert_close(p.detach(), torch.cat(parts).detach(), 0.02)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    """Each weight in one of them, at the one learning rate; embeddings and gains in AdamW."""
    model, c = GPT(small_config()), TrainConfig(optimizer="muon", learning_rate=0.25)
    muon, adamw = make_optimizer(model, c, CPU.device).optimizers
    held = [p for g in muon.param_groups for p in g["params"]]
    assert [(g["parts"], g["lr"]) for g in muon.param_groups] == [(3, 0.25), (1, 0.25)]
    assert {id(p) for p in held} == {id(p) for n, p in model.named_parameters()
                                     if n.startswith("h.") and p.dim() == 2}
    held += [p for g in adamw.param_groups for p in g["params"]]
    assert len(held) == len(list(model.parameters())) == len({id(p) for p in held})
    before, ids = [p.detach().clone() for p in model.parameters()], random_ids(2, 8)
    train_step(model, make_optimizer(model, c, CPU.device), lambda: (ids, ids), c, CPU)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())
    optimizer = make_optimizer(minigpt.Bigram(small_config()), c, CPU.device)
    assert isinstance(optimizer, torch.optim.AdamW)  # there are no blocks


def test_schedule_at_named_points():
    """First step, peak, middle, floor, beyond. Fails for a warm-up off by one."""
    c = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=4, max_steps=24)
    assert [get_lr(s, c) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert get_lr(14, c) == pytest.approx(0.6)  # half-way between peak and floor
    assert get_lr(9, c) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert get_lr(24, c) == get_lr(1000, c) == 0.2
    rates = [get_lr(s, c) for s in range(4, 25)]
    assert all(a > b for a, b in itertools.pairwise(rates))
    line = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=4, max_steps=24,
                       schedule="linear")
    assert [get_lr(s, line) for s in (0, 4, 9, 24)] == pytest.approx([0.2, 1.0, 0.8, 0.2])
    no_warmup = TrainConfig(learning_rate=1.0, min_lr=0.0, warmup_steps=0, max_steps=10)
    assert get_lr(0, no_warmup) == 1.0
    only_warmup = TrainConfig(learning_rate=1.0, min_lr=0.0, warmup_steps=10, max_steps=5)
    assert get_lr(4, only_warmup) == pytest.approx(5 / 11)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clipping_equals_torch_and_keeps_the_direction(max_norm):
    """One norm over all tensors; small gradients and max_norm 0 leave everything as it is."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 5)]
    theirs = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 5)]
    for p, q in zip(ours, theirs):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    norm = clip_gradients(ours, max_norm)
    assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm or math.inf))
    for p, q in zip(ours, theirs):
        assert_close(p.grad, q.grad)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_accumulated_micro_batches_equal_the_large_batch(clip):
    """Same loss, same norm, same weights after two steps, to rounding in float64. Fails if the loss
    is not divided by grad_accum, or if gradients are clipped or cleared between micro-steps."""
    idx = random_ids(2, 12, 9)
    results = []
    for accum in (1, 3, 12):
        model = small_model()
        c = TrainConfig(batch_size=12 // accum, grad_accum=accum, learning_rate=0.01,
                        grad_clip=clip)
        optimizer = make_optimizer(model, c, CPU.device)
        logged = []
        for step in range(2):
            parts = iter(idx[step].split(c.batch_size))

            def next_batch(parts=parts):
                part = next(parts)
                return part[:, :-1], part[:, 1:]

            logged.append(train_step(model, optimizer, next_batch, c, CPU))
        results.append((logged, list(model.parameters())))
    (logged, weights), *others = results
    for other_logged, other_weights in others:
        for a, b in zip(itertools.chain(*logged), itertools.chain(*other_logged)):
            assert_close(a.double(), b.double(), 1e-6)  # losses are float32 by design
        for a, b in zip(weights, other_weights, strict=True):
            assert_close(a, b, 2e-5)


def test_a_step_descends():
    """A small step along the gradient lowers the loss. Fails for a sign or a lost gradient."""
    model = small_model()
    c = TrainConfig(batch_size=2, grad_accum=1, learning_rate=1e-3, weight_decay=0.0)
    idx = random_ids(2, 9)
    batch = idx[:, :-1], idx[:, 1:]
    before = model(*batch)[1].item()
    train_step(model, make_optimizer(model, c, CPU.device), lambda: batch, c, CPU)
    assert model(*batch)[1].item() < before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_mixed_precision_is_nearly_float32(dtype, tolerance):
    """Loss and gradient norm agree to the precision of the format: the scaler's factor must have
    been taken out of the gradients before they are clipped."""
    idx = random_ids(4, 9)
    results = []
    for engine in (CPU, Engine(torch.device("cpu"), dtype)):
        model = small_model().float()
        c = TrainConfig(batch_size=4, grad_accum=2, grad_clip=1.0)
        optimizer = make_optimizer(model, c, engine.device)
        loss, norm = train_step(model, optimizer, lambda: (idx[:, :-1], idx[:, 1:]), c, engine)
        results.append((loss.item(), norm.item()))
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
        assert engine.scaler.is_enabled() == (engine.dtype == torch.float16)
    assert results[0] == pytest.approx(results[1], rel=tolerance)
    assert results[0] != results[1]  # the narrow format was really used


def small_corpus(n=200):
    ids = random_ids(n)
    return minigpt.Corpus(ids[: n - 50], ids[n - 50 :], val_characters=49, sha256="")


def test_estimating_the_loss_leaves_no_trace():
    """Dropout is off, the global random state stays where it was, the model goes on training, and
    two estimates of the same weights are the same number."""
    model = small_model(dropout=0.5)
    model.train()
    c = TrainConfig(batch_size=3, eval_batches=4)
    before = torch.get_rng_state()
    first, second = (estimate_loss(model, small_corpus(), c, CPU) for _ in range(2))
    assert first == second and set(first) == {"train", "val"}
    with minigpt.evaluating(model):
        assert not torch.is_grad_enabled() and not model.training
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    model.eval()
    for name, tokens in (("train", small_corpus().train), ("val", small_corpus().val)):
        generator = torch.Generator().manual_seed(0)
        losses = [model(*get_batch(tokens, 8, 3, generator))[1].item() for _ in range(4)]
        assert first[name] == pytest.approx(sum(losses) / 4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("n", [2, 8, 9, 10, 17, 50])
def test_evaluation_counts_every_token_once(n):
    """Token by token with its own window, in float64. Fails if the rest is dropped, if windows
    overlap, or if a mean of batch means gives a short last batch too much weight."""
    model = small_model(dropout=0.5)
    tokens = random_ids(n)
    total = 0.0
    model.eval()
    for t in range(1, n):
        start = (t - 1) // 8 * 8
        logits = model(tokens[None, start:t])[0][0, -1]
        total -= torch.log_softmax(logits, dim=-1)[tokens[t]].item()
    model.train()
    for batch_size in (1, 4, 64):
        assert evaluate(model, tokens, batch_size=batch_size) == pytest.approx(
            total / (n - 1), abs=1e-6)
    assert model.training


# ==================================================================================================
# Checkpoints
# ==================================================================================================


def test_checkpoint_is_tensors_and_plain_values(tmp_path):
    """So it loads with weights_only=True and comes back equal."""
    model = small_model()
    state = {"format": minigpt.CHECKPOINT_FORMAT, "model": model.state_dict(), "step": 3,
             "best": math.inf, "names": ["é", "\n"]}
    save_checkpoint(tmp_path / "a.pt", state)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert {k: v for k, v in loaded.items() if k != "model"} == \
        {k: v for k, v in state.items() if k != "model"}
    assert all(torch.equal(loaded["model"][k], v) for k, v in model.state_dict().items())
    assert os.listdir(tmp_path) == ["a.pt"]


def test_truncated_or_foreign_checkpoint_is_refused(tmp_path):
    """Cut short at any length: an error that names the file, never a crash or a half-read model."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"format": minigpt.CHECKPOINT_FORMAT, "w": torch.randn(100)})
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 23), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="a.pt"):
            load_checkpoint(path)
    for foreign in (b"not a checkpoint", b"\x80\x04.", pickle.dumps({"format": "x"}),
                    b"PK\x03\x04", b"\0" * 1000):
        path.write_bytes(foreign)
        with pytest.raises(UserError, match="a.pt"):
            load_checkpoint(path)
    torch.save({"format": minigpt.CHECKPOINT_FORMAT}, path)  # without a checksum
    with pytest.raises(UserError, match="checksum"):
        load_checkpoint(path)
    for other in ({"format": "other"}, [1, 2], {}):
        torch.save(other, path)
        with pytest.raises(UserError, match="not a checkpoint"):
            load_checkpoint(path)


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    """Every byte of the file in turn: the checksum covers all, the tensors above all, in which a
    flip would go unnoticed. And the file is one that PyTorch reads as it is."""
    path, state = tmp_path / "a.pt", {"format": minigpt.CHECKPOINT_FORMAT, "w": torch.randn(50)}
    save_checkpoint(path, state)
    assert torch.equal(torch.load(path, weights_only=True)["w"], state["w"])
    assert_same(load_checkpoint(path), state)
    whole = path.read_bytes()
    for i in range(len(whole)):
        assert not minigpt.sealed(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    with pytest.raises(UserError, match="a.pt"):
        load_checkpoint(path)


@pytest.mark.slow
def test_a_damaged_latest_checkpoint_is_replaced_by_the_one_before(tmp_path):
    """Named, and the run that goes on from there is the run it would have been; a checkpoint that
    was asked for by name is not replaced by another."""
    train_tiny(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    latest, previous = tmp_path / "b" / "latest.pt", tmp_path / "b" / minigpt.PREVIOUS
    assert load_checkpoint(previous)["progress"]["step"] == 3
    whole = latest.read_bytes()
    for damaged in (whole[:-1000], whole[:5000] + b"?" + whole[5001:], None):
        latest.unlink(missing_ok=True)
        if damaged:
            latest.write_bytes(damaged)
        code, _, err = run_main("--mode", "train", "--resume", "--out_dir", tmp_path / "b")
        assert code == 0 and "latest.pt: " in err and minigpt.PREVIOUS in err, err
        assert "at step 3" in err
        assert_same_weights(tmp_path / "a" / "latest.pt", latest)
        assert load_checkpoint(previous)["progress"]["step"] == 3  # not the damaged one
        if damaged:
            assert (tmp_path / "b" / "latest_damaged.pt").read_bytes() == damaged
        shutil.copy(tmp_path / "a" / minigpt.PREVIOUS, previous)
    latest.write_bytes(whole[:-1])
    code, _, err = run_main("--mode", "train", "--resume", "--checkpoint", latest, "--out_dir",
                            tmp_path / "b")
    assert code == 2 and err.count("\n") == 1
    previous.unlink()
    assert run_main("--mode", "train", "--resume", "--out_dir", tmp_path / "b")[0] == 2


def test_malicious_checkpoint_runs_nothing(tmp_path):
    """A pickle may hold calls; weights_only=True refuses to make them."""
    marker = tmp_path / "was_here"

    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    path = tmp_path / "bad.pt"
    for write in (lambda: torch.save({"format": Malice()}, path),
                  lambda: path.write_bytes(pickle.dumps(Malice()))):
        write()
        with pytest.raises(UserError, match="bad.pt"):
            load_checkpoint(path)
        assert not marker.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_failed_write_leaves_the_old_checkpoint(tmp_path):
    """A disk that refuses more bytes (here: a limit on the size of a file) costs the new file and
    nothing else. Fails if the checkpoint is written in place, or if the partial file stays."""
    import resource

    path = tmp_path / "a.pt"
    save_checkpoint(path, {"format": minigpt.CHECKPOINT_FORMAT, "step": 1})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write a.pt"):
            save_checkpoint(path, {"w": torch.randn(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.pt"]


# ==================================================================================================
# The training loop, through the real entry point
# ==================================================================================================

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(tmp_path, name):
    """One real step of each, smaller where the size is beyond a test, and text from the result."""
    small = {"gpt": ["--n_layer", "1", "--batch_size", "1", "--grad_accum", "2"],
             "gpt2": ["--n_layer", "1", "--batch_size", "1", "--grad_accum", "2", "--block_size",
                      "64", "--n_embd", "96"]}
    code, _, err = run_main(
        "--mode", "train", "--preset", name, "--data", SAMPLE, "--out_dir", tmp_path, "--max_steps",
        "1", "--eval_batches", "1", "--sample_tokens", "3", "--batch_size", "2",
        *small.get(name, []))
    assert code == 0 and f"preset {name} (as asked)" in err, err
    code, out, err = run_main("--mode", "generate", "--out_dir", tmp_path, "--max_tokens", "5",
                              "--prompt", "THE")
    assert code == 0 and out.startswith("THE"), err


def test_bpe_run_resumes_evaluates_and_writes(tmp_path):
    """The tokenizer travels in the checkpoint; bits per character count characters, not tokens; and
    the resumed run is the run it would have been."""
    argv = [*TINY, "--tokenizer", "bpe", "--vocab_size", "300", "--checkpoint_interval", "2"]
    assert run_main(*argv, "--out_dir", tmp_path / "a")[0] == 0
    code, _, err = run_main("--mode", "train", "--resume", "--checkpoint",
                            tmp_path / "a" / "step_000002.pt", "--out_dir", tmp_path / "b")
    assert code == 0, err
    assert_same_weights(tmp_path / "a" / "latest.pt", tmp_path / "b" / "latest.pt")
    _, out, _ = run_main("--mode", "eval", "--out_dir", tmp_path / "a")
    tokens, nats, bits = (float(re.search(rf"([\d.,]+) {unit}", out)[1].replace(",", ""))
                          for unit in ("tokens", "nats", "bits"))
    n_characters = len(SAMPLE.read_text(encoding="utf-8")) / 10
    assert tokens < 0.8 * n_characters
    assert bits == pytest.approx(nats / math.log(2) * tokens / n_characters, rel=2e-3)
    code, out, _ = run_main("--mode", "generate", "--out_dir", tmp_path / "a", "--prompt",
                            "Ünïcødé")
    assert code == 0 and out.startswith("Ünïcødé")


def test_generation_ends_at_the_end_of_text():
    """What comes after the end-of-text token is not written, in a stream or in a batch."""
    tokenizer = BPETokenizer.train("ab " * 9, 260)
    model = minigpt.build_model(GPTConfig(tokenizer.vocab_size, model="bigram", block_size=8))
    nn.init.zeros_(model.wte.weight)
    model.wte.weight.data[tokenizer.encode("b")[0], tokenizer.end] = 99.0
    model.wte.weight.data[tokenizer.encode("a")[0], tokenizer.encode("b")[0]] = 99.0
    for num_samples in (1, 2):
        out = io.StringIO()
        config = GenerateConfig(prompt="a", max_tokens=9, num_samples=num_samples)
        minigpt.write_text(model, tokenizer, config, CPU, 1, out)
        assert out.getvalue() == "---------------\n".join(["ab\n"] * num_samples)


TINY = ["--mode", "train", "--preset", "laptop", "--data", str(SAMPLE), "--device", "cpu",
        "--dtype", "float32", "--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size",
        "16", "--batch_size", "4", "--grad_accum", "2", "--max_steps", "6", "--eval_interval", "3",
        "--eval_batches", "2", "--warmup_steps", "2", "--log_interval", "1", "--dropout", "0.1"]


def run_main(*argv):
    """The command in this process, on the CPU: its exit code, and what it wrote to both streams."""
    argv = [*argv, *([] if "--device" in argv or "--mode" not in argv else ["--device", "cpu"])]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


def train_tiny(out_dir, *argv):
    code, out, err = run_main(*TINY, "--out_dir", out_dir, *argv)
    assert code == 0 and out == "", err
    return err


def weights_of(path):
    return load_checkpoint(path)["model"]


def assert_same(a, b):
    """Two nested values, tensors among them, bit by bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    else:
        assert a == b


def assert_same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics_of(out_dir):
    return minigpt.read_metrics(out_dir)


def step_losses(out_dir):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in metrics_of(out_dir) if "loss" in r]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """One small finished run that several tests look at."""
    folder = tmp_path_factory.mktemp("tiny")
    err = train_tiny(folder, "--checkpoint_interval", "2")
    return folder, err


def test_a_run_writes_what_it_promises(tiny_run):
    """best, latest and snapshots named after completed steps; metrics and config; the score."""
    folder, err = tiny_run
    assert {re.sub("_[0-9a-f]{12}", "", p.name) for p in folder.iterdir()} - {"loss.png"} == {
        "tokens_train.bin", "tokens_val.bin", "best.pt", "latest.pt", minigpt.PREVIOUS,
        "step_000002.pt", "step_000004.pt", "step_000006.pt", "metrics.jsonl", "config.json"}
    for name, step in (("latest", 6), ("step_000002", 2), ("step_000004", 4)):
        assert load_checkpoint(folder / f"{name}.pt")["progress"]["step"] == step
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["train_config"]["max_steps"] == 6 and config["model_config"]["n_embd"] == 16
    assert [r["step"] for r in metrics_of(folder) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in metrics_of(folder) if "val_loss" in r] == [0, 3, 6]
    assert "4,032 parameters (0.0M)" in err or re.search(r"model gpt: [\d,]+ parameters", err)
    assert "    | " in err  # a sample at each evaluation


def test_best_checkpoint_has_the_lowest_validation_loss(tiny_run):
    """And the score printed at the end is the one that eval gives for it."""
    folder, err = tiny_run
    evaluations = [r for r in metrics_of(folder) if "val_loss" in r]
    best = min(evaluations, key=lambda r: r["val_loss"])
    assert load_checkpoint(folder / "best.pt")["progress"]["step"] == best["step"]
    assert all(r["val_perplexity"] == math.exp(r["val_loss"]) for r in evaluations)
    code, out, _ = run_main("--mode", "eval", "--out_dir", folder)
    assert code == 0 and out.strip() == err.strip().split("\n")[-1]
    assert "nats per token" in out and "perplexity" in out and "bits per character" in out
    state = load_checkpoint(folder / "best.pt")
    model, tokenizer = minigpt.model_from_checkpoint(state)
    corpus = encode_corpus(minigpt.Text.survey(SAMPLE), tokenizer, 16, folder)
    assert f"{evaluate(model, corpus.val):.4f} nats" in out


def test_final_score_is_the_best_models_and_not_the_last_ones(tmp_path):
    """A rate far too high makes the model worse than it was at the start."""
    err = train_tiny(tmp_path, "--learning_rate", "30", "--eval_interval", "1")
    assert load_checkpoint(tmp_path / "best.pt")["progress"]["step"] < 6
    _, out, _ = run_main("--mode", "eval", "--out_dir", tmp_path)
    assert out.strip() == err.strip().split("\n")[-1]
    _, out, _ = run_main("--mode", "eval", "--checkpoint", tmp_path / "latest.pt")
    assert out.strip() != err.strip().split("\n")[-1]


def test_a_checkpoint_remembers_its_corpus(tmp_path, monkeypatch):
    """Named by a relative path, and scored from elsewhere without naming it again."""
    (tmp_path / "mine.txt").write_text(SAMPLE.read_text(encoding="utf-8")[:9000].upper())
    monkeypatch.chdir(tmp_path)
    err = train_tiny("out", "--data", "mine.txt")
    monkeypatch.chdir(HERE)
    code, out, err2 = run_main("--mode", "eval", "--out_dir", tmp_path / "out")
    assert code == 0 and out.strip() == err.strip().split("\n")[-1] and "note" not in err2


def test_logged_loss_is_the_mean_over_the_accumulated_step(tiny_run):
    """Recomputed from the model at its start: both micro-batches, not the last one alone."""
    folder, _ = tiny_run
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(config["train_config"]["seed"])
    model = minigpt.build_model(GPTConfig(**config["model_config"])).train()
    text = minigpt.Text.survey(SAMPLE)
    corpus = encode_corpus(text, CharTokenizer(text.alphabet), 16, folder)
    batches = torch.Generator().manual_seed(config["train_config"]["seed"])
    losses = [model(*get_batch(corpus.train, 16, 4, batches))[1].item() for _ in range(2)]
    first = step_losses(folder)[0][1]
    assert first == pytest.approx(sum(losses) / 2, abs=1e-6)
    assert first != pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("optimizer, tokenizer", [("adamw", "char"), ("muon", "bpe")])
def test_resumed_run_is_the_run_it_would_have_been(tmp_path, optimizer, tokenizer):
    """k steps, resume, the rest: bit-identical weights, optimizer, and logged losses, with dropout
    and accumulation on; 3 is right after an evaluation. Fails if any random state, the optimizer
    or the step is not restored, or if the evaluation is repeated and counted twice."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    size = ["--vocab_size", "300"] if tokenizer == "bpe" else []
    train_tiny(whole, "--checkpoint_interval", "1", "--optimizer", optimizer, "--tokenizer",
               tokenizer, *size)
    for k in (2, 3, 4):
        shutil.copytree(whole, parts, dirs_exist_ok=True)
        (parts / "latest.pt").unlink()
        code, _, err = run_main("--mode", "train", "--out_dir", parts, "--resume", "--checkpoint",
                                parts / f"step_00000{k}.pt")
        assert code == 0, err
        assert step_losses(whole) == step_losses(parts) and len(step_losses(parts)) == 6
        a, b = (load_checkpoint(folder / "latest.pt") for folder in (whole, parts))
        for state in ("model", "optimizer", "random", "scaler"):
            assert_same(a[state], b[state])
        assert [r["step"] for r in metrics_of(parts) if "val_loss" in r] == [0, 3, 6]


def test_resume_elsewhere_or_from_an_old_snapshot_spares_the_best(tmp_path):
    """A best.pt that this run's past does not know is neither overwritten nor taken for its own;
    the search for the best begins anew, also where the folder is empty and the run is over."""
    folder = tmp_path / "a"
    train_tiny(folder, "--checkpoint_interval", "2")
    best = (folder / "best.pt").read_bytes()
    assert load_checkpoint(folder / "best.pt")["progress"]["step"] > 2
    resume = ["--mode", "train", "--resume", "--checkpoint"]
    code, _, err = run_main(*resume, folder / "step_000006.pt", "--out_dir", tmp_path / "b")
    assert code == 0, err
    assert load_checkpoint(tmp_path / "b" / "best.pt")["progress"]["best_step"] == 6
    for _ in range(2):
        code, _, err = run_main(*resume, folder / "step_000002.pt", "--out_dir", folder,
                                "--max_steps", "5")
        assert code == 0 and "best_000006.pt" in err or "best_000005.pt" in err
        assert (folder / "best_000006.pt").read_bytes() == best


def test_resume_into_the_folder_of_another_run_sets_that_one_aside(tmp_path):
    """Same settings, same steps, another run: its model is not taken for ours, and nothing of it is
    lost. Also at step 0, which is what a run killed early leaves."""
    ours = train_tiny(tmp_path / "ours", "--checkpoint_interval", "3").strip().split("\n")[-1]
    train_tiny(tmp_path / "other", "--seed", "5")
    best = (tmp_path / "other" / "best.pt").read_bytes()
    resume = ["--mode", "train", "--resume", "--checkpoint"]
    code, _, err = run_main(*resume, tmp_path / "ours" / "latest.pt", "--out_dir",
                            tmp_path / "other")
    assert code == 0 and err.strip().split("\n")[-1] == ours
    assert (tmp_path / "other" / "earlier_1" / "best.pt").read_bytes() == best

    train_tiny(tmp_path / "zero", "--learning_rate", "1e-30", "--weight_decay", "0")
    start = tmp_path / "zero" / "best.pt"
    assert load_checkpoint(start)["progress"]["step"] == 0
    for folder in ("zero", "empty", "ours"):
        code, _, err = run_main(*resume, start, "--out_dir", tmp_path / folder)
        assert code == 0, err
        assert [r["step"] for r in metrics_of(tmp_path / folder) if "val_loss" in r] == [0, 3, 6]


def test_resume_may_change_the_number_format(tmp_path):
    """A run in float32 has no loss scaler to restore; float16 starts with a new one."""
    train_tiny(tmp_path)
    code, _, err = run_main("--mode", "train", "--out_dir", tmp_path, "--resume", "--dtype",
                            "float16", "--max_steps", "8")
    assert code == 0, err
    assert load_checkpoint(tmp_path / "latest.pt")["scaler"]["scale"] > 0


def test_the_rate_of_the_schedule_is_the_rate_of_the_step(tiny_run):
    """What the optimizer used, as logged: step n is taken with get_lr(n - 1). Fails if the rate is
    set late, early or never."""
    folder, _ = tiny_run
    config = TrainConfig(**load_checkpoint(folder / "latest.pt")["train_config"])
    optimizers = load_checkpoint(folder / "latest.pt")["optimizer"]
    groups = [group for state in optimizers.values() for group in state["param_groups"]]
    assert [group["lr"] for group in groups] == [get_lr(5, config)] * 3  # two of Muon's, AdamW's
    used = [r["lr"] for r in metrics_of(folder) if "lr" in r]
    assert used == [get_lr(step, config) for step in range(6)] and len(set(used)) > 3


def test_watching_changes_nothing(tiny_run, tmp_path):
    """Evaluating, sampling, logging and saving more or less often: the same weights. Fails if any
    of them draws from the training's random state."""
    folder, _ = tiny_run
    train_tiny(tmp_path, "--eval_interval", "1", "--eval_batches", "1", "--sample_tokens", "5",
               "--log_interval", "4", "--checkpoint_interval", "0")
    assert_same_weights(folder / "latest.pt", tmp_path / "latest.pt")


def test_another_seed_is_another_run(tiny_run, tmp_path):
    """And the same seed the same run: the seed reaches weights, batches and dropout."""
    folder, _ = tiny_run
    train_tiny(tmp_path / "a")
    assert_same_weights(folder / "latest.pt", tmp_path / "a" / "latest.pt")
    train_tiny(tmp_path / "b", "--seed", "1")
    assert step_losses(folder)[0] != step_losses(tmp_path / "b")[0]


def test_resuming_what_another_version_wrote_is_refused(tiny_run, tmp_path):
    """A setting that this one does not know: one line, no traceback."""
    for part in ("model_config", "train_config", "progress"):
        state = load_checkpoint(tiny_run[0] / "latest.pt")
        state[part]["unheard_of"] = 1
        save_checkpoint(tmp_path / "latest.pt", state)
        code, _, err = run_main("--mode", "train", "--resume", "--out_dir", tmp_path)
        assert code == 2 and "error: --checkpoint: its parts do not fit together" in err


def test_resume_can_lengthen_a_run_but_not_reshape_it(tmp_path):
    """max_steps may change; what gives the earlier steps their meaning may not: the refusal names
    both values and leaves the files alone."""
    train_tiny(tmp_path)
    resume = ["--mode", "train", "--data", SAMPLE, "--out_dir", tmp_path, "--resume"]
    before = (tmp_path / "latest.pt").read_bytes()
    for flag, new, old in (("n_embd", 32, 16), ("batch_size", 8, 4), ("grad_accum", 4, 2),
                           ("preset", "mini", "laptop")):
        code, _, err = run_main(*resume, f"--{flag}", new)
        last = err.strip().split("\n")[-1]
        assert code == 2 and last.startswith(f"error: --{flag} {new}: ") and f"{old}" in last
    other = tmp_path / "other.txt"
    other.write_text(SAMPLE.read_text(encoding="utf-8")[:-1] + "λ", encoding="utf-8")
    code, _, err = run_main(*resume, "--data", other)
    assert code == 2 and "other.txt: cannot change on --resume; its sha256" in err
    assert (tmp_path / "latest.pt").read_bytes() == before
    code, _, err = run_main(*resume, "--max_steps", "8", "--preset", "laptop")
    assert code == 0, err
    assert load_checkpoint(tmp_path / "latest.pt")["progress"]["step"] == 8
    assert [r["step"] for r in metrics_of(tmp_path) if "val_loss" in r] == [0, 3, 6, 8]


def test_a_new_run_sets_the_earlier_one_aside(tmp_path):
    """A forgotten --resume must not cost a night's work."""
    train_tiny(tmp_path, "--max_steps", "2")
    old = (tmp_path / "best.pt").read_bytes()
    train_tiny(tmp_path, "--max_steps", "1")
    assert (tmp_path / "earlier_1" / "best.pt").read_bytes() == old
    moved = {p.name for p in (tmp_path / "earlier_1").iterdir()} - {"loss.png"}
    assert moved == {"best.pt", "latest.pt", minigpt.PREVIOUS, "metrics.jsonl", "config.json"}
    assert load_checkpoint(tmp_path / "latest.pt")["progress"]["step"] == 1
    # To go on with it sets the other one aside, and spares the one that goes on.
    code, _, err = run_main("--mode", "train", "--resume", "--checkpoint",
                            tmp_path / "earlier_1" / "latest.pt", "--out_dir", tmp_path)
    assert code == 0, err
    assert load_checkpoint(tmp_path / "earlier_2" / "latest.pt")["progress"]["step"] == 1
    assert (tmp_path / "earlier_1" / "best.pt").read_bytes() == old


def test_a_snapshot_is_a_save_like_others(tmp_path):
    """A run that goes on begins at the latest one, also where no evaluation was near; and writes
    the file that a crash, between latest.pt and the snapshot, left out."""
    every_two = ["--checkpoint_interval", "2"]
    train_tiny(tmp_path / "a", *every_two, "--eval_interval", "100", "--max_steps", "5")
    previous = tmp_path / "a" / minigpt.PREVIOUS  # the last save before the one at the end
    assert load_checkpoint(previous)["progress"]["step"] == 4
    train_tiny(tmp_path / "c", *every_two, "--eval_interval", "100", "--max_steps", "3")
    assert load_checkpoint(tmp_path / "c" / minigpt.PREVIOUS)["progress"]["step"] == 2
    (tmp_path / "b").mkdir()
    shutil.copy(previous, tmp_path / "b" / "latest.pt")
    code, _, err = run_main("--mode", "train", "--resume", "--out_dir", tmp_path / "b")
    assert code == 0 and "at step 4" in err, err
    assert [p.name for p in (tmp_path / "b").glob("step_*.pt")] == ["step_000004.pt"]
    assert_same_weights(tmp_path / "a" / "latest.pt", tmp_path / "b" / "latest.pt")


def test_token_files_are_used_again_and_go_with_their_corpus(tmp_path):
    """Same text and tokenizer, same file; another of either, other files, and the old ones leave
    with the run that they belonged to."""
    train_tiny(tmp_path, "--max_steps", "1")
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tokens_*")}
    train_tiny(tmp_path, "--max_steps", "1")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("tokens_*")} == first
    assert len(first) == 2
    train_tiny(tmp_path, "--max_steps", "1", "--tokenizer", "bpe", "--vocab_size", "300")
    second = set(tmp_path.glob("tokens_*"))
    assert len(second) == 2 and not second & set(first)
    assert not list(tmp_path.glob("*.partial"))


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    """With a vanishing learning rate the first evaluation stays the best one: two more are one too
    many for a patience of two. The best checkpoint is that of the first."""
    err = train_tiny(tmp_path, "--learning_rate", "1e-30", "--weight_decay", "0", "--eval_interval",
                     "1", "--patience", "2", "--max_steps", "50")
    assert "stopped early: no better validation loss in 2 evaluations" in err
    assert load_checkpoint(tmp_path / "latest.pt")["progress"]["step"] == 2
    assert load_checkpoint(tmp_path / "best.pt")["progress"]["step"] == 0


def test_broken_loss_stops_the_run_and_spares_the_checkpoints(tmp_path):
    """A learning rate of 1e30 blows up at once: one error line, and the files are still those of
    step 0, whose weights are numbers."""
    code, _, err = run_main(*TINY, "--out_dir", tmp_path, "--learning_rate", "1e30", "--grad_clip",
                            "0", "--log_interval", "100", "--checkpoint_interval", "2")
    last = err.strip().split("\n")[-1]
    assert code == 2 and last.startswith("error: the run has diverged: at step 2 the loss is ")
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["best.pt", "latest.pt"]
    state = load_checkpoint(tmp_path / "latest.pt")
    assert state["progress"]["step"] == 0
    assert all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.parametrize("interval", ["1", "100"])
def test_weights_that_overflow_are_neither_saved_nor_sampled(tmp_path, interval):
    """One step of size 1e39 leaves a finite loss behind it and infinite weights: the evaluation
    that meets them ends the run, and the checkpoint of step 0 stays."""
    code, _, err = run_main(*TINY, "--out_dir", tmp_path, "--learning_rate", "1e39", "--grad_clip",
                            "0", "--log_interval", "100", "--eval_interval", interval)
    assert code == 2 and err.strip().split("\n")[-1].startswith("error: the run has diverged")
    assert load_checkpoint(tmp_path / "latest.pt")["progress"]["step"] == 0


def test_torn_metrics_line_does_not_stop_a_resume(tmp_path):
    """A crash can cut the last line short; records beyond the resumed step are dropped."""
    train_tiny(tmp_path, "--checkpoint_interval", "2")
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "lo')
    code, _, err = run_main("--mode", "train", "--data", SAMPLE, "--out_dir", tmp_path, "--resume",
                            "--checkpoint", tmp_path / "step_000004.pt")
    assert code == 0, err
    assert [s for s, *_ in step_losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves(tmp_path, number, code):
    """Ctrl-C or SIGTERM in mid-run: latest.pt is of the last completed step, and resumes."""
    command = [sys.executable, HERE / "minigpt.py", *TINY, "--max_steps", "1000000",
               "--eval_interval", "1000000", "--out_dir", tmp_path]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 20/"):
            process.send_signal(number)
    assert process.wait(60) == code, "".join(lines)
    assert lines[-1] == "saved; go on with --resume\n"
    step = load_checkpoint(tmp_path / "latest.pt")["progress"]["step"]
    assert step >= 20
    code, _, err = run_main("--mode", "train", "--data", SAMPLE, "--out_dir", tmp_path, "--resume",
                            "--max_steps", step + 1)
    assert code == 0 and f"resuming {tmp_path / 'latest.pt'} at step {step}" in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("phase, seen, evaluated", [
    ("--eval_batches", "model gpt", -1), ("--sample_tokens", "step 0: train loss", 0)])
def test_a_signal_is_heard_while_evaluating_and_sampling(tmp_path, phase, seen, evaluated):
    """Both would go on for hours here. An evaluation that was cut short is not counted, and the
    run that goes on begins with it; a sample cut short costs nothing but its end."""
    command = [sys.executable, HERE / "minigpt.py", *TINY, phase, "100000000"]
    process = subprocess.Popen([*command, "--out_dir", tmp_path], stderr=subprocess.PIPE, text=True,
                               encoding="utf-8")
    killer = threading.Timer(50, process.kill)  # should it be deaf
    killer.start()
    for line in process.stderr:
        if line.startswith(seen):
            while not (tmp_path / "metrics.jsonl").exists():  # the run has not begun yet
                time.sleep(0.1)
            time.sleep(1.0)
            process.send_signal(signal.SIGTERM)
    killer.cancel()
    assert process.wait(60) == 143
    progress = load_checkpoint(tmp_path / "latest.pt")["progress"]
    assert (progress["step"], progress["evaluated_at"]) == (0, evaluated)
    assert (tmp_path / "best.pt").exists() == (evaluated == 0)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of POSIX")
def test_status_is_one_line_in_place_on_a_terminal_and_plain_lines_in_a_pipe(tiny_run, tmp_path):
    """On a terminal the line is rewritten after a carriage return; in a file there are none."""
    import pty

    _, err = tiny_run
    assert "\r" not in err and len(re.findall(r"^step \d/6 \| loss", err, re.M)) == 6
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, HERE / "minigpt.py", *TINY, "--out_dir", tmp_path,
                                "--sample_tokens", "0"], stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # how the end looks to the reader on Linux
        while piece := os.read(master, 65536):
            shown += piece
    os.close(master)
    assert process.wait(60) == 0
    screen = [line.rpartition(b"\r")[2] for line in shown.replace(b"\r\n", b"\n").split(b"\n")]
    assert len(re.findall(rb"\rstep \d/6 \|", shown)) == 6
    assert not any(b"tokens/s |" in line for line in screen)  # each was wiped before real text


# ---- Attacks -------------------------------------------------------------------------------------

OFTEN = ["--eval_interval", "1", "--checkpoint_interval", "20", "--sample_tokens", "0",
         "--max_steps", "100000", "--eval_batches", "1"]


def main_in_a_process(argv, log):
    with open(log, "a", encoding="utf-8", buffering=1) as file, contextlib.redirect_stderr(file):
        sys.exit(main([str(a) for a in argv]))


@pytest.fixture(scope="module")
def start_main():
    """Starts the command in a new process without its seconds of importing: the processes are
    forked from a server that has imported what they need."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minigpt", "torch._dynamo", "matplotlib.figure"])

    def start(argv, log):
        process = context.Process(target=main_in_a_process, args=(argv, log))
        process.start()
        return process

    return start


def last_step(log):
    """The latest step in a status line of a log."""
    steps = re.findall(r"^step (\d+)/", log.read_text(encoding="utf-8"), re.M)
    return int(steps[-1]) if steps else 0


@pytest.mark.slow
def test_sigkill_at_any_moment_costs_no_completed_save(tmp_path, start_main):
    """25 kills at random moments of a run that saves three files after each step. Whenever it dies,
    latest.pt is whole and of the last step whose save was complete, and the run that goes on is the
    run that was never killed. Fails if a checkpoint is written in place, or latest.pt is absent
    for a moment between its old and its new content."""
    killed, spared = tmp_path / "killed", tmp_path / "spared"
    dice, log, caught = random.Random(2), tmp_path / "log", 0
    for round in range(25):
        begun = last_step(log) if round else 0
        resume = ["--resume"] if (killed / "latest.pt").exists() else []
        process = start_main([*TINY, *OFTEN, "--out_dir", killed, *resume], log)
        while process.is_alive() and (not log.exists() or last_step(log) <= begun + 1):
            time.sleep(0.01)  # until it trains
        time.sleep(dice.uniform(0, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text(encoding="utf-8")
        caught += any(p.suffix == ".partial" for p in killed.iterdir())
        # A step is reported only after the save before it.
        assert load_checkpoint(killed / "latest.pt")["progress"]["step"] >= last_step(log) - 1
        load_checkpoint(killed / minigpt.PREVIOUS), load_checkpoint(killed / "best.pt")
    assert caught >= 3  # the kills did hit saves
    assert "warning" not in log.read_text(encoding="utf-8")
    snapshot = sorted(killed.glob("step_*.pt"))[-1]
    process = start_main([*TINY, *OFTEN, "--out_dir", spared], tmp_path / "log2")
    while process.is_alive() and not (spared / snapshot.name).exists():
        time.sleep(0.05)
    process.kill()
    process.join()
    a, b = load_checkpoint(snapshot), load_checkpoint(spared / snapshot.name)
    for state in ("model", "optimizer", "random"):
        assert_same(a[state], b[state])
    upto = int(snapshot.stem.removeprefix("step_"))
    assert step_losses(killed)[:upto] == step_losses(spared)[:upto]


RESUME = ["--mode", "train", "--resume", "--out_dir"]


def resume_tiny(out_dir, *argv):
    code, _, err = run_main(*RESUME, out_dir, *argv)
    assert code == 0, err
    return err


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_damaged_token_file_is_made_anew(tmp_path, part):
    """Wherever it was damaged: a shorter one would give another score, one of zeros another
    model, without a word."""
    train_tiny(tmp_path, "--max_steps", "1")
    (path,) = tmp_path.glob(f"tokens_{part}_*.bin")
    whole = path.read_bytes()
    for damaged in (whole[:3000], bytes(len(whole)), b"\xc8" * len(whole), whole[:-1], b""):
        path.write_bytes(damaged)
        resume_tiny(tmp_path)
        assert path.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [b"\xff\xfe\x80\n", b"5\n", b'{"a": 1}\n', b'{"step": "x"}\n',
                                     b"\0" * 99])
def test_garbage_in_the_metrics_does_not_stop_a_resume(tmp_path, garbage):
    """What a disk may leave behind after a crash; the records before it stay."""
    train_tiny(tmp_path, "--max_steps", "2")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(garbage)
    resume_tiny(tmp_path, "--max_steps", 3)
    assert [s for s, *_ in step_losses(tmp_path)] == [1, 2, 3]


def test_a_damaged_best_checkpoint_is_kept_and_found_anew(tmp_path):
    """A resume must not end over it, nor take it for its best."""
    train_tiny(tmp_path)
    damaged = (tmp_path / "best.pt").read_bytes()[:-100]
    (tmp_path / "best.pt").write_bytes(damaged)
    assert "damaged or not of this run's past" in resume_tiny(tmp_path)
    assert load_checkpoint(tmp_path / "best.pt")["progress"]["step"] == 6
    assert (tmp_path / "best_000000.pt").read_bytes() == damaged


@pytest.mark.slow
def test_no_best_checkpoint_is_lost_when_a_run_branches_twice(tmp_path):
    """Two branches whose best is of the same step, and the trunk: three files."""
    train_tiny(tmp_path, "--checkpoint_interval", "2")
    first = (tmp_path / "best.pt").read_bytes()
    for kind in ("bfloat16", "float32"):
        resume_tiny(tmp_path, "--checkpoint", tmp_path / "step_000002.pt", "--dtype", kind)
    assert first in [p.read_bytes() for p in tmp_path.glob("best_*.pt")]
    assert len(list(tmp_path.glob("best*.pt"))) == 3


@pytest.mark.slow
def test_a_best_checkpoint_of_another_run_is_not_taken_for_ours(tmp_path):
    """Not even where it is of the same step, and alone in the folder."""
    train_tiny(tmp_path / "ours")
    train_tiny(tmp_path / "other", "--seed", "5")
    best = (tmp_path / "other" / "best.pt").read_bytes()
    for name in ("latest.pt", minigpt.PREVIOUS):
        (tmp_path / "other" / name).unlink()
    resume_tiny(tmp_path / "other", "--checkpoint", tmp_path / "ours" / "latest.pt")
    assert (tmp_path / "other" / "earlier_1" / "best.pt").read_bytes() == best


@pytest.mark.slow
def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    """For want of memory or of a permission: the file keeps its name, and is not replaced by the
    one before it."""
    train_tiny(tmp_path)
    before, load, read = (tmp_path / "latest.pt").read_bytes(), torch.load, Path.read_bytes
    starved = iter([MemoryError])

    def load_once_starved(*args, **options):
        for problem in starved:
            raise problem
        return load(*args, **options)

    def refuse(path):
        if path.name == "latest.pt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    for owner, name, instead in ((torch, "load", load_once_starved), (Path, "read_bytes", refuse)):
        with monkeypatch.context() as m:
            m.setattr(owner, name, instead)
            assert run_main(*RESUME, tmp_path)[0] == 2
        assert (tmp_path / "latest.pt").read_bytes() == before


def test_a_checkpoint_without_one_of_its_parts_is_refused(tmp_path):
    """In one line, as what another version wrote, and not by a traceback in mid-start."""
    train_tiny(tmp_path, "--max_steps", "1")
    for part in ("run", "optimizer", "scaler", "random", "corpus", "corpus_sha256"):
        state = load_checkpoint(tmp_path / "best.pt")
        (state["progress"] if part == "run" else state).pop(part)
        save_checkpoint(tmp_path / "x.pt", state)
        code, _, err = run_main(*RESUME, tmp_path, "--checkpoint", tmp_path / "x.pt")
        assert code == 2 and "do not fit together" in err


@pytest.mark.slow
def test_a_corpus_that_changed_in_its_place_is_refused(tmp_path):
    """Also where no --data is typed; the same characters in another order are another text, and
    have token files of their own."""
    text, mine = SAMPLE.read_text(encoding="utf-8"), tmp_path / "mine.txt"
    out_dir = tmp_path / "out"
    mine.write_text(text, encoding="utf-8")
    train_tiny(out_dir, "--data", mine, "--max_steps", "1")
    first = set(out_dir.glob("tokens_*"))
    mine.write_text(text[::-1], encoding="utf-8")
    code, _, err = run_main(*RESUME, out_dir)
    assert code == 2 and "cannot change on --resume" in err
    train_tiny(out_dir, "--data", mine, "--max_steps", "1")
    second = set(out_dir.glob("tokens_*"))
    assert len(first) == len(second) == 2 and not first & second


@pytest.mark.slow
def test_a_lengthened_run_has_one_score_and_a_new_run_none_of_the_old_files(tmp_path):
    """The full score comes last; snapshots and best checkpoints of the earlier run move aside."""
    train_tiny(tmp_path, "--checkpoint_interval", "1")
    resume_tiny(tmp_path, "--max_steps", 8)
    scored = ["full_val_loss" in r for r in metrics_of(tmp_path)]
    assert scored.index(True) == len(scored) - 1
    old = (tmp_path / "step_000001.pt").read_bytes()
    (tmp_path / "best_000003.pt").touch()
    train_tiny(tmp_path, "--max_steps", "1", "--seed", "5", "--checkpoint_interval", "1")
    assert (tmp_path / "earlier_1" / "step_000001.pt").read_bytes() == old
    assert (tmp_path / "step_000001.pt").read_bytes() != old
    assert not (tmp_path / "best_000003.pt").exists() and not list(tmp_path.glob("step_000002*"))


def test_files_reach_the_disk_before_their_names(tmp_path, monkeypatch):
    """A rename that comes before the sync may survive a power failure that the content does not.
    And best.pt before latest.pt, which speaks of it."""
    seen, sync, replace, save = [], os.fsync, os.replace, minigpt.save_checkpoint
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.fstat(fd).st_size), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("renamed"), replace(a, b)))
    with minigpt.replacing(tmp_path / "a") as file:
        file.write(b"12345")
    assert seen == [5, "renamed"]
    saved = []
    monkeypatch.setattr(minigpt, "save_checkpoint",
                        lambda path, state: (saved.append(path.name), save(path, state)))
    train_tiny(tmp_path, "--max_steps", "1", "--checkpoint_interval", "0")
    assert saved[:2] == ["best.pt", "latest.pt"]


def test_without_hard_links_the_previous_checkpoint_is_a_copy(tmp_path, monkeypatch):
    """Not every file system lets a file have two names."""
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    train_tiny(tmp_path)
    assert load_checkpoint(tmp_path / minigpt.PREVIOUS)["progress"]["step"] == 3


@pytest.mark.slow
def test_a_resume_restores_the_scale_of_float16_and_the_time(tmp_path):
    """With another scale other steps would be skipped. And `auto` has become a format: another
    machine must not choose another one."""
    train_tiny(tmp_path, "--dtype", "float16", "--checkpoint_interval", "3")
    state = load_checkpoint(tmp_path / "step_000003.pt")
    state["scaler"]["scale"], state["progress"]["seconds"] = 1024.0, 7200.0
    save_checkpoint(tmp_path / "s.pt", state)
    err = resume_tiny(tmp_path / "b", "--checkpoint", tmp_path / "s.pt")
    assert "trained in 2h00m" in err
    assert load_checkpoint(tmp_path / "b" / "latest.pt")["scaler"]["scale"] == 1024.0
    train_tiny(tmp_path / "c", "--max_steps", "1", "--dtype", "auto")
    assert load_checkpoint(tmp_path / "c" / "latest.pt")["train_config"]["dtype"] != "auto"


def test_signals_are_as_before_when_training_is_over(tmp_path):
    """Or Ctrl-C would do nothing in the final scoring, and between two runs of an ablation."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train_tiny(tmp_path, "--max_steps", "1")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.slow
def test_a_signal_at_any_moment_saves_the_last_step(tmp_path, start_main):
    """Ten SIGTERM, most of them in the midst of a save: each ends the run with its code when all
    completed steps are on disk. Fails if a save is cut short, or a step is lost."""
    dice, log, out_dir = random.Random(3), tmp_path / "log", tmp_path / "out"
    for round in range(10):
        begun = last_step(log) if round else 0
        process = start_main([*TINY, *OFTEN, "--out_dir", out_dir, *["--resume"][:round]], log)
        while process.is_alive() and (not log.exists() or last_step(log) <= begun + 1):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.2))
        process.terminate()
        process.join(20)
        assert process.exitcode == 143, log.read_text(encoding="utf-8")
        assert load_checkpoint(out_dir / "latest.pt")["progress"]["step"] == last_step(log)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_disk_that_fills_up_ends_a_run_and_leaves_what_was_saved(tmp_path):
    """Not even a byte of the files that were complete changes. Here the disk is a limit on the
    size of a file, which a checkpoint hits in its middle."""
    import resource

    train_tiny(tmp_path)
    names = ("best.pt", "latest.pt")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (2000, len(before["latest.pt"]) // 2, len(before["latest.pt"]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            code, _, err = run_main("--mode", "train", "--resume", "--out_dir", tmp_path,
                                    "--max_steps", "9")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert code == 2 and "Traceback" not in err and err.count("error: ") == 1, err
        assert err.splitlines()[-1].startswith("error: ") and str(tmp_path) in err
        assert {name: (tmp_path / name).read_bytes() for name in names} == before
        assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "step_000001.pt.0.partial").touch()  # as a crash would leave it
    code, _, err = run_main("--mode", "train", "--resume", "--out_dir", tmp_path, "--max_steps", 9)
    assert code == 0, err
    assert load_checkpoint(tmp_path / "latest.pt")["progress"]["step"] == 9
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(tmp_path, start_main, number):
    """After the first it would finish an evaluation batch, which takes many seconds here."""
    deep = ["--n_layer", "500", "--batch_size", "1500", "--out_dir", tmp_path / "out"]
    process = start_main([*TINY, *deep], tmp_path / "log")
    while not (tmp_path / "out" / "metrics.jsonl").exists():
        time.sleep(0.05)
    for _ in range(2):
        time.sleep(1)
        assert process.is_alive()
        os.kill(process.pid, number)
    process.join(3)
    assert process.exitcode == -number


# ==================================================================================================
# Generation
# ==================================================================================================


def kept(probabilities, **options):
    """Which tokens of one distribution may still be drawn."""
    logits = torch.tensor([probabilities], dtype=torch.float64).log()
    return filter_logits(logits, **options).isfinite()[0].tolist()


@pytest.mark.parametrize("k, expected", [(1, "0100"), (2, "0101"), (3, "1101"), (4, "1111")])
def test_top_k_keeps_the_k_likeliest(k, expected):
    assert kept([0.2, 0.4, 0.1, 0.3], top_k=k) == [c == "1" for c in expected]


def test_top_k_keeps_exactly_k_among_equals():
    """Ties must not let more than k through."""
    assert sum(kept([0.25] * 4, top_k=2)) == 2


@pytest.mark.parametrize("p, expected", [
    (0.01, "0100"), (0.5, "0100"), (0.51, "0101"), (0.75, "0101"), (0.76, "1101"), (0.875, "1101"),
    (0.88, "1111"), (1.0, "1111"),
])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    """The probabilities are exact in binary, so the boundary is exact too: 0.5 alone reaches 0.5,
    and for 0.51 the token that crosses the line stays. Fails if it is cut, or if one more stays."""
    assert kept([0.125, 0.5, 0.125, 0.25], top_p=p) == [c == "1" for c in expected]


def test_top_p_works_on_what_top_k_left():
    """0.4 and 0.3 are 4/7 and 3/7 of what is left: 0.57 is reached by the first alone."""
    assert kept([0.2, 0.4, 0.1, 0.3], top_k=2, top_p=0.57) == [False, True, False, False]
    assert kept([0.2, 0.4, 0.1, 0.3], top_k=2, top_p=0.58) == [False, True, False, True]


def test_filters_leave_the_surviving_odds_alone():
    """Survivors keep their logits, row by row; no filter leaves everything."""
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    for options in (dict(top_k=3), dict(top_p=0.7), dict(top_k=5, top_p=0.5), {}):
        filtered = filter_logits(logits, **options)
        alive = filtered.isfinite()
        assert torch.equal(filtered[alive], logits[alive]) and alive.any(dim=-1).all()
        assert torch.equal(logits.argmax(-1), filtered.argmax(-1))
    assert torch.equal(filter_logits(logits), logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    """100,000 draws against p^(1/T) normalized. Fails if logits are multiplied by the temperature
    instead of divided."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = p.log().expand(100_000, 4)
    drawn = draw_token(logits, temperature, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (100_000, 1)
    expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    assert_close(drawn.flatten().bincount(minlength=4) / 100_000, expected, 0.01)


def test_temperature_zero_is_greedy_and_tiny_temperatures_are_safe():
    """No division by zero, no overflow to NaN."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [500.0, -500.0, 0.0]])
    assert draw_token(logits, temperature=0).tolist() == [[1], [0]]
    assert draw_token(logits, temperature=1e-30).tolist() == [[1], [0]]
    assert draw_token(logits * 1e30, temperature=1e-30).tolist() == [[1], [0]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_continues_and_halves_a_full_window(use_cache):
    """Greedy text, step by step, far beyond block_size: when 8 tokens are in the window and one
    more is asked for, the newer 4 stay. Fails if the window is cut too early, too late or short."""
    model = small_model()
    model.train()
    before = torch.get_rng_state()
    for n in (1, 3, 8, 20):  # prompts shorter and longer than the context of 8
        idx = random_ids(6, n, seed=n)
        out = model.generate(idx, 14, temperature=0, use_cache=use_cache)
        assert out.shape == (6, n + 14) and torch.equal(out[:, :n], idx) and model.training
        start = max(0, n - 8)
        for t in range(n, n + 14):
            if t - start == 9:
                start = t - 4
            logits, _ = model(out[:, start:t])
            assert torch.equal(out[:, t], logits[:, -1].argmax(dim=-1))
        assert torch.equal(model.generate(idx, 0), idx)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "rope"])
@pytest.mark.parametrize("changes", [
    dict(attention="explicit"), dict(attention="fused"), dict(norm_position="post", qk_norm=True),
    dict(attention="explicit", norm="rmsnorm", activation="swiglu", qk_norm=True, block_size=1),
    dict(attention="explicit", block_size=3), dict(model="bigram")])
def test_the_cache_changes_nothing_but_the_time(pos, changes):
    """Logits, not only choices: prefill, every decoded token, and past the window. Fails for keys
    that are rotated for the wrong place, a place off by one, or a cache kept when the window
    moves."""
    model = small_model(pos=pos, **changes).eval()
    forward, logits = model.forward, []

    def watched(*args, **options):
        logits.append(forward(*args, **options)[0][:, -1:])
        return logits[-1], None

    model.forward = watched
    for use_cache in (True, False):
        for n in (1, 4, 11):
            model.generate(random_ids(3, n), 21, 1.0, generator=torch.Generator().manual_seed(0),
                           use_cache=use_cache)
    assert len(logits) == 2 * 63
    assert_close(torch.cat(logits[:63]), torch.cat(logits[63:]), 1e-5)


def test_the_cache_is_read_in_turn_and_spares_the_work():
    """One token at a time goes through the model, but for prompts and windows that moved; and what
    is kept is as large as the window, not larger."""
    model, widths = small_model().eval(), []
    forward = model.forward
    model.forward = lambda idx, caches: widths.append(idx.shape[1]) or forward(idx, caches=caches)
    model.generate(random_ids(2, 5), 12)
    assert widths == [5, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1]
    for attention in ("explicit", "fused"):  # a text may come in several parts, too
        other, ids = small_model(attention=attention).eval(), random_ids(2, 8)
        caches = other.new_caches()
        parts = [other(part, caches=caches)[0] for part in ids.split([3, 1, 2, 2], dim=1)]
        assert_close(torch.cat(parts, dim=1), other(ids)[0])
    caches = model.new_caches()
    forward(random_ids(2, 5), caches=caches)
    assert [(c.length, c.k.shape, c.v.shape) for c in caches] == 2 * [
        (5, (2, 2, 8, 4), (2, 2, 8, 4))]
    with pytest.raises(ValueError, match="9 tokens"):
        forward(random_ids(2, 4), caches=caches)


def test_filters_reach_the_draw_and_act_after_the_temperature():
    """At temperature 5, top_k 1 or a tiny top_p still leave only the likeliest token; and top_p
    counts the tempered probabilities. Fails if a filter is dropped on its way, or comes first."""
    model, idx = small_model(), random_ids(4, 3)
    greedy = model.generate(idx, 6, temperature=0)
    for options in (dict(top_k=1), dict(top_p=1e-9), dict(top_p=1e-46)):
        assert torch.equal(model.generate(idx, 6, temperature=5.0, **options), greedy)
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(200, 3)  # 0.87, 0.12, 0.02 at 0.5
    assert draw_token(logits, temperature=0.5, top_p=0.7).unique().tolist() == [0]
    assert draw_token(logits, temperature=1.0, top_p=0.7).unique().tolist() == [0, 1]


def test_same_dice_same_text():
    """A seeded generator repeats the text, another one does not, and the global state is free."""
    model = small_model()
    texts = [model.generate(random_ids(1, 1), 30, generator=torch.Generator().manual_seed(s))
             for s in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_stop_text_ends_the_stream_however_it_is_cut():
    """What comes out is the text before the first stop, for every way of cutting it in pieces;
    nothing is lost, doubled, or shown too early."""
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab\n", k=rng.randrange(12)))
        stop = "".join(rng.choices("ab\n", k=rng.randrange(1, 4)))
        pieces, rest = [], text
        while rest:
            n = rng.randrange(1, 4)
            pieces, rest = pieces + [rest[:n]], rest[n:]
        assert "".join(until_stop(pieces, stop)) == text.split(stop)[0]
        assert "".join(until_stop(pieces, None)) == text


def test_only_the_text_goes_to_stdout(tiny_run, monkeypatch):
    """So that output can be piped; the same seed gives the same text, the prompt leads it."""
    folder, _ = tiny_run
    generate = ["--mode", "generate", "--out_dir", folder, "--prompt", "THE", "--max-tokens", "40"]
    code, out, err = run_main(*generate)
    assert code == 0 and out.startswith("THE") and out.endswith("\n") and len(out) == 3 + 40 + 1
    assert "best.pt" in err
    assert run_main(*generate)[1] == out
    assert run_main(*generate, "--seed", "2")[1] != out
    assert len(run_main(*generate, "--max_tokens", "0")[1]) == 4
    assert run_main("--mode", "generate", "--out_dir", folder)[1][0] == "\n"  # without a prompt
    exact = run_main(*generate, "--dtype", "float32")[1]
    monkeypatch.delattr(minigpt, "KeyValueCache")
    monkeypatch.setattr(GPT, "new_caches", None)
    assert run_main(*generate, "--dtype", "float32", "--no_cache")[1] == exact


def test_several_samples_are_several_texts(tiny_run):
    """Separated by a line; each continues the prompt; --stop ends each by itself."""
    folder, _ = tiny_run
    generate = ["--mode", "generate", "--out_dir", folder, "--prompt", "I", "--num_samples", "3"]
    code, out, _ = run_main(*generate, "--max_tokens", "30", "--temperature", "1.5")
    texts = out.split("---------------\n")
    assert code == 0 and len(set(texts)) == 3 and all(len(t) == 32 and t[0] == "I" for t in texts)
    code, out, _ = run_main(*generate, "--max_tokens", "400", "--stop", "e")
    assert code == 0 and "e" not in out
    code, out, _ = run_main(*generate, "--temperature", "0", "--top_k", "1", "--top_p", "1.0")
    assert len(set(out.rstrip("\n").split("\n---------------\n"))) == 1


def test_text_streams_as_it_is_drawn(tiny_run):
    """Every character is flushed before the next is drawn: a reader of the pipe sees it at once."""
    model, tokenizer = minigpt.model_from_checkpoint(load_checkpoint(tiny_run[0] / "best.pt"))
    events = []

    class Out:
        def write(self, text):
            events.append(text)

        def flush(self):
            events.append("flush")

    config = GenerateConfig(prompt="A", max_tokens=4)
    minigpt.write_text(model, tokenizer, config, CPU, 1, Out())
    assert events[0] == "A" and events[2::2] == ["flush"] * 5 and events[9] == "\n"
    assert all(len(piece) == 1 for piece in events[1::2])


# ==================================================================================================
# Engine room
# ==================================================================================================


def test_device_and_precision_are_found():
    """auto takes what is there; the CPU is always there."""
    assert minigpt.find_device("auto").type in ("cuda", "mps", "cpu")
    engine = minigpt.make_engine("cpu", "auto")
    assert engine.device.type == "cpu" and engine.dtype in (torch.float32, torch.bfloat16)
    assert minigpt.make_engine("cpu", "bfloat16").dtype == torch.bfloat16
    with pytest.raises(UserError, match="--device nonsense: unknown; this machine has auto, .*cpu"):
        minigpt.find_device("nonsense")
    with pytest.raises(UserError, match="--device cuda:99: not found here"):
        minigpt.find_device("cuda:99")


@pytest.mark.slow
def test_compilation_that_fails_falls_back_with_one_warning(tmp_path):
    """Without a C++ compiler torch.compile cannot work on a CPU: one warning, and the run is the
    same as without it."""
    env = {**os.environ, "CXX": str(tmp_path / "no-such-compiler"), "PATH": "",
           "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, HERE / "minigpt.py", *TINY, "--max_steps", "2", "--out_dir"]
    done = subprocess.run([*command, tmp_path / "a", "--compile"], env=env, capture_output=True,
                          text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    if "torch.compile does not work here" not in done.stderr:
        pytest.fail("compilation worked without a compiler:\n" + done.stderr)
    assert done.stderr.count("warning") == 1 and "Traceback" not in done.stderr
    train_tiny(tmp_path / "b", "--max_steps", "2")
    assert_same_weights(tmp_path / "a" / "latest.pt", tmp_path / "b" / "latest.pt")


@pytest.mark.slow
def test_compiled_model_is_used_where_compilation_works():
    """With a backend that needs no compiler: the runner is the compiled model, no gradient is left
    over from the trial, and no random state has moved."""
    model, batches = small_model(dropout=0.5).float(), torch.Generator().manual_seed(1)
    before = minigpt.random_states(batches, CPU.device)
    real = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda m: real(m, backend="eager"))
        runner = minigpt.compile_model(
            model, TrainConfig(compile=True), CPU,
            lambda: get_batch(small_corpus().train, 8, 2, batches), batches)
    after = minigpt.random_states(batches, CPU.device)
    assert runner is not model and runner._orig_mod is model
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_auto_picks_the_preset_by_the_device():
    """A GPU gets the reference model, a CPU the one that it can train."""
    assert minigpt.choose_preset("auto", torch.device("cuda"))[0] == "gpt"
    assert minigpt.choose_preset("auto", torch.device("mps"))[0] == "gpt"
    assert minigpt.choose_preset("auto", torch.device("cpu"))[0] == "laptop"


def test_text_is_read_without_the_mark_of_windows(tmp_path):
    """A byte-order mark is no character of the text, and line ends become one character."""
    (tmp_path / "a.txt").write_bytes("\ufeffà\r\nb".encode())
    assert list(minigpt.read_chunks(tmp_path / "a.txt")) == ["à\nb"]


def test_metrics_are_strict_json(tmp_path):
    """An infinite gradient norm, as float16 has them, becomes null; a fresh log begins empty."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
    minigpt.MetricsLog(tmp_path, minigpt.Progress(), resumed=False).write(step=1, norm=math.inf)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "norm": null}\n'


def test_settings_that_may_change_on_resume_are_these():
    """How long to go on and what to report, as the README lists them. What gave the earlier steps
    their meaning stays."""
    free = {f.name for config in (GPTConfig, TrainConfig) for f in fields(config)
            if f.metadata["resume"]}
    assert free == {"max_steps", "eval_interval", "sample_tokens", "checkpoint_interval",
                    "log_interval", "patience", "dtype", "compile", "wandb"}
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"`--resume` may change\*\*(.*?), the device", readme, re.S)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == free


def test_loss_curve_is_drawn_where_matplotlib_is(tiny_run):
    """And one line says what to install where it is not."""
    folder, err = tiny_run
    try:
        import matplotlib  # noqa: F401

        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    except ImportError:
        assert "pip install matplotlib" in err and not (folder / "loss.png").exists()


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
        if kind == "slow":
            time.sleep(2)
        body = {"altered": BODY[:-1] + b"!", "html": b"<html>sign in</html>", "long": BODY * 2}
        body = body.get(kind, BODY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have left
            if kind == "drip":
                for i in range(60):
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
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


QUICK = dict(backoff=0.01, connect_timeout=5.0, read_timeout=0.7, deadline=1.4)


def test_download_puts_the_checked_bytes_in_place(server, tmp_path):
    """Also into a folder that does not exist yet; no temporary file stays behind."""
    target = tmp_path / "data" / "input.txt"
    download_data.download(target, [f"{server}/good"], **QUICK)
    assert target.read_bytes() == BODY and os.listdir(target.parent) == ["input.txt"]


@pytest.mark.parametrize("kind, why, hits", [
    ("truncated", "broke off", 2), ("altered", "altered", 1), ("html", "a web page", 1),
    ("long", "more than", 1), ("missing", "HTTP status 404", 1), ("slow", "no answer in time", 2),
    ("drip", "no answer in time", 2),
])
def test_bad_answer_leaves_the_file_alone(server, tmp_path, kind, why, hits):
    """Each ends in an error that says why, tries again only what may pass, and leaves the old
    file byte for byte. Fails if a check is skipped or the file is written before it."""
    target = tmp_path / "input.txt"
    target.write_bytes(b"old")
    with pytest.raises(download_data.DownloadError, match=why):
        download_data.download(target, [f"{server}/{kind}"], **QUICK)
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["input.txt"]
    assert Handler.hits[kind] == hits


def test_the_corpus_is_known_by_its_checksum():
    """Stated here a second time, so that a slip in either place shows."""
    assert download_data.SIZE == 1_115_394
    assert download_data.SHA256 == \
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_failed_write_of_the_corpus_leaves_nothing_behind(tmp_path):
    """The destination cannot be replaced (a folder stands there): no partial file stays."""
    (tmp_path / "input.txt").mkdir()
    (tmp_path / "input.txt" / "old").touch()
    with pytest.raises(OSError):
        download_data.put_in_place(b"new", tmp_path / "input.txt")
    assert os.listdir(tmp_path) == ["input.txt"]


def test_mirrors_are_tried_in_turn(server, tmp_path, capsys):
    """A dead one, a missing one, one that recovers: the corpus arrives from the third."""
    target = tmp_path / "input.txt"
    dead = "http://127.0.0.1:9/dead"
    download_data.download(target, [dead, f"{server}/missing", f"{server}/flaky"], **QUICK)
    assert target.read_bytes() == BODY
    assert "no connection" in capsys.readouterr().err
    assert Handler.hits == {"missing": 1, "flaky": 2}
    with pytest.raises(download_data.DownloadError, match="no connection.*404"):
        download_data.download(target, [dead, f"{server}/missing"], **QUICK)


def test_import_of_a_copy_has_the_same_checks(server, tmp_path):
    """From a file or an address; a wrong one is refused and nothing changes."""
    copy, target = tmp_path / "copy.txt", tmp_path / "input.txt"
    copy.write_bytes(BODY)
    download_data.import_copy(str(copy), target)
    assert target.read_bytes() == BODY
    download_data.import_copy(f"{server}/good", target)
    copy.write_bytes(BODY[:-1])
    for source in (str(copy), str(tmp_path / "none.txt"), str(tmp_path), "http://[::1"):
        with pytest.raises(download_data.DownloadError, match=re.escape(source[-4:])):
            download_data.import_copy(source, target)
    assert target.read_bytes() == BODY


def test_train_downloads_the_corpus_when_it_is_missing(server, tmp_path, monkeypatch):
    """The same function, the same place; the second time the file is simply used."""
    monkeypatch.setattr(download_data, "MIRRORS", [f"{server}/good"])
    monkeypatch.setattr(minigpt, "DATA", tmp_path)
    for _ in range(2):
        assert minigpt.find_corpus(None) == tmp_path / "input.txt"
    assert (tmp_path / "input.txt").read_bytes() == BODY and Handler.hits["good"] == 1


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
    pytest.importorskip("wandb")
    for folder, mode, flags in (("quiet", None, []), ("off", "offline", ["--no_wandb"]),
                                ("on", "offline", [])):
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        train_tiny(tmp_path / folder, "--max_steps", "2", *flags)
        files = list((tmp_path / folder).glob("wandb/offline-run-*/*.wandb"))
        assert len(files) == (folder == "on")
    assert b"tokens_per_second" in files[0].read_bytes()
    assert_same_weights(tmp_path / "on" / "latest.pt", tmp_path / "off" / "latest.pt")


def test_wandb_that_fails_never_ends_a_run(tmp_path, no_wandb_account, monkeypatch):
    """An account that cannot be reached, or a package that is broken: one line, and training."""
    (tmp_path / "wandb.py").write_text("raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    err = train_tiny(tmp_path / "out", "--max_steps", "1")
    assert err.count("no Weights & Biases: RuntimeError; --no_wandb") == 1


# ---- Several processes ---------------------------------------------------------------------------


def run_torchrun(n, *argv, script=HERE / "minigpt.py", wait=True, options=()):
    """n processes on this machine; one thread each, so that sums are added up in one order."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", *options,
               script, *argv]
    process = subprocess.Popen([str(a) for a in command], stderr=subprocess.PIPE, text=True,
                               encoding="utf-8", stdout=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    watchdog = threading.Timer(100, process.terminate)  # should they wait for each other for ever
    watchdog.daemon = True
    watchdog.start()
    if not wait:
        return process
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def workers_of(torchrun):
    """The process ids of the processes that it started, in the order of their ranks."""
    listed = subprocess.run(["pgrep", "-P", str(torchrun.pid)], text=True,
                            capture_output=True).stdout
    return sorted(map(int, listed.split()))


ONE_STEP = """
import sys
import time
from pathlib import Path
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from minigpt import *

team = setup_distributed()
engine = Engine(torch.device("cpu"), torch.float32, team)
torch.manual_seed(0)
config = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, dropout=0.0)
model = build_model(config).double()
if team.rank:  # the first process's weights are the ones that count
    torch.nn.init.zeros_(model.wte.weight)
batches, tokens = torch.Generator().manual_seed(5), torch.arange(500) % 11
settings = TrainConfig(batch_size=3, grad_accum=4, learning_rate=0.1, min_lr=0.0)
calls = []
runner = team.spread(model, engine.device)
if team.size > 1:
    def count(state, bucket):
        calls.append(bucket.index())
        return allreduce_hook(torch.distributed.group.WORLD, bucket)
    runner.register_comm_hook(None, count)

def next_batch():
    return team.turn(lambda: get_batch(tokens, 8, 3, batches))

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer.register_step_pre_hook(lambda o, *_: grads.extend(p.grad.clone() for p in
                                                            model.parameters()))
for step in range(2):
    grads = []
    loss, norm = train_step(runner, optimizer, next_batch, settings, engine)
    loss = team.mean(loss)
assert team.largest(3 + team.rank, 7 - team.rank) == [2 + team.size, 7]
assert team.share(lambda: [team.rank, "é"]) == [0, "é"]
mark = Path(sys.argv[1] + ".mark")
with team.first_on_each_machine():
    assert mark.exists() == (team.rank > 0)
    time.sleep(1)
    mark.touch()
dice = []
for step in (7, 8, 7):
    team.reseed_dropout(1, step)
    dice.append(torch.rand(1).item())
torch.save({"grads": grads, "loss": loss, "calls": len(calls), "dice": dice},
           f"{sys.argv[1]}.{team.rank}")
leave_distributed()
leave_process(0)
"""


@pytest.mark.slow
def test_two_processes_compute_the_gradients_of_one(tmp_path):
    """In float64, over two steps of four micro-steps: the second step shows that the weights stayed
    alike. Gradients travel once in a step (all of this model's fit into one bucket), not once in
    each micro-step. Fails if windows are shared wrongly, or sums are taken for means. The dice of
    dropout are others in each process and step, and the same for the same step. What one process
    must do first, such as writing a file, is done when the others come."""
    script = tmp_path / "one_step.py"
    script.write_text(ONE_STEP, encoding="utf-8")
    for n in (1, 2):
        code, _, err = run_torchrun(n, tmp_path / f"{n}", script=script)
        assert code == 0, err
    one, *two = (torch.load(tmp_path / name) for name in ("1.0", "2.0", "2.1"))
    for of_rank in two:
        assert_close(of_rank["grads"], one["grads"], 1e-12)
        assert_close(of_rank["loss"], one["loss"], 1e-12)
        assert of_rank["calls"] == 2
        assert of_rank["dice"][0] == of_rank["dice"][2]
    assert len({*two[0]["dice"], *two[1]["dice"]}) == 4


@pytest.mark.slow
def test_a_run_of_two_processes_is_the_run_of_one(tmp_path):
    """The same losses and weights, up to rounding; one of them prints, and the files are those of
    a single process. --grad_accum that cannot be shared is refused."""
    exact = [*TINY, "--dropout", "0", "--sample_tokens", "20"]
    code, out, err = run_torchrun(2, *exact, "--out_dir", tmp_path / "two")
    assert code == 0 and out == "", err
    assert len(re.findall("^step 6/6 ", err, re.M)) == 1 and err.count("full validation split") == 1
    assert "2 processes" in err and "Traceback" not in err
    train_tiny(tmp_path / "one", *exact)
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))
    for a, b in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        for name in {"step", "loss", "grad_norm", "lr", "val_loss", "full_val_loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    a, b = weights_of(tmp_path / "one" / "latest.pt"), weights_of(tmp_path / "two" / "latest.pt")
    for key in a:
        assert_close(a[key], b[key], 1e-4)
    code, _, err = run_torchrun(2, *TINY, "--grad_accum", "3", "--out_dir", tmp_path / "odd")
    assert code != 0
    assert len(re.findall("^error: --grad_accum 3: must be divisible by", err, re.M)) == 1
    code, _, err = run_torchrun(2, "--mode", "eval", "--out_dir", tmp_path / "one")
    assert code != 0 and err.count("error: --mode eval: runs in one process") == 1


def test_a_launch_finds_its_own_checkpoint_and_no_other(tmp_path, monkeypatch):
    """Also where --resume --checkpoint began it, and on a machine that has counted no restart.
    Another launch takes what the flags say, and leaves a damaged file of another launch alone."""
    def resumed(resume, checkpoint=None):
        state, _ = minigpt.state_to_resume(
            argparse.Namespace(resume=resume, checkpoint=checkpoint), tmp_path)
        return state and state["progress"]["step"]

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    train_tiny(tmp_path, "--checkpoint_interval", "2")
    old = str(tmp_path / "step_000002.pt")
    assert [resumed(False), resumed(True, old), resumed(True)] == [6, 6, 6]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert [resumed(False), resumed(True, old), resumed(True)] == [None, 2, 6]
    (tmp_path / "latest.pt").write_bytes(b"cut")
    assert "going on from" not in train_tiny(tmp_path)
    (tmp_path / "latest.pt").write_bytes(b"cut")
    assert resume_tiny(tmp_path).count("going on from") == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # by an older torchrun
    monkeypatch.setattr(os, "getppid", lambda: 17)
    first = minigpt.launch_name()
    monkeypatch.setattr(os, "getppid", lambda: 18)
    assert first != minigpt.launch_name()


def test_variables_of_a_cluster_manager_are_not_torchruns(tmp_path, monkeypatch):
    """Some set these for processes that know nothing of each other."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert "full validation split" in train_tiny(tmp_path, "--max_steps", "1")


def test_followers_touch_no_file(tmp_path):
    """Two processes that rewrite the metrics or move best.pt would destroy each other's work."""
    run = minigpt.Follower(None, None, None, TrainConfig(), None, tmp_path, None, None,
                           minigpt.Progress(), resumed=True)
    (tmp_path / "best.pt").touch()
    run.open(True)
    run.evaluate_and_save(), run.save("latest.pt"), run.save_snapshot(), run.finish()
    run.log(1.0, 1.0, 1.0, left=1.0)
    assert os.listdir(tmp_path) == ["best.pt"]


def test_the_first_of_each_machine_goes_first(monkeypatch):
    """The first process of a second machine is not the first of all, and does not wait to begin."""
    events = []
    monkeypatch.setattr(minigpt.Team, "wait", lambda self: events.append("wait"))
    for rank, local_rank, order in ((2, 0, ["work", "wait"]), (3, 1, ["wait", "work"])):
        events.clear()
        with minigpt.Team(rank, 4, local_rank).first_on_each_machine():
            events.append("work")
        assert events == order


@pytest.mark.slow
def test_two_processes_stop_together_when_patience_runs_out(tmp_path):
    """Only the first one knows of the evaluations. If the others went on, they would wait for it
    until it is gone."""
    code, _, err = run_torchrun(2, *TINY, "--learning_rate", "1e-30", "--weight_decay", "0",
                                "--eval_interval", "1", "--patience", "2", "--max_steps", "50",
                                "--min_lr", "0", "--out_dir", tmp_path)
    assert code == 0 and "stopped early" in err, err


@pytest.mark.slow
def test_the_checkpoint_of_the_first_process_serves_all(tmp_path):
    """Also those whose machine has none. A run that goes on is not reshaped to fit them."""
    train_tiny(tmp_path / "0", "--max_steps", "3", "--dropout", "0")
    script = tmp_path / "apart.py"
    script.write_text("import os, sys, minigpt\n"
                      "out = os.path.join(sys.argv[1], os.environ['RANK'])\n"
                      "minigpt.leave_process(minigpt.main(['--mode', 'train', '--resume', "
                      "'--out_dir', out, '--device', 'cpu', '--max_steps', '6']))\n",
                      encoding="utf-8")
    code, _, err = run_torchrun(2, tmp_path, script=script)
    assert code == 0 and err.count("resuming") == 1, err
    train_tiny(tmp_path / "odd", "--grad_accum", "1", "--max_steps", "3")
    before = (tmp_path / "odd" / "latest.pt").read_bytes()
    code, _, err = run_torchrun(2, *RESUME, tmp_path / "odd", "--max_steps", "6")
    assert code != 0 and "error: --grad_accum 1: must be divisible" in err, err
    assert (tmp_path / "odd" / "latest.pt").read_bytes() == before


def test_dropout_is_seeded_anew_before_each_step(tmp_path, monkeypatch):
    """By the processes of a team; the loop asks for it."""
    calls = []

    class Listener(minigpt.Team):
        def reseed_dropout(self, seed, step):
            calls.append((seed, step))

    monkeypatch.setattr(minigpt, "setup_distributed", Listener)
    train_tiny(tmp_path)
    assert calls == [(1337, step) for step in range(6)]


@pytest.mark.slow
def test_processes_that_would_train_different_things_are_stopped(tmp_path):
    """As when one machine has another corpus. Each tells what is wrong with it, where the first
    would only see that the other is gone."""
    script = tmp_path / "other.py"
    script.write_text(f"import os, sys, minigpt\nargv = {[str(a) for a in TINY]}\n"
                      "argv += ['--out_dir', sys.argv[1]]\n"
                      "argv += ['--seed', '7'] * int(os.environ['RANK'])\n"
                      "minigpt.leave_process(minigpt.main(argv))\n", encoding="utf-8")
    code, _, err = run_torchrun(2, tmp_path / "out", script=script)
    assert code != 0 and "\nprocess 1: error: --data " in err and "not those of the first" in err
    assert not list((tmp_path / "out").glob("*.pt"))


def test_micro_steps_are_shared_equally_or_not_at_all():
    """A preset's may be cut smaller, so that plain `torchrun minigpt.py --mode train` works; what
    was typed, or belongs to a run that goes on, may not."""
    config = TrainConfig(batch_size=12, grad_accum=2)
    assert minigpt.share_steps(config, 1, False) is config
    assert minigpt.share_steps(config, 2, False) is config
    shared = minigpt.share_steps(config, 8, True)
    assert (shared.batch_size, shared.grad_accum) == (3, 8)
    for n, may_change in ((3, False), (5, True)):
        with pytest.raises(UserError, match=f"--grad_accum 2: .* {n}, .* --grad_accum "):
            minigpt.share_steps(config, n, may_change)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_processes_that_are_stopped_go_on_exactly(tmp_path):
    """With dropout, whose dice differ between the processes. The signal goes to the second process
    alone, and later to torchrun, which hands it to both: in either case they agree on the step
    after which they stop."""
    argv = [*TINY, "--max_steps", "60", "--eval_interval", "20", "--dropout", "0.2"]
    assert run_torchrun(2, *argv, "--out_dir", tmp_path / "whole")[0] == 0
    resume = []
    for step in (5, 30):
        process = run_torchrun(2, *argv, *resume, "--out_dir", tmp_path / "parts", wait=False)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith(f"step {step}/"):
                os.kill(workers_of(process)[1] if step == 5 else process.pid, signal.SIGTERM)
        assert process.wait(60) != 0
        assert "saved; go on with --resume\n" in lines, "".join(lines)
        reached = load_checkpoint(tmp_path / "parts" / "latest.pt")["progress"]["step"]
        assert step <= reached < 60
        resume = ["--resume"]
    code, _, err = run_torchrun(2, "--mode", "train", "--resume", "--out_dir", tmp_path / "parts")
    assert code == 0, err
    assert_same_weights(tmp_path / "whole" / "latest.pt", tmp_path / "parts" / "latest.pt")
    assert step_losses(tmp_path / "whole") == step_losses(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_started_again_and_the_run_goes_on(tmp_path, victim):
    """By torchrun --max_restarts, without --resume: the latest checkpoint is this run's own, and
    not that of the run before it in the same folder. The result is that of an unharmed run."""
    argv = [*TINY, "--max_steps", "60", "--eval_interval", "5", "--out_dir", tmp_path]
    train_tiny(tmp_path, "--seed", "1")
    process = run_torchrun(2, *argv, options=["--max_restarts=2"], wait=False)
    lines, killed = [], False
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 12/") and not killed:
            os.kill(workers_of(process)[victim], signal.SIGKILL)
            killed = True
    assert killed and process.wait(60) == 0, "".join(lines)
    text = "".join(lines)
    assert "Traceback" not in text, text
    assert re.search(r"^resuming .*latest.pt at step \d+$", text, re.M), text
    assert text.count("full validation split") == 1
    assert [step for step, *_ in step_losses(tmp_path)] == [*range(1, 61)]
    code, _, err = run_torchrun(2, *argv, "--out_dir", tmp_path / "unharmed")
    assert code == 0, err
    assert_same_weights(tmp_path / "latest.pt", tmp_path / "unharmed" / "latest.pt")


# ==================================================================================================
# Experiments
# ==================================================================================================


def ablate_tiny(out_dir, *argv):
    tiny = [a for a in TINY if a not in ("--mode", "train")]
    return run_main("--mode", "ablate", *tiny, "--out_dir", out_dir, *argv)


def cells_of(out):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]


def test_ablation_is_the_runs_it_stands_for(tmp_path):
    """The table's figures are those of plain training runs with the same flags and seeds; the
    curves are drawn and the CSV holds every run."""
    code, out, err = ablate_tiny(tmp_path, "--vary", "pos=learned,rope", "--seeds", "2")
    assert code == 0, err
    (first, second) = cells_of(out)
    assert first[0] == "pos=learned" and second[0] == "pos=rope" and first[-1] == "2"
    losses = []
    for seed in ("1337", "1338"):
        err = train_tiny(tmp_path / seed, "--pos", "rope", "--seed", seed)
        losses.append(float(re.search(r"([\d.]+) nats", err)[1]))
    mean, deviation = (float(x) for x in second[1].split(" +- "))
    assert mean == pytest.approx(sum(losses) / 2, abs=2e-4)
    assert deviation == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2), abs=2e-4)
    with open(tmp_path / "ablate_pos" / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["variant"], r["seed"]) for r in rows] == [
        (f"pos={pos}", seed) for seed in ("1337", "1338") for pos in ("learned", "rope")]
    assert float(rows[1]["loss"]) == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.slow
def test_interrupted_ablation_goes_on_where_it_stopped(tmp_path):
    """A finished run is not trained again, an unfinished one is resumed, and other settings start
    anew: nothing old is taken for the result of something else."""
    command = ["--vary", "n_layer=1,2", "--seeds", "1"]
    code, complete, _ = ablate_tiny(tmp_path / "a", *command)
    ablate_tiny(tmp_path / "b", *command)
    folder = tmp_path / "b" / "ablate_n_layer"
    finished, unfinished = folder / "n_layer=1_seed=1337", folder / "n_layer=2_seed=1337"
    (unfinished / "result.json").unlink()
    before = (finished / "latest.pt").stat().st_mtime_ns
    code, out, err = ablate_tiny(tmp_path / "b", *command)
    assert code == 0 and [c[:3] for c in cells_of(out)] == [c[:3] for c in cells_of(complete)]
    assert err.count("resuming") == 1 and (finished / "latest.pt").stat().st_mtime_ns == before
    code, out, err = ablate_tiny(tmp_path / "b", *command, "--max_steps", "4")
    assert code == 0 and "resuming" not in err
    assert load_checkpoint(finished / "latest.pt")["progress"]["step"] == 4


def test_diverged_variant_is_a_row_and_not_the_end(tmp_path):
    """A learning rate of 1e30 has no score; the others have theirs."""
    code, out, err = ablate_tiny(tmp_path, "--vary", "learning_rate=1e30,1e-3", "--seeds", "1",
                                 "--grad_clip", "0")
    assert code == 0, err
    bad, good = cells_of(out)
    assert bad[0] == "learning_rate=1e+30" and bad[1] == "diverged" and "1 diverged" in bad[-1]
    assert float(good[1]) < 5 and good[-1] == "1"


@pytest.mark.parametrize("name", minigpt.ABLATIONS)
def test_named_ablations_build_every_variant(name):
    """Each variant is a legal model that differs from the others."""
    known = {f.name for f in fields(GPTConfig)}
    variants = minigpt.ABLATIONS[name]
    assert len({str(v) for v in variants}) == len(variants) >= 3
    for variant in variants:
        model = {k: v for k, v in variant.items() if k in known}
        assert minigpt.build_model(GPTConfig(**{"vocab_size": 65, **model})).num_parameters() > 0


def test_flops_are_those_that_torch_counts():
    """6 N + 12 n_layer C T, against the matrix products of a real pass. Fails if the head or the
    attention is left out, or if the table of tokens, which is only looked up, is counted."""
    from torch.utils.flop_counter import FlopCounterMode

    for changes in (dict(), dict(tie_weights=False, activation="swiglu", pos="rope")):
        model = GPT(small_config(attention="explicit", n_layer=3, **changes))
        ids = random_ids(2, 8)
        with FlopCounterMode(display=False) as counter:
            model(ids, ids)[1].backward()
        assert counter.get_total_flops() == minigpt.flops_per_token(model) * ids.numel()


def test_parts_add_up_to_the_parameters():
    model = GPT(small_config(tie_weights=False))
    parts = minigpt.count_parts(model)
    assert sum(parts.values()) == model.num_parameters() and len(parts) == 6
    assert parts["wte"] == parts["lm_head"] == 11 * 8 and parts["norms"] == 5 * 16
    assert parts["attn"] == 2 * (24 * 8 + 24 + 8 * 8 + 8)


def test_timing_takes_turns_and_leaves_the_first_round_out():
    """A first call that is slow, as while a kernel is built, does not count."""
    calls = []

    def wait(name, seconds):
        time.sleep(seconds if calls.count(name) else 0.3)
        calls.append(name)

    a, b = minigpt.timed(lambda: wait("a", 0.002), lambda: wait("b", 0.02), seconds=1e-9)
    assert 0.002 <= a < 0.02 <= b < 0.3
    assert calls == ["a", "b"] * 4  # three rounds, after the one that warms up


@pytest.mark.slow
def test_bench_measures_and_records(tmp_path):
    """The table and the file say the same; a peer that is not there ends in one line; one that is
    gives ratios of the rates beside them."""
    pytest.importorskip("transformers")
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "model.py").write_text(
        "import minigpt\n"
        "GPTConfig = minigpt.GPTConfig\n"
        "class GPT(minigpt.GPT):\n"
        "    def configure_optimizers(self, decay, lr, betas, device):\n"
        "        print('something')\n"
        "        return minigpt.torch.optim.AdamW(self.parameters())\n")
    argv = ["--mode", "bench", "--preset", "laptop", "--n_layer", "1", "--n_embd", "16",
            "--block_size", "16", "--batch_size", "2", "--data", SAMPLE, "--max_tokens", "20",
            "--dtype", "float32", "--bench_seconds", "0.05", "--out_dir", tmp_path]
    code, out, err = run_main(*argv, "--against", tmp_path / "peer")
    assert code == 0, err
    table = dict(re.findall(r"^\| (.*?) +\| +([\d,.e+-]+) \|$", out, re.M))
    record = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert record["model_config"]["n_embd"] == 16 and record["train_config"]["preset"] == "laptop"
    rows = record["rows"]
    assert list(table) == list(rows) and min(rows.values()) > 0 and "something" not in out
    for ratio, above, below in (
            ("training, times nanoGPT", "training, tokens/s",
             "training, nanoGPT in float32, tokens/s"),
            ("writing, times nanoGPT", "writing, with the cache, tokens/s",
             "writing, nanoGPT in float32, tokens/s"),
            ("writing, times Hugging Face", "writing, as many tokens as it, tokens/s",
             "writing, Hugging Face in float32, tokens/s")):
        assert rows[ratio] == pytest.approx(rows[above] / rows[below])
    code, out, err = run_main(*argv, "--against", tmp_path / "nothing")
    assert code == 2 and re.search("^error: --against .*nothing: ", err, re.M) and not out


def test_zero_initialization_makes_every_block_pass_its_input_on():
    """And plain leaves the residual projections as large as the rest."""
    model, x = GPT(small_config(init="zero")), torch.randn(1, 8, 8)
    assert torch.equal(model.h[0](x), x)
    torch.manual_seed(0)
    plain = GPT(GPTConfig(vocab_size=65, n_layer=8, n_embd=192, init="plain"))
    assert abs(plain.h[0].mlp.c_proj.weight.std().item() / 0.02 - 1) < 0.05


# ==================================================================================================
# The command line, as a user types it
# ==================================================================================================


def run_command(*argv, cwd=HERE, script="minigpt.py", **env):
    """The real command in a process of its own."""
    return subprocess.run([sys.executable, script, *map(str, argv)], cwd=cwd, capture_output=True,
                          env={**os.environ, **env}, text=True, encoding="utf-8", timeout=120)


MISTAKES = {
    "no mode": ([], "--mode"),
    "unknown mode": (["--mode", "dance"], "dance"),
    "misspelt flag": (["--mode", "train", "--max_stepz", "5"], "did you mean --max_steps?"),
    "missing value": (["--mode", "train", "--max_steps"], "--max_steps"),
    "no experiment": (["--mode", "ablate"], "--set"),
    "two experiments": (["--mode", "ablate", "--set", "pos", "--vary", "pos=rope"], "--set"),
    "unknown experiment": (["--mode", "ablate", "--set", "luck"], "--set luck"),
    "unknown field to vary": (["--mode", "ablate", "--vary", "luck=1,2"], "--vary luck=1,2"),
    "no values to vary": (["--mode", "ablate", "--vary", "n_layer"], "--vary n_layer"),
    "value twice": (["--mode", "ablate", "--vary", "dropout=0.1,0.10"], "names a value twice"),
    "seed to vary": (["--mode", "ablate", "--vary", "seed=1,2"], "--vary seed=1,2"),
    "bad variant shows early": (["--mode", "ablate", "--vary", "norm=layernorm,rmsnrm"],
                                "--norm rmsnrm"),
    "wrong values to vary": (["--mode", "ablate", "--vary", "n_layer=a,b"], "n_layer takes ints"),
    "blank argument": (["--mode", "train", " "], "unknown"),
    "out of memory": (["--mode", "train", "--batch_size", "1000000000000"], "--batch_size"),
    "precision of no sense": (["--mode", "generate", "--out_dir", "{run}", "--dtype", "nn"],
                              "--dtype nn"),
    "seed too large": (["--mode", "generate", "--out_dir", "{run}", "--seed", "9" * 30], "--seed"),
    "checkpoint of another version": (["--mode", "generate", "--checkpoint", "{tmp}/other.pt"],
                                      "another version"),
    "checkpoint with a long name": (["--mode", "eval", "--checkpoint", "x" * 300], "xxx"),
    "not a number": (["--mode", "train", "--max_steps", "many"], "many"),
    "a switch has no value": (["--mode", "train", "--bias", "maybe"], "maybe"),
    "missing data": (["--mode", "train", "--data", "nowhere.txt"], "nowhere.txt"),
    "empty data": (["--mode", "train", "--data", "{tmp}/empty.txt"], "empty"),
    "data is a folder": (["--mode", "train", "--data", "{tmp}"], "{tmp}"),
    "data is not UTF-8": (["--mode", "train", "--data", "{tmp}/latin.txt"], "UTF-8"),
    "corpus too short": (["--mode", "train", "--data", "{tmp}/short.txt"], "--block_size 128"),
    "more layers than can be": (["--mode", "train", "--n_layer", "9" * 30], "--n_layer 999"),
    "a wide MLP": (["--mode", "train", "--mlp_ratio", "1e300"], "--mlp_ratio 1e+300: must be at"),
    "heads do not divide": (["--mode", "train", "--n_head", "3"], "--n_head 3"),
    "zero layers": (["--mode", "train", "--n_layer", "0"], "--n_layer 0"),
    "negative batch": (["--mode", "train", "--batch_size", "-4"], "--batch_size -4"),
    "negative steps": (["--mode", "train", "--max_steps", "-1"], "--max_steps -1"),
    "dropout of one": (["--mode", "train", "--dropout", "1.0"], "--dropout 1.0"),
    "rate is not finite": (["--mode", "train", "--learning_rate", "nan"], "--learning_rate nan"),
    "floor above peak": (["--mode", "train", "--min_lr", "9"], "--min_lr 9"),
    "unknown preset": (["--mode", "train", "--preset", "huge"], "--preset huge"),
    "unknown device": (["--mode", "train", "--device", "tpu"], "--device tpu"),
    "unknown precision": (["--mode", "train", "--dtype", "int4"], "--dtype int4"),
    "vocabulary too small": (["--mode", "train", "--tokenizer", "bpe", "--vocab_size", "100"],
                             "--vocab_size 100"),
    "vocabulary without bpe": (["--mode", "train", "--vocab_size", "100"], "--tokenizer bpe"),
    "odd head for rope": (["--mode", "train", "--pos", "rope", "--n_embd", "12", "--n_head", "4"],
                          "--pos rope"),
    "unknown attention": (["--mode", "train", "--attention", "flash"], "--attention flash"),
    "unwritable out_dir": (["--mode", "train", "--data", "{sample}", "--out_dir",
                            "{tmp}/empty.txt/out"], "--out_dir {tmp}/empty.txt/out"),
    "nothing to resume": (["--mode", "train", "--resume", "--out_dir", "{tmp}/none"], "latest.pt"),
    "checkpoint without resume": (["--mode", "train", "--checkpoint", "{run}/best.pt"], "--resume"),
    "no checkpoint": (["--mode", "generate", "--out_dir", "{tmp}/none"], "best.pt"),
    "checkpoint is a folder": (["--mode", "eval", "--checkpoint", "{tmp}"], "{tmp}"),
    "truncated checkpoint": (["--mode", "generate", "--checkpoint", "{tmp}/cut.pt"], "cut.pt"),
    "foreign checkpoint": (["--mode", "eval", "--checkpoint", "{tmp}/latin.txt"], "latin.txt"),
    "top_k of zero": (["--mode", "generate", "--out_dir", "{run}", "--top_k", "0"], "--top_k 0"),
    "top_k too large": (["--mode", "generate", "--out_dir", "{run}", "--top_k", "66"],
                        "--top_k 66: must be at most"),
    "top_p of zero": (["--mode", "generate", "--out_dir", "{run}", "--top_p", "0"], "--top_p 0"),
    "top_p above one": (["--mode", "generate", "--out_dir", "{run}", "--top_p", "1.1"],
                        "--top_p 1.1"),
    "negative temperature": (["--mode", "generate", "--out_dir", "{run}", "--temperature", "-1"],
                             "--temperature -1"),
    "no samples": (["--mode", "generate", "--out_dir", "{run}", "--num_samples", "0"],
                   "--num_samples 0"),
    "negative tokens": (["--mode", "generate", "--out_dir", "{run}", "--max_tokens", "-5"],
                        "--max_tokens -5"),
    "empty prompt": (["--mode", "generate", "--out_dir", "{run}", "--prompt", ""], "--prompt"),
    "empty stop": (["--mode", "generate", "--out_dir", "{run}", "--stop", ""], "--stop"),
    "unknown character": (["--mode", "generate", "--out_dir", "{run}", "--prompt", "naïve"],
                          "'ï' (U+00EF)"),
    "unknown character in eval": (["--mode", "eval", "--out_dir", "{run}", "--data",
                                   "{tmp}/greek.txt"], "(U+03BB)"),
}


@pytest.fixture(scope="module")
def mistaken(tiny_run, tmp_path_factory):
    """The arguments of a mistake and what its message must hold, with real files behind them."""
    run, tmp = tiny_run[0], tmp_path_factory.mktemp("mistakes")
    (tmp / "empty.txt").write_bytes(b"")
    (tmp / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    (tmp / "short.txt").write_bytes(b"to be or not to be")
    (tmp / "greek.txt").write_text("λόγος " * 500, encoding="utf-8")
    save_checkpoint(tmp / "other.pt", {"format": minigpt.CHECKPOINT_FORMAT, "model_config": {}})
    (tmp / "cut.pt").write_bytes((run / "best.pt").read_bytes()[:5000])

    def fill(name):
        argv, named = MISTAKES[name]
        argv = [a.format(tmp=tmp, run=run, sample=SAMPLE) for a in argv]
        # Where the mistake is not about the output, it must not touch the user's out folder.
        out = [] if "--out_dir" in argv else ["--out_dir", str(tmp / "out")]
        corpus_needed = "train" in argv or "ablate" in argv
        data = ["--data", str(SAMPLE)] if "--data" not in argv and corpus_needed else []
        device = ["--device", "cpu"] if "--device" not in argv and "--mode" in argv else []
        return argv + data + out + device, named.format(tmp=tmp, run=run)

    return fill


def check_mistake(code, out, err, named):
    lines = err.strip().split("\n")
    assert code == 2 and out == "" and "Traceback" not in err
    assert [line.startswith("error: ") for line in lines].count(True) == 1, err
    assert lines[-1].startswith("error: ") and named in lines[-1]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistaken, name):
    """The last line begins with `error: ` and names the flag or file and the value; there is no
    traceback, and nothing on stdout."""
    argv, named = mistaken(name)
    check_mistake(*run_main(*argv), named)


def test_mistakes_end_the_real_process_alike(mistaken):
    """One of each kind in a process of its own: the shell sees exit code 2 and the same line."""
    kinds = ["no mode", "data is not UTF-8", "heads do not divide", "truncated checkpoint"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for name, done in zip(kinds, pool.map(lambda n: run_command(*mistaken(n)[0]), kinds)):
            check_mistake(done.returncode, done.stdout, done.stderr, mistaken(name)[1])


@pytest.mark.slow
def test_random_command_lines_end_in_success_or_in_one_line(tiny_run, tmp_path):
    """Flags of every kind with values of every kind: exit code 0, or 2 with a single `error:` line,
    the last one; never a traceback. What is huge here is too huge for any memory; what lies between
    would only take long."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    run, _ = tiny_run
    odd = ["", " ", "-", "--", "é", "\0", "nan", "inf", "-inf", "1e400", "1e300", "None", "0x10",
           "1_0", "2.0", "-1", "9" * 30]
    files = [str(path) for path in (tmp_path, run / "best.pt", run / "latest.pt", SAMPLE)]
    values = {int: ["0", "1", "2", "3", "4", "8", "400"], str: ["a", "ROMEO:", *files],
              float: ["0", "1e-300", "1e-4", "0.5", "1", "2", "100"]}

    def value(kind, choices=None):
        sound = st.sampled_from([*(choices or values[kind])])
        return st.one_of(*[sound] * 9, st.sampled_from(odd)).map(lambda value: [value])

    flags = {"resume": st.just([]), "nonsense": st.just([]), "checkpoint": value(str),
             "data": value(str), "device": value(str, ["cpu", "cpu:9", "tpu", "cuda:9", "meta"])}
    configs = (GPTConfig, TrainConfig, GenerateConfig, minigpt.AblateConfig)
    for f in itertools.chain.from_iterable(fields(c) for c in configs):
        if f.metadata["kind"] is bool:
            flags |= {f.name: st.just([]), f"no_{f.name}": st.just([])}
        else:
            flags[f.name] = value(f.metadata["kind"], f.metadata["choices"])
    for slow in ("compile", "vary", "wandb", "seeds"):
        del flags[slow]
    typed = st.lists(st.sampled_from(sorted(flags)).flatmap(
        lambda name: flags[name].map(lambda value: [f"--{name}", *value])), max_size=4)
    modes = st.sampled_from(["train", "train", "generate", "eval", "ablate"])
    small = [*TINY[2:], "--max_steps", "2", "--sample_tokens", "3", "--no_wandb",
             "--max_tokens", "4"]
    seen = collections.Counter()

    @hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(modes, typed)
    def law(mode, typed):
        folder = run if mode in ("generate", "eval") else tmp_path / "out"
        argv = ["--mode", mode, *small, "--out_dir", folder]
        argv += ["--vary", "init=zero", "--seeds", "1"] if mode == "ablate" else []
        code, _, err = run_main(*argv, *itertools.chain.from_iterable(typed))
        assert code in (0, 2), err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == (code == 2) and "Traceback" not in err, err
        if code == 2:
            assert err.splitlines()[-1] == lines[0] and len(lines[0]) > 20, err
        seen[mode, code] += 1

    law()
    assert all(seen[mode, code] for mode in ("train", "generate", "eval") for code in (0, 2)), seen


def test_dashes_and_equals_signs_are_understood(tmp_path):
    """--max-steps is --max_steps; a value keeps its dashes."""
    code, _, err = run_main("--mode", "train", "--max-steps=0", "--out-dir", "my-folder")
    assert code == 2 and "--max_steps 0: must be at least 1" in err
    code, _, err = run_main("--mode", "train", "--data=no-such-file", "--out-dir", tmp_path)
    assert code == 2 and "no-such-file" in err


def test_help_lists_modes_presets_and_chapters():
    """--help is the reference; it exits with 0."""
    done = run_command("--help")
    assert done.returncode == 0
    for word in (*PRESETS, "train", "generate", "eval", "Learning", "Generation"):
        assert word in done.stdout


def test_reader_that_leaves_early_is_no_error(tiny_run):
    """`... | head -c 10` closes the pipe while text is still being written."""
    command = [sys.executable, HERE / "minigpt.py", "--mode", "generate", "--out_dir", tiny_run[0],
               "--max_tokens", "3000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 0 and "Traceback" not in err and "Exception" not in err


def test_a_log_that_nobody_reads_is_not_a_success(tmp_path):
    """`train 2>&1 | head -1` ends the run: the exit code says so, as a shell expects (128 + 13)."""
    process = subprocess.Popen([sys.executable, HERE / "minigpt.py", *TINY, "--out_dir", tmp_path,
                                "--max_steps", "5000"], stderr=subprocess.PIPE)
    process.stderr.read(10)
    process.stderr.close()
    assert process.wait(60) == 141


def end_to_end_offline(folder):
    """Everything a user types in a fresh folder without the corpus and without a network."""
    for name in ("minigpt.py", "download_data.py"):
        shutil.copy(HERE / name, folder)
    (folder / "data").mkdir()
    shutil.copy(SAMPLE, folder / "data")
    tiny = [a for a in TINY if a not in ("--data", str(SAMPLE))]
    offline = dict(HTTPS_PROXY="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9",
                   NO_PROXY="", no_proxy="", OMP_NUM_THREADS="1")
    return {name: run_command(*argv, script=script, cwd=folder, **offline)
            for name, script, argv in (
        ("train", "minigpt.py", tiny),
        ("resume", "minigpt.py", ["--mode", "train", "--resume", "--max_steps", "9"]),
        ("eval", "minigpt.py", ["--mode", "eval"]),
        ("generate", "minigpt.py", ["--mode", "generate", "--prompt", "THE TIDE:"]),
        ("download", "download_data.py", []),
        ("import", "download_data.py", ["--source", "data/sample.txt"]))}


@pytest.fixture(scope="session", autouse=True)
def end_to_end(request, tmp_path_factory):
    """Those commands, run beside the other tests: each spends its time on starting up."""
    if not any("end_to_end" in item.name for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("end_to_end")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield folder, pool.submit(end_to_end_offline, folder)


def test_end_to_end_offline(end_to_end):
    """A fresh folder without the corpus and without a network: train falls back to the sample and
    says so, resumes, evaluates and writes, all as a user would type it."""
    folder, done = end_to_end[0], end_to_end[1].result()
    for name in ("train", "resume", "eval", "generate"):
        assert done[name].returncode == 0, done[name].stderr
    assert "Training on the small sample" in done["train"].stderr
    assert "--source" in done["train"].stderr
    assert "at step 6" in done["resume"].stderr
    assert re.search(r"[\d.]+ nats per token", done["eval"].stdout)
    assert done["generate"].stdout.startswith("THE TIDE:")
    assert done["download"].returncode == 2
    assert "\nerror: no source delivered" in done["download"].stderr
    assert done["import"].returncode == 2
    assert done["import"].stderr.startswith("error: data/sample.txt: truncated")
    assert not (folder / "data" / "input.txt").exists()


def test_only_the_three_core_packages_are_needed():
    """Everything else is imported where it is used, so that its absence costs nothing."""
    needed = set()
    for name in ("minigpt.py", "download_data.py"):
        tree = ast.parse((HERE / name).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Import):
                needed |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                needed.add(node.module.split(".")[0])
    assert needed - set(sys.stdlib_module_names) == {"torch", "requests"}
    requirements = (HERE / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert [r for r in requirements if r and not r.startswith("#")] == [
        "torch>=2.9,<=2.13.0", "pytest", "requests"]
