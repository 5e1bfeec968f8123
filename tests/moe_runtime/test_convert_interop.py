"""What `convert` writes is opened by others: compressed-tensors and transformers, on the CPU.

compressed-tensors decodes every weight of every format to our numbers, bit for bit. transformers
(5.23) opens the whole model in MXFP4 and in FP8 per channel, and FP8 blocks in DeepSeek's form; its
loader of stacked experts leaves out NVFP4's tensor scale and does not know blocks of scales, so
these two and MXFP8 are for vLLM and SGLang.
"""

import json
import warnings

import pytest
import torch

from loaders.checkpoint import open_folder
from loaders.logical import logical_tensors, read_tensor
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.options import TARGETS, ConversionOptions
from quant.codecs import decode
from quant.tensor import QuantTensor
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

SIZES = {
    **{"vocab_size": 128, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 128, "tie_word_embeddings": False},
}
IDS = torch.tensor([[3, 17, 101, 4, 99, 7, 7, 45]])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny random Qwen3-MoE as transformers writes it, in bf16."""
    folder = tmp_path_factory.mktemp("qwen") / "source"
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(qwen):
    """Folders by target and layout, made when asked for."""
    made = {}

    def make(to, **options):
        key = (to, *options.items())
        if key not in made:
            made[key] = qwen.parent / f"out-{len(made)}"
            convert(str(qwen), made[key], ConversionOptions(to, **options), progress=False)
        return made[key]

    return make


def our_numbers(folder):
    checkpoint = open_folder(folder)
    found = {}
    for tensor in logical_tensors(checkpoint):
        weight = read_tensor(checkpoint, tensor)
        found[tensor.name] = decode(weight) if isinstance(weight, QuantTensor) else weight.float()
    return found


@pytest.mark.parametrize("to", [to for to in TARGETS if to != "bf16"])
@pytest.mark.parametrize("dense", ["keep", "fp8-block"])
def test_compressed_tensors_decodes_to_our_numbers(converted, to, dense):
    """Each module's tensors through the scheme that the config gives it, by compressed-tensors."""
    reason = "needs pip install compressed-tensors"
    library = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    from compressed_tensors.compressors import BaseCompressor  # after the check that it is there

    folder = converted(to, dense=dense)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    parsed = library.QuantizationConfig.model_validate(config)
    checkpoint = open_folder(folder)
    numbers = our_numbers(folder)
    decoded = 0
    for tensor in logical_tensors(checkpoint):
        module = tensor.name.removesuffix(".weight")
        scheme = scheme_of(parsed, module)
        if tensor.format is None:
            if tensor.name.endswith("_proj.weight") or "head" in tensor.name:
                assert scheme is None, f"{module} is not quantized and not ignored"
            continue
        assert scheme is not None, f"{module} is quantized and not targeted"
        state = {
            info.name.removeprefix(module + "."): checkpoint.read(info.name)
            for info in tensor.parts.values()
        }
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        theirs = compressor.decompress(state, scheme)["weight"]
        expected = numbers[tensor.name].to(theirs.dtype)
        assert torch.equal(theirs, expected), f"{tensor.name}: {theirs.dtype}"
        decoded += 1
    assert decoded == 2 * 4 * 3 + (8 if dense == "fp8-block" else 0)


def scheme_of(config, module):
    """The group that compressed-tensors gives a Linear of this name, None if it is ignored."""
    from compressed_tensors.utils.match import match_name, match_targets  # as above

    if any(match_name(module, ignored) for ignored in config.ignore):
        return None
    groups = {target: g for g in config.config_groups.values() for target in g.targets}
    matched = match_targets(module, torch.nn.Linear(1, 1), groups)
    return groups[matched[0]] if matched else None


@pytest.mark.parametrize(
    ("to", "layout"), [("mxfp4", None), ("fp8-channel", None), ("fp8-block", "native")]
)
def test_transformers_opens_the_model(converted, to, layout):
    pytest.importorskip("compressed_tensors", reason="needs pip install compressed-tensors")
    folder = converted(to, **({"layout": layout} if layout else {}))
    if layout == "native":
        pytest.importorskip("accelerate", reason="needs pip install accelerate")
        how = transformers.FineGrainedFP8Config(dequantize=True)
    else:
        how = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=how
    )
    theirs, ours = model.state_dict(), our_numbers(folder)
    compared = 0
    for name, weight in theirs.items():
        expected = stacked_experts(ours, name) if ".experts." in name else ours[name]
        assert torch.equal(weight, expected.bfloat16()), name
        compared += 1
    assert compared == len(ours) - 2 * (12 - 2)
    assert torch.isfinite(model(IDS).logits).all()


def stacked_experts(ours, name):
    """[E, 2F, D] or [E, D, F] from the weights of single experts."""
    prefix, _, last = name.rpartition(".")
    matrices = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    return torch.stack(
        [torch.cat([ours[f"{prefix}.{e}.{m}.weight"] for m in matrices]) for e in range(4)]
    )


@pytest.mark.parametrize("to", ["mxfp4", "bf16"])
def test_transformers_opens_gpt_oss(tmp_path, to):
    """Back to MXFP4 from bf16, as after fine-tuning, and to bf16 itself: equal logits to ours."""
    write_tiny_gpt_oss(tmp_path / "published", layers=2)
    plain, back = tmp_path / "plain", tmp_path / "back"
    convert(str(tmp_path / "published"), plain, ConversionOptions("bf16"), progress=False)
    folder = plain
    if to == "mxfp4":
        convert(str(plain), back, ConversionOptions("mxfp4"), progress=False)
        folder = back
    how = (
        {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if folder == back else {}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", **how
    )
    ours = our_numbers(folder)
    checked = 0
    for name, weight in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            assert torch.equal(weight.float(), ours[name].mT), name
            checked += 1
    assert checked == 4
