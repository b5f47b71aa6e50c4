"""Hold the recipes of the papers, each in one place: flags by stage, and what was published.

`reproduce.py` runs them, `speed.py` times their training steps, `docs/recipes.md` shows them as commands.
"""

PTB_LSTM = "--batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epochs 500"
PTB_LSTM_2017 = "--batch_size 20 --data data/penn --dropouti 0.4 --seed 28 --epochs 300"
PTB_QRNN = ("--model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400 --dropouth 0.3 "
            "--dropouti 0.4 --data data/penn")
WT2_LSTM = "--epochs 750 --data data/wikitext-2 --dropouth 0.2 --seed 1882"
WT2_QRNN = ("--epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 --nhid 1550 --nlayers 4 "
            "--seed 4002 --model QRNN --wdrop 0.1 --batch_size 40")
SMALL_LSTM = ("--data data/penn --batch_size 20 --emsize 200 --nhid 400 --dropout 0.2 --dropouth 0.125 --dropouti 0.2 "
              "--dropoute 0.05 --precision bf16 --nonmono 0 --seed 141")
PTB_CACHE = "--lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000"
WT2_CACHE = "--lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000"
PTB_DYNAMIC = "--lr 5e-5 --lamb 0.002 --epsilon 2e-5 --bptt 5 --batch_size 100"
PTB_QRNN_DYNAMIC = "--lr 0.00012 --lamb 0.02 --epsilon 2e-5 --bptt 20 --batch_size 100"
WT2_QRNN_DYNAMIC = "--lr 0.00012 --lamb 0.008 --epsilon 2e-5 --bptt 20 --batch_size 100"
# The settings for this model were not published, only the grid.
WT2_LSTM_DYNAMIC = "--lr 3e-5 4e-5 5e-5 6e-5 7e-5 1e-4 --lamb 0.001 0.002 0.003 0.005 --bptt 5 --batch_size 100 --fast"
# Found on the small model: rates and decays between which its best lies.
SMALL_DYNAMIC = "--lr 2e-4 4e-4 8e-4 --lamb 0.05 0.1 0.2 --bptt 20 --batch_size 100 --fast"
SMALL_BOTH = f"{SMALL_DYNAMIC} --window 500 2000 --theta 0.3 0.66 1 --lambdasm 0.05 0.1 0.2"
GRID = "--window 500 2000 3785 --theta 0.3 0.66 1 1.5 --lambdasm 0.05 0.1 0.15 0.2 0.3"

# Flags by stage, and what was published for train, finetune, cache and dynamic: valid / test perplexity, or test bpc.
# The stage "both" is dynamic evaluation with the cache on top.
RECIPES = {
    "ptb-lstm": {"train": PTB_LSTM, "finetune": PTB_LSTM, "cache": PTB_CACHE,
                 "dynamic": PTB_DYNAMIC, "published": ["61.2 / 58.8", "58.8 / 56.5", "53.2 / 52.5", "51.6 / 51.1"]},
    "ptb-qrnn": {"train": f"{PTB_QRNN} --seed 9001 --epochs 550", "finetune": f"{PTB_QRNN} --seed 404 --epochs 300",
                 "cache": PTB_CACHE, "dynamic": PTB_QRNN_DYNAMIC,
                 "published": ["60.6 / 58.3", "59.1 / 56.7", "53.4 / 52.6", "51.4 / 50.5"]},
    "ptb-lstm-2017": {"train": PTB_LSTM_2017, "finetune": PTB_LSTM_2017, "cache": PTB_CACHE,
                      "dynamic": PTB_DYNAMIC, "published": ["60.7 / 58.8", "60.0 / 57.3", "53.9 / 52.8", ""]},
    "ptbc": {"train": "--epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0 "
                      "--dropouth 0.25 --dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 "
                      "--batch_size 128 --optimizer adam --lr 2e-3 --data data/pennchar --when 300 400",
             "published": ["1.175 bpc"]},
    "wt2-lstm": {"train": WT2_LSTM, "finetune": WT2_LSTM, "cache": WT2_CACHE, "dynamic": WT2_LSTM_DYNAMIC,
                 "published": ["68.7 / 65.6", "67.4 / 64.7", "52.2 / 50.6", "46.4 / 44.3"]},
    "wt2-qrnn": {"train": WT2_QRNN, "finetune": WT2_QRNN, "cache": WT2_CACHE, "dynamic": WT2_QRNN_DYNAMIC,
                 "published": ["69.3 / 66.8", "68.5 / 65.9", "53.6 / 52.1", "45.9 / 44.0"]},
    "enwik8": {"train": "--epochs 50 --nlayers 3 --emsize 400 --nhid 1840 --alpha 0 --beta 0 --dropoute 0 "
                        "--dropouth 0.1 --dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200 "
                        "--batch_size 128 --optimizer adam --lr 1e-3 --data data/enwik8 --when 25 35",
               "published": ["1.232 bpc"]},
    "wt103-qrnn": {"train": "--epochs 14 --nlayers 4 --emsize 400 --nhid 2500 --alpha 0 --beta 0 --dropoute 0 "
                            "--dropouth 0.1 --dropouti 0.1 --dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140 "
                            "--batch_size 60 --optimizer adam --lr 1e-3 --data data/wikitext-103 --when 12 "
                            "--model QRNN",
                   "published": ["32.0 / 33.0"]},
    # No rows of the papers: a fifth of the weights and half the dropouts, with and without weight drop, on two cores.
    "small": {"train": f"{SMALL_LSTM} --wdrop 0.25 --epochs 16", "finetune": f"{SMALL_LSTM} --wdrop 0.25 --epochs 3",
              "cache": PTB_CACHE, "dynamic": SMALL_DYNAMIC, "both": SMALL_BOTH, "published": []},
    "small-no-wdrop": {"train": f"{SMALL_LSTM} --wdrop 0 --epochs 16", "finetune": f"{SMALL_LSTM} --wdrop 0 --epochs 3",
                       "cache": PTB_CACHE, "dynamic": SMALL_DYNAMIC, "both": SMALL_BOTH, "published": []},
}

SAVES = {"ptb-lstm": "PTB.pt", "ptb-qrnn": "PTB.pt", "ptb-lstm-2017": "PTB.pt", "wt2-lstm": "WT2.pt",
         "wt2-qrnn": "WT2.pt", "wt103-qrnn": "WT103.12hr.QRNN.pt", "ptbc": "PTBC.pt", "enwik8": "ENWIK8.pt"}


def commands(name):
    """Spell the commands of a recipe, a line a stage, as a person would type them."""
    recipe, save = RECIPES[name], SAVES.get(name, f"{name}.pt")
    data = recipe["train"].split("--data ")[1].split()[0]
    lines = [f"python main.py {recipe['train']} --save {save}"]
    if "finetune" in recipe:
        lines.append(f"python finetune.py {recipe['finetune']} --save {save}")
    for stage, script in (("cache", "pointer.py"), ("dynamic", "dynamic.py"), ("both", "dynamic.py")):
        if stage in recipe:
            lines.append(f"python {script} --data {data} --save {save} {recipe[stage]}")
    return lines
