"""What a policy is trained from, as one object: the files and folders of the stages before, and which of them fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nspo.errors import UserError
from nspo.files.manifest import MANIFEST_NAME, fingerprint_files, read_json
from nspo.models.loading import model_identity
from nspo.settings.policy.losses import WDOOR
from nspo.settings.policy.methods import MethodSettings


@dataclass(frozen=True)
class PolicyInputs:
    """The inputs of the stage.

    Attributes:
        model: folder of the base model.
        bases: bases.safetensors, for the constraints that need it.
        layers: the pattern `activations.layers`. A method without constraint never sees the bases, and so learns which
            layers to train.
        reward, cost: folders of the two preference models.
        prompts: prompts.parquet.
        pairs: pairs.parquet, for losses on pairs.
        guide_policy: folder of the policy that weighs tokens, for the loss wdoor.
    """

    model: Path
    bases: Path | None
    layers: str
    reward: Path
    cost: Path
    prompts: Path
    pairs: Path | None = None
    guide_policy: Path | None = None

    def check(self, name: str, method: MethodSettings) -> None:
        """Refuse an input that is missing, or given although the method has no use for it.

        Raises:
            UserError: naming the method and the flag.
        """
        for what, path, needed in (
            ("pairs", self.pairs, method.loss.on_pairs),
            ("guide policy", self.guide_policy, isinstance(method.loss, WDOOR)),
            ("bases", self.bases, method.constraint.needs_bases),
        ):
            if (path is not None) != needed:
                says = f"needs {what}, found none" if needed else f"takes no {what}, found {path}"
                flag = f"`--{what.replace(' ', '-')}`"
                change = f"give the path ({flag})" if needed else f"leave {flag} out"
                raise UserError(f"method {name!r} {says}", change=change)

    def identity(self) -> dict[str, Any]:
        """What the policy's manifest says of them: fingerprints, and what made the preference models."""
        return {
            "layers": self.layers,
            "base": model_identity(self.model),
            "bases": fingerprint_files([self.bases]) if self.bases else None,
            "reward": read_json(self.reward / MANIFEST_NAME),
            "cost": read_json(self.cost / MANIFEST_NAME),
            "prompts": fingerprint_files([self.prompts]),
            "pairs": fingerprint_files([self.pairs]) if self.pairs else None,
            "guide": model_identity(self.guide_policy) if self.guide_policy else None,
        }
