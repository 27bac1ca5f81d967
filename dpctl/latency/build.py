"""What is timed: the unpruned network, and slim ones of any widths, exported one after another."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpctl.latency.sampling import alike
from dpctl.models import Model, build_unet, load_model, save_model
from dpctl.prune.plan import PruningPlan, select
from dpctl.prune.target import trace
from dpctl.recipe import ExportRecipe, PruneRecipe
from dpctl.signature import PRUNED, rows_of, sample_size


@dataclass(frozen=True)
class Candidate:
    """A plan that can be built, with its stock config in that layout, and its share of the unpruned model's MACs."""

    plan: PruningPlan
    stock: dict[str, Any] | None
    macs: float

    @property
    def widths(self) -> dict[str, int]:
        """The width of every group."""
        return self.plan.widths()


class Exports:
    """Makes what is timed, below `folder`. Which channels stay does not matter to the time, only how many."""

    def __init__(self, source: Model, recipe: PruneRecipe, folder: Path) -> None:
        import torch

        assert recipe.latency is not None
        self._source, self._folder, self._made = source, folder, 0
        self.groups, self.network, _ = trace(source, recipe)
        config, wanted = {**source.unet.config, "_class_name": type(source.unet).__name__}, recipe.latency
        self.threads = wanted.threads or torch.get_num_threads()
        self.size = sample_size(source.unet.config)
        # The network's own batch: under guidance twice the images.
        self.rows = rows_of(config, (wanted.batch_size,) * 3)[1]
        self._recipe = ExportRecipe(precision=wanted.precision, batch=(1, wanted.batch_size, wanted.batch_size))

    def baseline(self) -> Path:
        """Export the unpruned network. Of a model that was pruned before its shape is enough, with random weights."""
        base = getattr(self._source.unet.config, "base_config", None)
        if not base:
            return self._exported(self._source, "unpruned")
        name = type(self._source.unet).__name__.removeprefix(PRUNED)
        return self._saved(build_unet({**base, "_class_name": name}).eval(), "unpruned")

    def of_widths(self, widths: Mapping[str, int], stock: dict[str, Any] | None = None) -> Path:
        """Export a network of these widths, in the layout `stock` of this config; the one before it is removed."""
        from dpctl.prune.surgery import kept_indices, slim

        shutil.rmtree(self._folder / f"network {self._made}", ignore_errors=True)
        self._made += 1
        plan = select(self.network, alike(self.network), widths)
        kept = kept_indices(self._source.unet, self.groups, plan)
        return self._saved(slim(self._source.unet, kept, stock, self.groups.whole), f"network {self._made}")

    def _saved(self, unet: Any, name: str) -> Path:
        """Export a network that stands in no directory yet."""
        weights = self._folder / f"{name}, weights"
        weights.mkdir()
        save_model(weights, model=self._source, unet=unet)
        exported = self._exported(load_model(weights), name)
        shutil.rmtree(weights)
        return exported

    def _exported(self, model: Model, name: str) -> Path:
        from export.to_onnx import export_model

        export_model(model, self._folder / name, self._recipe)
        return self._folder / name
