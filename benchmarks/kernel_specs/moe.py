"""Mixture of experts."""

from benchmarks.kernel_specs.spec import KernelSpec

SPECS: tuple[KernelSpec, ...] = ()
