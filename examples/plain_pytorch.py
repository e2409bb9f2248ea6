"""A plain PyTorch loop whose weights stay in the null space: one AdamW step per line of TEXTS.

Command: `python examples/plain_pytorch.py MODEL BASES TEXTS OUT`.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nspo import NullSpaceBases, constrain

model_folder, bases_file, texts, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model_folder)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
constraint = constrain(model, optimizer, NullSpaceBases.load(bases_file))
for text in Path(texts).read_text(encoding="utf-8").splitlines():
    ids = tokenizer(text, return_tensors="pt").input_ids
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(out)
tokenizer.save_pretrained(out)
print(f"worst leakage {max(constraint.leakage().values()):.1e}")  # noqa: T201
