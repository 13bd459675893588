"""Nothing is fetched from the network, and nothing that a file or a graph says is run as code."""

import ast
import os
import subprocess
import sys

import pytest
from test_house import ROOT, name_of

FILES = [file for part in ("lofa_core", "nodes", "training") for file in sorted((ROOT / part).rglob("*.py"))]
FORBIDDEN_MODULES = {
    # the network
    *("urllib", "http", "requests", "httpx", "aiohttp", "socket", "socketserver", "ssl", "ftplib", "smtplib"),
    *("telnetlib", "xmlrpc", "webbrowser", "websockets", "huggingface_hub"),
    # other programs, and code in files
    *("subprocess", "pty", "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"),
    "multiprocessing",
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv"),
    *(
        "os.startfile",
        "torch.hub.load",
        "torch.hub.load_state_dict_from_url",
        "torch.hub.download_url_to_file",
    ),
    *("numpy.load", "np.load", "yaml.load", "yaml.unsafe_load", "importlib.import_module"),
}
# What has to be said in a call of these: pickles hold code unless told otherwise, and a folder that is not
# there is taken for the name of a repository to download.
REQUIRED = {
    "load": ("torch.load", "weights_only"),
    **dict.fromkeys(("from_pretrained", "from_single_file"), ("", "local_files_only")),
}
# (file, what is found there) -> why it may stay.
ALLOWED = {
    ("lofa_core/metrics/weights.py", "pickle"): "its UnpicklingError is caught",
    ("lofa_core/metrics/motion.py", "pickle"): "its UnpicklingError is caught",
    ("lofa_core/metrics/fvd.py", "pickle"): "its UnpicklingError is caught",
    ("training/lora_benchmark.py", "multiprocessing"): "it times our own functions in a process each",
    ("training/data/pose_video.py", "from_pretrained"): "controlnet_aux has no such option; it is given "
    "the whole path of a folder, and downloads only where there is none",
}  # fmt: skip


def found_in(source: str) -> set[str]:
    """What of the above is in a file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {str(node.module).split(".")[0]} & FORBIDDEN_MODULES
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            found |= {"pickle"} if node.attr == "UnpicklingError" else {f"pickle.{node.attr}"}
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            found |= {called} & FORBIDDEN_CALLS
            found |= {
                option for option in ("shell", "trust_remote_code", "allow_pickle") if option in options
            }
            whole, option = REQUIRED.get(called.rpartition(".")[2], ("", ""))
            if option and whole in ("", called):
                said = options.get(option)
                found |= set() if said and ast.unparse(said) == "True" else {called.rpartition(".")[2]}
    return found


@pytest.mark.parametrize("file", [pytest.param(file, id=name_of(file)) for file in FILES])
def test_no_file_reaches_the_network_or_runs_what_it_reads(file):
    found = found_in(file.read_text(encoding="utf-8"))
    assert found == {what for where, what in ALLOWED if where == name_of(file)}


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import urllib.request", "urllib"),
        ("from http.client import HTTPConnection", "http"),
        ("def f():\n    import requests", "requests"),
        ("from huggingface_hub import hf_hub_download", "huggingface_hub"),
        ("eval(x)", "eval"),
        ("exec(x)", "exec"),
        ("import os\nos.system(x)", "os.system"),
        ("import subprocess", "subprocess"),
        ("run(x, shell=True)", "shell"),
        ("pickle.load(f)", "pickle.load"),
        ("torch.load(f)", "load"),
        ("torch.load(f, weights_only=False)", "load"),
        ("AutoModel.from_pretrained(x)", "from_pretrained"),
        ("getattr(m, k).from_pretrained(x, local_files_only=y)", "from_pretrained"),
        ("AutoModel.from_pretrained(x, local_files_only=True, trust_remote_code=True)", "trust_remote_code"),
        ("np.load(f)", "np.load"),
    ],
)
def test_the_scan_finds(source, what):
    assert found_in(source) == {what}


def test_the_page_s_scripts_talk_to_comfyui_alone():
    for script in sorted((ROOT / "nodes/web").rglob("*.js")):
        text = script.read_text(encoding="utf-8")
        for word in (
            "http:",
            "https:",
            "fetch(",
            "XMLHttpRequest",
            "WebSocket",
            "eval(",
            "Function(",
            "innerHTML",
        ):
            assert word not in text, (script.name, word)


def test_a_prediction_opens_no_connection(tmp_path):
    """With no word in the environment that would keep transformers from it."""
    script = (
        "import socket, sys\n"
        "def refuse(*arguments, **options): sys.exit('a connection was opened')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "from lofa_core.__main__ import EXAMPLE, main\n"
        "sys.exit(main(['predict', '--prompt', EXAMPLE, '--out', sys.argv[1]]))\n"
    )
    known = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    out = tmp_path / "lora.safetensors"
    environment = known | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.is_file()
