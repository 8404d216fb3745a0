"""Small ragged cases under compute-sanitizer, our kernels only: initcheck would have to see all of torch's."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
from typing import TYPE_CHECKING

from .run import Runner, Section, command, tail

if TYPE_CHECKING:
    from xbn_ext.losses import Reduction
    from xbn_ext.options import Way

# (B, M, D, way, reduction): one of each size of kernel, ragged in all directions
CASES: list[tuple[int, int, int, Way, Reduction]] = [
    (65, 130, 33, "simt", "avg_nonzero"),
    (70, 300, 128, "tensor", "avg_nonzero"),
    (3, 70, 129, "composite", "avg_nonzero"),
    (33, 65, 1000, "tensor", "mean"),
    (70, 300, 128, "screen", "mean"),
    (64, 257, 512, "screen", "avg_nonzero"),
    (70, 300, 128, "halves", "mean"),
    (64, 257, 512, "halves", "avg_nonzero"),
    (70, 300, 128, "simt", "mean"),
    (64, 257, 512, "tensor", "avg_nonzero"),
    (64, 257, 512, "simt", "mean"),
    (1, 1, 1, "simt", "mean"),
    (5, 63, 200, "tensor", "mean"),
    (129, 1, 7, "composite", "mean"),
    (2, 1000, 65, "composite", "mean"),
    (66, 64, 1500, "composite", "mean"),
    (127, 129, 4, "simt", "avg_nonzero"),
    (1, 5000, 31, "simt", "mean"),
]
CASES_OF = {"memcheck": CASES, "racecheck": CASES[:10]}


def drive(tool: str) -> None:
    """What is checked: every op on the cases of this tool. Runs inside compute-sanitizer."""
    import torch
    import torch.nn.functional as F

    from xbn_ext import Contrastive, CrossBatchMemory, Triplet, loss_way, ops

    banks = itertools.cycle([torch.float32, torch.float16, torch.bfloat16])  # of what an op is called with
    for B, M, D, way, reduction in CASES_OF[tool]:
        generator = torch.Generator().manual_seed(B + M + D)
        x = F.normalize(torch.randn(B, D, generator=generator), dim=1).cuda()
        bank = torch.randn(M, D, generator=generator).to(next(banks)).cuda()
        labels, bank_labels = (torch.randint(5, (n,), generator=generator).cuda() for n in (B, M))
        loss = Contrastive(0.9, 0.0, reduction)
        with loss_way(way):
            z = x.clone().requires_grad_()
            ops.memory_loss(z, labels, bank, bank_labels, loss, exclude=torch.arange(B).cuda() % M).backward()
            for update in ("inplace", "deferred"):
                criterion = CrossBatchMemory(loss, D, M, update=update).cuda()
                for _ in range(3):
                    z = x.clone().requires_grad_()
                    criterion(z, labels).backward()
        ops.batch_loss(x.clone().requires_grad_(), labels, Triplet(mining="all")).backward()
        ops.moments(x)
    torch.cuda.synchronize()
    print("all cases ran", flush=True)


def sanitize(runner: Runner, tool: str, limit: float) -> Section:
    """A section: the driver under one of the tools."""

    def function(section: Section) -> None:
        program = shutil.which("compute-sanitizer")
        if program is None:
            section.status, section.note = "skipped", "compute-sanitizer is not on PATH"
            return
        ours = ["--kernel-name", "kernel_substring=xbn"]
        # torch's own calls of the CUDA API may fail as it looks around; memcheck would count that.
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        done = command(
            [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20", *quiet, *ours,
             sys.executable, "-m", "tools.gpu_check", "--sanitize", tool],
            min(limit, runner.left()), PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        section.status, section.note = verdict(done.stdout, done.returncode)
        section.rows.append({"tool": tool, "cases": len(CASES_OF[tool]), "ok": section.status == "ok"})

    return runner.section(tool, function, correctness=True)


def verdict(text: str, code: int) -> tuple[str, str]:
    """Status and note from what the tool printed."""
    summary = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY|SANITIZER SUMMARY): .*", text)
    ran = "all cases ran" in text
    if ran and code == 0:
        return "ok", summary[-1] if summary else "no summary printed"
    if not ran and re.search(r"Device not supported|not supported on this|Unable to find", text):
        return "skipped", tail(text, 300)
    return "failed", tail(text[text.find("=========") :][:3000], 3000)  # the first of what it found
