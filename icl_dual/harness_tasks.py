"""Tasks from the YAML files of lm-evaluation-harness, of its multiple-choice kind.

A file's `doc_to_text` writes the prompt, `doc_to_choice` the label words, and `doc_to_target` the right one. Each is
the name of a column, or a Jinja template. They are read as the harness reads them, so that prompts are the harness's
own, character by character. What would change a prompt and is not read here is refused by name.

A file runs no code: Python functions (`!function`) and other Python tags are refused, and templates run in Jinja's
sandbox, which does not limit time and memory.
"""

import ast
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import yaml
from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from icl_dual import assets
from icl_dual.arguments import checked
from icl_dual.rows import Rows, TaskError, located_rows, note_file
from icl_dual.tasks import Task
from icl_dual.type_guards import is_array, is_dict, is_list, is_list_or_tuple, is_mapping, is_number

TEXTS = {"description": "", "target_delimiter": " ", "fewshot_delimiter": "\n\n"}
"""The harness's defaults: the text before everything, before a label word, and after each demonstration."""

READ_KEYS = {
    *("task", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", *TEXTS),
    *("dataset_path", "dataset_name", "dataset_kwargs", "fewshot_config"),
    *("training_split", "validation_split", "test_split", "fewshot_split"),
}
"""The keys that a task is made from."""

IGNORED_KEYS = {
    *("tag", "group", "task_alias", "num_fewshot", "metric_list", "metadata", "version", "repeats", "filter_list"),
    *("generation_kwargs", "should_decontaminate", "doc_to_decontamination_query", "unsafe_code"),
}
"""Keys without effect on prompts: what the harness computes from a model's answers, and how tables name it."""

NAMES = ("task", "dataset_path", "dataset_name", "training_split", "validation_split", "test_split", "fewshot_split")
"""The keys with one name."""

READ_DATASET_KEYS = {"data_files", "revision"}
"""The keys of `dataset_kwargs` that are read."""

RENDER_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, SyntaxError),
    *(RecursionError, MemoryError),
)
"""What a template raises where a row does not fit it."""


@checked
def task_from_yaml(
    path: str | PathLike[str], rows: Rows | None = None, query_rows: Rows | None = None, *, name: str | None = None
) -> Task:
    """Make a task from a YAML file of lm-evaluation-harness, of output type `multiple_choice`.

    Args:
        path: the file. Files that it includes are read too, from its own folder.
        rows: the rows that demonstrations are drawn from, with the columns that the file's templates name. By default
            those of the file's `dataset_path`: `json` or `csv` files next to it (`dataset_kwargs: {data_files: …}`), or
            a data set on the Hugging Face hub. Of its splits, the harness takes demonstrations from `fewshot_split`,
            `training_split` or `validation_split`, and queries from `test_split` or `validation_split`.
        query_rows: the rows that queries are drawn from. Without them, `rows` are divided into pools (`Task`).
        name: the task's name; by default the file's `task`.

    Returns:
        The task. Its label separator is `target_delimiter`, its separator `fewshot_delimiter`.

    Raises:
        TaskError: the file has a Python function, another output type or a key that is not read; a template does not
            fit a row; or the choices differ from row to row, so that there are no label words.
        AssetError: the data set cannot be fetched.

    Example:
        >>> import pathlib, tempfile
        >>> text = '''
        ... task: parity
        ... output_type: multiple_choice
        ... doc_to_text: "Is {{number}} even? Answer:"
        ... doc_to_target: label
        ... doc_to_choice: ["no", "yes"]
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "parity.yaml")
        ...     _ = path.write_text(text)
        ...     task = task_from_yaml(path, [{"number": n, "label": 1 - n % 2} for n in range(20)])
        >>> task
        Task('parity', 'Is {text} even? Answer:', labels=['no', 'yes'], {'demonstrations': 10, 'selection': 2, \
'evaluation': 8}, protocol='answer')
    """
    path = Path(path)
    config = TEXTS | _config(path, ())
    _check_config(path, config)
    if rows is None:
        if query_rows is not None:
            raise TaskError(f"{path}: expected rows with query_rows, got none: pass both, or neither")
        rows, query_rows = _split_rows(path, config)
    head, tail = _constant_ends(path, config["doc_to_text"])
    reader = _DocReader(config, head, tail)
    pools = [None if pool is None else list(reader.rows(pool)) for pool in (rows, query_rows)]
    return Task(
        str(name or config.get("task") or path.stem),
        f"{_escaped(head)}{{text}}{_escaped(tail)}",
        reader.choices,
        pools[0] or [],
        pools[1],
        label_separator=config["target_delimiter"],
        separator=config["fewshot_delimiter"],
        description=_render(config["description"], {}, f"{path}, description"),
        strip_fields=False,
    )


class _DocReader:
    """Reads the text and the right choice of each row, and the choices that all rows share."""

    def __init__(self, config: Mapping[str, Any], head: str, tail: str) -> None:
        self.config, self.head, self.tail = config, head, tail
        self.choices: tuple[str, ...] = ()

    def rows(self, rows: Rows) -> Iterator[dict[str, str]]:
        """Yield each row as a text between the template's constant ends, and a label word."""
        source, located = located_rows(rows, "rows")
        docs = [doc for _, doc in located]
        if source.endswith(".csv"):
            _read_integers(docs)
        for where, doc in located:
            if not is_mapping(doc):
                raise TaskError(
                    f"{where}: expected a dictionary, got {type(doc).__name__}: pass each row as a dictionary of the "
                    "columns that the templates name"
                )
            choices = self._choices(doc, where)
            self.choices = self.choices or choices
            if choices != self.choices:
                raise TaskError(
                    f"{where}: expected the choices {list(self.choices)} in every row, got {list(choices)}: a task "
                    "here has one list of label words, so use a file with fixed choices, such as letters"
                )
            text = self._text(doc, where)
            yield {
                "text": text[len(self.head) : len(text) - len(self.tail)],
                "label": choices[self._gold(doc, choices, where)],
            }

    def _text(self, doc: Mapping[str, Any], where: str) -> str:
        spec = self.config["doc_to_text"]
        text = doc[spec] if spec in doc else _render(spec, doc, where)
        if text == spec and spec not in doc:
            raise TaskError(
                f"{where}: expected doc_to_text as a column's name or a template with the query, got {spec!r}: use one "
                f"of the columns {sorted(map(str, doc))} in it"
            )
        if not isinstance(text, str) or (text.isdigit() and spec not in doc):
            raise TaskError(
                f"{where}: expected text from doc_to_text={spec!r}, got {text!r}: a number makes the harness take the "
                "choices as contexts (multiple inputs), which is not supported"
            )
        return text

    def _choices(self, doc: Mapping[str, Any], where: str) -> tuple[str, ...]:
        spec = self.config["doc_to_choice"]
        if is_mapping(spec):
            choices: Any = list(spec.values())
        elif not isinstance(spec, str):
            choices = spec
        elif spec in doc:
            choices = doc[spec]
        else:
            choices = _literal(_render(spec, doc, where), "doc_to_choice", where)
        if not (is_list_or_tuple(choices) or is_array(choices)):
            raise TaskError(
                f"{where}: expected a list of choices from doc_to_choice={spec!r}, got {choices!r}: correct the file"
            )
        if any(isinstance(choice, list | Mapping | None) for choice in choices):
            raise TaskError(
                f"{where}: expected texts or numbers in doc_to_choice, got {reprlib.repr(list(choices))}: correct "
                "the file"
            )
        if len(choices) < 2:
            raise TaskError(
                f"{where}: expected at least two choices from doc_to_choice, got {list(choices)}: add the others"
            )
        return tuple(_render(choice, doc, where) if "{{" in str(choice) else str(choice) for choice in choices)

    def _gold(self, doc: Mapping[str, Any], choices: Sequence[str], where: str) -> int:
        """Return the index of the right choice: a number is an index, a text one of the choices."""
        spec = self.config["doc_to_target"]
        if not isinstance(spec, str):
            target: Any = spec
        elif spec in doc:
            target = doc[spec]
        else:
            target = _render(spec, doc, where)
            target = int(target) if target.isdecimal() and len(target) < 10 else target
        if isinstance(target, str) and target in choices:
            return choices.index(target)
        if is_number(target) and target in range(len(choices)):
            return int(target)
        raise TaskError(
            f"{where}: expected an index from 0 to {len(choices) - 1} or one of {list(choices)} from "
            f"doc_to_target={spec!r}, got {reprlib.repr(target)}: correct the file, or leave the row out"
        )


class _Function:
    """A Python function that a file names; it is never imported."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Loader(yaml.SafeLoader):
    """Reads plain YAML, and the names of functions."""


def _function(loader: yaml.SafeLoader, node: yaml.Node) -> _Function:
    return _Function(
        node.value if isinstance(node, yaml.ScalarNode) else f"({type(node).__name__.removesuffix('Node').lower()})"
    )


_Loader.add_constructor("!function", _function)


def _config(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """Return the keys of a file, and of the files that it includes where it does not have them itself."""
    path = path.resolve()
    if path in including:
        raise TaskError(f"{path}: expected includes that end, got a file that includes itself: remove the include")
    try:
        config = _read_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"expected a readable UTF-8 file at {path}, got {error}: check the path") from error
    except TaskError:
        raise
    except RecursionError as error:
        raise TaskError(f"{path}: expected YAML with few levels, got too many: write lists and keys flat") from error
    except (yaml.YAMLError, ValueError) as error:
        raise TaskError(
            f"{path}: expected plain YAML, got {' '.join(str(error).split())}: correct it, and use no Python tags"
        ) from error
    if not is_dict(config):
        raise TaskError(f"{path}: expected keys such as doc_to_text, got {type(config).__name__}: correct the file")
    if others := [key for key in config if not isinstance(key, str)]:
        raise TaskError(
            f"{path}: expected keys as text, got {', '.join(map(reprlib.repr, others))}: write them in quotes, or "
            "remove them"
        )
    names = config.pop("include", None) or list[str]()
    names = [names] if isinstance(names, str) else names
    if not is_list(names) or not all(isinstance(name, str) for name in names):
        raise TaskError(
            f"{path}: expected include as a file's path or a list of paths, got {reprlib.repr(names)}: correct it, or "
            "remove it"
        )
    included: dict[str, Any] = {}
    for name in reversed(names):
        included |= _config(path.parent / name, (*including, path))
    return included | config


def _read_yaml(path: Path) -> Any:
    """Return what a file says; choices that YAML would change are refused."""
    note_file(path)
    loader: Any = _Loader(path.read_text(encoding="utf-8"))
    try:
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            for key, value in root.value:
                if key.value == "doc_to_choice":
                    _check_choices_as_written(path, loader, value)
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _check_choices_as_written(path: Path, loader: Any, choices: yaml.Node) -> None:
    """Refuse choices without quotes that YAML reads as another text, such as `no` as `False`."""
    if not isinstance(choices, yaml.SequenceNode | yaml.MappingNode):
        return
    nodes = [node for _, node in choices.value] if isinstance(choices, yaml.MappingNode) else choices.value
    scalars = [node for node in nodes if isinstance(node, yaml.ScalarNode) and node.tag.startswith("tag:yaml.org")]
    read = {node.value: str(loader.construct_object(node)) for node in scalars}
    if changed := {written: text for written, text in read.items() if written.casefold() != text.casefold()}:
        raise TaskError(
            f"{path}: expected doc_to_choice as texts, got {' and '.join(changed)} without quotes, which YAML reads as "
            f"{' and '.join(changed.values())}: put {' and '.join(changed)} in quotes"
        )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is no multiple-choice task, runs code, or would change prompts and is not read."""
    for key, value in config.items():
        for function in _functions(value, set()):
            raise TaskError(
                f"{path}: expected no Python functions, got {key}: !function {function}: remove it; where it changes "
                "rows, change them yourself and pass rows="
            )
    if isinstance(config.get("task"), list):
        raise TaskError(
            f"{path}: expected one task, got a group of {len(config['task'])}: pass the file of one of them"
        )
    output_type = config.get("output_type", "generate_until")
    if output_type != "multiple_choice":
        raise TaskError(
            f"{path}: expected output_type: multiple_choice, got {output_type}"
            f"{'' if 'output_type' in config else ' (the default)'}: only tasks with label words can be read"
        )
    if unknown := sorted(config.keys() - READ_KEYS - IGNORED_KEYS):
        raise TaskError(
            f"{path}: expected only keys that are read, got {', '.join(unknown)}: remove what does not change the "
            "prompts, and do what does in the rows"
        )
    if missing := [key for key in ("doc_to_text", "doc_to_target", "doc_to_choice") if config.get(key) is None]:
        raise TaskError(f"{path}: expected {missing[0]}, got none: add it to the file")
    for key in ("doc_to_text", *TEXTS):
        if not isinstance(config[key], str):
            raise TaskError(
                f"{path}: expected {key} as text, got {reprlib.repr(config[key])}: write it in quotes, or leave it out"
            )
    for key in NAMES:
        if not isinstance(config.get(key), str | int | float | None):
            raise TaskError(f"{path}: expected {key} as a name, got {reprlib.repr(config[key])}: correct it")
    target = config["doc_to_target"]
    if is_list(target) or is_mapping(target):
        raise TaskError(
            f"{path}: expected doc_to_target as an index, a column's name or a template, got "
            f"{reprlib.repr(target)}: correct it"
        )
    for key in ("fewshot_config", "dataset_kwargs"):
        if not isinstance(config.get(key) or {}, Mapping) or not all(isinstance(k, str) for k in config.get(key) or ()):
            raise TaskError(
                f"{path}: expected {key} as keys and values, got {reprlib.repr(config[key])}: correct it, or "
                "leave it out"
            )
    fewshot: Mapping[str, Any] = config.get("fewshot_config") or {}
    if unknown := sorted(fewshot.keys() - {"sampler"}):
        raise TaskError(
            f"{path}: expected fewshot_config with a sampler alone, got {', '.join(unknown)}: demonstrations are drawn "
            "from rows by a seed, so remove it"
        )


def _functions(value: Any, visited: set[int]) -> Iterator[str]:
    """Yield the names of the functions in a value, which may contain itself by an alias."""
    if isinstance(value, _Function):
        yield value.name
    elif (is_mapping(value) or is_list(value)) and id(value) not in visited:
        visited.add(id(value))
        for member in value.values() if is_mapping(value) else value:
            yield from _functions(member, visited)


def _split_rows(path: Path, config: Mapping[str, Any]) -> tuple[Rows, Rows | None]:
    """Return the rows of demonstrations, and of queries where they are of another split."""
    splits: dict[str, Any] = {
        kind: config.get(f"{kind}_split") for kind in ("fewshot", "training", "validation", "test")
    }
    demonstrations = splits["fewshot"] or splits["training"] or splits["validation"] or splits["test"]
    queries = splits["test"] or splits["validation"] or demonstrations
    dataset, options = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    if not dataset or not demonstrations:
        raise TaskError(
            f"{path}: expected dataset_path and a split, got dataset_path={dataset!r} and splits {splits}: add them, "
            "or pass rows="
        )
    if unknown := sorted(options.keys() - READ_DATASET_KEYS):
        raise TaskError(
            f"{path}: expected dataset_kwargs with data_files or revision, got {', '.join(unknown)}: load the data set "
            "yourself and pass rows="
        )
    names = [demonstrations, *([queries] if queries != demonstrations else [])]
    if dataset in ("json", "csv"):
        pools = [_file_rows(path, options.get("data_files"), split) for split in names]
    else:
        revision, subset = options.get("revision"), config.get("dataset_name")
        pools = [list(assets.hub_rows(str(dataset), split, config=subset, revision=revision)) for split in names]
    return pools[0], pools[1] if len(pools) > 1 else None


def _file_rows(path: Path, data_files: Any, split: str) -> list[Any]:
    """Return the rows of a split's files, which lie next to the YAML file."""
    by_split = data_files if is_mapping(data_files) else {"train": data_files}
    files = by_split.get(split)
    if not files or not (isinstance(files, str) or is_list(files)) or not all(isinstance(name, str) for name in files):
        raise TaskError(
            f"{path}: expected dataset_kwargs: data_files with the split {split!r}, got {reprlib.repr(data_files)}: "
            "name its file"
        )
    docs: list[Any] = []
    for name in [files] if isinstance(files, str) else files:
        _, located = located_rows(path.parent / name, "rows")
        of_file = [doc for _, doc in located]
        if str(name).endswith(".csv"):
            _read_integers(of_file)
        docs += of_file
    return docs


def _read_integers(docs: Sequence[dict[str, Any]]) -> None:
    """Turn the columns of integers into integers, as `datasets` reads a CSV file."""
    for column in docs[0] if docs else ():
        values = [doc[column] for doc in docs]
        if all(re.fullmatch(r"-?[0-9]+", value) for value in values):
            for doc in docs:
                doc[column] = int(doc[column])


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    cast(Any, environment).filters["regex_replace"] = _regex_replace
    return environment


def _regex_replace(text: str, pattern: str, repl: str, count: int = 0) -> str:
    return re.sub(pattern, repl, text, count=count)


_JINJA = _environment()


def _render(template: str, doc: Mapping[str, Any], where: str) -> str:
    """Return a Jinja template filled with a row."""
    try:
        return _JINJA.from_string(template).render(doc)
    except RENDER_ERRORS as error:
        raise TaskError(
            f"{where}: expected a row that fits the template {template!r}, got {error}: correct the template, or the "
            f"row's columns {sorted(map(str, doc))}"
        ) from error


def _literal(text: str, key: str, where: str) -> Any:
    try:
        return ast.literal_eval(text)
    except RENDER_ERRORS as error:
        raise TaskError(
            f"{where}: expected a Python list from {key}, got {reprlib.repr(text)}: correct the template"
        ) from error


def _constant_ends(path: Path, template: str) -> tuple[str, str]:
    """Return the text that a template begins and ends with whatever the row; nothing for a column's name."""
    try:
        body = _JINJA.parse(template).body
    except RENDER_ERRORS as error:
        raise TaskError(
            f"{path}: expected doc_to_text as a Jinja template, got {reprlib.repr(template)} ({error}): correct it"
        ) from error
    parts = [part for node in body for part in (node.nodes if isinstance(node, nodes.Output) else [node])]
    if all(isinstance(part, nodes.TemplateData) for part in parts):
        return "", ""  # a column's name, or text without the query, which no row has as a column
    ends = [part.data if isinstance(part, nodes.TemplateData) else "" for part in (parts[0], parts[-1])]
    return ends[0], ends[1]


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
