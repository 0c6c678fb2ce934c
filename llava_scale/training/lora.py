"""Low-rank adapters on chosen linear layers through peft: LoRA, DoRA, and QLoRA where bitsandbytes is installed.

LoRA (Hu et al., arXiv:2106.09685): ``W x + alpha / r * B A x``. DoRA (Liu et al., arXiv:2402.09353) scales the rows of
``W + alpha / r * B A`` to learned lengths. QLoRA (Dettmers et al., arXiv:2305.14314) holds ``W`` in four bits.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_scale.errors import ConfigError, MissingExtraError
from llava_scale.training.engine import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llava_scale.config.train import LoraConfig

ADAPTER = "default"
_OWN = re.compile(rf"\.(lora_(?:A|B|magnitude_vector))\.{ADAPTER}\.weight$")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return _OWN.search(name) is not None


def add_adapters(model: nn.Module, config: LoraConfig, device: torch.device) -> list[str]:
    """Put adapters beside linear layers of ``model``, in place; return the names of these layers.

    The layers are those whose name ``config.targets`` matches from its start, or without targets every linear layer
    in the blocks of the language model. Adapters are float32, draw from the global generator, and start without
    effect.

    Raises:
        ConfigError: the targets match nothing, or something that is no linear layer.
        MissingExtraError: peft, or bitsandbytes for ``config.quantize``, is not installed.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise MissingExtraError("peft", "lora") from None
    names = _targets(model, config.targets)
    if config.quantize:
        _quantize(model, names, device)
    options = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules=names,
    )
    inject_adapter_in_model(options, model, adapter_name=ADAPTER)
    next(layer for _, layer in _adapted(model)).llava_scale_options = options
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
    return names


def merged_state(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State of ``model`` with its adapters merged into their layers, by the names that it had without them.

    Args:
        model: With adapters.
        state: Its state with whole tensors, where the model itself holds parts; its own if None.
    """
    whole = model.state_dict() if state is None else state
    merged = {name: value for name, value in whole.items() if ".lora_" not in name and ".base_layer." not in name}
    for place, layer in _adapted(model):
        base = layer.get_base_layer()
        weight = _merge(whole, place, layer, base)
        merged[f"{place}.weight"] = weight
        if base.bias is not None:
            merged[f"{place}.bias"] = whole[f"{place}.base_layer.bias"]
    return merged


def save_adapters(model: nn.Module, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the adapters alone into ``folder``, for ``peft.PeftModel.from_pretrained`` on the model without them."""
    from safetensors.torch import save_file

    whole = model.state_dict() if state is None else state
    tensors = {
        "base_model.model."
        + name.replace(f".{ADAPTER}.weight", ".weight").replace(
            "lora_magnitude_vector.weight", "lora_magnitude_vector"
        ): value.detach().contiguous().cpu()
        for name, value in whole.items()
        if is_adapter(name)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    options = next(layer for _, layer in _adapted(model)).llava_scale_options
    options.save_pretrained(str(folder))


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer of ``model`` carries an adapter."""
    return next(_adapted(model), None) is not None


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield name, module


def _targets(model: nn.Module, pattern: str) -> list[str]:
    if pattern:
        try:
            rule = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"train.lora.targets: {pattern!r} is not a regular expression: {error}") from None
        names = [name for name, _ in model.named_modules() if rule.fullmatch(name)]
        other = [name for name in names if not isinstance(model.get_submodule(name), nn.Linear)]
        if not names or other:
            what = f"matches {other[0]!r}, which is no linear layer" if other else "matches no layer in full"
            raise ConfigError(f"train.lora.targets: {pattern!r} {what}; names look like {_example(model)!r}")
        return names
    inside = set(blocks_of(model.get_submodule("language_model")))
    owners = {name for name, module in model.named_modules() if module in inside}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{owner}.") for owner in owners)
    ]


def _example(model: nn.Module) -> str:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside: str = next((name for name in linear if name.startswith("language_model.")), linear[0])
    return inside


def _merge(whole: dict[str, Tensor], place: str, layer: Any, base: Any) -> Tensor:
    weight = whole[f"{place}.base_layer.weight"].detach()
    kept = weight.dtype
    if hasattr(base.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight, kept = dequantize_4bit(base.weight.data, base.weight.quant_state), base.compute_dtype
    up, down = (whole[f"{place}.lora_{side}.{ADAPTER}.weight"].detach() for side in ("B", "A"))
    total = weight.float() + layer.scaling[ADAPTER] * (up.float() @ down.float())
    lengths = whole.get(f"{place}.lora_magnitude_vector.{ADAPTER}.weight")
    if lengths is not None:
        total = total * (lengths.detach().float() / total.norm(dim=1))[:, None]
    merged: Tensor = total.to(kept)
    return merged


def _quantize(model: nn.Module, names: list[str], device: torch.device) -> None:
    """Hold the weights of linear layers in four bits (NF4 with quantised scales)."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise MissingExtraError("bitsandbytes", "qlora") from None
    for name in names:
        owner, _, last = name.rpartition(".")
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=old.weight.dtype, quant_type="nf4"
        )
        new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        new.bias = old.bias
        setattr(model.get_submodule(owner), last, new.to(device))
