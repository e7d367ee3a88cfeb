"""Counting what a piece of the model would queue on a GPU: launches of Triton kernels, and torch operations that compute or copy."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

_FREE = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "new_empty",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "_unsafe_view",
}
"""Operations that only allocate, or look at memory in another way."""


class LaunchCounter(TorchDispatchMode):
    """While entered, `launches` grows by the name of each kernel and of each torch operation, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self._run = InterpretedFunction.run
        self._inside = False

    def __enter__(self) -> "LaunchCounter":
        counter, run = self, self._run

        def counting(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            counter.launches.append(kernel.fn.__name__)
            # What the interpreter itself does with torch is none of the model's.
            counter._inside = True
            try:
                return run(kernel, *args, **kwargs)
            finally:
                counter._inside = False

        InterpretedFunction.run = counting
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        InterpretedFunction.run = self._run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self._inside and name not in _FREE:
            self.launches.append(name)
        return func(*args, **(kwargs or {}))
