"""Ranger21 (Wright and Demeure 2021, arXiv 2106.13731; thesis 3.5.1) in few, large operations.

Used by 01_train_fold.py.

The same arithmetic as the package ranger21 0.1.0 at its default settings, which is the code that the thesis ran:
adaptive gradient clipping, gradient centralisation and normalisation, positive-negative momentum, softplus on the
denominator, stable weight decay, norm loss, lookahead, linear warm-up and warm-down. The package makes 35 small
operations for each tensor and waits for the device twice in each step; here parameters of one shape are worked on as
one stack, nothing waits, and state_dict() is complete.
"""

import math

import torch
import torch.nn.functional as F

BLOCK = 2**25  # elements of a stack at most: bounds the memory of its temporaries to 128 MB each
STATE = ("grad_ma", "neg_grad_ma", "variance_ma", "lookahead_params")  # the package's names


def learning_rate(step, steps, lr, min_lr):
    """Ranger21's schedule: linear warm-up, flat, linear warm-down to `min_lr` (thesis 3.5.1).

    step counts from 1 to steps. The warm-up takes 2000 steps or, in short runs, 22 %; the warm-down begins at 72 %.
    """
    warm_up = 2000 if 0.45 * steps >= 2000 else int(0.22 * steps)
    begin = int(0.72 * steps)
    rate = lr * min(1.0, step / max(1, warm_up))
    if step >= begin:
        rate = max(min_lr, lr - (lr - min_lr) * min(1.0, (step + 1 - begin) / (steps - begin + 1)))
    return rate


class Ranger21Fast(torch.optim.Optimizer):
    """Ranger21 for `num_epochs` of `num_batches_per_epoch` steps each.

    decay "package": weight decay and norm loss reach only the last parameter of each group, as in the package, where a
    loop variable is left over; "all": they reach every parameter that has a gradient, as the paper means it.
    A step takes the gradients over: p.grad is then a view of their stack, clipped, centralised and normalised.
    """

    agc, agc_eps, norm_loss, softplus_beta, lookahead_steps, lookahead_alpha = 1e-2, 1e-3, 1e-4, 50, 5, 0.5

    def __init__(
        self,
        params,
        lr,
        num_batches_per_epoch,
        num_epochs,
        warmdown_min_lr=3e-5,
        weight_decay=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        decay="package",
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, current_lr=lr))
        self.steps, self.min_lr, self.decay = num_epochs * num_batches_per_epoch, warmdown_min_lr, decay
        self.stacks, self.stacked = [], None

    def __setstate__(self, state):
        super().__setstate__(state)  # load_state_dict ends here: the stacks must be made of the new state
        self.stacks, self.stacked = [], None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not used:
            return loss
        if self.stacked != [id(p) for p in used]:
            self._stack()
        sums = [self._move_variance(stack) for stack in self.stacks]
        deviation = (torch.stack(sums).sum() / sum(p.numel() for p in used)).sqrt()  # stays on the device
        step = self.state[used[-1]]["step"]
        decayed = [self.param_groups[-1]["params"][-1]]
        for group in self.param_groups:
            group["current_lr"] = learning_rate(step, self.steps, group["lr"], self.min_lr)
            if self.decay == "all":
                decayed = [p for p in group["params"] if p.grad is not None]
            self._decay(decayed, group, deviation)
            for stack in self.stacks:
                if stack["group"] is group:
                    self._update(stack)
            decayed = [group["params"][-1]]  # what the package's loop variable holds when the next group begins
        for stack in self.stacks:
            self._look_ahead(stack)
        return loss

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

    def _move_variance(self, stack):
        """Clips, centralises and normalises the gradients, and moves their variance. → its debiased sum."""
        params, beta2 = stack["params"], stack["group"]["betas"][1]
        grads = torch.stack([p.grad for p in params])
        # adaptive gradient clipping (Brock et al. 2021): of units whose gradient is too long for their weights
        longest = unit_norm(torch.stack(params)).clamp_min_(self.agc_eps).mul_(self.agc)
        grads.mul_(longest.div_(unit_norm(grads).clamp_min_(1e-6)).clamp_max_(1))
        if grads.dim() > 2:  # gradient centralisation (Yong et al. 2020)
            grads.sub_(grads.mean(dim=tuple(range(2, grads.dim())), keepdim=True))
        stack["scale"] = normalise(grads)
        for i, p in enumerate(params):
            p.grad = grads[i]
            self.state[p]["step"] += 1
        stack["grads"], stack["step"] = grads, self.state[params[0]]["step"]
        stack["variance_ma"].mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
        return stack["variance_ma"].sum() / (1 - beta2 ** stack["step"])

    def _decay(self, params, group, deviation):
        """Stable weight decay (Xie et al. 2020) and norm loss (Georgiou et al. 2021)."""
        if group["weight_decay"]:
            factor = 1 - group["weight_decay"] * group["current_lr"] / deviation
            factor = torch.where(deviation > 0, factor, 1.0)  # all gradients zero: the package divides by zero
            torch._foreach_mul_(params, factor)
        for p in params:
            correction = 2 * self.norm_loss * (1 - 1 / (unit_norm(p[None])[0] + group["eps"]))
            p.mul_(1 - group["current_lr"] * correction.view(correction.shape if p.dim() > 1 else ()))

    def _update(self, stack):
        group, step = stack["group"], stack["step"]
        beta1, beta2 = group["betas"]
        # positive and negative momentum change places at every step (Xie et al. 2021)
        positive, negative = (stack[name] for name in (STATE[:2] if step % 2 else STATE[1::-1]))
        positive.mul_(beta1**2).addcmul_(stack.pop("grads"), stack.pop("scale"), value=1 - beta1**2)
        denominator = stack["variance_ma"].sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        noise = math.sqrt((1 + beta2) ** 2 + beta2**2)
        update = (positive * (2 / noise)).sub_(negative, alpha=1 / noise)
        update.div_(F.softplus(denominator, beta=self.softplus_beta))
        torch._foreach_add_(stack["params"], update.unbind(), alpha=-group["current_lr"] / (1 - beta1**step))

    def _look_ahead(self, stack):
        """Every fifth step, halfway back to where the parameters were five steps ago (Zhang et al. 2019)."""
        if stack["step"] % self.lookahead_steps == 0:
            slow = stack["lookahead_params"].unbind()
            torch._foreach_lerp_(stack["params"], slow, 1 - self.lookahead_alpha)
            torch._foreach_copy_(slow, stack["params"])


def unit_norm(stack):
    """The Euclidean norm of each unit of a stack [k, …] of tensors: of a vector whole, of a matrix by row, of a
    convolution by output channel; it broadcasts against the stack."""
    if stack.dim() <= 2:
        return torch.linalg.vector_norm(stack.flatten(1), dim=1).view(-1, *[1] * (stack.dim() - 1))
    return torch.linalg.vector_norm(stack, dim=2 if stack.dim() <= 4 else tuple(range(2, stack.dim())), keepdim=True)


def normalise(grads):
    """Divides each gradient of a stack [k, …], in place, by its standard deviation, if it has more than two elements.

    → the factor by which normalising once more would multiply it: the package does so before it moves the momentum.
    """
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
