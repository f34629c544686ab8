"""How the scripts beside this one measure: in turn, as medians of ratios, beside what the machine can do."""

import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch


def environment():
    """One line for the head of a table."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = platform.processor() or platform.machine()
        names = [line for line in _cpuinfo() if line.startswith("model name")]
        device = names[0].split(":")[1].strip() if names else device
        device += f", {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{time.strftime('%Y-%m-%d')}, {device}, {versions}"


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def row(*cells):
    """Print a row of a Markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(*cells, numbers=None):
    """Print the head of a table; `numbers` says which columns hold numbers, all but the first if None."""
    row(*cells)
    numeric = numbers if numbers is not None else range(1, len(cells))
    row(*("---:" if i in numeric else "---" for i in range(len(cells))))


def seconds(function):
    """Of one call, and what it returned."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def in_turn(contenders, rounds):
    """Median seconds of each contender, and median over the rounds of the first one's time over its own.

    All run once to warm up and then in turn within each round, so that a drifting machine drifts for all.
    """
    taken = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, function in contenders.items():
            spent, _ = seconds(function)
            if number:
                taken[name].append(spent)
    first = next(iter(taken.values()))
    return {
        name: (statistics.median(own), statistics.median(f / o for f, o in zip(first, own, strict=True)))
        for name, own in taken.items()
    }


class Rates:
    """What this machine does in a second: float operations of products, exponentials, bytes copied."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        square = torch.rand(2048, 2048, dtype=dtype, device=device)
        block = torch.rand(128, 4096, dtype=dtype, device=device)
        large = torch.rand(2**25, dtype=dtype, device=device)
        other = torch.empty_like(large)
        best = {
            "products": min(seconds(lambda: square @ square)[0] for _ in range(9)),
            "exponentials": min(seconds(lambda: torch.exp(block))[0] for _ in range(50)),
            "copies": min(seconds(lambda: other.copy_(large))[0] for _ in range(9)),
        }
        self.products = 2 * 2048**3 / best["products"]
        self.exponentials = block.numel() / best["exponentials"]
        self.copies = 2 * large.numel() * large.element_size() / best["copies"]

    def __str__(self):
        return (
            f"this machine in the same run: matrix products {self.products / 1e9:.0f} GFLOP/s, exponentials "
            f"{self.exponentials / 1e9:.1f} G/s, copies {self.copies / 1e9:.0f} GB/s"
        )


def peak():
    """The most memory since `forget_peak`, in bytes: of tensors on a GPU, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def forget_peak():
    """Count the peak anew, where the system can, and return where it stands."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return peak()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return peak()


def in_process(script, *arguments):
    """The number that a script of this folder prints last when it runs alone: how memory is measured."""
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])
