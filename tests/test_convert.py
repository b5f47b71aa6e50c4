"""Models of other toolkits compute here what they computed there, go back bit for bit, and run no code."""

import json
import pickle
import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers import files
from torch import nn

import checkpoint
import containers
from data import Corpus
from steps import evaluate
from utils import batchify

REFERENCE = Path(__file__).parent / "reference"
FOREIGN, CORPUS = REFERENCE / "foreign", REFERENCE / "corpus"
ORIGINAL = json.loads((FOREIGN / "original.json").read_text())
FASTAI = json.loads((FOREIGN / "fastai.json").read_text())
ITOS = FOREIGN / "fastai_itos.pkl"
TOLERANCE = 1e-5


@pytest.fixture
def run(run_converter):
    return run_converter


def refused(run, *arguments, memory=None):
    """The line with which convert.py refuses its arguments, having changed nothing, in `memory` bytes."""
    before = files(Path.cwd())
    if memory:
        tracemalloc.start()
    status, _, err = run(*arguments)
    if memory:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < memory
    assert (status, err.count("\n")) == (2, 1), (status, err)
    assert err.startswith("convert.py: error: ")
    assert len(err) < 500
    assert files(Path.cwd()) == before
    return err


def restored(path="new.pt"):
    content = checkpoint.load_model(path)
    return checkpoint.restore_model(content, path).eval(), content


def words_of(path):
    return pickle.loads(Path(path).read_bytes())


# --- equal to what others computed -----------------------------------------------------------------------------------

@pytest.mark.parametrize("known", ORIGINAL, ids=lambda known: known["model"])
def test_a_model_of_the_original_has_its_test_loss(run, known):
    status, out, _ = run(FOREIGN / known["file"], "--data", CORPUS, "--save", "new.pt")
    assert status == 0
    model, content = restored()
    assert {name: content["flags"][name] for name in ("model", "emsize", "nhid", "nlayers", "tied")}.items() \
        <= known.items()
    assert ("averaged weights of ASGD are those in the model" in out) == (known["model"] != "GRU")
    test = batchify(Corpus(CORPUS).test, 1)
    assert abs(evaluate(model, test, 70) - known["test_loss"]) < TOLERANCE


def test_the_dropouts_of_the_original_travel(run):
    run(FOREIGN / "original_lstm.pt", "--data", CORPUS, "--save", "new.pt")
    flags = checkpoint.load("new.pt")["flags"]
    assert [flags[name] for name in ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")] == [0.4, 0.25, 0.4, 0.1,
                                                                                                 0.5]
    assert (flags["data"], flags["level"]) == (str(CORPUS), "word")


def test_a_model_of_fastai_gets_the_dropouts_of_fastais_language_models(run):
    """Those of its `awd_lstm_lm_config`, which its files do not hold."""
    run(FOREIGN / "fastai_lstm.pth", "--vocabulary", ITOS, "--save", "new.pt")
    flags = checkpoint.load("new.pt")["flags"]
    assert [flags[name] for name in ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")] == [0.1, 0.15, 0.25,
                                                                                                 0.02, 0.2]


def test_the_originals_averages_are_in_its_model():
    contents = containers.read(FOREIGN / "original_lstm.pt")
    state = contents.root[2].state["state"]
    assert len(state) == 10
    for weight, kept in state.items():
        assert torch.equal(contents.tensor(weight), contents.tensor(kept["ax"]))


@pytest.mark.parametrize("file", ["fastai_lstm.pth", "fastai_lstm_with_opt.pth"])
def test_a_model_of_fastai_has_its_loss_and_probabilities(run, file):
    assert run(FOREIGN / file, "--vocabulary", ITOS, "--save", "new.pt")[0] == 0
    model, content = restored()
    words = ["<unk>" if word == "xxunk" else word for word in FASTAI["tokens"]]
    tokens = torch.tensor([content["vocabulary"].index(word) for word in words]).unsqueeze(1)
    with torch.no_grad():
        output, _, _ = model(tokens, model.init_hidden(1))
        assert abs(model.loss(output[:-1], tokens[1:]).item() - FASTAI["loss"]) < TOLERANCE
        last = model.logprob(output[-1, 0])
    assert (last - torch.tensor(FASTAI["last_logprobs"])).abs().max() < TOLERANCE


# --- models made here, in the forms of other toolkits ----------------------------------------------------------------

V, E, H = 13, 4, 6
WORDS = ["xxunk", "xxpad", "xxbos", "xxeos", *(f"w{i}" for i in range(6)), *["xxfake"] * 3]


def fastai_model(tied=True, layers=2):
    """Embedding, LSTMs and softmax as fastai has them, and their state dict."""
    torch.manual_seed(layers)
    sizes = [E] + [H] * (layers - 1) + [E]
    encoder, decoder = nn.Embedding(V, E), nn.Linear(E, V)
    lstms = [nn.LSTM(n, m) for n, m in zip(sizes, sizes[1:])]
    if tied:
        decoder.weight = encoder.weight
    state = {"0.encoder.weight": encoder.weight.data, "0.encoder_dp.emb.weight": encoder.weight.data}
    for number, lstm in enumerate(lstms):
        state[f"0.rnns.{number}.weight_hh_l0_raw"] = lstm.weight_hh_l0.data
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            state[f"0.rnns.{number}.module.{name}"] = getattr(lstm, name).data
    state |= {"1.decoder.weight": decoder.weight.data, "1.decoder.bias": decoder.bias.data}
    return (encoder, lstms, decoder), state


def logits_of(modules, tokens):
    encoder, lstms, decoder = modules
    output = encoder(tokens)
    for lstm in lstms:
        output, _ = lstm(output)
    return decoder(output)


def with_dropped_copies(state):
    return state | {f"0.rnns.{layer}.module.weight_hh_l0": state[f"0.rnns.{layer}.weight_hh_l0_raw"] * 2
                    for layer in range(2)}


def raw_in_module(state):
    return {name.replace(".weight_hh_l0_raw", ".module.weight_hh_l0_raw"): value for name, value in state.items()}


def without_raw(state):
    return {name.replace(".weight_hh_l0_raw", ".module.weight_hh_l0"): value for name, value in state.items()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", [dict, with_dropped_copies, raw_in_module, without_raw,
                                  lambda state: {"model": state, "opt": {"state": [], "hypers": [{"lr": 1e-3}]}}])
@torch.no_grad()
def test_every_form_of_fastais_file_gives_its_logits(run, form, tied, zipped):
    modules, state = fastai_model(tied)
    torch.save(form(state), "in.pth", _use_new_zipfile_serialization=zipped)
    Path("itos.pkl").write_bytes(pickle.dumps(WORDS))
    assert run("in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt")[0] == 0
    model, content = restored()
    assert content["flags"]["tied"] is tied
    tokens = torch.randint(V, (9, 2))
    output, _, _ = model(tokens, model.init_hidden(2))
    logprob = logits_of(modules, tokens).log_softmax(-1)
    torch.testing.assert_close(model.logprob(output), logprob, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_fastais_model_without_a_softmax_bias(run):
    modules, state = fastai_model()
    modules[2].bias.zero_()
    del state["1.decoder.bias"]
    torch.save(state, "in.pth")
    Path("itos.pkl").write_bytes(pickle.dumps(WORDS))
    assert "no softmax bias" in run("in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt")[1]
    model, _ = restored()
    tokens = torch.randint(V, (9, 2))
    output, _, _ = model(tokens, model.init_hidden(2))
    torch.testing.assert_close(model.logprob(output), logits_of(modules, tokens).log_softmax(-1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(run, value):
    state = fastai_model()[1]
    state["0.rnns.1.module.bias_ih_l0"][3] = value
    torch.save(state, "in.pth")
    Path("itos.pkl").write_bytes(pickle.dumps(WORDS))
    assert "rnns.1.bias_ih_l0 has values that are not finite" in refused(
        run, "in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt")


def test_words_are_mapped_as_asked_and_the_others_kept(run):
    torch.save(fastai_model()[1], "in.pth")
    Path("itos.pkl").write_bytes(pickle.dumps(tuple(WORDS), protocol=0))
    run("in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt")
    assert checkpoint.load("new.pt")["vocabulary"] == ["<unk>", *WORDS[1:]]
    flags = ["--unk", "xxpad", "--eos", "xxeos"]
    run("in.pth", "--vocabulary", "itos.pkl", "--save", "new.pt", "--overwrite", *flags)
    assert checkpoint.load("new.pt")["vocabulary"] == ["xxunk", "<unk>", "xxbos", "<eos>", *WORDS[4:]]
    run("new.pt", "--to", "fastai", "--save", "x.pth", "--vocabulary", "x.pkl", *flags)
    assert words_of("x.pkl") == WORDS


# The original's form, from classes of this file: its own are not needed, since only what they hold is looked at.

class Dropping(nn.Module):
    """A module whose weight is dropped, as the original wraps it."""

    def __init__(self, module, name, dropout):
        super().__init__()
        self.module, self.dropout = module, dropout
        weight = module._parameters.pop(name)
        module.register_parameter(f"{name}_raw", nn.Parameter(weight.data))
        setattr(module, name, weight.data * 2)


class Model(nn.Module):
    def __init__(self, words, tied, wdrop):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(words, E), nn.Linear(E if tied else H, words)
        self.rnns = nn.ModuleList([nn.LSTM(E, H), nn.LSTM(H, E if tied else H)])
        if tied:
            self.decoder.weight = self.encoder.weight
        if wdrop:
            self.rnns = nn.ModuleList(Dropping(rnn, "weight_hh_l0", wdrop) for rnn in self.rnns)
        self.dropout, self.nhid = 0.7, H


class Criterion(nn.Module):
    def __init__(self, splits):
        super().__init__()
        self.splits = [0, *splits, 100_000_000]
        if splits:
            self.tail_vectors = nn.Parameter(torch.randn(len(splits), E))
            self.tail_bias = nn.Parameter(torch.randn(len(splits)))


def save_original(path, words, splits=(), tied=True, wdrop=0.5, **how):
    torch.manual_seed(1)
    model, criterion = Model(words, tied, wdrop), Criterion(splits)
    optimizer = torch.optim.SGD(model.parameters(), 1)
    torch.save([model, criterion, optimizer], path, **how)
    return model, criterion


def write_corpus(folder, words):
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(" ".join(f"w{i}" for i in range(words - 1)) + "\n")
    return folder


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wdrop", [0.5, 0])
@pytest.mark.parametrize("tied", [True, False])
def test_the_original_tied_or_not_dropped_or_not_in_both_containers(run, tmp_path, tied, wdrop, zipped):
    saved, _ = save_original("old.pt", V, tied=tied, wdrop=wdrop, _use_new_zipfile_serialization=zipped)
    corpus = write_corpus(tmp_path / "corpus", V)
    assert run("old.pt", "--data", corpus, "--save", "new.pt")[0] == 0
    model, content = restored()
    assert [content["flags"][name] for name in ("tied", "wdrop", "dropout", "nhid")] == [tied, wdrop, 0.7, H]
    weights = {name.replace(".module.", ".").removesuffix("_raw"): value for name, value in saved.state_dict().items()}
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("given", [["--level", "char"], []])
def test_a_model_of_characters_is_one_of_characters_here(run, tmp_path, given):
    """Its vocabulary is that of the corpus at that level, which a command or the folder says, and stays with it."""
    corpus = write_corpus(tmp_path / "corpus", V)
    for split in ("train", "valid", "test"):
        (corpus / f"{split}.txt").write_text("abcdefghijkl\n")
    (corpus / "level").write_text("word" if given else "char")
    save_original("old.pt", V)
    assert run("old.pt", "--data", corpus, "--save", "new.pt", *given)[0] == 0
    content = checkpoint.load("new.pt")
    assert content["flags"]["level"] == "char"
    assert content["vocabulary"] == [*"abcdefghijkl", "<eos>"]


@pytest.mark.parametrize("flags, line", [
    ("--unk UNK", "--unk: goes with models of fastai"), ("--eos xxbos", "--eos: goes with models of fastai"),
    ("--vocabulary words.pkl", "--vocabulary: goes with models of fastai"),
    ("--shares 80 10 10", "--shares cuts one text file: the folder corpus has its own splits")])
def test_a_flag_that_would_do_nothing_for_the_originals_model_is_refused(run, tmp_path, flags, line):
    write_corpus(tmp_path / "corpus", V)
    save_original("old.pt", V)
    assert line in refused(run, "old.pt", "--data", "corpus", "--save", "new.pt", *flags.split())


class Gates(nn.Module):
    """A QRNN layer as the original has it: all its weights are in `linear`."""

    def __init__(self, inputs, units, zoneout, output_gate):
        super().__init__()
        self.linear, self.zoneout, self.output_gate = nn.Linear(inputs, 3 * units), zoneout, output_gate


@pytest.mark.parametrize("zoneout, output_gate, taken", [(0, True, True), (0.1, True, False), (0, False, False)])
def test_a_qrnn_that_computes_something_else_is_refused(run, tmp_path, zoneout, output_gate, taken):
    model, _ = save_original("old.pt", V)
    model.rnns = nn.ModuleList([Gates(2 * E, H, 0, True), Gates(H, E, zoneout, output_gate)])
    torch.save(model, "old.pt")
    arguments = ["old.pt", "--data", write_corpus(tmp_path / "corpus", V), "--save", "new.pt"]
    if taken:
        assert run(*arguments)[0] == 0
        weights = checkpoint.load("new.pt")["model"]
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    else:
        assert "a QRNN with zoneout, or without an output gate" in refused(run, *arguments)


@pytest.mark.parametrize("value, kept", [(0, 0), (0.999, 0.999), (1.0, 0.4), (-0.1, 0.4), (True, 0.4), ("0.3", 0.4),
                                         (float("nan"), 0.4)])
def test_a_dropout_that_no_flag_can_have_is_left_at_its_default(run, tmp_path, value, kept):
    model, _ = save_original("old.pt", V)
    model.dropout = value
    torch.save(model, "old.pt")
    assert run("old.pt", "--data", write_corpus(tmp_path / "corpus", V), "--save", "new.pt")[0] == 0
    assert checkpoint.load("new.pt")["flags"]["dropout"] == kept


def test_the_model_alone_is_enough(run, tmp_path):
    model, _ = save_original("old.pt", V)
    torch.save(model, "old.pt")
    assert run("old.pt", "--data", write_corpus(tmp_path / "corpus", V), "--save", "new.pt")[0] == 0


@pytest.mark.slow
def test_the_split_softmax_of_the_original_keeps_its_tails(run, tmp_path):
    words = 76_010
    _, criterion = save_original("old.pt", words, [2800, 20_000, 76_000])
    corpus = write_corpus(tmp_path / "corpus", words)
    assert run("old.pt", "--data", corpus, "--save", "new.pt")[0] == 0
    weights = checkpoint.load("new.pt")["model"]
    assert torch.equal(weights["softmax.tail_vectors"], criterion.tail_vectors)
    assert torch.equal(weights["softmax.tail_bias"], criterion.tail_bias)
    assert "split softmax" in refused(run, "new.pt", "--to", "fastai", "--save", "x.pth", "--vocabulary", "x.pkl")
    save_original("old.pt", words, [2800, 20_000])
    assert "split" in refused(run, "old.pt", "--data", corpus, "--save", "other.pt")
