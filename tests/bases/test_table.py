"""bases_table.py, `nspo bases info` and its figure: what a file of bases says about itself, in words and in a plot."""

from pathlib import Path

import pytest
import torch

from nspo.bases.derived import merge
from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.bases.table import block_of, by_kind, data_rows, facts, kind_of, kind_rows
from nspo.cli import main as cli
from nspo.report import plots

MODEL = {"architecture": "LlamaForCausalLM", "source": "org/model", "revision": "v1", "weights": "abc"}


def bases(blocks: int = 11, **identity: object) -> NullSpaceBases:
    """Bases of two kinds of site in every block, of 3 and of 4 directions."""
    sites = []
    for block in range(blocks):
        for name, width in (("self_attn.q_proj", 3), ("mlp.down_proj", 4)):
            layers = [f"model.layers.{block}.{name}"]
            layers += [layers[0].replace("q_proj", "k_proj")] if width == 3 else []
            gram = torch.diag(torch.arange(width, 0, -1.0))
            validation = torch.eye(width) if block else None
            sites.append(compute_basis(layers[0], layers, gram, 99, "rank", 1 + block % 2, validation))
    return NullSpaceBases(sites, {layer: 1.0 for site in sites for layer in site.layers}, **identity)


@pytest.mark.parametrize(
    ("layers", "block", "kind"),
    [
        (["model.layers.12.self_attn.q_proj", "model.layers.12.self_attn.v_proj"], 12, "self_attn.q/v_proj"),
        (["model.layers.0.mlp.down_proj"], 0, "mlp.down_proj"),
        (["transformer.h.3.attn.c_proj"], 3, "attn.c_proj"),
        (["transformer.h.3.mlp.c_proj"], 3, "mlp.c_proj"),
        (["transformer.h.1.attn.q_proj", "transformer.h.1.mlp.fc_in"], 1, "attn.q_proj + mlp.fc_in"),
        (["m.layers.2.mlp.experts.7.gate_proj", "m.layers.2.mlp.experts.7.up_proj"], 2, "mlp.experts.*.gate/up_proj"),
        (["0.up"], 0, "up"),
        (["head"], 0, "head"),
    ],
)
def test_kind_is_the_name_without_the_block(layers: list[str], block: int, kind: str) -> None:
    """One kind per place in the blocks, whatever the architecture calls it; GPT-2's two `c_proj` stay apart."""
    assert (block_of(layers[0]), kind_of(layers)) == (block, kind)


def test_kinds_are_summed_up_in_the_order_of_blocks(tmp_path: Path) -> None:
    """Blocks count as numbers though the file sorts them as text; means leave out what was not measured."""
    bases().save(tmp_path / "bases.safetensors")
    loaded = NullSpaceBases.load(tmp_path / "bases.safetensors")
    kinds = by_kind(loaded)
    assert list(kinds) == ["self_attn.q/k_proj", "mlp.down_proj"]
    assert [block_of(site.site) for site in kinds["mlp.down_proj"]] == list(range(11))
    attention, down = kind_rows(loaded)
    assert (attention["sites"], attention["width"], down["width"]) == (11, 3, 4)
    assert attention["rank"] == pytest.approx(16 / 11)
    assert down["free"] == pytest.approx(1 - 16 / 44)
    assert attention["leakage"] == pytest.approx((5 * (2 / 3) ** 0.5 + 5 * (1 / 3) ** 0.5) / 10)
    assert attention["harmful_energy"] is None


def test_facts_name_model_rule_and_data() -> None:
    """What the manifest knows is said, what it does not know is called so, and merged files keep their data apart."""
    domains = {"maths": {"basis": 8, "validation": 4}, "harmful": {"basis": 5}}
    one = bases(1, model=MODEL, domains=domains, settings={"weights": {"maths": 2.0}})
    assert facts(one) == {
        "model": "LlamaForCausalLM",
        "source": "org/model@v1",
        "weights": "abc",
        "tokenizer": "not recorded",
        "rule": "rank, threshold 1, maths weighs 2",
        "data": "harmful 5 tokens (0 of validation); maths 8 tokens (4 of validation)",
        "coverage": "not recorded",
    }
    assert facts(bases(1))["data"] == "not recorded"
    names = [row["domain"] for row in data_rows(merge([one, one]).manifest)]
    assert names == ["harmful (file 1)", "maths (file 1)", "harmful (file 2)", "maths (file 2)"]


def test_info_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`nspo bases info` prints the facts, every site in order and every kind, and draws the figure it is asked for."""
    bases(model=MODEL).save(tmp_path / "bases.safetensors")
    command = ["bases", "info", str(tmp_path / "bases.safetensors"), "--plot", str(tmp_path / "bases.png")]
    assert cli.main(command) == 0
    header, sites, kinds = capsys.readouterr().out.split("\n\n")
    assert "source     org/model@v1" in header.splitlines()
    assert [line.split()[0].split(".")[2] for line in sites.splitlines()[1::2]][:3] == ["0", "1", "2"]
    assert [line.split()[0] for line in kinds.splitlines()] == ["kind", "self_attn.q/k_proj", "mlp.down_proj"]
    assert (tmp_path / "bases.png").read_bytes().startswith(b"\x89PNG")


def test_overview_draws_every_kind_and_every_block(tmp_path: Path) -> None:
    """A spectrum per kind and one panel with the free directions of every block; after a merge only the latter."""
    one = bases(model=MODEL)
    *spectra, free = plots.bases_overview(by_kind(one)).axes
    assert [axes.get_title(loc="left") for axes in spectra] == ["self_attn.q/k_proj, width 3", "mlp.down_proj, width 4"]
    drawn = {tuple(line.get_ydata()) for line in free.lines}
    assert drawn == {tuple(site.null_dim for site in sites) for sites in by_kind(one).values()}
    figure = plots.bases_overview(by_kind(merge([one, one])))
    assert len(figure.axes) == 1
    plots.write(figure, tmp_path / "merged.svg")
    assert (tmp_path / "merged.svg").stat().st_size > 0
