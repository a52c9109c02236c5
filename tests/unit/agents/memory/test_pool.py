"""Plain allocations for torch, through the C functions that it calls."""

import ctypes

from cuda_doubles import FakeCudart
from weightsync.agents.memory import cuda, pool


def test_torch_can_call_the_allocator_as_c_functions() -> None:
    """Through the integers that torch gets: allocation on the asked device, the current one put back, and freeing."""
    library = FakeCudart()
    library.device = 3
    plain = pool.PlainAllocator(cuda.Runtime(library))  # type: ignore[arg-type]
    allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)(
        plain.allocate_pointer
    )
    free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)(plain.free_pointer)
    address = allocate(4096, 1, None)
    assert address == 0x7F0000000001
    free(address, 4096, 1, None)
    free(None, 0, 1, None)
    assert library.log == [("malloc", 1, 4096), ("free", 1, address)]
    assert library.device == 3


def test_no_room_is_a_null_pointer() -> None:
    plain = pool.PlainAllocator(cuda.Runtime(FakeCudart(room=100)))  # type: ignore[arg-type]
    allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)(
        plain.allocate_pointer
    )
    assert allocate(4096, 0, None) is None
