"""What the tests of scripts share: a tiny model that scripts load from its folder, and where the scripts are."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import readable
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tiny_model(
    make_hf_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The folder of a tiny random Llama that reads texts of real tasks: its tokens are bytes, so they are long."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    hf_model = make_hf_model("llama")
    hf_model.config.max_position_embeddings = 8192
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def figures_fit_for_a_paper() -> Iterator[None]:
    """Every figure that a script writes under test is one that a paper can print."""
    save = Figure.savefig

    def checked(fig: Figure, *arguments: Any, **options: Any) -> None:
        save(fig, *arguments, **options)
        if options.get("format") == "png":
            assert readable.problems(fig) == [], fig.get_suptitle()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", checked)
        yield
