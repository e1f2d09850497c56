"""FSDP2 and ZeRO-3 on processors alone, for tests: accelerate takes weights to pieces on GPUs only.

Run as a program, it is `maskft` on such processes.
"""

from __future__ import annotations

import os


def is_sharding() -> bool:
    """Whether this process was launched with FSDP or DeepSpeed."""
    return "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))


def prepare() -> None:
    """Let accelerate see GPUs where there are processors and gloo. To be called before anything of TRL is imported."""
    from accelerate import PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled here and now
    post_init = DeepSpeedPlugin.__post_init__

    def partition_all(plugin: DeepSpeedPlugin) -> None:
        post_init(plugin)  # and by default, parameters as small as a test's all stay whole
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = partition_all


if __name__ == "__main__":
    prepare()
    from maskft.cli import main

    main()
