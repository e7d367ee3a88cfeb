"""MXFP4 weights: packing, unpacking and the registry of storage layouts."""

import kernels.cpu.layout
import kernels.mxfp4.wgmma  # noqa: F401 - layouts register themselves
from kernels.formats import MX_BLOCK
from kernels.mxfp4.layouts import (
    NATURAL,
    ROWS16,
    WGMMA,
    InPlace,
    PackedMXFP4,
    allocate,
    choose_layout,
    from_natural,
    layout_names,
    register_layout,
    to_natural,
    write_expert,
)
from kernels.mxfp4.reference import pack, unpack, unpack_experts

__all__ = [
    "MX_BLOCK",
    "NATURAL",
    "ROWS16",
    "WGMMA",
    "InPlace",
    "PackedMXFP4",
    "allocate",
    "choose_layout",
    "from_natural",
    "layout_names",
    "pack",
    "register_layout",
    "to_natural",
    "unpack",
    "unpack_experts",
    "write_expert",
]
