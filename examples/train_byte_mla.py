"""Train the demo's byte-level decoder with latent attention on the source code of Python's standard library.

    python examples/train_byte_mla.py

writes ``npu_fusion/demo/byte_mla.safetensors`` (float16 weights) and ``npu_fusion/demo/byte_mla.json`` (the
model's configuration and how it was trained), in about nine minutes on one core of a CPU with AVX-512
bfloat16. Needs ``pip install npu-fusion[demo]``.

The model is that of ``npu_fusion.demo.mla_model``. The text, and what is held out of it, are those of
``train_byte_llama.py``.
"""

from __future__ import annotations

from dataclasses import asdict

from _training import parser_of, train

from npu_fusion.demo.mla_model import CHECKPOINT, MlaConfig, new_byte_mla


def main() -> None:
    sizes = MlaConfig()
    parser = parser_of(__doc__, CHECKPOINT, steps=1600, threads=1, sequence=sizes.max_position_embeddings)
    arguments = parser.parse_args()
    train(arguments, asdict(MlaConfig(max_position_embeddings=arguments.sequence)), new_byte_mla)


if __name__ == "__main__":
    main()
