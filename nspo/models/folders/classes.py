"""Which transformers class a configuration is loaded as: one answer for every stage, known before a weight is read."""

import inspect
from typing import Any, cast

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops

from nspo.errors import UserError

OTHER_INPUTS = {"vision_config": "image", "audio_config": "audio"}  # parts of a configuration that read no text


def model_class(config: Any) -> type[PreTrainedModel]:
    """The class that a model with this configuration is loaded as.

    The one that saved it (`architectures`), where transformers has it and it writes text: a multimodal model stays
    whole and is saved whole again. Else, as for a folder that names no class, what transformers maps its type to.

    Raises:
        UserError: an encoder-decoder, a type of model without such a class, or one that reads no text alone.
    """
    found = _mapped_class(config)
    needed = {name for name, part in inspect.signature(found.forward).parameters.items() if part.default is part.empty}
    if beside := sorted(needed - {"self", "input_ids", "args", "kwargs"}):
        raise UserError(
            f"{found.__name__} cannot read text without {beside[0]}", expected="a model that reads text alone"
        )
    return found


def _mapped_class(config: Any) -> type[PreTrainedModel]:
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"the model is of the type {config.model_type!r}, an encoder-decoder", expected="a decoder alone"
        )
    for name in getattr(config, "architectures", None) or ():
        named: Any = getattr(transformers, name, None)
        known = isinstance(named, type) and issubclass(named, PreTrainedModel)
        if known and named.can_generate() and isinstance(config, named.config_class or ()):
            return cast(type[PreTrainedModel], named)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if (mapped := auto._model_mapping.get(type(config), None)) is not None:
            return cast(type[PreTrainedModel], mapped)
    raise UserError(
        f"transformers {transformers.__version__} has no causal language model for the type "
        f"{getattr(config, 'model_type', None)!r} (config.json)",
        expected="a decoder that it knows",
    )


def empty_model(config: Any, cls: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """The model of a configuration on the meta device: all its modules and shapes, no memory for weights.

    Args:
        cls: its class, by default the one that it is loaded as.
    """
    with torch.device("meta"), meta_device_safe_creation_ops():
        return (cls or model_class(config))(config)


def other_inputs(config: Any) -> list[str]:
    """The kinds of input beside text that a model with this configuration reads."""
    return [kind for key, kind in OTHER_INPUTS.items() if getattr(config, key, None) is not None]
