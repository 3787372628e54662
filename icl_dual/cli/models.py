"""`icl-dual models`: the models that packages carry, and whether a model can be split."""

import argparse
from typing import Any

import icl_dual as icl
from icl_dual.assets import PACKAGED_MODELS, cache_dir
from icl_dual.cli.commands import add_command
from icl_dual.cli.doctor import megabytes
from icl_dual.scripts.common import add_device_options, loading, model_name

EXAMPLES = """
icl-dual models
icl-dual models openai-community/gpt2
icl-dual models ./my-model --json
"""


def add_commands(subparsers: Any) -> None:
    """Add the command."""
    summary = "List the models that packages carry; or load a model and split its attention on a short prompt."
    parser = add_command(subparsers, "models", run, summary=summary, examples=EXAMPLES)
    parser.add_argument(
        "model", nargs="?", type=model_name, metavar="MODEL", help="packaged model, hub id, folder or .gguf file"
    )
    add_device_options(parser)


def run(args: argparse.Namespace) -> Any:
    """Print and return the packaged models, or the size of one model and the residual of its split."""
    return packaged_models() if args.model is None else split(icl.load_model(args.model, **loading(args)))


def packaged_models() -> list[dict[str, Any]]:
    """Print the packaged models, and return them."""
    rows: list[dict[str, Any]] = []
    for name, model in PACKAGED_MODELS.items():
        folder = cache_dir() / "models" / model.sha256[:16]
        size = megabytes(folder) if folder.exists() else None
        rows.append({"name": name, "description": model.description, "cached_mb": size, "terms": model.terms})
        state = "fetched on first use" if size is None else f"in the cache, {size} MB"
        print(f"{name:14} {model.description}; {state}")
    print("\nAlso: a hub id (openai-community/gpt2), a folder that transformers can load, or a .gguf file")
    return rows


def split(model: icl.Model) -> dict[str, Any]:
    """Split a model's attention on a short prompt; print and return its size and the split's residual.

    Raises:
        UnsupportedModelError: the attention cannot be recomputed from the model's hooks.
    """
    rows = [{"text": f"film number {number}", "label": number % 2} for number in range(20)]
    task = icl.Task("films", "Text: {text} Label:", ("bad", "good"), rows)
    prompts = icl.build_prompts(model, task, task.demonstrations(2, seed=1), task.queries(2))
    zero_shot, in_context = (
        icl.capture(model, setting, fields=icl.DECOMPOSE_FIELDS) for setting in (prompts.zero_shot(), prompts)
    )
    residual = icl.decompose(model, zero_shot=zero_shot, in_context=in_context).residual
    sizes = {name: getattr(model, name) for name in ("n_layers", "n_heads", "n_key_value_heads", "d_head", "d_model")}
    print(f"{model.name}: {', '.join(f'{name}={size}' for name, size in sizes.items())}")
    print(f"attention splits into z_0 and ΔICL, with a relative residual of {residual:.1e}")
    return {"name": model.name, **sizes, "residual": residual}
