"""Ranger21 optimizer (Wright and Demeure 2021, arXiv 2106.13731; thesis 3.5.1), in few, large operations.

Its arithmetic is that of the package ranger21 0.1.0 at its default settings, which the thesis ran. The package runs 35
small operations for each tensor and waits for the device twice in each step. Here parameters of one shape are updated
as one stack, nothing waits, and state_dict() is complete.
"""

import math

import torch
import torch.nn.functional as F

from kit.train.device import allow_recompiling

BLOCK = 2**25  # elements of a stack at most, which limits each of its temporaries to 128 MB
# the package's defaults
AGC, AGC_EPS, NORM_LOSS, SOFTPLUS, LOOKAHEAD_STEPS, LOOKAHEAD_ALPHA = 1e-2, 1e-3, 1e-4, 50, 5, 0.5
STATE = ("grad_ma", "neg_grad_ma", "variance_ma", "lookahead_params")  # the package's names


def learning_rate(step, steps, lr, min_lr, warm_up=None):
    """Compute the rate of Ranger21's schedule: linear warm-up, flat, linear warm-down to `min_lr` (thesis 3.5.1).

    step counts from 1 to steps. The warm-up takes the share `warm_up` of the steps; by default 2000 steps or, in short
    runs, 22 %. The warm-down begins at 72 %."""
    default = 2000 if 0.45 * steps >= 2000 else int(0.22 * steps)
    warm_up = default if warm_up is None else int(warm_up * steps)
    warm_down = int(0.72 * steps)
    rate = lr * min(1.0, step / max(1, warm_up))
    if step >= warm_down:
        rate = max(min_lr, lr - (lr - min_lr) * min(1.0, (step + 1 - warm_down) / (steps - warm_down + 1)))
    return rate


class Ranger21Fast(torch.optim.Optimizer):
    """The Ranger21 optimizer of a training of `steps` steps. A step sets p.grad to None.

    schedule: a function as `learning_rate`. A group with an `lr` of its own needs its own `min_lr`. Weight decay and
    norm loss change only the last parameter of each group, as in the package, where a loop variable is left over."""

    def __init__(self, params, lr, steps, min_lr=3e-5, weight_decay=1e-4, schedule=learning_rate):
        defaults = dict(lr=lr, min_lr=min_lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, current_lr=lr)
        super().__init__(params, defaults)
        self.steps, self.schedule, self.stacks, self.stacked = steps, schedule, [], None
        self.move_variance, self.move_momentum = move_variance, move_momentum

    def __setstate__(self, state):
        super().__setstate__(state)  # load_state_dict ends here: the next step stacks the new state
        self.stacks, self.stacked = [], None

    def compile(self):
        """Compile the arithmetic, which fuses its passes over memory: on a GPU a step is little else."""
        allow_recompiling()  # one version for each shape of parameters
        self.move_variance, self.move_momentum = (torch.compile(part) for part in (move_variance, move_momentum))

    @torch.no_grad()
    def step(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        if self.stacked != [id(p) for p in params]:
            self.stacks, self.stacked = self._stack(), [id(p) for p in params]
        variances = [self._move(stack) for stack in self.stacks]
        deviation = (torch.stack(variances).sum() / sum(p.numel() for p in params)).sqrt()  # stays on the device
        step = self.state[params[-1]]["step"]
        decayed = self.param_groups[-1]["params"][-1]
        for group in self.param_groups:
            group["current_lr"] = self.schedule(step, self.steps, group["lr"], group["min_lr"])
            self._decay(decayed, group, deviation)
            beta1, beta2 = group["betas"]
            noise = math.sqrt((1 + beta2) ** 2 + beta2**2)
            for stack in [stack for stack in self.stacks if stack["group"] is group]:
                rate = group["current_lr"] * 2 / noise / (1 - beta1 ** stack["step"])
                torch._foreach_add_(stack["params"], stack.pop("update").unbind(), alpha=-rate)
            decayed = group["params"][-1]  # what the package's loop variable holds when the next group begins
        for stack in self.stacks:
            if stack["step"] % LOOKAHEAD_STEPS == 0:  # halfway back (Zhang et al. 2019)
                slow = stack["lookahead_params"].unbind()
                torch._foreach_lerp_(stack["params"], slow, 1 - LOOKAHEAD_ALPHA)
                torch._foreach_copy_(slow, stack["params"])

    def _stack(self):
        """Return stacks of the states of parameters of one group, shape, dtype, device and step count, and make each
        state a view of its stack."""
        stackable, stacks = {}, []
        for number, group in enumerate(self.param_groups):
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                if not state:
                    zeros = (torch.zeros_like(p) for _ in STATE[:-1])
                    state.update(dict(zip(STATE, (*zeros, p.detach().clone()), strict=True)), step=0)
                stackable.setdefault((number, p.shape, p.dtype, p.device, state["step"]), []).append(p)
        for (number, shape, *_), params in stackable.items():
            size = max(1, BLOCK // max(1, shape.numel()))
            for part in (params[i : i + size] for i in range(0, len(params), size)):
                stack = {name: torch.stack([self.state[p][name] for p in part]) for name in STATE}
                for i, p in enumerate(part):
                    self.state[p].update({name: stack[name][i] for name in STATE})
                stacks.append(stack | dict(params=part, group=self.param_groups[number]))
        return stacks

    def _move(self, stack):
        """Update the momenta and the variance of a stack, store its parameters' update before the learning rate, and
        set their gradients to None. → the sum of the debiased variance."""
        params, (beta1, beta2) = stack["params"], stack["group"]["betas"]
        grads = torch.stack([p.grad for p in params])
        for p in params:
            p.grad = None
            self.state[p]["step"] += 1
        step = stack["step"] = self.state[params[0]]["step"]
        # positive and negative momentum change places at every step (Xie et al. 2021)
        momenta = [stack[name] for name in (STATE[:2] if step % 2 else STATE[1::-1])]
        scale, total = self.move_variance(grads, torch.stack(params), stack["variance_ma"], beta2)
        stack["update"] = self.move_momentum(
            *momenta, stack["variance_ma"], grads, scale, math.sqrt(1 - beta2**step), beta1, stack["group"]["eps"]
        )
        return total / (1 - beta2**step)

    def _decay(self, p, group, deviation):
        """Apply stable weight decay (Xie et al. 2020) and norm loss (Georgiou et al. 2021) to a parameter."""
        if group["weight_decay"]:
            factor = 1 - group["weight_decay"] * group["current_lr"] / deviation
            p.mul_(torch.where(deviation > 0, factor, 1.0))  # all gradients zero: the package divides by zero
        correction = 2 * NORM_LOSS * (1 - 1 / (unitwise_norm(p[None])[0] + group["eps"]))
        p.mul_(1 - group["current_lr"] * correction.view(correction.shape if p.dim() > 1 else ()))


def move_variance(grads, weights, variance, beta2):
    """Clip, centralise and normalise a stack of gradients [k, …], and update its variance, both in place.

    → (the factor by which a second normalisation, which the package runs before the momentum, would multiply the
    gradients; the sum of the variance)."""
    # adaptive gradient clipping (Brock et al. 2021), unit by unit
    max_norm = unitwise_norm(weights).clamp_min(AGC_EPS) * AGC
    grads.mul_((max_norm / unitwise_norm(grads).clamp_min(1e-6)).clamp_max(1))
    if centred := grads.dim() > 2:  # gradient centralisation (Yong et al. 2020)
        grads.sub_(grads.mean(dim=tuple(range(2, grads.dim())), keepdim=True))
    again = grads.new_ones(())
    if (count := grads[0].numel()) > 2:  # by the standard deviation
        flat = grads.flatten(1)
        deviation = torch.linalg.vector_norm(flat, dim=1) / math.sqrt(count - 1) if centred else flat.std(dim=1)
        deviation = deviation.view(-1, *[1] * (grads.dim() - 1))
        grads.div_(deviation + 1e-8)
        again = 1 / (deviation / (deviation + 1e-8) + 1e-8)
    variance.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
    return again, variance.sum()


def move_momentum(positive, negative, variance, grads, scale, root_debias, beta1, eps):
    """Update the positive momentum of a stack in place. root_debias: the square root of 1 - beta2 ** step.
    → the update of the parameters, before the learning rate and constant factors."""
    positive.mul_(beta1**2).addcmul_(grads, scale, value=1 - beta1**2)
    denominator = F.softplus(variance.sqrt().div_(root_debias).add_(eps), beta=SOFTPLUS)
    return positive.sub(negative, alpha=0.5).div_(denominator)


def unitwise_norm(stack):
    """Compute the Euclidean norm of each unit in a stack [k, …] of tensors. A unit is a vector, a row of a matrix or an
    output channel of a convolution. The result broadcasts against the stack."""
    if stack.dim() <= 2:
        return torch.linalg.vector_norm(stack.flatten(1), dim=1).view(-1, *[1] * (stack.dim() - 1))
    return torch.linalg.vector_norm(stack, dim=2 if stack.dim() <= 4 else tuple(range(2, stack.dim())), keepdim=True)
