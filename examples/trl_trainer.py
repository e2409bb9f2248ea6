"""TRL's own trainer whose weights stay in the null space: one callback, and the trainer as it is.

`NullSpaceCallback` freezes what no basis covers, attaches the constraint once the trainer has prepared model and
optimizer, keeps its anchor when a run resumes, and verifies the weights at every save. Any trainer of TRL or
transformers takes it.

Command: `python examples/trl_trainer.py MODEL BASES TEXTS OUT`.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from nspo import NullSpaceCallback

model_folder, bases_file, texts, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
callback = NullSpaceCallback(model, bases_file)
trainer = SFTTrainer(
    model,
    args=SFTConfig(out, learning_rate=1e-4, num_train_epochs=1, bf16=torch.cuda.is_available(), report_to="none"),
    train_dataset=Dataset.from_dict({"text": Path(texts).read_text(encoding="utf-8").splitlines()}),
    processing_class=AutoTokenizer.from_pretrained(model_folder),
    callbacks=[callback],
)
trainer.train()
trainer.save_model(out)
print(f"worst leakage {max(callback.constraint.leakage().values()):.1e}")  # noqa: T201
