"""Runs the numeric tests under other processors' settings and other versions of transformers; `make test-matrix` calls
it.

    python tests/matrix.py                 # every setting, one after the other
    python tests/matrix.py foreign         # the one that `.ci/run` adds to the suite

Prints a Markdown table: setting, tests passed, seconds. Ends with an error where a test failed.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# models, search, losses, semantic IDs, trainers, baselines: what floats go through
TESTS = (
    "numeric modeling_common modeling_onerec_v2 modeling_platform modeling_reward moe auto_classes catalogue_generate "
    "beam_search sampling sessions catalogue policy_losses preference_losses rewards candidates grpo ipa "
    "weight_average semantic_ids rqvae collisions embeddings item_alignment baselines more_baselines recommender "
    "training_step"
).split()
# what CI repeats: models, search, losses, trainers
CORE = (
    "numeric modeling_common modeling_onerec_v2 beam_search policy_losses preference_losses weight_average "
    "training_step"
).split()
_OTHER_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
SETTINGS: dict[str, dict[str, str]] = {
    "native": {},
    "ATEN default": {"ATEN_CPU_CAPABILITY": "default"},
    "ATEN AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "two threads": {"ONEREC_TEST_THREADS": "2"},
    "unaligned weights": {"ONEREC_TEST_UNALIGNED": "1"},
    "foreign": _OTHER_KERNELS | {"ONEREC_TEST_UNALIGNED": "1", "ONEREC_TEST_THREADS": "2"},
    "lowest transformers": {},
    "newest transformers": {},
}
# what is laid over the environment of the suite; the oldest that setup.cfg allows needs an older Hub client
OVERLAYS = {
    "lowest transformers": ["transformers==5.17.0", "huggingface_hub<2"],
    "newest transformers": ["transformers<6"],
}


def overlay(name: str) -> Path:
    """A folder with other versions, to go before the environment on the path; made once."""
    folder = ROOT / ".venv" / name.replace(" ", "-")
    if not (folder / ".installed").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--upgrade"]
        subprocess.run([*command, *OVERLAYS[name]], check=True)
        (folder / ".installed").touch()
    return folder


def run(name: str) -> tuple[str, bool]:
    """The row of the table, and whether all tests passed."""
    env = dict(os.environ, HF_HUB_OFFLINE="1", **SETTINGS[name])
    version = ""
    if name in OVERLAYS:
        env["PYTHONPATH"] = os.pathsep.join([str(overlay(name)), str(ROOT)])
        code = "import transformers, huggingface_hub as h; print(transformers.__version__, h.__version__)"
        found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        version = " ({}, huggingface_hub {})".format(*found.stdout.split()[-2:])
    start = time.perf_counter()
    wanted = {f"test_{test}.py" for test in (CORE if name == "foreign" else TESTS)}
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if path.name in wanted)
    assert len(files) == len(wanted), f"there are not exactly these tests: {wanted}"
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", *files]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if result.returncode:
        print(result.stdout[-20000:], result.stderr[-2000:], sep="\n", file=sys.stderr)
    summary = re.search(r"(?:\d+ \w+,? ?)+(?= in )", result.stdout)
    counts = summary.group() if summary else f"exit {result.returncode}"
    return f"| {name}{version} | {counts} | {time.perf_counter() - start:.0f} |", result.returncode == 0


def main(names: list[str]) -> int:
    if unknown := sorted(set(names) - SETTINGS.keys()):
        raise SystemExit(f"unknown settings {unknown}; there are {', '.join(SETTINGS)}")
    print("| setting | tests | seconds |\n|---|---|---|", flush=True)
    passed = []
    for name in names or SETTINGS:
        row, good = run(name)
        print(row, flush=True)
        passed.append(good)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
