"""Arguments of the C++ operations that this package's modules and `trial` share; src/ops.h has the
same. Without torch."""

import ctypes


class LinearArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "width", "num_outputs")),
        ("weight_type", ctypes.c_int32),
    )


class DenseArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scales", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "width", "num_outputs")),
    )


class PackDenseArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "packed", "scales")),
        *((name, ctypes.c_int64) for name in ("first_row", "num_rows", "width", "packed_width")),
    )


class ReadArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (("memory", ctypes.c_void_p), ("num_bytes", ctypes.c_int64))


class ExpertsArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "topk_ids", "topk_weights")),
        *(
            (name, ctypes.c_void_p)
            for name in ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales")
        ),
        *((name, ctypes.c_void_p) for name in ("gate_up_bias", "down_bias", "out")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_tokens", "top_k", "hidden", "intermediate", "first_expert", "num_experts")
        ),
        ("limit", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
    )


class PackArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "scales", "packed_blocks", "packed_scales")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_rows", "num_groups", "blocks_stride", "scales_stride", "packed_groups")
        ),
    )
