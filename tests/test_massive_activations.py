"""Massive activations: planted norms come back, by loops over queries, layers and tokens."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import draw, norms_with_a_massive_token, run_settings, seeds
from hypothesis import given
from hypothesis import strategies as st

import icl_dual as icl
from icl_dual.massive_activations import MASSIVE_RATIO, median_norms, norm_ratios, ordinary_tokens
from icl_dual.recordings.recordings import SETTINGS

QUERIES = ((40, 7, 8, 9), (40, 7, 8), (40, 6, 8, 9), (41, 7))
"""Token ids; the first token of three is 40, of one 41."""


def planted() -> dict[str, torch.Tensor]:
    """Norms of 1 and 1.5 at four tokens of four queries in three layers, zero past a query's end; some far larger."""
    norms = {name: torch.ones(4, 3, 4) for name in SETTINGS}
    for of_setting in norms.values():
        of_setting[:, :, 2] = 1.5
        for query, tokens in enumerate(QUERIES):
            of_setting[query, :, len(tokens) :] = 0
    norms["ZSL"][:3, 1:, 0] = 200.0
    norms["ZSL"][1, 2, 0] = 300.0
    norms["FT"][3, 2, 1] = 12.0
    norms["ICL"][0, 0, 3] = 9.0  # high, but not massive
    return norms


@pytest.fixture
def massive() -> icl.MassiveActivations:
    return icl.MassiveActivations(model="toy", queries=QUERIES, norms=planted())


@pytest.fixture(scope="module")
def runs(llama: icl.Model, prompts: icl.Prompts) -> dict[str, Any]:
    return run_settings(llama, prompts)


@given(seed=seeds, n_queries=st.integers(1, 5), n_layers=st.integers(1, 3), n_tokens=st.integers(1, 6))
def test_ratios_and_ordinary_tokens_are_those_of_loops(seed: int, n_queries: int, n_layers: int, n_tokens: int) -> None:
    lengths = torch.from_numpy(np.random.default_rng(seed).integers(1, n_tokens + 1, n_queries))
    past_end = torch.arange(n_tokens) >= lengths[:, None]
    norms = {}
    for at, setting in enumerate(SETTINGS):
        heavy_tailed = draw(seed + at, n_queries, n_layers, n_tokens, scale=3.0).exp()
        norms[setting] = heavy_tailed.masked_fill(past_end[:, None], 0.0)
    is_ordinary = torch.zeros(n_queries, n_tokens, dtype=torch.bool)
    for query in range(n_queries):
        for token in range(int(lengths[query])):
            is_ordinary[query, token] = True
    for of_setting in norms.values():
        ratios = norm_ratios(of_setting, lengths)
        for layer in range(n_layers):
            by_token = [of_setting[q, layer, t].item() for q in range(n_queries) for t in range(int(lengths[q]))]
            median = float(np.median(by_token))
            assert median_norms(of_setting, lengths)[layer].item() == pytest.approx(median)
            for query in range(n_queries):
                for token in range(n_tokens):
                    norm = of_setting[query, layer, token].item()
                    assert ratios[query, layer, token].item() == pytest.approx(norm / median)
                    if norm > MASSIVE_RATIO * median * (1 + 1e-9):
                        is_ordinary[query, token] = False
    assert torch.equal(ordinary_tokens(norms, lengths), is_ordinary)


def test_a_residual_stream_of_zeros_has_no_massive_token() -> None:
    norms, lengths = torch.zeros(2, 1, 3), torch.tensor([3, 2])
    assert (norm_ratios(norms, lengths) == 0).all()
    assert ordinary_tokens({"ZSL": norms}, lengths).sum() == 5


def test_planted_tokens_are_found_by_layer_and_setting(massive: icl.MassiveActivations) -> None:
    frame = massive.to_frame()
    assert frame[["setting", "layer"]].to_numpy().tolist() == [[s, layer] for s in SETTINGS for layer in range(3)]
    by_layer = frame.set_index(["setting", "layer"]).to_dict(orient="index")
    assert by_layer["ZSL", 2] == {
        "share_of_queries": 0.75,
        "n_tokens": 3,
        "largest_norm": 300.0,
        "median_norm": 1.0,
        "ratio": 300.0,
        "position": 0,
        "token": 40,
    }
    assert by_layer["ZSL", 0]["share_of_queries"] == by_layer["ZSL", 0]["n_tokens"] == 0
    assert by_layer["FT", 2] | {"share_of_queries": 0.25, "n_tokens": 1, "position": 1, "token": 7} == by_layer["FT", 2]
    assert (by_layer["ICL", 0]["n_tokens"], by_layer["ICL", 0]["largest_norm"]) == (0, 9.0)
    assert {setting: int(at.sum()) for setting, at in massive.is_massive.items()} == {"ZSL": 6, "ICL": 0, "FT": 1}
    expected = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(massive.ordinary_tokens, expected)


def test_massive_tokens_are_listed_by_position_and_token(massive: icl.MassiveActivations) -> None:
    columns = ["setting", "position", "token", "n_queries", "layers", "largest_norm", "ratio"]
    expected = pd.DataFrame([("ZSL", 0, 40, 3, "1–2", 300.0, 300.0), ("FT", 1, 7, 1, "2", 12.0, 12.0)], columns=columns)
    pd.testing.assert_frame_equal(massive.tokens(), expected)
    none = dataclasses.replace(massive, ratio=1000.0)
    assert none.tokens().columns.tolist() == columns
    assert len(none.tokens()) == 0
    assert none.ordinary_tokens.sum() == sum(map(len, QUERIES))


def test_it_prints_its_story_in_a_line_for_each_setting(massive: icl.MassiveActivations) -> None:
    assert str(massive).splitlines() == [
        "ZSL: position 0 (token 40) in 3 of 4 queries, layers 1–2, norm up to 300 (300 × the median)",
        "ICL: no massive token; the largest norm is 9.0 × the median",
        "FT: position 1 (token 7) in 1 of 4 queries, layers 2, norm up to 12 (12 × the median)",
    ]
    assert repr(massive) == (
        "MassiveActivations('toy', 4 queries, 3 layers, norms above 10 × the median in queries: ZSL 3, ICL 0, FT 1)"
    )
    html = massive._repr_html_()
    assert "<td>40</td>" in html
    assert "300.0" in html
    lower = dataclasses.replace(massive, ratio=1.2)
    assert str(lower).splitlines()[0].endswith("; 1 other, each in at most 3")


def test_those_of_captures_are_the_norms_of_the_captures(runs: dict[str, Any], prompts: icl.Prompts) -> None:
    captures = {name: run for name, run in runs.items() if name != "delta"}
    massive = icl.find_massive_activations(**captures, ratio=1.2)
    assert massive.ratio == 1.2
    assert massive.queries == prompts.suffixes
    for setting, name in zip(SETTINGS, ("zero_shot", "in_context", "finetuned"), strict=True):
        assert torch.equal(massive.norms[setting], captures[name].residual_norms)
    assert len(massive.tokens())


def test_those_of_an_experiment_are_the_ones_that_its_metrics_leave_out(llama: icl.Model, prompts: icl.Prompts) -> None:
    experiment = icl.run_experiment(llama, prompts, lr=0.05, progress=False)
    massive, recordings = experiment.massive_activations(), experiment.recordings()
    assert torch.equal(massive.ordinary_tokens, recordings.ordinary_tokens)
    captures = {name: getattr(experiment, name) for name in ("zero_shot", "in_context", "finetuned")}
    assert str(massive) == str(icl.find_massive_activations(**captures))


def test_it_saves_and_loads(massive: icl.MassiveActivations, tmp_path: Path) -> None:
    massive.save(tmp_path / "massive")
    loaded = icl.MassiveActivations.load(tmp_path / "massive")
    assert loaded.queries == QUERIES
    assert str(loaded) == str(massive)
    pd.testing.assert_frame_equal(loaded.to_frame(), massive.to_frame())


@pytest.mark.parametrize("ratio", [1, 0.5, -10.0, float("nan")])
def test_a_ratio_that_ordinary_tokens_exceed_is_refused(runs: dict[str, Any], ratio: float) -> None:
    captures = {name: run for name, run in runs.items() if name != "delta"}
    with pytest.raises(ValueError, match=r"expected ratio above 1, got .*: pass how many times the median is massive"):
        icl.find_massive_activations(**captures, ratio=ratio)


def test_captures_without_norms_or_of_other_queries_are_refused(runs: dict[str, Any]) -> None:
    captures = {name: run for name, run in runs.items() if name != "delta"}
    lacking = dataclasses.replace(captures["in_context"], residual_norms=None)
    with pytest.raises(ValueError, match=r"expected in_context captured with .* without 'residual_norms': capture aga"):
        icl.find_massive_activations(**captures | {"in_context": lacking})
    with pytest.raises(ValueError, match="of the same queries"):
        icl.find_massive_activations(**captures | {"zero_shot": captures["in_context"]})


def test_an_experiment_without_norms_says_which_field_it_lacks(llama: icl.Model, prompts: icl.Prompts) -> None:
    experiment = icl.run_experiment(llama, prompts, lr=0.05, fields=("attn_out",), progress=False)
    with pytest.raises(ValueError, match=r"for massive_activations\(\), got zero_shot without \['residual_norms'\]"):
        experiment.massive_activations()


def test_the_token_of_the_tests_recordings_is_massive_out_of_context_only() -> None:
    norms = {name: norms_with_a_massive_token(6, 2, 5, name) for name in SETTINGS}
    massive = icl.MassiveActivations(model="noise", queries=((1, 2, 3, 4, 5),) * 6, norms=norms)
    assert massive.tokens()[["setting", "position", "n_queries"]].to_numpy().tolist() == [["ZSL", 0, 3], ["FT", 0, 3]]


def test_all_layers_together_have_the_largest_norm_and_ratio(massive: icl.MassiveActivations) -> None:
    overall, frame = massive.overall(), massive.to_frame()
    for setting, numbers in overall.items():
        of_setting = frame[frame["setting"] == setting]
        assert numbers["largest_norm"] == pytest.approx(of_setting["largest_norm"].max())
        assert numbers["largest_ratio"] == pytest.approx(massive.ratios[setting].max().item())
        with_one = {int(query) for query, _, _ in massive.is_massive[setting].nonzero().tolist()}
        assert numbers["share_of_queries"] == len(with_one) / len(massive.queries)
    assert overall["ICL"]["share_of_queries"] == 0 < overall["ZSL"]["share_of_queries"]
