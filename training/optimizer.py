"""AdamW in two forms: float32 weights, or bfloat16 weights whose missing sixteen bits the optimizer keeps.

    adamw   float32 weight 4 + gradient 4 + moments 4 + 4                                    16 bytes a parameter
    split   bfloat16 weight 2 + low bits 2 + bfloat16 gradient 2 + moments 4 + 4             14 bytes a parameter

A float32 number is a bfloat16 number and sixteen bits more. split stores it that way: nothing is lost, and every update is that
of AdamW on float32 weights, to the last bit:

    master = join(weight, low)  --PyTorch's fused AdamW, float32-->  master'  --split-->  weight', low'

    bits of master    s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm          low = bits(master) - bits(weight) * 2^16
                      |---- weight ----| |----- low ----|          -2^15 <= low < 2^15

The weight is the master rounded to nearest, so that the network sees the best bfloat16 there is; truncation would shrink all
weights by half a unit of the last place. Between two neighbours ties go away from zero: rounded to even, a tie would have low =
+2^15 or -2^15, one value more than sixteen bits hold. Bits grow with the magnitude, so "up" is away from zero for both signs.

Source: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2.
"""
import torch
from torch.optim.adamw import adamw

import kernels
from training.sharding import part

KINDS = ("adamw", "split")
MOST_SPLIT_PIECES = 4  # forwards of an update whose bfloat16 gradients split adds up
PIECE = 2**24  # elements updated at once by split, a multiple of every vector width: bounds the float32 copies to some 400 MB


def make_optimizer(model, options, lows=None):
    """The optimizer that --optimizer names, decaying matrices and tables only.

    Args:
        model: with float32 weights, or for split also bfloat16 ones (distributed over processes they must be); its weights
            then become bfloat16 in place.
        lows: split: {name: int16 tensor} of low bits that belong to bfloat16 weights, as low_bits() gives them; the part of
            this process where a weight is distributed. Absent names: 0.
    Raises: ValueError for an unknown optimizer, and for weights that the optimizer cannot take.
    """
    if options.optimizer not in KINDS:
        raise ValueError(f"--optimizer={options.optimizer}: expected one of {', '.join(KINDS)}")
    parameters = dict(model.named_parameters())
    unknown = set(lows or {}) - set(parameters)
    if unknown:
        raise ValueError(f"low bits for a weight that is not in the model: no weight is called {min(unknown)}")
    groups = [{"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": options.weight_decay},
              {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0}]
    common = dict(lr=options.peak_lr, betas=(0.9, options.beta_2), eps=1e-8)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common, fused=True)
    return SplitAdamW(groups, **common, lows={parameters[name]: low for name, low in (lows or {}).items()})


def check_pieces(kind, pieces):
    """Raise ValueError for more forwards an update than the gradients of that kind of optimizer can be summed over."""
    if kind == "split" and pieces > MOST_SPLIT_PIECES:
        raise ValueError(f"--optimizer=split adds gradients up in bfloat16, which loses them after {MOST_SPLIT_PIECES} forwards; "
                         f"{pieces} are asked for: raise --micro-batch, or take --optimizer=adamw")


def low_bits(master):
    """float32 -> (bfloat16 of the same shape: nearest, ties away from zero; int16 that join() needs to give master back)."""
    weight = master.to(torch.bfloat16)  # ties to even, and NaN stays NaN, which adding 2^15 to the bits would not promise
    low = master.view(torch.int32) - (weight.view(torch.int16).to(torch.int32) << 16)
    weight.view(torch.int16).add_(low == 2**15)  # a tie that went towards zero: one up, and low wraps to -2^15
    return weight, low.to(torch.int16)


def join(weight, low):
    """(bfloat16, int16) -> the float32 that low_bits() took apart, bit for bit (a NaN gives a NaN)."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on float32 masters that are stored as bfloat16 weights and int16 low bits.

    Bit for bit torch.optim.AdamW(fused=True) on float32 weights with the same gradients; on GPUs, where kernels/split_adamw.py
    does it in one pass, to two units of the last place. As in PyTorch's, an attribute found_inf (() float32, not 0) skips an
    update and grad_scale (() float32) divides the gradients. All slots exist from the start: step () float32; exp_avg,
    exp_avg_sq float32 and low int16, distributed as their weight is.

    Args: lows: {parameter: int16 tensor}, see make_optimizer().
    Raises: ValueError for weights that are neither float32 nor bfloat16, or distributed and not bfloat16.
    """

    @torch.no_grad()
    def __init__(self, params, lr, betas, eps, weight_decay=0.0, lows=None):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        for parameter in (p for group in self.param_groups for p in group["params"]):
            low = (lows or {}).get(parameter)
            if parameter.dtype == torch.float32 and part(parameter) is parameter and low is None:
                parameter.data, low = low_bits(parameter.data)
            if parameter.dtype != torch.bfloat16:
                raise ValueError(f"optimizer split got a {'distributed ' if part(parameter) is not parameter else ''}weight of "
                                 f"{parameter.dtype}; make it bfloat16 before, with the low bits as `lows`")
            state = self.state[parameter]
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
            if low is not None:
                part(state["low"]).copy_(part(low))

    @torch.no_grad()
    def step(self):
        """One update of every weight that has a gradient, in bfloat16 or float32."""
        skip, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for group in self.param_groups:
            states = {parameter: self.state[parameter] for parameter in group["params"] if parameter.grad is not None}
            steps = [state["step"] for state in states.values()]
            if not steps:
                continue
            tensors = [[part(parameter.grad).reshape(-1)] + [part(tensor).detach().view(-1) for tensor in (
                parameter, state["exp_avg"], state["exp_avg_sq"], state["low"])] for parameter, state in states.items()]
            if kernels.choose("split_adamw", steps[0].device.type)[0] == "triton":
                kernels.split_adamw.update(tensors, steps, group, skip, scale)
            else:
                for flat, step in zip(tensors, steps):
                    for pieces in zip(*(tensor.split(PIECE) for tensor in flat)) if len(flat[0]) else ():
                        update_piece(*pieces, step, group, skip, scale)
            # where this process has no part of a weight, too: any process may save the count
            torch._foreach_add_(steps, [torch.ones_like(steps[0]) if skip is None else 1 - skip] * len(steps))

    def load_state_dict(self, state_dict):
        """As PyTorch's, which would bring every slot to the weights' dtype. The weights must be those saved with it."""
        numbered = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, saved in state_dict["state"].items():
            for slot, value in saved.items():
                part(self.state[numbered[number]][slot]).copy_(part(value))
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})


def update_piece(gradient, weight, exp_avg, exp_avg_sq, low, step, group, skip, scale):
    """AdamW on one piece, flat, in place; `step` updates came before."""
    master = join(weight, low)
    adamw([master], [gradient.float()], [exp_avg], [exp_avg_sq], [], [step.clone()], fused=True, found_inf=skip, grad_scale=scale,
          amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
          eps=group["eps"], maximize=False)
    for stored, new in zip((weight, low), low_bits(master), strict=True):
        stored.copy_(new)


@torch.no_grad()
def master_weights(model, optimizer):
    """Yields (name, float32 tensor): the exact weights behind a model, distributed as its parameters are."""
    for name, parameter in model.named_parameters():
        low = optimizer.state.get(parameter, {}).get("low")
        if low is None:
            yield name, parameter.detach().float()
        else:
            master = torch.empty_like(parameter, dtype=torch.float32)
            part(master).copy_(join(part(parameter).contiguous(), part(low).contiguous()))
            yield name, master
