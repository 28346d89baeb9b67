"""Our GGUF files, read by the `gguf` package."""

import copy
import struct

import pytest
import torch

from minipeft.interop.gguf import TYPES, load_gguf, named_tensors, save_gguf
from minipeft.memory import PeakMemory
from minipeft.quantized.ggml import dequantize_ggml, quantize_ggml
from tests.tiny import tiny_ids, tiny_model

gguf = pytest.importorskip("gguf")
U32 = struct.pack("<I", 4)  # the type of a value that counts


@pytest.fixture
def plain():
    return tiny_model(dtype=torch.float32)


@pytest.mark.parametrize("kind", TYPES)
def test_gguf_reads_every_tensor(plain, tmp_path, kind):
    reader = gguf.GGUFReader(save_gguf(plain, tmp_path / "m.gguf", kind))
    assert {t.name for t in reader.tensors} == set(named_tensors(plain))
    for tensor in reader.tensors:
        ours = named_tensors(plain)[tensor.name]
        assert tensor.shape.tolist() == list(reversed(ours.shape))
        quantized = tensor.tensor_type != gguf.GGMLQuantizationType.F32
        theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type))
        if quantized:
            assert tensor.tensor_type.name == kind and ours.ndim == 2
            ours = dequantize_ggml(quantize_ggml(ours, kind))
        assert torch.equal(theirs.view(ours.shape), ours), tensor.name


def test_names_and_values_are_llama_cpp_s_for_gpt_2(plain, tmp_path):
    reader = gguf.GGUFReader(save_gguf(plain, tmp_path / "m.gguf"))
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    names = set(known.mapping) | {name for _, name in known.mapping.values()}
    assert {t.name.rpartition(".")[0] for t in reader.tensors} <= names
    keys = gguf.Keys
    expected = {
        keys.LLM.CONTEXT_LENGTH: 64,
        keys.LLM.EMBEDDING_LENGTH: 32,
        keys.LLM.FEED_FORWARD_LENGTH: 128,
        keys.LLM.BLOCK_COUNT: 2,
        keys.Attention.HEAD_COUNT: 4,
    }
    for key, value in expected.items():
        assert reader.get_field(key.format(arch="gpt2")).contents() == value
    assert reader.get_field(keys.General.ARCHITECTURE).contents() == "gpt2"


@pytest.mark.parametrize("kind", TYPES)
def test_the_file_type_is_llama_cpp_s(plain, tmp_path, kind):
    reader = gguf.GGUFReader(save_gguf(plain, tmp_path / "m.gguf", kind))
    found = reader.get_field(gguf.Keys.General.FILE_TYPE).contents()
    assert found == gguf.LlamaFileType[f"MOSTLY_{kind}"]


def test_queries_keys_and_values_are_stacked_in_this_order(plain):
    stacked, attn = named_tensors(plain), plain.blocks[1].attn
    for part in ("weight", "bias"):
        expected = torch.cat([getattr(m, part) for m in (attn.q, attn.k, attn.v)])
        assert torch.equal(stacked[f"blk.1.attn_qkv.{part}"], expected)


@pytest.mark.parametrize("kind", TYPES)
def test_our_reader_gives_the_model_with_restored_weights(plain, tmp_path, kind):
    opened = load_gguf(save_gguf(plain, tmp_path / "m.gguf", kind))
    for block in plain.blocks:
        for linear in (block.attn.q, block.attn.k, block.attn.v, block.attn.o):
            linear.weight.data = dequantize_ggml(quantize_ggml(linear.weight, kind))
        for linear in (block.mlp.up, block.mlp.down):
            linear.weight.data = dequantize_ggml(quantize_ggml(linear.weight, kind))
    assert opened.config.layer_norm_eps == plain.config.layer_norm_eps
    assert torch.equal(opened(tiny_ids()), plain(tiny_ids()))


def test_damaged_and_foreign_files_are_named(plain, tmp_path):
    path = save_gguf(plain, tmp_path / "m.gguf")
    whole = path.read_bytes()
    for content, words in [
        (b"GGML" + whole[4:], "no GGUF file"),
        (whole[:4] + b"\2" + whole[5:], "version 3"),
        (whole[:100], "header"),
        (whole[:-64], "in the middle of"),
        (whole.replace(b"\4\0\0\0\0\0\0\0gpt2", b"\4\0\0\0\0\0\0\0bert", 1), "'bert'"),
        (whole.replace(b"output_norm.bias", b"output_norm.bios"), "output_norm.bi"),
        (whole.replace(b"gpt2.block_count", b"gpt2.blech_count"), "gpt2.block_count"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_gguf(path)


def test_a_model_that_does_not_fit_is_refused(plain, tmp_path):
    from minipeft import LoRA, prune_neurons

    with pytest.raises(ValueError, match="Q6_K"):
        save_gguf(plain, tmp_path / "m.gguf", "Q6_K")
    with pytest.raises(ValueError, match=r"pruned.*one width"):
        save_gguf(prune_neurons(copy.deepcopy(plain), {0: range(32)}), tmp_path / "m.gguf")
    LoRA(rank=2).attach(plain)
    with pytest.raises(ValueError, match="merge"):
        save_gguf(plain, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def damaged(path, find, value):
    """The file with the 4 or 8 bytes behind `find` replaced."""
    content = path.read_bytes()
    at = content.index(find) + len(find)
    path.write_bytes(content[:at] + value + content[at + len(value) :])


@pytest.mark.parametrize(
    ("find", "value", "problem"),
    [
        (b"gpt2.block_count" + U32, struct.pack("<I", 100), "no tensors for gpt2.block_count"),
        (b"gpt2.context_length" + U32, struct.pack("<I", 2**20), "wrongly shaped: position_embd"),
        (b"gpt2.attention.head_count" + U32, struct.pack("<I", 5), "m.gguf: d_model=32 is not"),
        (b"GGUF" + U32[:0], struct.pack("<I", 2), "no GGUF file of version 3"),
        (
            struct.pack("<QQ", 28, 9),
            struct.pack("<Q", 2**64 - 1),
            "ends in the middle of its header",
        ),
        (b"blk.0.ffn_up.weight" + U32[:0], struct.pack("<IQ", 2, 33), "has rows of 32s"),
    ],
)
def test_damaged_numbers_are_named(plain, tmp_path, find, value, problem):
    path = save_gguf(plain, tmp_path / "m.gguf")
    damaged(path, find, value)
    with pytest.raises(ValueError, match=problem), PeakMemory() as memory:
        load_gguf(path)
    assert memory.peak < 10 * path.stat().st_size  # nothing of a size that only the header says


def test_half_of_the_first_eight_bytes_is_no_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(ValueError, match="no GGUF file"):
        load_gguf(tmp_path / "m.gguf")
