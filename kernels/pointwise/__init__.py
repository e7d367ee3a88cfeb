"""RMSNorm and rotary position embedding."""

from kernels.pointwise.reference import add_rms_norm, apply_rope, rms_norm, yarn_cos_sin

__all__ = ["add_rms_norm", "apply_rope", "rms_norm", "yarn_cos_sin"]
