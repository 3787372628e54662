"""Which document an answer comes from: attention by source, held against the document's removal.

Every prompt has three documents and a question that one of them answers. Attention mass, contributions and direct
effects on the answer's logit rank the documents at the position that predicts the answer. The ground truth is ablation:
by how much the answer's log-probability falls where a document is removed. Prompts run in cells of ten; a stopped run
goes on where it was.
"""

import argparse
import math
import random
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

import icl_dual as icl
from icl_dual.prompt_view import TokenView
from icl_dual.scripts.common import (
    at_least,
    command_line,
    count,
    device,
    finish,
    label_outer,
    model_name,
    model_title,
    output_folder,
    panels,
    run_script,
    script_parser,
    short,
)
from icl_dual.scripts.outputs import markdown, markdown_code, markdown_text, write_csv, write_figure, write_text
from icl_dual.statistics import Interval, bootstrap, paired_test, proportion, ranks
from icl_dual.storage import check_same_settings, load_tensors, save_tensors
from icl_dual.torch_utils import pad_right

N_DOCUMENTS, PROMPTS_IN_CELL, QUOTED = 3, 10, slice(6, 14)
DOCUMENTS = [f"document {number + 1}" for number in range(N_DOCUMENTS)]
SCORES = {
    "mass": "attention mass, mean over layers and heads",
    "norm": "norm of the contribution, mean over layers and heads",
    "share": "projection of the contribution on the attention output, mean over layers",
    "effect": "direct effect on the answer's logit, summed over layers and heads",
    "contrast": "the same, less the mean effect on the logits of what the other documents would answer",
}
"""What ranks documents, by name. Contributions are the last four."""

SCORE_TITLES = {
    "mass": "attention mass",
    "norm": "norm of the contribution",
    "share": "share of the attention output",
    "effect": "effect on the answer's logit",
    "contrast": "effect less that on other answers",
}
"""The names of scores in the figure."""


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text."""
    return tuple(text.split())


PEOPLE = words(
    "Anna Boris Carla David Elena Felix Grace Henry Irene James Karen Lewis Maria Nadia Oscar Peter Quinn Rosa Simon "
    "Tanya Ursula Victor Wendy Xavier"
)
CITIES = words(
    "Paris London Berlin Madrid Rome Vienna Moscow Tokyo Boston Chicago Dublin Athens Oslo Cairo Delhi Lisbon Toronto "
    "Sydney Prague Milan Denver Seattle Miami Houston"
)
JOBS = words("baker teacher nurse painter lawyer farmer pilot doctor singer writer plumber dentist")


@dataclass(frozen=True)
class Case:
    """A prompt of three documents, and the answer that each of them would give."""

    documents: tuple[str, ...]
    """The text of each document."""
    question: str
    """The question, up to where the answer is predicted."""
    answers: tuple[str, ...]
    """What follows the question by each document, with the white space before it."""
    target: int
    """The index of the document that answers the question."""


def facts(n: int, seed: int) -> list[Case]:
    """Return made-up facts about people, asked for one of three."""
    rng = random.Random(seed)
    cases = []
    for number in range(n):
        people, cities, jobs = (rng.sample(names, N_DOCUMENTS) for names in (PEOPLE, CITIES, JOBS))
        documents = [
            f"{person} works as a {job} and lives in {city}."
            for person, city, job in zip(people, cities, jobs, strict=True)
        ]
        target = number % N_DOCUMENTS
        question = f"Question: Where does {people[target]} live?\nAnswer: {people[target]} lives in"
        cases.append(Case(tuple(documents), question, tuple(f" {city}" for city in cities), target))
    return cases


def news(n: int, seed: int) -> list[Case]:
    """Return beginnings of AG News stories, one of which is quoted up to a word: the answer is the next word."""
    rng = random.Random(seed)
    stories = [example.fields[0][1].split() for example in icl.load_task("agnews").queries(20 * n)]
    stories = [story[:24] for story in stories if len(story) >= 24 and story[QUOTED.stop].isalpha()]
    cases = []
    for number in range(n):
        chosen = rng.sample(stories, N_DOCUMENTS)
        while len({story[QUOTED.stop] for story in chosen}) < N_DOCUMENTS:  # else several would answer alike
            chosen = rng.sample(stories, N_DOCUMENTS)
        target = number % N_DOCUMENTS
        question = f"Question: Quote the news.\nAnswer: {' '.join(chosen[target][QUOTED])}"
        answers = tuple(f" {story[QUOTED.stop]}" for story in chosen)
        cases.append(Case(tuple(" ".join(story) for story in chosen), question, answers, target))
    return cases


TASKS: dict[str, tuple[str, Callable[[int, int], list[Case]]]] = {
    "facts": ("made-up facts", facts),
    "news": ("quotes of AG News", news),
}
"""The kinds of prompts: a title, and what makes a number of them by a seed."""


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--model",
        type=model_name,
        default="smollm2-135m",
        help="packaged model, hub id, folder or .gguf file (%(default)s)",
    )
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK", help="of facts, news (both)")
    add("--prompts", type=at_least(5), default=100, help="prompts a task (%(default)s)")
    add("--seed", type=count, default=1, help="draw of the prompts (%(default)s)")
    add("--device", type=device, default="cpu", help="(%(default)s)")
    add("--out", type=output_folder, default="figures/sources", help="folder for all output (%(default)s)")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def prompt_of(case: Case, model: icl.Model) -> icl.SourcedPrompt:
    """Return the prompt of a case; what is around the documents' texts is their own."""
    documents = [(name, f"Document: {text}\n") for name, text in zip(DOCUMENTS, case.documents, strict=True)]
    return icl.prompt_from_parts([*documents, ("question", case.question)], model)


def first_token(model: icl.Model, case: Case, answer: str) -> int:
    """Return the first token of an answer after the question."""
    question, answered = ([*text.tokens] for text in model.tokenise([case.question, case.question + answer]))
    return answered[len(question)]


def log_probs(model: icl.Model, prompts: Sequence[icl.SourcedPrompt], token: int) -> Tensor:
    """Return the log-probability of a token after each of some prompts, in nats."""
    tokens = pad_right([prompt.tokens for prompt in prompts], device=model.device)
    last = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=model.device)
    with torch.no_grad():
        return model.run(tokens, read=last)[:, 0].double().log_softmax(-1)[:, token].cpu()


def run(model: icl.Model, cases: Sequence[Case]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run some prompts: attention by source, and every document removed in turn."""
    prompts = [prompt_of(case, model) for case in cases]
    tokens = [
        [first_token(model, case, case.answers[(case.target + shift) % N_DOCUMENTS]) for shift in range(N_DOCUMENTS)]
        for case in cases
    ]
    captured = icl.capture_sources(model, prompts, logits=tokens, terms=False, progress=False)
    assert captured.logit_effect is not None
    effect = captured.logit_effect[:, 0].sum(2)
    ablated = torch.stack(
        [
            log_probs(model, [prompt, *map(prompt.without, DOCUMENTS)], answer)
            for prompt, (answer, *_) in zip(prompts, tokens, strict=True)
        ]
    )
    tensors = {
        "mass": captured.mass[:, 0].mean(2),
        "norm": captured.norm[:, 0].mean(2),
        "share": captured.share[:, 0].sum(2),
        "effect": effect[..., 0],
        "contrast": effect[..., 0] - effect[..., 1:].mean(-1),
        "log_prob": ablated[:, 0],
        "log_prob_without": ablated[:, 1:],
        "target": torch.tensor([case.target for case in cases]),
    }
    about = {
        "names": list(captured.names),
        "residual": captured.residual,
        "model": model.provenance,
        "dtype": model.precision,
        "versions": {name: version(name) for name in ("icl-dual", "torch", "transformers", "transformer-lens")},
        "view": asdict(view_of(model, prompts[0], tokens[0][0], captured)),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, about


def view_of(model: icl.Model, prompt: icl.SourcedPrompt, token: int, captured: icl.SourceAttention) -> TokenView:
    """Return a prompt token by token, at the layer and head with the largest effect of the documents on the answer."""
    assert captured.logit_effect is not None
    documents = [captured.source_index(name) for name in DOCUMENTS]
    effects = captured.logit_effect[0, 0, ..., documents, 0].sum(-1)
    layer, head = divmod(int(effects.argmax()), effects.shape[1])
    by_token = icl.capture_sources(model, prompt.by_token(), layers=[layer], logits=[token], progress=False)
    return by_token.show(layer, head, quantity="logit_effect")


@dataclass
class Result:
    """All prompts of a task: tensors by name, and where they came from."""

    task: str
    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def drops(self) -> Tensor:
        """Return by how much the answer's log-probability falls without each document, in nats."""
        return self.tensors["log_prob"][:, None] - self.tensors["log_prob_without"]

    def scores(self, name: str) -> Tensor:
        """Return the scores that rank the documents: a quantity of theirs, over layers."""
        documents = [self.about["names"].index(document) for document in DOCUMENTS]
        by_layer = self.tensors[name][..., documents].double()
        return by_layer.sum(1) if name in ("effect", "contrast") else by_layer.mean(1)


def results(args: argparse.Namespace) -> Iterator[Result]:
    """Run the cells that are not finished, and yield each task's prompts together."""
    model: icl.Model | None = None
    n_cells = math.ceil(args.prompts / PROMPTS_IN_CELL)
    tasks = list(dict.fromkeys(args.tasks))
    with tqdm(total=n_cells * len(tasks), unit="cell") as bar:
        for task in tasks:
            cases = TASKS[task][1](n_cells * PROMPTS_IN_CELL, args.seed)
            cells = []
            for index in range(n_cells):
                folder = args.out / "cells" / f"{task}-seed{args.seed}-{index:03}"
                first = index * PROMPTS_IN_CELL
                chosen = cases[first : first + PROMPTS_IN_CELL]
                settings = {"model": short(args.model), "task": task, "seed": args.seed, "cases": [*map(str, chosen)]}
                if not folder.exists():
                    model = model or icl.load_model(args.model, device=args.device)
                    tensors, about = run(model, chosen)
                    save_tensors(folder, tensors, {"settings": settings, "about": about})
                tensors, metadata = load_tensors(folder)
                check_same_settings(folder, settings, metadata["settings"])
                cells.append((tensors, metadata["about"]))
                bar.update()
            about = cells[0][1] | {"residual": max(about["residual"] for _, about in cells)}
            joined = {name: torch.cat([tensors[name] for tensors, _ in cells])[: args.prompts] for name in cells[0][0]}
            yield Result(task, joined, about)


def agreement(result: Result, name: str) -> dict[str, Tensor]:
    """Return, by prompt, how a score ranks the documents in comparison with ablation."""
    scores, drops = result.scores(name), result.drops
    return {
        "same document first": (scores.argmax(-1) == drops.argmax(-1)).double(),
        "same order": (scores.argsort(-1) == drops.argsort(-1)).all(-1).double(),
        "Kendall's τ": ranks.kendall(scores, drops),
        "Spearman's ρ": ranks.spearman(scores, drops, torch.ones_like(drops, dtype=torch.bool)),
        "answering document first": (scores.argmax(-1) == result.tensors["target"]).double(),
    }


def estimate(name: str, values: Tensor) -> Interval:
    """Return the mean over prompts with its interval: Wilson's for a share of prompts, else a bootstrap."""
    table = values.numpy()[None]
    return bootstrap(table) if name in ("Kendall's τ", "Spearman's ρ") else proportion(table)


def comparisons(cells: Sequence[Result]) -> pd.DataFrame:
    """Return a row for each task, score and measure: estimate, interval, and the difference from attention mass."""
    rows = []
    for result in cells:
        of_mass = agreement(result, "mass")
        for score in SCORES:
            for measure, values in agreement(result, score).items():
                interval = estimate(measure, values)
                row = {"task": result.task, "score": score, "measure": measure, "n": interval.n_queries}
                row |= {"value": interval.value, "low": interval.low, "high": interval.high}
                if score != "mass":
                    paired = paired_test(values.numpy()[None], of_mass[measure].numpy()[None])
                    difference = paired.difference
                    row |= {"difference from mass": difference.value, "difference low": difference.low}
                    row |= {"difference high": difference.high, "p": paired.p}
                rows.append(row)
    return pd.DataFrame(rows)


def by_prompt(cells: Sequence[Result]) -> pd.DataFrame:
    """Return a row for each prompt and document: every score, and what ablation says."""
    rows = []
    for result in cells:
        scores = {name: result.scores(name) for name in SCORES}
        for prompt, drops in enumerate(result.drops):
            for document in range(N_DOCUMENTS):
                row = {"task": result.task, "prompt": prompt, "document": document + 1}
                row |= {"answers": int(result.tensors["target"][prompt]) == document}
                row |= {"log_prob": result.tensors["log_prob"][prompt].item(), "drop": drops[document].item()}
                rows.append(row | {name: values[prompt, document].item() for name, values in scores.items()})
    return pd.DataFrame(rows)


def draw(cells: Sequence[Result], args: argparse.Namespace) -> None:
    """Draw quantities by layer, agreement with ablation, and one prompt token by token."""
    about = f"{model_title(args.model)}, {len(cells[0].drops)} prompts a task, seed {args.seed}"
    fig, rows = panels(len(cells), 3, height=1.35)
    labels = {
        "mass": "share of\nthe softmax",
        "share": "share of the\nattention output",
        "effect": "direct effect on\nthe answer's logit",
    }
    for axes, (name, label) in zip(rows, labels.items(), strict=True):
        for ax, result in zip(axes, cells, strict=True):
            values, target = result.tensors[name], result.tensors["target"]
            names, prompts = result.about["names"], torch.arange(len(target))
            others = [(target + shift) % N_DOCUMENTS + names.index(DOCUMENTS[0]) for shift in (1, 2)]
            series = {
                "answering document": values[prompts, :, target + names.index(DOCUMENTS[0])],
                "mean of the others": sum(values[prompts, :, other] for other in others) / len(others),
                "question": values[..., names.index("question")],
            }
            series |= {name: values[..., names.index(name)] for name in ("start token",) if name in names}
            icl.plots.by_layer(series, ylabel=label, over="prompts", ax=ax)
            label_outer(ax)
            if name == "mass":
                ax.set_title(TASKS[result.task][0])
    heading = "Attention by source at the position that predicts the answer, by layer"
    finish(fig, rows[0], f"{heading}\n{about}", args.out / "layers")

    measures = ["same document first", "Kendall's τ"]
    fig, (axes,) = panels(len(measures), height=2.0, sharex=False)
    for ax, measure in zip(axes, measures, strict=True):
        estimates = {
            SCORE_TITLES.get(score, score): {
                TASKS[result.task][0]: estimate(measure, agreement(result, score)[measure]) for result in cells
            }
            for score in SCORES
        }
        icl.plots.dots(estimates, ax=ax)
        chance = 1 / N_DOCUMENTS if measure == measures[0] else 0
        ax.axvline(chance, color="0.3", linestyle=":", linewidth=1, label="at random")
        ax.set_xlabel({"same document first": "share of prompts", "Kendall's τ": "Kendall's τ"}[measure])
        ax.set_title(measure)
        label_outer(ax, keep_x=True)
    heading = f"Agreement of scores with ablation on the order of {N_DOCUMENTS} documents"
    finish(fig, axes, f"{heading}\n{about}", args.out / "agreement")

    for result in cells:
        view: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in result.about["view"].items()
        }
        ax = icl.plots.source_tokens(TokenView(**view))
        heading = f"{TASKS[result.task][0]}: {view['title']} (blue: above 0; red and underlined: below)"
        heading = f"{textwrap.fill(heading, 110)}\n{model_title(args.model)}"
        ax.set_title(icl.plots.literal(heading), fontsize=8, fontweight="normal")
        figure = ax.get_figure(root=True)
        assert figure is not None
        write_figure(figure, args.out / f"prompt_{result.task}", "png", "pdf")


def verdict(table: pd.DataFrame, task: str) -> str:
    """Return whether contributions rank documents as ablation does more often than attention mass, from a table."""
    of_task = table[(table["task"] == task) & (table["measure"] == "same document first") & (table["score"] != "mass")]
    sentences = []
    rows: Any = of_task
    for row in rows.to_dict("records"):
        difference = f"{100 * row['difference from mass']:+.0f} points [{100 * row['difference low']:+.0f}, "
        difference += f"{100 * row['difference high']:+.0f}]"
        if row["difference low"] > 0:
            direction = "more often than attention mass"
        elif row["difference high"] < 0:
            direction = "less often than attention mass"
        else:
            direction = "no more and no less often than attention mass, within the interval"
        sentences.append(f"`{row['score']}` puts the document first that ablation does {direction} ({difference})")
    return "; ".join(sentences) + "."


def write_page(cells: Sequence[Result], table: pd.DataFrame, args: argparse.Namespace) -> None:
    """Write the page of the folder."""
    about = cells[0].about
    command = command_line(__file__, make_parser(), args, always=("model", "tasks", "prompts", "seed", "out"))
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    title = f"{markdown_text(model_title(args.model))} ({markdown_code(short(args.model))}, {about['model']}"
    measures = list(dict.fromkeys(table["measure"]))
    shown = pd.DataFrame(
        {"prompts": TASKS[result.task][0], "score": score}
        | {measure: estimate(measure, agreement(result, score)[measure]).format(2) for measure in measures}
        for result in cells
        for score in SCORES
    )
    truth = pd.DataFrame(
        {
            "prompts": TASKS[result.task][0],
            "n": len(result.drops),
            "mean log-probability of the answer": f"{result.tensors['log_prob'].mean():.2f}",
            "mean fall without the answering document": f"{mean_drop(result, answering=True):.2f}",
            "mean fall without another": f"{mean_drop(result, answering=False):.2f}",
            "answering document falls most": proportion(
                (result.drops.argmax(-1) == result.tensors["target"]).double().numpy()[None]
            ).format(2),
            "residual": f"{result.about['residual']:.1e}",
        }
        for result in cells
    )
    explained = "\n".join(f"- `{name}`: {text}" for name, text in SCORES.items())
    verdicts = "\n\n".join(f"**{TASKS[result.task][0]}**: {verdict(table, result.task)}" for result in cells)
    pictures = "\n\n".join(f"![{TASKS[r.task][0]}, token by token](prompt_{r.task}.png)" for r in cells)
    page = f"""# Which document an answer comes from

    {command}

{title}, computed in {about["dtype"]}). {versions}.

Every prompt has {N_DOCUMENTS} documents and a question that one of them answers. Each score ranks the documents at the
position that predicts the answer; ablation ranks them by how much the answer's log-probability falls where the document
is removed. Brackets are 95 % intervals over prompts. At random, the same document comes first in a third of the
prompts, the order is the same in a sixth, and τ and ρ are 0.

{verdicts}

{markdown(shown, disable_numparse=True)}

Scores, of a document's source at the last position:

{explained}

![agreement with ablation](agreement.png)

Ablation, in nats, and the largest relative difference of the sum of contributions from the attention output:

{markdown(truth, disable_numparse=True)}

![attention by source along layers](layers.png)

{pictures}

`agreement.csv` has every number of the first table with its difference from attention mass and the p of a paired
permutation test; `documents.csv` has a row for each prompt and document. Direct effects are through norms with their
scale frozen, and leave out everything that later layers make of a contribution.
"""
    write_text(args.out / "README.md", page)


def mean_drop(result: Result, *, answering: bool) -> float:
    """Return the mean fall of the answer's log-probability without the answering document, or without another."""
    is_target = torch.nn.functional.one_hot(result.tensors["target"], N_DOCUMENTS).bool()
    return result.drops[is_target if answering else ~is_target].mean().item()


def write(args: argparse.Namespace) -> None:
    """Run what is not finished, and write tables, figures and the page."""
    cells = list(results(args))
    table = comparisons(cells)
    write_csv(args.out / "agreement.csv", table, float_format="%.6g")
    write_csv(args.out / "documents.csv", by_prompt(cells), float_format="%.6g")
    draw(cells, args)
    write_page(cells, table, args)
    print(f"{verdict(table, cells[0].task)}\n\nAll of it is in {args.out}/")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv, stopped="Finished cells stay in {out}/cells; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
