"""Other widths in an exported graph: its initializers replaced by the tensors of a network of the same layers.

Node names say which module a node belongs to, and its operator says which tensor of the module stands where: weights
as they are or transposed, the scale and shift that end a GroupNorm. What else depends on widths are the shapes that
reshapes aim at, the constants that a GroupNorm's statistics take for scale and shift, and the scale of an attention.
They are derived by following every shape through the graph, at its own widths and at the new ones side by side.
"""

import math
from collections.abc import Collection, Mapping
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from export.branches import take_out
from export.precision import PRECISIONS
from export.shapes import NotNarrowed, Shapes, aimed_at, node_shapes, underivable

# A batch no other axis has the length of, so that a product with it in it is recognized. Nothing is computed at it.
BATCH = 10007
# (operator, input) -> the parameter of the node's module that stands there.
PARAMETERS = {
    **dict.fromkeys((("Conv", 1), ("ConvTranspose", 1), ("Gemm", 1), ("MatMul", 1), ("Transpose", 0)), "weight"),
    **dict.fromkeys((("Conv", 2), ("ConvTranspose", 2), ("Gemm", 2), ("Add", 1), ("Add", 0)), "bias"),
    **dict.fromkeys((("LayerNormalization", 1), ("BatchNormalization", 1), ("Mul", 1), ("Gather", 0)), "weight"),
    **dict.fromkeys((("LayerNormalization", 2), ("BatchNormalization", 2)), "bias"),
}
STATISTICS = "InstanceNormalization"


def rewiden(model: ir.Model, unet: nn.Module, axes: Mapping[str, int]) -> None:
    """Replace the initializers of `model`, a graph of the same layers as `unet`, by the tensors of `unet`, in place.

    Branches that `unet` has lost go first.

    `axes` gives a length to every dynamic axis but the batch. Raises a DpctlError for a network of other layers, a
    constant that depends on widths in a way that is not known, and weights that the graph's precision cannot hold.
    """
    out = take_out(model, unet)
    _Rewidening(model, unet, {"batch": BATCH, **axes}).run(out)


class _Rewidening:
    """One pass over a graph in its order: constants replaced, shapes followed, at the old widths and at the new."""

    def __init__(self, model: ir.Model, unet: nn.Module, axes: Mapping[str, int]) -> None:
        self.model, self.graph, self.unet = model, model.graph, unet
        self.modules = dict(unet.named_modules())
        self.parameters = dict(unet.named_parameters())
        self.used: set[int] = set()
        self.old, self.new = (Shapes(model.graph, axes) for _ in range(2))
        # Of an initializer that several nodes read: what it has become, and for whom else a copy was made.
        self.originals: dict[ir.Value, Any] = {}
        self.variants: dict[ir.Value, list[ir.Value]] = {}
        # Attention -> the width of one of its heads, old and new.
        self.heads: dict[str, tuple[int, int]] = {}
        # Shapes that a graph of dynamic sizes puts together, and the lengths in them, made once each.
        self.together: dict[tuple[ir.Node, tuple[int, ...]], ir.Value] = {}
        self.lengths: dict[int, ir.Value] = {}
        self.taken = {str(node.name) for node in self.graph} | set(self.graph.initializers)

    def run(self, out: Collection[str] = ()) -> None:
        """Go over the graph; of the modules `out` nothing is there that would need their tensors."""
        for node in list(self.graph):
            read = list(node.inputs)
            for number, value in enumerate(read):
                if value is not None and value.is_initializer():
                    self._give(node, number, value, self._wanted(node, number, self._original(value)))
            if node.op_type == "Reshape":
                self._retarget(node)
            proto = node_shapes(node)
            self.old.follow(proto, node, read)
            self.new.follow(proto, node, list(node.inputs))
            self._declare(node)
        RemoveUnusedNodesPass()(self.model)  # shapes that nothing is of any more
        unused = [
            name
            for name, value in self.parameters.items()
            if id(value) not in self.used and name.rpartition(".")[0] not in out
        ]
        if unused:
            got = f"{unused[0]} has no place in the graph; {len(unused)} tensors have none"
            raise NotNarrowed(got, "the network is not of the graph's layers")

    def _module(self, node: ir.Node) -> tuple[str, nn.Module | None]:
        name = str(node.name).rpartition("/")[0]
        return name, self.modules.get(name) if name else None

    def _free(self, name: str) -> str:
        """Return a name that nothing has yet: the graph may have been narrowed before."""
        free = next(
            each for number in count(1) if (each := f"{name}_{number}" if number > 1 else name) not in self.taken
        )
        self.taken.add(free)
        return free

    def _original(self, value: ir.Value) -> Any:
        """Return an initializer's array as it was in the graph."""
        if value not in self.originals:
            self.originals[value] = value.const_value.numpy()  # type: ignore[union-attr]
        return self.originals[value]

    def _wanted(self, node: ir.Node, number: int, old: Any) -> Any:
        """Return the array that stands at an input of a node at the new widths."""
        if old.dtype.kind in "iub":
            return self._target(node, old) if (node.op_type, number) == ("Reshape", 1) else old
        name, module = self._module(node)
        if node.op_type == STATISTICS and isinstance(module, nn.GroupNorm):
            return self._uniform(node, old, module.num_groups)
        if node.op_type == "BatchNormalization" and number > 2 and isinstance(module, nn.GroupNorm):
            return self._uniform(node, old, module.num_channels)
        parameter = self._parameter(node, number, name, module, old)
        if parameter is not None:
            return self._fitted(node, parameter, old)
        if old.size == 1 and node.op_type == "Mul" and name in self.heads:
            return _rescaled(old, *self.heads[name])
        return old

    def _uniform(self, node: ir.Node, old: Any, width: int) -> Any:
        if (old != old.flat[0]).any():
            raise underivable(node, "a constant per channel that is no parameter of the norm")
        return np.full((width,), old.flat[0], old.dtype)

    def _parameter(self, node: ir.Node, number: int, name: str, module: nn.Module | None, old: Any) -> Any:
        """Return the tensor of the network that stands at an input, laid out as there; None where there is none."""
        role = PARAMETERS.get((node.op_type, number))
        if role and name and module is None and old.size > 1:
            raise underivable(node, "the network has no such module")
        found = self.parameters.get(f"{name}.{role}") if module is not None and role else None
        if found is None or (found.ndim == 1 and old.size == 1 != found.numel()):
            # An operator that was merged with another may have lost its module, but not the tensor its name.
            found = self.parameters.get(str(node.inputs[number].name))  # type: ignore[union-attr]
            if found is None:
                return None
        self.used.add(id(found))
        values = found.detach().float().cpu().numpy()
        gemm = node.op_type == "Gemm" and number == 1 and not node.attributes.get_int("transB", 0)
        return values.T if node.op_type == "MatMul" or gemm else values

    def _fitted(self, node: ir.Node, values: Any, old: Any) -> Any:
        """Return a parameter with as many axes and of the type of what it replaces."""
        if values.ndim == 1 and old.ndim > 1:  # one value per channel, or per frequency
            wide = [axis for axis in range(old.ndim) if old.shape[axis] > 1] or [old.ndim - 1]
            if len(wide) == 1:
                values = values.reshape([-1 if axis == wide[0] else 1 for axis in range(old.ndim)])
        if values.ndim != old.ndim:
            raise underivable(node, f"{list(values.shape)} in the place of {list(old.shape)}")
        kind = next((kind for kind in PRECISIONS.values() if old.dtype == kind.numpy), None)
        with np.errstate(over="ignore"):
            found = values.astype(old.dtype)
        if kind is None or not np.isfinite(found.astype(np.float32)).all():
            raise underivable(node, f"weights that {old.dtype} cannot hold")
        return found

    def _target(self, node: ir.Node, old: Any) -> Any:
        """Return the shape that a reshape aims at, at the new widths; -1 and 0 stay what they are."""
        data = node.inputs[0]
        assert data is not None
        given, found = self.old.of(data), self.new.of(data)
        wanted = self._reshaped(node, given, found, aimed_at(given, old))
        return np.array([n if n <= 0 else w for n, w in zip(old.tolist(), wanted, strict=True)], old.dtype)

    def _retarget(self, node: ir.Node) -> None:
        """Let a reshape to a shape that is put together of lengths, some of them constants, read one of its own."""
        target = node.inputs[1]
        concat = target.producer() if target is not None else None
        if target is None or concat is None or concat.op_type != "Concat":
            return
        old, new = self.old.known(target), self.new.known(target)
        if old is None or new is None:
            raise underivable(node, "a shape that is not computed of shapes alone")
        wanted = self._target(node, old).tolist()
        if new.tolist() == wanted:
            return
        if len(concat.inputs) != len(wanted):
            raise underivable(node, f"a shape of {len(wanted)} axes in {len(concat.inputs)} parts")
        parts = [self._length(node, value, size) for value, size in zip(concat.inputs, wanted, strict=True)]
        key = concat, tuple(wanted)
        if key not in self.together:
            made = ir.node("Concat", parts, attributes={"axis": 0}, name=self._free(f"{node.name}.shape"))
            made.outputs[0].name, made.outputs[0].shape, made.outputs[0].type = made.name, target.shape, target.type
            self.graph.insert_before(node, made)
            self.new.constant(made.outputs[0], np.array(wanted, np.int64))
            self.together[key] = made.outputs[0]
        node.replace_input_with(1, self.together[key])

    def _length(self, node: ir.Node, part: ir.Value | None, size: int) -> ir.Value:
        """Return what stands for one length of a shape: the part that does already, or a constant."""
        assert part is not None
        if self.new.known(part).tolist() == [size]:
            return part
        if not part.is_initializer():
            raise underivable(node, f"a computed length of {self.new.known(part)} that should be {size}")
        if size not in self.lengths:
            value = _filled(ir.Value(name=self._free(f"length.{size}")), np.array([size], np.int64))
            self.graph.register_initializer(value)
            self.new.constant(value, np.array([size], np.int64))
            self.lengths[size] = value
        return self.lengths[size]

    def _reshaped(
        self, node: ir.Node, given: tuple[int, ...], found: tuple[int, ...], aimed: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return what becomes of the shape `found`, where `given` becomes `aimed`."""
        name, module = self._module(node)
        if isinstance(module, nn.GroupNorm):
            if _gives_statistics(node):
                return found[0], module.num_groups, math.prod(found[1:]) // module.num_groups
            return found[0], module.num_channels, *aimed[2:]
        if math.prod(given) != math.prod(aimed):
            raise underivable(node, f"{list(given)} -> {list(aimed)}, which holds for one batch size alone")
        wanted: list[int] = []
        for before, after in _factors(given, aimed):
            sizes = tuple(found[axis] for axis in before)
            wanted += self._split(node, name, sizes, tuple(given[axis] for axis in before), after)
        return tuple(wanted)

    def _split(
        self, node: ir.Node, name: str, found: tuple[int, ...], given: tuple[int, ...], aimed: tuple[int, ...]
    ) -> list[int]:
        """Return what the axes `found` become, which were `given` and became `aimed`: the products are the same."""
        product = math.prod(found)
        if product == math.prod(given):
            return list(aimed)
        axes = [axis for axis, size in enumerate(aimed) if size != BATCH]
        free = [axis for axis in axes if aimed[axis] != 1]
        rest = product // math.prod(size for size in aimed if size == BATCH)
        wanted = list(aimed)
        if len(axes) == 2 and type(self.modules.get(name)).__name__ == "Attention":
            number = int(self.modules[name].heads)
            wanted[axes[0]], wanted[axes[1]] = number, rest // number
            self.heads.setdefault(name, (aimed[axes[1]], rest // number))
        elif len(free) == 1:
            wanted[free[0]] = rest
        if math.prod(wanted) != product:
            raise underivable(node, f"{list(given)} -> {list(aimed)}, where it is {list(found)} now")
        return wanted

    def _give(self, node: ir.Node, number: int, value: ir.Value, array: Any) -> None:
        """Let a node read `array` in the place of an initializer; nodes that want the same share it."""
        self.old.constant(value, self.originals[value])
        known = self.variants.setdefault(value, [])
        same = next((each for each in known if _same(each.const_value.numpy(), array)), None)  # type: ignore[union-attr]
        if same is None:
            same = value
            if known:
                same = ir.Value(name=self._free(f"{node.name}.{number}.narrow"))
                self.graph.register_initializer(_filled(same, array))
            elif array is not self.originals[value]:
                _filled(value, array)
            known.append(same)
        node.replace_input_with(number, same)
        self.new.constant(same, array)

    def _declare(self, node: ir.Node) -> None:
        """Give a node's outputs their new shapes; a dynamic axis that is another multiple now loses its name."""
        for value in node.outputs:
            if value.shape is None:
                continue
            sizes = zip(value.shape, self.old.of(value), self.new.of(value), strict=True)
            value.shape = ir.Shape(
                [new if isinstance(axis, int) else axis if old == new else None for axis, old, new in sizes]
            )


def _gives_statistics(node: ir.Node) -> bool:
    """Tell whether the statistics of a norm are taken of what a node gives, in its type or another."""
    users = [use.node for use in node.outputs[0].uses()]
    return any(user.op_type == STATISTICS or (user.op_type == "Cast" and _gives_statistics(user)) for user in users)


def _factors(given: tuple[int, ...], aimed: tuple[int, ...]) -> list[tuple[list[int], tuple[int, ...]]]:
    """Return the finest parts of a reshape: axes of what is given, and the lengths that they become."""
    parts: list[tuple[list[int], tuple[int, ...]]] = []
    left, right = 0, 0
    while left < len(given) or right < len(aimed):
        start, end = left, right
        left, right = min(left + 1, len(given)), min(right + 1, len(aimed))
        while (before := math.prod(given[start:left])) != (after := math.prod(aimed[end:right])):
            if before < after:
                left += 1
            else:
                right += 1
        parts.append((list(range(start, left)), aimed[end:right]))
    return parts


def _rescaled(old: Any, before: int, after: int) -> Any:
    """Return the scale of an attention for another width of its heads: 1/sqrt(d), or its root on both factors."""
    for scale in (_root_of_scale, _scale):
        if np.allclose(old.astype(np.float32), scale(before), rtol=4 * float(np.finfo(np.float32).eps)):
            return np.full_like(old, scale(after).astype(old.dtype))
        if (old == scale(before).astype(old.dtype)).all():
            return np.full_like(old, scale(after).astype(old.dtype))
    return old


def _scale(width: int) -> Any:
    return np.float32(1) / np.sqrt(np.float32(width))


def _root_of_scale(width: int) -> Any:
    return np.sqrt(_scale(width))


def _same(one: Any, other: Any) -> bool:
    return one is other or (one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all()))


def _filled(value: ir.Value, array: Any) -> ir.Value:
    dtype = value.const_value.dtype if value.const_value is not None else None
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), dtype=dtype, name=value.name)
    value.const_value, value.shape, value.type = tensor, ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    return value
