"""The reinforcement learning stage: GRPO on TRL's own trainer, with the null-space constraint as one callback."""

from nspo.policy.training import train_policy as train_policy

__all__ = ["train_policy"]
