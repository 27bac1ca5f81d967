"""Turn a model into what a runtime runs, and show that it is the same."""

from export.to_onnx import export_model
from export.verify import verify_directory

__all__ = ["export_model", "verify_directory"]
