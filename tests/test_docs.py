"""What the documents say is what the code does."""

import json
import re
import shlex
from pathlib import Path

import ablation
import pytest
import recipes

import convert
import dynamic
import finetune
import generate
import main
import plot
import pointer
import score
from metrics import loss_metrics

ROOT = Path(main.__file__).parent

PARSERS = {f"{script.__name__}.py": script.parse_flags
           for script in (main, finetune, pointer, dynamic, score, generate, convert, plot)}
WRITTEN = r"(?: > |open\(')([^\s']+\.txt)"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
             *sorted((ROOT / "benchmarks").glob("*.md"))]


def code_lines(path):
    """The lines of the code blocks of a document."""
    return [line for block in re.findall(r"```\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
            for line in block.splitlines()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_one_that_its_script_takes(path):
    for line in code_lines(path):
        words = shlex.split(line, comments=True) if line.startswith(("python ", "torchrun ")) else []
        words = words[next((i for i, word in enumerate(words) if word in PARSERS), 1) - 1:]
        if len(words) > 1 and words[1] in PARSERS:
            PARSERS[words[1]](words[2:])


@pytest.mark.parametrize("page", ["README.md", "docs/your-text.md", "docs/ulmfit.md"])
def test_whoever_tries_a_page_after_the_readme_is_not_refused(page):
    saves = set()
    for path in dict.fromkeys(["README.md", page]):
        for line in code_lines(ROOT / path):
            script = re.search(r"^(?:python|torchrun).* (main|finetune)\.py (.*)", line)
            args = PARSERS[f"{script[1]}.py"](shlex.split(script[2])) if script else None
            if args and args.save and not args.resume and (script[1] == "main" or args.load):
                assert args.save not in saves, line
                saves.add(args.save)


def test_no_command_writes_over_the_text_of_a_reader():
    written = {text for path in DOCUMENTS for line in code_lines(path) for text in re.findall(WRITTEN, line)}
    assert "python.txt" in written
    assert not written & set(re.findall(r"--data (\S+\.txt)", (ROOT / "README.md").read_text(encoding="utf-8")))


def test_texts_are_written_in_utf_8_on_windows_too():
    """Its shells make UTF-16 or cp1252 of what is sent to a file."""
    for path in DOCUMENTS:
        assert not [line for line in code_lines(path) if re.search(r"^python .*> \S+\.txt", line)], path


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_page_of_recipes_has_the_commands_of_the_code(name):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    shown = re.search(rf"`ROW={name}`.*?```\n(.*?)```", text, re.S).group(1)
    assert shown.splitlines() == recipes.commands(name)


def test_the_page_of_recipes_has_the_epochs_of_the_ablation():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"for {ablation.EPOCHS} epochs." in text
    assert f"fine-tuned for up to {ablation.TUNING} epochs." in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
        linked = (path.parent / target) if target else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("*.py")))
def test_every_module_is_named_in_the_list_of_files(file):
    assert f"`{file}`" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_every_benchmark_is_named_in_their_list(file):
    assert f"`{file}`" in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_every_pair_of_losses_of_minutes_and_its_rules_has_its_record():
    """Validation and test, as a perplexity or in bits per character. Count models have no records."""
    pages = [ROOT / "docs" / name for name in ("minutes.md", "rules.md")]
    text = " ".join(word for page in pages for word in page.read_text(encoding="utf-8").split())
    recorded = set()
    for path in (ROOT / "benchmarks" / "results").rglob("*.metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line) if '"kind": "test"' in line else {}
            if "valid_loss" in values and "loss" in values:
                valid = loss_metrics(values["valid_loss"])
                recorded |= {(f"{valid['ppl']:.1f}", f"{values['ppl']:.1f}"),
                             (f"{valid['bpc']:.3f}", f"{values['bpc']:.3f}")}
    pairs = set(re.findall(r"(\d+\.\d+) / (\d+\.\d+)", text)) - {("188.8", "176.0")}
    assert len(pairs) > 50
    assert not pairs - recorded


def test_the_targets_of_make_are_explained():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    explained = set(re.findall(r"^# make ([\w-]+)", makefile, re.M))
    assert explained == set(re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split())
