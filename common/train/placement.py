"""Where a run lives: one process, several (DDP), or DeepSpeed ZeRO, as `accelerate launch` says;
and what differs between them.

Only DeepSpeed does: its engine owns the optimizer step, and under ZeRO-3 no process has a whole
parameter. DeepSpeed keeps weights and optimizer in fp32 here as everywhere; the precision of the
arithmetic is autocast's.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from common.model.gpt import GPT, RewardModel
from common.model.lora import learned_rows, merged_state
from common.program.errors import InputError
from common.train.zero import put_zero_moments, zero_moments, zero_stage

# Of matrix products in training, by the name of the precision.
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16() -> bool:
    """Whether bf16 arithmetic (not emulation) is at hand."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The flags are private in torch; /proc/cpuinfo says the same on Linux, and a Mac's CPU is best
    # left in fp32.
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def chosen_precision(asked: str) -> str:
    """no, bf16 or fp16: `asked`, or for auto bf16 where the hardware computes in it, else no."""
    if asked != "auto":
        return asked
    return "bf16" if has_bf16() else "no"


def accelerator(precision: str, micro_batch: int, max_grad_norm: float, **more: Any) -> Accelerator:
    """The Accelerator of a stage. Raises InputError for what the placement cannot do."""
    for name in ("FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            instead = "models are split by DeepSpeed ZeRO-3"
            fix = "accelerate launch --config_file configs/accelerate/zero3.yaml"
            raise InputError(f"accelerate asks for {name}: not supported, {instead}: {fix}")
    gpu = torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if precision == "fp16" and not gpu:
        raise InputError(
            "mixed_precision fp16: there is no GPU here, and CPUs train in no or bf16; use auto"
        )
    if precision == "fp16" and deepspeed:
        raise InputError(
            "mixed_precision fp16: DeepSpeed has no loss scaling over fp32 weights; "
            "use bf16 or auto"
        )
    if deepspeed and not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it accelerate does not look for DeepSpeed
    # Our buffers are constants: nothing to broadcast at every forward. torch 2.13 renames the
    # switch, accelerate not yet.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if deepspeed and not gpu:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    made = Accelerator(
        mixed_precision="no" if deepspeed else precision,
        cpu=not gpu and not deepspeed,
        kwargs_handlers=handlers,
        **more,
    )
    if deepspeed:
        settings = made.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = micro_batch
        settings["gradient_accumulation_steps"] = 1  # update() accumulates, and normalises
        settings["gradient_clipping"] = max_grad_norm
        settings["zero_force_ds_cpu_optimizer"] = False  # offloaded or not, the optimizer is ours
    return made


@contextmanager
def whole(made: Accelerator, module: nn.Module, change: bool = False) -> Iterator[None]:
    """Inside, each process has every parameter of `module` whole, to read; and with `change` to
    change, in all processes alike. All processes must enter together, and not twice."""
    if zero_stage(made) == 3:
        import deepspeed

        writer = 0 if change else None  # without one, changes are lost at the end
        with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=writer):
            yield
    else:
        yield


def sampler(
    made: Accelerator, module: GPT, dtype: torch.dtype = torch.float32, copy: GPT | None = None
) -> GPT:
    """A GPT to sample from in `dtype`, with the weights of `module` as they are now.

    It is `module` itself, or where that is in another precision, split over processes by ZeRO-3, or
    has rows that LoRA learns, a copy: the one that the last call returned, if given, else a new
    one.
    """
    as_it_is = dtype == next(module.parameters()).dtype and not learned_rows(module)
    if zero_stage(made) < 3 and as_it_is:
        return module
    with torch.random.fork_rng(), whole(made, module):
        copy = copy or GPT(module.config).to(made.device, dtype).requires_grad_(False).eval()
        copy.load_state_dict(merged_state(module))
    return copy


def frozen(made: Accelerator, module: GPT | RewardModel) -> nn.Module:
    """`module` prepared for inference only; split over the processes under ZeRO-3."""
    module = module.requires_grad_(False).eval()
    if zero_stage(made) < 3:
        return module.to(made.device)
    import deepspeed

    settings = made.state.deepspeed_plugin.deepspeed_config
    kept = (
        *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("zero_optimization", "steps_per_print"),
    )
    config = {key: settings[key] for key in kept if key in settings}
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    return engine


def whole_weights(made: Accelerator, module: nn.Module) -> dict[str, Tensor]:
    """{name: fp32 weight, on the CPU} of what trains. All processes must call it; only the main one
    gets more than {}."""
    trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    if zero_stage(made):
        from deepspeed.utils import safe_get_full_fp32_param

        trained = ((name, safe_get_full_fp32_param(p)) for name, p in trained)
    return collected(made, trained)


def collected(made: Accelerator, pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The (name, tensor) pairs as a dict on the CPU of the main process; {} in the others, which
    must go through them as well."""
    kept = {}
    for name, tensor in pairs:  # one at a time: no process holds them all on its GPU
        if made.is_main_process:
            kept[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return kept


def parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order of the optimizer's own numbers."""
    return [name for group in optimizer.param_groups for name in group["names"]]


def whole_moments(
    made: Accelerator, optimizer: torch.optim.Optimizer, module: nn.Module
) -> dict[str, Tensor]:
    """{"name/key": tensor} of the optimizer's state. All processes must call it; only the main one
    gets more than {}."""
    if zero_stage(made):
        return collected(made, zero_moments(made, module))
    names, state = parameter_names(optimizer), optimizer.state_dict()["state"]
    moments = (
        (f"{names[n]}/{key}", tensor)
        for n, of_one in state.items()
        for key, tensor in of_one.items()
    )
    return collected(made, moments)


def put_moments(
    made: Accelerator,
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    moments: Mapping[str, Tensor],
) -> None:
    """Give the optimizer the state that `whole_moments` returned, which all processes have."""
    if zero_stage(made):
        put_zero_moments(made, module, moments)
        return
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        name, kind = key.rsplit("/", 1)
        by_name.setdefault(name, {})[kind] = tensor
    names = parameter_names(optimizer)
    state = {n: by_name[name] for n, name in enumerate(names) if name in by_name}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
