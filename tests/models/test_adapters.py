"""Adapters of peft: models that have them, and what a saved adapter changes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from finetuning_references import projection_weights, same, snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

import icl_dual as icl
from icl_dual.models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft


def adapted(hf_model: Any, targets: list[str], **settings: Any) -> Any:
    """A model of peft with random adapters."""
    torch.manual_seed(1)
    settings.setdefault("fan_in_fan_out", hf_model.config.model_type == "gpt2")
    model: Any = peft.get_peft_model(hf_model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize(
    ("architecture", "targets", "kinds"),
    [("llama", ["k_proj", "v_proj"], "KV"), ("llama", ["q_proj", "v_proj"], "QV"), ("gpt2", ["c_attn"], "QKV")],
)
def test_a_saved_adapter_is_the_difference_that_pefts_own_merge_makes(
    make_model: Callable[..., icl.Model],
    make_hf_model: Callable,
    tmp_path: Path,
    architecture: str,
    targets: list[str],
    kinds: str,
) -> None:
    model, twin = make_model(architecture, torch.float64), make_hf_model(architecture, torch.float64)
    before, start = snapshot(model), {name: W.clone() for name, W in projection_weights(twin, architecture).items()}
    adapter = adapted(twin, targets)
    adapter.save_pretrained(tmp_path)
    delta = icl.WeightDelta.from_adapter(model, tmp_path)
    merged = projection_weights(adapter.merge_and_unload(), architecture)
    for name, W in merged.items():
        got = getattr(delta, name)
        if name[-1] in kinds:
            assert got.any()
            torch.testing.assert_close(got, W - start[name], rtol=1e-10, atol=1e-14)
        else:
            assert got is None or not got.any()
    assert delta.trained == ("key-value" if kinds == "KV" else "attention")
    assert (delta.lr, delta.config, delta.rounded) == (None, None, False)
    ids = torch.tensor([[3, 5, 9]])
    with torch.no_grad(), delta.applied(model):
        torch.testing.assert_close(model.run(ids), twin(ids).logits, rtol=1e-5, atol=1e-5)
    assert same(model, before)


@pytest.fixture
def folder(make_hf_model: Callable, tmp_path: Path) -> Path:
    adapted(make_hf_model("llama"), ["k_proj", "v_proj"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_settings(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_saved_adapter_is_held_against_icl_and_saved_like_any_delta(
    llama: icl.Model, prompts: icl.Prompts, folder: Path, tmp_path: Path
) -> None:
    delta = icl.WeightDelta.from_adapter(llama, folder)
    fields = icl.METRIC_FIELDS + icl.DECOMPOSE_FIELDS
    experiment = icl.run_experiment(llama, prompts, delta=delta, fields=fields, progress=False)
    assert torch.isfinite(experiment.compare().per_layer["SimAOU"]).all()
    assert torch.isfinite(experiment.updates(progress=False).cosine).all()
    delta.save(tmp_path / "delta")
    assert icl.WeightDelta.load(tmp_path / "delta") == delta


def test_adapters_of_other_weights_are_refused_by_name(
    llama: icl.Model, make_hf_model: Callable, tmp_path: Path
) -> None:
    adapted(make_hf_model("llama"), ["v_proj", "down_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of attention's projections only, .* a change of '.*0.mlp.down_proj.weight'"):
        icl.WeightDelta.from_adapter(llama, tmp_path)


def test_adapters_of_another_model_are_refused(models_by_architecture: Callable, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected an adapter of 'gpt2' \(GPT2LMHeadModel\), got one of another"):
        icl.WeightDelta.from_adapter(models_by_architecture("gpt2"), folder)
    with pytest.raises(ValueError, match=r"expected an adapter of 'tiny' .* its model.layers.2.* with shape None, got"):
        icl.WeightDelta.from_adapter(tiny_model(), folder)  # with fewer layers
    weights = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file({**weights, name: weights[name][:8].clone()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1.self_attn.v_proj.lora_B.weight with shape \(16, 2\), got \(8, 2\)"):
        icl.WeightDelta.from_adapter(models_by_architecture("llama"), folder)


def test_an_adapter_that_names_another_model_is_refused_until_told_that_it_is_this_one(
    llama: icl.Model, folder: Path
) -> None:
    change_settings(folder, base_model_name_or_path="someone/other-llama")
    with pytest.raises(ValueError, match="its base model is 'someone/other-llama', not 'llama'"):
        icl.WeightDelta.from_adapter(llama, folder)
    with pytest.raises(ValueError, match="its base model is 'someone/other-llama', not 'another'"):
        icl.WeightDelta.from_adapter(llama, folder, base="another")
    renamed = icl.WeightDelta.from_adapter(llama, folder, base="a/mirror/other-llama")
    change_settings(folder, base_model_name_or_path="models/Llama")
    assert icl.WeightDelta.from_adapter(llama, folder) == renamed


def test_an_adapter_of_the_unembedding_is_refused_by_its_name(
    llama: icl.Model, make_hf_model: Callable, tmp_path: Path
) -> None:
    adapted(make_hf_model("llama"), ["v_proj", "lm_head"]).save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(name.endswith("lm_head.base_layer.weight") for name in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=r"of attention's projections only, .* a change of 'lm_head.weight' \(1 such"):
        icl.WeightDelta.from_adapter(llama, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa"},
        {"kasa_config": {"beta": 1e-4}},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"modules_to_save": ["lm_head"]},
        {"use_variant_of_the_future": True},
    ],
    ids=str,
)
def test_adapters_that_do_more_than_add_a_matrix_are_refused(
    llama: icl.Model, folder: Path, settings: dict[str, Any]
) -> None:
    change_settings(folder, **settings)
    (name, value) = next(iter(settings.items()))
    with pytest.raises(ValueError, match="expected an adapter that adds a low-rank matrix") as error:
        icl.WeightDelta.from_adapter(llama, folder)
    assert f" with {name}={value!r}: merge it into its model (merge_and_unload" in str(error.value)
    assert ("WeightDelta.between" in str(error.value)) == (name != "modules_to_save"), "which would refuse it too"


def test_settings_that_only_say_how_an_adapter_was_trained_change_nothing(
    llama: icl.Model, make_hf_model: Callable, folder: Path, tmp_path: Path
) -> None:
    expected = icl.WeightDelta.from_adapter(llama, folder)
    velora = peft.tuners.lora.config.VeloraConfig()
    adapted(make_hf_model("llama"), ["k_proj", "v_proj"], lora_dropout=0.5, velora_config=velora).save_pretrained(
        tmp_path / "other"
    )
    assert icl.WeightDelta.from_adapter(llama, tmp_path / "other") == expected


def test_folders_without_an_adapter_and_damaged_ones_are_refused(
    llama: icl.Model, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(icl.AssetError, match=r"got .*nowhere without adapter_config.json and adapter_model.safet"):
        icl.WeightDelta.from_adapter(llama, tmp_path / "nowhere")
    change_settings(folder, base_model_name_or_path=3)
    with pytest.raises(icl.AssetError, match=r"base_model_name_or_path as text in .*adapter_config.json, got 3: write"):
        icl.WeightDelta.from_adapter(llama, folder)
    change_settings(folder, base_model_name_or_path=None)
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(icl.AssetError, match=r"expected an adapter's weights in .*adapter_model.safetensors, got"):
        icl.WeightDelta.from_adapter(llama, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(icl.AssetError, match=r"expected JSON in .*adapter_config.json"):
        icl.WeightDelta.from_adapter(llama, folder)


def test_an_untrained_adapter_is_refused(llama: icl.Model, make_hf_model: Callable, tmp_path: Path) -> None:
    untrained: Any = peft.get_peft_model(make_hf_model("llama"), peft.LoraConfig(target_modules=["k_proj"]))
    untrained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected an adapter that changes weights, got zeros in"):
        icl.WeightDelta.from_adapter(llama, tmp_path)


def test_models_of_peft_are_to_be_merged_first(llama: icl.Model, make_hf_model: Callable) -> None:
    model = adapted(make_hf_model("llama"), ["k_proj"])
    with pytest.raises(icl.UnsupportedModelError, match=r"got PeftModel: merge it first, with merge_and_unload\(\)"):
        icl.Model(model)
    with pytest.raises(ValueError, match="expected tuned as a model without adapters, got a PeftModel: merge them"):
        icl.WeightDelta.between(llama, model)
    with pytest.raises(ValueError, match=r"got a PeftModel: merge it first"):
        icl.load_model(model)
    hf_model = model.get_base_model()  # with the adapter inside
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=hf_model, tokenizer=llama.tokenizer, device="cpu")
    with pytest.raises(
        icl.UnsupportedModelError, match=r"a model without adapters, got Linear of peft at .*k_proj.*: merge"
    ):
        icl.Model(bridge)


def test_an_adapters_folder_is_no_models(folder: Path) -> None:
    with pytest.raises(icl.UnsupportedModelError, match=r"got an adapter in .*: merge it into its model first"):
        icl.load_model(str(folder))


def test_switching_an_adapter_on_or_off_changes_the_fingerprint(make_model: Callable[..., icl.Model]) -> None:
    """Put into the modules after the bridge was made, where nothing could refuse it."""
    model = make_model("llama")
    without = model.fingerprint()
    original = model.wrapped.original_model
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=r".*down_proj\._original_component"), original)
    layers: list[Any] = [module for module in original.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(layers) == model.n_layers
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
    fingerprints, logits = [without], []
    for enabled in (True, False, True):
        for layer in layers:
            layer.enable_adapters(enabled)
        fingerprints.append(model.fingerprint())
        with torch.no_grad():
            logits.append(model.run(torch.tensor([[3, 5, 9]])))
    assert not torch.equal(logits[0], logits[1])
    assert len({*fingerprints}) == 3
    assert fingerprints[1] == fingerprints[3]


def test_a_missing_peft_names_the_extra(
    llama: icl.Model, prompts: icl.Prompts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    message = r"expected the package peft, which {} needs, got none: pip install 'icl-dual\[peft\]'"
    with pytest.raises(ImportError, match=message.format("an adapter")):
        icl.WeightDelta.from_adapter(llama, folder)
    config = icl.FinetuneConfig(lora=icl.Lora())
    with pytest.raises(ImportError, match=message.format("LoRA")):
        icl.finetune(llama, prompts, lr=0.01, config=config, progress=False)
    icl.finetune(llama, prompts, lr=0.01, progress=False)  # which needs none
