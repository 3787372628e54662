import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import run_settings, with_value

import icl_dual as icl
from icl_dual.recordings.recordings import SETTINGS
from icl_dual.recordings.released_layout import write_recordings


@pytest.fixture(scope="module")
def runs(llama: icl.Model, prompts: icl.Prompts) -> dict:
    return run_settings(llama, prompts)


@pytest.fixture
def recordings(runs: dict) -> icl.Recordings:
    return icl.Recordings.of(**runs)


def test_recordings_are_what_the_captures_and_the_delta_hold(runs: dict, recordings: icl.Recordings) -> None:
    scale = runs["finetuned"].q.shape[-1] ** -0.5
    for setting, run in zip(SETTINGS, ("zero_shot", "in_context", "finetuned"), strict=True):
        assert torch.equal(recordings.attn_out[setting], runs[run].attn_out)
        assert torch.equal(recordings.predictions[setting], runs[run].predictions)
        assert recordings.residual_norms is not None
        assert torch.equal(recordings.residual_norms[setting], runs[run].residual_norms)
    assert torch.equal(recordings.q, runs["finetuned"].q.flatten(2) * scale)
    lengths = [len(tokens) for tokens in runs["delta"].demonstrations]
    assert recordings.training_q is not None
    assert recordings.training_segments is not None
    assert recordings.training_segments.tolist() == [o for i, n in enumerate(lengths) for o in [-1] + [i] * n]
    assert recordings.training_q.shape[1] == len(recordings.training_segments)
    assert f"{len(lengths)} training steps" in repr(recordings)


def test_saved_recordings_come_back(recordings: icl.Recordings, tmp_path: Path) -> None:
    recordings.save(tmp_path / "saved")
    saved = icl.Recordings.load(tmp_path / "saved")
    for name, value in vars(recordings).items():
        got = getattr(saved, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(got, value)
        elif isinstance(value, dict) and name != "metadata":
            assert all(torch.equal(got[setting], value[setting]) for setting in SETTINGS)
        else:
            assert got == value


def test_recordings_of_captures_without_residual_norms_have_none(
    runs: dict, recordings: icl.Recordings, tmp_path: Path
) -> None:
    lacking = {"in_context": dataclasses.replace(runs["in_context"], residual_norms=None)}  # as older versions saved it
    older = icl.Recordings.of(**runs | lacking)
    older.save(tmp_path / "saved")
    assert older.residual_norms is icl.Recordings.load(tmp_path / "saved").residual_norms is None
    assert not [name for name in icl.compare_recordings(older).per_layer if name.endswith("massive tokens")]
    damaged = {name: norms.clone() for name, norms in (recordings.residual_norms or {}).items()}
    damaged["FT"][0, 0, 0] = torch.inf
    _ = recordings.ordinary_tokens  # computed, and not part of what is checked and saved
    with_value(recordings, "residual_norms", damaged).save(tmp_path / "damaged")
    with pytest.raises(icl.AssetError, match="expected residual_norms/FT finite, got inf"):
        icl.Recordings.load(tmp_path / "damaged")


def test_saved_recordings_are_checked_like_any(recordings: icl.Recordings, tmp_path: Path) -> None:
    broken = {name: tensor.clone() for name, tensor in recordings.attn_out.items()}
    broken["ICL"][0, 0, 0] = torch.nan
    with_value(recordings, "attn_out", broken).save(tmp_path / "nan")
    with pytest.raises(icl.AssetError, match="expected attn_out/ICL finite, got nan"):
        icl.Recordings.load(tmp_path / "nan")
    dataclasses.replace(recordings, gold=recordings.gold + 9).save(tmp_path / "labels")
    with pytest.raises(icl.RecordingError, match="expected gold out of the 2 labels 0 to 1, got"):
        icl.Recordings.load(tmp_path / "labels")


def test_recordings_without_a_delta_have_no_training_queries(
    runs: dict, recordings: icl.Recordings, tmp_path: Path
) -> None:
    without = icl.Recordings.of(**{name: run for name, run in runs.items() if name != "delta"})
    for name, value in vars(recordings).items():
        if name.startswith("training_"):
            assert getattr(without, name) is None
        elif isinstance(value, torch.Tensor):
            assert torch.equal(getattr(without, name), value)
    assert "no training steps" in repr(without)
    without.save(tmp_path / "saved")
    saved = icl.Recordings.load(tmp_path / "saved")
    assert saved.training_q is saved.training_segments is saved.training_k is None
    assert torch.equal(saved.segments, recordings.segments)
    with pytest.raises(icl.RecordingError, match=r"with training queries, .*: pass a delta of icl_dual\.finetune"):
        write_recordings(without, tmp_path / "released", progress=False)
    assert not (tmp_path / "released").exists()


def test_training_queries_and_their_steps_come_together(recordings: icl.Recordings) -> None:
    for lacking, given in (("training_q", "training_segments"), ("training_segments", "training_q")):
        with pytest.raises(icl.RecordingError, match=f"together, got {given} without {lacking}: give both"):
            dataclasses.replace(recordings, **{lacking: None})


def test_captures_that_do_not_belong_together_have_no_recordings(runs: dict) -> None:
    with pytest.raises(ValueError, match="of the same queries"):
        icl.Recordings.of(**runs | {"zero_shot": runs["in_context"]})
