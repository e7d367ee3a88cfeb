"""Instruction sets of this architecture, by what differs between them."""

from kernels.cpu import native

BF16_ISAS = [isa for isa in native.ISAS if isa in ("amx", "avx512_bf16")]
"""Names of instruction sets with bf16 arithmetic."""
FP32_ISAS = [isa for isa in native.ISAS if isa not in BF16_ISAS]
"""Names of instruction sets that differ in fp32."""
