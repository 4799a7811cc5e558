"""Ranger21 (Wright and Demeure 2021, arXiv 2106.13731; thesis 3.5.1) in few, large operations.

The same arithmetic as the package ranger21 0.1.0 at its default settings, which is the code that the thesis ran:
adaptive gradient clipping, gradient centralisation and normalisation, positive-negative momentum, softplus on the
denominator, stable weight decay, norm loss, lookahead, linear warm-up and warm-down. The package makes 35 small
operations for each tensor and waits for the device twice in each step; here parameters of one shape are worked on as
one stack, nothing waits, and state_dict() is complete.
"""

import math

import torch
import torch.nn.functional as F

from kit.train.device import allow_recompiling

BLOCK = 2**25  # elements of a stack at most: bounds the memory of its temporaries to 128 MB each
AGC, AGC_EPS, NORM_LOSS, SOFTPLUS, LOOKAHEAD_STEPS, LOOKAHEAD_ALPHA = 1e-2, 1e-3, 1e-4, 50, 5, 0.5  # its defaults
STATE = ("grad_ma", "neg_grad_ma", "variance_ma", "lookahead_params")  # the package's names


def learning_rate(step, steps, lr, min_lr, warm_up=None):
    """Ranger21's schedule: linear warm-up, flat, linear warm-down to `min_lr` (thesis 3.5.1).

    step counts from 1 to steps. The warm-up takes the share `warm_up` of the steps; by default 2000 steps or, in short
    runs, 22 %. The warm-down begins at 72 %."""
    usual = 2000 if 0.45 * steps >= 2000 else int(0.22 * steps)
    warm_up = usual if warm_up is None else int(warm_up * steps)
    begin = int(0.72 * steps)
    rate = lr * min(1.0, step / max(1, warm_up))
    if step >= begin:
        rate = max(min_lr, lr - (lr - min_lr) * min(1.0, (step + 1 - begin) / (steps - begin + 1)))
    return rate


class Ranger21Fast(torch.optim.Optimizer):
    """Ranger21 for a training of `steps` steps. schedule: a function as `learning_rate`; a group whose `lr` is scaled
    brings its own `min_lr`.

    Weight decay and norm loss reach only the last parameter of each group, as in the package, where a loop variable is
    left over. A step uses the gradients up: p.grad is then None.
    """

    def __init__(self, params, lr, steps, min_lr=3e-5, weight_decay=1e-4, schedule=learning_rate):
        usual = dict(lr=lr, min_lr=min_lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, current_lr=lr)
        super().__init__(params, usual)
        self.steps, self.schedule, self.stacks, self.stacked = steps, schedule, [], None
        self.move_variance, self.move_momentum = move_variance, move_momentum

    def __setstate__(self, state):
        super().__setstate__(state)  # load_state_dict ends here: the stacks must be made of the new state
        self.stacks, self.stacked = [], None

    def compile(self):
        """Has torch.compile make few passes over the memory of many: on a GPU a step is little else."""
        allow_recompiling()  # once for each shape of parameters
        self.move_variance, self.move_momentum = (torch.compile(part) for part in (move_variance, move_momentum))

    @torch.no_grad()
    def step(self):
        used = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not used:
            return
        if self.stacked != [id(p) for p in used]:
            self._stack()
        sums = [self._move(stack) for stack in self.stacks]
        deviation = (torch.stack(sums).sum() / sum(p.numel() for p in used)).sqrt()  # stays on the device
        step = self.state[used[-1]]["step"]
        decayed = self.param_groups[-1]["params"][-1]
        for group in self.param_groups:
            group["current_lr"] = self.schedule(step, self.steps, group["lr"], group["min_lr"])
            self._decay(decayed, group, deviation)
            for stack in self.stacks:
                if stack["group"] is group:
                    self._update(stack)
            decayed = group["params"][-1]  # what the package's loop variable holds when the next group begins
        for stack in self.stacks:
            self._look_ahead(stack)

    def _stack(self):
        """Puts the states of parameters that are alike into common tensors, of which each parameter has a view."""
        alike = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        zeros = (torch.zeros_like(p) for _ in STATE[:-1])
                        state.update(dict(zip(STATE, (*zeros, p.detach().clone()), strict=True)), step=0)
                    alike.setdefault((number, p.shape, p.dtype, p.device, state["step"]), []).append(p)
        self.stacks = []
        for (number, shape, *_), params in alike.items():
            most = max(1, BLOCK // max(1, shape.numel()))
            for part in (params[i : i + most] for i in range(0, len(params), most)):
                stack = {name: torch.stack([self.state[p][name] for p in part]) for name in STATE}
                for i, p in enumerate(part):
                    self.state[p].update({name: stack[name][i] for name in STATE})
                self.stacks.append(stack | dict(params=part, group=self.param_groups[number]))
        self.stacked = [id(p) for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _move(self, stack):
        """Moves the momenta and the variance of a stack, and notes in it what its parameters will move by, before the
        learning rate. Uses their gradients up. → the sum of the debiased variance."""
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
        """Stable weight decay (Xie et al. 2020) and norm loss (Georgiou et al. 2021)."""
        if group["weight_decay"]:
            factor = 1 - group["weight_decay"] * group["current_lr"] / deviation
            p.mul_(torch.where(deviation > 0, factor, 1.0))  # all gradients zero: the package divides by zero
        correction = 2 * NORM_LOSS * (1 - 1 / (unit_norm(p[None])[0] + group["eps"]))
        p.mul_(1 - group["current_lr"] * correction.view(correction.shape if p.dim() > 1 else ()))

    def _update(self, stack):
        beta1, beta2 = stack["group"]["betas"]
        noise = math.sqrt((1 + beta2) ** 2 + beta2**2)
        rate = stack["group"]["current_lr"] * 2 / noise / (1 - beta1 ** stack["step"])
        torch._foreach_add_(stack["params"], stack.pop("update").unbind(), alpha=-rate)

    def _look_ahead(self, stack):
        """Every fifth step, halfway back to where the parameters were five steps ago (Zhang et al. 2019)."""
        if stack["step"] % LOOKAHEAD_STEPS == 0:
            slow = stack["lookahead_params"].unbind()
            torch._foreach_lerp_(stack["params"], slow, 1 - LOOKAHEAD_ALPHA)
            torch._foreach_copy_(slow, stack["params"])


def move_variance(grads, weights, variance, beta2):
    """Clips, centralises and normalises a stack of gradients, and moves its variance, both in place.

    → (the factor by which normalising once more would multiply the gradients, the sum of the variance)."""
    # adaptive gradient clipping (Brock et al. 2021): of units whose gradient is too long for their weights
    longest = unit_norm(weights).clamp_min(AGC_EPS) * AGC
    grads.mul_((longest / unit_norm(grads).clamp_min(1e-6)).clamp_max(1))
    if grads.dim() > 2:  # gradient centralisation (Yong et al. 2020)
        grads.sub_(grads.mean(dim=tuple(range(2, grads.dim())), keepdim=True))
    scale = normalise(grads)
    variance.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
    return scale, variance.sum()


def move_momentum(positive, negative, variance, grads, scale, root, beta1, eps):
    """Moves the positive momentum of a stack in place. root: that of the variance's debiasing.
    → what the parameters move by, before the learning rate and constant factors."""
    positive.mul_(beta1**2).addcmul_(grads, scale, value=1 - beta1**2)
    denominator = F.softplus(variance.sqrt().div_(root).add_(eps), beta=SOFTPLUS)
    return positive.sub(negative, alpha=0.5).div_(denominator)


def unit_norm(stack):
    """The Euclidean norm of each unit of a stack [k, …] of tensors: of a vector whole, of a matrix by row, of a
    convolution by output channel; it broadcasts against the stack."""
    if stack.dim() <= 2:
        return torch.linalg.vector_norm(stack.flatten(1), dim=1).view(-1, *[1] * (stack.dim() - 1))
    return torch.linalg.vector_norm(stack, dim=2 if stack.dim() <= 4 else tuple(range(2, stack.dim())), keepdim=True)


def normalise(grads):
    """Divides each gradient of a stack [k, …], in place, by its standard deviation, if it has more than two elements.

    → the factor by which normalising once more would multiply it: the package does so before it moves the momentum."""
    count = grads[0].numel()
    shape = (-1, *[1] * (grads.dim() - 1))
    if count <= 2:
        return torch.ones((len(grads), *shape[1:]), dtype=grads.dtype, device=grads.device)
    flat = grads.flatten(1)
    # what is centralised has no mean left to take away
    centred = grads.dim() > 2
    scale = torch.linalg.vector_norm(flat, dim=1) / math.sqrt(count - 1) if centred else flat.std(dim=1)
    grads.div_((scale + 1e-8).view(shape))
    return (1 / (scale / (scale + 1e-8) + 1e-8)).view(shape)
