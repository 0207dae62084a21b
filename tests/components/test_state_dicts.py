"""Checkpoints as training tools write them: read as the plain weights, or refused with the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components.models import ModelError, load_strictly
from components.naming import limited, list_some
from components.state_dicts import without_prefix
from components.systems.instantir.previewer import split_key
from components.systems.weights_io import find_released
from components.tensor_files import WeightsFileError, read_tensors, read_weights
from pipelines.core.errors import Failure

PLAIN = {"conv.weight": torch.arange(6.0).view(2, 3), "layers.0.norm.bias": torch.ones(2)}
OTHER = {key: value + 1 for key, value in PLAIN.items()}


def prefixed(prefix: str, state: Mapping[str, Tensor] = PLAIN) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def saved(content: Any, folder: Path, name: str = "x.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("base_model.model."),
        prefixed("model.diffusion_model."),
        {"conv._orig_mod.weight": PLAIN["conv.weight"], "layers.0._orig_mod.norm.bias": PLAIN["layers.0.norm.bias"]},
        {"conv.weight": PLAIN["conv.weight"], "layers.0._fsdp_wrapped_module.norm.bias": PLAIN["layers.0.norm.bias"]},
        {"state_dict": PLAIN, "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "2.4"},
        {"state_dict": prefixed("model."), "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}]},
        {"model": {"state_dict": prefixed("net.")}},
        {"params": PLAIN},
        {"params": OTHER, "params_ema": PLAIN},
        {"state_dict": OTHER, "ema": prefixed("module."), "step": torch.tensor(5)},
        {"generator": PLAIN, "discriminator": OTHER},
        {"module": PLAIN, "ds_version": "0.14", "global_steps": 10, "optimizer": None, "param_shapes": [{}]},
        {"model": PLAIN, "optimizer": {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": []}},
        {**PLAIN, "step": 1000, "version": "1", "config": {"a": 1}, "betas": [0.9, 0.99]},
        {**PLAIN, "optimizer": {"state": {0: {"exp_avg": torch.ones(2, 3)}}}},
        {key: nn.Parameter(value) for key, value in PLAIN.items()},
        {"model": PLAIN, "rng_state": torch.get_rng_state(), "epoch": 1},
        {"state_dict": PLAIN, "losses": torch.ones(5)},
        {"state_dict": OTHER, "state_dict_ema": PLAIN},
        {"n_averaged": torch.tensor(3), **prefixed("module.")},
        {**PLAIN, "global_step": torch.tensor(100)},
    ],
)
def test_a_wrapped_checkpoint_gives_the_plain_weights(content: Any, tmp_path: Path) -> None:
    tensors = read_tensors(saved(content, tmp_path))
    assert set(tensors) == set(PLAIN)
    assert all(torch.equal(tensors[key], value) and not tensors[key].requires_grad for key, value in PLAIN.items())


def test_safetensors_lose_the_same_prefixes(tmp_path: Path) -> None:
    save_file(prefixed("module._orig_mod."), tmp_path / "x.safetensors")
    assert set(read_tensors(tmp_path / "x.safetensors")) == set(PLAIN)


def test_a_wrapper_of_another_name_is_found_by_the_keys_it_must_hold() -> None:
    wrapped = {
        "pipe.inner.conv.weight": torch.ones(1),
        "pipe.inner.layers.0.norm.bias": torch.ones(2),
        "loss.a": torch.ones(3),
    }
    tensors, notes = without_prefix(wrapped, tuple(PLAIN), "x.pt")
    assert set(tensors) == set(PLAIN) and notes == ["x.pt: pipe.inner was read; left out: loss.a"]
    for others in (PLAIN, {**PLAIN, **prefixed("ema.")}, {"pipe.conv.weight": torch.ones(1)}):  # plain, or incomplete
        assert without_prefix(others, tuple(PLAIN), "x.pt") == (dict(others), [])
    with pytest.raises(ValueError, match="several such networks, a and b: save one of them alone"):
        without_prefix({**prefixed("a."), **prefixed("b.")}, tuple(PLAIN), "x.pt")


def test_what_is_left_out_is_in_the_notes(tmp_path: Path) -> None:
    _, notes = read_weights(saved({"params": OTHER, "params_ema": PLAIN, "iter": 5}, tmp_path))
    assert notes == ["x.pt: params_ema was read; left out: params, iter"]
    _, notes = read_weights(saved({**PLAIN, "step": 7}, tmp_path))
    assert notes == ["x.pt: no weights, left out: step"]
    assert read_weights(saved(PLAIN, tmp_path))[1] == []


def test_groups_and_names_that_belong_to_a_format_stay(tmp_path: Path) -> None:
    groups = {"image_proj": prefixed("module."), "ip_adapter": {"1.to_k_ip.weight": torch.ones(2)}}
    assert set(read_tensors(saved(groups, tmp_path))) == {
        *(f"image_proj.{key}" for key in PLAIN),
        "ip_adapter.1.to_k_ip.weight",
    }
    unet = prefixed("unet.")
    assert set(read_tensors(saved(unet, tmp_path))) == set(unet)


ZERO = {
    "optimizer_state_dict": {"zero_stage": 2, "single_partition_of_fp32_groups": [torch.ones(9)]},
    "ds_version": "0",
}
ZERO_3 = {"module": {key: torch.zeros(0) for key in PLAIN}, "ds_version": "0", "param_shapes": [{}]}


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (ZERO, r"zero_to_fp32\.py \. weights\.bin"),
        (ZERO_3, r"zero_to_fp32\.py \. weights\.bin"),
        ({"shadow_params": [torch.ones(2)], "decay": 0.9}, "shadow_params holds list of tensors"),
        ({"epoch": 3, "config": {"a": 1}}, "it holds no tensors, only epoch, config"),
        (torch.ones(3), "the whole file holds Tensor, not a dictionary of tensors"),
        ({"a._orig_mod.b": torch.ones(1), "a.b": torch.ones(1)}, r"a\._orig_mod\.b and a\.b name the same tensor"),
        ({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, "the flat parameters of FSDP: save it"),
        (SimpleNamespace(a=1), r"save only the weights: torch\.save\(model\.state_dict\(\), FILE\)"),
    ],
)
def test_other_files_are_refused_with_the_remedy(content: Any, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsFileError, match=remedy):
        read_tensors(saved(content, tmp_path))


def test_files_of_other_tools_and_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(WeightsFileError, match="it is a GGUF file: convert it"):
        read_tensors(tmp_path / "x.gguf")
    with pytest.raises(WeightsFileError, match="one of 3 shards"):
        read_tensors(saved(PLAIN, tmp_path, "model-00001-of-00003.bin"))
    for head, words in (
        (b'{"metadata": {}}', "it is JSON: the index of several shards"),
        (b"\x1f\x8b\x08" + bytes(20), "packed with gzip: unpack it"),
        (bytes(64), "zeros only, as a download does that was not finished"),
    ):
        (tmp_path / "x.bin").write_bytes(head)
        with pytest.raises(WeightsFileError, match=words):
            read_tensors(tmp_path / "x.bin")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(WeightsFileError, match="a TorchScript program"):
        read_tensors(tmp_path / "script.pt")
    for mark, remedy in (("zero_to_fp32.py", "a checkpoint of DeepSpeed: run"), (".metadata", "dcp_to_torch")):
        folder = tmp_path / mark.strip(".")
        folder.mkdir()
        (folder / mark).touch()
        with pytest.raises(ValueError, match=remedy):
            find_released(folder, {"network": ["a.pt"]}, "X")


@pytest.mark.parametrize(
    "ending",
    [
        ".lora_{A}.weight",
        ".lora_{A}.default_0.weight",
        ".lora_{A}.previewer.weight",
        ".lora_{down}.weight",
        ".lora.{down}.weight",
        ".lora_linear_layer.{down}.weight",
        ".processor_lora.{down}.weight",
    ],
)
@pytest.mark.parametrize("prefix", ["", "unet."])
def test_every_spelling_of_a_lora_names_the_layer(ending: str, prefix: str) -> None:
    layer = "down_blocks.1.attentions.0.to_k"
    for letter, way in (("A", "down"), ("B", "up")):
        key = f"{prefix}{layer}{ending.replace('.processor', '').format(A=letter, down=way)}"
        assert split_key(key) == (layer, letter)
    assert split_key("unet.mid.attn1.processor.to_out_lora.up.weight") == ("mid.attn1.to_out.0", "B")
    assert split_key("conv_in.weight") is None


def test_long_lists_are_cut_with_a_count_everywhere() -> None:
    names = [f"blocks.{n}.attention.to_q.weight" for n in range(1000)]
    assert list_some(["a", "b"]) == "a, b" and list_some([]) == ""
    assert list_some(names).endswith(" more") and len(list_some(names)) < 260
    assert list_some(["x" * 999], 20) == "x" * 20 + "... (1 in all)"
    assert limited("short") == "short"
    long = limited("begin " + "x" * 9000 + " end")
    assert len(long) <= 2000 and long.startswith("begin") and long.endswith("end") and "9010 characters" in long

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(900)])

    surplus = {name: torch.zeros(1) for name in names}
    calls: list[Callable[[], object]] = [
        lambda: load_strictly(Many(), surplus, "model"),
        lambda: _raise(Failure("y" * 9000)),
        lambda: _raise(ModelError("y" * 9000)),
    ]
    for call in calls:
        with pytest.raises(
            Exception, match=r"900 missing: .* and \d+ more; 1000 unexpected: |characters in all"
        ) as error:
            call()
        assert len(str(error.value)) <= 2000


def _raise(error: Exception) -> None:
    raise error
