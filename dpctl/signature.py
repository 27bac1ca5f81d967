"""The UNet's I/O contract: tensor names, dtypes, axes and the batch range (stdlib only).

An exported graph declares exactly these tensors; every engine is fed and checked by them.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpctl.errors import DpctlError

BATCH, HEIGHT, WIDTH = "batch", "height", "width"
OUTPUT = "out_sample"
# Inputs of large numbers and their fractions: multiplied with a frequency, they need all of float32.
CLOCKS = frozenset({"timestep", "time_ids"})
DTYPES = ("float32", "int64")
FAMILIES = ("UNet2DModel", "UNet2DConditionModel")
PRUNED = "Pruned"
# The text encoders' length in the Stable Diffusion family (CLIP); of other lengths the cost is a little different.
TOKENS = 77
# The longest axis that TensorRT takes.
LONGEST = 2**31 - 1


@dataclass(frozen=True)
class Tensor:
    """One input or output; an axis is a fixed size or the name of a dynamic one."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]

    def at(self, batch: int, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Return the concrete shape at a batch size and, where height and width are dynamic, at a size (H, W)."""
        height, width = size or (None, None)
        axes = {HEIGHT: height, WIDTH: width}
        found = tuple(
            (axes.get(axis) if axis in axes else batch) if isinstance(axis, str) else axis for axis in self.shape
        )
        if None in found:
            raise ValueError(f"{self.name} has a dynamic size: {self.shape}")
        return typing.cast(tuple[int, ...], found)


@dataclass(frozen=True)
class Sizes:
    """What height and width, each by itself, may be: (min, opt, max), and what they are multiples of."""

    bounds: tuple[int, int, int]
    step: int = 1

    def __post_init__(self) -> None:
        low, best, high = self.bounds
        _refuse_longer(high, "dynamic-size")
        if not 1 <= low <= best <= high or any(bound % self.step for bound in self.bounds):
            raise DpctlError(
                f"the sizes are not multiples of {self.step} with min <= opt <= max",
                f"{low},{best},{high}",
                f"give them as MIN,OPT,MAX of the network's own pixels, in multiples of {self.step}",
            )

    def __contains__(self, size: int) -> bool:
        return self.bounds[0] <= size <= self.bounds[2] and size % self.step == 0


@dataclass(frozen=True)
class Signature:
    """Inputs in the order of the graph, outputs, (min, opt, max) of the batch axis, and the sizes where dynamic."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batch: tuple[int, int, int]
    sizes: Sizes | None = None

    def __post_init__(self) -> None:
        check_batch(self.batch)

    def shape(self, tensor: Tensor, batch: int, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Return the shape of one of its tensors at a batch size and a size (H, W), by default the best one."""
        best = (self.sizes.bounds[1],) * 2 if self.sizes else None
        return tensor.at(batch, size or best)

    def bounds(self, tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the smallest, the best and the largest shape of one of its tensors: an optimization profile."""
        sizes = self.sizes.bounds if self.sizes else (None,) * 3
        low, best, high = (
            tensor.at(batch, (size, size) if size else None) for batch, size in zip(self.batch, sizes, strict=True)
        )
        return low, best, high

    def input(self, name: str) -> Tensor:
        """Return the input called `name`."""
        return next(tensor for tensor in self.inputs if tensor.name == name)

    def check(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the batch size of inputs of these shapes; a DpctlError says what does not fit the contract."""
        wanted = {tensor.name: tensor for tensor in self.inputs}
        if shapes.keys() != wanted.keys():
            raise DpctlError("the network takes other inputs", ", ".join(shapes), f"give exactly: {', '.join(wanted)}")
        first = shapes[self.inputs[0].name]
        batch = first[0] if first else 0
        low, _, high = self.batch
        if not low <= batch <= high:
            raise DpctlError(
                "the batch is outside the exported range",
                f"{batch}; exported for {low} to {high}",
                "use batches of that size, or export again with another --batch MIN,OPT,MAX",
            )
        size = self._size(first)
        for name, shape in shapes.items():
            expected = wanted[name].at(batch, size)
            if tuple(shape) != expected:
                raise DpctlError(f"the input {name} has another shape", f"{list(shape)}", f"give {list(expected)}")
        return batch

    def _size(self, sample: Sequence[int]) -> tuple[int, int] | None:
        """Return the size of a sample of this shape where it is dynamic; a DpctlError where it is out of range."""
        if self.sizes is None:
            return None
        height, width = sample[-2:] if len(sample) == 4 else (0, 0)
        if height not in self.sizes or width not in self.sizes:
            low, _, high = self.sizes.bounds
            got = f"{height}x{width}; exported for {low} to {high} in multiples of {self.sizes.step}"
            raise DpctlError(
                "the size is outside the exported range", got, "use such sizes, or export again with --dynamic-size"
            )
        return height, width

    def to_json(self) -> dict[str, Any]:
        """Return the signature as plain JSON values."""
        plain = asdict(self)
        for tensor in (*plain["inputs"], *plain["outputs"]):
            tensor["shape"] = list(tensor["shape"])
        sizes = {"bounds": list(self.sizes.bounds), "step": self.sizes.step} if self.sizes else None
        return {
            "inputs": list(plain["inputs"]),
            "outputs": list(plain["outputs"]),
            "batch": list(self.batch),
            **({"sizes": sizes} if sizes else {}),
        }

    @classmethod
    def from_json(cls, values: Any) -> "Signature":
        """Read what `to_json` wrote, strictly: anything else is a DpctlError."""
        try:
            inputs, outputs = (tuple(_tensor(tensor) for tensor in values[side]) for side in ("inputs", "outputs"))
            batch, sizes = _bounds(values["batch"]), values.get("sizes")
            if not (inputs and outputs and len(values) == 3 + (sizes is not None)):
                raise ValueError("entries missing or unknown")
            found = Sizes(_bounds(sizes["bounds"]), _size(sizes["step"])) if sizes is not None else None
        except (KeyError, TypeError, ValueError) as problem:
            got = f"{type(problem).__name__}: {problem}"
            raise DpctlError("the artifact's signature cannot be read", got, "export the model again") from None
        return cls(inputs, outputs, batch, found)


def check_batch(batch: tuple[int, int, int]) -> None:
    """Raise a DpctlError unless 1 <= min <= opt <= max, and max is a length that an axis may have."""
    low, best, high = batch
    _refuse_longer(high, "batch")
    if not 1 <= low <= best <= high:
        raise DpctlError(
            "the batch range is not 1 <= min <= opt <= max",
            f"{low},{best},{high}",
            "give it as MIN,OPT,MAX, e.g. 1,8,64",
        )


def _refuse_longer(high: int, option: str) -> None:
    if high > LONGEST:
        raise DpctlError("no axis is so long", f"{high} for --{option}", f"give at most {LONGEST}")


def of_unet(
    config: Mapping[str, Any],
    batch: tuple[int, int, int] = (1, 8, 64),
    sizes: tuple[int, int, int] | None = None,
) -> Signature:
    """Return the signature of a UNet (pruned or not) from its config.json, defaults included.

    `timestep` is float32, since schedulers such as Euler give fractional ones. Height and width are the config's own,
    or dynamic within the bounds `sizes`. Raises a DpctlError for an impossible range and for a network whose inputs
    this contract does not name.
    """
    family = str(config.get("_class_name")).removeprefix(PRUNED)
    if family not in FAMILIES:
        raise DpctlError("this kind of network is not supported yet", family, f"bring one of: {', '.join(FAMILIES)}")
    height, width = sample_size(config) if sizes is None else (HEIGHT, WIDTH)
    inputs = [
        Tensor("sample", "float32", (BATCH, config["in_channels"], height, width)),
        Tensor("timestep", "float32", (BATCH,)),
    ]
    if config.get("class_embed_type") is not None:
        raise _unknown(config, "class_embed_type", "num_class_embeds, or none")
    if config.get("num_class_embeds") is not None:
        inputs.append(Tensor("class_labels", "int64", (BATCH,)))
    if family == "UNet2DConditionModel":
        inputs += _conditions(config)
    output = Tensor(OUTPUT, "float32", (BATCH, config["out_channels"], height, width))
    # Every level but the last halves the picture, and what comes up again must fit what went down.
    step = 2 ** (len(config.get("block_out_channels", ())) - 1) if sizes else 1
    return Signature(tuple(inputs), (output,), batch, Sizes(sizes, step) if sizes else None)


def rows_of(config: Mapping[str, Any], images: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the range of the UNet's batch for a range of images (min, opt, max).

    Classifier-free guidance asks a text-conditional network for two rows per image; without guidance it is one, and
    one is enough where the strength of guidance is an input of the network (latent consistency models).
    """
    low, best, high = images
    guided = config.get("cross_attention_dim") is not None and config.get("time_cond_proj_dim") is None
    return (low, 2 * best, 2 * high) if guided else images


def images_of(config: Mapping[str, Any], rows: int) -> int:
    """Return how many images fit into a batch of the UNet: the inverse of `rows_of`."""
    return rows // rows_of(config, (1, 1, 1))[2]


def sample_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return (height, width) of a config's `sample_size`, which diffusers keeps as a number or a pair."""
    size = config.get("sample_size")
    if not size:
        raise DpctlError(
            "the network's config does not say its image size",
            f"sample_size {size!r}",
            "set sample_size in its config.json",
        )
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def unet_arguments(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that diffusers' UNets want for inputs by their names in the signature."""
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    plain = {name: value for name, value in inputs.items() if name not in added}
    return plain | {"added_cond_kwargs": added} if added else plain


def _conditions(config: Mapping[str, Any]) -> list[Tensor]:
    """Return the inputs that a UNet2DConditionModel has beside image, timestep and class."""
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    if not isinstance(width, int):
        width = width[0]
    found = [Tensor("encoder_hidden_states", "float32", (BATCH, TOKENS, width))]
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise _unknown(config, "encoder_hid_dim_type", "none, or text_proj")
    if config.get("attention_type") not in (None, "default"):
        raise _unknown(config, "attention_type", "attention_type default (no GLIGEN)")
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        found += [Tensor("text_embeds", "float32", (BATCH, pooled)), Tensor("time_ids", "float32", (BATCH, 6))]
    elif config.get("addition_embed_type") is not None:
        raise _unknown(config, "addition_embed_type", "none, or text_time")
    if config.get("time_cond_proj_dim") is not None:
        found.append(Tensor("timestep_cond", "float32", (BATCH, config["time_cond_proj_dim"])))
    return found


def _unknown(config: Mapping[str, Any], entry: str, known: str) -> DpctlError:
    return DpctlError(
        "the network has an input that is not supported", f"{entry} {config[entry]!r}", f"bring a model with {known}"
    )


def _tensor(values: Any) -> Tensor:
    name, dtype, shape = values["name"], values["dtype"], values["shape"]
    if not (isinstance(name, str) and name and dtype in DTYPES and isinstance(shape, list) and len(values) == 3):
        raise ValueError(f"not a tensor: {values}")
    return Tensor(name, dtype, tuple(axis if isinstance(axis, str) and axis else _size(axis) for axis in shape))


def _bounds(values: Any) -> tuple[int, int, int]:
    low, best, high = (_size(bound) for bound in values)
    return low, best, high


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"not a size: {value!r}")
    return value
