import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import released
import torch
from helpers import run_settings, with_value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.prompts import SEPARATOR, START
from icl_dual.recordings.recordings import SETTINGS
from icl_dual.recordings.released_layout import FOLDERS as SETTING_FOLDERS
from icl_dual.recordings.released_layout import write_recordings

FOLDERS = (*SETTING_FOLDERS.values(), "ft")
SMALL: Any = {
    "seed": 0,
    "n_examples": 5,
    "n_layers": 2,
    "n_heads": 3,
    "d_head": 4,
    "demonstration_lengths": [3, 1, 4, 2],
    "query_lengths": [2, 5],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    released.write_random(tmp_path / "recordings", **SMALL)
    return tmp_path / "recordings"


def lines(folder: Path, setting: str) -> list[dict]:
    return released.read(folder)[setting]


def damage(folder: Path, setting: str, number: int, change: Callable[[dict], Any]) -> Path:
    """Change one record; what `change` returns, if anything, takes its place."""
    path = folder / setting / "record_info.jsonl"
    records = path.read_text().splitlines()
    record = json.loads(records[number - 1])
    changed = change(record)
    records[number - 1] = changed if isinstance(changed, str) else json.dumps(record)
    path.write_text("\n".join(records) + "\n")
    return path


def load(folder: Path, **options: Any) -> icl.Recordings:
    return icl.load_recordings(folder, progress=False, **options)


def assert_scores(got: dict[str, Any], expected: dict[str, Any], accuracy: float = 1e-9) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, atol=accuracy, rtol=accuracy, err_msg=name)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**20),
    n_examples=st.integers(1, 6),
    n_heads=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    query_lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    repeated=st.booleans(),
)
def test_every_number_is_what_the_definitions_say(
    tmp_path: Path, seed: int, n_examples: int, n_heads: int, lengths: list[int], query_lengths: list[int], repeated
) -> None:
    released.write_random(
        tmp_path,
        seed=seed,
        n_examples=n_examples,
        n_layers=2,
        n_heads=n_heads,
        d_head=4,
        demonstration_lengths=lengths,
        query_lengths=query_lengths,
        repeated_tokens=repeated,
    )
    expected = released.scores(tmp_path)
    if repeated:  # a tie at the hundredth token is broken by the sort, not by the definition
        del expected["token-level recall_topk"]
    assert_scores(icl.compare_recordings(load(tmp_path)).released(), expected)


def test_rank_correlation_and_recall_stop_at_the_hundredth_query(tmp_path: Path) -> None:
    released.write_random(tmp_path, **SMALL | {"n_examples": 103, "demonstration_lengths": [30, 40, 25, 20, 9, 8]})
    recordings = load(tmp_path)
    comparison = icl.compare_recordings(recordings)
    assert_scores(comparison.released(), released.scores(tmp_path))
    assert {name: len(values) for name, values in comparison.per_layer.items() if len(values) < 103}.keys() == {
        name for name in comparison.per_layer if name.startswith(("Kendall", "Top"))
    }
    whole = icl.compare_recordings(recordings, kendall_queries=None)
    assert len(whole.per_layer["Kendall"]) == 103
    assert torch.equal(whole.per_layer["Kendall"][:100], comparison.per_layer["Kendall"])


def test_what_vanishes_in_the_softmax_ties(tmp_path: Path) -> None:
    """Scores summed over many heads lie far apart: the scripts rank after the softmax, where the lowest are all 0."""
    released.write_random(tmp_path, **SMALL | {"demonstration_lengths": [30, 40, 25, 20, 9, 8]})
    for line in range(1, 6):
        damage(tmp_path, "icl", line, lambda r: r.update(attn_map_ctx=(500 * np.array(r["attn_map_ctx"])).tolist()))
    expected = released.scores(tmp_path)
    got = icl.compare_recordings(load(tmp_path))
    assert_scores(got.released(), expected)
    plain = [np.sign(np.subtract.outer(row, row)) for row in np.array(lines(tmp_path, "icl")[0]["attn_map_ctx"])]
    assert all((signs == 0).sum() == len(signs) for signs in plain), "before the softmax, nothing ties"


def test_exported_recordings_are_those_that_were_read(folder: Path, tmp_path: Path) -> None:
    write_recordings(load(folder), tmp_path / "again", progress=False)
    assert released.read(tmp_path / "again") == released.read(folder)


@pytest.fixture(scope="module")
def runs(llama: icl.Model, reference_prompts: icl.Prompts) -> dict:
    return run_settings(llama, reference_prompts)


@pytest.fixture(scope="module")
def reference_prompts(llama: icl.Model, reference_task: icl.Task) -> icl.Prompts:
    demonstrations, queries = reference_task.demonstrations(4, seed=1), reference_task.queries(7)
    return icl.build_prompts(llama, reference_task, demonstrations, queries)


def test_a_capture_exports_what_the_layout_asks_for(runs: dict, tmp_path: Path) -> None:
    """Held against the captures themselves, and against the definitions computed on what was written."""
    recordings = icl.Recordings.of(**runs)
    write_recordings(recordings, tmp_path / "out", progress=False)
    records_by_folder = released.read(tmp_path / "out")
    zsl, in_context, ft, delta = (runs[name] for name in ("zero_shot", "in_context", "finetuned", "delta"))
    prompts = in_context.prompts
    assert [len(records_by_folder[name]) for name in FOLDERS] == [7, 7, 7, 4]
    for name, run in (("zs", zsl), ("icl", in_context), ("ftzs", ft)):
        for index, line in enumerate(records_by_folder[name]):
            n_tokens = len(prompts.queries[index]) + len(prompts.labels[0])
            assert torch.equal(torch.tensor(line["self_attn_out_hiddens"]), run.attn_out[index])
            assert torch.equal(torch.tensor(line["attn_map"]), run.query_scores[index, ..., :n_tokens])
            assert np.shape(line["attn_map_ctx"]) == (3, len(run.prompts.prefix))
            assert (line["gold_label"], line["pred_label"]) == (run.gold[index], run.predictions[index])
            assert ("attn_q" in line) == (name == "ftzs")
    q = torch.tensor(records_by_folder["ftzs"][2]["attn_q"])
    torch.testing.assert_close(q, ft.q[2].flatten(1) / ft.q.shape[-1] ** 0.5)
    assert [np.shape(line["attn_q"]) for line in records_by_folder["ft"]] == [
        (3, 1 + len(tokens), 32) for tokens in prompts.demonstrations
    ]
    first = torch.tensor(records_by_folder["ft"][0]["attn_q"])
    torch.testing.assert_close(first, delta.training_q[:, : first.shape[1]].flatten(2) / ft.q.shape[-1] ** 0.5)
    # Of queries in few bits: a token that stands twice has equal scores, which rounding would put in either order.
    few_bits = {name: (getattr(recordings, name) * 64).round() / 64 for name in ("q", "training_q")}
    coarse = dataclasses.replace(recordings, **few_bits)
    write_recordings(coarse, tmp_path / "coarse", progress=False)
    assert_scores(icl.compare_recordings(coarse).released(), released.scores(tmp_path / "coarse"))
    assert load(tmp_path / "out").metadata == {"protocol": "reference", "n_labels": 2, "dtype": "float32"}


def test_demonstrations_out_of_context_are_trained_on_and_not_compared(
    llama: icl.Model, reference_prompts: icl.Prompts, tmp_path: Path
) -> None:
    """The released code's own mismatch: its script then reads past the context, and ours compares what both have."""
    prompts = dataclasses.replace(
        reference_prompts,
        demonstrations=reference_prompts.demonstrations[:3],
        left_out=reference_prompts.demonstrations[3:],
    )
    runs = run_settings(llama, prompts)
    assert len(runs["delta"].losses) == 4
    recordings = icl.Recordings.of(**runs)
    write_recordings(recordings, tmp_path / "out", progress=False)
    assert len(lines(tmp_path / "out", "ft")) == 4
    again = load(tmp_path / "out")
    assert torch.equal(again.segments, recordings.segments)
    last = (tmp_path / "out" / "ft" / "record_info.jsonl").read_text().splitlines()
    (tmp_path / "out" / "ft" / "record_info.jsonl").write_text("\n".join(last[:3]) + "\n")
    expected = released.scores(tmp_path / "out")
    assert_scores(icl.compare_recordings(recordings).released(), expected)
    assert_scores(icl.compare_recordings(again).released(), expected)


def test_separators_of_several_tokens_have_no_place_in_the_layout(runs: dict, tmp_path: Path) -> None:
    recordings = icl.Recordings.of(**runs)
    wider = torch.cat((recordings.segments[:1], torch.tensor([SEPARATOR]), recordings.segments[1:]))
    scores = recordings.context_scores["ICL"]
    context_scores = recordings.context_scores | {"ICL": torch.cat((scores[..., :1], scores), dim=-1)}
    with pytest.raises(icl.RecordingError, match="each with one separator token after it"):
        write_recordings(
            dataclasses.replace(recordings, segments=wider, context_scores=context_scores), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_what_is_no_number_is_not_written(runs: dict, tmp_path: Path) -> None:
    recordings = icl.Recordings.of(**runs)
    broken = recordings.q.clone()
    broken[2, 0, 0] = torch.nan
    message = r"ftzs/record_info\.jsonl, line 3: expected finite numbers to write"
    with pytest.raises(icl.RecordingError, match=message):
        write_recordings(with_value(recordings, "q", broken), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def cut(record: dict) -> str:
    return json.dumps(record)[:-20]


def ragged(record: dict) -> None:
    record["attn_map"][1].pop()


def one_head_less(record: dict) -> None:
    record["attn_map"] = [layer[:-1] for layer in record["attn_map"]]


def one_layer_less(record: dict) -> None:
    record["attn_map_ctx"].pop()


def nan(record: dict) -> None:
    record["self_attn_out_hiddens"][1][0] = float("nan")


def infinite(record: dict) -> None:
    record["attn_map_ctx"][0][0] = float("inf")


def label_past_the_end(record: dict) -> None:
    record["pred_label"] = 7


def negative_label(record: dict) -> None:
    record["gold_label"] = -1


def no_number(record: dict) -> None:
    record["pred_label"] = "1"


def other_gold(record: dict) -> None:
    record["gold_label"] = 1 - record["gold_label"]


def key_lost(record: dict) -> None:
    del record["attn_map"]


def longer_context(record: dict) -> None:
    record["attn_map_ctx"] = [[*layer, 0.0] for layer in record["attn_map_ctx"]]


DAMAGES: list[tuple[Callable[[dict], Any], str, int, str]] = [
    (
        cut,
        "icl",
        5,
        "expected a complete JSON object, got .*: correct the record, or leave the example out with skip_bad=",
    ),
    (cut, "zs", 2, "expected a complete JSON object"),
    (ragged, "zs", 3, "uneven lists: some have 2 and some 3 entries"),
    (one_head_less, "icl", 2, "expected as many layers, heads and query tokens"),
    (one_layer_less, "zs", 1, "the same number of layers under every key"),
    (nan, "ftzs", 4, r"nan at \[1, 0\]"),
    (infinite, "icl", 1, r"inf at \[0, 0\]"),
    (label_past_the_end, "zs", 2, "pred_label out of the 5 labels 0 to 4, got 7"),
    (negative_label, "icl", 2, "gold_label out of the 5 labels 0 to 4, got -1"),
    (no_number, "icl", 2, "pred_label out of the 5 labels 0 to 4, got '1'"),
    (other_gold, "ftzs", 3, "expected the gold label of zs"),
    (key_lost, "zs", 5, "expected the key 'attn_map', got only"),
    (longer_context, "icl", 1, "the shape of most examples"),
]


@pytest.mark.parametrize(("change", "setting", "number", "message"), DAMAGES)
def test_a_damaged_record_is_refused_by_file_and_line_or_skipped_everywhere(
    folder: Path, change: Callable[[dict], Any], setting: str, number: int, message: str
) -> None:
    whole = load(folder)
    path = damage(folder, setting, number, change)
    with pytest.raises(icl.RecordingError, match=f"{re.escape(str(path))}, line {number}: .*({message})"):
        load(folder)
    rest = load(folder, skip_bad=True)
    (reason,) = rest.skipped
    assert f"line {number}" in reason
    kept = [index for index in range(5) if index != number - 1]
    assert torch.equal(rest.gold, whole.gold[kept])
    for setting_ in SETTINGS:
        assert torch.equal(rest.attn_out[setting_], whole.attn_out[setting_][kept])
    assert "1 skipped" in repr(rest)


def test_a_setting_of_other_heads_throughout_is_refused(folder: Path) -> None:
    for number in range(1, 6):
        damage(folder, "icl", number, one_head_less)
    with pytest.raises(icl.RecordingError, match=r"icl/record_info\.jsonl, line 1: expected as many layers, heads"):
        load(folder)
    with pytest.raises(icl.RecordingError, match="at least one undamaged example"):
        load(folder, skip_bad=True)


def test_a_folder_of_a_cell_or_of_another_result_is_refused_with_what_to_pass(folder: Path, tmp_path: Path) -> None:
    comparison = icl.compare_recordings(load(folder))
    comparison.save(tmp_path / "cell", {"settings": {"k": 4}, "provenance": {}})
    message = "got the folder of a cell: pass its folder recordings, which a cell has that was run with keep_recordings"
    with pytest.raises(icl.AssetError, match=message):
        load(tmp_path / "cell")
    comparison.save(tmp_path / "comparison")
    with pytest.raises(icl.AssetError, match=r"got a saved Comparison: use Comparison\.load$"):
        load(tmp_path / "comparison")


@pytest.mark.parametrize("setting", FOLDERS)
def test_a_missing_setting_is_named(folder: Path, setting: str) -> None:
    (folder / setting / "record_info.jsonl").unlink()
    for skip_bad in (False, True):
        with pytest.raises(icl.RecordingError, match=rf"got no .*{setting}/record_info\.jsonl: record this setting"):
            load(folder, skip_bad=skip_bad)


def test_other_numbers_of_examples_are_refused_or_cut(folder: Path) -> None:
    path = folder / "ftzs" / "record_info.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    with pytest.raises(icl.RecordingError, match=r"ftzs.*, line 4: expected as many examples as in zs, got the end of"):
        load(folder)
    rest = load(folder, skip_bad=True)
    assert len(rest.gold) == 3
    assert len(rest.skipped) == 2


def test_label_ids_are_held_to_what_is_known_of_the_task(folder: Path, tmp_path: Path) -> None:
    damage(folder, "zs", 1, lambda record: record.update(pred_label=3))
    load(folder)
    with pytest.raises(icl.RecordingError, match="out of the 2 labels 0 to 1, got 3"):
        load(folder, n_labels=2)
    named = folder.rename(tmp_path / "sst2")
    with pytest.raises(icl.RecordingError, match="out of the 2 labels 0 to 1, got 3"):
        load(named)


def test_a_damaged_training_step_is_refused_or_left_out_of_the_comparison(folder: Path) -> None:
    path = damage(folder, "ft", 2, lambda record: record["attn_q"][0][1].__setitem__(0, float("nan")))
    with pytest.raises(icl.RecordingError, match=rf"{re.escape(str(path))}, line 2: .*nan at \[0, 1, 0\]"):
        load(folder)
    rest = load(folder, skip_bad=True)
    assert rest.segments.tolist() == [START, 0, 0, 0, -2, -2, -2, 2, 2, 2, 2, -2, 3, 3, -2]
    assert rest.training_segments is not None
    assert rest.training_segments.unique().tolist() == [START, 0, 2, 3]
    # As if it had been a separator all along: the others' attention is what the definitions say.
    tau = icl.compare_recordings(rest).per_layer["Kendall"]
    records = released.read(folder)
    tokens = [at for at, owner in enumerate(rest.segments.tolist()) if owner >= 0]
    steps = [records["ft"][step] for step in (0, 2, 3)]
    for query in range(5):
        icl_row = released.icl_token_weights(records["icl"][query], 1, tokens)
        ft_row = released.ft_token_weights(records["ftzs"][query], steps, 1)
        assert tau[query, 1].item() == pytest.approx(released.tau(icl_row, ft_row), abs=1e-9)


def test_a_damaged_last_step_is_left_out(folder: Path) -> None:
    damage(folder, "ft", 4, lambda record: record["attn_q"][0][1].__setitem__(0, float("nan")))
    assert load(folder, skip_bad=True).segments.max() == 2


def test_the_last_step_cut_off_is_left_out_and_one_before_it_is_not(folder: Path) -> None:
    damage(folder, "ft", 4, cut)
    with pytest.raises(
        icl.RecordingError, match=r"ft.*, line 4: expected a complete JSON object.*or leave the training step out"
    ):
        load(folder)
    assert load(folder, skip_bad=True).segments.max() == 2
    damage(folder, "ft", 2, cut)
    with pytest.raises(
        icl.RecordingError, match=r"skip_bad cannot leave this step out.*positions of later steps in the context"
    ):
        load(folder, skip_bad=True)


def test_steps_that_are_not_in_the_context_are_refused(folder: Path) -> None:
    damage(folder, "ft", 1, lambda r: r.update(attn_q=[layer + [layer[0]] * 99 for layer in r["attn_q"]]))
    with pytest.raises(icl.RecordingError, match="expected a context of whole demonstrations of"):
        load(folder)


def test_a_context_that_cuts_a_demonstration_is_refused(folder: Path) -> None:
    for number in range(1, 6):
        damage(folder, "icl", number, lambda r: r.update(attn_map_ctx=[layer[:-2] for layer in r["attn_map_ctx"]]))
    with pytest.raises(icl.RecordingError, match="15 tokens with all 4, got 13"):
        load(folder)


@pytest.mark.parametrize("lost", [2, 4])
def test_a_training_step_that_is_missing_is_seen_by_the_context(folder: Path, lost: int) -> None:
    path = folder / "ft" / "record_info.jsonl"
    kept = path.read_text().splitlines()
    del kept[lost - 1]
    path.write_text("\n".join(kept) + "\n")
    for skip_bad in (False, True):
        with pytest.raises(
            icl.RecordingError, match=r"tokens with all 3, got 15: check whether a training step is missing"
        ):
            load(folder, skip_bad=skip_bad)


def test_a_step_or_a_context_of_another_length_is_seen(folder: Path, tmp_path: Path) -> None:
    damage(folder, "ft", 1, lambda r: r.update(attn_q=[layer[:-1] for layer in r["attn_q"]]))
    with pytest.raises(icl.RecordingError, match="14 tokens with all 4, got 15"):
        load(folder)
    released.write_random(tmp_path / "longer", **SMALL)
    for number in range(1, 6):
        damage(tmp_path / "longer", "icl", number, longer_context)
    with pytest.raises(icl.RecordingError, match="15 tokens with all 4, got 16"):
        load(tmp_path / "longer")


def test_a_line_lost_within_a_setting_shifts_all_and_cannot_be_skipped(tmp_path: Path) -> None:
    released.write_random(tmp_path, **SMALL | {"n_examples": 30})
    path = tmp_path / "icl" / "record_info.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(icl.RecordingError, match="a line may be missing before this one"):
        load(tmp_path, skip_bad=True)


@pytest.mark.parametrize("setting", ["zs", "icl", "ftzs"])
def test_a_zero_vector_counts_as_the_scripts_count_it(folder: Path, setting: str) -> None:
    damage(folder, setting, 3, lambda r: r["self_attn_out_hiddens"].__setitem__(0, [0.0] * 12))
    expected = {"SimAOU": released.scores(folder)["SimAOU"]}
    assert_scores(icl.compare_recordings(load(folder)).released(), expected)


def test_what_is_no_list_is_no_step(folder: Path) -> None:
    damage(folder, "ft", 2, lambda record: record.update(attn_q=["abc", "abc"]))
    with pytest.raises(icl.RecordingError, match="record the folder again, as skip_bad cannot leave this step out"):
        load(folder, skip_bad=True)
    damage(folder, "ft", 2, lambda record: '{"attn_q":' + "[" * 100_000)
    with pytest.raises(icl.RecordingError, match=r"ft.*, line 2: expected a complete JSON object"):
        load(folder)


def test_a_head_that_scores_nothing_counts_as_the_scripts_count_it(folder: Path) -> None:
    def silent(record: dict) -> None:
        record["attn_map"][1][0] = [0.0] * len(record["attn_map"][1][0])

    damage(folder, "icl", 2, silent)
    assert_scores(icl.compare_recordings(load(folder)).released(), {"SimAM": released.scores(folder)["SimAM"]})


def test_metadata_that_make_no_sense_are_refused(folder: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps({"n_labels": None}))
    with pytest.raises(icl.RecordingError, match=r"metadata\.json: expected n_labels as a number from 1, got None"):
        load(folder)


def test_at_least_one_query_is_compared(folder: Path) -> None:
    with pytest.raises(ValueError, match="expected kendall_queries of at least 1, got 0"):
        icl.compare_recordings(load(folder), kendall_queries=0)


def test_damaged_metadata_are_refused(folder: Path) -> None:
    for content, reason in (
        (b"\xff\xfe", "codec can't decode"),
        (b"[" * 100_000, "too many nested brackets"),
        (b'{"n_labels": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"null", "got null"),
    ):
        (folder / "metadata.json").write_bytes(content)
        with pytest.raises(icl.RecordingError, match=rf"expected .* in .*metadata\.json, got .*{reason}|{reason}"):
            load(folder)


def test_files_of_others_are_never_exported_over(folder: Path, tmp_path: Path) -> None:
    """Neither the recordings of the released code, which have the same names, nor anything in such folders."""
    recordings = load(folder)
    released_code = tmp_path / "released code"
    shutil.copytree(folder, released_code)
    (tmp_path / "mine" / "zs").mkdir(parents=True)
    (tmp_path / "mine" / "zs" / "notes.txt").write_text("precious")
    with_metadata = shutil.copytree(folder, tmp_path / "with metadata")
    (with_metadata / "metadata.json").write_text(json.dumps({"mine": True}))
    for destination, message in (
        (released_code, "wrote such recordings into, got .*released code with others"),
        (with_metadata, "wrote such recordings into, got .*with metadata with others"),
        (tmp_path / "mine", "with other files in it ..zs/notes"),
    ):
        before = {path: path.read_bytes() for path in destination.rglob("*") if path.is_file()}
        with pytest.raises(icl.AssetError, match=message):
            write_recordings(recordings, destination, progress=False)
        assert {path: path.read_bytes() for path in destination.rglob("*") if path.is_file()} == before
    for _ in range(2):  # the second time over the first
        write_recordings(recordings, tmp_path / "new", progress=False)
    again = load(tmp_path / "new")
    assert again.metadata == recordings.metadata
    assert again == recordings
