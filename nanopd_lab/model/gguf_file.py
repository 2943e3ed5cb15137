"""GGUF files turned into folders in Hugging Face's layout: exact fp32 weights, configuration, tokenizer.

transformers reads GGUF files too, and its loader is the oracle in the tests; but it needs 20 s for a model of
135M where this needs a few, drops rotary scaling without a word, and depending on the release takes the wrong
token for the end of a sequence.

The format is described in ggml's docs/gguf.md; the names of tensors in gguf-py's `tensor_mapping`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanopd_lab.model.checkpoint import write_safetensors
from nanopd_lab.model.support import (
    CorruptCheckpointError,
    ModelUnavailableError,
    UnsupportedModelError,
    check_supported,
)

# llama.cpp calls Mistral "llama" as well: without a sliding window they are the same computation.
_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def convert_gguf(source: Path, target: Path, *, name: str, progress: bool = True) -> None:
    """Write the model in the GGUF file `source` to the existing folder `target`.

    Raises `UnsupportedModelError` before any tensor is read, `CorruptCheckpointError` on a damaged file.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CorruptCheckpointError(
            f"{source} is not a GGUF file or is cut short ({error}); fetch or copy it again"
        ) from error
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    config = _config(metadata, shapes, name)
    check_supported(config.to_dict(), name)
    names = {tensor: _hf_name(tensor, name) for tensor in shapes}
    needed = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    free = shutil.disk_usage(target).free
    if free < needed + 2**28:
        raise ModelUnavailableError(
            f"converting {name} needs {needed / 2**30:.1f} GiB in {target.parent}, which has "
            f"{free / 2**30:.1f} GiB free; make room or point NANOPD_LAB_CACHE at a folder with more"
        )

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in tqdm(reader.tensors, desc=f"Converting {name}", delay=1, disable=not progress):
            weights = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            weights = weights.reshape(shapes[tensor.name])
            if config.model_type == "llama":
                weights = _undo_rotary_order(weights, tensor.name, config)
            yield names[tensor.name], weights

    write_safetensors(
        target / "model.safetensors", {names[key]: shape for key, shape in shapes.items()}, tensors()
    )
    config.save_pretrained(target)
    _save_generation_config(metadata, target)
    _tokenizer(metadata, source).save_pretrained(target)


def _config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], name: str) -> Any:
    """The Hugging Face configuration that a GGUF file's metadata describe."""
    import transformers

    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{name}: GGUF architecture {architecture!r} is not implemented. Supported are "
            f"{', '.join(_ARCHITECTURES)}. Choose a model of one of these, for example Qwen3 or SmolLM2."
        )

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    def number(key: str) -> float:
        value = get(key)
        if value is None:
            raise CorruptCheckpointError(f"{name}: the GGUF file has no {architecture}.{key}")
        return float(str(np.float32(value)))  # 9.99999975e-06 was written for 1e-05

    heads = int(number("attention.head_count"))
    hidden = int(number("embedding_length"))
    head_dim = int(get("attention.key_length", hidden // heads))
    scaling = get("rope.scaling.type", "none")
    refused = {
        "a mixture of experts": bool(get("expert_count")),
        f"a sliding window of {get('attention.sliding_window')} tokens": bool(
            get("attention.sliding_window")
        ),
        # transformers ignores both of these and computes something else; so rather say so.
        f"rotary scaling of type {scaling!r}": scaling not in ("none", ""),
        "scaled rotary frequencies (Llama 3.1 and later)": "rope_freqs.weight" in shapes,
        "partial rotary embedding": int(get("rope.dimension_count", head_dim)) != head_dim,
        "key and value heads of different size": int(get("attention.value_length", head_dim)) != head_dim,
    }
    for what, found in refused.items():
        if found:
            raise UnsupportedModelError(
                f"{name}: {what} in a GGUF file is not implemented. Load the same model from its Hugging "
                "Face folder (safetensors), or choose another GGUF file of Llama, Qwen2 or Qwen3."
            )
    fields: dict[str, Any] = {
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": int(number("feed_forward_length")),
        "num_hidden_layers": int(number("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "max_position_embeddings": int(number("context_length")),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10_000.0))},
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    model_type = _ARCHITECTURES[architecture]
    if model_type != "qwen2":
        fields["head_dim"] = head_dim
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return transformers.AutoConfig.for_model(
        model_type, **fields, architectures=[classes[model_type]], dtype="float32"
    )


def _hf_name(tensor: str, name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    stem, _, suffix = tensor.rpartition(".")
    parts = stem.split(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{suffix}"
    raise UnsupportedModelError(
        f"{name}: the GGUF file has a tensor {tensor!r} that no supported architecture has. Load the same "
        "model from its Hugging Face folder, or choose another."
    )


def _undo_rotary_order(weights: np.ndarray, tensor: str, config: Any) -> np.ndarray:
    """GGUF's "llama" interleaves the two halves of each query and key head; Hugging Face keeps them apart."""
    part = tensor.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return weights
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    pairs = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weights.shape)


def _save_generation_config(metadata: dict[str, Any], target: Path) -> None:
    import transformers

    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    stops = sorted({int(metadata[key]) for key in keys if metadata.get(key) is not None})
    transformers.GenerationConfig(
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    ).save_pretrained(target)


def _tokenizer(metadata: dict[str, Any], source: Path) -> Any:
    """The tokenizer of a GGUF file, with the special tokens and the chat template that it names."""
    import transformers

    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UnsupportedModelError(
            f"{source}: the GGUF file carries no tokenizer; choose one converted with its vocabulary"
        )
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if metadata.get(f"tokenizer.ggml.{key}_token_id") is not None
    }
    if metadata.get("tokenizer.ggml.model") == "gpt2" and metadata.get("tokenizer.ggml.pre") in (
        "smollm",
        "gpt-2",
    ):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=_byte_level_bpe(metadata), clean_up_tokenization_spaces=False, **special
        )
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(source.parent), gguf_file=source.name, trust_remote_code=False
        )
        tokenizer.add_special_tokens(special)
    tokenizer.model_max_length = int(metadata[f"{metadata['general.architecture']}.context_length"])
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _byte_level_bpe(metadata: dict[str, Any]) -> Any:
    """GPT-2's byte-level BPE; SmolLM's kind splits every digit off first."""
    import tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if metadata["tokenizer.ggml.pre"] == "smollm":
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token") and bos is not None:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]}:1 $B:1",
            special_tokens=[(tokens[bos], bos)],
        )
    kinds = metadata["tokenizer.ggml.token_type"]
    for kind, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, own in zip(tokens, kinds, strict=True)
                if own == kind
            ]
        )
    return tokenizer
