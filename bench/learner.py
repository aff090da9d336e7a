"""Examples per second of the learner on 784-256-10, batch 32, Adam, beside the plain loop that a good researcher would write.

    python bench/learner.py [--rounds 5] [--seconds 3] [--device cpu]

Baseline: one `nn.Module`, a DataLoader over a TensorDataset, torch's default Adam, loss and accuracy by `.item()` at each step.
The learner does the same work: it shuffles, permutes the pixels, and records loss and accuracy.
Twice: on standardised pixels from the start, and on raw pixels 0…255 after an epoch, when half of the units are silent and their moments
decay into denormal numbers, which the learner rounds to zero and a plain loop does not.
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


def plain(data, device, seconds, how, skip):
    x = data.scale(data.train.x, how).flatten(1)
    loader = DataLoader(TensorDataset(x, data.train.y), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
    opt, loss_of = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    step, total, hits = 0, 0., 0
    while True:
        for xb, yb in loader:
            if step == skip: start = clock(device)
            xb, yb = xb.to(device), yb.to(device)
            out = model(xb); loss = loss_of(out, yb)
            opt.zero_grad(); loss.backward(); opt.step()
            total += loss.item(); hits += (out.argmax(1) == yb).sum().item(); step += 1
            if step > skip and step % 100 == 0 and clock(device) - start > seconds: return (step - skip) * 32 / (clock(device) - start)


class Stopwatch(Callback):
    def __init__(self, device, seconds, skip): self.device, self.seconds, self.skip = device, seconds, skip
    def before_task(self, learner): self.start = clock(self.device)
    def after_step(self, learner):
        step = learner.at.step
        if step == self.skip: self.start = clock(self.device)
        if step <= self.skip or step % 100: return
        spent = clock(self.device) - self.start
        if spent > self.seconds: self.rate = (step - self.skip) * 32 * len(learner.replicas) / spent; raise Enough


def ours(data, device, seconds, how, skip, R, strategy, implementation):
    nets = Replicas(lambda: MLP(784, 10, hidden_sizes=[256], normalization="none", dropout_p=0.), range(R), strategy, device)
    watch = Stopwatch(device, seconds, skip)
    learner = Learner(nets, PermutedPixels(data, tasks=1, normalize=how), Adam(implementation=implementation), epochs=1000, callbacks=[watch], defaults=[Online()])
    try: learner.fit()
    except Enough: return watch.rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5); parser.add_argument("--seconds", type=float, default=3.)
    parser.add_argument("--device", default="cpu"); parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = digits28(); resident = data.to(args.device)
    settings = [("standardize", 0, args.replicas), ("raw255", 1700, [1])]   # pixels, steps before the clock starts, replicas
    print(f"torch {torch.__version__}, {args.device}, data {data.name}, {args.rounds} rounds of {args.seconds:g} s\n")
    print("| pixels | variant | R | examples/s | (low–high) | ratio to the plain loop |\n|---|---|---|---|---|---|")
    for how, skip, replicas in settings:
        runs = {("plain DataLoader loop", 1): lambda: plain(data, args.device, args.seconds, how, skip)}
        for R in replicas:
            for strategy in ("loop", "vmap") if how == "standardize" else ("loop",):
                for kind in "foreach", "fused":
                    runs[f"learner, {strategy}, {kind}", R] = lambda R=R, s=strategy, k=kind: ours(resident, args.device, args.seconds, how, skip, R, s, k)
        report(how, runs, args.rounds)


def report(how, runs, rounds):
    "Run the variants in turn, `rounds` times after a warm-up, and print a line for each"
    rates = {k: [] for k in runs}
    for i in range(rounds + 1):
        for k, run in runs.items():
            rate = run()
            if i: rates[k].append(rate)
    base = rates["plain DataLoader loop", 1]
    for (name, R), r in rates.items():
        ratio = statistics.median(a / b for a, b in zip(r, base))
        print(f"| {how} | {name} | {R} | {statistics.median(r):,.0f} | {min(r):,.0f}–{max(r):,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
