"""optimizer.py: AdamW, and the same to the last bit on bfloat16 weights with their low halves."""
import os
import time
import types

import pytest
import torch
import torch.distributed as torch_distributed
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from training import optimizer as optimizers
from training.distributed import part
from training.learner import Learner
from training.optimizer import join, low_bits, make_optimizer, master_weights


def options(kind, peak_lr=1e-2):
    return types.SimpleNamespace(optimizer=kind, peak_lr=peak_lr, weight_decay=0.1, beta_2=0.95)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 37), nn.LayerNorm(37), nn.Linear(37, 11))


def float32_of(bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def train(pairs, steps, dtype=torch.bfloat16):
    """The same random gradients of that dtype, and learning rates that change, for every (model, optimizer)."""
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        for parameters in zip(*(model.parameters() for model, _ in pairs)):
            gradient = (torch.randn(parameters[0].shape, generator=generator) * 10.0 ** -(step % 5)).to(dtype)
            for parameter in parameters:
                parameter.grad_dtype = None  # any: a bfloat16 weight may have a float32 gradient
                parameter.grad = gradient.float() if parameter.dtype == torch.float32 else gradient.clone()
        for _, optimizer in pairs:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()


@given(st.lists(st.integers(-2**31, 2**31 - 1), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_a_number_taken_apart_and_joined_is_the_same_to_the_last_bit(bits):
    master = float32_of(bits)
    weight, low = low_bits(master)
    back, numbers = join(weight, low), ~master.isnan()
    assert back.view(torch.int32)[numbers].equal(master.view(torch.int32)[numbers])
    assert back.isnan().equal(master.isnan()) and weight.isnan().equal(master.isnan())


def test_the_weight_is_the_nearest_bfloat16_and_ties_go_away_from_zero():
    torch.manual_seed(0)
    master = torch.cat([torch.randn(20_000), torch.randn(20_000) * 1e-40, torch.zeros(1)])
    ties = master.view(torch.int32)[:5000] & -0x10000 | 0x8000
    master = torch.cat([master, ties.view(torch.float32)])
    weight, _ = low_bits(master)
    below = (master.view(torch.int32) & -0x10000).view(torch.float32).double()  # towards zero
    above = ((master.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).double()
    exact = master.double()
    nearest = torch.where((exact - below).abs() < (above - exact).abs(), below, above)
    assert weight.double().equal(nearest)
    tie = master.view(torch.int32) & 0xFFFF == 0x8000
    assert weight[~tie].equal(master.bfloat16()[~tie]) and not weight[tie].equal(master.bfloat16()[tie])


def test_the_largest_and_the_special_numbers_survive():
    master = float32_of([0x7F7FFFFF, 0x7F7F8000, 0x7F800000, -0x800000, -0x80000000, 1, 0x7FFFFFFF, -1])
    back = join(*low_bits(master))
    assert back[:6].view(torch.int32).equal(master[:6].view(torch.int32)) and back[6:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_split_updates_are_those_of_float32_masters_bit_for_bit(dtype, monkeypatch):
    monkeypatch.setattr(optimizers, "PIECE", 256)  # several pieces and a rest
    plain, split = network(), network()
    pairs = [(plain, make_optimizer(plain, options("adamw"))), (split, make_optimizer(split, options("split")))]
    train(pairs, 60, dtype)
    assert {parameter.dtype for parameter in split.parameters()} == {torch.bfloat16}
    masters = dict(master_weights(*pairs[1]))
    start = dict(network().named_parameters())
    for (name, expected), parameter in zip(plain.named_parameters(), split.parameters(), strict=True):
        assert masters[name].equal(expected) and not expected.equal(start[name]), name
        assert parameter.equal(low_bits(expected)[0]), name
        for slot, value in pairs[0][1].state[expected].items():
            assert pairs[1][1].state[parameter][slot].equal(value), (name, slot)


def test_small_updates_that_bfloat16_would_lose_add_up():
    weight = nn.Parameter(torch.ones(64, 64))
    model = nn.ParameterDict({"weight": weight})
    optimizer = make_optimizer(model, options("split", peak_lr=1e-5))
    for _ in range(100):
        model["weight"].grad = torch.ones(64, 64, dtype=torch.bfloat16)
        optimizer.step()
    master = dict(master_weights(model, optimizer))["weight"]
    torch.testing.assert_close(master, torch.full((64, 64), 1 - 100 * 1e-5 * 1.1), rtol=1e-5, atol=0)  # 1.1: decay of 0.1


def test_the_float32_update_follows_the_equations_of_adamw():
    model = network()
    optimizer, start = make_optimizer(model, options("adamw")), [p.detach().double() for p in model.parameters()]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in start]
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 6):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            g, decay = parameter.grad.double(), 0.1 if parameter.ndim >= 2 else 0.0
            moments[i] = m, v = 0.9 * moments[i][0] + 0.1 * g, 0.95 * moments[i][1] + 0.05 * g * g
            start[i] = start[i] * (1 - 1e-2 * decay) - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
    for parameter, expected in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_weight_without_gradient_stays_as_it_is():
    model = network()
    optimizer = make_optimizer(model, options("split"))
    before = {name: master.clone() for name, master in master_weights(model, optimizer)}
    model[1].weight.grad = torch.ones(37, 24, dtype=torch.bfloat16)
    optimizer.step()
    changed = {name for name, master in master_weights(model, optimizer) if not master.equal(before[name])}
    assert changed == {"1.weight"} and optimizer.state[model[0].weight]["step"] == 0


def test_a_process_without_a_part_of_a_weight_counts_its_steps_too():
    """Any process may write the count: one behind the others would restart the moments' correction."""
    model = nn.ParameterDict({"none": nn.Parameter(torch.zeros(0, 4)), "some": nn.Parameter(torch.ones(2, 4))})
    optimizer = make_optimizer(model, options("split"))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert [optimizer.state[parameter]["step"].item() for parameter in model.parameters()] == [3, 3]


def test_the_norm_of_bfloat16_gradients_is_a_float32_number():
    model, generator = network().bfloat16(), torch.Generator().manual_seed(0)
    learner = types.SimpleNamespace(model=model)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
    exact = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]).norm()
    assert Learner.clip(learner, 1e9) == pytest.approx(exact.item(), rel=1e-6)
    assert Learner.clip(learner, 0.5) == pytest.approx(exact.item(), rel=1e-6)
    clipped = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]).norm()
    assert clipped.item() == pytest.approx(0.5, rel=2e-3)  # each rounded to bfloat16


def test_bfloat16_weights_with_their_low_bits_continue_a_float32_model():
    model, masters = network().bfloat16(), dict(network().named_parameters())
    apart = {name: low_bits(master.detach()) for name, master in masters.items()}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(apart[name][0])
    optimizer = make_optimizer(model, options("split"), {name: low for name, (_, low) in apart.items()})
    for name, master in master_weights(model, optimizer):
        assert master.equal(masters[name]), name
    rounded = network().bfloat16()  # without low bits: the weights as they are
    for (_, master), parameter in zip(master_weights(rounded, make_optimizer(rounded, options("split"))), rounded.parameters()):
        assert master.equal(parameter.float())


def test_a_loaded_state_continues_to_the_same_bits():
    model = network()
    optimizer = make_optimizer(model, options("split"))
    train([(model, optimizer)], 5)
    other = network(1)
    resumed = make_optimizer(other, options("split"))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train([(model, optimizer), (other, resumed)], 5)
    for (name, expected), (_, master) in zip(master_weights(model, optimizer), master_weights(other, resumed), strict=True):
        assert master.equal(expected), name


SLOTS = dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.float32)


@pytest.mark.parametrize("kind", optimizers.KINDS)
def test_the_slots_are_those_of_the_state(kind):
    model = network()
    optimizer = make_optimizer(model, options(kind))
    train([(model, optimizer)], 1)
    for parameter in model.parameters():
        found = optimizer.state[parameter]
        assert {slot: value.dtype for slot, value in found.items()} == SLOTS | ({"low": torch.int16} if kind == "split" else {})
        assert all(value.shape == (() if slot == "step" else parameter.shape) for slot, value in found.items())
    held = {"adamw": 16, "split": 14}[kind]
    count = sum(parameter.numel() for parameter in model.parameters())
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.ndim]
    assert sum(tensor.nbytes for tensor in tensors) == held * count


def test_norms_and_biases_do_not_decay_and_wrong_choices_are_refused():
    for kind in optimizers.KINDS:
        decaying, others = make_optimizer(network(), options(kind)).param_groups
        assert {p.ndim for p in decaying["params"]} == {2} and {p.ndim for p in others["params"]} == {1}
        assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0.0 and decaying["betas"] == (0.9, 0.95)
    with pytest.raises(ValueError, match="expected one of adamw, split"):
        make_optimizer(network(), options("sgd"))
    with pytest.raises(ValueError, match="float16"):
        make_optimizer(network().half(), options("split"))
    with pytest.raises(ValueError, match="no weight is called nonsense"):
        make_optimizer(network().bfloat16(), options("split"), {"nonsense": torch.zeros(1, dtype=torch.int16)})


def divided(tensor, mesh):
    """distribute_tensor without sending anything: gloo cannot send int16."""
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def distributed_updates(rank, folder, world):
    """In a process of its own: its part of the masters after some updates of distributed weights, compared with the whole."""
    torch.set_num_threads(1)
    store = torch_distributed.FileStore(os.path.join(folder, "store"), world)
    torch_distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    plain, whole = network(), network()
    apart = {name: low_bits(master.detach()) for name, master in plain.named_parameters()}
    model = network()
    for name, (weight, _) in apart.items():
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, nn.Parameter(divided(weight, mesh)))
    lows = {name: divided(low, mesh).to_local() for name, (_, low) in apart.items()}
    optimizer, expected = make_optimizer(model, options("split"), lows), make_optimizer(whole, options("split"))
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for mine, parameter in zip(model.parameters(), whole.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
            mine.grad = divided(parameter.grad, mesh)
        optimizer.step()
        expected.step()
    for (name, master), (_, wanted) in zip(master_weights(model, optimizer), master_weights(whole, expected), strict=True):
        assert isinstance(master, DTensor), name
        torch.testing.assert_close(part(master), divided(wanted, mesh).to_local(), rtol=0, atol=1e-8)
    for parameter in model.parameters():
        placed = {type(value) for slot, value in optimizer.state[parameter].items() if slot != "step"}
        assert placed == {DTensor}
    torch_distributed.destroy_process_group()


def test_distributed_weights_take_the_updates_of_whole_ones(tmp_path):
    started = torch.multiprocessing.spawn(distributed_updates, (str(tmp_path), 2), nprocs=2, join=False, daemon=True)
    end = time.monotonic() + 120
    while not started.join(max(0, end - time.monotonic())):  # returns when one process has ended, raises what it raised
        assert time.monotonic() < end, "a process hangs"
