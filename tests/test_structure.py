"""The layout: modules are nouns that no function shadows, imports go one way, one package knows TransformerLens."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import icl_dual

ROOT = Path(icl_dual.__file__).parent
MODULES = ["icl_dual", *(info.name for info in pkgutil.walk_packages([str(ROOT)], "icl_dual."))]
LAYERS = (
    ("arguments", "results", "storage", "torch_utils", "type_guards", "progress", "field_docs", "html_tables"),
    ("dual", "momentum"),
    ("statistics",),
    ("assets",),
    ("rows", "tasks", "harness_tasks", "paper_tasks", "scoring"),
    ("models",),
    ("texts", "segments", "prompts", "sourced_prompts", "prompt_view", "contexts"),
    ("captures",),
    ("massive_activations",),
    ("attention_split",),
    ("decomposition",),
    ("source_attention",),
    ("views",),
    ("finetuning",),
    ("patches",),
    ("updates", "order_sensitivity"),
    ("recordings",),
    ("metrics",),
    ("experiment", "planning"),
    ("cells",),
    ("provenance", "study"),
    ("grids",),
    ("pretraining",),
    ("plots",),
    ("scripts",),
    ("cli",),
)
"""What stands above may be imported by what stands below, and never the other way."""


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_function_has_types_and_everything_public_a_docstring(path: Path) -> None:
    module = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(module)
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            args = node.args
            named = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            untyped = [arg.arg for arg in named if arg and not arg.annotation and arg.arg not in ("self", "cls")]
            assert untyped == [], f"{path.name}, line {node.lineno}"
            assert node.returns is not None, f"{path.name}, line {node.lineno}"
    for node in public(module):
        is_overload = any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)
        assert ast.get_docstring(node) or is_overload, f"{path.name}, line {node.lineno}: {node.name}"


def public(parent: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The public functions and classes of a module or class, and those inside of these classes."""
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Each imported module of a file, and the name imported from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def area(module: str) -> str | None:
    """The first part of a module's name below `icl_dual`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "icl_dual" and len(parts) > 1 else None


FOR_USERS = ("grid", "notebook", "peft", "ray", "slurm", "benchmark")
"""The optional extras for users; the others are for work on the library."""
EXTRAS = ("anywidget", "ipywidgets", "nnsight", "peft", "ray", "s3fs", "submitit", "xarray")
"""The modules that these extras bring."""
LOADED_ON_USE = ("scipy.stats", "gguf", *EXTRAS)
"""What takes long to import or is optional: loaded by what uses it."""


def test_extras_are_known_to_be_loaded_on_use() -> None:
    with (ROOT.parent / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    brought = {Requirement(line).name for name in FOR_USERS for line in extras[name]}
    assert brought <= {*EXTRAS, "psutil"}, "psutil comes with accelerate"


def test_every_module_imports_without_a_warning_and_icl_dual_loads_nothing_that_few_use() -> None:
    imports = "; ".join(f"import {name}" for name in MODULES)
    code = f"import sys, icl_dual; assert not sys.modules.keys() & {{*{LOADED_ON_USE}}}; {imports}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_no_function_or_class_has_the_path_of_a_module(name: str) -> None:
    module = importlib.import_module(name)
    assert inspect.ismodule(module)
    parent, _, attribute = name.rpartition(".")
    if parent:
        assert getattr(importlib.import_module(parent), attribute) is module, f"{name} is shadowed in {parent}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_table_only(path: Path) -> None:
    rank = {name: index for index, names in enumerate(LAYERS) for name in names}
    relative = path.relative_to(ROOT)
    importing_area = relative.parts[0].removesuffix(".py")
    if importing_area in ("__init__", "__main__"):
        return
    assert importing_area in rank, (
        f"{importing_area} has no place in LAYERS: add it there, and to the table in CONTRIBUTING.md"
    )
    for module, name in imports(path):
        imported_area = area(module) or (name if module == "icl_dual" else None)
        if imported_area == "":  # the package as its users import it
            assert importing_area in ("scripts", "cli"), f"{relative} imports the whole package"
            continue
        if imported_area is not None and imported_area != importing_area:
            assert rank[imported_area] <= rank[importing_area], (
                f"{relative} imports {imported_area}, which stands below it"
            )


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_stay_in_their_module_and_transformer_lens_in_models(path: Path) -> None:
    for module, name in imports(path):
        if module.startswith("icl_dual"):
            assert not name.startswith("_") or name == "__version__", f"{path.name} imports {name} of {module}"
        if module.split(".")[0] == "transformer_lens":
            assert path.relative_to(ROOT).parts[0] == "models", f"{path.name} imports {module}"


RUNS_CODE_OF_OTHERS = (
    "AutoTokenizer.from_pretrained",
    "AutoModelForCausalLM.from_pretrained",
    "AutoConfig.from_pretrained",
)
RUNS_CODE_OF_OTHERS += ("TransformerBridge.boot_transformers", "datasets.load_dataset")
"""Calls that can run code of a model or data set, unless they are told not to."""
SCRIPTS = ROOT.parent / "analyses"


@pytest.mark.parametrize("path", sorted([*ROOT.rglob("*.py"), *SCRIPTS.glob("*.py")]), ids=lambda path: path.stem)
def test_no_call_runs_the_code_of_a_model_or_data_set(path: Path) -> None:
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in RUNS_CODE_OF_OTHERS:
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert options.get("trust_remote_code") == "False", f"{path.name}, line {call.lineno}"
