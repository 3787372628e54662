"""`icl-dual tasks`: the tasks that are known by name."""

import argparse
from typing import Any

import icl_dual as icl
from icl_dual.cli.commands import add_command
from icl_dual.paper_tasks import PAPER_LABELS, PAPER_TEMPLATES
from icl_dual.scripts.common import TITLES

EXAMPLES = """
icl-dual tasks
icl-dual tasks --json
"""


def add_commands(subparsers: Any) -> None:
    """Add the command."""
    summary = "List the paper's tasks: name, demonstrations, label words and template."
    add_command(subparsers, "tasks", run, summary=summary, examples=EXAMPLES)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the tasks, and return them."""
    known: list[dict[str, Any]] = [
        {
            "name": name,
            "title": TITLES[name],
            "k": icl.PAPER_K[name],
            "labels": list(PAPER_LABELS[name]),
            "template": PAPER_TEMPLATES[name],
        }
        for name in icl.TASKS
    ]
    for task in known:
        print(f"{task['name']:8} k={task['k']}  {' / '.join(task['labels'])}\n{'':8} {task['template']}")
    print("\nTasks of your own: icl-dual compare MODEL --rows FILE.csv")
    return known
