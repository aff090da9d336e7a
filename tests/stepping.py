"Torch's way through a job of the kernels, step by step: what kernels are held to"
from types import SimpleNamespace

import torch
import torch.nn.functional as F


def loss_of(job, out, y):
    "[R, B, K], [R, B] -> [R, B]"
    if job.loss == "squared": return (out - y.reshape(*y.shape[:2], -1)).square().mean(-1)
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def torch_steps(job, x, y):
    "Train `job.nets` on x [R, n, in] and y [R, n] in batches, with plain torch: (losses [R, n], logits [R, n, K])"
    nets, inside = job.nets, list(job.inside.values())
    for c in inside: c.before_fit(SimpleNamespace(replicas=nets, optimizer=job.optimizer))
    reads, losses, logits = tuple(n for c in inside for n in c.reads), [], []
    for xb, yb in zip(x.split(job.batch_size, 1), y.split(job.batch_size, 1)):
        out, seen = nets(xb, reads) if reads else (nets(xb), {})
        loss = loss_of(job, out, yb)
        nets.backward(loss)
        here = SimpleNamespace(replicas=nets, seen=seen, optimizer=job.optimizer)
        for c in inside: c.after_backward(here)
        job.optimizer.step()
        for c in inside: c.after_step(here)
        losses.append(loss.detach()); logits.append(out.detach())
    return torch.cat(losses, 1), torch.cat(logits, 1)
