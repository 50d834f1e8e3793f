"""memory.py: the plan against what PyTorch's allocator, autograd and the optimizer really hold."""
import dataclasses
import types

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.memory import SIZES, most_rows, plans
from model import Transformer, TransformerConfig
from training import memory
from training import optimizer as optimizers

ROWS, T = 8, 64
OPT = TransformerConfig(vocab_size=102, block_size=T, n_head=4, n_kv_head=4, n_embd=64, head_dim=16, n_inner=256)
GROUPED = dict(norm="rmsnorm", position="rope", n_kv_head=2, mlp="swiglu", attention_bias=False, mlp_bias=False)
SHAPES = {"OPT": OPT, "OPT-350M": dataclasses.replace(OPT, norm_order="post", embed_dim=32),
          "LLaMA": dataclasses.replace(OPT, **GROUPED, tie_embeddings=False),
          "Qwen3": dataclasses.replace(OPT, **GROUPED, qk_norm=True),
          "NeoX": dataclasses.replace(OPT, position="rope", rope_fraction=0.25, parallel_residual=True, mlp="gelu")}
MODES = {"float32": ("adamw", torch.float32), "autocast": ("adamw", torch.bfloat16), "split": ("split", torch.bfloat16)}


def planned(config, mode, recompute="none", **changes):
    optimizer, dtype = MODES[mode]
    options = dict(parallel="none", shard=1, micro_rows=ROWS, block_size=T, dtype=dtype, optimizer=optimizer, recompute=recompute)
    return memory.plan(config, **options | changes)


def trained(config, mode, recompute="none"):
    """(model, its optimizer after an update, a function that does a forward and backward)."""
    optimizer, dtype = MODES[mode]
    model = Transformer(config).train()
    for block in model.h:
        block.recompute = recompute
    settings = types.SimpleNamespace(optimizer=optimizer, peak_lr=1e-3, weight_decay=0.1, beta_2=0.95)
    made, ids = optimizers.make_optimizer(model, settings), torch.zeros(ROWS, T, dtype=torch.int64)

    def backward():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(ids, ids).backward()

    backward()
    made.step()
    return model, made, backward


def allocated(function):
    """(most bytes that PyTorch's allocator gave out during function(), bytes that it has not got back), beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()  # noqa: F841  it lives until the profiler has stopped
    now, most = 0, 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now


def of_tensors(function, model):
    """Most bytes of all tensors that operators made during function(): what buffers inside operators take is not among them."""
    parameters = list(model.parameters())
    with memory.Held(*parameters, *(parameter.grad for parameter in parameters)) as held:
        function()
    return held.most


@pytest.mark.parametrize("recompute", memory.RECOMPUTE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [pytest.param("OPT", marks=pytest.mark.slow), "LLaMA"])
def test_the_plan_of_five_blocks_is_what_they_take(shape, mode, recompute):
    """In bfloat16 the processor decides how large the buffers inside products are: only tensors count."""
    config = dataclasses.replace(SHAPES[shape], n_layer=5)
    plan, (model, _, backward) = planned(config, mode, recompute), trained(config, mode, recompute)
    peak = allocated(backward)[0] if mode == "float32" else of_tensors(backward, model)
    assert peak == pytest.approx(plan.activations + plan.working + plan.copies, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["OPT-350M", "Qwen3", "NeoX"])
def test_other_families_are_planned_as_well(shape, mode):
    config = dataclasses.replace(SHAPES[shape], n_layer=4)
    plan, (model, _, backward) = planned(config, mode, "selective"), trained(config, mode, "selective")
    peak = allocated(backward)[0] if mode == "float32" else of_tensors(backward, model)
    assert peak == pytest.approx(plan.activations + plan.working + plan.copies, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", memory.RECOMPUTE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["OPT", "LLaMA"])
def test_what_the_allocator_has_not_got_back_after_a_forward_is_what_the_blocks_keep(shape, mode, recompute):
    """Buffers inside products are back by then, whichever processor computes them."""
    dtype, ids = MODES[mode][1], torch.zeros(ROWS, T, dtype=torch.int64)

    def held(blocks):
        model, _, _ = trained(dataclasses.replace(SHAPES[shape], n_layer=blocks), mode, recompute)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return allocated(lambda: model(ids, ids))[1]

    plans = (planned(dataclasses.replace(SHAPES[shape], n_layer=blocks), mode, recompute) for blocks in (3, 2))
    three, two = (plan.activations + plan.copies for plan in plans)  # autocast's copies of the weights live as long
    assert held(3) - held(2) == pytest.approx(three - two, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_keeps_the_tensors_that_autograd_saves(shape):
    def saved(blocks):
        model, storages = Transformer(dataclasses.replace(SHAPES[shape], n_layer=blocks)), {}
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(ROWS, T, dtype=torch.int64))
        return sum(storage.nbytes() for storage in storages.values())

    kept, _ = memory.activations(SHAPES[shape], ROWS, T, torch.float32, torch.float32, "none")
    assert kept == pytest.approx(saved(3) - saved(2), rel=0.05)


def test_what_a_llama_block_keeps_is_what_arithmetic_says():
    config = dataclasses.replace(SHAPES["LLaMA"], n_kv_head=4)
    N, C, inner = ROWS * T, config.n_embd, config.n_inner
    lse = 4 * N * config.n_head
    full, _ = memory.activations(config, ROWS, T, torch.bfloat16, torch.bfloat16, "full")
    assert full == 2 * N * C  # the input of the block
    selective, _ = memory.activations(config, ROWS, T, torch.bfloat16, torch.bfloat16, "selective")
    assert selective == 2 * N * (C + 3 * C + C + C + 2 * inner + C) + lse  # input, qkv, attention, out, gate and up, down


@pytest.mark.parametrize("kind, size", [("adamw", 16), ("split", 14)])
def test_weights_gradients_and_optimizer_are_those_of_a_real_update(kind, size):
    mode = {"adamw": "float32", "split": "split"}[kind]
    config = dataclasses.replace(SHAPES["LLaMA"], n_layer=2)
    model, optimizer, _ = trained(config, mode)
    plan, parameters = planned(config, mode), list(model.parameters())
    assert plan.parameters == sum(parameter.numel() for parameter in parameters)
    assert plan.weights == sum(parameter.nbytes for parameter in parameters)
    assert plan.gradients == sum(parameter.grad.nbytes for parameter in parameters)
    assert plan.optimizer == sum(value.nbytes for p in parameters for value in optimizer.state[p].values() if value.ndim)
    assert plan.weights + plan.gradients + plan.optimizer == size * plan.parameters


def test_a_process_has_its_share_of_the_rows_of_each_tensor():
    config = dataclasses.replace(OPT, n_layer=2)  # 102 rows of units in four parts: 26, 26, 26, 24
    whole, part = planned(config, "float32"), planned(config, "float32", parallel="fsdp", shard=4)
    uneven = 4 * 64 * (26 - 102 / 4)
    assert part.weights == whole.weights / 4 + uneven == part.gradients and part.optimizer == 2 * part.weights
    assert part.activations == whole.activations


def test_gathered_blocks_depend_on_reshard():
    config = dataclasses.replace(OPT, n_layer=12)
    spread = dict(parallel="fsdp", shard=4)
    freed = planned(config, "autocast", **spread)
    kept = planned(config, "autocast", **spread, reshard=False)
    block = sum(parameter.numel() for parameter in Transformer(dataclasses.replace(OPT, n_layer=1)).h.parameters())
    assert kept.copies - freed.copies == 2 * 10 * block
    assert freed.gradients == freed.weights
    assert planned(config, "float32", parallel="ddp").copies == 0  # DDP's buckets are the gradients


def test_gradients_count_beside_activations_only_where_both_are_there():
    plan = planned(OPT, "float32")
    rest = plan.weights + plan.optimizer + plan.copies + plan.working
    assert plan.total == rest + max(plan.activations, plan.gradients)
    assert dataclasses.replace(plan, pieces=2).total == rest + plan.activations + plan.gradients


@pytest.mark.slow
def test_less_is_kept_the_more_is_computed_again_and_rows_add_up():
    none, selective, full = (planned(SHAPES["LLaMA"], "autocast", recompute).activations for recompute in memory.RECOMPUTE)
    assert none > 1.5 * selective > 1.5 * 2 * full
    one, two, five = (planned(OPT, "split", micro_rows=rows).activations for rows in (1, 2, 5))
    assert five == pytest.approx(one + 4 * (two - one), rel=1e-3)


def test_seven_billion_parameters_are_planned_without_memory_for_them():
    config = SIZES["LLaMA-7B"]
    arguments = dict(micro_rows=8, block_size=1024, dtype=torch.bfloat16, recompute="selective")
    alone = memory.plan(config, parallel="none", shard=1, optimizer="split", **arguments)
    eight = memory.plan(config, parallel="fsdp", shard=8, optimizer="adamw", **arguments)
    assert alone.weights + alone.gradients + alone.optimizer == 14 * alone.parameters
    assert alone.parameters == 6_476_271_616 + 2 * config.vocab_size * 4096
    assert 80e9 < alone.total < 141e9 and eight.total < 80e9


def test_the_table_shows_every_way_of_recomputing_and_marks_the_chosen_one():
    options = types.SimpleNamespace(optimizer="adamw", shard_size=0, reshard=True, block_size=T, tokens_per_step=2 * 8 * ROWS * T,
                                    recompute="selective")
    text = memory.table(OPT, options, "fsdp", 8, ROWS, torch.bfloat16)
    lines = text.splitlines()
    assert "2 an update, a copy of the model on 8" in lines[0] and f"{ROWS} x {T} ids" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == list(memory.RECOMPUTE)
    assert ["<-" in line for line in lines[2:]] == [False, True, False]


def test_the_most_rows_that_fit_are_found():
    of, spread = plans("OPT-125M", 8, "adamw", "none")
    assert spread == "ddp"
    rows = most_rows(of, 24e9)
    assert of(rows).total <= 24e9 < of(rows + 1).total
    assert most_rows(of, 1e9) == 0
