"""`make demo`: the shipped base, fine-tuned three ways on two tasks, in minutes on a laptop."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from minipeft.checkpoint import load_adapter
from minipeft.compare import Plan, adapter_folder, chosen_presets, compare
from minipeft.decoding import stream
from minipeft.gpt import GPT
from minipeft.technique import detach
from minipeft.tokenizer import Tokenizer
from minipeft.town import TASKS, base_folder

TECHNIQUES = ("full", "BitFit", "LoRA")
DOCUMENTS = 3  # of each kind, before and after


def demo(folder, jobs=2, console=None):
    """Compare full fine-tuning, BitFit and LoRA on dialect and mood; show text before and after.

    Writes results.json, table.md, pictures and adapters to `folder`. Returns the results.
    """
    console = console or Console()
    folder = Path(folder)
    console.print(
        "minipeft: a GPT of about a million parameters that grew up in Tiny Town learns a new "
        "dialect, and to read the mood of a story. Three ways, the same base, the same steps."
    )
    plan = Plan(chosen_presets(TECHNIQUES), ("dialect", "mood"), adapters=str(folder / "adapters"))
    results = compare(plan, folder, jobs=jobs, console=console)
    show_text(folder, console)
    console.print(f"\nresults.json, table.md, pictures and adapters are in {folder}")
    return results


def show_text(folder, console):
    """Stories as the base writes them and as LoRA on the dialect does; moods as LoRA reads them."""
    model = GPT.from_pretrained(base_folder())
    tokenizer = Tokenizer.load(base_folder())
    write_stories(model, tokenizer, console, "before: what the base writes")
    load_adapter(model, adapter_folder(folder / "adapters", "LoRA", "dialect"))
    write_stories(model, tokenizer, console, "after LoRA on the dialect: the time first, the sky")
    detach(model)
    load_adapter(model, adapter_folder(folder / "adapters", "LoRA", "mood"))
    console.rule("after LoRA on mood: was it a good day?", align="left")
    for example in TASKS["mood"].test()[:DOCUMENTS]:
        stream(model, tokenizer, example.prompt, temperature=0, max_new_tokens=2)
        console.print(f"   (right: {example.completion.strip()})", markup=False)


def write_stories(model, tokenizer, console, title):
    console.rule(title, align="left")
    for seed in range(DOCUMENTS):
        stream(model, tokenizer, "", seed=seed, max_new_tokens=60)
        print()
