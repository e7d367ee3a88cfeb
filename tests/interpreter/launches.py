"""Counting what a piece of the model would queue on a GPU: launches of Triton kernels, and torch
operations that compute or copy; and forbidding what would make the host wait for it."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

_FREE = (
    *("empty", "empty_like", "empty_strided", "new_empty"),
    *(
        "alias",
        "as_strided",
        "detach",
        "expand",
        "narrow",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
    ),
    *("transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
)
"""Operations that only allocate, or look at memory in another way."""


class LaunchCounter(TorchDispatchMode):
    """A mode in which `launches` grows by the name of each kernel and of each torch operation, in
    order."""

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
        result = func(*args, **(kwargs or {}))
        views = name == "reshape" and isinstance(result, Tensor) and result.data_ptr() == args[0].data_ptr()
        if not (self._inside or name in _FREE or views):
            self.launches.append(name)
        return result


class NoHostReads(TorchFunctionMode):
    """A mode that fails where torch would wait for a device."""

    READS = (
        Tensor.item,
        Tensor.tolist,
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.nonzero,
        torch.nonzero,
        Tensor.numpy,
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.READS, f"{func} waits for the device"
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index), (
                "a boolean index waits for the device"
            )
        return func(*args, **(kwargs or {}))
