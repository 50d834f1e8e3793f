"""configs/ and scripts/: every recipe loads and says what it does; every launcher starts what it says, on two nodes too."""
import csv
import dataclasses
import fnmatch
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import config
import train
import twist
from bench.memory import SIZES, spread_over
from checkpoints import download, pretrained
from model import TransformerConfig
from training import memory

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
README = (ROOT / "configs" / "README.md").read_text()
COLUMNS = ["config", "units", "how they come about", "launcher", "hardware of the paper", "today", "memory, planned",
           "hours, goal"]
COLD = [path for path in CONFIGS if path.stem.endswith("-cold")]
UNITS = r"([\d,]+) rows x ([\d,]+) ids = ([\d,]+) per step; x ([\d,]+) steps = ([\d,]+) in all"
LAUNCHERS = ("one_gpu.sh", "one_node.sh", "many_nodes_static.sh", "many_nodes_c10d.sh", "slurm.sbatch")
NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "RDZV_ENDPOINT": "127.0.0.1:29500",
         "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_NUM_NODES": "2"}
OURS = {"OPT-125M": "facebook/opt-125m", "OPT-350M": "facebook/opt-350m", "OPT-1.3B": "facebook/opt-1.3b",
        "LLaMA-7B": "huggyllama/llama-7b", "LLaMA-13B": "huggyllama/llama-13b"}
MEDIUM = dict(vocab_size=502, n_layer=24, n_head=16, n_kv_head=16, n_embd=1024, head_dim=64, n_inner=4096)
SHAPES = {OURS[name]: shape for name, shape in SIZES.items()} | {
    "bigscience/bloom-560m": TransformerConfig(**MEDIUM, position="alibi", embed_norm=True, mlp="gelu_tanh", family="bloom"),
    "EleutherAI/pythia-410m": TransformerConfig(**MEDIUM, position="rope", rope_fraction=0.25, parallel_residual=True, mlp="gelu",
                                                tie_embeddings=False, family="gpt_neox"),
    "Qwen/Qwen2.5-0.5B": TransformerConfig(vocab_size=502, n_layer=24, n_head=14, n_kv_head=2, n_embd=896, head_dim=64,
                                           n_inner=4864, norm="rmsnorm", position="rope", mlp="swiglu", out_bias=False,
                                           mlp_bias=False, family="qwen2")}
PARAMETERS = {"facebook/opt-125m": 87_015_936, "facebook/opt-350m": 305_714_176, "EleutherAI/pythia-410m": 303_339_520,
              "Qwen/Qwen2.5-0.5B": 358_347_904}  # with 502 units: Slam (2502.15814), table 7
PUBLISHED = {  # parameters of the text LMs, as transformers counts the released files
    "facebook/opt-125m": 125_239_296, "facebook/opt-350m": 331_196_416, "facebook/opt-1.3b": 1_315_758_080,
    "bigscience/bloom-560m": 559_214_592, "EleutherAI/pythia-410m": 405_334_016, "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320, "Qwen/Qwen2.5-0.5B": 494_032_768, "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120}
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
each_launcher = pytest.mark.parametrize("name", LAUNCHERS)


def load(path):
    return dataclasses.asdict(config.load(train.TrainConfig, [str(path)]))


def heading(path):
    """Lines of the opening comment."""
    return list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))


def entry(path):
    """{column: text} of configs/README.md: from each of its tables the one row whose patterns fit the config."""
    found = {}
    for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        columns, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        fitting = [row for row in rows if any(fnmatch.fnmatch(path.stem, name) for name in re.findall("`(.*?)`", row[0]))]
        assert len(fitting) == 1, f"{path.stem} has {len(fitting)} rows in the table of {', '.join(columns)}"
        found |= dict(zip(columns, fitting[0], strict=True))
    return found


# ---------------------------------------------------------------------------------------------- configs

def test_the_recipes_of_the_paper_are_there():
    names = {path.stem for path in CONFIGS}
    assert {"pocket", "opt-125m", "opt-350m", "opt-1.3b", "llama-7b", "llama-13b", "bloom-560m", "pythia-410m", "slam",
            "slam-scaled"} <= names
    assert {"opt-125m-50hz-k200", "opt-125m-50hz-k200-cold"} <= names
    assert {f"opt-350m-{tokenizer}" for tokenizer in ("50hz-k100", "50hz-k200", "50hz-k500", "25hz-k500")} <= names
    assert {f"{name}-cold" for name in ("opt-125m", "opt-350m", "opt-1.3b", "bloom-560m", "pythia-410m")} <= names


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty folder to start in; no cache and no network."""
    for variable in download.CACHES:
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@each_config
def test_a_config_loads_and_gives_only_what_differs_from_the_defaults(path):
    options = load(path)
    defaults = dataclasses.asdict(train.TrainConfig())
    given = set(re.findall(r"^(\w+) =", path.read_text(), re.MULTILINE))
    if path.stem != "pocket":  # which is a template
        assert [name for name in sorted(given) if options[name] == defaults[name]] == []
    assert options["out"] == f"runs/{path.stem}"


@each_config
def test_the_heading_of_a_config_says_what_to_expect_and_where_the_rest_stands(path):
    lines, options = heading(path), load(path)
    assert 2 <= len(lines) <= 5 and lines[0].endswith("See configs/README.md.")
    assert any(line.startswith("# expect: ") for line in lines)
    data = [text for text in (*lines, *README.split()) if f"--out={options['data'][0]}" in text]
    assert data or path.stem == "pocket"


@each_config
def test_the_readme_of_the_configs_says_how_each_starts_and_does_its_sums_right(path):
    parts, options = entry(path), load(path)
    assert list(parts) == COLUMNS and all(parts[name] for name in COLUMNS if path.stem != "pocket")
    assert re.match("`(.+?)`", parts["launcher"]).group(1) in LAUNCHERS
    assert "`scripts/LAUNCHER configs/NAME.toml`" in README and "neither was measured" in README
    rows, ids, step, steps, total = (int(text.replace(",", "")) for text in re.match(UNITS, parts["units"]).groups())
    assert (ids, step, steps) == (options["block_size"], options["tokens_per_step"], options["steps"])
    assert rows * ids == step and step * steps == total


@each_config
def test_the_step_of_a_config_can_be_divided_over_eight_processes(path):
    options = load(path)
    rows = options["tokens_per_step"] // options["block_size"]
    for processes in (1, 2, 4, 8):
        assert rows % processes == 0
        assert not options["micro_batch"] or rows // processes % options["micro_batch"] == 0


def test_the_shapes_that_memory_is_planned_for_are_the_published_ones():
    for name, parameters in PARAMETERS.items():
        unused = 2 * SHAPES[name].n_embd if "opt" in name else 0  # rows of OPT's position table, which we do not keep
        assert memory.count([twist.empty(SHAPES[name])]) == parameters - unused


def test_every_text_lm_of_a_config_has_a_shipped_shape_with_the_published_number_of_parameters(offline):
    assert {path.stem.replace("--", "/") for path in pretrained.SHIPPED.iterdir()} == set(PUBLISHED)
    assert {load(path)["lm"] for path in CONFIGS} - {"pocket"} <= set(PUBLISHED)
    for name, parameters in PUBLISHED.items():
        shape = twist.load_lm_config(name)
        assert twist.stored_parameters(shape) == parameters, name
        if name in SHAPES:  # for which memory is planned; what changes no memory is left out
            left = {each: getattr(shape, each) for each in ("block_size", "init_std", "rope_theta", "norm_eps")}
            assert dataclasses.replace(SHAPES[name], **left) == dataclasses.replace(shape, vocab_size=502), name


def test_a_model_that_is_here_is_preferred_to_the_shape_that_is_shipped(offline, capsys):
    name = "facebook/opt-125m"
    assert pretrained.shipped(name).name == "facebook--opt-125m.json" and pretrained.shipped("facebook/opt-66b") is None
    folder, _ = download.places(name)
    vocab = twist.UnitVocab(30)
    twist.save_speech_lm(twist.cold_start(twist.load_lm_config("pocket"), vocab), vocab, folder)
    assert pretrained.shipped(name) is None and twist.load_lm_config(name).n_embd == twist.load_lm_config("pocket").n_embd
    (folder / "model.safetensors").unlink()
    assert twist.load_lm_config(name).n_embd == 768


def test_a_cold_start_needs_the_shape_alone_and_a_warm_one_the_weights(offline):
    shape, vocab, _ = twist.open_start("cold", "facebook/opt-125m", {"num_units": 500})
    assert (shape.n_embd, shape.vocab_size, vocab.size) == (768, 502, 502)
    for init in ("twist", "shuffled"):
        assert twist.open_start(init, "facebook/opt-125m", {"num_units": 500}, weights=False)[0] == shape
        with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE forbids the network"):
            twist.open_start(init, "facebook/opt-125m", {"num_units": 500})


@each_config
def test_a_dry_run_of_a_config_needs_no_network_no_weights_and_no_data(path, offline, monkeypatch, capsys):
    plans = []
    monkeypatch.setattr(train.memory, "plan_of", lambda learner, options, micro: plans.append((learner, micro)) or "planned")
    train.main([str(path), "--dry-run", "--device=cpu"])
    (learner, micro), = plans
    said, options = capsys.readouterr().out, load(path)
    assert said.endswith("planned\n") and ("none of it is here" in said) == (path.stem != "pocket")
    rows = options["tokens_per_step"] // options["block_size"]
    assert learner.config.n_embd == (SHAPES.get(options["lm"]) or twist.load_lm_config("pocket")).n_embd
    assert micro == (options["micro_batch"] or rows) and not list(offline.iterdir())


def test_a_dry_run_with_some_of_the_data_missing_is_refused(offline):
    with pytest.raises(FileNotFoundError, match="^--val-data=units/val: no such folder"):
        train.main([str(ROOT / "configs/opt-125m.toml"), "--data=pocket", "--dry-run"])


@pytest.mark.slow
def test_the_plan_without_data_is_that_of_the_readme(offline, capsys):
    train.main([str(ROOT / "configs/opt-125m.toml"), "--dry-run", "--dtype=bfloat16", "--device=cpu"])
    total = re.search(r"none .* ([\d.]+)  <- --recompute", capsys.readouterr().out)[1]
    assert f"{float(total):.1f} GB on 1 GPU;" in entry(ROOT / "configs/opt-125m.toml")["memory, planned"]


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "bloom-560m", "slam", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("opt-1.3b", "llama-7b", "llama-13b", "pythia-410m", "slam-scaled"))])
def test_the_memory_in_the_readme_of_the_configs_is_what_memory_py_plans(name):
    path = ROOT / "configs" / f"{name}.toml"
    figures = re.findall(r"([\d.]+) GB on (\d+)(?: GPUs?)?(?: with ((?:--[\w=-]+ ?)+))?", entry(path)["memory, planned"])
    assert figures
    for gigabytes, processes, changes in figures:
        options = config.load(train.TrainConfig, [str(path), *changes.split()])
        shape = SHAPES[options.lm]
        parallel, shard = spread_over(int(processes), memory.count([twist.empty(shape)]))
        rows = options.tokens_per_step // options.block_size // int(processes)
        micro = options.micro_batch or rows
        plan = memory.plan(shape, parallel=parallel, shard=shard, micro_rows=micro, pieces=rows // micro, dtype=torch.bfloat16,
                           block_size=options.block_size, optimizer=options.optimizer, recompute=options.recompute,
                           reshard=options.reshard)
        assert abs(plan.total / 1e9 - float(gigabytes)) < 0.06, f"{name} on {processes}: {plan.total / 1e9:.1f} GB are planned"


@pytest.mark.parametrize("path", COLD, ids=lambda path: path.stem)
def test_a_cold_twin_differs_in_its_start_and_learning_rate_alone(path):
    cold, warm = load(path), load(path.with_name(path.name.replace("-cold", "")))
    assert {name for name in cold if cold[name] != warm[name]} == {"init", "out", "peak_lr"}  # the paper tuned each arm's rate
    assert (cold["init"], warm["init"]) == ("cold", "twist")
    assert entry(path) == entry(path.with_name(path.name.replace("-cold", "")))


def test_the_variants_of_the_tokenizer_differ_in_their_data_alone():
    for path in (ROOT / "configs").glob("opt-*m-*hz-k[125]00.toml"):
        plain = path.with_stem(path.stem.partition("m-")[0] + "m")
        base, other = load(plain), load(path)
        assert {name for name in base if base[name] != other[name]} <= {"data", "val_data", "out", "tokenizer", "vocoder"}
        assert entry(path) == entry(plain)


# ---------------------------------------------------------------------------------------------- launchers

def environment(**more):
    """The caller's, with this Python's torchrun first, no network and one thread; nothing of a process group around us."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if key not in ("DRY_RUN", "NPROC", "RANK", "WORLD_SIZE", *NODES)}
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def start(name, *arguments, **more):
    return subprocess.Popen([ROOT / "scripts" / name, *arguments], cwd=ROOT, env=environment(**more), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def end(*processes, seconds=120):
    """Outputs and exit codes; whatever is still there after `seconds` is killed with all of its children."""
    try:
        return [(process.communicate(timeout=seconds)[0], process.returncode) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def slurm(tmp_path):
    """A folder with an srun that runs its command here, and an scontrol that notes what it is asked."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "srun").write_text('#!/usr/bin/env bash\nshift  # --kill-on-bad-exit=1\nexec "$@"\n')
    (folder / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$@" >> {folder}/asked\n[[ $1 != show ]] || echo 127.0.0.1\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


@each_launcher
def test_a_launcher_is_valid_bash_and_explains_itself(name):
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / name], timeout=60).returncode == 0
    for flag in ("-h", "--help"):
        (text, code), = end(start(name, flag))
        assert code == 0 and f"scripts/{name} CONFIG [--key=value ...]" in text and "DRY_RUN=1" in text and "NPROC=" in text
        assert "SBATCH" not in text and "set -e" not in text


@each_launcher
def test_a_launcher_without_an_options_file_says_so_in_one_line(name):
    for arguments in ([], ["configs/opt-125.toml"]):
        (text, code), = end(start(name, *arguments))
        assert code == 2 and len(text.splitlines()) == 1 and "options file" in text and text.startswith(f"{name}: error:")


@pytest.mark.parametrize("name, variable", [("many_nodes_static.sh", "NODE_RANK"), ("many_nodes_c10d.sh", "RDZV_ENDPOINT"),
                                            ("slurm.sbatch", "SLURM_JOB_ID")])
def test_a_launcher_names_the_variable_that_it_lacks(name, variable):
    variables = {key: value for key, value in NODES.items() if key != variable}
    (text, code), = end(start(name, "configs/pocket.toml", DRY_RUN="1", **variables))
    assert code == 2 and text == f"{name}: error: {variable} is not set; see {name} --help\n"


@pytest.mark.parametrize("name, more, options", [
    ("one_gpu.sh", {}, "--standalone --nproc-per-node=1"),
    ("one_gpu.sh", {"NPROC": "2"}, "--standalone --nproc-per-node=2"),
    ("one_node.sh", {}, "--standalone --nproc-per-node=gpu"),
    ("one_node.sh", {"NPROC": "4"}, "--standalone --nproc-per-node=4"),
    ("many_nodes_static.sh", {}, "--nnodes=2 --node-rank=1 --master-addr=127.0.0.1 --master-port=29500 --nproc-per-node=gpu"),
    ("many_nodes_static.sh", {"MASTER_PORT": "4", "NPROC": "1"},
     "--nnodes=2 --node-rank=1 --master-addr=127.0.0.1 --master-port=4 --nproc-per-node=1"),
    ("many_nodes_c10d.sh", {}, "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:29500 --rdzv-id=nanotwist "
     "--max-restarts=3 --nproc-per-node=gpu"),
    ("many_nodes_c10d.sh", {"NNODES": "2:4", "RDZV_ID": "x", "MAX_RESTARTS": "0", "NPROC": "2", "LOCAL_ADDR": "::1"},
     "--nnodes=2:4 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:29500 --rdzv-id=x --local-addr=::1 --max-restarts=0 "
     "--nproc-per-node=2"),
])
def test_a_dry_run_prints_the_command_and_starts_nothing(name, more, options):
    (text, code), = end(start(name, "configs/pocket.toml", "--steps=3", "--out=a folder", **{**NODES, "DRY_RUN": "1", **more}))
    words = shlex.split(text)
    assert code == 0 and len(text.splitlines()) == 1
    assert words[:-5] == ["torchrun", *options.split()] and Path(words[-5]).samefile(ROOT / "train.py")
    assert words[-4:] == ["configs/pocket.toml", "--auto-resume", "--steps=3", "--out=a folder"]


def test_a_dry_run_under_slurm_prints_what_srun_would_start(slurm):
    path = f"{slurm}{os.pathsep}{environment()['PATH']}"
    (text, code), = end(start("slurm.sbatch", "configs/pocket.toml", "--steps=3", PATH=path, DRY_RUN="1", **NODES))
    assert code == 0 and len(text.splitlines()) == 1
    assert shlex.split(text) == ["env", "NNODES=2", "RDZV_ENDPOINT=127.0.0.1:29500", "RDZV_ID=7", "srun", "--kill-on-bad-exit=1",
                                 "bash", "-c", 'on_node "$@"', "on_node", "./scripts/many_nodes_c10d.sh", "configs/pocket.toml",
                                 "--steps=3"]


# ---------------------------------------------------------------------------------------------- two nodes on this machine

SHORT = ["configs/pocket.toml", "--steps=2", "--tokens-per-step=512", "--block-size=128", "--eval-rows=2", "--warmup=1",
         "--threads=1", "--dtype=float32", "--device=cpu"]


def losses(folder):
    with open(folder / "log.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    (text, code), = end(start("one_gpu.sh", *SHORT, f"--out={folder}/run"))
    assert code == 0, text
    return losses(folder / "run")


@pytest.mark.parametrize("name", ["many_nodes_static.sh", "many_nodes_c10d.sh"])
@pytest.mark.slow
def test_two_nodes_give_the_losses_of_one_process(name, alone, tmp_path):
    port = str(free_port())
    variables = dict(NNODES="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RDZV_ENDPOINT=f"127.0.0.1:{port}", NPROC="1",
                     LOCAL_ADDR="127.0.0.1")
    nodes = [start(name, *SHORT, f"--out={tmp_path}/run", NODE_RANK=str(rank), **variables) for rank in range(2)]
    outputs = end(*nodes)
    assert [code for _, code in outputs] == [0, 0], "\n".join(text for text, _ in outputs)
    assert sorted("2 processes x" in text for text, _ in outputs) == [False, True]  # rank 0 alone prints
    assert len(alone) == 2
    for a, b in zip(losses(tmp_path / "run"), alone, strict=True):
        assert abs(a - b) < 1e-5


@pytest.mark.slow
def test_a_job_that_slurm_warns_saves_goes_back_to_the_queue_and_goes_on(slurm, tmp_path):
    run, path = tmp_path / "run", f"{slurm}{os.pathsep}{environment()['PATH']}"
    variables = {**NODES, "SLURM_JOB_NUM_NODES": "1", "PORT": str(free_port()), "NPROC": "1", "LOCAL_ADDR": "127.0.0.1",
                 "PATH": path}
    arguments = [*SHORT, f"--out={run}", "--steps=100000", "--save-interval=100000", "--eval-interval=100000"]
    job = start("slurm.sbatch", *arguments, **variables)
    begin = time.monotonic()
    while not (run / "log.csv").exists() or not losses(run):
        assert job.poll() is None and time.monotonic() - begin < 120, end(job, seconds=0)
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGUSR1)  # as Slurm does five minutes before the time limit: to the batch script alone
    (text, code), = end(job)
    assert code == 0, text
    assert (slurm / "asked").read_text().splitlines()[-1] == "requeue 7"
    done = len(losses(run))
    assert 0 < done < 100000 and list(run.glob("step_*"))

    (text, code), = end(start("slurm.sbatch", *arguments, f"--steps={done + 1}", **variables, SLURM_RESTART_COUNT="1"))
    assert code == 0 and len(losses(run)) == done + 1, text
    assert (slurm / "asked").read_text().splitlines()[-1].startswith("show")  # it ended: no requeue


def test_a_job_that_fails_passes_its_exit_code_on_and_is_not_queued_again(slurm, tmp_path):
    path = f"{slurm}{os.pathsep}{environment()['PATH']}"
    (slurm / "torchrun").write_text("#!/usr/bin/env bash\nexit 3\n")
    (slurm / "torchrun").chmod(0o755)
    (text, code), = end(start("slurm.sbatch", "configs/pocket.toml", PATH=path, **NODES))
    assert code == 3 and "requeue" not in (slurm / "asked").read_text()
