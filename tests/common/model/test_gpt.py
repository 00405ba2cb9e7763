"""The GPT: padding and cache change nothing, scores are read at the last real token, shapes and
errors."""

import math

import pytest
import torch

from common.model.cache import KVCache
from common.model.gpt import GPT, RewardModel
from common.model.shape import GPTConfig
from common.program.errors import InputError

SHAPES = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama", "n_kv_head": 4},
    "grouped": {"family": "llama", "n_kv_head": 2},
    "gpt2, local layers": {"family": "gpt2", "attention_pattern": ("full", "local"), "window": 3},
    "grouped, local layers": {
        "family": "llama",
        "n_kv_head": 2,
        "attention_pattern": ("local", "full"),
        "window": 2,
    },
    "gpt2 without biases": {"family": "gpt2", "attention_bias": False, "mlp_bias": False},
    "one kv head, biases, untied": {
        "family": "llama",
        "n_kv_head": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_embeddings": False,
    },
}
shapes = pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
LENGTHS = [9, 1, 17, 4, 17, 12]


def ragged(lengths=LENGTHS, vocab=300, seed=3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def right_padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


@shapes
@pytest.mark.parametrize("padding", [0, 296, 17])
@torch.no_grad()
def test_padded_and_unpadded_logprobs_agree(tiny_gpt, settings, padding):
    model, rows = tiny_gpt(**settings), ragged()
    batched = model(right_padded(rows, padding)).log_softmax(-1)
    for row, got in zip(rows, batched, strict=True):
        alone = model(torch.tensor([row]))[0].log_softmax(-1)
        assert (got[: len(row)] - alone).abs().max() < 1e-5


@shapes
def test_gradients_do_not_see_the_padding(tiny_gpt, settings):
    rows, gradients = ragged(), []
    for batches in ([right_padded(rows, 0)], [torch.tensor([row]) for row in rows]):
        model = tiny_gpt(**settings)
        for n, batch in enumerate(batches):
            real = rows if len(batches) == 1 else [rows[n]]
            keep = torch.tensor([[t < len(row) for t in range(batch.shape[1])] for row in real])
            model(batch, keep=keep).log_softmax(-1)[:, 7].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[1].abs().max()


@shapes
@torch.no_grad()
def test_the_future_is_not_seen(tiny_gpt, settings):
    model, ids = tiny_gpt(**settings), torch.tensor(ragged([12]))
    changed = ids.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 300
    before, after = model(ids)[0], model(changed)[0]
    assert torch.allclose(before[:8], after[:8], atol=1e-6)
    assert (before[8] - after[8]).abs().max() > 0.01


@shapes
@torch.no_grad()
def test_order_of_the_past_is_seen(tiny_gpt, settings):
    model = tiny_gpt(**settings)
    a, b = model(torch.tensor([[5, 9, 11]]))[0, -1], model(torch.tensor([[9, 5, 11]]))[0, -1]
    assert (a - b).abs().max() > 0.01


@shapes
@torch.no_grad()
def test_cache_with_ragged_rows_equals_full_forward(tiny_gpt, settings):
    """Prefill right-padded, then token by token, with rows leaving on the way: the same hidden
    states as one forward."""
    model, rows = tiny_gpt(**settings), ragged([n + 12 for n in LENGTHS])
    full = [model.trunk(torch.tensor([row]))[0] for row in rows]
    cache = KVCache(model.config, len(rows), 40, model.head.weight)
    hidden = model.trunk(
        right_padded([row[:n] for row, n in zip(rows, LENGTHS, strict=True)], 123), cache
    )
    for row, n in enumerate(LENGTHS):
        assert (hidden[row, :n] - full[row][:n]).abs().max() < 1e-4
    cache.lengths = torch.tensor(LENGTHS)
    left = list(range(len(rows)))
    for step, leaving in enumerate([[], [2], [], [0, 5], [], [], [1], [], [], []]):
        if leaving:
            cache.keep(torch.tensor([i for i, row in enumerate(left) if row not in leaving]))
            left = [row for row in left if row not in leaving]
        at = [LENGTHS[row] + step for row in left]
        hidden = model.trunk(
            torch.tensor([[rows[row][t]] for row, t in zip(left, at, strict=True)]), cache
        )
        expected = torch.stack([full[row][t] for row, t in zip(left, at, strict=True)])
        assert (hidden[:, 0] - expected).abs().max() < 1e-4, f"step {step}"
        assert cache.lengths.tolist() == [t + 1 for t in at]
    assert left == [3, 4]


@shapes
@torch.no_grad()
def test_cache_filled_in_pieces(tiny_gpt, settings):
    model, ids = tiny_gpt(**settings), torch.tensor(ragged([20, 20]))
    cache = KVCache(model.config, 2, 20, model.head.weight)
    pieces = [model.head(model.trunk(piece, cache)) for piece in ids.split([7, 1, 12], dim=1)]
    assert (torch.cat(pieces, 1) - model(ids)).abs().max() < 1e-4


@shapes
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(tiny_gpt, settings):
    model, row = tiny_gpt(**settings), ragged([15])[0]
    documents = torch.tensor([[0] * 4 + [1] * 5 + [2] * 6])
    packed = model(torch.tensor([row]), documents=documents)[0]
    other = [(token + 1) % 300 for token in row]
    for start, end in ((0, 4), (4, 9), (9, 15)):
        mixed = torch.tensor([other[:start] + row[start:end] + other[end:]])
        assert torch.allclose(
            model(mixed, documents=documents)[0, start:end], packed[start:end], atol=1e-5
        )
        if settings["family"] == "llama":  # relative positions: the same as on its own
            assert torch.allclose(
                model(torch.tensor([row[start:end]]))[0], packed[start:end], atol=1e-4
            )
    assert torch.allclose(packed[:4], model(torch.tensor([row]))[0, :4], atol=1e-5)
    assert (packed[4] - model(torch.tensor([row]))[0, 4]).abs().max() > 0.01


@torch.no_grad()
def test_keep_picks_rows_of_logits(tiny_gpt):
    model, ids = tiny_gpt("gpt2"), torch.tensor(ragged([5, 5]))
    keep = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 1, 0, 0]]).bool()
    full = model(ids)
    assert torch.allclose(
        model(ids, keep=keep), torch.stack([full[0, 1], full[0, 4], full[1, 2]]), atol=1e-5
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_scores_are_read_at_the_last_real_token(tiny_reward, family):
    model, rows = tiny_reward(family, shift=0.75), ragged()
    lengths = torch.tensor(LENGTHS)
    scores = model(right_padded(rows, 9), lengths)
    values = model.values(right_padded(rows, 9))
    for b, row in enumerate(rows):
        hidden = model.trunk(torch.tensor([row]))[0]
        by_hand = [math.fsum((h * model.score.weight[0]).tolist()) - 0.75 for h in hidden]
        assert values[b, : len(row)].tolist() == pytest.approx(by_hand, abs=1e-4)
        assert scores[b].item() == pytest.approx(by_hand[-1], abs=1e-4)
    assert torch.allclose(
        scores, model(right_padded(rows, 200), lengths), atol=1e-5
    )  # whatever the padding holds


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_a_window_over_the_context_is_full_attention(tiny_gpt, family):
    full = tiny_gpt(family, attention_bias=False)
    local = tiny_gpt(family, attention_bias=False, attention_pattern=("full", "local"), window=64)
    ids = torch.tensor(ragged([64, 64]))
    assert torch.allclose(full(ids), local(ids), atol=1e-5)
    documents = (torch.arange(64) // 20)[None].expand(2, -1)
    assert torch.allclose(
        full(ids, documents=documents), local(ids, documents=documents), atol=1e-5
    )
    near = tiny_gpt(family, attention_bias=False, attention_pattern=("full", "local"), window=63)
    assert (
        near(ids)[:, :63] - full(ids)[:, :63]
    ).abs().max() < 1e-5  # only the last position misses one
    assert (near(ids)[:, 63] - full(ids)[:, 63]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_a_local_layer_sees_its_window_and_nothing_else(tiny_gpt, family):
    """Two local layers of 4 positions reach 1 + 2 * 3 back: what lies before changes nothing, in
    one pass and cached."""
    model = tiny_gpt(family, attention_pattern=("local",), window=4)
    ids = torch.tensor(ragged([20]))
    before = model(ids)[0, 19]
    for place in range(20):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 300
        assert ((model(changed)[0, 19] - before).abs().max() > 1e-4) == (place >= 13), place
    cache = KVCache(model.config, 1, 20, model.head.weight)
    model.trunk(ids[:, :15], cache)
    pieces = [model.head(model.trunk(ids[:, t : t + 1], cache))[0, -1] for t in range(15, 20)]
    assert torch.allclose(pieces[-1], before, atol=1e-5)


def test_start_weights():
    torch.manual_seed(0)
    for family in ("gpt2", "llama"):
        config = GPTConfig(
            family=family, vocab_size=500, n_layer=8, n_head=4, n_embd=128, max_length=64
        )
        weights = dict(GPT(config).named_parameters())
        reward = RewardModel(config)
        assert weights["trunk.wte.weight"].std().item() == pytest.approx(0.02, rel=0.05)
        assert weights["trunk.blocks.3.attn.qkv.weight"].std().item() == pytest.approx(
            0.02, rel=0.05
        )
        assert weights["trunk.blocks.3.mlp.down.weight"].std().item() == pytest.approx(
            0.02 / 4, rel=0.05
        )  # sqrt(2 * 8)
        assert weights["trunk.blocks.3.attn.out.weight"].std().item() == pytest.approx(
            0.02 / 4, rel=0.05
        )
        assert weights["trunk.blocks.0.norm1.weight"].tolist() == [1.0] * 128
        biases = [p for name, p in weights.items() if name.endswith("bias")]
        assert len(biases) == (8 * 6 + 1 if family == "gpt2" else 0)
        assert all(p.abs().max() == 0 for p in biases)
        heads = torch.cat([RewardModel(config).score.weight.flatten() for _ in range(20)])
        assert heads.std().item() == pytest.approx(1 / math.sqrt(129), rel=0.05)
        assert reward.score.bias is None and reward.shift.item() == 0


def test_parameter_counts_of_the_published_models():
    # GPT-2 small is known to have 124,439,808 parameters; TinyLlama 1.1B 1,100,048,384.
    with torch.device("meta"):
        gpt2 = GPT(
            GPTConfig(
                family="gpt2", vocab_size=50257, max_length=1024, n_layer=12, n_head=12, n_embd=768
            )
        )
        tiny_llama = GPT(
            GPTConfig(
                vocab_size=32000,
                max_length=8,
                n_layer=22,
                n_head=32,
                n_kv_head=4,
                n_embd=2048,
                n_inner=5632,
                tie_embeddings=False,
            )
        )
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808
    assert sum(p.numel() for p in tiny_llama.parameters()) == 1_100_048_384


def test_widths_by_default():
    assert GPTConfig(family="gpt2", n_embd=96, n_head=4).n_inner == 384
    assert GPTConfig(family="llama", n_embd=96, n_head=4).n_inner == 256  # 8/3 * 96
    assert (
        GPTConfig(family="llama", n_embd=100, n_head=5).n_inner == 288
    )  # 266.7 up to a multiple of 32
    assert GPTConfig(family="gpt2").attention_bias and GPTConfig(family="gpt2").mlp_bias


@pytest.mark.parametrize("tie", [True, False])
@torch.no_grad()
def test_resized_vocabulary(tiny_gpt, tie):
    model, ids = tiny_gpt("llama", tie_embeddings=tie, vocab_size=20), torch.tensor([[1, 19, 3]])
    before, wte, head = model(ids), model.trunk.wte.weight.clone(), model.head.weight.clone()
    model.resize_vocabulary(20)
    assert torch.equal(model(ids), before)
    model.resize_vocabulary(23)
    assert model.config.vocab_size == model.trunk.config.vocab_size == 23
    assert torch.equal(model(ids)[..., :20], before)
    for new, old in ((model.trunk.wte.weight, wte), (model.head.weight, head)):
        assert torch.equal(new[:20], old)
        assert len(new[20:].unique(dim=0)) == 3
    assert (model.head.weight is model.trunk.wte.weight) == tie
    model.resize_vocabulary(5)  # never shrinks
    assert model.config.vocab_size == 23


@torch.no_grad()
def test_new_rows_have_mean_and_covariance_of_the_old(tiny_gpt):
    one, other, third = (tiny_gpt("llama", vocab_size=400, tie_embeddings=False) for _ in range(3))
    old = one.trunk.wte.weight[:, :4] + torch.tensor([1.0, 0, 0, 0])
    old[:, 1] += old[:, 0]  # correlated
    for model in (one, other, third):
        model.trunk.wte.weight[:, :4] = old
    assert one.resize_vocabulary(20_400, seed=3) == range(400, 20_400)
    new = one.trunk.wte.weight[400:, :4]
    assert (new.mean(0) - old.mean(0)).abs().max() < 0.01
    assert (new.T.cov() - old.T.cov()).abs().max() < 0.004
    other.resize_vocabulary(20_400, seed=3)
    third.resize_vocabulary(20_400, seed=4)
    assert torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.head.weight, third.head.weight)


def test_dropout_only_while_training(tiny_gpt):
    model, ids = tiny_gpt("gpt2", dropout=0.5), torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@torch.no_grad()
def test_context_limit(tiny_gpt):
    for family in ("gpt2", "llama"):
        model = tiny_gpt(family, max_length=8)
        assert model(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 300)
        with pytest.raises(InputError, match="9 tokens in a row, but the model's context is 8"):
            model(torch.zeros(1, 9, dtype=torch.long))
        cache = KVCache(model.config, 1, 8, model.head.weight)
        model.trunk(torch.zeros(1, 8, dtype=torch.long), cache)
        with pytest.raises(InputError, match="9 tokens"):
            model.trunk(torch.zeros(1, 1, dtype=torch.long), cache)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"family": "bert"}, ["bert", "gpt2 or llama"]),
        ({"n_embd": 30, "n_head": 4}, ["n_embd 30", "n_head 4"]),
        ({"n_head": 4, "n_embd": 32, "n_kv_head": 3}, ["n_head 4", "n_kv_head 3"]),
        ({"family": "gpt2", "n_head": 4, "n_embd": 32, "n_kv_head": 2}, ["n_kv_head 2", "llama"]),
        ({"n_head": 4, "n_embd": 12}, ["even head width"]),
        ({"attention_pattern": ("full", "local")}, ["give the window"]),
        ({"attention_pattern": ("full", "strided")}, ["'strided'", "full or local"]),
        (
            {"attention_pattern": ("local",), "window": 3, "attention_bias": True},
            ["attention_bias: false"],
        ),
        ({"attention_pattern": ("local",), "window": 3, "mlp_bias": True}, ["mlp_bias: false"]),
    ],
)
def test_impossible_shapes(settings, words):
    with pytest.raises(InputError) as error:
        GPTConfig(**settings)
    assert all(word in str(error.value) for word in words)


@shapes
def test_bf16_forward_is_the_same_with_and_without_gradients(tiny_gpt, settings):
    """PPO's ratio starts at 1 only if the no-grad pass of the rollout computes what the training
    pass computes."""
    model, ids = tiny_gpt(**settings), torch.tensor(ragged([30, 30]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        training = model(ids)
        with torch.no_grad():
            rollout = model(ids)
    assert torch.equal(training, rollout)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointing_recomputes_the_same_gradients(tiny_gpt, family):
    """With dropout, whose masks have to be drawn again as they were."""
    ids = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    grads, kept = [], []
    for on in (False, True):
        model = tiny_gpt(family, dropout=0.3).train()
        model.trunk.checkpointing = on
        torch.manual_seed(5)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        ):
            loss = model(ids).square().mean()
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
        kept.append(sum(saved))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert kept[1] < 0.6 * kept[0]
