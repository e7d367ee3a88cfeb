"""The kernels that the report and the gate compile, a module an operation. A new module is added to
`all_specs`."""

from benchmarks.kernel_specs import attention, linear, moe, pointwise, sampling
from benchmarks.kernel_specs.spec import KernelSpec


def all_specs() -> dict[str, KernelSpec]:
    """Return all specs by name.

    Raises:
        ValueError: two have one name.
    """
    specs = [*attention.SPECS, *linear.SPECS, *moe.SPECS, *pointwise.SPECS, *sampling.SPECS]
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) != len(specs):
        raise ValueError(f"two of the kernel specs have one name: {sorted(spec.name for spec in specs)}")
    return by_name
