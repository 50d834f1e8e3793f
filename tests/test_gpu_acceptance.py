"""scripts/gpu_acceptance.sh and gpu_check.py, rehearsed on a CPU: stages fail one by one, results are there at once."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def check(*arguments):
    command = [sys.executable, "scripts/gpu_check.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def acceptance(out, *arguments):
    command = ["scripts/gpu_acceptance.sh", "--device=cpu", f"--out={out}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | {"JOBS": "2"})
    return done, {path.name.removesuffix(".stage.json"): json.loads(path.read_text()) for path in out.glob("*.stage.json")}


@pytest.mark.slow
def test_every_stage_is_good_on_a_cpu(tmp_path):
    done, stages = acceptance(tmp_path)
    assert done.returncode == 0, done.stdout + "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert {"environment", "group", "train", "voice", "recompute-full", "recompute-some", "split", "async-save", "speaking",
            "fsdp-alone", "float32", "bench-attention", "bench-head", "bench-train", "kernels-aa", "kernels-ab"} == set(stages)
    assert f"{len(stages)} of {len(stages)} stages are good" in done.stdout
    found = json.loads((tmp_path / "group.json").read_text())["rows"]
    assert [row["what"] for row in found][-2:] == ["a state comes back", "and goes on with losses"]
    assert "passed" not in stages["kernels-aa"]["said"] and "[100%]" in (tmp_path / "kernels-aa.log").read_text()


def copy_with(stages, folder):
    """A copy of the script with other stages."""
    for name in ("gpu_acceptance.sh", "gpu_check.py"):
        shutil.copy(ROOT / "scripts" / name, folder)
    text = (folder / "gpu_acceptance.sh").read_text()
    begin, end = text.index("stage environment"), text.index("[[ -n $ran ]]")
    script = text[:begin] + stages + text[end:]
    (folder / "gpu_acceptance.sh").write_text(script.replace('cd "$(dirname "$0")/.."', f'cd "{ROOT}"'))
    return folder / "gpu_acceptance.sh"


def results(out):
    found = [json.loads(path.read_text()) for path in out.glob("*.stage.json")]
    return {row["stage"]: (row["result"], row["said"]) for row in found}


@pytest.mark.slow
def test_a_stage_that_fails_or_takes_too_long_stops_no_other(tmp_path):
    script = copy_with('stage broken 60 "echo before; false; echo after"\nbeside slow 1 "echo going; sleep 60"\n'
                       'beside quick 60 "echo done"\nwait\n', tmp_path)
    done = subprocess.run([script, "--device=cpu", f"--out={tmp_path}/out"], capture_output=True, text=True, timeout=120)
    assert results(tmp_path / "out") == {
        "broken": ("failed", "before"), "slow": ("too slow", "going"), "quick": ("good", "done")}
    assert done.returncode == 1 and "1 of 3 stages are good; not: " in done.stdout


@pytest.mark.slow
def test_some_stages_alone_bring_what_they_need_and_leave_the_other_results(tmp_path):
    script = copy_with('stage group 60 "echo new"\nbeside train 60 "mkdir -p $work/whole"\nwait\n'
                       'beside split 60 "test -d $work/whole; echo compared"\nwait\n', tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/group.stage.json").write_text(json.dumps(
        {"stage": "group", "result": "good", "said": "old", "seconds": 1.0, "limit": 2}))
    command = [script, "--device=cpu", "--out=out"]  # in the folder from which it is called
    done = subprocess.run([*command, "--only=split"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert results(tmp_path / "out") == {"group": ("good", "old"), "train": ("good", ""), "split": ("good", "compared")}
    assert done.returncode == 0 and "3 of 3 stages are good" in done.stdout
    wrong = subprocess.run([*command, "--only=nothing"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "--only=nothing: no stage" in wrong.stderr and len(results(tmp_path / "out")) == 3


@pytest.mark.slow
def test_an_interrupted_call_leaves_nothing_running_and_keeps_what_has_ended(tmp_path):
    script = copy_with('stage quick 60 "echo done"\nbeside long 60 "echo going; touch $work/a; sleep 51"\n'
                       'stage alone 60 "touch $work/b; sleep 52"\n', tmp_path)
    process = subprocess.Popen([script, "--device=cpu", f"--out={tmp_path}/out"], stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)
    while not all((tmp_path / "out/work" / name).exists() for name in "ab"):
        assert process.poll() is None
        time.sleep(0.1)
    pids = [int(path.read_text()) for path in (tmp_path / "out/work").glob("*.pid")]
    process.terminate()
    assert "stopped" in process.communicate(timeout=20)[1] and process.returncode == 130
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert {"quick": ("good", "done"), "long": ("stopped", "going")}.items() <= results(tmp_path / "out").items()


@pytest.mark.parametrize("environment, arguments, words", [
    ({"JOBS": "0"}, ["--device=cpu"], "JOBS=0: expected"), ({"JOBS": "all"}, [], "JOBS=all: expected"),
    ({}, ["--out=a b"], "without spaces"), ({}, ["--only="], "--only=: expected"),
    ({}, ["--device", "cpu"], "--device: expected"),
    ({"CUDA_VISIBLE_DEVICES": ""}, ["--device=cuda"], "PyTorch sees no GPU")])
def test_what_cannot_be_done_is_said_before_any_result_goes(environment, arguments, words, tmp_path):
    (tmp_path / "old.stage.json").write_text("{}")
    command = [ROOT / "scripts/gpu_acceptance.sh", f"--out={tmp_path}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old.stage.json"]


def test_the_script_explains_itself_and_refuses_what_it_does_not_know():
    script = ROOT / "scripts/gpu_acceptance.sh"
    assert subprocess.run(["bash", "-n", script], timeout=60).returncode == 0
    told = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and "--only=group,kernels" in told.stdout and "set -uo" not in told.stdout
    wrong = subprocess.run([script, "--device=tpu"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "--device=tpu: expected" in wrong.stderr


def log(folder, *losses):
    folder.mkdir()
    (folder / "log.csv").write_text("step,loss\n0,\n" + "".join(f"{step},{loss}\n" for step, loss in enumerate(losses, start=1)))
    return folder


def test_runs_and_units_are_compared_as_they_are(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check

    def well(*what, within=0.02):
        rows = gpu_check.Rows(tmp_path / "rows.json")
        gpu_check.CHECKS[what[0]](gpu_check.CheckConfig(what=tuple(map(str, what)), within=within), rows)
        assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == len(rows.rows)
        return all(row["good"] for row in rows.rows)

    a, b, short = log(tmp_path / "a", 3.0, 2.0), log(tmp_path / "b", 3.0, 2.01), log(tmp_path / "c", 3.0)
    assert well("losses", a, b) and not well("losses", a, b, within=0.001) and not well("losses", a, short)
    assert not well("losses", a, log(tmp_path / "nan", 3.0, "nan"))
    units = ROOT / "pocket/units/val"
    shutil.copytree(units, tmp_path / "units")
    assert well("units", units, tmp_path / "units")
    next((tmp_path / "units").glob("*.runs.bin")).write_bytes(b"other")
    assert not well("units", units, tmp_path / "units") and not well("units", tmp_path / "none", tmp_path / "none")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so_in_a_sentence(tmp_path):
    done = check("environment", f"--out={tmp_path}")
    assert done.returncode == 2 and "PyTorch sees no GPU" in done.stderr and not list(tmp_path.iterdir())


def test_a_table_of_nothing_is_no_good_result(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check
    with pytest.raises(ValueError, match="holds no results of stages"):
        gpu_check.main(["table", str(tmp_path)])
