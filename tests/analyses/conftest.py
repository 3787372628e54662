"""What the tests of scripts share: a tiny model that scripts load from its folder, and where the scripts are."""

from collections.abc import Callable

import pytest
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
