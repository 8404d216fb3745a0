"""tools.gpu_check as far as it goes without a GPU: a dry run on the CPU, and its readers of other programs' output."""

import dataclasses
import json
import textwrap
import time

import pytest
import torch

from benchmarks import implementations, roofline
from tools.gpu_check import build, counters, report, sanitizers, truth
from tools.gpu_check.__main__ import main
from tools.gpu_check.run import ROOT, Runner, Section, command
from xbn_ext import ops
from xbn_ext.options import WAYS


def test_every_way_of_the_loss_is_checked_and_measured():
    """Here and in the benchmark; they list them in orders of their own."""
    assert set(report.FIRST) == {*implementations.WAYS, "auto"} == {way.split()[0] for way in truth.WAYS} | {"auto"}
    assert set(report.FIRST) == set(WAYS)


@pytest.mark.long
def test_dry_run(tmp_path, monkeypatch, capsys):
    """The whole script, with a CPU in place of the GPU."""
    monkeypatch.setitem(roofline.BUFFER_BYTES, "cpu", 1 << 20)
    assert main(["--device", "cpu", "--out", str(tmp_path), "--revision", "abc"]) == 0
    (file,) = tmp_path.iterdir()
    data = json.loads(file.read_text())
    assert file.name == f"cpu-{data['date']}.json" and data["revision"] == "abc"
    assert data["machine"]["torch"] == torch.__version__
    sections = {section["name"]: section for section in data["sections"]}
    assert sections.keys() == {"machine", "truth", "timing", "counters", "baselines"}
    assert {row["name"] for row in sections["machine"]["rows"][1:]} == {"read", "copy", "float32"}
    for name, section in sections.items():
        assert section["status"] == ("skipped" if name == "counters" else "ok"), section["note"]
        for row in section["rows"] if name in ("timing", "baselines") else ():
            if row["kernel"] == "launches":
                assert row["kernels"] == []
            else:
                assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["gbs"] >= 0 and row["roofline"] >= 0
    table = capsys.readouterr().out
    for words in ("memory_loss and its gradient", "whole step", "passes over the bank", "nothing was found"):
        assert words in table
    assert len(table) < 16_000


def test_a_further_run_of_the_day_gets_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(roofline.BUFFER_BYTES, "cpu", 1 << 20)
    for _ in range(2):
        assert main(["--device", "cpu", "--out", str(tmp_path), "--stages", ""]) == 0
    first, second = sorted(tmp_path.iterdir(), key=lambda file: len(file.name))
    assert second.stem == f"{first.stem}-2"


def test_no_time_left():
    section = Runner("cpu", 1, lambda section: None).work("timing", ".timing:worker", groups=["loss"])
    assert section.status == "skipped" and section.rows == []


@pytest.mark.long
def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--out", str(tmp_path)]) == 2 and not list(tmp_path.iterdir())
    assert "no GPU can be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--stages truth,timings", "--stages: no stage is called timings; there are truth, timing"),
        ("--ways simt,bogus", "--ways: no way is called bogus; there are auto, simt, tensor"),
        ("--seconds nan", "--seconds nan: must be more than 0, and finite"),
        ("--seconds inf", "--seconds inf: must be more than 0, and finite"),
        ("--seconds -5", "--seconds -5: must be more than 0"),
        ("--out pyproject.toml/x", "pyproject.toml exists and is not a folder"),
    ],
)
def test_arguments_are_checked_before_anything_is_done(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(["--device", "cpu", *arguments.split()])
    assert message in capsys.readouterr().err


def moved_bank(bank, loss, options):
    return bank * 1.01 + 0.01, loss, options


def without_a_pair_rule(name):
    return lambda bank, loss, options: (bank, loss, options | {name: None})


def one_row_less(bank, loss, options):
    count = options.get("count", torch.tensor(len(bank)))
    return bank, loss, options | {"count": (count - 1).clamp(min=0)}


def another_margin(bank, loss, options):
    return bank, dataclasses.replace(loss, neg_margin=loss.neg_margin + 0.01), options


def other_bits_each_time(bank, loss, options):
    return bank * (1 + 1e-6 * torch.rand(())), loss, options


@pytest.mark.parametrize(
    "mistake",
    [moved_bank, one_row_less, another_margin, other_bits_each_time,
     without_a_pair_rule("exclude"), without_a_pair_rule("anchors")],
)  # fmt: skip
def test_truth_finds_mistakes(mistake, monkeypatch):
    def memory_loss(z, labels, bank, bank_labels, loss, right=ops.memory_loss, **options):
        bank, loss, options = mistake(bank, loss, options)
        return right(z, labels, bank, bank_labels, loss, **options)

    monkeypatch.setattr(truth.ops, "memory_loss", memory_loss)
    cases = [case for case in truth.cases(small=True, n=60) if case["way"] != "composite tf32"]
    assert not all(truth.check(case, "cpu")["ok"] for case in cases)


@pytest.fixture
def in_children(tmp_path, monkeypatch):
    """Runs the worker of a module `fake` in children, as on a GPU."""

    def run(statement, cases=4):
        text = f"""
            import os

            def work(number):
                {statement}
                return {{"ok": True, "pid": os.getpid()}}

            def worker(job):
                job.each([{{"number": i}} for i in range({cases})], work)
        """
        (tmp_path / "fake.py").write_text(textwrap.dedent(text))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Runner("cuda", 60, lambda section: None).work("fake", "fake:worker", correctness=True)

    return run


@pytest.mark.long
def test_a_crash_costs_one_case(in_children):
    section = in_children("if number == 1: os._exit(9)")
    assert [row["ok"] for row in section.rows] == [True, False, True, True] and section.is_wrong
    assert section.rows[0]["pid"] != section.rows[2]["pid"] == section.rows[3]["pid"]


@pytest.mark.long
def test_after_a_cuda_error_comes_a_fresh_process(in_children):
    section = in_children("if number == 0: raise RuntimeError('CUDA error: an illegal memory access')", cases=2)
    assert [row["ok"] for row in section.rows] == [False, True] and "illegal" in section.rows[0]["error"]


@pytest.mark.long
def test_a_worker_can_ask_for_a_fresh_process(in_children):
    section = in_children("if number == 0: return {'fresh_process': True, 'pid': os.getpid()}", cases=2)
    assert section.status == "ok" and section.rows[0]["pid"] != section.rows[1]["pid"]


@pytest.mark.long
def test_a_hang_is_ended_with_its_children():
    begin = time.time()
    with pytest.raises(Exception, match="timed out") as ended:
        command(["bash", "-c", "echo begun; sleep 60 & wait"], 1)
    assert time.time() - begin < 10 and "begun" in ended.value.output


def test_registers():
    text = """
 Function _ZN3xbn4cuda39_GLOBAL__N__901347df_7_loss_cu_107712sweep_kernelILi512ENS_11ContrastiveIfEEEEvNS_16M:
  REG:248 STACK:0 SHARED:39552 LOCAL:0 CONSTANT[0]:545 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN3xbn4cuda43_GLOBAL__N__64701a5f_10_rewrite_kernelIdLb1EEEvNS_13MomentsParamsIT_EE:
  REG:64 STACK:8 SHARED:5121 LOCAL:0 CONSTANT[0]:1132 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    sweep, rewrite = build.read_registers(text)
    assert sweep["kernel"].startswith("sweep_kernel") and sweep["reg"] == 248 and sweep["ok"]
    assert rewrite["stack"] == 8 and not rewrite["ok"]


def test_closing_line():
    text = "FAILED tests/a.py::b - in 3 failed\n====== 2 failed, 1040 passed, 7 deselected in 12.3s ======"
    assert build.read_closing_line(text) == {"failed": 2, "passed": 1040, "deselected": 7}
    assert build.read_closing_line("Killed") == {}
    assert build.architecture("9.0") == "90a" and build.architecture("8.6") == "86"


@pytest.mark.parametrize(
    "text, code, status",
    [
        ("all cases ran\n========= ERROR SUMMARY: 0 errors", 0, "ok"),
        ("all cases ran\n========= ERROR SUMMARY: 3 errors", 86, "failed"),
        ("========= Error: Device not supported", 1, "skipped"),
        ("Segmentation fault", 139, "failed"),
    ],
)
def test_sanitizer_verdicts(text, code, status):
    assert sanitizers.verdict(text, code)[0] == status


def test_counters():
    names = ["Kernel Name", "gpu__time_duration.sum", "dram__bytes_read.sum", "launch__registers_per_thread",
             "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
             "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
             "smsp__average_warps_issue_stalled_barrier_not_issued_per_issue_active.ratio"]  # fmt: skip
    values = ["void xbn::cuda::sweep_kernel<512>(int)", "250,000", "122880000", "248", "0.5", "3.25", "9"]
    lines = [",".join(f'"{cell}"' for cell in line) for line in (names, [""] * len(names), values, values)]
    rows = [counters.summary(of) for of in counters.read_csv("==PROF== Connected\n" + "\n".join(lines))]
    assert rows == 2 * [{"kernel": "sweep_kernel", "us": 250, "dram read MB": 122.88, "registers": 248,
                         "stalls": "long_scoreboard:3.25 barrier:0.50"}]  # fmt: skip
    assert counters.read_csv("==ERROR== ERR_NVGPUCTRPERM") == []


def test_wrong_sections_decide():
    assert Section("a", correctness=True, status="timeout").is_wrong
    assert not Section("a", correctness=True, status="skipped").is_wrong
    assert not Section("a", status="failed").is_wrong
