"""LoRA whose update stays in the null space: TRL's own trainer, and no callback, since no step can leave it.

`null_space_adapter` freezes the adapters' inputs on directions that general tasks do not use. OUT is the merged model;
a checkpoint in OUT/checkpoint-N is a stock PEFT adapter. Needs peft: `pip install 'nspo[lora]'`.

Command: `python examples/null_space_adapter.py MODEL BASES TEXTS OUT`.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from nspo import NullSpaceBases, merge_adapter, null_space_adapter, verify_adapter

model_folder, bases_file, texts, out = sys.argv[1:]
bases = NullSpaceBases.load(bases_file)
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
trainer = SFTTrainer(
    null_space_adapter(model, bases),
    args=SFTConfig(out, learning_rate=1e-2, num_train_epochs=1, bf16=torch.cuda.is_available(), report_to="none"),
    train_dataset=Dataset.from_dict({"text": Path(texts).read_text(encoding="utf-8").splitlines()}),
    processing_class=AutoTokenizer.from_pretrained(model_folder),
)
trainer.train()
adapted = trainer.accelerator.unwrap_model(trainer.model)
print(f"worst leakage {max(verify_adapter(adapted, bases).values()):.1e}")  # noqa: T201
merge_adapter(adapted, bases).save_pretrained(out)
trainer.processing_class.save_pretrained(out)
