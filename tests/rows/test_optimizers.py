"What the sources' devices, tracker and optimizers are and do (rows A11-A13, A27-A31, A40), each as a test."
import io
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from lop_nb.compose import compose
from lop_nb.config import NoisySGD
from lop_nb.data import load
from lop_nb.learner import Learner, Online
from lop_nb.models import MLP
from lop_nb.optimizers import make_optimizer
from lop_nb.replicas import Replicas
from lop_nb.runtime import generator, pick_device
from lop_nb.streams import PermutedPixels
from lop_nb.tracking import Wandb


def stack(seeds=(0, 1), shape=(100, 100)): return torch.stack([torch.randn(shape, generator=generator(s, "g")) for s in seeds])


def built(*words, p=None, generators=(0, 1)):
    "The optimizer that these words on the command line give, and its settings"
    p = torch.zeros(2, 100, 100, requires_grad=True) if p is None else p
    opt = make_optimizer(compose(list(words)).optimizer, dict(p=p), generators=[generator(s, "noise") for s in generators])
    return opt, opt.param_groups[0]


def has(group, **want): assert {k: group[k] for k in want} == want


def test_A11_device(monkeypatch):
    "A device that is named is taken; else the best CUDA card, else MPS, else the processor"
    assert compose(["training.device=cpu"]).training.device == "cpu" and compose([]).training.device is None
    assert pick_device("cpu") == torch.device("cpu")
    for cards, mps, best in (1, True, "cuda:0"), (0, True, "mps"), (0, False, "cpu"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards); monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert pick_device(None) == torch.device(best)
        assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("variable, best", [("0,1,2", 2), ("2,0", 0), ("1,0", 1)])
def test_A12_best_of_several_cards(monkeypatch, variable, best):
    "The highest 0.6·free + 0.3·(1 − busy) + 0.1/(1 + processes) that NVML reports, as torch counts under CUDA_VISIBLE_DEVICES; free memory alone without NVML"
    readings = [(.5, 0, 0), (.9, 100, 4), (.6, 10, 0)]          # .30 + .30 + .10 = .70; .54 + 0 + .02 = .56; .36 + .27 + .10 = .73
    shown = [int(v) for v in variable.split(",")]
    class NVMLError(Exception): pass
    lib = types.SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetHandleByUUID=lambda name: int(name.removeprefix("GPU-card")),
        nvmlDeviceGetMemoryInfo=lambda h: types.SimpleNamespace(free=int(1000*readings[h][0]), total=1000),
        nvmlDeviceGetUtilizationRates=lambda h: types.SimpleNamespace(gpu=readings[h][1]), nvmlDeviceGetComputeRunningProcesses=lambda h: [None]*readings[h][2])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable); monkeypatch.setitem(sys.modules, "pynvml", lib)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(shown))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid=f"card{shown[i]}", pci_domain_id=0, pci_bus_id=shown[i], pci_device_id=0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (int(1000*readings[shown[i]][0]), 1000))
    assert pick_device() == torch.device(f"cuda:{best}")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert pick_device() == torch.device(f"cuda:{max(range(len(shown)), key=lambda i: readings[shown[i]][0])}")


def test_A13_wandb_is_told_once(monkeypatch):
    "W&B is begun once, with project, tags and the study's kind, entity, run name and the full config; without it, it is not even imported"
    told = []; run = types.SimpleNamespace(log=lambda row: None, define_metric=lambda *a, **kw: None, summary={}, finish=lambda **kw: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kw: told.append(kw) or run)); monkeypatch.delenv("WANDB_MODE", raising=False)
    cfg = compose(["optimizer=sgd"])
    def fit(*callbacks):
        nets = Replicas(partial(MLP, 64, 10, hidden_sizes=[4], normalization="none", dropout_p=0.), [0])
        Learner(nets, PermutedPixels(load("digits"), tasks=2), cfg.optimizer, 1, 256, [Online(), *callbacks], run="arm", defaults=()).fit()
    fit(Wandb("project", None, cfg, tags=["a"], entity="team", name="a name", kind="continual"))
    [init] = told
    assert {k: init[k] for k in ("project", "tags", "entity", "name", "mode")} == dict(project="project", tags=["a", "continual"], entity="team", name="a name", mode="offline")
    assert init["config"] == OmegaConf.to_container(cfg)
    fit(Wandb("project", None, cfg))
    assert (told[1]["entity"], told[1]["name"], told[1]["tags"]) == (None, "arm", [])
    fit(); assert len(told) == 2
    assert compose([]).logging.wandb is False
    code = "import sys, lop_nb.cli, lop_nb.tracking; assert 'wandb' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True); assert done.returncode == 0, done.stderr


def test_A27_adam():
    "adam: learning rate 1e-3, betas .9 and .999, eps 1e-8, no weight decay"
    opt, group = built("optimizer=adam")
    assert type(opt) is torch.optim.Adam; has(group, lr=1e-3, betas=(.9, .999), eps=1e-8, weight_decay=0., amsgrad=False)


def test_A28_sgd():
    "sgd: learning rate .01, momentum .9, no dampening, Nesterov or weight decay; the paper's, without momentum, is one word away"
    opt, group = built("optimizer=sgd")
    assert type(opt) is torch.optim.SGD; has(group, lr=.01, momentum=.9, dampening=0., nesterov=False, weight_decay=0.)
    has(built("optimizer=sgd", "optimizer.momentum=0")[1], momentum=0.)


def test_A29_rmsprop():
    "rmsprop: learning rate 1e-4, alpha .99, eps 1e-8, no momentum, not centred"
    opt, group = built("optimizer=rmsprop")
    assert type(opt) is torch.optim.RMSprop; has(group, lr=1e-4, alpha=.99, eps=1e-8, momentum=0., centered=False, weight_decay=0.)


def test_A30_adamw():
    "adamw can be chosen by name"
    opt, group = built("optimizer=adamw", "optimizer.lr=0.002")
    assert type(opt) is torch.optim.AdamW; has(group, lr=.002, betas=(.9, .999), eps=1e-8, decoupled_weight_decay=True)


def test_A31_noisysgd():
    "sgd with noise of std σ₀λᵗ‖g‖ per number, within 2 %, before weight decay and momentum; it can be reset and read, is saved with the state, and λ = 0 is one noisy step"
    opt, group = built("optimizer=noisysgd")
    assert isinstance(opt, torch.optim.SGD); has(group, lr=.01, momentum=.9, dampening=0., nesterov=False, weight_decay=0., noise_scale=.01, noise_decay=.99, noise_per="entry")
    g, μ, wd = stack() * torch.tensor([1., 30.])[:, None, None], .5, .1
    p = torch.ones_like(g, requires_grad=True); opt, _ = built("optimizer=noisysgd", "optimizer.lr=1", f"optimizer.momentum={μ}", f"optimizer.weight_decay={wd}", p=p)
    velocity = 0.
    for t in range(4):
        before = p.detach().clone(); p.grad = g.clone(); opt.step()
        noise = (before - p.detach()) - μ * velocity - wd * before - g    # what is left of the velocity's increment
        velocity = before - p.detach()
        for r in 0, 1: assert (noise[r].std() / g[r].norm()).item() == pytest.approx(.01 * .99**t, rel=.02)
    assert opt.noise_scale_now == pytest.approx(.01 * .99**4)
    file = io.BytesIO(); torch.save(opt.state_dict(), file); file.seek(0)
    again, _ = built("optimizer=noisysgd", p=p.detach().clone().requires_grad_()); again.load_state_dict(torch.load(file, weights_only=True))
    assert again.noise_scale_now == opt.noise_scale_now
    opt.reset_noise(); assert opt.noise_scale_now == .01
    once, _ = built("optimizer=noisysgd", "optimizer.noise_decay=0", "optimizer.momentum=0", "optimizer.lr=1", p=p)
    changes = []
    for _ in range(3): before = p.detach().clone(); p.grad = g.clone(); once.step(); changes.append(torch.equal(p.detach(), before - g))
    assert changes == [False, True, True]


def test_A40_noise_for_the_clone_alone():
    "Under noisysgd the base has no noise (its steps are sgd's, bit for bit) and the clone has the configured one"
    spec, g = NoisySGD(noise_scale=.05, noise_decay=.9), stack(shape=(10, 10)); base, clone, plain = (torch.ones_like(g, requires_grad=True) for _ in range(3))
    gens = [generator(s, "noise") for s in (0, 1)]
    its = make_optimizer(replace(spec, noise_scale=0.), dict(p=base), generators=gens); opt = make_optimizer(spec, dict(p=clone), generators=gens)
    sgd = torch.optim.SGD([plain], lr=.01, momentum=.9)
    assert (its.noise_scale_now, opt.noise_scale_now) == (0., .05)
    for p, o in (base, its), (clone, opt), (plain, sgd):
        for _ in range(3): p.grad = g.clone(); o.step()
    assert torch.equal(base, plain) and not torch.equal(clone, plain)
    assert (its.noise_scale_now, opt.noise_scale_now) == (0., .05 * .9**3)
