"""Translate models of other toolkits to the names of this one, and back.

Two toolkits are known:

- The original one, which pickled its objects: the model, or a list of model, criterion and optimizer.
- fastai, which saves the state dict of a language model, with or without an optimizer.

They are given as `containers.Contents`. Shapes are in the alphabet of `model.py`.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from errors import BadInput
from model import DROPOUTS
from splitcross import splits_for
from unpickle import Record, Tensor

MAX_LAYERS, MAX_NAME = 999, 100  # more than any model has: a hostile file may claim many
# fastai's own for a language model; its files do not say with which one was trained.
FASTAI_DROPOUTS = {"dropout": 0.1, "dropouth": 0.15, "dropouti": 0.25, "dropoute": 0.02, "wdrop": 0.2}
# Where fastai's versions keep a layer's hidden-to-hidden weight, the raw one before dropped copies.
RAW = ("{}.weight_hh_l0_raw", "{}.module.weight_hh_l0_raw", "{}.module.weight_hh_l0")


@dataclass
class ForeignModel:
    """Hold a model of another toolkit: weights by this toolkit's names, and flags as far as its file says them.

    `source` names the toolkit. `notes` are lines for the log.
    """

    source: str
    weights: dict
    flags: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)


# --- the original toolkit --------------------------------------------------------------------------------------------

def attribute(record, name):
    """Return the attribute `name` of an object of the file, or None."""
    state = record.state if isinstance(record, Record) else None
    return state.get(name) if isinstance(state, dict) else None


def part(record, *names):
    """Return the module that `names` lead to, each within the one before, or None."""
    for name in names:
        modules = attribute(record, "_modules")
        record = modules.get(name) if isinstance(modules, dict) else None
    return record


def parameters(module):
    """Return the parameters of a module by name; the raw weight of weight drop is named as the weight itself."""
    saved = attribute(part(module, "module") or module, "_parameters")
    tensors = {name: value for name, value in (saved.items() if isinstance(saved, dict) else ())
               if isinstance(name, str) and len(name) <= MAX_NAME and isinstance(value, Tensor)}
    raw = {name.removesuffix("_raw"): value for name, value in tensors.items() if name.endswith("_raw")}
    return {name: value for name, value in tensors.items() if not name.endswith("_raw")} | raw


def read_original(contents):
    """Read what the original toolkit saved. Raises BadInput for another object."""
    objects = contents.root if isinstance(contents.root, list) else [contents.root]
    model, criterion, optimizer = [*objects, None, None, None][:3]
    places = {"encoder.weight": parameters(part(model, "encoder")).get("weight")}
    flags = {name: attribute(model, name) for name in (*DROPOUTS, "nhid")} | {"wdrop": 0.0}
    layers = attribute(part(model, "rnns"), "_modules")
    for layer, module in enumerate(list(layers.values())[:MAX_LAYERS] if isinstance(layers, dict) else ()):
        linear = part(module, "linear")  # of a QRNN
        if linear is not None and (attribute(module, "zoneout") or attribute(module, "output_gate") is not True):
            raise BadInput(f"{contents.path}: a QRNN with zoneout, or without an output gate, is not converted")
        dropped, prefix = (module, "") if linear is None else (linear, "linear.")
        for name, value in parameters(dropped).items():
            places[f"rnns.{layer}.{prefix}{name}"] = value
        if part(dropped, "module") is not None:
            flags["wdrop"] = attribute(dropped, "dropout")
    places |= {f"decoder.{name}": parameters(part(model, "decoder")).get(name) for name in ("weight", "bias")}
    tails = parameters(criterion)
    places |= {f"softmax.{name}": tails[name] for name in ("tail_vectors", "tail_bias") if name in tails}
    if not layers or not all(isinstance(value, Tensor) for value in places.values()):
        raise BadInput(f"{contents.path}: an object that is no language model of the original toolkit")
    weights = {name: contents.tensor(value) for name, value in places.items()}
    splits = attribute(criterion, "splits")  # from 0 to a number past the last word
    if tails and not (isinstance(splits, list) and splits[1:-1] == splits_for(len(weights["encoder.weight"]))):
        raise BadInput(f"{contents.path}: its softmax is split where this toolkit does not split that of so many words")
    flags = {name: value for name, value in flags.items() if is_probability(value) or name == "nhid"}
    notes = []
    if isinstance(optimizer, Record):
        name = optimizer.name.rpartition(".")[2]
        averaged = "; the averaged weights of ASGD are those in the model" if name == "ASGD" else ""
        notes = [f"its optimizer, {name:.30}, is left out{averaged}"]
    return ForeignModel("the original toolkit", weights, flags, notes)


def is_probability(value):
    return type(value) in (int, float) and 0 <= value < 1


# --- fastai ----------------------------------------------------------------------------------------------------------

def fastai_state(root):
    """Return the state dict of fastai's language model in the object of a file, or None."""
    if isinstance(root, dict) and isinstance(root.get("model"), dict) and "format" not in root:
        root = root["model"]
    keys = [key for key in root if isinstance(key, str)] if isinstance(root, dict) else []
    return root if any(key.startswith("0.rnns.") for key in keys) else None


def other_kind(root):
    """Recognise a file of fastai that holds no language model; returns what it is and what to do, or None."""
    if isinstance(root, Record):
        is_learner = root.name.rpartition(".")[2].endswith("Learner")
        return "a Learner that was exported; learn.save writes its model" if is_learner else None
    if isinstance(root, list) and root and all(isinstance(word, str) for word in root):
        return "a list of words, which goes to --vocabulary"
    if isinstance(root, dict) and isinstance(root.get("model"), dict):
        root = root["model"]
    keys = [key for key in root if isinstance(key, str)] if isinstance(root, dict) else []
    if any(key.startswith("0.module.rnns.") for key in keys):
        return "a classifier of fastai, whose softmax over words is gone; the language model before it is converted"
    if any(key.startswith("rnns.") for key in keys) and not any("decoder" in key for key in keys):
        return "an encoder of fastai, without its softmax; what learn.save writes of the language model is converted"
    return None


def read_fastai(contents):
    """Read the state dict of fastai's language model with LSTM layers; raises BadInput for any other."""
    state = fastai_state(contents.root)
    if any(isinstance(key, str) and "_reverse" in key for key in state):
        raise BadInput(f"{contents.path}: has bidirectional layers; only those of one direction are converted")

    def tensor(*names):
        for name in names:
            if isinstance(state.get(name), Tensor):
                return contents.tensor(state[name])
        raise BadInput(f"{contents.path}: no language model of fastai with LSTM layers: it lacks {names[0]}")

    weights = {"encoder.weight": tensor("0.encoder.weight")}
    keys = [key for key in state if isinstance(key, str)]
    matches = [re.match(r"0\.rnns\.(\d{1,3})\.", key) for key in keys]
    nlayers = len({int(match[1]) for match in matches if match})
    for layer in range(nlayers):
        raw = [form.format(f"0.rnns.{layer}") for form in RAW]
        weights[f"rnns.{layer}.weight_hh_l0"] = tensor(*raw)
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            weights[f"rnns.{layer}.{name}"] = tensor(f"0.rnns.{layer}.module.{name}")
    weights["decoder.weight"] = tensor("1.decoder.weight")
    has_bias = "1.decoder.bias" in state
    ntoken = len(weights["decoder.weight"])
    weights["decoder.bias"] = tensor("1.decoder.bias") if has_bias else torch.zeros(ntoken)
    if splits_for(ntoken):
        raise BadInput(f"{contents.path}: {ntoken:,} words have a split softmax here, which fastai's model lacks")
    notes = ["its dropouts are not in the file: fastai's own for a language model are kept with it"]
    return ForeignModel("fastai", weights, dict(FASTAI_DROPOUTS), notes + ([] if has_bias else ["no softmax bias: 0"]))


def to_fastai(weights, path):
    """Return fastai's state dict of the weights of this toolkit.

    Raises BadInput when a softmax that is not tied takes more units than the embedding has, and all are in use.
    """
    layers = sum(name.endswith(".weight_hh_l0") for name in weights)
    embedding, last = weights["encoder.weight"], f"rnns.{layers - 1}."
    state = OrderedDict([("0.encoder.weight", embedding), ("0.encoder_dp.emb.weight", embedding)])
    tied = torch.equal(weights["decoder.weight"], embedding)
    emsize, nhid = embedding.size(1), weights[last + "weight_hh_l0"].size(1)
    weights = resized(weights, last, emsize)
    if weights is None:
        raise BadInput(f"{path}: its softmax is not tied and takes {nhid} units; fastai's takes {emsize}, as many as "
                       "the embedding has")
    for layer in range(layers):
        state[f"0.rnns.{layer}.weight_hh_l0_raw"] = weights[f"rnns.{layer}.weight_hh_l0"]
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            state[f"0.rnns.{layer}.module.{name}"] = weights[f"rnns.{layer}.{name}"]
    state["1.decoder.weight"] = embedding if tied else weights["decoder.weight"]
    state["1.decoder.bias"] = weights["decoder.bias"]
    return state


# A softmax that is not tied takes the last layer's H units here, E units in fastai. So the layer is filled up with
# units whose weights are 0. They stay at 0, since an LSTM's state moves by the tanh of a sum that is 0, and they get
# no gradient. On the way back they are left out.

PARAMETERS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")  # of an LSTM layer


def resized(weights, last, nhid):
    """Resize the last layer of LSTM weights, whose names have the prefix `last`, to `nhid` units.

    Units that are added have weights of 0. Returns None where a unit that is left out has others.
    """
    size = weights[last + "weight_hh_l0"].size(1)
    added, result = nhid - size, dict(weights)
    for name in PARAMETERS:
        gates = weights[last + name].unflatten(0, (4, size))
        columns = added if name == "weight_hh_l0" else 0
        padding = (0, columns, 0, added) if gates.dim() == 3 else (0, added)
        result[last + name] = functional.pad(gates, padding).flatten(0, 1)
    result["decoder.weight"] = functional.pad(weights["decoder.weight"], (0, added))
    if added < 0:
        again = resized(result, last, size)
        if not all(torch.equal(again[name], weights[name]) for name in weights):
            return None
    return result
