"""Directories of transformers read by us: equal logits, bit-exact round trips, refusals by name.
See test_hf_published.py."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from common.handoff.hf import export_weights, import_weights
from common.handoff.publish import load_model, publish
from common.model.gpt import GPT, RewardModel
from common.program.errors import InputError

pytestmark = pytest.mark.heavy  # transformers' models take long to import

GPT2 = {
    "vocab_size": 120,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "vocab_size": 120,
    "max_position_embeddings": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 56,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHAPES = {
    "gpt2 tied": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2 narrow mlp": ("gpt2", {"n_inner": 40, "n_layer": 3}),
    "gpt2 one head, other epsilon": ("gpt2", {"n_head": 1, "layer_norm_epsilon": 1e-3}),
    "gpt2 wide": (
        "gpt2",
        {"n_embd": 64, "n_head": 8, "n_positions": 33, "activation_function": "gelu_pytorch_tanh"},
    ),
    "llama untied": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama grouped, other theta": (
        "llama",
        {"num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-3},
    ),
    "llama one kv head, attention bias": (
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True},
    ),
    "llama grouped, every bias": (
        "llama",
        {
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_size": 48,
            "num_hidden_layers": 3,
        },
    ),
}
shapes = pytest.mark.parametrize("family, settings", SHAPES.values(), ids=SHAPES)
families = pytest.mark.parametrize("family", ["gpt2", "llama"])


def random_parent(
    folder: Path,
    family: str,
    settings: dict | None = None,
    classifier: bool = False,
    labels: int = 1,
):
    """A transformers model with random weights (biases and norms too), in a directory that
    transformers wrote."""
    settings = dict(settings or {})
    if family == "llama" and "rope_theta" in settings:
        settings["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": settings.pop("rope_theta"),
        }
    config_class = transformers.GPT2Config if family == "gpt2" else transformers.LlamaConfig
    config = config_class(**(GPT2 if family == "gpt2" else LLAMA) | settings)
    names = {
        "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    }
    if classifier:
        config.num_labels, config.pad_token_id = labels, 0
    model = getattr(transformers, names[family][classifier])(config).eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.dim() == 1 else 0.2 * noise)
    model.save_pretrained(folder)
    return model


def some_ids(rows: int, length: int, vocab: int = 120) -> torch.Tensor:
    return torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(2))


def edit_config(folder: Path, remove: str | None = None, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw.pop(remove, None)
    (folder / "config.json").write_text(json.dumps(raw))


@shapes
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, family, settings):
    theirs = random_parent(tmp_path, family, settings)
    ours = load_model(str(tmp_path))
    ids = some_ids(3, ours.config.max_length)
    expected = theirs(ids).logits
    assert expected.std() > 0.5  # logits with something in them
    assert (ours(ids) - expected).abs().max() < 1e-4
    assert not ours.training and all(p.dtype == torch.float32 for p in ours.parameters())


@shapes
def test_round_trip_of_their_directory_is_bit_exact(tmp_path, tokenizer, family, settings):
    random_parent(tmp_path / "theirs", family, settings)
    publish(tmp_path / "ours", load_model(str(tmp_path / "theirs")), tokenizer, {})
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    untied = settings.get("tie_word_embeddings", family == "gpt2") is False
    assert ("lm_head.weight" in after) == untied


@families
@torch.no_grad()
def test_classifier_of_theirs_is_a_reward_model(tmp_path, family):
    theirs = random_parent(tmp_path, family, classifier=True)
    ours = load_model(str(tmp_path), "reward")
    ids, lengths = some_ids(3, 20), torch.tensor([20, 3, 11])
    for row, length in enumerate(lengths):
        ids[row, length:] = 0  # their padding
    assert (ours(ids, lengths) - theirs(ids).logits[:, 0]).abs().max() < 1e-4
    assert ours.shift.item() == 0
    random_parent(tmp_path / "two", family, classifier=True, labels=2)
    with pytest.raises(InputError, match=r"score.weight has shape \(2, 32\)"):
        load_model(str(tmp_path / "two"), "reward")


@torch.no_grad()
def test_gpt2_as_openai_uploaded_it(tmp_path):
    theirs = random_parent(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()
    }
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file)
    assert "wte.weight" in tensors
    ids = some_ids(2, 30)
    assert (load_model(str(tmp_path))(ids) - theirs(ids).logits).abs().max() < 1e-4


@families
@torch.no_grad()
def test_sharded_weights(tmp_path, family):
    theirs = random_parent(tmp_path / "whole", family)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert not (tmp_path / "shards/model.safetensors").exists()
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    ids = some_ids(2, 30)
    assert (load_model(str(tmp_path / "shards"))(ids) - theirs(ids).logits).abs().max() < 1e-4
    files[1].unlink()
    with pytest.raises(InputError, match=files[1].name):
        load_model(str(tmp_path / "shards"))


def test_bf16_weights_are_read_as_fp32(tmp_path):
    theirs = random_parent(tmp_path, "llama").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path))
    assert ours.trunk.wte.weight.dtype == torch.float32
    assert torch.equal(ours.trunk.wte.weight, theirs.model.embed_tokens.weight.float())


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@families
def test_a_pickle_is_refused_unread(tmp_path, family):
    random_parent(tmp_path, family)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"no model\.safetensors.*safetensors only"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "ran").exists()  # the bomb was a real one


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_weights_of_theirs(tmp_path, damage):
    random_parent(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {"cut": content[: len(content) // 2], "garbage": b"x" * 500, "empty": b""}[damage]
    )
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "family, changes, words",
    [
        ("gpt2", {"activation_function": "relu"}, ["activation_function", "relu"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights", "False"]),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            ["scale_attn_by_inverse_layer_idx", "True"],
        ),
        ("gpt2", {"model_type": "gpt_neox"}, ["model_type", "gpt_neox"]),
        ("llama", {"model_type": "qwen2"}, ["model_type", "qwen2"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ("llama", {"head_dim": 16}, ["head_dim", "16"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            ["partial_rotary_factor 0.25"],
        ),
        ("llama", {"num_attention_heads": "four"}, ["describes no model"]),
        ("gpt2", {"n_head": 0}, ["describes no model"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            ["rope_type", "llama3"],
        ),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            ["rope_type", "yarn"],
        ),
        # how configs said it before 2024, and transformers still reads
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            ["type", "linear"],
        ),
    ],
    ids=str,
)
def test_what_we_cannot_compute_is_refused_by_name(tmp_path, family, changes, words):
    random_parent(tmp_path, family)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load_model(str(tmp_path))
    assert all(word in str(error.value) for word in [*words, str(tmp_path)])


@torch.no_grad()
def test_configs_of_older_transformers(tmp_path):
    """rope_theta at the top, no rope_parameters, no head_dim: what the Hub's llama directories
    mostly hold."""
    theirs = random_parent(tmp_path, "llama", {"rope_theta": 500.0})
    edit_config(
        tmp_path, remove="rope_parameters", rope_theta=500.0, rope_scaling=None, head_dim=None
    )
    ids = some_ids(2, 40)
    assert (load_model(str(tmp_path))(ids) - theirs(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_gpt_neo_as_on_the_hub(tmp_path):
    """Its config.json has no keys of ours; attention's output has a bias, queries are not scaled,
    and the files hold causal masks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64}
    kinds = {"attention_types": [[["global", "local"], 2]], "window_size": 8, "vocab_size": 60}
    config = transformers.GPTNeoConfig(**sizes, **kinds, bos_token_id=1, eos_token_id=1)
    theirs = transformers.GPTNeoForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    mask = {"transformer.h.0.attn.attention.bias": torch.ones(1, 1, 64, 64).bool()}
    save_file(tensors | mask, tmp_path / "model.safetensors")
    model = load_model(str(tmp_path))
    ids = torch.randint(60, (2, 40))
    expected = theirs(ids).logits
    assert (model(ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    again = GPT(model.config)
    import_weights(again, export_weights(model), "again")
    assert torch.equal(again(ids), model(ids))


@families
def test_weights_that_do_not_fit_are_named(tmp_path, family):
    random_parent(tmp_path, family)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = {
        "gpt2": "transformer.h.1.ln_2.weight",
        "llama": "model.layers.1.post_attention_layernorm.weight",
    }[family]
    for changed, words in [
        ({name: tensor for name, tensor in tensors.items() if name != norm}, [f"no tensor {norm}"]),
        (tensors | {"visual.proj": torch.zeros(2)}, ["visual.proj", "no place"]),
        (tensors | {norm: torch.zeros(31)}, [norm, "(31,)", "(32,)"]),
        (tensors | {norm: torch.ones(32).to(torch.int8)}, [norm, "int8", "fp32"]),
        (tensors | {norm: torch.ones(32).bool()}, [norm, "bool"]),
        (tensors | {norm: torch.ones(32, dtype=torch.complex64)}, [norm, "complex64"]),
    ]:
        save_file(changed, file)
        with pytest.raises(InputError) as error:
            load_model(str(tmp_path))
        assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no config.json"),
        (b'{\n"a": 1,\n"b"}', r"config.json:3: broken JSON"),
        (b"{}", "model_type"),
        (b"[]", r"config.json: expected a JSON object, found list"),
        (b'{"model_type": "\xff"}', r"config.json: .*can't decode byte 0xff"),
    ],
)
def test_config_that_is_none(tmp_path, content, words):
    if content:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_model(str(tmp_path))


def test_kinds_follow_the_architecture(tmp_path, tiny_gpt, tiny_reward, stage_dir):
    assert isinstance(load_model(stage_dir(tiny_gpt("gpt2")), "lm"), GPT)
    assert isinstance(load_model(stage_dir(tiny_reward("gpt2")), "reward"), RewardModel)
    random_parent(tmp_path, "llama")
    shutil.copytree(tmp_path, tmp_path / "copy")
    with pytest.raises(InputError, match=r"language model.*reward model"):
        load_model(str(tmp_path / "copy"), "reward")
