"""What a row is, and how its ways race: in turn, round after round, by the processor's clock.

A *way* of a row is one program for the row's work: the plain one, ours, a peer's. It is made once, runs once uncounted (compilers, first buffers), then for a
while uncounted, then in turn with the others of its row. Its rate in a round is examples over processor seconds, which other programs on the machine disturb less than
wall time; wall time stands beside. A ratio is the median of the rounds' ratios, so that both sides met the same neighbours. Memory is how far the process's resident
memory rose while the way was made and first run. Ways that do the same work have to give the same first losses: see `agree`.
"""
import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from lop_nb.runtime import LopError


class Missing(Exception):
    "This way can't be run here; the message says why"


@dataclass
class Way:
    role: str           # plain, ours, peer, also
    make: object        # () -> (run, n): run() does n units of work, and returns the losses [R, …] of the examples or None
    same: bool = True   # are its first losses those of the plain way?


@dataclass
class Row:
    name: str
    what: str                                   # the work, in words
    ways: dict                                  # {name: Way}; the first is the plain one
    goals: dict = field(default_factory=dict)   # {(way, other way, or "limit"): least ratio}
    limit: object = None                        # {name: run} -> (units per second, in words): what the machine could do; asked in each round
    unit: str = "examples/s"
    note: str = ""                              # what to know about the figures
    together: dict = field(default_factory=dict)# {name: (role, [ways])}: their geometric mean, as one way more
    finer: int = 1                              # so many times the rounds, each so much shorter: for differences of a few per cent


def clocks(): return time.process_time(), time.perf_counter()


def lap(run, n, seconds):
    "(units per processor second, per wall second) of at least `seconds` of work"
    (cpu, wall), done = clocks(), 0
    while True:
        run(); done += n
        spent, passed = (b - a for a, b in zip((cpu, wall), clocks()))
        if spent >= seconds: return done / spent, done / passed


def status(key):
    "A line of the process's status in MiB; 0 where there is none"
    try: return next(int(s.split()[1]) / 1024 for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    except (OSError, StopIteration): return 0.


def peak(f):
    "f(), and by how many MiB the resident memory rose meanwhile at most; None where the system does not tell"
    gc.collect(); give_back()
    try: Path("/proc/self/clear_refs").write_text("5")     # the peak begins anew
    except OSError: return f(), None
    before = status("VmRSS"); out = f()
    return out, max(0., status("VmHWM") - before)


def give_back():
    "Hand free memory back to the system, where the C library can"
    try: ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError): pass


def first(losses, n=100):
    "The first losses of the first replica"
    return None if losses is None else np.asarray([float(v) for v in (losses[0][:n] if len(losses) else [])])


def prepare(row):
    "Make the ways and run each once: {name: (run, n)}, {name: its share of the report}"
    made, report, losses = {}, {}, {}
    for name, way in row.ways.items():
        report[name] = dict(role=way.role, missing=None)
        def begin():
            run, n = way.make()
            losses[name] = first(run()) if way.same else (run(), None)[1]
            return run, n
        try: made[name], memory = peak(begin)
        except (Missing, LopError) as why: report[name]["missing"] = str(why); continue
        report[name]["memory_mib"] = memory and round(memory, 1)
    agree(row, losses)
    return made, report


def agree(row, losses, n=5, tolerance=1e-3):
    "Ways that claim to do the same work begin with the same losses"
    known = {k: v for k, v in losses.items() if v is not None and len(v)}
    for k, v in list(known.items())[1:]:
        base = next(iter(known.values())); m = min(len(v), len(base))
        if not np.allclose(v[:m], base[:m], rtol=tolerance, atol=tolerance): raise AssertionError(f"{row.name}: {k} does other work than {next(iter(known))}: losses {v[:n]} and {base[:n]}")


def measure(row, rounds, seconds):
    "The row's report, for JSON"
    if hasattr(row, "measure"): return row.measure(rounds, seconds)
    made, report = prepare(row)
    for run, n in made.values(): lap(run, n, seconds / 2)
    laps, bounds, rounds, seconds = {k: [] for k in made}, [], rounds * row.finer, seconds / row.finer
    for _ in range(rounds):
        for k, (run, n) in made.items(): laps[k].append(lap(run, n, seconds))
        if row.limit and "ours" in made: bounds.append(row.limit({k: run for k, (run, _) in made.items()}))
    cpu = {k: [c for c, _ in v] for k, v in laps.items()}
    for k, v in laps.items(): report[k] |= spread(cpu[k]) | dict(wall_rate=statistics.median(w for _, w in v))
    for k, (role, names) in row.together.items():
        cpu[k] = [statistics.geometric_mean(c) for c in zip(*(cpu[n] for n in names))]
        report[k] = dict(role=role, missing=None, memory_mib=None) | spread(cpu[k]) | dict(wall_rate=statistics.geometric_mean(report[n]["wall_rate"] for n in names))
    if bounds: cpu["limit"] = [rate for rate, _ in bounds]
    limit = spread(cpu["limit"]) | dict(what=bounds[-1][1]) if bounds else None
    return dict(name=row.name, what=row.what, unit=row.unit, note=row.note, rounds=rounds, seconds=seconds, ways=report, limit=limit, ratios=ratios(row, cpu))


def spread(rates): return dict(rate=statistics.median(rates), low=min(rates), high=max(rates))


def ratios(row, cpu):
    "Every way over the plain one, ours over the peers and the limit, and the pairs that have a goal"
    plain, others = next((k for k, (role, _) in row.together.items() if role == "plain"), next(iter(row.ways))), [k for k, w in row.ways.items() if w.role == "peer"] + ["limit"]
    over = {} if row.together else {(k, plain): None for k in cpu if k not in (plain, "limit")}
    pairs = over | {("ours", k): None for k in others} | {p: None for p in row.goals}
    return [ratio(a, b, cpu, row.goals.get((a, b))) for a, b in pairs if a in cpu and b in cpu]


def ratio(a, b, cpu, goal):
    each = [x / y for x, y in zip(cpu[a], cpu[b])]; r = statistics.median(each)
    return dict(of=a, over=b, ratio=r, low=min(each), high=max(each), goal=goal, met=None if goal is None else r >= goal)


def machine():
    "The processor and the versions, no names"
    try: model = next(s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name"))
    except (OSError, StopIteration): model = platform.machine()
    return dict(processor=model, cores=len_cores(), memory_gib=round(status_all("MemTotal")), system=platform.system(), python=sys.version.split()[0],
                **{p: installed(p) for p in ("torch", "numpy", "numba", "jax")}, threads=torch.get_num_threads())


def len_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def status_all(key):
    try: return next(int(s.split()[1]) / 2**20 for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith(key))
    except (OSError, StopIteration): return 0.


def installed(package):
    try: return version(package)
    except PackageNotFoundError: return None
