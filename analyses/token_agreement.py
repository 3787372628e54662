"""Whether a query alone generates the tokens of the prompted model, with an exact patch for each token.

Goldwaser et al. (2025) report 20 greedily generated tokens of which 100 % agree in float32; in bfloat16, 87.5 % by a
naive inversion and 98 to 100 % by a stable one. Others found 100 % by both. This script generates tokens in context,
and from the query alone with a patch that is computed and kept in several forms, in both precisions. Prompts that are
done are not run again: a stopped run goes on where it was, and drawing alone needs no model.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats

import icl_dual as icl
from icl_dual.patches.generation import Form, Generation, generate_patched
from icl_dual.progress import progress_bar
from icl_dual.scripts.common import (
    TITLES,
    at_least,
    command_line,
    count,
    device,
    finish,
    model_name,
    model_title,
    output_folder,
    positive,
    run_script,
    script_parser,
    short,
)
from icl_dual.scripts.outputs import markdown, markdown_code, markdown_text, write_csv, write_text
from icl_dual.statistics import Interval, bootstrap, proportion
from icl_dual.storage import check_same_settings, load_tensors

FORMS: dict[str, tuple[Form, ...]] = {
    "float32": ("naive", "stable", "unpatched"),
    "bfloat16": ("naive", "stable", "beside", "cached"),
}
"""The forms that are run, by precision."""
RESAMPLES = 2000
"""The number of bootstrap resamples."""

TITLES_BY_FORM = {
    "naive": "naive",
    "stable": "stable",
    "beside": "beside the weights",
    "cached": "no patch: prompted, cached",
    "unpatched": "no patch: query alone",
}

MEANINGS = {"naive": "computed in the model's precision", "stable": "computed in float32", "beside": "kept in float32"}
"""What the legend says of forms whose names do not."""


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--models",
        type=model_name,
        nargs="+",
        default=["smollm2-135m", "gemma3-270m"],
        help="packaged models, hub ids, folders or .gguf files (%(default)s)",
    )
    add("--task", default="sst2", choices=icl.TASKS, help="the task of the prompts (%(default)s)")
    add("--k", type=positive, default=4, help="demonstrations (%(default)s)")
    add(
        "--seed",
        type=count,
        default=1,
        help="draw of the first prompt's demonstrations (%(default)s)",
    )
    add("--prompts", type=at_least(5), default=50, help="number of prompts (%(default)s)")
    add("--tokens", type=positive, default=20, help="number of generated tokens (%(default)s)")
    add("--device", type=device, default="cpu", help="(%(default)s)")
    add("--out", type=output_folder, default="figures/token_agreement", help="folder for all output (%(default)s)")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


@cache
def load(name: str, precision: str, device: str) -> icl.Model:
    return icl.load_model(name, device=device, dtype=getattr(torch, precision))


def results(args: argparse.Namespace) -> dict[tuple[str, str], list[Generation]]:
    """Return the generations of each model and precision, read where they are complete and run where they are not.

    Models take turns, so that a stopped run has prompts of all of them.
    """
    settings = [(model, precision) for model in dict.fromkeys(args.models) for precision in FORMS]
    generations: dict[tuple[str, str], list[Generation]] = {setting: [] for setting in settings}
    with progress_bar(total=len(settings) * args.prompts, unit="prompt") as bar:
        for index in range(args.prompts):
            for model, precision in settings:
                generations[model, precision].append(generation(args, model, precision, index))
                bar.update()
    load.cache_clear()
    return generations


def generation(args: argparse.Namespace, name: str, precision: str, index: int) -> Generation:
    """Return one prompt's generation, run or read."""
    folder = args.out / "cells" / short(name).replace("/", "--") / precision / f"{index:03d}"
    about: dict[str, Any] = {
        "settings": {
            "task": args.task,
            "k": args.k,
            "seed": args.seed + index,
            "tokens": args.tokens,
            "forms": list(FORMS[precision]),
        }
    }
    if folder.exists():
        check_same_settings(folder, about, load_tensors(folder)[1])
        return Generation.load(folder)
    model, task = load(name, precision, args.device), icl.load_task(args.task)
    demonstrations, query = task.demonstrations(args.k, args.seed + index), task.queries(args.prompts)[index]
    prompts = icl.build_prompts(model, task, demonstrations, [query])
    result = generate_patched(model, prompts, n_tokens=args.tokens, forms=FORMS[precision])
    names = ("icl-dual", "torch", "transformers", "transformer-lens")
    origin = {"model": model.provenance, "versions": {package: version(package) for package in names}}
    result.save(folder, about | {"origin": origin})
    return result


def rows(generations: dict[tuple[str, str], list[Generation]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each model, precision, form and prompt."""
    for (model, precision), by_prompt in generations.items():
        for index, result in enumerate(by_prompt):
            for form, tokens in result.generated.items():
                same = [a == b for a, b in zip(tokens, result.prompted, strict=True)]
                first = same.index(False) if False in same else None
                yield {
                    "model": short(model),
                    "precision": precision,
                    "form": form,
                    "prompt": index,
                    "prompt tokens": len(result.prompt),
                    "tokens": len(same),
                    "agreeing": sum(same),
                    "first other token": first,
                    "margin there": None if first is None else result.margins[first].item(),
                    "largest logit error there": None if first is None else result.largest[form][first].item(),
                    "median relative error": result.errors[form].nanmedian().item(),
                    "largest relative error": _largest(result.errors[form]),
                    "largest logit error": _largest(result.largest[form]),
                }


def _largest(values: torch.Tensor) -> float:
    """Return the largest number that is not NaN."""
    return values[~values.isnan()].max().item()


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each model, precision and form, with 95 % intervals over prompts."""
    summaries = []
    for key, group in frame.groupby(["model", "precision", "form"], sort=False):
        model, precision, form = map(str, key)  # pyright: ignore[reportArgumentType]
        shares = (group["agreeing"] / group["tokens"]).to_numpy()[None]
        is_whole = shares == 1
        # Where all agree, or none does, a bootstrap has no width.
        share = proportion(shares) if shares.min() == shares.max() else bootstrap(shares)
        others = group[group["first other token"].notna()]
        n_same = group["first other token"].fillna(group["tokens"]).to_numpy(dtype=float)
        n_counted = n_same + group["first other token"].notna().to_numpy()
        within = (others["margin there"] <= 2 * others["largest logit error there"]).sum()
        summaries.append(
            {
                "model": model_title(model),
                "precision": precision,
                "form": TITLES_BY_FORM[form],
                "tokens that agree, %": share.format(1, scale=100.0),
                "next token agrees, %": ratio(n_same, n_counted).format(1, scale=100.0),
                "prompts with all tokens, %": proportion(is_whole.astype(float)).format(1, scale=100.0),
                "logit error, median": f"{group['median relative error'].median():.1e}",
                "largest": f"{group['largest relative error'].max():.1e}",
                "largest, absolute": f"{group['largest logit error'].max():.2g}",
                "within rounding": f"{within} of {len(others)}" if len(others) and form != "unpatched" else "",
            }
        )
    return pd.DataFrame(summaries)


def ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> Interval:
    """Return Σ part / Σ whole over prompts, with a bootstrap over prompts: the tokens of a prompt depend on each other.

    Where all prompts have the same share, a bootstrap has no width, and the interval is Wilson's over prompts.
    """
    shares = part / whole
    if shares.min() == shares.max():
        return proportion(shares[None])
    low, high = stats.bootstrap(
        (part, whole),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(part.sum() / whole.sum()), float(low), float(high), n_queries=len(part))


def ties(generations: dict[tuple[str, str], list[Generation]]) -> str:
    """Return in words how often the prompted model's choice is a tie."""
    parts = []
    for (model, precision), by_prompt in generations.items():
        margins = torch.cat([result.margins for result in by_prompt])
        share = (margins == 0).double().mean().item()
        parts.append(f"{100 * share:.1f} % of {markdown_code(short(model))}'s in {precision}")
    return ", ".join(parts)


def draw(generations: dict[tuple[str, str], list[Generation]], title: str, path: Path) -> None:
    """Draw agreement and logit error along the generated tokens, a column for each model and precision."""
    columns = len(generations)
    size = icl.plots.PAGE_WIDTH if columns > 1 else icl.plots.COLUMN_WIDTH, 5.0
    fig, axes = plt.subplots(2, columns, figsize=size, squeeze=False, sharex=True, sharey="row")
    for column, ((model, precision), by_prompt) in enumerate(generations.items()):
        above, below = axes[0, column], axes[1, column]
        above.set_title(f"{icl.plots.literal(checkpoint(model))}\n{precision}", fontsize=7.5)
        for form in by_prompt[0].generated:
            index = list(TITLES_BY_FORM).index(form)
            meaning = f": {MEANINGS[form]}" if form in MEANINGS else ""
            style = {**icl.plots.series_style(index), "label": TITLES_BY_FORM[form] + meaning}
            same = np.array([np.equal(result.generated[form], result.prompted) for result in by_prompt])
            steps = np.arange(1, same.shape[1] + 1)
            every = (index % 4, 4)
            above.plot(steps, same.mean(0), markevery=every, **style)
            error = 1.96 * same.std(0) / np.sqrt(len(same))
            above.fill_between(
                steps, same.mean(0) - error, same.mean(0) + error, color=style["color"], alpha=0.12, lw=0
            )
            errors = torch.stack([result.errors[form] for result in by_prompt])
            low, median, high = errors.double().nanquantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64), dim=0)
            below.plot(steps, median, markevery=every, **style)
            below.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        above.set_ylim(-0.03, 1.03)
        below.set(yscale="log", xlabel="generated token")
    icl.plots.explain_band(axes[0, 0], "above: ±1.96 standard errors over prompts")
    icl.plots.explain_band(axes[0, 0], "below: 5 to 95 % of prompts")
    axes[0, 0].set_ylabel("share of prompts with\nthe prompted token")
    axes[1, 0].set_ylabel("relative logit error\n(median of prompts)")
    finish(fig, list(axes.flat), title, path)


def checkpoint(model: str) -> str:
    """Return a model's checkpoint without its format and owner, for the titles of narrow panels."""
    return model_title(model).partition(" (")[0].rpartition("/")[2]


def describe(args: argparse.Namespace) -> str:
    return f"{TITLES[args.task]}, {args.k} demonstrations, {args.prompts} prompts, {args.tokens} tokens"


def write(args: argparse.Namespace) -> None:
    """Generate what is missing, and write the table, the figure and the page."""
    generations = results(args)
    frame = pd.DataFrame(rows(generations))
    write_csv(args.out / "token_agreement.csv", frame, float_format="%.4g")
    heading = "Tokens generated without demonstrations, by an exact patch for each"
    title = "\n".join([heading, *map(model_title, args.models), describe(args)])
    draw(generations, title, args.out / "token_agreement")
    summary = markdown(table(frame), disable_numparse=True)
    first = args.out / "cells" / short(args.models[0]).replace("/", "--") / "float32" / "000"
    versions = ", ".join(f"{name} {number}" for name, number in load_tensors(first)[1]["origin"]["versions"].items())
    command = command_line(__file__, make_parser(), args, always=("models", "task", "k", "prompts", "tokens"))
    page = f"""# Token agreement

    {command}

{markdown_text(describe(args))}. Each prompt has demonstrations and a query of its own. {versions}.

![share of prompts with the prompted model's token, and logit error, along the generated tokens](token_agreement.png)

The prompted model generates {args.tokens} tokens greedily. Then each form generates as many from the query alone, by an
exact patch for each token. It goes on from its own tokens: after a first other token, later ones may differ, too.

{summary}

| form | the change of weights is computed in | and kept |
|---|---|---|
| naive | the model's precision, every intermediate result rounded to it | in the weights, rounded to their precision |
| stable | float32 | in the weights, rounded to their precision |
| beside the weights | float32 | beside the weights, in float32 |
| no patch: prompted, cached | – the prompted model, with the keys and values of its demonstrations computed once | |
| no patch: query alone | – the zero-shot prompt | |

The cached form is the same function as the prompted model, rounded in another order. What it does not agree with is
lost to rounding, not to a patch.

*Next token agrees* counts the tokens up to and including the first other one: a token that differs makes all later ones
another text, which says nothing more about the patch.

Logit errors are ‖logits − in-context logits‖ / ‖in-context logits‖ after the same generated tokens: the median over
tokens and prompts, and the largest; then the largest absolute error of a single logit. *Within rounding* counts the
prompts with another token at which the prompted model's two best logits are closer to each other than twice the largest
error of a logit there. Of the prompted model's tokens, these two are equal at {ties(generations)}.

Brackets are 95 % intervals: of tokens and of next tokens that agree, a bootstrap over prompts, or Wilson's over prompts
where all have the same share; of prompts, Wilson's.

That the tokens agree in float32 is so by construction, for any weights. It is no evidence that in-context learning
descends a gradient.
"""
    write_text(args.out / "README.md", page)
    print(f"{summary}\n\nAll of it is in {args.out}/")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(parse, write, argv, stopped="Finished prompts stay in {out}/cells; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
