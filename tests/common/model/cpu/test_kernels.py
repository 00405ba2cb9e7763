"""Each kernel, in C and in PyTorch's operations, against the plain formulation: values, gradients,
and that neither depends on how the work is cut into parts."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.model import gpt as model_module
from common.model import logprobs as logprobs_module
from common.model.attention import Context, Rope, additive, document_mask, rotate, split_heads
from common.model.cache import KVCache
from common.model.cpu import attention as attention_module
from common.model.cpu import compile as native
from common.model.cpu.attention import attention
from common.model.cpu.kernels import gelu, layer_norm, pick_ids, rms_norm, swiglu
from common.model.gpt import GPT
from common.model.logprobs import linear_logprobs
from common.model.ops import token_logprobs
from common.model.shape import GPTConfig
from tests.conftest import randomise

BF16 = torch.bfloat16
temperatures = pytest.mark.parametrize("temperature", [1.0, 0.7])
half = pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])


@pytest.fixture(params=["C", "PyTorch"], autouse=True)
def language(request, monkeypatch) -> str:
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler")
    return request.param


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (
        torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
    )


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of a weighted sum of y, with the same weights in every call."""
    return torch.autograd.grad((y * randn(*y.shape, seed=9).detach().to(y.dtype)).sum(), inputs)


def error(found: Tensor, true: Tensor) -> float:
    return float(((found.double() - true.double()).norm() / true.double().norm()).detach())


# Between the matrices


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12), (BF16, 6e-3)]
)
def test_rms_norm(dtype, tolerance):
    x, weight = randn(3, 5, 16, dtype=dtype), randn(16, seed=1, dtype=dtype)
    found, true = rms_norm(x, weight, 1e-5), F.rms_norm(x.double(), (16,), weight.double(), 1e-5)
    assert found.dtype == dtype and error(found, true) < tolerance
    for ours, theirs in zip(gradients(found, x, weight), gradients(true, x, weight), strict=True):
        assert ours.dtype == dtype and error(ours, theirs) < tolerance
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda *given: rms_norm(*given, 1e-5), (x, weight))


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12), (BF16, 1e-2)]
)
def test_layer_norm(dtype, tolerance):
    """Far from 0, where a variance taken as mean(x^2) - mean(x)^2 would be lost."""
    x, weight, bias = (
        (3 + randn(3, 5, 16)).to(dtype),
        *(randn(16, seed=s, dtype=dtype) for s in (1, 2)),
    )
    x = x.detach().requires_grad_()
    found = layer_norm(x, weight, bias, 1e-5)
    true = F.layer_norm(x.double(), (16,), weight.double(), bias.double(), 1e-5)
    assert found.dtype == dtype and error(found, true) < tolerance
    for ours, theirs in zip(
        gradients(found, x, weight, bias), gradients(true, x, weight, bias), strict=True
    ):
        assert ours.dtype == dtype and error(ours, theirs) < tolerance


def test_norms_elsewhere(monkeypatch):
    """Under fp16 autocast, of other shapes, and where the backward pass finds no C (compiled
    autograd)."""
    x, weight, bias = randn(64, 64), randn(64, seed=1), randn(64, seed=2)
    true = F.layer_norm(x.double(), (64,), weight.double(), bias.double(), 1e-5)
    with torch.autocast("cpu", torch.float16):
        assert error(rms_norm(x, weight, 1e-5), F.rms_norm(x, (64,), weight, 1e-5)) < 1e-3
        assert error(layer_norm(x, weight, bias, 1e-5), true) < 1e-3
    assert layer_norm(x, weight, bias.bfloat16().float(), 1e-5).shape == x.shape
    with pytest.raises(ValueError, match=r"weight of \(8,\) for x of \(64, 64\)"):
        rms_norm(x, weight[:8], 1e-5)
    found = layer_norm(x, weight, bias, 1e-5)
    monkeypatch.setattr(native, "library", lambda: None)
    for ours, theirs in zip(
        gradients(found, x, weight, bias), gradients(true, x, weight, bias), strict=True
    ):
        assert error(ours, theirs) < 1e-6


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_of_a_row_of_zeros_and_under_autocast(kind):
    x, weight, bias = randn(4, 64).detach(), randn(64, seed=1), randn(64, seed=2)
    x[2] = 0
    x.requires_grad_()
    given = (x, weight) if kind == "rms" else (x, weight, bias)
    with torch.autocast("cpu", BF16):
        found = rms_norm(*given, 1e-5) if kind == "rms" else layer_norm(*given, 1e-5)
    true = (
        F.rms_norm(x, (64,), weight, 1e-5)
        if kind == "rms"
        else F.layer_norm(x, (64,), weight, bias, 1e-5)
    )
    assert error(found, true) < 2e-3 and (kind == "layer" or found.dtype == BF16)
    assert (found.bfloat16() != true.bfloat16()).float().mean() < 0.01  # rounded once, at the end
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(found, *given))


def test_what_is_not_a_number_stays_so():
    for bad in (float("nan"), float("inf")):
        row = torch.ones(2, 8)
        row[0, 3] = bad
        for x in (row, row.bfloat16()):
            for y in (
                rms_norm(x, torch.ones(8), 1e-5),
                swiglu(x),
                gelu(x),
                layer_norm(x, *torch.ones(2, 8), 1e-5),
            ):
                assert not y[0].isfinite().all() and y[1].isfinite().all()


def test_swiglu_and_rotate_in_double():
    h, x = (randn(*size, dtype=torch.float64) for size in ((2, 3, 8), (2, 3, 4, 6)))
    angles = torch.rand(1, 4, 3, dtype=torch.float64)
    rope = tuple(
        torch.cat(pair, -1)
        for pair in ((angles.cos(), angles.cos()), (-angles.sin(), angles.sin()))
    )
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    assert torch.allclose(rotate(x, rope), torch.cat([turned.real, turned.imag], -1), atol=1e-12)
    assert torch.allclose(swiglu(h), F.silu(h[..., :4]) * h[..., 4:], atol=1e-12)
    assert torch.autograd.gradcheck(swiglu, h) and torch.autograd.gradcheck(
        lambda x: rotate(x, rope), x
    )


def test_gelu():
    """In fp32 as PyTorch's; in bf16 rounded once."""
    x = torch.cat(
        [torch.linspace(-12, 12, 100_001), torch.tensor([-1e4, -88, 88, 1e4])]
    ).requires_grad_()
    true = F.gelu(x.double(), approximate="tanh")
    assert (
        error(gelu(x), true) < 1e-6
        and error(gradients(gelu(x), x)[0], gradients(true, x)[0]) < 2e-6
    )
    half = x.detach().bfloat16().requires_grad_()
    true = F.gelu(half.double(), approximate="tanh")
    for ours, exact in (
        (gelu(half), true),
        (gradients(gelu(half), half)[0], gradients(true, half)[0]),
    ):
        assert error(ours, exact) < 3e-3


# Attention

HEADS = {"as many": (4, 4), "grouped": (4, 2), "one": (4, 1)}
heads = pytest.mark.parametrize("H, K", HEADS.values(), ids=HEADS)


def tables(T: int, D: int, dtype: torch.dtype) -> Rope:
    angles = torch.arange(T)[None, :, None] * 100.0 ** -(torch.arange(0, D, 2) / D)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def plain(qkv: Tensor, H: int, K: int, rope: Rope | None, mask: Tensor | None) -> Tensor:
    """Attention in double, as it is defined: (B, T, (H + 2 K) D) -> (B, T, H D)."""
    parts = qkv.double().unflatten(2, (H + 2 * K, -1)).transpose(1, 2)
    q, k, v = parts.split([H, K, K], 1)
    if rope is not None:
        q, k = (rotate(x, tuple(table.double() for table in rope)) for x in (q, k))
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() if mask is None else mask
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def attended(mask: Tensor | None, T: int) -> Tensor:
    return torch.ones(1, 1, T, T, dtype=torch.bool).tril() if mask is None else mask


@heads
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@half
def test_attention(H, K, rotary, masked, half, monkeypatch):
    """In bf16 its gradients are as near to exact ones as those of PyTorch's. 2 of 5 rows at a time;
    40 is no multiple of 32."""
    B, T, D, dtype = 5, 40, 16, BF16 if half else torch.float32
    monkeypatch.setattr(attention_module, "CACHED", 2 * H * T * T)
    qkv, rope = randn(B, T, (H + 2 * K) * D, dtype=dtype), tables(T, D, dtype) if rotary else None
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.1
    mask = document_mask(starts.cumsum(1)) if masked else None
    true = plain(qkv, H, K, rope, mask)
    theirs = (
        F.scaled_dot_product_attention(
            *split_heads(qkv, H, K, rope), additive(attended(mask, T), dtype), enable_gqa=True
        )
        .transpose(1, 2)
        .flatten(2)
    )
    ours = attention(qkv, H, K, Context(rope, additive(mask, dtype)))
    assert error(ours, true) < (6e-3 if half else 1e-6)
    widths = [H * D, K * D, K * D]
    found, usual, exact = (gradients(y, qkv)[0].split(widths, -1) for y in (ours, theirs, true))
    for a, b, c in zip(found, usual, exact, strict=True):
        assert error(a, c) < (1.3 * error(b, c) if half else 1e-6)


@heads
@half
def test_a_row_is_the_same_to_the_bit_whatever_its_batch(H, K, half):
    """Beyond 192 positions PyTorch's kernel takes larger blocks; without AVX-512, MKL then adds up
    fp32 in another order, and rows agree to rounding alone."""
    exact_to = 230 if half or torch.backends.cpu.get_cpu_capability() == "AVX512" else 192
    qkv = randn(3, 230, (H + 2 * K) * 16, dtype=BF16 if half else torch.float32)
    rope = tables(230, 16, qkv.dtype)
    for T in (1, 31, 32, 40, 150):
        own = tuple(table[:, :T] for table in rope)
        alone = attention(qkv[1:2, :T].contiguous(), H, K, Context(own))
        for longer in (T + 1, 64, 191, 230):
            if longer > T:
                wide = tuple(table[:, :longer] for table in rope)
                batch = attention(qkv[:, :longer].contiguous(), H, K, Context(wide))
                if longer <= exact_to:
                    assert torch.equal(batch[1, :T], alone[0]), (T, longer)
                else:
                    torch.testing.assert_close(batch[1, :T], alone[0], rtol=0, atol=2e-6)


@heads
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("width", [16, 32, 64])
@half
def test_a_cache_fed_token_by_token_equals_all_at_once(H, K, family, width, half):
    """Rows of 5, 1 and 9 tokens prefilled, then 7 more each; layer 1 sees a window of 4."""
    if family == "gpt2" and K != H:
        return
    settings = {"n_layer": 2, "n_head": H, "n_kv_head": K, "n_embd": H * width}
    settings |= {"attention_pattern": ("full", "local"), "window": 4}
    torch.manual_seed(0)
    model = GPT(GPTConfig(family=family, vocab_size=50, max_length=40, **settings)).eval()
    randomise(model, 1)
    model = model.bfloat16() if half else model
    ids, lengths = torch.randint(0, 50, (3, 16)), torch.tensor([5, 1, 9])
    with torch.no_grad():
        true = model.trunk(ids)
        cache = KVCache(model.config, 3, 16, next(model.parameters()))
        found = model.trunk(ids[:, :9], cache)
        cache.lengths = lengths
        for row, length in enumerate(lengths):
            assert error(found[row, :length], true[row, :length]) < (3e-2 if half else 1e-5)
        for _ in range(7):
            at = cache.lengths
            found = model.trunk(ids[torch.arange(3), at][:, None], cache)[:, 0]
            assert error(found, true[torch.arange(3), at]) < (3e-2 if half else 1e-5)


def test_a_cache_that_is_full_or_of_another_dtype_says_so(tiny_gpt):
    model = tiny_gpt("llama")
    cache = KVCache(model.config, 1, 2, next(model.parameters()))
    with torch.no_grad():
        model.trunk(torch.tensor([[1, 2]]), cache)
        with pytest.raises(IndexError, match="3 tokens in a row: the cache has room for 2"):
            model.trunk(torch.tensor([[3]]), cache)
        for T in (1, 2):
            with pytest.raises(RuntimeError, match="dtype"), torch.autocast("cpu", BF16):
                model.trunk(
                    torch.ones(1, T, dtype=torch.long),
                    KVCache(model.config, 1, 2, next(model.parameters())),
                )


def test_no_gradient_is_lost_in_a_cache(tiny_gpt):
    model = tiny_gpt("llama")
    with pytest.raises(RuntimeError, match="no_grad"):
        model.trunk(torch.tensor([[1]]), KVCache(model.config, 1, 4, next(model.parameters())))


# Sampling


@half
def test_pick_ids_never_leaves_what_is_left(half):
    """50 ids of 50 257, drawn at the very end of the distribution, where rounding passes all of
    them."""
    logits = randn(200, 50257).detach() * 3
    logits[logits < logits.topk(50).values[:, -1:]] = float("-inf")
    logits[:, 0] = float("-inf")
    ids, logprobs = pick_ids(
        logits.bfloat16() if half else logits, torch.full((200,), 1 - 2**-24), 1.0
    )
    assert logprobs.isfinite().all() and (logits[torch.arange(200), ids] > float("-inf")).all()


@half
def test_pick_ids_inverts_the_cumulative_distribution(half):
    """At draws in the middle of an id's share, at 0, and just below 1; ids of probability 0 never
    come."""
    logits = randn(6, 300).detach()
    logits[:, :3], logits[:, 290:] = float("-inf"), float("-inf")
    logits = logits.bfloat16() if half else logits
    probabilities = (logits.double() / 0.7).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    wide = [
        int((p > 1e-3).nonzero()[place])
        for p, place in zip(probabilities, (0, 10, 20, 30, 40, -1), strict=True)
    ]
    rows = torch.arange(6)
    draws = cumulative[rows, wide] - probabilities[rows, wide] / 2
    ids, logprobs = pick_ids(logits, draws.float(), 0.7)
    assert ids.tolist() == wide
    assert torch.allclose(logprobs, probabilities[rows, wide].log().float(), rtol=1e-5, atol=1e-5)
    first, last = (int(x) for x in (probabilities[0] > 0).nonzero()[[0, -1], 0])
    assert pick_ids(logits[:1], torch.zeros(1), 0.7)[0].item() == first == 3
    assert pick_ids(logits[:1], torch.tensor([1 - 2**-24]), 0.7)[0].item() in (last, last - 1)


# The head


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): (N, V) -> (N)."""
    logprobs = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def in_parts(monkeypatch, size: int) -> None:
    monkeypatch.setattr(logprobs_module, "at_once", lambda device, vocabulary: size)


@temperatures
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_logprobs(temperature, dtype, monkeypatch):
    """In parts of 7 of 50 tokens; also from fp64 the result is fp32."""
    in_parts(monkeypatch, 7)
    hidden, weight, targets = (
        randn(50, 16, dtype=dtype),
        randn(90, 16, seed=1, dtype=dtype),
        torch.arange(50),
    )
    found, entropies = linear_logprobs(hidden, weight, targets, temperature, entropies=True)
    true = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)[
        torch.arange(50), targets
    ]
    assert found.dtype == torch.float32 and error(found, true) < 1e-6
    for ours, theirs in zip(
        gradients(found, hidden, weight), gradients(true, hidden, weight), strict=True
    ):
        assert error(ours, theirs) < 1e-6
    assert not entropies.requires_grad
    assert torch.allclose(
        entropies, entropy(hidden @ weight.T, temperature).float(), rtol=1e-5, atol=1e-6
    )
    assert linear_logprobs(hidden, weight, targets, temperature)[1] is None


@temperatures
@pytest.mark.parametrize("sure", [0, 10, 20])
def test_linear_logprobs_under_autocast(temperature, sure, monkeypatch):
    """As near to the truth as PyTorch's own pass, also where the target's probability is almost 1,
    which bf16 rounds to 1."""
    in_parts(monkeypatch, 100)
    targets = torch.arange(256) % 90
    weight = (randn(90, 64, seed=1) / 10).detach().requires_grad_()
    hidden = (randn(256, 64) + sure * weight[targets]).detach().requires_grad_()
    true = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)[
        torch.arange(256), targets
    ]
    with torch.autocast("cpu", BF16):
        ours, _ = linear_logprobs(hidden, weight, targets, temperature)
        theirs = token_logprobs(F.linear(hidden, weight), targets, temperature)
    assert (ours - theirs).abs().max() < 1e-5
    exact = gradients(true, hidden, weight)
    for a, b, c in zip(
        gradients(ours, hidden, weight), gradients(theirs, hidden, weight), exact, strict=True
    ):
        assert a.dtype == torch.float32 and error(a, c) < 1.1 * error(b, c)  # each part is rounded


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (BF16, 4e-3)])
def test_the_number_of_parts_makes_no_difference(dtype, tolerance, monkeypatch):
    """bf16 weights, as DeepSpeed has them: their gradient is not added up in bf16."""
    hidden, weight, targets = (
        randn(1024, 16, dtype=dtype),
        randn(90, 16, seed=1, dtype=dtype),
        torch.arange(1024) % 90,
    )
    found = []
    for size in (1024, 16):
        in_parts(monkeypatch, size)
        logprobs, _ = linear_logprobs(hidden, weight, targets)
        found.append((logprobs, *gradients(logprobs, hidden, weight)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(
        a.dtype == dtype and error(a, b) < tolerance
        for a, b in zip(found[0][1:], found[1][1:], strict=True)
    )


def test_a_frozen_head_gets_no_gradient_and_no_tokens_are_no_problem():
    hidden, weight = randn(5, 16), randn(90, 16, seed=1).detach()
    for bad in (-1, 90):
        with pytest.raises(IndexError, match=f"targets from .*{bad}.*90 ids"):
            linear_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4, bad]))
    linear_logprobs(hidden, weight, torch.arange(5))[0].sum().backward()
    assert hidden.grad.norm() > 0 and weight.grad is None
    weight.requires_grad_()
    whole = linear_logprobs(hidden, weight, torch.arange(5))[0]
    assert torch.equal(
        linear_logprobs(hidden, weight, torch.arange(5, dtype=torch.int32))[0], whole
    )
    logprobs, entropies = linear_logprobs(hidden[:0], weight, torch.arange(0), entropies=True)
    logprobs.sum().backward()
    assert logprobs.shape == entropies.shape == (0,) and not weight.grad.any()


# In the model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@temperatures
def test_targets_equal_the_logits_path(tiny_gpt, family, temperature):
    model, ids = (
        tiny_gpt(family),
        torch.randint(0, 300, (4, 21), generator=torch.Generator().manual_seed(1)),
    )
    ids, targets = ids[:, :-1], ids[:, 1:]
    keep = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    for kept, wanted in ((None, targets), (keep, targets[keep])):
        logits = model(ids, kept)
        found, entropies = model(ids, kept, targets=wanted, temperature=temperature, entropies=True)
        assert found.shape == entropies.shape == wanted.shape
        assert torch.equal(found, model(ids, kept, targets=wanted, temperature=temperature))
        true = token_logprobs(logits.double(), wanted, temperature)
        assert torch.allclose(found, true.float(), rtol=1e-6, atol=1e-6)
        assert torch.allclose(entropies, entropy(logits, temperature), rtol=1e-5, atol=1e-6)
        for a, b in zip(
            gradients(found, *model.parameters()), gradients(true, *model.parameters()), strict=True
        ):
            assert error(a, b) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@half
def test_without_gradients_and_with_checkpointing_it_is_the_same_to_the_bit(tiny_gpt, family, half):
    ids, found = torch.randint(0, 300, (3, 41), generator=torch.Generator().manual_seed(1)), []
    documents = (ids[:, :-1] < 20).cumsum(1)
    for checkpointing in (False, True):
        model = tiny_gpt(family).train()
        model.trunk.checkpointing = checkpointing
        with torch.autocast("cpu", BF16, enabled=half):
            logprobs = model(ids[:, :-1], documents=documents, targets=ids[:, 1:])
            with torch.no_grad():
                assert torch.equal(
                    logprobs, model(ids[:, :-1], documents=documents, targets=ids[:, 1:])
                )
        found.append((logprobs, *gradients(logprobs, *model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("half", [False, True])
def test_padding_is_not_computed(family, half, monkeypatch):
    """Rows of 3, 40 and 17 tokens: the same log-probs, values and gradients as with all positions
    computed."""
    config = GPTConfig(family=family, vocab_size=50, max_length=64, n_layer=2, n_head=4, n_embd=32)
    model, ids = GPT(config), torch.randint(0, 50, (3, 41))
    lengths = torch.tensor([3, 40, 17])
    keep = (torch.arange(40) < lengths[:, None]) & (torch.arange(40) > 0)
    seen = []
    real = model.trunk.blocks[0].mlp.forward
    monkeypatch.setattr(
        model.trunk.blocks[0].mlp, "forward", lambda x: seen.append(x.shape[:-1].numel()) or real(x)
    )

    def run():
        model.zero_grad()
        with torch.autocast("cpu", BF16, enabled=half):
            logprobs = model(ids[:, :-1], keep, targets=ids[:, 1:][keep])
        logprobs.sum().backward()
        return [logprobs.detach(), *(p.grad for p in model.parameters())]

    found = run()
    monkeypatch.setattr(model_module, "needed", lambda keep: None)
    for a, b in zip(found, run(), strict=True):
        assert error(a, b) < (2e-2 if half else 1e-5)
    assert (
        torch.equal(found[0], run()[0]) or not half
    )  # products in bf16 add up alike whatever their size
    assert seen == [3 + 40 + 17, 120, 120]
