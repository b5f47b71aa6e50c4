"""Text is sampled from the model's own distribution, and written whole."""

import math

import pytest
import torch
from helpers import write

import generate
from errors import BadInput
from model import RNNModel
from products import packs_bf16
from text import detokenize, tokenize
from utils import map_hidden
from vocabulary import Dictionary


@pytest.fixture
def model():
    torch.manual_seed(2)
    model = RNNModel(6, emsize=5, nhid=6, nlayers=2)
    with torch.no_grad():
        model.encoder.weight.mul_(10)  # far from uniform
    return model


def distribution(model, context):
    model.eval()
    with torch.no_grad():
        output, _, _ = model(context.unsqueeze(1), model.init_hidden(1))
        return model.logprob(output[-1, 0])


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 0), (2.0, 0), (1.0, 2), (0.7, 100)])
def test_words_follow_the_models_softmax(model, temperature, top_k):
    context = torch.tensor([3, 1, 4])
    expected = torch.softmax(distribution(model, context) / temperature, 0)
    if top_k == 2:
        kept = expected.argsort()[-2:]
        expected = torch.zeros(6).index_copy(0, kept, expected[kept] / expected[kept].sum())
    torch.manual_seed(0)
    first = torch.tensor([next(generate.sample(model, context, 1, temperature, top_k))[0] for _ in range(3000)])
    torch.testing.assert_close(first.bincount(minlength=6) / 3000, expected, atol=0.03, rtol=0)


def test_each_word_is_sampled_after_all_words_before_it(model):
    """With only the likeliest word to choose, the text is the greedy one, computed from the whole context each time."""
    context = torch.tensor([3, 1])
    sampled = [word for (word,) in generate.sample(model, context, 8, top_k=1)]
    for _ in range(8):
        context = torch.cat([context, distribution(model, context).argmax().unsqueeze(0)])
    assert sampled == context[2:].tolist()


def test_text_has_the_words_asked_for_and_a_line_for_each_sentence(trained, tmp_path, capsys):
    out = tmp_path / "text.txt"
    arguments = ["--no-cuda", "--checkpoint", str(trained), "--words", "70", "--prompt", "the cat"]
    generate.main([*arguments, "--log-interval", "20", "--outf", str(out)])
    text = out.read_text()
    assert capsys.readouterr().out.count("| generated") == 3
    assert len(text.split()) == 72
    assert text.startswith("the cat ")
    assert text.endswith("\n")
    assert all(line.split()[-1] == "<eos>" for line in text.splitlines()[:-1])
    generate.main([*arguments, "--outf", "-"])
    assert capsys.readouterr().out == text, "a seed gives the same text"
    generate.main([*arguments, "--outf", "-", "--seed", "2"])
    assert capsys.readouterr().out != text, "another one another"


@pytest.mark.parametrize("level", ["word", "char"])
def test_texts_of_a_batch_are_texts_of_their_own(train, tmp_path, level):
    out = tmp_path / "text.txt"
    train(tmp_path / "m.pt", "--epochs", "1", "--level", level)
    generate.main(["--no-cuda", "--checkpoint", str(tmp_path / "m.pt"), "--words", "30", "--batch", "3",
                   "--prompt", "the cat", "--top-k", "5", "--outf", str(out)])
    text = out.read_text()
    if level == "word":
        assert [len(part.split()) for part in text.split("\n\n")] == [32] * 3
        assert len(set(text.split("\n\n"))) == 3
    else:
        assert len(text) == 3 * len("the cat") + 3 * 30 + 2 * len("\n\n")
    assert text.startswith("the cat")
    assert text.count("\n\nthe cat") == 2


@pytest.mark.skipif(not packs_bf16(), reason="this CPU has no instructions for bfloat16")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "QRNN"])
@pytest.mark.parametrize("splits", [(), (20, 40)])
def test_a_packed_model_reads_no_large_matrix_but_packed_ones(kind, splits):
    torch.manual_seed(1)
    model = RNNModel(60, model=kind, emsize=32, nhid=48, nlayers=2, splits=splits).eval()
    for parameter in (model.encoder.weight, *model.softmax.parameters()):
        torch.nn.init.normal_(parameter)
    embedded, hidden = torch.randn(1, 3, 32), map_hidden(torch.randn_like, model.init_hidden(3))

    @torch.no_grad()
    def scores():
        output, _, _ = model.recur(embedded, hidden)
        return model.logprob(output)

    exact = scores()
    model.pack()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name != "softmax.tail_vectors":
                parameter.zero_()
    error = (scores() - exact).norm() / exact.std() / exact.numel()**0.5
    assert 1e-5 < error < 0.02


@pytest.mark.skipif(not packs_bf16(), reason="this CPU has no instructions for bfloat16")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "QRNN"])
def test_a_packed_model_goes_on_from_a_prompt_and_leaves_gradients_alone(kind):
    torch.manual_seed(1)
    model = RNNModel(60, model=kind, emsize=32, nhid=48, nlayers=2).eval()
    words = torch.randint(60, (5, 3))

    def scores():
        _, hidden, _ = model(words, model.init_hidden(3))
        output, _, _ = model(words[:1], hidden)
        return model.logprob(output)

    exact = scores()
    model.pack()
    assert torch.equal(scores(), exact)
    assert exact.requires_grad
    with torch.no_grad():
        error = (scores() - exact).norm() / exact.norm()
    assert 1e-7 < error < 1e-3


@pytest.mark.parametrize("able", [True, False])
def test_precision_bf16_packs_the_model_where_the_cpu_can_or_says_so(trained, capsys, monkeypatch, able):
    packed = []
    monkeypatch.setattr(generate, "packs_bf16", lambda: able)
    monkeypatch.setattr(RNNModel, "pack", lambda model: packed.append(model))
    arguments = ["--no-cuda", "--checkpoint", str(trained), "--words", "40", "--outf", "-"]
    capsys.readouterr()
    generate.main(arguments)
    text = capsys.readouterr().out
    assert not packed
    generate.main([*arguments, "--precision", "bf16"])
    captured = capsys.readouterr()
    assert len(packed) == able
    assert captured.out == text
    notice = "--precision bf16: for x86 CPUs with instructions for it; writing in fp32\n"
    assert captured.err == ("" if able else notice)


def test_texts_of_a_batch_in_bfloat16(trained, capsys):
    capsys.readouterr()
    generate.main(["--no-cuda", "--checkpoint", str(trained), "--words", "30", "--batch", "3", "--prompt", "the cat",
                   "--precision", "bf16", "--outf", "-"])
    texts = capsys.readouterr().out.split("\n\n")
    assert [len(text.split()) for text in texts] == [32] * 3
    assert len(set(texts)) == 3


def test_a_sampled_column_has_the_probability_of_its_weight():
    torch.manual_seed(0)
    weights = torch.tensor([[0.0, 2, 0, 1, 5, 0], [3, 0, 0, 0, 0, 1]], dtype=torch.double)
    drawn = torch.cat([generate.sample_rows(weights) for _ in range(4000)], 1)
    for row, weight in zip(drawn, weights):
        torch.testing.assert_close(row.bincount(minlength=6) / 4000, (weight / weight.sum()).float(), atol=0.03, rtol=0)
        assert set(row.tolist()) == set(weight.nonzero().flatten().tolist())
    for row in ([1.0, math.nan], [0.0, 0.0]):  # with temperature 0 no score that is NaN is the largest
        with pytest.raises(BadInput, match="no finite probabilities"):
            generate.sample_rows(torch.tensor([row]))


@pytest.mark.parametrize("top_p, kept", [(1e-9, [1]), (0.5, [1]), (0.51, [1, 3]), (0.75, [1, 3]), (1.0, [0, 1, 3, 4])])
def test_a_nucleus_is_the_fewest_words_that_have_the_share_together(top_p, kept):
    """Shares of 1/8, 4/8, 0, 2/8 and 1/8, and a word that has all."""
    weights = torch.tensor([[1.0, 4, 0, 2, 1], [0, 0, 8, 0, 0]])
    expected = torch.zeros_like(weights)
    expected[0, kept], expected[1, 2] = weights[0, kept], 8
    assert torch.equal(generate.nucleus(weights, top_p), expected)


def test_words_outside_of_the_nucleus_or_never_to_be_drawn_are_not_drawn(model):
    """The likeliest word is forbidden. The next two have just the share of what is left."""
    context = torch.tensor([3, 1, 4])
    likeliest, second, third, *_ = distribution(model, context).argsort(descending=True).tolist()
    p = distribution(model, context).double().exp()
    share = ((p[second] + p[third]) / (1 - p[likeliest])).item()
    for top_p, expected in ((share - 1e-4, {second, third}), (share + 1e-4, set(range(6)) - {likeliest})):
        torch.manual_seed(0)
        (drawn,) = generate.sample(model, context, 1, batch_size=3000, top_p=top_p, never=[likeliest])
        assert {second, third} <= set(drawn) <= expected
        assert (set(drawn) == {second, third}) == (top_p < share)


@pytest.mark.parametrize("flag", ["--top-p", "--temperature"])
def test_next_to_nothing_takes_the_likeliest_word_each_time(trained, capsys, flag):
    texts = []
    for flags in ([flag, "1e-9"], ["--top-k", "1"]):
        capsys.readouterr()
        write(trained, *flags, "--words", "20")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("flags, written", [([], True), (["--no-unk"], False)])
def test_no_unk_writes_none_where_every_other_word_would_be_one(train, tmp_path, capsys, flags, written):
    (tmp_path / "book.txt").write_text("<unk> cat <unk> sat\n" * 200)
    train(tmp_path / "m.pt", "--epochs", "1", "--data", str(tmp_path / "book.txt"))
    capsys.readouterr()
    write(tmp_path / "m.pt", "--words", "100", *flags)
    assert ("<unk>" in capsys.readouterr().out) == written


def test_texts_that_stop_at_eos_are_those_that_go_on_up_to_there(trained, capsys):
    texts = []
    for flags in ([], ["--stop-at-eos"]):
        capsys.readouterr()
        write(trained, "--words", "80", "--batch", "3", *flags)
        texts.append(capsys.readouterr().out)
    cut = [text.partition("<eos>\n")[0] + "<eos>\n" for text in texts[0].split("\n\n")]
    assert len({len(text) for text in cut}) > 1
    assert texts[1] == "\n".join(cut)


def test_unknown_prompt_words():
    assert generate.encode(["a", "zebra"], Dictionary(["a", "<unk>"])) == [0, 1]
    with pytest.raises(BadInput, match="does not include 'zebra'"):
        generate.encode(["a", "zebra"], Dictionary(["a", "b"]))
    assert generate.encode([], Dictionary(["a", "<eos>"])) == [1]


@pytest.mark.parametrize("words, start", [(["a", "xxbos", "<eos>"], 2), (["a", "<unk>", "xxbos"], 2), (["a", "b"], 0)])
def test_a_text_begins_after_the_end_of_a_line_or_else_as_fastais_do(words, start):
    assert generate.encode([], Dictionary(words)) == [start]


@pytest.mark.parametrize("level, text, tokens", [
    ("word", "a größe <eos>\nb <eos>\n", ["a", "größe", "<eos>", "b", "<eos>"]),
    ("char", "a ö\nb", ["a", " ", "ö", "<eos>", "b"]),
    ("byte", "a ö\n", ["97", "32", "195", "182", "<eos>"]),
])
def test_tokens_and_text_are_inverse(level, text, tokens):
    assert tokenize(text, level) == tokens
    assert "".join(detokenize(tokens, level)) == text


@pytest.mark.parametrize("level", ["char", "byte"])
def test_text_of_characters_and_bytes_goes_on_from_its_prompt(train, tmp_path, capsys, level):
    (tmp_path / "book.txt").write_text("größe\n" * 300)
    train(tmp_path / "m.pt", "--epochs", "1", "--data", str(tmp_path / "book.txt"), "--level", level)
    capsys.readouterr()
    generate.main(["--no-cuda", "--checkpoint", str(tmp_path / "m.pt"), "--words", "40", "--prompt", "grö",
                   "--outf", "-"])
    text = capsys.readouterr().out
    assert text.startswith("grö")
    assert set(text) <= set("größe\n\ufffd")
    assert len(text) == 43 or level == "byte"
    assert "".join(detokenize(["195", "40"], "byte")) == "\ufffd("


def test_a_prompt_that_is_not_text():
    assert tokenize("\udcff", "byte") == ["255"]
    with pytest.raises(BadInput, match="not UTF-8"):
        tokenize("\udcff", "word")


def test_a_prompt_as_windows_writes_it_is_told_what_it_is():
    with pytest.raises(BadInput, match="the prompt is UTF-16, not UTF-8 text: convert it .*Notepad"):
        tokenize("the cat".encode("utf-16"), "word")


@pytest.mark.parametrize("text", ["1", "1.00", "1e0", "0.9"])
def test_top_p_is_a_share_however_it_is_written(text):
    assert generate.parse_flags(["--top-p", text]).top_p == float(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.01", "1e31", "inf", "nan", "all"])
def test_no_other_top_p_is_taken(text):
    with pytest.raises(BadInput, match=f"--top-p: must be a number above 0, at most 1, not '{text}'"):
        generate.parse_flags(["--top-p", text])
