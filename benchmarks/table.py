"""Print the stages of a run as a table, made from the metrics file beside its checkpoint and from nothing else.

    python benchmarks/table.py PTB.metrics.jsonl
"""

import math
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
from flags import Parser
from metrics import loss_metrics, read_metrics
from process import run_script


def rows(lines):
    """Yield (stage, epochs, validation perplexity, test perplexity, minutes) for each stage that was tested.

    Without a test split the test perplexity is NaN. Records without what belongs in a row are left out.
    """
    stage, valid, has_test = "?", {}, True
    for line in lines:
        kind = line["kind"]
        with suppress(LookupError, TypeError):
            if kind in ("run", "resume"):
                stage = str(line["stage"])
            elif kind == "test":
                has_test = "loss" in line
                yield (stage, line["epochs"], perplexity(line["valid_loss"]), perplexity(line.get("loss", math.nan)),
                       line["seconds"] / 60)
            elif kind in ("pointer", "dynamic"):
                name = "cache"
                if kind == "dynamic":
                    name = "both" if "window" in line else "dynamic"
                if line["split"] == "valid":
                    valid = line
                    if not has_test:
                        yield name, "", perplexity(line["loss"]), math.nan, line["seconds"] / 60
                else:
                    yield (name, "", perplexity(valid["loss"]), perplexity(line["loss"]),
                           (valid["seconds"] + line["seconds"]) / 60)


def perplexity(loss):
    """Compute e^loss; the record has null for an infinite loss."""
    return math.inf if loss is None else loss_metrics(loss)["ppl"]


def table(lines):
    """Yield the lines of a Markdown table of `rows`."""
    yield "| stage    | epochs | valid ppl | test ppl | minutes |"
    yield "|----------|-------:|----------:|---------:|--------:|"
    for stage, epochs, valid, test, minutes in rows(lines):
        shown = "none" if math.isnan(test) else f"{test:.2f}"
        yield f"| {stage:8} | {epochs:>6} | {valid:9.2f} | {shown:>8} | {minutes:7.1f} |"


def main():
    parser = Parser(description="Print the stages of runs as tables.")
    parser.add_argument("records", nargs="+", metavar="FILE", help="the metrics file of a run")
    for path in parser.parse_args().records:
        print("\n".join(table(read_metrics(path))))


if __name__ == "__main__":
    run_script(main)
