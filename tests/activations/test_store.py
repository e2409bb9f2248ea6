"""The artifact: equal bytes for equal inputs, chunks, resuming, several processes, damage."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import fork_server
from support.activation_runs import contents, raw_rows, run, settings

from nspo.activations import chunks as sequences
from nspo.activations import stage as activations
from nspo.activations.chunks import Chunk
from nspo.activations.store import ActivationStore
from nspo.cli.main import to_flags
from nspo.errors import UserError
from nspo.files.manifest import fingerprint
from nspo.models import loading as models


def test_equal_inputs_give_equal_bytes(tmp_path, tiny_model_dir, prompts, raw):
    """Every file of a second run, the manifest included, is byte for byte the first's, and no scratch is left."""
    again = run(tmp_path / "activations", tiny_model_dir, prompts)
    assert contents(again.path) == contents(raw.path)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.fixture
def small_chunks(monkeypatch):
    """Two prompts a chunk, so that four make two chunks."""
    monkeypatch.setattr(sequences, "CHUNK", 2)


def test_chunks_of_a_domain_add_up_to_the_domain(tmp_path, small_chunks, tiny_model_dir, prompts, raw):
    """Several parts per domain and split hold the same rows, tokens and samples as one."""
    store = run(tmp_path / "activations", tiny_model_dir, prompts)
    assert [part["domain"] for part in store.manifest["parts"]].count("chat") == 3  # two basis, one validation
    for domain, split in itertools.product(("chat", "maths", "harmful"), ("basis", "validation")):
        assert store.tokens(domain, split) == raw.tokens(domain, split)
        for site in list(raw.sites)[:4]:
            a, b = (s.gram(site, split, [domain])[0] for s in (store, raw))
            assert (a - b).abs().max() <= 1e-6 * a.abs().max()
    key = ("domain", "split", "sample", "position", "token", "is_answer")
    labels = [
        sorted(tuple(row[name] for name in key) for row in raw_rows(s, "model.layers.0.mlp.down_proj"))
        for s in (store, raw)
    ]
    assert labels[0] == labels[1]


def test_number_of_chunks_is_bounded():
    """Each chunk stores moments of its own, so a large domain has larger chunks, not more; budgets add up."""
    for prompts, expected in ((1, 1), (64, 1), (65, 2), (512, 8), (100_000, 8)):
        rows = [({"id": str(n), "prompt": ""}, (1, 2)) for n in range(prompts)]
        chunks = sequences.divide(5, "maths", "basis", rows, 3, 1000)
        assert [chunk.index for chunk in chunks] == list(range(5, 5 + expected))
        assert sum(len(chunk.prompts) for chunk in chunks) == prompts
        assert sum(chunk.budget for chunk in chunks) == 1000
        assert sum(chunk.left_out for chunk in chunks) == 3


def test_token_budget_keeps_exactly_that_many(tmp_path, small_chunks, tiny_model_dir, prompts, raw):
    """Every domain and split has the budget's number of tokens, from all over its sequences; the manifest says so."""
    store = run(tmp_path / "activations", tiny_model_dir, prompts, tokens_per_domain=101)
    for domain, split in itertools.product(("chat", "maths", "harmful"), ("basis", "validation")):
        rows = raw_rows(store, "model.layers.1.mlp.down_proj", domain=domain, split=split)
        assert len(rows) == store.tokens(domain, split) == 101 < raw.tokens(domain, split)
        assert {row["sample"] for row in rows} == set(range(4 if split == "basis" else 2))
    few = run(tmp_path / "few", tiny_model_dir, prompts, tokens_per_domain=1)
    assert all(
        few.tokens(domain, "basis") == few.gram(next(iter(few.sites)), "basis", [domain])[1] == 1
        for domain in few.domains("basis")
    )


def test_killed_run_resumes_without_recounting(tmp_path, small_chunks, tiny_model_dir, prompts, monkeypatch, capsys):
    """Finished chunks are kept, said to be there, not computed again; the result equals an uninterrupted run."""
    whole = run(tmp_path / "whole", tiny_model_dir, prompts)
    original, calls = activations._collect_chunk, []

    def dying(chunk, *rest):
        calls.append(chunk.name)
        if len(calls) == 4:
            original(chunk, *rest)  # files of the chunk are there, but it does not count as finished
            raise KeyboardInterrupt
        return original(chunk, *rest)

    monkeypatch.setattr(activations, "_collect_chunk", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "activations", tiny_model_dir, prompts)
    assert not (tmp_path / "activations").exists()
    done = calls[:3]
    capsys.readouterr()
    store = run(tmp_path / "activations", tiny_model_dir, prompts)
    assert calls[3] == calls[4]
    assert sorted(calls[:3] + calls[4:]) == sorted(set(calls))
    message = capsys.readouterr().err
    assert "3 of 9 parts are there already" in message
    assert all(name in message for name in done)
    assert contents(store.path) == contents(whole.path)


def launch(processes: int, model: Path, prompts: Path, out: Path, **changed) -> "subprocess.CompletedProcess[str]":
    """`nspo collect` under `accelerate launch` on the CPU, as a user types it; both processes are forks."""
    flags = to_flags(settings(**changed)).replace("'", "").split()
    files = ["--model", model, "--prompts", prompts, "--out", out, "--workdir", out.parent / "work"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
    command = [*launcher, "--main_process_port", 0, "-m", "nspo", "collect", *flags, *files]
    environment = {**os.environ, **fork_server.environment()}
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_two_processes_write_the_bytes_of_one(tmp_path, tiny_model_dir, prompts, raw, moments):
    """Byte for byte, the manifest included, for both forms; nothing is left in the work folder."""
    for store in (raw, moments):
        storage = store.manifest["settings"]["storage"]
        finished = launch(2, tiny_model_dir, prompts, tmp_path / storage, storage=storage)
        assert finished.returncode == 0, finished.stderr
        assert "2 processes share 6 parts" in finished.stderr
        assert contents(tmp_path / storage) == contents(store.path)
    assert list((tmp_path / "work").iterdir()) == []


def test_error_in_several_processes_ends_the_run_with_one_line(tmp_path, tiny_model_dir, prompts):
    """The mistake that both processes meet is told once, and neither waits for the other."""
    finished = launch(2, tiny_model_dir, prompts, tmp_path / "none", max_prompt_tokens=3)
    assert finished.returncode != 0
    said = [line for line in finished.stderr.splitlines() if "nspo: error:" in line]
    assert len(said) == 1
    assert "activations.max_prompt_tokens (3): raise it" in said[0]


def test_chunks_are_dealt_out_heaviest_first_and_each_once():
    """Every number of processes covers all chunks; neighbours in weight go to different processes."""
    chunks = [Chunk(n, "maths", "basis", 0, ((1,) * weight,), None, 0, "") for n, weight in enumerate((3, 9, 1, 9, 5))]
    for count in (1, 2, 3, 7):
        shares = [
            activations._share(chunks, 0, SimpleNamespace(process_index=rank, num_processes=count))
            for rank in range(count)
        ]
        assert sorted(chunk.index for share in shares for chunk in share) == list(range(5))
        assert [share[0].index for share in shares if share] == [1, 3, 4, 0, 2][:count]


def test_manifest_says_what_shaped_the_store(raw, tiny_model_dir):
    """Model identity, settings, tokens, layers in model order, and the norm of every layer's weight."""
    manifest = raw.manifest
    assert manifest["model"] == models.model_identity(tiny_model_dir)
    assert manifest["settings"] == settings().dump()
    assert list(raw.sites)[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"]
    weights = dict(models.load_model(tiny_model_dir).named_modules())
    layers = [layer for site in raw.sites.values() for layer in site.layers]
    assert sorted(layers) == sorted(manifest["layer_norms"])
    for layer in layers:
        assert manifest["layer_norms"][layer] == pytest.approx(weights[layer].weight.norm().item(), rel=1e-6)
    assert len(fingerprint(manifest["data"])) == 16


def test_damaged_missing_or_foreign_files_are_refused_by_name(tmp_path, moments, raw):
    """Truncation, one flipped byte, an absent file and another artifact each end in one line naming the file."""
    for source in (moments, raw):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(source.path, tmp_path / "store")
        store = ActivationStore(tmp_path / "store")
        site = next(iter(store.sites))
        file = next((tmp_path / "store").glob(f"*/site={site}/part-000.parquet"))
        data = file.read_bytes()
        for damaged in (data[: len(data) // 2], data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :], b""):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=r"part-000\.parquet is damaged"):
                store.gram(site, "basis")
        file.unlink()
        with pytest.raises(UserError, match=r"part-000\.parquet does not exist"):
            ActivationStore(tmp_path / "store")
    with pytest.raises(UserError, match="does not exist"):
        ActivationStore(tmp_path / "nothing")
    (tmp_path / "manifest.json").write_text('{"kind": "model", "schema": 1}')
    with pytest.raises(UserError, match="holds 'model', expected 'activations'"):
        ActivationStore(tmp_path)


def test_unknown_names_are_refused(raw):
    """Site, domain, split and weights that the store does not have are named with what it has."""
    site = next(iter(raw.sites))
    for arguments, message in (
        (("nowhere", "basis"), "no site 'nowhere'"),
        ((site, "train"), "no domain in split 'train'"),
        ((site, "basis", ["law"]), "no domain 'law'"),
        ((site, "basis", ["chat"], {"maths": 2.0}), "weights name maths"),
        (
            (site, "basis", ["chat", "maths"], {"chat": 0.0, "maths": 0.0}),
            r"bases\.weights: all of chat, maths weigh 0",
        ),
    ):
        with pytest.raises(UserError, match=message):
            raw.gram(*arguments)
