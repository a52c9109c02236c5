"""Errors of this package. All are the caller's to fix: a retry with the same arguments fails again."""


class KernelError(ValueError):
    """The arguments of a kernel do not fit together. Nothing was written."""


class KernelTableError(KernelError):
    """A row of a strided table reaches outside its region, or is malformed; the message names the row."""


class KernelUnavailableError(RuntimeError):
    """Tensors on CUDA need Triton, and Triton cannot be imported in this process."""
