"""CPU kernels in C++ (src/), called through ctypes. Where they were not built,
`native.shared_library()` is None and the references run."""
