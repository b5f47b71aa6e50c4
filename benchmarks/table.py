"""Print the stages of a run as a table, made from the metrics file beside its checkpoint and from nothing else.

    python benchmarks/table.py PTB.metrics.jsonl
"""

import json
import sys


def stages(lines):
    """Yield (stage, epochs, valid loss dict, test loss dict, seconds) for training, fine-tuning and the cache, in the
    order of the file; a stage that has not been tested has None there."""
    lines = list(lines)
    ends = [i for i, line in enumerate(lines) if line["kind"] == "run"] + [len(lines)]
    for first, end in zip(ends, ends[1:]):
        head, *body = [line for line in lines[first:end] if line["kind"] != "pointer"]
        epochs = [line for line in body if line["kind"] == "epoch"]
        tests = [line for line in body if line["kind"] == "test"]
        if epochs:
            yield (head["stage"], len(epochs), min(epochs, key=lambda line: line["loss"]), tests[-1] if tests else None,
                   (body[-1]["time"] - head["time"]))
        cache = [line for line in lines[first:end] if line["kind"] == "pointer"]
        for valid, test in zip(cache[::2], cache[1::2]):
            yield "cache", None, valid, test, valid["seconds"] + test["seconds"]


def table(lines):
    """The stages as a Markdown table: perplexities and minutes."""
    rows = ["| stage | epochs | valid ppl | test ppl | minutes |", "|---|---:|---:|---:|---:|"]
    for stage, epochs, valid, test, seconds in stages(lines):
        test_ppl = f"{test['ppl']:.2f}" if test else ""
        rows.append(f"| {stage} | {epochs or ''} | {valid['ppl']:.2f} | {test_ppl} | {seconds / 60:.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as file:
            print(table(map(json.loads, file)))
