"""Data: reading, checking, splitting and batching of conversations with images."""

from maskft.data.checks import Summary, check
from maskft.data.collate import IGNORED, Collator, answer, prompt
from maskft.data.easy_vqa import load_easy_vqa
from maskft.data.formats import Format, read, scan
from maskft.data.images import image_key, open_image
from maskft.data.schema import COLUMNS, FEATURES, to_dataset
from maskft.data.split import leaked_images, split_by_image

__all__ = [
    "COLUMNS",
    "FEATURES",
    "IGNORED",
    "Collator",
    "Format",
    "Summary",
    "answer",
    "check",
    "image_key",
    "leaked_images",
    "load_easy_vqa",
    "open_image",
    "prompt",
    "read",
    "scan",
    "split_by_image",
    "to_dataset",
]
