"""Five steps of verl's FSDP2 engine on a CPU, where it is not at home: `python -m support.verl_on_cpu MODEL BASES`.

verl takes its device from a GPU; here every name of its that asks for one says `cpu`, and the patches of models for its
packed batches, which want flash attention, are left out. Module, wrapping, optimizer and its step are verl's own.
"""

import os
import sys

import torch

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ["NSPO_BASES"] = sys.argv[2]
torch.distributed.init_process_group("gloo")

import verl.workers.engine.fsdp.transformer_impl as engines  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig  # noqa: E402

HERE = {"get_device_name": lambda: "cpu", "get_device_id": lambda: "cpu", "get_torch_device": lambda: torch.cpu}
for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "verl"]:
    for name, value in HERE.items():
        if hasattr(module, name):
            setattr(module, name, value)
engines.device_name, engines.apply_monkey_patch = "cpu", lambda **_: None

engine = engines.FSDPEngineWithLMHead(
    HFModelConfig(
        path=sys.argv[1],
        external_lib="nspo_in_verl",
        override_config={"attn_implementation": "eager"},
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
    ),
    FSDPEngineConfig(strategy="fsdp2", model_dtype="fp32", dtype="float32", use_torch_compile=False),
    FSDPOptimizerConfig(lr=1e-2, weight_decay=0.1),
    CheckpointConfig(),
)
engine.initialize()
before = [parameter.detach().full_tensor().clone() for parameter in engine.module.parameters()]
ids = torch.arange(5, 29).reshape(2, 12)
for _ in range(5):
    engine.optimizer_zero_grad()
    engine.module(input_ids=ids, labels=ids).loss.backward()
    engine.optimizer_step()
moved = [
    not torch.equal(old, new.detach().full_tensor())
    for old, new in zip(before, engine.module.parameters(), strict=True)
]
sys.stdout.write(f"moved {sum(moved)}\nworst leakage {max(engine.constraint.leakage().values())}\n")
