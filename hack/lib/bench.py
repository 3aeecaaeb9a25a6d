"""Tables, ratios and one JSON object of what hack/bench measured.

usage: bench.py migrate|shim DIR [FILE]
"""

import json
import os
import statistics
import sys

WAYS = {"sterna": "sterna migrate", "stock": "ctr checkpoint, copy, restore"}
MIB = 1 << 20


def median(values):
    return statistics.median(values) if values else None


def spread(values):
    """The middle and the ends: of few values, percentiles would be made up."""
    return {"median": round(median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3), "n": len(values)}


def ratio(a, b):
    return round(a / b, 2) if b else None


def machine():
    cpu = "unknown"
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / (1 << 30), 1),
        "kernel": os.uname().release,
        "load_average": round(os.getloadavg()[0], 1),
    }


def show(title, rows):
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(title)
    for row in rows:
        cells = [cell.ljust(width) if column < 3 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths))]
        print("  " + "  ".join(cells).rstrip())


def ms(of):
    if of is None:
        return "-"
    unit, factor = ("ms", 1) if of["max"] < 10000 else ("s", 1000)
    digits = 1 if factor > 1 or of["max"] < 100 else 0
    text = f"{of['median'] / factor:.{digits}f} {unit}"
    if of["n"] > 1:
        text += f" ({of['min'] / factor:.{digits}f}-{of['max'] / factor:.{digits}f})"
    return text


# migrate


def read_move(path):
    move = {}
    for name in os.listdir(path):
        with open(os.path.join(path, name)) as file:
            move[name] = file.read().strip()
    for name in ("mark", "result", "migration"):
        if name in move:
            move[name] = json.loads(move[name])
    if "steps" in move:
        move["steps"] = {name: int(at) for name, at in map(str.split, move["steps"].splitlines())}
    return move


def size(text):
    return int(text[:-1]) << {"M": 20, "G": 30}[text[-1]]


def steps_ms(steps):
    order = ["began", "checkpointed", "copied", "restored"]
    names = ["checkpoint_ms", "copy_ms", "restore_ms"]
    return {name: (steps[b] - steps[a]) / 1000 for name, a, b in zip(names, order, order[1:])}


def one_way(way, moves):
    """All runs of one way at one size and rate."""
    done = [m for m in moves if way != "sterna" or m["migration"]["outcome"] == "migrated"]
    cell = {"way": way, "runs": len(moves), "moved": len(done)}
    if len(done) < len(moves):
        failed = next(m["migration"] for m in moves if m not in done)
        cell["not_moved_because"] = (failed.get("failure") or {}).get("reason", failed["outcome"])
    if not done:
        return cell
    if way == "sterna":
        total = [int(m["total_us"]) / 1000 for m in done]
        cell["freeze_ms"] = spread([m["migration"]["freeze_ms"] for m in done])
        cell["laps"] = spread([len(m["migration"]["laps"]) for m in done])
        cell["tracking"] = done[0]["migration"]["tracking"]
    else:
        total = [(m["steps"]["restored"] - m["steps"]["began"]) / 1000 for m in done]
        steps = [steps_ms(m["steps"]) for m in done]
        cell["steps"] = {name: spread([s[name] for s in steps]) for name in steps[0]}
    cell["blackout_ms"] = spread([m["mark"]["blackout_ms"] for m in done])
    cell["writer_blackout_ms"] = spread([m["mark"]["writer_blackout_ms"] for m in done])
    cell["total_ms"] = spread(total)
    cell["link_bytes"] = spread([int(m["link_bytes"]) for m in done])
    cell["writes_lost"] = sum(m["result"]["writes_lost"] for m in done)
    cell["keys_wrong"] = sum(m["result"]["keys_wrong"] for m in done)
    cell["connections"] = sum(m["result"]["connections"] for m in done)
    cell["connections_dropped"] = sum(m["result"]["connections_dropped"] for m in done)
    return cell


def slope(points):
    """Least squares: milliseconds for each GiB more."""
    xs, ys = zip(*points)
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    return round(sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a in xs), 1)


def migrate(path):
    moves = [read_move(os.path.join(path, name)) for name in os.listdir(path)]
    plain = {m["memory"]: int(m["total_us"]) / 1000 for m in moves if m["way"] == "plain"}
    moves = [m for m in moves if m["way"] != "plain"]
    cells = []
    for memory in sorted({m["memory"] for m in moves}, key=size):
        for rate in sorted({m["write_rate"] for m in moves if m["memory"] == memory}, key=rate_order):
            here = [m for m in moves if (m["memory"], m["write_rate"]) == (memory, rate)]
            ways = {way: one_way(way, [m for m in here if m["way"] == way]) for way in WAYS}
            cell = {"memory": memory, "write_rate": rate, "plain_copy_ms": plain.get(memory), **ways}
            if "blackout_ms" in ways["sterna"] and "blackout_ms" in ways["stock"]:
                for what in ("blackout_ms", "total_ms", "link_bytes"):
                    cell["ratio_" + what.rsplit("_", 1)[0]] = ratio(ways["stock"][what]["median"], ways["sterna"][what]["median"])
            cells.append(cell)
    slopes = slopes_of(cells)
    migrate_tables(cells, slopes)
    return {"bench": "migrate", "machine": machine(), "cells": cells, "slopes": slopes}


def rate_order(rate):
    return (rate == "max", len(rate), rate)


def slopes_of(cells):
    """Where a rate was measured at several sizes: blackout over memory, by way."""
    slopes = []
    for rate in sorted({c["write_rate"] for c in cells}, key=rate_order):
        found = {"write_rate": rate}
        for way in WAYS:
            points = [
                (size(c["memory"]) / (1 << 30), c[way]["blackout_ms"]["median"])
                for c in cells
                if c["write_rate"] == rate and "blackout_ms" in c[way]
            ]
            if len(points) > 1:
                found[way + "_ms_per_gib"] = slope(points)
        if len(found) > 1:
            slopes.append(found)
    return slopes


def migrate_tables(cells, slopes):
    rows = [("memory", "writes", "way", "no answer", "total", "link", "lost", "dropped")]
    for cell in cells:
        for way, name in WAYS.items():
            one = cell[way]
            if "blackout_ms" not in one:
                rows.append((cell["memory"], cell["write_rate"], name, "not moved", "", "", "", ""))
                continue
            rows.append(
                (
                    cell["memory"],
                    cell["write_rate"],
                    name,
                    ms(one["blackout_ms"]),
                    ms(one["total_ms"]),
                    f"{one['link_bytes']['median'] / MIB:.0f} MiB",
                    f"{one['writes_lost']}",
                    f"{one['connections_dropped']} of {one['connections']}",
                )
            )
        if cell["plain_copy_ms"] is not None:
            copied = {"median": cell["plain_copy_ms"], "max": cell["plain_copy_ms"], "n": 1}
            rows.append((cell["memory"], "", "plain copy of as much", "", ms(copied), cell["memory"], "", ""))
    show("", rows)
    for cell in cells:
        if "ratio_blackout" in cell:
            print(
                f"{cell['memory']}, {cell['write_rate']}: without Sterna {cell['ratio_blackout']} times as long without an answer, "
                f"{cell['ratio_total']} times the total, {cell['ratio_link']} times the bytes"
            )
            steps = cell["stock"]["steps"]
            print("    of that time: " + ", ".join(f"{name[:-3]} {ms(step)}" for name, step in steps.items()))
        why = cell["sterna"].get("not_moved_because")
        if why:
            one = cell["sterna"]
            print(f"{cell['memory']}, {cell['write_rate']}: sterna moved {one['moved']} of {one['runs']}: {why}")
    for one in slopes:
        texts = [f"{WAYS[way]} {one[way + '_ms_per_gib']} ms" for way in WAYS if way + "_ms_per_gib" in one]
        print(f"writes {one['write_rate']}: each GiB more adds to the time without an answer: {', '.join(texts)}")


# shim


def shim(path):
    memory, times = {}, {}
    with open(os.path.join(path, "memory")) as lines:
        for runtime, count, pss, rss, private, threads in map(str.split, lines):
            memory.setdefault((runtime, int(count)), []).append([int(pss), int(rss), int(private), int(threads)])
    with open(os.path.join(path, "times")) as lines:
        for what, runtime, us in map(str.split, lines):
            times.setdefault(what, {}).setdefault(runtime, []).append(int(us) / 1000)
    at_rest = []
    for runtime, count in sorted(memory, key=lambda key: (key[1], key[0] != "sterna")):
        columns = list(zip(*memory[runtime, count]))
        names = ("pss_kib", "rss_kib", "private_dirty_kib", "threads")
        at_rest.append({"runtime": runtime, "containers": count, **{n: spread(c) for n, c in zip(names, columns)}})
    rows = [("shim", "containers", "", "PSS", "RSS", "private dirty", "threads")]
    for one in at_rest:
        kib = [f"{one[n]['median'] / 1024:.1f} MiB" for n in ("pss_kib", "rss_kib", "private_dirty_kib")]
        rows.append((one["runtime"], str(one["containers"]), "each", *kib, f"{one['threads']['median']:.0f}"))
    show("", rows)
    ratios = {}
    for count in sorted({one["containers"] for one in at_rest}):
        ours, theirs = (next(o for o in at_rest if (o["runtime"], o["containers"]) == (r, count)) for r in ("sterna", "runc"))
        for name in ("pss", "rss", "private_dirty"):
            ratios[f"{name}_of_{count}"] = ratio(ours[name + "_kib"]["median"], theirs[name + "_kib"]["median"])
    rows = [("time of", "", "", "sterna", "runc", "sterna/runc")]
    for what, by in times.items():
        ours, theirs = spread(by["sterna"]), spread(by["runc"])
        ratios[what] = ratio(ours["median"], theirs["median"])
        rows.append((what, "", "", *(f"{o['median']:.1f} ms ({quartiles(by[r])})" for r, o in (("sterna", ours), ("runc", theirs))), f"{ratios[what]:.2f}"))
    show("", rows)
    print("sterna/runc: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    timed = {what: {runtime: {**spread(v), "quartiles": statistics.quantiles(v, n=4)} for runtime, v in by.items()} for what, by in times.items()}
    return {"bench": "shim", "machine": machine(), "at_rest": at_rest, "times_ms": timed, "ratios": ratios}


def quartiles(values):
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.1f}-{high:.1f}"


def main():
    command, path = sys.argv[1:3]
    line = json.dumps({"migrate": migrate, "shim": shim}[command](path), separators=(",", ":"))
    for target in sys.argv[3:]:
        with open(target, "w") as file:
            file.write(line + "\n")
    print(line)


main()
