#!/usr/bin/env bash
# transformers: a tokenizer.json can say that a token is not special, so that decoding always keeps
# it. If tokenizer_config.json names the same token as pad_token, loading overrides this, and
# decode(..., skip_special_tokens=True), which text-generation pipelines use, drops it from every text
# without a word. An empty "added_tokens_decoder" beside pad_token prevents this. It matters to small
# models over characters or bytes. They have no token to spare for padding, so an ordinary one has to
# serve. If that is the line break, all generated lines run together.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile "transformers==5.24.0" "tokenizers==0.23.3"

cat > "$folder/program.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from transformers import AutoTokenizer

vocab = {"\n": 0, " ": 1, "a": 2, "b": 3, "c": 4}
line_break = {"id": 0, "content": "\n", "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": False}
tokenizer_json = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [line_break],
    "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Fuse"},
    "model": {"type": "BPE", "vocab": vocab, "merges": []}}
text = "ab\nc a\n"


def decoded(name, **settings):
    """The text, encoded and decoded by a folder whose tokenizer_config.json has these settings."""
    folder = Path(sys.argv[1], name)
    folder.mkdir(parents=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert ids == [vocab[character] for character in text]
    assert tokenizer.decode(ids) == text
    result = tokenizer.decode(ids, skip_special_tokens=True)
    print(f"{name:40} {result!r}, special: {tokenizer.added_tokens_decoder[0].special}")
    return result


print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("expected: not special in any of these folders, so decoding keeps it:", repr(text))
print("seen:")
plain = decoded("no pad_token")
padded = decoded("pad_token", pad_token="\n")
rescued = decoded("pad_token, added_tokens_decoder {}", pad_token="\n", added_tokens_decoder={})
assert plain == text
assert padded == "abc a", "seen: the line breaks are gone"
assert rescued == text, "seen: an empty dictionary brings them back"
PYTHON
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" "$folder/program.py" "$folder/models"
