"""What a network is scored and trained on: images, and batches of them with their conditions."""

from dpctl.data.archive import ArrayImages
from dpctl.data.batch import Batch, Labelled, Pixels, TrainingSet
from dpctl.data.folder import FolderImages
from dpctl.data.images import Images, Pictures, View, draw_views, picture, save_picture, to_bytes
from dpctl.data.prompts import read_prompts
from dpctl.data.sources import REFERENCE_IMAGES, open_data, require_pixels
from dpctl.data.training import open_pixels, open_training_set, require_trainable

__all__ = [
    "REFERENCE_IMAGES",
    "ArrayImages",
    "Batch",
    "FolderImages",
    "Images",
    "Labelled",
    "Pictures",
    "Pixels",
    "TrainingSet",
    "View",
    "draw_views",
    "open_data",
    "open_pixels",
    "open_training_set",
    "read_prompts",
    "picture",
    "require_pixels",
    "save_picture",
    "require_trainable",
    "to_bytes",
]
