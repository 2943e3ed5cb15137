"""Loading: every kind of model, what is refused and how, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanopd_lab.model.checkpoint import write_safetensors
from nanopd_lab.model.loading import load_model
from nanopd_lab.model.support import (
    CorruptCheckpointError,
    ModelUnavailableError,
    UnknownModelError,
    UnsupportedModelError,
    check_dtype,
    check_supported,
)
from tests.model.conftest import CPU, load

SaveShape = Callable[..., Path]

TINY = ["tiny", "tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral"]
IDS = torch.randint(0, 512, (1, 40), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ---- folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", TINY)
def test_a_folder_loads_as_hugging_face_loads_it(
    save_shape: SaveShape, shape: str, dtype: torch.dtype
) -> None:
    import transformers

    folder = save_shape(shape)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    ours = load(str(folder), dtype)
    assert torch.equal(logits(theirs), logits(ours.model))
    for name, buffer in theirs.named_buffers():
        assert torch.equal(buffer, ours.model.get_buffer(name)), name
        assert buffer.dtype == ours.model.get_buffer(name).dtype, name
    assert ours.path == folder.resolve()
    assert ours.tokenizer is None
    assert (ours.dtype, ours.device) == (dtype, CPU)


@pytest.mark.parametrize("shape", TINY)
def test_geometry(save_shape: SaveShape, shape: str) -> None:
    geometry = load(str(save_shape(shape))).geometry
    assert (geometry.num_layers, geometry.num_heads, geometry.num_kv_heads) == (3, 4, 2)
    assert geometry.head_dim == (32 if shape == "tiny-qwen3" else 16)
    assert (geometry.hidden_size, geometry.vocab_size, geometry.max_model_len) == (64, 512, 4096)
    assert geometry.weight_bytes == 4 * geometry.num_parameters
    assert geometry.kv_bytes_per_token(2) == 2 * 3 * 2 * geometry.head_dim * 2


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    whole = load("random:tiny", seed=5).model
    whole.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(whole), logits(load(str(tmp_path)).model))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_widen_exactly(tmp_path: Path, stored: torch.dtype) -> None:
    model = load("random:tiny", seed=5).model.to(stored)
    model.save_pretrained(tmp_path)
    ours = load(str(tmp_path)).model
    for name, weight in model.named_parameters():
        assert torch.equal(weight.float(), ours.get_parameter(name)), name


def test_a_tensor_larger_than_the_buffer_is_converted_whole(tmp_path: Path) -> None:
    """The conversion goes piece by piece; the seams must not show."""
    from nanopd_lab.model.checkpoint import index_checkpoint

    values = np.random.default_rng(0).standard_normal((1000, 37)).astype(np.float32)
    write_safetensors(tmp_path / "model.safetensors", {"w": values.shape}, iter([("w", values)]))
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    index_checkpoint(tmp_path)["w"].copy_to(target, torch.empty(4 * 1009, dtype=torch.uint8))
    assert torch.equal(target, torch.from_numpy(values).bfloat16())


def test_our_safetensors_files_are_readable_by_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, dtype=np.float32)}
    write_safetensors(tmp_path / "f", {k: v.shape for k, v in values.items()}, iter(values.items()))
    read = load_file(tmp_path / "f")
    assert {k: v.tolist() for k, v in read.items()} == {k: v.tolist() for k, v in values.items()}


def test_stop_tokens_are_the_union_of_both_files(save_shape: SaveShape) -> None:
    folder = save_shape("tiny", eos_token_id=7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load(str(folder)).eos_token_ids == {7, 9}
    (folder / "generation_config.json").unlink()
    assert load(str(folder)).eos_token_ids == {7}


# ---- GGUF files -----------------------------------------------------------------------------------------


def write_gguf(path: Path, model: Any, *, quantize: bool = False, **extra: Any) -> None:
    """What llama.cpp's converter would write for a tiny model, with a byte-level vocabulary."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in extra.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "Ġa"]
    tokens += [f"<|filler {i}|>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<") and t.endswith(">") else 1 for t in tokens])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers
    )
    for name, weight in model.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        array = weight.detach().numpy()
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        gguf_name = f"{names.get_name(stem)}.{suffix}"
        if quantize and array.ndim == 2 and array.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("shape", ["tiny", "tiny-llama", "tiny-qwen2", "tiny-qwen3"])
def test_a_gguf_file_is_the_same_model(own_cache: Path, tmp_path: Path, shape: str) -> None:
    original = load(f"random:{shape}", seed=5).model
    file = tmp_path / "my model.gguf"
    write_gguf(file, original)
    loaded = load(str(file))
    assert torch.equal(logits(original), logits(loaded.model))
    assert loaded.eos_token_ids == {2}
    assert loaded.path is not None
    assert own_cache in loaded.path.parents
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("12 a").input_ids) == ["1", "2", "Ġa"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_a_quantized_gguf_file_is_dequantized_exactly(own_cache: Path, tmp_path: Path) -> None:
    import gguf

    original = load("random:tiny-qwen3", seed=5).model
    write_gguf(tmp_path / "q8.gguf", original, quantize=True)
    loaded = load(str(tmp_path / "q8.gguf")).model
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        weight = original.get_parameter(name).detach().numpy()
        expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
        assert np.array_equal(expected, loaded.get_parameter(name).numpy())
        assert not np.array_equal(weight, expected)


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(own_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, load("random:tiny", seed=5).model)
    first, again = load(str(file)), load(str(file))
    assert first.path == again.path
    write_gguf(file, load("random:tiny", seed=6).model)
    changed = load(str(file))
    assert changed.path != first.path
    assert not torch.equal(logits(first.model), logits(changed.model))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__attention__sliding_window": 128}, "sliding window of 128"),
        ({"llama__rope__scaling__type": "yarn"}, "rotary scaling of type 'yarn'"),
        ({"llama__rope__dimension_count": 8}, "partial rotary"),
    ],
)
def test_what_a_gguf_file_may_not_ask_for(
    own_cache: Path, tmp_path: Path, extra: dict[str, Any], reason: str
) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, load("random:tiny").model, **extra)
    with pytest.raises(UnsupportedModelError, match=reason):
        load(str(file))
    assert not [path for path in (own_cache / "models").iterdir() if path.is_dir()]


def test_a_cut_gguf_file_is_refused(own_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, load("random:tiny").model)
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(CorruptCheckpointError, match="cut short"):
        load(str(file))


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "architecture 'gemma2'"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "architecture 'mixtral'"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "some_remote_code"}, "architecture 'some_remote_code'"),
        ({}, "no model_type"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding window of 4096"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "window of 64"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "sliding_atten"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "Classification"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "quantized .'awq'"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"model_type": "qwen2", "rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
    ],
)
def test_unsupported_models_are_refused_by_name(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        check_supported(fields, "org/model")
    message = str(caught.value)
    assert message.startswith("org/model: ")
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_scaling": None},
    ],
)
def test_supported_models_pass(fields: dict[str, Any]) -> None:
    check_supported(fields, "org/model")


def test_an_unsupported_folder_is_refused_before_its_weights_are_read(save_shape: SaveShape) -> None:
    folder = save_shape("tiny-mistral", sliding_window=32)
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UnsupportedModelError, match="sliding window of 32"):
        load(str(folder))


def test_remote_code_is_never_run(save_shape: SaveShape, tmp_path: Path) -> None:
    folder = save_shape(
        "tiny", auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("smolm2", "Did you mean 'smollm2'"),
        ("qwen3-8b", "Did you mean 'random:qwen3-8b'"),
        ("random:qwen3", "named shapes are"),
        ("", "unknown model ''"),
        ("/no/such/folder", "no such file or folder"),
        ("./missing.gguf", "no such file or folder"),
    ],
)
def test_unknown_models_name_the_known_ones(spec: str, reason: str) -> None:
    with pytest.raises(UnknownModelError, match=reason) as caught:
        load(spec)
    assert "qwen3-8b" in str(caught.value)


def test_a_hub_id_without_a_network_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ModelUnavailableError, match="hf download org/name --local-dir name"):
        load("org/name")


def test_a_hub_model_that_we_refuse_is_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: str(tmp_path / "config.json"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(UnsupportedModelError, match="org/name: architecture 'gemma2'"):
        load("org/name")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"no config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnknownModelError, match="not valid JSON"):
        load(str(tmp_path))
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(UnknownModelError, match="not a GGUF file"):
        load(str(tmp_path / "note.txt"))


def test_pickled_weights_are_never_read(save_shape: SaveShape) -> None:
    folder = save_shape("tiny")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelUnavailableError, match=r"pytorch_model\.bin, which is a pickle"):
        load(str(folder))


@pytest.mark.parametrize("keep", [4, 1000, 700_000])
def test_a_cut_checkpoint_is_refused(save_shape: SaveShape, keep: int) -> None:
    file = save_shape("tiny") / "model.safetensors"
    assert file.stat().st_size > keep
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CorruptCheckpointError, match="cut short"):
        load(str(file.parent))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_hidden_layers": 4}, "lacks weights: model.layers.3"),
        ({"num_hidden_layers": 2}, "has foreign weights: model.layers.2"),
        ({"vocab_size": 600}, r"has misshapen weights: lm_head.weight \(512, 64\) instead of \(600, 64\)"),
    ],
)
def test_weights_that_do_not_fit_the_configuration(
    save_shape: SaveShape, fields: dict[str, Any], reason: str
) -> None:
    folder = save_shape("tiny", **fields)
    with pytest.raises(CorruptCheckpointError, match=reason):
        load(str(folder))


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [
        (torch.float16, "cpu", "float16 is not supported on cpu; use float32, bfloat16; float16's largest"),
        (torch.float64, "cpu", "float64 is not supported on cpu"),
        (torch.int8, "cuda", "int8 is not supported on cuda; use float32, bfloat16, float16"),
        (torch.float32, "mps", "device mps is not supported; use one of cpu, cuda"),
    ],
)
def test_dtypes_that_do_not_work_are_refused(dtype: torch.dtype, device: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_dtype(dtype, torch.device(device))


def test_loading_is_quiet_unless_it_is_slow(save_shape: SaveShape, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_shape("tiny")
    capfd.readouterr()
    load(str(folder), progress=True)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# ---- memory ---------------------------------------------------------------------------------------------

_PEAK = """
    import sys, torch
    from nanopd_lab.model.loading import load_model

    def status(key):
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

    def load(spec):
        dtype = getattr(torch, sys.argv[2])
        options = dict(device=torch.device("cpu"), progress=False, attn_implementation="sdpa")
        return load_model(spec, dtype=dtype, **options)

    load("random:tiny")  # the imports
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    weights = load(sys.argv[1]).geometry.weight_bytes
    print((status("VmHWM") - before) / weights)
"""


@pytest.fixture(scope="module")
def a_quarter_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=8192,
        architectures=["LlamaForCausalLM"],
    )
    folder = tmp_path_factory.mktemp("large")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_at_most_1_6_times_the_weights(a_quarter_gigabyte: Path, dtype: str) -> None:
    script = textwrap.dedent(_PEAK)
    done = subprocess.run(
        [sys.executable, "-c", script, str(a_quarter_gigabyte), dtype],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout)
    print(f"peak {ratio:.3f} x the weights, fp32 file loaded as {dtype}")
    assert 0.9 < ratio < 1.6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen2"])
def test_a_folder_arrives_on_a_gpu_unchanged(save_shape: SaveShape, shape: str, dtype: torch.dtype) -> None:
    folder = save_shape(shape)
    here = load(str(folder)).model
    device = torch.device("cuda")
    there = load_model(str(folder), dtype=dtype, device=device, attn_implementation="sdpa")
    assert (there.device.type, there.dtype) == ("cuda", dtype)
    for name, weight in here.named_parameters():
        assert torch.equal(weight.to(dtype), there.model.get_parameter(name).cpu()), name
    for name, buffer in there.model.named_buffers():
        assert torch.allclose(here.get_buffer(name), buffer.cpu(), rtol=1e-6, atol=0), name
    with torch.no_grad():
        assert there.model(IDS.cuda()).logits.isfinite().all()
