"""Checks that need several processes: all of a file's, one after the other, in one set of gloo ranks of this machine."""

import datetime
import importlib
import multiprocessing
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60  # that a rank waits for another


def _rank(number, folder, name, sizes, cases):
    tests = importlib.import_module(name)
    getattr(tests, "begin_rank", lambda: None)()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and NaN in memory that nobody filled
    patience = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=number, world_size=max(sizes), timeout=patience)
    groups, results = {size: dist.new_group(range(size), timeout=patience) for size in sizes}, {}
    for case in cases:
        size, check, *arguments = case
        if number >= size:
            continue
        tests.GROUP = groups[size]
        try:
            results[case] = (None, getattr(tests, check)(*arguments))
        except AssertionError:
            results[case] = (traceback.format_exc(), None)
        except Exception:  # the ranks are out of step now
            results |= {c: (f"in {case}: {traceback.format_exc()}", None) for c in cases if c not in results}
            break
    torch.save(results, f"{folder}/{number}")


def ask(folder, name, sizes, cases):
    """Of each rank, by case: (what went wrong, what was found).

    A case is (number of ranks, name of a function of module `name`, its arguments…); the function finds their group in
    the module's GROUP. A function begin_rank of the module is called first.
    """
    multiprocessing.set_forkserver_preload([name])  # torch is imported once
    most = max(sizes)
    mp.start_processes(_rank, (str(folder), name, sizes, cases), nprocs=most, start_method="forkserver")
    return [torch.load(folder / str(number), weights_only=False) for number in range(most)]


def named(case):
    return "-".join(str(part) for part in case if part != "").replace("check_", "")


def wrong(results, case):
    """What went wrong, rank by rank."""
    return "\n".join(f"rank {n}:\n{found[case][0]}" for n, found in enumerate(results[: case[0]]) if found[case][0])
