"""The sizes of decoder models, counted from their config.json without loading any weight. Part of `nspo plan`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nspo.errors import UserError
from nspo.files.manifest import read_json


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, as its config.json names them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str) -> "Shape":
        """The shape in a config.json.

        Raises:
            UserError: when it lacks a size.
        """
        heads = config.get("num_attention_heads")
        found = {"num_key_value_heads": heads, **config, "tied": config.get("tie_word_embeddings", False)}
        wanted = cls.__dataclass_fields__
        if missing := [key for key in wanted if not isinstance(found.get(key), int)]:
            raise UserError(f"{name} has no {missing[0]}: expected the config.json of a decoder such as Llama or Qwen2")
        return cls(**{key: found[key] for key in wanted})

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(output, input) of the linear layers of one block."""
        width, mlp = self.hidden_size, self.intermediate_size
        narrow = width * self.num_key_value_heads // self.num_attention_heads
        return [
            (width, width),
            (narrow, width),
            (narrow, width),
            (width, width),
            (mlp, width),
            (mlp, width),
            (width, mlp),
        ]

    @property
    def sites(self) -> list[int]:
        """Widths of all distinct inputs: of q/k/v, o, gate/up and down in every block."""
        return [self.hidden_size, self.hidden_size, self.hidden_size, self.intermediate_size] * self.num_hidden_layers

    @property
    def trained(self) -> int:
        """Weights of the blocks' linear layers, which are what trains."""
        return self.num_hidden_layers * sum(out * width for out, width in self.layers)

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and as many of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def weights(self) -> int:
        """All stored weights, norms left out."""
        return self.trained + self.embedding * (1 if self.tied else 2)

    @property
    def multiplied(self) -> int:
        """Weights that one token is multiplied with."""
        return self.trained + self.embedding


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, True),
    "qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 152064, False),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128256, False),
}


def shape_of(model: str) -> Shape:
    """The shape of a model folder, of a config.json, or of a source that names a known model.

    Raises:
        UserError: for anything else.
    """
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file() and file.suffix == ".json":
        return Shape.of(read_json(file), str(file))
    known = [shape for name, shape in SHAPES.items() if name in model.lower()]
    if not known:
        raise UserError(
            f"--model {model}: expected a model folder, a config.json, or a name with one of {', '.join(SHAPES)}"
        )
    return known[0]
