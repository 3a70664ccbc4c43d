"""
minigpt: a GPT trained on Shakespeare, from scratch, in one file
================================================================

A language model answers one question again and again: given the text so far, what comes next? This
file builds a model that answers it well enough to write verse in the style of Shakespeare.

    python minigpt.py --mode train                        # about three minutes, two cores
    python minigpt.py --mode generate --prompt "ROMEO:"   # write text with the trained model

The file is a book in five parts. You can read Part I from top to bottom without skipping anything,
which takes two to three hours. Its chapters:

    Part I     A GPT, complete    from characters to verse, with everything that a GPT needs
        Characters                                 text to integers and back
        Batches                                    many examples from one text
        The task                                   predict the next token; the loss
        The simplest model, and how it learns      a table of pairs; gradient descent
        Attention, step by step                    how a token collects from earlier ones
        The sizes                                  eight settings define a model
        Attention with several heads               several things at once; dropout
        Positions                                  the order of the tokens
        The MLP                                    compute with what was collected
        Normalization                              keep the scale of all numbers
        The block                                  attention and MLP, with additions around them
        The model                                  everything together; how it starts
        Sampling                                   write text
        What the heads learned                     where the trained model looks
        The optimizer: AdamW                       a step for each weight
        The learning rate                          warm-up and decay
        Clipping                                   no step may be too long
        One step                                   accumulation, and two checks
        Evaluation                                 one figure to report
        A checkpoint                               stop and go on
        The training loop                          the whole program
        What you should see                        the log of a run; what each part brings
        Glossary                                   terms, and where they are explained
    Part II    Better             variations of each part, and how much each of them helps
        Normalization: RMSNorm                     without the mean
        Where to put the norm: post-norm           why GPT-2 moved it
        Fixed positions: sinusoids                 positions that are not learned
        Relative positions: RoPE                   turn queries and keys
        Activation functions                       ReLU, its square, SwiGLU
        An output head of its own                  untied weights
        Token shift                                half of the channels from the token before
        Heads that read the previous position      the same, in a form that can be exported
        Heads that share keys and values           grouped-query attention
        Attention that can do more                 one class for RoPE, QK-norm and these heads
        Byte-pair encoding                         tokens longer than a character
        Muon                                       a step for each matrix
        Better batches                             cover the text evenly; short windows first
        Training at a lower temperature            a model that is less sure
        Learning from other models                 teachers and a student
        Fused kernels                              the same function, faster
        The key/value cache                        write without reading everything again
        The settings of the variations             names that become flags
        A variation of your own                    how to add one
        From GPT-2 to Qwen3                        what separates Part I from a model of today
        What it all adds up to                     from plain to laptop, at equal time
        What did not help                          and where context matters
        Answers to the questions                   to compare with yours
    Part III   The machine room   devices, several processes, signals, safe files, logs
        Devices and number formats                 16 bits
        Memory that is not given back              and threads that wait
        Several processes                          DistributedDataParallel
        What is printed                            stdout, stderr, progress
        Signals                                    Ctrl-C
        The size of a model                        parameters and operations
        Checkpoints that may be damaged            found before they are used
        What is recorded of a run                  metrics.jsonl, curves, Weights & Biases
        Byte-pair encoding, fast                   the same merges, in seconds, in GPT-2's format
        The corpus                                 any text, of any size
        A run with all of it                       what --mode train runs
    Part IV    The laboratory     comparing, measuring, export to other programs, a look inside
        Comparing variations                       --mode ablate
        Benchmark                                  --mode bench
        Exchange: GPT-2's form                     the first of two architectures
        Exchange: Qwen3's form                     the second
        Exchange: previous-position heads          built by hand from ordinary ones
        Exchange: writing the folder               for transformers and others
        Exchange: a GGUF file                      for llama.cpp
        Exchange: the command                      --mode export
        Exchange: reading a GPT-2                  the other direction
        A look inside                              --mode inspect
        A page that holds the model                inspect.html
    Part V     The command line   presets, flags and modes
        Reading the command line                   flags
        From what was typed to settings            presets
        Training                                   --mode train
        Using a trained model                      --mode generate and eval
        The modes                                  which flags belong to which
        The program                                main, and its exit codes
        References                                 the papers

Part I stands alone: it uses nothing from the later parts. And it is what runs. The command

    python minigpt.py --mode train --preset plain --out_dir plain

trains the model of Part I with the functions of Part I, in two to three minutes on two CPU cores.
If you edit them, you change that run. (Around them, Part III adds what a long run needs: files, a
longer status line, and 16-bit arithmetic where the processor has it.) A preset is a named set of
settings. Without a GPU, the first command above uses the preset `laptop`, which has variations from
Part II.

What you need to know: Python, and a little PyTorch. PyTorch provides tensors, automatic
derivatives, the layers Linear (y = x W^T + b) and Embedding (a table of vectors, looked up by row
number), Dropout, and the optimizer AdamW. Everything that makes a GPT a GPT is written out here.
Calling a PyTorch module, `model(x)`, runs its method `forward(x)`. `.to(device)` copies a tensor to
the CPU or a GPU.

A tensor is an array of numbers. We write its sizes in parentheses, for example (B, T, C):

    B    batch: how many sequences are processed side by side
    T    time: how many tokens (here: characters) each sequence has, at most block_size
    C    channels: how many numbers describe one token, n_embd
    V    vocabulary: how many different tokens exist, vocab_size
    N    how many tokens a whole text has
    nh   how many attention heads there are, n_head
    hs   the size of one head, C / nh

Each chapter uses the same labels where they apply. "Problem" says what is missing, "Answer" how it
is solved, "Equation" gives the formula and its source, "Shapes" the sizes that go in and come out,
"Example" a case that you can check by hand, and "Try it" an experiment that we ran, with its
result. Other labels name their topic. "Question" asks you something; the answers stand after Part
II. A line that begins with >>> is Python, and the lines below it are what it prints. The tests run
all of them.
"""

from __future__ import annotations

import math
import os
import random
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # NumPy is not needed here
if "OMP_WAIT_POLICY" not in os.environ:  # for a busy machine; Part III explains it
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn as nn
import torch.nn.functional as F

# ==================================================================================================
# Part I: A GPT, complete
# ==================================================================================================

class UserError(ValueError):
    """A mistake that the user can correct. The program prints it as one line."""

# ---- Characters ----------------------------------------------------------------------------------
# Problem   A network computes with numbers. We need a map from text to integers and back.
# Answer    Collect the distinct characters of the corpus, the text that we train on. Sort them and
#           number them from 0. A piece of text that has a number of its own is called a token, and
#           the number is the token's id. Here every token is one character. `stoi` ("string to
#           integer") encodes, `itos` ("integer to string") decodes. Our corpus, Tiny Shakespeare,
#           has 65 distinct characters: letters, punctuation, the digit 3, the space and the line
#           break.
# Shapes    a str of n characters -> a list of n integers, each from 0 to V - 1
#
# The size of an id means nothing. The model looks up a vector for each id and learns that vector.
class CharTokenizer:
    """One token for each distinct character.

    >>> tokenizer = CharTokenizer.train("to be or not to be")
    >>> tokenizer.itos                                 # sorted: the space comes first
    [' ', 'b', 'e', 'n', 'o', 'r', 't']
    >>> tokenizer.encode("to be")
    [6, 4, 0, 1, 2]
    >>> tokenizer.decode([1, 2, 2])
    'bee'
    """
    kind = "char"  # the name of this class in TOKENIZERS
    end_id = None  # characters have no id that ends a text; --stop ends it at a given string

    def __init__(self, itos: list[str]):
        self.itos = list(itos)
        self.stoi = {character: i for i, character in enumerate(self.itos)}
        self.vocab_size = len(self.itos)
        # The id that a text without a prompt begins with: the line break, if there is one.
        self.first_id = self.stoi.get("\n", 0)

    @property
    def state(self) -> list[str]:
        """What a checkpoint stores. CharTokenizer(state) is the same tokenizer again."""
        return self.itos

    @classmethod
    def train(cls, text: str) -> CharTokenizer:
        """The tokenizer for the characters of a text."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """Text to ids. Raises UserError for a character that is not in the vocabulary."""
        unknown = sorted(set(text) - set(self.stoi))
        if unknown:
            raise UserError(f"the character {unknown[0]!r} (U+{ord(unknown[0]):04X}) is not in the "
                            f"vocabulary of {self.vocab_size} characters")
        return [self.stoi[character] for character in text]

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""
        return "".join([self.itos[i] for i in ids])

TOKENIZERS = {"char": CharTokenizer}

# Question 1   What does `encode` do with a character that did not occur in the corpus? Could the
#              model learn it from one more text, without being rebuilt?

# ---- Batches -------------------------------------------------------------------------------------
# Problem   To learn what comes next, we need many examples of a context and the token that
#           followed.
# Answer    The text contains its own answers: the targets are the same tokens, shifted by one.
#
#               text      t  o  _  b  e           (_ is the space)
#               x         t  o  _  b              input: 4 tokens
#               y         o  _  b  e              targets: below each input, the token after it
#
#           One sequence of T tokens holds T examples at once: t -> o, to -> _, to_ -> b, to_b -> e.
#           Such a sequence is called a window. A batch is B windows from different places.
# Shapes    tokens (N,) -> x (B, T), y (B, T)
# Split     The first nine tenths of the text are for training. The last tenth is for validation:
#           the model is never trained on it. Memorizing the training part does not lower the loss
#           on the validation part; only what the model has learned about the language does.
@dataclass
class Corpus:
    """A text as tokens, in two parts."""
    train: torch.Tensor  # (N,) the ids of the first nine tenths of the characters
    val: torch.Tensor  # the ids of the last tenth
    val_characters: int  # how many characters the tokens of val stand for

    @classmethod
    def from_text(cls, text: str, tokenizer) -> Corpus:
        """Splits a text and encodes both parts."""
        cut = int(0.9 * len(text))
        train = torch.as_tensor(tokenizer.encode(text[:cut]))
        val = torch.as_tensor(tokenizer.encode(text[cut:]))
        return cls(train, val, len(text) - cut)

def get_batch(tokens, block_size: int, batch_size: int, generator=None):
    """batch_size windows at random positions of tokens (N,): x (B, T) and y (B, T), int64.

    generator is a torch.Generator, a source of random numbers. Two generators with the same seed
    give the same windows.

    >>> x, y = get_batch(torch.arange(5), block_size=4, batch_size=1)
    >>> x.tolist(), y.tolist()              # the only window that fits: it needs 4 + 1 tokens
    ([[0, 1, 2, 3]], [[1, 2, 3, 4]])
    """
    return cut_windows(tokens, block_size, draw_starts(tokens, block_size, batch_size, generator))

def draw_starts(tokens, block_size: int, batch_size: int, generator=None):
    """The random positions (B,) at which the windows of a batch begin."""
    # Subtle: a window needs block_size + 1 tokens, so the last one starts at N - block_size - 1.
    # randint excludes its upper end, so that end is N - block_size.
    return torch.randint(len(tokens) - block_size, (batch_size,), generator=generator)

def cut_windows(tokens, block_size: int, starts):
    """The windows that begin at the positions starts (B,): x (B, T) and y (B, T), int64."""
    positions = starts[:, None] + torch.arange(block_size + 1)  # (B, 1) + (T + 1,) = (B, T + 1)
    windows = tokens[positions].long()  # (B, T + 1); Embedding and the loss expect int64
    return windows[:, :-1], windows[:, 1:]

# Question 2   What happens to the loss, and to the model, if the targets are not shifted, so that y
#              = x?

# ---- The task ------------------------------------------------------------------------------------
# Problem   What is a good prediction, and how do we measure it?
# Task      The probability of a whole text is a product of probabilities of single tokens, each
#           given the tokens before it:
#
#               p(x_1, ..., x_N) = p(x_1) p(x_2 | x_1) ... p(x_N | x_1, ..., x_{N-1})
#
#           This is true of every distribution. A model that gives each token a probability from the
#           tokens before it, p(x_t | x_<t), is called autoregressive. To write, it draws a token,
#           appends it, and predicts again. In training, where the text is known, all these
#           probabilities are computed at once.
# Logits    For each position, a model outputs V numbers called logits, one for each token that may
#           come next. A softmax turns them into probabilities, which are positive and sum to 1:
#           p_i = exp(logit_i) / sum_j exp(logit_j).
# Loss      We judge the model by the probability that it gave to the token that really came:
#           loss = -log p_target, the negative log-likelihood. It is 0 if the model was certain and
#           right, and large if the model gave the true token a small probability. The logarithm of
#           a product is the sum of the logarithms, so -log of the probability of the whole text is
#           the sum of the losses of its tokens. Their mean is called the cross-entropy. When it
#           falls, the probability of the training text rises. To choose the model in this way is
#           the principle of maximum likelihood.
# Units     With the natural logarithm, the unit is the nat; one bit is ln 2 = 0.693 nats. exp(loss)
#           is called the perplexity: the model is as uncertain as if it had to choose among that
#           many equally likely tokens.
# Example   Logits 2, 1, 0 give p = 0.67, 0.24, 0.09. If the second token comes, the loss is 1.41.
# Range     A model that knows nothing gives every token the probability 1/65, so its loss is
#           ln 65 = 4.17. A loss of 0 cannot be reached on a new text: nobody can predict it letter
#           by letter.
def cross_entropy(logits, targets):
    """The mean of -log(probability of the target), in nats: logits (..., V), targets (...) -> ().

    F.cross_entropy takes the softmax and the logarithm in one pass. It expects one row for each
    prediction, so (B, T, V) becomes (B * T, V). float() makes it compute in 32 bits.

    >>> round(cross_entropy(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([1])).item(), 2)
    1.41
    """
    targets = targets.to(logits.device)  # batches are made on the CPU; the model may be on a GPU
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())

# ---- The simplest model, and how it learns -------------------------------------------------------
# Problem   What is the least that a model can do?
# Answer    Look at the current token alone: after `q`, how often does `u` come? This is the bigram
#           model. It is a table of V x V numbers; row i holds the logits for what follows token i.
# Shapes    idx (B, T) -> logits (B, T, V)
class Bigram(nn.Module):
    """The baseline: it predicts the next token from the current one alone."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.vocab_size)  # "word token embedding"
        nn.init.normal_(self.wte.weight, mean=0.0, std=0.02)

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, V) and the loss, or None where no targets are given."""
        logits = self.wte(idx.to(self.wte.weight.device))
        loss = None if targets is None else cross_entropy(logits, targets)
        return logits, loss

# Learning  The numbers that a model learns are called its weights (or parameters). The derivative
#           of the loss with respect to a weight tells how the loss changes if we increase that
#           weight a little. All these derivatives together are the gradient. Gradient descent
#           subtracts from each weight its derivative, multiplied by a factor called the learning
#           rate, so that the loss goes down. It repeats this with the next batch. Here is all of
#           it, on a short text. (The learning rate is as large as 10.0 because the 49 derivatives
#           are small: row i of the table learns only from the predictions that follow token i,
#           about a seventh of all. GPTConfig, explained below, holds the sizes of a model; the
#           bigram model needs only that of the vocabulary.)
#
# >>> text = "to be or not to be " * 20
# >>> tokenizer = CharTokenizer.train(text)
# >>> tokens = torch.tensor(tokenizer.encode(text))
# >>> generator = torch.manual_seed(0)                   # a source of random numbers
# >>> model = Bigram(GPTConfig(tokenizer.vocab_size))
# >>> for step in range(201):
# ...     x, y = get_batch(tokens, 8, 32, generator)
# ...     logits, loss = model(x, y)
# ...     model.wte.weight.grad = None                   # forget the gradient of the last step
# ...     loss.backward()                                # compute the gradient of this one
# ...     with torch.no_grad():                          # update: not part of the computation
# ...         model.wte.weight -= 10.0 * model.wte.weight.grad
# ...     if step % 100 == 0:
# ...         print(step, f"{loss.item():.2f}")
# 0 1.95
# 100 0.75
# 200 0.72
#
# The first loss is ln 7 = 1.95, since there are 7 characters. It does not fall to 0: after `o`, a
# space, an `r` and a `t` all occur. (Each loss is that of one batch.) The training loop at the end
# of Part I has more parts, but it does the same three things: it computes the loss, computes the
# gradient, and updates the weights.
#
# Backward  loss.backward() applies the chain rule, from the loss back to every weight: the
#           derivative of a chain of functions is the product of their derivatives. Example:
#           a = w x and L = a^2, with w = 3 and x = 2. Then a = 6 and L = 36. dL/da = 2 a = 12 and
#           da/dw = x = 2, so dL/dw = 12 * 2 = 24. If w grows by 0.001, L grows by about 0.024.
#
#           loss.backward() also follows a weight to every place where it is used. If it is used at
#           several places, a change of it acts through all of them, so their contributions are
#           added. That is why backward() adds to `.grad` and does not overwrite it.
#
# >>> w = torch.tensor(3.0, requires_grad=True)          # ask PyTorch to compute its derivative
# >>> ((w * 2) ** 2).backward()
# >>> w.grad
# tensor(24.)
# >>> ((w * 2) ** 2).backward()                          # once more, without clearing: 24 + 24
# >>> w.grad
# tensor(48.)
#
# Check     The derivative is easy to check: move one weight by 0.001 and compare the loss.
#
# >>> model = Bigram(GPTConfig(tokenizer.vocab_size))
# >>> loss = model(x, y)[1]
# >>> loss.backward()
# >>> with torch.no_grad():
# ...     model.wte.weight[4, 0] += 0.001                # the logit of the space after `o`
# ...     moved = model(x, y)[1]
# >>> f"{(moved - loss).item() / 0.001:.2f}", f"{model.wte.weight.grad[4, 0].item():.2f}"
# ('-0.11', '-0.11')
#
# For the logits themselves, the derivative has a simple form. With p_target written out, the loss
# is log(sum_j exp(logit_j)) - logit_target. The derivative of the first term with respect to
# logit_i is exp(logit_i) / sum_j exp(logit_j), which is p_i. The second term adds -1 for the
# target. So the derivative is p_i, and p_i - 1 for the token that came. A step of gradient descent
# raises the logit of the token that came, and lowers each other logit in proportion to its
# probability.
#
# >>> logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
# >>> cross_entropy(logits, torch.tensor([1])).backward()
# >>> [round(g, 2) for g in logits.grad[0].tolist()]     # p = 0.67, 0.24, 0.09
# [0.67, -0.76, 0.09]
#
# Try it    Train the bigram model on Shakespeare: `python minigpt.py --mode train --preset bigram
#           --out_dir bigram`. It takes seconds and ends at 2.49 nats per character. A table of
#           counts needs no training at all: p(b after a) = (times `ab` occurs + 1) / (times `a`
#           occurs + 65). Made from the training part, that table has a loss of 2.48. So gradient
#           descent has found nearly the same. What a GPT gains over that, it gains by looking
#           further back.

# Question 3   What would the loss of the bigram model be, after long training, on a text in which
#              every character always has the same successor, such as "abcabcabc"?

# ---- Attention, step by step ---------------------------------------------------------------------
# Now we build the GPT. Inside it, each token is a vector of C numbers: row i of a learned table is
# the vector of token i. Two kinds of parts alternate: attention moves information between tokens,
# and an MLP then processes each token by itself. At the end, each vector becomes V logits. The
# README has a picture of the whole.
#
# Problem   In "the queen spoke and all obeyed her" (imagine that words are tokens), `her` has to
#           find `queen`. A token must collect information from the tokens before it, and which of
#           them matter depends on what they are. We build this in four steps, with four tokens of
#           two channels each: channel 0 says "I am a consonant", channel 1 says "I am a vowel". The
#           functions print_rows, causal_mask and attention_weights are defined below.
#
# >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])   # t, o, space, b: (T, C)
#
# Step 1    The simplest way to collect: each token takes the mean of itself and all tokens before
#           it.
#
# >>> means = torch.stack([x[: t + 1].mean(dim=0) for t in range(4)])
# >>> print_rows(means)
# 1.00 0.00
# 0.50 0.50
# 0.33 0.33
# 0.50 0.25
#
# Step 2    The same means as one matrix product. Row t of the matrix holds the weights with which
#           token t collects: equal up to itself, and zero for all later tokens.
#
# >>> weights = torch.ones(4, 4).tril()                  # tril keeps the lower triangle
# >>> weights = weights / weights.sum(dim=1, keepdim=True)
# >>> print_rows(weights)
# 1.00 0.00 0.00 0.00
# 0.50 0.50 0.00 0.00
# 0.33 0.33 0.33 0.00
# 0.25 0.25 0.25 0.25
# >>> torch.allclose(weights @ x, means)
# True
#
# Step 3    The same weights from a softmax. Give each pair of tokens a score, here always 0. Add
#           minus infinity where the token of the column is later than the token of the row:
#           exp(-inf) is 0. This matrix of 0 and -inf is called the causal mask. Each position is
#           trained to predict the next token, so it must not see that token.
#
# >>> scores = torch.zeros(4, 4)
# >>> print_rows(torch.softmax(scores + causal_mask(4), dim=1))
# 1.00 0.00 0.00 0.00
# 0.50 0.50 0.00 0.00
# 0.33 0.33 0.33 0.00
# 0.25 0.25 0.25 0.25
#
#           Why not take the softmax first and set the later tokens to zero afterwards? The rows
#           would no longer sum to 1. And a later token with a large score would make the weights of
#           the others small before it is removed, so the row would still learn something about a
#           token that it must not see. With equal scores, the rows would be:
#
# >>> print_rows(torch.softmax(scores, dim=1).tril())
# 0.25 0.00 0.00 0.00
# 0.25 0.25 0.00 0.00
# 0.25 0.25 0.25 0.00
# 0.25 0.25 0.25 0.25
#
# Step 4    Let the tokens decide. Each token gets a query q, which says what it is looking for, and
#           a key k, which says what it has. Both are linear functions of its vector. The score of
#           row t and column s is the dot product of the query of t and the key of s, divided by the
#           root of the number of channels (explained below). In this example, W_q makes consonants
#           look for vowels and vowels for consonants, and the key is the vector itself:
#
# >>> W_q = torch.tensor([[0.0, 3.0], [3.0, 0.0]])
# >>> q, k = x @ W_q, x                                  # (T, hs) each
# >>> print_rows(attention_weights(q, k, causal_mask(4)))
# 1.00 0.00 0.00 0.00
# 0.89 0.11 0.00 0.00
# 0.33 0.33 0.33 0.00
# 0.09 0.74 0.09 0.09
#
#           The `o` in row 1 finds the `t`, and the `b` in row 3 finds the `o`. The space has no
#           preference. By hand, row 1: its q is (0, 1) W_q = (3, 0). The scores are 3 / sqrt(2) =
#           2.12 with `t` and 0 with itself. exp(2.12) = 8.3 and exp(0) = 1, so the weights are
#           8.3 / 9.3 = 0.89 and 1 / 9.3 = 0.11. (We write x W. A Linear stores the transpose of W.)
# Values    What is collected is not the token's vector but a third linear function of it, its value
#           v. So a token can be found by one property, its key, and hand over another. Here the
#           value is one number that says "vowel", 10 for vowels and 0 for others. The `b` has found
#           that a vowel came before it:
#
# >>> W_v = torch.tensor([[0.0], [10.0]])
# >>> print_rows(attention_weights(q, k, causal_mask(4)) @ (x @ W_v))
# 0.00
# 1.07
# 3.33
# 7.35
#
# Equation  Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k) + mask) V
#           [Vaswani et al. 2017, section 3.2.1; the mask is described in their section 3.2.3]
#           Q, K and V are `q`, `k` and `v`; d_k is the head size `hs`.
# Why the root?   A dot product of two vectors of hs independent numbers with mean 0 and variance 1
#           has variance hs. Without the division, larger heads would have larger scores, and the
#           softmax would put almost all the weight on one token. (At the start of training our
#           scores are much smaller than 1. The division matters when they have grown.)
#
# >>> pairs = torch.randn(2, 10_000, 64, generator=torch.Generator().manual_seed(0))
# >>> (pairs[0] * pairs[1]).sum(dim=1).std().round().item()               # sqrt(64) = 8
# 8.0
def print_rows(matrix) -> None:
    """Prints a matrix with two decimals."""
    for row in matrix.tolist():
        print(" ".join(f"{number:.2f}" for number in row))

def causal_mask(T: int, device=None):
    """(T, T): 0 where the column is at most the row, and minus infinity above the diagonal."""
    return torch.full((T, T), -math.inf, device=device).triu(diagonal=1)

def attention_weights(q, k, mask):
    """How much each query takes from each key: q (..., T, hs), k (..., S, hs) -> (..., T, S).

    No weight is negative, and each row sums to 1. mask (T, S) is added to the scores. S is the
    number of keys. Here S = T. With the cache of Part II, S also counts tokens read earlier."""
    hs = q.shape[-1]
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # row: query; column: key
    return torch.softmax(scores + mask.to(scores.dtype), dim=-1)

# Question 4   In step 4, what would the weights in the last row be if W_q were multiplied by 10?
#              And by 0?

# ---- The sizes -----------------------------------------------------------------------------------
# Eight settings define a model. All except vocab_size are flags, for example --n_layer 8; the
# vocabulary follows from the text. The defaults are those of a larger model. The preset `plain` has
# 4 layers, 4 heads, 128 channels, a context of 128 tokens, and no dropout. (It is trained for 1,500
# steps of 16 windows, with a learning rate of 6e-3.)
@dataclass
class GPTConfig:
    """The sizes of a model. Raises UserError if they do not fit together."""
    vocab_size: int  # V: the number of different tokens
    block_size: int = 256  # context length: the most tokens that the model sees at once
    n_layer: int = 6  # number of blocks, stacked on top of each other
    n_head: int = 6  # number of attention heads in each block
    n_embd: int = 384  # C: channels, the numbers that describe one token
    mlp_ratio: float = 4.0  # width of the MLP, as a multiple of n_embd
    dropout: float = 0.2  # share of values that are set to zero during training
    bias: bool = True  # whether Linear layers and norms have a bias vector, as in GPT-2

    # Each kind of part is looked up in a table by one of these names. In Part I each of these
    # tables has one entry (and MODELS also the bigram model), so read NORMS[config.norm] as
    # LayerNorm. Part II adds entries and makes the names settings. (Without a type, they are
    # constants of the class and not fields.)
    model = "gpt"
    block = "pre"
    attention = "explicit"
    pos = "learned"
    norm = "layernorm"
    activation = "gelu"
    tie_weights = True

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd {self.n_embd}: must be divisible by --n_head {self.n_head}")
        if round(self.mlp_ratio * self.n_embd) < 2:
            raise UserError(f"--mlp_ratio {self.mlp_ratio}: the MLP needs at least 2 hidden units; "
                            "use a larger one")

# ---- Attention with several heads ----------------------------------------------------------------
# Problem   One softmax can concentrate on one thing at a time. A token may need several: the letter
#           before it, the beginning of the word, the speaker's name.
# Answer    nh heads work side by side. Each head reads the whole vector of C channels, and makes
#           from it a q, a k and a v with only C / nh channels of its own. Each has its own three
#           matrices, so each can look for something else, and hand over something else. The results
#           of the heads are placed next to each other, and a last linear layer mixes them.
# Equation  MultiHead(x) = Concat(head_1, ..., head_nh) W_O     [Vaswani et al. 2017, section 3.2.2]
#           W_O is `c_proj`. The matrices that make q, k and v of all heads stand side by side in
#           one matrix, `c_attn`, so that one product computes them all. (The names of the layers
#           are those of GPT-2's published weights. The c is for convolution: GPT-2 used a kind of
#           layer that was called Conv1D.) With two heads, the 3 C numbers of a token are:
#
#               q of head 0 | q of head 1 | k of head 0 | k of head 1 | v of head 0 | v of head 1
#
# Shapes    x (B, T, C) -> q, k, v (B, nh, T, hs) -> weights (B, nh, T, T) -> result (B, T, C)
# Dropout   During training, dropout sets a random share p of the numbers that pass through it to
#           zero, so that the model cannot rely on any single one of them. It divides the others by
#           1 - p, so that the expected sum stays the same. [Srivastava et al. 2014 instead make the
#           weights smaller after training; their p is the share that is kept.] With p = 0.5, (1, 2,
#           3, 4) may become (2, 0, 0, 8). model.train() switches it on and model.eval() switches it
#           off. Here it acts on the attention weights, whose rows then sum to 1 only on average,
#           and on the result. (`plain` has p = 0.)
# Try it    In `forward`, replace `causal_mask(...)` by `torch.zeros(1, 1)`, which adds 0 to every
#           score, and train `plain` with --max_steps 300. At step 250 the loss is already 0.08: the
#           model has found that the answer is at the next position. What it writes is worthless,
#           because there is no next position when it writes.
class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no position sees a later one: (B, T, C) -> (B, T, C).

    "Self" means that queries, keys and values all come from the same sequence."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_size = config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_attn.parts = 3 * [config.n_embd]  # how many of its outputs are q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        q, k, v = self.c_attn(x).split(self.c_attn.parts, dim=-1)  # (B, T, C) each
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)  # (B, nh, T, hs)
        weights = attention_weights(q, k, causal_mask(x.shape[1], x.device))  # (B, nh, T, T)
        y = self.attn_dropout(weights) @ v  # (B, nh, T, hs)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C): the heads of a token next to each other again
        return self.resid_dropout(self.c_proj(y))

    def split_heads(self, x):
        """(B, T, C) -> (B, nh, T, hs). A matrix product works on the last two dimensions. With the
        heads before the time, it multiplies (T, hs) matrices, once for each head of each window."""
        x = x.unflatten(-1, (-1, self.head_size))  # (B, T, nh, hs)
        return x.transpose(1, 2)

ATTENTION = {"explicit": CausalSelfAttention}

# Question 5   How many weights does c_attn have with 1 head, and with 4 heads?

# ---- Positions -----------------------------------------------------------------------------------
# Problem   Attention forms a weighted mean, and a mean does not depend on the order: if we shuffle
#           the earlier tokens, the last token collects the same. But "dog bites man" and "man bites
#           dog" mean different things.
# Answer    Learn a vector for each position from 0 to block_size - 1, and add it to that of the
#           token [Radford et al. 2018, section 3.1]. (The sum does not mix them up for good: there
#           are many channels, and the model learns to use some for the token and others for the
#           position.) There is no vector for later positions, so the context of this model is
#           limited to block_size tokens.
# Shapes    positions (T,) -> vectors (T, C)
def learned_positions(config: GPTConfig) -> nn.Module:
    """A table of position vectors, learned like the token vectors."""
    return nn.Embedding(config.block_size, config.n_embd)

POSITIONS = {"learned": learned_positions}

# Question 6   Without position vectors, and in a model of two blocks, would the last token of "dog
#              bites man" get the same result if the tokens before it were in another order?

# ---- The MLP -------------------------------------------------------------------------------------
# Problem   Attention only mixes values. Something has to compute with what it collected.
# Answer    A multi-layer perceptron (MLP): a linear layer, a function that is not linear (called
#           the activation function), and a second linear layer. It acts on each token by itself.
#           Without the activation function, the two layers together would be equivalent to a
#           single linear layer.
# Equation  MLP(x) = GELU(x W_1 + b_1) W_2 + b_2
#           [Vaswani et al. 2017, section 3.3, who use max(0, x) where GPT uses GELU]
#           W_1 is `c_fc` ("fully connected") and W_2 is `c_proj`.
#           GELU(x) = x Phi(x), where Phi(x) is the probability that a standard normal random number
#           is below x. It is a smooth form of max(0, x). GPT-2 uses an approximation
#           [Hendrycks and Gimpel 2016, section 2]:
#           GELU(x) = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
# Example   Large inputs pass nearly unchanged, and very negative inputs become nearly zero:
#
# >>> [round(gelu(torch.tensor(x)).item(), 2) for x in (-3.0, -1.0, 0.0, 1.0, 3.0)]
# [-0.0, -0.16, 0.0, 0.84, 3.0]
#
# Width     The hidden layer is 4 times as wide as the vectors, as in the first Transformer (2048 =
#           4 * 512). Each hidden unit detects one pattern in the vector (a column of W_1) and adds
#           one vector when it finds it (a row of W_2) [Geva et al. 2021]. A wide hidden layer
#           can hold more patterns than there are channels, but every unit costs 2 C weights. With a
#           factor of 4, two thirds of a block's weights are in its MLP. In `plain`, with 300 steps
#           and three seeds, factors of 1, 2, 4 and 8 give losses of 2.31, 2.31, 2.27 and 2.29, with
#           standard deviations of 0.004 to 0.045.
# Shapes    (B, T, C) -> (B, T, 4 C) -> (B, T, C)
def gelu(x):
    """GELU in its tanh approximation, at each number of x."""
    return F.gelu(x, approximate="tanh")

class MLP(nn.Module):
    """Two linear layers with an activation function between them: (B, T, C) -> (B, T, C)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = round(config.mlp_ratio * config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        hidden = self.activate(self.c_fc(x))  # (B, T, mlp_ratio * C)
        return self.dropout(self.c_proj(hidden))

    def activate(self, x):
        """The activation function."""
        return gelu(x)

ACTIVATIONS = {"gelu": MLP}

# Question 7   Attention takes a softmax, which is not linear either. Why is that not enough?

# ---- Normalization -------------------------------------------------------------------------------
# Problem   From layer to layer, the numbers may grow or shrink. A layer learns best if it can rely
#           on the scale of its input.
# Answer    Give each token's vector the mean 0 and the variance 1, then multiply by a learned gain
#           and add a learned bias, which start at 1 and 0.
# Equation  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
#           [Ba et al. 2016, sections 3 and 3.1, where the gain is called g; eps is usual practice]
#           The mean and the variance are over the C channels of one token, so they depend neither
#           on other tokens nor on other sequences.
# Example   x = [1, 3] has mean 2 and variance 1, so it becomes [-1, 1] before gain and bias.
# Shapes    (B, T, C) -> (B, T, C)
class LayerNorm(nn.Module):
    """Normalizes the channels of each token, then applies a gain and, optionally, a bias."""
    eps = 1e-5  # prevents a division by zero where all channels are equal

    def __init__(self, n_embd: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        x = x - x.mean(dim=-1, keepdim=True)
        variance = x.square().mean(dim=-1, keepdim=True)  # (B, T, 1); divided by C, not by C - 1
        y = x / torch.sqrt(variance + self.eps) * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y

def layer_norm(n: int, config: GPTConfig) -> LayerNorm:
    """A LayerNorm of n channels."""
    return LayerNorm(n, config.bias)

NORMS = {"layernorm": layer_norm}

# Question 8   What does LayerNorm make of x, and of 10 x?

# ---- The block -----------------------------------------------------------------------------------
# Problem   In the first attention, the key of a token says only which token it is and where it
#           stands. After it, the vector of a token can also say which token came before it. Take
#           the text "the cat and the c". A second attention can let the last `c` look for a token
#           that came after a `c`. It finds the `a` of "cat", and predicts an `a`. One attention
#           cannot do this, because no key tells what came before. That is a reason to stack the
#           parts several times. But a deep stack is hard to train: the gradient has to pass through
#           every part on its way back. It may shrink or grow each time; with our small initial
#           weights it shrinks.
# Answer    Let each part add its result to its input, x + part(x) [He et al. 2016a, section 3]. The
#           sum that runs through the whole model is called the residual stream. The derivative of
#           this sum is that of x, which is 1, plus that of the part. So the gradient reaches the
#           first layer undiminished along the additions [He et al. 2016b, section 2]. The norm
#           comes before each part and leaves the stream itself alone. This is called pre-norm
#           [Radford et al. 2019, section 2.3].
#
#               x ----+------------------------> (+) ----+----------------------> (+) ---->
#                     |                           ^      |                         ^
#                     +--> ln_1 --> attention ----+      +--> ln_2 --> MLP --------+
#
# Example   The gradient of one output number with respect to the last token's input vector, through
#           8 blocks, with the additions and without them. (The next chapter defines GPT; model.h is
#           the list of its blocks.)
#
# >>> generator = torch.manual_seed(0)
# >>> model = GPT(GPTConfig(65, block_size=16, n_layer=8, n_head=4, n_embd=32, dropout=0.0))
# >>> x = torch.randn(1, 16, 32, requires_grad=True)
# >>> y = z = x
# >>> for block in model.h:
# ...     y = block(y)                                        # with the additions
# ...     z = block.mlp(block.ln_2(block.attn(block.ln_1(z))))     # without them
# >>> with_additions = torch.autograd.grad(y[0, -1, 0], x)[0][0, -1].norm()
# >>> without = torch.autograd.grad(z[0, -1, 0], x)[0][0, -1].norm()
# >>> f"{with_additions:.1f} and {without:.0e}"
# '1.0 and 4e-13'
#
# Try it    In Block.forward, leave out the two `x +`, and train `plain` with --max_steps 600. The
#           loss ends at 3.35, which is the loss of a model that knows only how often each
#           character occurs. With the additions it ends at 1.93.
# Depth     More layers need more steps. After 300 steps of `plain`, one layer has a loss of 2.22
#           and four have 2.27. After 1,500 steps they have 1.69 and 1.68, which is hardly more than
#           the spread between seeds. So in runs as short as ours, depth hardly pays.
class Block(nn.Module):
    """One layer: tokens exchange information, then each is processed. (B, T, C) -> (B, T, C)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, config)
        self.attn = ATTENTION[config.attention](config)
        self.ln_2 = NORMS[config.norm](config.n_embd, config)
        self.mlp = ACTIVATIONS[config.activation](config)

    def forward(self, x, *memory):  # memory is empty here; the key/value cache of Part II uses it
        x = x + self.attn(self.ln_1(x), *memory)
        x = x + self.mlp(self.ln_2(x))
        return x

BLOCKS = {"pre": Block}

# Question 9   What does a block compute if all weights and biases of its two c_proj are zero?

# ---- The model -----------------------------------------------------------------------------------
# Problem   Ids go in, and logits must come out, at every position at once.
# Answer    Look up a vector for each token, add the vector of its position, let n_layer blocks work
#           on the result, normalize it (the residual stream itself never was), and compare it with
#           the vector of every token. These dot products are the logits.
#
#               "to be"                                          text
#                  |     CharTokenizer.encode
#               [58, 53, 1, 40, 43] with Shakespeare's 65        idx     (B, T)
#                  |     wte: a row for each id           + wpe: a row for each position
#               vectors                                          x       (B, T, C)
#                  |     h: block 0 ... block n_layer - 1
#                  |        x + attention(ln_1(x))               weights (B, nh, T, T)
#                  |        x + MLP(ln_2(x))                     hidden  (B, T, mlp_ratio C)
#               vectors                                          x       (B, T, C)
#                  |     ln_f, then lm_head
#               logits[b, t, v]: how likely token v is to        logits  (B, T, V)
#               follow position t, given all tokens up to t
#
# Names     This is a decoder-only Transformer. The first Transformer translated: an encoder read
#           the whole source sentence, and a decoder wrote the translation, looking at the source
#           through cross-attention. We have one text, so we need neither an encoder nor
#           cross-attention. Recurrent networks read a text one token after the other, each step
#           waiting for the one before. In training, our model computes all T positions at once,
#           because the mask hides the tokens that a position must not see. (When it writes, it goes
#           token by token, too.)
# Tying     The token table (from id to vector) and the output head (from vector to logits) are both
#           matrices of V x C. We use one matrix for both [Press and Wolf 2017]. The Embedding picks
#           row v for token v; the Linear takes the dot product with every row. If two characters
#           are used in the same way, their input vectors should be similar, and so should their
#           output vectors. One matrix lets each use teach the other. Tying saves V C weights: 8,320
#           in `plain`, but 38.6 million in GPT-2 small, which would have 163 million weights
#           without tying.
# Start     The weights start as normal random numbers with standard deviation 0.02 [Radford et al.
#           2018, section 4.1]. After ln_f, a vector has the length sqrt(C), which is 11.3 for C =
#           128. Its dot product with a random row of the table is about 11.3 * 0.02 = 0.23. So all
#           logits are near 0, and the first loss is near ln V. Each block adds to the stream twice,
#           so the stream gets 2 n_layer contributions. Independent contributions add their
#           variances, so their sum would grow with sqrt(2 n_layer). Each c_proj therefore starts
#           smaller by that factor [Radford et al. 2019, section 2.3]:
#
# >>> def spread(n_layer, scale):                        # the standard deviation of such a sum
# ...     return sum(scale * torch.randn(100_000) for _ in range(2 * n_layer)).std().item()
# >>> [round(spread(n, 1.0), 1) for n in (2, 8, 32)]
# [2.0, 4.0, 8.0]
# >>> [round(spread(n, 1 / math.sqrt(2 * n)), 1) for n in (2, 8, 32)]
# [1.0, 1.0, 1.0]
#
# Count     The parameters of `plain`, with C = 128, V = 65, block_size = 128 and 4 layers:
#
#               wte       V C                          8,320     token vectors, and the head
#               wpe       block_size C                16,384     position vectors
#               h         4 blocks of 198,272        793,088
#                 ln_1      2 C                          256     gain and bias
#                 attn      4 C^2 + 4 C               66,048     c_attn 3 C^2 + 3 C, c_proj C^2 + C
#                 ln_2      2 C                          256
#                 mlp       8 C^2 + 5 C              131,712     c_fc 4 C^2 + 4 C, c_proj 4 C^2 + C
#               ln_f      2 C                            256
#               total                                818,048
#
# >>> count_parameters(GPT(GPTConfig(65, block_size=128, n_layer=4, n_head=4, n_embd=128)))
# 818048
class GPT(nn.Module):
    """Token ids go in; logits for every possible next token come out, at every position.

    >>> model = GPT(GPTConfig(65, block_size=16, n_layer=2, n_head=2, n_embd=32))
    >>> logits, loss = model(torch.zeros(4, 16, dtype=torch.long))
    >>> logits.shape, loss
    (torch.Size([4, 16, 65]), None)
    """
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # "word token embedding"
        self.wpe = POSITIONS[config.pos](config)  # "word position embedding"
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.n_layer))
        self.ln_f = NORMS[config.norm](config.n_embd, config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.initialize()

    def initialize(self) -> None:
        """Sets the first weights, as "Start" describes. Gains keep their 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02
                if name.endswith("c_proj.weight"):
                    std = std / math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(parameter, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, V), and the loss, or None where no targets are given.

        Raises ValueError if T is larger than block_size."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens given, but block_size is {self.config.block_size}")
        x = self.embed(idx, torch.arange(T))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        loss = None if targets is None else cross_entropy(logits, targets)
        return logits, loss

    def embed(self, idx, positions):
        """The vectors that enter the first block: idx (B, T), positions (T,) -> (B, T, C)."""
        device = self.wte.weight.device  # batches are made on the CPU; the model may be on a GPU
        tokens = self.wte(idx.to(device))  # (B, T, C)
        return self.drop(tokens + self.wpe(positions.to(device)))  # (B, T, C) + (T, C)

    def generate(self, idx, max_new_tokens, temperature=1.0, **options):
        """Continues idx (B, T): returns (B, T + max_new_tokens). The next chapter explains the
        options, which are those of stream_tokens."""
        new = stream_tokens(self, idx, max_new_tokens, temperature, **options)
        return torch.cat([idx, *new], dim=1)

MODELS = {"gpt": GPT, "bigram": Bigram}

def count_parameters(model: nn.Module) -> int:
    """How many numbers are learned. A tied matrix counts once."""
    return sum(parameter.numel() for parameter in model.parameters())

# Question 10  Before training, the most likely next character is nearly always the input character
#              itself. Why?

# ---- Sampling ------------------------------------------------------------------------------------
# Problem   The model gives logits for the next token. To write, we must choose one token, again and
#           again.
# Answer    Draw a token at random, according to the probabilities. Append it, and ask the model
#           again. Three settings change the distribution before we draw, in this order:
#
#           temperature  Divide the logits by it. Below 1, likely tokens become more likely and the
#                        text gets safer. Above 1, the text gets wilder. At 0, we always take the
#                        most likely token.
#           top_k        Only the k most likely tokens may be drawn [Fan et al. 2018, section 5.4].
#           top_p        Of the tokens that are left, only the smallest set of most likely ones
#                        whose probabilities reach p may be drawn [Holtzman et al. 2020, section
#                        3.1]: few where the model is certain, many where it is not.
#
# Example   Logits 2, 1, 0, as probabilities at three temperatures:
#
#               temperature 0.5   0.87 #################    0.12 ##             0.02
#               temperature 1.0   0.67 #############        0.24 #####          0.09 ##
#               temperature 2.0   0.51 ##########           0.31 ######         0.19 ####
#
#           At temperature 1, top_p = 0.7 keeps the first two tokens, because the first alone
#           reaches only 0.67.
# Shapes    logits (B, V) -> next token (B, 1)
# Window    The model sees at most block_size tokens. When the text gets longer, we drop the oldest,
#           so every remaining token moves to an earlier position.
# Try it    With the trained `plain`, type
#               --mode generate --out_dir plain --prompt ROMEO: --temperature 0
#           It repeats itself: "I will the shall be so the shall be so so see To make the shall the
#           shall the shall be some". Taking the most likely token each time does not give a typical
#           text. --temperature 2 hardly makes words: "TacE! Agai, But-KieR, Frottendft beat laimlt
#           us!"
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
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)  # most likely first
    banned = torch.zeros_like(ranked, dtype=torch.bool)
    if top_k is not None:
        banned[:, top_k:] = True
    if top_p is not None:
        # The probabilities of the tokens that top_k has left.
        p = torch.softmax(ranked.masked_fill(banned, -math.inf), dim=-1)
        # Subtle: a token stays if the sum of those *before* it is below top_p. So the token that
        # reaches top_p stays, too.
        sum_before = p.cumsum(dim=-1) - p
        banned = banned | (sum_before >= top_p)
        banned[:, 0] = False  # the most likely token always stays
    # `banned` is in the order of rank. scatter writes entry j of a row to place order[j], which is
    # the order of ids again: with order = [1, 2, 0], [False, False, True] becomes
    # [True, False, False].
    banned = banned.scatter(-1, order, banned)
    return logits.masked_fill(banned, -math.inf)

def draw_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draws one token for each row of logits (B, V): (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # Only differences of logits matter. With the largest at 0, the division cannot overflow.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = logits / max(temperature, 1e-6)
    p = torch.softmax(filter_logits(logits, top_k, top_p), dim=-1)
    return torch.multinomial(p, num_samples=1, generator=generator)

@torch.no_grad()  # do not record the computation for gradients
def read_window(model, idx):
    """The logits (B, V) of the token that follows idx (B, T), from its last block_size tokens."""
    logits, _ = model.eval()(idx[:, -model.config.block_size :])  # (B, T, V)
    # Only the last position predicts a token that we do not have yet.
    return logits[:, -1].float().cpu()

def new_reader(model):
    """A function that takes a text idx (B, T) and returns the logits (B, V) of the next token.

    Here it is always read_window. Part II adds a reader that remembers what it has read."""
    for kind in type(model.h[0].attn).__mro__ if isinstance(model, GPT) else []:
        if kind in READERS:
            return READERS[kind](model)
    return lambda idx: read_window(model, idx)

READERS = {}  # by the class of the attention, or of one that it extends

def stream_tokens(model, idx, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None,
                  generator=None, reader=None):
    """Yields max_new_tokens tokens (B, 1), one after the other, that continue idx (B, T)."""
    reader = reader or new_reader(model)
    for _ in range(max_new_tokens):
        new = draw_token(reader(idx), temperature, top_k, top_p, generator)
        idx = torch.cat([idx, new], dim=1)
        yield new

# One line on its way through the trained model of `plain`:
#
#     text       t  o  _  b  e  _  o  r  _  n  o  t  _  t  o                15 characters
#     idx        58 53 1  40 43 1  53 56 1  52 53 58 1  58 53               (1, 15)
#     vectors    of the last `o`: 0.100, 0.087, 0.138, ...                  (1, 15, 128)
#     blocks     of the last `o`: -2.98, -3.28, -1.60, ...                  (1, 15, 128)
#     logits     after the last `o`: 4.05, 7.12, -0.57, ...                 (1, 15, 65)
#     next       _ 0.801   o 0.049   line break 0.037   - 0.031   w 0.016   the most likely of 65
#     untrained  o 0.053   g 0.024   S 0.021   . 0.021   Z 0.020            all equal would be 0.015

# Question 11  top_k = 1, temperature = 0 and a very small top_p all give the same text. Why?

# ---- What the heads learned ----------------------------------------------------------------------
# Layers and heads are counted from 0. These are the attention weights of three heads of layer 0 in
# the trained `plain`, for the last `o` of the same text, in percent (a dot is less than 1):
#
#     text       t  o  _  b  e  _  o  r  _  n  o  t  _  t  o
#     head 0     .  .  .  .  .  .  .  .  .  .  .  .  2 96  1               the token before
#     head 3     .  .  .  .  .  .  .  1  .  .  .  5 80 12  1               two tokens back
#     head 2     .  .  .  1  .  2  2  .  .  2 14 48 26  2  2               three tokens back
#
# Nobody told them to do that. In 20 windows of the validation part, head 0 gives 92 % of its weight
# to the token before, head 3 gives 76 % to the one before that, and head 2 gives 53 % to the third.
# So the first MLP sees the last four characters. Later layers work with what is found there: in
# layer 2, head 3 gives 76 % of its weight to spaces and line breaks, where words and lines end. For
# most of the other heads we found no description that is as simple. This shows all of them on a
# page:
#
#     python minigpt.py --mode inspect --out_dir plain --prompt "to be or not to"

# ---- The optimizer: AdamW ------------------------------------------------------------------------
# Problem   The bare loop moved each weight by the learning rate times its derivative. But
#           derivatives differ by orders of magnitude between layers, so no single learning rate
#           suits them all.
# Answer    Divide each derivative by its usual size. AdamW keeps two running means for each weight:
#           one of the derivative, one of its square.
# Equation  m = beta1 m + (1 - beta1) g              g: the derivative; m: its running mean
#           s = beta2 s + (1 - beta2) g * g          s: the running mean of its square
#           m_hat = m / (1 - beta1^t)                t counts the steps from 1
#           s_hat = s / (1 - beta2^t)
#           w = w - lr * (m_hat / (sqrt(s_hat) + eps) + weight_decay * w)          eps = 1e-8
#           [Loshchilov and Hutter 2019, algorithm 2; they write v for s. As in PyTorch, lr
#           multiplies the decay, too. beta1, beta2 and weight_decay are settings; lr is the
#           learning rate.]
#           Both means start at 0, so they are too small at first. The division corrects this: with
#           beta1 = 0.9, at step 1, m = 0.1 g and m_hat = 0.1 g / 0.1 = g.
# Example   First step, g = 0.5: m_hat = 0.5 and s_hat = 0.25, so w moves by lr * 0.5 / 0.5 = lr.
#           With g = 500 it moves by lr, too. So lr is about the largest distance that one weight
#           moves in one step. When derivatives change their sign from batch to batch, m is small
#           and s is not, and the steps are shorter.
# Decay     weight_decay pulls the matrices towards zero, which keeps them from growing needlessly.
#           The W of AdamW stands for this: the pull is separate from the gradient, so it is not
#           divided by sqrt(s_hat), as it was in the older Adam. By custom, biases and gains are
#           left alone. The token table and the position table decay.
def weight_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """The weights in two groups: matrices, which decay, and vectors, which do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0}]

def make_adamw(model: nn.Module, config: TrainConfig):
    """PyTorch's AdamW. `fused` updates all weights in one pass."""
    return torch.optim.AdamW(weight_groups(model, config), lr=config.learning_rate,
                             betas=(config.beta1, config.beta2), fused=True)

OPTIMIZERS = {"adamw": make_adamw}

# Question 12  If the loss were multiplied by 1000, how would the steps of AdamW change?

# ---- The learning rate ---------------------------------------------------------------------------
# Problem   Which learning rate? At the start, s is a mean over very few gradients, so the steps are
#           unreliable and should be small. In the middle, larger steps learn faster. At the end,
#           large steps jump around a minimum without settling.
# Answer    Rise in a straight line (warm-up), then fall along half a cosine.
#
#           learning_rate          ___
#                                /     `.
#                               /        `.
#                  min_lr      /           `-.__
#                       0     /
#                             0  warmup_steps   max_steps
#
# Equation  warm-up  lr = learning_rate * (step + 1) / (warmup_steps + 1)
#           decay    lr = min_lr + (learning_rate - min_lr) * (1 + cos(pi r)) / 2
#                    r = (step - warmup_steps) / (max_steps - warmup_steps), from 0 to 1
#           [the cosine: Loshchilov and Hutter 2017, equation 5, without restarts]
# Peak      There is no formula for the peak. We try several values, each twice the last, and take
#           the best. In `plain`, with 300 steps (seed 1337):
#
#               learning_rate   7.5e-4   1.5e-3   3e-3   6e-3   1.2e-2   2.4e-2
#               loss            2.39     2.36     2.32   2.28   2.34     2.36
#
#           Larger models need smaller values with AdamW: nanoGPT takes 1e-3 for 10.7 million
#           parameters, and GPT-3's authors took 6e-4 for 125 million [Brown et al. 2020, table
#           2.1]. The default, 3e-4, is a cautious value for models of these sizes.
# Try it    `plain` with --max_steps 600 --learning_rate 0.1 ends at 3.03; with its own rate
#           it ends at 1.93.
def cosine(r: float) -> float:
    """From 1 to 0 as r goes from 0 to 1."""
    return (1 + math.cos(math.pi * r)) / 2

SCHEDULES = {"cosine": cosine}

def get_lr(step: int, config: TrainConfig) -> float:
    """The learning rate of a step. The first step is step 0.

    >>> c = TrainConfig(learning_rate=1.0, min_lr=0.0, warmup_steps=3, max_steps=13)
    >>> [get_lr(step, c) for step in (0, 1, 2, 3)]     # not 0 at first: that step would be wasted
    [0.25, 0.5, 0.75, 1.0]
    >>> round(get_lr(8, c), 6), get_lr(13, c)          # halfway down, and the end
    (0.5, 0.0)
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if step >= config.max_steps:
        return config.min_lr
    r = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    return config.min_lr + (config.learning_rate - config.min_lr) * SCHEDULES[config.schedule](r)

# Question 13  With warmup_steps = 0, what is the learning rate of the first step?

# ---- Clipping ------------------------------------------------------------------------------------
# Problem   One unusual batch can give a gradient a hundred times the usual size. With beta1 = 0.9,
#           12 % of its share in m is left after 20 steps. With beta2 = 0.99, 13 % of its share in s
#           is left after 200 steps. So for about 20 steps their direction is wrong, and for about
#           200 more they are too small.
# Answer    Limit the length of the gradient.
# Equation  if |g| > max_norm:  g = g * max_norm / |g|         [Pascanu et al. 2013, algorithm 1]
#           |g| is the length of all derivatives of the model, taken as one long vector. They are
#           all multiplied by the same number, so the direction of the step stays the same.
# Example   Two weights with g = (3, 4): |g| = 5. With max_norm = 1 it becomes (0.6, 0.8).
def clip_gradients(parameters, max_norm: float) -> torch.Tensor:
    """Scales all gradients in place so that their joint norm is at most max_norm (0: no limit).

    Returns the norm before scaling, as a tensor with a single number."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([g.norm() for g in gradients])  # of each weight matrix or vector
    norm = norms.norm()  # sqrt of the sum of all squares: the norm of everything together
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in gradients:
            g.mul_(scale)
    return norm

# Question 14  AdamW divides by the usual size of a gradient. Why do we still limit its length?

# ---- One step ------------------------------------------------------------------------------------
# Problem   A large batch gives a gradient with less noise, but it may not fit into memory.
# Answer    Process it in parts. Gradients add (see "Backward"), so run several small batches one
#           after the other, call backward() after each, and update once. Each loss is divided by
#           the number of parts, so that the sum of the gradients is the gradient of the mean. This
#           is called gradient accumulation. A step is one update of the weights; a micro-step is
#           one small batch.
# Example   The gradient of 4 rows at once, and of 2 + 2 rows:
#
# >>> model = GPT(GPTConfig(65, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0)).double()
# >>> x = torch.arange(32).view(4, 8)                    # any targets will do here, even x
# >>> model(x, x)[1].backward()
# >>> whole = model.wte.weight.grad.clone()
# >>> model.zero_grad()
# >>> for rows in (x[:2], x[2:]):
# ...     (model(rows, rows)[1] / 2).backward()
# >>> (whole - model.wte.weight.grad).abs().max().item() < 1e-8
# True
@dataclass
class TrainConfig:
    """How a model is trained. The four chapters up to this one explain most of these settings, and
    the following chapters the others. Raises UserError if min_lr is above learning_rate."""
    batch_size: int = 64  # B: sequences in one micro-step
    grad_accum: int = 4  # micro-steps that are added up for one step
    max_steps: int = 2000  # steps to train for
    learning_rate: float = 3e-4  # peak of the schedule
    min_lr: float = 3e-5  # the learning rate at the end, at most its peak
    warmup_steps: int = 100  # steps in which the learning rate rises to its peak
    weight_decay: float = 0.1  # how strongly matrices are pulled towards zero
    beta1: float = 0.9  # AdamW: how much of the old mean of the gradient is kept
    beta2: float = 0.99  # AdamW: the same for the mean of its square
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    eval_interval: int = 250  # steps from one evaluation to the next
    eval_batches: int = 10  # batches in one estimate of the loss
    sample_tokens: int = 160  # length of the sample shown at an evaluation; 0: none
    checkpoint_interval: int = 500  # steps between numbered checkpoints; 0: none
    log_interval: int = 25  # steps between status lines
    patience: int = 0  # stop after this many evaluations without a new best loss; 0: never
    seed: int = 1337  # of the first weights, the batches, dropout, and of generated texts

    # Entries of tables, as in GPTConfig.
    optimizer = "adamw"
    schedule = "cosine"
    sampling = "random"

    def __post_init__(self):
        if self.min_lr > self.learning_rate:
            raise UserError(f"--min_lr {self.min_lr}: must be at most --learning_rate "
                            f"{self.learning_rate}")

def train_step(model, optimizer, batches, config: TrainConfig):
    """One update of the weights, from the grad_accum pairs (x, y) of batches.

    Returns two tensors with a single number each: the mean loss, and the norm of the gradient."""
    model.train()
    loss_sum = 0.0
    for x, y in batches:
        _, loss = model(x, y)
        loss = loss / config.grad_accum
        loss.backward()
        loss_sum += loss.detach()  # the number, without the record of how it was computed
    norm = clip_gradients(model.parameters(), config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss_sum, norm

# Check 1   A model that works can learn one batch by heart. If the loss on a single batch does not
#           fall to nearly zero, the gradient does not reach the weights, or the learning rate is
#           far off. This takes seconds:
#
# >>> generator = torch.manual_seed(0)
# >>> model = GPT(GPTConfig(65, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0))
# >>> config = TrainConfig(grad_accum=1, learning_rate=1e-2)
# >>> optimizer = make_adamw(model, config)
# >>> x, y = get_batch(torch.randint(65, (1000,)), 16, 4)     # noise: it can only be memorized
# >>> losses = [train_step(model, optimizer, [(x, y)], config)[0].item() for _ in range(200)]
# >>> f"{losses[0]:.1f}, then {losses[50]:.1f}, then {losses[-1]:.1f}"
# '4.2, then 0.0, then 0.0'
#
# Check 2   The first check cannot find a model that sees its targets. So change a later token: no
#           earlier logit may change.
#
# >>> before, _ = model.eval()(x)
# >>> x[:, 10] = (x[:, 10] + 1) % 65
# >>> after, _ = model(x)
# >>> torch.equal(before[:, :10], after[:, :10]), torch.equal(before[:, 10:], after[:, 10:])
# (True, False)

# Question 15  After Check 1, what loss do you expect on another batch of the same noise?

# ---- Evaluation ----------------------------------------------------------------------------------
# Problem   The loss of one batch is noisy, and on training data it does not show what the model
#           would do with a new text.
# Answer    While the model trains, estimate the loss of both parts on a few batches, the same ones
#           each time. At the end, compute the loss on the whole validation part. That is the figure
#           to report, since it does not depend on which batches were drawn.
# Overfitting   If training goes on for long, the model begins to memorize the training text: the
#           training loss goes on falling, while the validation loss rises. Then stop earlier (the
#           setting `patience` does that), use more text, a smaller model, or more dropout.
@torch.no_grad()
def estimate_loss(model, corpus: Corpus, config: TrainConfig) -> dict[str, float]:
    """The mean loss over eval_batches batches of each part: {"train": ..., "val": ...}, in nats."""
    model.eval()
    means = {}
    for name, tokens in (("train", corpus.train), ("val", corpus.val)):
        generator = torch.Generator().manual_seed(0)
        total = 0.0
        for _ in range(config.eval_batches):
            x, y = get_batch(tokens, model.config.block_size, config.batch_size, generator)
            total += model(x, y)[1].item()
        means[name] = total / config.eval_batches
    return means

@torch.no_grad()
def evaluate(model, tokens, batch_size: int = 16, progress=None) -> float:
    """The mean loss in nats over all tokens (N,) except the first, which nothing predicts.

    The text is cut into windows of block_size = T tokens that do not overlap. The last one may be
    shorter:

        tokens   0 1 2 3 4 5 6 7 8        T = 4
        x        0 1 2 3|4 5 6 7          two windows side by side: (2, 4)
        y          1 2 3 4|5 6 7 8

    A token early in its window has little context, so this figure is slightly too high, but it
    counts each token exactly once. progress, if given, is called with the share that is done."""
    model.eval()
    T = model.config.block_size
    n_targets = len(tokens) - 1
    total = 0.0
    done = 0
    while done < n_targets:
        # As many whole windows as are left, at most batch_size; at the end, one that is shorter.
        # So size is rows * T, except where rows is 1.
        rows = min(batch_size, max((n_targets - done) // T, 1))
        size = min(rows * T, n_targets - done)
        window = tokens[done : done + size + 1].long()
        x = window[:-1].view(rows, -1)
        y = window[1:].view(rows, -1)
        total += model(x, y)[1].item() * size
        done += size
        if progress is not None:
            progress(done / n_targets)
    return total / n_targets

# Units     A loss per token cannot be compared between tokenizers, because a longer token is harder
#           to predict. Bits per character can: all the bits, divided by all the characters.
def bits_per_character(nats: float, corpus: Corpus) -> float:
    """Converts a loss in nats per token."""
    bits_per_token = nats / math.log(2)
    return bits_per_token * len(corpus.val) / corpus.val_characters

def perplexity(nats: float) -> float:
    """exp(loss), limited so that it cannot overflow."""
    return math.exp(min(nats, 700.0))

def describe_loss(nats: float, corpus: Corpus, what: str = "full validation split") -> str:
    """A loss on the whole validation part, in three units."""
    return (f"{what}, {len(corpus.val) - 1:,} tokens: {nats:.4f} nats per token, "
            f"perplexity {perplexity(nats):.4g}, "
            f"{bits_per_character(nats, corpus):.4f} bits per character")

# Question 16  A model with longer tokens, 2.4 characters on average, has a loss of 4 nats per
#              token. Another one, with characters, has 1.8. Which one predicts the text better?

# ---- A checkpoint --------------------------------------------------------------------------------
# Problem   A run can end at any moment. What is on disk must be enough to write text, and to
#           continue the training as if nothing had happened.
# Answer    Save one dictionary with the weights, the optimizer's running means, the settings, the
#           tokenizer, and the number of steps done. Write it under a temporary name first and
#           rename it when it is complete. A rename happens completely or not at all, so at every
#           moment there is either the old file or the new one.
# Names     latest.pt is the newest state that was saved, from which a run continues. best.pt has
#           the lowest validation loss so far, and is the one to write with. step_000500.pt and so
#           on are kept every checkpoint_interval steps.
# Safety    PyTorch's files use Python's pickle format, which can run code when it is loaded. With
#           weights_only=True, nothing but tensors and plain values is created.
FORMAT = "minigpt-5"  # Part III checks this before it uses a checkpoint

def save_checkpoint(path: Path, state: dict) -> None:
    """Writes a dictionary of tensors and plain values, completely or not at all. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # wait until it is on the disk
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

def load_checkpoint(path: Path) -> dict:
    """Reads what save_checkpoint wrote. Tensors are on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)

def model_from_checkpoint(state: dict, config_class=GPTConfig):
    """The model and the tokenizer of a loaded checkpoint."""
    config = config_class(**state["model_config"])
    model = MODELS[config.model](config)
    model.load_state_dict(state["model"])
    kind, tokenizer_state = state["tokenizer"]
    return model, TOKENIZERS[kind](tokenizer_state)

# Question 17  What would go wrong if the optimizer's means were not saved, and started again at 0?

# ---- The training loop ---------------------------------------------------------------------------
# Problem   Put everything together, so that we can watch the model learn, stop, and continue.
# Answer    A loop. This is its outline; the function `train`, below, is all of it:
#
#               evaluate the untrained model, and save it
#               until max_steps are done:
#                   set the learning rate of this step
#                   take the step: draw batches, compute the loss and its gradient, update
#                   print a line now and then
#                   every eval_interval steps: evaluate, show a sample, save best.pt and latest.pt
#
#           What changes during training is in one object, a `Run`: the weights, the optimizer's
#           means and the number of steps. Read `train` first, and then `Run`, whose methods it
#           calls. A `Journal` prints what you see on the screen. Both are classes, so that Part III
#           can extend them: its Run works in several processes, and its Journal also writes files.
def evaluate_and_save(run: Run) -> None:
    """Estimates both losses and shows a sample. Writes best.pt if the validation loss is the lowest
    so far."""
    losses = run.estimate()
    better = losses["val"] < run.best_val
    if better:
        run.best_val = losses["val"]
        run.best_step = run.step
    run.journal.report_evaluation(run, losses, better)
    if better:
        run.save("best.pt")

def train(run: Run, after_step=None) -> None:
    """Trains until run.finished(). after_step, if given, is called with the run after each step."""
    config = run.config
    if run.best_val == math.inf:  # nothing was evaluated yet: how good are random weights?
        evaluate_and_save(run)
        run.save("latest.pt")
    while not run.finished():
        torch.manual_seed(derived_seed(config.seed, run.step))  # for dropout
        for group in run.optimizer.param_groups:
            group["lr"] = get_lr(run.step, config)
        loss, norm = run.take_step()
        run.step += 1
        run.journal.report_step(run, loss, norm)
        evaluated = run.step % config.eval_interval == 0 or run.step == config.max_steps
        numbered = config.checkpoint_interval and run.step % config.checkpoint_interval == 0
        if evaluated:
            evaluate_and_save(run)
        if numbered:
            run.save(f"step_{run.step:06d}.pt")
        if evaluated or numbered:
            run.save("latest.pt")  # last: a run that goes on from it can rely on the other files
        if after_step is not None:
            after_step(run)

# Random    The first weights, the batches and dropout are random. We derive their seeds from --seed
#           and the number of the step alone. So step 1000 draws the same numbers whether the run
#           got there in one go or was stopped and resumed, and whatever else drew random numbers in
#           between. No state of a random generator has to be saved.
def derived_seed(*numbers: int) -> int:
    """A seed of 32 bits that depends on all of the numbers. Neighbours get unrelated seeds.

    >>> derived_seed(1337, 0), derived_seed(1337, 1)
    (1581838107, 3390784733)
    """
    return random.Random(" ".join(map(str, numbers))).getrandbits(32)

def new_model(config: GPTConfig, seed: int) -> nn.Module:
    """A model whose random first weights depend on the seed alone."""
    torch.manual_seed(derived_seed(seed))
    return MODELS[config.model](config)

def random_windows(run: Run) -> list:
    """The size of the next step's windows, and where they begin, for each of its batches."""
    config, T = run.config, run.model.config.block_size
    generator = torch.Generator().manual_seed(derived_seed(config.seed, run.step))
    return [(T, draw_starts(run.corpus.train, T, config.batch_size, generator))
            for _ in range(config.grad_accum)]

# A function in this table gets the run, defined below. It returns grad_accum pairs (T, starts) of
# equal sizes. They must follow from the text, the settings and the step alone, so that resuming is
# exact.
SAMPLING = {"random": random_windows}

class Journal:
    """Prints what happens in a run. Part III has one that also writes files."""
    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def is_due(self, run: Run) -> bool:
        """Whether a status line is due: every log_interval steps, and at the end."""
        return run.step % run.config.log_interval == 0 or run.step == run.config.max_steps

    def report_step(self, run: Run, loss, norm, details: str = "") -> None:
        """Prints a status line if one is due. loss is a number or a tensor."""
        if self.is_due(run):
            self.say(f"step {run.step}/{run.config.max_steps} | loss {loss:.4f}{details}")

    def report_evaluation(self, run: Run, losses: dict[str, float], better: bool) -> None:
        """The estimated losses, and a sample of what the model writes."""
        remark = " (best so far)" if better else ""
        self.say(f"step {run.step}: training loss {losses['train']:.4f}, validation loss "
                 f"{losses['val']:.4f}, perplexity {perplexity(losses['val']):.2f}{remark}")
        if run.config.sample_tokens:
            for line in run.sample().split("\n"):
                self.say(f"    | {line}")

class Run:
    """A training run: a model, what changes with it, and what is saved of it."""
    def __init__(self, model, tokenizer, corpus: Corpus, config: TrainConfig, out_dir,
                 journal=None):
        self.model = model
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.config = config
        self.out_dir = Path(out_dir)
        self.journal = journal or Journal()
        self.runner = model  # what train_step calls; Part III may wrap the model
        self.optimizer = OPTIMIZERS[config.optimizer](model, config)
        self.step = 0  # steps that are completed
        self.best_val = math.inf  # the lowest validation loss so far
        self.best_step = 0  # the step at which it was measured

    def finished(self) -> bool:
        """Whether max_steps is reached, or the last `patience` evaluations brought no new best."""
        interval = self.config.eval_interval
        evaluations_since_best = self.step // interval - self.best_step // interval
        out_of_patience = 0 < self.config.patience <= evaluations_since_best
        return self.step >= self.config.max_steps or out_of_patience

    def batches(self):
        """The grad_accum batches (x, y) of the next step."""
        return [cut_windows(self.corpus.train, T, starts)
                for T, starts in SAMPLING[self.config.sampling](self)]

    def take_step(self):
        """One update of the weights. Returns its loss and the norm of its gradient."""
        return train_step(self.runner, self.optimizer, self.batches(), self.config)

    def estimate(self) -> dict[str, float]:
        """The estimated losses of the model as it is."""
        return estimate_loss(self.model, self.corpus, self.config)

    def sample(self) -> str:
        """A short text from the model as it is, always drawn with the same random numbers."""
        idx = torch.tensor([[self.tokenizer.first_id]])
        tokens = stream_tokens(self.model, idx, self.config.sample_tokens, temperature=0.8,
                               generator=torch.Generator().manual_seed(0))
        return self.tokenizer.decode([token.item() for token in tokens]).strip("\n")

    def save(self, name: str) -> None:
        """Writes a checkpoint to the run's folder."""
        save_checkpoint(self.out_dir / name, self.state())

    def state(self) -> dict:
        """Everything that is needed to write text or to continue the run."""
        return {"format": FORMAT, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": self.step,
                "best_val": self.best_val, "best_step": self.best_step,
                "tokenizer": (self.tokenizer.kind, self.tokenizer.state),
                "model_config": asdict(self.model.config), "train_config": asdict(self.config)}

    def restore(self, state: dict) -> None:
        """Continues where a checkpoint was saved. The model must already have its weights."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.best_val = state["best_val"]
        self.best_step = state["best_step"]

    def score(self, progress=None) -> float:
        """Loads best.pt into the model, in place of the last weights. Returns its loss on the whole
        validation part, in nats."""
        self.model.load_state_dict(load_checkpoint(self.out_dir / "best.pt")["model"])
        nats = evaluate(self.model, self.corpus.val, progress=progress)
        self.journal.say(describe_loss(nats, self.corpus))
        return nats

# That is a complete GPT. This program uses nothing but the names above: put `from minigpt import *`
# before it, and run it in this folder after `python download_data.py`. It trains a small model and
# writes with it. The tests run it with another text:
#
#     text = Path("data/input.txt").read_text(encoding="utf-8")
#     tokenizer = CharTokenizer.train(text)
#     corpus = Corpus.from_text(text, tokenizer)
#     sizes = GPTConfig(tokenizer.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=64)
#     model = new_model(sizes, seed=1)
#     config = TrainConfig(batch_size=16, grad_accum=1, max_steps=300, learning_rate=1e-3)
#     run = Run(model, tokenizer, corpus, config, out_dir=".")
#     train(run)
#     run.score()
#     ids = model.generate(torch.tensor([tokenizer.encode("\n")]), max_new_tokens=200)
#     print(tokenizer.decode(ids[0].tolist()))

# Question 18  Why does the random seed of a step not simply count up, as seed + step?

# ---- What you should see -------------------------------------------------------------------------
# `python minigpt.py --mode train --preset plain --out_dir plain` prints the lines below
# (shortened). Your numbers will differ a little, because processors round differently. Up to 0.03
# in the losses is normal. At step 0 the loss is near ln 65 = 4.17 and the text is noise. After 250
# steps there are word-like groups of letters, after 500 many short words, and at the end names,
# lines and some grammar. (The first estimate of the time left is too long, because it includes the
# start.)
#
#     corpus data/input.txt: 1,003,854 training and 111,540 validation tokens, vocabulary 65
#     model: 818,048 parameters; cpu, bfloat16, 2 threads, processes: 1
#     parameters: token table 8,320, position table 16,384, attention 264,192, MLP 526,848, norms
#     2,304, output head 0
#     step 0: training loss 4.2285, validation loss 4.2232, perplexity 68.25 (best so far)
#         | t3ZrjmhPPqkARxLsXlLUWHoHca  exhkyyyoNddIgAlsvSBUMyccRD$BygX-fntwzkVrM h&?j DJRbsOEHWl
#     step 25/1500 | loss 2.8439 | epoch 0.05 | lr 1.49e-03 | 27,122 tokens/s | 0:04:22 left
#     ...
#     step 250: training loss 2.3437, validation loss 2.3672, perplexity 10.67 (best so far)
#         | LIZICHh Pe her selte, ouce mes,
#         | AMy ourese h fot beare hean thig berelis se serimest.
#     step 500: training loss 1.9139, validation loss 2.0256, perplexity 7.58 (best so far)
#         | thou morde hathen the do a me hand,
#         | And gelse thancome with fraceher? hear good be eliese.
#     ...
#     step 1500: training loss 1.4552, validation loss 1.6792, perplexity 5.36 (best so far)
#         | To would for means hath think of lies and him
#         | With so your wakes many send discer name hands
#     full validation split, 111,539 tokens: 1.6657 nats per token, perplexity 5.289, 2.4030 bits
#     per character
#
# The last validation estimate comes from 10 batches, the final figure from the whole validation
# part. Both are higher than the training loss. The model has seen the training text three times,
# and the last tenth of the text is about other people. One pass over the training text is called an
# epoch.
#
# How much does each part help? From the bigram model to `plain`, one part at a time, each with
# 1,500 steps and the other settings of `plain` (the bigram model has its own learning rate). Nats
# per character on the full validation split, mean and standard deviation over the seeds 1337, 1338
# and 1339, by `python .ci/ladder.py --part 1`:
#
#     the bigram model                        2.486 ± 0.003
#     one layer of attention, one head        2.406 ± 0.008
#     four heads                              2.315 ± 0.020
#     an MLP after the attention              2.265 ± 0.020
#     the additions (residual stream)         1.986 ± 0.012
#     LayerNorm                               1.693 ± 0.006
#     four layers, which is `plain`           1.678 ± 0.012
#
# In this order, the norms and the additions bring most, although the additions have no weights at
# all and the norms have few. In one layer, the addition also keeps the token's own vector, which
# the mean of attention blurs. (All rows except the first have the learning rate of `plain`. The
# rows without norms might do better with one of their own.)
#
# What a large model adds. Today's large language models work on the same principle, with more of
# everything: billions of parameters in place of 0.8 million, trillions of tokens in place of one
# million characters, thousands of GPUs for months. Their tokens are longer (byte-pair encoding,
# Part II), and their blocks differ in details (RMSNorm, RoPE, SwiGLU, Part II). After this
# training, which is called pre-training, they are trained further on dialogues and on human
# preferences. That is what makes them answer questions; a model like ours only continues a text.

# ---- Glossary ------------------------------------------------------------------------------------
# Each term, and the chapter that explains it.
#
#     accumulation       adding up the gradients of several small batches (One step)
#     activation         the function between the layers of the MLP that is not linear (The MLP)
#     attention          collecting values from earlier tokens, weighted (Attention, step by step)
#     autoregressive     predicting each token from those before it (The task)
#     batch              the windows that are processed side by side (Batches)
#     block              attention and MLP, each with its norm and its addition (The block)
#     checkpoint         a file from which a run can continue (A checkpoint)
#     context length     how many tokens the model sees at once, block_size (Positions)
#     cross-entropy      the mean of -log p of the tokens that came; the loss (The task)
#     dropout            setting random values to zero in training (Attention with several heads)
#     embedding          the learned vector of a token or a position (The model)
#     epoch              one pass over the training text (What you should see)
#     gradient           the derivatives of the loss with respect to the weights (The simplest
#                        model)
#     head               one of several attentions side by side (Attention with several heads)
#     head, output       the layer that turns vectors into logits, lm_head (The model)
#     learning rate      how far one step moves the weights (The learning rate)
#     logits             the numbers that a softmax turns into probabilities (The task)
#     mask               hides later positions from attention (Attention, step by step)
#     overfitting        the validation loss rises while the training loss falls (Evaluation)
#     parameter          a number that is learned, also called a weight (The simplest model)
#     perplexity         exp(loss): as uncertain as a choice among that many tokens (The task)
#     residual stream    the sum to which every part adds its result (The block)
#     softmax            turns any numbers into positive numbers that sum to 1 (The task)
#     temperature        divides the logits before drawing (Sampling)
#     token              a piece of text that has a number of its own (Characters)
#     weight tying       one matrix for the token table and the output head (The model)

# ==================================================================================================
# Part II: Better
#
# Part I is the architecture of GPT-2 (2019). This part varies it, one chapter for each variation,
# and ends at the architecture of Qwen3 (2025), an open model. A variation is an entry in one of the
# tables of Part I, under a key of its own, or a switch of its own. Nothing of Part I is changed.
#
# "Here" gives the measured effect: the loss of the preset `plain` after 300 steps with this one
# change, in nats per character on the full validation split, mean and standard deviation over the
# seeds 1337, 1338 and 1339. `plain` itself ends at 2.273 ± 0.004. The command:
#
#     python minigpt.py --mode ablate --preset plain --max_steps 300 --seeds 3 --vary norm=rmsnorm
#
# 300 steps are a fifth of a full run, so these figures tell what learns quickly. The chapter "What
# it all adds up to" has full runs. The figures of `plain`, RMSNorm, post-norm at 8 layers, RoPE,
# QK-norm, previous-position heads and even windows were measured with this code. The others were
# measured before it was rewritten, when `plain` itself ended at 2.279 ± 0.004.
# ==================================================================================================

import collections

# ---- Normalization: RMSNorm ----------------------------------------------------------------------
# Problem   LayerNorm subtracts a mean, divides, multiplies by a gain and adds a bias. Is all of
#           that needed?
# Answer    Only rescale: divide by the root of the mean square, and multiply by a gain.
# Equation  y = x / sqrt(mean(x^2) + eps) * weight
#           [Zhang and Sennrich 2019, equation 4; eps is added]
# Example   x = [3, 4] has the mean square 12.5, so it becomes [0.85, 1.13] before the gain.
# Where     It takes the place of every LayerNorm: before the attention and before the MLP of each
#           block, and before the output head. With qk_norm, it also normalizes queries and keys.
# Gain      Before the attention and the MLP, the matrix that follows the norm could do what the
#           gain does, so the gain can be left out: --no_norm_scale. (This leaves out the gains of
#           all norms, also of the last one and of queries and keys.)
# Here      --norm rmsnorm: 2.278 ± 0.012, and without the gain 2.282 ± 0.009: no difference that
#           three seeds can show. --norm none, no normalization at all: 2.449 ± 0.002.
class RMSNorm(nn.Module):
    """Scales the channels of each token to a root mean square of 1, then applies a gain."""
    eps = 1e-5

    def __init__(self, n_embd: int, scale: bool = True):
        super().__init__()
        gain = torch.ones(n_embd)
        if scale:
            self.weight = nn.Parameter(gain)
        else:
            self.register_buffer("weight", gain)  # saved with the model, but not learned

    def forward(self, x):
        y = x.float()  # queries and keys may come in 16 bits, which are too coarse for squares
        mean_square = y.square().mean(dim=-1, keepdim=True)
        y = y * torch.rsqrt(mean_square + self.eps) * self.weight
        return y.to(x.dtype)

def rms_norm(n: int, config: GPTConfig) -> RMSNorm:
    """An RMSNorm of n channels."""
    return RMSNorm(n, config.norm_scale)

def no_norm(n: int, config: GPTConfig) -> nn.Module:
    """Passes its input on unchanged."""
    return nn.Identity()

NORMS["rmsnorm"] = rms_norm
NORMS["none"] = no_norm

# ---- Where to put the norm: post-norm ------------------------------------------------------------
# Problem   The first Transformer normalized after each addition, on the residual stream itself
#           [Vaswani et al. 2017, section 3.1]. Why did GPT-2 change that?
# Answer    With post-norm, every gradient passes through every norm on its way back. In deep
#           models, the gradients near the output are then large at the start, and training needs a
#           long warm-up or fails [Xiong et al. 2020, section 3.3].
# Here      --block post: 3.03 ± 0.54. At the learning rate of `plain`, two of the three seeds
#           hardly learned. With 8 layers (--n_layer 8), all three stay at 3.347, the loss of a
#           model that knows only how often each character occurs, and pre-norm reaches 2.327 ±
#           0.003. With a sixth of the learning rate (--learning_rate 1e-3), post-norm learns, but
#           pre-norm is still better: 2.456 ± 0.018 and 2.366 ± 0.004. All have 100 steps of
#           warm-up. (The norm after the last block, ln_f, stays.)
class PostNormBlock(Block):
    """A block that normalizes the residual stream after each addition."""
    def forward(self, x, *memory):
        x = self.ln_1(x + self.attn(x, *memory))
        x = self.ln_2(x + self.mlp(x))
        return x

BLOCKS["post"] = PostNormBlock

# ---- Fixed positions: sinusoids ------------------------------------------------------------------
# Problem   Learned position vectors know nothing of each other. That 4 and 5 are neighbours, as 5
#           and 6 are, has to be learned for every pair.
# Answer    Think of clock hands that turn at different speeds. Position t is described by where
#           each hand points after t ticks. To go s positions further, turn each hand by a fixed
#           angle, the same at every position.
# Equation  hand i, for i below C / 2, has the angle t w_i with w_i = 10000^(-2 i / C). The vector
#           of position t holds sin(t w_i) and cos(t w_i) [Vaswani et al. 2017, section 3.5]. The
#           paper multiplies the token vectors by sqrt(C) (its section 3.4). We divide the table by
#           sqrt(C) instead, which has the same proportions.
# Shapes    positions (T,) -> vectors (T, C)
# Here      --pos sinusoidal: 2.145 ± 0.020.
def clock_angles(n_positions: int, n_channels: int) -> torch.Tensor:
    """The angle t w_i of each position t and hand i: (n_positions, n_channels / 2)."""
    if n_channels % 2:
        raise UserError(f"--pos: {n_channels} channels cannot form pairs; choose --n_embd and "
                        "--n_head so that their quotient is even")
    w = 10000.0 ** (-torch.arange(0, n_channels, 2) / n_channels)
    t = torch.arange(n_positions).float()
    return torch.outer(t, w)

class Sinusoids(nn.Module):
    """The fixed table of position vectors: positions (T,) -> (T, C)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        angles = clock_angles(config.block_size, config.n_embd)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (block_size, C)
        # A buffer is stored and moved with the model, but it is not learned.
        self.register_buffer("weight", table / math.sqrt(config.n_embd))

    def forward(self, positions):
        return self.weight[positions]

POSITIONS["sinusoidal"] = Sinusoids

# ---- Relative positions: RoPE --------------------------------------------------------------------
# Problem   What matters is how far apart two tokens are, not where in the window they stand.
# Answer    Rotary position embedding adds nothing to the vectors. It turns each query and key like
#           a set of clock hands (counter-clockwise), by an angle that is proportional to its
#           position. The dot product of two arrows depends on their lengths and on the angle
#           between them. Turning keeps the lengths. So the positions t of a query and s of a key
#           enter their score only through t - s.
#
#               key at 1          query at 2           their angle: one tick, the same as
#                   |                  \               for positions 11 and 12
#                   |                   \
#                   o                    o
#
# Equation  Channels i and i + hs/2 of a head form an arrow (x1, x2) in the plane. At position t it
#           is turned by the angle a = t w_i, with w_i as above and hs in place of C:
#               x1' = x1 cos(a) - x2 sin(a)
#               x2' = x2 cos(a) + x1 sin(a)
#           [Su et al. 2021, section 3.2.2. They pair the channels 2 i and 2 i + 1, which is the
#           same up to the order of the channels. The library transformers pairs them as we do.]
# Example   hs = 2, so w_0 = 1. A query (1, 0) at position 2 and a key (1, 0) at position 1 have the
#           dot product cos(2 - 1) = 0.54. At the positions 12 and 11 it is 0.54 again.
# Here      --pos rope --attention extended: 1.968 ± 0.007. Of all variations of the model, only
#           token shift and previous-position heads gain more.
class NoPositions(nn.Module):
    """Adds nothing to the token vectors."""
    def __init__(self, config: GPTConfig):
        super().__init__()

    def forward(self, positions):
        return 0.0

class Rotary(nn.Module):
    """Turns queries or keys (B, nh, T, hs) by the angles of the positions start, start + 1, ..."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        angles = clock_angles(config.block_size, config.n_embd // config.n_head)  # (.., hs / 2)
        cos, sin = angles.cos(), angles.sin()
        # Not stored in checkpoints, because they follow from the settings. (block_size, hs) each:
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1), persistent=False)

    def forward(self, x, start: int):
        T = x.shape[2]
        cos = self.cos[start : start + T].to(x.dtype)  # (T, hs)
        sin = self.sin[start : start + T].to(x.dtype)
        x1, x2 = x.chunk(2, dim=-1)  # (B, nh, T, hs / 2) each
        # Both lines of the equation at once: x1 cos - x2 sin, and x2 cos + x1 sin.
        return x * cos + torch.cat([x2, x1], dim=-1) * sin

POSITIONS["rope"] = NoPositions
ROTATIONS = {"rope": Rotary}  # by pos: what turns queries and keys

# Question 19  A query at position 5 and a key at position 3 have a score. Which score do the same
#              query and key have at the positions 105 and 103?

# ---- Activation functions ------------------------------------------------------------------------
# GELU      GELU(x) = x Phi(x), as in Part I. Part I has GPT-2's approximation of Phi by tanh.
#           Exactly, Phi(x) = (1 + erf(x / sqrt(2))) / 2, and PyTorch has the function erf
#           [Hendrycks and Gimpel 2016, section 2]. Other programs, such as nanoGPT, have the exact
#           form. The two forms differ by less than 0.0005.
# ReLU      max(0, x), as in the first Transformer. relu2 is its square [So et al. 2021, section
#           3.2]. Both are exactly 0 for every negative x.
# SwiGLU    silu(x W) * (x U) is a product of two linear functions, one of which passes through
#           silu(z) = z sigmoid(z) [Shazeer 2020, section 2]. One half scales the other, so it is
#           called a gate. W and U stand side by side in `c_fc`. There are three matrices now
#           instead of two, so the hidden layer is 2/3 as wide, for about the same number of
#           weights.
# Here      --activation relu: 2.266 ± 0.008. relu2: 2.316 ± 0.035. swiglu: 2.266 ± 0.018. The
#           differences are small. In full runs, relu2 is better than SwiGLU: see the chapter
#           "What did not help".
class ReLU(MLP):
    """An MLP with max(0, x)."""
    def activate(self, x):
        return F.relu(x)

class ExactGELU(MLP):
    """An MLP with GELU's own definition, of which Part I's form is an approximation."""
    def activate(self, x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

class SquaredReLU(MLP):
    """An MLP with max(0, x)^2."""
    def activate(self, x):
        return F.relu(x).square()

class SwiGLU(MLP):
    """An MLP whose hidden layer is a product of two halves, one of them through silu."""
    def __init__(self, config: GPTConfig):
        super().__init__(config)
        hidden = int(config.mlp_ratio * config.n_embd * 2 / 3)
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden, bias=config.bias)
        self.c_fc.parts = [hidden, hidden]  # W and U
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def activate(self, x):
        gate, up = x.chunk(2, dim=-1)  # (B, T, hidden) each
        return F.silu(gate) * up

ACTIVATIONS["gelu_erf"] = ExactGELU
ACTIVATIONS["relu"] = ReLU
ACTIVATIONS["relu2"] = SquaredReLU
ACTIVATIONS["swiglu"] = SwiGLU

# Question 20  With C = 128, how wide is the hidden layer of SwiGLU, and how many weights does its
#              MLP have?

# ---- An output head of its own -------------------------------------------------------------------
# Problem   With tied weights, one vector has to say both what a token means and what it follows.
#           Large models, whose tables are a small part of the whole, keep the two apart. The
#           setting tie_weights, which the class GPT reads, does that.
# Here      --no_tie_weights: 2.317 ± 0.021.

# ---- Token shift ---------------------------------------------------------------------------------
# Problem   The previous token matters everywhere, and attention needs a whole head to fetch it.
# Answer    Give each part half of its channels from the previous position: its input x_t becomes
#           (x_{t-1}[: C/2], x_t[C/2 :]) [Peng et al. 2023, RWKV, section 3.1.1, where the shares
#           are learned].
# Shapes    (B, T, C) -> (B, T, C)
# Here      --block shift: 1.827 ± 0.004, the largest gain of all. `laptop` does not have it,
#           because no other program can run such a model.
def shift(x, name: str, memory=None):
    """Takes the first half of the channels of (B, T, C) from the previous position.

    Before the first position there is zero, or what memory remembers under this name."""
    first, second = x.chunk(2, dim=-1)  # (B, T, C / 2) each
    previous = torch.zeros_like(first[:, :1])
    if memory is not None:
        previous = memory.previous.get(name, previous)
        memory.previous[name] = first[:, -1:]
    shifted = torch.cat([previous, first[:, :-1]], dim=1)
    return torch.cat([shifted, second], dim=-1)

class ShiftBlock(Block):
    """A pre-norm block whose parts see half of the previous position."""
    def forward(self, x, *memory):
        x = x + self.attn(shift(self.ln_1(x), "attn", *memory), *memory)
        x = x + self.mlp(shift(self.ln_2(x), "mlp", *memory))
        return x

BLOCKS["shift"] = ShiftBlock

# ---- Heads that read the previous position -------------------------------------------------------
# Problem   Token shift helps, but no other program can run it. Its gain may come from this: the
#           model always sees what the previous token was. Trained models often have a head that
#           looks almost only at the previous token. --mode inspect shows such heads. But an
#           ordinary head has to learn queries and keys for that.
# Answer    Give each attention an extra head without queries and keys, whose weight is always 1 on
#           the previous position. Its output is its value, shifted by one position. In the class
#           Attention, `c_prev` computes the values, `read_previous` shifts them, and `forward`
#           places them beside the other heads, so that c_proj has (nh + prev_heads) hs inputs. The
#           first position has none before it and reads itself. With prev_heads = 2, two such heads
#           read the same position, each with values of its own. Part IV builds an ordinary head
#           that does the same up to rounding. So other programs can run such a model, if its other
#           parts are those of Qwen3's form, as in `laptop`.
# Shapes    (B, T, C) -> (B, prev_heads, T, hs), joined to the other heads before c_proj
# Here      --prev_heads 1 --attention extended: 1.923 ± 0.006. Only token shift gains more.

# ---- Heads that share keys and values ------------------------------------------------------------
# Problem   A model that writes keeps the keys and values of all tokens (see "The key/value cache").
#           In large models with long contexts, they can take more memory than the weights.
# Answer    Grouped-query attention: several heads share one key head and one value head, and only
#           their queries differ [Ainslie et al. 2023, section 2.2]. With n_head = 4 and
#           n_kv_head = 2, heads 0 and 1 share the first key and value, heads 2 and 3 the second.
#           With n_kv_head = 1, all heads share one [Shazeer 2019]. In the class Attention, c_attn
#           then has fewer outputs, and `heads` repeats keys and values, after they were kept.
# Shapes    k, v (B, n_kv_head, T, hs) -> (B, nh, T, hs)
# Here      --n_kv_head 2 --attention extended: 2.288 ± 0.004, and --n_kv_head 1: 2.262 ± 0.025.
#           With one, the model has 12 % fewer parameters, and no loss that three seeds can show.

# ---- Attention that can do more ------------------------------------------------------------------
# Problem   Part I's attention has no place for RoPE. And as training goes on, queries and keys may
#           grow until the softmax puts all its weight on one token.
# QK-norm   Normalize each query and each key over its hs channels, before they are rotated, with
#           the norm of the setting `norm` [Henry et al. 2020, section 2.2, who divide by the length
#           and then learn a factor]. All heads share the gains. Each query and key then has the
#           length sqrt(hs). So a dot product is at most hs, and a scaled score at most sqrt(hs),
#           before the learned gains.
# Memory    When a text is written, earlier keys and values need not be computed again. The chapter
#           "The key/value cache" explains `memory`. In training it is not used.
# Here      --qk_norm --attention extended: 2.341 ± 0.022. In this comparison it is worse.
#           `laptop` has it all the same, because other programs read `laptop` in Qwen3's form,
#           and Qwen3 has QK-norm.
class Attention(CausalSelfAttention):
    """Part I's attention, whose queries and keys may be normalized, rotated and remembered.

    Later chapters explain `memory`, `prev_heads` and `group`, which are off by default."""
    def __init__(self, config: GPTConfig):
        super().__init__(config)
        hs = self.head_size
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = NORMS[config.norm](hs, config)
            self.k_norm = NORMS[config.norm](hs, config)
        self.rotates = config.pos in ROTATIONS
        if self.rotates:
            self.rotary = ROTATIONS[config.pos](config)
        self.prev_heads = config.prev_heads
        if config.prev_heads:  # the chapter "Heads that read the previous position"
            width = config.prev_heads * hs
            self.c_prev = nn.Linear(config.n_embd, width, bias=config.bias)
            self.c_proj = nn.Linear(config.n_embd + width, config.n_embd, bias=config.bias)
        self.group = config.n_head // config.kv_heads  # how many heads share a key and a value
        if self.group > 1:  # the chapter "Heads that share keys and values"
            shared = config.kv_heads * hs
            self.c_attn = nn.Linear(config.n_embd, config.n_embd + 2 * shared, bias=config.bias)
            self.c_attn.parts = [config.n_embd, shared, shared]

    def forward(self, x, memory=None):
        """memory is a LayerMemory, which holds the keys and values of earlier tokens, or None."""
        y = self.attend(*self.heads(x, memory))
        if self.prev_heads:
            y = torch.cat([y, self.read_previous(x, memory)], dim=1)  # (B, nh + prev_heads, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def heads(self, x, memory=None):
        """(B, T, C) -> q (B, nh, T, hs) of these tokens, k and v (B, nh, S, hs) of all so far."""
        q, k, v = self.c_attn(x).split(self.c_attn.parts, dim=-1)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            start = 0 if memory is None else memory.length  # the position of the first token
            q, k = self.rotary(q, start), self.rotary(k, start)
        if memory is not None:
            k, v = memory.append(k, v)
        if self.group > 1:  # (B, n_kv_head, S, hs) -> (B, nh, S, hs)
            k, v = k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)
        return q, k, v

    def attend(self, q, k, v):
        """softmax(Q K^T / sqrt(hs) + mask) V: (B, nh, T, hs)."""
        return self.attn_dropout(self.weights(q, k)) @ v

    def weights(self, q, k):
        """q (B, nh, T, hs) of the last T tokens, k (B, nh, S, hs) of all S: (B, nh, T, S)."""
        return attention_weights(q, k, self.mask(q.shape[2], k.shape[2], q.device))

    def mask(self, T: int, S: int, device):
        """What is added to the scores of the last T of S tokens: the end of causal_mask(S)."""
        return torch.full((T, S), -math.inf, device=device).triu(diagonal=1 + S - T)

    def read_previous(self, x, memory=None):
        """The values of the previous position: (B, T, C) -> (B, prev_heads, T, hs)."""
        v = self.c_prev(x)  # (B, T, prev_heads hs)
        before = v[:, :1]  # the first position has none before it, and reads itself
        if memory is not None:
            before = memory.previous.get("values", before)
            memory.previous["values"] = v[:, -1:]
        return self.split_heads(torch.cat([before, v[:, :-1]], dim=1))

ATTENTION["extended"] = Attention

# ---- Byte-pair encoding --------------------------------------------------------------------------
# Problem   Characters make long sequences: "the" takes three steps of the model. Whole words make
#           short ones, but a new text contains words that are not in the vocabulary.
# Answer    Begin with the 256 bytes, of which every text in UTF-8 consists. Find the pair of
#           neighbours that occurs most often, make it a new token, and repeat until the vocabulary
#           is full [Sennrich et al. 2016, section 3.2; with bytes: Radford et al. 2019, section
#           2.2]. Frequent words become one token, rare words a few tokens, and nothing is unknown.
# Example   In "aaabdaaabac", `aa` occurs most often. It becomes token X: "XabdXabac". Then `ab`
#           becomes Y: "XYdXYac". Then `XY` becomes Z: "ZdZac". Eleven tokens have become five. The
#           next two functions are the training. To encode a text, the merges are applied in the
#           order in which they were learned.
def merge_pair(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replaces each occurrence of a pair of neighbours, from left to right, by the id new.

    >>> merge_pair([1, 1, 1, 2], (1, 1), 9)
    [9, 1, 2]
    """
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged

def learn_merges_slowly(words: list[list[int]], n_merges: int) -> list[tuple[int, int]]:
    """The pairs to merge, in order. The first one becomes id 256, the next 257, and so on.

    Among pairs that occur equally often, the one with the smaller ids wins.

    >>> words = [list("aaabdaaabac".encode())]         # bytes: a is 97, b is 98
    >>> learn_merges_slowly(words, 3)
    [(97, 97), (97, 98), (256, 257)]
    """
    merges = []
    while len(merges) < n_merges:
        counts = collections.Counter()
        for word in words:
            counts.update(zip(word, word[1:]))
        pair = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if pair is None or counts[pair] < 2:
            break
        words = [merge_pair(word, pair, 256 + len(merges)) for word in words]
        merges.append(pair)
    return merges

# To encode a new text, apply the merges in the order in which they were learned. To decode, put the
# bytes of the tokens together.
#
# Words     Merges should not cross the boundaries of words; otherwise "dog." and "dog!" could
#           each become a token of their own. GPT-2 first splits the text by a regular expression
#           into runs of letters, of digits, and of punctuation. A space belongs to the word that it
#           precedes.

# Question 21  Which merges does "abababab" give?

# ---- Muon ----------------------------------------------------------------------------------------
# Problem   AdamW treats a matrix as a list of unrelated numbers. But a matrix maps vectors to
#           vectors. A gradient usually has a few directions in which it is strong and many in which
#           it is weak. With the gradient [[10, 0], [0, 0.1]], a step changes the first channel a
#           hundred times as much as the second.
# SVD       Every matrix can be written as U S V^T, its singular value decomposition: V^T turns the
#           input, the diagonal matrix S stretches each direction by its singular value, and U turns
#           the result. U and V are orthogonal: they turn (or mirror), but do not stretch.
# Answer    Make all directions equally strong: leave out S. The gradient of the example becomes
#           [[1, 0], [0, 1]].
# Equation  M = momentum M + (1 - momentum) G       the running mean of the gradient G of a matrix
#           N = (1 - momentum) G + momentum M       a look ahead (Nesterov), with the new M
#           U S V^T = N                             the decomposition of N
#           W = W - lr (0.2 sqrt(max(rows, columns)) U V^T + weight_decay W)
#           [Jordan 2024. The factor gives the numbers of a step about the size that AdamW's have,
#           so one learning rate serves both: Liu et al. 2025, section 2.2.]
# Parts     c_attn holds three matrices that do different things, so U V^T is computed for each of
#           them (and for each of the two in the c_fc of SwiGLU). A matrix with more rows than
#           columns is transposed first. Matrices of one shape are processed together, in bfloat16
#           if the run uses it.
# The rest  Gains and biases are not matrices. In the token table and the position table, each row
#           belongs to one token or position, so there is nothing to turn. They stay with AdamW, and
#           so does an output head of its own.
# Settings  `momentum` is a setting of RunConfig; `laptop` has a smaller one.
# Here      --optimizer muon: 2.050 ± 0.012. `laptop` also lets the learning rate fall in a straight
#           line to 0 (`straight_line` below). With AdamW, --schedule linear gives 2.259 ± 0.010.
def orthogonalize(G):
    """U V^T, approximately, for each matrix G = U S V^T of a stack (n, rows, columns).

    rows must be at most columns, so that X X^T is the smaller of the two squares. Each round takes
    every singular value s to a s + b s^3 + c s^5 and leaves U and V alone. With these constants
    [Jordan 2024], a small s more than triples in each round and none gets far above 1. After five
    rounds, all that were at least 0.01 after the division by the norm are between 0.68 and 1.14,
    which is near enough to 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)  # now no singular value is above 1
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X

class Muon(torch.optim.AdamW):
    """AdamW, except for the last group, whose matrices take Muon's steps.

    That group has a list `parts`: the numbers of rows of the matrices that each weight stacks."""
    def __init__(self, groups, dtype=torch.float32, **options):
        super().__init__(groups, **options)
        self.dtype = dtype  # of the matrix products

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[-1]
        stacks = collections.defaultdict(list)  # by shape: matrices and their updates
        for p, parts in zip(group["params"], group["parts"]):
            if p.grad is None:
                continue
            update = self.look_ahead(p, group["momentum"])
            p.grad = None  # so that AdamW leaves it alone
            for w, u in zip(p.split(parts), update.split(parts)):
                if w.shape[0] > w.shape[1]:
                    w, u = w.mT, u.mT  # views: writing to w writes to p
                stacks[w.shape].append((w, u))
        for stack in stacks.values():  # matrices of one shape together, which is faster
            self.apply(stack, group)
        super().step()

    def look_ahead(self, p, momentum: float):
        """Updates the running mean M of a weight's gradient. Returns N."""
        if p not in self.state:
            # AdamW's load_state_dict expects a "step"; Muon does not use it.
            self.state[p] = {"mean": torch.zeros_like(p), "step": torch.tensor(0.0)}
        mean = self.state[p]["mean"]
        mean.lerp_(p.grad, 1 - momentum)  # lerp: a mean of two tensors, with this weight
        return p.grad.lerp(mean, momentum)

    def apply(self, stack: list, group: dict) -> None:
        """Takes Muon's step for matrices of one shape."""
        updates = torch.stack([u for _, u in stack]).to(self.dtype)
        updates = orthogonalize(updates)
        size = group["lr"] * 0.2 * math.sqrt(updates.shape[2])
        for (w, _), update in zip(stack, updates):
            w.mul_(1 - group["lr"] * group["weight_decay"])
            w.sub_(update * size)

def make_muon(model: nn.Module, config: RunConfig) -> Muon:
    """Muon for the matrices in the blocks, AdamW for everything else."""
    matrices = {}
    for layer in model.h.modules() if isinstance(model, GPT) else []:
        if isinstance(layer, nn.Linear):
            matrices[layer.weight] = getattr(layer, "parts", [layer.out_features])
    groups = weight_groups(model, config)
    groups[0]["params"] = [p for p in groups[0]["params"] if p not in matrices]
    groups.append({"params": list(matrices), "parts": list(matrices.values()),
                   "momentum": config.momentum, "weight_decay": config.weight_decay})
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return Muon(groups, dtype, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                fused=True)

def straight_line(r: float) -> float:
    """From 1 to 0 as r goes from 0 to 1."""
    return 1 - r

OPTIMIZERS["muon"] = make_muon
SCHEDULES["linear"] = straight_line

# Question 22  What are the singular values of orthogonalize(G), and of orthogonalize(100 G)?

# ---- Better batches ------------------------------------------------------------------------------
# Problem   Random windows leave gaps: with as many draws as would cover a text three times, 5 % of
#           it is never seen, and some of it eight times.
# Even      Place the windows at (i g + offset) mod 1 of the text, for i = 0, 1, 2, ..., where g is
#           the golden ratio. Each falls into one of the largest gaps that the earlier ones have
#           left [Weyl 1916; Knuth 1998, section 6.4]. Here i counts the windows as if every step so
#           far had had windows of the same size, and the offset comes from the seed.
# Example   i = 0, 1, 2, 3, 4 with offset 0: 0, 0.62, 0.24, 0.85, 0.47 of the text.
# Short     A longer window has more to look back at, but attention compares every position with all
#           earlier ones, so it costs more. At first, a model learns what the last few characters
#           tell. So the first short_share of the steps take windows of at most short_block tokens,
#           and more of them, so that a step has about as many tokens. The other steps take whole
#           windows, with an offset of their own. (Both are settings of RunConfig. In `laptop`,
#           short_share is 0.7 and short_block is 128, so a window of 512 becomes four.)
# Here      --sampling even: 2.278 ± 0.019, no difference in so few steps. In the full runs of the
#           chapter "What it all adds up to", it brings 0.02.
def even_windows(run: Run) -> list:
    """The size of the next step's windows, and where they begin, for each of its batches. They
    cover the text evenly. The settings of the run are a RunConfig."""
    config, block_size = run.config, run.model.config.block_size
    short = run.step < config.short_share * config.max_steps
    pieces = math.ceil(block_size / config.short_block) if short else 1  # made of a whole window
    T, B = block_size // pieces, config.batch_size * pieces
    # From 0 to 1. The -1 keeps this seed apart from those of the steps.
    offset = derived_seed(config.seed, -1, short) / 2**32
    golden_ratio = (math.sqrt(5) - 1) / 2  # minus 1: only the fraction matters
    first = run.step * config.grad_accum  # the number of the first batch, among all of the run
    windows = []
    for number in range(first, first + config.grad_accum):
        i = torch.arange(number * B, (number + 1) * B).double()
        share = (i * golden_ratio + offset) % 1  # (B,)
        starts = (share * (len(run.corpus.train) - T)).long()
        windows.append((T, starts))
    return windows

SAMPLING["even"] = even_windows

# ---- Training at a lower temperature -------------------------------------------------------------
# Problem   A model that reads the same text several times becomes too sure of itself. In a run of
#           `laptop` without this chapter (seed 51), there were 12,122 characters of the validation
#           part for which the likeliest character had a probability between 0.90 and 0.97, 0.94 on
#           average. Only 90.2 % of them were right.
# Answer    After training, one can divide all logits by a temperature above 1, which makes all
#           probabilities more equal [Guo et al. 2017, section 4.2]. The same effect is possible
#           without changing the trained model: in training, divide the logits by a temperature
#           below 1. The division makes the probabilities sharper, so the model learns smaller
#           logits. Used without the division, they give probabilities that are more equal.
# Equation  loss = -ln softmax(z / tau)[target]   z: the logits. In training only; otherwise tau =
#           1. tau is the setting `train_temperature` of RunConfig.
# Example   Logits (2, 1, 0) give the probabilities 0.70, 0.23, 0.08 at the temperature 0.9, and
#           0.67, 0.24, 0.09 at the temperature 1.
# Where     train_step is unchanged. The run passes it a Tempered in place of the model. The loss of
#           a step that a run prints is the one at the temperature tau. All evaluations are at the
#           temperature 1.
# Here      `laptop` has tau = 0.9. To choose it, we trained the same model on nine tenths of the
#           training part. On the last tenth, which it had not seen, its loss was 1.403. With its
#           logits divided by 1.05, 1.1, 1.15 and 1.2, it was 1.398, 1.396, 1.397 and 1.400. So the
#           best divisor is about 1.1, and training at 0.9 amounts to a divisor of 1 / 0.9 = 1.11.
class Tempered(nn.Module):
    """A model whose loss is that of its logits divided by a temperature."""
    def __init__(self, model, temperature: float):
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, x, y):
        logits, _ = self.model(x)
        return logits, cross_entropy(logits.float() / self.temperature, y)

# ---- Learning from other models ------------------------------------------------------------------
# Problem   The text shows one next token at each place, although others could have stood there.
#           After `the k`, the text goes on with `i` once and with `n` another time. A model that
#           reads the same text several times learns by heart which one came where.
# Answer    First train some models in the ordinary way. They are the teachers. Applied to the
#           training text, they give every token a probability at every position. Then train a new
#           model, the student, from random weights. Half of its loss is that of the token that
#           came. The other half is the mean loss if the next token were drawn from the teachers'
#           probabilities [Hinton et al. 2015, section 2]. A student of the same size becomes better
#           than its teachers [Furlanello et al. 2018].
# Equation  loss = (1 - a) (-ln q[target]) + a (-sum_i p_i ln q_i)      a = 0.5
#           q: the student's probabilities (V,). p: the mean of the teachers' probabilities (V,).
# Why       The probabilities of the tokens that did not come are knowledge, too: that after `the k`
#           an `n` is possible and a `t` is not. Hinton called it dark knowledge, because a model
#           that only names its first choice does not show it. In one reading of the text, the
#           student gets V numbers at each position instead of one token. And what the teachers
#           expect is the same at each reading, so there is less to learn by heart.
# Example   The tokens are a, b and c, and an a came. The student gives them 0.5, 0.25 and 0.25, and
#           the teachers 0.6, 0.3 and 0.1. The loss of the token that came is -ln 0.5 = 0.693. The
#           other half is -(0.6 ln 0.5 + 0.3 ln 0.25 + 0.1 ln 0.25) = 0.970. Their mean is 0.832:
#
# >>> z = torch.tensor([[0.5, 0.25, 0.25]]).log()
# >>> round(taught_loss(z, torch.tensor([0]), torch.tensor([[0.6, 0.3, 0.1]])).item(), 3)
# 0.832
#
# Table     The teachers do not change. So they are applied to the text only once, and the student's
#           steps look their probabilities up by position: a table (N, V) of 16-bit numbers, which
#           has 130 MB for Tiny Shakespeare. The windows of the teachers overlap by half, so that
#           every position has at least half a window before it (except at the start of the text). A
#           table of more than TABLE_BYTES is not made. Then each step applies the teachers to its
#           own windows, which takes longer.
# Here      Nats per character on the full validation split, and the seconds of the whole command
#           (`laptop`; one run each, so differences below 0.01 mean little):
#
#               teachers   steps of the student   loss     seconds
#               none       2,000                  1.4247       188
#               none       4,000                  1.4011       452
#               one        2,500                  1.3931       460
#               three      4,000                  1.3753     1,103
#
#           The three teachers end at 1.4275, 1.4264 and 1.4210. The README has a wider student.
# Wider     A wider model learns the text by heart sooner, so it needs a teacher even more. With 192
#           channels and no teacher, 3,000 steps ended at 1.377, and 2,000 steps at 1.373. (These
#           are two seeds, on the last tenth of the training part, which was left out of the
#           training.) A teacher does not prevent it altogether. One with 192 channels (1.3568)
#           taught a student of 256 channels, whose best step of 9,000 was step 7,250, with 1.3657.
TEACHING_SHARE = 0.5  # a
TABLE_BYTES = 2e9

def taught_loss(logits, targets, p):
    """The loss of the targets and that of the teachers' probabilities, mixed: logits (..., V),
    targets (...), p (..., V) -> ()."""
    expected = -(p * logits.log_softmax(dim=-1)).sum(dim=-1)  # (...)
    a = TEACHING_SHARE
    return (1 - a) * cross_entropy(logits, targets) + a * expected.mean()

class Teachers:
    """What finished models expect at each position of a text. taught_by says where they are from;
    it goes into the student's checkpoints."""
    def __init__(self, models: list, tokens, taught_by=()):
        self.models = models
        self.tokens = tokens  # (N,)
        self.taught_by = taught_by
        self.table = None  # (N, V)

    @torch.no_grad()
    def read(self, progress) -> None:
        """Makes the table, if it is small enough. progress is called with the share that is done.

        Row i holds the probabilities of the token at position i. Row 0 is never used."""
        N, V = len(self.tokens), self.models[0].config.vocab_size
        if 2 * N * V > TABLE_BYTES:
            return
        self.table = torch.zeros(N, V, dtype=torch.float16)
        for number, model in enumerate(self.models):
            T = min(model.config.block_size, N - 1)
            last, step = N - 1 - T, max(T // 2, 1)
            starts = torch.tensor([*range(0, last, step), last])
            done = 1  # rows
            for some in starts.split(16):
                x, _ = cut_windows(self.tokens, T, some)
                logits, _ = model(x)
                p = logits.float().softmax(dim=-1).cpu()  # (B, T, V)
                p = p / len(self.models)
                for start, rows in zip(some.tolist(), p):  # rows start + 1 to start + T
                    self.table[done : start + 1 + T] += rows[done - start - 1 :]
                    done = start + 1 + T
                progress((number + done / N) / len(self.models))

    @torch.no_grad()
    def probabilities(self, x, target_places):
        """Of the targets of x (B, T), which are at these positions (B, T): (B, T, V)."""
        if self.table is not None:
            return self.table[target_places].float()
        found = []
        for model in self.models:
            parts = x.split(model.config.block_size, dim=1)  # its window may be shorter
            logits = torch.cat([model(part)[0] for part in parts], dim=1)  # (B, T, V)
            found.append(logits.float().softmax(dim=-1))
        return torch.stack(found).mean(dim=0)

class Taught(nn.Module):
    """A model that learns from teachers, too. In place of x and y, it gets their positions."""
    def __init__(self, model, teachers: Teachers, temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.teachers = teachers
        self.temperature = temperature

    def forward(self, places, target_places):
        x = self.teachers.tokens[places].long()  # (B, T)
        y = self.teachers.tokens[target_places].long()
        logits, _ = self.model(x)
        p = self.teachers.probabilities(x, target_places).to(logits.device)  # (B, T, V)
        return logits, taught_loss(logits.float() / self.temperature, y, p)

# ---- Fused kernels -------------------------------------------------------------------------------
# Problem   Written out, each operation reads its operands from memory and writes its result back,
#           and attention stores T x T weights for each head.
# Answer    A fused kernel is one compiled routine that does several operations at once. Attention
#           can be computed without ever storing the matrix of weights [Dao et al. 2022, section 3].
# Here      --attention fused --norm fused_layernorm compute the same function as their originals.
#           In the table of "What it all adds up to", `plain` takes 1.2 times as many steps in the
#           same time with both, and without biases. (On a CPU in bfloat16, the fused attention has
#           no part in this: see below.)
# Compile   torch.compile writes such kernels itself, for everything between the matrix products.
#           --compile takes about a minute on two cores and needs a C++ compiler. After that,
#           `laptop` took 72 ms for a step in place of 96 with windows of 128, and 93 in place of
#           111 with windows of 512. So it pays in runs of more than about 3,000 steps.
class FusedAttention(Attention):
    """The same function as Attention, computed by one kernel."""
    def attend(self, q, k, v):
        # Subtle: on a CPU in bfloat16, the backward pass of the kernel is slower than ours.
        if self.training and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            return super().attend(q, k, v)
        T, S = q.shape[2], k.shape[2]
        dropout = self.attn_dropout.p if self.training else 0.0
        # Subtle: is_causal would align the mask with the first key instead of the last.
        mask = self.mask(T, S, q.device).to(q.dtype) if 1 < T < S else None  # one query sees all
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                              is_causal=T == S)

class FusedLayerNorm(LayerNorm):
    """The same function as LayerNorm, computed by one kernel."""
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

def fused_layer_norm(n: int, config: GPTConfig) -> FusedLayerNorm:
    """A FusedLayerNorm of n channels."""
    return FusedLayerNorm(n, config.bias)

ATTENTION["fused"] = FusedAttention
NORMS["fused_layernorm"] = fused_layer_norm

# ---- The key/value cache -------------------------------------------------------------------------
# Problem   To draw the 100th token, read_window reads the 99 tokens before it. It read 98 of them
#           a moment ago. No position sees a later one, so nothing about them has changed.
# Answer    Keep what later tokens need of earlier ones: their keys and values, in every layer. The
#           prompt goes through the model as a whole ("prefill"). After that, each new token goes
#           through alone ("decode"): its query meets the keys that were kept.
#
#               prefill   t  o  _  b  e      5 go in, the keys and values of 5 are kept
#               decode                  _    1 goes in, those of 6 are kept
#               decode                  o    1 goes in, those of 7 are kept, ...
#
# Cost      Each pass handles one token instead of up to block_size. In a large model, most of the
#           time then goes into reading the weights from memory. They are read once for all texts
#           that are written side by side, so several texts cost little more than one.
# Here      With fused attention, a model of the size of `plain` writes 1,548 tokens per second with
#           the cache and 475 without it (--mode bench --preset plain --attention fused --norm
#           fused_layernorm).
# Shapes    keys and values of each layer: (B, nh, S, hs), where S grows up to block_size
class LayerMemory:
    """What one block remembers of the tokens that it has read."""
    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0  # how many tokens are remembered
        self.keys = self.values = None  # (B, nh, capacity, hs) once the first token has come
        self.previous = {}  # what token shift and previous-position heads need of the last position

    def append(self, k, v):
        """Adds keys and values (B, nh, T, hs). Returns those of all tokens so far."""
        if self.keys is None:
            B, nh, _, hs = k.shape
            self.keys = k.new_empty(B, nh, self.capacity, hs)
            self.values = v.new_empty(B, nh, self.capacity, hs)
        T = k.shape[2]
        self.keys.narrow(2, self.length, T).copy_(k)  # narrow: T entries of dimension 2
        self.values.narrow(2, self.length, T).copy_(v)
        self.length += T
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

# Window    When a text outgrows block_size, the window has to move. Learned positions then change
#           for every token. With RoPE, only differences of positions count. But above the first
#           layer, the kept keys and values were computed from tokens that the window no longer
#           has. So it must be read again. Part I moves the window by one token each time, and reads
#           all of it each time. When the window of this reader is full, it drops the older half,
#           reads the newer half again, and then has room for block_size / 2 more tokens. So from
#           there on, the two write different texts. (remember=False, which is --no_cache, reads the
#           same windows as the cache.) A prompt that is too long is cut to its last block_size
#           tokens.
class CachedReader:
    """A reader that reads each token once, as long as the window need not move.

    With remember=False it reads the same windows without keeping anything, to compare."""
    def __init__(self, model, remember: bool = True):
        self.model = model.eval()
        self.remember = remember
        self.n_read = 0  # tokens of the text
        self.window = torch.zeros(1, 0, dtype=torch.long)  # those that the memory holds
        self.forget()

    def __call__(self, idx):
        """Takes a text (B, T) that begins with what was read before; returns logits (B, V)."""
        new = idx[:, self.n_read :]
        self.n_read = idx.shape[1]
        return self.read(new)

    def forget(self) -> None:
        """Empties the memory of all layers."""
        capacity = self.model.config.block_size
        self.memory = [LayerMemory(capacity) for _ in self.model.h]

    @torch.inference_mode()  # like no_grad, with less bookkeeping for each operation
    def read(self, new):
        """Takes the tokens (B, n) that follow those already read; returns logits (B, V).

        Subtle: inference mode returns tensors that cannot be changed in place outside of it."""
        new = new.cpu()
        block_size = self.model.config.block_size
        window = torch.cat([self.window.expand(len(new), -1), new], dim=1)
        moved = window.shape[1] > block_size
        if moved:
            keep = block_size if self.window.shape[1] == 0 else max(block_size // 2, 1)
            window = window[:, -keep:]
        if moved or not self.remember:
            new = window
            self.forget()
        self.window = window
        start = self.memory[0].length
        x = self.model.embed(new, torch.arange(start, start + new.shape[1]))  # (B, n, C)
        for block, memory in zip(self.model.h, self.memory):
            x = block(x, memory)
        # Only the last position predicts a token that we do not have yet.
        last = self.model.ln_f(x[:, -1:])
        return self.model.lm_head(last)[:, -1].float().cpu()

READERS[Attention] = CachedReader

# Question 23  How many numbers does the cache of `laptop` hold when its window is full?

# ---- The settings of the variations --------------------------------------------------------------
# Part I looked up each part of the model in a table, under a fixed name. Here the names become
# settings, and flags. Most are keys of a table. The chapters above explain them. (Some settings of
# RunConfig belong to Part III.)
@dataclass
class ModelConfig(GPTConfig):
    """GPTConfig, with a field for each variation. Raises UserError if two of them do not fit."""
    model: str = "gpt"  # the GPT, or the bigram baseline
    block: str = "pre"  # how a block combines its parts
    attention: str = "explicit"  # Part I's attention, an extended form, or a fused kernel
    pos: str = "learned"  # how the model knows positions
    norm: str = "layernorm"  # the kind of normalization
    activation: str = "gelu"  # the activation function of the MLP
    tie_weights: bool = True  # whether the token table is also the output head
    qk_norm: bool = False  # whether queries and keys are normalized
    norm_scale: bool = True  # whether RMSNorm has a gain that is learned
    prev_heads: int = 0  # heads of each attention that always read the previous position
    n_kv_head: int | None = None  # key/value heads, shared by the n_head query heads

    def __post_init__(self):
        super().__post_init__()
        if not self.norm_scale and self.norm != "rmsnorm":
            raise UserError("--no_norm_scale: needs --norm rmsnorm")
        if self.n_head % self.kv_heads:
            raise UserError(f"--n_kv_head {self.n_kv_head}: must divide --n_head {self.n_head}")
        if not issubclass(ATTENTION[self.attention], Attention):
            able = " or ".join(key for key in ATTENTION if issubclass(ATTENTION[key], Attention))
            for flag, needed in ((f"--pos {self.pos}", self.pos in ROTATIONS),
                                 ("--qk_norm", self.qk_norm),
                                 (f"--prev_heads {self.prev_heads}", self.prev_heads),
                                 (f"--n_kv_head {self.n_kv_head}", self.n_kv_head)):
                if needed:
                    raise UserError(f"{flag}: needs --attention {able}")

    @property
    def kv_heads(self) -> int:
        """How many heads have keys and values."""
        return self.n_kv_head or self.n_head

@dataclass
class RunConfig(TrainConfig):
    """TrainConfig, with the settings of Parts II and III. Raises UserError if two do not fit."""
    preset: str = "auto"  # the named set of settings that the run starts from
    teachers: int = 0  # models to train first, from which this one learns, too
    init_from: str = ""  # train: begin with the weights of this .pt file or folder
    tokenizer: str = "char"  # what a token is
    bpe_size: int = 1024  # size of the vocabulary with --tokenizer bpe; smaller for a small text
    sampling: str = "random"  # where the windows of a batch are
    short_share: float = 0.0  # share of the steps, from the first, with short windows
    short_block: int = 128  # the most tokens in a short window
    train_temperature: float = 1.0  # divides the logits in training; below 1: a model less sure
    optimizer: str = "adamw"  # how a gradient becomes a step
    schedule: str = "cosine"  # how the learning rate falls
    momentum: float = 0.95  # Muon: how much of the old mean of the gradient is kept
    dtype: str = "auto"  # number format of the matrix products
    compile: bool = False  # use torch.compile: it takes a minute at first, and then runs faster
    wandb: bool = True  # log to Weights & Biases, after `wandb login`

    def __post_init__(self):
        super().__post_init__()
        if self.short_share and self.sampling != "even":
            raise UserError(f"--short_share {self.short_share}: needs --sampling even; or type "
                            "--short_share 0")

# ---- A variation of your own ---------------------------------------------------------------------
# If you add an entry to one of these tables, its key becomes a value of the flag that belongs to
# the table. The key is stored in checkpoints, and --mode ablate can compare it with others. This is
# how the entries are called, and what they return:
#
#     ACTIVATIONS[key](config)       a module (B, T, C) -> (B, T, C), usually a subclass of MLP
#     ATTENTION[key](config)         the same; here the entry must be a class. A subclass of
#                                    Attention has RoPE and the cache
#     READERS[class](model)          a function from a text (B, T) to the logits (B, V) of the next
#                                    token, by the class of the attention
#     BLOCKS[key](config)            the same, usually a subclass of Block. Its forward(x, *memory)
#                                    passes memory on to the attention
#     NORMS[key](n, config)          a module for n channels
#     POSITIONS[key](config)         a module: positions (T,) -> vectors (T, C), or 0.0
#     ROTATIONS[key](config)         for a key that POSITIONS has, too: a module that takes queries
#                                    or keys (B, nh, T, hs) and their first position, and turns them
#     OPTIMIZERS[key](model, config) an optimizer
#     SCHEDULES[key](r)              from 1 to 0 as r goes from 0 to 1
#     SAMPLING[key](run)             grad_accum pairs of the size of the next step's windows, and
#                                    the positions (B,) where they begin
#
# A term that is added to the attention scores, such as ALiBi [Press et al. 2022], belongs in the
# method `mask` of a subclass of Attention (not of FusedAttention, which does not always call
# `mask`).

# ---- From GPT-2 to Qwen3 -------------------------------------------------------------------------
# The chapters above contain the main differences between Part I and Qwen3 [Yang et al. 2025], an
# open model of today: RMSNorm instead of LayerNorm, RoPE instead of learned positions, QK-norm,
# heads that share keys and values, SwiGLU instead of GELU, and no biases. These settings build such
# a model:
#
# >>> qwen3 = ModelConfig(65, block_size=128, n_layer=4, n_head=4, n_embd=128, bias=False,
# ...     norm="rmsnorm", pos="rope", attention="fused", qk_norm=True, activation="swiglu",
# ...     n_kv_head=2)
# >>> count_parameters(GPT(qwen3))
# 730112
#
# Part IV writes models of both forms, GPT-2's and Qwen3's, so that other programs can run them.

# ---- What it all adds up to ----------------------------------------------------------------------
# Which of these variations are worth their time? From `plain` to `laptop`: each row adds the
# changes that it names to the row before. Every row gets the same training time, 151 s on two cores
# at their fastest (evaluations not counted). So a model with slower steps takes fewer of them. The
# figures are nats per character on the full validation split, mean and standard deviation over the
# seeds 1337 and 1338. This command makes the table again: python .ci/ladder.py --seeds 2
#
#     plain                                  1,745 steps    1.650 ± 0.002
#     fused kernels, no biases               2,147          1.620 ± 0.008
#     RoPE                                   2,332          1.550 ± 0.006
#     squared ReLU, QK-norm, two heads       2,662          1.542 ± 0.004
#     Muon, learning rate linear to 0        2,337          1.482 ± 0.010
#     even windows                           2,337          1.458 ± 0.001
#     windows of 128, then of 512            2,086          1.448 ± 0.003
#     a previous-position head               1,920          1.439 ± 0.006
#     training at temperature 0.9: `laptop`  1,920          1.429 ± 0.001
#
# RoPE and Muon bring more than half of the gain. (`laptop` keeps LayerNorm without bias, which an
# export turns into RMSNorm.) The numbers of steps are uncertain by up to a tenth, because the
# machine's speed varies: RoPE, for instance, cannot make a step faster. With two seeds, a gain of
# 0.01 alone says little. The order of the rows matters, too. The preset itself takes 2,000 steps.
# With the seeds 81, 82 and 83, which were never looked at before, it ends at 1.427 ± 0.001. (The
# settings were chosen by the same validation part, so this figure is a little too good. The corpus
# has no third part.) Its settings are those of PRESETS["laptop"], in Part V. The command adds one
# more row, in its own time: a model that learns from three teachers. The preset with three teachers
# and 4,000 steps ends at 1.375 (one run, seed 91).

# ---- What did not help ---------------------------------------------------------------------------
# Much of what is known about training was found on texts that are read once. Here, the text is read
# about four times. A trick that makes a model learn faster may then make it memorize faster.
#
# We tried some forty changes of `laptop`, most of them with two seeds. Two runs that differ in the
# seed alone may differ by 0.01, so smaller differences mean nothing. What we found:
#
# What helps most is to see the tokens just before, in whatever form: a previous-position head,
# token shift, or a learned convolution over four positions each gain about 0.02 at equal steps. A
# second such form gains little or nothing. To train also on a second target, the token after the
# next, gains 0.01 beside token shift and nothing beside a previous-position head. A learned vector
# for each group of three characters is 0.016 better than token shift alone after 700 steps, and
# 0.057 worse at the end: each of these vectors belongs to a few places of the text, which it learns
# by heart. More width gains more than more layers, and costs more time. Everything that is meant to
# prevent memorizing, dropout of 0.05, label smoothing [Szegedy et al. 2016], replaced input tokens
# or cautious weight decay [Chen et al. 2025], makes the result worse or changes nothing. Longer
# windows, averaged weights, c_proj that starts at zero, and twice the weight decay change less than
# 0.005.
#
#     `laptop` without its previous-position head                             1.445
#     a previous-position head                                                1.427
#     token shift                                                             1.427
#     160 channels and token shift, 1.35 times the time                       1.414
#     a vector for each group of three characters, and token shift            1.484
#     SwiGLU in place of squared ReLU                                         1.456
#     5 % of the input tokens replaced by random ones, and token shift        1.460
#     dropout of 0.05 (one seed, another form of `laptop`)                    +0.02
#
# (2,200 steps at temperature 1, mean of two seeds. Each row names all its changes to the first
# row.)
#
# Where does the context matter? In a `laptop`, the loss at the first position of a window is 2.50,
# nearly that of the bigram model, which also sees one token only. It falls to 1.50 at positions 8
# to 15 and to 1.44 at 32 to 63. Later positions are hardly better: 1.43 on average.

# You can stop here. You have read how these models work and how they are trained. The answers to
# the questions follow. After them comes the program around the model: devices, files, commands, and
# the exchange with other programs, for those who want to change it.

# ---- Answers to the questions --------------------------------------------------------------------
# 1.  `encode` refuses it. The token table and the output head have one row for each known
#     character, so a new character needs a new row, and the sizes of the tensors change.
#
# 2.  The loss falls to 0.01 within 50 steps of `plain`, because the answer is the input itself. The
#     model only learns to repeat its input. On the real task, its loss is then 10.3.
#
# 3.  Nearly 0. Given the current character, the next one is certain, and the table can say so.
#
# 4.  Times 10, the softmax puts nearly all weight on the `o`. Times 0, all scores are 0, and the
#     weights are equal, as in step 3.
#
# >>> [f"{w:.2f}" for w in attention_weights(10 * q, k, causal_mask(4))[3].tolist()]
# ['0.00', '1.00', '0.00', '0.00']
# >>> attention_weights(0 * q, k, causal_mask(4))[3].tolist()
# [0.25, 0.25, 0.25, 0.25]
#
# 5.  3 C^2 in both cases (and 3 C biases). With 4 heads, each one makes q, k and v of C / 4
#     channels, which is C channels together.
#
# 6.  Not in general. In the first block, the last token's query meets the same set of keys, and a
#     sum does not depend on the order. But an earlier token sees fewer tokens than a later one. So
#     after the first block, the tokens before the last one have other vectors if their order is
#     another, and the second block collects those. The mask alone tells something about positions.
#
# 7.  The softmax only decides the weights of a mean. Given the weights, the result is linear in the
#     values. If there is only one token, its weight is 1, and attention is a linear function of it.
#
# 8.  The same, apart from eps: mean and standard deviation both grow by the factor 10.
#
# >>> x = torch.tensor([[1.0, 3.0, 5.0]])
# >>> torch.allclose(LayerNorm(3)(x), LayerNorm(3)(10 * x), atol=1e-4)
# True
#
# 9.  Its input. The parts add zero to the residual stream.
#
# 10. The residual stream begins with the vector of the token itself, and at first the blocks add
#     little. The head compares the stream with all token vectors, and it is the same matrix. A
#     vector's dot product with itself is larger than with a random other one.
#
# >>> untrained = new_model(GPTConfig(65, block_size=65, n_layer=4, n_head=4, n_embd=128), seed=1)
# >>> idx = torch.arange(65)[None]
# >>> (untrained.eval()(idx)[0].argmax(dim=-1) == idx).float().mean().item() > 0.9
# True
#
# 11. Each leaves only the most likely token.
#
# >>> logits = torch.tensor([[1.0, 3.0, 2.0]])
# >>> [draw_token(logits, **only).item() for only in (
# ...     dict(top_k=1), dict(temperature=0), dict(top_p=1e-6))]
# [1, 1, 1]
#
# 12. Not at all, apart from eps: m and the root of s both grow by the factor 1000, and the quotient
#     stays the same. This holds without clipping. Below, scaling two gradients by 1000 leaves the
#     second step as it was, (0.74, 0.59). Clipping each of them to the norm 1 gives the small one
#     as much weight as the large one, and the step becomes (1.00, -0.05):
#
# >>> def last_step(gradients):                           # of AdamW, in units of the learning rate
# ...     w = nn.Parameter(torch.zeros(2))
# ...     adamw = torch.optim.AdamW([w], lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
# ...     for g in gradients:
# ...         w.grad, before = g, w.tolist()
# ...         adamw.step()
# ...     return [round(a - b, 2) for a, b in zip(before, w.tolist())]
# >>> g = torch.tensor([[0.5, 0.5], [0.05, -0.05]])
# >>> last_step(g), last_step(1000 * g)
# ([0.74, 0.59], [0.74, 0.59])
# >>> last_step(1000 * g / (1000 * g).norm(dim=1, keepdim=True))        # each one clipped to norm 1
# [1.0, -0.05]
#
# 13. learning_rate itself: (0 - 0) / max_steps is the start of the cosine.
#
# >>> get_lr(0, TrainConfig(learning_rate=0.5, min_lr=0.0, warmup_steps=0))
# 0.5
#
# 14. The steps do not depend on a factor that all gradients share. But one large gradient among
#     many small ones dominates the running means for a long time. Clipping removes that.
#
# 15. More than ln 65 = 4.17. The next noise has nothing to do with the batch that was memorized,
#     and the model is now certain of wrong answers.
#
# >>> x, y = get_batch(torch.randint(65, (1000,)), 16, 4)
# >>> model(x, y)[1].item() > math.log(65) + 1
# True
#
# 16. The first: 4 / 2.4 = 1.67 nats per character, which is less than 1.8. In bits per character:
#
# >>> [round(nats / math.log(2), 2) for nats in (4 / 2.4, 1.8)]
# [2.4, 2.6]
#
# 17. The means would be estimated from a single gradient again, as at the first step. The
#     corrections would make up for the start at 0, but not for the noise, and there is no second
#     warm-up.
#
# 18. Step 2 of the seed 1 and step 1 of the seed 2 would draw the same numbers, so runs with
#     neighbouring seeds would share most of their batches.
#
# 19. The same one, because only the difference of the positions matters.
#
# >>> rotary = Rotary(ModelConfig(65, block_size=128, n_head=1, n_embd=8, pos="rope",
# ...     attention="fused"))
# >>> q, k = torch.randn(2, 1, 1, 1, 8)
# >>> near = (rotary(q, 5) * rotary(k, 3)).sum()
# >>> torch.allclose(near, (rotary(q, 105) * rotary(k, 103)).sum(), atol=1e-4)
# True
#
# 20. int(4 * 128 * 2 / 3) = 341 hidden units, and 3 * 128 * 341 = 130,944 weights, where the MLP of
#     Part I has 8 * 128^2 = 131,072.
#
# >>> mlp = SwiGLU(GPTConfig(65, n_head=4, n_embd=128, bias=False))
# >>> count_parameters(mlp)
# 130944
#
# 21. Two: `ab`, and then `abab`. The pair of `abab` and `abab` occurs only once, so nothing is
#     merged after that.
#
# >>> learn_merges_slowly([list(b"abababab")], 9)
# [(97, 98), (256, 256)]
#
# 22. Near 1 in both cases, unless they were far below the largest one. The size of the gradient
#     does not matter, only its directions.
#
# >>> values = torch.linalg.svdvals(orthogonalize(torch.randn(1, 4, 8)))
# >>> 0.6 < values.min() and values.max() < 1.2
# tensor(True)
#
# 23. Keys and values for 4 layers, 512 positions and 128 channels: 2 * 4 * 512 * 128 = 524,288
#     numbers, about 60 % as many as the model has parameters. Each previous-position head adds
#     the 64 values of the last position, in each layer.

# ==================================================================================================
# Part III: The machine room
#
# Nothing here is about language. A subclass of Part I's Run and one of its Journal add what a long
# run on a real machine needs. The training loop is still the one of Part I.
# ==================================================================================================

import array
import contextlib
import ctypes
import functools
import hashlib
import heapq
import importlib.util
import itertools
import json
import re
import shlex
import signal
import threading
import time
import unicodedata
import zipfile
from dataclasses import replace
from datetime import timedelta

PROGRAM = Path(globals().get("__file__", "minigpt.py")).resolve()  # no __file__ behind a pipe

# ---- Devices and number formats ------------------------------------------------------------------
# Problem   Most of the time goes into matrix products. Many processors multiply numbers of 16 bits
#           several times faster than numbers of 32 bits.
# Answer    Mixed precision [Micikevicius et al. 2018]: weights, residual stream, norms and loss
#           stay in float32, and `autocast` computes each matrix product in bfloat16. That format
#           has the range of float32 (8 bits of exponent) but only 8 bits of precision. Older GPUs
#           have float16 instead.
# float16   has only 5 bits of exponent. Numbers below 3e-8 become 0 in it, and many gradients are
#           smaller than that. So the loss is multiplied by a large factor S, and by the chain rule
#           all gradients are S times as large. They are divided by S, in float32, before they are
#           used [Micikevicius et al. 2018, section 3.2]. If S is too large, gradients become
#           infinite; then the step is skipped, and S is halved. After 2,000 steps in which that did
#           not happen, S is doubled. PyTorch's GradScaler does this bookkeeping.
# Here      `plain` trains 1.4 times as fast as with --dtype float32 (--mode bench).
def find_device(name: str) -> torch.device:
    """The device of that name; auto means the best one. Raises UserError if it is not present."""
    present = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        present.append("mps")
    present.append("cpu")
    if name == "auto":
        name = "cuda" if present[0].startswith("cuda") else present[0]
    if name == "cuda":
        name = "cuda:" + os.environ.get("LOCAL_RANK", "0")  # with torchrun, one GPU per process
    if name not in present:
        raise UserError(f"--device {name}: not present; this machine has auto, "
                        f"{', '.join(present)}")
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return torch.device(name)

def find_dtype(name: str, device: torch.device) -> str:
    """The number format of that name; auto means the fastest one that the hardware has."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float16"
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.11 and later
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return "bfloat16"
    return "float32"

def in_16_bits(device: torch.device, dtype: str):
    """A context in which matrix products are computed in this number format."""
    enabled = dtype != "float32"
    return torch.autocast(device.type, getattr(torch, dtype) if enabled else None, enabled)

class MixedPrecision(nn.Module):
    """A model whose matrix products are computed in 16 bits."""
    def __init__(self, model, dtype: str):
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, x, y):
        device = next(self.model.parameters()).device
        with in_16_bits(device, self.dtype):
            return self.model(x, y)

def wrap(model: nn.Module, config: RunConfig, teachers: Teachers | None = None) -> nn.Module:
    """What a step calls: the model with its teachers or at the temperature of training, in 16 bits,
    and compiled."""
    if teachers is not None:
        model = Taught(model, teachers, config.train_temperature)
    elif config.train_temperature != 1:
        model = Tempered(model, config.train_temperature)
    if config.dtype != "float32":
        model = MixedPrecision(model, config.dtype)
    return torch.compile(model) if config.compile else model

# ---- Memory that is not given back ---------------------------------------------------------------
# Problem   Each step asks for the same blocks of memory that the step before has freed. The C
#           library of Linux returns large blocks to the system at once. When they are needed again,
#           the system maps and clears them in pieces of 4 KB, and each piece interrupts the program
#           (a page fault).
# Answer    Tell the library to keep what it has.
# Here      `laptop` trains about 1.2 times as fast. Four pairs of runs of 300 steps, in thousand
#           tokens per second (the machine changed its speed during the last pair):
#
#               with      34.4   34.0   26.5   25.8
#               without   29.0   26.8   22.2   30.5
#
# Threads   For a matrix product, each core has a thread. A thread that is done waits for the others
#           in a loop, for milliseconds, because waking up from a sleep takes long. If another
#           program needs a core, too, the waiting thread may occupy the very core that the thread
#           it waits for needs. The file begins by setting GOMP_SPINCOUNT, the number of rounds in
#           this loop, to 10,000 (unless you have set it or OMP_WAIT_POLICY), after which a thread
#           sleeps. Milliseconds per step of `laptop`, in three pairs of runs:
#
#               alone                              with   93    97    80   without   92    82    87
#               beside two busy programs           with  314   483   280   without  639   422   496
def keep_memory() -> None:
    """Makes the C library keep freed memory. Where it is not glibc, nothing happens."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: give no block a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to this many bytes that are free

# ---- Several processes ---------------------------------------------------------------------------
# Problem   One device is too slow, and there are several, in this machine or in others.
# Answer    Data parallelism. Every process has the whole model and takes its own rows of each
#           batch. PyTorch's DistributedDataParallel averages the gradients of all processes while
#           backward() is still running [Li et al. 2020, section 3.2]. All take the same step, so
#           the models stay equal. All evaluate, and only the first process (rank 0) writes files
#           and prints.
def process_rank() -> int:
    """The number of this process among those that torchrun started, or 0."""
    return int(os.environ["RANK"]) if torch.distributed.is_torchelastic_launched() else 0

def join_processes() -> int:
    """Connects to the other processes that torchrun started. Returns how many there are."""
    if not torch.distributed.is_torchelastic_launched():
        return 1
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group()  # gloo, and nccl for GPUs
    return torch.distributed.get_world_size()

def gather(value) -> list:
    """Collects one value from each process, and gives every process the whole list."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values

# ---- What is printed -----------------------------------------------------------------------------
# Texts and results go to stdout, everything else to stderr. If a result cannot be written, the
# command has failed. If a remark cannot be written, the command goes on. (In training, FullJournal
# prints. If the reader of its pipe has left, the run saves and stops.)
def say(text: str, end: str = "\n") -> None:
    """Prints a line to stderr, in the first process only."""
    if process_rank() == 0:
        with contextlib.suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)

def write_result(text: str, end: str = "\n") -> None:
    """Prints a line to stdout. Raises UserError if that cannot be written, and BrokenPipeError if
    its reader has left."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise UserError(f"stdout: {problem.strerror}; send the results to another place") from None

def progress_of(what: str):
    """A function that shows how much of a long computation is done, and the time that is left. It
    takes the share that is done, above 0 and at most 1.

    On a terminal, it writes a line that is overwritten. Elsewhere, a line follows every 30
    seconds."""
    began = shown = time.perf_counter()
    on_terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()  # notebooks may lack it

    def show(share: float) -> None:
        nonlocal shown
        now = time.perf_counter()
        is_end = share == 1 and shown > began  # what is done at once shows nothing
        if now - shown < (0.2 if on_terminal else 30) and not is_end:
            return
        shown = now
        left = timedelta(seconds=round((now - began) * (1 - share) / share))
        line = f"{what}: {share:.0%}, {left} left"
        if on_terminal:
            say(f"\r{line:50}", end="\n" if share == 1 else "")
        elif share < 1:
            say(line)

    return show

# ---- Signals -------------------------------------------------------------------------------------
# Problem   Ctrl-C (SIGINT), a shutdown (SIGTERM) or a closed terminal (SIGHUP) may come in the
#           middle of a step.
# Answer    A handler records the signal. The run saves a checkpoint and exits when the step is
#           done. A second signal ends the process at once.
AGAIN = "run the same command again (add --resume if the mode is train)"

class SignalWatch:
    """Records signals while a `with` block runs. Afterwards, the old handlers are back."""
    def __init__(self):
        self.received = 0  # the number of the signal, or 0
        self.previous = {}  # the handlers that were there before

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows handlers in the main thread only
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *problem):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame) -> None:
        self.received = number
        for watched in self.previous:
            signal.signal(watched, signal.SIG_DFL)  # the second signal ends the process
        if process_rank() == 0:
            # print is not safe here, because the signal may have interrupted a print.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping as soon as this step is done; a second signal ends the "
                            b"process at once\n")

# ---- The size of a model -------------------------------------------------------------------------
# What the name of a parameter contains, such as h.0.attn.q_norm.weight. The last entry that fits
# decides.
PARTS = {"wte": "token table", "wpe": "position table", "attn": "attention", "mlp": "MLP",
         "ln_|_norm": "norms", "lm_head": "output head"}

def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """How many parameters each part of a model has. A tied head has none of its own."""
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, parameter in model.named_parameters():  # a tied matrix comes once, as wte
        part = "other"
        for words, fitting in PARTS.items():  # of h.0.attn.q_norm.weight, the last one
            if re.search(words, name):
                part = fitting
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts

def flops_per_token(model: GPT) -> int:
    """Multiplications and additions per token of a training step, with whole windows.

    Each weight of a matrix product is used once forward and twice backward, for one multiplication
    and one addition each time. Attention compares each query with all keys and mixes all values, 2
    T C products in each layer [Chowdhery et al. 2022, appendix B; it does not subtract those that
    the mask hides]. Looking up a row of a table costs nothing."""
    c = model.config
    counts = parameters_by_part(model)
    products = counts["attention"] + counts["MLP"] + c.vocab_size * c.n_embd  # the last: the head
    return 6 * (products + 2 * c.n_layer * c.block_size * c.n_embd)

# ---- Checkpoints that may be damaged -------------------------------------------------------------
RUN_FILES = r"(best|latest|step_\d{6,})\.pt|metrics\.jsonl|config\.json|loss\.png|teacher_\d+"

def files_of_run(out_dir: Path, ending: str = "") -> list[Path]:
    """The files in a folder that a run has written, or those whose names have an ending more."""
    return [path for path in sorted(out_dir.glob("*"))
            if re.fullmatch(f"({RUN_FILES}){re.escape(ending)}", path.name)]

def read_checkpoint(path: Path) -> dict:
    """Reads a checkpoint. Raises UserError if it is missing, damaged, or from another program.
    Other errors of the disk pass through."""
    state = None
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch's files are zip archives
            if archive.testzip() is None:  # compares checksums
                state = load_checkpoint(path)
    except MemoryError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder; train first, or name another one. To get "
                        "a GPT-2, type: hf download openai-community/gpt2 --local-dir gpt2; then "
                        "name the folder gpt2") from None
    except Exception as problem:  # a damaged file can make the readers fail in many ways
        if getattr(problem, "filename", None):
            raise  # the file cannot be read; that says nothing about its content
    if state is None and path.suffix == ".pt":
        raise UserError(f"{path}: this file is damaged, or it is not a checkpoint of minigpt; use "
                        "another .pt file of the same run (best.pt, latest.pt or a step_*.pt), or "
                        "copy that one over this one")
    if state is None:
        raise UserError(f"{path}: this is not a checkpoint; name the .pt file of a run, or, if "
                        f"this is one file of a GPT-2, its folder, {path.parent}")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this version of minigpt; train a new one, in "
                        "another --out_dir")
    for name, value in {**state["model_config"], **state["train_config"]}.items():
        if name not in SETTINGS | {"vocab_size", "init_from"} or (
                value not in CHOICES.get(name, [value])):
            raise UserError(f"{path}: was trained with --{name} {value}, which this minigpt.py "
                            "does not have; use the one that it was trained with")
    return state

def rebuild(path: Path, state: dict):
    """The model and the tokenizer of a checkpoint. Raises UserError if this program, which may have
    been edited, builds a model with other weights."""
    try:
        return model_from_checkpoint(state, ModelConfig)
    except RuntimeError as problem:
        if "loading state_dict" not in str(problem):
            raise
        raise UserError(f"{path}: its weights are not those of this minigpt.py's model "
                        f"({first_misfit(problem)}); use the minigpt.py that it was trained with"
                        ) from None

def first_misfit(problem: RuntimeError) -> str:
    """What load_state_dict says of the first weights that are missing or have another shape."""
    return str(problem).split("\n")[:2][-1].strip()

def replace_text(path: Path, text: str) -> None:
    """Writes a text file, completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

# ---- What is recorded of a run -------------------------------------------------------------------
def read_metrics(out_dir: Path) -> list[dict]:
    """The records of metrics.jsonl. Lines that are damaged are left out."""
    path = out_dir / "metrics.jsonl"
    records = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                if isinstance(record["step"], int):
                    records.append(record)
    return records

def read_curve(out_dir: Path, name: str) -> dict[int, float]:
    """One number of metrics.jsonl, by step."""
    return {record["step"]: record[name] for record in read_metrics(out_dir)
            if isinstance(record.get(name), float)}

def draw_curves(path: Path, curves: dict[str, tuple[Path, str]], ylabel: str) -> None:
    """A picture of curves, each given by a run's folder and the name of a number in its records.

    A picture that cannot be drawn must not cost the result of a run; then one line says why."""
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=ylabel)
        for label, (out_dir, name) in curves.items():
            curve = read_curve(out_dir, name)
            axes.plot(list(curve), list(curve.values()), label=label, linewidth=1.2)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=120)
    except Exception as problem:  # of the disk, or of the library and its settings
        if isinstance(problem, ImportError) and (problem.name or "").startswith("matplotlib"):
            say(f"no {path.name}: pip install matplotlib to get one")
        else:
            say(f"no {path.name} ({type(problem).__name__}: {problem})")

def start_wandb(run: FullRun):
    """A run of Weights & Biases, or None if it is switched off or not available. A resumed run
    continues the same one."""
    asked_for = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ
    installed = importlib.util.find_spec("wandb") is not None
    mode = os.environ.get("WANDB_MODE")
    if not run.config.wandb or mode == "disabled" or not (asked_for or installed):
        return None
    try:
        import wandb

        if mode != "offline" and not wandb.login(prompt=False, verify=False):
            say("Weights & Biases is off, because you are not logged in: run `wandb login`, set "
                "WANDB_MODE=offline, or silence this line by --no_wandb")
            return None
        settings = {**asdict(run.model.config), **asdict(run.config)}
        return wandb.init(project="minigpt", dir=run.out_dir, config=settings, mode=mode,
                          id=run.wandb_id, resume="allow", reinit="create_new",
                          settings=wandb.Settings(silent=True))
    except Exception as problem:  # not installed, no network, or an error of its own
        say(f"no Weights & Biases ({type(problem).__name__}); --no_wandb leaves it out")
        return None

class Diverged(UserError):
    """The loss or the weights are no longer finite numbers."""

class FullJournal(Journal):
    """A journal that also measures time, and writes metrics.jsonl, loss.png and W&B's log.

    label begins each line, and steps_after is how many steps the runs after this one take."""
    def __init__(self, out_dir: Path, watch: SignalWatch, label: str = "", steps_after: int = 0):
        self.out_dir = out_dir
        self.watch = watch
        self.label = label
        self.steps_after = steps_after
        self.rank = process_rank()

    def say(self, text: str) -> None:
        """Prints to stderr. A terminal that is gone must not end a run without a save."""
        if self.rank > 0:
            return
        try:
            super().say(self.label + text)
        except BrokenPipeError:  # the reader of a pipe has left: stop after this step
            self.watch.received = self.watch.received or 13  # SIGPIPE
        except OSError:
            pass  # a full disk, for instance

    def report_step(self, run: FullRun, loss, norm, details: str = "") -> None:
        if not self.is_due(run):
            return
        began = time.perf_counter()
        losses = gather(loss.item())  # a GPU computes until here
        run.step_seconds += time.perf_counter() - began
        loss = sum(losses) / len(losses)
        rate = run.step_tokens / run.step_seconds
        run.step_tokens = 0
        run.step_seconds = 0.0
        lr = run.optimizer.param_groups[0]["lr"]
        run.check_finite(math.isfinite(loss))
        self.record(run, loss=loss, lr=lr, grad_norm=norm.item(), tokens_per_second=round(rate))
        steps_left = run.config.max_steps - run.step + self.steps_after
        left = timedelta(seconds=round(run.seconds() * steps_left / run.step))
        details = f" | epoch {run.epochs():.2f} | lr {lr:.2e} | {rate:,.0f} tokens/s | {left} left"
        if run.skipped:
            details += f" | steps skipped (float16 overflow): {run.skipped}"
        super().report_step(run, loss, norm, details)

    def report_evaluation(self, run: FullRun, losses: dict[str, float], better: bool) -> None:
        run.check_finite(all(map(math.isfinite, losses.values())))
        self.record(run, train_loss=losses["train"], val_loss=losses["val"],
                    val_perplexity=perplexity(losses["val"]))
        super().report_evaluation(run, losses, better)

    def report_score(self, run: FullRun, nats: float) -> None:
        """The end of a run: its last record, its picture, and where its best model is."""
        seconds = run.seconds()
        numbers = {"full_val_loss": nats, "full_val_perplexity": perplexity(nats),
                   "seconds": seconds, "best_step": run.best_step}
        if run.device.type == "cuda":
            numbers["peak_memory"] = torch.cuda.max_memory_allocated()  # bytes
        self.record(run, **numbers)
        if self.rank == 0:
            curves = {name: (self.out_dir, name) for name in ("loss", "train_loss", "val_loss")}
            draw_curves(self.out_dir / "loss.png", curves, "loss, nats per token")
        path = self.out_dir / "best.pt"
        best = (f"the best model (step {run.best_step}): {path} (to open it in a browser: --mode "
                f"inspect --out_dir {shlex.quote(str(self.out_dir))})")
        if run.best_step == 0:
            best = (f"no evaluation was better than the one before the first step, which {path} is "
                    "from; try another --learning_rate")
        self.say(f"trained to step {run.step} in {timedelta(seconds=round(seconds))}; {best}")

    def record(self, run: FullRun, **numbers) -> None:
        """Writes one line of metrics.jsonl, and the same to W&B. JSON has no infinity: null."""
        if self.rank > 0:
            return
        numbers = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        numbers = {"step": run.step, **numbers}
        with open(self.out_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")
        if run.wandb is not None:
            with contextlib.suppress(Exception):  # an error in W&B must not stop the training run
                run.wandb.log(numbers, step=run.step)

    def forget_after(self, step: int) -> None:
        """Removes the records of later steps and of the final score from metrics.jsonl, which the
        run makes again, and files that a killed process has left half-written."""
        if self.rank > 0:
            return
        for partial in files_of_run(self.out_dir, ending=".partial"):
            partial.unlink()
        path = self.out_dir / "metrics.jsonl"
        if path.is_file():
            kept = [json.dumps(record) + "\n" for record in read_metrics(self.out_dir)
                    if record["step"] <= step and "full_val_loss" not in record]
            replace_text(path, "".join(kept))

# ---- Byte-pair encoding, fast --------------------------------------------------------------------
# Problem   The slow trainer counts all pairs of the whole text again for each merge.
# Answer    Three ideas. (1) Each distinct word is processed once and counted by how often it
#           occurs. (2) A merge changes only the words that contain its pair, so we keep a list of
#           them and update the counts. (3) A heap gives us the most frequent pair. Its entries are
#           not updated when a count changes. Instead, when an entry comes out and its count is no
#           longer right, we put it back with the right one. A test compares the result with the
#           slow trainer's.
# Try it    BPETokenizer.train(text, 1024) on Tiny Shakespeare first merges " t", "he", " a", "ou"
#           and " s", and the 1.1 million characters become 460,000 tokens.
# Here      --tokenizer bpe: 2.697 ± 0.013 bits per character, where `plain` has 3.288 ± 0.005.
#           But each step then sees 2.4 times as much text.
#
END_OF_TEXT = "<|endoftext|>"  # a token of its own, which ends a text

@functools.cache
def word_pattern() -> re.Pattern:
    r"""GPT-2's pattern: '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    Python's re does not know \p{L} (letters) and \p{N} (numbers), so we write these classes out, as
    ranges, from Python's tables of Unicode. Python's \s contains four characters more than GPT-2's.
    The second branch is an addition for speed: it matches a word of ASCII letters if no further
    letter follows.

    >>> word_pattern().findall("Who's there?  Nay, 2 answer")
    ['Who', "'s", ' there', '?', ' ', ' Nay', ',', ' 2', ' answer']
    """
    classes = collections.defaultdict(str)  # the ranges of each category (L, N, ...)
    everything = map(chr, range(sys.maxunicode + 1))
    for category, group in itertools.groupby(everything, lambda c: unicodedata.category(c)[0]):
        characters = list(group)
        classes[category] += f"{characters[0]}-{characters[-1]}"
    letters, numbers = classes["L"], classes["N"]
    spaces = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(rf"'(?:[sdmt]|ll|ve|re)"
                      rf"| ?[A-Za-z]+(?![A-Za-z\x80-\U0010ffff])"
                      rf"| ?[{letters}]+"
                      rf"| ?[{numbers}]+"
                      rf"| ?[^{spaces}{letters}{numbers}]+"
                      rf"|[{spaces}]+(?![^{spaces}])"
                      rf"|[{spaces}]+")

def in_pieces(text: str, size: int = 2**20):
    """Yields a text in pieces of about `size` characters, so that a large text can be processed
    without several copies of it. No word crosses from one piece to the next: a piece ends before a
    space or a line break that follows a character that is not white space."""
    boundary = re.compile(r"(?<=\S)[ \n]")
    start = 0
    while start < len(text):
        found = boundary.search(text, start + size)
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end

def repair_surrogates(text: str) -> str:
    """Replaces half characters (lone surrogates), which UTF-8 cannot write, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

# While we merge, a word is a str in which the character chr(i) stands for token i. Then one merge
# is one call of str.replace, which is fast, and a pair is a str of two characters.
#
# GPT-2 numbers the bytes in an order of its own: first those that are visible characters, then the
# others. In its files, it shows one of the others as a character from U+0100 on.
VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTE_ORDER = sorted(range(256), key=lambda byte: (byte not in VISIBLE, byte))  # byte of each id
BYTE_TO_SHOWN = {byte: chr(byte if byte in VISIBLE else 256 + i - len(VISIBLE))
                 for i, byte in enumerate(BYTE_ORDER)}
SHOWN_TO_BYTE = {shown: byte for byte, shown in BYTE_TO_SHOWN.items()}

def to_token_str(word: str) -> str:
    """A word as such a str: one character for each of its bytes in UTF-8."""
    return word.encode("utf-8").decode("latin-1").translate(BYTE_TO_TOKEN)

BYTE_TO_TOKEN = {byte: chr(i) for i, byte in enumerate(BYTE_ORDER)}

def pairs_of(word: str) -> list[str]:
    """The pairs of neighbours in a word.

    >>> pairs_of("abc")
    ['ab', 'bc']
    """
    return [a + b for a, b in zip(word, word[1:])]

class MergeLearner:
    """Finds the most frequent pair of a collection of words and merges it, again and again."""
    def __init__(self, word_counts: dict[str, int]):
        self.words = [to_token_str(word) for word in word_counts]
        self.frequencies = list(word_counts.values())
        self.counts = collections.Counter()  # how often each pair occurs
        self.places = collections.defaultdict(set)  # the words in which it occurs, by number
        self.heap = []  # (-count, pair): the smallest entry is the most frequent pair
        for number, word in enumerate(self.words):
            for pair, n in collections.Counter(pairs_of(word)).items():
                self.add(number, pair, n)

    def add(self, number: int, pair: str, n: int) -> None:
        """Notes that a word has n more of a pair."""
        if pair not in self.counts:
            heapq.heappush(self.heap, (-math.inf, pair))  # its count is set right later
        self.counts[pair] += n * self.frequencies[number]
        self.places[pair].add(number)

    def most_frequent(self) -> str | None:
        """The pair that occurs most often, or None if none occurs twice."""
        while self.heap:
            negative_count, pair = heapq.heappop(self.heap)
            count = self.counts[pair]
            if -negative_count == count:
                return pair if count >= 2 else None
            heapq.heappush(self.heap, (-count, pair))
        return None

    def merge(self, pair: str, token: str) -> None:
        """Replaces a pair by a token wherever it occurs. The pairs of the old words are taken back,
        and those of the new words are added."""
        for number in self.places.pop(pair):
            word = self.words[number]
            for old in pairs_of(word):
                self.counts[old] -= self.frequencies[number]
            self.words[number] = word.replace(pair, token)
            for new in pairs_of(self.words[number]):
                self.add(number, new, 1)

class BPETokenizer:
    """Byte-level BPE that reads and writes GPT-2's files.

    >>> tokenizer = BPETokenizer.train("low lower lowest low low", vocab_size=260)
    >>> tokenizer.merges
    [(b'l', b'o'), (b'lo', b'w'), (b' ', b'low')]
    >>> [tokenizer.decode([i]) for i in tokenizer.encode(" lowly")]
    [' low', 'l', 'y']
    """
    kind = "bpe"
    first_id = 198  # the line break

    def __init__(self, merges: list[tuple[bytes, bytes]]):
        """merges: pairs of tokens in the order in which they were learned."""
        self.merges = merges
        self.tokens = [bytes([byte]) for byte in BYTE_ORDER] + [a + b for a, b in merges]
        token_of = {token: chr(i) for i, token in enumerate(self.tokens)}
        # For each pair that can be merged, the token that it becomes. Tokens that were learned
        # earlier have smaller ids, so comparing tokens compares ranks.
        self.merged = {}
        for i, (a, b) in enumerate(merges, start=256):
            self.merged[token_of[a] + token_of[b]] = chr(i)
        self.end_id = len(self.tokens)
        self.tokens.append(END_OF_TEXT.encode())
        self.vocab_size = len(self.tokens)
        # The same words occur again and again, so their ids are remembered, up to this many.
        self.encode_word = functools.lru_cache(2**20)(self.merge_word)

    @property
    def state(self) -> list[tuple[bytes, bytes]]:
        """What a checkpoint stores. BPETokenizer(state) is the same tokenizer again."""
        return self.merges

    @classmethod
    def train(cls, text: str, vocab_size: int, progress=lambda share: None) -> BPETokenizer:
        """Learns merges until there are vocab_size tokens, or no pair is left that occurs twice.

        progress is called with the share that is done."""
        word_counts = collections.Counter()
        for piece in in_pieces(text):
            for part in repair_surrogates(piece).split(END_OF_TEXT):
                word_counts.update(word_pattern().findall(part))
        learner = MergeLearner(word_counts)
        tokens = [bytes([byte]) for byte in BYTE_ORDER]
        merges = []
        while len(tokens) < vocab_size - 1:  # one place is for END_OF_TEXT
            pair = learner.most_frequent()
            if pair is None:
                progress(1.0)
                break
            learner.merge(pair, chr(len(tokens)))
            a, b = tokens[ord(pair[0])], tokens[ord(pair[1])]
            merges.append((a, b))
            tokens.append(a + b)
            progress(len(tokens) / (vocab_size - 1))
        return cls(merges)

    def merge_word(self, word: str) -> list[int]:
        """The ids of one word: merges the pair that was learned first, until none is left."""
        tokens = to_token_str(word)
        if len(tokens) > 1000:
            # Only later merges can use the token that a merge makes, so one pass through all merges
            # gives the same result. For very long words this is faster.
            for pair, token in self.merged.items():
                tokens = tokens.replace(pair, token)
        while known := [pair for pair in pairs_of(tokens) if pair in self.merged]:
            pair = min(known, key=self.merged.get)
            tokens = tokens.replace(pair, self.merged[pair])
        return [ord(token) for token in tokens]

    def encode(self, text: str) -> list[int]:
        """Text to ids. Every text can be encoded."""
        ids = []
        for part in repair_surrogates(text).split(END_OF_TEXT):
            for word in word_pattern().findall(part):
                ids.extend(self.encode_word(word))
            ids.append(self.end_id)
        return ids[:-1]  # nothing was split off after the last part

    def decode(self, ids: list[int]) -> str:
        """Ids to text. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return b"".join([self.tokens[i] for i in ids]).decode("utf-8", errors="replace")

    def vocab(self) -> dict[str, int]:
        """The id of each token, as GPT-2's file shows it: Ġ stands for a space."""
        shown = [show_bytes(token) for token in self.tokens[: self.end_id]]
        return {token: i for i, token in enumerate([*shown, END_OF_TEXT])}

    def save(self, folder) -> None:
        """Writes folder/vocab.json and folder/merges.txt in GPT-2's format."""
        vocab = json.dumps(self.vocab())
        lines = ["#version: 0.2"]
        lines += [f"{show_bytes(a)} {show_bytes(b)}" for a, b in self.merges]
        Path(folder, "vocab.json").write_text(vocab, encoding="utf-8")
        Path(folder, "merges.txt").write_bytes(("\n".join(lines) + "\n").encode("utf-8"))

    @classmethod
    def load(cls, folder) -> BPETokenizer:
        """Reads what save wrote, or GPT-2's own files. Raises UserError for other ids."""
        lines = Path(folder, "merges.txt").read_text(encoding="utf-8").split("\n")
        if lines[0].startswith("#version"):
            lines = lines[1:]
        tokenizer = cls.from_shown([line for line in lines if line])
        vocab = json.loads(Path(folder, "vocab.json").read_text(encoding="utf-8"))
        if vocab != tokenizer.vocab():
            raise UserError(f"{folder}: vocab.json does not number its tokens as GPT-2 does; such "
                            "a tokenizer cannot be used here")
        return tokenizer

    @classmethod
    def from_shown(cls, lines: list[str]) -> BPETokenizer:
        """From merges as GPT-2's file shows them, "Ġ t" for a space and a t."""
        pairs = [line.split(" ") for line in lines]
        return cls([(unshow_bytes(a), unshow_bytes(b)) for a, b in pairs])

def show_bytes(token: bytes) -> str:
    """A token as GPT-2's files show it.

    >>> show_bytes(b" the")
    'Ġthe'
    """
    return "".join([BYTE_TO_SHOWN[byte] for byte in token])

def unshow_bytes(shown: str) -> bytes:
    """The opposite of show_bytes."""
    return bytes([SHOWN_TO_BYTE[character] for character in shown])

# GPT-2's own tokens come from the library tiktoken. It knows a token by its bytes and its rank, and
# merges the two neighbours whose bytes together have the lowest rank. For tokens that were learned
# by merging, this is the same thing.
def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Recovers the merges from tiktoken's ranks. Apply all earlier merges to a token's bytes: the
    two tokens that are left are the pair that made it."""
    merges = []
    for token in sorted(ranks, key=ranks.get)[256:]:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [a + b for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs, key=lambda pair: ranks.get(pair, math.inf)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append(tuple(parts))
    return merges

GPT2_SIZE = 50257  # tokens

def fetch_gpt2_tokens() -> BPETokenizer:
    """From tiktoken, which downloads them at the first use and keeps them. Raises UserError if that
    fails, and ImportError without the package."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception:  # the library raises errors of many kinds
        raise UserError("--tokenizer gpt2: GPT-2's tokens could not be downloaded; connect to the "
                        "network once, or use --tokenizer bpe") from None
    return BPETokenizer(merges_from_ranks(
        {encoding.decode_single_token_bytes(i): i for i in range(encoding.n_vocab)
         if i != encoding.eot_token}))

TOKENIZERS["bpe"] = BPETokenizer
TOKENIZERS["gpt2"] = BPETokenizer

# ---- The corpus ----------------------------------------------------------------------------------
@dataclass
class SourceText:
    """A text, where it is from, and its SHA-256 checksum."""
    path: Path
    text: str
    sha256: str

def is_stream(path: Path) -> bool:
    """Whether a path is a pipe or a device, which can be read only once."""
    return path.exists() and not path.is_file() and not path.is_dir()

def read_corpus(data: str, remembered: str = "") -> SourceText:
    """The text of --data if it is given; otherwise the one that a checkpoint remembers; otherwise
    Tiny Shakespeare, downloaded if needed; otherwise the sample, with a warning. Raises UserError
    for what is not a text."""
    name = data or remembered
    path = Path(name) if name else find_shakespeare()
    if path.is_dir():
        raise UserError(f"--data {path}: this is a folder; name a text, by --data FILE. To train "
                        "on several texts, join them into one file")
    if remembered and not data and not path.is_file():
        raise UserError(f"--data {path}: the text of this model is not there any more; name it, by "
                        "--data FILE")
    if is_stream(path) and torch.distributed.is_initialized():
        raise UserError(f"--data {path}: several processes cannot read one pipe; name a file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: no byte order mark
    except OSError as problem:
        raise UserError(f"--data {path}: {problem.strerror}; name a text, by --data FILE") from None
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        raise UserError(f"--data {path}: line {line} is not UTF-8 text (byte "
                        f"0x{problem.object[problem.start]:02x}); if it is a text, save it as "
                        "UTF-8") from None
    return SourceText(path, text, hashlib.sha256(text.encode("utf-8")).hexdigest())

def find_shakespeare() -> Path:
    """data/input.txt, or the sample if it cannot be downloaded. Raises UserError if that file has
    another content, such as an error page that was saved under this name."""
    import download_data

    path = download_data.find(PROGRAM.parent / "data" / "input.txt")
    if path.name == "input.txt":
        try:
            download_data.check(path.read_bytes())
        except download_data.Refused as refusal:
            raise UserError(f"{path}: this is not Tiny Shakespeare ({refusal}); get it by python "
                            "download_data.py, or name your own text by --data FILE") from None
    return path

def doubts_about(text: str) -> list[str]:
    """What is odd about a text that a model should learn from, in one line each."""
    doubts = []
    if "\0" in text:
        doubts.append("it has NUL characters; if it is UTF-16 or a binary file, save it as UTF-8")
    cut = int(0.9 * len(text))
    known = set()
    for piece in in_pieces(text[:cut]):
        known.update(piece.split("\n"))
    lines = text[cut:].split("\n")
    new = sum(len(line) for line in lines if line.strip() and line not in known)
    if new <= 0.1 * sum(map(len, lines)):
        doubts.append("its last tenth, the validation part, is blank or repeats lines of the "
                      "training part; a loss on it means nothing")
    return doubts

def make_tokenizer(config: RunConfig, text: str):
    """A new tokenizer. BPE learns from the training part alone, so that the validation part has no
    influence on it. Characters are taken from the whole text, since none may be missing."""
    if config.tokenizer == "bpe":
        show = progress_of("learning byte pairs")
        return BPETokenizer.train(text[: int(0.9 * len(text))], config.bpe_size, show)
    if config.tokenizer == "gpt2":
        return fetch_gpt2_tokens()
    return TOKENIZERS[config.tokenizer].train(text)

@dataclass
class PieceEncoder:
    """Encodes a text in pieces, to ids of 1, 2 or 4 bytes each. (A Python list of all ids would
    take 8 bytes or more for each.)"""
    tokenizer: object

    def encode(self, text: str) -> torch.Tensor:
        """Text to ids (N,)."""
        V = self.tokenizer.vocab_size
        small = torch.uint8 if V <= 2**8 else torch.uint16
        dtype = small if V <= 2**16 else torch.int32
        ids = array.array({1: "B", 2: "H", 4: "i"}[dtype.itemsize])
        show = progress_of("encoding")
        done = 0
        for piece in in_pieces(text):
            ids.extend(self.tokenizer.encode(piece))
            done += len(piece)
            show(done / len(text))
        return torch.frombuffer(ids, dtype=dtype) if ids else torch.zeros(0, dtype=dtype)

def encode_text(source: SourceText, tokenizer) -> Corpus:
    """Both parts of a text as tokens. Raises UserError if it has characters that are not known."""
    try:
        return Corpus.from_text(source.text, PieceEncoder(tokenizer))
    except UserError as problem:
        raise UserError(f"--data {source.path}: {problem} of the model; only a model that is "
                        "trained from the start on this text can know it") from None

def encode_corpus(source: SourceText, tokenizer, block_size: int) -> Corpus:
    """Both parts of a text for training. Raises UserError, too, if one is too short for a
    window."""
    corpus = encode_text(source, tokenizer)
    shorter = min(len(corpus.train), len(corpus.val))
    if shorter <= block_size:
        raise UserError(f"--data {source.path}: its shorter part must have more tokens than "
                        f"--block_size {block_size}, but has {shorter}; use a longer text, or, for "
                        "a new model, a lower --block_size")
    return corpus

# ---- A run with all of it ------------------------------------------------------------------------
@torch.no_grad()
def is_finite(model) -> bool:
    """Whether the weights, and the logits for one token, are finite numbers."""
    logits, _ = model(torch.zeros(1, 1, dtype=torch.long))
    if not logits.isfinite().all():
        return False
    return all(p.isfinite().all() for p in model.parameters())

class FullRun(Run):
    """A run on any device and in several processes, which checks what it saves.

    source holds where the corpus is from and its checksum; it goes into the checkpoints."""
    def __init__(self, model, tokenizer, corpus: Corpus, config: RunConfig, out_dir, device,
                 source: dict, journal: FullJournal, teachers: Teachers | None = None):
        self.processes = join_processes()
        self.rank = process_rank()
        self.device = device
        if config.batch_size % self.processes:
            raise UserError(f"--batch_size {config.batch_size}: must be divisible by the number of "
                            f"processes, {self.processes}")
        found = replace(config, dtype=find_dtype(config.dtype, device))
        super().__init__(model.to(device), tokenizer, corpus, found, out_dir, journal)
        self.wanted_dtype = config.dtype  # "auto" is stored, and found again on another machine
        self.source = source
        self.teachers = teachers
        self.runner = wrap(model, found, teachers)
        if torch.distributed.is_initialized():
            self.runner = nn.parallel.DistributedDataParallel(self.runner)
        self.scaler = torch.amp.GradScaler(device.type, enabled=found.dtype == "float16")
        # Otherwise GradScaler would leave the skipping to the fused kernel of AdamW, and Muon's own
        # update would still be made.
        self.optimizer._step_supports_amp_scaling = False
        self.skipped = 0  # steps with gradients that were not finite, in float16
        self.began = time.perf_counter()
        self.step_seconds = 0.0  # spent in training steps since the last report
        self.step_tokens = 0  # trained on since the last report
        self.wandb = None
        self.wandb_id = None  # of the run at W&B

    def seconds(self) -> float:
        """How long the run has taken so far, interruptions not counted."""
        return time.perf_counter() - self.began

    def batches(self) -> list:
        """This process's rows of each batch of the step. A student's batches are positions."""
        if self.teachers is None:
            batches = super().batches()
        else:
            places = torch.arange(len(self.corpus.train))
            batches = [cut_windows(places, T, starts)
                       for T, starts in SAMPLING[self.config.sampling](self)]
        self.step_tokens += sum(x.numel() for x, _ in batches)
        return [(x[self.rank :: self.processes], y[self.rank :: self.processes])
                for x, y in batches]

    def take_step(self):
        began = time.perf_counter()
        if self.processes == 1 and not self.scaler.is_enabled():
            loss, norm = super().take_step()
        else:
            loss, norm = self.take_scaled_step()
        self.step_seconds += time.perf_counter() - began
        return loss, norm

    def take_scaled_step(self):
        """The same as train_step, for several processes and for float16."""
        if self.rank > 0:  # other processes need other random numbers for dropout
            torch.manual_seed(derived_seed(self.config.seed, self.step, self.rank))
        self.model.train()
        loss_sum = 0.0
        batches = self.batches()
        for number, (x, y) in enumerate(batches, start=1):
            # DistributedDataParallel averages the gradients in the last micro-step only.
            self.runner.require_backward_grad_sync = number == len(batches)
            _, loss = self.runner(x, y)
            loss = loss / self.config.grad_accum
            self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model.parameters(), self.config.grad_clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < scale
        self.optimizer.zero_grad()
        return loss_sum, norm

    def epochs(self) -> float:
        """How many passes over the training text the steps so far amount to."""
        config = self.config
        per_step = config.batch_size * config.grad_accum * self.model.config.block_size
        return self.step * per_step / len(self.corpus.train)

    def estimate(self) -> dict[str, float]:
        """The losses as the first process computed them, so that all agree on what is better."""
        return gather(super().estimate())[0]

    def check_finite(self, finite: bool) -> None:
        """Raises Diverged if the numbers of the run are no longer finite."""
        if not finite:
            raise Diverged(f"the run has diverged at step {self.step}; use a smaller "
                           f"--learning_rate than {self.config.learning_rate}, and another "
                           "--out_dir")

    def save(self, name: str) -> None:
        """Writes a checkpoint, in the first process. Raises Diverged for a model that is not
        finite, so that it never replaces a good one."""
        self.check_finite(is_finite(self.model))
        if self.rank == 0:
            super().save(name)

    def state(self) -> dict:
        state = super().state()
        state["train_config"]["dtype"] = self.wanted_dtype
        return {**state, "seconds": self.seconds(), "corpus": self.source,
                "teachers": self.teachers.taught_by if self.teachers else [],
                "scaler": self.scaler.state_dict(), "wandb": self.wandb_id,
                "torch": str(torch.__version__)}

    def restore(self, state: dict) -> None:
        """Continues from a checkpoint. best.pt is read for what it holds, because it may be of a
        later step, or missing, or a copy of another checkpoint."""
        super().restore(state)
        if state.get("scaler"):  # it is empty if the run was not in float16
            self.scaler.load_state_dict(state["scaler"])
        self.began -= state["seconds"]
        self.wandb_id = state.get("wandb")
        best = self.out_dir / "best.pt"
        held = read_checkpoint(best) if best.exists() else None
        if held and (held["model_config"] != state["model_config"]
                     or held["corpus"]["sha256"] != self.source["sha256"]):
            raise UserError(f"{best}: this is the model of another run; move it to another folder")
        if held and held["step"] == held["best_step"]:
            self.best_val, self.best_step = held["best_val"], held["best_step"]
        else:  # the next evaluation makes one
            self.best_val, self.best_step = math.inf, self.step

    def progress_of(self, what: str):
        """As progress_of, for work before the first step or after the last save: a signal ends it
        at once."""
        show = progress_of(self.journal.label + what)

        def progress(share: float) -> None:
            if self.journal.watch.received:
                self.journal.say(f"stopped {what}; to repeat that, {AGAIN}")
                sys.exit(128 + self.journal.watch.received)
            show(share)

        return progress

    def score(self) -> float:
        gather(None)  # wait until the first process has written best.pt
        read_checkpoint(self.out_dir / "best.pt")  # refuses a damaged file
        return super().score(self.progress_of("evaluating"))

    def stop_if_asked(self, run: FullRun) -> None:
        """After each step. If any process has received a signal, all save and stop."""
        number = max(gather(self.journal.watch.received))
        if number:
            self.save("latest.pt")
            gather(None)  # nobody leaves before the first process has saved
            self.journal.say(f"saved; to continue, {AGAIN}")
            sys.exit(128 + number)

# ==================================================================================================
# Part IV: The laboratory
# ==================================================================================================

import base64
import shutil
import statistics
import zlib
from dataclasses import fields

# ---- Comparing variations ------------------------------------------------------------------------
# Change one thing at a time, and keep steps, seeds and batches the same. A difference that is
# smaller than the spread over the seeds shows nothing. A variant is an ordinary run in a folder of
# its own. If the command is interrupted and typed again, it continues.
@dataclass
class Outcome:
    """What a finished run has reached."""
    nats: float  # the best model's loss per token on the whole validation part
    bits: float  # the same in bits per character
    seconds: float
    best_step: int  # at which the best model was found; 0 if training only made it worse

def mean_and_spread(numbers: list[float]) -> str:
    """The mean, and the standard deviation if there are several numbers.

    >>> mean_and_spread([1.0, 2.0])
    '1.5000 ± 0.7071'
    """
    spread = f" ± {statistics.stdev(numbers):.4f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.4f}{spread}"

def variants_of(typed: dict) -> dict[str, dict]:
    """What would have to be typed for each variant that --vary FIELD=A,B,C names, by its label.

    If tokenizers are compared, --bpe_size is that of the byte-pair encoding alone."""
    vary = f"--vary {typed.get('vary', 'is missing')}"
    name, _, values = typed.get("vary", "").partition("=")
    name = name.replace("-", "_")
    if name not in SETTINGS - {"seed", "preset"} or not values:
        raise UserError(f"{vary}: type what to compare, as FIELD=A,B,C, for instance "
                        "norm=none,rmsnorm. FIELD is a setting of the model or of training other "
                        "than seed and preset")
    if name in typed:
        raise UserError(f"--{name} {typed[name]}: {vary} chooses it; leave the flag out")
    variants = {}
    for value in map(str.strip, values.split(",")):
        flag = f"--{name}={value}"
        if name in SWITCHES:
            flag = {"true": f"--{name}", "false": f"--no_{name}"}.get(value.lower())
        if flag is None:
            raise UserError(f"{vary}: {name} can be true or false")
        if f"{name}={value}" in variants:
            raise UserError(f"{vary}: has {value} twice; name each value once")
        variants[f"{name}={value}"] = {**typed, **parse(["--mode", "ablate", flag])}
    for variant in variants.values():
        if "tokenizer=bpe" in variants and variant["tokenizer"] != "bpe":
            variant.pop("bpe_size", None)
    return variants

def run_ablate(typed: dict) -> None:
    """--mode ablate: prints a table to stdout and draws curves.png."""
    options, variants = settings_of(typed, Options), variants_of(typed)
    if is_stream(Path(options.data)):
        raise UserError(f"--data {options.data}: each run reads the text, and a pipe can be read "
                        "only once; name a file")
    name = options.vary.partition("=")[0].replace("-", "_")
    folder = Path(options.out_dir) / f"ablate_{name}"
    preset = choose_preset(typed, find_device(options.device))
    # Without an explicit max_steps, a small text would shorten each variant differently.
    common = {"sample_tokens": 0, "checkpoint_interval": 0, "log_interval": 100,
              "max_steps": training_settings(preset, next(iter(variants.values()))).max_steps}
    first_seed = typed.get("seed", RunConfig.seed)
    runs = {}  # what would have to be typed for each run, by label and seed
    for seed in range(first_seed, first_seed + options.seeds):
        for label, variant in variants.items():
            out_dir = folder / f"{label}_seed={seed}"
            runs[label, seed] = {**common, **variant, "seed": seed, "out_dir": str(out_dir),
                                 "resume": bool(files_of_run(out_dir))}
    check_runs(runs, preset)
    outcomes = {label: [] for label in variants}
    try:
        for number, ((label, seed), run) in enumerate(runs.items(), start=1):
            say(f"---- run {number} of {len(runs)}: {label}, seed {seed}")
            try:
                outcomes[label].append(run_train(run))
            except Diverged as problem:
                outcomes[label].append(None)
                say(str(problem))
    finally:  # reports the finished runs even if the command is stopped
        report_ablation(folder, runs, outcomes, options.seeds)

def check_runs(runs: dict[tuple, dict], preset: str) -> None:
    """Builds each variant once, so that a mistake is found before the first one is trained. Raises
    UserError, also if a folder holds a run with other settings or another text, for instance of an
    earlier command. Its loss would otherwise be shown as the result of this one."""
    wanted = {}  # the settings and the text of each variant, by label
    for (label, seed), typed in runs.items():
        if label not in wanted:
            start = new_run(typed, preset)
            wanted[label] = {"text": start.text.sha256, **asdict(start.config),
                             **asdict(start.model.config)}
        latest = Path(typed["out_dir"], "latest.pt")
        if not latest.exists():
            continue
        state = read_checkpoint(latest)
        held = {"text": state["corpus"]["sha256"], **state["model_config"], **state["train_config"]}
        for name, value in {**wanted[label], "seed": seed}.items():
            if held[name] != value:
                what = "another text" if name == "text" else (
                    f"--{name} {held[name]}, but this command needs {value}")
                raise UserError(f"--out_dir {latest.parent}: holds a run with {what}; name another "
                                "--out_dir")

def report_ablation(folder: Path, runs: dict, outcomes: dict[str, list], seeds: int) -> None:
    """Draws the curves of all runs that were begun, and prints the table."""
    if not any(outcomes.values()):
        return
    curves = {f"{label}, seed {seed}": (Path(run["out_dir"]), "val_loss")
              for (label, seed), run in runs.items() if outcomes[label]}
    draw_curves(folder / "curves.png", curves, "validation loss, nats per token")
    rows = ["| variant | nats/token | perplexity | bits/character | seconds | best step | seeds |",
            "|---|---|---|---|---|---|---|"]
    rows += [table_row(label, outcomes[label], seeds) for label in outcomes]
    write_result("\n".join(rows))

def table_row(label: str, outcomes: list[Outcome | None], seeds: int) -> str:
    """One line of the table of an ablation. An outcome is None if the run has diverged."""
    done = [outcome for outcome in outcomes if outcome is not None]
    if not done:
        what = "diverged" if outcomes else "not run"
        return f"| {label} |{5 * f' {what} |'} 0 of {seeds} |"
    nats = [run.nats for run in done]
    columns = [nats, map(perplexity, nats), [run.bits for run in done],
               [run.seconds for run in done]]
    means = " | ".join([mean_and_spread([*column]) for column in columns])
    steps = ", ".join([str(run.best_step or "0 (not trained)") for run in done])
    return f"| {label} | {means} | {steps} | {len(done)} of {seeds} |"

# ---- Benchmark -----------------------------------------------------------------------------------
# A speed means nothing without the machine. --mode bench measures this one, with whole windows. The
# last row compares the training with the product of two large matrices in the same number format,
# which is about the most that the device can do.
def rate_of(work: int, seconds: float, function) -> float:
    """Units of work per second, if one call of the function does so many."""
    from torch.utils.benchmark import Timer  # warms up, and waits for the device

    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return work / timer.blocked_autorange(min_run_time=seconds).median

def run_bench(typed: dict) -> None:
    """--mode bench: prints a table to stdout."""
    options = settings_of(typed, Options)
    n = settings_of(typed, WritingConfig).max_tokens
    device = find_device(options.device)
    preset = choose_preset(typed, device)
    config = training_settings(preset, typed)
    config = replace(config, grad_accum=1, dtype=find_dtype(config.dtype, device))
    vocab_sizes = {"char": 65, "bpe": config.bpe_size, "gpt2": GPT2_SIZE}
    sizes = model_settings(preset, typed, vocab_sizes[config.tokenizer])
    if sizes.model != "gpt":
        raise UserError(f"--preset {preset}: bench measures a GPT; choose another preset")
    model = new_model(sizes, config.seed).to(device)
    runner = wrap(model, config)
    optimizer = OPTIMIZERS[config.optimizer](model, config)
    x, y = torch.randint(sizes.vocab_size, (2, config.batch_size, sizes.block_size))
    matrix = torch.randn(2048, 2048, device=device).to(getattr(torch, config.dtype))
    start = torch.zeros(1, 1, dtype=torch.long)

    def rate(work: int, function) -> float:
        return rate_of(work, options.bench_seconds, function)

    trained = rate(x.numel(), lambda: train_step(runner, optimizer, [(x, y)], config))
    flops = flops_per_token(model)
    possible = rate(2 * 2048**3, lambda: matrix @ matrix)
    rows = {"parameters": count_parameters(model),
            **{f"- {part}": count for part, count in parameters_by_part(model).items()},
            "training, tokens/s": trained, "training, FLOPs per token": flops,
            "training, million FLOPs/s": flops * trained / 1e6,
            "matrix products alone, million FLOPs/s": possible / 1e6,
            "utilization, percent": 100 * flops * trained / possible,
            "writing, tokens/s": rate(n, lambda: model.generate(start, n))}
    if isinstance(new_reader(model), CachedReader):
        rows["writing, without the cache"] = rate(n, lambda: model.generate(
            start, n, reader=lambda idx: read_window(model, idx)))
    write_result(f"| {preset}: {device}, {config.dtype}, {torch.get_num_threads()} threads, "
                 f"PyTorch {torch.__version__} | |\n|---|---|")
    for name, value in rows.items():
        write_result(f"| {name} | {value:,.0f} |")

# ---- Exchange: GPT-2's form ----------------------------------------------------------------------
# Problem   A model should run in the programs that people already use.
# Answer    Such programs read a folder with config.json (the name of an architecture, and its
#           sizes), model.safetensors (the weights, under the names of that architecture) and
#           tokenizer.json. We write two architectures: GPT-2, which is Part I, and Qwen3, which is
#           the end of Part II. A model that fits neither is refused.
# GPT-2     has our names for the layers. Three things differ: it stores the matrices of its Linear
#           layers transposed, (in, out); it always has biases, so we write zeros where we have
#           none; and some programs expect an MLP of exactly 4 C hidden units. A smaller one is
#           filled up with units whose weights are zero. They compute GELU(0) = 0, which changes
#           nothing.
# Refusal   A form lists the values of each setting that it can hold. A setting that it does not
#           list, for instance one that you add, must have its default value.
def refuse_settings(config: ModelConfig, form: str, allowed: dict) -> None:
    """Raises UserError, naming the setting, for the first one whose value the form cannot hold."""
    for setting in fields(ModelConfig):
        name, value = setting.name, getattr(config, setting.name)
        values = allowed.get(name, (setting.default,))
        if name not in IN_BOTH_FORMS and value not in values:
            choices = " or ".join(map(str, values))
            raise UserError(f"{name}={value}: {form}'s form needs {choices}, so other programs "
                            "cannot run this model")

IN_BOTH_FORMS = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_ratio", "dropout",
                 "tie_weights", "norm_scale"}  # whatever their value is
LAYER_NORMS = ("layernorm", "fused_layernorm")
GPT2_FORM = {"attention": ("explicit", "extended", "fused"), "pos": ("learned", "sinusoidal"),
             "norm": LAYER_NORMS, "bias": (True, False)}

def pad_with_zeros(tensor, dim: int, size: int):
    """Fills a dimension up with zeros to this size."""
    # F.pad takes what to add before and after each dimension, beginning with the last dimension.
    added = [0, 0] * (tensor.dim() - dim)
    added[-1] = size - tensor.shape[dim]
    return F.pad(tensor, added)

def to_gpt2(model: GPT) -> tuple[dict, dict]:
    """GPT-2's config.json and tensors for a model. Raises UserError for a setting that it lacks."""
    c = model.config
    refuse_settings(c, "GPT-2", GPT2_FORM)
    tensors = dict(model.state_dict())
    hidden = max(4 * c.n_embd, tensors["h.0.mlp.c_proj.weight"].shape[1])
    for name, w in list(tensors.items()):
        if ".mlp.c_fc." in name:
            w = pad_with_zeros(w, 0, hidden)
        if name.endswith(".mlp.c_proj.weight"):
            w = pad_with_zeros(w, 1, hidden)
        is_linear = ".c_" in name and w.dim() == 2
        is_norm = name.endswith(".weight") and w.dim() == 1
        if is_linear or is_norm:
            tensors.setdefault(name.removesuffix("weight") + "bias", w.new_zeros(w.shape[0]))
        tensors[name] = w.t() if is_linear else w
    if c.tie_weights:
        del tensors["lm_head.weight"]
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
              "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size,
              "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": hidden,
              "activation_function": "gelu_new", "layer_norm_epsilon": LayerNorm.eps,
              "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
              "tie_word_embeddings": c.tie_weights}
    return config, tensors

# ---- Exchange: Qwen3's form ----------------------------------------------------------------------
# Qwen3     has RMSNorm, RoPE, QK-norm, shared keys and values, SwiGLU and no biases. A model with
#           exactly these parts only
#           needs other names. But `laptop` has LayerNorm and squared ReLU. A change of its weights
#           makes it a Qwen3 with the same outputs, up to rounding. (The next chapter adds its
#           previous-position heads.)
# Centring  LayerNorm without bias is RMSNorm of x - mean(x) [Jiang et al. 2023, section 3]. So if
#           the mean of x is always zero, both norms agree. The residual stream is the sum of a row
#           of the token table and of the outputs of the c_proj layers. Subtract from each row of
#           the table its mean, and from each column of a c_proj its mean over the output channels:
#           then every term of the sum has mean zero. No LayerNorm notices, because it subtracts the
#           mean anyway. The output head keeps the old table, so it is a matrix of its own now.
#           Queries and keys are centred in the same way, within each head.
# Gating    relu(u)^2 = limit of silu(b u) (u / b) for large b. SwiGLU computes silu(gate) * up, so
#           the gate gets the weights b W and `up` gets W / b.
# Example   With b = 1024, the two differ by less than 5e-7, for every u:
#
# >>> u = torch.linspace(-4.0, 4.0, 100_001, dtype=torch.float64)
# >>> gated = F.silu(1024 * u) * (u / 1024)
# >>> (gated - F.relu(u).square()).abs().max().item() < 5e-7
# True
QWEN3_FORM = {"attention": ("extended", "fused"), "pos": ("rope",), "qk_norm": (True,),
              "bias": (False,), "norm": ("rmsnorm", *LAYER_NORMS),
              "activation": ("swiglu", "relu2"), "prev_heads": range(1001),
              "n_kv_head": (None, *range(1, 1001))}
GATE_FACTOR = 1024.0  # b: larger values overflow in float16

def centre(w, groups: int = 1):
    """Subtracts from each column of a matrix its mean over the rows of each group of rows."""
    w = w.unflatten(0, (groups, -1))  # (groups, rows / groups, columns)
    return (w - w.mean(dim=1, keepdim=True)).flatten(0, 1)

def to_qwen3(model: GPT) -> tuple[dict, dict]:
    """Qwen3's config.json and tensors for a model. Raises UserError for a setting that it lacks."""
    c = model.config
    refuse_settings(c, "Qwen3", QWEN3_FORM)
    if c.prev_heads and c.n_embd // c.n_head < 4:
        raise UserError(f"prev_heads={c.prev_heads}: Qwen3's form needs heads of at least 4 "
                        f"channels for them, but n_embd / n_head is {c.n_embd // c.n_head}")
    ours = {name: w.double() for name, w in model.state_dict().items()}
    has_layer_norm = c.norm in LAYER_NORMS
    tensors = {"model.embed_tokens.weight": ours["wte.weight"],
               "model.norm.weight": ours["ln_f.weight"]}
    if has_layer_norm:
        tensors["model.embed_tokens.weight"] = centre(ours["wte.weight"].t()).t()  # each row
    if has_layer_norm or not c.tie_weights or c.prev_heads:
        tensors["lm_head.weight"] = ours["lm_head.weight"]
    for i in range(c.n_layer):
        prefix = f"h.{i}."
        block = {name.removeprefix(prefix): w for name, w in ours.items()
                 if name.startswith(prefix)}
        theirs = to_qwen3_block(block, c, has_layer_norm)
        if c.prev_heads:
            theirs = add_previous_heads(theirs, c)
        for name, w in theirs.items():
            tensors[f"model.layers.{i}.{name}"] = w
    hidden = tensors["model.layers.0.mlp.up_proj.weight"].shape[0]
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
              "vocab_size": c.vocab_size, "hidden_size": c.n_embd, "intermediate_size": hidden,
              "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
              "num_key_value_heads": c.kv_heads, "head_dim": c.n_embd // c.n_head,
              "hidden_act": "silu", "rms_norm_eps": RMSNorm.eps, "attention_bias": False,
              "attention_dropout": c.dropout, "max_position_embeddings": c.block_size,
              "rope_theta": 10000.0,
              "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
              "tie_word_embeddings": "lm_head.weight" not in tensors}
    if c.prev_heads:
        tensors.update(add_constant(tensors, c))
        config.update(wider_config(c))
    return config, {name: w.float() for name, w in tensors.items()}

def to_qwen3_block(block: dict, c: ModelConfig, has_layer_norm: bool) -> dict:
    """The tensors of one block, from ours."""
    n_kv = c.kv_heads
    width = n_kv * c.n_embd // c.n_head
    q, k, v = block["attn.c_attn.weight"].split([c.n_embd, width, width])
    if c.prev_heads and n_kv < c.n_head:  # all heads get keys and values of their own
        group = c.n_head // n_kv
        k = k.unflatten(0, (n_kv, -1)).repeat_interleave(group, dim=0).flatten(0, 1)
        v = v.unflatten(0, (n_kv, -1)).repeat_interleave(group, dim=0).flatten(0, 1)
        n_kv = c.n_head
    v = torch.cat([v, block.get("attn.c_prev.weight", v[:0])])  # those of all heads
    attn_out, mlp_out = block["attn.c_proj.weight"], block["mlp.c_proj.weight"]
    if has_layer_norm:
        q, k = centre(q, groups=c.n_head), centre(k, groups=n_kv)
        attn_out, mlp_out = centre(attn_out), centre(mlp_out)
    if c.activation == "swiglu":
        gate, up = block["mlp.c_fc.weight"].chunk(2)
    else:
        gate = GATE_FACTOR * block["mlp.c_fc.weight"]
        up = block["mlp.c_fc.weight"] / GATE_FACTOR
    hidden = math.ceil(len(up) / 32) * 32  # some formats pack weights in groups of 32
    return {"input_layernorm.weight": block["ln_1.weight"],
            "post_attention_layernorm.weight": block["ln_2.weight"],
            "self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v, "self_attn.o_proj.weight": attn_out,
            "self_attn.q_norm.weight": block["attn.q_norm.weight"],
            "self_attn.k_norm.weight": block["attn.k_norm.weight"],
            "mlp.gate_proj.weight": pad_with_zeros(gate, 0, hidden),
            "mlp.up_proj.weight": pad_with_zeros(up, 0, hidden),
            "mlp.down_proj.weight": pad_with_zeros(mlp_out, 1, hidden)}

# ---- Exchange: previous-position heads -----------------------------------------------------------
# Problem   Qwen3 has no previous-position heads. But an ordinary attention head can be built by
#           hand that does the same.
# Constant  Its query and key must not depend on the text. So the residual stream gets one more
#           channel. The token table puts the same small number c into it for every token, and
#           nothing else adds to it. (The stream grows by 32 channels, because some formats pack
#           weights in groups of 32. The others stay 0.) The query and the key of a
#           previous-position head read this channel alone, and QK-norm removes its size.
# Norms     An RMSNorm now takes its mean over C' = C + 32 channels instead of C. The sum of squares
#           grows by c^2 only. With the gains times sqrt(C / C') and the epsilon
#           (C eps - c^2) / C', the result is the same. The constant itself gets a gain of 256,
#           which makes it as large as the other channels. Programs that compute in 8 bits need
#           that: they round all channels by one scale, and a channel that is much smaller than the
#           others would become 0. It also makes queries and keys so large that the epsilon of
#           QK-norm has no effect.
# Position  RoPE turns pair p of a query at position t by the angle t w_p. Let the key have (1, 0)
#           in a pair, and the query (1, 0) turned back by one position. Then their product is
#           cos((t - 1 - s) w_p) for a key at position s, which is largest for s = t - 1. Summed
#           over eight pairs of different speeds, it is 8 at s = t - 1 and at most 7.2 elsewhere
#           (for hs = 64). Large gains in QK-norm stretch this difference to 30, so the softmax puts
#           practically all its weight on s = t - 1. (At position 0, it can only read itself.)
# Pairs     A previous-position head needs pairs of its own, because all heads share the gains of
#           QK-norm, and the ordinary heads must not get such large ones. So the head size doubles.
#           Pair i of an ordinary head becomes pair 2i, whose speed in a head of twice the size is
#           the same: 10000^(-2(2i) / (2 hs)). The odd pairs are zero in ordinary heads and free for
#           the previous-position heads.
# Scale     In a head of twice the size, half of whose channels are 0, QK-norm makes the others
#           sqrt(2) times as large. So scores are twice as large, and they are divided by
#           sqrt(2 hs) instead of sqrt(hs). Dividing the gain of the keys by sqrt(2) makes up for
#           both.
EXTRA_CHANNELS = 32
CONSTANT = 0.004  # c
FIXED_LEAD = 30.0  # by how much the score of the previous position exceeds all others
CONSTANT_GAIN = 256.0

def wider_config(c: ModelConfig) -> dict:
    """The entries of config.json that change."""
    C, wide = c.n_embd, c.n_embd + EXTRA_CHANNELS
    n_head = c.n_head + c.prev_heads
    return {"hidden_size": wide, "head_dim": 2 * C // c.n_head, "num_attention_heads": n_head,
            "num_key_value_heads": n_head,
            "rms_norm_eps": (C * RMSNorm.eps - CONSTANT**2) / wide}

def widen_norm(w):
    """The gains of an RMSNorm of the wider stream."""
    C = len(w)
    wide = C + EXTRA_CHANNELS
    w = pad_with_zeros(w * math.sqrt(C / wide), 0, wide)
    w[C] = CONSTANT_GAIN
    return w

def add_constant(tensors: dict, c: ModelConfig) -> dict:
    """The tensors outside of the blocks, for the wider stream."""
    wide = c.n_embd + EXTRA_CHANNELS
    table = pad_with_zeros(tensors["model.embed_tokens.weight"], 1, wide)
    table[:, c.n_embd] = CONSTANT
    return {"model.embed_tokens.weight": table,
            "model.norm.weight": widen_norm(tensors["model.norm.weight"]),
            "lm_head.weight": pad_with_zeros(tensors["lm_head.weight"], 1, wide)}

def add_previous_heads(block: dict, c: ModelConfig) -> dict:
    """A block of Qwen3 with the previous-position heads as ordinary heads."""
    changed = {**block, **queries_and_keys(block, c)}
    wide = c.n_embd + EXTRA_CHANNELS
    hs = 2 * c.n_embd // c.n_head  # the second half of each head is zero
    heads = (c.n_head + c.prev_heads, -1)
    v = block["self_attn.v_proj.weight"].unflatten(0, heads)
    out = block["self_attn.o_proj.weight"].unflatten(1, heads)
    changed["self_attn.v_proj.weight"] = pad_with_zeros(v, 1, hs).flatten(0, 1)
    changed["self_attn.o_proj.weight"] = pad_with_zeros(out, 2, hs).flatten(1)
    for name in ("self_attn.v_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"):
        changed[name] = pad_with_zeros(changed[name], 1, wide)  # they read the stream
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        changed[name] = pad_with_zeros(changed[name], 0, wide)  # they add to it
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        changed[name] = widen_norm(block[name])
    return changed

def queries_and_keys(block: dict, c: ModelConfig) -> dict:
    """The weights and the gains of queries and keys, for all heads, in heads of twice the size."""
    C, hs = c.n_embd, c.n_embd // c.n_head
    wide = C + EXTRA_CHANNELS
    # The odd pairs that the previous-position heads use, and the speeds of RoPE there.
    pairs = slice(1, min(2 * 8, hs), 2)
    speeds = 10000.0 ** (-torch.arange(hs).double()[pairs] / hs)
    turned_back = torch.stack([speeds.cos(), -speeds.sin()])  # (2, pairs): by one position
    straight = torch.tensor([[1.0], [0.0]])  # the same in each pair
    # Half of the channels are zero now, and the epsilon has changed. With this factor, QK-norm
    # gives exactly sqrt(2) times what it gave before.
    scale = math.sqrt(2 * wider_config(c)["rms_norm_eps"] / RMSNorm.eps)
    changed = {}
    for letter, fixed, gain in (("q", turned_back, 1.0), ("k", straight, math.sqrt(0.5))):
        name = f"self_attn.{letter}_proj.weight"
        w = block[name].unflatten(0, (c.n_head, 2, -1))
        # (heads, first or second channel of a pair, pair, input channel)
        heads = w.new_zeros(c.n_head + c.prev_heads, 2, hs, wide)
        heads[: c.n_head, :, ::2, :C] = scale * w
        heads[c.n_head :, :, pairs, C] = fixed
        changed[name] = heads.flatten(0, 2)
        name = f"self_attn.{letter}_norm.weight"
        gains = w.new_zeros(2, hs)
        gains[:, ::2] = gain * block[name].unflatten(0, (2, -1))
        gains[:, pairs] = fixed_gain(speeds, c.block_size, hs)
        changed[name] = gains.flatten()
    return changed

def fixed_gain(speeds, block_size: int, hs: int) -> float:
    """The gain that makes the score of the previous position exceed all others by FIXED_LEAD. (The
    share of the others in the softmax is then at most block_size exp(-FIXED_LEAD).)"""
    if block_size == 1:
        return 1.0  # there is no other position
    distances = torch.arange(-1.0, block_size - 1).double()  # t - 1 - s, from s = t backwards
    sums = torch.outer(distances, speeds).cos().sum(dim=1)
    sums[1] = -math.inf  # the previous position itself, whose sum is the number of pairs
    n_pairs = len(speeds)
    # After QK-norm, each of the pairs has the length sqrt(2 hs / n_pairs).
    lead = math.sqrt(2 * hs) / n_pairs * (n_pairs - sums.max().item())
    return math.sqrt(FIXED_LEAD / lead)

# ---- Exchange: writing the folder ----------------------------------------------------------------
# Chat      Chat clients put marks between the messages, by a template of the model. Ours have
#           learned no such marks, so the template only passes the text on.
# Padding   To process texts of different lengths side by side, programs fill up the shorter ones
#           on the left. The attention mask hides what they fill in, so it may be any token. For
#           characters, it is the last one. The two entries about added tokens say that it is not
#           special otherwise; transformers would leave out a special token when it decodes.
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"

def tokenizer_files(tokenizer) -> dict[str, dict]:
    """The files that the library `tokenizers` reads, by name."""
    plain = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    if tokenizer.kind == "char":  # byte-pair encoding without merges
        model = {"type": "BPE", "vocab": tokenizer.stoi, "merges": []}
        last = {"id": tokenizer.vocab_size - 1, "content": tokenizer.itos[-1], **plain,
                "special": False}
        rules = {"pre_tokenizer": None, "decoder": {"type": "Fuse"}, "added_tokens": [last]}
        special = {"pad_token": tokenizer.itos[-1], "added_tokens_decoder": {}}
    else:
        vocab = tokenizer.vocab()
        merges = [f"{show_bytes(a)} {show_bytes(b)}" for a, b in tokenizer.merges]
        model = {"type": "BPE", "vocab": vocab, "merges": merges}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": True}
        end = {"id": tokenizer.end_id, "content": END_OF_TEXT, **plain, "special": True}
        rules = {"pre_tokenizer": byte_level, "added_tokens": [end],
                 "decoder": {"type": "Sequence", "decoders": [byte_level]}}
        special = dict.fromkeys(["bos_token", "eos_token", "unk_token", "pad_token"], END_OF_TEXT)
    return {"tokenizer.json": {"version": "1.0", "truncation": None, "padding": None,
                               "normalizer": None, "post_processor": None, **rules, "model": model},
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **special,
                                      "model_input_names": ["input_ids", "attention_mask"],
                                      "clean_up_tokenization_spaces": False,
                                      "padding_side": "left", "chat_template": CHAT_TEMPLATE}}

def write_folder(folder: Path, config: dict, tensors: dict, tokenizer, block_size: int) -> None:
    """Writes the folder, completely or not at all. Raises UserError if it holds something already,
    and ImportError without safetensors."""
    from safetensors.torch import save

    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--export_dir {folder}: this folder is not empty; empty it, or name "
                        "another one")
    special = {name: tokenizer.end_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = tokenizer_files(tokenizer)
    files["config.json"] = {**config, **special, "dtype": "float32", "torch_dtype": "float32"}
    files["generation_config.json"] = {"do_sample": True, "temperature": 0.8, "top_k": 0,
                                       "max_length": block_size, **special}
    files["tokenizer_config.json"]["model_max_length"] = block_size
    folder = folder.resolve()  # so that it has a name, even where "." or a link was typed
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        contiguous = {name: w.contiguous() for name, w in tensors.items()}
        (partial / "model.safetensors").write_bytes(save(contiguous, metadata={"format": "pt"}))
        if tokenizer.kind == "bpe":
            tokenizer.save(partial)
        if folder.exists():
            folder.rmdir()  # it is empty
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

# ---- Exchange: a GGUF file -----------------------------------------------------------------------
# Problem   llama.cpp, and the programs that are built on it, do not read such a folder.
# GGUF      is their format: one file with the settings, the tokenizer and the tensors. The tensors
#           are those of the folder under other names, and every matrix is stored as (out, in). The
#           package gguf knows these names and how the file is laid out.
# Types     Matrices can be stored in fewer bits. f16 and bf16 use 16 bits for each number. q8_0
#           uses 8 bits for each number, plus one scale for each group of 32 numbers. Position
#           vectors, gains and biases stay in 32 bits.
# Subtle    A GGUF file names one of llama.cpp's own tokenizers. For characters we name "rwkv",
#           which looks for the longest token that fits and needs no merges. It expects control
#           characters and backslashes to be escaped. (Its "gpt2" would need merges, and it would
#           take the token 11, a semicolon in Shakespeare, for the end of a text.)
GGUF_TYPES = ["f32", "f16", "bf16", "q8_0"]

# The settings of a GGUF file, by the methods of the package gguf, and their names in config.json.
GGUF_SETTINGS = {
    "gpt2": {"context_length": "n_positions", "embedding_length": "n_embd",
             "block_count": "n_layer", "feed_forward_length": "n_inner", "head_count": "n_head",
             "layer_norm_eps": "layer_norm_epsilon"},
    "qwen3": {"context_length": "max_position_embeddings", "embedding_length": "hidden_size",
              "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
              "head_count": "num_attention_heads", "head_count_kv": "num_key_value_heads",
              "key_length": "head_dim", "value_length": "head_dim",
              "layer_norm_rms_eps": "rms_norm_eps", "rope_freq_base": "rope_theta"}}

def add_gguf_tokenizer(writer, tokenizer) -> None:
    """The tokens, and how a text is split into them."""
    NORMAL, CONTROL = 1, 3  # kinds of tokens
    writer.add_chat_template(CHAT_TEMPLATE)
    if tokenizer.kind == "char":
        escaped = [c.encode("unicode_escape").decode() if c < " " or c == "\\" else c
                   for c in tokenizer.itos]
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(escaped)
        writer.add_token_types([NORMAL] * len(escaped))
        return
    tokens = list(tokenizer.vocab())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token == END_OF_TEXT else NORMAL for token in tokens])
    writer.add_token_merges([f"{show_bytes(a)} {show_bytes(b)}" for a, b in tokenizer.merges])
    writer.add_bos_token_id(tokenizer.end_id)
    writer.add_eos_token_id(tokenizer.end_id)
    writer.add_add_bos_token(False)

def write_gguf(path: Path, config: dict, tensors: dict, tokenizer, kind: str) -> None:
    """Writes a GGUF file, completely or not at all. Raises UserError if it exists, or for what such
    a file cannot hold or llama.cpp cannot load, and ImportError without the package gguf."""
    import gguf

    if path.exists():
        raise UserError(f"{path}: exists already; remove it, or name another --export_dir")
    if tokenizer.kind == "bpe" and not tokenizer.merges:
        raise UserError("--format gguf: llama.cpp cannot load byte-pair tokens without merges; "
                        "train with a larger --bpe_size")
    form = config["model_type"]
    settings = {method: config[name] for method, name in GGUF_SETTINGS[form].items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[form.upper()], settings["block_count"])
    matrix_type = gguf.GGMLQuantizationType[kind.upper()]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, form)
    for method, value in settings.items():
        getattr(writer, f"add_{method}")(value)
    prefix = "ALL" if kind == "f32" else "MOSTLY"  # vectors are always in f32
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{kind.upper()}"])
    add_gguf_tokenizer(writer, tokenizer)
    for name, w in tensors.items():
        if ".c_" in name and w.dim() == 2:
            w = w.t()  # GPT-2's folder has (in, out)
        array = w.contiguous().numpy()
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if w.dim() == 1 or name == "wpe.weight":
            writer.add_tensor(gguf_name, array)
            continue
        if kind == "q8_0" and w.shape[1] % 32:
            raise UserError(f"--gguf_type q8_0: packs rows in groups of 32 numbers, but "
                            f"{gguf_name} has rows of {w.shape[1]}; use --gguf_type f16")
        packed = gguf.quants.quantize(array, matrix_type)
        writer.add_tensor(gguf_name, packed, raw_dtype=matrix_type)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

# ---- Exchange: the command -----------------------------------------------------------------------
# The positions decide the form: a model with RoPE becomes a Qwen3, and any other a GPT-2. A setting
# that the form lacks is refused.
def run_export(typed: dict) -> None:
    """--mode export: a folder or a file that other programs load without any code of ours."""
    options = settings_of(typed, Options)
    if options.format != "gguf" and options.gguf_type != Options.gguf_type:
        raise UserError(f"--gguf_type {options.gguf_type}: belongs to --format gguf; add that, or "
                        "leave this flag out")
    used = load_for_use(options)
    model, tokenizer = used.model.cpu(), used.tokenizer
    if model.config.model == "bigram":
        raise UserError("model=bigram: other programs run GPTs; they have no bigram model")
    form = "Qwen3" if model.config.pos == "rope" else "GPT-2"
    config, tensors = to_qwen3(model) if form == "Qwen3" else to_gpt2(model)
    if options.format == "gguf":
        path = Path(options.export_dir or options.out_dir, "model.gguf")
        write_gguf(path, config, tensors, tokenizer, options.gguf_type)
    else:
        path = Path(options.export_dir or Path(options.out_dir, "hf"))
        write_folder(path, config, tensors, tokenizer, model.config.block_size)
    programs = "llama.cpp" if options.format == "gguf" else "transformers and other programs"
    write_result(f"wrote {path}: a model in {form}'s form, for {programs}")

# ---- Exchange: reading a GPT-2 -------------------------------------------------------------------
# The other direction: a folder with a GPT-2 of any size, such as OpenAI's own. A folder with a
# setting that our model does not have is refused.
GPT2_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf"}
GPT2_NEEDS = {"model_type": ["gpt2"], "layer_norm_epsilon": [LayerNorm.eps],
              "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
              "add_cross_attention": [False], "activation_function": list(GPT2_ACTIVATIONS)}

def read_json(path: Path) -> dict:
    """A JSON file. Raises UserError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: has no {path.name}; name a folder with a GPT-2, or the "
                        ".pt file of a run") from None
    except ValueError:
        raise UserError(f"{path}: this file is damaged; fetch it again") from None

def read_gpt2_config(folder: Path) -> ModelConfig:
    """The ModelConfig that corresponds to config.json. Raises UserError if none does."""
    # A setting that is missing has GPT-2's value, but model_type must be there.
    defaults = {name: values[0] for name, values in GPT2_NEEDS.items()}
    theirs = {**defaults, "model_type": None, **read_json(folder / "config.json")}
    for name, values in GPT2_NEEDS.items():
        if theirs[name] not in values:
            raise UserError(f"{folder}: its {name} is {theirs[name]}, but only "
                            f"{' or '.join(map(str, values))} can be used here")
    n_embd = theirs["n_embd"]
    hidden = theirs.get("n_inner") or 4 * n_embd  # null means 4 C
    try:
        return ModelConfig(
            vocab_size=theirs["vocab_size"], block_size=theirs["n_positions"],
            n_layer=theirs["n_layer"], n_head=theirs["n_head"], n_embd=n_embd,
            mlp_ratio=hidden / n_embd, dropout=theirs.get("resid_pdrop", 0.1),
            activation=GPT2_ACTIVATIONS[theirs["activation_function"]], attention="fused",
            norm="fused_layernorm", tie_weights=theirs.get("tie_word_embeddings", True))
    except UserError as problem:
        raise UserError(f"{folder}: its config.json has sizes that do not fit: {problem}") from None

def read_tensors(folder: Path) -> dict:
    """All tensors of a folder, from one file or from several."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    tensors = {}
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder}: has no {name}; the weights must be in safetensors files")
        try:
            tensors.update(load_file(folder / name))
        except Exception as problem:  # safetensors has its own kinds of errors
            raise UserError(f"{folder / name}: this file is damaged ({type(problem).__name__}); "
                            "fetch it again") from None
    return tensors

def from_gpt2(theirs: dict, config: ModelConfig) -> dict:
    """Our state dictionary from GPT-2's tensors. Rows beyond vocab_size are left out."""
    ours = {}
    for name, w in theirs.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # old files store the causal mask
        if ".c_" in name and w.dim() == 2:
            w = w.t()
        if name in ("wte.weight", "lm_head.weight"):
            w = w[: config.vocab_size]
        ours[name] = w.float().contiguous()
    if config.tie_weights and "wte.weight" in ours:
        ours["lm_head.weight"] = ours["wte.weight"]
    return ours

def read_tokenizer(folder: Path):
    """The tokenizer of a folder: characters, or byte pairs with GPT-2's ids."""
    if (folder / "merges.txt").exists() and (folder / "vocab.json").exists():
        return BPETokenizer.load(folder)
    theirs = read_json(folder / "tokenizer.json")
    model = theirs["model"]
    pre = theirs.get("pre_tokenizer") or {}
    is_bpe = model["type"] == "BPE" and theirs.get("normalizer") is None
    if is_bpe and not model["merges"] and not pre:
        return CharTokenizer(sorted(model["vocab"], key=model["vocab"].get))
    as_gpt2 = (pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space", True)
               and pre.get("use_regex", True))
    if not (is_bpe and as_gpt2):
        raise UserError(f"{folder}: its tokenizer.json does not split a text as GPT-2 does")
    # Newer files store a merge as a pair, older ones as a line.
    lines = []
    for merge in model["merges"]:
        lines.append(merge if isinstance(merge, str) else " ".join(merge))
    tokenizer = BPETokenizer.from_shown(lines)
    vocab = {**model["vocab"], END_OF_TEXT: tokenizer.end_id}
    if vocab != tokenizer.vocab():
        raise UserError(f"{folder}: tokenizer.json does not number its tokens as GPT-2 does")
    return tokenizer

def read_folder(folder: Path) -> LoadedModel:
    """The model of a folder with a GPT-2. Nothing in it is executed. Raises UserError if it is
    damaged or not supported."""
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter, not a whole model; merge it into its model "
                        "first")
    for path in files_of_run(folder):
        if path.suffix == ".pt":
            raise UserError(f"{folder}: this is the folder of a run; name the file {path}")
    try:
        config = read_gpt2_config(folder)
        tokenizer = read_tokenizer(folder)
        n = tokenizer.vocab_size
        if n > config.vocab_size:
            raise UserError(f"{folder}: its tokenizer has {n} tokens, but its model has only "
                            f"{config.vocab_size}")
        if n < config.vocab_size:
            say(f"{folder}: the model has {config.vocab_size} tokens and the tokenizer {n}; the "
                "others are ignored")
        config = replace(config, vocab_size=n)
        model = GPT(config)
    except (UserError, OSError, MemoryError):
        raise
    except Exception as problem:  # wrong types and sizes can make many things fail
        raise UserError(f"{folder}: its config.json or its tokenizer is damaged, or the model does "
                        f"not fit into the memory ({type(problem).__name__}: {problem}); fetch it "
                        "again, or use a smaller model") from None
    weights = from_gpt2(read_tensors(folder), config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        raise UserError(f"{folder}: its tensors do not fit its settings: "
                        f"{first_misfit(problem)}") from None
    kind = "gpt2" if tokenizer.vocab_size == GPT2_SIZE else tokenizer.kind
    return LoadedModel(model, tokenizer, 0, {"data": "", "sha256": ""}, kind, tokenizer.vocab_size)

# ---- A look inside -------------------------------------------------------------------------------
# Problem   A loss is one number. Which tokens did the model predict, and at which layer did it know
#           the answer?
# Answer    --mode inspect --prompt "..." prints, for each token, the probability that the model
#           gave it, from what stands before it, and the five most likely ones. For the end of the
#           prompt, it prints what the output head would predict from the residual stream after each
#           layer, as if the remaining layers were missing. This is called the logit lens
#           [nostalgebraist 2020]. The page of the next chapter shows it for every token, and also
#           what each head looked at.
@torch.no_grad()
def look_inside(model, idx):
    """What a model expects while it reads idx (1, T). Returns probabilities (T, V) of the token
    after each position, and a list: after the embedding and each layer, those (V,) of the token
    after the last position."""
    logits, _ = model.eval()(idx)
    lens = []
    if isinstance(model, GPT):  # the bigram model has no layers
        x = model.embed(idx, torch.arange(idx.shape[1]))
        for block in [nn.Identity(), *model.h]:
            x = block(x)
            guess = model.lm_head(model.ln_f(x[0, -1])).float()
            lens.append(guess.softmax(dim=-1).cpu())
    return logits[0].float().softmax(dim=-1).cpu(), lens

def bytes_of_token(tokenizer, i: int) -> bytes:
    """The text of one token in UTF-8. A token of byte-pair encoding may be half a character."""
    if tokenizer.kind == "char":
        return tokenizer.decode([i]).encode("utf-8")
    return tokenizer.tokens[i]

def show_token(tokenizer, i: int) -> str:
    """A token in quotes: 'to', '\\n', or its bytes if it is part of a character: '\\xe5\\x84'."""
    token = bytes_of_token(tokenizer, i)
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token).removeprefix("b")

def print_inside(probabilities, lens: list, ids: list[int], tokenizer) -> None:
    """The probability of each token after the first, and the logit lens."""
    def guesses(p) -> str:
        best = p.argsort(descending=True)[:5].tolist()
        return "".join(f"  {show_token(tokenizer, i)} {p[i]:.2f}" for i in best)

    for p, i in zip(probabilities, ids[1:]):
        bar = "#" * round(10 * p[i].item())
        write_result(f"{show_token(tokenizer, i):>10} {p[i]:.3f} {bar:10}{guesses(p)}")
    for layer, p in enumerate(lens):
        name = "embedding" if layer == 0 else f"layer {layer - 1}"
        write_result(f"next, after {name}:{guesses(p)}")

# ---- A page that holds the model -----------------------------------------------------------------
# inspect.html is one file with the weights, the settings and the vocabulary. Its script computes
# what the model computes, in a browser, without a network: it writes, it shades each token that you
# type by its probability, and it shows where each head looked, the logit lens, and how much each
# head and each MLP added to the logit of a token. data/inspect.html is the template, and worth
# reading: there stands the model once more, in JavaScript.
#
# Look for  A head that always looks one token back fetches the previous token. One that looks at
#           spaces or line breaks looks back to the beginning of the word or line. One that always
#           looks at the first token often finds nothing that it looks for, and puts its weight
#           there (an attention sink).
PAGE_BYTES = 60e6  # a larger page is refused
FLOAT32_NUMBERS = 4e6  # a page with more numbers than these holds them in 16 bits

def page_data(used: LoadedModel, prompt: str, ids: list[int]) -> dict:
    """What the page needs to compute the model. Raises UserError if that is too much for a page."""
    model, tokenizer = used.model, used.tokenizer
    tensors = {name: w for name, w in model.state_dict().items()
               if not (name == "lm_head.weight" and model.config.tie_weights)}
    n = sum(w.numel() for w in tensors.values())
    dtype = torch.float32 if n <= FLOAT32_NUMBERS else torch.float16
    size = n * dtype.itemsize * 4 / 3  # base64 makes four characters of three bytes
    if size > PAGE_BYTES:
        raise UserError(f"--mode inspect: no page, because the {n:,} numbers of this model would "
                        f"make a file of {size / 1e6:.0f} MB, and a browser has to read it as a "
                        f"whole; up to {PAGE_BYTES / 1e6:.0f} MB are allowed")
    numbers = torch.cat([w.flatten().cpu().to(dtype) for w in tensors.values()])
    as_bytes = bytes(numbers.view(torch.uint8).tolist())
    known = {"kind": tokenizer.kind, "first_id": tokenizer.first_id, "end_id": tokenizer.end_id}
    if tokenizer.kind == "char":
        known["tokens"] = tokenizer.itos
    else:  # each byte as one character
        known["tokens"] = [token.decode("latin-1") for token in tokenizer.tokens]
        id_of = {token: i for i, token in enumerate(tokenizer.tokens)}
        known["merges"] = [(id_of[a], id_of[b]) for a, b in tokenizer.merges]
    # The page computes the logits after these, too, and stops if its own are others.
    some = ids[: min(32, model.config.block_size)]
    with torch.no_grad():
        logits = model(torch.tensor([some]))[0][0, -1].tolist()
    return {"settings": asdict(model.config), "sizes": {k: w.numel() for k, w in tensors.items()},
            "dtype": str(dtype).removeprefix("torch."), "tokenizer": known, "prompt": prompt,
            "parameters": count_parameters(model), "check": {"ids": some, "logits": logits},
            "numbers": base64.b64encode(as_bytes).decode()}

def write_page(path: Path, data: dict) -> None:
    """Fills the template with these data. Raises UserError if there is no template."""
    source = PROGRAM.parent / "data" / "inspect.html"
    if path.resolve() == source.resolve():
        raise UserError(f"--out_dir {path.parent}: there is the template of the page; name another")
    try:
        template = source.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as problem:
        raise UserError(f"{source}: no page without this template ({problem}); "
                        "get it again") from None
    as_json = json.dumps(data).replace("<", "\\u003c")  # so that no text ends the script
    if not (template.count('"CHECK"') == template.count(">DATA<") == 1):
        raise UserError(f"{source}: this template of the page is damaged; get it again")
    check = zlib.adler32(as_json.encode())
    page = template.replace('"CHECK"', f'"{check}"').replace(">DATA<", f">{as_json}<")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)

def run_inspect(typed: dict) -> None:
    """--mode inspect: prints to stdout, and writes inspect.html."""
    options, prompt = settings_of(typed, Options), typed.get("prompt", "")
    used = load_for_use(options)
    prompt = adapt_text(used.tokenizer, "--prompt", prompt)
    ids = encode_prompt(used.tokenizer, prompt)
    seen = ids[-used.model.config.block_size :]
    print_inside(*look_inside(used.model, torch.tensor([seen])), seen, used.tokenizer)
    page = Path(options.out_dir, "inspect.html")
    write_page(page, page_data(used, prompt, ids))
    say(f"{page}: open it in a browser; the model is in it, writes and shows its inside")

# ==================================================================================================
# Part V: The command line
#
# Every field of a settings class is a flag (except ModelConfig's vocab_size, which follows from the
# tokenizer). Its default and the comment beside it are what --help shows. A preset overrides the
# defaults, and a typed flag overrides both.
# ==================================================================================================

import argparse
import codecs
import difflib
from collections.abc import Callable
from dataclasses import MISSING, field

@dataclass
class Preset:
    """A named set of settings: how it differs from the defaults."""
    about: str
    model: dict  # fields of ModelConfig
    training: dict  # fields of RunConfig

FUSED = dict(attention="fused", norm="fused_layernorm")  # the same model as Part I's, but faster

PRESETS = {
    "plain": Preset(
        "exactly Part I, with about as many parameters as laptop",
        model=dict(n_layer=4, n_head=4, n_embd=128, block_size=128, dropout=0.0),
        training=dict(batch_size=16, grad_accum=1, max_steps=1500, learning_rate=6e-3,
                      min_lr=1e-4)),
    "laptop": Preset(
        "three minutes on two CPU cores, for a model that other programs can run",
        model=dict(n_layer=4, n_head=2, n_embd=128, block_size=512, dropout=0.0, bias=False,
                   pos="rope", qk_norm=True, activation="relu2", prev_heads=1, **FUSED),
        training=dict(batch_size=4, grad_accum=1, sampling="even", short_share=0.7,
                      train_temperature=0.9, max_steps=2000, optimizer="muon",
                      learning_rate=7e-3, momentum=0.85, weight_decay=0.2, schedule="linear",
                      min_lr=0.0, warmup_steps=50, eval_interval=250, eval_batches=4)),
    "gpt": Preset(
        "the reference, in the shape of nanoGPT's Shakespeare model",
        model=FUSED,
        training=dict(patience=4)),
    "modern": Preset(
        "the reference's size in Qwen3's form: RMSNorm, RoPE, QK-norm, SwiGLU; Muon",
        model=dict(bias=False, norm="rmsnorm", pos="rope", qk_norm=True, activation="swiglu",
                   attention="fused"),
        training=dict(beta2=0.95, optimizer="muon", learning_rate=5e-3, schedule="linear",
                      min_lr=0.0, grad_accum=1)),
    "mini": Preset(
        "two wide layers of Part I's kind, with dropout",
        model=dict(n_layer=2, n_head=8, n_embd=256, block_size=128, dropout=0.1, **FUSED),
        training=dict(batch_size=16, grad_accum=1, max_steps=3000, learning_rate=3e-3,
                      min_lr=1e-4)),
    "bpe": Preset(
        "our own byte-pair encoding instead of characters",
        model=dict(n_layer=4, n_head=4, n_embd=192, mlp_ratio=2.0, dropout=0.1, **FUSED),
        training=dict(tokenizer="bpe", batch_size=16, grad_accum=1)),
    "gpt2": Preset(
        "GPT-2 small, with its own tokens; for large corpora and large GPUs",
        model=dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.0, **FUSED),
        training=dict(tokenizer="gpt2", batch_size=8, grad_accum=8, learning_rate=6e-4,
                      min_lr=6e-5, beta2=0.95)),
    "bigram": Preset(
        "the baseline: predicts the next character from the current one alone",
        model=dict(model="bigram", dropout=0.0, block_size=64),
        training=dict(grad_accum=1, max_steps=1000, learning_rate=5e-2, min_lr=5e-3,
                      weight_decay=0.0, log_interval=100)),
}

@dataclass
class Options:
    """What to do, with which files, on which device."""
    mode: str = ""  # what to do
    data: str = ""  # a UTF-8 text file; by default the checkpoint's text, or data/input.txt
    out_dir: str = "out"  # the folder of the run
    checkpoint: str = ""  # the model to use: a .pt file or a folder; by default out_dir/best.pt
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    teacher: list[str] = field(default_factory=list)  # train: a finished model to learn from, too
    resume: bool = False  # train: continue from latest.pt of out_dir
    export_dir: str = ""  # export: the folder to write; by default out_dir/hf, or out_dir for gguf
    format: str = "hf"  # export: hf, a folder for transformers; or gguf, a file for llama.cpp
    gguf_type: str = "f32"  # export: how matrices are stored in a gguf file
    vary: str = ""  # ablate: what to compare, as FIELD=A,B,C
    seeds: int = 2  # ablate: runs of each variant, from --seed on
    bench_seconds: float = 4.0  # bench: time for each figure

@dataclass
class WritingConfig:
    """How text is written with a trained model."""
    prompt: str = ""  # the text to continue; by default a line break, or the first character known
    max_tokens: int = 200  # tokens to add to the prompt
    temperature: float = 0.8  # 0: always the most likely token; 1: as learned
    top_k: int | None = None  # draw from the k most likely tokens only
    top_p: float | None = None  # draw from the most likely tokens that reach this probability
    num_samples: int = 1  # how many texts to write, one after the other
    stop: list[str] = field(default_factory=list)  # end before this text; may be repeated
    cache: bool = True  # keep keys and values instead of computing them again

# What each setting may be: the keys of a table, or numbers in a range. By default, whole numbers
# begin at 1 and other numbers at 0.
CHOICES = {"model": MODELS, "norm": NORMS, "block": BLOCKS, "pos": POSITIONS,
           "activation": ACTIVATIONS, "attention": ATTENTION, "tokenizer": TOKENIZERS,
           "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "sampling": SAMPLING,
           "format": ["hf", "gguf"], "gguf_type": GGUF_TYPES,
           "preset": ["auto", *PRESETS], "dtype": ["auto", "float32", "bfloat16", "float16"]}
PATHS = {"data", "out_dir", "checkpoint", "init_from", "export_dir", "teacher"}
# If one of these were typed twice, its first value would be lost.
ONCE = PATHS - {"teacher"} | {"prompt", "vary"}
RANGES = {
    "bpe_size": (257, 2**16),
    "mlp_ratio": (0.01, 100),
    "dropout": (0, 0.9),
    "prev_heads": (0, 1000),
    "teachers": (0, 1000),
    "short_share": (0, 1),
    "train_temperature": (0.01, 100),
    "temperature": (0, 1000),
    "top_p": (0, 1),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(["beta1", "beta2", "momentum"], (0, 0.99999)),
    **dict.fromkeys(["warmup_steps", "sample_tokens", "checkpoint_interval", "patience",
                     "max_tokens"], (0, 2**31 - 1)),
}

# What may change on --resume: how long to train, what to report and save, and how to compute.
MAY_CHANGE = {"max_steps", "eval_interval", "sample_tokens", "checkpoint_interval", "log_interval",
              "patience", "dtype", "compile", "wandb"}

# ---- Reading the command line --------------------------------------------------------------------
def field_names(config_class) -> list[str]:
    """The names of the settings in a class that are flags."""
    # vocab_size follows from the text.
    return [f.name for f in fields(config_class) if f.name != "vocab_size"]

def comments(config_class) -> dict[str, str]:
    """The comment beside each field of a class and of the classes that it extends."""
    try:
        source = PROGRAM.read_text(encoding="utf-8")
    except (OSError, UnicodeError):  # it came through a pipe, or it is compiled: no comments then
        return {}
    found = {}
    for cls in reversed(config_class.__mro__[:-1]):
        body = re.search(rf"^class {cls.__name__}\b.*?(?=^\S)", source, re.MULTILINE | re.DOTALL)[0]
        # A field: its name, type and default, two spaces, and the comment.
        found.update(re.findall(r"^    (\w+): [\w |[\]]+(?: = .*?)?  # (.*)$", body, re.M))
    return found

def kind_of(config_class, name: str) -> type:
    """The type of a field; int for int | None, and list for a flag that may be given again."""
    text = {f.name: f.type for f in fields(config_class)}[name]
    kinds = {"str": str, "int": int, "float": float, "bool": bool, "list[str]": list}
    return kinds[text.split(" ")[0]]

def read_number(name: str, kind: type, text: str):
    """The value of a numeric flag. It must be in the range of the setting."""
    default = (1, 2**31 - 1) if kind is int else (0, math.inf)
    low, high = RANGES.get(name, default)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if low <= value <= high and math.isfinite(value):
        return value
    what = "a whole number" if kind is int else "a number"
    limits = f"from {low} to {high}" if high < math.inf else f"of at least {low}, and finite"
    raise argparse.ArgumentTypeError(f"{text!r} must be {what} {limits}")

def read_text(name: str, text: str) -> str:
    """The value of a flag that is a text. In a path, ~ is the user's home."""
    if not text and name in PATHS | {"stop"}:  # in a script, often a variable that was never set
        raise argparse.ArgumentTypeError("'' is empty; type a value, or leave the flag out")
    if name in PATHS:
        return os.path.expanduser(text)
    if re.search("[\ud800-\udfff]", text):  # bytes that Python could not decode in this locale
        try:
            text = os.fsencode(text).decode("utf-8")
        except UnicodeError:
            raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text") from None
    return text

class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake raises UserError."""
    def error(self, message):
        message = message.removeprefix("argument ")
        if message.endswith("expected one argument"):
            name = message.split(":")[0]
            message += f"; if its value begins with -, type {name}=VALUE"
        if "ignored explicit argument" in message:
            yes = message.split("/")[0]
            message = f"{yes}: takes no value; type {yes} or {yes.replace('--', '--no_')}"
        raise UserError(message)

    def print_help(self, file=None):
        write_result(self.format_help())

class Once(argparse.Action):
    """Stores the value of a flag that may be typed only once."""
    def __call__(self, parser, namespace, value, option_string=None):
        if hasattr(namespace, self.dest):
            raise UserError(f"--{self.dest} {value}: this flag was typed twice; type it once")
        setattr(namespace, self.dest, value)

def explain_unknown(argv: list[str], word: str, mode: str | None) -> str:
    """What to do about a word that is neither a flag nor the value of one."""
    before = dict(zip(argv[1:], argv)).get(word, "")
    name = before.removeprefix("--").removeprefix("no-")
    if not word.startswith("-"):
        if word in MODES and mode is None:
            return f"{word}: type --mode {word}"
        if name in SWITCHES:
            return f"--{name} {word}: takes no value; type --{name} or --no_{name}"
        return (f"{word}: belongs to no flag. A flag takes one value: put a value with spaces in "
                "quotes, and join several texts into one file")
    word = word.split("=")[0].replace("--no-", "--no_")
    names = sorted(MODES[mode].takes if mode else SETTINGS)
    flags = [f"--{name}" for name in names]
    flags += [f"--no_{name}" for name in names if name in SWITCHES]
    close = [flag for flag in flags if flag.startswith(word) and len(word) > 2]
    if len(close) != 1:
        close = difflib.get_close_matches(word, flags, n=1, cutoff=0.8)
    return f"{word}: unknown; " + (f"did you mean {close[0]}?" if close else "see --help")

GROUPS = {"common": Options, "the model": ModelConfig, "training": RunConfig,
          "writing": WritingConfig}
SWITCHES = {name for group in GROUPS.values() for name in field_names(group)
            if kind_of(group, name) is bool}

def build_parser(with_comments: bool = False) -> Parser:
    """All flags, in groups. A flag that is not typed is absent from the result. Only --help needs
    the comments, which take time to read."""
    parser = Parser(prog="minigpt.py", usage="minigpt.py --mode MODE [flags]", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS,
                    description="Train a GPT, write text with it, and look inside. A value that is "
                    "not typed comes from --preset, if the preset sets it, and otherwise from the "
                    "default in parentheses.", formatter_class=lambda prog: argparse.HelpFormatter(
                        prog, width=80, max_help_position=26))
    for title, config_class in GROUPS.items():
        group = parser.add_argument_group(title)
        help_of = comments(config_class) if with_comments else {}
        default_of = {f.name: f.default for f in fields(config_class)}
        for name in field_names(config_class):
            default = default_of[name]
            has_default = default not in (None, "", MISSING) and default is not False
            shown = f" ({default})" if has_default else ""
            add_flag(group, name, kind_of(config_class, name), help_of.get(name, "") + shown)
    return parser

def add_flag(group, name: str, kind: type, help_text: str) -> None:
    """Adds the flag of one setting."""
    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    elif name in CHOICES:
        options = {"choices": CHOICES[name]}
    elif kind in (int, float):
        options = {"type": functools.partial(read_number, name, kind)}
    else:
        action = "append" if kind is list else Once if name in ONCE else "store"
        options = {"type": functools.partial(read_text, name), "action": action}
    group.add_argument(f"--{name}", help=help_text, **options)

def spell_flag(word: str) -> str:
    """A flag with the spelling that argparse knows: --max-steps and --max_steps are the same.

    >>> spell_flag("--max-steps=5"), spell_flag("--no_bias"), spell_flag("a-b")
    ('--max_steps=5', '--no-bias', 'a-b')
    """
    name, equals, value = word.partition("=")
    if not re.fullmatch(r"--[a-z][a-z0-9_-]*", name):
        return word
    name = "--" + name[2:].replace("-", "_")
    return name.replace("--no_", "--no-") + equals + value

def parse(argv: list[str]) -> dict:
    """The values of the flags that were typed. Raises UserError for one that the mode does not
    take."""
    for before, word in zip(["", *argv], argv):
        if re.fullmatch(r"(--[a-z][\w-]*=)?--", word):  # argparse would fail on this
            raise UserError(f"{before} {word}: -- is not a value; type another one, or leave the "
                            "flag out")
    argv = [spell_flag(word) for word in argv]
    parser = build_parser(with_comments="--help" in argv or "-h" in argv)
    namespace, unknown = parser.parse_known_args(argv)
    typed = vars(namespace)
    mode = typed.get("mode")
    if unknown:
        raise UserError(explain_unknown(argv, unknown[0], mode))
    if not mode:
        raise UserError(f"--mode is missing: choose one of {', '.join(MODES)} (see --help)")
    for name in typed:
        if name not in MODES[mode].takes:
            modes = [other for other in MODES if name in MODES[other].takes]
            raise UserError(f"--{name}: does not belong to --mode {mode}; it is a flag of --mode "
                            f"{' and '.join(modes)}")
    return typed

def pick(typed: dict, config_class) -> dict:
    """Those of the typed values that belong to a class."""
    return {name: typed[name] for name in field_names(config_class) if name in typed}

def settings_of(typed: dict, config_class):
    """The typed values of a class, and its defaults for the others."""
    return config_class(**pick(typed, config_class))

# ---- From what was typed to settings -------------------------------------------------------------
def choose_preset(typed: dict, device: torch.device) -> str:
    """The name of the preset; auto chooses by device. Says which one it is."""
    name = typed.get("preset", "auto")
    reason = "as asked"
    if name == "auto":
        name = "gpt" if device.type == "cuda" else "laptop"
        reason = f"chosen for {device.type}"
    others = ", ".join(other for other in PRESETS if other != name)
    say(f"preset {name} ({reason}): {PRESETS[name].about}. Other presets (--preset NAME): {others}")
    return name

def training_settings(preset: str, typed: dict) -> RunConfig:
    """The settings of training for a new run. Raises UserError if they do not fit together.

    If only the learning rate was typed, min_lr stays the same share of it."""
    config = RunConfig(**PRESETS[preset].training)
    changes = {**pick(typed, RunConfig), "preset": preset}
    if typed.get("teachers") or typed.get("teacher"):  # a student
        changes = {"max_steps": 2 * config.max_steps, "train_temperature": 1.0, **changes}
    if "learning_rate" in typed and "min_lr" not in typed:
        changes["min_lr"] = config.min_lr / config.learning_rate * typed["learning_rate"]
    config = replace(config, **changes)
    if "bpe_size" in typed and config.tokenizer != "bpe":
        raise UserError(f"--bpe_size {config.bpe_size}: only --tokenizer bpe can choose it")
    return config

def model_settings(preset: str, typed: dict, vocab_size: int) -> ModelConfig:
    """The settings of the model for a new run. Raises UserError if they do not fit together."""
    return ModelConfig(**{**PRESETS[preset].model, **pick(typed, ModelConfig),
                          "vocab_size": vocab_size})

def refuse_changes(typed: dict, stored: dict, who: str) -> None:
    """Raises UserError for a typed setting that differs from the stored one, which `who` has."""
    for name, value in typed.items():
        if name in stored and value not in (stored[name], "auto"):
            has = "none" if stored[name] == "" else stored[name]
            raise UserError(f"--{name} {value}: {who} has {has}; leave the flag out")

def limit_steps(config: RunConfig, sizes: ModelConfig, corpus: Corpus, typed: dict) -> RunConfig:
    """Lowers max_steps for a small text to 6 passes over it, or 12 for a student, so that a model
    without dropout does not memorize it (which was seen on texts of 64 and 254 KB).

    The schedule of the learning rate stays complete. What was typed is left as it is."""
    if "max_steps" in typed or sizes.dropout:
        return config
    tokens_per_step = config.batch_size * config.grad_accum * sizes.block_size
    passes = 12 if typed.get("teachers") or typed.get("teacher") else 6
    steps = max(passes * len(corpus.train) // tokens_per_step, 1)
    if steps >= config.max_steps:
        return config
    say(f"{steps} steps, which are {passes} passes over this text; after more, the model would "
        "memorize it. --max_steps overrules this")
    warmup_steps = config.warmup_steps
    if "warmup_steps" not in typed:
        warmup_steps = min(warmup_steps, steps // 4)
    return replace(config, max_steps=steps, warmup_steps=warmup_steps)

# ---- Training ------------------------------------------------------------------------------------
@dataclass
class RunStart:
    """What a run begins with."""
    model: nn.Module
    tokenizer: object
    text: SourceText
    corpus: Corpus
    config: RunConfig
    state: dict | None = None  # the checkpoint to continue from, if any

def find_latest(typed: dict) -> dict | None:
    """The checkpoint to continue from, or None for a new run. Raises UserError where a new run
    would overwrite an old one, or files of somebody else."""
    options = settings_of(typed, Options)
    out_dir = Path(options.out_dir)
    latest = out_dir / "latest.pt"
    if options.resume and latest.exists():
        state = read_checkpoint(latest)
        say(f"resuming {latest} at step {state['step']}")
        return state
    kept = [path.name for path in files_of_run(out_dir) if not left_by_failed_start(path)]
    kept.sort(key=lambda name: not name.endswith(".pt"))
    if options.resume and typed.get("teachers"):
        kept = [name for name in kept if not name.startswith("teacher_")]
    if kept and kept[0].startswith("teacher_"):
        raise UserError(f"--out_dir {out_dir}: has a {kept[0]} already; to continue, type the same "
                        "command again, with --teachers and --resume; or name another folder")
    if kept:
        hint = "add --resume to continue that run, or name another folder"
        if not latest.exists():
            hint = ("name another folder, or, to continue from one of its checkpoints, copy it to "
                    "latest.pt and use --resume")
        raise UserError(f"--out_dir {out_dir}: has a {kept[0]} already; {hint}")
    if options.resume:
        say(f"--resume: there is no {latest} yet, so a new run begins")
    return None

def left_by_failed_start(path: Path) -> bool:
    """Whether this is a file of a run that failed before its first checkpoint was saved."""
    if path.name == "config.json":
        return path.read_bytes().startswith(b'{\n  "model": {')  # write_config wrote it
    if path.name == "best.pt":  # the model before the first step, saved before latest.pt
        return read_checkpoint(path)["step"] == 0
    if path.name == "metrics.jsonl":
        steps = {record["step"] for record in read_metrics(path.parent)}
        return steps <= {0} and path.read_bytes()[:10] in (b"", b'{"step": 0')
    return False

def source_of(text: SourceText) -> dict:
    """What a checkpoint stores about its corpus. Tiny Shakespeare needs no path: it is always
    found."""
    is_default = text.path == PROGRAM.parent / "data" / "input.txt"
    data = "" if is_default else str(text.path.absolute())
    return {"data": data, "sha256": text.sha256}

def resume_run(typed: dict, state: dict) -> RunStart:
    """The run of a checkpoint, at the step where it was saved."""
    stored = {**state["model_config"], **state["train_config"]}
    changed = {name: typed[name] for name in MAY_CHANGE if name in typed}
    refuse_changes(typed, {**stored, **changed}, "cannot change on --resume: the run")
    config = RunConfig(**{**state["train_config"], **changed})
    text = read_corpus(typed.get("data", ""), state["corpus"]["data"])
    if text.sha256 != state["corpus"]["sha256"]:
        raise UserError(f"--data {text.path}: this is not the text that the run was trained on; "
                        "name that one, or start a new run in another --out_dir")
    model, tokenizer = rebuild(Path(settings_of(typed, Options).out_dir, "latest.pt"), state)
    corpus = encode_corpus(text, tokenizer, model.config.block_size)
    return RunStart(model, tokenizer, text, corpus, config, state)

def run_from_weights(typed: dict, preset: str) -> RunStart:
    """A new run that begins with the weights of another model. Only its dropout may differ."""
    origin = read_model(Path(typed["init_from"]))
    made = {"tokenizer": origin.made_by}
    if origin.made_by == "bpe":
        made["bpe_size"] = origin.bpe_size
    stored = {**asdict(origin.model.config), **made}
    dropout = typed.get("dropout", stored.pop("dropout"))
    refuse_changes(typed, stored, "the model of --init_from")
    config = training_settings(preset, {**typed, **made})
    sizes = replace(origin.model.config, dropout=dropout)
    model = MODELS[sizes.model](sizes)
    model.load_state_dict(origin.model.state_dict())
    text = read_corpus(typed.get("data", ""), origin.corpus["data"])
    corpus = encode_corpus(text, origin.tokenizer, model.config.block_size)
    return RunStart(model, origin.tokenizer, text, corpus, config)

def new_run(typed: dict, preset: str) -> RunStart:
    """A new run with random weights."""
    config = training_settings(preset, typed)
    sizes = model_settings(preset, typed, vocab_size=1)  # finds mistakes before the text is read
    text = read_corpus(typed.get("data", ""))
    tokenizer = make_tokenizer(config, text.text)
    sizes = replace(sizes, vocab_size=tokenizer.vocab_size)
    corpus = encode_corpus(text, tokenizer, sizes.block_size)
    model = new_model(sizes, config.seed)
    return RunStart(model, tokenizer, text, corpus, config)

def begin(typed: dict, device: torch.device) -> RunStart:
    """What a run begins with: a new run, one from given weights, or a resumed one."""
    options = settings_of(typed, Options)
    if options.checkpoint:
        raise UserError(f"--checkpoint {options.checkpoint}: to train from it, use --init_from, or "
                        f"copy it to {Path(options.out_dir, 'latest.pt')} and use --resume")
    state = find_latest(typed)
    if state is not None:
        start = resume_run(typed, state)
    else:
        make = run_from_weights if typed.get("init_from") else new_run
        start = make(typed, choose_preset(typed, device))
    say(f"corpus {start.text.path}: {len(start.corpus.train):,} training and "
        f"{len(start.corpus.val):,} validation tokens, vocabulary {start.tokenizer.vocab_size}")
    if state is None:
        for doubt in doubts_about(start.text.text):
            say(f"warning: about this text: {doubt}")
        start.config = limit_steps(start.config, start.model.config, start.corpus, typed)
    return start

def run_train(typed: dict) -> Outcome:
    """--mode train: the teachers, if there are any, and then the run itself."""
    options = settings_of(typed, Options)
    device = find_device(options.device)
    start = begin(typed, device)
    out_dir = Path(options.out_dir)
    files = [os.path.abspath(path) for path in options.teacher]
    if start.state is None:
        read_teachers(files, start, out_dir, device)  # finds mistakes before anything is trained
        files += train_teachers(typed, start, out_dir, device)
    else:
        begun_with = [teacher["path"] for teacher in start.state.get("teachers", [])]
        for path in set(files) - set(begun_with):
            raise UserError(f"--teacher {path}: the run has not learned from it so far; leave the "
                            "flag out")
        files = begun_with
    teachers = read_teachers(files, start, out_dir, device)
    outcome = run_to_the_end(start, out_dir, device, teachers, label="student: " * bool(files))
    seconds = outcome.seconds
    for path in files:
        if not os.path.isabs(path):  # trained here: its last record says how long that took
            records = read_metrics((out_dir / path).parent)
            seconds += sum(record.get("seconds", 0) for record in records)
    return replace(outcome, seconds=seconds)

def train_teachers(typed: dict, start: RunStart, out_dir: Path, device) -> list[str]:
    """Trains --teachers ordinary models, each in a folder of its own. Those that are finished
    already are left as they are. Returns their files, relative to out_dir."""
    count = start.config.teachers
    own = {name: value for name, value in typed.items()
           if name not in ("teachers", "teacher", "max_steps")}
    files = []
    for number in range(1, count + 1):
        folder = out_dir / f"teacher_{number}"
        files.append(f"{folder.name}/best.pt")
        if any("full_val_loss" in record for record in read_metrics(folder)):
            continue
        seed = derived_seed(start.config.seed, -2, number)
        teacher = begin({**own, "seed": seed, "out_dir": str(folder),
                         "resume": bool(files_of_run(folder))}, device)
        steps_after = (count - number) * teacher.config.max_steps + start.config.max_steps
        run_to_the_end(teacher, folder, device, label=f"teacher {number} of {count}: ",
                       steps_after=steps_after)
    return files

def read_teachers(files: list[str], start: RunStart, out_dir: Path, device) -> Teachers | None:
    """The models of these files. Raises UserError for one with another vocabulary, or for one that
    is not what the run has learned from so far."""
    models, taught_by = [], []
    for file in files:
        used = read_model(out_dir / file)
        if used.tokenizer.state != start.tokenizer.state:
            raise UserError(f"--teacher {file}: has another vocabulary than the student; name a "
                            "model of the same text and --tokenizer")
        models.append(used.model.to(device).eval())
        taught_by.append({"path": file, "sha256": checksum(out_dir / file)})
    if start.state is not None and taught_by != start.state.get("teachers", []):
        raise UserError(f"--out_dir {out_dir}: its teachers are not those that the run has learned "
                        "from so far; put them back")
    return Teachers(models, start.corpus.train, taught_by) if files else None

def run_to_the_end(start: RunStart, out_dir: Path, device, teachers: Teachers | None = None,
                   label: str = "", steps_after: int = 0) -> Outcome:
    """One run, from where it starts to its score."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with SignalWatch() as watch:
        journal = FullJournal(out_dir, watch, label, steps_after)
        run = FullRun(start.model, start.tokenizer, start.corpus, start.config, out_dir, device,
                      source_of(start.text), journal, teachers)
        if start.state is not None:
            run.restore(start.state)
        journal.forget_after(run.step if start.state is not None else -1)
        write_config(run)
        say(f"model: {count_parameters(run.model):,} parameters; "
            f"{device}, {run.config.dtype}, {torch.get_num_threads()} threads, "
            f"processes: {run.processes}")
        say("parameters: " + ", ".join([f"{part} {n:,}" for part, n
                                        in parameters_by_part(run.model).items()]))
        if run.finished():
            say(f"nothing is left to train: the run is at step {run.step}; --max_steps is "
                f"{run.config.max_steps}, --patience is {run.config.patience}")
            if (run.step % run.config.eval_interval
                    and run.step != start.state["train_config"]["max_steps"]):
                evaluate_and_save(run)  # it was stopped between two evaluations
                run.save("latest.pt")
        elif teachers is not None:
            with in_16_bits(run.device, run.config.dtype):
                teachers.read(run.progress_of("applying the teachers"))
        exit_code = 1
        try:
            if run.rank == 0:
                run.wandb = start_wandb(run)
            if run.wandb is not None:
                run.wandb_id = run.wandb.id
            train(run, after_step=run.stop_if_asked)
            nats = run.score()
            seconds = run.seconds()  # without the time for the picture
            journal.report_score(run, nats)
            exit_code = 0
        except SystemExit as stopped:  # by a signal
            exit_code = stopped.code
            raise
        finally:
            if run.wandb is not None:
                with contextlib.suppress(Exception):
                    run.wandb.finish(exit_code=exit_code)  # completes its log
    return Outcome(nats, bits_per_character(nats, run.corpus), seconds, run.best_step)

def write_config(run: FullRun) -> None:
    """Writes the settings of a run to config.json, for people to read."""
    if run.rank == 0:
        settings = {"model": asdict(run.model.config), "training": asdict(run.config)}
        replace_text(run.out_dir / "config.json", json.dumps(settings, indent=2))

# ---- Using a trained model -----------------------------------------------------------------------
@dataclass
class LoadedModel:
    """A trained model that is ready for use, whatever it was read from."""
    model: nn.Module
    tokenizer: object
    step: int  # at which it was saved
    corpus: dict  # the path and the checksum of the text that it was trained on, if they are known
    made_by: str  # the value of --tokenizer
    bpe_size: int  # the value of --bpe_size

def checksum(path: Path) -> str:
    """The checksum of a checkpoint, or of the weights in a folder."""
    sha256 = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        sha256.update(file.read_bytes())
    return sha256.hexdigest()

def read_model(path: Path) -> LoadedModel:
    """The model of a checkpoint, or of a folder with a GPT-2."""
    if path.is_dir():
        used = read_folder(path)
    else:
        state = read_checkpoint(path)
        model, tokenizer = rebuild(path, state)
        made = state["train_config"]
        used = LoadedModel(model, tokenizer, state["step"], state["corpus"], made["tokenizer"],
                           made["bpe_size"])
    if not is_finite(used.model):
        raise UserError(f"{path}: this model computes numbers that are not finite, because its run "
                        "has diverged; use another one")
    return used

def load_for_use(options: Options) -> LoadedModel:
    """The model of --checkpoint, or best.pt of --out_dir."""
    device = find_device(options.device)
    path = Path(options.checkpoint or Path(options.out_dir, "best.pt"))
    used = read_model(path)
    say(f"{path}: step {used.step}, {count_parameters(used.model):,} parameters")
    used.model.to(device).eval()
    return used

# Characters that many programs insert automatically (quotes, dashes, an ellipsis and a space that
# is not broken), and what a plain text has in their place.
PLAIN_FORMS = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2212\u2026\u00a0",
                            "''\"\"---. ")

def adapt_text(tokenizer, flag: str, text: str) -> str:
    """The text of a flag in the form that its corpus has: line breaks as on Linux, and accents
    composed with their letters or not. Raises UserError for a character that the model does not
    know."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if tokenizer.kind != "char":
        return text
    known = set(tokenizer.itos)
    if not set(text) <= known:
        apart = unicodedata.normalize("NFD", text)  # an accent as a character of its own
        composed = unicodedata.normalize("NFC", text)  # or as one with its letter
        text = apart if set(apart) <= known else composed
    for character in text:
        if character in tokenizer.stoi:
            continue
        plain = unicodedata.normalize("NFKD", character.translate(PLAIN_FORMS))[0]
        hint = f"the closest one that it has is {plain!r}" if plain in tokenizer.stoi else (
            "leave it out")
        if character == "\\":
            hint = "for a line break, type $'\\n' in bash and zsh, and \"`n\" in PowerShell"
        raise UserError(f"{flag} {text!r}: the character {character!r} (U+{ord(character):04X}) is "
                        f"not in the vocabulary; {hint}")
    return text

def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt; without one, the id that a sample begins with."""
    return tokenizer.encode(adapt_text(tokenizer, "--prompt", prompt)) or [tokenizer.first_id]

class TextPrinter:
    """Prints a text while it is written. It holds back what is not yet certain: half of a
    character, and what may be the beginning of a stop text."""
    def __init__(self, tokenizer, stops: list[str]):
        self.tokenizer = tokenizer
        self.stops = stops
        self.longest = max((len(stop) for stop in stops), default=1)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character
        self.held = ""  # text that was decoded but not printed

    def add(self, i: int) -> bool:
        """Takes one token. Returns False when the text is finished."""
        if i == self.tokenizer.end_id:
            return False
        self.held += self.decoder.decode(bytes_of_token(self.tokenizer, i))
        ends = [self.held.index(stop) for stop in self.stops if stop in self.held]
        if ends:
            self.held = self.held[: min(ends)]
            return False
        certain = len(self.held) - (self.longest - 1)
        if certain > 0:
            write_result(self.held[:certain], end="")
            self.held = self.held[certain:]
        return True

    def finish(self) -> None:
        """Prints what was held back, and a line break."""
        write_result(self.held + self.decoder.decode(b"", final=True))

def run_generate(typed: dict) -> None:
    """--mode generate: prints the texts to stdout."""
    writing = settings_of(typed, WritingConfig)
    used = load_for_use(settings_of(typed, Options))
    start = encode_prompt(used.tokenizer, writing.prompt)
    stops = [adapt_text(used.tokenizer, "--stop", stop) for stop in writing.stop]
    seed = typed.get("seed", RunConfig.seed)
    for number in range(writing.num_samples):
        if number > 0:
            write_result("---------------")
        write_result(used.tokenizer.decode(start), end="")
        reader = new_reader(used.model)
        if not writing.cache and isinstance(reader, CachedReader):
            reader = CachedReader(used.model, remember=False)
        generator = torch.Generator().manual_seed(derived_seed(seed, number))
        tokens = stream_tokens(used.model, torch.tensor([start]), writing.max_tokens,
                               writing.temperature, writing.top_k, writing.top_p, generator, reader)
        printer = TextPrinter(used.tokenizer, stops)
        for token in tokens:
            if not printer.add(token.item()):
                break
        printer.finish()

def run_eval(typed: dict) -> None:
    """--mode eval: prints the loss on the validation part of the text that the model was trained
    on, or on the whole of another text. --block_size chooses windows that are shorter than the
    model's."""
    options = settings_of(typed, Options)
    used = load_for_use(options)
    config = used.model.config
    size = typed.get("block_size", config.block_size)
    if size > config.block_size:
        raise UserError(f"--block_size {size}: the model cannot read more than {config.block_size} "
                        "tokens at once; choose a smaller number")
    stored = used.corpus
    text = read_corpus(options.data, stored["data"])
    corpus = encode_text(text, used.tokenizer)
    # A folder does not say what its model was trained on.
    what = "full validation split" if stored["sha256"] else "last tenth of the text"
    is_other = stored["sha256"] not in ("", text.sha256)
    if is_other or len(corpus.val) < 2:
        what = "whole text" + is_other * ", which the model was not trained on"
        tokens = PieceEncoder(used.tokenizer).encode(text.text)
        corpus = Corpus(tokens, tokens, len(text.text))
    if len(corpus.val) < 2:
        raise UserError(f"--data {text.path}: name a text of at least 2 tokens; this one has "
                        f"{len(corpus.val)}")
    used.model.config = replace(config, block_size=size)
    nats = evaluate(used.model, corpus.val, progress=progress_of("evaluating"))
    write_result(describe_loss(nats, corpus, what))

# ---- The modes -----------------------------------------------------------------------------------
@dataclass
class Mode:
    """One thing that the program does, and the flags that it takes."""
    run: Callable[[dict], object]
    takes: set[str]

EVERY_MODE = {"mode", "device"}
USES_MODEL = EVERY_MODE | {"out_dir", "checkpoint"}
SETTINGS = {*field_names(ModelConfig), *field_names(RunConfig)} - {"init_from"}
# bench takes the settings on which a speed can depend.
TIMED = {*field_names(ModelConfig), "preset", "tokenizer", "bpe_size", "batch_size", "optimizer",
         "train_temperature", "dtype", "compile"}
MODES = {
    "train": Mode(run_train, EVERY_MODE | SETTINGS | {"out_dir", "data", "resume", "init_from",
                                                      "checkpoint", "teacher"}),
    "generate": Mode(run_generate, USES_MODEL | {"seed", *field_names(WritingConfig)}),
    "eval": Mode(run_eval, USES_MODEL | {"data", "block_size"}),
    "ablate": Mode(run_ablate, EVERY_MODE | SETTINGS | {"out_dir", "data", "vary", "seeds",
                                                        "teacher"}),
    "bench": Mode(run_bench, EVERY_MODE | TIMED | {"bench_seconds", "max_tokens"}),
    "inspect": Mode(run_inspect, USES_MODEL | {"prompt"}),
    "export": Mode(run_export, USES_MODEL | {"export_dir", "format", "gguf_type"}),
}
CHOICES["mode"] = MODES

# ---- The program ---------------------------------------------------------------------------------
def explain(problem: Exception, typed: dict) -> str | None:
    """A user's mistake in one line, or None if it is not one."""
    if isinstance(problem, UserError):
        return str(problem)
    if isinstance(problem, ImportError) and problem.name:
        if problem.name == "download_data":
            return ("download_data.py must be in the same folder as minigpt.py; or name a text by "
                    "--data")
        return f"{problem.name} is not installed, but it is needed: pip install {problem.name}"
    if not isinstance(problem, OSError) and isinstance(problem.__context__, OSError):
        problem = problem.__context__  # PyTorch's writer hides what went wrong
    if isinstance(problem, OSError):
        folder = typed.get("export_dir") or typed.get("out_dir", Options.out_dir)  # of a full disk
        where = re.sub(r"(\.\d+)?\.partial$", "", str(problem.filename or folder))
        what = problem.strerror or problem
        return f"{where}: {what}; correct that, or name another file or folder"
    if (isinstance(problem, (MemoryError, torch.OutOfMemoryError))
            or re.search("not enough memory|can't allocate memory", str(problem))):
        if typed.get("mode") in ("generate", "eval", "inspect", "export"):
            return "out of memory; use a smaller model, or a shorter text"
        return "out of memory; use a smaller --batch_size, --block_size or --n_embd"
    if type(problem).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile: does not work here ({type(problem).__name__}); use --no_compile"
    return None

def prepare_streams() -> None:
    """Makes stdout and stderr usable: open, and in UTF-8."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):  # a Windows console may use another encoding
            stream.reconfigure(encoding="utf-8", errors="replace")

def settle_streams() -> None:
    """Leaves nothing in stdout and stderr that Python would fail to write when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())

def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0, 2 for a user's mistake, 128 + n for signal n."""
    prepare_streams()
    keep_memory()
    typed = {}
    try:
        typed = parse(sys.argv[1:] if argv is None else argv)
        mode = typed["mode"]
        if join_processes() > 1 and mode != "train":
            raise UserError(f"--mode {mode}: runs in one process only; start it with python, not "
                            "with torchrun")
        MODES[mode].run(typed)
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as end:  # from argparse, after --help, or from a run stopped by a signal
        return end.code or 0
    except BrokenPipeError:  # the reader of our output has left, as in `generate | head`
        return 128 + 13
    except Exception as problem:
        line = explain(problem, typed)
        if line is None:
            raise
        if process_rank() > 0:
            time.sleep(3)  # if all processes made the same mistake, let the first one tell it
        with contextlib.suppress(OSError):
            line = line.replace("\n", "\\n")  # a name may contain a line break
            print(f"error: {line}", file=sys.stderr, flush=True)
        return 2
    finally:
        settle_streams()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

if __name__ == "__main__":
    code = main()
    if torch.distributed.is_torchelastic_launched():  # PyTorch's own threads may abort a plain exit
        os._exit(code)
    sys.exit(code)

# ---- References ----------------------------------------------------------------------------------
# Ainslie et al. 2023         GQA: Training Generalized Multi-Query Transformer Models
# Ba et al. 2016              Layer Normalization
# Brown et al. 2020           Language Models are Few-Shot Learners (GPT-3)
# Chen et al. 2025            Cautious Weight Decay
# Chowdhery et al. 2022       PaLM: Scaling Language Modeling with Pathways
# Dao et al. 2022             FlashAttention
# Fan et al. 2018             Hierarchical Neural Story Generation (top-k)
# Furlanello et al. 2018      Born-Again Neural Networks
# Geva et al. 2021            Transformer Feed-Forward Layers Are Key-Value Memories
# Guo et al. 2017             On Calibration of Modern Neural Networks
# He et al. 2016a             Deep Residual Learning for Image Recognition
# He et al. 2016b             Identity Mappings in Deep Residual Networks
# Hendrycks and Gimpel 2016   Gaussian Error Linear Units
# Henry et al. 2020           Query-Key Normalization for Transformers
# Hinton et al. 2015          Distilling the Knowledge in a Neural Network
# Holtzman et al. 2020        The Curious Case of Neural Text Degeneration (top-p)
# Jiang et al. 2023           Pre-RMSNorm and Pre-CRMSNorm Transformers
# Jordan 2024                 Muon: An optimizer for hidden layers in neural networks
# Knuth 1998                  The Art of Computer Programming, volume 3
# Li et al. 2020              PyTorch Distributed: Experiences on Data Parallel Training
# Liu et al. 2025             Muon is Scalable for LLM Training
# Loshchilov and Hutter 2017  SGDR: Stochastic Gradient Descent with Warm Restarts
# Loshchilov and Hutter 2019  Decoupled Weight Decay Regularization (AdamW)
# Micikevicius et al. 2018    Mixed Precision Training
# nostalgebraist 2020         interpreting GPT: the logit lens
# Pascanu et al. 2013         On the Difficulty of Training Recurrent Neural Networks
# Peng et al. 2023            RWKV: Reinventing RNNs for the Transformer Era
# Press and Wolf 2017         Using the Output Embedding to Improve Language Models
# Press et al. 2022           Train Short, Test Long (ALiBi)
# Radford et al. 2018         Improving Language Understanding by Generative Pre-Training (GPT)
# Radford et al. 2019         Language Models are Unsupervised Multitask Learners (GPT-2)
# Sennrich et al. 2016        Neural Machine Translation of Rare Words with Subword Units
# Shazeer 2019                Fast Transformer Decoding: One Write-Head is All You Need
# Shazeer 2020                GLU Variants Improve Transformer
# So et al. 2021              Primer: Searching for Efficient Transformers for Language Modeling
# Srivastava et al. 2014      Dropout: A Simple Way to Prevent Neural Networks from Overfitting
# Su et al. 2021              RoFormer: Enhanced Transformer with Rotary Position Embedding
# Szegedy et al. 2016         Rethinking the Inception Architecture (label smoothing)
# Vaswani et al. 2017         Attention Is All You Need
# Weyl 1916                   Über die Gleichverteilung von Zahlen mod. Eins
# Xiong et al. 2020           On Layer Normalization in the Transformer Architecture
# Yang et al. 2025            Qwen3 Technical Report
# Zhang and Sennrich 2019     Root Mean Square Layer Normalization
