"""What keeps a GPU busy: a thread makes the next batch, and the numbers of an update are read after the next is launched.

    thread     rows s + 1 --> pinned memory       rows s + 2 --> pinned memory
    host       launch s, read s - 1               launch s + 1, read s
    GPU      [ update s - 1      ][ update s                    ][ update s + 1

A host that reads a number waits for it, and the GPU then waits for what the host launches next.
"""
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch


def ahead(make, steps, device):
    """Yields make(step), a Batch, for each of steps: on a GPU made ahead, in pinned memory. Close it, and no thread is left."""
    if device.type != "cuda":
        return (make(step) for step in steps)  # a thread would take a core from those that compute

    def pinned(step):
        with torch.cuda.device(device):  # that of a new thread is GPU 0
            return make(step).pinned()
    return in_thread(pinned, steps)


def in_thread(make, steps):
    """Yields make(step) for each of steps; a thread makes the next one meanwhile. What make raises comes when its turn does."""
    steps = iter(steps)
    with ThreadPoolExecutor(1, "batches") as pool:
        made = [pool.submit(make, step) for step in islice(steps, 1)]
        while made:
            batch = made.pop().result()
            made += [pool.submit(make, step) for step in islice(steps, 1)]
            yield batch


def one_late(launched, due):
    """Yields each of `launched` when the next one is there, too, or at once if due(*it); they are tuples."""
    waiting = []
    for one in launched:
        waiting.append(one)
        while len(waiting) > (0 if due(*one) else 1):
            yield waiting.pop(0)
    yield from waiting


class Late:
    """Numbers of an update, on their way from the device. `at`: when it was done, by time.perf_counter(), once they are read."""

    def __init__(self, numbers):
        self.arrived = None
        if numbers.is_cuda:  # behind the update and before the next one: to ask the device later would be to wait for both
            numbers, self.arrived = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            self.arrived.record()
        self.numbers, self.at = numbers, time.perf_counter()

    def read(self):
        """The numbers as a list of floats; waits for the update."""
        if self.arrived is not None:
            self.arrived.synchronize()
            self.at = time.perf_counter()
        return self.numbers.tolist()
