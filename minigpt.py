"""
minigpt: a GPT trained on Shakespeare, from scratch, in one file
================================================================

A language model answers one question over and over: given the text so far, what comes next? This
file builds one that answers it well enough to write verse in the manner of Shakespeare: the
tokenizer, the Transformer, the training loop and the sampler, each explained, written out and run.

    pip install -r requirements.txt && python minigpt.py --mode train     # minutes on a laptop
    python minigpt.py --mode generate --prompt "ROMEO:"                   # write with the result
    python minigpt.py --mode eval                                         # the honest score
    python minigpt.py --mode bench                                        # how fast this machine is
    python minigpt.py --help                                              # every setting

PyTorch supplies tensors, automatic differentiation, Linear and Embedding layers, AdamW and fast
kernels (a kernel is one compiled routine; a fused one does several operations at once). What makes
a GPT a GPT is written here. In PyTorch, calling a module, `model(x)`, runs its `forward(x)`.

The chapters. Each opens with its problem, and with an equation, shapes and an experiment to try
where there are such:

    Configuration       every number you can turn, once, with its meaning
    Text to integers    characters, or byte pairs, become numbers and come back unharmed
    Batches             where the training examples come from: the same text, shifted by one
    The parts           normalization, causal attention, positions, the MLP
    The model           the parts stacked into a GPT, and the bigram baseline it must beat
    Learning            loss, optimizer, learning-rate schedule, honest evaluation
    Checkpoints         a run on disk, safe against crashes
    The training loop   all of it together: batch in, loss out, step
    Generation          from next-token probabilities to text
    Engine room         devices, precision, several processes, logs, data    [optional reading]
    Experiments         one change at a time: which variation helps?         [optional reading]
    The command line    flags in, functions called                           [optional reading]

On a first reading, skip what is marked optional, "Byte-pair encoding", every `Options` paragraph
(variations the field argues about, each switched by a flag), and what opens with `Subtle:`. What is
left is the model of the preset `gpt`. The preset `laptop`, which is what a CPU trains by default,
is made of options: on a second reading, look up those that it sets.
Where an experiment ("Try it") states an outcome, it was run on two CPU cores with seed 1337.

The letters used for shapes, everywhere:

    B   batch: how many sequences are processed side by side
    T   time: how many tokens each sequence has, at most block_size
    C   channels: how many numbers describe one token, n_embd
    V   vocabulary: how many different tokens exist, vocab_size
    nh  number of attention heads, n_head;      hs  head size, C / nh

`(B, T, C)` is a tensor of those sizes. A `step` is one update of the weights by the optimizer; a
`micro-step` computes the gradient on one batch, and a step may add up several.
"""

import argparse
import array
import codecs
import collections
import contextlib
import csv
import datetime
import difflib
import functools
import hashlib
import heapq
import io
import itertools
import json
import math
import netrc
import os
import re
import runpy
import shutil
import signal
import statistics
import sys
import time
import types
import unicodedata
import uuid
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # numpy is not needed here

import torch
import torch.nn as nn
import torch.nn.functional as F

# ==================================================================================================
# Configuration
#
# Problem   A model is defined by a handful of sizes, a training run by a few more numbers. Each
#           should exist in exactly one place, be checked before hours are spent on it, and travel
#           with the weights it produced.
# Answer    Dataclasses: the model's shape, its training, its use. A field carries its
#           default, its meaning and its legal range; the command line is generated from them
#           (`--n_layer 8` exists because `n_layer` does). Checkpoints hold the first two.
# Reading   Skim it. Each number is explained in the chapter that uses it; for now, know where to
#           look.
# Try it    `python minigpt.py --mode train --preset laptop --max_steps 1` prints the number of
#           parameters: 0.8 million. With `--n_layer 8`, twice the layers, it is 1.6; with
#           `--n_embd 256`, twice the width, 3.2. "The model" explains why.
# ==================================================================================================


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: reported as one line, never a traceback.

    The message names the flag or file, the value, and what to do about it."""


class Diverged(UserError):
    """The loss or the weights are no longer finite numbers."""


# Where the value of a setting comes from, and where it goes:
#
#     dataclass default  <-  preset  <-  flag        what stands further right wins
#             |
#             +->  checked here  ->  used by its chapter  ->  stored in the checkpoint


def setting(default, help, choices=None, low=None, high=None, above=None, kind=None, resume=False):
    """A dataclass field that knows its meaning and its legal range.

    low <= value <= high are inclusive bounds and `above` is an exclusive one. `kind` is the type
    when the default is None, which stands for "off". `resume` marks a setting that may change when
    a run is resumed: how long to go on and what to report, but not how the model learns."""
    kind = kind or type(default)
    if kind is int and high is None:
        high = 2**31 - 1
    return field(default=default, metadata=dict(
        help=help, choices=choices, low=low, high=high, above=above, resume=resume, kind=kind))


def check_settings(config) -> None:
    """Raises UserError for the first field of a config that is outside its legal range."""
    for f in fields(config):
        rule, value = f.metadata, getattr(config, f.name)
        if value is None:
            continue
        for broken, demand in (
            (rule["choices"] and value not in rule["choices"],
             f"choose one of {', '.join(rule['choices'] or ())}"),
            (rule["kind"] is float and not math.isfinite(value), "must be a finite number"),
            (rule["low"] is not None and value < rule["low"], f"must be at least {rule['low']}"),
            (rule["high"] is not None and value > rule["high"], f"must be at most {rule['high']}"),
            (rule["above"] is not None and value <= rule["above"],
             f"must be greater than {rule['above']}"),
        ):
            if broken:
                raise UserError(f"--{f.name} {value}: {demand}")


@dataclass
class GPTConfig:
    """The shape of a model: all that is needed to build it, apart from its weights."""

    vocab_size: int = setting(65, "distinct tokens; to be set for --tokenizer bpe only, which "
                              "has 1024 without it", low=1)
    block_size: int = setting(256, "context: the most tokens the model sees at once", low=1)
    n_layer: int = setting(6, "blocks stacked on each other", low=1)
    n_head: int = setting(6, "attention heads in each block", low=1)
    n_embd: int = setting(384, "channels: numbers that describe one token", low=1)
    dropout: float = setting(0.2, "share of activations dropped in training", low=0.0, high=0.9)
    bias: bool = setting(True, "bias vectors in Linear and LayerNorm, as GPT-2 has them")
    norm: str = setting("layernorm", "normalization", choices=("layernorm", "rmsnorm", "none"))
    norm_scale: bool = setting(True, "a learned gain after each normalization")
    norm_position: str = setting("pre", "normalize before each part, or after its addition",
                                 choices=("pre", "post"))
    pos: str = setting("learned", "how the model knows places",
                       choices=("learned", "sinusoidal", "rope"))
    activation: str = setting("gelu", "the bend in the MLP",
                              choices=("gelu", "relu", "relu2", "swiglu"))
    mlp_ratio: float = setting(4.0, "the MLP's inner width over n_embd", above=0.0, high=1000.0)
    qk_norm: bool = setting(False, "normalize queries and keys")
    tie_weights: bool = setting(True, "one matrix for token vectors and output head")
    init: str = setting("gpt2", "start of the projections onto the residual stream: smaller with "
                        "depth (gpt2), like the rest (plain), zero",
                        choices=("gpt2", "plain", "zero"))
    attention: str = setting("fused", "attention and LayerNorm as one kernel each, or explicit: "
                             "written out", choices=("fused", "explicit"))
    model: str = setting("gpt", "the GPT or the bigram baseline", choices=("gpt", "bigram"))

    def __post_init__(self):
        check_settings(self)
        if self.n_embd % self.n_head:
            near = max(self.n_embd // self.n_head, 1) * self.n_head
            raise UserError(f"--n_embd {self.n_embd}: must be divisible by --n_head {self.n_head}, "
                            f"since the heads share the channels; {near} would do")
        if self.pos == "rope" and self.n_embd // self.n_head % 2:
            raise UserError(f"--pos rope: needs an even head size to rotate pairs of channels, not "
                            f"--n_embd {self.n_embd} / --n_head {self.n_head} = "
                            f"{self.n_embd // self.n_head}")
        if self.pos == "sinusoidal" and self.n_embd % 2:
            raise UserError(f"--pos sinusoidal: needs an even --n_embd, not {self.n_embd}, since "
                            "each frequency has a sine and a cosine")
        if self.norm == "none" and self.norm_position == "post":
            raise UserError("--norm_position post: means nothing with --norm none; leave one out")
        if int(self.mlp_ratio * self.n_embd) < 2:
            raise UserError(f"--mlp_ratio {self.mlp_ratio}: leaves the MLP of --n_embd "
                            f"{self.n_embd} fewer than 2 channels; raise it")


@dataclass
class TrainConfig:
    """How a model is trained. The defaults suit GPTConfig's; a preset changes what it must."""

    preset: str = setting("auto", "the named set of settings this run started from")
    tokenizer: str = setting("char", "what a token is: a character, a token of our own BPE (of "
                             "--vocab_size), or of GPT-2's", choices=("char", "bpe", "gpt2"))
    batch_size: int = setting(64, "sequences in one micro-step", low=1)
    grad_accum: int = setting(4, "micro-steps added up into one step", low=1)
    max_steps: int = setting(2000, "steps to train for", low=1, resume=True)
    learning_rate: float = setting(3e-4, "the schedule's peak", above=0.0)
    min_lr: float = setting(3e-5, "where the learning rate ends", low=0.0)
    warmup_steps: int = setting(100, "steps of linear rise to the peak", low=0)
    schedule: str = setting("cosine", "the fall after it", choices=("cosine", "linear"))
    optimizer: str = setting("adamw", "AdamW for all weights, or Muon for the blocks' matrices",
                             choices=("adamw", "muon"))
    momentum: float = setting(0.95, "Muon: memory of the gradient", low=0.0, high=0.9999)
    weight_decay: float = setting(0.1, "pull of the weight matrices towards zero", low=0.0)
    beta1: float = setting(0.9, "AdamW: memory of the gradient", low=0.0, high=0.9999)
    beta2: float = setting(0.99, "AdamW: memory of its square", low=0.0, high=0.99999)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0 is no limit", low=0.0)
    eval_interval: int = setting(250, "steps from one evaluation to the next", low=1, resume=True)
    eval_batches: int = setting(20, "batches in one loss estimate", low=1)
    sample_tokens: int = setting(160, "text shown at an evaluation; 0: none", low=0, resume=True)
    checkpoint_interval: int = setting(500, "steps between snapshots; 0: none", low=0, resume=True)
    log_interval: int = setting(10, "steps between status lines", low=1, resume=True)
    patience: int = setting(0, "stop after so many evaluations without a better one; 0: never",
                            low=0, resume=True)
    seed: int = setting(1337, "start of every random sequence", low=0, high=2**63 - 1)
    dtype: str = setting("auto", "number format of the matrix products", resume=True,
                         choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = setting(False, "run through torch.compile where it works", resume=True)
    wandb: bool = setting(True, "log to Weights & Biases where it is set up", resume=True)

    def __post_init__(self):
        check_settings(self)
        if self.min_lr > self.learning_rate:
            raise UserError(f"--min_lr {self.min_lr}: must be at most --learning_rate "
                            f"{self.learning_rate}")


@dataclass
class GenerateConfig:
    """How text is drawn from a trained model: see "Generation"."""

    prompt: str | None = setting(None, "the text to continue; without it, a line break", kind=str)
    max_tokens: int = setting(200, "tokens to add to the prompt", low=0)
    temperature: float = setting(0.8, "0: always the likeliest; 1: as learned", low=0.0)
    top_k: int | None = setting(None, "draw from the k likeliest tokens only", kind=int, low=1)
    top_p: float | None = setting(None, "draw from the likeliest tokens that reach this sum",
                                  kind=float, above=0.0, high=1.0)
    num_samples: int = setting(1, "continuations to write", low=1)
    stop: str | None = setting(None, "end before this text appears", kind=str)
    cache: bool = setting(True, "keep keys and values instead of computing them again")

    def __post_init__(self):
        check_settings(self)
        if self.prompt == "":
            raise UserError('--prompt "": must not be empty, since the model continues a text; '
                            'leave the flag out to begin at a line break')
        if self.stop == "":
            raise UserError('--stop "": must not be empty; leave the flag out to write on')


@dataclass
class Preset:
    """A named set of settings: what it is for, how long it takes, and what differs from above."""

    about: str
    takes: str
    settings: dict


PRESETS = {
    "gpt": Preset(
        "the reference: 6 layers of 384 channels, as nanoGPT's Shakespeare model",
        "half a day on 2 CPU cores, by the rate of its first steps",
        dict(bias=False, patience=4),
    ),
    "laptop": Preset(
        "the best model that a few minutes on two CPU cores can train",
        "about 3 minutes on 2 CPU cores that know bfloat16, 4 on others",
        dict(n_layer=4, n_head=2, n_embd=128, block_size=128, dropout=0.0, bias=False,
             norm="rmsnorm", norm_scale=False, pos="rope", qk_norm=True, activation="relu2",
             batch_size=16, grad_accum=1, max_steps=1600,
             optimizer="muon", learning_rate=4e-3, momentum=0.85, beta2=0.99, weight_decay=0.2,
             schedule="linear", min_lr=0.0, warmup_steps=50, eval_interval=400, eval_batches=10,
             log_interval=25),
    ),
    "modern": Preset(
        "the reference's size with what has been found since: RoPE, SwiGLU, Muon",
        "never tried to its end; the status line tells",
        dict(bias=False, norm="rmsnorm", pos="rope", qk_norm=True, activation="swiglu",
             optimizer="muon", learning_rate=3e-3, beta2=0.95, schedule="linear",
             min_lr=0.0, grad_accum=1),
    ),
    "mini": Preset(
        "two wide layers, a step up from the laptop model",
        "half an hour on 2 CPU cores, by the rate of its first steps",
        dict(n_layer=2, n_head=8, n_embd=256, block_size=128, dropout=0.1,
             batch_size=64, grad_accum=1, max_steps=3000, learning_rate=1e-3, min_lr=1e-4),
    ),
    "bpe": Preset(
        "our own byte-pair encoding instead of characters: more text in each window",
        "a quarter of an hour on 2 CPU cores, by the rate of its first steps",
        dict(tokenizer="bpe", vocab_size=1024, n_layer=4, n_head=4, n_embd=192, block_size=256,
             mlp_ratio=2.0, dropout=0.1, batch_size=16, grad_accum=1, max_steps=2000),
    ),
    "gpt2": Preset(
        "GPT-2 small's shape, for large corpora (--data) and large GPUs",
        "too long for a CPU",
        dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.0,
             batch_size=8, grad_accum=8, learning_rate=6e-4, min_lr=6e-5, beta2=0.95,
             checkpoint_interval=0, patience=4),
    ),
    "bigram": Preset(
        "the baseline: the next character from this character alone",
        "seconds",
        dict(model="bigram", block_size=64, batch_size=64, grad_accum=1, max_steps=1000,
             learning_rate=5e-2, min_lr=5e-3, weight_decay=0.0, log_interval=100),
    ),
}

# ==================================================================================================
# Text to integers
#
# Problem   A network computes with numbers; text is characters. We need a map from text to integers
#           and back that loses nothing.
# Answer    Number the distinct characters of the corpus in sorted order. `stoi` ("string to
#           integer") encodes, `itos` decodes, and decode(encode(text)) == text for every text over
#           those characters. Tiny Shakespeare has V = 65 of them: letters, a little punctuation,
#           the digit 3, the space and the line break.
# Shapes    str of n characters -> list of n integers in [0, V)
# Try it    Build a tokenizer from "hello" alone and encode "hell", then "help": the second is
#           refused, naming 'p'. A model can only be asked about what it could have seen.
#
# The integers mean nothing by their size: 'b' is not "more" than 'a'. The model looks each one up
# in a table of learned vectors (nn.Embedding), and there the likenesses between them arise.
# ==================================================================================================


class CharTokenizer:
    """One token per distinct character.

    >>> tokenizer = CharTokenizer.train("to be")
    >>> tokenizer.itos                                 # sorted: the space comes first
    [' ', 'b', 'e', 'o', 't']
    >>> tokenizer.encode("to be")
    [4, 3, 0, 1, 2]
    >>> tokenizer.decode([1, 2, 2])
    'bee'
    """

    kind, end = "char", None  # there is no token for the end of a text

    def __init__(self, itos: list[str]):
        self.itos = list(itos)
        self.stoi = {character: i for i, character in enumerate(self.itos)}

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The vocabulary of a text: its distinct characters, sorted."""
        return cls(sorted(set(text)))

    @property
    def vocab_size(self) -> int:
        return len(self.itos)

    def encode(self, text: str) -> list[int]:
        """Text to ids. Raises UserError, naming the character, for one outside the vocabulary."""
        try:
            return [self.stoi[character] for character in text]
        except KeyError as missing:
            c = missing.args[0]
            raise UserError(f"the character {c!r} (U+{ord(c):04X}) is not in the vocabulary of "
                            f"{self.vocab_size} characters; leave it out, or train on a text that "
                            "has it") from None

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""
        return "".join([self.itos[i] for i in ids])

    def stream(self, ids):
        """The same, id by id, as they come."""
        return (self.itos[i] for i in ids)

    def to_dict(self) -> dict:
        """Plain values that describe the tokenizer, for checkpoints and files."""
        return {"kind": self.kind, "itos": self.itos}

    @classmethod
    def from_dict(cls, state: dict) -> "CharTokenizer":
        return cls(state["itos"])

    def save(self, folder) -> None:
        """Writes folder/chars.json."""
        path = Path(folder) / "chars.json"
        path.write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder) -> "CharTokenizer":
        """Reads what save wrote."""
        return cls.from_dict(json.loads((Path(folder) / "chars.json").read_text(encoding="utf-8")))


# ---- Byte-pair encoding --------------------------------------------------------------------------
#
# Problem   Characters are safe but slow: "the" costs three steps of the model, and a context of 256
#           is half a dozen lines of verse. Whole words are short but brittle: the next text has new
#           ones.
# Answer    Begin with the 256 bytes, of which every text in UTF-8 is made. Find the pair of
#           neighbours that is most frequent, make it a new token, and again, until the vocabulary
#           is full [Sennrich et al. 2016, section 3.2; on bytes: Radford et al. 2019, section 2.2].
#           Frequent words become one token, rare ones a few, and nothing is unknown.
# Example   "aaabdaaabac" -> aa becomes X: "XabdXabac" -> ab becomes Y: "XYdXYac" -> XY becomes Z:
#           "ZdZac". Eleven tokens have become five.
# Ties      Among equally frequent pairs the one with the smaller ids wins, the first token first.
#           Ids count the bytes in the order of BYTES, below, then the merges as they are learned.
# Encoding  Apply the merges to a new text in the order in which they were learned.
# Try it    BPETokenizer.train(text, 1024) on Tiny Shakespeare: the first merges are " t", "he",
#           " a", "ou" and " s", and the 1.1 million characters become 460,000 tokens.
#
# Pieces    Merges never cross a boundary that GPT-2's pattern draws: between letters, digits and
#           punctuation, with a space kept in front of what it precedes. So "dog." and "dog!" do not
#           become two words, and each distinct piece need be worked on only once.


END_OF_TEXT = "<|endoftext|>"  # one token of its own; where it is drawn, the writing ends


@functools.cache
def piece_pattern(ascii: bool = False) -> re.Pattern:
    r"""GPT-2's pattern, '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    Python's re knows no \p{L} (letter) and \p{N} (number), so the classes are spelled out from
    the Unicode tables; and its \s holds four control characters more than GPT-2's. On a text that
    is all ASCII, classes as short as [A-Za-z] do the same in a quarter of the time.

    >>> piece_pattern().findall("Who's there?  Nay, 2 answer")
    ['Who', "'s", ' there', '?', ' ', ' Nay', ',', ' 2', ' answer']
    """
    runs, last = {"L": "", "N": ""}, 127 if ascii else sys.maxunicode
    categories = (unicodedata.category(chr(code))[0] for code in range(last + 1))
    code = 0
    for kind, run in itertools.groupby(categories):
        first, code = code, code + sum(1 for _ in run)
        if kind in runs:
            runs[kind] += f"\\U{first:08x}-\\U{code - 1:08x}"
    L, N = runs["L"], runs["N"]
    S = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(rf"'(?:[sdmt]|ll|ve|re)| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+"
                      rf"|[{S}]+(?![^{S}])|[{S}]+")


def split_pieces(text: str):
    """Yields lists of pieces, one for each stretch of text between two END_OF_TEXT.

    Lone surrogates, halves of a character that UTF-8 cannot write, become U+FFFD each."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return map(piece_pattern(text.isascii()).findall, text.split(END_OF_TEXT))


# The 256 bytes in GPT-2's order, and the printable character that stands for each in its files:
# itself where it has a visible shape, one from U+0100 on where it has none.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES += [byte for byte in range(256) if byte not in BYTES]
SHOWN = [chr(byte if i < 188 else 256 + i - 188) for i, byte in enumerate(BYTES)]

# While we merge, a piece is a str in a private alphabet: the character chr(i) is token i. So one
# merge is one str.replace, at the speed of C, and a pair of tokens is a str of two characters.
BYTE_TO_TOKEN = {byte: chr(i) for i, byte in enumerate(BYTES)}


def whole_pieces(chunks):
    """The same text in chunks that end where a piece ends: before a space or a line break that
    follows something visible.

    >>> list(whole_pieces(["to b", "e or ", "not"]))
    ['to', ' be or', ' not']
    """
    held = ""
    for chunk in chunks:
        first, held = max(len(held), 1), held + chunk  # what was held has no such place in it
        for cut in range(len(held) - 1, first - 1, -1):
            if held[cut] in " \n" and not held[cut - 1].isspace():
                yield held[:cut]
                held = held[cut:]
                break
    yield held


def to_tokens(piece: str) -> str:
    """A piece of text in the private alphabet, one character for each of its UTF-8 bytes."""
    return piece.encode("utf-8").decode("latin-1").translate(BYTE_TO_TOKEN)


def pairs_of(word: str):
    """The neighbours in a word: "abc" -> "ab", "bc"."""
    return [a + b for a, b in zip(word, word[1:])]


def merge(word: str, pair: str, token: str) -> tuple[str, list[str], list[str]]:
    """Replaces pair by token in word. Also returns the neighbour pairs that went and that came.

    The work lies where the merges are, not in the length of the word: "xabyab".split("ab") gives
    the stretches "x", "y", "", and between two of them stands one merge.

    >>> merge("xabyab", "ab", "Z")
    ('xZyZ', ['xa', 'by', 'ya'], ['xZ', 'Zy', 'yZ'])
    """
    a, b, parts = pair[0], pair[1], word.split(pair)
    gone, born = [], []
    for i, part in enumerate(parts):
        if part and i > 0:  # something was merged just before this part
            gone.append(b + part[0])
            born.append(token + part[0])
        if part and i < len(parts) - 1:  # and just after
            gone.append(part[-1] + a)
            born.append(part[-1] + token)
        if not part and 0 < i < len(parts) - 1:  # two merges side by side
            gone.append(b + a)
            born.append(token + token)
    return token.join(parts), gone, born


def stream_utf8(pieces):
    """Yields the text of pieces of bytes; a character comes with the last of its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


class BPETokenizer:
    """Byte-level BPE, in GPT-2's format.

    >>> tokenizer = BPETokenizer.train("low lower lowest low low", vocab_size=260)
    >>> tokenizer.merges
    [(b'l', b'o'), (b'lo', b'w'), (b' ', b'low')]
    >>> [tokenizer.decode([i]) for i in tokenizer.encode(" lowly")]
    [' low', 'l', 'y']
    """

    kind = "bpe"

    def __init__(self, merges: list[tuple[bytes, bytes]]):
        """merges: pairs of tokens, in the order in which they were learned. The place of a merge in
        this list, from 0 on, is its rank."""
        self.merges = merges
        # Subtle: in a file of other origin two merges may make one token (ab + c, a + bc).
        self.tokens = list(dict.fromkeys([bytes([byte]) for byte in BYTES]
                                         + [a + b for a, b in merges]))
        token_of = {token: chr(i) for i, token in enumerate(self.tokens)}
        self.pairs = [token_of[a] + token_of[b] for a, b in merges]  # by rank
        self.made = [token_of[a + b] for a, b in merges]
        self.ranks = {pair: rank for rank, pair in enumerate(self.pairs)}
        self.cache = {}
        self.end = len(self.tokens)
        self.tokens.append(END_OF_TEXT.encode())

    @classmethod
    def train(cls, text, vocab_size: int) -> "BPETokenizer":
        """Learns at most vocab_size - 257 merges (256 bytes and the end of text are there already);
        fewer when no pair is left that occurs twice. text: a str, or the chunks of a long one.

        Each distinct piece is kept once, with its count. `counts` says how often a pair occurs,
        `where` in which pieces it may; a merge touches those pieces and no others. The heap hands
        out the most frequent pair; an entry whose count has changed goes back with the new one."""
        if vocab_size < 257:
            raise UserError(f"--vocab_size {vocab_size}: must be at least 257, for the 256 bytes "
                            f"and {END_OF_TEXT}")
        pieces = collections.Counter()
        for chunk in whole_pieces([text] if isinstance(text, str) else text):
            pieces.update(itertools.chain.from_iterable(split_pieces(chunk)))
        words, freqs = [to_tokens(piece) for piece in pieces], list(pieces.values())
        counts, where = collections.Counter(), collections.defaultdict(set)
        for i, (word, freq) in enumerate(zip(words, freqs)):
            for pair in pairs_of(word):
                counts[pair] += freq
                where[pair].add(i)
        heap = [(-count, pair) for pair, count in counts.items()]
        heapq.heapify(heap)
        tokens, merges = [bytes([byte]) for byte in BYTES], []
        while heap and len(tokens) < vocab_size - 1:
            count, pair = heapq.heappop(heap)
            if -count != counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
                continue
            if -count < 2:
                break
            a, b = (tokens[ord(token)] for token in pair)
            merges.append((a, b))
            token, changed = chr(len(tokens)), set()
            tokens.append(a + b)
            del counts[pair]
            for i in where.pop(pair):
                words[i], gone, born = merge(words[i], pair, token)
                for p in gone:
                    counts[p] -= freqs[i]
                for p in born:
                    counts[p] += freqs[i]
                    where[p].add(i)
                changed.update(born)
            for p in changed:
                heapq.heappush(heap, (-counts[p], p))
        return cls(merges)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode_piece(self, piece: str) -> list[int]:
        """Merges one piece, always the pair that was learned first, until none is left."""
        word = to_tokens(piece)
        ranks = list({self.ranks[pair] for pair in pairs_of(word) if pair in self.ranks})
        heapq.heapify(ranks)
        while ranks:
            rank = heapq.heappop(ranks)
            word, _, born = merge(word, self.pairs[rank], self.made[rank])
            for pair in set(born):
                if pair in self.ranks:
                    heapq.heappush(ranks, self.ranks[pair])
        return [ord(token) for token in word]

    def encode(self, text: str) -> list[int]:
        """Text to ids: any text. Each distinct piece is merged once and then remembered."""
        ids, cache = [], self.cache
        for i, pieces in enumerate(split_pieces(text)):
            if i > 0:
                ids.append(self.end)
            for piece in set(pieces).difference(cache):
                cache[piece] = self.encode_piece(piece)
            ids.extend(itertools.chain.from_iterable(map(cache.__getitem__, pieces)))
        return ids

    def decode(self, ids: list[int]) -> str:
        """Ids to text; bytes that are not UTF-8, as of half a character, become U+FFFD."""
        return b"".join([self.tokens[i] for i in ids]).decode("utf-8", errors="replace")

    def stream(self, ids):
        """The same, id by id: a character comes out when the last of its bytes is there."""
        return stream_utf8(self.tokens[i] for i in ids)

    def shown(self, token: bytes) -> str:
        """A token as GPT-2's files write it: a space is Ġ, a line break Ċ."""
        return "".join(SHOWN[ord(BYTE_TO_TOKEN[byte])] for byte in token)

    def to_dict(self) -> dict:
        return {"kind": self.kind,
                "merges": [f"{self.shown(a)} {self.shown(b)}" for a, b in self.merges]}

    @classmethod
    def from_dict(cls, state: dict) -> "BPETokenizer":
        to_byte = dict(zip(SHOWN, BYTES))
        return cls([tuple(bytes(to_byte[c] for c in token) for token in line.split(" "))
                    for line in state["merges"]])

    def save(self, folder) -> None:
        """Writes folder/vocab.json and folder/merges.txt, as GPT-2 has them."""
        vocab = {self.shown(token): i for i, token in enumerate(self.tokens[: self.end])}
        vocab[END_OF_TEXT] = self.end
        text = json.dumps(vocab, ensure_ascii=False)
        (Path(folder) / "vocab.json").write_text(text, encoding="utf-8")
        lines = ["#version: 0.2", *self.to_dict()["merges"], ""]
        (Path(folder) / "merges.txt").write_bytes("\n".join(lines).encode("utf-8"))

    @classmethod
    def load(cls, folder) -> "BPETokenizer":
        """Reads what save wrote, or GPT-2's own files (their ids follow from the merges)."""
        lines = (Path(folder) / "merges.txt").read_text(encoding="utf-8").split("\n")
        return cls.from_dict({"merges": [line for line in lines[1:] if line]})


class GPT2Tokenizer:
    """GPT-2's own 50,257 tokens, through the library tiktoken. Raises UserError without it."""

    kind, vocab_size, end = "gpt2", 50257, 50256

    def __init__(self):
        try:
            import tiktoken

            self.encoding = tiktoken.get_encoding("gpt2")
        except ImportError:
            raise UserError("--tokenizer gpt2: needs tiktoken; pip install tiktoken, or use "
                            "--tokenizer bpe") from None
        except Exception as problem:  # it fetches its file at the first use, by whatever means
            raise UserError(f"--tokenizer gpt2: tiktoken cannot get its vocabulary "
                            f"({type(problem).__name__}); connect once, or use --tokenizer bpe"
                            ) from None

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def stream(self, ids):
        return stream_utf8(self.encoding.decode_single_token_bytes(i) for i in ids)

    def to_dict(self) -> dict:
        return {"kind": self.kind}

    @classmethod
    def from_dict(cls, state: dict) -> "GPT2Tokenizer":
        return cls()


TOKENIZERS = {"char": CharTokenizer, "bpe": BPETokenizer, "gpt2": GPT2Tokenizer}


def make_tokenizer(kind: str, text: "Text", vocab_size: int | None):
    """A new tokenizer for a text (`Text`, of "Engine room", is a file that is read in chunks).

    BPE learns from the training part alone, so that the validation text has no say in it;
    characters are taken from the whole, since none may be missing."""
    if kind == "bpe":
        return BPETokenizer.train(text.chunks("train"), vocab_size or 1024)
    return CharTokenizer(text.alphabet) if kind == "char" else GPT2Tokenizer()


def start_ids(tokenizer) -> list[int]:
    """What a text begins with when there is no prompt: a line break, or else token 0."""
    try:
        return tokenizer.encode("\n")
    except UserError:
        return [0]


# ==================================================================================================
# Batches
#
# Problem   To learn "what comes next", we need pairs of a context and the token that followed it.
# Answer    The text is its own answer key: the targets are the same tokens, shifted by one.
#
#               text      T  o  _  b  e           (_ is the space)
#               x         T  o  _  b              input:  4 tokens
#               y            o  _  b  e           target: the token that follows each of them
#
#           One sequence of T tokens holds T examples at once: T -> o, To -> _, To_ -> b, To_b -> e.
#           Causal attention (see "The parts") is what lets the model work on all of them in one
#           pass, without any position seeing its own answer.
# Shapes    tokens (N,) -> x (B, T), y (B, T)
# Try it    In get_batch, below, set y = windows[:, :-1], a shift of zero, and train the laptop
#           preset with --max_steps 250. At step 50 the loss is below 0.01, and the last sample is
#           empty, one line break after another: the model has learned to copy. The score in the
#           last line, computed elsewhere with a shift of its own, is not fooled: 10.3.
# ==================================================================================================


@dataclass
class Corpus:
    """A text as tokens, split in two by position.

    The last tenth is held out: the model never trains on it, so the loss there measures what was
    learned and not what was memorized. Splitting by position, and not by shuffling lines, keeps
    neighbours of a validation line out of the training split."""

    train: "MappedTokens"  # (N,) integers in a file, used like a tensor
    val: "MappedTokens"
    val_characters: int  # that the tokens of val stand for, but for the first token
    sha256: str  # of the text, to notice if a run is resumed or scored on another one
    path: str | None = None  # the file, if the user named one


def encode_corpus(text: "Text", tokenizer, block_size: int, folder: Path, path=None) -> Corpus:
    """Encodes both parts of a text into files in folder and maps these into memory (see "Large
    corpora" in the engine room). Raises UserError if a part is too short for a single window."""
    train, val = (encode_to_file(text, part, tokenizer, folder) for part in ("train", "val"))
    for name, part in (("training", train), ("validation", val)):
        if len(part) <= block_size:
            raise UserError(f"--data: the corpus is too short: its {name} part has {len(part)} "
                            f"tokens, and --block_size {block_size} needs at least "
                            f"{block_size + 1}; use a longer text or a smaller --block_size")
    characters = text.length - text.split - len(tokenizer.decode(val[:1].tolist()))
    return Corpus(train, val, characters, text.sha256, path)


def get_batch(tokens, block_size, batch_size, generator=None, device="cpu"):
    """batch_size windows from random places of tokens (N,): x (B, T) and y (B, T), both int64.

    The places are drawn from `generator`. Training owns one of its own, whose state goes into the
    checkpoint, so that nothing else that draws random numbers moves the order of the batches.

    >>> x, y = get_batch(torch.arange(5), block_size=4, batch_size=1)
    >>> x.tolist(), y.tolist()                         # one place only: a window is 4 + 1 tokens
    ([[0, 1, 2, 3]], [[1, 2, 3, 4]])
    """
    # Subtle: a window takes block_size + 1 tokens, so the last start is len - block_size - 1, and
    # randint's upper end is exclusive.
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(block_size + 1)].long()  # (B, T + 1)
    x, y = windows[:, :-1], windows[:, 1:]
    return x.to(device), y.to(device)


# ==================================================================================================
# The parts
#
# Inside a GPT each token is a vector of C numbers. There are two kinds of work to do: tokens must
# exchange information (attention), and each must digest what it received (the MLP). Around these
# stand three aids: normalization keeps the numbers in a range where learning works, position
# vectors tell the model about order, and dropout keeps it from learning by heart.
#
# Dropout   sets a random share p of the numbers to zero and divides the others by 1 - p, so that
#           the model cannot rely on a single path [Srivastava et al. 2014]. It acts in training
#           only: model.train() switches it on and model.eval() off.
#
# The names of the parts (c_attn, c_proj, c_fc, ln_1, wte, wpe, h) are those of GPT-2's published
# weights, so that other tools find their way.
# ==================================================================================================

# ---- Normalization -------------------------------------------------------------------------------
#
# Problem   Layer upon layer, numbers grow or shrink by orders of magnitude, and a layer can only
#           learn from inputs whose scale it can rely on.
# Equation  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
#           [Ba et al. 2016, sections 3 and 3.1, where weight is the gain g; eps is added]
#           over the C channels of one token, so that no token depends on another, nor on the batch.
# Example   x = [1, 3]: mean 2, variance 1 -> [-1, 1], before weight and bias.
# Shapes    (B, T, C) -> (B, T, C)


class LayerNorm(nn.Module):
    """Centre and rescale each token's channels; then a learned gain and, optionally, a bias."""

    eps = 1e-5  # keeps a constant input from dividing by zero

    def __init__(self, n_embd: int, bias: bool = True, scale: bool = True, fused: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd)) if scale else None
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None
        self.fused = fused

    def forward(self, x):
        if self.fused:  # the same function as one kernel
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        x = x - x.mean(dim=-1, keepdim=True)
        var = x.square().mean(dim=-1, keepdim=True)  # (B, T, 1); divided by C, not by C - 1
        y = x * torch.rsqrt(var + self.eps)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


# Options   --norm rmsnorm: centring turns out to matter little, so leave it out.
#           y = x / sqrt(mean(x^2) + eps) * weight   [Zhang and Sennrich 2019, equation 4; plus eps]
# Example   x = [3, 4]: mean square 12.5 -> [0.85, 1.13]


class RMSNorm(nn.Module):
    """Rescale each token's channels to a root mean square of 1; then a learned gain."""

    eps = 1e-5

    def __init__(self, n_embd: int, scale: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd)) if scale else None

    def forward(self, x):
        # Subtle: the stream is float32, but queries and keys may come in 16 bits, where squares
        # are too coarse and may overflow.
        y = x.float()
        mean_square = y.norm(dim=-1, keepdim=True).square() / y.shape[-1]  # |x|^2 is the sum of x^2
        y = (y * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
        return y if self.weight is None else y * self.weight


def make_norm(config: GPTConfig) -> nn.Module:
    """The normalization that a config asks for, over n_embd channels."""
    if config.norm == "none":
        return nn.Identity()
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_scale)
    return LayerNorm(config.n_embd, config.bias, config.norm_scale, config.attention == "fused")


# ---- Causal self-attention -----------------------------------------------------------------------
#
# Problem   In "the queen spoke and all obeyed her" (think of words as tokens for a moment), `her`
#           needs to find `queen`: a token must gather from the tokens before it, and which of them
#           matter depends on what they are.
# Answer    Each token asks a question (its query q), advertises what it has (its key k) and
#           carries a message (its value v). All three are linear functions of its vector. How well
#           a query fits a key is their dot product, the score. A softmax turns the scores of a
#           token's query with its own key and all earlier ones into weights; the answer is the
#           weighted mean of the values.
# Softmax   softmax(s)_i = exp(s_i) / sum_j exp(s_j): any scores become positive weights that sum to
#           1, the larger the score the larger its share.
# Equation  Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k) + mask) V
#           [Vaswani et al. 2017, section 3.2.1; the mask is their section 3.2.3]
#           Q, K, V are `q`, `k`, `v`; d_k is the head size `hs`.
# The mask  Position t may look at positions up to t: anything later is what it has to predict. A
#           score of minus infinity becomes a weight of exactly zero.
#
#                       key    T    o    _    b
#               query T        .  -inf -inf -inf           . is a score that stays
#               query o        .    .  -inf -inf
#               query _        .    .    .  -inf
#               query b        .    .    .    .
#
# The root  A dot product of two vectors of hs independent numbers of mean 0 and variance 1 has the
#           variance hs. Dividing by sqrt(hs) undoes that: whatever the head size, the softmax
#           stays soft, and does not freeze into a hard choice of one.
# Example   hs = 1; one query, 2; two keys, 1 and 3; their values, 10 and 20. Scores 2 and 6,
#           weights 0.018 and 0.982, answer 0.018 * 10 + 0.982 * 20 = 19.8.
# Heads     One softmax can focus on one thing at a time. nh heads of size C / nh each have their
#           own q, k and v, and c_proj mixes what they found, at about the cost of one large head
#           [section 3.2.2].
# Shapes    (B, T, C) -> q, k, v (B, nh, T, hs) -> scores (B, nh, T, T) -> (B, nh, T, hs)
#           -> (B, T, C)
# Try it    Delete the line of `attend` that adds the mask and train the laptop preset with
#           --attention explicit --max_steps 250: from step 75 on the loss is below 0.05, since
#           every position can read its answer off its neighbour, and the score in the last line,
#           0.02, is fooled too. The last sample is empty, nothing but line breaks: at writing time
#           there is no neighbour to read from.


# Options   The line of `forward` that makes `qk` does nothing more unless asked to: queries and
#           keys may be normalized (--qk_norm, here by RMSNorm; the idea: [Henry et al. 2020]),
#           which bounds the scores by sqrt(hs) times the gains; and they may be rotated (--pos
#           rope, under "Positions"). As both get the same treatment, they stay side by side in one
#           tensor until it is done: that makes fewer passes over memory, which is what a small
#           model on a CPU waits for. The `cache` is for writing: see "Generation".


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no position sees a later one."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.explicit = config.attention == "explicit"
        # Three projections in one matrix product: q, k and v stand side by side in its output.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        hs = config.n_embd // config.n_head
        self.qk_norm = RMSNorm(hs, config.norm_scale) if config.qk_norm else nn.Identity()
        rope = config.pos == "rope"
        self.rotate = Rotary(config.block_size, hs) if rope else lambda qk, start: qk

    def forward(self, x, cache=None):
        B, T, C = x.shape
        nh, hs = self.n_head, C // self.n_head
        start = 0 if cache is None else cache.length  # tokens that came in earlier calls
        qk, v = self.c_attn(x).split((2 * C, C), dim=2)
        qk = self.rotate(self.qk_norm(qk.view(B, T, 2 * nh, hs)), start)
        q, k = qk.transpose(1, 2).split(nh, dim=1)  # (B, nh, T, hs) each
        v = v.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, S, hs): of all S tokens so far
        # Subtle: on a CPU in bfloat16 the kernel's backward pass is the slower way.
        slow = self.training and q.dtype == torch.bfloat16 and q.device.type == "cpu"
        if self.explicit or slow or 1 < T < k.shape[2]:
            y = self.attend(q, k, v)
        else:  # the same function as one kernel, which need not store the (T, T) matrix
            dropout = self.attn_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q, k, v):
        """The equation, line by line: three tensors (B, nh, T, hs) -> (B, nh, T, hs).

        With a cache there are S >= T keys and values, and the queries are of the last T places."""
        T, S, hs = q.shape[-2], k.shape[-2], q.shape[-1]
        scores = (q / math.sqrt(hs)) @ k.transpose(-2, -1)  # (B, nh, T, S): row asks, column tells
        mask = torch.full((T, S), float("-inf"), device=q.device).triu(diagonal=1 + S - T)
        scores = scores + mask.to(q.dtype)
        weights = torch.softmax(scores, dim=-1)  # each row sums to 1
        return self.attn_dropout(weights) @ v


# ---- Positions -----------------------------------------------------------------------------------
#
# Problem   Attention takes a mean over a set: shuffle the earlier tokens, and a layer gives the
#           last one the same answer. But "dog bites man" is not "man bites dog".
# Learned   A vector for each place 0 .. block_size - 1, learned, is added to the token's own vector
#           [Radford et al. 2018, section 3.1]. That is one line of GPT.forward, in the next
#           chapter. The price: there is no vector for place block_size, so the context is bounded.
#
# Options   Two variants need nothing learned (--pos). Their formulas go on for ever; here their
#           tables end at block_size too.
#
# Sinusoid  The vector of place t holds sin(t w_i) and cos(t w_i), w_i = 10000^(-2i/C), for i below
#           C/2 [Vaswani et al. 2017, section 3.5]: hands of clocks that run at different speeds. To
#           move by s places is to turn each hand by s w_i, whatever t is. The paper multiplies the
#           token vectors by sqrt(C) before it adds (its section 3.4); we divide the table instead,
#           so that the sum is theirs divided by sqrt(C).
# RoPE      Add nothing. Turn the queries and keys themselves, as such hands: channels i and
#           i + hs/2 of a head form a vector in the plane, turned by t w_i at place t (with hs for
#           C in w_i). The dot product of a query at t with a key at s then depends on
#           t - s alone [Su et al. 2021, section 3.2.2; they pair channels 2i and 2i + 1, which only
#           renames them].
# Example   hs = 2, w_0 = 1: a query (1, 0) at place 2 and a key (1, 0) at place 1 have the score
#           cos(2 - 1) = 0.54. At places 12 and 11 it is 0.54 again.


def angles(n_places: int, n_channels: int) -> torch.Tensor:
    """t w_i for each place t and each pair of channels i: (n_places, n_channels / 2)."""
    w = 10000.0 ** (-torch.arange(0, n_channels, 2) / n_channels)
    return torch.outer(torch.arange(n_places).float(), w)


def sinusoids(n_places: int, n_embd: int) -> torch.Tensor:
    """The fixed table of position vectors, (n_places, n_embd)."""
    a = angles(n_places, n_embd)
    return torch.stack([a.sin(), a.cos()], dim=-1).flatten(1) / math.sqrt(n_embd)


class Rotary(nn.Module):
    """Turns queries and keys (B, T, 2 nh, hs) according to their places, start and following."""

    def __init__(self, n_places: int, hs: int):
        super().__init__()
        a = angles(n_places, hs)  # (block_size, hs / 2)
        # A buffer moves to the device with the model; it is not learned, and here not saved.
        self.register_buffer("cos", a.cos(), persistent=False)
        self.register_buffer("sin", a.sin(), persistent=False)

    def forward(self, x, start=0):
        places = slice(start, start + x.shape[1])
        cos, sin = (table[places, None].to(x.dtype) for table in (self.cos, self.sin))
        x1, x2 = x.chunk(2, dim=-1)  # (B, T, 2 nh, hs / 2) each
        return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


# ---- The MLP -------------------------------------------------------------------------------------
#
# Problem   Attention only forms weighted means of values. Something has to compute with them.
# Equation  MLP(x) = GELU(x W_1 + b_1) W_2 + b_2, at each position alone
#           [Vaswani et al. 2017, section 3.3, with max(0, x) where GPT has GELU]
#           W_1 is `c_fc`, W_2 is `c_proj` (a Linear stores W transposed: out x in); the middle is
#           four times as wide as the ends.
#           GELU(x) = x * Phi(x), Phi being the cumulative distribution of the standard normal: a
#           smooth max(0, x). GPT-2 uses its tanh form [Hendrycks and Gimpel 2016, section 2]:
#           0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
# Example   GELU(2) = 1.95, GELU(0) = 0, GELU(-2) = -0.05: nearly x, nothing, nearly nothing.
# Shapes    (B, T, C) -> (B, T, mlp_ratio C) -> (B, T, C)
# Options   --activation relu: max(0, x). relu2: its square [So et al. 2021]. swiglu: no longer one
#           bend but a product, silu(x W) * (x U), in which one half gates the other, with
#           silu(z) = z sigmoid(z) [Shazeer 2020, section 2]. W and U lie side by side in `c_fc`; as
#           there are two of them, the middle is 2/3 as wide, for nearly the same number of weights.


def swiglu(x):
    """(B, T, 2H) -> (B, T, H): the first half, bent by silu(z) = z sigmoid(z), gates the second."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS = {
    "gelu": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "swiglu": swiglu,
}


class MLP(nn.Module):
    """Two linear maps with a bend between them, applied to each token by itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        gated = config.activation == "swiglu"
        hidden = int(config.mlp_ratio * config.n_embd * (2 / 3 if gated else 1))
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden if gated else hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.activation(self.c_fc(x))  # (B, T, mlp_ratio C)
        return self.dropout(self.c_proj(x))


# ==================================================================================================
# The model
#
# Problem   Stack the parts so that a deep network still learns.
# Answer    Each block adds its work to its input and passes the sum on [He et al. 2016a, section
#           3]. From the first block to the last there is a straight road of additions, the residual
#           stream, and along it a gradient arrives whole [He et al. 2016b, section 2]. The norm
#           sits on the side roads, before each part ("pre-norm"), and leaves the main road alone;
#           one more, ln_f, follows the last block [Radford et al. 2019, section 2.3].
#
#               x ----+------------------------> (+) ----+----------------------> (+) ---->
#                     |                           ^      |                         ^
#                     +--> ln_1 --> attention ----+      +--> ln_2 --> MLP --------+
#
# Options   The first Transformer normalized on the main road, after each addition: "post-norm"
#           (--norm_position post) [Vaswani et al. 2017, section 3.1]. What leaves a block is then
#           normalized, ln_f has nothing left to do, and gradients pass through every norm.
#
#               x ----+------------------> (+) --> ln_1 --+------------> (+) --> ln_2 ---->
#                     |                     ^             |               ^
#                     +--> attention -------+             +--> MLP -------+
#
# Shapes    idx (B, T) -> vectors (B, T, C) -> n_layer blocks -> ln_f -> lm_head: logits (B, T, V)
#           logits[b, t, v] is a score for token v as the successor of idx[b, t], given all tokens
#           up to t. A softmax over v makes the V scores probabilities.
# Count     A block has 4 C^2 weights in attention (3 for q, k, v and 1 for c_proj) and 8 C^2 in the
#           MLP: 12 C^2 n_layer in matrices, and V C + block_size C in the two tables. The vectors
#           of norms and biases are few.
# Try it    In Block.forward, leave out the last two `x +`. The laptop preset with --max_steps 400
#           then scores 2.58, worse than the bigram baseline's 2.48. With them it scores 1.66.
# ==================================================================================================


class Block(nn.Module):
    """One layer: tokens communicate, then each computes."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        self.post_norm = config.norm_position == "post"

    def forward(self, x, cache=None):
        if self.post_norm:
            x = self.ln_1(x + self.attn(x, cache))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class LanguageModel(nn.Module):
    """What the GPT and the bigram baseline share: a loss, a size, and a way to write text."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config

    def loss(self, logits, targets):
        """Cross-entropy: the mean of -log(probability given to the token that really came).

        A model that knows nothing gives each of V tokens the probability 1/V and has the loss ln V,
        4.17 for V = 65; a perfect one has 0. The unit is the nat, a bit of natural logarithm (ln 2
        nats are one bit). exp(loss) is the perplexity: the model is as unsure as if it had to
        choose among so many equally likely tokens.

        logits (B, T, V) of any float type, targets (B, T) int64 -> scalar float32."""
        # cross_entropy takes the softmax of each row, then -log of the target's entry.
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def new_caches(self) -> list:
        """A cache for each layer of attention, for generating: here there is none."""
        return []

    def num_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 generator=None, use_cache=True):
        """Continues idx (B, T) by max_new_tokens tokens: (B, T + max_new_tokens).

        temperature 0 always takes the likeliest token; top_k and top_p restrict the choice; a
        torch.Generator makes it repeatable. "Generation" tells how."""
        drawn = stream_tokens(self, idx, max_new_tokens, temperature, top_k, top_p, generator,
                              use_cache)
        return torch.cat([idx, *drawn], dim=1)


class GPT(LanguageModel):
    """Token ids in, a score for every possible next token out, at every position at once."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # a vector for each token
        # A vector for each position: learned, fixed (requires_grad is False), or none.
        self.wpe = None if config.pos == "rope" else nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.Identity() if config.norm_position == "post" else make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Tying [Press and Wolf 2017]: both weights are (V, C). The Embedding picks row v for token
        # v; the Linear takes the dot product of a vector with every row. "What stands for this
        # token" and "what fits that token" become one table, learned and counted once.
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.initialize()
        if config.pos == "sinusoidal":  # after initialize(), which would overwrite the table
            table = sinusoids(config.block_size, config.n_embd)
            self.wpe.weight = nn.Parameter(table, requires_grad=False)

    def new_caches(self) -> list:
        return [KeyValueCache(self.config.block_size) for _ in self.h]

    def initialize(self):
        """GPT's start: normal with standard deviation 0.02 [Radford et al. 2018, section 4.1].

        The logits are then small, and the first loss is near ln V. The projections that write to
        the residual stream (every c_proj) are smaller by sqrt(2 n_layer): the stream is a sum of
        2 n_layer contributions whose variances add up, and this keeps it from growing with depth
        [Radford et al. 2019, section 2.3]. Options: leave them as large as the rest (plain), or
        start them at zero, so that at first every pre-norm block passes its input on."""
        factor = {"gpt2": 1 / math.sqrt(2 * len(self.h)), "plain": 1.0, "zero": 0.0}
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = factor[self.config.init] if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, mean=0.0, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) int64, T <= block_size -> logits (B, T, V), and the loss if given targets.

        With caches, from new_caches, idx continues the tokens that they have seen."""
        caches = caches or [None] * len(self.h)
        start = caches[0].length if caches[0] else 0
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens given, but block_size is {self.config.block_size}")
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(start, end, device=idx.device))  # + (T, C)
        x = self.drop(x)
        for block, cache in zip(self.h, caches):
            x = block(x, cache)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return logits, None if targets is None else self.loss(logits, targets)


class Bigram(LanguageModel):
    """The baseline: a V x V table, whose row i holds the logits of what follows token i.

    It sees one token, and nothing before it. What a GPT gains over it, the GPT's parts have
    earned."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.normal_(self.wte.weight, mean=0.0, std=0.02)

    def forward(self, idx, targets=None, caches=None):
        logits = self.wte(idx)  # (B, T) -> (B, T, V)
        return logits, None if targets is None else self.loss(logits, targets)


def build_model(config: GPTConfig) -> LanguageModel:
    """The model that a config describes."""
    return {"gpt": GPT, "bigram": Bigram}[config.model](config)


# ==================================================================================================
# Learning
#
# Problem   Find weights that make the corpus likely, without overshooting and without fooling
#           ourselves about the result.
# Answer    The loss is a function of all the weights. loss.backward() computes its derivative by
#           each of them, the gradient, by the chain rule from the loss back to the inputs, and
#           *adds* it to that weight's .grad. A step then moves every weight a little against its
#           gradient. AdamW decides how far, with a step size that rises, then falls; gradients
#           that explode are cut; and the loss that counts is measured on text never trained on.
# Try it    Train the laptop preset with --max_steps 400 --learning_rate 0.1, 25 times its own: the
#           score is 1.77, where its own gives 1.66. Muon, which the preset uses, forgives much:
#           with --optimizer adamw as well, 0.1 ends at 2.09.
# ==================================================================================================

# ---- The optimizer -------------------------------------------------------------------------------
#
# Equation  m = beta1 m + (1 - beta1) g           a running mean of the gradient g of a weight w
#           v = beta2 v + (1 - beta2) g^2         a running mean of its square
#           w = w - lr (m^ / (sqrt(v^) + eps) + weight_decay w)
#           m^ = m / (1 - beta1^t) and v^ = v / (1 - beta2^t) make up for the start at zero; t
#           counts the steps from 1; eps = 1e-8 [Loshchilov and Hutter 2019, algorithm 2, with the
#           decay scaled by lr as PyTorch has it]. The division makes a step at most about lr,
#           whatever the size of the gradient: that is why one learning rate serves all layers.
# Decay     Pulling weights towards zero keeps matrices from growing without use. Vectors (biases,
#           the norms' gains) are offsets and scales with no reason to be zero: they are spared.


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device):
    """AdamW with weight decay on matrices only; Options: --optimizer muon, see "Muon"."""
    muon = make_muon(model, config) if config.optimizer == "muon" else None
    taken = {id(p) for group in muon.param_groups for p in group["params"]} if muon else ()
    parameters = [p for p in model.parameters()  # a tied matrix appears once
                  if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = device.type in ("cuda", "mps", "cpu")  # one kernel over all weights
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused,
                              betas=(config.beta1, config.beta2))
    return Together(muon, adamw) if muon else adamw


# ---- The learning rate ---------------------------------------------------------------------------
#
# Problem   At the start v is a mean over a handful of gradients and steps are unreliable: go
#           slowly. In the end the weights jump about a minimum without settling: go slowly again.
#
#           learning_rate          ___
#                                /     `.
#                               /        `.
#                  min_lr      /           `-.__
#                       0     /
#                             0  warmup_steps   max_steps
#
# Equation  warm-up  lr = learning_rate (step + 1) / (warmup_steps + 1)
#           decay    lr = min_lr + (learning_rate - min_lr) (1 + cos(pi r)) / 2
#                    r = (step - warmup_steps) / (max_steps - warmup_steps), from 0 to 1
#           [the cosine: Loshchilov and Hutter 2017, equation 5, without restarts]
# Options   --schedule linear: 1 - r in place of (1 + cos(pi r)) / 2, a straight line.


def get_lr(step: int, config: TrainConfig) -> float:
    """The learning rate of the step that follows `step` completed ones (so the first is step 0).

    >>> c = TrainConfig(learning_rate=1.0, min_lr=0.0, warmup_steps=3, max_steps=13)
    >>> [get_lr(step, c) for step in (0, 1, 2, 3)]     # never 0: a step of size 0 would be wasted
    [0.25, 0.5, 0.75, 1.0]
    >>> round(get_lr(8, c), 6), get_lr(13, c)          # half-way down, and the floor
    (0.5, 0.0)
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if step >= config.max_steps:
        return config.min_lr
    r = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    height = 1 - r if config.schedule == "linear" else (1 + math.cos(math.pi * r)) / 2
    return config.min_lr + (config.learning_rate - config.min_lr) * height


# ---- Gradient clipping ---------------------------------------------------------------------------
#
# Problem   One odd batch can give a gradient a hundred times the usual size. It stays in m for some
#           1 / (1 - beta1) steps, which it misleads, and in v for 1 / (1 - beta2), which it stunts.
# Equation  if |g| > max_norm:  g = g max_norm / |g|         [Pascanu et al. 2013, algorithm 1]
#           |g| is the norm of all gradients as a single vector: the direction stays as it was.


def clip_gradients(parameters, max_norm: float) -> torch.Tensor:
    """Rescales all gradients in place to a joint norm of at most max_norm (0: no limit).

    Returns the norm before, a scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in gradients:
            g.mul_(scale)
    return norm


# ---- One step ------------------------------------------------------------------------------------
#
# Problem   A large batch gives a less noisy gradient, but its activations may not fit in memory.
# Answer    Gradients add. Run grad_accum small batches, let backward() sum their gradients, and
#           divide each loss by grad_accum: the sum is then the gradient of the mean over the large
#           batch, which is never in memory as a whole.
# Precision `engine` knows the device, and the number format of the matrix products. autocast() and
#           the scaler serve 16-bit formats (see "Engine room"). In float32 autocast() does nothing,
#           and the scaler's four lines mean: loss.backward(), nothing, optimizer.step(), nothing.
# Processes Of several, each takes its share, and averaging() joins their gradients. One alone has
#           all micro-steps, and averaging() does nothing.


def train_step(model, optimizer, next_batch, config: TrainConfig, engine):
    """One update of the weights. next_batch() -> x, y is called once for each micro-step.

    Returns two scalar tensors: the mean loss over its micro-steps, and the gradient's norm."""
    n = config.grad_accum // engine.team.size  # the micro-steps of this process
    loss_sum = torch.zeros((), device=engine.device)
    for i in range(n):
        x, y = next_batch()
        with engine.autocast(), engine.team.averaging(model, now=i == n - 1):
            _, loss = model(x, y)
        loss = loss / n
        engine.scaler.scale(loss).backward()
        loss_sum += loss.detach()
    engine.scaler.unscale_(optimizer)
    norm = clip_gradients(model.parameters(), config.grad_clip)
    engine.scaler.step(optimizer)
    engine.scaler.update()
    optimizer.zero_grad()
    return loss_sum, norm


# ---- Evaluation ----------------------------------------------------------------------------------
#
# During training a quick estimate on a few batches will do. The figure to quote is the loss over
# the whole validation split, and it should not depend on chance. Dropout is off for both, so where
# it is used, the estimate on the training split is lower than the loss of the steps around it.


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Inside: no dropout, no gradients. Afterwards: as it was before."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():  # no gradients, and less book-keeping than under no_grad
            yield
    finally:
        if was_training:
            model.train()


def estimate_loss(model, corpus: Corpus, config: TrainConfig, engine, stopped=lambda: False):
    """The mean loss over eval_batches random batches of each split: {"train": .., "val": ..}; None
    if stopped() becomes true on the way.

    Subtle: the batches are drawn from a generator made here, and with dropout off nothing else
    draws. So the training's random state does not move: evaluated often or never, the same weights
    come out. And as the batches are the same each time, estimates differ because the model does."""
    means = {}
    with evaluating(model):
        for name, tokens in (("train", corpus.train), ("val", corpus.val)):
            generator = torch.Generator().manual_seed(0)
            total = 0.0
            for _ in range(config.eval_batches):
                if stopped():
                    return None
                x, y = get_batch(tokens, model.config.block_size, config.batch_size, generator,
                                 engine.device)
                with engine.autocast():
                    total += model(x, y)[1].item()
            means[name] = total / config.eval_batches
    return means


def evaluate(model, tokens, device="cpu", batch_size: int = 16) -> float:
    """The mean loss in nats over every token of tokens (N,) but the first, in float32.

    The split is cut into windows of block_size that do not overlap; a shorter last one takes the
    rest. A token early in its window has little context, so this is a slightly pessimistic score,
    but it counts each token once and has no chance in it."""
    T, total, done, end = model.config.block_size, 0.0, 0, len(tokens) - 1
    with evaluating(model):
        while done < end:
            rows = min(batch_size, max((end - done) // T, 1))
            size = min(rows * T, end - done)  # less than one row of T in the end
            window = tokens[done : done + size + 1].long().to(device)
            x, y = window[:-1].view(rows, -1), window[1:].view(rows, -1)
            total += model(x, y)[1].item() * size
            done += size
    return total / end


def perplexity(nats: float) -> float:
    """exp(loss), and no overflow where a run has gone astray."""
    return math.exp(min(nats, 700.0))


def bits_per_character(nats_per_token: float, corpus: Corpus) -> float:
    """The validation loss in a unit that does not depend on the tokenizer: all bits over all
    characters. A loss per token cannot be compared between tokens of different length."""
    return nats_per_token * (len(corpus.val) - 1) / corpus.val_characters / math.log(2)


# ---- Muon [optional reading] ---------------------------------------------------------------------
#
# Problem   To AdamW a matrix is a heap of unrelated numbers. But it maps vectors to vectors: it
#           takes each of a set of orthogonal input directions (the columns of V) to an output
#           direction (of U), stretched by a singular value (in S). The gradient, taken apart like
#           this, has a few large singular values and many small ones, and a step along it moves
#           hardly anything in most directions.
# Answer    Make all directions equally strong: --optimizer muon, for the matrices in the blocks.
# Equation  M = momentum M + (1 - momentum) G       the running mean, of a whole matrix
#           N = (1 - momentum) G + momentum M       a look ahead, with the new M
#           U S V^T = N                             its singular value decomposition
#           W = W - lr (0.2 sqrt(max(rows, columns)) U V^T + weight_decay W)
#           S is left out [Jordan 2024]. The factor gives the numbers in a step about the size that
#           AdamW's have, so one learning rate serves both [Liu et al. 2025, section 2.2]. Tables of
#           vectors and gains, which map no vector to another, stay with AdamW.


def orthogonalize(G):
    """U V^T for each G = U S V^T of a stack (n, rows, columns), nearly, by matrix products alone.

    X <- (a + b X X^T + c (X X^T)^2) X takes each singular value s of X to a s + b s^3 + c s^5 and
    leaves U and V alone. With these constants a small s more than triples in a round and none gets
    far above 1 [Jordan 2024]: after five rounds what was 0.01 or more is between 0.68 and 1.14."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G if G.shape[1] <= G.shape[2] else G.mT  # so that X X^T is the smaller of the two squares
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above 1 now
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # aX + (bA + cAA)X
    return X if G.shape[1] <= G.shape[2] else X.mT


class Muon(torch.optim.Optimizer):
    """Matrices of one shape go through orthogonalize as a stack: on two CPU cores a step takes two
    thirds of the time of torch.optim.Muon, which treats them one by one."""

    def __init__(self, groups, lr: float, momentum: float, weight_decay: float, dtype):
        """groups: dicts with "params" and "parts", the number of matrices that one of them stacks:
        3 for c_attn, since queries, keys and values have nothing to do with each other."""
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype  # of the matrix products

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = collections.defaultdict(list)
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"]
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])
                parts = zip(p.chunk(group["parts"]), update.chunk(group["parts"]))
                alike[p.shape].extend(parts)
            for pairs in alike.values():
                updates = orthogonalize(torch.stack([update for _, update in pairs]).to(self.dtype))
                size = group["lr"] * 0.2 * math.sqrt(max(updates.shape[1:]))
                for (w, _), update in zip(pairs, updates):
                    w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update * size)


def make_muon(model: nn.Module, config: TrainConfig) -> Muon | None:
    """Muon for the matrices inside the blocks; None if there are no blocks."""
    named = [(n, p) for n, p in model.named_parameters() if n.startswith("h.") and p.dim() == 2]
    if not named:
        return None
    groups = [{"params": [p for n, p in named if "c_attn" in n], "parts": 3},
              {"params": [p for n, p in named if "c_attn" not in n], "parts": 1}]
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return Muon(groups, config.learning_rate, config.momentum, config.weight_decay, dtype)


class Together:
    """Two optimizers of different weights that act as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for o in self.optimizers for group in o.param_groups]

    def step(self) -> None:
        for o in self.optimizers:
            o.step()

    def zero_grad(self) -> None:
        for o in self.optimizers:
            o.zero_grad()

    def state_dict(self) -> dict:
        return {str(i): o.state_dict() for i, o in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict) -> None:
        for i, o in enumerate(self.optimizers):
            o.load_state_dict(state[str(i)])


# ==================================================================================================
# Checkpoints
#
# Problem   A run lives in memory and can die at any moment. What is on disk must be enough to write
#           text and to train on as if nothing had happened, and must never be half a file.
# Answer    One dictionary of tensors and plain values with everything in it: weights, optimizer,
#           both configs, tokenizer, step, random states. It is written beside its final name,
#           synced, and renamed: a rename is all or nothing, so a crash leaves the old file or the
#           new one. A checksum at its end shows whether the disk has changed it since; for that
#           case the save before the last one is kept as latest_previous.pt.
# Safety    torch.load(weights_only=True) builds tensors and plain values and runs no code. A plain
#           pickle could run anything: never load a stranger's checkpoint without that flag.
# Try it    Press Ctrl-C during training, then run the same command with --resume: the losses go on
#           as they would have, to the last digit in float32 on a CPU.
# ==================================================================================================

CHECKPOINT_FORMAT = "minigpt-1"
PREVIOUS = "latest_previous.pt"


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file to write to, that takes the place of `path` when it is complete: `path` is at
    every moment absent, old or new, and never torn. Of several processes, which may share a folder,
    each has its own partial file.

    Raises UserError, and leaves the old file, when the disk refuses."""
    partial = path.with_name(f"{path.name}.{from_torchrun('RANK')}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as problem:  # torch reports some failed writes as RuntimeError
        reason = getattr(problem, "strerror", None) or str(problem).splitlines()[0]
        raise UserError(f"--out_dir {path.parent}: cannot write {path.name} ({reason}); free some "
                        "space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


class Digesting:
    """A file to write to, that knows the SHA-256 of what was written."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes a checkpoint. Raises UserError, and leaves the old one, when the disk refuses.

    PyTorch's files are zip archives. Such a file ends with a comment, and before it the comment's
    length in two bytes. torch.save writes no comment, so these two are zeros; here the checksum of
    the whole file becomes the comment, and PyTorch still reads it."""
    with replacing(path) as file:
        digesting = Digesting(file)
        torch.save(state, digesting)
        seal = digesting.digest.hexdigest().encode()
        file.seek(-2, os.SEEK_END)
        file.write(len(seal).to_bytes(2, "little") + seal)


def sealed(data: bytes) -> bool:
    """Whether the content of a checkpoint is as it was written, to the bit."""
    length = 64  # of a SHA-256 in hexadecimal digits
    body, seal = data[: -2 - length] + bytes(2), data[-length:]  # the two zeros as they were
    return data[-2 - length : -length] == length.to_bytes(2, "little") and (
        hashlib.sha256(body).hexdigest().encode() == seal)


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint to the CPU. Raises UserError if it is missing, torn or not one of ours."""
    try:
        data = Path(path).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--checkpoint {path}: no such file; train first (--mode train), or name a "
                        "checkpoint with --checkpoint, or a run's folder with --out_dir") from None
    except OSError as problem:
        raise UserError(f"--checkpoint {path}: {problem.strerror}; name a checkpoint that can be "
                        "read") from None
    except Exception:  # there is no telling what a damaged file makes the reader raise
        raise UserError(f"--checkpoint {path}: truncated, damaged or not a checkpoint; use another "
                        "one, for example best.pt or latest.pt of the same run") from None
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"--checkpoint {path}: a PyTorch file, but not a checkpoint of minigpt's")
    if not sealed(data):
        raise UserError(f"--checkpoint {path}: damaged, its checksum does not fit; use another "
                        "one, for example best.pt or latest.pt of the same run")
    return state


def keep_previous(path: Path) -> None:
    """Lets the checkpoint at path be found under another name, too, before it is replaced."""
    if path.exists():
        second = path.with_name(f"{PREVIOUS}.0.partial")
        second.unlink(missing_ok=True)
        try:
            os.link(path, second)
        except OSError:  # not every file system lets a file have two names
            shutil.copyfile(path, second)
        second.replace(path.with_name(PREVIOUS))
        second.unlink(missing_ok=True)  # it is still there if the two were one file already


def load_latest(out_dir: Path) -> tuple[dict, Path]:
    """latest.pt, or the one before it, loudly, where it is damaged. Raises UserError for both.

    Subtle: the damaged one gets another name, or the next save would keep it as the previous."""
    path, previous = out_dir / "latest.pt", out_dir / PREVIOUS
    try:
        return load_checkpoint(path), path
    except UserError as problem:
        whole = path.is_file() and sealed(path.read_bytes())  # then the file is not what is wrong
        if whole or not previous.exists():
            raise
        state = load_checkpoint(previous)
        say(f"warning: {problem}\ngoing on from {previous}, which was saved before it")
        if path.exists():
            path.replace(out_dir / "latest_damaged.pt")
        return state, previous


def model_from_checkpoint(state: dict) -> tuple:
    """The model and the tokenizer of a loaded checkpoint, ready to write or to be evaluated."""
    try:
        model = build_model(GPTConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
        tokenizer = TOKENIZERS[state["tokenizer"]["kind"]].from_dict(state["tokenizer"])
        TrainConfig(**state["train_config"]), Progress(**state["progress"])  # only to check them
        parts = {*state, *state["progress"]}
        if not parts >= {"optimizer", "scaler", "random", "corpus", "corpus_sha256", "run"}:
            raise KeyError
    except (KeyError, TypeError, RuntimeError):
        raise UserError("--checkpoint: its parts do not fit together, as if another version of "
                        "minigpt had written it; use another one") from None
    return model.eval(), tokenizer


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside weights and random states."""

    run: str = ""  # a name drawn when the run began, to tell it from others with the same settings
    launch: str = ""  # the torchrun that wrote this, so that its restarts find it
    step: int = 0  # completed steps
    evaluated_at: int = -1  # the step of the latest evaluation
    best_val: float = math.inf
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    seconds: float = 0.0  # spent so far, resumed runs included


def random_states(batches: torch.Generator, device: torch.device) -> dict:
    """Every random state that training depends on: the order of the batches, and dropout's."""
    states = {"batches": batches.get_state(), "cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def restore_random_states(states: dict, batches: torch.Generator, device: torch.device) -> None:
    """Undoes whatever has been drawn since random_states."""
    batches.set_state(states["batches"])
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[device.type])


# ==================================================================================================
# The training loop
#
# Problem   Put it together, so that one can watch it learn, stop it, and go on with it.
# The loop  evaluate and save at fixed steps -> set the learning rate -> one step -> report.
#           Everything before this chapter is in these lines. `Run`, below them, is the book-keeper:
#           it evaluates, reports and saves. Some names come from "Engine room": compile_model may
#           be read as `model`, stop_signals as a flag that Ctrl-C sets, and the others print, log
#           or draw. `team` is for several processes; with one, `team.turn(f)` is `f()`,
#           `team.spread(m)` is `m`, `team.largest(a, b)` is `a, b`, and its other lines do nothing.
# Try it    Train the laptop preset with --max_steps 100, as it is and with --batch_size 4
#           --grad_accum 4: the losses of the steps differ by a thousandth, since both see the same
#           16 windows a step and the same mean gradient.
# ==================================================================================================


def train(model, tokenizer, corpus: Corpus, config: TrainConfig, engine, out_dir: Path,
          resume_from: dict | None = None) -> Progress:
    """Trains a model, which is on engine.device, until max_steps, until patience runs out, or until
    a stop signal; in the end it has the weights of best.pt (in the first process).

    Writes best.pt, latest.pt, snapshots, metrics.jsonl and loss.png to out_dir, which exists.
    config.grad_accum counts the micro-steps of all processes. resume_from is a loaded checkpoint,
    whose weights the model already has. Raises Diverged if the loss is no longer finite; Stopped
    after a signal, once everything is saved."""
    optimizer = make_optimizer(model, config, engine.device)
    batches = torch.Generator().manual_seed(config.seed)
    progress = Progress(run=uuid.uuid4().hex)
    if resume_from:
        progress = Progress(**resume_from["progress"])
        optimizer.load_state_dict(resume_from["optimizer"])
        if resume_from["scaler"]:  # empty unless that run was in float16
            engine.scaler.load_state_dict(resume_from["scaler"])
        restore_random_states(resume_from["random"], batches, engine.device)
    team, progress.launch = engine.team, launch_name()
    book_keeper = Run if team.rank == 0 else Follower
    run = book_keeper(model, tokenizer, corpus, config, engine, out_dir, optimizer, batches,
                      progress, resumed=resume_from is not None)

    def next_batch():
        return team.turn(lambda: get_batch(corpus.train, model.config.block_size,
                                           config.batch_size, batches, engine.device))

    # The runner shares the model's weights.
    runner = team.spread(compile_model(model, config, engine, next_batch, batches), engine.device)
    model.train()
    with stop_signals() as stop:
        run.stopped = lambda: stop.signal != 0
        while True:
            if run.evaluation_due():
                run.evaluate_and_save()
            if run.snapshot_due():
                run.save_snapshot()
            signal_number, finished = team.largest(stop.signal, run.finished())
            if signal_number or finished:
                break
            for group in optimizer.param_groups:
                group["lr"] = get_lr(progress.step, config)
            team.reseed_dropout(config.seed, progress.step)
            loss, norm = train_step(runner, optimizer, next_batch, config, engine)
            progress.step += 1
            run.report(loss, norm)
    if signal_number:
        run.save("latest.pt")
        team.wait()
        raise Stopped(signal_number)
    run.finish()
    return progress


class Run:
    """The book-keeping of the loop above: evaluates, reports, samples and saves."""

    def __init__(self, model, tokenizer, corpus, config, engine, out_dir, optimizer, batches,
                 progress, resumed):
        self.model, self.tokenizer, self.corpus, self.config = model, tokenizer, corpus, config
        self.engine, self.out_dir, self.optimizer = engine, out_dir, optimizer
        self.batches, self.progress = batches, progress
        self.latest = 0.0, 0.0  # loss and gradient norm of the latest step
        self.first_step = progress.step
        self.stopped = lambda: False  # true after a stop signal
        self.open(resumed)
        self.started = time.perf_counter() - progress.seconds
        self.restart_clock()

    def open(self, resumed: bool) -> None:
        """Finds the files of a run that goes on, or begins new ones."""
        for leftover in self.out_dir.glob("*.pt.*.partial"):  # of a run that was killed
            leftover.unlink()
        if resumed:
            self.check_best()
        self.metrics = MetricsLog(self.out_dir, self.progress, resumed,
                                  start_wandb(self.config, self.out_dir))

    def check_best(self) -> None:
        """Subtle: best.pt need not be the one this progress speaks of: a run may be resumed in an
        empty folder, or from a snapshot older than its best. Then the search begins anew."""
        p, best = self.progress, self.out_dir / "best.pt"
        step = 0
        with contextlib.suppress(UserError):  # missing, or damaged
            step = load_checkpoint(best)["progress"]["step"]
            if step == p.best_step:
                return
        if best.exists():
            names = (self.out_dir / f"best_{step:06d}{'_' * n}.pt" for n in itertools.count())
            kept = next(name for name in names if not name.exists())
            best.replace(kept)
            say(f"the best.pt that was here is damaged or not of this run's past: it is {kept} now")
        p.best_val, p.best_step, p.stale, p.evaluated_at = math.inf, 0, 0, -1

    def restart_clock(self) -> None:
        """Tokens per second are counted from here: evaluations stay outside."""
        self.clock, self.clock_step = time.perf_counter(), self.progress.step

    def finished(self) -> bool:
        """At max_steps, or out of patience."""
        c, p = self.config, self.progress
        return p.step >= c.max_steps or (c.patience > 0 and p.stale >= c.patience)

    def evaluation_due(self) -> bool:
        """At every eval_interval and at the end, but not again right after a resume."""
        c, p = self.config, self.progress
        due = p.step % c.eval_interval == 0 or p.step >= c.max_steps
        return due and p.evaluated_at != p.step

    def snapshot_due(self) -> bool:
        """At every checkpoint_interval, but not again where a run goes on."""
        c, p = self.config, self.progress
        due = c.checkpoint_interval > 0 and p.step > 0 and p.step % c.checkpoint_interval == 0
        return due and (p.step > self.first_step or not self.snapshot.exists())

    @property
    def snapshot(self) -> Path:
        return self.out_dir / f"step_{self.progress.step:06d}.pt"

    def check_finite(self, *losses: float) -> None:
        """Raises UserError if the latest loss or gradient, one of `losses`, or a weight is not a
        finite number: such a model is lost, and must not be saved over a good one.

        Subtle: with float16 the scaler expects infinite gradients now and then, and skips them."""
        loss, norm = (float(value) for value in self.latest)
        numbers = [loss, *losses] + ([] if self.engine.scaler.is_enabled() else [norm])
        sound = all(math.isfinite(number) for number in numbers)
        if not (sound and all(p.isfinite().all() for p in self.model.parameters())):
            raise Diverged(
                f"the run has diverged: at step {self.progress.step} the loss is {loss:.4g} and "
                f"the gradient's norm {norm:.4g}; what was saved before is intact; try a "
                f"--learning_rate below {self.config.learning_rate}, a longer --warmup_steps or "
                "--dtype float32")

    def report(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """After each step; where one is due, a check and a log entry."""
        c, p = self.config, self.progress
        self.latest = loss, norm  # still on the device: reading them every step would slow it down
        if p.step % c.log_interval == 0 or p.step >= c.max_steps:
            self.latest = self.engine.team.mean(loss), norm
            self.check_finite()
            now = time.perf_counter()
            tokens = c.batch_size * c.grad_accum * self.model.config.block_size
            rate = (p.step - self.clock_step) * tokens / (now - self.clock)
            self.log(*(float(value) for value in self.latest), rate,
                     left=(c.max_steps - p.step) * (now - self.started) / p.step)
            self.restart_clock()

    def log(self, loss: float, norm: float, rate: float, left: float) -> None:
        """A status line and a metrics record."""
        step, lr = self.progress.step, self.optimizer.param_groups[0]["lr"]
        self.metrics.write(step=step, loss=loss, lr=lr, grad_norm=norm,
                           tokens_per_second=round(rate))
        show_status(f"step {step}/{self.config.max_steps} | loss {loss:.4f} | lr {lr:.2e} | "
                    f"{rate:,.0f} tokens/s | {duration(left)} left")

    def evaluate_and_save(self) -> None:
        """Estimates both losses, shows a sample, saves latest.pt and a new best as best.pt. After
        a stop signal it leaves that to the run that goes on."""
        p = self.progress
        losses = estimate_loss(self.model, self.corpus, self.config, self.engine, self.stopped)
        if losses is None:
            return
        self.check_finite(*losses.values())
        p.evaluated_at, p.seconds = p.step, time.perf_counter() - self.started
        p.stale += 1
        if losses["val"] < p.best_val:
            p.best_val, p.best_step, p.stale = losses["val"], p.step, 0
        self.metrics.write(step=p.step, train_loss=losses["train"], val_loss=losses["val"],
                           val_perplexity=perplexity(losses["val"]), seconds=round(p.seconds, 2))
        say(f"step {p.step}: train loss {losses['train']:.4f}, validation loss "
            f"{losses['val']:.4f}, perplexity {perplexity(losses['val']):.4g}"
            + (" (best so far)" if p.stale == 0 else ""))
        self.show_sample()
        if p.stale == 0:
            self.save("best.pt")
        self.save("latest.pt")
        self.restart_clock()

    def show_sample(self) -> None:
        """A few lines from the model as it is, always with the same dice."""
        if self.config.sample_tokens == 0:
            return
        dice = torch.Generator(self.engine.device).manual_seed(0)
        start = torch.tensor([start_ids(self.tokenizer)], device=self.engine.device)
        with self.engine.autocast():
            drawn = stream_tokens(self.model, start, self.config.sample_tokens, 0.8, generator=dice)
            drawn = itertools.takewhile(lambda _: not self.stopped(), drawn)
            ids = [token.item() for token in drawn]
        text = self.tokenizer.decode(ids).strip("\n")
        say("".join(f"    | {line}\n" for line in text.split("\n")))

    def save_snapshot(self) -> None:
        """Saves a file to keep, and latest.pt, unless an evaluation has just done that."""
        self.save(self.snapshot.name)
        if self.progress.evaluated_at != self.progress.step:
            self.save("latest.pt")

    def save(self, name: str) -> None:
        """Writes out_dir/name with everything that resuming or generating needs."""
        self.check_finite()
        self.progress.seconds = time.perf_counter() - self.started
        if name == "latest.pt":
            keep_previous(self.out_dir / name)
        save_checkpoint(self.out_dir / name, {
            "format": CHECKPOINT_FORMAT,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.engine.scaler.state_dict(),
            "model_config": asdict(self.model.config),
            "train_config": asdict(self.config),
            "tokenizer": self.tokenizer.to_dict(),
            "progress": asdict(self.progress),
            "random": random_states(self.batches, self.engine.device),
            "corpus": self.corpus.path,
            "corpus_sha256": self.corpus.sha256,
        })

    def finish(self) -> None:
        """The honest figure of the best checkpoint, and the curves."""
        p, best = self.progress, self.out_dir / "best.pt"
        if p.stale and p.step < self.config.max_steps:
            say(f"stopped early: no better validation loss in {p.stale} evaluations")
        self.model.load_state_dict(load_checkpoint(best)["model"])
        show_status(f"scoring {best} on the whole validation split")
        nats = evaluate(self.model, self.corpus.val, self.engine.device)
        bits = bits_per_character(nats, self.corpus)
        self.metrics.write(step=p.step, full_val_loss=nats, full_val_bits=bits, seconds=p.seconds,
                           best_step=p.best_step)
        self.metrics.close()
        plot_losses(self.out_dir)
        say(f"trained in {duration(p.seconds)}; the best model is of step {p.best_step}: {best}")
        say(score_line(nats, self.corpus))


class Follower(Run):
    """What Run is in all processes but the first: it leaves files and screen to that one."""

    def nothing(self, *_, **__) -> None:
        """The first process does it."""

    open = evaluate_and_save = save = log = finish = nothing


# ==================================================================================================
# Generation
#
# Problem   The model gives a probability for every next token. Text needs one of them, again and
#           again.
# Answer    Draw a token, append it, ask again. How to draw is the whole art:
#
#           temperature  Divide the logits by it before the softmax. Below 1 the likely get likelier
#                        and the text safer; above 1 it gets wilder; 0 always takes the likeliest.
#           top-k        Only the k likeliest may be drawn [Fan et al. 2018, section 5.4].
#           top-p        Only the smallest set of likeliest tokens whose probabilities reach p
#                        [Holtzman et al. 2020, section 3.1]: few candidates where the model is
#                        sure, many where it is not.
#
# Example   logits 2, 1, 0 -> probabilities 0.67, 0.24, 0.09. At temperature 0.5 they are 0.87,
#           0.12, 0.02. At temperature 1 and with top_p = 0.7 the first two stay, since the first
#           alone reaches only 0.67.
# Shapes    logits (B, V) -> next token (B, 1)
# Try it    After training the laptop preset, --prompt ROMEO: --temperature 0 goes round in circles
#           ("And then the state that the state that the state"): always the likeliest token does
#           not make a typical text. --temperature 2 writes hardly a word of English.
# ==================================================================================================


def filter_logits(logits, top_k: int | None = None, top_p: float | None = None):
    """Sets the logits (B, V) of tokens that may not be drawn to minus infinity.

    >>> logits = torch.log(torch.tensor([[0.1, 0.5, 0.4]]))
    >>> filter_logits(logits, top_k=1).exp().tolist()
    [[0.0, 0.5, 0.0]]
    >>> filter_logits(logits, top_p=0.45).exp().tolist()     # 0.5 alone reaches 0.45
    [[0.0, 0.5, 0.0]]
    """
    if top_k is None and top_p is None:
        return logits
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)  # likeliest first
    cut = torch.zeros_like(ranked, dtype=torch.bool)
    if top_k is not None:
        cut[:, top_k:] = True
    if top_p is not None:  # of what top-k has left
        p = torch.softmax(ranked.masked_fill(cut, float("-inf")), dim=-1)
        # Subtle: a token stays if the sum *before* it is short of top_p, so the one that crosses
        # the line stays too.
        cut |= p.cumsum(dim=-1) - p >= top_p
        cut[:, 0] = False  # also if top_p is too small a number for a float32
    banned = torch.empty_like(cut).scatter(-1, order, cut)  # banned[b, order[b, i]] = cut[b, i]
    return logits.masked_fill(banned, float("-inf"))


def draw_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token for each row of logits (B, V): (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # so that the division is safe,
    logits = filter_logits(logits / max(temperature, 1e-6), top_k, top_p)  # at any temperature
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1, generator=generator)


# ---- The cache -----------------------------------------------------------------------------------
#
# Problem   To draw the 200th token the model reads the 199 before it. It read 198 of them a moment
#           ago, and since no position sees a later one, they have the same vectors as then.
# Answer    Keep what later tokens ask of earlier ones: the keys and values of each layer. The
#           prompt goes through as a whole (prefill), then each new token alone (decode): its query
#           meets the keys that were kept.
#
#               prefill   T  o  _  b  e      5 in, keys and values of 5 kept, "," drawn
#               decode                  ,    1 in,                    6 kept, "_" drawn
#               decode                  _    1 in,                    7 kept, ...
#
# Cost      Without the cache, a pass over up to block_size tokens for each new one; with it, over
#           one. The arithmetic then hardly counts: what takes the time is to fetch each weight
#           from memory once for each token. So it pays to store weights in 16 bits, and to write
#           several samples side by side, for which they are fetched once.
# Try it    `--mode bench` writes with and without the cache, and eight samples at once. On two CPU
#           cores, in float32, the preset gpt writes 24 tokens/s without it, 122 with it, and 647
#           as eight samples.
# Memory    2 n_layer n_embd numbers for each token in the window.
# Window    When the window of block_size tokens is full, its older half is dropped; the newer half
#           moves to the front and is read anew. Subtle: to drop one token at a time would move all
#           others by one place, and with them every key of learned positions; and what deeper
#           layers kept had seen the dropped tokens. Without a cache the window moves the same way,
#           so both ways write the same text, up to rounding.


class KeyValueCache:
    """The keys and values of one layer, of all tokens in the window."""

    def __init__(self, n_places: int):
        self.n_places, self.length = n_places, 0

    def append(self, k, v):
        """Adds those of T more tokens, (B, nh, T, hs) each. Returns those of all so far."""
        if self.length == 0:  # room for the whole window at once, so that nothing is copied later
            self.k, self.v = (t.new_empty(*t.shape[:2], self.n_places, t.shape[3]) for t in (k, v))
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length], self.v[:, :, start : self.length] = k, v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def stream_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                  generator=None, use_cache=True):
    """Yields max_new_tokens times the next token of each row of idx (B, T), as (B, 1)."""
    block_size = model.config.block_size
    start = max(idx.shape[1] - block_size, 0)  # of the window
    unread, caches = start, model.new_caches() if use_cache else None
    for _ in range(max_new_tokens):
        if idx.shape[1] - start > block_size:
            start = unread = idx.shape[1] - max(block_size // 2, 1)
            caches = model.new_caches() if use_cache else None
        with evaluating(model):
            logits, _ = model(idx[:, unread:], caches=caches)  # (B, T, V); the last one counts
        if use_cache:
            unread = idx.shape[1]
        token = draw_token(logits[:, -1], temperature, top_k, top_p, generator)
        idx = torch.cat([idx, token], dim=1)
        yield token


def until_stop(pieces, stop: str | None):
    """Yields the text of pieces up to, and without, the first occurrence of stop.

    What may be the beginning of stop is held back until the next piece decides.

    >>> list(until_stop(["ab", "c", "\\n", "\\n", "d"], stop="\\n\\n"))
    ['ab', 'c']
    >>> list(until_stop(["ab", "\\n", "c"], stop="\\n\\n"))
    ['ab', '\\nc']
    """
    held = ""
    for piece in pieces:
        held += piece
        if stop and stop in held:
            held = held[: held.index(stop)]
            break
        keep = 0
        if stop:
            keep = max(n for n in range(len(stop)) if held.endswith(stop[:n]))
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def write_text(model, tokenizer, config: GenerateConfig, engine, seed: int, out) -> None:
    """Writes the prompt and its continuation to the text stream `out`, as it is drawn.

    Several samples are drawn side by side, as the rows of one batch, and written when they are
    complete, one after the other with a line between them."""
    if config.top_k is not None and config.top_k > tokenizer.vocab_size:
        raise UserError(f"--top_k {config.top_k}: must be at most {tokenizer.vocab_size}, the size "
                        "of the vocabulary")
    try:
        ids = start_ids(tokenizer) if config.prompt is None else tokenizer.encode(config.prompt)
    except UserError as problem:
        raise UserError(f"--prompt {config.prompt!r}: {problem}") from None
    prompt, start = torch.tensor([ids] * config.num_samples), tokenizer.decode(ids)  # (B, T)
    dice = torch.Generator(engine.device).manual_seed(seed)
    tokens = stream_tokens(model, prompt.to(engine.device), config.max_tokens, config.temperature,
                           config.top_k, config.top_p, dice, config.cache)
    if config.num_samples == 1:
        rows = [(token.item() for token in tokens)]
    else:
        rows = torch.cat([prompt, *(token.cpu() for token in tokens)], dim=1).tolist()
        rows = [row[prompt.shape[1] :] for row in rows]
    for i, row in enumerate(rows):
        text = tokenizer.stream(itertools.takewhile(lambda token: token != tokenizer.end, row))
        if i > 0:
            out.write("---------------\n")
        out.write(start)
        for piece in until_stop(text, config.stop):
            out.write(piece)
            out.flush()
        out.write("\n")
        out.flush()


# ==================================================================================================
# Engine room [optional reading]
#
# Nothing here is about language: the device and its number formats, compilation, several processes,
# signals, what is printed and logged, and where the corpus comes from.
# ==================================================================================================

# ---- Devices and precision -----------------------------------------------------------------------
#
# Problem   Most of the time goes into matrix products, and hardware multiplies 16-bit numbers
#           several times faster than 32-bit ones.
# Answer    Mixed precision [Micikevicius et al. 2018]: weights, residual stream, norms and loss
#           stay float32; `autocast` runs each matrix product in 16 bits.
#           bfloat16 has float32's range (8 exponent bits) and just 8 bits of precision: it needs
#           no care. float16 is finer, but gradients below 6e-8 vanish: the loss is multiplied by a
#           large number before backward() and the gradients divided by it after (GradScaler).
# Try it    Train the laptop preset with --dtype float32 and with --dtype bfloat16. On a processor
#           that has bfloat16 instructions the second makes about 1.5 times the tokens/s, and the
#           losses of the first 75 steps agree to three digits.


@dataclass
class Engine:
    """Where and how precisely to compute. In float32, autocast and scaler are there and do nothing,
    so that no caller needs an `if`."""

    device: torch.device
    dtype: torch.dtype
    team: "Team" = field(default_factory=lambda: Team())  # see "Several processes"

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def autocast(self):
        """A context for forward passes."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def find_device(name: str) -> torch.device:
    """auto: the best device present. Raises UserError for one that is not."""
    several = from_torchrun("WORLD_SIZE", 1) > 1
    present = {"cuda": torch.cuda.is_available(), "cpu": True,
               "mps": torch.backends.mps.is_available() and not several}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    choices = "auto, " + ", ".join(kind for kind in present if present[kind])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; this machine has {choices}") from None
    if device.type == "cuda" and several:
        device = torch.device("cuda", from_torchrun("LOCAL_RANK"))
    in_range = device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()
    if not present.get(device.type) or not in_range:
        raise UserError(f"--device {name}: not found here ({device}); this machine has {choices}"
                        + ", and a GPU is needed for each process" * several)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def make_engine(device_name: str = "auto", dtype_name: str = "auto", team=None) -> Engine:
    """auto picks the fastest format that needs no care and that the device has in hardware."""
    device = find_device(device_name)
    if dtype_name == "auto":
        dtype_name = "float32"
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype_name = "bfloat16" if bf16 else "float16"
        elif device.type == "cpu":
            able = getattr(torch.cpu, "get_capabilities", dict)()
            if able.get("avx512_bf16") or able.get("amx_bf16"):
                dtype_name = "bfloat16"
    return Engine(device, getattr(torch, dtype_name), team or Team())


# ---- Compilation ---------------------------------------------------------------------------------
#
# Problem   Run line by line, every multiplication and addition reads its operands from memory and
#           writes its result back. torch.compile turns the whole forward and backward pass into
#           a few fused kernels; for the CPU that takes a C++ compiler, which not everyone has.


def compile_model(model, config: TrainConfig, engine, next_batch, batches: torch.Generator):
    """The model through torch.compile if asked for; the model itself, with one warning, if that
    fails here. Compiling happens at the first use, so one micro-step is tried and forgotten."""
    if not config.compile:
        return model
    before = random_states(batches, engine.device)
    say("compiling the model: this takes a minute or two")
    try:
        compiled = torch.compile(model)
        model.train()
        with engine.autocast():
            compiled(*next_batch())[1].backward()
        return compiled
    except Exception as problem:  # whatever a compiler may raise, training can go on without it
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        say(f"warning: torch.compile does not work here, going on without it ({reason})")
        return model
    finally:
        model.zero_grad()
        restore_random_states(before, batches, engine.device)


# ---- Several processes ---------------------------------------------------------------------------
#
# Problem   One device is too slow, and there are more of them, here or in other machines.
# Answer    Data parallelism: every process holds the whole model and computes the gradients of its
#           share of a step's windows. Before the step the gradients are averaged over them, so all
#           take the same step, and as they began alike, they stay alike. PyTorch's
#           DistributedDataParallel does the averaging, piece by piece while backward() still runs
#           [Li et al. 2020, section 3.2], by the library gloo on CPUs, by nccl on GPUs.
# Shares    --grad_accum counts the micro-steps of all. With N processes the first takes micro-steps
#           0, N, 2N ..., the second 1, N + 1 ...: a step sees the windows that it would see in one
#           process, and without dropout gives the same weights, up to rounding.
# Order     `torchrun` starts the processes and numbers them (`rank`). Number 0 evaluates, writes
#           and prints; the others wait for it at the next `largest` of the training loop.
# Try it    `torchrun --nproc_per_node=2 minigpt.py --mode train --max_steps 100` prints the losses
#           of `python minigpt.py --mode train --max_steps 100 --batch_size 8 --grad_accum 2`.


def from_torchrun(name: str, otherwise: int = 0) -> int:
    """RANK, WORLD_SIZE and the like, which torchrun tells its processes; `otherwise` without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return otherwise
    return int(os.environ.get(name, otherwise))


@dataclass
class Team:
    """The processes that train together, as one of them sees them. Alone, by default: then each of
    these functions gives back what it got, so that no caller needs an `if`."""

    rank: int = 0  # the number of this one
    size: int = 1
    local_rank: int = 0  # its number on its machine

    def wait(self) -> None:
        """Goes on when all have come here."""
        self.largest(0)

    def share(self, make):
        """What make() gives in the first process, for all of them."""
        box = [make() if self.rank == 0 else None]
        if self.size > 1:
            torch.distributed.broadcast_object_list(box)
        return box[0]

    def turn(self, draw):
        """One of `size` results of draw(). Each process draws for all of them and takes its own, so
        their random generators stay alike, and one saved state serves them all."""
        return [draw() for _ in range(self.size)][self.rank]

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each over the processes: so that all of them take the same decision."""
        numbers = torch.tensor(numbers)
        if self.size > 1:
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        return numbers.tolist()

    def mean(self, number: torch.Tensor) -> torch.Tensor:
        """The mean over the processes."""
        if self.size > 1:
            torch.distributed.all_reduce(number)
        return number / self.size

    @contextlib.contextmanager
    def first_on_each_machine(self):
        """One process of each machine goes first; the others find its files when they follow."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    def spread(self, model, device: torch.device):
        """The model, with its gradients averaged over the processes at the end of backward()."""
        if self.size == 1:
            return model
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def averaging(self, model, now: bool):
        """A context for a forward pass: only if `now` are the gradients averaged in its backward
        pass. Of several micro-steps the last one's will do, since the sums are averaged then."""
        return contextlib.nullcontext() if self.size == 1 or now else model.no_sync()

    def reseed_dropout(self, seed: int, step: int) -> None:
        """Dropout must differ between the processes. As it follows from seed and step, its state
        need not be saved."""
        if self.size > 1:
            torch.manual_seed((seed * 2**24 + step * self.size + self.rank) % 2**63)


def setup_distributed() -> Team:
    """Joins the other processes if torchrun started this one."""
    team = Team(from_torchrun("RANK"), from_torchrun("WORLD_SIZE", 1), from_torchrun("LOCAL_RANK"))
    if team.size > 1 and not torch.distributed.is_initialized():
        # The others may have to wait while the first one encodes or evaluates a large corpus.
        patience = datetime.timedelta(hours=2)
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=patience))
        if from_torchrun("GROUP_WORLD_SIZE", 1) == 1:
            # Subtle: torchrun's table of addresses outlives a crash; after a restart the old ones
            # would still be found in it. (On several machines the README tells what to do.)
            attempt = str(from_torchrun("TORCHELASTIC_RESTART_COUNT"))
            store = torch.distributed.PrefixStore(attempt, store)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience,
            store=store, rank=team.rank, world_size=team.size)
    return team


def leave_distributed() -> None:
    """Takes leave of the other processes, if there were any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave_process(code: int) -> None:
    """Ends this process. Subtle: after several processes have talked, PyTorch's own threads may
    abort an exit in the usual way, and torchrun would take that for a crash."""
    if from_torchrun("WORLD_SIZE", 1) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def share_steps(config: TrainConfig, n: int, may_change: bool) -> TrainConfig:
    """The settings, with a number of micro-steps that n processes can share equally. Where this
    takes a change, and may_change, a step becomes n smaller micro-steps with the same windows in
    all; otherwise it raises UserError."""
    if config.grad_accum % n == 0:
        return config
    windows = config.grad_accum * config.batch_size
    if windows % n or not may_change:
        raise UserError(f"--grad_accum {config.grad_accum}: must be divisible by the number of "
                        f"processes, {n}, which share the micro-steps; start fewer, or a new run "
                        f"with --grad_accum {math.ceil(config.grad_accum / n) * n}")
    shared = replace(config, grad_accum=n, batch_size=windows // n)
    say(f"{n} processes: --grad_accum {shared.grad_accum} --batch_size "
        f"{shared.batch_size} instead of {config.grad_accum} and {config.batch_size}, the same "
        f"{windows} windows in a step")
    return shared


def launch_name() -> str:
    """The name of this torchrun: the same after each of its restarts, and another one for each new
    run. (Its count of restarts would not do alone: each machine keeps its own.)"""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return name if name != "none" else f"process {os.getppid()}"  # it was given no name


# ---- Signals -------------------------------------------------------------------------------------
#
# Problem   Ctrl-C may arrive in the middle of a step or of a write. Nothing is done then but to
#           remember it; the loop looks at the flag when a step is complete, saves and leaves.


class Stopped(Exception):
    """Ctrl-C or SIGTERM arrived and everything is saved. args[0] is the signal's number."""


@contextlib.contextmanager
def stop_signals():
    """Inside, the first Ctrl-C or SIGTERM only sets .signal; the second ends the process."""
    stop = types.SimpleNamespace(signal=0)
    previous = {}

    def on_signal(number, frame):
        stop.signal = number
        for s in previous:
            signal.signal(s, signal.SIG_DFL)
        # Subtle: the signal may have come in the middle of a print, so print itself is off limits.
        if not from_torchrun("RANK"):
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    with contextlib.suppress(ValueError):  # only the main thread may listen for signals
        for s in (signal.SIGINT, signal.SIGTERM):
            previous[s] = signal.signal(s, on_signal)
    try:
        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


# ---- What is printed and logged ------------------------------------------------------------------

# Progress goes to stderr, records to metrics.jsonl, curves to loss.png; stdout stays free for text.

_status_width = 0  # of the status line that stands on the terminal, 0 if none does


def say(text: str = "") -> None:
    """A line to stderr, where everything goes but generated text and scores. Of several processes
    the first one speaks."""
    global _status_width
    if from_torchrun("RANK"):
        return
    if _status_width:
        print("\r" + " " * _status_width + "\r", end="", file=sys.stderr)
        _status_width = 0
    print(text, file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """An error. One that all processes find before they join is told by the first; after that it
    may be the error of one machine alone."""
    rank = from_torchrun("RANK")
    say(text)
    if rank and torch.distributed.is_initialized():
        print(f"process {rank}: {text}", file=sys.stderr, flush=True)


def show_status(text: str) -> None:
    """Progress: rewritten in place on a terminal, a line of its own in a pipe or a file."""
    global _status_width
    if from_torchrun("RANK") or not sys.stderr.isatty():
        return say(text)
    text = text[: shutil.get_terminal_size().columns - 1]
    print("\r" + text.ljust(_status_width), end="", file=sys.stderr, flush=True)
    _status_width = len(text)


def duration(seconds: float) -> str:
    """
    >>> duration(75), duration(3700)
    ('1m15s', '1h01m')
    """
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def score_line(nats: float, corpus: Corpus) -> str:
    """The validation score in three units."""
    return (f"full validation split, {len(corpus.val) - 1:,} tokens: {nats:.4f} nats per token, "
            f"perplexity {perplexity(nats):.4g}, "
            f"{bits_per_character(nats, corpus):.4f} bits per character")


def start_wandb(config: TrainConfig, out_dir: Path):
    """A run of Weights & Biases, or None: it is used where it is installed and either logged in or
    set offline (WANDB_MODE=offline). It never asks for anything and never ends a run."""
    mode, found = os.environ.get("WANDB_MODE", ""), "WANDB_API_KEY" in os.environ
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        found = found or netrc.netrc().authenticators("api.wandb.ai") is not None
    if not config.wandb or mode in ("disabled", "dryrun") or not (found or mode == "offline"):
        return None
    try:
        import wandb

        return wandb.init(project="minigpt", dir=out_dir, config=asdict(config),
                          settings=wandb.Settings(silent=True))
    except Exception as problem:  # not installed, no network, or a change in its ways
        say(f"no Weights & Biases: {type(problem).__name__}; --no_wandb to leave it out")
        return None


class MetricsLog:
    """metrics.jsonl: one record a line. A resumed run drops what it is about to do again."""

    def __init__(self, out_dir: Path, progress: Progress, resumed: bool, wandb_run=None):
        self.path, p, self.wandb_run = out_dir / "metrics.jsonl", progress, wandb_run
        last = p.step if p.evaluated_at == p.step else p.step - 1  # evaluations up to here stay
        kept = [r for r in read_metrics(out_dir) if resumed and "full_val_loss" not in r
                and r["step"] <= (last if "val_loss" in r else p.step)]
        with replacing(self.path) as file:
            file.write("".join(json.dumps(r) + "\n" for r in kept).encode())

    def write(self, **record) -> None:
        # JSON has no infinity and no NaN: null stands for them.
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb_run:
            with contextlib.suppress(Exception):  # whatever ails it must not end the run
                self.wandb_run.log(record, step=record["step"])

    def close(self) -> None:
        if self.wandb_run:
            with contextlib.suppress(Exception):
                self.wandb_run.finish()


def read_metrics(out_dir: Path) -> list[dict]:
    """The records of a run; a last line cut short by a crash is left out."""
    path, records = out_dir / "metrics.jsonl", []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):  # of JSON or of UTF-8
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def plot_losses(out_dir: Path) -> None:
    """loss.png: both curves, the minimum marked. Needs matplotlib, and does without."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("no loss.png: pip install matplotlib to get one")
    records = [r for r in read_metrics(out_dir) if r.get("val_loss") is not None]
    if not records:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, logged = [r["step"] for r in records], [r for r in read_metrics(out_dir) if "loss" in r]
    axes.plot([r["step"] for r in logged], [r["loss"] for r in logged], color="C0", alpha=0.4,
              linewidth=1, label="training, of single steps")
    axes.plot(steps, [r["train_loss"] for r in records], ".-", color="C0", label="training")
    axes.plot(steps, [r["val_loss"] for r in records], ".-", color="C1", label="validation")
    loss, step = min((r["val_loss"], r["step"]) for r in records)
    axes.plot(step, loss, "o", color="black")
    axes.annotate(f"{loss:.3f} at step {step}", (step, loss), xytext=(0, 12),
                  textcoords="offset points", ha="right")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out_dir / "loss.png", dpi=120)


# ---- Finding the corpus --------------------------------------------------------------------------
#
# Problem   The first command a newcomer types should train a model, also where nothing has been
#           downloaded yet, or nothing can be.

DATA = Path(__file__).resolve().parent / "data"


def find_corpus(data: str | None) -> Path:
    """--data if given; else Tiny Shakespeare, downloaded at need; else, loudly, the sample."""
    if data is not None:
        return Path(data)
    path = DATA / "input.txt"
    if path.exists():
        return path
    try:
        import download_data

        download_data.download(path)
        return path
    except (ImportError, OSError) as problem:
        bar = "!" * 80
        say(f"{bar}\nTiny Shakespeare is not here: {problem}\nTraining on the small sample "
            f"{DATA / 'sample.txt'} instead: expect far poorer text.\nFor the real corpus, connect "
            "and run `python download_data.py`, or import a copy\nwith `python download_data.py "
            f"--source FILE`; or train on a text of yours with --data.\n{bar}")
        return DATA / "sample.txt"


# ---- Large corpora -------------------------------------------------------------------------------
#
# Problem   A text of a gigabyte is 8 GB as int64 tokens, and more as a Python list.
# Answer    Never hold it: read it in chunks, encode each, and append the tokens to a file, in 1, 2
#           or 4 bytes each. A batch then maps the file into memory: it looks like a tensor, and the
#           operating system reads the pages that are touched.


@dataclass
class Text:
    """A text file that is never in memory as a whole."""

    path: Path
    length: int  # in characters
    alphabet: list[str]
    sha256: str

    @classmethod
    def survey(cls, path) -> "Text":
        """Reads a file once. Raises UserError if it is missing, empty or not UTF-8."""
        length, alphabet, digest = 0, set(), hashlib.sha256()
        try:
            for chunk in read_chunks(path):
                length += len(chunk)
                alphabet.update(chunk)
                digest.update(chunk.encode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"--data {path}: not UTF-8 text; save it as UTF-8") from None
        except OSError as problem:
            raise UserError(f"--data {path}: {problem.strerror}; name a readable text file"
                            ) from None
        if length == 0:
            raise UserError(f"--data {path}: the file is empty; name one with text in it")
        return cls(Path(path), length, sorted(alphabet), digest.hexdigest())

    @property
    def split(self) -> int:
        """Where the validation part begins: after 90 % of the characters."""
        return int(0.9 * self.length)

    def chunks(self, part: str):
        """Yields the text of a part, "train" or "val", bit by bit."""
        seen = 0
        for chunk in read_chunks(self.path):
            cut = max(self.split - seen, 0)
            yield chunk[:cut] if part == "train" else chunk[cut:]
            seen += len(chunk)


def read_chunks(path, size: int = 2**20):
    """Yields the text of a file, `size` characters at a time."""
    with open(path, encoding="utf-8-sig") as file:  # -sig: without the mark that Windows adds
        while chunk := file.read(size):
            yield chunk


class MappedTokens:
    """Token ids in a file, used like a tensor (N,).

    Subtle: the file is mapped anew at each use. A mapping keeps every page that was touched, and
    random batches touch them all in time."""

    def __init__(self, path: Path, vocab_size: int):
        self.path, self.typecode = path, "B" if vocab_size <= 2**8 else "h" if vocab_size <= 2**15 \
            else "i"
        self.dtype = {"B": torch.uint8, "h": torch.int16, "i": torch.int32}[self.typecode]

    def write(self, chunks) -> None:
        """Makes the file from lists of ids, with a checksum at its end."""
        with replacing(self.path) as file:
            digesting = Digesting(file)
            for ids in chunks:
                digesting.write(array.array(self.typecode, ids).tobytes())
            file.write(digesting.digest.digest())

    def sound(self) -> bool:
        """Whether the file is there, and as it was written."""
        digest = hashlib.sha256()
        try:
            with open(self.path, "rb") as file:
                left = os.fstat(file.fileno()).st_size - digest.digest_size
                while left > 0 and (piece := file.read(min(2**20, left))):
                    digest.update(piece)
                    left -= len(piece)
                return file.read() == digest.digest()
        except OSError:
            return False

    def __len__(self) -> int:
        return (self.path.stat().st_size - hashlib.sha256().digest_size) // self.dtype.itemsize

    def __getitem__(self, index) -> torch.Tensor:
        return torch.from_file(str(self.path), size=len(self), dtype=self.dtype)[index]


def encode_to_file(text: Text, part: str, tokenizer, folder: Path) -> MappedTokens:
    """The tokens of a part of a text, in a file of folder, which is used again if it is sound."""
    name = hashlib.sha256(json.dumps([text.sha256, tokenizer.to_dict()]).encode()).hexdigest()[:12]
    tokens = MappedTokens(folder / f"tokens_{part}_{name}.bin", tokenizer.vocab_size)
    if not tokens.sound():
        tokens.write(map(tokenizer.encode, whole_pieces(text.chunks(part))))
    return tokens


# ==================================================================================================
# Experiments [optional reading]
#
# Problem   The field argues about norms, positions and activations. What does each change on this
#           corpus, in the time we have?
# Answer    Change one thing at a time; give every variant the same steps, the same seeds and
#           batches; score each on the full validation split; say how far the seeds spread, for a
#           difference smaller than the spread shows none. The score is that of a run's best
#           checkpoint, "+-" the standard deviation over seeds. Two sets change more than one thing:
#           `tokenizer` also how much text a step sees, `norm_position` also the depth.
# Try it    `python minigpt.py --mode ablate --set pos` trains six models, three variants from two
#           seeds, for 500 steps each unless you say otherwise, prints a table and draws the curves.
#           After Ctrl-C, the same command goes on. What we measured stands in the README.
# ==================================================================================================

ABLATIONS = {
    "norm": [dict(norm=norm) for norm in ("layernorm", "rmsnorm", "none")],
    "norm_position": [dict(n_layer=n, norm_position=place) for n in (2, 8)
                      for place in ("pre", "post")],
    "pos": [dict(pos=pos) for pos in ("learned", "sinusoidal", "rope")],
    "activation": [dict(activation=bend) for bend in ACTIVATIONS],
    "tokenizer": [dict(tokenizer="char")] + [dict(tokenizer="bpe", vocab_size=size)
                                             for size in (512, 1024, 4096)],
    "init": [dict(init=start) for start in ("gpt2", "plain", "zero")],
    # The laptop preset, and each of its choices undone alone.
    "recipe": [dict(), dict(optimizer="adamw"), dict(momentum=0.95), dict(schedule="cosine"),
               dict(weight_decay=0.0), dict(init="zero"), dict(pos="learned"), dict(n_head=4),
               dict(qk_norm=False), dict(norm="layernorm"), dict(activation="gelu")],
}


@dataclass
class AblateConfig:
    """Which experiment, and how often. Everything else is as in training, but for fewer steps."""

    set: str | None = setting(None, "a named set of variants", kind=str, choices=tuple(ABLATIONS))
    vary: str | None = setting(None, "or a set of your own: FIELD=A,B,C", kind=str)
    seeds: int = setting(2, "runs of each variant, from --seed on", low=1)

    def __post_init__(self):
        check_settings(self)
        if (self.set is None) == (self.vary is None):
            raise UserError(f"--mode ablate: give either --set ({', '.join(ABLATIONS)}) or --vary "
                            "FIELD=A,B,C")

    def variants(self) -> tuple[str, list[dict]]:
        """The name of the experiment, and the settings in which its variants differ."""
        if self.set:
            return self.set, ABLATIONS[self.set]
        name, _, values = self.vary.partition("=")
        name = name.strip().replace("-", "_")
        fixed = ("seed", "preset", "patience", "sample_tokens", "log_interval",
                 "checkpoint_interval")
        known = {f.name: f.metadata["kind"] for c in (GPTConfig, TrainConfig) for f in fields(c)
                 if f.name not in fixed}
        if name not in known or not values:
            raise UserError(f"--vary {self.vary}: must be FIELD=A,B,C with a field that --help "
                            f"lists under the model or training, but none of {', '.join(fixed)}")
        kind = (lambda v: {"true": True, "false": False}[v.lower()]) if known[name] is bool \
            else known[name]
        try:
            variants = [{name: kind(value.strip())} for value in values.split(",")]
        except (ValueError, KeyError):
            raise UserError(f"--vary {self.vary}: {name} takes {known[name].__name__}s") from None
        if len({variant[name] for variant in variants}) < len(variants):
            raise UserError(f"--vary {self.vary}: names a value twice; leave one out")
        return name, variants


def run_variant(args, folder: Path, variant: dict, seed: int) -> dict:
    """Trains one variant, or goes on with it, or reads its result if it is there already.

    A result counts only for the very same settings: they are kept beside it."""
    label = " ".join(f"{k}={v}" for k, v in variant.items()) or "as it is"
    out_dir = folder / f"{label} seed={seed}".replace(" ", "_")
    typed = {**vars(args), **variant, "seed": seed}
    typed.setdefault("max_steps", 500)
    typed.setdefault("eval_interval", 50)
    quiet = dict(sample_tokens=0, checkpoint_interval=0, log_interval=typed["eval_interval"],
                 patience=0)
    place = dict(mode="train", out_dir=str(out_dir), checkpoint=None, resume=False)
    apart = ("mode", "out_dir", "set", "vary", "seeds")
    settings = json.dumps({k: v for k, v in typed.items() if k not in apart}, sort_keys=True)
    make_folder(out_dir)
    notes, result = out_dir / "settings.json", out_dir / "result.json"
    if notes.is_file() and notes.read_text(encoding="utf-8") == settings:
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
        place["resume"] = (out_dir / "latest.pt").is_file()
    else:
        result.unlink(missing_ok=True)
        notes.write_text(settings, encoding="utf-8")
    say(f"---- {label}, seed {seed}")
    row = {"variant": label, "seed": seed, "loss": None, "bits": None, "seconds": None, "note": ""}
    try:
        run_train(argparse.Namespace(**{**typed, **quiet, **place}))
        last = read_metrics(out_dir)[-1]
        row |= dict(loss=last["full_val_loss"], bits=last["full_val_bits"], seconds=last["seconds"])
    except Diverged as problem:
        row["note"] = str(problem).partition(";")[0]
        say(row["note"])
    with replacing(result) as file:
        file.write(json.dumps(row).encode())
    return row


def spread(numbers: list[float]) -> str:
    """
    >>> spread([1.0, 2.0]), spread([1.5])
    ('1.5000 +- 0.7071', '1.5000')
    """
    mean = statistics.fmean(numbers)
    return f"{mean:.4f}" + (f" +- {statistics.stdev(numbers):.4f}" if len(numbers) > 1 else "")


def ablation_table(rows: list[dict]) -> str:
    """Mean and standard deviation over the seeds, a row for each variant, as Markdown."""
    lines = ["| variant | nats per token | bits per character | seconds | seeds |",
             "|---|---|---|---|---|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        done = [row for row in runs if row["loss"] is not None]
        cells = ["diverged"] * 3
        if done:
            cells = [spread([r["loss"] for r in done]), spread([r["bits"] for r in done]),
                     f"{statistics.fmean(r['seconds'] for r in done):.0f}"]
        counted = f"{len(done)}" + (f", {len(runs) - len(done)} diverged" if done != runs else "")
        lines.append(f"| {variant} | " + " | ".join(cells) + f" | {counted} |")
    return "\n".join(lines)


def plot_ablation(folder: Path, rows: list[dict]) -> None:
    """curves.png: the validation estimates of every run, in bits per character."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("no curves.png: pip install matplotlib to get one")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, variants = figure.add_subplot(), list(dict.fromkeys(row["variant"] for row in rows))
    for row in rows:
        if row["loss"] is None:
            continue
        run = folder / f"{row['variant']} seed={row['seed']}".replace(" ", "_")
        records = [r for r in read_metrics(run) if r.get("val_loss") is not None and r["step"] > 0]
        known, color = axes.get_legend_handles_labels()[1], f"C{variants.index(row['variant'])}"
        axes.plot([r["step"] for r in records],
                  [r["val_loss"] * row["bits"] / row["loss"] for r in records], linewidth=1.2,
                  color=color, label=None if row["variant"] in known else row["variant"])
    axes.set(xlabel="step", ylabel="validation loss, bits per character")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "curves.png", dpi=120)


def run_ablate(args) -> None:
    """--mode ablate: the table goes to stdout, the same figures to results.csv."""
    config = AblateConfig(**given_settings(args, AblateConfig))
    name, variants = config.variants()
    for variant in variants:  # a mistake should show before the first of them is trained
        typed = argparse.Namespace(**{**vars(args), **variant})
        model_settings, _ = fresh_configs(typed, find_device(args.device))
        GPTConfig(**model_settings)
    folder = Path(args.out_dir) / f"ablate_{name}"
    first = getattr(args, "seed", TrainConfig.seed)
    rows = []
    for seed in range(first, first + config.seeds):
        for variant in variants:
            rows.append(run_variant(args, folder, variant, seed))
            with open(folder / "results.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    plot_ablation(folder, rows)
    print(ablation_table(rows))


# ---- Benchmark -----------------------------------------------------------------------------------
#
# Problem   "Fast" means nothing without the machine it was measured on. `--mode bench` measures
#           this one, and compares the rate that the model reaches with what the machine allows.
# FLOPs     A weight costs one multiplication and one addition for each token in the forward pass,
#           and twice that in the backward pass: 6 N in all [Kaplan et al. 2020, section 2.1]. N
#           counts the matrices that multiply: those of the blocks and the head. Scores and weighted
#           means of attention add 12 n_layer C T [Chowdhery et al. 2022, appendix B].
# MFU       Model-FLOPs utilization: FLOPs per token times tokens per second, over the rate at which
#           this machine multiplies two large matrices in the same number format.
# Memory    In training a weight takes 16 bytes: itself, its gradient, AdamW's m and v, 4 each (Muon
#           has no v). What the backward pass needs of each layer comes on top: in 16 bits some 34 C
#           bytes a token and, without the fused kernel, 5 nh T more [Korthikanti et al. 2022,
#           section 4.1].
# Try it    --mode bench --dtype float32, and again with bfloat16.


@dataclass
class BenchConfig:
    """What to measure beside this program itself."""

    against: str | None = setting(None, "a checkout of nanoGPT to measure beside", kind=str)
    bench_seconds: float = setting(4.0, "time for each figure", above=0.0)

    def __post_init__(self):
        check_settings(self)


def timed(*functions, seconds: float) -> list[float]:
    """The median time of one call of each function, in seconds. They take turns, so that a change
    in the machine's speed meets all of them."""
    times = [[] for _ in functions]
    end = None
    while end is None or time.perf_counter() < end or len(times[0]) < 3:
        for function, taken in zip(functions, times):
            begin = time.perf_counter()
            function()
            for kind in (torch.cuda, torch.mps):  # whose work goes on after the call
                if kind.is_available():
                    kind.synchronize()
            taken.append(time.perf_counter() - begin)
        if end is None:  # the first round warms up
            times, end = [[] for _ in functions], time.perf_counter() + seconds * len(functions)
    return [statistics.median(taken) for taken in times]


def count_parts(model) -> dict[str, int]:
    """The parameters by part."""
    parts = collections.Counter()
    for name, p in model.named_parameters():
        part = next((part for part in ("attn", "mlp", "wte", "wpe", "lm_head") if part in name),
                    "norms")
        parts[part] += p.numel()
    return dict(parts)


def flops_per_token(model) -> int:
    """Of one forward and backward pass."""
    c = model.config
    n = sum(p.numel() for name, p in model.named_parameters()
            if p.dim() == 2 and name.startswith("h."))
    return 6 * (n + c.n_embd * c.vocab_size) + 12 * c.n_layer * c.n_embd * c.block_size


def peak_memory(device: torch.device) -> int | None:
    """In bytes: the largest amount so far, on the GPU if there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin"
                                                                else 1024)


def nanogpt_step(folder: str, c: GPTConfig, device):
    """nanoGPT's model of the same shape, and one of its training steps in float32."""
    try:
        names = runpy.run_path(str(Path(folder) / "model.py"))
    except OSError:
        raise UserError(f"--against {folder}: holds no model.py; name a checkout of nanoGPT"
                        ) from None
    with contextlib.redirect_stdout(sys.stderr):  # it prints
        peer = names["GPT"](names["GPTConfig"](
            block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
            n_embd=c.n_embd, dropout=c.dropout, bias=c.bias))
        optimizer = peer.to(device).configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)

    def step(x, y):
        peer(x, y)[1].backward()
        nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return peer, step


def huggingface_writer(c: GPTConfig, device):
    """A function that has Hugging Face's GPT-2 of the same shape write n tokens; or None."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    peer = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, bos_token_id=None, eos_token_id=None)).eval().to(device)
    return lambda idx, n: peer.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                                        do_sample=True, top_k=0, pad_token_id=0)


def bench_training(rows: dict, model, config: TrainConfig, engine, bench: BenchConfig) -> None:
    """Tokens per second of training, and what part of the machine that uses."""
    c, device = model.config, engine.device
    config = replace(config, grad_accum=1)
    optimizer = make_optimizer(model, config, device)
    ids = torch.randint(c.vocab_size, (config.batch_size, c.block_size + 1), device=device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    n = 4096 if device.type != "cpu" else 2048
    a = torch.randn(n, n, device=device, dtype=engine.dtype)
    model.train()
    runner = compile_model(model, config, engine, lambda: (x, y), torch.Generator())
    steps = [lambda: a @ a, lambda: train_step(runner, optimizer, lambda: (x, y), config, engine)]
    if bench.against:
        _, peer_step = nanogpt_step(bench.against, c, device)
        steps.append(lambda: peer_step(x, y))
    times = timed(*steps, seconds=bench.bench_seconds)
    peak, tokens = 2 * n**3 / times[0], x.numel()
    rows["matrix products, GFLOP/s"] = peak / 1e9
    rows["training, tokens/s"] = tokens / times[1]
    rows["training, model-FLOPs utilization"] = flops_per_token(model) * tokens / times[1] / peak
    if bench.against:
        rows["training, nanoGPT in float32, tokens/s"] = tokens / times[2]
        rows["training, times nanoGPT"] = times[2] / times[1]
    elif memory := peak_memory(device):  # of this model alone
        rows["peak memory, MiB"] = memory / 2**20


def bench_generation(rows: dict, model, engine, n: int, bench: BenchConfig) -> None:
    """Tokens per second of writing n tokens from a prompt of one."""
    c, start = model.config, torch.zeros(1, 1, dtype=torch.long, device=engine.device)
    model.to(engine.dtype).eval()
    short = min(n, c.block_size - 1)  # Hugging Face's has no way to go on from there

    def write(rows=1, n=n, **options):
        model.generate(start.expand(rows, 1), n, **options)

    runs = {"with the cache": (n, write), "without it": (n, lambda: write(use_cache=False)),
            "8 samples at once": (8 * n, lambda: write(8))}
    if peer := huggingface_writer(c, engine.device):
        runs["Hugging Face in float32"] = (short, lambda: peer(start, short))
        runs["as many tokens as it"] = (short, lambda: write(n=short))
    if bench.against:
        nano = nanogpt_step(bench.against, c, engine.device)[0].eval()
        runs["nanoGPT in float32"] = (n, lambda: nano.generate(start, n))
    rates = {name: tokens / seconds for (name, (tokens, _)), seconds in zip(
        runs.items(), timed(*(run for _, run in runs.values()), seconds=bench.bench_seconds))}
    for name, rate in rates.items():
        rows[f"writing, {name}, tokens/s"] = rate
    cached = rates["with the cache"]
    rows["writing, times without the cache"] = cached / rates["without it"]
    rows["writing, 8 samples, times one"] = rates["8 samples at once"] / cached
    if peer:
        rows["writing, times Hugging Face"] = (rates["as many tokens as it"]
                                               / rates["Hugging Face in float32"])
    if bench.against:
        rows["writing, times nanoGPT"] = cached / rates["nanoGPT in float32"]


def bench_tokenizers(rows: dict, text: str, bench: BenchConfig) -> None:
    """Characters per second."""
    char, bpe = CharTokenizer.train(text), BPETokenizer.train(text, 1024)

    def encode_anew():
        bpe.cache.clear()
        bpe.encode(text)

    times = timed(lambda: char.encode(text), lambda: BPETokenizer.train(text, 1024), encode_anew,
                  seconds=bench.bench_seconds)
    rows["characters, encoding, million characters/s"] = len(text) / times[0] / 1e6
    rows["BPE, training 1,024 tokens, s"] = times[1]
    rows["BPE, encoding, million characters/s"] = len(text) / times[2] / 1e6


def run_bench(args) -> None:
    """--mode bench: the table goes to stdout, and to bench.json."""
    config = BenchConfig(**given_settings(args, BenchConfig))
    n = GenerateConfig(**given_settings(args, GenerateConfig)).max_tokens
    model_settings, train_config = fresh_configs(args, find_device(args.device))
    engine = make_engine(args.device, train_config.dtype)
    train_config = replace(train_config, dtype=engine.dtype_name)
    torch.manual_seed(train_config.seed)
    model = build_model(GPTConfig(**model_settings)).to(engine.device)
    rows = {f"parameters, {part}": count for part, count in count_parts(model).items()}
    rows["parameters"] = model.num_parameters()
    bench_training(rows, model, train_config, engine, config)
    bench_generation(rows, model, engine, n, config)
    text = Text.survey(find_corpus(args.data))
    bench_tokenizers(rows, next(text.chunks("train")), config)
    out_dir = Path(args.out_dir)
    make_folder(out_dir)
    machine = f"{engine.device}, {engine.dtype_name}, {torch.get_num_threads()} threads, PyTorch " \
              f"{torch.__version__}"
    record = {"machine": machine, "model_config": asdict(model.config),
              "train_config": asdict(train_config), "rows": rows}
    (out_dir / "bench.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    print(f"| {train_config.preset}: {machine} | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | " + (f"{value:,.0f} |" if value >= 100 else f"{value:.3g} |"))


# ==================================================================================================
# The command line [optional reading]
#
# Problem   Every setting should be a flag, and a slip of the finger should cost one line to read.
# Answer    Flags are made from the dataclasses of "Configuration". A flag that was not typed stays
#           absent, so one can tell "the user wants 6" from "6 is the default": settings come from
#           the defaults, then the preset, then the flags.
# ==================================================================================================


class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake raises UserError and the message offers a near miss."""

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            flag = message.partition(": ")[2].strip().partition(" ")[0].partition("=")[0] or '""'
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            advice = f"did you mean {close[0]}?" if close else "see --help for what there is"
            message = f"{flag}: unknown; {advice}"
        raise UserError(message.removeprefix("argument "))


def add_flags(group, config_class) -> None:
    """A flag for each field of a dataclass, and a --no_ flag for each switch. Not typed: absent."""
    for f in fields(config_class):
        rule = f.metadata
        shown = rule["help"] + ("" if f.default is None else f" ({f.default!r})")
        if rule["kind"] is bool:
            for flag, value, text in (("", True, shown), ("no_", False, argparse.SUPPRESS)):
                group.add_argument(f"--{flag}{f.name}", dest=f.name, action="store_const",
                                   const=value, default=argparse.SUPPRESS, help=text)
        else:
            metavar = "{" + ",".join(rule["choices"]) + "}" if rule["choices"] else f.name.upper()
            group.add_argument(f"--{f.name}", type=rule["kind"], metavar=metavar, help=shown,
                               default=argparse.SUPPRESS)


def build_parser() -> Parser:
    """The flags, grouped by the chapters they belong to."""
    parser = Parser(prog="minigpt.py", allow_abbrev=False,
                    description="Train a GPT on Shakespeare, and write with it.",
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="presets:\n" + "\n".join(
                        f"  {name:8} {p.about}; takes {p.takes}" for name, p in PRESETS.items()))
    common = parser.add_argument_group("common")
    common.add_argument("--mode", choices=sorted(MODES), default=None, help="what to do")
    common.add_argument("--data", metavar="PATH",
                        help="a UTF-8 text (data/input.txt; with a checkpoint, the text it is of)")
    common.add_argument("--out_dir", metavar="PATH", default="out", help="the run's folder (out)")
    common.add_argument("--checkpoint", metavar="PATH",
                        help="the checkpoint to use (best.pt of out_dir; to resume, latest.pt)")
    common.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    common.add_argument("--resume", action="store_true",
                        help="train on from latest.pt, or from --checkpoint, with its settings")
    add_flags(parser.add_argument_group("the model (The parts, The model)"), GPTConfig)
    add_flags(parser.add_argument_group("training (Learning)"), TrainConfig)
    add_flags(parser.add_argument_group("writing (Generation)"), GenerateConfig)
    add_flags(parser.add_argument_group("comparing (Experiments)"), AblateConfig)
    add_flags(parser.add_argument_group("measuring (Experiments)"), BenchConfig)
    return parser


def given_settings(args, config_class) -> dict:
    """The fields of a config that were typed on the command line."""
    return {f.name: getattr(args, f.name) for f in fields(config_class) if hasattr(args, f.name)}


def choose_preset(name: str, device: torch.device) -> tuple[str, Preset]:
    """The preset by its name; auto goes by the device. Says which it is."""
    if name != "auto" and name not in PRESETS:
        raise UserError(f"--preset {name}: unknown; choose one of auto, {', '.join(PRESETS)}")
    why = "as asked"
    if name == "auto":
        name = "laptop" if device.type == "cpu" else "gpt"
        why = f"chosen for {device.type}"
    preset = PRESETS[name]
    others = ", ".join(other for other in PRESETS if other != name)
    say(f"preset {name} ({why}): {preset.about}; takes {preset.takes}; the status line soon tells "
        f"the time left here. Others, by --preset: {others}")
    return name, preset


def fresh_configs(args, device) -> tuple[dict, TrainConfig]:
    """The settings of a new run: defaults, then the preset, then the flags that were typed."""
    name, preset = choose_preset(getattr(args, "preset", "auto"), device)
    chosen = {**preset.settings, **given_settings(args, GPTConfig),
              **given_settings(args, TrainConfig), "preset": name}
    names = {f.name for f in fields(GPTConfig)}
    model = {k: v for k, v in chosen.items() if k in names}
    if not hasattr(args, "min_lr"):  # a peak typed below the preset's floor takes it down along
        chosen["min_lr"] = min(chosen.get("min_lr", TrainConfig.min_lr),
                               chosen.get("learning_rate", TrainConfig.learning_rate))
    return model, TrainConfig(**{k: v for k, v in chosen.items() if k not in names})


def resumed_config(args, state: dict, path: Path) -> TrainConfig:
    """The settings of a run to go on with: the checkpoint's, and what may change of the typed."""
    model_config = GPTConfig(**state["model_config"])
    train_config = TrainConfig(**state["train_config"])
    changes = {}
    for config in (model_config, train_config):
        for f in fields(config):
            old, new = getattr(config, f.name), getattr(args, f.name, None)
            if new is None or new == old or (f.name == "preset" and new == "auto"):
                continue
            if not f.metadata["resume"]:
                raise UserError(f"--{f.name} {new}: cannot change on --resume, {path} was trained "
                                f"with {old}; leave the flag out, or start a new run")
            changes[f.name] = new
    return replace(train_config, **changes)


def make_folder(path: Path) -> None:
    """Creates out_dir and proves that it can be written to, before any work is done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe"
        probe.write_text("", encoding="utf-8")
        probe.unlink(missing_ok=True)
    except OSError as problem:
        raise UserError(f"--out_dir {path}: cannot write there ({problem.strerror}); choose "
                        "another folder") from None


def set_aside(out_dir: Path, corpus: Corpus) -> None:
    """Moves the files of an earlier run to a folder in out_dir of their own, so that a forgotten
    --resume loses nothing. Token files that are not of this corpus can be deleted."""
    for path in [*out_dir.glob("tokens_*.bin"), *out_dir.glob("tokens_*.partial")]:
        if path not in (corpus.train.path, corpus.val.path):
            path.unlink()
    names = ("best*.pt", "latest*.pt", "step_*.pt", "metrics.jsonl", "config.json", "loss.png")
    files = [path for name in names for path in out_dir.glob(name)]
    if not any(path.suffix == ".pt" for path in files):
        return
    folders = (out_dir / f"earlier_{n}" for n in itertools.count(1))
    earlier = next(path for path in folders if not path.exists())
    earlier.mkdir()
    for path in files:
        path.replace(earlier / path.name)
    say(f"{out_dir} held an earlier run: it is in {earlier} now; delete it if it is no longer "
        f"needed, or go on with it by --resume --out_dir {earlier}")


def names_of_runs(out_dir: Path) -> set[str]:
    """The names of the runs that left best.pt and latest.pt in a folder; normally it is one."""
    names = set()
    for name in ("best.pt", "latest.pt", PREVIOUS):
        with contextlib.suppress(UserError):  # missing, or damaged
            names.add(load_checkpoint(out_dir / name)["progress"].get("run"))
    return names


def chosen_data(args, state: dict | None) -> str | None:
    """The corpus by its absolute path: the one typed, or the one typed when the run began."""
    if args.data is not None:
        return str(Path(args.data).absolute())
    return state["corpus"] if state else None


def state_to_resume(args, out_dir: Path) -> tuple[dict | None, Path | None]:
    """The checkpoint to train on from: the latest of this very run if torchrun started it again
    after a crash, or else the one that --resume asks for."""
    nameless = os.environ.get("TORCHELASTIC_RUN_ID") == "none"
    if launch_name() and (not nameless or from_torchrun("TORCHELASTIC_RESTART_COUNT")):
        for name in ("latest.pt", PREVIOUS):
            with contextlib.suppress(UserError):  # missing, or damaged: then the next one
                if load_checkpoint(out_dir / name)["progress"].get("launch") == launch_name():
                    return load_latest(out_dir)
                break
    if args.resume and args.checkpoint:
        return load_checkpoint(Path(args.checkpoint)), Path(args.checkpoint)
    if args.checkpoint:
        raise UserError(f"--checkpoint {args.checkpoint}: add --resume to train on from it")
    return load_latest(out_dir) if args.resume else (None, None)


def new_settings(args, team: Team) -> tuple[dict, TrainConfig]:
    """The settings of a new run. Mistakes among them show before a corpus is fetched."""
    model_settings, config = fresh_configs(args, find_device(args.device))
    GPTConfig(**model_settings)
    if "vocab_size" in model_settings and config.tokenizer != "bpe":
        raise UserError(f"--vocab_size {model_settings['vocab_size']}: goes with --tokenizer "
                        f"bpe only; the vocabulary of {config.tokenizer} is what it is")
    typed = {"batch_size", "grad_accum"} & vars(args).keys()
    return model_settings, share_steps(config, team.size, may_change=not typed)


def new_model(settings: dict, config: TrainConfig, text: Text) -> tuple:
    """A tokenizer for a text, and a model for its tokens. Its weights depend on the seed alone."""
    tokenizer = make_tokenizer(config.tokenizer, text, settings.get("vocab_size"))
    torch.manual_seed(config.seed)
    return build_model(GPTConfig(**{**settings, "vocab_size": tokenizer.vocab_size})), tokenizer


def find_text(args, state: dict | None) -> tuple[Text, str | None]:
    """The corpus; and its path as a checkpoint keeps it, so that a later --resume or eval goes to
    the same text: None for the usual one. Raises UserError if a resumed run had another text."""
    data = chosen_data(args, state)
    path = find_corpus(data)
    text = Text.survey(path)
    if state and text.sha256 != state["corpus_sha256"]:
        raise UserError(f"--data {path}: cannot change on --resume; its sha256 is "
                        f"{text.sha256[:12]}, the run's is {state['corpus_sha256'][:12]}")
    return text, data if path == DATA / "input.txt" else str(path)


def run_train(args) -> None:
    """--mode train: first the settings, then the corpus and the model, then the loop."""
    out_dir, team = Path(args.out_dir), setup_distributed()
    state, path = team.share(lambda: state_to_resume(args, out_dir))
    if state:
        model, tokenizer = model_from_checkpoint(state)
        config = share_steps(resumed_config(args, state, path), team.size, may_change=False)
    else:
        model_settings, config = new_settings(args, team)
    engine = make_engine(args.device, config.dtype, team)
    config = replace(config, dtype=engine.dtype_name)  # what auto has become, so a resume keeps it
    with team.first_on_each_machine():
        make_folder(out_dir)
        text, data = find_text(args, state)
        if not state:
            model, tokenizer = new_model(model_settings, config, text)
        corpus = encode_corpus(text, tokenizer, model.config.block_size, out_dir, data)
    settings = {"model_config": asdict(model.config), "train_config": asdict(config)}
    if team.share(lambda: (settings, text.sha256)) != (settings, text.sha256):
        raise UserError(f"--data {text.path}: this text, or the settings, are not those of the "
                        "first process; give all the same command and the same file")
    if team.rank == 0:
        if not state or names_of_runs(out_dir) - {state["progress"]["run"]}:
            set_aside(out_dir, corpus)
        (out_dir / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    model.to(engine.device)
    say(f"corpus {text.path}: {len(corpus.train):,} training and {len(corpus.val):,} validation "
        f"tokens, vocabulary {tokenizer.vocab_size}")
    say(f"model {model.config.model}: {model.num_parameters():,} parameters "
        f"({model.num_parameters() / 1e6:.1f}M); device {engine.device}, {engine.dtype_name}, "
        f"{torch.get_num_threads()} threads" + f", {team.size} processes" * (team.size > 1))
    if state:
        say(f"resuming {path} at step {state['progress']['step']}")
    train(model, tokenizer, corpus, config, engine, out_dir, state)


def load_for_use(args) -> tuple[LanguageModel, CharTokenizer, dict, Path]:
    """The checkpoint that generate and eval work with: --checkpoint, or best.pt of --out_dir."""
    path = Path(args.checkpoint) if args.checkpoint else Path(args.out_dir) / "best.pt"
    state = load_checkpoint(path)
    return *model_from_checkpoint(state), state, path


def run_generate(args) -> None:
    """--mode generate"""
    config = GenerateConfig(**given_settings(args, GenerateConfig))
    common = TrainConfig(**given_settings(args, TrainConfig))  # for its seed and dtype
    engine = make_engine(args.device, common.dtype)
    model, tokenizer, state, path = load_for_use(args)
    say(f"{path}: step {state['progress']['step']}, {model.num_parameters():,} parameters")
    model.to(engine.device, engine.dtype)  # nothing is learned here: 16 bits will do for weights
    write_text(model, tokenizer, config, engine, common.seed, sys.stdout)


def run_eval(args) -> None:
    """--mode eval"""
    engine = make_engine(args.device, "float32")
    model, tokenizer, state, path = load_for_use(args)
    corpus_path = find_corpus(chosen_data(args, state))
    text = Text.survey(corpus_path)
    corpus = encode_corpus(text, tokenizer, model.config.block_size, path.parent)
    if corpus.sha256 != state["corpus_sha256"]:
        say(f"note: {corpus_path} is not the text that {path} was trained on")
    nats = evaluate(model.to(engine.device), corpus.val, engine.device)
    print(score_line(nats, corpus))


MODES = {"train": run_train, "generate": run_generate, "eval": run_eval, "ablate": run_ablate,
         "bench": run_bench}


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0, 2 for a user's mistake, 128 + n for signal n."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not be UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    # --max-steps is understood as --max_steps
    argv = [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), a) for a in argv]
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
        if args.mode is None:
            raise UserError(f"--mode is missing: choose one of {', '.join(MODES)} (see --help)")
        if from_torchrun("WORLD_SIZE", 1) > 1 and args.mode != "train":
            raise UserError(f"--mode {args.mode}: runs in one process; start it with python, not "
                            "with torchrun")
        MODES[args.mode](args)
        return 0
    except Diverged as problem:  # the same in all processes
        say(f"error: {problem}")
        return 2
    except UserError as problem:
        complain(f"error: {problem}")
        return 2
    except Stopped as stopped:
        say("saved; go on with --resume")
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        say()
        return 130
    except BrokenPipeError:  # our reader has left: enough text for `generate | head`
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 0 if any("generate" in a for a in argv) else 141
    except OSError as problem:
        complain(f"error: {problem.filename or '--out_dir'}: {problem.strerror}; free some space, "
                 "or choose another --out_dir")
        return 2
    except (MemoryError, RuntimeError) as problem:  # torch has no one class for a lack of memory
        reason = f"{type(problem).__name__} {problem}"
        if from_torchrun("WORLD_SIZE", 1) > 1 and re.search("gloo|nccl|connection|Dist", reason):
            say("error: another process of this run has ended; what was saved is intact: go on "
                "with --resume")
            return 1
        if not re.search("memory|alloc|overflow", reason, re.I):
            raise
        complain("error: out of memory; lower --batch_size (and raise --grad_accum), --block_size, "
                 "--n_embd or --num_samples")
        return 2
    finally:
        leave_distributed()


if __name__ == "__main__":
    leave_process(main())
