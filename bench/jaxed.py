"""The best peer: the same work in JAX, a scan over steps inside a vmap over replicas inside one compiled call. JAX is optional.

The parameters are given back to the compiler's use (`donate_argnums`), the losses and, where asked for, the outputs of every step are kept, as ours keeps them. Continual
backprop gets its schedule and its random numbers ready-made, as our kernels do: which steps replace (the same for all replicas, so that the compiler may branch) and the new weights.
"""
import os
from functools import partial

import numpy as np

from lop_nb.interventions import Schedule

from .core import Missing

try:
    import jax
    import jax.numpy as jnp
except ImportError: jax = None


def need():
    "One thread: JAX makes as many as there are cores when it first wakes"
    if jax is None: raise Missing("JAX is not installed: pip install -e '.[bench]'")
    if not hasattr(os, "sched_setaffinity"): return
    cores = os.sched_getaffinity(0)
    try: os.sched_setaffinity(0, {min(cores)}); jax.devices()
    finally: os.sched_setaffinity(0, cores)


def forward(params, x, act):
    "Outputs of a batch x [B, in], and the hidden layers' activations"
    hidden = []
    for w, b in params[:-1]: x = act(x @ w.T + b); hidden.append(x)
    w, b = params[-1]
    return x @ w.T + b, hidden


def squared(out, y): return jnp.square(out[:, 0] - y)
def cross_entropy(out, y): return jax.nn.logsumexp(out, axis=1) - jnp.take_along_axis(out, y[:, None], 1)[:, 0]


def sgd(lr):
    def start(params): return ()
    def step(params, state, grads): return jax.tree.map(lambda p, g: p - lr*g, params, grads), state
    return start, step


def adam(lr, betas=(.9, .999), eps=1e-8, clip=None):
    b1, b2 = betas
    def start(params): return jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
    def step(params, state, grads):
        t, m, v = state; t = t + 1; c1, c2 = 1 - b1**t, jnp.sqrt(1 - b2**t)
        m = jax.tree.map(lambda m, g: b1*m + (1 - b1)*g, m, grads)
        v = jax.tree.map(lambda v, g: b2*v + (1 - b2)*g*g, v, grads)
        params = jax.tree.map(lambda p, m, v: p - lr/c1*m/(jnp.sqrt(v)/c2 + eps), params, m, v)
        return (params if clip is None else clipped(params, clip)), (t, m, v)
    return start, step


def clipped(params, bound):
    "Every weight and bias within ±bound/√fan_in"
    return [tuple(jnp.clip(p, -bound / w.shape[1]**.5, bound / w.shape[1]**.5) for p in (w, b)) for w, b in params]


class ContinualBackprop:
    "Adaptable contribution; schedule and new weights ready-made"
    def __init__(self, weights, rate=1e-4, decay=.99, maturity=100, steps=200_000, fresh=64, seed=0):
        R, hidden, rng = len(weights[0][0]), weights[:-1], np.random.default_rng(seed)
        self.sizes, self.decay, self.maturity, self.at = [w.shape[1] for w, _ in hidden], decay, maturity, 0
        self.fresh = [jnp.array(he(rng, (R, fresh, w.shape[2]))) for w, _ in hidden]
        self.which = jnp.array(np.stack([numbered(Schedule(n, rate, maturity), steps, fresh) for n in self.sizes], 1))

    def ahead(self, steps):
        "int [steps, layers]: which of the new weights a step brings into a layer; -1: none"
        if self.at + steps > len(self.which): self.at = 0
        self.at += steps
        return self.which[self.at - steps:self.at]

    def start(self, params): return [dict(age=jnp.zeros(n), f=jnp.zeros(n), u=jnp.zeros(n)) for n in self.sizes]

    def step(self, params, stats, hidden, fresh, which):
        params, stats = list(params), list(stats)
        for i, h in enumerate(hidden):
            (w, b), (v, c), s = params[i], params[i + 1], stats[i]
            age = s["age"] + 1; filled = 1 - self.decay**age
            f = self.decay*s["f"] + (1 - self.decay)*h.mean(0)
            new = jnp.abs(v).mean(0) * jnp.abs(h - f/filled).mean(0) / jnp.abs(w).mean(1)
            u = self.decay*s["u"] + (1 - self.decay)*new
            def replace(w, b, v, c, age, f, u):
                k = jnp.argmin(jnp.where(age > self.maturity, u/filled, jnp.inf))
                return w.at[k].set(fresh[i][which[i]]), b.at[k].set(0), v.at[:, k].set(0), c + v[:, k]*(f/filled)[k], age.at[k].set(0), f.at[k].set(0), u.at[k].set(0)
            w, b, v, c, age, f, u = jax.lax.cond(which[i] >= 0, replace, lambda *s: s, w, b, v, c, age, f, u)
            params[i], params[i + 1], stats[i] = (w, b), (v, c), dict(age=age, f=f, u=u)
        return params, stats


def numbered(schedule, steps, fresh):
    due = [schedule.due() for _ in range(steps)]
    assert max(due) <= 1, "at most one unit of a layer in a step"
    return np.where(due, np.cumsum(due) % fresh, -1).astype("int32")


def he(rng, shape): return (rng.uniform(-1, 1, shape) * (6 / shape[-1])**.5).astype("float32")


def steps_first(x, y):
    "Tensors x [R, n, in], y [R, n] as batches of one, for `Trainer`"
    return jnp.array(x.transpose(0, 1)[:, :, None].contiguous().numpy()), jnp.array(y.T[..., None].contiguous().numpy())


class Trainer:
    "R replicas of an MLP, trained block by block: `trainer(x, y)` with x [steps, R, B, in] and y [steps, R, B] gives the losses [R, steps, B]; steps come first, for it is twice as fast so"
    def __init__(self, weights, act, loss, optimizer, cbp=None, unroll=1):
        need()
        act = dict(relu=jax.nn.relu, leaky_relu=partial(jax.nn.leaky_relu, negative_slope=.01), tanh=jnp.tanh)[act]
        start, step = optimizer
        self.params = [tuple(jnp.array(p) for p in wb) for wb in weights]
        self.state = jax.vmap(start)(self.params)
        self.stats = jax.vmap(lambda p: cbp.start(p))(self.params) if cbp else ()
        self.cbp = cbp

        def mean_loss(params, x, y):
            out, hidden = forward(params, x, act); each = loss(out, y)
            return each.mean(), (each, out, hidden)

        def one(fresh, carry, example):
            params, state, stats = carry; x, y, *which = example
            grads, (each, out, hidden) = jax.grad(mean_loss, has_aux=True)(params, x, y)
            params, state = step(params, state, grads)
            if cbp: params, stats = cbp.step(params, stats, hidden, fresh, *which)
            return (params, state, stats), (each, out)

        def block(params, state, stats, x, y, fresh, *which):
            carry, seen = jax.lax.scan(partial(one, fresh), (params, state, stats), (x, y, *which), unroll=unroll)
            return *carry, *seen

        axes = (0, 0, 0, 1, 1, 0) + ((None,) if cbp else ())     # the schedule is the same for all replicas
        self.block = jax.jit(jax.vmap(block, in_axes=axes), donate_argnums=(0, 1, 2))

    def __call__(self, x, y):
        more = (self.cbp.fresh, self.cbp.ahead(len(x))) if self.cbp else ((),)
        self.params, self.state, self.stats, losses, self.logits = self.block(self.params, self.state, self.stats, x, y, *more)
        return losses.block_until_ready()
