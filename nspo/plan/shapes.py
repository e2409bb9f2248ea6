"""The sizes of decoder models, counted on the meta device from a config.json; no weight is loaded. Part of `nspo plan`.

Experts count by how many of them a token asks, and every one has an input of its own.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nspo.errors import UserError

OUTPUTS = re.compile(r"(^|_)(o|out|down|dense|c_proj|wo|w2|fc2|4h_to_h)(_|$)|^fc_out$|^c_proj$")  # read alone
ASKED = ("top_k", "num_experts_per_tok", "top_k_experts", "num_selected_experts", "moe_top_k", "moe_topk", "moe_k")


@dataclass(frozen=True)
class Matrix:
    """Equal weights: `count` of them, each (out, width), which `share` of the tokens are multiplied with."""

    out: int
    width: int
    count: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class Input:
    """Equal sites: `count` of them, `width` wide, which `share` of the tokens reach."""

    width: int
    count: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder.

    Attributes:
        blocks: how many.
        matrices: the weights of all blocks that train.
        sites: the inputs that they read.
        embedding: weights of the embedding, and as many of the head.
        tied: whether the head is the embedding.
        rest: all other weights: norms, routers, other towers.
    """

    blocks: int
    matrices: tuple[Matrix, ...]
    sites: tuple[Input, ...]
    embedding: int
    tied: bool
    rest: int = 0

    @property
    def trained(self) -> int:
        """Weights that train."""
        return sum(one.count * one.out * one.width for one in self.matrices)

    @property
    def weights(self) -> int:
        """All weights."""
        return self.trained + self.rest + self.embedding * (1 if self.tied else 2)

    @property
    def multiplied(self) -> float:
        """Weights that one token is multiplied with: of experts those that it asks."""
        return sum(one.share * one.count * one.out * one.width for one in self.matrices) + self.rest + self.embedding

    @property
    def active(self) -> float:
        """Weights that one token uses, as models are advertised: the embedding counts."""
        return self.multiplied + (0 if self.tied else self.embedding)

    @property
    def moments(self) -> int:
        """Numbers in one second moment of every site."""
        return sum(one.count * one.width**2 for one in self.sites)

    @property
    def widest(self) -> int:
        """Width of the widest site."""
        return max(one.width for one in self.sites)


def dense(hidden: int, mlp: int, blocks: int, heads: int, key_value_heads: int, vocabulary: int, tied: bool) -> Shape:
    """The shape of a Llama-like decoder, norms left out."""
    narrow = hidden * key_value_heads // heads
    outputs = [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)]
    outputs += [(mlp, hidden), (mlp, hidden), (hidden, mlp)]
    matrices = tuple(Matrix(out, width, blocks) for out, width in outputs)
    sites = (Input(hidden, 3 * blocks), Input(mlp, blocks))  # of q/k/v, o, gate/up; of down
    return Shape(blocks, matrices, sites, vocabulary * hidden, tied)


SHAPES = {
    "smollm2-135m": dense(576, 1536, 30, 9, 3, 49152, True),
    "qwen2.5-1.5b": dense(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": dense(3584, 18944, 28, 28, 4, 152064, False),
    "llama-3-70b": dense(8192, 28672, 80, 64, 8, 128256, False),
}


def shape_of(model: str) -> Shape:
    """The shape of a model folder, of a config.json, or of a source that names a known model.

    Raises:
        UserError: for anything else, or a model that could not be trained.
    """
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file() and file.name == "config.json":
        return count(file.parent)
    known = [shape for name, shape in SHAPES.items() if name in model.lower()]
    if not known:
        raise UserError(
            f"--model {model}", expected=f"a model folder, a config.json, or a name with one of {', '.join(SHAPES)}"
        )
    return known[0]


def count(folder: Path) -> Shape:
    """The shape of the model that the config.json of a folder describes.

    Raises:
        UserError: when transformers knows no such decoder, or it holds experts in a form that cannot be constrained.
    """
    from torch import nn

    from nspo.models.folders.classes import empty_model
    from nspo.models.loading import load_config
    from nspo.models.structure.experts import find_experts, is_router, unknown_experts
    from nspo.models.structure.linears import Weight, is_transposed
    from nspo.models.structure.sites import modules_in_blocks

    config = load_config(folder, f"--model {folder}")
    model: Any = empty_model(config)
    blocks = modules_in_blocks(model)
    if unknown := next(unknown_experts(blocks), None):
        raise UserError(f"--model {folder}: {unknown} holds experts in a form that cannot be constrained")
    experts = {one.name: one for one in find_experts(blocks)}
    matrices: list[Matrix] = []
    sites: list[Input] = []
    reading: set[tuple[str, int]] = set()  # modules whose layers read an input of this width together
    for name, module in blocks.items():
        if name in experts:
            one = experts[name]
            share = _asked(model.get_submodule(name.rpartition(".")[0]), config) / one.count
            up = Weight(one.shared, module, one.shared.rpartition(".")[2], one.module.is_transposed)
            down = Weight(one.own, module, "down_proj", one.module.is_transposed)
            for weight in (up, down):
                matrices.append(Matrix(weight.size // one.count // weight.width, weight.width, one.count, share))
            sites += [Input(up.width), Input(down.width, one.count, share)]
        elif (isinstance(module, nn.Linear) or is_transposed(module)) and not is_router(name, module, experts.values()):
            weight, (parent, _, own) = Weight(name, module, "weight", is_transposed(module)), name.rpartition(".")
            matrices.append(Matrix(weight.size // weight.width, weight.width))
            alone = OUTPUTS.search(own) is not None
            if alone or (parent, weight.width) not in reading:
                sites.append(Input(weight.width))
            if not alone:
                reading.add((parent, weight.width))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    size = embedding.weight.numel()
    trained = sum(one.count * one.out * one.width for one in matrices)
    everything = sum(parameter.numel() for parameter in model.parameters())
    rest = everything - trained - size * (1 if tied else 2)
    return Shape(config.get_text_config().num_hidden_layers, tuple(matrices), tuple(sites), size, tied, rest)


def _asked(block: Any, config: Any) -> int:
    """How many experts of a block a token asks: as one of its modules says, or the configuration."""
    for source in (*block.modules(), config.get_text_config()):
        for name in ASKED:
            if isinstance(found := getattr(source, name, None), int):
                return found
    raise UserError(
        "--model: nothing says how many experts a token asks", expected="num_experts_per_tok in config.json"
    )
