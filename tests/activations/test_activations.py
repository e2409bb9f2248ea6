"""Activations: which inputs are kept, how sites are found, and what the store answers."""

import dataclasses
import itertools
import json
import shutil

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tf
from support.activation_runs import contents, raw_rows, run, settings
from support.model_copy import copy_model

from nspo.activations import stage as activations
from nspo.activations.chunks import Chunk, batches, kept_positions
from nspo.activations.stage import choose_storage
from nspo.activations.store import ActivationStore, PartWriter
from nspo.errors import UserError
from nspo.files.manifest import MANIFEST_NAME, make_manifest, write_json
from nspo.models import loading as models
from nspo.models.chat import chat_ids
from nspo.models.structure.sites import Site, find_sites, without_site
from nspo.nullspace.moments import add_second_moment, mirror, unpack, upper_blocks

# ------------------------------------------------------------------------------------------- sites

TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Gemma", "Gemma2", "Qwen3"])
def test_layers_that_read_the_same_tensor_share_one_site(family):
    """q/k/v are one site, gate/up are one, o and down stand alone; head and embeddings are in none."""
    config = getattr(tf, f"{family}Config")(**TINY, num_key_value_heads=1, head_dim=8)
    sites = find_sites(getattr(tf, f"{family}ForCausalLM")(config).eval())
    short = [tuple(layer.removeprefix("model.layers.0.") for layer in site.layers) for site in sites[:4]]
    attention, mlp = "self_attn.", "mlp."
    assert short == [
        (attention + "q_proj", attention + "k_proj", attention + "v_proj"),
        (attention + "o_proj",),
        (mlp + "gate_proj", mlp + "up_proj"),
        (mlp + "down_proj",),
    ]
    assert len(sites) == 8
    assert [site.width for site in sites[:4]] == [16, 16, 16, 24]
    assert all(site.name == site.layers[0] for site in sites)


def test_conv1d_layers_of_gpt2_are_found_with_their_input_width():
    """GPT-2 keeps weights as (in, out): the width is the input's, not the output's."""
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_inner=24)).eval()
    found = {site.name: site.width for site in find_sites(model)}
    block = "transformer.h.1."
    expected = {"attn.c_attn": 16, "attn.c_proj": 16, "mlp.c_fc": 16, "mlp.c_proj": 24}
    assert {k.removeprefix(block): v for k, v in found.items() if k.startswith(block)} == expected


def test_layers_that_share_an_input_across_attention_and_mlp_share_one_site():
    """In a parallel block (GPT-J) q, k, v and the first MLP layer read one normalised input: structure, not names."""
    config = tf.GPTJConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_inner=24, rotary_dim=4)
    first = find_sites(tf.GPTJForCausalLM(config).eval())[0]
    assert [layer.rsplit(".", 1)[1] for layer in first.layers] == ["k_proj", "v_proj", "q_proj", "fc_in"]


def test_pattern_selects_by_full_name_and_refuses_what_matches_nothing(tiny_model_dir):
    """The pattern must match the whole name; a site keeps only the layers that match."""
    model = models.load_model(tiny_model_dir)
    only = find_sites(model, r".*\.1\..*(k|v|down)_proj")
    assert [site.layers for site in only] == [
        ("model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"),
        ("model.layers.1.mlp.down_proj",),
    ]
    with pytest.raises(UserError, match=r"activations\.layers: 'down_proj' matches none.*model\.layers\.0\.self_attn"):
        find_sites(model, "down_proj")
    with pytest.raises(UserError, match=r"activations\.layers: '\(' is not a regular expression"):
        find_sites(model, "(")


def test_text_model_of_gemma3_is_found_by_structure():
    """Sliding and full attention layers, further norms: still four sites a block."""
    config = tf.Gemma3TextConfig(**TINY, num_key_value_heads=1, head_dim=8, sliding_window=4)
    assert len(find_sites(tf.Gemma3ForCausalLM(config).eval())) == 8


def test_a_layer_that_is_not_read_once_per_token_has_no_site_and_is_named(tiny_model_dir):
    """A shared module would count its inputs twice under one name; one that is never called has no inputs."""
    model = models.load_model(tiny_model_dir)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].spare = torch.nn.Linear(4, 4)
    sites = find_sites(model)
    shared = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert without_site(model, sites) == [*shared, "model.layers.1.spare"]
    assert not any("mlp" in layer for site in sites for layer in site.layers)
    with pytest.raises(UserError, match=r"none of the 3 layers .*gate_proj, reads one vector per token"):
        find_sites(model, ".*mlp.*")


def test_what_is_linear_in_a_recurrent_block_is_covered():
    """Mamba multiplies by the weight of dt_proj and never calls it: left out, the other projections have sites."""
    small = {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
    model = tf.MambaForCausalLM(tf.MambaConfig(**small)).eval()
    sites = find_sites(model)
    assert without_site(model, sites) == [f"backbone.layers.{n}.mixer.dt_proj" for n in range(2)]
    names = {layer.split("mixer.")[1] for site in sites for layer in site.layers}
    assert names == {"in_proj", "x_proj", "out_proj"}


# ------------------------------------------------------------------------------------------- what is kept


def test_batched_moments_equal_those_of_unpadded_single_sequences(raw, moments, tiny_model_dir):
    """Padding leaves no trace: every sequence alone, hooked independently, gives the same second moment."""
    model = models.load_model(tiny_model_dir)
    for split in ("basis", "validation"):
        for site in moments.sites:
            seen: list[torch.Tensor] = []
            handle = model.get_submodule(site).register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0][0]))
            for domain in ("chat", "maths"):
                rows = raw_rows(raw, site, domain=domain, split=split)
                for sample in {row["sample"] for row in rows}:
                    tokens = [row["token"] for row in rows if row["sample"] == sample]
                    first = model.config.bos_token_id  # the dropped first position: the template's <|im_start|>
                    with torch.no_grad():
                        model(input_ids=torch.tensor([[first, *tokens]]))
                    seen[-1] = seen[-1][1:]
            handle.remove()
            k = torch.cat(seen).double()
            gram, tokens = moments.gram(site, split)
            assert tokens == len(k)
            torch.testing.assert_close(gram, k.T @ k / len(k), rtol=1e-4, atol=1e-6)


def test_rows_are_whole_sequences_without_the_first_position(raw, tiny_model_dir, prompts):
    """Positions run from drop_first without gaps; prompt tokens are the chat template's; answers are marked."""
    tokenizer = models.load_tokenizer(tiny_model_dir)
    texts = [r["prompt"] for r in pq.read_table(prompts).to_pylist() if r["domain"] == "chat" and r["split"] == "train"]
    rows = raw_rows(raw, "model.layers.0.mlp.down_proj", domain="chat", split="basis")
    for sample in range(4):
        mine = [row for row in rows if row["sample"] == sample]
        ids = chat_ids(tokenizer, texts[sample])
        assert [row["position"] for row in mine] == list(range(1, len(mine) + 1))
        assert [row["token"] for row in mine if not row["is_answer"]] == ids[1:]
        assert 1 <= sum(row["is_answer"] for row in mine) <= 5
    assert raw.tokens("chat", "basis") == len(rows)


def test_nothing_after_the_end_of_an_answer_is_kept(tmp_path, raw, tiny_model_dir, prompts):
    """With a token the model does emit declared as end of sequence, each answer's last kept token is the first such."""
    rows = raw_rows(raw, "model.layers.0.mlp.down_proj", domain="maths", split="basis")
    stop = next(row["token"] for row in rows if row["is_answer"])
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": stop}))
    store = run(tmp_path / "activations", model, prompts)
    stopped = [
        row
        for row in raw_rows(store, "model.layers.0.mlp.down_proj", domain="maths", split="basis")
        if row["is_answer"]
    ]
    assert len(stopped) < sum(row["is_answer"] for row in rows)
    for sample in range(4):
        answer = [row["token"] for row in stopped if row["sample"] == sample]
        assert stop not in answer[:-1]


def test_basis_uses_training_prompts_only(raw, prompts, tiny_model_dir):
    """Basis inputs come from `train`, validation ones from `validation`: the final evaluation's prompts are unseen."""
    tokenizer = models.load_tokenizer(tiny_model_dir)
    site = next(iter(raw.sites))
    for split, expected in (
        ("basis", {"maths": "train", "harmful": "train"}),
        ("validation", {"maths": "validation", "harmful": "validation"}),
    ):
        for domain, source in expected.items():
            rows = raw_rows(raw, site, domain=domain, split=split)
            assert {row["sample"] for row in rows} == set(range(4 if split == "basis" else 2))
            for sample in {row["sample"] for row in rows}:
                text = tokenizer.decode([r["token"] for r in rows if r["sample"] == sample])
                assert f" {source} {sample} " in text
    assert raw.domains("basis") == raw.domains("validation") == ["chat", "maths", "harmful"]


def test_long_prompts_are_left_out_and_counted(tmp_path, tiny_model_dir, prompts, capsys):
    """The next prompts that fit take their place; the number is said and kept; none left at all is an error."""
    store = run(tmp_path / "activations", tiny_model_dir, prompts, max_prompt_tokens=70, max_new_tokens=0)
    part = store.manifest["parts"][0]
    assert part["left_out"] > 0
    assert "prompts longer than activations.max_prompt_tokens (70) left out" in capsys.readouterr().err
    longest = max(row["position"] for row in raw_rows(store, "model.layers.0.mlp.down_proj"))
    assert longest < 70
    with pytest.raises(UserError, match=r"all 10 prompts are longer than activations\.max_prompt_tokens \(3\)"):
        run(tmp_path / "none", tiny_model_dir, prompts, max_prompt_tokens=3)


def test_reserved_domain_name_is_refused(tmp_path, tiny_model_dir, prompts):
    """A general domain called harmful would be mixed up with the harmful inputs."""
    rows = [{**r, "domain": r["domain"].replace("chat", "harmful")} for r in pq.read_table(prompts).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    with pytest.raises(UserError, match="'harmful' is reserved"):
        run(tmp_path / "activations", tiny_model_dir, tmp_path / "prompts.parquet")


def test_nan_inputs_are_refused_with_the_layer_that_reads_them(tmp_path, tiny_model_dir, prompts):
    """A weight so large that its output overflows is told at the first layer that reads it."""
    model = models.load_model(tiny_model_dir)
    model.model.layers[1].input_layernorm.weight.data[3] = 3.4e38
    copy_model(tiny_model_dir, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"layer model\.layers\.1\.self_attn\.q_proj reads NaN or Inf"):
        run(tmp_path / "activations", tmp_path / "model", prompts, max_new_tokens=0)
    assert not (tmp_path / "activations").exists()


# ------------------------------------------------------------------------------------------- moments and storage


def test_raw_and_moments_answer_alike(raw, moments):
    """Both forms give the same Gram to 1e-6 of its scale, for every site, split and domain."""
    assert raw.sites == moments.sites
    for site in raw.sites:
        for split in ("basis", "validation"):
            for domain in raw.domains(split):
                a, n = raw.gram(site, split, [domain])
                b, m = moments.gram(site, split, [domain])
                assert n == m == raw.tokens(domain, split)
                assert (a - b).abs().max() <= 1e-6 * a.abs().max()
                assert torch.equal(b, b.T)
                assert b.dtype == torch.float64
    table = ds.dataset(moments.path / "moments", partitioning="hive").to_table()
    assert set(table["site"].to_pylist()) == set(moments.sites)


def test_domains_add_up_and_weights_scale_their_tokens(moments):
    """N G = sum_d N_d G_d; weights multiply each domain's tokens; by default harmful inputs are not protected."""
    site = "model.layers.1.mlp.down_proj"
    (a, n), (b, m) = (moments.gram(site, "basis", [domain]) for domain in ("chat", "maths"))
    total, count = moments.gram(site, "basis")
    assert count == n + m
    torch.testing.assert_close(total, (n * a + m * b) / (n + m), rtol=1e-12, atol=0)
    weighted, _ = moments.gram(site, "basis", ["chat", "maths"], {"chat": 1 / n, "maths": 1 / m})
    torch.testing.assert_close(weighted, (a + b) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 127, 128, 129, 500])
def test_second_moment_is_exact_above_the_diagonal(width, dtype):
    """Any width equals the weighted rows^T rows to the rounding of its products."""
    rows = torch.randn(50, width, dtype=dtype)
    total = torch.zeros(width, width, dtype=torch.float64)
    add_second_moment(total, rows[:20], 1.0)
    add_second_moment(total, rows[20:], 2.0)
    exact = rows.double().T @ (rows.double() * torch.tensor([1.0] * 20 + [2.0] * 30)[:, None])
    error = (total - exact).triu().abs().max() / exact.abs().max()
    assert error < {torch.float32: 3e-7, torch.float64: 1e-15}[dtype]


def test_sums_over_batches_do_not_lose_small_terms():
    """Across batches the sum is float64: ten thousand small moments on top of a large one are all there."""
    total = torch.zeros(1, 1, dtype=torch.float64)
    add_second_moment(total, torch.tensor([[1e4]]))
    for _ in range(10_000):
        add_second_moment(total, torch.tensor([[1.0]]))
    assert total.item() == 1e8 + 1e4  # in float32 every one of them would be rounded away


def test_packing_and_mirroring_return_the_matrix_in_any_block_size(monkeypatch):
    """The packed half, unpacked and mirrored, is the symmetric matrix bit by bit, with blocks of one row and of all."""
    whole = torch.randn(201, 201, dtype=torch.float64)
    whole = whole.triu() + whole.triu(1).T
    for values in (1, 1000, 10**6):
        monkeypatch.setattr("nspo.nullspace.moments.BLOCK_VALUES", values)
        packed = torch.cat([whole[rows][mask] for rows, mask in upper_blocks(201)])
        assert torch.equal(packed, torch.cat([row[i:] for i, row in enumerate(whole)]))
        total = torch.zeros_like(whole)
        unpack(packed, total)
        mirror(total)
        assert torch.equal(total, whole)


def test_reading_a_moment_takes_little_more_than_one_matrix(tmp_path):
    """A Gram of width d costs one (d, d) float64 matrix, the packed half and blocks of a bounded size, no more."""
    width, site = 2500, Site("wide", ("wide",), 2500)
    rows = torch.randn(3, width)
    with PartWriter(tmp_path, 0, "maths", "basis", [site], {"wide": "moments"}, torch.device("cpu")) as writer:
        writer.add(site, rows, {})
    sites = {"wide": {"layers": ["wide"], "width": width, "storage": "moments", "place": 0}}
    part = {"domain": "maths", "split": "basis", "tokens": 3}
    write_json(tmp_path / MANIFEST_NAME, make_manifest("activations", sites=sites, parts=[part]))
    store = ActivationStore(tmp_path)
    with torch.profiler.profile(profile_memory=True) as profile:
        gram, _ = store.gram("wide", "basis")
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    exact = rows.double().T @ rows.double() / 3
    assert (gram - exact).abs().max() <= 1e-6 * exact.abs().max()
    # 1.5 matrices, and per block: 4 Mi values as float32, their mask, and its copy
    assert 1.5 * 8 * width**2 <= peak <= 1.5 * 8 * width**2 + 40 * 2**20


def test_kept_tokens_are_spread_evenly_and_counted_exactly():
    """Under a budget: exactly that many, one in every stretch of N / B tokens, whatever the sequences' lengths."""
    lengths = [3, 0, 17, 1, 40]
    for budget in (1, 2, 7, 30, 55, 56, 100, None):
        kept = kept_positions(lengths, 1, budget)
        assert [len(mask) for mask in kept] == lengths
        assert not any(mask[:1].any() for mask in kept)
        flat = torch.cat([mask[1:] for mask in kept])
        assert len(flat) == 57
        if budget is None or budget >= 57:
            assert flat.all()
            continue
        places = [-1, *flat.nonzero().flatten().tolist()]
        assert len(places) == budget + 1
        gaps = {b - a for a, b in itertools.pairwise(places)}
        assert gaps <= {57 // budget, -(-57 // budget)}


def test_auto_turns_the_widest_sites_to_moments_first_within_the_budget():
    """Under a falling budget: all raw, then the widest become moments, then all; a site never grows by it."""
    sites = [Site("narrow", ("narrow",), 10), Site("wide", ("wide",), 40)]
    many = Chunk(0, "maths", "basis", 0, ((1,) * 500,) * 2, None, 0, "")

    def choice(gigabytes: float, chunk: Chunk = many) -> dict[str, str]:
        return choose_storage(settings(storage="auto", disk_budget_gb=gigabytes, max_new_tokens=0), sites, [chunk])

    whole = 4 * 1000 * 50 / 1e9
    assert choice(whole) == {"narrow": "raw", "wide": "raw"}
    assert choice(whole - 1e-9) == {"narrow": "raw", "wide": "moments"}
    assert choice(1e-9) == {"narrow": "moments", "wide": "moments"}
    few = Chunk(0, "maths", "basis", 0, ((1,) * 8,), None, 0, "")
    assert choice(1e-9, few) == {"narrow": "moments", "wide": "raw"}
    assert choice(1e-9, dataclasses.replace(many, budget=8)) == {"narrow": "moments", "wide": "raw"}


def test_auto_stores_both_forms_in_one_store(tmp_path, tiny_model_dir, prompts, raw):
    """A budget between the forms gives a mixed store with the same answers as a raw one."""
    tokens = sum(part["tokens"] for part in raw.manifest["parts"])
    store = run(
        tmp_path / "activations", tiny_model_dir, prompts, storage="auto", disk_budget_gb=4 * tokens * 210 / 1e9
    )
    forms = {name: row["storage"] for name, row in store.manifest["sites"].items()}
    assert set(forms.values()) == {"raw", "moments"}
    assert forms["model.layers.0.mlp.down_proj"] == "moments"
    for site in store.sites:
        torch.testing.assert_close(store.gram(site, "basis")[0], raw.gram(site, "basis")[0], rtol=1e-5, atol=1e-7)


def test_memory_bound_changes_nothing_but_the_number_of_passes(tmp_path, tiny_model_dir, prompts, moments, monkeypatch):
    """One site a pass writes the same bytes as all at once."""
    monkeypatch.setattr(activations, "ACCUMULATOR_BYTES", 1)
    store = run(tmp_path / "activations", tiny_model_dir, prompts, storage="moments")
    assert contents(store.path) == contents(moments.path)


def test_batches_are_sorted_by_length_and_hold_every_index_once():
    """No batch exceeds the budget with padding, except one sequence that is longer by itself."""
    lengths = [5, 90, 3, 40, 40, 7, 200]
    result = batches(lengths, 100)
    assert sorted(i for batch in result for i in batch) == list(range(7))
    flat = [lengths[i] for batch in result for i in batch]
    assert flat == sorted(lengths)
    assert all(len(b) * max(lengths[i] for i in b) <= 100 or len(b) == 1 for b in result)
