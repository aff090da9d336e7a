"""Rows of work, each with its plain way, ours and the best peer, side by side in one run.

    python -m bench                          every row (about half an hour)
    python -m bench --only bits online-cbp   rows of these names, or whose names begin so
    python -m bench --quick                  tiny sizes, under a minute: does it still run?
    python -m bench --list                   the names
"""
import argparse
import json
import sys
from pathlib import Path

import torch

from . import batches, bits, cloning, core, metrics, monitor, online, records, show, tickets

FAMILIES = [bits, online, batches, records, metrics, monitor, cloning, tickets]


def rows(quick): return {k: make for family in FAMILIES for k, make in family.rows(quick).items()}


def chosen(only, quick):
    every = rows(quick)
    meant = {o: [o] if o in every else [k for k in every if k.startswith(o)] for o in only}
    unknown = [o for o, names in meant.items() if not names]
    if unknown: sys.exit(f"No row begins with {', '.join(unknown)}. There are: {', '.join(every)}.")
    return {k: every[k] for names in meant.values() for k in names} if only else every


def main(args=None):
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows of these names, or whose names begin so")
    p.add_argument("--quick", action="store_true", help="tiny sizes and one round")
    p.add_argument("--rounds", type=int, help="default 5, or 1 with --quick"); p.add_argument("--seconds", type=float, help="of one way in one round; default 1, or 0.02 with --quick")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="write the report there; rows that it has already stay if they are not measured again")
    p.add_argument("--list", action="store_true", help="only the names of the rows")
    a = p.parse_args(args)
    make = chosen(a.only, a.quick)
    if a.list: print("\n".join(make)); return
    rounds, seconds = a.rounds or (1 if a.quick else 5), a.seconds or (.02 if a.quick else 1.)
    torch.set_num_threads(1)
    machine, done = core.machine(), []
    print(show.facts(machine), flush=True)
    for k, m in make.items():
        done.append(core.measure(m(), rounds, seconds)); print(show.row(done[-1]), flush=True)
        if a.out: write(a.out, machine, done)
    print("\n" + show.table(done))


def write(path, machine, done):
    "The report as JSON; each row says on which machine it was measured"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    mine = {r["name"]: r | dict(machine=machine) for r in done}
    kept = {r["name"]: r for r in old} | mine
    order = [k for k in rows(False) if k in kept] + [k for k in kept if k not in rows(False)]
    path.write_text(json.dumps(dict(version=1, rows=[kept[k] for k in order]), indent=1) + "\n")


if __name__ == "__main__": main()
