"""Run the module's tests and all chapters under other kernels, to emulate several machines.

    python -m tools.portable            # all environments
    python -m tools.portable threads    # those with this in their name

What passes under all of them does not depend on a kernel's rounding, and should pass on another processor.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tools.execute import ENVIRONMENT
from tools.test_all import ROOT, counted, parts

# MKL's three code paths for matrix products (on a processor that is not Intel's, the last two are one); torch's own
# loops and random numbers without vector instructions; sums in two halves.
KERNELS = {
    "MKL_CBWR=COMPATIBLE": {"MKL_CBWR": "COMPATIBLE"},
    "MKL_CBWR=AVX2": {"MKL_CBWR": "AVX2"},
    "MKL_CBWR=AVX512": {"MKL_CBWR": "AVX512"},
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default"},
    "two threads": {
        "APD_THREADS": "2",
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # two processes share the cores: waiting threads should not spin
    },
}
# Every kind of kernel that the book uses; the sum is long enough for two threads.
PROBE = """
import hashlib, torch
g = torch.Generator().manual_seed(0)
a, b, long = (torch.randn(n, m, generator=g) for n, m in ((64, 100), (100, 40), (1000, 1000)))
found = (a @ b, a @ b[:, 0], torch.stack([a, a]) @ torch.stack([b, b]), torch.linalg.svdvals(a), a.exp(), long.sum(),
         a.double() @ b.double())
print(hashlib.sha1(b"".join(t.numpy().tobytes() for t in found)).hexdigest()[:8])
"""


def environment(name: str) -> dict[str, str]:
    """Build the variables of one environment, on top of this process's own.

    Args:
        name: one of `KERNELS`.

    Returns:
        dict[str, str]: environment variables for a process.
    """
    return {**os.environ, **ENVIRONMENT, **KERNELS[name]}


def fingerprint(name: str) -> str:
    """Hash the results of an environment's kernels on this machine: equal hashes mean the same kernels.

    Args:
        name: one of `KERNELS`.

    Returns:
        str: eight hexadecimal digits.
    """
    return subprocess.check_output([sys.executable, "-c", PROBE], env=environment(name), text=True).strip()


def main() -> int:
    """Run what the command line names, all of it even if something fails; print one line for each environment.

    Returns:
        int: 0 if nothing failed.
    """
    lines, seen, any_failed = [], dict[str, str](), False
    for name in (name for name in KERNELS if all(word in name for word in sys.argv[1:])):
        kernels = fingerprint(name)
        line = f"{name:28} kernels {kernels}  "
        if kernels in seen:
            lines.append(line + f"the same on this machine as {seen[kernels]}: not run again")
            continue
        seen[kernels] = name
        start = time.perf_counter()
        for part in ("module", "chapters"):
            print(f"--- {name}: {part}", flush=True)
            run = subprocess.run(
                parts()[part], cwd=ROOT, env=environment(name), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            passed, failed, skipped = counted(run.stdout, run.returncode == 0)
            line += f"{part}: {passed} passed, {failed} failed, {skipped} skipped; "
            if failed:
                any_failed = True
                print(run.stdout, flush=True)
        lines.append(line + f"{time.perf_counter() - start:.0f} s")
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))
    return int(any_failed)


if __name__ == "__main__":
    sys.exit(main())
