"""The constraint in verl (0.9): put this file on PYTHONPATH and give verl these keys, beside your own:

    NSPO_BASES=bases.safetensors python -m verl.trainer.main_ppo actor_rollout_ref.model.external_lib=nspo_in_verl \
        actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.fsdp_config.model_dtype=fp32 ...
"""

import os
from typing import Any

from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from nspo import NullSpaceBases, constrain

build = FSDPEngineWithLMHead._build_model_optimizer


def build_constrained(engine: Any) -> None:
    """As verl builds model and optimizer; an actor's are constrained, a reference and a critic stay as they are."""
    build(engine)
    if engine.optimizer is not None and engine.model_config.model_type == "language_model":
        engine.constraint = constrain(engine.module, engine.optimizer, NullSpaceBases.load(os.environ["NSPO_BASES"]))


FSDPEngineWithLMHead._build_model_optimizer = build_constrained
