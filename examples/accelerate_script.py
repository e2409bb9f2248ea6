"""An Accelerate script whose weights stay in the null space: one process or several (DDP).

Command: `accelerate launch examples/accelerate_script.py MODEL BASES TEXTS OUT`.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from nspo import NullSpaceBases, constrain, freeze_uncovered

model_folder, bases_file, texts, out = sys.argv[1:]
accelerator = Accelerator()
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model_folder)
bases = NullSpaceBases.load(bases_file)
freeze_uncovered(model, bases)  # before `prepare`: DDP cannot freeze afterwards
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
data = torch.utils.data.DataLoader(Path(texts).read_text(encoding="utf-8").splitlines(), shuffle=True)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
constraint = constrain(model, optimizer, bases)  # after `prepare`: FSDP2 replaces the weights there
for lines in data:
    ids = tokenizer(lines, return_tensors="pt").input_ids.to(accelerator.device)
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    optimizer.zero_grad()
state = accelerator.get_state_dict(model)
accelerator.unwrap_model(model).save_pretrained(out, state_dict=state, is_main_process=accelerator.is_main_process)
tokenizer.save_pretrained(out)
accelerator.print(f"worst leakage {max(constraint.leakage().values()):.1e}")
