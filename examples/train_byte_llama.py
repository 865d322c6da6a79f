"""Train the demo's byte-level Llama on the source code of Python's standard library.

    python examples/train_byte_llama.py

writes ``npu_fusion/demo/byte_llama.safetensors`` (float16 weights) and ``npu_fusion/demo/byte_llama.json``
(the model's configuration and how it was trained). On two cores of a CPU with AVX-512 bfloat16 it takes about
twelve minutes; ``--precision float32`` suits any CPU and takes about twice as long. Needs
``pip install npu-fusion[demo]``.

The model is transformers' ``LlamaForCausalLM`` (SwiGLU, RMSNorm, RoPE, grouped-query attention) over the 256
bytes. The files that measure its loss (``npu_fusion.demo.corpus.HELD_OUT``) are not trained on.
"""

from __future__ import annotations

from _training import parser_of, train

from npu_fusion.demo.model import CHECKPOINT, new_byte_llama


def main() -> None:
    parser = parser_of(__doc__, CHECKPOINT)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--intermediate", type=int, default=640, help="width of the SwiGLU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads")
    arguments = parser.parse_args()
    config = {
        "vocab_size": 256,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "max_position_embeddings": arguments.sequence,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    train(arguments, config, new_byte_llama)


if __name__ == "__main__":
    main()
