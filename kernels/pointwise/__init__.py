"""RMSNorm and rotary position embedding."""

from kernels.pointwise.reference import apply_rope, rms_norm, yarn_cos_sin

__all__ = ["apply_rope", "rms_norm", "yarn_cos_sin"]
