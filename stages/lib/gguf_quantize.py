"""Quantize a GGUF file with llama.cpp, in a process of its own: a fault in native code ends this process only.

python -m stages.lib.gguf_quantize <source.gguf> <target.gguf> <llama.cpp's number of the file type> <threads> [matrix]

matrix: a safetensors file, tensor name -> importance of its input channels (in,). cyllama does not hand one on, so the
blocks it wrote are written again by ggml_quantize_chunk, which does; without a matrix both give the same bytes.
"""

import ctypes
import importlib.util
import sys

import numpy as np


def main(source: str, target: str, file_type: str, threads: str, matrix: str | None = None) -> None:
    from cyllama.llama import llama_cpp

    how = llama_cpp.LlamaModelQuantizeParams()
    how.ftype = int(file_type)
    how.nthread = int(threads)
    llama_cpp.model_quantize(source, target, how)
    if matrix:
        weigh(source, target, matrix)


def weigh(source: str, target: str, matrix: str) -> None:
    """Quantize the target's tensors anew, each into the type it has, by the importance of their input channels."""
    from gguf import GGMLQuantizationType, GGUFReader
    from safetensors.numpy import load_file

    importance = load_file(matrix)
    wide = {tensor.name: tensor.data for tensor in GGUFReader(source).tensors}
    written = GGUFReader(target, "r+")
    for tensor in written.tensors:
        is_quantized = tensor.tensor_type not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        if tensor.name in importance and is_quantized:
            blocks = quantized(wide[tensor.name].astype(np.float32), tensor.tensor_type, importance[tensor.name])
            tensor.data[:] = blocks.reshape(tensor.data.shape)
    written.data.flush()


def quantized(weights: np.ndarray, kind: int, importance: np.ndarray | None) -> np.ndarray:
    """A matrix in ggml's blocks, as bytes.

    Args: weights: (out, in), float32. kind: ggml's number of the type. importance: (in,), float32.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    rows, columns = weights.shape
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    weights = np.ascontiguousarray(weights)
    found = np.empty(rows * columns // block * size, np.uint8)
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance of {importance.shape} channels for a matrix of {columns}")
    importance = None if importance is None else np.ascontiguousarray(importance, np.float32)
    done = _ggml_quantize_chunk()(
        int(kind), weights.ctypes.data, found.ctypes.data, 0, rows, columns,
        None if importance is None else importance.ctypes.data,
    )  # fmt: skip
    assert done == found.nbytes
    return found


def _ggml_quantize_chunk() -> "ctypes._NamedFuncPointer":
    """The function of ggml.h, from the library that xllamacpp brings."""
    found = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert found is not None
    assert found.origin is not None
    function = ctypes.CDLL(found.origin).ggml_quantize_chunk
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    function.restype = ctypes.c_size_t
    return function


if __name__ == "__main__":
    main(*sys.argv[1:])
