"""What is timed of a pipeline: its network alone for a call, all of it for an image, narrow or whole."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dpctl.latency.build import Exports
from dpctl.latency.clock import FEWEST, Clock, Precision
from dpctl.models import load_model
from dpctl.recipe import LatencyRecipe, PruneRecipe

ANY = Precision(enough=100.0, too_wide=float("inf"))


@pytest.mark.slow
@pytest.mark.parametrize("of", [pytest.param("unet", marks=pytest.mark.slow), "image"])
def test_a_text_pipeline_is_timed_narrow_beside_whole(
    saved_pipeline: Callable[[str], Path], tmp_path: Path, of: str
) -> None:
    wanted = LatencyRecipe(of=of, num_inference_steps=2, threads=1)
    exports = Exports(load_model(saved_pipeline("sd")), PruneRecipe("magnitude", latency=wanted), tmp_path)
    assert exports.rows == 2  # guidance
    whole = exports.baseline()
    assert (whole / "text_encoder").is_dir() == (of == "image")
    widths = {span.name: span.narrower(span.width, 1) for span in exports.network.spans}
    with Clock(whole, wanted, exports.rows, exports.threads, ANY) as clock:
        found = clock.time(exports.of_widths(widths))
    assert found.ratio.count == FEWEST
    assert 0 < found.latency_s < 60
    assert [path.name for path in tmp_path.iterdir() if path.name != "unpruned"] == ["network 1"]
