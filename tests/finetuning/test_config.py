"""Settings of finetuning: what contradicts, what is unknown, and how they are named."""

from dataclasses import fields, replace
from typing import Any

import pytest

import icl_dual as icl
from icl_dual.finetuning import PAPER_FINETUNING
from icl_dual.prompts import Prompts

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"optimiser": "lion"}, "expected optimiser as one of 'sgd', 'adam', 'adamw', got 'lion'"),
    ({"schedule": "step"}, "expected schedule as one of 'constant', 'linear', 'cosine', got 'step'"),
    ({"epochs": 0}, "expected epochs as a whole number of at least 1, got 0"),
    ({"batch_size": 0}, "expected batch_size as a whole number of at least 1, got 0"),
    ({"momentum": 1.0}, "expected momentum as a number of at least 0 and below 1, got 1.0"),
    ({"momentum": -0.1}, "expected momentum as a number of at least 0 and below 1, got -0.1"),
    ({"warmup": -1}, "expected warmup as a whole number of at least 0, got -1"),
    ({"momentum": 0.9, "optimiser": "adam"}, "expected no momentum with optimiser='adam', .* got momentum=0.9"),
    ({"batch_size": 2, "method": "full-batch"}, "expected no batch_size with method='full-batch', .* batch_size=2"),
    (
        {"lora": icl.Lora(targets=("q", "v"))},
        r"expected targets of lora out of \('k', 'v'\), the projections of trained='key-value', got 'q'",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_that_are_unknown_or_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        icl.FinetuneConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("w",)}, r"expected targets\[0\] as one of 'q', 'k', 'v', 'o', got 'w'"),
        ({"targets": ("k_proj",)}, r"expected targets\[0\] as one of 'q', 'k', 'v', 'o', got 'k_proj'"),
        ({"targets": ()}, r"expected targets with each projection once, got \(\)"),
        ({"targets": ("k", "k")}, r"expected targets with each projection once, got \('k', 'k'\)"),
        ({"rank": 0}, "expected rank as a whole number of at least 1, got 0"),
        ({"alpha": 0.0}, "expected alpha as a number above 0 and finite, got 0.0"),
    ],
)
def test_adapters_of_other_targets_or_no_rank_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        icl.Lora(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5}, r"expected batch_size of at most the number of demonstrations \(4\), got 5"),
        ({"warmup": 4}, r"expected warmup below the number of steps \(4\), got 4"),
        ({"warmup": 4, "batch_size": 3, "epochs": 2}, r"expected warmup below the number of steps \(4\), got 4"),
        ({"warmup": 1, "method": "full-batch"}, r"expected warmup below the number of steps \(1\), got 1"),
    ],
)
def test_more_than_there_are_demonstrations_is_refused(
    llama: icl.Model, prompts: Prompts, settings: dict[str, Any], message: str
) -> None:
    config = icl.FinetuneConfig(**settings)
    with pytest.raises(ValueError, match=message):
        icl.finetune(llama, prompts, lr=0.01, config=config, progress=False)
    with pytest.raises(ValueError, match=message):
        icl.finetune_many(llama, [prompts], [0.01], config=config, progress=False)


@pytest.mark.parametrize(
    "settings", [{"optimiser": "adam"}, {"momentum": 0.5}, {"epochs": 2}, {"lora": icl.Lora()}], ids=str
)
def test_only_one_epoch_of_plain_sgd_has_factors(llama: icl.Model, prompts: Prompts, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"expected one epoch of plain SGD .* got {next(iter(settings))}="):
        icl.finetune(llama, prompts, lr=0.01, config=icl.FinetuneConfig(**settings), factors=True, progress=False)


def test_every_setting_has_a_name_of_its_own() -> None:
    """Cells with different settings have different folders."""
    others: dict[str, Any] = {
        "loss": "label",
        "method": "layer-causal",
        "trained": "attention",
        "optimiser": "adamw",
        "momentum": 0.9,
        "epochs": 2,
        "batch_size": 3,
        "schedule": "linear",
        "warmup": 1,
        "lora": icl.Lora(),
    }
    assert others.keys() == {field.name for field in fields(icl.FinetuneConfig)}
    words = [replace(PAPER_FINETUNING, **{name: value}).variation for name, value in others.items()]
    assert [list(variation) for variation in words] == [[name] for name in others]
    loras = [icl.Lora(), icl.Lora(rank=4), icl.Lora(alpha=16), icl.Lora(targets=("k",)), icl.Lora(seed=1)]
    words += [icl.FinetuneConfig(lora=lora).variation for lora in loras[1:]]
    assert len({word for variation in words for word in variation.values()}) == len(others) + len(loras) - 1
    assert PAPER_FINETUNING.variation == {}


def test_cells_have_these_settings_and_their_json() -> None:
    config = icl.FinetuneConfig(optimiser="adam", epochs=3, lora=icl.Lora(rank=2, targets=("k", "v")))
    cell = icl.Cell("tiny", "toy", k=4, seed=1, lr=0.01, finetuning=config)
    assert cell.name == "tiny_toy_k4_seed1_lr0.01_answer_adam_3-epochs_LoRA-of-k-v-rank-2-alpha-8"
    settings = vars(cell) | {"finetuning": vars(config) | {"lora": vars(config.lora) | {"targets": ["k", "v"]}}}
    assert icl.Cell.from_settings(settings) == cell
    older = {name: value for name, value in vars(PAPER_FINETUNING).items() if name in ("loss", "method", "trained")}
    assert icl.Cell.from_settings(vars(cell) | {"finetuning": older}).finetuning == PAPER_FINETUNING
    settings["finetuning"]["lora"]["dropout"] = 0.1
    with pytest.raises(icl.StudyError, match="expected the settings of a cell, got 'dropout'"):
        icl.Cell.from_settings(settings)
