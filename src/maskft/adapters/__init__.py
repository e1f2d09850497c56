"""Adapters on disk: packing, algebra of masks, and export into the base."""

from maskft.adapters.algebra import Combined, combine
from maskft.adapters.bank import MaskBank
from maskft.adapters.distance import Distance, Measures, distance
from maskft.adapters.files import Packed, pack

__all__ = ["Combined", "Distance", "MaskBank", "Measures", "Packed", "combine", "distance", "pack"]
