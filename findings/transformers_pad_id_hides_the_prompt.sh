#!/usr/bin/env bash
# transformers: generate(ids) of a single prompt, without an attention mask, should read all of it.
# But if the model names a pad_token_id, generate() takes each occurrence of that id in the prompt
# for padding and hides it from the model. The text is another one, without an error or a warning.
# (If pad_token_id equals eos_token_id, this does not happen.) It matters to small models over
# characters or bytes. Their padding token, such as id 0, often occurs in texts too, and a loop over
# the model's own logits then gives another text than generate().
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile "transformers==5.24.0" "torch==2.13.0" "numpy==2.4.6"

cat > "$folder/program.py" <<'PYTHON'
import logging

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

messages = []


class Keep(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())


logging.getLogger("transformers").addHandler(Keep())
torch.manual_seed(0)
config = GPT2Config(vocab_size=32, n_positions=64, n_embd=64, n_layer=2, n_head=4,
                    initializer_range=0.3, bos_token_id=None, eos_token_id=None)
model = GPT2LMHeadModel(config).eval()
prompt = torch.tensor([[7, 0, 21, 0, 0, 9, 14]])  # 0 is an ordinary token here
N = 12


def loop(read):
    """The most likely token, N times, by the model's own logits. read: which tokens it sees."""
    ids, mask = prompt, read
    for _ in range(N):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1:]
        ids = torch.cat([ids, logits.argmax(dim=-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids[0, prompt.shape[1] :].tolist()


def generated(**settings):
    ids = model.generate(prompt, max_new_tokens=N, do_sample=False, **settings)
    return ids[0, prompt.shape[1] :].tolist()


with torch.no_grad():
    expected = loop(torch.ones_like(prompt))
    hidden = loop((prompt != 0).long())
    without = generated()
    model.generation_config.pad_token_id = 0
    messages.clear()
    seen = generated()
    said = list(messages)
    masked = generated(attention_mask=torch.ones_like(prompt))

print("transformers", transformers.__version__, "torch", torch.__version__.split("+")[0])
print("expected (a loop over the logits):           ", expected)
print("generate(ids), no pad_token_id:              ", without)
print("seen: generate(ids), pad_token_id 0:         ", seen)
print("a loop over the logits that hides the zeros: ", hidden)
print("generate(ids, attention_mask of ones):       ", masked)
print("messages:", said)
assert without == expected and masked == expected
assert seen == hidden != expected
assert not said, "seen: nothing is said about it"
PYTHON
"$folder/venv/bin/python" "$folder/program.py"
