"""What goes wrong in attaching, switching, merging and reporting."""

from tests.mutants import Mutant

FILE = "minipeft/technique.py"
TESTS = [
    "tests/test_technique.py",
    "tests/test_full.py",
    'tests/contract -k "LoRA or BitFit or Head"',
]

MUTANTS = [
    Mutant(
        name="the base is not frozen",
        file=FILE,
        find="        attachment.freeze_base(model)\n        model.attachments.append",
        replace="        model.attachments.append",
        why="the adapter trains anyway",
        invariant="only what is declared is trained",
    ),
    Mutant(
        name="earlier techniques are frozen too",
        file=FILE,
        find="for a in (*model.attachments, self) for p",
        replace="for a in (self,) for p",
        why="everything that was there is the base",
        invariant="compositions train all of their parts",
    ),
    Mutant(
        name="frozen for good",
        file=FILE,
        find=("        for parameter in self.froze:\n            parameter.requires_grad_(True)"),
        replace=(
            "        for parameter in self.froze:\n            parameter.requires_grad_(False)"
        ),
        why="copied from freezing",
        invariant="detach gives back the flags",
    ),
    Mutant(
        name="everything unfrozen",
        file=FILE,
        find=(
            "self.froze = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]"
        ),
        replace="self.froze = [p for p in model.parameters() if id(p) not in mine]",
        why="all of the base is frozen, all of it is thawed",
        invariant="what somebody else froze stays frozen",
    ),
    Mutant(
        name="a failing install is left half done",
        file=FILE,
        find=(
            "        except BaseException:\n"
            "            attachment.uninstall()\n"
            "            raise\n"
            "        attachment.freeze"
        ),
        replace="        except BaseException:\n            raise\n        attachment.freeze",
        why="nobody thinks of it",
        invariant="attach is all or nothing",
    ),
    Mutant(
        name="taken off first in, first out",
        file=FILE,
        find="        for swap in reversed(self.swaps if self.installed else ()):",
        replace="        for swap in self.swaps if self.installed else ():",
        why="the order of installing",
        invariant="last in, first out",
    ),
    Mutant(
        name="attachments come off in the order they went on",
        file=FILE,
        find="    for attachment in reversed(active):\n        attachment.uninstall()",
        replace="    for attachment in active:\n        attachment.uninstall()",
        why="the order of installing",
        invariant="stacked adapters come off cleanly",
    ),
    Mutant(
        name="the mode is not taken over",
        file=FILE,
        find="            module.train(model.training)",
        replace="            module.train()",
        why="new modules are in train mode",
        invariant="attach takes over the mode",
    ),
    Mutant(
        name="a name can be taken twice",
        file=FILE,
        find="        if any(a.name == name for a in model.attachments):",
        replace="        if False:",
        why="a dict would have replaced it",
        invariant="attaching the same name twice is an error",
    ),
    Mutant(
        name="disabled forgets to come back after an error",
        file=FILE,
        find="    try:\n        yield model\n    finally:\n        if reinstall:",
        replace="    yield model\n    if True:\n        if reinstall:",
        why="a generator runs to its end, unless it does not",
        invariant="disabled comes back after an error",
    ),
    Mutant(
        name="switching only switches off",
        file=FILE,
        find="            attachment.active = attachment.name in wanted",
        replace=("            attachment.active = attachment.active and attachment.name in wanted"),
        why="the loop that turns the others off",
        invariant="set_adapter makes exactly these active",
    ),
    Mutant(
        name="a clone shares the base's memory",
        file=FILE,
        find="nn.Parameter(wrap.resolve(model, path).detach().clone())",
        replace="nn.Parameter(wrap.resolve(model, path).detach())",
        why="detach looks like a copy",
        invariant="after training every base tensor is bitwise unchanged",
    ),
    Mutant(
        name="merging takes the inactive ones too",
        file=FILE,
        find="for a in model.attachments if a.active for swap in a.swaps",
        replace="for a in model.attachments for swap in a.swaps",
        why="all that is attached",
        invariant="merge folds every active attachment",
    ),
    Mutant(
        name="merged in the order of attaching",
        file=FILE,
        find="sorted(swaps, key=merging_turn)",
        replace="swaps",
        why="the order in which they were put on",
        invariant="a weight or bias trained above a LoRA or IA3 does not replace what they add",
    ),
    Mutant(
        name="switched off twice, on twice",
        file=FILE,
        find="active = [a for a in model.attachments if a.active and a.installed]",
        replace="active = [a for a in model.attachments if a.active]",
        why="active ones are on the model",
        invariant="disabled inside disabled, and a save in it, leave the base in place",
    ),
    Mutant(
        name="attached where it will be lost",
        file=FILE,
        find="    if off or isinstance(model.attachments, Folded):",
        replace="    if off:",
        why="a merged model is a plain GPT",
        invariant="what is attached inside merged would be gone afterwards: an error",
    ),
    Mutant(
        name="changed while it is off",
        file=FILE,
        find="    if off or isinstance(model.attachments, Folded):",
        replace="    if isinstance(model.attachments, Folded):",
        why="only merged replaces the list",
        invariant="the end of disabled must find what it switched off",
    ),
    Mutant(
        name="the merged model is called the base",
        file=FILE,
        find="    if isinstance(model.attachments, Folded):\n        check",
        replace="    if False:\n        check",
        why="nothing is attached, so there is nothing to switch off",
        invariant="disabled is the base, or an error",
    ),
    Mutant(
        name="a copy of a merged model stays closed",
        file=FILE,
        find="        return []  # a copy stays merged, a plain GPT",
        replace="        return Folded()",
        why="a deep copy is a copy",
        invariant="a copy made inside merged is a plain model",
    ),
    Mutant(
        name="lists stay lists",
        file=FILE,
        find='    if isinstance(value, list | tuple | range) and "list" not in hint:',
        replace="    if isinstance(value, tuple | range):",
        why="check takes any sequence",
        invariant="an adapter that can be trained can be saved",
    ),
    Mutant(
        name="numbers of NumPy stay what they are",
        file=FILE,
        find='    if hasattr(value, "tolist"):',
        replace='    if hasattr(value, "tolist") and value.ndim:',
        why="np.int64(4) == 4",
        invariant="an adapter that can be trained can be saved",
    ),
    Mutant(
        name="merged leaves the merged weights",
        file=FILE,
        find=(
            "            model.attachments = kept\n"
            "            for parent, name, current in reversed(undo):\n"
            "                setattr(parent, name, current)"
        ),
        replace="            model.attachments = kept",
        why="the wrappers come back, and that seems enough",
        invariant="merged restores the tensors bitwise",
    ),
    Mutant(
        name="merged runs without gradients",
        file=FILE,
        find="            with torch.enable_grad():\n                yield model",
        replace="            yield model",
        why="merging needs none",
        invariant="what happens inside merged is up to the user",
    ),
    Mutant(
        name="after a merge the base stays frozen",
        file=FILE,
        find="        parameter.requires_grad_(True)\n    return model",
        replace="        pass\n    return model",
        why="nobody trains a merged model, they say",
        invariant="a merged model is a plain, trainable GPT",
    ),
    Mutant(
        name="what cannot be merged merges",
        file=FILE,
        find="        if attachment.technique.cannot_merge:",
        replace="        if False:",
        why="the wrapper would raise anyway, sometimes",
        invariant="an error with the reason",
    ),
    Mutant(
        name="shared tensors are saved twice",
        file=FILE,
        find="                if id(tensor) not in seen:",
        replace="                if True:",
        why="names differ, so tensors differ",
        invariant="each tensor once",
    ),
    Mutant(
        name="half of a bad file is loaded",
        file=FILE,
        find=(
            "        if wrong:\n"
            '            raise ValueError(f"these tensors do not fit adapter {self.name!r}: '
            '" + "; ".join(wrong))\n'
            "        with torch.no_grad():\n"
            "            for name, tensor in mine.items():\n"
            "                tensor.copy_(tensors[name])"
        ),
        replace=(
            "        with torch.no_grad():\n"
            "            for name, tensor in mine.items():\n"
            "                if name in tensors and tensor.shape == tensors[name].shape:\n"
            "                    tensor.copy_(tensors[name])\n"
            "        if wrong:\n"
            '            raise ValueError(f"these tensors do not fit adapter {self.name!r}: '
            '" + "; ".join(wrong))'
        ),
        why="copy what fits, then complain",
        invariant="nothing is half-loaded",
    ),
    Mutant(
        name="unknown tensors are ignored",
        file=FILE,
        find='wrong += [f"unknown {n}" for n in tensors if n not in mine]',
        replace="wrong += []",
        why="strict=False",
        invariant="an unknown tensor is named",
    ),
    Mutant(
        name="extra losses of switched-off techniques count",
        file=FILE,
        find="for a in model.attachments if a.active)\n    terms",
        replace="for a in model.attachments)\n    terms",
        why="all that is attached",
        invariant="only active techniques act",
    ),
    Mutant(
        name="after_step counts from zero",
        file=FILE,
        find="        steps += 1\n        after_step(model, steps, total_steps)",
        replace="        after_step(model, steps, total_steps)\n        steps += 1",
        why="Python counts from zero",
        invariant="the last step is total_steps",
    ),
    Mutant(
        name="the report counts frozen tensors as trained",
        file=FILE,
        find="return sum(_numel(r.shape) for r in self.rows if r.trained)",
        replace="return sum(_numel(r.shape) for r in self.rows if r.why)",
        why="every row has a reason",
        invariant="the report's totals",
    ),
    Mutant(
        name="bytes are numbers of elements",
        file=FILE,
        find="size = parameter.numel() * parameter.element_size()",
        replace="size = parameter.numel() * 4",
        why="float32 is what one has",
        invariant="the report's bytes",
    ),
    Mutant(
        name="thawed for good",
        file=FILE,
        find="        for parameter in self.thawed:\n            parameter.requires_grad_(False)\n",
        replace="",
        why="the flags that were cleared are set again, and that seems all",
        invariant="a load that fails leaves a frozen base frozen",
    ),
]
