"""What a study compares with its saved cells: the bytes of rows and models, templates, label words, tokenizers."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_rows
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import icl_dual as icl
from icl_dual import assets, study
from icl_dual.models.tokenization import tokenizer_fingerprint

CELL = icl.Cell(model="mine", task="sst2", k=3, seed=1, lr=0.05, n_queries=5, replicas=0)
FILMS = dataclasses.replace(CELL, task="films")


@pytest.fixture
def mine(make_model: Callable[..., icl.Model]) -> icl.Model:
    return make_model("llama", name="mine")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models and tasks that are loaded."""
    names: list[str] = []

    def counted(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_and_count(name: str, *args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return load(name, *args, **kwargs)

        return load_and_count

    monkeypatch.setattr(study, "load_task", counted(study.load_task))
    monkeypatch.setattr(study, "load_model", counted(study.load_model))
    return names


def films(rows: list[dict[str, object]], **options: Any) -> icl.Task:
    settings = {"template": "Review: {text} Verdict:", "label_words": ("bad", "good"), **options}
    return icl.Task("films", rows=rows, **settings)


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def other_rows() -> list[dict[str, object]]:
    return [{**row, "text": f"{row['text']}."} for row in make_rows()]


def copied(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))


def test_a_finished_cell_is_refused_when_the_file_of_its_rows_changed(
    mine: icl.Model, loaded: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, make_rows())
    cell = dataclasses.replace(CELL, source=str(file))
    icl.run_study([cell], tmp_path / "study", models=[mine], progress=False)
    loaded.clear()
    file.touch()
    icl.run_study([cell], tmp_path / "study", models=[mine], progress=False)
    assert loaded == [], "the same bytes are not read as rows again"
    file.write_text(file.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")
    icl.run_study([cell], tmp_path / "study", models=[mine], progress=False)
    assert loaded == ["sst2"], "other bytes are, and may be the same rows"
    unused = make_rows()
    unused[-1] = {**unused[-1], "text": "another text"}
    write_rows(file, unused)
    with pytest.raises(icl.SettingsError, match=r"task rows='[0-9a-f]{16}', got .* task rows='[0-9a-f]{16}'"):
        icl.run_study([cell], tmp_path / "study", models=[mine], progress=False)
    file.unlink()
    icl.run_study([cell], tmp_path / "study", models=[mine], progress=False)


def test_the_yaml_file_of_a_task_and_its_rows_are_among_the_files(
    mine: icl.Model, loaded: list[str], tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", make_rows())
    yaml = tmp_path / "task.yaml"
    text = (
        "task: films\noutput_type: multiple_choice\ndoc_to_text: 'Review: {{text}}'\ndoc_to_target: label\n"
        "doc_to_choice: ['bad', 'good']\ndataset_path: json\ndataset_kwargs: {data_files: rows.jsonl}\n"
        "training_split: train\n"
    )
    yaml.write_text(text, encoding="utf-8")
    cell = dataclasses.replace(CELL, task=str(yaml))
    (result,) = icl.run_study([cell], tmp_path / "study", models=[mine], progress=False)
    assert {Path(path).name for path in result.provenance["task_files"]} == {"task.yaml", "rows.jsonl"}
    icl.run_study([cell], tmp_path / "study", models=[mine], progress=False)
    yaml.write_text(text.replace("Review", "Film"), encoding="utf-8")
    with pytest.raises(icl.SettingsError, match=r"task template='Film: {text}', got .* task template='Review: {text}'"):
        icl.run_study([cell], tmp_path / "study", models=[mine], progress=False)
    yaml.write_text(text, encoding="utf-8")
    write_rows(tmp_path / "rows.jsonl", other_rows())
    with pytest.raises(icl.SettingsError, match="task rows="):
        icl.run_study([cell], tmp_path / "study", models=[mine], progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Film: {text} Verdict:"}, "made with task template='Film: {text} Verdict:', got"),
        ({"label_words": ("poor", "good")}, r"made with task label_words=\['poor', 'good'\], got"),
        ({"label_separator": "\n"}, "made with task label_separator="),
        ({"separator": "\n\n"}, "made with task separator="),
        ({"description": "Films."}, "made with task description='Films.', got"),
        ({"rows": other_rows()}, "made with task rows="),
    ],
)
def test_what_changed_in_a_task_is_named(
    mine: icl.Model, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    icl.run_cell(mine, films(make_rows()), FILMS, tmp_path / FILMS.name, progress=False)
    changed = films(**{"rows": make_rows(), **options})
    for run in (
        lambda: icl.run_study([FILMS], tmp_path, tasks=[changed], models=[mine], progress=False),
        lambda: icl.run_cell(mine, changed, FILMS, tmp_path / FILMS.name, progress=False),
    ):
        with pytest.raises(icl.SettingsError, match=message):
            run()


def test_a_study_is_of_one_data_set_and_one_model_also_over_several_calls(
    mine: icl.Model, make_model: Callable[..., icl.Model], tmp_path: Path
) -> None:
    icl.run_study([FILMS], tmp_path, tasks=[films(make_rows())], models=[mine], progress=False)
    next_cell = dataclasses.replace(FILMS, seed=2)
    with pytest.raises(icl.SettingsError, match=rf"task rows=.*{FILMS.name}, made with task rows="):
        icl.run_study([next_cell], tmp_path, tasks=[films(other_rows())], models=[mine], progress=False)
    other = make_model("llama", name="mine")
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(icl.SettingsError, match=rf"fingerprint='.*{FILMS.name}, made with fingerprint="):
        icl.run_study([next_cell], tmp_path, tasks=[films(make_rows())], models=[other], progress=False)
    hidden = tmp_path / ".icl_dual-another-host-1-abcdefgh"  # scratch of a process on another machine
    (tmp_path / FILMS.name).rename(hidden)
    assert icl.run_study([next_cell], tmp_path, tasks=[films(other_rows())], models=[mine], progress=False)


def test_another_tokenizer_is_refused_and_an_older_cell_has_none_to_compare(
    mine: icl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = films(make_rows())
    icl.run_study([FILMS], tmp_path, tasks=[task], models=[mine], progress=False)
    changed = copied(mine.tokenizer)
    same = icl.Model(mine.wrapped, name="mine", tokenizer=changed)
    icl.run_study([FILMS], tmp_path, tasks=[task], models=[same], progress=False)
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()  # the vocabulary stays
    with pytest.raises(icl.SettingsError, match=r"tokenizer='[0-9a-f]{16}', got .* tokenizer='[0-9a-f]{16}'"):
        icl.run_study([FILMS], tmp_path, tasks=[task], models=[same], progress=False)
    monkeypatch.setattr("icl_dual.provenance.version", lambda name: "another version")
    icl.run_study([FILMS], tmp_path, tasks=[task], models=[same], progress=False)


def test_a_tokenizers_fingerprint_is_of_its_rules_and_not_of_its_last_call(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a text", "another one"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    changed = copied(tokenizer)
    assert tokenizer_fingerprint(changed) == before
    changed.add_tokens(["<label>"])
    assert tokenizer_fingerprint(changed) != before


@pytest.fixture
def model_folder(
    make_hf_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    """A model in shards, with a tokenizer."""
    folder = tmp_path / "model"
    make_hf_model("llama").save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_changed_files_of_a_local_model_are_found_without_loading_it(
    model_folder: Path, loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [
        dataclasses.replace(FILMS, model=str(model_folder), weights=weights) for weights in ("trained", "untrained")
    ]
    task = films(make_rows())

    def run() -> list[icl.CellResult]:
        return icl.run_study(cells, tmp_path / "study", tasks=[task], progress=False)

    run()
    loaded.clear()
    monkeypatch.setattr(assets, "_file_sha256", lambda path: pytest.fail("nothing changed, nothing is read"))
    run()
    monkeypatch.undo()
    os.utime(model_folder / "config.json")
    run()
    shard = sorted(model_folder.glob("model-*.safetensors"))[-1]
    status, weights = shard.stat(), load_file(shard)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, shard, metadata={"format": "pt"})
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert shard.stat().st_size == status.st_size
    with pytest.raises(icl.SettingsError, match=rf"expected the files of model=.* got other bytes \(.*{shard.name}\)"):
        run()
    assert loaded == []
    shutil.rmtree(model_folder)
    run()


def test_shards_in_a_folder_of_their_own_are_among_a_models_files(model_folder: Path) -> None:
    (model_folder / "weights").mkdir()
    shard = sorted(model_folder.glob("model-*.safetensors"))[0]
    shard.rename(model_folder / "weights" / shard.name)
    index = model_folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{shard.name}', f'"weights/{shard.name}'))
    assert f"weights/{shard.name}" in assets.local_files(str(model_folder))
    before = assets.local_provenance(str(model_folder))
    assert before == assets.model_files(str(model_folder)).provenance
    (model_folder / "weights" / shard.name).write_bytes(b"other bytes")
    assert assets.local_provenance(str(model_folder)) != before


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_a_damaged_index_lists_no_shards(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert list(assets.local_files(str(tmp_path))) == ["model.safetensors.index.json"]


@pytest.mark.parametrize("name", ["smollm2-135m", "openai-community/gpt2", "/nowhere/model"])
def test_pinned_models_and_hub_models_have_no_local_files(name: str) -> None:
    assert assets.local_files(name) == {}
