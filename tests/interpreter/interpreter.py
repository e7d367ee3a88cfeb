"""Triton's interpreter (TRITON_INTERPRET=1), made right for what our kernels use. Importing this
module changes the process's interpreter.

As of Triton 3.9 it holds bf16 as uint16 and computes on these bits: sums, products, comparisons and
`tl.dot` are garbage without an error, and a cast from fp32 truncates. Casts to fp8 round ties up,
`tl.dot_scaled` sends bf16 operands through fp16's range, a comparison of scalars is no mask any
more once it is a block, and inline assembly is not implemented. Triton 3.6 and 3.7, which torch
2.10 to 2.13 bring, further lack `tl.dot_scaled` and bf16 constants, let NaN through minima and
maxima, and form the complement of unsigned integers, and 3.6 the bounds of a loop, in ways that
numpy 2 refuses. `test_interpreter.py` checks each repair, and that Triton 3.9 still needs it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    _get_np_dtype,
    _ir,
)

Array = np.ndarray[Any, Any]
AsmEmulation = Callable[[Sequence[Array], int], Sequence[Array]]

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_FP8 = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_E2M1 = np.array(
    [sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], dtype=np.float32
)
"""Values of E2M1, by code."""
_emulations: dict[str, AsmEmulation] = {}


def emulates_asm(marker: str) -> Callable[[AsmEmulation], AsmEmulation]:
    """Register the emulation of the inline assembly whose text contains `marker`, a comment.

    The emulation gets the operands' arrays, as the interpreter holds them (bf16 as uint16, fp8 as
    uint8), and `pack`: the elements that one invocation processes, consecutive along the last axis.
    It returns the outputs' arrays in the same form.
    """

    def register(emulation: AsmEmulation) -> AsmEmulation:
        assert marker not in _emulations, f"two emulations for {marker}"
        _emulations[marker] = emulation
        return emulation

    return register


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Yield a list to which the name of each kernel is appended that is launched inside."""
    names: list[str] = []
    run = InterpretedFunction.run

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    InterpretedFunction.run = recording
    try:
        yield names
    finally:
        InterpretedFunction.run = run


@contextmanager
def unrepaired() -> Iterator[None]:
    """Restore Triton's own interpreter for a while."""
    _use(InterpreterBuilder)
    try:
        yield
    finally:
        _use(RepairedBuilder)


def widen_bf16(bits: Array) -> Array:
    """Convert uint16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(values: Array) -> Array:
    """Convert float to uint16, to nearest, ties to even, rounded once also from float64."""
    values = np.asarray(values)
    narrow = np.ascontiguousarray(values, dtype=np.float32).reshape(values.shape)
    bits = narrow.view(np.uint32)
    if values.dtype == np.float64:
        # To odd: the last bit records that bits were cut off, so that the second rounding meets no
        # false tie.
        back = narrow.astype(np.float64)
        bits = (bits - (np.abs(back) > np.abs(values))) | ((back != values) & ~np.isnan(values))
        bits = bits.astype(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


class RepairedBuilder(InterpreterBuilder):
    """Triton's builder; each method falls back to the original where that is right."""

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if _is_bf16(lhs) and op not in _BITWISE:
            result = op(widen_bf16(lhs.data), widen_bf16(rhs.data))
            return (
                TensorHandle(result, tl.int1)
                if result.dtype == np.bool_
                else TensorHandle(round_to_bf16(result), tl.bfloat16)
            )
        handle = super().binary_op(lhs, rhs, op)
        # A comparison keeps the operands' type in the original, and is an integer once it is
        # broadcast from a scalar to a block.
        return TensorHandle(handle.data, tl.int1) if handle.data.dtype == np.bool_ else handle

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        return (
            TensorHandle(round_to_bf16(op(widen_bf16(arg.data))), tl.bfloat16)
            if _is_bf16(arg)
            else super().unary_op(arg, op)
        )

    def create_clampf(
        self, arg: TensorHandle, lo: TensorHandle, hi: TensorHandle, propagate_nans: Any
    ) -> TensorHandle:
        if not _is_bf16(arg):
            return super().create_clampf(arg, lo, hi, propagate_nans)
        wide = (TensorHandle(widen_bf16(handle.data), tl.float32) for handle in (arg, lo, hi))
        return self.cast_impl(super().create_clampf(*wide, propagate_nans), tl.bfloat16)

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(round_to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)

    def get_all_ones_value(self, type: Any) -> TensorHandle:
        return TensorHandle(np.array([-1]).astype(_get_np_dtype(type)), type.scalar)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        product = widen_bf16(x.data).astype(np.float64) * widen_bf16(y.data)  # exact
        return TensorHandle(round_to_bf16(product + widen_bf16(z.data)), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return super().cast_impl(src, dst_type)
        wide = widen_bf16(src.data) if source == tl.bfloat16 else src.data
        if target == tl.bfloat16:
            return TensorHandle(
                round_to_bf16(wide if wide.dtype == np.float64 else wide.astype(np.float32)), target
            )
        return TensorHandle(wide.astype(_get_np_dtype(dst_type)), target)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if rounding_mode not in (None, _ir.ROUNDING_MODE.RTNE):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        if source in _FP8:
            return self.cast_impl(TensorHandle(_widen_fp8(src), tl.float32), dst_type)
        if target in _FP8:
            return TensorHandle(_round_to_fp8(self.cast_impl(src, tl.float32).data, _FP8[target]), target)
        return self.cast_impl(src, dst_type)

    def create_dot(
        self,
        a: TensorHandle,
        b: TensorHandle,
        d: TensorHandle,
        input_precision: Any,
        max_num_imprecise_acc: Any,
    ) -> TensorHandle:
        a, b = (_widen_operand(handle) for handle in (a, b))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)

    def create_dot_scaled(
        self,
        lhs: TensorHandle,
        lhs_scale: TensorHandle | None,
        lhs_format: Any,
        rhs: TensorHandle,
        rhs_scale: TensorHandle | None,
        rhs_format: Any,
        fast_math: bool,
        lhs_k_pack: bool,
        rhs_k_pack: bool,
        acc: TensorHandle,
    ) -> TensorHandle:
        assert lhs_k_pack
        assert rhs_k_pack, "two values of a byte are neighbours along K in all kernels"
        # A scale is given by row, [M, K / 32] and [N, K / 32].
        left, right = (
            _scaled_rows(lhs.data, lhs, lhs_scale),
            _scaled_rows(rhs.data.swapaxes(-1, -2), rhs, rhs_scale),
        )
        return TensorHandle(np.matmul(left, right.swapaxes(-1, -2)) + acc.data, tl.float32)

    def create_inline_asm(
        self, asm: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
    ) -> "_AsmResults":
        for marker, emulation in _emulations.items():
            if marker in asm:
                outputs = emulation([value.data for value in values], pack)
                types = types if isinstance(types, (list, tuple)) else [types]
                return _AsmResults(
                    [TensorHandle(np.asarray(out), ty.scalar) for out, ty in zip(outputs, types, strict=True)]
                )
        raise NotImplementedError(
            f"no emulation of this inline assembly is registered (tests/interpreter/interpreter.py): "
            f"{asm[:100]}"
        )


class _AsmResults:
    def __init__(self, handles: list[TensorHandle]) -> None:
        self._handles = handles

    def get_result(self, index: int) -> TensorHandle:
        return self._handles[index]


def _is_bf16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widen_fp8(handle: TensorHandle) -> Array:
    bits = torch.from_numpy(np.ascontiguousarray(handle.data))
    return bits.view(_FP8[handle.dtype.scalar]).float().numpy()


def _round_to_fp8(values: Array, dtype: torch.dtype) -> Array:
    """Round with saturation, as the instructions to which Triton compiles: no infinity, NaN
    stays."""
    limit = torch.finfo(dtype).max
    return (
        torch.from_numpy(np.ascontiguousarray(values))
        .clamp(-limit, limit)
        .to(dtype)
        .view(torch.uint8)
        .numpy()
    )


def _widen_operand(handle: TensorHandle) -> TensorHandle:
    """Return an operand as `tl.dot` multiplies it: fp32 for bf16 and fp8, which is exact."""
    if _is_bf16(handle):
        return TensorHandle(widen_bf16(handle.data), tl.float32)
    return TensorHandle(_widen_fp8(handle), tl.float32) if handle.dtype.scalar in _FP8 else handle


def _scaled_rows(data: Array, handle: TensorHandle, scale: TensorHandle | None) -> Array:
    """Return [rows, K] fp32: an operand of `tl.dot_scaled`, times its e8m0 scales.

    Args:
        data: `handle`'s, as [rows, K], or [rows, K / 2] of two e2m1 values a byte, low nibble
            first.
    """
    if handle.dtype.scalar == tl.uint8:
        rows = _E2M1[np.stack((data & 15, data >> 4), axis=-1).reshape(*data.shape[:-1], -1)]
    else:
        rows = _widen_operand(TensorHandle(data, handle.dtype)).data.astype(np.float32)
    if scale is None:
        return rows
    exponents = scale.data.view(np.uint8).astype(np.float32)
    powers = np.where(exponents == 255, np.float32(np.nan), np.exp2(exponents - 127))
    return rows * np.repeat(powers, rows.shape[-1] // powers.shape[-1], axis=-1)


@cache
def _languages(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Return the modules that `_patch_lang` patches for a function."""
    return tuple(value for value in function.__globals__.values() if value is tl or value is tl.core)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A call from inside a kernel. Triton looks through the whole language for what to patch at
    each, half the time of many a kernel."""
    if any(tl.core.is_builtin(language.arange) for language in _languages(self.fn)):
        triton_interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise triton_interpreter.InterpreterError(repr(error)) from error


def _use(builder: type) -> None:
    # The instance stays: Triton's semantic layer holds it too.
    triton_interpreter.interpreter_builder.__class__ = builder


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """Triton 3.6 reads a bound of a loop, which is an array of one number, as numpy above 2.3
    refuses to."""
    _own_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot_scaled(
    self: Any,
    lhs: Any,
    lhs_scale: Any,
    lhs_format: str,
    rhs: Any,
    rhs_scale: Any,
    rhs_format: str,
    *options: Any,
) -> Any:
    """Convert formats to constants: before Triton 3.9 they must be constants of a kernel, and the
    interpreter gives texts."""
    formats = tl.constexpr(lhs_format), tl.constexpr(rhs_format)
    return _own_dot_scaled(self, lhs, lhs_scale, formats[0], rhs, rhs_scale, formats[1], *options)


def _np_dtype(type: Any) -> Any:
    """Return numpy's data type of a scalar's or a block's type. Triton makes a table of all of them
    at each call, which took a twelfth of the time."""
    scalar = type.scalar
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _own_np_dtype(scalar)
    return _np_dtypes[scalar.name]


_np_dtypes: dict[str, Any] = {}
_own_np_dtype = triton_interpreter._get_np_dtype
triton_interpreter._get_np_dtype = _np_dtype
_own_dot_scaled = TritonSemantic.dot_scaled
if not hasattr(InterpreterBuilder, "create_dot_scaled"):
    TritonSemantic.dot_scaled = _dot_scaled
_use(RepairedBuilder)
_own_patch_tensor = triton_interpreter._patch_lang_tensor
triton_interpreter._patch_lang_tensor = _patch_tensor
InterpretedFunction.__call__ = _call
