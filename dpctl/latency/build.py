"""What is timed: the unpruned network, and slim ones of any widths, exported one after another."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpctl import progress
from dpctl.bench.subjects import ENGINES
from dpctl.latency.document import architecture_of
from dpctl.models import Model, load_model, save_model, unet_directory
from dpctl.prune.plan import PruningPlan, select
from dpctl.prune.surgery import kept_indices, slim
from dpctl.prune.target import trace
from dpctl.prune.unpruned import unpruned_network
from dpctl.recipe import EngineRecipe, ExportRecipe, PruneRecipe
from dpctl.signature import rows_of, sample_size
from export.engines import export_engine
from export.narrow import narrow
from export.shapes import NotNarrowed
from export.to_onnx import export_model


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
        # Of a call of the network the other components are no part: a text encoder is gigabytes to copy.
        alone = recipe.latency.of == "unet"
        self._source = replace(source, directory=unet_directory(source.directory)) if alone else source
        self._folder, self._made, self._told = folder, 0, False
        self._whole, self._backend = folder / "unpruned", recipe.latency.backend
        # Branches may be gone, whether or not this recipe takes any: a latency model knows of them.
        self.groups, self.network, _ = trace(source, replace(recipe, depth=True))
        config, wanted = {**source.unet.config, "_class_name": type(source.unet).__name__}, recipe.latency
        self.threads = wanted.threads or torch.get_num_threads()
        self.size = sample_size(source.unet.config)
        # The network's own batch: under guidance twice the images.
        self.rows = rows_of(config, (wanted.batch_size,) * 3)[1]
        self.architecture = architecture_of(source.unet)
        with torch.device("meta"):  # an unknown one is told here
            unpruned = unpruned_network(source)
        self.unpruned = self.architecture if unpruned is None else architecture_of(unpruned)
        self._recipe = ExportRecipe(precision=wanted.precision, batch=(1, wanted.batch_size, wanted.batch_size))

    def baseline(self) -> Path:
        """Export the unpruned network. Of a model that was pruned before its shape is enough, with random weights."""
        unpruned = unpruned_network(self._source)
        if unpruned is None:
            export_model(self._source, self._whole, self._recipe)
        else:
            self._export(unpruned, self._whole)
        return self._runnable(self._whole)

    def of_widths(self, widths: Mapping[str, int], stock: dict[str, Any] | None = None) -> Path:
        """Export a network of these widths, in the layout `stock` of this config; the one before it is removed.

        The unpruned network has to be exported: its graph is narrowed where that can be done, which takes seconds.
        """
        for earlier in self._folder.glob("network *"):
            shutil.rmtree(earlier)
        self._made += 1
        plan = select(self.network, self.network.alike(), widths)
        kept = kept_indices(self._source.unet, self.groups, plan)
        small = slim(self._source.unet, kept, stock, self.groups.whole)
        out = self._folder / f"network {self._made}"
        try:
            narrow(self._whole, small, out)
        except NotNarrowed as problem:  # the graph has a constant that the widths do not determine, say
            if not self._told:
                progress.say(f"{problem.failed} ({problem.got}): each is exported anew, which takes a while")
            self._told = True
            self._export(small, out)
        return self._runnable(out)

    def _export(self, unet: Any, out: Path) -> None:
        """Export a network that stands in no directory yet."""
        weights = out.with_name(f"{out.name}, weights")
        weights.mkdir()
        save_model(weights, model=self._source, unet=unet)
        export_model(load_model(weights), out, self._recipe)
        shutil.rmtree(weights)

    def _runnable(self, exported: Path) -> Path:
        """Return what the backend opens: the directory itself, or one with an engine for the GPU here."""
        if self._backend != ENGINES:
            return exported
        out = exported.with_name(f"{exported.name}, engine")
        export_engine(exported, out, EngineRecipe())
        return out
