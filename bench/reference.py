"""The plain way of a stream of single examples: the algorithm of Dohare et al. (2024) with modules, autograd and an optimizer, one example after another.

Written after the paper's algorithm 1 and the published code's order of operations, as one would write it to read it again: a list of layers, a list of features that
`predict` hands out, utilities updated by a few tensor operations for each layer and step, replacements accumulated. Nothing here is tuned, and nothing is slowed down.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def network(weights, act=nn.ReLU):
    "A list of layers with copies of `weights` [(W [out, in], b [out]), …]"
    layers = nn.ModuleList()
    for i, (w, b) in enumerate(weights):
        linear = nn.Linear(w.shape[1], w.shape[0])
        with torch.no_grad(): linear.weight.copy_(torch.as_tensor(w)); linear.bias.copy_(torch.as_tensor(b))
        layers.append(linear)
        if i + 1 < len(weights): layers.append(act())
    return layers


class Backprop:
    "One step for each example"
    def __init__(self, layers, lr, loss=F.mse_loss, optimizer=torch.optim.SGD):
        self.layers, self.loss, self.optimizer = layers, loss, optimizer(layers.parameters(), lr=lr)

    def predict(self, x):
        features = []
        for i in range(0, len(self.layers) - 1, 2):
            x = self.layers[i + 1](self.layers[i](x)); features.append(x)
        return self.layers[-1](x), features

    def learn(self, x, y):
        "A step on the batch x [1, in], y: its loss and the outputs before it"
        self.optimizer.zero_grad()
        out, self.features = self.predict(x)
        loss = self.loss(out, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), out.detach()


class ContinualBackprop(Backprop):
    "The same, and after each step the least useful mature units are replaced (utility: adaptable contribution)"
    def __init__(self, layers, lr, loss=F.mse_loss, rate=1e-4, decay=.99, maturity=100):
        super().__init__(layers, lr, loss)
        self.rate, self.decay, self.maturity = rate, decay, maturity
        sizes = [l.out_features for l in layers[:-1:2]]
        self.ages, self.utility, self.mean = ([torch.zeros(n) for n in sizes] for _ in range(3))
        self.owed = [0.] * len(sizes)

    def learn(self, x, y):
        out = super().learn(x, y)
        with torch.no_grad():
            for i, features in enumerate(self.features): self.test(i, features, self.layers[2*i], self.layers[2*i + 2])
        return out

    def test(self, i, h, reads, writes):
        "Utilities of layer i, and the replacements that are due"
        self.ages[i] += 1
        filled = 1 - self.decay ** self.ages[i]
        self.mean[i] = self.decay * self.mean[i] + (1 - self.decay) * h.mean(0)
        w_in, w_out = reads.weight.abs().mean(1), writes.weight.abs().mean(0)
        new = w_out * (h - self.mean[i] / filled).abs().mean(0) / w_in
        self.utility[i] = self.decay * self.utility[i] + (1 - self.decay) * new
        eligible = torch.where(self.ages[i] > self.maturity)[0]
        self.owed[i] += self.rate * len(eligible)
        n = int(self.owed[i]); self.owed[i] -= n
        if n: self.replace(i, eligible[(self.utility[i] / filled)[eligible].topk(n, largest=False)[1]], filled, reads, writes)

    def replace(self, i, units, filled, reads, writes):
        "New weights in, none out, and the mean output to the next bias"
        bound = math.sqrt(2) * math.sqrt(3 / reads.in_features)
        reads.weight[units] = torch.empty(len(units), reads.in_features).uniform_(-bound, bound); reads.bias[units] = 0
        writes.bias += writes.weight[:, units] @ (self.mean[i] / filled)[units]; writes.weight[:, units] = 0
        for state in (self.ages, self.utility, self.mean): state[i][units] = 0
