"""Reports what a drained Valkey and its client saw: a table, then a JSON object.

usage: demo.py MIGRATION WRITES BEFORE AFTER DRAIN-MS

MIGRATION: the Migration as JSON. WRITES: lines of what a client that increments a
key was told, and when in seconds. BEFORE, AFTER: files with the answers to the same
questions. Fails unless nothing was lost.
"""

import json
import sys


def steps(path):
    """Each write that was acknowledged: its number and its time."""
    found = []
    for line in open(path):
        words = line.split()
        if len(words) == 2 and words[0].isdigit():
            found.append((int(words[0]), float(words[1])))
    return found


def main(migration, writes, before, after, drain_ms):
    migration = json.load(open(migration))
    status = migration["status"]
    source, target = status["sourcePod"], status["targetPod"]
    moved = status["transfer"]["containers"][0]
    told = steps(writes)
    pairs = list(zip(told, told[1:]))
    # A write that was lost after it was acknowledged is counted twice.
    lost = sum(1 for one, next_one in pairs if next_one[0] <= one[0])
    gap = max((next_one[1] - one[1] for one, next_one in pairs), default=0.0)
    same = open(before).read() == open(after).read()
    result = {
        "result": status["phase"],
        "from": source["node"],
        "to": target["node"],
        "same_answers": same,
        "acknowledged_writes": len(told),
        "lost_writes": lost,
        "longest_without_answer_ms": round(gap * 1000),
        "freeze_ms": moved.get("freezeMilliseconds"),
        "blackout_ms": moved.get("blackoutMilliseconds"),
        "memory_bytes": moved.get("memoryBytes"),
        "sent_bytes": moved.get("sentBytes"),
        "drain_ms": int(drain_ms),
    }
    rows = [
        ("pod", f"{source['name']} on {source['node']} -> {target['name']} on {target['node']}"),
        ("migration", f"{status['phase']}: {status['message']}"),
        ("answers", "the same as before" if same else "NOT the same as before"),
        ("writes", f"{len(told)} acknowledged during the move, {lost} lost"),
        ("no answer", f"{gap:.2f} s at most"),
        ("blackout", f"{result['blackout_ms']} ms (freeze {result['freeze_ms']} ms)"),
        ("drain", f"{int(drain_ms) / 1000:.1f} s"),
    ]
    print()
    for title, text in rows:
        print(f"{title:<11}{text}")
    print()
    print(json.dumps(result))
    return 0 if same and not lost and len(told) > 1 and status["phase"] == "Succeeded" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
