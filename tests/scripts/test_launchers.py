"""Launchers: what they print is what they run, exit code 75 runs again, and the tools that they drive take it."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import MagicMock

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
RUN = ("--config=configs/debug_cpu.py", "--workdir=gs://bucket/my run", "--set=seed=7")
TRAIN = "llava-jax train --config=configs/debug_cpu.py '--workdir=gs://bucket/my run' --set=seed=7"
GKE = ("--cluster=c", "--zone=us-west4-a", "--name=llava", "--tpu-type=v5litepod-64", "--image=gcr.io/p/llava")
SLURM = ("--nodes=2", "--gpus-per-node=8", "--time=24:00:00")
TPU_VM = ("--name=llava", "--zone=us-west4-a", "--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder at the front of PATH, for programs that cannot exist here."""
    folder = tmp_path / "tools"
    folder.mkdir()
    return folder


def program(tools: Path, name: str, body: str) -> None:
    """A program that notes its arguments in `name`.log and then does what `body` says."""
    path = tools / name
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "${{*@Q}}" >> {tools}/{name}.log\n{body}\n')
    path.chmod(0o755)


def calls(tools: Path, name: str) -> list[list[str]]:
    log = tools / f"{name}.log"
    return [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []


def environment(tools: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}


def launch(tools: Path, script: str | Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, env=environment(tools), cwd=cwd, capture_output=True, text=True, timeout=300)


def needs_tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed; install '.[launch]'")
    return path


def exit_codes(tools: Path, *codes: int) -> str:
    """A body that ends with the codes in turn, one a call."""
    return f'set -- {" ".join(map(str, codes))}\nshift $(($(wc -l < "$0.log") - 1))\nexit "$1"'


def test_the_host_launcher_prints_its_command(tools: Path):
    done = launch(tools, "launch_host.py", *RUN, "--dry-run")
    assert done.stdout == f"env XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 {TRAIN}\n"
    assert calls(tools, "llava-jax") == []


def test_the_host_launcher_runs_what_it_prints_and_again_after_75(tools: Path):
    program(tools, "llava-jax", 'echo "$XLA_PYTHON_CLIENT_MEM_FRACTION" >&2\n' + exit_codes(tools, 75, 75, 0))
    done = launch(tools, "launch_host.py", *RUN)
    assert done.returncode == 0
    assert calls(tools, "llava-jax") == [shlex.split(TRAIN)[1:]] * 3
    assert done.stderr.split() == ["0.95"] * 3


@pytest.mark.parametrize("code", [65, 70, 76])
def test_the_host_launcher_hands_on_what_is_not_a_preemption(tools: Path, code: int):
    program(tools, "llava-jax", f"exit {code}")
    assert launch(tools, "launch_host.py", *RUN).returncode == code
    assert len(calls(tools, "llava-jax")) == 1


def test_the_host_launcher_passes_sigterm_on_and_does_not_start_again(tools: Path):
    program(tools, "llava-jax", "trap 'exit 75' TERM\nfor _ in {1..200}; do sleep 0.1; done")
    process = subprocess.Popen([sys.executable, str(SCRIPTS / "launch_host.py"), *RUN], env=environment(tools))
    while not calls(tools, "llava-jax"):
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75
    assert len(calls(tools, "llava-jax")) == 1


def test_the_gke_launcher_prints_its_command(tools: Path):
    done = launch(tools, "launch_gke.py", *GKE, *RUN, "--dry-run", "--", "--spot")
    assert shlex.split(done.stdout) == [
        *("xpk", "workload", "create", "--cluster=c", "--zone=us-west4-a", "--workload=llava"),
        *("--tpu-type=v5litepod-64", "--docker-image=gcr.io/p/llava", f"--command={TRAIN}"),
        *("--restart-on-exit-codes=75", "--max-restarts=1000", "--termination-grace-period-seconds=300", "--spot"),
    ]


def test_the_gke_launcher_runs_what_it_prints(tools: Path):
    program(tools, "xpk", "exit 3")
    printed = launch(tools, "launch_gke.py", *GKE, *RUN, "--dry-run").stdout
    assert launch(tools, "launch_gke.py", *GKE, *RUN).returncode == 3
    assert calls(tools, "xpk") == [shlex.split(printed)[1:]]


def test_the_slurm_launcher_prints_a_job_that_bash_can_read(tools: Path):
    printed = launch(tools, "launch_slurm.py", *SLURM, *RUN, "--dry-run", "--", "--partition=gpu").stdout
    first, *job, last = printed.splitlines()
    assert (first, last) == ("sbatch --partition=gpu <<'JOB'", "JOB")
    directives = [line for line in job if line.startswith("#SBATCH")]
    # JAX takes the device of a process's own number, so there is one process for each.
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8", "#SBATCH --gpus-per-node=8"} <= set(directives)
    assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@300"} <= set(directives)
    assert f"srun --kill-on-bad-exit=0 --wait=300 {TRAIN}" in job
    subprocess.run(["bash", "-n"], input="\n".join(job), text=True, check=True)


def test_a_slurm_job_is_named_after_its_config_whatever_that_is_called(tools: Path):
    config = "--config=my runs/it's #1.py"
    job = launch(tools, "launch_slurm.py", *SLURM, *RUN, config, "--dry-run").stdout
    directives = [shlex.split(line.removeprefix("#SBATCH")) for line in job.splitlines() if line.startswith("#SBATCH")]
    assert ["--job-name=it's #1"] in directives
    assert ["--output=it's #1-%j.log"] in directives
    assert {len(words) for words in directives} == {1}


@pytest.mark.parametrize(("code", "requeued"), [(0, []), (75, [["requeue", "41"]]), (66, [])])
def test_a_slurm_job_requeues_itself_after_75_only(tools: Path, code: int, requeued: list):
    program(tools, "sbatch", f"cat > {tools}/job")
    program(tools, "srun", f"exit {code}")
    program(tools, "scontrol", "exit 0")
    assert launch(tools, "launch_slurm.py", *SLURM, *RUN, "--", "--account=me").returncode == 0
    assert calls(tools, "sbatch") == [["--account=me"]]
    # What Slurm does with the job that it was given.
    job = subprocess.run(["bash", str(tools / "job")], env={**environment(tools), "SLURM_JOB_ID": "41"})
    assert job.returncode == code
    assert calls(tools, "srun") == [["--kill-on-bad-exit=0", "--wait=300", *shlex.split(TRAIN)]]
    assert calls(tools, "scontrol") == requeued


def tpu_vm(tools: Path, *, states: str, codes: str) -> None:
    """A gcloud that describes the VM by `states` in turn, and whose trainings end with `codes`."""
    body = f"""
take() {{ word=$(head -n1 "$1"); sed -i 1d "$1"; }}
case "$4 $*" in
    describe*) take {tools}/states; echo "$word" ;;
    ssh*"llava-jax train"*) take {tools}/codes; exit "$word" ;;
esac"""
    program(tools, "gcloud", body)
    program(tools, "sleep", "exit 0")
    (tools / "states").write_text(states.replace(" ", "\n") + "\n")
    (tools / "codes").write_text(codes.replace(" ", "\n") + "\n")


def verbs(tools: Path) -> list[str]:
    names = []
    for call in calls(tools, "gcloud"):
        assert call[:3] == ["compute", "tpus", "tpu-vm"]
        assert call[4 if call[3] != "scp" else 5].startswith("llava")
        names.append("train" if any("llava-jax train" in word for word in call) else call[3])
    return names


INSTALL_AND_TRAIN = ["scp", "ssh", "train"]


@pytest.mark.parametrize(
    ("states", "codes", "expected", "code"),
    [
        # There is no VM yet.
        (" READY", "0", ["describe", "create", "describe", *INSTALL_AND_TRAIN], 0),
        ("READY", "0", ["describe", *INSTALL_AND_TRAIN], 0),
        # One that its owner stopped, as it was being stopped, and as another launch makes it.
        ("STOPPED READY", "0", ["describe", "start", "describe", *INSTALL_AND_TRAIN], 0),
        ("STOPPING STOPPED READY", "0", ["describe", "describe", "start", "describe", *INSTALL_AND_TRAIN], 0),
        ("CREATING STARTING READY", "0", ["describe", "describe", "describe", *INSTALL_AND_TRAIN], 0),
        # What no launch can mend.
        ("UNKNOWN", "0", ["describe"], 2),
        # Preempted and saved on a VM that stays.
        (
            "READY READY READY",
            "75 0",
            ["describe", *INSTALL_AND_TRAIN, "describe", "describe", *INSTALL_AND_TRAIN],
            0,
        ),
        # The VM was taken away under the training.
        (
            "READY PREEMPTED PREEMPTED  READY",
            "255 0",
            [
                *("describe", *INSTALL_AND_TRAIN, "describe"),
                *("describe", "delete", "describe", "create", "describe", *INSTALL_AND_TRAIN),
            ],
            0,
        ),
        # Its owner stopped it under the training.
        ("READY STOPPING", "75", ["describe", *INSTALL_AND_TRAIN, "describe"], 75),
        # A failure of the run itself.
        ("READY READY", "66", ["describe", *INSTALL_AND_TRAIN, "describe"], 66),
    ],
)
def test_the_tpu_vm_launcher_makes_the_vm_again_and_trains_on(
    tools: Path, states: str, codes: str, expected: list[str], code: int
):
    tpu_vm(tools, states=states, codes=codes)
    program(tools, "git", "exit 0")
    assert launch(tools, "launch_tpu_vm.py", *TPU_VM, *RUN).returncode == code
    assert verbs(tools) == expected
    for train in [call for call in calls(tools, "gcloud") if any("llava-jax train" in word for word in call)]:
        assert train[3:] == [
            *("ssh", "llava", "--worker=all", "--batch-size=all"),
            f"--command=cd llava_jax && ../.llava_jax.venv/bin/{TRAIN}",
        ]


def test_the_tpu_vm_launcher_names_the_state_that_it_cannot_mend(tools: Path):
    tpu_vm(tools, states="HIDDEN", codes="")
    program(tools, "git", "exit 0")
    message = launch(tools, "launch_tpu_vm.py", *TPU_VM, *RUN).stderr
    assert message == "A VM must be READY or STOPPED; llava is HIDDEN. Delete it or take another --name.\n"


@pytest.fixture
def home(tools: Path, tmp_path: Path) -> Path:
    """The home folder of a VM that is always READY, where all but pip and uv runs for real."""
    folder = tmp_path / "home"
    (folder / ".local" / "bin").mkdir(parents=True)
    (folder / ".llava_jax.venv" / "bin").mkdir(parents=True)
    body = f"""
cd {folder} || exit
case "$4" in
    describe) echo READY ;;
    scp) cp "$5" . ;;
    ssh) command="${{!#}}"; bash -c "${{command#--command=}}" ;;
esac"""
    program(tools, "gcloud", body)
    program(tools, "pip3", "exit 0")
    program(folder / ".local" / "bin", "uv", "exit 0")
    return folder


def checkout(folder: Path, *configs: str) -> Path:
    """Commits the TPU VM launcher and `configs`, nothing else, in a repository; its launcher."""
    launcher = folder / "scripts" / "launch_tpu_vm.py"
    shutil.rmtree(folder / "configs", ignore_errors=True)
    for directory in (launcher.parent, folder / "configs"):
        directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(SCRIPTS / launcher.name, launcher)
    for config in configs:
        (folder / "configs" / config).touch()
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "Configs"]):
        subprocess.run([*git, *words], check=True)
    return launcher


def test_a_tpu_vm_keeps_what_its_user_put_there_and_nothing_of_an_older_commit(tools: Path, home: Path, tmp_path: Path):
    source = tmp_path / "my checkout"
    # The training sees the user's relative paths, again after 75.
    trains = "cat weights/mine configs/mine.py || exit 66\n" + exit_codes(tools, 0, 75, 0)
    program(home / ".llava_jax.venv" / "bin", "llava-jax", trains)
    users = ("llava_jax/weights/mine", "llava_jax/configs/mine.py", "venv/mine", "llava_jax.tar.gz")
    for path in users:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text("mine")
    # From a folder below the top, which is archived all the same.
    launcher = checkout(source, "old.py", "kept.py")
    assert launch(tools, launcher, *TPU_VM, *RUN, cwd=source / "configs").returncode == 0
    put = home / "llava_jax"
    assert (put / "scripts" / "launch_tpu_vm.py").exists()
    assert sorted(path.name for path in (put / "configs").iterdir()) == ["kept.py", "mine.py", "old.py"]
    checkout(source, "new.py", "kept.py")
    assert launch(tools, launcher, *TPU_VM, *RUN, cwd=tmp_path).returncode == 0
    assert len(calls(home / ".llava_jax.venv" / "bin", "llava-jax")) == 3
    assert sorted(path.name for path in (put / "configs").iterdir()) == ["kept.py", "mine.py", "new.py"]
    assert [(home / path).read_text() for path in users] == ["mine"] * len(users)


def test_a_clone_on_a_tpu_vm_is_not_overwritten(tools: Path, home: Path, tmp_path: Path):
    (home / "llava_jax" / ".git").mkdir(parents=True)
    done = launch(tools, checkout(tmp_path / "source", "new.py"), *TPU_VM, *RUN)
    assert (done.returncode, [path.name for path in (home / "llava_jax").iterdir()]) == (2, [".git"])
    assert "A launch overwrites llava_jax, now a clone; rename it." in done.stderr


def test_the_tpu_vm_launcher_passes_more_arguments_to_create(tools: Path):
    tpu_vm(tools, states=" READY", codes="0")
    program(tools, "git", "exit 0")
    launch(tools, "launch_tpu_vm.py", *TPU_VM, *RUN, "--", "--spot")
    assert calls(tools, "gcloud")[1][3:] == [
        *("create", "llava", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot")
    ]


def test_the_tpu_vm_launcher_prints_a_program_that_bash_can_read(tools: Path):
    printed = launch(tools, "launch_tpu_vm.py", *TPU_VM, *RUN, "--dry-run").stdout
    subprocess.run(["bash", "-n"], input=printed, text=True, check=True)
    assert "--worker=all" in printed
    assert calls(tools, "gcloud") == []


def test_an_xmanager_sweep_is_one_workdir_for_each_combination(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "xmanager", MagicMock())
    spec = importlib.util.spec_from_file_location("launch_xmanager", SCRIPTS / "launch_xmanager.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.work_units("c.py", "runs/a/", ["seed=7"], []) == [
        ["--config=c.py", "--workdir=runs/a", "--set=seed=7"]
    ]
    units = module.work_units("c.py", "runs/a", [], ["seed=1", "optim.b2=0.9", "seed=2"])
    assert units == [
        ["--config=c.py", "--workdir=runs/a/seed=1,optim.b2=0.9", "--set=seed=1", "--set=optim.b2=0.9"],
        ["--config=c.py", "--workdir=runs/a/seed=2,optim.b2=0.9", "--set=seed=2", "--set=optim.b2=0.9"],
    ]


# How a flag is spelled is absl's affair, so XManager may be away.
XMANAGER = """
import runpy, sys
from unittest.mock import MagicMock

sys.modules["xmanager"] = MagicMock()
runpy.run_path("scripts/launch_xmanager.py", run_name="__main__")
"""


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_the_xmanager_launcher_prints_its_work_units_under_either_spelling(tools: Path, flag: str):
    command = [sys.executable, "-c", XMANAGER, *RUN, flag]
    done = subprocess.run(command, env=environment(tools), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("local work unit 1, ")
    assert line.endswith(f"scripts/launch_host.py {TRAIN.removeprefix('llava-jax train ')}")


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.name)
def test_the_docstring_of_a_launcher_shows_its_launch_command(path: Path):
    text = path.read_text()
    assert text.startswith('r"""')
    docstring = text.split('"""')[1]
    assert f"    python scripts/{path.name} " in docstring or f"    xmanager launch scripts/{path.name} " in docstring


@pytest.mark.nightly
@pytest.mark.parametrize(("script", "arguments"), [("launch_slurm.py", SLURM), ("launch_tpu_vm.py", TPU_VM)])
def test_shellcheck_finds_nothing_in_the_printed_programs(tools: Path, script: str, arguments: tuple[str, ...]):
    shellcheck = needs_tool("shellcheck")
    printed = launch(tools, script, *arguments, *RUN, "--dry-run").stdout
    found = subprocess.run([shellcheck, "--shell=bash", "-"], input=printed, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.nightly
def test_xpk_takes_the_gke_command_and_its_container_passes_the_signal_and_the_code_on(tools: Path):
    """xpk's own dry run, which needs neither gcloud, kubectl nor a cluster when it may write the manifest to a file."""
    needs_tool("xpk")
    manifest = tools / "manifest.yaml"
    project = ("--project=p", "--project-number=1")
    extra = (*project, "--spot", "--dry-run", "--skip-validation", f"--output-manifest-file={manifest}")
    done = launch(tools, "launch_gke.py", *GKE, *RUN, "--", *extra)
    assert done.returncode == 0, done.stdout + done.stderr
    text = manifest.read_text()
    assert "maxRestarts: 1000" in text
    assert "terminationGracePeriodSeconds: 300" in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("values: [")]
    restarts = json.loads(line.split(":")[1])
    assert 75 in restarts
    assert not set(restarts) & {0, 2, 65, 66, 70, 74, 76}

    script = text.split("- bash\n")[1].split("- |\n")[1].split("resources:\n")[0]
    program(tools, "llava-jax", "trap 'exit 75' TERM\nfor _ in {1..200}; do sleep 0.1; done")
    container = subprocess.Popen(["bash", "-c", script], env=environment(tools))
    while not calls(tools, "llava-jax"):
        time.sleep(0.05)
    time.sleep(0.3)
    container.send_signal(signal.SIGTERM)
    assert container.wait(30) == 75
    assert calls(tools, "llava-jax") == [shlex.split(TRAIN)[1:]]


def xmanager(tools: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    # Its record of experiments lies in the home folder.
    env = {**environment(tools), "HOME": str(tools), "JAX_PLATFORMS": "cpu", **more}
    command = [needs_tool("xmanager"), "launch", "scripts/launch_xmanager.py", "--", *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=540)


SWEEP = ("--sweep=optim.learning_rate=1e-3", "--sweep=optim.learning_rate=3e-3")


@pytest.mark.nightly
def test_xmanager_prints_the_work_units(tools: Path):
    done = xmanager(tools, *RUN, *SWEEP, "--dry-run")
    assert done.returncode == 0, done.stderr
    (first, second) = done.stdout.splitlines()
    assert first.startswith("local work unit 1, ")
    assert first.endswith(
        "'--workdir=gs://bucket/my run/optim.learning_rate=1e-3' --set=seed=7 --set=optim.learning_rate=1e-3"
    )
    assert second.endswith("--set=optim.learning_rate=3e-3")


@pytest.mark.nightly
def test_xmanager_trains_a_sweep_on_this_machine(tools: Path, tmp_path: Path):
    """`xm_local.Local` for real: two trainings of configs/debug_cpu.py from first step to last."""
    needs_tool("llava-jax")
    done = xmanager(tools, "--config=configs/debug_cpu.py", f"--workdir={tmp_path}/runs", *SWEEP)
    assert done.returncode == 0, done.stdout + done.stderr
    for rate in ("1e-3", "3e-3"):
        workdir = tmp_path / "runs" / f"optim.learning_rate={rate}"
        assert json.loads((workdir / "run.json").read_text())["status"] == "done"
        assert json.loads((workdir / "config.json").read_text())["optim.learning_rate"] == float(rate)


@pytest.mark.nightly
def test_a_work_unit_that_fails_fails_the_xmanager_launch(tools: Path, tmp_path: Path):
    done = xmanager(tools, "--config=configs/none.py", f"--workdir={tmp_path}")
    assert done.returncode != 0
    assert "configs/none.py" in done.stdout


@pytest.fixture
def cluster() -> Iterator[tuple[str, list[tuple[str, dict]]]]:
    """What answers to a Kubernetes client, and what it was asked to make. There is no cluster here."""
    posted: list[tuple[str, dict]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"kind": "ServiceList", "apiVersion": "v1", "items": []})

        def do_POST(self) -> None:
            posted.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.answer(posted[-1][1])

        def answer(self, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()


def cloud(tools: Path, url: str = "http://127.0.0.1:1") -> dict[str, str]:
    """An account that opens nothing, and a cluster's address, in the files where the clients look."""
    kinds = {"clusters": {"cluster": {"server": url}}, "users": {"user": {}}}
    config = {name: [{"name": "x", **value}] for name, value in kinds.items()}
    config |= {"contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}], "current-context": "x"}
    (tools / "cluster").write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **config}))
    account = {"type": "authorized_user"} | dict.fromkeys(("client_id", "client_secret", "refresh_token"), "none")
    (tools / "account").write_text(json.dumps(account))
    return {
        "KUBECONFIG": str(tools / "cluster"),
        "GOOGLE_APPLICATION_CREDENTIALS": str(tools / "account"),
        "GOOGLE_CLOUD_PROJECT": "p",
    }


@pytest.mark.nightly
def test_xmanager_makes_kubernetes_jobs(tools: Path, cluster: tuple[str, list]):
    """XManager's own Kubernetes client, up to a server of the test's."""
    url, posted = cluster
    where = ("--executor=kubernetes", "--image=gcr.io/p/llava-jax", "--resource=a100=8")
    done = xmanager(tools, *RUN, *SWEEP, *where, **cloud(tools, url))
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [body["spec"]["template"]["spec"] for path, body in posted if path.endswith("/jobs")]
    assert [job["containers"][0]["args"][-1] for job in jobs] == [
        "--set=optim.learning_rate=1e-3",
        "--set=optim.learning_rate=3e-3",
    ]
    for job in jobs:
        assert job["containers"][0]["image"] == "gcr.io/p/llava-jax"
        assert job["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
        assert job["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}


# XManager's command line with Google's client stopped where it would begin to talk to Google.
VERTEX = """
import json
from google.cloud import aiplatform
from xmanager.cli import cli
from xmanager.cloud import auth

class Job:
    resource_name = "none"
    def __init__(self, *, worker_pool_specs, **settings):
        for pool in worker_pool_specs:
            machine, container = pool.machine_spec, pool.container_spec
            what = [machine.machine_type, machine.accelerator_type.name, machine.accelerator_count]
            print("POOL", json.dumps([*what, container.image_uri, *container.args]))
    def submit(self, **settings): pass
    def _dashboard_uri(self): return "nowhere"

aiplatform.CustomJob = Job
auth.get_bucket = auth.get_service_account = lambda: "none"
cli.entrypoint()
"""


@pytest.mark.nightly
def test_xmanager_describes_vertex_jobs(tools: Path):
    python = Path(needs_tool("xmanager")).resolve().with_name("python")
    where = ("--executor=vertex", "--image=gcr.io/p/llava-jax", "--resource=a100=8")
    env = {**environment(tools), **cloud(tools), "HOME": str(tools)}
    command = [str(python), "-c", VERTEX, "launch", "scripts/launch_xmanager.py", "--", *RUN, *SWEEP, *where]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    pools = [json.loads(line.removeprefix("POOL ")) for line in done.stdout.splitlines() if line.startswith("POOL ")]
    for pool, rate in zip(pools, ("1e-3", "3e-3"), strict=True):
        assert pool[:4] == ["a2-highgpu-8g", "NVIDIA_TESLA_A100", 8, "gcr.io/p/llava-jax"]
        assert pool[-1] == f"--set=optim.learning_rate={rate}"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("--executor=vertex",), "needs --image"),
        (("--executor=kubernetes", "--image=i", "--resource=tpu_v5e=8"), "launch_gke.py"),
    ],
)
def test_xmanager_arguments_that_cannot_work_are_refused(tools: Path, where: tuple[str, ...], message: str):
    done = xmanager(tools, *RUN, *where, **cloud(tools))
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
