"A report in words: tables in Markdown"


def number(v):
    if v is None: return ""
    return f"{v:,.0f}" if v >= 100 else f"{v:.3g}"


def times(v): return f"{v:,.0f}" if v >= 100 else f"{v:.1f}" if v >= 10 else f"{v:.2f}"


def facts(machine):
    packages = ", ".join(f"{k} {v}" for k, v in machine.items() if k in ("python", "torch", "numpy", "numba", "jax") and v)
    return f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {packages}; {machine['threads']} thread"


def row(r):
    "One row, way by way"
    lines = [f"\n**{r['name']}**: {r['what']}; {r['rounds']} rounds of {r['seconds']:g} s\n", f"| way | {r['unit']} | (low–high) | by wall time | memory, MiB |", "|---|---|---|---|---|"]
    for k, w in r["ways"].items():
        if w["missing"]: lines.append(f"| {k} | {w['missing']} | | | |"); continue
        lines.append(f"| {k} | {number(w['rate'])} | {number(w['low'])}–{number(w['high'])} | {number(w['wall_rate'])} | {number(w['memory_mib'])} |")
    if r["limit"]: lines.append(f"| the machine's limit | {number(r['limit']['rate'])} | | | |")
    lines += ["", "; ".join(ratio(x) for x in r["ratios"])]
    if r["limit"]: lines.append(f"Limit: {r['limit']['what']}.")
    return "\n".join(lines)


def ratio(x):
    goal = "" if x["goal"] is None else f", goal {times(x['goal'])}: {'met' if x['met'] else 'MISSED'}"
    return f"{x['of']} / {x['over']} = {times(x['ratio'])} ({times(x['low'])}–{times(x['high'])}{goal})"


def over(r, name):
    x = next((x for x in r["ratios"] if x["of"] == "ours" and x["over"] == name), None)
    if x is None: return ""
    goal = "" if x["goal"] is None else f", goal {times(x['goal'])}"
    return f"{'' if x['met'] is not False else '✗ '}**{times(x['ratio'])}** ({times(x['low'])}–{times(x['high'])}{goal})"


def table(rows):
    "All rows, a line each"
    lines = ["| row | plain | ours | peer | ours / plain | ours / peer | share of the limit |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        names = {role: next((k for k, w in r["ways"].items() if w["role"] == role), None) for role in ("plain", "ours", "peer")}
        rate = lambda role: "" if not names[role] else number(r["ways"][names[role]].get("rate")) if not r["ways"][names[role]]["missing"] else "–"
        share = r["limit"] and r["ways"]["ours"].get("rate") and f"{r['ways']['ours']['rate'] / r['limit']['rate']:.0%}"
        lines.append(f"| {r['name']} | {rate('plain')} | {rate('ours')} | {rate('peer')} | {over(r, names['plain'])} | {over(r, names['peer'])} | {share or ''} |")
    return "\n".join(lines)
