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

import kernels
from training import optimizer as optimizers
from training.learner import Learner
from training.optimizer import join, low_bits, make_optimizer, master_weights
from training.sharding import part


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
                own = gradient.to(parameter.device, copy=True)
                parameter.grad = own.float() if parameter.dtype == torch.float32 else own
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


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_norm_of_bfloat16_gradients_is_a_float32_number_and_clips(on_gpu):
    """By the optimizer itself, where a look at the norm would be a wait."""
    model, generator = network().bfloat16(), torch.Generator().manual_seed(0)
    learner = types.SimpleNamespace(model=model, on_gpu=on_gpu, dist=types.SimpleNamespace(device=torch.device("cpu")))
    learner.optimizer = types.SimpleNamespace(
        param_groups=[], grad_scale=1, zero_grad=lambda **_: None, step=lambda: stepped.append(
            [parameter.grad.double() / learner.optimizer.grad_scale for parameter in model.parameters()]))
    exact = None
    for largest, expected, tolerance in ((1e9, None, 1e-6), (0.5, 0.5, 2e-3)):  # clipped, each rounded to bfloat16
        stepped, learner.options = [], types.SimpleNamespace(clip=largest)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator.manual_seed(parameter.numel())).bfloat16()
        exact = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]).norm().item()
        norm = Learner.norm(learner)
        assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact, rel=1e-6)
        Learner.step(learner, 1e-3, norm, torch.zeros(()))
        clipped = torch.cat([gradient.flatten() for gradient in stepped[0]]).norm().item()
        assert clipped == pytest.approx(expected or exact, rel=tolerance)


# ---------------------------------------------------------------------------------------------- the kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter


def drawn(n, dtype):
    """(gradient, weight, exp_avg, exp_avg_sq, low), flat, with zeros, denormal numbers and ties among them."""
    torch.manual_seed(n)
    gradient = (torch.randn(n) * 10.0 ** torch.randint(-6, 2, (n,))).to(dtype)
    master = torch.randn(n) * 10.0 ** torch.randint(-3, 2, (n,))
    master[::7] = (master[::7].view(torch.int32) & -0x10000 | 0x8000).view(torch.float32)
    first, second = torch.randn(n) * 1e-2, torch.rand(n) * 10.0 ** torch.randint(-12, 0, (n,))
    master[3], gradient[5], first[5], second[5] = 1e-40, 0, 0, 0
    weight, low = low_bits(master)
    return [tensor.to(DEVICE) for tensor in (gradient, weight, first, second, low)]


def ulp(x):
    """Distance of float32 numbers of that size."""
    return 2.0 ** (torch.frexp(x.abs().clamp(min=2.0**-126))[1].double() - 24)


GROUP = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


@pytest.mark.parametrize("n", [1, 1000, 3 * 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernel_is_as_exact_as_the_fused_adamw_of_pytorch(n, dtype):
    """In units of the last place of the larger of the terms that are added: moments beside exact arithmetic and, on a CPU, whose
    fused AdamW works in the same order, beside PyTorch's; masters beside exact arithmetic on those moments."""
    pytest.importorskip("triton")
    steps, scale = [torch.tensor(count, device=DEVICE) for count in (0.0, 40.0)], torch.tensor(1.7, device=DEVICE)
    tensors = [drawn(n + 7, dtype) for _ in steps]
    before = [[tensor.clone() for tensor in flat] for flat in tensors]
    kernels.split_adamw.update(tensors, steps, GROUP, torch.zeros((), device=DEVICE), scale)
    for (gradient, weight, first, second, low), old, step in zip(tensors, before, steps):
        peer = [tensor.clone() for tensor in old]
        optimizers.update_piece(*peer, step, GROUP, torch.zeros((), device=DEVICE), scale)
        g = old[0].double() / scale
        for found, exact in ((first, 0.9 * old[2].double() + 0.1 * g), *([(first, peer[2])] if DEVICE == "cpu" else [])):
            assert ((found - exact).abs() <= 3 * torch.maximum(ulp(0.9 * old[2]), ulp(0.1 * g))).all()
        for found, exact in ((second, 0.95 * old[3].double() + 0.05 * g * g), *([(second, peer[3])] if DEVICE == "cpu" else [])):
            assert ((found - exact).abs() <= 4 * ulp(exact)).all()
        t = step.item() + 1
        change = 3e-3 / (1 - 0.9**t) * first.double() / ((second.double() / (1 - 0.95**t)).sqrt() + 1e-8)
        was, now = join(old[1], old[4]).double(), join(weight, low)
        assert ((now - (was * (1 - 3e-3 * 0.1) - change)).abs() <= 5 * torch.maximum(ulp(was), ulp(change))).all()
        assert not first.equal(old[2]) and weight.equal(low_bits(now)[0]) and gradient.equal(old[0])


def test_the_kernel_changes_nothing_where_it_is_to_skip():
    pytest.importorskip("triton")
    tensors = drawn(2000, torch.bfloat16)
    tensors[0][7] = float("nan")
    before = [tensor.view(torch.int16).clone() for tensor in tensors]
    step = torch.tensor(3.0, device=DEVICE)
    kernels.split_adamw.update([tensors], [step], GROUP, torch.ones((), device=DEVICE), torch.tensor(float("nan"), device=DEVICE))
    assert all(tensor.view(torch.int16).equal(old) for tensor, old in zip(tensors, before))
    kernels.split_adamw.update([tensors], [step], GROUP, None, None)  # unasked, it is what AdamW makes of it
    assert join(tensors[1], tensors[4]).isnan().nonzero().tolist() == [[7]] and tensors[1].isnan().nonzero().tolist() == [[7]]


def test_the_kernel_puts_masters_back_as_they_were_where_nothing_is_to_change():
    """Among them ties, denormal numbers, the largest ones and NaN."""
    pytest.importorskip("triton")
    torch.set_flush_denormal(False)  # a run of train.py sets it for its process
    master = float32_of([0x3F808000, 0x3F818000, -0x407F8000, 0x7F7FFFFF, 0x7F7F8000, 1, -0x7FFFFFFF, 0x8000, 0x7FC00000, 0])
    weight, low = (tensor.to(DEVICE) for tensor in low_bits(master))
    weight.view(torch.int16)[-1], low[-1] = -2**15, -1  # together 0x7FFFFFFF, the NaN that GPUs make: half a unit more is -0
    gradient, *moments = (torch.zeros(len(master), device=DEVICE) for _ in range(3))
    before = [weight.view(torch.int16).clone(), low.clone()]
    step, group = torch.zeros((), device=DEVICE), GROUP | {"weight_decay": 0.0}
    kernels.split_adamw.update([[gradient, weight, *moments, low]], [step], group, None, None)
    assert weight.view(torch.int16)[:-2].equal(before[0][:-2]) and low[:-2].equal(before[1][:-2])
    assert weight[-2:].isnan().all() and join(weight, low)[-2:].isnan().all()


def test_the_optimizer_trains_with_the_kernel_as_without(monkeypatch):
    """Weights of several shapes and none, in float32 and in bfloat16 gradients, also where the weight is empty."""
    pytest.importorskip("triton")
    models = [network() for _ in range(2)]
    pairs = [(model, make_optimizer(model.to(DEVICE), options("split"))) for model in models]
    choose = kernels.choose
    for backend, pair in zip(("torch", "triton"), pairs):
        monkeypatch.setattr(kernels, "choose", lambda *arguments, backend=backend: choose(*arguments, forced=backend))
        train([pair], 8)
    for (name, wanted), (_, master) in zip(*(master_weights(*pair) for pair in pairs), strict=True):
        torch.testing.assert_close(master, wanted, rtol=1e-6, atol=1e-7, msg=name)
    counts = [[state["step"].item() for state in optimizer.state.values()] for _, optimizer in pairs]
    assert counts[0] == counts[1] == [8.0] * len(counts[0])


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


@pytest.mark.slow
def test_distributed_weights_take_the_updates_of_whole_ones(tmp_path):
    started = torch.multiprocessing.spawn(distributed_updates, (str(tmp_path), 2), nprocs=2, join=False, daemon=True)
    end = time.monotonic() + 120
    while not started.join(max(0, end - time.monotonic())):  # returns when one process has ended, raises what it raised
        assert time.monotonic() < end, "a process hangs"
