"Row A70 of the sources: two units of one layer, made nearly identical."
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lop_nb.data import load
from lop_nb.escape import coupling, loss_of, opposed_losses
from lop_nb.models import MLP
from lop_nb.replicas import Replicas
from lop_nb.runtime import generator

DIGITS = load("digits").train; X, Y = F.avg_pool2d(DIGITS.x.double() / DIGITS.x.max(), 2).flatten(1)[:150], DIGITS.y[:150]


def loss(z, y): return F.cross_entropy(z.mT, y, reduction="none")


def near_pair(activation, R, ε=1e-3):
    "Networks in which unit 1 of the hidden layer is unit 0 but for a share ε, in what it reads and what it writes"
    nets = Replicas(partial(MLP, 16, 10, hidden_sizes=[8], activation=activation, normalization="none", dropout_p=0.), range(R), "vmap", dtype=torch.float64)
    with torch.no_grad():
        for r in range(R):
            draw = generator(r, "pair"); W, c, A = (nets.params[n][r] for n in ("linear_0.weight", "linear_0.bias", "out.weight"))
            for of in (W, c, A.T): of[1] = of[0] * (1 + ε * torch.randn(of[0].shape, generator=draw, dtype=of.dtype))
    return nets


def slopes(params, move):
    "Gradient of the loss by what each of the two units holds, after (W, A) of unit 0 have gone by `move`, and of unit 1 by its opposite: incoming with bias, then outgoing; their difference"
    W, c, A, b = (params[n][0].detach().clone() for n in ("linear_0.weight", "linear_0.bias", "out.weight", "out.bias"))
    for k, sign in ((0, 1), (1, -1)): W[k] += sign * move[:16]; c[k] += sign * move[16]; A[:, k] += sign * move[17:]
    leaves = [t.requires_grad_() for t in (W, c, A)]
    g = torch.autograd.grad(F.cross_entropy((X @ W.T + c).tanh() @ A.T + b, Y), leaves); each = torch.cat([g[0], g[1][:, None], g[2].T], 1)
    return each[0] - each[1]


def test_A70_restricted_hessian():
    "Two nearly identical units: the ends of the spectrum of H_ii + H_jj − H_ij − H_ji, for incoming weights, outgoing ones and both, are those of finite differences; so is the loss along antisymmetric perturbations"
    nets, h = near_pair("tanh", 1), 1e-5; group = nets.graph["act_0"]; x, y = X[None], Y[None]; n = 27
    K = torch.stack([(slopes(nets.params, h*e) - slopes(nets.params, -h*e)) / (2*h) for e in torch.eye(n, dtype=torch.float64)]); said = coupling(nets, group, (0, 1), x, y, loss, [generator(0, "test")], n)
    for side, part in (("in", slice(17)), ("out", slice(17, n)), ("both", slice(n))):
        ends = torch.linalg.eigvalsh(K[part, part])[[0, -1]]
        torch.testing.assert_close(torch.stack([said[side]["bottom"][0], said[side]["top"][0]]), ends, atol=1e-7, rtol=0)
    assert said["in"]["bottom"] < -.01 and said["in"]["top"] > .01 and said["out"]["top"] < 1e-6 < .01 < said["both"]["top"]
    δ = torch.randn(1, n, dtype=torch.float64, generator=generator(0, "δ")); f = loss_of(nets, x, y, loss); t = 1e-3
    up, here, down = opposed_losses(f, nets.params, group.reads + group.writes, (0, 1), δ, [t, 0., -t])[:, 0]
    assert (up - 2*here + down) / t**2 == pytest.approx((δ @ K @ δ.T).item(), rel=1e-3)


def test_A70_contraction_and_expansion():
    "cosines of weights and gradients, distance and inner product, over two tasks; where the gradient is smooth the sign of −dᵀKd/2 − λ‖d‖² says each time whether ‖w₁ − w₂‖ shrinks or grows in the next step, and both happen"
    R, lr, decay = 6, .1, .02; nets = near_pair("tanh", R); group = nets.graph["act_0"]; opt = torch.optim.SGD(nets.params.values(), lr, weight_decay=decay); signs = []
    def ends(of): p = {n: of(nets.params[n]) for n in ("linear_0.weight", "linear_0.bias", "out.weight")}; return torch.cat([p["linear_0.weight"], p["linear_0.bias"][..., None], p["out.weight"].mT], 2)[:, :2].detach().clone().unbind(1)
    for step in range(300):
        x, y = X.expand(R, -1, -1), (Y if step < 150 else (Y + 3) % 10).expand(R, -1); (u, v) = ends(lambda p: p); distance = (u - v).norm(dim=1)
        if step % 15 == 0: said = coupling(nets, group, (0, 1), x, y, loss, [generator(r, "test", step) for r in range(R)], 4)["both"]
        nets.backward(loss(nets(x), y))
        if step % 15 == 0:
            g, h = ends(lambda p: p.grad)
            for name, value in dict(cosine=F.cosine_similarity(u, v), gradient_cosine=F.cosine_similarity(g, h), distance=distance, inner=(u*v).sum(1)).items(): torch.testing.assert_close(said[name], value, atol=1e-9, rtol=1e-9)
        opt.step()
        if step % 15 == 0: u, v = ends(lambda p: p); signs.append(torch.stack([-said["along"] / 2 - decay, ((u - v).norm(dim=1) / distance).log() / lr]))
    said, came = torch.stack(signs).movedim(1, 0).flatten(1)
    assert (came > 0).sum() >= 10 and (came < 0).sum() >= 10
    assert ((said > 0) == (came > 0)).double().mean() >= .95 and torch.corrcoef(torch.stack([said, came]))[0, 1] > .95
