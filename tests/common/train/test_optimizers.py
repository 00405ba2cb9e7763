"""Schedule by hand, parameter groups, and update(): equal to a plain PyTorch step over the whole
batch, row by row."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from common.config.training import TrainConfig
from common.model.gpt import GPT
from common.train.optimizers import (
    adamw,
    follow_schedule,
    is_due,
    parameter_groups,
    schedule,
    set_learning_rate,
    steps_for,
)
from common.train.update import NonFiniteError, update

LENGTHS = [
    40,
    2,
    3,
    2,
    17,
    5,
    5,
    31,
    2,
    2,
    2,
    2,
    60,
    9,
    8,
    7,
]  # ragged: means of micro-batch means would be far off


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="no")


# Schedule and step counts


@pytest.mark.parametrize(
    "kind, total, warmup, floor, expected",
    [
        ("constant", 4, 0, 0.0, [1, 1, 1, 1]),
        ("constant", 6, 3, 0.5, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("linear", 4, 0, 0.0, [1, 0.75, 0.5, 0.25]),
        ("linear", 4, 0, 0.2, [1, 0.8, 0.6, 0.4]),
        ("linear", 6, 1, 0.0, [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 4, 0, 0.0, [1, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]),
        (
            "cosine",
            8,
            2,
            0.1,
            [
                1 / 3,
                2 / 3,
                1,
                0.1 + 0.9 * (2 + math.sqrt(3)) / 4,
                0.775,
                0.55,
                0.325,
                0.1 + 0.9 * (2 - math.sqrt(3)) / 4,
            ],
        ),
        ("warmup_stable_decay", 10, 0, 0.0, [1] * 9 + [0.5]),
        ("warmup_stable_decay", 21, 1, 0.1, [0.5] + [1] * 17 + [0.775, 0.55, 0.325]),
        ("cosine", 2, 5, 0.0, [1 / 6, 2 / 6]),  # a run that is all warm-up
        ("cosine", 1, 0, 0.0, [1]),
    ],
)
def test_schedule_by_hand(kind, total, warmup, floor, expected):
    assert [schedule(kind, step, total, warmup, floor) for step in range(total)] == pytest.approx(
        expected, abs=1e-9
    )


def test_steps_for():
    assert steps_for(7, None, 100, 16) == 7
    assert steps_for(None, 1, 96, 16) == 6
    assert steps_for(None, 1, 97, 16) == 7  # the short batch is a step too
    assert steps_for(None, 2.5, 32, 16) == 5
    assert steps_for(None, 0.01, 32, 16) == 1
    assert steps_for(7, 2.5, 100, 16) == 7  # max_steps wins


def test_is_due():
    assert [done for done in range(9) if is_due(done, 3, 8)] == [0, 3, 6, 8]
    assert [done for done in range(9) if is_due(done, None, 8)] == [8]


def test_follow_schedule(tmp_path):
    cfg = TrainConfig(output_dir=str(tmp_path), max_steps=4, learning_rate=0.4, warmup_steps=1)
    weights = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, 2))]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(weights, (0.4, 0.1), strict=True)]
    optimizer = adamw(groups)
    for step in range(4):
        factor = schedule("cosine", step, 4, 1)
        assert follow_schedule(cfg, optimizer, step, 4) == factor * 0.4
        assert [group["lr"] for group in optimizer.param_groups] == [factor * 0.4, factor * 0.1]


# Groups


def test_decay_is_for_matrices_only(tiny_gpt):
    model = tiny_gpt("gpt2")
    model.trunk.wpe.weight.requires_grad = False
    decayed, plain = parameter_groups(model.parameters(), 0.3, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    block = {"attn.qkv.weight", "attn.out.weight", "mlp.up.weight", "mlp.down.weight"}
    expected = {"trunk.wte.weight"} | {f"trunk.blocks.{n}.{name}" for n in (0, 1) for name in block}
    assert {names[id(p)] for p in decayed["params"]} == expected
    assert {names[id(p)] for p in plain["params"]} == set(names.values()) - expected - {
        "trunk.wpe.weight"
    }
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["lr"], plain["lr"]) == (
        0.1,
        0.0,
        0.3,
        0.3,
    )


def test_no_empty_groups(tiny_gpt):
    model = tiny_gpt("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("attn.qkv.weight")
    (group,) = parameter_groups(model.parameters(), 0.1, 0.0)
    assert len(group["params"]) == 2


def test_learning_rate_is_a_share_of_each_group_s_peak():
    a, b = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = adamw([{"params": [a], "lr": 0.4}, {"params": [b], "lr": 0.1}])
    for factor in (0.5, 0.25, 1.0):
        set_learning_rate(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.4 * factor, 0.1 * factor]
    assert optimizer.defaults["betas"] == (0.9, 0.999)


# update()


def rows_of(lengths=LENGTHS, vocab: int = 300) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


def row_loss(model: GPT, row: torch.Tensor) -> torch.Tensor:
    """Summed next-token loss of one row: no padding, PyTorch's own cross-entropy."""
    return F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum")


def padded_loss(model: GPT, rows: list[torch.Tensor]) -> torch.Tensor:
    """The same over a right-padded micro-batch: (1) summed."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    targets = ids[:, 1:]
    return F.cross_entropy(
        model(ids[:, :-1].clamp(min=0)).flatten(0, 1), targets.flatten(), reduction="sum"
    )[None]


def optimizer_for(model: GPT, name: str) -> torch.optim.Optimizer:
    if name == "sgd":  # shows any wrong scale of the gradient
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return adamw(parameter_groups(model.parameters(), 1e-3, 0.1), eps=1e-5)


def plain_steps(model: GPT, name: str, clip: float, steps: int) -> list[tuple[float, float]]:
    """The yardstick: the whole batch, row by row, divided once by its number of tokens. [(loss,
    gradient norm)]"""
    optimizer, rows, log = optimizer_for(model, name), rows_of(), []
    tokens = sum(len(row) - 1 for row in rows)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(row_loss(model, row) for row in rows) / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        log.append((loss.item(), norm.item()))
    return log


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name, clip", [("sgd", 0.5), ("sgd", 1e9), ("adamw", 0.5)])
def test_batch_16_is_4_times_4_is_any_split(accelerator, tiny_gpt, family, name, clip):
    start, expected = tiny_gpt(family), tiny_gpt(family)
    log = plain_steps(expected, name, clip, steps=4)
    moved = (flat(expected) - flat(start)).abs().max()
    assert moved > 3e-3
    for sizes in ([16], [4, 4, 4, 4], [1] * 16, [13, 1, 2]):
        model, rows = tiny_gpt(family), rows_of()
        optimizer = optimizer_for(model, name)
        for loss, norm in log:
            micro_batches = [list(part) for part in split(rows, sizes)]
            counts = torch.tensor([sum(len(row) - 1 for row in rows)])
            done = update(
                accelerator,
                model,
                optimizer,
                micro_batches,
                lambda b, m=model: padded_loss(m, b),
                counts,
                clip,
            )
            assert done.losses == pytest.approx([loss], rel=1e-4)
            assert done.grad_norm == pytest.approx(norm, rel=1e-3)
        assert (flat(model) - flat(expected)).abs().max() < 1e-3 * moved


def split(rows: list, sizes: list[int]) -> list[list]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [rows[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def test_that_comparison_would_see_a_mean_of_means(tiny_gpt):
    """What the classic bug does to the weights: far more than the tolerance above."""
    expected, wrong = tiny_gpt("llama"), tiny_gpt("llama")
    plain_steps(expected, "sgd", 1e9, steps=1)
    optimizer = optimizer_for(wrong, "sgd")
    parts = split(rows_of(), [4, 4, 4, 4])
    for part in parts:
        (padded_loss(wrong, part)[0] / sum(len(row) - 1 for row in part) / 4).backward()
    optimizer.step()
    moved = (flat(expected) - flat(tiny_gpt("llama"))).abs().max()
    assert (flat(wrong) - flat(expected)).abs().max() > 0.1 * moved


def test_terms_have_counts_of_their_own(accelerator):
    """Two terms, summed over 3 and 2 items: d/dw (2 * 6 w / 3 + 10 w / 2) = 9 by hand."""
    layer = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    batches = [([1.0, 2.0], [4.0]), ([3.0], [6.0])]

    def terms(batch):
        w = layer.weight.sum()
        return torch.stack([2 * w * sum(batch[0]), w * sum(batch[1])])

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    done = update(accelerator, layer, optimizer, batches, terms, torch.tensor([3, 2]), 1e9)
    assert done.losses == pytest.approx([4.0, 5.0])
    assert done.grad_norm == pytest.approx(9.0)
    assert layer.weight.item() == pytest.approx(1 - 0.09)
    assert layer.weight.grad is None  # nothing is left for the next update
    # a term that is absent has count 0, and does no harm
    done = update(accelerator, layer, optimizer, [([1.0], [])], terms, torch.tensor([1, 0]), 1e9)
    assert done.losses == pytest.approx([1.82, 0.0])


def test_clipping_is_by_the_norm_of_all_parameters(accelerator):
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    module = torch.nn.ParameterList([a, b])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    done = update(
        accelerator, module, optimizer, [0], lambda _: 3 * a + 4 * b, torch.tensor([1]), 1.0
    )
    assert done.grad_norm == pytest.approx(5.0)
    assert (a.item(), b.item()) == pytest.approx((-0.6, -0.8), abs=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 2])
def test_a_non_finite_loss_changes_nothing(accelerator, tiny_gpt, bad, at):
    model = tiny_gpt("llama")
    optimizer = optimizer_for(model, "adamw")
    micro_batches, before = split(rows_of(), [4, 4, 4, 4]), flat(model)

    def loss(batch):
        return padded_loss(model, batch) * (bad if batch is micro_batches[at] else 1.0)

    with pytest.raises(NonFiniteError, match=f"micro-batch {at}.*no update"):
        update(accelerator, model, optimizer, micro_batches, loss, torch.tensor([100]), 1.0)
    assert torch.equal(flat(model), before) and not optimizer.state
    # one that goes on after it is not misled by what the refused update had summed up
    fresh = tiny_gpt("llama")
    for net, opt in ((model, optimizer), (fresh, optimizer_for(fresh, "adamw"))):
        try:
            update(
                accelerator,
                net,
                opt,
                micro_batches,
                lambda b, m=net: padded_loss(m, b),
                torch.tensor([100]),
                1.0,
            )
        except NonFiniteError:
            pytest.fail("what the refused update has summed up is in the next one")
    assert torch.equal(flat(model), flat(fresh))


def test_a_non_finite_gradient_changes_nothing(accelerator):
    module = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.0, 1.0]]))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    with pytest.raises(
        NonFiniteError, match=r"gradient norm (nan|inf).*no update"
    ):  # sqrt is finite at 0, its slope is not
        update(
            accelerator,
            module,
            optimizer,
            [0],
            lambda _: module.weight.sqrt().sum()[None],
            torch.tensor([1]),
            1.0,
        )
    assert module.weight.tolist() == [[0.0, 1.0]] and not optimizer.state
    update(
        accelerator,
        module,
        optimizer,
        [0],
        lambda _: module.weight.sum()[None],
        torch.tensor([1]),
        1.0,
    )
    assert torch.isfinite(module.weight).all()


def test_fp16_lowers_its_loss_scale_and_goes_on():
    """The scaler's own way out of an overflow: no update, half the scale; a loss that is not finite
    still ends it."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    layer = torch.nn.Linear(1, 1, bias=False)
    layer, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.5))
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(
        optimizer.optimizer
    )  # on a GPU accelerate does it
    start, weights, norms = layer.weight.item(), [], []
    for _ in range(6):
        done = update(
            accelerator,
            layer,
            optimizer,
            [8.0],
            lambda x: (layer.weight.sum() * x)[None],
            torch.tensor([1]),
            1.0,
        )
        weights.append(layer.weight.item())
        norms.append(done.grad_norm)
    skipped = sum(not math.isfinite(norm) for norm in norms)
    assert 2 <= skipped <= 5  # 8 x 2^127 is too much, and so is 8 x 2^126
    assert weights[:skipped] == [start] * skipped
    assert norms[skipped:] == pytest.approx([8.0] * (6 - skipped))
    assert weights[skipped:] == pytest.approx(
        [start - 0.5 * n for n in range(1, 7 - skipped)], abs=1e-5
    )  # clipped to norm 1
    with pytest.raises(NonFiniteError, match="loss"):
        update(
            accelerator,
            layer,
            optimizer,
            [math.nan],
            lambda x: (layer.weight.sum() * x)[None],
            torch.tensor([1]),
            1.0,
        )
    AcceleratorState._reset_state(True)
