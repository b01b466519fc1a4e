"""EleutherAI's evaluation harness, unmodified, against a deployment: likelihoods and generation, alone and in lists,
and generation as a chat.

It lives in an environment of its own (``make eval``), because it brings hundreds of megabytes that pdkv never needs.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pdkv.verify.link_chasing import make_prompt, text_of
from tests.e2e.deployment import Process

REPOSITORY = Path(__file__).parents[2]
NUM_DOCS = 6
NUM_GENERATED = 40
UNTIL = " n31"
TASKS = {
    "chase_choice": """
task: chase_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DOCS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: " "
metric_list: [{metric: acc}]
""",
    "chase_generate": """
task: chase_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DOCS}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{generated}}"
generation_kwargs: {until: ["UNTIL"], max_gen_toks: NUM_GENERATED, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def find_lm_eval() -> str:
    """The harness of ``make eval``, or one on the PATH; skips, saying what to do, when there is none."""
    made = REPOSITORY / ".venv-eval" / "bin" / "lm_eval"
    found = str(made) if made.exists() else shutil.which("lm_eval")
    if found is None:
        pytest.skip("lm_eval is not installed: run `make eval`, or put lm-eval[api] 0.4.13 on the PATH")
    return found


def write_tasks(folder: Path) -> None:
    """Two tasks about the same chains: which three nodes follow, and all that follow until one certain node."""
    docs = []
    for seed in range(NUM_DOCS):
        prompt = make_prompt(seed, 150 + 40 * seed)
        answer = text_of(prompt.expected(3)).split(" ")
        wrong = [list(reversed(answer)), [answer[0], answer[0], answer[1]]]
        choices = [" ".join(words) for words in [*wrong[: seed % 3], answer, *wrong[seed % 3 :]]]
        generated = text_of(prompt.expected(NUM_GENERATED)).split(UNTIL)[0]
        docs.append({"prompt": prompt.text, "choices": choices, "label": seed % 3, "generated": generated})
    assert len({len(doc["generated"].split()) for doc in docs}) > 2, "some end at the stop string, some do not"
    path = folder / "docs.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in TASKS.items():
        text = task.replace("DOCS", str(path)).replace("UNTIL", UNTIL).replace("NUM_GENERATED", str(NUM_GENERATED))
        (folder / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize(("batch_size", "num_concurrent"), [(1, 3), (4, 1)], ids=["one by one", "in lists"])
def test_lm_eval_runs_unmodified(deployment: Process, tmp_path: Path, batch_size: int, num_concurrent: int) -> None:
    arguments = {
        "base_url": f"{deployment.url}/v1/completions",
        "num_concurrent": num_concurrent,
        "max_length": 4096,
    }
    results = run_lm_eval(tmp_path, "local-completions", list(TASKS), arguments, "--batch_size", str(batch_size))
    assert results["chase_choice"]["acc,none"] == 1.0
    assert results["chase_generate"]["exact_match,none"] == 1.0


def test_lm_eval_chats(deployment: Process, tmp_path: Path) -> None:
    arguments = {"base_url": f"{deployment.url}/v1/chat/completions", "num_concurrent": 3}
    results = run_lm_eval(tmp_path, "local-chat-completions", ["chase_generate"], arguments, "--apply_chat_template")
    assert results["chase_generate"]["exact_match,none"] == 1.0


def run_lm_eval(
    folder: Path, model: str, tasks: list[str], arguments: dict[str, object], *flags: str
) -> dict[str, dict[str, float]]:
    """Its metrics by task."""
    lm_eval = find_lm_eval()
    write_tasks(folder)
    named = {"model": "link-chasing", "max_retries": 1, **arguments}
    command = [lm_eval, "--model", model, "--tasks", ",".join(tasks), "--include_path", str(folder), *flags]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in named.items())]
    command += ["--output_path", str(folder / "results"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    environment = {**os.environ, **offline, "OPENAI_API_KEY": "none"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    (path,) = (folder / "results").rglob("results_*.json")
    results: dict[str, dict[str, float]] = json.loads(path.read_text())["results"]
    return results
