"""Where a model's weights lie: on the device that it runs on, but for the MLPs of some layers.

Attention is what this library reads, replaces and changes: its weights, the norms and the embeddings are always on the
model's device. The matrices of MLPs, most of a decoder's weights, may be kept on another GPU, in the host's memory, or
in a file that is mapped into it. A layer runs on copies of them, which it drops when it ends
(`precision.run_copies`). Every weight keeps its numbers: the dispatch of accelerate would leave parameters without any
("meta") behind hooks of its own, which only the model's forward pass calls.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from icl_dual.arguments import near_misses
from icl_dual.models.backend import UnsupportedModelError

DeviceMap = Literal["auto"] | Mapping[str, str | int | torch.device]
"""`auto`, or a device by the name of a module as transformers names it; `""` stands for all. `disk` is a device."""

DISK = "disk"
"""The name of the place where weights are left in their file, which the operating system maps into memory."""

HEADROOM = 0.2
"""The part of a GPU's free memory that `auto` leaves for activations, what is captured, and changes of weights."""


class DeviceMapError(ValueError):
    """A device map does not suit the model."""


def mlp_matrices(bridge: Any) -> list[list[nn.Parameter]]:
    """Return, by layer, the weights with two axes or more outside of attention."""
    matrices: list[list[nn.Parameter]] = []
    for block in bridge.blocks:
        attention = {id(parameter) for parameter in getattr(block, "attn", nn.Module()).parameters()}
        matrices.append([p for p in block.parameters() if p.ndim > 1 and id(p) not in attention])
    return matrices


def check_placement(bridge: Any, architecture: str) -> frozenset[int]:
    """Return the layers whose MLP is kept on another device than the model's.

    Raises:
        UnsupportedModelError: accelerate has dispatched the model, or weights other than MLPs' are on several devices.
    """
    advice = "load it with icl_dual.load_model(name, device_map=…), or on one device"
    targets = set(map(str, getattr(bridge.original_model, "hf_device_map", {}).values()))
    if len(targets) > 1 or DISK in targets:
        raise UnsupportedModelError(
            f"{architecture}: expected weights that can be read and changed, got a model that accelerate has "
            f"dispatched over {', '.join(sorted(targets))}, where some are there only while they run: {advice}"
        )
    matrices = mlp_matrices(bridge)
    of_mlps = {id(parameter) for of_layer in matrices for parameter in of_layer}
    device = next(bridge.original_model.parameters()).device
    others = {p.device for p in bridge.original_model.parameters() if id(p) not in of_mlps} - {device}
    if others:
        raise UnsupportedModelError(
            f"{architecture}: expected all weights but those of MLPs on one device ({device}), got some on "
            f"{', '.join(map(str, others))}: {advice}"
        )
    return frozenset(layer for layer, of_layer in enumerate(matrices) if any(p.device != device for p in of_layer))


def place(bridge: Any, device: torch.device, elsewhere: Mapping[int, torch.device]) -> None:
    """Move a bridge to a device, but for the MLPs of some layers.

    Args:
        bridge: the bridge, which is on the CPU.
        device: the device that it will run on.
        elsewhere: by layer, the device that keeps the layer's MLP.
    """
    matrices = mlp_matrices(bridge)
    target_of = {id(parameter): elsewhere[layer] for layer in elsewhere for parameter in matrices[layer]}
    held: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for root in (bridge, bridge.original_model):
        for module in root.modules():
            held += [(module._parameters, name, p) for name, p in module._parameters.items() if id(p) in target_of]
    for parameters, name, _ in held:
        parameters[name] = None
    try:
        bridge.to(device, print_details=False)
    finally:
        for parameters, name, parameter in held:
            parameters[name] = parameter
    for _, _, parameter in held:
        parameter.data = parameter.data.to(target_of[id(parameter)])


def plan_mlps(
    sizes: Sequence[int], resident: int, copies: int, free: Mapping[torch.device, int], name: str
) -> dict[int, torch.device]:
    """Return which layers' MLPs are kept elsewhere, and where: on the other devices in order, then in host memory.

    Args:
        sizes: by layer, the bytes of its MLP's matrices.
        resident: the bytes of all other weights.
        copies: the bytes of the copies of the largest layer that exist while it runs.
        free: the free bytes of each device, the model's own first.
        name: the model's name, for the message.

    Raises:
        MemoryError: the model's device has no room for all other weights and the copies.

    Example:
        >>> gpu, second = torch.device("cuda:0"), torch.device("cuda:1")
        >>> plan_mlps([100] * 4, 200, 100, {gpu: 500, second: 150}, "mine")
        {1: device(type='cuda', index=1), 2: device(type='cpu'), 3: device(type='cpu')}
    """
    device, *_ = free
    room = {each: int((1 - HEADROOM) * n_bytes) for each, n_bytes in free.items()}
    if sum(sizes) + resident <= room[device]:
        return {}
    room[device] -= resident + copies
    if room[device] < 0:
        raise MemoryError(
            f"{name}: expected {(resident + copies) / (1 - HEADROOM) / 2**30:.1f} GiB of free memory on {device} for "
            f"attention, embeddings and the largest MLP, got {free[device] / 2**30:.1f} GiB: load it with "
            "dtype=torch.bfloat16, free memory, or use a smaller model"
        )
    elsewhere: dict[int, torch.device] = {}
    order, host = list(room), torch.device("cpu")
    for layer, size in enumerate(sizes):
        while order and room[order[0]] < size:
            order.pop(0)
        if order:
            room[order[0]] -= size
        if (target := order[0] if order else host) != device:
            elsewhere[layer] = target
    return elsewhere


def read_device_map(
    device_map: Mapping[str, str | int | torch.device], hf_model: Any
) -> tuple[torch.device, Callable[[Any], dict[int, str]]]:
    """Return the device of a map's token embedding, and a function that reads the places of MLPs from the map.

    The function takes the bridge that is made of the model, and returns the place of each layer's MLP.

    Args:
        device_map: a device by the name of a module or weight.
        hf_model: the Hugging Face model that no bridge is around yet.

    Raises:
        DeviceMapError: the map leaves weights out, or names no module of the model.
    """
    entries = {name: f"cuda:{place}" if isinstance(place, int) else str(place) for name, place in device_map.items()}
    names = {id(weight): name for name, weight in hf_model.named_parameters()}
    known = {name for name, _ in hf_model.named_modules()} | set(names.values())
    if unknown := sorted(entries.keys() - known):
        raise DeviceMapError(
            f"expected device_map with names of the model's modules, got {unknown[0]!r}{near_misses(unknown[0], known)}"
            ": see [name for name, _ in hf_model.named_modules()]"
        )
    by_weight = {key: _entry(name, entries) for key, name in names.items()}
    embedding = by_weight[id(hf_model.get_input_embeddings().weight)]
    if entries[embedding] == DISK:
        raise DeviceMapError(
            f"expected the token embedding on the device that the model runs on, got {embedding!r} on disk: map it to "
            "a device, e.g. 'cpu'"
        )

    def places(bridge: Any) -> dict[int, str]:
        return _places(bridge, entries, by_weight, names, embedding)

    return torch.device(entries[embedding]), places


def _entry(name: str, entries: Mapping[str, str]) -> str:
    """Return the longest key of a device map that a weight's name begins with."""
    fitting = [key for key in entries if not key or name == key or name.startswith(f"{key}.")]
    if not fitting:
        raise DeviceMapError(
            f"expected device_map to have a device for every weight, got none for {name!r}: add an entry for '' (all "
            "other modules)"
        )
    return max(fitting, key=len)


def _places(
    bridge: Any, entries: Mapping[str, str], by_weight: Mapping[int, str], names: Mapping[int, str], embedding: str
) -> dict[int, str]:
    """Return the place of each layer's MLP; check that entries place no other weight elsewhere on purpose."""
    matrices, places = mlp_matrices(bridge), dict[int, str]()
    of_mlps: set[str] = set()
    for layer, of_layer in enumerate(matrices):
        used = {by_weight[id(weight)] for weight in of_layer if id(weight) in by_weight}
        if len(targets := {entries[entry] for entry in used}) > 1:
            raise DeviceMapError(
                f"expected one device for the MLP of layer {layer}, got {', '.join(sorted(targets))}: map the MLP, or "
                "the layer, as a whole"
            )
        of_mlps |= used
        places |= dict.fromkeys([layer], *targets)
    inner = {id(weight) for of_layer in matrices for weight in of_layer}
    for key, entry in by_weight.items():
        if key not in inner and entry not in of_mlps and entries[entry] != entries[embedding]:
            raise DeviceMapError(
                f"expected all weights but those of MLPs on the device of the token embedding ({entries[embedding]}), "
                f"where the model runs and its attention is read and changed, got {names[key]!r} on {entries[entry]}: "
                "map layers or their MLPs elsewhere"
            )
    return places
