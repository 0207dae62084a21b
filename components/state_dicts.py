"""The tensors of a training checkpoint: without the dictionaries and key prefixes that training tools put around them.

    {"state_dict": ..., "epoch": 3}            Lightning, and most scripts; also model, params, params_ema, ema, ...
    {"module": ..., "ds_version": ...}         DeepSpeed
    module.  _orig_mod.  model.  net.  ...     data-parallel wrappers, torch.compile, Lightning modules
    layers.0._orig_mod.weight                  torch.compile, FSDP and checkpointing inside a network

A wrapper of any other name is found by the keys that a file must have (`wrapper_prefix`).
An exponential average goes before the weights that it averages, as its authors restore with it. What is left out is in
the notes. All names are ours to read only: nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from components.naming import list_some

WRAPPERS = (
    *("ema_state_dict", "state_dict_ema", "model_state_dict_ema", "ema_model_state_dict", "model_ema", "ema_model"),
    *("averaged_model", "params_ema", "ema_params", "ema_weights", "ema", "netG_ema", "g_ema", "G_ema"),
    *("generator_ema", "unet_ema", "ema_unet"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "params", "network", "net", "netG", "net_g"),
    *("generator", "student", "weights", "unet", "transformer", "lora", "adapter", "aggregator"),
)
"""Keys under which checkpoints keep the weights; an earlier one goes first."""

PREFIXES = (
    *("module", "_orig_mod", "base_model.model", "model.diffusion_model", "diffusion_model", "model", "network", "net"),
    *("net_g", "netG", "generator", "student", "ema", "ema_model", "model_ema", "params", "state_dict", "transformer"),
    "aggregator",
)
"""Prefixes that are removed where every key of a dictionary has them."""

INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Parts of keys that wrappers add anywhere."""

COUNTERS = ("step", "global_step", "epoch", "iteration", "iter", "n_averaged", "num_updates", "decay")
"""Names of single numbers that tools keep among the weights, as tensors without dimensions."""

FLAT = (
    "it holds the flat parameters of FSDP: save it where it was made with FullStateDictConfig and "
    "StateDictType.FULL_STATE_DICT"
)

ZERO = (
    "it is a shard of DeepSpeed's ZeRO, which holds slices of the weights: run `python zero_to_fp32.py . weights.bin` "
    "in the checkpoint's folder, where DeepSpeed has put that script, and import weights.bin"
)


def plain_state(value: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint by key, and notes on what was left out. Dots join the keys of nested dictionaries.

    Raises:
        ValueError: no dictionary of tensors; the sentence says what it holds instead, and where possible the remedy.
    """
    notes: list[str] = []
    if not isinstance(value, Mapping):
        raise ValueError(f"the whole file holds {type(value).__name__}, not a dictionary of tensors")
    while not any(_is_weight(key, inner) for key, inner in value.items()):
        if _is_zero_shard(value):
            raise ValueError(ZERO)
        names = [name for name in WRAPPERS if isinstance(value.get(name), Mapping) and _holds_weights(value[name])]
        if not names:
            break
        others = [str(key) for key in value if key != names[0]]
        if others:
            notes.append(f"{names[0]} was read; left out: {list_some(others)}")
        value = value[names[0]]
    left_out: list[str] = []
    tensors = dict(_flat(value, "", left_out))
    if left_out:
        notes.append(f"no weights, left out: {list_some(left_out)}")
    if any(key.rpartition(".")[2] == "_flat_param" for key in tensors):
        raise ValueError(FLAT)
    if not tensors:
        raise ValueError(f"it holds no tensors{f', only {list_some(left_out)}' if left_out else ''}")
    return tensors, notes


def wrapper_prefix(keys: Iterable[str], essential: Collection[str]) -> str:
    """The beginning of keys under which all of the `essential` ones are, whatever a tool has called it; "" for none.

    Args:
        essential: keys that a file must have. If some of them are there without a beginning, there is no wrapper.

    Raises:
        ValueError: they are under several beginnings, so there are several networks.
    """
    present = set(keys)
    if not essential or any(key in present for key in essential):
        return ""
    probe = max(essential, key=len)
    ends = (key.removesuffix(probe) for key in present if key.endswith(f".{probe}"))
    prefixes = sorted(prefix for prefix in ends if all(prefix + key in present for key in essential))
    if len(prefixes) > 1:
        names = " and ".join(prefix.rstrip(".") for prefix in prefixes[:2])
        raise ValueError(f"it holds several such networks, {names}: save one of them alone")
    return prefixes[0] if prefixes else ""


def without_prefix(
    tensors: Mapping[str, Tensor], essential: Collection[str], what: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors without the `wrapper_prefix` of the essential keys, and notes on what was left out.

    Args:
        what: the file's name, for the notes.

    Raises:
        ValueError: see wrapper_prefix.
    """
    prefix = wrapper_prefix(tensors, essential)
    if not prefix:
        return dict(tensors), []
    others = [key for key in tensors if not key.startswith(prefix)]
    left_out = f"; left out: {list_some(others)}" if others else ""
    inner = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return inner, [f"{what}: {prefix.rstrip('.')} was read{left_out}"]


def without_counters(tensors: Mapping[Any, Any]) -> dict[Any, Any]:
    """A dictionary without the COUNTERS among its tensors."""
    return {
        key: inner
        for key, inner in tensors.items()
        if not (key in COUNTERS and isinstance(inner, Tensor) and not inner.ndim)
    }


def plain_keys(keys: list[str]) -> list[str]:
    """Keys without the wrappers' parts, in the same order.

    Raises:
        ValueError: two keys become equal.
    """
    plain = [".".join(part for part in key.split(".") if part not in INNER) for key in keys]
    while plain and (prefix := next((f"{p}." for p in PREFIXES if all(k.startswith(f"{p}.") for k in plain)), "")):
        plain = [key.removeprefix(prefix) for key in plain]
    if len(set(plain)) < len(plain):
        by_name: dict[str, str] = {}
        for key, name in zip(keys, plain, strict=True):
            if by_name.setdefault(name, key) != key:
                raise ValueError(f"{by_name[name]} and {key} name the same tensor")
    return plain


def _flat(value: Mapping[Any, Any], prefix: str, left_out: list[str]) -> Iterator[tuple[str, Tensor]]:
    weights = without_counters(value)
    left_out += [f"{prefix}{key}" for key in value if key not in weights]
    for key, inner in zip(plain_keys([str(key) for key in weights]), weights.values(), strict=True):
        name = f"{prefix}{key}"
        if isinstance(inner, Tensor):
            if str(inner.layout) != "torch.strided":
                raise ValueError(f"{name} is not a plain tensor ({inner.layout})")
            yield name, inner.detach()
        elif isinstance(inner, Mapping) and _holds_weights(inner) and not _is_optimizer(key):
            yield from _flat(inner, f"{name}.", left_out)
        elif isinstance(inner, list | tuple) and any(isinstance(item, Tensor) for item in inner):
            raise ValueError(f"{name} holds {type(inner).__name__} of tensors, which have no names: save a state_dict")
        else:
            left_out.append(name)


def _holds_weights(value: Any) -> bool:
    """Whether a dictionary holds a tensor, at any depth."""
    return any(isinstance(v, Tensor) or (isinstance(v, Mapping) and _holds_weights(v)) for v in value.values())


def _is_weight(key: Any, inner: Any) -> bool:
    """Whether this is a network's tensor: their keys have dots, and those of random states and lists of losses none."""
    return isinstance(inner, Tensor) and bool(inner.ndim) and "." in str(key)


def _is_optimizer(key: str) -> bool:
    return key.lower().startswith(("optim", "lr_sched", "sched", "scaler", "rng"))


def _is_zero_shard(value: Mapping[Any, Any]) -> bool:
    """Whether this is an optimizer shard, or a model file of ZeRO stage 3, whose tensors are empty."""
    states = value.get("optimizer_state_dict")
    if isinstance(states, Mapping) and ("zero_stage" in states or any("flat" in str(key) for key in states)):
        return True
    module = value.get("module")
    has_mark = any(key in value for key in ("ds_version", "param_shapes", "ds_config"))
    if not has_mark or not isinstance(module, Mapping):
        return False
    tensors = [inner for inner in module.values() if isinstance(inner, Tensor)]
    return bool(tensors) and all(tensor.numel() == 0 for tensor in tensors)
