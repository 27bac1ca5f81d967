"""UNet2DModel and UNet2DConditionModel with layers that may each have a width of their own.

This file travels with every pruned model: stock diffusers loads the directory without dpctl installed, through
``DiffusionPipeline.from_pretrained(dir, trust_remote_code=True)`` or ``AutoModel.from_pretrained(dir + "/unet",
trust_remote_code=True)``. It imports torch and diffusers only. Made by dpctl (Apache-2.0).
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

Channels = dict[str, list[int]]
# Of a transformer block: which norm stands before each of its branches.
NORMS = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}
# Kind of a block with a residual branch -> the layer that gives what the branch adds.
LAST = {"ResnetBlock2D": "conv2", "Attention": "to_out.0", "FeedForward": "net.2", "Transformer2DModel": "proj_out"}


class _Travelling(ModelMixin, ConfigMixin):
    """What both classes do so that stock diffusers loads and saves them with nothing but this file."""

    _auto_class = "AutoModel"

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Split a config as stock does, without its warning about the base values that stand in `base_config` too."""
        told = {*config_dict.get("base_config", {}), "auto_map"}
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in told}, **kwargs)

    # The explicit signature of stock's method: pipelines look at it to decide what they may pass on.
    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as stock diffusers does and put this source file beside the weights, so that it loads again."""
        folder = Path(save_directory)
        target = folder / "pruned_unet.py"
        # Before stock's part, which may push the folder to the Hub; a file in its place is stock's to refuse.
        if is_main_process and not folder.is_file() and not (target.exists() and target.samefile(__file__)):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(__file__, target)
        super().save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
            **kwargs,
        )


class PrunedUNet2DModel(_Travelling, UNet2DModel):
    """UNet2DModel(**base_config) with the layers named in `channels` narrowed.

    `base_config` is the unpruned model's config (so `config.block_out_channels` stays the unpruned value);
    `channels` maps a module's name to [in, out] of a convolution, linear layer or embedding, to [width] of a norm or,
    of a group norm that has another number of groups, [width, groups], to [heads] of an attention that has fewer, and
    to [0, width] of a block whose residual branch is gone, with the width of what passes by it.
    """

    # Stock diffusers names a custom component by its class's module: this must be the name of the file beside the
    # weights, both in model_index.json and in auto_map, wherever the class was imported from.
    __module__ = "pruned_unet"

    @register_to_config
    def __init__(self, base_config: dict[str, Any], channels: Channels) -> None:
        super().__init__(**_arguments(base_config))
        narrow(self, channels)


class PrunedUNet2DConditionModel(_Travelling, UNet2DConditionModel):
    """UNet2DConditionModel(**base_config) with the layers named in `channels` narrowed; as PrunedUNet2DModel."""

    __module__ = "pruned_unet"

    @register_to_config
    def __init__(self, base_config: dict[str, Any], channels: Channels) -> None:
        super().__init__(**_arguments(base_config))
        narrow(self, channels)

    # The explicit signature of stock's method.
    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA as stock diffusers does.

        Raises a ValueError, before anything is attached, for one whose matrices are of other widths than the layers:
        stock's way fails half-way there and leaves its layers in the network.
        """
        lora = pretrained_model_name_or_path_or_dict
        if not isinstance(lora, dict):
            lora, kwargs = _fetched(lora, kwargs)
        _require_fitting(self, lora, prefix)
        super().load_lora_adapter(lora, prefix=prefix, hotswap=hotswap, **kwargs)


def _fetched(source: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Read a LoRA file or download it as stock does; return it with the options that are not about that."""
    from diffusers.loaders.lora_base import _fetch_state_dict  # private: only who loads a file depends on it

    names = ("weight_name", "use_safetensors", "local_files_only", "cache_dir", "force_download", "proxies", "token")
    where = {name: options.get(name) for name in (*names, "revision", "subfolder", "metadata")}
    where["force_download"] = bool(where["force_download"])
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    lora, metadata = _fetch_state_dict(source, user_agent=agent, allow_pickle=False, **where)
    return lora, {name: value for name, value in options.items() if name not in where} | {"metadata": metadata}


def _require_fitting(unet: nn.Module, lora: dict[str, Any], prefix: str | None) -> None:
    """Raise a ValueError unless the matrices of a LoRA fit the layers that they are for; other keys are stock's."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    start = f"{prefix}." if prefix else ""
    own = {key.removeprefix(start): value for key, value in lora.items() if key.startswith(start)}
    layers = dict(unet.named_modules())
    wrong = []
    for key, matrix in convert_unet_state_dict_to_peft(own).items():
        name, _, which = key.removesuffix(".weight").rpartition(".")
        layer = getattr(layers.get(name), "base_layer", layers.get(name))  # below an adapter that is there already
        if which not in ("lora_A", "lora_B") or matrix.ndim < 2 or not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        before, after = widths(layer)
        fits = matrix.shape[1] == before if which == "lora_A" else matrix.shape[0] == after
        if not fits:
            wrong.append(f"{key} is {list(matrix.shape)}, the layer's weight {list(layer.weight.shape)}")
    if wrong:
        raise ValueError(
            "the LoRA does not fit this pruned network: it was made for other widths, those of the base model\n"
            f"  got: {wrong[0]}; {len(wrong)} matrices do not fit\n"
            "  do:  slice it. kept.safetensors beside the network's weights holds the positions that each layer keeps: "
            "lora_A (down) keeps <layer>.in of its input axis, lora_B (up) <layer>.out of its output axis; "
            "slice_lora of dpctl.prune.adapters does that"
        )


def _arguments(base_config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in base_config.items() if not name.startswith("_")}


def narrow(unet: nn.Module, channels: Channels) -> None:
    """Replace every layer named in `channels` by one of the same kind with these widths; weights are fresh.

    An attention named there gets its number of heads, and a block without a branch becomes what is left of it.
    """
    for name, widths in channels.items():
        if widths[0] == 0:
            _remove(unet, name, widths[1])
    for name, widths in channels.items():
        module: Any = unet.get_submodule(name)
        if type(module).__name__ == "Attention":
            module.heads = module.sliceable_head_dim = widths[0]
            continue
        parent_name, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent_name), leaf, _resized(module, list(widths)))
    for module in unet.modules():
        _fit_attributes(module)


class Removed(nn.Module):
    """What is left of a block whose residual branch has no channels: the constant that it still adds, a bias.

    A block that adds its own residual gives its shortcut and the `bias` [C, 1, 1], over `factor`; one whose residual is
    added around it gives the `bias` [C] alone. `last` is the layer, in the block as it was, that the bias is from.
    """

    def __init__(
        self,
        last: str,
        shape: tuple[int, ...],
        shortcut: nn.Module | None = None,
        factor: float = 1.0,
        alone: bool = False,
        as_tuple: bool = False,
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))
        self.last, self.conv_shortcut, self.factor = last, shortcut, factor
        self.alone, self.as_tuple = alone, as_tuple

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take what the block took; of that only the first counts."""
        passed = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        output = self.constant(passed) if self.alone else passed + self.constant(passed)
        if self.factor != 1.0:
            output = output / self.factor
        return (output,) if self.as_tuple else output

    def constant(self, passed: torch.Tensor) -> torch.Tensor:
        """Return what the branch adds, which broadcasts to what passes by."""
        return self.bias.to(passed.dtype)


def _remove(unet: nn.Module, name: str, width: int) -> None:
    """Put what is left of a block in its place, and nothing in the place of a norm that only it reads."""
    module: Any = unet.get_submodule(name)
    parent_name, _, leaf = name.rpartition(".")
    parent, kind = unet.get_submodule(parent_name), type(module).__name__
    if kind not in LAST:
        raise TypeError(f"a {kind} has no branch that can go")
    last, image = LAST[kind], (width, 1, 1)
    if kind == "ResnetBlock2D":
        left = Removed(last, image, shortcut=module.conv_shortcut, factor=module.output_scale_factor)
    elif kind == "Transformer2DModel":
        left = Removed(last, image, as_tuple=True)
    elif type(parent).__name__ == "BasicTransformerBlock":
        left = Removed(last, (width,), alone=True)
        setattr(parent, NORMS[leaf], nn.Identity())
    else:
        left = Removed(last, image, factor=module.rescale_output_factor)
    setattr(parent, leaf, left)


def _resized(layer: nn.Module, widths: list[int]) -> nn.Module:
    if isinstance(layer, Removed):
        return layer
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(
            widths[0],
            widths[1],
            kernel_size=layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            bias=layer.bias is not None,
        )
    if isinstance(layer, nn.Linear):
        return nn.Linear(widths[0], widths[1], bias=layer.bias is not None)
    if isinstance(layer, nn.GroupNorm):
        groups = widths[1] if len(widths) > 1 else layer.num_groups
        return nn.GroupNorm(groups, widths[0], eps=layer.eps, affine=layer.affine)
    if isinstance(layer, nn.LayerNorm):
        return nn.LayerNorm(widths[0], eps=layer.eps, elementwise_affine=layer.elementwise_affine)
    if isinstance(layer, nn.Embedding):
        return nn.Embedding(widths[0], widths[1])
    raise TypeError(f"cannot narrow a {type(layer).__name__}")


def _fit_attributes(module: Any) -> None:
    """Set what diffusers' blocks remember of their widths beside the layers themselves."""
    kind = type(module).__name__
    if kind in ("Upsample2D", "Downsample2D"):
        conv = getattr(module, "conv", None) or getattr(module, "Conv2d_0", None)
        if isinstance(conv, nn.Conv2d):  # some downsamplers hold an AvgPool2d, which has no width
            module.channels, module.out_channels = conv.in_channels, conv.out_channels
    elif kind == "ResnetBlock2D":
        module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
        for resampler in (module.upsample, module.downsample):  # without a convolution, at the block's input
            if isinstance(resampler, nn.Module):
                resampler.channels = resampler.out_channels = module.in_channels
    elif kind == "Attention":
        module.inner_dim = module.inner_kv_dim = module.to_q.out_features
        module.query_dim = module.to_q.in_features
        module.out_dim = module.to_out[0].out_features
        # Attention processors without scaled_dot_product_attention read this; the other kind computes the same.
        module.scale = (module.inner_dim // module.heads) ** -0.5


def widths(layer: nn.Module) -> list[int]:
    """Return [in, out] or [width] of a layer. Raises TypeError for other kinds of modules."""
    if isinstance(layer, nn.Conv2d):
        return [layer.in_channels, layer.out_channels]
    if isinstance(layer, nn.Linear):
        return [layer.in_features, layer.out_features]
    if isinstance(layer, nn.Embedding):
        return [layer.num_embeddings, layer.embedding_dim]
    if isinstance(layer, nn.GroupNorm):
        return [layer.num_channels]
    if isinstance(layer, nn.LayerNorm):
        return [layer.normalized_shape[0]]
    if isinstance(layer, Removed):
        return [0, layer.bias.shape[0]]
    raise TypeError(f"a {type(layer).__name__} has no widths")
