"""What goes wrong in grading."""

from tests.mutants import Mutant

GRADE = "minipeft/labs/engine/grade.py"
WATCH = "minipeft/labs/engine/watch.py"
WORKER = "minipeft/labs/engine/worker.py"
STUB = "minipeft/labs/engine/stub.py"
GRADING = "tests/labs/test_grading.py"
TESTS = [
    "tests/labs/test_labs.py -k stub_holds",
    f"{GRADING} -k 'missing or link or half or before or other_f or hidden or gradesc or same_sub'",
    f"{GRADING} -k 'exit or ending or left_behind or hundred or memory_is'",
]

MUTANTS = [
    Mutant(
        name="hidden cases are the visible ones",
        file=GRADE,
        find="return [1000 + 3 * seed + n for n in range(3)]",
        replace="return [1, 2, 3]",
        why="the seed is read and forgotten",
        invariant="hidden cases find what fits the visible shapes alone",
    ),
    Mutant(
        name="links are followed",
        file=GRADE,
        find="if file.is_symlink() or not file.is_file():",
        replace="if not file.is_file():",
        why="is_file follows links",
        invariant="a link could lead to the reference",
    ),
    Mutant(
        name="hidden tests shown",
        file=GRADE,
        find='"visibility": "after_published" if test.hidden else "visible",',
        replace='"visibility": "visible",',
        why="one visibility for all",
        invariant="hidden tests are not visible before grades are",
    ),
    Mutant(
        name="the sum of what ran",
        file=GRADE,
        find="return sum(test.points for test in self.tests if not test.bonus)",
        replace="return sum(t.points for t in self.tests if t.status == 'passed') or 1",
        why="the sum taken over the submission's own results",
        invariant="a file that does not import scores 0 of the full sum",
    ),
    Mutant(
        name="results at the end only",
        file=GRADE,
        find="                write_results(grade, out)\n\n        tell()\n",
        replace="                write_results(grade, out)\n\n",
        why="one write is enough when all goes well",
        invariant="results are there before the end",
    ),
    Mutant(
        name="everything in a submission is taken",
        file=GRADE,
        find="        found[path or name] = content\n    return found\n",
        replace="        found[path or name] = content\n"
        "    more = [f for f in Path(folder).glob('*.py') if f.name not in lab.handed_out]\n"
        "    return found | {f'minipeft/{f.name}': f.read_bytes() for f in more}\n",
        why="copying the folder is shorter",
        invariant="only what the lab hands out is taken",
    ),
    Mutant(
        name="sys.exit ends the run",
        file=WORKER,
        find="        returned = job()\n    except BaseException as problem:",
        replace="        returned = job()\n    except Exception as problem:",
        why="Exception looks like everything",
        invariant="an exit inside a function fails its tests alone",
    ),
    Mutant(
        name="addresses in messages",
        file=WORKER,
        find='    said = re.sub(r"0x[0-9a-f]{6,}", "0x...", said.replace(tree, "."))\n',
        replace="",
        why="a message is a message",
        invariant="the same submission twice gives the same bytes",
    ),
    Mutant(
        name="everything printed is kept",
        file=WORKER,
        find="self.kept += text[: PAGE - len(self.kept)]",
        replace="self.kept += text[:30_000]",
        why="students want to see what they print",
        invariant="printing 100 MB is bounded",
    ),
    Mutant(
        name="memory without a limit",
        file=WORKER,
        find="        resource.setrlimit(resource.RLIMIT_AS, (most, most))\n",
        replace="",
        why="there is plenty",
        invariant="memory is limited",
    ),
    Mutant(
        name="processes outlive their test",
        file=WATCH,
        find="            os.killpg(pid, signal.SIGKILL)\n",
        replace="            pass\n",
        why="the process itself has ended, so all is well",
        invariant="a process that is left behind is ended",
    ),
    Mutant(
        name="no more tests after one that died",
        file=WATCH,
        find="            strikes += 1\n",
        replace="            strikes = STRIKES\n",
        why="the first death decides",
        invariant="ending the process fails its tests alone",
    ),
    Mutant(
        name="the last line of a body stays",
        file=STUB,
        find="        lines[first - 1 : last] = [",
        replace="        lines[first - 1 : last - 1] = [",
        why="off by one at the end",
        invariant="a stub holds no solution",
    ),
    Mutant(
        name="the docstring goes as well",
        file=STUB,
        find="    if ast.get_docstring(node) is not None:\n",
        replace="    if False:\n",
        why="the whole body is replaced",
        invariant="docstrings stay",
    ),
    Mutant(
        name="half a character is written as it is",
        file=GRADE,
        find='text.encode(errors="replace")',
        replace="text.encode()",
        why="all text is UTF-8",
        invariant="what a student prints ends no grading",
    ),
]
