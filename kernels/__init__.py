"""Everything that touches weights: FP8 block quantise, digest, pack and scatter. A pure reference beside each kernel.

* :mod:`weightsync.kernels.fp8` — ``quantize_blocks`` for one tensor, ``prepare_quantize`` for a layer in one launch;
* :mod:`weightsync.kernels.digest` — ``digest``, ``prepare``, ``tensor_key``;
* :mod:`weightsync.kernels.copy` — ``strided_copy``, ``prepare``;
* :mod:`weightsync.kernels.warm` — ``warm_up``, so that nothing is compiled inside a round.

Tensors on CUDA take the Triton kernels, tensors on the CPU the references; the bytes are the same. Triton is imported
only when a tensor on CUDA needs it (or when ``TRITON_INTERPRET=1`` asks for the kernels on the CPU).
"""
