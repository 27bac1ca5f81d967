"""Candidates of a latency target: cut from a scored model, and exported so that they can be timed."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpctl import prune as pruning
from dpctl.errors import DpctlError
from dpctl.models import Model, build_unet, load_model, save_model
from dpctl.prune import Scored
from dpctl.prune.plan import PruningPlan
from dpctl.prune.unpruned import unpruned_costs
from dpctl.recipe import ExportRecipe, PruneRecipe
from dpctl.signature import rows_of, sample_size

# How often a target below the floor is halved back towards the whole network.
REFINEMENTS = 12


@dataclass(frozen=True)
class Candidate:
    """A plan that can be built: its widths and its share of the unpruned model's MACs."""

    plan: PruningPlan
    stock: dict[str, Any] | None
    macs: float

    @property
    def widths(self) -> dict[str, int]:
        """The width of every group."""
        return self.plan.widths()


class Exports:
    """Makes what is timed, below `folder`: the unpruned model, and candidates one after another."""

    def __init__(self, source: Model, scored: Scored, recipe: PruneRecipe, folder: Path) -> None:
        import torch

        assert recipe.latency is not None
        self._source, self._scored, self._recipe, self._folder = source, scored, recipe, folder
        config = {**source.unet.config, "_class_name": type(source.unet).__name__}
        wanted = recipe.latency
        self.threads = wanted.threads or torch.get_num_threads()
        self.size = sample_size(source.unet.config)
        # The network's own batch: under guidance twice the images.
        self.rows = rows_of(config, (wanted.batch_size,) * 3)[1]
        self._export = ExportRecipe(precision=wanted.precision, batch=(1, wanted.batch_size, wanted.batch_size))
        self._unpruned_macs = unpruned_costs(source)["macs"]

    def baseline(self) -> Path:
        """Export the unpruned model. Of one that was pruned before its shape is enough, with random weights."""
        base = getattr(self._source.unet.config, "base_config", None)
        if not base:
            return self._exported(self._source, "unpruned")
        name = type(self._source.unet).__name__.removeprefix("Pruned")
        whole = self._folder / "unpruned model"
        whole.mkdir()
        save_model(whole, model=self._source, unet=build_unet({**base, "_class_name": name}).eval())
        return self._exported(load_model(whole), "unpruned")

    def at(self, macs: float) -> PruneRecipe:
        """Return the recipe of a cut to a share of the unpruned MACs."""
        return dataclasses.replace(self._recipe, latency=None, target_macs=macs)

    def cut(self, macs: float) -> Candidate | None:
        """Plan a cut to a share of the MACs, or to the least that any widths come to; None where nothing can go."""
        found = self._planned(macs)
        low, high = macs, 1.0
        for _ in range(REFINEMENTS if found is None else 0):
            middle = (low + high) / 2
            more = self._planned(middle)
            low, high = (middle, high) if more is None else (low, middle)
            found = more or found
        return found

    def _planned(self, macs: float) -> Candidate | None:
        try:
            plan, stock = self._scored.plan(self.at(macs))
        except DpctlError:  # below the floor
            return None
        return Candidate(plan, stock, self._scored.network.cost("macs", plan.widths()) / self._unpruned_macs)

    def build(self, candidate: Candidate) -> Path:
        """Cut a candidate, without compensation (its weights do not matter), and export it."""
        pruned = pruning.cut(self._scored, candidate.plan, candidate.stock, self._recipe)
        name = f"candidate {len(list(self._folder.iterdir()))}"
        pruning.write(self._folder / name, self._source, pruned, self._recipe)
        return self._exported(load_model(self._folder / name), f"{name}, exported")

    def _exported(self, model: Model, name: str) -> Path:
        from export.to_onnx import export_model

        export_model(model, self._folder / name, self._export)
        return self._folder / name
