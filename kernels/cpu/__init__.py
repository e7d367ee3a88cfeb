"""CPU kernels in C++ (src/), called through ctypes. If they were not built,
`native.shared_library()` returns None and the references run."""
