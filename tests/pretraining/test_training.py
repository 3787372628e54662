"""Training decoders: the same but for η, resumed bit for bit, stopped with a reason; numbers against loops by hand."""

import json
import math
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_utils import get_last_checkpoint

import icl_dual as icl
from icl_dual import pretraining
from icl_dual.models.momentum_gpt2 import MomentumForCausalLM
from icl_dual.pretraining import corpus as corpus_module
from icl_dual.pretraining import training

TASK = pretraining.LabelMapping(n_x=3, n_y=2, n_pairs=4)
PRESET = pretraining.Preset(
    2, 2, 16, 32, TASK.length, TASK.d_vocab, batch_size=4, n_steps=12, n_warmup=2, lr=3e-3, micro_batch=2
)
TEXTS = [f"item {n} is {'good' if n % 3 else 'bad'} and number {n * 7}" for n in range(60)]


def run(folder: Path, **options) -> MomentumForCausalLM:
    options = {"eta": 0.5, "seed": 1, **options}
    return pretraining.train(options.pop("preset", PRESET), TASK, folder=folder, progress=False, **options)


def losses(folder: Path) -> list:
    return json.loads((folder / "losses.json").read_text())


class KilledError(Exception):
    pass


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have training end like a killed process: in the middle of a step, with nothing written."""
    original_step = training._Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KilledError
        return original_step(self, *args, **kwargs)

    monkeypatch.setattr(training._Trainer, "training_step", training_step)


@pytest.mark.parametrize("eta", [0.0, "learned"])
def test_a_training_that_was_killed_goes_on_bit_for_bit(eta, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", eta=eta, checkpoints=3)
    with monkeypatch.context() as patch:
        killed_at(7, patch)
        with pytest.raises(KilledError):
            run(tmp_path / "killed", eta=eta, checkpoints=3)
    assert str(get_last_checkpoint(str(tmp_path / "killed/checkpoints"))).endswith("checkpoint-4")
    resumed = run(tmp_path / "killed", eta=eta, checkpoints=3)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == PRESET.n_steps
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not (tmp_path / "killed/checkpoints").exists()
    loaded = run(tmp_path / "whole", eta=eta, checkpoints=3)  # done: loaded, not trained
    for ours, theirs in zip(loaded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_models_of_a_seed_start_alike_and_see_the_same_in_the_same_order(tmp_path, monkeypatch):
    weights_and_batches: dict[str, list] = {}

    def training_step(self, model, inputs, *args):
        name = str(self.model.config.eta)
        if name not in weights_and_batches:
            weights_and_batches[name] = [
                torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "eta" not in n])
            ]
        weights_and_batches[name].append(inputs["input_ids"].clone())
        return original_step(self, model, inputs, *args)

    original_step = training._Trainer.training_step
    monkeypatch.setattr(training._Trainer, "training_step", training_step)
    for eta in (0.0, 0.5, "learned"):
        run(tmp_path / str(eta), eta=eta)
    run(tmp_path / "other", eta=0.9, seed=2)
    vanilla, *others = weights_and_batches.values()
    for number, other in enumerate(others):
        same = all(torch.equal(a, b) for a, b in zip(vanilla, other, strict=True))
        assert same == (number < 2)
    assert len(vanilla) == 1 + PRESET.n_steps * PRESET.batch_size // PRESET.micro_batch


def test_training_learns_and_leaves_random_states_alone(tmp_path):
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    model = run(tmp_path, preset=replace(PRESET, n_steps=60))
    assert random.getstate() == python
    assert str(np.random.get_state()) == str(of_numpy)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), of_torch)
    loss_by_step = losses(tmp_path)
    assert loss_by_step[-1][1] < 0.8 < loss_by_step[0][1]
    assert pretraining.in_context_accuracy(model, TASK).shape == (512, 4)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(icl.SettingsError, match=r"made with eta=0\.3, seed=2, got .*, made with eta=0\.5, seed=1: "):
        run(tmp_path, eta=0.3, seed=2)


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    original_forward = MomentumForCausalLM.forward

    def forward(self, *args, **kwargs):
        outputs = original_forward(self, *args, **kwargs)
        if self.training and (tmp_path / "checkpoints/checkpoint-6").exists():
            outputs["loss"] = outputs["loss"] * torch.nan
        return outputs

    monkeypatch.setattr(MomentumForCausalLM, "forward", forward)
    with pytest.raises(icl.DivergedError, match=r"step 7: expected a finite loss, got nan; .*checkpoint-4: lower"):
        run(tmp_path, checkpoints=6)
    assert not (tmp_path / "checkpoints/checkpoint-6").exists()  # whose weights gave that loss
    kept = MomentumForCausalLM.from_pretrained(tmp_path / "checkpoints/checkpoint-4")
    assert all(parameter.isfinite().all() for parameter in kept.parameters())
    assert not (tmp_path / "losses.json").exists()


def test_a_gradient_that_is_not_a_number_moves_no_weight(tmp_path, monkeypatch):
    """The loss is finite, and its gradient at one weight is not."""
    models: list[MomentumForCausalLM] = []

    def training_step(self, model, *args):
        loss = original_step(self, model, *args)
        if self.state.global_step == 5:
            next(model.parameters()).grad[0, 0] = torch.nan
        models[:] = [model]
        return loss

    original_step = training._Trainer.training_step
    monkeypatch.setattr(training._Trainer, "training_step", training_step)
    with pytest.raises(
        icl.DivergedError, match=r"step 6: expected finite gradients, got a norm of nan; .*checkpoint-4"
    ):
        run(tmp_path, checkpoints=6)
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())


@pytest.mark.parametrize("n_steps", [250])
def test_losses_of_several_steps_come_back_when_a_training_is_resumed(n_steps, tmp_path, monkeypatch):
    preset = replace(PRESET, n_steps=n_steps, micro_batch=4)
    run(tmp_path / "whole", preset=preset, checkpoints=7)
    with monkeypatch.context() as patch:
        killed_at(77, patch)
        with pytest.raises(KilledError):
            run(tmp_path / "killed", preset=preset, checkpoints=7)
    run(tmp_path / "killed", preset=preset, checkpoints=7)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_from(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", checkpoints=6)
    with monkeypatch.context() as patch:
        killed_at(7, patch)
        with pytest.raises(KilledError):
            run(tmp_path / "killed", checkpoints=6)
    last = tmp_path / "killed/checkpoints/checkpoint-6"
    for name in ("trainer_state.json", "optimizer.pt"):  # the state is written last
        (last / name).unlink()
    resumed = run(tmp_path / "killed", checkpoints=6)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", b"broken"),
        ("optimizer.pt", pickle.dumps(print, protocol=2)),
        ("model.safetensors", b"broken"),
        ("trainer_state.json", b"{"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_takes_over(tmp_path, monkeypatch, name, content):
    with monkeypatch.context() as patch:
        killed_at(7, patch)
        with pytest.raises(KilledError):
            run(tmp_path, checkpoints=6)
    last = tmp_path / "checkpoints/checkpoint-6"
    (last / name).write_bytes(content)
    with pytest.raises(
        icl.AssetError,
        match=r"undamaged files in .*checkpoint-6, got .*: delete this checkpoint to resume from the one",
    ) as raised:
        run(tmp_path, checkpoints=6)
    assert "weights_only" not in str(raised.value)
    assert "trust" not in str(raised.value)
    shutil.rmtree(last)
    run(tmp_path, checkpoints=6)


def test_a_folder_of_other_files_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(icl.AssetError, match=r"with other files in it \('config\.json', …\): choose another folder"):
        run(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(icl.AssetError, match="got the file"):
        run(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "file"]


def test_damaged_files_of_a_finished_model_are_named(tmp_path):
    run(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(
        icl.AssetError, match=r"expected undamaged files in .*: delete the folder to train the model again"
    ):
        run(tmp_path)
    (tmp_path / "settings.json").write_text("[" * 100_000)
    with pytest.raises(icl.AssetError, match=r"expected JSON in .*settings\.json, got too many nested brackets"):
        run(tmp_path)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    for options, message in (
        ({"device": "meta"}, "expected device as cpu, or as cuda on a machine with a GPU, got 'meta'"),
        ({"checkpoints": 0}, "expected checkpoints of at least 1, got 0"),
        ({"eta": 1.0}, "expected eta from 0 to below 1, got 1"),
        ({"preset": replace(PRESET, n_ctx=7)}, "expected a context of 9 tokens for 4 pairs, got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "folder", **options)
    for wrong in ({"n_steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"n_warmup": 12}):
        with pytest.raises(ValueError, match="expected sizes above 0, and n_warmup below n_steps"):
            replace(PRESET, **wrong)
    assert not (tmp_path / "folder").exists()
    run(tmp_path / "folder")


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"batch_size as a multiple of 3 \(3 processes with 1 sequences each\), got 4"):
        run(tmp_path)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_mapping_holds_throughout_its_sequence_and_changes_between_sequences(seed):
    task = pretraining.LabelMapping()
    sequences = task.training_sequences(task.length, 40, seed)
    labels = task.labels(sequences)
    mappings = []
    for row, row_labels in zip(sequences.tolist(), labels.tolist(), strict=True):
        pairs = list(zip(row[1::2], row[2::2], strict=True))
        mapping = dict(pairs)
        assert row[0] == 0
        assert all(mapping[x] == y and 1 <= x <= 8 < y <= 12 for x, y in pairs)
        assert row_labels == [-100 if position % 2 or not position else row[position] for position in range(33)]
        mappings.append(mapping)
    assert len({str(sorted(mapping.items())) for mapping in mappings}) > 30
    with pytest.raises(ValueError, match="expected a context of 33 tokens for 16 pairs, got 32"):
        task.training_sequences(32, 1, 0)


def test_the_ceiling_is_reached_by_looking_labels_up_and_guessing_at_others():
    task, n = pretraining.LabelMapping(), 4000
    rows = task.training_sequences(task.length, n, seed=0).tolist()
    known_share = np.mean(
        [[row[1 + 2 * pair] in row[1 : 1 + 2 * pair : 2] for pair in range(16)] for row in rows], axis=0
    )
    best = np.array([task.best_accuracy(pair) for pair in range(16)])
    assert best[0] == 0.25
    assert np.abs(known_share + (1 - known_share) / 4 - best).max() < 4 * 0.5 * 0.75 / math.sqrt(n)


def test_accuracy_counts_the_labels_that_are_most_likely(tmp_path):
    model = run(tmp_path)
    sequences = TASK.training_sequences(TASK.length, 6, seed=3)
    correct = pretraining.in_context_accuracy(model, TASK, n=6, seed=3)
    for row, correct_by_pair in zip(sequences, correct, strict=True):
        for pair in range(4):
            logits = model(row[None, : 2 + 2 * pair]).logits[0, -1]
            best = max((4, 5), key=lambda token: logits[token].item())
            assert bool(correct_by_pair[pair]) == (best == row[2 + 2 * pair].item())


def test_a_corpus_is_lines_of_its_texts_and_perplexity_their_likelihood():
    corpus = pretraining.build_corpus("items", TEXTS[:50], TEXTS[50:], 300)
    assert corpus.tokenizer.decode(corpus.train) == "".join(f"{text}\n" for text in TEXTS[:50])
    assert corpus.tokenizer.decode(corpus.validation) == "".join(f"{text}\n" for text in TEXTS[50:])
    assert corpus.d_vocab == 300
    blocks = corpus.blocks("validation", 16)
    assert (blocks[:, 0] == 0).all()
    assert torch.equal(blocks[:, 1:].flatten(), corpus.validation[: blocks[:, 1:].numel()])
    torch.manual_seed(0)
    model = MomentumForCausalLM(pretraining.build_config(replace(PRESET, n_ctx=16), corpus.d_vocab, 0.5)).eval()
    total = 0.0
    for row in blocks:
        for position in range(1, 16):
            total -= model(row[None, :position]).logits[0, -1].log_softmax(-1)[row[position]].item()
    expected = math.exp(total / (15 * len(blocks)))
    assert pretraining.perplexity(model, blocks, batch_size=3) == pytest.approx(expected, rel=1e-5)


def test_a_corpus_of_a_file_holds_out_texts_of_their_own(tmp_path):
    path = tmp_path / "items.txt"
    path.write_text("\n".join([*TEXTS, "", *TEXTS]))
    corpus = pretraining.load_corpus(path, 300)
    decode: Any = corpus.tokenizer.decode
    train, validation = (decode(tokens).splitlines() for tokens in (corpus.train, corpus.validation))
    assert sorted([*train, *validation]) == sorted(TEXTS)
    assert not set(train) & set(validation)
    assert 0 < len(validation) < 12
    assert corpus.digest == pretraining.load_corpus(path, 300).digest


def test_text_that_cannot_be_learned_from_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="empty: expected text in the training split, got none"):
        pretraining.build_corpus("empty", ["", " "], TEXTS, 300)
    with pytest.raises(ValueError, match="expected text in the validation split, got none"):
        pretraining.build_corpus("empty", TEXTS, [], 300)
    with pytest.raises(ValueError, match="different texts in the training and the validation split, got 'item 1 "):
        pretraining.build_corpus("same", TEXTS, TEXTS[1:2], 300)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"expected at least 40 different texts, one a line, got 0"):
        pretraining.load_corpus(tmp_path / "empty.txt", 300)
    with pytest.raises(ValueError, match="expected d_vocab of at least 257, every byte and a start token, got 10"):
        pretraining.build_corpus("small", TEXTS[:50], TEXTS[50:], 10)
    with pytest.raises(ValueError, match="expected length of at least 2 tokens, got 1"):
        pretraining.build_corpus("short", TEXTS[:50], TEXTS[50:], 300).blocks("validation", 1)
    with pytest.raises(ValueError, match=r"source as agnews, a \.txt file with one text a line, .* got 'rows\.csv'"):
        pretraining.load_corpus("rows.csv", 300)
    monkeypatch.setattr(corpus_module.assets, "hub_rows", lambda *_: iter([{"sentence": "one"}]))
    with pytest.raises(ValueError, match=r"some/set: expected a column 'text', got \['sentence'\]"):
        pretraining.load_corpus("some/set", 300)
    with pytest.raises(icl.AssetError, match="expected a readable UTF-8 text file"):
        pretraining.load_corpus(tmp_path / "none.txt", 300)
    with pytest.raises(ValueError, match=r"expected a validation split of at least 9999 tokens, got \d+: use more"):
        pretraining.build_corpus("short", TEXTS[:50], TEXTS[50:], 300).blocks("validation", 10_000)
