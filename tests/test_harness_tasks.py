"""Tasks from YAML files of lm-evaluation-harness: the harness's own prompts, and what is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from helpers import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.harness_tasks import task_from_yaml

CONFIG: dict[str, Any] = {
    "task": "films",
    "output_type": "multiple_choice",
    "doc_to_text": "Review: {{text}}\nSentiment:",
    "doc_to_target": "label",
    "doc_to_choice": ["bad", "good"],
}


def write(folder: Path, config: dict[str, Any] | str, name: str = "task.yaml") -> Path:
    path = folder / name
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return path


def rendered(template: str, doc: dict) -> str:
    """The harness's `apply_template`."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, repl: re.sub(pattern, repl, text)
    return environment.from_string(template).render(**doc)


def harness_prompt(config: dict[str, Any], demonstrations: list[tuple[str, str]], query: str) -> str:
    """The harness's few-shot context, piece by piece."""
    text = config.get("description", "")
    for prompt, target in demonstrations:
        text += prompt
        text += config.get("target_delimiter", " ")
        text += target
        text += config.get("fewshot_delimiter", "\n\n")
    return text + query


def our_prompt(task: icl.Task, demonstrations: list, query) -> str:
    assert task.separator is not None
    labelled = [task.prompt(e) + task.label_text(e.label) + task.separator for e in demonstrations]
    return "".join([task.description, *labelled, task.prompt(query)])


TEMPLATES = [
    "Review: {{text}}\nSentiment:",
    "text",
    "{{text}}",
    "\n {{text.strip()}} {braces} {# comment #}\nQ:\n",
    "{% if text|length > 9 %}Long{% else %}Short{% endif %}: {{text}} ({{label}} is a number)\nA. no\nB. yes\n",
    "{% for letter in ['A', 'B'] %}{{letter}}. {{text}}\n{% endfor %}Answer:",
    "{{text|regex_replace('a+', 'A')}}:",
]


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text("ab {}\n%", min_size=1, max_size=9).filter(str.strip), min_size=6, max_size=12),
    template=st.sampled_from(TEMPLATES),
    delimiters=st.fixed_dictionaries(
        {}, optional={"target_delimiter": st.sampled_from(["", "\n", " "]), "fewshot_delimiter": st.just("\n###\n")}
    ),
    described=st.booleans(),
)
def test_prompts_are_the_harness_own_character_by_character(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], template: str, delimiters: dict, described: bool
) -> None:
    docs = [{"text": f"{text}{i}", "label": i % 2} for i, text in enumerate(texts)]
    config = (
        CONFIG | {"doc_to_text": template} | delimiters | ({"description": "Judge films.\n\n"} if described else {})
    )
    task = task_from_yaml(write(tmp_path_factory.mktemp("yaml"), config), docs)
    expected = {
        (doc["text"] if template == "text" else rendered(template, doc)): ("bad", "good")[doc["label"]] for doc in docs
    }
    demonstrations, query = task.demonstrations(2, seed=1), task.queries(1)[0]
    prompts = [task.prompt(example) for example in (*demonstrations, query)]
    assert set(prompts) <= set(expected)
    labelled = [(prompt, expected[prompt]) for prompt in prompts[:2]]
    assert our_prompt(task, demonstrations, query) == harness_prompt(config, labelled, prompts[2])
    assert task.label_words[query.label] == expected[prompts[2]]


def test_constant_ends_of_a_template_are_the_tasks(tmp_path: Path) -> None:
    config = CONFIG | {"doc_to_text": "Is {{text}} {good}? {{text}}\nAnswer: "}
    task = task_from_yaml(write(tmp_path, config), make_rows())
    assert task.template == "Is {text}\nAnswer: "
    assert (task.tail, task.unconditional_prompt) == ("\nAnswer: ", "Answer: ")
    assert task.content_free_prompts == ("Is N/A\nAnswer: ", "Is \nAnswer: ", "Is [MASK]\nAnswer: ")


@pytest.mark.parametrize(
    ("target", "choices", "doc", "other", "word"),
    [
        ("label", ["bad", "good"], {"label": 1}, {"label": 0}, "good"),
        ("label", ["bad", "good"], {"label": "good"}, {"label": "bad"}, "good"),
        ("label", ["2", "1"], {"label": 1}, {"label": 0}, "1"),  # a number is an index, whatever the choices are
        ("label", ["2", "1"], {"label": "1"}, {"label": "2"}, "1"),
        ("label", ["1", "0"], {"label": 1}, {"label": "1"}, "0"),
        ("label", ["1", "0"], {"label": "1"}, {"label": 1}, "1"),
        ("{{label - 1}}", ["bad", "good"], {"label": 2}, {"label": 1}, "good"),
        ("{{'good' if label else 'bad'}}", ["bad", "good"], {"label": True}, {"label": False}, "good"),
        ("{{choices.label.index(answer)}}", "{{choices.label}}", {"answer": "B"}, {"answer": "A"}, "B"),
        ("label", "options", {"label": 1}, {"label": 0}, "B"),
        ("label", {"no": "bad", "yes": "good"}, {"label": 1}, {"label": 0}, "good"),
        ("label", [False, True], {"label": 1}, {"label": 0}, "True"),
        ("label", ["bad", "good"], {"label": 1.0}, {"label": 0.0}, "good"),
    ],
)
def test_the_right_choice_is_the_harness(
    target: Any, choices: Any, doc: dict, other: dict, word: str, tmp_path: Path
) -> None:
    both = {"choices": {"label": ["A", "B"]}, "options": ["A", "B"]}
    config = CONFIG | {"doc_to_target": target, "doc_to_choice": choices}
    rows = [{"text": f"t{i}", **both, **(other if i % 2 else doc)} for i in range(20)]
    task = task_from_yaml(write(tmp_path, config), rows)
    for example in (*task.demonstrations(10, 0), *task.queries()):
        number = int(task.prompt(example).split("\n")[0][-1])
        assert (task.label_words[example.label] == word) == (number % 2 == 0)


def test_columns_of_a_csv_file_are_read_as_the_harness_reads_them(tmp_path: Path) -> None:
    """`datasets` reads a column of integers as integers: an index, where the same text would be a choice."""
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(20)))
    config = CONFIG | {"doc_to_choice": ["1", "0"]}
    task = task_from_yaml(write(tmp_path, config), tmp_path / "rows.csv")
    for example in task.queries():
        assert task.label_words[example.label] == ("1", "0")[int(task.prompt(example).split("\n")[0][-1]) % 2]


def test_data_files_next_to_the_file_are_read_by_split(tmp_path: Path) -> None:
    rows = make_rows()
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    (tmp_path / "test.json").write_text(json.dumps(rows[40:]))
    (tmp_path / "defaults").write_text(yaml.safe_dump(CONFIG | {"task": "base", "target_delimiter": "|"}))
    config = {
        "include": "defaults",
        "task": "films",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": ["test.json"]}},
        "training_split": "train",
        "test_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc", "aggregation": "mean"}],
        "num_fewshot": 4,
    }
    task = task_from_yaml(write(tmp_path, config))
    assert (task.name, task.label_separator, task.separator) == ("films", "|", "\n\n")
    assert task.pool_sizes == {"demonstrations": 36, "selection": 4, "evaluation": 20}
    assert icl.load_task(str(tmp_path / "task.yaml")).fingerprint == task.fingerprint
    only_test = {key: value for key, value in config.items() if key != "training_split"}
    only_test["dataset_kwargs"] = {"data_files": {"test": "test.json"}}
    assert task_from_yaml(write(tmp_path, only_test)).pool_sizes == {
        "demonstrations": 10,
        "selection": 2,
        "evaluation": 8,
    }


def test_a_task_is_loaded_by_the_path_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIG)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    task = icl.load_task(str(path), tmp_path / "rows.jsonl")
    assert task.fingerprint == task_from_yaml(path, make_rows()).fingerprint
    with pytest.raises(icl.TaskError, match=r"expected protocol='answer' for a YAML file, got 'reference': leave"):
        icl.load_task(str(path), tmp_path / "rows.jsonl", protocol="reference")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "generate_until"}, "expected output_type: multiple_choice, got generate_until: only"),
        ({"output_type": "loglikelihood_rolling"}, "got loglikelihood_rolling"),
        ({"output_type": None}, r"got generate_until \(the default\)"),
        ({"task": ["a", "b"]}, "expected one task, got a group of 2"),
        ({"gen_prefix": "The answer is"}, "expected only keys that are read, got gen_prefix: remove"),
        ({"doc_to_image": "picture"}, "got doc_to_image"),
        ({"fewshot_config": {"samples": [{"text": "a"}]}}, "fewshot_config with a sampler alone, got samples"),
        ({"doc_to_choice": None}, "expected doc_to_choice, got none"),
        (
            {"doc_to_text": "Review: x"},
            r"row 1: expected doc_to_text as .* with the query, got 'Review: x': use one of",
        ),
        (
            {"doc_to_text": "{{sentence}}"},
            r"row 1: expected a row that fits the template '{{sentence}}', got 'sentence'",
        ),
        ({"doc_to_text": "{{text"}, "expected doc_to_text as a Jinja template, got '{{text'"),
        ({"doc_to_text": "{{text.__class__}}"}, "row 1: expected a row that fits the template .* unsafe"),
        ({"doc_to_text": "{{label}}"}, "row 1: expected text from doc_to_text='{{label}}', got '0': a number makes"),
        ({"doc_to_text": "label"}, "row 1: expected text from doc_to_text='label', got 0"),
        ({"doc_to_choice": "{{[text, 'x']}}"}, r"row 2: expected the choices \[.*\] in every row, got"),
        ({"doc_to_choice": "{{text}}"}, "row 1: expected a Python list from doc_to_choice"),
        ({"doc_to_choice": "label"}, "row 1: expected a list of choices from doc_to_choice='label', got 0"),
        ({"doc_to_target": "text"}, r"row 1: expected an index from 0 to 1 or one of \['bad', 'good'\]"),
        ({"doc_to_target": 2}, "row 1: expected an index from 0 to 1 .*, got 2"),
        ({"target_delimiter": None}, "expected target_delimiter as text, got None"),
        ({"description": "About {{text}}."}, "description: expected a row that fits the template"),
        ({"include": "task.yaml"}, "expected includes that end, got a file that includes itself"),
        ({"include": "missing.yaml"}, "expected a readable UTF-8 file at .*missing.yaml"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_name(changes: dict, message: str, tmp_path: Path) -> None:
    config = {key: value for key, value in (CONFIG | changes).items() if key != "output_type" or value}
    with pytest.raises(icl.TaskError, match=message):
        task_from_yaml(write(tmp_path, config), make_rows())


def test_choices_that_yaml_reads_as_other_texts_are_refused(tmp_path: Path) -> None:
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in CONFIG.items() if name != "doc_to_choice")
    for choices, message in (
        ("[no, yes]", "got no and yes without quotes, which YAML reads as False and True: put no and yes in quotes"),
        ("[fine, Off]", "got Off without quotes, which YAML reads as False: put Off in quotes"),
        ("{a: no, b: fine}", "got no without quotes"),
        ("[good, null]", "got null without quotes, which YAML reads as None"),
        ("[01_0, 1]", "got 01_0 without quotes, which YAML reads as 8: put"),
    ):
        with pytest.raises(icl.TaskError, match=f"expected doc_to_choice as texts, {message}"):
            task_from_yaml(write(tmp_path, f"{text}doc_to_choice: {choices}\n"), make_rows())
    for choices, words in (
        ("['no', \"yes\"]", ("no", "yes")),
        ("[True, False]", ("True", "False")),
        ("[1, 2.5]", ("1", "2.5")),
    ):
        task = task_from_yaml(write(tmp_path, f"{text}doc_to_choice: {choices}\n"), make_rows())
        assert task.label_words == words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("include: 3", "expected include as a file's path or a list of paths, got 3: correct it"),
        ("include: [3]", r"expected include as .*, got \[3\]: correct it"),
        ("include: {a: b}", "expected include as .*, got {'a': 'b'}"),
        ("3: x", "expected keys as text, got 3: write them in quotes"),
        ("? [a]\n: x", "expected plain YAML, got .*unhashable"),
        ("no: x\nfoo: y", "expected keys as text, got False"),
        ("fewshot_config: [1]", r"expected fewshot_config as keys and values, got \[1\]: correct it"),
        ("fewshot_config: {1: 2, a: b}", "expected fewshot_config as keys and values, got {1: 2, 'a': 'b'}"),
        ("dataset_kwargs: 3", "expected dataset_kwargs as keys and values, got 3"),
        ("test_split: [a]", r"expected test_split as a name, got \['a'\]: correct it"),
        ("description: &a [*a]", r"expected description as text, got \[\[.*\.\.\..*\]\]"),
        ("doc_to_target: [0]", r"expected doc_to_target as an index, a column's name or a template, got \[0\]"),
        ("doc_to_choice: [[a], b]", r"expected texts or numbers in doc_to_choice, got \[\['a'\], 'b'\]"),
        ("doc_to_choice: [good]", r"expected at least two choices from doc_to_choice, got \['good'\]: add"),
        ("doc_to_choice: []", r"expected at least two choices from doc_to_choice, got \[\]: add"),
        ("metadata: !function [utils.f]", r"got metadata: !function \(sequence\): remove it"),
        ("metadata: " + 2000 * "[" + 2000 * "]", "expected YAML with few levels, got too many"),
        ("metadata: 2026-99-99", "expected plain YAML, got month must be in"),
    ],
)
def test_values_of_other_types_are_refused_by_name(line: str, message: str, tmp_path: Path) -> None:
    key = line.partition(":")[0]
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in CONFIG.items() if name != key)
    with pytest.raises(icl.TaskError, match=message):
        task_from_yaml(write(tmp_path, f"{text}{line}\n"), make_rows())


def test_aliases_that_contain_themselves_or_grow_are_read(tmp_path: Path) -> None:
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in CONFIG.items())
    nested = "".join(f"  - &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    for metadata in ("&a [*a]", "&a {b: [*a, {c: *a}]}", f"\n  - &a0 [x]\n{nested}"):
        task = task_from_yaml(write(tmp_path, f"{text}metadata: {metadata}\n"), make_rows())
        assert task.label_words == ("bad", "good")
    with pytest.raises(icl.TaskError, match=r"got metadata: !function utils\.f: remove"):
        task_from_yaml(write(tmp_path, f"{text}metadata: &a [*a, [!function utils.f]]\n"), make_rows())


@pytest.mark.parametrize("key", ["doc_to_text", "process_docs", "process_results", "metric_list"])
def test_functions_are_refused_by_name_and_never_run(key: str, tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("raise SystemExit('this ran')")
    value = "\n  - metric: !function utils.work" if key == "metric_list" else " !function utils.work"
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in CONFIG.items() if name != key)
    with pytest.raises(icl.TaskError, match=rf"expected no Python functions, got {key}: !function utils\.work: remove"):
        task_from_yaml(write(tmp_path, f"{text}{key}:{value}\n"), make_rows())


@pytest.mark.parametrize("tag", ["!!python/name:os.system", "!!python/object/apply:os.getcwd []", "!include x"])
def test_other_python_tags_are_refused(tag: str, tmp_path: Path) -> None:
    with pytest.raises(icl.TaskError, match="expected plain YAML, got could not determine a constructor for the tag"):
        task_from_yaml(write(tmp_path, f"task: {tag}\n"), make_rows())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "expected dataset_path and a split, got dataset_path=None"),
        ({"dataset_path": "json", "test_split": "test"}, "expected dataset_kwargs: data_files with the split 'test'"),
        (
            {"dataset_path": "x/y", "test_split": "test", "dataset_kwargs": {"trust_remote_code": True}},
            "expected dataset_kwargs with data_files or revision, got trust_remote_code: load",
        ),
        (
            {"dataset_path": "json", "test_split": "train", "dataset_kwargs": {"data_files": "none.jsonl"}},
            r"expected a file of rows, got .*none\.jsonl, which does not exist",
        ),
    ],
)
def test_a_file_without_rows_says_what_to_add(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(icl.TaskError, match=message):
        task_from_yaml(write(tmp_path, CONFIG | changes))


def test_rows_that_are_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(icl.TaskError, match="rows, row 2: expected a dictionary, got tuple: pass each row"):
        task_from_yaml(write(tmp_path, CONFIG), [make_rows()[0], ("a", 1)])
    with pytest.raises(icl.TaskError, match="expected rows with query_rows, got none"):
        task_from_yaml(write(tmp_path, CONFIG), query_rows=make_rows())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_target": "{{'²'}}"}, "expected an index from 0 to 1 or one of .*, got '²'"),
        ({"doc_to_target": "{{'9' * 5000}}"}, r"expected an index from 0 to 1 .*, got '9+\.\.\.9+': correct"),
        ({"doc_to_text": "{{" + "(" * 3000 + "text" + ")" * 3000 + "}}"}, "expected doc_to_text as a Jinja template"),
        ({"doc_to_choice": "[" * 3000 + "]" * 3000}, r"expected a Python list from doc_to_choice, got '\[+\.\.\.\]+'"),
    ],
)
def test_what_is_too_deep_or_too_long_is_refused_in_a_short_sentence(
    changes: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(icl.TaskError, match=message) as refusal:
        task_from_yaml(write(tmp_path, CONFIG | changes), make_rows())
    assert len(str(refusal.value)) < 600


def test_choices_without_quotes_are_refused_once(tmp_path: Path) -> None:
    text = yaml.safe_dump(CONFIG).replace("- bad\n- good", "- no\n- yes")
    with pytest.raises(icl.TaskError, match=r"^[^:]*: expected doc_to_choice as texts, got no and yes without quotes"):
        task_from_yaml(write(tmp_path, text), make_rows())
