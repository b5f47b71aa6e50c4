"""No run harms another, and no file is taken for what it is not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY, read_metrics

import checkpoint
import finetune
import generate
import main
import metrics
import pointer
import run_files
from data import Corpus
from errors import BadInput
from files import locked
from model import RNNModel, parameter_shapes
from process import StopSignals
from text import read_texts, tokenize

ROOT = Path(main.__file__).parent


def weights(path):
    return checkpoint.load(path)["model"]


def same_weights(one, other):
    return all(torch.equal(weights(one)[name], weights(other)[name]) for name in weights(one))


def script(name, *arguments, **how):
    """Start a script in a process of its own."""
    return subprocess.Popen([sys.executable, ROOT / f"{name}.py", *map(str, arguments)], cwd=ROOT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how})


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = ["a.pt", "a.pth", "a.b", "exp.lr0.1", "exp.lr0.2", "exp.lr0", "exp.pt", "x.y.pt", "x.z.pt", "data"]


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_the_files_of_runs_are_their_own(stage):
    files = [path for name in NAMES for path in run_files.files_of_run(name, stage)]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_a_state_leads_back_to_its_model(name, stage):
    assert run_files.best_path(run_files.last_path(name, stage)) == Path(name)
    assert run_files.best_path(name) == Path(name)


def test_runs_whose_names_differ_after_the_last_dot_keep_their_records(train, tmp_path):
    for name in ("exp.lr0.1", "exp.lr0.2"):
        train(tmp_path / name, "--epochs", "2", "--log-interval", "5")
    before = run_files.metrics_path(tmp_path / "exp.lr0.2").read_bytes()
    train(tmp_path / "exp.lr0.1", "--epochs", "3", "--resume", str(tmp_path / "exp.lr0.1"))
    assert run_files.metrics_path(tmp_path / "exp.lr0.2").read_bytes() == before


@pytest.mark.parametrize("name", ["d.last.pt", "d.last", "d.finetune.last.pt", "d.untuned.pt",
                                  "d.statistics.pt", "d.metrics.jsonl"])
def test_the_name_of_another_file_of_a_run_is_refused(train, tmp_path, name):
    with pytest.raises(BadInput, match="those of other files of a run"):
        train(tmp_path / name, "--epochs", "1")


@pytest.mark.parametrize("name", [".", "/", "..", "a/.."])
@pytest.mark.parametrize("call", [
    lambda name: main.main(["--no-cuda", "--save", name]), lambda name: main.main(["--no-cuda", "--resume", name]),
    lambda name: finetune.main(["--no-cuda", "--save", name]), lambda name: pointer.main(["--no-cuda", "--save", name]),
], ids=["main", "resume", "finetune", "pointer"])
def test_a_path_without_a_name_is_refused(call, name):
    with pytest.raises(BadInput, match="is not the name of a file|cannot be read"):
        call(name)


def test_two_names_with_one_record_are_refused(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    with pytest.raises(BadInput, match=r"its record would be that of .*m.pt"):
        train(tmp_path / "m", "--epochs", "1")


# --- locks -----------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import files, run_files
with files.locked(run_files.metrics_path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the files of the run `m.pt` to itself."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, ROOT, tmp_path / "m.pt"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_and_told_by_whom(train, tmp_path, holder):
    with pytest.raises(BadInput, match=f"m.metrics.jsonl: in use by process {holder.pid}"):
        train(tmp_path / "m.pt", "--epochs", "1")


@pytest.mark.parametrize("command", ["resume", "finetune", "pointer"])
def test_every_script_that_writes_a_run_is_refused_while_another_has_it(train, corpus_dir, tmp_path, command):
    train(tmp_path / "m.pt", "--epochs", "1")
    data, save = ["--no-cuda", "--data", str(corpus_dir)], str(tmp_path / "m.pt")
    calls = {"resume": lambda: main.main([*data, "--resume", save, "--epochs", "2"]),
             "finetune": lambda: finetune.main([*data, "--save", save]),
             "pointer": lambda: pointer.main([*data, "--save", save])}
    with locked(run_files.metrics_path(save)), pytest.raises(BadInput, match="in use by process"):
        calls[command]()


def test_a_lock_left_by_a_killed_process_refuses_nobody(train, tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".m.metrics.jsonl.lock").exists()
    assert train(tmp_path / "m.pt", "--epochs", "1")[0] == 0


def test_a_lock_is_removed_at_the_end(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    assert not list(tmp_path.glob(".*.lock"))


# --- the text --------------------------------------------------------------------------------------------------------

def test_a_run_goes_on_with_the_text_it_began_with(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    text = (corpus_dir / "train.txt").read_text().splitlines(keepends=True)
    (corpus_dir / "train.txt").write_text("".join(text[:60]))
    with pytest.raises(BadInput, match=r"corpus is not the text of .*m.last.pt, which was .*: its checksum is"):
        train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"))


def test_a_moved_text_is_the_same_text(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    corpus_dir.rename(tmp_path / "moved")
    assert main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt"), "--epochs", "2", "--data",
                      str(tmp_path / "moved")]) == 0


def test_a_text_that_is_not_here_is_named_with_its_model(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    corpus_dir.rename(tmp_path / "moved")
    for call in (lambda: pointer.main(["--no-cuda", "--save", str(tmp_path / "m.pt")]),
                 lambda: finetune.main(["--no-cuda", "--save", str(tmp_path / "m.pt")]),
                 lambda: main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt")])):
        with pytest.raises(BadInput, match=r"m(\.last)?\.pt was trained on .*corpus, which is not here; --data says"):
            call()


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("level", ["word", "char"])
def test_every_kind_of_line_end_is_one_eos(tmp_path, ends, level):
    (tmp_path / "book.txt").write_bytes(ends.join(["a b", "", "c d"] * 100 + [""]).encode())
    corpus = Corpus(tmp_path / "book.txt", level)
    ids = torch.cat([corpus.train, corpus.valid, corpus.test])
    words = [corpus.dictionary.idx2word[i] for i in ids]
    line = {"word": ["a", "b", "<eos>", "<eos>", "c", "d", "<eos>"],
            "char": ["a", " ", "b", "<eos>", "<eos>", "c", " ", "d", "<eos>"]}[level]
    assert words == line * 100


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_line_ends_at_the_border_of_a_block(tmp_path, monkeypatch, size):
    monkeypatch.setattr("text.BLOCK", size)
    (tmp_path / "book.txt").write_bytes(b"a\r\nb\rc\n" * 9 + b"d\r")
    ids, _, words = read_texts([tmp_path / "book.txt"], "word")
    assert [words[i] for i in ids] == ["a", "<eos>", "b", "<eos>", "c", "<eos>"] * 9 + ["d", "<eos>"]


@pytest.mark.parametrize("content, message", [
    ("some words\n".encode("utf-16"), "is UTF-16, not UTF-8 text: convert it"),
    (b"\x1f\x8b\x08\x00rest", "is a gzip archive, not UTF-8 text: unpack it"),
    (b"good\n\xff\n", "line 2 is not UTF-8 text"),
    ("some words\n".encode("utf-16-le"), "is binary, or UTF-16 without a mark: it is not UTF-8 text"),
])
def test_a_file_that_is_no_text_is_named(tmp_path, content, message):
    (tmp_path / "book.txt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        Corpus(tmp_path / "book.txt", "word")


def test_text_without_spaces_is_told_of_its_level(train, tmp_path):
    (tmp_path / "book.txt").write_text("起初神創造天地" * 999, encoding="utf-8")
    with pytest.raises(BadInput, match="text without spaces between its words needs --level char"):
        train(tmp_path / "m.pt", "--data", str(tmp_path / "book.txt"))


# --- models and states -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call", [
    lambda path: pointer.main(["--no-cuda", "--save", path]),
    lambda path: generate.main(["--no-cuda", "--checkpoint", path]),
    lambda path: finetune.main(["--no-cuda", "--load", path, "--save", path.replace("last", "tuned")]),
], ids=["pointer", "generate", "finetune"])
def test_the_state_to_resume_from_is_not_taken_for_the_model(train, tmp_path, call):
    train(tmp_path / "m.pt", "--epochs", "1")
    with pytest.raises(BadInput, match=r"m.last.pt: that is the state to resume from; the model is .*m.pt"):
        call(str(tmp_path / "m.last.pt"))


def test_the_same_command_again_keeps_what_is_there(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "2")
    before = (tmp_path / "m.pt").read_bytes()
    with pytest.raises(BadInput, match="a run lies there already .*--resume .*--overwrite"):
        train(tmp_path / "m.pt", "--epochs", "2")
    (tmp_path / "m.last.pt").unlink()
    with pytest.raises(BadInput, match="a model lies there already; --overwrite"):
        train(tmp_path / "m.pt", "--epochs", "2")
    assert (tmp_path / "m.pt").read_bytes() == before


def test_overwrite_begins_anew(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "2")
    _, record = train(tmp_path / "m.pt", "--epochs", "1", "--overwrite", "--seed", "5")
    assert [len(record[kind]) for kind in ("run", "epoch", "test")] == [1, 1, 1]
    train(tmp_path / "other.pt", "--epochs", "1", "--seed", "5")
    assert same_weights(tmp_path / "m.pt", tmp_path / "other.pt")


def tune(corpus_dir, *flags):
    return finetune.main(["--no-cuda", "--data", str(corpus_dir), *map(str, flags)])


def test_training_goes_on_after_fine_tuning_in_place_as_if_there_had_been_none(train, corpus_dir, tmp_path):
    flags = ["--lr", "20", "--log-interval", "5"]
    train(tmp_path / "whole.pt", *flags, "--epochs", "4")
    train(tmp_path / "m.pt", *flags, "--epochs", "2")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 3)
    tuned = weights(tmp_path / "m.pt")
    assert checkpoint.load(tmp_path / "m.pt")["stage"] == "finetune"
    train(tmp_path / "m.pt", *flags, "--epochs", "4", "--resume", str(tmp_path / "m.pt"))
    assert same_weights(tmp_path / "m.last.pt", tmp_path / "whole.last.pt")
    assert same_weights(tmp_path / "m.pt", tmp_path / "whole.pt")
    kept = weights(tmp_path / "m.finetuned.pt")
    assert all(torch.equal(kept[name], tuned[name]) for name in tuned)


def test_training_that_goes_on_keeps_the_record_of_the_fine_tuning(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 2)
    before = run_files.metrics_path(tmp_path / "m.pt").read_bytes()
    train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"))
    assert run_files.metrics_path(tmp_path / "m.pt").read_bytes().startswith(before)


def test_the_fine_tuned_model_that_was_kept_can_be_tuned_on(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1", "--lr", "20")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    assert checkpoint.load(tmp_path / "m.pt")["stage"] == "finetune"
    train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"))
    assert tune(corpus_dir, "--resume", tmp_path / "m.finetuned.pt", "--epochs", 2) == 0


def test_a_fine_tuning_that_was_stopped_is_not_begun_anew(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    state = checkpoint.load(tmp_path / "m.finetune.last.pt")
    state["flags"]["epochs"] = 9
    torch.save(state, tmp_path / "m.finetune.last.pt")
    with pytest.raises(BadInput, match="a fine-tuning was stopped there; --resume .*--overwrite"):
        tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    assert tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1, "--overwrite") == 0


def test_fine_tuning_does_not_overwrite_another_model(train, corpus_dir, tmp_path):
    for name in ("m.pt", "other.pt"):
        train(tmp_path / name, "--epochs", "1")
    before = (tmp_path / "other.pt").read_bytes()
    with pytest.raises(BadInput, match="lies there already"):
        tune(corpus_dir, "--load", tmp_path / "m.pt", "--save", tmp_path / "other.pt", "--epochs", 1)
    assert (tmp_path / "other.pt").read_bytes() == before


def test_a_fine_tuning_of_before_is_resumed_from_where_its_state_was(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    (tmp_path / "m.finetune.last.pt").replace(tmp_path / "m.last.pt")
    assert tune(corpus_dir, "--resume", tmp_path / "m.pt", "--epochs", 2) == 0


@pytest.mark.parametrize("flags", [
    {}, {"model": "GRU"}, {"model": "QRNN"}, {"tied": False}, {"nlayers": 1}, {"nlayers": 1, "tied": False},
    {"model": "QRNN", "nlayers": 4, "tied": False},
])
@pytest.mark.parametrize("ntoken", [11, 80_000])
def test_the_shapes_of_a_model_are_known_without_building_it(flags, ntoken):
    flags = {"model": "LSTM", "emsize": 3, "nhid": 4, "nlayers": 2, "tied": True} | flags
    built = {name: tuple(value.shape) for name, value in RNNModel(ntoken, **flags).state_dict().items()}
    assert parameter_shapes(ntoken, **flags) == built


@pytest.mark.slow
def test_scripts_start_without_what_they_do_not_need(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    code = ("import sys, generate\n"
            "generate.main(['--no-cuda', '--checkpoint', sys.argv[1], '--words', '3', '--outf', '-'])\n"
            "assert 'torch._dynamo' not in sys.modules")
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "m.pt"], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr == ""


# --- records ---------------------------------------------------------------------------------------------------------

def test_a_torn_record_goes_on_with_a_line_of_its_own(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    path = run_files.metrics_path(tmp_path / "m.pt")
    path.write_bytes(path.read_bytes() + b'{"kind": "epo')
    train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"))
    lines = path.read_bytes().split(b"\n")
    records, bad = metrics.parse_lines(lines)
    assert [record["epoch"] for record in records if record["kind"] == "epoch"] == [1, 2]
    assert len(bad) <= 1


@pytest.mark.parametrize("change", [
    lambda text: text.replace(b"\n", b"\r\n"), lambda text: b"# a note\n" + text, lambda text: text[:-1],
    lambda text: text[:200] + text[210:],
], ids=["CRLF", "line added", "no last line end", "bytes lost"])
def test_a_record_that_was_edited_loses_no_line(train, tmp_path, change):
    train(tmp_path / "m.pt", "--epochs", "2")
    path = run_files.metrics_path(tmp_path / "m.pt")
    before, _ = metrics.parse_lines(path.read_bytes().split(b"\n"))
    path.write_bytes(change(path.read_bytes()))
    kept, _ = metrics.parse_lines(path.read_bytes().split(b"\n"))
    train(tmp_path / "m.pt", "--epochs", "3", "--resume", str(tmp_path / "m.pt"))
    after, _ = metrics.parse_lines(path.read_bytes().split(b"\n"))
    assert after[:len(kept) - 1] == kept[:-1]
    assert [record["epoch"] for record in after if record["kind"] == "epoch"][-1] == 3
    assert len(kept) >= len(before) - 1


def test_readers_skip_bad_lines_and_name_them(tmp_path, capsys):
    content = b'{"kind": "epoch", "loss": 1}\r\nnonsense\n\n[1]\n{"kind": "test"}\n{"ki'
    (tmp_path / "m.metrics.jsonl").write_bytes(content)
    records = metrics.read_metrics(tmp_path / "m.metrics.jsonl")
    assert [record["kind"] for record in records] == ["epoch", "test"]
    assert "skipped, no record: line 2, 4, 6" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_of_a_damaged_record(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    with open(tmp_path / "m.metrics.jsonl", "ab") as file:
        file.write(b"torn")
    ended = subprocess.run([sys.executable, ROOT / "benchmarks" / "table.py", tmp_path / "m.metrics.jsonl"],
                           capture_output=True, text=True)
    assert ended.returncode == 0
    assert "| train    |" in ended.stdout
    assert "skipped" in ended.stderr


# --- prompts and other flags -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, tokens", [
    ("the cat\nsat", ["the", "cat", "<eos>", "sat"]), ("a\r\nb\rc\n", ["a", "<eos>", "b", "<eos>", "c", "<eos>"]),
    ("the\n\ncat", ["the", "<eos>", "<eos>", "cat"]), ("the <eos>\ncat", ["the", "<eos>", "cat"]), ("", []),
])
def test_a_new_line_of_a_prompt_is_an_eos(text, tokens):
    assert tokenize(text, "word") == tokens


@pytest.fixture
def trained(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    return tmp_path / "m.pt"


def write(trained, *flags):
    generate.main(["--no-cuda", "--checkpoint", str(trained), "--words", "4", "--outf", "-", *map(str, flags)])


def test_a_prompt_from_a_file(trained, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("the cat\nsat")
    capsys.readouterr()
    write(trained, "--prompt-file", tmp_path / "prompt.txt")
    assert capsys.readouterr().out.startswith("the cat <eos>\nsat ")


def test_a_prompt_from_standard_input(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("the cat")
    with open(tmp_path / "prompt.txt", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        capsys.readouterr()
        write(trained, "--prompt-file", "-")
    assert capsys.readouterr().out.startswith("the cat ")


@pytest.mark.parametrize("flags, message", [
    (["--prompt", "a", "--prompt-file", "b"], "one of them"), (["--prompt-file", "missing"], "cannot be read: No such"),
    (["--prompt-file", "."], "cannot be read: Is a directory"),
])
def test_a_prompt_that_cannot_be_had(trained, flags, message):
    with pytest.raises(BadInput, match=message):
        write(trained, *flags)


def test_temperature_0_takes_the_likeliest_word_each_time(trained, capsys):
    texts = []
    for seed in (1, 2):
        capsys.readouterr()
        write(trained, "--temperature", 0, "--seed", seed)
        texts.append(capsys.readouterr().out)
    write(trained, "--top-k", 1)
    assert texts == [capsys.readouterr().out] * 2


def test_flags_of_the_original_that_generation_does_not_need(trained, capsys):
    write(trained, "--model", "LSTM", "--data", "data/penn")
    with pytest.raises(BadInput, match="--model QRNN contradicts"):
        write(trained, "--model", "QRNN")
    assert capsys.readouterr().out


@pytest.mark.parametrize("flags, name, value", [
    (["--batch-size", "3"], "batch_size", 3), (["--batch_size", "3"], "batch_size", 3),
    (["--batch_size=3"], "batch_size", 3), (["--save-interval", "3"], "save_interval", 3),
    (["--save_interval", "3"], "save_interval", 3), (["--no_cuda_graphs"], "cuda_graphs", False),
    (["--max_bptt=3"], "max_bptt", 3), (["--save=my_model.pt"], "save", "my_model.pt"), (["--epoch", "3"], "epochs", 3),
])
def test_a_flag_has_both_spellings(flags, name, value):
    assert getattr(main.parse_flags(flags), name) == value


def test_when_minus_1_is_never(train, tmp_path):
    _, record = train(tmp_path / "m.pt", "--epochs", "2", "--when", "-1", "--optimizer", "adam", "--lr", "0.01")
    assert "decay" not in record


@pytest.mark.parametrize("bptt, warned", [(5, True), (9, False)])
def test_a_short_bptt_is_warned_of(train, tmp_path, capsys, bptt, warned):
    train(tmp_path / "m.pt", "--epochs", "1", "--bptt", str(bptt))
    assert ("the learning rate is scaled" in capsys.readouterr().out) == warned


def test_the_log_line_shows_the_learning_rate_that_was_used(train, tmp_path, capsys):
    _, record = train(tmp_path / "m.pt", "--epochs", "1", "--bptt", "5", "--log-interval", "4")
    lines = [line for line in capsys.readouterr().out.splitlines() if "| lr" in line]
    shown = [float(line.split("| lr")[1].split("|")[0]) for line in lines]
    assert shown == pytest.approx([line["mean_lr"] for line in record["batch"]], abs=1e-5)
    scales = [line["tokens"] / 4 / 4 / 5 for line in record["batch"][:-1]]  # 4 batches of 4 columns, bptt 5
    assert shown[:-1] == pytest.approx(scales, abs=1e-5)


# --- outputs and signals ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, raised", [
    (OSError(28, "No space left on device"), BadInput), (BrokenPipeError(32, "Broken pipe"), BrokenPipeError),
])
@pytest.mark.parametrize("lines", [5, 8, 12])  # in an epoch, at its end, in another
def test_training_whose_log_cannot_be_written_any_more_keeps_its_state(train, tmp_path, monkeypatch, error, raised,
                                                                       lines):
    flags = ["--log-interval", "5", "--epochs", "4", "--nonmono", "0", "--lr", "20"]
    train(tmp_path / "whole.pt", *flags)
    written = iter(range(10**6))

    def write(_):
        if next(written) >= lines:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(metrics.tqdm, "write", write)
        with pytest.raises(raised):
            train(tmp_path / "parts.pt", *flags)
    assert len(read_metrics(tmp_path / "parts.pt").get("epoch", [])) < 4
    train(tmp_path / "parts.pt", *flags, "--resume", str(tmp_path / "parts.pt"))
    assert same_weights(tmp_path / "whole.last.pt", tmp_path / "parts.last.pt")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name, flags", [
    ("main", [*TINY, "--data", "corpus", "--save", "new.pt"]),
    ("pointer", ["--save", "m.pt", "--window", 5]), ("generate", ["--checkpoint", "m.pt", "--outf", "-", "--words", 9]),
])
def test_output_that_cannot_be_written_is_one_line(trained, tmp_path, name, flags):
    places = {"m.pt": trained, "corpus": tmp_path / "corpus", "new.pt": tmp_path / "new.pt"}
    flags = [places.get(flag, flag) for flag in flags]
    with open("/dev/full", "w") as full:
        run = script(name, *flags, stdout=full)
        _, err = run.communicate()
    assert (run.returncode, err.count("\n")) == (2, 1), err


def test_a_disk_that_is_full_while_text_is_written_is_one_line(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(generate, "write_texts", full)
    with pytest.raises(BadInput, match="text.txt: could not be written: No space left on device"):
        write(trained, "--outf", tmp_path / "text.txt")
    assert not list(tmp_path.glob("text*"))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_a_terminal_that_goes_stops_training_as_sigterm_does(train, tmp_path, monkeypatch):
    import training
    step, calls = training.train_step, iter(range(10**6))

    def interrupted(*arguments, **flags):
        if next(calls) == 5:
            signal.raise_signal(signal.SIGHUP)
        return step(*arguments, **flags)

    monkeypatch.setattr(training, "train_step", interrupted)
    assert train(tmp_path / "m.pt", "--epochs", "9")[0] == 128 + signal.SIGHUP
    assert checkpoint.load(tmp_path / "m.last.pt")["state"]["progress"]["batch"] == 6


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_under_nohup_a_terminal_that_goes_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.stop is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.05, 0.3, 0.8])
def test_ctrl_c_while_a_script_starts_is_one_line(corpus_dir, tmp_path, after):
    run = script("main", *TINY, "--data", corpus_dir, "--save", tmp_path / "m.pt")
    time.sleep(0.15 + after)  # the interpreter itself takes the first
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    if run.returncode == 130 and "interrupted" in err:
        assert err.endswith("main.py: interrupted\n")
        assert err.count("\n") == 1
    else:  # it was in its loop already, or not yet in its first line
        assert "Traceback" not in err or after < 0.1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1")
def test_sigusr1_while_a_script_starts_ends_nothing(corpus_dir, tmp_path):
    run = script("main", *TINY, "--data", corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    time.sleep(0.6)
    run.send_signal(signal.SIGUSR1)
    run.communicate()
    assert run.returncode == 0
    assert read_metrics(tmp_path / "m.pt")["test"]


# --- more of the same kinds ------------------------------------------------------------------------------------------

def test_a_run_does_not_go_on_over_another(train, tmp_path):
    train(tmp_path / "a.pt", "--epochs", "1")
    train(tmp_path / "b.pt", "--epochs", "1", "--seed", "7")
    before = (tmp_path / "b.pt").read_bytes()
    go_on = ["--epochs", "2", "--resume", str(tmp_path / "a.pt")]
    with pytest.raises(BadInput, match="a run lies there already"):
        train(tmp_path / "b.pt", *go_on)
    assert (tmp_path / "b.pt").read_bytes() == before
    _, record = train(tmp_path / "b.pt", *go_on, "--overwrite")
    assert [line["seed"] for line in record["run"]] == [1111]
    assert [line["epoch"] for line in record["epoch"]] == [1, 2]


def test_fine_tuning_anew_does_not_remove_what_it_loads(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1", "--lr", "20")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("m.*")}
    assert "m.untuned.pt" in before
    with pytest.raises(BadInput, match="that is a file of the run at --save"):
        tune(corpus_dir, "--load", tmp_path / "m.untuned.pt", "--save", tmp_path / "m.pt", "--overwrite")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("m.*")} == before


def test_a_text_is_never_overwritten(train, tmp_path):
    (tmp_path / "book.txt").write_text("the cat sat\n" * 200)
    with pytest.raises(BadInput, match="what lies there is no model"):
        train(tmp_path / "book.txt", "--data", str(tmp_path / "book.txt"), "--overwrite")
    assert (tmp_path / "book.txt").read_text().startswith("the cat")


def test_a_text_beside_a_run_has_no_record_to_share(train, tmp_path):
    (tmp_path / "book").write_text("the cat sat\n" * 200)
    assert train(tmp_path / "book.pt", "--data", str(tmp_path / "book"), "--epochs", "1")[0] == 0


def test_a_link_and_what_it_leads_to_are_one_run(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    (tmp_path / "link.pt").symlink_to(tmp_path / "m.pt")
    with locked(run_files.metrics_path(tmp_path / "m.pt")), pytest.raises(BadInput, match="in use by process"):
        tune(corpus_dir, "--save", tmp_path / "link.pt", "--epochs", 1)
    tune(corpus_dir, "--save", tmp_path / "link.pt", "--epochs", 1)
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "m.finetune.last.pt").exists()


def test_a_fine_tuning_has_a_state_from_its_start(train, corpus_dir, tmp_path, monkeypatch):
    train(tmp_path / "m.pt", "--epochs", "1")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.train_batches", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(corpus_dir, "--load", tmp_path / "m.pt", "--save", tmp_path / "t.pt", "--epochs", 2)
    assert tune(corpus_dir, "--resume", tmp_path / "t.pt", "--epochs", 2) == 0


def test_a_tuned_model_that_is_kept_already_is_no_hindrance(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1", "--lr", "20")
    for epochs in ("2", "3"):
        tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
        content = checkpoint.load(tmp_path / "m.pt") | {"stage": "finetune"}  # as if it had become better
        torch.save(content, tmp_path / "m.pt")
        train(tmp_path / "m.pt", "--epochs", epochs, "--resume", str(tmp_path / "m.pt"))
    assert sorted(path.name for path in tmp_path.glob("m.finetuned?.pt")) == ["m.finetuned2.pt"]


def test_a_signal_between_the_last_batch_and_the_end_of_an_epoch_loses_nothing(train, tmp_path, monkeypatch):
    import training
    end_epoch, calls = training.end_epoch, iter(range(10**6))
    train(tmp_path / "whole.pt", "--epochs", "3")

    def end(run):
        if next(calls) == 0:
            signal.raise_signal(signal.SIGTERM)
        end_epoch(run)

    with monkeypatch.context() as patch:
        patch.setattr(training, "end_epoch", end)
        assert train(tmp_path / "parts.pt", "--epochs", "3")[0] == 128 + signal.SIGTERM
    assert checkpoint.load(tmp_path / "parts.last.pt")["state"]["progress"]["epoch"] == 1
    train(tmp_path / "parts.pt", "--epochs", "3", "--resume", str(tmp_path / "parts.pt"))
    assert same_weights(tmp_path / "whole.last.pt", tmp_path / "parts.last.pt")


def test_a_note_in_a_record_stays(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    with open(tmp_path / "m.metrics.jsonl", "a") as file:
        file.write("note: a good run\n")
    train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"))
    assert "note: a good run\n" in (tmp_path / "m.metrics.jsonl").read_text()


@pytest.mark.parametrize("line", ['{"kind": "test"}', '{"kind": "run"}', '{"kind": "pointer", "split": "test"}',
                                  '{"kind": "test", "epochs": 1, "valid_loss": null, "loss": null, "seconds": 1}'])
def test_a_table_of_records_that_lack_something(line):
    import json

    import table
    assert len(list(table.table([json.loads(line)]))) >= 2


def test_text_is_not_written_over_a_checkpoint(trained, tmp_path):
    with pytest.raises(BadInput, match="a checkpoint lies there"):
        write(trained, "--outf", tmp_path / "m.last.pt")


def test_a_prompt_file_with_a_mark(trained, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfthe cat")
    capsys.readouterr()
    write(trained, "--prompt-file", tmp_path / "prompt.txt")
    assert capsys.readouterr().out.startswith("the cat ")


def test_a_full_disk_keeps_nobody_from_locking(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("files.os.write", full)
    with locked(tmp_path / "m"), pytest.raises(BadInput, match="in use by process unknown"), locked(tmp_path / "m"):
        pass
