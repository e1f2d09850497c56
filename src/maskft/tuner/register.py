"""Makes MASK a method of PEFT. The only place that reaches into PEFT's closed enum of method names."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "MASK"


def mask_peft_type() -> Any:
    """The enum member PeftType.MASK, added on the first call.

    PEFT looks methods up in open tables but names them by an enum without a way to extend it. The member is built as
    the enum machinery builds its own, so that pickling, copying and look-up by value work.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType[NAME]


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT, once per process."""
    peft_type = mask_peft_type()
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="mask_")
