"""Processors that the numeric tests can run as: ``AS_PROCESSOR=avx2 python -m pytest -m numeric``.

Kernels of PyTorch and oneDNN can be held to older instructions, and what is asked about the processor can be answered
otherwise. Sums are then blocked otherwise, and other paths are taken. No setting uses instructions that may be missing.
"""

import os
from typing import NamedTuple


class Processor(NamedTuple):
    environment: dict[str, str]  # has to be set before torch is imported
    has_bfloat16: bool  # what bitsandbytes and the output layer are told
    has_amx: bool


PROCESSORS = {
    "sse": Processor({"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, False, False),
    "avx2": Processor({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, False, False),
    "bfloat16": Processor({}, True, False),
    "amx": Processor({}, True, True),
}


def set_answers(processor: Processor) -> None:
    """Answer what is asked about the processor."""
    import torch

    features = torch.cpu.get_capabilities() | {
        "avx512_bf16": processor.has_bfloat16,
        "amx_bf16": processor.has_amx,
        "bf16": processor.has_bfloat16,
    }
    torch.cpu.get_capabilities = lambda: features
    try:
        import bitsandbytes.nn.modules
    except ImportError:
        return
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: processor.has_bfloat16


PROCESSOR = PROCESSORS[os.environ["AS_PROCESSOR"]] if os.environ.get("AS_PROCESSOR") else None
if PROCESSOR:
    os.environ.update(PROCESSOR.environment)
