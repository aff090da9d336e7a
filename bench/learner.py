"""Examples per second of the learner on 784-256-10, batch 32, Adam, beside the plain loop that a good researcher would write.

    python bench/learner.py [--rounds 5] [--seconds 3] [--device cpu]

Baseline: one `nn.Module`, a DataLoader over a TensorDataset, torch's default Adam, `.item()` of the loss at each step.
All variants run in one process, in turn, round after round; a figure is the median over rounds, its spread the lowest and highest.
Examples are counted over all replicas. CPU time is used on a CPU (other programs disturb it less), wall time on a GPU.
The pixels are MNIST where LOP_DATA has it, else random with as many zeros; the arithmetic is the same.
"""
import argparse
import statistics
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lop_nb.config import Adam
from lop_nb.data import Dataset, Split, load
from lop_nb.learner import Callback, Learner, Online
from lop_nb.models import MLP
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import PermutedPixels


class Enough(Exception):
    "The time of this measurement is over"


def clock(device):
    if device == "cpu": return time.process_time()
    torch.cuda.synchronize(); return time.perf_counter()


def digits28():
    try: return load("mnist")
    except LopError: pass
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (60_000, 1, 28, 28), generator=g).mul_(torch.rand(60_000, 1, 28, 28, generator=g) < .2).byte()
    y = torch.randint(0, 10, (60_000,), generator=g)
    return Dataset("random", Split(x, y), Split(x[:0], y[:0]), Split(x[:1000], y[:1000]), [str(i) for i in range(10)], [.13], [.31], "", "", "")


def plain(data, device, seconds):
    x = data.scale(data.train.x, "standardize").flatten(1)
    loader = DataLoader(TensorDataset(x, data.train.y), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
    opt, loss_of = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    seen, total, start = 0, 0., clock(device)
    while True:
        for xb, yb in loader:
            xb, yb = xb.to(device), yb.to(device)
            loss = loss_of(model(xb), yb)
            opt.zero_grad(); loss.backward(); opt.step()
            total += loss.item(); seen += len(yb)
            if seen % 3200 == 0 and clock(device) - start > seconds: return seen / (clock(device) - start)


class Stopwatch(Callback):
    def __init__(self, device, seconds): self.device, self.seconds = device, seconds
    def before_epoch(self, learner): self.start, self.first = clock(self.device), learner.at.examples
    def after_step(self, learner):
        if learner.at.batch % 100: return
        spent = clock(self.device) - self.start
        if spent > self.seconds: self.rate = (learner.at.examples - self.first) * len(learner.replicas) / spent; raise Enough


def ours(data, device, seconds, R, strategy, implementation):
    nets = Replicas(lambda: MLP(784, 10, hidden_sizes=[256], normalization="none", dropout_p=0.), range(R), strategy, device)
    watch = Stopwatch(device, seconds)
    learner = Learner(nets, PermutedPixels(data, tasks=1), Adam(implementation=implementation), epochs=1000, callbacks=[watch], defaults=[Online()])
    try: learner.fit()
    except Enough: return watch.rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5); parser.add_argument("--seconds", type=float, default=3.)
    parser.add_argument("--device", default="cpu"); parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = digits28(); resident = data.to(args.device)
    runs = {("plain DataLoader loop", 1): lambda: plain(data, args.device, args.seconds)}
    for R in args.replicas:
        for strategy in "loop", "vmap":
            for how in "foreach", "fused":
                runs[f"learner, {strategy}, {how}", R] = lambda R=R, s=strategy, h=how: ours(resident, args.device, args.seconds, R, s, h)
    for run in runs.values(): run()   # warm up
    rates = {k: [] for k in runs}
    for _ in range(args.rounds):
        for k, run in runs.items(): rates[k].append(run())
    base = rates["plain DataLoader loop", 1]
    print(f"torch {torch.__version__}, {args.device}, data {data.name}, {args.rounds} rounds of {args.seconds:g} s\n")
    print("| variant | R | examples/s | (low–high) | ratio to the plain loop |\n|---|---|---|---|---|")
    for (name, R), r in rates.items():
        ratio = statistics.median(a / b for a, b in zip(r, base))
        print(f"| {name} | {R} | {statistics.median(r):,.0f} | {min(r):,.0f}–{max(r):,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
