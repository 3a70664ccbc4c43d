#!/usr/bin/env bash
# CTranslate2: include_prompt_in_result=False should leave the prompt out of every result. It does,
# until one prompt of the batch is a single token. Then the results of all longer prompts begin with
# their own prompt (without its first token), and max_length counts these tokens, so that less new
# text is written. There is no warning. This matters to anyone who measures a small language model in
# batches. A prompt of one token is common there (a line break, an end-of-text token), and it changes
# what the others in the batch seem to have written.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile "ctranslate2==4.8.5" "numpy==2.4.6"

cat > "$folder/program.py" <<'PYTHON'
import os
import sys

import ctranslate2
import numpy as np
from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

# A decoder like GPT-2's with random weights: 27 tokens, 2 layers, vectors of 32 numbers.
TOKENS = ["<end>", *"abcdefghijklmnopqrstuvwxyz"]
C, WINDOW, LAYERS = 32, 64, 2
random = np.random.default_rng(0)


def matrix(rows, columns):
    return random.normal(0, 0.3, (rows, columns)).astype(np.float32)


def fill_norm(norm):
    norm.gamma, norm.beta = np.ones(C, np.float32), np.zeros(C, np.float32)


def fill_linear(linear, rows, columns):
    linear.weight, linear.bias = matrix(rows, columns), np.zeros(rows, np.float32)


spec = TransformerDecoderModelSpec.from_config(
    LAYERS, 4, pre_norm=True, activation=common_spec.Activation.GELUTanh)
decoder = spec.decoder
decoder.scale_embeddings = False
decoder.embeddings.weight = matrix(len(TOKENS), C)
decoder.position_encodings.encodings = matrix(WINDOW, C)
decoder.projection.weight = matrix(len(TOKENS), C)
fill_norm(decoder.layer_norm)
for layer in decoder.layer:
    fill_norm(layer.self_attention.layer_norm)
    fill_linear(layer.self_attention.linear[0], 3 * C, C)
    fill_linear(layer.self_attention.linear[1], C, C)
    fill_norm(layer.ffn.layer_norm)
    fill_linear(layer.ffn.linear_0, 4 * C, C)
    fill_linear(layer.ffn.linear_1, C, 4 * C)
spec.register_vocabulary(TOKENS)
spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "<end>"
spec.validate()
spec.optimize()
os.makedirs(sys.argv[1])
spec.save(sys.argv[1])
generator = ctranslate2.Generator(sys.argv[1])


def written(prompts):
    """Eight tokens after each prompt, greedily, without the prompt."""
    results = generator.generate_batch(
        [list(prompt) for prompt in prompts], max_length=8, min_length=8, sampling_topk=1,
        include_prompt_in_result=False)
    return ["".join(result.sequences[0]) for result in results]


print("CTranslate2", ctranslate2.__version__)
alone = [written([prompt])[0] for prompt in ("hello", "world", "abc", "x")]
print("one by one:                             hello ->", alone[0], "  world ->", alone[1])
longer = written(["hello", "world", "abc"])
print("in a batch with abc:                    hello ->", longer[0], "  world ->", longer[1])
single = written(["hello", "world", "x"])
print("in a batch with x, a single token:      hello ->", single[0], "  world ->", single[1])
print("expected: three times the same")

assert longer == alone[:3], "prompts of several tokens: the batch writes what each writes alone"
assert single[2] == alone[3], "the prompt of one token itself: as alone"
assert single[0] == "ello" + alone[0][:4], "seen: the prompt, then four tokens fewer"
assert single[1] == "orld" + alone[1][:4], "seen: the prompt, then four tokens fewer"
print("seen: with the prompt x, the results begin with the end of their own prompts")
PYTHON
"$folder/venv/bin/python" "$folder/program.py" "$folder/model"
