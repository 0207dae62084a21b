"""The tensors of a training checkpoint: without the dictionaries and key prefixes that training tools put around them.

    {"state_dict": ..., "epoch": 3}            Lightning, and most scripts; also model, params, params_ema, ema, ...
    {"module": ..., "ds_version": ...}         DeepSpeed
    module.  _orig_mod.  model.  net.  ...     data-parallel wrappers, torch.compile, Lightning modules
    layers.0._orig_mod.weight                  torch.compile, FSDP and checkpointing inside a network

An exponential average goes before the weights that it averages, as its authors restore with it. What is left out is in
the notes. All names are ours to read only: nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from components.naming import list_some

WRAPPERS = (
    *("ema_state_dict", "model_ema", "ema_model", "params_ema", "ema", "netG_ema", "g_ema", "generator_ema"),
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
    while not any(isinstance(inner, Tensor) and inner.ndim for inner in value.values()):
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
    if not tensors:
        raise ValueError(f"it holds no tensors{f', only {list_some(left_out)}' if left_out else ''}")
    return tensors, notes


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
    keys = [str(key) for key in value]
    for key, inner in zip(plain_keys(keys), value.values(), strict=True):
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
