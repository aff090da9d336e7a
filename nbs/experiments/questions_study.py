"""The runs behind 14_questions: `python nbs/experiments/questions_study.py QUESTION FOLDER` (start, lazy, saturation, across, null, dropout), then `... collect FOLDER`

All on the digits, which come with the package; seeds are replicas, so that runs of one question are paired by seed: seed s has the same first weights, tasks and batches in each. Each question takes one core a few
minutes, writes FOLDER/QUESTION.parquet, and `collect` puts them together in nbs/experiments/results/questions.parquet.

Said before the runs:
start       At 0.001 continual backprop has a budget of as many new units as there are in about eight tasks. So a late start recovers what an early one keeps: in the last five of forty tasks the online accuracy of
            starts at 5, 10 and 20 is within .01 of the start at 0, and it is there within eight tasks of the start. Backprop alone is lower at the end.
lazy        Across the manifold only residuals times second derivatives act (41_escape). With f = α(h − h₀) and steps η/α² they act by 1/α a step: log growth of the distance falls like 1/α where the residuals are the same, and with it
            R². So clones of lazy networks (small relative movement) do not part, and gain nothing over their base; the richer, the further they part and the more they gain.
saturation  Decay shrinks weights, and small weights leave tanh linear: of 0, 0.001, 0.01 each has fewer saturated units at the end of thirty tasks than the one before, under SGD and Adam; and higher accuracy in the last tasks under Adam.
across      The most negative curvature across the manifold times the step size is the rate at which a kick grows: over settings and seeds it ranks the measured growth (Spearman above .7), and that ranks the epochs at which R² falls below .9 (below -.7).
            Normalisation changes the order between MLP and CNN because it changes this curvature.
null        In the first layer trained networks have no more partners at correlation .95 than random ones (both near 0). In deeper layers, after forty tasks, more than either null: random layers, and the trained layers' own weights shuffled within each unit.
dropout     Masks part the clones (R² below .9 at .1 and .3, 1 at 0), and parted clones raise the effective rank. Accuracy is lower because masks keep the loss high, not because the units are worth less: once dropout is off, the loss falls
            below that of the clone that never had it, with the rank still above.
"""
import sys
import warnings
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from lop_nb.cloning import block_r2, clone_partition, clone_replicas, factors_of
from lop_nb.compose import compose
from lop_nb.copies import duplicate_fraction, random_layers
from lop_nb.curvature import loss_hessian
from lop_nb.data import load
from lop_nb.escape import normal_hessian, normal_size
from lop_nb.experiments import make_data, make_learner
from lop_nb.growth import Clone
from lop_nb.interventions import ContinualBackprop
from lop_nb.layers import Dropout
from lop_nb.learner import Callback, evaluate
from lop_nb.manifold import Blocks, constant
from lop_nb.models import MLP
from lop_nb.monitor import Monitor, read_units
from lop_nb.records import Records
from lop_nb.replicas import Replicas
from lop_nb.runtime import generator
from lop_nb.streams import PermutedPixels

OUT = Path(__file__).parent / "results"


def train(words, arm="backprop", *more):
    "Records of one arm, with callbacks of our own"
    cfg = compose([*words, "training.no_augment=true", "training.engine=torch", "logging.progress=false"])
    learner = make_learner(cfg, arm, make_data(cfg, "cpu"), store=Records())
    learner.callbacks = sorted([*learner.callbacks, *more], key=lambda c: c.order)
    learner.per_element = any(c.resets_units for c in learner.callbacks); learner.reset_optimizer()
    return learner.fit().store.frame()


# ---- (a) when continual backprop starts ----
_permuted = ["stream.tasks=40", "training.seed=500", "training.replicas=10", "metrics.names=[dead_fraction,effective_rank]"]

class Late(ContinualBackprop):
    "Continual backprop that begins, with counts at zero, at a task"
    inside = None
    def __init__(self, start, **kw): super().__init__(**kw); self.start = start
    def after_step(self, learner):
        if learner.at.task >= self.start: super().after_step(learner)

def start():
    cbp = dict(replacement_rate=.001)
    return {"never": train(_permuted), **{str(s): train(_permuted, "backprop", Late(s, **cbp)) for s in (0, 5, 10, 20)}}


# ---- (b) lazy or rich ----
scales = [.25, .5, 1, 2, 4, 8, 16, 32]

def lazy(seeds=range(600, 620), before=5, epochs=100, lr=.1, batch=32, kick=1e-3, k=2):
    """All scales and seeds at once: f = α(h − h₀), h₀ the network at its start, steps η/α²
    `copy` is the clone without a kick, put back on the manifold after each epoch (added after a first look: the clone's steps are smaller than its base's), and `rounding` is not put back (a second look: rich networks leave by float32's rounding)"""
    α = torch.tensor(scales).repeat_interleave(len(seeds)); many = [*seeds]*len(scales); R = len(many)
    data = load("digits"); task = PermutedPixels(data, seeds=[0], tasks=1, first_permuted=False)[0]
    (x, y), (tx, ty) = ((x[0].flatten(1), y[0]) for x, y in (v.fetch(torch.arange(v.n)[None]) for v in (task.train, task.test)))
    base = Replicas(lambda: MLP(64, 10, [4, 4], normalization="none", dropout_p=0.), many, strategy="vmap")
    first = base.state_dict(); zero = Replicas(base.make_model, many, strategy="vmap"); zero.load_state_dict(first)
    with torch.no_grad(): h0, h0_test = zero(x.expand(R, *x.shape)), zero(tx.expand(R, *tx.shape))
    ce = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    def epoch(nets, opt, t):
        order = torch.stack([torch.randperm(len(x), generator=generator(s, "order", t)) for s in seeds]).repeat(len(scales), 1)
        for pick in order.split(batch, 1):
            f = α[:, None, None] * (nets(x[pick]) - h0.gather(1, pick[..., None].expand(-1, -1, 10)))
            nets.backward(ce(f, y[pick]) / α[:, None]**2); opt.step()
    def flat(nets): return torch.cat([p.detach().flatten(1) for p in nets.params.values()], 1)
    def look(name, nets, t, start):
        with torch.no_grad(): f, g = (α[:, None, None] * (nets(v.expand(R, *v.shape)) - z) for v, z in ((x, h0), (tx, h0_test)))
        found = dict(train_loss=ce(f, y.expand(R, -1)).mean(1), test_accuracy=(g.argmax(-1) == ty).double().mean(1), movement=(flat(nets) - start).norm(dim=1) / start.norm(dim=1))
        if name != "base":
            found["distance"] = normal_size({n: p.detach() for n, p in nets.params.items()}, blocks) / flat(nets).norm(dim=1)
            rows = read_units(nets, x[:500].expand(R, 500, 64))
            found["r2_corrected"] = torch.stack([block_r2(rows[g.site], blocks.partition[g.name], corrected=True) for g in nets.graph]).nanmean(0)
        return pd.DataFrame([dict(arm=f"{name} {a:g}", seed=s, task=int(t >= 0), epoch=t, metric=m, value=v) for m, vs in found.items() for a, s, v in zip(α.tolist(), many, vs.tolist())])
    opt, w0 = torch.optim.SGD(base.params.values(), lr), flat(base)
    for t in range(before): epoch(base, opt, t - before)
    parts = [look("base", base, -1, w0)]
    nets = dict(base=base, clone=clone_replicas(base, k, noise=kick), copy=clone_replicas(base, k), rounding=clone_replicas(base, k)); blocks = Blocks(nets["clone"], clone_partition(base.graph, factors_of(base.graph, k)))
    opts, starts = {n: opt if n == "base" else torch.optim.SGD(v.params.values(), lr) for n, v in nets.items()}, {n: flat(v) for n, v in nets.items()}
    for t in range(epochs + 1):
        if t % 5 == 0: parts += [look(n, v, t, starts[n]) for n, v in nets.items()]
        if t < epochs:
            for n, v in nets.items(): epoch(v, opts[n], t)
            for n, p in constant({n: p.data for n, p in nets["copy"].params.items()}, blocks).items(): nets["copy"].params[n].data.copy_(p)
    return {"": pd.concat(parts)}


# ---- (c) decay and saturation ----
def saturation():
    base = ["model.activation=tanh", "stream.tasks=30", "training.seed=700", "training.replicas=10", "metrics.names=[saturated_fraction,effective_rank,weight_norm,weight_magnitude]"]
    rules = dict(sgd=["optimizer=plain_sgd", "optimizer.lr=0.1"], adam=["optimizer=adam", "optimizer.lr=0.01"])
    return {f"{rule} {d:g}": train([*base, *words, f"optimizer.weight_decay={d}"]) for rule, words in rules.items() for d in (0, .001, .01)}


# ---- (d) normalisation, and the curvature across ----
class Across(Callback):
    "At the moment of cloning: the curvature across the manifold; after each epoch: the distance from it"
    order = -98
    def before_task(self, learner):
        if not learner.at.task: return
        base = next(c for c in learner.callbacks if isinstance(c, Clone)).was[0]; exact = clone_replicas(base, 2)
        self.blocks = Blocks(exact, clone_partition(base.graph, factors_of(base.graph, 2)))
        x, y = Monitor([], probe_size=500).examples(learner.task)
        found = normal_hessian(loss_hessian(exact, x, y, learner.task.loss), self.blocks, [generator(s, "lanczos") for s in exact.seeds], steps=60)
        learner.log_all({("train", "", f"across_{k}"): v for k, v in found.items()}); self.after_epoch(learner)
    def after_epoch(self, learner):
        if learner.at.task: learner.log("distance", normal_size({n: p.detach() for n, p in learner.replicas.params.items()}, self.blocks))

_cloned = ["training=cloning", "dataset=digits", "model.dropout_p=0", "optimizer=plain_sgd", "optimizer.lr=0.1", "training.batch_size=32", "training.initial_epochs=5", "metrics.names=[effective_rank]", "metrics.epochs=2",
           "intervention.clone.noise=0.001", "training.seed=800", "training.replicas=10"]

def across():
    nets = dict(mlp=["model=mlp", "model.hidden_sizes=[4,4]"], cnn=["model=cnn", "model.conv_channels=[2,4]", "model.fc_hidden_units=[4]"])
    return {f"{net} {n}": train([*_cloned, *words, f"model.normalization={n}", "training.epochs=40"], "clone", Across()) for net, words in nets.items() for n in ("none", "batch", "layer")}


# ---- (e) duplicates, and what chance gives ----
thresholds = (.8, .9, .95, .99)

class Partners(Callback):
    "Units with a partner: in the networks, in random ones, and in ones with each unit's incoming weights shuffled"
    def __init__(self, f, tasks=(0, 9, 39)): self.f, self.tasks = f, tasks
    def after_task(self, learner):
        if learner.at.task not in self.tasks: return
        nets, x = learner.replicas, Monitor([], probe_size=500).examples(learner.task)[0]; rows = read_units(nets, x); flat = x.flatten(2)
        widths = [g.size for g in nets.graph]; drawn = random_layers(flat, widths, self.f, seed=learner.at.task); mixed = [self.shuffled(nets, flat, r) for r in range(10)]
        for i, g in enumerate(nets.graph):
            layers = dict(trained=rows[g.site], random=drawn[i], shuffled=torch.stack([m[i] for m in mixed]))
            for t in thresholds:
                for name, h in layers.items():
                    v = duplicate_fraction(h, threshold=t).nan_to_num(0.)
                    learner.log(f"{name}_{t}", v.mean(0) if v.ndim > 1 else v, "train", f"layer {i + 1}")
    def shuffled(self, nets, h, repeat):
        out = []
        for i in range(len(nets.graph.groups)):
            w, b = (nets.params[f"linear_{i}.{n}"].detach() for n in ("weight", "bias"))
            order = torch.stack([torch.rand(w.shape[1:], generator=generator(s, "shuffle", i, repeat)) for s in nets.seeds]).argsort(2)
            out.append(h := self.f(h @ w.gather(2, order).mT + b[:, None]))
        return out

def null():
    words = [w for w in _permuted if "names" not in w] + ["metrics.names=[dead_fraction,duplicate_fraction]"]
    cases = dict(relu=([], torch.relu), tanh=(["model.activation=tanh"], torch.tanh), relu_slow=(["optimizer.lr=0.001"], torch.relu), relu_sgd=(["optimizer=plain_sgd", "optimizer.lr=0.1"], torch.relu))
    return {name: train([*words, *more], "backprop", Partners(f)) for name, (more, f) in cases.items()}


# ---- (f) dropout ----
class Modes(Callback):
    "The training loss of the clone in evaluation mode and with masks, after each fifth epoch; from one epoch on no masks at all"
    order = 50
    def __init__(self, off=None): self.off = off
    def before_epoch(self, learner):
        if self.off is not None and learner.at.task and learner.at.epoch == self.off:
            for m in learner.replicas.modules:
                for d in m.modules():
                    if isinstance(d, Dropout): d.p = 0.
    def after_epoch(self, learner):
        if learner.at.epoch % 5: return
        view = learner.task.train; x, y = view.fetch(torch.arange(view.n).expand(len(learner.replicas), -1)); nets = learner.replicas
        learner.log("eval_train_loss", evaluate(nets, learner.task, view)["loss"], "train")
        state = [g["dropout"].get_state() for g in nets.generators]
        with torch.no_grad(): loss = torch.stack([learner.task.loss(nets(x), y).mean(1) for _ in range(5)]).mean(0)      # with masks, where there are any; the masks of training stay as they are
        for g, s in zip(nets.generators, state): g["dropout"].set_state(s)
        learner.log("masked_train_loss", loss, "train")

def dropout():
    words = [*_cloned, "intervention.clone.noise=0", "model=mlp", "model.hidden_sizes=[8,8]", "model.normalization=none", "training.epochs=120", "metrics.epochs=5"]
    words = [*{w.partition("=")[0]: w for w in words}.values()]
    return {f"{p:g}{' off' if off else ''}": train([*(w for w in words if "dropout_p" not in w), f"model.dropout_p={p}"], "clone", Modes(off)) for p, off in ((0, None), (.1, None), (.3, None), (.1, 80), (.3, 80))}


questions = dict(start=start, lazy=lazy, saturation=saturation, across=across, null=null, dropout=dropout)
keep = ["online_accuracy", "test_accuracy", "train_loss", "base_train_loss", "base_test_accuracy", "dead_fraction", "effective_rank", "saturated_fraction", "weight_magnitude", "cloning_r2_corrected", "r2_corrected", "movement", "distance",
        "across_bottom", "eval_train_loss", "masked_train_loss", *(f"{who}_{t}" for who in ("trained", "random", "shuffled") for t in thresholds)]


def rows(runs):
    "One table of all arms: what the notebook reads"
    df = pd.concat([t.assign(arm=name or t.arm) if name else t for name, t in runs.items()], ignore_index=True)
    if "layer" not in df: df["layer"] = ""
    df = df[df.metric.isin(keep)]
    return df[["arm", "seed", "task", "epoch", "layer", "metric", "value"]]


if __name__ == "__main__":
    question, folder = sys.argv[1], Path(sys.argv[2]); torch.set_num_threads(1); warnings.filterwarnings("ignore", "Dropout at")
    if question == "collect":
        df = pd.concat([pd.read_parquet(folder/f"{q}.parquet").assign(question=q) for q in questions if (folder/f"{q}.parquet").is_file()], ignore_index=True);
        df = df[df.metric.isin(keep) & ~(df.metric.isin(["train_loss", "base_train_loss"]) & ~df.question.isin(["lazy", "across"]))].assign(layer=lambda d: d.layer.where(d.question == "null", ""))
        df = df.groupby(["question", "arm", "seed", "task", "epoch", "layer", "metric"], sort=False).value.mean().reset_index()                       # over layers
        df.assign(value=df.value.astype("float32"), **{k: df[k].astype("int16") for k in ("seed", "task", "epoch")}, **{k: df[k].astype("category") for k in ("question", "arm", "layer", "metric")}).to_parquet(OUT/"questions.parquet", compression="zstd")
    else: folder.mkdir(parents=True, exist_ok=True); rows(questions[question]()).to_parquet(folder/f"{question}.parquet")
