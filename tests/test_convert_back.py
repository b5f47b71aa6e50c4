"""Models go to other toolkits and back bit for bit, and what cannot be converted is one line."""

import pickle
from pathlib import Path

import pytest
import torch
from test_convert import FOREIGN, ITOS, WORDS, E, V, fastai_model, refused, restored, words_of, write_corpus

import checkpoint
import finetune
import foreign
import generate
import main
import pointer
import score
from errors import BadInput
from model import RNNModel


@pytest.fixture
def run(run_converter):
    return run_converter


def same_state(path, other):
    first, second = (torch.load(name, weights_only=True) for name in (path, other))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {value.dtype for value in second.values()} == {torch.float32}


def test_fastais_files_come_back_bit_for_bit(run):
    run(FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "new.pt")
    assert run("new.pt", "--to", "fastai", "--save", "x.pth", "--vocabulary", "x.pkl")[0] == 0
    same_state(FOREIGN / "fastai_lstm.pth", "x.pth")
    assert words_of("x.pkl") == words_of(ITOS)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_fastais_model_tied_or_not_comes_back_bit_for_bit(run, tied, layers):
    torch.save(fastai_model(tied, layers)[1], "in.pth")
    Path("itos.pkl").write_bytes(pickle.dumps(WORDS))
    run("in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt")
    run("new.pt", "--to", "fastai", "--save", "x.pth", "--vocabulary", "x.pkl")
    same_state("in.pth", "x.pth")
    assert words_of("x.pkl") == WORDS


def test_units_that_are_not_in_use_stay_so_in_training(run):
    torch.save(fastai_model(tied=False)[1], "in.pth")
    Path("itos.pkl").write_bytes(pickle.dumps(WORDS))
    run("in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt")
    model, _ = restored()
    optimizer = torch.optim.SGD(model.train().parameters(), 1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output, _, raw = model(torch.randint(V, (9, 2)), model.init_hidden(2))
        loss = model.loss(output, torch.randint(V, (9, 2)))
        (loss + output.square().mean() + raw.diff(dim=0).square().mean()).backward()
        optimizer.step()
    assert foreign.resized(model.state_dict(), "rnns.1.", E)["decoder.weight"].shape == (V, E)


@pytest.mark.parametrize("flags", [[], ["--no-tied", "--emsize", "9"]])
def test_a_model_of_this_toolkit_comes_back_bit_for_bit(run, train, tmp_path, flags):
    train(tmp_path / "m.pt", "--epochs", "1", *flags)
    status, _, err = run("m.pt", "--to", "fastai", "--save", "x.pth", "--vocabulary", "x.pkl")
    assert status == 0, err
    status, _, err = run("x.pth", "--vocabulary", "x.pkl", "--save", "new.pt", "--data", "corpus")
    assert status == 0, err
    first, second = checkpoint.load("m.pt"), checkpoint.load("new.pt")
    assert first["vocabulary"] == second["vocabulary"]
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_fewer_units_than_the_embedding_has_are_filled_up(layers):
    """A softmax that is not tied takes as many as the embedding has in fastai, and the same logits come out."""
    torch.manual_seed(1)
    model = RNNModel(V, emsize=7, nhid=3, nlayers=layers, tied=False).eval()
    state = foreign.to_fastai(model.state_dict(), "")
    tokens = torch.randint(V, (9, 2))
    values = state["0.encoder.weight"][tokens]
    for layer in range(layers):
        hidden = state[f"0.rnns.{layer}.weight_hh_l0_raw"]
        lstm = torch.nn.LSTM(values.size(2), hidden.size(1))
        lstm.load_state_dict({"weight_hh_l0": hidden, **{
            name: state[f"0.rnns.{layer}.module.{name}"] for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0")}})
        values, _ = lstm(values)
    assert state["1.decoder.weight"].shape == state["0.encoder.weight"].shape == (V, 7)
    logits = values @ state["1.decoder.weight"].t() + state["1.decoder.bias"]
    output, _, _ = model(tokens, model.init_hidden(2))
    torch.testing.assert_close(logits.log_softmax(-1), model.logprob(output))


def test_more_units_than_the_other_layers_have_are_left_out_only_if_not_in_use(run, monkeypatch):
    """A last layer of E units, which the softmax takes in fastai, where H, of the others, is smaller."""
    monkeypatch.setattr("test_convert.H", E - 2)
    torch.save(fastai_model(tied=False)[1], "in.pth")
    Path("itos.pkl").write_bytes(pickle.dumps(WORDS))
    assert "the shapes of no model" in refused(run, "in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt")


def test_what_fastai_has_no_form_for(run, train, tmp_path):
    back = ["--to", "fastai", "--save", "x.pth", "--vocabulary", "x.pkl"]
    for name, flags, why in (("gru", ["--model", "GRU"], "GRU layers"), ("qrnn", ["--model", "QRNN"], "QRNN layers"),
                             ("untied", ["--no-tied"], "not tied")):
        train(tmp_path / f"{name}.pt", "--epochs", "1", *flags)
        assert why in refused(run, f"{name}.pt", *back)


@pytest.mark.parametrize("flags", [["--data", "book.txt"], ["--level", "word"], ["--shares", "90", "10"]])
def test_what_fastais_files_do_not_say_is_not_asked_for(run, flags):
    run(FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "new.pt")
    assert f"{flags[0]}: not used with --to fastai" in refused(
        run, "new.pt", "--to", "fastai", "--save", "x.pth", "--vocabulary", "x.pkl", *flags)


def test_a_word_whose_new_name_is_taken_keeps_its_own(run):
    """Here <unk> is a word of its own, and xxunk is not <unk>."""
    words = ["<unk>" if word == "xxpad" else word for word in WORDS]
    assert "xxunk" in words
    torch.save(fastai_model()[1], "in.pth")
    Path("itos.pkl").write_bytes(pickle.dumps(words))
    out = run("in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt")[1]
    assert "the word xxunk keeps its name, since there is a word <unk>" in out
    assert restored()[1]["vocabulary"] == words
    assert "keeps its name" not in run("in.pth", "--vocabulary", "itos.pkl", "--unk", "<unk>", "--save", "again.pt")[1]


def test_other_commands_take_converted_models(run, train, tmp_path, capsys):
    train(tmp_path / "m.pt", "--epochs", "1")
    status, _, err = run("m.pt", "--to", "fastai", "--save", "x.pth", "--vocabulary", "x.pkl")
    assert status == 0, err
    run("x.pth", "--vocabulary", "x.pkl", "--save", "new.pt", "--data", "corpus")
    pointer.main(["--no-cuda", "--save", "new.pt", "--window", "9"])
    there = capsys.readouterr().out
    pointer.main(["--no-cuda", "--save", "m.pt", "--window", "9"])
    assert there == capsys.readouterr().out
    generate.main(["--no-cuda", "--checkpoint", "new.pt", "--words", "5", "--outf", "-"])
    assert finetune.main(["--no-cuda", "--save", "new.pt", "--epochs", "1", "--batch_size", "4"]) in (0, None)


def test_a_model_without_eos_says_that_the_ends_of_lines_are_unk(run, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", 13)
    for flags, said in ((["--eos", "xxbos"], 0), ([], 1)):
        status, out, err = run(FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "new.pt", "--overwrite",
                               "--data", corpus, *flags)
        assert status == 0, err
        assert out.count("no word is <eos>") == said
        pointer.main(["--no-cuda", "--save", "new.pt", "--window", "9"])
        assert capsys.readouterr().out.count("the ends of lines among them") == said


def test_a_new_line_may_be_the_word_that_ends_a_line(run):
    words = [*words_of(ITOS)[:3], "\n", *words_of(ITOS)[4:]]
    Path("itos.pkl").write_bytes(pickle.dumps(words))
    _, out, _ = run(FOREIGN / "fastai_lstm.pth", "--vocabulary", "itos.pkl", "--save", "new.pt", "--eos", "\n")
    assert "the word '\\n' is <eos>\n" in out
    run("new.pt", "--to", "fastai", "--save", "x.pth", "--vocabulary", "x.pkl", "--eos", "\n")
    assert words_of("x.pkl") == words


def test_a_text_of_a_model_without_eos_begins_after_xxbos(run, capsys):
    run(FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "new.pt")
    scores = []
    for text, flags in (("w1 w2 w3", []), ("xxbos w1 w2 w3", ["--carry"])):
        Path("lines.txt").write_text(text)
        score.main(["--no-cuda", "--checkpoint", "new.pt", "--no-eos", "lines.txt", *flags])
        scores.append(capsys.readouterr().out)
    assert scores[0] == scores[1]
    flags = ["--no-cuda", "--checkpoint", "new.pt", "--words", "9", "--outf", "-", "--temperature", "0"]
    generate.main(flags)
    text = capsys.readouterr().out
    generate.main([*flags, "--prompt", "xxbos"])
    assert capsys.readouterr().out == f"xxbos {text}"


def test_a_model_without_eos_scores_no_end_of_a_line(run, capsys):
    """It would be scored as <unk>."""
    run(FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "new.pt")
    Path("lines.txt").write_text("w1 w2\n")
    flags = ["--no-cuda", "--checkpoint", "new.pt", "lines.txt"]
    with pytest.raises(BadInput, match="has no <eos> to end a line with; --no-eos scores without"):
        score.main(flags)
    capsys.readouterr()
    score.main([*flags, "--no-eos"])
    assert capsys.readouterr().out.split("\t")[1] == "2"


def test_a_model_without_eos_cannot_stop_there(run):
    run(FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "new.pt")
    with pytest.raises(BadInput, match="has no <eos>"):
        generate.main(["--no-cuda", "--checkpoint", "new.pt", "--outf", "-", "--stop-at-eos"])


@pytest.mark.parametrize("script", [main, finetune])
def test_a_model_without_a_state_cannot_be_resumed_but_tuned(run, script):
    run(FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "new.pt")
    with pytest.raises(BadInput, match="finetune.py --load new.pt"):
        script.main(["--no-cuda", "--resume", "new.pt"])


# --- refused, in one line --------------------------------------------------------------------------------------------

def test_what_is_missing_or_lies_there_already(run, tmp_path):
    lstm, fastai = FOREIGN / "original_lstm.pt", FOREIGN / "fastai_lstm.pth"
    assert "--data says where" in refused(run, lstm, "--save", "new.pt")
    assert "--vocabulary says where" in refused(run, fastai, "--save", "new.pt")
    assert "cannot be written" in refused(run, fastai, "--vocabulary", ITOS, "--save", "none/new.pt")
    assert "none.pt" in refused(run, "none.pt", "--save", "new.pt")
    assert "12 words, the model has 201" in refused(run, lstm, "--save", "new.pt", "--data",
                                                   write_corpus(tmp_path / "corpus", 12))
    assert "no pickled list" in refused(run, fastai, "--vocabulary", lstm, "--save", "new.pt")
    torch.save({"some": torch.zeros(3)}, "some.pt")
    assert "neither" in refused(run, "some.pt", "--vocabulary", ITOS, "--save", "new.pt")
    assert "goes to --vocabulary" in refused(run, ITOS, "--vocabulary", ITOS, "--save", "new.pt")
    run(fastai, "--vocabulary", ITOS, "--save", "new.pt")
    assert "--overwrite" in refused(run, fastai, "--vocabulary", ITOS, "--save", "new.pt")
    assert "already" in refused(run, "new.pt", "--save", "other.pt")
    assert "to convert" in refused(run, "new.pt", "--save", "new.pt", "--overwrite")
    back = ["new.pt", "--to", "fastai", "--save", "x.pth", "--vocabulary"]
    assert "--vocabulary" in refused(run, *back[:-1])
    assert "another of the files" in refused(run, *back, "x.pth")
    assert "another of the files" in refused(run, *back, "new.pt", "--overwrite")
    run(*back, "x.pkl")
    assert "--overwrite" in refused(run, *back, "y.pkl")
    assert run(*back, "x.pkl", "--overwrite")[0] == 0
    assert "not a checkpoint of this toolkit" in refused(run, lstm, *back[1:], "y.pkl", "--overwrite")


class TextLearner:
    pass


def test_other_files_of_fastais_are_told_what_they_are(run):
    state = fastai_model()[1]
    encoder = {name.removeprefix("0."): value for name, value in state.items() if name.startswith("0.")}
    classifier = {f"0.module.{name}": value for name, value in encoder.items()} | {"1.layers.0.0.weight": torch.ones(3)}
    both = state | {"0.rnns.0.module.weight_ih_l0_reverse": state["0.rnns.0.module.weight_ih_l0"]}
    for thing, why in ((encoder, "an encoder"), (classifier, "a classifier"), ({"model": classifier}, "a classifier"),
                       (both, "bidirectional"), (TextLearner(), "learn.save"), (WORDS, "goes to --vocabulary")):
        torch.save(thing, "in.pth")
        assert why in refused(run, "in.pth", "--vocabulary", ITOS, "--save", "new.pt")


@pytest.mark.parametrize("flags, why", [
    (["--eos", "nothere"], "--eos nothere: "), (["--unk", "nothere"], "--unk nothere: "),
    (["--eos", "xxunk"], "that word is <unk>"), (["--eos", "\n\n"], r"--eos '\n\n': ")])
def test_a_word_that_the_vocabulary_does_not_have(run, flags, why):
    assert why in refused(run, FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "new.pt", *flags)


def test_a_model_of_fastai_is_one_of_words(run):
    arguments = [FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "new.pt", "--level"]
    assert "--level byte: a model of fastai is one of words" in refused(run, *arguments, "byte")
    assert run(*arguments, "word")[0] == 0
    assert checkpoint.load("new.pt")["flags"]["level"] == "word"


def test_nothing_is_left_of_the_run_that_a_converted_model_takes_the_place_of(run, train, tmp_path):
    """Its state would be resumed from, and its record would have the new model's scores, as if they were one run."""
    train(tmp_path / "m.pt", "--epochs", "1")
    assert (tmp_path / "m.last.pt").exists()
    assert run(FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "m.pt", "--overwrite")[0] == 0
    assert [path.name for path in tmp_path.glob("m.*")] == ["m.pt"]


def test_no_second_word_is_eos(run):
    Path("itos.pkl").write_bytes(pickle.dumps([*words_of(ITOS)[:-1], "<eos>"]))
    why = refused(run, FOREIGN / "fastai_lstm.pth", "--vocabulary", "itos.pkl", "--save", "new.pt", "--eos", "xxbos")
    assert "has the word <eos> already" in why


@pytest.mark.parametrize("words, why", [
    (WORDS[:-1], "12 words"), ([*WORDS[:-1], "xxunk"], "twice"), ([*WORDS[:-1], 1], "no pickled list"),
    ([*WORDS[:-1], "\ud800"], "damaged"), ({}, "no pickled list"), ([], "no pickled list"),
    (TextLearner(), "list(dls.vocab)"), ({"w": 0}, "but a dict"), ([WORDS, ["neg", "pos"]], "list(dls.vocab[0])"),
])
def test_a_vocabulary_that_is_none(run, words, why):
    torch.save(fastai_model()[1], "in.pth")
    Path("itos.pkl").write_bytes(pickle.dumps(words))
    assert why in refused(run, "in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt")


@pytest.mark.parametrize("name, value", [
    ("0.rnns.0.weight_hh_l0_raw", torch.zeros(5, 6)), ("0.rnns.1.module.weight_ih_l0", torch.zeros(3)),
    ("1.decoder.bias", torch.zeros(V + 1)), ("0.encoder.weight", torch.zeros(())), ("1.decoder.weight", 7),
    ("0.rnns.1.module.bias_hh_l0", torch.zeros(4 * E, dtype=torch.int64)), ("0.rnns.7.x", torch.zeros(1)),
    ("0.encoder.weight", torch.zeros(V, 0)), ("0.rnns.0.weight_hh_l0_raw", None),
])
def test_weights_that_do_not_fit(run, name, value):
    torch.save(fastai_model()[1] | {name: value}, "in.pth")
    Path("itos.pkl").write_bytes(pickle.dumps(WORDS))
    refused(run, "in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt")
