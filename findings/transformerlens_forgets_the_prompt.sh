#!/usr/bin/env bash
# TransformerLens: generate() of a TransformerBridge should write what the wrapped model writes. With
# two versions that fit together according to pip, it does not. transformers renamed an argument, so
# the attention of TransformerLens never fills its cache. From the second new token on, the model sees
# only the last token. Logits of whole texts are right, and a deprecation warning is all that is
# printed; use_past_kv_cache=False is the way out. It matters to anyone who looks into a small model
# with this library: its texts look as if it had learned no more than pairs of tokens.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile \
    "transformer-lens==4.3.0" "transformers==5.24.0" "torch==2.13.0"

cat > "$folder/program.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

# A Qwen3 with random weights, and a tokenizer that the library asks for.
folder = Path(sys.argv[1])
torch.manual_seed(0)
Qwen3ForCausalLM(Qwen3Config(
    vocab_size=27, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=16, max_position_embeddings=128, initializer_range=0.3,
    tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
vocab = {token: i for i, token in enumerate(["<end>", *"abcdefghijklmnopqrstuvwxyz"])}
end = {"id": 0, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": False,
       "normalized": False, "special": True}
(folder / "tokenizer.json").write_text(json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Fuse"},
    "model": {"type": "BPE", "vocab": vocab, "merges": []}}))
(folder / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<end>", "eos_token": "<end>"}))

model = AutoModelForCausalLM.from_pretrained(folder).eval()
bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
prompt = torch.tensor([[3, 7, 9, 4, 11, 20]])
N = 20


def loop(sees_all):
    """The most likely token, N times, by the logits of transformers. After the first, the model sees
    all tokens so far, or only the last."""
    ids = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(dim=-1)], dim=1)
    for _ in range(N - 1):
        read = ids if sees_all else ids[:, -1:]
        ids = torch.cat([ids, model(read).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, prompt.shape[1] :].tolist()


def generated(**settings):
    ids = bridge.generate(prompt, max_new_tokens=N, do_sample=False, stop_at_eos=False,
                          verbose=False, **settings)
    return ids[0, prompt.shape[1] :].tolist()


with torch.no_grad():
    difference = (bridge(prompt) - model(prompt).logits).abs().max().item()
    expected, forgetful = loop(sees_all=True), loop(sees_all=False)
seen, uncached = generated(), generated(use_past_kv_cache=False)

print("TransformerLens", version("transformer-lens"), "transformers", version("transformers"))
print(f"largest difference of a logit of the prompt: {difference:.0e}")
print("expected (a loop over the logits):              ", expected)
print("generate(use_past_kv_cache=False):              ", uncached)
print("seen: generate():                               ", seen)
print("a loop in which the model sees its last token:  ", forgetful)
assert difference < 1e-4 and uncached == expected
assert seen == forgetful != expected
PYTHON
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 \
    "$folder/venv/bin/python" "$folder/program.py" "$folder/model"
