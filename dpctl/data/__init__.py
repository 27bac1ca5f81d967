"""What a network is scored and trained on: images, and batches of them with their conditions."""

from dpctl.data.batch import Batch, Pixels, TrainingSet
from dpctl.data.images import REFERENCE_IMAGES, ArrayImages, FolderImages, Images, open_data, require_pixels

__all__ = [
    "REFERENCE_IMAGES",
    "ArrayImages",
    "Batch",
    "FolderImages",
    "Images",
    "Pixels",
    "TrainingSet",
    "open_data",
    "require_pixels",
]
