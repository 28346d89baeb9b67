r"""The folder `data/`: where it is, what is in it, and the one command that makes it again.

    base/config.json            the pre-trained base, a Hugging Face GPT-2 folder
    base/model.safetensors
    base/tokenizer.tiktoken     its vocabulary
    base.json                   what was measured on the base, next to the best possible
    floors.json                 the optimum of every task, and of home

Vocabulary and floors come out the same everywhere, bit for bit; the base does on the same kind of
machine.
"""

from pathlib import Path

from minipeft.atomic import write_json
from minipeft.gpt import GPT
from minipeft.tokenizer import FILE_NAME, Tokenizer
from minipeft.town import base, tasks

PACKAGE = Path(__file__).resolve().parent.parent


def data_folder() -> Path:
    """`data/` of the checkout this package is in, or the copy inside an installed wheel."""
    for folder in (PACKAGE / "_data", PACKAGE.parent / "data"):
        if (folder / "base" / FILE_NAME).exists():
            return folder
    raise FileNotFoundError(
        f"no data folder beside {PACKAGE} nor in it: install the wheel, "
        "or make it with 'minipeft pretrain'"
    )


def base_folder() -> Path:
    """The shipped base: a model folder with its tokenizer."""
    return data_folder() / "base"


def load_base() -> tuple[GPT, Tokenizer]:
    """(model, tokenizer) as shipped, in eval mode."""
    return GPT.from_pretrained(base_folder()).eval(), Tokenizer.load(base_folder())


def floors() -> dict:
    """Every number that is computed from the generator alone, rounded to 1e-9 so that all machines
    agree."""
    table = {
        name: {
            "metric": t.metric,
            "floor": t.floor,
            "best": t.best,
            "unadapted": t.unadapted,
            "chance": t.chance,
        }
        for name, t in tasks.TASKS.items()
    }
    found = {"tasks": table, "home": tasks.home_floor(), "mix": base.mix_floor()}
    return _rounded(found | {"kinds": {kind: base.mix_floor(kind) for kind in base.KINDS}})


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return round(value, 9) if isinstance(value, float) else value


def build_data(folder=None, seed: int = 0, steps: int = base.STEPS, show: bool = True) -> Path:
    """Make everything in `folder` again (None: the checkout's data/): vocabulary, base,
    measurements, floors.

    seed: of the documents and the training. steps: fewer make a worse base sooner. Returns the
    folder.
    """
    folder = Path(folder) if folder is not None else PACKAGE.parent / "data"
    (folder / "base").mkdir(parents=True, exist_ok=True)
    texts = base.pretraining_documents(seed)
    tokenizer = base.train_tokenizer(texts)
    write_json(folder / "floors.json", floors())
    model = base.pretrain(texts, tokenizer, steps, seed, show)
    model.save_pretrained(folder / "base")
    tokenizer.save(folder / "base" / FILE_NAME)
    write_json(
        folder / "base.json", {k: round(v, 4) for k, v in base.measure(model, tokenizer).items()}
    )
    return folder
