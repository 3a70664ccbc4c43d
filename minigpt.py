"""
minigpt: a GPT trained on Shakespeare, from scratch, in one file
================================================================

A language model answers one question over and over: given the text so far, what comes next? This
file builds one that answers it well enough to write verse in the manner of Shakespeare.

    python minigpt.py --mode train                        # minutes on a laptop
    python minigpt.py --mode generate --prompt "ROMEO:"   # write with the result

The file is a book in five parts, to be read from the top:

    Part I     A GPT, complete    from characters to verse; nothing in it needs to be skipped
    Part II    Better             variations of each part: what each changes and what it brings
    Part III   The machine room   devices, processes, signals, damaged files, records, the corpus
    Part IV    The laboratory     comparing, measuring, exchange with Hugging Face, a look inside
    Part V     The command line   presets, flags, modes

Part I uses nothing of the parts that follow. Where one of them will have another answer, Part I
keeps its own in a table (`NORMS`, `ACTIVATIONS`, ...) or in a method that a subclass may replace,
and says so. `--mode train --preset plain` trains the model of Part I, in 2 to 3 minutes on two
cores; the experiments, "Try it", are variations of that command, each in an --out_dir of its own,
with the seed 1337.

PyTorch supplies tensors, derivatives, the layers Linear (y = x W^T + b) and Embedding (a table of
vectors, looked up by row number), Dropout, the usual functions, and AdamW; `.to(device)` moves a
tensor to the CPU or a GPU. What makes a GPT a GPT is written here.
Calling a PyTorch module, `model(x)`, runs its method `forward(x)`. A tensor's sizes, as (B, T, C):

    B    batch: how many sequences are processed side by side
    T    time: how many tokens (here: characters) each has, at most block_size
    C    channels: how many numbers describe one token, n_embd
    V    vocabulary: how many different tokens there are, vocab_size
    nh   number of attention heads, n_head;      hs   size of a head, C / nh
"""

import json
import math
import os
import random
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # it is not needed here

import torch
import torch.nn as nn
import torch.nn.functional as F

# ==================================================================================================
# Part I: A GPT, complete
# ==================================================================================================

class UserError(ValueError):
    """A mistake that whoever runs the program can mend: shown as one line, without a traceback."""

# ---- The sizes -----------------------------------------------------------------------------------
# A handful of numbers defines a model, each explained where it is used, each a flag (--n_layer 8).
# The defaults are a larger model's; `plain` has 4 layers, 4 heads, 128 channels, 128 tokens.
@dataclass
class GPTConfig:
    """The sizes of a model, and which kind of each part it has."""
    vocab_size: int  # V: distinct tokens: counted in the corpus; bpe: a limit, 1024 if not given
    block_size: int = 256  # context: the most tokens that the model sees at once
    n_layer: int = 6  # blocks stacked on each other
    n_head: int = 6  # attention heads in each block
    n_embd: int = 384  # C: channels, numbers that describe one token
    mlp_ratio: float = 4.0  # width of the MLP, over n_embd
    dropout: float = 0.2  # share of numbers set to zero in training
    bias: bool = True  # bias vectors in Linear and LayerNorm, as GPT-2 has them
    model: str = "gpt"  # the GPT, or the bigram baseline
    # Kinds of parts: Part I has the one that stands here, Part II has more.
    norm: str = "layernorm"  # normalization
    norm_position: str = "pre"  # normalize before each part, or after its addition
    pos: str = "learned"  # how the model knows positions
    activation: str = "gelu"  # the function between the two halves of the MLP
    qk_norm: bool = False  # normalize queries and keys
    token_shift: bool = False  # half of what a part sees is of the position before
    tie_weights: bool = True  # one matrix for token vectors and output head
    attention: str = "explicit"  # attention and LayerNorm written out, or one fused kernel each

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd {self.n_embd}: must be divisible by --n_head {self.n_head}")

# ---- Characters ----------------------------------------------------------------------------------
# Problem   A network computes with numbers; we need a map from text to integers and back.
# Answer    Number the distinct characters of the corpus in sorted order. A piece of text that has a
#           number of its own is called a token, and its number the token's id; here every token is
#           one character. `stoi` ("string to integer") encodes, `itos` decodes. Tiny Shakespeare
#           has V = 65 characters: letters, a little punctuation, the digit 3, space and line break.
# Shapes    str of n characters -> list of n integers in [0, V)
#
# The ids mean nothing by their size. The model looks each up in a table of learned vectors.
class CharTokenizer:
    """One token for each distinct character.

    >>> tokenizer = CharTokenizer.train("to be")
    >>> tokenizer.itos                                 # sorted: the space comes first
    [' ', 'b', 'e', 'o', 't']
    >>> tokenizer.encode("to be")
    [4, 3, 0, 1, 2]
    >>> tokenizer.decode([1, 2, 2])
    'bee'
    """
    kind = "char"
    start, end = 0, None  # a sample begins with id 0, Shakespeare's line break; no end mark

    def __init__(self, itos: list[str]):
        self.state = self.itos = list(itos)  # `state` is what a new one can be made from
        self.stoi = {character: i for i, character in enumerate(self.itos)}
        self.vocab_size = len(self.itos)

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The vocabulary of a text: its distinct characters, sorted."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """Text to ids. Raises UserError, naming the character, for one outside the vocabulary."""
        for c in set(text).difference(self.stoi):
            raise UserError(f"the character {c!r} (U+{ord(c):04X}) is not in the vocabulary of "
                            f"{self.vocab_size}; leave it out, or train on a text that has it")
        return [self.stoi[character] for character in text]

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""
        return "".join([self.itos[i] for i in ids])

    def save(self, folder) -> None:
        """Writes folder/chars.json. (A checkpoint holds `state` instead.)"""
        Path(folder, "chars.json").write_text(json.dumps(self.itos), encoding="utf-8")

    @classmethod
    def load(cls, folder) -> "CharTokenizer":
        """Reads what save wrote."""
        return cls(json.loads(Path(folder, "chars.json").read_text(encoding="utf-8")))

TOKENIZERS = {"char": CharTokenizer}  # Part II: larger tokens

# ---- Batches -------------------------------------------------------------------------------------
# Problem   To learn "what comes next" we need pairs of a context and the token that followed it.
# Answer    The text is its own answer key: the targets are the same tokens, shifted by one.
#
#               text      T  o  _  b  e           (_ is the space)
#               x         T  o  _  b              input:  4 tokens
#               y            o  _  b  e           target: the token that follows each of them
#
#           One sequence of T tokens holds T examples at once: T -> o, To -> _, To_ -> b, To_b -> e.
# Shapes    tokens (N,) -> x (B, T), y (B, T)
#
# The last tenth of the text is held out for validation: the model never trains on it, so how well
# it does there measures what was learned and not what was memorized.
@dataclass
class Corpus:
    """A text as tokens, in two parts."""
    train: torch.Tensor  # (N,) ids of the first nine tenths of the characters, 2 bytes each
    val: torch.Tensor  # ids of the last tenth
    val_characters: int  # how many characters the tokens of val stand for

    @classmethod
    def from_text(cls, text: str, tokenizer) -> "Corpus":
        cut = int(0.9 * len(text))
        train, val = (torch.tensor(tokenizer.encode(part), dtype=torch.uint16)
                      for part in (text[:cut], text[cut:]))
        return cls(train, val, len(text) - cut)

def get_batch(tokens, block_size: int, batch_size: int, generator=None):
    """batch_size windows at random positions of tokens (N,): x and y (B, T), int64.
    generator: a torch.Generator, a source of random numbers: seeded alike, it draws alike.

    >>> x, y = get_batch(torch.arange(5), block_size=4, batch_size=1)
    >>> x.tolist(), y.tolist()                 # only one position: a window is 4 + 1 tokens
    ([[0, 1, 2, 3]], [[1, 2, 3, 4]])
    """
    # Subtle: a window takes block_size + 1 tokens, so the last start is len - block_size - 1, and
    # randint's upper end is exclusive.
    starts = torch.randint(len(tokens) - block_size, (batch_size,), generator=generator)
    return cut_windows(tokens, block_size, starts)

def cut_windows(tokens, block_size: int, starts):
    """The windows that begin at starts (B,): x and y (B, T)."""
    windows = tokens[starts[:, None] + torch.arange(block_size + 1)].long()  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]

# ---- The task, and the simplest model ------------------------------------------------------------
# Problem   What is a good guess? And what is the least that a model can do?
# Logits    A model gives V numbers for the next token, its logits, one for each token that may
#           come; the larger, the likelier. Softmax makes probabilities of them, positive and of sum
#           1: p_i = exp(logit_i) / sum_j exp(logit_j).
# Loss      The model is judged by the probability that it gave to the token that really came:
#           loss = -log p_target, zero if it was certain and right, large if it was sure of
#           something else. The mean over the tokens of a text is called cross-entropy. Its unit is
#           the nat (ln 2 nats are one bit), and exp(loss) is the perplexity: the model is as unsure
#           as if it had to choose among so many tokens that are equally likely.
# Example   logits 2, 1, 0 -> p = 0.67, 0.24, 0.09. If the second token comes, the loss is 1.41.
# Bounds    A model that knows nothing gives every token 1/V: its loss is ln 65 = 4.17. The other
#           end is not 0: only who had seen the text before could foresee it letter by letter.
# Gradient  The derivative of the loss with respect to each of the numbers that a model learns, its
#           weights, tells how to change it: a little against it, and the loss goes down. All these
#           derivatives are the gradient. With respect to logit i it can be had by hand: p_i, minus
#           1 for the token that came. In words: lower each other logit by its probability, raise
#           that of what came by their sum. loss.backward() computes the same, through any number of
#           functions on the way (the chain rule, from the loss backwards); it *adds* the result to
#           `.grad` of each tensor whose requires_grad is set.
#
# >>> logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
# >>> loss = cross_entropy(logits, torch.tensor([1]))
# >>> loss.backward()
# >>> print(f"{loss.item():.2f}", [round(g, 2) for g in logits.grad[0].tolist()])
# 1.41 [0.67, -0.76, 0.09]
# >>> better = logits - 1.0 * logits.grad            # a step of size 1 against the gradient
# >>> print(f"{cross_entropy(better, torch.tensor([1])).item():.2f}")
# 0.60
def cross_entropy(logits, targets):
    """The mean of -log(probability of the target): logits (..., V), targets (...) -> a scalar.

    PyTorch's function, given (B T, V) and (B T,), takes the softmax, then -log of the target's
    entry, in one pass; in float32, whatever the type of the logits."""
    targets = targets.to(logits.device)
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())

# The least that a model can do is to look at the current character alone: after `q`, how often
# comes `u`? The bigram model is a table of V x V numbers, whose row i holds the logits of what
# follows token i. It starts at random and is learned by the loop that will train the GPT.
#
# Shapes    ids idx (B, T) -> logits (B, T, V): for each position of a sequence, what may come next
# Try it    --preset bigram takes seconds and ends at 2.4845 nats per character. Counting the pairs
#           of the training part (each once more than it occurs, so that none is impossible) gives
#           2.4819. What a GPT gains over that, it gains by looking further back.
class Bigram(nn.Module):
    """The baseline: the next token from this one alone."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.vocab_size)  # "word token embedding"
        nn.init.normal_(self.wte.weight, mean=0.0, std=0.02)

    def forward(self, idx, targets=None, start=0):
        """As GPT's, below: logits (B, T, V), and the loss where targets are given."""
        logits = self.wte(idx.to(self.wte.weight.device))
        return logits, None if targets is None else cross_entropy(logits, targets)

# ---- Causal self-attention -----------------------------------------------------------------------
# Now the GPT. Inside it each token is a vector of C numbers, and two kinds of part take turns:
# attention moves information between tokens, and the MLP then processes each token by itself.
#
# Problem   In "the queen spoke and all obeyed her" (think of words as tokens for a moment), `her`
#           needs to find `queen`: a token must gather from the tokens before it, and which of them
#           matter depends on what they are.
# Answer    Each token asks a question (its query q), advertises what it has (its key k) and carries
#           a message (its value v). All three are linear functions of its vector. How well a query
#           fits a key is their dot product, the attention score. A softmax turns the scores of a
#           token's query with the keys of all tokens up to itself into shares of 1 (`weights`); the
#           answer is the mean of the values by these shares.
# Equation  Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k) + mask) V
#           [Vaswani et al. 2017, section 3.2.1; the mask is their section 3.2.3]
#           Q, K, V are `q`, `k`, `v`; d_k is the head size `hs`.
# The mask  Position t may look at positions up to t: anything later is what it has to predict. So
#           all T positions of a sequence can be computed in one pass, and none sees its answer. A
#           score of minus infinity becomes a weight of exactly zero:
#
#                       key    T    o    _    b
#               query T        .  -inf -inf -inf           . is a score that stays
#               query o        .    .  -inf -inf
#               query _        .    .    .  -inf
#               query b        .    .    .    .
#
# The root  A dot product of two vectors of hs independent numbers of mean 0 and variance 1 has the
#           variance hs. Dividing by sqrt(hs) undoes that: whatever the head size, the softmax
#           starts soft, not frozen into a choice of one.
# Example   hs = 1; one query, 2; two keys, 1 and 3; their values, 10 and 20. Scores 2 and 6,
#           weights 0.018 and 0.982, answer 0.018 * 10 + 0.982 * 20 = 19.8.
# Heads     One softmax can focus on one thing at a time. nh heads of size C / nh each have their
#           own q, k and v, and c_proj mixes what they found [section 3.2.2].
# Dropout   sets a random share p of its input to zero and divides the rest by 1 - p, so that the
#           model cannot rely on a single path [Srivastava et al. 2014]. It acts in training only:
#           model.train() switches it on, model.eval() off.
# Shapes    (B, T, C) -> q, k, v (B, nh, T, hs) -> scores (B, nh, T, T) -> answers (B, nh, T, hs)
# Try it    In `attend`, leave out `+ mask` and train with --max_steps 300. At step 200 the loss is
#           2.35, at step 250 it is 0.09: the model has found out that the answer stands in the next
#           position. The sample is a single "e": at writing time there is no next position.
class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no position sees a later one: (B, T, C) -> (B, T, C)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        # Three projections in one matrix product: q, k and v stand side by side in its output.
        # (Layers bear the names that they have in GPT-2's published weights.)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        q, k, v = self.heads(x)  # (B, nh, T, hs) each
        y = self.attend(q, k, v)  # (B, nh, T, hs)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C): the heads side by side again
        return self.resid_dropout(self.c_proj(y))

    def heads(self, x):
        """q, k, v of each head: (B, T, C) -> (B, T, nh, hs) -> (B, nh, T, hs). (Part II: more.)"""
        parts = self.c_attn(x).chunk(3, dim=-1)  # (B, T, C) each
        return [part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in parts]

    def attend(self, q, k, v):
        """The equation. (triu leaves -inf above the diagonal and sets the rest to 0.)"""
        T, hs = q.shape[-2:]
        scores = (q / math.sqrt(hs)) @ k.transpose(-2, -1)  # (B, nh, T, T): row query, column key
        mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(diagonal=1)
        weights = torch.softmax(scores + mask, dim=-1)  # each row sums to 1
        return self.attn_dropout(weights) @ v

ATTENTION = {"explicit": CausalSelfAttention}  # Part II: fused kernels

# ---- Positions -----------------------------------------------------------------------------------
# Problem   Attention takes a mean over a set: shuffle the earlier tokens, and a layer gives the
#           last one the same answer. But "dog bites man" is not "man bites dog".
# Answer    A learned vector for each position 0 .. block_size - 1 is added to the token's own
#           vector [Radford et al. 2018, section 3.1]. The price: there is none for position
#           block_size, so the context is bounded.
# Shapes    positions (T,) -> vectors (T, C)
POSITIONS = {"learned": lambda config: nn.Embedding(config.block_size, config.n_embd)}

# ---- The MLP -------------------------------------------------------------------------------------
# Problem   Attention only forms weighted means of values. Something has to compute with them: a
#           multi-layer perceptron, two linear maps with a function between.
# Equation  MLP(x) = GELU(x W_1 + b_1) W_2 + b_2, at each position alone
#           [Vaswani et al. 2017, section 3.3, with max(0, x) where GPT has GELU]
#           W_1 is `c_fc`, W_2 is `c_proj` (a Linear stores W transposed: out x in); the middle is
#           mlp_ratio times as wide as the ends. The function between them, called the activation
#           function, is not linear: else the two matrices would be no more than one.
#           GELU(x) = x Phi(x), Phi being the cumulative distribution of the standard normal: a
#           smooth max(0, x). GPT-2 uses its tanh form [Hendrycks and Gimpel 2016, section 2]:
#           0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
# Example   GELU(2) = 1.95, GELU(0) = 0, GELU(-2) = -0.05: nearly x, nothing, nearly nothing.
# Shapes    (B, T, C) -> (B, T, mlp_ratio C) -> (B, T, C)
def gelu(x):
    """The equation in its tanh form."""
    return F.gelu(x, approximate="tanh")

ACTIVATIONS = {"gelu": gelu}  # Part II: relu, its square, silu

class MLP(nn.Module):
    """Two linear maps with an activation function between them, applied to each token by itself."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = int(config.mlp_ratio * config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.activation(self.c_fc(x))  # (B, T, mlp_ratio C)
        return self.dropout(self.c_proj(x))

MLPS = {"gelu": MLP}  # by activation; Part II: one with a product inside

# ---- Normalization -------------------------------------------------------------------------------
# Problem   Layer upon layer, numbers may grow or shrink, and a layer learns best from inputs whose
#           scale it can rely on.
# Equation  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
#           [Ba et al. 2016, sections 3 and 3.1, where weight is the gain g; eps is added]
#           over the C channels of one token, so that no token depends on another, nor on the batch.
# Example   x = [1, 3]: mean 2, variance 1 -> [-1, 1], before weight and bias.
# Shapes    (B, T, C) -> (B, T, C)
class LayerNorm(nn.Module):
    """Centre and rescale each token's channels; then a learned gain and, optionally, a bias."""
    eps = 1e-5  # keeps a constant input from dividing by zero

    def __init__(self, n_embd: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        x = x - x.mean(dim=-1, keepdim=True)
        var = x.square().mean(dim=-1, keepdim=True)  # (B, T, 1); divided by C, not by C - 1
        y = x * torch.rsqrt(var + self.eps) * self.weight
        return y if self.bias is None else y + self.bias

NORMS = {"layernorm": lambda n, config: LayerNorm(n, config.bias)}  # Part II: RMSNorm

# ---- The block -----------------------------------------------------------------------------------
# Problem   Stack the parts so that a deep network still learns.
# Answer    Each part adds its work to its input and passes the sum on [He et al. 2016a, section 3].
#           From the first block to the last there is a straight road of additions, the residual
#           stream, along which a gradient arrives whole [He et al. 2016b, section 2]. The norm sits
#           on the side roads, before each part, and leaves the main road alone: "pre-norm"
#           [Radford et al. 2019, section 2.3].
#
#               x ----+------------------------> (+) ----+----------------------> (+) ---->
#                     |                           ^      |                         ^
#                     +--> ln_1 --> attention ----+      +--> ln_2 --> MLP --------+
#
# Try it    In Block.forward, leave out the two `x +` and train with --max_steps 600: 3.35, what
#           the frequencies of the characters alone would give. With them it is 1.93.
class Block(nn.Module):
    """One layer: tokens exchange information, then each is processed. (B, T, C) -> (B, T, C)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, config)
        self.attn = ATTENTION[config.attention](config)
        self.ln_2 = NORMS[config.norm](config.n_embd, config)
        self.mlp = MLPS[config.activation](config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x

BLOCKS = {"pre": Block}  # Part II: post-norm

# ---- The model -----------------------------------------------------------------------------------
# Problem   Ids go in, logits must come out, at every position at once.
# Answer    Look up a vector for each token, add its position's, let n_layer blocks work on it,
#           normalize once more, and compare the result with each token's vector: the dot products
#           are the logits.
#
#               "To be"                                          text
#                  |     CharTokenizer.encode
#               [32, 53, 1, 40, 43]                              idx     (B, T)
#                  |     wte: a row for each id           + wpe: a row for each position
#               vectors                                          x       (B, T, C)
#                  |     h: block 0 ... block n_layer - 1
#                  |        x + attention(ln_1(x))   looks back  (B, nh, T, T) weights
#                  |        x + MLP(ln_2(x))         thinks      (B, T, mlp_ratio C) inside
#               vectors                                          x       (B, T, C)
#                  |     ln_f, then lm_head
#               logits[b, t, v]: how likely token v is to        logits  (B, T, V)
#               follow position t, given all up to t
#
# Tying     The token table, from id to vector, and the output head, from vector to logits, are both
#           matrices (V, C). One serves as both [Press and Wolf 2017]: the Embedding picks row v for
#           token v; the Linear takes the dot product with every row.
# Start     Normal random numbers of standard deviation 0.02 [Radford et al. 2018, section 4.1]: the
#           logits are then small, and the first loss is near ln V. Whatever adds to the residual
#           stream (every c_proj) starts smaller by sqrt(2 n_layer): the stream is a sum of 2
#           n_layer contributions whose variances add up, and this keeps it from growing with depth
#           [Radford et al. 2019, section 2.3].
# Count     With mlp_ratio 4, a block has 4 C^2 weights in attention (3 for q, k and v, 1 for
#           c_proj) and 8 C^2 in the MLP. The two tables have (V + block_size) C; biases and gains
#           are few.
# Try it    --max_steps 1 prints the number of parameters, of which there are 0.8 million. With
#           --n_layer 8, twice the layers, 1.6; with --n_embd 256, twice the width, 3.2.
def tied_head(wte: nn.Embedding) -> nn.Linear:
    """(B, T, C) -> (B, T, V), by the very matrix of the token table."""
    head = nn.Linear(wte.embedding_dim, wte.num_embeddings, bias=False)
    head.weight = wte.weight
    return head

HEADS = {True: tied_head}  # by tie_weights; Part II: a matrix of its own

class GPT(nn.Module):
    """Token ids in; logits for every possible next token out, at every position at once."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # a vector for each token
        self.wpe = POSITIONS[config.pos](config)  # a vector for each position
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(BLOCKS[config.norm_position](config) for _ in range(config.n_layer))
        self.ln_f = NORMS[config.norm](config.n_embd, config)
        self.lm_head = HEADS[config.tie_weights](self.wte)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, mean=0.0, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx, targets=None, start=0):
        """idx (B, T) int64 -> logits (B, T, V), and the loss where targets (B, T) are given.

        start is the position of the first token of idx: 0, unless Part II remembers earlier ones.
        Raises ValueError if the last position is beyond block_size."""
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens given, but block_size is {self.config.block_size}")
        idx = idx.to(self.wte.weight.device)
        positions = torch.arange(start, end, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C) + (T, C)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **options):
        """Continues idx (B, T) by drawn tokens: (B, T + max_new_tokens). The next chapter tells
        how; options are those of stream_tokens."""
        drawn = stream_tokens(self, idx, max_new_tokens, temperature, top_k, top_p, **options)
        return torch.cat([idx, *drawn], dim=1)

MODELS = {"gpt": GPT, "bigram": Bigram}

def count_parameters(model: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(p.numel() for p in model.parameters())

# ---- Writing -------------------------------------------------------------------------------------
# Problem   The model gives logits for the next token. A text needs one of them, again and again.
# Answer    Draw a token by its probability, append it, ask again. How to draw is the whole art:
#
#           temperature  Divide the logits by it before the softmax. Below 1 the likely get likelier
#                        and the text safer; above 1 it gets wilder; 0 always takes the likeliest.
#           top-k        Only the k likeliest may be drawn [Fan et al. 2018, section 5.4].
#           top-p        Only the smallest set of likeliest tokens whose probabilities reach p
#                        [Holtzman et al. 2020, section 3.1]: few candidates where the model is
#                        sure, many where it is not.
#
# Example   logits 2, 1, 0 -> p = 0.67, 0.24, 0.09. At temperature 0.5 they are 0.87, 0.12, 0.02. At
#           temperature 1 with top_p = 0.7 the first two stay, as the first alone reaches only 0.67.
# Shapes    logits (B, V) -> next token (B, 1)
# Context   The model reads at most block_size tokens. When a text has outgrown that, the older half
#           of the window is dropped at once: so it seldom moves, of which Part II makes use.
# Try it    With a trained model, --mode generate --prompt ROMEO: --temperature 0 goes round in
#           circles ("I will the shall the shall the shall the shall the see the stands"): the
#           likeliest token each time does not make a typical text. --temperature 2 hardly makes
#           words: "Wegdost insendree chard tisThe is opector".
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
    banned = torch.zeros_like(ranked, dtype=torch.bool)
    if top_k is not None:
        banned[:, top_k:] = True
    if top_p is not None:  # of what top-k has left
        p = torch.softmax(ranked.masked_fill(banned, -math.inf), dim=-1)
        # Subtle: a token stays if the sum *before* it is short of top_p, so the one that crosses
        # the line stays too.
        banned |= p.cumsum(dim=-1) - p >= top_p
        banned[:, 0] = False  # also if top_p is too small a number for a float32
    banned = banned.scatter(-1, order, banned)  # from the order of rank back to that of ids
    return logits.masked_fill(banned, -math.inf)

def draw_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token for each row of logits (B, V): (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # the largest is 0, so that the division
    logits = filter_logits(logits / max(temperature, 1e-6), top_k, top_p)  # cannot overflow
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1, generator=generator)

def window_start(length: int, block_size: int) -> int:
    """Where the model begins to read in a text of `length` tokens.

    >>> [window_start(length, block_size=8) for length in (1, 8, 9, 12, 13)]
    [0, 0, 4, 4, 8]
    """
    half = (block_size + 1) // 2
    return math.ceil(max(length - block_size, 0) / half) * half

@torch.no_grad()  # nothing is noted down for gradients
def next_logits(model, idx):
    """Logits (B, V) of what follows idx (B, T). (Part II reads only what is new.)"""
    model.eval()
    start = window_start(idx.shape[1], model.config.block_size)
    logits, _ = model(idx[:, start:])  # (B, T, V)
    return logits[:, -1].float().cpu()

def stream_tokens(model, idx, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None,
                  generator=None, read=next_logits):
    """Yields max_new_tokens tokens (B, 1) that follow idx (B, T). read is what gives logits."""
    for _ in range(max_new_tokens):
        token = draw_token(read(model, idx), temperature, top_k, top_p, generator)
        idx = torch.cat([idx, token], dim=1)
        yield token

# A model of random numbers writes, too. --preset plain, at step 0 and temperature 0.8:
#
#     t3ZrjmhPPqkARxLsXlLUWHoHca  exhkyyyoNddIgAlsvSBUMyccRD$BygX-fntwzkVrM h&?j DJRbsOEHWlC!BTg3x
#
# One line, all the way through the model of --preset plain, after training:
#
#     text       T  o  _  b  e  ,  _  o  r  _  n  o  t  _  t  o             16 characters
#     idx        32 53 1  40 43 6  1  53 56 1  52 53 58 1  58 53            (1, 16)
#     vectors    of the last `o`: 0.098, 0.116, 0.093, ...                  (1, 16, 128)
#     blocks     of the last `o`: -3.31, -9.92, 0.51, ...                   (1, 16, 128)
#     logits     after the last `o`: 2.98, 7.01, -0.56, ...                 (1, 16, 65)
#     next       _ 0.826   o 0.053   - 0.029   n 0.017   line break 0.015   five likeliest of 65
#     untrained  o 0.055   g 0.026   k 0.023   I 0.022   3 0.020            by chance: 0.015

# ---- Learning ------------------------------------------------------------------------------------
# Problem   Find weights that make the corpus likely, without overshooting.
# Answer    loss.backward() gives the gradient, and a step moves every weight a little against its
#           derivative. AdamW, below, decides how far; the learning rate rises, then falls; a
#           gradient that explodes is cut. The settings:
@dataclass
class TrainConfig:
    """How a model is trained. A step is one change of the weights; a micro-step is one pass."""
    preset: str = "auto"  # the named set of settings that this run starts from
    tokenizer: str = "char"  # what a token is
    batch_size: int = 64  # B: sequences in one micro-step
    grad_accum: int = 4  # micro-steps added up into one step
    sampling: str = "random"  # where the windows of a batch are
    short_share: float = 0.0  # share of the steps, from the first, on short windows (Part II)
    short_block: int = 128  # tokens in a short window
    max_steps: int = 2000  # steps to train for
    learning_rate: float = 3e-4  # the schedule's peak
    min_lr: float = 3e-5  # where the learning rate ends; at most its peak
    warmup_steps: int = 100  # steps of linear rise to the peak
    schedule: str = "cosine"  # the fall after it
    optimizer: str = "adamw"  # how a gradient becomes a step
    weight_decay: float = 0.1  # pull of the weight matrices towards zero
    beta1: float = 0.9  # AdamW: memory of the gradient
    beta2: float = 0.99  # AdamW: memory of its square
    momentum: float = 0.95  # Muon's memory of the gradient (Part II)
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    eval_interval: int = 250  # steps from one evaluation to the next
    eval_batches: int = 10  # batches in one estimate of the loss
    sample_tokens: int = 160  # text shown at an evaluation; 0: none
    checkpoint_interval: int = 500  # steps between snapshots; 0: none
    log_interval: int = 25  # steps between status lines
    patience: int = 0  # stop after so many evaluations without a better one; 0: never
    seed: int = 1337  # of first weights, batches, dropout, and of what is written
    dtype: str = "auto"  # number format of the matrix products (Part III)
    compile: bool = False  # torch.compile, a speed-up (Part III)
    wandb: bool = True  # log to Weights & Biases (Part III)

    def __post_init__(self):
        if self.min_lr > self.learning_rate:
            raise UserError(f"--min_lr {self.min_lr}: above --learning_rate {self.learning_rate}")

# AdamW     m = beta1 m + (1 - beta1) g           a running mean of the gradient g of a weight w
#           v = beta2 v + (1 - beta2) g^2         a running mean of its square
#           w = w - lr (m^ / (sqrt(v^) + eps) + weight_decay w)
#           m^ = m / (1 - beta1^t) and v^ = v / (1 - beta2^t) make up for the start at zero; t
#           counts the steps from 1; eps = 1e-8 [Loshchilov and Hutter 2019, algorithm 2, with the
#           decay scaled by lr as PyTorch has it].
#           Dividing by sqrt(v^) takes out the size of the gradient: whether derivatives are large
#           or tiny, with these betas a weight moves by 2.4 lr at most (decay aside). That is why
#           one learning rate serves all layers.
# Decay     Pulling weights towards zero keeps matrices from growing without use. Vectors (biases,
#           the norms' gains) are offsets and scales with no reason to be zero: they are spared.
# Example   The first step of a weight with g = 0.5 (or 500): m^ = g, v^ = g^2, so it moves by lr.
def weight_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """The weights in two groups: matrices, which decay, and vectors, which do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]  # a tied matrix appears once
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0}]

def make_adamw(model: nn.Module, config: TrainConfig):
    """PyTorch's AdamW; `fused` updates all weights in one go."""
    return torch.optim.AdamW(weight_groups(model, config), lr=config.learning_rate, fused=True,
                             betas=(config.beta1, config.beta2))

OPTIMIZERS = {"adamw": make_adamw}  # Part II: Muon

# Schedule  At the start v is a mean over a handful of gradients and steps are unreliable: go
#           slowly. In the end the weights jump about a minimum without settling: go slowly again.
#
#           learning_rate          ___
#                                /     `.
#                               /        `.
#                  min_lr      /           `-.__
#                       0     /
#                             0  warmup_steps   max_steps
#
#           warm-up  lr = learning_rate (step + 1) / (warmup_steps + 1)
#           decay    lr = min_lr + (learning_rate - min_lr) (1 + cos(pi r)) / 2
#                    r = (step - warmup_steps) / (max_steps - warmup_steps), from 0 to 1
#           [the cosine: Loshchilov and Hutter 2017, equation 5, without restarts]
# Try it    --max_steps 600 --learning_rate 0.1 ends at 2.73; with the preset's own, 1.93.
def cosine(r: float) -> float:
    """From 1 to 0 as r goes from 0 to 1."""
    return (1 + math.cos(math.pi * r)) / 2

SCHEDULES = {"cosine": cosine}  # Part II: a straight line

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
    return config.min_lr + (config.learning_rate - config.min_lr) * SCHEDULES[config.schedule](r)

# Clipping  One odd batch can give a gradient a hundred times the usual size. It stays in m for some
#           1 / (1 - beta1) steps, which it misleads, and in v for 1 / (1 - beta2), which it stunts.
#
#               if |g| > max_norm:  g = g max_norm / |g|         [Pascanu et al. 2013, algorithm 1]
#
#           |g| is the norm of all derivatives as a single vector: the direction stays as it was.
# Example   Two weights, g = (3, 4): |g| = 5. With max_norm = 1 it becomes (0.6, 0.8).
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

# Accumulation   A large batch gives a less noisy gradient, but it may not fit in memory. Gradients
#           add: run grad_accum small batches, let backward() sum their gradients, and divide each
#           loss by grad_accum. The sum is the gradient of the mean over the large batch, which is
#           never in memory as a whole.
# Try it    --max_steps 100, and again with --batch_size 4 --grad_accum 4 (not 16 and 1): after 50
#           steps the losses are 2.6197 and 2.6206, for the same windows, rounded differently.
def train_step(model, optimizer, batches, config: TrainConfig):
    """One change of the weights, from the grad_accum pairs (x, y) of batches.

    Returns two scalar tensors: the mean loss, and the norm of the gradient before clipping."""
    model.train()
    loss_sum = 0.0
    for x, y in batches:
        loss = model(x, y)[1] / config.grad_accum
        loss.backward()
        loss_sum += loss.detach()
    norm = clip_gradients(model.parameters(), config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss_sum, norm

# ---- Evaluation ----------------------------------------------------------------------------------
# While a model trains, an estimate on a few batches will do, the same ones each time. The figure to
# quote is the loss on the whole validation part, without any chance in it.
@torch.no_grad()
def estimate_loss(model, corpus: Corpus, config: TrainConfig) -> dict[str, float]:
    """The mean loss over eval_batches batches of each part: {"train": .., "val": ..}."""
    model.eval()
    means = {}
    for name, tokens in (("train", corpus.train), ("val", corpus.val)):
        generator, total = torch.Generator().manual_seed(0), 0.0
        for _ in range(config.eval_batches):
            batch = get_batch(tokens, model.config.block_size, config.batch_size, generator)
            total += model(*batch)[1].item()
        means[name] = total / config.eval_batches
    return means

@torch.no_grad()
def evaluate(model, tokens, batch_size: int = 16, progress=lambda share: None) -> float:
    """The mean loss in nats over every token of tokens (N,) but the first.

    The text is cut into windows of block_size = T that do not overlap, batch_size at a time:

        tokens   0 1 2 3 4 5 6 7 8        T = 4
        x        0 1 2 3|4 5 6 7          two windows side by side: (2, 4)
        y          1 2 3 4|5 6 7 8

    and a shorter last one. A token early in its window has little context, so this is a slightly
    pessimistic figure, but it counts each token once. progress is told the share that is done."""
    model.eval()
    T, total, done, end = model.config.block_size, 0.0, 0, len(tokens) - 1
    while done < end:
        rows = min(batch_size, max((end - done) // T, 1))
        size = min(rows * T, end - done)  # less than one row of T in the end
        window = tokens[done : done + size + 1].long()
        x, y = window[:-1].view(rows, -1), window[1:].view(rows, -1)
        total += model(x, y)[1].item() * size
        done += size
        progress(done / end)
    return total / end

def bits_per_character(nats: float, corpus: Corpus) -> float:
    """A loss per token in a unit that any tokenizer has: all the bits, over all the characters."""
    return nats / math.log(2) * len(corpus.val) / corpus.val_characters

def describe_loss(nats: float, corpus: Corpus) -> str:
    """A loss per token in three units."""
    return (f"full validation split, {len(corpus.val) - 1:,} tokens: {nats:.4f} nats per token, "
            f"perplexity {math.exp(min(nats, 700.0)):.4g}, "
            f"{bits_per_character(nats, corpus):.4f} bits per character")

# ---- A checkpoint --------------------------------------------------------------------------------
# Problem   A run can end at any moment. What is on disk must be enough to write text, and to train
#           on as if nothing had happened.
# Answer    One dictionary with weights, optimizer (its m and v), both configs, the tokenizer and
#           how far the run has come. It is written beside its final name and then renamed, which is
#           all or nothing: whatever happens, there is the old file or the new one.
# Safety    A file of Python's pickle format, which PyTorch uses, can run code when it is loaded.
#           With weights_only=True nothing but tensors and plain values is made.
# Try it    Press Ctrl-C during training, then type the same command with --resume: the losses go on
#           as they would have; with --dtype float32 to the last bit.
FORMAT = "minigpt-3"  # Part III checks it

def save_checkpoint(path: Path, state: dict) -> None:
    """Writes a dictionary of tensors and plain values: all of it, or nothing. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, before it gets its name
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

def load_checkpoint(path: Path) -> dict:
    """Reads what save_checkpoint wrote, to the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)

def model_from_checkpoint(state: dict):
    """The model and the tokenizer of a loaded checkpoint."""
    config = GPTConfig(**state["model_config"])
    model = MODELS[config.model](config)
    model.load_state_dict(state["model"])
    kind, settings = state["tokenizer"]
    return model, TOKENIZERS[kind](settings)

# ---- The training loop ---------------------------------------------------------------------------
# Problem   Put it together, so that one can watch it learn, stop it, and go on with it.
# The loop  set the learning rate -> one step -> report -> evaluate and save at fixed steps. It is
#           the function `train`; what it needs is in an object, a `Run`. Part III has a subclass of
#           Run for more demanding circumstances; the loop is always this one.
# Random    First weights, batches and dropout are random. The seed of each follows from --seed and
#           the number of the step alone: step 1,000 draws the same whether a run got there in one
#           go or by --resume, whatever else drew numbers in between. There is nothing to save.
def derived_seed(*numbers: int) -> int:
    """A seed of 32 bits that depends on all of the numbers, and is unlike that of their neighbours.

    >>> derived_seed(1337, 0), derived_seed(1337, 1)
    (1581838107, 3390784733)
    """
    return random.Random(" ".join(map(str, numbers))).getrandbits(32)

def new_model(config: GPTConfig, seed: int) -> nn.Module:
    """A model whose random first weights depend on the seed alone."""
    torch.manual_seed(derived_seed(seed))
    return MODELS[config.model](config)

class Run:
    """A training run: a model and what changes with it, how it is watched, what is saved of it."""
    def __init__(self, model, tokenizer, corpus: Corpus, config: TrainConfig, out_dir):
        self.model, self.tokenizer, self.corpus = model, tokenizer, corpus
        self.config, self.out_dir = config, Path(out_dir)
        self.runner = model  # what a step calls: the model, or (Part III) the model in a wrapping
        self.optimizer = OPTIMIZERS[config.optimizer](model, config)
        self.step = 0  # steps completed
        self.best_val, self.best_step = math.inf, 0  # lowest validation loss, and when it was

    load, evaluate = staticmethod(load_checkpoint), staticmethod(evaluate)  # Part III: with care
    reader = staticmethod(lambda: next_logits)  # Part II reads only what is new

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def log(self, **record) -> None:
        """Part III keeps records of numbers; here nothing happens."""

    def over(self) -> bool:
        """Whether to stop: at max_steps, or when there was no better evaluation for too long."""
        waited = (self.step - self.best_step) // self.config.eval_interval
        return self.step >= self.config.max_steps or 0 < self.config.patience <= waited

    def batches(self):
        """Yields the grad_accum batches of the next step. (Part II: better ones.)"""
        seed = derived_seed(self.config.seed, self.step)
        torch.manual_seed(seed)  # for dropout
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.config.grad_accum):
            yield get_batch(self.corpus.train, self.model.config.block_size, self.config.batch_size,
                            generator)

    def report(self, loss, norm) -> None:
        """After each step. loss and norm are scalar tensors."""
        if self.step % self.config.log_interval == 0:
            self.say(f"step {self.step}/{self.config.max_steps} | loss {loss:.4f}")

    def look(self) -> None:
        """Estimates both losses, shows a sample, saves latest.pt and, where it is due, best.pt."""
        losses = estimate_loss(self.model, self.corpus, self.config)
        better = losses["val"] < self.best_val
        if better:
            self.best_val, self.best_step = losses["val"], self.step
        self.log(step=self.step, train_loss=losses["train"], val_loss=losses["val"])
        self.say(f"step {self.step}: training loss {losses['train']:.4f}, validation loss "
                 f"{losses['val']:.4f}" + " (best so far)" * better)
        self.show_sample()
        if better:
            self.save("best.pt")
        self.save("latest.pt")

    def show_sample(self) -> None:
        """A few lines from the model as it is, always drawn with the same random numbers."""
        start = torch.tensor([[self.tokenizer.start]])
        drawn = stream_tokens(self.model, start, self.config.sample_tokens, temperature=0.8,
                              generator=torch.Generator().manual_seed(0), read=self.reader())
        text = self.tokenizer.decode([token.item() for token in drawn]).strip("\n")
        self.say("".join(f"    | {line}\n" for line in text.split("\n")) if text else "")

    def save(self, name: str) -> None:
        save_checkpoint(self.out_dir / name, self.state())

    def state(self) -> dict:
        """All that writing text or going on with the run needs."""
        return {"format": FORMAT, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": self.step,
                "best_val": self.best_val, "best_step": self.best_step,
                "tokenizer": (self.tokenizer.kind, self.tokenizer.state),
                "model_config": asdict(self.model.config), "train_config": asdict(self.config)}

    def restore(self, state: dict) -> None:
        """Goes on where a checkpoint was saved, whose weights the model already has."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_val = state["step"], state["best_val"]
        self.best_step = state["best_step"]

    def finish(self) -> float:
        """Gives the model the weights of best.pt; returns their loss on all validation tokens."""
        self.model.load_state_dict(self.load(self.out_dir / "best.pt")["model"])
        nats = self.evaluate(self.model, self.corpus.val)
        self.say(describe_loss(nats, self.corpus))
        return nats

def train(run: Run) -> float:
    """Trains until run.over(). Returns the best model's loss on the whole validation part."""
    config = run.config
    if run.best_val == math.inf:  # no evaluation yet: how good is the start?
        run.look()
    while not run.over():
        for group in run.optimizer.param_groups:
            group["lr"] = get_lr(run.step, config)
        loss, norm = train_step(run.runner, run.optimizer, run.batches(), config)
        run.step += 1
        run.report(loss, norm)
        if run.step % config.eval_interval == 0 or run.step == config.max_steps:
            run.look()
        if config.checkpoint_interval and run.step % config.checkpoint_interval == 0:
            run.save(f"step_{run.step:06d}.pt")
            run.save("latest.pt")
    return run.finish()

# And that is a GPT. By hand, with nothing but the names above (text is any long str):
#
#     tokenizer = CharTokenizer.train(text)
#     model = new_model(GPTConfig(tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64), seed=1)
#     config = TrainConfig(batch_size=16, grad_accum=1, max_steps=300, learning_rate=1e-3)
#     train(Run(model, tokenizer, Corpus.from_text(text, tokenizer), config, out_dir="."))
#
# What the model of --preset plain writes in the end, at a loss of 1.67:
#
#     ROMEO:
#     O, weak you, thou ask forthy kiss at landly the eart you accest with
#     With your can almaster:
#     I am hence that art my for all deather?
#
# It has learned spelling, names in capitals, lines of the right length, some grammar; not sense.

# ==================================================================================================
# Part II: Better
#
# One variation after the other: its problem, its equation, its code, and what it brought here. Each
# enters a table of Part I; nothing above is edited. "Here" tells the loss of the preset `plain`
# after 300 steps with this one change, in nats per character on the full validation split, mean and
# standard deviation over three seeds. Of `plain` itself it is 2.279 +- 0.004. The command is
#
#     python minigpt.py --mode ablate --preset plain --max_steps 300 --seeds 3 --vary norm=rmsnorm
# ==================================================================================================

import collections
import functools
import heapq
import itertools
import re
import unicodedata

# ---- Normalization: RMSNorm ----------------------------------------------------------------------
# Problem   LayerNorm subtracts, divides, has a gain and a bias. Is all of that needed?
# Equation  y = x / sqrt(mean(x^2) + eps) * weight   [Zhang and Sennrich 2019, equation 4; plus eps]
# Example   x = [3, 4]: mean square 12.5 -> [0.85, 1.13], before the gain.
# Here      --norm rmsnorm: 2.277 +- 0.011. --norm none, no normalization at all: 2.449 +- 0.002.
class RMSNorm(nn.Module):
    """Rescale each token's channels to a root mean square of 1; then a learned gain."""
    eps = 1e-5

    def __init__(self, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x):
        y = x.float()  # queries and keys may come in 16 bits, where squares are too coarse
        mean_square = y.norm(dim=-1, keepdim=True).square() / y.shape[-1]  # |x|^2 is the sum of x^2
        return (y * torch.rsqrt(mean_square + self.eps) * self.weight).to(x.dtype)

NORMS["rmsnorm"] = lambda n, config: RMSNorm(n)
NORMS["none"] = lambda n, config: nn.Identity()

# ---- Where the norm stands: post-norm ------------------------------------------------------------
# Problem   The first Transformer had its norms on the main road, after each addition [Vaswani et
#           al. 2017, section 3.1]. Why did it change? Because then every gradient passes through
#           every norm, and with depth training becomes delicate [Xiong et al. 2020, section 3.3].
# Here      --norm_position post: 3.03 +- 0.54; two of the three seeds hardly learned.
class PostNormBlock(Block):
    """A block that normalizes the residual stream itself."""
    def forward(self, x):
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))

BLOCKS["post"] = PostNormBlock

# ---- Positions that need not be learned ----------------------------------------------------------
# Problem   Learned vectors know nothing of each other: that 4 and 5 are neighbours as 5 and 6 are
#           has to be learned, for each pair.
# Sinusoid  The vector of position t holds sin(t w_i) and cos(t w_i), w_i = 10000^(-2i/C), for i
#           below C/2 [Vaswani et al. 2017, section 3.5]: hands of clocks of different speeds. To
#           move by s positions is to turn each hand by s w_i, whatever t is. The paper multiplies
#           the token vectors by sqrt(C) (its section 3.4); we divide the table instead.
# RoPE      Add nothing. Turn the queries and keys themselves, as such hands: channels i and i +
#           hs/2 of a head form a vector in the plane, turned by t w_i at position t (with hs for C
#           in w_i). The dot product of a query at t and a key at s then sees t - s, not t and s
#           [Su et al. 2021, section 3.2.2; they pair channels 2i and 2i + 1, which renames them].
# Example   hs = 2, w_0 = 1: a query (1, 0) at position 2 and a key (1, 0) at position 1 have the
#           score cos(2 - 1) = 0.54. At positions 12 and 11 it is 0.54 again.
# Here      --pos sinusoidal: 2.145 +- 0.020. --pos rope: 1.968 +- 0.007.
def angles(n_positions: int, n_channels: int) -> torch.Tensor:
    """t w_i for each position t and each pair of channels i: (n_positions, n_channels / 2)."""
    if n_channels % 2:
        raise UserError(f"--pos: {n_channels} channels make no pairs; change --n_embd or --n_head")
    w = 10000.0 ** (-torch.arange(0, n_channels, 2) / n_channels)
    return torch.outer(torch.arange(n_positions).float(), w)

class Sinusoids(nn.Module):
    """The fixed table of position vectors: positions (T,) -> (T, C)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        a = angles(config.block_size, config.n_embd)
        table = torch.stack([a.sin(), a.cos()], dim=-1).flatten(1) / math.sqrt(config.n_embd)
        self.register_buffer("weight", table)  # moves and is saved with the model; is not learned

    def forward(self, positions):
        return self.weight[positions]

POSITIONS["sinusoidal"] = Sinusoids
POSITIONS["rope"] = lambda config: lambda positions: 0.0  # to the token vectors nothing is added

class Rotary(nn.Module):
    """Turns queries and keys (B, nh, T, hs) according to their positions, start and following: the
    halves x1, x2 of the channels become x1 cos - x2 sin, x2 cos + x1 sin."""
    def __init__(self, n_positions: int, hs: int):
        super().__init__()
        a = angles(n_positions, hs)  # (block_size, hs / 2)
        self.register_buffer("cos", torch.cat([a.cos(), a.cos()], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-a.sin(), a.sin()], dim=-1), persistent=False)

    def forward(self, x, start: int):
        positions = slice(start, start + x.shape[2])
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)  # (T, hs)
        return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # rolled: x2, x1

# ---- Attention: rotation, QK-norm, and room for a memory -----------------------------------------
# QK-norm   Queries and keys may grow until the softmax freezes into a choice of one. Normalized (by
#           one norm for both, of the kind that the model has), the scaled scores are at most
#           sqrt(hs) gain^2, bias aside [Henry et al. 2020, section 2.2, who divide by the length].
# Memory    `cache` is None in training. "Writing faster", below, makes it an empty dictionary, in
#           which keys and values are kept from one call to the next.
# Here      --qk_norm: 2.341 +- 0.021, worse at this size and rate.
class Attention(CausalSelfAttention):
    """Part I's attention, whose queries and keys may be normalized, rotated and kept."""
    def __init__(self, config: GPTConfig):
        super().__init__(config)
        hs = config.n_embd // config.n_head
        self.qk_norm = NORMS[config.norm](hs, config) if config.qk_norm else None
        self.rotary = Rotary(config.block_size, hs) if config.pos == "rope" else None
        self.block_size, self.cache = config.block_size, None

    def heads(self, x):
        y = self.c_attn(x).unflatten(-1, (3 * self.n_head, -1)).transpose(1, 2)  # (B, 3 nh, T, hs)
        qk, v = y.split([2 * self.n_head, self.n_head], dim=1)  # q and k together: half the calls
        start = self.cache.get("length", 0) if self.cache is not None else 0
        if self.qk_norm:
            qk = self.qk_norm(qk)
        if self.rotary:
            qk = self.rotary(qk, start)
        q, k = qk.chunk(2, dim=1)  # (B, nh, T, hs) each
        if self.cache is not None:
            k, v = self.kept("k", k, start), self.kept("v", v, start)
            self.cache["length"] = k.shape[2]
        return q, k, v

    def kept(self, name: str, new, start: int):
        """Keeps new keys or values (B, nh, T, hs) from position start on. Returns all so far."""
        if start == 0:  # room for a window
            self.cache[name] = new.new_empty(*new.shape[:2], self.block_size, new.shape[3])
        self.cache[name].narrow(2, start, new.shape[2]).copy_(new)
        return self.cache[name].narrow(2, 0, start + new.shape[2])

ATTENTION["explicit"] = Attention

# ---- Activations ---------------------------------------------------------------------------------
# ReLU      max(0, x), as in the first Transformer; and its square [So et al. 2021, section 3.2].
# SwiGLU    No longer one function of one number but a product: silu(x W) * (x U), in which one half
#           gates the other; silu(z) = z sigmoid(z) [Shazeer 2020, section 2]. W and U lie side by
#           side in `c_fc`. As there are two of them, the middle is 2/3 as wide, for nearly the same
#           number of weights.
# Here      --activation relu: 2.266 +- 0.008. relu2: 2.316 +- 0.035. swiglu: 2.266 +- 0.018.
class GatedMLP(MLP):
    """An MLP whose middle is a product of two halves, the first one through the activation."""
    def __init__(self, config: GPTConfig):
        super().__init__(config)
        hidden = int(config.mlp_ratio * config.n_embd * 2 / 3)
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        gate, value = self.c_fc(x).chunk(2, dim=-1)  # (B, T, hidden) each
        return self.dropout(self.c_proj(self.activation(gate) * value))

ACTIVATIONS |= {"relu": F.relu, "relu2": lambda x: F.relu(x).square(), "swiglu": F.silu}
MLPS |= {"relu": MLP, "relu2": MLP, "swiglu": GatedMLP}

# ---- A head of its own ---------------------------------------------------------------------------
# Problem   Tied, one vector has to say both what a token means and what it follows. Large models
#           with weights to spare keep the two apart.
# Here      --no_tie_weights: 2.317 +- 0.021.
HEADS[False] = lambda wte: nn.Linear(wte.embedding_dim, wte.num_embeddings, bias=False)

# ---- Fused kernels -------------------------------------------------------------------------------
# Problem   Written out, each operation reads its operands from memory and writes its result back,
#           and attention stores (T, T) numbers for each head. A fused kernel, one compiled routine,
#           does several at once, and attention without the matrix [Dao et al. 2022, section 3].
# Here      --attention fused computes the same function. By `--mode bench`, `plain` trains 1.2
#           times and writes 1.5 times as fast with it.
class FusedAttention(Attention):
    """The same function as one kernel."""
    def attend(self, q, k, v):
        # Subtle: on a CPU in bfloat16 the kernel's backward pass is the slower way.
        if self.training and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            return super().attend(q, k, v)
        dropout = self.attn_dropout.p if self.training else 0.0
        causal = q.shape[2] > 1  # one query alone is the last position, which sees all keys
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)

class FusedLayerNorm(LayerNorm):
    """The same function as one kernel."""
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

ATTENTION["fused"] = FusedAttention
NORMS["layernorm"] = lambda n, config: (
    FusedLayerNorm if config.attention == "fused" else LayerNorm)(n, config.bias)

# ---- Writing faster: the cache -------------------------------------------------------------------
# Problem   To draw the 200th token the model reads the 199 before it. It read 198 of them a moment
#           ago, and since no position sees a later one, their vectors have not changed.
# Answer    Keep what later tokens ask of earlier ones: keys and values, in a dictionary of each
#           layer, its `cache`: so many as `length` tells, in tensors (B, nh, block_size, hs). The
#           prompt goes through as a whole (prefill), then each new token alone (decode): its query
#           meets the keys that were kept.
#
#               prefill   T  o  _  b  e      5 in, keys and values of 5 kept, "," drawn
#               decode                  ,    1 in,                    6 kept, "_" drawn
#               decode                  _    1 in,                    7 kept, ...
#
# Cost      A pass takes in one token instead of up to block_size; its query still meets every key
#           that is kept. Most of the time then goes into fetching the weights from memory: once
#           for all, where several texts, rows of idx in GPT.generate, are written side by side.
# Cores     PyTorch multiplies a matrix by a single vector on one core. Cut in two, as a batch of
#           two products, a large matrix is fetched by two. `laptop` has none that is large enough.
# Window    When the window moves (window_start, in Part I), every token in it has a new position,
#           and what deeper layers kept was computed from tokens that are gone: all is read anew.
def linear_in_halves(layer: nn.Linear, x):
    """What the layer computes. A single vector (1, 1, n) meets a large matrix in two halves."""
    w = layer.weight
    if x.numel() > x.shape[-1] or w.numel() < 10**5 or len(w) % 2 or x.device.type != "cpu":
        return F.linear(x, w, layer.bias)
    halves = torch.bmm(x.expand(2, -1, -1), w.view(2, -1, x.shape[-1]).mT)  # (2, 1, rows / 2)
    return halves.view(1, 1, -1) + (0.0 if layer.bias is None else layer.bias)

class CachedReader:
    """next_logits, for a text that grows: reads only the tokens that it has not read yet."""
    def __init__(self):
        self.start = self.end = 0  # of what was read

    @torch.inference_mode()  # no_grad, and less bookkeeping
    def __call__(self, model, idx):
        start = window_start(idx.shape[1], model.config.block_size)
        if self.end == 0 or start != self.start:  # the beginning, or the window has moved
            model.eval()
            self.start = self.end = start
            self.caches = {part: {} for part in model.modules() if hasattr(part, "cache")}
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.forward = functools.partial(linear_in_halves, layer)  # for good
        for part, cache in self.caches.items():
            part.cache = cache
        logits, _ = model(idx[:, self.end :], start=self.end - self.start)
        for part in self.caches:
            part.cache = None
        self.end = idx.shape[1]
        return logits[:, -1].float().cpu()

# ---- Token shift ---------------------------------------------------------------------------------
# Problem   What came just before matters everywhere, and it takes a whole head to fetch it.
# Answer    Give each part half of its channels from the position before: its input x_t becomes
#           (x_{t-1}[: C/2], x_t[C/2 :]) [Peng et al. 2023, RWKV, section 3.1.1, shares learned].
# Here      --token_shift: 1.827 +- 0.004; and `laptop` ends at 1.428 in place of 1.448.
def shift(part, inputs):
    """Runs before a part and changes what it gets: (B, T, C) -> (B, T, C). What comes before the
    first position is zero, or was kept."""
    first, second = inputs[0].chunk(2, dim=-1)  # (B, T, C / 2) each
    before = torch.zeros_like(first[:, :1])
    if part.cache is not None:
        before = part.cache.get("before", before)
        part.cache["before"] = first[:, -1:]
    return torch.cat([torch.cat([before, first[:, :-1]], dim=1), second], dim=-1)

def shifting(make_block):
    """What makes blocks, but with shifted parts if --token_shift asks for it."""
    def make(config: GPTConfig) -> Block:
        block = make_block(config)
        for part in [block.attn, block.mlp] if config.token_shift else []:
            part.cache = None
            part.register_forward_pre_hook(shift)
        return block
    return make

BLOCKS = {name: shifting(make_block) for name, make_block in BLOCKS.items()}

# ---- Larger tokens: byte-pair encoding -----------------------------------------------------------
# Problem   Characters are safe but slow: "the" costs three steps of the model. Whole words are
#           short but brittle: the next text has new ones.
# Answer    Begin with the 256 bytes, of which every text in UTF-8 is made. Find the pair of
#           neighbours that is most frequent, make it a new token, and again, until the vocabulary
#           is full [Sennrich et al. 2016, section 3.2; on bytes: Radford et al. 2019, section 2.2].
#           Frequent words become one token, rare ones a few, and nothing is unknown.
# Example   "aaabdaaabac" -> aa becomes X: "XabdXabac" -> ab becomes Y: "XYdXYac" -> XY becomes Z:
#           "ZdZac". Eleven tokens have become five. (Among equally frequent pairs the one with the
#           smaller ids wins.) A new text gets the merges in the order in which they were learned.
# Pieces    Merges never cross a boundary that GPT-2's pattern draws: between letters, digits and
#           punctuation, with a space kept in front of what it precedes. So "dog." and "dog!" do not
#           become two words, and each distinct piece need be worked on only once.
# Try it    BPETokenizer.train(text, 1024) on Tiny Shakespeare first merges " t", "he", " a", "ou"
#           and " s", and the 1.1 million characters become 460,000 tokens.
# Here      --tokenizer bpe: 2.697 +- 0.013 bits per character, against 3.288 +- 0.005; but a step
#           sees 2.4 times as much text.
END_OF_TEXT = "<|endoftext|>"  # one token of its own; where it is drawn, the writing ends

@functools.cache
def piece_pattern() -> re.Pattern:
    r"""GPT-2's pattern, '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    Python's re knows no \p{L} (letter) and \p{N} (number), so the classes are spelled out from the
    Unicode tables; and its \s holds four control characters more than GPT-2's. One branch is added,
    the second: a short cut for words of A-Z that no other letter can follow.

    >>> piece_pattern().findall("Who's there?  Nay, 2 answer")
    ['Who', "'s", ' there', '?', ' ', ' Nay', ',', ' 2', ' answer']
    """
    ranges = {"L": "", "N": ""}
    categories = itertools.groupby(range(sys.maxunicode + 1),
                                   lambda code: unicodedata.category(chr(code))[0])
    for category, codes in categories:
        first, *rest = codes
        if category in ranges:
            ranges[category] += f"\\U{first:08x}-\\U{rest[-1] if rest else first:08x}"
    L, N = ranges["L"], ranges["N"]
    S = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(rf"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+(?![A-Za-z\x80-\U0010ffff])| ?[{L}]+"
                      rf"| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+")

def split_pieces(text: str):
    """Yields the pieces, one iterator for each stretch of text between two END_OF_TEXT.

    Lone surrogates, halves of a character that UTF-8 cannot write, become U+FFFD each."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for part in text.split(END_OF_TEXT):
        yield map(re.Match.group, piece_pattern().finditer(part))

# The 256 bytes in GPT-2's order, and what stands for each in its files: the byte's own character
# where that has a visible shape, one from U+0100 on where it has none.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES += [byte for byte in range(256) if byte not in BYTES]
SHOWN = dict(zip(BYTES, map(chr, [*BYTES[:188], *range(256, 256 + 68)])))

# While we merge, a piece is a str in a private alphabet: the character chr(i) is token i. So one
# merge is one str.replace, at the speed of C, and a pair of tokens is a str of two characters.
BYTE_TO_TOKEN = {byte: chr(i) for i, byte in enumerate(BYTES)}

def to_tokens(piece: str) -> str:
    """A piece of text in the private alphabet, one character for each of its UTF-8 bytes."""
    return piece.encode("utf-8").decode("latin-1").translate(BYTE_TO_TOKEN)

def pairs_of(word: str):
    """The neighbours in a word: "abc" -> "ab", "bc"."""
    return map(str.__add__, word, word[1:])

class BPETokenizer:
    """Byte-level BPE, in GPT-2's format.

    >>> tokenizer = BPETokenizer.train("low lower lowest low low", vocab_size=260)
    >>> tokenizer.merges
    [(b'l', b'o'), (b'lo', b'w'), (b' ', b'low')]
    >>> [tokenizer.decode([i]) for i in tokenizer.encode(" lowly")]
    [' low', 'l', 'y']
    """
    kind, start = "bpe", 198  # the line break

    def __init__(self, merges: list[tuple[bytes, bytes]]):
        """merges: pairs of tokens, in the order in which they were learned, which is their rank."""
        self.state = self.merges = merges
        self.tokens = [bytes([byte]) for byte in BYTES] + [a + b for a, b in merges]
        token_of = {token: chr(i) for i, token in enumerate(self.tokens)}
        self.made = {token_of[a] + token_of[b]: chr(i) for i, (a, b) in enumerate(merges, 256)}
        self.encode_piece = functools.lru_cache(2**20)(self.encode_piece)  # the same ones recur
        self.end = len(self.tokens)
        self.tokens.append(END_OF_TEXT.encode())
        self.vocab_size = len(self.tokens)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "BPETokenizer":
        """Learns merges until there are vocab_size tokens, or no pair is left that occurs twice.

        `counts` says how often a pair occurs, `where` in which pieces. The heap hands out the most
        frequent pair; where the count that it knew is out of date, the pair goes back."""
        pieces = collections.Counter(itertools.chain.from_iterable(split_pieces(text)))
        words, freqs = [to_tokens(piece) for piece in pieces], list(pieces.values())
        counts, where, heap = collections.Counter(), collections.defaultdict(set), []

        def count(i: int, sign: int) -> None:
            """Adds the pairs of word i to the counts, or takes them away."""
            for pair in pairs_of(words[i]):
                if pair not in counts:
                    heapq.heappush(heap, (-math.inf, pair))
                counts[pair] += sign * freqs[i]
                where[pair].add(i)

        for i in range(len(words)):
            count(i, +1)
        tokens, merges = [bytes([byte]) for byte in BYTES], []
        while heap and len(tokens) < vocab_size - 1:
            n, pair = heapq.heappop(heap)
            if -n != counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
                continue
            if -n < 2:
                break
            a, b = (tokens[ord(token)] for token in pair)
            for i in where.pop(pair):
                count(i, -1)
                words[i] = words[i].replace(pair, chr(len(tokens)))
                count(i, +1)
            merges.append((a, b))
            tokens.append(a + b)
        return cls(merges)

    def encode_piece(self, piece: str) -> list[int]:
        """Merges one piece, always the pair that was learned first, until none is left."""
        word = to_tokens(piece)
        while known := self.made.keys() & pairs_of(word):
            pair = min(known, key=self.made.get)
            word = word.replace(pair, self.made[pair])
        return [ord(token) for token in word]

    def encode(self, text: str) -> list[int]:
        """Text to ids: any text."""
        ids = []
        for i, pieces in enumerate(split_pieces(text)):
            ids += [self.end] * (i > 0)
            ids.extend(itertools.chain.from_iterable(map(self.encode_piece, pieces)))
        return ids

    def decode(self, ids: list[int]) -> str:
        """Ids to text; bytes that are not UTF-8, as of half a character, become U+FFFD."""
        return b"".join([self.tokens[i] for i in ids]).decode("utf-8", errors="replace")

    def vocab(self) -> dict[str, int]:
        """The id of each token, with Ġ for a space."""
        tokens = ["".join(map(SHOWN.get, token)) for token in self.tokens[: self.end]]
        return dict(zip([*tokens, END_OF_TEXT], range(self.vocab_size)))

    def save(self, folder) -> None:
        """Writes folder/vocab.json and folder/merges.txt as GPT-2 has them."""
        Path(folder, "vocab.json").write_text(json.dumps(self.vocab()), encoding="utf-8")
        lines = [" ".join("".join(map(SHOWN.get, token)) for token in pair) for pair in self.merges]
        merges = "\n".join(["#version: 0.2", *lines, ""])
        Path(folder, "merges.txt").write_bytes(merges.encode("utf-8"))

    @classmethod
    def load(cls, folder) -> "BPETokenizer":
        """Reads what save wrote, or GPT-2's own files. Raises UserError for other ids."""
        byte_of = {character: byte for byte, character in SHOWN.items()}
        lines = Path(folder, "merges.txt").read_text(encoding="utf-8").split("\n")
        tokenizer = cls([tuple(bytes(map(byte_of.get, token)) for token in line.split(" "))
                         for line in lines[lines[0].startswith("#version") :] if line])
        if json.loads(Path(folder, "vocab.json").read_bytes()) != tokenizer.vocab():
            raise UserError(f"{folder}: vocab.json is not in GPT-2's order; no other is read here")
        return tokenizer

def gpt2_tokenizer(_=None) -> BPETokenizer:
    """GPT-2's own 50,257 tokens, whose files are fetched at the first use. Raises UserError."""
    from huggingface_hub import snapshot_download

    try:
        files = ["vocab.json", "merges.txt"]
        return BPETokenizer.load(snapshot_download("openai-community/gpt2", allow_patterns=files))
    except Exception:
        raise UserError("--tokenizer gpt2: needs a network once; connect, or use bpe") from None

TOKENIZERS |= {"bpe": BPETokenizer, "gpt2": gpt2_tokenizer}

# ---- Muon ----------------------------------------------------------------------------------------
# Problem   To AdamW a matrix is a heap of unrelated numbers. But it maps vectors to vectors:
#           orthogonal input directions (columns of V) to output directions (of U), each stretched
#           by a singular value (in S). Taken apart like this, a gradient has a few large singular
#           values and many small ones: a step along it hardly moves most directions.
# Answer    Make all directions equally strong.
# Equation  M = momentum M + (1 - momentum) G       the running mean, of a whole matrix
#           N = (1 - momentum) G + momentum M       a look ahead, with the new M
#           U S V^T = N                             its singular value decomposition
#           W = W - lr (0.2 sqrt(max(rows, columns)) U V^T + weight_decay W)
#           S is left out [Jordan 2024]. The factor gives the numbers in a step about the size that
#           AdamW's have, so one learning rate serves both [Liu et al. 2025, section 2.2].
# The rest  stays with AdamW: gains and biases, which are no matrices, and the two tables, each of
#           whose rows belongs to one token or one position.
# Here      --optimizer muon: 2.050 +- 0.012. --schedule linear (1 - r) alone: 2.259 +- 0.010.
def orthogonalize(G):
    """U V^T for each G = U S V^T of a stack (n, rows, columns), nearly, by matrix products alone;
    rows must not be more than columns, so that X X^T is the smaller of the two squares.

    X <- (a + b X X^T + c (X X^T)^2) X takes each singular value s of X to a s + b s^3 + c s^5 and
    leaves U and V alone. With these constants [Jordan 2024] a small s more than triples in a round
    and none gets far above 1: after five, what was 0.01 or more is between 0.68 and 1.14."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above 1 now
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # aX + (bA + cAA)X
    return X

class Muon(torch.optim.AdamW):
    """AdamW, but for the group with `parts`: how many matrices each of its weights stacks, 3 for
    c_attn. Those of one shape go through orthogonalize together, which is faster."""
    def __init__(self, groups, dtype=torch.float32, **options):
        super().__init__(groups, **options)
        self.dtype = dtype  # of the matrix products

    @torch.no_grad()
    def step(self) -> None:
        *_, group = self.param_groups
        stacks = collections.defaultdict(list)  # by shape: a matrix and its update
        for p, parts in zip(group["params"], group["parts"]):
            if p.grad is None:
                continue
            if p not in self.state:
                # `step` is not used, but AdamW's load_state_dict looks for it.
                self.state[p] = {"mean": torch.zeros_like(p), "step": torch.tensor(0.0)}
            mean = self.state[p]["mean"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(mean, group["momentum"])
            p.grad = None  # so that AdamW, below, leaves it alone
            for w, u in zip(p.chunk(parts), update.chunk(parts)):  # tall ones are laid on the side
                w, u = (w, u) if len(w) <= w.shape[1] else (w.mT, u.mT)
                stacks[w.shape].append((w, u))
        for stack in stacks.values():
            updates = orthogonalize(torch.stack([update for _, update in stack]).to(self.dtype))
            size = group["lr"] * 0.2 * math.sqrt(updates.shape[2])
            for (w, _), update in zip(stack, updates):
                w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update * size)
        super().step()

def make_muon(model: nn.Module, config: TrainConfig) -> Muon:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    mine = {name: p for name, p in model.named_parameters()
            if name.startswith("h.") and p.dim() == 2}
    groups, matrices = weight_groups(model, config), set(mine.values())
    groups[0]["params"] = [p for p in groups[0]["params"] if p not in matrices]
    groups.append({"params": [*mine.values()], "momentum": config.momentum,
                   "weight_decay": config.weight_decay,
                   "parts": [3 if "c_attn" in name else 1 for name in mine]})
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return Muon(groups, dtype, lr=config.learning_rate, fused=True,
                betas=(config.beta1, config.beta2))

OPTIMIZERS["muon"] = make_muon
SCHEDULES["linear"] = lambda r: 1 - r

# ---- Better batches ------------------------------------------------------------------------------
# Problem   What should a step see, that it may learn most?
# Short     The longer the window, the more there is to look back at; but attention compares each
#           position with all before it, and at first a model learns what the last few characters
#           tell. So the first short_share of the steps take windows of short_block tokens, and more
#           of them, so that a step has as many tokens; the others take whole windows.
# Even      Random windows leave gaps: in as many draws as would cover a text three times, 5 % of it
#           is never seen, and some of it eight times. --sampling even takes the windows at
#           (i g + offset) mod 1 of the text, i = 0, 1, 2, ..., g the golden ratio: each falls into
#           one of the largest gaps that those before it left [Weyl 1916; Knuth 1998, section 6.4].
# Example   i = 0, 1, 2, 3, 4 and offset 0: 0, 0.62, 0.24, 0.85, 0.47 of the text.
class BetterBatches(Run):
    """A run whose windows may be short at first, and may cover the text evenly."""
    def batches(self):
        c, tokens, length = self.config, self.corpus.train, self.model.config.block_size
        short = self.step < c.short_share * c.max_steps
        T = min(c.short_block, length) if short else length
        B = c.batch_size * (length // T)
        seed = derived_seed(c.seed, self.step)
        torch.manual_seed(seed)  # for dropout
        generator = torch.Generator().manual_seed(seed)
        offset = random.Random(c.seed + short).random()
        for micro_step in range(c.grad_accum):
            if c.sampling == "even":
                i = torch.arange(B).double() + (self.step * c.grad_accum + micro_step) * B
                share = (i * (math.sqrt(5) - 1) / 2 + offset) % 1  # g, less 1
                yield cut_windows(tokens, T, (share * (len(tokens) - T)).long())
            else:
                yield get_batch(tokens, T, B, generator)

# ---- What it comes to ----------------------------------------------------------------------------
# Which of all this is worth its time? From `plain` to `laptop`, by one change after the other; each
# trained for as many steps as take 204 s on two cores, so a slower step has to earn it. Nats per
# character on the full validation split, seeds 1337 to 1339, by `python .ci/ladder.py`:
#
#     plain                               2,931 steps    1.590 +- 0.006
#     fused kernels, no biases            2,963          1.581 +- 0.010
#     RoPE                                3,036          1.527 +- 0.002
#     squared ReLU, QK-norm, two heads    3,248          1.524 +- 0.006
#     Muon, a straight line to zero       2,545          1.487 +- 0.002
#     even windows                        2,545          1.463 +- 0.011
#     windows of 128, then of 512         2,500          1.446 +- 0.001
#
# RoPE and Muon bring two thirds of it. (The preset itself ends after 2,200 steps.)
#
# What was tried and did not help, in earlier forms of `laptop` with 1,000 to 2,500 steps, one seed
# if nothing else is said. The order of the batches alone makes a difference of 0.01. + is worse:
#
#     windows of 64, then 128, then 256, in place of 128, then 256      +0.009
#     four rounds of orthogonalize with constants that change by round  +0.008
#     5 layers, 2,000 steps, in place of 4 and 2,500 (2 seeds)          +0.010
#     3 layers of 192 channels, in equal time                           +0.013
#     dropout 0.05                                                      +0.02
#     within 0.002: windows of 1,024; averaged weights; c_proj zero at first; weight decay of 0.5

# ==================================================================================================
# Part III: The machine room
#
# Nothing here is about language. A subclass of Part I's Run puts it to use; the loop is Part I's.
# ==================================================================================================

import contextlib
import ctypes
import hashlib
import signal
import time
import zipfile
from datetime import timedelta

# ---- Devices and number formats ------------------------------------------------------------------
# Problem   Most of the time goes into matrix products, and hardware multiplies 16-bit numbers
#           several times faster than 32-bit ones.
# Answer    Mixed precision [Micikevicius et al. 2018]: weights, residual stream, norms and loss
#           stay float32; `autocast` runs each matrix product in bfloat16, which has float32's range
#           (8 exponent bits) and just 8 bits of precision. (Older GPUs have float16 instead: finer,
#           but gradients below 6e-8 vanish in it, so such GPUs compute in float32 here.)
# Here      By `--mode bench`, `plain` trains 1.5 times as fast as with --dtype float32.
def find_device(name: str) -> torch.device:
    """auto: the best device present. Raises UserError for one that is not."""
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "auto":
        name = here[0].partition(":")[0]
    if name == "cuda":
        name += ":" + os.environ.get("LOCAL_RANK", "0")  # torchrun: a GPU for each process
    if name not in here:
        raise UserError(f"--device {name}: not here; this machine has auto, {', '.join(here)}")
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return torch.device(name)

def find_dtype(name: str, device: torch.device) -> str:
    """auto: bfloat16 where the device has it in hardware, else float32."""
    if name != "auto":
        return name
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    has = able.get("avx512_bf16") or able.get("amx_bf16") or (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return "bfloat16" if has else "float32"

class MixedPrecision(nn.Module):
    """The model, with its matrix products in 16 bits."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        with torch.autocast(next(self.model.parameters()).device.type, dtype=torch.bfloat16):
            return self.model(x, y)

# ---- Memory that is not given back ---------------------------------------------------------------
# Problem   A step asks for the blocks of memory that the step before gave back. The C library of
#           Linux returns large ones to the system at once and gets them anew in pages of 4 KB, each
#           mapped and cleared when it is first touched: a page fault.
# Answer    Tell `malloc`, which hands out memory, to keep what it has.
# Here      A step of `laptop` has 0 or 1 page fault; without `keep_memory` up to 8,160 (of 3 runs).
def keep_memory() -> None:
    """Makes glibc keep memory that was freed. Where there is no glibc, nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: how many blocks may be asked of the system one by one
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give back what is free beyond this

# ---- Several processes ---------------------------------------------------------------------------
# Problem   One device is too slow, and there are more of them, here or in other machines.
# Answer    Data parallelism: every process holds the whole model and takes its rows of each batch;
#           PyTorch's DistributedDataParallel averages the gradients while backward() still runs [Li
#           et al. 2020, section 3.2]. So all take the same step, and as they began alike, they stay
#           alike. All evaluate; the first one writes files, and speaks.
def process_rank() -> int:
    """The number of this process among those that torchrun started; 0 if it did not."""
    return int(os.environ["RANK"]) if torch.distributed.is_torchelastic_launched() else 0

def say(text: str) -> None:
    """A line to stderr."""
    if process_rank() == 0:
        print(text, file=sys.stderr, flush=True)

def join_processes() -> int:
    """Joins the others that torchrun started. Returns how many there are; 1 without torchrun."""
    if not torch.distributed.is_torchelastic_launched():
        return 1
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group()  # gloo, and nccl for GPUs
    return torch.distributed.get_world_size()

def gather(value) -> list:
    """The values that all processes give, in each of them."""
    values = [value]
    if torch.distributed.is_initialized():
        values *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
    return values

# ---- Signals -------------------------------------------------------------------------------------
# Ctrl-C may come in the middle of a step: it is remembered, and the run leaves when that is done.
def heed_signals() -> list[int]:
    """A list, to which from now on Ctrl-C or SIGTERM is added; once more, and the process ends."""
    received = []

    def on_signal(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        if process_rank() == 0:  # by os.write, since a print may be what the signal came amidst
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return received

# ---- What is kept of a run -----------------------------------------------------------------------
def read_checkpoint(path: Path) -> dict:
    """Reads a checkpoint, or a folder (read_folder, Part IV). Raises UserError if it is missing,
    damaged or not ours. Zip's checksums do not cover members' attributes; ours are all 0."""
    state = None
    if path.is_dir():
        return read_folder(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() or any(m.external_attr for m in archive.infolist())
        state = None if damaged else load_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train first, or name a --checkpoint") from None
    except Exception as problem:  # there is no telling what a damaged file makes the readers raise
        if isinstance(problem, MemoryError) or getattr(problem, "filename", None):
            raise  # it is not the file's content
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: damaged, or no checkpoint; copy best.pt or a step_*.pt over it")
    return state

def refuse_used(out_dir: Path) -> None:
    """Raises UserError if a new run would overwrite anything in its folder."""
    names = r"(best|latest|step_\d{6,})\.pt|metrics\.jsonl|config\.json|loss\.png"
    for path in out_dir.glob("*"):
        if re.fullmatch(names, path.name):
            raise UserError(f"--out_dir {out_dir}: has a {path.name}; --resume, or name another")

def read_curve(out_dir: Path, name: str) -> dict[int, float]:
    """A number of metrics.jsonl by step; of two records of a step, as after --resume, the later."""
    path, points = out_dir / "metrics.jsonl", {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):  # damaged
            record = json.loads(line)
            points[int(record["step"])] = float(record[name])
    return dict(sorted(points.items()))

def new_figure(path: Path, width: float, height: float):
    """An empty picture; or None, and a line on what is missing."""
    try:
        from matplotlib.figure import Figure
        path.parent.mkdir(parents=True, exist_ok=True)
        return Figure(figsize=(width, height), layout="constrained")
    except ImportError:
        say(f"no {path.name}: pip install matplotlib to get one")

def draw_curves(path: Path, curves: dict[str, tuple[Path, str]], ylabel: str) -> None:
    """A picture of curves, each of a run's folder and the name of a number in its records."""
    if figure := new_figure(path, 7, 4):
        axes = figure.add_subplot(xlabel="step", ylabel=ylabel)
        for label, (out_dir, name) in curves.items():
            curve = read_curve(out_dir, name)
            axes.plot(list(curve), list(curve.values()), label=label, linewidth=1.2,
                      alpha=0.4 if name == "loss" else 1.0)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=120)

def start_wandb(config: TrainConfig, out_dir: Path):
    """A run of Weights & Biases where its variables are set; else, and if anything fails, None."""
    ready = "WANDB_API_KEY" in os.environ or os.environ.get("WANDB_MODE") == "offline"
    try:
        if config.wandb and ready:
            import wandb

            return wandb.init(project="minigpt", dir=out_dir, config=asdict(config), reinit=True,
                              settings=wandb.Settings(silent=True))
    except Exception as problem:  # not installed, no network, or a change in its ways
        say(f"no Weights & Biases: {type(problem).__name__}; --no_wandb to leave it out")

# ---- The corpus ----------------------------------------------------------------------------------
def read_corpus(data: str) -> tuple[Path, str, str]:
    """--data if given; else Tiny Shakespeare, downloaded at need; else, loudly, the sample: its
    path, the text and its SHA-256 checksum. Raises UserError if it is not UTF-8."""
    path = Path(data or Path(__file__).resolve().parent / "data" / "input.txt")
    if not data and not path.exists():
        import download_data

        path = download_data.find(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: without the mark that Windows adds
    except UnicodeDecodeError:
        raise UserError(f"--data {path}: not UTF-8 text; save it as UTF-8") from None
    return path, text, hashlib.sha256(text.encode("utf-8")).hexdigest()

def make_tokenizer(kind: str, text: str, vocab_size: int):
    """BPE learns from the training part alone, so that the validation text has no say in it;
    characters are taken from the whole, since none may be missing."""
    if kind == "bpe":
        return BPETokenizer.train(text[: int(0.9 * len(text))], vocab_size)
    return CharTokenizer.train(text) if kind == "char" else TOKENIZERS[kind]()

def encode_corpus(text: str, tokenizer, block_size: int) -> Corpus:
    """Both parts as tokens. Raises UserError if one is too short for a single window."""
    corpus = Corpus.from_text(text, tokenizer)
    if len(corpus.val) <= block_size:  # the shorter one
        raise UserError(f"--block_size {block_size}: must be below the tokens of the text's last "
                        f"tenth, {len(corpus.val)}; lower it, or take a longer --data")
    return corpus

# ---- A run with all of it ------------------------------------------------------------------------
def show_progress(share: float) -> None:
    """For evaluate's `progress`: one line, written over, for who sits before a terminal."""
    if process_rank() == 0 and sys.stderr.isatty():
        print(f"\revaluating: {share:.0%}", end="\n" * (share == 1), file=sys.stderr, flush=True)

class Diverged(UserError):
    """The loss or the weights are no longer finite numbers."""

class FullRun(BetterBatches):
    """A run on any device, in several processes, that heeds signals and keeps records. text_info:
    where the corpus is from, and its checksum; both go into checkpoints."""
    def __init__(self, model, tokenizer, corpus, config, out_dir, device, text_info: dict):
        super().__init__(model.to(device), tokenizer, corpus, config, out_dir)
        self.text_info, self.processes, self.rank = text_info, join_processes(), process_rank()
        self.signals, self.wandb, self.clock, self.began = [], None, None, time.perf_counter()
        if config.batch_size % self.processes:
            raise UserError(f"--batch_size {config.batch_size}: not for {self.processes} processes")
        if config.dtype == "bfloat16":
            self.runner = MixedPrecision(model)
        if config.compile:  # turns a whole pass into a few fused kernels; a minute or two at first
            self.runner = torch.compile(self.runner)
        if torch.distributed.is_initialized():
            self.runner = nn.parallel.DistributedDataParallel(self.runner)

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.began -= state["seconds"]  # as if it had never been interrupted
        if not (self.out_dir / "best.pt").exists():  # it goes on in another folder than before
            self.best_val, self.best_step = math.inf, self.step

    say, load, reader = staticmethod(say), staticmethod(read_checkpoint), CachedReader
    evaluate = staticmethod(functools.partial(evaluate, progress=show_progress))

    def log(self, **record) -> None:
        """A line of metrics.jsonl. Raises Diverged if a loss in it is not a finite number."""
        if not all(math.isfinite(value) for name, value in record.items() if "loss" in name):
            raise Diverged(f"the run has diverged at step {self.step}; try less than "
                           f"--learning_rate {self.config.learning_rate}")
        if self.rank == 0:  # JSON has no infinity and no NaN: null stands for them
            record = {k: v if math.isfinite(v) else None for k, v in record.items()}
            with open(self.out_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.wandb:
            with contextlib.suppress(Exception):  # whatever ails it must not end the run
                self.wandb.log(record, step=record["step"])

    def over(self) -> bool:
        """Also after a signal to any of the processes: then it saves, and leaves."""
        if number := max(gather(max(self.signals, default=0))):
            self.save("latest.pt")
            gather(0)  # nobody leaves before the first one has saved
            say("saved; go on with --resume")
            raise SystemExit(128 + number)
        return super().over()

    def batches(self):
        """This process's rows of each batch. Gradients are averaged after the last micro-step."""
        if not self.clock or self.step % self.config.log_interval == 0:
            self.clock = (self.step, time.perf_counter())  # since when a report counts
        for i, (x, y) in enumerate(super().batches(), start=1):
            if i == 1 and self.rank > 0:
                torch.manual_seed(derived_seed(self.config.seed, self.step, self.rank))  # dropout
            self.runner.require_backward_grad_sync = i == self.config.grad_accum
            yield x[self.rank :: self.processes], y[self.rank :: self.processes]

    def report(self, loss, norm) -> None:
        c = self.config
        if self.step % c.log_interval and self.step < c.max_steps:
            return
        loss = sum(gather(loss.item())) / self.processes
        now, (step, clock) = time.perf_counter(), self.clock
        tokens = (self.step - step) * c.batch_size * c.grad_accum * self.model.config.block_size
        rate, lr = tokens / (now - clock), self.optimizer.param_groups[0]["lr"]
        self.log(step=self.step, loss=loss, lr=lr, grad_norm=norm.item(),
                 tokens_per_second=round(rate))
        left = timedelta(seconds=round((now - self.began) * (c.max_steps / self.step - 1)))
        say(f"step {self.step}/{c.max_steps} | loss {loss:.4f} | lr {lr:.2e} | "
            f"{rate:,.0f} tokens/s | {left} left")

    def save(self, name: str) -> None:
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self.log(step=self.step, loss=math.inf)  # raises Diverged
        if self.rank == 0:
            super().save(name)

    def state(self) -> dict:
        return super().state() | {"seconds": time.perf_counter() - self.began,
                                  "corpus": self.text_info}

    def finish(self) -> float:
        self.seconds = time.perf_counter() - self.began
        gather(0)  # the first process has written best.pt
        nats = super().finish()
        self.log(step=self.step, full_val_loss=nats, seconds=self.seconds, best_step=self.best_step)
        if self.rank == 0:
            curves = {name: (self.out_dir, name) for name in ("loss", "train_loss", "val_loss")}
            draw_curves(self.out_dir / "loss.png", curves, ylabel="loss, nats per token")
        say(f"trained to step {self.step} in {timedelta(seconds=round(self.seconds))}; the best "
            f"model, of step {self.best_step}: {self.out_dir / 'best.pt'}")
        return nats

# ==================================================================================================
# Part IV: The laboratory
# ==================================================================================================

import statistics
import tempfile

# ---- Comparing variations ------------------------------------------------------------------------
# Change one thing at a time, same steps, seeds, batches; a difference below the spread of the seeds
# shows nothing. A variant is an ordinary run in its own folder; typed again, the command goes on.
# (`typed` is what was typed, by name of flag; pick, parse, find_settings, run_train: see Part V.)
def spread(numbers: list[float]) -> str:
    """Mean and standard deviation: [1.0, 2.0] -> "1.5000 ± 0.7071"."""
    mean = statistics.fmean(numbers)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(numbers):.4f}" if len(numbers) > 1 else "")

def run_ablate(typed: dict) -> None:
    """--mode ablate: a table on stdout, and curves.png."""
    command, first = pick(Command, typed), typed.get("seed", TrainConfig.seed)
    name, _, values = command.vary.partition("=")
    if name in ("seed", "preset") or name not in {**comments(GPTConfig), **comments(TrainConfig)}:
        raise UserError(f"--vary {command.vary}: must be FIELD=A,B,C; seed and preset cannot vary")
    switch = {"true": [f"--{name}"], "false": [f"--no_{name}"]}
    variants = {f"{name}={value}": parse(switch.get(value.lower(), [f"--{name}={value}"]))
                for value in values.split(",")}
    _, config = find_settings(typed, find_device(command.device))
    quiet = dict(sample_tokens=0, checkpoint_interval=0, log_interval=100,
                 max_steps=config.max_steps)  # given, so that prepare_run does not lower it
    folder = Path(command.out_dir) / f"ablate_{name}"
    outcomes, curves = collections.defaultdict(list), {}
    for seed, (label, variant) in itertools.product(range(first, first + command.seeds),
                                                    variants.items()):
        out_dir = folder / f"{label}_seed={seed}"
        say(f"---- {label}, seed {seed}")
        try:
            outcomes[label].append(run_train({**quiet, **typed, **variant, "seed": seed,
                                              "out_dir": out_dir, "resume": True}))
        except Diverged as problem:
            say(str(problem))
        curves[f"{label}, seed {seed}"] = (out_dir, "val_loss")
    draw_curves(folder / "curves.png", curves, ylabel="validation loss, nats per token")
    print("| variant | nats/token | bits/character | seconds | seeds |\n|---|---|---|---|---|")
    for label in variants:
        cells = [spread(numbers) for numbers in zip(*outcomes[label])] or ["diverged"] * 3
        print(f"| {label} | {' | '.join(cells)} | {len(outcomes[label])} of {command.seeds} |")

# ---- Benchmark -----------------------------------------------------------------------------------
# "Fast" needs a machine: `--mode bench` times this one, on whole windows; writing is in float32.
def run_bench(typed: dict) -> None:
    """--mode bench: a table on stdout."""
    from torch.utils.benchmark import Timer  # warms up, and waits for the device

    command, n = pick(Command, typed), pick(GenerateConfig, typed).max_tokens
    device = find_device(command.device)
    sizes, config = find_settings({**typed, "grad_accum": 1}, device)
    if sizes["model"] != "gpt":
        raise UserError(f"--preset {config.preset}: bench measures a GPT; choose another preset")
    model = new_model(GPTConfig(**{**sizes, "vocab_size": 65}), config.seed)  # as of Shakespeare
    tokens = torch.arange(10 * model.config.block_size) % model.config.vocab_size
    run = FullRun(model, None, Corpus(tokens, tokens, len(tokens)), config, ".", device, {})
    run.step = config.max_steps  # where windows are whole
    start = torch.zeros(1, 1, dtype=torch.long)

    def rate(work: int, function) -> float:
        """Units of work per second, if a call of the function does so many."""
        timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
        return work / timer.blocked_autorange(min_run_time=command.bench_seconds).median

    def step() -> None:
        train_step(run.runner, run.optimizer, run.batches(), config)

    rows = {"parameters": count_parameters(model),
            "training, tokens/s": rate(config.batch_size * sizes["block_size"], step),
            "writing, tokens/s": rate(n, lambda: model.generate(start, n, read=CachedReader())),
            "writing, without the cache": rate(n, lambda: model.generate(start, n))}
    if sys.platform == "linux":
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        rows["page faults per step"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(f"| {config.preset}: {device}, {config.dtype}, {torch.get_num_threads()} threads, "
          f"PyTorch {torch.__version__} | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:,.0f} |")

# ---- Exchange with Hugging Face ------------------------------------------------------------------
# Problem   A model should run where people run models, and models from there should run here.
# Answer    The library transformers keeps a model in a folder: config.json names one of several
#           hundred architectures, and its sizes; model.safetensors has the weights, by their names
#           there. Four of those can compute what ours do. `HELD` has, for each, the settings that
#           it can hold (regular expressions) and its name for each of our layers (-: none; {q,k}:
#           two layers for one of ours). What none of them holds is refused.
# Places    `places` pairs our weights with theirs. Copying ours to theirs exports, theirs to ours
#           imports; an import is then checked by comparing the logits of both.
KINDS, *ROWS = (row.split() for row in """\
              gpt2        persimmon                 apertus                qwen3
model         gpt         gpt                       gpt                    gpt
norm_position pre         pre                       pre                    pre
token_shift   False       False                     False                  False
pos           learned|s.* rope                      rope                   rope
norm          layernorm   layernorm                 rmsnorm                rmsnorm
activation    gelu|relu2? gelu|relu2?               gelu|relu2?            swiglu
qk_norm       False       True|False                True                   True
bias          True|False  True|False                False                  False
wte           wte         embed_tokens              embed_tokens           embed_tokens
wpe           wpe         -                         -                      -
ln_f          ln_f        final_layernorm           norm                   norm
ln_1          ln_1        input_layernorm           attention_layernorm    input_layernorm
ln_2          ln_2        post_attention_layernorm  feedforward_layernorm  post_attention_layernorm
attn.c_attn   attn.c_attn self_attn.query_key_value self_attn.{q,k,v}_proj self_attn.{q,k,v}_proj
attn.c_proj   attn.c_proj self_attn.dense           self_attn.o_proj       self_attn.o_proj
attn.qk_norm  -           self_attn.{q,k}_layernorm self_attn.{q,k}_norm   self_attn.{q,k}_norm
mlp.c_fc      mlp.c_fc    mlp.dense_h_to_4h         mlp.up_proj            mlp.{gate,up}_proj
mlp.c_proj    mlp.c_proj  mlp.dense_4h_to_h         mlp.down_proj          mlp.down_proj
""".splitlines())
HELD = {name: dict(zip(KINDS, cells)) for name, *cells in ROWS}

def find_architecture(config: GPTConfig) -> str:
    """The architecture that holds a model. Raises UserError, naming a setting, if none does."""
    faults = {kind: [name for name, held in HELD.items() if hasattr(config, name)
                     and not re.fullmatch(held[kind], str(getattr(config, name)))]
              for kind in KINDS}
    kind = min(KINDS, key=lambda kind: len(faults[kind]))
    for name in faults[kind]:
        raise UserError(f"{name}={getattr(config, name)}: transformers has no model with all this")
    return kind

def places(model, theirs, kind: str):
    """Our weights and their places in theirs, as views of one shape: filling one fills a model."""
    there = theirs.state_dict()
    trunk, blocks = ("transformer", "h") if kind == "gpt2" else ("model", "layers")
    for name, w in model.state_dict().items():
        block, layer, what = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
        if layer == "lm_head":
            yield w, there[name]
            continue
        if kind == "gpt2" and ".c_" in layer:
            w = w.t()  # they have x W, not x W^T
        if kind == "persimmon" and layer == "attn.c_attn":  # a head's q, k, v stand together
            w = w.unflatten(0, (3, model.config.n_head, -1)).transpose(0, 1)
        before, *braces = re.split("[{}]", HELD[layer][kind])  # a.{q,k}_b means a.q_b and a.k_b
        called = [before + x + braces[1] for x in braces[0].split(",")] if braces else [before]
        pieces = [w] * 2 if layer == "attn.qk_norm" else w.chunk(len(called))  # one norm for both
        for part, piece in zip(called, pieces):
            place = f"{blocks}.{block}.{part}" if block else part
            yield piece, there[f"{trunk}.{place}.{what}"].view(piece.shape)

def their_model(model, kind: str, end: int | None):
    """A model of the library's that computes the same. end: the id that ends a text."""
    import transformers

    c, hidden = model.config, model.h[0].mlp.c_proj.in_features
    activation = {"gelu": "gelu_new", "swiglu": "silu"}.get(c.activation, c.activation)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        kind, vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_head, head_dim=c.n_embd // c.n_head,
        max_position_embeddings=c.block_size, intermediate_size=hidden, n_inner=hidden,
        hidden_act=activation, activation_function=activation, attention_bias=c.bias,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        attention_dropout=c.dropout, hidden_dropout=c.dropout,
        qk_layernorm=c.qk_norm, rms_norm_eps=RMSNorm.eps, tie_word_embeddings=c.tie_weights,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        rope_theta=1e4, bos_token_id=None, eos_token_id=end, pad_token_id=None,
        minigpt=asdict(c)))  # the last one is for us
    for p in theirs.parameters():
        nn.init.zeros_(p)  # they have biases where we have none
    for ours, there in places(model, theirs, kind):
        there.copy_(ours)
    theirs.generation_config.update(max_length=c.block_size, do_sample=True)
    return theirs

def save_tokenizer(tokenizer, folder: Path) -> None:
    """Writes it twice, with equal ids: as we do, and as the library `tokenizers` does."""
    import tokenizers as t

    tokenizer.save(folder)
    if tokenizer.kind == "char":
        theirs = t.Tokenizer(t.models.WordLevel(tokenizer.stoi))
        theirs.pre_tokenizer = t.pre_tokenizers.Split("", "isolated")
        theirs.decoder = t.decoders.Fuse()
    else:
        theirs = t.Tokenizer(t.models.BPE.from_file(f"{folder}/vocab.json", f"{folder}/merges.txt"))
        theirs.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = t.decoders.ByteLevel()
        theirs.add_special_tokens([END_OF_TEXT])
    theirs.save(f"{folder}/tokenizer.json")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
             "model_input_names": ["input_ids", "attention_mask"],
             "eos_token": tokenizer.end and END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")

def read_tokenizer(folder: Path):
    """The tokenizer of a folder: characters, or byte pairs with GPT-2's ids."""
    if (folder / "chars.json").exists():
        return CharTokenizer.load(folder)
    if (folder / "merges.txt").exists():
        return BPETokenizer.load(folder)
    import tokenizers

    with tempfile.TemporaryDirectory() as parts:  # tokenizer.json has both
        theirs = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_bytes().decode())
        theirs.model.save(parts)
        ours, text = BPETokenizer.load(parts), "The  tide's 12\n"
        if theirs.encode(text).ids != ours.encode(text):
            raise UserError(f"{folder}: tokenizer.json does not cut a text as GPT-2 does")
        return ours

@torch.no_grad()
def read_folder(folder: Path) -> dict:
    """A folder of transformers as a checkpoint; nothing in it is executed. Raises UserError."""
    import transformers

    try:
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, dtype=torch.float32)  # they are in the report
        c, tokenizer = theirs.config, read_tokenizer(folder)
        model = GPT(GPTConfig(**getattr(c, "minigpt", None) or dict(
            vocab_size=c.vocab_size, block_size=c.n_positions, n_layer=c.n_layer, n_head=c.n_head,
            n_embd=c.n_embd, mlp_ratio=(c.n_inner or 4 * c.n_embd) / c.n_embd, attention="fused",
            dropout=c.resid_pdrop, tie_weights=c.tie_word_embeddings)))
        for ours, there in places(model, theirs, find_architecture(model.config)):
            ours.copy_(there)
        idx = torch.arange(min(64, model.config.block_size))[None] % model.config.vocab_size
        logits, expected = model.eval()(idx)[0], theirs.eval()(idx).logits
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        wrong = [*report["missing_keys"], *report["mismatched_keys"]]
        if wrong or tokenizer.vocab_size != c.vocab_size or not error < 1e-4:
            raise ValueError(f"{wrong} or {tokenizer.vocab_size} tokens; logits off by {error:.0e}")
    except Exception as problem:
        what = f"{type(problem).__name__}: {problem}".splitlines()[0]
        raise UserError(f"{folder}: not a model that can run here ({what}); name a folder with a "
                        "GPT-2, one that --mode export wrote, or a file") from None
    return {"model": model.state_dict(), "tokenizer": (tokenizer.kind, tokenizer.state), "step": 0,
            "model_config": asdict(model.config), "corpus": {"data": "", "sha256": ""},
            "error": error}

def run_export(typed: dict) -> None:
    """--mode export: a folder that transformers loads, with no code of ours."""
    command = pick(Command, typed)
    folder = Path(command.export_dir or Path(command.out_dir, "hf"))
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--export_dir {folder}: is not empty; empty it, or name another folder")
    model, tokenizer, _ = load_for_use({**typed, "device": "cpu"})
    kind = find_architecture(model.config)
    their_model(model, kind, tokenizer.end).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    print(f"{folder}: {kind}; its logits differ from ours by {read_folder(folder)['error']:.0e}")

# ---- A look inside -------------------------------------------------------------------------------
# Problem   A loss is one number. Which tokens did the model foresee, and where did it look?
# Answer    --mode inspect --prompt "..." prints for each token the probability that the model gave
#           it, from what stands before it, and the five likeliest; and draws, for each head, the
#           weights with which each position (a row) looks at itself and those before (columns).
# Look for  A head that is dark just left of the diagonal fetches the token before. One with dark
#           columns at spaces or line breaks looks back to where the word, or the line, began. One
#           whose first column is dark all the way down often found nothing, and rests there.
@torch.no_grad()
def look_inside(model, idx):
    """What follows each position of idx (1, T): probabilities (T, V); and each layer's attention
    weights (nh, T, T), caught on their way into attn_dropout. The model keeps the hooks."""
    weights = []
    for block in getattr(model, "h", []):
        block.attn.attend = functools.partial(CausalSelfAttention.attend, block.attn)
        block.attn.attn_dropout.register_forward_pre_hook(
            lambda _, inputs: weights.append(inputs[0][0].cpu()))
    logits, _ = model.eval()(idx)
    return torch.softmax(logits[0].float().cpu(), dim=-1), weights

def draw_attention(path: Path, weights: list, labels: list[str]) -> None:
    """A picture of each head, a column for each layer."""
    ticks, layers, heads = range(len(labels)), len(weights), len(weights[0])
    labels = [label.replace("$", r"\$") for label in labels]  # else matplotlib sees a formula
    side = 1 + 0.12 * len(labels)  # inches
    if figure := new_figure(path, side * layers, side * heads):
        for layer, head in itertools.product(range(layers), range(heads)):
            axes = figure.add_subplot(heads, layers, head * layers + layer + 1, xticks=ticks,
                                      yticks=ticks, xticklabels=labels, yticklabels=labels)
            axes.imshow(weights[layer][head].tolist(), cmap="Blues", vmin=0, vmax=1)
            axes.tick_params(labelsize=5)
            axes.set_title(f"layer {layer}, head {head}", fontsize=8)
        figure.savefig(path, dpi=150)

def run_inspect(typed: dict) -> None:
    """--mode inspect: a line for each token after the first; attention.png, of the first 48."""
    command = pick(Command, typed)
    model, tokenizer, _ = load_for_use(typed)
    ids = encode_prompt(tokenizer, typed.get("prompt", ""))
    if not 1 < len(ids) <= model.config.block_size:
        raise UserError(f"--prompt: {len(ids)} tokens; must be 2 to {model.config.block_size}")
    p, weights = look_inside(model, torch.tensor([ids]))
    labels = [repr(tokenizer.decode([i])) for i in ids]
    green, plain = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for row, i, label in zip(p, ids[1:], labels[1:]):
        guesses = [(tokenizer.decode([j]), row[j].item()) for j in row.argsort(descending=True)[:5]]
        bar = f"{green}{'#' * round(10 * row[i].item()):10}{plain}"
        others = "".join(f"  {guess!r} {q:.2f}" for guess, q in guesses)
        record = {"token": tokenizer.decode([i]), "p": row[i].item(), "likeliest": guesses}
        print(json.dumps(record) if command.json else f"{label:>10} {row[i]:.3f} {bar}{others}")
    if weights:
        path = Path(command.out_dir, "attention.png")
        draw_attention(path, [w[:, :48, :48] for w in weights], labels[:48])

# ==================================================================================================
# Part V: The command line
#
# Every field of a dataclass is a flag, with its default and its comment; the tables say what it may
# be. Settings come from the defaults, then the preset, then what was typed.
# ==================================================================================================

import argparse
import inspect
from dataclasses import MISSING, fields, replace

Preset = collections.namedtuple("Preset", "about settings")  # what differs from the defaults
PRESETS = {
    "plain": Preset("Part I and nothing else, at the laptop's size", dict(
        n_layer=4, n_head=4, n_embd=128, block_size=128, dropout=0.0, batch_size=16, grad_accum=1,
        max_steps=1500, learning_rate=6e-3, min_lr=1e-4)),
    "laptop": Preset("the best model that two CPU cores train in some three minutes", dict(
        n_layer=4, n_head=2, n_embd=128, block_size=512, dropout=0.0, bias=False, pos="rope",
        qk_norm=True, activation="relu2", attention="fused", batch_size=4, grad_accum=1,
        sampling="even", short_share=0.85, max_steps=2200, optimizer="muon", learning_rate=7e-3,
        momentum=0.85, weight_decay=0.2, schedule="linear", min_lr=0.0, warmup_steps=50,
        eval_interval=275, eval_batches=4)),
    "gpt": Preset("the reference, in the shape of nanoGPT's Shakespeare model", dict(
        bias=False, attention="fused", patience=4)),
    "modern": Preset("the reference's size with RoPE, SwiGLU, Muon", dict(
        bias=False, norm="rmsnorm", pos="rope", qk_norm=True, activation="swiglu", beta2=0.95,
        attention="fused", optimizer="muon", learning_rate=5e-3, schedule="linear", min_lr=0.0,
        grad_accum=1)),
    "mini": Preset("two wide layers of Part I's kind, with dropout", dict(
        n_layer=2, n_head=8, n_embd=256, block_size=128, dropout=0.1, attention="fused",
        batch_size=16, grad_accum=1, max_steps=3000, learning_rate=3e-3, min_lr=1e-4)),
    "bpe": Preset("our own byte-pair encoding in place of characters", dict(
        tokenizer="bpe", n_layer=4, n_head=4, n_embd=192, mlp_ratio=2.0, dropout=0.1,
        attention="fused", batch_size=16, grad_accum=1)),
    "gpt2": Preset("GPT-2 small's shape, for large corpora and large GPUs", dict(
        n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.0, attention="fused",
        batch_size=8, grad_accum=8, learning_rate=6e-4, min_lr=6e-5, beta2=0.95)),
    "bigram": Preset("the baseline: the next character from this one alone", dict(
        model="bigram", dropout=0.0, block_size=64, grad_accum=1, max_steps=1000,
        learning_rate=5e-2, min_lr=5e-3, weight_decay=0.0, log_interval=100)),
}

@dataclass
class Command:
    """What to do, and with which files."""
    mode: str = ""  # what to do
    data: str = ""  # a UTF-8 text; else data/input.txt, or that of the checkpoint
    out_dir: str = "out"  # the run's folder
    checkpoint: str = ""  # the model to use; else best.pt of out_dir
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    resume: bool = False  # train on from latest.pt of out_dir
    init_from: str = ""  # train: begin with the weights of this checkpoint or folder
    export_dir: str = ""  # export: the folder to write; else out_dir/hf
    json: bool = False  # inspect: records instead of lines
    vary: str = ""  # ablate: what to compare, as FIELD=A,B,C
    seeds: int = 2  # ablate: runs of each variant, from --seed on
    bench_seconds: float = 4.0  # bench: time for each figure

@dataclass
class GenerateConfig:
    """How text is drawn from a trained model."""
    prompt: str = ""  # the text to continue; else that of id 0, in Shakespeare a line break
    max_tokens: int = 200  # tokens to add to the prompt
    temperature: float = 0.8  # 0: always the likeliest; 1: as learned
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the likeliest tokens that reach this sum
    num_samples: int = 1  # continuations to write, one after the other
    stop: str = ""  # end before this text appears
    cache: bool = True  # keep keys and values instead of computing them again

CHOICES = {"model": MODELS, "norm": NORMS, "norm_position": BLOCKS, "pos": POSITIONS,
           "activation": ACTIVATIONS, "attention": ATTENTION, "tokenizer": TOKENIZERS,
           "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "preset": ["auto", *PRESETS],
           "sampling": ["random", "even"], "dtype": ["auto", "float32", "bfloat16"]}

# From where to where a setting goes; otherwise whole numbers begin at 1 and others at 0.
RANGES = {
    "vocab_size": (257, 2**16), "mlp_ratio": (0.01, 100), "dropout": (0, 0.9), "top_p": (0, 1),
    "short_share": (0, 1), **dict.fromkeys(["beta1", "beta2", "momentum"], (0, 0.99999)),
    **dict.fromkeys(["seed", "warmup_steps", "sample_tokens", "checkpoint_interval", "patience",
                     "max_tokens"], (0, 2**63 - 1)),
}

# What may change on --resume: how long to go on, what to report and save, and how to compute.
MAY_CHANGE = {"max_steps", "eval_interval", "sample_tokens", "checkpoint_interval", "log_interval",
              "patience", "dtype", "compile", "wandb"}

def comments(config_class) -> dict[str, str]:
    """The comment beside each field of a config: the flag's help."""
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(config_class), re.M))

def read_number(name: str, kind: type, text: str):
    """The value of a flag, which must be in its range."""
    low, high = RANGES.get(name, (1, 2**31 - 1) if kind is int else (0, math.inf))
    with contextlib.suppress(ValueError):
        value = kind(text)
        if low <= value <= high and value < math.inf:
            return value
    what = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r} must be {what} from {low} to {high}")

class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake raises UserError."""
    def error(self, message):
        raise UserError(message.removeprefix("argument "))

def build_parser() -> Parser:
    """The flags, in groups. A flag that is not typed is absent from what is parsed."""
    parser = Parser(prog="minigpt.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    description="Train a GPT, write with it, and look inside.", formatter_class=
                    lambda prog: argparse.HelpFormatter(prog, width=80, max_help_position=26))
    for title, config in {"common": Command, "the model": GPTConfig, "training": TrainConfig,
                          "writing": GenerateConfig}.items():
        group, help = parser.add_argument_group(title), comments(config)
        for f in fields(config):
            kind = f.type if isinstance(f.type, type) else f.type.__args__[0]  # int | None: int
            shown = "" if f.default in (None, "", False, MISSING) else f" ({f.default})"
            options = {"help": help[f.name] + shown, "dest": f.name}
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif f.name in CHOICES:
                options["choices"] = CHOICES[f.name]
            else:
                read = str if kind is str else functools.partial(read_number, f.name, kind)
                options |= {"type": read, "metavar": f.name.upper()}
            group.add_argument(f"--{f.name}", **options)
    return parser

def parse(argv: list[str]) -> dict:
    """What was typed, and nothing else. --max-steps is understood as --max_steps."""
    spelled = [re.sub("^--[a-z-]+(?=$|=)", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)
               for word in argv]
    for word in filter(re.compile(r"--\w+=--$").match, spelled):  # argparse cannot read these
        raise UserError(f"{word}: -- is no value; give another, or leave the flag out")
    return vars(build_parser().parse_args([re.sub("^--no_", "--no-", word) for word in spelled]))

def pick(config_class, settings: dict):
    """A config made of those of the settings that belong to it."""
    return config_class(**{f.name: settings[f.name] for f in fields(config_class)
                           if f.name in settings})

def find_settings(typed: dict, device: torch.device, state=None, origin=None):
    """Settings of model (a dict) and training: those of a checkpoint or preset, over them what was
    typed. Of a checkpoint that the run goes on from, or begins with (origin), some must stay."""
    if state:
        base = {**state["model_config"], **state["train_config"]}
        fixed, reason = base.keys() - MAY_CHANGE, "cannot change on --resume, the run"
    else:
        name, why = typed.get("preset", "auto"), "as asked"
        if name == "auto":
            name, why = "gpt" if device.type == "cuda" else "laptop", f"chosen for {device.type}"
        say(f"preset {name} ({why}): {PRESETS[name].about}. Others, by --preset: "
            + ", ".join(other for other in PRESETS if other != name))
        base = {"vocab_size": 1024, **PRESETS[name].settings, "preset": name}
        fixed, reason = set(), ""
    if origin:
        base |= {**origin["model_config"], "tokenizer": origin["tokenizer"][0]}
        fixed, reason = {*origin["model_config"], "tokenizer"} - {"dropout"}, "--init_from"
    for name in typed.keys() & fixed:
        if typed[name] not in (base[name], "auto"):
            raise UserError(f"--{name} {typed[name]}: {reason} has {base[name]}; leave it out")
    settings = {**base, **typed, "preset": base["preset"]}
    config = pick(TrainConfig, settings)
    if "vocab_size" in typed and config.tokenizer != "bpe":
        raise UserError(f"--vocab_size {typed['vocab_size']}: goes with --tokenizer bpe only")
    config = replace(config, dtype=find_dtype(config.dtype, device))
    return asdict(pick(GPTConfig, settings)), config

def prepare_run(typed: dict) -> FullRun:
    """A run, new or resumed: its settings, then its text, then its model."""
    command = pick(Command, typed)
    out_dir, device, state = Path(command.out_dir), find_device(command.device), None
    latest = out_dir / "latest.pt"
    if command.checkpoint:
        raise UserError(f"--checkpoint {command.checkpoint}: to train on from it use --init_from, "
                        f"or copy it to {latest} and use --resume")
    if not command.resume:
        refuse_used(out_dir)
    elif latest.exists():
        state = read_checkpoint(latest)
        say(f"resuming {latest} at step {state['step']}")
    else:
        say(f"--resume: there is no {latest} yet, so a new run begins")
    origin = read_checkpoint(Path(command.init_from)) if command.init_from and not state else None
    sizes, config = find_settings(typed, device, state, origin)
    data = command.data or (state["corpus"]["data"] if state else "")
    path, text, sha256 = read_corpus(data)
    if state and sha256 != state["corpus"]["sha256"]:
        raise UserError(f"--data {path}: not the text of {latest}; name that, or start a new run")
    if state or origin:
        model, tokenizer = model_from_checkpoint(state or {**origin, "model_config": sizes})
    else:
        tokenizer = make_tokenizer(config.tokenizer, text, sizes["vocab_size"])
        model = new_model(GPTConfig(**{**sizes, "vocab_size": tokenizer.vocab_size}), config.seed)
    corpus = encode_corpus(text, tokenizer, sizes["block_size"])
    tokens_per_step = config.batch_size * config.grad_accum * sizes["block_size"]
    steps = max(6 * len(corpus.train) // tokens_per_step, 1)
    if not state and "max_steps" not in typed and steps < config.max_steps and not sizes["dropout"]:
        config.max_steps = steps  # beyond, the validation loss rises (seen on 64 and 254 KB)
        say(f"{steps} steps, six passes over this text; after more a model knows it by heart. "
            "--max_steps overrules this")
    out_dir.mkdir(parents=True, exist_ok=True)
    run = FullRun(model, tokenizer, corpus, config, out_dir, device,
                  {"data": data and str(Path(data).absolute()), "sha256": sha256})
    if state:
        run.restore(state)
    if run.rank == 0:
        configs = json.dumps(asdict(run.model.config) | asdict(config), indent=2)
        (out_dir / "config.json").write_text(configs, encoding="utf-8")
        run.wandb = start_wandb(config, out_dir)
    say(f"corpus {path}: {len(corpus.train):,} training and {len(corpus.val):,} validation "
        f"tokens, vocabulary {tokenizer.vocab_size}")
    say(f"model {sizes['model']}: {count_parameters(model):,} parameters; {device}, "
        f"{config.dtype}, {torch.get_num_threads()} threads, processes: {run.processes}")
    return run

def run_train(typed: dict) -> tuple[float, float, float]:
    """--mode train. Returns the best model's nats per token, bits per character, and seconds."""
    run = prepare_run(typed)
    run.signals = heed_signals()
    nats = train(run)
    return nats, bits_per_character(nats, run.corpus), run.seconds

def load_for_use(typed: dict):
    """The model, its tokenizer, and the checkpoint that they are from."""
    command = pick(Command, typed)
    path = Path(command.checkpoint or Path(command.out_dir, "best.pt"))
    state = read_checkpoint(path)
    model, tokenizer = model_from_checkpoint(state)
    say(f"{path}: step {state['step']}, {count_parameters(model):,} parameters")
    return model.to(find_device(command.device)), tokenizer, state

def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Its ids; without any, the one that a sample begins with."""
    try:
        return tokenizer.encode(prompt) or [tokenizer.start]
    except UserError as problem:
        raise UserError(f"--prompt {prompt!r}: {problem}") from None

def show_text(tokenizer, tokens, stop: str) -> None:
    """Prints a text as it is drawn. Half a character, or half of the stop text, is held back."""
    ids, shown = [], 0
    for token in tokens:
        if token.item() == tokenizer.end:
            break
        ids.append(token.item())
        text = tokenizer.decode(ids)
        if stop and stop in text:
            return print(text[shown : text.index(stop)])
        safe = text.rstrip("\ufffd")
        safe = safe[: max(len(safe) - len(stop[1:]), shown)]
        print(safe[shown:], end="", flush=True)
        shown = len(safe)
    print(tokenizer.decode(ids)[shown:])

def run_generate(typed: dict) -> None:
    config = pick(GenerateConfig, typed)
    model, tokenizer, _ = load_for_use(typed)
    start = encode_prompt(tokenizer, config.prompt)
    seed = typed.get("seed", TrainConfig.seed)
    for number in range(config.num_samples):
        print("---------------\n" * (number > 0) + tokenizer.decode(start), end="", flush=True)
        generator = torch.Generator().manual_seed(derived_seed(seed, number))
        read = CachedReader() if config.cache else next_logits
        show_text(tokenizer, stream_tokens(model, torch.tensor([start]), config.max_tokens,
                                           config.temperature, config.top_k, config.top_p,
                                           generator, read), config.stop)

def run_eval(typed: dict) -> None:
    model, tokenizer, state = load_for_use(typed)
    path, text, sha256 = read_corpus(typed.get("data", state["corpus"]["data"]))
    if state["corpus"]["sha256"] not in ("", sha256):
        say(f"note: {path} is not the text that this model was trained on")
    corpus = encode_corpus(text, tokenizer, model.config.block_size)
    nats = evaluate(model, corpus.val, progress=show_progress)
    print(describe_loss(nats, corpus))

MODES = {"train": run_train, "generate": run_generate, "eval": run_eval, "ablate": run_ablate,
         "bench": run_bench, "inspect": run_inspect, "export": run_export}
CHOICES["mode"] = MODES

def explain(problem: Exception) -> str:
    """A user's mistake in one line. What is nobody's mistake is raised again."""
    if isinstance(problem, UserError):
        return str(problem)
    if isinstance(problem, ImportError):
        return f"{problem.name} is not installed, which this needs: pip install {problem.name}"
    if isinstance(problem.__context__, OSError):  # PyTorch's writer hides what went wrong
        problem = problem.__context__
    if isinstance(problem, OSError):
        return f"{problem.filename or '--out_dir'}: {problem.strerror}; mend that, or name another"
    if isinstance(problem, MemoryError) or "memory" in str(problem):
        return "out of memory; lower --batch_size, --block_size or --n_embd"
    if type(problem).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile: does not work here ({type(problem).__name__}); use --no_compile"
    raise problem

def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0, 2 for a user's mistake, 128 + n for signal n."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # None: it was closed
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not be UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")
    keep_memory()
    try:
        typed = parse(sys.argv[1:] if argv is None else argv)
        mode = typed.get("mode")
        if not mode:
            raise UserError(f"--mode is missing: choose one of {', '.join(MODES)} (see --help)")
        if join_processes() > 1 and mode != "train":
            raise UserError(f"--mode {mode}: runs in one process; start it with python")
        MODES[mode](typed)
        return 0
    except (KeyboardInterrupt, SystemExit) as end:
        return getattr(end, "code", 128 + signal.SIGINT)
    except BrokenPipeError:  # our reader has left, as in `generate | head`
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141
    except (UserError, OSError, MemoryError, RuntimeError, ImportError) as problem:
        if process_rank() > 0:  # if it is a mistake of all, the first one tells it meanwhile
            time.sleep(3)
        print(f"error: {explain(problem)}", file=sys.stderr, flush=True)
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

if __name__ == "__main__":
    code = main()
    if torch.distributed.is_torchelastic_launched():  # PyTorch's own threads may abort a plain exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
