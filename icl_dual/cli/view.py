"""`icl-dual view`: one prompt as an interactive page."""

import argparse
from typing import Any

import icl_dual as icl
from icl_dual.cli.commands import add_command, add_task_options, load_task
from icl_dual.scripts.common import add_device_options, count, loading, model_name, model_title, output_file, positive
from icl_dual.views.interactive import is_view

EXAMPLES = """
icl-dual view smollm2-135m --task sst2 --k 4 --out page.html
icl-dual view ./my-model --rows films.csv --labels bad good --query 3
"""


def add_commands(subparsers: Any) -> None:
    """Add the command."""
    summary = "Write an interactive page of one prompt: what each token contributes, at every layer and head."
    parser = add_command(subparsers, "view", run, summary=summary, examples=EXAMPLES, check=check_out)
    add = parser.add_argument
    add("model", type=model_name, metavar="MODEL", help="packaged model, hub id, folder or .gguf file")
    add_task_options(parser)
    add("--k", type=positive, default=4, help="demonstrations (%(default)s)")
    add("--seed", type=count, default=1, help="draw of the demonstrations (%(default)s)")
    add("--query", type=count, default=0, help="index of the query (%(default)s)")
    add_device_options(parser)
    add("--out", type=output_file, default="view.html", metavar="FILE", help="HTML file (%(default)s)")
    add("--force", action="store_true", help="replace the file even if it is no view")


def check_out(args: argparse.Namespace) -> None:
    """Refuse to replace a file that is no view, unless that is requested."""
    if args.out.is_file() and not args.force and not is_view(args.out):
        raise argparse.ArgumentTypeError(
            f"argument --out: expected a new file, or an earlier view to replace, got {str(args.out)!r}, a file of "
            "other origin: choose another name, or add --force to replace it"
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Split the attention of one prompt, write its page, and return the file and what the split is of."""
    task = load_task(args)
    if args.query >= (n_queries := task.pool_sizes["evaluation"]):
        raise icl.TaskError(f"expected --query from 0 to {n_queries - 1}, got {args.query}: choose another query")
    demonstrations, query = task.demonstrations(args.k, args.seed), task.queries(args.query + 1)[int(args.query)]
    model = icl.load_model(args.model, **loading(args))
    prompts = icl.build_prompts(model, task, demonstrations, [query])
    zero_shot = icl.capture(model, prompts.zero_shot(), fields=icl.DECOMPOSE_FIELDS)
    in_context = icl.capture(model, prompts, fields=icl.DECOMPOSE_FIELDS)
    decomposition = icl.decompose(model, zero_shot=zero_shot, in_context=in_context)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    title = f"{model_title(args.model)}: query {args.query} of {task.name} after {args.k} demonstrations"
    icl.view(decomposition, zero_shot=zero_shot, tokenizer=model, title=title).save(args.out)
    size = args.out.stat().st_size / 1e6
    print(f"{decomposition}\n{args.out} ({size:.1f} MB) opens in any browser, without a network")
    captures = {"zero_shot": zero_shot, "in_context": in_context}
    return {
        "file": str(args.out),
        "query": task.prompt(query),
        "gold": task.label_words[query.label],
        "predicted": {name: task.label_words[capture.predictions[0]] for name, capture in captures.items()},
        "residual": decomposition.residual,
    }
