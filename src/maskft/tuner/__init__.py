"""Mask fine-tuning as a method of PEFT. Importing this package registers it, once."""

from maskft.tuner.attach import add_saved, attach, attach_saved
from maskft.tuner.config import MaskConfig, register_gate
from maskft.tuner.layer import Linear, MaskLayer
from maskft.tuner.model import MaskModel
from maskft.tuner.peers import Peer, Targets
from maskft.tuner.precision import kept_scores
from maskft.tuner.quantized import merge_in_full_precision
from maskft.tuner.register import register
from maskft.tuner.saved import attach_adapter, merge_adapter, method_of, take_off

__all__ = [
    "Linear",
    "MaskConfig",
    "MaskLayer",
    "MaskModel",
    "Peer",
    "Targets",
    "add_saved",
    "attach",
    "attach_adapter",
    "attach_saved",
    "kept_scores",
    "merge_adapter",
    "merge_in_full_precision",
    "method_of",
    "register_gate",
    "take_off",
]

register(MaskConfig, MaskModel)
