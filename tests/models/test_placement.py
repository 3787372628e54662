"""Models of which MLPs are kept elsewhere than on the device that runs: the same numbers, or a refusal."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from pretend_device import DEVICE, DeviceTensor, pretended_device
from safetensors.torch import load_file, save_file
from test_devices import FIELDS, cell, prompts_of, tensors_of
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import icl_dual as icl
from icl_dual.models import loading, placement, tiny_model
from icl_dual.models.bridge import boot
from icl_dual.models.changes import changed_projections

CPU = torch.device("cpu")


def placed(dtype: torch.dtype, arithmetic: torch.dtype | None = None) -> icl.Model:
    """A tiny model that runs on the pretended device, with the MLP of its second layer on the CPU."""
    model = tiny_model(dtype=dtype, arithmetic=arithmetic)
    placement.place(model.wrapped, DEVICE, {1: CPU})
    return icl.Model(model.wrapped, "tiny", arithmetic=arithmetic, tokenizer=model.tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved Llama of two layers."""
    config = LlamaConfig(**tiny_model().wrapped.original_model.config.to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model: Any = LlamaForCausalLM(config)
    hf_model.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **options: Any) -> icl.Model:
    return icl.load_model(str(folder), tokenizer=tiny_model().tokenizer, **options)


def test_a_cell_with_mlps_elsewhere_is_that_of_one_device() -> None:
    """Captures, decomposition, finetunings, updates and comparison, in float64; the MLP stays where it is."""
    model = tiny_model(dtype=torch.float64)
    expected = tensors_of(cell(icl.Model(model.wrapped, "tiny", tokenizer=model.tokenizer)))
    with pretended_device():
        model = placed(torch.float64)
        before = [weight.clone() for weight in placement.mlp_matrices(model.wrapped)[1]]
        actual = tensors_of(cell(model))
        after = placement.mlp_matrices(model.wrapped)[1]
        assert model.offloaded == {1}
        assert "MLPs of 1 layers elsewhere" in repr(model)
        for weight, kept in zip(after, before, strict=True):
            assert type(weight) is torch.nn.Parameter
            assert torch.equal(weight, kept)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)


@pytest.mark.parametrize("arithmetic", [None, torch.float32])
def test_half_precision_with_mlps_elsewhere(arithmetic: torch.dtype | None) -> None:
    def results(model: icl.Model) -> dict[str, Tensor]:
        prompts = prompts_of(model)
        capture = icl.capture(model, prompts, fields=FIELDS, progress=False)
        delta = icl.finetune(model, prompts, lr=0.01, progress=False)
        return tensors_of({"capture": capture, "delta": delta})

    with pretended_device():
        actual = results(placed(torch.bfloat16, arithmetic))
        on_one = tiny_model(dtype=torch.bfloat16, arithmetic=arithmetic)
        placement.place(on_one.wrapped, DEVICE, {})
        assert not on_one.offloaded
        expected = results(on_one)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_keeps_no_copy_of_an_mlp_elsewhere_and_a_backward_pass_copies_it_once_more(dtype: torch.dtype) -> None:
    copies: list[StorageWeakRef] = []
    with pretended_device() as counts:
        model = placed(dtype, torch.float32)

        def read(layer: int, output: Tensor) -> None:
            weights = placement.mlp_matrices(model.wrapped)[layer] if layer == 1 else []
            copies.extend(StorageWeakRef(weight.untyped_storage()) for weight in weights)

        change = torch.zeros(2, 16, 32, device=DEVICE, requires_grad=True)
        tokens = torch.arange(12, device=DEVICE).view(2, 6)
        with changed_projections(model, {"W_V": change}):
            logits = model.run(tokens, on_output=read)
        assert [copy.expired() for copy in copies] == [True, True, True]
        before = counts["to device"]
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[..., 7].sum(), [change])
        assert counts["to device"] - before == 3
        assert gradient.norm() > 0


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "phi3", "mixtral", "gemma3-window"])
def test_mlps_of_all_kinds_run_elsewhere(architecture: str, make_model: Callable[..., icl.Model]) -> None:
    """Plain, gated, fused and of experts; under the names of any architecture."""

    def logits(elsewhere: Mapping[int, torch.device]) -> Tensor:
        bridge = make_model(architecture).wrapped
        placement.place(bridge, DEVICE, elsewhere)
        model = icl.Model(bridge)
        assert model.offloaded == elsewhere.keys()
        tokens = torch.arange(24, device=DEVICE).view(2, 12)
        with torch.no_grad():
            got: Any = model.run(tokens)
        return got.held

    with pretended_device():
        assert torch.equal(logits({0: CPU, 2: CPU}), logits({}))


def test_the_fingerprint_and_the_control_of_a_placed_model() -> None:
    expected = tiny_model()
    with pretended_device():
        model = placed(torch.float32)
        assert model.fingerprint() == expected.fingerprint()
        control = icl.control_model(model, "untrained", seed=1)
        assert control.offloaded == {1}
        assert control.fingerprint() == icl.control_model(expected, "untrained", seed=1).fingerprint()


def test_computing_with_the_weights_of_an_mlp_elsewhere_is_refused() -> None:
    with pretended_device(), pytest.raises(icl.UnsupportedModelError, match="layer 1: expected the weights of its MLP"):
        placed(torch.float32).backend.mlp_projection(1, "in")


def test_a_finetuned_copy_of_a_placed_model_stays_on_the_cpu() -> None:
    original = tiny_model().wrapped.original_model
    tuned: Any = LlamaForCausalLM(original.config)
    weights = {name.replace("._original_component", ""): weight for name, weight in original.named_parameters()}
    with torch.no_grad():
        for name, copied in tuned.named_parameters():
            copied.copy_(weights[name])
        tuned.model.layers[0].self_attn.v_proj.weight += 1
    with pretended_device():
        delta = icl.WeightDelta.between(placed(torch.float32), tuned)
        assert not isinstance(delta.W_V, DeviceTensor)
    assert delta.W_V[0].allclose(torch.ones(()))


def test_layers_fill_devices_in_order() -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")

    def plan(
        resident: int, copies: int, free: Mapping[torch.device, int], dtype: torch.dtype = torch.float32
    ) -> dict[int, torch.device]:
        return placement.plan_mlps([10] * 3, resident, copies, free, "mine", dtype)

    assert plan(50, 20, {first: 100}) == {}
    assert plan(59, 11, {first: 100}) == {1: CPU, 2: CPU}
    assert plan(59, 11, {first: 100, second: 15}) == {1: second, 2: CPU}
    too_large = r"mine: expected .* on cuda:0 for attention, embeddings, the largest MLP, .* got 0.0 GiB: "
    with pytest.raises(MemoryError, match=too_large + r"load it with dtype=torch\.bfloat16, free"):
        plan(79, 11, {first: 100})
    with pytest.raises(MemoryError, match=too_large + "free memory"):
        plan(79, 11, {first: 100}, torch.bfloat16)


@pytest.mark.parametrize("arithmetic", [None, torch.float32])
def test_copies_of_weights_that_run_need_free_memory_too(
    monkeypatch: pytest.MonkeyPatch, arithmetic: torch.dtype | None
) -> None:
    """Also where all weights fit: blocks run on float32 copies one at a time, and all other weights have theirs."""
    bridge, gpu = tiny_model(dtype=torch.bfloat16).wrapped, torch.device("cuda:0")
    blocks: list[int] = [sum(p.numel() for p in block.parameters()) for block in bridge.blocks]
    mlp = sum(weight.numel() for weight in placement.mlp_matrices(bridge)[0])
    n_weights = sum(p.numel() for p in bridge.original_model.parameters())
    copied = n_weights - sum(blocks) + max(blocks) if arithmetic else 0
    needed = 2 * n_weights + 4 * copied

    def plan(free: float) -> dict[int, torch.device]:
        monkeypatch.setattr(loading, "free_memory", lambda device: round(free / (1 - placement.HEADROOM)))
        return loading._planned("tiny", bridge, [gpu], torch.bfloat16, arithmetic)

    assert plan(needed + 2) == {}
    of_one = 2 * mlp if arithmetic is None else 0
    assert plan(needed - 2) == ({1: CPU} if arithmetic else {0: CPU, 1: CPU})
    assert plan(needed - 4 * mlp + of_one + 2) == {0: CPU, 1: CPU}
    with pytest.raises(MemoryError, match="copies of weights that run"):
        plan(needed - 4 * mlp + of_one - 2)

    everywhere = {0: gpu, 1: CPU}
    monkeypatch.setattr(loading, "free_memory", lambda device: needed - 2 * mlp + of_one)
    loading._check_room("tiny", bridge, gpu, everywhere, arithmetic)
    monkeypatch.setattr(loading, "free_memory", lambda device: needed - 2 * mlp + of_one - 1)
    with pytest.raises(MemoryError, match="for what device_map puts there and the copies of it that run"):
        loading._check_room("tiny", bridge, gpu, everywhere, arithmetic)
    sizes, resident, _ = loading._sizes(bridge, arithmetic)
    monkeypatch.setattr(loading, "free_memory", lambda device: sum(sizes) + resident)
    loading._check_room("tiny", bridge, gpu, {0: gpu, 1: gpu}, arithmetic)  # nothing is copied


def test_memory_that_runs_out_while_weights_are_placed_is_no_unsupported_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loading, "place", fail)
    message = r"expected enough free memory .* bfloat16 .* got: CUDA out of memory.*: free memory, .*device_map"
    with pytest.raises(MemoryError, match=message):
        load(folder, device_map={"": "cpu"}, dtype=torch.bfloat16)
    with pytest.raises(MemoryError, match=r"float32 .*load it with dtype=torch\.bfloat16, free"):
        load(folder, device_map={"": "cpu"})


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model.layers.1": "cpu"}, "a device for every weight, got none for 'model.embed_tokens.weight'"),
        ({"": "cpu", "model.layers.9": "disk"}, "names of the model's modules, got 'model.layers.9' .did you mean"),
        ({"": "cpu", "model.layers.1.self_attn": "disk"}, "got 'model.layers.1.self_attn.q_proj.weight' on disk"),
        ({"": "cpu", "lm_head": "disk"}, "got 'lm_head.weight' on disk: map layers or their MLPs"),
        ({"": "cpu", "model.layers.0.mlp.up_proj": "disk"}, "one device for the MLP of layer 0, got cpu, disk"),
        ({"": "disk"}, "expected the token embedding on the device that the model runs on"),
        ({"": "meta"}, "expected a device with numbers"),
        ({"": 99}, "expected a device that torch can use here, got 'cuda:99'"),
        ({}, "at least one entry"),
    ],
)
def test_device_maps_that_are_refused(folder: Path, device_map: Mapping[str, str | int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, device_map=device_map)
    assert caught.type in (ValueError, icl.ArgumentError), "an error that icl_dual exports"


def test_a_gpu_is_the_same_by_all_its_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    hf_model: Any = LlamaForCausalLM.from_pretrained(folder)
    device_map = {"": "cuda", "lm_head": 1, "model.norm": torch.device("cuda:1"), "model.layers.0": 0}
    device, places_of = placement.read_device_map(device_map, hf_model)
    assert device == torch.device("cuda:1")
    assert places_of(boot("tiny", hf_model, tiny_model().tokenizer, "cpu", torch.float32)) == {0: "cuda:0", 1: "cuda:1"}


def test_an_entry_of_a_layer_is_of_no_layer_whose_number_begins_alike() -> None:
    entries = {"": "cpu", "model.layers.1": "cuda:0", "model.layers.1.mlp": "cuda:1"}
    assert placement._entry("model.layers.10.mlp.up_proj.weight", entries) == ""
    assert placement._entry("model.layers.1.mlp.up_proj.weight", entries) == "model.layers.1.mlp"
    assert placement._entry("model.layers.1.input_layernorm.weight", entries) == "model.layers.1"


def test_device_and_device_map_are_not_both_taken(folder: Path) -> None:
    with pytest.raises(ValueError, match="device or device_map"):
        load(folder, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="device_map as one of 'auto' or a dictionary"):
        load(folder, device_map="balanced")


def is_mapped(weight: Tensor, file: Path) -> bool:
    """Whether a weight's memory is that of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split()
        first, last = (int(address, 16) for address in addresses.split("-"))
        if path == str(file) and first <= weight.data_ptr() < last:
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu", "model.layers.1": "disk"}])
def test_weights_on_disk_are_mapped_and_their_file_is_never_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device_map: Any
) -> None:
    """Also where less memory is free than the weights take."""
    file, expected = folder / "model.safetensors", load(folder)
    monkeypatch.setattr(loading, "free_memory", lambda device: 1)
    model, before = load(folder, device_map=device_map), file.read_bytes()
    assert all(is_mapped(weight, file) for weight in placement.mlp_matrices(model.wrapped)[1])
    prompts = prompts_of(model)
    delta = icl.finetune(model, prompts, lr=0.01, progress=False)
    assert torch.equal(delta.W_V, icl.finetune(expected, prompts, lr=0.01, progress=False).W_V)
    with delta.applied(model):
        assert model.fingerprint() != expected.fingerprint()
    assert model.fingerprint() == expected.fingerprint()
    assert file.read_bytes() == before


ON_DISK = {"": "cpu", "model.layers.1": "disk"}


def test_weights_that_cannot_be_mapped_are_refused_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"expected weights on disk as safetensors in bfloat16 .* got weights in float32: load them in the dtype"
    with pytest.raises(ValueError, match=message):
        load(folder, device_map=ON_DISK, dtype=torch.bfloat16)
    monkeypatch.setattr(loading, "free_memory", lambda device: 1)
    with pytest.raises(MemoryError, match="of free memory on cpu"):
        load(folder, device_map="auto", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_another_format_are_refused_on_disk(folder: Path, dtype: torch.dtype) -> None:
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match=r"expected weights on disk as safetensors .* got no safetensors: .* 'cpu'"):
        load(folder, device_map=ON_DISK, dtype=dtype)
    assert load(folder, device_map="auto", dtype=dtype).storage_dtype == dtype


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.0.mlp.up_proj.weight"])
def test_a_tensor_in_float32_beside_weights_on_disk_is_converted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It alone needs memory of the host."""
    file = folder / "model.safetensors"
    weights = {key: weight.bfloat16() for key, weight in load_file(file).items()}
    weights[name] = weights.get(name, torch.ones(4)).float()
    save_file(weights, file, metadata={"format": "pt"})
    needed = 2 * weights[name].numel()
    monkeypatch.setattr(loading, "free_memory", lambda device: needed)
    model = load(folder, device_map=ON_DISK, dtype=torch.bfloat16)
    assert all(is_mapped(weight, file) for weight in placement.mlp_matrices(model.wrapped)[1])
    monkeypatch.setattr(loading, "free_memory", lambda device: needed - 1)
    with pytest.raises(MemoryError, match="of free memory on cpu"):
        load(folder, device_map=ON_DISK, dtype=torch.bfloat16)


def test_layers_with_a_weight_that_is_converted_are_refused_on_disk(folder: Path) -> None:
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    save_file({**weights, name: weights[name].bfloat16()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"in float32 .* got {name} in bfloat16: load them"):
        load(folder, device_map=ON_DISK)


@pytest.mark.parametrize(("architecture", "layer"), [("gpt2", "transformer.h.1"), ("mixtral", "model.layers.1")])
def test_on_disk_are_weights_that_are_as_in_the_file(
    make_hf_model: Callable[..., Any], tmp_path: Path, architecture: str, layer: str
) -> None:
    """A file may have other prefixes; experts are stored one by one, and transformers puts them together."""
    hf_model = make_hf_model(architecture)
    (hf_model.transformer if architecture == "gpt2" else hf_model).save_pretrained(tmp_path)
    hf_model.config.save_pretrained(tmp_path)
    device_map = {"": "cpu", layer: "disk"}
    if architecture == "gpt2":
        assert load(tmp_path, device_map=device_map).offloaded == frozenset()
    else:
        with pytest.raises(ValueError, match=r"got no model\.layers\.1\.mlp\.\S+: .* map these layers to 'cpu'"):
            load(tmp_path, device_map=device_map)


def test_a_model_that_accelerate_has_dispatched_is_refused(folder: Path) -> None:
    """Some of its parameters have no numbers: captures would fail, and finetuning would change nothing."""
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    dispatched: Any = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=folder / "offloaded", attn_implementation="eager"
    )
    # TransformerLens 3.9 refuses the disk itself.
    with pytest.raises(icl.UnsupportedModelError, match=r"accelerate has dispatched over cpu, disk|\['disk'\]"):
        boot("tiny", dispatched, tiny_model().tokenizer, "cpu", torch.float32)


def test_a_model_that_accelerate_offloads_to_the_cpu_is_refused(folder: Path) -> None:
    """Its parameters are on the device meta, and no device map says so."""
    offloaded: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    accelerate.cpu_offload(offloaded, execution_device=CPU)
    with pytest.raises(icl.UnsupportedModelError, match=r"got model\.embed_tokens\..*weight without numbers .*load it"):
        boot("tiny", offloaded, tiny_model().tokenizer, "cpu", torch.float32)


def test_weights_on_several_devices_by_hand_are_refused() -> None:
    model = tiny_model()
    with pretended_device():
        attn: Any = model.wrapped.blocks[1].attn
        attn.q.original_component.weight = torch.nn.Parameter(DeviceTensor(attn.q.original_component.weight.detach()))
        with pytest.raises(icl.UnsupportedModelError, match=r"all weights but those of MLPs on one device \(cpu\)"):
            icl.Model(model.wrapped)
