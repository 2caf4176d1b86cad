"""Tokens per second in a container with fewer CPUs than its machine, with and without --threads.

    python benchmarks/cpu_quota.py RUNTIME MODEL [--cpus 1] [--threads N] [--turns 9] [--out FILE]

Puts itself into a control group with that quota (root), then starts llama-server in turn as it
reckons by itself and as the loader starts it, or with so many threads. Prints JSON; ``--out``
keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import requests

from benchmarks import control_group
from llama_loader import host, processes, settings
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan

_TOKENS: Final = 96
_PROMPT: Final = "Parcel 0001 left the harbour at noon and arrives on the third day. " * 8


def speeds(plan: ServerPlan) -> tuple[float, float]:
    """Start a server; return its tokens per second, of the answer and of the prompt."""
    body = {"prompt": _PROMPT, "n_predict": _TOKENS, "ignore_eos": True, "cache_prompt": False}
    with Server(plan) as server:
        key = {"Authorization": f"Bearer {server.api_key}"}
        answer = requests.post(f"{server.url}/completion", json=body, headers=key, timeout=300)
        answer.raise_for_status()
        told = answer.json()["timings"]
    return told["predicted_per_second"], told["prompt_per_second"]


def measure(runtime: Path, model: Path, turns: int, threads: int | None) -> dict[str, Any]:
    """Take turns; returns every speed, in tokens per second."""
    found = settings.load(environ={"PATH": os.environ["PATH"]})
    facts = host.detect(found)
    ours = ServerPlan(
        runtime,
        model,
        processes.environment({"PATH": os.environ["PATH"]}),
        pinned_build=True,
        threads=threads or facts.threads,
    )
    plans = {"its own reckoning": replace(ours, threads=None), "these threads": ours}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in plans}
    for _ in range(turns):
        for name, plan in plans.items():
            taken[name].append(speeds(plan))
    medians = {name: [statistics.median(each) for each in zip(*all_, strict=True)]
               for name, all_ in taken.items()}  # fmt: skip
    plain, limited = medians.values()
    return {
        "cpus": facts.cpus,
        "machine_cpus": facts.machine_cpus,
        "threads": ours.threads,
        "taken": taken,
        "medians": medians,
        "answer_ratio": round(limited[0] / plain[0], 2),
        "prompt_ratio": round(limited[1] / plain[1], 2),
        "load_before": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cpus", type=float, default=1.0)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with control_group.capped(os.getpid(), options.cpus):
        runtime, model = options.runtime.absolute(), options.model.absolute()
        result = measure(runtime, model, options.turns, options.threads)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
