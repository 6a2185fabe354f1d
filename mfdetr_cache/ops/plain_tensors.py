"""Tensors of files from strangers: which are what they say."""

from torch import Tensor, strided


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds a real number for each of its elements.

    One that repeats few numbers may claim any size; quantised, complex, sparse and empty ("meta")
    ones are no weights.
    """
    if tensor.is_meta or tensor.is_quantized or tensor.is_complex() or tensor.layout != strided:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
