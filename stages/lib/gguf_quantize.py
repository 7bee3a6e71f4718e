"""Quantize a GGUF file with llama.cpp, in a process of its own: a fault in native code ends this process only.

python -m stages.lib.gguf_quantize <source.gguf> <target.gguf> <llama.cpp's number of the file type> <threads>
"""

import sys


def main(source: str, target: str, file_type: str, threads: str) -> None:
    from cyllama.llama import llama_cpp

    how = llama_cpp.LlamaModelQuantizeParams()
    how.ftype = int(file_type)
    how.nthread = int(threads)
    llama_cpp.model_quantize(source, target, how)


if __name__ == "__main__":
    main(*sys.argv[1:])
