"""The model card of an export: what the model is, what it was trained on, how good it is, its use.

    model_card(name, saved, training) -> text of README.md

Its header is what the Hugging Face hub reads. Under which license a model is published is for the
person who publishes it to say.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config
from corpus.shards import Manifest
from hf_configs import OWN, Saved, architecture_of
from metrics import aligned, score_text


@dataclass(frozen=True)
class Training:
    """What is known of the run that a checkpoint belongs to."""

    config: Config
    # state.json.
    state: dict[str, Any]
    # Results of evaluate.py by task.
    evals: dict[str, Any]
    # The newest eval line of each task in metrics.jsonl, up to the checkpoint's step.
    scores: dict[str, dict[str, Any]]
    # None when the data is not here, or another than it was trained on.
    manifest: Manifest | None


def model_card(name: str, saved: Saved, training: Training | None) -> str:
    """Return the card of a model called `name`; without `training`, only its shape and its use."""
    parts = [_header(training), f"# {name}\n", _shape(saved)]
    if training is not None:
        parts += [_training(training), _losses(training), _evaluations(training)]
    return "\n".join([*(part for part in parts if part), _use(saved)])


def _header(training: Training | None) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    source = training.manifest.source if training and training.manifest else {}
    if isinstance(source.get("repository"), str):
        lines += ["datasets:", f"- {source['repository']}"]
    lines += ["tags:", "- gpt2", "- text-generation"]
    lines += ["# license: for whoever publishes this model to choose"]
    return "\n".join(["---", *lines, "---\n"])


def _shape(saved: Saved) -> str:
    model, kind = saved.model, architecture_of(saved.model)
    known = f"transformers' own `{kind}`"
    if kind == OWN:
        known = "one of its own, in `modeling_gpt.py` beside the weights"
    differing = [
        f"{name} {value}"
        for name, value in (
            *(("positions", model.pos_emb), ("norm", model.norm)),
            *(("activation", model.activation), ("biases", "yes" if model.bias else "no")),
        )
    ]
    return (
        f"A GPT of {model.num_params:,} parameters: {model.n_layer} blocks, "
        f"{model.n_head} heads, width {model.n_embd}, context {model.block_size:,}, "
        f"{model.vocab_size:,} token ids; {', '.join(differing)}. Its architecture is {known}.\n"
    )


def _training(training: Training) -> str:
    config, state, manifest = training.config, training.state, training.manifest
    train = config.train
    facts = {
        "recipe, size": f"`{config.recipe}`, `{config.size}`",
        # Where it lies is nobody's business.
        "data": f"`{Path(config.data).name}`",
        "steps": f"{state['step']:,} of {train.steps:,}" if train.steps else state["step"],
        "tokens in a step": f"{train.batch_tokens:,}",
        "tokens trained on": f"{state['step'] * train.batch_tokens:,}",
        "shuffle, seed": f"{train.shuffle}, {train.seed}",
    }
    if manifest is not None:
        source = ", ".join(f"{key} {value}" for key, value in manifest.source.items() if value)
        facts["source of the data"] = source[:300]
        facts["tokens in its training split"] = f"{manifest.tokens('train'):,}"
    if state.get("data_sha256"):
        facts["sha256 of its manifest"] = f"`{state['data_sha256']}`"
    rows = [{"": name, "training": str(value)} for name, value in facts.items()]
    return f"## Training\n\n{aligned(rows)}\n"


def _losses(training: Training) -> str:
    state, lines = training.state, []
    if state.get("val_loss") is not None:
        lines.append(f"Validation loss: {state['val_loss']:.4f} nats a token")
    if state.get("bits_per_byte") is not None:
        lines.append(f"{state['bits_per_byte']:.4f} bits a byte of text")
    return f"{', '.join(lines)}.\n" if lines else ""


def _evaluations(training: Training) -> str:
    """Return a table of every score there is, those of evaluate.py before those of training."""
    scores = {task: result.get("metrics", {}) for task, result in training.evals.items()}
    for task, line in training.scores.items():
        metrics = {name: value for name, value in line.items() if name != "seconds"}
        scores.setdefault(f"{task} (after step {line['step']})", metrics)
    rows = [
        {
            "task": task,
            "metric": name,
            "score": score_text(name, value, metrics.get(f"{name}_stderr", 0.0)),
        }
        for task, metrics in scores.items()
        for name, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in name
    ]
    return f"## Evaluations\n\n{aligned(rows)}\n" if rows else ""


def _use(saved: Saved) -> str:
    trust = ", trust_remote_code=True" if architecture_of(saved.model) == OWN else ""
    eot = ""
    if saved.begins_with_eot:
        eot = (
            "Every document it was trained on begins with `<|endoftext|>`, so a prompt should, "
            "too; the tokenizer does not add it by itself.\n\n"
        )
    mask = ""
    if saved.model.document_mask:
        mask = (
            "It was trained on sequences in which a token does not see earlier documents. Its "
            "`forward` does the same, but not `generate`, which takes all for one document.\n\n"
        )
    begin = '"<|endoftext|>" + ' if saved.begins_with_eot else ""
    return f"""## Use

{eot}{mask}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
model = AutoModelForCausalLM.from_pretrained(DIRECTORY{trust})
ids = tokenizer({begin}"The meaning of life is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50, do_sample=True, top_k=50)[0]))
```

In the project it comes from: `python sample.py DIRECTORY --prompt TEXT` and
`python evaluate.py DIRECTORY`, without running any code of this directory.
"""
